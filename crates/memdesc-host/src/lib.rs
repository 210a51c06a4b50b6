//! memdesc hosted in a process: an arena, a file in memory, is the physical memory, threads are the CPUs.
//!
//! [`Host`] reserves address space for the whole of physical memory and touches none of it, so a 24 GiB machine fits
//! on a small one as long as nobody writes to its pages. A thread becomes a CPU by [`Host::claim`], for the length of a
//! guard, and then pays next to nothing for staying on it; a thread that is none borrows a floating CPU for each operation.

mod arena;
mod cpu;
mod faults;
mod guard;
pub mod interrupt;
mod mmu;
pub mod rcu;
mod stacks;
mod task;
mod window;

use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, compiler_fence, fence};
use std::time::Instant;

use memdesc::lockdep::{Lockdep, Task};
use memdesc::{
    AllocError, BalloonOp, Config, Context, FaultPoint, MemRange, NotReported, PAGE_SHIFT,
    PAGE_SIZE, PageWords, Pfn, Platform, ReclaimRequest, Report, Reported,
};

use arena::Arena;
pub use arena::HostError;
pub use cpu::CpuGuard;
use cpu::Cpus;
pub use faults::Faults;
pub use guard::{FaultFn, StrayFn};
pub use mmu::{MAX_ASID, MmuStats, UserView};
pub use rcu::HostRcu;
pub use task::TaskScope;
pub use window::Window;

