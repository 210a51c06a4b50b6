//! The memory manager as a value: [`Mm`].

use core::fmt;
use core::ptr::NonNull;

use crate::boot::BootLayout;
use crate::desc::DescList;
use crate::memmap::{BootSlice, PageType};
use crate::page_alloc::alloc::{Descriptors, PageAllocator};
use crate::platform::Platform;
use crate::slab::CacheCore;
use crate::slab::kmalloc::{CLASSES, Kind};
use crate::stats::Event;
use crate::sync::SpinLock;
use crate::sync::atomic::AtomicU64;

/// The caches that are there from the start, by place in the table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(usize)]
pub(crate) enum BuiltIn {
    Buddy = 0,
    Slab = 1,
    Folio = 2,
    PtDesc = 3,
    Cache = 4,
    Kmalloc = 5,
}

impl BuiltIn {
    /// With a cache for each class and kind of kmalloc.
    pub(crate) const COUNT: usize = BuiltIn::Kmalloc as usize + Kind::COUNT * CLASSES.len();
}

/// A memory manager: page allocator, slab and all, over the memory of one platform.
///
/// It has no global state: make as many as you like. All methods take `&self` and may be called from every CPU.
///
/// # Invariants
///
/// All of its data but this struct lies in the platform's memory, in the pages that the ledger calls metadata.
pub struct Mm<P: Platform> {
    pub(crate) pages: PageAllocator<P>,
    /// Boot memory: the caches of [`BuiltIn`].
    pub(crate) built_in: BootSlice<CacheCore>,
    /// The first of all caches, linked through `next`. The lock order: a leaf.
    pub(crate) caches: SpinLock<CacheList>,
    pub(crate) boot: BootLayout,
    /// The deepest bootstrap chain so far, and the most pages one took.
    pub(crate) bootstrap_depth: AtomicU64,
    pub(crate) bootstrap_pages: AtomicU64,
}

/// All caches but the built-in ones.
#[derive(Debug)]
pub(crate) struct CacheList {
    pub(crate) head: *mut CacheCore,
}

// SAFETY: the pointer leads to caches, which are shared between CPUs by design.
unsafe impl Send for CacheList {}

impl<P: Platform> Mm<P> {
    /// The platform it runs on.
    pub fn platform(&self) -> &P {
        &self.pages.platform
    }

    /// A number that tells this memory manager from others alive at the same time.
    pub(crate) fn id(&self) -> usize {
        self.pages.map.virt(crate::address::PhysAddr(0)).addr()
    }

    pub(crate) fn buddy_cache(&self) -> &CacheCore {
        &self.built_in[BuiltIn::Buddy as usize]
    }

    pub(crate) fn slab_cache(&self) -> &CacheCore {
        &self.built_in[BuiltIn::Slab as usize]
    }

    pub(crate) fn folio_cache(&self) -> &CacheCore {
        &self.built_in[BuiltIn::Folio as usize]
    }

    pub(crate) fn ptdesc_cache(&self) -> &CacheCore {
        &self.built_in[BuiltIn::PtDesc as usize]
    }

    pub(crate) fn cache_cache(&self) -> &CacheCore {
        &self.built_in[BuiltIn::Cache as usize]
    }

    #[inline]
    pub(crate) fn kmalloc_cache(&self, kind: Kind, class: usize) -> &CacheCore {
        &self.built_in[BuiltIn::Kmalloc as usize + kind as usize * CLASSES.len() + class]
    }

    /// Visits every cache.
    pub(crate) fn for_each_cache(&self, mut visit: impl FnMut(&CacheCore)) {
        self.built_in.iter().for_each(&mut visit);
        let pin = self.pages.pin();
        let list = self.caches.lock(|round| self.pages.platform.relax(round));
        let mut at = list.head;
        while let Some(core) = NonNull::new(at) {
            // SAFETY: caches are unlinked under this lock before they are freed.
            let core = unsafe { core.as_ref() };
            visit(core);
            at = core.next.load(crate::sync::atomic::Ordering::Relaxed);
        }
        drop(pin);
    }

    /// Sums a counter over all CPUs.
    pub fn event(&self, event: Event) -> u64 {
        self.pages.stats.iter().map(|cpu| cpu.event(event)).sum()
    }

    /// A counter of one CPU; for telling which path the last request on it took.
    pub fn cpu_event(&self, cpu: usize, event: Event) -> u64 {
        self.pages
            .stats
            .get(cpu)
            .map_or(0, |stats| stats.event(event))
    }

    /// Pages handed out of this type.
    pub fn pages_of(&self, kind: PageType) -> u64 {
        self.pages
            .stats
            .iter()
            .fold(0u64, |sum, cpu| sum.wrapping_add(cpu.pages(kind)))
    }

    /// Gives back what is kept for later: sheaves, empty slabs, per-CPU pages. Says how many pages the slabs gave.
    ///
    /// # Context
    ///
    /// May wait for other CPUs.
    pub fn shrink(&self) -> usize {
        // Ordinary caches first: their slabs' descriptors come free with them. Descriptors of folios and page tables next,
        // those of slabs and free blocks last, since all the others give those back.
        let mut pages = 0;
        self.for_each_cache_unlocked(|core| pages += self.cache_shrink(core));
        self.drain_all();
        for built_in in [
            BuiltIn::Folio,
            BuiltIn::PtDesc,
            BuiltIn::Buddy,
            BuiltIn::Slab,
        ] {
            pages += self.cache_shrink(&self.built_in[built_in as usize]);
            self.drain_all();
        }
        pages
    }

    /// Visits every cache without the list's lock; the caller sees to it that no cache is destroyed meanwhile.
    fn for_each_cache_unlocked(&self, mut visit: impl FnMut(&CacheCore)) {
        let mut index = 0;
        loop {
            let mut found: Option<NonNull<CacheCore>> = None;
            let mut i = 0;
            self.for_each_cache(|core| {
                if i == index {
                    found = Some(NonNull::from(core));
                }
                i += 1;
            });
            // SAFETY: caches that are in the list live until they are destroyed, and `kmem_cache_destroy` takes the handle by
            // value from a caller who must not run against `shrink` (its `# Context`).
            let Some(core) = found else { return };
            visit(unsafe { core.as_ref() });
            index += 1;
        }
    }

    /// Empties the per-CPU lists of all CPUs into the zones (`drain_all_pages`).
    pub fn drain_all(&self) {
        self.pages.drain_all(self);
    }

    /// Upkeep of the calling CPU: call it once a second on each (`refresh_cpu_vm_stats`). Its per-CPU lists shrink to what it
    /// uses.
    ///
    /// # Context
    ///
    /// Any that may pin a CPU. Allocates nothing, does not wait.
    pub fn tick(&self) {
        self.pages.decay_pcp(self);
    }

    /// Gives descriptors back.
    pub(crate) fn put_desc(&self, desc: crate::address::PhysAddr) {
        let mut list = DescList::new();
        list.push(&self.pages.map, desc);
        self.put(list);
    }
}

impl<P: Platform> fmt::Debug for Mm<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mm")
            .field("boot", &self.boot)
            .finish_non_exhaustive()
    }
}
