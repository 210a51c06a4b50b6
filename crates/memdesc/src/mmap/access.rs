//! Reading and writing the memory of users as they would (`copy_from_user`, `access_process_vm`), and what the machine does when they do
//! it themselves: walk, note, remember.

use super::fault::{Access, FaultError};
use super::space::MmStruct;
use super::zap::PAGE;
use crate::address::{PAGE_SIZE, Pfn};
use crate::pgtable::{Entry, Prot};
use crate::platform::Platform;

impl<P: Platform> MmStruct<'_, P> {
    /// Copies out of the address space.
    ///
    /// # Context
    ///
    /// May sleep.
    ///
    /// # Errors
    ///
    /// Why a page could not be had; the bytes before it have been copied.
    pub fn read(&self, addr: u64, to: &mut [u8]) -> Result<(), FaultError> {
        self.each_page(addr, to.len(), Access::Read, |page, from, range| {
            let part = &mut to[range];
            // SAFETY: the page is referenced, and the platform maps it (promise 1); users may write to it meanwhile, as they may when a
            // kernel copies, so this is a copy through raw pointers of bytes that may be any.
            unsafe { core::ptr::copy(page.add(from), part.as_mut_ptr(), part.len()) };
        })
    }

    /// Copies into the address space.
    ///
    /// # Context
    ///
    /// May sleep.
    ///
    /// # Errors
    ///
    /// As [`read`](Self::read).
    pub fn write(&self, addr: u64, from: &[u8]) -> Result<(), FaultError> {
        self.each_page(addr, from.len(), Access::Write, |page, at, range| {
            let part = &from[range];
            // SAFETY: as in `read`.
            unsafe { core::ptr::copy(part.as_ptr(), page.add(at), part.len()) };
        })
    }

    fn each_page(
        &self,
        addr: u64,
        len: usize,
        access: Access,
        mut each: impl FnMut(*mut u8, usize, core::ops::Range<usize>),
    ) -> Result<(), FaultError> {
        let mut done = 0;
        while done < len {
            let at = addr.checked_add(done as u64).ok_or(FaultError::Segv)?;
            let from = (at % PAGE) as usize;
            let part = (PAGE_SIZE - from).min(len - done);
            // Pinned while it is written: a fork meanwhile gives the child a copy, and the page stays the parent's.
            let page = match access {
                Access::Write => self.pin_user_page(at, access)?,
                _ => self.get_user_page(at, access)?,
            };
            each(self.mm.page_address(page.pfn()), from, done..done + part);
            if access == Access::Write {
                page.mark_dirty();
            }
            done += part;
        }
        Ok(())
    }

    /// What the machine does at an access that it remembers nothing of: walks the tables, and if they allow it notes that somebody came and lets
    /// `remember` have the address, the page, its size and whether it may be written. `false`: a fault.
    ///
    /// For platforms without a machine that walks tables. `remember` and [`Platform::flush_tlb`] must exclude each other; the entry is looked at
    /// within `remember`'s call by calling the function that it is given.
    pub fn walk_as_machine(
        &self,
        addr: u64,
        access: Access,
        remember: impl FnOnce(&dyn Fn() -> Option<Walked>),
    ) -> bool {
        let mm = self.mm;
        if addr >= self.top() {
            return false;
        }
        let _read = mm.rcu_read_lock();
        let Some(slot) = mm.walk_to(self.core().root, addr, 2) else {
            return false;
        };
        let (mut entry, mut level) = (slot.entry, 2);
        if !entry.load().is_huge() {
            let Some(slot) = mm.walk_to(self.core().root, addr, 1) else {
                return false;
            };
            (entry, level) = (slot.entry, 1);
        }
        let look = || {
            loop {
                let seen: Entry = entry.load();
                if !super::gup::allows(seen, access) || (level == 2) != seen.is_huge() {
                    return None;
                }
                let noted = match access {
                    Access::Write => Prot::ACCESSED.with(Prot::DIRTY),
                    _ => Prot::ACCESSED,
                };
                if seen.prot().contains(noted) || entry.add_if(seen, noted) {
                    let span = crate::pgtable::span(level);
                    let writable = seen.prot().with(noted);
                    return Some(Walked {
                        addr: addr & !(span - 1),
                        pfn: seen.pfn(),
                        pages: (span / PAGE) as usize,
                        // Only what is noted as dirty may be written without another walk.
                        writable: writable.contains(Prot::WRITE.with(Prot::DIRTY)),
                    });
                }
            }
        };
        if look().is_none() {
            return false;
        }
        remember(&look);
        true
    }
}

/// What the machine found, and may remember until it is told to forget.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Walked {
    /// The first address.
    pub addr: u64,
    /// The first page.
    pub pfn: Pfn,
    /// How many pages.
    pub pages: usize,
    /// May it be written without another walk?
    pub writable: bool,
}