/// A function that is asked to make memory free, and says how many pages it freed.
pub type ReclaimFn = dyn Fn(ReclaimRequest) -> usize + Send + Sync;
/// A function that hears of what the context checker finds.
pub type LockdepFn = dyn Fn(&memdesc::lockdep::Report) + Send + Sync;
/// A function that hears of corruption.
pub type CorruptionFn = dyn Fn(&Report<'_>) + Send + Sync;

/// A function that hears of users whose memory is broken: the number of the address space, the address, the page.
pub type MemoryFailureFn = dyn Fn(u64, u64, Pfn) + Send + Sync;

/// The hosted platform.
pub struct Host {
    /// Goes first, in this order: as soon as the arena is unmapped its addresses may be another host's, whose faults are not this one's.
    guard: guard::Guard,
    mmu: mmu::Mmu,
    arena: Arena,
    /// For vmalloc; none under Miri.
    vmalloc: Option<Window>,
    cpus: Cpus,
    /// membarrier(2) works, so the owner's side of a local lock needs only a compiler fence.
    asymmetric: bool,
    /// Call stacks are taken.
    stacks: bool,
    nodes: usize,
    faults: Faults,
    reclaim: Option<Box<ReclaimFn>>,
    corruption: Option<Box<CorruptionFn>>,
    memory_failure: Option<Box<MemoryFailureFn>>,
    rcu: HostRcu,
    lockdep: Box<Lockdep>,
    on_lockdep: Option<Box<LockdepFn>>,
    start: Instant,
    /// Time by hand; 0: the real one.
    clock: AtomicU64,
}

/// How to build a [`Host`].
#[derive(Default)]
pub struct HostBuilder {
    ranges: Vec<MemRange>,
    devices: Vec<MemRange>,
    cpus: usize,
    floating: usize,
    stray: Option<Box<StrayFn>>,
    fault: Option<Box<FaultFn>>,
    nodes: usize,
    reclaim: Option<Box<ReclaimFn>>,
    corruption: Option<Box<CorruptionFn>>,
    memory_failure: Option<Box<MemoryFailureFn>>,
    stall: Option<(u64, Box<rcu::StallFn>)>,
    lockdep: Option<Box<LockdepFn>>,
    vmalloc: Option<usize>,
    stacks: bool,
}

/// Addresses that a host has for vmalloc if nothing else is said.
const VMALLOC_BYTES: usize = 1 << 30;
/// What the range for vmalloc is aligned to: a large page.
const VMALLOC_ALIGN: usize = 2 << 20;

impl HostBuilder {
    /// This physical memory: the same ranges as go to [`memdesc::Mm::new`].
    #[must_use]
    pub fn memory(mut self, ranges: &[MemRange]) -> Self {
        self.ranges = ranges.to_vec();
        self
    }

    /// A device with this memory, behind the physical memory or between its ranges: for [`memdesc::Mm::memremap_pages`].
    #[must_use]
    pub fn device(mut self, range: MemRange) -> Self {
        self.devices.push(range);
        self
    }

    /// So many CPUs that threads can claim (1 by default).
    #[must_use]
    pub fn cpus(mut self, cpus: usize) -> Self {
        self.cpus = cpus;
        self
    }

    /// So many more for threads that claimed none (1 by default if no CPU can be claimed, else 0).
    #[must_use]
    pub fn floating(mut self, floating: usize) -> Self {
        self.floating = floating;
        self
    }

    /// Spread the CPUs over so many NUMA nodes.
    #[must_use]
    pub fn nodes(mut self, nodes: usize) -> Self {
        self.nodes = nodes;
        self
    }

    /// Write more about a page that was touched while it was inaccessible ([`Config::debug_pagealloc`](memdesc::Config::debug_pagealloc)) before the process
    /// dies by SIGSEGV. In the signal handler: no heap, no lock.
    #[must_use]
    pub fn on_stray(
        mut self,
        f: impl Fn(Pfn, &mut dyn std::fmt::Write) + Send + Sync + 'static,
    ) -> Self {
        self.stray = Some(Box::new(f));
        self
    }

    /// Call this when an address of the arena is touched that is inaccessible: the kernel's page fault handler. It is given the address, whether it was a write,
    /// and where the instruction is; if it says `true`, the access is made again, else the process dies as it does without. In the signal handler, on
    /// the stack of who touched it. With [`Config::kfence_objects`](memdesc::Config::kfence_objects) it hands on to
    /// [`Mm::kfence_handle_fault`](memdesc::Mm::kfence_handle_fault).
    #[must_use]
    pub fn on_fault(
        mut self,
        f: impl Fn(usize, bool, usize) -> bool + Send + Sync + 'static,
    ) -> Self {
        self.fault = Some(Box::new(f));
        self
    }

    /// Call this when memory is short.
    #[must_use]
    pub fn on_reclaim(
        mut self,
        f: impl Fn(ReclaimRequest) -> usize + Send + Sync + 'static,
    ) -> Self {
        self.reclaim = Some(Box::new(f));
        self
    }

    /// Call this when corruption is found, instead of a panic.
    #[must_use]
    pub fn on_corruption(mut self, f: impl Fn(&Report<'_>) + Send + Sync + 'static) -> Self {
        self.corruption = Some(Box::new(f));
        self
    }

    /// Call this for each user who had a page mapped that is broken: what a kernel sends SIGBUS for.
    #[must_use]
    pub fn on_memory_failure(mut self, f: impl Fn(u64, u64, Pfn) + Send + Sync + 'static) -> Self {
        self.memory_failure = Some(Box::new(f));
        self
    }

    /// Call this when a reader holds up a grace period for longer than so many nanoseconds, instead of a line on standard error after
    /// 21 s.
    #[must_use]
    pub fn on_rcu_stall(
        mut self,
        stall_ns: u64,
        f: impl Fn(&memdesc::rcu::engine::Stall) + Send + Sync + 'static,
    ) -> Self {
        self.stall = Some((stall_ns, Box::new(f)));
        self
    }

    /// Call this when the context checker finds something, instead of a panic.
    #[must_use]
    pub fn on_lockdep(
        mut self,
        f: impl Fn(&memdesc::lockdep::Report) + Send + Sync + 'static,
    ) -> Self {
        self.lockdep = Some(Box::new(f));
        self
    }

    /// So many bytes of addresses for vmalloc (1 GiB by default; 0 for none). Under Miri there are none in any case.
    #[must_use]
    pub fn vmalloc(mut self, bytes: usize) -> Self {
        self.vmalloc = Some(bytes);
        self
    }

    /// Take call stacks for reports ([`memdesc::Config::stack_depot`]), and print their symbols. Unwinding takes locks, so there are none from
    /// signal handlers, and it is slow: for looking for a bug.
    #[must_use]
    pub fn stacks(mut self, stacks: bool) -> Self {
        self.stacks = stacks;
        self
    }

    /// Reserves the address space.
    ///
    /// # Errors
    ///
    /// The kernel's, if it does not give that much.
    pub fn build(self) -> Result<Host, HostError> {
        let cpus = self.cpus.max(usize::from(self.floating == 0));
        let (stall_ns, stall) = match self.stall {
            Some((ns, f)) => (ns, Some(f)),
            None => (memdesc::rcu::engine::Engine::STALL_NS, None),
        };
        let arena = Arena::new(&[self.ranges, self.devices].concat())?;
        let vmalloc = match self.vmalloc.unwrap_or(VMALLOC_BYTES) {
            bytes if bytes > 0 && !cfg!(miri) => {
                let window = Window::on(arena.memory().clone(), bytes, VMALLOC_ALIGN);
                Some(window.map_err(|source| HostError::Reserve { bytes, source })?)
            }
            _ => None,
        };
        Ok(Host {
            mmu: mmu::Mmu::new(),
            guard: guard::Guard::new(&arena, self.stray, self.fault),
            arena,
            vmalloc,
            cpus: Cpus::new(cpus, self.floating),
            asymmetric: register_membarrier(),
            stacks: self.stacks,
            nodes: self.nodes.max(1),
            faults: Faults::default(),
            reclaim: self.reclaim,
            corruption: self.corruption,
            memory_failure: self.memory_failure,
            rcu: rcu::host_rcu(stall_ns, stall),
            lockdep: Box::new(Lockdep::new()),
            on_lockdep: self.lockdep,
            start: Instant::now(),
            clock: AtomicU64::new(0),
        })
    }
}

impl Host {
    /// Starts a host.
    pub fn builder() -> HostBuilder {
        HostBuilder::default()
    }

    /// One range of RAM from physical address 0, one CPU: what a test wants.
    ///
    /// # Errors
    ///
    /// As [`HostBuilder::build`].
    pub fn small(pages: u32) -> Result<(Host, [MemRange; 1]), HostError> {
        let ranges = [ram(0, pages)];
        Ok((Host::builder().memory(&ranges).build()?, ranges))
    }

    /// Makes the calling thread this CPU until the guard goes. A thread may claim several and is the last one
    /// claimed; [`CpuGuard::switch`] changes between them.
    ///
    /// `None` if another thread has it, or there is no such CPU.
    pub fn claim(&self, cpu: usize) -> Option<CpuGuard<'_>> {
        self.cpus.claim(cpu)
    }

    /// From now on time is what is said here, in nanoseconds, and goes by hand: for replaying what took longer.
    pub fn set_clock(&self, ns: u64) {
        self.clock.store(ns.max(1), Ordering::Relaxed);
    }

    /// What this thread allocates with `__GFP_ACCOUNT` is charged to the group with this number until the guard goes (`set_active_memcg`); 0 for nobody.
    /// Signal handlers that say that they are interrupts charge nobody.
    pub fn memcg_scope(id: u16) -> TaskScope {
        TaskScope::memcg(id)
    }

    /// What this thread asks for and ordinary memory does not give comes from the reserve with this number until the guard goes
    /// (`memalloc_noreclaim_save`); 0 for none. Not what is asked for in signal handlers that say that they are interrupts.
    pub fn reserve_scope(id: u16) -> TaskScope {
        TaskScope::reserve(id)
    }

    /// Fault injection.
    pub fn faults(&self) -> &Faults {
        &self.faults
    }

    /// What the machine did for users.
    pub fn mmu_stats(&self) -> MmuStats {
        self.mmu.stats()
    }

    /// The arena's resident bytes, as the kernel counts them.
    pub fn resident_bytes(&self) -> u64 {
        self.arena.resident_bytes()
    }

    /// Are free pages inaccessible, if that was asked for ([`Config::debug_pagealloc`](memdesc::Config::debug_pagealloc))? `false` once the
    /// process has had as many mappings as it can have.
    pub fn guards_free_pages(&self) -> bool {
        !self.guard.ended()
    }
}

impl std::fmt::Debug for Host {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Host")
            .field("arena", &self.arena)
            .field("cpus", &self.cpus)
            .finish_non_exhaustive()
    }
}

