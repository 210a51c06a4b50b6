//! The platform that the memory manager runs on: this machine.

use core::fmt;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU16, AtomicU32, Ordering, compiler_fence};

use memdesc::lockdep::{Lockdep, Task};
use memdesc::rcu::cpus::{CpuRcu, CpuReaders, Cpus};
use memdesc::rcu::engine::{Engine, Stall};
use memdesc::{
    AllocError, BalloonOp, Config, Context, MemRange, NotReported, PageWords, Pfn, Platform,
    Report, Reported,
};
use spin::Once;
use x86_64::instructions::interrupts;

use crate::paging::{DIRECT_MAP, VMALLOC_SIZE, VMALLOC_START, features, phys_to_virt};
use crate::percpu::{self, MAX_CPUS};
use crate::thread::{self, Thread};
use crate::{balloon, log, memory, park, remote, sched, soak, time, traps, vmap, worker};

/// This machine.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Metal;

/// Its RCU.
pub(crate) type MetalRcu = CpuRcu<Metal, MAX_CPUS>;

static RCU: Once<MetalRcu> = Once::new();

/// Makes the RCU. Before the memory manager.
pub(crate) fn init() {
    RCU.call_once(|| CpuRcu::new(CpuReaders::new(Metal), Engine::STALL_NS));
}

/// What pages are, for those who cannot ask the memory manager.
static WORDS: Once<PageWords> = Once::new();

/// The memory map, once memory has been taken over.
pub(crate) fn words() -> Option<&'static PageWords> {
    WORDS.get()
}

/// A turn of waiting: who waits for a thread that may be on this CPU lets others run now and then.
#[inline]
fn relax(round: u32) {
    remote::serve();
    if round % 64 == 63 {
        sched::yield_now();
    }
}

/// What a thread says of itself; in an interrupt, nothing.
#[inline]
fn of_thread(which: impl FnOnce(&Thread) -> &AtomicU16) -> u16 {
    let said = which(thread::current()).load(Ordering::Relaxed);
    if said != 0 && Metal.context() > Context::Atomic {
        return 0;
    }
    said
}

static LOCKDEP: Lockdep = Lockdep::new();

// SAFETY: `pin` turns interrupts off, and who has them off is neither preempted nor moved; every CPU has a number of its own. A heavy barrier has every CPU that runs go through
// a full fence; one that comes up meanwhile goes through one before it does anything else.
unsafe impl Cpus for Metal {
    #[inline]
    fn pin(&self) -> usize {
        percpu::pin()
    }
    #[inline]
    unsafe fn unpin(&self, _cpu: usize) {
        percpu::unpin();
    }
    #[inline]
    fn light_barrier(&self) {
        compiler_fence(Ordering::SeqCst);
    }
    fn heavy_barrier(&self) {
        remote::heavy_barrier();
    }
    fn relax(&self, round: u32, nap: bool) {
        if nap && round > 8 {
            // Others run, or nobody until the next interrupt.
            sched::nap();
        }
        relax(round);
        core::hint::spin_loop();
    }
    fn now(&self) -> u64 {
        time::now()
    }
    fn stall(&self, stall: &Stall) {
        log!("rcu: {stall:?}");
        if let Some(cpu) = stall.reader {
            let (id, name) = thread::on_cpu(cpu as usize);
            log!("rcu: CPU {cpu} runs thread {id} ({name})");
        }
    }
}

// SAFETY:
// 1. The direct map is where it is, and maps all memory that is given to the memory manager before it is; what it is told to be in use, the image and the
//    page that CPUs start in, is the only memory that anybody else touches.
// 2. As for `Cpus` above: between two pins a thread may be moved, in one it is not. Interrupts and NMIs run on the CPU that they strike, and are over before it goes on.
// 3. As for `Cpus` above.
// 4. The range is one entry of the root, into which nothing else is mapped; `vmap` makes and removes its translations, and a flush reaches
//    every CPU that runs.
unsafe impl Platform for Metal {
    #[inline]
    fn direct_map(&self) -> *mut u8 {
        phys_to_virt(0)
    }

    fn maps(&self, range: &MemRange) -> bool {
        // Below vmalloc, and within the addresses that this CPU has.
        let end = range.end.0;
        end <= 1 << features().phys_bits.min(52)
            && DIRECT_MAP + end <= VMALLOC_START
            && traps::probe((DIRECT_MAP + range.start.0) as usize)
            && traps::probe((DIRECT_MAP + end - 1) as usize)
    }

