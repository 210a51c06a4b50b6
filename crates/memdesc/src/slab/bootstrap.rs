//! Descriptors out of nothing, and where the recursion stops.
//!
//! A slab of buddies needs a `struct slab` and a page; getting the page may need a split, which needs buddies; getting
//! the `struct slab` may need a slab of those, which needs a `struct slab` and a page. Seed 000 ends this with
//! `__alloc_slab`: take the smallest block there is and let it describe itself.
//!
//! ```text
//! alloc_pages
//!   kmem_cache_alloc_bulk(kmem_cache_buddy)
//!     new_slab(kmem_cache_buddy)
//!       kmem_cache_alloc(kmem_cache_slab)
//!         new_slab(kmem_cache_slab)
//!           __alloc_slab            the smallest block: page 0 holds struct slabs and describes itself;
//!                                   if there is a page 1, it is a slab of buddies, enough for the rest
//!       a page without a split, or the smallest block, whose rest is described by the slab that its first page becomes
//! ```
//!
//! The seed's chain goes round twice because others may take what was made before its maker can use it. Here
//! a maker takes what it needs before the slab is listed, so nothing can be stolen, and the bound is hard:
//! [`MAX_DEPTH`] nested slabs, [`MAX_PAGES`] pages.
//!
//! Nothing here waits, reclaims or heeds a watermark: this is what freeing and reclaim themselves live on.

use super::cache::{CacheCore, Role};
use crate::address::{MAX_ORDER, Pfn, PhysAddr};
use crate::desc::{DescList, Slab};
use crate::error::AllocError;
use crate::memmap::PageType;
use crate::mm::Mm;
use crate::page_alloc::alloc::Descriptors;
use crate::page_alloc::exact::Smallest;
use crate::platform::{FaultPoint, Platform};
use crate::stats::Event;
use crate::sync::atomic::Ordering;

/// Slabs being made at once on the way to a slab of descriptors: one of buddies, one of `struct slab`s.
pub(crate) const MAX_DEPTH: u64 = 2;
/// Pages taken on the way: the self-described one, the slab of buddies beside it, and the one asked for.
pub(crate) const MAX_PAGES: u64 = 3;

/// How far one request went.
#[derive(Clone, Copy, Debug, Default)]
struct Chain {
    depth: u64,
    pages: u64,
}

impl<P: Platform> Mm<P> {
    /// Objects from a new slab of descriptors; at least one, or an error.
    pub(crate) fn meta_slab(
        &self,
        core: &CacheCore,
        out: &mut [*mut u8],
    ) -> Result<usize, AllocError> {
        let mut chain = Chain::default();
        let result = match core.role {
            Role::Slabs => self.__alloc_slab(&mut chain, out),
            _ => self.new_buddy_slab(&mut chain, out),
        };
        assert!(
            chain.depth <= MAX_DEPTH && chain.pages <= MAX_PAGES,
            "the bootstrap chain went {} deep and took {} pages",
            chain.depth,
            chain.pages
        );
        self.bootstrap_depth
            .fetch_max(chain.depth, Ordering::Relaxed);
        self.bootstrap_pages
            .fetch_max(chain.pages, Ordering::Relaxed);
        result
    }

    /// `new_slab(kmem_cache_buddy)`.
    fn new_buddy_slab(&self, chain: &mut Chain, out: &mut [*mut u8]) -> Result<usize, AllocError> {
        chain.depth += 1;
        if self.pages.platform.should_fail(FaultPoint::NewSlab) {
            return Err(AllocError::Injected);
        }
        // kmem_cache_alloc(kmem_cache_slab)
        let slabs = self.slab_cache();
        let mut desc = [core::ptr::null_mut()];
        if self.slabs_take_partial(slabs, &mut desc) == 0 {
            self.__alloc_slab(chain, &mut desc)?;
            // That may have made a slab of buddies in passing.
            let n = self.slabs_take_partial(self.buddy_cache(), out);
            if n > 0 {
                self.give_back(slabs, desc[0]);
                return Ok(n);
            }
        }
        let taken = match self.take_page() {
            Ok(taken) => taken,
            Err(why) => {
                self.give_back(slabs, desc[0]);
                return Err(why);
            }
        };
        chain.pages += 1;
        let slab = self.make_meta_slab(
            self.buddy_cache(),
            taken.pfn,
            self.pages.phys(desc[0]),
            false,
        );
        let spare = self.describe_rest(&taken, 1, slab);
        let n = self.take_and_list(self.buddy_cache(), slab, out);
        self.put(spare);
        Ok(n)
    }

