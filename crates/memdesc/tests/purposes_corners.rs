//! Corners of pages that are counted and no folios: wrong numbers, wrong addresses, wrong owners, and what one does at the wrong moment.
#![allow(missing_docs)]

mod common;

use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

use common::{Machine, free, ledger, range};
use memdesc::filemap::{FileError, Mapping, MappingOps};
use memdesc::gfp::*;
use memdesc::mmap::*;
use memdesc::*;
use memdesc_host::Host;

const RW: VmFlags = VmFlags::READ_WRITE;
const PAGES: u32 = 4096;

fn boot() -> Mm<Host> {
    Machine::flat(PAGES).boot()
}

type Told = Arc<Mutex<Vec<(Corruption, Pfn)>>>;

/// With a device behind its memory, and ears for reports.
fn told() -> (Mm<Host>, Told) {
    let told = Told::default();
    let hear = told.clone();
    let machine = Machine::flat(PAGES);
    let host = machine
        .host()
        .device(range(2 * PAGES, 2 * PAGES + 512, 0))
        .on_corruption(move |report| hear.lock().unwrap().push((report.what, report.pfn)));
    (machine.boot_on(host.build().unwrap()), told)
}

struct Disk;

impl MappingOps for Disk {
    fn read_folio(&self, _index: u64, pages: &mut [u8]) -> Result<(), FileError> {
        pages.fill(7);
        Ok(())
    }
    fn writepage(&self, _index: u64, _pages: &[u8]) -> Result<(), FileError> {
        Ok(())
    }
}

static FREED: AtomicU32 = AtomicU32::new(0);

struct First(u64);

impl OwnType for First {
    const NUMBER: u8 = 0;
    const NAME: &'static str = "first";
    fn freed(&self) {
        assert_eq!(self.0, 1234, "another's descriptor");
        FREED.fetch_add(1, Relaxed);
    }
}

/// Pages under a descriptor that the kernel brought itself are of no registered type, not of that with number 0.
#[test]
fn a_brought_descriptor_is_of_no_registered_type() {
    let mm = boot();
    let firsts = mm.register_type::<First>().unwrap();
    let cache = mm
        .kmem_cache_create("brought", 8, 8, CacheFlags::default(), None)
        .unwrap();
    let desc = mm.kmem_cache_alloc(&cache, GFP_KERNEL).unwrap();
    // SAFETY: an object of a cache of this machine, 8 bytes.
    let pfn = unsafe { mm.alloc_pages_desc(GFP_KERNEL, 0, desc) }.unwrap();
    // SAFETY: ours.
    assert!(unsafe { firsts.of(pfn) }.is_none());
    assert_eq!(mm.type_name(pfn), "yours");
    let space = MmStruct::new(&mm, 1).unwrap();
    let at = space.mmap(None, 4096, RW, Map::Anon).unwrap();
    // SAFETY: it stays until the space is gone. Nobody has said that users may not.
    unsafe { space.insert_pfn(at, pfn) }.unwrap();
    drop(space);
    free(&mm, pfn);
    assert_eq!(FREED.load(Relaxed), 0);
    // The type itself is as it was.
    let Ok(first) = firsts.alloc(GFP_KERNEL, 1, First(1234)) else {
        unreachable!()
    };
    assert_eq!(mm.type_name(first.add(1)), "first");
    // SAFETY: ours.
    assert_eq!(unsafe { firsts.of(first) }.map(|f| f.0), Some(1234));
    free(&mm, first);
    assert_eq!(FREED.load(Relaxed), 1);
}

struct Last;

impl OwnType for Last {
    const NUMBER: u8 = MAX_OWN_TYPES as u8 - 1;
    const NAME: &'static str = "last";
    const MAPPABLE: bool = true;
}

#[test]
fn the_highest_number_is_a_type_too() {
    let mm = boot();
    let lasts = mm.register_type::<Last>().unwrap();
    let firsts = mm.register_type::<First>().unwrap();
    let Ok(pfn) = lasts.alloc(GFP_KERNEL, 2, Last) else {
        unreachable!()
    };
    assert_eq!(mm.type_name(pfn.add(3)), "last");
    assert!(lasts.get(pfn.add(3)).is_some() && firsts.get(pfn).is_none());
    // SAFETY: ours.
    assert!(unsafe { firsts.of(pfn) }.is_none());
    free(&mm, pfn);
    lasts.unregister().unwrap();
    firsts.unregister().unwrap();
}

/// A device that gives an address which has no room in a descriptor.
struct Far {
    addr: u64,
    mapped: AtomicU32,
}

impl PagePoolOps for Far {
    fn dma_map(&self, _: Pfn, _: usize) -> Option<u64> {
        self.mapped.fetch_add(1, Relaxed);
        Some(self.addr)
    }
    fn dma_unmap(&self, _: Pfn, _: usize, addr: u64) {
        assert_eq!(addr, self.addr, "as it was mapped");
        self.mapped.fetch_sub(1, Relaxed);
    }
}

