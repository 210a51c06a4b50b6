//! Reserves when allocations fail: what was promised is served though every allocation of ordinary memory fails, and a change of the tree of which one
//! allocation fails has not happened.
#![allow(missing_docs)]

mod common;
#[path = "common/reserves.rs"]
mod shared;

use std::ptr::NonNull;

use common::*;
use memdesc::gfp::*;
use memdesc::*;
use memdesc_host::Host;
use shared::*;

fn boot(rt: bool, cpus: usize) -> (Machine, Mm<Host>) {
    let mut machine = Machine::flat(2048).unsampled().cpus(cpus);
    machine.config.preempt_rt = rt;
    let mm = machine.boot();
    (machine, mm)
}

fn mix(bytes: usize) -> Demand<'static> {
    Demand::Kmalloc {
        bytes,
        min: 50,
        max: 20_000,
    }
}

fn pages(order: usize, count: usize) -> Demand<'static> {
    Demand::Pages { order, count }
}

/// By the handle, and by a task's ordinary calls: of all that fails nothing but the ordinary memory is gone.
#[test]
fn what_is_promised_is_served_while_every_allocation_fails() {
    for (rt, cpus) in [(false, 1), (true, 1), (false, 2), (true, 2)] {
        let (machine, mm) = boot(rt, cpus);
        let cache = mm
            .kmem_cache_create("objects", 300, 0, CacheFlags::EMPTY, None)
            .unwrap();
        let group = mm.reserve("group", Demand::None).unwrap();
        let data = mm.reserve("data", mix(80_000)).unwrap();
        let frags = mm.reserve("frags", pages(2, 5)).unwrap();
        let count = 70;
        let objects = Demand::Objects {
            cache: &cache,
            count,
        };
        let heads = mm.reserve("heads", objects).unwrap();
        for child in [&data, &frags, &heads] {
            child.connect(Some(&group)).unwrap();
        }
        group.connect(None).unwrap();
        let bound = mm.set_aside_pages();
        // Ordinary memory is there, and every allocation from it fails.
        mm.platform().faults().fail_one_in(1, 7);
        assert_eq!(mm.alloc_pages(GFP_KERNEL, 0), Err(AllocError::Injected));
        let mut rng = Rng(5);
        for by_task in [false, true] {
            for gfp in [
                GFP_ATOMIC,
                GFP_KERNEL,
                GFP_KERNEL | __GFP_NORETRY,
                GFP_NOWAIT,
            ] {
                let _scope = by_task.then(|| Host::reserve_scope(group.id()));
                let (mut live, mut asked): (Vec<(NonNull<u8>, usize)>, usize) = (Vec::new(), 0);
                for _ in 0..scaled(400, 20) {
                    let most = if rng.one_in(6) { 19_000 } else { 900 };
                    let size = 50 + rng.below(most);
                    if asked + size <= 80_000 && !rng.one_in(3) {
                        let ptr = if by_task {
                            mm.kmalloc(size, gfp)
                        } else {
                            data.kmalloc(size, gfp)
                        };
                        let ptr = ptr.unwrap();
                        assert!(mm.is_from_reserve(ptr.as_ptr()));
                        fill(ptr, size, size as u8);
                        live.push((ptr, size));
                        asked += size;
                    } else if !live.is_empty() {
                        let (ptr, size) = live.swap_remove(rng.below(live.len()));
                        assert!(bytes(ptr, size).iter().all(|&b| b == size as u8));
                        kfree(&mm, ptr);
                        asked -= size;
                    }
                }
                live.into_iter().for_each(|(ptr, _)| kfree(&mm, ptr));
                let some: Vec<_> = (0..5)
                    .map(|_| {
                        if by_task {
                            mm.alloc_pages(gfp, 2).unwrap()
                        } else {
                            frags.alloc_pages(gfp, 2).unwrap()
                        }
                    })
                    .collect();
                assert!(some.iter().all(|&pfn| mm.page_is_from_reserve(pfn)));
                let all: Vec<_> = (0..count)
                    .map(|_| {
                        if by_task {
                            mm.kmem_cache_alloc(&cache, gfp).unwrap()
                        } else {
                            heads.kmem_cache_alloc(&cache, gfp).unwrap()
                        }
                    })
                    .collect();
                some.into_iter().for_each(|pfn| free(&mm, pfn));
                all.into_iter().for_each(|o| cache_free(&mm, &cache, o));
                mm.tick();
                assert_eq!((view(&group).usage, mm.set_aside_pages()), (0, bound));
            }
        }
        let (_, failed) = mm.platform().faults().off();
        assert!(failed > 0);
        [data, frags, heads, group].into_iter().for_each(down);
        mm.kmem_cache_destroy(cache).unwrap();
        end(&machine, &mm);
    }
}

