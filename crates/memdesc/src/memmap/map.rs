//! pfn → word. Regions of RAM, and of device memory that was brought in later, each with its words; nothing for holes.
//!
//! A *region* is a run of page frames without a hole, all of one zone. A table of *sections* (128 MiB each)
//! leads to the first region that touches the section, so a lookup is two loads before the word. Callers
//! see ranges ([`MemMap::set`]) and lookups ([`MemMap::lookup`]), never the array: a map in which a uniform pageblock needs a
//! single word can take its place.

use core::ops::Deref;
use core::ptr::NonNull;

use super::bad::BadPages;
use super::heads::{Found, blocks, climb};
use super::word::{AtomicWord, PageType, TAIL_WORDS_ORDER, Word};
use crate::address::{MAX_ORDER, PAGEBLOCK_ORDER, Pfn, PhysAddr};
use crate::page_alloc::MigrateType;
use crate::platform::phys_to_virt;
use crate::sync::atomic::{AtomicPtr, AtomicU8, AtomicU32, AtomicU64, Ordering};

/// log2 of the pages in a section: 128 MiB, as in Linux.
pub(crate) const SECTION_SHIFT: u32 = 15;

/// A slice in boot memory: never freed, as long-lived as the platform.
#[derive(Debug)]
pub(crate) struct BootSlice<T> {
    ptr: NonNull<T>,
    len: usize,
}

// SAFETY: a `BootSlice` is a shared reference to its elements.
unsafe impl<T: Sync> Sync for BootSlice<T> {}
// SAFETY: the same; sending a shared reference needs `Sync`.
unsafe impl<T: Sync> Send for BootSlice<T> {}

impl<T> BootSlice<T> {
    /// # Safety
    ///
    /// `ptr` leads to `len` valid elements that nobody else has a unique reference to, for as long as the slice is used.
    pub(crate) unsafe fn new(ptr: NonNull<T>, len: usize) -> Self {
        BootSlice { ptr, len }
    }

    /// The same slice once more: of boot memory, which is never given to anyone else.
    pub(crate) fn again(&self) -> BootSlice<T> {
        BootSlice {
            ptr: self.ptr,
            len: self.len,
        }
    }
}

impl<T> Deref for BootSlice<T> {
    type Target = [T];
    #[inline]
    fn deref(&self) -> &[T] {
        // SAFETY: the promise of `new`.
        unsafe { core::slice::from_raw_parts(self.ptr.as_ptr(), self.len) }
    }
}

/// A run of page frames without a hole, of one zone.
///
/// # Invariants
///
/// `words` has one word per page from `start` to `end`, `blocks` one byte per pageblock they touch.
#[derive(Debug)]
pub(crate) struct Region {
    /// The first page frame.
    pub(crate) start: u32,
    /// One past the last.
    pub(crate) end: u32,
    /// Which zone, as an index into the zone table.
    pub(crate) zone: u32,
    /// Pages from here to `untouched_end` were never handed out and have no words. Changed under the zone lock.
    pub(crate) untouched_start: AtomicU32,
    /// See `untouched_start`.
    pub(crate) untouched_end: AtomicU32,
    /// Of device memory: pages that have a descriptor, and whether the device is there.
    pub(crate) in_use: AtomicU32,
    pub(crate) present: AtomicU32,
    words: NonNull<AtomicWord>,
    blocks: NonNull<AtomicU8>,
}

// SAFETY: the pointers lead to atomics in boot memory, which is never freed.
unsafe impl Sync for Region {}
// SAFETY: the same.
unsafe impl Send for Region {}

impl Region {
    /// # Safety
    ///
    /// `words` leads to zeroed words for every page from `start` to `end`, `blocks` to a zeroed byte for each pageblock
    /// that has a page among them; both stay for as long as the region.
    pub(crate) unsafe fn new(
        start: u32,
        end: u32,
        zone: u32,
        words: NonNull<AtomicWord>,
        blocks: NonNull<AtomicU8>,
    ) -> Region {
        Region {
            start,
            end,
            zone,
            untouched_start: AtomicU32::new(start),
            untouched_end: AtomicU32::new(end),
            in_use: AtomicU32::new(0),
            present: AtomicU32::new(1),
            words,
            blocks,
        }
    }

