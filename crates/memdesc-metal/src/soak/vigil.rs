//! Vigils: a CPU stays in one address space for long and uses the same few pages all the time, so that it remembers where they are, while others move, copy and take
//! away just these. Whoever has moved a page writes all over where it was, and looks whether somebody still writes there.

use core::ptr::NonNull;
use core::sync::atomic::{AtomicU32, Ordering};

use memdesc::gfp::{__GFP_NOWARN, GFP_HIGHUSER_MOVABLE};
use memdesc::mmap::Access;
use memdesc::{PAGE_SIZE, Pfn};

use super::spaces::{COMMON, COMMON_PAGES, SHARED, is_pattern, not_let};
use super::things::{fill, first_wrong};
use super::{Count, PLACES, Soak, Worker};
use crate::percpu::MAX_CPUS;
use crate::traps::user_load;
use crate::users::with_space;
use crate::{time, wrong};

const PAGE: u64 = PAGE_SIZE as u64;
/// Pages that one worker stays with.
const FEW: usize = 4;
/// How long at least, and how many turns at least and at most: a busy host may let the time pass without us.
const VIGIL_NS: u64 = 3_000_000;
const TURNS: usize = 400;
const MOST_TURNS: usize = 20_000;
/// After so many turns it says again where its pages are.
const SAY_TURNS: usize = 64;

/// Where the pages were lately that workers stay with; 0: nowhere. A hint.
static WATCHED: [[AtomicU32; FEW]; MAX_CPUS] =
    [const { [const { AtomicU32::new(0) }; FEW] }; MAX_CPUS];

impl Worker {
    pub(super) fn vigil(&mut self, soak: &Soak) {
        match self.dice.below(8) {
            0..=1 => self.stay_common(soak),
            2 => self.stay_file(soak),
            3..=6 => (0..8).for_each(|_| self.move_watched(soak)),
            _ => self.fork_common(soak),
        }
    }

    /// Turns of a vigil, with the number of each.
    fn turns(&mut self, soak: &Soak, mut turn: impl FnMut(&mut Worker, usize)) {
        let until = time::now() + VIGIL_NS;
        for n in 0..MOST_TURNS {
            if soak.stopped() || n > TURNS && n % 16 == 0 && time::now() > until {
                break;
            }
            turn(self, n);
        }
        for watched in &WATCHED[self.me] {
            watched.store(0, Ordering::Relaxed);
        }
    }

    fn say(&self, nth: usize, page: Option<Pfn>) {
        WATCHED[self.me][nth].store(page.map_or(0, |page| page.0), Ordering::Relaxed);
    }

    /// Pages of its own in the address space of all, read and written.
    fn stay_common(&mut self, soak: &Soak) {
        let share = COMMON_PAGES / soak.workers;
        let start = COMMON + (self.me * share) as u64 * PAGE;
        let pages: [usize; FEW] = core::array::from_fn(|_| self.dice.below(share));
        let reads = 1 + self.dice.below(8);
        soak.count(Count::Vigils);
        with_space(&soak.common, || {
            self.turns(soak, |me, n| {
                for (nth, &page) in pages.iter().enumerate() {
                    if n % SAY_TURNS == 0 {
                        let at = start + page as u64 * PAGE;
                        me.say(nth, soak.common.page_at(at).map(|(_, page)| page));
                    }
                    if n % reads == 0 {
                        me.touch_common_page(soak, start, page);
                    } else {
                        me.look_common_page(soak, start, page);
                    }
                }
            });
        });
    }

    /// Pages of the file that a place maps, read.
    fn stay_file(&mut self, soak: &Soak) {
        let Some(place) = soak.places[self.dice.below(PLACES)].try_lock() else {
            return;
        };
        let Some((start, window, pages)) = place.shared() else {
            return;
        };
        let few: [u64; FEW] = core::array::from_fn(|_| self.dice.below(pages) as u64);
        soak.count(Count::Vigils);
        with_space(&place.space, || {
            self.turns(soak, |me, n| {
                for (nth, &page) in few.iter().enumerate() {
                    let at = start + page * PAGE;
                    if n % SAY_TURNS == 0 {
                        me.say(nth, place.space.page_at(at).map(|(_, page)| page));
                    }
                    match user_load(at as usize) {
                        None => not_let(soak, &place.space, at, Access::Read),
                        Some(found) if !me.is_first(soak, window + page, found) => wrong!(
                            soak,
                            "page {} of the file, looked at all the time in area {SHARED}, reads {found:#x}",
                            window + page
                        ),
                        Some(_) => {}
                    }
                }
            });
        });
    }

    /// A page that somebody stays with, or lately did.
    pub(super) fn a_watched_page(&mut self, soak: &Soak) -> Option<Pfn> {
        let by = self.dice.below(soak.workers);
        let page = WATCHED[by][self.dice.below(FEW)].load(Ordering::Relaxed);
        (page != 0).then_some(Pfn(page))
    }

    fn move_watched(&mut self, soak: &Soak) {
        if let Some(page) = self.a_watched_page(soak) {
            self.move_page(soak, page);
        }
    }

    /// A page goes elsewhere, if it can. Where it was nobody reads or writes any more.
    pub(super) fn move_page(&mut self, soak: &Soak, page: Pfn) {
        let mm = soak.mm;
        let order = mm.lookup(page).1;
        let Ok(to) = mm.alloc_pages(GFP_HIGHUSER_MOVABLE | __GFP_NOWARN, order) else {
            return soak.count(Count::Refused);
        };
        // SAFETY: bare pages of ours.
        let moved = unsafe { mm.migrate_folio(page, to) };
        if let Ok(from) = moved
            && let Some(at) = NonNull::new(mm.page_address(from))
        {
            soak.count(Count::Migrated);
            let (stamp, len) = (self.stamp(), PAGE_SIZE << order);
            // SAFETY: bare pages, ours from here on.
            unsafe { fill(at, len, stamp) };
            time::delay_us(self.dice.below(60) as u64);
            // SAFETY: just filled.
            if let Some((word, found)) = unsafe { first_wrong(at, len, stamp) } {
                wrong!(
                    soak,
                    "somebody still writes to {from:?}, which was moved to {to:?}: word {word} is {found:#x}"
                );
            }
        }
        // SAFETY: the pages that are not used are ours.
        unsafe { mm.free_pages(moved.unwrap_or(to)) };
    }

    /// A child of the address space of all: what it has does not change any more, whoever writes to its parent's.
    fn fork_common(&mut self, soak: &Soak) {
        let Ok(child) = soak.common.fork(soak.asid()) else {
            return soak.count(Count::Refused);
        };
        soak.count(Count::Forks);
        let pages: [u64; 64] = core::array::from_fn(|_| self.dice.below(COMMON_PAGES) as u64);
        let wait = self.dice.below(200) as u64;
        with_space(&child, || {
            let load = |page: u64| user_load((COMMON + page * PAGE) as usize);
            let seen = pages.map(load);
            time::delay_us(wait);
            for (page, seen) in pages.into_iter().zip(seen) {
                let (Some(before), Some(after)) = (seen, load(page)) else {
                    continue;
                };
                if before != after || !is_pattern(COMMON + page * PAGE, before) {
                    wrong!(
                        soak,
                        "page {page} of a child of the common space held {before:#x} and holds {after:#x}"
                    );
                }
            }
        });
    }
}
