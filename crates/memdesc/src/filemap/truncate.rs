//! A file gets shorter, and a large folio of a file smaller.

use super::mapping::{Mapping, MappingCore, NodesOf, entry_of};
use crate::address::{PAGE_SIZE, Pfn};
use crate::desc::{Folio, FolioFlags, Held, Place};
use crate::error::AllocError;
use crate::memmap::PageType;
use crate::mm::Mm;
use crate::mmap::Unmap;
use crate::page_alloc::alloc::Descriptors;
use crate::platform::Platform;
use crate::sync::atomic::Ordering;
use crate::xarray::{MAX_INDEX, Nodes, split_needs};

impl<P: Platform> Mapping<'_, P> {
    /// The file has so many pages from now on (`truncate_setsize`): what is cached of the rest goes, whoever maps it.
    pub fn truncate(&self, pages: u64) {
        self.mm.filemap_truncate(self.core(), pages);
    }
}

impl<P: Platform> Mm<P> {
    pub(super) fn filemap_truncate(&self, mapping: &MappingCore, pages: u64) {
        {
            // Who enters a folio looks at the size under this lock: he is seen below, or sees that the file is shorter.
            let _lock = self.i_pages(mapping);
            mapping.size.store(pages.min(MAX_INDEX), Ordering::Relaxed);
        }
        let mut at = pages;
        while at <= MAX_INDEX
            && let Some(folio) = self.filemap_next(mapping, at..=MAX_INDEX, None)
        {
            let locked = self.folio_lock(&folio);
            let (first, order) = (folio.index(), folio.order());
            if self.folio_mapping(&folio) == 0 {
                continue;
            }
            self.folio_wait_writeback(&folio);
            if first < pages {
                // Part of it stays. If it cannot be split, what is beyond the end reads zero, as Linux does it.
                if self
                    .filemap_split(mapping, &folio, folio.head(), 0)
                    .is_err()
                {
                    self.zero_from(folio.head(), (pages - first) as u32, order);
                    // Whoever has it mapped beyond the end faults, and learns of it.
                    self.rmap_unmap(&folio, folio.head(), Unmap::Drop, None);
                    at = first + (1 << order);
                }
                drop(locked);
                continue;
            }
            while !self.rmap_unmap(&folio, folio.head(), Unmap::Drop, None) {
                self.pages.platform.relax(63);
            }
            self.filemap_remove(mapping, &folio, folio.head());
            at = first + (1 << order);
        }
    }

    fn zero_from(&self, head: Pfn, page: u32, order: usize) {
        let pages = (1u32 << order) - page;
        let ptr = self.page_address(head.add(page));
        // SAFETY: the folio's pages, which the caller has locked; users may have them mapped, and see zeroes, as beyond every end of file.
        unsafe { ptr.write_bytes(0, PAGE_SIZE * pages as usize) };
    }

    /// Splits a locked file folio, of which the caller has the only reference besides the cache's, into folios of order `to`
    /// (`split_huge_page_to_order`). They are locked no longer, but the first, which stays the caller's.
    ///
    /// # Errors
    ///
    /// [`AllocError::Busy`] if others have it; no memory for descriptors or the index. Nothing has changed then but that nobody maps it.
    pub(crate) fn filemap_split(
        &self,
        mapping: &MappingCore,
        folio: &Folio,
        head: Pfn,
        to: usize,
    ) -> Result<(), AllocError> {
        let order = self.pages.map.word(head).load_owned().order();
        if to >= order || matches!(folio.place(), Place::Private(_)) {
            return Err(AllocError::Busy);
        }
        let parts = 1usize << (order - to);
        let mut spare = self.split_descriptors(PageType::File, parts - 1)?;
        let source = NodesOf(self);
        let mut nodes = Nodes::new(&source);
        if nodes.fill(split_needs(order as u32, to as u32)).is_err() {
            self.put(spare);
            return Err(AllocError::NoBlock);
        }
        let listed = self.lru_isolate(folio, head);
        let held = Held::new(2, 0, 0);
        let split = self.rmap_unmap(folio, head, Unmap::Drop, None) && {
            let _lock = self.i_pages(mapping);
            // SAFETY: the lock is held until the end of the block.
            let mut tree = unsafe { mapping.pages.locked(&mut nodes) };
            folio.counts().freeze(held) && {
                let first = folio.index();
                // One that was too new to be in a list when we looked may be in one by now.
                self.lru_isolate(folio, head);
                self.split_frozen(head, to, &mut spare);
                let entry = |index: u64| entry_of(head.add((index - first) as u32));
                let done = tree.split(first, order as u32, to as u32, entry);
                assert!(done.is_ok(), "the nodes are there: {done:?}");
                for part in self.parts(head, parts, to) {
                    let held = if part == head { held } else { Held::REF };
                    self.folio_of(part).counts().unfreeze(held);
                }
                true
            }
        };
        if !split {
            self.put(spare);
            if listed {
                self.lru_insert(folio, head, false);
            }
            return Err(AllocError::Busy);
        }
        for part in self.parts(head, parts, to) {
            let new = self.folio_of(part);
            // The cache keeps it as long as it is locked.
            self.lru_insert(new, part, false);
            if part != head {
                self.folio_clear_and_wake(new, FolioFlags::LOCKED);
            }
        }
        Ok(())
    }
}
