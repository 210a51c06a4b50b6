//! A zone: its free lists, its counters, and its lock.

use core::marker::PhantomData;
use core::ptr::NonNull;

use crate::address::{MAX_ORDER, Pfn};
use crate::desc::PfnList;
use crate::freepage::reporting::ZoneReporting;
use crate::memmap::MemMap;
use crate::page_alloc::{MigrateType, ZoneType};
use crate::platform::{Holder, Platform};
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::{SpinGuard, SpinLock};

/// Blocks of one order and mobility, linked through their buddies by page frame number.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FreeList {
    pub(crate) ends: PfnList,
    pub(crate) nr: u32,
}

impl FreeList {
    pub(super) const EMPTY: FreeList = FreeList {
        ends: PfnList::EMPTY,
        nr: 0,
    };
}

/// What the zone lock guards.
///
/// # Invariants
///
/// - A block is in `lists[order][mt]` exactly when its head's word says free, `order`, `mt`, not in a per-CPU list.
/// - The other words of a block in a list are zero.
/// - `nr_listed` is the sum of the pages in all lists; `nr_untouched` of the regions' untouched ranges.
#[derive(Debug)]
pub(crate) struct ZoneLists {
    pub(crate) lists: [[FreeList; MigrateType::COUNT]; MAX_ORDER + 1],
    pub(crate) nr_listed: u64,
    pub(crate) nr_untouched: u64,
    /// Blocks in lists whose descriptor is not a `struct buddy` but what their last owner left.
    pub(crate) nr_morphed: u64,
    /// Where the search for them goes on.
    pub(crate) settle_at: Pfn,
    pub(crate) nr_highatomic: u64,
    pub(crate) events: ZoneEvents,
}

/// What happened under the lock, for the vmstat view.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct ZoneEvents {
    pub(crate) splits: u64,
    pub(crate) merges: u64,
    pub(crate) steals: u64,
    pub(crate) claims: u64,
    pub(crate) words_written: u64,
}

/// The marks that say how far a request may go.
#[derive(Debug)]
pub(crate) struct Watermarks {
    pub(crate) min: u64,
    pub(crate) low: u64,
    pub(crate) high: u64,
    /// Raised for a while after a pageblock was polluted.
    pub(crate) boost: AtomicU64,
}

/// A zone of a node.
#[derive(Debug)]
pub(crate) struct Zone {
    pub(crate) kind: ZoneType,
    pub(crate) node: u8,
    /// Its place in the zone table.
    pub(crate) index: u32,
    /// Pages of RAM, the allocator's own boot memory included.
    pub(crate) present: u64,
    /// Pages that were ever in the allocator.
    pub(crate) managed: u64,
    /// And those that were reserved, and came later. The watermarks do not know of them.
    pub(crate) given_back: AtomicU64,
    pub(crate) marks: Watermarks,
    /// Pages kept from requests that could have been served from a zone this much higher.
    pub(crate) lowmem_reserve: [u64; ZoneType::COUNT],
    /// Regions of this zone, as a range of indices (others may lie between).
    pub(crate) regions: (u32, u32),
    /// Free pages above the low mark, for the fast path's one compare. Written when the lock is dropped.
    pub(crate) headroom: AtomicU64,
    /// Mirror of listed + untouched, read without the lock by the watermark check.
    pub(crate) nr_free: AtomicU64,
    pub(crate) nr_highatomic: AtomicU64,
    pub(crate) reporting: ZoneReporting,
    lists: SpinLock<ZoneLists>,
}

impl Zone {
    pub(crate) fn new(
        kind: ZoneType,
        node: u8,
        index: u32,
        map: &MemMap,
        reporting: ZoneReporting,
    ) -> Zone {
        let (mut present, mut managed) = (0, 0);
        let mut range = (u32::MAX, 0);
        for (i, region) in map.regions().iter().enumerate() {
            if region.zone == index {
                present += u64::from(region.end - region.start);
                let (start, end) = region.untouched();
                managed += u64::from(end - start);
                range = (range.0.min(i as u32), i as u32 + 1);
            }
        }
        Zone {
            kind,
            node,
            index,
            present,
            managed,
            given_back: AtomicU64::new(0),
            marks: Watermarks {
                min: 0,
                low: 0,
                high: 0,
                boost: AtomicU64::new(0),
            },
            lowmem_reserve: [0; ZoneType::COUNT],
            regions: range,
            // None until the marks are set: the first request goes the long way and finds out.
            headroom: AtomicU64::new(0),
            nr_free: AtomicU64::new(managed),
            nr_highatomic: AtomicU64::new(0),
            reporting,
            lists: SpinLock::new(ZoneLists {
                lists: [[FreeList::EMPTY; MigrateType::COUNT]; MAX_ORDER + 1],
                nr_listed: 0,
                nr_untouched: managed,
                nr_morphed: 0,
                settle_at: Pfn(0),
                nr_highatomic: 0,
                events: ZoneEvents::default(),
            }),
        }
    }

