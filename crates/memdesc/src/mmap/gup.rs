//! Pages of users, for the kernel and for devices (`get_user_pages_fast`, `pin_user_pages_fast`): without a lock where that goes.
//!
//! The lockless walk reads tables that may go at any moment (they wait for its read section), an entry that may change, and the word of a page that
//! may be another's by now: so it guesses, looks again at entry and word, and confirms ([`Mm::folio_get`](crate::Mm::folio_get)). A fork that
//! takes the right to write away and then asks whether the page is pinned either hears of the guess or is seen in the entry.
//!
//! An anonymous page is pinned only while it is for nobody else: through an entry that may be written it is, through another it is seen under locks, and
//! what is shared is copied first (`FAULT_FLAG_UNSHARE`). Else a device would go on reading a page that its other user takes for his own.
//!
//! What is pinned is not moved, and not shared by a fork; what is only referenced may not be moved either, but shared.

use super::fault::{Access, FaultError};
use super::space::MmStruct;
use super::zap::PAGE;
use crate::address::Pfn;
use crate::desc::{Folio, Held};
use crate::error::AllocError;
use crate::folio::FolioRef;
use crate::memmap::PageType;
use crate::mm::Mm;
use crate::pgtable::{Entry, Prot};
use crate::platform::Platform;

/// A page of a user, referenced or pinned as long as this lives.
pub struct UserPages<'m, P: Platform> {
    mm: &'m Mm<P>,
    head: Pfn,
    page: Pfn,
    what: Held,
}

impl<'m, P: Platform> UserPages<'m, P> {
    /// The page.
    pub fn pfn(&self) -> Pfn {
        self.page
    }

    /// Its folio.
    pub fn folio(&self) -> &Folio {
        self.mm.folio_of(self.head)
    }

    /// It was written to: says so to the folio, if it is a file's (`unpin_user_pages_dirty_lock`).
    pub fn mark_dirty(&self) {
        if self.mm.pages.map.word(self.head).load_owned().kind() == PageType::File {
            let folio = self.folio();
            let _locked = self.mm.folio_lock(folio);
            self.mm.folio_mark_dirty(folio, self.head);
        }
    }
}

impl<P: Platform> Drop for UserPages<'_, P> {
    fn drop(&mut self) {
        self.mm.folio_put(self.folio(), self.head, self.what);
    }
}

impl<P: Platform> core::fmt::Debug for UserPages<'_, P> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("UserPages")
            .field("page", &self.page)
            .field("held", &self.what)
            .finish()
    }
}

