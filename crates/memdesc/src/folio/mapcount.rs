//! How often a folio is mapped: in all, as a whole, and page by page.
//!
//! In all: in the folio's counts, where each mapping keeps the folio alive. Page by page: in the words of the tail pages, which
//! have nothing else to say; the first tail's word counts for the head as well, and how often the whole is mapped by one
//! entry. So a large folio needs no more memory than a small one, and its tails' words are zero again when it is free.
//!
//! Source: `folio_add_anon_rmap_ptes`, `folio_remove_rmap_pmd`, `_nr_pages_mapped` of Linux.

use crate::address::Pfn;
use crate::desc::{Folio, Held};
use crate::memmap::{TailCount, Word};
use crate::mm::Mm;
use crate::platform::Platform;

/// What one page table entry maps of a folio.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Mapped {
    /// One page, the `n`-th.
    Page(u32),
    /// All of it, by an entry one level up.
    Entire,
}

/// Folios of this order and above may be mapped by one entry.
const ENTIRE_ORDER: usize = 9;
/// No folio is mapped as a whole once it has so many mappings; and by page once it has so many. Each is looked at before it is counted, so some more
/// get through, one for each CPU: up to 64 of them the sum, with each of the first replaced by 512, is below 2^20.
const ENTIRE_MAX: u32 = 1 << 10;
const PAGES_MAX: u32 = (1 << 19) - (1 << 16);
const _: () = assert!((ENTIRE_MAX + 64) * 512 + PAGES_MAX + 64 < 1 << 20);

impl<P: Platform> Mm<P> {
    /// Where the count of this mapping is, if the folio is a large one.
    fn tail_count(&self, head: Pfn, order: usize, which: Mapped) -> Option<(Pfn, TailCount)> {
        if order == 0 {
            return None;
        }
        Some(match which {
            Mapped::Page(0) => (head.add(1), TailCount::Head),
            Mapped::Page(nth) => (head.add(nth), TailCount::Page),
            Mapped::Entire => (head.add(1), TailCount::Entire),
        })
    }

    /// One more entry maps the folio, or a page of it. `false` if it is mapped as often as can be counted; of a folio that may be mapped as a whole,
    /// long before, so that all such entries can be replaced by entries for its pages.
    pub(crate) fn folio_map(&self, folio: &Folio, head: Pfn, order: usize, which: Mapped) -> bool {
        let full = order >= ENTIRE_ORDER
            && match which {
                Mapped::Entire => folio.mapcount() >= ENTIRE_MAX,
                Mapped::Page(_) => folio.mapcount() >= PAGES_MAX,
            };
        !full && self.folio_map_again(folio, head, order, which)
    }

    /// The same, in place of another entry, for which there was room.
    pub(crate) fn folio_map_again(
        &self,
        folio: &Folio,
        head: Pfn,
        order: usize,
        which: Mapped,
    ) -> bool {
        if !folio.counts().try_get(Held::MAP) {
            return false;
        }
        if let Some((tail, count)) = self.tail_count(head, order, which) {
            self.pages.map.word(tail).inc_tail(count);
        }
        true
    }

    /// One entry less maps it. Who is the last to have the folio frees it.
    pub(crate) fn folio_unmap(&self, folio: &Folio, head: Pfn, order: usize, which: Mapped) {
        if let Some((tail, count)) = self.tail_count(head, order, which) {
            self.pages.map.word(tail).dec_tail(count);
        }
        self.folio_put(folio, head, Held::MAP);
    }

    /// How many entries map this page: by itself, and with the whole folio (`folio_precise_page_mapcount`). Of a folio that the
    /// caller has.
    pub fn page_mapcount(&self, pfn: Pfn) -> u32 {
        // Who has not reads a folio that may be another's, but reads a folio.
        let _read = self.rcu_read_lock();
        let Some(found) = self.pages.map.lookup(pfn).filter(|f| f.word.is_counted()) else {
            return 0;
        };
        let head = found.head;
        if found.word.order() == 0 {
            return self.folio_at(found.word.desc()).mapcount();
        }
        let first = self.pages.map.word(head.add(1)).load();
        let own = if pfn == head {
            TailCount::Head.of(first)
        } else {
            TailCount::Page.of(self.pages.map.word(pfn).load())
        };
        own + TailCount::Entire.of(first)
    }

    /// How many entries map the folio as a whole (`folio_entire_mapcount`). Of a folio that the caller has.
    pub fn folio_entire_mapcount(&self, head: Pfn) -> u32 {
        match self.pages.map.lookup(head) {
            Some(found) if found.word.is_counted() && found.word.order() > 0 => {
                TailCount::Entire.of(self.pages.map.word(found.head.add(1)).load())
            }
            _ => 0,
        }
    }

    /// The words of a folio's tails are zero: all of them for small ones, the first few of others.
    pub(crate) fn tails_are_unmapped(&self, head: Pfn, order: usize) -> bool {
        let zero = |nth| self.pages.map.word(head.add(nth)).load_owned() == Word::ZERO;
        (1..1u32 << order.min(4)).all(zero)
    }
}
