//! From a folio to the entries that map it (`rmap`): to unmap it, to let its pages move, to learn whether it was used.
//!
//! Who walks has the folio locked. For an anonymous folio the walk asks each member of its family at the folio's address; for a file's
//! each area that maps that part of the file. It looks for entries with the folio's page numbers, so it finds what is there and
//! nothing else, whatever else is mapped at the address.

use super::family::FamilyRef;
use super::space::SpaceCore;
use super::zap::{Gather, PAGE, PMD};
use crate::address::Pfn;
use crate::desc::Folio;
use crate::folio::Mapped;
use crate::memmap::PageType;
use crate::mm::Mm;
use crate::pgtable::{Entry, Prot, index_of};
use crate::platform::Platform;

/// What comes in the place of an entry that is taken away.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Unmap {
    /// Nothing: a fault brings the page again.
    Drop,
    /// An entry that says that the page is on the move.
    Move,
}

/// A folio, and where it stands: does not change while it is locked.
#[derive(Clone, Copy)]
struct Target {
    order: usize,
    index: u64,
}

impl Target {
    fn pages(self) -> u64 {
        1 << self.order
    }
}

impl<P: Platform> Mm<P> {
    fn target(&self, folio: &Folio, head: Pfn) -> Target {
        Target {
            order: self.pages.map.word(head).load_owned().order(),
            index: folio.index(),
        }
    }

