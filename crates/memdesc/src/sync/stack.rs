//! A stack that any context and any CPU pushes on without a lock, and that is only ever taken as a whole: nothing can come back under a
//! pusher's hands. Where the links are is the business of who pushes.

use super::atomic::{AtomicPtr, Ordering};
#[cfg(not(loom))]
use {super::atomic::AtomicU32, crate::address::Pfn};

/// Of things with an address, linked by pointers.
#[derive(Debug)]
pub(crate) struct PtrStack<T>(AtomicPtr<T>);

impl<T> PtrStack<T> {
    super::const_fn! {
        pub(crate) const fn new() -> PtrStack<T> {
            PtrStack(AtomicPtr::new(core::ptr::null_mut()))
        }
    }

    /// `link` stores the next one where the thing's own link is, which is nobody else's until it is taken.
    pub(crate) fn push(&self, thing: *mut T, link: impl Fn(*mut T)) {
        let mut first = self.0.load(Ordering::Relaxed);
        loop {
            link(first);
            // Release pairs with the Acquire in `take`, so that who takes the thing sees its link and its contents; Acquire pairs
            // with the Release there, so that who pushes after a `take` does all that follows after what went before it. SeqCst, which costs no more:
            // for who pushes and then reads what the other writes before he takes.
            match self
                .0
                .compare_exchange_weak(first, thing, Ordering::SeqCst, Ordering::Relaxed)
            {
                Ok(_) => return super::seq_cst::written(),
                Err(now) => first = now,
            }
        }
    }

    #[inline]
    pub(crate) fn is_empty(&self) -> bool {
        self.0.load(Ordering::Relaxed).is_null()
    }

    /// Takes all, latest first.
    pub(crate) fn take(&self) -> *mut T {
        if self.is_empty() {
            return core::ptr::null_mut();
        }
        self.0.swap(core::ptr::null_mut(), Ordering::AcqRel)
    }

    /// Planted bug: what the pushers released is not acquired.
    #[cfg(all(test, loom))]
    pub(crate) fn take_relaxed(&self) -> *mut T {
        self.0.swap(core::ptr::null_mut(), Ordering::Relaxed)
    }
}

/// Of blocks and slabs, linked by page frame number.
#[cfg(not(loom))]
#[derive(Debug)]
pub(crate) struct PfnStack(AtomicU32);

#[cfg(not(loom))]
impl PfnStack {
    pub(crate) fn new() -> PfnStack {
        PfnStack(AtomicU32::new(Pfn::NONE.0))
    }

    /// `link` stores the next one where the pages' own link is, as in `PtrStack`.
    pub(crate) fn push(&self, pfn: Pfn, link: impl Fn(Pfn)) {
        let mut first = self.0.load(Ordering::Relaxed);
        loop {
            link(Pfn(first));
            // As in `PtrStack`.
            match self
                .0
                .compare_exchange_weak(first, pfn.0, Ordering::SeqCst, Ordering::Relaxed)
            {
                Ok(_) => return,
                Err(now) => first = now,
            }
        }
    }

    #[inline]
    pub(crate) fn is_empty(&self) -> bool {
        self.0.load(Ordering::Relaxed) == Pfn::NONE.0
    }

    /// Takes all, latest first.
    pub(crate) fn take(&self) -> Pfn {
        if self.is_empty() {
            return Pfn::NONE;
        }
        Pfn(self.0.swap(Pfn::NONE.0, Ordering::AcqRel))
    }
}
