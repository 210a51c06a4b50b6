//! An interrupt at every labelled point of the allocator, exhaustively: a fixed piece of normal work is run again and again, and in the
//! n-th run an interrupt strikes at the n-th point that is passed. The handler does all that a handler may do. After each run
//! everything is freed, and the ledger must balance.
//!
//! Contents are checked as well: whoever has memory fills it with a byte of his own, and finds it there when he frees it.

mod common;

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::ptr::NonNull;

use common::{fill, range};
use memdesc::rcu::RcuHead;
use memdesc::*;
use memdesc_host::Host;

/// What somebody has.
enum Held {
    Pages(Pfn, usize, u8),
    Object(NonNull<u8>, usize, u8),
}

struct Run {
    mm: *const Mm<Host>,
    /// Points passed so far, outside handlers.
    passed: u64,
    /// Strike at this one; and from then on at every so many, 0 for never again.
    strike: u64,
    again: u64,
    depth: u32,
    strikes: u64,
    /// What handlers have.
    held: Vec<Held>,
    /// What normal code left for handlers to free.
    gifts: Vec<Held>,
    byte: u8,
    /// How often each point was struck.
    labels: BTreeMap<&'static str, u64>,
}

/// Strikes in one run: in a storm that never ends, what waits for an end would wait for ever.
const MOST: u64 = 2000;

thread_local! {
    static RUN: RefCell<Option<Run>> = const { RefCell::new(None) };
    static BUSY: Cell<bool> = const { Cell::new(false) };
}

/// The hook: decides, and if so, handles.
fn point(label: &'static str) {
    // The bookkeeping itself passes no points, but unwinding and foreign threads do.
    if BUSY.get() {
        return;
    }
    BUSY.set(true);
    let strike = RUN.with_borrow_mut(|run| {
        let run = run.as_mut()?;
        run.passed += 1;
        let due = run.passed == run.strike
            || run.again > 0
                && run.passed > run.strike
                && (run.passed - run.strike) % run.again == 0;
        if !due || run.depth >= 2 || run.strikes >= MOST {
            return None;
        }
        run.depth += 1;
        run.strikes += 1;
        *run.labels.entry(label).or_default() += 1;
        Some(run.mm)
    });
    if let Some(mm) = strike {
        // SAFETY: the machine outlives the run.
        let mm = unsafe { &*mm };
        // A handler may be struck itself, as an interrupt is by an NMI.
        BUSY.set(false);
        handler(mm);
        BUSY.set(true);
        RUN.with_borrow_mut(|run| run.as_mut().unwrap().depth -= 1);
    }
    BUSY.set(false);
}

fn with<R>(f: impl FnOnce(&mut Run) -> R) -> R {
    let before = BUSY.replace(true);
    let result = RUN.with_borrow_mut(|run| f(run.as_mut().unwrap()));
    BUSY.set(before);
    result
}

fn own(held: Option<Held>) {
    with(|run| run.held.extend(held));
}

fn next_byte() -> u8 {
    with(|run| {
        run.byte = run.byte.wrapping_add(1).max(1);
        run.byte
    })
}

fn expected(why: AllocError) {
    assert!(
        matches!(
            why,
            AllocError::Empty | AllocError::Contended | AllocError::Forbidden
        ),
        "a request that only tries failed with {why:?}"
    );
}

fn got_pages(mm: &Mm<Host>, order: usize, result: Result<Pfn, AllocError>) -> Option<Held> {
    let pfn = result.map_err(expected).ok()?;
    let byte = next_byte();
    // The first and the last page will do.
    for page in [pfn, pfn.add((1 << order) - 1)] {
        fill(NonNull::new(mm.page_address(page)).unwrap(), 64, byte);
    }
    Some(Held::Pages(pfn, order, byte))
}

fn got_object(size: usize, result: Result<NonNull<u8>, AllocError>) -> Option<Held> {
    let object = result.map_err(expected).ok()?;
    let byte = next_byte();
    fill(object, size.min(256), byte);
    Some(Held::Object(object, size, byte))
}

