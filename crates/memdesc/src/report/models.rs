//! Model checks of the stack depot and of the entries of page history, under loom, and planted bugs that loom must find.

use core::panic::Location;
use std::boxed::Box;

use loom::sync::Arc;
use loom::thread;

use super::depot::{Cell, Depot, StackId};
use super::entry::{Entry, PageTrack, Track};
use crate::address::Pfn;
use crate::memmap::word::PageType;
use crate::sync::atomic::{AtomicU32, Ordering};

type Boxed = Depot<Box<[AtomicU32]>, Box<[Cell]>>;

/// One bucket, so that all meet in its chain.
fn depot(cells: usize) -> Boxed {
    Depot::new(
        (0..1).map(|_| AtomicU32::new(0)).collect(),
        (0..cells).map(|_| Cell::new()).collect(),
    )
}

/// Two save the same stack and two others, at the same time, and a third looks.
fn savers(publish: Ordering, again: bool) {
    loom::model(move || {
        let here = Location::caller();
        let depot = Arc::new(depot(24));
        let other = depot.clone();
        let handle = thread::spawn(move || {
            let same = other.save_as(here, &[7, 8], publish, again);
            let own = other.save_as(here, &[1], publish, again);
            (same, own)
        });
        let same = depot.save_as(here, &[7, 8], publish, again);
        // What a chain leads to is whole, whoever put it there.
        let seen = depot.save_as(here, &[1], publish, again);
        assert_eq!(depot.get(same).unwrap().frames(), [7, 8]);
        assert_eq!(depot.get(seen).unwrap().frames(), [1]);
        let (theirs, own) = handle.join().unwrap();
        assert_eq!((same, seen), (theirs, own));
        assert_ne!(same, seen);
        assert_eq!(depot.info().lost, 0);
    });
}

#[test]
fn the_same_stack_has_one_number() {
    savers(Ordering::Release, true);
}

#[test]
#[should_panic]
fn planted_bug_who_loses_does_not_look_again() {
    savers(Ordering::Release, false);
}

/// A number comes to another thread through the chain alone; what it finds there is whole.
fn found_by_others(publish: Ordering) {
    loom::model(move || {
        let here = Location::caller();
        let depot = Arc::new(depot(24));
        let other = depot.clone();
        let handle = thread::spawn(move || other.save_as(here, &[5], publish, true));
        // In a depot of one bucket that is its place, if it is there.
        let place = StackId::from_bits(1);
        if let Some(stack) = depot.get(place) {
            assert_eq!(stack.frames(), [5]);
        }
        handle.join().unwrap();
    });
}

#[test]
fn who_finds_a_stack_finds_all_of_it() {
    found_by_others(Ordering::Release);
}

#[test]
#[should_panic]
fn planted_bug_published_without_release() {
    found_by_others(Ordering::Relaxed);
}

#[test]
fn a_full_depot_says_so() {
    loom::model(|| {
        let here = Location::caller();
        let depot = Arc::new(depot(5));
        let other = depot.clone();
        let handle = thread::spawn(move || other.save(here, &[1, 2]));
        let mine = depot.save(here, &[3, 4]);
        let theirs = handle.join().unwrap();
        // Room for one: somebody got it, and the other one was told.
        assert!((mine == StackId::LOST) != (theirs == StackId::LOST));
        assert_eq!(depot.info().lost, 1);
    });
}

/// An event all of whose fields are one number.
fn event(n: u32) -> PageTrack {
    PageTrack {
        track: Track {
            location: Location::caller(),
            cpu: n,
            when: u64::from(n),
            stack: StackId::from_bits(n),
        },
        order: n as usize,
        kind: PageType::Bare,
        serial: u64::from(n),
    }
}

/// What the models leave out, each for itself.
#[derive(Clone, Copy)]
struct Ways {
    fenced: bool,
    release: Ordering,
    twice: bool,
}

const RIGHT: Ways = Ways {
    fenced: true,
    release: Ordering::Release,
    twice: true,
};

/// As `History::note` does it with an entry that it takes for another block.
fn write(entry: &Entry, seq: u32, n: u32, ways: Ways) -> bool {
    if !entry.claim_as(seq, ways.fenced) {
        return false;
    }
    entry.pfn.store(n, Ordering::Relaxed);
    entry.events[0].set(&event(n));
    entry.release_as(ways.release);
    true
}

/// What is read is what somebody wrote, all of it.
fn look(entry: &Entry, ways: Ways) {
    let Some((_, held)) = entry.read_as(ways.twice) else {
        return;
    };
    if held.head == Pfn::NONE {
        assert!(held.allocated.is_none());
        return;
    }
    let found = held.allocated.expect("whole");
    let n = held.head.0;
    assert_eq!(
        (found.track.cpu, found.track.when, found.track.stack.bits()),
        (n, u64::from(n), n)
    );
    assert_eq!((found.order, found.serial), (n as usize, u64::from(n)));
}

/// One writes over what was there, another reads.
fn overwritten(ways: Ways) {
    loom::model(move || {
        let entry = Arc::new(Entry::new());
        assert!(write(&entry, 0, 1, RIGHT));
        let other = entry.clone();
        let handle = thread::spawn(move || assert!(write(&other, 2, 2, ways)));
        look(&entry, ways);
        handle.join().unwrap();
        look(&entry, RIGHT);
    });
}

#[test]
fn an_entry_is_read_whole_or_not_at_all() {
    overwritten(RIGHT);
}

#[test]
#[should_panic]
fn planted_bug_claimed_without_a_fence() {
    overwritten(Ways {
        fenced: false,
        ..RIGHT
    });
}

#[test]
#[should_panic]
fn planted_bug_released_without_release() {
    overwritten(Ways {
        release: Ordering::Relaxed,
        ..RIGHT
    });
}

#[test]
#[should_panic]
fn planted_bug_not_looked_at_twice() {
    overwritten(Ways {
        twice: false,
        ..RIGHT
    });
}

/// Two want the same entry, as it was when both saw it: one has it, and the other knows.
#[test]
fn one_of_two_has_an_entry() {
    loom::model(|| {
        let entry = Arc::new(Entry::new());
        let other = entry.clone();
        let handle = thread::spawn(move || write(&other, 0, 1, RIGHT));
        let mine = write(&entry, 0, 2, RIGHT);
        let theirs = handle.join().unwrap();
        assert!(mine != theirs);
        look(&entry, RIGHT);
    });
}
