//! Reserves in corners: wrong frees, caches of all kinds, zones, pages that fail, trees that are changed while they are used. What is refused changes nothing.
#![allow(missing_docs)]

mod common;
#[path = "common/reserves.rs"]
mod shared;

use std::collections::HashSet;
use std::ptr::NonNull;

use common::*;
use memdesc::gfp::*;
use memdesc::rcu::Rcu;
use memdesc::*;
use memdesc_host::Host;
use shared::*;

const PAGE: usize = 4096;

fn boot_with(change: impl FnOnce(&mut Config)) -> (Machine, Mm<Host>, Reports) {
    let mut machine = Machine::flat(2048).unsampled().cpus(2);
    change(&mut machine.config);
    let reports = Reports::default();
    let mm = machine.boot_on(reports.on(machine.host()).build().unwrap());
    (machine, mm, reports)
}

fn boot() -> (Machine, Mm<Host>, Reports) {
    boot_with(|_| {})
}

fn kmem_cache<'a>(mm: &'a Mm<Host>, name: &str, size: usize, flags: CacheFlags) -> Cache<'a> {
    mm.kmem_cache_create(name, size, 0, flags, None).unwrap()
}

fn pages(order: usize, count: usize) -> Demand<'static> {
    Demand::Pages { order, count }
}

/// A reserve under the root.
fn connected<'a>(mm: &'a Mm<Host>, demand: Demand<'_>) -> Reserve<'a, Host> {
    let reserve = mm.reserve("one", demand).unwrap();
    reserve.connect(None).unwrap();
    reserve
}

#[test]
fn what_is_freed_wrongly_is_reported_and_uncharges_nothing() {
    let (machine, mm, reports) = boot();
    let cache = kmem_cache(&mm, "ours", 1000, CacheFlags::EMPTY);
    let other = kmem_cache(&mm, "others", 1000, CacheFlags::EMPTY);
    let objects = Demand::Objects {
        cache: &cache,
        count: 8,
    };
    let objects = connected(&mm, objects);
    let frags = connected(&mm, pages(1, 3));
    let min = 1 + 8192;
    let large = Demand::Kmalloc {
        bytes: 4 * min,
        min,
        max: 16384,
    };
    let large = connected(&mm, large);
    let adversary = Adversary::take_all(&mm);
    let usage = || [&objects, &frags, &large].map(|reserve| view(reserve).usage);
    let wrong = |what: Corruption, free: &dyn Fn()| {
        let before = (usage(), mm.set_aside_pages());
        free();
        let seen = reports.one();
        assert_eq!(seen.what, what, "{}", seen.text);
        assert_eq!((usage(), mm.set_aside_pages()), before);
        assert!(ledger(&mm).balanced);
    };

    let two = [(); 2].map(|()| objects.kmem_cache_alloc(&cache, GFP_ATOMIC).unwrap());
    wrong(Corruption::WrongCache, &|| cache_free(&mm, &other, two[0]));
    let inside = NonNull::new(two[0].as_ptr().wrapping_add(8)).unwrap();
    wrong(Corruption::NotAHead, &|| cache_free(&mm, &cache, inside));
    wrong(Corruption::WrongType, &|| {
        free(&mm, mm.virt_to_pfn(two[0].as_ptr()));
    });
    cache_free(&mm, &cache, two[0]);
    // Its slab has another object out.
    wrong(Corruption::DoubleFree, &|| cache_free(&mm, &cache, two[0]));
    wrong(Corruption::DoubleFree, &|| kfree(&mm, two[0]));
    cache_free(&mm, &cache, two[1]);
    // Its slab is empty, and then nobody's.
    wrong(Corruption::DoubleFree, &|| cache_free(&mm, &cache, two[1]));
    mm.tick();
    wrong(Corruption::WrongType, &|| cache_free(&mm, &cache, two[1]));
    wrong(Corruption::WrongType, &|| kfree(&mm, two[1]));

    let page = frags.alloc_pages(GFP_ATOMIC, 1).unwrap();
    let at = common::page(&mm, page);
    wrong(Corruption::WrongType, &|| kfree(&mm, at));
    wrong(Corruption::WrongType, &|| cache_free(&mm, &cache, at));
    wrong(Corruption::NotAHead, &|| free(&mm, page.add(1)));
    free(&mm, page);
    wrong(Corruption::WrongType, &|| free(&mm, page));
    // SAFETY: to see it reported.
    wrong(Corruption::WrongType, &|| unsafe {
        mm.free_pages_nolock(page)
    });

    let much = large.kmalloc(9000, GFP_ATOMIC).unwrap();
    let inside = NonNull::new(much.as_ptr().wrapping_add(PAGE)).unwrap();
    wrong(Corruption::NotAHead, &|| kfree(&mm, inside));
    kfree(&mm, much);
    wrong(Corruption::WrongType, &|| kfree(&mm, much));
    // SAFETY: to see it reported.
    wrong(Corruption::WrongType, &|| unsafe { mm.kfree_nolock(much) });
    assert_eq!(usage(), [0; 3]);
    // All of it is still there.
    let all: Vec<_> = (0..8)
        .map(|_| objects.kmem_cache_alloc(&cache, GFP_ATOMIC).unwrap())
        .collect();
    assert_eq!(all.iter().collect::<HashSet<_>>().len(), 8);
    all.into_iter().for_each(|o| cache_free(&mm, &cache, o));
    adversary.give_all(&mm);
    [objects, frags, large].into_iter().for_each(down);
    mm.kmem_cache_destroy(cache).unwrap();
    mm.kmem_cache_destroy(other).unwrap();
    end(&machine, &mm);
}

