//! The way of a request: per-CPU list, zone, and when both are empty the slow path.
//!
//! What comes out is a [`Block`] with the descriptor it had while it was free; giving it an owner's descriptor is
//! the business of the room above. Descriptors for splits come from a [`Descriptors`] source, always before the zone
//! is locked.

use super::buddy::{Block, LADDER};
use super::fallback::{Removed, Search};
use super::pcp::{self, Chain, PcpView, PerCpuPages};
use super::watermark::AllocFlags;
use super::zone::{LockedZone, Zone, ZoneEvents};
use crate::address::{MAX_ORDER, Pfn, PhysAddr};
use crate::config::MAX_NODES;
use crate::desc::DescList;
use crate::error::AllocError;
use crate::gfp::{self, Flags};
use crate::memmap::heads::{blocks, climb};
use crate::memmap::{BootSlice, DescClass, MemMap, PageType, Word};
use crate::page_alloc::{MigrateType, ZoneType};
use crate::platform::{FaultPoint, Pin, Platform, ReclaimRequest};
use crate::stats::{CpuStats, Event};

/// Orders above this are not worth retrying for (`PAGE_ALLOC_COSTLY_ORDER`).
const COSTLY_ORDER: usize = 3;
/// Attempts at reclaim before the slow path gives up (`MAX_RECLAIM_RETRIES`).
const MAX_RECLAIM_RETRIES: u32 = 16;
/// Descriptors taken along for a refill beyond the ladder: so many splits can happen in one hold of the zone lock.
const REFILL_SPARE: usize = 32;
/// Blocks freed in one hold of the zone lock.
const DRAIN_HOLD: u32 = 64;

/// Where descriptors come from and go to. The slab implements it; tests put a model here.
pub(crate) trait Descriptors {
    /// `n` buddies, or none at all.
    fn get(&self, n: usize) -> Result<DescList, AllocError>;
    /// Descriptors of any class go back to where they came from. Never allocates.
    fn put(&self, list: DescList);
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

    fn iter(&self) -> impl Iterator<Item = usize> + '_ {
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
    pub(crate) zonelists: [[ZoneList; ZoneType::COUNT]; MAX_NODES],
}

/// A block taken without any descriptor at hand, for a slab of descriptors.
#[derive(Debug)]
pub(crate) struct Smallest {
    pub(crate) pfn: Pfn,
    /// Pages, a power of two unless they come from untouched memory.
    pub(crate) pages: u32,
    pub(crate) order: usize,
    /// The block's own descriptor; none for untouched memory.
    pub(crate) word: Option<Word>,
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
    fn pcp(&self, pin: &Pin<'_, P>, zone: usize) -> &PerCpuPages {
        &self.pcps[pin.cpu() * self.zones.len() + zone]
    }

    fn lock<'a>(&'a self, zone: usize, pin: &Pin<'_, P>) -> LockedZone<'a> {
        self.zones[zone].lock(&self.map, &self.platform, pin)
    }

    #[inline]
    fn zonelist(&self, gfp: Flags, node: usize) -> &ZoneList {
        &self.zonelists[node][gfp.zone_type() as usize]
    }

