//! What a kernel provides: where physical memory is mapped, which CPU this is, and a few hooks.
//!
//! Implement [`Platform`] and hand it to [`Mm::new`](crate::Mm::new) with the memory map; that is all a port is. `docs/porting.md` says of each method where it is
//! called from, when its default will do, and what breaks when it is wrong; `examples/minimal-kernel` is the least that it takes.

use crate::address::{Pfn, PhysAddr};
use crate::config::{Config, MemRange};
use crate::error::AllocError;
use crate::freepage::{NotReported, PageWords, Reported};
use crate::gfp::Flags;
use crate::lockdep::{self, Acquire, LockClass, Lockdep, Task};
use crate::rcu::Rcu;
use crate::report::Report;
use crate::sync::{RwWaiter, Waiter};
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU32, Ordering};

/// A place at which fault injection may make an allocation fail.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[non_exhaustive]
pub enum FaultPoint {
    /// The page allocator is asked for a block.
    AllocPages,
    /// The descriptors of a split are asked for, in bulk, before the zone is locked.
    Descriptors,
    /// The descriptor of the new owner is asked for.
    Owner,
    /// A cache wants a page for a new slab.
    NewSlab,
    /// A cache is asked for an object.
    CacheAlloc,
    /// A cache is being created.
    CacheCreate,
    /// A vmalloc area wants addresses.
    VmapArea,
    /// The platform is to map a run of an area's pages.
    Vmap,
    /// A pool of compressed memory is being created.
    ZsPool,
    /// A pool wants a page for handles.
    ZsHandles,
    /// A pool wants a page for a new zspage.
    ZsPage,
    /// A memory cgroup is to be charged.
    Charge,
}

/// In what code runs.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Context {
    /// A thread that may sleep.
    Task,
    /// A thread that may not: preemption or interrupts are off, or it holds a lock that spins.
    Atomic,
    /// An interrupt handler.
    HardIrq,
    /// What nothing keeps out.
    Nmi,
}

/// What a balloon does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BalloonOp {
    /// Gives memory to the hypervisor.
    Inflate,
    /// Takes it back.
    Deflate,
}

/// What reclaim is asked for.
#[derive(Clone, Copy, Debug)]
pub struct ReclaimRequest {
    /// Who asks, and how far the reclaimer may go.
    pub gfp: Flags,
    /// The order that could not be had.
    pub order: usize,
    /// How many attempts went before this one.
    pub attempt: u32,
}

/// What the memory manager needs of its surroundings.
///
/// # Safety
///
/// The allocator's soundness rests on these promises:
/// 1. [`direct_map`](Self::direct_map) is at the start of a page, the same pointer for the life of the platform, and for every byte of every
///    range given to [`Mm::new`](crate::Mm::new) that [`maps`](Self::maps) says yes to, `direct_map + physical
///    address` may be read and written through it while the allocator, or the owner it handed the page to, has it.
///    Nobody else touches that memory, but what is [reserved](crate::Config::reserved) in it until it is given back.
/// 2. Between [`pin`](Self::pin) and the matching [`unpin`](Self::unpin) no other thread of execution gets the same CPU
///    number from `pin` or [`try_pin`](Self::try_pin): no preemption, no migration. Pins nest and then give the same
///    number, which is under [`nr_cpus`](Self::nr_cpus). Interrupts, NMIs and signal handlers may strike at any instruction
///    and get the same number: they call nothing but what says that it may be called from any context, and are over before
///    what they interrupted goes on.
/// 3. If one of the two barriers is overridden, then after [`heavy_barrier`](Self::heavy_barrier) returns every store that any CPU made before its
///    latest [`light_barrier`](Self::light_barrier) is visible to the caller, and every load after such a light barrier
///    sees what the caller stored before (`membarrier(2)`, an IPI to all).
/// 4. [`vmalloc_range`](Self::vmalloc_range) is the same for the life of the platform, and nobody else uses these addresses. What
///    [`vmap`](Self::vmap) mapped may be read and written through the range's pointer, and is the same memory as in the direct map, until
///    [`vunmap`](Self::vunmap); after [`flush_tlb_kernel_range`](Self::flush_tlb_kernel_range) no CPU reaches it that way any more.
pub unsafe trait Platform: Sync {
    /// Where physical address 0 is mapped: the base of the direct map.
    fn direct_map(&self) -> *mut u8;

