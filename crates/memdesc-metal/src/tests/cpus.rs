//! Tests on all CPUs at once: numbers, ticks, memory that goes from one to another, drains, grace periods.

use alloc::collections::BTreeMap;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::ptr::{NonNull, null_mut};
use core::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, Ordering};

use memdesc::gfp::GFP_KERNEL;
use memdesc::rcu::cpus::Cpus;
use memdesc::rcu::{Rcu, RcuHead};
use memdesc::{Context, PAGE_SIZE, Pfn, Platform};

use super::{Machine, Outcome, Passed, Random, ledger, on_all};
use crate::platform::Metal;
use crate::{check, percpu, remote, time};

/// Turns of what is done on all CPUs.
const ROUNDS: usize = 4000;
/// How often all lists are emptied, by as many CPUs as there are.
const DRAINS: u64 = 80;
/// Grace periods that are waited for.
const GRACE_PERIODS: u64 = 50;
/// Places in which one CPU leaves something for another.
const SLOTS: usize = 64;

/// Each CPU's timer interrupts it.
pub(super) fn timers_tick(_machine: &Machine) -> Outcome {
    on_all(|cpu| {
        let ticks = || percpu::of(cpu).ticks.load(Ordering::Relaxed);
        let (before, until) = (ticks(), time::now() + 2_000_000_000);
        while ticks() < before + 3 {
            check!(time::now() < until, "{} ticks in 2 s", ticks() - before);
            remote::serve();
            core::hint::spin_loop();
        }
        Ok(())
    })?;
    Ok(Passed::Ok)
}

/// Each CPU is another, and knows what it runs in.
pub(super) fn cpus_have_numbers(machine: &Machine) -> Outcome {
    let seen = AtomicU32::new(0);
    on_all(|cpu| {
        check!(Metal.context() == Context::Task);
        let pinned = [Platform::pin(&Metal), Platform::pin(&Metal)];
        let context = Metal.context();
        // SAFETY: from the pins just made, which both gave the same.
        unsafe {
            Platform::unpin(&Metal, cpu);
            Platform::unpin(&Metal, cpu);
        }
        check!(pinned == [cpu, cpu] && context == Context::Atomic);
        check!(Metal.irqs_enabled());
        seen.fetch_or(1 << cpu, Ordering::Relaxed);
        Ok(())
    })?;
    check!(seen.load(Ordering::Relaxed) == (1 << machine.cpus) - 1);
    Ok(Passed::Ok)
}

/// Memory comes from the node of the CPU that asks, as long as it has some, and from another if that is said.
pub(super) fn cpus_allocate_from_their_node(machine: &Machine) -> Outcome {
    let mm = machine.mm;
    let nodes = machine
        .ranges
        .iter()
        .map(|range| range.node)
        .max()
        .unwrap_or(0)
        + 1;
    if nodes == 1 {
        return Ok(Passed::Skipped("one node"));
    }
    let node_of = |pfn: Pfn| {
        let range = machine
            .ranges
            .iter()
            .find(|r| r.start <= pfn.phys() && pfn.phys() < r.end);
        range.map(|r| usize::from(r.node))
    };
    on_all(|cpu| {
        let here = percpu::of(cpu).node.load(Ordering::Relaxed);
        for order in [0, 0, 9] {
            let pfn = mm
                .alloc_pages(GFP_KERNEL, order)
                .map_err(|why| why.to_string())?;
            let node = node_of(pfn);
            // SAFETY: ours, and freed once.
            unsafe { mm.free_pages(pfn) };
            check!(
                node == Some(here),
                "{pfn:?} of node {node:?} on node {here}"
            );
        }
        for wanted in 0..usize::from(nodes) {
            let pfn = mm
                .alloc_pages_node(Some(wanted), GFP_KERNEL, 0)
                .map_err(|why| why.to_string())?;
            let node = node_of(pfn);
            // SAFETY: the same.
            unsafe { mm.free_pages(pfn) };
            check!(
                node == Some(wanted),
                "{pfn:?} of node {node:?}, not {wanted}"
            );
        }
        Ok(())
    })?;
    Ok(Passed::Says(format!("{nodes} nodes")))
}

