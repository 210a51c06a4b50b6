//! Free page reporting: what the platform is told, when, and what becomes of the blocks.

mod common;

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use common::*;
use memdesc::gfp::{
    __GFP_MEMALLOC, __GFP_ZERO, GFP_ATOMIC, GFP_HIGHUSER_MOVABLE, GFP_KERNEL, GFP_NOWAIT,
};
use memdesc::*;
use memdesc_host::Host;

const SECOND: u64 = 1_000_000_000;

type Report = Vec<(Pfn, usize)>;

/// What was reported.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<Report>>>);

impl Log {
    fn take(&self) -> Report {
        let batches = std::mem::take(&mut *self.0.lock().unwrap());
        for batch in &batches {
            assert!((1..=32).contains(&batch.len()), "{}", batch.len());
        }
        batches.into_iter().flatten().collect()
    }
}

fn pages_of(blocks: &[(Pfn, usize)]) -> HashSet<u32> {
    let pages = blocks
        .iter()
        .flat_map(|&(pfn, order)| pfn.0..pfn.0 + (1 << order));
    pages.collect()
}

/// A machine that reports blocks of `order`, and the log of its reports.
fn boot(
    pages: u32,
    order: usize,
    answer: Result<Reported, NotReported>,
) -> (Machine, Mm<Hooked>, Log) {
    let mut machine = Machine::flat(pages);
    machine.config = Config {
        memory_is_zeroed: true,
        page_reporting: true,
        page_reporting_order: order,
        ..Config::default()
    };
    let log = Log::default();
    let mut hooked = Hooked::new(machine.host().build().unwrap());
    let all = log.clone();
    hooked.on_report = Some(Box::new(move |blocks| {
        all.0.lock().unwrap().push(blocks.to_vec());
        answer
    }));
    let mm = machine.boot_on(hooked);
    (machine, mm, log)
}

fn take_all(mm: &Mm<Hooked>, order: usize) -> Vec<Pfn> {
    let get = || mm.alloc_pages(GFP_NOWAIT | __GFP_MEMALLOC, order);
    std::iter::from_fn(|| get().ok()).collect()
}

#[test]
fn what_was_not_touched_is_not_reported() {
    let (machine, mm, log) = boot(16 << 8, 5, Ok(Reported::Unknown));
    assert_eq!(mm.page_report(), Ok(0));
    // One page out of a block that was carved for it: the rest of the block was touched by nobody.
    let pfn = mm.alloc_pages(GFP_KERNEL, 0).unwrap();
    mm.drain_all();
    assert_eq!((mm.page_report(), log.take()), (Ok(0), vec![]));
    free(&mm, pfn);
    mm.drain_all();
    // With it, it is one block again, and reported.
    let reported = mm.page_report().unwrap();
    assert_eq!(reported as usize, pages_of(&log.take()).len());
    assert!(reported > 0);
    teardown(&machine, &mm);
}

