//! Reserves: what is promised is there when everything else is gone, for those entitled and for nobody else.
#![allow(missing_docs)]

mod common;
#[path = "common/reserves.rs"]
mod shared;

use common::*;
use memdesc::gfp::*;
use memdesc::*;
use memdesc_host::Host;
use shared::*;

fn boot() -> (Machine, Mm<Host>) {
    let machine = Machine::flat(2048).unsampled();
    let mm = machine.boot();
    (machine, mm)
}

#[test]
fn what_is_promised_is_there_when_all_else_is_gone() {
    let (machine, mm) = boot();
    let cache = mm
        .kmem_cache_create("heads", 200, 0, CacheFlags::EMPTY, None)
        .unwrap();
    let group = mm.reserve("net", Demand::None).unwrap();
    let heads = Demand::Objects {
        cache: &cache,
        count: 50,
    };
    let heads = mm.reserve("heads", heads).unwrap();
    let mix = Demand::Kmalloc {
        bytes: 30_000,
        min: 64,
        max: 12_000,
    };
    let data = mm.reserve("data", mix).unwrap();
    let count = 9;
    let frags = mm.reserve("frags", Demand::Pages { order: 1, count });
    let frags = frags.unwrap();
    for child in [&heads, &data, &frags] {
        child.connect(Some(&group)).unwrap();
        assert_eq!(view(child).held_pages, 0);
        assert_eq!(child.kmalloc(100_000_000, GFP_ATOMIC).err(), {
            Some(AllocError::BadSize)
        });
    }
    group.connect(None).unwrap();
    let bound = view(&group).pages;
    assert_eq!(
        (view(&group).held_pages, mm.set_aside_pages()),
        (bound, bound)
    );
    assert_eq!(ledger(&mm).by_type[PageType::SetAside as usize], bound);

    let adversary = Adversary::take_all(&mm);
    adversary.check(&mm);
    assert_eq!(mm.set_aside_pages(), bound);
    let mut objects = Vec::new();
    let mut rng = Rng(1);
    for round in 0..scaled(20, 2) {
        // Heads, to the last one.
        for _ in 0..50 {
            let object = heads.kmem_cache_alloc(&cache, GFP_ATOMIC).unwrap();
            assert!(mm.is_from_reserve(object.as_ptr()), "round {round}");
            fill(object, 200, 0x5a);
            objects.push(object);
        }
        let more = heads.kmem_cache_alloc(&cache, GFP_ATOMIC);
        assert_eq!(more.err(), Some(AllocError::ReserveLimit));
        for object in objects.drain(..) {
            cache_free(&mm, &cache, object);
        }
        // Pages.
        let pages: Vec<_> = (0..count)
            .map(|_| frags.alloc_pages(GFP_ATOMIC, 1).unwrap())
            .collect();
        assert!(pages.iter().all(|&pfn| mm.page_is_from_reserve(pfn.add(1))));
        assert!(frags.alloc_pages(GFP_ATOMIC, 1).is_err());
        pages.into_iter().for_each(|pfn| free(&mm, pfn));
        // Any mix, in any order.
        let (mut live, mut asked) = (Vec::new(), 0);
        for _ in 0..scaled(3000, 100) {
            let most = if rng.one_in(8) { 12_000 - 63 } else { 1500 };
            let size = 64 + rng.below(most);
            if asked + size <= 30_000 && !rng.one_in(3) {
                let ptr = data.kmalloc(size, GFP_ATOMIC).unwrap();
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
        mm.tick();
        assert_eq!(view(&group).usage, 0);
        assert_eq!(mm.set_aside_pages(), bound);
    }
    assert!(view(&group).max_usage > 0 && view(&data).max_taken_pages > 0);
    adversary.give_all(&mm);
    group.disconnect().unwrap();
    assert_eq!(mm.set_aside_pages(), 0);
    for child in [heads, data, frags] {
        child.disconnect().unwrap();
        assert!(child.destroy().is_ok());
    }
    down(group);
    mm.kmem_cache_destroy(cache).unwrap();
    mm.shrink();
    assert!(ledger(&mm).balanced);
    let _ = machine;
}

/// A mempool that lacks elements takes what is freed to it, but not what is a reserve's.
#[test]
fn a_mempool_does_not_keep_what_is_a_reserves() {
    let (_, mm) = boot();
    let kind = MempoolKind::Kmalloc { size: 512 };
    let pool = mm.mempool_create("pool", kind, 2, GFP_KERNEL).unwrap();
    let objects = Demand::KmallocObjects {
        size: 512,
        count: 2,
    };
    let reserve = mm.reserve("reserve", objects).unwrap();
    reserve.connect(None).unwrap();
    mm.platform().faults().fail_one_in(1, 0);
    let from_pool = [(); 2].map(|()| pool.alloc(GFP_ATOMIC).unwrap());
    let from_reserve = [(); 2].map(|()| reserve.kmalloc(512, GFP_ATOMIC).unwrap());
    for object in from_reserve {
        // SAFETY: ours; an element of the pool is memory like this.
        unsafe { pool.free(object) };
    }
    assert_eq!(view(&reserve).usage, 0);
    assert!(pool.alloc(GFP_ATOMIC).is_err());
    mm.platform().faults().off();
    for object in from_pool {
        // SAFETY: ours.
        unsafe { pool.free(object) };
    }
    assert!(pool.destroy().is_ok());
    down(reserve);
}

/// What a prefilled sheaf holds is ordinary memory, whoever fills it.
#[test]
fn a_prefilled_sheaf_holds_nothing_from_a_reserve() {
    let (_, mm) = boot();
    let cache = mm
        .kmem_cache_create("nodes", 256, 0, CacheFlags::EMPTY, None)
        .unwrap();
    let demand = Demand::Objects {
        cache: &cache,
        count: 16,
    };
    let reserve = mm.reserve("nodes", demand).unwrap();
    reserve.connect(None).unwrap();
    mm.platform().faults().fail_one_in(1, 0);
    let scope = Host::reserve_scope(reserve.id());
    assert!(mm.kmem_cache_prefill_sheaf(&cache, GFP_ATOMIC, 4).is_err());
    let object = mm.kmem_cache_alloc(&cache, GFP_ATOMIC).unwrap();
    assert!(mm.is_from_reserve(object.as_ptr()));
    cache_free(&mm, &cache, object);
    drop(scope);
    mm.platform().faults().off();
    down(reserve);
    mm.kmem_cache_destroy(cache).unwrap();
}

/// Who only tries takes no lock, and a reserve is behind one.
#[test]
fn a_fast_try_takes_nothing_from_a_reserve() {
    let (_, mm) = boot();
    let pages = Demand::Pages { order: 0, count: 2 };
    let reserve = mm.reserve("pages", pages).unwrap();
    reserve.connect(None).unwrap();
    mm.platform().faults().fail_one_in(1, 0);
    let _scope = Host::reserve_scope(reserve.id());
    assert!(mm.alloc_pages(__GFP_FAST_TRY, 0).is_err());
    assert!(mm.alloc_pages_nolock(Flags::EMPTY, None, 0).is_err());
    assert!(reserve.alloc_pages(__GFP_FAST_TRY, 0).is_err());
    let page = mm.alloc_pages(GFP_NOWAIT, 0).unwrap();
    assert!(mm.page_is_from_reserve(page));
    // SAFETY: ours.
    unsafe { mm.free_pages_nolock(page) };
    mm.platform().faults().off();
    down(reserve);
}
