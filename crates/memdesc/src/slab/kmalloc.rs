//! kmalloc: size classes over caches, and pages for what is larger.

use core::panic::Location;
use core::ptr::NonNull;

use super::cache::CacheCore;
use super::debug;
use super::object::Caller;
use crate::address::{MAX_ORDER, PAGE_SHIFT, PAGE_SIZE, Pfn};
use crate::error::AllocError;
use crate::gfp::{self, Flags};
use crate::memcg::{Charge, MemcgStat};
use crate::memmap::{DescClass, Found, PageType};
use crate::mm::Mm;
use crate::page_alloc::nolock::Try;
use crate::platform::Platform;
use crate::report::Corruption;

/// The largest size served by a cache; above it, pages.
pub const KMALLOC_MAX_CACHE_SIZE: usize = 8192;

/// The largest size that is charged as an object; above it, pages: their vector of owners costs nothing.
const KMALLOC_MAX_CHARGED_SIZE: usize = 2048;

/// Flags of requests that other caches serve.
const NOT_NORMAL: Flags = Flags::from_bits(
    gfp::__GFP_DMA.bits()
        | gfp::__GFP_RECLAIMABLE.bits()
        | gfp::__GFP_RCU_PREPAID.bits()
        | gfp::__GFP_ACCOUNT.bits(),
);

/// The size classes.
pub(crate) const CLASSES: [usize; 13] = [
    8, 16, 32, 64, 96, 128, 192, 256, 512, 1024, 2048, 4096, 8192,
];

/// The kinds of kmalloc cache (`enum kmalloc_cache_type`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(usize)]
pub(crate) enum Kind {
    Normal = 0,
    Reclaim = 1,
    Dma = 2,
    /// Objects whose deferred free is paid for.
    Prepaid = 3,
    /// Objects that somebody is charged for. Their deferred free is paid for as well: their slabs have bits before the objects in any case.
    Cgroup = 4,
}

impl Kind {
    pub(crate) const COUNT: usize = 5;
    pub(crate) const ALL: [Kind; 5] = [
        Kind::Normal,
        Kind::Reclaim,
        Kind::Dma,
        Kind::Prepaid,
        Kind::Cgroup,
    ];

    pub(crate) const fn prefix(self) -> &'static str {
        match self {
            Kind::Normal => "kmalloc-",
            Kind::Reclaim => "kmalloc-rcl-",
            Kind::Dma => "dma-kmalloc-",
            Kind::Prepaid => "kmalloc-rcu-",
            Kind::Cgroup => "kmalloc-cg-",
        }
    }

    #[inline]
    pub(crate) fn of(gfp: Flags) -> Kind {
        if !gfp.intersects(gfp::__GFP_DMA | gfp::__GFP_RECLAIMABLE | gfp::__GFP_RCU_PREPAID) {
            Kind::Normal
        } else if gfp.contains(gfp::__GFP_RCU_PREPAID) {
            Kind::Prepaid
        } else if gfp.contains(gfp::__GFP_DMA) {
            Kind::Dma
        } else {
            Kind::Reclaim
        }
    }
}

/// The class of sizes up to 192, by eighths (`kmalloc_size_index`).
const SMALL: [u8; 24] = {
    let mut table = [0; 24];
    let mut i = 0;
    while i < 24 {
        let mut class = 0;
        while CLASSES[class] < (i + 1) * 8 {
            class += 1;
        }
        table[i] = class as u8;
        i += 1;
    }
    table
};

/// Which class serves this size; `None` above the largest.
#[inline]
pub(crate) const fn class_of(size: usize) -> Option<usize> {
    match size {
        0 => None,
        1..=192 => Some(SMALL[(size - 1) >> 3] as usize),
        193..=256 => Some(7),
        257..=KMALLOC_MAX_CACHE_SIZE => Some(7 + (size - 1).ilog2() as usize - 7),
        _ => None,
    }
}

/// The order of pages for a size that no class serves.
pub(crate) fn large_order(size: usize) -> Result<usize, AllocError> {
    if size == 0 || size > PAGE_SIZE << MAX_ORDER {
        return Err(AllocError::BadSize);
    }
    Ok(size.div_ceil(PAGE_SIZE).next_power_of_two().ilog2() as usize)
}

