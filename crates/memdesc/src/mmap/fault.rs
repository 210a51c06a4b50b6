//! Page faults: memory comes when it is first touched, and is copied when it is first written to.
//!
//! | what is there | reading | writing |
//! |---|---|---|
//! | nothing, anonymous area | a zeroed folio: 2 MiB, 64 KiB or a page | the same |
//! | nothing, file, shared | the file's folio | the file's folio, dirty |
//! | nothing, file, private | the file's folio | a copy |
//! | a page that may not be written | | anonymous and nobody else has it: may be written from now on; shared file: dirty; else a copy |
//! | a page on the move | wait | wait |
//! | a page that is broken | SIGBUS | SIGBUS |
//!
//! Source: `handle_mm_fault`, `do_anonymous_page`, `do_fault`, `do_wp_page`, `wp_can_reuse_anon_folio` of Linux.

use core::fmt;

use super::space::MmStruct;
use super::vma::{VmFlags, Vma};
use super::zap::{Gather, PAGE, PMD};
use crate::address::Pfn;
use crate::desc::{Folio, FolioFlags, Held};
use crate::error::AllocError;
use crate::filemap::FileError;
use crate::folio::{FolioRef, Mapped};
use crate::gfp;
use crate::memmap::{Found, PageType};
use crate::mm::Mm;
use crate::owner::FolioKind;
use crate::pgtable::{AtomicEntry, Entry, Prot, Slot, WalkError, index_of};
use crate::platform::Platform;

/// What somebody wants to do at an address.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    /// To read.
    Read,
    /// To write.
    Write,
    /// To execute.
    Exec,
}

/// Why he may not.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FaultError {
    /// There is no area, or it does not allow that (SIGSEGV).
    Segv,
    /// The file ends before, or could not be read (SIGBUS).
    Bus,
    /// The page that was there is broken, and what it held is lost (SIGBUS, `BUS_MCEERR_AR`).
    HwPoison,
    /// There is no memory.
    Oom(AllocError),
}

impl fmt::Display for FaultError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            FaultError::Segv => f.write_str("nothing is mapped there for that"),
            FaultError::Bus => f.write_str("the file ends before, or could not be read"),
            FaultError::HwPoison => f.write_str("the memory there is broken"),
            FaultError::Oom(why) => write!(f, "out of memory: {why}"),
        }
    }
}

impl core::error::Error for FaultError {}

impl From<AllocError> for FaultError {
    fn from(why: AllocError) -> FaultError {
        FaultError::Oom(why)
    }
}

/// What a look at the tables came to.
pub(super) enum Step {
    Done,
    /// Something has changed, or somebody has to finish first.
    Again,
}

/// 64 KiB.
const LARGE_ORDER: usize = 4;
pub(super) const HUGE_ORDER: usize = 9;

impl<'m, P: Platform> MmStruct<'m, P> {
    /// Somebody wants to do this at this address, and the tables do not let him (`handle_mm_fault`): when this comes back without an error they
    /// do, unless somebody else changed them again.
    ///
    /// # Context
    ///
    /// May sleep. Not with a folio locked.
    ///
    /// # Errors
    ///
    /// Why he may not.
    pub fn handle_fault(&self, addr: u64, access: Access) -> Result<(), FaultError> {
        let mut round = 0;
        loop {
            {
                let _lock = self.read_lock();
                let vma = self.core().find_vma(addr).ok_or(FaultError::Segv)?;
                let needed = match access {
                    Access::Read => VmFlags::READ,
                    Access::Write => VmFlags::WRITE,
                    Access::Exec => VmFlags::EXEC,
                };
                if !vma.flags().contains(needed) {
                    return Err(FaultError::Segv);
                }
                let write = access == Access::Write;
                if let Step::Done = self.fault(vma, addr & !(PAGE - 1), write)? {
                    return Ok(());
                }
            }
            self.mm.pages.platform.relax(round);
            round = round.saturating_add(1);
        }
    }

