//! Who had which page: the bounded table of page histories, the depot of call stacks, and what reports say of both (`page_owner`, `stackdepot`).

mod common;

use std::panic::Location;

use common::*;
use memdesc::gfp::{GFP_ATOMIC, GFP_HIGHUSER_MOVABLE, GFP_KERNEL, GFP_NOWAIT};
use memdesc::*;
use memdesc_host::Host;

fn machine(entries: usize, depot: usize) -> Machine {
    let mut machine = Machine::flat(4096);
    machine.config.page_owner = entries;
    machine.config.stack_depot = depot;
    machine
}

fn boot(entries: usize, depot: usize) -> (Mm<Host>, Reports) {
    let machine = machine(entries, depot);
    let reports = Reports::default();
    let mm = machine.boot_on(reports.on(machine.host()).build().unwrap());
    (mm, reports)
}

#[track_caller]
fn line() -> u32 {
    Location::caller().line()
}

/// An event of this page was here, on this line.
#[track_caller]
fn at(track: Option<PageTrack>, line: u32) -> PageTrack {
    let track = track.expect("nothing was recorded");
    assert!(
        track.track.location.file().ends_with("page_history.rs"),
        "{track:?}"
    );
    assert_eq!(track.track.location.line(), line, "{track:?}");
    track
}

#[test]
fn every_public_call_is_the_one_that_is_named() {
    let (mm, _) = boot(4096, 0);
    let check = |pfn: Pfn, line: u32, kind: PageType, order: usize| {
        let history = mm.page_history(pfn).unwrap();
        assert_eq!(history.head, pfn);
        let track = at(history.allocated, line);
        assert_eq!((track.kind, track.order), (kind, order));
    };
    let (pfn, l) = (mm.alloc_pages(GFP_KERNEL, 0).unwrap(), line());
    check(pfn, l, PageType::Bare, 0);
    let freed = (free(&mm, pfn), line()).1;
    let _ = freed;
    let history = mm.page_history(pfn).unwrap();
    let track = history.freed.unwrap();
    assert_eq!((track.kind, track.order), (PageType::Bare, 0));
    let (pfn, l) = (mm.alloc_pages(GFP_KERNEL, 4).unwrap(), line());
    check(pfn, l, PageType::Bare, 4);
    // Any page of it leads there.
    assert_eq!(mm.page_history(pfn.add(13)).unwrap().head, pfn);
    let (pfn, l) = (mm.alloc_pages(GFP_KERNEL, 9).unwrap(), line());
    check(pfn, l, PageType::Bare, 9);
    let (pfn, l) = (mm.alloc_pages_node(Some(0), GFP_KERNEL, 1).unwrap(), line());
    check(pfn, l, PageType::Bare, 1);
    let movable = GFP_HIGHUSER_MOVABLE;
    let (pfn, l) = (mm.alloc_folio(movable, 2, FolioKind::File), line());
    check(pfn.unwrap(), l, PageType::File, 2);
    let (pfn, l) = (mm.alloc_page_table(GFP_KERNEL, 0).unwrap(), line());
    check(pfn, l, PageType::PageTable, 0);
    let (ptr, l) = (mm.kmalloc(100_000, GFP_KERNEL).unwrap(), line());
    check(mm.virt_to_pfn(ptr.as_ptr()), l, PageType::LargeKmalloc, 5);
    let mut many = [Pfn(0); 40];
    let (n, l) = (mm.alloc_pages_bulk(GFP_KERNEL, &mut many), line());
    assert_eq!(n, 40);
    many.iter()
        .for_each(|&pfn| check(pfn, l, PageType::Bare, 0));
    let (pfn, l) = (mm.alloc_pages_nolock(GFP_NOWAIT, None, 0), line());
    check(pfn.unwrap(), l, PageType::Bare, 0);
    // A slab's pages: from inside, since the object's caller is not the slab's.
    let ptr = mm.kmalloc(64, GFP_ATOMIC).unwrap();
    let slab = mm.lookup(mm.virt_to_pfn(ptr.as_ptr())).0;
    assert_eq!(
        mm.page_history(slab).unwrap().allocated.unwrap().kind,
        PageType::Slab
    );
    if !cfg!(miri) {
        let (ptr, l) = (mm.vmalloc(3 * PAGE_SIZE, GFP_KERNEL).unwrap(), line());
        for page in 0..3 {
            let pfn = mm.vmalloc_to_pfn(ptr.as_ptr().wrapping_add(page * PAGE_SIZE));
            check(pfn.unwrap(), l, PageType::Vmalloc, 0);
        }
    }
    ledger(&mm);
}

