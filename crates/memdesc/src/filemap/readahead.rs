//! Reading in, and ahead: a file that is read in order is read in ever larger pieces, of ever larger folios.
//!
//! The window doubles from 4 pages to 512 while reading goes on where the last window ended; a folio in its middle carries a mark, and
//! whoever reaches it brings in the next window. Elsewhere a single page is read.
//!
//! Source: `page_cache_ra_order`, `ondemand_readahead` of Linux.

use super::mapping::{FileError, Mapping, MappingCore};
use crate::address::{PAGE_SIZE, Pfn};
use crate::desc::{Folio, FolioFlags, Held};
use crate::gfp;
use crate::mm::Mm;
use crate::owner::FolioKind;
use crate::platform::Platform;
use crate::sync::atomic::Ordering;

const FIRST_WINDOW: u32 = 4;
const LARGEST_WINDOW: u32 = 512;
/// 2 MiB.
const LARGEST_ORDER: usize = 9;

impl<P: Platform> Mapping<'_, P> {
    /// The next read is ahead of what is cached from here on, and this large (`POSIX_FADV_WILLNEED`): brings it in as large folios as its
    /// place allows.
    ///
    /// # Errors
    ///
    /// Why the first page could not be had.
    pub fn will_need(&self, index: u64, pages: u32) -> Result<(), FileError> {
        let memcg = self.mm.active_memcg();
        self.mm
            .read_window(self.core(), index, pages, LARGEST_ORDER, memcg)
    }
}

impl<P: Platform> Mm<P> {
    /// Brings in the page that is wanted, and what is likely wanted next.
    pub(super) fn readahead(
        &self,
        mapping: &MappingCore,
        index: u64,
        memcg: u16,
    ) -> Result<(), FileError> {
        let sequential = mapping.ra_next.load(Ordering::Relaxed) == index;
        let before = mapping.ra_pages.load(Ordering::Relaxed);
        let window = match (sequential, before) {
            (true, 0) | (true, 1) => FIRST_WINDOW,
            (true, n) => (n * 2).min(LARGEST_WINDOW),
            (false, _) => 1,
        };
        mapping.ra_pages.store(window, Ordering::Relaxed);
        mapping
            .ra_next
            .store(index + u64::from(window), Ordering::Relaxed);
        // Folios a quarter of the window at most, so that the mark comes in its middle.
        let order = (window / 4).max(1).ilog2() as usize;
        self.read_window(mapping, index, window, order, memcg)
    }

    /// Brings in pages that are missing, in folios of up to `order`. An error counts for the first page only.
    fn read_window(
        &self,
        mapping: &MappingCore,
        index: u64,
        pages: u32,
        order: usize,
        memcg: u16,
    ) -> Result<(), FileError> {
        let memcg = match mapping.memcg.load(Ordering::Acquire) {
            0 => memcg,
            own => own,
        };
        let size = mapping.size.load(Ordering::Relaxed);
        let end = index.saturating_add(u64::from(pages)).min(size);
        if index >= end {
            return Err(FileError::End);
        }
        let middle = index + u64::from(pages / 2);
        let mut at = index;
        while at < end {
            let mut this = order
                .min(at.trailing_zeros() as usize)
                .min((end - at).ilog2() as usize);
            loop {
                match self.read_one(
                    mapping,
                    at,
                    this,
                    at <= middle && middle < at + (1 << this) && pages > 1,
                    memcg,
                ) {
                    Ok(()) => break,
                    // Something is there already: that is what was wanted, or a smaller folio fits.
                    Err(FileError::Alloc(crate::error::AllocError::Busy)) if this == 0 => break,
                    Err(FileError::Alloc(_)) if this > 0 => this = this.saturating_sub(2),
                    Err(why) if at == index => return Err(why),
                    // Ahead of the reader it does not matter.
                    Err(_) => return Ok(()),
                }
            }
            at += 1 << this;
        }
        Ok(())
    }

    /// Brings in one folio.
    fn read_one(
        &self,
        mapping: &MappingCore,
        index: u64,
        order: usize,
        mark: bool,
        memcg: u16,
    ) -> Result<(), FileError> {
        let flags = if order > 0 {
            gfp::GFP_HIGHUSER_MOVABLE | gfp::__GFP_NORETRY | gfp::__GFP_NOWARN
        } else {
            gfp::GFP_HIGHUSER_MOVABLE
        };
        let head = self.alloc_folio_memcg(flags, order, FolioKind::File, memcg)?;
        let folio = self.folio_of(head);
        let locked = self.folio_lock(folio);
        if let Err(why) = self.filemap_add(mapping, folio, head, order, index) {
            drop(locked);
            self.folio_put(folio, head, Held::REF);
            return Err(why.into());
        }
        if mark {
            folio.set_flag(FolioFlags::READAHEAD);
        }
        // The cache's reference keeps it as long as it is locked, since who removes it locks it.
        let result = self.read_in(mapping, folio, head);
        if result.is_ok() {
            self.folio_add_lru(folio, head);
        } else {
            self.filemap_remove_new(mapping, folio, head, locked);
            return result;
        }
        drop(locked);
        Ok(())
    }

    /// A folio that could not be read goes again.
    fn filemap_remove_new(
        &self,
        mapping: &MappingCore,
        folio: &Folio,
        head: Pfn,
        locked: crate::folio::FolioLock<'_, P>,
    ) {
        // Others may have found it, and wait for the lock.
        let kept = folio.counts().try_get(Held::REF);
        debug_assert!(kept);
        self.filemap_remove(mapping, folio, head);
        drop(locked);
        self.folio_put(folio, head, Held::REF);
    }

    /// Reads a locked folio's contents.
    pub(super) fn read_in(
        &self,
        mapping: &MappingCore,
        folio: &Folio,
        head: Pfn,
    ) -> Result<(), FileError> {
        let order = self.pages.map.word(head).load_owned().order();
        let ptr = self.page_address(head);
        // SAFETY: the pages are the folio's, which is locked and not up to date: nobody has them mapped, and nobody reads them.
        let pages = unsafe { core::slice::from_raw_parts_mut(ptr, PAGE_SIZE << order) };
        // SAFETY: it lives as long as the mapping.
        unsafe { &*mapping.ops }.read_folio(folio.index(), pages)?;
        folio.set_flag(FolioFlags::UPTODATE);
        Ok(())
    }
}
