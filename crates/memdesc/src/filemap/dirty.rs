//! What is dirty, and writing it back.

use core::ops::RangeInclusive;

use super::mapping::{FileError, Mapping, MappingCore};
use crate::address::{PAGE_SIZE, Pfn};
use crate::desc::{Folio, FolioFlags};
use crate::mm::Mm;
use crate::platform::Platform;
use crate::xarray::Mark;

impl<P: Platform> Mapping<'_, P> {
    /// Writes back what is dirty among these pages of the file (`filemap_write_and_wait_range`); says how many folios that were.
    ///
    /// # Errors
    ///
    /// The first that could not be written; it and those after it stay dirty. [`FileError::Io`] also if something was lost before it could be
    /// written ([`Mm::memory_failure`]), once.
    pub fn writeback(&self, range: RangeInclusive<u64>) -> Result<usize, FileError> {
        let (start, end) = range.into_inner();
        let end = end.min(crate::xarray::MAX_INDEX);
        let (mut at, mut written) = (start, 0);
        while at <= end
            && let Some(folio) = self
                .mm
                .filemap_next(self.core(), at..=end, Some(Mark::Dirty))
        {
            let locked = self.mm.folio_lock(&folio);
            at = folio.index() + (1 << folio.order());
            if self.mm.folio_mapping(&folio) == 0 {
                continue;
            }
            written += usize::from(self.mm.folio_write(self.core(), &folio, folio.head())?);
            drop(locked);
        }
        // And what somebody else is writing.
        at = start;
        while at <= end
            && let Some(folio) = self
                .mm
                .filemap_next(self.core(), at..=end, Some(Mark::Writeback))
        {
            self.mm.folio_wait_writeback(&folio);
            at = folio.index() + (1 << folio.order());
        }
        self.check_errors()?;
        Ok(written)
    }

    /// Is anything dirty?
    pub fn is_dirty(&self) -> bool {
        self.core().pages.any_marked(Mark::Dirty)
    }
}

impl<P: Platform> Mm<P> {
    /// A file's folio was written to (`folio_mark_dirty`). The caller has it locked, or something that counts as a mapping of it; so it stays in its
    /// mapping.
    pub(crate) fn folio_mark_dirty(&self, folio: &Folio, _head: Pfn) {
        if folio.set_flag(FolioFlags::DIRTY) {
            return;
        }
        let handle = self.folio_mapping(folio);
        if handle == 0 {
            return;
        }
        // SAFETY: the folio stays in its mapping, so that stays.
        let mapping = unsafe { self.mapping_at(handle).as_ref() };
        self.with_index(mapping, |tree| {
            // Cleaned again meanwhile?
            if folio.has_flag(FolioFlags::DIRTY) {
                tree.set_mark(folio.index(), Mark::Dirty);
            }
        });
    }

    /// Writes a locked folio back if it is dirty, and waits for it; says whether it was (`folio_clear_dirty_for_io`, `writepage`).
    pub(crate) fn folio_write(
        &self,
        mapping: &MappingCore,
        folio: &Folio,
        head: Pfn,
    ) -> Result<bool, FileError> {
        // First the flag, then the entries: a fault sets the flag and lets the user write under the lock of the table, without the folio's. If its entry
        // comes before we look at that table, it is cleaned here and what is written through it goes to disk now; if it comes after, the
        // flag is set again. (Linux: faults lock the folio to make it dirty.)
        let flagged = self.with_index(mapping, |tree| {
            // Never without both marks: who waits for all that was dirty finds one of them.
            folio.set_flag(FolioFlags::WRITEBACK);
            tree.set_mark(folio.index(), Mark::Writeback);
            tree.clear_mark(folio.index(), Mark::Dirty);
            folio.clear_flag(FolioFlags::DIRTY)
        });
        let done = |result| {
            self.with_index(mapping, |tree| {
                tree.clear_mark(folio.index(), Mark::Writeback);
            });
            self.folio_clear_and_wake(folio, FolioFlags::WRITEBACK);
            result
        };
        crate::inject::point("folio_write: flag cleared");
        // Users that have it mapped to write: from now on the next write is noticed again. What the entries noted counts.
        if self.rmap_clean(folio, head) == 0 && !flagged {
            return done(Ok(false));
        }
        let order = self.pages.map.word(head).load_owned().order();
        // SAFETY: the folio's pages, which stay its own while it is locked. Whoever writes to them meanwhile makes it dirty again.
        let pages =
            unsafe { core::slice::from_raw_parts(self.page_address(head), PAGE_SIZE << order) };
        // SAFETY: it lives as long as the mapping.
        let result = unsafe { &*mapping.ops }.writepage(folio.index(), pages);
        if result.is_err() {
            self.folio_mark_dirty(folio, head);
        }
        done(result.map(|()| true))
    }
}
