//! The memory manager behind safe calls: what was handed out is a value that can be given back once.
//!
//! All of this crate's unsafe calls into the core are here and in the two tables that take these values apart and put
//! them together again. Nobody ever looks into the memory itself: the arena behind it is only address space.

use std::num::NonZeroU64;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};

use memdesc::gfp::{__GFP_ZERO, Flags};
use memdesc::rcu::RcuHead;
use memdesc::{
    AllocError, Cache, Config, DestroyError, FolioKind, InitError, MemRange, Mm, PAGE_SHIFT,
    PageType, Pfn, PhysAddr,
};
use memdesc_host::{Host, HostError};

/// What a block of pages is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub(crate) enum Purpose {
    /// Drivers, kernel stacks, vmalloc: pages without an owner's descriptor.
    Bare = 0,
    Anon = 1,
    File = 2,
    PageTable = 3,
    /// A slab of Linux whose objects are not replayed: bare pages stand for it, of the same order.
    Slab = 4,
}

impl Purpose {
    pub(crate) const ALL: [Purpose; 5] = [
        Purpose::Bare,
        Purpose::Anon,
        Purpose::File,
        Purpose::PageTable,
        Purpose::Slab,
    ];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Purpose::Bare => "bare",
            Purpose::Anon => "anon",
            Purpose::File => "file",
            Purpose::PageTable => "page_table",
            Purpose::Slab => "slab",
        }
    }
}

/// A block of pages that is ours until [`Machine::free`].
#[derive(Debug)]
#[must_use = "the block would be lost"]
pub(crate) struct OwnedBlock(Pfn);

impl OwnedBlock {
    pub(crate) fn into_pfn(self) -> u32 {
        self.0.0
    }

    /// # Safety
    ///
    /// `pfn` came out of [`into_pfn`](Self::into_pfn), and goes back into a block once only.
    pub(crate) unsafe fn from_pfn(pfn: u32) -> OwnedBlock {
        OwnedBlock(Pfn(pfn))
    }
}

/// An object that is ours until [`Machine::free_object`]: its address, and from which cache in the upper 16 bits (0 for
/// kmalloc, else one more than the cache's number).
#[derive(Debug)]
#[must_use = "the object would be lost"]
pub(crate) struct OwnedObject(NonZeroU64);

const ADDRESS_BITS: u32 = 48;

impl OwnedObject {
    fn new(ptr: NonNull<u8>, class: u16) -> OwnedObject {
        let address = ptr.as_ptr().expose_provenance() as u64;
        debug_assert!(address >> ADDRESS_BITS == 0);
        let packed = address | u64::from(class) << ADDRESS_BITS;
        OwnedObject(NonZeroU64::new(packed).unwrap_or(NonZeroU64::MIN))
    }

    fn parts(&self) -> (*mut u8, usize) {
        let address = self.0.get() & ((1 << ADDRESS_BITS) - 1);
        let ptr = std::ptr::with_exposed_provenance_mut(address as usize);
        (ptr, (self.0.get() >> ADDRESS_BITS) as usize)
    }

    /// The number of the cache it came from; `None` for kmalloc.
    pub(crate) fn cache(&self) -> Option<usize> {
        self.parts().1.checked_sub(1)
    }
}

/// Corruption that the core reported: how often, and the first report.
#[derive(Clone, Debug, Default)]
pub(crate) struct Corruptions(Arc<Mutex<(u64, Option<String>)>>);

impl Corruptions {
    fn add(&self, report: String) {
        let mut seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        seen.0 += 1;
        seen.1.get_or_insert(report);
    }

    pub(crate) fn get(&self) -> (u64, Option<String>) {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

/// Why there is no machine.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MachineError {
    #[error("{0}")]
    Host(#[from] HostError),
    #[error("the memory manager does not come up: {0}")]
    Init(#[from] InitError),
}

/// A machine in a process: memory, CPUs, and the memory manager on them.
pub(crate) struct Machine {
    pub(crate) mm: Mm<Host>,
    pub(crate) corruptions: Corruptions,
    ram: Vec<(u32, u32)>,
}

impl Machine {
    pub(crate) fn new(ranges: &[MemRange], cpus: usize) -> Result<Machine, MachineError> {
        let corruptions = Corruptions::default();
        let reports = corruptions.clone();
        let host = Host::builder()
            .memory(ranges)
            .cpus(cpus)
            .on_corruption(move |report| reports.add(report.to_string()))
            .build()?;
        let config = Config {
            memory_is_zeroed: true,
            ..Config::default()
        };
        let mm = Mm::new(host, &config, ranges)?;
        let page = |at: PhysAddr| (at.0 >> PAGE_SHIFT) as u32;
        let ram = ranges
            .iter()
            .map(|r| (page(r.start), page(r.end)))
            .collect();
        Ok(Machine {
            mm,
            corruptions,
            ram,
        })
    }

    /// The page ranges of memory.
    pub(crate) fn ram(&self) -> impl Iterator<Item = (u32, u32)> + '_ {
        self.ram.iter().copied()
    }

    /// Pages for a purpose. They are never zeroed: nobody looks, and the arena is larger than this machine.
    #[inline]
    pub(crate) fn alloc(
        &self,
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
    pub(crate) fn claim(
        &self,
        pfn: u32,
        order: usize,
        purpose: Purpose,
    ) -> Result<OwnedBlock, AllocError> {
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
    pub(crate) fn reserve(&self, pfn: u32, order: usize) -> Result<(), AllocError> {
        self.mm.alloc_pages_at(Pfn(pfn), order)?;
        // SAFETY: bare pages that are ours; no `OwnedBlock` is made of them, so they are never freed.
        unsafe { self.mm.mark_reserved(Pfn(pfn)) };
        Ok(())
    }

    #[inline]
    pub(crate) fn free(&self, block: OwnedBlock) {
        // SAFETY: an `OwnedBlock` is the head of an allocation of this machine, there is one for each, and it ends here.
        unsafe { self.mm.free_pages(block.0) };
    }

    #[inline]
    pub(crate) fn kmalloc(&self, size: usize, gfp: Flags) -> Result<OwnedObject, AllocError> {
        let ptr = self.mm.kmalloc(size, without_zero(gfp))?;
        Ok(OwnedObject::new(ptr, 0))
    }

    /// An object of the cache with this number.
    #[inline]
    pub(crate) fn cache_alloc(
        &self,
        cache: &Cache,
        number: usize,
        gfp: Flags,
    ) -> Result<OwnedObject, AllocError> {
        let ptr = self.mm.kmem_cache_alloc(cache, without_zero(gfp))?;
        Ok(OwnedObject::new(ptr, (number + 1) as u16))
    }

    /// Frees an object: by its cache if that is given, else by its address alone.
    #[inline]
    pub(crate) fn free_object(&self, object: OwnedObject, cache: Option<&Cache>) {
        let Some(ptr) = NonNull::new(object.parts().0) else {
            return;
        };
        // SAFETY: an `OwnedObject` is a live object of this machine, there is one for each, and it ends here. The caller
        // finds `cache` by the object's own number.
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
    pub(crate) fn free_object_later(&self, object: OwnedObject, size: Option<usize>) -> bool {
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

    pub(crate) fn destroy<'m>(&self, cache: Cache<'m>) -> Result<(), DestroyError<'m>> {
        self.mm.kmem_cache_destroy(cache)
    }
}

#[inline]
fn without_zero(gfp: Flags) -> Flags {
    gfp & !__GFP_ZERO
}
