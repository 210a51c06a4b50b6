//! How Linux's free memory is cut up, to stand beside ours.

use memdesc::MAX_ORDER;
use memdesc_trace::Snapshot;

use memdesc_replay::pages::{Holder, Pages};

const PAGEBLOCK: u32 = memdesc::address::PAGEBLOCK_PAGES;

/// Free blocks by order, and pageblocks with both free and taken pages.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct LinuxFragmentation {
    pub(crate) free_by_order: [u64; MAX_ORDER + 1],
    pub(crate) pinned_pageblocks: u64,
    pub(crate) free_pageblocks: u64,
}

/// As a snapshot shows it.
pub(crate) fn of_snapshot(snapshot: &Snapshot) -> Option<LinuxFragmentation> {
    let blocks = snapshot.pinned_pageblocks()?;
    Some(LinuxFragmentation {
        free_by_order: snapshot.free_by_order()?,
        pinned_pageblocks: blocks.pinned,
        free_pageblocks: blocks.free,
    })
}

/// As it follows from a layout and the events since: what nobody holds is free, in blocks as large as they can be.
pub(crate) fn of_events(pages: &Pages, ram: &[(u32, u32)]) -> LinuxFragmentation {
    let mut sum = LinuxFragmentation {
        free_by_order: [0; MAX_ORDER + 1],
        pinned_pageblocks: 0,
        free_pageblocks: 0,
    };
    for &(start, end) in ram {
        let is_free = |pfn: u32| pages.holder(pfn) == Holder::Nobody;
        let mut pfn = start;
        while pfn < end {
            if !is_free(pfn) {
                pfn += 1;
                continue;
            }
            let most = pfn.trailing_zeros().min(MAX_ORDER as u32);
            let limit = end.min(pfn + (1 << most));
            let run = (pfn..limit).take_while(|&p| is_free(p)).count() as u32;
            let order = run.ilog2();
            sum.free_by_order[order as usize] += 1;
            pfn += 1 << order;
        }
        let mut block = start.next_multiple_of(PAGEBLOCK);
        while block + PAGEBLOCK <= end {
            let free = (block..block + PAGEBLOCK).filter(|&p| is_free(p)).count() as u32;
            sum.free_pageblocks += u64::from(free == PAGEBLOCK);
            sum.pinned_pageblocks += u64::from(free > 0 && free < PAGEBLOCK);
            block += PAGEBLOCK;
        }
    }
    sum
}
