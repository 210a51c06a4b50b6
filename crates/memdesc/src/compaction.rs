//! A contiguous range out of what lies in it: free pages are taken, folios and compressed memory are moved away, and the range is the caller's.
//!
//! No page of the range goes back to a free list on the way: moving a folio exchanges its pages for bare ones that are handed to who moves, so
//! what has been gathered cannot be lost to others, and needs no mark that keeps others off (Linux: `MIGRATE_ISOLATE`).
//!
//! Source: `alloc_contig_range`, `compact_zone`, `isolate_migratepages_range` of Linux.

use core::ops::{ControlFlow, Range};

use crate::address::{MAX_ORDER, PAGEBLOCK_ORDER, Pfn};
use crate::desc::DescList;
use crate::error::AllocError;
use crate::gfp;
use crate::memmap::heads::blocks;
use crate::memmap::{Found, PageType, TAIL_WORDS_ORDER, Word};
use crate::mm::Mm;
use crate::page_alloc::MigrateType;
use crate::page_alloc::alloc::Descriptors;
use crate::platform::Platform;
use crate::stats::Event;
use crate::sync::atomic::Ordering;
use crate::zsmalloc;

/// Rounds over a range before it is given up.
const ROUNDS: u32 = 8;

/// Why a range could not be had: the first page that stays, and what it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Obstacle {
    /// A page.
    pub pfn: Pfn,
    /// Its type.
    pub kind: PageType,
    /// It could be moved, but not now: pinned, under writeback, or had by somebody.
    pub movable: bool,
}

impl core::fmt::Display for Obstacle {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let why = if self.movable {
            "is in use and"
        } else {
            "is of a type that"
        };
        write!(
            f,
            "{:?} ({}) {why} cannot be moved",
            self.pfn,
            self.kind.name()
        )
    }
}

impl core::error::Error for Obstacle {}

/// Blocks that were gathered: bare pages of the caller's, linked through their buddies, which say for what they were gathered.
struct Gathered {
    range: Pfn,
    head: Pfn,
    pages: u32,
}

impl Gathered {
    fn push<P: Platform>(&mut self, mm: &Mm<P>, block: Pfn, order: usize) {
        let links = mm.pages.map.buddy(block);
        links.set_next(self.head);
        links.set_prev(self.range);
        self.head = block;
        self.pages += 1 << order;
    }

    /// Was this bare block gathered? One of somebody else may look like it; then the pages do not add up in the end.
    fn has<P: Platform>(&self, mm: &Mm<P>, Found { head, word }: Found) -> bool {
        // If it is another's it may be freed meanwhile: what describes it is type-stable as long as we read, if it is so now.
        let _read = mm.rcu_read_lock();
        // Where those that were gathered say for what, those that are charged say to whom.
        self.head != Pfn::NONE
            && !word.is_charged()
            && mm.pages.map.word(head).load() == word
            && mm.pages.map.buddy_at(word.desc()).prev() == self.range
    }

    fn pop<P: Platform>(&mut self, mm: &Mm<P>) -> Option<Pfn> {
        if self.head == Pfn::NONE {
            return None;
        }
        let block = self.head;
        self.head = mm.pages.map.buddy(block).next();
        Some(block)
    }
}

/// What a page of the range turned out to be.
enum Step {
    /// Ours now, or was: go on after this page.
    Past(u32),
    /// In the way, now at least.
    Stays(Obstacle),
}

impl<P: Platform> Mm<P> {
    /// All pages from `start` on, `pages` of them, whatever lies there now: free ones are taken, folios moved away
    /// (`alloc_contig_range`). They come as bare pages in blocks as large as their alignment allows.
    ///
    /// # Context
    ///
    /// May sleep.
    ///
    /// # Errors
    ///
    /// The first page that stays. Everything that was there is there still, though perhaps elsewhere.
    pub fn alloc_contig_range(&self, start: Pfn, pages: u32) -> Result<(), Obstacle> {
        let end = Pfn(start.0.saturating_add(pages));
        let mut gathered = Gathered {
            range: start,
            head: Pfn::NONE,
            pages: 0,
        };
        let mut stays = None;
        for round in 0..ROUNDS {
            // What lies in other CPUs' lists is free but cannot be taken by number.
            self.drain_all();
            // First what is free, so that nothing is moved to within the range.
            self.each_in(start, end, |found, at| {
                self.take_free(&mut gathered, found, at, end)
            });
            stays = None;
            self.each_in(start, end, |found, at| {
                match self.take_used(&mut gathered, found, at, start, end) {
                    Step::Past(next) => ControlFlow::Continue(next),
                    Step::Stays(obstacle) if obstacle.movable && round + 1 < ROUNDS => {
                        stays = Some(obstacle);
                        ControlFlow::Continue(block_end(found, at))
                    }
                    Step::Stays(obstacle) => {
                        stays = Some(obstacle);
                        ControlFlow::Break(())
                    }
                }
            });
            if gathered.pages == pages {
                self.join(start, pages);
                return Ok(());
            }
            if stays.is_some_and(|s| !s.movable) {
                break;
            }
            self.pages.platform.relax(63);
        }
        while let Some(block) = gathered.pop(self) {
            // SAFETY: bare pages that we took.
            unsafe { self.free_pages(block) };
        }
        Err(stays.unwrap_or(Obstacle {
            pfn: start,
            kind: PageType::Free,
            movable: true,
        }))
    }