fn ctor(object: NonNull<u8>) {
    // SAFETY: an object of at least this size.
    unsafe { object.write_bytes(0xc7, 100) };
}

/// Takes all that was promised, uses it and gives it back, a few times.
fn use_all(mm: &Mm<Host>, reserve: &Reserve<'_, Host>, cache: &Cache<'_>, size: usize, n: usize) {
    let kept = matches!(cache_flags(mm, cache), Kept::Contents);
    for round in 0..4 {
        let mut live = HashSet::new();
        for i in 0..n {
            let gfp = if i % 2 == 0 && !kept {
                GFP_ATOMIC | __GFP_ZERO
            } else {
                GFP_ATOMIC
            };
            let object = reserve.kmem_cache_alloc(cache, gfp).unwrap();
            assert!(mm.is_from_reserve(object.as_ptr()), "round {round}");
            assert!(live.insert(object));
            if gfp.contains(__GFP_ZERO) {
                assert!(bytes(object, size).iter().all(|&b| b == 0));
            }
            if kept {
                assert!(bytes(object, 100).iter().all(|&b| b == 0xc7));
            } else {
                fill(object, size, 0xee);
            }
        }
        let more = reserve.kmem_cache_alloc(cache, GFP_ATOMIC);
        assert_eq!(more.err(), Some(AllocError::ReserveLimit));
        let mut seen = 0;
        mm.live_objects(cache, |object, _| {
            seen += usize::from(live.contains(&NonNull::new(object.cast_mut()).unwrap()));
        });
        assert_eq!(seen, n, "live objects that are listed");
        assert_eq!(slabinfo(mm, name_of(cache)).0, n as u64);
        assert_eq!(mm.validate(|report| panic!("{report:?}")).errors(), 0);
        for object in live {
            cache_free(mm, cache, object);
        }
        if round % 2 == 0 {
            mm.tick();
        }
        assert_eq!(view(reserve).usage, 0);
        assert_eq!(mm.validate(|report| panic!("{report:?}")).errors(), 0);
    }
}

enum Kept {
    Contents,
    Nothing,
}

fn name_of<'a>(cache: &'a Cache<'_>) -> &'a str {
    cache.name()
}

fn cache_flags(_mm: &Mm<Host>, cache: &Cache<'_>) -> Kept {
    if cache.name().contains("ctor") {
        Kept::Contents
    } else {
        Kept::Nothing
    }
}

