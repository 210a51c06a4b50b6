//! Model checks of the folio lock under loom: who has it has it alone, and nobody sleeps on when it is free.

// loom's own Arc cannot be dropped by a thread that unwinds from a deadlock.
use std::sync::Arc;
use std::vec::Vec;

use loom::cell::UnsafeCell;
use loom::thread;

use crate::address::Pfn;
use crate::desc::{Folio, FolioFlags};
use crate::sync::atomic::{AtomicU32, Ordering};
use crate::sync::models::Waits;
use crate::sync::{RwWaiter, Waiter};

const LOCKED: FolioFlags = FolioFlags::LOCKED;

struct Model {
    folio: Folio,
    turns: AtomicU32,
    waits: Waits,
    /// What the lock is for.
    value: UnsafeCell<u32>,
}

// SAFETY: `value` is reached only with the folio locked; that this is enough is what the models check.
unsafe impl Sync for Model {}
// SAFETY: the same.
unsafe impl Send for Model {}

/// How one waits.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    Right,
    /// Planted bug: reads the turn after he said that he waits, when it may be over.
    LateTurn,
    /// Planted bug: sleeps without another look at the flag.
    NoLook,
}

impl Model {
    fn new() -> Arc<Model> {
        let model = Model {
            folio: Folio::free(),
            turns: AtomicU32::new(0),
            waits: Waits::new(true, false),
            value: UnsafeCell::new(0),
        };
        model.folio.init(Pfn(1));
        Arc::new(model)
    }

    fn wait(&self, flag: FolioFlags, way: Way) {
        let park = |word: &AtomicU32, turn| self.waits.park(word, turn);
        if way == Way::Right {
            self.folio.wait_once(flag, &self.turns, park);
        } else {
            self.folio.set_flag(FolioFlags::WAITERS);
            let looked = way == Way::NoLook || self.folio.has_flag(flag);
            let turn = self.turns.load(Ordering::Acquire);
            if looked {
                park(&self.turns, turn);
            }
        }
        thread::yield_now();
    }

    fn clear(&self, flag: FolioFlags) {
        self.folio
            .clear_and_wake(flag, &self.turns, |word| self.waits.unpark_all(word));
    }

    /// `folio_lock`, something, and unlocks.
    fn bump(&self, way: Way) {
        while self.folio.set_flag(LOCKED) {
            self.wait(LOCKED, way);
        }
        // SAFETY: the folio is locked; loom checks that this excludes all others.
        self.value.with_mut(|v| unsafe { *v += 1 });
        self.clear(LOCKED);
    }
}

fn locked_by(threads: usize, way: Way) {
    loom::model(move || {
        let model = Model::new();
        let others: Vec<_> = (1..threads)
            .map(|_| {
                let model = model.clone();
                thread::spawn(move || model.bump(way))
            })
            .collect();
        model.bump(way);
        for other in others {
            other.join().unwrap();
        }
        // SAFETY: all others are gone.
        assert_eq!(model.value.with(|v| unsafe { *v }), threads as u32);
        assert!(!model.folio.has_flag(LOCKED));
    });
}

#[test]
fn a_folio_is_locked_by_one() {
    locked_by(2, Way::Right);
}

#[test]
fn a_folio_is_locked_by_one_of_three() {
    locked_by(3, Way::Right);
}

#[test]
#[should_panic]
fn planted_bug_turn_read_after_waiters_is_set() {
    locked_by(2, Way::LateTurn);
}

#[test]
#[should_panic]
fn planted_bug_sleeps_without_a_look() {
    locked_by(2, Way::NoLook);
}

/// Two flags share WAITERS and the turn: who waits for one is not forgotten when the other is cleared.
#[test]
fn who_waits_for_writeback_is_woken_beside_who_waits_for_the_lock() {
    loom::model(|| {
        let model = Model::new();
        let writeback = FolioFlags::WRITEBACK;
        model.folio.set_flag(writeback);
        let waiter = {
            let model = model.clone();
            thread::spawn(move || {
                while model.folio.has_flag(writeback) {
                    model.wait(writeback, Way::Right);
                }
                // SAFETY: written before the flag was cleared; loom checks.
                assert_eq!(model.value.with(|v| unsafe { *v }), 1);
            })
        };
        let locker = {
            let model = model.clone();
            thread::spawn(move || {
                while model.folio.set_flag(LOCKED) {
                    model.wait(LOCKED, Way::Right);
                }
                model.clear(LOCKED);
            })
        };
        // SAFETY: nobody reads it before the flag goes.
        model.value.with_mut(|v| unsafe { *v = 1 });
        model.clear(writeback);
        waiter.join().unwrap();
        locker.join().unwrap();
    });
}
