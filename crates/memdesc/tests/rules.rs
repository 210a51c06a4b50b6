//! The rules that memdesc never breaks, one test or more for each: 1–5, 9 and 10.

mod common;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::NonNull;
use std::time::Instant;

use common::*;
use memdesc::gfp::{
    self, __GFP_MEMALLOC, GFP_ATOMIC, GFP_HIGHUSER_MOVABLE, GFP_KERNEL, GFP_NOWAIT,
};
use memdesc::*;
use memdesc_host::Host;

const PER_PAGE: f64 = 1.0;

/// Pages in so many MiB.
const fn mib(n: u32) -> u32 {
    n << 8
}

fn other<P: Platform>(mm: &Mm<P>) -> u64 {
    let l = ledger(mm);
    assert_eq!(l.descriptor_bytes, 0);
    l.other_metadata_bytes
}

/// One word a page, and nothing else grows with the number of pages but a byte a pageblock and two a section.
#[test]
fn rule_1_one_word_a_page() {
    assert_eq!(size_of::<Word>(), 8);
    let (small, large) = (mib(1024), mib(16 << 10));
    let (a, b) = (
        Machine::flat(small).unsampled().boot(),
        Machine::flat(large).unsampled().boot(),
    );
    for (mm, pages) in [(&a, small), (&b, large)] {
        assert_eq!(mm.ledger().memmap_bytes, 8 * u64::from(pages));
        assert_eq!(mm.ledger().given, u64::from(pages));
    }
    let more = u64::from(large - small);
    // The last page of boot memory is not always full.
    let allowed = more / 512 + more / 32768 * 2 + 2 * PAGE_SIZE as u64;
    let grown = other(&b).saturating_sub(other(&a));
    assert!(grown <= allowed, "{grown} bytes more for {more} pages");
    // All of it, at this size: next to nothing beside the words.
    assert!(other(&b) < 1 << 20, "{}", other(&b));
}

/// Every page leads to the head: no order is an exception, and a tail is never taken for a head.
#[test]
fn rule_1_every_page_leads_to_the_same() {
    let mm = Machine::flat(mib(64)).unsampled().boot();
    for order in 0..=MAX_ORDER {
        let pfn = mm
            .alloc_folio(GFP_HIGHUSER_MOVABLE, order, FolioKind::File)
            .unwrap();
        let (_, _, Memory::File(folio)) = mm.lookup(pfn) else {
            panic!()
        };
        for page in 0..1 << order {
            let (head, o, Memory::File(other)) = mm.lookup(pfn.add(page)) else {
                panic!()
            };
            assert_eq!((head, o), (pfn, order));
            assert_eq!(folio.as_ptr(), other.as_ptr());
        }
        // SAFETY: the folio is ours; its memory stays a folio's, since nothing gives back slabs between here and the end of the loop.
        let folio = unsafe { folio.as_ref() };
        let tail = mm.folio_get(pfn.add((1 << order) - 1)).unwrap();
        assert_eq!((tail.head(), folio.refcount()), (pfn, 2));
        drop(tail);
        free(&mm, pfn);
        assert_eq!(folio.refcount(), 0);
        assert!(mm.folio_get(pfn).is_none(), "a freed folio cannot be got");
    }
}

