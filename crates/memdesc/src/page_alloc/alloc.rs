//! The way of a request: per-CPU list, zone, and when both are empty the slow path.
//!
//! What comes out is a [`Block`] with the descriptor it had while it was free; giving it an owner's descriptor is
//! the business of the room above. Descriptors for splits come from a [`Descriptors`] source, always before the zone
//! is locked.

use super::buddy::{Block, LADDER};
use super::fallback::{Removed, Search};
use super::nolock::Try;
use super::pcp::{self, Chain, PcpView, PerCpuPages};
use super::watermark::AllocFlags;
use super::zone::{LockedZone, Zone, ZoneEvents, ZoneGuard};
use crate::address::{MAX_ORDER, Pfn, PhysAddr};
use crate::config::MAX_NODES;
use crate::desc::DescList;
use crate::error::AllocError;
use crate::freepage::Services;
use crate::freepage::reporting::Reporting;
use crate::gfp::{self, Flags};
use crate::lockdep::classes;
use crate::memcg::Memcgs;
use crate::memmap::{BootSlice, MemMap, PageType, Word};
use crate::page_alloc::{MigrateType, ZoneType};
use crate::platform::{FaultPoint, Holder, Pin, Platform, ReclaimRequest, might_lock, might_sleep};
use crate::report::depot::{Cell, Depot};
use crate::report::history::History;
use crate::reserve::Reserves;
use crate::stats::{CpuStats, Event, FreePath};
use crate::sync::atomic::AtomicU32;

/// Orders above this are not worth retrying for (`PAGE_ALLOC_COSTLY_ORDER`).
const COSTLY_ORDER: usize = 3;
/// Attempts at reclaim before the slow path gives up (`MAX_RECLAIM_RETRIES`).
const MAX_RECLAIM_RETRIES: u32 = 16;
/// Blocks taken in one hold of a CPU's list.
const BULK_HOLD: usize = 32;
const NO_BLOCK: Block = Block {
    pfn: Pfn::NONE,
    word: Word::ZERO,
};
/// Descriptors taken along for a refill beyond the ladder: so many splits can happen in one hold of the zone lock.
pub(super) const REFILL_SPARE: usize = 32;

/// Where descriptors come from and go to. The slab implements it; tests put a model here.
pub(crate) trait Descriptors {
    /// `n` buddies, or none at all.
    fn get(&self, n: usize) -> Result<DescList, AllocError>;
    /// Descriptors of any class go back to where they came from. Never allocates.
    fn put(&self, list: DescList);
    /// As `get`, from any context: from what this CPU has, and what can be had without waiting.
    fn try_get(&self, n: usize) -> Result<DescList, AllocError>;
    /// As `put`, from any context.
    fn try_put(&self, list: DescList);
    /// A check found something under a lock, and nobody has said so yet.
    fn report_flaw(&self) {}
    /// Is the caller one whom reclaim waits for?
    fn is_memalloc(&self, _gfp: Flags) -> bool {
        false
    }
    /// Memory is short: says how many pages or objects came free. May sleep.
    fn reclaim(&self, request: &ReclaimRequest) -> usize;
}

/// The zones that may serve a request, best first.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ZoneList {
    zones: [u8; MAX_NODES * ZoneType::COUNT],
    len: u8,
}

impl ZoneList {
    /// From this node outwards, each node from the highest allowed zone down.
    pub(crate) fn new(zones: &[Zone], node: usize, highest: ZoneType) -> ZoneList {
        let mut list = ZoneList {
            zones: [0; MAX_NODES * ZoneType::COUNT],
            len: 0,
        };
        for distance in 0..MAX_NODES {
            for other in 0..MAX_NODES {
                if other.abs_diff(node) != distance {
                    continue;
                }
                for kind in ZoneType::ALL.into_iter().rev().filter(|&k| k <= highest) {
                    let found = zones
                        .iter()
                        .position(|z| z.node as usize == other && z.kind == kind);
                    if let Some(index) = found {
                        list.zones[list.len as usize] = index as u8;
                        list.len += 1;
                    }
                }
            }
        }
        list
    }