    /// Is this range RAM that the direct map maps? Ranges that are not are refused. The default trusts the memory map.
    fn maps(&self, _range: &MemRange) -> bool {
        true
    }

    /// How many CPUs there are, those that do not run yet included: one more than the largest number that [`pin`](Self::pin) ever gives. Does not change.
    fn nr_cpus(&self) -> usize;

    /// Keeps the caller on its CPU and says which it is (`get_cpu()`, interrupts off). Called wherever an ordinary call is, with any lock of the memory manager held; by
    /// [`Mm::new`](crate::Mm::new) already. Handlers of interrupts may make ordinary calls only if this turns interrupts off.
    fn pin(&self) -> usize;

    /// Undoes one [`pin`](Self::pin).
    ///
    /// # Safety
    ///
    /// `cpu` is what the caller's latest `pin` that is not undone yet gave.
    unsafe fn unpin(&self, cpu: usize);

    /// As [`pin`](Self::pin), from any context, without waiting; `None` where this code can have no CPU. Undone by
    /// [`unpin`](Self::unpin). May strike between any two instructions of `pin` and `unpin` themselves, and leaves what they keep as it was. The default is right only where `pin` bears that.
    #[inline]
    fn try_pin(&self) -> Option<usize> {
        Some(self.pin())
    }

    /// Sleeps as long as the word has this value (`FUTEX_WAIT`); may come back early. For the locks that sleep: those of folios, address spaces, reserves and mempools and the list of
    /// caches in every configuration, and with [`preempt_rt`](crate::Config::preempt_rt) those of zones and caches. Never called while pinned. Spins by default, through [`relax`](Self::relax): right only where
    /// whoever holds the lock runs meanwhile. On one CPU with threads, this sleeps or `relax` yields.
    fn park(&self, word: &AtomicU32, value: u32) {
        let mut round = 0;
        while word.load(Ordering::Relaxed) == value && round < 256 {
            self.relax(round);
            core::hint::spin_loop();
            round += 1;
        }
    }

    /// Wakes one who sleeps on the word (`FUTEX_WAKE`), without touching the word, whose memory may be gone. Called from any context: a kernel that cannot wake from an NMI
    /// does so a little later (`irq_work`). The default belongs to the default [`park`](Self::park), and to no other.
    fn unpark(&self, _word: &AtomicU32) {}

    /// Wakes all who sleep on the word. Any context. By default it wakes one: who overrides [`park`](Self::park) overrides this too.
    fn unpark_all(&self, word: &AtomicU32) {
        self.unpark(word);
    }

    /// Translations of an address space, which the number that it was made with names, that a CPU may remember from here to there are no
    /// longer true (`flush_tlb_range`): when this returns no CPU uses them. Called after the entries have changed and before the
    /// pages go to anybody else. In a task, but possibly pinned, with the lock of a page table held: whoever waits for other CPUs here has to be answered by CPUs that wait for that lock with interrupts off, in
    /// [`relax`](Self::relax). The default is right only where no CPU ever loads the page tables of an address space.
    fn flush_tlb(&self, _asid: u64, _start: u64, _end: u64) {}

    /// The NUMA node of a CPU. Called pinned, in every allocation that names none, from any context. Beyond the last there can be (7), it is that.
    fn cpu_to_node(&self, _cpu: usize) -> usize {
        0
    }

    /// The owner's half of an asymmetric fence; see the third promise. Any context. The defaults of both are right on any number of CPUs: override both or neither.
    #[inline]
    fn light_barrier(&self) {
        full_fence();
    }

    /// The other half. In tasks and interrupts, not in NMIs; pinned as a rule, holding nothing that others wait for but in loops with [`relax`](Self::relax). If it waits for other CPUs,
    /// `relax` answers theirs.
    fn heavy_barrier(&self) {
        full_fence();
    }

