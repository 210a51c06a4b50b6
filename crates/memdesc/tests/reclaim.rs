//! The slow path: reclaim, who may go how far below the watermarks, protection of low zones, nodes, the atomic reserve, and the
//! reason that a failure gives.

mod common;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use common::*;
use memdesc::gfp::{
    self, __GFP_HIGH, __GFP_MEMALLOC, __GFP_NOFAIL, __GFP_NOMEMALLOC, __GFP_NORETRY,
    __GFP_RETRY_MAYFAIL, __GFP_THISNODE, GFP_ATOMIC, GFP_DMA, GFP_HIGHUSER_MOVABLE, GFP_KERNEL,
    GFP_NOWAIT,
};
use memdesc::*;

/// How far down a request may go, from the min watermark.
type Floor = fn(u64) -> u64;

const EVERYTHING: Flags = __GFP_MEMALLOC;

/// One zone, Normal, of so many pages.
fn normal(pages: u32) -> Machine {
    let mut machine = Machine::flat(pages);
    machine.config.dma_limit = PhysAddr(0);
    machine.config.dma32_limit = PhysAddr(0);
    machine
}

fn hooked(
    machine: &Machine,
    reclaim: impl Fn(ReclaimRequest) -> usize + Send + Sync + 'static,
) -> Mm<Hooked> {
    let mut hooked = Hooked::new(machine.host().build().unwrap());
    hooked.on_reclaim = Some(Box::new(reclaim));
    machine.boot_on(hooked)
}

/// Takes all there is, in the largest blocks.
fn take_all<P: Platform>(mm: &Mm<P>, gfp: Flags) -> Vec<Pfn> {
    let mut all = Vec::new();
    for order in (0..=MAX_ORDER).rev() {
        while let Ok(pfn) = mm.alloc_pages(gfp, order) {
            all.push(pfn);
        }
    }
    all
}

/// Takes a page out of the smallest free block there is, past all watermarks.
fn take_a_page<P: Platform>(mm: &Mm<P>, machine: &Machine) -> Pfn {
    let free = |p: &u32| matches!(mm.lookup(Pfn(*p)).2, Memory::Free { in_pcp: false });
    let page = (0..machine.end())
        .filter(free)
        .min_by_key(|&p| mm.lookup(Pfn(p)).1);
    let page = Pfn(page.unwrap());
    mm.alloc_pages_at(page, 0).unwrap();
    page
}

/// Each kind of request gets exactly as far as its discounts say. Order 4 goes past the per-CPU lists, so the zone's number is
/// exact: a block is handed out while what is free less all but its first page is above the mark.
#[test]
fn how_far_each_may_go() {
    let half = |min: u64| min - min / 2;
    let cases: &[(Flags, Option<Floor>)] = &[
        (GFP_KERNEL, Some(|min| min)),
        (GFP_NOWAIT, Some(|min| min)),
        (GFP_KERNEL | __GFP_NORETRY, Some(|min| min)),
        (GFP_HIGHUSER_MOVABLE, Some(|min| min)),
        (GFP_KERNEL | __GFP_HIGH, Some(half)),
        (GFP_ATOMIC | __GFP_NOMEMALLOC, Some(half)),
        (
            GFP_ATOMIC,
            Some(|min| (min - min / 2) - (min - min / 2) / 4),
        ),
        (GFP_KERNEL | __GFP_MEMALLOC, None),
        (
            GFP_KERNEL | __GFP_MEMALLOC | __GFP_NOMEMALLOC,
            Some(|min| min),
        ),
    ];
    let machine = normal(16384);
    // Once with exactly the mark left for the last block, which is refused, once with a page more, which is not.
    let aims = cases.iter().flat_map(|&case| [(case, 0), (case, 1)]);
    let mut hits = 0;
    for ((gfp, mark), aim) in aims {
        let mm = machine.boot();
        let [min, low, high, _] = zones(&mm)[0].watermarks;
        assert!(0 < min && min < low && low < high);
        let mark = mark.map(|f| f(min));
        let mut got = Vec::new();
        let mut exact = mark.is_none();
        loop {
            let zone = zones(&mm)[0];
            let free = zone.free;
            // A boosted mark counts for all but those in need.
            let boost = if gfp.contains(__GFP_HIGH) {
                0
            } else {
                zone.watermarks[3].min(min)
            };
            if let Some(mark) = mark {
                let left = (free as i64 - 15) - (mark + boost) as i64;
                if left > aim && left < 16 + aim {
                    got.push(take_a_page(&mm, &machine));
                    continue;
                }
                exact |= left == aim;
            }
            let may = mark.is_none_or(|mark| free.saturating_sub(15) > mark + boost);
            match mm.alloc_pages(gfp, 4) {
                Ok(pfn) => {
                    assert!(may, "{gfp:?} got a block with {free} free");
                    got.push(pfn);
                }
                Err(why) => {
                    match mark {
                        Some(mark) => {
                            assert!(
                                !may,
                                "{gfp:?} was refused with {free} free, mark {mark}: {why}"
                            );
                            assert_eq!(why, AllocError::Watermark);
                        }
                        None => {
                            assert_eq!(why, AllocError::NoBlock, "{gfp:?}");
                            let big: u64 = zones(&mm)[0].free_blocks[4..].iter().flatten().sum();
                            assert_eq!(big, 0);
                        }
                    }
                    break;
                }
            }
        }
        hits += usize::from(exact);
        got.into_iter().for_each(|pfn| free(&mm, pfn));
        teardown(&machine, &mm);
    }
    // Where a boost came in between, the mark moved away.
    assert!(hits >= 8, "only {hits} had exactly the mark");
}

