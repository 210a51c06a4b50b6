//! Who has what, to the byte; and the views a kernel shows of it.
//!
//! The ledger is made twice, from the counters that every path keeps and from a walk over the memory map that trusts
//! none of them, and balances only if both agree page by page (rule 9).

use core::fmt;

use crate::address::{MAX_ORDER, PAGE_SIZE, PAGEBLOCK_ORDER, PAGEBLOCK_PAGES, Pfn};
use crate::memmap::{PageType, Word};
use crate::mm::Mm;
use crate::page_alloc::{MigrateType, PcpView, ZoneType};
use crate::platform::Platform;
use crate::stats::Event;
use crate::sync::atomic::Ordering;

/// The ledger, in pages and bytes, of one quiet moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ledger {
    /// RAM given, in pages.
    pub given: u64,
    /// Free in the zones' lists.
    pub free: u64,
    /// Free and never handed out.
    pub untouched: u64,
    /// Free in per-CPU lists.
    pub pcp: u64,
    /// Handed out, by type ([`PageType`] as index); slabs of users' objects under slab, [`metadata`](Self::metadata) apart.
    pub by_type: [u64; PageType::COUNT],
    /// Slabs of descriptors and boot memory.
    pub metadata: u64,
    /// Bytes of words.
    pub memmap_bytes: u64,
    /// Bytes of slabs of descriptors, slack included, and of the guarded pool's pages that hold no object.
    pub descriptor_bytes: u64,
    /// Bytes of all other metadata: tables, per-CPU areas, sheaves, bitmaps in slabs, the rest of boot memory's last page.
    pub other_metadata_bytes: u64,
    /// Do counters and walk agree, and is every page given accounted for?
    pub balanced: bool,
    /// What the walk found if they do not agree: the same numbers from the map.
    pub walk: Walk,
}

impl Ledger {
    /// All metadata, in bytes.
    pub fn metadata_bytes(&self) -> u64 {
        self.memmap_bytes + self.descriptor_bytes + self.other_metadata_bytes
    }

    /// Metadata as a share of RAM, in percent.
    pub fn percent(&self) -> f64 {
        self.metadata_bytes() as f64 * 100.0 / (self.given * PAGE_SIZE as u64) as f64
    }
}

/// The line that Linux's boot log has of memory (`mem_init_print_info`).
impl fmt::Display for Ledger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kib = |pages: u64| pages * (PAGE_SIZE as u64 / 1024);
        let bytes = (self.given * PAGE_SIZE as u64).max(1);
        // No floating point: a kernel may have none.
        let hundredths = self.metadata_bytes() * 10_000 / bytes;
        write!(
            f,
            "Memory: {}K/{}K available ({}K metadata, {}.{:02} % of memory: {}K memory map, {}K other)",
            kib(self.free + self.untouched + self.pcp),
            kib(self.given),
            self.metadata_bytes() / 1024,
            hundredths / 100,
            hundredths % 100,
            self.memmap_bytes / 1024,
            (self.descriptor_bytes + self.other_metadata_bytes) / 1024,
        )
    }
}

/// Pages as a walk over the memory map finds them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Walk {
    /// In zones' lists.
    pub free: u64,
    /// Never handed out.
    pub untouched: u64,
    /// In per-CPU lists.
    pub pcp: u64,
    /// Handed out, by type.
    pub by_type: [u64; PageType::COUNT],
    /// Pages whose words make no sense: a zero word that no head covers, outside untouched memory.
    pub lost: u64,
}