/// Taking over memory writes next to nothing, and an untouched map of zero bytes is valid.
#[test]
fn rule_2_all_zero_is_valid() {
    let huge_pages = std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled");
    let exact = !huge_pages.is_ok_and(|s| s.contains("[always]"));
    for (gib, limit) in [(64, 1 << 20), (1024, 4 << 20)] {
        let machine = Machine::flat(mib(gib << 10)).unsampled();
        let host = machine.host().build().unwrap();
        let start = Instant::now();
        let mm = machine.boot_on(host);
        let took = start.elapsed();
        let resident = mm.platform().resident_bytes();
        println!("{gib} GiB: {resident} bytes written, {took:?}");
        assert!(
            !exact || resident <= limit,
            "{gib} GiB: {resident} bytes resident"
        );
        assert!(took.as_millis() < 500, "{took:?}");
        let mut rng = Rng(1);
        for _ in 0..20_000 {
            let pfn = Pfn(rng.below(mib(gib << 10) as usize * 99 / 100) as u32);
            assert!(
                matches!(mm.lookup(pfn), (p, 0, Memory::Untouched) if p == pfn),
                "{pfn:?}"
            );
        }
        // Reading the map made pages of it resident too; from here on the first request is all there is.
        let resident = mm.platform().resident_bytes();
        let pfn = mm.alloc_pages(GFP_KERNEL, 0).unwrap();
        assert!(matches!(mm.lookup(pfn).2, Memory::Bare));
        free(&mm, pfn);
        let more = mm.platform().resident_bytes() - resident;
        assert!(!exact || more <= 1 << 20, "{more} bytes for the first page");
    }
}

/// Not known to be zero: the map is zeroed, whatever was there.
#[test]
fn rule_2_memory_that_is_not_zero() {
    let mut machine = Machine::flat(2048).unsampled();
    machine.config.memory_is_zeroed = false;
    let host = machine.host().build().unwrap();
    // SAFETY: the arena is ours until the memory manager takes it over.
    unsafe { host.direct_map().write_bytes(0xee, 2048 * PAGE_SIZE) };
    let mm = machine.boot_on(host);
    let mut pages = Pages::new(&machine);
    for order in [0, 3, 9, 0, 1] {
        let pfn = mm.alloc_pages(GFP_KERNEL, order).unwrap();
        pages.got(&mm, pfn, order, Kind::Bare);
    }
    pages.check(&mm);
    pages.free_all(&mm, &mut Rng(1));
    teardown(&machine, &mm);
}

/// A long mixed life, with everything that allocates and frees.
fn live_long(mm: &Mm<Host>, rounds: usize, seed: u64) -> u64 {
    let mut rng = Rng(seed);
    let mut pages: Vec<Pfn> = Vec::new();
    let mut objects: Vec<NonNull<u8>> = Vec::new();
    let mut ops = 0;
    for _ in 0..rounds {
        // Waves: up and down, so that lists fill and drain.
        let up = rng.one_in(2);
        for _ in 0..rng.below(200) {
            ops += 1;
            match rng.below(6) {
                0 | 1 if up => {
                    let order = [0, 0, 0, 1, 2, 3, 4, 9][rng.below(8)];
                    let got = match rng.below(4) {
                        0 => mm.alloc_folio(GFP_HIGHUSER_MOVABLE, order, FolioKind::Anon),
                        1 => mm.alloc_page_table(GFP_KERNEL, 0),
                        _ => mm.alloc_pages(GFP_ATOMIC, order),
                    };
                    pages.extend(got);
                }
                2 if up => {
                    let size = 1 + rng.below(1200);
                    objects.extend(mm.kmalloc(size, GFP_KERNEL));
                }
                3 if !pages.is_empty() => {
                    let index = rng.below(pages.len());
                    free(mm, pages.swap_remove(index));
                }
                4 if !objects.is_empty() => {
                    let index = rng.below(objects.len());
                    kfree(mm, objects.swap_remove(index));
                }
                _ => {}
            }
        }
        if rng.one_in(100) {
            mm.shrink();
        }
    }
    pages.into_iter().for_each(|pfn| free(mm, pfn));
    objects.into_iter().for_each(|ptr| kfree(mm, ptr));
    ops
}

#[test]
fn rule_3_freeing_allocates_nothing() {
    let machine = Machine::flat(mib(64)).unsampled().cpus(1);
    let mm = machine.boot();
    let _cpu = mm.platform().claim(0).unwrap();
    let mut ops = 0;
    while ops < scaled(2_000_000, 500) as u64 {
        ops += live_long(&mm, scaled(2000, 5), ops);
    }
    assert_eq!(mm.event(Event::AllocOnFree), 0);
    teardown(&machine, &mm);
}