#[test]
fn wakes_below_the_low_mark_only() {
    let machine = normal(16384);
    let mm = machine.boot_on(Hooked::new(machine.host().build().unwrap()));
    let low = zones(&mm)[0].watermarks[1];
    let mut got = Vec::new();
    loop {
        let free = zones(&mm)[0].free;
        let Ok(pfn) = mm.alloc_pages(GFP_NOWAIT, 4) else {
            break;
        };
        got.push(pfn);
        let wakes = std::mem::take(&mut *mm.platform().wakes.lock().unwrap());
        assert_eq!(
            wakes,
            if free - 15 > low {
                vec![]
            } else {
                vec![(0, 4)]
            },
            "{free} free, low {low}"
        );
    }
    // Who does not say that the reclaimer may be woken does not wake it.
    mm.platform().wakes.lock().unwrap().clear();
    assert!(mm.alloc_pages(Flags::EMPTY, 4).is_err());
    assert_eq!(*mm.platform().wakes.lock().unwrap(), []);
}

#[test]
fn reclaim_makes_room() {
    let machine = normal(8192);
    let cache: Arc<Mutex<Vec<Pfn>>> = Arc::default();
    let mm_later: Later<Hooked> = Later::default();
    let asked = Arc::new(Mutex::new(Vec::new()));
    let (hook_cache, hook_mm, hook_asked) = (cache.clone(), mm_later.clone(), asked.clone());
    let mm = hooked(&machine, move |request| {
        hook_asked
            .lock()
            .unwrap()
            .push((request.gfp, request.order, request.attempt));
        let gone: Vec<_> = {
            let mut cache = hook_cache.lock().unwrap();
            let n = cache.len().min(40);
            cache.drain(..n).collect()
        };
        gone.iter()
            .for_each(|&pfn| free(hook_mm.get().unwrap(), pfn));
        gone.len()
    });
    mm_later.set(&mm);
    // The page cache fills memory.
    while let Ok(pfn) = mm.alloc_folio(GFP_NOWAIT | gfp::__GFP_MOVABLE, 0, FolioKind::File) {
        cache.lock().unwrap().push(pfn);
    }
    cache.lock().unwrap().sort_unstable();
    assert!(
        asked.lock().unwrap().is_empty(),
        "who cannot sleep does not reclaim"
    );
    let mut got = Vec::new();
    for order in [0, 0, 1, 3, 4] {
        got.push(mm.alloc_pages(GFP_KERNEL, order).unwrap());
    }
    let seen = asked.lock().unwrap().clone();
    assert!(!seen.is_empty());
    assert!(seen.iter().all(|&(gfp, _, _)| gfp == GFP_KERNEL));
    assert_eq!(seen[0].2, 0);
    got.into_iter().for_each(|pfn| free(&mm, pfn));
    for pfn in std::mem::take(&mut *cache.lock().unwrap()) {
        free(&mm, pfn);
    }
    teardown(&machine, &mm);
}

