//! Look-up, and entering and removing folios.

use core::ops::RangeInclusive;

use super::mapping::{FileError, Mapping, MappingCore, NodesOf, entry_of, head_of};
use crate::address::Pfn;
use crate::desc::{Folio, FolioFlags, Held, Place};
use crate::error::AllocError;
use crate::folio::FolioRef;
use crate::mm::Mm;
use crate::platform::Platform;
use crate::sync::atomic::Ordering;
use crate::xarray::{Mark, Nodes, store_needs};

impl<'m, P: Platform> Mapping<'m, P> {
    /// The folio with this page of the file, read in if it was not there (`read_cache_folio`).
    ///
    /// # Errors
    ///
    /// Why it could not be had.
    pub fn get(&self, index: u64) -> Result<FolioRef<'m, P>, FileError> {
        self.mm
            .filemap_get(self.core(), index, self.mm.active_memcg())
    }

    /// The folio with this page of the file, if it is there (`filemap_get_folio`): a look-up without a lock.
    pub fn find(&self, index: u64) -> Option<FolioRef<'m, P>> {
        self.mm.filemap_find(self.core(), index)
    }

    /// Reads from the file through the cache (`filemap_read`).
    ///
    /// # Errors
    ///
    /// Why a page could not be had; the bytes before it have been copied.
    pub fn read(&self, offset: u64, to: &mut [u8]) -> Result<(), FileError> {
        self.each_folio(offset, to.len(), |mm, folio, at, range| {
            let part = &mut to[range];
            // SAFETY: the folio is ours to read as long as we have a reference; users may write to it meanwhile, as with every read(2).
            unsafe {
                core::ptr::copy(
                    mm.page_address(folio.head()).add(at),
                    part.as_mut_ptr(),
                    part.len(),
                )
            };
            mm.folio_mark_accessed(folio, folio.head());
        })
    }

    /// Writes to the file through the cache (`generic_perform_write`): the folios are dirty then.
    ///
    /// # Errors
    ///
    /// As [`read`](Self::read).
    pub fn write(&self, offset: u64, from: &[u8]) -> Result<(), FileError> {
        self.each_folio(offset, from.len(), |mm, folio, at, range| {
            let part = &from[range];
            let _locked = mm.folio_lock(folio);
            if mm.folio_mapping(folio) == 0 {
                // Truncated meanwhile: what is written to nowhere is gone, as if it had been written before.
                return;
            }
            mm.folio_wait_writeback(folio);
            // SAFETY: locked, and ours to write as long as we have a reference; users may have it mapped, as with every write(2).
            unsafe {
                core::ptr::copy(
                    part.as_ptr(),
                    mm.page_address(folio.head()).add(at),
                    part.len(),
                )
            };
            mm.folio_mark_dirty(folio, folio.head());
            mm.folio_mark_accessed(folio, folio.head());
        })
    }

    fn each_folio(
        &self,
        offset: u64,
        len: usize,
        mut each: impl FnMut(&Mm<P>, &FolioRef<'m, P>, usize, core::ops::Range<usize>),
    ) -> Result<(), FileError> {
        let mut done = 0;
        while done < len {
            let at = offset.checked_add(done as u64).ok_or(FileError::End)?;
            let folio = self.get(at / 4096)?;
            let from = (at - folio.index() * 4096) as usize;
            let part = ((4096usize << folio.order()) - from).min(len - done);
            each(self.mm, &folio, from, done..done + part);
            done += part;
        }
        Ok(())
    }
}

