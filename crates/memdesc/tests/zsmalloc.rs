//! Compressed memory against a plain model: what was stored comes back, whatever moves meanwhile; handles that are wrong are found; each allocation may
//! fail; and when all is freed nothing is left.
#![cfg(not(miri))]

mod common;

use std::sync::atomic::{AtomicUsize, Ordering};

use common::*;
use memdesc::gfp::{__GFP_MOVABLE, GFP_ATOMIC, GFP_KERNEL, GFP_NOWAIT};
use memdesc::zsmalloc::{SIZE_CLASSES, ZsError, ZsHandle};
use memdesc::*;
use memdesc_selftest::zsmalloc::{Model, check_compact, check_counts};
use proptest::prelude::{Just, ProptestConfig, Strategy, any, prop_oneof};

/// Sizes as compression gives them: some small, many middling, some that do not shrink.
fn size(rng: &mut Rng) -> usize {
    match rng.below(10) {
        0 => 1 + rng.below(64),
        1 => 3600 + rng.below(497),
        _ => 1 + rng.below(3700),
    }
}

fn no_reports() -> (Machine, Reports) {
    (Machine::flat(16384).guarded().cpus(2), Reports::default())
}

#[test]
fn pages_are_not_for_others_to_free_or_to_have() {
    let (machine, reports) = no_reports();
    let mm = machine.boot_on(reports.on(machine.host()).build().unwrap());
    let pool = mm.zs_create_pool("pages").unwrap();
    let handle = mm.zs_malloc(&pool, 3000, GFP_KERNEL).unwrap();
    mm.zs_obj_write(&pool, handle, &[5; 3000]).unwrap();
    let ours = |pfn: &u32| matches!(mm.lookup(Pfn(*pfn)).2, Memory::Zsmalloc(_));
    for pfn in (0..machine.end()).filter(ours).collect::<Vec<_>>() {
        free(&mm, Pfn(pfn));
        assert_eq!(reports.one().what, Corruption::WrongType);
    }
    let mut copy = [0; 3000];
    let view = mm.zs_obj_read_begin(&pool, handle, &mut copy).unwrap();
    assert_eq!(*view, [5; 3000]);
    drop(view);
    mm.zs_free(&pool, handle);
    mm.zs_destroy_pool(pool).unwrap();
    teardown(&machine, &mm);
    assert!(reports.take().is_empty());
}

#[test]
fn wrong_handles_are_found() {
    let (machine, reports) = no_reports();
    let host = reports.on(machine.host());
    let mm = machine.boot_on(host.build().unwrap());
    let (pool, other) = (
        mm.zs_create_pool("one").unwrap(),
        mm.zs_create_pool("other").unwrap(),
    );
    let mut model = Model::new(&mm, &pool, 1);
    for size in [1, 30, 700, 700, 700, 4096, 4000] {
        model.store(size, GFP_KERNEL).unwrap();
    }
    let keep = mm.zs_malloc(&other, 700, GFP_KERNEL).unwrap();
    // Of another pool.
    mm.zs_free(&pool, keep);
    let seen = reports.one();
    assert_eq!(seen.what, Corruption::WrongCache);
    assert_eq!(seen.cache.as_deref(), Some("one"));
    assert!(seen.caller.0.ends_with("zsmalloc.rs"));
    assert_eq!(
        mm.zs_obj_write(&pool, keep, &[1]),
        Err(ZsError::NoSuchObject)
    );
    // A number that was made up to look as if it were of this one.
    let forged = ZsHandle::from_raw(keep.into_raw() & !(63 << 58)).unwrap();
    mm.zs_free(&pool, forged);
    assert_eq!(reports.one().what, Corruption::DoubleFree);
    mm.zs_obj_write(&other, keep, &[1]).unwrap();
    // Freed twice, while others are in its zspage, and when its slot has another object.
    let twice = model.order[3];
    let at = model.order.iter().position(|h| *h == twice).unwrap();
    model.free(at);
    mm.zs_free(&pool, twice);
    assert_eq!(reports.one().what, Corruption::DoubleFree);
    model.store(700, GFP_KERNEL).unwrap();
    mm.zs_free(&pool, twice);
    assert_eq!(reports.one().what, Corruption::DoubleFree);
    assert_eq!(
        mm.zs_obj_write(&pool, twice, &[1]),
        Err(ZsError::NoSuchObject)
    );
    model.check();
    // While it is read, and while it is written.
    let read = model.order[0];
    let mut copy = [0; 1];
    let view = mm.zs_obj_read_begin(&pool, read, &mut copy).unwrap();
    mm.zs_free(&pool, read);
    assert_eq!(reports.one().what, Corruption::InUse);
    assert_eq!(mm.zs_obj_write(&pool, read, &[1]), Err(ZsError::Busy));
    drop(view);
    model.check();
    model.free_all();
    mm.zs_free(&other, keep);
    // When all pages are gone: even those of handles.
    mm.shrink();
    assert_eq!(mm.pages_of(PageType::Zsmalloc), 0);
    mm.zs_free(&pool, twice);
    assert_eq!(reports.one().what, Corruption::DoubleFree);
    // Nonsense.
    for raw in [1, 1 << 40, u64::MAX, 12345 << 9] {
        let handle = ZsHandle::from_raw(raw).unwrap();
        mm.zs_free(&pool, handle);
        assert_eq!(reports.take().len(), 1, "{raw:#x}");
        assert_eq!(model.read(handle), Err(ZsError::NoSuchObject));
    }
    mm.zs_destroy_pool(pool).unwrap();
    mm.zs_destroy_pool(other).unwrap();
    teardown(&machine, &mm);
}

