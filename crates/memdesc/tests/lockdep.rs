//! The context checker: each complaint made once, naming both sides; and none about what is right.
#![cfg(feature = "lockdep")]

mod common;

use std::sync::{Arc, Mutex};

use common::range;
use memdesc::lockdep::{Acquire, Env, LockClass, Lockdep, Problem, Report, Task, WaitType};
use memdesc::rcu::RcuHead;
use memdesc::*;
use memdesc_host::{Host, interrupt};
use proptest::prelude::*;

static RAW: LockClass = LockClass {
    name: "some_lock",
    wait: WaitType::Raw,
};
static SPIN: LockClass = LockClass {
    name: "a spinlock_t",
    wait: WaitType::Config,
};
static OTHER: LockClass = LockClass {
    name: "another spinlock_t",
    wait: WaitType::Config,
};
static THIRD: LockClass = LockClass {
    name: "a third",
    wait: WaitType::Config,
};
static MUTEX: LockClass = LockClass {
    name: "a mutex",
    wait: WaitType::Sleep,
};

type Log = Arc<Mutex<Vec<(Problem, String)>>>;

fn machine(rt: bool) -> (Mm<Host>, Log) {
    let log = Log::default();
    let seen = log.clone();
    let ranges = [range(0, 8192, 0)];
    let host = Host::builder()
        .memory(&ranges)
        .floating(2)
        .on_lockdep(move |report| {
            seen.lock()
                .unwrap()
                .push((report.problem, report.to_string()));
        })
        .build()
        .unwrap();
    let config = Config {
        memory_is_zeroed: true,
        preempt_rt: rt,
        ..common::base_config()
    };
    (Mm::new(host, &config, &ranges).unwrap(), log)
}

/// A lock of the kernel's own, as the checker sees it.
struct Held<'a> {
    mm: &'a Mm<Host>,
    class: &'static LockClass,
    _atomic: Option<interrupt::Atomic>,
}

#[track_caller]
fn hold<'a>(mm: &'a Mm<Host>, class: &'static LockClass) -> Held<'a> {
    let at = std::panic::Location::caller();
    let env = Env {
        context: mm.platform().context(),
        irqs_on: true,
    };
    let mut report = None;
    mm.platform().with_lockdep(&mut |lockdep, task| {
        report = lockdep.acquire(env, task, class, Acquire::Lock, at);
    });
    if let Some(report) = report {
        mm.platform().lockdep_report(&report);
    }
    let atomic = (class.wait == WaitType::Raw).then(interrupt::atomic);
    Held {
        mm,
        class,
        _atomic: atomic,
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.mm
            .platform()
            .with_lockdep(&mut |lockdep, task| lockdep.release(task, self.class));
    }
}

#[track_caller]
fn one(log: &Log, problem: Problem, names: &[&str]) {
    let log = std::mem::take(&mut *log.lock().unwrap());
    let said = log.iter().find(|(p, _)| *p == problem);
    let Some((_, text)) = said else {
        panic!("nothing was said of {problem:?}: {log:?}")
    };
    println!("{text}\n");
    for name in names {
        assert!(text.contains(name), "{name:?} is not in {text:?}");
    }
}

/// What is right, on both kinds of kernel: every way of the allocator, by ordinary calls where they may be made, and by those for any
/// context elsewhere.
#[test]
fn nothing_is_said_of_what_is_right() {
    for rt in [false, true] {
        let (mm, log) = machine(rt);
        let cache = mm
            .kmem_cache_create("cache", 100, 8, CacheFlags::EMPTY, None)
            .unwrap();
        for round in 0..200 {
            let pages: Vec<_> = [0, 1, 3, 9]
                .map(|o| mm.alloc_pages(gfp::GFP_KERNEL, o))
                .into();
            let folio = mm
                .alloc_folio(gfp::GFP_HIGHUSER_MOVABLE, 0, FolioKind::Anon)
                .unwrap();
            drop(mm.folio_get(folio));
            let object = mm.kmem_cache_alloc(&cache, gfp::GFP_KERNEL).unwrap();
            {
                let _irq = interrupt::hardirq();
                let got = mm.kmalloc_nolock(64, Flags::EMPTY);
                got.into_iter().for_each(|o| {
                    // SAFETY: just had.
                    unsafe { mm.kfree_nolock(o) }
                });
            }
            {
                // Seed 001: a raw lock is held, and kfree_rcu wants a page for its pointers.
                let _held = hold(&mm, &RAW);
                for _ in 0..40 {
                    let Ok(object) = mm.kmalloc_nolock(64, Flags::EMPTY) else {
                        continue;
                    };
                    // SAFETY: just had; it holds a head.
                    unsafe {
                        object.cast().write(RcuHead::new());
                        mm.kvfree_rcu(object, object.cast());
                    }
                }
                let _page = mm.alloc_pages(gfp::__GFP_FAST_TRY, 0).map(|pfn| {
                    // SAFETY: just had.
                    unsafe { mm.free_pages_nolock(pfn) }
                });
            }
            common::cache_free(&mm, &cache, object);
            common::free(&mm, folio);
            pages
                .into_iter()
                .flatten()
                .for_each(|pfn| common::free(&mm, pfn));
            if round % 50 == 0 {
                mm.tick();
                mm.shrink();
            }
        }
        mm.kmem_cache_destroy(cache).unwrap();
        assert!(
            log.lock().unwrap().is_empty(),
            "rt {rt}: {:?}",
            log.lock().unwrap()
        );
    }
}

