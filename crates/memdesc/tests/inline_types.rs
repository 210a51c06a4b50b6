//! Memory whose word says all there is: reserved ranges, balloons, guards. What users may not map and nobody may free is refused by its name.
#![allow(missing_docs)]

mod common;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use common::{Machine, Rng, descriptors, free, ledger, scaled};
use memdesc::gfp::*;
use memdesc::mmap::*;
use memdesc::*;
use memdesc_host::Host;

const MACHINE: u32 = 16384;

fn of(mm: &Mm<Host>, kind: CensusKind) -> u64 {
    mm.census().of(kind).pages
}

fn fill(mm: &Mm<Host>, pfn: Pfn, pages: u32, byte: u8) {
    // SAFETY: pages that the test has.
    unsafe {
        mm.page_address(pfn)
            .write_bytes(byte, (pages as usize) << PAGE_SHIFT)
    };
}

#[track_caller]
fn holds(mm: &Mm<Host>, pfn: Pfn, pages: u32, byte: u8) {
    for nth in 0..pages {
        let at = mm.page_address(pfn.add(nth));
        for offset in [0, 1000, 4095] {
            // SAFETY: as above.
            let is = unsafe { at.add(offset).read_volatile() };
            assert_eq!(is, byte, "{pfn:?} page {nth}");
        }
    }
}

#[test]
fn ranges_are_reserved_for_what_they_are() {
    for machine in common::machines() {
        let mm = machine.boot();
        let end = machine.end();
        let start = (end / 3..end)
            .find(|&p| (p..p + 700).all(|p| machine.is_ram(p)))
            .unwrap();
        mm.reserve_pages(Pfn(start), 333, Reserved::KernelText)
            .unwrap();
        mm.reserve_pages(Pfn(start + 333), 300, Reserved::KernelData)
            .unwrap();
        assert_eq!(of(&mm, CensusKind::KernelText), 333);
        assert_eq!(of(&mm, CensusKind::KernelData), 300);
        assert_eq!(ledger(&mm).by_type[PageType::Reserved as usize], 633);
        // One page of it is taken: nothing changes.
        let before = mm.census();
        let why = mm
            .reserve_pages(Pfn(start + 620), 60, Reserved::Other)
            .unwrap_err();
        assert_eq!((why.pfn, why.kind), (Pfn(start + 620), PageType::Reserved));
        mm.alloc_pages_at(Pfn(start + 680), 0).unwrap();
        let why = mm
            .reserve_pages(Pfn(start + 640), 50, Reserved::Other)
            .unwrap_err();
        assert_eq!((why.pfn, why.kind), (Pfn(start + 680), PageType::Bare));
        free(&mm, Pfn(start + 680));
        let why = mm
            .reserve_pages(Pfn(end - 1), 3, Reserved::Other)
            .unwrap_err();
        assert!(why.pfn >= Pfn(end - 1), "{why}");
        assert!(mm.reserve_pages(Pfn(5), u32::MAX, Reserved::Other).is_err());
        let after = mm.census();
        assert_eq!(before.free_pages(), after.free_pages());
        assert_eq!(after.of(CensusKind::Kernel).pages, 0);
        // What is in a CPU's list is free as well.
        let page = mm.alloc_pages(GFP_KERNEL, 0).unwrap();
        free(&mm, page);
        mm.reserve_pages(page, 1, Reserved::Other).unwrap();
        assert_eq!(mm.census().of(CensusKind::Kernel).pages, 1);
        ledger(&mm);
    }
}

#[test]
fn fault_injection_leaves_a_range_as_it_was() {
    for nth in 0..200 {
        let mm = Machine::flat(MACHINE).unsampled().boot();
        mm.platform().faults().fail_nth(nth);
        let result = mm.reserve_pages(Pfn(1001), 999, Reserved::KernelText);
        let (_, failed) = mm.platform().faults().off();
        let pages = ledger(&mm).by_type[PageType::Reserved as usize];
        assert_eq!(pages, if result.is_ok() { 999 } else { 0 });
        if failed == 0 {
            return assert!(nth > 3 && result.is_ok());
        }
    }
    panic!("every attempt failed");
}

