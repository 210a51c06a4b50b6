//! A life of address spaces and files in which every allocation fails once: each call says so as a value, the counts agree with the tables in the middle,
//! and when all has been dropped nothing is left.
#![cfg(not(miri))]
#![allow(missing_docs)]

mod common;

use std::sync::atomic::{AtomicU64, Ordering};

use common::{Machine, ledger};
use memdesc::filemap::{FileError, Mapping, MappingOps};
use memdesc::gfp::*;
use memdesc::mmap::*;
use memdesc::*;
use memdesc_host::Host;

const RW: VmFlags = VmFlags::READ_WRITE;
const PAGES: u32 = 20 << 8;

/// Pages that say which they are. Each disk access may fail as well, by number.
struct Disk {
    accesses: AtomicU64,
    fails: u64,
}

impl Disk {
    fn access(&self) -> Result<(), FileError> {
        if self.accesses.fetch_add(1, Ordering::Relaxed) == self.fails {
            Err(FileError::Io)
        } else {
            Ok(())
        }
    }
}

impl MappingOps for Disk {
    fn read_folio(&self, index: u64, pages: &mut [u8]) -> Result<(), FileError> {
        self.access()?;
        for (nth, page) in (index..).zip(pages.chunks_mut(4096)) {
            page.fill(nth as u8);
        }
        Ok(())
    }

    fn writepage(&self, _: u64, _: &[u8]) -> Result<(), FileError> {
        self.access()
    }
}

