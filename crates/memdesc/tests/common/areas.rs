//! What the tests of vmalloc share.
#![allow(dead_code, missing_docs, unreachable_pub)]

use std::ptr::NonNull;

use memdesc::*;
use memdesc_host::Host;

use crate::common::{Machine, teardown};

pub fn vfree(mm: &Mm<Host>, ptr: NonNull<u8>) {
    // SAFETY: tests call this for memory that they have and do not use any more, or to see a wrong free reported.
    unsafe { mm.vfree(ptr) };
}

pub fn kvfree(mm: &Mm<Host>, ptr: NonNull<u8>) {
    // SAFETY: as in `vfree`.
    unsafe { mm.kvfree(ptr) };
}

pub fn free_stack(mm: &Mm<Host>, stack: KernelStack) {
    // SAFETY: nobody runs on the stacks of these tests.
    unsafe { mm.free_kernel_stack(stack) };
}

pub fn offset(ptr: *mut u8, by: isize) -> *mut u8 {
    ptr.wrapping_offset(by)
}

/// Each page leads to the area, and to the same memory as the address.
#[track_caller]
pub fn check_area(mm: &Mm<Host>, ptr: NonNull<u8>, size: usize) {
    let view = mm.find_vm_area(ptr.addr().get()).unwrap();
    assert_eq!(view.start, ptr.addr().get());
    assert!(view.size >= size && view.size == view.pages * PAGE_SIZE && !view.freed);
    assert_eq!(view.caller.file(), std::panic::Location::caller().file());
    for page in 0..view.pages {
        let at = offset(ptr.as_ptr(), (page * PAGE_SIZE) as isize);
        let pfn = mm.vmalloc_to_pfn(at).unwrap();
        let (_, order, Memory::Vmalloc(area)) = mm.lookup(pfn) else {
            panic!("page {page} is {:?}", mm.lookup(pfn))
        };
        assert_eq!(order, view.order);
        // SAFETY: the area is ours, and so are its pages.
        let found = mm.vm_area_view(unsafe { area.as_ref() });
        assert_eq!((found.start, found.pages), (view.start, view.pages));
        if page % 7 == 0 {
            let direct = mm.page_address(pfn);
            // SAFETY: ours, by either address.
            unsafe {
                at.write_volatile(page as u8 ^ 0x5a);
                assert_eq!(direct.read_volatile(), page as u8 ^ 0x5a);
            }
        }
    }
}

/// All is freed: nothing is left, neither memory nor addresses.
#[track_caller]
pub fn end(machine: &Machine, mm: &Mm<Host>) {
    assert!(mm.check_vm_areas().is_ok());
    teardown(machine, mm);
    let info = mm.vmalloc_info();
    assert_eq!((info.areas, info.lazy, info.used), (0, 0, 0));
    assert_eq!(info.largest_hole, info.total);
}
