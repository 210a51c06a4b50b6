//! The tree of reserves.

use alloc::borrow::ToOwned;
use alloc::format;
use alloc::vec::Vec;
use core::ptr::NonNull;

use memdesc::gfp::*;
use memdesc::*;

use crate::{Lab, all_pages, free, kfree, ledger};

/// The highest priority that there is.
pub const GREEDY: Flags =
    Flags::from_bits(GFP_ATOMIC.bits() | __GFP_MEMALLOC.bits() | __GFP_NOWARN.bits());

/// Sizes of all classes of kmalloc.
pub const SIZES: [usize; 13] = [
    8192, 4096, 2048, 1024, 512, 256, 192, 128, 96, 64, 32, 16, 8,
];

/// Takes all that ordinary requests can get, at the highest priority there is: the adversary.
#[derive(Debug)]
pub struct Adversary {
    /// Pages of all orders.
    pub pages: Vec<Pfn>,
    /// Objects of all sizes.
    pub objects: Vec<NonNull<u8>>,
}

impl Adversary {
    /// All that there is without reclaim.
    pub fn take_all<P: Platform>(mm: &Mm<P>) -> Adversary {
        let mut all = Adversary {
            pages: Vec::new(),
            objects: Vec::new(),
        };
        all.take_more(mm, GREEDY);
        all
    }

    /// With what reclaim finds, too.
    pub fn take_all_reclaiming<P: Platform>(mm: &Mm<P>) -> Adversary {
        let mut all = Adversary::take_all(mm);
        all.take_more(mm, GREEDY | GFP_KERNEL);
        all.take_more(mm, GREEDY);
        all
    }

    fn take_more<P: Platform>(&mut self, mm: &Mm<P>, gfp: Flags) {
        for order in (0..=MAX_ORDER).rev() {
            while let Ok(pfn) = mm.alloc_pages(gfp, order) {
                self.pages.push(pfn);
            }
        }
        for size in SIZES {
            while let Ok(ptr) = mm.kmalloc(size, gfp) {
                self.objects.push(ptr);
            }
        }
    }

    /// Gives it back.
    pub fn give_all<P: Platform>(self, mm: &Mm<P>) {
        self.objects.into_iter().for_each(|ptr| kfree(mm, ptr));
        self.pages.into_iter().for_each(|pfn| free(mm, pfn));
    }

    /// Did it get anything that was promised to others?
    pub fn check<P: Platform>(&self, mm: &Mm<P>) {
        assert!(self.pages.iter().all(|&pfn| !mm.page_is_from_reserve(pfn)));
        let clean = |ptr: &NonNull<u8>| !mm.is_from_reserve(ptr.as_ptr());
        assert!(self.objects.iter().all(clean));
    }
}

/// What a reserve says of itself.
pub fn view<P: Platform>(reserve: &Reserve<'_, P>) -> ReserveView {
    reserve.view()
}

/// Disconnects it, if it is under anything, and destroys it.
#[track_caller]
pub fn down<P: Platform>(reserve: Reserve<'_, P>) {
    match reserve.disconnect() {
        Ok(()) | Err(AllocError::Detached) => {}
        Err(why) => panic!("{why}: {:?}", view(&reserve)),
    }
    assert!(reserve.destroy().is_ok());
}

/// All is given back: nothing is set aside, the ledger balances, what is checked is right.
#[track_caller]
fn end<P: Platform>(mm: &Mm<P>) {
    mm.kvfree_rcu_barrier();
    mm.tick();
    mm.shrink();
    assert_eq!(mm.set_aside_pages(), 0);
    assert_eq!(ledger(mm).by_type[PageType::SetAside as usize], 0);
    let found = mm.validate(|report| panic!("{report:?}"));
    assert_eq!(found.errors(), 0);
}

fn pages(count: usize) -> Demand<'static> {
    Demand::Pages { order: 0, count }
}

/// As many and as deep as there can be.
pub fn as_many_and_as_deep_as_there_can_be<L: Lab>(lab: &L) {
    let mm = lab.flat(4096).unsampled().boot();
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
    end(&mm);
}

/// The listing.
pub fn the_listing<L: Lab>(lab: &L) {
    let mm = lab.flat(4096).unsampled().boot();
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
    end(&mm);
}

/// What is no reserves says so.
pub fn what_is_no_reserves_says_so<L: Lab>(lab: &L) {
    let mm = lab.flat(4096).unsampled().boot();
    let frags = mm.reserve("frags", pages(2)).unwrap();
    frags.connect(None).unwrap();
    let here = 0u8;
    let ordinary = mm.kmalloc(100, GFP_KERNEL).unwrap();
    let area = mm.vmalloc(9000, GFP_KERNEL).unwrap();
    for ptr in [
        core::ptr::null(),
        &raw const here,
        ordinary.as_ptr().cast_const(),
        area.as_ptr().cast_const(),
        usize::MAX as *const u8,
    ] {
        assert!(!mm.is_from_reserve(ptr), "{ptr:?}");
    }
    // Behind the machine's memory there is nothing.
    let behind = all_pages(&mm).last().map_or(0, |last| last.0 + 1);
    for pfn in [behind, u32::MAX - 1, u32::MAX] {
        assert!(!mm.page_is_from_reserve(Pfn(pfn)));
    }
    // Idle pages are nobody's: not handed out, and not from a reserve either.
    let idle = all_pages(&mm).filter(|&pfn| matches!(mm.lookup(pfn).2, Memory::SetAside));
    let idle: Vec<_> = idle.collect();
    assert_eq!(idle.len(), 2);
    assert!(idle.iter().all(|&pfn| !mm.page_is_from_reserve(pfn)));
    kfree(&mm, ordinary);
    // SAFETY: ours.
    unsafe { mm.vfree(area) };
    down(frags);
    end(&mm);
}

/// A line of the listing, as who debugs prints it.
pub fn a_view_is_a_line<L: Lab>(lab: &L) {
    let mm = lab.flat(4096).unsampled().boot();
    let reserve = mm.reserve("frags", Demand::Pages { order: 0, count: 3 });
    let reserve = reserve.unwrap();
    let line = |reserve: &Reserve<'_, L::Platform>| format!("{:?}", view(reserve));
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
