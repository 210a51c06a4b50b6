//! Device memory: pages that are described and mapped, and not owned (`ZONE_DEVICE`).
//!
//! A driver brings a range of addresses that is no RAM ([`Mm::memremap_pages`]): it gets a word a page, and nothing else. A page gets a descriptor,
//! a folio's, when the device gives it a purpose ([`DevicePages::folio`]), and from then on users map it, walkers find it and devices pin it as they do any
//! other. Who lets go last gives it back to the device ([`Platform::device_page_free`]), never to the page allocator, and its descriptor to its cache.
//!
//! The words stay when a range goes: a reader without a lock may be looking at them. The same range finds them again.
//!
//! Lock order: the table of ranges is under `slab_mutex`, the outermost; nothing is allocated with it held.
//!
//! Source: `memremap_pages`, `zone_device_page_init`, `free_zone_device_folio` of Linux.

use core::fmt;
use core::panic::Location;

use crate::address::Pfn;
use crate::config::MemRange;
use crate::desc::Held;
use crate::error::AllocError;
use crate::gfp::{self, Flags};
use crate::memmap::heads::blocks;
use crate::memmap::{DescClass, PageType, Region, Word};
use crate::mm::{BuiltIn, Mm};
use crate::platform::Platform;
use crate::report::{Corruption, Report};
use crate::sync::atomic::{AtomicU8, AtomicU64, Ordering};

/// Why a range of device memory was not taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DeviceError {
    /// It is empty, or reaches beyond the last page frame number.
    BadRange,
    /// This page is RAM, or of another device, or was of one that had another range.
    Overlap(Pfn),
    /// The platform's direct map does not reach it.
    NotMapped,
    /// There are as many ranges as there can be: 16, those of devices that are gone counted, since their words stay.
    TooMany,
    /// No memory for the words.
    Alloc(AllocError),
}

impl fmt::Display for DeviceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DeviceError::BadRange => f.write_str("the range is empty, or ends beyond 16 TiB"),
            DeviceError::Overlap(pfn) => write!(f, "{pfn:?} is RAM, or of another device"),
            DeviceError::NotMapped => {
                f.write_str("the platform's direct map does not reach the range")
            }
            DeviceError::TooMany => f.write_str("there are as many ranges as there can be"),
            DeviceError::Alloc(why) => write!(f, "no memory for the words of the range: {why}"),
        }
    }
}

impl core::error::Error for DeviceError {}

/// Device memory that was brought in.
///
/// # Invariants
///
/// There is one for each range; the region stays.
pub struct DevicePages<'m, P: Platform> {
    mm: &'m Mm<P>,
    region: &'m Region,
}

impl<P: Platform> fmt::Debug for DevicePages<'_, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DevicePages")
            .field("start", &self.start())
            .field("pages", &self.pages())
            .field("in_use", &self.in_use())
            .finish()
    }
}

/// What device memory costs.
#[derive(Debug)]
pub(crate) struct DeviceCost {
    /// Bytes of slab objects, pages of large kmalloc, pages of vmalloc: as the ledger counts them.
    pub(crate) words: [AtomicU64; 3],
}

impl DeviceCost {
    pub(crate) fn new() -> DeviceCost {
        DeviceCost {
            words: [const { AtomicU64::new(0) }; 3],
        }
    }
}

