//! Layouts of small made-up memories.

use super::super::Snapshot;
use super::super::buddyinfo::{BuddyInfo, ZoneFree};
use super::super::counters::MemInfo;
use super::super::evidence::Evidence;
use super::super::kpageflags::*;
use super::super::zoneinfo::{PerCpuPages, Zone, ZoneInfo};
use super::*;
use crate::event::{Event, EventKind};
use memdesc::gfp::Flags;

const SECTION: usize = 1 << 15;

/// One zone from page 0 on: one section that is initialised, one that is not, all of it mapped by
/// `flags` and zeroes.
fn snapshot(flags: &[(usize, u64)]) -> Snapshot {
    let mut pages = vec![0; 2 * SECTION];
    for &(page, f) in flags {
        pages[page] = f;
    }
    let zone = Zone {
        name: "Normal".into(),
        spanned: 2 * SECTION as u64,
        present: 2 * SECTION as u64,
        managed: SECTION as u64,
        pcp: vec![PerCpuPages {
            count: 5,
            ..PerCpuPages::default()
        }],
        ..Zone::default()
    };
    let total = (2 * SECTION as u64 - 100) * 4096;
    Snapshot {
        zoneinfo: Some(ZoneInfo { zones: vec![zone] }),
        meminfo: Some(MemInfo {
            values: [("MemTotal".to_string(), total)].into(),
        }),
        kpageflags: Some(pages),
        ..Snapshot::default()
    }
}

fn block(pfn: usize, pages: usize, kind: LayoutKind) -> LayoutBlock {
    LayoutBlock {
        pfn: pfn as u32,
        pages: pages as u32,
        kind,
    }
}

#[test]
fn blocks_and_uninitialised_memory() {
    let mut flags: Vec<_> = (1..8).map(|p| (p, KPF_BUDDY)).collect();
    flags.extend([
        (8, KPF_SLAB | KPF_COMPOUND_HEAD),
        (9, KPF_SLAB | KPF_COMPOUND_TAIL),
    ]);
    flags.extend([
        (10, KPF_ANON | KPF_LRU),
        (11, KPF_RESERVED),
        (12, KPF_RESERVED),
    ]);
    let layout = snapshot(&flags).layout(None).unwrap();
    let blocks = &layout.blocks;
    assert_eq!(blocks[0], block(0, 1, LayoutKind::FreePerCpu));
    assert_eq!(
        blocks[1..8],
        [
            block(1, 1, LayoutKind::Free),
            block(2, 2, LayoutKind::Free),
            block(4, 4, LayoutKind::Free),
            block(8, 2, LayoutKind::Slab),
            block(10, 1, LayoutKind::Anon),
            block(11, 2, LayoutKind::Reserved),
            block(13, 1, LayoutKind::FreePerCpu),
        ]
    );
    // 100 pages fewer than present were ever given to the allocator: they are at the top.
    let last = &blocks[blocks.len() - 2..];
    assert_eq!(
        last[0],
        block(SECTION, SECTION - 100, LayoutKind::FreeUninitialised)
    );
    assert_eq!(last[1], block(2 * SECTION - 100, 100, LayoutKind::Reserved));
    let pages: u64 = blocks.iter().map(|b| u64::from(b.pages)).sum();
    assert_eq!(pages, 2 * SECTION as u64);
    let check = &layout.zones[0];
    assert_eq!((check.buddy, check.per_cpu_counted), (7, 5));
    assert_eq!(
        (check.uninitialised, check.uninitialised_counted),
        (SECTION as u64, SECTION as u64 - 2)
    );
    let order = layout.free_by_order();
    assert_eq!(order[..4], [1, 1, 1, 0]);
    let pageblocks = layout.pageblocks();
    assert_eq!(
        pageblocks,
        PageBlocks {
            present: 128,
            free: 126,
            pinned: 2,
            full: 0
        }
    );
}

