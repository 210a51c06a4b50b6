//! What an element is: pages, an object of a cache, or kmalloc memory; had, put to rest in the pool, roused, given back.

use core::panic::Location;
use core::ptr::NonNull;

use super::pool::MempoolKind;
use crate::address::{MAX_ORDER, PAGE_SIZE, Pfn};
use crate::error::AllocError;
use crate::gfp::{self, Flags};
use crate::memmap::PageType;
use crate::mm::Mm;
use crate::platform::Platform;
use crate::report::Corruption;
use crate::slab::CacheCore;
use crate::slab::kmalloc::{Kind, Where, class_of, large_order};
use crate::slab::object::Caller;

/// Flags that say which pages: the pool's, for all of its elements.
const ZONES: Flags = Flags::from_bits(
    gfp::__GFP_DMA.bits()
        | gfp::__GFP_DMA32.bits()
        | gfp::__GFP_HIGHMEM.bits()
        | gfp::__GFP_MOVABLE.bits()
        | gfp::__GFP_RECLAIMABLE.bits()
        | gfp::__GFP_RCU_PREPAID.bits(),
);

/// How an element is found.
pub(super) enum Element<'a> {
    Object(&'a CacheCore),
    /// Pages, with their order.
    Pages(Pfn, usize),
}

/// What elements of a pool are.
#[derive(Clone, Copy, Debug)]
pub(super) struct Elements<'c> {
    pub(super) kind: MempoolKind<'c>,
    zone: Flags,
    /// Checks are on: it is worth a look at all that lies in the pool whether what is freed is among it.
    pub(super) careful: bool,
}