    /// The RCU that objects freed later, and the memory of descriptors, wait for.
    type Rcu: Rcu;

    /// See [`Rcu`](Self::Rcu).
    fn rcu(&self) -> &Self::Rcu;

    /// Has `f` check something with the kernel's context checker and what the caller's thread of execution holds; by default there is
    /// none. Asked in builds with the feature `lockdep`. From any context.
    fn with_lockdep(&self, _f: &mut dyn FnMut(&Lockdep, &Task)) {}

    /// Are interrupts on? For the context checker.
    fn irqs_enabled(&self) -> bool {
        true
    }

    /// The context checker found something. Panics by default.
    fn lockdep_report(&self, report: &lockdep::Report) {
        panic!("{report}");
    }

    /// In what the caller runs. Decides what deferred freeing may do on the spot; [`Context::Atomic`], the default, is right
    /// where nobody ever calls from an interrupt, and lets nothing sleep: what is freed later is left to [`Mm::tick`](crate::Mm::tick). Any context.
    fn context(&self) -> Context {
        Context::Atomic
    }

    /// There is work for [`Mm::rcu_work`](crate::Mm::rcu_work), found where it could not be done. From any context, pinned, on ways that free: may not call the memory manager, and takes
    /// no lock that what was interrupted may hold. By default it waits for the next [`Mm::tick`](crate::Mm::tick).
    fn kick(&self) {}

    /// One round of waiting for a lock, in tasks and interrupts, pinned or not: a hosted platform yields now and then. Where CPUs wait for each other
    /// ([`heavy_barrier`](Self::heavy_barrier), flushes) this does what others want of this one, or two that wait with interrupts off wait for ever. The default is right for one CPU, and where nobody waits like that.
    #[inline]
    fn relax(&self, _round: u32) {}

    /// Tries to make memory free (direct reclaim). May sleep. Says how many pages came free. Registered
    /// shrinkers have been asked already. The caller may hold locks that sleep, a folio's among them: tries those, and allocates nothing that would reclaim again.
    fn reclaim(&self, _request: ReclaimRequest) -> usize {
        0
    }

    /// A zone fell under its low watermark: background reclaim should run (`wakeup_kswapd`). From any context that may pin a CPU, without locks; only wakes.
    fn wake_reclaim(&self, _node: usize, _order: usize) {}

    /// Pages are about to be handed out (`arch_alloc_page`). Called before the first access, outside all locks. From any context.
    #[inline]
    fn pages_allocated(&self, _pfn: Pfn, _order: usize) {}

    /// Pages came back and will not be touched until [`pages_allocated`](Self::pages_allocated) (`arch_free_page`): the platform may do with
    /// them what it likes. Called outside all locks. From any context.
    #[inline]
    fn pages_freed(&self, _pfn: Pfn, _order: usize) {}

    /// Nobody has these pages of a device any more: they are the device's again (`dev_pagemap_ops.page_free`). From any context.
    fn device_page_free(&self, _pfn: Pfn, _order: usize) {}
    /// Does a page still hold after [`pages_allocated`](Self::pages_allocated) what it held before [`pages_freed`](Self::pages_freed)? If not, poison is not
    /// checked, and no page is taken to be zero. Asked once, when the memory is taken over.
    fn keeps_free_contents(&self) -> bool {
        true
    }

    /// Makes pages of the direct map inaccessible, or accessible again (`__kernel_map_pages`): free ones with
    /// [`Config::debug_pagealloc`](crate::Config::debug_pagealloc), guards, and those that are bad. They may be accessible already. When it returns, no CPU reaches
    /// what is inaccessible; where other CPUs cannot be waited for they may learn it late, and all that is missed is a stray access. Called outside all locks. From any context; cannot fail.
    fn kernel_map_pages(&self, _pfn: Pfn, _order: usize, _enable: bool) {}