    fn fault(&self, vma: &Vma, addr: u64, write: bool) -> Result<Step, FaultError> {
        let (mm, core) = (self.mm, self.core());
        let slot = match mm.walk_alloc(core.root, addr, 2, Self::gfp(), core.asid) {
            Ok(slot) => slot,
            Err(WalkError::Huge) => unreachable!("nothing larger than 2 MiB is mapped"),
            Err(WalkError::Alloc(why)) => return Err(why.into()),
        };
        let seen = slot.entry.load();
        if seen.is_huge() {
            return self.fault_huge(vma, &slot, seen, addr, write);
        }
        if seen.is_none()
            && vma.flags().contains(VmFlags::HUGE)
            && let Some(step) = self.map_huge(vma, &slot, addr, write)?
        {
            return Ok(step);
        }
        let slot = match mm.walk_alloc(core.root, addr, 1, Self::gfp(), core.asid) {
            Ok(slot) => slot,
            Err(WalkError::Huge) => return Ok(Step::Again),
            Err(WalkError::Alloc(why)) => return Err(why.into()),
        };
        let seen = slot.entry.load();
        if seen.is_none() {
            return match vma.mapping {
                None => self.map_anon(vma, &slot, addr, write),
                Some(_) => self.map_file(vma, &slot, addr, write),
            };
        }
        if seen.is_hwpoison() {
            return Err(FaultError::HwPoison);
        }
        if !seen.is_present() {
            return Ok(Step::Again);
        }
        if write && !seen.prot().contains(Prot::WRITE) {
            if seen.is_special() {
                // Protected for a while, and not any more.
                let noted = Prot::WRITE.with(Prot::DIRTY).with(Prot::ACCESSED);
                slot.entry.add_if(seen, noted);
                return Ok(Step::Again);
            }
            return self.write_protected(vma, &slot, seen, addr);
        }
        Ok(grant(vma, slot.entry, seen, write))
    }

    /// A fault on what is mapped by 2 MiB.
    fn fault_huge(
        &self,
        vma: &Vma,
        slot: &Slot<'_>,
        seen: Entry,
        addr: u64,
        write: bool,
    ) -> Result<Step, FaultError> {
        if write && !seen.prot().contains(Prot::WRITE) {
            let mine = {
                let _lock = self.mm.ptl(slot.table);
                if slot.entry.load().bits() != seen.bits() {
                    return Ok(Step::Again);
                }
                let word = self.mm.pages.map.word(seen.pfn()).load_owned();
                let folio = self.mm.folio_at(word.desc());
                // Nobody but this entry has it.
                let file = word.kind() == PageType::File && !vma.is_cow();
                if file {
                    self.mm.folio_mark_dirty(folio, seen.pfn());
                }
                let mine =
                    file || word.kind() == PageType::Anon && folio.counts().is_exactly(Held::MAP);
                let noted = Prot::WRITE.with(Prot::DIRTY).with(Prot::ACCESSED);
                mine && slot.entry.add_if(seen, noted)
            };
            if !mine {
                // Copied page by page.
                self.mm.split_huge(self.core(), addr);
                return Ok(Step::Again);
            }
            return Ok(Step::Done);
        }
        Ok(grant(vma, slot.entry, seen, write))
    }

