//! `folio`: memory that users map, file cache or anonymous, in 24 bytes.
//!
//! Linux's is 64 for a single page (it *is* the `struct page`); the separate one on Linux's own roadmap is 80. What goes: the
//! order, the node and whether it is a file's or anonymous are known from the word; the flags live in the low 12 bits
//! of the byte offset, which are zero otherwise; and there are no LRU links. A folio's age is its *generation* (as in
//! Linux's multi-generational LRU, three bits), and whoever ages or evicts walks the memory map, in which every
//! folio is found by its page: a clock whose hand is a page frame number.

use core::fmt;

use crate::address::Pfn;
use crate::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// The descriptor of a folio.
///
/// # Invariants
///
/// `refcount` is 0 exactly while the folio is free, being set up or being torn down; it lies outside the first 8 bytes, so it
/// stays 0 when those serve as a free block's links. `mapping` means nothing then; between the owner's letting go and the last
/// reference it is the head's page frame number.
#[repr(C, align(8))]
pub struct Folio {
    /// The address space; the free block's links once the folio is let go.
    mapping: AtomicU64,
    refcount: AtomicU32,
    mapcount: AtomicCount,
    /// Offset of the first byte in the mapping, in its low 12 bits [`FolioFlags`] and the generation.
    offset_flags: AtomicU64,
}

const _: () = assert!(size_of::<Folio>() == 24);

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
    /// The generation's place.
    const GENERATION_SHIFT: u32 = 8;
    const GENERATION_MASK: u64 = 0x7 << Self::GENERATION_SHIFT;
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

    /// The owner lets go of his reference, and says which pages these are, for whoever puts the last one: a reader who took a
    /// reference by mistake, on a folio that had become another's, does not know. Says whether it was the last.
    pub(crate) fn owner_puts(&self, head: Pfn) -> bool {
        self.mapping.store(u64::from(head.0), Ordering::Relaxed);
        // AcqRel: Release hands the store above on, to the one who puts last.
        self.refcount.fetch_sub(1, Ordering::AcqRel) == 1
    }

    /// Which pages these are, once the owner has let go and all references are gone.
    pub(crate) fn going(&self) -> Pfn {
        Pfn(self.mapping.load(Ordering::Relaxed) as u32)
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
        let set = |old: u64| Some(index << 12 | (old & FolioFlags::MASK));
        let _ = self
            .offset_flags
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, set);
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

    /// The generation it was last used in, 0 to 7, wrapping (`folio_lru_gen`).
    pub fn generation(&self) -> u8 {
        let bits = self.offset_flags.load(Ordering::Relaxed) & FolioFlags::GENERATION_MASK;
        (bits >> FolioFlags::GENERATION_SHIFT) as u8
    }

    /// Says in which generation it was used; only the low three bits count.
    pub fn set_generation(&self, generation: u8) {
        let bits =
            u64::from(generation) << FolioFlags::GENERATION_SHIFT & FolioFlags::GENERATION_MASK;
        let set = |old: u64| Some(old & !FolioFlags::GENERATION_MASK | bits);
        let _ = self
            .offset_flags
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, set);
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
        f.set_generation(5);
        assert!(f.generation() == 5 && f.has_flag(FolioFlags::DIRTY) && f.index() == (1 << 52) - 1);
        assert!(f.clear_flag(FolioFlags::DIRTY) && !f.has_flag(FolioFlags::DIRTY));
        f.mapcount().inc();
        assert_eq!((f.mapcount().get(), f.mapcount().dec()), (1, 1));
    }
}