/// `pages` pages of RAM from this page frame on, on node 0.
pub fn ram(start: u32, pages: u32) -> MemRange {
    MemRange {
        start: Pfn(start).phys(),
        end: Pfn(start + pages).phys(),
        node: 0,
    }
}

// SAFETY:
// 1. The arena is mapped for the life of the host, private to it, at one base; ranges are what it was made for.
// 2. `Cpus::pin` gives a CPU to one thread at a time: a claimed one to its thread, a floating one by compare-exchange. A signal
//    handler runs on its thread's CPU, and finishes first.
// 3. membarrier(MEMBARRIER_CMD_PRIVATE_EXPEDITED) runs a full barrier on every thread of the process; without it both sides
//    are full fences.
// 4. The window is the host's alone, and maps the file that the arena maps.
unsafe impl Platform for Host {
    #[inline]
    fn direct_map(&self) -> *mut u8 {
        self.arena.base()
    }

    fn maps(&self, range: &MemRange) -> bool {
        self.arena.reaches(range.end.0)
    }

    fn nr_cpus(&self) -> usize {
        self.cpus.count()
    }

    #[inline]
    fn pin(&self) -> usize {
        self.cpus.pin()
    }

    #[inline]
    unsafe fn unpin(&self, cpu: usize) {
        self.cpus.unpin(cpu);
    }

