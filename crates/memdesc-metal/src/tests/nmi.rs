//! NMIs that strike CPUs in the middle of allocations, and allocate themselves.

use alloc::format;
use alloc::string::ToString;
use core::ptr::{NonNull, null_mut};
use core::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, Ordering};

use memdesc::gfp::{__GFP_FAST_TRY, Flags, GFP_KERNEL};
use memdesc::{Context, Pfn, Platform};

use super::{Machine, Outcome, Passed, Random, ledger, on_all};
use crate::percpu::{self, MAX_CPUS, PerCpu};
use crate::platform::Metal;
use crate::{apic, check, ioapic, memory, time, traps};

/// How long it storms.
const STORM_NS: u64 = 500_000_000;
/// Strikes in a second, by the timer.
const STRIKES_HZ: u32 = 5000;
/// What each CPU's handler keeps from one NMI to the next ones.
const KEPT: usize = 8;

struct Kept {
    objects: [AtomicPtr<u8>; KEPT],
    pages: [AtomicU32; KEPT],
}

static KEEP: [Kept; MAX_CPUS] = [const {
    Kept {
        objects: [const { AtomicPtr::new(null_mut()) }; KEPT],
        pages: [const { AtomicU32::new(0) }; KEPT],
    }
}; MAX_CPUS];

/// What handlers got, did not get, and saw wrong.
static GOT: AtomicU64 = AtomicU64::new(0);
static REFUSED: AtomicU64 = AtomicU64::new(0);
static WRONG: AtomicU64 = AtomicU64::new(0);

