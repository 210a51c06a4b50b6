//! Address spaces of users as the machine runs them: the memory manager's tables in CR3, with the kernel's half in their roots, and page faults that go to it.
//!
//! A thread in an address space ([`with_space`]) touches its memory at its own addresses, as `copy_from_user` does, or runs in user mode there (`process`). The scheduler loads its
//! tables with it, and the kernel's own for a thread that has none: so nobody's tables are in use but by his own threads. A CPU says whose it has loaded before it does, and is
//! asked to forget what it remembers of an address space only if it has that one (`remote`). Tables are loaded without keeping anything of what was before.

use core::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use memdesc::mmap::{Access, FaultError, MmStruct};
use raw_cpuid::CpuId;
use x86_64::PhysAddr;
use x86_64::instructions::interrupts;
use x86_64::registers::control::{Cr0, Cr0Flags, Cr3, Cr3Flags, Cr4, Cr4Flags};
use x86_64::registers::model_specific::{Efer, EferFlags, FsBase, KernelGsBase, LStar, SFMask};
use x86_64::registers::rflags::RFlags;
use x86_64::structures::paging::PhysFrame;

use crate::percpu::{self, NO_SPACE, PerCpu};
use crate::platform::Metal;
use crate::thread::{self, Thread};
use crate::{gdt, paging, traps};

/// An address space of users.
pub(crate) type Space = MmStruct<'static, Metal>;

/// Addresses of users end here.
pub(crate) const TOP: u64 = 1 << 47;

/// Between two address spaces: a CPU with this number is asked for both.
pub(crate) const ANY_SPACE: u64 = u64::MAX - 1;

/// 1: the CPU keeps the kernel from touching users' memory unless it says that it will (SMAP). `traps.s` looks here.
#[unsafe(no_mangle)]
#[allow(non_upper_case_globals)]
static users_guarded: AtomicU8 = AtomicU8::new(0);

/// Does the CPU keep the kernel from touching users' memory by accident?
pub(crate) fn are_guarded() -> bool {
    users_guarded.load(Ordering::Relaxed) != 0
}

/// Has the calling CPU run users: where `syscall` comes to, no floating point, and what the CPU has against a kernel that is made to use users' memory.
pub(crate) fn init() {
    let features = CpuId::new().get_extended_feature_info();
    let has = |what: fn(&raw_cpuid::ExtendedFeatures) -> bool| features.as_ref().is_some_and(what);
    let flags = [
        (
            has(|f| f.has_smep()),
            Cr4Flags::SUPERVISOR_MODE_EXECUTION_PROTECTION,
        ),
        (
            has(|f| f.has_smap()),
            Cr4Flags::SUPERVISOR_MODE_ACCESS_PREVENTION,
        ),
        (
            has(|f| f.has_umip()),
            Cr4Flags::USER_MODE_INSTRUCTION_PREVENTION,
        ),
    ];
    let flags = flags
        .iter()
        .filter(|(has, _)| *has)
        .fold(Cr4Flags::empty(), |all, (_, flag)| all | *flag);
    // SAFETY: the kernel executes nothing of users', and touches their memory in `with_space` only, or through the direct map. It has no floating point either.
    // `syscall` finds the kernel's segments where `gdt` has them, and comes to `syscall_entry` with interrupts off.
    unsafe {
        Cr4::update(|cr4| cr4.insert(flags));
        Cr0::update(|cr0| cr0.insert(Cr0Flags::EMULATE_COPROCESSOR));
        Efer::update(|efer| efer.insert(EferFlags::SYSTEM_CALL_EXTENSIONS));
        let star = u64::from(gdt::KERNEL_CODE) << 32 | u64::from(gdt::USER_DATA - 8) << 48;
        x86_64::registers::model_specific::Msr::new(0xc000_0081).write(star);
    }
    LStar::write(traps::syscall_address());
    SFMask::write(
        RFlags::INTERRUPT_FLAG
            | RFlags::DIRECTION_FLAG
            | RFlags::TRAP_FLAG
            | RFlags::NESTED_TASK
            | RFlags::ALIGNMENT_CHECK
            | RFlags::IOPL_LOW
            | RFlags::IOPL_HIGH,
    );
    if flags.contains(Cr4Flags::SUPERVISOR_MODE_ACCESS_PREVENTION) {
        users_guarded.store(1, Ordering::Relaxed);
    }
}