/// Pages of several orders are allocated on one CPU, checked and freed on another.
pub(super) fn pages_go_between_cpus(machine: &Machine) -> Outcome {
    let mm = machine.mm;
    let slots = [const { AtomicU64::new(0) }; SLOTS];
    let check_and_free = |packed: u64| -> Result<(), String> {
        if packed == 0 {
            return Ok(());
        }
        let (pfn, order) = (Pfn(packed as u32), (packed >> 32) as usize);
        let last = (PAGE_SIZE << order) / 8 - 1;
        let words = mm.page_address(pfn).cast::<u64>();
        // SAFETY: whoever takes it out of a slot has it; that long, written by who put it there, freed once.
        unsafe {
            check!(
                words.read() == packed && words.add(last).read() == packed,
                "{pfn:?} was written by somebody else"
            );
            mm.free_pages(pfn);
        }
        Ok(())
    };
    on_all(|cpu| {
        let mut random = Random::new(cpu as u64 + 1);
        for _ in 0..ROUNDS {
            let order = random.below(5);
            let pfn = mm
                .alloc_pages(GFP_KERNEL, order)
                .map_err(|why| why.to_string())?;
            let packed = u64::from(pfn.0) | (order as u64) << 32;
            let last = (PAGE_SIZE << order) / 8 - 1;
            let words = mm.page_address(pfn).cast::<u64>();
            // SAFETY: ours, and that long.
            unsafe {
                words.write(packed);
                words.add(last).write(packed);
            }
            check_and_free(slots[random.below(SLOTS)].swap(packed, Ordering::AcqRel))?;
        }
        Ok(())
    })?;
    for slot in &slots {
        check_and_free(slot.load(Ordering::Acquire))?;
    }
    check!(ledger(machine).balanced);
    Ok(Passed::Ok)
}

/// Objects of all sizes are allocated on one CPU, checked and freed on another.
pub(super) fn objects_go_between_cpus(machine: &Machine) -> Outcome {
    let mm = machine.mm;
    let slots = [const { AtomicPtr::<usize>::new(null_mut()) }; SLOTS];
    let check_and_free = |object: *mut usize| -> Result<(), String> {
        let Some(object) = NonNull::new(object) else {
            return Ok(());
        };
        // SAFETY: whoever takes it out of a slot has it; its first and last words were written by who put it there; freed once.
        unsafe {
            let words = object.read();
            check!(
                words > 0 && words <= 1024,
                "{object:?} was written by somebody else"
            );
            check!(
                object.add(words - 1).read() == words,
                "{object:?} was written by somebody else"
            );
            mm.kfree(object.cast());
        }
        Ok(())
    };
    on_all(|cpu| {
        let mut random = Random::new(cpu as u64 + 77);
        for _ in 0..ROUNDS {
            let most = 1 << (1 + random.below(10));
            let words = 1 + random.below(most);
            let object = mm
                .kmalloc(words * 8, GFP_KERNEL)
                .map_err(|why| why.to_string())?;
            let object = object.cast::<usize>();
            // SAFETY: ours, and that long.
            unsafe {
                object.write(words);
                object.add(words - 1).write(words);
            }
            check_and_free(slots[random.below(SLOTS)].swap(object.as_ptr(), Ordering::AcqRel))?;
        }
        Ok(())
    })?;
    for slot in &slots {
        check_and_free(slot.load(Ordering::Acquire))?;
    }
    check!(ledger(machine).balanced);
    Ok(Passed::Ok)
}

