//! `folio`: memory that users map, file cache or anonymous, in 32 bytes.
//!
//! Linux's is 64 for a single page (it *is* the `struct page`); the separate one on Linux's own roadmap is 80. What
//! goes: the order and the node are known from the word, the flags live in the low 12 bits of the byte offset, and the
//! LRU links are page frame numbers that share the first 8 bytes with the free block's.

use core::fmt;

use crate::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// The descriptor of a folio.
///
/// # Invariants
///
/// `refcount` is 0 exactly while the folio is free, being set up or being torn down; it lies outside the first 8 bytes,
/// so it stays 0 when the memory serves as a free block's links. The memory is type-stable: a stale reader finds some
/// folio's count here, never another kind of object.
#[repr(C, align(16))]
pub struct Folio {
    lru_next: AtomicU32,
    lru_prev: AtomicU32,
    refcount: AtomicU32,
    mapcount: AtomicCount,
    mapping: AtomicU64,
    /// Offset of the first byte in the mapping, in its low 12 bits [`FolioFlags`].
    offset_flags: AtomicU64,
}

const _: () = assert!(size_of::<Folio>() == 32);

/// The state bits of a folio (a byte offset's low 12 bits are always zero).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(transparent)]
pub struct FolioFlags(u64);

impl FolioFlags {
    /// Someone has it locked.
    pub const LOCKED: FolioFlags = FolioFlags(1 << 0);
    /// Contents differ from what is on disk.
    pub const DIRTY: FolioFlags = FolioFlags(1 << 1);
    /// Contents are valid.
    pub const UPTODATE: FolioFlags = FolioFlags(1 << 2);
    /// On its way to disk.
    pub const WRITEBACK: FolioFlags = FolioFlags(1 << 3);
    /// Used since the LRU last looked.
    pub const REFERENCED: FolioFlags = FolioFlags(1 << 4);
    /// On the active list.
    pub const ACTIVE: FolioFlags = FolioFlags(1 << 5);
    /// On an LRU list.
    pub const LRU: FolioFlags = FolioFlags(1 << 6);
    const MASK: u64 = 0xfff;
}

impl Folio {
    /// Sets the folio up for a new owner: one reference, unmapped, no flags, in no mapping.
    pub(crate) fn init(&self) {
        self.mapcount.0.store(0, Ordering::Relaxed);
        self.mapping.store(0, Ordering::Relaxed);
        self.offset_flags.store(0, Ordering::Relaxed);
        // Release pairs with the Acquire in `try_get`: who gets a reference sees the fields above.
        self.refcount.store(1, Ordering::Release);
    }

    /// The last owner lets go: no try-get succeeds any more. Says how many references there were.
    pub(crate) fn freeze(&self) -> u32 {
        self.refcount.swap(0, Ordering::AcqRel)
    }

    /// Takes a reference unless there is none left (`folio_try_get`). The caller then checks that the page still leads here.
    pub fn try_get(&self) -> bool {
        let mut count = self.refcount.load(Ordering::Relaxed);
        loop {
            if count == 0 {
                return false;
            }
            match self.refcount.compare_exchange_weak(
                count,
                count + 1,
                Ordering::Acquire,
                Ordering::Relaxed,
            ) {
                Ok(_) => return true,
                Err(now) => count = now,
            }
        }
    }

    /// Drops a reference; says whether it was the last one, and the folio is the caller's to free.
    #[must_use]
    pub fn put(&self) -> bool {
        self.refcount.fetch_sub(1, Ordering::AcqRel) == 1
    }

    /// References held.
    pub fn refcount(&self) -> u32 {
        self.refcount.load(Ordering::Relaxed)
    }

    /// Page table entries that map it.
    pub fn mapcount(&self) -> &AtomicCount {
        &self.mapcount
    }

    /// The address space it belongs to, opaque here; 0 for none.
    pub fn mapping(&self) -> u64 {
        self.mapping.load(Ordering::Acquire)
    }

