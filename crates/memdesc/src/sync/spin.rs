//! A lock round a value, for a zone and for a cache's slab lists: it spins, or sleeps where the kernel is a real-time one.
//!
//! Who takes it brings a [`Waiter`], which is what the holder keeps as long as he holds: his CPU if the lock spins (a
//! holder must not be preempted), nothing if it sleeps. Waiting by spinning is test-and-test-and-set, each round through the
//! platform's `relax`, since a hosted "CPU" may be a thread that the holder's thread waits behind. Waiting by sleeping is a
//! futex of three states (Drepper, "Futexes are tricky"). Either way an attempt that does not wait is one
//! compare-exchange, on one CPU as on many, and may be made from anywhere.

use core::ops::{Deref, DerefMut};

use super::UnsafeCell;
use super::atomic::{AtomicU32, Ordering};

/// How the taker of a lock waits for it, and what he keeps while he holds it.
pub(crate) trait Waiter {
    /// Does he sleep rather than spin? The same for all takers of one lock.
    fn sleeps(&self) -> bool;
    /// One round of spinning.
    fn relax(&self, round: u32);
    /// Sleeps as long as the word has this value; may come back early.
    fn park(&self, word: &AtomicU32, value: u32);
    /// Wakes one who sleeps on the word. From any context.
    fn unpark(&self, word: &AtomicU32);
}

const FREE: u32 = 0;
const HELD: u32 = 1;
/// Held, and somebody may sleep.
const AWAITED: u32 = 2;

/// A lock.
#[derive(Debug)]
pub(crate) struct SpinLock<T> {
    state: AtomicU32,
    value: UnsafeCell<T>,
}

// SAFETY: the lock hands out the value to one holder at a time, so sharing the lock is sending the value.
unsafe impl<T: Send> Sync for SpinLock<T> {}
// SAFETY: owning the lock is owning the value.
unsafe impl<T: Send> Send for SpinLock<T> {}

impl<T> SpinLock<T> {
    pub(crate) fn new(value: T) -> Self {
        SpinLock {
            state: AtomicU32::new(FREE),
            value: UnsafeCell::new(value),
        }
    }

    /// Makes a free lock of what was one, or never was: in memory that came back from another owner.
    #[cfg(not(loom))]
    pub(crate) fn reset(&self) {
        self.state.store(FREE, Ordering::Relaxed);
    }

    /// Waits for the lock.
    #[inline]
    pub(crate) fn lock<W: Waiter>(&self, waiter: W) -> SpinGuard<'_, T, W> {
        // Acquire pairs with the Release in `drop`: what the last holder wrote is seen.
        if self
            .state
            .compare_exchange(FREE, HELD, Ordering::Acquire, Ordering::Relaxed)
            .is_err()
        {
            self.wait(&waiter);
        }
        self.held(waiter)
    }

    /// Takes the lock if nobody has it. From any context.
    #[inline]
    pub(crate) fn try_lock<W: Waiter>(&self, waiter: W) -> Option<SpinGuard<'_, T, W>> {
        // Acquire: as in `lock`.
        self.state
            .compare_exchange(FREE, HELD, Ordering::Acquire, Ordering::Relaxed)
            .ok()?;
        Some(self.held(waiter))
    }

    #[inline]
    fn held<W: Waiter>(&self, waiter: W) -> SpinGuard<'_, T, W> {
        crate::inject::point("lock: taken");
        // The pointer is made once per hold, which is where loom checks that nobody else holds it.
        SpinGuard {
            lock: self,
            value: self.value.get_mut_ptr(),
            waiter,
        }
    }

    #[cold]
    fn wait(&self, waiter: &impl Waiter) {
        let mut round = 0;
        if waiter.sleeps() {
            // Acquire: as in `lock`. Whoever comes this way leaves it AWAITED: he cannot know that he was the last.
            while self.state.swap(AWAITED, Ordering::Acquire) != FREE {
                waiter.park(&self.state, AWAITED);
                super::spin_hint();
            }
            return;
        }
        loop {
            while self.state.load(Ordering::Relaxed) != FREE {
                waiter.relax(round);
                super::spin_hint();
                round = round.saturating_add(1);
            }
            // Acquire: as in `lock`.
            if self
                .state
                .compare_exchange_weak(FREE, HELD, Ordering::Acquire, Ordering::Relaxed)
                .is_ok()
            {
                return;
            }
        }
    }
}

/// The lock is held as long as this lives.
#[derive(Debug)]
pub(crate) struct SpinGuard<'a, T, W: Waiter> {
    lock: &'a SpinLock<T>,
    value: *mut T,
    /// Let go of after the lock.
    waiter: W,
}

impl<T, W: Waiter> SpinGuard<'_, T, W> {
    /// Where the value is; good as long as the guard lives.
    #[cfg(not(loom))]
    pub(crate) fn value_ptr(&self) -> core::ptr::NonNull<T> {
        match core::ptr::NonNull::new(self.value) {
            Some(value) => value,
            None => unreachable!("a cell is nowhere at null"),
        }
    }
}

impl<T, W: Waiter> Deref for SpinGuard<'_, T, W> {
    type Target = T;
    #[inline]
    fn deref(&self) -> &T {
        // SAFETY: the guard exists only while the lock is held, so no other reference to the value does.
        unsafe { &*self.value }
    }
}

impl<T, W: Waiter> DerefMut for SpinGuard<'_, T, W> {
    #[inline]
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: as in `deref`, and `&mut self` makes it the only one through this guard.
        unsafe { &mut *self.value }
    }
}

impl<T, W: Waiter> Drop for SpinGuard<'_, T, W> {
    #[inline]
    fn drop(&mut self) {
        crate::inject::point("lock: about to be dropped");
        let state = &self.lock.state;
        // Release pairs with the Acquire in `lock`, `try_lock` and `wait`.
        if !self.waiter.sleeps() {
            state.store(FREE, Ordering::Release);
        } else if state.swap(FREE, Ordering::Release) == AWAITED {
            self.waiter.unpark(state);
        }
        crate::inject::point("lock: dropped");
    }
}