/// The complaint that seed 001 begins with: `raw_spin_lock(&some_lock); kmalloc(...)`. Made whether the sheaf is empty or not, on a kernel
/// that is not real-time as well.
#[test]
fn invalid_wait_context() {
    let (mm, log) = machine(false);
    common::kfree(&mm, mm.kmalloc(64, gfp::GFP_KERNEL).unwrap());
    let held = hold(&mm, &RAW);
    let object = mm.kmalloc(64, gfp::GFP_ATOMIC).unwrap();
    one(
        &log,
        Problem::InvalidWaitContext,
        &[
            "Invalid wait context",
            "cache->lists (Config)",
            "some_lock (Raw)",
            "lockdep.rs",
        ],
    );
    // Once is enough.
    let another = mm.kmalloc(64, gfp::GFP_ATOMIC).unwrap();
    assert!(log.lock().unwrap().is_empty());
    common::free(&mm, mm.alloc_pages(gfp::GFP_ATOMIC, 0).unwrap());
    one(
        &log,
        Problem::InvalidWaitContext,
        &["zone->lock", "some_lock"],
    );
    drop(held);
    common::kfree(&mm, object);
    common::kfree(&mm, another);
}

#[test]
fn a_sleeping_allocation_in_atomic_context() {
    let (mm, log) = machine(false);
    let held = hold(&mm, &RAW);
    let object = mm.kmalloc(64, gfp::GFP_KERNEL).unwrap();
    one(
        &log,
        Problem::SleepInAtomic,
        &["sleeping function", "an allocation", "some_lock"],
    );
    drop(held);
    let off = interrupt::off();
    let pfn = mm.alloc_pages(gfp::GFP_KERNEL, 0).unwrap();
    one(
        &log,
        Problem::SleepInAtomic,
        &["sleeping function", "pages", "Atomic"],
    );
    drop(off);
    common::kfree(&mm, object);
    common::free(&mm, pfn);
    // A mutex is no reason not to sleep.
    let held = hold(&mm, &MUTEX);
    common::kfree(&mm, mm.kmalloc(64, gfp::GFP_KERNEL).unwrap());
    drop(held);
    let said = log.lock().unwrap();
    assert!(said.is_empty(), "{said:?}");
}

#[test]
fn order_inverted() {
    let (mm, log) = machine(false);
    let chain = |classes: &[&'static LockClass]| {
        let mut held: Vec<_> = classes.iter().map(|class| hold(&mm, class)).collect();
        while held.pop().is_some() {}
    };
    chain(&[&SPIN, &OTHER]);
    chain(&[&OTHER, &THIRD]);
    assert!(log.lock().unwrap().is_empty());
    // Over two steps.
    chain(&[&THIRD, &SPIN]);
    one(
        &log,
        Problem::OrderInverted,
        &[
            "circular",
            "a third",
            "a spinlock_t",
            "another spinlock_t",
            "known order: a spinlock_t -> another spinlock_t -> a third",
        ],
    );
    chain(&[&SPIN, &SPIN]);
    one(&log, Problem::Recursive, &["recursive", "a spinlock_t"]);
}

/// An ordinary call from a signal handler: the per-CPU lists are held with interrupts on elsewhere.
#[test]
fn taken_in_an_interrupt_and_held_with_interrupts_on() {
    let (mm, log) = machine(false);
    let object = mm.kmalloc(64, gfp::GFP_KERNEL).unwrap();
    let irq = interrupt::hardirq();
    // SAFETY: ours.
    unsafe { mm.kfree(object) };
    drop(irq);
    one(
        &log,
        Problem::IrqUnsafe,
        &["inconsistent", "the other way", "HardIrq"],
    );
}