/// Each type without a descriptor, a page of it.
fn one_of_each(mm: &'static Mm<Host>) -> [(Pfn, &'static str); 7] {
    mm.reserve_pages(Pfn(1024), 4, Reserved::KernelText)
        .unwrap();
    mm.reserve_pages(Pfn(2048), 4, Reserved::KernelData)
        .unwrap();
    let balloon = Box::leak(Box::new(Balloon::new(mm)));
    assert_eq!(balloon.inflate(1, GFP_HIGHUSER), 1);
    let mut inside = Pfn::NONE;
    mm.census_visit(|step| {
        if step.kind == CensusKind::Balloon {
            inside = step.pfn;
        }
    });
    let guard = mm.alloc_guard(GFP_KERNEL, 0).unwrap();
    mm.offline_pages(Pfn(8192), 512).unwrap();
    assert_eq!(mm.memory_failure(Pfn(5000)).result, MfResult::Recovered);
    [
        (Pfn(MACHINE - 1), "memory_map"),
        (Pfn(1025), "kernel_text"),
        (Pfn(2049), "kernel_data"),
        (inside, "balloon"),
        (guard, "guard"),
        (Pfn(8200), "offline"),
        (Pfn(5000), "hwpoison"),
    ]
}

#[test]
fn users_cannot_map_them_and_nobody_can_free_them() {
    let reports = Arc::new(Mutex::new(Vec::new()));
    let heard = reports.clone();
    let machine = Machine::flat(MACHINE).unsampled();
    let host = machine.host().on_corruption(move |report| {
        heard.lock().unwrap().push(report.to_string());
    });
    let mm: &'static Mm<Host> = Box::leak(Box::new(machine.boot_on(host.build().unwrap())));
    let pages = one_of_each(mm);
    let space = MmStruct::new(mm, 1).unwrap();
    let at = space
        .mmap(None, 1 << 20, VmFlags::READ_WRITE, Map::Anon)
        .unwrap();
    let before = mm.census();
    for (page, name) in pages {
        assert_eq!(mm.lookup(page).2.name(), name);
        let refused = Err(InsertError::Refused(page, name));
        assert_eq!(space.insert_page(at, page), refused);
        // SAFETY: it is refused.
        assert_eq!(unsafe { space.insert_pfn(at, page) }, refused);
        free(mm, page);
        let report = reports.lock().unwrap().pop().expect("reported");
        assert!(report.contains(&format!("page: {name}, order")), "{report}");
        // SAFETY: refused.
        assert_eq!(unsafe { mm.guard_pages(page) }, Err(AllocError::Busy));
        assert!(mm.alloc_pages_at(page, 0).is_err());
        assert!(mm.folio_get(page).is_none());
        if name != "guard" {
            // SAFETY: no guard, so nothing happens.
            unsafe { mm.unguard_pages(page) };
        }
        if name != "hwpoison" {
            assert_eq!(mm.unpoison_memory(page), Err(AllocError::Busy));
        }
    }
    assert_eq!(format!("{before:?}"), format!("{:?}", mm.census()));
    ledger(mm);
}

#[test]
fn obstacles_at_the_end_of_all_numbers() {
    let mm = Machine::flat(MACHINE).boot();
    let mut seen = 0;
    mm.for_each_obstacle(Pfn(u32::MAX - 5), 10, |obstacle| {
        assert_eq!(obstacle.kind, PageType::None);
        seen += 1;
    });
    assert_eq!(seen, 5);
    assert!(mm.offline_pages(Pfn(u32::MAX - 5), 10).is_err());
    assert!(mm.online_pages(Pfn(u32::MAX - 5), 10).is_err());
    let text = Reserved::KernelText;
    assert!(mm.reserve_pages(Pfn(u32::MAX - 5), 10, text).is_err());
    ledger(&mm);
}

#[test]
fn guards_come_and_go() {
    let mm = Machine::flat(MACHINE).unsampled().boot();
    let mut rng = Rng(5);
    let mut guards: Vec<(Pfn, usize)> = Vec::new();
    let mut pages = 0;
    for round in 0..scaled(4000, 100) {
        if rng.one_in(2) || guards.is_empty() {
            let order = rng.below(7);
            // Also of what was a folio: the block still has that descriptor.
            let folio = mm.alloc_folio(GFP_HIGHUSER_MOVABLE, order, FolioKind::Anon);
            let Ok(folio) = folio else { continue };
            free(&mm, folio);
            let Ok(guard) = mm.alloc_guard(GFP_HIGHUSER_MOVABLE, order) else {
                continue;
            };
            for nth in 0..1 << order {
                assert!(
                    matches!(mm.lookup(guard.add(nth)), (head, _, Memory::Guard) if head == guard)
                );
            }
            guards.push((guard, order));
            pages += 1 << order;
        } else {
            let (guard, order) = guards.swap_remove(rng.below(guards.len()));
            // SAFETY: ours.
            unsafe { mm.unguard_pages(guard) };
            assert!(
                matches!(mm.lookup(guard), (head, o, Memory::Bare) if head == guard && o == order)
            );
            free(&mm, guard);
            pages -= 1 << order;
        }
        if round % 64 == 0 {
            assert_eq!(of(&mm, CensusKind::Guard), pages);
            assert_eq!(ledger(&mm).by_type[PageType::Poisoned as usize], pages);
            mm.shrink();
            descriptors(&mm, 0);
        }
    }
    // A free block, by number; unguarding allocates nothing.
    mm.guard_free_pages(Pfn(12288), 5).unwrap();
    assert_eq!(mm.guard_free_pages(Pfn(12288), 5), Err(AllocError::Busy));
    mm.platform().faults().fail_one_in(1, 1);
    // SAFETY: ours.
    unsafe { mm.unguard_pages(Pfn(12288)) };
    free(&mm, Pfn(12288));
    for (guard, _) in guards {
        // SAFETY: ours.
        unsafe { mm.unguard_pages(guard) };
        free(&mm, guard);
    }
    let (passed, _) = mm.platform().faults().off();
    assert_eq!(passed, 0, "nothing was asked for");
    assert_eq!(of(&mm, CensusKind::Guard), 0);
    mm.shrink();
    descriptors(&mm, 0);
    ledger(&mm);
}

