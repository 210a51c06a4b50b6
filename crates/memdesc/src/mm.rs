//! The memory manager as a value: [`Mm`].

use core::fmt;
use core::ptr::NonNull;

use crate::boot::BootLayout;
use crate::desc::DescList;
use crate::device::DeviceCost;
use crate::folio::{Lruvec, WaitTable};
use crate::lockdep::classes;
use crate::memmap::{BootSlice, PageType};
use crate::mempool::Mempools;
use crate::netpool::Pools;
use crate::own::OwnTypes;
use crate::page_alloc::alloc::{Descriptors, PageAllocator};
use crate::pgtable::RcuPages;
use crate::platform::{Holder, Platform};
use crate::rcu::block::Krc;
use crate::rcu::discard::Discards;
use crate::rcu::prepaid::Prepaid;
use crate::rcu::{Rcu, ReadGuard};
use crate::shrinker::Shrinkers;
use crate::slab::CacheCore;
use crate::slab::kfence::Pool;
use crate::slab::kmalloc::{CLASSES, Kind};
use crate::slab::pointers::SideCost;
use crate::stats::Event;
use crate::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use crate::sync::{PfnStack, SpinGuard, SpinLock};
use crate::vmalloc::Vmalloc;
use crate::zsmalloc::ZsPools;

/// The caches that are there from the start, by place in the table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(usize)]
pub(crate) enum BuiltIn {
    Buddy = 0,
    Slab = 1,
    File = 2,
    Anon = 3,
    PtDesc = 4,
    Private = 5,
    Cache = 6,
    XaNode = 7,
    VmArea = 8,
    PagePool = 9,
    ZsDesc = 10,
    Kfence = 11,
    Kmalloc = 12,
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
    /// The first of all caches, linked through `next`: Linux's `slab_mutex`. The outermost lock: held over a walk of the
    /// caches, in which all others are taken.
    pub(crate) caches: SpinLock<CacheList>,
    /// Those to ask when memory is short. Lock order: a leaf, dropped before any of them is called.
    pub(crate) shrinkers: SpinLock<Shrinkers>,
    /// Deferred frees, by CPU.
    pub(crate) krcs: BootSlice<Krc>,
    pub(crate) prepaid: BootSlice<Prepaid>,
    /// Pages for pointers to what is freed later.
    pub(crate) kvfree_pages: AtomicU64,
    pub(crate) kvfree_backlog: u32,
    pub(crate) kvfree_drain_ns: u64,
    /// Folios by age, for each node.
    pub(crate) lruvecs: BootSlice<Lruvec>,
    pub(crate) folio_waits: WaitTable,
    /// Folios that nobody has, and that could not leave their list in the context that let go of them last.
    pub(crate) dying: PfnStack,
    /// One page fails at a time: the outermost of all locks.
    pub(crate) mf_lock: SpinLock<()>,
    /// Where compaction goes on.
    pub(crate) compact_at: AtomicU32,
    /// Page tables that wait for a grace period.
    pub(crate) rcu_pages: RcuPages,
    /// Slabs that wait for a grace period.
    pub(crate) discards: Discards,
    pub(crate) vmalloc: Vmalloc,
    pub(crate) pools: Pools,
    pub(crate) own_types: OwnTypes,
    pub(crate) device_cost: DeviceCost,
    /// Lock order: see [`mempool`](crate::mempool).
    pub(crate) mempool_list: SpinLock<Mempools>,
    /// Memory beside objects that are kept for somebody.
    pub(crate) side_cost: SideCost,
    /// The pools of compressed memory. Lock order: see [`zsmalloc`](crate::zsmalloc).
    pub(crate) zs_pools: SpinLock<ZsPools>,
    /// The guarded pool. Lock order: see [`kfence`](crate::slab::kfence).
    pub(crate) kfence: Pool,
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

    /// The RCU it uses.
    #[inline]
    pub fn rcu(&self) -> &P::Rcu {
        self.pages.platform.rcu()
    }