/// A heavy barrier goes through all CPUs, whether their interrupts are on, or off while they wait for something.
pub(super) fn barriers_reach_all_cpus(machine: &Machine) -> Outcome {
    const TURNS: u64 = 10;
    let (waiting, done) = (AtomicU64::new(0), AtomicU64::new(0));
    for pinned in [false, true] {
        done.store(0, Ordering::Relaxed);
        waiting.store(0, Ordering::Relaxed);
        on_all(|cpu| {
            if cpu != 0 {
                if pinned {
                    Platform::pin(&Metal);
                }
                waiting.fetch_add(1, Ordering::AcqRel);
                while done.load(Ordering::Acquire) == 0 {
                    if pinned {
                        Platform::relax(&Metal, 0);
                    }
                    core::hint::spin_loop();
                }
                if pinned {
                    // SAFETY: from the pin above.
                    unsafe { Platform::unpin(&Metal, cpu) };
                }
                return Ok(());
            }
            while waiting.load(Ordering::Acquire) < machine.cpus as u64 - 1 {
                core::hint::spin_loop();
            }
            let served = |cpu: usize| percpu::of(cpu).done.load(Ordering::Acquire);
            let mut missed = None;
            for turn in 0..TURNS {
                let before: Vec<u64> = (0..machine.cpus).map(served).collect();
                if turn % 2 == 0 {
                    Platform::heavy_barrier(&Metal);
                } else {
                    Cpus::heavy_barrier(&Metal);
                }
                missed = missed.or((1..machine.cpus).find(|&cpu| served(cpu) == before[cpu]));
            }
            done.store(1, Ordering::Release);
            check!(missed.is_none(), "CPU {missed:?} was not reached");
            Ok(())
        })?;
    }
    if machine.cpus == 1 {
        return Ok(Passed::Skipped("one CPU"));
    }
    Ok(Passed::Ok)
}

/// One CPU empties the lists of all while they use them: each drain is a barrier on all CPUs.
pub(super) fn lists_are_drained_under_load(machine: &Machine) -> Outcome {
    let mm = machine.mm;
    if machine.cpus == 1 {
        return Ok(Passed::Skipped("one CPU"));
    }
    // More CPUs than the host has make each barrier long.
    let drains = DRAINS / machine.cpus as u64;
    let done = AtomicBool::new(false);
    let barriers = remote::BARRIERS.load(Ordering::Relaxed);
    on_all(|cpu| {
        if cpu == 0 {
            for _ in 0..drains {
                mm.drain_all();
            }
            done.store(true, Ordering::Release);
            return Ok(());
        }
        let mut held = Vec::new();
        let mut random = Random::new(cpu as u64);
        while !done.load(Ordering::Acquire) {
            held.push(
                mm.alloc_pages(GFP_KERNEL, random.below(3))
                    .map_err(|why| why.to_string())?,
            );
            if held.len() >= 50 {
                for pfn in held.drain(..) {
                    // SAFETY: ours, and freed once.
                    unsafe { mm.free_pages(pfn) };
                }
            }
        }
        for pfn in held {
            // SAFETY: the same.
            unsafe { mm.free_pages(pfn) };
        }
        Ok(())
    })?;
    let barriers = remote::BARRIERS.load(Ordering::Relaxed) - barriers;
    check!(
        barriers >= drains,
        "{barriers} barriers for {drains} drains"
    );
    check!(ledger(machine).balanced);
    Ok(Passed::Says(format!("{barriers} barriers")))
}

