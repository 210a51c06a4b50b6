//! Linux's pages: for each page frame who has it in the recording, and which page of ours stands for it.
//!
//! One word a page, so that an event needs one look:
//!
//! | bits | what |
//! |---|---|
//! | 0–31 | our page frame that stands for this page |
//! | 32–41 | how far it is from the head of its block |
//! | 42–45 | the block's order |
//! | 46–49 | [`Holder`]; 0 is nobody |
//!
//! Linux may free a part of a block (it splits huge pages; drivers give back what they do not need of a large
//! block). Ours is freed when the last part is: `parts` counts what is still out.

use alloc::vec;
use alloc::vec::Vec;
use core::marker::PhantomData;

use crate::{FxHashMap, FxHashSet};

use crate::handles::{OwnedBlock, Purpose, Token};

/// Who has a page of Linux.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Holder {
    /// It is free.
    Nobody = 0,
    /// Ours, one for each [`Purpose`].
    Bare = 1,
    /// Ours: anonymous.
    Anon = 2,
    /// Ours: file cache.
    File = 3,
    /// Ours: a page table.
    PageTable = 4,
    /// Ours, bare: a slab of Linux whose objects are not replayed, from before the recording or in one of pages only.
    OldSlab = 5,
    /// Reserved here as there, for good.
    Reserved = 6,
    /// A slab of Linux in a recording whose objects are replayed: not ours, its objects stand for it.
    Slab = 7,
    /// Taken before there was an allocator, as far as we can tell; left alone.
    Unseen = 8,
    /// Our allocation failed.
    Failed = 9,
}

impl Holder {
    const ALL: [Holder; 10] = [
        Holder::Nobody,
        Holder::Bare,
        Holder::Anon,
        Holder::File,
        Holder::PageTable,
        Holder::OldSlab,
        Holder::Reserved,
        Holder::Slab,
        Holder::Unseen,
        Holder::Failed,
    ];

    /// Who has pages for this purpose.
    #[inline]
    pub fn of(purpose: Purpose) -> Holder {
        Holder::ALL[purpose as usize + 1]
    }

    /// Does a block of ours stand for it?
    #[inline]
    pub fn is_ours(self) -> bool {
        matches!(
            self,
            Holder::Bare | Holder::Anon | Holder::File | Holder::PageTable | Holder::OldSlab
        )
    }
}

/// A page's word.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(transparent)]
struct Entry(u64);

impl Entry {
    const NONE: Entry = Entry(0);

    #[inline]
    fn new(holder: Holder, order: u8, offset: u32, pfn: u32) -> Entry {
        Entry(
            u64::from(pfn)
                | u64::from(offset) << 32
                | u64::from(order) << 42
                | (holder as u64) << 46,
        )
    }

    #[inline]
    fn ours(self) -> u32 {
        self.0 as u32
    }

    #[inline]
    fn offset(self) -> u32 {
        (self.0 >> 32) as u32 & 0x3ff
    }

    #[inline]
    fn order(self) -> u8 {
        (self.0 >> 42) as u8 & 0xf
    }

    #[inline]
    fn holder(self) -> Holder {
        Holder::ALL[(self.0 >> 46) as usize & 0xf]
    }
}

/// What a free of Linux meant here.
#[derive(Debug)]
pub struct Freed<B> {
    /// Blocks of ours that are to be freed now: the first, and if there are more the others. With who had them, and the order.
    pub first: Option<(B, Holder, u8)>,
    /// The others.
    pub more: Vec<(B, Holder, u8)>,
    /// Pages by what they were: nobody's, not ours (slabs whose objects are replayed), reserved.
    pub unknown: u32,
    /// Not ours.
    pub not_ours: u32,
    /// Reserved.
    pub reserved: u32,
    /// Pages that are freed with a block that is still out in part.
    pub in_part: u32,
}

