//! Linux's own layout before the first event: the same pages are taken here, by type.

use memdesc::{MigrateType, Pfn};
use memdesc_trace::snapshot::layout::{Layout, LayoutBlock, LayoutKind};

use crate::handles::{Machine, Purpose};
use memdesc_replay::pages::{Holder, Pages};

const PAGEBLOCK: u32 = memdesc::address::PAGEBLOCK_PAGES;

/// What became of the layout.
#[derive(Clone, Debug, Default)]
pub(crate) struct Claims {
    /// Blocks taken, and their pages, by what they are: as [`Purpose::ALL`], then reserved.
    pub(crate) blocks: [u64; 6],
    pub(crate) pages: [u64; 6],
    /// Blocks that could not be had at their place because our own metadata lies there; others stand for them.
    pub(crate) elsewhere: u64,
    /// Blocks that could not be had at all.
    pub(crate) refused: u64,
    /// Pages that Linux took before there was an allocator, as far as one can tell. They are free here.
    pub(crate) early_boot_pages: u64,
    /// Pageblocks set to unmovable.
    pub(crate) unmovable_pageblocks: u64,
    /// Pages of reserved blocks.
    pub(crate) reserved_pages: u64,
}

impl Claims {
    pub(crate) const NAMES: [&'static str; 6] = [
        "bare",
        "anon",
        "file",
        "page_table",
        "linux_slab",
        "reserved",
    ];

    pub(crate) fn all_blocks(&self) -> u64 {
        self.blocks.iter().sum()
    }

    pub(crate) fn all_pages(&self) -> u64 {
        self.pages.iter().sum()
    }
}

/// Cuts a run of pages into aligned blocks of powers of two, none larger than the largest order.
fn pieces(start: u32, pages: u32) -> impl Iterator<Item = (u32, u8)> {
    let end = start + pages;
    let mut at = start;
    std::iter::from_fn(move || {
        (at < end).then(|| {
            let fits = (end - at).ilog2();
            let order = at.trailing_zeros().min(fits).min(memdesc::MAX_ORDER as u32) as u8;
            let piece = (at, order);
            at += 1 << order;
            piece
        })
    })
}

/// The parts of a block that are memory here.
pub(super) fn in_ram<'a>(
    block: &LayoutBlock,
    ram: &'a [(u32, u32)],
) -> impl Iterator<Item = std::ops::Range<u32>> + use<'a> {
    let (start, end) = (block.pfn, block.pfn + block.pages);
    ram.iter()
        .map(move |&(first, last)| start.max(first)..end.min(last))
        .filter(|range| !range.is_empty())
}

/// Takes Linux's pages. `flags` are those of the snapshot, `ram` the page ranges that are memory here.
pub(crate) fn claim(
    machine: &Machine,
    pages: &mut Pages,
    layout: &Layout,
    flags: &[u64],
    ram: &[(u32, u32)],
) -> Claims {
    let mut claims = Claims::default();
    touch_all(machine, ram);
    for block in &layout.blocks {
        if block.pfn as usize + block.pages as usize > pages.len() {
            break;
        }
        // A block may reach into what is no memory: page 0 is reserved together with the first pages that are.
        for range in in_ram(block, ram) {
            match block.kind {
                LayoutKind::NoPage => {}
                kind if kind.is_free() => {}
                LayoutKind::Reserved => reserve(machine, pages, range, flags, &mut claims),
                kind => {
                    for (pfn, order) in pieces(range.start, range.len() as u32) {
                        claim_piece(machine, pages, pfn, order, kind, &mut claims);
                    }
                }
            }
        }
    }
    set_mobility(machine, layout, &mut claims);
    machine.mm.drain_all();
    claims
}

/// Makes free blocks of all memory, so that the allocator's own metadata comes from the top of the zones, which is the last
/// to be used in Linux, and not from beside the block that is just being taken.
fn touch_all(machine: &Machine, ram: &[(u32, u32)]) {
    for &(start, end) in ram {
        // The end of memory may hold our memory map: go down until a page can be had.
        let mut pfn = end;
        let mut step = 1;
        while pfn > start + step {
            pfn -= step;
            if let Ok(block) = machine.claim(pfn, 0, Purpose::Bare) {
                machine.free(block);
                break;
            }
            step = (step * 2).min(1 << 15);
        }
    }
    machine.mm.drain_all();
}