    /// Takes a block of `order` (`__alloc_pages`), and counts it as handed out as `kind`. Its head's word is not published; its tails' words are zero.
    ///
    /// `node` is a preference, with `__GFP_THISNODE` a command.
    #[inline]
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
        if self.platform.should_fail(FaultPoint::AllocPages) {
            return Err(AllocError::Injected);
        }
        let block = match self.fast(kind, gfp, order, node) {
            Some(block) => block,
            None => self.alloc_zone(kind, gfp, order, node, descs)?,
        };
        self.platform.pages_allocated(block.pfn, order);
        Ok(block)
    }

    /// The fast path: this CPU's list of the best zone, if that zone is above its low mark.
    #[inline]
    fn fast(&self, kind: PageType, gfp: Flags, order: usize, node: Option<usize>) -> Option<Block> {
        if !pcp::allowed(order) {
            return None;
        }
        let pin = self.pin();
        let stats = self.stats(&pin);
        if stats.on_free_path() {
            self.allocation_on_free(&pin);
        }
        let node = node.unwrap_or_else(|| self.platform.cpu_to_node(pin.cpu()));
        let zone_type = gfp.zone_type();
        let zone = self.zonelists.get(node)?[zone_type as usize].best()?;
        if !self.zones[zone].has_headroom(order, zone_type) {
            return None;
        }
        // The list of a node without such a zone starts with another's.
        if gfp.contains(gfp::__GFP_THISNODE) && self.zones[zone].node as usize != node {
            return None;
        }
        let block = self
            .pcp(&pin, zone)
            .pop(&pin, &self.map, order, gfp.migratetype())?;
        stats.block_out(&pin, kind, order);
        Some(block)
    }

    /// Up to `n` order-0 blocks from this CPU's list, in one go; none if the fast path is not open. Says how many.
    pub(crate) fn alloc_bulk(
        &self,
        kind: PageType,
        gfp: Flags,
        n: usize,
        mut each: impl FnMut(Block),
    ) -> usize {
        let pin = self.pin();
        let node = self.platform.cpu_to_node(pin.cpu());
        let zone_type = gfp.zone_type();
        let best = self
            .zonelists
            .get(node)
            .and_then(|lists| lists[zone_type as usize].best());
        let Some(zone) = best else { return 0 };
        let mut taken = 0;
        if self.zones[zone].has_headroom(0, zone_type)
            && !self.platform.should_fail(FaultPoint::AllocPages)
        {
            self.pcp(&pin, zone)
                .pop_many(&pin, &self.map, n, gfp.migratetype(), |block| {
                    self.platform.pages_allocated(block.pfn, 0);
                    self.stats(&pin).block_out(&pin, kind, 0);
                    each(block);
                    taken += 1;
                });
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
            None => {
                let pin = self.pin();
                self.platform.cpu_to_node(pin.cpu()).min(MAX_NODES - 1)
            }
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
                            let pin = self.pin();
                            self.lock(index, &pin).reserve_highatomic(block.pfn);
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
                let pin = self.pin();
                let mut zone = self.lock(index, &pin);
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
            if !gfp.allow_blocking() {
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
        let pin = self.pin();
        self.zonelist(gfp, node).iter().any(|index| {
            self.lock(index, &pin)
                .unreserve_highatomic(gfp.migratetype())
        })
    }

    /// A block came back. `word` holds the descriptor that will be its `struct buddy`. Cannot fail, allocates nothing.
    ///
    /// `nested` for pages given back while descriptors are given back: they stay in the per-CPU list, which ends the
    /// recursion; the next free drains them.
    #[inline]
    pub(crate) fn free_block(
        &self,
        pin: &Pin<'_, P>,
        pfn: Pfn,
        word: Word,
        nested: bool,
        descs: &impl Descriptors,
    ) {
        let order = word.order();
        self.platform.pages_freed(pfn, order);
        let Some(region) = self.map.region(pfn) else {
            unreachable!("{pfn:?} was RAM before")
        };
        if order != 0 {
            region.clear_tails(pfn, order);
        }
        let index = region.zone as usize;
        if !pcp::allowed(order) {
            return self.free_to_zone(pin, index, Block { pfn, word }, descs);
        }
        let mt = region.block_migratetype(pfn);
        let pcp = self.pcp(pin, index);
        if let Some(pages) = pcp.push(pin, &self.map, region.word(pfn), pfn, word, mt)
            && !nested
        {
            self.drain_some(pin, index, pages, descs);
        }
    }

    #[cold]
    #[inline(never)]
    fn free_to_zone(&self, pin: &Pin<'_, P>, index: usize, block: Block, descs: &impl Descriptors) {
        let mut freed = DescList::new();
        self.lock(index, pin)
            .free_block(block, block.word.order(), &mut freed);
        if !freed.is_empty() {
            descs.put(freed);
        }
    }

    #[cold]
    #[inline(never)]
    fn drain_some(&self, pin: &Pin<'_, P>, index: usize, pages: u32, descs: &impl Descriptors) {
        let chain = self.pcp(pin, index).take(pin, &self.map, pages);
        self.stats(pin).add(pin, Event::PcpDrain, 1);
        self.free_chain(chain, index, pin, descs);
    }

    /// The periodic work of one CPU: the marks of its lists fall, and what is above them goes back (`refresh_cpu_vm_stats`).
    pub(crate) fn decay(&self, descs: &impl Descriptors) {
        let pin = self.pin();
        for index in 0..self.zones.len() {
            let pages = self.pcp(&pin, index).decay(&pin);
            if pages > 0 {
                self.drain_some(&pin, index, pages, descs);
            }
        }
    }

    /// Gives a chain back to its zone, a bounded number of blocks a hold.
    fn free_chain(
        &self,
        mut chain: Chain,
        index: usize,
        pin: &Pin<'_, P>,
        descs: &impl Descriptors,
    ) {
        while chain.blocks > 0 {
            let mut freed = DescList::new();
            {
                let mut zone = self.lock(index, pin);
                for _ in 0..DRAIN_HOLD {
                    let Some(block) = chain.pop(&self.map) else {
                        break;
                    };
                    zone.free_block(block, block.word.order(), &mut freed);
                }
            }
            if !freed.is_empty() {
                descs.put(freed);
            }
        }
    }

    /// Empties every CPU's lists into the zones (`drain_all_pages`). Says how many blocks that were. From any context that
    /// may wait for other CPUs.
    pub(crate) fn drain_all(&self, descs: &impl Descriptors) -> u32 {
        let mut blocks = 0;
        for (i, pcp) in self.pcps.iter().enumerate() {
            let chain = pcp.take_all(&self.platform, &self.map);
            blocks += chain.blocks;
            let pin = self.pin();
            self.free_chain(chain, i % self.zones.len(), &pin, descs);
        }
        let pin = self.pin();
        self.stats(&pin).add(&pin, Event::DrainAll, 1);
        blocks
    }

    /// Takes a certain block out of free memory (`alloc_contig_range` of one block, `take_page_off_buddy`).
    ///
    /// [`AllocError::Busy`] if it is not free as a whole, or in a per-CPU list: drain first.
    pub(crate) fn alloc_block_at(
        &self,
        pfn: Pfn,
        order: usize,
        descs: &impl Descriptors,
    ) -> Result<Block, AllocError> {
        if order > MAX_ORDER || !pfn.is_aligned(order) {
            return Err(AllocError::BadOrder);
        }
        let last = pfn
            .0
            .checked_add((1 << order) - 1)
            .ok_or(AllocError::NoZone)?;
        let region = self.map.region(pfn).filter(|r| r.contains(Pfn(last)));
        let region = region.ok_or(AllocError::NoZone)?;
        loop {
            let untouched = {
                let (start, end) = region.untouched();
                pfn.0 >= start && last < end
            };
            let mut spare = descs.get(if untouched {
                LADDER + REFILL_SPARE
            } else {
                LADDER
            })?;
            let pin = self.pin();
            let mut zone = self.lock(region.zone as usize, &pin);
            while spare.len() > MAX_ORDER && {
                let (start, end) = region.untouched();
                pfn.0 >= start && last < end
            } {
                zone.carve_from(region, &mut spare);
            }
            let (start, end) = region.untouched();
            let result = if pfn.0 >= start && last < end {
                None
            } else {
                let load = |p| {
                    if region.contains(p) {
                        region.word(p).load()
                    } else {
                        Word::ZERO
                    }
                };
                let own = load(pfn);
                let found = if own.is_zero() {
                    climb(pfn, load)
                } else {
                    None
                };
                let (head, word) = found.map_or((pfn, own), |f| (f.head, f.word));
                Some(
                    if word.is_free_in_zone(word.order()) && word.order() >= order {
                        zone.unlink(head, word);
                        Ok(zone.expand_at(Block { pfn: head, word }, pfn, order, &mut spare))
                    } else {
                        Err(AllocError::Busy)
                    },
                )
            };
            drop(zone);
            drop(pin);
            if !spare.is_empty() {
                descs.put(spare);
            }
            if let Some(result) = result {
                if let Ok(block) = result {
                    self.platform.pages_allocated(block.pfn, order);
                    let pin = self.pin();
                    self.stats(&pin).add(&pin, Event::AllocAt, 1);
                    self.stats(&pin).block_out(&pin, PageType::Bare, order);
                }
                return result;
            }
        }
    }

    /// An order-0 block that can be had without a descriptor for a split: from this CPU's lists, unmovable first.
    pub(crate) fn pop_page(&self) -> Option<Block> {
        let pin = self.pin();
        let node = self.platform.cpu_to_node(pin.cpu());
        for mt in [MigrateType::Unmovable, MigrateType::Reclaimable] {
            for index in self.zonelists[node][ZoneType::Normal as usize].iter() {
                if let Some(block) = self.pcp(&pin, index).pop(&pin, &self.map, 0, mt) {
                    self.platform.pages_allocated(block.pfn, 0);
                    return Some(block);
                }
            }
        }
        None
    }

    /// The smallest block to be had, whoever it was meant for: for a slab of descriptors when there are no descriptors
    /// (seed 000's new interface to the page allocator). Watermarks do not count: this is what freeing lives on.
    pub(crate) fn take_smallest(&self) -> Result<Smallest, AllocError> {
        let pin = self.pin();
        let node = self.platform.cpu_to_node(pin.cpu());
        // Kernel zones first, movable memory only when nothing else is left.
        for highest in [ZoneType::Normal, ZoneType::Movable] {
            for attempt in 0..2 {
                for index in self.zonelists[node][highest as usize].iter() {
                    let mut zone = self.lock(index, &pin);
                    if let Some(found) = take_smallest_in(&mut zone, attempt) {
                        drop(zone);
                        self.platform.pages_allocated(found.pfn, found.order);
                        return Ok(found);
                    }
                }
            }
        }
        Err(AllocError::NoBlock)
    }

    /// Gives back what was not needed of a [`Smallest`]: all but its first `kept` pages. `spare` has a descriptor for each
    /// block of the rest.
    pub(crate) fn return_rest(&self, taken: &Smallest, kept: u32, spare: &mut DescList) {
        let (start, end) = (taken.pfn.0 + kept, taken.pfn.0 + taken.pages);
        if start >= end {
            return;
        }
        for (pfn, order) in blocks(start, end) {
            self.platform.pages_freed(pfn, order);
        }
        let Some(region) = self.map.region(taken.pfn) else {
            unreachable!()
        };
        let pin = self.pin();
        let mut zone = self.lock(region.zone as usize, &pin);
        for (pfn, order) in blocks(start, end) {
            let Some(desc) = spare.pop(&self.map) else {
                unreachable!("{} pages need more descriptors", end - start)
            };
            let word = Word::described(PageType::Free, order, desc, DescClass::Buddy);
            zone.link(pfn, order, region.block_migratetype(pfn), word, false);
        }
    }

    /// Gives a pageblock another mobility, and its free blocks with it (`set_pageblock_migratetype`).
    pub(crate) fn set_pageblock(&self, pfn: Pfn, mt: MigrateType) {
        if let Some(region) = self.map.region(pfn) {
            let pin = self.pin();
            self.lock(region.zone as usize, &pin).set_pageblock(pfn, mt);
        }
    }

    /// A look at a zone's lists under its lock.
    pub(crate) fn with_zone<R>(&self, index: usize, look: impl FnOnce(&LockedZone<'_>) -> R) -> R {
        let pin = self.pin();
        look(&self.lock(index, &pin))
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

/// The first attempt keeps mobilities apart: unmovable blocks, untouched memory, a whole movable pageblock. The second
/// takes anything.
fn take_smallest_in(zone: &mut LockedZone<'_>, attempt: usize) -> Option<Smallest> {
    let of = |block: Block| Smallest {
        pfn: block.pfn,
        pages: 1 << block.word.order(),
        order: block.word.order(),
        word: Some(block.word),
    };
    if attempt == 0 {
        let own = (0..=MAX_ORDER).find_map(|order| zone.pop(order, MigrateType::Unmovable));
        if let Some(block) = own {
            return Some(of(zone.detach(block.pfn, block.word)));
        }
        for pages in [2, 1] {
            if let Some(pfn) = zone.carve_bare(pages) {
                return Some(Smallest {
                    pfn,
                    pages,
                    order: pages as usize - 1,
                    word: None,
                });
            }
        }
        for order in crate::address::PAGEBLOCK_ORDER..=MAX_ORDER {
            for mt in [MigrateType::Reclaimable, MigrateType::Movable] {
                if let Some(block) = zone.pop(order, mt) {
                    let region = zone.region(block.pfn);
                    for pageblock in 0..1 << (order - crate::address::PAGEBLOCK_ORDER) {
                        let at = block.pfn.add(pageblock * crate::address::PAGEBLOCK_PAGES);
                        region.set_block_migratetype(at, MigrateType::Unmovable);
                    }
                    return Some(of(zone.detach(block.pfn, block.word)));
                }
            }
        }
        return None;
    }
    (0..=MAX_ORDER)
        .flat_map(|order| MigrateType::ALL.map(|mt| (order, mt)))
        .find_map(|(order, mt)| zone.pop(order, mt))
        .map(|block| of(zone.detach(block.pfn, block.word)))
}