#[test]
fn heads_only() {
    let mut snapshot = snapshot(&[
        (0, KPF_BUDDY),
        (8, KPF_SLAB),
        (16, KPF_BUDDY),
        (17, KPF_SLAB),
    ]);
    let mut blocks = [0; ORDERS];
    (blocks[0], blocks[3]) = (1, 1);
    let zone = ZoneFree {
        node: 0,
        zone: "Normal".into(),
        blocks,
    };
    snapshot.buddyinfo = Some(BuddyInfo { zones: vec![zone] });
    let layout = snapshot.layout(None).unwrap();
    assert_eq!(layout.blocks[0], block(0, 8, LayoutKind::Free));
    assert_eq!(layout.blocks[1], block(8, 1, LayoutKind::Slab));
    assert_eq!(layout.free_by_order(), blocks);
}

#[test]
fn bare_pages_lie_among_slabs_unless_proved_otherwise() {
    let slabs: Vec<_> = (0..100).map(|p| (p, KPF_SLAB)).collect();
    let mut snapshot = snapshot(&slabs);
    let far = 2048;
    snapshot.kpageflags.as_mut().unwrap()[far] = KPF_LRU;
    let kind_of = |layout: &Layout, page: usize| {
        layout.blocks[layout
            .blocks
            .partition_point(|b| (b.pfn + b.pages) as usize <= page)]
        .kind
    };
    let layout = snapshot.layout(None).unwrap();
    assert_eq!(kind_of(&layout, 200), LayoutKind::OtherAllocated);
    assert_eq!(kind_of(&layout, far + 1), LayoutKind::FreePerCpu);
    let alloc = EventKind::PageAlloc {
        pfn: 200,
        order: 1,
        migratetype: 0,
        gfp: Flags::EMPTY,
    };
    let free = EventKind::PageFree {
        pfn: far as u32 + 1,
        order: 0,
    };
    let events = [alloc, free, EventKind::PageFree { pfn: 200, order: 1 }];
    let events = events.map(|kind| Event::new(0, 0, kind));
    let start = snapshot.layout(Some(&Evidence::of_start(&events))).unwrap();
    assert_eq!(kind_of(&start, 201), LayoutKind::FreePerCpu);
    assert_eq!(kind_of(&start, far + 1), LayoutKind::OtherAllocated);
    let end = Evidence::of_end(&events);
    assert_eq!(
        (
            end.is_free(200),
            end.is_free(far as u32 + 1),
            end.is_free(5)
        ),
        (Some(true), Some(true), None)
    );
}

#[test]
fn allocations_that_would_bear_flags_are_gone() {
    let alloc = |pfn, gfp| {
        let kind = EventKind::PageAlloc {
            pfn,
            order: 0,
            migratetype: 0,
            gfp,
        };
        Event::new(0, 0, kind)
    };
    let movable = memdesc::gfp::__GFP_MOVABLE;
    let free = Event::new(0, 0, EventKind::PageFree { pfn: 3, order: 0 });
    let events = [
        alloc(1, Flags::EMPTY),
        alloc(2, movable),
        alloc(3, Flags::EMPTY),
        free,
    ];
    let bare = |gfp: Flags, _| !gfp.contains(movable);
    let end = Evidence::of_end_without_flags(&events, bare);
    let of = [1, 2, 3, 4].map(|pfn| end.is_free(pfn));
    assert_eq!(of, [Some(false), Some(true), Some(true), None]);
}

#[test]
fn nothing_else_than_flags() {
    let snapshot = Snapshot {
        kpageflags: Some(vec![KPF_BUDDY; 1500]),
        ..Snapshot::default()
    };
    let layout = snapshot.layout(None).unwrap();
    let sizes: Vec<_> = layout.blocks.iter().map(|b| b.pages).collect();
    assert_eq!(sizes, [1024, 256, 128, 64, 16, 8, 4]);
    assert_eq!(
        layout.pageblocks(),
        PageBlocks {
            present: 2,
            free: 2,
            pinned: 0,
            full: 0
        }
    );
    assert_eq!(Snapshot::default().layout(None), None);
}
