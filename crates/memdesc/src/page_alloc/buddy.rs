//! Split and merge, under the zone lock.
//!
//! All descriptors that can be needed are in the caller's `spare` list before the lock is taken; all that a merge no
//! longer needs goes into his `freed` list and back to its cache after the lock is dropped. Nothing here can fail.
//!
//! | state of a block | its head's word | its other words | its descriptor |
//! |---|---|---|---|
//! | untouched | zero | zero | none |
//! | in a zone's list | free, order, list | zero | a `buddy`, or what the last owner left (*morph*) |
//! | in a per-CPU list, or on its way out | the same with P | zero | the same |
//! | handed out bare | bare, order | same word up to order 3, zero above | kept |
//! | handed out to an owner | his type, order | same word up to order 3, zero above | his |

use super::zone::{FreeList, LockedZone};
use crate::address::{MAX_ORDER, PAGEBLOCK_ORDER, Pfn};
use crate::desc::DescList;
use crate::memmap::heads::first_block_order;
use crate::memmap::{Contents, DescClass, Flaw, Found, PageType, Region, Word};
use crate::page_alloc::MigrateType;
use crate::sync::atomic::Ordering;

/// The most descriptors that taking one block can need: one for a block carved from untouched memory, and one for
/// each of the `MAX_ORDER` halves that a split down to order 0 leaves behind.
pub(crate) const LADDER: usize = MAX_ORDER + 1;

/// A block outside the free lists, with the descriptor that came with it. Its head's word says free with P, as if it
/// were in a per-CPU list: once the zone lock is dropped, a neighbour that is freed must not merge with it.
#[derive(Clone, Copy, Debug)]
#[must_use = "the block would be lost"]
pub(crate) struct Block {
    pub(crate) pfn: Pfn,
    pub(crate) word: Word,
}

