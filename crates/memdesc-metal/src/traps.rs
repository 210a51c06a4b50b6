//! Exceptions and interrupts: what each vector does, and a report that can be read when it was an accident.

use core::arch::global_asm;
use core::sync::atomic::{AtomicUsize, Ordering};

use spin::Once;
use x86_64::VirtAddr;
use x86_64::instructions::interrupts;
use x86_64::registers::control::Cr2;
use x86_64::structures::idt::InterruptDescriptorTable;

use crate::exit::{Exit, exit};
use crate::percpu::{self, Irq, Nmi};
use crate::{apic, gdt, log, memory, remote, users};

global_asm!(include_str!("traps.s"), options(att_syntax));

unsafe extern "C" {
    safe static trap_stubs: u8;
    safe static probe_failed: u8;
    unsafe fn probe_load(address: usize) -> u64;
    unsafe fn run_on(top: *mut u8, function: unsafe extern "C" fn(*mut ()), argument: *mut ());
}

/// What a stub leaves on the stack.
#[derive(Debug)]
#[repr(C)]
pub(crate) struct Frame {
    r15: u64,
    r14: u64,
    r13: u64,
    r12: u64,
    r11: u64,
    r10: u64,
    r9: u64,
    r8: u64,
    rbp: u64,
    rdi: u64,
    rsi: u64,
    rdx: u64,
    rcx: u64,
    rbx: u64,
    rax: u64,
    vector: u64,
    error: u64,
    rip: u64,
    cs: u64,
    rflags: u64,
    rsp: u64,
    ss: u64,
}

const _: () = assert!(size_of::<Frame>() == 22 * 8);

static IDT: Once<InterruptDescriptorTable> = Once::new();

/// Has the calling CPU come here.
pub(crate) fn init() {
    let idt = IDT.call_once(table);
    idt.load();
}

fn table() -> InterruptDescriptorTable {
    let mut idt = InterruptDescriptorTable::new();
    let base = (&raw const trap_stubs).addr() as u64;
    let stub = |vector: u8| VirtAddr::new(base + 16 * u64::from(vector));
    macro_rules! set {
        ($($field:ident = $vector:literal $(on $stack:expr)?),* $(,)?) => {
            // SAFETY: each stub is the one of its vector, and keeps everything as it was; the stacks are in every CPU's task state.
            unsafe {
                $(
                    let _entry = idt.$field.set_handler_addr(stub($vector));
                    $(_entry.set_stack_index($stack);)?
                )*
            }
        };
    }
    set! {
        divide_error = 0,
        debug = 1,
        non_maskable_interrupt = 2 on gdt::NMI_STACK,
        breakpoint = 3,
        overflow = 4,
        bound_range_exceeded = 5,
        invalid_opcode = 6,
        device_not_available = 7,
        double_fault = 8 on gdt::DOUBLE_FAULT_STACK,
        invalid_tss = 10,
        segment_not_present = 11,
        stack_segment_fault = 12,
        general_protection_fault = 13,
        page_fault = 14,
        x87_floating_point = 16,
        alignment_check = 17,
        machine_check = 18 on gdt::MACHINE_CHECK_STACK,
        simd_floating_point = 19,
        virtualization = 20,
        cp_protection_exception = 21,
    }
    for vector in 32..=255 {
        // SAFETY: as above.
        unsafe { idt[vector].set_handler_addr(stub(vector)) };
    }
    idt
}

/// What an NMI does beside being counted: the address of a `fn()`, or 0.
static ON_NMI: AtomicUsize = AtomicUsize::new(0);
/// The same for the interrupt by which another CPU wants something.
static ON_CALL: AtomicUsize = AtomicUsize::new(0);
/// The machine is ending: an NMI stops its CPU.
static STOPPING: AtomicUsize = AtomicUsize::new(0);
/// Has every NMI call this; `None` for nothing.
pub(crate) fn set_on_nmi(f: Option<fn()>) {
    ON_NMI.store(f.map_or(0, |f| f as usize), Ordering::SeqCst);
}

/// Has every interrupt of another CPU call this; `None` for nothing.
pub(crate) fn set_on_call(f: Option<fn()>) {
    ON_CALL.store(f.map_or(0, |f| f as usize), Ordering::SeqCst);
}

/// Calls what was set, if anything was.
fn call_hook(hook: &AtomicUsize) {
    let f = hook.load(Ordering::SeqCst);
    if f != 0 {
        // SAFETY: only `set_on_nmi` and `set_on_call` store there, functions of this type.
        let f: fn() = unsafe { core::mem::transmute(f) };
        f();
    }
}

/// Stops all other CPUs, wherever they are.
pub(crate) fn stop_others() {
    if STOPPING.swap(1, Ordering::SeqCst) == 0 && percpu::nr_cpus() > 1 {
        apic::nmi_all_others();
    }
}

/// Where all vectors come.
#[unsafe(no_mangle)]
extern "C" fn trap(frame: &mut Frame) {
    const TIMER: u64 = apic::TIMER_VECTOR as u64;
    const CALL: u64 = apic::CALL_VECTOR as u64;
    const DEVICE: u64 = apic::DEVICE_VECTOR as u64;
    const SPURIOUS: u64 = apic::SPURIOUS_VECTOR as u64;
    match frame.vector {
        2 => nmi(),
        14 => page_fault(frame),
        TIMER => {
            let _irq = Irq::enter();
            apic::end_of_interrupt();
            memory::timer_tick();
        }
        CALL => {
            let _irq = Irq::enter();
            apic::end_of_interrupt();
            remote::serve();
            call_hook(&ON_CALL);
        }
        DEVICE => {
            let _irq = Irq::enter();
            crate::balloon::interrupt();
            apic::end_of_interrupt();
        }
        SPURIOUS => {}
        13 => {
            // What is no address at all.
            if !probed(frame) {
                fatal(frame, None);
            }
        }
        _ => fatal(frame, None),
    }
}

