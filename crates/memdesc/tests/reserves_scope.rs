//! Reserves for whole tasks, and waiting: ordinary calls are served when ordinary memory is gone, without reclaim; who is refused at a limit sleeps until there is
//! room, and is woken by every way of making some.
#![allow(missing_docs)]

mod common;
#[path = "common/reserves.rs"]
mod shared;

use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use common::*;
use memdesc::gfp::*;
use memdesc::*;
use memdesc_host::Host;
use shared::*;

const QUIET: Flags = __GFP_NOWARN;

fn boot(rt: bool) -> (Machine, Mm<Hooked>, Arc<AtomicU64>) {
    let mut machine = Machine::flat(2048).unsampled().cpus(4);
    machine.config.preempt_rt = rt;
    let mut hooked = Hooked::new(machine.host().floating(4).build().unwrap());
    let reclaims = Arc::new(AtomicU64::new(0));
    let counts = reclaims.clone();
    hooked.on_reclaim = Some(Box::new(move |_| {
        counts.fetch_add(1, Ordering::Relaxed);
        0
    }));
    let mm = machine.boot_on(hooked);
    (machine, mm, reclaims)
}

fn connected<'a>(
    mm: &'a Mm<Hooked>,
    parent: Option<&Reserve<'a, Hooked>>,
    demand: Demand<'_>,
) -> Reserve<'a, Hooked> {
    let reserve = mm.reserve("one", demand).unwrap();
    reserve.connect(parent).unwrap();
    reserve
}

fn pages(count: usize) -> Demand<'static> {
    Demand::Pages { order: 0, count }
}

fn mix(bytes: usize) -> Demand<'static> {
    Demand::Kmalloc {
        bytes,
        min: 100,
        max: 16_384,
    }
}