    /// Maps 2 MiB at once, if that fits; `None`: by pages then.
    fn map_huge(
        &self,
        vma: &Vma,
        slot: &Slot<'_>,
        addr: u64,
        write: bool,
    ) -> Result<Option<Step>, FaultError> {
        let (mm, base) = (self.mm, addr & !(PMD - 1));
        if base < vma.start() || base + PMD > vma.end() {
            return Ok(None);
        }
        let (head, may_write) = match vma.mapping {
            None => {
                // They are welcome, so worth one attempt at compaction (`defrag=madvise`).
                let flags = gfp::GFP_TRANSHUGE | gfp::__GFP_NORETRY | gfp::__GFP_ZERO;
                let Ok(head) = self.new_anon(flags, HUGE_ORDER) else {
                    return Ok(None);
                };
                let folio = mm.folio_of(head);
                folio.enter(mm.family_handle(self.core().family), base / PAGE);
                (head, vma.flags().contains(VmFlags::WRITE))
            }
            Some(mapping) => {
                // SAFETY: areas keep their mapping.
                let mapping = unsafe { mapping.as_ref() };
                let index = vma.index(base);
                let Some(folio) = mm.filemap_find(mapping, index) else {
                    return Ok(None);
                };
                let fits = folio.order() == HUGE_ORDER
                    && folio.index() == index
                    && index + 512 <= mapping.pages()
                    && folio.has_flag(FolioFlags::UPTODATE);
                if !fits || vma.is_cow() && write {
                    return Ok(None);
                }
                (folio.into_head(), write && !vma.is_cow())
            }
        };
        let folio = mm.folio_of(head);
        let deposit = match mm.new_table(Self::gfp(), self.core().asid, 1, base, self.memcg()) {
            Ok(table) => table,
            Err(why) => {
                mm.folio_put(folio, head, Held::REF);
                return Err(why.into());
            }
        };
        let locked = vma.mapping.map(|_| mm.folio_lock(folio));
        let step = {
            let _lock = mm.ptl(slot.table);
            let usable = vma.mapping.is_none() || mm.folio_mapping(folio) != 0;
            let fits = mm.pages.map.word(head).load_owned().order() == HUGE_ORDER;
            if !slot.entry.load().is_none() || !usable || !fits {
                Some(Step::Again)
            } else if mm.folio_map(folio, head, HUGE_ORDER, Mapped::Entire) {
                let mut prot = vma.flags().prot().with(Prot::ACCESSED);
                if may_write {
                    prot = prot.with(Prot::WRITE);
                }
                if write {
                    prot = prot.with(Prot::DIRTY);
                    if vma.mapping.is_some() {
                        mm.folio_mark_dirty(folio, head);
                    }
                }
                mm.deposit_table(slot.table, deposit);
                self.core().count(vma.mapping.is_none(), 512);
                slot.entry.store(Entry::leaf(head, true, prot));
                Some(Step::Done)
            } else {
                None
            }
        };
        drop(locked);
        match step {
            Some(Step::Done) if vma.mapping.is_none() => mm.folio_add_lru(folio, head),
            Some(Step::Done) => {}
            // SAFETY: nobody ever saw it.
            Some(Step::Again) | None => unsafe { mm.free_pages(deposit) },
        }
        mm.folio_put(folio, head, Held::REF);
        Ok(step)
    }

    /// An anonymous folio, charged to the space's group.
    fn new_anon(&self, gfp: gfp::Flags, order: usize) -> Result<Pfn, AllocError> {
        self.mm
            .alloc_folio_memcg(gfp, order, FolioKind::Anon, self.memcg())
    }

    /// Anonymous memory for an address that has none (`do_anonymous_page`): 64 KiB if they are welcome and fit, else a page.
    fn map_anon(
        &self,
        vma: &Vma,
        slot: &Slot<'_>,
        addr: u64,
        write: bool,
    ) -> Result<Step, FaultError> {
        let large = PAGE << LARGE_ORDER;
        let base = addr & !(large - 1);
        if vma.flags().contains(VmFlags::LARGE) && base >= vma.start() && base + large <= vma.end()
        {
            let light = gfp::GFP_TRANSHUGE_LIGHT | gfp::__GFP_ZERO;
            if let Ok(head) = self.new_anon(light, LARGE_ORDER)
                && self.enter_anon(vma, slot, head, LARGE_ORDER, base, addr, write)
            {
                return Ok(Step::Done);
            }
        }
        let flags = gfp::GFP_HIGHUSER_MOVABLE | gfp::__GFP_ZERO;
        let head = self.new_anon(flags, 0)?;
        if self.enter_anon(vma, slot, head, 0, addr, addr, write) {
            Ok(Step::Done)
        } else {
            Ok(Step::Again)
        }
    }

