//! Bad memory: a page fails in each state that it can be in. What else was in use stays as it was, the page is never handed out again, and the
//! ledger balances.
#![allow(missing_docs)]

mod common;

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use common::{Machine, Rng, descriptors, free, kfree, ledger, scaled};
use memdesc::filemap::{FileError, Mapping, MappingOps};
use memdesc::gfp::*;
use memdesc::mmap::*;
use memdesc::*;
use memdesc_host::Host;

const PAGE: u64 = 4096;
const RW: VmFlags = VmFlags::READ_WRITE;
const MACHINE: u32 = 16384;

type Failure = (FailedPage, MfResult);
use FailedPage::{Alone, AlreadyBad, Anon, CleanFile, DirtyFile, Kernel, NotRam, Other};
use MfResult::{Delayed, Failed, Ignored, Recovered};

/// A file whose pages say which they are.
#[derive(Default)]
struct Disk {
    written: Mutex<BTreeMap<u64, u8>>,
    reads: AtomicU64,
}

impl MappingOps for Disk {
    fn read_folio(&self, index: u64, pages: &mut [u8]) -> Result<(), FileError> {
        self.reads.fetch_add(1, Ordering::Relaxed);
        let written = self.written.lock().unwrap();
        for (nth, page) in (index..).zip(pages.chunks_mut(4096)) {
            page.fill(written.get(&nth).copied().unwrap_or(nth as u8));
        }
        Ok(())
    }

    fn writepage(&self, index: u64, pages: &[u8]) -> Result<(), FileError> {
        let mut written = self.written.lock().unwrap();
        for (nth, page) in (index..).zip(pages.chunks(4096)) {
            written.insert(nth, page[0]);
        }
        Ok(())
    }
}

/// Who was told: address space and address.
type Told = std::sync::Arc<Mutex<Vec<(u64, u64)>>>;

fn boot(pages: u32, cpus: usize) -> (Mm<Host>, Told) {
    let machine = Machine::flat(pages).cpus(cpus);
    let told = Told::default();
    let hears = told.clone();
    let host = machine
        .host()
        .floating(1)
        .on_memory_failure(move |asid, address, _| hears.lock().unwrap().push((asid, address)));
    (machine.boot_on(host.build().unwrap()), told)
}

#[track_caller]
fn fails(mm: &Mm<Host>, page: Pfn, expected: Failure) -> MemoryFailure {
    let failure = mm.memory_failure(page);
    assert_eq!((failure.page, failure.result), expected, "{failure}");
    if failure.result == Recovered {
        assert_bad(mm, page);
    }
    failure
}

#[track_caller]
fn assert_bad(mm: &Mm<Host>, page: Pfn) {
    let memory = mm.lookup(page).2;
    assert!(matches!(memory, Memory::HwPoison), "{page:?} is {memory:?}");
}

fn head_of(mm: &Mm<Host>, page: Pfn) -> Pfn {
    mm.lookup(page).0
}

fn fill(mm: &Mm<Host>, page: Pfn, byte: u8) {
    // SAFETY: a page that the test has.
    unsafe { mm.page_address(page).write_bytes(byte, 4096) };
}

fn holds(mm: &Mm<Host>, page: Pfn, byte: u8) -> bool {
    let at = mm.page_address(page);
    // SAFETY: a page that the test has.
    (0..4096).all(|i| unsafe { at.add(i).read() } == byte)
}

/// Uses all memory there is, in blocks of all orders, again and again; no bad page is ever in one.
fn use_all(mm: &Mm<Host>, bad: &[Pfn], rounds: u64) {
    let mut rng = Rng(rounds ^ 0x51de);
    for _ in 0..rounds {
        let mut live = Vec::new();
        for most in [10, 9, 5, 3, 0, 0] {
            mm.drain_all();
            loop {
                let order = rng.below(most + 1);
                let flags = GFP_NOWAIT | __GFP_MEMALLOC | __GFP_NOWARN;
                let flags = if rng.one_in(2) {
                    flags | __GFP_MOVABLE
                } else {
                    flags
                };
                let Ok(pfn) = mm.alloc_pages(flags, order) else {
                    break;
                };
                for page in bad {
                    let inside = page.0 >= pfn.0 && page.0 - pfn.0 < 1 << order;
                    assert!(
                        !inside,
                        "{page:?} is bad, and handed out at {pfn:?} order {order}"
                    );
                }
                live.push(pfn);
            }
        }
        let left = ledger(mm);
        assert!(
            left.free + left.pcp + left.untouched < 64,
            "all of it was used: {left:?}"
        );
        while !live.is_empty() {
            free(mm, live.swap_remove(rng.below(live.len())));
        }
        mm.tick();
    }
}

/// One state: makes it, has the page fail, and lets everything go. Says which pages are bad then.
type Case = fn(&Mm<Host>, &Told) -> Vec<Pfn>;

fn space_of<'m>(mm: &'m Mm<Host>, flags: VmFlags, len: u64) -> (MmStruct<'m, Host>, u64) {
    let space = MmStruct::new(mm, 7).unwrap();
    let at = space.mmap(None, len, flags, Map::Anon).unwrap();
    for page in 0..len / PAGE {
        space.write(at + page * PAGE, &[page as u8, 0xaa]).unwrap();
    }
    (space, at)
}