    /// Enters the folio into an address space, at this page index (below 2^52).
    pub fn set_mapping(&self, mapping: u64, index: u64) {
        debug_assert!(index >> 52 == 0);
        let flags = self.offset_flags.load(Ordering::Relaxed) & FolioFlags::MASK;
        self.offset_flags
            .store(index << 12 | flags, Ordering::Relaxed);
        self.mapping.store(mapping, Ordering::Release);
    }

    /// The page index in the mapping.
    pub fn index(&self) -> u64 {
        self.offset_flags.load(Ordering::Relaxed) >> 12
    }

    /// Sets a flag; says whether it was set before.
    pub fn set_flag(&self, flag: FolioFlags) -> bool {
        self.offset_flags.fetch_or(flag.0, Ordering::AcqRel) & flag.0 != 0
    }

    /// Clears a flag; says whether it was set before.
    pub fn clear_flag(&self, flag: FolioFlags) -> bool {
        self.offset_flags.fetch_and(!flag.0, Ordering::AcqRel) & flag.0 != 0
    }

    /// Is the flag set?
    pub fn has_flag(&self, flag: FolioFlags) -> bool {
        self.offset_flags.load(Ordering::Acquire) & flag.0 != 0
    }

    /// The LRU links, page frame numbers of the neighbours; the owner's while the folio is his.
    pub fn lru(&self) -> (u32, u32) {
        (
            self.lru_next.load(Ordering::Relaxed),
            self.lru_prev.load(Ordering::Relaxed),
        )
    }

    /// Sets the LRU links.
    pub fn set_lru(&self, next: u32, prev: u32) {
        self.lru_next.store(next, Ordering::Relaxed);
        self.lru_prev.store(prev, Ordering::Relaxed);
    }
}

impl fmt::Debug for Folio {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Folio")
            .field("refcount", &self.refcount())
            .field("mapping", &self.mapping())
            .field("index", &self.index())
            .finish_non_exhaustive()
    }
}

/// A count that many change at once.
#[derive(Debug)]
#[repr(transparent)]
pub struct AtomicCount(AtomicU32);

impl AtomicCount {
    /// One more; says what it was.
    pub fn inc(&self) -> u32 {
        self.0.fetch_add(1, Ordering::AcqRel)
    }

    /// One less; says what it was.
    pub fn dec(&self) -> u32 {
        self.0.fetch_sub(1, Ordering::AcqRel)
    }

    /// What it is.
    pub fn get(&self) -> u32 {
        self.0.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folio() -> Folio {
        Folio {
            lru_next: AtomicU32::new(1),
            lru_prev: AtomicU32::new(2),
            refcount: AtomicU32::new(0),
            mapcount: AtomicCount(AtomicU32::new(3)),
            mapping: AtomicU64::new(4),
            offset_flags: AtomicU64::new(5),
        }
    }

    #[test]
    fn a_free_folio_cannot_be_got() {
        let f = folio();
        assert!(!f.try_get());
        f.init();
        assert!(f.try_get() && f.refcount() == 2);
        assert!(!f.put() && f.put());
        assert!(!f.try_get());
    }

    #[test]
    fn flags_and_index_share_a_word() {
        let f = folio();
        f.init();
        assert!(!f.set_flag(FolioFlags::DIRTY) && f.set_flag(FolioFlags::DIRTY));
        f.set_mapping(0xffff_8880_0000_1000, (1 << 52) - 1);
        assert_eq!(
            (f.index(), f.mapping()),
            ((1 << 52) - 1, 0xffff_8880_0000_1000)
        );
        assert!(f.has_flag(FolioFlags::DIRTY) && !f.has_flag(FolioFlags::LOCKED));
        assert!(f.clear_flag(FolioFlags::DIRTY) && !f.has_flag(FolioFlags::DIRTY));
        f.mapcount().inc();
        assert_eq!((f.mapcount().get(), f.mapcount().dec()), (1, 1));
    }
}
