//! Charging, with reclaim at a limit; and taking back, from any context.

use core::panic::Location;

use super::MemcgStat;
use super::counter::{Refused, Underflow, charge, uncharge};
use super::group::{Group, Memcgs};
use crate::address::{PAGE_SHIFT, Pfn};
use crate::error::AllocError;
use crate::gfp::{self, Flags};
use crate::memmap::Word;
use crate::mm::Mm;
use crate::page_alloc::alloc::PageAllocator;
use crate::platform::{FaultPoint, Platform, ReclaimRequest};
use crate::report::{Corruption, Report};
use crate::sync::atomic::Ordering;

/// Attempts at reclaim before a charge is refused (`MAX_RECLAIM_RETRIES`).
pub(super) const MAX_RECLAIM_RETRIES: u32 = 16;

impl Memcgs {
    /// Charges a group, or the nearest above it that is online; says which, 0 for nobody: the root. The level that refused if there is no room.
    pub(super) fn try_charge(&self, id: u16, bytes: u64, stat: MemcgStat) -> Result<u16, &Group> {
        let mut at = self.get(id);
        while let Some(group) = at {
            match charge(group, bytes, &|group| self.release(group)) {
                Ok(()) => {
                    group.stats[stat as usize].fetch_add(bytes, Ordering::Relaxed);
                    return Ok(group.id());
                }
                // Its parent is kept by it as long as something is charged to it; if nothing is, the parent may be gone as well,
                // and is another's, or offline.
                Err((Refused::Offline, _)) => at = group.up(),
                Err((Refused::Limit | Refused::Lowered(_), level)) => return Err(level),
            }
        }
        Ok(0)
    }

    /// Takes a charge back. Nothing has changed if it was none.
    pub(super) fn uncharge(&self, id: u16, bytes: u64, stat: MemcgStat) -> Result<(), Underflow> {
        let group = self.get(id).ok_or(Underflow)?;
        let less = |now: u64| now.checked_sub(bytes);
        group.stats[stat as usize]
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, less)
            .map_err(|_| Underflow)?;
        // Last: it may be another's group afterwards.
        uncharge(group, bytes, &|group| self.release(group))
    }

    /// What is charged is of another kind from now on.
    pub(super) fn restat(&self, id: u16, bytes: u64, from: MemcgStat, to: MemcgStat) {
        if let Some(group) = self.get(id) {
            group.stats[from as usize].fetch_sub(bytes, Ordering::Relaxed);
            group.stats[to as usize].fetch_add(bytes, Ordering::Relaxed);
        }
    }
}

/// A charge for what is not had yet: taken back if it is dropped.
#[must_use = "a charge that is dropped is taken back"]
pub(crate) struct Charge<'m, P: Platform> {
    pages: &'m PageAllocator<P>,
    id: u16,
    bytes: u64,
    stat: MemcgStat,
}

impl<P: Platform> Charge<'_, P> {
    /// Whom it is charged to.
    pub(crate) fn id(&self) -> u16 {
        self.id
    }

    /// Whom what is allocated next is charged to; 0 for nobody.
    pub(crate) fn of(charge: &Option<Self>) -> u16 {
        charge.as_ref().map_or(0, Charge::id)
    }

    /// What it was for is had, or not: then the charge goes.
    pub(crate) fn settle<T>(
        charge: Option<Self>,
        got: Result<T, AllocError>,
    ) -> Result<T, AllocError> {
        if got.is_ok() {
            charge.map(Charge::keep);
        }
        got
    }

    /// It is had: whoever frees it takes the charge back.
    pub(crate) fn keep(self) -> u16 {
        let id = self.id;
        core::mem::forget(self);
        id
    }
}

impl<P: Platform> Drop for Charge<'_, P> {
    fn drop(&mut self) {
        let nowhere = (Pfn::NONE, Word::ZERO, 0);
        self.pages
            .memcg_uncharge(self.id, self.bytes, self.stat, nowhere);
    }
}

impl<P: Platform> PageAllocator<P> {
    /// Takes a charge back; `of` is what was charged, for the report if it was not.
    ///
    /// # Context
    ///
    /// Any. Allocates nothing, takes no lock.
    #[track_caller]
    pub(crate) fn memcg_uncharge(
        &self,
        id: u16,
        bytes: u64,
        stat: MemcgStat,
        of: (Pfn, Word, usize),
    ) {
        if self.memcg.uncharge(id, bytes, stat).is_err() {
            let (pfn, word, address) = of;
            let what = Corruption::Uncharged;
            let report = self.report_plain(what, pfn, address, Location::caller());
            self.platform.corruption(&Report { word, ..report });
        }
    }
}

impl<P: Platform> Mm<P> {
    /// Charges a group before something is allocated; none if nobody is to be charged (`try_charge_memcg`).
    ///
    /// # Context
    ///
    /// With flags that allow it, may sleep and reclaim; else any.
    #[cold]
    #[inline(never)]
    pub(crate) fn memcg_charge(
        &self,
        id: u16,
        bytes: u64,
        stat: MemcgStat,
        gfp: Flags,
    ) -> Result<Option<Charge<'_, P>>, AllocError> {
        if id == 0 {
            return Ok(None);
        }
        if self.platform().should_fail(FaultPoint::Charge) {
            return Err(AllocError::Injected);
        }
        let may_wait = gfp.allow_blocking() && !gfp.contains(gfp::__GFP_FAST_TRY);
        let most = if !may_wait {
            0
        } else if gfp.contains(gfp::__GFP_NORETRY) {
            1
        } else {
            MAX_RECLAIM_RETRIES
        };
        let mut attempt = 0;
        loop {
            let level = match self.pages.memcg.try_charge(id, bytes, stat) {
                Ok(0) => return Ok(None),
                Ok(id) => {
                    let pages = &self.pages;
                    return Ok(Some(Charge {
                        pages,
                        id,
                        bytes,
                        stat,
                    }));
                }
                Err(level) => level,
            };
            if attempt >= most {
                return Err(AllocError::Limit);
            }
            let freed = self.memcg_reclaim(level, bytes, gfp, attempt);
            if freed == 0 && attempt > 0 {
                return Err(AllocError::Limit);
            }
            attempt += 1;
        }
    }

    /// Makes room in a group: what is freed already and only waits, then file pages of it and all below it
    /// (`try_to_free_mem_cgroup_pages`). Says about how many pages or objects went.
    pub(super) fn memcg_reclaim(
        &self,
        group: &Group,
        bytes: u64,
        gfp: Flags,
        attempt: u32,
    ) -> usize {
        let freed = if attempt == 0 { self.rcu_work() } else { 0 };
        let pages = bytes.div_ceil(1 << PAGE_SHIFT).max(1);
        let request = ReclaimRequest {
            gfp,
            order: pages.min(1 << 20).next_power_of_two().ilog2() as usize,
            attempt,
        };
        freed + self.shrink_lru_of(&request, group)
    }
}
