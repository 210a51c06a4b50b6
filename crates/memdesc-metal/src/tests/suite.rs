//! The core's own tests (`memdesc-selftest`) on this machine: all CPUs take one after the other from the table, a line for each.
//!
//! A test has memory managers of its own. Their memory is an arena, pages in a row of the machine's; they run on [`Small`], which is this machine with addresses for vmalloc
//! that are this CPU's. Where no arena is to be had while others have theirs, a CPU waits; where there is none at all, the test is skipped.
//!
//! What a test finds wrong is a panic: its line says so, and the machine ends.

use alloc::boxed::Box;
use core::fmt;
use core::ops::Deref;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

use memdesc::lockdep::{Lockdep, Task};
use memdesc::rcu::Rcu;
use memdesc::{
    AllocError, Config, Context, MAX_ORDER, MemRange, Mm, PAGE_SIZE, Pfn, Platform, Report,
};
use memdesc_selftest::{Case, Lab};
use spin::Mutex;

use super::{Machine, settled};
use crate::paging::{VMALLOC_SIZE, VMALLOC_START};
use crate::percpu::MAX_CPUS;
use crate::platform::{Metal, MetalRcu};
use crate::{log, percpu, remote, smp, time, traps, vmap};

/// Addresses for vmalloc that a CPU's tests have, in the upper half of the range, of which the machine's own memory manager uses the lower.
const WINDOW: u64 = 64 << 20;
/// Pages of the stack that a test runs on.
const STACK_PAGES: usize = 64;
/// A MiB has so many pages.
const MIB: u32 = (1 << 20) / PAGE_SIZE as u32;

/// The test that a CPU runs, by its place in the table and one more; 0 for none.
static RUNNING: [AtomicUsize; MAX_CPUS] = [const { AtomicUsize::new(0) }; MAX_CPUS];

/// This machine, for a memory manager beside the machine's own.
#[derive(Clone, Copy, Debug)]
pub(super) struct Small {
    /// Where its addresses for vmalloc start.
    window: u64,
}

// SAFETY: everything that the promises are about is the machine's, which keeps them, but for vmalloc's range: that is another for each CPU, and a CPU has one test at a time.
unsafe impl Platform for Small {
    fn direct_map(&self) -> *mut u8 {
        Metal.direct_map()
    }
    fn maps(&self, range: &MemRange) -> bool {
        Metal.maps(range)
    }
    fn nr_cpus(&self) -> usize {
        Metal.nr_cpus()
    }
    fn pin(&self) -> usize {
        Platform::pin(&Metal)
    }
    unsafe fn unpin(&self, cpu: usize) {
        // SAFETY: the caller's promise.
        unsafe { Platform::unpin(&Metal, cpu) }
    }
    fn park(&self, word: &AtomicU32, value: u32) {
        Metal.park(word, value);
    }
    fn unpark(&self, word: &AtomicU32) {
        Metal.unpark(word);
    }
    fn unpark_all(&self, word: &AtomicU32) {
        Metal.unpark_all(word);
    }
    fn light_barrier(&self) {
        Platform::light_barrier(&Metal);
    }
    fn heavy_barrier(&self) {
        Platform::heavy_barrier(&Metal);
    }
    type Rcu = MetalRcu;
    fn rcu(&self) -> &MetalRcu {
        Metal.rcu()
    }
    fn with_lockdep(&self, f: &mut dyn FnMut(&Lockdep, &Task)) {
        Metal.with_lockdep(f);
    }
    fn irqs_enabled(&self) -> bool {
        Metal.irqs_enabled()
    }
    fn context(&self) -> Context {
        Metal.context()
    }
    fn relax(&self, round: u32) {
        Platform::relax(&Metal, round);
    }
    fn flush_tlb(&self, asid: u64, start: u64, end: u64) {
        Metal.flush_tlb(asid, start, end);
    }
    fn vmalloc_range(&self) -> Option<NonNull<[u8]>> {
        let start = core::ptr::with_exposed_provenance_mut::<u8>(self.window as usize);
        NonNull::new(core::ptr::slice_from_raw_parts_mut(start, WINDOW as usize))
    }
    fn vmap(&self, addr: usize, pfn: Pfn, pages: usize) -> Result<(), AllocError> {
        Metal.vmap(addr, pfn, pages)
    }
    fn vunmap(&self, start: usize, end: usize) {
        Metal.vunmap(start, end);
    }
    fn flush_tlb_kernel_range(&self, start: usize, end: usize) {
        Metal.flush_tlb_kernel_range(start, end);
    }
    fn now(&self) -> u64 {
        Metal.now()
    }
    fn save_stack(&self, frames: &mut [usize]) -> usize {
        Metal.save_stack(frames)
    }
    fn corruption(&self, report: &Report<'_>) {
        panic!("{report}");
    }
}

