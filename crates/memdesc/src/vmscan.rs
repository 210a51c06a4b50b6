//! Reclaim: file folios that were not used of late go, so that there is memory for others.
//!
//! Two lists, as in Linux without generations: what is read once passes through the inactive list; what is used a second time while it
//! is there becomes active. When the inactive list is short, the oldest of the active go back to it. A folio is used if an entry that maps it was, or if
//! it was read or written by a call.
//!
//! Anonymous memory has nowhere to go here, as on a Linux without swap, and is not looked at.
//!
//! Source: `shrink_node`, `shrink_folio_list`, `folio_check_references`, `balance_pgdat` of Linux.

use crate::address::Pfn;
use crate::desc::{Folio, FolioFlags, Held, Place};
use crate::folio::LruList;
use crate::gfp;
use crate::memcg::Group;
use crate::memmap::PageType;
use crate::mm::Mm;
use crate::mmap::Unmap;
use crate::platform::{Platform, ReclaimRequest};
use crate::stats::Event;
use crate::sync::atomic::Ordering;

/// Folios looked at in one go (`SWAP_CLUSTER_MAX`).
const BATCH: u32 = 32;

/// What becomes of a folio that reclaim looked at.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Verdict {
    /// It went.
    Freed,
    /// Once more round the inactive list.
    Keep,
    /// It is in use.
    Activate,
}

impl<P: Platform> Mm<P> {
    /// Makes file memory free, of all nodes (`shrink_zones`); says how many pages. Each attempt looks at more.
    pub(crate) fn shrink_lru(&self, request: &ReclaimRequest) -> usize {
        self.shrink_nodes(request, None)
    }

    /// The same of what is charged to a group and to those below it. Others' folios are passed over: they keep their order, and whether they are
    /// active.
    pub(crate) fn shrink_lru_of(&self, request: &ReclaimRequest, group: &Group) -> usize {
        self.shrink_nodes(request, Some(group))
    }

    fn shrink_nodes(&self, request: &ReclaimRequest, of: Option<&Group>) -> usize {
        if !request.gfp.contains(gfp::__GFP_IO) {
            return 0;
        }
        let wanted = BATCH.max(2 << request.order) as usize;
        let may_write = request.gfp.contains(gfp::__GFP_FS);
        let mut freed = 0;
        for node in 0..self.lru_nodes() {
            let missing = wanted - freed.min(wanted);
            freed += self.shrink_node(node, missing, request.attempt, may_write, of);
            if freed >= wanted {
                break;
            }
        }
        freed
    }

    /// Makes memory free as a request that found none would (`try_to_free_pages`): asks the shrinkers, evicts what is cached of files,
    /// compacts. Says about how many pages.
    ///
    /// # Context
    ///
    /// May sleep.
    pub fn try_to_free_pages(&self, request: &ReclaimRequest) -> usize {
        use crate::page_alloc::alloc::Descriptors;
        self.reclaim(request)
    }

    /// Reclaims in the background until every zone is above its high watermark and what was added to it for a while, or nothing more can be had (`kswapd`): for the
    /// platform, when [`Platform::wake_reclaim`] was called. What was added is gone then, reached or not, as in `balance_pgdat`: who allocates is held to it. Says how
    /// many pages came free.
    ///
    /// # Context
    ///
    /// May sleep.
    pub fn kswapd(&self) -> usize {
        let mut freed = 0;
        for attempt in 0..8 {
            let low = |zone: &crate::page_alloc::zone::Zone| {
                let boost = zone.marks.boost.load(Ordering::Relaxed);
                zone.managed > 0 && zone.free_pages() <= zone.marks.high + boost
            };
            while self.pages.zones.iter().any(low) {
                let mut now = 0;
                for node in 0..self.lru_nodes() {
                    now += self.shrink_node(node, BATCH as usize, attempt, true, None);
                }
                freed += now;
                self.drain_all();
                if now == 0 {
                    break;
                }
            }
        }
        for index in 0..self.pages.zones.len() {
            // Under the lock, whose release works out what is above the marks.
            self.pages.with_zone_mut(index, |locked| {
                locked.zone.marks.boost.store(0, Ordering::Relaxed);
            });
        }
        freed
    }

