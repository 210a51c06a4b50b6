//! Address spaces of users as the machine runs them: the memory manager's tables in CR3, with the kernel's half in their roots, and page faults that go to it.
//!
//! A CPU that runs an address space touches its memory at its own addresses, as `copy_from_user` does; code of users there is none yet.

use core::sync::atomic::Ordering;

use memdesc::mmap::{Access, MmStruct};
use x86_64::PhysAddr;
use x86_64::registers::control::{Cr3, Cr3Flags};
use x86_64::structures::paging::PhysFrame;

use crate::platform::Metal;
use crate::{paging, percpu};

/// An address space of users.
pub(crate) type Space = MmStruct<'static, Metal>;

/// Addresses of users end here.
pub(crate) const TOP: u64 = 1 << 47;

/// Runs `f` on the calling CPU with this address space, whose memory is then at its own addresses. Does not nest.
pub(crate) fn with_space<R>(space: &Space, f: impl FnOnce() -> R) -> R {
    let root = space.root().phys().0;
    // Before its first use; the same every time, so it does not matter who is first.
    paging::share_kernel_half(root);
    let me = percpu::this();
    me.space
        .store((&raw const *space).cast_mut(), Ordering::Relaxed);
    let load = |root: u64| {
        let frame = PhysFrame::containing_address(PhysAddr::new(root));
        // SAFETY: the kernel's half is the same in all roots. Whoever frees tables has every CPU forget what it remembers of them first.
        unsafe { Cr3::write(frame, Cr3Flags::empty()) };
    };
    load(root);
    let result = f();
    load(paging::root());
    me.space.store(core::ptr::null_mut(), Ordering::Relaxed);
    result
}

/// A page fault at an address of users, in a thread: is it all right now?
pub(crate) fn handle_fault(address: u64, write: bool, execute: bool) -> bool {
    let space = percpu::this().space.load(Ordering::Relaxed);
    // SAFETY: `with_space` has a reference to it as long as it is there, on this CPU and this thread.
    let Some(space) = (unsafe { space.as_ref() }) else {
        return false;
    };
    let access = match (write, execute) {
        (true, _) => Access::Write,
        (_, true) => Access::Exec,
        _ => Access::Read,
    };
    FAULTS.fetch_add(1, Ordering::Relaxed);
    space.handle_fault(address, access).is_ok()
}

/// Faults that came here.
pub(crate) static FAULTS: core::sync::atomic::AtomicU64 = core::sync::atomic::AtomicU64::new(0);
