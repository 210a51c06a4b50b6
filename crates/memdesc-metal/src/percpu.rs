//! What belongs to one CPU: found by `gs`, whose base is the CPU's own.
//!
//! **Pinning is turning interrupts off**, counted; who pinned first knows whether they were on. An NMI may strike between any two instructions of that, and
//! leaves the count and the flag as it found them ([`Nmi`]).
//!
//! A thread with interrupts on can find itself on another CPU between any two instructions (`sched`), so what is asked of a CPU's own is asked pinned, or in one
//! instruction ([`current`]).

use core::arch::asm;
use core::sync::atomic::{
    AtomicBool, AtomicPtr, AtomicU32, AtomicU64, AtomicUsize, Ordering, compiler_fence,
};

use x86_64::VirtAddr;
use x86_64::instructions::interrupts;
use x86_64::registers::model_specific::GsBase;

use crate::thread::{self, Thread};

/// No address space of users: what no space has as its number.
pub(crate) const NO_SPACE: u64 = u64::MAX;

/// CPUs at most.
pub(crate) const MAX_CPUS: usize = 16;

/// A CPU's own.
#[derive(Debug)]
#[repr(C, align(128))]
pub(crate) struct PerCpu {
    /// Its own address: what `gs:0` reads.
    this: AtomicUsize,
    /// The thread that it runs.
    pub(crate) current: AtomicPtr<Thread>,
    /// Where traps from user mode push, for the instruction `syscall`, and the user's stack pointer meanwhile.
    pub(crate) trap_sp: AtomicUsize,
    pub(crate) user_sp: AtomicUsize,
    /// Where the task state has the first of these.
    pub(crate) tss_sp: AtomicUsize,
    cpu: AtomicUsize,
    /// How often interrupts were turned off, and whether they were on before the first time.
    pins: AtomicU32,
    irqs_were_on: AtomicBool,
    /// Interrupts and NMIs that run, one in the other.
    hardirqs: AtomicU32,
    nmis_in: AtomicU32,
    /// Of the interrupt controller.
    pub(crate) apic_id: AtomicU32,
    pub(crate) node: AtomicUsize,
    /// It runs, and is to be told what all must be told.
    pub(crate) online: AtomicBool,
    /// Ticks of the timer, and how many of them the periodic work has been done for.
    pub(crate) ticks: AtomicU64,
    pub(crate) ticks_worked: AtomicU64,
    /// NMIs it got, and how many of them struck it pinned.
    pub(crate) nmis: AtomicU64,
    pub(crate) nmis_pinned: AtomicU64,
    /// The number of the address space that is loaded; [`NO_SPACE`] for the kernel's own tables.
    pub(crate) asid: AtomicU64,
    /// Somebody else shall run, as soon as that may be.
    pub(crate) resched: AtomicBool,
    /// It has nothing to do, and sleeps until an interrupt.
    pub(crate) idle: AtomicBool,
    /// Its worker is wanted: what it parks on.
    pub(crate) work: AtomicU32,
    /// Threads that ended here and whose stacks are to be freed, linked.
    pub(crate) dead: AtomicPtr<Thread>,
    /// How often it changed threads, and how often a thread had not asked for it.
    pub(crate) switches: AtomicU64,
    pub(crate) preemptions: AtomicU64,
    /// Requests of other CPUs: see `remote`.
    pub(crate) wanted: AtomicU64,
    pub(crate) done: AtomicU64,
    pub(crate) flush: AtomicBool,
}