impl<P: Platform> Mm<P> {
    /// As [`Mapping::find`].
    pub(crate) fn filemap_find(
        &self,
        mapping: &MappingCore,
        index: u64,
    ) -> Option<FolioRef<'_, P>> {
        self.filemap_next(mapping, index..=index, None)
    }

    /// The first folio that has one of these pages, and the mark.
    pub(crate) fn filemap_next(
        &self,
        mapping: &MappingCore,
        range: RangeInclusive<u64>,
        mark: Option<Mark>,
    ) -> Option<FolioRef<'_, P>> {
        let mut round = 0;
        loop {
            let read = self.rcu_read_lock();
            // SAFETY: nodes are freed after a grace period of this memory manager's RCU.
            let reader = unsafe { mapping.pages.reader(&read) };
            let found = reader.find(*range.start(), *range.end(), mark)?;
            let head = head_of(found.entry);
            let still = || reader.get(found.index).is_some_and(|now| now == found);
            if let Some((at, folio)) = self.folio_take(head, Held::REF, still)
                && at == head
            {
                // SAFETY: just taken.
                return Some(unsafe { FolioRef::adopt(self, head, folio) });
            }
            // On its way out, or being moved or split: the index will tell.
            drop(read);
            self.pages.platform.relax(round);
            round += 1;
        }
    }

    /// As [`Mapping::get`]. What has to be brought in is charged to the mapping's group, or if it has none to `memcg`.
    pub(crate) fn filemap_get(
        &self,
        mapping: &MappingCore,
        index: u64,
        memcg: u16,
    ) -> Result<FolioRef<'_, P>, FileError> {
        loop {
            if index >= mapping.size.load(Ordering::Relaxed) {
                return Err(FileError::End);
            }
            let Some(folio) = self.filemap_find(mapping, index) else {
                self.readahead(mapping, index, memcg)?;
                continue;
            };
            if folio.has_flag(FolioFlags::READAHEAD) && folio.clear_flag(FolioFlags::READAHEAD) {
                // The reader is in the middle of what was read ahead: the next window, if there is memory.
                let _ = self.readahead(mapping, mapping.ra_next.load(Ordering::Relaxed), memcg);
            }
            if !folio.has_flag(FolioFlags::UPTODATE) {
                // Somebody reads it in, or failed to.
                let _locked = self.folio_lock(&folio);
                if self.folio_mapping(&folio) == 0 {
                    continue;
                }
                if !folio.has_flag(FolioFlags::UPTODATE) {
                    self.read_in(mapping, &folio, folio.head())?;
                }
            }
            return Ok(folio);
        }
    }

    /// Enters a new folio, which the caller has locked and alone has, at an index; the cache takes over his reference
    /// (`filemap_add_folio`).
    ///
    /// # Errors
    ///
    /// No memory for the index; [`AllocError::Busy`] if there is a folio. The reference is the caller's then.
    pub(super) fn filemap_add(
        &self,
        mapping: &MappingCore,
        folio: &Folio,
        head: Pfn,
        order: usize,
        index: u64,
    ) -> Result<(), AllocError> {
        let source = NodesOf(self);
        let mut nodes = Nodes::new(&source);
        nodes
            .fill(store_needs(index, order as u32))
            .map_err(|_| AllocError::NoBlock)?;
        folio.enter(self.mapping_handle(mapping), index);
        let stored = {
            let _lock = self.i_pages(mapping);
            // SAFETY: the lock is held until the end of the block.
            let mut tree = unsafe { mapping.pages.locked(&mut nodes) };
            let last = index + (1 << order) - 1;
            let free = tree.reader().find(index, last, None).is_none();
            let inside = last < mapping.size.load(Ordering::Relaxed);
            let stored = free
                && inside
                && tree
                    .store(index, order as u32, entry_of(head), |_| {})
                    .is_ok();
            if stored {
                mapping.nrpages.fetch_add(1 << order, Ordering::Relaxed);
            }
            stored
        };
        if !stored {
            folio.set_place(Place::Head(head));
            return Err(AllocError::Busy);
        }
        Ok(())
    }

    /// Takes a folio, which is locked, clean or not wanted any more, and mapped by nobody, out of its mapping, and the cache's reference with it
    /// (`filemap_remove_folio`).
    pub(crate) fn filemap_remove(&self, mapping: &MappingCore, folio: &Folio, head: Pfn) {
        self.detach_private(folio, head);
        let order = self.pages.map.word(head).load_owned().order();
        self.with_index(mapping, |tree| {
            let erased = tree.erase(folio.index());
            debug_assert!(erased.is_some_and(|found| head_of(found.entry) == head));
            mapping.nrpages.fetch_sub(1 << order, Ordering::Relaxed);
        });
        folio.clear_flag(FolioFlags::DIRTY);
        folio.set_place(Place::Head(head));
        self.folio_put(folio, head, Held::REF);
    }

    /// A locked folio, frozen, that belongs to the mapping is at other pages from now on.
    pub(crate) fn filemap_moved(&self, mapping: &MappingCore, index: u64, to: Pfn) {
        self.with_index(mapping, |tree| {
            let replaced = tree.replace(index, entry_of(to));
            debug_assert!(replaced.is_some());
        });
    }

    /// The same, if nobody has the folio but the cache and the caller: it is frozen then, and the caller's to free (`__remove_mapping`).
    pub(crate) fn filemap_remove_frozen(
        &self,
        mapping: &MappingCore,
        folio: &Folio,
        head: Pfn,
    ) -> bool {
        let order = self.pages.map.word(head).load_owned().order();
        let removed = self.with_index(mapping, |tree| {
            if folio.has_flag(FolioFlags::DIRTY) || !folio.counts().freeze(Held::new(2, 0, 0)) {
                return false;
            }
            let erased = tree.erase(folio.index());
            debug_assert!(erased.is_some_and(|found| head_of(found.entry) == head));
            mapping.nrpages.fetch_sub(1 << order, Ordering::Relaxed);
            true
        });
        // Once it is out of the index and that is unlocked, the mapping may go at any moment.
        if removed {
            folio.set_place(Place::Head(head));
        }
        removed
    }
}