/// With interrupts off elsewhere it would be right; under RT it is wrong whatever is off, since the locks sleep.
#[test]
fn ordinary_calls_in_an_interrupt() {
    for rt in [false, true] {
        let (mm, log) = machine(rt);
        // On a real-time kernel it would be wrong with interrupts off already.
        let off = (!rt).then(interrupt::off);
        let object = mm.kmalloc(64, gfp::GFP_ATOMIC).unwrap();
        drop(off);
        assert!(log.lock().unwrap().is_empty());
        let irq = interrupt::hardirq();
        // SAFETY: ours.
        unsafe { mm.kfree(object) };
        drop(irq);
        if rt {
            one(
                &log,
                Problem::InvalidWaitContext,
                &["cache->lists", "HardIrq"],
            );
        } else {
            let said = log.lock().unwrap();
            assert!(said.is_empty(), "{said:?}");
        }
    }
}

#[test]
fn in_an_nmi_one_may_only_try() {
    let (mm, log) = machine(false);
    let nmi = interrupt::nmi();
    let object = mm.kmalloc_nolock(64, Flags::EMPTY);
    assert!(log.lock().unwrap().is_empty());
    drop(hold(&mm, &RAW));
    drop(nmi);
    one(&log, Problem::InvalidWaitContext, &["some_lock", "Nmi"]);
    object.into_iter().for_each(|o| common::kfree(&mm, o));
}

/// Releases out of order, more locks than there is room for, a checker full of classes.
#[test]
fn odd_uses() {
    let lockdep = Lockdep::new();
    let task = Task::new();
    let at = std::panic::Location::caller();
    let env = Env {
        context: Context::Task,
        irqs_on: true,
    };
    let classes: Vec<&'static LockClass> = (0..40)
        .map(|_| {
            &*Box::leak(Box::new(LockClass {
                name: "leaked",
                wait: WaitType::Config,
            }))
        })
        .collect();
    let take = |class| lockdep.acquire(env, &task, class, Acquire::Lock, at);
    for class in &classes[..20] {
        assert!(take(class).is_none());
    }
    assert_eq!(lockdep.unchecked(), 4, "16 places");
    for class in &classes[..20] {
        lockdep.release(&task, class);
    }
    for class in &classes {
        assert!(take(class).is_none());
        lockdep.release(&task, class);
    }
    assert_eq!(lockdep.unchecked(), 4 + 8, "32 classes");
    // Nothing is held: whatever comes now is the first.
    assert!(lockdep.might_sleep(env, &task, "a test", at).is_none());
}

/// A plain model of the graph: an edge for each lock waited for under another; a path back is an inversion.
#[derive(Default)]
struct Model {
    under: [[bool; 6]; 6],
    held: Vec<usize>,
}

impl Model {
    fn path(&self, from: usize, to: usize, seen: &mut [bool; 6]) -> bool {
        seen[from] = true;
        from == to
            || (0..6).any(|next| self.under[from][next] && !seen[next] && self.path(next, to, seen))
    }

    /// Is there anything wrong with taking it?
    fn acquire(&mut self, class: usize) -> bool {
        let mut wrong = false;
        for held in self.held.clone() {
            if held == class || self.path(class, held, &mut [false; 6]) {
                wrong = true;
            } else {
                self.under[held][class] = true;
            }
        }
        self.held.push(class);
        wrong
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(common::scaled(2000, 20) as u32))]
    #[test]
    fn agrees_with_a_plain_model(ops in prop::collection::vec((0usize..6, any::<bool>()), 1..60)) {
        let classes: [&'static LockClass; 6] = std::array::from_fn(|_| {
            &*Box::leak(Box::new(LockClass { name: "model", wait: WaitType::Config }))
        });
        let (lockdep, task) = (Lockdep::new(), Task::new());
        let mut model = Model::default();
        let env = Env { context: Context::Task, irqs_on: true };
        let at = std::panic::Location::caller();
        let mut reported = std::collections::HashSet::new();
        for (class, release) in ops {
            if release && !model.held.is_empty() {
                let gone = model.held.remove(class % model.held.len());
                lockdep.release(&task, classes[gone]);
            } else if model.held.len() < 12 {
                let before = model.held.clone();
                let wrong = model.acquire(class);
                let report: Option<Report> = lockdep.acquire(env, &task, classes[class], Acquire::Lock, at);
                if report.is_some() {
                    prop_assert!(wrong, "reported without reason");
                }
                // Each pair is reported once; one that was not reported before must be now.
                let fresh = before.iter().any(|held| !reported.contains(&(class, *held)));
                if wrong && report.is_none() {
                    prop_assert!(!fresh || !reported.is_empty());
                }
                reported.extend(before.iter().map(|held| (class, *held)));
            }
        }
    }
}
