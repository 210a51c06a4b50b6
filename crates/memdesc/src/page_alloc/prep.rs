//! Pages change hands: what is done to them between being free and being somebody's (`post_alloc_hook`, `free_pages_prepare`).
//!
//! Every block that is handed out comes through [`prep_alloc`](PageAllocator::prep_alloc), every block that comes back through
//! [`prep_free`](PageAllocator::prep_free), whichever way it goes; outside all locks. The services themselves are in [`crate::freepage`].

use super::alloc::PageAllocator;
use crate::address::Pfn;
use crate::gfp::Flags;
use crate::memmap::{Contents, PageType, Word};
use crate::platform::Platform;

impl<P: Platform> PageAllocator<P> {
    /// A block is about to be handed out as `kind`. `word` is what it was while free; with `__GFP_ZERO` it is zeroed.
    #[inline]
    #[track_caller]
    pub(crate) fn prep_alloc(
        &self,
        kind: PageType,
        pfn: Pfn,
        order: usize,
        word: Word,
        gfp: Flags,
    ) {
        self.platform.pages_allocated(pfn, order);
        if self.services.on_alloc(gfp) {
            self.serve_alloc(pfn, order, word, gfp);
        }
        if self.map.checks.watched() {
            self.note_alloc(kind, pfn, order);
        }
    }

    /// A block came back, and nobody will touch it until it is handed out again. Gives the word as it is to be when free, with what is known of the
    /// contents.
    #[inline]
    #[track_caller]
    pub(crate) fn prep_free(&self, pfn: Pfn, word: Word) -> Word {
        let order = word.order();
        if self.map.checks.watched() {
            self.note_free(word.kind(), pfn, order);
        }
        // Whoever is charged for it no longer is.
        let word = if word.number() != 0 {
            self.uncharge_block(pfn, word)
        } else {
            word
        };
        let contents = if self.services.on_free() {
            self.serve_free(pfn, order)
        } else {
            Contents::UNKNOWN
        };
        self.platform.pages_freed(pfn, order);
        word.with_contents(contents)
    }
}
