//! Blocks that are not just any: a certain one by number, or the smallest there is.

use super::alloc::{Descriptors, PageAllocator, REFILL_SPARE};
use super::buddy::{Block, LADDER};
use super::zone::LockedZone;
use crate::address::{MAX_ORDER, PAGEBLOCK_ORDER, Pfn};
use crate::desc::DescList;
use crate::error::AllocError;
use crate::gfp::Flags;
use crate::memmap::heads::blocks;
use crate::memmap::{DescClass, Found, PageType, Word};
use crate::page_alloc::{MigrateType, ZoneType};
use crate::platform::Platform;
use crate::stats::Event;

/// A block taken without any descriptor at hand, for a slab of descriptors.
#[derive(Debug)]
pub(crate) struct Smallest {
    pub(crate) pfn: Pfn,
    /// Pages, a power of two unless they come from untouched memory.
    pub(crate) pages: u32,
    pub(crate) order: usize,
    /// The block's own descriptor; none for untouched memory.
    pub(crate) word: Option<Word>,
}

impl<P: Platform> PageAllocator<P> {
    /// Takes a certain block out of free memory (`alloc_contig_range` of one block, `take_page_off_buddy`).
    ///
    /// [`AllocError::Busy`] if it is not free as a whole, or in a per-CPU list: drain first.
    #[track_caller]
    pub(crate) fn alloc_block_at(
        &self,
        pfn: Pfn,
        order: usize,
        descs: &impl Descriptors,
    ) -> Result<Block, AllocError> {
        if order > MAX_ORDER || !pfn.is_aligned(order) {
            return Err(AllocError::BadOrder);
        }
        let last = pfn
            .0
            .checked_add((1 << order) - 1)
            .ok_or(AllocError::NoZone)?;
        let region = self.map.region(pfn).filter(|r| r.contains(Pfn(last)));
        let region = region.ok_or(AllocError::NoZone)?;
        loop {
            let untouched = {
                let (start, end) = region.untouched();
                pfn.0 >= start && last < end
            };
            let mut spare = descs.get(if untouched {
                LADDER + REFILL_SPARE
            } else {
                LADDER
            })?;
            let mut zone = self.lock(region.zone as usize);
            while spare.len() > MAX_ORDER && {
                let (start, end) = region.untouched();
                pfn.0 >= start && last < end
            } {
                zone.carve_from(region, &mut spare);
            }
            let (start, end) = region.untouched();
            let result = if pfn.0 >= start && last < end {
                None
            } else {
                let fits =
                    |f: &Found| f.word.is_free_in_zone(f.word.order()) && f.word.order() >= order;
                Some(match region.lookup(pfn).filter(fits) {
                    Some(Found { head, word }) => {
                        zone.unlink(head, word);
                        Ok(zone.expand_at(Block { pfn: head, word }, pfn, order, &mut spare))
                    }
                    None => Err(AllocError::Busy),
                })
            };
            drop(zone);
            if !spare.is_empty() {
                descs.put(spare);
            }
            if let Some(result) = result {
                if let Ok(block) = result {
                    let kind = PageType::Bare;
                    self.prep_alloc(kind, block.pfn, order, block.word, Flags::EMPTY);
                    let pin = self.pin();
                    self.stats(&pin).add(&pin, Event::AllocAt, 1);
                    self.stats(&pin).block_out(&pin, kind, order);
                }
                return result;
            }
        }
    }

    /// An order-0 block that can be had without a descriptor for a split: from this CPU's lists, unmovable first.
    pub(crate) fn pop_page(&self) -> Option<Block> {
        let pin = self.pin();
        let node = self.node_of(&pin);
        for mt in [MigrateType::Unmovable, MigrateType::Reclaimable] {
            for index in self.zonelists[node][ZoneType::Normal as usize].iter() {
                if let Some(block) = self.pcp(&pin, index).pop(&pin, &self.map, 0, mt) {
                    self.prep_alloc(PageType::Slab, block.pfn, 0, block.word, Flags::EMPTY);
                    return Some(block);
                }
            }
        }
        None
    }