/// How often reclaim is tried before a request gives up, when it claims progress and nothing comes of it.
#[test]
fn how_often_reclaim_is_tried() {
    let machine = normal(4096);
    for (gfp, order, tries) in [
        (GFP_KERNEL, 0, 16),
        (GFP_KERNEL, 3, 16),
        (GFP_KERNEL, 4, 2),
        (GFP_KERNEL | __GFP_RETRY_MAYFAIL, 4, 16),
        (GFP_KERNEL | __GFP_NORETRY, 0, 1),
        (GFP_KERNEL | __GFP_NORETRY, 5, 1),
        (GFP_NOWAIT, 0, 0),
        (GFP_ATOMIC, 0, 0),
    ] {
        let count = Arc::new(AtomicUsize::new(0));
        let counter = count.clone();
        let mm = hooked(&machine, move |_| {
            counter.fetch_add(1, Ordering::Relaxed);
            1
        });
        let _all = take_all(&mm, EVERYTHING);
        assert_eq!(count.load(Ordering::Relaxed), 0);
        assert!(mm.alloc_pages(gfp, order).is_err());
        assert_eq!(
            count.load(Ordering::Relaxed),
            tries,
            "{gfp:?} order {order}"
        );
    }
}

#[test]
fn nofail_goes_on_while_there_is_progress() {
    let machine = normal(4096);
    let last: Arc<Mutex<Vec<Pfn>>> = Arc::default();
    let later: Later<Hooked> = Later::default();
    let calls = Arc::new(AtomicUsize::new(0));
    let (hook_last, hook_mm, hook_calls) = (last.clone(), later.clone(), calls.clone());
    let mm = hooked(&machine, move |_| {
        // Progress elsewhere for a long time, then here.
        if hook_calls.fetch_add(1, Ordering::Relaxed) == 40 {
            for pfn in std::mem::take(&mut *hook_last.lock().unwrap()) {
                free(hook_mm.get().unwrap(), pfn);
            }
        }
        1
    });
    later.set(&mm);
    *last.lock().unwrap() = take_all(&mm, EVERYTHING);
    mm.alloc_pages(GFP_KERNEL | __GFP_NOFAIL, 2).unwrap();
    assert_eq!(calls.load(Ordering::Relaxed), 41);
}

/// A request that could have been served from Normal leaves in DMA what the ratio says; one for DMA may take it.
#[test]
fn low_zones_are_protected() {
    let mut machine = Machine::flat(16384);
    machine.config.dma_limit = PhysAddr(8 << 20);
    machine.config.dma32_limit = PhysAddr(8 << 20);
    machine.config.lowmem_reserve_ratio = [32, 32, 32];
    let mm = machine.boot();
    let all = zones(&mm);
    let dma = all.iter().find(|z| z.kind == ZoneType::Dma).unwrap();
    let reserve = machine.lowmem_reserve(&all, dma, ZoneType::Normal);
    assert!(reserve > 300 && reserve < dma.managed / 2);
    let free_in_dma = || {
        zones(&mm)
            .iter()
            .find(|z| z.kind == ZoneType::Dma)
            .unwrap()
            .free
    };
    let step = |gfp: Flags, kept: u64| {
        let mut got = 0;
        loop {
            let before = free_in_dma();
            match mm.alloc_pages(gfp, 4) {
                Ok(pfn) if machine.zone_of(pfn) == ZoneType::Dma => {
                    assert!(
                        before - 15 > kept,
                        "{gfp:?} took from DMA with {before} free, {kept} kept"
                    );
                    got += 1;
                }
                Ok(_) => assert_ne!(gfp, GFP_DMA),
                Err(why) => {
                    assert_eq!(why, AllocError::Watermark);
                    assert!(before - 15 <= kept);
                    return got;
                }
            }
        }
    };
    let min = dma.watermarks[0];
    assert!(step(GFP_KERNEL, min + reserve) > 0);
    assert!(
        step(GFP_DMA, min) > 0,
        "the reserve is for requests that can use nothing else"
    );
}

