//! Objects that read zero when they are handed out, and hold nothing once they are free (`init_on_alloc`, `init_on_free`).
//!
//! As in Linux not those with a constructor, whose free objects keep what it made, not those of type-stable caches, which readers may still look at, and not
//! those that are poisoned, which says more (`slab_want_init_on_alloc`, `slab_want_init_on_free`). What is freed after a grace period is zeroed after it.
//! Large kmalloc and vmalloc memory are pages: see `freepage`.

use core::ptr::NonNull;

use super::cache::{CacheCore, CacheFlags, Role};
use crate::freepage::Services;
use crate::mm::Mm;
use crate::platform::Platform;

/// What a cache's objects need, if the machine has them initialised.
pub(crate) fn init_flags(
    services: Services,
    flags: CacheFlags,
    role: Role,
    ctor: bool,
) -> CacheFlags {
    let keeps = CacheFlags::TYPESAFE_BY_RCU | CacheFlags::POISON;
    if role != Role::Objects || ctor || flags.intersects(keeps) {
        return CacheFlags::EMPTY;
    }
    let mut init = CacheFlags::EMPTY;
    if services.init_on_alloc() {
        init = init | CacheFlags::INIT_ON_ALLOC;
    }
    if services.init_on_free() {
        init = init | CacheFlags::INIT_ON_FREE;
    }
    init
}

impl<P: Platform> Mm<P> {
    /// A free object that nobody else has any more, checked if it is to be: it holds nothing from here on.
    #[inline]
    pub(crate) fn init_on_free(&self, core: &CacheCore, object: NonNull<u8>) {
        // A guarded object is as large as was asked for, and what lies behind it is checked; nobody reaches what it holds.
        if core.flags.contains(CacheFlags::INIT_ON_FREE) && !self.is_kfence_address(object.as_ptr())
        {
            // SAFETY: the object's owner has given it up, and it is not in its slab or a sheaf yet.
            unsafe { object.write_bytes(0, core.geometry.object_size as usize) };
        }
    }
}
