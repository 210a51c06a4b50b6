//! NMIs that strike CPUs in the middle of allocations, and allocate themselves; and interrupts that do.

use alloc::format;
use alloc::string::ToString;
use core::ptr::{NonNull, null_mut};
use core::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, Ordering};

use memdesc::gfp::{__GFP_FAST_TRY, Flags, GFP_ATOMIC, GFP_KERNEL};
use memdesc::{Context, Mm, Pfn, Platform};

use super::{Machine, Outcome, Passed, Random, ledger, on_all};
use crate::percpu::{self, MAX_CPUS, PerCpu};
use crate::platform::Metal;
use crate::{apic, check, ioapic, memory, time, traps};

/// How long it storms: so long at least, until there were so many strikes; on a busy host that may take longer, but not for ever.
const STORM_NS: u64 = 300_000_000;
const ENOUGH: u64 = 500;
const TOO_LONG_NS: u64 = 20_000_000_000;
/// Strikes in a second, by the timer.
const STRIKES_HZ: u32 = 5000;
fn is_over(start: u64, strikes: u64) -> bool {
    let took = time::now() - start;
    took > STORM_NS && strikes >= ENOUGH || took > TOO_LONG_NS
}

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
pub(crate) static GOT: AtomicU64 = AtomicU64::new(0);
static REFUSED: AtomicU64 = AtomicU64::new(0);
pub(crate) static WRONG: AtomicU64 = AtomicU64::new(0);