fn check(spaces: &[&MmStruct<'_, Host>], at: &str) {
    let mut seen = vec![0; PAGES as usize + 1];
    if let Err(why) = MmStruct::check_all(spaces, &mut seen) {
        panic!("{at}: {why:?}");
    }
}

/// What was written is there, or the write had failed.
struct Bytes(Vec<(u64, u8)>);

impl Bytes {
    fn write(&mut self, space: &MmStruct<'_, Host>, at: u64, byte: u8) {
        if space.write(at, &[byte]).is_ok() {
            self.0.retain(|&(a, _)| a != at);
            self.0.push((at, byte));
        }
    }

    fn check(&self, space: &MmStruct<'_, Host>) {
        for &(at, byte) in &self.0 {
            let mut seen = [0];
            if space.read(at, &mut seen).is_ok() {
                assert_eq!(seen, [byte], "at {at:#x}");
            }
        }
    }
}

fn anonymous(mm: &Mm<Host>) {
    let Ok(space) = MmStruct::new(mm, 1) else {
        return;
    };
    let mut bytes = Bytes(Vec::new());
    let large = RW.with(VmFlags::LARGE);
    let huge = RW.with(VmFlags::HUGE);
    let areas = [
        space.mmap(Some(0x10_0000), 40 << 12, RW, Map::Anon),
        space.mmap(Some(0x20_0000), 40 << 12, large, Map::Anon),
        space.mmap(Some(0x40_0000), 4 << 20, huge, Map::Anon),
    ];
    let areas: Vec<u64> = areas.into_iter().flatten().collect();
    for &at in &areas {
        for page in [0, 3, 20] {
            bytes.write(&space, at + page * 4096, page as u8 + 1);
        }
    }
    check(&[&space], "touched");
    let child = space.fork(2);
    let all: Vec<_> = [&space].into_iter().chain(child.as_ref().ok()).collect();
    check(&all, "forked");
    for &at in &areas {
        bytes.write(&space, at + 3 * 4096, 77);
        if let Ok(child) = &child {
            let _ = child.write(at + 20 * 4096, &[99]);
            // A hole, and less rights for a part of what is large.
            let _ = child.munmap(at + 5 * 4096, 3 * 4096);
            let _ = child.mprotect(at + 30 * 4096, 2 * 4096, VmFlags::READ);
        }
    }
    bytes.check(&space);
    check(&all, "copied on write");
    // A pinned page, and a child that gets a copy of it.
    let pin = areas
        .first()
        .and_then(|&at| space.pin_user_page(at, Access::Write).ok());
    let late = space.fork(3);
    let all: Vec<_> = all.into_iter().chain(late.as_ref().ok()).collect();
    check(&all, "forked while pinned");
    drop(pin);
    for &at in &areas {
        if let Some((folio, _)) = space.page_at(at) {
            let _ = mm.split_folio(&folio, 2);
        }
        check(&all, "split");
        if let Some((folio, page)) = space.page_at(at + 20 * 4096) {
            let order = folio.order();
            drop(folio);
            if let Ok(to) = mm.alloc_pages(GFP_HIGHUSER_MOVABLE & !__GFP_RECLAIM, order) {
                // SAFETY: bare pages of ours; then the ones that are not used are.
                unsafe {
                    let moved = mm.migrate_folio(page, to);
                    mm.free_pages(moved.unwrap_or(to));
                }
            }
        }
    }
    bytes.check(&space);
    check(&all, "moved");
    if let Ok(folio) = mm.alloc_folio(GFP_HIGHUSER_MOVABLE, 2, FolioKind::Anon) {
        let _ = space.insert_page(0x10_0000 + 30 * 4096, folio.add(3));
        // SAFETY: ours; who maps it has it still.
        unsafe { mm.free_pages(folio) };
    }
    check(&all, "inserted");
}

fn file(mm: &Mm<Host>, disk: &Disk) {
    let Ok(file) = Mapping::new(mm, disk, 1100) else {
        return;
    };
    let Ok(space) = MmStruct::new(mm, 4) else {
        return;
    };
    let shared = RW.with(VmFlags::SHARED);
    let one = space.mmap(None, 40 << 12, shared, Map::File(&file, 3));
    let own = space.mmap(None, 40 << 12, RW, Map::File(&file, 3));
    let _ = file.will_need(512, 512);
    let huge = shared.with(VmFlags::HUGE);
    let two = space.mmap(None, 2 << 20, huge, Map::File(&file, 512));
    for index in 0..40 {
        let _ = file.read(index * 4096, &mut [0; 100]);
    }
    for at in [one, own, two].into_iter().flatten() {
        let _ = space.read(at, &mut [0]);
        let _ = space.write(at + 7 * 4096, &[1]);
    }
    let _ = file.write(5 * 4096, &[3; 5000]);
    check(&[&space], "a file, mapped and written");
    let child = space.fork(5);
    let all: Vec<_> = [&space].into_iter().chain(child.as_ref().ok()).collect();
    check(&all, "a file, forked");
    if let Some(folio) = file.find(30) {
        let locked = mm.folio_lock(&folio);
        let _ = mm.folio_attach_private(&locked, 5, GFP_KERNEL);
        drop(locked);
    }
    let _ = file.writeback(0..=u64::MAX);
    if let Ok(at) = two {
        let _ = space.munmap(at + 100 * 4096, 4096);
    }
    if let Some(folio) = file.find(700) {
        let _ = mm.split_folio(&folio, 4);
    }
    check(&all, "a file, split");
    file.truncate(600);
    check(&all, "a file, cut");
    let request = ReclaimRequest {
        gfp: GFP_KERNEL,
        order: 0,
        attempt: 3,
    };
    mm.try_to_free_pages(&request);
    check(&all, "a file, reclaimed");
}

fn ranges(mm: &Mm<Host>) {
    let Ok(space) = MmStruct::new(mm, 6) else {
        return;
    };
    if let Ok(at) = space.mmap(None, 600 << 12, RW, Map::Anon) {
        for page in 0..600 {
            let _ = space.write(at + page * 4096, &[page as u8]);
        }
    }
    let mut page = Pfn(0);
    space.for_each_entry(|_, _, entry| page = entry.pfn());
    let start = page.align_down(8);
    if page != Pfn(0) && mm.alloc_contig_range(start, 256).is_ok() {
        // SAFETY: just gathered.
        unsafe { mm.free_contig_range(start, 256) };
    }
    check(&[&space], "a range was cleared");
    if page != Pfn(0) && mm.offline_pages(start, 200).is_ok() {
        // Without memory for the descriptors it stays off line; later there is some.
        while mm.online_pages(start, 200).is_err() {}
    }
    check(&[&space], "a range was off line");
}

fn every_point(name: &str, work: impl Fn(&Mm<Host>)) {
    let mut failed = 0;
    for n in 0.. {
        assert!(n < 20_000, "{name}: no end");
        let machine = Machine::flat(PAGES);
        let device = common::range(DEVICE.0, DEVICE.0 + 64, 0);
        let mm = machine.boot_on(machine.host().device(device).build().unwrap());
        let before = ledger(&mm).by_type;
        mm.platform().faults().fail_nth(n);
        work(&mm);
        let (_, fired) = mm.platform().faults().off();
        mm.shrink();
        let after = ledger(&mm);
        assert!(after.balanced, "{name}, fault {n}: {after:?}");
        for kind in PageType::ALL {
            if kind != PageType::Slab && kind != PageType::Free && kind != PageType::None {
                let (was, is) = (before[kind as usize], after.by_type[kind as usize]);
                assert_eq!(was, is, "{name}, fault {n}: {kind:?}");
            }
        }
        mm.slabinfo(|cache| {
            // The words of device memory stay.
            if !cache.metadata && cache.name != "kmalloc-1k" {
                assert_eq!(cache.active_objs, 0, "{name}, fault {n}: {}", cache.name);
            }
        });
        if fired == 0 {
            break;
        }
        failed += 1;
    }
    println!("{name}: {failed} points");
    assert!(failed > 50, "{name}: {failed} points only");
}

struct Ring;

impl OwnType for Ring {
    const NUMBER: u8 = 0;
    const NAME: &'static str = "ring";
    const MAPPABLE: bool = true;
}

/// Pages of all that is counted and no folio, in a space and out of it.
fn purposes(mm: &Mm<Host>) {
    let rings = mm.register_type::<Ring>();
    let params = PagePoolParams {
        order: 1,
        pool_size: 16,
        ..Default::default()
    };
    let mut pool = mm.page_pool_create(params);
    let mut device = mm.memremap_pages(DEVICE, 64);
    let mut pages = Vec::new();
    for order in 0..3 {
        if let Ok(rings) = &rings
            && let Ok(ring) = rings.alloc(GFP_KERNEL, order, Ring)
        {
            pages.push(ring);
        }
        pages.extend(mm.alloc_folio(GFP_KERNEL, order, FolioKind::Driver));
    }
    let pooled = pool
        .as_mut()
        .ok()
        .and_then(|pool| pool.alloc(GFP_KERNEL).ok());
    let described = device.as_mut().ok().and_then(|device| {
        let done = device.folio(DEVICE, 2, GFP_KERNEL);
        done.ok().map(|()| DEVICE)
    });
    if let Ok(space) = MmStruct::new(mm, 1)
        && let Ok(at) = space.mmap(None, 1 << 20, RW, Map::Anon)
    {
        let all = pages.iter().copied().chain(pooled).chain(described);
        let mapped = all
            .zip(0..)
            .filter(|&(page, nth)| space.insert_page(at + nth * 4096, page).is_ok());
        let mapped = mapped.count();
        let child = space.fork(2);
        let spaces: Vec<_> = [Ok(&space), child.as_ref()].into_iter().flatten().collect();
        check_device(&spaces, mapped);
    }
    // SAFETY: all ours, and mapped by nobody.
    unsafe {
        pages.into_iter().for_each(|page| mm.free_pages(page));
        if let Some(page) = pooled {
            mm.page_pool_put_page(page);
        }
        if let (Ok(device), Some(page)) = (&device, described) {
            device.put(page);
        }
    }
    assert_eq!(mm.device_pages_in_use(), 0);
    drop((pool, device.map(DevicePages::unplug)));
    // Free blocks that lie on its descriptors need others first.
    let mut rings = rings.ok();
    while let Some(Err((again, _))) = rings.take().map(OwnPages::unregister) {
        rings = Some(again);
    }
}

const DEVICE: Pfn = Pfn(PAGES + 512);

fn check_device(spaces: &[&MmStruct<'_, Host>], mapped: usize) {
    let mut seen = vec![0; PAGES as usize + 1024];
    let report = MmStruct::check_all(spaces, &mut seen).unwrap();
    assert_eq!(report.pages, (mapped * spaces.len()) as u64);
}

#[test]
fn all_that_is_counted() {
    every_point("counted", purposes);
}

#[test]
fn anonymous_memory() {
    every_point("anonymous", anonymous);
}

#[test]
fn files() {
    every_point("file", |mm| {
        let disk = Disk {
            accesses: AtomicU64::new(0),
            fails: u64::MAX,
        };
        file(mm, &disk);
    });
}

#[test]
fn disks_that_fail() {
    for fails in 0.. {
        let mm = Machine::flat(PAGES).boot();
        let disk = Disk {
            accesses: AtomicU64::new(0),
            fails,
        };
        file(&mm, &disk);
        mm.shrink();
        let after = ledger(&mm);
        assert!(after.balanced, "access {fails}: {after:?}");
        assert_eq!(after.by_type[PageType::File as usize], 0, "access {fails}");
        if disk.accesses.load(Ordering::Relaxed) <= fails {
            break;
        }
    }
}

#[test]
fn ranges_that_are_cleared() {
    every_point("ranges", ranges);
}