#[test]
fn nodes() {
    let mut machine = Machine::new("two nodes", &[range(0, 4096, 0), range(4096, 8192, 1)]);
    machine.nodes = 2;
    let mm = machine.boot();
    // A preference is followed down to the low mark, then left.
    let mut nodes = [0, 0];
    loop {
        let near = zones(&mm).into_iter().find(|z| z.node == 1).unwrap();
        let Ok(pfn) = mm.alloc_pages_node(Some(1), GFP_KERNEL, 4) else {
            break;
        };
        nodes[machine.node_of(pfn.0)] += 1;
        let low = near.watermarks[1] + near.watermarks[3];
        assert!(
            near.free - 15 <= low || machine.node_of(pfn.0) == 1,
            "{near:?}"
        );
    }
    assert!(nodes[0] > 200 && nodes[1] > 200, "{nodes:?}");

    // A command is not left, for any order, on any path, and a node without memory has none.
    let mm = machine.boot();
    for _ in 0..20 {
        mm.alloc_pages_node(Some(0), GFP_KERNEL, 0).unwrap();
    }
    for order in [0, 0, 2, 9, 10] {
        let pfn = mm
            .alloc_pages_node(Some(1), GFP_KERNEL | __GFP_THISNODE, order)
            .unwrap();
        assert_eq!(machine.node_of(pfn.0), 1);
    }
    for node in [2, 7, 8, 1000] {
        for order in [0, 4] {
            let got = mm.alloc_pages_node(Some(node), GFP_KERNEL | __GFP_THISNODE, order);
            assert_eq!(got, Err(AllocError::NoZone), "node {node}, order {order}");
        }
    }
    let mut n = 0;
    while let Ok(pfn) = mm.alloc_pages_node(Some(0), GFP_KERNEL | __GFP_THISNODE, 3) {
        assert_eq!(machine.node_of(pfn.0), 0);
        n += 1;
    }
    assert!(n > 300);
    // Node 1 has plenty.
    assert_eq!(
        mm.alloc_pages_node(Some(0), GFP_KERNEL | __GFP_THISNODE, 5),
        Err(AllocError::Watermark)
    );
    assert!(mm.alloc_pages_node(Some(0), GFP_KERNEL, 5).is_ok());
}

#[test]
fn reasons() {
    let machine = normal(4096);
    let mm = machine.boot();
    assert_eq!(
        mm.alloc_pages(GFP_KERNEL, MAX_ORDER + 1),
        Err(AllocError::BadOrder)
    );
    assert_eq!(
        mm.alloc_pages(GFP_KERNEL, usize::MAX),
        Err(AllocError::BadOrder)
    );
    assert_eq!(mm.alloc_pages(GFP_DMA, 0), Err(AllocError::NoZone));
    assert_eq!(mm.alloc_pages(gfp::GFP_DMA32, 0), Err(AllocError::NoZone));
    assert_eq!(mm.alloc_pages_at(Pfn(1), 1), Err(AllocError::BadOrder));
    assert_eq!(mm.alloc_pages_at(Pfn(0), 11), Err(AllocError::BadOrder));
    assert_eq!(mm.alloc_pages_at(Pfn(5000), 0), Err(AllocError::NoZone));
    assert_eq!(mm.kmalloc(0, GFP_KERNEL), Err(AllocError::BadSize));
    assert_eq!(
        mm.kmalloc((4 << 20) + 1, GFP_KERNEL),
        Err(AllocError::BadSize)
    );
    assert_eq!(mm.kmalloc(usize::MAX, GFP_KERNEL), Err(AllocError::BadSize));
    for (size, align) in [
        (0, 8),
        (usize::MAX, 8),
        (usize::MAX / 2 + 1, 8),
        (8 << 20, 8),
        (8, 24),
        (8, 8192),
    ] {
        for flags in [CacheFlags::EMPTY, CacheFlags::HWCACHE_ALIGN, ALL] {
            let got = mm.kmem_cache_create("bad", size, align, flags, None);
            assert!(
                matches!(got, Err(AllocError::BadSize)),
                "{size} {align}: {got:?}"
            );
        }
    }
    // Fragmented, with plenty free: no block.
    let all: Vec<_> = std::iter::from_fn(|| mm.alloc_pages(EVERYTHING, 0).ok()).collect();
    all.iter()
        .filter(|pfn| pfn.0 % 2 == 0)
        .for_each(|&pfn| free(&mm, pfn));
    mm.drain_all();
    assert_eq!(mm.alloc_pages(GFP_NOWAIT, 1), Err(AllocError::NoBlock));
    assert_eq!(mm.alloc_pages(GFP_KERNEL, 5), Err(AllocError::NoBlock));
    assert!(mm.alloc_pages(GFP_NOWAIT, 0).is_ok());
    ledger(&mm);
}

/// What other CPUs keep for themselves is had before a request fails.
#[test]
fn other_cpus_lists_are_drained() {
    let mut machine = normal(4096).cpus(2);
    // The last page goes as it goes without a pool.
    machine.config.kfence_objects = 0;
    let mm = machine.boot();
    let [a, b] = [0, 1].map(|cpu| mm.platform().claim(cpu).unwrap());
    a.switch();
    let all: Vec<_> = std::iter::from_fn(|| mm.alloc_pages(EVERYTHING, 0).ok()).collect();
    let some: Vec<_> = all
        .iter()
        .copied()
        .filter(|p| p.0 >> 2 == all[0].0 >> 2)
        .collect();
    assert_eq!(some.len(), 4);
    some.iter().for_each(|&pfn| free(&mm, pfn));
    b.switch();
    assert!(
        mm.alloc_pages(GFP_NOWAIT | EVERYTHING, 2).is_err(),
        "who cannot sleep does not drain others"
    );
    assert_eq!(
        mm.alloc_pages(GFP_KERNEL | EVERYTHING, 2),
        Ok(some.iter().copied().min().unwrap())
    );
}