/// The count above would show it: a hook on the free path that allocates is caught.
#[test]
#[cfg(debug_assertions)]
fn rule_3_an_allocation_on_a_free_path_is_caught() {
    for objects in [false, true] {
        let machine = Machine::flat(2048).unsampled();
        let later: Later<Hooked> = Later::default();
        let hook_mm = later.clone();
        let mut hooked = Hooked::new(machine.host().build().unwrap());
        hooked.on_free = Some(Box::new(move |_, _| {
            if let Some(mm) = hook_mm.get() {
                if objects {
                    let _ = mm.kmalloc(64, GFP_ATOMIC);
                } else {
                    let _ = mm.alloc_pages(GFP_ATOMIC, 0);
                }
            }
        }));
        let mm = machine.boot_on(hooked);
        let pfn = mm.alloc_pages(GFP_KERNEL, 0).unwrap();
        later.set(&mm);
        let died = catch_unwind(AssertUnwindSafe(|| free(&mm, pfn))).unwrap_err();
        let text = died
            .downcast_ref::<String>()
            .cloned()
            .or(died.downcast_ref::<&str>().map(|s| s.to_string()));
        assert!(text.unwrap().contains("allocation on a free path"));
        assert_eq!(mm.event(Event::AllocOnFree), 1);
    }
}

/// The whole machine at work with its free pages inaccessible: who touches one dies.
#[test]
fn rule_4_free_memory_is_never_touched() {
    // Each page is a mapping of its own at worst, and a process may have 65530.
    let mut machine = Machine::flat(mib(32)).unsampled().cpus(1);
    machine.config.debug_pagealloc = true;
    let mm = machine.boot();
    // With the services from the environment, other machines of this process use mappings up.
    let alone = std::env::var_os("MEMDESC_FREEPAGE").is_none();
    // Untouched memory is accessible; after this, nothing that is free is.
    let all: Vec<_> =
        std::iter::from_fn(|| mm.alloc_pages(GFP_NOWAIT | __GFP_MEMALLOC, 3).ok()).collect();
    all.into_iter().for_each(|pfn| free(&mm, pfn));
    for seed in 0..3 {
        live_long(&mm, scaled(1500, 3), seed);
        mm.shrink();
        let mut pages = Pages::new(&machine);
        let mut rng = Rng(seed);
        for _ in 0..400 {
            let order = rng.below(8);
            if let Ok(pfn) = mm.alloc_pages(GFP_KERNEL | gfp::__GFP_ZERO, order) {
                pages.got(&mm, pfn, order, Kind::Bare);
                assert!(
                    bytes(page(&mm, pfn), PAGE_SIZE << order)
                        .iter()
                        .all(|&b| b == 0)
                );
                fill(page(&mm, pfn), PAGE_SIZE << order, 0xff);
            }
            if rng.one_in(2) && !pages.live.is_empty() {
                let index = rng.below(pages.live.len());
                pages.free(&mm, index);
            }
            if rng.one_in(50) {
                mm.drain_all();
            }
        }
        pages.free_all(&mm, &mut rng);
        teardown(&machine, &mm);
    }
    assert!(mm.platform().guards_free_pages() || !alone);
}