/// What memory of this size is aligned to.
const fn promised(size: usize) -> usize {
    if size.is_power_of_two() && size > 8 {
        size
    } else {
        8
    }
}

/// What a kmalloc pointer leads to.
pub(crate) enum Where<'a> {
    Object(&'a CacheCore),
    Pages(Found),
}

impl<P: Platform> Mm<P> {
    /// `size` bytes of contiguous memory (`kmalloc`), aligned to 8, and for a power of two to the size up to a page.
    ///
    /// # Context
    ///
    /// With `__GFP_DIRECT_RECLAIM` it may sleep; else any context that may pin a CPU.
    ///
    /// # Errors
    ///
    /// [`AllocError::BadSize`] for 0 and for more than 4 MiB; [`AllocError::NoZone`] for prepaid or charged objects from ZONE_DMA;
    /// [`AllocError::Limit`] if it does not fit who is charged; else why there was no memory.
    #[inline]
    #[track_caller]
    pub fn kmalloc(&self, size: usize, gfp: Flags) -> Result<NonNull<u8>, AllocError> {
        let caller = Location::caller();
        let got = match class_of(size) {
            Some(class) if !gfp.intersects(NOT_NORMAL) && !self.kfence.samples() => {
                self.kmalloc_in(self.kmalloc_cache(Kind::Normal, class), size, gfp, caller)
            }
            Some(class) => self.kmalloc_other(class, size, gfp, caller),
            None if gfp.contains(gfp::__GFP_FAST_TRY) => self.try_large(size, gfp, Try::Lists),
            None => self.kmalloc_large(size, gfp),
        };
        match got {
            Err(why) => self.entitled_kmalloc(size, gfp, why, caller),
            got => got,
        }
    }

    #[inline]
    fn kmalloc_in(
        &self,
        core: &CacheCore,
        size: usize,
        gfp: Flags,
        caller: Caller,
    ) -> Result<NonNull<u8>, AllocError> {
        if core.is_debug() {
            return self.kmalloc_debug(core, size, gfp, caller);
        }
        self.cache_alloc(core, gfp, caller)
    }

    /// From the guarded pool, if it is this allocation's turn.
    #[inline]
    fn kmalloc_sampled(
        &self,
        core: &CacheCore,
        size: usize,
        gfp: Flags,
        caller: Caller,
    ) -> Result<NonNull<u8>, AllocError> {
        if self.kfence.samples()
            && let Some(sampled) = self.kfence_alloc(core, size, promised(size), gfp, caller)
        {
            return sampled;
        }
        self.kmalloc_in(core, size, gfp, caller)
    }

    /// What is not of the normal kind, and all while some are guarded.
    #[inline(never)]
    fn kmalloc_other(
        &self,
        class: usize,
        size: usize,
        gfp: Flags,
        caller: Caller,
    ) -> Result<NonNull<u8>, AllocError> {
        if gfp.contains(gfp::__GFP_RCU_PREPAID | gfp::__GFP_DMA) {
            return Err(AllocError::NoZone);
        }
        let memcg = self.memcg_for(gfp);
        if memcg == 0 {
            let core = self.kmalloc_cache(Kind::of(gfp), class);
            return self.kmalloc_sampled(core, size, gfp, caller);
        }
        if gfp.contains(gfp::__GFP_DMA) {
            return Err(AllocError::NoZone);
        }
        if CLASSES[class] > KMALLOC_MAX_CHARGED_SIZE {
            // The vector would take an object's place; pages are charged for nothing.
            return if gfp.contains(gfp::__GFP_FAST_TRY) {
                self.try_large(size, gfp, Try::Lists)
            } else {
                self.kmalloc_large(size, gfp)
            };
        }
        let core = self.kmalloc_cache(Kind::Cgroup, class);
        let charge = self.charge_object(core, memcg, gfp)?;
        let object = self.kmalloc_sampled(core, size, gfp, caller)?;
        self.keep_charge(core, object, charge);
        Ok(object)
    }

    /// Checks and marks an object of kmalloc that did not come the ordinary way.
    pub(crate) fn finish_kmalloc(
        &self,
        core: &CacheCore,
        object: NonNull<u8>,
        size: usize,
        gfp: Flags,
        caller: Caller,
    ) {
        if !core.is_debug() {
            return self.on_alloc(core, object, gfp, size, caller);
        }
        let whole = core.geometry.object_size as usize;
        self.on_alloc(core, object, gfp & !gfp::__GFP_ZERO, whole, caller);
        self.kmalloc_marked(core, object, size, gfp);
    }

