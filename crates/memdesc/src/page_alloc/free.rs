//! The way back: into the per-CPU list, and from there in batches to the zone.
//!
//! Nothing here allocates, waits for memory, or can fail. Descriptors that merges leave over are collected on the stack and
//! given back after the zone lock is dropped.

use super::alloc::{Descriptors, PageAllocator};
use super::buddy::Block;
use super::pcp::{self, Chain};
use crate::address::Pfn;
use crate::desc::DescList;
use crate::memmap::Word;
use crate::platform::Platform;
use crate::stats::{Event, FreePath};

/// Blocks freed in one hold of the zone lock.
const DRAIN_HOLD: u32 = 64;

impl<P: Platform> PageAllocator<P> {
    /// A block came back. `word` holds the descriptor that will be its `struct buddy`. Cannot fail, allocates nothing.
    ///
    /// `nested` for pages given back while descriptors are given back: they stay in the per-CPU list, which ends the
    /// recursion; the next free drains them.
    #[inline]
    #[track_caller]
    pub(crate) fn free_block(
        &self,
        path: FreePath<'_, P>,
        pfn: Pfn,
        word: Word,
        nested: bool,
        descs: &impl Descriptors,
    ) {
        let order = word.order();
        let word = self.prep_free(pfn, word);
        let Some(region) = self.map.region(pfn) else {
            unreachable!("{pfn:?} was RAM before")
        };
        if order != 0 {
            region.clear_tails(pfn, order);
        }
        let index = region.zone as usize;
        if !pcp::allowed(order) {
            return self.free_to_zone(path, index, Block { pfn, word }, descs);
        }
        let mt = region.block_migratetype(pfn);
        let pcp = self.pcp(path.pin(), index);
        let over = pcp.push(path.pin(), &self.map, region.word(pfn), pfn, word, mt);
        if (over.is_some() || pcp.has_deferred()) && !nested {
            self.drain_some(path, index, over.unwrap_or(0), descs);
        }
    }

    #[cold]
    #[inline(never)]
    fn free_to_zone(
        &self,
        path: FreePath<'_, P>,
        index: usize,
        block: Block,
        descs: &impl Descriptors,
    ) {
        let _path = self.may_sleep(path);
        let mut freed = DescList::new();
        self.lock(index)
            .free_block(block, block.word.order(), &mut freed);
        if !freed.is_empty() {
            descs.put(freed);
        }
        if self.map.checks.pending() {
            descs.report_flaw();
        }
    }

    #[cold]
    #[inline(never)]
    fn drain_some(
        &self,
        path: FreePath<'_, P>,
        index: usize,
        pages: u32,
        descs: &impl Descriptors,
    ) {
        let pin = path.pin();
        let pcp = self.pcp(pin, index);
        let chain = pcp.take(pin, &self.map, pages);
        let deferred = pcp.take_deferred(&self.map);
        if chain.blocks > 0 {
            self.stats(pin).add(pin, Event::PcpDrain, 1);
        }
        let _path = self.may_sleep(path);
        self.free_chain(chain, index, descs);
        self.free_chain(deferred, index, descs);
        if self.map.checks.pending() {
            descs.report_flaw();
        }
    }

    /// The periodic work of one CPU: the marks of its lists fall, and what is above them goes back (`refresh_cpu_vm_stats`).
    pub(crate) fn decay(&self, descs: &impl Descriptors) {
        for index in 0..self.zones.len() {
            let path = self.free_path();
            let pcp = self.pcp(path.pin(), index);
            let pages = pcp.decay(path.pin());
            if pages > 0 || pcp.has_deferred() {
                self.drain_some(path, index, pages, descs);
            }
        }
    }

    /// Gives a chain back to its zone, a bounded number of blocks a hold.
    fn free_chain(&self, mut chain: Chain, index: usize, descs: &impl Descriptors) {
        while chain.blocks > 0 {
            let mut freed = DescList::new();
            {
                let mut zone = self.lock(index);
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
            let deferred = pcp.take_deferred(&self.map);
            blocks += chain.blocks + deferred.blocks;
            self.free_chain(chain, i % self.zones.len(), descs);
            self.free_chain(deferred, i % self.zones.len(), descs);
        }
        let pin = self.pin();
        self.stats(&pin).add(&pin, Event::DrainAll, 1);
        blocks
    }
}
