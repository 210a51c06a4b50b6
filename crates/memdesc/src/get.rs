//! From a page number to a reference, without a lock: look up, try, look again.
//!
//! A word may lead to a descriptor whose pages were freed, and had by another, since it was read. What makes it safe to try all
//! the same: descriptors are type-stable under RCU (rule 6), so what the word led to is a folio as long as the read section is
//! open, free or somebody's; its count is zero while it is free; and when the count could be raised and the page still leads here,
//! it is this page's folio, and stays.
//!
//! Source: `folio_try_get`, `filemap_get_entry`, `gup_fast_folio` of Linux.

use core::ops::Deref;
use core::ptr::NonNull;

use crate::address::Pfn;
use crate::desc::Folio;

use crate::mm::Mm;
use crate::platform::Platform;

/// A reference to a folio: as long as it lives, the pages stay the folio's. Dropping the last one frees them.
///
/// # Context
///
/// Dropped where [`free_pages`](Mm::free_pages) may be called.
pub struct FolioRef<'m, P: Platform> {
    mm: &'m Mm<P>,
    head: Pfn,
    folio: NonNull<Folio>,
}

// SAFETY: it is a counted reference to what is shared between CPUs by design.
unsafe impl<P: Platform> Send for FolioRef<'_, P> {}
// SAFETY: the same.
unsafe impl<P: Platform> Sync for FolioRef<'_, P> {}

impl<P: Platform> FolioRef<'_, P> {
    /// The folio's first page.
    pub fn head(&self) -> Pfn {
        self.head
    }
}

impl<P: Platform> Deref for FolioRef<'_, P> {
    type Target = Folio;
    fn deref(&self) -> &Folio {
        // SAFETY: our reference keeps the folio, and its descriptor with it.
        unsafe { self.folio.as_ref() }
    }
}

impl<P: Platform> Clone for FolioRef<'_, P> {
    fn clone(&self) -> Self {
        let got = self.try_get();
        debug_assert!(got, "we have a reference, so there is one");
        FolioRef {
            mm: self.mm,
            head: self.head,
            folio: self.folio,
        }
    }
}

impl<P: Platform> Drop for FolioRef<'_, P> {
    fn drop(&mut self) {
        // SAFETY: the reference is ours until the `put`.
        self.mm.put_folio(unsafe { self.folio.as_ref() });
    }
}

impl<P: Platform> core::fmt::Debug for FolioRef<'_, P> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("FolioRef")
            .field("head", &self.head)
            .field("folio", &**self)
            .finish()
    }
}

impl<P: Platform> Mm<P> {
    /// A reference to the folio that this page is part of, whoever has it and whatever happens to it meanwhile; `None` if it is part of
    /// none, or the folio is on its way out.
    ///
    /// # Context
    ///
    /// Any that may free pages: a reference that was had by mistake is put again, and may be the last.
    pub fn folio_get(&self, pfn: Pfn) -> Option<FolioRef<'_, P>> {
        let _read = crate::rcu::read_lock(self.pages.platform.rcu());
        let found = self.pages.map.lookup(pfn)?;
        if !found.word.is_folio() {
            return None;
        }
        // Type-stable until `_read` goes: a folio, though perhaps no longer this page's.
        let folio = self.folio_at(found.word.desc());
        crate::inject::point("folio_get: looked up");
        if !folio.try_get() {
            return None;
        }
        let got = FolioRef {
            mm: self,
            head: found.head,
            folio: NonNull::from(folio),
        };
        // If it still leads here now, it did so while we had the reference, and stays. Else the reference is another page's.
        (self.pages.map.lookup(pfn) == Some(found)).then_some(got)
    }

    /// Puts a reference; who puts the last one frees.
    pub(crate) fn put_folio(&self, folio: &Folio) {
        if folio.put() {
            let head = folio.going();
            let word = self.pages.map.word(head).load_owned();
            self.take_back(self.pages.free_path(), head, word);
        }
    }
}
