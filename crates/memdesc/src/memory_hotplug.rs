//! Memory that goes and comes while the machine runs (`offline_pages`, `online_pages`): what can be moved is moved, what cannot is named.
//!
//! Offline pages have no descriptor: their words say so inline, and that is all there is of them, so the memory behind them may
//! be given to a hypervisor or pulled out.

use crate::address::Pfn;
use crate::compaction::Obstacle;
use crate::error::AllocError;
use crate::inline::{Facts, Offline};
use crate::memmap::bad::MAX_PENDING;
use crate::memmap::heads::blocks;
use crate::memmap::{DescClass, Found, PageType, Word};
use crate::mm::Mm;
use crate::page_alloc::alloc::Descriptors;
use crate::platform::Platform;

impl<P: Platform> Mm<P> {
    /// Takes a range off line: free pages are taken, folios moved away. Bad pages that are out of use may be in it, and stay so.
    ///
    /// # Context
    ///
    /// May sleep.
    ///
    /// # Errors
    ///
    /// The first page that stays; [`for_each_obstacle`](Self::for_each_obstacle) names all of them. The range is on line as before then.
    pub fn offline_pages(&self, start: Pfn, pages: u32) -> Result<(), Obstacle> {
        // No page in it goes out of use from here on but by being freed, and none comes back.
        let _mutex = self.mf_mutex();
        let mut attempt = 0;
        loop {
            let mut had = 0;
            let mut pieces = self.good_pieces(start, pages);
            let why = pieces.find_map(|(piece, n)| {
                let result = self.alloc_contig_range(piece, n);
                had += usize::from(result.is_ok());
                result.err()
            });
            let Some(why) = why else { break };
            // One that could not be had ends it: those before it go back, by the same cut, since none of theirs was freed meanwhile.
            for (piece, n) in self.good_pieces(start, pages).take(had) {
                // SAFETY: just had, and nobody has used it.
                unsafe { self.free_contig_range(piece, n) };
            }
            // A page went out of use while it was moved: with another cut it is no obstacle.
            attempt += 1;
            if why.kind != PageType::Poisoned || attempt > MAX_PENDING {
                return Err(why);
            }
        }
        for (block, order) in self.good_blocks(start, pages) {
            // Whatever is known of the contents is no longer true when it comes back.
            let word = self.pages.map.word(block).load_owned();
            let _ = self.pages.prep_free(block, word);
            let facts = Offline::Hotplug as u64;
            self.bare_to_inline(block, Word::inline(PageType::Offline, order, facts));
        }
        self.mark_bad(start, pages, true);
        Ok(())
    }

    /// Bad pages of a range hear that it is off line, or is no more: then one that is good again is not handed out. With `mf_mutex`, so none of them changes
    /// meanwhile. Where several went out of use as one block, each has a word of its own from here on: some may lie outside of the range.
    fn mark_bad(&self, start: Pfn, pages: u32, offline: bool) {
        let range = start.0..start.0.saturating_add(pages);
        let mut at = start.0;
        while at < range.end {
            let found = self.pages.map.lookup(Pfn(at));
            let Some(Found { head, word }) = found.filter(|f| f.word.is_hwpoison()) else {
                at += 1;
                continue;
            };
            let region = self.pages.map.region(head);
            // From the last: until the head's word changes it covers those before.
            for page in (head.0..head.0 + (1 << word.order())).rev() {
                let word = if offline && range.contains(&page) {
                    Word::hwpoison_offline()
                } else {
                    Word::hwpoison(0)
                };
                region.inspect(|region| region.word(Pfn(page)).publish(word));
            }
            at = head.0 + (1 << word.order());
        }
    }

    /// The blocks of a range as their words have them, bad pages left out: of what is not off line, or reaches out of the range, no order.
    fn offline_blocks(&self, start: Pfn, pages: u32) -> impl Iterator<Item = (Pfn, Option<usize>)> {
        let end = start.0.saturating_add(pages);
        let mut at = start.0;
        core::iter::from_fn(move || {
            loop {
                if at >= end {
                    return None;
                }
                let block = Pfn(at);
                let found = self.pages.map.lookup(block).filter(|f| f.head == block);
                let word = found.map_or(Word::ZERO, |f| f.word);
                at = at.saturating_add(1 << word.order());
                let off = matches!(
                    word.inline_facts(),
                    Some(Facts::Offline(Offline::Hotplug | Offline::Claimed))
                );
                if !word.is_hwpoison() {
                    let order = Some(word.order()).filter(|_| off && at <= end);
                    return Some((block, order));
                }
            }
        })
    }