/// Memory for one test after the other.
struct Arena {
    platform: Small,
    start: Pfn,
    pages: u32,
    /// Pages that its machines have, and how many machines there are.
    used: AtomicU32,
    machines: AtomicU32,
}

/// A machine in an arena.
struct Booted<'l> {
    arena: &'l Arena,
    mm: Box<Mm<Small>>,
}

impl Deref for Booted<'_> {
    type Target = Mm<Small>;

    fn deref(&self) -> &Mm<Small> {
        &self.mm
    }
}

impl Drop for Booted<'_> {
    fn drop(&mut self) {
        // What waits for readers leads into its memory.
        self.mm.rcu().barrier();
        if self.arena.machines.fetch_sub(1, Ordering::Relaxed) == 1 {
            self.arena.used.store(0, Ordering::Relaxed);
        }
    }
}

impl Lab for Arena {
    type Platform = Small;
    type Booted<'l> = Booted<'l>;

    fn config(&self) -> Config {
        Config::default()
    }

    fn boot(&self, config: &Config, pages: u32) -> Booted<'_> {
        let from = self.used.fetch_add(pages, Ordering::Relaxed);
        assert!(
            from + pages <= self.pages,
            "the table says that {} pages are enough",
            self.pages
        );
        self.machines.fetch_add(1, Ordering::Relaxed);
        let start = self.start.add(from);
        let range = MemRange {
            start: start.phys(),
            end: start.add(pages).phys(),
            node: 0,
        };
        // The pages were somebody's before. Locks sleep as the machine's do: one checker looks at all of them.
        let config = Config {
            memory_is_zeroed: false,
            preempt_rt: config.preempt_rt || crate::pvh::info().is_some_and(|boot| boot.has("rt")),
            ..*config
        };
        match Mm::new(self.platform, &config, &[range]) {
            Ok(mm) => Booted {
                arena: self,
                mm: Box::new(mm),
            },
            Err(why) => panic!("{pages} pages from {start:?}: {why}"),
        }
    }

    fn can_read(&self, at: *const u8) -> bool {
        traps::probe(at.addr())
    }
}

/// So many pages in a row, aligned to the largest block.
fn take_arena(machine: &Machine, pages: u32) -> Option<Pfn> {
    let step = 1 << MAX_ORDER;
    machine.ranges.iter().find_map(|range| {
        let first = Pfn::containing(range.start).0.next_multiple_of(step);
        let end = Pfn::containing(range.end).0;
        (first..end.saturating_sub(pages - 1))
            .step_by(step as usize)
            .map(Pfn)
            .find(|&start| machine.mm.alloc_contig_range(start, pages).is_ok())
    })
}

/// How the tests went.
#[derive(Default)]
pub(super) struct Tally {
    pub(super) passed: usize,
    pub(super) skipped: usize,
    pub(super) failed: usize,
}

