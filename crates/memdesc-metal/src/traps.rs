//! Exceptions and interrupts: what each vector does, and a report that can be read when it was an accident.

use core::arch::global_asm;
use core::mem::offset_of;
use core::sync::atomic::{AtomicUsize, Ordering};

use memdesc::AddressInfo;
use spin::Once;
use x86_64::VirtAddr;
use x86_64::instructions::interrupts;
use x86_64::registers::control::Cr2;
use x86_64::structures::idt::InterruptDescriptorTable;

use crate::exit::{Exit, exit};
use crate::paging::{VMALLOC_SIZE, VMALLOC_START};
use crate::percpu::{self, Irq, Nmi, PerCpu};
use crate::{apic, boot, gdt, log, memory, process, remote, sched, thread, users, whereabouts};

// In one piece, since they know each other's places.
global_asm!(
    ".set PERCPU_CURRENT, {current}",
    ".set PERCPU_TRAP_SP, {trap_sp}",
    ".set PERCPU_USER_SP, {user_sp}",
    ".set PERCPU_TSS_SP, {tss_sp}",
    ".set PERCPU_NMIS_IN, {nmis_in}",
    ".set THREAD_USER_TRAPS, {user_traps}",
    ".set FRAME_VECTOR, {frame_vector}",
    ".set FRAME_RIP, {frame_rip}",
    ".set FRAME_CS, {frame_cs}",
    ".set FRAME_RFLAGS, {frame_rflags}",
    ".set FRAME_RSP, {frame_rsp}",
    ".set USER_DATA, {user_data}",
    ".set USER_CODE, {user_code}",
    ".set SYSCALL, {syscall}",
    include_str!("traps.s"),
    include_str!("switch.s"),
    current = const offset_of!(PerCpu, current),
    trap_sp = const offset_of!(PerCpu, trap_sp),
    user_sp = const offset_of!(PerCpu, user_sp),
    tss_sp = const offset_of!(PerCpu, tss_sp),
    nmis_in = const percpu::NMIS_IN,
    user_traps = const thread::USER_TRAPS,
    frame_vector = const offset_of!(Frame, vector),
    frame_rip = const offset_of!(Frame, rip),
    frame_cs = const offset_of!(Frame, cs),
    frame_rflags = const offset_of!(Frame, rflags),
    frame_rsp = const offset_of!(Frame, rsp),
    user_data = const gdt::USER_DATA,
    user_code = const gdt::USER_CODE,
    syscall = const SYSCALL,
    options(att_syntax)
);
global_asm!(include_str!("user.s"), options(att_syntax));

/// What `Frame::vector` says when it was no trap but the instruction `syscall`.
const SYSCALL: u64 = 0x100;
/// Flags: interrupts on; the kernel may touch users' memory.
const INTERRUPTS: u64 = 1 << 9;
const ACCESS: u64 = 1 << 18;

unsafe extern "C" {
    safe static trap_stubs: u8;
    safe static syscall_entry: u8;
    safe static probe_failed: u8;
    unsafe fn probe_load(address: usize) -> u64;
    #[link_name = "user_load"]
    unsafe fn load_word(address: usize, out: *mut u64) -> u64;
    #[link_name = "user_store"]
    unsafe fn store_word(address: usize, value: u64) -> u64;
    unsafe fn run_on(top: *mut u8, function: unsafe extern "C" fn(*mut ()), argument: *mut ());
}

/// What a stub leaves on the stack.
#[derive(Clone, Copy, Debug)]
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
    pub(crate) rdi: u64,
    pub(crate) rsi: u64,
    pub(crate) rdx: u64,
    rcx: u64,
    rbx: u64,
    pub(crate) rax: u64,
    pub(crate) vector: u64,
    error: u64,
    pub(crate) rip: u64,
    cs: u64,
    rflags: u64,
    rsp: u64,
    ss: u64,
}

const _: () = assert!(size_of::<Frame>() == 22 * 8);

impl Frame {
    /// What user mode starts with.
    pub(crate) fn of_user(rip: u64, rsp: u64) -> Frame {
        Frame {
            r15: 0,
            r14: 0,
            r13: 0,
            r12: 0,
            r11: 0,
            r10: 0,
            r9: 0,
            r8: 0,
            rbp: 0,
            rdi: 0,
            rsi: 0,
            rdx: 0,
            rcx: 0,
            rbx: 0,
            rax: 0,
            vector: 0,
            error: 0,
            rip,
            cs: u64::from(gdt::USER_CODE),
            rflags: INTERRUPTS | 2,
            rsp,
            ss: u64::from(gdt::USER_DATA),
        }
    }

