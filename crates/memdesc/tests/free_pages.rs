//! Linux's `lib/test_free_pages`: somebody looks at a page that he found, takes a reference, and puts it after the owner has freed the block. No page is lost.
//!
//! Linux had to free all but the first page of a block without `__GFP_COMP` there. Here bare pages have no count that a stranger could raise, and
//! a folio of any order has one; so both forms cannot leak, and it is counted that they do not.

mod common;

use common::*;
use memdesc::gfp::{GFP_HIGHUSER_MOVABLE, GFP_KERNEL};
use memdesc::*;

const ROUNDS: usize = if cfg!(debug_assertions) {
    50_000
} else {
    1_000_000
};

#[test]
fn with_a_large_folio() {
    let machine = Machine::flat(4096);
    let mm = machine.boot();
    for round in 0..scaled(ROUNDS, 30) {
        let pfn = mm
            .alloc_folio(GFP_HIGHUSER_MOVABLE, 3, FolioKind::File)
            .unwrap();
        let found = mm.folio_get(pfn.add(round as u32 % 8)).unwrap();
        assert_eq!((found.head(), found.order()), (pfn, 3));
        free(&mm, pfn);
        // Not free yet: somebody has it.
        assert!(matches!(mm.lookup(pfn).2, Memory::File(_)));
        drop(found);
        assert!(matches!(mm.lookup(pfn).2, Memory::Free { .. }));
    }
    teardown(&machine, &mm);
}

#[test]
fn with_bare_pages() {
    let machine = Machine::flat(4096);
    let mm = machine.boot();
    for round in 0..scaled(ROUNDS, 30) {
        let pfn = mm.alloc_pages(GFP_KERNEL, 3).unwrap();
        // There is nothing to take a reference of.
        assert!(mm.folio_get(pfn.add(round as u32 % 8)).is_none());
        free(&mm, pfn);
        assert!(mm.folio_get(pfn).is_none());
    }
    teardown(&machine, &mm);
}

/// The same with others looking at the pages all the time, whatever they are.
#[test]
#[cfg(not(miri))]
fn while_others_look() {
    let machine = Machine::flat(4096).cpus(3);
    let mm = machine.boot();
    let stop = std::sync::atomic::AtomicBool::new(false);
    let relaxed = std::sync::atomic::Ordering::Relaxed;
    std::thread::scope(|scope| {
        for cpu in 1..3 {
            let (mm, stop) = (&mm, &stop);
            scope.spawn(move || {
                let _cpu = mm.platform().claim(cpu).unwrap();
                let mut rng = Rng(cpu as u64);
                while !stop.load(relaxed) {
                    drop(mm.folio_get(Pfn(rng.below(4096) as u32)));
                }
            });
        }
        let _cpu = mm.platform().claim(0).unwrap();
        for round in 0..ROUNDS / 10 {
            let pfn = if round % 2 == 0 {
                mm.alloc_folio(GFP_HIGHUSER_MOVABLE, 3, FolioKind::Anon)
            } else {
                mm.alloc_pages(GFP_KERNEL, 3)
            };
            free(&mm, pfn.unwrap());
        }
        stop.store(true, relaxed);
    });
    teardown(&machine, &mm);
}
