//! Fork: the same memory twice, copied when one of the two writes (`dup_mmap`, `copy_page_range`).
//!
//! Nothing is copied but what is pinned: a device that writes to a page of the parent must not write to one that the child reads, or
//! worse, the other way round. Shared areas of files are not copied either: faults bring them. But for what a driver put there, which nothing would bring.

use core::ptr::NonNull;

use super::space::{MmStruct, SpaceCore};
use super::vma::{VmFlags, Vma};
use super::zap::{PAGE, PMD};
use crate::address::Pfn;
use crate::desc::{Folio, Held};
use crate::error::AllocError;
use crate::folio::Mapped;
use crate::gfp;
use crate::memmap::PageType;
use crate::owner::FolioKind;
use crate::pgtable::{AtomicEntry, Entry, Prot, WalkError, index_of};
use crate::platform::Platform;

/// What became of an entry.
enum Copied {
    Yes,
    /// Its page is pinned: the child gets a copy of it.
    Pinned,
    /// Its page is on the move.
    Moving,
    /// It is mapped as often as can be counted.
    Full,
}

impl<'m, P: Platform> MmStruct<'m, P> {
    /// An address space with the same areas and the same memory. `asid` is the new one's.
    ///
    /// # Context
    ///
    /// May sleep.
    ///
    /// # Errors
    ///
    /// No memory; what was made of the child is gone then.
    pub fn fork(&self, asid: u64) -> Result<MmStruct<'m, P>, AllocError> {
        let (family, memcg) = (self.core().family, self.memcg());
        let child = MmStruct::in_family(self.mm, asid, family, self.top(), memcg)?;
        let _lock = self.write_lock();
        for vma in self.core().vmas() {
            let object = self.mm.kmalloc(size_of::<Vma>(), gfp::GFP_KERNEL)?;
            let new = object.cast::<Vma>();
            let same = Vma::new(
                NonNull::from(child.core()),
                vma.start(),
                vma.end(),
                vma.flags(),
                vma.mapping,
                vma.pgoff(),
            )
            .mixed_like(vma);
            // SAFETY: an object of that size, ours.
            unsafe { new.write(same) };
            // SAFETY: just written; nobody else has the child.
            unsafe { child.link(new) };
            if vma.is_cow() || vma.is_mixed() {
                self.copy_area(&child, vma)?;
            }
        }
        Ok(child)
    }

    fn copy_area(&self, child: &MmStruct<'m, P>, vma: &Vma) -> Result<(), AllocError> {
        let mm = self.mm;
        let mut at = vma.start();
        while at < vma.end() {
            let next = ((at & !(PMD - 1)) + PMD).min(vma.end());
            let Some(slot) = mm.walk_to(self.core().root, at, 2) else {
                at = next;
                continue;
            };
            let seen = mm.settled(&slot);
            if seen.is_huge() && !vma.is_cow() {
                // Nothing but a file's.
                at = next;
                continue;
            }
            if seen.is_huge() {
                if self.copy_huge(child, &slot, at & !(PMD - 1))? {
                    at = next;
                }
                // Else it is mapped by pages now.
                continue;
            }
            if seen.is_present() {
                self.copy_table(child, vma, seen.pfn(), at, next)?;
            }
            at = next;
        }
        mm.pages
            .platform
            .flush_tlb(self.core().asid, vma.start(), vma.end());
        Ok(())
    }

    /// Copies an entry of 2 MiB; `false` if that cannot be, and it is mapped by pages now.
    fn copy_huge(
        &self,
        child: &MmStruct<'m, P>,
        slot: &crate::pgtable::Slot<'_>,
        base: u64,
    ) -> Result<bool, AllocError> {
        let (mm, theirs) = (self.mm, child.core());
        let place = match mm.walk_alloc(theirs.root, base, 2, Self::gfp(), theirs.asid) {
            Ok(place) => place,
            Err(WalkError::Alloc(why)) => return Err(why),
            Err(WalkError::Huge) => unreachable!("a child's area is mapped once"),
        };
        let memcg = child.memcg();
        let deposit = mm.new_table(Self::gfp(), theirs.asid, 1, base, memcg)?;
        let copied = {
            let _lock = mm.ptl(slot.table);
            let seen = slot.entry.load();
            let head = seen.pfn();
            seen.is_huge() && {
                let word = mm.pages.map.word(head).load_owned();
                let folio = mm.folio_at(word.desc());
                let _theirs = mm.ptl_nested(place.table);
                let (copied, anon) = self.share(
                    slot.entry,
                    seen,
                    place.entry,
                    folio,
                    (head, word.order(), word.kind()),
                    Mapped::Entire,
                );
                if let Copied::Yes = copied {
                    mm.deposit_table(place.table, deposit);
                    theirs.count(anon, 512);
                }
                matches!(copied, Copied::Yes)
            }
        };
        if !copied {
            // SAFETY: nobody ever saw it.
            unsafe { mm.free_pages(deposit) };
            mm.split_huge(self.core(), base);
        }
        Ok(copied)
    }

    /// Enters into a child's entry what the parent's has, and lets neither write. With both tables locked.
    fn share(
        &self,
        mine: &AtomicEntry,
        seen: Entry,
        theirs: &AtomicEntry,
        folio: &Folio,
        (head, order, kind): (Pfn, usize, PageType),
        which: Mapped,
    ) -> (Copied, bool) {
        let anon = kind == PageType::Anon;
        // First the right to write, then the look at the pins: see `Counts::may_be_pinned`.
        let old = mine.clear(Prot::WRITE);
        if anon && folio.counts().may_be_pinned() {
            // Without fail, whatever is noted in it meanwhile: who may not write to what is pinned would be given a copy.
            if old.prot().contains(Prot::WRITE) {
                mine.add(Prot::WRITE);
            }
            return (Copied::Pinned, anon);
        }
        if !self.mm.folio_map(folio, head, order, which) {
            return (Copied::Full, anon);
        }
        debug_assert!(theirs.load().is_none() && old.pfn() == seen.pfn());
        // The child has not used it yet, nor written to it.
        let clean = old
            .prot()
            .without(Prot::WRITE.with(Prot::DIRTY).with(Prot::ACCESSED));
        theirs.store(Entry::leaf(old.pfn(), which == Mapped::Entire, clean));
        (Copied::Yes, anon)
    }

    fn copy_table(
        &self,
        child: &MmStruct<'m, P>,
        vma: &Vma,
        table: Pfn,
        start: u64,
        end: u64,
    ) -> Result<(), AllocError> {
        let (mm, theirs) = (self.mm, child.core());
        let place = match mm.walk_alloc(theirs.root, start, 1, Self::gfp(), theirs.asid) {
            Ok(place) => place,
            Err(WalkError::Alloc(why)) => return Err(why),
            Err(WalkError::Huge) => unreachable!("a child's area is mapped once"),
        };
        let (from, to) = (mm.table(table), mm.table(place.table));
        let mut at = start;
        let mut round = 0;
        while at < end {
            let stopped = {
                let _mine = mm.ptl(table);
                let _theirs = mm.ptl_nested(place.table);
                self.copy_entries(theirs, (from, to), &mut at, end, vma.is_cow())
            };
            match stopped {
                Copied::Yes => {}
                Copied::Pinned => {
                    if self.copy_pinned(theirs, vma, table, place.table, at)? {
                        at += PAGE;
                    }
                }
                Copied::Moving => {
                    mm.pages.platform.relax(round);
                    round += 1;
                }
                Copied::Full => return Err(AllocError::Busy),
            }
        }
        Ok(())
    }

    /// Copies entries up to `end` or to one that needs something done first, where `at` is then; those of folios only in an area where a write makes
    /// a copy. With both tables locked.
    fn copy_entries(
        &self,
        theirs: &SpaceCore,
        (from, to): (&[AtomicEntry; 512], &[AtomicEntry; 512]),
        at: &mut u64,
        end: u64,
        cow: bool,
    ) -> Copied {
        let map = &self.mm.pages.map;
        while *at < end {
            let mine = &from[index_of(*at, 1)];
            let seen = mine.load();
            if seen.is_migration() && cow {
                return Copied::Moving;
            }
            // What is lost is lost for the child as well.
            if seen.is_special() || seen.is_hwpoison() {
                to[index_of(*at, 1)].store(seen);
            } else if seen.is_present() {
                let Some(found) = map.lookup(seen.pfn()) else {
                    unreachable!("mapped, so it is memory")
                };
                let folio = self.mm.folio_at(found.word.desc());
                let nth = seen.pfn().0 - found.head.0;
                let place = &to[index_of(*at, 1)];
                // A driver's: both have it. Pages of a file that were only read come with a fault again.
                if !found.word.is_folio() {
                    let which = Mapped::Page(nth);
                    if !self
                        .mm
                        .folio_map(folio, found.head, found.word.order(), which)
                    {
                        return Copied::Full;
                    }
                    let notes = Prot::DIRTY.with(Prot::ACCESSED);
                    let prot = seen.prot().without(notes);
                    place.store(Entry::leaf(seen.pfn(), false, prot));
                    theirs.count(false, 1);
                } else if found.word.kind() == PageType::Anon && cow {
                    let what = (found.head, found.word.order(), found.word.kind());
                    match self.share(mine, seen, place, folio, what, Mapped::Page(nth)) {
                        (Copied::Yes, anon) => theirs.count(anon, 1),
                        (other, _) => return other,
                    }
                }
            }
            *at += PAGE;
        }
        Copied::Yes
    }

    /// Gives the child a copy of a page that is pinned (`copy_present_page`); `false` if it has changed meanwhile.
    fn copy_pinned(
        &self,
        theirs: &SpaceCore,
        vma: &Vma,
        table: Pfn,
        place: Pfn,
        addr: u64,
    ) -> Result<bool, AllocError> {
        let mm = self.mm;
        let (flags, memcg) = (gfp::GFP_HIGHUSER_MOVABLE, mm.memcg_of_table(theirs.root));
        let head = mm.alloc_folio_memcg(flags, 0, FolioKind::Anon, memcg)?;
        let folio = mm.folio_of(head);
        folio.enter(mm.family_handle(theirs.family), addr / PAGE);
        let done = {
            let _mine = mm.ptl(table);
            let _theirs = mm.ptl_nested(place);
            let seen = mm.table(table)[index_of(addr, 1)].load();
            seen.is_present() && {
                // The device may write while this goes on, as it may between any two reads of the parent.
                mm.copy_pages(seen.pfn(), head, 0);
                let counted = mm.folio_map(folio, head, 0, Mapped::Page(0));
                assert!(counted, "a new folio has room for its first mapping");
                let mut prot = vma.flags().prot();
                if vma.flags().contains(VmFlags::WRITE) {
                    prot = prot.with(Prot::WRITE);
                }
                theirs.count(true, 1);
                mm.table(place)[index_of(addr, 1)].store(Entry::leaf(head, false, prot));
                true
            }
        };
        if done {
            mm.folio_add_lru(folio, head);
        }
        mm.folio_put(folio, head, Held::REF);
        Ok(done)
    }
}
