//! Prefilled sheaves: objects that are had before they are needed.

mod common;

use std::collections::BTreeSet;
use std::ptr::NonNull;

use common::*;
use memdesc::gfp::{__GFP_ACCOUNT, __GFP_FAST_TRY, __GFP_ZERO, GFP_ATOMIC, GFP_KERNEL, GFP_NOWAIT};
use memdesc::*;
use memdesc_host::{Host, interrupt};
use proptest::prelude::*;

const PLAIN: CacheFlags = CacheFlags::EMPTY;

fn active(mm: &Mm<Host>, name: &str) -> u64 {
    slabinfo(mm, name).0
}

/// Objects of kmalloc that are in use, and pages.
fn kmalloced(mm: &Mm<Host>) -> (u64, u64) {
    let mut objects = 0;
    mm.slabinfo(|c| {
        if c.name.starts_with("kmalloc-") {
            objects += c.active_objs;
        }
    });
    (objects, ledger(mm).by_type[PageType::LargeKmalloc as usize])
}

/// All is back where groups were made, whose own memory stays.
#[track_caller]
fn all_back(mm: &Mm<Host>) {
    mm.shrink();
    let ledger = ledger(mm);
    assert_eq!(ledger.by_type[PageType::LargeKmalloc as usize], 0);
    assert_eq!(mm.event(Event::AllocOnFree), 0);
    assert_eq!(mm.validate(|r| panic!("{r}")).errors(), 0);
}

/// Takes all memory that is left, by pages and by objects of this cache.
fn eat(mm: &Mm<Host>) -> Vec<Pfn> {
    let mut eaten = Vec::new();
    for order in (0..=MAX_ORDER).rev() {
        while let Ok(pfn) = mm.alloc_pages(GFP_ATOMIC | gfp::__GFP_MEMALLOC, order) {
            eaten.push(pfn);
        }
    }
    eaten
}

#[test]
fn as_many_as_were_asked_for_and_no_more() {
    for flags in [
        PLAIN,
        CacheFlags::NO_SHEAVES,
        ALL,
        CacheFlags::TYPESAFE_BY_RCU,
    ] {
        for n in [0, 1, 7, 60, 61, 700, scaled(5000, 70)] {
            let machine = Machine::flat(4096);
            let mm = machine.boot();
            let cache = mm.kmem_cache_create("obj", 104, 8, flags, None).unwrap();
            let mut sheaf = mm.kmem_cache_prefill_sheaf(&cache, GFP_KERNEL, n).unwrap();
            assert_eq!((sheaf.len(), sheaf.is_empty()), (n, n == 0));
            assert!(sheaf.capacity() >= n);
            assert_eq!(active(&mm, "obj"), n as u64, "{flags:?}");
            // Everything fails from here on, and nothing is left.
            let eaten = eat(&mm);
            mm.platform().faults().fail_one_in(1, 1);
            let mut got = BTreeSet::new();
            for left in (0..n).rev() {
                let _off = interrupt::off();
                let object = match left % 3 {
                    0 => sheaf.alloc_from(Flags::EMPTY),
                    1 => {
                        let _irq = interrupt::hardirq();
                        sheaf.alloc_from(Flags::EMPTY)
                    }
                    _ => {
                        let _nmi = interrupt::nmi();
                        sheaf.alloc_from(__GFP_ZERO)
                    }
                };
                let object = object.expect("it was promised");
                if left % 3 == 2 {
                    assert!(bytes(object, 104).iter().all(|&b| b == 0));
                }
                fill(object, 104, 0x77);
                assert!(got.insert(object), "twice");
                assert_eq!(sheaf.len(), left);
            }
            assert_eq!(sheaf.alloc_from(Flags::EMPTY), None);
            let (passed, _) = mm.platform().faults().off();
            assert_eq!(passed, 0, "an allocation");
            sheaf.return_sheaf();
            eaten.into_iter().for_each(|pfn| free(&mm, pfn));
            got.into_iter().for_each(|o| cache_free(&mm, &cache, o));
            mm.kmem_cache_destroy(cache).unwrap();
            teardown(&machine, &mm);
        }
    }
}

