//! Areas of addresses: what is in them, when they come back, and kvmalloc above them.

use alloc::collections::BTreeSet;
use alloc::vec::Vec;
use core::panic::Location;
use core::ptr::NonNull;

use memdesc::gfp::{self, GFP_KERNEL, GFP_NOWAIT};
use memdesc::*;

use crate::{Flat, Lab, bytes, fill, free, ledger, slabinfo, teardown};

/// Frees memory of vmalloc's.
pub fn vfree<P: Platform>(mm: &Mm<P>, ptr: NonNull<u8>) {
    // SAFETY: tests call this for memory that they have and do not use any more, or to see a wrong free reported.
    unsafe { mm.vfree(ptr) };
}

/// Frees memory of kvmalloc's.
pub fn kvfree<P: Platform>(mm: &Mm<P>, ptr: NonNull<u8>) {
    // SAFETY: as in `vfree`.
    unsafe { mm.kvfree(ptr) };
}

/// Frees a stack.
pub fn free_stack<P: Platform>(mm: &Mm<P>, stack: KernelStack) {
    // SAFETY: nobody runs on the stacks of these tests.
    unsafe { mm.free_kernel_stack(stack) };
}

/// So many bytes further.
pub fn offset(ptr: *mut u8, by: isize) -> *mut u8 {
    ptr.wrapping_offset(by)
}