    /// A slab of `struct slab`s that describes itself: the recursion stops here.
    fn __alloc_slab(&self, chain: &mut Chain, out: &mut [*mut u8]) -> Result<usize, AllocError> {
        chain.depth += 1;
        if self.pages.platform.should_fail(FaultPoint::NewSlab) {
            return Err(AllocError::Injected);
        }
        let taken = self.take_page()?;
        let slabs = self.slab_cache();
        // The first object of the page is the `struct slab` of the page itself, for good.
        let own = taken.pfn.phys();
        chain.pages += 1;
        let slab = self.make_meta_slab(slabs, taken.pfn, own, true);
        slab.take(&self.pages.map, 1, |index| debug_assert_eq!(index, 0));
        let mut spare = DescList::new();
        if taken.pages >= 2 {
            // The second page: a slab of buddies, described by the first page's second object.
            chain.pages += 1;
            let mut second = PhysAddr(0);
            slab.take(&self.pages.map, 1, |index| {
                second = PhysAddr(own.0 + slabs.geometry.offset(index) as u64);
            });
            let buddies = self.make_meta_slab(self.buddy_cache(), taken.pfn.add(1), second, false);
            spare = self.describe_rest(&taken, 2, buddies);
            self.take_and_list(self.buddy_cache(), buddies, &mut []);
        } else if let Some(word) = taken.word {
            spare.push(&self.pages.map, word.desc());
        }
        {
            // What is out already counts as in use: the page's own descriptor, and the second page's.
            self.lists(slabs).inuse += slab.inuse() as u64;
        }
        let n = self.take_and_list(slabs, slab, out);
        let pin = self.pages.pin();
        self.pages.stats(&pin).add(&pin, Event::AllocSlabStop, 1);
        drop(pin);
        if !spare.is_empty() {
            self.put(spare);
        }
        Ok(n)
    }

    /// A slab in a page that no request was made for.
    fn make_meta_slab(
        &self,
        core: &CacheCore,
        pfn: Pfn,
        desc: PhysAddr,
        self_described: bool,
    ) -> &Slab {
        let pin = self.pages.pin();
        let stats = self.pages.stats(&pin);
        stats.add(&pin, Event::MetaPage, 1);
        stats.block_out(&pin, PageType::Slab, 0);
        drop(pin);
        self.make_slab(core, pfn, desc, self_described, 0)
    }

    /// A page to be had without descriptors: from this CPU's list, or the smallest block.
    fn take_page(&self) -> Result<Smallest, AllocError> {
        if let Some(block) = self.pages.pop_page() {
            return Ok(Smallest {
                pfn: block.pfn,
                pages: 1,
                order: 0,
                word: Some(block.word),
            });
        }
        self.pages.take_smallest()
    }

    /// Describes all but the first `kept` pages of a block with buddies from this slab, and frees them. What descriptor is
    /// left over comes back.
    fn describe_rest(&self, taken: &Smallest, kept: u32, slab: &Slab) -> DescList {
        let map = &self.pages.map;
        let core = self.buddy_cache();
        let mut spare = DescList::new();
        let rest = taken.pages - kept.min(taken.pages);
        if rest > 0 {
            let base = slab.pfn().phys();
            // 2^n - kept pages are at most n blocks.
            slab.take(map, MAX_ORDER, |index| {
                spare.push(map, PhysAddr(base.0 + core.geometry.offset(index) as u64));
            });
            self.lists(core).inuse += spare.len() as u64;
        }
        self.pages.return_rest(taken, kept, &mut spare);
        if let Some(word) = taken.word {
            spare.push(map, word.desc());
        }
        spare
    }

    /// One object straight back to its slab.
    fn give_back(&self, core: &CacheCore, object: *mut u8) {
        if !object.is_null() {
            self.slabs_give(core, &[object], true, core::panic::Location::caller());
        }
    }
}