/// All pages of `space_of` but `lost` hold what they held.
#[track_caller]
fn others_hold(space: &MmStruct<'_, Host>, at: u64, len: u64, lost: &[u64]) {
    for page in 0..len / PAGE {
        let mut two = [0; 2];
        let read = space.read(at + page * PAGE, &mut two);
        if lost.contains(&page) {
            assert_eq!(read, Err(FaultError::HwPoison), "page {page}");
        } else {
            assert_eq!(read, Ok(()), "page {page}");
            assert_eq!(two, [page as u8, 0xaa], "page {page}");
        }
    }
}

fn page_of(space: &MmStruct<'_, Host>, addr: u64) -> Pfn {
    space.page_at(addr).expect("mapped").1
}

const CASES: &[(&str, Case)] = &[
    ("free in a zone", |mm, _| {
        let block = mm.alloc_pages(GFP_KERNEL, 4).unwrap();
        free(mm, block);
        mm.drain_all();
        let page = block.add(11);
        assert!(matches!(mm.lookup(page).2, Memory::Free { in_pcp: false }));
        fails(mm, page, (FailedPage::Free, Recovered));
        fails(mm, page, (AlreadyBad, Ignored));
        vec![page]
    }),
    ("untouched", |mm, _| {
        fails(mm, Pfn(9001), (FailedPage::Untouched, Recovered));
        vec![Pfn(9001)]
    }),
    ("free in a CPU's list", |mm, _| {
        let page = mm.alloc_pages(GFP_KERNEL, 0).unwrap();
        free(mm, page);
        assert!(matches!(mm.lookup(page).2, Memory::Free { in_pcp: true }));
        fails(mm, page, (FailedPage::PerCpu, Recovered));
        vec![page]
    }),
    ("no memory", |mm, _| {
        fails(mm, Pfn(1 << 22), (NotRam, Ignored));
        vec![]
    }),
    ("bare pages of each order", |mm, _| {
        let mut bad = Vec::new();
        for order in 0..=MAX_ORDER {
            let pfn = mm.alloc_pages(GFP_KERNEL, order).unwrap();
            let page = pfn.add((1 << order) * 5 / 7);
            (0..1 << order).for_each(|nth| fill(mm, pfn.add(nth), nth as u8));
            fails(mm, page, (Kernel(PageType::Bare), Delayed));
            fails(mm, page, (AlreadyBad, Ignored));
            assert!((0..1 << order).all(|nth| holds(mm, pfn.add(nth), nth as u8)));
            free(mm, pfn);
            assert_bad(mm, page);
            for other in (0..1 << order)
                .map(|nth| pfn.add(nth))
                .filter(|&p| p != page)
            {
                assert!(
                    matches!(mm.lookup(other).2, Memory::Free { .. }),
                    "{other:?}"
                );
            }
            bad.push(page);
        }
        bad
    }),
    ("three in one block", |mm, _| {
        let pfn = mm.alloc_pages(GFP_KERNEL, 9).unwrap();
        let bad = vec![pfn, pfn.add(1), pfn.add(500)];
        for &page in &bad {
            fails(mm, page, (Kernel(PageType::Bare), Delayed));
        }
        assert_eq!(mm.num_poisoned_pages(), 3);
        free(mm, pfn);
        bad.iter().for_each(|&page| assert_bad(mm, page));
        bad
    }),
    ("freed without a lock", |mm, _| {
        let pfn = mm.alloc_pages(GFP_KERNEL, 2).unwrap();
        fails(mm, pfn.add(3), (Kernel(PageType::Bare), Delayed));
        // SAFETY: ours.
        unsafe { mm.free_pages_nolock(pfn) };
        mm.tick();
        assert_bad(mm, pfn.add(3));
        vec![pfn.add(3)]
    }),
    ("slab", |mm, _| {
        let cache = mm
            .kmem_cache_create("inode", 600, 8, CacheFlags::EMPTY, None)
            .unwrap();
        let objects: Vec<_> = (0..100u8)
            .map(|byte| {
                let object = mm.kmem_cache_alloc(&cache, GFP_KERNEL).unwrap();
                // SAFETY: 600 bytes, ours.
                unsafe { object.as_ptr().write_bytes(byte, 600) };
                object
            })
            .collect();
        let page = mm.virt_to_pfn(objects[50].as_ptr());
        fails(mm, page, (Kernel(PageType::Slab), Delayed));
        for (byte, object) in (0u8..).zip(&objects) {
            // SAFETY: as above.
            assert!((0..600).all(|i| unsafe { object.as_ptr().add(i).read() } == byte));
        }
        // SAFETY: from this cache, not used any more.
        objects
            .iter()
            .for_each(|&object| unsafe { mm.kmem_cache_free(&cache, object) });
        mm.kmem_cache_destroy(cache).expect("all are back");
        assert_bad(mm, page);
        vec![page]
    }),
    ("large kmalloc", |mm, _| {
        let object = mm.kmalloc(100_000, GFP_KERNEL).unwrap();
        let page = mm.virt_to_pfn(object.as_ptr()).add(9);
        fails(mm, page, (Kernel(PageType::LargeKmalloc), Delayed));
        kfree(mm, object);
        assert_bad(mm, page);
        vec![page]
    }),
    ("page table", |mm, _| {
        let page = mm.alloc_page_table(GFP_KERNEL | __GFP_ZERO, 0).unwrap();
        fails(mm, page, (Kernel(PageType::PageTable), Delayed));
        free(mm, page);
        assert_bad(mm, page);
        vec![page]
    }),
    ("vmalloc", |mm, _| {
        let area = mm.vmalloc(100_000, GFP_KERNEL).unwrap();
        let page = mm
            .vmalloc_to_pfn(area.as_ptr().wrapping_add(40_000))
            .unwrap();
        fails(mm, page, (Kernel(PageType::Vmalloc), Delayed));
        // SAFETY: ours.
        unsafe { mm.vfree(area) };
        mm.shrink();
        assert_bad(mm, page);
        vec![page]
    }),
    ("clean page of a file", |mm, told| {
        let disk = Disk::default();
        let file = Mapping::new(mm, &disk, 100).unwrap();
        let space = MmStruct::new(mm, 3).unwrap();
        let at = space
            .mmap(None, 100 * PAGE, RW, Map::File(&file, 0))
            .unwrap();
        let mut byte = [0];
        for page in 0..20 {
            space.read(at + page * PAGE, &mut byte).unwrap();
        }
        let page = page_of(&space, at + 5 * PAGE);
        let failure = fails(mm, page, (CleanFile, Recovered));
        assert!(!failure.lost && failure.users == 0 && told.lock().unwrap().is_empty());
        for nth in 0..20 {
            space.read(at + nth * PAGE, &mut byte).unwrap();
            assert_eq!(byte, [nth as u8]);
        }
        assert_ne!(page_of(&space, at + 5 * PAGE), page);
        assert_eq!(file.check_errors(), Ok(()));
        vec![page]
    }),
    ("dirty page of a file", |mm, told| {
        let disk = Disk::default();
        let file = Mapping::new(mm, &disk, 100).unwrap();
        let spaces = [MmStruct::new(mm, 3).unwrap(), MmStruct::new(mm, 4).unwrap()];
        let maps = spaces.each_ref().map(|space| {
            let shared = RW.with(VmFlags::SHARED);
            space
                .mmap(None, 100 * PAGE, shared, Map::File(&file, 0))
                .unwrap()
        });
        let mut byte = [0];
        for (space, at) in spaces.iter().zip(maps) {
            space.write(at + 6 * PAGE, &[88]).unwrap();
            space.write(at + 5 * PAGE, &[99]).unwrap();
            space.read(at + 7 * PAGE, &mut byte).unwrap();
        }
        let page = page_of(&spaces[0], maps[0] + 5 * PAGE);
        let failure = fails(mm, page, (DirtyFile, Recovered));
        assert!(failure.lost && failure.users == 2, "{failure:?}");
        let mut heard = told.lock().unwrap().clone();
        heard.sort();
        assert_eq!(heard, [(3, maps[0] + 5 * PAGE), (4, maps[1] + 5 * PAGE)]);
        for (space, at) in spaces.iter().zip(maps) {
            assert_eq!(
                space.read(at + 5 * PAGE, &mut byte),
                Err(FaultError::HwPoison)
            );
            assert_eq!(space.write(at + 5 * PAGE, &byte), Err(FaultError::HwPoison));
            space.read(at + 6 * PAGE, &mut byte).unwrap();
            assert_eq!(byte, [88]);
        }
        // Who reads the file gets what was on disk, and who writes back hears of it, once.
        file.read(5 * PAGE, &mut byte).unwrap();
        assert_eq!(byte, [5]);
        assert_eq!(file.writeback(0..=u64::MAX), Err(FileError::Io));
        assert_eq!(file.writeback(0..=u64::MAX), Ok(0));
        assert_eq!(disk.written.lock().unwrap().get(&6), Some(&88));
        // Mapped anew it is there again.
        spaces[0].munmap(maps[0], 100 * PAGE).unwrap();
        let at = spaces[0].mmap(None, PAGE, RW, Map::File(&file, 5)).unwrap();
        spaces[0].read(at, &mut byte).unwrap();
        assert_eq!(byte, [5]);
        vec![page]
    }),
    ("clean, in a large folio of a file", |mm, _| {
        let disk = Disk::default();
        let file = Mapping::new(mm, &disk, 1000).unwrap();
        for nth in 0..600 {
            let mut byte = [0];
            file.read(nth * PAGE, &mut byte).unwrap();
        }
        let large = (0..600)
            .filter_map(|nth| file.find(nth))
            .max_by_key(|f| f.order())
            .unwrap();
        let (order, first, head) = (large.order(), large.index(), large.head());
        assert!(order >= 2, "readahead makes large folios");
        drop(large);
        let reads = disk.reads.load(Ordering::Relaxed);
        fails(mm, head.add(3), (CleanFile, Recovered));
        // The others of the folio are still in the cache.
        for nth in (0..1 << order).filter(|&nth| nth != 3) {
            assert_eq!(file.find(first + nth).unwrap().head(), head.add(nth as u32));
        }
        assert!(file.find(first + 3).is_none());
        let mut byte = [0];
        file.read((first + 3) * PAGE, &mut byte).unwrap();
        assert_eq!(byte, [(first + 3) as u8]);
        assert!(disk.reads.load(Ordering::Relaxed) > reads);
        vec![head.add(3)]
    }),
    ("a file's, that somebody has", |mm, _| {
        let disk = Disk::default();
        let file = Mapping::new(mm, &disk, 100).unwrap();
        let folio = file.get(0).unwrap();
        let page = folio.head();
        fails(mm, page, (CleanFile, Failed));
        assert_eq!(mm.num_poisoned_pages(), 1);
        assert!(file.find(0).is_none_or(|now| now.head() != page));
        drop(folio);
        assert_bad(mm, page);
        vec![page]
    }),
    ("anonymous, of a family", |mm, told| {
        let (space, at) = space_of(mm, RW, 16 * PAGE);
        let child = space.fork(8).unwrap();
        let page = page_of(&space, at + 3 * PAGE);
        let failure = fails(mm, page, (Anon, Recovered));
        assert!(failure.lost && failure.users == 2, "{failure:?}");
        assert_eq!(told.lock().unwrap().len(), 2);
        others_hold(&space, at, 16 * PAGE, &[3]);
        others_hold(&child, at, 16 * PAGE, &[3]);
        // A child of that one must not find a zeroed page instead.
        let grandchild = child.fork(9).unwrap();
        others_hold(&grandchild, at, 16 * PAGE, &[3]);
        assert!(space.pin_user_page(at + 3 * PAGE, Access::Read).is_err());
        // What is protected and opened again is still lost; what is unmapped is forgotten.
        grandchild.mprotect(at, 16 * PAGE, VmFlags::READ).unwrap();
        grandchild.mprotect(at, 16 * PAGE, RW).unwrap();
        others_hold(&grandchild, at, 16 * PAGE, &[3]);
        space.munmap(at + 3 * PAGE, PAGE).unwrap();
        let again = space
            .mmap(Some(at + 3 * PAGE), PAGE, RW, Map::Anon)
            .unwrap();
        space.write(again, &[3, 0xaa]).unwrap();
        others_hold(&space, at, 16 * PAGE, &[]);
        vec![page]
    }),
    ("anonymous, in 64 KiB", |mm, _| {
        let (space, at) = space_of(mm, RW.with(VmFlags::LARGE), 256 << 10);
        let page = page_of(&space, at + 21 * PAGE);
        assert_eq!(mm.lookup(page).1, 4);
        let failure = fails(mm, page, (Anon, Recovered));
        assert_eq!(failure.users, 1);
        others_hold(&space, at, 256 << 10, &[21]);
        vec![page]
    }),
    ("anonymous, in 2 MiB", |mm, _| {
        let (space, at) = space_of(mm, RW.with(VmFlags::HUGE), 4 << 20);
        let page = page_of(&space, at + 300 * PAGE);
        assert_eq!(mm.lookup(page).1, 9);
        fails(mm, page, (Anon, Recovered));
        others_hold(&space, at, 4 << 20, &[300]);
        vec![page]
    }),
    ("in 2 MiB that are pinned", |mm, told| {
        let (space, at) = space_of(mm, RW.with(VmFlags::HUGE), 2 << 20);
        let pin = space.pin_user_page(at + 10 * PAGE, Access::Write).unwrap();
        let page = page_of(&space, at + 300 * PAGE);
        assert_eq!(mm.lookup(page).1, 9);
        // It cannot be split; so all but the one page stay mapped, and the device writes where it did.
        let failure = fails(mm, page, (Anon, Failed));
        assert_eq!((failure.users, told.lock().unwrap().len()), (1, 1));
        others_hold(&space, at, 2 << 20, &[300]);
        assert_eq!(pin.pfn(), page_of(&space, at + 10 * PAGE));
        let there = pin.pfn();
        drop(pin);
        // To move it would be to read what is bad.
        assert!(mm.alloc_contig_range(head_of(mm, page), 512).is_err());
        assert_eq!(page_of(&space, at + 10 * PAGE), there);
        others_hold(&space, at, 2 << 20, &[300]);
        space.munmap(at, 2 << 20).unwrap();
        assert_bad(mm, page);
        vec![page]
    }),
    ("pinned", |mm, _| {
        let (space, at) = space_of(mm, RW, 16 * PAGE);
        let pin = space.pin_user_page(at + 4 * PAGE, Access::Write).unwrap();
        let page = pin.pfn();
        fails(mm, page, (Anon, Failed));
        others_hold(&space, at, 16 * PAGE, &[4]);
        assert!(matches!(mm.lookup(page).2, Memory::Anon(_)));
        drop(pin);
        assert_bad(mm, page);
        vec![page]
    }),
    ("a folio in no mapping", |mm, _| {
        let head = mm
            .alloc_folio(GFP_HIGHUSER_MOVABLE, 0, FolioKind::Anon)
            .unwrap();
        fails(mm, head, (Alone, Failed));
        free(mm, head);
        assert_bad(mm, head);
        vec![head]
    }),
    ("kernel text", |mm, _| {
        mm.reserve_pages(Pfn(512), 100, Reserved::KernelText)
            .unwrap();
        let failure = fails(mm, Pfn(550), (Other("kernel_text"), Ignored));
        assert!(
            failure.to_string().ends_with("kernel_text: ignored"),
            "{failure}"
        );
        fails(mm, Pfn(MACHINE - 1), (Other("memory_map"), Ignored));
        vec![]
    }),
    ("in a balloon", |mm, _| {
        let balloon = Balloon::new(mm);
        assert_eq!(balloon.inflate(600, GFP_HIGHUSER), 600);
        let mut page = None;
        mm.census_visit(|step| {
            if step.kind == CensusKind::Balloon && step.order == Some(9) {
                page = Some(step.pfn.add(77));
            }
        });
        let page = page.unwrap();
        fails(mm, page, (Other("balloon"), Delayed));
        drop(balloon);
        assert_bad(mm, page);
        vec![page]
    }),
    ("a guard", |mm, _| {
        let guard = mm.alloc_guard(GFP_KERNEL, 5).unwrap();
        fails(mm, guard.add(3), (Other("guard"), Delayed));
        // SAFETY: ours.
        unsafe { mm.unguard_pages(guard) };
        free(mm, guard);
        assert_bad(mm, guard.add(3));
        vec![guard.add(3)]
    }),
    ("off line", |mm, _| {
        mm.offline_pages(Pfn(4096), 1024).unwrap();
        fails(mm, Pfn(4500), (Other("offline"), Delayed));
        mm.online_pages(Pfn(4096), 1024).unwrap();
        assert_bad(mm, Pfn(4500));
        vec![Pfn(4500)]
    }),
    ("of a type of the kernel's own", |mm, _| {
        let cache = mm
            .kmem_cache_create("ring", 64, 8, CacheFlags::EMPTY, None)
            .unwrap();
        let desc = mm.kmem_cache_alloc(&cache, GFP_KERNEL).unwrap();
        // SAFETY: an object of 64 bytes, given up to the pages.
        let pages = unsafe { mm.alloc_pages_desc(GFP_KERNEL, 2, desc) };
        let page = pages.unwrap().add(1);
        fails(mm, page, (Kernel(PageType::Yours), Delayed));
        free(mm, head_of(mm, page));
        assert_bad(mm, page);
        mm.shrink();
        mm.kmem_cache_destroy(cache).unwrap();
        vec![page]
    }),
    ("more than can be noted", |mm, _| {
        let free_one = mm.alloc_pages(GFP_KERNEL, 0).unwrap();
        let mut bad: Vec<_> = (0..33)
            .map(|_| mm.alloc_pages(GFP_KERNEL, 0).unwrap())
            .collect();
        let last = bad.pop().unwrap();
        for &page in &bad {
            fails(mm, page, (Kernel(PageType::Bare), Delayed));
        }
        let failure = mm.memory_failure(last);
        assert_eq!(failure.result, Failed, "{failure}");
        assert!(failure.to_string().contains("too many"), "{failure}");
        free(mm, last);
        // What can be saved at once is saved all the same: nothing has to be remembered of it.
        let mut saved = vec![free_one, Pfn(9001)];
        free(mm, free_one);
        fails(mm, free_one, (FailedPage::PerCpu, Recovered));
        fails(mm, Pfn(9001), (FailedPage::Untouched, Recovered));
        let (space, at) = space_of(mm, RW.with(VmFlags::HUGE), 2 << 20);
        saved.push(page_of(&space, at + 300 * PAGE));
        fails(mm, saved[2], (Anon, Recovered));
        saved.push(page_of(&space, at + 7 * PAGE));
        mm.soft_offline_page(saved[3]).unwrap();
        others_hold(&space, at, 2 << 20, &[300]);
        // Of one that is pinned the users are told, but it comes back.
        let pin = space.pin_user_page(at + 4 * PAGE, Access::Write).unwrap();
        let failure = mm.memory_failure(pin.pfn());
        assert_eq!((failure.result, failure.users), (Failed, 1), "{failure}");
        drop(pin);
        others_hold(&space, at, 2 << 20, &[300, 4]);
        bad.iter().for_each(|&page| free(mm, page));
        bad.extend(saved);
        bad
    }),
];

