//! The memory manager behind safe calls: what was handed out is a value that can be given back once.
//!
//! All unsafe calls of a replay into the core are here, and in the tables that take these values apart and put them together again. Nobody ever looks
//! into the memory itself: where it is only address space, it stays that.

use core::num::NonZeroU64;
use core::ptr::NonNull;

use memdesc::gfp::{__GFP_ZERO, Flags};
use memdesc::rcu::RcuHead;
use memdesc::{AllocError, Cache, DestroyError, FolioKind, Mm, PageType, Pfn, Platform};
use memdesc_trace::Cache as TraceCache;

/// What a block of pages is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Purpose {
    /// Drivers, kernel stacks, vmalloc: pages without an owner's descriptor.
    Bare = 0,
    /// Users' memory without a file.
    Anon = 1,
    /// File cache.
    File = 2,
    /// A page table.
    PageTable = 3,
    /// A slab of Linux whose objects are not replayed: bare pages stand for it, of the same order.
    Slab = 4,
}

impl Purpose {
    /// All of them, by number.
    pub const ALL: [Purpose; 5] = [
        Purpose::Bare,
        Purpose::Anon,
        Purpose::File,
        Purpose::PageTable,
        Purpose::Slab,
    ];

    /// As reports call it.
    pub const fn name(self) -> &'static str {
        match self {
            Purpose::Bare => "bare",
            Purpose::Anon => "anon",
            Purpose::File => "file",
            Purpose::PageTable => "page_table",
            Purpose::Slab => "slab",
        }
    }
}

/// Something that stands for a block of pages and can be kept as a number.
pub trait Token: Sized {
    /// The number. What it stands for is lost unless it comes back.
    fn into_raw(self) -> u32;

    /// # Safety
    ///
    /// `raw` came out of [`into_raw`](Self::into_raw), and goes back into a token once only.
    unsafe fn from_raw(raw: u32) -> Self;
}

/// A block of pages that is ours until [`Handles::free`].
#[derive(Debug)]
#[must_use = "the block would be lost"]
pub struct OwnedBlock(Pfn);

impl Token for OwnedBlock {
    #[inline]
    fn into_raw(self) -> u32 {
        self.0.0
    }

    #[inline]
    unsafe fn from_raw(raw: u32) -> OwnedBlock {
        OwnedBlock(Pfn(raw))
    }
}

/// An object that is ours until [`Handles::free_object`]: its address, and from which cache in the upper 16 bits (0 for
/// kmalloc, else one more than the cache's number).
#[derive(Debug)]
#[must_use = "the object would be lost"]
pub struct OwnedObject(NonZeroU64);

/// Bits of an address that say something: those above are all as the uppermost of these is.
const ADDRESS_BITS: u32 = 48;

/// Cache numbers are kept in 16 bits.
pub const MAX_CACHES: usize = u16::MAX as usize - 1;

impl OwnedObject {
    #[inline]
    fn new(ptr: NonNull<u8>, class: u16) -> OwnedObject {
        let address = ptr.as_ptr().expose_provenance() as u64;
        debug_assert_eq!(canonical(address), address);
        let packed = address & ((1 << ADDRESS_BITS) - 1) | u64::from(class) << ADDRESS_BITS;
        OwnedObject(NonZeroU64::new(packed).unwrap_or(NonZeroU64::MIN))
    }

    #[inline]
    fn parts(&self) -> (*mut u8, usize) {
        let ptr = core::ptr::with_exposed_provenance_mut(canonical(self.0.get()) as usize);
        (ptr, (self.0.get() >> ADDRESS_BITS) as usize)
    }

    /// The number of the cache it came from; `None` for kmalloc.
    #[inline]
    pub fn cache(&self) -> Option<usize> {
        self.parts().1.checked_sub(1)
    }

    /// As a number, which is larger than 1. The object is lost unless it comes back.
    #[inline]
    pub(crate) fn into_raw(self) -> u64 {
        self.0.get()
    }