#[test]
fn pages_move_with_what_is_in_them() {
    let machine = Machine::flat(8192).guarded();
    let mm = machine.boot_on(machine.host().build().unwrap());
    let pool = mm.zs_create_pool("migration").unwrap();
    let mut model = Model::new(&mm, &pool, 1);
    let mut rng = Rng(11);
    for _ in 0..4000 {
        model
            .store(size(&mut rng), GFP_KERNEL | __GFP_MOVABLE)
            .unwrap();
    }
    for _ in 0..1000 {
        model.free(rng.below(model.order.len()));
    }
    let pages = mm.zs_get_total_pages(&pool);
    let ours = |pfn: u32| match mm.lookup(Pfn(pfn)).2 {
        // SAFETY: objects keep it.
        Memory::Zsmalloc(desc) => Some(unsafe { desc.as_ref() }.class()),
        _ => None,
    };
    let handles = SIZE_CLASSES.len();
    let (mut whole, mut moved) = (0, 0);
    for start in (512..8192).step_by(64) {
        let all = start..start + 64;
        let here = all.clone().filter(|&p| ours(p).is_some()).count();
        let fixed = all.clone().find(|&p| ours(p) == Some(handles));
        match mm.alloc_contig_range(Pfn(start), 64) {
            Ok(()) => {
                assert_eq!(fixed, None);
                assert!(all.clone().all(|p| ours(p).is_none()));
                model.check();
                check_counts(&mm, &pool, model.objects.len());
                // SAFETY: the range is ours, and nobody has it.
                unsafe { mm.free_contig_range(Pfn(start), 64) };
                (whole, moved) = (whole + 1, moved + here);
            }
            Err(obstacle) if obstacle.kind == PageType::Zsmalloc => {
                assert!(
                    !obstacle.movable && Some(obstacle.pfn.0) == fixed,
                    "{obstacle:?}"
                );
            }
            Err(_) => {}
        }
    }
    assert!(
        whole > 50 && moved > 1500,
        "{whole} ranges, {moved} of {pages} pages"
    );
    assert_eq!(mm.zs_get_total_pages(&pool), pages);
    // What is read keeps all pages that it lies in.
    let mut copies = vec![[0; 1]; model.order.len()];
    let views: Vec<_> = copies
        .iter_mut()
        .zip(&model.order)
        .map(|(copy, &handle)| mm.zs_obj_read_begin(&pool, handle, copy).unwrap())
        .collect();
    let read: Vec<u32> = (512..8192)
        .filter(|&p| ours(p).is_some_and(|c| c < handles))
        .collect();
    let mut stayed = 0;
    for &page in &read {
        let moves = mm.alloc_contig_range(Pfn(page), 1);
        stayed += usize::from(moves.is_err());
        match moves {
            // SAFETY: ours.
            Ok(()) => unsafe { mm.free_contig_range(Pfn(page), 1) },
            Err(obstacle) => assert!(obstacle.movable, "{obstacle:?}"),
        }
    }
    // The rest has only free objects: a quarter of them are.
    assert!(stayed * 4 > read.len() * 3, "{stayed} of {}", read.len());
    for (view, handle) in views.iter().zip(&model.order) {
        assert_eq!(view[0], model.objects[handle][0]);
    }
    drop(views);
    // And compaction of memory finds large blocks where there was compressed memory all over.
    model.check();
    mm.zs_compact(&pool);
    model.check();
    check_counts(&mm, &pool, model.objects.len());
    model.free_all();
    mm.zs_destroy_pool(pool).unwrap();
    teardown(&machine, &mm);
}

