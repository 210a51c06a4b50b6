//! Taking translations away: of a range that is unmapped, and rights of one that is protected.
//!
//! What an entry led to is let go only after all CPUs have forgotten the translation, in batches (`mmu_gather`): till then it is kept by
//! the mapping that is no longer in the tables.

use super::space::SpaceCore;
use crate::address::Pfn;
use crate::folio::Mapped;
use crate::memmap::PageType;
use crate::mm::Mm;
use crate::pgtable::{Entry, Prot, Slot, index_of, span};
use crate::platform::Platform;

const BATCH: usize = 32;
pub(super) const PMD: u64 = span(2);
pub(super) const PAGE: u64 = span(1);

/// Mappings that are in no table any more, to be let go when no CPU remembers them.
pub(super) struct Gather {
    what: [(Entry, Mapped); BATCH],
    len: usize,
    start: u64,
    end: u64,
}

impl Gather {
    pub(super) fn new() -> Gather {
        Gather {
            what: [(Entry::NONE, Mapped::Entire); BATCH],
            len: 0,
            start: u64::MAX,
            end: 0,
        }
    }

    pub(super) fn is_full(&self) -> bool {
        self.len == BATCH
    }

    /// Something that is not counted was at this address.
    fn flush_also(&mut self, addr: u64) {
        self.start = self.start.min(addr);
        self.end = self.end.max(addr + PAGE);
    }

    fn push(&mut self, old: Entry, which: Mapped, addr: u64) {
        self.what[self.len] = (old, which);
        self.len += 1;
        let pages = if which == Mapped::Entire { PMD } else { PAGE };
        self.start = self.start.min(addr);
        self.end = self.end.max(addr + pages);
    }
}

impl<P: Platform> Mm<P> {
    /// No CPU remembers what was gathered from now on; what the machine noted goes to the folios, and they are let go. Not before: a CPU that
    /// remembers an entry writes through it, and a folio that was dirty and is written back meanwhile would be clean with that in it.
    pub(super) fn gather_flush(&self, space: &SpaceCore, gather: &mut Gather) {
        if gather.start >= gather.end {
            return;
        }
        let platform = &self.pages.platform;
        platform.flush_tlb(space.asid, gather.start, gather.end);
        for &(old, which) in &gather.what[..gather.len] {
            self.note(old);
            self.unmap_page(old.pfn(), which);
        }
        *gather = Gather::new();
    }

    /// This entry is gone from the tables of the space, which counts it no longer: under the table's lock, so that who unmapped a range and looks
    /// finds nothing. The folio keeps its mapping until the flush. Not if full.
    pub(super) fn gather(
        &self,
        space: &SpaceCore,
        gather: &mut Gather,
        old: Entry,
        which: Mapped,
        addr: u64,
    ) {
        let found = self.pages.map.lookup(old.pfn());
        let anon = found.is_some_and(|f| f.word.kind() == PageType::Anon);
        let pages = if which == Mapped::Entire { 512u64 } else { 1 };
        space.count(anon, pages.wrapping_neg());
        gather.push(old, which, addr);
    }

    /// One entry less maps this page, or the folio that it heads.
    fn unmap_page(&self, page: Pfn, which: Mapped) {
        let Some(found) = self.pages.map.lookup(page) else {
            return;
        };
        let (word, head) = (found.word, found.head);
        debug_assert!(word.is_counted(), "mapped, and {word:?}");
        let which = match which {
            Mapped::Page(_) => Mapped::Page(page.0 - head.0),
            Mapped::Entire => Mapped::Entire,
        };
        self.folio_unmap(self.folio_at(word.desc()), head, word.order(), which);
    }

    /// What the machine noted in an entry goes to the folio.
    pub(super) fn note(&self, old: Entry) {
        if !old.prot().contains(Prot::DIRTY) || old.is_special() {
            return;
        }
        if let Some(found) = self.pages.map.lookup(old.pfn())
            && found.word.kind() == PageType::File
        {
            self.folio_mark_dirty(self.folio_at(found.word.desc()), found.head);
        }
    }

    /// Takes away all translations of a range. The caller has the `mmap_lock` for writing, or the space for himself.
    pub(super) fn zap_range(&self, space: &SpaceCore, start: u64, end: u64) {
        let mut gather = Gather::new();
        let mut at = start;
        while at < end {
            let next = (at & !(PMD - 1)).saturating_add(PMD).min(end);
            let Some(slot) = self.walk_to(space.root, at, 2) else {
                // Nothing below: on with the next table of level 2, or what is missing above it.
                at = self.skip_hole(space.root, at).min(end);
                continue;
            };
            let seen = self.settled(&slot);
            if seen.is_huge() {
                if next - at < PMD {
                    self.split_huge(space, at);
                    continue;
                }
                let deposit = {
                    let _lock = self.ptl(slot.table);
                    if !slot.entry.load().is_huge() {
                        continue;
                    }
                    let old = slot.entry.replace(Entry::NONE);
                    self.gather(space, &mut gather, old, Mapped::Entire, at);
                    self.withdraw_table(slot.table)
                };
                if deposit != Pfn::NONE {
                    // SAFETY: nobody ever saw it as a table.
                    unsafe { self.free_pages(deposit) };
                }
                self.gather_flush(space, &mut gather);
            } else if seen.is_present() {
                self.zap_table(space, seen.pfn(), at, next, &mut gather);
            }
            at = next;
        }
        self.gather_flush(space, &mut gather);
    }

    /// An entry of the second level that nobody is splitting at this moment.
    pub(super) fn settled(&self, slot: &Slot<'_>) -> Entry {
        let seen = slot.entry.load();
        if !seen.is_splitting() {
            return seen;
        }
        let _lock = self.ptl(slot.table);
        slot.entry.load()
    }