#[test]
fn zeroed_when_handed_out() {
    let mm = Machine::flat(4096).unsampled().boot();
    for flags in [PLAIN, ALL] {
        let cache = mm.kmem_cache_create("obj", 72, 8, flags, None).unwrap();
        // What lies in the sheaves is not zero.
        let mut dirty = [std::ptr::null_mut(); 40];
        mm.kmem_cache_alloc_bulk(&cache, GFP_KERNEL, &mut dirty)
            .unwrap();
        for &o in &dirty {
            let o = NonNull::new(o).unwrap();
            fill(o, 72, 0xee);
            cache_free(&mm, &cache, o);
        }
        let mut sheaf = mm
            .kmem_cache_prefill_sheaf(&cache, GFP_KERNEL | __GFP_ZERO, 20)
            .unwrap();
        for _ in 0..20 {
            let o = sheaf.alloc_from(Flags::EMPTY).unwrap();
            assert!(bytes(o, 72).iter().all(|&b| b == 0));
            cache_free(&mm, &cache, o);
        }
        drop(sheaf);
        mm.kmem_cache_destroy(cache).unwrap();
    }
}

#[test]
fn a_debug_cache_checks_what_rests() {
    let mut machine = Machine::flat(4096).unsampled();
    machine.config.page_owner = 1024;
    let reports = Reports::default();
    let mm = machine.boot_on(reports.on(machine.host()).build().unwrap());
    let cache = mm.kmem_cache_create("obj", 100, 8, ALL, None).unwrap();
    let mut sheaf = mm.kmem_cache_prefill_sheaf(&cache, GFP_KERNEL, 5).unwrap();
    let first = sheaf.alloc_from(Flags::EMPTY).unwrap();
    let mut there = Vec::new();
    mm.live_objects(&cache, |o, _| {
        there.push(NonNull::new(o.cast_mut()).unwrap())
    });
    assert_eq!(there.len(), 5);
    // Somebody writes to one that nobody has.
    let victim = *there.iter().find(|&&o| o != first).unwrap();
    fill(victim, 1, 0x12);
    let rest: Vec<_> = std::iter::from_fn(|| sheaf.alloc_from(Flags::EMPTY)).collect();
    let seen = reports.one();
    assert_eq!(
        (seen.what, seen.address),
        (Corruption::Poison, victim.addr().get())
    );
    // Who has it is who got it out of the sheaf.
    let line = line!() + 2;
    sheaf.refill(GFP_KERNEL, 1).unwrap();
    let o = sheaf.alloc_from(Flags::EMPTY).unwrap();
    mm.live_objects(&cache, |at, track| {
        if at == o.as_ptr() {
            let track = track.unwrap();
            assert!(track.location.file().ends_with("prefill.rs"));
            assert_eq!(track.location.line(), line);
        }
    });
    fill(o, 101, 0);
    cache_free(&mm, &cache, o);
    assert_eq!(reports.one().what, Corruption::RedzoneRight);
    for o in rest.into_iter().chain([first]) {
        cache_free(&mm, &cache, o);
    }
    // One that is returned is as free ones are, and is so when it is had again.
    sheaf.refill(GFP_KERNEL, 20).unwrap();
    sheaf.return_sheaf();
    let again = mm.kmem_cache_alloc(&cache, GFP_KERNEL).unwrap();
    cache_free(&mm, &cache, again);
    assert_eq!(reports.take(), []);
    assert_eq!(mm.validate(|r| panic!("{r}")).errors(), 0);
}

#[test]
fn a_constructors_work_stays() {
    let machine = Machine::flat(4096);
    let mm = machine.boot();
    let ctor = |o: NonNull<u8>| fill(o, 64, 0xc7);
    let cache = mm
        .kmem_cache_create("made", 64, 8, PLAIN, Some(ctor))
        .unwrap();
    for _ in 0..3 {
        let mut sheaf = mm
            .kmem_cache_prefill_sheaf(&cache, GFP_KERNEL, 100)
            .unwrap();
        for _ in 0..50 {
            let o = sheaf.alloc_from(Flags::EMPTY).unwrap();
            assert!(bytes(o, 64).iter().all(|&b| b == 0xc7));
            cache_free(&mm, &cache, o);
        }
    }
    mm.kmem_cache_destroy(cache).unwrap();
    teardown(&machine, &mm);
}

