//! Taking over memory: from the platform's ranges to a memory manager.
//!
//! What is made here, once, and stays: regions and sections, a word a page, a byte a pageblock, zones, per-CPU
//! lists and counters, the built-in caches. It is laid into the top of the longest run of memory, in one piece. Nothing is
//! done per page: words of zero say "never handed out", and free blocks are made when they are first needed.

use core::ptr::NonNull;

use crate::address::{MAX_PFN, PAGE_SHIFT, PAGE_SIZE, Pfn, PhysAddr};
use crate::config::{Config, MAX_CPUS, MAX_NODES, MAX_SHRINKERS, MemRange};
use crate::desc::{Folio, FolioPrivate, PtDesc, Slab, VmArea, ZsDesc};
use crate::device::DeviceCost;
use crate::error::InitError;
use crate::folio::{Lruvec, WaitTable};
use crate::freepage::reporting::{Reporting, ZoneReporting};
use crate::freepage::{PageWords, Services};
use crate::gfp::{self, Flags};
use crate::inline::Reserved;
use crate::memcg::Memcgs;
use crate::memmap::map::SECTION_SHIFT;
use crate::memmap::word::AtomicWord;
use crate::memmap::{BootSlice, Checks, MemMap, PageType, Region};
use crate::mempool::Mempools;
use crate::mm::{BuiltIn, CacheList, Mm};
use crate::netpool::{PoolCore, Pools};
use crate::own::OwnTypes;
use crate::page_alloc::ZoneType;
use crate::page_alloc::alloc::{PageAllocator, ZoneList};
use crate::page_alloc::pcp::PerCpuPages;
use crate::page_alloc::watermark;
use crate::page_alloc::zone::Zone;
use crate::pgtable::RcuPages;
use crate::platform::{Platform, phys_to_virt};
use crate::rcu::block::Krc;
use crate::rcu::discard::Discards;
use crate::rcu::prepaid::Prepaid;
use crate::report::depot::{self, Cell, Depot};
use crate::report::entry::Entry;
use crate::report::history::{History, SetInfo, WAYS};
use crate::reserved::{ReservedRange, check_reserved, next_reserved, reserved_until};
use crate::slab::cache::{Geometry, Role};
use crate::slab::init::init_flags;
use crate::slab::kfence::{self, Countdown, Pool, Slot};
use crate::slab::kmalloc::{CLASSES, Kind};
use crate::slab::pointers::SideCost;
use crate::slab::sheaf::Sheaves;
use crate::slab::{CacheCore, CacheFlags};
use crate::stats::CpuStats;
use crate::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};
use crate::sync::{PfnStack, SpinLock};
use crate::vmalloc::{StackCache, Vmalloc};
use crate::xarray::Node;
use crate::zsmalloc::ZsPools;

/// Where boot memory went, in bytes.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct BootLayout {
    /// RAM given.
    pub(crate) ram: u64,
    /// Words.
    pub(crate) memmap: u64,
    /// Pageblock bytes, sections and regions.
    pub(crate) map_tables: u64,
    /// Zones, per-CPU lists and counters, built-in caches and their sheaves.
    pub(crate) tables: u64,
    /// Pages kept out of the allocator for good: page 0, if there is one. Its address means "no descriptor".
    pub(crate) kept: u64,
    /// All of it, in whole pages.
    pub(crate) pages: u64,
    /// Where it starts.
    pub(crate) start: Pfn,
    /// What was in use when the memory was taken over, and how many pages it is.
    pub(crate) reserved: &'static [ReservedRange],
    pub(crate) reserved_pages: u64,
}

/// A piece of the memory map: pages of one zone.
#[derive(Clone, Copy, Debug)]
struct Piece {
    start: u32,
    end: u32,
    node: u8,
    kind: ZoneType,
}

/// A bump allocator over the boot memory; with no memory, it only counts.
struct Bump {
    base: Option<NonNull<u8>>,
    used: usize,
}

