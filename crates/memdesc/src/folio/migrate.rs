//! Moving a folio: new pages, the same descriptor. The word is what moves.
//!
//! Linux has a descriptor for each page, so migrating copies one folio to another, field by field, and whoever has a pointer to the
//! old one is wrong from then on. Here two blocks exchange what their words lead to: the new pages' word leads to the folio,
//! the old pages' to the `struct buddy` that the new ones came with, and are bare pages, which are freed as always. Who holds
//! the folio's lock, waits for it, or is it linked with by address, notices nothing.
//!
//! Source: `folio_migrate_mapping`, `folio_migrate_flags` of Linux.

use crate::address::Pfn;
use crate::desc::{FolioFlags, Held};
use crate::memmap::PageType;
use crate::mm::Mm;
use crate::platform::Platform;

impl<P: Platform> Mm<P> {
    /// Moves a frozen folio that nobody maps and that is in no LRU list from `head` to bare pages of the same order at `to`: contents,
    /// word and all. `head`'s pages are bare ones from now on, the caller's. The folio stays frozen: whoever entered the
    /// old page number anywhere enters the new one now.
    pub(crate) fn move_frozen(&self, head: Pfn, to: Pfn) {
        let map = &self.pages.map;
        let (from, bare) = (map.word(head).load_owned(), map.word(to).load_owned());
        let order = from.order();
        let folio = self.folio_at(from.desc());
        debug_assert!(folio.held() == Held::default() && !folio.has_flag(FolioFlags::LRU));
        debug_assert!(bare.kind() == PageType::Bare && bare.order() == order);
        self.copy_pages(head, to, order);
        // Bare pages of a low order have their word in every tail, a folio has not.
        if let Some(region) = map.region(to) {
            region.clear_tails(to, order);
        }
        map.word(to).publish(from);
        map.publish_block(head, bare);
    }

    /// Copies the contents of pages that the caller has to pages that he alone has.
    pub(crate) fn copy_pages(&self, from: Pfn, to: Pfn, order: usize) {
        let (from, to) = (self.page_address(from), self.page_address(to));
        // SAFETY: both are pages that the platform maps (promise 1); the target is the caller's alone, so they do not overlap. Users may
        // write to the source meanwhile only where they have it mapped, which the callers exclude.
        unsafe { core::ptr::copy_nonoverlapping(from, to, crate::address::PAGE_SIZE << order) };
    }
}
