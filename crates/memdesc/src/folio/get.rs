//! From a page number to a reference, without a lock: look up, guess, look again, confirm.
//!
//! A word may lead to a descriptor whose pages were freed, and had by another, since it was read. What makes it safe to try all
//! the same: descriptors are type-stable under RCU (rule 6), so what the word led to is a folio as long as the read section is
//! open, free or somebody's; its counts are zero while it is free; and when a guess could be added and the page still leads here, it
//! is this page's folio, stays so as long as the guess is there, and the guess becomes a reference.
//!
//! Source: `folio_try_get`, `filemap_get_entry`, `gup_fast_folio` of Linux.

use core::ops::Deref;
use core::ptr::NonNull;

use crate::address::Pfn;
use crate::desc::{Folio, FolioFlags, Held, Put, Taken};
use crate::memmap::{Found, PageType, Word};
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

impl<'m, P: Platform> FolioRef<'m, P> {
    /// Takes over a reference that the caller has.
    ///
    /// # Safety
    ///
    /// `head` is the first page of `folio`, and a reference to it the caller's, who forgets it.
    pub(crate) unsafe fn adopt(mm: &'m Mm<P>, head: Pfn, folio: &Folio) -> FolioRef<'m, P> {
        FolioRef {
            mm,
            head,
            folio: NonNull::from(folio),
        }
    }

    /// Gives the reference to the caller, who puts it one day: the folio's first page.
    pub(crate) fn into_head(self) -> Pfn {
        let head = self.head;
        core::mem::forget(self);
        head
    }

    /// The folio's first page.
    pub fn head(&self) -> Pfn {
        self.head
    }

    /// How large it is. The reference keeps it from being split.
    pub fn order(&self) -> usize {
        self.mm.pages.map.word(self.head).load_owned().order()
    }

    /// Is it anonymous?
    pub fn is_anon(&self) -> bool {
        self.mm.pages.map.word(self.head).load_owned().kind() == PageType::Anon
    }

    /// Is it a file's? (A driver's, a network pool's and a device's pages are neither.)
    pub fn is_file(&self) -> bool {
        self.mm.pages.map.word(self.head).load_owned().kind() == PageType::File
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
        let got = self.counts().try_get(Held::REF);
        assert!(got, "four million references to one folio");
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
        let folio = unsafe { self.folio.as_ref() };
        self.mm.folio_put(folio, self.head, Held::REF);
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
    /// Any, an NMI included. A guess that was wrong may be the last to let go, and frees as [`free_pages_nolock`](Self::free_pages_nolock) does.
    pub fn folio_get(&self, pfn: Pfn) -> Option<FolioRef<'_, P>> {
        let (head, folio) = self.folio_take(pfn, Held::REF, || true)?;
        // SAFETY: just taken.
        Some(unsafe { FolioRef::adopt(self, head, folio) })
    }

    /// Takes a reference or a pin of the folio that this page is part of, if `still` says that the caller is where he thinks he is: asked when
    /// the folio cannot go any more.
    pub(crate) fn folio_take(
        &self,
        pfn: Pfn,
        what: Held,
        still: impl FnOnce() -> bool,
    ) -> Option<(Pfn, &Folio)> {
        let _read = self.rcu_read_lock();
        let found @ Found { head, word } = self.pages.map.lookup(pfn)?;
        if !word.is_counted() {
            return None;
        }
        // Type-stable until `_read` goes: a folio, though perhaps no longer this page's.
        let folio = self.folio_at(word.desc());
        crate::inject::point("folio_get: looked up");
        // If it still leads here now, it does so as long as the guess is there. Else the guess is about another page's folio.
        let still = || {
            crate::inject::point("folio_get: guessed");
            let still = self.pages.map.lookup(pfn) == Some(found) && still();
            crate::inject::point("folio_get: looked again");
            still
        };
        match folio.counts().take(what, still) {
            Taken::Yes => Some((head, folio)),
            Taken::No => None,
            Taken::Last => {
                // Perhaps in an interrupt.
                let head = folio.going();
                let word = self.pages.map.word(head).load_owned();
                if self.goes_back(head, word) && self.lru_try_forget(head) {
                    self.pages.free_block_nolock(word.kind(), head, word);
                }
                None
            }
        }
    }

    /// Lets go of what the caller has of a folio; who is the last frees it.
    #[inline]
    pub(crate) fn folio_put(&self, folio: &Folio, head: Pfn, what: Held) {
        if folio.put_counts(what, head) == Put::Last {
            self.folio_release(head);
        }
    }

    /// A folio that nobody has any more goes back (`__folio_put`).
    #[cold]
    #[inline(never)]
    pub(crate) fn folio_release(&self, head: Pfn) {
        let word = self.pages.map.word(head).load_owned();
        if !self.goes_back(head, word) {
            return;
        }
        let folio = self.folio_at(word.desc());
        if folio.has_flag(FolioFlags::LRU) {
            self.lru_forget(head);
        }
        debug_assert!(self.tails_are_unmapped(head, word.order()));
        self.take_back(self.pages.free_path(), head, word);
    }

    /// Nobody has these pages any more. Do they go back to the page allocator? Those of a pool go there, those of a device are not ours. From any context.
    pub(crate) fn goes_back(&self, head: Pfn, word: Word) -> bool {
        match word.kind() {
            PageType::NetPool => self.page_pool_return(head, word),
            PageType::Device => self.device_return(head, word),
            PageType::Yours => {
                self.own_freed(word);
                return true;
            }
            _ => return true,
        }
        false
    }
}
