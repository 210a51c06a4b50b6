//! Model checks of the stack depot, under loom, and planted bugs that loom must find.

use core::panic::Location;
use std::boxed::Box;

use loom::sync::Arc;
use loom::thread;

use super::depot::{Cell, Depot, StackId};
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
