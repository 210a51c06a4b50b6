//! Do the counts agree with the tables? At a quiet moment every entry that maps a page is counted at its folio and at its space, and nothing
//! else is.
//!
//! The check needs room to count in: an array of `u32`, one for each page of the machine, from the caller.

use super::space::MmStruct;
use super::zap::PAGE;
use crate::address::Pfn;
use crate::desc::Folio;
use crate::memmap::PageType;
use crate::pgtable::{Entry, span};
use crate::platform::Platform;

/// What does not agree.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MapError {
    /// An entry leads to what is no folio: the address, the page.
    NoFolio(u64, Pfn),
    /// The page is mapped by so many entries, and counted so often.
    Page(Pfn, u32, u32),
    /// The folio is mapped by so many entries, and counted so often.
    Folio(Pfn, u32, u32),
    /// The space has so many pages mapped, and counted so many.
    Rss(u64, u64, u64),
    /// An entry says that its page is on the move.
    Moving(u64, Pfn),
}

/// What was looked at.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct MapReport {
    /// Entries that map a page of 4 KiB.
    pub pages: u64,
    /// Entries that map 2 MiB.
    pub huge: u64,
    /// Folios.
    pub folios: u64,
    /// Folios that nobody maps.
    pub unmapped: u64,
    /// Folios with a reference or a pin beside those of their mappings, of the page cache, and of what a filesystem attached: where nobody has one, that is
    /// a reference that was never put.
    pub referenced: u64,
}

impl<'m, P: Platform> MmStruct<'m, P> {
    /// Visits every entry that maps something: address, level, entry. At a quiet moment.
    pub fn for_each_entry(&self, mut visit: impl FnMut(u64, u8, Entry)) {
        let _lock = self.write_lock();
        self.each_entry(self.root(), 4, 0, &mut visit);
    }

    fn each_entry(&self, table: Pfn, level: u8, base: u64, visit: &mut impl FnMut(u64, u8, Entry)) {
        for (nth, entry) in (0u64..).zip(self.mm.table(table)) {
            let seen = entry.load();
            let addr = base + nth * span(level);
            if seen.is_none() {
                continue;
            }
            if level == 1 || seen.is_huge() {
                visit(addr, level, seen);
            } else {
                self.each_entry(seen.pfn(), level - 1, addr, visit);
            }
        }
    }

    /// Checks that every count of mappings agrees with the tables of these spaces, which are all that map anything. At a quiet moment.
    /// `seen` has a zero for every page of the machine; device memory is not looked at.
    ///
    /// # Errors
    ///
    /// The first thing that does not agree.
    pub fn check_all(spaces: &[&MmStruct<'m, P>], seen: &mut [u32]) -> Result<MapReport, MapError> {
        let mut report = MapReport::default();
        let Some(mm) = spaces.first().map(|space| space.mm) else {
            return Ok(report);
        };
        let mut error = None;
        for space in spaces {
            let mut mapped = 0u64;
            space.for_each_entry(|addr, level, entry| {
                let page = entry.pfn();
                if entry.is_special() || entry.is_hwpoison() {
                    return;
                }
                if !entry.is_present() {
                    error = error.or(Some(MapError::Moving(addr, page)));
                    return;
                }
                let found = mm.pages.map.lookup(page);
                if !found.is_some_and(|f| f.word.is_counted()) {
                    error = error.or(Some(MapError::NoFolio(addr, page)));
                    return;
                }
                let pages = span(level) / PAGE;
                mapped += pages;
                if level == 1 {
                    report.pages += 1;
                } else {
                    report.huge += 1;
                }
                // Those of a device may lie behind the machine's, and are no blocks of it.
                for nth in 0..pages as usize {
                    if let Some(count) = seen.get_mut(page.0 as usize + nth) {
                        *count += 1;
                    }
                }
            });
            let rss = space.rss();
            if rss.anon + rss.file != mapped {
                let counted = rss.anon + rss.file;
                error = error.or(Some(MapError::Rss(space.asid(), mapped, counted)));
            }
        }
        if let Some(error) = error {
            return Err(error);
        }
        mm.for_each_block(|head, pages, word| {
            if !word.is_counted() || error.is_some() {
                return;
            }
            report.folios += 1;
            let folio: &Folio = mm.folio_at(word.desc());
            let entire = mm.folio_entire_mapcount(head);
            let mut sum = 0;
            for nth in 0..pages {
                let page = head.add(nth);
                let is = seen.get(page.0 as usize).copied().unwrap_or(0);
                let counted = mm.page_mapcount(page);
                if is != counted {
                    error = Some(MapError::Page(page, is, counted));
                }
                sum += is;
            }
            // An entry for the whole was counted for each of its pages.
            let sum = sum.wrapping_sub(entire.wrapping_mul(pages - 1));
            if sum != folio.mapcount() {
                error = Some(MapError::Folio(head, sum, folio.mapcount()));
            }
            report.unmapped += u64::from(sum == 0);
            // The cache has one reference, and so has what is attached.
            let cached = word.kind() == PageType::File && mm.folio_mapping(folio) != 0;
            let own = u32::from(cached) + u32::from(mm.folio_private(folio).is_some());
            let held = folio.held();
            report.referenced += u64::from(held.refs != own || held.pins != 0);
        });
        error.map_or(Ok(report), Err)
    }
}