    /// The best zone there is.
    #[inline]
    fn best(&self) -> Option<usize> {
        (self.len > 0).then_some(self.zones[0] as usize)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = usize> + '_ {
        self.zones[..self.len as usize].iter().map(|&z| z as usize)
    }
}

/// The page allocator of one machine.
#[derive(Debug)]
pub(crate) struct PageAllocator<P> {
    pub(crate) platform: P,
    pub(crate) map: MemMap,
    pub(crate) zones: BootSlice<Zone>,
    /// `cpu * zones + zone`.
    pub(crate) pcps: BootSlice<PerCpuPages>,
    pub(crate) stats: BootSlice<CpuStats>,
    /// Call stacks, and who had which block: for reports.
    pub(crate) depot: Depot<BootSlice<AtomicU32>, BootSlice<Cell>>,
    pub(crate) history: History,
    pub(crate) zonelists: [[ZoneList; ZoneType::COUNT]; MAX_NODES],
    /// Whom pages are charged to.
    pub(crate) memcg: Memcgs,
    /// What is promised to whom.
    pub(crate) reserves: Reserves,
    /// Locks sleep ([`Config::preempt_rt`](crate::Config::preempt_rt)).
    pub(crate) rt: bool,
    /// What is done to free memory.
    pub(crate) services: Services,
    pub(crate) reporting: Reporting,
}