/// A zone's row of the buddyinfo and zoneinfo views.
#[derive(Clone, Copy, Debug)]
pub struct ZoneView {
    /// The node.
    pub node: usize,
    /// The zone.
    pub kind: ZoneType,
    /// Free blocks by order and mobility, as in `/proc/pagetypeinfo`; untouched memory counts as the blocks it will become.
    pub free_blocks: [[u64; MigrateType::COUNT]; MAX_ORDER + 1],
    /// Pages of RAM.
    pub present: u64,
    /// Pages the allocator ever had.
    pub managed: u64,
    /// Free pages, without those in per-CPU lists.
    pub free: u64,
    /// The watermarks min, low, high, and the boost.
    pub watermarks: [u64; 4],
    /// Splits, merges, pageblocks claimed, blocks stolen, words written under the lock.
    pub events: [u64; 5],
}

impl<P: Platform> Mm<P> {
    /// Makes the ledger. Exact at a quiet moment: no request in flight on any CPU.
    pub fn ledger(&self) -> Ledger {
        let walk = self.walk();
        let boot = self.boot.pages + self.boot.kept;
        let mut ledger = Ledger {
            given: self
                .pages
                .map
                .regions()
                .iter()
                .map(|r| u64::from(r.end - r.start))
                .sum(),
            free: 0,
            untouched: 0,
            pcp: 0,
            by_type: core::array::from_fn(|i| self.pages_of(PageType::ALL[i])),
            metadata: 0,
            memmap_bytes: self.boot.memmap,
            descriptor_bytes: 0,
            other_metadata_bytes: (boot - self.kfence.slabs()) * PAGE_SIZE as u64
                - self.boot.memmap,
            balanced: false,
            walk,
        };
        for index in 0..self.pages.zones.len() {
            self.pages.with_zone(index, |zone| {
                ledger.free += zone.lists.nr_listed;
                ledger.untouched += zone.lists.nr_untouched;
            });
            for cpu in 0..self.pages.platform.nr_cpus() {
                ledger.pcp += u64::from(self.pages.pcp_view(cpu, index).count);
            }
        }
        ledger.by_type[PageType::Reserved as usize] = ledger.by_type[PageType::Reserved as usize]
            .wrapping_add(boot + self.boot.reserved_pages);
        let types = ledger
            .by_type
            .iter()
            .fold(0u64, |sum, n| sum.wrapping_add(*n));
        let total = (ledger.free + ledger.untouched + ledger.pcp).wrapping_add(types);
        let counted = Walk {
            free: ledger.free,
            untouched: ledger.untouched,
            pcp: ledger.pcp,
            by_type: ledger.by_type,
            lost: 0,
        };
        ledger.balanced = counted == walk && total == ledger.given;

        self.for_each_cache(|core| {
            let (pages, bitmap_bytes) = {
                let lists = self.lists(core);
                (lists.pages, lists.bitmap_bytes)
            };
            if core.is_metadata() {
                ledger.metadata += pages;
                ledger.descriptor_bytes += pages * PAGE_SIZE as u64;
            } else {
                // Bitmaps that lie in the slabs themselves.
                ledger.other_metadata_bytes += bitmap_bytes;
                // Sheaves of caches made later are kmalloc memory that users do not have.
                if core.sheaves.memory().is_some() && !self.is_built_in(core) {
                    let bytes = crate::slab::sheaf::Sheaves::bytes(
                        core.sheaves.capacity(),
                        self.pages.platform.nr_cpus(),
                    );
                    ledger.other_metadata_bytes += bytes.next_power_of_two() as u64;
                }
            }
        });
        // Slabs of descriptors that wait for a grace period are in no cache any more.
        let waiting = self.discards.metadata_pages();
        ledger.metadata += waiting;
        ledger.descriptor_bytes += waiting * PAGE_SIZE as u64;
        ledger.by_type[PageType::Slab as usize] -= ledger.metadata;
        // Pages of pointers to what is freed later.
        let pointers = self.kvfree_pages();
        ledger.other_metadata_bytes += pointers * PAGE_SIZE as u64;
        ledger.metadata += pointers;
        ledger.by_type[PageType::Bare as usize] =
            ledger.by_type[PageType::Bare as usize].wrapping_sub(pointers);
        // Lists of the blocks of vmalloc areas: in slabs, or in pages that users do not have.
        // And the words of device memory, and what lies beside objects that are kept.
        let lists = |i: usize| {
            let words = self.device_cost.words[i].load(Ordering::Relaxed);
            let side = self.side_cost.0.get(i);
            let side = side.map_or(0, |cost| cost.load(Ordering::Relaxed));
            self.vmalloc.lists[i].load(Ordering::Relaxed) + words + side
        };
        ledger.other_metadata_bytes += lists(0);
        for (kind, pages) in [
            (PageType::LargeKmalloc, lists(1)),
            (PageType::Vmalloc, lists(2)),
        ] {
            ledger.other_metadata_bytes += pages * PAGE_SIZE as u64;
            ledger.metadata += pages;
            ledger.by_type[kind as usize] = ledger.by_type[kind as usize].wrapping_sub(pages);
        }
        // Groups: in slabs.
        ledger.other_metadata_bytes += self.pages.memcg.bytes() + self.pages.reserves.bytes();
        // But for those that are slabs.
        let boot = boot - self.kfence.slabs();
        ledger.by_type[PageType::Reserved as usize] -= boot;
        ledger.metadata += boot;
        ledger
    }

