//! Memory that is in use when it is taken over: it is kept out of everything, named by its words, and given back when it is used no more.
//!
//! Blocks of it are as large as their place lets them be, and need no descriptors. A piece of the memory map starts where something reserved does, so what is reserved is always
//! the first of a piece, and behind it comes what was never handed out: taking over writes a few words for each, whatever its size.
//!
//! Source: `memblock_reserve`, `free_reserved_area` and `free_initmem` of Linux.

use crate::address::{MAX_PFN, PAGE_SHIFT, PAGE_SIZE, Pfn, PhysAddr};
use crate::boot::frames;
use crate::config::MemRange;
use crate::error::{AllocError, InitError};
use crate::inline::{Facts, Reserved};
use crate::mm::Mm;
use crate::page_alloc::alloc::Descriptors;
use crate::platform::Platform;
use crate::sync::atomic::Ordering;

/// Memory of the ranges that is in use when it is taken over (`memblock_reserve`): the kernel's own, what the firmware and the loader left.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ReservedRange {
    /// The first byte. Rounded down to a page.
    pub start: PhysAddr,
    /// One past the last byte. Rounded up to a page.
    pub end: PhysAddr,
    /// What it is.
    pub what: Reserved,
}

impl ReservedRange {
    /// Page frames that any of it lies in.
    pub(crate) fn frames(&self) -> (u32, u32) {
        let end = self.end.0.div_ceil(PAGE_SIZE as u64);
        let limit = |frame: u64| frame.min(u64::from(MAX_PFN)) as u32;
        (limit(self.start.0 >> PAGE_SHIFT), limit(end))
    }
}

/// Where the next reserved range starts after this.
pub(crate) fn next_reserved(reserved: &[ReservedRange], after: u32) -> u32 {
    let starts = reserved.iter().map(|r| r.frames().0);
    starts.filter(|&s| s > after).min().unwrap_or(MAX_PFN)
}

/// Where the reserved range ends that this is in; here, if it is in none.
pub(crate) fn reserved_until(reserved: &[ReservedRange], at: u32) -> u32 {
    let mut frames = reserved.iter().map(ReservedRange::frames);
    frames.find(|&(s, e)| s <= at && at < e).map_or(at, |r| r.1)
}

/// What is wrong with what is said to be reserved in these ranges.
pub(crate) fn check_reserved(
    reserved: &[ReservedRange],
    ranges: &[MemRange],
) -> Result<(), InitError> {
    for (i, range) in reserved.iter().enumerate() {
        let (start, end) = range.frames();
        let bad = InitError::BadReserved(range.start);
        if start >= end {
            return Err(bad);
        }
        let mut at = start;
        while at < end {
            let home = ranges.iter().map(frames).find(|&(s, e)| s <= at && at < e);
            at = home.ok_or(bad)?.1;
        }
        for other in &reserved[..i] {
            let (s, e) = other.frames();
            if start < e && s < end {
                return Err(InitError::Overlap(range.start.max(other.start)));
            }
        }
    }
    Ok(())
}

impl<P: Platform> Mm<P> {
    /// Gives memory back that was [in use when it was taken over](crate::Config::reserved), all of one such range or a part (`free_reserved_area`): free from here on.
    /// Says how many pages; the page of address 0 stays what it is.
    ///
    /// # Safety
    ///
    /// Nobody uses the memory any more, nor gives any of it back at the same time.
    ///
    /// # Context
    ///
    /// As [`alloc_pages`](Self::alloc_pages) with `GFP_KERNEL`.
    ///
    /// # Errors
    ///
    /// [`AllocError::Busy`] if it is not reserved, or not any more, or if the blocks that it is in reach out of it: they are as large as their range and its alignment
    /// let them be. No memory for descriptors. Nothing has changed then.
    ///
    /// # Examples
    ///
    /// ```
    /// use memdesc::{Config, Memory, Mm, Pfn, Reserved, ReservedRange};
    /// use memdesc_host::Host;
    ///
    /// const INIT: ReservedRange = ReservedRange {
    ///     start: Pfn(256).phys(),
    ///     end: Pfn(300).phys(),
    ///     what: Reserved::KernelData,
    /// };
    /// let (host, ram) = Host::small(16384)?;
    /// let config = Config { reserved: &[INIT], ..Config::default() };
    /// let mm = Mm::new(host, &config, &ram)?;
    /// assert!(matches!(mm.lookup(Pfn(270)).2, Memory::Reserved(Reserved::KernelData)));
    /// // SAFETY: there was nothing in it.
    /// assert_eq!(unsafe { mm.free_reserved(Pfn(256), 44)? }, 44);
    /// assert!(mm.ledger().balanced);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub unsafe fn free_reserved(&self, start: Pfn, pages: u32) -> Result<u32, AllocError> {
        let end = start.0.checked_add(pages).ok_or(AllocError::Busy)?;
        let home = self.boot.reserved.iter().map(ReservedRange::frames);
        if pages == 0 || !{ home }.any(|(s, e)| s <= start.0 && end <= e) {
            return Err(AllocError::Busy);
        }
        let start = start.0.max(1);
        // The block here, if it is reserved and ends by the end.
        let block = |at: u32| {
            let found = self.pages.map.lookup(Pfn(at))?;
            let is_whole = found.head == Pfn(at) && at + (1 << found.word.order()) <= end;
            let reserved = matches!(found.word.inline_facts(), Some(Facts::Reserved(_)));
            (is_whole && reserved).then_some(found.word.order())
        };
        let (mut at, mut n) = (start, 0);
        while at < end {
            at += 1 << block(at).ok_or(AllocError::Busy)?;
            n += 1;
        }
        let mut spare = self.get(n)?;
        let mut at = start;
        while at < end {
            let (Some(order), Some(desc)) = (block(at), spare.pop(&self.pages.map)) else {
                unreachable!("all were looked at, and there are as many as there are blocks")
            };
            let pfn = Pfn(at);
            let zone = self
                .pages
                .map
                .region(pfn)
                .map(|region| region.zone as usize);
            if let Some(zone) = zone {
                let given_back = &self.pages.zones[zone].given_back;
                given_back.fetch_add(1 << order, Ordering::Relaxed);
            }
            self.pages.platform.pages_allocated(pfn, order);
            self.inline_to_bare(pfn, desc);
            // SAFETY: bare pages that nobody uses, by the caller's promise.
            unsafe { self.free_pages(pfn) };
            at += 1 << order;
        }
        self.put(spare);
        Ok(end - start)
    }
}
