//! When the own lists are empty: taking from another mobility, a whole pageblock if it can be (`__rmqueue`).
//!
//! Mobility is kept apart a pageblock at a time. So the *largest* foreign block is taken first, and with it the
//! pageblock, if at least half of it is free or of a compatible kind; only when nothing can be claimed is
//! a single block stolen, the smallest.

use super::buddy::Block;
use super::zone::LockedZone;
use crate::address::{MAX_ORDER, PAGEBLOCK_ORDER, PAGEBLOCK_PAGES, Pfn};
use crate::desc::DescList;
use crate::memmap::PageType;
use crate::page_alloc::MigrateType;
use crate::sync::atomic::Ordering;

/// What [`LockedZone::rmqueue`] came back with.
#[derive(Debug)]
#[must_use]
pub(crate) enum Removed {
    /// A block of the wanted order.
    Block(Block),
    /// Untouched memory was made into a block that is still too small, or not yet claimed: ask again with a full ladder.
    Again,
    /// The zone has nothing of this order.
    Nothing,
}

/// How a request may search.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Search {
    /// Try the blocks kept for atomic allocations first.
    pub(crate) highatomic: bool,
    /// Do not mix mobilities within a pageblock (`ALLOC_NOFRAGMENT`).
    pub(crate) no_fragment: bool,
}

