//! What the tests of reserves share: who takes all else, and looks at a reserve from outside.
#![allow(dead_code, missing_docs, unreachable_pub)]

use std::ptr::NonNull;

use memdesc::gfp::*;
use memdesc::*;

use crate::common::{Machine, free, kfree, ledger};

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
    pub pages: Vec<Pfn>,
    pub objects: Vec<NonNull<u8>>,
}

impl Adversary {
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
pub fn end<P: Platform>(machine: &Machine, mm: &Mm<P>) {
    mm.kvfree_rcu_barrier();
    mm.tick();
    mm.shrink();
    assert_eq!(mm.set_aside_pages(), 0);
    assert_eq!(ledger(mm).by_type[PageType::SetAside as usize], 0);
    let found = mm.validate(|report| panic!("{report:?}"));
    assert_eq!(found.errors(), 0);
    let _ = machine;
}
