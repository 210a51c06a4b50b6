//! `folio`: memory that users map, file cache or anonymous, in 32 bytes, however large it is.
//!
//! Linux's is 64 for a single page (it *is* the `struct page`) and 256 for a large one; the separate one on Linux's own roadmap
//! is 80. Where every byte goes:
//!
//! | bytes | what | Linux |
//! |---|---|---|
//! | 0–7 | links of the LRU list, two page frame numbers; of a list of the owner's while isolated; of the free block's list once it is free | `lru`, 16 |
//! | 8–15 | references, mappings, pins, guesses: [`Held`] | `_refcount`, `_mapcount`, `_pincount`, 12 |
//! | 16–23 | whom it is charged to (16 bits), what the rest is (8), the mapping (40) | `memcg_data`, `mapping`, 16 |
//! | 24–31 | the byte offset in the mapping, whose low 12 bits are zero and are the flags | `index`, `flags`, 16 |
//!
//! What else Linux keeps, and where it is here: order, node, zone, and whether it is a file's or anonymous: the word. `private`: a
//! [`FolioPrivate`] of 16 bytes that the third word then leads to, for the folios that have one. How often each page of a large folio
//! is mapped, and how often the whole: the words of its tail pages, which have nothing else to say.

use core::fmt;

use super::counts::{Counts, Held, Put};
use crate::address::{Pfn, PhysAddr};
use crate::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// The descriptor of a folio.
///
/// # Invariants
///
/// The counts are 0 exactly while the folio is free, being set up, frozen or being torn down; they lie outside the first 8 bytes, so
/// they stay 0 when those serve as a free block's links.
#[repr(C, align(8))]
pub struct Folio {
    links: [AtomicU32; 2],
    counts: Counts,
    /// `owner << 48 | what << 40 | address >> 4`, or the head's page frame number if it is in no mapping.
    place: AtomicU64,
    /// Offset of the first byte in the mapping, in its low 12 bits [`FolioFlags`].
    offset_flags: AtomicU64,
}

#[cfg(not(loom))]
const _: () = assert!(size_of::<Folio>() == 32);

/// What a filesystem keeps of a folio (`folio_attach_private`): the mapping moves in with it.
#[repr(C, align(8))]
pub(crate) struct FolioPrivate {
    /// The link of the free list once it is detached.
    pub(crate) private: AtomicU64,
    /// The mapping; still there for who looks a little late.
    pub(crate) place: AtomicU64,
}

#[cfg(not(loom))]
const _: () = assert!(size_of::<FolioPrivate>() == 16);

/// What the third word of a folio leads to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Place {
    /// Nowhere: the folio's first page, for whoever frees it.
    Head(Pfn),
    /// To the mapping.
    Mapping(u64),
    /// To a [`FolioPrivate`].
    Private(PhysAddr),
}

const OWNER_SHIFT: u32 = 48;
const PLACE_SHIFT: u32 = 40;
const PLACE_MASK: u64 = (1 << PLACE_SHIFT) - 1;
const KIND_MASK: u64 = 0xff << PLACE_SHIFT;
const OWNER_MASK: u64 = 0xffff << OWNER_SHIFT;

impl Place {
    fn pack(self) -> u64 {
        match self {
            Place::Head(pfn) => u64::from(pfn.0),
            Place::Mapping(handle) => 1 << PLACE_SHIFT | handle,
            Place::Private(at) => 2 << PLACE_SHIFT | at.0 >> 4,
        }
    }

    fn unpack(bits: u64) -> Place {
        let rest = bits & PLACE_MASK;
        match (bits & KIND_MASK) >> PLACE_SHIFT {
            0 => Place::Head(Pfn(rest as u32)),
            1 => Place::Mapping(rest),
            _ => Place::Private(PhysAddr(rest << 4)),
        }
    }
}

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
    /// On the active list, or to go there.
    pub const ACTIVE: FolioFlags = FolioFlags(1 << 5);
    /// On an LRU list.
    pub const LRU: FolioFlags = FolioFlags(1 << 6);
    /// Somebody waits for LOCKED or WRITEBACK to go.
    pub const WAITERS: FolioFlags = FolioFlags(1 << 7);
    /// Readahead put it here: whoever reads it asks for more.
    pub const READAHEAD: FolioFlags = FolioFlags(1 << 8);
    /// Nobody may evict it (`mlock`).
    pub const UNEVICTABLE: FolioFlags = FolioFlags(1 << 9);
    /// Evicted not long ago, and wanted again.
    pub const WORKINGSET: FolioFlags = FolioFlags(1 << 10);
    /// Taken off its LRU list by somebody who will put it back: its links are his.
    pub const ISOLATED: FolioFlags = FolioFlags(1 << 11);
    const MASK: u64 = 0xfff;

    /// Both.
    #[must_use]
    pub const fn with(self, other: FolioFlags) -> FolioFlags {
        FolioFlags(self.0 | other.0)
    }
}

