//! What tests share: a random number generator, looks at a machine from outside, and what is left at the end.

use alloc::vec::Vec;
use core::ptr::NonNull;

use memdesc::*;

use crate::{Flat, Lab};

/// A small random number generator: the same numbers everywhere.
#[derive(Clone, Debug)]
pub struct Rng(pub u64);

impl Rng {
    /// The next number (SplitMix64).
    #[allow(clippy::should_implement_trait)]
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ x >> 31
    }

    /// A number below `n`.
    pub fn below(&mut self, n: usize) -> usize {
        (self.next() >> 11) as usize % n.max(1)
    }

    /// Yes, one time in `n`.
    pub fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }
}

/// Fewer under Miri, which is a thousand times slower, and where there is no operating system: such machines are emulated, and all of their CPUs test at the same
/// time.
pub fn scaled(native: usize, miri: usize) -> usize {
    if cfg!(any(miri, target_os = "none")) {
        miri
    } else {
        native
    }
}

/// Frees pages that the test has.
#[track_caller]
pub fn free<P: Platform>(mm: &Mm<P>, pfn: Pfn) {
    // SAFETY: tests call this for heads of allocations that they made and do not use any more, or to see a wrong free reported.
    unsafe { mm.free_pages(pfn) };
}

/// Frees an object that the test has.
#[track_caller]
pub fn kfree<P: Platform>(mm: &Mm<P>, ptr: NonNull<u8>) {
    // SAFETY: as in `free`.
    unsafe { mm.kfree(ptr) };
}

/// Frees an object to its cache.
#[track_caller]
pub fn cache_free<P: Platform>(mm: &Mm<P>, cache: &Cache<'_>, ptr: NonNull<u8>) {
    // SAFETY: as in `free`.
    unsafe { mm.kmem_cache_free(cache, ptr) };
}

/// Fills memory that the test has.
pub fn fill(ptr: NonNull<u8>, len: usize, byte: u8) {
    // SAFETY: tests call this for live memory of at least this length.
    unsafe { ptr.write_bytes(byte, len) };
}

/// Memory that the test has, as bytes.
pub fn bytes<'a>(ptr: NonNull<u8>, len: usize) -> &'a [u8] {
    // SAFETY: tests call this for live, initialised memory of at least this length, and drop the slice before they free it.
    unsafe { core::slice::from_raw_parts(ptr.as_ptr(), len) }
}

/// The bytes of a page that the test has.
pub fn page<P: Platform>(mm: &Mm<P>, pfn: Pfn) -> NonNull<u8> {
    NonNull::new(mm.page_address(pfn)).unwrap()
}

/// All zones' rows.
pub fn zones<P: Platform>(mm: &Mm<P>) -> Vec<ZoneView> {
    let mut zones = Vec::new();
    mm.zoneinfo(|z| zones.push(z));
    zones
}

/// One number of the vmstat view.
pub fn vmstat<P: Platform>(mm: &Mm<P>, name: &str) -> u64 {
    let mut found = None;
    mm.vmstat(|n, v| {
        if n == name {
            found = Some(v);
        }
    });
    found.unwrap_or_else(|| panic!("no counter {name}"))
}

/// One cache's row of the slabinfo view: (active, total, slabs).
pub fn slabinfo<P: Platform>(mm: &Mm<P>, name: &str) -> (u64, u64, u64) {
    let mut found = None;
    mm.slabinfo(|c| {
        if c.name == name {
            found = Some((c.active_objs, c.num_objs, c.num_slabs));
        }
    });
    found.unwrap_or_else(|| panic!("no cache {name}"))
}

/// Every descriptor of a block that is in use is some block's, but for so many that are kept for later.
#[track_caller]
pub fn descriptors<P: Platform>(mm: &Mm<P>, kept: u64) {
    let of_blocks = [
        "kmem_cache_buddy",
        "kmem_cache_slab",
        "folio_file",
        "folio_anon",
        "ptdesc",
    ];
    let mut active = 0;
    mm.slabinfo(|cache| {
        if of_blocks.contains(&cache.name) {
            active += cache.active_objs;
        }
    });
    let described: u64 = mm.census().iter().map(|(_, of)| of.descriptors).sum();
    assert_eq!(
        described + kept,
        active,
        "descriptors of blocks, and in use"
    );
}