#[test]
fn charged_when_they_are_taken() {
    for (flags, gfp) in [
        (CacheFlags::ACCOUNT, GFP_KERNEL),
        (CacheFlags::OWNERS, GFP_KERNEL | __GFP_ACCOUNT),
        (CacheFlags::ACCOUNT | ALL, GFP_KERNEL),
    ] {
        let mm = Machine::flat(4096).boot();
        let group = mm.memcg_create(None, "group", u64::MAX).unwrap();
        let cache = mm.kmem_cache_create("obj", 128, 8, flags, None).unwrap();
        let scope = Host::memcg_scope(group.id());
        let one = mm.kmem_cache_alloc(&cache, gfp).unwrap();
        let each = group.usage();
        assert!(each >= 130);
        cache_free(&mm, &cache, one);
        let mut sheaf = mm.kmem_cache_prefill_sheaf(&cache, gfp, 40).unwrap();
        assert_eq!(group.usage(), 40 * each);
        drop(scope);
        // Handed out in somebody else's name: it was paid for.
        let some: Vec<_> = (0..10)
            .map(|_| sheaf.alloc_from(Flags::EMPTY).unwrap())
            .collect();
        assert_eq!(group.usage(), 40 * each);
        for &o in &some {
            // SAFETY: live.
            assert_eq!(unsafe { mm.memcg_of_object(o) }, group.id());
        }
        // One too many for the group: nothing has changed.
        group.set_limit(45 * each).unwrap();
        let scope = Host::memcg_scope(group.id());
        assert_eq!(sheaf.refill(gfp, 36).unwrap_err(), AllocError::Limit);
        assert_eq!(
            mm.kmem_cache_prefill_sheaf(&cache, gfp, 6).unwrap_err(),
            AllocError::Limit
        );
        assert_eq!((sheaf.len(), group.usage()), (30, 40 * each));
        sheaf.refill(gfp, 35).unwrap();
        assert_eq!((sheaf.len(), group.usage()), (35, 45 * each));
        drop(scope);
        mm.memcg_check().unwrap();
        drop(sheaf);
        assert_eq!(group.usage(), 10 * each);
        some.into_iter().for_each(|o| cache_free(&mm, &cache, o));
        assert_eq!(group.usage(), 0);
        mm.kmem_cache_destroy(cache).unwrap();
        drop(group);
        all_back(&mm);
    }
    // Nobody's cache keeps no owners.
    let mm = Machine::flat(4096).boot();
    let group = mm.memcg_create(None, "group", u64::MAX).unwrap();
    let cache = mm.kmem_cache_create("obj", 128, 8, PLAIN, None).unwrap();
    let _scope = Host::memcg_scope(group.id());
    let refused = mm.kmem_cache_prefill_sheaf(&cache, GFP_KERNEL | __GFP_ACCOUNT, 3);
    assert_eq!(refused.unwrap_err(), AllocError::NoOwners);
    assert_eq!((group.usage(), active(&mm, "obj")), (0, 0));
}

#[test]
fn the_ledger_counts_the_array_as_metadata() {
    let machine = Machine::flat(4096).unsampled();
    let mm = machine.boot();
    let cache = mm.kmem_cache_create("obj", 64, 8, PLAIN, None).unwrap();
    // In slabs, and in pages.
    for (n, bytes) in [(100, 1024), (1025, 3 * 4096), (2000, 4 * 4096)] {
        let bytes = if n > 1024 {
            (bytes as u64).next_power_of_two()
        } else {
            bytes as u64
        };
        let warm = mm.kmem_cache_prefill_sheaf(&cache, GFP_KERNEL, n).unwrap();
        drop(warm);
        let before = ledger(&mm);
        let sheaf = mm.kmem_cache_prefill_sheaf(&cache, GFP_KERNEL, n).unwrap();
        let during = ledger(&mm);
        // New slabs have bitmaps of their own, which these objects' have not.
        assert_eq!(during.by_type[PageType::LargeKmalloc as usize], 0);
        let more = during.other_metadata_bytes - before.other_metadata_bytes;
        assert_eq!(more, bytes, "{n}");
        drop(sheaf);
        let after = ledger(&mm);
        assert_eq!(after.other_metadata_bytes, before.other_metadata_bytes);
    }
    mm.kmem_cache_destroy(cache).unwrap();
    teardown(&machine, &mm);
}

#[test]
fn bad_requests() {
    let mm = Machine::flat(4096).boot();
    let cache = mm.kmem_cache_create("obj", 64, 8, PLAIN, None).unwrap();
    let asked = |n, gfp| mm.kmem_cache_prefill_sheaf(&cache, gfp, n).map(|_| ());
    assert_eq!(asked(usize::MAX, GFP_KERNEL), Err(AllocError::BadSize));
    assert_eq!(asked(usize::MAX / 8, GFP_KERNEL), Err(AllocError::BadSize));
    assert!(asked(400_000, GFP_NOWAIT).is_err(), "more than there is");
    assert_eq!(asked(3, __GFP_FAST_TRY), Err(AllocError::Forbidden));
    assert_eq!(active(&mm, "obj"), 0);
}

