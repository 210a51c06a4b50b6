//! Objects: kmalloc and caches.

use memdesc::AllocError;

use super::{Backend, Engine};
use crate::counts::reason;
use crate::objects::ZERO_SIZE_PTR;

impl<B: Backend> Engine<B> {
    #[inline]
    pub(super) fn object_alloc(
        &mut self,
        ptr: u64,
        size: u64,
        alloc: impl FnOnce(&mut B) -> Result<B::Object, AllocError>,
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
        match alloc(&mut self.backend) {
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
    pub(super) fn free_object(&mut self, object: B::Object) {
        self.backend.free_object(object);
        self.slab_counts.freed += 1;
    }
}