#[test]
fn caches_of_all_kinds() {
    let kinds = [
        ("plain", CacheFlags::EMPTY),
        ("debug", CacheFlags::DEBUG),
        ("typesafe", CacheFlags::TYPESAFE_BY_RCU),
        (
            "typesafe debug",
            CacheFlags::TYPESAFE_BY_RCU | CacheFlags::DEBUG,
        ),
        ("account", CacheFlags::ACCOUNT),
        ("owners debug", CacheFlags::OWNERS | CacheFlags::DEBUG),
        ("no sheaves", CacheFlags::NO_SHEAVES),
        ("ctor", CacheFlags::EMPTY),
        ("ctor typesafe", CacheFlags::TYPESAFE_BY_RCU),
        ("ctor debug", CacheFlags::DEBUG),
    ];
    for rt in [false, true] {
        let (machine, mm, reports) = boot_with(|config| config.preempt_rt = rt);
        for (name, flags) in kinds {
            for size in [100, 700, 3000] {
                let ctor = name.contains("ctor").then_some(ctor as fn(NonNull<u8>));
                let cache = mm.kmem_cache_create(name, size, 0, flags, ctor).unwrap();
                let demand = Demand::Objects {
                    cache: &cache,
                    count: 33,
                };
                let reserve = connected(&mm, demand);
                let (bound, adversary) = (view(&reserve).pages, Adversary::take_all(&mm));
                use_all(&mm, &reserve, &cache, size, 33);
                adversary.check(&mm);
                adversary.give_all(&mm);
                assert!(mm.set_aside_pages() <= bound);
                // Not while a reserve is made for it.
                let cache = mm.kmem_cache_destroy(cache).unwrap_err();
                assert_eq!(cache.live, 0);
                down(reserve);
                mm.kmem_cache_destroy(cache.cache).unwrap();
                assert!(reports.take().is_empty());
            }
        }
        mm.platform().rcu().barrier();
        end(&machine, &mm);
    }
    let (_machine, mm, _) = boot();
    let prepaid = CacheFlags::TYPESAFE_BY_RCU | CacheFlags::RCU_PREPAID;
    if let Ok(cache) = mm.kmem_cache_create("prepaid", 100, 0, prepaid, None) {
        let demand = Demand::Objects {
            cache: &cache,
            count: 3,
        };
        assert_eq!(mm.reserve("no", demand).err(), Some(AllocError::BadSize));
        mm.kmem_cache_destroy(cache).unwrap();
    }
}

/// Objects of debug caches of kmalloc: what was asked for is known, and what lies behind is red zone.
#[test]
fn kmalloc_with_debug_flags() {
    let (machine, mm, reports) = boot_with(|config| config.slab_debug = CacheFlags::DEBUG);
    let mix = Demand::Kmalloc {
        bytes: 4000,
        min: 1,
        max: 3000,
    };
    let reserve = connected(&mm, mix);
    let adversary = Adversary::take_all(&mm);
    for gfp in [GFP_ATOMIC, GFP_ATOMIC | __GFP_ZERO] {
        for size in [1, 20, 100, 700, 1500, 3000] {
            let scoped = |on: bool| {
                let _scope = on.then(|| Host::reserve_scope(reserve.id()));
                if on {
                    mm.kmalloc(size, gfp).unwrap()
                } else {
                    reserve.kmalloc(size, gfp).unwrap()
                }
            };
            for on in [false, true] {
                let ptr = scoped(on);
                assert!(mm.is_from_reserve(ptr.as_ptr()));
                if gfp.contains(__GFP_ZERO) {
                    assert!(bytes(ptr, size).iter().all(|&b| b == 0), "{size}");
                }
                fill(ptr, size, 0x11);
                kfree(&mm, ptr);
                assert_eq!(reports.take(), [], "{size} {gfp:?}");
            }
        }
    }
    let ptr = reserve.kmalloc(100, GFP_ATOMIC).unwrap();
    fill(ptr, 101, 0x11);
    kfree(&mm, ptr);
    assert_eq!(reports.one().what, Corruption::RedzoneRight);
    // It is kept as it is for who looks into it, and so is its charge.
    assert!(view(&reserve).usage >= 64);
    assert_eq!(reserve.disconnect(), Err(AllocError::Busy));
    adversary.give_all(&mm);
    assert_eq!(
        ledger(&mm).by_type[PageType::SetAside as usize],
        mm.set_aside_pages()
    );
    let _ = machine;
}