/// What lies in a page while it is free is there when it is handed out again.
#[test]
fn rule_4_contents_of_free_pages_stay() {
    let mut machine = Machine::flat(2048).unsampled();
    // Without the services that write to free pages before they count as free, or to those that are handed out, or give them away: nobody else does.
    machine.config = Config {
        memory_is_zeroed: true,
        debug_pagealloc: machine.config.debug_pagealloc,
        ..Config::default()
    };
    let mm = machine.boot();
    let pattern = |pfn: Pfn| (pfn.0 % 251) as u8 + 1;
    let mut written = vec![false; 2048];
    let mut rng = Rng(8);
    let mut seen = 0;
    for round in 0..scaled(8, 1) {
        let mut pages = Pages::new(&machine);
        loop {
            let order = if round % 2 == 0 {
                0
            } else {
                [0, 1, 2, 5, 8][rng.below(5)]
            };
            let Ok(pfn) = mm.alloc_pages(GFP_NOWAIT | __GFP_MEMALLOC, order) else {
                break;
            };
            pages.got(&mm, pfn, order, Kind::Bare);
            for p in pfn.0..pfn.0 + (1 << order) {
                let at = page(&mm, Pfn(p));
                if written[p as usize] {
                    assert!(
                        bytes(at, PAGE_SIZE).iter().all(|&b| b == pattern(Pfn(p))),
                        "{p:#x} was written while free"
                    );
                    seen += 1;
                }
                fill(at, PAGE_SIZE, pattern(Pfn(p)));
                written[p as usize] = true;
            }
        }
        pages.free_all(&mm, &mut rng);
        mm.drain_all();
        // What became a slab of descriptors was somebody's in the meantime.
        for pfn in 0..2048 {
            if matches!(mm.lookup(Pfn(pfn)).2, Memory::Slab(_)) {
                written[pfn as usize] = false;
            }
        }
    }
    assert!(cfg!(miri) || seen > 5000, "{seen}");
}

/// The chain of descriptors out of nothing: how deep it went, how many pages one request took.
fn chain(mm: &Mm<Host>) -> (u64, u64) {
    (
        vmstat(mm, "bootstrap_max_depth"),
        vmstat(mm, "bootstrap_max_pages"),
    )
}

#[test]
fn rule_5_the_recursion_stops() {
    // From an empty system, the first request of each kind.
    type First = fn(&Mm<Host>);
    let first: [First; 5] = [
        |mm| assert!(mm.alloc_pages(GFP_KERNEL, 0).is_ok()),
        |mm| assert!(mm.alloc_pages(GFP_KERNEL, 10).is_ok()),
        |mm| {
            assert!(
                mm.alloc_folio(GFP_HIGHUSER_MOVABLE, 0, FolioKind::Anon)
                    .is_ok()
            )
        },
        |mm| assert!(mm.kmalloc(8, GFP_ATOMIC).is_ok()),
        |mm| mm.alloc_pages_at(Pfn(77), 0).unwrap(),
    ];
    for op in first {
        let mm = Machine::flat(mib(16)).unsampled().boot();
        op(&mm);
        let (depth, pages) = chain(&mm);
        assert_eq!((depth, pages), (2, 2), "up out of nothing");
        ledger(&mm);
    }
}

