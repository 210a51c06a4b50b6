//! Address spaces and files where they are weakest: each of these was wrong once.
#![allow(missing_docs)]

mod common;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use common::Machine;
use memdesc::mmap::*;
use memdesc::*;

const fn mib(n: u32) -> u32 {
    n << 8
}

const RW: VmFlags = VmFlags::READ_WRITE;

/// One moves and splits pages that another unmaps: nothing stays mapped, and no fork misses anything.
#[test]
#[cfg(not(miri))]
fn nothing_is_passed_over_while_it_is_split() {
    let mm = Machine::flat(mib(64)).boot();
    let (stop, page) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|threads| {
        threads.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let pfn = page.load(Ordering::Relaxed) as u32;
                if pfn != 0
                    && let Some(folio) = mm.folio_get(Pfn(pfn))
                {
                    let _ = mm.split_folio(&folio, 4);
                }
            }
        });
        let space = MmStruct::new(&mm, 1).unwrap();
        let flags = RW.with(VmFlags::HUGE);
        for round in 0..1500 {
            let at = space.mmap(None, 2 << 20, flags, Map::Anon).unwrap();
            space.write(at + 5, &[7]).unwrap();
            // Not there at this moment if it is being split again, as what was here the last time.
            if let Some((folio, _)) = space.page_at(at) {
                page.store(u64::from(folio.head().0), Ordering::Relaxed);
            }
            // The splitter needs a moment, a longer one each time.
            for _ in 0..round % 500 * 10 {
                std::hint::spin_loop();
            }
            if round % 2 == 0 {
                let child = space.fork(2).unwrap();
                let mut seen = [0];
                child.read(at + 5, &mut seen).unwrap();
                assert_eq!(seen, [7], "round {round}");
            }
            space.munmap(at, 2 << 20).unwrap();
            assert_eq!(space.rss(), Rss::default(), "round {round}");
        }
        stop.store(true, Ordering::Relaxed);
    });
}
