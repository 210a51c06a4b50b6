//! What the tests of reserves share: who takes all else, and looks at a reserve from outside.
#![allow(dead_code, missing_docs, unreachable_pub, unused_imports)]

use memdesc::*;

pub use memdesc_selftest::reserves::{Adversary, GREEDY, SIZES, down, view};

use crate::common::{Machine, ledger};

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
