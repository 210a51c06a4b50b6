//! Moving folios that are in use: unmap, freeze, move, map again.
//!
//! While it moves, the entries that mapped it say so, and who needs it waits. What is pinned, or had by anyone but its mapping and its
//! users, stays where it is.
//!
//! Source: `migrate_folios`, `migrate_folio_unmap`, `migrate_folio_move` of Linux.

use crate::address::Pfn;
use crate::desc::{Folio, FolioFlags, Held, Place};
use crate::error::AllocError;
use crate::folio::FolioRef;
use crate::memmap::PageType;
use crate::mm::Mm;
use crate::mmap::Unmap;
use crate::page_alloc::alloc::Descriptors;
use crate::platform::Platform;
use crate::stats::Event;

impl<P: Platform> Mm<P> {
    /// Moves a folio that the caller has isolated (no LRU list has it, one reference is his) to bare pages of the same order, which are
    /// his. On success `head`'s pages are bare and his instead.
    pub(crate) fn migrate_isolated(&self, folio: &Folio, head: Pfn, to: Pfn) -> bool {
        let Some(locked) = self.folio_trylock(folio) else {
            return false;
        };
        // What is broken is not copied. Who notes that it is waits for the folio's lock then: either we see the note, or he finds it moved.
        if folio.has_flag(FolioFlags::WRITEBACK)
            || self.pages.map.bad.is_deadly(head, self.order_of(head))
        {
            return false;
        }
        let handle = self.folio_mapping(folio);
        let file = self.pages.map.word(head).load_owned().kind() == PageType::File;
        let private = matches!(folio.place(), Place::Private(_));
        let held = Held::new(
            1 + u32::from(file && handle != 0) + u32::from(private),
            0,
            0,
        );
        let family = self.rmap_family(folio, head);
        let unmapped = self.rmap_unmap(folio, head, Unmap::Move, family.as_ref());
        crate::inject::point("migrate: unmapped");
        if !unmapped || !folio.counts().freeze(held) {
            self.rmap_restore(folio, head, head, family.as_ref());
            return false;
        }
        self.move_frozen(head, to);
        if let Place::Head(_) = folio.place() {
            folio.set_place(Place::Head(to));
        }
        if file && handle != 0 {
            // SAFETY: a locked folio that belongs to a mapping keeps it.
            let mapping = unsafe { self.mapping_at(handle).as_ref() };
            self.filemap_moved(mapping, folio.index(), to);
        }
        folio.counts().unfreeze(held);
        self.rmap_restore(folio, to, head, family.as_ref());
        drop(locked);
        let pin = self.pages.pin();
        self.pages
            .stats(&pin)
            .add(&pin, Event::PgMigrateSuccess, 1 << self.order_of(to));
        true
    }

    pub(crate) fn order_of(&self, head: Pfn) -> usize {
        self.pages.map.word(head).load_owned().order()
    }

    /// Moves the folio that this page is part of somewhere else (`migrate_pages` of one folio): the caller gets its old pages, bare.
    ///
    /// # Errors
    ///
    /// [`AllocError::Busy`] if it is none that can be moved now: not in a list, locked, under writeback, pinned, had by somebody; else no memory.
    pub(crate) fn migrate_away(
        &self,
        page: Pfn,
        target: impl FnOnce(usize) -> Result<Pfn, AllocError>,
    ) -> Result<Pfn, AllocError> {
        let taken = self.folio_get(page).ok_or(AllocError::Busy)?;
        let to = target(taken.order())?;
        let result = self.migrate_to(taken, to);
        if result.is_err() {
            // SAFETY: still ours, bare.
            unsafe { self.free_pages(to) };
        }
        result
    }