impl Bump {
    /// Room for `n` values of `T`, 64-byte aligned. A pointer that must not be followed while counting.
    fn take<T>(&mut self, n: usize) -> NonNull<T> {
        const { assert!(align_of::<T>() <= 128) };
        let at = self.used.next_multiple_of(align_of::<T>().max(64));
        self.used = at + n * size_of::<T>();
        match self.base {
            // SAFETY: the first pass counted what the second takes, and the memory is that large.
            Some(base) => unsafe { base.add(at) }.cast(),
            None => NonNull::dangling(),
        }
    }

    /// So many pages, in one piece: how many bytes from the start.
    fn pages(&mut self, n: usize) -> usize {
        let at = self
            .used
            .next_multiple_of(if n > 0 { PAGE_SIZE } else { 1 });
        self.used = at + n * PAGE_SIZE;
        at
    }

    /// The same, filled with values.
    fn fill<T>(&mut self, n: usize, mut value: impl FnMut(usize) -> T) -> BootSlice<T> {
        let ptr = self.take::<T>(n);
        if self.base.is_none() {
            // SAFETY: an empty slice needs no memory.
            return unsafe { BootSlice::new(ptr, 0) };
        }
        for i in 0..n {
            // SAFETY: `take` made room for `n` values, aligned; nobody else knows of them yet.
            unsafe { ptr.add(i).write(value(i)) };
        }
        // SAFETY: all `n` are written now, and boot memory is never given to anyone else.
        unsafe { BootSlice::new(ptr, n) }
    }
}