/// An address that the descriptor has no room for would be taken for another pool's number.
#[test]
fn a_pool_refuses_addresses_that_it_cannot_keep() {
    let mm = boot();
    for addr in [1u64 << 48, 5 << 48 | 0x1000, 0x1001, !0xfff] {
        let far: &'static Far = Box::leak(Box::new(Far {
            addr,
            mapped: AtomicU32::new(0),
        }));
        let params = PagePoolParams {
            pool_size: 8,
            ops: Some(far),
            ..Default::default()
        };
        let mut pool = mm.page_pool_create(params).unwrap();
        assert_eq!(pool.alloc(GFP_KERNEL), Err(AllocError::NoZone));
        assert_eq!(far.mapped.load(Relaxed), 0, "unmapped again");
        assert_eq!((pool.inflight(), pool.idle()), (0, 0));
    }
    mm.shrink();
    assert_eq!(mm.pages_of(PageType::NetPool), 0);
    ledger(&mm);
}

/// Of a page that is not the pool's there is no address: its descriptor is none of a folio.
#[test]
fn a_pool_knows_its_pages() {
    let mm = boot();
    let mut one = mm.page_pool_create(PagePoolParams::default()).unwrap();
    let two = mm.page_pool_create(PagePoolParams::default()).unwrap();
    let page = one.alloc(GFP_KERNEL).unwrap();
    assert_eq!(one.dma_addr(page), Some(page.phys().0));
    assert_eq!(two.dma_addr(page), None);
    let bare = mm.alloc_pages(GFP_KERNEL, 0).unwrap();
    for other in [bare, Pfn(PAGES - 1), Pfn(1 << 30), Pfn::NONE] {
        assert_eq!(one.dma_addr(other), None, "{other:?}");
    }
    free(&mm, bare);
    // SAFETY: ours.
    unsafe { mm.page_pool_put_page(page) };
    for size in [usize::MAX, usize::MAX - 63, 4097] {
        assert_eq!(one.alloc_frag(size, GFP_KERNEL), Err(AllocError::BadSize));
    }
}

/// A page that failed does not go round any more: it leaves the pool when it comes back, whoever brings it.
#[test]
fn a_bad_page_leaves_its_pool() {
    let mm = boot();
    let params = PagePoolParams {
        pool_size: 8,
        order: 1,
        ..Default::default()
    };
    let mut pool = mm.page_pool_create(params).unwrap();
    for direct in [false, true] {
        let page = pool.alloc(GFP_KERNEL).unwrap();
        assert_eq!(mm.memory_failure(page.add(1)).result, MfResult::Delayed);
        // SAFETY: ours.
        unsafe {
            if direct {
                pool.recycle_direct(page);
            } else {
                mm.page_pool_put_page(page);
            }
        }
        mm.drain_all();
        assert!(matches!(mm.lookup(page.add(1)).2, Memory::HwPoison));
        assert_eq!(pool.inflight(), 0);
    }
    assert_eq!(mm.num_poisoned_pages(), 2);
    drop(pool);
    ledger(&mm);
}

/// What is put that nobody has, or that is of no device, is reported, and nothing changes.
#[test]
fn a_device_page_is_put_once() {
    let (mm, told) = told();
    let start = Pfn(2 * PAGES);
    let mut device = mm.memremap_pages(start, 512).unwrap();
    device.folio(start, 0, GFP_KERNEL).unwrap();
    let bare = mm.alloc_pages(GFP_KERNEL, 0).unwrap();
    let space = MmStruct::new(&mm, 1).unwrap();
    let at = space.mmap(None, 4096, RW, Map::Anon).unwrap();
    space.insert_page(at, start).unwrap();
    // SAFETY: the device's reference, the first time.
    unsafe {
        device.put(start);
        device.put(start);
        device.put(bare);
        device.put(start.add(512));
    }
    assert_eq!(
        *told.lock().unwrap(),
        [
            (Corruption::DoubleFree, start),
            (Corruption::WrongType, bare),
            (Corruption::NotRam, start.add(512))
        ]
    );
    assert_eq!((device.in_use(), mm.page_mapcount(start)), (1, 1));
    space.write(at, &[1]).unwrap();
    drop(space);
    free(&mm, bare);
    assert_eq!(device.in_use(), 0);
    device.unplug().unwrap();
}

/// The same of a driver's page that a user still has.
#[test]
fn a_mapped_page_is_freed_once() {
    let (mm, told) = told();
    let page = mm.alloc_folio(GFP_KERNEL, 0, FolioKind::Driver).unwrap();
    let space = MmStruct::new(&mm, 1).unwrap();
    let at = space.mmap(None, 4096, RW, Map::Anon).unwrap();
    space.insert_page(at, page).unwrap();
    free(&mm, page);
    free(&mm, page);
    assert_eq!(*told.lock().unwrap(), [(Corruption::DoubleFree, page)]);
    assert_eq!(mm.page_mapcount(page), 1);
    drop(space);
    assert_eq!(mm.pages_of(PageType::Driver), 0);
}