    /// Does the region hold this page?
    #[inline]
    pub(crate) fn contains(&self, pfn: Pfn) -> bool {
        pfn.0 >= self.start && pfn.0 < self.end
    }

    /// The word of a page of this region.
    #[inline]
    pub(crate) fn word(&self, pfn: Pfn) -> &AtomicWord {
        assert!(self.contains(pfn));
        // SAFETY: by the invariant there is a word for it.
        unsafe { self.words.add((pfn.0 - self.start) as usize).as_ref() }
    }

    /// The block that a page of this region belongs to; see [`MemMap::lookup`].
    #[inline]
    pub(crate) fn lookup(&self, pfn: Pfn) -> Option<Found> {
        let word = self.word(pfn).load();
        if !word.is_tail() {
            return Some(Found {
                head: pfn.align_down(word.order()),
                word,
            });
        }
        climb(pfn, |at| {
            if self.contains(at) {
                self.word(at).load()
            } else {
                Word::ZERO
            }
        })
    }

    fn publish_tails(&self, pfn: Pfn, word: Word) {
        for tail in 1..1 << word.order() {
            self.word(pfn.add(tail)).publish(word);
        }
    }

    /// Takes the tails' words of a handed-out block back to zero; its head is the caller's to write.
    pub(crate) fn clear_tails(&self, pfn: Pfn, order: usize) {
        if order <= TAIL_WORDS_ORDER {
            for tail in 1..1 << order {
                self.word(pfn.add(tail)).publish(Word::ZERO);
            }
        }
    }

    /// The blocks that there are words of, by address. What makes no sense is passed over.
    pub(crate) fn blocks(&self) -> impl Iterator<Item = (Pfn, Word)> + '_ {
        let mut at = self.start;
        core::iter::from_fn(move || {
            while at < self.end {
                let (start, end) = self.untouched();
                if at >= start && at < end {
                    at = end;
                    continue;
                }
                let pfn = Pfn(at);
                let word = self.word(pfn).load();
                let whole = word.order() <= MAX_ORDER && pfn.is_aligned(word.order());
                if word.is_tail() || !whole {
                    at += 1;
                    continue;
                }
                at = at.saturating_add(1 << word.order());
                return Some((pfn, word));
            }
            None
        })
    }

    /// Pageblocks of this region, whole or in part.
    pub(crate) fn pageblocks(start: u32, end: u32) -> usize {
        (((end - 1) >> PAGEBLOCK_ORDER) - (start >> PAGEBLOCK_ORDER) + 1) as usize
    }

    fn block_byte(&self, pfn: Pfn) -> &AtomicU8 {
        assert!(self.contains(pfn));
        let index = (pfn.0 >> PAGEBLOCK_ORDER) - (self.start >> PAGEBLOCK_ORDER);
        // SAFETY: by the invariant there is a byte for each pageblock the region touches.
        unsafe { self.blocks.add(index as usize).as_ref() }
    }

    /// The mobility of the pageblock that this page lies in. A zero byte is Movable, as at boot.
    #[inline]
    pub(crate) fn block_migratetype(&self, pfn: Pfn) -> MigrateType {
        match self.block_byte(pfn).load(Ordering::Relaxed) {
            0 => MigrateType::Movable,
            1 => MigrateType::Unmovable,
            2 => MigrateType::Reclaimable,
            _ => MigrateType::HighAtomic,
        }
    }

    /// Sets the mobility of the pageblock that this page lies in. Under the zone lock.
    pub(crate) fn set_block_migratetype(&self, pfn: Pfn, mt: MigrateType) {
        let byte = match mt {
            MigrateType::Movable => 0,
            MigrateType::Unmovable => 1,
            MigrateType::Reclaimable => 2,
            MigrateType::HighAtomic => 3,
        };
        self.block_byte(pfn).store(byte, Ordering::Relaxed);
    }

    /// The range never handed out yet.
    #[inline]
    pub(crate) fn untouched(&self) -> (u32, u32) {
        (
            self.untouched_start.load(Ordering::Relaxed),
            self.untouched_end.load(Ordering::Relaxed),
        )
    }
}

