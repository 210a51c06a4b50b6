//! Model checks of a pool under loom: nobody sleeps for ever, and when all is back the shelf is full.

use std::sync::Arc;
use std::vec::Vec;

use loom::thread;

use super::level::{Level, Place, Take};
use crate::sync::atomic::{AtomicU32, Ordering};
use crate::sync::models::Waits;
use crate::sync::{RwWaiter, Waiter};

const ELEMENTS: usize = 2;

struct Pool {
    level: Level,
    waits: Waits,
    /// Those who sleep for an element; each word has sleepers of its own.
    sleepers: Waits,
    /// How many have each element.
    had: [AtomicU32; ELEMENTS],
    shelf: *mut [*mut u8],
}

// SAFETY: the shelf is reached by the level alone, under its lock, and freed after it.
unsafe impl Sync for Pool {}
// SAFETY: the same.
unsafe impl Send for Pool {}

impl Drop for Pool {
    fn drop(&mut self) {
        // SAFETY: from a box, and nobody uses it any more.
        drop(unsafe { std::boxed::Box::from_raw(self.shelf) });
    }
}

fn element(n: usize) -> *mut u8 {
    core::ptr::without_provenance_mut(n + 1)
}

impl Pool {
    /// A full one.
    fn new(n: usize) -> Arc<Pool> {
        let shelf: Vec<*mut u8> = (0..n).map(element).collect();
        let shelf = std::boxed::Box::into_raw(shelf.into_boxed_slice());
        // SAFETY: `n` elements, freed with the pool.
        let level = unsafe { Level::full(shelf.cast(), n) };
        let waits = Waits::new(true, false);
        Arc::new(Pool {
            level,
            waits,
            sleepers: Waits::new(true, false),
            had: [const { () }; ELEMENTS].map(|()| AtomicU32::new(0)),
            shelf,
        })
    }

    fn wake(&self, wake: bool) {
        if wake {
            self.level.wake(|turn| self.sleepers.unpark_all(turn));
        }
    }

    /// `Mempool::alloc_bulk`, when ordinary memory is out.
    fn alloc(&self, n: usize) -> Vec<*mut u8> {
        let mut out = std::vec![core::ptr::null_mut(); n];
        let place = Place::new();
        let mut queued = None;
        loop {
            let mut hold = self.level.lock(self.waits.clone());
            match hold.take(&mut out, queued) {
                Take::All { wake } => {
                    drop(hold);
                    self.wake(wake);
                    break;
                }
                Take::TooMany => panic!("too many"),
                Take::Wait(turn) => {
                    if queued.is_none() {
                        hold.join(&place, n);
                        queued = Some(&place);
                    }
                    drop(hold);
                    self.sleepers.park(self.level.turn(), turn);
                }
            }
        }
        for &e in &out {
            let before = self.had[e.addr() - 1].fetch_add(1, Ordering::Relaxed);
            assert_eq!(before, 0, "two have it");
        }
        out
    }

    /// `Mempool::free`; says whether the shelf wanted it.
    fn free(&self, e: *mut u8, way: Way) -> bool {
        if let Some(had) = self.had.get(e.addr() - 1) {
            had.fetch_sub(1, Ordering::Relaxed);
        }
        if way != Way::AlwaysIn && !self.level.is_short() {
            return false;
        }
        let mut hold = self.level.lock(self.waits.clone());
        let put = hold.give(e);
        let wake = put && hold.wakes() && way != Way::NoWake;
        drop(hold);
        self.wake(wake);
        put
    }

    fn is_full(&self) {
        let (curr, min) = self.level.lock(self.waits.clone()).level();
        assert_eq!(curr, min, "not all is back");
        assert_eq!(self.level.waiting(), 0);
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    Right,
    NoWake,
    AlwaysIn,
}

/// So many users take `each` of a pool of `n`, by so many requests, and give them back.
fn users(n: usize, users: usize, requests: usize, each: usize, way: Way) {
    loom::model(move || {
        let pool = Pool::new(n);
        let user = move |pool: Arc<Pool>| {
            let mut all = Vec::new();
            for _ in 0..requests {
                all.extend(pool.alloc(each));
            }
            for e in all {
                pool.free(e, way);
            }
        };
        let others: Vec<_> = (1..users)
            .map(|_| {
                let pool = pool.clone();
                thread::spawn(move || user(pool))
            })
            .collect();
        user(pool.clone());
        others.into_iter().for_each(|o| o.join().unwrap());
        pool.is_full();
    });
}

#[test]
fn a_pool_of_one_serves_two_in_turn() {
    users(1, 2, 1, 1, Way::Right);
}

#[test]
fn a_pool_of_one_serves_three_in_turn() {
    users(1, 3, 1, 1, Way::Right);
}

#[test]
fn who_wants_all_of_it_gets_all_of_it() {
    users(2, 2, 1, 2, Way::Right);
}

#[test]
fn coming_in_always_is_right_too() {
    users(1, 2, 1, 1, Way::AlwaysIn);
}

#[test]
#[should_panic]
fn planted_bug_two_halves_wait_for_each_other() {
    users(2, 2, 2, 1, Way::Right);
}

#[test]
#[should_panic]
fn planted_bug_nobody_is_woken() {
    users(1, 2, 1, 1, Way::NoWake);
}

/// Who asks for many is first, and requests for one that come later do not get past him.
#[test]
fn nobody_is_served_past_the_first() {
    loom::model(|| {
        let pool = Pool::new(2);
        let one = pool.alloc(1);
        let place = Place::new();
        {
            let mut hold = pool.level.lock(pool.waits.clone());
            assert!(matches!(
                hold.take(&mut [core::ptr::null_mut(); 2], None),
                Take::Wait(_)
            ));
            hold.join(&place, 2);
        }
        // One lies there, but it is for who is first.
        let late = {
            let pool = pool.clone();
            thread::spawn(move || {
                let mine = pool.alloc(1);
                pool.free(mine[0], Way::Right);
            })
        };
        pool.free(one[0], Way::Right);
        let mut both = [core::ptr::null_mut(); 2];
        let took = pool
            .level
            .lock(pool.waits.clone())
            .take(&mut both, Some(&place));
        let Take::All { wake } = took else {
            panic!("somebody was served past the first")
        };
        pool.wake(wake);
        both.iter().for_each(|&e| assert!(pool.free_untracked(e)));
        late.join().unwrap();
        pool.is_full();
    });
}

impl Pool {
    fn free_untracked(&self, e: *mut u8) -> bool {
        self.had[e.addr() - 1].fetch_add(1, Ordering::Relaxed);
        self.free(e, Way::Right)
    }
}

/// An element of ordinary memory is freed while others take and give back: it may fill the shelf, and then theirs goes its own way; whatever each reads, the
/// shelf is full in the end.
#[test]
fn ordinary_elements_come_between() {
    loom::model(|| {
        let pool = Pool::new(1);
        let other = {
            let pool = pool.clone();
            thread::spawn(move || {
                let mine = pool.alloc(1);
                pool.free(mine[0], Way::Right);
            })
        };
        // Nobody told this one anything of the pool: it may read what was true long ago.
        pool.free(element(ELEMENTS), Way::Right);
        other.join().unwrap();
        pool.is_full();
    });
}
