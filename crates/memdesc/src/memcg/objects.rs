//! Whom objects are charged to: a vector in their slab, 2 bytes an object (Linux's `slabobj_ext` is 8 or 16).
//!
//! Caches that charge their objects ([`CacheFlags::ACCOUNT`], [`CacheFlags::OWNERS`], and those of kmalloc for `__GFP_ACCOUNT`) leave room for it behind the bits at the
//! start of each slab, so it is there whenever an object is, and nothing has to be allocated for it. A cell is the object's: 0, or
//! whom it is charged to, swapped for 0 by who frees it.

use core::ptr::NonNull;

use super::MemcgStat;
use super::charge::Charge;
use crate::desc::Slab;
use crate::error::AllocError;
use crate::gfp::{self, Flags};
use crate::mm::Mm;
use crate::platform::Platform;
use crate::slab::kmalloc::Where;
use crate::slab::object::Caller;
use crate::slab::{CacheCore, CacheFlags};
use crate::sync::atomic::{AtomicU16, Ordering};

/// Bytes of the vector in a slab of so many objects.
pub(crate) const fn owners_bytes(objects: usize) -> usize {
    (objects * size_of::<AtomicU16>()).next_multiple_of(8)
}

impl CacheFlags {
    /// Do slabs have a vector of owners?
    #[inline]
    pub(crate) const fn has_owners(self) -> bool {
        self.intersects(Self::ACCOUNT) || self.intersects(Self::OWNERS)
    }
}

impl CacheCore {
    /// What one object is charged as (`obj_full_size`).
    fn charged_bytes(&self) -> u64 {
        u64::from(self.geometry.size) + size_of::<AtomicU16>() as u64
    }
}

impl<P: Platform> Mm<P> {
    /// The owners of a slab's objects, of a cache that has them.
    pub(crate) fn owners(&self, core: &CacheCore, slab: &Slab) -> &[AtomicU16] {
        let objects = slab.objects();
        let mut at = 0;
        if core.flags.contains(CacheFlags::RCU_PREPAID) {
            at += crate::rcu::prepaid::bytes(objects);
        }
        debug_assert!(core.flags.has_owners());
        let ptr = self.slab_side(slab).wrapping_add(at);
        // SAFETY: the geometry of such a cache leaves `owners_bytes` there, before the first object, and the pool has as much for a guarded one; zeroed by
        // `owners_init` and only accessed as these atomics as long as the slab lives.
        unsafe { core::slice::from_raw_parts(ptr.cast::<AtomicU16>(), objects) }
    }

    /// A new slab: nobody is charged.
    pub(crate) fn owners_init(&self, core: &CacheCore, slab: &Slab) {
        if core.flags.has_owners() {
            for owner in self.owners(core, slab) {
                owner.store(0, Ordering::Relaxed);
            }
        }
    }

