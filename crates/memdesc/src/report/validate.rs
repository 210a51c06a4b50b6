//! Everything looked at: words, free lists, slabs and their objects (`validate_slab_cache`, and what Linux has no name for).
//!
//! The words are the truth: which blocks are free, and which slabs there are, is in them, so lists and counts that were overwritten are made
//! anew from them. A word that was overwritten is only reported. At a quiet moment: what is on its way from one state to another looks wrong.
//!
//! Takes a zone's lock, and a cache's list lock, one after the other; and the list of caches round the latter.

use core::panic::Location;
use core::ptr::NonNull;

use super::{Corruption, Report};
use crate::address::{MAX_ORDER, Pfn};
use crate::desc::{FolioFlags, Slab, SlabList};
use crate::memmap::{Flaw, PageType, Region, TAIL_WORDS_ORDER, Word};
use crate::mm::Mm;
use crate::page_alloc::MigrateType;
use crate::page_alloc::zone::LockedZone;
use crate::platform::Platform;
use crate::slab::cache::{Cache, Lists, SlabHead};
use crate::slab::{CacheCore, debug};

/// What a look at everything found.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Validation {
    /// Words that say what cannot be.
    pub words: u64,
    /// Lists whose links were broken, of free blocks or of slabs.
    pub links: u64,
    /// Counts that did not agree.
    pub counts: u64,
    /// Objects of debug caches with bytes that should not be there; each of its zones counts.
    pub objects: u64,
    /// Lists and counts that are right again.
    pub repaired: u64,
}

impl Validation {
    /// All errors.
    pub fn errors(&self) -> u64 {
        self.words + self.links + self.counts + self.objects
    }
}

