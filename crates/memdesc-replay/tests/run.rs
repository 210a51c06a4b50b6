//! Plans on several CPUs: whatever the events are, each call is made once, after those that it needs, and everything comes back.

use std::sync::Barrier;
use std::sync::atomic::{AtomicU64, Ordering};

use memdesc::gfp::{Flags, GFP_HIGHUSER_MOVABLE, GFP_KERNEL};
use memdesc::{Config, MemRange, Mm, PageType, PhysAddr};
use memdesc_host::Host;
use memdesc_replay::handles::{Handles, Purpose};
use memdesc_replay::{Done, Left, Options, Plan, Run};
use memdesc_trace::{Cache, CacheId, CacheTable, Event, EventKind, Recording};
use proptest::prelude::*;

/// A machine of so much memory.
fn machine(mib: u64, cpus: usize) -> Mm<Host> {
    let ranges = [MemRange {
        start: PhysAddr(0),
        end: PhysAddr(mib << 20),
        node: 0,
    }];
    let host = Host::builder()
        .memory(&ranges)
        .cpus(cpus)
        .on_corruption(|report| panic!("{report}"))
        .build()
        .unwrap();
    let config = Config {
        memory_is_zeroed: true,
        ..Config::default()
    };
    Mm::new(host, &config, &ranges).unwrap()
}

/// Makes all calls, each CPU a thread; what the calls were, and what was left.
fn make(mm: &Mm<Host>, plan: &Plan, table: &CacheTable, cpus: usize) -> (Done, Left) {
    // SAFETY: there is one machine, and the plan frees each object with its own cache.
    let handles = unsafe { Handles::new(mm) };
    let run = Run::new(handles, plan, table).unwrap();
    let start = Barrier::new(cpus);
    let mut all = Done::default();
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..cpus)
            .map(|cpu| {
                let (run, start) = (&run, &start);
                scope.spawn(move || {
                    let guard = mm.platform().claim(cpu).unwrap();
                    guard.switch();
                    start.wait();
                    let wait = |is_so: &dyn Fn() -> bool| {
                        while !is_so() {
                            std::thread::yield_now();
                        }
                    };
                    run.cpu(cpu, wait, || {})
                })
            })
            .collect();
        for thread in threads {
            all.add(&thread.join().unwrap());
        }
    });
    let ledger = mm.ledger();
    assert!(ledger.balanced);
    for (purpose, kind) in [
        (Purpose::Anon, PageType::Anon),
        (Purpose::File, PageType::File),
        (Purpose::PageTable, PageType::PageTable),
    ] {
        let most = all.pages_by_purpose[purpose as usize];
        assert!(ledger.by_type[kind as usize] <= most, "{kind:?}");
    }
    let live: u64 = [
        PageType::Anon,
        PageType::File,
        PageType::PageTable,
        PageType::Bare,
    ]
    .iter()
    .map(|&kind| ledger.by_type[kind as usize])
    .sum();
    if all.pages_failed == 0 {
        assert_eq!(live, all.allocated_pages() - all.freed_pages);
    }
    (all, run.end())
}

/// What was done is what was planned, and nothing is left of it.
fn check(mm: &Mm<Host>, plan: &Plan, done: &Done, left: &Left) {
    assert_eq!(
        (done.pages_failed, done.objects_failed),
        (0, 0),
        "{:?}",
        done.first_failure
    );
    assert_eq!(done.calls, plan.calls() as u64);
    assert_eq!(done.by_purpose, plan.pages.by_purpose);
    assert_eq!(done.by_order, plan.pages.by_order);
    assert_eq!(done.allocated_pages(), plan.pages.allocated_pages);
    assert_eq!(done.freed, plan.pages.freed);
    assert_eq!(done.freed_pages, plan.pages.freed_pages);
    assert_eq!(done.objects(), plan.objects.allocated);
    assert_eq!(done.objects_freed, plan.objects.freed);
    assert_eq!(
        (left.blocks, left.objects),
        (plan.pages.live, plan.objects.live)
    );
    assert_eq!(left.stuck, []);
    assert_gone(mm);
}

fn assert_gone(mm: &Mm<Host>) {
    mm.shrink();
    mm.shrink();
    let ledger = mm.ledger();
    assert!(ledger.balanced);
    let taken: u64 = ledger.by_type.iter().sum();
    let kept = ledger.by_type[PageType::Reserved as usize];
    assert_eq!(taken - kept, 0, "{:?}", ledger.by_type);
    assert_eq!(mm.event(memdesc::Event::AllocOnFree), 0);
}