#[test]
fn a_page_fails_in_each_state() {
    for (name, case) in CASES {
        println!("{name}");
        let (mm, told) = boot(MACHINE, 1);
        let mut bad = case(&mm, &told);
        assert_eq!(mm.num_poisoned_pages(), bad.len() as u64, "{name}");
        assert_eq!(
            ledger(&mm).by_type[PageType::Poisoned as usize],
            bad.len() as u64,
            "{name}"
        );
        assert_eq!(
            mm.census().of(CensusKind::HwPoison).pages,
            bad.len() as u64,
            "{name}"
        );
        mm.vmstat(|what, n| assert!(what != "nr_hwpoison" || n == bad.len() as u64));
        use_all(&mm, &bad, 3);
        mm.shrink();
        use_all(&mm, &bad, 1);
        bad.iter().for_each(|&page| assert_bad(&mm, page));
        if !name.contains("kernel's own") {
            descriptors(&mm, 0);
        }
        // And back.
        while let Some(page) = bad.pop() {
            mm.unpoison_memory(page).unwrap();
            assert_eq!(mm.unpoison_memory(page), Err(AllocError::Busy));
            mm.drain_all();
            mm.alloc_pages_at(page, 0).unwrap();
            free(&mm, page);
        }
        assert_eq!(mm.census().of(CensusKind::HwPoison).pages, 0, "{name}");
        assert_eq!(mm.num_poisoned_pages(), 0);
        mm.shrink();
        ledger(&mm);
    }
}