/// Touches a guard, or the page beside it, in a process of its own.
#[cfg(not(miri))]
#[test]
fn a_stray_access_to_a_guard_faults() {
    use std::os::unix::process::ExitStatusExt;
    const WHERE: &str = "MEMDESC_TEST_STRAY";
    if let Ok(which) = std::env::var(WHERE) {
        let mm = Machine::flat(MACHINE).unsampled().guarded().boot();
        let pages = mm.alloc_pages(GFP_KERNEL, 1).unwrap();
        let guard = mm.alloc_guard(GFP_KERNEL, 1).unwrap();
        fill(&mm, pages, 2, 1);
        if which == "guard" {
            fill(&mm, guard.add(1), 1, 1);
        }
        // SAFETY: ours.
        unsafe { mm.unguard_pages(guard) };
        fill(&mm, guard, 2, 1);
        return;
    }
    for (which, signal) in [("beside", None), ("guard", Some(libc::SIGSEGV))] {
        let output = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "a_stray_access_to_a_guard_faults"])
            .env(WHERE, which)
            .output()
            .unwrap();
        assert_eq!(output.status.signal(), signal, "{which}: {output:?}");
        assert!(signal.is_some() || output.status.success(), "{output:?}");
    }
}

#[test]
fn what_is_in_a_balloon_is_the_systems() {
    let mm = Machine::flat(MACHINE).unsampled().boot();
    let kept = mm.alloc_pages(GFP_KERNEL, 9).unwrap();
    fill(&mm, kept, 512, 7);
    // A machine that was busy: everything was touched once.
    let mut all = Vec::new();
    while let Ok(pfn) = mm.alloc_pages(GFP_NOWAIT | __GFP_NOWARN, 5) {
        fill(&mm, pfn, 32, 9);
        all.push(pfn);
    }
    all.into_iter().for_each(|pfn| free(&mm, pfn));
    mm.shrink();
    let before = mm.platform().resident_bytes();
    let balloon = Balloon::new(&mm);
    assert_eq!(balloon.inflate(8000, GFP_HIGHUSER), 8000);
    let after = mm.platform().resident_bytes();
    if !cfg!(miri) {
        let gone = (before - after) / PAGE_SIZE as u64;
        assert!(
            (7990..=8000).contains(&gone),
            "{gone} of 8000 pages went back"
        );
    }
    // 15 × 512 + 320: as few blocks as can be.
    let census = mm.census();
    let inside = census.of(CensusKind::Balloon);
    assert_eq!(
        (inside.by_order[9], inside.by_order[8], inside.by_order[6]),
        (15, 1, 1)
    );
    assert_eq!((inside.pages, inside.descriptors), (8000, 0));
    assert_eq!(ledger(&mm).by_type[PageType::Offline as usize], 8000);
    holds(&mm, kept, 512, 7);
    assert_eq!(balloon.deflate(123), 123);
    assert_eq!(balloon.pages(), 7877);
    descriptors(&mm, 32);
    assert_eq!(of(&mm, CensusKind::Balloon), 7877);
    assert_eq!(balloon.deflate(u32::MAX), 7877);
    assert_eq!(balloon.deflate(1), 0);
    assert_eq!(mm.event(Event::BalloonInflate), 8000);
    assert_eq!(mm.event(Event::BalloonDeflate), 8000);
    holds(&mm, kept, 512, 7);
    drop(balloon);
    free(&mm, kept);
    mm.shrink();
    ledger(&mm);
}