/// Users have no segments of their own: nothing of another's is left. With interrupts off, before a CPU goes to another thread's user mode.
pub(crate) fn forget_segments() {
    // SAFETY: in 64 bits the kernel uses none of these but its own `gs`, which is put aside meanwhile; whoever takes an NMI finds its area itself.
    unsafe {
        core::arch::asm!(
            "mov ds, {0:e}", "mov es, {0:e}", "mov fs, {0:e}",
            "swapgs", "mov gs, {0:e}", "swapgs",
            in(reg) 0, options(nostack, preserves_flags)
        );
    }
    KernelGsBase::write(x86_64::VirtAddr::zero());
    FsBase::write(x86_64::VirtAddr::zero());
}

/// Loads what a thread runs with: its address space, and where traps from user mode push. With interrupts off.
pub(crate) fn install(me: &PerCpu, next: &Thread) {
    let traps = next.user_traps.load(Ordering::Relaxed);
    if traps != 0 {
        me.trap_sp.store(traps, Ordering::Relaxed);
        let at: *mut u64 =
            core::ptr::with_exposed_provenance_mut(me.tss_sp.load(Ordering::Relaxed));
        // SAFETY: in this CPU's task state, which it reads at a trap from user mode and nobody else at all.
        unsafe { at.write_unaligned(traps as u64) };
        forget_segments();
    }
    // SAFETY: the thread has it as long as it says so.
    let space = unsafe { next.space.load(Ordering::Relaxed).as_ref() };
    let (asid, root) = space.map_or((NO_SPACE, paging::root()), |space| {
        (space.asid(), space.root().phys().0)
    });
    let frame = PhysFrame::containing_address(PhysAddr::new(root));
    if Cr3::read().0 == frame {
        return;
    }
    // SeqCst: who changes entries and then looks here sees this, or the CPU sees the changed entries. Loading is a barrier.
    me.asid.store(ANY_SPACE, Ordering::SeqCst);
    // SAFETY: the kernel's half is the same in all roots. Whoever frees tables has every CPU forget what it remembers of them first.
    unsafe { Cr3::write(frame, Cr3Flags::empty()) };
    me.asid.store(asid, Ordering::SeqCst);
}

/// The calling thread is in this address space from here on, or in none.
///
/// # Safety
///
/// It lives as long as the thread is in it.
pub(crate) unsafe fn enter(space: Option<&Space>) {
    if let Some(space) = space {
        // Before its first use; the same every time, so it does not matter who is first.
        paging::share_kernel_half(space.root().phys().0);
    }
    let me = thread::current();
    let space = space.map_or(core::ptr::null_mut(), |space| {
        (&raw const *space).cast_mut()
    });
    interrupts::without_interrupts(|| {
        me.space.store(space, Ordering::Relaxed);
        install(percpu::this(), me);
    });
}

/// May the kernel touch users' memory? Of the calling thread, which has it with its flags wherever it goes.
pub(crate) fn allow(yes: bool) {
    if !are_guarded() {
        return;
    }
    // SAFETY: changes a flag that nothing but accesses to users' memory looks at. A barrier for accesses, as it says nothing of memory.
    unsafe {
        if yes {
            core::arch::asm!("stac");
        } else {
            core::arch::asm!("clac");
        }
    }
}

/// Runs `f` on the calling thread with this address space, whose memory is then at its own addresses. Does not nest.
pub(crate) fn with_space<R>(space: &Space, f: impl FnOnce() -> R) -> R {
    // SAFETY: until `f` is through.
    unsafe { enter(Some(space)) };
    allow(true);
    let result = f();
    allow(false);
    // SAFETY: the kernel's own lives for ever.
    unsafe { enter(None) };
    result
}

/// A page fault at an address of users, in a thread that may sleep.
///
/// # Errors
///
/// Why it may not do that there.
pub(crate) fn handle_fault(address: u64, write: bool, execute: bool) -> Result<(), FaultError> {
    let space = thread::current().space.load(Ordering::Relaxed);
    // SAFETY: the thread has it as long as it is there.
    let Some(space) = (unsafe { space.as_ref() }) else {
        return Err(FaultError::Segv);
    };
    let access = match (write, execute) {
        (true, _) => Access::Write,
        (_, true) => Access::Exec,
        _ => Access::Read,
    };
    FAULTS.fetch_add(1, Ordering::Relaxed);
    space.handle_fault(address, access)
}

/// Faults that came here.
pub(crate) static FAULTS: AtomicU64 = AtomicU64::new(0);