#[test]
fn what_still_works_is_moved() {
    let disk = Disk::default();
    let (mm, told) = boot(MACHINE, 1);
    let mut bad = Vec::new();
    // Anonymous memory of all sizes, in a family.
    let (space, at) = space_of(&mm, RW.with(VmFlags::HUGE).with(VmFlags::LARGE), 3 << 20);
    let child = space.fork(8).unwrap();
    for nth in [0, 3, 300, 600] {
        let page = page_of(&space, at + nth * PAGE);
        mm.soft_offline_page(page).unwrap();
        assert_bad(&mm, page);
        assert_eq!(mm.soft_offline_page(page), Err(AllocError::Busy));
        bad.push(page);
    }
    others_hold(&space, at, 3 << 20, &[]);
    others_hold(&child, at, 3 << 20, &[]);
    // A dirty page of a file.
    let file = Mapping::new(&mm, &disk, 100).unwrap();
    let map = space
        .mmap(
            None,
            10 * PAGE,
            RW.with(VmFlags::SHARED),
            Map::File(&file, 0),
        )
        .unwrap();
    space.write(map, &[99]).unwrap();
    let page = page_of(&space, map);
    mm.soft_offline_page(page).unwrap();
    bad.push(page);
    let mut byte = [0];
    space.read(map, &mut byte).unwrap();
    assert_eq!(byte, [99]);
    assert!(file.writeback(0..=u64::MAX).unwrap() > 0);
    // Free and untouched ones.
    let page = mm.alloc_pages(GFP_KERNEL, 0).unwrap();
    free(&mm, page);
    for page in [page, Pfn(12345)] {
        mm.soft_offline_page(page).unwrap();
        bad.push(page);
    }
    // What cannot be moved stays, and is not marked.
    let bare = mm.alloc_pages(GFP_KERNEL, 3).unwrap();
    assert_eq!(mm.soft_offline_page(bare.add(2)), Err(AllocError::Busy));
    free(&mm, bare);
    assert!(matches!(mm.lookup(bare.add(2)).2, Memory::Free { .. }));
    let pin = space.pin_user_page(at + PAGE, Access::Write).unwrap();
    assert_eq!(mm.soft_offline_page(pin.pfn()), Err(AllocError::Busy));
    drop(pin);
    assert!(told.lock().unwrap().is_empty());
    bad.iter().for_each(|&page| assert_bad(&mm, page));
    assert_eq!(mm.num_poisoned_pages(), bad.len() as u64);
    drop((space, child, file));
    use_all(&mm, &bad, 3);
    mm.shrink();
    descriptors(&mm, 0);
}