impl<P: Platform> Mm<P> {
    /// Takes over the memory in `ranges`.
    ///
    /// Writes next to nothing if the memory is known to be zero ([`Config::memory_is_zeroed`]), else zeroes the memory map
    /// (8 bytes a page).
    ///
    /// # Errors
    ///
    /// What is wrong with the ranges or the platform. Nothing has been written then.
    pub fn new(platform: P, config: &Config, ranges: &[MemRange]) -> Result<Mm<P>, InitError> {
        let nr_cpus = platform.nr_cpus();
        if nr_cpus == 0 || nr_cpus > MAX_CPUS {
            return Err(InitError::BadCpuCount(nr_cpus));
        }
        let direct_map = platform.direct_map().addr();
        if !direct_map.is_multiple_of(PAGE_SIZE) {
            return Err(InitError::BadDirectMap(direct_map));
        }
        check(ranges)?;
        check_reserved(config.reserved, ranges)?;
        if config.preempt_rt {
            platform.with_lockdep(&mut |lockdep, _| lockdep.set_preempt_rt());
        }
        if let Some(range) = ranges.iter().find(|range| !platform.maps(range)) {
            return Err(InitError::NotMapped(range.start));
        }
        let (home_start, home_end) = longest_run(ranges, config.reserved);

        let services = Services::new(config, &platform);
        // The first pass counts; the second knows where to put things. The count does not depend on the place.
        let mut count = Bump {
            base: None,
            used: 0,
        };
        let _ = lay_out(&mut count, &platform, config, services, ranges, 0..0);
        let bytes = count.used;
        let pages = bytes.div_ceil(PAGE_SIZE) as u32;
        // Room must be left for something to allocate.
        if pages >= home_end - home_start {
            return Err(InitError::TooSmall(bytes as u64));
        }
        let start = home_end - pages;
        let memory = phys_to_virt(platform.direct_map(), Pfn(start).phys());
        let Some(base) = NonNull::new(memory) else {
            return Err(InitError::NoMemory);
        };
        if !config.memory_is_zeroed {
            // SAFETY: promise 1 of the platform: the range is ours to write.
            unsafe { base.write_bytes(0, pages as usize * PAGE_SIZE) };
        }
        let mut bump = Bump {
            base: Some(base),
            used: 0,
        };
        let boot = start..home_end;
        let mut parts = lay_out(&mut bump, &platform, config, services, ranges, boot);
        debug_assert_eq!(bump.used, bytes);
        parts.layout.pages = u64::from(pages);
        parts.layout.start = Pfn(start);

        if let Some(first) = parts.map.region(Pfn(0)) {
            debug_assert!(first.untouched().0 >= 1);
            parts
                .map
                .set(Pfn(0), 1, PageType::Reserved, Reserved::MemMap as u64);
            parts.layout.kept = 1;
        }
        parts.layout.reserved = config.reserved;
        for region in parts.map.regions() {
            for range in config.reserved {
                let (start, end) = range.frames();
                let (start, end) = (start.max(region.start).max(1), end.min(region.end));
                if start < end {
                    let facts = range.what as u64;
                    parts
                        .map
                        .set(Pfn(start), end - start, PageType::Reserved, facts);
                    parts.layout.reserved_pages += u64::from(end - start);
                }
            }
        }
        // The boot memory itself is the first thing handed out.
        let facts = Reserved::MemMap as u64;
        let guarded = parts.kfence.pages();
        let rest = pages - guarded.len() as u32;
        debug_assert!(guarded.is_empty() || guarded.start == start + rest);
        parts.map.set(Pfn(start), rest, PageType::Reserved, facts);
        // Every other one is going to be a slab.
        for pfn in guarded {
            parts.map.set(Pfn(pfn), 1, PageType::Reserved, facts);
        }

        let vmalloc = Vmalloc::new(&platform, parts.stacks);
        let words = PageWords::new(&parts.map, parts.kfence.view(), &parts.history);
        platform.taken_over(config, words);
        let zonelists = core::array::from_fn(|node| {
            core::array::from_fn(|kind| ZoneList::new(&parts.zones, node, ZoneType::ALL[kind]))
        });
        let mm = Mm {
            pages: PageAllocator {
                platform,
                map: parts.map,
                zones: parts.zones,
                pcps: parts.pcps,
                stats: parts.stats,
                depot: parts.depot,
                history: parts.history,
                zonelists,
                memcg: Memcgs::new(),
                reserves: crate::reserve::Reserves::new(),
                rt: config.preempt_rt,
                services,
                reporting: Reporting::new(config),
            },
            built_in: parts.caches,
            caches: SpinLock::new(CacheList {
                head: core::ptr::null_mut(),
            }),
            shrinkers: SpinLock::new([None; MAX_SHRINKERS]),
            krcs: parts.krcs,
            prepaid: parts.prepaid,
            kvfree_pages: AtomicU64::new(0),
            kvfree_backlog: config.kvfree_backlog,
            kvfree_drain_ns: config.kvfree_drain_ns,
            lruvecs: parts.lruvecs,
            folio_waits: WaitTable::new(),
            dying: PfnStack::new(),
            mf_lock: SpinLock::new(()),
            compact_at: AtomicU32::new(0),
            rcu_pages: RcuPages::new(),
            discards: Discards::new(),
            vmalloc,
            pools: Pools::new(),
            own_types: OwnTypes::new(),
            device_cost: DeviceCost::new(),
            mempool_list: SpinLock::new(Mempools::EMPTY),
            side_cost: SideCost::new(),
            zs_pools: SpinLock::new(ZsPools::EMPTY),
            kfence: parts.kfence,
            boot: parts.layout,
            bootstrap_depth: AtomicU64::new(0),
            bootstrap_pages: AtomicU64::new(0),
        };
        mm.kfence_init()?;
        Ok(mm)
    }
}

/// Page frames that lie wholly in a range.
pub(crate) fn frames(range: &MemRange) -> (u32, u32) {
    let start = range
        .start
        .0
        .div_ceil(PAGE_SIZE as u64)
        .min(u64::from(MAX_PFN));
    let end = (range.end.0 >> PAGE_SHIFT).min(u64::from(MAX_PFN));
    (start as u32, (end as u32).max(start as u32))
}

/// The longest run of page frames without a hole, or anything reserved. Ranges in it may touch: boot memory at its end is at the end of a region
/// however ranges are made into regions.
fn longest_run(ranges: &[MemRange], reserved: &[ReservedRange]) -> (u32, u32) {
    let runs = ranges.iter().map(|range| {
        let (start, mut end) = frames(range);
        while let Some(next) = ranges.iter().find(|r| frames(r).0 == end) {
            end = frames(next).1;
        }
        (start, end)
    });
    // Each cut at what is reserved in it.
    let gaps = runs.flat_map(|(start, end)| {
        let ends = reserved.iter().map(|r| r.frames().1);
        core::iter::once(start)
            .chain(ends)
            .filter(move |&at| start <= at && at < end && reserved_until(reserved, at) == at)
            .map(move |at| (at, next_reserved(reserved, at).min(end)))
    });
    gaps.max_by_key(|(start, end)| end - start)
        .unwrap_or((0, 0))
}