/// The handler: gives back what an earlier one kept, in one of two ways each, and takes something new.
pub(crate) fn on_nmi() {
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

/// Gives back what handlers kept. There are none any more.
pub(crate) fn give_back(mm: &Mm<Metal>) {
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

/// What is nowhere: a null pointer's page.
const NOWHERE: [usize; 2] = [8, 16];
/// Of each CPU: how deep it is in NMIs, how deep it was at most, and how many came.
static DEPTHS: [[AtomicU32; 3]; MAX_CPUS] = [const { [const { AtomicU32::new(0) }; 3] }; MAX_CPUS];

/// A handler that faults, with the next NMI waiting for it to be over.
fn on_nmi_that_faults() {
    let me = percpu::this();
    let [depth, deepest, count] = &DEPTHS[me.cpu()];
    deepest.fetch_max(depth.fetch_add(1, Ordering::Relaxed) + 1, Ordering::Relaxed);
    if count.fetch_add(1, Ordering::Relaxed) == 0 {
        apic::send_nmi(me);
    }
    if traps::probe(NOWHERE[0]) {
        WRONG.fetch_add(1, Ordering::Relaxed);
    }
    time::delay_us(100);
    depth.fetch_sub(1, Ordering::Relaxed);
}

/// An NMI whose handler faults, as one does that follows frames which are none, is over before the next one comes, and who was struck with a page fault of its own sees its address.
pub(super) fn faults_in_an_nmi(_machine: &Machine) -> Outcome {
    traps::set_on_nmi(Some(on_nmi_that_faults));
    let result = on_all(|cpu| {
        let [_, deepest, count] = &DEPTHS[cpu];
        count.store(0, Ordering::Relaxed);
        let address = x86_64::instructions::interrupts::without_interrupts(|| {
            traps::probe(NOWHERE[1]);
            apic::send_nmi(percpu::this());
            let start = time::now();
            while count.load(Ordering::Relaxed) < 2 && time::now() - start < TOO_LONG_NS {
                core::hint::spin_loop();
            }
            x86_64::registers::control::Cr2::read_raw()
        });
        let (count, deepest) = (
            count.load(Ordering::Relaxed),
            deepest.load(Ordering::Relaxed),
        );
        check!(count == 2, "{count} NMIs");
        check!(deepest == 1, "{deepest} NMIs, one in the other");
        check!(
            address == NOWHERE[1] as u64,
            "a page fault at {:#x} became one at {address:#x}",
            NOWHERE[1]
        );
        Ok(())
    });
    traps::set_on_nmi(None);
    result?;
    check!(WRONG.load(Ordering::Relaxed) == 0);
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
        let start = time::now();
        let mut random = Random::new(cpu as u64 + 3);
        let mut held = [const { None }; 32];
        while !done.load(Ordering::Acquire) {
            let strikes = sum(|cpu| &cpu.nmis) - before.0;
            if is_over(start, strikes) {
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
    give_back(mm);
    let after = (sum(|cpu| &cpu.nmis), sum(|cpu| &cpu.nmis_pinned));
    let (nmis, pinned) = (after.0 - before.0, after.1 - before.1);
    let turns = turns.load(Ordering::Relaxed);
    let (got, refused) = (GOT.load(Ordering::Relaxed), REFUSED.load(Ordering::Relaxed));
    check!(
        WRONG.load(Ordering::Relaxed) == 0,
        "{} times wrong in an NMI",
        WRONG.load(Ordering::Relaxed)
    );
    check!(nmis >= ENOUGH && turns > 100, "{nmis} NMIs, {turns} turns");
    check!(pinned > 0, "no NMI of {nmis} struck the allocator");
    check!(got > 0, "no NMI got anything, {refused} were refused");
    mm.shrink();
    check!(ledger(machine).balanced, "{:?}", ledger(machine));
    Ok(Passed::Says(format!(
        "{nmis} NMIs, {pinned} of them inside of something, {got} allocations in them, {refused} refused; {turns} turns beside"
    )))
}

/// Interrupts, their objects and how many of them there were.
static IRQS: AtomicU64 = AtomicU64::new(0);
static IRQ_FAILED: AtomicU64 = AtomicU64::new(0);

/// An interrupt's handler: it may do what a thread that does not sleep may do.
fn on_interrupt() {
    let Some(mm) = memory::mm() else {
        return;
    };
    if Metal.context() != Context::HardIrq {
        WRONG.fetch_add(1, Ordering::Relaxed);
    }
    let n = IRQS.fetch_add(1, Ordering::Relaxed) as usize;
    match mm.kmalloc(8 << (n % 9), GFP_ATOMIC) {
        // SAFETY: ours, and freed once.
        Ok(object) => unsafe {
            object.write_bytes(n as u8, 8);
            mm.kfree(object);
        },
        Err(_) => {
            IRQ_FAILED.fetch_add(1, Ordering::Relaxed);
        }
    }
    match mm.alloc_pages(GFP_ATOMIC, n % 3) {
        // SAFETY: the same.
        Ok(pfn) => unsafe { mm.free_pages(pfn) },
        Err(_) => {
            IRQ_FAILED.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Interrupts come in the middle of allocations and allocate, by the ordinary calls: they come where nothing is held that they want.
pub(super) fn interrupts_allocate(machine: &Machine) -> Outcome {
    if machine.boot.has("rt") {
        return Ok(Passed::Skipped("locks sleep, which interrupts do not"));
    }
    let mm = machine.mm;
    let done = AtomicBool::new(false);
    let before = IRQS.load(Ordering::Relaxed);
    traps::set_on_call(Some(on_interrupt));
    let result = on_all(|cpu| {
        let start = time::now();
        let mut random = Random::new(cpu as u64 + 21);
        while !done.load(Ordering::Acquire) {
            let strikes = IRQS.load(Ordering::Relaxed) - before;
            if cpu == 0 && is_over(start, strikes) {
                done.store(true, Ordering::Release);
            }
            if cpu == 0 {
                apic::send(percpu::of(random.below(machine.cpus)), apic::CALL_VECTOR);
            }
            // Every list, its own too.
            if random.below(50) == 0 {
                mm.drain_all();
            }
            let object = mm
                .kmalloc(8 << random.below(9), GFP_KERNEL)
                .map_err(|why| why.to_string())?;
            let pfn = mm
                .alloc_pages(GFP_KERNEL, random.below(3))
                .map_err(|why| why.to_string())?;
            // SAFETY: ours, at least 8 bytes long, and freed once.
            unsafe {
                object.write_bytes(0xcc, 8);
                mm.free_pages(pfn);
                check!(
                    object.add(7).read() == 0xcc,
                    "an object was written by an interrupt"
                );
                mm.kfree(object);
            }
        }
        Ok(())
    });
    time::delay_us(20_000);
    traps::set_on_call(None);
    result?;
    let (irqs, failed) = (
        IRQS.load(Ordering::Relaxed) - before,
        IRQ_FAILED.load(Ordering::Relaxed),
    );
    check!(
        WRONG.load(Ordering::Relaxed) == 0,
        "{} times wrong in an interrupt",
        WRONG.load(Ordering::Relaxed)
    );
    check!(
        irqs >= ENOUGH && failed == 0,
        "{irqs} interrupts, {failed} allocations failed"
    );
    check!(ledger(machine).balanced);
    Ok(Passed::Says(format!("{irqs} interrupts")))
}
