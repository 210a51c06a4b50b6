//! The census: at a quiet moment it is the ledger, page by page; under load every page is still counted once, and what nobody
//! touches is counted exactly.

mod common;

use std::collections::BTreeMap;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::*;
use memdesc::gfp::{self, GFP_ATOMIC, GFP_HIGHUSER_MOVABLE, GFP_KERNEL, GFP_NOWAIT};
use memdesc::*;
use memdesc_host::Host;

/// Blocks by kind and order, as the test knows them.
type Known = BTreeMap<(&'static str, usize), u64>;

fn alloc(mm: &Mm<Host>, what: usize, order: usize) -> Option<(Pfn, CensusKind)> {
    let (pfn, kind) = match what {
        0 => (mm.alloc_pages(GFP_NOWAIT, order), CensusKind::Bare),
        1 => (
            mm.alloc_page_table(GFP_NOWAIT, order),
            CensusKind::PageTable,
        ),
        2 => (
            mm.alloc_folio(GFP_HIGHUSER_MOVABLE, order, FolioKind::File),
            CensusKind::File,
        ),
        _ => (
            mm.alloc_folio(GFP_HIGHUSER_MOVABLE, order, FolioKind::Anon),
            CensusKind::Anon,
        ),
    };
    Some((pfn.ok()?, kind))
}

/// Small, and now and then any.
fn random_order(rng: &mut Rng) -> usize {
    let most = if rng.one_in(7) { 11 } else { 4 };
    rng.below(most)
}

fn random_size(rng: &mut Rng) -> usize {
    let most = if rng.one_in(8) { 60_000 } else { 3000 };
    1 + rng.below(most)
}

/// What is out, by the census: kinds that the test hands out itself.
fn known(census: &Census) -> Known {
    let mut known = Known::new();
    for kind in [
        CensusKind::Bare,
        CensusKind::PageTable,
        CensusKind::File,
        CensusKind::Anon,
        CensusKind::LargeKmalloc,
    ] {
        for (order, &n) in census.of(kind).by_order.iter().enumerate() {
            if n > 0 {
                known.insert((kind.name(), order), n);
            }
        }
    }
    known
}

/// The census beside the ledger, all of it.
fn same_as_ledger(mm: &Mm<Host>) -> Census {
    let (census, ledger) = (mm.census(), mm.ledger());
    assert!(ledger.balanced, "{ledger:?}");
    let pages = |kind| census.of(kind).pages;
    assert_eq!(census.pages(), ledger.given);
    assert_eq!(census.torn, 0);
    assert_eq!(pages(CensusKind::Unsettled), 0);
    assert_eq!(pages(CensusKind::Free), ledger.free);
    assert_eq!(pages(CensusKind::PerCpu), ledger.pcp);
    assert_eq!(pages(CensusKind::Untouched), ledger.untouched);
    let of = |kind: PageType| ledger.by_type[kind as usize];
    for (kind, page_type) in [
        (CensusKind::Bare, PageType::Bare),
        (CensusKind::Slab, PageType::Slab),
        (CensusKind::LargeKmalloc, PageType::LargeKmalloc),
        (CensusKind::PageTable, PageType::PageTable),
        (CensusKind::File, PageType::File),
        (CensusKind::Anon, PageType::Anon),
        (CensusKind::Vmalloc, PageType::Vmalloc),
        (CensusKind::Kernel, PageType::Reserved),
        (CensusKind::Yours, PageType::Yours),
    ] {
        assert_eq!(pages(kind), of(page_type), "{kind:?}");
    }
    assert_eq!(
        pages(CensusKind::Metadata) + pages(CensusKind::MemMap),
        ledger.metadata
    );
    assert_eq!(
        pages(CensusKind::Metadata) * PAGE_SIZE as u64,
        ledger.descriptor_bytes
    );
    for (kind, of) in census
        .iter()
        .filter(|&(kind, _)| kind != CensusKind::Untouched)
    {
        let by_order = of.by_order.iter().enumerate();
        assert_eq!(
            of.pages,
            by_order.map(|(o, n)| n << o).sum::<u64>(),
            "{kind:?}"
        );
        assert_eq!(of.blocks, of.by_order.iter().sum::<u64>(), "{kind:?}");
    }
    // Every descriptor of a block that is in use is some block's. (Those of vmalloc areas and of caches are not blocks'.)
    let mut active = 0;
    mm.slabinfo(|cache| {
        let of_blocks = [
            "kmem_cache_buddy",
            "kmem_cache_slab",
            "folio_file",
            "folio_anon",
            "ptdesc",
        ];
        if of_blocks.contains(&cache.name) {
            active += cache.active_objs;
        }
    });
    let described: u64 = census.iter().map(|(_, of)| of.descriptors).sum();
    assert_eq!(described, active);
    let page_map: u64 = {
        let mut at = None;
        let mut sum = 0;
        mm.census_visit(|step| {
            assert!(at.is_none_or(|end| step.pfn.0 >= end), "{step:?}");
            at = Some(step.pfn.0 + step.pages);
            sum += u64::from(step.pages);
        });
        sum
    };
    assert_eq!(page_map, ledger.given);
    census
}

#[test]
fn is_the_ledger_at_a_quiet_moment() {
    for machine in machines() {
        let mm = machine.boot();
        same_as_ledger(&mm);
        let mut rng = Rng(7);
        let (mut blocks, mut objects) = (Vec::new(), Vec::<(NonNull<u8>, Option<usize>)>::new());
        for round in 0..scaled(6, 2) {
            for _ in 0..scaled(600, 40) {
                match rng.below(8) {
                    0..=3 => {
                        let order = random_order(&mut rng);
                        if let Some((pfn, kind)) = alloc(&mm, rng.below(4), order) {
                            blocks.push((pfn, kind, order));
                        }
                    }
                    4 => {
                        let size = random_size(&mut rng);
                        let large = size > memdesc::slab::KMALLOC_MAX_CACHE_SIZE;
                        let order = size.next_power_of_two().ilog2().saturating_sub(PAGE_SHIFT);
                        if let Ok(ptr) = mm.kmalloc(size, GFP_KERNEL) {
                            objects.push((ptr, large.then_some(order as usize)));
                        }
                    }
                    5 if !objects.is_empty() => {
                        kfree(&mm, objects.swap_remove(rng.below(objects.len())).0);
                    }
                    _ if !blocks.is_empty() => {
                        free(&mm, blocks.swap_remove(rng.below(blocks.len())).0);
                    }
                    _ => {}
                }
            }
            let census = same_as_ledger(&mm);
            let mut expected = Known::new();
            for &(_, kind, order) in &blocks {
                *expected.entry((kind.name(), order)).or_default() += 1;
            }
            for order in objects.iter().filter_map(|&(_, order)| order) {
                *expected
                    .entry((CensusKind::LargeKmalloc.name(), order))
                    .or_default() += 1;
            }
            assert_eq!(known(&census), expected, "{} {round}", machine.name);
            let file = census.of(CensusKind::File);
            assert_eq!(file.descriptors, file.blocks);
            assert_eq!(
                file.descriptor_bytes,
                file.blocks * size_of::<Folio>() as u64
            );
        }
        objects.iter().for_each(|&(ptr, _)| kfree(&mm, ptr));
        blocks.iter().for_each(|&(pfn, _, _)| free(&mm, pfn));
        mm.shrink();
        let census = same_as_ledger(&mm);
        assert!(known(&census).is_empty(), "{census:?}");
    }
}

#[test]
fn reserved_memory_is_told_apart() {
    let mm = Machine::flat(scaled(16384, 2048) as u32).boot();
    let boot = mm.census();
    assert!(boot.of(CensusKind::MemMap).pages > 0);
    assert_eq!(boot.of(CensusKind::Kernel).pages, 0);
    let pfn = mm.alloc_pages(GFP_KERNEL, 3).unwrap();
    // SAFETY: bare pages that are ours, and never freed.
    unsafe { mm.mark_reserved(pfn) };
    let census = same_as_ledger(&mm);
    assert_eq!(census.of(CensusKind::Kernel).by_order[3], 1);
    assert_eq!(census.of(CensusKind::Kernel).descriptors, 0);
    assert_eq!(census.of(CensusKind::MemMap), boot.of(CensusKind::MemMap));
    assert!(census.descriptor_bytes() <= census.of(CensusKind::Metadata).pages * PAGE_SIZE as u64);
}

/// One thread's load: pages of all orders and types but file folios, and objects, memory nearly full.
fn load(mm: &Mm<Host>, seed: u64, most: usize, stop: &AtomicBool, rounds: usize) {
    let mut rng = Rng(seed);
    let (mut blocks, mut objects) = (Vec::new(), Vec::new());
    let mut round = 0;
    while !stop.load(Ordering::Relaxed) && round < rounds {
        round += 1;
        for _ in 0..64 {
            if rng.one_in(3) && !blocks.is_empty() || blocks.len() > most {
                free(mm, blocks.swap_remove(rng.below(blocks.len())));
            } else if rng.one_in(3) {
                let size = random_size(&mut rng);
                objects.extend(mm.kmalloc(size, GFP_ATOMIC));
            } else {
                let order = random_order(&mut rng);
                let what = [0, 1, 3][rng.below(3)];
                blocks.extend(alloc(mm, what, order).map(|(pfn, _)| pfn));
            }
            if objects.len() > most {
                objects.drain(..most / 2).for_each(|ptr| kfree(mm, ptr));
            }
        }
        // From time to time all of it, so that free memory merges to the largest blocks and is cut up again.
        if rng.one_in(64) {
            blocks.drain(..).for_each(|pfn| free(mm, pfn));
            objects.drain(..).for_each(|ptr| kfree(mm, ptr));
            mm.shrink();
        }
    }
    blocks.drain(..).for_each(|pfn| free(mm, pfn));
    objects.drain(..).for_each(|ptr| kfree(mm, ptr));
}

#[test]
fn vmalloc_areas_are_single_pages() {
    let machine = Machine::flat(scaled(16384, 2048) as u32);
    let mm = machine.boot_on(machine.host().vmalloc(2 << 20).build().unwrap());
    let ptr = mm.vmalloc(20 * PAGE_SIZE, GFP_KERNEL).unwrap();
    let census = same_as_ledger(&mm);
    let area = census.of(CensusKind::Vmalloc);
    assert_eq!((area.pages, area.by_order[0]), (20, 20));
    assert_eq!((area.descriptors, area.descriptor_bytes), (20, 160));
    // SAFETY: allocated above, freed once.
    unsafe { mm.vfree(ptr) };
}

/// Stops the load, also if the walk panics.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn under_load_every_page_is_counted_once() {
    for machine in machines() {
        let machine = machine.cpus(2);
        let mm = machine.boot_on(machine.host().floating(1).build().unwrap());
        // What stays: folios of many orders, between which all the rest moves.
        let (mut kept, mut between) = (Vec::new(), Vec::new());
        for order in [0, 0, 1, 2, 3, 4, 0, 5, 7, 3, 0, 6, 2] {
            let order = if cfg!(miri) { order.min(4) } else { order };
            for _ in 0..scaled(3, 1) {
                kept.extend(mm.alloc_folio(GFP_HIGHUSER_MOVABLE, order, FolioKind::File));
                between.extend(mm.alloc_pages(GFP_KERNEL | gfp::__GFP_MOVABLE, order));
            }
        }
        between.drain(..).for_each(|pfn| free(&mm, pfn));
        let before = mm.census();
        let ram = before.pages();
        let stop = AtomicBool::new(false);
        let most = ram as usize / 64;
        let (mut walks, mut torn, mut unsettled) = (0u64, 0, 0);
        std::thread::scope(|scope| {
            let workers: Vec<_> = (0..2)
                .map(|cpu| {
                    let (mm, stop) = (&mm, &stop);
                    scope.spawn(move || {
                        let _cpu = mm.platform().claim(cpu).unwrap();
                        load(mm, 11 + cpu as u64, most, stop, scaled(usize::MAX, 4));
                    })
                })
                .collect();
            let _stop = Stop(&stop);
            let end = Instant::now() + Duration::from_millis(400);
            let all_gone = || workers.iter().all(|w| w.is_finished());
            while !all_gone() && Instant::now() < end || walks < 3 {
                let census = mm.census();
                assert_eq!(census.pages(), ram, "{census:?}");
                // Nobody touches these while they are counted.
                for kind in [CensusKind::File, CensusKind::MemMap, CensusKind::Kernel] {
                    assert_eq!(census.of(kind), before.of(kind), "{kind:?} {census:?}");
                }
                for (kind, of) in census.iter() {
                    assert!(of.pages <= ram && of.blocks <= of.pages, "{kind:?} {of:?}");
                }
                walks += 1;
                torn += census.torn;
                unsettled += census.of(CensusKind::Unsettled).pages;
            }
        });
        println!(
            "{}: {walks} walks of {ram} pages, torn {torn}, unsettled {unsettled}",
            machine.name
        );
        kept.drain(..).for_each(|pfn| free(&mm, pfn));
        mm.shrink();
        let after = same_as_ledger(&mm);
        assert!(known(&after).is_empty(), "{after:?}");
    }
}