/// The ledger, which must balance, and agree with the zones' own view.
#[track_caller]
pub fn ledger<P: Platform>(mm: &Mm<P>) -> Ledger {
    let ledger = mm.ledger();
    assert!(ledger.balanced, "{ledger:#?}");
    assert_eq!(ledger.walk.lost, 0);
    let sum = ledger.free
        + ledger.untouched
        + ledger.pcp
        + ledger.metadata
        + ledger.by_type.iter().sum::<u64>();
    assert_eq!(sum, ledger.given, "{ledger:#?}");
    let zones = zones(mm);
    assert_eq!(
        zones.iter().map(|z| z.free).sum::<u64>(),
        ledger.free + ledger.untouched
    );
    for zone in &zones {
        let blocks: u64 = zone
            .free_blocks
            .iter()
            .enumerate()
            .map(|(o, row)| row.iter().sum::<u64>() << o)
            .sum();
        assert_eq!(blocks, zone.free, "{zone:?}");
        assert!(
            zone.free <= zone.managed && zone.managed <= zone.present,
            "{zone:?}"
        );
    }
    ledger
}

/// All that users have.
pub fn users(ledger: &Ledger) -> u64 {
    ledger.by_type.iter().sum()
}

/// Pages of RAM: the first, and the one behind the last.
fn ends<P: Platform>(mm: &Mm<P>) -> (u32, u32) {
    let (mut start, mut end) = (u32::MAX, 0);
    mm.census_visit(|step| {
        start = start.min(step.pfn.0);
        end = end.max(step.pfn.0 + step.pages);
    });
    (start, end)
}

/// All pages of RAM of a machine with one range.
pub fn all_pages<P: Platform>(mm: &Mm<P>) -> impl Iterator<Item = Pfn> + use<P> {
    let (start, end) = ends(mm);
    (start..end).map(Pfn)
}

/// Everything was freed: gives back what is kept for later, and checks that all memory came back and merged.
#[track_caller]
pub fn teardown<L: Lab>(machine: &Flat<'_, L>, mm: &Mm<L::Platform>) {
    mm.shrink();
    assert!(mm.page_report().is_ok());
    let after = ledger(mm);
    assert_eq!(users(&after), 0, "{after:#?}");
    assert_eq!(after.pcp, 0);
    assert_eq!(mm.event(Event::AllocOnFree), 0);
    mm.slabinfo(|c| assert!(c.metadata || c.num_slabs == 0, "{c:?}"));
    let free_blocks = merged(&machine.config, mm);
    // Each free block has one descriptor, each slab has one, and there are no others: none was lost.
    let (mut descriptors, mut slabs) = (0, 0);
    mm.slabinfo(|c| {
        slabs += c.num_slabs;
        descriptors += c.active_objs;
    });
    assert_eq!(
        descriptors,
        free_blocks + slabs,
        "{free_blocks} free blocks, {slabs} slabs"
    );
}

/// No two free buddies of a machine with one range are left apart; says how many free blocks there are.
#[track_caller]
fn merged<P: Platform>(config: &Config, mm: &Mm<P>) -> u64 {
    let (start, end) = ends(mm);
    let zone = |pfn: Pfn| {
        let at = pfn.phys();
        usize::from(at >= config.dma_limit) + usize::from(at >= config.dma32_limit)
    };
    let (mut blocks, mut at) = (0, start);
    while at < end {
        let (head, order, memory) = mm.lookup(Pfn(at));
        if !matches!(memory, Memory::Free { in_pcp: false }) || head != Pfn(at) {
            at += 1;
            continue;
        }
        let buddy = head.buddy(order);
        if order < MAX_ORDER && (start..end).contains(&buddy.0) && zone(buddy) == zone(head) {
            let (h, o, m) = mm.lookup(buddy);
            let apart = (h, o) == (buddy, order) && matches!(m, Memory::Free { in_pcp: false });
            assert!(
                !apart,
                "{head:?} and {buddy:?} are free, order {order}, and were not merged"
            );
        }
        blocks += 1;
        at += 1 << order;
    }
    blocks
}