impl<P: Platform> Mm<P> {
    /// Brings in device memory: from here on its pages have words, all of them zero, which says that nothing has been made of them yet (`memremap_pages`).
    ///
    /// # Context
    ///
    /// May sleep.
    ///
    /// # Errors
    ///
    /// See [`DeviceError`]; nothing has changed then.
    pub fn memremap_pages(
        &self,
        start: Pfn,
        pages: u32,
    ) -> Result<DevicePages<'_, P>, DeviceError> {
        let end = start.0.checked_add(pages).filter(|_| pages > 0);
        let end = end.ok_or(DeviceError::BadRange)?;
        let range = MemRange {
            start: start.phys(),
            end: Pfn(end).phys(),
            node: 0,
        };
        if !self.pages.platform.maps(&range) {
            return Err(DeviceError::NotMapped);
        }
        if let Some(back) = self.device_again(start, end)? {
            return Ok(back);
        }
        // The region, the words, the bytes of pageblocks, in one piece.
        let words = size_of::<Region>().next_multiple_of(64);
        let marks = words + pages as usize * size_of::<Word>();
        let bytes = marks + Region::pageblocks(start.0, end);
        let memory = self
            .kvmalloc(bytes, gfp::GFP_KERNEL | gfp::__GFP_ZERO)
            .map_err(DeviceError::Alloc)?;
        let base = memory.cast::<Region>();
        // SAFETY: `bytes` is the sum of the three; zeroed, aligned to 64 by its size, ours and never freed once the region is listed.
        unsafe {
            let words = memory.add(words).cast();
            let marks = memory.add(marks).cast::<AtomicU8>();
            base.write(Region::new(start.0, end, u32::MAX, words, marks));
            // Nothing of it is for the allocator.
            base.as_ref()
                .untouched_end
                .store(start.0, Ordering::Relaxed);
        }
        let result = {
            let _lock = self.slab_mutex();
            self.device_overlap(start, end).and_then(|()| {
                // SAFETY: the region stays, unless this fails; one at a time under the lock, and no other has these pages.
                let listed = unsafe { self.pages.map.add_device(base) };
                listed.then_some(()).ok_or(DeviceError::TooMany)
            })
        };
        if let Err(why) = result {
            // SAFETY: nobody has seen it.
            unsafe { self.kvfree(memory) };
            return Err(why);
        }
        let (which, n) = self.kvmalloc_cost(memory, bytes);
        self.device_cost.words[which].fetch_add(n, Ordering::Relaxed);
        Ok(DevicePages {
            mm: self,
            // SAFETY: just written, and stays.
            region: unsafe { base.as_ref() },
        })
    }

    /// A range that was here before.
    fn device_again(
        &self,
        start: Pfn,
        end: u32,
    ) -> Result<Option<DevicePages<'_, P>>, DeviceError> {
        let Some(region) = self.pages.map.device(start) else {
            return Ok(None);
        };
        let same = (region.start, region.end) == (start.0, end);
        let free = || {
            region
                .present
                .compare_exchange(0, 1, Ordering::AcqRel, Ordering::Relaxed)
                .is_ok()
        };
        if same && free() {
            return Ok(Some(DevicePages { mm: self, region }));
        }
        Err(DeviceError::Overlap(start))
    }

    fn device_overlap(&self, start: Pfn, end: u32) -> Result<(), DeviceError> {
        let map = &self.pages.map;
        let all = map.regions().iter().chain(map.devices());
        let mut overlapping = all.filter(|region| region.start < end && start.0 < region.end);
        match overlapping.next() {
            Some(region) => Err(DeviceError::Overlap(Pfn(region.start.max(start.0)))),
            None => Ok(()),
        }
    }

    /// Nobody has these pages any more: their descriptor goes back to its cache, and they to the device. From any context.
    pub(crate) fn device_return(&self, head: Pfn, word: Word) {
        let Some(region) = self.pages.map.device(head) else {
            unreachable!("{head:?} is device memory")
        };
        // The words of its tails are zero: nobody maps it.
        debug_assert!(self.tails_are_unmapped(head, word.order()));
        region.word(head).publish(Word::ZERO);
        self.try_put_desc(word);
        self.pages.platform.device_page_free(head, word.order());
        // Last: who takes the range away finds nothing of it in use.
        region
            .in_use
            .fetch_sub(1 << word.order(), Ordering::Release);
    }

    /// Pages of device memory that have a descriptor.
    pub fn device_pages_in_use(&self) -> u64 {
        let all = self.pages.map.devices();
        all.map(|d| u64::from(d.in_use.load(Ordering::Relaxed)))
            .sum()
    }
}

impl<'m, P: Platform> DevicePages<'m, P> {
    /// The first page.
    pub fn start(&self) -> Pfn {
        Pfn(self.region.start)
    }

    /// How many there are.
    pub fn pages(&self) -> u32 {
        self.region.end - self.region.start
    }

    /// Pages that have a descriptor.
    pub fn in_use(&self) -> u32 {
        self.region.in_use.load(Ordering::Acquire)
    }

