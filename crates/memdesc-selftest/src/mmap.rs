//! Address spaces, files in memory, and folios that are moved, split and reclaimed under them, one thing at a time; after each the counts agree with the tables, and at
//! the end the ledger balances.

use alloc::collections::BTreeMap;
use alloc::vec;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering};

use memdesc::filemap::{FileError, Mapping, MappingOps};
use memdesc::gfp::*;
use memdesc::mmap::*;
use memdesc::*;
use spin::Mutex;

use crate::{Lab, all_pages, scaled};

const RW: VmFlags = VmFlags::READ_WRITE;

pub(crate) const fn mib(n: u32) -> u32 {
    n << 8
}

/// How much memory most of the machines have.
fn memory() -> u32 {
    mib(scaled(64, 16) as u32)
}

/// A file whose pages say which they are, and remember what was written.
#[derive(Debug, Default)]
pub struct Disk {
    written: Mutex<BTreeMap<u64, u8>>,
    reads: AtomicU64,
    writes: AtomicU64,
}

impl MappingOps for Disk {
    fn read_folio(&self, index: u64, pages: &mut [u8]) -> Result<(), FileError> {
        self.reads.fetch_add(1, Ordering::Relaxed);
        let written = self.written.lock();
        for (nth, page) in (0..).zip(pages.chunks_mut(4096)) {
            let index = index + nth;
            page.fill(written.get(&index).copied().unwrap_or(index as u8));
        }
        Ok(())
    }

    fn writepage(&self, index: u64, pages: &[u8]) -> Result<(), FileError> {
        self.writes.fetch_add(1, Ordering::Relaxed);
        let mut written = self.written.lock();
        for (nth, page) in (0..).zip(pages.chunks(4096)) {
            written.insert(index + nth, page[0]);
        }
        Ok(())
    }
}