#[test]
fn a_balloon_stops_at_the_watermarks() {
    let mm = Machine::flat(MACHINE).unsampled().boot();
    let balloon = Balloon::new(&mm);
    let got = balloon.inflate(u32::MAX, GFP_HIGHUSER);
    assert!(got > MACHINE / 10 * 9, "{got}");
    assert_eq!(balloon.pages(), u64::from(got));
    for zone in common::zones(&mm) {
        assert!(zone.free >= zone.watermarks[0], "{zone:?}");
    }
    // Those who may go below still find something.
    let page = mm.alloc_pages(GFP_ATOMIC, 0).unwrap();
    free(&mm, page);
    assert_eq!(balloon.inflate(10_000, GFP_HIGHUSER), 0);
    ledger(&mm);
}

/// All memory is in the balloon; who needs it gets it, after the shrinkers were asked and before he fails.
#[test]
fn a_balloon_deflates_when_memory_is_out() {
    for on_oom in [false, true] {
        let mm: &'static Mm<Host> = Box::leak(Box::new(Machine::flat(MACHINE).unsampled().boot()));
        let balloon = Balloon::new(mm);
        let balloon = if on_oom {
            balloon.deflate_on_oom()
        } else {
            balloon
        };
        let balloon: &'static Balloon<'static, Host> = Box::leak(Box::new(balloon));
        assert!(mm.register_shrinker(balloon));
        let got = balloon.inflate(u32::MAX, GFP_HIGHUSER);
        assert_eq!(
            balloon.inflate(1000, GFP_HIGHUSER),
            0,
            "it does not eat itself"
        );
        // Nothing is left at all, not even for a slab of descriptors.
        let mut live = Vec::new();
        while let Ok(pfn) = mm.alloc_pages(GFP_NOWAIT | __GFP_MEMALLOC | __GFP_NOWARN, 0) {
            live.push((pfn, 0));
        }
        mm.drain_all();
        let before = live.len();
        assert_eq!(balloon.pages(), u64::from(got));
        // A caller that gives up at once does not make it.
        assert!(
            mm.alloc_pages(GFP_KERNEL | __GFP_NORETRY | __GFP_NOWARN, 0)
                .is_err()
        );
        let mut rng = Rng(3);
        loop {
            let order = [0, 0, 0, 2, 9][rng.below(5)];
            match mm.alloc_pages(GFP_KERNEL | __GFP_NOWARN, order) {
                Ok(pfn) => live.push((pfn, order)),
                Err(_) if order > 0 => {}
                Err(_) => break,
            }
        }
        let after: u32 = live[before..].iter().map(|&(_, order)| 1 << order).sum();
        if on_oom {
            assert_eq!(balloon.pages(), 0);
            assert!(after > got - got / 20, "{after} of {got}");
        } else {
            assert_eq!((balloon.pages(), after), (u64::from(got), 0));
        }
        ledger(mm);
        live.into_iter().for_each(|(pfn, _)| free(mm, pfn));
        assert!(mm.unregister_shrinker(balloon));
        assert_eq!(balloon.deflate(u32::MAX), if on_oom { 0 } else { got });
        ledger(mm);
    }
}

/// Without a descriptor to be had the reserve serves; and a balloon that could not fill it takes nothing.
#[test]
fn a_balloon_deflates_without_descriptors() {
    let mm = Machine::flat(MACHINE).unsampled().boot();
    let balloon = Balloon::new(&mm);
    mm.platform().faults().fail_one_in(1, 1);
    assert_eq!(balloon.inflate(1000, GFP_HIGHUSER), 0);
    mm.platform().faults().off();
    assert_eq!(
        balloon.inflate(100 * 512, GFP_HIGHUSER) % 512,
        balloon.pages() as u32 % 512
    );
    balloon.deflate(balloon.pages() as u32 % 512);
    let blocks = balloon.pages() / 512;
    assert!(blocks > 20);
    mm.platform().faults().fail_one_in(1, 1);
    let back = balloon.deflate(u32::MAX);
    mm.platform().faults().off();
    assert!(back >= 20 * 512, "{back}");
    ledger(&mm);
    // Single pages, more than the reserve has: 32 of them, and the rest stays where it is.
    let balloon = Balloon::new(&mm);
    let mut small = Vec::new();
    for _ in 0..100 {
        assert_eq!(balloon.inflate(1, GFP_HIGHUSER), 1);
        small.push(mm.alloc_pages(GFP_KERNEL, 0).unwrap());
    }
    mm.platform().faults().fail_one_in(1, 1);
    assert_eq!(balloon.deflate(100), 32);
    assert_eq!(balloon.deflate(100), 0);
    mm.platform().faults().off();
    assert_eq!(balloon.pages(), 68);
    assert_eq!(balloon.deflate(100), 68);
    small.into_iter().for_each(|pfn| free(&mm, pfn));
    ledger(&mm);
}

