//! Model checks of the table of bad pages under loom: a page that is marked while its owner frees it goes out of use once, whichever way it goes, and the
//! descriptors that lie with it have one owner.
//!
//! What stands here for a CPU's lists, a zone and a page's word does what `PerCpuPages::push`, `LockedZone::free_block`, `Mm::mf_note` and
//! `Mm::mf_free` do with the table; the table and the locks are the real ones.

use loom::sync::Arc;
use loom::thread;

use super::bad::{BadPages, Health};
use crate::address::{Pfn, PhysAddr};
use crate::sync::atomic::{AtomicU32, Ordering};
use crate::sync::models::Fences;
use crate::sync::{LocalLock, SpinLock, UnsafeCell, Waiter};

const PAGE: Pfn = Pfn(8);
const SPARE: (PhysAddr, u32) = (PhysAddr(64), 10);

/// What the page's word says.
const BARE: u32 = 0;
const IN_PCP: u32 = 1;
const IN_ZONE: u32 = 2;
const OUT: u32 = 3;

struct Spins;

impl Waiter for Spins {
    fn sleeps(&self) -> bool {
        false
    }
    fn relax(&self, _round: u32) {}
    fn park(&self, _word: &AtomicU32, _value: u32) {}
    fn unpark(&self, _word: &AtomicU32) {}
}

/// Which way the owner frees the page.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    /// Into the CPU's list, from where the table says no, to the zone.
    List,
    /// The same by the fast try of an interrupt.
    Try,
    /// To the zone.
    Zone,
    /// Planted bug: the table is looked at before the list is entered.
    LooksFirst,
}

/// What the marker does before he looks at the word.
#[derive(Clone, Copy)]
struct Marker {
    locks_zone: bool,
    drains: bool,
    /// And forgets the page again (`soft_offline_page` that failed, `unpoison_memory`).
    forgets: bool,
}

const RIGHT: Marker = Marker {
    locks_zone: true,
    drains: true,
    forgets: false,
};

struct Machine {
    bad: BadPages<2>,
    word: AtomicU32,
    lock: LocalLock,
    /// Is the page in the CPU's list?
    list: UnsafeCell<bool>,
    /// Is it in the zone's?
    zone: SpinLock<bool>,
    /// How often its descriptors came back.
    spares: AtomicU32,
}

// SAFETY: the models reach `list` only under `lock`; that this is enough is what they check.
unsafe impl Sync for Machine {}
// SAFETY: the same.
unsafe impl Send for Machine {}

impl Machine {
    fn new() -> Arc<Machine> {
        Arc::new(Machine {
            bad: BadPages::new(),
            word: AtomicU32::new(BARE),
            lock: LocalLock::new(),
            list: UnsafeCell::new(false),
            zone: SpinLock::new(false),
            spares: AtomicU32::new(0),
        })
    }

    fn publish(&self, word: u32) {
        self.word.store(word, Ordering::Release);
    }

    /// Takes the note, with the zone's lock.
    fn take(&self, nth: usize) {
        assert_eq!(self.bad.take(nth), SPARE);
        self.spares.fetch_add(1, Ordering::Relaxed);
    }

    fn free_to_zone(&self) {
        let mut listed = self.zone.lock(Spins);
        if self.bad.any()
            && let Some((page, nth)) = self.bad.find(PAGE, 0)
        {
            assert_eq!(page, PAGE);
            self.take(nth);
            return self.publish(OUT);
        }
        *listed = true;
        self.publish(IN_ZONE);
    }

    /// The list's holder puts the page in, if he may.
    fn push(&self, hit: bool) -> bool {
        if !hit {
            // SAFETY: the local lock is held.
            unsafe { *self.list.get_mut_ptr() = true };
            self.publish(IN_PCP);
        }
        !hit
    }

    /// The owner frees it.
    fn free(&self, way: Way) {
        let first = way == Way::LooksFirst && self.bad.hits(PAGE, 0);
        let pushed = match way {
            Way::Zone => false,
            Way::Try => match self.lock.try_enter(&Fences) {
                Some(_guard) => self.push(self.bad.hits(PAGE, 0)),
                None => false,
            },
            Way::List | Way::LooksFirst => {
                let _guard = self.lock.enter(&Fences);
                self.push(if way == Way::List {
                    self.bad.hits(PAGE, 0)
                } else {
                    first
                })
            }
        };
        if !pushed {
            self.publish(IN_PCP);
            self.free_to_zone();
        }
    }

    fn drain(&self) {
        let taken = {
            let _guard = self.lock.enter_remote(&Fences);
            // SAFETY: the local lock is held.
            unsafe { core::mem::replace(&mut *self.list.get_mut_ptr(), false) }
        };
        if taken {
            self.free_to_zone();
        }
    }

    /// With the lock of memory failures.
    fn mark(&self, marker: Marker) {
        self.bad.add(PAGE, Health::Broken, SPARE);
        if marker.locks_zone {
            drop(self.zone.lock(Spins));
        }
        if marker.drains {
            self.drain();
        }
        if self.word.load(Ordering::Acquire) == IN_ZONE {
            let mut listed = self.zone.lock(Spins);
            if core::mem::replace(&mut *listed, false) {
                let (_, nth) = self.bad.find(PAGE, 0).expect("only its zone forgets it");
                self.take(nth);
                self.publish(OUT);
            }
        }
        // Whatever else it is: in use, or in somebody's hands on its way to the zone. He who has it takes it out of use.
        if marker.forgets {
            let _zone = self.zone.lock(Spins);
            if let Some((_, nth)) = self.bad.find(PAGE, 0) {
                self.take(nth);
            }
        }
    }
}

fn fails_while_freed(way: Way, marker: Marker) {
    loom::model(move || {
        let machine = Machine::new();
        let other = machine.clone();
        let handle = thread::spawn(move || other.free(way));
        machine.mark(marker);
        handle.join().unwrap();
        let word = machine.word.load(Ordering::Relaxed);
        if !marker.forgets {
            assert_eq!(word, OUT, "nobody is handed a page that is bad");
        }
        assert_eq!(machine.spares.load(Ordering::Relaxed), 1);
        assert_eq!(machine.bad.pending(), 0);
        // It is in one place.
        // SAFETY: the others are gone.
        let listed = unsafe { *machine.list.get_mut_ptr() };
        assert_eq!(listed, word == IN_PCP);
        assert_eq!(*machine.zone.lock(Spins), word == IN_ZONE);
    });
}

#[test]
fn a_page_that_fails_while_it_is_freed_goes_out_of_use() {
    for way in [Way::List, Way::Try, Way::Zone] {
        fails_while_freed(way, RIGHT);
    }
}

#[test]
fn what_is_forgotten_meanwhile_is_free_or_out_of_use() {
    let forgets = Marker {
        forgets: true,
        ..RIGHT
    };
    for way in [Way::List, Way::Zone] {
        fails_while_freed(way, forgets);
    }
}

#[test]
#[should_panic]
fn planted_bug_the_table_is_looked_at_outside_the_lists() {
    fails_while_freed(Way::LooksFirst, RIGHT);
}

#[test]
#[should_panic]
fn planted_bug_marked_without_a_drain() {
    let marker = Marker {
        drains: false,
        ..RIGHT
    };
    fails_while_freed(Way::List, marker);
}

#[test]
#[should_panic]
fn planted_bug_marked_without_the_zone() {
    let marker = Marker {
        locks_zone: false,
        ..RIGHT
    };
    fails_while_freed(Way::Zone, marker);
}