    /// Was it user mode that it struck?
    fn is_user(&self) -> bool {
        self.cs & 3 == 3
    }

    /// Where a walk of the stack begins that it struck: nowhere, if that is a user's.
    fn frame_pointer(&self) -> usize {
        if self.is_user() { 0 } else { self.rbp as usize }
    }
}

/// Where the instruction `syscall` is to come.
pub(crate) fn syscall_address() -> VirtAddr {
    VirtAddr::new((&raw const syscall_entry).addr() as u64)
}

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

/// Stops all other CPUs that run, wherever they are.
pub(crate) fn stop_others() {
    if STOPPING.swap(1, Ordering::SeqCst) == 0 {
        let me = percpu::this().cpu();
        // Not those that were not started yet: an NMI is no way to start.
        for cpu in percpu::online().filter(|cpu| cpu.cpu() != me) {
            apic::send_nmi(cpu);
        }
    }
}

/// Where all vectors come, with interrupts off.
#[unsafe(no_mangle)]
extern "C" fn trap(frame: &mut Frame) {
    const TIMER: u64 = apic::TIMER_VECTOR as u64;
    const CALL: u64 = apic::CALL_VECTOR as u64;
    const RESCHEDULE: u64 = apic::RESCHEDULE_VECTOR as u64;
    const DEVICE: u64 = apic::DEVICE_VECTOR as u64;
    const SPURIOUS: u64 = apic::SPURIOUS_VECTOR as u64;
    match frame.vector {
        2 => return nmi(frame),
        14 => page_fault(frame),
        TIMER => {
            let _irq = Irq::enter();
            apic::end_of_interrupt();
            memory::timer_tick();
            sched::tick();
        }
        CALL => {
            let _irq = Irq::enter();
            apic::end_of_interrupt();
            remote::serve();
            call_hook(&ON_CALL);
        }
        // Who is to run is seen below.
        RESCHEDULE => apic::end_of_interrupt(),
        SYSCALL => process::syscall(frame),
        DEVICE => {
            let _irq = Irq::enter();
            crate::balloon::interrupt();
            apic::end_of_interrupt();
        }
        SPURIOUS => {}
        8 | 18 => fatal(frame, None),
        _ if frame.is_user() => {
            process::kill(frame, format_args!("{}", name(frame.vector)));
        }
        13 => {
            // What is no address at all.
            if !probed(frame) {
                fatal(frame, None);
            }
        }
        _ => fatal(frame, None),
    }
    // Not where nothing may change: who was struck with interrupts off, in an NMI or between two steps of another interrupt.
    if frame.rflags & INTERRUPTS != 0 && !percpu::this().is_busy() {
        sched::preempt();
    }
    if frame.is_user() {
        process::before_user(frame);
    }
}

fn nmi(frame: &Frame) {
    let _nmi = Nmi::enter();
    // It may have struck a page fault's first instructions, and fault itself: the other one finds its address all the same.
    let address = Cr2::read_raw();
    if STOPPING.load(Ordering::SeqCst) != 0 {
        loop {
            x86_64::instructions::hlt();
        }
    }
    whereabouts::say_if_asked(frame.rip, frame.frame_pointer());
    call_hook(&ON_NMI);
    if Cr2::read_raw() != address {
        // SAFETY: nothing but a page fault's handler looks there.
        unsafe {
            core::arch::asm!("mov cr2, {}", in(reg) address, options(nostack, preserves_flags))
        };
    }
}

fn page_fault(frame: &mut Frame) {
    const PRESENT: u64 = 1 << 0;
    const WRITE: u64 = 1 << 1;
    const RESERVED: u64 = 1 << 3;
    const EXECUTE: u64 = 1 << 4;
    let address = Cr2::read_raw();
    if frame.error & RESERVED != 0 {
        fatal(frame, Some(address));
    }
    // The kernel does not touch what users have by accident.
    let may = frame.is_user()
        || frame.error & EXECUTE == 0
            && (!users::are_guarded() || frame.rflags & ACCESS != 0 || frame.error & PRESENT == 0);
    let mut why = None;
    // In a thread that may sleep; whoever turned interrupts off may not touch what users have.
    if address < users::TOP && frame.rflags & INTERRUPTS != 0 && may {
        interrupts::enable();
        let handled = users::handle_fault(
            address,
            frame.error & WRITE != 0,
            frame.error & EXECUTE != 0,
        );
        interrupts::disable();
        match handled {
            Ok(()) => return,
            Err(error) => why = Some(error),
        }
    }
    if frame.is_user() {
        process::killed_by_fault(frame, address, doing(frame), why);
    }
    if !probed(frame) {
        fatal(frame, Some(address));
    }
}

