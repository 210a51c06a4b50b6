//! Tests of threads and processes when memory is short: reserves and groups are a thread's own, kswapd makes room, and what cannot be forked is not.

use alloc::format;
use alloc::string::ToString;
use alloc::vec::Vec;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use memdesc::filemap::Mapping;
use memdesc::gfp::{__GFP_NORETRY, __GFP_NOWARN, GFP_ATOMIC, GFP_KERNEL};
use memdesc::{Demand, Event, PAGE_SIZE, PAGEBLOCK_ORDER, Pfn};

use super::memory::{give_all_pages, take_all_pages};
use super::threads::{TOO_LONG_NS, ZEROS};
use super::usermode::{nothing_is_left, program, rest, run_all, text_file, user_demand, user_tree};
use super::{Machine, Outcome, Passed, ledger};
use crate::process::KILLED;
use crate::thread::{self, JoinHandle};
use crate::{check, park, process, sched, smp, time, worker};

/// Takes all blocks of 2 MiB but the last so many.
fn take_blocks(machine: &Machine, but: usize) -> Vec<Pfn> {
    let mm = machine.mm;
    let mut large = Vec::with_capacity((ledger(machine).given >> PAGEBLOCK_ORDER) as usize + 1);
    while let Ok(pfn) = mm.alloc_pages(GFP_KERNEL | __GFP_NORETRY | __GFP_NOWARN, PAGEBLOCK_ORDER) {
        large.push(pfn);
    }
    for pfn in large.drain(large.len().saturating_sub(but)..) {
        // SAFETY: ours, and freed once.
        unsafe { mm.free_pages(pfn) };
    }
    large
}

fn give_blocks(machine: &Machine, large: Vec<Pfn>) {
    for pfn in large {
        // SAFETY: from `take_blocks`, and freed once.
        unsafe { machine.mm.free_pages(pfn) };
    }
}

/// When memory is gone, the thread that has a reserve gets what it was promised, and another one does not.
pub(super) fn a_reserve_is_its_threads(machine: &Machine) -> Outcome {
    const COUNT: usize = 32;
    const SIZE: usize = 1500;
    /// What slabs have left, of other CPUs too, comes first.
    const TRIES: usize = 200;
    let mm = machine.mm;
    let demand = Demand::KmallocObjects {
        size: SIZE,
        count: COUNT,
    };
    let reserve = mm
        .reserve("threads", demand)
        .map_err(|why| why.to_string())?;
    reserve.connect(None).map_err(|why| why.to_string())?;
    let id = reserve.id();
    // 0: wait; 1: try; 2: give back.
    let stage = &AtomicU32::new(0);
    let got: [AtomicU64; 2] = [const { AtomicU64::new(u64::MAX) }; 2];
    let mut handles = Vec::with_capacity(2);
    for (i, got) in got.iter().enumerate() {
        let run = move || {
            let at = |wanted: u32| {
                while stage.load(Ordering::Acquire) < wanted {
                    park::park(stage, wanted - 1);
                }
            };
            if i == 1 {
                thread::current().reserve.store(id, Ordering::Relaxed);
            }
            at(1);
            let mut objects = [None; TRIES];
            for object in &mut objects {
                // The other runs between.
                sched::yield_now();
                *object = mm.kmalloc(SIZE, GFP_ATOMIC | __GFP_NOWARN).ok();
            }
            thread::current().reserve.store(0, Ordering::Relaxed);
            let from_reserve = |object: &&Option<NonNull<u8>>| {
                object.is_some_and(|object| mm.is_from_reserve(object.as_ptr()))
            };
            got.store(
                objects.iter().filter(from_reserve).count() as u64,
                Ordering::Release,
            );
            at(2);
            for object in objects.into_iter().flatten() {
                // SAFETY: ours, and freed once.
                unsafe { mm.kfree(object) };
            }
            0
        };
        // SAFETY: joined below.
        let handle = unsafe { thread::spawn_unchecked("reserve", None, run) };
        handles.push(handle.map_err(|why| why.to_string())?);
    }
    let mut plain = Vec::with_capacity(4096);
    let large = take_blocks(machine, 0);
    let small = take_all_pages(mm, GFP_KERNEL).0;
    let last = take_all_pages(mm, GFP_ATOMIC).0;
    while plain.len() < plain.capacity()
        && let Ok(object) = mm.kmalloc(SIZE, GFP_ATOMIC | __GFP_NOWARN)
    {
        plain.push(object);
    }
    let step = |to: u32| {
        stage.store(to, Ordering::Release);
        park::unpark_all(stage);
    };
    step(1);
    smp::wait_until(|| {
        got.iter()
            .all(|got| got.load(Ordering::Acquire) != u64::MAX)
    });
    step(2);
    handles.into_iter().map(JoinHandle::join).for_each(drop);
    for object in plain {
        // SAFETY: ours, and freed once.
        unsafe { mm.kfree(object) };
    }
    give_all_pages(mm, last);
    give_all_pages(mm, small);
    give_blocks(machine, large);
    reserve.disconnect().map_err(|why| why.to_string())?;
    check!(reserve.destroy().is_ok());
    let got: Vec<u64> = got.iter().map(|got| got.load(Ordering::Acquire)).collect();
    check!(
        got[0] == 0,
        "a thread without a reserve got {} objects of one",
        got[0]
    );
    check!(
        got[1] == COUNT as u64,
        "the thread with the reserve got {} objects of it",
        got[1]
    );
    check!(ledger(machine).balanced);
    Ok(Passed::Says(format!(
        "{} of {COUNT} objects from the reserve",
        got[1]
    )))
}