    /// The smallest block to be had, whoever it was meant for: for a slab of descriptors when there are no descriptors
    /// (seed 000's new interface to the page allocator). Watermarks do not count: this is what freeing lives on.
    pub(crate) fn take_smallest(&self) -> Result<Smallest, AllocError> {
        let node = self.node_of(&self.pin());
        // Kernel zones first, movable memory only when nothing else is left.
        for highest in [ZoneType::Normal, ZoneType::Movable] {
            for attempt in 0..2 {
                for index in self.zonelists[node][highest as usize].iter() {
                    let mut zone = self.lock(index);
                    if let Some(found) = take_smallest_in(&mut zone, attempt) {
                        drop(zone);
                        let word = found.word.unwrap_or(Word::ZERO);
                        let (kind, gfp) = (PageType::Slab, Flags::EMPTY);
                        self.prep_alloc(kind, found.pfn, found.order, word, gfp);
                        return Ok(found);
                    }
                }
            }
        }
        Err(AllocError::NoBlock)
    }

    /// Gives back what was not needed of a [`Smallest`]: all but its first `kept` pages. `spare` has a descriptor for each
    /// block of the rest.
    pub(crate) fn return_rest(&self, taken: &Smallest, kept: u32, spare: &mut DescList) {
        let (start, end) = (taken.pfn.0 + kept, taken.pfn.0 + taken.pages);
        if start >= end {
            return;
        }
        // Outside the lock; what they are to be when free is kept meanwhile. 2^n pages less one or two are at most n blocks.
        let mut words = [Word::ZERO; MAX_ORDER];
        for ((pfn, order), kept) in blocks(start, end).zip(&mut words) {
            let Some(desc) = spare.pop(&self.map) else {
                unreachable!("{} pages need more descriptors", end - start)
            };
            let word = Word::described(PageType::Free, order, desc, DescClass::Buddy);
            *kept = self.prep_free(pfn, word);
        }
        let Some(region) = self.map.region(taken.pfn) else {
            unreachable!()
        };
        let mut zone = self.lock(region.zone as usize);
        debug_assert!(blocks(start, end).count() <= MAX_ORDER);
        for ((pfn, order), word) in blocks(start, end).zip(words) {
            zone.link(pfn, order, region.block_migratetype(pfn), word, false);
        }
    }
}

/// The first attempt keeps mobilities apart: unmovable blocks, untouched memory, a whole movable pageblock. The second
/// takes anything.
fn take_smallest_in(zone: &mut LockedZone<'_>, attempt: usize) -> Option<Smallest> {
    let of = |block: Block| Smallest {
        pfn: block.pfn,
        pages: 1 << block.word.order(),
        order: block.word.order(),
        word: Some(block.word),
    };
    if attempt == 0 {
        let own = (0..=MAX_ORDER).find_map(|order| zone.pop(order, MigrateType::Unmovable));
        if let Some(block) = own {
            return Some(of(zone.detach(block.pfn, block.word)));
        }
        for pages in [2, 1] {
            if let Some(pfn) = zone.carve_bare(pages) {
                return Some(Smallest {
                    pfn,
                    pages,
                    order: pages as usize - 1,
                    word: None,
                });
            }
        }
        for order in PAGEBLOCK_ORDER..=MAX_ORDER {
            for mt in [MigrateType::Reclaimable, MigrateType::Movable] {
                if let Some(block) = zone.pop(order, mt) {
                    zone.retype_pageblocks(block, MigrateType::Unmovable);
                    return Some(of(zone.detach(block.pfn, block.word)));
                }
            }
        }
        return None;
    }
    (0..=MAX_ORDER)
        .flat_map(|order| MigrateType::ALL.map(|mt| (order, mt)))
        .find_map(|(order, mt)| zone.pop(order, mt))
        .map(|block| of(zone.detach(block.pfn, block.word)))
}
