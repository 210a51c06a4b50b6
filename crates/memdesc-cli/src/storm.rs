//! `memdesc storm`: timers interrupt every thread, ten thousand times a second and more, while it allocates and frees; the handlers
//! allocate and free as well, by every call that any context may make. Whatever anyone has is filled with a byte of his own, and must hold it
//! when he frees it; at the end nothing may be lost.

mod piece;
mod timer;

use std::fmt::Write as _;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use memdesc::rcu::RcuHead;
use memdesc::{Config, Event, Flags, FolioKind, Mm, gfp};
use memdesc_host::{Host, ram};
use serde_json::json;

use crate::cli::{StormArgs, StormConfig};
use crate::error::Error;
use crate::rng::Rng;
use crate::{output, progress};
use piece::{Piece, SIZES};
use timer::Timer;

/// Pages of the machine: 128 MiB, so that it is short of memory now and then.
const PAGES: u32 = 32_768;
/// Pieces that change hands between threads and handlers.
const MAILBOX: usize = 64;
/// What a handler keeps.
const POOL: usize = 24;
/// What a thread keeps.
const HELD: usize = 400;

/// What all threads share.
struct Shared {
    mm: Mm<Host>,
    mailbox: Vec<AtomicU64>,
    corruptions: &'static AtomicU32,
    signals: AtomicU64,
    stop: AtomicBool,
}

/// What a handler has: one for each of the two timers of a thread. Its own while it runs: its signal is blocked then.
struct Handler {
    shared: *const Shared,
    rng: Rng,
    pool: [Piece; POOL],
    nmi: bool,
    runs: u64,
}

impl Handler {
    fn new(shared: &Shared, seed: u64, nmi: bool) -> Handler {
        Handler {
            shared,
            rng: Rng(seed),
            pool: [Piece::NONE; POOL],
            nmi,
            runs: 0,
        }
    }

    /// What an interrupt does here: a few requests, a few frees.
    fn run(&mut self) {
        // SAFETY: the machine outlives the timers.
        let shared = unsafe { &*self.shared };
        let mm = &shared.mm;
        let _context = if self.nmi {
            memdesc_host::interrupt::nmi()
        } else {
            memdesc_host::interrupt::hardirq()
        };
        self.runs += 1;
        for _ in 0..3 {
            let slot = self.rng.below(POOL);
            if self.pool[slot].is_none() {
                self.pool[slot] = self.get(mm);
            } else if self.rng.one_in(4) {
                // Another frees it, or we free another's.
                let at = &shared.mailbox[self.rng.below(MAILBOX)];
                self.pool[slot] = Piece::from(at.swap(self.pool[slot].into(), Ordering::AcqRel));
            } else {
                let piece = std::mem::replace(&mut self.pool[slot], Piece::NONE);
                self.put(shared, piece);
            }
        }
    }

    fn get(&mut self, mm: &Mm<Host>) -> Piece {
        let byte = self.rng.byte();
        let fast = gfp::__GFP_FAST_TRY;
        let order = [0, 0, 0, 1, 2, 3, 4, 6, 9][self.rng.below(9)];
        let class = self.rng.below(SIZES.len());
        let prepaid = if self.rng.one_in(2) {
            gfp::__GFP_RCU_PREPAID
        } else {
            Flags::EMPTY
        };
        match self.rng.below(6) {
            0 => Piece::pages(mm, mm.alloc_pages(fast, 0), 0, byte),
            1 => Piece::pages(
                mm,
                mm.alloc_folio(fast | gfp::__GFP_MOVABLE, 0, FolioKind::Anon),
                0,
                byte,
            ),
            2 => Piece::object(mm.kmalloc(SIZES[class], fast), class, byte),
            3 => Piece::pages(
                mm,
                mm.alloc_pages_nolock(Flags::EMPTY, None, order),
                order,
                byte,
            ),
            _ => Piece::object(mm.kmalloc_nolock(SIZES[class], prepaid), class, byte),
        }
    }

    fn put(&mut self, shared: &Shared, piece: Piece) {
        let mm = &shared.mm;
        if !piece.check(mm) {
            shared.corruptions.fetch_add(1, Ordering::Relaxed);
            return;
        }
        // SAFETY: ours, and forgotten.
        unsafe {
            match piece.object_ptr() {
                Some(object) if self.rng.one_in(3) => free_later(mm, object, piece),
                Some(object) => mm.kfree_nolock(object),
                None => mm.free_pages_nolock(piece.pfn()),
            }
        }
    }
}

