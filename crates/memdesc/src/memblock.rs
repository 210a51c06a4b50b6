//! From what the firmware says to what the memory manager is given: Linux's memblock, in small.
//!
//! A boot loader has a list of pieces of RAM, a kernel knows what of it must stay as it is: its own image, the loader's tables, the firmware's first MiB.
//! What is left is a list of [`MemRange`]s, sorted, in whole pages, no two of which touch unless they are of different nodes. It stands
//! in the [`Memblock`] itself: there is nothing to allocate from yet.

use core::ops::Range;

use crate::address::{PAGE_SIZE, PhysAddr};
use crate::config::MemRange;
use crate::error::InitError;

const PAGE: u64 = PAGE_SIZE as u64;
const NONE: MemRange = MemRange {
    start: PhysAddr(0),
    end: PhysAddr(0),
    node: 0,
};

/// Up to `N` pieces of memory (`struct memblock`).
///
/// ```
/// use memdesc::Memblock;
///
/// let mut memory = Memblock::<16>::new();
/// memory.add(0..0x9_fc00)?; // what is left of the first MiB
/// memory.add(0x10_0000..0x800_0000)?;
/// memory.remove(0x20_0000..0x34_5678)?; // the image
/// let pages: Vec<_> = memory.ranges().iter().map(|r| r.start.0 >> 12..r.end.0 >> 12).collect();
/// assert_eq!(pages, [0..0x9f, 0x100..0x200, 0x346..0x8000]);
/// # Ok::<(), memdesc::InitError>(())
/// ```
#[derive(Clone, Debug)]
pub struct Memblock<const N: usize> {
    /// # Invariants
    ///
    /// The first `len` are sorted, not empty, in whole pages; none overlap, and those that touch are of different nodes.
    ranges: [MemRange; N],
    len: usize,
}

impl<const N: usize> Memblock<N> {
    /// No memory.
    pub const fn new() -> Memblock<N> {
        Memblock {
            ranges: [NONE; N],
            len: 0,
        }
    }

    /// What the memory manager is given.
    pub fn ranges(&self) -> &[MemRange] {
        &self.ranges[..self.len]
    }

    /// This is RAM (`memblock_add`), of node 0 until [`set_node`](Self::set_node) says otherwise; pages that are not wholly in it are not. What is there already stays as it is.
    ///
    /// # Errors
    ///
    /// [`InitError::TooManyRanges`], and nothing has changed.
    pub fn add(&mut self, bytes: Range<u64>) -> Result<(), InitError> {
        let start = bytes.start.div_ceil(PAGE).saturating_mul(PAGE);
        let end = bytes.end / PAGE * PAGE;
        let mut new = Memblock::<N>::new();
        // What is there, and what of the piece lies between.
        let mut at = start;
        for &range in self.ranges() {
            if at < end {
                new.push(at, range.start.0.min(end), 0)?;
            }
            at = at.max(range.end.0);
            new.push(range.start.0, range.end.0, range.node)?;
        }
        new.push(at, end, 0)?;
        *self = new;
        Ok(())
    }

    /// This shall not be touched (`memblock_remove`), RAM or not: pages of which any byte lies in it.
    ///
    /// # Errors
    ///
    /// [`InitError::TooManyRanges`], if it cuts a piece in two, and nothing has changed.
    pub fn remove(&mut self, bytes: Range<u64>) -> Result<(), InitError> {
        self.rewrite(bytes, None)
    }

    /// The memory in this range is of this node (`memblock_set_node`): pages of which any byte lies in it.
    ///
    /// # Errors
    ///
    /// [`InitError::TooManyRanges`], if it cuts pieces in two, and nothing has changed.
    pub fn set_node(&mut self, bytes: Range<u64>, node: u8) -> Result<(), InitError> {
        self.rewrite(bytes, Some(node))
    }

    /// What lies in the range gets this node, or goes.
    fn rewrite(&mut self, bytes: Range<u64>, node: Option<u8>) -> Result<(), InitError> {
        if bytes.is_empty() {
            return Ok(());
        }
        let start = bytes.start / PAGE * PAGE;
        let end = bytes.end.div_ceil(PAGE).saturating_mul(PAGE);
        let mut new = Memblock::<N>::new();
        for &range in self.ranges() {
            let (first, last) = (range.start.0, range.end.0);
            new.push(first, last.min(start), range.node)?;
            if let Some(node) = node {
                new.push(first.max(start), last.min(end), node)?;
            }
            new.push(first.max(end), last, range.node)?;
        }
        *self = new;
        Ok(())
    }

