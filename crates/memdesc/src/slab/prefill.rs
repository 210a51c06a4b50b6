//! Prefilled sheaves: "I am about to need at most so many objects, where I cannot wait" (`kmem_cache_prefill_sheaf`, Linux 6.18).
//!
//! ```
//! use memdesc::{*, gfp::*};
//!
//! # let (host, ram) = memdesc_host::Host::small(16384)?;
//! # let mm = Mm::new(host, &Config::default(), &ram)?;
//! let nodes = mm.kmem_cache_create("maple_node", 256, 0, CacheFlags::EMPTY, None)?;
//! // May sleep, may fail.
//! let mut sheaf = mm.kmem_cache_prefill_sheaf(&nodes, GFP_KERNEL, 10)?;
//! // With a lock held, in an interrupt, with no memory left: neither waits nor fails, ten times.
//! let node = sheaf.alloc_from(Flags::EMPTY).expect("ten were asked for");
//! assert_eq!(sheaf.len(), 9);
//! // What was not needed goes back.
//! sheaf.return_sheaf();
//! # // SAFETY: ours.
//! unsafe { mm.kmem_cache_free(&nodes, node) };
//! # mm.kmem_cache_destroy(nodes).expect("all are back");
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! | | Linux | here |
//! |---|---|---|
//! | how many | a sheaf of the cache's capacity; more in one kmalloc'd for it | any number: an array |
//! | caches without sheaves, debug caches | one kmalloc'd, filled one by one | as all others |
//! | a refill that fails | leaves what it got | changes nothing |
//!
//! Objects [rest](super::rest) in here: a debug cache checks and marks each when it is handed out, so the report of a stray write names who got it here. Whom
//! they are charged to is settled when they are taken, since a charge can be refused, and taken back with those that are returned. In slabinfo they are in
//! use.
//!
//! A sheaf takes no lock of its own.

use core::fmt;
use core::panic::Location;
use core::ptr::NonNull;

use super::cache::{Cache, CacheCore, CacheFlags};
use super::object::Caller;
use super::pointers::Pointers;
use crate::error::AllocError;
use crate::gfp::{self, Flags};
use crate::mm::Mm;
use crate::platform::Platform;

/// Objects of a cache that are had already (`struct slab_sheaf`, prefilled). What is left of them goes back when this is dropped.
///
/// # Invariants
///
/// The first `count` of the array are objects of the cache at rest, nobody else's.
#[must_use = "objects that are not wanted go back when it is dropped"]
pub struct PrefilledSheaf<'c, P: Platform> {
    mm: &'c Mm<P>,
    cache: &'c Cache<'c>,
    objects: Pointers,
    count: usize,
    zero: bool,
}

impl<P: Platform> fmt::Debug for PrefilledSheaf<'_, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PrefilledSheaf")
            .field("cache", &self.cache.name())
            .field("len", &self.count)
            .field("capacity", &self.capacity())
            .finish_non_exhaustive()
    }
}

impl<P: Platform> Mm<P> {
    /// A sheaf with `n` objects of the cache, or none at all (`kmem_cache_prefill_sheaf`). With `__GFP_ZERO` all of them read zero when they are handed out.
    ///
    /// # Context
    ///
    /// With `__GFP_DIRECT_RECLAIM` it may sleep; else any context that may pin a CPU.
    ///
    /// # Errors
    ///
    /// Why there was no memory, nothing has changed then; [`AllocError::Limit`] and [`AllocError::NoOwners`] if they are to be charged and cannot be;
    /// [`AllocError::BadSize`] for more than half a million; [`AllocError::Forbidden`] with `__GFP_FAST_TRY`.
    ///
    /// # Panics
    ///
    /// If the cache belongs to another memory manager.
    #[track_caller]
    pub fn kmem_cache_prefill_sheaf<'c>(
        &'c self,
        cache: &'c Cache<'_>,
        gfp: Flags,
        n: usize,
    ) -> Result<PrefilledSheaf<'c, P>, AllocError> {
        self.checked(cache);
        let mut sheaf = PrefilledSheaf {
            mm: self,
            cache,
            objects: Pointers::NONE,
            count: 0,
            zero: gfp.contains(gfp::__GFP_ZERO),
        };
        sheaf.refill(gfp, n)?;
        Ok(sheaf)
    }

    /// Objects at rest, charged to whom these flags and the cache say, or none.
    fn prefill(
        &self,
        core: &CacheCore,
        gfp: Flags,
        out: &mut [*mut u8],
        caller: Caller,
    ) -> Result<(), AllocError> {
        self.objects_at_rest(core, gfp, out, caller)?;
        let wanted = core.flags.contains(CacheFlags::ACCOUNT) || gfp.contains(gfp::__GFP_ACCOUNT);
        let memcg = if wanted { self.active_memcg() } else { 0 };
        if memcg == 0 {
            return Ok(());
        }
        for object in out.iter().filter_map(|o| NonNull::new(*o)) {
            match self.charge_object(core, memcg, gfp) {
                Ok(charge) => self.keep_charge(core, object, charge),
                Err(why) => {
                    self.prefill_returned(core, out, caller);
                    return Err(why);
                }
            }
        }
        Ok(())
    }

    /// Objects of a sheaf go back, and whoever is charged for them no longer is.
    fn prefill_returned(&self, core: &CacheCore, objects: &[*mut u8], caller: Caller) {
        if core.flags.has_owners() {
            for object in objects.iter().filter_map(|o| NonNull::new(*o)) {
                self.uncharge_object(core, object);
            }
        }
        self.rest_over(core, objects, caller);
    }
}

