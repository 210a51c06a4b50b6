//! Pages of drivers, network pools, devices and of the kernel's own types: made, found, mapped, shared by a fork, pinned, given back where they belong.
#![allow(missing_docs)]

mod common;

use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use common::{Machine, free, ledger, range, scaled};
use memdesc::gfp::*;
use memdesc::mmap::*;
use memdesc::*;
use memdesc_host::Host;

const RW: VmFlags = VmFlags::READ_WRITE;
const PAGES: u32 = 4096;

fn machine() -> Machine {
    Machine::flat(PAGES)
}

/// With a device behind its memory: 2 MiB from twice as far on.
fn with_device() -> (Machine, Mm<Host>) {
    let machine = machine();
    let host = machine
        .host()
        .device(range(2 * PAGES, 2 * PAGES + 512, 0))
        .build();
    let mm = machine.boot_on(host.unwrap());
    (machine, mm)
}

fn check(spaces: &[&MmStruct<'_, Host>]) -> MapReport {
    let mut seen = vec![0; 3 * PAGES as usize];
    MmStruct::check_all(spaces, &mut seen).unwrap()
}

fn byte(space: &MmStruct<'_, Host>, at: u64) -> u8 {
    let mut b = [0];
    space.read(at, &mut b).unwrap();
    b[0]
}

/// Counted pages that are no folio: mapped, written by a user, shared with a child, pinned; who has them last lets them go.
#[track_caller]
fn users_share(mm: &Mm<Host>, head: Pfn, order: usize, alive: &dyn Fn() -> bool) {
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

#[test]
fn driver_pages() {
    let mm = machine().boot();
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

#[test]
fn the_user_of_a_drivers_page_keeps_it() {
    let mm = machine().boot();
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

/// A device that counts what it has mapped.
#[derive(Default)]
struct Dma(Mutex<Vec<(Pfn, u64)>>);

impl PagePoolOps for Dma {
    fn dma_map(&self, pfn: Pfn, _order: usize) -> Option<u64> {
        let addr = 0x8000_0000_0000 + pfn.phys().0;
        self.0.lock().unwrap().push((pfn, addr));
        Some(addr)
    }

    fn dma_unmap(&self, pfn: Pfn, _order: usize, addr: u64) {
        let mut mapped = self.0.lock().unwrap();
        let at = mapped.iter().position(|&m| m == (pfn, addr));
        mapped.swap_remove(at.expect("mapped as it was"));
    }
}

#[test]
fn a_pool_recycles() {
    let dma: &'static Dma = Box::leak(Box::default());
    let mm = machine().boot();
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
        assert_eq!(dma.0.lock().unwrap().len(), 64);
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
        assert_eq!(
            dma.0.lock().unwrap().len() as u64,
            mm.pages_of(PageType::NetPool)
        );
        // SAFETY: ours.
        unsafe { mm.page_pool_put_page(first) };
        // Memory is short: what lies on stacks goes back.
        mm.shrink();
    }
    assert_eq!(mm.pages_of(PageType::NetPool), 0);
    assert!(dma.0.lock().unwrap().is_empty());
    common::teardown(&machine(), &mm);
}

#[test]
fn a_pool_ends_before_its_pages_do() {
    let mm = machine().boot();
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
    common::teardown(&machine(), &mm);
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
    common::teardown(&machine(), &mm);
}

#[test]
fn fragments_share_a_page() {
    let mm = machine().boot();
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
    common::teardown(&machine(), &mm);
}

#[test]
fn pages_are_put_on_another_cpu_than_they_are_taken() {
    let machine = machine().cpus(2);
    let mm = machine.boot();
    let rounds = scaled(300, 3);
    for _ in 0..rounds {
        let (send, receive) = std::sync::mpsc::channel::<Pfn>();
        std::thread::scope(|s| {
            s.spawn(|| {
                let _cpu = mm.platform().claim(0).unwrap();
                let mut pool = mm
                    .page_pool_create(PagePoolParams {
                        pool_size: 32,
                        ..Default::default()
                    })
                    .unwrap();
                for _ in 0..scaled(400, 20) {
                    send.send(pool.alloc(GFP_ATOMIC).unwrap()).unwrap();
                }
                // Ends while the other still puts.
                drop(pool);
                drop(send);
            });
            s.spawn(|| {
                let _cpu = mm.platform().claim(1).unwrap();
                for page in receive {
                    // A reader without a lock, who may be the last.
                    let looked = mm.folio_get(page);
                    // SAFETY: handed over.
                    unsafe { mm.page_pool_put_page(page) };
                    drop(looked);
                }
            });
        });
        assert_eq!(mm.pages_of(PageType::NetPool), 0);
    }
    common::teardown(&machine, &mm);
}

#[test]
fn device_memory_is_described_and_mapped_and_not_owned() {
    let (machine, mm) = with_device();
    let given = ledger(&mm).given;
    let (start, pages) = (Pfn(2 * PAGES), 512);
    assert!(matches!(mm.lookup(start).2, Memory::Hole));
    assert_eq!(
        mm.memremap_pages(Pfn(PAGES - 8), 16).unwrap_err(),
        DeviceError::Overlap(Pfn(PAGES - 8))
    );
    assert_eq!(
        mm.memremap_pages(start, 0).unwrap_err(),
        DeviceError::BadRange
    );
    assert_eq!(
        mm.memremap_pages(Pfn(u32::MAX - 3), 9).unwrap_err(),
        DeviceError::BadRange
    );
    assert_eq!(
        mm.memremap_pages(start, 1 << 20).unwrap_err(),
        DeviceError::NotMapped
    );
    let mut device = mm.memremap_pages(start, pages).unwrap();
    assert!(matches!(mm.lookup(start).2, Memory::Device(None)));
    assert_eq!(
        mm.memremap_pages(start.add(5), 5).unwrap_err(),
        DeviceError::Overlap(start.add(5))
    );
    // The words are metadata, the pages are not ours.
    let after = ledger(&mm);
    assert_eq!(after.given, given);
    assert!(after.other_metadata_bytes >= 512 * 8);
    device.folio(start.add(4), 2, GFP_KERNEL).unwrap();
    for wrong in [start.add(4), start.add(6), start] {
        assert_eq!(
            device.folio(wrong, usize::from(wrong == start) * 3, GFP_KERNEL),
            Err(AllocError::Busy)
        );
    }
    assert_eq!(
        device.folio(start.add(2), 2, GFP_KERNEL),
        Err(AllocError::BadOrder)
    );
    assert_eq!(
        device.folio(Pfn(4), 0, GFP_KERNEL),
        Err(AllocError::BadOrder)
    );
    let (head, order, Memory::Device(Some(_))) = mm.lookup(start.add(7)) else {
        unreachable!()
    };
    assert_eq!((head, order, device.in_use()), (start.add(4), 2, 4));
    users_share(&mm, head, 2, &|| mm.device_pages_in_use() == 4);
    let device = device.unplug().unwrap_err();
    // SAFETY: the device's reference.
    unsafe { device.put(head) };
    assert!(matches!(mm.lookup(head).2, Memory::Device(None)));
    assert_eq!(device.in_use(), 0);
    device.unplug().unwrap();
    // It comes back to the words that it had.
    let words = ledger(&mm).other_metadata_bytes;
    assert_eq!(mm.memremap_pages(start, pages).unwrap().pages(), pages);
    assert_eq!(ledger(&mm).other_metadata_bytes, words);
    mm.shrink();
    common::merged(&machine, &mm);
}

struct Ring {
    packets: AtomicU32,
    freed: &'static AtomicU32,
}

impl OwnType for Ring {
    const NUMBER: u8 = 3;
    const NAME: &'static str = "ring";
    const MAPPABLE: bool = true;
    fn freed(&self) {
        self.freed.fetch_add(1, Relaxed);
    }
}

struct Firmware(u32);

impl OwnType for Firmware {
    const NUMBER: u8 = 4;
    const NAME: &'static str = "firmware";
}

struct Zeroth;

impl OwnType for Zeroth {
    const NUMBER: u8 = 0;
    const NAME: &'static str = "zeroth";
    fn freed(&self) {
        unreachable!("none was made");
    }
}

#[test]
fn the_kernels_own_types() {
    static FREED: AtomicU32 = AtomicU32::new(0);
    let mm = machine().boot();
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
    let mut rng = common::Rng(5);
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
#[test]
fn idle_pages_are_nobodys() {
    let mm = machine().boot();
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
    for page in (0..PAGES).map(Pfn).filter(|&page| page != ours) {
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

/// The words of tails count, of whatever users may map: `validate` knows that.
#[test]
fn counted_tails_are_valid() {
    let (_, mm) = with_device();
    let mut pool = mm
        .page_pool_create(PagePoolParams {
            order: 1,
            pool_size: 8,
            ..Default::default()
        })
        .unwrap();
    let rings = mm.register_type::<Ring>().unwrap();
    static FREED: AtomicU32 = AtomicU32::new(0);
    let ring = Ring {
        packets: AtomicU32::new(0),
        freed: &FREED,
    };
    let packet = pool.alloc(GFP_KERNEL).unwrap();
    let Ok(ring) = rings.alloc(GFP_KERNEL, 3, ring) else {
        unreachable!()
    };
    let space = MmStruct::new(&mm, 1).unwrap();
    let at = space.mmap(None, 8192, RW, Map::Anon).unwrap();
    for mapped in [false, true] {
        if mapped {
            space.insert_page(at, packet.add(1)).unwrap();
            space.insert_page(at + 4096, ring.add(5)).unwrap();
        }
        let found = mm.validate(|report| panic!("{report}"));
        assert_eq!(found.errors(), 0);
    }
    drop(space);
    free(&mm, ring);
    // SAFETY: the driver's.
    unsafe { mm.page_pool_put_page(packet) };
}

thread_local! {
    static MACHINE: std::cell::Cell<*const Mm<Host>> = const { std::cell::Cell::new(std::ptr::null()) };
    /// Points until the interrupt, and the pages that it puts.
    static STRIKE: std::cell::Cell<u32> = const { std::cell::Cell::new(u32::MAX) };
    static GIFTS: std::cell::RefCell<Vec<Pfn>> = const { std::cell::RefCell::new(Vec::new()) };
}

/// In an NMI: gives pages back to their pool, looks at one, gives that back too.
fn strike(_: &'static str) {
    let left = STRIKE.get();
    if left == u32::MAX {
        return;
    }
    STRIKE.set(left.wrapping_sub(1));
    if left != 0 {
        return;
    }
    let mm = MACHINE.get();
    let _nmi = memdesc_host::interrupt::nmi();
    for page in GIFTS.take() {
        // SAFETY: the machine outlives the test; the pages are the handler's.
        unsafe {
            let looked = (*mm).folio_get(page);
            (*mm).page_pool_put_page(page);
            drop(looked);
        }
    }
}

#[test]
fn interrupts_put_pages_at_every_point() {
    if !inject::set_hook(Some(strike)) {
        return;
    }
    let mut struck = 0;
    for nth in 0.. {
        let machine = Machine::flat(2048);
        let mm = machine.boot();
        MACHINE.set(&raw const mm);
        let params = PagePoolParams {
            pool_size: 6,
            ..Default::default()
        };
        let mut pool = mm.page_pool_create(params).unwrap();
        GIFTS.set((0..4).map(|_| pool.alloc(GFP_KERNEL).unwrap()).collect());
        STRIKE.set(nth);
        let mut pages: Vec<_> = (0..9).map(|_| pool.alloc(GFP_KERNEL).unwrap()).collect();
        // SAFETY: ours, all of them.
        unsafe {
            pool.recycle_direct(pages.pop().unwrap());
            for page in pages.drain(..6) {
                mm.page_pool_put_page(page);
            }
            let frag = pool.alloc_frag(100, GFP_KERNEL).unwrap();
            mm.page_pool_put_page(frag.0);
            drop(pool);
            pages
                .into_iter()
                .for_each(|page| mm.page_pool_put_page(page));
        }
        STRIKE.set(u32::MAX);
        let left = GIFTS.take();
        let over = !left.is_empty();
        for page in left {
            // SAFETY: nobody put them.
            unsafe { mm.page_pool_put_page(page) };
        }
        assert_eq!(mm.pages_of(PageType::NetPool), 0, "struck at {nth}");
        mm.shrink();
        common::teardown(&machine, &mm);
        MACHINE.set(std::ptr::null());
        if over {
            break;
        }
        struck += 1;
    }
    inject::set_hook(None);
    assert!(struck > 100, "{struck} points");
}

/// Through the machine's own translations: what a user stores is in the driver's page, the device's and the ring's, and the other way round.
#[test]
#[cfg(not(miri))]
fn mapped_for_real() {
    let (_, mm) = with_device();
    let mut device = mm.memremap_pages(Pfn(2 * PAGES), 512).unwrap();
    device.folio(Pfn(2 * PAGES + 4), 2, GFP_KERNEL).unwrap();
    let driver = mm
        .alloc_folio(GFP_KERNEL | __GFP_ZERO, 2, FolioKind::Driver)
        .unwrap();
    let mut pool = mm.page_pool_create(PagePoolParams::default()).unwrap();
    let pooled = pool.alloc(GFP_KERNEL | __GFP_ZERO).unwrap();
    let space = Box::new(MmStruct::with_top(&mm, 1, 1 << 30).unwrap());
    let at = space.mmap(None, 1 << 16, RW, Map::Anon).unwrap();
    let pages = [driver.add(1), Pfn(2 * PAGES + 7), pooled];
    for (page, nth) in pages.into_iter().zip(0..) {
        space.insert_page(at + nth * 4096, page).unwrap();
    }
    {
        let view = memdesc_host::UserView::new(&space).unwrap();
        for (page, nth) in pages.into_iter().zip(0u8..) {
            let user = view.ptr(at + u64::from(nth) * 4096 + 9);
            // SAFETY: mapped, as bytes, and all accesses are volatile.
            unsafe {
                user.write_volatile(100 + nth);
                let kernel = mm.page_address(page).add(9);
                assert_eq!(kernel.read_volatile(), 100 + nth);
                kernel.write_volatile(200 + nth);
                assert_eq!(user.read_volatile(), 200 + nth);
            }
        }
    }
    drop(space);
    // SAFETY: ours.
    unsafe {
        device.put(Pfn(2 * PAGES + 4));
        mm.page_pool_put_page(pooled);
    }
    free(&mm, driver);
    assert_eq!(device.in_use(), 0);
}
