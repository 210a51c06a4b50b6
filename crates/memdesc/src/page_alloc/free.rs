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
use crate::platform::{Pin, Platform};
use crate::stats::Event;

/// Blocks freed in one hold of the zone lock.
const DRAIN_HOLD: u32 = 64;

impl<P: Platform> PageAllocator<P> {
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
}
