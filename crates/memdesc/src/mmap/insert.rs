//! Pages that a driver puts into an address space itself: those that are counted, folios and others under such a descriptor, and those that are not.
//!
//! Source: `vm_insert_page`, `remap_vmalloc_range`, `vmf_insert_pfn` of Linux.

use super::VmFlags;
use super::space::MmStruct;
use super::zap::PAGE;
use crate::address::Pfn;
use crate::error::AllocError;
use crate::folio::Mapped;
use crate::owner::Memory;
use crate::pgtable::{Entry, Prot, Slot, WalkError};
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

impl<'m, P: Platform> MmStruct<'m, P> {
    /// Maps a page of a folio, or of a driver, a network pool, a device or a type of the kernel's own that is counted, at an address of an area where nothing
    /// is (`vm_insert_page`): the mapping keeps it. Everything else is refused by
    /// the name of its type. What is no folio is shared by all who map it, also after a fork. A folio that belongs to a file only where the area maps that page of it, since the reverse map would find it nowhere
    /// else; an anonymous one only if it belongs to no address space yet: it stays where it is as long as it is mapped. A file's page may be written after a
    /// fault that makes it dirty, or a copy of it.
    ///
    /// # Context
    ///
    /// May sleep.
    ///
    /// # Errors
    ///
    /// See [`InsertError`].
    pub fn insert_page(&self, addr: u64, page: Pfn) -> Result<(), InsertError> {
        let (mm, core) = (self.mm, self.core());
        // Whoever has the page may let it go meanwhile.
        let Some(folio) = mm.folio_get(page) else {
            return Err(InsertError::Refused(page, mm.type_name(page)));
        };
        let shared = !folio.is_anon() && !folio.is_file();
        let (anon, nth) = (folio.is_anon(), page.0 - folio.head().0);
        let at = addr & !(PAGE - 1);
        let _lock = self.read_lock();
        let vma = core.find_vma(at).ok_or(InsertError::Busy)?;
        let slot = self.place(at)?;
        let _locked = mm.folio_lock(&folio);
        let handle = if shared { 0 } else { mm.folio_mapping(&folio) };
        let mapping = vma.mapping.map(|mapping| {
            // SAFETY: areas keep their mapping.
            mm.mapping_handle(unsafe { mapping.as_ref() })
        });
        let found_there =
            mapping == Some(handle) && !anon && vma.index(at) == folio.index() + u64::from(nth);
        if handle != 0 && !found_there {
            return Err(InsertError::Busy);
        }
        let mut prot = vma.flags().prot();
        if (anon || shared) && vma.flags().contains(VmFlags::WRITE) {
            prot = prot.with(Prot::WRITE);
        }
        let _lock = mm.ptl(slot.table);
        let which = Mapped::Page(nth);
        if !slot.entry.load().is_none() || !mm.folio_map(&folio, folio.head(), folio.order(), which)
        {
            return Err(InsertError::Busy);
        }
        if shared {
            vma.set_mixed();
        }
        core.count(anon, 1);
        slot.entry.store(Entry::leaf(page, false, prot));
        Ok(())
    }

    /// Maps a page that is no folio: of vmalloc memory (not a kernel stack), or of a type of the kernel's own that says so (`remap_vmalloc_range`,
    /// `vmf_insert_pfn`). Nothing is counted. A fork gives the child the same page, whoever writes.
    ///
    /// # Safety
    ///
    /// The page stays what it is until it is unmapped from this space and all that are forked from it, and users may see what it holds.
    ///
    /// # Context
    ///
    /// May sleep.
    ///
    /// # Errors
    ///
    /// See [`InsertError`]. What is counted is refused too.
    pub unsafe fn insert_pfn(&self, addr: u64, page: Pfn) -> Result<(), InsertError> {
        let memory = self.mm.lookup(page).2;
        let (may, name) = match memory {
            Memory::Vmalloc(area) => {
                // SAFETY: the caller's promise: the area stays.
                let kind = unsafe { area.as_ref() }.kind();
                (kind.may_be_mapped(), kind.name())
            }
            _ => (self.mm.own_may_be_mapped(page), self.mm.type_name(page)),
        };
        if !may {
            return Err(InsertError::Refused(page, name));
        }
        let at = addr & !(PAGE - 1);
        let _lock = self.read_lock();
        let vma = self.core().find_vma(at).ok_or(InsertError::Busy)?;
        let mut prot = vma.flags().prot();
        if vma.flags().contains(VmFlags::WRITE) {
            prot = prot.with(Prot::WRITE);
        }
        let slot = self.place(at)?;
        let _lock = self.mm.ptl(slot.table);
        if !slot.entry.load().is_none() {
            return Err(InsertError::Busy);
        }
        vma.set_mixed();
        slot.entry.store(Entry::special(page, prot));
        Ok(())
    }

    /// The entry for an address, its table made if need be. With the `mmap_lock`.
    fn place(&self, at: u64) -> Result<Slot<'m>, InsertError> {
        let (mm, core) = (self.mm, self.core());
        match mm.walk_alloc(core.root, at, 1, Self::gfp(), core.asid) {
            Ok(slot) => Ok(slot),
            Err(WalkError::Huge) => Err(InsertError::Busy),
            Err(WalkError::Alloc(why)) => Err(InsertError::Alloc(why)),
        }
    }
}