impl Folio {
    /// A free one.
    #[cfg(loom)]
    pub(crate) fn free() -> Folio {
        Folio {
            links: [AtomicU32::new(0), AtomicU32::new(0)],
            counts: Counts::zero(),
            place: AtomicU64::new(0),
            offset_flags: AtomicU64::new(0),
        }
    }

    /// Sets the folio up for a new owner: one reference, unmapped, no flags, charged to nobody, in no mapping.
    pub(crate) fn init(&self, head: Pfn) {
        self.place
            .store(Place::Head(head).pack(), Ordering::Relaxed);
        self.offset_flags.store(0, Ordering::Relaxed);
        self.counts.init(Held::REF);
    }

    /// The same, but nobody has it yet: a stale reader gets nothing, whatever the memory of a new slab held.
    pub(crate) fn init_idle(&self, head: Pfn) {
        self.place
            .store(Place::Head(head).pack(), Ordering::Relaxed);
        self.offset_flags.store(0, Ordering::Relaxed);
        self.counts.init(Held::default());
    }

    /// Sets up what another folio was split into, before anybody can find it. No reference yet: [`Counts::unfreeze`].
    pub(crate) fn init_part(&self, of: &Folio, pages: u64, head: Pfn) {
        let place = match of.place() {
            Place::Head(_) => Place::Head(head),
            other => other,
        };
        self.place.store(place.pack(), Ordering::Relaxed);
        self.set_owner(of.owner());
        let offset = of.offset_flags.load(Ordering::Relaxed);
        self.offset_flags
            .store(offset + (pages << 12), Ordering::Relaxed);
    }

    /// Of new memory: nobody has it.
    pub(crate) fn freeze_new(&self) {
        self.counts.unfreeze(Held::default());
    }

    pub(crate) fn counts(&self) -> &Counts {
        &self.counts
    }

    /// One less of `what`; `head` is the folio's first page, which the caller knows since he has the folio.
    #[inline]
    pub(crate) fn put_counts(&self, what: Held, head: Pfn) -> Put {
        self.counts.put(what, || {
            let owner = self.place.load(Ordering::Relaxed) & OWNER_MASK;
            // Nobody has it any more, so it is in no mapping either; pairs with `going` through the counts.
            let place = Place::Head(head).pack();
            self.place.store(owner | place, Ordering::Relaxed);
        })
    }

    /// Which pages these are, for the last of those who guessed.
    pub(crate) fn going(&self) -> Pfn {
        match self.place() {
            Place::Head(pfn) => pfn,
            place => unreachable!("the last owner left {place:?}"),
        }
    }

    /// References, mappings and pins, read at once.
    pub fn held(&self) -> Held {
        self.counts.held()
    }

    /// References of all kinds (`folio_ref_count`).
    pub fn refcount(&self) -> u32 {
        self.held().total()
    }

    /// Page table entries that map it, or pages of it (`folio_mapcount`).
    pub fn mapcount(&self) -> u32 {
        self.held().maps
    }

    /// Is it pinned for a device (`folio_maybe_dma_pinned`, but exact)?
    pub fn is_pinned(&self) -> bool {
        self.held().pins != 0
    }

    pub(crate) fn place(&self) -> Place {
        Place::unpack(self.place.load(Ordering::Acquire))
    }

    pub(crate) fn set_place(&self, place: Place) {
        let set = |old: u64| Some(old & OWNER_MASK | place.pack());
        let _ = self
            .place
            .fetch_update(Ordering::Release, Ordering::Relaxed, set);
    }

    /// The mapping it belongs to, opaque here; 0 for none, or if a filesystem's private data stands before it
    /// ([`Mm::folio_mapping`](crate::Mm::folio_mapping) looks behind).
    pub fn mapping(&self) -> u64 {
        match self.place() {
            Place::Mapping(handle) => handle,
            Place::Head(_) | Place::Private(_) => 0,
        }
    }

    /// Enters the folio into a mapping, a number of the owner's choice below 2^40 (an address of an object of this memory manager,
    /// shifted), at this page index (below 2^52). Of a folio that the caller alone has, or has locked.
    ///
    /// # Safety
    ///
    /// Reclaim, the reverse map and whoever moves or splits the folio follow the number to a mapping or a family of this memory manager. One
    /// of the kernel's own is for folios that are in no LRU list, that nobody maps, and that are neither moved nor split.
    pub unsafe fn set_mapping(&self, mapping: u64, index: u64) {
        self.enter(mapping, index);
    }