#[test]
fn rule_5_worst_cases() {
    let machine = Machine::flat(mib(16)).unsampled().cpus(2);
    let everything = GFP_NOWAIT | __GFP_MEMALLOC;
    for case in 0..6 {
        let mm = machine.boot();
        let mut pages = Pages::new(&machine);
        let mut rng = Rng(case);
        let take = |pages: &mut Pages, order: usize, n: usize| {
            for _ in 0..n {
                match mm.alloc_pages(everything, order) {
                    Ok(pfn) => pages.got(&mm, pfn, order, Kind::Bare),
                    Err(_) => return false,
                }
            }
            true
        };
        match case {
            // Only one big block is left, then it goes page by page; caches emptied on the way.
            0 | 1 => {
                for order in (0..=MAX_ORDER).rev() {
                    while take(&mut pages, order, 1) {}
                }
                let big = pages.live.iter().position(|b| b.order >= 9).unwrap();
                pages.free(&mm, big);
                while take(&mut pages, 0, 1) {
                    if case == 1 {
                        mm.shrink();
                    }
                }
            }
            // Only single pages are left.
            2 | 3 => {
                while take(&mut pages, 0, 1) {}
                for index in (0..pages.live.len()).rev() {
                    if pages.live[index].pfn.0.is_multiple_of(2) {
                        pages.free(&mm, index);
                    }
                }
                mm.shrink();
                // Folios want descriptors, so do slabs.
                while let Ok(pfn) = mm.alloc_folio(everything, 0, FolioKind::Anon) {
                    pages.got(&mm, pfn, 0, Kind::Anon);
                    if case == 3 && rng.one_in(4) {
                        mm.shrink();
                    }
                }
            }
            // Full of folios, then of objects: no page is left for a descriptor.
            4 => {
                while let Ok(pfn) = mm.alloc_folio(everything, 0, FolioKind::File) {
                    pages.got(&mm, pfn, 0, Kind::File);
                }
                let mut objects = Vec::new();
                for round in 0..400 {
                    if !pages.live.is_empty() {
                        let index = rng.below(pages.live.len());
                        pages.free(&mm, index);
                    }
                    while let Ok(ptr) = mm.kmalloc(64 << (round % 7), everything) {
                        objects.push(ptr);
                    }
                }
                objects.into_iter().for_each(|ptr| kfree(&mm, ptr));
                mm.shrink();
            }
            // Always on the edge.
            _ => {
                for _ in 0..400 {
                    while take(&mut pages, rng.below(4), 1) {}
                    while let Ok(pfn) = mm.alloc_page_table(everything, 0) {
                        pages.got(&mm, pfn, 0, Kind::Table);
                    }
                    for _ in 0..rng.below(30) {
                        let index = rng.below(pages.live.len());
                        pages.free(&mm, index);
                    }
                    if rng.one_in(3) {
                        mm.shrink();
                    }
                }
            }
        }
        // Empty slabs that are kept for the next burst go back too.
        mm.shrink();
        pages.check(&mm);
        let (depth, most) = chain(&mm);
        println!(
            "case {case}: depth {depth}, pages {most}, __alloc_slab {}",
            mm.event(Event::AllocSlabStop)
        );
        assert!(depth <= 2 && most <= 3);
        assert_eq!(depth, 2, "the worst case was not reached");
        pages.free_all(&mm, &mut rng);
        teardown(&machine, &mm);
    }
}

/// Metadata a page of RAM, in bytes, when all of it that can be is in use in some way; the ledger balances.
fn cost(mm: &Mm<Host>) -> f64 {
    let l = ledger(mm);
    l.metadata_bytes() as f64 / l.given as f64
}

/// Fills memory; says how many allocations that were.
fn fill_up(mut one: impl FnMut() -> bool) -> usize {
    (0..).take_while(|_| one()).count()
}