fn check(mm: &Mm<Host>, held: &Held) {
    match *held {
        Held::Pages(pfn, order, byte) => {
            for page in [pfn, pfn.add((1 << order) - 1)] {
                let at = NonNull::new(mm.page_address(page)).unwrap();
                assert!(
                    common::bytes(at, 64).iter().all(|&b| b == byte),
                    "{pfn:?} was overwritten"
                );
            }
        }
        Held::Object(object, size, byte) => {
            let bytes = common::bytes(object, size.min(256));
            assert!(
                bytes.iter().all(|&b| b == byte),
                "an object of {size} was overwritten"
            );
        }
    }
}

fn free_nolock(mm: &Mm<Host>, held: Held) {
    check(mm, &held);
    // SAFETY: it is ours, and we forget it.
    unsafe {
        match held {
            Held::Pages(pfn, ..) => mm.free_pages_nolock(pfn),
            Held::Object(object, ..) => mm.kfree_nolock(object),
        }
    }
}

fn free_normal(mm: &Mm<Host>, held: Held) {
    check(mm, &held);
    // SAFETY: it is ours, and we forget it.
    unsafe {
        match held {
            Held::Pages(pfn, ..) => mm.free_pages(pfn),
            Held::Object(object, ..) => mm.kfree(object),
        }
    }
}

/// Every call that a handler may make.
fn handler(mm: &Mm<Host>) {
    let _irq = memdesc_host::interrupt::hardirq();
    let fast = gfp::__GFP_FAST_TRY;
    for order in [0, 2, 9] {
        own(got_pages(mm, order, mm.alloc_pages(fast, order)));
    }
    assert_eq!(mm.alloc_pages(fast, 5), Err(AllocError::Forbidden));
    own(got_pages(
        mm,
        0,
        mm.alloc_folio(fast | gfp::__GFP_MOVABLE, 0, FolioKind::Anon),
    ));
    own(got_pages(mm, 0, mm.alloc_page_table(fast, 0)));
    own(got_object(64, mm.kmalloc(64, fast)));
    own(got_object(9000, mm.kmalloc(9000, fast)));
    for order in [0, 1, 4, 10] {
        own(got_pages(
            mm,
            order,
            mm.alloc_pages_nolock(Flags::EMPTY, None, order),
        ));
    }
    for size in [8, 64, 600, 8192, 20_000] {
        own(got_object(size, mm.kmalloc_nolock(size, Flags::EMPTY)));
    }
    free_later(mm, mm.kmalloc_nolock(64, Flags::EMPTY), false);
    free_later(mm, mm.kmalloc_nolock(64, gfp::__GFP_RCU_PREPAID), true);
    let held = with(
        |run| match run.held.iter().find(|h| matches!(h, Held::Pages(..))) {
            Some(Held::Pages(pfn, ..)) => Some(*pfn),
            _ => None,
        },
    );
    drop(held.and_then(|pfn| mm.folio_get(pfn)));
    // Half of it goes back at once, and something that normal code left.
    loop {
        let held = with(|run| {
            run.gifts
                .pop()
                .or_else(|| (run.held.len() > 6).then(|| run.held.swap_remove(run.held.len() / 2)))
        });
        match held {
            Some(held) => free_nolock(mm, held),
            None => break,
        }
    }
}

/// Deferred frees: with the object's own head, or prepaid.
fn free_later(mm: &Mm<Host>, object: Result<NonNull<u8>, AllocError>, prepaid: bool) {
    let Ok(object) = object else { return };
    // SAFETY: just had, and nobody else knows it.
    unsafe {
        if prepaid {
            mm.kfree_rcu_prepaid(object);
        } else {
            object.cast().write(RcuHead::new());
            mm.kvfree_rcu(object, object.cast());
        }
    }
}

fn give(held: Option<Held>) {
    with(|run| run.gifts.extend(held));
}

/// Normal requests may fail for any reason while handlers hold much.
fn normal_pages(mm: &Mm<Host>, order: usize, result: Result<Pfn, AllocError>) -> Option<Held> {
    result.ok().and_then(|pfn| got_pages(mm, order, Ok(pfn)))
}

fn normal_object(size: usize, result: Result<NonNull<u8>, AllocError>) -> Option<Held> {
    result.ok().and_then(|object| got_object(size, Ok(object)))
}