#[test]
fn every_allocation_fails_once() {
    for (flags, n, from) in [
        (PLAIN, 30, 0),
        (PLAIN, 300, 0),
        (PLAIN, 300, 200),
        (ALL, 50, 10),
        (CacheFlags::ACCOUNT, 50, 10),
    ] {
        let mut failed = 0;
        for point in 0.. {
            assert!(point < 2000, "no end");
            let machine = Machine::flat(2048);
            let mm = machine.boot();
            let group = mm.memcg_create(None, "group", u64::MAX).unwrap();
            let scope = Host::memcg_scope(group.id());
            let cache = mm.kmem_cache_create("obj", 400, 8, flags, None).unwrap();
            let mut sheaf = mm
                .kmem_cache_prefill_sheaf(&cache, GFP_KERNEL, from)
                .unwrap();
            let before = (active(&mm, "obj"), group.usage(), kmalloced(&mm));
            mm.platform().faults().fail_nth(point);
            let refilled = sheaf.refill(GFP_KERNEL, n);
            let (_, fired) = mm.platform().faults().off();
            let now = (active(&mm, "obj"), group.usage(), kmalloced(&mm));
            if refilled.is_err() {
                assert!(fired > 0);
                assert_eq!(now, before, "{flags:?}, point {point}");
                assert_eq!(sheaf.len(), from);
                failed += 1;
            } else {
                assert_eq!((sheaf.len(), now.0), (n, n as u64));
            }
            let mut got = BTreeSet::new();
            while let Some(o) = sheaf.alloc_from(Flags::EMPTY) {
                assert!(got.insert(o));
            }
            assert_eq!(got.len(), if refilled.is_ok() { n } else { from });
            drop(sheaf);
            got.into_iter().for_each(|o| cache_free(&mm, &cache, o));
            mm.memcg_check().unwrap();
            drop(scope);
            mm.kmem_cache_destroy(cache).unwrap();
            drop(group);
            all_back(&mm);
            if fired == 0 {
                break;
            }
        }
        assert!(failed > 1, "{flags:?} {n}: {failed}");
    }
}

#[derive(Clone, Copy, Debug)]
enum Op {
    Prefill { cache: usize, n: usize },
    Take { sheaf: usize, zero: bool },
    Refill { sheaf: usize, n: usize },
    Return { sheaf: usize },
    Alloc { cache: usize },
    Free { which: usize },
    Cpu { cpu: usize },
    Shrink,
    Fail { nth: u64 },
}

fn op() -> impl Strategy<Value = Op> {
    let cache = 0..CACHES.len();
    let n = prop_oneof![4 => 0..20usize, 2 => 0..130usize, 1 => 0..1500usize];
    prop_oneof![
        3 => (cache.clone(), n.clone()).prop_map(|(cache, n)| Op::Prefill { cache, n }),
        12 => (any::<usize>(), any::<bool>()).prop_map(|(sheaf, zero)| Op::Take { sheaf, zero }),
        3 => (any::<usize>(), n).prop_map(|(sheaf, n)| Op::Refill { sheaf, n }),
        2 => any::<usize>().prop_map(|sheaf| Op::Return { sheaf }),
        4 => cache.prop_map(|cache| Op::Alloc { cache }),
        10 => any::<usize>().prop_map(|which| Op::Free { which }),
        2 => (0..2usize).prop_map(|cpu| Op::Cpu { cpu }),
        1 => Just(Op::Shrink),
        2 => (0..6u64).prop_map(|nth| Op::Fail { nth }),
    ]
}

const CACHES: [(&str, usize, CacheFlags); 5] = [
    ("plain", 48, PLAIN),
    ("large", 3000, PLAIN),
    ("bare", 48, CacheFlags::NO_SHEAVES),
    ("checked", 88, ALL),
    ("charged", 200, CacheFlags::ACCOUNT),
];