impl<P: Platform> PageAllocator<P> {
    #[inline]
    pub(crate) fn pin(&self) -> Pin<'_, P> {
        Pin::new(&self.platform)
    }

    #[inline]
    pub(crate) fn stats(&self, pin: &Pin<'_, P>) -> &CpuStats {
        &self.stats[pin.cpu()]
    }

    #[inline]
    pub(super) fn pcp(&self, pin: &Pin<'_, P>, zone: usize) -> &PerCpuPages {
        &self.pcps[pin.cpu() * self.zones.len() + zone]
    }

    /// Takes a zone's lock. Not pinned where locks sleep.
    pub(crate) fn lock(&self, zone: usize) -> ZoneGuard<'_, P> {
        self.zones[zone].lock(
            &self.map,
            Holder::new(&self.platform, self.rt, &classes::ZONE),
        )
    }

    /// Starts to free something on this CPU. What locks it may take on the way is checked here, before the CPU is held: on a real-time kernel it is let go of
    /// before they are taken.
    #[inline]
    #[cfg_attr(feature = "lockdep", track_caller)]
    pub(crate) fn free_path(&self) -> FreePath<'_, P> {
        might_lock(&self.platform, self.rt, &classes::SLAB_LISTS);
        might_lock(&self.platform, self.rt, &classes::ZONE);
        let pin = self.pin();
        FreePath::new(&self.stats[pin.cpu()], pin)
    }

    /// Before a lock is taken that may sleep: lets go of the CPU if it does.
    #[inline]
    pub(crate) fn may_sleep<T>(&self, pinned: T) -> Option<T> {
        (!self.rt).then_some(pinned)
    }

    #[inline]
    pub(super) fn zonelist(&self, gfp: Flags, node: usize) -> &ZoneList {
        &self.zonelists[node][gfp.zone_type() as usize]
    }

    /// Takes a block of `order` (`__alloc_pages`), and counts it as handed out as `kind`. Its head's word is not published; its tails' words are zero.
    /// With `__GFP_ZERO` it is zeroed.
    ///
    /// `node` is a preference, with `__GFP_THISNODE` a command.
    #[inline]
    #[track_caller]
    pub(crate) fn alloc_block(
        &self,
        kind: PageType,
        gfp: Flags,
        order: usize,
        node: Option<usize>,
        descs: &impl Descriptors,
    ) -> Result<Block, AllocError> {
        if order > MAX_ORDER {
            return Err(AllocError::BadOrder);
        }
        if gfp.contains(gfp::__GFP_FAST_TRY) {
            return self.try_block(kind, gfp, order, node, Try::Lists, descs);
        }
        if gfp.allow_blocking() {
            might_sleep(&self.platform, "an allocation of pages");
        }
        might_lock(&self.platform, self.rt, &classes::ZONE);
        if self.platform.should_fail(FaultPoint::AllocPages) {
            return Err(AllocError::Injected);
        }
        let block = match self.fast(kind, gfp, order, node) {
            Some(block) => block,
            None => self.alloc_zone(kind, gfp, order, node, descs)?,
        };
        self.prep_alloc(kind, block.pfn, order, block.word, gfp);
        // The first is known from there: no look of its own.
        if self.map.checks.watched() && self.map.checks.pending() {
            descs.report_flaw();
        }
        Ok(block)
    }

    /// The fast path: this CPU's list of the best zone, if that zone is above its low mark.
    #[inline]
    fn fast(&self, kind: PageType, gfp: Flags, order: usize, node: Option<usize>) -> Option<Block> {
        if !pcp::allowed(order) {
            return None;
        }
        let pin = self.pin();
        let zone = self.fast_zone(&pin, gfp, order, node)?;
        let block = self
            .pcp(&pin, zone)
            .pop(&pin, &self.map, order, gfp.migratetype())?;
        self.stats(&pin).block_out(&pin, kind, order);
        Some(block)
    }

    /// The node of a CPU; the last there can be, if the platform says one beyond.
    #[inline]
    pub(super) fn node_of(&self, pin: &Pin<'_, P>) -> usize {
        self.platform.cpu_to_node(pin.cpu()).min(MAX_NODES - 1)
    }

    /// The zone whose list the fast path may take from; none if the request has to go the long way.
    #[inline]
    fn fast_zone(
        &self,
        pin: &Pin<'_, P>,
        gfp: Flags,
        order: usize,
        node: Option<usize>,
    ) -> Option<usize> {
        if self.stats(pin).on_free_path() {
            self.allocation_on_free(pin);
        }
        let node = node.unwrap_or_else(|| self.node_of(pin));
        let zone_type = gfp.zone_type();
        let zone = self.zonelists.get(node)?[zone_type as usize].best()?;
        if !self.zones[zone].has_headroom(order, zone_type) {
            return None;
        }
        // The list of a node without such a zone starts with another's.
        if gfp.contains(gfp::__GFP_THISNODE) && self.zones[zone].node as usize != node {
            return None;
        }
        Some(zone)
    }

    /// Up to `n` order-0 blocks from this CPU's list, a hold of its lock for every [`BULK_HOLD`] of them; none if the fast path is not open. Says how
    /// many. `each` gets them as [`alloc_block`](Self::alloc_block) gives them.
    #[track_caller]
    pub(crate) fn alloc_bulk(
        &self,
        kind: PageType,
        gfp: Flags,
        n: usize,
        mut each: impl FnMut(Block),
    ) -> usize {
        let pin = self.pin();
        let Some(zone) = self.fast_zone(&pin, gfp, 0, None) else {
            return 0;
        };
        if self.platform.should_fail(FaultPoint::AllocPages) {
            return 0;
        }
        let mut taken = 0;
        while taken < n {
            // What they were while free is to be known until they have changed hands.
            let mut blocks = [NO_BLOCK; BULK_HOLD];
            let mut got = 0;
            let wanted = (n - taken).min(BULK_HOLD);
            self.pcp(&pin, zone)
                .pop_many(&pin, &self.map, wanted, gfp.migratetype(), |block| {
                    self.stats(&pin).block_out(&pin, kind, 0);
                    blocks[got] = block;
                    got += 1;
                });
            for &block in &blocks[..got] {
                self.prep_alloc(kind, block.pfn, 0, block.word, gfp);
                each(block);
            }
            taken += got;
            if got < wanted {
                break;
            }
        }
        taken
    }

    /// Rule 3 was broken: counted always, fatal where checks are on.
    #[cold]
    pub(crate) fn allocation_on_free(&self, pin: &Pin<'_, P>) {
        self.stats(pin).add(pin, Event::AllocOnFree, 1);
        if cfg!(any(debug_assertions, feature = "checked")) {
            panic!("memdesc: an allocation on a free path");
        }
    }

    /// From the zones, and when they have nothing, the slow path.
    #[cold]
    #[inline(never)]
    fn alloc_zone(
        &self,
        kind: PageType,
        gfp: Flags,
        order: usize,
        node: Option<usize>,
        descs: &impl Descriptors,
    ) -> Result<Block, AllocError> {
        {
            let pin = self.pin();
            if self.stats(&pin).on_free_path() {
                self.allocation_on_free(&pin);
            }
        }
        let node = match node {
            Some(node) if node < MAX_NODES => node,
            Some(_) => return Err(AllocError::NoZone),
            None => self.node_of(&self.pin()),
        };
        let result = match self.get_page(gfp, order, node, AllocFlags::FIRST, descs) {
            Ok(block) => Ok(block),
            Err(AllocError::NoZone) => Err(AllocError::NoZone),
            Err(_) => self.alloc_slow(gfp, order, node, descs),
        };
        let pin = self.pin();
        match &result {
            Ok(_) => self.stats(&pin).block_out(&pin, kind, order),
            Err(_) => self.stats(&pin).add(&pin, Event::PgAllocFail, 1),
        }
        result
    }

    /// One pass over the zones (`get_page_from_freelist`).
    fn get_page(
        &self,
        gfp: Flags,
        order: usize,
        node: usize,
        flags: AllocFlags,
        descs: &impl Descriptors,
    ) -> Result<Block, AllocError> {
        let mut why = AllocError::NoZone;
        let this_node = gfp.contains(gfp::__GFP_THISNODE);
        let list = self.zonelist(gfp, node);
        // First without mixing mobilities in a pageblock, if there is another zone to fall back to.
        let passes: &[bool] = if gfp.contains(gfp::__GFP_KSWAPD_RECLAIM) && list.len > 1 {
            &[true, false]
        } else {
            &[false]
        };
        for &no_fragment in passes {
            for index in list.iter() {
                let zone = &self.zones[index];
                if this_node && zone.node as usize != node {
                    continue;
                }
                // Staying near is worth more than staying unmixed.
                if no_fragment && zone.node as usize != node {
                    break;
                }
                if !zone.watermark_ok(order, gfp.zone_type(), flags) {
                    why = AllocError::Watermark;
                    continue;
                }
                let search = Search {
                    highatomic: flags.highatomic,
                    no_fragment,
                };
                match self.rmqueue(index, order, gfp.migratetype(), search, descs)? {
                    Some(block) => {
                        if flags.highatomic && order > 0 {
                            self.lock(index).reserve_highatomic(block.pfn);
                        }
                        return Ok(block);
                    }
                    None if why == AllocError::NoZone => why = AllocError::NoBlock,
                    None => {}
                }
            }
        }
        Err(why)
    }

    /// A block from one zone, through the per-CPU list where the order has one (`rmqueue`).
    fn rmqueue(
        &self,
        index: usize,
        order: usize,
        mt: MigrateType,
        search: Search,
        descs: &impl Descriptors,
    ) -> Result<Option<Block>, AllocError> {
        let through_pcp = pcp::allowed(order) && !search.highatomic;
        let mut wanted = 1;
        if through_pcp {
            let pin = self.pin();
            let pcp = self.pcp(&pin, index);
            if let Some(block) = pcp.pop(&pin, &self.map, order, mt) {
                return Ok(Some(block));
            }
            let zone = &self.zones[index];
            wanted = pcp.refill_size(&pin, order, zone.free_pages() > zone.marks.high);
        }
        loop {
            // Rule 3: before the lock, in one call, the worst case; what is left over goes back.
            let extra = REFILL_SPARE.min(wanted as usize - 1);
            let mut spare = descs.get(LADDER + extra)?;
            let mut chain = Chain::new();
            let mut first = None;
            let mut again = false;
            {
                let mut zone = self.lock(index);
                while chain.blocks < wanted && spare.len() >= LADDER {
                    match zone.rmqueue(order, mt, search, &mut spare) {
                        Removed::Block(block) if first.is_none() => {
                            first = Some(block);
                            if wanted == 1 {
                                break;
                            }
                        }
                        Removed::Block(block) => chain.push(&self.map, block),
                        Removed::Again => again = first.is_none(),
                        Removed::Nothing => break,
                    }
                }
                drop(zone);
                let pin = self.pin();
                if first.is_some() {
                    let event = if through_pcp {
                        Event::PcpRefill
                    } else {
                        Event::ZoneAlloc
                    };
                    self.stats(&pin).add(&pin, event, 1);
                }
                if chain.blocks > 0 {
                    self.pcp(&pin, index)
                        .fill(&pin, &self.map, chain, order, mt);
                }
            }
            if !spare.is_empty() {
                descs.put(spare);
            }
            if first.is_some() || !again {
                return Ok(first);
            }
        }
    }

    /// The slow path: wake, drain, reclaim, retry, and fail with a reason (`__alloc_pages_slowpath`).
    fn alloc_slow(
        &self,
        gfp: Flags,
        order: usize,
        node: usize,
        descs: &impl Descriptors,
    ) -> Result<Block, AllocError> {
        {
            let pin = self.pin();
            self.stats(&pin).add(&pin, Event::SlowPath, 1);
        }
        if gfp.contains(gfp::__GFP_KSWAPD_RECLAIM) {
            self.platform.wake_reclaim(node, order);
        }
        let flags = AllocFlags::slow(gfp, order);
        let mut attempt = 0;
        loop {
            let why = match self.get_page(gfp, order, node, flags, descs) {
                Ok(block) => return Ok(block),
                Err(why) => why,
            };
            // Who has a reserve is what reclaim waits for.
            if !gfp.allow_blocking() || descs.is_memalloc(gfp) {
                return Err(why);
            }
            let limit = if gfp.contains(gfp::__GFP_NOFAIL) {
                u32::MAX
            } else if gfp.contains(gfp::__GFP_NORETRY) {
                1
            } else if order > COSTLY_ORDER && !gfp.contains(gfp::__GFP_RETRY_MAYFAIL) {
                2
            } else {
                MAX_RECLAIM_RETRIES
            };
            if attempt >= limit {
                return Err(why);
            }
            let request = ReclaimRequest {
                gfp,
                order,
                attempt,
            };
            let progress = descs.reclaim(&request) + self.platform.reclaim(request);
            // What is in other CPUs' lists, or kept for atomic requests, is free memory too.
            let mut found = progress > 0;
            if attempt == 0 || progress > 0 {
                found |= self.drain_all(descs) > 0;
            }
            if attempt > 0 || progress == 0 {
                found |= self.unreserve(gfp, node);
            }
            if !found && attempt > 0 {
                return Err(why);
            }
            attempt += 1;
        }
    }

    fn unreserve(&self, gfp: Flags, node: usize) -> bool {
        self.zonelist(gfp, node)
            .iter()
            .any(|index| self.lock(index).unreserve_highatomic(gfp.migratetype()))
    }

    /// Gives a pageblock another mobility, and its free blocks with it (`set_pageblock_migratetype`).
    pub(crate) fn set_pageblock(&self, pfn: Pfn, mt: MigrateType) {
        if let Some(region) = self.map.region(pfn) {
            self.lock(region.zone as usize).set_pageblock(pfn, mt);
        }
    }

    /// A look at a zone's lists under its lock.
    pub(crate) fn with_zone<R>(&self, index: usize, look: impl FnOnce(&LockedZone<'_>) -> R) -> R {
        look(&self.lock(index))
    }

    /// The same, to set something right.
    pub(crate) fn with_zone_mut<R>(
        &self,
        index: usize,
        work: impl FnOnce(&mut LockedZone<'_>) -> R,
    ) -> R {
        work(&mut self.lock(index))
    }

    /// What happened under a zone's lock so far.
    pub(crate) fn zone_events(&self, index: usize) -> ZoneEvents {
        self.with_zone(index, |zone| zone.lists.events)
    }

    /// Per-CPU lists of a CPU and zone.
    pub(crate) fn pcp_view(&self, cpu: usize, zone: usize) -> PcpView {
        self.pcps[cpu * self.zones.len() + zone].view(&self.platform)
    }

    /// The physical address of a pointer into the direct map.
    pub(crate) fn phys(&self, ptr: *const u8) -> PhysAddr {
        self.map.phys(ptr)
    }
}
