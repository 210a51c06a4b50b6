//! Mempools: what was set aside is there when all else is gone, and who waits gets it.

mod common;

use std::ptr::NonNull;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use common::*;
use memdesc::gfp::{
    __GFP_ACCOUNT, __GFP_FAST_TRY, __GFP_MEMALLOC, __GFP_NOFAIL, __GFP_ZERO, GFP_ATOMIC,
    GFP_KERNEL, GFP_NOIO, GFP_NOWAIT,
};
use memdesc::*;
use memdesc_host::{Host, interrupt};
use proptest::prelude::*;

const PLAIN: CacheFlags = CacheFlags::EMPTY;

/// Ends the process if what it watches hangs.
struct Watchdog(#[allow(unused)] mpsc::Sender<()>);

impl Watchdog {
    fn new(what: &'static str) -> Watchdog {
        let (alive, ended) = mpsc::channel();
        std::thread::spawn(move || {
            if ended.recv_timeout(Duration::from_secs(100)) == Err(mpsc::RecvTimeoutError::Timeout)
            {
                eprintln!("{what}: somebody waits for ever");
                std::process::abort();
            }
        });
        Watchdog(alive)
    }
}

/// Gives an element back.
#[track_caller]
fn put<P: Platform>(pool: &Mempool<'_, P>, element: NonNull<u8>) {
    // SAFETY: tests call this for elements of the pool that they have and do not use any more, or to see a wrong free reported.
    unsafe { pool.free(element) };
}

/// Takes all memory that is left.
fn eat(mm: &Mm<Host>) -> Vec<Pfn> {
    let mut eaten = Vec::new();
    for order in (0..=MAX_ORDER).rev() {
        while let Ok(pfn) = mm.alloc_pages(GFP_ATOMIC | __GFP_MEMALLOC, order) {
            eaten.push(pfn);
        }
    }
    eaten
}

fn no_memory(mm: &Mm<Host>) {
    mm.platform().faults().fail_one_in(1, 1);
}

fn memory_again(mm: &Mm<Host>) {
    mm.platform().faults().off();
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum What {
    Pages(usize),
    Slab(CacheFlags),
    Kmalloc(usize),
}

const ALL_KINDS: [What; 8] = [
    What::Pages(0),
    What::Pages(4),
    What::Slab(PLAIN),
    What::Slab(ALL),
    What::Slab(CacheFlags::NO_SHEAVES),
    What::Kmalloc(200),
    What::Kmalloc(8192),
    What::Kmalloc(20_000),
];

impl What {
    fn size(self) -> usize {
        match self {
            What::Pages(order) => PAGE_SIZE << order,
            What::Slab(_) => 120,
            What::Kmalloc(size) => size,
        }
    }

    fn flags(self) -> CacheFlags {
        match self {
            What::Slab(flags) => flags,
            _ => PLAIN,
        }
    }

    fn kind<'c>(self, cache: &'c Cache<'c>) -> MempoolKind<'c> {
        match self {
            What::Pages(order) => MempoolKind::Pages { order },
            What::Slab(_) => MempoolKind::Slab(cache),
            What::Kmalloc(size) => MempoolKind::Kmalloc { size },
        }
    }

    fn free_plainly(self, mm: &Mm<Host>, cache: &Cache<'_>, element: NonNull<u8>) {
        match self {
            What::Pages(_) => free(mm, mm.virt_to_pfn(element.as_ptr())),
            What::Slab(_) => cache_free(mm, cache, element),
            What::Kmalloc(_) => kfree(mm, element),
        }
    }
}

/// A machine, a cache, and a pool of each kind.
fn each(debug: bool, min_nr: usize, f: impl Fn(What, &Mm<Host>, &Cache<'_>, Mempool<'_, Host>)) {
    for what in ALL_KINDS {
        for rt in [false, true] {
            let mut machine = Machine::flat(8192);
            machine.config.preempt_rt = rt;
            if debug {
                machine = machine.unsampled();
                machine.config.slab_debug = ALL;
            }
            let mm = machine.boot();
            let cache = mm
                .kmem_cache_create("objects", 120, 8, what.flags(), None)
                .unwrap();
            {
                let pool = mm.mempool_create("pool", what.kind(&cache), min_nr, GFP_KERNEL);
                f(what, &mm, &cache, pool.unwrap());
            }
            mm.mempool_info(|view| panic!("{view:?} is left"));
            mm.kmem_cache_destroy(cache).unwrap();
            teardown(&machine, &mm);
        }
    }
}

#[test]
fn what_is_set_aside_is_there() {
    for debug in [false, true] {
        each(debug, 5, |what, mm, cache, pool| {
            assert!(pool.is_saturated());
            // Ordinary memory first.
            let one = pool.alloc(GFP_KERNEL).unwrap();
            assert!(pool.is_saturated());
            put(&pool, one);
            no_memory(mm);
            let mut got = Vec::new();
            for i in 0..5 {
                let zero = i % 2 == 0;
                let element = pool
                    .alloc(if zero {
                        GFP_NOWAIT | __GFP_ZERO
                    } else {
                        GFP_ATOMIC
                    })
                    .unwrap();
                assert!(!zero || bytes(element, what.size()).iter().all(|&b| b == 0));
                fill(element, what.size(), i);
                got.push(element);
            }
            let (passed, _) = mm.platform().faults().off();
            assert!(passed >= 5);
            no_memory(mm);
            assert_eq!(pool.alloc(GFP_NOWAIT), Err(AllocError::Injected));
            assert!(!pool.is_saturated());
            let view = pool.view();
            assert_eq!(
                (view.curr_nr, view.min_nr, view.low, view.taken),
                (0, 5, 0, 5)
            );
            assert_eq!(
                (view.name, view.element_size, view.refills),
                ("pool", what.size(), 0)
            );
            for (i, &element) in got.iter().enumerate() {
                assert!(bytes(element, what.size()).iter().all(|&b| b == i as u8));
            }
            put(&pool, got.pop().unwrap());
            let view = pool.view();
            assert_eq!((view.curr_nr, view.refills), (1, 1));
            // All or none.
            let mut two = [std::ptr::null_mut(); 2];
            assert_eq!(
                pool.alloc_bulk(GFP_NOWAIT, &mut two),
                Err(AllocError::Injected)
            );
            assert_eq!((two, pool.view().curr_nr), ([std::ptr::null_mut(); 2], 1));
            let six = pool.alloc_bulk(GFP_NOWAIT, &mut [std::ptr::null_mut(); 6]);
            assert_eq!(six, Err(AllocError::BadSize));
            memory_again(mm);
            // Taken down while it lacks some, it comes back.
            let busy = pool.destroy().unwrap_err();
            assert_eq!(
                (busy.missing, busy.to_string()),
                (4, "pool pool lacks 4 elements".to_owned())
            );
            let pool = busy.pool;
            // One is freed as what it is: it is not there afterwards, until the pool is filled up.
            what.free_plainly(mm, cache, got.pop().unwrap());
            let rest: Vec<_> = got.iter().map(|e| e.as_ptr()).collect();
            // SAFETY: ours, of the pool.
            unsafe { pool.free_bulk(&rest) };
            assert_eq!(pool.view().curr_nr, 4);
            pool.resize(5, GFP_KERNEL).unwrap();
            assert!(pool.is_saturated());
            let mut names = Vec::new();
            mm.mempool_info(|view| names.push((view.name.to_owned(), view.curr_nr)));
            assert_eq!(names, [("pool".to_owned(), 5)]);
            assert_eq!(mm.validate(|r| panic!("{r}")).errors(), 0);
            ledger(mm);
            pool.destroy().unwrap();
        });
    }
}

#[test]
fn larger_and_smaller() {
    each(false, 4, |what, mm, cache, pool| {
        let live = |mm: &Mm<Host>| match what {
            What::Slab(_) => slabinfo(mm, cache.name()).0,
            _ => 0,
        };
        let big = if what == What::Pages(4) { 100 } else { 600 };
        pool.resize(big, GFP_KERNEL).unwrap();
        assert_eq!(pool.view().min_nr, big);
        assert_eq!(pool.view().curr_nr, big);
        no_memory(mm);
        let mut some = vec![std::ptr::null_mut(); 3];
        pool.alloc_bulk(GFP_NOWAIT, &mut some).unwrap();
        // Smaller: nothing is allocated.
        pool.resize(2, GFP_NOWAIT).unwrap();
        assert_eq!((pool.view().curr_nr, pool.view().min_nr), (2, 2));
        // What comes back finds no room.
        // SAFETY: ours, of the pool.
        unsafe { pool.free_bulk(&some[..2]) };
        assert_eq!(
            (pool.view().curr_nr, live(mm)),
            (2, if matches!(what, What::Slab(_)) { 3 } else { 0 })
        );
        assert!(pool.resize(3, GFP_NOWAIT).is_err());
        assert_eq!((pool.view().curr_nr, pool.view().min_nr), (2, 2));
        memory_again(mm);
        pool.resize(3, GFP_NOWAIT).unwrap();
        put(&pool, NonNull::new(some[2]).unwrap());
        assert_eq!(pool.resize(0, GFP_KERNEL), Err(AllocError::BadSize));
        assert_eq!(
            pool.resize(usize::MAX, GFP_KERNEL),
            Err(AllocError::BadSize)
        );
        // Dropped with some out: they are what they are.
        no_memory(mm);
        let out = pool.alloc(GFP_NOWAIT).unwrap();
        memory_again(mm);
        drop(pool);
        what.free_plainly(mm, cache, out);
    });
}

#[test]
fn bad_requests() {
    let machine = Machine::flat(4096);
    let mm = machine.boot();
    let made = |kind, n, gfp| mm.mempool_create("pool", kind, n, gfp).map(|_| ());
    let pages = |order| MempoolKind::Pages { order };
    let kmalloc = |size| MempoolKind::Kmalloc { size };
    assert_eq!(made(pages(0), 0, GFP_KERNEL), Err(AllocError::BadSize));
    assert_eq!(
        made(pages(0), usize::MAX, GFP_KERNEL),
        Err(AllocError::BadSize)
    );
    assert_eq!(
        made(pages(MAX_ORDER + 1), 1, GFP_KERNEL),
        Err(AllocError::BadOrder)
    );
    assert_eq!(made(kmalloc(0), 1, GFP_KERNEL), Err(AllocError::BadSize));
    assert_eq!(
        made(kmalloc(usize::MAX), 1, GFP_KERNEL),
        Err(AllocError::BadSize)
    );
    let both = GFP_KERNEL | gfp::__GFP_DMA | gfp::__GFP_RCU_PREPAID;
    assert_eq!(made(kmalloc(64), 1, both), Err(AllocError::NoZone));
    assert!(
        made(pages(MAX_ORDER), 100, GFP_KERNEL).is_err(),
        "more than there is"
    );
    mm.mempool_info(|view| panic!("{view:?}"));
    // A name that is too long, cut between letters.
    let pool = mm
        .mempool_create(&"ä".repeat(40), pages(0), 1, GFP_KERNEL)
        .unwrap();
    assert_eq!(pool.name(), "ä".repeat(16));
    // From the zone that the pool is of, whatever the request says.
    let dma = mm
        .mempool_create("dma", kmalloc(64), 2, GFP_KERNEL | gfp::__GFP_DMA)
        .unwrap();
    let e = dma.alloc(GFP_KERNEL).unwrap();
    assert!(slabinfo(&mm, "dma-kmalloc-64").0 >= 3);
    put(&dma, e);
    drop((pool, dma));
    teardown(&machine, &mm);
}

#[test]
fn any_context() {
    let machine = Machine::flat(4096);
    let mm = machine.boot();
    let pool = mm
        .mempool_create("pool", MempoolKind::Kmalloc { size: 500 }, 3, GFP_KERNEL)
        .unwrap();
    no_memory(&mm);
    // Ordinary memory that is only tried for is not made to fail: so all of it has to go.
    let eaten = eat(&mm);
    let mut tried = Vec::new();
    let refused = loop {
        let _nmi = interrupt::nmi();
        match pool.alloc(GFP_KERNEL | __GFP_FAST_TRY) {
            Ok(element) => tried.push(element),
            Err(why) => break why,
        }
    };
    assert_eq!((pool.view().taken, refused), (3, AllocError::Empty));
    // One is there, two are wanted: it goes back to where it was, also from here.
    kfree(&mm, tried.pop().unwrap());
    for _ in 0..3 {
        let _nmi = interrupt::nmi();
        let mut two = [std::ptr::null_mut(); 2];
        let refused = pool.alloc_bulk(__GFP_FAST_TRY, &mut two);
        assert_eq!(
            (refused, two),
            (Err(AllocError::Empty), [std::ptr::null_mut(); 2])
        );
    }
    {
        let _nmi = interrupt::nmi();
        tried.push(pool.alloc(__GFP_FAST_TRY).unwrap());
        assert_eq!(pool.alloc(__GFP_FAST_TRY), Err(AllocError::Empty));
    }
    memory_again(&mm);
    {
        let _off = interrupt::off();
        tried.into_iter().for_each(|e| put(&pool, e));
    }
    eaten.into_iter().for_each(|pfn| free(&mm, pfn));
    pool.destroy().unwrap();
    teardown(&machine, &mm);
}

#[test]
fn nobody_is_charged_for_what_lies_there() {
    for what in [
        What::Slab(CacheFlags::ACCOUNT),
        What::Kmalloc(100),
        What::Kmalloc(20_000),
        What::Pages(1),
    ] {
        let mm = Machine::flat(4096).boot();
        let group = mm.memcg_create(None, "group", u64::MAX).unwrap();
        let cache = mm
            .kmem_cache_create("objects", 120, 8, what.flags(), None)
            .unwrap();
        let _scope = Host::memcg_scope(group.id());
        let gfp = GFP_KERNEL | __GFP_ACCOUNT;
        let pool = mm
            .mempool_create("pool", what.kind(&cache), 2, gfp)
            .unwrap();
        assert_eq!(group.usage(), 0, "{what:?}");
        let charged = pool.alloc(gfp).unwrap();
        let each = group.usage();
        assert!(each > 0);
        no_memory(&mm);
        let taken = pool.alloc(gfp).unwrap();
        memory_again(&mm);
        assert_eq!(group.usage(), each, "{what:?}: the machine's");
        // The charged one fills the gap, and the other goes back to ordinary memory.
        put(&pool, charged);
        assert_eq!((group.usage(), pool.view().curr_nr), (0, 2));
        put(&pool, taken);
        pool.destroy().unwrap();
        mm.kmem_cache_destroy(cache).unwrap();
        mm.memcg_check().unwrap();
        ledger(&mm);
    }
}

#[test]
fn the_ledger_counts_the_shelf_as_metadata() {
    let machine = Machine::flat(4096).unsampled();
    let mm = machine.boot();
    // The caches that it takes are there.
    drop(mm.mempool_create("warm", MempoolKind::Pages { order: 0 }, 1500, GFP_KERNEL));
    let before = ledger(&mm);
    let pool = mm
        .mempool_create("pool", MempoolKind::Pages { order: 0 }, 1500, GFP_KERNEL)
        .unwrap();
    let during = ledger(&mm);
    let pages = |ledger: &Ledger, kind: PageType| ledger.by_type[kind as usize];
    assert_eq!(pages(&during, PageType::Bare), 1500);
    assert_eq!(pages(&during, PageType::LargeKmalloc), 0);
    let more = during.other_metadata_bytes - before.other_metadata_bytes;
    // 12000 bytes are four pages; and the pool itself.
    assert!((4 * 4096 + 128..=4 * 4096 + 256).contains(&more), "{more}");
    pool.destroy().unwrap();
    assert_eq!(
        ledger(&mm).other_metadata_bytes,
        before.other_metadata_bytes
    );
    teardown(&machine, &mm);
}

/// What must not change.
fn snapshot(mm: &Mm<Host>) -> (Vec<u64>, Vec<(String, u64)>, u64) {
    let ledger = ledger(mm);
    let mut active = Vec::new();
    mm.slabinfo(|c| {
        if !c.metadata {
            active.push((c.name.to_owned(), c.active_objs));
        }
    });
    // Slabs that were made in passing may stay; objects and pages may not.
    let mut pages = ledger.by_type.to_vec();
    pages[PageType::Slab as usize] = 0;
    (pages, active, ledger.given)
}

#[test]
fn every_allocation_fails_once() {
    for what in ALL_KINDS {
        for resize in [false, true] {
            let (mut failed, n) = (0, if what == What::Pages(4) { 20 } else { 40 });
            for point in 0.. {
                assert!(point < 3000, "no end");
                let machine = Machine::flat(4096);
                let mm = machine.boot();
                let cache = mm
                    .kmem_cache_create("objects", 120, 8, what.flags(), None)
                    .unwrap();
                {
                    let mut pool = None;
                    if resize {
                        let made = mm
                            .mempool_create("pool", what.kind(&cache), 3, GFP_KERNEL)
                            .unwrap();
                        no_memory(&mm);
                        // It lacks one, which is to be made good as well.
                        let one = made.alloc(GFP_NOWAIT).unwrap();
                        memory_again(&mm);
                        what.free_plainly(&mm, &cache, one);
                        pool = Some(made);
                    }
                    let before = snapshot(&mm);
                    mm.platform().faults().fail_nth(point);
                    let done = match &pool {
                        Some(pool) => pool.resize(n, GFP_KERNEL),
                        None => mm
                            .mempool_create("pool", what.kind(&cache), n, GFP_KERNEL)
                            .map(|made| {
                                pool = Some(made);
                            }),
                    };
                    let (_, fired) = mm.platform().faults().off();
                    match done {
                        Ok(()) => {
                            let view = pool.as_ref().unwrap().view();
                            assert_eq!((view.curr_nr, view.min_nr), (n, n));
                        }
                        Err(why) => {
                            assert!(fired > 0, "{why}");
                            assert_eq!(
                                snapshot(&mm),
                                before,
                                "{what:?}, resize {resize}, point {point}"
                            );
                            if let Some(pool) = &pool {
                                assert_eq!((pool.view().curr_nr, pool.view().min_nr), (2, 3));
                            }
                            failed += 1;
                        }
                    }
                    drop(pool);
                    mm.kmem_cache_destroy(cache).unwrap();
                    teardown(&machine, &mm);
                    if fired == 0 {
                        break;
                    }
                }
            }
            assert!(failed > 1, "{what:?} {resize}: {failed}");
        }
    }
}

#[test]
fn a_request_for_many_that_fails_keeps_nothing() {
    each(false, 4, |what, mm, cache, pool| {
        no_memory(mm);
        let had: Vec<_> = (0..3).map(|_| pool.alloc(GFP_NOWAIT).unwrap()).collect();
        memory_again(mm);
        let before = snapshot(mm);
        let (mut failed, mut served) = (0, 0);
        for nth in 0..8 {
            mm.platform().faults().fail_nth(nth);
            let mut out = [NonNull::dangling().as_ptr(); 4];
            let result = pool.alloc_bulk(GFP_NOWAIT, &mut out);
            memory_again(mm);
            match result {
                // One lies there: it is enough for who lacks one.
                Ok(()) => {
                    served += 1;
                    for element in out {
                        let element = NonNull::new(element).unwrap();
                        if pool.view().curr_nr == 1 {
                            what.free_plainly(mm, cache, element);
                        } else {
                            put(&pool, element);
                        }
                    }
                }
                Err(_) => {
                    failed += 1;
                    assert_eq!(out, [std::ptr::null_mut(); 4]);
                }
            }
            assert_eq!(pool.view().curr_nr, 1);
            assert_eq!(snapshot(mm), before, "{what:?}, fault {nth}");
        }
        assert!(failed > 1 && served > 1, "{what:?}: {failed} {served}");
        had.into_iter().for_each(|e| put(&pool, e));
    });
}

#[derive(Clone, Copy, Debug)]
enum Op {
    Alloc {
        pool: usize,
        zero: bool,
        sleeps: bool,
    },
    Bulk {
        pool: usize,
        n: usize,
    },
    Free {
        which: usize,
    },
    FreePlainly {
        which: usize,
    },
    Resize {
        pool: usize,
        n: usize,
    },
    Memory {
        there: bool,
    },
    Tick,
    Destroy {
        pool: usize,
    },
}

fn op() -> impl Strategy<Value = Op> {
    let pool = 0..ALL_KINDS.len();
    prop_oneof![
        12 => (pool.clone(), any::<bool>(), any::<bool>())
            .prop_map(|(pool, zero, sleeps)| Op::Alloc { pool, zero, sleeps }),
        5 => (pool.clone(), 0..9usize).prop_map(|(pool, n)| Op::Bulk { pool, n }),
        16 => any::<usize>().prop_map(|which| Op::Free { which }),
        1 => any::<usize>().prop_map(|which| Op::FreePlainly { which }),
        3 => (pool.clone(), 1..12usize).prop_map(|(pool, n)| Op::Resize { pool, n }),
        4 => any::<bool>().prop_map(|there| Op::Memory { there }),
        1 => Just(Op::Tick),
        1 => pool.prop_map(|pool| Op::Destroy { pool }),
    ]
}

/// A pool in the model: how many lie there, how many should, what it did.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Model {
    curr: usize,
    min: usize,
    low: usize,
    taken: u64,
    refills: u64,
}

impl Model {
    fn new(n: usize) -> Model {
        Model {
            curr: n,
            min: n,
            low: n,
            taken: 0,
            refills: 0,
        }
    }

    fn take(&mut self, n: usize) -> bool {
        let there = self.curr >= n;
        if there {
            self.curr -= n;
            self.low = self.low.min(self.curr);
            self.taken += n as u64;
        }
        there
    }
}

fn run(ops: &[Op], rt: bool) {
    let mut machine = Machine::flat(16384).unsampled();
    machine.config.preempt_rt = rt;
    let mm = machine.boot();
    let caches = ALL_KINDS.map(|what| {
        mm.kmem_cache_create("objects", 120, 8, what.flags(), None)
            .unwrap()
    });
    let make = |i: usize| {
        mm.mempool_create("pool", ALL_KINDS[i].kind(&caches[i]), 4, GFP_KERNEL)
            .unwrap()
    };
    let mut pools: Vec<_> = (0..ALL_KINDS.len()).map(|i| Some(make(i))).collect();
    let mut models = [Model::new(4); ALL_KINDS.len()];
    let mut live: Vec<(usize, NonNull<u8>, u8)> = Vec::new();
    let (mut there, mut next) = (true, 0u8);
    for &op in ops {
        let mut got = |i: usize, element: NonNull<u8>, zero: bool, live: &mut Vec<_>| {
            let size = ALL_KINDS[i].size();
            assert!(
                !zero || bytes(element, size).iter().all(|&b| b == 0),
                "{op:?}"
            );
            next = next.wrapping_add(1);
            fill(element, size, next);
            live.push((i, element, next));
        };
        let untouched = |&(i, element, byte): &(usize, NonNull<u8>, u8)| {
            let size = ALL_KINDS[i].size();
            assert!(
                bytes(element, size).iter().all(|&b| b == byte),
                "somebody else's too"
            );
        };
        match op {
            Op::Alloc {
                pool: i,
                zero,
                sleeps,
            } => {
                let (pool, model) = (pools[i].as_ref().unwrap(), &mut models[i]);
                // Who may sleep would, where there is nothing: nobody else is here.
                let sleeps = sleeps && (there || model.curr > 0);
                let gfp = if sleeps {
                    GFP_NOIO | __GFP_NOFAIL
                } else {
                    GFP_ATOMIC
                };
                let result = pool.alloc(if zero { gfp | __GFP_ZERO } else { gfp });
                assert_eq!(result.is_ok(), there || model.take(1), "{op:?}");
                if let Ok(element) = result {
                    got(i, element, zero, &mut live);
                }
            }
            Op::Bulk { pool: i, n } => {
                let (pool, model) = (pools[i].as_ref().unwrap(), &mut models[i]);
                let mut out = vec![NonNull::dangling().as_ptr(); n];
                let result = pool.alloc_bulk(GFP_NOWAIT, &mut out);
                if n > model.min {
                    assert_eq!(result, Err(AllocError::BadSize));
                } else {
                    assert_eq!(result.is_ok(), there || n == 0 || model.take(n), "{op:?}");
                }
                for element in out {
                    assert_eq!(element.is_null(), result.is_err());
                    if let Some(element) = NonNull::new(element) {
                        got(i, element, false, &mut live);
                    }
                }
            }
            Op::Free { which } | Op::FreePlainly { which } if !live.is_empty() => {
                let object = live.swap_remove(which % live.len());
                untouched(&object);
                let (i, element, _) = object;
                if matches!(op, Op::FreePlainly { .. }) {
                    ALL_KINDS[i].free_plainly(&mm, &caches[i], element);
                } else {
                    put(pools[i].as_ref().unwrap(), element);
                    let model = &mut models[i];
                    if model.curr < model.min {
                        model.curr += 1;
                        model.refills += 1;
                    }
                }
            }
            Op::Resize { pool: i, n } => {
                let (pool, model) = (pools[i].as_ref().unwrap(), &mut models[i]);
                let result = pool.resize(n, GFP_KERNEL);
                if n < model.min {
                    (model.min, model.curr) = (n, model.curr.min(n));
                    model.low = model.low.min(model.curr);
                    assert_eq!(result, Ok(()));
                } else if n > model.min || model.curr < n {
                    assert_eq!(result.is_ok(), there, "{op:?}: {result:?}");
                    if there {
                        (model.min, model.curr, model.low) = (n, n, n);
                    }
                }
            }
            Op::Memory { there: now } => {
                there = now;
                if there {
                    memory_again(&mm);
                } else {
                    no_memory(&mm);
                }
            }
            Op::Tick => mm.tick(),
            Op::Destroy { pool: i } if there => match pools[i].take().unwrap().destroy() {
                Ok(()) => {
                    assert_eq!(models[i].curr, models[i].min);
                    pools[i] = Some(make(i));
                    models[i] = Model::new(4);
                }
                Err(busy) => {
                    assert_eq!(busy.missing, models[i].min - models[i].curr);
                    pools[i] = Some(busy.pool);
                }
            },
            _ => {}
        }
        for (pool, model) in pools.iter().zip(&models) {
            let view = pool.as_ref().unwrap().view();
            let now = Model {
                curr: view.curr_nr,
                min: view.min_nr,
                low: view.low,
                taken: view.taken,
                refills: view.refills,
            };
            assert_eq!((now, view.waiting), (*model, 0), "after {op:?}");
            assert_eq!(pool.as_ref().unwrap().is_saturated(), now.curr == now.min);
        }
    }
    memory_again(&mm);
    ledger(&mm);
    assert_eq!(mm.validate(|r| panic!("{r}")).errors(), 0);
    for (i, element, byte) in live {
        assert!(
            bytes(element, ALL_KINDS[i].size())
                .iter()
                .all(|&b| b == byte)
        );
        put(pools[i].as_ref().unwrap(), element);
    }
    drop(pools);
    caches
        .into_iter()
        .for_each(|cache| mm.kmem_cache_destroy(cache).unwrap());
    teardown(&machine, &mm);
}

#[test]
fn state_machine() {
    let ops = proptest::collection::vec(op(), 1..=scaled(200, 20));
    for_cases(scaled(100, 1), &(any::<bool>(), ops), |(rt, ops)| {
        run(&ops, rt)
    });
}

/// Users that hold no more than the pool has, all together, while somebody takes all ordinary memory: nobody fails, nobody waits for ever.
fn users_and_an_adversary(rt: bool, cpus: usize, each: &[usize], rounds: usize) {
    let _watchdog = Watchdog::new("users and an adversary");
    let mut machine = Machine::flat(2048).cpus(cpus);
    machine.config.preempt_rt = rt;
    let mm = Mm::new(
        machine.host().floating(each.len() + 1).build().unwrap(),
        &machine.config,
        &machine.ranges,
    )
    .unwrap();
    let most = *each.iter().max().unwrap();
    let pool = mm
        .mempool_create(
            "pool",
            MempoolKind::Kmalloc { size: 3000 },
            most,
            GFP_KERNEL,
        )
        .unwrap();
    let eaten = eat(&mm);
    // What is left in sheaves and slabs.
    let mut crumbs = Vec::new();
    while let Ok(object) = mm.kmalloc(3000, GFP_ATOMIC | __GFP_MEMALLOC) {
        crumbs.push(object);
    }
    let served = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for (i, &n) in each.iter().enumerate() {
            let (pool, served) = (&pool, &served);
            scope.spawn(move || {
                for round in 0..rounds {
                    let mut out = vec![std::ptr::null_mut(); n];
                    if n == 1 {
                        out[0] = pool.alloc(GFP_NOIO).unwrap().as_ptr();
                    } else {
                        pool.alloc_bulk(GFP_NOIO, &mut out).unwrap();
                    }
                    for &e in &out {
                        fill(NonNull::new(e).unwrap(), 3000, i as u8);
                    }
                    if round % 3 == 0 {
                        std::thread::yield_now();
                    }
                    for &e in &out {
                        let e = NonNull::new(e).unwrap();
                        assert!(bytes(e, 3000).iter().all(|&b| b == i as u8), "two have it");
                        put(pool, e);
                    }
                    served.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
    });
    assert_eq!(served.into_inner(), rounds * each.len());
    let view = pool.view();
    assert_eq!((view.curr_nr, view.waiting), (most, 0));
    assert!(view.taken > 0 && view.taken == view.refills, "{view:?}");
    crumbs.into_iter().for_each(|object| kfree(&mm, object));
    eaten.into_iter().for_each(|pfn| free(&mm, pfn));
    pool.destroy().unwrap();
    teardown(&machine, &mm);
}

#[test]
fn nobody_waits_for_ever() {
    for rt in [false, true] {
        for (cpus, each) in [
            (1, &[1, 1, 1][..]),
            (2, &[4, 4]),
            (2, &[1, 4, 1, 3]),
            (1, &[8, 1, 1, 5, 2]),
        ] {
            users_and_an_adversary(rt, cpus, each, scaled(1500, 10));
        }
    }
}

/// Waits until so many wait for the pool.
fn until_waiting(pool: &Mempool<'_, Host>, n: usize) {
    while pool.view().waiting != n {
        std::thread::yield_now();
    }
}

fn with_empty_pool(n: usize, f: impl Fn(&Mm<Host>, &Mempool<'_, Host>, Vec<NonNull<u8>>)) {
    for rt in [false, true] {
        let _watchdog = Watchdog::new("a pool that is empty");
        let mut machine = Machine::flat(4096);
        machine.config.preempt_rt = rt;
        let mm = Mm::new(
            machine.host().floating(6).build().unwrap(),
            &machine.config,
            &machine.ranges,
        )
        .unwrap();
        let pool = mm
            .mempool_create("pool", MempoolKind::Pages { order: 1 }, n, GFP_KERNEL)
            .unwrap();
        no_memory(&mm);
        let had = (0..n).map(|_| pool.alloc(GFP_NOWAIT).unwrap()).collect();
        f(&mm, &pool, had);
        memory_again(&mm);
        drop(pool);
        teardown(&machine, &mm);
    }
}

#[test]
fn who_waits_is_woken_by_a_free() {
    with_empty_pool(3, |_, pool, had| {
        std::thread::scope(|scope| {
            let waiters: Vec<_> = (0..3)
                .map(|i| {
                    let waiter = scope.spawn(|| pool.alloc(GFP_NOIO).unwrap().as_ptr().addr());
                    until_waiting(pool, i + 1);
                    waiter
                })
                .collect();
            assert_eq!(pool.view().waits, 3);
            had.iter().for_each(|&e| put(pool, e));
            let got: Vec<_> = waiters.into_iter().map(|w| w.join().unwrap()).collect();
            for e in had {
                assert!(got.contains(&e.as_ptr().addr()));
                put(pool, e);
            }
        });
        assert!(pool.is_saturated());
    });
}

#[test]
fn who_came_first_is_served_first() {
    with_empty_pool(3, |_, pool, had| {
        std::thread::scope(|scope| {
            let many = scope.spawn(|| {
                let mut out = [std::ptr::null_mut(); 3];
                pool.alloc_bulk(GFP_NOIO, &mut out).unwrap();
                out.map(|e| e.addr())
            });
            until_waiting(pool, 1);
            let one = scope.spawn(|| pool.alloc(GFP_NOIO).unwrap().as_ptr().addr());
            until_waiting(pool, 2);
            put(pool, had[0]);
            put(pool, had[1]);
            // Two lie there, for who waits for three: neither who came after him nor who cannot wait gets one.
            assert_eq!(pool.alloc(GFP_ATOMIC), Err(AllocError::Injected));
            assert_eq!((pool.view().curr_nr, pool.view().waiting), (2, 2));
            put(pool, had[2]);
            let all = many.join().unwrap();
            assert!(had.iter().all(|e| all.contains(&e.as_ptr().addr())));
            until_waiting(pool, 1);
            put(pool, had[0]);
            assert_eq!(one.join().unwrap(), had[0].as_ptr().addr());
            put(pool, had[0]);
            put(pool, had[1]);
            put(pool, had[2]);
        });
    });
}

#[test]
fn a_tick_has_them_ask_again() {
    with_empty_pool(2, |mm, pool, had| {
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| {
                let mut out = [std::ptr::null_mut(); 2];
                pool.alloc_bulk(GFP_NOIO, &mut out).unwrap();
                out.map(|e| e.addr())
            });
            until_waiting(pool, 1);
            mm.tick();
            assert_eq!(pool.view().waiting, 1);
            memory_again(mm);
            // The pool's own are freed as what they are: they do not come back to it.
            had.iter()
                .for_each(|&e| free(mm, mm.virt_to_pfn(e.as_ptr())));
            assert_eq!(pool.view().waiting, 1);
            mm.tick();
            for e in waiter.join().unwrap() {
                put(
                    pool,
                    NonNull::new(mm.page_address(Pfn(0)).with_addr(e)).unwrap(),
                );
            }
        });
        assert!(
            pool.is_saturated(),
            "what was ordinary memory fills the gap"
        );
    });
}

#[test]
fn a_resize_is_heard_of() {
    with_empty_pool(4, |mm, pool, had| {
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| pool.alloc_bulk(GFP_NOIO, &mut [std::ptr::null_mut(); 4]));
            until_waiting(pool, 1);
            let other = scope.spawn(|| pool.alloc(GFP_NOIO).unwrap().as_ptr().addr());
            until_waiting(pool, 2);
            pool.resize(3, GFP_NOWAIT).unwrap();
            assert_eq!(waiter.join().unwrap(), Err(AllocError::BadSize));
            until_waiting(pool, 1);
            // Larger: what is missing is made good.
            memory_again(mm);
            pool.resize(5, GFP_KERNEL).unwrap();
            let e = other.join().unwrap();
            assert_eq!(pool.view().curr_nr, 4);
            put(
                pool,
                NonNull::new(mm.page_address(Pfn(0)).with_addr(e)).unwrap(),
            );
            had.iter().for_each(|&e| put(pool, e));
        });
        assert!(pool.is_saturated());
    });
}