/// The piece of normal work: every way of the per-CPU lists, the zones and the slab.
fn work(mm: &Mm<Host>) {
    let kernel = gfp::GFP_KERNEL;
    let mut mine = Vec::new();
    for order in [0, 0, 1, 3, 5, 9, 10] {
        mine.extend(normal_pages(mm, order, mm.alloc_pages(kernel, order)));
    }
    mine.extend(normal_pages(
        mm,
        0,
        mm.alloc_folio(gfp::GFP_HIGHUSER_MOVABLE, 0, FolioKind::File),
    ));
    mine.extend(normal_pages(
        mm,
        2,
        mm.alloc_folio(gfp::GFP_HIGHUSER_MOVABLE, 2, FolioKind::Anon),
    ));
    mine.extend(normal_pages(mm, 0, mm.alloc_page_table(kernel, 0)));
    if let Ok(pfn) = mm.alloc_folio(gfp::GFP_HIGHUSER_MOVABLE, 1, FolioKind::Anon) {
        drop(mm.folio_get(pfn.add(1)));
        // SAFETY: just had.
        unsafe { mm.free_pages(pfn) };
    }
    for size in [8, 40, 64, 64, 700, 8192, 30_000] {
        mine.extend(normal_object(size, mm.kmalloc(size, kernel)));
    }
    give(normal_pages(mm, 0, mm.alloc_pages(kernel, 0)));
    // Handlers let go of one that is in a list, while another enters and leaves it.
    for _ in 0..2 {
        let listed = mm.alloc_folio(gfp::GFP_HIGHUSER_MOVABLE, 0, FolioKind::File);
        if let Some(folio) = listed.ok().and_then(|pfn| mm.folio_get(pfn)) {
            mm.folio_add_lru(&folio, folio.head());
        }
        give(normal_pages(mm, 0, listed));
    }
    if let Ok(pfn) = mm.alloc_folio(gfp::GFP_HIGHUSER_MOVABLE, 0, FolioKind::File)
        && let Some(folio) = mm.folio_get(pfn)
    {
        mm.folio_add_lru(&folio, pfn);
        // SAFETY: just had; the reference keeps it to the end of the block.
        unsafe { mm.free_pages(pfn) };
    }
    give(normal_pages(mm, 4, mm.alloc_pages(kernel, 4)));
    give(normal_object(64, mm.kmalloc(64, kernel)));
    // Out of the middle, so that nothing merges at once.
    while !mine.is_empty() {
        let held = mine.swap_remove(mine.len() / 2);
        free_normal(mm, held);
    }
    let mut bulk = [Pfn(0); 5];
    let n = mm.alloc_pages_bulk(kernel, &mut bulk);
    // SAFETY: just had.
    unsafe { mm.free_pages_bulk(&bulk[..n]) };
    for i in 0..40 {
        let flags = if i % 2 == 0 {
            kernel
        } else {
            kernel | gfp::__GFP_RCU_PREPAID
        };
        free_later(mm, mm.kmalloc(200, flags), i % 2 == 1);
    }
    if let Ok(object) = mm.kmalloc(100, kernel) {
        // SAFETY: just had.
        unsafe { mm.kvfree_rcu_mightsleep(object) };
    }
    mm.tick();
    mm.drain_all();
    mm.kvfree_rcu_barrier();
    let gifts = with(|run| std::mem::take(&mut run.gifts));
    gifts.into_iter().for_each(|held| free_normal(mm, held));
}

/// A little machine, with its lists warm or cold.
fn machine(rt: bool, floating: bool, warm: bool) -> Mm<Host> {
    let ranges = [range(0, 12_288, 0)];
    let builder = Host::builder().memory(&ranges);
    let host = if floating {
        builder.floating(2)
    } else {
        builder.cpus(1)
    };
    let config = Config {
        memory_is_zeroed: true,
        preempt_rt: rt,
        ..common::base_config()
    };
    let mm = Mm::new(host.build().unwrap(), &config, &ranges).unwrap();
    if warm {
        let pages: Vec<Pfn> = (0..200)
            .map(|_| mm.alloc_pages(gfp::GFP_KERNEL, 0).unwrap())
            .collect();
        // SAFETY: just had.
        pages
            .into_iter()
            .for_each(|pfn| unsafe { mm.free_pages(pfn) });
        let objects: Vec<_> = (0..70)
            .map(|_| mm.kmalloc(64, gfp::GFP_KERNEL).unwrap())
            .collect();
        // SAFETY: just had.
        objects.into_iter().for_each(|o| unsafe { mm.kfree(o) });
    }
    mm
}