#[test]
fn rule_9_the_ledger_balances_at_every_mix() {
    let machine = Machine::flat(mib(256)).unsampled();
    let everything = GFP_NOWAIT | __GFP_MEMALLOC;
    let mut report = Vec::new();
    let mut at_most = |name: &str, mm: &Mm<Host>, limit: f64| {
        let l = ledger(mm);
        let bytes = cost(mm);
        report.push(format!("{name}: {bytes:.2} bytes a page, limit {limit}"));
        assert!(
            l.free + l.untouched + l.pcp < l.given / 20 || name.contains("freed"),
            "{name}: {l:?}"
        );
        assert!(bytes <= limit, "{}", report.join("\n"));
    };
    let fixed = 2.0 * PER_PAGE;

    let mm = machine.boot();
    fill_up(|| mm.alloc_folio(everything, 0, FolioKind::Anon).is_ok());
    at_most("all folios", &mm, 56.0);
    at_most("all folios, the target", &mm, 48.0);
    // Every other one freed: what was their descriptors describes the free pages.
    for pfn in (0..mib(256)).step_by(2) {
        if matches!(mm.lookup(Pfn(pfn)).2, Memory::Anon(_)) {
            free(&mm, Pfn(pfn));
        }
    }
    mm.shrink();
    at_most("all folios, every other freed", &mm, 48.0);

    let mm = machine.boot();
    fill_up(|| mm.alloc_pages(everything, 0).is_ok());
    at_most("all bare", &mm, 24.0);
    for pfn in (0..mib(256)).step_by(2) {
        if matches!(mm.lookup(Pfn(pfn)).2, Memory::Bare) {
            free(&mm, Pfn(pfn));
        }
    }
    mm.shrink();
    at_most("all bare, every other freed", &mm, 24.0);

    let mm = machine.boot();
    fill_up(|| mm.alloc_page_table(everything, 0).is_ok());
    at_most("all page tables", &mm, 48.0);

    for order in [1, 2, 3, 4, 9] {
        let mm = machine.boot();
        fill_up(|| mm.alloc_folio(everything, order, FolioKind::File).is_ok());
        fill_up(|| mm.alloc_folio(everything, 0, FolioKind::File).is_ok());
        let limit = 8.0 + 32.0 / f64::from(1 << order) + fixed + 1.0;
        at_most(&format!("all folios of order {order}"), &mm, limit);
    }

    let mm = machine.boot();
    let mut rng = Rng(1);
    fill_up(|| {
        let order = rng.below(5);
        let got = match rng.below(3) {
            0 => mm.alloc_folio(everything, order, FolioKind::File),
            1 => mm.alloc_pages(everything, order),
            _ => mm.alloc_page_table(everything, 0),
        };
        got.is_ok() || mm.alloc_pages(everything, 0).is_ok()
    });
    at_most("a mix of orders and types", &mm, 56.0);

    // Morphing leaves the larger descriptors with smaller needs; still no mix may cost more.
    let mm = machine.boot();
    let all: Vec<_> =
        std::iter::from_fn(|| mm.alloc_folio(everything, 0, FolioKind::Anon).ok()).collect();
    all.into_iter().for_each(|pfn| free(&mm, pfn));
    fill_up(|| mm.alloc_pages(everything, 0).is_ok());
    at_most("folios first, then all bare", &mm, 56.0);
    println!("{}", report.join("\n"));
}

/// Slabs cost a `struct slab` each. What a page costs depends on the size of the slab, and so on that of the objects.
#[test]
fn rule_9_slabs() {
    let machine = Machine::flat(mib(64)).unsampled();
    let everything = GFP_NOWAIT | __GFP_MEMALLOC;
    let mut worst: (f64, usize) = (0.0, 0);
    for size in [
        8, 16, 32, 64, 96, 128, 192, 256, 512, 1024, 2048, 4096, 8192,
    ] {
        let mm = machine.boot();
        // Only the bookkeeping: objects are not written.
        fill_up(|| mm.kmalloc(size, everything).is_ok());
        let bytes = cost(&mm);
        println!("all kmalloc-{size}: {bytes:.2} bytes a page");
        // A bit for each object is 64 bytes for a page of 8-byte ones: there Linux's list through the free objects is cheaper.
        // Nothing else may cost more than a `struct page`.
        if size == 8 {
            assert!(bytes <= 88.0, "kmalloc-8: {bytes:.2} bytes a page");
        } else if bytes > worst.0 {
            worst = (bytes, size);
        }
    }
    assert!(
        worst.0 <= 64.0,
        "kmalloc-{}: {:.2} bytes a page",
        worst.1,
        worst.0
    );
}

