//! What keeps memory short and moving: a ballast that grows and shrinks, a shrinker, compaction, pages that go bad and are good again, background reclaim,
//! reports of free memory.

use arrayvec::ArrayVec;
use memdesc::gfp::{__GFP_NORETRY, __GFP_NOWARN, GFP_KERNEL, GFP_NOWAIT};
use memdesc::{MfResult, Mm, PAGE_SIZE, PAGEBLOCK_ORDER, Pfn, ReclaimRequest, Shrinker};
use spin::{Mutex, Once};

use super::things::whose;
use super::{Count, Soak, Worker};
use crate::platform::Metal;
use crate::{time, wrong};

/// From one low water of the ballast to the next.
const WAVE_NS: u64 = 8_000_000_000;
/// Of RAM, at low and at high water: never so little that what is left would be enough.
const BALLAST_PERCENT: [u64; 2] = [50, 80];

/// Pages that the shrinker lets go of.
struct Hoard {
    mm: Once<&'static Mm<Metal>>,
    pages: Mutex<ArrayVec<Pfn, 1024>>,
}

static HOARD: Hoard = Hoard {
    mm: Once::new(),
    pages: Mutex::new(ArrayVec::new_const()),
};

impl Shrinker for Hoard {
    fn count_objects(&self) -> usize {
        self.pages.try_lock().map_or(0, |pages| pages.len())
    }

    fn scan_objects(&self, nr: usize, _request: &ReclaimRequest) -> usize {
        let Some(mm) = self.mm.get() else {
            return 0;
        };
        let mut freed = 0;
        while freed < nr {
            // Not held while it is freed.
            let Some(pfn) = self.pages.try_lock().and_then(|mut pages| pages.pop()) else {
                break;
            };
            // SAFETY: a page of the hoard, taken out of it just now.
            unsafe { mm.free_pages(pfn) };
            freed += 1;
        }
        freed
    }
}

pub(super) fn start(mm: &'static Mm<Metal>) {
    HOARD.mm.call_once(|| mm);
    mm.register_shrinker(&HOARD);
}

/// What was taken goes back.
pub(super) fn end(soak: &Soak) {
    let mm = soak.mm;
    if !mm.unregister_shrinker(&HOARD) {
        wrong!(soak, "the shrinker is gone");
    }
    for pfn in HOARD.pages.lock().drain(..) {
        // SAFETY: taken by a worker, and freed once.
        unsafe { mm.free_pages(pfn) };
    }
    for pfn in soak.ballast.lock().drain(..) {
        check(soak, pfn);
        // SAFETY: the same.
        unsafe { mm.free_pages(pfn) };
    }
    // Pages that others still had when they went bad are out of use once all is drained.
    mm.shrink();
    for pfn in soak.bad.lock().drain(..) {
        if let Err(why) = mm.unpoison_memory(pfn) {
            wrong!(soak, "{pfn:?} stays bad: {why}");
        }
    }
    if mm.num_poisoned_pages() > 0 {
        wrong!(soak, "{} pages stay bad", mm.num_poisoned_pages());
    }
}

/// The ends of each page of a block, and what is written there.
fn ends(soak: &Soak, pfn: Pfn) -> impl Iterator<Item = (*mut u64, u64)> {
    let at = soak.mm.page_address(pfn).cast::<u64>();
    let words = PAGE_SIZE / 8;
    let pages = 0..1usize << PAGEBLOCK_ORDER;
    pages
        .flat_map(move |page| [page * words, page * words + words - 1])
        .map(move |word| {
            let value = u64::from(pfn.0) << 32 ^ word as u64 ^ 0x5bd1_e995_0000_0000;
            (at.wrapping_add(word), value)
        })
}

/// Writes to a block of the ballast.
fn mark(soak: &Soak, pfn: Pfn) {
    for (at, value) in ends(soak, pfn) {
        // SAFETY: in a block that is the ballast's.
        unsafe { at.write(value) };
    }
}

/// What was written there is there.
fn check(soak: &Soak, pfn: Pfn) {
    // SAFETY: in a block that is the ballast's, and was written to.
    let wrong = ends(soak, pfn).find(|&(at, value)| unsafe { at.read() } != value);
    if let Some((at, value)) = wrong {
        // SAFETY: the same.
        let found = unsafe { at.read() };
        wrong!(
            soak,
            "the ballast's block {pfn:?} holds {found:#x} at {at:?}, not {value:#x}: {}",
            whose(found)
        );
    }
}