    /// Visits the blocks of a range, from wherever `visit` says that the next one starts.
    fn each_in(
        &self,
        start: Pfn,
        end: Pfn,
        mut visit: impl FnMut(Option<Found>, Pfn) -> ControlFlow<(), u32>,
    ) {
        let mut at = start;
        while at < end {
            match visit(self.pages.map.lookup(at), at) {
                ControlFlow::Continue(next) => at = Pfn(next.max(at.0 + 1)),
                ControlFlow::Break(()) => return,
            }
        }
    }

    fn take_free(
        &self,
        gathered: &mut Gathered,
        found: Option<Found>,
        at: Pfn,
        end: Pfn,
    ) -> ControlFlow<(), u32> {
        let free = match found {
            Some(found) => found.word.kind() == PageType::Free,
            // Untouched, or on its way between two states.
            None => self.pages.map.region(at).is_some(),
        };
        if !free {
            return ControlFlow::Continue(block_end(found, at));
        }
        // The largest that fits: what is free as a larger block is split for it.
        let block = found.map_or(MAX_ORDER, |f| f.word.order());
        let aligned = at.0.trailing_zeros() as usize;
        let order = block.min(aligned).min((end.0 - at.0).ilog2() as usize);
        for order in (0..=order).rev() {
            if self.alloc_pages_at(at, order).is_ok() {
                gathered.push(self, at, order);
                return ControlFlow::Continue(at.0 + (1 << order));
            }
        }
        ControlFlow::Continue(at.0 + 1)
    }

    fn take_used(
        &self,
        gathered: &mut Gathered,
        found: Option<Found>,
        at: Pfn,
        start: Pfn,
        end: Pfn,
    ) -> Step {
        let Some(found) = found else {
            return match self.pages.map.region(at) {
                Some(_) => Step::Past(at.0 + 1),
                None => Step::Stays(Obstacle {
                    pfn: at,
                    kind: PageType::None,
                    movable: false,
                }),
            };
        };
        let next = block_end(Some(found), at);
        let kind = found.word.kind();
        if kind == PageType::Free || kind == PageType::Bare && gathered.has(self, found) {
            return Step::Past(next);
        }
        let obstacle = Obstacle {
            pfn: at,
            kind,
            movable: is_movable(found.word),
        };
        if !obstacle.movable {
            return Step::Stays(obstacle);
        }
        let flags = gfp::GFP_HIGHUSER_MOVABLE & !gfp::__GFP_RECLAIM
            | gfp::__GFP_NOMEMALLOC
            | gfp::__GFP_NOWARN;
        if kind == PageType::Zsmalloc {
            let Ok(to) = self.alloc_pages(flags, 0) else {
                return Step::Stays(obstacle);
            };
            if !self.zs_migrate(at, to) {
                // SAFETY: ours, bare.
                unsafe { self.free_pages(to) };
                return Step::Stays(obstacle);
            }
            gathered.push(self, at, 0);
            return Step::Past(next);
        }
        match self.migrate_away(at, |order| self.alloc_pages(flags, order)) {
            // As large as it is now: the folio that was looked at may have been split meanwhile, or become part of a larger one.
            // A bad page in it goes out of use as the block comes back: not to the caller.
            Ok(old) if self.pages.map.bad.hits(old, self.order_of(old)) => {
                // SAFETY: bare pages, ours since the folio moved.
                unsafe { self.free_pages(old) };
                return Step::Stays(Obstacle {
                    pfn: at,
                    kind: PageType::Poisoned,
                    movable: false,
                });
            }
            Ok(old) if old >= start && old.0 + (1 << self.order_of(old)) <= end.0 => {
                gathered.push(self, old, self.order_of(old));
            }
            Ok(old) => {
                // It reaches out of the range: free, and taken from there in the next round.
                // SAFETY: bare pages, ours since the folio moved.
                unsafe { self.free_pages(old) };
            }
            Err(_) => return Step::Stays(obstacle),
        }
        Step::Past(next)
    }