/// Reclaim asks the pool that it is done for, and gives back what it had of it.
#[test]
fn reclaim_may_use_the_same_pool() {
    type Hook = std::sync::Mutex<Option<Box<dyn Fn() + Send>>>;
    static HOOK: Hook = std::sync::Mutex::new(None);
    let _watchdog = Watchdog::new("reclaim");
    let machine = Machine::flat(2048);
    let mut host = Hooked::new(machine.host().build().unwrap());
    let calls = std::sync::Arc::new(AtomicUsize::new(0));
    let count = calls.clone();
    host.on_reclaim = Some(Box::new(move |_| {
        count.fetch_add(1, Ordering::Relaxed);
        if let Some(f) = HOOK.lock().unwrap().take() {
            f();
        }
        0
    }));
    let mm: &'static Mm<Hooked> = Box::leak(Box::new(machine.boot_on(host)));
    let pool: &'static _ = Box::leak(Box::new(
        mm.mempool_create("pool", MempoolKind::Pages { order: 0 }, 1, GFP_KERNEL)
            .unwrap(),
    ));
    let mut eaten = Vec::new();
    while let Ok(pfn) = mm.alloc_pages(GFP_ATOMIC | __GFP_MEMALLOC, 0) {
        eaten.push(pfn);
    }
    let mine = pool.alloc(GFP_NOWAIT).unwrap().as_ptr().expose_provenance();
    *HOOK.lock().unwrap() = Some(Box::new(move || {
        let mine = NonNull::new(std::ptr::with_exposed_provenance_mut(mine)).unwrap();
        put(pool, mine);
        let again = pool.alloc(GFP_NOIO).unwrap();
        assert_eq!(again, mine);
        put(pool, again);
    }));
    // Nobody else is here to free anything.
    let got = pool.alloc(GFP_NOIO).unwrap();
    assert!(calls.load(Ordering::Relaxed) > 0 && HOOK.lock().unwrap().is_none());
    assert_eq!(pool.view().taken, 3);
    put(pool, got);
    eaten.into_iter().for_each(|pfn| free(mm, pfn));
    assert!(pool.is_saturated());
}