impl PerCpu {
    const fn new() -> PerCpu {
        PerCpu {
            this: AtomicUsize::new(0),
            current: AtomicPtr::new(core::ptr::null_mut()),
            trap_sp: AtomicUsize::new(0),
            user_sp: AtomicUsize::new(0),
            tss_sp: AtomicUsize::new(0),
            cpu: AtomicUsize::new(0),
            pins: AtomicU32::new(0),
            irqs_were_on: AtomicBool::new(false),
            hardirqs: AtomicU32::new(0),
            nmis_in: AtomicU32::new(0),
            apic_id: AtomicU32::new(0),
            node: AtomicUsize::new(0),
            online: AtomicBool::new(false),
            ticks: AtomicU64::new(0),
            ticks_worked: AtomicU64::new(0),
            nmis: AtomicU64::new(0),
            nmis_pinned: AtomicU64::new(0),
            asid: AtomicU64::new(NO_SPACE),
            resched: AtomicBool::new(false),
            idle: AtomicBool::new(false),
            work: AtomicU32::new(0),
            dead: AtomicPtr::new(core::ptr::null_mut()),
            switches: AtomicU64::new(0),
            preemptions: AtomicU64::new(0),
            wanted: AtomicU64::new(0),
            done: AtomicU64::new(0),
            flush: AtomicBool::new(false),
        }
    }

    /// Is anything pinned, or an interrupt or NMI being handled? For who is on it, with interrupts off.
    pub(crate) fn is_busy(&self) -> bool {
        self.pins.load(Ordering::Relaxed)
            + self.hardirqs.load(Ordering::Relaxed)
            + self.nmis_in.load(Ordering::Relaxed)
            > 0
    }

    /// Which CPU it is.
    pub(crate) fn cpu(&self) -> usize {
        self.cpu.load(Ordering::Relaxed)
    }
}

/// Where `trap_return` finds whether it is in an NMI.
pub(crate) const NMIS_IN: usize = core::mem::offset_of!(PerCpu, nmis_in);

static CPUS: [PerCpu; MAX_CPUS] = [const { PerCpu::new() }; MAX_CPUS];
static NR_CPUS: AtomicUsize = AtomicUsize::new(1);

/// A CPU's own, from anywhere.
pub(crate) fn of(cpu: usize) -> &'static PerCpu {
    &CPUS[cpu]
}

/// How many CPUs the machine has, as far as we use them.
pub(crate) fn nr_cpus() -> usize {
    NR_CPUS.load(Ordering::Relaxed)
}

/// Said once, before the memory manager asks.
pub(crate) fn set_nr_cpus(cpus: usize) {
    NR_CPUS.store(cpus, Ordering::Relaxed);
}

/// The CPUs that run.
pub(crate) fn online() -> impl Iterator<Item = &'static PerCpu> {
    CPUS[..nr_cpus()]
        .iter()
        .filter(|cpu| cpu.online.load(Ordering::SeqCst))
}

/// Makes the calling CPU this one.
pub(crate) fn init(cpu: usize) {
    let me = &CPUS[cpu];
    let address = (&raw const *me).expose_provenance();
    me.this.store(address, Ordering::Relaxed);
    me.cpu.store(cpu, Ordering::Relaxed);
    me.current
        .store(thread::first(cpu).as_ptr(), Ordering::Relaxed);
    GsBase::write(VirtAddr::new(address as u64));
}

/// The calling CPU's own. It stays right as long as the caller stays: with interrupts off, or in a thread that is bound to its CPU.
#[inline]
pub(crate) fn this() -> &'static PerCpu {
    let address: usize;
    // SAFETY: `init` has made `gs:0` the address of an element of `CPUS` before anything else was done on this CPU.
    unsafe {
        asm!("mov {}, gs:[0]", out(reg) address, options(nostack, preserves_flags, pure, readonly));
        &*core::ptr::with_exposed_provenance(address)
    }
}

/// The calling thread's: one instruction, so that it is right wherever the thread is moved before or after.
#[inline]
pub(crate) fn current() -> *mut Thread {
    let thread: *mut Thread;
    // SAFETY: as in `this`; every CPU has a thread from then on.
    unsafe {
        asm!("mov {}, gs:[{}]", out(reg) thread, const core::mem::offset_of!(PerCpu, current),
            options(nostack, preserves_flags, readonly));
    }
    thread
}

