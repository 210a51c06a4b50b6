//! A lock that many may have for reading or one for writing (`mmap_lock`): sleeps.
//!
//! One word: how many read, whether one writes, whether one waits to write (then no new reader goes in, so that faults
//! do not starve who unmaps), and whether anybody sleeps.

use super::Waiter;
use super::atomic::{AtomicU32, Ordering};

const WRITER: u32 = 1 << 31;
const WANTED: u32 = 1 << 30;
const SLEEPERS: u32 = 1 << 29;
const READERS: u32 = SLEEPERS - 1;

/// A lock for readers and writers.
#[derive(Debug)]
pub(crate) struct RwLock {
    state: AtomicU32,
}

impl RwLock {
    pub(crate) fn new() -> RwLock {
        RwLock {
            state: AtomicU32::new(0),
        }
    }

    /// Waits until nobody writes or waits to write.
    pub(crate) fn read<W: RwWaiter>(&self, waiter: W) -> RwGuard<'_, W> {
        self.wait(&waiter, |state| {
            (state & (WRITER | WANTED) == 0).then_some(state + 1)
        });
        RwGuard {
            lock: self,
            write: false,
            waiter,
        }
    }

    /// Waits until nobody has it.
    pub(crate) fn write<W: RwWaiter>(&self, waiter: W) -> RwGuard<'_, W> {
        let mut round = 0;
        loop {
            let state = self.state.load(Ordering::Relaxed);
            let new = if state & (WRITER | READERS) == 0 {
                state & !WANTED | WRITER
            } else {
                state | WANTED | SLEEPERS
            };
            // Acquire pairs with the Release of whoever had it before.
            if self
                .state
                .compare_exchange_weak(state, new, Ordering::Acquire, Ordering::Relaxed)
                .is_ok()
            {
                if new & WRITER != 0 && state & WRITER == 0 {
                    return RwGuard {
                        lock: self,
                        write: true,
                        waiter,
                    };
                }
                self.sleep(&waiter, new, &mut round);
            }
        }
    }

    fn wait<W: RwWaiter>(&self, waiter: &W, go: impl Fn(u32) -> Option<u32>) {
        let mut round = 0;
        loop {
            let state = self.state.load(Ordering::Relaxed);
            let (new, got) = match go(state) {
                Some(new) => (new, true),
                None => (state | SLEEPERS, false),
            };
            // Acquire: as in `write`.
            if self
                .state
                .compare_exchange_weak(state, new, Ordering::Acquire, Ordering::Relaxed)
                .is_ok()
            {
                if got {
                    return;
                }
                self.sleep(waiter, new, &mut round);
            }
        }
    }

    fn sleep<W: RwWaiter>(&self, waiter: &W, seen: u32, round: &mut u32) {
        waiter.park(&self.state, seen);
        waiter.relax(*round);
        super::spin_hint();
        *round = round.saturating_add(1);
    }
}

/// A waiter who can wake all others.
pub(crate) trait RwWaiter: Waiter {
    /// Wakes all who sleep on the word.
    fn unpark_all(&self, word: &AtomicU32);
}

/// The lock is held as long as this lives.
#[derive(Debug)]
#[must_use]
pub(crate) struct RwGuard<'a, W: RwWaiter> {
    lock: &'a RwLock,
    write: bool,
    waiter: W,
}

impl<W: RwWaiter> Drop for RwGuard<'_, W> {
    fn drop(&mut self) {
        let state = &self.lock.state;
        let mut old = state.load(Ordering::Relaxed);
        loop {
            let left = if self.write { old & !WRITER } else { old - 1 };
            let free = left & (READERS | WRITER) == 0;
            // Whoever wants to write says so again when he wakes up.
            let new = if free {
                left & !(SLEEPERS | WANTED)
            } else {
                left
            };
            // Release pairs with the Acquire of the next to have it.
            match state.compare_exchange_weak(old, new, Ordering::Release, Ordering::Relaxed) {
                Ok(_) => {
                    if free && left & SLEEPERS != 0 {
                        self.waiter.unpark_all(state);
                    }
                    return;
                }
                Err(now) => old = now,
            }
        }
    }
}