    fn nr_cpus(&self) -> usize {
        percpu::nr_cpus()
    }

    #[inline]
    fn pin(&self) -> usize {
        percpu::pin()
    }

    #[inline]
    unsafe fn unpin(&self, _cpu: usize) {
        percpu::unpin();
    }

    fn cpu_to_node(&self, cpu: usize) -> usize {
        percpu::of(cpu).node.load(Ordering::Relaxed)
    }

    #[inline]
    fn light_barrier(&self) {
        compiler_fence(Ordering::SeqCst);
    }

    fn heavy_barrier(&self) {
        remote::heavy_barrier();
    }

    type Rcu = MetalRcu;

    #[inline]
    fn rcu(&self) -> &MetalRcu {
        match RCU.get() {
            Some(rcu) => rcu,
            None => unreachable!("made before the memory manager"),
        }
    }

    fn with_lockdep(&self, f: &mut dyn FnMut(&Lockdep, &Task)) {
        f(&LOCKDEP, &thread::current().task);
    }

    fn irqs_enabled(&self) -> bool {
        interrupts::are_enabled()
    }

    fn context(&self) -> Context {
        if percpu::in_nmi() {
            Context::Nmi
        } else if percpu::in_irq() {
            Context::HardIrq
        } else if !interrupts::are_enabled() {
            Context::Atomic
        } else {
            Context::Task
        }
    }

    fn kick(&self) {
        memory::kick();
    }

    #[inline]
    fn relax(&self, round: u32) {
        relax(round);
    }

    fn park(&self, word: &AtomicU32, value: u32) {
        park::park(word, value);
    }

    fn unpark(&self, word: &AtomicU32) {
        park::unpark(word);
    }

    fn unpark_all(&self, word: &AtomicU32) {
        park::unpark_all(word);
    }

    fn wake_reclaim(&self, _node: usize, order: usize) {
        worker::wake_kswapd(order);
    }

    fn current_memcg(&self) -> u16 {
        of_thread(|thread| &thread.memcg)
    }

    fn current_reserve(&self) -> u16 {
        of_thread(|thread| &thread.reserve)
    }

    fn flush_tlb(&self, asid: u64, start: u64, end: u64) {
        // No CPU keeps address spaces apart by number: what it remembers is of the one that it runs.
        remote::flush_space(asid, start, end);
    }

    fn vmalloc_range(&self) -> Option<NonNull<[u8]>> {
        let start = core::ptr::with_exposed_provenance_mut::<u8>(VMALLOC_START as usize);
        NonNull::new(core::ptr::slice_from_raw_parts_mut(
            start,
            // The upper half is for memory managers of tests.
            VMALLOC_SIZE as usize / 2,
        ))
    }

    fn vmap(&self, addr: usize, pfn: Pfn, pages: usize) -> Result<(), AllocError> {
        vmap::map(addr, pfn, pages)
    }

    fn vunmap(&self, start: usize, end: usize) {
        vmap::unmap(start, end);
    }

    fn report_free_pages(&self, blocks: &[(Pfn, usize)]) -> Result<Reported, NotReported> {
        if balloon::balloon().is_some() {
            balloon::report(blocks)
        } else {
            soak::report::report(blocks)
        }
    }

    fn balloon_pages(&self, blocks: &[(Pfn, usize)], op: BalloonOp) {
        balloon::give_or_take(blocks, op);
    }

    fn flush_tlb_kernel_range(&self, start: usize, end: usize) {
        remote::flush(start as u64, end as u64);
    }

    fn taken_over(&self, _config: &Config, words: PageWords) {
        WORDS.call_once(|| words);
    }

    fn now(&self) -> u64 {
        time::now()
    }

    fn save_stack(&self, frames: &mut [usize]) -> usize {
        traps::backtrace(traps::frame_pointer(), frames)
    }

    fn symbol(&self, address: usize, out: &mut dyn fmt::Write) -> fmt::Result {
        // `addr2line -e` on the image knows the rest.
        write!(out, "{address:#018x}")
    }

    fn corruption(&self, report: &Report<'_>) {
        panic!("{report}");
    }
}