    fn is_built_in(&self, core: &crate::slab::CacheCore) -> bool {
        self.built_in.as_ptr_range().contains(&(&raw const *core))
    }

    /// Visits every block: its head, how many pages, and its word (zero for untouched and lost pages).
    pub(crate) fn for_each_block(&self, mut visit: impl FnMut(Pfn, u32, Word)) {
        for region in self.pages.map.regions() {
            let mut at = region.start;
            while at < region.end {
                let word = region.word(Pfn(at)).load();
                let (start, end) = region.untouched();
                let pages = if at >= start && at < end {
                    end - at
                } else if word.is_tail() {
                    1
                } else {
                    1 << word.order()
                };
                let word = if at >= start && at < end {
                    Word::ZERO
                } else {
                    word
                };
                visit(Pfn(at), pages, word);
                at += pages;
            }
        }
    }

    fn walk(&self) -> Walk {
        let mut walk = Walk::default();
        self.for_each_block(|pfn, pages, word| {
            let pages64 = u64::from(pages);
            match word.kind() {
                PageType::None => {
                    let untouched = self.pages.map.region(pfn).is_some_and(|r| {
                        let (start, end) = r.untouched();
                        pfn.0 >= start && pfn.0 < end
                    });
                    if untouched {
                        walk.untouched += pages64
                    } else {
                        walk.lost += pages64
                    }
                }
                PageType::Free if word.is_in_pcp() => walk.pcp += pages64,
                PageType::Free => walk.free += pages64,
                kind => walk.by_type[kind as usize] += pages64,
            }
        });
        walk
    }

    /// Visits the zones: buddyinfo, pagetypeinfo and zoneinfo in one.
    pub fn zoneinfo(&self, mut visit: impl FnMut(ZoneView)) {
        for (index, zone) in self.pages.zones.iter().enumerate() {
            let view = self.pages.with_zone(index, |locked| {
                let lists = &locked.lists;
                let mut free_blocks = [[0; MigrateType::COUNT]; MAX_ORDER + 1];
                for (order, row) in lists.lists.iter().enumerate() {
                    for (mt, list) in row.iter().enumerate() {
                        free_blocks[order][mt] = u64::from(list.nr);
                    }
                }
                for region in self
                    .pages
                    .map
                    .regions()
                    .iter()
                    .filter(|r| r.zone == zone.index)
                {
                    let (start, end) = region.untouched();
                    for (_, order) in crate::memmap::heads::blocks(start, end) {
                        free_blocks[order][MigrateType::Movable as usize] += 1;
                    }
                }
                let e = lists.events;
                ZoneView {
                    node: zone.node as usize,
                    kind: zone.kind,
                    free_blocks,
                    present: zone.present,
                    managed: zone.managed + zone.given_back.load(Ordering::Relaxed),
                    free: lists.nr_listed + lists.nr_untouched,
                    watermarks: [
                        zone.marks.min,
                        zone.marks.low,
                        zone.marks.high,
                        zone.marks
                            .boost
                            .load(crate::sync::atomic::Ordering::Relaxed),
                    ],
                    events: [e.splits, e.merges, e.claims, e.steals, e.words_written],
                }
            });
            visit(view);
        }
    }