#[test]
fn never_twice_while_it_stays_free() {
    for order in [3, 5, 9] {
        let (machine, mm, log) = boot(64 << 8, order, Ok(Reported::Unknown));
        let blocks = take_all(&mm, order);
        let all: HashSet<u32> = blocks
            .iter()
            .flat_map(|pfn| pfn.0..pfn.0 + (1 << order))
            .collect();
        // Every other one comes back, so that they do not merge.
        let (some, others): (Vec<_>, Vec<_>) =
            blocks.into_iter().partition(|pfn| pfn.0 >> order & 1 == 0);
        some.iter().for_each(|&pfn| free(&mm, pfn));
        mm.drain_all();
        let n = mm.page_report().unwrap();
        let first = log.take();
        let pages = pages_of(&first);
        assert_eq!(pages.len() as u64, n);
        // Those that were freed, no other, each once.
        let freed: HashSet<u32> = some
            .iter()
            .flat_map(|pfn| pfn.0..pfn.0 + (1 << order))
            .collect();
        assert!(pages.is_subset(&freed));
        assert_eq!(
            pages.len(),
            first.iter().map(|(_, o)| 1 << o).sum::<usize>()
        );
        // All but what the marks keep back.
        assert!(
            pages.len() * 10 >= freed.len() * 9,
            "{} of {}",
            pages.len(),
            freed.len()
        );
        assert_eq!(mm.event(Event::PgReported), n);
        assert!(mm.event(Event::ReportBatch) >= n.div_ceil(32 << MAX_ORDER));
        ledger(&mm);
        // Nothing new.
        assert_eq!((mm.page_report(), log.take()), (Ok(0), vec![]));
        // A part of a reported block is handed out and stays out: the other parts are known.
        let single = first[0].0.add(1);
        mm.alloc_pages_at(single, 0).unwrap();
        mm.drain_all();
        assert_eq!((mm.page_report(), log.take()), (Ok(0), vec![]));
        // It comes back: with it they are a new block.
        free(&mm, single);
        mm.drain_all();
        let again = pages_of(&log_after(&mm, &log));
        assert!(again.contains(&single.0) && again.is_subset(&pages_of(&first)));
        // Merged with blocks that were not reported: new ones.
        others.iter().for_each(|&pfn| free(&mm, pfn));
        mm.drain_all();
        let whole = pages_of(&log_after(&mm, &log));
        assert!(whole.len() > freed.len() && whole.len() * 10 >= all.len() * 9);
        assert_eq!((mm.page_report(), log.take()), (Ok(0), vec![]));
        teardown(&machine, &mm);
    }
}

fn log_after(mm: &Mm<Hooked>, log: &Log) -> Report {
    mm.page_report().unwrap();
    log.take()
}

/// What is with the platform is free, and nobody gets it.
#[test]
fn blocks_with_the_platform_are_nobodys() {
    let mut machine = Machine::flat(16 << 8).cpus(1);
    machine.config = Config {
        memory_is_zeroed: true,
        page_reporting: true,
        page_reporting_order: 5,
        ..Config::default()
    };
    let later: Later<Hooked> = Later::default();
    let hook = later.clone();
    let seen = Arc::new(AtomicU64::new(0));
    let count = seen.clone();
    let mut hooked = Hooked::new(machine.host().build().unwrap());
    hooked.on_report = Some(Box::new(move |blocks| {
        let Some(mm) = hook.get() else {
            return Err(NotReported);
        };
        for &(pfn, order) in blocks {
            assert!(
                matches!(mm.lookup(pfn), (p, o, Memory::Free { .. }) if (p, o) == (pfn, order))
            );
            assert_eq!(mm.alloc_pages_at(pfn, 0), Err(AllocError::Busy));
            assert_eq!(mm.alloc_pages_at(pfn, order), Err(AllocError::Busy));
        }
        let mine = pages_of(blocks);
        // Others find memory meanwhile, and give some back: next to what is here, too.
        let got: Vec<_> = std::iter::from_fn(|| mm.alloc_pages(GFP_ATOMIC, 0).ok())
            .take(200)
            .collect();
        assert!(got.len() > 100, "{}", got.len());
        assert!(got.iter().all(|pfn| !mine.contains(&pfn.0)));
        got.into_iter().for_each(|pfn| free(mm, pfn));
        mm.drain_all();
        // Somebody else who would report: not now.
        assert_eq!(mm.page_report(), Ok(0));
        count.fetch_add(1, Ordering::Relaxed);
        Ok(Reported::Unknown)
    }));
    let mm = machine.boot_on(hooked);
    later.set(&mm);
    let blocks = take_all(&mm, 5);
    blocks.into_iter().for_each(|pfn| free(&mm, pfn));
    mm.drain_all();
    assert!(mm.page_report().unwrap() > 2000);
    assert!(seen.load(Ordering::Relaxed) > 0);
    ledger(&mm);
    later.set_none();
    assert_eq!(mm.event(Event::AllocOnFree), 0);
    mm.drain_all();
    let _ = mm.page_report();
    mm.shrink();
    assert_eq!(users(&ledger(&mm)), 0);
    merged(&machine, &mm);
}