/// Splitting the largest block for a single page writes a word for each half, not for each page; so does merging it back.
#[test]
fn rule_9_words_written_by_a_split() {
    let mm = Machine::flat(mib(64)).unsampled().boot();
    // Descriptors and a free block of order 10 are there already, and nothing smaller.
    let pfn = mm.alloc_pages(GFP_KERNEL, 10).unwrap();
    free(&mm, pfn);
    mm.drain_all();
    let before = vmstat(&mm, "words_written");
    let head = Pfn((0..mib(64))
        .step_by(1024)
        .find(|&p| mm.lookup(Pfn(p)).1 == 10)
        .unwrap());
    mm.alloc_pages_at(head.add(341), 0).unwrap();
    let split = vmstat(&mm, "words_written") - before;
    assert!((10..=24).contains(&split), "{split} words");
    free(&mm, head.add(341));
    let before = vmstat(&mm, "words_written");
    mm.drain_all();
    let merge = vmstat(&mm, "words_written") - before;
    assert!((10..=24).contains(&merge), "{merge} words");
    assert_eq!(mm.lookup(head).1, 10);
}

/// What is freed wrongly is reported as what it is, and nothing changes.
#[test]
fn rule_10_errors_are_values() {
    let machine = Machine::new("holes", &[range(0, 4096, 0), range(8192, 12288, 0)]).unsampled();
    let reports = Reports::default();
    let mm = machine.boot_on(reports.on(machine.host()).build().unwrap());
    let bare = mm.alloc_pages(GFP_KERNEL, 2).unwrap();
    let large = mm.alloc_pages(GFP_KERNEL, 6).unwrap();
    let gone = mm.alloc_pages(GFP_KERNEL, 1).unwrap();
    let gone_large = mm.alloc_pages(GFP_KERNEL, 7).unwrap();
    let object = mm.kmalloc(100, GFP_KERNEL).unwrap();
    let big = mm.kmalloc(20_000, GFP_KERNEL).unwrap();
    let cache = mm
        .kmem_cache_create("a", 64, 8, CacheFlags::EMPTY, None)
        .unwrap();
    let theirs = mm.kmem_cache_alloc(&cache, GFP_KERNEL).unwrap();
    let boot = (0..12288)
        .find(|&p| matches!(mm.lookup(Pfn(p)).2, Memory::Reserved(_)))
        .map(Pfn)
        .unwrap();
    free(&mm, gone);
    free(&mm, gone_large);
    assert_eq!(reports.take(), []);
    let inside = |ptr: NonNull<u8>, by: usize| ptr.map_addr(|a| a.saturating_add(by));
    let before = ledger(&mm);
    let objects = |mm: &Mm<Host>| {
        let mut all = Vec::new();
        mm.slabinfo(|c| all.push((c.name.to_owned(), c.active_objs)));
        all
    };
    let objects_before = objects(&mm);

    use Corruption::{DoubleFree, NotAHead, NotRam, WrongType};
    let pages: &[(Pfn, Corruption, &str)] = &[
        (gone, DoubleFree, "freed twice"),
        (gone_large, DoubleFree, "freed twice, large"),
        (bare.add(1), NotAHead, "a tail that has a word"),
        (large.add(1), NotAHead, "a tail that has none"),
        (large.add(32), NotAHead, "an aligned tail"),
        (mm.virt_to_pfn(object.as_ptr()), WrongType, "a slab"),
        (boot, WrongType, "the memory map"),
        (Pfn(5000), NotRam, "a hole"),
        (Pfn(u32::MAX - 1), NotRam, "far out"),
    ];
    for &(pfn, what, name) in pages {
        let line = (free(&mm, pfn), line!()).1;
        let seen = reports.one();
        assert_eq!((seen.what, seen.pfn), (what, pfn), "{name}: {seen:?}");
        assert_eq!((seen.caller.1, seen.cache), (line, None), "{name}");
        assert!(seen.caller.0.ends_with("rules.rs"));
        assert_eq!(ledger(&mm), before, "{name}");
    }
    let pointers: &[(NonNull<u8>, Corruption, &str)] = &[
        (page(&mm, bare), WrongType, "bare pages"),
        (page(&mm, gone), DoubleFree, "a free page"),
        (page(&mm, boot), WrongType, "the memory map"),
        (inside(big, 4096), NotAHead, "inside large kmalloc"),
        (inside(big, 8), NotAHead, "just inside large kmalloc"),
        (inside(object, 8), NotAHead, "inside an object"),
        (page(&mm, Pfn(5000)), NotRam, "a hole"),
        (NonNull::from(&mut 0u8), NotRam, "the stack"),
    ];
    for &(ptr, what, name) in pointers {
        kfree(&mm, ptr);
        assert_eq!(reports.one().what, what, "{name}");
        assert_eq!(ledger(&mm), before, "{name}");
        assert_eq!(objects(&mm), objects_before, "{name}");
    }
    cache_free(&mm, &cache, object);
    assert_eq!(reports.one().what, Corruption::WrongCache);
    assert_eq!(objects(&mm), objects_before);
    // SAFETY: wrong on purpose: not bare pages. It is refused.
    let got = unsafe { mm.retype(large.add(1), PageType::Anon) };
    assert_eq!(got, Err(AllocError::Busy));
    assert_eq!(ledger(&mm), before);

    // All of it can still be freed as it should be.
    for ptr in [object, big, theirs] {
        kfree(&mm, ptr);
    }
    free(&mm, bare);
    free(&mm, large);
    mm.kmem_cache_destroy(cache).unwrap();
    assert_eq!(reports.take(), []);
    teardown(&machine, &mm);
}

