//! All of memory as blocks: which pages belong together, who has them, and which are free.
//!
//! `kpageflags` says it directly for most pages. All pages of a free block, not only the first, read
//! as `BUDDY` (older kernels flag the first one only: told apart by comparing with `buddyinfo`), and
//! since the buddy allocator merges whatever it can, the runs of them cut at natural alignment give
//! back the blocks: on the recordings at hand the numbers of blocks agree with `buddyinfo` to a few.
//!
//! What is certain about pages without any flag and what is a guess: see `classify.rs`.

use super::buddyinfo::ORDERS;

/// Pages in a pageblock.
pub(super) const PAGEBLOCK: usize = memdesc::address::PAGEBLOCK_PAGES as usize;

/// Who has a block.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
pub enum LayoutKind {
    /// Free, in a list of the buddy allocator.
    Free,
    /// Free, in a per-CPU list. One page each: the orders in which they lie there are not told.
    FreePerCpu,
    /// Free and not initialised yet. One block, however large.
    FreeUninitialised,
    /// A slab.
    Slab,
    /// Anonymous memory.
    Anon,
    /// The page cache, shmem included.
    File,
    /// A page table.
    PageTable,
    /// Never given to the buddy allocator. One block for all that are side by side.
    Reserved,
    /// Logically offline. One block for all that are side by side.
    Offline,
    /// Bad memory.
    HwPoison,
    /// Allocated for a purpose that is not told: drivers, vmalloc, per-CPU data, kernel stacks.
    OtherAllocated,
    /// No memory. One block for all that is side by side.
    NoPage,
}

impl LayoutKind {
    /// All kinds.
    pub const ALL: [LayoutKind; 12] = [
        LayoutKind::Free,
        LayoutKind::FreePerCpu,
        LayoutKind::FreeUninitialised,
        LayoutKind::Slab,
        LayoutKind::Anon,
        LayoutKind::File,
        LayoutKind::PageTable,
        LayoutKind::Reserved,
        LayoutKind::Offline,
        LayoutKind::HwPoison,
        LayoutKind::OtherAllocated,
        LayoutKind::NoPage,
    ];

    /// Can it be handed out?
    pub const fn is_free(self) -> bool {
        matches!(
            self,
            Self::Free | Self::FreePerCpu | Self::FreeUninitialised
        )
    }

    /// Runs of these say nothing about how they were allocated and are one block.
    pub(super) const fn is_range(self) -> bool {
        matches!(
            self,
            Self::FreeUninitialised | Self::Reserved | Self::Offline | Self::NoPage
        )
    }
}

/// Pages that belong together.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LayoutBlock {
    /// The first page.
    pub pfn: u32,
    /// How many.
    pub pages: u32,
    /// Who has them.
    pub kind: LayoutKind,
}

/// How the layout of a zone agrees with what the kernel counted. All in pages.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ZoneCheck {
    /// The node.
    pub node: u32,
    /// The zone's name.
    pub zone: String,
    /// In buddy blocks, by kpageflags.
    pub buddy: u64,
    /// In buddy blocks, by zoneinfo.
    pub buddy_counted: u64,
    /// Initialised pages without a flag.
    pub without_flags: u64,
    /// Of these, held to be in per-CPU lists.
    pub per_cpu: u64,
    /// In per-CPU lists, by zoneinfo.
    pub per_cpu_counted: u64,
    /// Not initialised, by kpageflags.
    pub uninitialised: u64,
    /// Not initialised or taken before there was a buddy allocator, by zoneinfo: present, but
    /// neither managed nor flagged as reserved.
    pub uninitialised_counted: u64,
}

/// All of memory as blocks.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Layout {
    /// The blocks in order, without gaps from page 0 on.
    pub blocks: Vec<LayoutBlock>,
    /// How this agrees with what the kernel counted, for each zone that is not empty.
    pub zones: Vec<ZoneCheck>,
}

/// Memory by pageblocks (2 MiB).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct PageBlocks {
    /// Wholly memory.
    pub present: u64,
    /// Free from end to end, not initialised ones included.
    pub free: u64,
    /// With both free and allocated pages: what is free cannot be handed out as 2 MiB.
    pub pinned: u64,
    /// Without a free page.
    pub full: u64,
}

impl Layout {
    /// Pages of a kind.
    pub fn pages(&self, kind: LayoutKind) -> u64 {
        self.blocks
            .iter()
            .filter(|b| b.kind == kind)
            .map(|b| u64::from(b.pages))
            .sum()
    }

    /// Free pages of all kinds.
    pub fn free_pages(&self) -> u64 {
        LayoutKind::ALL
            .iter()
            .filter(|k| k.is_free())
            .map(|&k| self.pages(k))
            .sum()
    }

    /// Blocks in the buddy allocator by order, to compare with `buddyinfo`.
    pub fn free_by_order(&self) -> [u64; ORDERS] {
        let mut orders = [0; ORDERS];
        for block in self.blocks.iter().filter(|b| b.kind == LayoutKind::Free) {
            orders[(block.pages.ilog2() as usize).min(ORDERS - 1)] += 1;
        }
        orders
    }

    /// How many pageblocks are free, pinned and full.
    pub fn pageblocks(&self) -> PageBlocks {
        let end = self
            .blocks
            .last()
            .map_or(0, |b| b.pfn as usize + b.pages as usize);
        // Per pageblock: pages that are free, and pages that are taken.
        let mut counts = vec![(0u16, 0u16); end / PAGEBLOCK];
        for block in self.blocks.iter().filter(|b| b.kind != LayoutKind::NoPage) {
            let (mut page, end) = (block.pfn as usize, (block.pfn + block.pages) as usize);
            while page < end {
                let next = ((page / PAGEBLOCK + 1) * PAGEBLOCK).min(end);
                if let Some((free, taken)) = counts.get_mut(page / PAGEBLOCK) {
                    *if block.kind.is_free() { free } else { taken } += (next - page) as u16;
                }
                page = next;
            }
        }
        let mut sum = PageBlocks::default();
        let whole = counts
            .iter()
            .filter(|(f, t)| usize::from(f + t) == PAGEBLOCK);
        for (free, taken) in whole {
            sum.present += 1;
            sum.free += u64::from(*taken == 0);
            sum.pinned += u64::from(*free > 0 && *taken > 0);
            sum.full += u64::from(*free == 0);
        }
        sum
    }
}

#[cfg(test)]
#[path = "layout_tests.rs"]
mod tests;