    /// Enters a new anonymous folio into the table, from `start` on, if nothing is there; else lets it go.
    #[expect(
        clippy::too_many_arguments,
        reason = "one caller, split off for its two sizes"
    )]
    fn enter_anon(
        &self,
        vma: &Vma,
        slot: &Slot<'_>,
        head: Pfn,
        order: usize,
        start: u64,
        addr: u64,
        write: bool,
    ) -> bool {
        let (mm, core) = (self.mm, self.core());
        let folio = mm.folio_of(head);
        folio.enter(mm.family_handle(core.family), start / PAGE);
        let entries = &mm.table(slot.table)[index_of(start, 1)..][..1 << order];
        let mapped = {
            let _lock = mm.ptl(slot.table);
            let free = entries.iter().all(|entry| entry.load().is_none());
            if free {
                let mut prot = vma.flags().prot();
                if vma.flags().contains(VmFlags::WRITE) {
                    prot = prot.with(Prot::WRITE);
                }
                core.count(true, 1 << order);
                for (nth, entry) in (0u32..).zip(entries) {
                    let counted = mm.folio_map(folio, head, order, Mapped::Page(nth));
                    assert!(counted, "a new folio has room for its first mappings");
                    let page = Entry::leaf(head.add(nth), false, prot);
                    entry.store(page);
                    if start + u64::from(nth) * PAGE == addr {
                        mark_used(entry, page, write);
                    }
                }
            }
            free
        };
        if mapped {
            mm.folio_add_lru(folio, head);
        }
        mm.folio_put(folio, head, Held::REF);
        mapped
    }

    /// A page of the file for an address that has none (`do_fault`).
    fn map_file(
        &self,
        vma: &Vma,
        slot: &Slot<'_>,
        addr: u64,
        write: bool,
    ) -> Result<Step, FaultError> {
        let (mm, core) = (self.mm, self.core());
        let Some(mapping) = vma.mapping else {
            unreachable!("the area maps a file")
        };
        // SAFETY: areas keep their mapping.
        let mapping = unsafe { mapping.as_ref() };
        let index = vma.index(addr);
        let folio = mm
            .filemap_get(mapping, index, self.memcg())
            .map_err(|why| match why {
                FileError::Alloc(why) => FaultError::Oom(why),
                FileError::End | FileError::Io => FaultError::Bus,
            })?;
        if write && vma.is_cow() {
            let page = folio.head().add((index - folio.index()) as u32);
            return self.copy_to(vma, slot, Entry::NONE, page, addr);
        }
        let _locked = mm.folio_lock(&folio);
        // Truncated, or split, while nobody had it locked?
        if mm.folio_mapping(&folio) == 0 || index - folio.index() >= 1 << folio.order() {
            return Ok(Step::Again);
        }
        let nth = (index - folio.index()) as u32;
        if write {
            mm.folio_mark_dirty(&folio, folio.head());
        }
        let _lock = mm.ptl(slot.table);
        if !slot.entry.load().is_none() {
            return Ok(Step::Again);
        }
        if !mm.folio_map(&folio, folio.head(), folio.order(), Mapped::Page(nth)) {
            return Err(FaultError::Oom(AllocError::Busy));
        }
        let mut prot = vma.flags().prot().with(Prot::ACCESSED);
        if write {
            prot = prot.with(Prot::WRITE).with(Prot::DIRTY);
        }
        core.count(false, 1);
        slot.entry
            .store(Entry::leaf(folio.head().add(nth), false, prot));
        Ok(Step::Done)
    }

    /// Somebody writes to a page that the tables let him only read (`do_wp_page`).
    fn write_protected(
        &self,
        vma: &Vma,
        slot: &Slot<'_>,
        seen: Entry,
        addr: u64,
    ) -> Result<Step, FaultError> {
        let mm = self.mm;
        let page = seen.pfn();
        let kept = {
            let _lock = mm.ptl(slot.table);
            if slot.entry.load().without_notes() != seen.without_notes() {
                return Ok(Step::Again);
            }
            let Some(Found { head, word }) = mm.pages.map.lookup(page) else {
                unreachable!("mapped, so it is memory")
            };
            let folio = mm.folio_at(word.desc());
            let noted = Prot::WRITE.with(Prot::DIRTY).with(Prot::ACCESSED);
            if word.kind() == PageType::Anon && mm.anon_is_ours(folio, page, 0) {
                return Ok(match slot.entry.add_if(seen, noted) {
                    true => Step::Done,
                    false => Step::Again,
                });
            }
            let theirs = !word.is_folio();
            if theirs || word.kind() == PageType::File && !vma.is_cow() {
                if !theirs {
                    mm.folio_mark_dirty(folio, head);
                }
                return Ok(match slot.entry.add_if(seen, noted) {
                    true => Step::Done,
                    false => Step::Again,
                });
            }
            if !folio.counts().try_get(Held::REF) {
                return Ok(Step::Again);
            }
            // SAFETY: just taken.
            unsafe { FolioRef::adopt(mm, head, folio) }
        };
        let step = self.copy_to(vma, slot, seen, page, addr);
        drop(kept);
        step
    }

    /// Puts a copy of a page that the caller keeps where `seen` is (`wp_page_copy`).
    pub(super) fn copy_to(
        &self,
        vma: &Vma,
        slot: &Slot<'_>,
        seen: Entry,
        page: Pfn,
        addr: u64,
    ) -> Result<Step, FaultError> {
        let (mm, core) = (self.mm, self.core());
        let head = self.new_anon(gfp::GFP_HIGHUSER_MOVABLE, 0)?;
        let folio = mm.folio_of(head);
        folio.enter(mm.family_handle(core.family), addr / PAGE);
        mm.copy_pages(page, head, 0);
        let mut gather = Gather::new();
        let step = {
            let _lock = mm.ptl(slot.table);
            if slot.entry.load().without_notes() == seen.without_notes() {
                let counted = mm.folio_map(folio, head, 0, Mapped::Page(0));
                assert!(counted, "a new folio has room for its first mapping");
                core.count(true, 1);
                let mut noted = Prot::DIRTY.with(Prot::ACCESSED);
                if vma.flags().contains(VmFlags::WRITE) {
                    noted = noted.with(Prot::WRITE);
                }
                let new = Entry::leaf(head, false, vma.flags().prot().with(noted));
                // First away everywhere, then the new one: no CPU writes to one while another reads the other.
                let old = slot.entry.replace(Entry::NONE);
                if old.is_present() {
                    mm.pages.platform.flush_tlb(core.asid, addr, addr + PAGE);
                    mm.gather(core, &mut gather, old, Mapped::Page(0), addr);
                }
                slot.entry.store(new);
                Step::Done
            } else {
                Step::Again
            }
        };
        mm.gather_flush(core, &mut gather);
        if let Step::Done = step {
            mm.folio_add_lru(folio, head);
        }
        mm.folio_put(folio, head, Held::REF);
        Ok(step)
    }
}