/// Deferred: prepaid if it is, else with a head in it.
///
/// # Safety
///
/// The object is the caller's, who forgets it.
unsafe fn free_later(mm: &Mm<Host>, object: NonNull<u8>, piece: Piece) {
    // SAFETY: the caller's promise; every size but the least holds a head.
    unsafe {
        if mm.is_prepaid(object) {
            mm.kfree_rcu_prepaid(object);
        } else if piece.size() >= size_of::<RcuHead>() {
            object.cast().write(RcuHead::new());
            mm.kvfree_rcu(object, object.cast());
        } else {
            mm.kfree_nolock(object);
        }
    }
}

/// A thread's normal work, until told to stop.
fn work(shared: &Shared, seed: u64, ops: &AtomicU64) {
    let mm = &shared.mm;
    let mut rng = Rng(seed);
    let mut held: Vec<Piece> = Vec::with_capacity(HELD);
    let mut done = 0u64;
    let kernel = gfp::GFP_KERNEL | gfp::__GFP_NORETRY;
    while !shared.stop.load(Ordering::Relaxed) {
        done += 1;
        if held.len() < HELD && rng.one_in(2) {
            let byte = rng.byte();
            let order = [0, 0, 0, 0, 1, 2, 3, 5, 9, 10][rng.below(10)];
            let class = rng.below(SIZES.len());
            let piece = match rng.below(8) {
                0 | 1 => Piece::pages(mm, mm.alloc_pages(kernel, order), order, byte),
                2 => Piece::pages(
                    mm,
                    mm.alloc_folio(kernel | gfp::__GFP_MOVABLE, order, FolioKind::File),
                    order,
                    byte,
                ),
                3 => Piece::pages(mm, mm.alloc_page_table(kernel, 0), 0, byte),
                4 => Piece::object(
                    mm.kmalloc(SIZES[class], kernel | gfp::__GFP_RCU_PREPAID),
                    class,
                    byte,
                ),
                _ => Piece::object(mm.kmalloc(SIZES[class], kernel), class, byte),
            };
            if !piece.is_none() {
                held.push(piece);
            }
        } else if !held.is_empty() {
            let mut piece = held.swap_remove(rng.below(held.len()));
            if rng.one_in(8) {
                let at = &shared.mailbox[rng.below(MAILBOX)];
                piece = Piece::from(at.swap(piece.into(), Ordering::AcqRel));
            }
            put_normal(shared, &mut rng, piece);
        }
        match done % 65_536 {
            0 => drop(mm.shrink()),
            n if n % 8192 == 0 => mm.tick(),
            n if n % 1024 == 0 => {
                let _read = mm.rcu_read_lock();
                drop(mm.folio_get(memdesc::Pfn(rng.below(PAGES as usize) as u32)));
            }
            _ => {}
        }
    }
    for piece in held {
        put_normal(shared, &mut rng, piece);
    }
    ops.fetch_add(done, Ordering::Relaxed);
}

fn put_normal(shared: &Shared, rng: &mut Rng, piece: Piece) {
    let mm = &shared.mm;
    if piece.is_none() {
        return;
    }
    if !piece.check(mm) {
        shared.corruptions.fetch_add(1, Ordering::Relaxed);
        return;
    }
    // SAFETY: ours, and forgotten.
    unsafe {
        match piece.object_ptr() {
            Some(object) => match rng.below(8) {
                0 | 1 => free_later(mm, object, piece),
                2 => mm.kvfree_rcu_mightsleep(object),
                3 => mm.kfree_nolock(object),
                _ => mm.kfree(object),
            },
            None if rng.one_in(8) => mm.free_pages_nolock(piece.pfn()),
            None => mm.free_pages(piece.pfn()),
        }
    }
}

