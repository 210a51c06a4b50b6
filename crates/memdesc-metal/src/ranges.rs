//! From the firmware's memory map to what the memory manager is given: all of memory, each piece with its node. What is in use there is said beside it (`memory::init`).

use arrayvec::ArrayVec;
use memdesc::{MemRange, PhysAddr};

use crate::acpi::Affinity;
use crate::pvh::{Entry, Kind, MAX_ENTRIES};

/// Pieces at most: each range of the firmware's cut at ours and at the borders of nodes.
const MAX_RANGES: usize = 2 * MAX_ENTRIES;

/// The list.
pub(crate) type Ranges = ArrayVec<MemRange, MAX_RANGES>;

const PAGE: u64 = 4096;

impl Kind {
    /// May it be used as memory? ACPI's tables too, once they have been read.
    pub(crate) fn is_memory(self) -> bool {
        matches!(self, Kind::Ram | Kind::Acpi)
    }
}

/// The memory in the firmware's map, in whole pages. Sorted; where the firmware's ranges overlap, memory loses. When ACPI's tables have been read.
pub(crate) fn usable(memory: &[Entry], nodes: &[Affinity]) -> Ranges {
    let mut borders: ArrayVec<u64, { 4 * MAX_ENTRIES }> = ArrayVec::new();
    let mut border = |at: u64| {
        // Too many cut nothing: the piece is looked at as a whole, and is no memory if any of it is not.
        let _ = borders.try_push(at);
    };
    for entry in memory {
        let (start, end) = pages(entry);
        border(start);
        border(end);
    }
    for affinity in nodes {
        border(affinity.start & !(PAGE - 1));
        border(affinity.end & !(PAGE - 1));
    }
    borders.sort_unstable();
    let mut found = Ranges::new();
    for pair in borders.windows(2) {
        let (start, end) = (pair[0], pair[1]);
        let is_in = |(s, e): (u64, u64)| s < end && start < e;
        let covers = |(s, e): (u64, u64)| s <= start && end <= e;
        let ram = memory
            .iter()
            .any(|e| e.kind.is_memory() && covers(pages(e)));
        let other = memory
            .iter()
            .any(|e| !e.kind.is_memory() && is_in(pages(e)));
        if start == end || !ram || other {
            continue;
        }
        let node = nodes
            .iter()
            .find(|a| covers((a.start, a.end)))
            .map_or(0, |a| a.node);
        match found.last_mut() {
            Some(last) if last.end.0 == start && last.node == node => last.end.0 = end,
            _ => {
                let range = MemRange {
                    start: PhysAddr(start),
                    end: PhysAddr(end),
                    node,
                };
                if found.try_push(range).is_err() {
                    break;
                }
            }
        }
    }
    found
}

/// An entry in whole pages: memory rounded inwards, all else outwards.
fn pages(entry: &Entry) -> (u64, u64) {
    if entry.kind.is_memory() {
        let start = entry.start.checked_next_multiple_of(PAGE);
        let start = start.unwrap_or(!(PAGE - 1));
        (start, (entry.end & !(PAGE - 1)).max(start))
    } else {
        let end = entry
            .end
            .checked_next_multiple_of(PAGE)
            .unwrap_or(!(PAGE - 1));
        (entry.start & !(PAGE - 1), end)
    }
}
