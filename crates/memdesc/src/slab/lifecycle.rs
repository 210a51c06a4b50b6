//! The life of a cache: create, use, shrink, destroy.

use core::marker::PhantomData;
use core::panic::Location;
use core::ptr::NonNull;

use super::cache::{Cache, CacheCore, CacheFlags, CacheView, DestroyError, Geometry, Role};
use super::init::init_flags;
use super::sheaf::Sheaves;
use crate::error::AllocError;
use crate::gfp::{self, Flags};
use crate::mm::Mm;
use crate::platform::Platform;
use crate::report::Corruption;
use crate::sync::atomic::Ordering;

impl<P: Platform> Mm<P> {
    pub(crate) fn create_cache(
        &self,
        name: &str,
        size: usize,
        align: usize,
        flags: CacheFlags,
        ctor: Option<fn(NonNull<u8>)>,
    ) -> Result<Cache<'_>, AllocError> {
        let geometry = Geometry::new(
            size,
            align,
            flags,
            ctor.is_some() || flags.contains(CacheFlags::TYPESAFE_BY_RCU),
        )
        .ok_or(AllocError::BadSize)?;
        let memory = self.cache_alloc(self.cache_cache(), gfp::GFP_KERNEL, Location::caller())?;
        let capacity = if flags.intersects(CacheFlags::DEBUG | CacheFlags::NO_SHEAVES) {
            0
        } else {
            Sheaves::capacity_for(size)
        };
        let sheaves = if capacity == 0 {
            Sheaves::none()
        } else {
            // A power of two from 64 up is aligned to 64 in its class, and larger ones are pages.
            let bytes = Sheaves::bytes(capacity, self.pages.platform.nr_cpus()).next_power_of_two();
            match self.kmalloc(bytes.max(64), gfp::GFP_KERNEL | gfp::__GFP_ZERO) {
                // SAFETY: zeroed, 64-byte aligned, ours until the cache is destroyed.
                Ok(sheaves) => unsafe { Sheaves::new(sheaves, capacity) },
                Err(why) => {
                    self.cache_free(
                        self.pages.free_path(),
                        self.cache_cache(),
                        memory,
                        false,
                        Location::caller(),
                    );
                    return Err(why);
                }
            }
        };
        let mut gfp = Flags::EMPTY;
        if flags.contains(CacheFlags::RECLAIM_ACCOUNT) {
            gfp |= gfp::__GFP_RECLAIMABLE;
        }
        if flags.contains(CacheFlags::CACHE_DMA) {
            gfp |= gfp::__GFP_DMA;
        }
        let core = memory.cast::<CacheCore>();
        let value = CacheCore::new(
            name,
            geometry,
            flags | init_flags(self.pages.services, flags, Role::Objects, ctor.is_some()),
            gfp,
            Role::Objects,
            ctor,
            sheaves,
            self.id(),
        );
        // SAFETY: an object of the cache of caches is ours, of the right size and alignment.
        unsafe { core.write(value) };
        let mut list = self.slab_mutex();
        // SAFETY: just written.
        unsafe { core.as_ref() }
            .next
            .store(list.head, Ordering::Relaxed);
        list.head = core.as_ptr();
        drop(list);
        Ok(Cache {
            core,
            _mm: PhantomData,
        })
    }

    pub(crate) fn checked<'c>(&self, cache: &'c Cache<'_>) -> &'c CacheCore {
        let core = cache.core();
        assert!(
            core.owner == self.id(),
            "cache {} belongs to another memory manager",
            core.name()
        );
        core
    }

    /// An object of a cache (`kmem_cache_alloc`). With `__GFP_ZERO` it reads zero.
    ///
    /// # Context
    ///
    /// With `__GFP_DIRECT_RECLAIM` it may sleep; else any context that may pin a CPU.
    ///
    /// # Errors
    ///
    /// Why there was no memory; [`AllocError::Limit`] and [`AllocError::NoOwners`] if it is to be charged and cannot be.
    ///
    /// # Panics
    ///
    /// If the cache belongs to another memory manager.
    #[inline]
    #[track_caller]
    pub fn kmem_cache_alloc(
        &self,
        cache: &Cache<'_>,
        gfp: Flags,
    ) -> Result<NonNull<u8>, AllocError> {
        let core = self.checked(cache);
        let charged = core.flags.has_owners() || gfp.contains(gfp::__GFP_ACCOUNT);
        if charged || self.kfence.samples() {
            return self.cache_alloc_charged(core, gfp, Location::caller());
        }
        self.cache_alloc(core, gfp, Location::caller())
    }

    /// Gives an object back (`kmem_cache_free`).
    ///
    /// # Safety
    ///
    /// `object` is from this cache, and nobody uses it any more.
    ///
    /// # Context
    ///
    /// Any that may pin a CPU. Allocates nothing, does not wait, cannot fail.
    #[inline]
    #[track_caller]
    pub unsafe fn kmem_cache_free(&self, cache: &Cache<'_>, object: NonNull<u8>) {
        let core = self.checked(cache);
        let path = self.pages.free_path();
        let deferred = self.pages.stats(path.pin()).deferred().any();
        self.cache_free(path, core, object, false, Location::caller());
        if deferred {
            self.free_deferred();
        }
    }

    /// As many objects as `out` has room for, or none (`kmem_cache_alloc_bulk`).
    ///
    /// # Errors
    ///
    /// Why there was no memory; no object is handed out then, and `out` holds nothing of use.
    #[track_caller]
    pub fn kmem_cache_alloc_bulk(
        &self,
        cache: &Cache<'_>,
        gfp: Flags,
        out: &mut [*mut u8],
    ) -> Result<(), AllocError> {
        let core = self.checked(cache);
        let caller = Location::caller();
        let mut n = 0;
        while n < out.len() {
            // By the slab, past the sheaf, where many are wanted.
            let rest = &mut out[n..];
            let taken = if core.flags.has_owners() || gfp.contains(gfp::__GFP_ACCOUNT) {
                self.cache_alloc_charged(core, gfp, caller).map(|object| {
                    rest[0] = object.as_ptr();
                    1
                })
            } else if let Some(sampled) = self.kfence_object(core, gfp, caller) {
                sampled.map(|object| {
                    rest[0] = object.as_ptr();
                    1
                })
            } else if core.is_debug() || rest.len() < core.sheaves.capacity() / 2 {
                self.cache_alloc(core, gfp, caller).map(|object| {
                    rest[0] = object.as_ptr();
                    1
                })
            } else {
                // Those that are set aside one by one.
                let some = self.slabs_take(core, gfp, rest).or_else(|why| {
                    rest[0] = self.entitled_object(core, gfp, why)?.as_ptr();
                    Ok(1)
                });
                some.inspect(|&taken| {
                    for object in rest[..taken].iter().filter_map(|o| NonNull::new(*o)) {
                        self.on_alloc(
                            core,
                            object,
                            gfp,
                            core.geometry.object_size as usize,
                            caller,
                        );
                    }
                    let pin = self.pages.pin();
                    self.pages
                        .stats(&pin)
                        .add(&pin, crate::stats::Event::SlabAlloc, taken as u64);
                })
            };
            match taken {
                Ok(taken) => n += taken,
                Err(why) => {
                    // SAFETY: these were handed out just now and nobody has seen them.
                    unsafe { self.kmem_cache_free_bulk(cache, &out[..n]) };
                    return Err(why);
                }
            }
        }
        Ok(())
    }

    /// Gives many objects back, in as few holds of the list lock as it takes (`kmem_cache_free_bulk`).
    ///
    /// # Safety
    ///
    /// Each is as [`kmem_cache_free`](Self::kmem_cache_free) wants it.
    #[track_caller]
    pub unsafe fn kmem_cache_free_bulk(&self, cache: &Cache<'_>, objects: &[*mut u8]) {
        let core = self.checked(cache);
        let caller = Location::caller();
        let path = self.pages.free_path();
        let one_by_one = core.is_debug()
            || core.flags.has_owners()
            || core.reserved.load(Ordering::Relaxed) != 0
            || self.kfence.contains_any(objects);
        if one_by_one || objects.len() < core.sheaves.capacity() / 2 {
            for object in objects.iter().filter_map(|o| NonNull::new(*o)) {
                self.cache_free(self.pages.free_path(), core, object, false, caller);
            }
        } else {
            let stats = self.pages.stats(path.pin());
            stats.add(
                path.pin(),
                crate::stats::Event::SlabFree,
                objects.len() as u64,
            );
            let _path = self.pages.may_sleep(path);
            for batch in objects.chunks(64) {
                self.slabs_give(core, batch, false, caller);
            }
        }
    }

    /// Gives back a cache's empty slabs, sheaves flushed first (`kmem_cache_shrink`). Says how many pages.
    ///
    /// # Context
    ///
    /// May wait for other CPUs.
    pub fn kmem_cache_shrink(&self, cache: &Cache<'_>) -> usize {
        self.cache_shrink(self.checked(cache))
    }

    /// Takes a cache down (`kmem_cache_destroy`).
    ///
    /// # Context
    ///
    /// May wait for other CPUs, for [`Mm::shrink`] and the views to end, and for grace periods: deferred frees of its objects that are
    /// in flight are seen through. Where the platform says that the caller may not sleep, or is a reader, they count as live.
    ///
    /// # Errors
    ///
    /// Objects are live, or a reserve is made for such: the cache stays, and comes back with their number. [`live_objects`](Self::live_objects) names them.
    pub fn kmem_cache_destroy<'m>(&self, cache: Cache<'m>) -> Result<(), DestroyError<'m>> {
        let core = self.checked(&cache);
        // Frees in flight, by whatever form; and slabs on their way out.
        self.free_all_deferred();
        if self.may_wait() {
            self.kvfree_rcu_barrier();
        }
        self.kfence_barrier();
        {
            // Reclaim on another CPU shrinks all caches under this lock; what it takes out of a sheaf would look live.
            let mut list = self.slab_mutex();
            self.cache_shrink(core);
            let (live, slabs) = {
                let lists = self.lists(core);
                (lists.inuse, lists.nr_slabs())
            };
            if live > 0 || slabs > 0 || core.reserves.load(Ordering::Relaxed) > 0 {
                drop(list);
                return Err(DestroyError { cache, live });
            }
            if list.head == cache.core.as_ptr() {
                list.head = core.next.load(Ordering::Relaxed);
            } else {
                let mut at = list.head;
                while let Some(other) = NonNull::new(at) {
                    // SAFETY: caches in the list live until they are unlinked under this lock.
                    let other = unsafe { other.as_ref() };
                    let next = other.next.load(Ordering::Relaxed);
                    if next == cache.core.as_ptr() {
                        other
                            .next
                            .store(core.next.load(Ordering::Relaxed), Ordering::Relaxed);
                        break;
                    }
                    at = next;
                }
            }
        }
        if core.is_type_stable() {
            // Readers may still look at its slabs, and those lead here.
            self.discard_all();
        }
        if let Some(memory) = core.sheaves.memory() {
            // SAFETY: the sheaves were kmalloc'd with the cache, and nobody uses a cache that is being destroyed.
            unsafe { self.kfree(memory) };
        }
        self.cache_free(
            self.pages.free_path(),
            self.cache_cache(),
            cache.core.cast(),
            false,
            Location::caller(),
        );
        Ok(())
    }

    /// Visits the live objects of a cache: address, and who allocated it if that is recorded. Objects in sheaves are not
    /// live; shrink first for an exact answer.
    pub fn live_objects(
        &self,
        cache: &Cache<'_>,
        mut visit: impl FnMut(*const u8, Option<crate::report::Track>),
    ) {
        let core = self.checked(cache);
        let map = &self.pages.map;
        let lists = self.lists(core);
        for mut at in lists.by_share.map(|list| list.head) {
            while at != crate::address::Pfn::NONE {
                let slab = super::cache::slab_of(map, at);
                let base = map.virt(slab.pfn().phys());
                for index in (0..slab.objects()).filter(|&i| !slab.is_free(map, i)) {
                    let object = base.wrapping_add(core.offset_in(slab, index));
                    let track = match self.kfence.slot_of(object) {
                        Some((_, slot)) => slot.tracks().0,
                        None => NonNull::new(object).and_then(|o| super::debug::tracks(core, o).0),
                    };
                    visit(object, track);
                }
                at = slab.links().next();
            }
        }
    }

    /// Reports every live object of a cache that should have none, as `kmem_cache_destroy` in Linux prints them.
    pub fn report_leaks(&self, cache: &Cache<'_>) {
        let core = self.checked(cache);
        let mut first = None;
        self.live_objects(cache, |object, _| {
            first.get_or_insert(object);
        });
        if let Some(object) = first {
            self.report_object(
                Corruption::ObjectsLeft,
                Some(core),
                object,
                Location::caller(),
            );
        }
    }

    /// Visits all caches: the slabinfo view. `visit` may not create or destroy caches.
    pub fn slabinfo(&self, mut visit: impl FnMut(CacheView<'_>)) {
        self.for_each_cache(|core| visit(self.view(core)));
    }

    pub(crate) fn view<'a>(&self, core: &'a CacheCore) -> CacheView<'a> {
        let in_sheaves = if core.sheaves.capacity() == 0 {
            0
        } else {
            (0..self.pages.platform.nr_cpus())
                .map(|cpu| {
                    core.sheaves
                        .remote(&self.pages.platform, cpu, |stack| stack.len() as u64)
                })
                .sum()
        };
        let lists = self.lists(core);
        let num_slabs = u64::from(lists.nr_slabs());
        let geometry = &core.geometry;
        CacheView {
            name: core.name(),
            active_objs: lists.inuse.saturating_sub(in_sheaves),
            num_objs: lists.objects,
            object_size: geometry.object_size as usize,
            size: geometry.size as usize,
            objs_per_slab: geometry.objects as usize,
            pages_per_slab: 1 << geometry.order,
            pages: lists.pages,
            num_slabs,
            active_slabs: num_slabs - u64::from(lists.nr_empty),
            in_sheaves,
            metadata: core.is_metadata(),
        }
    }
}