    /// These blocks are free, and nobody will touch them before this returns, nor after it before they are handed out again: whoever lends
    /// the memory may have it back until it is touched (`page_reporting_dev_info::report`). Up to 32 blocks; they may be inaccessible. Called from
    /// [`Mm::tick`](crate::Mm::tick) and [`Mm::page_report`](crate::Mm::page_report), outside all locks.
    ///
    /// # Errors
    ///
    /// It could not be done, for some of them at least; it is tried again later. The default has nobody to report to.
    fn report_free_pages(&self, _blocks: &[(Pfn, usize)]) -> Result<Reported, NotReported> {
        Err(NotReported)
    }

    /// The memory has been taken over: from here on `words` tells what its pages are, for a handler of stray accesses. Called once, by
    /// [`Mm::new`](crate::Mm::new).
    fn taken_over(&self, _config: &Config, _words: PageWords) {}
    /// Blocks go to the hypervisor, which may take the memory behind them away; or come back, and may be touched again, whatever they hold. Called outside
    /// all locks; the blocks are in nobody's hands ([`Balloon`](crate::Balloon)).
    fn balloon_pages(&self, _blocks: &[(Pfn, usize)], _op: BalloonOp) {}

    /// A page that a user had mapped is broken, and what it held is lost: at this address of the address space of this number
    /// (`SIGBUS`, `BUS_MCEERR_AO`). An entry that says so is in its place. Called from [`Mm::memory_failure`](crate::Mm::memory_failure) with the folio and the list of who
    /// maps it locked: takes note, and sends the signal.
    fn memory_failure_notify(&self, _asid: u64, _address: u64, _pfn: Pfn) {}

    /// The memory cgroup that the caller's allocations with `__GFP_ACCOUNT` are charged to: a number of [`MemCgroup::id`](crate::MemCgroup::id) that is kept as
    /// long as this says so, by its handle; 0 for nobody (`current`'s, or what `set_active_memcg` said). Asked only once there are groups. From any
    /// context: in an interrupt it is best nobody.
    #[inline]
    fn current_memcg(&self) -> u16 {
        0
    }

    /// The reserve that the caller's task is entitled to, by its [number](crate::Reserve::id); 0, the default, for none (`PF_MEMALLOC`, but strict). What its ordinary
    /// requests do not get comes from there, and they do not reclaim. Called from any context, where ordinary memory has failed.
    fn current_reserve(&self) -> u16 {
        0
    }

    /// Should the allocation at this point fail? For tests. From any context.
    #[inline]
    fn should_fail(&self, _point: FaultPoint) -> bool {
        false
    }

    /// The addresses that vmalloc may use, in whole pages, outside the direct map; `None`, the default, if it shall not work at all. Best aligned to 2 MiB.
    fn vmalloc_range(&self) -> Option<NonNull<[u8]>> {
        None
    }

    /// Maps `pages` pages from `pfn` on at this address of the [`vmalloc_range`](Self::vmalloc_range), to be read and written by the kernel. Nothing is mapped
    /// there. May sleep, and may allocate page tables from this memory manager (`vmap_range_noflush`).
    ///
    /// # Errors
    ///
    /// [`AllocError::NoPageTable`], or why there was no memory for one; some of the pages may be mapped then.
    fn vmap(&self, _addr: usize, _pfn: Pfn, _pages: usize) -> Result<(), AllocError> {
        Err(AllocError::NoPageTable)
    }

    /// Removes all translations from `start` to `end`, of which there may be none (`vunmap_range_noflush`). CPUs may remember them until
    /// [`flush_tlb_kernel_range`](Self::flush_tlb_kernel_range). Frees no page tables, cannot fail, allocates nothing. Called from threads
    /// that may sleep, and from [`Mm::tick`](crate::Mm::tick) and [`Mm::rcu_work`](crate::Mm::rcu_work).
    fn vunmap(&self, _start: usize, _end: usize) {}

    /// Has all CPUs forget what they remember of translations from `start` to `end`. Called where [`vunmap`](Self::vunmap) is; allocates nothing.
    fn flush_tlb_kernel_range(&self, _start: usize, _end: usize) {}

    /// Monotonic time in nanoseconds: for "allocated 3 s ago" in debug reports, and for how long a deferred free may lie. From any
    /// context. By default time stands still: what [`Config`] says in nanoseconds never comes then, but for 0.
    fn now(&self) -> u64 {
        0
    }