/// Each page leads to the area, and to the same memory as the address.
#[track_caller]
pub fn check_area<P: Platform>(mm: &Mm<P>, ptr: NonNull<u8>, size: usize) {
    let view = mm.find_vm_area(ptr.addr().get()).unwrap();
    assert_eq!(view.start, ptr.addr().get());
    assert!(view.size >= size && view.size == view.pages * PAGE_SIZE && !view.freed);
    assert_eq!(view.caller.file(), Location::caller().file());
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
fn end<L: Lab>(machine: &Flat<'_, L>, mm: &Mm<L::Platform>) {
    assert!(mm.check_vm_areas().is_ok());
    teardown(machine, mm);
    let info = mm.vmalloc_info();
    assert_eq!((info.areas, info.lazy, info.used), (0, 0, 0));
    assert_eq!(info.largest_hole, info.total);
}

/// Memory is there.
pub fn memory_is_there<L: Lab>(lab: &L) {
    let machine = lab.flat(8192);
    let mm = machine.boot();
    let mut live = Vec::new();
    let sizes = [1, 4096, 4097, 16384, 16385, 100_000, 3 << 20, 9 << 20];
    for (i, &size) in sizes.iter().enumerate() {
        let ptr = if i % 2 == 0 {
            mm.vmalloc(size, GFP_KERNEL)
        } else {
            mm.vzalloc(size, GFP_KERNEL)
        };
        let ptr = ptr.unwrap();
        assert!(ptr.addr().get().is_multiple_of(PAGE_SIZE) && mm.is_vmalloc_addr(ptr.as_ptr()));
        if i % 2 == 1 {
            assert!(
                bytes(ptr, size.next_multiple_of(PAGE_SIZE))
                    .iter()
                    .all(|&b| b == 0)
            );
        }
        fill(ptr, size, i as u8 + 1);
        live.push((ptr, size, i as u8 + 1));
    }
    for &(ptr, size, byte) in &live {
        assert!(bytes(ptr, size).iter().all(|&b| b == byte));
        check_area(&mm, ptr, size);
    }
    assert_eq!(mm.check_vm_areas(), Ok(live.len()));
    let pages: usize = sizes.iter().map(|s| s.div_ceil(PAGE_SIZE)).sum();
    let ledger = ledger(&mm);
    assert_eq!(ledger.by_type[PageType::Vmalloc as usize], pages as u64);
    // Descriptors and lists of areas are metadata.
    assert_eq!(slabinfo(&mm, "vmap_area").0, live.len() as u64);
    let mut rows = Vec::new();
    mm.for_each_vm_area(|area| rows.push((area.start, area.pages)));
    assert!(rows.is_sorted() && rows.len() == live.len());
    live.into_iter().for_each(|(ptr, ..)| vfree(&mm, ptr));
    end(&machine, &mm);
}

/// Pages of ones own.
pub fn pages_of_ones_own<L: Lab>(lab: &L) {
    let machine = lab.flat(1024);
    let mm = machine.boot();
    let mut pages: Vec<_> = (0..40)
        .map(|_| mm.alloc_pages(GFP_KERNEL, 0).unwrap())
        .collect();
    pages.reverse();
    pages.swap(3, 17);
    // SAFETY: the pages are ours, and unmapped before they are freed.
    let ptr = unsafe { mm.vmap(&pages) }.unwrap();
    for (i, &pfn) in pages.iter().enumerate() {
        let at = offset(ptr.as_ptr(), (i * PAGE_SIZE) as isize);
        // SAFETY: ours, mapped.
        unsafe { at.write_volatile(i as u8) };
        // SAFETY: ours.
        assert_eq!(unsafe { mm.page_address(pfn).read_volatile() }, i as u8);
        assert_eq!(mm.vmalloc_to_pfn(at), Some(pfn));
        assert!(matches!(mm.lookup(pfn).2, Memory::Bare));
    }
    assert_eq!(
        mm.find_vm_area(ptr.addr().get()).unwrap().kind,
        VmAreaKind::Vmap
    );
    assert!(!lab.can_read(offset(ptr.as_ptr(), 40 * PAGE_SIZE as isize)));
    // SAFETY: not used any more.
    unsafe { mm.vunmap(ptr) };
    // CPUs may remember it until they are told.
    mm.tick();
    assert!(!lab.can_read(ptr.as_ptr()));
    pages.iter().for_each(|&pfn| free(&mm, pfn));
    end(&machine, &mm);
}

/// Addresses come back lazily.
pub fn addresses_come_back_lazily<L: Lab>(lab: &L) {
    let machine = lab.flat(4096);
    let mm = machine.boot();
    let first: Vec<_> = (0..50)
        .map(|_| mm.vmalloc(2 * PAGE_SIZE, GFP_KERNEL).unwrap())
        .collect();
    let addresses: BTreeSet<_> = first.iter().map(|p| p.addr()).collect();
    assert_eq!(addresses.len(), 50);
    first.into_iter().for_each(|ptr| vfree(&mm, ptr));
    // The pages are back at once; the addresses are not.
    assert_eq!(ledger(&mm).by_type[PageType::Vmalloc as usize], 0);
    let info = mm.vmalloc_info();
    assert_eq!(
        (info.areas, info.lazy, info.purges),
        (50, 50 * 3 * PAGE_SIZE as u64, 0)
    );
    let second: Vec<_> = (0..50)
        .map(|_| mm.vmalloc(2 * PAGE_SIZE, GFP_KERNEL).unwrap())
        .collect();
    assert!(second.iter().all(|p| !addresses.contains(&p.addr())));
    // One purge, one flush for all of them.
    mm.tick();
    let info = mm.vmalloc_info();
    assert_eq!((info.areas, info.lazy, info.purges), (50, 0, 1));
    let third: Vec<_> = (0..50)
        .map(|_| mm.vmalloc(2 * PAGE_SIZE, GFP_KERNEL).unwrap())
        .collect();
    assert!(third.iter().all(|p| addresses.contains(&p.addr())));
    second
        .into_iter()
        .chain(third)
        .for_each(|ptr| vfree(&mm, ptr));
    end(&machine, &mm);
}

/// Kvmalloc of all sizes.
pub fn kvmalloc_of_all_sizes<L: Lab>(lab: &L) {
    let machine = lab.flat(16384);
    let mm = machine.boot();
    let mut live = Vec::new();
    let sizes = (0..).map(|i| 1usize << i).take_while(|&s| s <= 8 << 20);
    for size in sizes.flat_map(|s| [s - s / 3, s, s + 1]) {
        let ptr = mm.kvmalloc(size, GFP_KERNEL | gfp::__GFP_ZERO).unwrap();
        assert!(bytes(ptr, size).iter().all(|&b| b == 0));
        assert!(
            size <= 4 << 20 || mm.is_vmalloc_addr(ptr.as_ptr()),
            "{size}"
        );
        assert!(size > 4096 || !mm.is_vmalloc_addr(ptr.as_ptr()), "{size}");
        fill(ptr, size, size as u8);
        live.push((ptr, size));
        if live.len() > 4 {
            let (ptr, size) = live.remove(1);
            assert!(bytes(ptr, size).iter().all(|&b| b == size as u8));
            kvfree(&mm, ptr);
        }
        ledger(&mm);
    }
    assert_eq!(mm.kvmalloc(0, GFP_KERNEL), Err(AllocError::BadSize));
    for (ptr, size) in live {
        assert!(bytes(ptr, size).iter().all(|&b| b == size as u8));
        kvfree(&mm, ptr);
    }
    end(&machine, &mm);
}

/// Memory without two free pages in a row: kmalloc fails where it may not, vmalloc does not.
pub fn kvmalloc_where_nothing_is_contiguous<L: Lab>(lab: &L) {
    let machine = lab.flat(2048);
    let mm = machine.boot();
    let reserve = GFP_NOWAIT | gfp::__GFP_MEMALLOC;
    let all: Vec<_> = core::iter::from_fn(|| mm.alloc_pages(reserve, 0).ok()).collect();
    let (kept, freed): (Vec<Pfn>, Vec<Pfn>) = all.into_iter().partition(|pfn| pfn.0 % 2 == 0);
    freed.into_iter().for_each(|pfn| free(&mm, pfn));
    assert!(mm.kmalloc(40_000, GFP_KERNEL).is_err());
    assert!(mm.kvmalloc(40_000, GFP_NOWAIT).is_err());
    let ptr = mm.kvmalloc(400_000, GFP_KERNEL).unwrap();
    assert!(mm.is_vmalloc_addr(ptr.as_ptr()));
    check_area(&mm, ptr, 400_000);
    // No block of 2 MiB either: single pages do.
    let huge = mm.vmalloc_huge(2 << 20, GFP_KERNEL).unwrap();
    check_area(&mm, huge, 2 << 20);
    assert_eq!(mm.find_vm_area(huge.addr().get()).unwrap().order, 0);
    kvfree(&mm, ptr);
    vfree(&mm, huge);
    kept.into_iter().for_each(|pfn| free(&mm, pfn));
    end(&machine, &mm);
}

/// Large blocks.
pub fn large_blocks<L: Lab>(lab: &L) {
    let machine = lab.flat(8192);
    let mm = machine.boot();
    let pad = mm.vmalloc(1, GFP_KERNEL).unwrap();
    let ptr = mm
        .vmalloc_huge((5 << 20) + 1, GFP_KERNEL | gfp::__GFP_ZERO)
        .unwrap();
    let view = mm.find_vm_area(ptr.addr().get()).unwrap();
    assert_eq!((view.size, view.order), (6 << 20, PAGEBLOCK_ORDER));
    assert!(ptr.addr().get().is_multiple_of(2 << 20));
    assert!(bytes(ptr, 6 << 20).iter().all(|&b| b == 0));
    check_area(&mm, ptr, 6 << 20);
    assert!(!lab.can_read(offset(ptr.as_ptr(), 6 << 20)));
    vfree(&mm, ptr);
    vfree(&mm, pad);
    end(&machine, &mm);
}

/// Kvrealloc.
pub fn kvrealloc<L: Lab>(lab: &L) {
    let machine = lab.flat(16384);
    let mm = machine.boot();
    let mut ptr = mm.kvmalloc(10, GFP_KERNEL).unwrap();
    let mut len = 10;
    fill(ptr, len, 9);
    for size in [100, 5000, 6 << 20, 9 << 20, 8 << 20, 3 << 20, 70_000, 200] {
        // SAFETY: live memory from kvmalloc, used no more if it moves.
        ptr = unsafe { mm.kvrealloc(ptr, size, GFP_KERNEL) }.unwrap();
        assert!(bytes(ptr, len.min(size)).iter().all(|&b| b == 9), "{size}");
        fill(ptr, size, 9);
        len = size;
    }
    assert!(!mm.is_vmalloc_addr(ptr.as_ptr()));
    kvfree(&mm, ptr);
    end(&machine, &mm);
}
