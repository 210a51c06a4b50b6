//! Pages that are bad and still in use: where it is remembered until they come back.
//!
//! The word of such a page is its owner's, so the mark has to be elsewhere: in a small table, which is looked at where free blocks enter a
//! per-CPU list or a zone, and only while it is not empty: one branch on a word that nobody writes. With each page lie the
//! descriptors that cutting it out of a block needs, so that this allocates nothing. If there were none to be had when the page failed, less is cut
//! off, and more goes out of use with it.
//!
//! One slot is for the page that is being looked at: so what can be saved at once is saved, however many bad ones wait for their owners.
//!
//! Who marks a page takes the zone's lock once, and enters all per-CPU lists, before he looks what became of the page: whoever looked at the
//! table before has put the page where it is seen then.
//!
//! # Invariants
//!
//! A slot is filled by the holder of the lock of memory failures, and emptied by the holder of the lock of the page's zone, who then has its
//! descriptors. When the lock of memory failures is let go of, at most [`MAX_PENDING`] are filled.

use crate::address::{Pfn, PhysAddr};
use crate::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// So many bad pages can be in use at once.
pub(crate) const MAX_PENDING: usize = 32;

#[derive(Debug)]
struct Slot {
    pfn: AtomicU32,
    /// [`Health`].
    health: AtomicU32,
    /// A list of descriptors, in two words.
    first: AtomicU64,
    len: AtomicU32,
}

/// How bad a page is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub(crate) enum Health {
    /// To touch it may be deadly.
    Broken = 0,
    /// It works still.
    Failing = 1,
}

/// Descriptors that lie with a page: a `DescList` in two words.
pub(crate) type Spare = (PhysAddr, u32);

/// The table, of `SLOTS`: one more than can stay.
#[derive(Debug)]
pub(crate) struct BadPages<const SLOTS: usize = { MAX_PENDING + 1 }> {
    pending: AtomicU32,
    slots: [Slot; SLOTS],
    /// Pages out of use: the sum over all words that say so.
    out: AtomicU64,
}

impl<const SLOTS: usize> BadPages<SLOTS> {
    pub(crate) fn new() -> Self {
        BadPages {
            pending: AtomicU32::new(0),
            slots: core::array::from_fn(|_| Slot {
                pfn: AtomicU32::new(Pfn::NONE.0),
                health: AtomicU32::new(0),
                first: AtomicU64::new(0),
                len: AtomicU32::new(0),
            }),
            out: AtomicU64::new(0),
        }
    }

    /// Is any page bad and in use?
    #[inline]
    pub(crate) fn any(&self) -> bool {
        self.pending.load(Ordering::Relaxed) != 0
    }

    /// How many are.
    pub(crate) fn pending(&self) -> u32 {
        self.pending.load(Ordering::Relaxed)
    }

    /// Is the slot taken that is for the page that is being looked at? Then that one cannot stay.
    pub(crate) fn is_crowded(&self) -> bool {
        self.pending() as usize >= SLOTS
    }

    /// Pages out of use.
    pub(crate) fn out(&self) -> u64 {
        self.out.load(Ordering::Relaxed)
    }

    /// Pages went out of use, or came back into it.
    pub(crate) fn add_out(&self, pages: i64) {
        self.out.fetch_add(pages as u64, Ordering::Relaxed);
    }

    /// A bad page of this block: it, and where it is noted.
    #[cold]
    pub(crate) fn find(&self, block: Pfn, order: usize) -> Option<(Pfn, usize)> {
        self.slots.iter().enumerate().find_map(|(nth, slot)| {
            // Acquire pairs with the Release in `add`: the descriptors are there.
            let pfn = slot.pfn.load(Ordering::Acquire);
            (pfn != Pfn::NONE.0 && pfn >= block.0 && pfn - block.0 < 1 << order)
                .then_some((Pfn(pfn), nth))
        })
    }

    /// Is there a bad page in this block?
    #[inline]
    pub(crate) fn hits(&self, block: Pfn, order: usize) -> bool {
        self.any() && self.find(block, order).is_some()
    }

    /// Is there a page in this block that is not to be touched?
    #[inline]
    pub(crate) fn is_deadly(&self, block: Pfn, order: usize) -> bool {
        self.any() && self.has_broken(block, order)
    }

    #[cold]
    fn has_broken(&self, block: Pfn, order: usize) -> bool {
        self.slots.iter().any(|slot| {
            // Acquire: as in `find`.
            let pfn = slot.pfn.load(Ordering::Acquire);
            pfn != Pfn::NONE.0
                && pfn >= block.0
                && pfn - block.0 < 1 << order
                && slot.health.load(Ordering::Relaxed) == Health::Broken as u32
        })
    }

    /// Notes a page, with descriptors for cutting it out. With the lock of memory failures.
    pub(crate) fn add(&self, pfn: Pfn, health: Health, (first, len): Spare) {
        // Acquire pairs with the Release in `take`: what lay in the slot has been read.
        let is_free = |slot: &&Slot| slot.pfn.load(Ordering::Acquire) == Pfn::NONE.0;
        let Some(slot) = self.slots.iter().find(is_free) else {
            unreachable!("the lock of memory failures was let go of with all {SLOTS} slots taken")
        };
        slot.health.store(health as u32, Ordering::Relaxed);
        slot.first.store(first.0, Ordering::Relaxed);
        slot.len.store(len, Ordering::Relaxed);
        slot.pfn.store(pfn.0, Ordering::Release);
        self.pending.fetch_add(1, Ordering::Relaxed);
    }

    /// Forgets what `find` found; its descriptors are the caller's. With the lock of the page's zone.
    #[must_use = "descriptors would be lost"]
    pub(crate) fn take(&self, nth: usize) -> Spare {
        let slot = &self.slots[nth];
        let first = PhysAddr(slot.first.load(Ordering::Relaxed));
        let spare = (first, slot.len.load(Ordering::Relaxed));
        // Release: who fills it again does so after we have read it.
        slot.pfn.store(Pfn::NONE.0, Ordering::Release);
        self.pending.fetch_sub(1, Ordering::Relaxed);
        spare
    }
}