    /// Free pages, without those in per-CPU lists.
    #[inline]
    pub(crate) fn free_pages(&self) -> u64 {
        self.nr_free.load(Ordering::Relaxed)
    }

    /// Takes the zone lock.
    ///
    /// Lock order: a leaf; no other lock is held or taken with it.
    #[inline]
    pub(crate) fn lock<'a, P: Platform>(
        &'a self,
        map: &'a MemMap,
        holder: Holder<'a, P>,
    ) -> ZoneGuard<'a, P> {
        ZoneGuard::new(self, map, self.lists.lock(holder))
    }

    /// Takes the zone lock if nobody has it. From any context.
    pub(crate) fn try_lock<'a, P: Platform>(
        &'a self,
        map: &'a MemMap,
        holder: Holder<'a, P>,
    ) -> Option<ZoneGuard<'a, P>> {
        Some(ZoneGuard::new(self, map, self.lists.try_lock(holder)?))
    }
}

/// The lists of a zone whose lock is held. A pointer and not a reference: a guard is passed by value, to `drop` for one, and a
/// reference in an argument claims to be the only one until the call returns, when another CPU has the lock already. (Miri found that.)
#[derive(Debug)]
pub(crate) struct HeldLists<'a>(NonNull<ZoneLists>, PhantomData<&'a mut ZoneLists>);

impl core::ops::Deref for HeldLists<'_> {
    type Target = ZoneLists;
    #[inline]
    fn deref(&self) -> &ZoneLists {
        // SAFETY: made by `ZoneGuard::new` from a lock that is held until after this is dropped, and nothing else reaches the value.
        unsafe { self.0.as_ref() }
    }
}

impl core::ops::DerefMut for HeldLists<'_> {
    #[inline]
    fn deref_mut(&mut self) -> &mut ZoneLists {
        // SAFETY: as above, and `&mut self` makes it the only one.
        unsafe { self.0.as_mut() }
    }
}

/// The zone lock is held as long as this lives.
#[derive(Debug)]
pub(crate) struct ZoneGuard<'a, P: Platform> {
    /// Dropped first: it leaves a copy of the counters behind.
    zone: LockedZone<'a>,
    _lock: SpinGuard<'a, ZoneLists, Holder<'a, P>>,
}

impl<'a, P: Platform> ZoneGuard<'a, P> {
    #[inline]
    fn new(
        zone: &'a Zone,
        map: &'a MemMap,
        lock: SpinGuard<'a, ZoneLists, Holder<'a, P>>,
    ) -> ZoneGuard<'a, P> {
        let lists = HeldLists(lock.value_ptr(), PhantomData);
        ZoneGuard {
            zone: LockedZone { zone, map, lists },
            _lock: lock,
        }
    }
}

impl<'a, P: Platform> core::ops::Deref for ZoneGuard<'a, P> {
    type Target = LockedZone<'a>;
    #[inline]
    fn deref(&self) -> &LockedZone<'a> {
        &self.zone
    }
}

impl<'a, P: Platform> core::ops::DerefMut for ZoneGuard<'a, P> {
    #[inline]
    fn deref_mut(&mut self) -> &mut LockedZone<'a> {
        &mut self.zone
    }
}

/// A zone whose lock is held: the free lists, and the words of all that is in them, are ours.
#[derive(Debug)]
pub(crate) struct LockedZone<'a> {
    pub(crate) zone: &'a Zone,
    pub(crate) map: &'a MemMap,
    pub(crate) lists: HeldLists<'a>,
}

impl Drop for LockedZone<'_> {
    #[inline]
    fn drop(&mut self) {
        // The watermark check reads these without the lock; they need not be exact.
        let free = self.lists.nr_listed + self.lists.nr_untouched;
        let marks = &self.zone.marks;
        self.zone.nr_free.store(free, Ordering::Relaxed);
        let mut boost = marks.boost.load(Ordering::Relaxed);
        if boost != 0 && free > marks.high + boost {
            // Balanced: what the boost was for is done (kswapd's part in Linux).
            boost = 0;
            marks.boost.store(0, Ordering::Relaxed);
        }
        let kept = marks.low + boost + self.lists.nr_highatomic;
        self.zone
            .headroom
            .store(free.saturating_sub(kept), Ordering::Relaxed);
        self.zone
            .nr_highatomic
            .store(self.lists.nr_highatomic, Ordering::Relaxed);
    }
}