#[test]
fn off_costs_nothing_and_says_nothing() {
    let (mm, reports) = boot(0, 0);
    let pfn = mm.alloc_pages(GFP_KERNEL, 0).unwrap();
    assert!(mm.page_history(pfn).is_none());
    assert_eq!(mm.page_owner_info(), PageOwnerInfo::default());
    assert_eq!(mm.stack_depot_info(), DepotInfo::default());
    free(&mm, pfn);
    free(&mm, pfn);
    let seen = reports.one();
    assert!(!seen.text.contains("page history"), "{}", seen.text);
    let with = boot(1000, 1 << 16).0.ledger();
    let without = mm.ledger();
    let more = with.other_metadata_bytes - without.other_metadata_bytes;
    assert!(
        (1000 * 64 + (1 << 16)..1000 * 80 + (1 << 17)).contains(&more),
        "{more}"
    );
    assert!(with.balanced && without.balanced);
}

#[test]
fn the_table_is_bounded_and_says_what_it_dropped() {
    let (mm, reports) = boot(16, 0);
    let pages: Vec<Pfn> = (0..200)
        .map(|_| mm.alloc_pages(GFP_KERNEL, 0).unwrap())
        .collect();
    let info = mm.page_owner_info();
    assert_eq!((info.entries, info.used), (16, 16));
    assert!(info.dropped >= 184, "{info:?}");
    let known = pages
        .iter()
        .filter(|p| mm.page_history(**p).is_some())
        .count();
    assert!((1..=16).contains(&known), "{known}");
    // The latest is always known: what goes is the oldest.
    assert!(mm.page_history(pages[199]).is_some());
    // SAFETY: the page is ours; the second free of it is what is looked for.
    unsafe { mm.free_pages(pages[0]) };
    let more: Vec<Pfn> = (0..100)
        .map(|_| mm.alloc_pages(GFP_KERNEL, 1).unwrap())
        .collect();
    let target = *pages
        .iter()
        .find(|p| mm.page_history(**p).is_none())
        .unwrap();
    let inside = target;
    // Freed as an object's: a wrong call on a page whose history is gone.
    let ptr = std::ptr::NonNull::new(mm.page_address(inside)).unwrap();
    kfree(&mm, ptr);
    let seen = reports.one();
    assert!(seen.text.contains("page history dropped"), "{}", seen.text);
    drop(more);
}

#[test]
fn a_larger_block_hides_what_was_before() {
    let (mm, _) = boot(4096, 0);
    let large = mm.alloc_pages(GFP_KERNEL, 10).unwrap();
    free(&mm, large);
    // A page in its middle has a life of its own, and then the whole again.
    mm.alloc_pages_at(large.add(77), 0).unwrap();
    assert_eq!(mm.page_history(large.add(77)).unwrap().head, large.add(77));
    free(&mm, large.add(77));
    mm.drain_all();
    let (again, l) = (mm.alloc_pages_at(large, 10), line());
    again.unwrap();
    for page in [0, 1, 77, 1023] {
        let history = mm.page_history(large.add(page)).unwrap();
        assert_eq!((history.head, at(history.allocated, l).order), (large, 10));
    }
    free(&mm, large);
    let track = mm.page_history(large.add(77)).unwrap();
    assert_eq!((track.head, track.freed.unwrap().order), (large, 10));
}

#[test]
fn stacks_are_kept_once() {
    let (mm, _) = boot(4096, 1 << 16);
    let mut ids = Vec::new();
    let pages: Vec<Pfn> = (0..50)
        .map(|_| {
            let pfn = mm.alloc_pages(GFP_KERNEL, 0).unwrap();
            ids.push(mm.page_history(pfn).unwrap().allocated.unwrap().track.stack);
            pfn
        })
        .collect();
    assert!(ids.iter().all(|&id| id == ids[0] && id != StackId::NONE));
    let used = mm.stack_depot_info().used;
    let stack = mm.stack(ids[0]).unwrap();
    assert!(stack.location.file().ends_with("page_history.rs"));
    assert_eq!(stack.frames(), [] as [usize; 0]);
    let other = mm.alloc_pages(GFP_KERNEL, 0).unwrap();
    let id = mm
        .page_history(other)
        .unwrap()
        .allocated
        .unwrap()
        .track
        .stack;
    assert_ne!(id, ids[0]);
    assert!(mm.stack_depot_info().used > used);
    // A number of another depot is not taken for one of this.
    let (elsewhere, _) = boot(4096, 1 << 12);
    assert!(elsewhere.stack(id).is_none());
    drop(pages);
}

