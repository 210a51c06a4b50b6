//! A node: 64 slots, three bitmaps of marks, and what its writer needs. Where every byte goes, and the geometry of indices.
//!
//! | bytes | field | who reads | who writes |
//! |---:|---|---|---|
//! | 16 | `rcu`: the head by which it is freed | whoever frees it | whoever frees it |
//! | 8 | `parent`, null in the root | writers | writers |
//! | 4 | `count` of slots in use, siblings included; [`DEAD`] when it is out of the tree | writers; a cursor looks for `DEAD` | writers |
//! | 1 | `shift`: how many bits of the index are below this node's | all | once, before it is published |
//! | 1 | `offset`: its slot in the parent | writers | once, before it is published |
//! | 2 | nothing | | |
//! | 512 | `slots` | all | writers |
//! | 24 | `marks`: a bit a slot and mark; of a node's slot, whether anything below has the mark | all | writers |
//!
//! 568 in all; Linux has 576. Seven fit in a page either way.
//!
//! A node that is out of the tree is never written again, but for `count` and `rcu`: who is in it sees what it held when it left.

use core::ptr::{NonNull, null_mut};

use super::slot::Slot;
use crate::rcu::RcuHead;
use crate::sync::atomic::{AtomicPtr, AtomicU32, AtomicU64, Ordering};

/// Bits of the index a level (`XA_CHUNK_SHIFT`); the model checker could not see the end of 64 slots.
pub(super) const BITS: u32 = if cfg!(loom) { 2 } else { 6 };
pub(super) const SLOTS: usize = 1 << BITS;
const MASK: u64 = SLOTS as u64 - 1;

/// Bits of an index.
pub(super) const INDEX_BITS: u32 = 52;
/// The largest index: 2^52 - 1, the last page of 2^64 bytes.
pub const MAX_INDEX: u64 = (1 << INDEX_BITS) - 1;
/// The most levels a tree has.
pub(super) const MAX_LEVELS: u32 = INDEX_BITS.div_ceil(BITS);

/// `count` of a node that was taken out of the tree.
pub(super) const DEAD: u32 = u32::MAX;

/// What an entry can be marked with (`xa_mark_t`), under the page cache's names for the three.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
pub enum Mark {
    /// Has to be written to the disk (`PAGECACHE_TAG_DIRTY`).
    Dirty = 0,
    /// Is being written (`PAGECACHE_TAG_WRITEBACK`).
    Writeback = 1,
    /// Was dirty when a writeback of everything began (`PAGECACHE_TAG_TOWRITE`).
    ToWrite = 2,
}

impl Mark {
    /// All of them.
    pub const ALL: [Mark; 3] = [Mark::Dirty, Mark::Writeback, Mark::ToWrite];

    pub(super) const fn bit(self) -> u32 {
        1 << self as u32
    }
}

/// A node of the tree (`struct xa_node`); to those who bring the memory for it, so many bytes.
#[derive(Debug)]
#[repr(C)]
pub struct Node {
    rcu: RcuHead,
    pub(super) parent: AtomicPtr<Node>,
    pub(super) count: AtomicU32,
    pub(super) shift: u8,
    pub(super) offset: u8,
    slots: [AtomicPtr<()>; SLOTS],
    marks: [AtomicU64; 3],
    /// Read by whoever comes by, written by whoever frees: loom says if these meet.
    #[cfg(loom)]
    canary: loom::cell::UnsafeCell<u32>,
}

#[cfg(not(loom))]
const _: () = assert!(size_of::<Node>() == 16 + 8 + 4 + 1 + 1 + 2 + 512 + 24);
#[cfg(not(loom))]
const _: () = assert!(core::mem::offset_of!(Node, rcu) == 0 && align_of::<Node>() == 8);

#[cfg(loom)]
// SAFETY: the cell is there for loom to watch.
unsafe impl Sync for Node {}

