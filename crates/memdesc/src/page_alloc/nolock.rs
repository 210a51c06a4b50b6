//! Pages for those who may neither wait nor take a lock that could be theirs already: the fast try, and `alloc_pages_nolock`.
//!
//! Seed 001's fast try looks into this CPU's lists and nowhere else. What Linux made of it (6.15) also *tries* the zone's lock.
//! Both may strike inside the allocator itself, at any instruction, so each door they go through is one that says "somebody is
//! inside" instead of waiting, and whatever lies behind it is whole whenever the door is open. Freeing cannot fail: what
//! cannot go into the list now is pushed on a stack that needs no door.
//!
//! Where Linux refuses, this does not: any order, with one CPU (its `spin_trylock` always succeeds there), and in the RT
//! configuration (a sleeping lock's attempt is one compare-exchange here).

use super::alloc::{Descriptors, PageAllocator};
use super::buddy::{Block, LADDER};
use super::fallback::{Removed, Search};
use super::pcp;
use super::watermark::{AllocFlags, Mark};
use crate::address::{MAX_ORDER, Pfn};
use crate::config::MAX_NODES;
use crate::error::AllocError;
use crate::gfp::{self, Flags};
use crate::lockdep::classes;
use crate::memmap::{PageType, Word};
use crate::platform::{FaultPoint, Holder, Pin, Platform};
use crate::stats::{CpuStats, Event};

/// How far a request goes that does not wait.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Try {
    /// This CPU's lists.
    Lists,
    /// And what lies behind locks that nobody holds.
    Locks,
}

/// Held to the min mark, without a discount.
const NOLOCK: AllocFlags = AllocFlags {
    mark: Mark::Min,
    min_reserve: false,
    non_block: false,
    highatomic: false,
};

impl<P: Platform> PageAllocator<P> {
    /// The counters of this CPU, of the first where there is none: for `_any` counters.
    pub(crate) fn any_stats(&self, pin: Option<&Pin<'_, P>>) -> &CpuStats {
        &self.stats[pin.map_or(0, Pin::cpu)]
    }

    /// As [`alloc_block`](Self::alloc_block), from any context.
    #[track_caller]
    pub(crate) fn try_block(
        &self,
        kind: PageType,
        gfp: Flags,
        order: usize,
        node: Option<usize>,
        how: Try,
        descs: &impl Descriptors,
    ) -> Result<Block, AllocError> {
        let pin = Pin::try_new(&self.platform);
        let result = match &pin {
            Some(pin) => self.attempt(pin, gfp, order, node, how, descs),
            None => Err(AllocError::Forbidden),
        };
        let stats = self.any_stats(pin.as_ref());
        let first = match how {
            Try::Lists => Event::FastPages,
            Try::Locks => Event::TryPages,
        };
        stats.add_any(Event::tried(first, &result), 1);
        if let Ok(block) = &result {
            stats.block_out_any(kind, order);
            self.prep_alloc(kind, block.pfn, order, block.word, gfp);
        }
        if self.map.checks.pending() {
            descs.report_flaw();
        }
        result
    }

    fn attempt(
        &self,
        pin: &Pin<'_, P>,
        gfp: Flags,
        order: usize,
        node: Option<usize>,
        how: Try,
        descs: &impl Descriptors,
    ) -> Result<Block, AllocError> {
        if order > MAX_ORDER {
            return Err(AllocError::BadOrder);
        }
        if how == Try::Lists && !pcp::allowed(order) {
            return Err(AllocError::Forbidden);
        }
        if self.platform.should_fail(FaultPoint::AllocPages) {
            return Err(AllocError::Injected);
        }
        let node = node.unwrap_or_else(|| self.node_of(pin));
        if node >= MAX_NODES {
            return Err(AllocError::NoZone);
        }
        let this_node = gfp.contains(gfp::__GFP_THISNODE);
        let zones = || {
            let all = self.zonelist(gfp, node).iter();
            all.filter(|&index| !this_node || self.zones[index].node as usize == node)
        };
        let mut why = AllocError::Empty;
        if pcp::allowed(order) {
            for index in zones() {
                match self
                    .pcp(pin, index)
                    .try_pop(pin, &self.map, order, gfp.migratetype())
                {
                    Ok(Some(block)) => return Ok(block),
                    Ok(None) => {}
                    Err(pcp::Contended) => why = AllocError::Contended,
                }
            }
        }
        if how == Try::Lists {
            return Err(why);
        }
        for index in zones() {
            if !self.zones[index].watermark_ok(order, gfp.zone_type(), NOLOCK) {
                continue;
            }
            match self.try_rmqueue(index, gfp, order, descs) {
                Ok(Some(block)) => return Ok(block),
                Ok(None) | Err(AllocError::Empty) => {}
                Err(other) => why = other,
            }
        }
        Err(why)
    }

    fn try_rmqueue(
        &self,
        index: usize,
        gfp: Flags,
        order: usize,
        descs: &impl Descriptors,
    ) -> Result<Option<Block>, AllocError> {
        // Untouched memory may have to be carved first, which uses up one ladder.
        for _ in 0..2 {
            let mut spare = descs.try_get(LADDER)?;
            let holder = Holder::trying(&self.platform, self.rt, &classes::ZONE);
            let zone = self.zones[index].try_lock(&self.map, holder);
            let removed = zone.map(|mut zone| {
                zone.rmqueue(order, gfp.migratetype(), Search::default(), &mut spare)
            });
            descs.try_put(spare);
            match removed {
                None => return Err(AllocError::Contended),
                Some(Removed::Block(block)) => return Ok(Some(block)),
                Some(Removed::Nothing) => return Ok(None),
                Some(Removed::Again) => {}
            }
        }
        Ok(None)
    }

    /// As [`free_block`](Self::free_block), from any context; the block was handed out as `kind`.
    #[track_caller]
    pub(crate) fn free_block_nolock(&self, kind: PageType, pfn: Pfn, word: Word) {
        let order = word.order();
        let pin = Pin::try_new(&self.platform);
        let stats = self.any_stats(pin.as_ref());
        stats.block_back_any(kind, order);
        let word = self.prep_free(pfn, word);
        let Some(region) = self.map.region(pfn) else {
            unreachable!("{pfn:?} was RAM before")
        };
        if order != 0 {
            region.clear_tails(pfn, order);
        }
        let (index, mt) = (region.zone as usize, region.block_migratetype(pfn));
        let cell = region.word(pfn);
        if pcp::allowed(order)
            && let Some(pin) = &pin
            && self
                .pcp(pin, index)
                .try_push(pin, &self.map, cell, pfn, word, mt)
        {
            stats.add_any(Event::NolockFree, 1);
            return;
        }
        let cpu = pin.as_ref().map_or(0, Pin::cpu);
        self.pcps[cpu * self.zones.len() + index].defer(&self.map, cell, Block { pfn, word }, mt);
        stats.add_any(Event::NolockFreeDeferred, 1);
    }
}