/// The platform says no: the blocks are free as before, and come again.
#[test]
fn what_could_not_be_reported_comes_again() {
    let (machine, mm, log) = boot(16 << 8, 5, Err(NotReported));
    mm.platform().host.set_clock(SECOND);
    take_all(&mm, 5).into_iter().for_each(|pfn| free(&mm, pfn));
    mm.drain_all();
    assert_eq!(mm.page_report(), Err(NotReported));
    assert!(!log.take().is_empty());
    assert_eq!(mm.event(Event::PgReported), 0);
    ledger(&mm);
    // Asked for again by itself, after the delay.
    mm.tick();
    assert_eq!(log.take(), []);
    mm.platform().host.set_clock(4 * SECOND);
    mm.tick();
    assert!(!log.take().is_empty());
    mm.shrink();
    assert_eq!(users(&ledger(&mm)), 0);
    merged(&machine, &mm);
}

/// Two seconds after a block came free, and not for each of them.
#[test]
fn a_delay() {
    let (machine, mm, log) = boot(16 << 8, 5, Ok(Reported::Unknown));
    let at = |ns: u64| {
        mm.platform().host.set_clock(ns);
        mm.tick();
        log.take().len()
    };
    assert_eq!(at(10 * SECOND), 0);
    assert_eq!(at(20 * SECOND), 0, "nothing was freed");
    let blocks = take_all(&mm, 5);
    assert_eq!(at(30 * SECOND), 0);
    blocks.into_iter().for_each(|pfn| free(&mm, pfn));
    mm.drain_all();
    assert_eq!(at(40 * SECOND), 0, "asked for");
    assert_eq!(at(42 * SECOND - 1), 0, "not due");
    assert!(at(42 * SECOND) > 0);
    assert_eq!(at(60 * SECOND), 0, "all is known");
    teardown(&machine, &mm);
}

/// A zone that is nearly full keeps what it has.
#[test]
fn the_marks_are_kept() {
    let (machine, mm, log) = boot(64 << 8, 5, Ok(Reported::Unknown));
    let mut blocks = take_all(&mm, 5);
    let low = zones(&mm)[0].watermarks[1];
    let mut freed = 0;
    // A little more than the low mark, in a zone of 16 MiB: a report would take it all.
    while freed < low + 64 {
        let at = blocks.iter().position(|pfn| pfn.0 < 4096).unwrap();
        free(&mm, blocks.swap_remove(at));
        freed += 32;
    }
    mm.drain_all();
    assert_eq!((mm.page_report(), log.take()), (Ok(0), vec![]));
    blocks.into_iter().for_each(|pfn| free(&mm, pfn));
    mm.drain_all();
    assert!(mm.page_report().unwrap() > 12_000);
    teardown(&machine, &mm);
}