const PAGES: u32 = 2048;
const BASE: u64 = 0xffff_8880_0000_0000;

fn table() -> CacheTable {
    let mut table = CacheTable::default();
    for (name, size) in [("small", 24), ("filp", 184), ("large", 1500)] {
        table.add(Cache {
            name: name.into(),
            bytes_req: size,
            bytes_alloc: size.next_multiple_of(8),
        });
    }
    table
}

/// Few pages and addresses, so that most events meet others: parts of blocks, frees of what nobody has, pages handed out twice.
fn kind() -> impl Strategy<Value = EventKind> {
    let block = || (0..64u32, 0..4u8).prop_map(|(n, order)| (n << order, order));
    let gfp = || {
        prop_oneof![
            Just(GFP_KERNEL),
            Just(GFP_HIGHUSER_MOVABLE),
            Just(GFP_KERNEL | memdesc::gfp::__GFP_ZERO | memdesc::gfp::__GFP_COMP),
            Just(GFP_HIGHUSER_MOVABLE | memdesc::gfp::__GFP_WRITE),
        ]
    };
    let ptr = || {
        prop_oneof![
            9 => (0..600u64).prop_map(|n| BASE + n * 1024),
            1 => Just(0),
        ]
    };
    prop_oneof![
        3 => (block(), gfp()).prop_map(|((pfn, order), gfp): ((u32, u8), Flags)| EventKind::PageAlloc {
            pfn,
            order,
            migratetype: 0,
            gfp,
        }),
        2 => block().prop_map(|(pfn, order)| EventKind::PageFree { pfn, order }),
        2 => (ptr(), 1..6000u32, gfp()).prop_map(|(ptr, bytes_req, gfp)| EventKind::Kmalloc {
            ptr,
            bytes_req,
            bytes_alloc: bytes_req,
            gfp,
        }),
        2 => (0..3u32, ptr(), gfp()).prop_map(|(n, ptr, gfp)| EventKind::CacheAlloc {
            cache: CacheId(n),
            ptr,
            gfp,
        }),
        2 => ptr().prop_map(|ptr| EventKind::Kfree { ptr }),
        1 => (0..3u32, ptr()).prop_map(|(n, ptr)| EventKind::CacheFree {
            cache: CacheId(n),
            ptr,
        }),
    ]
}

