//! Objects at rest: handed out by their slab, and nobody's, those of a prefilled sheaf and of a mempool.
//!
//! By its slab's bits such an object is in use; by what it looks like it is free: of a debug cache its red zones and its poison are those of free objects,
//! checked when somebody gets it, so a write to it meanwhile is found, and so is who frees it once more. Nobody is charged for it, unless who keeps it says
//! so. It is not touched while it rests.
//!
//! A guarded object keeps its page accessible while it rests, and its canaries are checked when it is really freed.

use core::ptr::NonNull;

use super::cache::{CacheCore, CacheFlags, Role};
use super::debug;
use super::object::Caller;
use crate::error::AllocError;
use crate::gfp::{self, Flags};
use crate::mm::Mm;
use crate::platform::{FaultPoint, Platform, might_lock, might_sleep};
use crate::stats::Event;

impl<P: Platform> Mm<P> {
    /// Fills `out` with objects at rest, or none: from this CPU's sheaf as far as it goes if it could hold as many as are wanted, and from the slabs. Guarded
    /// objects are none of them.
    pub(crate) fn objects_at_rest(
        &self,
        core: &CacheCore,
        gfp: Flags,
        out: &mut [*mut u8],
        caller: Caller,
    ) -> Result<(), AllocError> {
        if out.is_empty() {
            return Ok(());
        }
        if gfp.allow_blocking() {
            might_sleep(&self.pages.platform, "an allocation of objects");
        }
        might_lock(
            &self.pages.platform,
            self.pages.rt,
            &crate::lockdep::classes::SLAB_LISTS,
        );
        if self.pages.platform.should_fail(FaultPoint::CacheAlloc) {
            return Err(AllocError::Injected);
        }
        let mut n = 0;
        {
            let pin = self.pages.pin();
            if self.pages.stats(&pin).on_free_path() {
                self.pages.allocation_on_free(&pin);
            }
            if out.len() <= core.sheaves.capacity() {
                n = core.sheaves.owner(&pin, |stack| {
                    let fill = out.iter_mut().map_while(|place| {
                        *place = stack.pop()?.as_ptr();
                        Some(())
                    });
                    fill.count()
                });
            }
        }
        while n < out.len() {
            let taken = self.slabs_take(core, gfp, &mut out[n..]);
            if self.pages.map.checks.pending() {
                self.report_flaws();
            }
            match taken {
                Ok(taken) => n += taken,
                Err(why) => {
                    let pin = self.pages.pin();
                    let stats = self.pages.stats(&pin);
                    stats.add(&pin, Event::SlabAllocFail, 1);
                    stats.add(&pin, Event::SlabAlloc, n as u64);
                    drop(pin);
                    self.rest_over(core, &out[..n], caller);
                    out.fill(core::ptr::null_mut());
                    return Err(why);
                }
            }
        }
        let pin = self.pages.pin();
        self.pages.stats(&pin).add(&pin, Event::SlabAlloc, n as u64);
        Ok(())
    }

    /// The owner of an object gives it up, and it is to rest: checked and marked as a free one, and nobody is charged for it any more. `false`: it was not
    /// fit to, and was reported; it is left alone.
    ///
    /// # Context
    ///
    /// As a free.
    pub(crate) fn object_rests(
        &self,
        core: &CacheCore,
        object: NonNull<u8>,
        caller: Caller,
    ) -> bool {
        if core.flags.has_owners() {
            self.uncharge_object(core, object);
        }
        if self.kfence.contains(object.as_ptr()) {
            return true;
        }
        if core.is_debug() && !debug::on_free(self, core, object, caller) {
            return false;
        }
        self.init_on_free(core, object);
        true
    }

    /// An object at rest is handed out, for `asked` bytes.
    ///
    /// # Context
    ///
    /// Any. Takes no lock, allocates nothing.
    #[inline]
    pub(crate) fn object_roused(
        &self,
        core: &CacheCore,
        object: NonNull<u8>,
        gfp: Flags,
        asked: usize,
        caller: Caller,
    ) {
        let size = match self.kfence.slot_of(object.as_ptr()) {
            Some((_, slot)) => slot.size(),
            None if core.is_debug() => {
                debug::on_alloc(self, core, object, asked, caller);
                asked
            }
            None => core.geometry.object_size as usize,
        };
        if gfp.contains(gfp::__GFP_ZERO) || core.flags.contains(CacheFlags::INIT_ON_ALLOC) {
            // SAFETY: the object is ours alone until we return it, and has this many bytes before what is checked behind it.
            unsafe { object.write_bytes(0, size) };
        }
    }

    /// Objects at rest are kept no longer: they go to this CPU's sheaf as far as they fit, and to the slabs.
    ///
    /// # Context
    ///
    /// As a free: allocates nothing, cannot fail.
    pub(crate) fn rest_over(&self, core: &CacheCore, objects: &[*mut u8], caller: Caller) {
        debug_assert!(core.role == Role::Objects);
        might_lock(
            &self.pages.platform,
            self.pages.rt,
            &crate::lockdep::classes::SLAB_LISTS,
        );
        for batch in objects.chunks(64) {
            let path = self.pages.free_path();
            let mut fit = 0;
            if core.sheaves.capacity() > 0 && !self.kfence.contains_any(batch) {
                fit = core.sheaves.owner(path.pin(), |stack| {
                    let fits = |o: &&*mut u8| NonNull::new(**o).is_some_and(|o| stack.push(o));
                    batch.iter().take_while(fits).count()
                });
            }
            let mut rest = &batch[fit..];
            let guarded = self.kfence.contains_any(rest);
            let n = if guarded { fit } else { batch.len() };
            let stats = self.pages.stats(path.pin());
            stats.add(path.pin(), Event::SlabFree, n as u64);
            if guarded {
                drop(path);
                while let Some((&object, others)) = rest.split_first() {
                    if let Some(ptr) = NonNull::new(object) {
                        if self.kfence.contains(object) {
                            self.cache_free(self.pages.free_path(), core, ptr, false, caller);
                        } else {
                            self.rest_over(core, &[object], caller);
                        }
                    }
                    rest = others;
                }
                continue;
            }
            let _path = self.pages.may_sleep(path);
            if !rest.is_empty() {
                self.slabs_give(core, rest, false, caller);
            }
        }
    }
}