/// When memory runs low because of what is cached of files, kswapd makes room in the background.
pub(super) fn kswapd_reclaims(machine: &Machine) -> Outcome {
    let mm = machine.mm;
    let before = [&worker::RECLAIMS, &worker::RECLAIMED].map(|n| n.load(Ordering::Relaxed));
    let wakes = mm.event(Event::SlowPath);
    let file = Mapping::new(mm, &ZEROS, 1 << 30).map_err(|why| why.to_string())?;
    // Most of memory is taken, so that the cache need not be large.
    let large = take_blocks(machine, 4);
    let done = || worker::RECLAIMED.load(Ordering::Relaxed) > before[1];
    let (mut index, mut result) = (0, Ok(()));
    let until = time::now() + TOO_LONG_NS;
    while !done() && result.is_ok() && time::now() < until {
        result = file.get(index).map(drop).map_err(|why| why.to_string());
        index += 1;
        if index.is_multiple_of(256) {
            sched::yield_now();
        }
    }
    let pages = file.nrpages();
    drop(file);
    give_blocks(machine, large);
    result?;
    let wakes = mm.event(Event::SlowPath) - wakes;
    check!(
        done(),
        "kswapd made nothing free: {index} pages were read, {pages} are cached, {wakes} times memory was low"
    );
    let reclaims = worker::RECLAIMS.load(Ordering::Relaxed) - before[0];
    let freed = worker::RECLAIMED.load(Ordering::Relaxed) - before[1];
    check!(ledger(machine).balanced);
    Ok(Passed::Says(format!(
        "{index} pages read, {reclaims} runs made {freed} free"
    )))
}

/// A process whose group has a limit is killed when it goes beyond it, others are not: the group is that of the thread that made it.
pub(super) fn groups_limit_processes(machine: &Machine) -> Outcome {
    const PAGES: u64 = 100;
    let mm = machine.mm;
    let before = rest(machine);
    let file = text_file(machine)?;
    let limit = (PAGES / 2) * PAGE_SIZE as u64;
    let group = mm
        .memcg_create(None, "processes", limit)
        .map_err(|why| why.to_string())?;
    let greedy = program(&user_demand, [PAGES, 0], PAGES);
    let said = [AtomicU64::new(0), AtomicU64::new(0)];
    let wanted: u64 = (0..PAGES).map(|i| 3 * i + 7).sum();
    super::threads::in_threads(
        2,
        |_| None,
        |i| {
            if i == 0 {
                thread::current().memcg.store(group.id(), Ordering::Relaxed);
            }
            let of_process = run_all(&file, machine, &[greedy]);
            thread::current().memcg.store(0, Ordering::Relaxed);
            said[i].store(of_process?[0], Ordering::Relaxed);
            Ok(())
        },
    )?;
    let said = said.map(|said| said.load(Ordering::Relaxed));
    check!(
        said[0] & KILLED != 0,
        "the one with a limit said {:x}",
        said[0]
    );
    check!(
        said[1] == wanted,
        "the one without said {:x}, not {wanted:x}",
        said[1]
    );
    check!(group.failcnt() > 0 && group.watermark() <= limit);
    let (most, failed) = (group.watermark() / 1024, group.failcnt());
    drop(group);
    drop(file);
    nothing_is_left(machine, before)?;
    Ok(Passed::Says(format!(
        "at most {most} KiB, {failed} charges refused"
    )))
}

/// A tree of processes that is larger than memory: forks fail, processes are killed, parents go before their children, and all of it comes back.
pub(super) fn forks_fail_when_memory_is_gone(machine: &Machine) -> Outcome {
    /// Pages that are left, and those that each process of the tree writes to.
    const LEFT: usize = 900;
    const PAGES: u64 = 300;
    let mm = machine.mm;
    let before = rest(machine);
    let file = text_file(machine)?;
    let mut left = Vec::with_capacity(LEFT);
    while left.len() < LEFT
        && let Ok(pfn) = mm.alloc_pages(GFP_KERNEL, 0)
    {
        left.push(pfn);
    }
    let large = take_blocks(machine, 0);
    let small = take_all_pages(mm, GFP_KERNEL).0;
    give_blocks(machine, left);
    let tree = program(&user_tree, [3, PAGES], PAGES);
    let forks = process::FORKS.load(Ordering::Relaxed);
    let said = run_all(&file, machine, &[tree]);
    smp::wait_until(|| process::alive() == 0);
    let forks = process::FORKS.load(Ordering::Relaxed) - forks;
    give_all_pages(mm, small);
    give_blocks(machine, large);
    // What it says is no count of processes: an error, or that it was killed.
    check!(
        matches!(said.as_deref(), Ok([said]) if *said > u64::from(u32::MAX)),
        "{said:x?} after {forks} forks"
    );
    check!(forks > 0, "not even one fork found memory");
    drop((file, said));
    nothing_is_left(machine, before)?;
    Ok(Passed::Says(format!("{forks} of 14 forks found memory")))
}