/// Memory of a zone is asked for because something can address no other.
#[test]
fn zones_are_kept_to() {
    let limit = Pfn(256).phys();
    let (machine, mm, _) = boot_with(|config| {
        config.dma_limit = limit;
        config.lowmem_reserve_ratio = [0; 3];
    });
    let dma = kmem_cache(&mm, "dma", 1000, CacheFlags::CACHE_DMA);
    let objects = Demand::Objects {
        cache: &dma,
        count: 9,
    };
    let objects = connected(&mm, objects);
    let frags = connected(&mm, pages(0, 3));
    let bytes = 9000;
    let mix = Demand::Kmalloc {
        bytes,
        min: 100,
        max: 9000,
    };
    let mix = connected(&mm, mix);
    let adversary = Adversary::take_all(&mm);
    let low = |pfn: Pfn| pfn.phys() < limit;
    // The objects of a cache that is for DMA are.
    let live: Vec<_> = (0..9)
        .map(|_| objects.kmem_cache_alloc(&dma, GFP_ATOMIC).unwrap())
        .collect();
    assert!(live.iter().all(|o| low(mm.virt_to_pfn(o.as_ptr()))));
    live.into_iter().for_each(|o| cache_free(&mm, &dma, o));
    // What others have need not be: it is not handed out for it.
    let gfp = GFP_ATOMIC | __GFP_DMA;
    if let Ok(pfn) = frags.alloc_pages(gfp, 0) {
        assert!(low(pfn), "{pfn:?} for DMA");
        free(&mm, pfn);
    }
    for size in [100, 9000] {
        if let Ok(ptr) = mix.kmalloc(size, gfp) {
            assert!(low(mm.virt_to_pfn(ptr.as_ptr())), "{size} for DMA");
            kfree(&mm, ptr);
        }
    }
    {
        let _scope = Host::reserve_scope(frags.id());
        if let Ok(pfn) = mm.alloc_pages(gfp, 0) {
            assert!(low(pfn), "{pfn:?} for DMA");
            free(&mm, pfn);
        }
    }
    {
        let _scope = Host::reserve_scope(mix.id());
        if let Ok(ptr) = mm.kmalloc(9000, gfp) {
            assert!(low(mm.virt_to_pfn(ptr.as_ptr())));
            kfree(&mm, ptr);
        }
    }
    adversary.give_all(&mm);
    [objects, frags, mix].into_iter().for_each(down);
    mm.kmem_cache_destroy(dma).unwrap();
    end(&machine, &mm);
}