/// The handler: gives back what an earlier one kept, in one of two ways each, and takes something new.
fn on_nmi() {
    let Some(mm) = memory::mm() else {
        return;
    };
    if Metal.context() != Context::Nmi {
        WRONG.fetch_add(1, Ordering::Relaxed);
    }
    let me = percpu::this();
    let n = me.nmis.load(Ordering::Relaxed) as usize;
    let (keep, at) = (&KEEP[me.cpu()], n % KEPT);
    let size = 8 << (n / KEPT % 9);
    if let Some(old) = NonNull::new(keep.objects[at].swap(null_mut(), Ordering::Relaxed)) {
        // SAFETY: kept by an earlier handler of this CPU, which wrote that; freed once.
        unsafe {
            if old.read() != at as u8 {
                WRONG.fetch_add(1, Ordering::Relaxed);
            }
            mm.kfree_nolock(old);
        }
    }
    match mm.kmalloc_nolock(size, Flags::EMPTY) {
        Ok(object) => {
            // SAFETY: ours, and at least 8 bytes long.
            unsafe { object.write(at as u8) };
            keep.objects[at].store(object.as_ptr(), Ordering::Relaxed);
            GOT.fetch_add(1, Ordering::Relaxed);
        }
        Err(_) => {
            REFUSED.fetch_add(1, Ordering::Relaxed);
        }
    }
    let page = keep.pages[at].swap(0, Ordering::Relaxed);
    if page != 0 {
        // SAFETY: as above.
        unsafe { mm.free_pages_nolock(Pfn(page)) };
    }
    match mm.alloc_pages_nolock(__GFP_FAST_TRY, None, n % 3) {
        Ok(pfn) => {
            keep.pages[at].store(pfn.0, Ordering::Relaxed);
            GOT.fetch_add(1, Ordering::Relaxed);
        }
        Err(_) => {
            REFUSED.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// An NMI that strikes in the middle of turning interrupts off, and turns them off itself, leaves no trace.
pub(super) fn an_nmi_leaves_pins_alone(_machine: &Machine) -> Outcome {
    on_all(|_| {
        let on = percpu::struck_while_pinning();
        x86_64::instructions::interrupts::enable();
        check!(on, "interrupts stayed off");
        Ok(())
    })?;
    Ok(Passed::Ok)
}

/// One CPU strikes all with NMIs that allocate, while they allocate; where there is one only, the interval timer does.
pub(super) fn nmi_storm(machine: &Machine) -> Outcome {
    let mm = machine.mm;
    let done = AtomicBool::new(false);
    let turns = AtomicU64::new(0);
    let sum = |of: fn(&PerCpu) -> &AtomicU64| -> u64 {
        (0..machine.cpus)
            .map(|cpu| of(percpu::of(cpu)).load(Ordering::Relaxed))
            .sum()
    };
    let before = (sum(|cpu| &cpu.nmis), sum(|cpu| &cpu.nmis_pinned));
    traps::set_on_nmi(Some(on_nmi));
    if machine.cpus == 1 && !ioapic::strike(percpu::this(), STRIKES_HZ) {
        return Ok(Passed::Skipped("one CPU, and nothing that could strike it"));
    }
    let result = on_all(|cpu| {
        let until = time::now() + STORM_NS;
        let mut random = Random::new(cpu as u64 + 3);
        let mut held = [const { None }; 32];
        while !done.load(Ordering::Acquire) {
            if time::now() > until {
                done.store(true, Ordering::Release);
            }
            if cpu == 0 && machine.cpus > 1 {
                apic::send_nmi(percpu::of(1 + random.below(machine.cpus - 1)));
                // The next one must not come before this one is over, or nobody would get to do anything else.
                time::delay_us(10 + random.below(50) as u64);
                continue;
            }
            let object = mm
                .kmalloc(8 << random.below(9), GFP_KERNEL)
                .map_err(|why| why.to_string())?;
            // SAFETY: ours, at least 8 bytes long, and freed once.
            unsafe { object.write(0xc0 | cpu as u8) };
            if let Some(old) = held[random.below(32)].replace(object) {
                // SAFETY: the same.
                unsafe {
                    check!(
                        old.read() == 0xc0 | cpu as u8,
                        "an object was written by an NMI"
                    );
                    mm.kfree(old);
                }
            }
            let pfn = mm
                .alloc_pages(GFP_KERNEL, random.below(3))
                .map_err(|why| why.to_string())?;
            // SAFETY: ours, and freed once.
            unsafe { mm.free_pages(pfn) };
            turns.fetch_add(1, Ordering::Relaxed);
        }
        for object in held.into_iter().flatten() {
            // SAFETY: the same.
            unsafe { mm.kfree(object) };
        }
        Ok(())
    });
    // None is on its way any more: each CPU has taken the last one sent to it.
    ioapic::stop();
    time::delay_us(20_000);
    traps::set_on_nmi(None);
    result?;
    for keep in &KEEP {
        for object in &keep.objects {
            if let Some(object) = NonNull::new(object.swap(null_mut(), Ordering::Relaxed)) {
                // SAFETY: kept by a handler; there are no handlers any more.
                unsafe { mm.kfree(object) };
            }
        }
        for page in &keep.pages {
            let page = page.swap(0, Ordering::Relaxed);
            if page != 0 {
                // SAFETY: the same.
                unsafe { mm.free_pages(Pfn(page)) };
            }
        }
    }
    let after = (sum(|cpu| &cpu.nmis), sum(|cpu| &cpu.nmis_pinned));
    let (nmis, pinned) = (after.0 - before.0, after.1 - before.1);
    let turns = turns.load(Ordering::Relaxed);
    let (got, refused) = (GOT.load(Ordering::Relaxed), REFUSED.load(Ordering::Relaxed));
    check!(
        WRONG.load(Ordering::Relaxed) == 0,
        "{} times wrong in an NMI",
        WRONG.load(Ordering::Relaxed)
    );
    check!(nmis > 100 && turns > 100, "{nmis} NMIs, {turns} turns");
    check!(pinned > 0, "no NMI of {nmis} struck the allocator");
    check!(got > 0, "no NMI got anything, {refused} were refused");
    mm.shrink();
    check!(ledger(machine).balanced, "{:?}", ledger(machine));
    Ok(Passed::Says(format!(
        "{nmis} NMIs, {pinned} of them inside of something, {got} allocations in them, {refused} refused; {turns} turns beside"
    )))
}