#[test]
fn a_task_with_a_reserve_is_served_and_does_not_reclaim() {
    for rt in [false, true] {
        let (machine, mm, reclaims) = boot(rt);
        let cache = mm
            .kmem_cache_create("objects", 600, 0, CacheFlags::EMPTY, None)
            .unwrap();
        let group = mm.reserve("group", Demand::None).unwrap();
        let data = connected(&mm, Some(&group), mix(60_000));
        let frags = connected(&mm, Some(&group), pages(8));
        let objects = Demand::Objects {
            cache: &cache,
            count: 40,
        };
        let objects = connected(&mm, Some(&group), objects);
        group.connect(None).unwrap();
        let adversary = Adversary::take_all_reclaiming(&mm);
        let usage = || [&data, &frags, &objects].map(|reserve| view(reserve).usage);
        // All ordinary calls; each says whether it was served, and from a reserve.
        let calls = |gfp: Flags| {
            let gfp = gfp | QUIET;
            let mut served = Vec::new();
            let mut got = |ptr: Result<NonNull<u8>, AllocError>| {
                served.push(ptr.is_ok());
                if let Ok(ptr) = ptr {
                    assert!(mm.is_from_reserve(ptr.as_ptr()));
                    fill(ptr, 100, 1);
                    kfree(&mm, ptr);
                }
            };
            got(mm.kmalloc(300, gfp));
            got(mm.kmalloc(300, gfp | __GFP_RECLAIMABLE));
            got(mm.kmalloc(9000, gfp));
            got(mm.kmem_cache_alloc(&cache, gfp));
            let page = mm.alloc_pages(gfp, 0);
            if let Ok(pfn) = page {
                assert!(mm.page_is_from_reserve(pfn));
                free(&mm, pfn);
            }
            served.push(page.is_ok());
            let mut many = [Pfn::NONE; 8];
            let n = mm.alloc_pages_bulk(gfp, &mut many);
            many[..n].iter().for_each(|&pfn| free(&mm, pfn));
            served.push(n == 8);
            let mut many = [std::ptr::null_mut(); 40];
            let bulk = mm.kmem_cache_alloc_bulk(&cache, gfp, &mut many);
            if bulk.is_ok() {
                // SAFETY: just had.
                unsafe { mm.kmem_cache_free_bulk(&cache, &many) };
            }
            served.push(bulk.is_ok());
            assert_eq!(usage(), [0; 3]);
            served
        };
        let all = |gfp| assert_eq!(calls(gfp), [true; 7], "{gfp:?}");
        let none = |gfp| assert_eq!(calls(gfp), [false; 7], "{gfp:?}");
        for gfp in [
            GFP_ATOMIC,
            GFP_KERNEL | __GFP_NORETRY,
            GFP_ATOMIC | __GFP_MEMALLOC,
        ] {
            none(gfp);
        }
        assert!(reclaims.swap(0, Ordering::Relaxed) > 0);
        {
            let _scope = Host::reserve_scope(group.id());
            for gfp in [
                GFP_ATOMIC,
                GFP_KERNEL,
                GFP_NOIO,
                GFP_ATOMIC | __GFP_MEMALLOC,
            ] {
                all(gfp);
                none(gfp | __GFP_NOMEMALLOC);
            }
            // What the task's reserve does not hold it does not get, and does not reclaim for either.
            assert!(mm.alloc_pages(GFP_KERNEL | QUIET, 1).is_err());
            assert!(mm.kmalloc(40_000, GFP_KERNEL | QUIET).is_err());
            assert_eq!(reclaims.load(Ordering::Relaxed), 0);
            // An inner scope is another one, and the outer one comes back.
            {
                let _inner = Host::reserve_scope(frags.id());
                assert!(mm.kmalloc(300, GFP_ATOMIC | QUIET).is_err());
                free(&mm, mm.alloc_pages(GFP_ATOMIC, 0).unwrap());
                let _none = Host::reserve_scope(0);
                assert!(mm.alloc_pages(GFP_ATOMIC | QUIET, 0).is_err());
            }
            all(GFP_ATOMIC);
            // Full, then refused.
            let live: Vec<_> = (0..8)
                .map(|_| mm.alloc_pages(GFP_ATOMIC, 0).unwrap())
                .collect();
            let more = mm.alloc_pages(GFP_ATOMIC | QUIET, 0);
            assert_eq!(more, Err(AllocError::ReserveLimit));
            live.into_iter().for_each(|pfn| free(&mm, pfn));
            // Nodes stay for good: they are not made of what is set aside.
            let before = mm.set_aside_pages();
            let more: Vec<_> = (0..9)
                .map_while(|_| mm.reserve("more", mix(1)).ok())
                .collect();
            assert!(more.len() < 9 && mm.set_aside_pages() == before);
            assert_eq!(usage(), [0; 3]);
            more.into_iter().for_each(down);
        }
        none(GFP_ATOMIC);
        // By a flag of the request.
        mm.set_memalloc_reserve(Some(&group));
        all(GFP_ATOMIC | __GFP_MEMALLOC);
        none(GFP_ATOMIC);
        none(GFP_ATOMIC | __GFP_MEMALLOC | __GFP_NOMEMALLOC);
        mm.set_memalloc_reserve(None);
        none(GFP_ATOMIC | __GFP_MEMALLOC);
        // A sizing reserve's requests are its parent's.
        adversary.give_all(&mm);
        let sizing = mm.reserve_sizing("sizing", pages(1)).unwrap();
        sizing.connect(Some(&frags)).unwrap();
        let adversary = Adversary::take_all(&mm);
        {
            let _scope = Host::reserve_scope(sizing.id());
            let live: Vec<_> = (0..9)
                .map(|_| mm.alloc_pages(GFP_ATOMIC, 0).unwrap())
                .collect();
            assert!(mm.alloc_pages(GFP_ATOMIC | QUIET, 0).is_err());
            live.into_iter().for_each(|pfn| free(&mm, pfn));
        }
        // What may take no lock takes none.
        let fast = data.kmalloc(300, __GFP_FAST_TRY);
        assert!(matches!(fast, Err(AllocError::Empty)), "{fast:?}");
        adversary.check(&mm);
        adversary.give_all(&mm);
        [sizing, data, frags, objects, group]
            .into_iter()
            .for_each(down);
        mm.kmem_cache_destroy(cache).unwrap();
        end(&machine, &mm);
    }
}

/// A group's limit is no reason why what was promised is not there, and what a reserve is charged no group is charged as well.
#[test]
fn accounted_requests_of_a_task_with_a_reserve() {
    let (machine, mm, _) = boot(false);
    let cache = mm
        .kmem_cache_create("accounted", 600, 0, CacheFlags::ACCOUNT, None)
        .unwrap();
    let group = mm.reserve("group", Demand::None).unwrap();
    let data = connected(&mm, Some(&group), mix(60_000));
    let frags = connected(&mm, Some(&group), pages(8));
    let objects = Demand::Objects {
        cache: &cache,
        count: 40,
    };
    let objects = connected(&mm, Some(&group), objects);
    group.connect(None).unwrap();
    for limit in [0, 1 << 40] {
        let memcg = mm.memcg_create(None, "memcg", limit).unwrap();
        let adversary = Adversary::take_all(&mm);
        {
            let _charged = Host::memcg_scope(memcg.id());
            let _scope = Host::reserve_scope(group.id());
            let gfp = GFP_ATOMIC | __GFP_ACCOUNT;
            let got = [
                mm.kmalloc(300, gfp).unwrap(),
                mm.kmalloc(9000, gfp).unwrap(),
                mm.kmem_cache_alloc(&cache, gfp).unwrap(),
                mm.kmem_cache_alloc(&cache, GFP_ATOMIC).unwrap(),
            ];
            let pfn = mm.alloc_pages(gfp, 0).unwrap();
            assert!(mm.page_is_from_reserve(pfn));
            assert!(got.iter().all(|p| mm.is_from_reserve(p.as_ptr())));
            assert_eq!(memcg.usage(), 0);
            mm.memcg_check().unwrap();
            free(&mm, pfn);
            got.into_iter().for_each(|ptr| kfree(&mm, ptr));
            assert_eq!(view(&group).usage, 0);
            mm.memcg_check().unwrap();
        }
        adversary.give_all(&mm);
        drop(memcg);
    }
    [data, frags, objects, group].into_iter().for_each(down);
    mm.kmem_cache_destroy(cache).unwrap();
    end(&machine, &mm);
}

