//! `KmemCache<T>`: a cache of one type, and `SlabBox`, a value in it.
//!
//! Rust-for-Linux has no such type yet: a cache must outlive its objects, and destroying it can fail where `Drop` cannot.
//! Here the borrow checker holds the first, and dropping a cache whose boxes were leaked keeps the cache.

use core::fmt;
use core::ops::{Deref, DerefMut};
use core::ptr::NonNull;

use super::cache::{Cache, CacheFlags, DestroyError};
use crate::error::AllocError;
use crate::gfp::Flags;
use crate::mm::Mm;
use crate::platform::Platform;

/// A cache of values of type `T`.
pub struct KmemCache<'m, P: Platform, T> {
    mm: &'m Mm<P>,
    cache: Option<Cache<'m>>,
    _values: core::marker::PhantomData<fn(T) -> T>,
}

impl<'m, P: Platform, T> KmemCache<'m, P, T> {
    /// A cache named `name`.
    ///
    /// # Errors
    ///
    /// As [`Mm::kmem_cache_create`].
    pub fn new(mm: &'m Mm<P>, name: &str, flags: CacheFlags) -> Result<Self, AllocError> {
        let cache = mm.kmem_cache_create(name, size_of::<T>(), align_of::<T>(), flags, None)?;
        Ok(KmemCache {
            mm,
            cache: Some(cache),
            _values: core::marker::PhantomData,
        })
    }

    fn cache(&self) -> &Cache<'m> {
        match &self.cache {
            Some(cache) => cache,
            None => unreachable!("taken only by destroy and drop"),
        }
    }

    /// Moves a value into the cache.
    ///
    /// # Errors
    ///
    /// Why there was no memory; the value comes back.
    #[track_caller]
    pub fn alloc(&self, gfp: Flags, value: T) -> Result<SlabBox<'_, P, T>, (AllocError, T)> {
        match self.mm.kmem_cache_alloc(self.cache(), gfp) {
            Ok(object) => {
                let ptr = object.cast::<T>();
                // SAFETY: the object is ours, of `T`'s size and alignment.
                unsafe { ptr.write(value) };
                Ok(SlabBox { cache: self, ptr })
            }
            Err(why) => Err((why, value)),
        }
    }

    /// Takes the cache down.
    ///
    /// # Errors
    ///
    /// Values were leaked: how many. The cache stays.
    pub fn destroy(mut self) -> Result<(), u64> {
        match self.cache.take() {
            Some(cache) => self.mm.kmem_cache_destroy(cache).map_err(|e| e.live),
            None => Ok(()),
        }
    }
}

impl<P: Platform, T> Drop for KmemCache<'_, P, T> {
    fn drop(&mut self) {
        if let Some(cache) = self.cache.take() {
            // Leaked values keep their cache; it is listed in the slabinfo view as long as they are.
            let _: Result<(), DestroyError<'_>> = self.mm.kmem_cache_destroy(cache);
        }
    }
}

impl<P: Platform, T> fmt::Debug for KmemCache<'_, P, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("KmemCache")
            .field(&self.cache().name())
            .finish()
    }
}

/// A value in a [`KmemCache`]; dropped and given back when this goes.
pub struct SlabBox<'c, P: Platform, T> {
    cache: &'c KmemCache<'c, P, T>,
    ptr: NonNull<T>,
}

// SAFETY: the box owns its value, and the cache may be used from every CPU.
unsafe impl<P: Platform, T: Send> Send for SlabBox<'_, P, T> {}
// SAFETY: the same for a shared value.
unsafe impl<P: Platform, T: Sync> Sync for SlabBox<'_, P, T> {}

impl<P: Platform, T> Deref for SlabBox<'_, P, T> {
    type Target = T;
    fn deref(&self) -> &T {
        // SAFETY: the box owns a live value.
        unsafe { self.ptr.as_ref() }
    }
}

impl<P: Platform, T> DerefMut for SlabBox<'_, P, T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: the box owns a live value, and is borrowed uniquely.
        unsafe { self.ptr.as_mut() }
    }
}

impl<P: Platform, T> Drop for SlabBox<'_, P, T> {
    fn drop(&mut self) {
        // SAFETY: the value is live and ours; it is not used after this, and its memory is from this cache.
        unsafe {
            self.ptr.drop_in_place();
            self.cache
                .mm
                .kmem_cache_free(self.cache.cache(), self.ptr.cast());
        }
    }
}

impl<P: Platform, T: fmt::Debug> fmt::Debug for SlabBox<'_, P, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}