#[test]
fn a_range_with_bad_pages_goes_off_line_and_comes_back() {
    let (mm, _) = boot(MACHINE, 1);
    let (space, at) = space_of(&mm, RW, 4 << 20);
    let start = Pfn(page_of(&space, at + 100 * PAGE).0 & !1023);
    let bad = [start, start.add(400), start.add(401), start.add(1023)];
    let mut lost = Vec::new();
    for page in bad {
        let nth = (0..1024).find(|nth| {
            space
                .page_at(at + nth * PAGE)
                .is_some_and(|(_, is)| is == page)
        });
        let failure = mm.memory_failure(page);
        if failure.result == Recovered {
            lost.extend(nth);
        } else {
            panic!("{failure}");
        }
    }
    // And one that is bad and in use, which will be moved away on the way: pinned when it failed.
    let nth = (200..1024)
        .find(|nth| {
            let page = space.page_at(at + nth * PAGE);
            page.is_some_and(|(_, p)| p >= start && p < start.add(1024))
        })
        .unwrap();
    let pin = space.pin_user_page(at + nth * PAGE, Access::Write).unwrap();
    let late = pin.pfn();
    assert_eq!(mm.memory_failure(late).result, Failed);
    drop(pin);
    lost.push(nth);
    mm.offline_pages(start, 1024).unwrap();
    let ledger_now = ledger(&mm);
    assert_eq!(ledger_now.by_type[PageType::Offline as usize], 1024 - 5);
    assert_eq!(ledger_now.by_type[PageType::Poisoned as usize], 5);
    for page in bad.into_iter().chain([late]) {
        assert_bad(&mm, page);
    }
    assert!(matches!(mm.lookup(start.add(402)).2, Memory::Offline));
    others_hold(&space, at, 4 << 20, &lost);
    mm.online_pages(start, 1024).unwrap();
    assert_eq!(ledger(&mm).by_type[PageType::Offline as usize], 0);
    drop(space);
    use_all(&mm, &[bad.as_slice(), &[late]].concat(), 3);
    // What cannot be moved keeps it on line, all of it.
    let bare = mm.alloc_pages_at(start.add(800), 0);
    assert!(
        bare.is_ok() || {
            mm.drain_all();
            mm.alloc_pages_at(start.add(800), 0).is_ok()
        }
    );
    assert_eq!(
        mm.offline_pages(start, 1024).unwrap_err().pfn,
        start.add(800)
    );
    assert_eq!(ledger(&mm).by_type[PageType::Offline as usize], 0);
    assert_eq!(ledger(&mm).by_type[PageType::Bare as usize], 1);
}