impl<P: Platform> Mm<P> {
    /// Looks at everything, tells `visit` what is wrong, and repairs lists and counts.
    ///
    /// # Context
    ///
    /// One that may take locks, at a quiet moment: no request in flight on any CPU. `visit` neither makes nor destroys caches.
    ///
    /// # Examples
    ///
    /// ```
    /// use memdesc::gfp::GFP_KERNEL;
    /// use memdesc::{Config, Mm};
    /// use memdesc_host::Host;
    ///
    /// let (host, ranges) = Host::small(1024).unwrap();
    /// let mm = Mm::new(host, &Config::default(), &ranges).unwrap();
    /// let pfn = mm.alloc_pages(GFP_KERNEL, 3).unwrap();
    /// let found = mm.validate(|report| panic!("{report}"));
    /// assert_eq!(found.errors(), 0);
    /// # let _ = pfn;
    /// ```
    #[track_caller]
    pub fn validate(&self, mut visit: impl FnMut(&Report<'_>)) -> Validation {
        let caller = Location::caller();
        let mut found = Validation::default();
        for region in self.pages.map.regions() {
            self.validate_words(region, &mut found, caller, &mut visit);
        }
        for index in 0..self.pages.zones.len() {
            let bad = self.pages.with_zone_mut(index, |zone| {
                let bad = zone.first_flaw();
                if bad.is_some() {
                    zone.relink();
                }
                bad
            });
            if let Some((pfn, flaw)) = bad {
                let what = match flaw {
                    Flaw::Counts => Corruption::BadCounts,
                    _ => Corruption::BadLinks,
                };
                found.count(what);
                found.repaired += 1;
                visit(&self.report_at(what, pfn, pfn.phys().0 as usize, caller));
            }
        }
        self.for_each_cache(|core| self.validate_cache(core, &mut found, caller, &mut visit));
        self.kfence_validate(caller, |what, report| {
            found.count(what);
            visit(report);
        });
        found
    }

    /// Looks at one cache: its lists, the counts of its slabs, and its objects if it is a debug cache (`validate_slab_cache`).
    ///
    /// # Context
    ///
    /// As [`validate`](Self::validate), and nobody uses the cache meanwhile.
    #[track_caller]
    pub fn validate_slab_cache(
        &self,
        cache: &Cache<'_>,
        mut visit: impl FnMut(&Report<'_>),
    ) -> Validation {
        let mut found = Validation::default();
        self.validate_cache(cache.core(), &mut found, Location::caller(), &mut visit);
        found
    }

    fn validate_words(
        &self,
        region: &Region,
        found: &mut Validation,
        caller: &'static Location<'static>,
        visit: &mut impl FnMut(&Report<'_>),
    ) {
        let mut at = region.start;
        while at < region.end {
            let (start, end) = region.untouched();
            let pfn = Pfn(at);
            let word = region.word(pfn).load();
            let flaw = if at >= start && at < end {
                // Never handed out: nobody wrote a word here but one who should not have.
                let stray = (at..end).find(|&p| region.word(Pfn(p)).load() != Word::ZERO);
                at = end;
                stray.map(|p| (Pfn(p), Corruption::BadWord))
            } else if word.is_tail() || !self.word_is_sane(pfn, word) {
                at += 1;
                Some((pfn, Corruption::BadWord))
            } else {
                let order = word.order();
                at += 1 << order;
                self.block_flaw(region, pfn, word)
            };
            if let Some((pfn, what)) = flaw {
                found.count(what);
                visit(&self.report_at(what, pfn, pfn.phys().0 as usize, caller));
            }
        }
    }

    /// What is wrong with a block whose own word makes sense: its tails, or what its descriptor says.
    fn block_flaw(&self, region: &Region, pfn: Pfn, word: Word) -> Option<(Pfn, Corruption)> {
        let order = word.order();
        if u64::from(pfn.0) + (1 << order) > u64::from(region.end) {
            return Some((pfn, Corruption::BadWord));
        }
        let kind = word.kind();
        let tails = || (1..1 << order).map(|tail| pfn.add(tail));
        let expected = if kind != PageType::Free && order <= TAIL_WORDS_ORDER {
            word
        } else {
            Word::ZERO
        };
        // The tails of counted blocks count how often they are mapped; those of inline types are heads of their own or zero.
        let stray = if word.is_counted() || kind == PageType::Driver {
            tails().find(|&tail| !region.word(tail).load().is_tail())
        } else if kind.has_descriptor() {
            tails().find(|&tail| region.word(tail).load() != expected)
        } else {
            None
        };
        if let Some(tail) = stray {
            return Some((tail, Corruption::BadWord));
        }
        if word.is_folio() {
            let folio = self.folio_at(word.desc());
            if folio.refcount() == 0 && !folio.has_flag(FolioFlags::LRU) {
                return Some((pfn, Corruption::BadCounts));
            }
        }
        if kind == PageType::Slab {
            let slab = self.pages.map.slab_behind(pfn.phys());
            if slab.is_none_or(|(slab, _)| self.cache_at(slab.cache_ptr()).is_none()) {
                return Some((pfn, Corruption::BadWord));
            }
        }
        None
    }

    fn validate_cache(
        &self,
        core: &CacheCore,
        found: &mut Validation,
        caller: &'static Location<'static>,
        visit: &mut impl FnMut(&Report<'_>),
    ) {
        // What is wrong with the lists: the first of it. It is repaired under the same hold.
        let flaw = {
            let mut lists = self.lists(core);
            let flaw = self.lists_flaw(core, &lists);
            if flaw.is_some() {
                self.relink_slabs(core, &mut lists);
            }
            flaw
        };
        if let Some((pfn, what)) = flaw {
            found.count(what);
            found.repaired += 1;
            let mut report = self.report_at(what, pfn, pfn.phys().0 as usize, caller);
            report.cache = Some(core.name());
            visit(&report);
        }
        // Setting one right lists them anew, in another order: from the start again, until there is none.
        loop {
            let wrong = {
                let mut lists = self.lists(core);
                let wrong = self.slab_counts_flaw(core, &lists);
                if let Some(slab) = wrong {
                    slab.repair(&self.pages.map, core.geometry_of(slab).objects as usize);
                    self.relink_slabs(core, &mut lists);
                }
                wrong.map(Slab::pfn)
            };
            let Some(pfn) = wrong else { break };
            found.count(Corruption::BadCounts);
            found.repaired += 1;
            let address = pfn.phys().0 as usize;
            let mut report = self.report_at(Corruption::BadCounts, pfn, address, caller);
            report.cache = Some(core.name());
            visit(&report);
        }
        if core.is_debug() {
            self.validate_objects(core, found, caller, visit);
        }
    }

    /// The first list that is broken, or count of the cache that is wrong.
    fn lists_flaw(&self, core: &CacheCore, lists: &Lists) -> Option<(Pfn, Corruption)> {
        let map = &self.pages.map;
        let (mut inuse, mut objects, mut pages, mut empty) = (0, 0, 0, 0);
        let mut first = None;
        for (index, list) in lists.by_share.iter().enumerate() {
            let (mut at, mut nr) = (list.head, 0);
            while at != Pfn::NONE {
                first = first.or(Some(at));
                let slab = map.region(at).and_then(|_| map.slab_behind(at.phys()));
                let slab = slab.filter(|(slab, offset)| {
                    *offset == 0
                        && core::ptr::eq(slab.cache_ptr(), core)
                        && slab.list().index() == index
                        && lists.agrees(map, slab)
                });
                let Some((slab, _)) = slab else {
                    return Some((at, Corruption::BadLinks));
                };
                // By the bitmap: a slab's own count is looked at after this.
                let (free, _) = slab.count_free(map);
                let all = core.geometry_of(slab).objects as usize;
                inuse += all.saturating_sub(free) as u64;
                objects += all as u64;
                pages += 1u64 << slab.order();
                empty += u32::from(free == all && slab.reserve() == 0);
                nr += 1;
                if nr > list.nr {
                    return Some((at, Corruption::BadLinks));
                }
                at = slab.links().next();
            }
            if nr != list.nr {
                let at = if list.head == Pfn::NONE {
                    first
                } else {
                    Some(list.head)
                };
                return Some((at.unwrap_or(Pfn::NONE), Corruption::BadLinks));
            }
        }
        let counted = (lists.inuse, lists.objects, lists.pages, lists.nr_empty);
        (counted != (inuse, objects, pages, empty))
            .then(|| (first.unwrap_or(Pfn::NONE), Corruption::BadCounts))
    }

    /// The first slab whose counts do not agree.
    fn slab_counts_flaw(&self, core: &CacheCore, lists: &Lists) -> Option<&Slab> {
        let map = &self.pages.map;
        for list in &lists.by_share {
            let mut at = list.head;
            while at != Pfn::NONE {
                let (slab, _) = map.slab_behind(at.phys())?;
                let objects = core.geometry_of(slab).objects as usize;
                let right = slab.objects() == objects && {
                    let (free, astray) = slab.count_free(map);
                    !astray && slab.inuse() + free == objects
                };
                if !right {
                    return Some(slab);
                }
                at = slab.links().next();
            }
        }
        None
    }

    /// Makes a cache's lists and counts anew: of all slabs that are its own by their words, and were in a list.
    fn relink_slabs(&self, core: &CacheCore, lists: &mut Lists) {
        let map = &self.pages.map;
        for list in &mut lists.by_share {
            *list = SlabHead {
                head: Pfn::NONE,
                nr: 0,
            };
        }
        (lists.inuse, lists.objects, lists.pages) = (0, 0, 0);
        (lists.nr_empty, lists.bitmap_bytes) = (0, 0);
        for region in map.regions() {
            for (pfn, word) in region.blocks() {
                if word.kind() != PageType::Slab {
                    continue;
                }
                let Some((slab, 0)) = map.slab_behind(pfn.phys()) else {
                    continue;
                };
                if !core::ptr::eq(slab.cache_ptr(), core) || slab.list() == SlabList::NONE {
                    continue;
                }
                let geometry = core.geometry_of(slab);
                slab.repair(map, geometry.objects as usize);
                slab.set_list(SlabList::NONE);
                lists.enter(geometry);
                lists.inuse += slab.inuse() as u64;
                lists.nr_empty += u32::from(slab.inuse() == 0 && slab.reserve() == 0);
                lists.relist(map, slab);
            }
        }
    }

    /// Every object of a debug cache, as its slab says it is.
    fn validate_objects(
        &self,
        core: &CacheCore,
        found: &mut Validation,
        caller: &'static Location<'static>,
        visit: &mut impl FnMut(&Report<'_>),
    ) {
        let map = &self.pages.map;
        for list in 0..SlabList::COUNT {
            let mut at = self.lists(core).by_share[list].head;
            while at != Pfn::NONE {
                let Some((slab, _)) = map.slab_behind(at.phys()) else {
                    break;
                };
                if slab.is_guarded() {
                    at = slab.links().next();
                    continue;
                }
                let geometry = core.geometry_of(slab);
                let base = map.virt(at.phys());
                for index in 0..geometry.objects as usize {
                    let Some(object) = NonNull::new(base.wrapping_add(geometry.offset(index)))
                    else {
                        continue;
                    };
                    let wrong = debug::check(core, object, slab.is_free(map, index));
                    for (what, byte) in wrong.into_iter().flatten() {
                        found.count(what);
                        let mut report = self.report_at(
                            what,
                            Pfn::containing(map.phys(object.as_ptr())),
                            object.addr().get(),
                            caller,
                        );
                        report.byte = Some(byte);
                        visit(&self.report_with(report, core, object));
                    }
                }
                at = slab.links().next();
            }
        }
    }

    /// Reports what checks found under locks.
    #[cold]
    #[inline(never)]
    pub(crate) fn report_flaws(&self) {
        while let Some((pfn, flaw)) = self.pages.map.checks.take() {
            let what = match flaw {
                Flaw::Word => Corruption::BadWord,
                Flaw::Links => Corruption::BadLinks,
                Flaw::Counts => Corruption::BadCounts,
            };
            let address = pfn.phys().0 as usize;
            let report = self.report_at(what, pfn, address, Location::caller());
            self.pages.platform.corruption(&report);
        }
    }
}

impl Validation {
    fn count(&mut self, what: Corruption) {
        match what {
            Corruption::BadWord => self.words += 1,
            Corruption::BadLinks => self.links += 1,
            Corruption::BadCounts => self.counts += 1,
            _ => self.objects += 1,
        }
    }
}

impl LockedZone<'_> {
    /// The first list that is broken, or count that is wrong.
    fn first_flaw(&self) -> Option<(Pfn, Flaw)> {
        let (first, end) = self.zone.regions;
        let regions = &self.map.regions()[first as usize..end as usize];
        let mut by_words = [[0u32; MigrateType::COUNT]; MAX_ORDER + 1];
        let mut last = Pfn::NONE;
        for region in regions.iter().filter(|r| r.zone == self.zone.index) {
            for (pfn, word) in region.blocks() {
                if word.is_free_in_zone(word.order()) && self.map.is_in_slab(word.desc()) {
                    by_words[word.order()][word.migratetype() as usize] += 1;
                    last = pfn;
                }
            }
        }
        let mut pages = 0;
        for (order, row) in self.lists.lists.iter().enumerate() {
            for (mt, list) in row.iter().enumerate() {
                let (mut at, mut nr) = (list.ends.head, 0);
                while at != Pfn::NONE {
                    let word = self.map.owned_word(at);
                    let fits = word.is_free_in_zone(order) && word.migratetype() as usize == mt;
                    nr += 1;
                    if !fits || !list.ends.agrees(self.map, at, word) || nr > list.nr {
                        return Some((at, Flaw::Links));
                    }
                    at = self.map.buddy_at(word.desc()).next();
                }
                if nr != by_words[order][mt] {
                    return Some((
                        if list.ends.head == Pfn::NONE {
                            last
                        } else {
                            list.ends.head
                        },
                        Flaw::Links,
                    ));
                }
                if nr != list.nr {
                    return Some((list.ends.head, Flaw::Counts));
                }
                pages += u64::from(nr) << order;
            }
        }
        (pages != self.lists.nr_listed).then_some((last, Flaw::Counts))
    }
}