    /// A charge for an object of this cache.
    pub(crate) fn charge_object(
        &self,
        core: &CacheCore,
        memcg: u16,
        gfp: Flags,
    ) -> Result<Option<Charge<'_, P>>, AllocError> {
        let charge = self.memcg_charge(memcg, core.charged_bytes(), MemcgStat::Slab, gfp)?;
        if charge.is_some() && !core.flags.has_owners() {
            return Err(AllocError::NoOwners);
        }
        Ok(charge)
    }

    /// The object is had.
    pub(crate) fn keep_charge(
        &self,
        core: &CacheCore,
        object: NonNull<u8>,
        charge: Option<Charge<'_, P>>,
    ) {
        if let Some(charge) = charge
            && let Ok((slab, index)) = self.locate(core, object.as_ptr())
        {
            // Release: what the charge did comes before what whoever takes it back does. Pairs with the swap below.
            self.owners(core, slab)[index].store(charge.keep(), Ordering::Release);
        }
    }

    /// An object of a cache that charges all of its objects, or that is asked for with `__GFP_ACCOUNT`; or of any while some are guarded.
    #[cold]
    #[inline(never)]
    pub(crate) fn cache_alloc_charged(
        &self,
        core: &CacheCore,
        gfp: Flags,
        caller: Caller,
    ) -> Result<NonNull<u8>, AllocError> {
        let wanted = core.flags.contains(CacheFlags::ACCOUNT) || gfp.contains(gfp::__GFP_ACCOUNT);
        let memcg = if wanted { self.active_memcg() } else { 0 };
        let charge = match self.charge_object(core, memcg, gfp) {
            Ok(charge) => charge,
            Err(why) => {
                let object = self.entitled_object(core, gfp, why)?;
                let size = core.geometry.object_size as usize;
                self.on_alloc(core, object, gfp, size, caller);
                return Ok(object);
            }
        };
        let object = match self.kfence_object(core, gfp, caller) {
            Some(sampled) => sampled?,
            None => self.cache_alloc(core, gfp, caller)?,
        };
        let reserve = core.reserved.load(Ordering::Relaxed) != 0
            && self.object_is_reserve(core, object.as_ptr());
        // What is charged to a reserve is not charged to a group as well.
        if !reserve {
            self.keep_charge(core, object, charge);
        }
        Ok(object)
    }

    /// An object comes back, of a cache that has owners: whoever is charged for it no longer is.
    ///
    /// # Context
    ///
    /// Any. Allocates nothing, takes no lock.
    #[cold]
    #[inline(never)]
    pub(crate) fn uncharge_object(&self, core: &CacheCore, object: NonNull<u8>) {
        // What is not an object is reported by who takes it back.
        if let Ok((slab, index)) = self.locate(core, object.as_ptr()) {
            self.uncharge_index(core, slab, index);
        }
    }

    pub(crate) fn uncharge_index(&self, core: &CacheCore, slab: &Slab, index: usize) {
        let owner = &self.owners(core, slab)[index];
        if owner.load(Ordering::Relaxed) == 0 {
            return;
        }
        let memcg = owner.swap(0, Ordering::AcqRel);
        if memcg != 0 {
            let pfn = slab.pfn();
            let word = self.pages.map.owned_word(pfn);
            let at = pfn.phys().0 as usize + core.offset_in(slab, index);
            self.pages.memcg_uncharge(
                memcg,
                core.charged_bytes(),
                MemcgStat::Slab,
                (pfn, word, at),
            );
        }
    }

    /// Whom an object is charged to, 0 for nobody; of large kmalloc its pages.
    ///
    /// # Safety
    ///
    /// `ptr` is live memory from [`kmalloc`](Self::kmalloc) or a cache.
    pub unsafe fn memcg_of_object(&self, ptr: NonNull<u8>) -> u16 {
        match self.where_is(ptr.as_ptr()) {
            Ok(Where::Object(core)) if core.flags.has_owners() => {
                let found = self.locate(core, ptr.as_ptr());
                found.map_or(0, |(slab, index)| {
                    self.owners(core, slab)[index].load(Ordering::Acquire)
                })
            }
            Ok(Where::Pages(found)) => self.pages.memcg_of(found.word),
            _ => 0,
        }
    }

    /// Visits the charged objects of a slab: whom, and how many bytes. One that is free and charged is visited as `u16::MAX`, which nobody is.
    pub(super) fn each_charged(&self, slab: &Slab, mut visit: impl FnMut(u16, u64)) {
        // SAFETY: a slab's cache lives as long as the slab, which does not go at a quiet moment.
        let core = unsafe { slab.cache().as_ref() };
        if !core.flags.has_owners() {
            return;
        }
        for (index, owner) in self.owners(core, slab).iter().enumerate() {
            let owner = owner.load(Ordering::Acquire);
            if owner != 0 {
                let free = slab.is_free(&self.pages.map, index);
                visit(if free { u16::MAX } else { owner }, core.charged_bytes());
            }
        }
    }
}