/// A page that fails is lost to its reserve until the tick fetches another, and is never handed out again.
#[test]
fn pages_that_fail() {
    let (_machine, mm, _) = boot();
    let cache = kmem_cache(&mm, "objects", 1000, CacheFlags::EMPTY);
    let demand = Demand::Objects {
        cache: &cache,
        count: 8,
    };
    let objects = connected(&mm, demand);
    let frags = connected(&mm, pages(1, 3));
    let held = || (view(&objects).held_pages, view(&frags).held_pages);
    assert_eq!(held(), (2, 6));
    let mut bad = Vec::new();
    let fail = |pfn: Pfn| {
        let failure = mm.memory_failure(pfn);
        assert_ne!(failure.result, MfResult::Ignored, "{failure}");
        pfn
    };
    // In use as pages.
    let page = frags.alloc_pages_for_sure(&mm, 1);
    bad.push(fail(page.add(1)));
    free(&mm, page);
    assert_eq!(held(), (2, 4));
    mm.drain_all();
    assert!(matches!(mm.lookup(page.add(1)).2, Memory::HwPoison));
    assert!(!mm.page_is_from_reserve(page));
    // In use as a slab.
    let adversary = Adversary::take_all(&mm);
    let live: Vec<_> = (0..8)
        .map(|_| objects.kmem_cache_alloc(&cache, GFP_ATOMIC).unwrap())
        .collect();
    bad.push(fail(mm.virt_to_pfn(live[0].as_ptr())));
    live.into_iter().for_each(|o| cache_free(&mm, &cache, o));
    assert_eq!((view(&objects).usage, view(&frags).usage), (0, 0));
    // One short: two blocks of pages are there, and a third is not.
    let two = [(); 2].map(|()| frags.alloc_pages(GFP_ATOMIC, 1).unwrap());
    let third = frags.alloc_pages(GFP_ATOMIC, 1);
    assert_eq!(third.err(), Some(AllocError::NoBlock));
    two.into_iter().for_each(|pfn| free(&mm, pfn));
    assert_eq!((view(&objects).usage, view(&frags).usage), (0, 0));
    // Nothing to fetch one from.
    mm.tick();
    assert_eq!(view(&frags).held_pages, 4);
    adversary.give_all(&mm);
    mm.tick();
    mm.tick();
    assert_eq!(held(), (2, 6));
    // Idle.
    let idle = (0..2048)
        .map(Pfn)
        .find(|&pfn| matches!(mm.lookup(pfn), (head, 1, Memory::SetAside) if head == pfn));
    bad.push(fail(idle.unwrap()));
    let adversary = Adversary::take_all(&mm);
    for round in 0..3 {
        let mut live = Vec::new();
        while let Ok(pfn) = frags.alloc_pages(GFP_ATOMIC, 1) {
            assert!(!bad.iter().any(|b| (pfn.0..pfn.0 + 2).contains(&b.0)));
            live.push(pfn);
        }
        // One short at first; the half that works may have come back meanwhile, but is no block of this order.
        assert_eq!(live.len(), 2, "round {round}");
        live.into_iter().for_each(|pfn| free(&mm, pfn));
        assert_eq!(view(&frags).usage, 0);
    }
    let objects_live: Vec<_> = (0..8)
        .map(|_| objects.kmem_cache_alloc(&cache, GFP_ATOMIC).unwrap())
        .collect();
    for object in objects_live {
        assert!(!bad.contains(&mm.virt_to_pfn(object.as_ptr())));
        cache_free(&mm, &cache, object);
    }
    adversary.give_all(&mm);
    mm.tick();
    assert_eq!(held(), (2, 6));
    assert!(ledger(&mm).balanced);
    [objects, frags].into_iter().for_each(down);
    mm.kmem_cache_destroy(cache).unwrap();
    assert_eq!((mm.set_aside_pages(), mm.num_poisoned_pages()), (0, 3));
    for pfn in bad {
        assert!(matches!(mm.lookup(pfn).2, Memory::HwPoison), "{pfn:?}");
    }
    mm.shrink();
    assert_eq!(mm.validate(|report| panic!("{report:?}")).errors(), 0);
    assert!(ledger(&mm).balanced);
}

trait ForSure {
    fn alloc_pages_for_sure(&self, mm: &Mm<Host>, order: usize) -> Pfn;
}

impl ForSure for Reserve<'_, Host> {
    /// From the reserve, with ordinary memory gone for that moment.
    fn alloc_pages_for_sure(&self, mm: &Mm<Host>, order: usize) -> Pfn {
        let adversary = Adversary::take_all(mm);
        let pfn = self.alloc_pages(GFP_ATOMIC, order).unwrap();
        assert!(mm.page_is_from_reserve(pfn));
        adversary.give_all(mm);
        pfn
    }
}

