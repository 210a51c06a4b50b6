//! Grace periods for those who have no RCU of their own: numbered, one at a time, pushed on by whoever wants one.
//!
//! A reader has a [`Slot`], of its thread or of its CPU. Opening a section writes the number of the latest grace period
//! into it, closing it writes zero: two plain stores and no fence, since the fence is on the other side (membarrier, an IPI
//! to all). A grace period `n`:
//!
//! 1. collects the callbacks, and becomes the latest: `started = n`;
//! 2. runs one heavy barrier;
//! 3. is over when each slot reads zero, or `n` and later.
//!
//! Why one barrier is enough. A reader's store into its slot either is visible when the slots are read, and he is waited
//! for, or it came after the barrier; then so did all his loads, and they see everything that was unlinked before. It does not matter
//! that he may have loaded `started` long before he stores it: an old number is waited for needlessly; a new one he can only have
//! after what was unlinked before it, since the load acquires; and numbers do not come again (which is why liburcu, with one bit of them, must turn round twice). At the end the loads of the slots
//! acquire what the readers' last stores release, so what they did is over, and no second barrier is needed.
//!
//! Who has no slot (a signal handler on a thread that never read before) is an *anonymous* reader: counted, by atomic
//! instructions, in one of two counters by the parity of the latest grace period.
//!
//! Interrupts nest: whatever a handler does to the slot of what it interrupted, it undoes. Between the reader's load of his slot
//! and his store, the handler finds the same value, and leaves it.

use core::ptr::NonNull;

use super::{Callback, Cookie, HeadStack, RcuHead, ReadToken};
use crate::sync::atomic::{AtomicPtr, AtomicU32, AtomicU64, Ordering, fence};
use crate::sync::{UnsafeCell, const_fn};

/// Low bits of a slot: how deep sections are nested.
pub(super) const NEST_BITS: u32 = 16;
const NEST: u64 = (1 << NEST_BITS) - 1;
/// The section is in the slot.
pub(super) const IN_SLOT: ReadToken = ReadToken(u32::MAX);

/// A reader's: of a thread or a CPU. All zero bytes are a valid one.
#[derive(Debug)]
#[repr(C, align(128))]
pub struct Slot {
    /// `number << 16 | nesting`; 0: in no section.
    pub(super) ctr: AtomicU64,
    /// Whom a stall report names: a CPU's number, a thread's id.
    owner: AtomicU64,
    /// What this reader gave to `call`, since the latest grace period began.
    callbacks: HeadStack,
}

impl Default for Slot {
    fn default() -> Slot {
        Slot::new()
    }
}

impl Slot {
    const_fn! {
        /// In no section, nobody's.
        pub const fn new() -> Slot {
            Slot::of(0)
        }
    }

    const_fn! {
        /// In no section; a stall report names this one.
        pub const fn of(owner: u64) -> Slot {
            Slot {
                ctr: AtomicU64::new(0),
                owner: AtomicU64::new(owner),
                callbacks: HeadStack::new(),
            }
        }
    }

    /// Says whom a stall report names.
    pub fn set_owner(&self, owner: u64) {
        self.owner.store(owner, Ordering::Relaxed);
    }

    /// Is its reader in a section?
    #[inline]
    pub fn reading(&self) -> bool {
        self.ctr.load(Ordering::Relaxed) != 0
    }
}

/// A reader that holds up a grace period for long.
#[derive(Clone, Copy, Debug)]
pub struct Stall {
    /// The number of the grace period.
    pub grace_period: u64,
    /// How long it has lasted, in nanoseconds.
    pub waited_ns: u64,
    /// Whose section it is: [`Slot::set_owner`]; none for anonymous readers.
    pub reader: Option<u64>,
}

/// Where the readers are: what the engine needs of its surroundings.
///
/// # Safety
///
/// [`slot`](Self::slot) gives a slot that no other thread of execution uses at the same time (interrupts on top of the same one
/// may), and `for_each` visits every slot that `slot` ever gave and that was not given back unused. The barriers hold the third
/// promise of [`Platform`](crate::Platform).
pub unsafe trait Readers {
    /// The caller's slot; none if he has none, and cannot have one here.
    fn slot(&self) -> Option<&Slot>;
    /// A section is about to be opened: keeps the caller where his slot is, if that is not his own.
    #[inline]
    fn enter(&self) {}
    /// A section was closed: undoes `enter`.
    #[inline]
    fn leave(&self) {}
    /// Visits all slots.
    fn for_each(&self, visit: &mut dyn FnMut(&Slot));
    /// The reader's half of the barrier.
    fn light(&self);
    /// The other half.
    fn heavy(&self);
    /// One turn of waiting, the `round`-th. May sleep if `nap`.
    fn relax(&self, round: u32, nap: bool);
    /// Nanoseconds, monotonic.
    fn now(&self) -> u64;
    /// A reader holds up a grace period for longer than the engine was told to bear.
    fn stall(&self, _stall: &Stall) {}
}