    /// Moves a folio to these bare pages of the caller's, of the same order; he gets the old ones (`migrate_folio`).
    ///
    /// # Safety
    ///
    /// `to` is the head of bare pages that the caller owns. If this succeeds they are the folio's, and the pages in the result his.
    ///
    /// # Context
    ///
    /// May sleep.
    ///
    /// # Errors
    ///
    /// [`AllocError::Busy`]: see there. Everything is as it was then.
    pub unsafe fn migrate_folio(&self, page: Pfn, to: Pfn) -> Result<Pfn, AllocError> {
        let taken = self.folio_get(page).ok_or(AllocError::Busy)?;
        self.migrate_to(taken, to)
    }

    fn migrate_to(&self, taken: FolioRef<'_, P>, to: Pfn) -> Result<Pfn, AllocError> {
        let target = self.pages.map.word(to).load_owned();
        if target.kind() != PageType::Bare || target.order() != taken.order() {
            return Err(AllocError::BadOrder);
        }
        let head = taken.into_head();
        let folio = self.folio_of(head);
        if !self.lru_isolate(folio, head) {
            self.folio_put(folio, head, Held::REF);
            return Err(AllocError::Busy);
        }
        let moved = self.migrate_isolated(folio, head, to);
        let now = if moved { to } else { head };
        self.lru_insert(folio, now, false);
        self.folio_put(folio, now, Held::REF);
        if moved {
            Ok(head)
        } else {
            Err(AllocError::Busy)
        }
    }

    /// Splits the folio that the caller has a reference to into folios of order `to` (`split_folio`); he keeps the first.
    ///
    /// # Context
    ///
    /// May sleep.
    ///
    /// # Errors
    ///
    /// [`AllocError::Busy`] if others have it, or it is no larger; no memory for the descriptors. Everything is as it was then.
    pub fn split_folio(&self, taken: &FolioRef<'_, P>, to: usize) -> Result<(), AllocError> {
        let (head, folio) = (taken.head(), &**taken);
        if !taken.is_file() && !taken.is_anon() {
            return Err(AllocError::Busy);
        }
        assert!(self.is_head_of(folio, head), "another memory manager's");
        let _locked = self.folio_lock(folio);
        if self.order_of(head) <= to {
            return Err(AllocError::Busy);
        }
        let handle = self.folio_mapping(folio);
        if taken.is_file() {
            if handle == 0 {
                return Err(AllocError::Busy);
            }
            self.folio_wait_writeback(folio);
            // SAFETY: a locked folio that belongs to a mapping keeps it.
            let mapping = unsafe { self.mapping_at(handle).as_ref() };
            return self.filemap_split(mapping, folio, head, to);
        }
        self.split_anon(folio, head, to)
    }

    /// Of an anonymous folio, locked.
    fn split_anon(&self, folio: &Folio, head: Pfn, to: usize) -> Result<(), AllocError> {
        let parts = 1usize << (self.order_of(head) - to);
        let mut spare = self.split_descriptors(PageType::Anon, parts - 1)?;
        let listed = self.lru_isolate(folio, head);
        let family = self.rmap_family(folio, head);
        let unmapped = self.rmap_unmap(folio, head, Unmap::Move, family.as_ref());
        if !unmapped || !folio.counts().freeze(Held::REF) {
            self.rmap_restore(folio, head, head, family.as_ref());
            if listed {
                self.lru_insert(folio, head, false);
            }
            self.put(spare);
            return Err(AllocError::Busy);
        }
        // One that was too new to be in a list when we looked may be in one by now; nobody else isolates it any more.
        let listed = self.lru_isolate(folio, head) || listed;
        self.split_frozen(head, to, &mut spare);
        for part in self.parts(head, parts, to) {
            let new = self.folio_of(part);
            new.counts().unfreeze(Held::REF);
            self.rmap_restore(new, part, part, family.as_ref());
            if listed {
                self.lru_insert(new, part, false);
            }
            if part != head {
                self.folio_clear_and_wake(new, FolioFlags::LOCKED);
                // Their users have them, if there are any.
                self.folio_put(new, part, Held::REF);
            }
        }
        Ok(())
    }
}
