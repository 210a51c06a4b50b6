//! `zsdesc`: what describes a zspage, in 16 bytes.
//!
//! Linux has a `struct zspage` (56 bytes) for each, and a `zpdesc`, which is the `struct page` (64), for each of its pages. Here the first page's
//! word leads to the `zsdesc`; the other pages keep their `struct buddy`, which serves nobody while pages are handed out and holds the next
//! page and the first one. So a zspage of n pages has 16 + 8 (n − 1) bytes of descriptors. A list of all pages in one descriptor would take 4 bytes a
//! page, but its 8 buddies could not go: 8 for the links, 32 for the list, 8 for the rest, and 8 for each page.
//!
//! | bytes | what |
//! |---:|---|
//! | 0 | neighbours in its class's list, as page frame numbers; the free block's links afterwards |
//! | 8 | the second page; of a huge object, which has none, the page of its handle |
//! | 12 | bits 0..9: objects in use; 9..18: the first that is free, of a huge object the place of its handle; 18..26: class; 26..32: pool |
//!
//! A page of handles has one as well.

use core::fmt;

use super::Buddy;
use crate::address::Pfn;
use crate::sync::atomic::{AtomicU32, Ordering};

/// Objects in a zspage, or slots in a page of handles, are numbered below this; the number itself means "none".
pub(crate) const MAX_INDEX: u32 = 511;
/// So many pools one memory manager can have.
pub(crate) const MAX_POOLS: usize = 64;

const INDEX_MASK: u32 = MAX_INDEX;
const FREE_SHIFT: u32 = 9;
const CLASS_SHIFT: u32 = 18;
const POOL_SHIFT: u32 = 26;

const _: () = assert!(MAX_POOLS == 1 << (32 - POOL_SHIFT));

/// The descriptor of a zspage.
///
/// # Invariants
///
/// Class and pool do not change while it lives. The second page changes when that page moves, which it does not while an object in it is held; all else is guarded
/// by the class's lock.
#[repr(C, align(8))]
pub struct ZsDesc {
    links: Buddy,
    second: AtomicU32,
    bits: AtomicU32,
}

const _: () = assert!(size_of::<ZsDesc>() == 16);

impl ZsDesc {
    /// Sets it up: nothing in use, the first object is the first that is free.
    pub(crate) fn init(&self, class: usize, pool: usize, second: Pfn) {
        debug_assert!(class < 256 && pool < MAX_POOLS);
        self.second.store(second.0, Ordering::Relaxed);
        let bits = (class as u32) << CLASS_SHIFT | (pool as u32) << POOL_SHIFT;
        self.bits.store(bits, Ordering::Relaxed);
    }

    fn bits(&self) -> u32 {
        self.bits.load(Ordering::Relaxed)
    }

    /// How many of its objects are in use.
    pub fn inuse(&self) -> usize {
        (self.bits() & INDEX_MASK) as usize
    }

    /// One more in use, or one less.
    pub(crate) fn add_inuse(&self, n: i32) {
        let bits = self.bits();
        let inuse = (bits & INDEX_MASK).wrapping_add_signed(n);
        debug_assert!(inuse <= INDEX_MASK);
        self.bits
            .store(bits & !INDEX_MASK | inuse, Ordering::Relaxed);
    }

    /// The first free object; [`MAX_INDEX`] if there is none.
    pub(crate) fn free(&self) -> u32 {
        self.bits() >> FREE_SHIFT & INDEX_MASK
    }

    pub(crate) fn set_free(&self, index: u32) {
        debug_assert!(index <= INDEX_MASK);
        let bits = self.bits() & !(INDEX_MASK << FREE_SHIFT);
        self.bits
            .store(bits | index << FREE_SHIFT, Ordering::Relaxed);
    }

    /// Which size class it is of.
    pub fn class(&self) -> usize {
        (self.bits() >> CLASS_SHIFT & 0xff) as usize
    }

    /// Which pool's it is.
    pub fn pool(&self) -> usize {
        (self.bits() >> POOL_SHIFT) as usize
    }

    /// The page after the first.
    pub(crate) fn second(&self) -> Pfn {
        Pfn(self.second.load(Ordering::Relaxed))
    }

    pub(crate) fn set_second(&self, pfn: Pfn) {
        self.second.store(pfn.0, Ordering::Relaxed);
    }
}

impl fmt::Debug for ZsDesc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ZsDesc")
            .field("pool", &self.pool())
            .field("class", &self.class())
            .field("inuse", &self.inuse())
            .finish_non_exhaustive()
    }
}
