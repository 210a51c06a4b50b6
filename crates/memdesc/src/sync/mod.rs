//! The one door to atomics, cells and locks: `core` in production, loom under test.
//!
//! Lock order of the whole crate: the list of caches (`slab_mutex`) first, and all others are leaves. A CPU's
//! [`LocalLock`], a zone's lock and a cache's list lock are never held together; what has to pass from one to the
//! other is carried in a list on the stack.

mod local;
mod rw;
mod spin;
mod stack;

pub(crate) use local::{Barriers, LocalLock};
pub(crate) use rw::{RwGuard, RwLock, RwWaiter};
pub(crate) use spin::{SpinGuard, SpinLock, Waiter};
#[cfg(not(loom))]
pub(crate) use stack::PfnStack;
pub(crate) use stack::PtrStack;

/// Atomics: loom's under the model checker.
pub(crate) mod atomic {
    #[cfg(not(loom))]
    pub(crate) use core::sync::atomic::{
        AtomicBool, AtomicPtr, AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering, fence,
    };
    #[cfg(loom)]
    pub(crate) use loom::sync::atomic::{AtomicPtr, AtomicU32, AtomicU64, Ordering, fence};
}

/// What loom has to be told of SeqCst.
///
/// Where two each write one word and then read the other's, and must not both miss what the other wrote, all four accesses are SeqCst: they
/// have one order. loom takes them for AcqRel ones and knows only fences, so here a load gets a fence before it, if its thread has
/// written that way before. In production neither function is anything: the accesses are ordered by themselves, on x86 by the
/// locked instructions that they are.
pub(crate) mod seq_cst {
    #[cfg(loom)]
    loom::thread_local! {
        static WRITTEN: core::cell::Cell<bool> = core::cell::Cell::new(false);
    }

    /// After a write that is SeqCst.
    #[inline(always)]
    pub(crate) fn written() {
        #[cfg(loom)]
        WRITTEN.with(|w| w.set(true));
    }

    /// Before a load that is SeqCst.
    #[inline(always)]
    pub(crate) fn reading() {
        #[cfg(loom)]
        if WRITTEN.with(|w| w.get()) {
            super::atomic::fence(super::atomic::Ordering::SeqCst);
        }
    }
}

/// A `const fn`; under loom, whose atomics are made while it runs, one that is not.
macro_rules! const_fn {
    ($(#[$meta:meta])* $vis:vis const fn $($rest:tt)*) => {
        $(#[$meta])*
        #[cfg(not(loom))]
        $vis const fn $($rest)*
        $(#[$meta])*
        #[cfg(loom)]
        $vis fn $($rest)*
    };
}
pub(crate) use const_fn;

/// A cell with loom's face.
#[cfg(not(loom))]
#[derive(Debug)]
#[repr(transparent)]
pub(crate) struct UnsafeCell<T>(core::cell::UnsafeCell<T>);

#[cfg(not(loom))]
impl<T> UnsafeCell<T> {
    pub(crate) const fn new(value: T) -> Self {
        UnsafeCell(core::cell::UnsafeCell::new(value))
    }

    #[inline]
    pub(crate) fn get_mut_ptr(&self) -> *mut T {
        self.0.get()
    }
}

#[cfg(loom)]
#[derive(Debug)]
pub(crate) struct UnsafeCell<T>(loom::cell::UnsafeCell<T>);

#[cfg(loom)]
impl<T> UnsafeCell<T> {
    pub(crate) fn new(value: T) -> Self {
        UnsafeCell(loom::cell::UnsafeCell::new(value))
    }

    /// Loom checks the access at the moment of the call; the locks' guards make it once per hold.
    pub(crate) fn get_mut_ptr(&self) -> *mut T {
        self.0.with_mut(|p| p)
    }
}

/// Tells the machine that we wait. Loom needs to hear it to schedule the thread we wait for.
#[inline]
pub(crate) fn spin_hint() {
    #[cfg(not(loom))]
    core::hint::spin_loop();
    #[cfg(loom)]
    loom::thread::yield_now();
}

#[cfg(all(test, loom))]
pub(crate) mod models;
