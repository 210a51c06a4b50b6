//! What each page is: from its flags, or, where it has none, from everything else that is known.
//!
//! Flags 0 is the trouble. It is said of four things, which are told apart like this:
//!
//! 1. *No memory*: outside System RAM (`iomem`; without it, outside of zones and in whole sections
//!    of zeroes in their middle).
//! 2. *Not initialised yet*: kernels that initialise late begin at the bottom of a zone and go on
//!    by sections of 128 MiB. So everything behind the section of the zone's last page with a flag is
//!    not initialised, provided that `zoneinfo` does not say that it is managed. How many of these
//!    pages are free is exact (MemTotal minus what is managed); *which* is an assumption: early boot
//!    memory is taken from the top down.
//! 3. *In a per-CPU list*: free, but of no buddy block.
//! 4. *Allocated bare*: drivers, vmalloc, per-CPU data, kernel stacks.
//!
//! Nothing in the snapshot separates the last two for a single page. [`Evidence`] from a recording
//! does for every page that is touched in it. For the rest: bare pages are the kernel's own, and
//! those lie together with slabs and page tables, where the per-CPU lists hold what processes gave
//! back. A page is held to be allocated if of the pages with flags in its pageblock and the two
//! beside it more than 70 % are slabs or page tables. Of the pages that stayed without flags and events
//! through all recordings at hand, this finds six in ten, and the error is some thousand pages in
//! 24 GiB; [`Layout::zones`] holds the counts to judge it by.

use super::Snapshot;
use super::buddyinfo::ORDERS;
use super::evidence::Evidence;
use super::kpageflags::{KPF_BUDDY, KPF_COMPOUND_HEAD, KPF_COMPOUND_TAIL, KPF_RESERVED, PageKind};
use super::layout::{Layout, LayoutBlock, LayoutKind, PAGEBLOCK, ZoneCheck};
use super::zoneinfo::Zone;

/// Pages in a section: the unit in which memory is initialised late.
const SECTION: u64 = 1 << 15;

/// Layout of a snapshot; `None` without kpageflags.
pub(super) fn build(snapshot: &Snapshot, evidence: Option<&Evidence>) -> Option<Layout> {
    let flags = snapshot.kpageflags.as_deref()?;
    let mut kinds = KindMap::new(snapshot, flags);
    kinds.split_bare_from_per_cpu(evidence);
    let checks = kinds.check();
    Some(Layout {
        blocks: blocks(flags, &kinds.kinds),
        zones: checks,
    })
}

/// The kind of every page, found out step by step.
struct KindMap<'a> {
    flags: &'a [u64],
    kinds: Vec<LayoutKind>,
    zones: Vec<&'a Zone>,
    /// For each zone: where what is not initialised begins and ends.
    late: Vec<std::ops::Range<usize>>,
}

impl<'a> KindMap<'a> {
    fn new(snapshot: &'a Snapshot, flags: &'a [u64]) -> Self {
        let kinds = flags.iter().map(|&f| plain_kind(f)).collect();
        let zones = snapshot.zoneinfo.iter().flat_map(|info| &info.zones);
        let zones = zones.filter(|zone| zone.present > 0).collect();
        let mut map = KindMap {
            flags,
            kinds,
            zones,
            late: Vec::new(),
        };
        map.free_tails(snapshot);
        map.holes(snapshot);
        map.uninitialised(snapshot);
        map
    }

    /// Kernels that flag only the first page of a free block: the others have no flags.
    fn free_tails(&mut self, snapshot: &Snapshot) {
        let Some(counted) = snapshot.buddyinfo.as_ref() else {
            return;
        };
        let flagged = self.flags.iter().filter(|&f| f & KPF_BUDDY != 0).count() as u64;
        let heads: u64 = counted.by_order().iter().sum();
        if flagged.abs_diff(heads) >= flagged.abs_diff(counted.pages()) {
            return;
        }
        let mut page = 0;
        while page < self.flags.len() {
            let mut end = page + 1;
            if self.flags[page] & KPF_BUDDY != 0 {
                let most = page + largest_aligned(page);
                while end < most && self.flags.get(end) == Some(&0) {
                    end += 1;
                }
                end = page + (1 << (end - page).ilog2());
                self.kinds[page..end].fill(LayoutKind::Free);
            }
            page = end;
        }
    }