    /// # Safety
    ///
    /// `raw` came out of [`into_raw`](Self::into_raw), and goes back into an object once only.
    #[inline]
    pub(crate) unsafe fn from_raw(raw: u64) -> Option<OwnedObject> {
        NonZeroU64::new(raw).map(OwnedObject)
    }
}

/// The address in the lower bits.
#[inline]
const fn canonical(bits: u64) -> u64 {
    ((bits << (64 - ADDRESS_BITS)) as i64 >> (64 - ADDRESS_BITS)) as u64
}

/// A memory manager behind safe calls.
#[derive(Debug)]
pub struct Handles<'m, P: Platform> {
    mm: &'m Mm<P>,
}

impl<P: Platform> Clone for Handles<'_, P> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<P: Platform> Copy for Handles<'_, P> {}

impl<'m, P: Platform> Handles<'m, P> {
    /// Of this one.
    ///
    /// # Safety
    ///
    /// What these handles hand out goes back through handles of the same memory manager, and an object with no other cache than its own, nor with a size
    /// larger than it has.
    #[inline]
    pub unsafe fn new(mm: &'m Mm<P>) -> Handles<'m, P> {
        Handles { mm }
    }

    /// The memory manager.
    #[inline]
    pub fn mm(self) -> &'m Mm<P> {
        self.mm
    }

    /// Pages for a purpose. They are never zeroed: nobody looks, and the memory may be larger than the machine.
    ///
    /// # Errors
    ///
    /// The memory manager's.
    #[inline]
    pub fn alloc(
        self,
        purpose: Purpose,
        gfp: Flags,
        order: usize,
    ) -> Result<OwnedBlock, AllocError> {
        let gfp = without_zero(gfp);
        let pfn = match purpose {
            Purpose::Bare | Purpose::Slab => self.mm.alloc_pages(gfp, order),
            Purpose::Anon => self.mm.alloc_folio(gfp, order, FolioKind::Anon),
            Purpose::File => self.mm.alloc_folio(gfp, order, FolioKind::File),
            Purpose::PageTable => self.mm.alloc_page_table(gfp, order),
        };
        pfn.map(OwnedBlock)
    }

    /// These very pages.
    ///
    /// # Errors
    ///
    /// The memory manager's: somebody has one of them, or there is no descriptor.
    pub fn claim(self, pfn: u32, order: usize, purpose: Purpose) -> Result<OwnedBlock, AllocError> {
        let pfn = Pfn(pfn);
        self.mm.alloc_pages_at(pfn, order)?;
        let kind = match purpose {
            Purpose::Bare | Purpose::Slab => return Ok(OwnedBlock(pfn)),
            Purpose::Anon => PageType::Anon,
            Purpose::File => PageType::File,
            Purpose::PageTable => PageType::PageTable,
        };
        // SAFETY: the bare pages that `alloc_pages_at` just gave us.
        if let Err(why) = unsafe { self.mm.retype(pfn, kind) } {
            self.free(OwnedBlock(pfn));
            return Err(why);
        }
        Ok(OwnedBlock(pfn))
    }

    /// These very pages, for good.
    ///
    /// # Errors
    ///
    /// As [`claim`](Self::claim).
    pub fn reserve(self, pfn: u32, order: usize) -> Result<(), AllocError> {
        self.mm.alloc_pages_at(Pfn(pfn), order)?;
        // SAFETY: bare pages that are ours; no `OwnedBlock` is made of them, so they are never freed.
        unsafe { self.mm.mark_reserved(Pfn(pfn)) };
        Ok(())
    }

    /// Gives a block back.
    #[inline]
    pub fn free(self, block: OwnedBlock) {
        // SAFETY: an `OwnedBlock` is the head of an allocation of this memory manager (the promise of `new`), there is one for each, and it ends here.
        unsafe { self.mm.free_pages(block.0) };
    }

    /// An object of kmalloc's.
    ///
    /// # Errors
    ///
    /// The memory manager's.
    #[inline]
    pub fn kmalloc(self, size: usize, gfp: Flags) -> Result<OwnedObject, AllocError> {
        let ptr = self.mm.kmalloc(size, without_zero(gfp))?;
        Ok(OwnedObject::new(ptr, 0))
    }