#[test]
fn pages_with_what_is_read_stay() {
    let machine = Machine::flat(8192).guarded();
    let mm = machine.boot();
    let pool = mm.zs_create_pool("full").unwrap();
    let mut model = Model::new(&mm, &pool, 1);
    for size in [1300, 3600, 4096, 700] {
        let class = SIZE_CLASSES[mm.zs_lookup_class_index(&pool, size).unwrap()];
        for _ in 0..2 * class.objects {
            model.store(size, GFP_KERNEL | __GFP_MOVABLE).unwrap();
        }
    }
    let ours = |pfn: &u32| match mm.lookup(Pfn(*pfn)).2 {
        // SAFETY: objects keep it.
        Memory::Zsmalloc(desc) => unsafe { desc.as_ref() }.class() < SIZE_CLASSES.len(),
        _ => false,
    };
    let mut copies = vec![[0; 1]; model.order.len()];
    let views: Vec<_> = copies
        .iter_mut()
        .zip(&model.order)
        .map(|(copy, &handle)| mm.zs_obj_read_begin(&pool, handle, copy).unwrap())
        .collect();
    let pages: Vec<u32> = (0..8192).filter(ours).collect();
    assert_eq!(pages.len() as u64, mm.zs_get_total_pages(&pool));
    for &page in &pages {
        let why = mm.alloc_contig_range(Pfn(page), 1).unwrap_err();
        assert_eq!(
            (why.pfn, why.kind, why.movable),
            (Pfn(page), PageType::Zsmalloc, true)
        );
    }
    drop(views);
    for &page in &pages {
        mm.alloc_contig_range(Pfn(page), 1).unwrap();
        model.check();
        // SAFETY: ours.
        unsafe { mm.free_contig_range(Pfn(page), 1) };
    }
    model.free_all();
    mm.zs_destroy_pool(pool).unwrap();
    teardown(&machine, &mm);
}

#[derive(Clone, Debug)]
enum Op {
    Store { size: usize, n: usize, gfp: usize },
    Rewrite { which: usize },
    Free { which: usize },
    FreeMany { seed: u64, share: usize },
    Compact,
    Shrink,
    Tick,
    Contig { start: u32, pages: u32 },
    Cpu { cpu: usize },
}

fn op() -> impl Strategy<Value = Op> {
    let size = prop_oneof![1 => 1..80usize, 6 => 80..3700usize, 1 => 3600..4097usize];
    prop_oneof![
        12 => (size, 1..40usize, 0..3usize).prop_map(|(size, n, gfp)| Op::Store { size, n, gfp }),
        4 => any::<usize>().prop_map(|which| Op::Rewrite { which }),
        6 => any::<usize>().prop_map(|which| Op::Free { which }),
        4 => (any::<u64>(), 2..6usize).prop_map(|(seed, share)| Op::FreeMany { seed, share }),
        4 => Just(Op::Compact),
        1 => Just(Op::Shrink),
        1 => Just(Op::Tick),
        4 => (0..8192u32, 1..600u32).prop_map(|(start, pages)| Op::Contig { start, pages }),
        2 => (0..4usize).prop_map(|cpu| Op::Cpu { cpu }),
    ]
}

