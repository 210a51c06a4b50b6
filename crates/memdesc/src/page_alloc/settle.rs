//! Settling: free blocks that still lie on a folio's or a slab's descriptor get a `struct buddy` of their own.
//!
//! Morphing makes a free block keep what its last owner left: 32 bytes or 48 where 8 would do, and a slab of descriptors
//! stays half empty for its sake. Freeing may not allocate, so nothing can be done about it there; it is done here, in
//! the background, a bounded number of blocks at a time. A block's neighbours know it by page frame number, so
//! changing its descriptor is a copy of 8 bytes and one store of its word, under the zone lock.

use super::alloc::{Descriptors, PageAllocator};
use super::zone::LockedZone;
use crate::address::Pfn;
use crate::desc::DescList;
use crate::memmap::{DescClass, PageType, Region, Word};
use crate::platform::Platform;

/// Blocks looked at in one hold of the zone lock.
const LOOK_HOLD: usize = 256;
/// Blocks looked at in one call of the periodic work, for each zone.
const LOOK_MAX: usize = 1 << 18;
/// Descriptors taken along for one hold.
const SETTLE_HOLD: usize = 64;
/// A zone with fewer morphed blocks than this is left as it is.
const WORTH_IT: u64 = 256;

impl<P: Platform> PageAllocator<P> {
    /// Settles some blocks of every zone that has many morphed ones. Not on a free path: takes buddies.
    pub(crate) fn settle(&self, descs: &impl Descriptors) {
        self.settle_while(descs, WORTH_IT, |_| LOOK_MAX);
    }

    /// Settles every morphed block in the zones' lists.
    pub(crate) fn settle_all(&self, descs: &impl Descriptors) {
        // Twice round: the first look may start in the middle.
        self.settle_while(descs, 1, |index| {
            2 * self.zones[index].present as usize + LOOK_HOLD
        });
    }

    fn settle_while(&self, descs: &impl Descriptors, least: u64, most: impl Fn(usize) -> usize) {
        for index in 0..self.zones.len() {
            let mut looked = 0;
            while looked < most(index) && self.with_zone(index, |z| z.lists.nr_morphed) >= least {
                let Ok(mut spare) = descs.get(SETTLE_HOLD) else {
                    return;
                };
                let mut freed = DescList::new();
                {
                    let mut zone = self.lock(index);
                    looked += zone.settle_some(&mut spare, &mut freed);
                }
                descs.put(spare);
                descs.put(freed);
            }
        }
    }
}

impl LockedZone<'_> {
    /// Looks at some blocks from where the last look ended; gives morphed free ones a buddy out of `spare` and puts what they
    /// had into `freed`. Says how many blocks it looked at.
    fn settle_some(&mut self, spare: &mut DescList, freed: &mut DescList) -> usize {
        let map = self.map;
        let mut at = self.lists.settle_at;
        let mut looked = 0;
        while looked < LOOK_HOLD {
            looked += 1;
            let Some(region) = self.region_from(at) else {
                // Round again, from the start, next time.
                self.lists.settle_at = Pfn(0);
                return looked;
            };
            at = Pfn(at.0.max(region.start));
            let (start, end) = region.untouched();
            if at.0 >= start && at.0 < end {
                at = Pfn(end);
                continue;
            }
            let word = region.word(at).load_owned();
            let order = word.order();
            if word.is_free_in_zone(order) && word.class() != DescClass::Buddy {
                let Some(desc) = spare.pop(map) else { break };
                let (old, new) = (map.buddy_at(word.desc()), map.buddy_at(desc));
                new.set_next(old.next());
                new.set_prev(old.prev());
                let settled = Word::described(PageType::Free, order, desc, DescClass::Buddy)
                    .with_contents(word.contents());
                region
                    .word(at)
                    .publish(settled.to_free(order, word.migratetype()));
                self.lists.nr_morphed -= 1;
                freed.push(map, word.desc());
            }
            // Blocks only change their extent under this lock, so the next one starts where this one ends.
            at = Pfn(if word.is_tail() {
                at.0 + 1
            } else {
                (at.0 | ((1 << order) - 1)) + 1
            });
        }
        self.lists.settle_at = at;
        looked
    }
}

impl<'a> LockedZone<'a> {
    /// The first region of the zone that ends after this page.
    pub(crate) fn region_from(&self, at: Pfn) -> Option<&'a Region> {
        let (first, end) = self.zone.regions;
        let regions = &self.map.regions()[first as usize..end as usize];
        regions
            .iter()
            .find(|region| region.zone == self.zone.index && at.0 < region.end)
    }
}