    /// The first address after `addr` that is not under the same missing table.
    fn skip_hole(&self, root: Pfn, addr: u64) -> u64 {
        let level = if self.walk_to(root, addr, 3).is_some() {
            3
        } else {
            4
        };
        (addr & !(span(level) - 1)).saturating_add(span(level))
    }

    fn zap_table(&self, space: &SpaceCore, table: Pfn, start: u64, end: u64, gather: &mut Gather) {
        let entries = self.table(table);
        let mut at = start;
        while at < end {
            {
                let _lock = self.ptl(table);
                while at < end && !gather.is_full() {
                    let entry = &entries[index_of(at, 1)];
                    if !entry.load().is_none() {
                        let old = entry.replace(Entry::NONE);
                        // One on the move is nobody's mapping: who moves the page finds that it is wanted no more.
                        if old.is_present() && !old.is_special() {
                            self.gather(space, gather, old, Mapped::Page(0), at);
                        } else {
                            gather.flush_also(at);
                        }
                    }
                    at += PAGE;
                }
            }
            if gather.is_full() {
                self.gather_flush(space, gather);
            }
        }
    }

    /// Frees the tables of pages between `start` and `end` that no area needs any more (`free_pgtables`); those above them stay until the
    /// space goes. With the `mmap_lock` for writing, after [`zap_range`](Self::zap_range).
    pub(super) fn free_page_tables(&self, space: &SpaceCore, start: u64, end: u64) {
        let mut at = start & !(PMD - 1);
        while at < end {
            let next = at.saturating_add(PMD);
            let needed = space.vmas().any(|v| v.start() < next && at < v.end());
            match self.walk_to(space.root, at, 2) {
                Some(slot) if !needed => {
                    let gone = {
                        let _lock = self.ptl(slot.table);
                        let seen = slot.entry.load();
                        (seen.is_present() && !seen.is_huge()).then(|| {
                            slot.entry.store(Entry::NONE);
                            seen.pfn()
                        })
                    };
                    if let Some(table) = gone {
                        // No CPU walks it from now on; who does so in software is in a read section.
                        self.pages.platform.flush_tlb(space.asid, at, next);
                        self.free_page_rcu(table);
                    }
                    at = next;
                }
                Some(_) => at = next,
                None => at = self.skip_hole(space.root, at),
            }
        }
    }

    /// Takes the right to write away in a range, and what an area with these rights does not give; whoever may do something gets the right to
    /// it by a fault. With the `mmap_lock` for writing.
    pub(super) fn protect_range(&self, space: &SpaceCore, start: u64, end: u64, area: Prot) {
        let mut at = start;
        while at < end {
            let next = (at & !(PMD - 1)).saturating_add(PMD).min(end);
            let Some(slot) = self.walk_to(space.root, at, 2) else {
                at = self.skip_hole(space.root, at).min(end);
                continue;
            };
            let seen = self.settled(&slot);
            if seen.is_huge() {
                if next - at < PMD {
                    self.split_huge(space, at);
                    continue;
                }
                let _lock = self.ptl(slot.table);
                // Split meanwhile, by who moves it: by pages then.
                if !slot.entry.load().is_huge() {
                    continue;
                }
                let old = slot.entry.restrict(area);
                self.note(old);
            } else if seen.is_present() {
                let table = seen.pfn();
                let _lock = self.ptl(table);
                for entry in &self.table(table)[index_of(at, 1)..][..((next - at) / PAGE) as usize]
                {
                    let seen = entry.load();
                    if seen.is_present() || seen.is_migration() {
                        self.note(entry.restrict(area));
                    }
                }
            }
            at = next;
        }
        self.pages.platform.flush_tlb(space.asid, start, end);
    }

    /// Maps by pages what an entry of 2 MiB maps (`__split_huge_pmd`). Needs no memory: the table was deposited. The caller keeps the
    /// folio from going by keeping its mapping, or finds that it went.
    pub(super) fn split_huge(&self, space: &SpaceCore, addr: u64) {
        let base = addr & !(PMD - 1);
        let Some(slot) = self.walk_to(space.root, base, 2) else {
            return;
        };
        let gone = {
            let _lock = self.ptl(slot.table);
            let seen = slot.entry.load();
            if !seen.is_huge() {
                return;
            }
            let table = self.withdraw_table(slot.table);
            assert!(table != Pfn::NONE, "each huge page has deposited a table");
            let head = seen.pfn();
            let word = self.pages.map.word(head).load_owned();
            let folio = self.folio_at(word.desc());
            self.ptdesc(table).set_owner(space.asid, 1, base);
            // First away for the machine, so that it notes nothing more in the old entry (x86 cannot have both kinds of translation).
            // But not for those who look without the lock, or they would take it for a hole: see `settled`.
            let old = slot.entry.replace(seen.splitting());
            self.pages.platform.flush_tlb(space.asid, base, base + PMD);
            let mut mapped = true;
            for nth in 0..512 {
                mapped &= self.folio_map_again(folio, head, word.order(), Mapped::Page(nth));
                let page = Entry::leaf(head.add(nth), false, old.prot());
                self.table(table)[nth as usize].store(page);
            }
            assert!(
                mapped,
                "room for 512 mappings is kept when the first is made"
            );
            slot.entry.store(Entry::table(table));
            head
        };
        let word = self.pages.map.word(gone).load_owned();
        self.folio_unmap(
            self.folio_at(word.desc()),
            gone,
            word.order(),
            Mapped::Entire,
        );
    }
}