    /// The caller's return addresses, innermost first, as many as fit; says how many (`stack_trace_save`). For call stacks in reports
    /// ([`Config::stack_depot`](crate::Config::stack_depot)). None by default: then there is only who called the memory manager. From any context: a platform
    /// that cannot unwind in some gives none there.
    fn save_stack(&self, _frames: &mut [usize]) -> usize {
        0
    }

    /// Writes what is at a return address, for a report that is printed: the address by default. From any context, as far as reports are printed there.
    ///
    /// # Errors
    ///
    /// The writer's.
    fn symbol(&self, address: usize, out: &mut dyn core::fmt::Write) -> core::fmt::Result {
        write!(out, "{address:#x}")
    }

    /// Corruption was found. Panics by default. If it returns, what was being freed is left alone for good; what was being
    /// allocated is handed out all the same. A page of a reserve that was written while nobody had it is reported with that reserve's lock held: nothing may be asked of a
    /// reserve in here.
    fn corruption(&self, report: &Report<'_>) {
        panic!("{report}");
    }
}

/// The caller stays on this CPU as long as this lives.
#[derive(Debug)]
pub(crate) struct Pin<'a, P: Platform> {
    platform: &'a P,
    cpu: usize,
}

impl<'a, P: Platform> Pin<'a, P> {
    #[inline]
    pub(crate) fn new(platform: &'a P) -> Self {
        Pin {
            platform,
            cpu: platform.pin(),
        }
    }

    /// From any context; `None` where there is no CPU to be had.
    #[inline]
    pub(crate) fn try_new(platform: &'a P) -> Option<Self> {
        let cpu = platform.try_pin()?;
        Some(Pin { platform, cpu })
    }

    #[inline]
    pub(crate) fn platform(&self) -> &'a P {
        self.platform
    }

    #[inline]
    pub(crate) fn cpu(&self) -> usize {
        self.cpu
    }
}

impl<P: Platform> Drop for Pin<'_, P> {
    #[inline]
    fn drop(&mut self) {
        // SAFETY: `cpu` is from the `pin` in `new`, and guards are dropped in the reverse order they are made.
        unsafe { self.platform.unpin(self.cpu) }
    }
}

/// The platform's barriers in the shape the local lock wants them.
pub(crate) struct PlatformBarriers<'a, P>(pub(crate) &'a P);

impl<P: Platform> crate::sync::Barriers for PlatformBarriers<'_, P> {
    #[inline]
    fn light(&self) {
        self.0.light_barrier();
    }
    fn heavy(&self) {
        self.0.heavy_barrier();
    }
    fn relax(&self, round: u32) {
        self.0.relax(round);
    }
}

/// What the context checker knows of a hold; dropped, it knows that it is over. Nothing at all without the feature.
#[derive(Debug)]
pub(crate) struct Checked<'a, P: Platform> {
    #[cfg(feature = "lockdep")]
    platform: &'a P,
    #[cfg(feature = "lockdep")]
    class: &'static LockClass,
    #[cfg(not(feature = "lockdep"))]
    _none: core::marker::PhantomData<&'a P>,
}

impl<'a, P: Platform> Checked<'a, P> {
    #[inline]
    #[cfg_attr(feature = "lockdep", track_caller)]
    #[cfg_attr(not(feature = "lockdep"), allow(unused_variables))]
    pub(crate) fn new(platform: &'a P, class: &'static LockClass, how: Acquire) -> Self {
        #[cfg(feature = "lockdep")]
        {
            let at = core::panic::Location::caller();
            let env = env(platform);
            let mut report = None;
            platform.with_lockdep(&mut |lockdep, task| {
                report = lockdep.acquire(env, task, class, how, at);
            });
            let checked = Checked { platform, class };
            if let Some(report) = report {
                platform.lockdep_report(&report);
            }
            checked
        }
        #[cfg(not(feature = "lockdep"))]
        Checked {
            _none: core::marker::PhantomData,
        }
    }
}

#[cfg(feature = "lockdep")]
impl<P: Platform> Drop for Checked<'_, P> {
    fn drop(&mut self) {
        self.platform
            .with_lockdep(&mut |lockdep, task| lockdep.release(task, self.class));
    }
}

