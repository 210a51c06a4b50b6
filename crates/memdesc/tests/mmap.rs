//! What of the tests of address spaces needs this process: a window through which its own loads and stores go, and page 0. The others are in
//! `memdesc-selftest`, and run on bare metal too.
#![allow(missing_docs)]

mod common;

use common::Machine;
use memdesc::gfp::*;
use memdesc::mmap::*;
use memdesc::*;
use memdesc_selftest::mmap::{check, ends_balanced};

const RW: VmFlags = VmFlags::READ_WRITE;

/// Real loads and stores need a window, which Miri has not.
#[cfg(not(miri))]
#[test]
fn vmalloc_memory_is_shared_with_users_and_stacks_are_not() {
    let mm = Machine::flat(16384).boot();
    {
        let parent = MmStruct::with_top(&mm, 1, 16 << 20).unwrap();
        let at = parent.mmap(None, 1 << 16, RW, Map::Anon).unwrap();
        let ring = mm.vzalloc(3 * 4096, GFP_KERNEL).unwrap();
        let stack = mm.alloc_kernel_stack(2, 77).unwrap();
        let page = |ptr: *const u8| mm.vmalloc_to_pfn(ptr).unwrap();
        // SAFETY: the memory stays until the spaces are gone.
        unsafe {
            for nth in 0..3 {
                let there = page(ring.as_ptr().wrapping_add(nth * 4096));
                parent.insert_pfn(at + nth as u64 * 4096, there).unwrap();
            }
            let top = stack.top().wrapping_sub(64);
            let why = parent.insert_pfn(at + (1 << 15), page(top)).unwrap_err();
            assert!(
                matches!(why, InsertError::Refused(_, "kernel stack")),
                "{why}"
            );
        }
        assert_eq!(
            parent.read(at, &mut [0]),
            Err(FaultError::Bus),
            "nothing to count it by"
        );
        let child = parent.fork(2).unwrap();
        {
            let views = [&parent, &child].map(|s| memdesc_host::UserView::new(s).unwrap());
            // SAFETY: mapped, and by this thread alone.
            unsafe {
                views[0].ptr(at + 4096).write_volatile(5);
                assert_eq!(views[1].ptr(at + 4096).read_volatile(), 5);
                views[1].ptr(at + 8192).write_volatile(6);
                assert_eq!(ring.as_ptr().add(8192).read_volatile(), 6);
            }
        }
        child.munmap(at, 1 << 16).unwrap();
        check(&mm, &[parent, child]);
        // SAFETY: ours, and mapped by nobody any more.
        unsafe {
            mm.vfree(ring);
            mm.free_kernel_stack(stack);
        }
    }
    ends_balanced(&mm);
}

#[test]
fn only_folios_can_be_mapped() {
    let mm = Machine::flat(16384).boot();
    {
        let space = MmStruct::new(&mm, 1).unwrap();
        let at = space.mmap(None, 1 << 16, RW, Map::Anon).unwrap();
        let bare = mm.alloc_pages(GFP_KERNEL, 1).unwrap();
        let table = mm.alloc_page_table(GFP_KERNEL, 0).unwrap();
        let object = mm.kmalloc(64, GFP_KERNEL).unwrap();
        let slab = mm.virt_to_pfn(object.as_ptr());
        for (page, name) in [
            (bare.add(1), "bare"),
            (table, "page_table"),
            (slab, "slab"),
            (Pfn(0), "memory_map"),
        ] {
            let why = space.insert_page(at, page).unwrap_err();
            assert_eq!(why, InsertError::Refused(page, name));
            assert!(why.to_string().contains(name));
        }
        let folio = mm
            .alloc_folio(GFP_HIGHUSER_MOVABLE, 2, FolioKind::Anon)
            .unwrap();
        space.insert_page(at, folio.add(3)).unwrap();
        space.write(at, &[5]).unwrap();
        assert_eq!(mm.page_mapcount(folio.add(3)), 1);
        let spaces = [space];
        check(&mm, &spaces);
        drop(spaces);
        // SAFETY: all ours.
        unsafe {
            mm.free_pages(folio);
            mm.free_pages(bare);
            mm.free_pages(table);
            mm.kfree(object);
        }
    }
    ends_balanced(&mm);
}