fn check(ranges: &[MemRange]) -> Result<(), InitError> {
    if ranges.is_empty() {
        return Err(InitError::NoMemory);
    }
    for (i, range) in ranges.iter().enumerate() {
        let (start, end) = frames(range);
        if range.end.0 >> PAGE_SHIFT > u64::from(MAX_PFN) {
            return Err(InitError::TooHigh(range.start));
        }
        if start == end {
            return Err(InitError::EmptyRange(range.start));
        }
        if usize::from(range.node) >= MAX_NODES {
            return Err(InitError::TooManyNodes(range.node));
        }
        for other in &ranges[..i] {
            let (s, e) = frames(other);
            if start < e && s < end {
                return Err(InitError::Overlap(range.start.max(other.start)));
            }
        }
    }
    Ok(())
}

/// Visits the ranges cut at the borders of zones and where something reserved starts, by address. Adjacent ranges of one zone come as one piece, so that
/// blocks merge across them.
fn for_pieces(config: &Config, ranges: &[MemRange], mut visit: impl FnMut(Piece)) {
    let limit = |phys: PhysAddr| (phys.0 >> PAGE_SHIFT).min(u64::from(MAX_PFN)) as u32;
    let movable = config.movable_from.map_or(MAX_PFN, limit);
    let dma = limit(config.dma_limit);
    let dma32 = limit(config.dma32_limit).max(dma);
    let zone_of = |pfn: u32| {
        if pfn < dma {
            (ZoneType::Dma, dma)
        } else if pfn >= movable {
            (ZoneType::Movable, MAX_PFN)
        } else if pfn < dma32 {
            (ZoneType::Dma32, dma32.min(movable))
        } else {
            (ZoneType::Normal, movable)
        }
    };
    let mut pending: Option<Piece> = None;
    let mut at = 0;
    // Ranges are few and need not be sorted: the next one is the lowest that ends after what was seen.
    while let Some(range) = ranges
        .iter()
        .filter(|r| frames(r).1 > at)
        .min_by_key(|r| frames(r).0)
    {
        let (mut start, end) = frames(range);
        while start < end {
            let (kind, border) = zone_of(start);
            let cut = next_reserved(config.reserved, start);
            let is_cut = next_reserved(config.reserved, start.saturating_sub(1)) == start;
            let piece = Piece {
                start,
                end: end.min(border).min(cut),
                node: range.node,
                kind,
            };
            match &mut pending {
                Some(p)
                    if p.end == piece.start
                        && p.node == piece.node
                        && p.kind == kind
                        && !is_cut =>
                {
                    p.end = piece.end;
                }
                _ => {
                    if let Some(done) = pending.replace(piece) {
                        visit(done);
                    }
                }
            }
            start = piece.end;
        }
        at = end;
    }
    if let Some(done) = pending {
        visit(done);
    }
}

/// All that is laid into boot memory.
struct Parts {
    map: MemMap,
    zones: BootSlice<Zone>,
    pcps: BootSlice<PerCpuPages>,
    stats: BootSlice<CpuStats>,
    krcs: BootSlice<Krc>,
    prepaid: BootSlice<Prepaid>,
    lruvecs: BootSlice<Lruvec>,
    stacks: BootSlice<StackCache>,
    caches: BootSlice<CacheCore>,
    depot: Depot<BootSlice<AtomicU32>, BootSlice<Cell>>,
    history: History,
    kfence: Pool,
    layout: BootLayout,
}

