//! What was wrong once with mapped memory, or nearly.

use alloc::vec;
use alloc::vec::Vec;

use memdesc::filemap::{FileError, Mapping};
use memdesc::gfp::*;
use memdesc::mmap::*;
use memdesc::*;

use crate::mmap::{Disk, mib};
use crate::{Lab, all_pages};

const RW: VmFlags = VmFlags::READ_WRITE;

/// A fault that writes to two mebibytes of a file makes it dirty.
pub fn a_fault_that_writes_to_two_mebibytes_of_a_file_makes_it_dirty<L: Lab>(lab: &L) {
    let mm = lab.flat(mib(64)).boot();
    let disk = Disk::default();
    let file = Mapping::new(&mm, &disk, 1024).unwrap();
    file.will_need(0, 1024).unwrap();
    assert_eq!(file.find(0).unwrap().order(), 9);
    let space = MmStruct::new(&mm, 1).unwrap();
    let flags = RW.with(VmFlags::SHARED).with(VmFlags::HUGE);
    let at = space
        .mmap(None, 4 << 20, flags, Map::File(&file, 0))
        .unwrap();
    // Mapped by the write.
    space.handle_fault(at, Access::Write).unwrap();
    assert!(file.is_dirty());
    assert_eq!(file.writeback(0..=u64::MAX), Ok(1));
    // Mapped already, and clean.
    assert!(!file.is_dirty());
    space.handle_fault(at + 4096, Access::Write).unwrap();
    assert!(file.is_dirty());
    assert_eq!(space.rss().file, 512);
    // Mapped by a read, then written.
    space.handle_fault(at + (2 << 20), Access::Read).unwrap();
    space.handle_fault(at + (2 << 20), Access::Write).unwrap();
    assert_eq!(file.writeback(0..=u64::MAX), Ok(2));
}

/// A folio that somebody has outlives all who mapped it, and their family.
pub fn a_folio_outlives_its_family<L: Lab>(lab: &L) {
    let mm = lab.flat(mib(64)).boot();
    // Keep the slabs that the family is in.
    let kept: Vec<_> = (0..100)
        .map(|_| mm.kmalloc(64, GFP_KERNEL).unwrap())
        .collect();
    let space = MmStruct::new(&mm, 1).unwrap();
    let more: Vec<_> = (0..100)
        .map(|_| mm.kmalloc(64, GFP_KERNEL).unwrap())
        .collect();
    let at = space
        .mmap(None, 1 << 16, RW.with(VmFlags::LARGE), Map::Anon)
        .unwrap();
    space.write(at, &[1]).unwrap();
    let (folio, page) = space.page_at(at).unwrap();
    drop(space);
    mm.shrink();
    // The family's memory is another's by now.
    let others: Vec<_> = (0..200)
        .map(|_| {
            let object = mm.kmalloc(64, GFP_KERNEL).unwrap();
            // SAFETY: ours, 64 bytes.
            unsafe { object.write_bytes(0xff, 64) };
            object
        })
        .collect();
    let to = mm.alloc_pages(GFP_HIGHUSER_MOVABLE, folio.order()).unwrap();
    // SAFETY: bare pages of ours.
    let moved = unsafe { mm.migrate_folio(page, to) };
    assert_eq!(moved, Err(AllocError::Busy));
    // SAFETY: still ours.
    unsafe { mm.free_pages(to) };
    mm.split_folio(&folio, 0).unwrap();
    for object in kept.into_iter().chain(more) {
        // SAFETY: ours.
        unsafe { mm.kfree(object) };
    }
    for object in others {
        // SAFETY: ours, as above.
        unsafe {
            assert!(
                core::slice::from_raw_parts(object.as_ptr(), 64)
                    .iter()
                    .all(|&b| b == 0xff)
            );
            mm.kfree(object);
        }
    }
}

/// What an area no longer allows is not done, however the page came to be mapped; what it allows again is.
pub fn rights_are_taken_and_given<L: Lab>(lab: &L) {
    let mm = lab.flat(mib(64)).boot();
    for (flags, len) in [(RW, 4096), (RW.with(VmFlags::HUGE), 2 << 20)] {
        let space = MmStruct::new(&mm, 1).unwrap();
        let at = space.mmap(None, len, flags, Map::Anon).unwrap();
        space.write(at, &[1]).unwrap();
        space.mprotect(at, len, VmFlags::default()).unwrap();
        assert_eq!(space.read(at, &mut [0]), Err(FaultError::Segv));
        assert!(!space.walk_as_machine(at, Access::Read, |_| {}));
        // Moved meanwhile, it may no more.
        if len == 4096 {
            let mut page = Pfn(0);
            space.for_each_entry(|_, _, entry| page = entry.pfn());
            let to = mm.alloc_pages(GFP_HIGHUSER_MOVABLE, 0).unwrap();
            // SAFETY: bare pages of ours.
            let old = unsafe { mm.migrate_folio(page, to) }.unwrap();
            // SAFETY: ours since the folio moved.
            unsafe { mm.free_pages(old) };
            assert!(!space.walk_as_machine(at, Access::Read, |_| {}));
        }
        space
            .mprotect(at, len, VmFlags::READ.with(VmFlags::EXEC))
            .unwrap();
        drop(space.get_user_page(at, Access::Exec).unwrap());
        let mut seen = [0];
        space.read(at, &mut seen).unwrap();
        assert_eq!(seen, [1]);
        assert_eq!(space.write(at, &[2]), Err(FaultError::Segv));
        space.mprotect(at, len, RW).unwrap();
        space.write(at, &[3]).unwrap();
        assert!(!space.walk_as_machine(at, Access::Exec, |_| {}));
        assert_eq!(
            space.get_user_page(at, Access::Exec).unwrap_err(),
            FaultError::Segv
        );
    }
}