fn run(ops: &[Op], rt: bool) {
    let mut machine = Machine::flat(8192).cpus(2);
    machine.config.preempt_rt = rt;
    let mm = machine.boot();
    let cpus = [
        mm.platform().claim(0).unwrap(),
        mm.platform().claim(1).unwrap(),
    ];
    let group = mm.memcg_create(None, "group", u64::MAX).unwrap();
    let scope = Host::memcg_scope(group.id());
    let caches =
        CACHES.map(|(name, size, flags)| mm.kmem_cache_create(name, size, 8, flags, None).unwrap());
    let each = {
        let o = mm.kmem_cache_alloc(&caches[4], GFP_KERNEL).unwrap();
        let each = group.usage();
        cache_free(&mm, &caches[4], o);
        each
    };
    // The model: what is in which sheaf, and who has what.
    let mut sheaves: Vec<(usize, PrefilledSheaf<'_, Host>, usize)> = Vec::new();
    let mut live: Vec<(usize, NonNull<u8>, u8)> = Vec::new();
    let mut next = 0u8;
    let mut armed = false;
    for &op in ops {
        let fired = |armed: &mut bool| std::mem::take(armed) && mm.platform().faults().off().1 > 0;
        match op {
            Op::Prefill { cache, n } => {
                match mm.kmem_cache_prefill_sheaf(&caches[cache], GFP_KERNEL, n) {
                    Ok(sheaf) => {
                        fired(&mut armed);
                        sheaves.push((cache, sheaf, n));
                    }
                    Err(why) => assert!(fired(&mut armed), "{why}"),
                }
            }
            Op::Take { sheaf, zero } if !sheaves.is_empty() => {
                let at = sheaf % sheaves.len();
                let (cache, sheaf, count) = &mut sheaves[at];
                let got = sheaf.alloc_from(if zero { __GFP_ZERO } else { Flags::EMPTY });
                assert_eq!(got.is_some(), *count > 0);
                if let Some(o) = got {
                    *count -= 1;
                    let size = CACHES[*cache].1;
                    assert!(!zero || bytes(o, size).iter().all(|&b| b == 0));
                    next = next.wrapping_add(1);
                    fill(o, size, next);
                    live.push((*cache, o, next));
                }
                assert_eq!(sheaf.len(), *count);
            }
            Op::Refill { sheaf, n } if !sheaves.is_empty() => {
                let at = sheaf % sheaves.len();
                let (_, sheaf, count) = &mut sheaves[at];
                match sheaf.refill(GFP_KERNEL, n) {
                    Ok(()) => {
                        fired(&mut armed);
                        *count = n.max(*count);
                    }
                    Err(why) => assert!(fired(&mut armed), "{why}"),
                }
                assert_eq!(sheaf.len(), *count);
            }
            Op::Return { sheaf } if !sheaves.is_empty() => {
                let at = sheaf % sheaves.len();
                sheaves.swap_remove(at).1.return_sheaf();
            }
            Op::Alloc { cache } => match mm.kmem_cache_alloc(&caches[cache], GFP_KERNEL) {
                Ok(o) => {
                    fired(&mut armed);
                    next = next.wrapping_add(1);
                    fill(o, CACHES[cache].1, next);
                    live.push((cache, o, next));
                }
                Err(why) => assert!(fired(&mut armed), "{why}"),
            },
            Op::Free { which } if !live.is_empty() => {
                let at = which % live.len();
                let (cache, o, byte) = live.swap_remove(at);
                assert!(
                    bytes(o, CACHES[cache].1).iter().all(|&b| b == byte),
                    "somebody else's too"
                );
                cache_free(&mm, &caches[cache], o);
            }
            Op::Cpu { cpu } => cpus[cpu].switch(),
            Op::Shrink => {
                mm.shrink();
            }
            Op::Fail { nth } => {
                mm.platform().faults().fail_nth(nth);
                armed = true;
            }
            _ => {}
        }
        let mut wanted = [0; CACHES.len()];
        sheaves
            .iter()
            .for_each(|(cache, _, n)| wanted[*cache] += *n as u64);
        live.iter().for_each(|(cache, ..)| wanted[*cache] += 1);
        for (i, (name, ..)) in CACHES.iter().enumerate() {
            assert_eq!(active(&mm, name), wanted[i], "{name} after {op:?}");
        }
        assert_eq!(group.usage(), wanted[4] * each, "after {op:?}");
    }
    mm.platform().faults().off();
    ledger(&mm);
    mm.memcg_check().unwrap();
    assert_eq!(mm.validate(|r| panic!("{r}")).errors(), 0);
    drop(sheaves);
    for (cache, o, byte) in live {
        assert!(bytes(o, CACHES[cache].1).iter().all(|&b| b == byte));
        cache_free(&mm, &caches[cache], o);
    }
    caches
        .into_iter()
        .for_each(|cache| mm.kmem_cache_destroy(cache).unwrap());
    drop(scope);
    drop(group);
    all_back(&mm);
}

#[test]
fn state_machine() {
    let ops = proptest::collection::vec(op(), 1..=scaled(200, 20));
    for_cases(scaled(100, 1), &(any::<bool>(), ops), |(rt, ops)| {
        run(&ops, rt)
    });
}