impl Worker {
    pub(super) fn keep_house(&mut self, soak: &Soak) {
        match self.dice.below(64) {
            0..=39 => self.ballast(soak),
            40..=51 => self.hoard(soak),
            52 => {
                soak.mm.compact(1 + self.dice.below(PAGEBLOCK_ORDER));
            }
            53..=54 => {
                // It is tried again at a tick.
                let _ = soak.mm.page_report();
            }
            55 => self.break_page(soak),
            56 => self.repair(soak),
            57 if self.one_in(8) => {
                soak.mm.shrink();
            }
            58 => soak.mm.drain_all(),
            59 => self.census(soak),
            _ => {
                soak.mm.rcu_work();
            }
        }
    }

    /// The ballast follows its wave.
    fn ballast(&mut self, soak: &Soak) {
        let Some(mut ballast) = soak.ballast.try_lock() else {
            return;
        };
        let phase = (time::now() - soak.start) % WAVE_NS * 200 / WAVE_NS;
        let height = if phase < 100 { phase } else { 200 - phase };
        let [low, high] = BALLAST_PERCENT;
        let percent = low * 100 + (high - low) * height;
        let wanted = ((soak.ram >> PAGEBLOCK_ORDER) * percent / 10_000) as usize;
        if !ballast.is_empty() {
            let at = self.dice.below(ballast.len());
            check(soak, ballast[at]);
        }
        // Most of the time without much ado: who moves all memory about for a block does nothing else for long.
        let gfp = if self.one_in(8) {
            GFP_KERNEL | __GFP_NORETRY | __GFP_NOWARN
        } else {
            GFP_NOWAIT | __GFP_NOWARN
        };
        for _ in 0..4 {
            if ballast.len() > wanted {
                let at = self.dice.below(ballast.len());
                let pfn = ballast.swap_remove(at);
                check(soak, pfn);
                // SAFETY: of the ballast, and freed once.
                unsafe { soak.mm.free_pages(pfn) };
            } else if ballast.len() < wanted && ballast.len() < ballast.capacity() {
                match soak.mm.alloc_pages(gfp, PAGEBLOCK_ORDER) {
                    Ok(pfn) => {
                        mark(soak, pfn);
                        ballast.push(pfn);
                    }
                    Err(_) => return soak.count(Count::Refused),
                }
            }
        }
    }

    /// Something for the shrinker to let go of.
    fn hoard(&mut self, soak: &Soak) {
        for _ in 0..16 {
            let gfp = GFP_KERNEL | __GFP_NORETRY | __GFP_NOWARN;
            let Ok(pfn) = soak.mm.alloc_pages(gfp, 0) else {
                return soak.count(Count::Refused);
            };
            let pages = HOARD.pages.try_lock();
            if pages.is_none_or(|mut pages| pages.try_push(pfn).is_err()) {
                // SAFETY: ours, and in no hoard.
                unsafe { soak.mm.free_pages(pfn) };
                return;
            }
        }
    }

    /// A page goes bad: one of its own, which is out of use once it is freed, or one of a user's, who keeps what was in it.
    fn break_page(&mut self, soak: &Soak) {
        let mm = soak.mm;
        let Some(mut bad) = soak.bad.try_lock() else {
            return;
        };
        if bad.is_full() {
            return;
        }
        if self.one_in(2) {
            let Some(page) = self.a_users_page(soak) else {
                return;
            };
            if mm.soft_offline_page(page).is_ok() {
                soak.count(Count::Bad);
                bad.push(page);
            }
            return;
        }
        let order = self.dice.below(4);
        let Ok(pfn) = mm.alloc_pages(GFP_KERNEL | __GFP_NOWARN, order) else {
            return soak.count(Count::Refused);
        };
        let page = pfn.add(self.dice.below(1 << order) as u32);
        let failure = mm.memory_failure(page);
        // SAFETY: ours, and freed once.
        unsafe { mm.free_pages(pfn) };
        if failure.result == MfResult::Delayed {
            soak.count(Count::Bad);
            bad.push(page);
        } else if failure.result != MfResult::Failed {
            wrong!(soak, "a page in use failed: {failure:?}");
        }
    }

    /// And is good again.
    fn repair(&mut self, soak: &Soak) {
        let Some(mut bad) = soak.bad.try_lock() else {
            return;
        };
        if bad.is_empty() {
            return;
        }
        let at = self.dice.below(bad.len());
        let pfn = bad.swap_remove(at);
        if soak.mm.unpoison_memory(pfn).is_err() {
            // On its way, or no memory for its descriptor now.
            bad.push(pfn);
        }
    }

    /// Every page is counted, whatever changes meanwhile.
    fn census(&self, soak: &Soak) {
        let mut pages = 0;
        soak.mm.census_visit(|step| pages += u64::from(step.pages));
        if pages != soak.ram {
            wrong!(
                soak,
                "a census of {pages} pages, and there are {}",
                soak.ram
            );
        }
    }
}