    #[inline]
    fn try_pin(&self) -> Option<usize> {
        self.cpus.try_pin()
    }

    fn park(&self, word: &AtomicU32, value: u32) {
        sys::futex_wait(word, value);
    }

    fn unpark(&self, word: &AtomicU32) {
        sys::futex_wake(word, 1);
    }

    fn unpark_all(&self, word: &AtomicU32) {
        sys::futex_wake(word, i32::MAX);
    }

    fn flush_tlb(&self, asid: u64, start: u64, end: u64) {
        self.mmu.flush(asid, start, end);
    }

    fn cpu_to_node(&self, cpu: usize) -> usize {
        // The division is dear on the fast path.
        if self.nodes == 1 { 0 } else { cpu % self.nodes }
    }

    #[inline]
    fn light_barrier(&self) {
        light_barrier(self.asymmetric);
    }

    fn heavy_barrier(&self) {
        heavy_barrier(self.asymmetric);
    }

    type Rcu = HostRcu;

    #[inline]
    fn rcu(&self) -> &HostRcu {
        &self.rcu
    }

    fn with_lockdep(&self, f: &mut dyn FnMut(&Lockdep, &Task)) {
        interrupt::TASK.with(|task| f(&self.lockdep, task));
    }

    fn irqs_enabled(&self) -> bool {
        interrupt::enabled()
    }

    fn lockdep_report(&self, report: &memdesc::lockdep::Report) {
        match &self.on_lockdep {
            Some(f) => f(report),
            None => panic!("{report}"),
        }
    }

    fn context(&self) -> Context {
        interrupt::context()
    }

    #[inline]
    fn relax(&self, round: u32) {
        // The one we wait for may need our core.
        if round % 64 == 63 {
            std::thread::yield_now();
        }
    }

    fn reclaim(&self, request: ReclaimRequest) -> usize {
        self.reclaim.as_ref().map_or(0, |f| f(request))
    }

    fn kernel_map_pages(&self, pfn: Pfn, order: usize, enable: bool) {
        self.guard.map(&self.arena, pfn, order, enable);
    }

    fn report_free_pages(&self, blocks: &[(Pfn, usize)]) -> Result<Reported, NotReported> {
        self.guard.report(&self.arena, blocks)
    }

    fn taken_over(&self, config: &Config, words: PageWords) {
        if config.debug_pagealloc || config.kfence_objects > 0 {
            self.guard.watch(words);
        }
    }

    fn balloon_pages(&self, blocks: &[(Pfn, usize)], op: BalloonOp) {
        if op == BalloonOp::Inflate {
            for &(pfn, order) in blocks {
                let offset = (pfn.0 as usize) << PAGE_SHIFT;
                let punched = self.arena.punch(offset, PAGE_SIZE << order);
                // A file system that has no holes keeps the memory: no harm but to those who wait for it.
                debug_assert!(punched.is_ok(), "{punched:?}");
            }
        }
    }

    fn memory_failure_notify(&self, asid: u64, address: u64, pfn: Pfn) {
        if let Some(f) = &self.memory_failure {
            f(asid, address, pfn);
        }
    }

    #[inline]
    fn current_memcg(&self) -> u16 {
        task::memcg()
    }

    fn current_reserve(&self) -> u16 {
        task::reserve()
    }