impl Node {
    pub(super) fn new() -> Node {
        Node {
            rcu: RcuHead::new(),
            parent: AtomicPtr::new(null_mut()),
            count: AtomicU32::new(0),
            shift: 0,
            offset: 0,
            slots: core::array::from_fn(|_| AtomicPtr::new(null_mut())),
            marks: core::array::from_fn(|_| AtomicU64::new(0)),
            #[cfg(loom)]
            canary: loom::cell::UnsafeCell::new(0),
        }
    }

    /// The head by which a node that [`free_rcu`](super::NodeSource::free_rcu) was given can be freed: it is the node's start.
    pub const fn rcu_head(node: NonNull<Node>) -> NonNull<RcuHead> {
        node.cast()
    }

    /// The node whose head this is.
    pub const fn of_rcu_head(head: NonNull<RcuHead>) -> NonNull<Node> {
        head.cast()
    }

    #[inline]
    pub(super) fn offset_of(&self, index: u64) -> usize {
        (index >> self.shift & MASK) as usize
    }

    /// The first index below the slot, for a node that covers `index`; of the slot after the last, what comes after the node.
    #[inline]
    pub(super) fn index_of(&self, index: u64, offset: usize) -> u64 {
        let above = u32::from(self.shift) + BITS;
        (index >> above << above) + ((offset as u64) << self.shift)
    }

    /// The last index that a root like this covers.
    #[inline]
    pub(super) fn last(&self) -> u64 {
        last_of(u32::from(self.shift) / BITS + 1)
    }

    /// For readers.
    #[inline]
    pub(super) fn slot(&self, offset: usize) -> Slot {
        #[cfg(loom)]
        // SAFETY: loom panics if somebody frees the node meanwhile.
        self.canary.with(|p| assert_eq!(unsafe { *p }, 0));
        // Acquire pairs with the Release in `set`: who sees a node sees what it holds, and who sees a slot sees all that the
        // writer stored before.
        let slot = Slot::decode(self.slots[offset].load(Ordering::Acquire));
        crate::inject::point("xarray: a slot was read");
        slot
    }

    /// For the writer, who sees his own stores and, by the lock, those of the writers before.
    #[inline]
    pub(super) fn own(&self, offset: usize) -> Slot {
        Slot::decode(self.slots[offset].load(Ordering::Relaxed))
    }

    /// For the writer.
    #[inline]
    pub(super) fn set(&self, offset: usize, slot: Slot) {
        // Release pairs with the Acquire in `slot`.
        self.slots[offset].store(slot.encode(), Ordering::Release);
        crate::inject::point("xarray: a slot was written");
    }

    /// The slot that speaks for `offset`, siblings followed (`xas_descend`).
    ///
    /// Writers keep this: at every moment, what a sibling leads to, by one step or several, is an entry wide enough to cover
    /// the sibling, and not before a sibling has been overwritten does the slot that it leads to hold anything less. So if it is less, the
    /// sibling is old, and another look sees what stands there now. Each further round is a write by somebody else: nobody is
    /// waited for, so an interrupt may look at a tree whose writer it interrupted.
    #[inline]
    pub(super) fn resolve(&self, offset: usize) -> (usize, Slot) {
        loop {
            let (mut at, mut slot) = (offset, self.slot(offset));
            while let Slot::Sibling(first) = slot {
                (at, slot) = (first, self.slot(first));
            }
            let covers = match slot {
                Slot::Value(_, sub) => at + (1 << sub) > offset,
                _ => false,
            };
            if at == offset || covers {
                return (at, slot);
            }
            crate::sync::spin_hint();
        }
    }

    /// The same for the writer.
    pub(super) fn own_resolve(&self, offset: usize) -> (usize, Slot) {
        match self.own(offset) {
            Slot::Sibling(first) => (first, self.own(first)),
            slot => (offset, slot),
        }
    }

    #[inline]
    pub(super) fn marked(&self, mark: Mark, offset: usize) -> bool {
        // Acquire pairs with the Release in `mark`, here and in `next_marked`: who sees the bit of a node sees the bits below it.
        self.marks[mark as usize].load(Ordering::Acquire) >> offset & 1 != 0
    }

