//! RCU: readers that pay next to nothing, and the grace period after which none of them can see what was unlinked before it.
//!
//! [`Rcu`] is what the memory manager needs of it: a kernel with an RCU of its own implements the trait. For those without,
//! [`engine`] has grace periods, [`domain`] puts them together with readers, and in [`cpus`] the readers are CPUs.
//!
//! Names are Linux's: `synchronize_rcu`, `call_rcu`, `rcu_barrier`, `get_state_synchronize_rcu` and so on, without the word that
//! the module says already.

#[cfg(not(loom))]
pub(crate) mod block;
#[cfg(not(loom))]
pub mod cpus;
#[cfg(not(loom))]
pub(crate) mod discard;
#[cfg(not(loom))]
pub mod domain;
pub mod engine;
#[cfg(not(loom))]
pub(crate) mod kvfree;
#[cfg(all(test, loom))]
mod models;
#[cfg(not(loom))]
pub(crate) mod prepaid;

use core::marker::PhantomData;
use core::ptr::NonNull;

use crate::sync::PtrStack;
use crate::sync::atomic::{AtomicPtr, Ordering};

/// Names a grace period: see [`Rcu::get_state`]. Later ones compare greater.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Cookie(pub(crate) u64);

impl Cookie {
    /// A grace period that has ended (`get_completed_synchronize_rcu`).
    pub const ENDED: Cookie = Cookie(0);

    /// For an implementation that has numbers of its own.
    pub const fn from_raw(raw: u64) -> Cookie {
        Cookie(raw)
    }

    /// The number.
    pub const fn into_raw(self) -> u64 {
        self.0
    }
}

/// What [`Rcu::read_lock`] gives and [`Rcu::read_unlock`] takes; means something to the implementation only.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[must_use]
pub struct ReadToken(pub u32);

/// Embedded in what is freed later (`struct rcu_head`): 16 bytes.
#[derive(Debug)]
#[repr(C)]
pub struct RcuHead {
    pub(crate) next: AtomicPtr<RcuHead>,
    /// A function for [`Rcu::call`]; for `kvfree_rcu` the object's start.
    pub(crate) what: AtomicPtr<()>,
}

#[cfg(not(loom))]
const _: () = assert!(size_of::<RcuHead>() == 16);

impl RcuHead {
    /// In no list.
    #[cfg(not(loom))]
    pub const fn new() -> RcuHead {
        RcuHead {
            next: AtomicPtr::new(core::ptr::null_mut()),
            what: AtomicPtr::new(core::ptr::null_mut()),
        }
    }

    /// In no list.
    #[cfg(loom)]
    pub fn new() -> RcuHead {
        RcuHead {
            next: AtomicPtr::new(core::ptr::null_mut()),
            what: AtomicPtr::new(core::ptr::null_mut()),
        }
    }
}

impl Default for RcuHead {
    fn default() -> RcuHead {
        RcuHead::new()
    }
}

/// What is called when the grace period is over.
pub type Callback = unsafe fn(NonNull<RcuHead>);

/// Heads that any context pushes, until somebody takes them all.
pub(crate) type HeadStack = PtrStack<RcuHead>;

impl HeadStack {
    /// # Safety
    ///
    /// The head lives, and is nobody else's, until it is taken.
    pub(crate) unsafe fn push_head(&self, head: NonNull<RcuHead>) {
        // SAFETY: the caller's promise.
        let link = &unsafe { head.as_ref() }.next;
        self.push(head.as_ptr(), |next| link.store(next, Ordering::Relaxed));
    }
}

/// Read-copy-update.
///
/// # Safety
///
/// An implementation promises: when [`poll_state`](Self::poll_state) says that the grace period of a cookie is over, every
/// read section that was open when the cookie was made has ended, all it did happened before, and every later section sees what the maker of
/// the cookie stored before he made it. Functions given to [`call`](Self::call) are called once, after such a grace period.
pub unsafe trait Rcu: Sync {
    /// Opens a read section (`rcu_read_lock`). Sections nest.
    ///
    /// # Context
    ///
    /// Any, an NMI and a signal handler included.
    fn read_lock(&self) -> ReadToken;