fn run(machine: &Machine, ops: &[Op]) {
    let host = machine.host().build().unwrap();
    let mm = machine.boot_on(host);
    let pool = mm.zs_create_pool("model").unwrap();
    let mut model = Model::new(&mm, &pool, 1);
    let mut cpu = mm.platform().claim(0);
    for op in ops {
        match *op {
            Op::Store { size, n, gfp } => {
                for i in 0..n {
                    let size = (size + i).min(4096);
                    let gfp = [GFP_KERNEL | __GFP_MOVABLE, GFP_NOWAIT, GFP_ATOMIC][gfp];
                    if model.store(size, gfp).is_err() {
                        break;
                    }
                }
            }
            Op::Rewrite { which } => model.rewrite(which),
            Op::Free { which } => model.free(which),
            Op::FreeMany { seed, share } => {
                let mut rng = Rng(seed);
                for _ in 0..model.order.len() * (share - 1) / share {
                    model.free(rng.below(model.order.len()));
                }
            }
            Op::Compact => {
                let before = mm.zs_get_total_pages(&pool);
                let freed = mm.zs_compact(&pool);
                assert_eq!(mm.zs_get_total_pages(&pool), before - freed as u64);
                check_compact(&mm, &pool);
                model.check();
            }
            Op::Shrink => {
                mm.shrink();
                model.check();
            }
            Op::Tick => mm.tick(),
            Op::Contig { start, pages } => {
                let start = 1 + start % (machine.end() - 1);
                let pages = pages.min(machine.end() - start);
                if mm.alloc_contig_range(Pfn(start), pages).is_ok() {
                    model.check();
                    // SAFETY: the range is ours, and nobody has it.
                    unsafe { mm.free_contig_range(Pfn(start), pages) };
                }
                model.check();
            }
            Op::Cpu { cpu: to } => {
                drop(cpu);
                cpu = mm.platform().claim(to % machine.cpus);
            }
        }
        check_counts(&mm, &pool, model.objects.len());
    }
    drop(cpu);
    model.check();
    model.free_all();
    mm.zs_destroy_pool(pool).unwrap();
    teardown(machine, &mm);
}

proptest::proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    #[test]
    fn histories(ops in proptest::collection::vec(op(), 1..60), rt in any::<bool>(), small in any::<bool>()) {
        let mut machine = Machine::flat(if small { 1024 } else { 8192 }).cpus(2);
        machine.config.preempt_rt = rt;
        run(&machine, &ops);
    }
}

/// Two threads store, read, rewrite and free, each its own objects, while a third compacts; and reads what the others may not lose.
fn threads(rt: bool) {
    let mut machine = Machine::flat(16384).guarded().cpus(3);
    machine.config.preempt_rt = rt;
    let mm = machine.boot_on(machine.host().build().unwrap());
    let pool = mm.zs_create_pool("threads").unwrap();
    let (left, moved) = (AtomicUsize::new(2), AtomicUsize::new(0));
    let ranges = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for seed in 1..=2 {
            let (mm, pool, left, ranges) = (&mm, &pool, &left, &ranges);
            scope.spawn(move || {
                let _cpu = mm.platform().claim(seed - 1);
                let mut model = Model::new(mm, pool, seed as u64);
                let mut rng = Rng(seed as u64);
                for round in 0..3_000_000 {
                    // Until the third has had its share, on a machine that others are busy on too.
                    if round >= 60_000 && ranges.load(Ordering::Relaxed) > 10 {
                        break;
                    }
                    // Up for a while, down for a while: so that there is something to compact.
                    let up = round / 5000 % 2 == 0;
                    match rng.below(10) {
                        0..=3 if up => model
                            .store(size(&mut rng), GFP_KERNEL | __GFP_MOVABLE)
                            .unwrap(),
                        0..=3 => model.free(rng.below(model.order.len().max(1))),
                        4..=7 if !model.order.is_empty() => {
                            model.check_one(model.order[rng.below(model.order.len())]);
                        }
                        8 => model.rewrite(rng.below(1 << 20)),
                        _ if rng.one_in(2000) => {
                            mm.zs_compact(pool);
                        }
                        _ => {}
                    }
                }
                model.check();
                model.free_all();
                left.fetch_sub(1, Ordering::Relaxed);
            });
        }
        let _cpu = mm.platform().claim(2);
        let mut rng = Rng(77);
        while left.load(Ordering::Relaxed) > 0 && !std::thread::panicking() {
            moved.fetch_add(mm.zs_compact(&pool), Ordering::Relaxed);
            mm.rcu_work();
            let start = Pfn(64 * (1 + rng.below(200) as u32));
            if mm.alloc_contig_range(start, 64).is_ok() {
                ranges.fetch_add(1, Ordering::Relaxed);
                // SAFETY: the range is ours, and nobody has it.
                unsafe { mm.free_contig_range(start, 64) };
            }
            std::thread::yield_now();
        }
    });
    let stats = mm.zs_pool_stats(&pool);
    assert!(
        stats.objects_moved > 100 && moved.into_inner() > 0,
        "{stats:?}"
    );
    assert!(ranges.into_inner() > 10);
    mm.zs_destroy_pool(pool).unwrap();
    teardown(&machine, &mm);
}