/// Has `ask` wait at a limit, then makes room, and waits for it to come through.
#[track_caller]
fn waits<T: Send>(
    what: &str,
    waits: impl Fn() -> u64,
    ask: impl FnOnce() -> T + Send,
    make_room: impl FnOnce(),
) -> T {
    let before = waits();
    let (done, result) = mpsc::channel();
    std::thread::scope(|scope| {
        scope.spawn(move || done.send(ask()).unwrap());
        while waits() == before {
            if let Ok(_early) = result.try_recv() {
                panic!("{what}: did not wait");
            }
            std::thread::yield_now();
        }
        make_room();
        match result.recv_timeout(Duration::from_secs(30)) {
            Ok(got) => got,
            // The thread sleeps for good: no way to end in order.
            Err(_) => {
                eprintln!("{what}: nobody woke who waits");
                std::process::abort()
            }
        }
    })
}

/// Memory that goes to another thread.
struct Sent<T>(T);
// SAFETY: one thread at a time has it.
unsafe impl<T> Send for Sent<T> {}

#[test]
fn who_waits_at_a_limit_is_woken_by_each_way_of_uncharging() {
    for rt in [false, true] {
        let (machine, mm, _) = boot(rt);
        let cache = mm
            .kmem_cache_create("objects", 600, 0, CacheFlags::EMPTY, None)
            .unwrap();
        let objects = Demand::Objects {
            cache: &cache,
            count: 1,
        };
        let objects = connected(&mm, None, objects);
        let frags = connected(&mm, None, pages(1));
        let adversary = Adversary::take_all(&mm);
        type Free = fn(&Mm<Hooked>, &Cache<'_>, NonNull<u8>);
        let frees: [(&str, Free); 7] = [
            ("kmem_cache_free", |mm, cache, ptr| {
                cache_free(mm, cache, ptr)
            }),
            ("kfree", |mm, _, ptr| kfree(mm, ptr)),
            ("kmem_cache_free_bulk", |mm, cache, ptr| {
                // SAFETY: the caller has it, here and below.
                unsafe { mm.kmem_cache_free_bulk(cache, &[ptr.as_ptr()]) }
            }),
            ("kfree_nolock", |mm, _, ptr| {
                // SAFETY: as above.
                unsafe { mm.kfree_nolock(ptr) };
                mm.tick();
            }),
            ("kvfree_rcu", |mm, _, ptr| {
                let head = ptr.cast::<rcu::RcuHead>();
                // SAFETY: large and aligned enough, and ours.
                unsafe {
                    head.write(rcu::RcuHead::new());
                    mm.kvfree_rcu(ptr, head);
                }
                mm.kvfree_rcu_barrier();
            }),
            ("kvfree_rcu_mightsleep", |mm, _, ptr| {
                // SAFETY: as above.
                unsafe { mm.kvfree_rcu_mightsleep(ptr) };
                mm.kvfree_rcu_barrier();
            }),
            ("kvfree", |mm, _, ptr| {
                // SAFETY: as above.
                unsafe { mm.kvfree(ptr) };
            }),
        ];
        for (name, give) in frees {
            let first = objects.kmem_cache_alloc(&cache, GFP_KERNEL).unwrap();
            let ask = || objects.kmem_cache_alloc(&cache, GFP_KERNEL).map(Sent);
            let number = || view(&objects).waits;
            let Sent(second) = waits(name, number, ask, || give(&mm, &cache, first)).unwrap();
            assert!(mm.is_from_reserve(second.as_ptr()));
            kfree(&mm, second);
        }
        type FreePage = fn(&Mm<Hooked>, Pfn);
        let frees: [(&str, FreePage); 3] = [
            ("free_pages", |mm, pfn| free(mm, pfn)),
            // SAFETY: the caller has it, here and below.
            ("free_pages_nolock", |mm, pfn| unsafe {
                mm.free_pages_nolock(pfn)
            }),
            // SAFETY: as above.
            ("free_pages_bulk", |mm, pfn| unsafe {
                mm.free_pages_bulk(&[pfn])
            }),
        ];
        let ask = || frags.alloc_pages(GFP_KERNEL, 0);
        let number = || view(&frags).waits;
        for (name, give) in frees {
            let first = frags.alloc_pages(GFP_KERNEL, 0).unwrap();
            free(&mm, waits(name, number, ask, || give(&mm, first)).unwrap());
        }
        // By hand.
        frags.charge(1).unwrap();
        let room = || frags.uncharge(1).unwrap();
        free(&mm, waits("uncharge", number, ask, room).unwrap());
        // Ordinary memory that came free meanwhile is as good.
        let first = frags.alloc_pages(GFP_KERNEL, 0).unwrap();
        // Nobody waits who says that he does not, or for what never fits.
        for gfp in [GFP_ATOMIC, GFP_NOWAIT, GFP_KERNEL | __GFP_NORETRY] {
            let got = frags.alloc_pages(gfp, 0);
            assert_eq!(got, Err(AllocError::ReserveLimit));
        }
        free(&mm, first);
        frags.set_limit(Some(4095)).unwrap();
        let never = frags.alloc_pages(GFP_KERNEL, 0);
        assert_eq!(never, Err(AllocError::ReserveLimit));
        {
            let _scope = Host::reserve_scope(frags.id());
            let never = mm.alloc_pages(GFP_KERNEL | QUIET, 0);
            assert_eq!(never, Err(AllocError::ReserveLimit));
        }
        adversary.give_all(&mm);
        [objects, frags].into_iter().for_each(down);
        mm.kmem_cache_destroy(cache).unwrap();
        end(&machine, &mm);
    }
}

#[test]
fn who_waits_at_a_limit_looks_again_when_it_moves() {
    let (machine, mm, _) = boot(false);
    let group = connected(&mm, None, Demand::None);
    let frags = connected(&mm, Some(&group), pages(2));
    let other = connected(&mm, Some(&group), pages(2));
    let ask = || frags.alloc_pages(GFP_KERNEL, 0);
    let number = || view(&frags).waits;

    // A limit above is lifted.
    group.set_limit(Some(4096)).unwrap();
    let adversary = Adversary::take_all(&mm);
    let first = frags.alloc_pages(GFP_KERNEL, 0).unwrap();
    let room = || group.set_limit(None).unwrap();
    free(&mm, waits("set_limit", number, ask, room).unwrap());
    adversary.give_all(&mm);
    // The demand grows, its own or by one who sizes it.
    for sized in [false, true] {
        frags.resize(pages(1)).unwrap();
        let sizing = mm.reserve_sizing("sizing", pages(1)).unwrap();
        let adversary = Adversary::take_all(&mm);
        // For what is to be set aside.
        let (mut some, rest) = (adversary.pages, adversary.objects);
        let keep = some.split_off(some.len() / 2);
        let room = || {
            some.into_iter().for_each(|pfn| free(&mm, pfn));
            if sized {
                sizing.connect(Some(&frags)).unwrap();
            } else {
                frags.resize(pages(2)).unwrap();
            }
        };
        free(&mm, waits("resize", number, ask, room).unwrap());
        let adversary = Adversary {
            pages: keep,
            objects: rest,
        };
        adversary.give_all(&mm);
        down(sizing);
        frags.resize(pages(2)).unwrap();
    }
    free(&mm, first);
    // It is taken out of the tree: no room will come.
    group.set_limit(Some(4096)).unwrap();
    let adversary = Adversary::take_all(&mm);
    let first = other.alloc_pages(GFP_KERNEL, 0).unwrap();
    let gone = waits("disconnect", number, ask, || frags.disconnect().unwrap());
    assert_eq!(gone, Err(AllocError::Detached));
    free(&mm, first);
    adversary.give_all(&mm);
    frags.connect(Some(&group)).unwrap();
    group.set_limit(None).unwrap();

    // A task that waits for a group takes from whichever of those below has room first.
    for from in 0..2 {
        let adversary = Adversary::take_all(&mm);
        let mut live: Vec<_> = [&frags, &frags, &other, &other]
            .map(|reserve| reserve.alloc_pages(GFP_KERNEL, 0).unwrap())
            .into();
        let ask = || {
            let _scope = Host::reserve_scope(group.id());
            mm.alloc_pages(GFP_KERNEL, 0)
        };
        let freed = live.remove(from * 2);
        let number = || view(&group).waits;
        let got = waits("a group", number, ask, || free(&mm, freed)).unwrap();
        assert!(mm.page_is_from_reserve(got));
        live.into_iter().chain([got]).for_each(|pfn| free(&mm, pfn));
        adversary.give_all(&mm);
    }
    assert_eq!(view(&group).usage, 0);
    [frags, other, group].into_iter().for_each(down);
    end(&machine, &mm);
}