#[test]
fn what_is_refused_changes_nothing() {
    let (machine, mm, _) = boot();
    let group = mm.reserve("group", Demand::None).unwrap();
    let child = mm.reserve("child", pages(0, 4)).unwrap();
    let inner = mm.reserve("inner", pages(0, 2)).unwrap();
    child.connect(Some(&group)).unwrap();
    inner.connect(Some(&child)).unwrap();
    group.connect(None).unwrap();
    let shape =
        |of: [&Reserve<'_, Host>; 3]| of.map(|r| (view(r).limit, view(r).pages, view(r).connected));
    let before = shape([&group, &child, &inner]);
    // No circle, no second parent; nothing that has children or a parent goes.
    assert_eq!(group.connect(Some(&inner)), Err(AllocError::Busy));
    assert_eq!(child.connect(None), Err(AllocError::Busy));
    let group = group.destroy().unwrap_err().reserve;
    let child = child.destroy().unwrap_err().reserve;
    let inner = inner.destroy().unwrap_err().reserve;
    assert_eq!(inner.set_pages(Some(1)), Err(AllocError::Busy));
    assert_eq!(inner.resize(pages(1, 2)), Err(AllocError::BadSize));
    assert_eq!(inner.resize(pages(0, usize::MAX)), Err(AllocError::BadSize));
    assert!(
        inner.resize(pages(0, 1 << 20)).is_err(),
        "more than there is"
    );
    assert_eq!(mm.set_aside_pages(), 6);

    let adversary = Adversary::take_all(&mm);
    let live = [(); 2].map(|()| inner.alloc_pages(GFP_ATOMIC, 0).unwrap());
    // Busy.
    for reserve in [&group, &child, &inner] {
        assert_eq!(reserve.disconnect(), Err(AllocError::Busy));
        assert_eq!(reserve.set_limit(Some(4096)), Err(AllocError::Busy));
    }
    assert_eq!(inner.resize(pages(0, 1)), Err(AllocError::Busy));
    assert!(inner.resize(pages(0, 3)).is_err());
    // After all that it serves as before.
    let four = [(); 4].map(|()| child.alloc_pages(GFP_ATOMIC, 0).unwrap());
    assert!(inner.alloc_pages(GFP_ATOMIC, 0).is_err());
    four.into_iter().for_each(|pfn| free(&mm, pfn));
    // Pages of a reserve stay what they are, and come back to it.
    // SAFETY: ours.
    unsafe {
        assert_eq!(mm.guard_pages(live[0]), Err(AllocError::Busy));
        assert_eq!(mm.retype(live[0], PageType::File), Err(AllocError::Busy));
        assert_eq!(
            mm.retype(live[0], PageType::PageTable),
            Err(AllocError::Busy)
        );
        mm.mark_reserved(live[0]);
    }
    assert!(matches!(mm.lookup(live[0]).2, Memory::Bare));
    assert!(mm.page_is_from_reserve(live[0]));
    live.into_iter().for_each(|pfn| free(&mm, pfn));
    assert_eq!((view(&group).usage, mm.set_aside_pages()), (0, 6));
    adversary.give_all(&mm);
    mm.tick();
    assert_eq!(
        (shape([&group, &child, &inner]), mm.set_aside_pages()),
        (before, 6)
    );
    [inner, child, group].into_iter().for_each(down);
    end(&machine, &mm);
}

/// What was charged by hand is taken back by hand, and nothing else is.
#[test]
fn uncharging_takes_back_what_was_charged_by_hand() {
    let (machine, mm, reports) = boot();
    let group = mm.reserve("group", Demand::None).unwrap();
    let child = mm.reserve("child", pages(0, 4)).unwrap();
    let sizing = mm.reserve_sizing("sizing", pages(0, 1)).unwrap();
    child.connect(Some(&group)).unwrap();
    sizing.connect(Some(&child)).unwrap();
    assert_eq!(group.charge(1), Err(AllocError::Detached));
    group.connect(None).unwrap();
    let adversary = Adversary::take_all(&mm);
    let usage = || (view(&group).usage, view(&child).usage);
    let page = child.alloc_pages(GFP_ATOMIC, 0).unwrap();
    assert_eq!(usage(), (4096, 4096));
    // Of the child's page nobody takes the charge back but who frees it.
    for reserve in [&group, &child, &sizing] {
        assert_eq!(reserve.uncharge(1), Err(Unbalanced { usage: 0 }));
        assert_eq!(usage(), (4096, 4096));
    }
    group.charge(100).unwrap();
    child.charge(1000).unwrap();
    sizing.charge(10).unwrap();
    assert_eq!(usage(), (4096 + 1110, 4096 + 1010));
    assert_eq!(group.uncharge(101), Err(Unbalanced { usage: 100 }));
    assert_eq!(child.uncharge(1011), Err(Unbalanced { usage: 1010 }));
    assert_eq!(usage(), (4096 + 1110, 4096 + 1010));
    // What does not fit is not charged, not in part either.
    let limit = view(&child).limit;
    assert_eq!(child.charge(limit), Err(AllocError::ReserveLimit));
    assert_eq!(child.charge(u64::MAX), Err(AllocError::ReserveLimit));
    assert!(child.uncharge(u64::MAX).is_err());
    assert_eq!(usage(), (4096 + 1110, 4096 + 1010));
    // To the last byte.
    let rest = limit - 4096 - 1010 - 100;
    child.charge(rest).unwrap();
    assert_eq!(child.charge(1), Err(AllocError::ReserveLimit));
    child.uncharge(rest + 1010).unwrap();
    group.uncharge(100).unwrap();
    assert_eq!(usage(), (4096, 4096));
    free(&mm, page);
    assert_eq!(usage(), (0, 0));
    assert!(reports.take().is_empty());
    adversary.give_all(&mm);
    [sizing, child, group].into_iter().for_each(down);
    end(&machine, &mm);
}

/// Shrinking gives back what is above the bound as soon as nothing is in use, and what is in use stays good.
#[test]
fn resized_while_in_use() {
    let (machine, mm, _) = boot();
    let mix = |bytes| Demand::Kmalloc {
        bytes,
        min: 64,
        max: 4096,
    };
    let reserve = connected(&mm, mix(40_000));
    let (large, small) = (view(&reserve).pages, {
        mm.reserve_estimate(mix(10_000)).unwrap().pages()
    });
    let mut rng = Rng(7);
    for _ in 0..scaled(20, 2) {
        reserve.resize(mix(40_000)).unwrap();
        assert_eq!(view(&reserve).held_pages, large);
        let adversary = Adversary::take_all(&mm);
        let (mut live, mut asked) = (Vec::new(), 0);
        let mut limit = 40_000;
        for step in 0..600 {
            let size = 64 + rng.below(4096 - 63);
            if step == 300 {
                while asked > 9_000 {
                    let (ptr, size) = live.swap_remove(rng.below(live.len()));
                    kfree(&mm, ptr);
                    asked -= size;
                }
                reserve.resize(mix(10_000)).unwrap();
                limit = 10_000;
                mm.tick();
            }
            if asked + size <= limit && !rng.one_in(3) {
                let ptr = reserve.kmalloc(size, GFP_ATOMIC).unwrap();
                assert!(mm.is_from_reserve(ptr.as_ptr()));
                live.push((ptr, size));
                asked += size;
            } else if !live.is_empty() {
                let (ptr, size) = live.swap_remove(rng.below(live.len()));
                kfree(&mm, ptr);
                asked -= size;
            }
        }
        live.into_iter().for_each(|(ptr, _)| kfree(&mm, ptr));
        mm.tick();
        assert_eq!(
            (view(&reserve).held_pages, mm.set_aside_pages()),
            (small, small)
        );
        adversary.give_all(&mm);
    }
    down(reserve);
    end(&machine, &mm);
}

/// What is freed where nothing can be finished is finished by who needs it.
#[test]
fn what_was_freed_by_nolock_calls_is_there_at_once() {
    for rt in [false, true] {
        let (machine, mm, _) = boot_with(|config| config.preempt_rt = rt);
        let cache = kmem_cache(&mm, "objects", 500, CacheFlags::EMPTY);
        let demand = Demand::Objects {
            cache: &cache,
            count: 20,
        };
        let (objects, frags) = (connected(&mm, demand), connected(&mm, pages(1, 4)));
        let adversary = Adversary::take_all(&mm);
        for _ in 0..5 {
            let live: Vec<_> = (0..20)
                .map(|_| objects.kmem_cache_alloc(&cache, GFP_ATOMIC).unwrap())
                .collect();
            let four: Vec<_> = (0..4)
                .map(|_| frags.alloc_pages(GFP_ATOMIC, 1).unwrap())
                .collect();
            for object in live {
                // SAFETY: ours, here and below.
                unsafe { mm.kfree_nolock(object) };
            }
            for pfn in four {
                // SAFETY: as above.
                unsafe { mm.free_pages_nolock(pfn) };
            }
            // Objects wait, and are charged until somebody looks; pages do not wait.
            assert_eq!((view(&objects).usage, view(&frags).usage), (20 * 500, 0));
        }
        mm.shrink();
        assert_eq!(view(&objects).usage, 0);
        adversary.give_all(&mm);
        [objects, frags].into_iter().for_each(down);
        mm.kmem_cache_destroy(cache).unwrap();
        end(&machine, &mm);
    }
}