    /// Opens a read section: what is found in it is not freed, nor its type changed, before it ends.
    ///
    /// # Context
    ///
    /// Any.
    #[inline]
    pub fn rcu_read_lock(&self) -> ReadGuard<'_, P::Rcu> {
        crate::rcu::read_lock(self.rcu())
    }

    /// A number that tells this memory manager from others alive at the same time.
    pub(crate) fn id(&self) -> usize {
        self.pages.map.virt(crate::address::PhysAddr(0)).addr()
    }

    pub(crate) fn buddy_cache(&self) -> &CacheCore {
        self.built_in(BuiltIn::Buddy)
    }

    pub(crate) fn slab_cache(&self) -> &CacheCore {
        self.built_in(BuiltIn::Slab)
    }

    pub(crate) fn built_in(&self, which: BuiltIn) -> &CacheCore {
        &self.built_in[which as usize]
    }

    pub(crate) fn cache_cache(&self) -> &CacheCore {
        self.built_in(BuiltIn::Cache)
    }

    #[inline]
    pub(crate) fn kmalloc_cache(&self, kind: Kind, class: usize) -> &CacheCore {
        &self.built_in[BuiltIn::Kmalloc as usize + kind as usize * CLASSES.len() + class]
    }

    /// Takes the lock of the list of caches.
    pub(crate) fn slab_mutex(&self) -> SpinGuard<'_, CacheList, Holder<'_, P>> {
        // A mutex in every configuration: all who take it may sleep, and its holders take other locks.
        self.caches.lock(Holder::new(
            &self.pages.platform,
            true,
            &classes::SLAB_MUTEX,
        ))
    }

    /// Visits every cache. `visit` may neither create nor destroy one.
    pub(crate) fn for_each_cache(&self, mut visit: impl FnMut(&CacheCore)) {
        self.built_in.iter().for_each(&mut visit);
        let list = self.slab_mutex();
        let mut at = list.head;
        while let Some(core) = NonNull::new(at) {
            // SAFETY: caches are unlinked under this lock before they are freed.
            let core = unsafe { core.as_ref() };
            visit(core);
            at = core.next.load(Ordering::Relaxed);
        }
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

    /// Pages handed out of this type; of bad memory those that are out of use.
    pub fn pages_of(&self, kind: PageType) -> u64 {
        // Bad pages go out of use under a zone's lock, where no CPU's counters are at hand.
        let first = if kind == PageType::Poisoned {
            self.pages.map.bad.out()
        } else {
            0
        };
        self.pages
            .stats
            .iter()
            .fold(first, |sum, cpu| sum.wrapping_add(cpu.pages(kind)))
    }

    /// Gives back what is kept for later: sheaves, empty slabs, per-CPU pages. Says how many pages the slabs gave.
    ///
    /// # Context
    ///
    /// May wait for other CPUs; and for grace periods, if the platform says that the caller may sleep.
    pub fn shrink(&self) -> usize {
        self.zs_shrink();
        self.free_all_deferred();
        self.kvfree_shrink();
        self.prepaid_tick();
        if self.may_wait() {
            self.kvfree_rcu_barrier();
        }
        self.kfence_barrier();
        self.rcu_pages_all();
        self.page_pools_shrink();
        self.vmalloc_shrink(self.may_wait());
        // Ordinary caches first: their slabs' descriptors come free with them. Descriptors of folios and page tables next,
        // those of slabs and free blocks last, since all the others give those back.
        let mut pages = 0;
        self.for_each_cache(|core| pages += self.cache_shrink(core));
        self.drain_all();
        // Free blocks let go of what their last owners left; caches of the kernel's own descriptors can become empty.
        self.pages.settle_all(self);
        self.for_each_cache(|core| pages += self.cache_shrink(core));
        self.discard_all();
        self.drain_all();
        for built_in in [
            BuiltIn::File,
            BuiltIn::Anon,
            BuiltIn::PtDesc,
            BuiltIn::Private,
            BuiltIn::VmArea,
            BuiltIn::PagePool,
            BuiltIn::ZsDesc,
            BuiltIn::Buddy,
            BuiltIn::Slab,
        ] {
            pages += self.cache_shrink(&self.built_in[built_in as usize]);
            self.discard_all();
            self.drain_all();
        }
        pages
    }

    /// Empties the per-CPU lists of all CPUs into the zones (`drain_all_pages`).
    pub fn drain_all(&self) {
        self.pages.drain_all(self);
    }

    /// The periodic work of the CPU it is called on, about once a second: per-CPU lists that are no longer used much shrink
    /// (`refresh_cpu_vm_stats`), and free blocks give back the descriptors that their last owners left them. Without it
    /// both stay at what their busiest hour made of them.
    ///
    /// # Context
    ///
    /// Any that may pin a CPU.
    ///
    /// Deferred frees that lie for long are pushed on, and those that are due are freed, of all CPUs. Addresses of freed vmalloc areas come back.
    /// Who waits for a mempool asks for ordinary memory again. Large free blocks are reported, with [`Config::page_reporting`](crate::Config::page_reporting).
    pub fn tick(&self) {
        self.free_deferred();
        self.rcu_work();
        self.vmalloc_work(true);
        self.pages.decay(self);
        self.pages.settle(self);
        self.look_for_sparse();
        self.reserve_tick();
        self.page_reporting_tick();
        self.mempools_retry();
    }

    /// Frees what waited for a grace period that is over, on all CPUs, and pushes grace periods on without waiting: for a worker that
    /// the platform's [`kick`](Platform::kick) wakes, between ticks. Says how many objects came free.
    ///
    /// # Context
    ///
    /// May take locks; does not sleep for grace periods.
    pub fn rcu_work(&self) -> usize {
        let rcu = self.pages.platform.rcu();
        let freed = self.kvfree_tick(false) + self.prepaid_tick() + self.kfence_work();
        self.discard_due();
        self.rcu_pages_due();
        self.vmalloc_work(false);
        freed + rcu.run_callbacks()
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