/// Reported memory that reads as zeros need not be zeroed; other memory has to be, whatever was known of it before.
#[test]
fn zeros_from_a_report() {
    for answer in [Reported::Zeroed, Reported::Unknown] {
        for (init_on_free, page_poison) in
            [(false, false), (true, false), (false, true), (true, true)]
        {
            let mut machine = Machine::flat(32 << 8);
            machine.config = Config {
                memory_is_zeroed: true,
                page_reporting: true,
                init_on_free,
                page_poison,
                ..Config::default()
            };
            let reports = Reports::default();
            let host = reports.on(machine.host()).build().unwrap();
            let base = host.direct_map().expose_provenance();
            let mut hooked = Hooked::new(host);
            hooked.on_report = Some(Box::new(move |blocks| {
                let byte = if answer == Reported::Zeroed { 0 } else { 0xdd };
                for &(pfn, order) in blocks {
                    let at = base + pfn.0 as usize * PAGE_SIZE;
                    let at = std::ptr::with_exposed_provenance_mut::<u8>(at);
                    // SAFETY: the blocks are the platform's.
                    unsafe { at.write_bytes(byte, PAGE_SIZE << order) };
                }
                Ok(answer)
            }));
            let mm = machine.boot_on(hooked);
            for pfn in take_all(&mm, 9) {
                fill(page(&mm, pfn), PAGE_SIZE << 9, 0x55);
                free(&mm, pfn);
            }
            mm.drain_all();
            assert!(mm.page_report().unwrap() > 4096);
            let before = mm.event(Event::PgZeroSaved);
            let pfn = mm
                .alloc_pages(GFP_HIGHUSER_MOVABLE | __GFP_ZERO, 9)
                .unwrap();
            assert!(
                bytes(page(&mm, pfn), PAGE_SIZE << 9)
                    .iter()
                    .all(|&b| b == 0)
            );
            let saved = mm.event(Event::PgZeroSaved) - before;
            let zeros = answer == Reported::Zeroed && (init_on_free || !page_poison);
            assert_eq!(
                saved,
                if zeros { 512 } else { 0 },
                "{answer:?} {init_on_free} {page_poison}"
            );
            free(&mm, pfn);
            teardown(&machine, &mm);
            assert_eq!(reports.take(), []);
        }
    }
}

/// Two CPUs at work, and a third that reports all the time: nothing is lost, nothing is reported that somebody has.
#[test]
fn reports_beside_work() {
    let mut machine = Machine::flat(32 << 8).cpus(3);
    machine.config = Config {
        memory_is_zeroed: true,
        page_reporting: true,
        page_reporting_order: 3,
        ..Config::default()
    };
    let host = machine.host().build().unwrap();
    let base = host.direct_map().expose_provenance();
    let mut hooked = Hooked::new(host);
    hooked.on_report = Some(Box::new(move |blocks| {
        for &(pfn, order) in blocks {
            let at = std::ptr::with_exposed_provenance_mut::<u8>(base + pfn.0 as usize * PAGE_SIZE);
            // SAFETY: the blocks are the platform's.
            unsafe { at.write_bytes(0, PAGE_SIZE << order) };
        }
        Ok(Reported::Zeroed)
    }));
    let mm = machine.boot_on(hooked);
    let done = AtomicBool::new(false);
    std::thread::scope(|s| {
        let workers: Vec<_> = (0..2)
            .map(|cpu| {
                let mm = &mm;
                s.spawn(move || {
                    let _cpu = mm.platform().host.claim(cpu).unwrap();
                    let mut rng = Rng(cpu as u64);
                    let mut mine: Vec<(Pfn, usize, u8)> = Vec::new();
                    for round in 0..scaled(4000, 30) {
                        let order = rng.below(7);
                        let zero = rng.one_in(2);
                        let gfp = if zero {
                            GFP_ATOMIC | __GFP_ZERO
                        } else {
                            GFP_ATOMIC
                        };
                        if mine.len() < 150
                            && let Ok(pfn) = mm.alloc_pages(gfp, order)
                        {
                            let held = page(mm, pfn);
                            if zero {
                                assert!(bytes(held, PAGE_SIZE << order).iter().all(|&b| b == 0));
                            }
                            let byte = (round % 200) as u8 + 1;
                            fill(held, PAGE_SIZE << order, byte);
                            mine.push((pfn, order, byte));
                        }
                        if rng.one_in(2) && !mine.is_empty() {
                            let (pfn, order, byte) = mine.swap_remove(rng.below(mine.len()));
                            assert!(
                                bytes(page(mm, pfn), PAGE_SIZE << order)
                                    .iter()
                                    .all(|&b| b == byte)
                            );
                            free(mm, pfn);
                        }
                        if rng.one_in(50) {
                            mm.drain_all();
                        }
                    }
                    mine.into_iter().for_each(|(pfn, _, _)| free(mm, pfn));
                })
            })
            .collect();
        s.spawn(|| {
            let _cpu = mm.platform().host.claim(2).unwrap();
            while !done.load(Ordering::Relaxed) {
                mm.page_report().unwrap();
                std::thread::yield_now();
            }
        });
        for worker in workers {
            worker.join().unwrap();
        }
        done.store(true, Ordering::Relaxed);
    });
    assert!(mm.event(Event::PgReported) > 0);
    let _cpu = mm.platform().host.claim(0).unwrap();
    teardown(&machine, &mm);
}