    /// Whom an allocation with these flags is charged to.
    #[inline]
    pub(crate) fn memcg_for(&self, gfp: Flags) -> u16 {
        if gfp.contains(gfp::__GFP_ACCOUNT) {
            self.active_memcg()
        } else {
            0
        }
    }

    /// A debug cache learns how much of the object was asked for.
    #[cold]
    fn kmalloc_debug(
        &self,
        core: &CacheCore,
        size: usize,
        gfp: Flags,
        caller: Caller,
    ) -> Result<NonNull<u8>, AllocError> {
        let object = self.cache_alloc(
            core,
            Flags::from_bits(gfp.bits() & !gfp::__GFP_ZERO.bits()),
            caller,
        )?;
        self.kmalloc_marked(core, object, size, gfp);
        Ok(object)
    }

    fn kmalloc_marked(&self, core: &CacheCore, object: NonNull<u8>, size: usize, gfp: Flags) {
        debug::on_resize(core, object, size);
        if gfp.contains(gfp::__GFP_ZERO) {
            // SAFETY: the object is the caller's until he hands it out, and has at least `size` bytes.
            unsafe { object.write_bytes(0, size) };
        }
    }

    #[cold]
    #[inline(never)]
    #[track_caller]
    fn kmalloc_large(&self, size: usize, gfp: Flags) -> Result<NonNull<u8>, AllocError> {
        let order = large_order(size)?;
        let (memcg, stat) = (self.memcg_for(gfp), MemcgStat::Kernel);
        let charge = self.charge_pages(memcg, gfp, order, stat)?;
        let block = self
            .pages
            .alloc_block(PageType::LargeKmalloc, gfp, order, None, self)?;
        let word = self.own_block(block, DescClass::Buddy, PageType::LargeKmalloc, Some(gfp))?;
        let word = self.pages.set_memcg(word, charge.map_or(0, Charge::keep));
        self.pages.map.publish_block(block.pfn, word);
        let ptr = self.pages.map.virt(block.pfn.phys());
        NonNull::new(ptr).ok_or(AllocError::NoBlock)
    }

