//! `ptdesc`: a page of page table, in 32 bytes. Never mapped by users.

use core::fmt;

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// The descriptor of a page table page.
///
/// # Invariants
///
/// Type-stable like [`Folio`](super::Folio): a lockless walker may hold it while the page goes back.
#[repr(C, align(16))]
pub struct PtDesc {
    /// The free block's links once the page is let go.
    links: [AtomicU32; 2],
    /// The page table lock word (`ptl`), for the kernel's own lock.
    lock: AtomicU32,
    _reserved: AtomicU32,
    /// Owner: the address space, opaque here.
    owner: AtomicU64,
    /// Where the table stands: the first address it maps.
    index: AtomicU64,
}

const _: () = assert!(size_of::<PtDesc>() == 32);

impl PtDesc {
    pub(crate) fn init(&self) {
        self.lock.store(0, Ordering::Relaxed);
        self.owner.store(0, Ordering::Relaxed);
        self.index.store(0, Ordering::Relaxed);
    }

    /// The lock word (`ptl`): the kernel builds its own lock on it.
    pub fn lock_word(&self) -> &AtomicU32 {
        &self.lock
    }

    /// The address space that owns the table, opaque here.
    pub fn owner(&self) -> u64 {
        self.owner.load(Ordering::Acquire)
    }

    /// Says whose table this is, and where it stands.
    pub fn set_owner(&self, owner: u64, index: u64) {
        self.index.store(index, Ordering::Relaxed);
        self.owner.store(owner, Ordering::Release);
    }

    /// The first address the table maps.
    pub fn index(&self) -> u64 {
        self.index.load(Ordering::Relaxed)
    }
}

impl fmt::Debug for PtDesc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PtDesc")
            .field("links", &self.links)
            .field("owner", &self.owner())
            .field("index", &self.index())
            .finish_non_exhaustive()
    }
}