/// Guarded by `driver`.
#[derive(Debug)]
struct Driven {
    /// Callbacks of the running grace period: head and last, oldest first.
    waiting: List,
    /// Callbacks that are due.
    due: List,
    began: u64,
    /// When the next report of a stall is made.
    complain: u64,
}

/// Heads in a row.
#[derive(Clone, Copy, Debug)]
struct List {
    first: *mut RcuHead,
    last: *mut RcuHead,
}

impl List {
    const EMPTY: List = List {
        first: core::ptr::null_mut(),
        last: core::ptr::null_mut(),
    };

    /// Puts a stack, latest first, behind what is here, oldest first.
    fn append_stack(&mut self, mut at: *mut RcuHead) {
        let mut turned = List::EMPTY;
        while let Some(head) = NonNull::new(at) {
            // SAFETY: heads in a taken stack are ours until they are called.
            let head = unsafe { head.as_ref() };
            if turned.last.is_null() {
                turned.last = at;
            }
            let next = head.next.load(Ordering::Relaxed);
            head.next.store(turned.first, Ordering::Relaxed);
            turned.first = at;
            at = next;
        }
        self.append(turned);
    }

    fn append(&mut self, other: List) {
        match NonNull::new(self.last) {
            _ if other.first.is_null() => return,
            // SAFETY: as above.
            Some(last) => unsafe { last.as_ref() }
                .next
                .store(other.first, Ordering::Relaxed),
            None => self.first = other.first,
        }
        self.last = other.last;
    }
}

/// Grace periods.
#[derive(Debug)]
pub struct Engine {
    /// The latest that began. Read by every reader, written once a grace period.
    pub(super) started: AtomicU64,
    /// The latest that is over: `started`, or one less.
    completed: AtomicU64,
    /// Somebody wants grace periods up to this one.
    needed: AtomicU64,
    /// Somebody gave something to `call` since the latest one began.
    called: AtomicU32,
    anonymous: [AtomicU64; 2],
    /// What anonymous readers gave to `call`.
    callbacks: HeadStack,
    /// 1: somebody pushes on.
    driver: AtomicU32,
    driven: UnsafeCell<Driven>,
    /// 1: somebody calls callbacks.
    runner: AtomicU32,
    /// The callbacks of grace periods up to this one have been called.
    ran: AtomicU64,
    stall_ns: u64,
}

// SAFETY: `driven` is reached only by who set `driver`; the heads in it are the engine's until they are called.
unsafe impl Sync for Engine {}
// SAFETY: the same.
unsafe impl Send for Engine {}

impl Engine {
    /// Linux's `rcu_cpu_stall_timeout`: 21 s.
    pub const STALL_NS: u64 = 21_000_000_000;

    const_fn! {
        /// No grace period has begun. Reports readers that hold one up for longer than `stall_ns`.
        pub const fn new(stall_ns: u64) -> Engine {
            Engine {
                // From 1 on, so that no slot of a reader reads zero.
                started: AtomicU64::new(1),
                completed: AtomicU64::new(1),
                needed: AtomicU64::new(0),
                called: AtomicU32::new(0),
                anonymous: [AtomicU64::new(0), AtomicU64::new(0)],
                callbacks: HeadStack::new(),
                driver: AtomicU32::new(0),
                driven: UnsafeCell::new(Driven {
                    waiting: List::EMPTY,
                    due: List::EMPTY,
                    began: 0,
                    complain: 0,
                }),
                runner: AtomicU32::new(0),
                ran: AtomicU64::new(1),
                stall_ns,
            }
        }
    }

    /// As [`Rcu::read_lock`](super::Rcu::read_lock).
    #[inline]
    pub fn read_lock(&self, readers: &impl Readers) -> ReadToken {
        let Some(slot) = readers.slot() else {
            return self.read_lock_anonymous();
        };
        let now = slot.ctr.load(Ordering::Relaxed);
        let next = if now == 0 {
            // Acquire pairs with the Release in `begin`: who notes a number, and is not waited for by its grace period, sees what was
            // unlinked before it began, also where loads overtake each other.
            self.started.load(Ordering::Acquire) << NEST_BITS | 1
        } else {
            debug_assert!(now & NEST < NEST, "read sections nested too deep");
            now + 1
        };
        // Release pairs with the Acquire in `is_over`, for the section *before*: who reads this number there, and takes the reader for a
        // late one, has not read the zero in between. (loom found that; it costs nothing on x86.)
        slot.ctr.store(next, Ordering::Release);
        // Pairs with the heavy barrier in `begin`.
        readers.light();
        IN_SLOT
    }