    /// The next slot with the mark, from `offset` on.
    #[inline]
    pub(super) fn next_marked(&self, mark: Mark, offset: usize) -> Option<usize> {
        // Acquire: as in `marked`.
        let from = u64::MAX.checked_shl(offset as u32).unwrap_or(0);
        let bits = self.marks[mark as usize].load(Ordering::Acquire) & from;
        crate::inject::point("xarray: marks were read");
        (bits != 0).then(|| bits.trailing_zeros() as usize)
    }

    pub(super) fn any_marked(&self, mark: Mark) -> bool {
        self.marks[mark as usize].load(Ordering::Relaxed) != 0
    }

    /// For the writer: sets or clears; the bit before.
    pub(super) fn mark(&self, mark: Mark, offset: usize, to: bool) -> bool {
        let word = &self.marks[mark as usize];
        let (bits, bit) = (word.load(Ordering::Relaxed), 1 << offset);
        // Release pairs with the Acquire in `marked`.
        word.store(if to { bits | bit } else { bits & !bit }, Ordering::Release);
        crate::inject::point("xarray: a mark was written");
        bits & bit != 0
    }

    /// For the writer: clears the marks of `len` slots from `offset` on; which there were, a bit a mark.
    pub(super) fn clear_marks(&self, offset: usize, len: usize) -> u32 {
        let range = (u64::MAX >> (64 - len)) << offset;
        let mut had = 0;
        for mark in Mark::ALL {
            let word = &self.marks[mark as usize];
            let bits = word.load(Ordering::Relaxed);
            if bits & range != 0 {
                had |= mark.bit();
                // Release: as in `mark`.
                word.store(bits & !range, Ordering::Release);
            }
        }
        had
    }

    /// For the writer: which marks there are in `len` slots from `offset` on, a bit a mark.
    pub(super) fn marks_in(&self, offset: usize, len: usize) -> u32 {
        let range = (u64::MAX >> (64 - len)) << offset;
        let has = |mark: &Mark| self.marks[*mark as usize].load(Ordering::Relaxed) & range != 0;
        Mark::ALL
            .iter()
            .filter(|m| has(m))
            .fold(0, |all, m| all | m.bit())
    }

    /// For the writer.
    pub(super) fn add(&self, slots: i32) {
        let count = self.count.load(Ordering::Relaxed);
        self.count
            .store(count.wrapping_add_signed(slots), Ordering::Relaxed);
    }

    pub(super) fn used(&self) -> u32 {
        self.count.load(Ordering::Relaxed)
    }

    /// For the writer who takes it out of the tree.
    pub(super) fn bury(&self) {
        // Relaxed: it tells a cursor that it had better walk down again; what the cursor saw before was true when the node left.
        self.count.store(DEAD, Ordering::Relaxed);
    }

    /// Has it left the tree, as far as the caller can see?
    #[inline]
    pub(super) fn dead(&self) -> bool {
        self.count.load(Ordering::Relaxed) == DEAD
    }

    /// Writes what readers read: the model's freeing and its making of a node.
    #[cfg(loom)]
    pub(super) fn poke(&self, value: u32) {
        // SAFETY: loom panics if anyone else is at it.
        self.canary.with_mut(|p| unsafe { *p = value });
    }

    /// Planted bug: a slot that releases nothing.
    #[cfg(all(test, loom))]
    pub(super) fn set_relaxed(&self, offset: usize, slot: Slot) {
        self.slots[offset].store(slot.encode(), Ordering::Relaxed);
    }
}

/// The last index of a tree of so many levels.
#[inline]
pub(super) const fn last_of(levels: u32) -> u64 {
    if levels >= MAX_LEVELS {
        MAX_INDEX
    } else {
        (1 << (levels * BITS)) - 1
    }
}

/// How many levels a tree must have to hold an entry there; none for the first index alone.
pub(super) const fn levels_for(index: u64, order: u32) -> u32 {
    if index == 0 && order == 0 {
        return 0;
    }
    let mut levels = level_of(order) + 1;
    while last_of(levels) < (index | ((1 << order) - 1)) {
        levels += 1;
    }
    levels
}

/// The level at which an entry of this order has its slots; 0 is the lowest.
pub(super) const fn level_of(order: u32) -> u32 {
    order / BITS
}