/// The platform hears of blocks while they are nobody's: before they can be taken out again, and before they are free.
#[test]
fn the_platform_hears_of_blocks_that_are_nobodys() {
    let machine = Machine::flat(MACHINE).unsampled();
    let later = common::Later::<common::Hooked>::default();
    let mut hooked = common::Hooked::new(machine.host().build().unwrap());
    let inside = Arc::new(Mutex::new(std::collections::BTreeSet::new()));
    let (mm_of, model) = (later.clone(), inside.clone());
    hooked.on_balloon = Some(Box::new(move |blocks, op| {
        assert!(!blocks.is_empty() && blocks.len() <= 32);
        for &(pfn, order) in blocks {
            let (head, is, memory) = mm_of.get().expect("set").lookup(pfn);
            assert_eq!((head, is), (pfn, order));
            for page in (0..1 << order).map(|nth| pfn.add(nth)) {
                let changed = match op {
                    BalloonOp::Inflate => model.lock().unwrap().insert(page),
                    BalloonOp::Deflate => model.lock().unwrap().remove(&page),
                };
                assert!(changed, "{page:?} twice");
            }
            match op {
                BalloonOp::Inflate => assert!(matches!(memory, Memory::Bare), "{memory:?}"),
                BalloonOp::Deflate => assert!(matches!(memory, Memory::Balloon), "{memory:?}"),
            }
        }
    }));
    let mm = machine.boot_on(hooked);
    later.set(&mm);
    let balloon = Balloon::new(&mm);
    let mut rng = Rng(4);
    let mut held = 0;
    for _ in 0..scaled(500, 20) {
        let n = rng.below(3000) as u32;
        if rng.one_in(2) {
            held += balloon.inflate(n, GFP_HIGHUSER);
        } else {
            assert_eq!(balloon.deflate(n), n.min(held));
            held -= n.min(held);
        }
        assert_eq!(inside.lock().unwrap().len() as u32, held);
    }
    descriptors(&mm, 32);
    drop(balloon);
    assert!(inside.lock().unwrap().is_empty());
    ledger(&mm);
}

/// Balloons on two CPUs beside allocations whose contents are looked at: what is in use never goes to the system.
#[test]
fn balloons_under_load() {
    let machine = Machine::flat(MACHINE).unsampled().cpus(3);
    let mm = machine.boot();
    let stop = AtomicBool::new(false);
    let balloon = Balloon::new(&mm);
    std::thread::scope(|scope| {
        for cpu in 0..2 {
            let (mm, stop, balloon) = (&mm, &stop, &balloon);
            scope.spawn(move || {
                let _cpu = mm.platform().claim(cpu).unwrap();
                let mut rng = Rng(cpu as u64);
                while !stop.load(Ordering::Relaxed) {
                    let n = 1 << rng.below(13);
                    if rng.one_in(2) {
                        balloon.inflate(n, GFP_HIGHUSER);
                    } else {
                        let back = balloon.deflate(n);
                        assert!(back <= n);
                    }
                }
            });
        }
        let _cpu = mm.platform().claim(2).unwrap();
        let mut rng = Rng(77);
        let mut live: Vec<(Pfn, usize, u8)> = Vec::new();
        for round in 0..scaled(20_000, 300) {
            if rng.one_in(2) && live.len() < 200 {
                let order = rng.below(6);
                if let Ok(pfn) = mm.alloc_pages(GFP_NOWAIT | __GFP_NOWARN, order) {
                    fill(&mm, pfn, 1 << order, round as u8 | 1);
                    live.push((pfn, order, round as u8 | 1));
                }
            } else if !live.is_empty() {
                let (pfn, order, byte) = live.swap_remove(rng.below(live.len()));
                holds(&mm, pfn, 1 << order, byte);
                free(&mm, pfn);
            }
        }
        stop.store(true, Ordering::Relaxed);
        live.into_iter().for_each(|(pfn, _, _)| free(&mm, pfn));
    });
    assert_eq!(of(&mm, CensusKind::Balloon), balloon.pages());
    assert_eq!(
        mm.event(Event::BalloonInflate) - mm.event(Event::BalloonDeflate),
        balloon.pages()
    );
    ledger(&mm);
    drop(balloon);
    assert_eq!(of(&mm, CensusKind::Balloon), 0);
    mm.shrink();
    descriptors(&mm, 0);
    ledger(&mm);
}