/// The machine of a configuration: how many threads on how many CPUs.
fn machine(config: StormConfig, threads: usize) -> Result<(Mm<Host>, &'static AtomicU32), Error> {
    let corruptions: &'static AtomicU32 = Box::leak(Box::new(AtomicU32::new(0)));
    let ranges = [ram(0, PAGES)];
    let builder = Host::builder().memory(&ranges).on_corruption(|report| {
        // In a handler, perhaps: count, and let the sum speak.
        corruptions.fetch_add(1, Ordering::Relaxed);
        let _ = report;
    });
    let builder = match config {
        StormConfig::Smp | StormConfig::Up => builder.cpus(threads),
        // Fewer CPUs than threads: holders of sleeping locks lose theirs to others.
        StormConfig::Rt => builder.floating(threads.div_ceil(2).max(2)),
    };
    let host = builder.build().map_err(Error::Host)?;
    let config = Config {
        memory_is_zeroed: true,
        preempt_rt: config == StormConfig::Rt,
        kvfree_drain_ns: 10_000_000,
        ..Config::default()
    };
    let mm = Mm::new(host, &config, &ranges).map_err(Error::Init)?;
    Ok((mm, corruptions))
}

/// How it went.
struct Outcome {
    config: StormConfig,
    threads: usize,
    elapsed: Duration,
    ops: u64,
    signals: u64,
    corruptions: u32,
    balanced: bool,
    /// Pages that did not come back.
    lost: u64,
    events: Vec<(Event, u64)>,
}

impl Outcome {
    fn ok(&self) -> bool {
        self.corruptions == 0 && self.balanced && self.lost == 0 && self.signals > 0
    }

    fn event(&self, event: Event) -> u64 {
        let found = self.events.iter().find(|(e, _)| *e == event);
        found.map_or(0, |(_, n)| *n)
    }

    fn per_thread(&self) -> f64 {
        self.signals as f64 / self.elapsed.as_secs_f64() / self.threads as f64
    }
}