/// One run with a strike at the `strike`-th point. Says how many points were passed, and what was struck.
fn run(
    rt: bool,
    floating: bool,
    warm: bool,
    strike: u64,
    again: u64,
) -> (u64, u64, BTreeMap<&'static str, u64>) {
    let mm = machine(rt, floating, warm);
    let guard = (!floating).then(|| mm.platform().claim(0).unwrap());
    RUN.set(Some(Run {
        mm: &raw const mm,
        passed: 0,
        strike,
        again,
        depth: 0,
        strikes: 0,
        held: Vec::new(),
        gifts: Vec::new(),
        byte: 0,
        labels: BTreeMap::new(),
    }));
    work(&mm);
    let done = RUN.take().unwrap();
    done.held
        .into_iter()
        .for_each(|held| free_normal_done(&mm, held));
    mm.shrink();
    let after = common::ledger(&mm);
    assert!(after.balanced, "strike at {strike}: {after:#?}");
    assert_eq!(
        common::users(&after),
        0,
        "strike at {strike}: something was lost"
    );
    drop(guard);
    (done.passed, done.strikes, done.labels)
}

fn free_normal_done(mm: &Mm<Host>, held: Held) {
    check(mm, &held);
    // SAFETY: it is ours, and we forget it.
    unsafe {
        match held {
            Held::Pages(pfn, ..) => mm.free_pages(pfn),
            Held::Object(object, ..) => mm.kfree(object),
        }
    }
}

/// The labels that a run must have met, or the points have gone.
const LABELS: &[&str] = &[
    "local lock: about to be taken",
    "local lock: busy",
    "local lock: about to be dropped",
    "local lock: dropped",
    "local lock: remote announced",
    "lock: taken",
    "lock: about to be dropped",
    "lock: dropped",
    "pcp: about to unlink",
    "pcp: unlinked",
    "pcp: about to link",
    "pcp: linked",
    "zone: about to unlink",
    "zone: about to link",
    "zone: about to merge",
    "zone: about to split",
    "sheaf: popped",
    "sheaf: about to count",
    "slab lists: about to take",
    "slab lists: taken",
    "slab lists: about to give",
    "kvfree: about to record",
    "prepaid: about to stack",
    "prepaid: pending",
    "folio_get: looked up",
    "lru: about to link",
    "lru: about to unlink",
    "deferred pages: about to push",
    "deferred objects: about to push",
];

/// All in one test: the hook is the process's.
#[test]
fn an_interrupt_at_every_point() {
    if !inject::set_hook(Some(point)) {
        eprintln!("this build has no points");
        return;
    }
    let mut labels: BTreeMap<&'static str, u64> = BTreeMap::new();
    let (mut runs, mut strikes) = (0, 0);
    for (rt, floating) in [(false, false), (true, false), (false, true)] {
        for warm in [false, true] {
            let mut strike = 1;
            loop {
                let (passed, struck, met) = run(rt, floating, warm, strike, 0);
                met.into_iter()
                    .for_each(|(l, n)| *labels.entry(l).or_default() += n);
                runs += 1;
                strikes += struck;
                if passed < strike {
                    break;
                }
                strike += 1;
            }
            println!(
                "rt {rt}, floating {floating}, warm {warm}: {strike} points, each struck once"
            );
            // Storms, and strikes within strikes.
            for again in [53, 199, 401, 997] {
                let (_, struck, met) = run(rt, floating, warm, 1, again);
                met.into_iter()
                    .for_each(|(l, n)| *labels.entry(l).or_default() += n);
                runs += 1;
                strikes += struck;
            }
        }
    }
    inject::set_hook(None);
    println!("{runs} runs, {strikes} interrupts: {labels:#?}");
    for label in LABELS {
        assert!(labels.contains_key(label), "no interrupt at {label:?}");
    }
}