    fn shrink_node(
        &self,
        node: usize,
        wanted: usize,
        attempt: u32,
        may_write: bool,
        of: Option<&Group>,
    ) -> usize {
        let mut freed = 0;
        // At the fourth attempt all of the list, at the first an eighth.
        let view = self.lru_view(node);
        let inactive = view.folios[LruList::InactiveFile as usize];
        let share = inactive >> 3u32.saturating_sub(attempt);
        let mut budget = share.max(u64::from(BATCH));
        if of.is_some() {
            // A group's folios are anywhere: once round each list, and its active ones when its inactive ones were not enough.
            let active = view.folios[LruList::ActiveFile as usize];
            let mut ages = if attempt > 0 { active } else { 0 };
            budget = inactive;
            while ages > 0 {
                self.shrink_active(node, of);
                ages = ages.saturating_sub(u64::from(BATCH));
                budget += u64::from(BATCH);
            }
        }
        while freed < wanted && budget > 0 {
            let view = self.lru_view(node);
            let inactive = view.pages[LruList::InactiveFile as usize];
            if of.is_none() && inactive <= view.pages[LruList::ActiveFile as usize] {
                self.shrink_active(node, None);
            }
            let (scanned, now) = self.shrink_inactive(node, may_write, of);
            freed += now;
            if scanned == 0 {
                break;
            }
            budget = budget.saturating_sub(u64::from(scanned));
        }
        let pin = self.pages.pin();
        let stats = self.pages.stats(&pin);
        stats.add(&pin, Event::PgSteal, freed as u64);
        freed
    }

    /// The oldest of the active list go to the inactive one (`shrink_active_list`); they show there whether they are in use.
    fn shrink_active(&self, node: usize, of: Option<&Group>) {
        let mut taken = self.lru_isolate_oldest(node, LruList::ActiveFile, BATCH);
        while let Some(head) = taken.pop(&self.pages.map) {
            let folio = self.folio_of(head);
            if self.is_charged_within(head, of) {
                folio.clear_flag(FolioFlags::ACTIVE);
            }
            self.lru_insert(folio, head, false);
            self.folio_put(folio, head, Held::REF);
        }
    }

    /// Looks at the oldest of the inactive list: how many, and how many pages went.
    fn shrink_inactive(&self, node: usize, may_write: bool, of: Option<&Group>) -> (u32, usize) {
        let mut taken = self.lru_isolate_oldest(node, LruList::InactiveFile, BATCH);
        let scanned = taken.scanned;
        let mut freed = 0;
        while let Some(head) = taken.pop(&self.pages.map) {
            let folio = self.folio_of(head);
            let order = self.pages.map.word(head).load_owned().order();
            let verdict = if self.is_charged_within(head, of) {
                self.try_to_free(folio, head, may_write)
            } else {
                Verdict::Keep
            };
            match verdict {
                Verdict::Freed => {
                    freed += 1 << order;
                    continue;
                }
                Verdict::Activate => {
                    folio.set_flag(FolioFlags::ACTIVE);
                }
                Verdict::Keep => {}
            }
            self.lru_insert(folio, head, false);
            self.folio_put(folio, head, Held::REF);
        }
        let pin = self.pages.pin();
        let stats = self.pages.stats(&pin);
        stats.add(&pin, Event::PgScan, u64::from(scanned));
        (scanned, freed)
    }

    /// Is an isolated folio charged to this group, or to one below it? Without a group any is.
    fn is_charged_within(&self, head: Pfn, of: Option<&Group>) -> bool {
        let Some(top) = of else { return true };
        let memcg = self.pages.memcg_of(self.pages.map.word(head).load_owned());
        let group = self.pages.memcg.get(memcg);
        group.is_some_and(|group| group.is_within(top))
    }

    /// One folio, isolated, with the isolator's reference, which goes with it if it goes (`shrink_folio_list`).
    fn try_to_free(&self, folio: &Folio, head: Pfn, may_write: bool) -> Verdict {
        let Some(locked) = self.folio_trylock(folio) else {
            return Verdict::Keep;
        };
        let handle = self.folio_mapping(folio);
        if self.pages.map.word(head).load_owned().kind() != PageType::File || handle == 0 {
            // Truncated meanwhile: it goes with the last reference.
            return Verdict::Keep;
        }
        if folio.has_flag(FolioFlags::WRITEBACK) {
            return Verdict::Keep;
        }
        let used = self.rmap_referenced(folio, head);
        let was_used = folio.clear_flag(FolioFlags::REFERENCED);
        if used > 0 {
            // Used through an entry: once may be the fault that brought it. Twice, by two, or since we looked last is in use.
            folio.set_flag(FolioFlags::REFERENCED);
            return if was_used || used > 1 {
                Verdict::Activate
            } else {
                Verdict::Keep
            };
        }
        if !self.rmap_unmap(folio, head, Unmap::Drop, None) {
            return Verdict::Keep;
        }
        // SAFETY: a locked folio that belongs to a mapping keeps it.
        let mapping = unsafe { self.mapping_at(handle).as_ref() };
        if folio.has_flag(FolioFlags::DIRTY)
            && !(may_write && self.folio_write(mapping, folio, head).is_ok())
        {
            return Verdict::Keep;
        }
        if let Place::Private(_) = folio.place() {
            let private = self.folio_private(folio).unwrap_or(0);
            // SAFETY: it lives as long as the mapping.
            if !unsafe { &*mapping.ops() }.release_folio(private) {
                return Verdict::Keep;
            }
            self.detach_private(folio, head);
        }
        if !self.filemap_remove_frozen(mapping, folio, head) {
            return Verdict::Keep;
        }
        drop(locked);
        self.folio_release(head);
        Verdict::Freed
    }
}