#[test]
fn two_threads_and_compaction() {
    threads(false);
}

#[test]
fn two_threads_and_compaction_where_locks_sleep() {
    threads(true);
}

#[test]
fn short_memory_compacts() {
    let machine = Machine::flat(4096).guarded();
    let mm = machine.boot();
    let pool = mm.zs_create_pool("shrinker").unwrap();
    let mut model = Model::new(&mm, &pool, 1);
    let mut rng = Rng(7);
    while mm.ledger().free + mm.ledger().untouched > 1200 {
        for _ in 0..50 {
            model.store(size(&mut rng), GFP_KERNEL).unwrap();
        }
    }
    for _ in 0..model.order.len() * 3 / 4 {
        model.free(rng.below(model.order.len()));
    }
    let held = mm.zs_get_total_pages(&pool);
    let mut pages = Vec::new();
    while let Ok(page) = mm.alloc_pages(GFP_KERNEL, 0) {
        pages.push(page);
    }
    let stats = mm.zs_pool_stats(&pool);
    assert!(stats.pages_compacted > held / 4, "{stats:?} of {held}");
    check_compact(&mm, &pool);
    model.check();
    pages.into_iter().for_each(|page| free(&mm, page));
    model.free_all();
    mm.zs_destroy_pool(pool).unwrap();
    teardown(&machine, &mm);
}

/// Every allocation of a pool's life fails once.
#[test]
fn every_point_fails_once() {
    let machine = Machine::flat(4096).guarded();
    let (mut failed, mut points) = (0, 0);
    for warm in [false, true] {
        for n in 0.. {
            let mm = machine.boot_on(machine.host().build().unwrap());
            if warm {
                let page = mm.alloc_pages(GFP_KERNEL, 0).unwrap();
                free(&mm, page);
            }
            mm.platform().faults().fail_nth(n);
            let mut errors = 0;
            if let Ok(pool) = mm.zs_create_pool("faults") {
                let mut model = Model::new(&mm, &pool, n);
                for size in [
                    1, 40, 1300, 3000, 3600, 4096, 1300, 600, 600, 600, 600, 600, 600, 600,
                ] {
                    let before = mm.zs_pool_stats(&pool);
                    if model.store(size, GFP_KERNEL).is_err() {
                        errors += 1;
                        // A page of handles that was made is not lost, and nothing else was.
                        let after = mm.zs_pool_stats(&pool);
                        assert_eq!((after.objects, after.pages), (before.objects, before.pages));
                    }
                }
                model.free(2);
                mm.zs_compact(&pool);
                model.check();
                model.free_all();
                mm.zs_destroy_pool(pool).unwrap();
            } else {
                errors += 1;
            }
            let (_, fired) = mm.platform().faults().off();
            teardown(&machine, &mm);
            failed += errors;
            if fired == 0 {
                points += n;
                break;
            }
        }
    }
    // Not all of them are fatal: what a slab of descriptors cannot have may be had elsewhere.
    assert!(points > 100 && failed > points / 2, "{failed} of {points}");
}

/// Faults at random, in the middle of everything.
#[test]
fn faults_at_random() {
    let machine = Machine::flat(8192).guarded();
    let mm = machine.boot();
    let pool = mm.zs_create_pool("faults").unwrap();
    let mut model = Model::new(&mm, &pool, 5);
    let mut rng = Rng(5);
    let mut failed = 0;
    mm.platform().faults().fail_one_in(20, 9);
    for _ in 0..20_000 {
        match rng.below(20) {
            0..=9 => failed += u64::from(model.store(size(&mut rng), GFP_NOWAIT).is_err()),
            10..=18 => model.free(rng.below(1 << 20)),
            _ if rng.one_in(50) => drop(mm.zs_compact(&pool)),
            _ => model.rewrite(rng.below(1 << 20)),
        }
    }
    mm.platform().faults().off();
    assert!(failed > 100, "{failed}");
    check_counts(&mm, &pool, model.objects.len());
    model.check();
    model.free_all();
    mm.zs_destroy_pool(pool).unwrap();
    teardown(&machine, &mm);
}
