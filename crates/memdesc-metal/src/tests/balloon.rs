//! What a hypervisor's balloon does, step by step: after each one the guest says so on the serial port and waits for a line from whoever looks at the machine from
//! outside (`xtask/src/balloon.rs`), where it shows what the steps did. Everything that is used is written to the last word and read again, and
//! some of memory holds the same through all steps.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::sync::atomic::Ordering;

use memdesc::gfp::{__GFP_ZERO, Flags, GFP_HIGHUSER_MOVABLE, GFP_KERNEL};
use memdesc::rcu::Rcu;
use memdesc::{CensusKind, Event, Mm, PAGE_SIZE, PAGEBLOCK_ORDER, Pfn};

use super::{Machine, ledger, on_all, settled};
use crate::exit::Exit;
use crate::platform::Metal;
use crate::{balloon, check, log, memory, time};

/// What is used at first, what stays in use meanwhile, what is used when all is back, and what is used when memory is out, in MiB.
const MUCH: usize = 700;
const STAYS: usize = 32;
const ALL: usize = 900;
const MORE: usize = 128;
/// Of each, so much by single pages.
const SINGLES: usize = 32;
/// No step takes that long.
const STEP_NS: u64 = 60_000_000_000;
const PAGES_OF_MIB: usize = (1 << 20) / PAGE_SIZE;

type Blocks = Vec<(Pfn, usize)>;

/// Goes through all steps.
pub(crate) fn run(machine: &mut Machine) -> Exit {
    match steps(machine) {
        Ok(()) => {
            log!("balloon: passed");
            Exit::Success
        }
        Err(why) => {
            log!("balloon: FAILED: {why}");
            Exit::Failure
        }
    }
}

/// Does the periodic work until something is so.
fn wait(what: &str, is_so: impl Fn() -> bool) -> Result<(), String> {
    let until = time::now() + STEP_NS;
    while !is_so() {
        memory::work();
        check!(time::now() < until, "{what}: not in time");
        x86_64::instructions::hlt();
    }
    Ok(())
}

/// Says how far we are, and waits for whoever looks from outside.
fn say(step: &str, facts: &str) -> Result<(), String> {
    log!("balloon: {step}{facts}");
    wait(step, || log::receive() == Some(b'\n'))
}

/// So much memory: most of it in blocks of 2 MiB, some by pages. As users' memory is, it should be movable: among pages of the kernel's own lie those that describe them,
/// and keep them apart when they are free.
fn take(mm: &Mm<Metal>, mib: usize, singles: usize, gfp: Flags) -> Result<Blocks, String> {
    let large = ((mib - singles) * PAGES_OF_MIB) >> PAGEBLOCK_ORDER;
    let small = singles * PAGES_OF_MIB;
    // The list first: its memory shall not be wanting when memory is out.
    let mut blocks = Vec::new();
    let list = blocks.try_reserve_exact(large + small);
    list.map_err(|why| format!("a list of {} blocks: {why}", large + small))?;
    let orders = [(PAGEBLOCK_ORDER, large), (0, small)];
    for (order, n) in orders {
        for i in 0..n {
            let pfn = mm.alloc_pages(gfp, order);
            blocks.push((
                pfn.map_err(|why| format!("block {i} of order {order}: {why}"))?,
                order,
            ));
        }
    }
    Ok(blocks)
}

fn give(mm: &Mm<Metal>, blocks: Blocks) {
    for (pfn, _) in blocks {
        // SAFETY: from `take`, and freed once.
        unsafe { mm.free_pages(pfn) };
    }
    mm.shrink();
}