    /// What lies outside of memory.
    fn holes(&mut self, snapshot: &Snapshot) {
        let mut from = 0;
        if let Some(iomem) = &snapshot.iomem {
            for ram in iomem.ram_pfns() {
                self.no_pages(from..ram.start as usize);
                from = ram.end as usize;
            }
        } else if !self.zones.is_empty() {
            let mut spans: Vec<_> = self
                .zones
                .iter()
                .map(|z| (z.start_pfn, z.end_pfn()))
                .collect();
            spans.sort_unstable();
            for (start, end) in spans {
                self.no_pages(from..start as usize);
                from = from.max(end as usize);
            }
        } else {
            return;
        }
        self.no_pages(from..usize::MAX);
    }

    fn no_pages(&mut self, range: std::ops::Range<usize>) {
        let end = range.end.min(self.kinds.len());
        for page in range.start.min(end)..end {
            if self.flags[page] == 0 {
                self.kinds[page] = LayoutKind::NoPage;
            }
        }
    }

    /// The top of each zone that was not initialised yet.
    fn uninitialised(&mut self, snapshot: &Snapshot) {
        let managed: u64 = self.zones.iter().map(|z| z.managed).sum();
        let total = snapshot
            .meminfo
            .as_ref()
            .and_then(|m| m.get("MemTotal"))
            .map(|b| b / 4096);
        // Free pages that no zone manages yet.
        let mut free = total.map_or(usize::MAX, |total| total.saturating_sub(managed) as usize);
        for zone in self.zones.clone() {
            let end = (zone.end_pfn() as usize).min(self.flags.len());
            let start = (zone.start_pfn as usize).min(end);
            let flagged = self.flags[start..end].iter().rposition(|&f| f != 0);
            let used = flagged.map_or(start, |last| start + last + 1);
            let late = (used.next_multiple_of(SECTION as usize)).min(end)..end;
            let there = self.kinds[late.clone()]
                .iter()
                .filter(|&&k| k != LayoutKind::NoPage);
            let there = there.count() as u64;
            if there == 0 || self.unmanaged(zone) < there / 2 {
                self.late.push(end..end);
                continue;
            }
            for kind in &mut self.kinds[late.clone()] {
                if *kind != LayoutKind::NoPage {
                    let is_free = free > 0;
                    *kind = if is_free {
                        LayoutKind::FreeUninitialised
                    } else {
                        LayoutKind::Reserved
                    };
                    free -= usize::from(is_free);
                }
            }
            self.late.push(late);
        }
        if snapshot.iomem.is_none() {
            self.sections_without_memory();
        }
    }

    /// Without iomem: sections of zeroes in the middle of a zone with large holes.
    fn sections_without_memory(&mut self) {
        for (zone, late) in self.zones.clone().into_iter().zip(self.late.clone()) {
            let mut holes = zone.spanned.saturating_sub(zone.present);
            let mut start = zone.start_pfn.next_multiple_of(SECTION);
            while start + SECTION <= late.start as u64 && holes >= SECTION {
                let section = start as usize..(start + SECTION) as usize;
                if self.flags[section.clone()].iter().all(|&f| f == 0) {
                    self.no_pages(section);
                    holes -= SECTION;
                }
                start += SECTION;
            }
        }
    }

    /// Pages that are there, but neither managed nor flagged as reserved.
    fn unmanaged(&self, zone: &Zone) -> u64 {
        let end = (zone.end_pfn() as usize).min(self.flags.len());
        let start = (zone.start_pfn as usize).min(end);
        let reserved = self.flags[start..end]
            .iter()
            .filter(|&f| f & KPF_RESERVED != 0)
            .count();
        zone.present
            .saturating_sub(zone.managed)
            .saturating_sub(reserved as u64)
    }

