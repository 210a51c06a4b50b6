//! What a CPU keeps of deferred frees: blocks of pointers, and a stack of heads.
//!
//! A block is a page. The one being filled is no list's; full ones wait in a row, oldest first, each with the grace period that all in it
//! wait for; blank ones are kept for the next.
//!
//! Lock order: the [`LocalLock`] is a leaf; nothing is freed under it.

use core::ptr::NonNull;

use super::{Cookie, HeadStack, RcuHead};
use crate::address::PAGE_SIZE;
use crate::lockdep::{Acquire, classes};
use crate::platform::{Checked, Pin, Platform, PlatformBarriers};
use crate::sync::atomic::{AtomicU32, AtomicU64};
use crate::sync::{LocalLock, UnsafeCell};

/// Pointers in a block.
const RECORDS: usize = (PAGE_SIZE - 24) / 8;
/// Kinds of blocks: slab objects, and large memory.
pub(super) const CHANNELS: usize = 2;
/// Blank pages kept for the next blocks (`rcu_min_cached_objs`).
pub(super) const MIN_CACHED: u32 = 5;

/// A page of pointers. Linked while it is full, and while it is blank.
#[repr(C)]
pub(super) struct Block {
    pub(super) next: *mut Block,
    /// The grace period that all in it wait for; a blank one's means nothing.
    cookie: u64,
    pub(super) nr: u64,
    pub(super) records: [*mut u8; RECORDS],
}

const _: () = assert!(size_of::<Block>() == PAGE_SIZE);

/// What the local lock guards. All zero bytes are a valid one.
#[derive(Debug)]
pub(super) struct Inner {
    /// The block being filled, for each channel.
    pub(super) filling: [*mut Block; CHANNELS],
    /// When its first pointer went in.
    pub(super) since: [u64; CHANNELS],
    /// Full blocks, oldest first.
    first: *mut Block,
    last: *mut Block,
    pub(super) nr_full: u32,
    /// A block whose grace period is over, being emptied a few pointers at a time.
    pub(super) ripe: *mut Block,
    /// Pointers in all blocks.
    pub(super) nr: u64,
    /// Blank blocks.
    pub(super) blank: *mut Block,
    pub(super) nr_blank: u32,
    /// How many blank ones to keep: few for a while after memory was short.
    pub(super) keep: u32,
    pub(super) keep_again: u64,
    /// Objects that wait by their heads, for the grace period of `cookie`.
    pub(super) heads: *mut RcuHead,
    pub(super) cookie: u64,
}

/// The deferred frees of one CPU.
#[derive(Debug)]
#[repr(C, align(64))]
pub(crate) struct Krc {
    lock: LocalLock,
    /// Objects that came by their heads since the last grace period was asked for.
    pub(super) heads: HeadStack,
    /// How many that is, and those whose grace period runs.
    pub(super) nr_heads: AtomicU64,
    /// 1: somebody went without a page since the blank ones were last provided.
    pub(super) hungry: AtomicU32,
    /// Taken out of here and not free yet.
    pub(super) draining: AtomicU64,
    inner: UnsafeCell<Inner>,
}

// SAFETY: `inner` is reached only under the lock; the blocks in it are pages of the memory manager.
unsafe impl Sync for Krc {}
// SAFETY: the same.
unsafe impl Send for Krc {}

impl Krc {
    pub(crate) fn new() -> Krc {
        Krc {
            lock: LocalLock::new(),
            heads: HeadStack::new(),
            nr_heads: AtomicU64::new(0),
            hungry: AtomicU32::new(0),
            draining: AtomicU64::new(0),
            inner: UnsafeCell::new(Inner {
                filling: [core::ptr::null_mut(); CHANNELS],
                since: [0; CHANNELS],
                first: core::ptr::null_mut(),
                last: core::ptr::null_mut(),
                nr_full: 0,
                ripe: core::ptr::null_mut(),
                nr: 0,
                blank: core::ptr::null_mut(),
                nr_blank: 0,
                keep: MIN_CACHED,
                keep_again: 0,
                heads: core::ptr::null_mut(),
                cookie: 0,
            }),
        }
    }

    /// Works on it from its own CPU, unless somebody is inside.
    #[inline]
    pub(super) fn try_owner<P: Platform, R>(
        &self,
        pin: &Pin<'_, P>,
        f: impl FnOnce(&mut Inner) -> R,
    ) -> Option<R> {
        let _guard = self.lock.try_enter(&PlatformBarriers(pin.platform()))?;
        // SAFETY: the lock is held.
        Some(f(unsafe { &mut *self.inner.get_mut_ptr() }))
    }