fn lay_out<P: Platform>(
    bump: &mut Bump,
    platform: &P,
    config: &Config,
    services: Services,
    ranges: &[MemRange],
    boot: core::ops::Range<u32>,
) -> Parts {
    let nr_cpus = platform.nr_cpus();
    let mut layout = BootLayout::default();
    // The zones there are, in the order of node and kind.
    let mut present = [[false; ZoneType::COUNT]; MAX_NODES];
    let (mut nr_pieces, mut last) = (0, 0);
    for_pieces(config, ranges, |piece| {
        present[piece.node as usize][piece.kind as usize] = true;
        nr_pieces += 1;
        last = piece.end;
        layout.ram += u64::from(piece.end - piece.start) << PAGE_SHIFT;
    });
    let zone_index = |node: u8, kind: ZoneType| {
        present
            .iter()
            .flatten()
            .take(usize::from(node) * ZoneType::COUNT + kind as usize)
            .filter(|p| **p)
            .count()
    };
    let nr_zones = present.iter().flatten().filter(|p| **p).count();

    // Words and pageblock bytes. They are zero already.
    let mut memory: (NonNull<AtomicWord>, NonNull<AtomicU8>) =
        (NonNull::dangling(), NonNull::dangling());
    let region_ptr = bump.take::<Region>(nr_pieces);
    let mut i = 0;
    for_pieces(config, ranges, |piece| {
        let before = bump.used;
        let pages = (piece.end - piece.start) as usize;
        memory.0 = bump.take(pages);
        layout.memmap += (pages * size_of::<AtomicWord>()) as u64;
        memory.1 = bump.take(Region::pageblocks(piece.start, piece.end));
        layout.map_tables += (bump.used - before - pages * size_of::<AtomicWord>()) as u64;
        if bump.base.is_some() {
            let zone = zone_index(piece.node, piece.kind) as u32;
            // SAFETY: words and bytes were just taken from zeroed boot memory, which is never given to anyone else; room for
            // the region itself was made above.
            unsafe {
                let region = Region::new(piece.start, piece.end, zone, memory.0, memory.1);
                // Boot memory is the end of a run of ranges, so of a piece or of several.
                if boot.start < piece.end && boot.end >= piece.end {
                    region
                        .untouched_end
                        .store(boot.start.max(piece.start), Ordering::Relaxed);
                }
                // What is reserved starts a piece, or goes through it.
                let free = reserved_until(config.reserved, piece.start).min(piece.end);
                region.untouched_start.store(free.max(1), Ordering::Relaxed);
                region_ptr.add(i).write(region);
            }
        }
        i += 1;
    });
    let filled = if bump.base.is_some() { nr_pieces } else { 0 };
    // SAFETY: `filled` regions are written, and boot memory is never given to anyone else.
    let regions = unsafe { BootSlice::new(region_ptr, filled) };
    let nr_sections = (last as usize).div_ceil(1 << SECTION_SHIFT);
    let before = bump.used;
    let sections = bump.fill(nr_sections, |section| {
        let start = (section as u32) << SECTION_SHIFT;
        regions
            .iter()
            .take_while(|r: &&Region| r.end <= start)
            .count() as u16
    });
    layout.map_tables += (bump.used - before + nr_pieces * size_of::<Region>()) as u64;
    let map = MemMap::new(
        platform.direct_map(),
        sections,
        regions,
        Checks::new(config.check_pages, config.page_owner > 0),
    );

    let before = bump.used;
    let zone_ptr = bump.take::<Zone>(nr_zones);
    if bump.base.is_some() {
        let all = ZoneType::ALL
            .iter()
            .flat_map(|&k| (0..MAX_NODES as u8).map(move |n| (n, k)));
        for (node, kind) in all.filter(|&(n, k)| present[n as usize][k as usize]) {
            let index = zone_index(node, kind);
            let reporting = ZoneReporting::new(config);
            // SAFETY: room for `nr_zones` was made, and `index` is below it.
            unsafe {
                zone_ptr
                    .add(index)
                    .write(Zone::new(kind, node, index as u32, &map, reporting))
            };
        }
        // SAFETY: all of them are written, and nobody else knows of them yet.
        let zones = unsafe { core::slice::from_raw_parts_mut(zone_ptr.as_ptr(), nr_zones) };
        watermark::set_up(zones, config);
    }
    let filled = if bump.base.is_some() { nr_zones } else { 0 };
    // SAFETY: as for the regions.
    let zones = unsafe { BootSlice::new(zone_ptr, filled) };
    let pcps = bump.fill(nr_cpus * nr_zones, |i| {
        let zone: &Zone = &zones[i % nr_zones];
        PerCpuPages::new(zone.managed, zone.marks.low, nr_cpus)
    });
    let stats = bump.fill(nr_cpus, |_| CpuStats::new());
    let krcs = bump.fill(nr_cpus, |_| Krc::new());
    let prepaid = bump.fill(nr_cpus, |_| Prepaid::new());
    let nodes = present.iter().rposition(|node| node.contains(&true));
    let lruvecs = bump.fill(nodes.map_or(0, |last| last + 1), |_| Lruvec::new());
    let stacks = bump.fill(nr_cpus, |_| StackCache::new());

    // Sheaves first, then the caches that point at them.
    let id = platform.direct_map().addr();
    let cache_ptr = bump.take::<CacheCore>(BuiltIn::COUNT);
    let mut name = Name::default();
    for index in 0..BuiltIn::COUNT {
        let spec = built_in(index, config, &mut name);
        let Some(geometry) = Geometry::new(spec.size, spec.align, spec.flags, false) else {
            unreachable!("a built-in cache's objects fit a page")
        };
        let capacity = if spec
            .flags
            .intersects(CacheFlags::DEBUG | CacheFlags::NO_SHEAVES)
        {
            0
        } else {
            Sheaves::capacity_for(spec.size)
        };
        let memory = bump
            .take::<u64>(Sheaves::bytes(capacity, nr_cpus) / 8)
            .cast::<u8>();
        if bump.base.is_none() {
            continue;
        }
        let sheaves = if capacity == 0 {
            Sheaves::none()
        } else {
            // SAFETY: zeroed boot memory of that size, 64-byte aligned by `take`, for this cache alone.
            unsafe { Sheaves::new(memory, capacity) }
        };
        let core = CacheCore::new(
            name.as_str(),
            geometry,
            spec.flags | init_flags(services, spec.flags, spec.role, false),
            spec.gfp,
            spec.role,
            None,
            sheaves,
            id,
        );
        // SAFETY: room for all built-in caches was made.
        unsafe { cache_ptr.add(index).write(core) };
    }
    let filled = if bump.base.is_some() {
        BuiltIn::COUNT
    } else {
        0
    };
    // SAFETY: as for the regions.
    let caches = unsafe { BootSlice::new(cache_ptr, filled) };
    let (buckets, cells) = depot::tables(config.stack_depot);
    let buckets = bump.fill(buckets, |_| AtomicU32::new(0));
    let depot = Depot::new(buckets, bump.fill(cells, |_| Cell::new()));
    let sets = History::sets_for(config.page_owner);
    let entries = bump.fill(sets * WAYS, |_| Entry::new());
    let history = History::new(entries, bump.fill(sets, |_| SetInfo::new()));
    layout.tables = (bump.used - before) as u64;
    let objects = config.kfence_objects;
    let slots = bump.fill(objects, |_| Slot::new());
    let countdowns = bump.fill(if objects > 0 { nr_cpus } else { 0 }, |_| Countdown::new());
    // Last: to the end of the boot memory.
    let first = bump.pages(kfence::pool_pages(objects)) >> PAGE_SHIFT;
    let first = Pfn(boot.start + first as u32);
    let base = phys_to_virt(platform.direct_map(), first.phys()).addr();
    let kfence = Pool::new(config, first, base, slots, countdowns);
    Parts {
        map,
        zones,
        pcps,
        stats,
        krcs,
        prepaid,
        lruvecs,
        stacks,
        caches,
        depot,
        history,
        kfence,
        layout,
    }
}