    /// One CPU's per-CPU pages of the zone with this place in the zoneinfo view.
    pub fn pcp(&self, cpu: usize, zone: usize) -> PcpView {
        self.pages.pcp_view(cpu, zone)
    }

    /// All counters, by name: the vmstat view.
    pub fn vmstat(&self, mut visit: impl FnMut(&'static str, u64)) {
        for &event in Event::ALL {
            visit(event.name(), self.event(event));
        }
        let mut sum = [0u64; 5];
        for index in 0..self.pages.zones.len() {
            let e = self.pages.zone_events(index);
            let row = [e.splits, e.merges, e.claims, e.steals, e.words_written];
            sum.iter_mut().zip(row).for_each(|(s, n)| *s += n);
        }
        let names = [
            "buddy_split",
            "buddy_merge",
            "pageblock_claimed",
            "block_stolen",
            "words_written",
        ];
        names.iter().zip(sum).for_each(|(name, n)| visit(name, n));
        let load =
            |a: &crate::sync::atomic::AtomicU64| a.load(crate::sync::atomic::Ordering::Relaxed);
        visit("nr_hwpoison", self.num_poisoned_pages());
        visit("bootstrap_max_depth", load(&self.bootstrap_depth));
        visit("bootstrap_max_pages", load(&self.bootstrap_pages));
    }

    /// Fragmentation: free blocks by order, pageblocks wholly free, and pageblocks *pinned*, that is neither wholly free nor
    /// without a free page: memory that is free but cannot be had as 2 MiB. Per-CPU pages count as free pages, not as
    /// blocks.
    pub fn fragmentation(&self) -> Fragmentation {
        let mut frag = Fragmentation::default();
        self.zoneinfo(|zone| {
            for (order, row) in zone.free_blocks.iter().enumerate() {
                frag.free_by_order[order] += row.iter().sum::<u64>();
            }
        });
        // Blocks come by address, so a pageblock's share is complete when the next one starts.
        let mut current = u32::MAX;
        let (mut free, mut taken) = (0, 0);
        let close = |free: u32, taken: u32, frag: &mut Fragmentation| {
            if taken == 0 && free == PAGEBLOCK_PAGES {
                frag.free_pageblocks += 1;
            } else if taken > 0 && free > 0 {
                frag.pinned_pageblocks += 1;
            }
        };
        self.for_each_block(|pfn, pages, word| {
            let is_free = matches!(word.kind(), PageType::Free | PageType::None);
            let mut at = pfn.0;
            let end = pfn.0 + pages;
            while at < end {
                let block = at >> PAGEBLOCK_ORDER;
                if block != current {
                    close(free, taken, &mut frag);
                    (current, free, taken) = (block, 0, 0);
                }
                let here = end.min((block + 1) << PAGEBLOCK_ORDER) - at;
                if is_free {
                    free += here;
                } else {
                    taken += here;
                }
                at += here;
            }
        });
        close(free, taken, &mut frag);
        frag
    }
}

/// How free memory is cut up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fragmentation {
    /// Free blocks by order, over all zones.
    pub free_by_order: [u64; MAX_ORDER + 1],
    /// 2 MiB blocks that are free as a whole.
    pub free_pageblocks: u64,
    /// 2 MiB blocks with free and with taken pages.
    pub pinned_pageblocks: u64,
}