    /// As [`Rcu::read_unlock`](super::Rcu::read_unlock).
    ///
    /// # Safety
    ///
    /// As there.
    #[inline]
    pub unsafe fn read_unlock(&self, readers: &impl Readers, token: ReadToken) {
        if token != IN_SLOT {
            // Release pairs with the Acquire in `is_over`.
            self.anonymous[token.0 as usize].fetch_sub(1, Ordering::Release);
            return;
        }
        let Some(slot) = readers.slot() else {
            unreachable!("a reader has lost its slot")
        };
        let now = slot.ctr.load(Ordering::Relaxed);
        let next = if now & NEST == 1 { 0 } else { now - 1 };
        // Release pairs with the Acquire in `is_over`: what the section did happened before the end of the grace period.
        slot.ctr.store(next, Ordering::Release);
    }

    #[cold]
    fn read_lock_anonymous(&self) -> ReadToken {
        loop {
            let number = self.started.load(Ordering::Relaxed);
            let parity = (number & 1) as usize;
            self.anonymous[parity].fetch_add(1, Ordering::Relaxed);
            // Pairs with the fence in `begin`: either it sees us counted, or we see that it began.
            fence(Ordering::SeqCst);
            if self.started.load(Ordering::Relaxed) == number {
                return ReadToken(parity as u32);
            }
            self.anonymous[parity].fetch_sub(1, Ordering::Release);
        }
    }

    /// As [`Rcu::get_state`](super::Rcu::get_state).
    pub fn get_state(&self) -> Cookie {
        // Pairs with the fence in `begin`: if the load below does not see that one began, its readers see all we stored. One that
        // has begun may have missed it, hence the next.
        fence(Ordering::SeqCst);
        Cookie(self.started.load(Ordering::Relaxed) + 1)
    }

    /// As [`Rcu::start_poll`](super::Rcu::start_poll).
    pub fn start_poll(&self) -> Cookie {
        let cookie = self.get_state();
        self.need(cookie);
        cookie
    }

    /// Asks for a grace period.
    pub fn need(&self, cookie: Cookie) {
        self.needed.fetch_max(cookie.0, Ordering::Relaxed);
    }

    /// As [`Rcu::poll_state`](super::Rcu::poll_state).
    pub fn poll_state(&self, cookie: Cookie) -> bool {
        // Acquire pairs with the Release in `advance`.
        self.completed.load(Ordering::Acquire) >= cookie.0
    }

    fn try_drive(&self) -> bool {
        // Acquire pairs with the Release in `let_go`.
        self.driver
            .compare_exchange(0, 1, Ordering::Acquire, Ordering::Relaxed)
            .is_ok()
    }

    fn let_go(&self) {
        self.driver.store(0, Ordering::Release);
    }

    /// As [`Rcu::advance`](super::Rcu::advance).
    pub fn advance(&self, readers: &impl Readers) {
        if !self.try_drive() {
            return;
        }
        // SAFETY: we drive.
        let driven = unsafe { &mut *self.driven.get_mut_ptr() };
        let completed = self.completed.load(Ordering::Relaxed);
        let mut number = self.started.load(Ordering::Relaxed);
        if number == completed {
            let wanted = self.needed.load(Ordering::Relaxed) > completed;
            if !wanted && self.called.load(Ordering::Relaxed) == 0 {
                return self.let_go();
            }
            number += 1;
            self.begin(number, driven, readers);
        }
        if self.is_over(number, driven, readers) {
            let waiting = core::mem::replace(&mut driven.waiting, List::EMPTY);
            driven.due.append(waiting);
            // Release pairs with the Acquire in `poll_state`: hands on what the readers released.
            self.completed.store(number, Ordering::Release);
        }
        self.let_go();
    }

    fn begin(&self, number: u64, driven: &mut Driven, readers: &impl Readers) {
        // Callbacks first: what is given to `call` from here on is the next one's. `called` before the stacks: whoever
        // pushes after a stack was taken says so after it was cleared.
        self.called.swap(0, Ordering::AcqRel);
        driven.waiting.append_stack(self.callbacks.take());
        readers.for_each(&mut |slot| driven.waiting.append_stack(slot.callbacks.take()));
        // Release pairs with the Acquire in `read_lock`.
        self.started.store(number, Ordering::Release);
        // The fence is for `get_state` and anonymous readers, the barrier for the slots.
        fence(Ordering::SeqCst);
        readers.heavy();
        driven.began = readers.now();
        driven.complain = self.stall_ns;
    }

