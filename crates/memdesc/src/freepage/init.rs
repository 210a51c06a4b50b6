//! Filling pages: with the pattern of free memory when they come back (`init_on_free`, `page_poison`), with zeros when they are handed out
//! (`__GFP_ZERO`, `init_on_alloc`), unless they hold those already.

use crate::address::{PAGE_SIZE, Pfn};
use crate::page_alloc::alloc::PageAllocator;
use crate::platform::{Pin, Platform};
use crate::stats::Event;

impl<P: Platform> PageAllocator<P> {
    /// Fills a block that came back, but for broken pages in it, which go out of use: to touch one may be deadly. Says whether all of it was filled. Plain
    /// stores: from any context.
    pub(super) fn fill_good_pages(&self, pfn: Pfn, order: usize, byte: u8) -> bool {
        if self.map.bad.is_deadly(pfn, order) {
            let pages = (0..1 << order).map(|page| pfn.add(page));
            pages
                .filter(|&page| !self.map.bad.is_deadly(page, 0))
                .for_each(|page| self.fill_pages(page, 0, byte));
            return false;
        }
        self.fill_pages(pfn, order, byte);
        true
    }

    /// Fills a block that came back, or that is about to be handed out. Plain stores: from any context.
    fn fill_pages(&self, pfn: Pfn, order: usize, byte: u8) {
        let ptr = self.map.virt(pfn.phys());
        // SAFETY: the block is in no list: its last owner gave it up, and it has no new one yet. It is accessible (promise 1): it is not
        // made inaccessible before, or has been made accessible again.
        unsafe { ptr.write_bytes(byte, PAGE_SIZE << order) };
    }

    /// Zeroes a block that is about to be handed out, unless that was done when it came back.
    pub(super) fn zero_pages(&self, pfn: Pfn, order: usize, are_zero: bool) {
        if !are_zero {
            return self.fill_pages(pfn, order, 0);
        }
        let pin = Pin::try_new(&self.platform);
        self.any_stats(pin.as_ref())
            .add_any(Event::PgZeroSaved, 1 << order);
    }
}
