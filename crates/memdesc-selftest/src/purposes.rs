//! Pages for other purposes than files and processes: drivers' own, a network device's, the kernel's own types.

use alloc::vec;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU32, Ordering::Relaxed};

use memdesc::gfp::*;
use memdesc::mmap::*;
use memdesc::*;
use spin::Mutex;

use crate::{Lab, Rng, all_pages, free, ledger, scaled, teardown};

const RW: VmFlags = VmFlags::READ_WRITE;
const PAGES: u32 = 4096;

/// Every count agrees with the tables of these address spaces.
pub fn check<P: Platform>(spaces: &[&MmStruct<'_, P>]) -> MapReport {
    let end = spaces
        .first()
        .and_then(|space| all_pages(space.mm()).last());
    // Behind it may be a device of a few MiB.
    let mut seen = vec![0; end.map_or(0, |last| last.0 as usize) + 3 * PAGES as usize];
    MmStruct::check_all(spaces, &mut seen).unwrap()
}

/// The byte at an address.
pub fn byte<P: Platform>(space: &MmStruct<'_, P>, at: u64) -> u8 {
    let mut b = [0];
    space.read(at, &mut b).unwrap();
    b[0]
}

/// Counted pages that are no folio: mapped, written by a user, shared with a child, pinned; who has them last lets them go.
#[track_caller]
pub fn users_share<P: Platform>(mm: &Mm<P>, head: Pfn, order: usize, alive: &dyn Fn() -> bool) {
    let space = MmStruct::new(mm, 1).unwrap();
    let bytes = 4096u64 << order;
    let at = space.mmap(None, bytes, RW, Map::Anon).unwrap();
    for nth in 0..1 << order {
        space
            .insert_page(at + u64::from(nth) * 4096, head.add(nth))
            .unwrap();
    }
    assert_eq!(space.insert_page(at, head), Err(InsertError::Busy));
    space.write(at + bytes - 1, &[77]).unwrap();
    let last = head.add((1 << order) - 1);
    // SAFETY: mapped for users, and ours.
    let there = unsafe { *mm.page_address(last).add(4095) };
    assert_eq!(there, 77, "no copy was made");
    let child = space.fork(2).unwrap();
    child.write(at, &[5]).unwrap();
    assert_eq!(byte(&space, at), 5, "shared after a fork");
    let report = check(&[&space, &child]);
    assert_eq!(report.pages, 2 << order);
    let pinned = space.pin_user_page(at, Access::Write).unwrap();
    assert_eq!(pinned.pfn(), head);
    // Rights that were taken away come back with a fault, and still no copy is made.
    space.mprotect(at, bytes, VmFlags::READ).unwrap();
    assert!(space.write(at, &[1]).is_err());
    space.mprotect(at, bytes, RW).unwrap();
    space.write(at, &[9]).unwrap();
    assert_eq!(byte(&child, at), 9);
    // Neither reclaim nor compaction finds them.
    mm.kswapd();
    mm.compact(3);
    assert_eq!(space.page_at(at).unwrap().1, head);
    // The driver lets go first.
    assert!(alive());
    drop((space, child));
    assert!(alive(), "a device writes to it");
    drop(pinned);
}

/// A device that counts what it has mapped.
#[derive(Debug, Default)]
pub struct Dma(Mutex<Vec<(Pfn, u64)>>);

impl PagePoolOps for Dma {
    fn dma_map(&self, pfn: Pfn, _order: usize) -> Option<u64> {
        let addr = 0x8000_0000_0000 + pfn.phys().0;
        self.0.lock().push((pfn, addr));
        Some(addr)
    }

    fn dma_unmap(&self, pfn: Pfn, _order: usize, addr: u64) {
        let mut mapped = self.0.lock();
        let at = mapped.iter().position(|&m| m == (pfn, addr));
        mapped.swap_remove(at.expect("mapped as it was"));
    }
}

/// A ring of packets.
#[derive(Debug)]
pub struct Ring {
    /// How many.
    pub packets: AtomicU32,
    /// Rings that went.
    pub freed: &'static AtomicU32,
}

impl OwnType for Ring {
    const NUMBER: u8 = 3;
    const NAME: &'static str = "ring";
    const MAPPABLE: bool = true;
    fn freed(&self) {
        self.freed.fetch_add(1, Relaxed);
    }
}

/// What users may not map.
#[derive(Debug)]
pub struct Firmware(pub u32);

impl OwnType for Firmware {
    const NUMBER: u8 = 4;
    const NAME: &'static str = "firmware";
}

/// The first number there is.
#[derive(Debug)]
pub struct Zeroth;

impl OwnType for Zeroth {
    const NUMBER: u8 = 0;
    const NAME: &'static str = "zeroth";
    fn freed(&self) {
        unreachable!("none was made");
    }
}

/// Driver pages.
pub fn driver_pages<L: Lab>(lab: &L) {
    let mm = lab.flat(PAGES).boot();
    for order in [0, 2, 4] {
        let before = mm.pages_of(PageType::Driver);
        let head = mm
            .alloc_folio(GFP_KERNEL | __GFP_ZERO, order, FolioKind::Driver)
            .unwrap();
        let Memory::Driver(_) = mm.lookup(head.add((1 << order) - 1)).2 else {
            unreachable!()
        };
        let keeps = || mm.pages_of(PageType::Driver) == before + (1 << order);
        let users = |free_first: bool| {
            if free_first {
                free(&mm, head);
            }
        };
        users_share(&mm, head, order, &|| keeps());
        assert!(keeps(), "the driver has it");
        assert_eq!(mm.folio_get(head).unwrap().refcount(), 2);
        users(true);
        assert_eq!(mm.pages_of(PageType::Driver), before);
    }
    mm.shrink();
    assert_eq!(ledger(&mm).by_type[PageType::Driver as usize], 0);
}

/// The user of a drivers page keeps it.
pub fn the_user_of_a_drivers_page_keeps_it<L: Lab>(lab: &L) {
    let mm = lab.flat(PAGES).boot();
    let head = mm.alloc_folio(GFP_KERNEL, 1, FolioKind::Driver).unwrap();
    let space = MmStruct::new(&mm, 1).unwrap();
    let at = space.mmap(None, 8192, RW, Map::Anon).unwrap();
    space.insert_page(at, head.add(1)).unwrap();
    free(&mm, head);
    assert_eq!(mm.pages_of(PageType::Driver), 2);
    space.write(at, &[1]).unwrap();
    space.munmap(at, 8192).unwrap();
    assert_eq!(mm.pages_of(PageType::Driver), 0);
    drop(space);
    let page = mm.alloc_folio(GFP_KERNEL, 1, FolioKind::Driver).unwrap();
    let folio = mm.folio_get(page).unwrap();
    assert_eq!(mm.split_folio(&folio, 0), Err(AllocError::Busy));
    drop(folio);
    free(&mm, page);
}

/// A pool recycles.
pub fn a_pool_recycles<L: Lab>(lab: &L) {
    // It goes with the test, empty again.
    static DMA: Dma = Dma(Mutex::new(Vec::new()));
    let dma = &DMA;
    let mm = lab.flat(PAGES).boot();
    {
        let params = PagePoolParams {
            pool_size: 64,
            ops: Some(dma),
            ..Default::default()
        };
        let mut pool = mm.page_pool_create(params).unwrap();
        let first = pool.alloc(GFP_ATOMIC).unwrap();
        assert_eq!((pool.inflight(), pool.idle()), (1, 63));
        assert_eq!(
            pool.dma_addr(first),
            Some(0x8000_0000_0000 + first.phys().0)
        );
        assert_eq!(dma.0.lock().len(), 64);
        // Round and round: no page comes from or goes to the page allocator.
        let pages = mm.event(Event::PgAlloc);
        for round in 0..scaled(10_000, 200) {
            let mut burst = Vec::new();
            for _ in 0..48 {
                burst.push(pool.alloc(GFP_ATOMIC).unwrap());
            }
            for page in burst {
                // SAFETY: ours.
                unsafe {
                    if round % 3 == 0 {
                        pool.recycle_direct(page);
                    } else {
                        mm.page_pool_put_page(page);
                    }
                }
            }
        }
        assert_eq!(mm.event(Event::PgAlloc), pages);
        let stats = pool.stats();
        assert_eq!(
            (stats.pages_in, stats.pages_out, stats.recycle_full),
            (64, 0, 0)
        );
        assert!(
            stats.recycle_cached > 0 && stats.recycle_ring > 0 && stats.alloc_refill > 0,
            "{stats:?}"
        );
        // More than the bound: the rest goes back.
        let burst: Vec<_> = (0..100).map(|_| pool.alloc(GFP_ATOMIC).unwrap()).collect();
        for page in burst {
            // SAFETY: ours.
            unsafe { mm.page_pool_put_page(page) };
        }
        assert_eq!((pool.idle(), pool.inflight()), (64, 1));
        assert!(pool.stats().recycle_full > 0);
        assert_eq!(dma.0.lock().len() as u64, mm.pages_of(PageType::NetPool));
        // SAFETY: ours.
        unsafe { mm.page_pool_put_page(first) };
        // Memory is short: what lies on stacks goes back.
        mm.shrink();
    }
    assert_eq!(mm.pages_of(PageType::NetPool), 0);
    assert!(core::mem::take(&mut *dma.0.lock()).is_empty());
    teardown(&lab.flat(PAGES), &mm);
}

/// A pool ends before its pages do.
pub fn a_pool_ends_before_its_pages_do<L: Lab>(lab: &L) {
    let mm = lab.flat(PAGES).boot();
    let mut pool = mm
        .page_pool_create(PagePoolParams {
            order: 1,
            pool_size: 8,
            ..Default::default()
        })
        .unwrap();
    let one = pool.alloc(GFP_KERNEL).unwrap();
    let two = pool.alloc(GFP_KERNEL).unwrap();
    drop(pool);
    assert_eq!(mm.pages_of(PageType::NetPool), 4);
    // SAFETY: ours.
    unsafe { mm.page_pool_put_page(one) };
    users_share(&mm, two, 1, &|| mm.pages_of(PageType::NetPool) == 2);
    // SAFETY: ours.
    unsafe { mm.page_pool_put_page(two.add(1)) };
    // Spaces end with a page of pointers that waits for a grace period.
    mm.shrink();
    teardown(&lab.flat(PAGES), &mm);
    // As many pools as there can be, and one more.
    let mut pools: Vec<_> = (0..MAX_PAGE_POOLS)
        .map(|_| mm.page_pool_create(PagePoolParams::default()).unwrap())
        .collect();
    assert_eq!(
        mm.page_pool_create(PagePoolParams::default()).unwrap_err(),
        AllocError::Busy
    );
    pools.pop();
    assert!(mm.page_pool_create(PagePoolParams::default()).is_ok());
    drop(pools);
    teardown(&lab.flat(PAGES), &mm);
}

/// Fragments share a page.
pub fn fragments_share_a_page<L: Lab>(lab: &L) {
    let mm = lab.flat(PAGES).boot();
    let mut pool = mm
        .page_pool_create(PagePoolParams {
            pool_size: 8,
            ..Default::default()
        })
        .unwrap();
    assert_eq!(pool.alloc_frag(4097, GFP_ATOMIC), Err(AllocError::BadSize));
    let mut frags = Vec::new();
    for _ in 0..5 {
        frags.push(pool.alloc_frag(1000, GFP_ATOMIC).unwrap());
    }
    let offsets: Vec<_> = frags.iter().map(|f| f.1).collect();
    assert_eq!(offsets, [0, 1024, 2048, 3072, 0]);
    assert!(frags[..4].iter().all(|f| f.0 == frags[0].0) && frags[4].0 != frags[0].0);
    for (nth, frag) in frags[..4].iter().enumerate() {
        assert_eq!(
            mm.folio_get(frag.0).map(|f| f.refcount()),
            Some(5 - nth as u32)
        );
        // SAFETY: ours.
        unsafe { mm.page_pool_put_page(frag.0) };
    }
    assert!(mm.folio_get(frags[0].0).is_none(), "idle in the pool");
    assert_eq!(pool.inflight(), 1);
    // SAFETY: ours.
    unsafe { mm.page_pool_put_page(frags[4].0) };
    drop(pool);
    teardown(&lab.flat(PAGES), &mm);
}

/// The kernels own types.
pub fn the_kernels_own_types<L: Lab>(lab: &L) {
    static FREED: AtomicU32 = AtomicU32::new(0);
    FREED.store(0, Relaxed);
    let mm = lab.flat(PAGES).boot();
    let rings = mm.register_type::<Ring>().unwrap();
    assert_eq!(mm.register_type::<Ring>().unwrap_err(), AllocError::Busy);
    let blobs = mm.register_type::<Firmware>().unwrap();
    let zeroth = mm.register_type::<Zeroth>().unwrap();
    let ring = |n| Ring {
        packets: AtomicU32::new(n),
        freed: &FREED,
    };
    let Ok(first) = rings.alloc(GFP_KERNEL | __GFP_ZERO, 2, ring(7)) else {
        unreachable!()
    };
    let Ok(blob) = blobs.alloc(GFP_KERNEL, 4, Firmware(9)) else {
        unreachable!()
    };
    assert_eq!(rings.get(first.add(3)).unwrap().packets.load(Relaxed), 7);
    assert!(rings.get(blob).is_none() && blobs.get(blob).is_none() && blobs.get(first).is_none());
    // SAFETY: ours.
    assert_eq!(unsafe { blobs.of(blob.add(15)) }.map(|f| f.0), Some(9));
    // SAFETY: the same.
    assert!(unsafe { blobs.of(first) }.is_none());
    // A descriptor that is of no registered type is not taken for one.
    let raw = mm.kmalloc(64, GFP_KERNEL).unwrap();
    // SAFETY: an object of 64 bytes, given up to the pages.
    let pages = unsafe { mm.alloc_pages_desc(GFP_KERNEL, 0, raw) }.unwrap();
    // SAFETY: ours.
    assert!(unsafe { zeroth.of(pages) }.is_none());
    assert_eq!(mm.type_name(pages), "yours");
    free(&mm, pages);
    let space = MmStruct::new(&mm, 1).unwrap();
    let at = space.mmap(None, 4096, RW, Map::Anon).unwrap();
    let why = space.insert_page(at, blob).unwrap_err();
    assert_eq!(why, InsertError::Refused(blob, "firmware"));
    // SAFETY: refused.
    assert_eq!(unsafe { space.insert_pfn(at, blob) }, Err(why));
    // SAFETY: refused: it is counted.
    assert!(unsafe { space.insert_pfn(at, first) }.is_err());
    drop(space);
    users_share(&mm, first, 2, &|| FREED.load(Relaxed) == 0);
    let held = rings.get(first).unwrap();
    free(&mm, first);
    assert_eq!((FREED.load(Relaxed), held.packets.load(Relaxed)), (0, 7));
    drop(held);
    assert_eq!(FREED.load(Relaxed), 1);
    assert!(rings.get(first).is_none());
    // Many, in a random order; descriptors are used again and again.
    let mut rng = Rng(5);
    let mut live = Vec::new();
    for n in 0..scaled(20_000, 300) as u32 {
        if live.len() < 200 && !rng.one_in(3) {
            let Ok(pfn) = rings.alloc(GFP_KERNEL, rng.below(3), ring(n)) else {
                continue;
            };
            live.push((pfn, n));
        } else if !live.is_empty() {
            let (pfn, n) = live.swap_remove(rng.below(live.len()));
            assert_eq!(rings.get(pfn).unwrap().packets.load(Relaxed), n);
            free(&mm, pfn);
        }
    }
    live.into_iter().for_each(|(pfn, _)| free(&mm, pfn));
    let (blobs, left) = blobs.unregister().unwrap_err();
    assert_eq!(left, 1);
    assert!(mm.register_type::<Firmware>().is_err(), "it stayed");
    free(&mm, blob);
    blobs.unregister().unwrap();
    rings.unregister().unwrap();
    assert!(mm.register_type::<Ring>().is_ok());
    assert_eq!(mm.pages_of(PageType::Yours), 0);
    assert!(ledger(&mm).balanced);
}

/// Idle pages of a pool are nobody's, also where their descriptors lie in memory that was full of something else.
pub fn idle_pages_are_nobodys<L: Lab>(lab: &L) {
    let mm = lab.flat(PAGES).boot();
    let mut pages = Vec::new();
    while let Ok(page) = mm.alloc_pages(GFP_KERNEL, 0) {
        // SAFETY: ours.
        unsafe { mm.page_address(page).write_bytes(0x40, 4096) };
        pages.push(page);
    }
    pages.into_iter().for_each(|page| free(&mm, page));
    mm.shrink();
    let mut pool = mm
        .page_pool_create(PagePoolParams {
            pool_size: 256,
            ..Default::default()
        })
        .unwrap();
    let ours = pool.alloc(GFP_KERNEL).unwrap();
    let mut idle = 0;
    for page in all_pages(&mm).filter(|&page| page != ours) {
        if let Memory::NetPool(_) = mm.lookup(page).2 {
            assert!(mm.folio_get(page).is_none(), "{page:?} is nobody's");
            idle += 1;
        }
    }
    assert_eq!(idle, pool.idle());
    assert!(idle > 32);
    check(&[&MmStruct::new(&mm, 1).unwrap()]);
    // SAFETY: the driver's.
    unsafe { mm.page_pool_put_page(ours) };
}