    /// The same, by those who know what the number leads to.
    pub(crate) fn enter(&self, mapping: u64, index: u64) {
        debug_assert!(mapping >> PLACE_SHIFT == 0);
        self.set_index(index);
        self.set_place(Place::Mapping(mapping));
    }

    pub(crate) fn set_index(&self, index: u64) {
        debug_assert!(index >> 52 == 0);
        let set = |old: u64| Some(index << 12 | (old & FolioFlags::MASK));
        let _ = self
            .offset_flags
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, set);
    }

    /// The page index in the mapping.
    pub fn index(&self) -> u64 {
        self.offset_flags.load(Ordering::Relaxed) >> 12
    }

    /// Whom it is charged to (`folio_memcg`): a number of the kernel's choice, 0 for nobody.
    pub fn owner(&self) -> u16 {
        (self.place.load(Ordering::Relaxed) >> OWNER_SHIFT) as u16
    }

    /// Says whom it is charged to.
    pub fn set_owner(&self, owner: u16) {
        let set = |old: u64| Some(old & !OWNER_MASK | u64::from(owner) << OWNER_SHIFT);
        let _ = self
            .place
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, set);
    }

    /// Sets a flag; says whether it was set before.
    pub(crate) fn set_flag(&self, flag: FolioFlags) -> bool {
        self.offset_flags.fetch_or(flag.0, Ordering::AcqRel) & flag.0 != 0
    }

    /// Clears a flag; says whether it was set before.
    pub(crate) fn clear_flag(&self, flag: FolioFlags) -> bool {
        self.offset_flags.fetch_and(!flag.0, Ordering::AcqRel) & flag.0 != 0
    }

    /// Clears two flags in one step; says whether the second was set.
    pub(crate) fn clear_flags(&self, one: FolioFlags, other: FolioFlags) -> bool {
        let both = one.with(other);
        self.offset_flags.fetch_and(!both.0, Ordering::AcqRel) & other.0 != 0
    }

    /// Is the flag set (of several: is one of them)?
    pub fn has_flag(&self, flag: FolioFlags) -> bool {
        self.offset_flags.load(Ordering::Acquire) & flag.0 != 0
    }
}

impl fmt::Debug for Folio {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Folio")
            .field("held", &self.held())
            .field("place", &self.place())
            .field("owner", &self.owner())
            .field("index", &self.index())
            .field(
                "flags",
                &(self.offset_flags.load(Ordering::Relaxed) & FolioFlags::MASK),
            )
            .field("links", &self.links)
            .finish()
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    fn folio() -> Folio {
        Folio {
            links: [AtomicU32::new(1), AtomicU32::new(2)],
            counts: Counts::zero(),
            place: AtomicU64::new(4),
            offset_flags: AtomicU64::new(5),
        }
    }

    #[test]
    fn flags_and_index_share_a_word() {
        let f = folio();
        f.init(Pfn(7));
        assert_eq!(f.place(), Place::Head(Pfn(7)));
        assert!(!f.set_flag(FolioFlags::DIRTY) && f.set_flag(FolioFlags::DIRTY));
        f.enter((1 << 40) - 1, (1 << 52) - 1);
        assert_eq!((f.index(), f.mapping()), ((1 << 52) - 1, (1 << 40) - 1));
        assert!(f.has_flag(FolioFlags::DIRTY) && !f.has_flag(FolioFlags::LOCKED));
        assert!(f.clear_flag(FolioFlags::DIRTY) && !f.has_flag(FolioFlags::DIRTY));
    }

    #[test]
    fn owner_and_mapping_share_a_word() {
        let f = folio();
        f.init(Pfn(7));
        f.set_owner(u16::MAX);
        f.enter(3, 4);
        assert_eq!((f.owner(), f.mapping(), f.index()), (u16::MAX, 3, 4));
        f.set_owner(1);
        f.set_place(Place::Private(PhysAddr((1 << 44) - 16)));
        assert_eq!(f.place(), Place::Private(PhysAddr((1 << 44) - 16)));
        assert_eq!((f.owner(), f.mapping()), (1, 0));
        let part = folio();
        part.init_part(&f, 3, Pfn(10));
        assert_eq!((part.owner(), part.index()), (1, 7));
    }

    #[test]
    fn the_last_owner_leaves_the_number() {
        let f = folio();
        f.init(Pfn(7));
        f.enter(3, 4);
        f.set_owner(9);
        assert!(f.counts().guess());
        assert_eq!(f.put_counts(Held::REF, Pfn(7)), Put::Alive);
        assert_eq!(f.counts().retract(), Put::Last);
        assert_eq!((f.going(), f.owner()), (Pfn(7), 9));
    }
}
