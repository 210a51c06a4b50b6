//! Pages of drivers, network pools, devices and of the kernel's own types: made, found, mapped, shared by a fork, pinned, given back where they belong.
#![allow(missing_docs)]

mod common;

use std::sync::atomic::AtomicU32;

use common::{Machine, free, ledger, range, scaled};
use memdesc::gfp::*;
use memdesc::mmap::*;
use memdesc::*;
use memdesc_host::Host;
use memdesc_selftest::purposes::{Ring, users_share};

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