#[cfg(feature = "lockdep")]
fn env<P: Platform>(platform: &P) -> lockdep::Env {
    lockdep::Env {
        context: platform.context(),
        irqs_on: platform.irqs_enabled(),
    }
}

/// The caller may take a lock of this class from here on, or find that he need not (`might_lock`): checked as if he did, so that
/// what is wrong is found whether lists are empty this time or not. `sleeps`: as for [`Holder::new`].
#[inline]
#[cfg_attr(not(feature = "lockdep"), allow(unused_variables))]
#[cfg_attr(feature = "lockdep", track_caller)]
pub(crate) fn might_lock<P: Platform>(platform: &P, sleeps: bool, class: &'static LockClass) {
    #[cfg(feature = "lockdep")]
    drop(Holder::new(platform, sleeps, class));
}

/// The caller may sleep from here on (`might_alloc`, `might_sleep`).
#[inline]
#[cfg_attr(not(feature = "lockdep"), allow(unused_variables))]
#[cfg_attr(feature = "lockdep", track_caller)]
pub(crate) fn might_sleep<P: Platform>(platform: &P, what: &'static str) {
    #[cfg(feature = "lockdep")]
    {
        let at = core::panic::Location::caller();
        let env = env(platform);
        let mut report = None;
        platform.with_lockdep(&mut |lockdep, task| {
            report = lockdep.might_sleep(env, task, what, at);
        });
        if let Some(report) = report {
            platform.lockdep_report(&report);
        }
    }
}

/// What the holder of a lock keeps: his CPU, since a spinning lock's holder must not be preempted; or nothing, if the lock
/// sleeps.
#[derive(Debug)]
pub(crate) struct Holder<'a, P: Platform> {
    platform: &'a P,
    sleeps: bool,
    _checked: Checked<'a, P>,
    _pin: Option<Pin<'a, P>>,
}

impl<'a, P: Platform> Holder<'a, P> {
    /// For a lock that spins, or with `sleeps` for one that sleeps.
    #[inline]
    #[cfg_attr(feature = "lockdep", track_caller)]
    pub(crate) fn new(platform: &'a P, sleeps: bool, class: &'static LockClass) -> Self {
        // Pinned first: where that turns interrupts off, the checker has to see that they are.
        let pin = (!sleeps).then(|| Pin::new(platform));
        Holder {
            platform,
            sleeps,
            _checked: Checked::new(platform, class, Acquire::Lock),
            _pin: pin,
        }
    }

    /// For an attempt, from any context.
    #[inline]
    #[cfg_attr(feature = "lockdep", track_caller)]
    pub(crate) fn trying(platform: &'a P, sleeps: bool, class: &'static LockClass) -> Self {
        // Where there is no CPU to be had, nobody can take it away either.
        let pin = if sleeps { None } else { Pin::try_new(platform) };
        Holder {
            platform,
            sleeps,
            _checked: Checked::new(platform, class, Acquire::Try),
            _pin: pin,
        }
    }
}

impl<P: Platform> Waiter for Holder<'_, P> {
    #[inline]
    fn sleeps(&self) -> bool {
        self.sleeps
    }
    #[inline]
    fn relax(&self, round: u32) {
        self.platform.relax(round);
    }
    fn park(&self, word: &AtomicU32, value: u32) {
        self.platform.park(word, value);
    }
    fn unpark(&self, word: &AtomicU32) {
        self.platform.unpark(word);
    }
}

impl<P: Platform> RwWaiter for Holder<'_, P> {
    fn unpark_all(&self, word: &AtomicU32) {
        self.platform.unpark_all(word);
    }
}

#[inline]
fn full_fence() {
    core::sync::atomic::fence(core::sync::atomic::Ordering::SeqCst);
}

/// A physical address as a pointer into the direct map.
#[inline]
pub(crate) fn phys_to_virt(direct_map: *mut u8, phys: PhysAddr) -> *mut u8 {
    direct_map.wrapping_add(phys.0 as usize)
}