/// What a word holds that is here.
fn pattern(seed: u64, at: usize) -> u64 {
    (at as u64 ^ seed << 48).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// Has all CPUs do something with the words of the blocks, which are the caller's.
fn each(
    machine: &Machine,
    blocks: &Blocks,
    f: impl Fn(&mut [u64]) -> Result<(), usize> + Sync,
) -> Result<(), String> {
    let cpus = machine.cpus;
    on_all(|cpu| {
        for &(pfn, order) in blocks.iter().skip(cpu).step_by(cpus) {
            let at = machine.mm.page_address(pfn).cast::<u64>();
            // SAFETY: ours, that long, and this CPU's among ours.
            let words = unsafe { core::slice::from_raw_parts_mut(at, (PAGE_SIZE << order) / 8) };
            f(words).map_err(|nth| format!("word {nth} of {pfn:?}: {:#x}", words[nth]))?;
        }
        Ok(())
    })
}

fn fill(machine: &Machine, blocks: &Blocks, seed: u64) -> Result<(), String> {
    each(machine, blocks, |words| {
        let at = words.as_ptr().addr();
        let numbered = words.iter_mut().enumerate();
        numbered.for_each(|(i, word)| *word = pattern(seed, at + 8 * i));
        Ok(())
    })
}

fn holds(machine: &Machine, blocks: &Blocks, seed: u64) -> Result<(), String> {
    each(machine, blocks, |words| {
        let at = words.as_ptr().addr();
        let wrong = words.iter().enumerate();
        let wrong = { wrong }.find(|(i, word)| **word != pattern(seed, at + 8 * i));
        wrong.map_or(Ok(()), |(nth, _)| Err(nth))
    })
}

fn is_zero(machine: &Machine, blocks: &Blocks) -> Result<(), String> {
    let wrong = |words: &mut [u64]| words.iter().position(|word| *word != 0);
    each(machine, blocks, |words| wrong(words).map_or(Ok(()), Err))
}

/// What the memory manager says: pages in the balloon, as its map has them; free pages; the ledger balances.
fn books(machine: &Machine) -> Result<(u64, u64), String> {
    let ledger = ledger(machine);
    check!(ledger.balanced, "the ledger does not balance: {ledger:?}");
    let census = machine.mm.census();
    let inside = census.of(CensusKind::Balloon).pages;
    check!(census.of(CensusKind::Balloon).descriptors == 0);
    Ok((inside, ledger.free + ledger.untouched + ledger.pcp))
}

fn steps(machine: &Machine) -> Result<(), String> {
    let mm = machine.mm;
    let Some(inside) = balloon::balloon() else {
        return Err("the machine has no balloon".into());
    };
    mm.shrink();
    let (_, free) = books(machine)?;
    let before = settled(&ledger(machine));
    let mut managed = 0;
    mm.zoneinfo(|zone| managed += zone.managed);
    // Between what stays there is room for what comes and goes.
    let (stays, goes): (Vec<_>, Vec<_>) = take(mm, 2 * STAYS, 0, GFP_HIGHUSER_MOVABLE)?
        .into_iter()
        .partition(|(pfn, _)| pfn.0 >> PAGEBLOCK_ORDER & 1 == 0);
    give(mm, goes);
    let first = mm.page_report();
    first.map_err(|why| format!("{why}"))?;
    fill(machine, &stays, 1)?;
    say("ready", &format!(": {managed} pages managed, {free} free"))?;

    // Free page reporting. The memory manager is told that nobody takes reports for a while, to see that it is them that make the difference.
    balloon::set_reporting(false);
    let blocks = take(mm, MUCH, SINGLES, GFP_HIGHUSER_MOVABLE)?;
    fill(machine, &blocks, 2)?;
    say("touched", &format!(": {MUCH} MiB"))?;
    holds(machine, &blocks, 2)?;
    give(mm, blocks);
    say("freed", "")?;
    let (reported, batches) = (mm.event(Event::PgReported), mm.event(Event::ReportBatch));
    balloon::set_reporting(true);
    // All but what may lie in blocks too small to be reported: where single pages were, at either end.
    let least = ((MUCH - 8) * PAGES_OF_MIB) as u64;
    wait("reports", || {
        mm.event(Event::PgReported) - reported >= least
    })?;
    let (reported, batches) = (
        mm.event(Event::PgReported) - reported,
        mm.event(Event::ReportBatch) - batches,
    );
    say(
        "reported",
        &format!(": {reported} pages in {batches} reports"),
    )?;

    // What was reported holds anything: zeros where zeros are asked for, and what is written to it.
    balloon::set_reporting(false);
    let blocks = take(mm, MUCH, SINGLES, GFP_HIGHUSER_MOVABLE | __GFP_ZERO)?;
    is_zero(machine, &blocks)?;
    fill(machine, &blocks, 3)?;
    say("touched again", "")?;
    holds(machine, &blocks, 3)?;
    holds(machine, &stays, 1)?;
    give(mm, blocks);
    if machine.boot.has("short") {
        give(mm, stays);
        books(machine)?;
        return Ok(());
    }

    // While the guest waits here, it is asked for most of its memory.
    say("freed again", "")?;
    let (pages, left) = books(machine)?;
    let wanted = u64::from(balloon::wanted());
    check!(
        pages == wanted && pages == inside.pages() && pages > 0,
        "{pages} pages in the balloon, {wanted} are wanted"
    );
    let mut still = 0;
    mm.zoneinfo(|zone| still += zone.managed);
    check!(still == managed && left + pages <= free);
    let changes = balloon::CONFIG_CHANGES.load(Ordering::Relaxed);
    check!(changes > 0, "the device's interrupt did not come");
    holds(machine, &stays, 1)?;
    say(
        "inflated",
        &format!(
            ": {pages} pages in the balloon, {left} free, {managed} managed, after {changes} interrupts"
        ),
    )?;

    // And here it has got all of it back.
    let (pages, _) = books(machine)?;
    check!(pages == 0, "{pages} pages in the balloon");
    let blocks = take(mm, ALL, SINGLES, GFP_HIGHUSER_MOVABLE)?;
    fill(machine, &blocks, 4)?;
    holds(machine, &blocks, 4)?;
    holds(machine, &stays, 1)?;
    say("deflated", &format!(": {ALL} MiB in use"))?;
    holds(machine, &blocks, 4)?;
    give(mm, blocks);
    balloon::set_reporting(true);

    // More is wanted than there is; it gives what it can, and goes on.
    let (_, free) = books(machine)?;
    say("idle", "")?;
    let (pages, left) = books(machine)?;
    let wanted = u64::from(balloon::wanted());
    let (mut min, mut high) = (0, 0);
    mm.zoneinfo(|zone| {
        min += zone.watermarks[0];
        high += zone.watermarks[2];
    });
    check!(
        pages < wanted && pages * 100 >= free * 95,
        "{pages} pages in the balloon of {free} that were free, {wanted} are wanted"
    );
    check!(
        left >= min,
        "{left} pages are free, under the watermark of {min}"
    );
    say(
        "short",
        &format!(
            ": {pages} pages in the balloon of {wanted} wanted, {left} free, high watermarks {high}"
        ),
    )?;

    // Who needs memory gets it from the balloon.
    let deflated = mm.event(Event::BalloonDeflate);
    let blocks = take(mm, MORE, MORE, GFP_KERNEL)?;
    fill(machine, &blocks, 5)?;
    let deflated = mm.event(Event::BalloonDeflate) - deflated;
    let (now, _) = books(machine)?;
    check!(
        now < pages && deflated >= (MORE * PAGES_OF_MIB) as u64 - left,
        "{pages} pages were in the balloon, {now} are, {deflated} came out"
    );
    say(
        "out of memory",
        &format!(
            ": {MORE} MiB by pages, {deflated} pages came out of the balloon, {now} are in it"
        ),
    )?;
    holds(machine, &blocks, 5)?;
    holds(machine, &stays, 1)?;
    give(mm, blocks);
    // It is still wanted.
    wait("the balloon is filled again", || {
        inside.pages() >= pages - pages / 100
    })?;

    say("filled again", "")?;
    wait("the balloon is empty", || inside.pages() == 0)?;
    holds(machine, &stays, 1)?;
    give(mm, stays);
    mm.rcu().barrier();
    mm.shrink();
    let (pages, free) = books(machine)?;
    let after = settled(&ledger(machine));
    check!(
        pages == 0 && before == after,
        "{before} pages were free or metadata, {after} are"
    );
    let on_free = mm.event(Event::AllocOnFree);
    check!(on_free == 0, "{on_free} allocations on a free path");
    log!("balloon: the ledger balances: {free} pages free, nothing in the balloon");
    Ok(())
}
