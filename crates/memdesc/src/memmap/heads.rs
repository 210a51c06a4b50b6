//! Which page heads a block: from a tail to its head, and from a range of pages to the blocks it is cut into.
//!
//! Pure functions over words, so that the model checker can run them on words of its own.

use super::word::Word;
use crate::address::{MAX_ORDER, Pfn};

/// What a lookup finds: which block a page belongs to, and its word.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Found {
    /// The first page of the block.
    pub head: Pfn,
    /// Its word.
    pub word: Word,
}

/// The possible heads of a page whose own word is zero, nearest first.
#[inline]
pub(crate) fn climb(pfn: Pfn, word: impl Fn(Pfn) -> Word) -> Option<Found> {
    for order in 1..=MAX_ORDER {
        let head = pfn.align_down(order);
        // The same page as one order down: nothing new to see.
        if head == pfn.align_down(order - 1) {
            continue;
        }
        let found = word(head);
        if !found.is_tail() {
            let head = head.align_down(found.order());
            let reaches = pfn.0 - head.0 < 1 << found.order();
            return reaches.then_some(Found { head, word: found });
        }
    }
    None
}

/// Cuts a range of pages into the largest naturally aligned blocks.
pub(crate) fn blocks(start: u32, end: u32) -> impl Iterator<Item = (Pfn, usize)> {
    let mut at = start;
    core::iter::from_fn(move || {
        if at >= end {
            return None;
        }
        let order = first_block_order(at, end);
        let block = (Pfn(at), order);
        at += 1 << order;
        Some(block)
    })
}

/// The order of the largest naturally aligned block that starts at `start` and ends by `end`.
pub(crate) fn first_block_order(start: u32, end: u32) -> usize {
    let aligned = if start == 0 {
        MAX_ORDER as u32
    } else {
        start.trailing_zeros()
    };
    let fits = (end - start).ilog2();
    aligned.min(fits).min(MAX_ORDER as u32) as usize
}

#[cfg(all(test, not(loom)))]
mod tests {
    extern crate std;
    use super::*;
    use crate::memmap::PageType;
    use std::vec::Vec;

    #[test]
    fn ranges_are_cut_into_aligned_blocks() {
        let cut: Vec<_> = blocks(3, 1029).map(|(p, o)| (p.0, o)).collect();
        assert_eq!(cut[..3], [(3, 0), (4, 2), (8, 3)]);
        assert_eq!(cut.iter().map(|&(_, o)| 1u32 << o).sum::<u32>(), 1026);
        assert!(cut.iter().all(|&(p, o)| Pfn(p).is_aligned(o)));
        assert_eq!(blocks(0, 4096).map(|(_, o)| o).collect::<Vec<_>>(), [10; 4]);
        assert_eq!(blocks(7, 7).count(), 0);
    }

    #[test]
    fn a_zero_word_leads_to_its_head() {
        let head = Word::inline(PageType::Reserved, 9, 0);
        let map = |p: Pfn| if p.0 == 512 { head } else { Word::ZERO };
        for pfn in 513..1024 {
            assert_eq!(climb(Pfn(pfn), map).unwrap().head, Pfn(512));
        }
        // A head that does not reach: an order-3 block at 512 says nothing about page 600.
        let small = |p: Pfn| {
            if p.0 == 512 {
                Word::inline(PageType::Reserved, 3, 0)
            } else {
                Word::ZERO
            }
        };
        assert!(climb(Pfn(519), small).is_some());
        assert!(climb(Pfn(600), small).is_none());
        assert!(climb(Pfn(511), small).is_none());
    }
}