    /// Works on it from any CPU.
    pub(super) fn remote<P: Platform, R>(
        &self,
        platform: &P,
        f: impl FnOnce(&mut Inner) -> R,
    ) -> R {
        // An interrupt here that came to this CPU's own would wait for us.
        let _pin = Pin::new(platform);
        let _checked = Checked::new(platform, &classes::KVFREE, Acquire::Lock);
        let _guard = self.lock.enter_remote(&PlatformBarriers(platform));
        // SAFETY: the lock is held.
        f(unsafe { &mut *self.inner.get_mut_ptr() })
    }
}

/// What became of a pointer.
pub(super) enum Queued {
    Yes,
    /// And it filled its block.
    Full,
    /// And it is time to free some of the ripe block.
    Ripe,
    /// There is no block.
    NoBlock,
}

impl Inner {
    #[inline]
    pub(super) fn push(
        &mut self,
        channel: usize,
        ptr: *mut u8,
        now: impl FnOnce() -> u64,
    ) -> Queued {
        if self.filling[channel].is_null() {
            if self.blank.is_null() {
                return Queued::NoBlock;
            }
            let block = self.blank;
            // SAFETY: blank blocks are whole pages of ours, set up by `add_blank`.
            self.blank = unsafe { (*block).next };
            self.nr_blank -= 1;
            self.filling[channel] = block;
            self.since[channel] = now();
        }
        let block = self.filling[channel];
        crate::inject::point("kvfree: about to record");
        // SAFETY: the block being filled is ours under the lock, and has room: a full one is not being filled.
        unsafe {
            let nr = (*block).nr as usize;
            (*block).records[nr] = ptr;
            (*block).nr = nr as u64 + 1;
            self.nr += 1;
            if nr + 1 < RECORDS {
                return Queued::Yes;
            }
        }
        Queued::Full
    }

    /// The block being filled waits from now on.
    pub(super) fn close(&mut self, channel: usize, cookie: Cookie) {
        let block = core::mem::replace(&mut self.filling[channel], core::ptr::null_mut());
        if block.is_null() {
            return;
        }
        // SAFETY: as in `push`; `last` is a full block of ours.
        unsafe {
            (*block).cookie = cookie.0;
            (*block).next = core::ptr::null_mut();
            if self.last.is_null() {
                self.first = block;
            } else {
                (*self.last).next = block;
            }
        }
        self.last = block;
        self.nr_full += 1;
    }

    /// Makes the oldest full block the ripe one, if there is none and its grace period is over.
    pub(super) fn ripen(&mut self, over: impl Fn(Cookie) -> bool) {
        if self.ripe.is_null()
            && let Some(block) = self.due(over)
        {
            self.ripe = block.as_ptr();
            // SAFETY: the block is ours; its pointers still count.
            self.nr += unsafe { (*block.as_ptr()).nr };
        }
    }

    /// Takes pointers out of the ripe block, as many as `out` has room for. Says how many, and gives the block if that was all of it.
    pub(super) fn take_ripe(&mut self, out: &mut [*mut u8]) -> (usize, Option<NonNull<Block>>) {
        let Some(block) = NonNull::new(self.ripe) else {
            return (0, None);
        };
        // SAFETY: the ripe block is ours, and its first `nr` records are written.
        let (n, left) = unsafe {
            let block = block.as_ptr();
            let nr = (*block).nr as usize;
            let n = nr.min(out.len());
            out[..n].copy_from_slice(&(&(*block).records)[nr - n..nr]);
            (*block).nr = (nr - n) as u64;
            (n, nr - n)
        };
        self.nr -= n as u64;
        if left > 0 {
            return (n, None);
        }
        self.ripe = core::ptr::null_mut();
        (n, Some(block))
    }

    /// Takes the ripe block out, else the oldest full one if its grace period is over.
    pub(super) fn due(&mut self, over: impl Fn(Cookie) -> bool) -> Option<NonNull<Block>> {
        if let Some(block) = NonNull::new(self.ripe) {
            self.ripe = core::ptr::null_mut();
            // SAFETY: the ripe block is ours.
            self.nr -= unsafe { (*block.as_ptr()).nr };
            return Some(block);
        }
        let block = NonNull::new(self.first)?;
        // SAFETY: full blocks are ours.
        let (cookie, next) = unsafe { ((*block.as_ptr()).cookie, (*block.as_ptr()).next) };
        if !over(Cookie(cookie)) {
            return None;
        }
        self.first = next;
        if next.is_null() {
            self.last = core::ptr::null_mut();
        }
        self.nr_full -= 1;
        // SAFETY: as above.
        self.nr -= unsafe { (*block.as_ptr()).nr };
        Some(block)
    }

    /// Keeps an empty block for the next time; `false` if there are enough.
    pub(super) fn add_blank(&mut self, block: NonNull<Block>) -> bool {
        if self.nr_blank >= self.keep {
            return false;
        }
        // SAFETY: the block is a page that the caller gives us.
        unsafe {
            (*block.as_ptr()).nr = 0;
            (*block.as_ptr()).next = self.blank;
        }
        self.blank = block.as_ptr();
        self.nr_blank += 1;
        true
    }
}