    pub(crate) fn where_is(&self, ptr: *const u8) -> Result<Where<'_>, Corruption> {
        let phys = self.pages.map.phys(ptr);
        let pfn = u32::try_from(phys.0 >> PAGE_SHIFT).map_err(|_| Corruption::NotRam)?;
        let found = self.pages.map.lookup(Pfn(pfn)).ok_or(Corruption::NotRam)?;
        match found.word.kind() {
            PageType::Slab => {
                if self.pages.map.checks.on() {
                    let slab = self.pages.map.slab_behind(phys);
                    let core = slab.and_then(|(slab, _)| self.cache_at(slab.cache_ptr()));
                    return core.map(Where::Object).ok_or(Corruption::BadWord);
                }
                let cache = self.pages.map.slab_at(found.word.desc()).cache();
                // SAFETY: the cache of a slab lives as long as the slab, which the caller's object keeps.
                Ok(Where::Object(unsafe { cache.as_ref() }))
            }
            PageType::LargeKmalloc if phys == found.head.phys() => Ok(Where::Pages(found)),
            PageType::LargeKmalloc => Err(Corruption::NotAHead),
            PageType::Free => Err(Corruption::DoubleFree),
            _ => Err(Corruption::WrongType),
        }
    }

    /// Frees what [`kmalloc`](Self::kmalloc) or a cache gave (`kfree`). A stale or wild pointer is reported to the platform if
    /// the memory map can tell.
    ///
    /// # Safety
    ///
    /// `ptr` is from this memory manager, and nobody uses the memory any more.
    ///
    /// # Context
    ///
    /// Any that may pin a CPU. Allocates nothing, does not wait, cannot fail.
    #[inline]
    #[track_caller]
    pub unsafe fn kfree(&self, ptr: NonNull<u8>) {
        let caller = Location::caller();
        let path = self.pages.free_path();
        let deferred = self.pages.stats(path.pin()).deferred().any();
        match self.where_is(ptr.as_ptr()) {
            Ok(Where::Object(core)) => self.cache_free(path, core, ptr, false, caller),
            Ok(Where::Pages(found)) if found.word.is_reserve() => {
                self.reserve_pages_back(found.head, found.word);
            }
            Ok(Where::Pages(found)) => self.take_back(path, found.head, found.word),
            Err(what) => self.report_object(what, None, ptr.as_ptr(), caller),
        }
        if deferred {
            self.free_deferred();
        }
    }

    /// Usable bytes behind a kmalloc pointer (`ksize`): the class's size, or what was asked for if it is from the guarded pool.
    ///
    /// # Safety
    ///
    /// `ptr` is live memory from [`kmalloc`](Self::kmalloc).
    pub unsafe fn ksize(&self, ptr: NonNull<u8>) -> usize {
        match self.where_is(ptr.as_ptr()) {
            Ok(Where::Object(core)) => match self.kfence.slot_of(ptr.as_ptr()) {
                // It is free.
                Some(_) if core.is_metadata() => 0,
                Some((_, slot)) => slot.size(),
                None => core.geometry.object_size as usize,
            },
            Ok(Where::Pages(found)) => PAGE_SIZE << found.word.order(),
            Err(_) => 0,
        }
    }

    /// Makes an allocation larger or smaller, in place if the class allows it (`krealloc`). Bytes up to the smaller of both
    /// sizes are kept; with `__GFP_ZERO` the rest of the class reads zero if it did before.
    ///
    /// # Safety
    ///
    /// `ptr` is live memory from [`kmalloc`](Self::kmalloc). If this succeeds with another pointer, the old one is freed.
    ///
    /// # Errors
    ///
    /// As [`kmalloc`](Self::kmalloc); the old memory then is as it was.
    #[track_caller]
    pub unsafe fn krealloc(
        &self,
        ptr: NonNull<u8>,
        size: usize,
        gfp: Flags,
    ) -> Result<NonNull<u8>, AllocError> {
        // SAFETY: the caller's promise.
        let had = match unsafe { self.resize_in_place(ptr, size, gfp) } {
            Ok(()) => return Ok(ptr),
            Err(had) => had,
        };
        let new = self.kmalloc(size, gfp)?;
        // SAFETY: both are live, distinct, and at least this long; the old one is the caller's to give up.
        unsafe {
            ptr.copy_to_nonoverlapping(new, had.min(size));
            self.kfree(ptr);
        }
        Ok(new)
    }

    /// Makes an allocation larger or smaller where it is; if it has no room there, or far too much, how many of its bytes are the caller's.
    ///
    /// # Safety
    ///
    /// As [`krealloc`](Self::krealloc).
    pub(crate) unsafe fn resize_in_place(
        &self,
        ptr: NonNull<u8>,
        size: usize,
        gfp: Flags,
    ) -> Result<(), usize> {
        // SAFETY: the caller's promise.
        let old = unsafe { self.ksize(ptr) };
        // Of a debug cache's object what was asked for: behind it is red zone, not what the caller left there.
        let debug = match self.where_is(ptr.as_ptr()) {
            Ok(Where::Object(core)) if core.is_debug() && !self.kfence.contains(ptr.as_ptr()) => {
                Some(core)
            }
            _ => None,
        };
        let asked = debug.and_then(|core| debug::asked(core, ptr));
        let fits = size != 0 && size <= old && (size > old / 2 || old <= 8);
        if !fits {
            return Err(asked.unwrap_or(old));
        }
        if let Some(core) = debug {
            let had = asked.unwrap_or(size);
            debug::on_resize(core, ptr, size);
            if gfp.contains(gfp::__GFP_ZERO) && had < size {
                // SAFETY: within the object, which is the caller's.
                unsafe { ptr.add(had).write_bytes(0, size - had) };
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes() {
        for size in 1..=KMALLOC_MAX_CACHE_SIZE {
            let class = class_of(size).unwrap();
            assert!(CLASSES[class] >= size, "{size}");
            assert!(
                class == 0 || CLASSES[class - 1] < size,
                "{size} could be smaller"
            );
        }
        assert_eq!(class_of(0), None);
        assert_eq!(class_of(KMALLOC_MAX_CACHE_SIZE + 1), None);
    }
}