fn events() -> impl Strategy<Value = Vec<Event>> {
    let event = (0..3u16, kind());
    prop::collection::vec(event, 1..3000).prop_map(|list| {
        let number = |(i, (cpu, kind))| Event::new(i as u64, cpu, kind);
        list.into_iter().enumerate().map(number).collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn any_events(events in events(), cpus in 1..5usize, deferred_percent in 0..101u32) {
        let options = Options { cpus, deferred_percent };
        let plan = Plan::new(&events, &table(), PAGES as usize, options);
        let mm = machine(64, cpus);
        let (done, left) = make(&mm, &plan, &table(), cpus);
        check(&mm, &plan, &done, &left);
        // However many CPUs there are, it is the same.
        let alone = Plan::new(&events, &table(), PAGES as usize, Options::default());
        prop_assert_eq!(plan.calls(), alone.calls());
        prop_assert_eq!(plan.pages.by_purpose, alone.pages.by_purpose);
        prop_assert_eq!(plan.objects.freed, alone.objects.freed);
        prop_assert_eq!(plan.peak_pages, alone.peak_pages);
    }
}

/// Every block is allocated on one CPU and freed on another at once.
#[test]
fn frees_wait_for_allocations() {
    let mut events = Vec::new();
    for i in 0..60_000u32 {
        let (pfn, cpu) = (i % PAGES, (i % 2) as u16);
        let gfp = GFP_HIGHUSER_MOVABLE;
        let alloc = EventKind::PageAlloc {
            pfn,
            order: 0,
            migratetype: 0,
            gfp,
        };
        events.push(Event::new(i.into(), cpu, alloc));
        let free = EventKind::PageFree { pfn, order: 0 };
        events.push(Event::new(i.into(), 1 - cpu, free));
    }
    let options = Options {
        cpus: 2,
        ..Options::default()
    };
    let plan = Plan::new(&events, &CacheTable::default(), PAGES as usize, options);
    assert_eq!(plan.calls_by_cpu(), [60_000, 60_000]);
    assert_eq!(plan.peak_pages, 1);
    let mm = machine(16, 2);
    let (done, left) = make(&mm, &plan, &CacheTable::default(), 2);
    check(&mm, &plan, &done, &left);
    assert!(done.waited_for_allocation > 0);
}

/// One CPU allocates, the other frees; together they have 3000 pages out, and the machine has not many more. Without a bound on how far the first gets ahead
/// it would run out.
#[test]
fn nobody_gets_far_ahead() {
    let (mut events, live) = (Vec::new(), 3000);
    for i in 0..200_000u32 {
        let alloc = EventKind::PageAlloc {
            pfn: i % 4096,
            order: 0,
            migratetype: 0,
            gfp: GFP_KERNEL,
        };
        events.push(Event::new(0, 0, alloc));
        if i >= live {
            let pfn = (i - live) % 4096;
            let free = EventKind::PageFree { pfn, order: 0 };
            events.push(Event::new(0, 1, free));
        }
    }
    let options = Options {
        cpus: 2,
        ..Options::default()
    };
    let plan = Plan::new(&events, &CacheTable::default(), 4096, options);
    assert_eq!(u64::from(live) + 1, plan.peak_pages);
    let mm = machine(40, 2);
    let slow = AtomicU64::new(0);
    // SAFETY: there is one machine.
    let handles = unsafe { Handles::new(&mm) };
    let run = Run::new(handles, &plan, &CacheTable::default()).unwrap();
    let done = std::thread::scope(|scope| {
        let threads = [0, 1].map(|cpu| {
            let (run, mm, slow) = (&run, &mm, &slow);
            scope.spawn(move || {
                let guard = mm.platform().claim(cpu).unwrap();
                guard.switch();
                let wait = |is_so: &dyn Fn() -> bool| {
                    while !is_so() {
                        std::thread::yield_now();
                    }
                };
                run.cpu(cpu, wait, || {
                    // The one that frees takes its time now and then.
                    if cpu == 1 && slow.fetch_add(1, Ordering::Relaxed) % 64 == 0 {
                        std::thread::sleep(std::time::Duration::from_millis(2));
                    }
                })
            })
        });
        let mut all = Done::default();
        for thread in threads {
            all.add(&thread.join().unwrap());
        }
        all
    });
    assert!(done.waited_for_others > 0);
    let left = run.end();
    check(&mm, &plan, &done, &left);
}

/// Where memory does not do, failures are counted, what could not be had is not freed, and nothing is lost.
#[test]
fn too_little_memory() {
    let mut events = Vec::new();
    for pfn in 0..8192u32 {
        let alloc = EventKind::PageAlloc {
            pfn,
            order: 0,
            migratetype: 0,
            gfp: GFP_KERNEL,
        };
        events.push(Event::new(0, (pfn % 2) as u16, alloc));
    }
    for pfn in 0..8192 {
        let free = EventKind::PageFree { pfn, order: 0 };
        events.push(Event::new(0, (pfn / 2 % 2) as u16, free));
    }
    let options = Options {
        cpus: 2,
        ..Options::default()
    };
    let plan = Plan::new(&events, &CacheTable::default(), 8192, options);
    let mm = machine(16, 2);
    let (done, left) = make(&mm, &plan, &CacheTable::default(), 2);
    assert!(done.pages_failed > 0 && done.first_failure.is_some());
    assert_eq!(done.frees_of_failed, done.pages_failed);
    assert_eq!(done.allocated(), done.freed);
    assert_eq!((left.blocks, left.objects), (0, 0));
    assert_gone(&mm);
}

/// The beginning of the recording that the command has inside, on four CPUs.
#[test]
fn a_real_recording() {
    let path = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../memdesc-cli/recordings/build/events.txt.zst"
    );
    let mut recording = Recording::open(path, &mut |_| {}).unwrap();
    recording.events.truncate(100_000);
    let pages = recording.events.iter().filter_map(|e| match e.kind() {
        EventKind::PageAlloc { pfn, order, .. } | EventKind::PageFree { pfn, order } => {
            Some(pfn as usize + (1 << order))
        }
        _ => None,
    });
    let pages = pages.max().unwrap();
    let options = Options {
        cpus: 4,
        deferred_percent: 20,
    };
    let plan = Plan::new(&recording.events, &recording.caches, pages, options);
    assert!(plan.calls_by_cpu().iter().all(|&calls| calls > 1000));
    let mm = machine(512, 4);
    let (done, left) = make(&mm, &plan, &recording.caches, 4);
    check(&mm, &plan, &done, &left);
    assert!(done.deferred > 0);
}
