//! The builder: a tree of tables from its root, made as addresses are mapped.

use super::entry::{AtomicEntry, Entry, Prot};
use crate::address::{PAGE_SHIFT, Pfn};
use crate::desc::PtDesc;
use crate::error::AllocError;
use crate::gfp::{self, Flags};
use crate::lockdep::classes;
use crate::memmap::PageType;
use crate::mm::Mm;
use crate::platform::{Holder, Platform};
use crate::rcu::ReadGuard;
use crate::sync::SpinGuard;

/// The lock of a table's entries.
pub(crate) type Ptl<'a, P> = SpinGuard<'a, (), Holder<'a, P>>;

/// Bytes that one entry of a table of this level maps.
pub(crate) const fn span(level: u8) -> u64 {
    1 << (PAGE_SHIFT + 9 * (level as u32 - 1))
}

/// The place of an address in its table of this level.
pub(crate) const fn index_of(addr: u64, level: u8) -> usize {
    (addr / span(level)) as usize % 512
}

/// Addresses below this can be mapped: the lower half of 48 bits.
pub(crate) const TOP: u64 = 1 << 47;

/// An entry, and the table it is in.
pub(crate) struct Slot<'a> {
    pub(crate) table: Pfn,
    pub(crate) entry: &'a AtomicEntry,
}

/// Why a walk did not get where it should.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum WalkError {
    /// A page of 2 MiB is in the way.
    Huge,
    /// No memory for a table.
    Alloc(AllocError),
}

/// Where an address leads.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Translation {
    /// The page of 4 KiB that the address lies in.
    pub pfn: Pfn,
    /// The entry.
    pub entry: Entry,
    /// The level it is on: 1, or 2 for a page of 2 MiB.
    pub level: u8,
}

impl<P: Platform> Mm<P> {
    /// The descriptor of a table that the caller has.
    pub(crate) fn ptdesc(&self, table: Pfn) -> &PtDesc {
        self.ptdesc_at(self.pages.map.word(table).load_owned().desc())
    }