/// Two pages of a block fail when there are no descriptors, and both go out of use with the same part of it: nothing is noted any more.
#[test]
fn two_go_out_of_use_together() {
    let (mm, _) = boot(MACHINE, 1);
    let block = mm.alloc_pages(GFP_KERNEL, 6).unwrap();
    for page in [block.add(3), block.add(17)] {
        mm.platform().faults().fail_nth(0);
        fails(&mm, page, (Kernel(PageType::Bare), Delayed));
        assert_eq!(mm.platform().faults().off().1, 1);
    }
    assert_eq!(mm.num_poisoned_pages(), 2);
    free(&mm, block);
    assert_bad(&mm, block.add(3));
    assert_bad(&mm, block.add(17));
    // Half of it: the block's own descriptor is for the other half.
    assert_eq!(mm.num_poisoned_pages(), 32);
    mm.unpoison_memory(block.add(17)).unwrap();
    assert_eq!(mm.num_poisoned_pages(), 0);
    assert_eq!(mm.unpoison_memory(block.add(17)), Err(AllocError::Busy));
    mm.shrink();
    descriptors(&mm, 0);
}

/// Who fills and checks pages leaves bad ones alone: to touch them may be deadly.
#[test]
fn bad_pages_are_not_touched() {
    for zeros in [true, false] {
        let mut machine = Machine::flat(MACHINE);
        machine.config.debug_pagealloc = false;
        machine.config.page_poison = true;
        machine.config.init_on_free = zeros;
        machine.config.init_on_alloc = true;
        let mm = machine.boot();
        // In use when it fails, and filled with the rest when it comes back.
        let block = mm.alloc_pages(GFP_KERNEL, 4).unwrap();
        (0..16).for_each(|nth| fill(&mm, block.add(nth), 0x33));
        fails(&mm, block.add(5), (Kernel(PageType::Bare), Delayed));
        free(&mm, block);
        assert_bad(&mm, block.add(5));
        // The test has it looked at, not the allocator.
        mm.platform().kernel_map_pages(block.add(5), 0, true);
        assert!(holds(&mm, block.add(5), 0x33), "filled when it came back");
        for nth in (0..16).filter(|&nth| nth != 5) {
            assert!(!holds(&mm, block.add(nth), 0x33), "{nth} was not filled");
        }
        // Never handed out: taken, and given back.
        fill(&mm, Pfn(9001), 0x33);
        fails(&mm, Pfn(9001), (FailedPage::Untouched, Recovered));
        mm.platform().kernel_map_pages(Pfn(9001), 0, true);
        assert!(holds(&mm, Pfn(9001), 0x33), "filled when it was taken");
        // Off line when it fails.
        mm.offline_pages(Pfn(4096), 64).unwrap();
        fill(&mm, Pfn(4100), 0x33);
        fails(&mm, Pfn(4100), (Other("offline"), Delayed));
        mm.online_pages(Pfn(4096), 64).unwrap();
        assert_bad(&mm, Pfn(4100));
        assert!(holds(&mm, Pfn(4100), 0x33), "filled on its way on line");
        use_all(&mm, &[block.add(5), Pfn(9001), Pfn(4100)], 1);
    }
}