impl<P: Platform> PrefilledSheaf<'_, P> {
    /// An object (`kmem_cache_alloc_from_sheaf`); `None` if there are none left: the cache is not asked. Of the flags only `__GFP_ZERO` means anything.
    ///
    /// # Context
    ///
    /// Any that has the sheaf to itself, an NMI included. Takes no lock, allocates nothing.
    #[inline]
    #[track_caller]
    pub fn alloc_from(&mut self, gfp: Flags) -> Option<NonNull<u8>> {
        let last = self.count.checked_sub(1)?;
        let object = NonNull::new(self.objects.as_slice()[last])?;
        self.count = last;
        let core = self.cache.core();
        let gfp = if self.zero {
            gfp | gfp::__GFP_ZERO
        } else {
            gfp
        };
        let size = core.geometry.object_size as usize;
        self.mm
            .object_roused(core, object, gfp, size, Location::caller());
        Some(object)
    }

    /// Takes more, so that there are at least `n` (`kmem_cache_refill_sheaf`).
    ///
    /// # Context
    ///
    /// As [`Mm::kmem_cache_prefill_sheaf`].
    ///
    /// # Errors
    ///
    /// As [`Mm::kmem_cache_prefill_sheaf`]; the sheaf is as it was then.
    #[track_caller]
    pub fn refill(&mut self, gfp: Flags, n: usize) -> Result<(), AllocError> {
        let (mm, core, had) = (self.mm, self.cache.core(), self.count);
        if n <= had {
            return Ok(());
        }
        if gfp.contains(gfp::__GFP_FAST_TRY) {
            return Err(AllocError::Forbidden);
        }
        let caller = Location::caller();
        if n <= self.objects.len() {
            mm.prefill(core, gfp, &mut self.objects.as_mut()[had..n], caller)?;
        } else {
            let mut larger = mm.pointers(n, gfp)?;
            if let Err(why) = mm.prefill(core, gfp, &mut larger.as_mut()[had..], caller) {
                mm.free_pointers(larger);
                return Err(why);
            }
            larger.as_mut()[..had].copy_from_slice(&self.objects.as_slice()[..had]);
            mm.free_pointers(core::mem::replace(&mut self.objects, larger));
        }
        self.count = n;
        self.zero |= gfp.contains(gfp::__GFP_ZERO);
        Ok(())
    }

    /// How many objects there are (`kmem_cache_sheaf_size`).
    pub fn len(&self) -> usize {
        self.count
    }

    /// Are there none left?
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// To how many a refill needs no new array.
    pub fn capacity(&self) -> usize {
        self.objects.len()
    }

    /// What is left goes back (`kmem_cache_return_sheaf`), as by dropping it.
    ///
    /// # Context
    ///
    /// Any that may pin a CPU. Allocates nothing, does not wait, cannot fail.
    pub fn return_sheaf(self) {}
}

impl<P: Platform> Drop for PrefilledSheaf<'_, P> {
    fn drop(&mut self) {
        let left = &self.objects.as_slice()[..self.count];
        self.mm
            .prefill_returned(self.cache.core(), left, Location::caller());
        self.mm
            .free_pointers(core::mem::replace(&mut self.objects, Pointers::NONE));
    }
}