/// What a page fault says was done.
fn doing(frame: &Frame) -> &'static str {
    match (frame.error & 2, frame.error & 16, frame.vector) {
        (.., 8) => "touching",
        (_, 16, _) => "executing",
        (2, ..) => "writing",
        _ => "reading",
    }
}

/// Was this the access of [`probe`], [`user_load`] or [`user_store`]? It is told that there is nothing then.
fn probed(frame: &mut Frame) -> bool {
    let accesses = [
        probe_load as *const (),
        load_word as *const (),
        store_word as *const (),
    ];
    let is_probe = accesses.iter().any(|at| frame.rip == at.addr() as u64);
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

/// For a test: what an NMI finds that strikes between the kernel's entry from user mode and its `swapgs`. Interrupts are off meanwhile.
pub(crate) fn strike_with_users_gs() {
    interrupts::without_interrupts(|| {
        // SAFETY: whoever takes vector 2 finds its area itself, and leaves everything as it was; nothing else happens between.
        unsafe { core::arch::asm!("swapgs", "int 2", "swapgs") };
    });
}

/// The word at an address of users, if it can be read (`get_user`). In a thread that may sleep. What is at other addresses is the kernel's, and is not read.
pub(crate) fn user_load(address: usize) -> Option<u64> {
    let mut word = 0;
    if address >= users::TOP as usize {
        return None;
    }
    // SAFETY: the word is only given on; if there is nothing, the fault handler says so, and nothing is stored.
    (unsafe { load_word(address, &raw mut word) } == 0).then_some(word)
}

/// Writes a word to an address of users, if that may be (`put_user`). In a thread that may sleep. What is at other addresses is the kernel's, and is not written.
pub(crate) fn user_store(address: usize, value: u64) -> bool {
    // SAFETY: memory of users, which nobody here has a reference to; if there is none, the fault handler says so.
    address < users::TOP as usize && unsafe { store_word(address, value) == 0 }
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
        7 => "no floating point",
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
    let (id, name) = (thread::current().id(), thread::current().name());
    log!(
        "BUG: {} on CPU {cpu} in thread {id} ({name}), error code {:#x}",
        self::name(frame.vector),
        frame.error
    );
    // An overflow of a stack is a page fault that cannot be pushed.
    let address = address.or((frame.vector == 8).then(Cr2::read_raw));
    if let Some(address) = address {
        let what = doing(frame);
        log!(
            "  {what} {address:#018x}: {}",
            memory::explain(address as usize)
        );
        let area = memory::mm().map(|mm| mm.explain_address(address as usize));
        if let Some(AddressInfo::GuardBefore(area)) = area
            && area.owner == Some(id)
        {
            log!("  thread {id} ({name}) ran over the end of its own stack");
        }
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
    log_callers(frame.frame_pointer());
    exit(Exit::Failure)
}

/// Says who called, from this frame pointer on.
pub(crate) fn log_callers(rbp: usize) {
    let mut frames = [0; 16];
    let n = backtrace(rbp, &mut frames);
    for at in &frames[..n] {
        log!("  called from {at:#018x}");
    }
}

/// The caller's frame pointer.
#[inline(always)]
pub(crate) fn frame_pointer() -> usize {
    let rbp: usize;
    // SAFETY: reads a register; the image is built with frame pointers.
    unsafe {
        core::arch::asm!("mov {}, rbp", out(reg) rbp, options(nomem, nostack, preserves_flags))
    };
    rbp
}

/// May there be a stack at this address? In vmalloc's range or in the image; not where reading could change something, as a device's registers do.
fn may_be_stack(address: usize) -> bool {
    let (address, image) = (address as u64, boot::image());
    let in_vmalloc = (VMALLOC_START..VMALLOC_START + VMALLOC_SIZE - 16).contains(&address);
    in_vmalloc || (image.start..image.end - 16).contains(&address)
}

/// The return addresses from this frame pointer on, as far as it can be followed. Any context: who was struck may have anything in that register.
pub(crate) fn backtrace(mut rbp: usize, frames: &mut [usize]) -> usize {
    let mut n = 0;
    while n < frames.len()
        && rbp.is_multiple_of(8)
        && may_be_stack(rbp)
        && probe(rbp)
        && probe(rbp + 15)
    {
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