    /// A cache such as Linux has it: same name, same size, and where Linux aligns to cache lines, so do we.
    ///
    /// # Errors
    ///
    /// The memory manager's.
    pub fn cache_create(self, cache: &TraceCache) -> Result<Cache<'m>, AllocError> {
        let size = if cache.bytes_req > 0 {
            cache.bytes_req
        } else {
            cache.bytes_alloc
        };
        let lines = cache.bytes_alloc.is_multiple_of(64) && size > 32;
        let align = if lines { 64 } else { 8 };
        let name = if cache.name.is_empty() {
            "unnamed"
        } else {
            &cache.name
        };
        let flags = memdesc::CacheFlags::EMPTY;
        self.mm
            .kmem_cache_create(name, size as usize, align, flags, None)
    }

    /// An object of the cache with this number, below [`MAX_CACHES`].
    ///
    /// # Errors
    ///
    /// The memory manager's.
    #[inline]
    pub fn cache_alloc(
        self,
        cache: &Cache,
        number: usize,
        gfp: Flags,
    ) -> Result<OwnedObject, AllocError> {
        let ptr = self.mm.kmem_cache_alloc(cache, without_zero(gfp))?;
        Ok(OwnedObject::new(ptr, (number + 1) as u16))
    }

    /// Frees an object: by its cache if that is given, else by its address alone.
    #[inline]
    pub fn free_object(self, object: OwnedObject, cache: Option<&Cache>) {
        let Some(ptr) = NonNull::new(object.parts().0) else {
            return;
        };
        // SAFETY: an `OwnedObject` is a live object of this memory manager, and `cache` its own (the promise of `new`); there is one for each, and it
        // ends here.
        unsafe {
            match cache {
                Some(cache) => self.mm.kmem_cache_free(cache, ptr),
                None => self.mm.kfree(ptr),
            }
        }
    }

    /// Frees an object after a grace period, by a head in it or, if it is too small for one, at once: somebody reads all the time, so
    /// nobody may wait. `size`, if it is known.
    /// Says whether it was deferred.
    pub fn free_object_later(self, object: OwnedObject, size: Option<usize>) -> bool {
        let Some(ptr) = NonNull::new(object.parts().0) else {
            return false;
        };
        // SAFETY: as in `free_object`; nobody reads it, and it holds a head.
        unsafe {
            let size = size.unwrap_or_else(|| self.mm.ksize(ptr));
            if size >= size_of::<RcuHead>() {
                ptr.cast().write(RcuHead::new());
                self.mm.kvfree_rcu(ptr, ptr.cast());
                true
            } else {
                self.mm.kfree(ptr);
                false
            }
        }
    }

    /// Gives a cache back.
    ///
    /// # Errors
    ///
    /// Objects of it are live.
    pub fn destroy(self, cache: Cache<'m>) -> Result<(), DestroyError<'m>> {
        self.mm.kmem_cache_destroy(cache)
    }

    /// Bytes of slabs of descriptors, now.
    pub fn descriptor_bytes(self) -> u64 {
        let mut pages = 0;
        self.mm.slabinfo(|cache| {
            if cache.metadata {
                pages += cache.num_slabs * cache.pages_per_slab as u64;
            }
        });
        pages * memdesc::PAGE_SIZE as u64
    }
}

#[inline]
fn without_zero(gfp: Flags) -> Flags {
    gfp & !__GFP_ZERO
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_both_halves() {
        for address in [0x7fff_1234_5678_usize, 0xffff_8880_0123_4560] {
            let ptr = NonNull::new(core::ptr::with_exposed_provenance_mut(address)).unwrap();
            for class in [0, 1, u16::MAX] {
                let object = OwnedObject::new(ptr, class);
                assert_eq!(object.parts(), (ptr.as_ptr(), usize::from(class)));
                assert_eq!(object.cache(), usize::from(class).checked_sub(1));
                assert!(object.into_raw() > 1);
            }
        }
    }
}