    /// Decides what initialised pages without flags are: see the head of this file.
    fn split_bare_from_per_cpu(&mut self, evidence: Option<&Evidence>) {
        // Per pageblock: slabs and page tables, and all pages with flags.
        let counts: Vec<(u32, u32)> = self
            .flags
            .chunks(PAGEBLOCK)
            .map(|block| {
                block
                    .iter()
                    .fold((0, 0), |(kernel, all), &f| match PageKind::of(f) {
                        PageKind::Slab | PageKind::PageTable => (kernel + 1, all + 1),
                        PageKind::Anon | PageKind::File | PageKind::Buddy => (kernel, all + 1),
                        _ => (kernel, all),
                    })
            })
            .collect();
        for (i, block) in self.kinds.chunks_mut(PAGEBLOCK).enumerate() {
            let around = &counts[i.saturating_sub(1)..(i + 2).min(counts.len())];
            let (kernel, all) = around.iter().fold((0, 0), |(k, a), c| (k + c.0, a + c.1));
            let bare = kernel * 10 > all * 7;
            for (k, kind) in block.iter_mut().enumerate() {
                let page = i * PAGEBLOCK + k;
                if self.flags[page] == 0 && *kind == LayoutKind::OtherAllocated {
                    let proved = evidence.and_then(|e| e.is_free(page as u32));
                    if proved.unwrap_or(!bare) {
                        *kind = LayoutKind::FreePerCpu;
                    }
                }
            }
        }
    }

    fn check(&self) -> Vec<ZoneCheck> {
        let zones = self.zones.iter().zip(&self.late);
        zones
            .map(|(zone, late)| {
                let end = late.start.min(self.flags.len());
                let pages = (zone.start_pfn as usize).min(end)..end;
                let of = |kind| {
                    self.kinds[pages.clone()]
                        .iter()
                        .filter(|&&k| k == kind)
                        .count()
                };
                let bare = pages.clone().filter(|&page| {
                    self.flags[page] == 0 && self.kinds[page] == LayoutKind::OtherAllocated
                });
                let per_cpu = of(LayoutKind::FreePerCpu) as u64;
                let late = self.kinds[late.clone()]
                    .iter()
                    .filter(|&&k| k != LayoutKind::NoPage);
                ZoneCheck {
                    node: zone.node,
                    zone: zone.name.clone(),
                    buddy: of(LayoutKind::Free) as u64,
                    buddy_counted: zone.free,
                    without_flags: per_cpu + bare.count() as u64,
                    per_cpu,
                    per_cpu_counted: zone.pcp_pages(),
                    uninitialised: late.count() as u64,
                    uninitialised_counted: self.unmanaged(zone),
                }
            })
            .collect()
    }
}

fn plain_kind(flags: u64) -> LayoutKind {
    match PageKind::of(flags) {
        PageKind::Buddy => LayoutKind::Free,
        PageKind::Slab => LayoutKind::Slab,
        PageKind::Anon => LayoutKind::Anon,
        PageKind::File => LayoutKind::File,
        PageKind::PageTable => LayoutKind::PageTable,
        PageKind::Reserved => LayoutKind::Reserved,
        PageKind::Offline => LayoutKind::Offline,
        PageKind::HwPoison => LayoutKind::HwPoison,
        PageKind::NoPage => LayoutKind::NoPage,
        PageKind::Other | PageKind::Nothing => LayoutKind::OtherAllocated,
    }
}

/// Pages of the largest buddy block that can begin here.
fn largest_aligned(page: usize) -> usize {
    let order = if page == 0 {
        u32::MAX
    } else {
        page.trailing_zeros()
    };
    1 << order.min(ORDERS as u32 - 1)
}

/// Puts pages together to blocks.
fn blocks(flags: &[u64], kinds: &[LayoutKind]) -> Vec<LayoutBlock> {
    let mut blocks = Vec::new();
    let mut page = 0;
    while page < kinds.len() {
        let kind = kinds[page];
        let same = |mut end: usize, most: usize| {
            while end < most && kinds.get(end) == Some(&kind) {
                end += 1;
            }
            end
        };
        let end = if kind == LayoutKind::Free {
            let end = same(page + 1, page + largest_aligned(page));
            page + (1 << (end - page).ilog2())
        } else if kind.is_range() {
            same(page + 1, kinds.len())
        } else if flags[page] & KPF_COMPOUND_HEAD != 0 {
            let tails = flags[page + 1..]
                .iter()
                .take_while(|&f| f & KPF_COMPOUND_TAIL != 0);
            page + 1 + tails.count()
        } else {
            page + 1
        };
        blocks.push(LayoutBlock {
            pfn: page as u32,
            pages: (end - page) as u32,
            kind,
        });
        page = end;
    }
    blocks
}