    /// Takes the lock of a table's entries.
    pub(crate) fn ptl(&self, table: Pfn) -> Ptl<'_, P> {
        let platform = &self.pages.platform;
        let holder = Holder::new(platform, self.pages.rt, &classes::PTL);
        self.ptdesc(table).lock.lock(holder)
    }

    /// Where pages of 4 KiB are mapped at this address, with the lock of that table's entries, and a read section in which the table stays; `None` if there is no
    /// such table.
    ///
    /// A read section may be a pin, in which nobody sleeps. So where locks sleep this one is tried, and who does not get it waits outside of the section.
    pub(crate) fn walk_and_lock(
        &self,
        root: Pfn,
        addr: u64,
    ) -> Option<(Slot<'_>, Ptl<'_, P>, ReadGuard<'_, P::Rcu>)> {
        let platform = &self.pages.platform;
        let mut round = 0;
        loop {
            let read = self.rcu_read_lock();
            let slot = self.walk_to(root, addr, 1)?;
            if !self.pages.rt {
                let lock = self.ptl(slot.table);
                return Some((slot, lock, read));
            }
            let holder = Holder::trying(platform, true, &classes::PTL);
            if let Some(lock) = self.ptdesc(slot.table).lock.try_lock(holder) {
                return Some((slot, lock, read));
            }
            drop(read);
            platform.relax(round);
            round += 1;
        }
    }

    /// The lock of a level-1 table while that of its level-2 table is held.
    pub(crate) fn ptl_nested(&self, table: Pfn) -> Ptl<'_, P> {
        let platform = &self.pages.platform;
        let holder = Holder::new(platform, self.pages.rt, &classes::PTL_NESTED);
        self.ptdesc(table).lock.lock(holder)
    }

    /// A table for this level; `memcg` is charged for it.
    pub(crate) fn new_table(
        &self,
        gfp: Flags,
        owner: u64,
        level: u8,
        addr: u64,
        memcg: u16,
    ) -> Result<Pfn, AllocError> {
        let table = self.alloc_page_table_memcg(gfp | gfp::__GFP_ZERO, 0, memcg)?;
        let covers = if level == 4 { TOP } else { span(level + 1) };
        self.ptdesc(table)
            .set_owner(owner, level, addr & !(covers - 1));
        Ok(table)
    }

    /// Whom a table is charged to; all of a tree are charged to whom the root is.
    pub(crate) fn memcg_of_table(&self, table: Pfn) -> u16 {
        self.pages.memcg_of(self.pages.map.word(table).load_owned())
    }

    /// The entry for an address in the table of this level, if there is one: a walk without a lock. The caller is in a read section, or
    /// keeps the tables from going.
    pub(crate) fn walk_to(&self, root: Pfn, addr: u64, level: u8) -> Option<Slot<'_>> {
        let mut table = root;
        for at in (level..=4).rev() {
            let entry = &self.table(table)[index_of(addr, at)];
            if at == level {
                return Some(Slot { table, entry });
            }
            let seen = entry.load();
            if !seen.is_present() || seen.is_huge() {
                return None;
            }
            table = seen.pfn();
        }
        None
    }

    /// The same, making the tables that are missing. The caller keeps tables from going.
    pub(crate) fn walk_alloc(
        &self,
        root: Pfn,
        addr: u64,
        level: u8,
        gfp: Flags,
        owner: u64,
    ) -> Result<Slot<'_>, WalkError> {
        let mut table = root;
        let mut at = 4;
        loop {
            let entry = &self.table(table)[index_of(addr, at)];
            if at == level {
                return Ok(Slot { table, entry });
            }
            let mut seen = entry.load();
            if seen.is_none() {
                let new = self
                    .new_table(gfp, owner, at - 1, addr, self.memcg_of_table(root))
                    .map_err(WalkError::Alloc)?;
                let lock = self.ptl(table);
                seen = entry.load();
                if seen.is_none() {
                    seen = Entry::table(new);
                    entry.store(seen);
                    drop(lock);
                } else {
                    drop(lock);
                    // Somebody was faster.
                    // SAFETY: nobody ever saw it.
                    unsafe { self.free_pages(new) };
                }
            }
            if seen.is_huge() || !seen.is_present() {
                return Err(WalkError::Huge);
            }
            table = seen.pfn();
            at -= 1;
        }
    }

    /// Frees a tree of tables, after a grace period each; what they map is the caller's business. `level` is the level of `table`.
    pub(crate) fn free_tables(&self, table: Pfn, level: u8) {
        self.free_deposits(table);
        if level > 1 {
            // The upper half of a root is the kernel's, which has the same tables there in every root.
            let entries = if level == 4 { index_of(TOP, 4) } else { 512 };
            for entry in &self.table(table)[..entries] {
                let seen = entry.load();
                if seen.is_present() && !seen.is_huge() {
                    self.free_tables(seen.pfn(), level - 1);
                }
            }
        }
        self.free_page_rcu(table);
    }

    fn free_deposits(&self, table: Pfn) {
        let desc = self.ptdesc(table);
        let mut at = desc.deposit();
        desc.set_deposit(Pfn::NONE);
        while at != Pfn::NONE {
            let next = self.pages.map.buddy(at).next();
            self.free_page_rcu(at);
            at = next;
        }
    }

    /// Deposits a table for when the huge page that is mapped here will be mapped by pages: that must not need memory. Under the
    /// table's lock (`pgtable_trans_huge_deposit`).
    pub(crate) fn deposit_table(&self, table: Pfn, new: Pfn) {
        let desc = self.ptdesc(table);
        self.pages.map.buddy(new).set_next(desc.deposit());
        desc.set_deposit(new);
    }

    /// Takes one out (`pgtable_trans_huge_withdraw`).
    pub(crate) fn withdraw_table(&self, table: Pfn) -> Pfn {
        let desc = self.ptdesc(table);
        let first = desc.deposit();
        if first != Pfn::NONE {
            desc.set_deposit(self.pages.map.buddy(first).next());
        }
        first
    }
}

/// A tree of page tables, for a kernel that maps things itself: who owns what is mapped is his business.
///
/// # Examples
///
/// ```
/// use memdesc::{Config, Mm, gfp::GFP_KERNEL, pgtable::{PageTables, Prot}};
/// use memdesc_host::Host;
///
/// let (host, ram) = Host::small(16384)?;
/// let mm = Mm::new(host, &Config::default(), &ram)?;
/// let tables = PageTables::new(&mm, GFP_KERNEL)?;
/// let page = mm.alloc_pages(GFP_KERNEL, 0)?;
/// tables.map(0x40_0000, page, 1, Prot::WRITE.with(Prot::USER), GFP_KERNEL)?;
/// assert_eq!(tables.translate(0x40_0123).unwrap().pfn, page);
/// tables.protect(0x40_0000, Prot::USER);
/// assert!(!tables.translate(0x40_0000).unwrap().entry.prot().contains(Prot::WRITE));
/// assert_eq!(tables.unmap(0x40_0000).unwrap().pfn(), page);
/// unsafe { mm.free_pages(page) };
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct PageTables<'m, P: Platform> {
    mm: &'m Mm<P>,
    root: Pfn,
}

impl<'m, P: Platform> PageTables<'m, P> {
    /// An empty tree: one table.
    ///
    /// # Errors
    ///
    /// No memory.
    pub fn new(mm: &'m Mm<P>, gfp: Flags) -> Result<Self, AllocError> {
        let root = mm.new_table(gfp, 0, 4, 0, mm.memcg_for(gfp))?;
        Ok(PageTables { mm, root })
    }

