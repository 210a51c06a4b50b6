//! The tree of reserves: how many, how deep, what the listing says, and what is asked about memory that is no reserve's.
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
    let machine = Machine::flat(4096).unsampled();
    let mm = machine.boot();
    (machine, mm)
}

fn pages(count: usize) -> Demand<'static> {
    Demand::Pages { order: 0, count }
}

#[test]
fn as_many_and_as_deep_as_there_can_be() {
    let (machine, mm) = boot();
    for _ in 0..2 {
        let mut all: Vec<_> = (0..511)
            .map(|_| mm.reserve("one", pages(1)).unwrap())
            .collect();
        assert_eq!(
            mm.reserve("more", pages(1)).err(),
            Some(AllocError::TooMany)
        );
        // A chain, from its lower end and from its upper one.
        for at in 1..16 {
            all[at].connect(Some(&all[at - 1])).unwrap();
        }
        assert_eq!(all[16].connect(Some(&all[15])), Err(AllocError::TooMany));
        all[0].connect(None).unwrap();
        all[17].connect(Some(&all[16])).unwrap();
        assert_eq!(all[16].connect(Some(&all[14])), Err(AllocError::TooMany));
        all[16].connect(Some(&all[13])).unwrap();
        assert_eq!((view(&all[0]).pages, mm.set_aside_pages()), (18, 18));
        // What the lowest is charged all above it are charged.
        let adversary = Adversary::take_all(&mm);
        let pfn = all[15].alloc_pages(GFP_ATOMIC, 0).unwrap();
        assert!(all[..16].iter().all(|one| view(one).usage == 4096));
        free(&mm, pfn);
        assert!(all[..16].iter().all(|one| view(one).usage == 0));
        adversary.give_all(&mm);
        // The lower ones first.
        while let Some(one) = all.pop() {
            down(one);
        }
    }
    end(&machine, &mm);
}

#[test]
fn the_listing() {
    let (machine, mm) = boot();
    let list = || {
        let mut all = Vec::new();
        mm.reserve_info(|v| all.push((v.name().to_owned(), v.depth, v.connected, v.held_pages)));
        all
    };
    assert_eq!(list(), []);
    let loose = mm.reserve("loose", pages(3)).unwrap();
    let group = mm.reserve("group", Demand::None).unwrap();
    let long = "a name of more than thirty-two bytes, which are kept";
    let child = mm.reserve(long, pages(2)).unwrap();
    child.connect(Some(&group)).unwrap();
    group.connect(None).unwrap();
    let row = |name: &str, depth, connected, held| (name.to_owned(), depth, connected, held);
    let expected = [
        row("root", 0, true, 2),
        row("group", 1, true, 2),
        row(&long[..32], 2, true, 2),
        row("loose", 0, false, 0),
    ];
    assert_eq!(list(), expected);
    [child, group, loose].into_iter().for_each(down);
    assert_eq!(list(), [row("root", 0, true, 0)]);
    end(&machine, &mm);
}

#[test]
fn what_is_no_reserves_says_so() {
    let (machine, mm) = boot();
    let frags = mm.reserve("frags", pages(2)).unwrap();
    frags.connect(None).unwrap();
    let here = 0u8;
    let ordinary = mm.kmalloc(100, GFP_KERNEL).unwrap();
    let area = mm.vmalloc(9000, GFP_KERNEL).unwrap();
    for ptr in [
        std::ptr::null(),
        &raw const here,
        ordinary.as_ptr().cast_const(),
        area.as_ptr().cast_const(),
        usize::MAX as *const u8,
    ] {
        assert!(!mm.is_from_reserve(ptr), "{ptr:?}");
    }
    for pfn in [0, 4095, 4096, u32::MAX - 1, u32::MAX] {
        assert!(!mm.page_is_from_reserve(Pfn(pfn)) || pfn < 4096);
    }
    // Idle pages are nobody's: not handed out, and not from a reserve either.
    let idle = (0..4096)
        .map(Pfn)
        .filter(|&pfn| matches!(mm.lookup(pfn).2, Memory::SetAside));
    let idle: Vec<_> = idle.collect();
    assert_eq!(idle.len(), 2);
    assert!(idle.iter().all(|&pfn| !mm.page_is_from_reserve(pfn)));
    kfree(&mm, ordinary);
    // SAFETY: ours.
    unsafe { mm.vfree(area) };
    down(frags);
    end(&machine, &mm);
}

/// A line of the listing, as who debugs prints it.
#[test]
fn a_view_is_a_line() {
    let (_, mm) = boot();
    let reserve = mm.reserve("frags", Demand::Pages { order: 0, count: 3 });
    let reserve = reserve.unwrap();
    let line = |reserve: &Reserve<'_, Host>| format!("{:?}", view(reserve));
    assert_eq!(
        line(&reserve),
        "frags pages: pages 3 held 0 taken 0 most 0; bytes 0 of 12288 most 0; waits 0 refusals 0 (detached)"
    );
    reserve.connect(None).unwrap();
    assert_eq!(
        line(&reserve),
        "frags pages: pages 3 held 3 taken 0 most 0; bytes 0 of 12288 most 0; waits 0 refusals 0"
    );
    down(reserve);
}