fn claim_piece(
    machine: &Machine,
    pages: &mut Pages,
    pfn: u32,
    order: u8,
    kind: LayoutKind,
    claims: &mut Claims,
) {
    let purpose = match kind {
        LayoutKind::Anon => Purpose::Anon,
        LayoutKind::File => Purpose::File,
        LayoutKind::PageTable => Purpose::PageTable,
        LayoutKind::Slab => Purpose::Slab,
        _ => Purpose::Bare,
    };
    let index = purpose as usize;
    let block = machine.claim(pfn, order.into(), purpose).or_else(|_| {
        let gfp = match purpose {
            Purpose::Anon | Purpose::File => memdesc::gfp::GFP_HIGHUSER_MOVABLE,
            _ => memdesc::gfp::GFP_KERNEL,
        };
        claims.elsewhere += 1;
        machine.handles().alloc(purpose, gfp, order.into())
    });
    match block {
        Ok(block) => {
            pages.put(pfn, order, Holder::of(purpose), block);
            claims.blocks[index] += 1;
            claims.pages[index] += 1 << order;
        }
        Err(_) => {
            pages.mark(pfn, order, Holder::Failed);
            claims.elsewhere -= 1;
            claims.refused += 1;
        }
    }
}

/// Reserved memory is reserved here too. Pages without any flag are only held to be taken, before there was an allocator:
/// the kernel's memory map for the most part. We have our own, so they stay free.
fn reserve(
    machine: &Machine,
    pages: &mut Pages,
    range: std::ops::Range<u32>,
    flags: &[u64],
    claims: &mut Claims,
) {
    let flagged = |pfn: u32| flags.get(pfn as usize).is_some_and(|&f| f != 0);
    let std::ops::Range { mut start, end } = range;
    while start < end {
        let known = flagged(start);
        let run = (start..end)
            .take_while(|&pfn| flagged(pfn) == known)
            .count() as u32;
        for (pfn, order) in pieces(start, run) {
            if !known {
                pages.mark(pfn, order, Holder::Unseen);
                claims.early_boot_pages += 1 << order;
                continue;
            }
            pages.mark(pfn, order, Holder::Reserved);
            match machine.handles().reserve(pfn, order.into()) {
                Ok(()) => {
                    claims.blocks[5] += 1;
                    claims.pages[5] += 1 << order;
                    claims.reserved_pages += 1 << order;
                }
                Err(_) => claims.refused += 1,
            }
        }
        start += run;
    }
}

/// Pageblocks in which more pages are the kernel's than users' are unmovable, as they must be in Linux. (Which of them
/// are reclaimable the flags do not tell.)
fn set_mobility(machine: &Machine, layout: &Layout, claims: &mut Claims) {
    let end = layout.blocks.last().map_or(0, |b| b.pfn + b.pages);
    let mut counts = vec![(0u32, 0u32); end.div_ceil(PAGEBLOCK) as usize];
    for block in &layout.blocks {
        let kernel = match block.kind {
            LayoutKind::Slab | LayoutKind::PageTable | LayoutKind::OtherAllocated => true,
            LayoutKind::Anon | LayoutKind::File => false,
            _ => continue,
        };
        for page in block.pfn..block.pfn + block.pages {
            let (of_kernel, of_users) = &mut counts[(page / PAGEBLOCK) as usize];
            *if kernel { of_kernel } else { of_users } += 1;
        }
    }
    for (i, (of_kernel, of_users)) in counts.into_iter().enumerate() {
        if of_kernel > of_users {
            machine
                .mm
                .set_pageblock_migratetype(Pfn(i as u32 * PAGEBLOCK), MigrateType::Unmovable);
            claims.unmovable_pageblocks += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn aligned_pieces() {
        let all: Vec<_> = pieces(3, 10).collect();
        assert_eq!(all, [(3, 0), (4, 2), (8, 2), (12, 0)]);
        assert_eq!(pieces(0, 4096).count(), 4);
        assert_eq!(pieces(5, 0).count(), 0);
    }
}