/// At most so many ranges of device memory.
pub(crate) const MAX_DEVICES: usize = 16;
/// Are links and words checked before they are followed; and what was found that could not be reported there, under a lock.
#[derive(Debug)]
pub(crate) struct Checks {
    on: bool,
    /// Something is checked or recorded when pages change hands: one look for both.
    watched: bool,
    /// A page and what is wrong with it, as [`Checks::note`] packs them; 0 for nothing. The first that nobody has reported yet.
    found: AtomicU64,
}

impl Checks {
    /// Always where debug assertions are on. `recorded`: who has which page is.
    pub(crate) fn new(on: bool, recorded: bool) -> Checks {
        let on = on || cfg!(any(debug_assertions, feature = "checked"));
        Checks {
            on,
            watched: on || recorded,
            found: AtomicU64::new(0),
        }
    }

    #[inline]
    pub(crate) fn on(&self) -> bool {
        self.on
    }

    #[inline]
    pub(crate) fn watched(&self) -> bool {
        self.watched
    }

    /// Something is wrong with this page. From any context.
    #[cold]
    pub(crate) fn note(&self, pfn: Pfn, what: Flaw) {
        let found = u64::from(pfn.0) << 8 | what as u64;
        let _ = self
            .found
            .compare_exchange(0, found, Ordering::Relaxed, Ordering::Relaxed);
    }

    /// Is there something to report?
    #[inline]
    pub(crate) fn pending(&self) -> bool {
        self.on && self.found.load(Ordering::Relaxed) != 0
    }

    /// Takes what is to be reported.
    pub(crate) fn take(&self) -> Option<(Pfn, Flaw)> {
        let found = self.found.swap(0, Ordering::Relaxed);
        let what = match found & 0xff {
            1 => Flaw::Word,
            2 => Flaw::Links,
            3 => Flaw::Counts,
            _ => return None,
        };
        Some((Pfn((found >> 8) as u32), what))
    }
}

/// What a check can find wrong.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub(crate) enum Flaw {
    /// The word says what cannot be.
    Word = 1,
    /// Links lead to what does not lead back.
    Links = 2,
    /// Counts do not agree with what they count.
    Counts = 3,
}

/// The memory map.
#[derive(Debug)]
pub(crate) struct MemMap {
    direct_map: *mut u8,
    sections: BootSlice<u16>,
    regions: BootSlice<Region>,
    /// Regions that are no RAM, in the order in which they came; never taken away, so that a word may be looked up without a lock.
    devices: [AtomicPtr<Region>; MAX_DEVICES],
    /// Pages that shall not come back.
    pub(crate) bad: BadPages,
    pub(crate) checks: Checks,
}

// SAFETY: the direct map's base is only a number to add to; what is reached through it has its own rules.
unsafe impl Sync for MemMap {}
// SAFETY: the same.
unsafe impl Send for MemMap {}

impl MemMap {
    /// A map over these regions, sorted by address; `sections[s]` is the first region that ends after section `s` starts.
    pub(crate) fn new(
        direct_map: *mut u8,
        sections: BootSlice<u16>,
        regions: BootSlice<Region>,
        checks: Checks,
    ) -> MemMap {
        MemMap {
            direct_map,
            sections,
            regions,
            devices: [const { AtomicPtr::new(core::ptr::null_mut()) }; MAX_DEVICES],
            bad: BadPages::new(),
            checks,
        }
    }

    /// The same map once more.
    pub(crate) fn again(&self) -> MemMap {
        MemMap::new(
            self.direct_map,
            self.sections.again(),
            self.regions.again(),
            Checks::new(false, false),
        )
    }

    /// A pointer to physical memory.
    #[inline]
    pub(crate) fn virt(&self, phys: PhysAddr) -> *mut u8 {
        phys_to_virt(self.direct_map, phys)
    }

    /// The physical address of a pointer into the direct map.
    #[inline]
    pub(crate) fn phys(&self, ptr: *const u8) -> PhysAddr {
        PhysAddr((ptr.addr() as u64).wrapping_sub(self.direct_map.addr() as u64))
    }