    /// The root: what goes into CR3.
    pub fn root(&self) -> Pfn {
        self.root
    }

    /// Maps a page of 4 KiB (level 1) or of 2 MiB (level 2) at an address aligned to it, making the tables that are missing.
    ///
    /// # Errors
    ///
    /// No memory for a table; [`AllocError::Busy`] if something is mapped there; [`AllocError::BadOrder`] for another level, an address or
    /// page that is not aligned, or not in the lower half.
    pub fn map(
        &self,
        addr: u64,
        pfn: Pfn,
        level: u8,
        prot: Prot,
        gfp: Flags,
    ) -> Result<(), AllocError> {
        let aligned = matches!(level, 1 | 2)
            && addr.is_multiple_of(span(level))
            && pfn.is_aligned(9 * (usize::from(level) - 1));
        if !aligned || addr >= TOP {
            return Err(AllocError::BadOrder);
        }
        let slot = match self.mm.walk_alloc(self.root, addr, level, gfp, 0) {
            Ok(slot) => slot,
            Err(WalkError::Huge) => return Err(AllocError::Busy),
            Err(WalkError::Alloc(why)) => return Err(why),
        };
        let _lock = self.mm.ptl(slot.table);
        if !slot.entry.load().is_none() {
            return Err(AllocError::Busy);
        }
        slot.entry.store(Entry::leaf(pfn, level == 2, prot));
        Ok(())
    }

    fn leaf(&self, addr: u64) -> Option<(Slot<'m>, u8)> {
        if addr >= TOP {
            return None;
        }
        [2, 1].into_iter().find_map(|level| {
            let slot = self.mm.walk_to(self.root, addr, level)?;
            let seen = slot.entry.load();
            (seen.is_present() && (level == 1 || seen.is_huge())).then_some((slot, level))
        })
    }

    /// Where an address leads. Without a lock.
    pub fn translate(&self, addr: u64) -> Option<Translation> {
        let _read = self.mm.rcu_read_lock();
        let (slot, level) = self.leaf(addr)?;
        let entry = slot.entry.load();
        let page = (addr % span(level)) >> PAGE_SHIFT;
        entry.is_present().then_some(Translation {
            pfn: entry.pfn().add(page as u32),
            entry,
            level,
        })
    }

    /// Takes away what is mapped at an address: the entry as it was, with what the machine noted. The caller flushes.
    pub fn unmap(&self, addr: u64) -> Option<Entry> {
        let (slot, _) = self.leaf(addr)?;
        let _lock = self.mm.ptl(slot.table);
        let old = slot.entry.replace(Entry::NONE);
        old.is_present().then_some(old)
    }

    /// Changes what may be done at an address; ACCESSED and DIRTY stay as they are. The caller flushes. The entry as it was.
    pub fn protect(&self, addr: u64, prot: Prot) -> Option<Entry> {
        let (slot, _) = self.leaf(addr)?;
        let _lock = self.mm.ptl(slot.table);
        loop {
            let seen = slot.entry.load();
            if !seen.is_present() {
                return None;
            }
            let noted = Prot::ACCESSED.with(Prot::DIRTY);
            let keep = Entry(seen.0 & !Prot::from_bits(u64::MAX).without(noted).bits());
            if slot
                .entry
                .swap_if(seen, Entry(keep.0 | prot.without(noted).bits()))
            {
                return Some(seen);
            }
        }
    }

    /// Was it used since this was asked last (`ptep_test_and_clear_young`)? The caller flushes if that matters to him.
    pub fn test_and_clear_accessed(&self, addr: u64) -> bool {
        self.note(addr, Prot::ACCESSED)
    }

    /// Was it written since this was asked last? The caller flushes.
    pub fn test_and_clear_dirty(&self, addr: u64) -> bool {
        self.note(addr, Prot::DIRTY)
    }

    fn note(&self, addr: u64, what: Prot) -> bool {
        let Some((slot, _)) = self.leaf(addr) else {
            return false;
        };
        let _lock = self.mm.ptl(slot.table);
        let seen = slot.entry.load();
        seen.is_present() && slot.entry.clear(what).prot().contains(what)
    }
}

impl<P: Platform> Drop for PageTables<'_, P> {
    fn drop(&mut self) {
        debug_assert!(self.mm.pages.map.word(self.root).load_owned().kind() == PageType::PageTable);
        self.mm.free_tables(self.root, 4);
    }
}

impl<P: Platform> core::fmt::Debug for PageTables<'_, P> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("PageTables")
            .field("root", &self.root)
            .finish_non_exhaustive()
    }
}
