//! The other CPUs: how they are started, what they run, and work for all of them.
//!
//! A CPU starts by INIT-SIPI-SIPI on a stack of vmalloc's, with guard pages, that has its number as owner; so are its trap stacks. What it started in is its first thread, bound to
//! it, which sleeps until there is work for all CPUs ([`on_all_cpus`]).

use core::sync::atomic::{AtomicU32, AtomicUsize, Ordering, fence};

use crate::acpi::Topology;
use crate::boot::{self, AP_BASE};
use crate::paging::{self, phys_to_virt};
use crate::platform::Metal;
use crate::{apic, gdt, log, park, percpu, remote, sched, thread, time, traps, users};
use memdesc::{AllocError, Mm};
use spin::Mutex;

/// Pages of a CPU's stack.
pub(crate) const STACK_PAGES: usize = 8;

/// The tops of trap stacks that are nobody's yet, handed to the CPU that starts.
static TRAP_STACKS: Mutex<[u64; gdt::TRAP_STACKS]> = Mutex::new([0; gdt::TRAP_STACKS]);

/// The CPU that is being started; 0 once it has come, or is waited for no longer. Whoever of the two takes it out decides.
static AWAITED: AtomicUsize = AtomicUsize::new(0);

fn take_awaited(cpu: usize) -> bool {
    let taken = AWAITED.compare_exchange(cpu, 0, Ordering::AcqRel, Ordering::Relaxed);
    taken.is_ok()
}

/// Starts all other CPUs. Says how many run then, this one included.
///
/// # Errors
///
/// No memory for stacks.
pub(crate) fn start(mm: &'static Mm<Metal>, topology: &Topology) -> Result<usize, AllocError> {
    let code = boot::trampoline();
    // SAFETY: a page of the first MiB, which the memory manager keeps for this until all CPUs run, mapped, and nobody's.
    unsafe { phys_to_virt(AP_BASE).copy_from_nonoverlapping(code.as_ptr(), code.len()) };
    boot::ap_start_cr3.store(paging::root(), Ordering::Relaxed);
    let me = percpu::this().apic_id.load(Ordering::Relaxed);
    let mut running = 1;
    for (i, cpu) in topology.cpus.iter().filter(|c| c.apic_id != me).enumerate() {
        let number = i + 1;
        thread::init_idle(mm, number)?;
        let stack = mm.alloc_kernel_stack(STACK_PAGES, number as u64)?;
        let mut traps = [0; gdt::TRAP_STACKS];
        for top in &mut traps {
            let pages = gdt::TRAP_STACK_SIZE / memdesc::PAGE_SIZE;
            *top = mm.alloc_kernel_stack(pages, number as u64)?.top().addr() as u64;
        }
        *TRAP_STACKS.lock() = traps;
        let new = percpu::of(number);
        new.apic_id.store(cpu.apic_id, Ordering::Relaxed);
        new.node.store(usize::from(cpu.node), Ordering::Relaxed);
        boot::ap_start_stack.store(stack.top().addr() as u64, Ordering::Relaxed);
        boot::ap_start_cpu.store(number as u64, Ordering::Relaxed);
        AWAITED.store(number, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        // Intel SDM, volume 3, "Typical BSP Initialization Sequence".
        apic::send_init(cpu.apic_id);
        time::delay_us(10_000);
        for _ in 0..2 {
            apic::send_startup(cpu.apic_id, (AP_BASE >> 12) as u8);
            time::delay_us(200);
            if new.online.load(Ordering::SeqCst) {
                break;
            }
        }
        let until = time::now() + 5_000_000_000;
        while !new.online.load(Ordering::SeqCst) {
            if time::now() >= until && take_awaited(number) {
                // It may still come, and would find another's stack: no more are started.
                log!("smp: CPU {number} (APIC {}) did not start", cpu.apic_id);
                return Ok(running);
            }
            remote::serve();
            core::hint::spin_loop();
        }
        running += 1;
    }
    Ok(running)
}

/// Where a CPU that was started comes out of `boot.s`.
#[unsafe(no_mangle)]
extern "C" fn metal_ap_start(cpu: usize) -> ! {
    // SAFETY: these are the tables that it runs on already.
    unsafe { paging::activate() };
    // Whoever comes when nobody counts on it any more is not told what all must be told, nor has it a worker.
    if !take_awaited(cpu) {
        loop {
            x86_64::instructions::hlt();
        }
    }
    percpu::init(cpu);
    gdt::init(*TRAP_STACKS.lock());
    traps::init();
    apic::enable();
    apic::start_timer();
    users::init();
    let me = percpu::this();
    // SeqCst: whoever asks all CPUs from now on asks this one too; who asked before has stored what this one sees after the fence.
    me.online.store(true, Ordering::SeqCst);
    fence(Ordering::SeqCst);
    // It was not asked to forget what was unmapped since it loaded its tables.
    paging::flush_local(0, u64::MAX);
    x86_64::instructions::interrupts::enable();
    let mut seen = 0;
    loop {
        run_job(cpu, &mut seen);
        park::park(&GENERATION, seen);
    }
}

type Job = &'static (dyn Fn(usize) + Sync);

/// What all CPUs are to do, and how often there was something.
static JOB: Mutex<Option<Job>> = Mutex::new(None);
static GENERATION: AtomicU32 = AtomicU32::new(0);
/// CPUs that are not through.
static RUNNING: AtomicUsize = AtomicUsize::new(0);

fn run_job(cpu: usize, seen: &mut u32) {
    // Acquire pairs with the Release in `on_all_cpus`: the job is there.
    let generation = GENERATION.load(Ordering::Acquire);
    if generation == *seen {
        return;
    }
    *seen = generation;
    let job = *JOB.lock();
    if let Some(job) = job {
        job(cpu);
    }
    // Release pairs with the Acquire in `on_all_cpus`: what it did is seen.
    RUNNING.fetch_sub(1, Ordering::Release);
}

/// Runs `f` on all CPUs at once, with each one's number, and waits until all are through. From the first CPU.
pub(crate) fn on_all_cpus(f: &(dyn Fn(usize) + Sync)) {
    let me = percpu::this().cpu();
    let others = || percpu::online().filter(|cpu| cpu.cpu() != me);
    RUNNING.store(others().count(), Ordering::Relaxed);
    // SAFETY: nobody has it when this function returns, which waits until all are through.
    let job: Job = unsafe { core::mem::transmute::<&(dyn Fn(usize) + Sync), Job>(f) };
    *JOB.lock() = Some(job);
    GENERATION.fetch_add(1, Ordering::Release);
    park::unpark_all(&GENERATION);
    f(me);
    wait_until(|| RUNNING.load(Ordering::Acquire) == 0);
    *JOB.lock() = None;
}

/// Turns of waiting before a CPU sleeps.
const SPINS: u32 = 5000;

/// Waits for other CPUs, in a thread: a while awake, and then as [`sched::relax`] does.
pub(crate) fn wait_until(is_so: impl Fn() -> bool) {
    let mut turn = 0;
    while !is_so() {
        remote::serve();
        turn += 1;
        if turn < SPINS {
            core::hint::spin_loop();
        } else {
            sched::relax();
        }
    }
}