    /// Closes a read section.
    ///
    /// # Safety
    ///
    /// `token` is from the latest `read_lock` of the same thread of execution that is still open.
    unsafe fn read_unlock(&self, token: ReadToken);

    /// Is the caller in a read section? `false` also if that cannot be told.
    fn reading(&self) -> bool;

    /// A grace period that begins after now (`get_state_synchronize_rcu`); nobody begins it for that. Any context.
    fn get_state(&self) -> Cookie;

    /// The same, and it will be begun (`start_poll_synchronize_rcu`). Any context.
    fn start_poll(&self) -> Cookie;

    /// Is it over (`poll_state_synchronize_rcu`)? Any context.
    fn poll_state(&self, cookie: Cookie) -> bool;

    /// Pushes grace periods on as far as that goes without waiting: begins one that is wanted, looks whether the running one
    /// is over. Any context but an NMI. An RCU that runs by itself has nothing to do here.
    fn advance(&self) {}

    /// Waits for the grace period unless it is over (`cond_synchronize_rcu`).
    ///
    /// # Context
    ///
    /// May sleep. Not in a read section.
    fn cond_synchronize(&self, cookie: Cookie);

    /// The same in a hurry, at the cost of others (`cond_synchronize_rcu_expedited`).
    ///
    /// # Context
    ///
    /// As [`cond_synchronize`](Self::cond_synchronize).
    fn cond_synchronize_expedited(&self, cookie: Cookie) {
        self.cond_synchronize(cookie);
    }

    /// Waits for a grace period (`synchronize_rcu`).
    ///
    /// # Context
    ///
    /// As [`cond_synchronize`](Self::cond_synchronize).
    fn synchronize(&self) {
        self.cond_synchronize(self.start_poll());
    }

    /// Waits for a grace period in a hurry (`synchronize_rcu_expedited`).
    ///
    /// # Context
    ///
    /// As [`cond_synchronize`](Self::cond_synchronize).
    fn synchronize_expedited(&self) {
        self.cond_synchronize_expedited(self.start_poll());
    }

    /// Has `func` called with `head` after a grace period (`call_rcu`). Allocates nothing, cannot fail. Any context.
    ///
    /// # Safety
    ///
    /// The head lives, and is nobody else's, until `func` has it. `func` may be called on any CPU and thread.
    unsafe fn call(&self, head: NonNull<RcuHead>, func: Callback);

    /// Calls what is due; says how many. Where the functions may run: they take locks, so not in an interrupt.
    fn run_callbacks(&self) -> usize {
        0
    }

    /// Waits until all that was given to [`call`](Self::call) before has been called (`rcu_barrier`).
    ///
    /// # Context
    ///
    /// May sleep. Neither in a read section nor in a callback.
    fn barrier(&self);
}

/// A read section, open as long as this lives.
#[derive(Debug)]
#[must_use]
pub struct ReadGuard<'a, R: Rcu> {
    rcu: &'a R,
    token: ReadToken,
    /// The section is the thread's.
    _not_send: PhantomData<*const ()>,
}

/// Opens a read section.
#[inline]
pub fn read_lock<R: Rcu>(rcu: &R) -> ReadGuard<'_, R> {
    ReadGuard {
        token: rcu.read_lock(),
        rcu,
        _not_send: PhantomData,
    }
}

impl<R: Rcu> Drop for ReadGuard<'_, R> {
    #[inline]
    fn drop(&mut self) {
        // SAFETY: the token is from `read_lock`, on this thread. Guards dropped out of order close sections out of order, which the
        // tokens of one thread allow: they are all alike, or counted each by itself.
        unsafe { self.rcu.read_unlock(self.token) }
    }
}