/// Interrupts off, once more. Which CPU this is. Any context.
#[inline]
pub(crate) fn pin() -> usize {
    let on = interrupts::are_enabled();
    interrupts::disable();
    let me = this();
    let pins = me.pins.load(Ordering::Relaxed);
    if pins == 0 {
        me.irqs_were_on.store(on, Ordering::Relaxed);
    }
    me.pins.store(pins + 1, Ordering::Relaxed);
    me.cpu()
}

/// Undoes one [`pin`]. Any context.
#[inline]
pub(crate) fn unpin() {
    let me = this();
    let pins = me.pins.load(Ordering::Relaxed) - 1;
    me.pins.store(pins, Ordering::Relaxed);
    if pins == 0 && me.irqs_were_on.load(Ordering::Relaxed) {
        interrupts::enable();
    }
}

/// Is the caller in an NMI?
pub(crate) fn in_nmi() -> bool {
    // With interrupts on it is a thread, whose CPU may change meanwhile.
    !interrupts::are_enabled() && this().nmis_in.load(Ordering::Relaxed) > 0
}

/// In an interrupt?
pub(crate) fn in_irq() -> bool {
    !interrupts::are_enabled() && this().hardirqs.load(Ordering::Relaxed) > 0
}

/// An interrupt handler runs as long as this lives.
#[derive(Debug)]
pub(crate) struct Irq(&'static PerCpu);

impl Irq {
    /// Interrupts are off, as the CPU enters a handler.
    pub(crate) fn enter() -> Irq {
        let me = this();
        let n = me.hardirqs.load(Ordering::Relaxed);
        me.hardirqs.store(n + 1, Ordering::Relaxed);
        Irq(me)
    }
}

impl Drop for Irq {
    fn drop(&mut self) {
        let n = self.0.hardirqs.load(Ordering::Relaxed);
        self.0.hardirqs.store(n - 1, Ordering::Relaxed);
    }
}

/// An NMI handler runs as long as this lives; what it struck finds its pins as they were.
#[derive(Debug)]
pub(crate) struct Nmi {
    me: &'static PerCpu,
    pins: u32,
    irqs_were_on: bool,
}

impl Nmi {
    /// No other NMI comes before the handler is over.
    pub(crate) fn enter() -> Nmi {
        let me = this();
        me.nmis_in.store(1, Ordering::Relaxed);
        let pins = me.pins.load(Ordering::Relaxed);
        // Nobody else writes them, nor this CPU before the handler is over.
        let count = |n: &AtomicU64, more: bool| {
            n.store(
                n.load(Ordering::Relaxed) + u64::from(more),
                Ordering::Relaxed,
            )
        };
        count(&me.nmis, true);
        count(&me.nmis_pinned, pins > 0);
        let nmi = Nmi {
            me,
            pins,
            irqs_were_on: me.irqs_were_on.load(Ordering::Relaxed),
        };
        compiler_fence(Ordering::SeqCst);
        nmi
    }
}

impl Drop for Nmi {
    fn drop(&mut self) {
        compiler_fence(Ordering::SeqCst);
        self.me.pins.store(self.pins, Ordering::Relaxed);
        self.me
            .irqs_were_on
            .store(self.irqs_were_on, Ordering::Relaxed);
        self.me.nmis_in.store(0, Ordering::Relaxed);
    }
}

/// For a test: what an NMI does that strikes between the two stores of [`pin`]. Are interrupts on again afterwards, as they were before?
pub(crate) fn struck_while_pinning() -> bool {
    pin();
    let me = this();
    // As if the count had not been stored yet.
    let pins = me.pins.swap(0, Ordering::Relaxed);
    {
        let _nmi = Nmi::enter();
        pin();
        unpin();
    }
    me.pins.store(pins, Ordering::Relaxed);
    unpin();
    interrupts::are_enabled()
}