    fn is_over(&self, number: u64, driven: &mut Driven, readers: &impl Readers) -> bool {
        // Acquire, here and below, pairs with the Release in `read_unlock`.
        let old = &self.anonymous[(number - 1) as usize & 1];
        let anonymous = old.load(Ordering::Acquire) != 0;
        let mut over = !anonymous;
        readers.for_each(&mut |slot| {
            let ctr = slot.ctr.load(Ordering::Acquire);
            over &= ctr == 0 || ctr >> NEST_BITS >= number;
        });
        if !over {
            self.complain(number, anonymous, driven, readers);
        }
        over
    }

    #[cold]
    fn complain(&self, number: u64, anonymous: bool, driven: &mut Driven, readers: &impl Readers) {
        let waited_ns = readers.now().saturating_sub(driven.began);
        if waited_ns < driven.complain {
            return;
        }
        driven.complain = driven.complain.saturating_mul(2);
        let mut stall = Stall {
            grace_period: number,
            waited_ns,
            reader: None,
        };
        if anonymous {
            readers.stall(&stall);
        }
        readers.for_each(&mut |slot| {
            let ctr = slot.ctr.load(Ordering::Relaxed);
            if ctr != 0 && ctr >> NEST_BITS < number {
                stall.reader = Some(slot.owner.load(Ordering::Relaxed));
                readers.stall(&stall);
            }
        });
    }

    /// As [`Rcu::cond_synchronize`](super::Rcu::cond_synchronize): naps between looks, so that others share the grace period; or
    /// in a hurry.
    pub fn cond_synchronize(&self, readers: &impl Readers, cookie: Cookie, hurry: bool) {
        debug_assert!(
            !readers.slot().is_some_and(Slot::reading),
            "waits in a read section for its end"
        );
        let mut round = 0;
        while !self.poll_state(cookie) {
            self.need(cookie);
            self.advance(readers);
            if self.poll_state(cookie) {
                return;
            }
            readers.relax(round, !hurry);
            crate::sync::spin_hint();
            round = round.saturating_add(1);
        }
    }

    /// As [`Rcu::call`](super::Rcu::call).
    ///
    /// # Safety
    ///
    /// As there.
    pub unsafe fn call(&self, readers: &impl Readers, head: NonNull<RcuHead>, func: Callback) {
        // SAFETY: the head is ours now.
        let what: &AtomicPtr<()> = &unsafe { head.as_ref() }.what;
        what.store(func as *mut (), Ordering::Relaxed);
        let stack = readers.slot().map_or(&self.callbacks, |s| &s.callbacks);
        // SAFETY: the same.
        unsafe { stack.push_head(head) };
        if self.called.load(Ordering::Relaxed) == 0 {
            self.called.store(1, Ordering::Relaxed);
        }
    }

    /// As [`Rcu::run_callbacks`](super::Rcu::run_callbacks).
    pub fn run_callbacks(&self, readers: &impl Readers) -> usize {
        // Acquire pairs with the Release below.
        let runner = self
            .runner
            .compare_exchange(0, 1, Ordering::Acquire, Ordering::Relaxed);
        if runner.is_err() {
            return 0;
        }
        let mut round = 0;
        while !self.try_drive() {
            readers.relax(round, false);
            crate::sync::spin_hint();
            round += 1;
        }
        // SAFETY: we drive.
        let driven = unsafe { &mut *self.driven.get_mut_ptr() };
        let due = core::mem::replace(&mut driven.due, List::EMPTY);
        let number = self.completed.load(Ordering::Relaxed);
        self.let_go();
        let (mut at, mut called) = (due.first, 0);
        while let Some(head) = NonNull::new(at) {
            // SAFETY: a head that is due is ours until it is called, and its field holds what `call` put there.
            let func = unsafe {
                at = head.as_ref().next.load(Ordering::Relaxed);
                let what = head.as_ref().what.load(Ordering::Relaxed);
                core::mem::transmute::<*mut (), Callback>(what)
            };
            // SAFETY: the promise of who gave it to `call`.
            unsafe { func(head) };
            called += 1;
        }
        // Release pairs with the Acquire in `barrier`.
        self.ran.store(number, Ordering::Release);
        self.runner.store(0, Ordering::Release);
        called
    }

    /// As [`Rcu::barrier`](super::Rcu::barrier).
    pub fn barrier(&self, readers: &impl Readers) {
        // All that was given so far is collected by the grace periods up to this one. Not `get_state`'s: that one may have
        // collected already, and not said yet that it began.
        self.barrier_until(readers, Cookie(self.get_state().0 + 1));
    }

    pub(super) fn barrier_until(&self, readers: &impl Readers, cookie: Cookie) {
        let mut round = 0;
        // Acquire pairs with the Release in `run_callbacks`.
        while self.ran.load(Ordering::Acquire) < cookie.0 {
            self.need(cookie);
            self.advance(readers);
            self.run_callbacks(readers);
            readers.relax(round, true);
            crate::sync::spin_hint();
            round = round.saturating_add(1);
        }
    }
}