fn storm(config: StormConfig, args: &StormArgs) -> Result<Outcome, Error> {
    let threads = match config {
        StormConfig::Up => 1,
        StormConfig::Smp => 2,
        StormConfig::Rt => 3,
    };
    let (mm, corruptions) = machine(config, threads)?;
    let shared = &Shared {
        mm,
        mailbox: (0..MAILBOX).map(|_| AtomicU64::new(0)).collect(),
        corruptions,
        signals: AtomicU64::new(0),
        stop: AtomicBool::new(false),
    };
    let ops = &AtomicU64::new(0);
    let start = Instant::now();
    std::thread::scope(|scope| -> Result<(), Error> {
        let mut workers = Vec::new();
        for thread in 0..threads {
            workers.push(scope.spawn(move || -> Result<(), Error> {
                let claim = shared.mm.platform().claim(thread);
                debug_assert!(claim.is_some() || config == StormConfig::Rt);
                // The thread's own slot, before handlers come.
                drop(shared.mm.rcu_read_lock());
                let seed = args.run.seed + thread as u64 * 3;
                let irq = Timer::start(args.hz, 0, Handler::new(shared, seed + 1, false))?;
                // A third as often, on top of the other and of everything.
                let nmi = Timer::start(args.hz / 3, 1, Handler::new(shared, seed + 2, true))?;
                work(shared, seed, ops);
                for handler in [irq.stop(), nmi.stop()] {
                    shared.signals.fetch_add(handler.runs, Ordering::Relaxed);
                    let mut rng = Rng(seed);
                    for piece in handler.pool {
                        put_normal(shared, &mut rng, piece);
                    }
                }
                Ok(())
            }));
        }
        let bar = progress::seconds(args.run.quiet, args.seconds, config.name());
        while start.elapsed() < Duration::from_secs(args.seconds)
            && corruptions.load(Ordering::Relaxed) == 0
        {
            std::thread::sleep(Duration::from_millis(50));
            bar.set_position(start.elapsed().as_secs());
        }
        bar.finish_and_clear();
        shared.stop.store(true, Ordering::Relaxed);
        for worker in workers {
            match worker.join() {
                Ok(result) => result?,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        Ok(())
    })?;
    let elapsed = start.elapsed();
    let mut rng = Rng(args.run.seed);
    for at in &shared.mailbox {
        put_normal(shared, &mut rng, Piece::from(at.load(Ordering::Relaxed)));
    }
    shared.mm.shrink();
    let ledger = shared.mm.ledger();
    Ok(Outcome {
        config,
        threads,
        elapsed,
        ops: ops.load(Ordering::Relaxed),
        signals: shared.signals.load(Ordering::Relaxed),
        corruptions: corruptions.load(Ordering::Relaxed),
        balanced: ledger.balanced,
        lost: ledger.by_type.iter().sum(),
        events: Event::ALL
            .iter()
            .map(|&event| (event, shared.mm.event(event)))
            .collect(),
    })
}

/// What is asked of handlers, and the reasons why it may not be had.
const ROWS: [(&str, [Event; 4]); 4] = [
    (
        "fast try: pages",
        [
            Event::FastPages,
            Event::FastPagesEmpty,
            Event::FastPagesContended,
            Event::FastPagesForbidden,
        ],
    ),
    (
        "fast try: objects",
        [
            Event::FastObjects,
            Event::FastObjectsEmpty,
            Event::FastObjectsContended,
            Event::FastObjectsForbidden,
        ],
    ),
    (
        "nolock: pages",
        [
            Event::TryPages,
            Event::TryPagesEmpty,
            Event::TryPagesContended,
            Event::TryPagesForbidden,
        ],
    ),
    (
        "nolock: objects",
        [
            Event::TryObjects,
            Event::TryObjectsEmpty,
            Event::TryObjectsContended,
            Event::TryObjectsForbidden,
        ],
    ),
];

fn report(outcome: &Outcome) -> String {
    let mut text = String::new();
    let mut line = |s: String| {
        let _ = writeln!(text, "{s}");
    };
    line(format!(
        "{}: {} threads, {:.0} s, {} normal calls, {} interrupts, {:.1} kHz a thread",
        outcome.config.name(),
        outcome.threads,
        outcome.elapsed.as_secs_f64(),
        outcome.ops,
        outcome.signals,
        outcome.per_thread() / 1000.0,
    ));
    line(format!(
        "  {:<18}{:>12}{:>12}{:>12}{:>12}{:>11}",
        "tried", "got", "empty", "contended", "forbidden", "failed"
    ));
    for (name, events) in ROWS {
        let n = events.map(|event| outcome.event(event));
        let failed = (n[1] + n[2] + n[3]) as f64 * 100.0 / n.iter().sum::<u64>().max(1) as f64;
        line(format!(
            "  {name:<18}{:>12}{:>12}{:>12}{:>12}{failed:>10.3}%",
            n[0], n[1], n[2], n[3]
        ));
    }
    let freed = |direct, deferred| {
        let (direct, deferred) = (outcome.event(direct), outcome.event(deferred));
        let percent = deferred as f64 * 100.0 / (direct + deferred).max(1) as f64;
        (direct, deferred, percent)
    };
    line(format!(
        "  {:<18}{:>12}{:>12}{:>12}",
        "freed", "at once", "deferred", "share"
    ));
    for (name, direct, deferred) in [
        ("pages", Event::NolockFree, Event::NolockFreeDeferred),
        ("objects", Event::NolockKfree, Event::NolockKfreeDeferred),
    ] {
        let (direct, deferred, percent) = freed(direct, deferred);
        line(format!(
            "  {name:<18}{direct:>12}{deferred:>12}{percent:>11.3}%"
        ));
    }
    line(format!(
        "  {} corruptions, ledger {}, {} pages lost",
        outcome.corruptions,
        if outcome.balanced {
            "balanced"
        } else {
            "NOT balanced"
        },
        outcome.lost
    ));
    text
}

fn object(outcome: &Outcome) -> serde_json::Value {
    let events: serde_json::Map<_, _> = outcome
        .events
        .iter()
        .map(|(event, n)| (event.name().to_owned(), json!(n)))
        .collect();
    json!({
        "config": outcome.config.name(),
        "threads": outcome.threads,
        "seconds": outcome.elapsed.as_secs_f64(),
        "normal_calls": outcome.ops,
        "interrupts": outcome.signals,
        "interrupts_per_thread_and_second": outcome.per_thread(),
        "corruptions": outcome.corruptions,
        "balanced": outcome.balanced,
        "lost_pages": outcome.lost,
        "events": events,
    })
}

/// Runs the command; says how it ended.
pub(crate) fn run(args: &StormArgs) -> Result<u8, Error> {
    let configs: &[StormConfig] = match &args.config {
        Some(config) => std::slice::from_ref(config),
        None => &[StormConfig::Smp, StormConfig::Up, StormConfig::Rt],
    };
    let mut ok = true;
    let mut all = Vec::new();
    for &config in configs {
        let outcome = storm(config, args)?;
        ok &= outcome.ok();
        if args.run.json {
            all.push(object(&outcome));
        } else {
            output::print(&report(&outcome));
        }
    }
    if args.run.json {
        output::print(&format!("{:#}\n", serde_json::Value::Array(all)));
    }
    Ok(if ok { 0 } else { crate::FAILED })
}