    /// The device gives these pages a purpose: a folio with one reference, which [`put`](Self::put) lets go, and who has it last gives the pages back
    /// (`zone_device_page_init`).
    ///
    /// # Context
    ///
    /// As an allocation with these flags. Not before the device was told that the pages are its own again ([`Platform::device_page_free`]): it decides
    /// what its memory is for.
    ///
    /// # Errors
    ///
    /// [`AllocError::BadOrder`] for pages that are not of this range, or not aligned to their number; [`AllocError::Busy`] if one has a purpose already; no
    /// memory for the descriptor.
    #[track_caller]
    pub fn folio(&mut self, pfn: Pfn, order: usize, gfp: Flags) -> Result<(), AllocError> {
        let (mm, region) = (self.mm, self.region);
        let within = order <= crate::address::MAX_ORDER && pfn.is_aligned(order) && {
            let last = pfn.0.checked_add((1 << order) - 1);
            region.contains(pfn) && last.is_some_and(|last| region.contains(Pfn(last)))
        };
        if !within {
            return Err(AllocError::BadOrder);
        }
        // A larger one that covers them, or one among them.
        let covered = mm.pages.map.lookup(pfn).is_some();
        if covered || (0..1 << order).any(|n| region.word(pfn.add(n)).load() != Word::ZERO) {
            return Err(AllocError::Busy);
        }
        let (cache, caller) = (mm.built_in(BuiltIn::File), Location::caller());
        // Not zeroed: stale readers look at its counts, which are zero while it is free.
        let desc = mm.cache_alloc(cache, gfp & !gfp::__GFP_ZERO, caller)?;
        let at = mm.pages.phys(desc.as_ptr());
        self.region.in_use.fetch_add(1 << order, Ordering::Relaxed);
        mm.folio_at(at).init(pfn);
        let word = Word::described(PageType::Device, order, at, DescClass::File);
        region.word(pfn).publish(word);
        Ok(())
    }

    /// The device lets go of pages that it made a folio of (`put_page`).
    ///
    /// # Safety
    ///
    /// `pfn` is the first page of a folio of this range, whose reference from [`folio`](Self::folio) is the caller's to give up.
    ///
    /// # Context
    ///
    /// Any.
    #[track_caller]
    pub unsafe fn put(&self, pfn: Pfn) {
        let (mm, caller) = (self.mm, Location::caller());
        let word = match self.region.contains(pfn) {
            true => self.region.word(pfn).load(),
            false => Word::ZERO,
        };
        if word.kind() != PageType::Device {
            return mm.report_page(pfn, word, caller);
        }
        let folio = mm.folio_at(word.desc());
        if folio.held().refs == 0 {
            // Users have it, or a device: the reference was put before.
            let report = mm.report_at(Corruption::DoubleFree, pfn, pfn.phys().0 as usize, caller);
            return mm.pages.platform.corruption(&Report { word, ..report });
        }
        mm.folio_put(folio, pfn, Held::REF);
    }

    /// The device goes (`memunmap_pages`).
    ///
    /// # Errors
    ///
    /// Itself, if pages of it are in use: who has them, has them.
    pub fn unplug(self) -> Result<(), Self> {
        if self.in_use() != 0 {
            return Err(self);
        }
        self.region.present.store(0, Ordering::Release);
        Ok(())
    }

    /// Visits what has been made of the range: head and order.
    pub fn for_each(&self, mut visit: impl FnMut(Pfn, usize)) {
        let region = self.region;
        let mut at = region.start;
        while at < region.end {
            let word = region.word(Pfn(at)).load();
            if word.kind() == PageType::Device {
                visit(Pfn(at), word.order());
                at += 1 << word.order();
            } else {
                at += 1;
            }
        }
    }

    /// The range as the blocks that it can be cut into, largest first by place.
    pub fn blocks(&self) -> impl Iterator<Item = (Pfn, usize)> {
        blocks(self.region.start, self.region.end)
    }

    /// The memory manager.
    pub fn mm(&self) -> &'m Mm<P> {
        self.mm
    }
}

/// So that the words behind it are aligned.
const _: () = assert!(align_of::<Region>() <= 8);