    /// The family of an anonymous folio that somebody maps (`folio_get_anon_vma`). Who takes its entries away and puts others in their place
    /// keeps this from before the first to after the last: once nobody maps the folio, nothing else keeps the family. The folio is locked.
    pub(crate) fn rmap_family(&self, folio: &Folio, head: Pfn) -> Option<FamilyRef<'_, P>> {
        if self.pages.map.word(head).load_owned().kind() != PageType::Anon {
            return None;
        }
        // Mapped in this read section, so the family has a member in it, and is not freed before its end.
        let _read = self.rcu_read_lock();
        let handle = self.folio_mapping(folio);
        if handle == 0 || folio.mapcount() == 0 {
            return None;
        }
        self.family_get(handle)
    }

    /// Visits each address at which a page of the folio may be mapped: its space, the address, and which of the pages. The folio is locked;
    /// of an anonymous one the caller keeps the family, or there is nothing to visit.
    pub(super) fn rmap_walk(
        &self,
        folio: &Folio,
        head: Pfn,
        family: Option<&FamilyRef<'_, P>>,
        mut visit: impl FnMut(&SpaceCore, u64, u64, u64),
    ) {
        let target = self.target(folio, head);
        let handle = self.folio_mapping(folio);
        if handle == 0 {
            return;
        }
        if self.pages.map.word(head).load_owned().kind() == PageType::Anon {
            let Some(family) = family else {
                return;
            };
            let members = self.family_members(family);
            for space in members.iter() {
                visit(space, target.index * PAGE, 0, target.pages());
            }
            return;
        }
        // SAFETY: a locked folio that belongs to a mapping keeps it.
        let mapping = unsafe { self.mapping_at(handle).as_ref() };
        let areas = self.i_mmap(mapping);
        for vma in areas.iter() {
            // SAFETY: an area lives in a space, and is taken out of this list before that goes.
            let space = unsafe { vma.space.as_ref() };
            let first = target.index.max(vma.pgoff());
            let end = (target.index + target.pages()).min(vma.index(vma.end()));
            if first < end
                && let Some(addr) = vma.address_of(first)
            {
                visit(space, addr, first - target.index, end - first);
            }
        }
    }

    /// Takes away all entries that map the folio (`try_to_unmap`, `try_to_migrate`). Says whether nobody maps it now. The folio is
    /// locked, and the caller has a reference; `family` is what [`rmap_family`](Self::rmap_family) said.
    pub(crate) fn rmap_unmap(
        &self,
        folio: &Folio,
        head: Pfn,
        how: Unmap,
        family: Option<&FamilyRef<'_, P>>,
    ) -> bool {
        if folio.mapcount() == 0 {
            return true;
        }
        let order = self.pages.map.word(head).load_owned().order();
        self.rmap_walk(folio, head, family, |space, addr, nth, pages| {
            if order >= super::fault::HUGE_ORDER {
                let mut at = addr & !(PMD - 1);
                while at < addr + pages * PAGE {
                    self.unmap_huge(space, at, head, how);
                    at += PMD;
                }
            }
            let mut gather = Gather::new();
            let mut done = 0;
            while done < pages {
                let at = addr + done * PAGE;
                // Tables may go while we are here, but not before this.
                let Some((slot, lock, read)) = self.walk_and_lock(space.root, at) else {
                    // No table of pages here: on with the next.
                    done += (PMD - at % PMD) / PAGE;
                    continue;
                };
                let here = ((PMD - at % PMD) / PAGE).min(pages - done);
                let entries = &self.table(slot.table)[index_of(at, 1)..][..here as usize];
                for entry in entries {
                    let page = head.add((nth + done) as u32);
                    let seen = entry.load();
                    if seen.is_present() && seen.pfn() == page {
                        if gather.is_full() {
                            break;
                        }
                        let old = entry.replace(match how {
                            Unmap::Drop => Entry::NONE,
                            Unmap::Move => Entry::migration(page, seen.prot()),
                        });
                        let at = addr + done * PAGE;
                        self.gather(space, &mut gather, old, Mapped::Page(0), at);
                    }
                    done += 1;
                }
                drop(lock);
                drop(read);
                if gather.is_full() {
                    self.gather_flush(space, &mut gather);
                }
            }
            self.gather_flush(space, &mut gather);
        });
        folio.mapcount() == 0
    }

    /// An entry of 2 MiB that maps the folio: what is to be moved is mapped by pages first, which needs no memory; what is to go goes.
    fn unmap_huge(&self, space: &SpaceCore, addr: u64, head: Pfn, how: Unmap) {
        let Some(slot) = self.walk_to(space.root, addr, 2) else {
            return;
        };
        let seen = self.settled(&slot);
        if !seen.is_huge() || seen.pfn() != head {
            return;
        }
        if how == Unmap::Move {
            return self.split_huge(space, addr);
        }
        let mut gather = Gather::new();
        let deposit = {
            let _lock = self.ptl(slot.table);
            let seen = slot.entry.load();
            if !seen.is_huge() || seen.pfn() != head {
                return;
            }
            let old = slot.entry.replace(Entry::NONE);
            self.gather(space, &mut gather, old, Mapped::Entire, addr);
            self.withdraw_table(slot.table)
        };
        self.gather_flush(space, &mut gather);
        if deposit != Pfn::NONE {
            // SAFETY: nobody ever saw it as a table.
            unsafe { self.free_pages(deposit) };
        }
    }

    /// Maps the folio's pages again where entries say that they were on the move, from `old` to where they are now: `head`
    /// (`remove_migration_ptes`). The folio is locked; `family` is what [`rmap_family`](Self::rmap_family) said before they were taken away.
    pub(crate) fn rmap_restore(
        &self,
        folio: &Folio,
        head: Pfn,
        old: Pfn,
        family: Option<&FamilyRef<'_, P>>,
    ) {
        let target = self.target(folio, head);
        let anon = self.pages.map.word(head).load_owned().kind() == PageType::Anon;
        self.rmap_walk(folio, head, family, |space, addr, nth, pages| {
            let mut done = 0;
            while done < pages {
                let at = addr + done * PAGE;
                let Some((slot, _lock, _read)) = self.walk_and_lock(space.root, at) else {
                    done += (PMD - at % PMD) / PAGE;
                    continue;
                };
                let here = ((PMD - at % PMD) / PAGE).min(pages - done);
                for entry in &self.table(slot.table)[index_of(at, 1)..][..here as usize] {
                    let which = (nth + done) as u32;
                    done += 1;
                    let seen = entry.load();
                    if !seen.is_migration() || seen.pfn() != old.add(which) {
                        continue;
                    }
                    let counted =
                        self.folio_map_again(folio, head, target.order, Mapped::Page(which));
                    assert!(counted, "as many as were there before");
                    space.count(anon, 1);
                    entry.store(Entry::leaf(head.add(which), false, seen.prot()));
                }
            }
        });
    }

    /// How many entries say that the folio was used since this was asked last (`folio_referenced`); they forget it. The folio is
    /// locked.
    pub(crate) fn rmap_referenced(&self, folio: &Folio, head: Pfn) -> u32 {
        self.rmap_clear(folio, head, Prot::ACCESSED)
    }

    /// Takes the right to write to the folio away everywhere, so that the next write is noticed; says how many entries had noted one
    /// (`folio_mkclean`). The folio is locked.
    pub(crate) fn rmap_clean(&self, folio: &Folio, head: Pfn) -> u32 {
        self.rmap_clear(folio, head, Prot::DIRTY.with(Prot::WRITE))
    }

    fn rmap_clear(&self, folio: &Folio, head: Pfn, what: Prot) -> u32 {
        if folio.mapcount() == 0 {
            return 0;
        }
        let mut noted = 0;
        let family = self.rmap_family(folio, head);
        self.rmap_walk(folio, head, family.as_ref(), |space, addr, nth, pages| {
            let (mut done, mut before) = (0, noted);
            while done < pages {
                let at = addr + done * PAGE;
                let huge = self.walk_to(space.root, at, 2).filter(|slot| {
                    let seen = self.settled(slot);
                    seen.is_huge() && seen.pfn() == head
                });
                if let Some(slot) = huge {
                    let _lock = self.ptl(slot.table);
                    let seen = slot.entry.load();
                    if seen.is_huge() && seen.pfn() == head {
                        let old = slot.entry.clear(what);
                        noted += u32::from(old.prot().bits() & what.bits() != 0);
                    }
                }
                let here = ((PMD - at % PMD) / PAGE).min(pages - done);
                if let Some((slot, _lock, _read)) = self.walk_and_lock(space.root, at) {
                    let entries = &self.table(slot.table)[index_of(at, 1)..][..here as usize];
                    for (entry, page) in entries.iter().zip(nth + done..) {
                        let seen = entry.load();
                        if seen.is_present() && seen.pfn() == head.add(page as u32) {
                            let old = entry.clear(what);
                            noted += u32::from(old.prot().bits() & what.bits() != 0);
                        }
                    }
                }
                done += here;
            }
            if noted != core::mem::replace(&mut before, noted) {
                let end = addr + pages * PAGE;
                self.pages.platform.flush_tlb(space.asid, addr, end);
            }
        });
        noted
    }
}
