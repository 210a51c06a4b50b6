//! A spin lock round a value, for a zone and for a cache's slab lists.
//!
//! The holder must not be preempted, so taking it needs proof that the caller stays on its CPU: a
//! [`Pin`](crate::platform::Pin). Waiting is test-and-test-and-set, and each round goes through the platform's
//! `relax`, since a hosted "CPU" may be a thread that the holder's thread waits behind.

use core::ops::{Deref, DerefMut};

use super::UnsafeCell;
use super::atomic::{AtomicBool, Ordering};

/// A spin lock.
#[derive(Debug)]
pub(crate) struct SpinLock<T> {
    locked: AtomicBool,
    value: UnsafeCell<T>,
}

// SAFETY: the lock hands out the value to one holder at a time, so sharing the lock is sending the value.
unsafe impl<T: Send> Sync for SpinLock<T> {}
// SAFETY: owning the lock is owning the value.
unsafe impl<T: Send> Send for SpinLock<T> {}

impl<T> SpinLock<T> {
    pub(crate) fn new(value: T) -> Self {
        SpinLock {
            locked: AtomicBool::new(false),
            value: UnsafeCell::new(value),
        }
    }

    /// Waits for the lock; `relax` is called once a round, with the number of the round.
    #[inline]
    pub(crate) fn lock(&self, relax: impl Fn(u32)) -> SpinGuard<'_, T> {
        let mut round = 0;
        // Acquire pairs with the Release in `drop`: what the last holder wrote is seen.
        while self
            .locked
            .compare_exchange_weak(false, true, Ordering::Acquire, Ordering::Relaxed)
            .is_err()
        {
            while self.locked.load(Ordering::Relaxed) {
                relax(round);
                super::spin_hint();
                round = round.saturating_add(1);
            }
        }
        // The pointer is made once per hold, which is where loom checks that nobody else holds it.
        SpinGuard {
            lock: self,
            value: self.value.get_mut_ptr(),
        }
    }
}

/// The lock is held as long as this lives.
#[derive(Debug)]
pub(crate) struct SpinGuard<'a, T> {
    lock: &'a SpinLock<T>,
    value: *mut T,
}

impl<T> Deref for SpinGuard<'_, T> {
    type Target = T;
    #[inline]
    fn deref(&self) -> &T {
        // SAFETY: the guard exists only while the lock is held, so no other reference to the value does.
        unsafe { &*self.value }
    }
}

impl<T> DerefMut for SpinGuard<'_, T> {
    #[inline]
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: as in `deref`, and `&mut self` makes it the only one through this guard.
        unsafe { &mut *self.value }
    }
}

impl<T> Drop for SpinGuard<'_, T> {
    #[inline]
    fn drop(&mut self) {
        // Release pairs with the Acquire in `lock`.
        self.lock.locked.store(false, Ordering::Release);
    }
}