    /// The blocks of a range that is taken off line: bad pages in it stay what they are.
    fn good_blocks(&self, start: Pfn, pages: u32) -> impl Iterator<Item = (Pfn, usize)> {
        let pieces = self.good_pieces(start, pages);
        pieces.flat_map(|(piece, n)| blocks(piece.0, piece.0 + n))
    }

    /// Brings a range that is off line back.
    ///
    /// # Errors
    ///
    /// [`AllocError::Busy`] if it is not off line as a whole, in the blocks that it went in; no memory for the descriptors. It is as before then.
    pub fn online_pages(&self, start: Pfn, pages: u32) -> Result<(), AllocError> {
        start.0.checked_add(pages).ok_or(AllocError::Busy)?;
        let _mutex = self.mf_mutex();
        let all = || self.offline_blocks(start, pages);
        // The blocks are the caller's from here on: two who bring back the same do not both get them.
        let claimed = all()
            .take_while(|&(block, order)| order.is_some_and(|order| self.claim(block, order, 0, 1)))
            .count();
        let spare = if claimed == all().count() {
            // A descriptor for each block, all of them first.
            self.get(claimed)
        } else {
            Err(AllocError::Busy)
        };
        let mut spare = match spare {
            Ok(spare) => spare,
            Err(why) => {
                for (block, order) in all().take(claimed) {
                    let back = order.is_some_and(|order| self.claim(block, order, 1, 0));
                    debug_assert!(back);
                }
                return Err(why);
            }
        };
        self.mark_bad(start, pages, false);
        for (block, order) in all() {
            let (Some(order), Some(desc)) = (order, spare.pop(&self.pages.map)) else {
                unreachable!("all were claimed, and there are as many as there are blocks")
            };
            let word = Word::described(PageType::Bare, order, desc, DescClass::Buddy);
            // As when it is handed out, but nothing is filled: it comes back at once, and a page that failed meanwhile is not to be touched.
            self.pages.platform.pages_allocated(block, order);
            self.pages.platform.kernel_map_pages(block, order, true);
            self.count_retyped(PageType::Offline, PageType::Bare, order);
            self.pages.map.publish_block(block, word);
            // SAFETY: ours as bare pages.
            unsafe { self.free_pages(block) };
        }
        self.put(spare);
        Ok(())
    }

    /// Visits all pages of a range that keep it from going off line for good: a page of each block that is neither free nor a folio nor bad.
    pub fn for_each_obstacle(&self, start: Pfn, pages: u32, mut visit: impl FnMut(Obstacle)) {
        let end = start.0.saturating_add(pages);
        let mut at = start;
        while at.0 < end {
            let found = self.pages.map.lookup(at);
            let next = found.map_or(at.0 + 1, |f| f.head.0 + (1 << f.word.order()));
            let kind = found.map_or(PageType::None, |f| f.word.kind());
            let free =
                kind == PageType::Free || found.is_none() && self.pages.map.region(at).is_some();
            // Bad memory may be in a range that goes off line.
            let no_obstacle = |f: &Found| f.word.is_folio() || f.word.is_hwpoison();
            if !free && !found.as_ref().is_some_and(no_obstacle) {
                visit(Obstacle {
                    pfn: at,
                    kind,
                    movable: false,
                });
            }
            at = Pfn(next);
        }
    }

    /// Changes the facts of an offline block from one to another, if that is what it is.
    fn claim(&self, block: Pfn, order: usize, from: u64, to: u64) -> bool {
        let word = |facts| Word::inline(PageType::Offline, order, facts);
        self.pages
            .map
            .region(block)
            .is_some_and(|region| region.word(block).claim(word(from), word(to)))
    }
}