/// What is off line may be pulled out: a page in it that is good again is not handed out, and comes back with the others.
#[test]
fn a_page_that_is_good_again_stays_off_line() {
    let (mm, _) = boot(MACHINE, 1);
    let start = Pfn(4096);
    let bad = [start.add(3), start.add(64), start.add(65), start.add(255)];
    for page in bad {
        assert_eq!(mm.memory_failure(page).result, Recovered);
    }
    mm.offline_pages(start, 256).unwrap();
    for page in &bad[..3] {
        mm.unpoison_memory(*page).unwrap();
        assert!(matches!(mm.lookup(*page).2, Memory::Offline));
    }
    assert_eq!(mm.num_poisoned_pages(), 1);
    let now = ledger(&mm);
    assert_eq!(now.by_type[PageType::Offline as usize], 255);
    assert_eq!(now.by_type[PageType::Poisoned as usize], 1);
    // Not another cut than it went off line with.
    assert_eq!(mm.online_pages(start, 200), Err(AllocError::Busy));
    mm.online_pages(start, 256).unwrap();
    assert_eq!(ledger(&mm).by_type[PageType::Offline as usize], 0);
    // On line again: this one is free.
    mm.unpoison_memory(bad[3]).unwrap();
    assert!(!matches!(mm.lookup(bad[3]).2, Memory::Offline));
    assert_eq!(mm.num_poisoned_pages(), 0);
    use_all(&mm, &[], 1);
}

/// Every allocation that a failure makes fails once: the page goes out of use all the same, or says that it could not.
#[test]
fn without_memory_more_goes_out_of_use() {
    for nth in 0..40 {
        for case in 0..3 {
            let (mm, _) = boot(MACHINE, 1);
            let (space, at) = space_of(&mm, RW.with(VmFlags::HUGE), 2 << 20);
            let bare = mm.alloc_pages(GFP_KERNEL, 10).unwrap();
            let page = [page_of(&space, at + 300 * PAGE), bare.add(700), Pfn(13000)][case];
            mm.platform().faults().fail_nth(nth);
            let failure = mm.memory_failure(page);
            let (_, injected) = mm.platform().faults().off();
            if case == 0 {
                others_hold(&space, at, 2 << 20, &[300]);
            }
            free(&mm, bare);
            drop(space);
            if injected == 0 {
                assert_eq!(failure.result == Delayed, case == 1, "{failure}");
            }
            if failure.result == Failed && case == 2 {
                // Untouched, and no descriptor for the blocks before it: noted only.
                assert_eq!(mm.num_poisoned_pages(), 1);
                continue;
            }
            assert_bad(&mm, page);
            let census = mm.census();
            let pages = census.of(CensusKind::HwPoison).pages;
            if injected == 0 {
                assert_eq!(pages, 1);
            }
            // Half of the block at the most: its own descriptor is always there.
            assert!(pages.is_power_of_two() && pages <= 512, "{pages}");
            use_all(&mm, &[page], 1);
            let head = head_of(&mm, page);
            mm.unpoison_memory(head).unwrap();
            assert_eq!(mm.census().of(CensusKind::HwPoison).pages, 0);
            ledger(&mm);
            mm.shrink();
            descriptors(&mm, 0);
        }
    }
}