/// No machine is too odd to be refused with a reason.
#[test]
fn rule_10_bad_machines() {
    let try_with = |ranges: &[MemRange], cpus: usize| {
        let wide = [range(0, 1 << 16, 0)];
        let host = Host::builder().memory(&wide).cpus(cpus).build().unwrap();
        Mm::new(
            host,
            &Config {
                memory_is_zeroed: true,
                ..common::base_config()
            },
            ranges,
        )
        .map(|mm| {
            ledger(&mm);
        })
    };
    let bytes = |start: u64, end: u64| MemRange {
        start: PhysAddr(start),
        end: PhysAddr(end),
        node: 0,
    };
    assert_eq!(try_with(&[], 1), Err(InitError::NoMemory));
    assert_eq!(
        try_with(&[range(5, 5, 0)], 1),
        Err(InitError::EmptyRange(Pfn(5).phys()))
    );
    assert_eq!(
        try_with(&[range(6, 5, 0)], 1),
        Err(InitError::EmptyRange(Pfn(6).phys()))
    );
    assert_eq!(
        try_with(&[bytes(100, 4000)], 1),
        Err(InitError::EmptyRange(PhysAddr(100)))
    );
    assert!(matches!(
        try_with(&[range(0, 4096, 0), range(4000, 5000, 0)], 1),
        Err(InitError::Overlap(_))
    ));
    assert!(matches!(
        try_with(&[range(0, 4096, 0), range(10, 20, 0)], 1),
        Err(InitError::Overlap(_))
    ));
    assert_eq!(
        try_with(&[range(0, 4096, 8)], 1),
        Err(InitError::TooManyNodes(8))
    );
    assert!(matches!(
        try_with(&[range(0, 2, 0)], 1),
        Err(InitError::TooSmall(_))
    ));
    assert_eq!(
        try_with(&[range(0, 4096, 0)], 1025),
        Err(InitError::BadCpuCount(1025))
    );
    assert!(matches!(
        try_with(&[bytes(0, u64::MAX)], 1),
        Err(InitError::TooHigh(_))
    ));
    assert_eq!(
        try_with(&[range(0, 4096, 7), range(9000, 9001, 0)], 1),
        Ok(())
    );
    // The smallest that works, and one page less.
    let least = (2..4096)
        .find(|&pages| try_with(&[range(0, pages, 0)], 1).is_ok())
        .unwrap();
    println!("{least} pages are enough");
    let machine = Machine::flat(least).unsampled();
    let mm = machine.boot();
    while mm.alloc_pages(GFP_NOWAIT | __GFP_MEMALLOC, 0).is_ok() {}
    ledger(&mm);
}