/// Every count agrees with the tables of these address spaces.
pub fn check<P: Platform>(mm: &Mm<P>, spaces: &[MmStruct<'_, P>]) -> MapReport {
    let mut seen = vec![0; all_pages(mm).last().map_or(0, |last| last.0 as usize) + 1];
    let spaces: Vec<_> = spaces.iter().collect();
    MmStruct::check_all(&spaces, &mut seen).unwrap()
}

/// The byte at an address.
pub fn byte<P: Platform>(space: &MmStruct<'_, P>, at: u64) -> u8 {
    let mut b = [0];
    space.read(at, &mut b).unwrap();
    b[0]
}

/// Everything is gone, and the ledger balances.
#[track_caller]
pub fn ends_balanced<P: Platform>(mm: &Mm<P>) {
    mm.shrink();
    let ledger = mm.ledger();
    assert!(ledger.balanced, "{ledger:?}");
    for kind in [PageType::Anon, PageType::File, PageType::PageTable] {
        assert_eq!(mm.pages_of(kind), 0, "{kind:?}");
    }
}

/// Memory comes when it is touched and is copied when it is written.
pub fn memory_comes_when_it_is_touched_and_is_copied_when_it_is_written<L: Lab>(lab: &L) {
    let mm = lab.flat(memory()).boot();
    {
        let parent = MmStruct::new(&mm, 1).unwrap();
        let at = parent.mmap(None, 64 * 4096, RW, Map::Anon).unwrap();
        assert_eq!(parent.rss(), Rss::default());
        assert_eq!(byte(&parent, at + 5 * 4096), 0);
        parent.write(at, &[7; 3 * 4096]).unwrap();
        assert_eq!(parent.rss().anon, 4);
        let child = parent.fork(2).unwrap();
        assert_eq!(child.rss().anon, 4);
        assert_eq!(mm.pages_of(PageType::Anon), 4, "shared");
        child.write(at, &[8]).unwrap();
        assert_eq!(mm.pages_of(PageType::Anon), 5);
        assert_eq!((byte(&parent, at), byte(&child, at)), (7, 8));
        assert_eq!(byte(&child, at + 1), 7, "the rest of the page was copied");
        // The parent is alone with its page now, and takes it as it is.
        parent.write(at, &[9]).unwrap();
        assert_eq!(mm.pages_of(PageType::Anon), 5);
        let spaces = [parent, child];
        let report = check(&mm, &spaces);
        assert_eq!((report.pages, report.folios, report.referenced), (8, 5, 0));
        let kept = spaces[0].page_at(at).unwrap();
        assert_eq!(check(&mm, &spaces).referenced, 1);
        drop(kept);
        spaces[0].munmap(at + 4096, 4096).unwrap();
        assert_eq!(spaces[0].read(at + 4096, &mut [0]), Err(FaultError::Segv));
        assert_eq!(byte(&spaces[0], at + 2 * 4096), 7);
        let mut areas = 0;
        spaces[0].for_each_vma(|_| areas += 1);
        assert_eq!(areas, 2);
        spaces[0].mprotect(at, 4096, VmFlags::READ).unwrap();
        assert_eq!(spaces[0].write(at, &[1]), Err(FaultError::Segv));
        assert_eq!(byte(&spaces[0], at), 9);
        check(&mm, &spaces);
    }
    ends_balanced(&mm);
}

/// Large folios are mapped by page and split under their users.
pub fn large_folios_are_mapped_by_page_and_split_under_their_users<L: Lab>(lab: &L) {
    let mm = lab.flat(memory()).boot();
    {
        let parent = MmStruct::new(&mm, 1).unwrap();
        let flags = RW.with(VmFlags::LARGE);
        let at = parent
            .mmap(Some(0x10_0000), 1 << 20, flags, Map::Anon)
            .unwrap();
        for page in 0..16 {
            parent.write(at + page * 4096, &[page as u8 + 1]).unwrap();
        }
        let child = parent.fork(2).unwrap();
        let (folio, _) = parent.page_at(at).unwrap();
        assert_eq!(
            (folio.order(), folio.mapcount(), folio.refcount()),
            (4, 32, 33)
        );
        let tail = mm.folio_get(folio.head().add(9)).unwrap();
        assert_eq!(
            mm.split_folio(&folio, 1),
            Err(AllocError::Busy),
            "the other reference"
        );
        drop(tail);
        mm.split_folio(&folio, 1).unwrap();
        assert_eq!((folio.order(), folio.mapcount()), (1, 4));
        drop(folio);
        let (folio, page) = child.page_at(at + 11 * 4096).unwrap();
        assert_eq!(
            (folio.order(), page.0 - folio.head().0, folio.index()),
            (1, 1, (at >> 12) + 10)
        );
        drop(folio);
        let spaces = [parent, child];
        let report = check(&mm, &spaces);
        assert_eq!((report.folios, report.pages), (8, 32));
        for page in 0..16 {
            assert_eq!(byte(&spaces[1], at + page * 4096), page as u8 + 1);
        }
    }
    ends_balanced(&mm);
}

/// Files are shared and private written back and truncated.
pub fn files_are_shared_and_private_written_back_and_truncated<L: Lab>(lab: &L) {
    let mm = lab.flat(memory()).boot();
    let disk = Disk::default();
    {
        let file = Mapping::new(&mm, &disk, 1000).unwrap();
        let space = MmStruct::new(&mm, 1).unwrap();
        let shared = space
            .mmap(
                None,
                100 * 4096,
                RW.with(VmFlags::SHARED),
                Map::File(&file, 10),
            )
            .unwrap();
        let private = space
            .mmap(None, 100 * 4096, RW, Map::File(&file, 10))
            .unwrap();
        assert_eq!(
            (byte(&space, shared), byte(&space, private + 4096)),
            (10, 11)
        );
        space.write(private, &[99]).unwrap();
        assert_eq!((byte(&space, shared), byte(&space, private)), (10, 99));
        assert!(!file.is_dirty());
        space.write(shared + 2 * 4096, &[77]).unwrap();
        assert!(file.is_dirty());
        assert_eq!(
            byte(&space, private + 2 * 4096),
            77,
            "not copied, so it is the file's"
        );
        assert_eq!(file.writeback(0..=u64::MAX).unwrap(), 1);
        assert_eq!(disk.written.lock()[&12], 77);
        // Clean: the next write is noticed again.
        assert!(!file.is_dirty());
        space.write(shared + 2 * 4096, &[78]).unwrap();
        assert!(file.is_dirty());
        let spaces = [space];
        check(&mm, &spaces);
        let [space] = spaces;
        file.truncate(12);
        assert_eq!(
            space.read(shared + 2 * 4096, &mut [0]),
            Err(FaultError::Bus)
        );
        assert_eq!(byte(&space, shared + 4096), 11);
        assert_eq!(byte(&space, private), 99, "a copy is no part of the file");
        // The file goes; those who map it keep it.
        drop(file);
        assert_eq!(byte(&space, shared), 10);
        let spaces = [space];
        check(&mm, &spaces);
    }
    ends_balanced(&mm);
}

/// What is read in order is read ahead in large folios.
pub fn what_is_read_in_order_is_read_ahead_in_large_folios<L: Lab>(lab: &L) {
    let mm = lab.flat(memory()).boot();
    let disk = Disk::default();
    {
        let file = Mapping::new(&mm, &disk, 4096).unwrap();
        let mut largest = 0;
        for index in 0..scaled(900, 300) as u64 {
            let mut b = [0];
            file.read(index * 4096, &mut b).unwrap();
            assert_eq!(b[0], index as u8);
            largest = largest.max(file.find(index).unwrap().order());
        }
        let reads = disk.reads.load(Ordering::Relaxed);
        assert!(
            largest >= scaled(6, 4) && reads < 100,
            "order {largest}, {reads} reads"
        );
        // A large folio mapped by 2 MiB, another that the end of the file cuts.
        file.will_need(2048, 1024).unwrap();
        assert_eq!(file.find(3000).unwrap().order(), 9);
        let space = MmStruct::new(&mm, 1).unwrap();
        let at = space
            .mmap(
                None,
                4 << 20,
                VmFlags::READ.with(VmFlags::HUGE),
                Map::File(&file, 2048),
            )
            .unwrap();
        assert_eq!(byte(&space, at + 5 * 4096), 2053u64 as u8);
        assert_eq!(space.rss().file, 512);
        file.truncate(2048 + 512 + 100);
        assert_eq!(
            file.find(2048 + 512 + 99).unwrap().order(),
            0,
            "split at the new end"
        );
        assert!(file.find(2048 + 512 + 100).is_none());
        assert_eq!(
            byte(&space, at + (512 + 99) * 4096),
            (2048u64 + 512 + 99) as u8
        );
        let spaces = [space];
        let report = check(&mm, &spaces);
        assert_eq!(report.huge, 1);
    }
    ends_balanced(&mm);
}

/// A folio moves and keeps its descriptor.
pub fn a_folio_moves_and_keeps_its_descriptor<L: Lab>(lab: &L) {
    let mm = lab.flat(memory()).boot();
    let disk = Disk::default();
    {
        let parent = MmStruct::new(&mm, 1).unwrap();
        let at = parent
            .mmap(None, 1 << 20, RW.with(VmFlags::LARGE), Map::Anon)
            .unwrap();
        parent.write(at, b"stay the same").unwrap();
        let child = parent.fork(2).unwrap();
        let (folio, page) = parent.page_at(at).unwrap();
        let order = folio.order();
        let desc = &raw const *folio;
        drop(folio);
        let to = mm.alloc_pages(GFP_HIGHUSER_MOVABLE, order).unwrap();
        // SAFETY: bare pages of ours.
        let old = unsafe { mm.migrate_folio(page, to) }.unwrap();
        assert!(matches!(mm.lookup(old).2, Memory::Bare));
        // SAFETY: ours since the folio moved.
        unsafe { mm.free_pages(old) };
        let (folio, _) = child.page_at(at).unwrap();
        assert_eq!((&raw const *folio, folio.head()), (desc, to));
        drop(folio);
        let mut seen = [0; 13];
        child.read(at, &mut seen).unwrap();
        assert_eq!(&seen, b"stay the same");
        // A file's, by its index.
        let file = Mapping::new(&mm, &disk, 100).unwrap();
        let head = file.get(42).unwrap().head();
        let to = mm.alloc_pages(GFP_HIGHUSER_MOVABLE, 0).unwrap();
        // SAFETY: bare pages of ours.
        let old = unsafe { mm.migrate_folio(head, to) }.unwrap();
        // SAFETY: as above.
        unsafe { mm.free_pages(old) };
        assert_eq!((file.find(42).unwrap().head(), old), (to, head));
        let mut b = [0];
        file.read(42 * 4096, &mut b).unwrap();
        assert_eq!(b[0], 42);
        check(&mm, &[parent, child]);
    }
    ends_balanced(&mm);
}

/// What is pinned stays and is the parents.
pub fn what_is_pinned_stays_and_is_the_parents<L: Lab>(lab: &L) {
    let mm = lab.flat(memory()).boot();
    {
        let parent = MmStruct::new(&mm, 1).unwrap();
        let at = parent.mmap(None, 1 << 16, RW, Map::Anon).unwrap();
        parent.write(at, &[1]).unwrap();
        let pin = parent.pin_user_page(at, Access::Write).unwrap();
        assert!(pin.folio().is_pinned());
        let to = mm.alloc_pages(GFP_HIGHUSER_MOVABLE, 0).unwrap();
        // SAFETY: bare pages of ours.
        let moved = unsafe { mm.migrate_folio(pin.pfn(), to) };
        assert_eq!(moved, Err(AllocError::Busy));
        let child = parent.fork(2).unwrap();
        parent.write(at, &[2]).unwrap();
        let (folio, page) = parent.page_at(at).unwrap();
        assert_eq!(
            page,
            pin.pfn(),
            "the device and the parent see the same page"
        );
        drop(folio);
        assert_eq!((byte(&parent, at), byte(&child, at)), (2, 1));
        drop(pin);
        // SAFETY: bare pages of ours.
        let old = unsafe { mm.migrate_folio(page, to) }.unwrap();
        // SAFETY: ours since the folio moved.
        unsafe { mm.free_pages(old) };
        assert_eq!(byte(&parent, at), 2);
        check(&mm, &[parent, child]);
    }
    ends_balanced(&mm);
}

/// What a child had read does not change under it.
pub fn what_a_child_had_read_does_not_change_under_it<L: Lab>(lab: &L) {
    let mm = lab.flat(memory()).boot();
    {
        let parent = MmStruct::new(&mm, 1).unwrap();
        let at = parent.mmap(None, 1 << 16, RW, Map::Anon).unwrap();
        parent.write(at, &[1]).unwrap();
        let child = parent.fork(2).unwrap();
        let page = child.get_user_page(at, Access::Read).unwrap();
        child.munmap(at, 1 << 16).unwrap();
        // The parent alone maps the page, but somebody else has it still.
        parent.write(at, &[2]).unwrap();
        // SAFETY: referenced.
        assert_eq!(unsafe { mm.page_address(page.pfn()).read() }, 1);
        assert_eq!(byte(&parent, at), 2);
        check(&mm, &[parent, child]);
    }
    ends_balanced(&mm);
}

/// Tables go with their last area.
pub fn tables_go_with_their_last_area<L: Lab>(lab: &L) {
    let mm = lab.flat(mib(64)).boot();
    {
        let space = MmStruct::new(&mm, 1).unwrap();
        let at = space.mmap(None, 64 << 20, RW, Map::Anon).unwrap();
        let far = space.mmap(Some(1 << 40), 4096, RW, Map::Anon).unwrap();
        for two_mib in 0..32 {
            space.write(at + (two_mib << 21), &[1]).unwrap();
        }
        space.write(far, &[2]).unwrap();
        let before = mm.pages_of(PageType::PageTable);
        assert!(before >= 32 + 3 + 3);
        // All but the last two.
        space.munmap(at, 60 << 20).unwrap();
        mm.shrink();
        let after = mm.pages_of(PageType::PageTable);
        assert!((29..=30).contains(&(before - after)), "{before}, {after}");
        assert_eq!((byte(&space, far), byte(&space, at + (31 << 21))), (2, 1));
        check(&mm, &[space]);
    }
    ends_balanced(&mm);
}

/// A range is cleared and goes off line.
pub fn a_range_is_cleared_and_goes_off_line<L: Lab>(lab: &L) {
    let mm = lab.flat(memory()).boot();
    let disk = Disk::default();
    let pages = scaled(2048, 1088) as u64;
    {
        let space = MmStruct::new(&mm, 1).unwrap();
        let file = Mapping::new(&mm, &disk, 2000).unwrap();
        let at = space
            .mmap(None, pages * 4096, RW.with(VmFlags::LARGE), Map::Anon)
            .unwrap();
        for page in 0..pages {
            space
                .write(at + page * 4096, &[page as u8, (page >> 8) as u8])
                .unwrap();
        }
        for page in 0..scaled(1000, 200) as u64 {
            file.get(page).unwrap();
        }
        // Every other page goes, so that the rest lies in pieces.
        for page in (0..pages).step_by(32) {
            space.munmap(at + page * 4096, 16 * 4096).unwrap();
        }
        let (folio, page) = space.page_at(at + (pages - 8) * 4096).unwrap();
        drop(folio);
        let start = Pfn(page.0 & !511);
        mm.alloc_contig_range(start, 512).unwrap();
        let (head, order, memory) = mm.lookup(start.add(77));
        assert!(
            matches!(memory, Memory::Bare) && (head, order) == (start, 9),
            "{memory:?}"
        );
        // SAFETY: just had.
        unsafe { mm.free_contig_range(start, 512) };
        assert!(mm.ledger().balanced);
        mm.offline_pages(start.add(100), 300).unwrap();
        assert!(matches!(mm.lookup(start.add(100)).2, Memory::Offline));
        assert_eq!(mm.ledger().by_type[PageType::Offline as usize], 300);
        assert!(mm.ledger().balanced);
        assert_eq!(mm.online_pages(start.add(99), 300), Err(AllocError::Busy));
        mm.online_pages(start.add(100), 300).unwrap();
        assert!(mm.ledger().balanced);
        for page in 0..pages {
            if page % 32 >= 16 {
                let mut b = [0; 2];
                space.read(at + page * 4096, &mut b).unwrap();
                assert_eq!(b, [page as u8, (page >> 8) as u8]);
            }
        }
        // What cannot move is named.
        let bare = mm.alloc_pages(GFP_KERNEL, 0).unwrap();
        let block = Pfn(bare.0 & !511);
        let why = mm.alloc_contig_range(block, 512).unwrap_err();
        assert!(!why.movable && why.kind != PageType::Anon, "{why}");
        let mut named = Vec::new();
        mm.for_each_obstacle(block, 512, |o| named.push(o.pfn));
        assert!(named.contains(&bare));
        // SAFETY: ours.
        unsafe { mm.free_pages(bare) };
        check(&mm, &[space]);
    }
    ends_balanced(&mm);
}

/// A large block is had by compaction.
pub fn a_large_block_is_had_by_compaction<L: Lab>(lab: &L) {
    let mm = lab.flat(memory()).boot();
    {
        let space = MmStruct::new(&mm, 1).unwrap();
        let pages = u64::from(memory()) / 4 * 3;
        let at = space.mmap(None, pages * 4096, RW, Map::Anon).unwrap();
        for page in 0..pages {
            space.write(at + page * 4096, &[page as u8]).unwrap();
        }
        for page in 0..pages {
            if page % 3 != 0 {
                space.munmap(at + page * 4096, 4096).unwrap();
            }
        }
        let mut blocks = Vec::new();
        while let Ok(block) = mm.alloc_pages(GFP_KERNEL, 9) {
            blocks.push(block);
        }
        assert!(mm.event(Event::CompactSuccess) > 0);
        // Two thirds of 24 pageblocks are free, less what the machine keeps.
        assert!(blocks.len() >= scaled(12, 1), "{} blocks", blocks.len());
        for block in blocks {
            // SAFETY: ours.
            unsafe { mm.free_pages(block) };
        }
        for page in (0..pages).step_by(3) {
            assert_eq!(byte(&space, at + page * 4096), page as u8);
        }
        check(&mm, &[space]);
    }
    ends_balanced(&mm);
}

/// File pages make room.
pub fn file_pages_make_room<L: Lab>(lab: &L) {
    let size = scaled(64, 4) as u32;
    let mm = lab.flat(mib(size)).boot();
    let disk = Disk::default();
    {
        let file = Mapping::new(&mm, &disk, 100_000).unwrap();
        let space = MmStruct::new(&mm, 1).unwrap();
        // Twice as much as there is memory, some of it dirty.
        let pages = 2 * u64::from(mib(size));
        for page in 0..pages {
            if page % 7 == 0 {
                file.write(page * 4096, &[page as u8 ^ 0xff]).unwrap();
            } else {
                file.get(page).unwrap();
            }
        }
        assert!(mm.event(Event::PgSteal) > pages / 2 - pages / 64);
        let anon = u64::from(mib(size)) / 8 * 5;
        let at = space.mmap(None, anon * 4096, RW, Map::Anon).unwrap();
        for page in 0..anon {
            space.write(at + page * 4096, &[page as u8]).unwrap();
        }
        for page in (0..pages).step_by(7) {
            let mut b = [0];
            file.read(page * 4096, &mut b).unwrap();
            assert_eq!(b[0], page as u8 ^ 0xff);
        }
        for page in 0..anon {
            assert_eq!(byte(&space, at + page * 4096), page as u8);
        }
        check(&mm, &[space]);
    }
    ends_balanced(&mm);
}

/// Private data comes and goes.
pub fn private_data_comes_and_goes<L: Lab>(lab: &L) {
    let mm = lab.flat(memory()).boot();
    let disk = Disk::default();
    {
        let file = Mapping::new(&mm, &disk, 100).unwrap();
        let folio = file.get(5).unwrap();
        let mapping = mm.folio_mapping(&folio);
        folio.set_owner(77);
        let locked = mm.folio_lock(&folio);
        mm.folio_attach_private(&locked, 0xdead_beef, GFP_KERNEL)
            .unwrap();
        assert_eq!(mm.folio_private(&folio), Some(0xdead_beef));
        assert_eq!(
            (mm.folio_mapping(&folio), folio.owner(), folio.refcount()),
            (mapping, 77, 3)
        );
        drop(locked);
        let other = file.get(6).unwrap();
        assert_eq!(mm.folio_private(&other), None);
        file.truncate(6);
        assert_eq!(mm.folio_private(&folio), Some(0xdead_beef));
        file.truncate(0);
        assert_eq!((mm.folio_private(&folio), folio.owner()), (None, 77));
    }
    ends_balanced(&mm);
}

/// What a child has pinned to read does not change under it.
pub fn what_a_child_has_pinned_to_read_does_not_change_under_it<L: Lab>(lab: &L) {
    let mm = lab.flat(memory()).boot();
    {
        let parent = MmStruct::new(&mm, 1).unwrap();
        let at = parent.mmap(None, 1 << 16, RW, Map::Anon).unwrap();
        parent.write(at, &[1]).unwrap();
        let child = parent.fork(2).unwrap();
        let page = child.pin_user_page(at, Access::Read).unwrap();
        child.munmap(at, 1 << 16).unwrap();
        // The parent alone maps the page, and the child's device reads it still.
        parent.write(at, &[2]).unwrap();
        // SAFETY: pinned.
        assert_eq!(unsafe { mm.page_address(page.pfn()).read() }, 1);
        assert_eq!(byte(&parent, at), 2);
        check(&mm, &[parent, child]);
    }
    ends_balanced(&mm);
}

/// What is pinned is what is written whoever looks at it.
pub fn what_is_pinned_is_what_is_written_whoever_looks_at_it<L: Lab>(lab: &L) {
    let mm = lab.flat(memory()).boot();
    {
        let space = MmStruct::new(&mm, 1).unwrap();
        let at = space.mmap(None, 1 << 16, RW, Map::Anon).unwrap();
        space.write(at, &[1]).unwrap();
        let pin = space.pin_user_page(at, Access::Write).unwrap();
        space.mprotect(at, 1 << 16, VmFlags::READ).unwrap();
        space.mprotect(at, 1 << 16, RW).unwrap();
        // Somebody has it for a moment: compaction, reclaim, another walker.
        let other = mm.folio_get(pin.pfn()).unwrap();
        space.write(at, &[2]).unwrap();
        drop(other);
        // SAFETY: pinned.
        assert_eq!(unsafe { mm.page_address(pin.pfn()).read() }, 2);
    }
    ends_balanced(&mm);
}

/// A filesystem that lets go of what it attached, or not; and what nobody may evict.
pub fn private_data_and_locked_memory_keep_folios<L: Lab>(lab: &L) {
    struct Fs(core::sync::atomic::AtomicBool);
    impl MappingOps for Fs {
        fn read_folio(&self, _: u64, pages: &mut [u8]) -> Result<(), FileError> {
            pages.fill(0);
            Ok(())
        }
        fn writepage(&self, _: u64, _: &[u8]) -> Result<(), FileError> {
            Ok(())
        }
        fn release_folio(&self, private: u64) -> bool {
            assert_eq!(private, 99);
            self.0.load(Ordering::Relaxed)
        }
    }
    let mm = lab.flat(mib(64)).boot();
    let fs = Fs(false.into());
    {
        let file = Mapping::new(&mm, &fs, 100).unwrap();
        for index in [10, 20] {
            let folio = file.get(index).unwrap();
            if index == 10 {
                mm.folio_attach_private(&mm.folio_lock(&folio), 99, GFP_KERNEL)
                    .unwrap();
            } else {
                assert!(mm.folio_set_unevictable(&folio, folio.head(), true));
            }
        }
        file.get(30).unwrap();
        let request = ReclaimRequest {
            gfp: GFP_KERNEL,
            order: 0,
            attempt: 3,
        };
        let there = |index| file.find(index).is_some();
        mm.try_to_free_pages(&request);
        assert_eq!([10, 20, 30].map(there), [true, true, false]);
        assert_eq!(mm.lru_view(0).folios[LruList::Unevictable as usize], 1);
        fs.0.store(true, Ordering::Relaxed);
        let folio = file.find(20).unwrap();
        assert!(mm.folio_set_unevictable(&folio, folio.head(), false));
        drop(folio);
        mm.try_to_free_pages(&request);
        assert_eq!([10, 20].map(there), [false, false]);
    }
    ends_balanced(&mm);
}

/// Two mebibytes at once and page by page.
pub fn two_mebibytes_at_once_and_page_by_page<L: Lab>(lab: &L) {
    let mm = lab.flat(2 * memory()).boot();
    {
        let parent = MmStruct::new(&mm, 1).unwrap();
        let flags = RW.with(VmFlags::HUGE);
        let at = parent.mmap(None, 8 << 20, flags, Map::Anon).unwrap();
        parent.write(at + 12345, &[1]).unwrap();
        let (folio, page) = parent.page_at(at).unwrap();
        assert_eq!(
            (folio.order(), folio.mapcount(), page),
            (9, 1, folio.head())
        );
        assert_eq!(mm.folio_entire_mapcount(folio.head()), 1);
        drop(folio);
        let child = parent.fork(2).unwrap();
        // A write to a part of what is shared: mapped by pages in the child, which copies one.
        child.write(at + 7 * 4096, &[2]).unwrap();
        let (folio, _) = parent.page_at(at).unwrap();
        assert_eq!(folio.mapcount(), 1 + 511);
        assert_eq!(mm.page_mapcount(folio.head()), 2);
        assert_eq!(mm.page_mapcount(folio.head().add(7)), 1);
        drop(folio);
        let spaces = [parent, child];
        let report = check(&mm, &spaces);
        assert_eq!((report.huge, report.pages), (1, 512));
        // A hole in the middle of 2 MiB.
        spaces[0].munmap(at + 4096 * 100, 4096 * 10).unwrap();
        let report = check(&mm, &spaces);
        assert_eq!((report.huge, report.pages), (0, 512 + 502));
        assert_eq!(byte(&spaces[1], at + 12345), 1);
        assert_eq!(byte(&spaces[0], at + 7 * 4096), 0);
    }
    ends_balanced(&mm);
}