#[test]
fn a_full_depot_says_so() {
    let mut machine = machine(256, 19 * 8);
    machine.config.slab_debug = ALL;
    let reports = Reports::default();
    let mm = machine.boot_on(reports.on(machine.host()).build().unwrap());
    // Three cells each: room for six.
    let got = [
        mm.alloc_pages(GFP_KERNEL, 0).unwrap(),
        mm.alloc_pages(GFP_KERNEL, 0).unwrap(),
        mm.alloc_pages(GFP_KERNEL, 0).unwrap(),
        mm.alloc_pages(GFP_KERNEL, 0).unwrap(),
        mm.alloc_pages(GFP_KERNEL, 0).unwrap(),
        mm.alloc_pages(GFP_KERNEL, 0).unwrap(),
        mm.alloc_pages(GFP_KERNEL, 0).unwrap(),
        mm.alloc_pages(GFP_KERNEL, 0).unwrap(),
    ];
    let id = |pfn: &Pfn| {
        mm.page_history(*pfn)
            .unwrap()
            .allocated
            .unwrap()
            .track
            .stack
    };
    assert_eq!(id(got.last().unwrap()), StackId::LOST);
    let info = mm.stack_depot_info();
    assert!(info.lost > 0 && info.used <= info.bytes, "{info:?}");
    assert!(mm.stack(StackId::LOST).is_none());
}

#[cfg(not(miri))]
mod symbols {
    use super::*;

    #[inline(never)]
    fn who_allocates(mm: &Mm<Host>) -> Pfn {
        let pfn = mm.alloc_pages(GFP_KERNEL, 0).unwrap();
        std::hint::black_box(pfn)
    }

    #[inline(never)]
    fn who_frees(mm: &Mm<Host>, pfn: Pfn) {
        free(mm, pfn);
        std::hint::black_box(());
    }

    #[test]
    fn a_report_names_the_functions() {
        let machine = machine(4096, 1 << 16);
        let reports = Reports::default();
        let host = reports.on(machine.host()).stacks(true);
        let mm = machine.boot_on(host.build().unwrap());
        let before = who_allocates(&mm);
        let pfn = who_allocates(&mm);
        who_frees(&mm, pfn);
        free(&mm, pfn);
        let text = reports.one().text;
        println!("{text}");
        let part = |from: &str, to: &str| {
            let start = text
                .find(from)
                .unwrap_or_else(|| panic!("no {from} in {text}"));
            let end = text[start..].find(to).map_or(text.len(), |n| start + n);
            text[start..end].to_owned()
        };
        assert!(part("page allocated as bare", "page freed").contains("who_allocates"));
        assert!(part("page freed as bare", "block before").contains("who_frees"));
        assert!(text.starts_with("memdesc: freed twice: address "), "{text}");
        free(&mm, before);
    }
}

/// The table under many hands: what it says of a page is always of that page, and never half of one event and half of another.
#[test]
#[cfg(not(miri))]
fn threads_do_not_mix_events() {
    let machine = machine(8, 1 << 12).cpus(4);
    let mm = machine.boot_on(machine.host().build().unwrap());
    std::thread::scope(|scope| {
        for cpu in 0..4 {
            let mm = &mm;
            scope.spawn(move || {
                let _cpu = mm.platform().claim(cpu).unwrap();
                let mut kept = Vec::new();
                for round in 0..3000 {
                    let order = (round + cpu) % 3;
                    let pfn = mm.alloc_pages(GFP_KERNEL, order).unwrap();
                    // Nobody else has it, so what is said of it is ours.
                    if let Some(history) = mm.page_history(pfn) {
                        let track = history.allocated.unwrap();
                        assert_eq!(history.head, pfn);
                        assert_eq!((track.order, track.track.cpu), (order, cpu as u32));
                        assert!(track.track.location.file().ends_with("page_history.rs"));
                    }
                    free(mm, pfn);
                    kept.push(mm.alloc_pages(GFP_KERNEL, 0).unwrap());
                    if kept.len() > 20 {
                        free(mm, kept.remove(0));
                    }
                }
            });
        }
    });
    assert!(mm.page_owner_info().dropped > 0);
    ledger(&mm);
}
