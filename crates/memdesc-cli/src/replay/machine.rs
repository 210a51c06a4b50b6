//! What the machine of a recording was like: its memory and its CPUs.

use memdesc::{MemRange, Pfn, PhysAddr};
use memdesc_trace::{Event, EventKind, Snapshot};

use crate::error::Error;

/// Without a snapshot memory ends at a multiple of this, with room to spare.
const ROUND: u64 = 1 << 28;

/// Memory and CPUs, and how they are known.
#[derive(Clone, Debug)]
pub(crate) struct Shape {
    pub(crate) ranges: Vec<MemRange>,
    pub(crate) cpus: usize,
    /// One more than the highest page that is memory or in an event.
    pub(crate) pages: usize,
    pub(crate) memory_from: &'static str,
}

impl Shape {
    /// The page ranges of memory.
    pub(crate) fn ram(&self) -> Vec<(u32, u32)> {
        let page = |at: PhysAddr| (at.0 >> memdesc::PAGE_SHIFT) as u32;
        self.ranges
            .iter()
            .map(|r| (page(r.start), page(r.end)))
            .collect()
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.ranges.iter().map(|r| r.end.0 - r.start.0).sum()
    }
}

/// The pages of an event: the first and one past the last, and the order.
fn pages_of(event: &Event) -> Option<(u64, u64, u8)> {
    match event.kind() {
        EventKind::PageAlloc { pfn, order, .. } | EventKind::PageFree { pfn, order } => {
            Some((pfn.into(), u64::from(pfn) + (1 << order.min(32)), order))
        }
        _ => None,
    }
}

/// Leaves out events of pages that cannot be: a line may be damaged and still read like an event. If there are many it is
/// not the line that is wrong. Says how many.
pub(crate) fn leave_out_impossible(events: &mut Vec<Event>, shape: &Shape) -> Result<u64, Error> {
    let end = shape.pages as u64;
    let wrong = |event: &Event| {
        pages_of(event).filter(|&(_, last, order)| last > end || is_too_large(order))
    };
    let first = events.iter().find_map(wrong);
    let Some((pfn, _, order)) = first else {
        return Ok(0);
    };
    let all = events.iter().filter(|e| pages_of(e).is_some()).count();
    let bad = events.iter().filter(|e| wrong(e).is_some()).count();
    if bad * 100 <= all {
        events.retain(|e| wrong(e).is_none());
        return Ok(bad as u64);
    }
    Err(if is_too_large(order) {
        Error::OrderTooLarge { order }
    } else {
        let memory_from = shape.memory_from;
        Error::PageBeyondMemory {
            pfn,
            end,
            memory_from,
        }
    })
}

fn is_too_large(order: u8) -> bool {
    usize::from(order) > memdesc::MAX_ORDER
}

/// Finds out what machine the events need. `memory` and `cpus` are what the user said.
pub(crate) fn shape(
    events: &[Event],
    cpus_seen: usize,
    snapshot: Option<&Snapshot>,
    memory: Option<u64>,
    cpus: Option<usize>,
) -> Result<Shape, Error> {
    let all = events
        .iter()
        .filter_map(pages_of)
        .filter(|&(_, _, order)| !is_too_large(order));
    let seen = all.map(|(_, end, _)| end).max().unwrap_or(0);
    let iomem = snapshot.and_then(|s| s.iomem.as_ref());
    let range = |start: u64, end: u64| MemRange {
        start: PhysAddr(start),
        end: PhysAddr(end),
        node: 0,
    };
    let mut ranges = Vec::new();
    let memory_from;
    if let Some(bytes) = memory {
        memory_from = "--memory";
        ranges.push(range(0, bytes & !4095));
    } else if let Some(iomem) = iomem {
        memory_from = "iomem";
        ranges.extend(iomem.ram_pfns().map(|r| range(r.start << 12, r.end << 12)));
    } else {
        memory_from = "the highest page in the events, and a quarter more";
        let bytes = seen << 12;
        ranges.push(range(
            0,
            (bytes + bytes / 4).next_multiple_of(ROUND).max(ROUND),
        ));
    }
    let end = ranges.iter().map(|r| r.end.0 >> 12).max().unwrap_or(0);
    if end > u64::from(memdesc::address::MAX_PFN) || Pfn::NONE.0 as u64 <= end {
        return Err(Error::TooLarge { bytes: end << 12 });
    }
    Ok(Shape {
        ranges,
        cpus: cpus.unwrap_or(cpus_seen).max(1),
        pages: end as usize,
        memory_from,
    })
}
