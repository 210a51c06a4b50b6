//! What the tests of vmalloc share.
#![allow(dead_code, missing_docs, unreachable_pub, unused_imports)]

use memdesc::*;
use memdesc_host::Host;
pub use memdesc_selftest::vmalloc::{check_area, free_stack, kvfree, offset, vfree};

use crate::common::{Machine, teardown};

/// All is freed: nothing is left, neither memory nor addresses.
#[track_caller]
pub fn end(machine: &Machine, mm: &Mm<Host>) {
    assert!(mm.check_vm_areas().is_ok());
    teardown(machine, mm);
    let info = mm.vmalloc_info();
    assert_eq!((info.areas, info.lazy, info.used), (0, 0, 0));
    assert_eq!(info.largest_hole, info.total);
}