    /// Makes of what was gathered, which covers the range, bare blocks as large as can be; the descriptors that are left over go back.
    fn join(&self, start: Pfn, pages: u32) {
        let map = &self.pages.map;
        let mut descs = DescList::new();
        for (block, order) in blocks(start.0, start.0 + pages) {
            let first = map.word(block).load_owned();
            let small = first.order();
            let whole = Word::described(PageType::Bare, order, first.desc(), first.class());
            // The head first: until the others are gone they say what is true of them.
            map.word(block).publish(whole);
            let mut at = block.0 + (1 << small);
            while at < block.0 + (1 << order) {
                let word = map.word(Pfn(at)).load_owned();
                if let Some(region) = map.region(Pfn(at)) {
                    region.clear_tails(Pfn(at), word.order());
                    region.word(Pfn(at)).publish(Word::ZERO);
                }
                descs.push(map, word.desc());
                at += 1 << word.order();
            }
            if order > TAIL_WORDS_ORDER {
                if let Some(region) = map.region(block) {
                    region.clear_tails(block, small);
                }
            } else {
                map.publish_block(block, whole);
            }
        }
        if !descs.is_empty() {
            self.put(descs);
        }
    }

    /// Makes a free block of this order by moving what is in the way, if that goes (`compact_zone_order`); says how many there are more.
    /// It goes to the zone, for whoever is faster.
    ///
    /// # Context
    ///
    /// May sleep.
    pub fn compact(&self, order: usize) -> usize {
        let order = order.min(MAX_ORDER);
        // On from where the last one was made, and round once: what lies before was looked at not long ago.
        let from = self.compact_at.load(Ordering::Relaxed);
        usize::from(self.compact_in(from..u32::MAX, order) || self.compact_in(0..from, order))
    }

    fn compact_in(&self, range: Range<u32>, order: usize) -> bool {
        let size = 1u32 << order;
        for region in self.pages.map.regions() {
            let first = region.start.max(range.start);
            let mut at = first.checked_next_multiple_of(size).unwrap_or(u32::MAX);
            while at < range.end && region.end.saturating_sub(at) >= size {
                if self.worth_compacting(Pfn(at), order)
                    && self.alloc_contig_range(Pfn(at), size).is_ok()
                {
                    // SAFETY: ours, just gathered, one block since it is aligned.
                    unsafe { self.free_pages(Pfn(at)) };
                    self.drain_all();
                    self.compact_at.store(at + size, Ordering::Relaxed);
                    let pin = self.pages.pin();
                    self.pages.stats(&pin).add(&pin, Event::CompactSuccess, 1);
                    return true;
                }
                at += size;
            }
        }
        false
    }

    /// Is this range neither free as a whole nor with anything that cannot be moved, and is less than half of it in use?
    fn worth_compacting(&self, start: Pfn, order: usize) -> bool {
        let end = Pfn(start.0 + (1 << order));
        let region = self.pages.map.region(start);
        if order >= PAGEBLOCK_ORDER
            && region.is_some_and(|r| r.block_migratetype(start) == MigrateType::Unmovable)
        {
            return false;
        }
        let (mut used, mut fit) = (0, true);
        self.each_in(start, end, |found, at| {
            let next = block_end(found, at).min(end.0);
            match found {
                Some(f) if f.word.kind() == PageType::Free => {
                    fit &= f.word.order() < order;
                }
                Some(f) if is_movable(f.word) => used += next - at.0,
                // Untouched memory is as good as free, and as a whole.
                _ => fit = false,
            }
            if fit {
                ControlFlow::Continue(next)
            } else {
                ControlFlow::Break(())
            }
        });
        fit && used > 0 && used <= 1 << order >> 1
    }

    /// Frees bare pages that [`alloc_contig_range`](Self::alloc_contig_range) gave (`free_contig_range`).
    ///
    /// # Safety
    ///
    /// The range is one that it gave, and nobody uses it any more.
    pub unsafe fn free_contig_range(&self, start: Pfn, pages: u32) {
        for (block, _) in blocks(start.0, start.0 + pages) {
            // SAFETY: the caller's promise; these are the blocks it came in.
            unsafe { self.free_pages(block) };
        }
    }
}

/// Can what this word speaks for be moved, if nobody is at it?
fn is_movable(word: Word) -> bool {
    word.is_folio() || zsmalloc::is_movable(word)
}

/// One past the last page of the block that a page is in.
fn block_end(found: Option<Found>, at: Pfn) -> u32 {
    found.map_or(at.0 + 1, |f| f.head.0 + (1 << f.word.order()))
}

/// What compaction could not get is no error of memory.
impl From<Obstacle> for AllocError {
    fn from(_: Obstacle) -> AllocError {
        AllocError::Busy
    }
}