/// Who ends, by a failed check as well, ends the others.
struct Stops<'a>(&'a AtomicBool);

impl Drop for Stops<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Pages fail while two threads use memory in all ways.
#[test]
fn pages_fail_under_load() {
    let (mm, _) = boot(MACHINE, 3);
    let stop = AtomicBool::new(false);
    let turns = AtomicU64::new(0);
    let bad: Vec<AtomicBool> = (0..MACHINE).map(|_| AtomicBool::new(false)).collect();
    let is_bad = |pfn: Pfn, order: usize| {
        (0..1 << order).any(|nth| bad[pfn.0 as usize + nth].load(Ordering::SeqCst))
    };
    std::thread::scope(|scope| {
        for cpu in 0..2 {
            let (mm, stop, is_bad, turns) = (&mm, &stop, &is_bad, &turns);
            scope.spawn(move || {
                let _cpu = mm.platform().claim(cpu).unwrap();
                let _stops = Stops(stop);
                let mut rng = Rng(cpu as u64);
                let mut live: Vec<(Pfn, usize)> = Vec::new();
                let space = MmStruct::new(mm, cpu as u64 + 1).unwrap();
                let at = space
                    .mmap(None, 8 << 20, RW.with(VmFlags::LARGE), Map::Anon)
                    .unwrap();
                while !stop.load(Ordering::Relaxed) {
                    turns.fetch_add(1, Ordering::Relaxed);
                    if rng.one_in(2) && live.len() < 300 {
                        let order = [0, 0, 1, 3, 4, 9][rng.below(6)];
                        if let Ok(pfn) = mm.alloc_pages(GFP_KERNEL | __GFP_NORETRY, order) {
                            assert!(!is_bad(pfn, order), "{pfn:?} order {order}");
                            live.push((pfn, order));
                        }
                    } else if !live.is_empty() {
                        free(mm, live.swap_remove(rng.below(live.len())).0);
                    }
                    let page = rng.below(2048) as u64;
                    let mut two = [0; 2];
                    match space.read(at + page * PAGE, &mut two) {
                        Ok(()) => {
                            assert!(two == [0, 0] || two == [page as u8, 0x55], "{two:?}");
                            let wrote = space.write(at + page * PAGE, &[page as u8, 0x55]);
                            assert!(!matches!(wrote, Err(FaultError::Segv | FaultError::Bus)));
                        }
                        Err(FaultError::HwPoison) => {
                            space.munmap(at + page * PAGE, PAGE).unwrap();
                            // Memory may be short: what this thread has goes first.
                            while space
                                .mmap(Some(at + page * PAGE), PAGE, RW, Map::Anon)
                                .is_err()
                            {
                                let (pfn, _) = live.pop().expect("memory for an area");
                                free(mm, pfn);
                            }
                        }
                        Err(FaultError::Oom(_)) => {}
                        Err(other) => panic!("{other}"),
                    }
                    if rng.one_in(64)
                        && let Some((_, page)) = space.page_at(at + page * PAGE)
                    {
                        // Moved under the failure's hands.
                        if let Ok(to) = mm.alloc_pages(GFP_HIGHUSER_MOVABLE, mm.lookup(page).1) {
                            // SAFETY: bare pages of ours; on success the old ones are.
                            free(mm, unsafe { mm.migrate_folio(page, to) }.unwrap_or(to));
                        }
                    }
                }
                live.into_iter().for_each(|(pfn, _)| free(mm, pfn));
            });
        }
        let _cpu = mm.platform().claim(2).unwrap();
        let mut rng = Rng(99);
        let mut results = BTreeMap::new();
        for _ in 0..scaled(400, 20) {
            let page = Pfn(rng.below(MACHINE as usize) as u32);
            let soft = rng.one_in(3);
            let result = if soft {
                match mm.soft_offline_page(page) {
                    Ok(()) => Recovered,
                    Err(_) => Ignored,
                }
            } else {
                mm.memory_failure(page).result
            };
            *results.entry((soft, result.name())).or_insert(0) += 1;
            if result == Recovered {
                bad[page.0 as usize].store(true, Ordering::SeqCst);
            }
            // Most pages are in use, and go out of it as they are freed: if only this thread ran, the table would be full, and stay so.
            let seen = turns.load(Ordering::Relaxed);
            while turns.load(Ordering::Relaxed) < seen + 40 && !stop.load(Ordering::Relaxed) {
                std::thread::yield_now();
            }
        }
        stop.store(true, Ordering::Relaxed);
        println!("{results:?}");
        assert!(results[&(false, "recovered")] > 100, "{results:?}");
    });
    mm.shrink();
    let all: Vec<Pfn> = (0..MACHINE)
        .map(Pfn)
        .filter(|&pfn| matches!(mm.lookup(pfn).2, Memory::HwPoison))
        .collect();
    for pfn in 0..MACHINE {
        if bad[pfn as usize].load(Ordering::Relaxed) {
            assert_bad(&mm, Pfn(pfn));
        }
    }
    // Nobody has anything any more but slabs that are kept: what is noted still is in one of those.
    let noted = mm.num_poisoned_pages() - all.len() as u64;
    assert!(noted <= 32, "{noted}");
    assert_eq!(
        ledger(&mm).by_type[PageType::Poisoned as usize],
        all.len() as u64
    );
    use_all(&mm, &all, 2);
}
