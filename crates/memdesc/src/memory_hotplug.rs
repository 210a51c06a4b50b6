//! Memory that goes and comes while the machine runs (`offline_pages`, `online_pages`): what can be moved is moved, what cannot is named.
//!
//! Offline pages have no descriptor: their words say so inline, and that is all there is of them, so the memory behind them may
//! be given to a hypervisor or pulled out.

use crate::address::Pfn;
use crate::compaction::Obstacle;
use crate::error::AllocError;
use crate::gfp::Flags;
use crate::memmap::heads::blocks;
use crate::memmap::{DescClass, PageType, Word};
use crate::mm::Mm;
use crate::page_alloc::alloc::Descriptors;
use crate::platform::Platform;

impl<P: Platform> Mm<P> {
    /// Takes a range off line: free pages are taken, folios moved away.
    ///
    /// # Context
    ///
    /// May sleep.
    ///
    /// # Errors
    ///
    /// The first page that stays; [`for_each_obstacle`](Self::for_each_obstacle) names all of them. The range is on line as before then.
    pub fn offline_pages(&self, start: Pfn, pages: u32) -> Result<(), Obstacle> {
        self.alloc_contig_range(start, pages)?;
        for (block, order) in blocks(start.0, start.0 + pages) {
            let word = self.pages.map.word(block).load_owned();
            self.retyped(PageType::Bare, PageType::Offline, order);
            // Whatever is known of the contents is no longer true when it comes back.
            let _ = self.pages.prep_free(block, word);
            let offline = Word::inline(PageType::Offline, order, 0);
            self.pages.map.publish_block(block, offline);
            self.put_desc(word.desc());
        }
        Ok(())
    }

    /// Brings a range that is off line back.
    ///
    /// # Errors
    ///
    /// [`AllocError::Busy`] if it is not off line as a whole, in the blocks that it went in; no memory for the descriptors. It is as before then.
    pub fn online_pages(&self, start: Pfn, pages: u32) -> Result<(), AllocError> {
        let end = start.0.checked_add(pages).ok_or(AllocError::Busy)?;
        let all = || blocks(start.0, end);
        // The blocks are the caller's from here on: two who bring back the same do not both get them.
        let claimed = all()
            .take_while(|&(block, order)| self.claim(block, order, 0, 1))
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
                    let back = self.claim(block, order, 1, 0);
                    debug_assert!(back);
                }
                return Err(why);
            }
        };
        for (block, order) in all() {
            let Some(desc) = spare.pop(&self.pages.map) else {
                unreachable!("as many as there are blocks")
            };
            let word = Word::described(PageType::Bare, order, desc, DescClass::Buddy);
            self.pages.prep_alloc(block, order, word, Flags::EMPTY);
            self.retyped(PageType::Offline, PageType::Bare, order);
            self.pages.map.publish_block(block, word);
            // SAFETY: ours as bare pages.
            unsafe { self.free_pages(block) };
        }
        self.put(spare);
        Ok(())
    }

    /// Visits all pages of a range that keep it from going off line for good: a page of each block that is neither free nor a folio.
    pub fn for_each_obstacle(&self, start: Pfn, pages: u32, mut visit: impl FnMut(Obstacle)) {
        let end = start.0 + pages;
        let mut at = start;
        while at.0 < end {
            let found = self.pages.map.lookup(at);
            let next = found.map_or(at.0 + 1, |f| f.head.0 + (1 << f.word.order()));
            let kind = found.map_or(PageType::None, |f| f.word.kind());
            let free =
                kind == PageType::Free || found.is_none() && self.pages.map.region(at).is_some();
            if !free && !found.is_some_and(|f| f.word.is_folio()) {
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

    fn retyped(&self, from: PageType, to: PageType, order: usize) {
        let pin = self.pages.pin();
        self.pages.stats(&pin).block_retyped(&pin, from, to, order);
    }
}