/// Readers see both or neither of what is changed with a grace period between.
pub(super) fn readers_hold_up_grace_periods(machine: &Machine) -> Outcome {
    let mm = machine.mm;
    let (one, two, done) = (
        &AtomicU64::new(0),
        &AtomicU64::new(0),
        &AtomicBool::new(false),
    );
    let sections = AtomicU64::new(0);
    on_all(|cpu| {
        if cpu == 0 {
            for round in 1..=GRACE_PERIODS {
                one.store(round, Ordering::Relaxed);
                mm.rcu().synchronize();
                two.store(round, Ordering::Relaxed);
            }
            done.store(true, Ordering::Relaxed);
            return Ok(());
        }
        while !done.load(Ordering::Relaxed) {
            let _read = mm.rcu_read_lock();
            let _nested = mm.rcu_read_lock();
            check!(mm.rcu().reading());
            // Whoever entered before `one` changed holds up the grace period after which `two` does.
            let earlier = one.load(Ordering::Acquire);
            for _ in 0..50 {
                core::hint::spin_loop();
            }
            let later = two.load(Ordering::Acquire);
            check!(later <= earlier, "{earlier} was seen, and then {later}");
            sections.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    })?;
    check!(!mm.rcu().reading());
    Ok(Passed::Says(format!(
        "{GRACE_PERIODS} grace periods, {} read sections",
        sections.load(Ordering::Relaxed)
    )))
}

/// What is freed by `kvfree_rcu` is not used for anything else while a reader has it.
pub(super) fn frees_wait_for_readers(machine: &Machine) -> Outcome {
    #[repr(C)]
    struct Node {
        head: RcuHead,
        stamp: AtomicU64,
        check: AtomicU64,
    }
    let mm = machine.mm;
    let new = |stamp: u64| -> Result<NonNull<Node>, String> {
        let node = mm
            .kmalloc(size_of::<Node>(), GFP_KERNEL)
            .map_err(|why| why.to_string())?
            .cast::<Node>();
        // SAFETY: ours, that large, and aligned.
        unsafe {
            node.write(Node {
                head: RcuHead::new(),
                stamp: AtomicU64::new(stamp),
                check: AtomicU64::new(!stamp),
            });
        }
        Ok(node)
    };
    let shared = AtomicPtr::new(new(0)?.as_ptr());
    let done = AtomicBool::new(false);
    on_all(|cpu| {
        if cpu == 0 {
            for stamp in 1..4000 / machine.cpus as u64 {
                let old = shared.swap(new(stamp)?.as_ptr(), Ordering::AcqRel);
                let Some(old) = NonNull::new(old) else {
                    return Err("no node".to_string());
                };
                // SAFETY: nobody finds it any more, and its head is used for nothing else.
                unsafe { mm.kvfree_rcu(old.cast(), NonNull::from(&old.as_ref().head)) };
                // What comes free is written to at once.
                let other = mm
                    .kmalloc(size_of::<Node>(), GFP_KERNEL)
                    .map_err(|why| why.to_string())?;
                // SAFETY: ours, and that large; freed once.
                unsafe {
                    other.write_bytes(0xee, size_of::<Node>());
                    mm.kfree(other);
                }
                if stamp.is_multiple_of(100) {
                    mm.rcu_work();
                }
            }
            done.store(true, Ordering::Release);
            return Ok(());
        }
        while !done.load(Ordering::Acquire) {
            let _read = mm.rcu_read_lock();
            // SAFETY: found in a read section, so not freed before its end.
            let node = unsafe { &*shared.load(Ordering::Acquire) };
            for _ in 0..20 {
                let (stamp, check) = (
                    node.stamp.load(Ordering::Relaxed),
                    node.check.load(Ordering::Relaxed),
                );
                check!(
                    stamp == !check,
                    "a node was written while it was read: {stamp:#x} {check:#x}"
                );
            }
        }
        Ok(())
    })?;
    mm.kvfree_rcu_barrier();
    if let Some(last) = NonNull::new(shared.load(Ordering::Relaxed)) {
        // SAFETY: nobody reads it any more.
        unsafe { mm.kfree(last.cast()) };
    }
    check!(ledger(machine).balanced);
    Ok(Passed::Ok)
}

/// `alloc`'s collections, on all CPUs at once.
pub(super) fn collections_on_all_cpus(machine: &Machine) -> Outcome {
    on_all(|cpu| {
        let mut map = BTreeMap::new();
        let mut random = Random::new(cpu as u64 + 5);
        for i in 0..2000usize {
            let key = random.below(500);
            let text = alloc::vec![cpu as u8; 1 + random.below(3000)];
            if let Some(old) = map.insert(key, text) {
                check!(
                    old.iter().all(|byte| *byte == cpu as u8),
                    "{key} was written by another CPU in turn {i}"
                );
            }
        }
        check!(map.values().flatten().all(|byte| *byte == cpu as u8));
        Ok(())
    })?;
    check!(ledger(machine).balanced);
    Ok(Passed::Ok)
}
