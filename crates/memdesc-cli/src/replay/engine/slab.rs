//! Objects: kmalloc and caches.

use memdesc::gfp::Flags;
use memdesc::slab::KMALLOC_MAX_CACHE_SIZE;
use memdesc::{AllocError, CacheFlags, Event as Counter};
use memdesc_trace::{CacheId, CacheTable};

use super::super::counts::reason;
use super::super::latency::Path;
use super::super::objects::ZERO_SIZE_PTR;
use super::{Engine, MAX_CACHES};
use crate::handles::{Machine, OwnedObject};

impl Engine<'_> {
    #[inline]
    pub(super) fn object_alloc(
        &mut self,
        ptr: u64,
        size: u64,
        alloc: impl FnOnce(&mut Self) -> Result<OwnedObject, AllocError>,
    ) {
        if self.slabs.is_none() {
            self.slab_counts.skipped += 1;
            return;
        }
        if ptr <= ZERO_SIZE_PTR {
            self.slab_counts.linux_failed += 1;
            return;
        }
        // The old object goes first, as it did in Linux.
        if let Some(old) = self.objects.take(ptr) {
            self.slab_counts.free_implied += 1;
            self.free_object(old);
        }
        match alloc(self) {
            Ok(object) => {
                let old = self.objects.put(ptr, object);
                debug_assert!(old.is_none());
                self.slab_counts.allocated += 1;
            }
            Err(why) => {
                self.slab_counts.failed += 1;
                *self
                    .slab_counts
                    .failures
                    .entry((reason(why), size))
                    .or_default() += 1;
            }
        }
    }

    #[inline]
    fn timed_alloc(
        &mut self,
        large: bool,
        alloc: impl FnOnce(&Machine) -> Result<OwnedObject, AllocError>,
    ) -> Result<OwnedObject, AllocError> {
        let before = [Counter::SheafRefill, Counter::SlabNew].map(|c| self.counter(c));
        let start = self.clock.now();
        let result = alloc(self.machine);
        let ticks = self.clock.now().wrapping_sub(start);
        let [refill, new] = [Counter::SheafRefill, Counter::SlabNew].map(|c| self.counter(c));
        let path = if large {
            Path::LargeAlloc
        } else if new != before[1] {
            Path::SlabNew
        } else if refill != before[0] {
            Path::SheafRefill
        } else {
            Path::SheafHit
        };
        if result.is_ok() {
            self.latencies.record(path, ticks);
        }
        result
    }

    #[inline]
    pub(super) fn kmalloc(&mut self, size: usize, gfp: Flags) -> Result<OwnedObject, AllocError> {
        self.timed_alloc(size > KMALLOC_MAX_CACHE_SIZE, |machine| {
            machine.kmalloc(size, gfp)
        })
    }

    #[inline]
    pub(super) fn cache_alloc(
        &mut self,
        id: CacheId,
        table: &CacheTable,
        gfp: Flags,
    ) -> Result<OwnedObject, AllocError> {
        let number = id
            .index()
            .filter(|&n| n < MAX_CACHES)
            .ok_or(AllocError::BadSize)?;
        if self.caches.get(number).is_none_or(Option::is_none) {
            self.create_cache(number, id, table)?;
        }
        // Out of its place for the call, so that the engine is free for the clock.
        let Some(cache) = self.caches[number].take() else {
            return Err(AllocError::BadSize);
        };
        let result = self.timed_alloc(false, |machine| machine.cache_alloc(&cache, number, gfp));
        self.caches[number] = Some(cache);
        result
    }

    /// The cache comes with its first object: same name, same size, and where Linux aligns to cache lines, so do we.
    #[cold]
    fn create_cache(
        &mut self,
        number: usize,
        id: CacheId,
        table: &CacheTable,
    ) -> Result<(), AllocError> {
        let cache = table.get(id).ok_or(AllocError::BadSize)?;
        let size = if cache.bytes_req > 0 {
            cache.bytes_req
        } else {
            cache.bytes_alloc
        };
        let lines = cache.bytes_alloc % 64 == 0 && size > 32;
        let align = if lines { 64 } else { 8 };
        let name = if cache.name.is_empty() {
            "unnamed"
        } else {
            &cache.name
        };
        let made = self.machine.mm.kmem_cache_create(
            name,
            size as usize,
            align,
            CacheFlags::EMPTY,
            None,
        )?;
        if self.caches.len() <= number {
            self.caches.resize_with(number + 1, || None);
        }
        self.caches[number] = Some(made);
        self.slab_counts.caches += 1;
        Ok(())
    }

    #[inline]
    pub(super) fn object_free(&mut self, ptr: u64) {
        if self.slabs.is_none() {
            self.slab_counts.skipped += 1;
        } else if ptr <= ZERO_SIZE_PTR {
            self.slab_counts.free_null += 1;
        } else if let Some(object) = self.objects.take(ptr) {
            self.free_object(object);
        } else {
            self.slab_counts.free_unseen += 1;
        }
    }

    #[inline]
    pub(super) fn free_object(&mut self, object: OwnedObject) {
        if let Some(deferred) = &mut self.deferred
            && deferred.takes()
        {
            let cache = object.cache().and_then(|n| self.caches.get(n)?.as_ref());
            deferred.free(object, cache);
            self.slab_counts.freed += 1;
            return;
        }
        let cache = object.cache().and_then(|n| self.caches.get(n)?.as_ref());
        let before = [Counter::SheafFlush, Counter::PgFree].map(|c| self.counter(c));
        let start = self.clock.now();
        self.machine.free_object(object, cache);
        let ticks = self.clock.now().wrapping_sub(start);
        let [flush, pages] = [Counter::SheafFlush, Counter::PgFree].map(|c| self.counter(c));
        let path = if flush != before[0] {
            Path::SheafFlush
        } else if pages != before[1] {
            Path::LargeFree
        } else {
            Path::SheafFree
        };
        self.latencies.record(path, ticks);
        self.slab_counts.freed += 1;
    }
}