fn nmi() {
    let _nmi = Nmi::enter();
    if STOPPING.load(Ordering::SeqCst) != 0 {
        loop {
            x86_64::instructions::hlt();
        }
    }
    call_hook(&ON_NMI);
}

fn page_fault(frame: &mut Frame) {
    const WRITE: u64 = 1 << 1;
    const EXECUTE: u64 = 1 << 4;
    const INTERRUPTS: u64 = 1 << 9;
    let address = Cr2::read_raw();
    // In a thread that may sleep; whoever turned interrupts off may not touch what users have.
    if address < users::TOP && frame.rflags & INTERRUPTS != 0 {
        interrupts::enable();
        let handled = users::handle_fault(
            address,
            frame.error & WRITE != 0,
            frame.error & EXECUTE != 0,
        );
        interrupts::disable();
        if handled {
            return;
        }
    }
    if !probed(frame) {
        fatal(frame, Some(address));
    }
}

/// Was this the load of [`probe`]? It is told that there is nothing then.
fn probed(frame: &mut Frame) -> bool {
    let is_probe = frame.rip == (probe_load as *const ()).addr() as u64;
    if is_probe {
        frame.rip = (&raw const probe_failed).addr() as u64;
    }
    is_probe
}

/// Can this address be read?
pub(crate) fn probe(address: usize) -> bool {
    // SAFETY: reads one byte and throws it away; if there is nothing, the fault handler says so.
    unsafe { probe_load(address) == 0 }
}

/// Calls `f` on another stack, from this top down.
///
/// # Safety
///
/// The stack is nobody's, and large enough.
pub(crate) unsafe fn call_on_stack<F: FnOnce()>(top: *mut u8, f: F) {
    unsafe extern "C" fn call<F: FnOnce()>(f: *mut ()) {
        // SAFETY: `call_on_stack` gives the address of an `Option<F>` of its own, once.
        if let Some(f) = unsafe { &mut *f.cast::<Option<F>>() }.take() {
            f();
        }
    }
    let mut f = Some(f);
    // SAFETY: the caller's promise; comes back to this frame.
    unsafe { run_on(top, call::<F>, (&raw mut f).cast()) };
}

fn name(vector: u64) -> &'static str {
    match vector {
        0 => "divide error",
        1 => "debug",
        3 => "breakpoint",
        6 => "invalid opcode",
        8 => "double fault",
        12 => "stack fault",
        13 => "general protection fault",
        14 => "page fault",
        18 => "machine check",
        _ => "unexpected exception",
    }
}

/// Says what it was, and ends the machine.
fn fatal(frame: &Frame, address: Option<u64>) -> ! {
    stop_others();
    crate::log::take_over();
    let cpu = percpu::this().cpu();
    log!(
        "BUG: {} on CPU {cpu}, error code {:#x}",
        name(frame.vector),
        frame.error
    );
    // An overflow of a stack is a page fault that cannot be pushed.
    let address = address.or((frame.vector == 8).then(Cr2::read_raw));
    if let Some(address) = address {
        let what = match (frame.error & 2, frame.error & 16, frame.vector) {
            (.., 8) => "touching",
            (_, 16, _) => "executing",
            (2, ..) => "writing",
            _ => "reading",
        };
        log!(
            "  {what} {address:#018x}: {}",
            memory::explain(address as usize)
        );
    }
    log!(
        "  rip {:#018x} cs {:#x} rflags {:#x}",
        frame.rip,
        frame.cs,
        frame.rflags
    );
    log!("  rsp {:#018x} rbp {:#018x}", frame.rsp, frame.rbp);
    log!(
        "  rax {:#018x} rbx {:#018x} rcx {:#018x}",
        frame.rax,
        frame.rbx,
        frame.rcx
    );
    log!(
        "  rdx {:#018x} rsi {:#018x} rdi {:#018x}",
        frame.rdx,
        frame.rsi,
        frame.rdi
    );
    log!(
        "  r8  {:#018x} r9  {:#018x} r10 {:#018x}",
        frame.r8,
        frame.r9,
        frame.r10
    );
    log!(
        "  r11 {:#018x} r12 {:#018x} r13 {:#018x}",
        frame.r11,
        frame.r12,
        frame.r13
    );
    log!(
        "  r14 {:#018x} r15 {:#018x} ss {:#x}",
        frame.r14,
        frame.r15,
        frame.ss
    );
    let mut frames = [0; 16];
    let n = backtrace(frame.rbp as usize, &mut frames);
    for at in &frames[..n] {
        log!("  called from {at:#018x}");
    }
    exit(Exit::Failure)
}

/// The return addresses from this frame pointer on, as far as it can be followed.
pub(crate) fn backtrace(mut rbp: usize, frames: &mut [usize]) -> usize {
    let mut n = 0;
    while n < frames.len() && rbp.is_multiple_of(8) && rbp != 0 && probe(rbp) && probe(rbp + 15) {
        let at: *const [usize; 2] = core::ptr::with_exposed_provenance(rbp);
        // SAFETY: both words can be read, as `probe` has just seen; what is there is only printed or probed in turn.
        let [next, ret] = unsafe { at.read() };
        if ret == 0 {
            break;
        }
        frames[n] = ret;
        n += 1;
        if next <= rbp {
            break;
        }
        rbp = next;
    }
    n
}
