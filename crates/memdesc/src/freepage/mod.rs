//! Free-page services: what is done to memory because it is free. It is filled ([`init`]), checked ([`poison`]), made inaccessible, and
//! reported to whoever lends it ([`reporting`]).
//!
//! All of it hangs on two places, [`prep_free`](PageAllocator::prep_free) and [`prep_alloc`](PageAllocator::prep_alloc), through which every
//! block comes back and is handed out, outside all locks, and on two bits of a free block's word, [`Contents`]:
//!
//! | bit | set | lost |
//! |---|---|---|
//! | CLEAN | the block was filled when it came back, or was reported and reads as zeros since | a merge with one that is not; a report after which it may hold anything |
//! | REPORTED | the block was reported; or carved from memory that nobody ever touched | a merge with one that is not |
//!
//! Both are known of the parts of a split too, and go when the block is handed out.
//!
//! The order of things, as in Linux. A block that comes back: filled, made inaccessible (`kernel_map_pages`), the platform's own hook
//! (`pages_freed`). A block that is handed out: the platform's own hook (`pages_allocated`), made accessible, checked, zeroed if it has to be.
//!
//! Memory that was never handed out has no word, and nothing is known of it; that a machine says its memory is zero
//! ([`Config::memory_is_zeroed`]) speaks of the memory map only. A page that is checked and found bad is reported, and handed out all the same, as in
//! Linux. What is done to objects of slabs is in `slab/init.rs` and `slab/debug.rs`; their pages come and go here.
//!
//! Source: `mm/page_poison.c`, `mm/page_reporting.c`, `free_pages_prepare` and `post_alloc_hook` of Linux.

mod init;
mod poison;
pub(crate) mod reporting;
mod words;

pub use poison::PageDamage;
pub use reporting::{NotReported, Reported};
pub use words::PageWords;

use crate::address::Pfn;
use crate::config::Config;
use crate::gfp::{self, Flags};
use crate::memmap::{Contents, Word};
use crate::page_alloc::alloc::PageAllocator;
use crate::platform::Platform;

/// What free pages are filled with (`PAGE_POISON`).
pub(crate) const PAGE_POISON: u8 = 0xaa;

/// Which services are on: bits, so that one branch finds out that there is nothing to do.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Services(u8);

impl Services {
    /// Fill what comes back.
    const FILL: u8 = 1 << 0;
    /// See whether it still holds that when it is handed out.
    const CHECK: u8 = 1 << 1;
    /// Make free pages inaccessible.
    const MAP: u8 = 1 << 2;
    /// Zero what is handed out.
    const INIT_ON_ALLOC: u8 = 1 << 3;
    /// The pattern is zeros.
    const ZEROS: u8 = 1 << 4;
    /// What is left in a free page is there later.
    const KEPT: u8 = 1 << 5;

    /// What the user wants, as far as the platform lets it.
    pub(crate) fn new<P: Platform>(config: &Config, platform: &P) -> Services {
        let bits = [
            (Self::FILL, config.init_on_free || config.page_poison),
            (Self::CHECK, config.page_poison),
            (Self::MAP, config.debug_pagealloc),
            (Self::INIT_ON_ALLOC, config.init_on_alloc),
            // Both wanted: zeros are a pattern like any other. Neither: then only reporting knows of clean blocks, and those are zeros.
            (Self::ZEROS, config.init_on_free || !config.page_poison),
            (Self::KEPT, platform.keeps_free_contents()),
        ];
        let on = bits.iter().filter(|(_, on)| *on);
        Services(on.fold(0, |all, (bit, _)| all | bit))
    }

    #[inline]
    const fn has(self, bit: u8) -> bool {
        self.0 & bit != 0
    }

    /// Is what is handed out zeroed?
    pub(crate) const fn init_on_alloc(self) -> bool {
        self.has(Self::INIT_ON_ALLOC)
    }

    /// Is what comes back zeroed?
    pub(crate) const fn init_on_free(self) -> bool {
        self.has(Self::FILL) && self.has(Self::ZEROS)
    }

    /// Is there anything to do for a block that comes back?
    #[inline]
    pub(crate) const fn on_free(self) -> bool {
        self.has(Self::FILL | Self::MAP)
    }

    /// Is there anything to do for a block that is handed out?
    #[inline]
    pub(crate) const fn on_alloc(self, gfp: Flags) -> bool {
        self.has(Self::MAP | Self::CHECK | Self::INIT_ON_ALLOC) || gfp.contains(gfp::__GFP_ZERO)
    }

    /// What a free page is filled with.
    const fn pattern(self) -> u8 {
        if self.has(Self::ZEROS) {
            0
        } else {
            PAGE_POISON
        }
    }

    /// May zeros that somebody else left in a free page count as the pattern?
    const fn trusts_zeros(self) -> bool {
        self.has(Self::ZEROS) && self.has(Self::KEPT)
    }
}

impl<P: Platform> PageAllocator<P> {
    /// A block came back: does what is to be done, but the platform's own hook. Says what is known of the contents from here on.
    #[inline(never)]
    pub(crate) fn serve_free(&self, pfn: Pfn, order: usize) -> Contents {
        let services = self.services;
        let mut contents = Contents::UNKNOWN;
        if services.has(Services::FILL) {
            let all = self.fill_good_pages(pfn, order, services.pattern());
            if all && services.has(Services::KEPT) {
                contents = Contents::CLEAN;
            }
        }
        if services.has(Services::MAP) {
            self.platform.kernel_map_pages(pfn, order, false);
        }
        contents
    }

    /// Pages are kept for somebody, in nobody's hands: treated as free ones, and whoever is charged for them no longer is. In any context.
    pub(crate) fn pages_rest(&self, pfn: Pfn, order: usize) {
        let word = self.map.word(pfn).load_owned();
        if word.is_charged() {
            self.map.publish_block(pfn, self.uncharge_block(pfn, word));
        }
        if self.services.on_free() {
            self.serve_free(pfn, order);
        }
    }

    /// They are handed out. In any context.
    #[track_caller]
    pub(crate) fn pages_roused(&self, pfn: Pfn, order: usize, gfp: Flags) {
        if self.services.on_alloc(gfp) {
            let filled = self.services.has(Services::FILL) && self.services.has(Services::KEPT);
            let contents = if filled && !self.map.bad.is_deadly(pfn, order) {
                Contents::CLEAN
            } else {
                Contents::UNKNOWN
            };
            let word = self.map.word(pfn).load_owned();
            self.serve_alloc(pfn, order, word.with_contents(contents), gfp);
        }
    }

    /// A block is about to be handed out: does what is to be done after the platform's own hook.
    #[inline(never)]
    #[track_caller]
    pub(crate) fn serve_alloc(&self, pfn: Pfn, order: usize, word: Word, gfp: Flags) {
        let services = self.services;
        if services.has(Services::MAP) {
            self.platform.kernel_map_pages(pfn, order, true);
        }
        let mut clean = word.contents().contains(Contents::CLEAN);
        if clean && services.has(Services::CHECK) {
            clean = self.check_pages(pfn, order, word, services.pattern());
        }
        if services.has(Services::INIT_ON_ALLOC) || gfp.contains(gfp::__GFP_ZERO) {
            self.zero_pages(pfn, order, clean && services.has(Services::ZEROS));
        }
    }
}
