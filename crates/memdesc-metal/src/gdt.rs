//! Each CPU's segments, the kernel's and the users', and its task state: the stacks that NMIs and double faults run on, and where traps from user mode begin.

use core::cell::UnsafeCell;
use core::sync::atomic::Ordering;

use spin::Once;
use x86_64::VirtAddr;
use x86_64::instructions::tables::load_tss;
use x86_64::registers::segmentation::{CS, DS, ES, SS, Segment};
use x86_64::structures::gdt::{Descriptor, GlobalDescriptorTable};
use x86_64::structures::tss::TaskStateSegment;

use crate::percpu::{self, MAX_CPUS};

/// Stacks of their own: they are right whatever the stack was that they struck.
pub(crate) const NMI_STACK: u16 = 0;
/// A double fault's: what an overflow of the stack becomes.
pub(crate) const DOUBLE_FAULT_STACK: u16 = 1;
/// A machine check's.
pub(crate) const MACHINE_CHECK_STACK: u16 = 2;
/// How many there are.
pub(crate) const TRAP_STACKS: usize = 3;
/// Bytes of each.
pub(crate) const TRAP_STACK_SIZE: usize = 16384;

/// The kernel's code; its data follow, as `syscall` wants them.
pub(crate) const KERNEL_CODE: u16 = 0x08;
/// The users' data, and their code behind it, as `sysret` would want them, with their rights.
pub(crate) const USER_DATA: u16 = 0x18 | 3;
/// The users' code.
pub(crate) const USER_CODE: u16 = 0x20 | 3;

/// A task state: the CPU reads it, and which stack traps from user mode push to changes with each thread.
struct Task(UnsafeCell<TaskStateSegment>);

// SAFETY: written by the CPU that it is of alone, through `PerCpu::tss_sp`, once it has been made.
unsafe impl Sync for Task {}
// SAFETY: the same.
unsafe impl Send for Task {}

static TASKS: [Once<Task>; MAX_CPUS] = [const { Once::new() }; MAX_CPUS];
static TABLES: [Once<GlobalDescriptorTable>; MAX_CPUS] = [const { Once::new() }; MAX_CPUS];

/// The first CPU's: there is nobody yet who could give it better ones.
#[repr(C, align(4096))]
struct FirstStacks([[u8; TRAP_STACK_SIZE]; TRAP_STACKS]);

static mut FIRST_STACKS: FirstStacks = FirstStacks([[0; TRAP_STACK_SIZE]; TRAP_STACKS]);

/// The tops of the first CPU's trap stacks.
pub(crate) fn first_stacks() -> [u64; TRAP_STACKS] {
    let start = (&raw const FIRST_STACKS).addr();
    core::array::from_fn(|i| (start + (i + 1) * TRAP_STACK_SIZE) as u64)
}

/// Gives the calling CPU its segments, with these trap stacks (their tops). Once for each.
pub(crate) fn init(stacks: [u64; TRAP_STACKS]) {
    let cpu = percpu::this().cpu();
    let task = TASKS[cpu].call_once(|| {
        let mut task = TaskStateSegment::new();
        // Packed as the machine has it, so as a whole.
        let mut table = task.interrupt_stack_table;
        for (entry, top) in table.iter_mut().zip(stacks) {
            *entry = VirtAddr::new(top);
        }
        task.interrupt_stack_table = table;
        Task(UnsafeCell::new(task))
    });
    let at = task.0.get();
    // SAFETY: within the task state; only its address is taken, since it is not aligned.
    let stack = unsafe { &raw const (*at).privilege_stack_table };
    percpu::this()
        .tss_sp
        .store(stack.expose_provenance(), Ordering::Relaxed);
    let mut selectors = None;
    let table = TABLES[cpu].call_once(|| {
        let mut table = GlobalDescriptorTable::new();
        // In the order that the numbers above say.
        let code = table.append(Descriptor::kernel_code_segment());
        let data = table.append(Descriptor::kernel_data_segment());
        let user_data = table.append(Descriptor::user_data_segment());
        let user_code = table.append(Descriptor::user_code_segment());
        debug_assert!((code.0, user_data.0, user_code.0) == (KERNEL_CODE, USER_DATA, USER_CODE));
        // SAFETY: it lives for ever.
        let tss = table.append(unsafe { Descriptor::tss_segment_unchecked(at) });
        selectors = Some((code, data, tss));
        table
    });
    let Some((code, data, tss)) = selectors else {
        return;
    };
    table.load();
    // SAFETY: the selectors are of the table that was just loaded, which lives for ever; it is flat, as what was there before.
    unsafe {
        CS::set_reg(code);
        SS::set_reg(data);
        DS::set_reg(data);
        ES::set_reg(data);
        load_tss(tss);
    }
}