impl<'m, P: Platform> MmStruct<'m, P> {
    /// A reference to the page at this address, which is brought in if need be (`get_user_pages_fast`).
    ///
    /// # Context
    ///
    /// May sleep, if the page has to be brought in.
    ///
    /// # Errors
    ///
    /// Why there is none. [`AllocError::Busy`] if there are four million of it, or sixteen thousand pins.
    pub fn get_user_page(&self, addr: u64, access: Access) -> Result<UserPages<'m, P>, FaultError> {
        self.take_page(addr, access, Held::REF)
    }

    /// The same for a device that reads or writes the page: it stays where it is, and a fork gives the child another
    /// (`pin_user_pages_fast`).
    ///
    /// # Context
    ///
    /// May sleep, if the page has to be brought in.
    ///
    /// # Errors
    ///
    /// Why there is none.
    pub fn pin_user_page(&self, addr: u64, access: Access) -> Result<UserPages<'m, P>, FaultError> {
        self.take_page(addr, access, Held::PIN)
    }

    fn take_page(
        &self,
        addr: u64,
        access: Access,
        what: Held,
    ) -> Result<UserPages<'m, P>, FaultError> {
        let mut round = 0;
        loop {
            if let Some(page) = self.try_user_page(addr, access, what) {
                return Ok(page);
            }
            if self.is_special(addr) {
                // Nothing to count it by (`-EFAULT` in Linux).
                return Err(FaultError::Bus);
            }
            // The fault says whether he may, and leaves an entry that lets him.
            self.handle_fault(addr, access)?;
            if what == Held::PIN
                && access != Access::Write
                && let Some(page) = self.pin_read_only(addr, access)?
            {
                return Ok(page);
            }
            if round > 16 && self.is_full(addr, what) {
                return Err(FaultError::Oom(AllocError::Busy));
            }
            self.mm.pages.platform.relax(round);
            round = round.saturating_add(1);
        }
    }

    /// Is a page mapped there that is no folio?
    fn is_special(&self, addr: u64) -> bool {
        let _read = self.mm.rcu_read_lock();
        let slot = self.mm.walk_to(self.core().root, addr, 1);
        slot.is_some_and(|slot| slot.entry.load().is_special())
    }

    /// Is the page at this address referenced or pinned as often as can be counted?
    fn is_full(&self, addr: u64, what: Held) -> bool {
        let mm = self.mm;
        let _read = mm.rcu_read_lock();
        let seen = [2, 1].into_iter().find_map(|level| {
            let seen = mm.walk_to(self.core().root, addr, level)?.entry.load();
            (seen.is_present() && (level == 1 || seen.is_huge())).then_some(seen)
        });
        let found = seen.and_then(|seen| mm.pages.map.lookup(seen.pfn()));
        // Type-stable until `_read` goes, if it is another's by now.
        found.is_some_and(|f| {
            f.word.is_counted() && !mm.folio_at(f.word.desc()).held().has_room_for(what)
        })
    }

    /// Pins an anonymous page through an entry that may not be written: if it is for nobody else; else it is copied for the next attempt.
    fn pin_read_only(
        &self,
        addr: u64,
        access: Access,
    ) -> Result<Option<UserPages<'m, P>>, FaultError> {
        let (mm, core) = (self.mm, self.core());
        let _mmap = self.read_lock();
        let vma = core.find_vma(addr).ok_or(FaultError::Segv)?;
        let at = addr & !(PAGE - 1);
        let huge = mm
            .walk_to(core.root, at, 2)
            .filter(|slot| mm.settled(slot).is_huge());
        let Some(slot) = huge.or_else(|| mm.walk_to(core.root, at, 1)) else {
            return Ok(None);
        };
        let seen = slot.entry.load();
        if !allows(seen, access) || seen.prot().contains(Prot::WRITE) {
            return Ok(None);
        }
        let nth = if seen.is_huge() {
            (at % super::zap::PMD / PAGE) as u32
        } else {
            0
        };
        let page = seen.pfn().add(nth);
        let same = || slot.entry.is_still(seen);
        let Some((head, folio)) = mm.folio_take(page, Held::REF, same) else {
            return Ok(None);
        };
        // SAFETY: just taken.
        let folio = unsafe { FolioRef::adopt(mm, head, folio) };
        let pinned = {
            // Nobody moves it, so nobody who maps it is missing from the count.
            let _locked = mm.folio_lock(&folio);
            let _lock = mm.ptl(slot.table);
            if !same() {
                return Ok(None);
            }
            let ours = mm.anon_is_ours(&folio, page, 1);
            if ours && !folio.counts().try_get(Held::PIN) {
                return Err(FaultError::Oom(AllocError::Busy));
            }
            ours
        };
        if pinned {
            return Ok(Some(UserPages {
                mm,
                head,
                page,
                what: Held::PIN,
            }));
        }
        if seen.is_huge() {
            mm.split_huge(core, at);
        } else if folio.is_anon() {
            self.copy_to(vma, &slot, seen, page, at)?;
        }
        Ok(None)
    }

    /// The lockless walk; `None`: something is missing, or is just changing.
    pub(super) fn try_user_page(
        &self,
        addr: u64,
        access: Access,
        what: Held,
    ) -> Option<UserPages<'m, P>> {
        let mm = self.mm;
        if addr >= self.top() {
            return None;
        }
        let _read = mm.rcu_read_lock();
        let slot = mm.walk_to(self.core().root, addr, 2)?;
        let mut entry = slot.entry;
        let mut seen = entry.load();
        let mut page = seen.pfn().add((addr % super::zap::PMD / PAGE) as u32);
        if !seen.is_huge() {
            entry = mm.walk_to(self.core().root, addr, 1)?.entry;
            seen = entry.load();
            page = seen.pfn();
        }
        if !allows(seen, access) || seen.is_special() {
            return None;
        }
        crate::inject::point("gup: entry seen");
        let still = || {
            let ours = what != Held::PIN
                || seen.prot().contains(Prot::WRITE)
                || mm
                    .pages
                    .map
                    .lookup(page)
                    .is_some_and(|f| f.word.kind() != PageType::Anon);
            ours && entry.is_still(seen)
        };
        let (head, _) = mm.folio_take(page, what, still)?;
        super::fault::mark_used(entry, seen, access == Access::Write);
        Some(UserPages {
            mm,
            head,
            page,
            what,
        })
    }

    /// The page at this address as it is, if the tables have one: a reference to its folio, and which of its pages it is.
    pub fn page_at(&self, addr: u64) -> Option<(FolioRef<'m, P>, Pfn)> {
        let mm = self.mm;
        let taken = self.try_user_page(addr, Access::Read, Held::REF)?;
        let (head, page) = (taken.head, taken.page);
        core::mem::forget(taken);
        // SAFETY: the reference is ours, and forgotten by who had it.
        Some((
            unsafe { FolioRef::adopt(mm, head, mm.folio_of(head)) },
            page,
        ))
    }
}

/// Do the rights in the entry let somebody do that?
pub(super) fn allows(seen: Entry, access: Access) -> bool {
    seen.is_present()
        && seen.prot().contains(Prot::USER)
        && match access {
            Access::Read => true,
            Access::Write => seen.prot().contains(Prot::WRITE),
            Access::Exec => !seen.prot().contains(Prot::NO_EXECUTE),
        }
}
