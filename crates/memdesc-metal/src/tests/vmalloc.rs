//! Tests of addresses: guard pages, whose they are, and what other CPUs remember of them.

use alloc::format;
use alloc::string::ToString;
use core::sync::atomic::Ordering;

use memdesc::gfp::GFP_KERNEL;
use memdesc::{AddressInfo, PAGE_SIZE};

use super::{Machine, Outcome, Passed, ledger, on_all};
use crate::traps::probe;
use crate::{check, remote};

/// What vmalloc gives can be written to its end, and not beyond; once it is freed and flushed, not at all.
pub(super) fn vmalloc_has_guards(machine: &Machine) -> Outcome {
    let mm = machine.mm;
    for pages in [1, 3, 100, 1024] {
        let ptr = mm
            .vmalloc(pages * PAGE_SIZE, GFP_KERNEL)
            .map_err(|why| why.to_string())?;
        let start = ptr.addr().get();
        let end = start + pages * PAGE_SIZE;
        // SAFETY: ours, and that long.
        unsafe {
            ptr.write_bytes(0x5a, pages * PAGE_SIZE);
            check!(ptr.add(pages * PAGE_SIZE - 1).read() == 0x5a);
        }
        check!(probe(start) && probe(end - 1));
        check!(!probe(end), "{end:#x} behind {pages} pages can be read");
        let what = mm.explain_address(end);
        check!(
            matches!(what, AddressInfo::GuardAfter(area) if area.start == start),
            "{what}"
        );
        // SAFETY: ours, and used no more.
        unsafe { mm.vfree(ptr) };
        mm.shrink();
        check!(!probe(start), "{start:#x} can be read after it was freed");
    }
    let huge = mm
        .vmalloc_huge(4 << 20, GFP_KERNEL)
        .map_err(|why| why.to_string())?;
    check!(huge.addr().get().is_multiple_of(2 << 20));
    // SAFETY: ours, that long, and freed once.
    unsafe {
        huge.write_bytes(1, 4 << 20);
        mm.vfree(huge);
    }
    mm.shrink();
    check!(!probe(huge.addr().get()));
    check!(ledger(machine).balanced);
    Ok(Passed::Ok)
}

/// The page below a stack is nobody's, and the report of who touches it names the stack's owner; so for the stacks that the CPUs run on.
pub(super) fn stacks_have_owners(machine: &Machine) -> Outcome {
    let mm = machine.mm;
    let stack = mm
        .alloc_kernel_stack(4, 4711)
        .map_err(|why| why.to_string())?;
    let (bottom, top) = (stack.bottom().addr().get(), stack.top().addr());
    check!(probe(bottom) && probe(top - 1) && !probe(bottom - 1) && !probe(top));
    let what = mm.explain_address(bottom - 8);
    check!(
        matches!(what, AddressInfo::GuardBefore(area) if area.owner == Some(4711)),
        "{what}"
    );
    check!(what.to_string().contains(" of 4711 "), "{what}");
    // SAFETY: nobody ran on it.
    unsafe { mm.free_kernel_stack(stack) };
    on_all(|cpu| {
        let here = &raw const cpu;
        let AddressInfo::Area(area) = mm.explain_address(here.addr()) else {
            return Err(format!(
                "{here:?} on the stack is {}",
                mm.explain_address(here.addr())
            ));
        };
        check!(
            area.owner == Some(cpu as u64),
            "runs on the stack of {:?}",
            area.owner
        );
        check!(!probe(area.start - 1) && !probe(area.start + area.size));
        Ok(())
    })?;
    Ok(Passed::Ok)
}

/// A page that was mapped, read by all CPUs and unmapped again is reached by none of them afterwards, nor is the page that was there when another is.
pub(super) fn others_forget_translations(machine: &Machine) -> Outcome {
    let mm = machine.mm;
    if machine.cpus == 1 {
        return Ok(Passed::Skipped("one CPU"));
    }
    let shootdowns = remote::SHOOTDOWNS.load(Ordering::Relaxed);
    for round in 0..20u64 {
        let page = mm
            .alloc_pages(GFP_KERNEL, 0)
            .map_err(|why| why.to_string())?;
        // SAFETY: the page is ours until it is freed, after it was unmapped.
        let ptr = unsafe {
            mm.page_address(page).cast::<u64>().write(round);
            mm.vmap(&[page]).map_err(|why| why.to_string())?
        };
        let at = ptr.addr().get();
        on_all(|_| {
            let ptr: *const u64 = core::ptr::with_exposed_provenance(at);
            // SAFETY: mapped, and nobody writes to it.
            let seen = unsafe { ptr.read_volatile() };
            check!(seen == round, "{at:#x} reads {seen} in round {round}");
            Ok(())
        })?;
        // SAFETY: nobody uses the addresses any more, or the page.
        unsafe {
            mm.vunmap(ptr);
            mm.shrink();
            mm.free_pages(page);
        }
        on_all(|_| {
            check!(!probe(at), "{at:#x} can still be read in round {round}");
            Ok(())
        })?;
    }
    let shootdowns = remote::SHOOTDOWNS.load(Ordering::Relaxed) - shootdowns;
    check!(shootdowns >= 20, "{shootdowns} shootdowns");
    Ok(Passed::Says(format!("{shootdowns} shootdowns")))
}