    #[inline]
    fn should_fail(&self, point: FaultPoint) -> bool {
        self.faults.should_fail(point)
    }

    fn vmalloc_range(&self) -> Option<NonNull<[u8]>> {
        let window = self.vmalloc.as_ref()?;
        let base = NonNull::new(window.base())?;
        Some(NonNull::slice_from_raw_parts(base, window.len()))
    }

    fn vmap(&self, addr: usize, pfn: Pfn, pages: usize) -> Result<(), AllocError> {
        let window = self.vmalloc.as_ref().ok_or(AllocError::NoAddressSpace)?;
        window
            .map(addr.wrapping_sub(window.base().addr()), pfn, pages, true)
            .map_err(|_| AllocError::NoPageTable)
    }

    // The system flushes as it unmaps, so there is nothing left for `flush_tlb_kernel_range`.
    fn vunmap(&self, start: usize, end: usize) {
        if let Some(window) = &self.vmalloc {
            let offset = start.wrapping_sub(window.base().addr());
            let unmapped = window.unmap(offset, end - start);
            assert!(unmapped.is_ok(), "{unmapped:?} (vm.max_map_count?)");
        }
    }

    fn now(&self) -> u64 {
        match self.clock.load(Ordering::Relaxed) {
            0 => self.start.elapsed().as_nanos() as u64,
            now => now,
        }
    }

    #[inline(never)]
    fn save_stack(&self, frames: &mut [usize]) -> usize {
        if self.stacks && interrupt::context() <= Context::Atomic {
            stacks::save(frames)
        } else {
            0
        }
    }

    fn symbol(&self, address: usize, out: &mut dyn std::fmt::Write) -> std::fmt::Result {
        if interrupt::context() <= Context::Atomic {
            stacks::symbol(address, out)
        } else {
            write!(out, "{address:#x}")
        }
    }

    fn corruption(&self, report: &Report<'_>) {
        match &self.corruption {
            Some(f) => f(report),
            None => panic!("{report}"),
        }
    }
}

#[cfg(all(target_os = "linux", not(miri)))]
mod sys {
    const PRIVATE_EXPEDITED: libc::c_int = 1 << 3;
    const REGISTER_PRIVATE_EXPEDITED: libc::c_int = 1 << 4;

    fn membarrier(command: libc::c_int) -> bool {
        // SAFETY: membarrier(2) takes no pointers.
        unsafe { libc::syscall(libc::SYS_membarrier, command, 0, 0) == 0 }
    }

    pub(super) fn register() -> bool {
        membarrier(REGISTER_PRIVATE_EXPEDITED)
    }

    pub(super) fn barrier() {
        assert!(membarrier(PRIVATE_EXPEDITED), "membarrier(2) worked before");
    }

    pub(super) fn futex_wait(word: &AtomicU32, value: u32) {
        let timeout = std::ptr::null::<libc::timespec>();
        let op = libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG;
        // SAFETY: the word lives through the call; futex(2) only reads it. All its errors mean "look again".
        unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), op, value, timeout) };
    }

    pub(super) fn futex_wake(word: &AtomicU32, most: i32) {
        let op = libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG;
        // SAFETY: futex(2) does not touch the word for a wake-up; the address is only a name.
        unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), op, most) };
    }

    use std::sync::atomic::AtomicU32;
}

#[cfg(not(all(target_os = "linux", not(miri))))]
mod sys {
    pub(super) fn register() -> bool {
        false
    }

    pub(super) fn barrier() {}

    pub(super) fn futex_wait(word: &AtomicU32, value: u32) {
        if word.load(Ordering::Relaxed) == value {
            std::thread::yield_now();
        }
    }

    pub(super) fn futex_wake(_word: &AtomicU32, _most: i32) {}

    use std::sync::atomic::{AtomicU32, Ordering};
}

#[inline]
fn light_barrier(asymmetric: bool) {
    if asymmetric {
        compiler_fence(Ordering::SeqCst);
    } else {
        fence(Ordering::SeqCst);
    }
}

fn heavy_barrier(asymmetric: bool) {
    fence(Ordering::SeqCst);
    if asymmetric {
        membarrier();
    }
}

fn register_membarrier() -> bool {
    sys::register()
}

fn membarrier() {
    sys::barrier();
}
