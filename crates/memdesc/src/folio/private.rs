//! What a filesystem keeps of a folio (`folio->private`): for those who want it, 16 bytes more.

use core::panic::Location;

use super::FolioLock;
use crate::address::Pfn;
use crate::desc::{Folio, FolioPrivate, Held, Place};
use crate::error::AllocError;
use crate::gfp::Flags;
use crate::mm::{BuiltIn, Mm};
use crate::platform::Platform;
use crate::sync::atomic::{AtomicU64, Ordering};

impl<P: Platform> Mm<P> {
    fn private_at(&self, at: crate::address::PhysAddr) -> &FolioPrivate {
        let ptr = self.pages.map.virt(at).cast::<FolioPrivate>();
        // SAFETY: a place of this kind leads to an object of the cache of these until it is detached, and after that the memory stays
        // one for as long as a read section lasts; all fields are atomics.
        unsafe { &*ptr }
    }

    /// The mapping that the folio belongs to, as [`Folio::set_mapping`] was told; 0 for none.
    pub fn folio_mapping(&self, folio: &Folio) -> u64 {
        let _read = self.rcu_read_lock();
        match folio.place() {
            Place::Mapping(handle) => handle,
            Place::Head(_) => 0,
            Place::Private(at) => self.private_at(at).place.load(Ordering::Acquire),
        }
    }

    /// What was attached; `None` if nothing is.
    pub fn folio_private(&self, folio: &Folio) -> Option<u64> {
        let _read = self.rcu_read_lock();
        match folio.place() {
            Place::Private(at) => Some(self.private_at(at).private.load(Ordering::Relaxed)),
            _ => None,
        }
    }

    /// Attaches 8 bytes to a folio, or changes them (`folio_attach_private`): takes a reference, as in Linux, so that nothing is
    /// attached to what is freed. The folio belongs to a mapping.
    ///
    /// # Errors
    ///
    /// No memory. [`AllocError::BadSize`] if it belongs to no mapping.
    ///
    /// # Panics
    ///
    /// If the lock is of another memory manager's folio.
    pub fn folio_attach_private(
        &self,
        locked: &FolioLock<'_, P>,
        private: u64,
        gfp: Flags,
    ) -> Result<(), AllocError> {
        assert!(locked.is_of(self), "another memory manager's");
        let folio = locked.folio();
        let handle = match folio.place() {
            Place::Private(at) => {
                let old = self.private_at(at);
                old.private.store(private, Ordering::Relaxed);
                return Ok(());
            }
            Place::Head(_) => return Err(AllocError::BadSize),
            Place::Mapping(handle) => handle,
        };
        let cache = self.built_in(BuiltIn::Private);
        let object = self.cache_alloc(cache, gfp, Location::caller())?;
        if !folio.counts().try_get(Held::REF) {
            self.put_desc(self.pages.phys(object.as_ptr()));
            return Err(AllocError::Busy);
        }
        // SAFETY: an object of that cache, ours.
        unsafe {
            object.cast::<FolioPrivate>().write(FolioPrivate {
                place: AtomicU64::new(handle),
                private: AtomicU64::new(private),
            });
        }
        folio.set_place(Place::Private(self.pages.phys(object.as_ptr())));
        Ok(())
    }

    /// Takes it away (`folio_detach_private`). `head` is the folio's first page; panics if not.
    pub fn folio_detach_private(&self, locked: &FolioLock<'_, P>, head: Pfn) -> Option<u64> {
        assert!(
            self.is_head_of(locked.folio(), head),
            "{head:?} heads another"
        );
        self.detach_private(locked.folio(), head)
    }

    /// The same, of a folio that the caller has locked.
    pub(crate) fn detach_private(&self, folio: &Folio, head: Pfn) -> Option<u64> {
        let Place::Private(at) = folio.place() else {
            return None;
        };
        let old = self.private_at(at);
        let private = old.private.load(Ordering::Relaxed);
        folio.set_place(Place::Mapping(old.place.load(Ordering::Relaxed)));
        self.put_desc(at);
        self.folio_put(folio, head, Held::REF);
        Some(private)
    }
}
