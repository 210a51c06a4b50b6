//! Memory that is in use when it is taken over: kept, and given back.
#![allow(missing_docs)]

use memdesc::gfp::{__GFP_NORETRY, __GFP_NOWARN, GFP_KERNEL};
use memdesc::*;
use memdesc_host::Host;

/// What is reserved from the start is never handed out, wherever it lies, and is free when it is given back: whole or by blocks.
#[test]
fn reserved_ranges_are_kept_and_come_back() {
    const fn range(start: u32, end: u32, what: Reserved) -> ReservedRange {
        ReservedRange {
            start: Pfn(start).phys(),
            end: Pfn(end).phys(),
            what,
        }
    }
    // Page 0, a lonely page, three that touch of which one goes across the border of ZONE_DMA, and the end of memory.
    const KEPT: &[ReservedRange] = &[
        range(0, 1, Reserved::Other),
        range(8, 9, Reserved::Other),
        range(512, 700, Reserved::KernelText),
        range(700, 721, Reserved::KernelData),
        range(721, 5000, Reserved::KernelData),
        range(16000, 16384, Reserved::Other),
    ];
    let config = Config {
        dma_limit: Pfn(4096).phys(),
        reserved: KEPT,
        ..Config::default()
    };
    let (host, ram) = Host::small(16384).unwrap();
    let mm = Mm::new(host, &config, &ram).unwrap();
    let kept: u64 = KEPT.iter().map(|r| (r.end.0 - r.start.0) >> 12).sum();
    let of = |mm: &Mm<Host>| {
        let ledger = mm.ledger();
        assert!(ledger.balanced, "{ledger:?}");
        let mut managed = 0;
        mm.zoneinfo(|zone| managed += zone.managed);
        (ledger.free + ledger.untouched + ledger.pcp, managed)
    };
    let is_kept = |pfn: Pfn| {
        KEPT.iter()
            .any(|r| r.start <= pfn.phys() && pfn.phys() < r.end)
    };
    for pfn in (0..16384).map(Pfn) {
        let reserved = matches!(mm.lookup(pfn).2, Memory::Reserved(what) if what != Reserved::MemMap || pfn.0 == 0);
        assert_eq!(reserved, is_kept(pfn), "{pfn:?}: {:?}", mm.lookup(pfn));
    }
    let (free, managed) = of(&mm);
    assert_eq!(free, managed);
    // All that can be had is none of it.
    let mut had = Vec::new();
    while let Ok(pfn) = mm.alloc_pages(GFP_KERNEL | __GFP_NORETRY | __GFP_NOWARN, 0) {
        assert!(!is_kept(pfn), "{pfn:?}");
        had.push(pfn);
    }
    assert!(had.len() as u64 > free * 9 / 10);
    for pfn in had {
        // SAFETY: had above, and freed once.
        unsafe { mm.free_pages(pfn) };
    }
    // Not what was never reserved, nor more than one range, nor a part of a block.
    for (start, pages) in [(9, 1), (512, 200), (1024, 100), (8, 2), (8, 0)] {
        // SAFETY: nothing is in it.
        let why = unsafe { mm.free_reserved(Pfn(start), pages) };
        assert_eq!(why, Err(AllocError::Busy), "{start} {pages}");
    }
    let mut back = 0;
    for (start, end) in [
        (0, 1),
        (8, 9),
        (700, 721),
        (721, 1024),
        (1024, 5000),
        (16000, 16384),
    ] {
        // SAFETY: as above.
        let freed = unsafe { mm.free_reserved(Pfn(start), end - start).unwrap() };
        assert_eq!(freed, end - start.max(1));
        back += u64::from(freed);
        // SAFETY: as above.
        let again = unsafe { mm.free_reserved(Pfn(start), end - start) };
        assert!(again == Err(AllocError::Busy) || start == 0);
        assert_eq!(of(&mm).1, managed + back);
    }
    assert_eq!(back, kept - 1 - 188);
    mm.shrink();
    // And now it is had.
    let mut seen = 0;
    let mut had = Vec::new();
    while let Ok(pfn) = mm.alloc_pages(GFP_KERNEL | __GFP_NORETRY | __GFP_NOWARN, 0) {
        // SAFETY: ours.
        unsafe { mm.page_address(pfn).write_bytes(0x55, PAGE_SIZE) };
        seen += u64::from(is_kept(pfn));
        had.push(pfn);
    }
    assert!(seen * 10 > back * 9, "{seen} of {back}");
    for pfn in had {
        // SAFETY: had above, and freed once.
        unsafe { mm.free_pages(pfn) };
    }
    mm.shrink();
    of(&mm);
}

#[test]
fn what_cannot_be_reserved_is_refused() {
    let refused = |reserved: &'static [ReservedRange]| {
        let (host, ram) = Host::small(4096).unwrap();
        let config = Config {
            reserved,
            ..Config::default()
        };
        Mm::new(host, &config, &ram).err()
    };
    const fn range(start: u64, end: u64) -> ReservedRange {
        ReservedRange {
            start: PhysAddr(start),
            end: PhysAddr(end),
            what: Reserved::Other,
        }
    }
    const EMPTY: &[ReservedRange] = &[range(8192, 8192)];
    const OUTSIDE: &[ReservedRange] = &[range(4096 * 4000, 4096 * 4097)];
    const TWICE: &[ReservedRange] = &[range(8192, 12000), range(12100, 20000)];
    const ALL: &[ReservedRange] = &[range(0, 4096 * 4096)];
    assert_eq!(refused(EMPTY), Some(InitError::BadReserved(PhysAddr(8192))));
    assert_eq!(
        refused(OUTSIDE),
        Some(InitError::BadReserved(OUTSIDE[0].start))
    );
    assert!(matches!(refused(TWICE), Some(InitError::Overlap(_))));
    assert!(refused(ALL).is_some());
}