/// A driver's pages in a shared area of a file are the child's too, and not covered by the file's after the fork.
#[test]
fn a_fork_shares_what_a_driver_put_into_a_shared_file() {
    let mm = boot();
    let file = Mapping::new(&mm, &Disk, 16).unwrap();
    let space = MmStruct::new(&mm, 1).unwrap();
    let shared = RW.with(VmFlags::SHARED);
    let at = space
        .mmap(None, 16 * 4096, shared, Map::File(&file, 0))
        .unwrap();
    let driver = mm
        .alloc_folio(GFP_KERNEL | __GFP_ZERO, 1, FolioKind::Driver)
        .unwrap();
    let area = mm.vmalloc(4096, GFP_KERNEL | __GFP_ZERO).unwrap();
    let special = mm.vmalloc_to_pfn(area.as_ptr()).unwrap();
    space.insert_page(at + 4096, driver.add(1)).unwrap();
    // SAFETY: it stays until both spaces are gone.
    unsafe { space.insert_pfn(at + 9 * 4096, special) }.unwrap();
    // Of a file's own, nothing is copied: it comes with a fault.
    space.write(at, &[3]).unwrap();
    space.write(at + 4096, &[5]).unwrap();
    // Also if the area was cut since.
    space
        .mprotect(at + 8 * 4096, 8 * 4096, VmFlags::READ)
        .unwrap();
    let child = space.fork(2).unwrap();
    assert_eq!(child.rss().file, 1);
    let grandchild = child.fork(3).unwrap();
    for space in [&space, &child, &grandchild] {
        let read = |nth: u64| {
            let mut b = [0];
            space.read(at + nth * 4096, &mut b).unwrap();
            b[0]
        };
        assert_eq!([read(0), read(1), read(2)], [3, 5, 7]);
        let mut there = None;
        space.for_each_entry(|addr, _, entry| {
            if addr == at + 9 * 4096 {
                there = Some(entry.pfn());
            }
        });
        assert_eq!(there, Some(special));
    }
    let mut seen = vec![0; PAGES as usize];
    MmStruct::check_all(&[&space, &child, &grandchild], &mut seen).unwrap();
    drop((space, child, grandchild));
    assert_eq!(mm.folio_get(driver).map(|f| f.refcount()), Some(2));
    free(&mm, driver);
    // SAFETY: ours, and in no tables any more.
    unsafe { mm.vfree(area) };
}

/// Pages that the array has no cell for are a mismatch, not a panic.
#[test]
fn a_check_without_room_says_so() {
    let (mm, _) = told();
    let start = Pfn(2 * PAGES);
    let mut device = mm.memremap_pages(start, 512).unwrap();
    device.folio(start, 0, GFP_KERNEL).unwrap();
    let space = MmStruct::new(&mm, 1).unwrap();
    let at = space.mmap(None, 8192, RW, Map::Anon).unwrap();
    space.insert_page(at, start).unwrap();
    // As the documentation says: a cell for every page of the machine.
    let mut seen = vec![0; PAGES as usize];
    let report = MmStruct::check_all(&[&space], &mut seen).unwrap();
    assert_eq!(report.pages, 1);
    space.write(at + 4096, &[1]).unwrap();
    let page = space.page_at(at + 4096).unwrap().1;
    assert_eq!(
        MmStruct::check_all(&[&space], &mut []),
        Err(MapError::Folio(page, 0, 1))
    );
    drop(space);
    // SAFETY: the device's.
    unsafe { device.put(start) };
}

/// A lock says nothing of another machine's folio, whose private data would be looked for here.
#[test]
#[should_panic = "another memory manager's"]
fn private_data_stays_in_its_machine() {
    let (mm, other) = (boot(), boot());
    let file = Mapping::new(&other, &Disk, 16).unwrap();
    let folio = file.get(0).unwrap();
    let locked = other.folio_lock(&folio);
    let _ = mm.folio_attach_private(&locked, 1, GFP_KERNEL);
}

/// Nobody is charged for pages of the kernel's own types: who asks for it is told, and nothing is left behind.
#[test]
fn own_pages_are_not_charged() {
    let mm = boot();
    let group = mm.memcg_create(None, "group", u64::MAX).unwrap();
    let firsts = mm.register_type::<First>().unwrap();
    let _scope = Host::memcg_scope(group.id());
    let Err((why, value)) = firsts.alloc(GFP_KERNEL_ACCOUNT, 0, First(9)) else {
        unreachable!()
    };
    assert_eq!((why, value.0, group.usage()), (AllocError::NoOwners, 9, 0));
    firsts.unregister().unwrap();
    mm.memcg_check().unwrap();
}

/// The table of what fails says of device memory that it is ignored, and by that name.
#[test]
fn a_bad_page_of_a_device_is_its_own_affair() {
    let (mm, _) = told();
    let start = Pfn(2 * PAGES);
    assert_eq!(mm.memory_failure(start).page, FailedPage::NotRam);
    let mut device = mm.memremap_pages(start, 512).unwrap();
    device.folio(start, 2, GFP_KERNEL).unwrap();
    for page in [start.add(3), start.add(9)] {
        let failure = mm.memory_failure(page);
        assert_eq!(
            (failure.page, failure.result),
            (FailedPage::Other("device"), MfResult::Ignored)
        );
    }
    // SAFETY: the device's.
    unsafe { device.put(start) };
}