impl<B> Default for Freed<B> {
    fn default() -> Self {
        Freed {
            first: None,
            more: Vec::new(),
            unknown: 0,
            not_ours: 0,
            reserved: 0,
            in_part: 0,
        }
    }
}

impl<B> Freed<B> {
    fn push(&mut self, block: (B, Holder, u8)) {
        if self.first.is_none() {
            self.first = Some(block);
        } else {
            self.more.push(block);
        }
    }
}

/// All pages of Linux.
pub struct Pages<B = OwnedBlock> {
    entries: Vec<Entry>,
    /// Blocks of which a part was freed: by our head, how many pages are still out.
    parts: FxHashMap<u32, u32>,
    /// It holds blocks, as numbers.
    _blocks: PhantomData<B>,
}

impl<B: Token> Pages<B> {
    /// So many, all free.
    pub fn new(pages: usize) -> Pages<B> {
        Pages {
            // Zeroed by the system, page by page as it is touched.
            entries: vec![Entry::NONE; pages],
            parts: FxHashMap::default(),
            _blocks: PhantomData,
        }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Are there none?
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Who has this page.
    #[inline]
    pub fn holder(&self, pfn: u32) -> Holder {
        self.entries
            .get(pfn as usize)
            .map_or(Holder::Nobody, |e| e.holder())
    }

    /// Is a page of this block taken?
    #[inline]
    pub fn is_taken(&self, pfn: u32, order: u8) -> bool {
        let range = pfn as usize..pfn as usize + (1 << order);
        self.entries[range].iter().any(|&e| e != Entry::NONE)
    }

    /// A block of ours stands for these pages from now on.
    #[inline]
    pub fn put(&mut self, pfn: u32, order: u8, holder: Holder, block: B) {
        debug_assert!(holder.is_ours());
        let ours = block.into_raw();
        self.fill(pfn, order, holder, ours);
    }

    /// These pages are taken, and nothing of ours stands for them.
    #[inline]
    pub fn mark(&mut self, pfn: u32, order: u8, holder: Holder) {
        debug_assert!(!holder.is_ours());
        self.fill(pfn, order, holder, 0);
    }

    #[inline]
    fn fill(&mut self, pfn: u32, order: u8, holder: Holder, ours: u32) {
        let start = pfn as usize;
        for (i, entry) in self.entries[start..start + (1 << order)]
            .iter_mut()
            .enumerate()
        {
            *entry = Entry::new(holder, order, i as u32, ours + i as u32);
        }
    }

    /// Linux freed this block, or must have.
    #[inline]
    pub fn take(&mut self, pfn: u32, order: u8) -> Freed<B> {
        let entry = self.entries[pfn as usize];
        let whole = entry.offset() == 0 && entry.order() == order && entry.holder().is_ours();
        if whole && (self.parts.is_empty() || !self.parts.contains_key(&entry.ours())) {
            let start = pfn as usize;
            self.entries[start..start + (1 << order)].fill(Entry::NONE);
            // SAFETY: `put` took this page frame out of its block; with the entries gone this is the only way back.
            let block = unsafe { B::from_raw(entry.ours()) };
            return Freed {
                first: Some((block, entry.holder(), order)),
                ..Freed::default()
            };
        }
        self.take_parts(pfn, order)
    }

    /// Page by page.
    #[inline(never)]
    fn take_parts(&mut self, pfn: u32, order: u8) -> Freed<B> {
        let mut freed = Freed::default();
        for page in pfn as usize..pfn as usize + (1 << order) {
            let entry = core::mem::replace(&mut self.entries[page], Entry::NONE);
            match entry.holder() {
                Holder::Nobody => freed.unknown += 1,
                Holder::Slab | Holder::Unseen | Holder::Failed => freed.not_ours += 1,
                Holder::Reserved => {
                    self.entries[page] = entry;
                    freed.reserved += 1;
                }
                holder => {
                    let head = entry.ours() - entry.offset();
                    let size = 1 << entry.order();
                    let left = if size == 1 {
                        0
                    } else {
                        let left = self.parts.entry(head).or_insert(size);
                        *left -= 1;
                        *left
                    };
                    if left == 0 {
                        self.parts.remove(&head);
                        // SAFETY: the entry of the block's last page is gone, and `put` put in no more than there are.
                        let block = unsafe { B::from_raw(head) };
                        freed.push((block, holder, entry.order()));
                    } else {
                        freed.in_part += 1;
                    }
                }
            }
        }
        freed
    }

    /// The pages around one that were handed out with it and belong to nobody else: the whole block of a page.
    pub fn block_of(&self, pfn: u32) -> Option<(u32, u8)> {
        let entry = *self.entries.get(pfn as usize)?;
        (entry != Entry::NONE).then(|| (pfn - entry.offset(), entry.order()))
    }

    /// The heads of our blocks that stand for pages of this holder, in part at least.
    pub fn heads_of(&self, holder: Holder) -> FxHashSet<u32> {
        let of = self.entries.iter().filter(|e| e.holder() == holder);
        of.map(|e| e.ours() - e.offset()).collect()
    }

    /// Takes everything that is left of ours.
    pub fn take_all(&mut self, mut free: impl FnMut(B)) -> u64 {
        let mut blocks = 0;
        for page in 0..self.entries.len() {
            let entry = self.entries[page];
            if !entry.holder().is_ours() {
                continue;
            }
            let freed = self.take_parts(page as u32, 0);
            if let Some((block, _, _)) = freed.first {
                free(block);
                blocks += 1;
            }
        }
        blocks
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(pfn: u32) -> OwnedBlock {
        // SAFETY: nothing is ever done with it here.
        unsafe { OwnedBlock::from_raw(pfn) }
    }

    fn heads(freed: Freed<OwnedBlock>) -> Vec<u32> {
        freed
            .first
            .into_iter()
            .chain(freed.more)
            .map(|(b, _, _)| b.into_raw())
            .collect()
    }

    #[test]
    fn whole_blocks() {
        let mut pages = Pages::new(64);
        pages.put(8, 3, Holder::File, block(1000));
        assert!(pages.is_taken(0, 4) && !pages.is_taken(0, 3));
        assert_eq!(pages.block_of(13), Some((8, 3)));
        assert_eq!(heads(pages.take(8, 3)), [1000]);
        assert!(!pages.is_taken(8, 3));
        assert_eq!(pages.take(8, 3).unknown, 8);
    }

    #[test]
    fn parts_of_a_block() {
        let mut pages = Pages::new(64);
        pages.put(8, 2, Holder::Bare, block(100));
        assert_eq!(pages.take(9, 0).in_part, 1);
        // Linux hands the page out again while the rest of the block is still there.
        pages.put(9, 0, Holder::Anon, block(7));
        let rest = pages.take(10, 1);
        assert_eq!((rest.in_part, rest.first.is_none()), (2, true));
        assert_eq!(heads(pages.take(8, 0)), [100]);
        assert_eq!(heads(pages.take(9, 0)), [7]);
        assert!(pages.parts.is_empty());
    }

    #[test]
    fn single_pages_freed_as_one() {
        let mut pages = Pages::new(64);
        for i in 0..3 {
            pages.put(16 + i, 0, Holder::Bare, block(100 + i));
        }
        pages.mark(19, 0, Holder::Slab);
        let freed = pages.take(16, 2);
        assert_eq!(freed.not_ours, 1);
        assert_eq!(heads(freed), [100, 101, 102]);
    }

    #[test]
    fn reserved_stays() {
        let mut pages = Pages::new(64);
        pages.mark(0, 1, Holder::Reserved);
        assert_eq!(pages.take(0, 1).reserved, 2);
        assert_eq!(pages.holder(1), Holder::Reserved);
        pages.put(4, 1, Holder::Anon, block(50));
        let mut n = 0;
        assert_eq!(pages.take_all(|b| n += b.into_raw()), 1);
        assert_eq!(n, 50);
    }
}