impl LockedZone<'_> {
    pub(crate) fn region(&self, pfn: Pfn) -> &Region {
        match self.map.region(pfn) {
            Some(region) => region,
            None => unreachable!("{pfn:?} of a zone is in no region"),
        }
    }

    /// Puts a block into its list. `word` holds the descriptor; `at_tail` for blocks that will likely merge soon.
    pub(crate) fn link(
        &mut self,
        pfn: Pfn,
        order: usize,
        mt: MigrateType,
        word: Word,
        at_tail: bool,
    ) {
        let word = word.to_free(order, mt);
        self.map.word(pfn).publish(word);
        self.lists.events.words_written += 1;
        let map = self.map;
        if map.checks.on() {
            self.check_ends(order, mt);
        }
        let list = &mut self.lists.lists[order][mt as usize];
        list.ends
            .link(map, pfn, word.desc(), at_tail, "zone: about to link");
        list.nr += 1;
        self.lists.nr_listed += 1 << order;
        self.lists.nr_morphed += u64::from(word.class() != DescClass::Buddy);
        self.notify_free(order, word.contents());
    }

    /// Takes a block out of its list. Its word stays as it is.
    pub(crate) fn unlink(&mut self, pfn: Pfn, word: Word) {
        let (order, mt) = (word.order(), word.migratetype() as usize);
        let map = self.map;
        let list = &mut self.lists.lists[order][mt];
        if map.checks.on() && !list.ends.agrees(map, pfn, word) {
            // What its links say is not believed, nor is what is left of the list; the block itself is free by its word.
            map.checks.note(pfn, Flaw::Links);
            return self.drop_list(order, word.migratetype());
        }
        debug_assert!(
            word.is_free_in_zone(order) && list.nr > 0,
            "{pfn:?} is in no list: {word:?}"
        );
        list.ends
            .unlink(map, pfn, word.desc(), "zone: about to unlink");
        list.nr -= 1;
        self.lists.nr_listed -= 1 << order;
        self.lists.nr_morphed -= u64::from(word.class() != DescClass::Buddy);
    }

    /// Are the blocks at both ends of a list such as belong there? Something will be written into their links.
    #[cold]
    fn check_ends(&mut self, order: usize, mt: MigrateType) {
        let (map, ends) = (self.map, self.lists.lists[order][mt as usize].ends);
        for pfn in [ends.head, ends.tail]
            .into_iter()
            .filter(|&p| p != Pfn::NONE)
        {
            let word = map.owned_word(pfn);
            let fits = word.is_free_in_zone(order) && word.migratetype() == mt;
            if !fits || !map.is_in_slab(word.desc()) {
                map.checks.note(pfn, Flaw::Word);
                return self.drop_list(order, mt);
            }
        }
    }

    /// Forgets a list whose links are broken. Its blocks are free by their words still, so they merge with their neighbours as these come back;
    /// [`Mm::validate`](crate::Mm::validate) makes lists of the rest.
    #[cold]
    fn drop_list(&mut self, order: usize, mt: MigrateType) {
        let list = core::mem::replace(&mut self.lists.lists[order][mt as usize], FreeList::EMPTY);
        self.lists.nr_listed -= u64::from(list.nr) << order;
    }

    /// Makes all lists anew, from the words. At a moment when no block of the zone is on its way from one state to another.
    pub(crate) fn relink(&mut self) {
        let (first, end) = self.zone.regions;
        let (map, index) = (self.map, self.zone.index);
        self.lists.lists = [[FreeList::EMPTY; MigrateType::COUNT]; MAX_ORDER + 1];
        (self.lists.nr_listed, self.lists.nr_morphed) = (0, 0);
        let regions = &map.regions()[first as usize..end as usize];
        for region in regions.iter().filter(|r| r.zone == index) {
            for (pfn, word) in region.blocks() {
                if word.is_free_in_zone(word.order()) && map.is_in_slab(word.desc()) {
                    self.link(pfn, word.order(), word.migratetype(), word, true);
                }
            }
        }
    }

    /// Takes the first block of exactly this list. Its word stays as it is: [`detach`](Self::detach) or link it before the
    /// lock is dropped.
    pub(crate) fn pop(&mut self, order: usize, mt: MigrateType) -> Option<Block> {
        let pfn = self.lists.lists[order][mt as usize].ends.head;
        if pfn == Pfn::NONE {
            return None;
        }
        let word = self.map.word(pfn).load_owned();
        if self.map.checks.on() && (!word.is_free_in_zone(order) || word.migratetype() != mt) {
            // Whatever it is, it is not ours to hand out.
            self.map.checks.note(pfn, Flaw::Word);
            self.drop_list(order, mt);
            return None;
        }
        self.unlink(pfn, word);
        Some(Block { pfn, word })
    }

    /// The smallest block of this mobility that is large enough, split down to `order` (`__rmqueue_smallest`).
    pub(crate) fn rmqueue_smallest(
        &mut self,
        order: usize,
        mt: MigrateType,
        spare: &mut DescList,
    ) -> Option<Block> {
        for from in order..=MAX_ORDER {
            if let Some(block) = self.pop(from, mt) {
                return Some(self.expand(block, order, mt, spare));
            }
        }
        None
    }

    /// Splits a block that is in no list down to `order`, keeping its first part; the halves go into the lists of `mt`.
    /// Writes one word per half: what is inside a half is zero and stays so.
    pub(crate) fn expand(
        &mut self,
        block: Block,
        order: usize,
        mt: MigrateType,
        spare: &mut DescList,
    ) -> Block {
        let from = block.word.order();
        if from > order {
            self.lists.events.splits += 1;
        }
        for half in (order..from).rev() {
            crate::inject::point("zone: about to split");
            let desc = take_spare(spare, self);
            let word = Word::described(PageType::Free, half, desc, DescClass::Buddy)
                .with_contents(block.word.contents());
            self.link(block.pfn.add(1 << half), half, mt, word, false);
        }
        self.detach(block.pfn, block.word.to_free(order, mt))
    }

    /// Marks a block that leaves the zone: its word has P from now on, so that nobody merges with it, moves it to another
    /// list or hands it out.
    pub(crate) fn detach(&mut self, pfn: Pfn, word: Word) -> Block {
        let word = word.to_pcp(word.migratetype());
        self.map.word(pfn).publish(word);
        self.lists.events.words_written += 1;
        Block { pfn, word }
    }

    /// Splits a block that is in no list so that the block of `order` at `target` comes out alone.
    pub(crate) fn expand_at(
        &mut self,
        block: Block,
        target: Pfn,
        order: usize,
        spare: &mut DescList,
    ) -> Block {
        let mt = block.word.migratetype();
        let mut at = block.pfn;
        for half in (order..block.word.order()).rev() {
            let desc = take_spare(spare, self);
            let word = Word::described(PageType::Free, half, desc, DescClass::Buddy)
                .with_contents(block.word.contents());
            let upper = at.add(1 << half);
            if target >= upper {
                self.link(at, half, mt, word, false);
                at = upper;
            } else {
                self.link(upper, half, mt, word, false);
            }
        }
        debug_assert_eq!(at, target);
        self.detach(target, block.word.to_free(order, mt))
    }

    /// Frees a block that is in no list: merges it as far as it goes and puts the result into the list of its pageblock.
    /// Each merge leaves a descriptor over, which goes into `freed`. The tails' words are zero already.
    pub(crate) fn free_block(&mut self, block: Block, order: usize, freed: &mut DescList) {
        if self.map.bad.any()
            && let Some(found) = self.map.bad.find(block.pfn, order)
        {
            return self.free_around(block, order, found, freed);
        }
        self.free_good(block, order, freed);
    }

    fn free_good(&mut self, block: Block, order: usize, freed: &mut DescList) {
        let Block { mut pfn, mut word } = block;
        let mut order = order;
        let mut contents = word.contents();
        let map = self.map;
        let region = match map.region(pfn) {
            Some(region) => region,
            None => unreachable!("{pfn:?} of a zone is in no region"),
        };
        let mt = region.block_migratetype(pfn);
        while order < MAX_ORDER {
            let other = pfn.buddy(order);
            if !region.contains(other) {
                break;
            }
            let other_word = region.word(other).load_owned();
            if !other_word.is_free_in_zone(order) {
                break;
            }
            // Pageblocks kept for atomic allocations do not melt into others.
            if order >= PAGEBLOCK_ORDER {
                let other_mt = region.block_migratetype(other);
                if other_mt != mt
                    && (mt == MigrateType::HighAtomic || other_mt == MigrateType::HighAtomic)
                {
                    break;
                }
            }
            self.unlink(other, other_word);
            contents = contents.and(other_word.contents());
            // Of the two descriptors the smaller one stays: a folio's memory is better off back in its cache.
            let left_over = if word.class() == DescClass::Buddy {
                other_word.desc()
            } else {
                core::mem::replace(&mut word, other_word).desc()
            };
            freed.push(map, left_over);
            let upper = Pfn(pfn.0.max(other.0));
            crate::inject::point("zone: about to merge");
            region.word(upper).publish(Word::ZERO);
            self.lists.events.words_written += 1;
            self.lists.events.merges += 1;
            pfn = Pfn(pfn.0.min(other.0));
            order += 1;
        }
        let mt = region.block_migratetype(pfn);
        // What was reported is no longer backed: last too.
        let at_tail =
            contents.contains(Contents::REPORTED) || self.will_merge_soon(region, pfn, order);
        self.link(pfn, order, mt, word.with_contents(contents), at_tail);
    }

    /// Frees a block but for a bad page in it, which goes out of use (`take_page_off_buddy`): halves it as long as there are descriptors for the good
    /// half. The first is the block's own, the others were noted with the page.
    #[cold]
    fn free_around(
        &mut self,
        block: Block,
        order: usize,
        (bad, nth): (Pfn, usize),
        freed: &mut DescList,
    ) {
        let map = self.map;
        let mut spare = self.take_note(nth);
        crate::inject::point("zone: bad page taken");
        let mut own = Some(block.word);
        let (mut at, mut left) = (block.pfn, order);
        while left > 0 {
            let good = match own.take() {
                Some(word) => word,
                None => match spare.pop(map) {
                    Some(desc) => Word::described(PageType::Free, 0, desc, DescClass::Buddy),
                    None => break,
                },
            };
            left -= 1;
            let upper = at.add(1 << left);
            let pfn = if bad >= upper {
                core::mem::replace(&mut at, upper)
            } else {
                upper
            };
            // There may be another bad page in it. As deep as there are.
            self.free_block(Block { pfn, word: good }, left, freed);
        }
        debug_assert!(at.is_aligned(left) && bad.0 - at.0 < 1 << left);
        map.publish_block(at, Word::hwpoison(left));
        map.bad.add_out(1 << left);
        // What is noted beside it goes out of use with it.
        while let Some((_, nth)) = map.bad.find(at, left) {
            freed.append(map, self.take_note(nth));
        }
        if let Some(word) = own {
            freed.push(map, word.desc());
        }
        freed.append(map, spare);
    }

    /// Forgets a bad page that is noted; what lay with it is the caller's.
    fn take_note(&self, nth: usize) -> DescList {
        let (first, len) = self.map.bad.take(nth);
        DescList::from_parts(first, len)
    }

    /// Takes a bad page that is noted out of this zone's free memory, if it is in there. Says whether it was.
    pub(crate) fn take_bad(&mut self, bad: Pfn, freed: &mut DescList) -> bool {
        let region = self.region(bad);
        let found = region.lookup(bad);
        let (Some(Found { head, word }), Some(noted)) = (found, self.map.bad.find(bad, 0)) else {
            return false;
        };
        // The tails of a free block have no word of their own.
        let in_order = head == bad || region.word(bad).load_owned().is_tail();
        if !word.is_free_in_zone(word.order()) || !in_order {
            return false;
        }
        self.unlink(head, word);
        self.free_around(Block { pfn: head, word }, word.order(), noted, freed);
        true
    }

    /// Is the block next to the one that this and its (taken) buddy would make free? Then the buddy's return makes a large
    /// block, so hand this one out last (`buddy_merge_likely`).
    fn will_merge_soon(&self, region: &Region, pfn: Pfn, order: usize) -> bool {
        if order >= MAX_ORDER - 1 {
            return false;
        }
        let parent = Pfn(pfn.0 & !(1 << order));
        let uncle = parent.buddy(order + 1);
        region.contains(uncle) && region.word(uncle).load_owned().is_free_in_zone(order + 1)
    }

    /// Turns the start of an untouched range into a free block of the largest order that fits there, and puts it into the
    /// movable lists. Says whether there was one. Needs one spare descriptor.
    pub(crate) fn carve(&mut self, spare: &mut DescList) -> bool {
        let Some(region) = self.untouched_region() else {
            return false;
        };
        self.carve_from(region, spare);
        true
    }

    /// [`carve`](Self::carve) from a certain region, which has untouched pages.
    pub(crate) fn carve_from(&mut self, region: &Region, spare: &mut DescList) {
        let (start, end) = region.untouched();
        let order = first_block_order(start, end);
        region
            .untouched_start
            .store(start + (1 << order), Ordering::Relaxed);
        self.lists.nr_untouched -= 1 << order;
        let mt = region.block_migratetype(Pfn(start));
        let desc = take_spare(spare, self);
        // Nobody touched it, so there is nothing to report.
        let word = Word::described(PageType::Free, order, desc, DescClass::Buddy)
            .with_contents(Contents::REPORTED);
        self.link(Pfn(start), order, mt, word, false);
    }

    /// Takes untouched pages off the end of a range, without any descriptor; for the first slabs of all.
    pub(crate) fn carve_bare(&mut self, pages: u32) -> Option<Pfn> {
        let region = self.untouched_region()?;
        let (start, end) = region.untouched();
        let first = end.checked_sub(pages).filter(|&at| at >= start)?;
        region.untouched_end.store(first, Ordering::Relaxed);
        region.set_block_migratetype(Pfn(first), MigrateType::Unmovable);
        self.lists.nr_untouched -= u64::from(pages);
        Some(Pfn(first))
    }
}

impl<'a> LockedZone<'a> {
    /// A region of this zone that has untouched pages.
    fn untouched_region(&self) -> Option<&'a Region> {
        if self.lists.nr_untouched == 0 {
            return None;
        }
        let (first, end) = self.zone.regions;
        let index = self.zone.index;
        self.map.regions()[first as usize..end as usize]
            .iter()
            .find(|region| {
                let (start, end) = region.untouched();
                region.zone == index && start < end
            })
    }
}

fn take_spare(spare: &mut DescList, zone: &LockedZone<'_>) -> crate::address::PhysAddr {
    match spare.pop(zone.map) {
        Some(desc) => desc,
        None => unreachable!("more descriptors needed than the ladder of {LADDER}"),
    }
}