fn atomic_blocks<P: Platform>(mm: &Mm<P>) -> u64 {
    let kept = MigrateType::HighAtomic as usize;
    zones(mm)[0]
        .free_blocks
        .iter()
        .enumerate()
        .map(|(order, row)| row[kept] << order)
        .sum()
}

/// An atomic request of higher order below the low mark gets its pageblock kept for more of its kind; nobody else is served from
/// it, until a request that may sleep would fail for it.
#[test]
fn reserve_for_atomic_requests() {
    let machine = normal(512 << 8);
    let mm = machine.boot();
    let [min, low, ..] = zones(&mm)[0].watermarks;
    let mut got = Vec::new();
    for order in [10, 5, 4] {
        while zones(&mm)[0].free > low + (2 << order) {
            got.push(mm.alloc_pages(GFP_NOWAIT, order).unwrap());
        }
    }
    while zones(&mm)[0].free > min + 40 {
        got.push(mm.alloc_pages(GFP_NOWAIT, 4).unwrap());
    }
    ledger(&mm);
    assert_eq!(atomic_blocks(&mm), 0);
    let mut atomic = Vec::new();
    for _ in 0..4 {
        let pfn = mm.alloc_pages(GFP_ATOMIC, 3).unwrap();
        for page in 0..8 {
            assert_eq!(mm.lookup(pfn.add(page)).0, pfn);
        }
        assert!(!atomic.contains(&pfn) && !got.contains(&pfn));
        atomic.push(pfn);
        ledger(&mm);
    }
    let kept = atomic_blocks(&mm);
    assert!(kept > 0, "nothing was kept");
    // Others leave it alone.
    while let Ok(pfn) = mm.alloc_pages(GFP_NOWAIT, 4) {
        got.push(pfn);
    }
    assert_eq!(atomic_blocks(&mm), kept);
    while mm
        .alloc_pages(GFP_ATOMIC, 3)
        .map(|pfn| atomic.push(pfn))
        .is_ok()
    {
        ledger(&mm);
    }
    got.into_iter().chain(atomic).for_each(|pfn| free(&mm, pfn));
    // What was kept comes back when somebody who may sleep would fail.
    let rest = take_all(&mm, GFP_KERNEL | EVERYTHING);
    assert_eq!(atomic_blocks(&mm), 0);
    rest.into_iter().for_each(|pfn| free(&mm, pfn));
    mm.shrink();
    let after = ledger(&mm);
    assert_eq!((users(&after), after.pcp), (0, 0));
}

/// What a polluted pageblock added to the watermarks is gone after background reclaim, whether it was reached or not.
#[test]
fn background_reclaim_takes_the_boost_away() {
    let mm = Machine::flat(16384).boot();
    let boost = || {
        zones(&mm)
            .iter()
            .map(|zone| zone.watermarks[3])
            .sum::<u64>()
    };
    let mut movable = Vec::new();
    while let Ok(pfn) = mm.alloc_pages(GFP_HIGHUSER_MOVABLE & !gfp::__GFP_DIRECT_RECLAIM, 0) {
        movable.push(pfn);
    }
    // Most of one pageblock is free: an unmovable page pollutes it.
    let block = movable[movable.len() / 2].0 >> PAGEBLOCK_ORDER;
    let (freed, kept): (Vec<Pfn>, Vec<Pfn>) = movable
        .into_iter()
        .partition(|pfn| pfn.0 >> PAGEBLOCK_ORDER == block && !pfn.0.is_multiple_of(256));
    freed.into_iter().for_each(|pfn| free(&mm, pfn));
    mm.drain_all();
    let mut unmovable = Vec::new();
    while boost() == 0 && unmovable.len() < 400 {
        unmovable.push(mm.alloc_pages(GFP_KERNEL, 0).unwrap());
    }
    assert!(boost() > 0, "nothing was polluted");
    mm.kswapd();
    assert_eq!(boost(), 0);
    kept.into_iter()
        .chain(unmovable)
        .for_each(|pfn| free(&mm, pfn));
}