    /// All regions, by address.
    #[inline]
    pub(crate) fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// The region of a page; `None` for a hole.
    #[inline]
    pub(crate) fn region(&self, pfn: Pfn) -> Option<&Region> {
        let section = (pfn.0 >> SECTION_SHIFT) as usize;
        let mut index = *self.sections.get(section)? as usize;
        loop {
            let region = self.regions.get(index)?;
            if pfn.0 < region.end {
                return if pfn.0 >= region.start {
                    Some(region)
                } else {
                    None
                };
            }
            index += 1;
        }
    }

    /// Regions of device memory.
    pub(crate) fn devices(&self) -> impl Iterator<Item = &Region> {
        self.devices.iter().map_while(|slot| {
            // Acquire pairs with the Release in `add_device`.
            // SAFETY: null, or a region that stays for as long as the map.
            unsafe { slot.load(Ordering::Acquire).as_ref() }
        })
    }

    /// Adds a region of device memory; `false` if there is no room for it.
    ///
    /// # Safety
    ///
    /// The region stays where it is as long as the map is used. Nobody adds one at the same time, and it overlaps no other.
    pub(crate) unsafe fn add_device(&self, region: NonNull<Region>) -> bool {
        let free = |slot: &&AtomicPtr<Region>| slot.load(Ordering::Relaxed).is_null();
        match self.devices.iter().find(free) {
            Some(slot) => {
                slot.store(region.as_ptr(), Ordering::Release);
                true
            }
            None => false,
        }
    }

    /// The region of a page, of RAM or of a device.
    #[inline]
    pub(crate) fn any_region(&self, pfn: Pfn) -> Option<&Region> {
        match self.region(pfn) {
            Some(region) => Some(region),
            None => self.device(pfn),
        }
    }

    #[cold]
    pub(crate) fn device(&self, pfn: Pfn) -> Option<&Region> {
        self.devices().find(|region| region.contains(pfn))
    }

    /// The word of a page that is known to have one.
    #[inline]
    pub(crate) fn word(&self, pfn: Pfn) -> &AtomicWord {
        match self.any_region(pfn) {
            Some(region) => region.word(pfn),
            None => not_ram(pfn),
        }
    }

    /// The word of a page, as the one reads it who wrote it last or holds the lock; zero outside RAM, which a number from elsewhere may lead to.
    #[inline]
    pub(crate) fn owned_word(&self, pfn: Pfn) -> Word {
        match self.region(pfn) {
            Some(region) => region.word(pfn).load_owned(),
            None => Word::ZERO,
        }
    }

    /// The block that a page belongs to, and its word; `None` for a hole and for what was never handed out.
    ///
    /// Any page of an allocation leads to the same answer. Without a lock the answer may be stale when it comes
    /// back, unless the caller owns the page or holds a reference that keeps it.
    #[inline]
    pub(crate) fn lookup(&self, pfn: Pfn) -> Option<Found> {
        self.any_region(pfn)?.lookup(pfn)
    }

    /// Says of every page from `start` on, `pages` of them, what `word` says (its order is replaced): the range is cut
    /// into the largest aligned blocks, and their heads are written. For memory that is not in a free list.
    pub(crate) fn set(&self, start: Pfn, pages: u32, kind: PageType, facts: u64) {
        for (pfn, order) in blocks(start.0, start.0 + pages) {
            self.word(pfn).publish(Word::inline(kind, order, facts));
        }
    }

    /// Hands a block out: its word, and for small orders its tails' words too.
    #[inline]
    pub(crate) fn publish_block(&self, pfn: Pfn, word: Word) {
        let region = self.any_region(pfn).unwrap_or_else(|| not_ram(pfn));
        region.word(pfn).publish(word);
        let order = word.order();
        if order != 0 && order <= TAIL_WORDS_ORDER {
            region.publish_tails(pfn, word);
        }
    }
}

#[cold]
#[inline(never)]
fn not_ram(pfn: Pfn) -> ! {
    panic!("{pfn:?} is not RAM that the memory map knows")
}
