//! The pool itself: where it is, its free slots, how often it is used, and what it did.

use super::fault::View;
use super::pool_pages;
use super::slot::Slot;
use crate::address::Pfn;
use crate::config::Config;
use crate::memmap::BootSlice;
use crate::mm::Mm;
use crate::platform::Platform;
use crate::sync::SpinLock;
use crate::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// No slot.
const NONE: u32 = u32::MAX;

/// How many allocations of a CPU come before the next that is sampled.
#[derive(Debug)]
#[repr(C, align(64))]
pub(crate) struct Countdown(pub(super) AtomicU32);

impl Countdown {
    pub(crate) fn new() -> Countdown {
        Countdown(AtomicU32::new(0))
    }
}

/// Free slots, first in, first out.
#[derive(Debug)]
pub(super) struct FreeList {
    head: u32,
    tail: u32,
}

impl FreeList {
    pub(super) fn push(&mut self, slots: &[Slot], index: usize) {
        slots[index].next.store(NONE, Ordering::Relaxed);
        match self.tail {
            NONE => self.head = index as u32,
            tail => slots[tail as usize]
                .next
                .store(index as u32, Ordering::Relaxed),
        }
        self.tail = index as u32;
    }

    pub(super) fn pop(&mut self, slots: &[Slot]) -> Option<usize> {
        let index = self.head;
        if index == NONE {
            return None;
        }
        self.head = slots[index as usize].next.load(Ordering::Relaxed);
        if self.head == NONE {
            self.tail = NONE;
        }
        Some(index as usize)
    }
}

/// The pool.
#[derive(Debug)]
pub(crate) struct Pool {
    pub(super) view: View,
    pub(super) first: Pfn,
    /// One in so many allocations; 0: none.
    pub(super) sample: AtomicU32,
    pub(super) interval_ns: u64,
    /// When the last was.
    pub(super) last: AtomicU64,
    pub(super) countdowns: BootSlice<Countdown>,
    pub(super) free: SpinLock<FreeList>,
    pub(super) zero_on_free: bool,
    /// See [`Slot`]: of the guard behind the last.
    pub(super) opened_last: AtomicU32,
    /// Slots that wait for a grace period.
    pub(super) waiting: AtomicU32,
    pub(super) in_use: AtomicU32,
    pub(super) allocs: AtomicU64,
    pub(super) frees: AtomicU64,
    pub(super) skipped: AtomicU64,
    pub(super) bugs: AtomicU64,
}

impl Pool {
    /// A pool in these pages, which nobody touches yet.
    pub(crate) fn new(
        config: &Config,
        first: Pfn,
        base: usize,
        slots: BootSlice<Slot>,
        countdowns: BootSlice<Countdown>,
    ) -> Pool {
        let sample = if slots.is_empty() {
            0
        } else {
            config.kfence_sample
        };
        Pool {
            view: View::new(base, slots),
            first,
            sample: AtomicU32::new(sample),
            interval_ns: config.kfence_interval_ns,
            last: AtomicU64::new(0),
            countdowns,
            free: SpinLock::new(FreeList {
                head: NONE,
                tail: NONE,
            }),
            zero_on_free: config.init_on_free,
            opened_last: AtomicU32::new(0),
            waiting: AtomicU32::new(0),
            in_use: AtomicU32::new(0),
            allocs: AtomicU64::new(0),
            frees: AtomicU64::new(0),
            skipped: AtomicU64::new(0),
            bugs: AtomicU64::new(0),
        }
    }

    pub(crate) fn view(&self) -> &View {
        &self.view
    }

    pub(crate) fn first(&self) -> Pfn {
        self.first
    }

    /// Its pages, guards included.
    pub(crate) fn pages(&self) -> core::ops::Range<u32> {
        self.first.0..self.first.0 + pool_pages(self.view.slots().len()) as u32
    }

    /// Pages that are slabs: objects' or its own.
    pub(crate) fn slabs(&self) -> u64 {
        self.view.slots().len() as u64
    }

    /// Are allocations sampled?
    #[inline]
    pub(crate) fn samples(&self) -> bool {
        self.sample.load(Ordering::Relaxed) != 0
    }

    /// Is this address in the pool (`is_kfence_address`)?
    #[inline]
    pub(crate) fn contains(&self, object: *const u8) -> bool {
        self.view.contains(object.addr())
    }

    /// Is one of these addresses in the pool?
    #[inline]
    pub(crate) fn contains_any(&self, objects: &[*mut u8]) -> bool {
        !self.view.slots().is_empty() && objects.iter().any(|&object| self.contains(object))
    }

    /// The slot whose page this address is in.
    pub(crate) fn slot_of(&self, object: *const u8) -> Option<(usize, &Slot)> {
        self.view.slot_at(self.view.page_of(object.addr())?)
    }

    /// Was this guard made accessible by a fault? By its place in the pool.
    pub(super) fn opened(&self, guard: usize) -> &AtomicU32 {
        let slot = self.view.slots().get(guard / 2);
        slot.map_or(&self.opened_last, |slot| &slot.opened)
    }

    pub(super) fn pfn(&self, index: usize) -> Pfn {
        Pfn(self.first.0 + 2 * index as u32 + 1)
    }
}

/// What the guarded pool did (Linux's `/sys/kernel/debug/kfence/stats`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct KfenceInfo {
    /// Objects there is room for.
    pub objects: usize,
    /// The first page of the pool.
    pub first: Pfn,
    /// Its pages, guards included.
    pub pages: usize,
    /// Objects in use, with those that wait for a grace period.
    pub in_use: u32,
    /// Objects that were freed and wait for a grace period.
    pub waiting: u32,
    /// Allocations served.
    pub allocs: u64,
    /// Objects that came back.
    pub frees: u64,
    /// Allocations that were to be served and found no room.
    pub skipped: u64,
    /// Reports made.
    pub bugs: u64,
}

impl<P: Platform> Mm<P> {
    /// What the guarded pool has and did.
    ///
    /// # Context
    ///
    /// Any.
    pub fn kfence_info(&self) -> KfenceInfo {
        let pool = &self.kfence;
        KfenceInfo {
            objects: pool.view.slots().len(),
            first: pool.first,
            pages: pool.pages().len(),
            in_use: pool.in_use.load(Ordering::Relaxed),
            waiting: pool.waiting.load(Ordering::Relaxed),
            allocs: pool.allocs.load(Ordering::Relaxed),
            frees: pool.frees.load(Ordering::Relaxed),
            skipped: pool.skipped.load(Ordering::Relaxed),
            bugs: pool.bugs.load(Ordering::Relaxed),
        }
    }

    /// From here on one in so many allocations comes from the guarded pool, if there is one; none with 0 (`kfence.sample_interval`).
    ///
    /// # Context
    ///
    /// Any.
    pub fn kfence_set_sample(&self, one_in: u32) {
        if !self.kfence.view.slots().is_empty() {
            self.kfence.sample.store(one_in, Ordering::Relaxed);
            for countdown in self.kfence.countdowns.iter() {
                countdown.0.store(one_in, Ordering::Relaxed);
            }
        }
    }

    /// Is this address in the guarded pool (`is_kfence_address`)?
    ///
    /// # Context
    ///
    /// Any.
    pub fn is_kfence_address(&self, ptr: *const u8) -> bool {
        self.kfence.contains(ptr)
    }
}