/// Memory that is not in use is not there: the spike is gone when it was reported, and reads as zeros.
#[test]
#[cfg(not(miri))]
fn resident_memory_falls() {
    let mut machine = Machine::flat(96 << 8);
    machine.config = Config {
        memory_is_zeroed: true,
        page_reporting: true,
        ..Config::default()
    };
    let mm: Mm<Host> = machine.boot();
    mm.platform().set_clock(SECOND);
    let resident = || mm.platform().resident_bytes();
    let mut folios = Vec::new();
    while let Ok(pfn) = mm.alloc_folio(GFP_NOWAIT | __GFP_MEMALLOC, 2, FolioKind::Anon) {
        fill(page(&mm, pfn), PAGE_SIZE << 2, 0x5a);
        folios.push(pfn);
    }
    assert!(resident() > 94 << 20, "{}", resident());
    let kept = folios.split_off(folios.len() - 100);
    folios.into_iter().for_each(|pfn| free(&mm, pfn));
    mm.shrink();
    assert!(resident() > 94 << 20, "{}", resident());
    mm.tick();
    mm.platform().set_clock(4 * SECOND);
    mm.tick();
    let after = resident();
    assert!(after < 12 << 20, "{after}");
    // Those that are in use were not touched.
    for pfn in kept {
        assert!(
            bytes(page(&mm, pfn), PAGE_SIZE << 2)
                .iter()
                .all(|&b| b == 0x5a)
        );
        free(&mm, pfn);
    }
    let pfn = mm.alloc_pages(GFP_HIGHUSER_MOVABLE, 9).unwrap();
    free(&mm, pfn);
    teardown(&machine, &mm);
}

/// A platform that does not come back from a report (a panic that a kernel catches): the blocks are free again, and the next cycle tells of them.
#[test]
fn a_report_that_unwinds_loses_nothing() {
    let (mut machine, log) = (Machine::flat(16 << 8), Log::default());
    machine.config = Config {
        memory_is_zeroed: true,
        page_reporting: true,
        page_reporting_order: 5,
        ..Config::default()
    };
    let mut hooked = Hooked::new(machine.host().build().unwrap());
    let (all, first) = (log.clone(), AtomicBool::new(true));
    hooked.on_report = Some(Box::new(move |blocks| {
        if first.swap(false, Ordering::Relaxed) {
            std::panic::resume_unwind(Box::new("no hypervisor"));
        }
        all.0.lock().unwrap().push(blocks.to_vec());
        Ok(Reported::Unknown)
    }));
    let mm = &machine.boot_on(hooked);
    let had = [9, 5, 5, 10].map(|order| mm.alloc_pages(GFP_KERNEL, order).unwrap());
    had.iter().for_each(|&pfn| free(mm, pfn));
    mm.drain_all();
    let before = ledger(mm);
    let unwound = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| mm.page_report()));
    assert!(unwound.is_err() && log.take().is_empty());
    let after = ledger(mm);
    assert_eq!((after.free, after.pcp), (before.free, before.pcp));
    let pages = mm.page_report().unwrap();
    let told = pages_of(&log.take());
    assert!(pages > 0 && pages == told.len() as u64);
    assert!(had.iter().all(|pfn| told.contains(&pfn.0)));
}
