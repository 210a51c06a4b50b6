//! Reading and writing the memory of users as they would (`copy_from_user`, `access_process_vm`), and what the machine does when they do
//! it themselves: walk, note, remember.

use super::fault::{Access, FaultError};
use super::space::MmStruct;
use super::zap::PAGE;
use crate::address::{PAGE_SIZE, Pfn};
use crate::error::AllocError;
use crate::owner::Memory;
use crate::pgtable::{Entry, Prot, WalkError};
use crate::platform::Platform;

/// What cannot be mapped: of which type it is (`vm_insert_page` of Linux says -EINVAL).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum InsertError {
    /// Pages of this type are not for users.
    Refused(Pfn, &'static str),
    /// Something is mapped there, or no area that allows it.
    Busy,
    /// No memory for a table.
    Alloc(AllocError),
}

impl core::fmt::Display for InsertError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            InsertError::Refused(pfn, kind) => {
                write!(f, "{pfn:?} is {kind}, which users cannot map")
            }
            InsertError::Busy => f.write_str("something is mapped there, or nothing may be"),
            InsertError::Alloc(why) => write!(f, "no memory for a page table: {why}"),
        }
    }
}

impl core::error::Error for InsertError {}

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

    /// Maps a page that the caller has at an address of an area where nothing is (`vm_insert_page`): a folio's. Everything else is refused by the
    /// name of its type.
    ///
    /// # Errors
    ///
    /// See [`InsertError`].
    pub fn insert_page(&self, addr: u64, page: Pfn) -> Result<(), InsertError> {
        let (mm, core) = (self.mm, self.core());
        let (head, order, memory) = mm.lookup(page);
        let anon = match memory {
            Memory::File(_) => false,
            Memory::Anon(_) => true,
            other => return Err(InsertError::Refused(page, other.name())),
        };
        let _lock = self.read_lock();
        let vma = core.find_vma(addr).ok_or(InsertError::Busy)?;
        let at = addr & !(PAGE - 1);
        let slot = match mm.walk_alloc(core.root, at, 1, Self::gfp(), core.asid) {
            Ok(slot) => slot,
            Err(WalkError::Huge) => return Err(InsertError::Busy),
            Err(WalkError::Alloc(why)) => return Err(InsertError::Alloc(why)),
        };
        let folio = mm.folio_of(head);
        let _lock = mm.ptl(slot.table);
        let which = crate::folio::Mapped::Page(page.0 - head.0);
        // Pages of a folio that is in no mapping cannot be found again by the reverse map, so the folio stays where it is: a
        // reference for as long as it is mapped is the caller's to keep, as for a driver's pages in Linux.
        if !slot.entry.load().is_none() || !mm.folio_map(folio, head, order, which) {
            return Err(InsertError::Busy);
        }
        core.count(anon, 1);
        let mut prot = vma.flags().prot();
        if vma.flags().contains(super::VmFlags::WRITE) {
            prot = prot.with(Prot::WRITE);
        }
        slot.entry.store(Entry::leaf(page, false, prot));
        Ok(())
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