/// Runs the tests with this in their names.
pub(super) fn run(machine: &Machine, wanted: &str) -> Tally {
    let all = Case::<Arena>::ALL;
    let chosen = || (0..all.len()).filter(|&nth| all[nth].name.contains(wanted));
    let count = chosen().count();
    let mut tally = Tally::default();
    if count == 0 {
        return tally;
    }
    log!("KTAP version 1");
    log!("1..{count}");
    machine.mm.shrink();
    let before = settled(&super::ledger(machine));
    // Who takes an arena, and how many there are.
    let (arenas, next) = (Mutex::new(0u32), AtomicUsize::new(0));
    let (passed, skipped) = (AtomicUsize::new(0), AtomicUsize::new(0));
    smp::on_all_cpus(&|cpu| {
        let window = VMALLOC_START + VMALLOC_SIZE / 2 + cpu as u64 * WINDOW;
        while let Some((number, nth)) = {
            let number = next.fetch_add(1, Ordering::Relaxed);
            chosen().nth(number).map(|nth| (number + 1, nth))
        } {
            crate::memory::work();
            let case = &all[nth];
            let pages = case.mib * MIB;
            let start = loop {
                let mut had = arenas.lock();
                let start = take_arena(machine, pages);
                *had += u32::from(start.is_some());
                let others = *had;
                drop(had);
                if start.is_some() || others == 0 {
                    break start;
                }
                // Until another one gives its arena back.
                smp::wait_until(|| arenas.try_lock().is_some_and(|had| *had < others));
            };
            let skip = |why: fmt::Arguments<'_>| {
                skipped.fetch_add(1, Ordering::Relaxed);
                log!("ok {number} {} # SKIP {why}", case.name);
            };
            let Some(start) = start else {
                skip(format_args!("no {} MiB in a row", case.mib));
                continue;
            };
            let stack = match machine.mm.alloc_kernel_stack(STACK_PAGES, cpu as u64) {
                Ok(stack) => stack,
                Err(why) => {
                    // SAFETY: nobody's but ours.
                    unsafe { machine.mm.free_contig_range(start, pages) };
                    *arenas.lock() -= 1;
                    skip(format_args!("no stack: {why}"));
                    continue;
                }
            };
            let arena = Arena {
                platform: Small { window },
                start,
                pages,
                used: AtomicU32::new(0),
                machines: AtomicU32::new(0),
            };
            let began = time::now();
            RUNNING[cpu].store(number << 16 | (nth + 1), Ordering::Relaxed);
            // SAFETY: just made, nobody else's, and large.
            unsafe { traps::call_on_stack(stack.top(), || (case.run)(&arena)) };
            RUNNING[cpu].store(0, Ordering::Relaxed);
            let ms = (time::now() - began) / 1_000_000;
            // What it left mapped is nobody's; the next test on this CPU has the same addresses.
            vmap::unmap(window as usize, (window + WINDOW) as usize);
            remote::flush(window, window + WINDOW);
            // SAFETY: nobody is on it any more, and no machine is in the arena.
            unsafe {
                machine.mm.free_kernel_stack(stack);
                machine.mm.free_contig_range(start, pages);
            }
            *arenas.lock() -= 1;
            passed.fetch_add(1, Ordering::Relaxed);
            log!("ok {number} {} ({ms} ms)", case.name);
        }
    });
    tally.passed = passed.into_inner();
    tally.skipped = skipped.into_inner();
    machine.mm.rcu().barrier();
    machine.mm.shrink();
    let ledger = super::ledger(machine);
    let after = settled(&ledger);
    if after != before || !ledger.balanced {
        tally.failed += 1;
        log!("# {before} pages were free or metadata before, {after} are: {ledger:?}");
    }
    log!(
        "# the core's tests: {} ok, {} skipped",
        tally.passed,
        tally.skipped
    );
    tally
}

/// A panic on this CPU: if it was in a test, its line.
pub(crate) fn panicked() {
    let running = RUNNING[percpu::this().cpu()].load(Ordering::Relaxed);
    let (number, nth) = (running >> 16, running & 0xffff);
    if let Some(case) = nth
        .checked_sub(1)
        .and_then(|nth| Case::<Arena>::ALL.get(nth))
    {
        log!("not ok {number} {}", case.name);
    }
}