impl<P: Platform> Mm<P> {
    /// Is this anonymous page, which an entry of the caller's maps, for nobody else? Nobody else maps it, has the folio, or is about to, but for
    /// `refs` of the caller's. Or it is pinned: only what is for nobody else is pinned, and a fork copies it. Under the table's lock.
    pub(super) fn anon_is_ours(&self, folio: &Folio, page: Pfn, refs: u32) -> bool {
        let held = folio.held();
        self.page_mapcount(page) == 1
            && (held.pins != 0 || folio.counts().is_exactly(Held { refs, ..held }))
    }
}

/// The tables let him, or will with what the area gives and the entry does not: `mprotect` gave it. Notes that he came, as the machine does.
fn grant(vma: &Vma, entry: &AtomicEntry, seen: Entry, write: bool) -> Step {
    let more = seen.granting(vma.flags().prot());
    if more != seen && !entry.swap_if(seen, more) {
        return Step::Again;
    }
    mark_used(entry, more, write);
    Step::Done
}

/// Notes in an entry that somebody came; it does not matter if it has changed meanwhile.
pub(super) fn mark_used(entry: &AtomicEntry, seen: Entry, write: bool) {
    let noted = if write {
        Prot::ACCESSED.with(Prot::DIRTY)
    } else {
        Prot::ACCESSED
    };
    if !seen.prot().contains(noted) {
        entry.add_if(seen, noted);
    }
}