/// All that is seen of the reserves.
fn shape(mm: &Mm<Host>) -> Vec<(String, bool, u64, u64, u64, u64)> {
    let mut all = Vec::new();
    mm.reserve_info(|v| {
        let name = format!("{} {}", v.name(), v.depth);
        all.push((name, v.connected, v.pages, v.held_pages, v.limit, v.usage));
    });
    all
}

/// Does `change` with its first, second … allocation failing until it goes through without one that fails; what failed has changed nothing. `undo` takes a change
/// back.
#[track_caller]
fn each_fails<T, E: std::fmt::Debug>(
    mm: &Mm<Host>,
    what: &str,
    mut change: impl FnMut() -> Result<T, E>,
    mut undo: impl FnMut(T),
) -> T {
    let mut failures = 0;
    for nth in 0.. {
        let before = (shape(mm), mm.set_aside_pages());
        mm.platform().faults().fail_nth(nth);
        let done = change();
        let (passed, failed) = mm.platform().faults().off();
        match done {
            Err(why) => {
                assert!(failed > 0, "{what}: {why:?} though nothing failed");
                failures += 1;
                assert_eq!((shape(mm), mm.set_aside_pages()), before, "{what}, {nth}");
                assert!(ledger(mm).balanced);
            }
            Ok(done) if failed == 0 => {
                assert!(passed <= nth);
                assert!(failures > 0, "{what}: nothing that it allocates failed");
                return done;
            }
            // It did without.
            Ok(done) => {
                undo(done);
                assert_eq!(
                    (shape(mm), mm.set_aside_pages()),
                    before,
                    "{what}, {nth} undone"
                );
            }
        }
        // Descriptors that are at hand hide that one is needed.
        mm.shrink();
    }
    unreachable!()
}

#[test]
fn a_change_of_which_one_allocation_fails_has_not_happened() {
    for (rt, cpus) in [(false, 1), (true, 2)] {
        let (machine, mm) = boot(rt, cpus);
        let cache = mm
            .kmem_cache_create("objects", 900, 0, CacheFlags::EMPTY, None)
            .unwrap();
        let made = |name: &'static str, demand| {
            let make = || mm.reserve(name, demand);
            // Nodes that were made are used again, and then need nothing.
            each_fails_or_needs_nothing(&mm, name, make, down)
        };
        let objects = |count| Demand::Objects {
            cache: &cache,
            count,
        };
        let group = made("group", Demand::None);
        let data = made("data", mix(70_000));
        let frags = made("frags", pages(1, 6));
        let heads = made("heads", objects(40));
        for child in [&data, &frags, &heads] {
            child.connect(Some(&group)).unwrap();
        }
        let connect = || group.connect(None);
        each_fails(&mm, "connect", connect, |()| group.disconnect().unwrap());
        let resize = || data.resize(mix(200_000));
        let back = |()| data.resize(mix(70_000)).unwrap();
        each_fails(&mm, "resize of a mix", resize, back);
        let resize = || frags.resize(pages(1, 14));
        let back = |()| frags.resize(pages(1, 6)).unwrap();
        each_fails(&mm, "resize of pages", resize, back);
        let resize = || heads.resize(objects(100));
        let back = |()| heads.resize(objects(40)).unwrap();
        each_fails(&mm, "resize of objects", resize, back);
        let sizing = mm.reserve_sizing("sizing", pages(1, 5)).unwrap();
        let connect = || sizing.connect(Some(&frags));
        each_fails(&mm, "sizing", connect, |()| sizing.disconnect().unwrap());
        let resize = || sizing.resize(pages(1, 9));
        let back = |()| sizing.resize(pages(1, 5)).unwrap();
        each_fails(&mm, "resize of a sizing one", resize, back);
        // All of it is there.
        let adversary = Adversary::take_all(&mm);
        let some: Vec<_> = (0..23)
            .map(|_| frags.alloc_pages(GFP_ATOMIC, 1).unwrap())
            .collect();
        some.into_iter().for_each(|pfn| free(&mm, pfn));
        adversary.give_all(&mm);
        [sizing, data, frags, heads, group]
            .into_iter()
            .for_each(down);
        mm.kmem_cache_destroy(cache).unwrap();
        end(&machine, &mm);
    }
}

/// As [`each_fails`], of what may find all that it needs in place.
fn each_fails_or_needs_nothing<T, E: std::fmt::Debug>(
    mm: &Mm<Host>,
    what: &str,
    mut change: impl FnMut() -> Result<T, E>,
    mut undo: impl FnMut(T),
) -> T {
    for nth in 0.. {
        let before = mm.set_aside_pages();
        mm.platform().faults().fail_nth(nth);
        let done = change();
        let (_, failed) = mm.platform().faults().off();
        match done {
            Err(why) => assert!(failed > 0, "{what}: {why:?} though nothing failed"),
            Ok(done) if failed == 0 => return done,
            Ok(done) => undo(done),
        }
        assert_eq!(mm.set_aside_pages(), before);
        assert!(ledger(mm).balanced);
    }
    unreachable!()
}