impl LockedZone<'_> {
    /// Takes a block of `order` for `mt` (`__rmqueue`). Needs a full ladder of spare descriptors.
    pub(crate) fn rmqueue(
        &mut self,
        order: usize,
        mt: MigrateType,
        search: Search,
        spare: &mut DescList,
    ) -> Removed {
        if search.highatomic
            && let Some(block) = self.rmqueue_smallest(order, MigrateType::HighAtomic, spare)
        {
            return Removed::Block(block);
        }
        if let Some(block) = self.rmqueue_smallest(order, mt, spare) {
            return Removed::Block(block);
        }
        // Untouched memory counts as free movable blocks of the largest order: it comes before any mixing.
        if self.may_carve(order, mt) && self.carve(spare) {
            return match self.rmqueue_smallest(order, mt, spare) {
                Some(block) => Removed::Block(block),
                None => Removed::Again,
            };
        }
        if let Some(block) = self.claim(order, mt, search, spare) {
            return Removed::Block(block);
        }
        if !search.no_fragment
            && let Some(block) = self.steal(order, mt, spare)
        {
            return Removed::Block(block);
        }
        Removed::Nothing
    }

    /// Movable requests are served from untouched memory directly; others claim a movable pageblock, so one is made if
    /// there is none.
    fn may_carve(&self, order: usize, mt: MigrateType) -> bool {
        if self.lists.nr_untouched == 0 {
            return false;
        }
        let from = if mt == MigrateType::Movable {
            order
        } else {
            order.max(PAGEBLOCK_ORDER)
        };
        let has = |o: usize| self.lists.lists[o][MigrateType::Movable as usize].nr > 0;
        !(from..=MAX_ORDER).any(has)
    }

    /// Takes a foreign block together with its pageblock, the largest first (`__rmqueue_claim`).
    fn claim(
        &mut self,
        order: usize,
        mt: MigrateType,
        search: Search,
        spare: &mut DescList,
    ) -> Option<Block> {
        let smallest = if search.no_fragment {
            order.max(PAGEBLOCK_ORDER)
        } else {
            order
        };
        for current in (smallest..=MAX_ORDER).rev() {
            for &other in mt.fallbacks() {
                if self.lists.lists[current][other as usize].nr == 0 {
                    continue;
                }
                if !worth_claiming(current, mt) {
                    return None;
                }
                if let Some(block) = self.try_claim(current, order, other, mt, spare) {
                    self.lists.events.claims += 1;
                    return Some(block);
                }
            }
        }
        None
    }

    /// Claims the pageblock of the first block in a foreign list, if it is worth it (`try_to_claim_block`).
    fn try_claim(
        &mut self,
        current: usize,
        order: usize,
        other: MigrateType,
        mt: MigrateType,
        spare: &mut DescList,
    ) -> Option<Block> {
        if current >= PAGEBLOCK_ORDER {
            let block = self.pop(current, other)?;
            self.retype_pageblocks(block, mt);
            return Some(self.expand(block, order, mt, spare));
        }
        self.boost();
        let pfn = self.lists.lists[current][other as usize].ends.head;
        let (free, movable) = self.survey(pfn);
        let alike = match (mt, other) {
            (MigrateType::Movable, _) => movable,
            // What is neither free nor movable in a movable pageblock was put there by the likes of us.
            (_, MigrateType::Movable) => PAGEBLOCK_PAGES.saturating_sub(free + movable),
            // Between unmovable and reclaimable nobody can tell.
            _ => 0,
        };
        if free + alike < PAGEBLOCK_PAGES / 2 {
            return None;
        }
        self.set_pageblock(pfn, mt);
        self.rmqueue_smallest(order, mt, spare)
    }

    /// Takes a single foreign block, the smallest, and leaves its pageblock what it is (`__rmqueue_steal`).
    fn steal(&mut self, order: usize, mt: MigrateType, spare: &mut DescList) -> Option<Block> {
        for current in order..=MAX_ORDER {
            for &other in mt.fallbacks() {
                if let Some(block) = self.pop(current, other) {
                    self.lists.events.steals += 1;
                    return Some(self.expand(block, order, other, spare));
                }
            }
        }
        None
    }

    /// Free and movable pages in the pageblock around `pfn`.
    fn survey(&self, pfn: Pfn) -> (u32, u32) {
        let (mut free, mut movable) = (0, 0);
        self.for_blocks_in_pageblock(pfn, |_, kind, pages| match kind {
            PageType::Free => free += pages,
            kind if kind.is_movable() => movable += pages,
            _ => {}
        });
        (free, movable)
    }

    /// Gives every pageblock of a large block that is in no list another mobility.
    pub(crate) fn retype_pageblocks(&self, block: Block, mt: MigrateType) {
        let region = self.region(block.pfn);
        for pageblock in 0..1 << (block.word.order() - PAGEBLOCK_ORDER) {
            region.set_block_migratetype(block.pfn.add(pageblock * PAGEBLOCK_PAGES), mt);
        }
    }

    /// Gives a pageblock another mobility and moves its free blocks into those lists (`move_freepages_block`).
    pub(crate) fn set_pageblock(&mut self, pfn: Pfn, mt: MigrateType) {
        let region = self.map.region(pfn);
        let Some(region) = region else { return };
        region.set_block_migratetype(pfn, mt);
        let start = pfn.align_down(PAGEBLOCK_ORDER).0.max(region.start);
        let end = (pfn.align_down(PAGEBLOCK_ORDER).0 + PAGEBLOCK_PAGES).min(region.end);
        let mut at = start;
        while at < end {
            let word = region.word(Pfn(at)).load_owned();
            let order = word.order();
            if word.is_free_in_zone(order) && order < PAGEBLOCK_ORDER {
                self.unlink(Pfn(at), word);
                self.link(Pfn(at), order, mt, word, false);
            }
            at += if word.is_tail() {
                1
            } else {
                (1 << order) - (at & ((1 << order) - 1))
            };
        }
    }

    /// Visits every block that has pages in the pageblock around `pfn`, with how many it has there.
    pub(crate) fn for_blocks_in_pageblock(
        &self,
        pfn: Pfn,
        mut visit: impl FnMut(Pfn, PageType, u32),
    ) {
        let region = self.region(pfn);
        let first = pfn.align_down(PAGEBLOCK_ORDER).0;
        let start = first.max(region.start);
        let end = (first + PAGEBLOCK_PAGES).min(region.end);
        let mut at = start;
        while at < end {
            let mut word = region.word(Pfn(at)).load_owned();
            // The pageblock may be the second half of a larger block.
            if word.is_tail()
                && at == start
                && let Some(found) = region.lookup(Pfn(at))
            {
                word = found.word;
            }
            // A zero word here is untouched memory, and so is all after it.
            let pages = if word.is_tail() {
                end - at
            } else {
                let size = 1u32 << word.order();
                (size - (at & (size - 1))).min(end - at)
            };
            let kind = if word.is_tail() {
                PageType::Free
            } else {
                word.kind()
            };
            visit(Pfn(at), kind, pages);
            at += pages;
        }
    }

    /// Raises the watermarks for a while: a pageblock was polluted, so reclaim early (`boost_watermark`).
    fn boost(&mut self) {
        let marks = &self.zone.marks;
        let max_boost = marks.high + marks.high / 2;
        // A small zone would be boosted to its whole size.
        if u64::from(PAGEBLOCK_PAGES) * 4 > self.zone.managed || marks.high == 0 {
            return;
        }
        let boost = marks.boost.load(Ordering::Relaxed) + u64::from(PAGEBLOCK_PAGES);
        marks.boost.store(
            boost.min(max_boost.max(u64::from(PAGEBLOCK_PAGES))),
            Ordering::Relaxed,
        );
    }

    /// Keeps the pageblock of a fresh atomic high-order allocation for more of its kind (`reserve_highatomic_pageblock`):
    /// at most about 1 % of the zone.
    pub(crate) fn reserve_highatomic(&mut self, pfn: Pfn) {
        let pageblock = u64::from(PAGEBLOCK_PAGES);
        if self.zone.managed / 100 < pageblock {
            return;
        }
        let limit = (self.zone.managed / 100).next_multiple_of(pageblock);
        let mt = self.region(pfn).block_migratetype(pfn);
        if self.lists.nr_highatomic + pageblock > limit || mt == MigrateType::HighAtomic {
            return;
        }
        self.set_pageblock(pfn, MigrateType::HighAtomic);
        self.lists.nr_highatomic += pageblock;
    }

    /// Gives one reserved pageblock back to `mt` (`unreserve_highatomic_pageblock`). Says whether there was one.
    pub(crate) fn unreserve_highatomic(&mut self, mt: MigrateType) -> bool {
        for order in 0..=MAX_ORDER {
            let head = self.lists.lists[order][MigrateType::HighAtomic as usize]
                .ends
                .head;
            if head == Pfn::NONE {
                continue;
            }
            if order >= PAGEBLOCK_ORDER {
                let Some(block) = self.pop(order, MigrateType::HighAtomic) else {
                    continue;
                };
                self.retype_pageblocks(block, mt);
                self.link(block.pfn, order, mt, block.word, false);
            } else {
                self.set_pageblock(head, mt);
            }
            let freed = u64::from(PAGEBLOCK_PAGES).max(1 << order);
            self.lists.nr_highatomic = self.lists.nr_highatomic.saturating_sub(freed);
            return true;
        }
        false
    }
}

/// Is a foreign block of this order worth asking for its pageblock (`should_try_claim_block`)?
fn worth_claiming(current: usize, mt: MigrateType) -> bool {
    current >= PAGEBLOCK_ORDER / 2
        || matches!(mt, MigrateType::Unmovable | MigrateType::Reclaimable)
}