impl<'c> Elements<'c> {
    /// Of this kind, from where these flags say.
    pub(super) fn new<P: Platform>(
        mm: &Mm<P>,
        kind: MempoolKind<'c>,
        gfp: Flags,
    ) -> Result<Elements<'c>, AllocError> {
        match kind {
            MempoolKind::Pages { order } if order > MAX_ORDER => return Err(AllocError::BadOrder),
            MempoolKind::Kmalloc { size } if class_of(size).is_none() => {
                large_order(size)?;
            }
            _ => {}
        }
        let zone = gfp & ZONES;
        if zone.contains(gfp::__GFP_DMA | gfp::__GFP_RCU_PREPAID) {
            return Err(AllocError::NoZone);
        }
        let debug = match kind {
            MempoolKind::Pages { .. } => false,
            MempoolKind::Slab(cache) => cache.core().is_debug(),
            MempoolKind::Kmalloc { size } => class_of(size)
                .is_some_and(|class| mm.kmalloc_cache(Kind::of(zone), class).is_debug()),
        };
        let careful =
            debug || mm.pages.map.checks.on() || cfg!(any(debug_assertions, feature = "checked"));
        Ok(Elements {
            kind,
            zone,
            careful,
        })
    }

    /// Bytes of an element.
    pub(super) fn size(&self) -> usize {
        match self.kind {
            MempoolKind::Pages { order } => PAGE_SIZE << order,
            MempoolKind::Slab(cache) => cache.object_size(),
            MempoolKind::Kmalloc { size } => size,
        }
    }

    fn flags(&self, gfp: Flags) -> Flags {
        gfp & !ZONES | self.zone
    }

    /// One from ordinary memory.
    #[inline]
    #[track_caller]
    pub(super) fn alloc<P: Platform>(
        &self,
        mm: &Mm<P>,
        gfp: Flags,
    ) -> Result<NonNull<u8>, AllocError> {
        let gfp = self.flags(gfp);
        match self.kind {
            MempoolKind::Pages { order } => {
                let pfn = mm.alloc_pages(gfp, order)?;
                NonNull::new(mm.page_address(pfn)).ok_or(AllocError::NoBlock)
            }
            MempoolKind::Slab(cache) => mm.kmem_cache_alloc(cache, gfp),
            MempoolKind::Kmalloc { size } => mm.kmalloc(size, gfp),
        }
    }

    /// Gives one back to ordinary memory.
    ///
    /// # Safety
    ///
    /// It is such an element, and nobody uses it any more.
    #[inline]
    #[track_caller]
    pub(super) unsafe fn free<P: Platform>(&self, mm: &Mm<P>, element: NonNull<u8>) {
        // SAFETY: the caller's promise.
        unsafe {
            match self.kind {
                MempoolKind::Pages { .. } => mm.free_pages(mm.virt_to_pfn(element.as_ptr())),
                MempoolKind::Slab(cache) => mm.kmem_cache_free(cache, element),
                MempoolKind::Kmalloc { .. } => mm.kfree(element),
            }
        }
    }

    /// The same from any context.
    ///
    /// # Safety
    ///
    /// As [`free`](Self::free).
    unsafe fn free_nolock<P: Platform>(&self, mm: &Mm<P>, element: NonNull<u8>) {
        // SAFETY: the caller's promise.
        unsafe {
            match self.kind {
                MempoolKind::Pages { .. } => mm.free_pages_nolock(mm.virt_to_pfn(element.as_ptr())),
                MempoolKind::Slab(_) | MempoolKind::Kmalloc { .. } => mm.kfree_nolock(element),
            }
        }
    }

    /// Gives back what a request got that failed, had with these flags.
    pub(super) fn give_back<P: Platform>(&self, mm: &Mm<P>, gfp: Flags, out: &[*mut u8]) {
        for element in out.iter().filter_map(|e| NonNull::new(*e)) {
            // SAFETY: had just now, and nobody has seen it.
            unsafe {
                if gfp.contains(gfp::__GFP_FAST_TRY) {
                    self.free_nolock(mm, element);
                } else {
                    self.free(mm, element);
                }
            }
        }
    }

    /// Fills `out` with elements at rest, or none. Nobody is charged for them, and none is guarded.
    #[track_caller]
    pub(super) fn fill<P: Platform>(
        &self,
        mm: &Mm<P>,
        gfp: Flags,
        out: &mut [*mut u8],
    ) -> Result<(), AllocError> {
        let gfp = self.flags(gfp & !(gfp::__GFP_ZERO | gfp::__GFP_ACCOUNT));
        let caller = Location::caller();
        let core = match self.kind {
            MempoolKind::Slab(cache) => Some(cache.core()),
            MempoolKind::Kmalloc { size } => {
                class_of(size).map(|class| mm.kmalloc_cache(Kind::of(gfp), class))
            }
            MempoolKind::Pages { .. } => None,
        };
        if let Some(core) = core {
            return mm.objects_at_rest(core, gfp, out, caller);
        }
        for n in 0..out.len() {
            let got = self.alloc(mm, gfp);
            match got {
                Ok(element) => {
                    self.rests(mm, element, caller);
                    out[n] = element.as_ptr();
                }
                Err(why) => {
                    self.release(mm, &out[..n], caller);
                    return Err(why);
                }
            }
        }
        Ok(())
    }

    /// Is this a live element as these are?
    pub(super) fn check<'a, P: Platform>(
        &self,
        mm: &'a Mm<P>,
        element: *const u8,
    ) -> Result<Element<'a>, Corruption> {
        let core = match self.kind {
            MempoolKind::Pages { order } => {
                let phys = mm.pages.map.phys(element);
                let pfn = Pfn::containing(phys);
                let found = mm.pages.map.lookup(pfn).ok_or(Corruption::NotRam)?;
                return match found.word.kind() {
                    PageType::Free | PageType::None => Err(Corruption::DoubleFree),
                    PageType::Bare if found.head.phys() != phys => Err(Corruption::NotAHead),
                    PageType::Bare if found.word.order() == order => Ok(Element::Pages(pfn, order)),
                    _ => Err(Corruption::WrongType),
                };
            }
            MempoolKind::Slab(cache) => cache.core,
            MempoolKind::Kmalloc { size } => match mm.where_is(element)? {
                Where::Pages(found) if PAGE_SIZE << found.word.order() >= size => {
                    return Ok(Element::Pages(found.head, found.word.order()));
                }
                Where::Object(core) if !core.is_metadata() => {
                    let has = match mm.kfence.slot_of(element) {
                        Some((_, slot)) => slot.size(),
                        None => core.geometry.object_size as usize,
                    };
                    if has < size {
                        return Err(Corruption::WrongType);
                    }
                    NonNull::from(core)
                }
                _ => return Err(Corruption::WrongType),
            },
        };
        // SAFETY: the pool keeps its cache, and kmalloc's caches are there for good.
        let core = unsafe { core.as_ref() };
        let (slab, index) = mm.locate(core, element)?;
        if self.careful {
            let _lists = mm.lists(core);
            if slab.is_free(&mm.pages.map, index) {
                return Err(Corruption::DoubleFree);
            }
        }
        Ok(Element::Object(core))
    }

    /// An element comes into the pool. `false`: it was not fit to, and is left alone.
    pub(super) fn rests<P: Platform>(
        &self,
        mm: &Mm<P>,
        element: NonNull<u8>,
        caller: Caller,
    ) -> bool {
        match self.check(mm, element.as_ptr()) {
            Ok(Element::Object(core)) => mm.object_rests(core, element, caller),
            Ok(Element::Pages(pfn, order)) => {
                mm.pages.pages_rest(pfn, order);
                true
            }
            Err(_) => false,
        }
    }

    /// An element that was in the pool is handed out.
    #[track_caller]
    pub(super) fn roused<P: Platform>(&self, mm: &Mm<P>, element: NonNull<u8>, gfp: Flags) {
        let core = match self.kind {
            MempoolKind::Pages { order } => {
                let pfn = mm.virt_to_pfn(element.as_ptr());
                return mm.pages.pages_roused(pfn, order, gfp);
            }
            MempoolKind::Slab(cache) => cache.core(),
            MempoolKind::Kmalloc { .. } => match mm.where_is(element.as_ptr()) {
                Ok(Where::Object(core)) => core,
                Ok(Where::Pages(found)) => {
                    return mm.pages.pages_roused(found.head, found.word.order(), gfp);
                }
                // It came into the pool as one of the two.
                Err(what) => {
                    return mm.report_object(what, None, element.as_ptr(), Location::caller());
                }
            },
        };
        mm.object_roused(core, element, gfp, self.size(), Location::caller());
    }

    /// Elements that were in the pool go back to ordinary memory.
    #[track_caller]
    pub(super) fn release<P: Platform>(&self, mm: &Mm<P>, elements: &[*mut u8], caller: Caller) {
        for element in elements.iter().filter_map(|e| NonNull::new(*e)) {
            match (self.kind, mm.where_is(element.as_ptr())) {
                (MempoolKind::Slab(cache), _) => {
                    mm.rest_over(cache.core(), &[element.as_ptr()], caller);
                }
                (MempoolKind::Kmalloc { .. }, Ok(Where::Object(core))) => {
                    mm.rest_over(core, &[element.as_ptr()], caller);
                }
                _ => {
                    self.roused(mm, element, Flags::EMPTY);
                    // SAFETY: it was in the pool, so it is nobody's.
                    unsafe { self.free(mm, element) };
                }
            }
        }
    }
}
