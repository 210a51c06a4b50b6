//! Readers and an engine together: an [`Rcu`].

use core::ptr::NonNull;

use super::engine::{Engine, Readers, Slot};
use super::{Callback, Cookie, Rcu, RcuHead, ReadToken};

/// RCU among these readers.
#[derive(Debug)]
pub struct Domain<R> {
    readers: R,
    engine: Engine,
}

impl<R: Readers> Domain<R> {
    /// No grace period has begun. Readers that hold one up for longer than `stall_ns` are reported; Linux's choice is
    /// [`Engine::STALL_NS`].
    ///
    /// What is given to [`call`](Rcu::call) and not called before the domain is dropped is never called: [`barrier`](Rcu::barrier) first.
    pub const fn new(readers: R, stall_ns: u64) -> Domain<R> {
        Domain {
            readers,
            engine: Engine::new(stall_ns),
        }
    }

    /// The readers.
    pub fn readers(&self) -> &R {
        &self.readers
    }
}

// SAFETY: the engine's promise, with slots and barriers as `Readers` wants them.
unsafe impl<R: Readers + Sync> Rcu for Domain<R> {
    #[inline]
    fn read_lock(&self) -> ReadToken {
        self.readers.enter();
        self.engine.read_lock(&self.readers)
    }

    #[inline]
    unsafe fn read_unlock(&self, token: ReadToken) {
        // SAFETY: the caller's promise.
        unsafe { self.engine.read_unlock(&self.readers, token) };
        self.readers.leave();
    }

    fn reading(&self) -> bool {
        self.readers.slot().is_some_and(Slot::reading)
    }

    fn get_state(&self) -> Cookie {
        self.engine.get_state()
    }

    fn start_poll(&self) -> Cookie {
        self.engine.start_poll()
    }

    fn poll_state(&self, cookie: Cookie) -> bool {
        self.engine.poll_state(cookie)
    }

    fn advance(&self) {
        self.engine.advance(&self.readers);
    }

    fn cond_synchronize(&self, cookie: Cookie) {
        self.engine.cond_synchronize(&self.readers, cookie, false);
    }

    fn cond_synchronize_expedited(&self, cookie: Cookie) {
        self.engine.cond_synchronize(&self.readers, cookie, true);
    }

    unsafe fn call(&self, head: NonNull<RcuHead>, func: Callback) {
        // SAFETY: the caller's promise.
        unsafe { self.engine.call(&self.readers, head, func) }
    }

    fn run_callbacks(&self) -> usize {
        self.engine.run_callbacks(&self.readers)
    }

    fn barrier(&self) {
        self.engine.barrier(&self.readers);
    }
}