/// Numbers that no file and no space can have are refused, not wrapped.
pub fn numbers_that_are_too_large_are_refused<L: Lab>(lab: &L) {
    let other = lab.flat(mib(16)).boot();
    let mm = lab.flat(mib(16)).boot();
    let disk = Disk::default();
    let file = Mapping::new(&mm, &disk, u64::MAX).unwrap();
    let space = MmStruct::new(&mm, 1).unwrap();
    let most = u64::MAX - 4095;
    for len in [1 << 47, most, most - 0x1_0000] {
        let got = space.mmap(None, len, RW, Map::Anon);
        assert_eq!(got, Err(AllocError::NoZone));
    }
    for pgoff in [u64::MAX, (1 << 52) - 1] {
        let got = space.mmap(None, 4096, RW, Map::File(&file, pgoff));
        assert_eq!(got, Err(AllocError::BadSize));
    }
    let shared = RW.with(VmFlags::SHARED);
    assert_eq!(
        space.mmap(None, 4096, shared, Map::Anon),
        Err(AllocError::BadSize)
    );
    assert_eq!(file.will_need(u64::MAX, 8), Err(FileError::End));
    assert_eq!(
        file.read(u64::MAX - 4096, &mut [0; 5000]),
        Err(FileError::End)
    );
    let strange = Mapping::new(&other, &disk, 10).unwrap();
    let got = space.mmap(None, 4096, RW, Map::File(&strange, 0));
    assert_eq!(got, Err(AllocError::BadSize));
}

/// A user maps 2 MiB of a file as often as he likes, and has each mapped by pages.
pub fn two_mebibytes_are_mapped_often<L: Lab>(lab: &L) {
    let mm = lab.flat(mib(128)).boot();
    let disk = Disk::default();
    let file = Mapping::new(&mm, &disk, 512).unwrap();
    file.will_need(0, 512).unwrap();
    let space = MmStruct::new(&mm, 1).unwrap();
    let flags = VmFlags::READ.with(VmFlags::SHARED).with(VmFlags::HUGE);
    let at = |nth: u64| (nth + 1) << 21;
    let mut full = 0;
    for nth in 0..2200 {
        let map = Map::File(&file, 0);
        space.mmap(Some(at(nth)), 2 << 20, flags, map).unwrap();
        space.handle_fault(at(nth), Access::Read).unwrap();
    }
    for nth in 0..2200 {
        space.munmap(at(nth), 4096).unwrap();
        match space.handle_fault(at(nth) + 4096, Access::Read) {
            Ok(()) => {}
            Err(FaultError::Oom(_)) => full += 1,
            Err(why) => panic!("{why}"),
        }
    }
    let mut seen = vec![0; all_pages(&mm).last().map_or(0, |last| last.0 as usize) + 1];
    MmStruct::check_all(&[&space], &mut seen).unwrap();
    assert!(full > 0, "as often as can be counted");
}

/// A device that reads a page which two have does not read what one of them writes later.
pub fn what_is_pinned_to_be_read_is_no_longer_shared<L: Lab>(lab: &L) {
    let mm = lab.flat(mib(64)).boot();
    for (flags, len) in [
        (RW, 4096),
        (RW.with(VmFlags::LARGE), 1 << 16),
        (RW.with(VmFlags::HUGE), 2 << 20),
    ] {
        let parent = MmStruct::new(&mm, 1).unwrap();
        let at = parent.mmap(Some(2 << 20), len, flags, Map::Anon).unwrap();
        parent.write(at, &[1]).unwrap();
        let child = parent.fork(2).unwrap();
        let pin = child.pin_user_page(at, Access::Read).unwrap();
        child.munmap(at, len).unwrap();
        parent.write(at, &[2]).unwrap();
        // SAFETY: pinned.
        assert_eq!(unsafe { mm.page_address(pin.pfn()).read() }, 1);
        // Alone, it is pinned as it is, and stays where it is when it is written.
        drop((pin, child));
        parent.mprotect(at, len, VmFlags::READ).unwrap();
        let pin = parent.pin_user_page(at, Access::Read).unwrap();
        parent.mprotect(at, len, RW).unwrap();
        let other = mm.folio_get(pin.pfn());
        parent.write(at, &[3]).unwrap();
        // SAFETY: pinned.
        assert_eq!(unsafe { mm.page_address(pin.pfn()).read() }, 3);
        drop(other);
    }
}

/// Pins that cannot be counted are refused.
pub fn pins_that_cannot_be_counted_are_refused<L: Lab>(lab: &L) {
    let mm = lab.flat(mib(16)).boot();
    let space = MmStruct::new(&mm, 1).unwrap();
    let at = space.mmap(None, 4096, RW, Map::Anon).unwrap();
    for access in [Access::Write, Access::Read] {
        let most = (1 << 14) - 1;
        let pins: Vec<_> = (0..most)
            .map(|_| space.pin_user_page(at, access).unwrap())
            .collect();
        let full = Err(FaultError::Oom(AllocError::Busy));
        assert_eq!(space.pin_user_page(at, access).map(drop), full);
        drop(pins);
        space.mprotect(at, 4096, VmFlags::READ).unwrap();
    }
}