/// What a built-in cache is.
struct Spec {
    size: usize,
    align: usize,
    flags: CacheFlags,
    gfp: Flags,
    role: Role,
}

fn built_in(index: usize, config: &Config, name: &mut Name) -> Spec {
    name.clear();
    let plain = |size, align, role| Spec {
        size,
        align,
        flags: CacheFlags::SINGLE_PAGES,
        gfp: Flags::EMPTY,
        role,
    };
    if index >= BuiltIn::Kmalloc as usize {
        let kind = Kind::ALL[(index - BuiltIn::Kmalloc as usize) / CLASSES.len()];
        let size = CLASSES[(index - BuiltIn::Kmalloc as usize) % CLASSES.len()];
        name.push(kind.prefix());
        name.push_size(size);
        // Linux promises that a power of two is aligned to itself.
        let align = if size.is_power_of_two() {
            size.min(PAGE_SIZE)
        } else {
            8
        };
        let (gfp, flags) = match kind {
            Kind::Normal => (Flags::EMPTY, CacheFlags::EMPTY),
            Kind::Reclaim => (gfp::__GFP_RECLAIMABLE, CacheFlags::RECLAIM_ACCOUNT),
            Kind::Prepaid => (Flags::EMPTY, CacheFlags::RCU_PREPAID),
            Kind::Cgroup => (Flags::EMPTY, CacheFlags::OWNERS | CacheFlags::RCU_PREPAID),
            Kind::Dma => (
                gfp::__GFP_DMA,
                CacheFlags::CACHE_DMA | CacheFlags::NO_SHEAVES,
            ),
        };
        return Spec {
            size,
            align,
            flags: flags | config.slab_debug,
            gfp,
            role: Role::Objects,
        };
    }
    let (text, spec) = match index {
        i if i == BuiltIn::Buddy as usize => ("kmem_cache_buddy", plain(8, 8, Role::Buddies)),
        i if i == BuiltIn::Slab as usize => {
            ("kmem_cache_slab", plain(size_of::<Slab>(), 16, Role::Slabs))
        }
        i if i == BuiltIn::File as usize => (
            "folio_file",
            plain(size_of::<Folio>(), 8, Role::Descriptors),
        ),
        i if i == BuiltIn::Anon as usize => (
            "folio_anon",
            plain(size_of::<Folio>(), 8, Role::Descriptors),
        ),
        i if i == BuiltIn::PtDesc as usize => {
            ("ptdesc", plain(size_of::<PtDesc>(), 16, Role::Descriptors))
        }
        i if i == BuiltIn::Private as usize => (
            "folio_private",
            plain(size_of::<FolioPrivate>(), 16, Role::Descriptors),
        ),
        i if i == BuiltIn::XaNode as usize => (
            "radix_tree_node",
            Spec {
                size: size_of::<Node>(),
                align: align_of::<Node>(),
                flags: CacheFlags::RCU_PREPAID | config.slab_debug,
                gfp: Flags::EMPTY,
                role: Role::Objects,
            },
        ),
        i if i == BuiltIn::VmArea as usize => (
            "vmap_area",
            plain(size_of::<VmArea>(), 8, Role::Descriptors),
        ),
        i if i == BuiltIn::PagePool as usize => (
            "page_pool",
            plain(
                size_of::<PoolCore>(),
                align_of::<PoolCore>(),
                Role::Descriptors,
            ),
        ),
        i if i == BuiltIn::Kfence as usize => {
            let mut spec = plain(PAGE_SIZE, 8, Role::Guarded);
            spec.flags = spec.flags | CacheFlags::NO_SHEAVES;
            ("kfence", spec)
        }
        i if i == BuiltIn::ZsDesc as usize => {
            ("zsdesc", plain(size_of::<ZsDesc>(), 8, Role::Descriptors))
        }
        _ => (
            "kmem_cache",
            plain(size_of::<CacheCore>(), 64, Role::Descriptors),
        ),
    };
    name.push(text);
    spec
}

/// A short text without an allocator.
#[derive(Default)]
struct Name {
    bytes: [u8; 24],
    len: usize,
}

impl Name {
    fn clear(&mut self) {
        self.len = 0;
    }

    fn push(&mut self, text: &str) {
        self.bytes[self.len..self.len + text.len()].copy_from_slice(text.as_bytes());
        self.len += text.len();
    }

    /// `8`, `1k`, as Linux names its classes.
    fn push_size(&mut self, size: usize) {
        let (number, suffix) = if size >= 1024 {
            (size / 1024, "k")
        } else {
            (size, "")
        };
        let mut digits = [0; 3];
        let mut n = number;
        let mut len = 0;
        while n > 0 {
            digits[len] = b'0' + (n % 10) as u8;
            n /= 10;
            len += 1;
        }
        for digit in digits[..len].iter().rev() {
            self.bytes[self.len] = *digit;
            self.len += 1;
        }
        self.push(suffix);
    }

    fn as_str(&self) -> &str {
        core::str::from_utf8(&self.bytes[..self.len]).unwrap_or("?")
    }
}
