//! The lock of something that belongs to one CPU: two plain stores and a load for the owner.
//!
//! Linux takes a `local_trylock` or a spin lock here; an uncontended atomic exchange is a third of the whole
//! fast path. The owner is alone on its CPU (it holds a pin), so it has only to keep out a *remote* CPU
//! that wants to drain it, which is rare and may pay for both. That is Dekker's protocol with the fence moved
//! to the rare side:
//!
//! | owner | remote |
//! |---|---|
//! | `busy = 1` | `remote = 1` |
//! | light barrier (compiler) | heavy barrier (membarrier, IPI) |
//! | `remote == 0`? go on, else step back | wait until `busy == 0` |
//!
//! Either the owner sees `remote`, or the remote sees `busy`. A platform without asymmetric barriers says
//! full fences for both, which is the same protocol in its textbook form (and the one loom checks).

use super::atomic::{AtomicU32, Ordering};

/// Barriers, and what to do while waiting; the platform gives them.
pub(crate) trait Barriers {
    /// The owner's side.
    fn light(&self);
    /// The remote's side: no CPU's `busy` store may still be on its way after this.
    fn heavy(&self);
    /// One round of waiting.
    fn relax(&self, round: u32);
}

/// Owner and remotes of one CPU's data. Holds no data itself: what it guards lies beside it.
#[derive(Debug)]
#[repr(C)]
pub(crate) struct LocalLock {
    busy: AtomicU32,
    remote: AtomicU32,
}

impl LocalLock {
    pub(crate) fn new() -> Self {
        LocalLock {
            busy: AtomicU32::new(0),
            remote: AtomicU32::new(0),
        }
    }

    /// Enters as the owner. The caller holds a pin: nobody else runs on the owning CPU until the guard goes, but
    /// interrupts, which use [`try_enter`](Self::try_enter) and are over before the caller goes on.
    #[inline]
    pub(crate) fn enter<'a>(&'a self, barriers: &impl Barriers) -> LocalGuard<'a> {
        loop {
            debug_assert_eq!(
                self.busy.load(Ordering::Relaxed),
                0,
                "local lock entered twice"
            );
            crate::inject::point("local lock: about to be taken");
            self.busy.store(1, Ordering::Relaxed);
            barriers.light();
            crate::inject::point("local lock: busy");
            // Acquire pairs with the Release in `RemoteGuard::drop`: what a remote did is seen.
            if self.remote.load(Ordering::Acquire) == 0 {
                return LocalGuard { lock: self };
            }
            self.step_back(barriers);
        }
    }

    /// Enters as the owner unless somebody is inside, without waiting: from an interrupt, an NMI, a signal handler, from
    /// anywhere on the owning CPU.
    ///
    /// `busy` says whether the code that was interrupted is inside. Between its `busy = 1` and its `busy = 0` we keep out;
    /// before and after, we are in and out again between two of its instructions, and it notices nothing.
    #[inline]
    pub(crate) fn try_enter<'a>(&'a self, barriers: &impl Barriers) -> Option<LocalGuard<'a>> {
        // Acquire pairs with the Release in `LocalGuard::drop`, against the compiler: it is the same CPU.
        if self.busy.load(Ordering::Acquire) != 0 {
            return None;
        }
        self.busy.store(1, Ordering::Relaxed);
        barriers.light();
        // Acquire: as in `enter`.
        if self.remote.load(Ordering::Acquire) == 0 {
            return Some(LocalGuard { lock: self });
        }
        // Release: as in `step_back`.
        self.busy.store(0, Ordering::Release);
        None
    }

    #[cold]
    fn step_back(&self, barriers: &impl Barriers) {
        // Release: the remote that waits for `busy` may go on from here.
        self.busy.store(0, Ordering::Release);
        crate::inject::point("local lock: stepped back");
        let mut round = 0;
        while self.remote.load(Ordering::Relaxed) != 0 {
            barriers.relax(round);
            super::spin_hint();
            round = round.saturating_add(1);
        }
    }

    /// Enters from another CPU, for a drain. Waits for the owner and for other remotes.
    pub(crate) fn enter_remote<'a>(&'a self, barriers: &impl Barriers) -> RemoteGuard<'a> {
        let mut round = 0;
        // Acquire pairs with the Release in `RemoteGuard::drop`, among remotes.
        while self
            .remote
            .compare_exchange(0, 1, Ordering::Acquire, Ordering::Relaxed)
            .is_err()
        {
            barriers.relax(round);
            super::spin_hint();
            round = round.saturating_add(1);
        }
        crate::inject::point("local lock: remote announced");
        barriers.heavy();
        let mut round = 0;
        // Acquire pairs with the Release in `LocalGuard::drop`: what the owner did is seen.
        while self.busy.load(Ordering::Acquire) != 0 {
            barriers.relax(round);
            super::spin_hint();
            round = round.saturating_add(1);
        }
        RemoteGuard { lock: self }
    }
}

/// The owner is inside.
#[derive(Debug)]
#[must_use]
pub(crate) struct LocalGuard<'a> {
    lock: &'a LocalLock,
}

impl Drop for LocalGuard<'_> {
    #[inline]
    fn drop(&mut self) {
        crate::inject::point("local lock: about to be dropped");
        // Release pairs with the Acquire loads of `busy` in `enter_remote` and `try_enter`.
        self.lock.busy.store(0, Ordering::Release);
        crate::inject::point("local lock: dropped");
    }
}

/// A remote CPU is inside.
#[derive(Debug)]
#[must_use]
pub(crate) struct RemoteGuard<'a> {
    lock: &'a LocalLock,
}

impl Drop for RemoteGuard<'_> {
    fn drop(&mut self) {
        // Release pairs with the Acquire loads of `remote` in `enter`, `try_enter` and `enter_remote`.
        self.lock.remote.store(0, Ordering::Release);
    }
}