    /// Behind all that is there; nothing if it is empty.
    fn push(&mut self, start: u64, end: u64, node: u8) -> Result<(), InitError> {
        if start >= end {
            return Ok(());
        }
        if let Some(last) = self.ranges[..self.len].last_mut()
            && last.end.0 == start
            && last.node == node
        {
            last.end.0 = end;
            return Ok(());
        }
        let place = self
            .ranges
            .get_mut(self.len)
            .ok_or(InitError::TooManyRanges)?;
        *place = MemRange {
            start: PhysAddr(start),
            end: PhysAddr(end),
            node,
        };
        self.len += 1;
        Ok(())
    }
}

impl<const N: usize> Default for Memblock<N> {
    fn default() -> Memblock<N> {
        Memblock::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::vec::Vec;

    /// What is done to a list.
    #[derive(Clone, Debug)]
    enum Op {
        Add,
        Remove,
        SetNode(u8),
    }

    fn ops() -> impl Strategy<Value = Vec<(Op, Range<u64>)>> {
        let op = prop_oneof![
            Just(Op::Add),
            Just(Op::Remove),
            (0..3u8).prop_map(Op::SetNode)
        ];
        // Borders on and off those of pages, and the last bytes there are.
        let at = prop_oneof![0..40 * PAGE, (0..40u64).prop_map(|page| page * PAGE)];
        let bytes = (at.clone(), at).prop_map(|(a, b)| a.min(b)..a.max(b));
        let bytes = prop_oneof![9 => bytes, 1 => (0..40 * PAGE).prop_map(|a| a..u64::MAX)];
        prop::collection::vec((op, bytes), 0..12)
    }

    proptest! {
        /// Page by page the list is what a table of pages says; it is sorted, and no longer than need be.
        #[test]
        fn a_list_is_a_table_of_pages(ops in ops()) {
            const PAGES: u64 = 42;
            let mut list = Memblock::<64>::new();
            let mut table = [None::<u8>; PAGES as usize];
            for (op, bytes) in ops {
                // The table ends where the last page that is asked about does.
                let bytes = if matches!(op, Op::Add) { bytes.start..bytes.end.min(PAGES * PAGE) } else { bytes };
                for page in 0..PAGES {
                    let whole = bytes.start <= page * PAGE && (page + 1) * PAGE <= bytes.end;
                    let any = bytes.start < (page + 1) * PAGE && page * PAGE < bytes.end && !bytes.is_empty();
                    let slot = &mut table[page as usize];
                    match op {
                        Op::Add if whole && slot.is_none() => *slot = Some(0),
                        Op::Remove if any => *slot = None,
                        Op::SetNode(node) if any && slot.is_some() => *slot = Some(node),
                        _ => {}
                    }
                }
                match op {
                    Op::Add => list.add(bytes).unwrap(),
                    Op::Remove => list.remove(bytes).unwrap(),
                    Op::SetNode(node) => list.set_node(bytes, node).unwrap(),
                }
            }
            let mut expected: Vec<MemRange> = Vec::new();
            for (page, node) in (0..).zip(table) {
                let Some(node) = node else { continue };
                let (start, end) = (PhysAddr(page * PAGE), PhysAddr((page + 1) * PAGE));
                match expected.last_mut() {
                    Some(last) if last.end == start && last.node == node => last.end = end,
                    _ => expected.push(MemRange { start, end, node }),
                }
            }
            prop_assert_eq!(list.ranges(), &expected[..]);
        }
    }

    #[test]
    fn a_full_list_stays_as_it_is() {
        let mut list = Memblock::<2>::new();
        list.add(0..8 * PAGE).unwrap();
        list.remove(2 * PAGE..3 * PAGE).unwrap();
        let before = list.clone();
        assert_eq!(
            list.remove(5 * PAGE..6 * PAGE),
            Err(InitError::TooManyRanges)
        );
        assert_eq!(list.set_node(0..PAGE, 1), Err(InitError::TooManyRanges));
        assert_eq!(list.add(9 * PAGE..10 * PAGE), Err(InitError::TooManyRanges));
        assert_eq!(list.ranges(), before.ranges());
        // Between the two there is room: they become one.
        list.add(0..8 * PAGE).unwrap();
        assert_eq!(list.ranges().len(), 1);
    }

    #[test]
    fn the_end_of_addresses_is_one() {
        let mut list = Memblock::<4>::new();
        list.add(u64::MAX - PAGE..u64::MAX).unwrap();
        list.add(u64::MAX..u64::MAX).unwrap();
        assert!(list.ranges().is_empty());
        list.add(0..u64::MAX).unwrap();
        list.remove(PAGE..u64::MAX).unwrap();
        assert_eq!(list.ranges()[0].end.0, PAGE);
        assert_eq!(list.ranges().len(), 1);
    }
}
