//! Counters, one set per CPU, written by their CPU alone: what `/proc/vmstat` is made of. And what else a CPU keeps: whether it
//! is on a free path, and what it has to free later.

use crate::address::MAX_ORDER;
use crate::error::AllocError;
use crate::memmap::PageType;
use crate::platform::{Pin, Platform};
use crate::slab::DeferredObjects;
use crate::sync::atomic::{AtomicU64, Ordering};

macro_rules! events {
    ($($(#[$doc:meta])* $name:ident = $text:literal,)*) => {
        /// What is counted.
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        #[repr(usize)]
        pub enum Event { $($(#[$doc])* $name,)* }

        impl Event {
            /// All of them.
            pub const ALL: &[Event] = &[$(Event::$name),*];

            /// The name in the vmstat view.
            pub const fn name(self) -> &'static str {
                match self { $(Event::$name => $text),* }
            }
        }
    };
}

events! {
    /// Pages handed out.
    PgAlloc = "pgalloc",
    /// Pages that came back.
    PgFree = "pgfree",
    /// Requests for pages that failed.
    PgAllocFail = "pgalloc_fail",
    /// Requests that found a block in the per-CPU list: all that went no other way.
    PcpHit = "pcp_hit",
    /// Requests that refilled a per-CPU list from the zone.
    PcpRefill = "pcp_refill",
    /// Drains of a per-CPU list into the zone.
    PcpDrain = "pcp_drain",
    /// Requests served by the zone directly.
    ZoneAlloc = "zone_alloc",
    /// Blocks taken by number (`alloc_pages_at`).
    AllocAt = "alloc_at",
    /// Pages taken for slabs of descriptors, without a request.
    MetaPage = "meta_page",
    /// Requests that went the slow way.
    SlowPath = "allocstall",
    /// Times all per-CPU lists were drained because memory was short.
    DrainAll = "drain_all",
    /// Objects handed out.
    SlabAlloc = "slab_alloc",
    /// Objects that came back.
    SlabFree = "slab_free",
    /// Requests for objects that failed.
    SlabAllocFail = "slab_alloc_fail",
    /// Sheaves refilled from slabs.
    SheafRefill = "sheaf_refill",
    /// Sheaves flushed to slabs.
    SheafFlush = "sheaf_flush",
    /// Slabs made.
    SlabNew = "slab_new",
    /// Slabs given back.
    SlabDiscard = "slab_discard",
    /// Times `__alloc_slab` stopped the recursion.
    AllocSlabStop = "__alloc_slab",
    /// Allocations that were asked for on a free path: always 0.
    AllocOnFree = "alloc_on_free",
    /// Descriptors reused by the next owner as they were.
    DescReused = "desc_reused",
    /// Fast tries for pages that got them.
    FastPages = "fast_pages",
    /// Fast tries for pages: nothing there.
    FastPagesEmpty = "fast_pages_empty",
    /// Fast tries for pages: somebody was inside.
    FastPagesContended = "fast_pages_contended",
    /// Fast tries for pages where or what may not be tried.
    FastPagesForbidden = "fast_pages_forbidden",
    /// Fast tries for objects that got one.
    FastObjects = "fast_objects",
    /// Fast tries for objects: nothing there.
    FastObjectsEmpty = "fast_objects_empty",
    /// Fast tries for objects: somebody was inside.
    FastObjectsContended = "fast_objects_contended",
    /// Fast tries for objects where or what may not be tried.
    FastObjectsForbidden = "fast_objects_forbidden",
    /// Requests for pages by the nolock calls that got them, also on behalf of objects.
    TryPages = "try_pages",
    /// Requests for pages that tried in vain: nothing there.
    TryPagesEmpty = "try_pages_empty",
    /// Requests for pages that tried in vain: somebody was inside.
    TryPagesContended = "try_pages_contended",
    /// Requests for pages that tried where or what may not be tried.
    TryPagesForbidden = "try_pages_forbidden",
    /// Requests for objects that tried and got one.
    TryObjects = "try_objects",
    /// Requests for objects that tried in vain: nothing there.
    TryObjectsEmpty = "try_objects_empty",
    /// Requests for objects that tried in vain: somebody was inside.
    TryObjectsContended = "try_objects_contended",
    /// Requests for objects that tried where or what may not be tried.
    TryObjectsForbidden = "try_objects_forbidden",
    /// Blocks freed by `free_pages_nolock` into the per-CPU list.
    NolockFree = "nolock_free",
    /// Blocks freed by `free_pages_nolock` that the next normal free takes further.
    NolockFreeDeferred = "nolock_free_deferred",
    /// Objects given to `kvfree_rcu` that wait by their heads.
    KvfreeHead = "kvfree_head",
    /// Head-less frees that waited for a grace period there and then.
    KvfreeWaited = "kvfree_waited",
    /// Times a flood of deferred frees was made to wait.
    KvfreeThrottled = "kvfree_throttled",
    /// Objects of prepaid caches freed after a grace period.
    PrepaidFreed = "prepaid_freed",
    /// Folios that reclaim looked at.
    PgScan = "pgscan",
    /// Pages that reclaim freed.
    PgSteal = "pgsteal",
    /// Pages that were moved.
    PgMigrateSuccess = "pgmigrate_success",
    /// Blocks that compaction made.
    CompactSuccess = "compact_success",
    /// Pages that were wanted zeroed, and were zero.
    PgZeroSaved = "pgzero_saved",
    /// Pages that were written while they were free.
    PgPoisonBad = "pgpoison_bad",
    /// Free pages that were reported.
    PgReported = "pgreported",
    /// Reports of free pages.
    ReportBatch = "report_batch",
    /// Pages that failed and about which nothing was done.
    MfIgnored = "memory_failure_ignored",
    /// Pages that failed and that others still have.
    MfFailed = "memory_failure_failed",
    /// Pages that failed and go out of use when they come back.
    MfDelayed = "memory_failure_delayed",
    /// Pages that failed and are out of use.
    MfRecovered = "memory_failure_recovered",
    /// Pages that went into a balloon.
    BalloonInflate = "balloon_inflate",
    /// Pages that came out of a balloon.
    BalloonDeflate = "balloon_deflate",
    /// Objects freed by `kfree_nolock` into the sheaf.
    NolockKfree = "nolock_kfree",
    /// Objects freed by `kfree_nolock` that the next normal free takes further.
    NolockKfreeDeferred = "nolock_kfree_deferred",
}

impl Event {
    /// Of a request that only tries: what became of it. `first` is the event of success; its reasons to fail follow it.
    pub(crate) fn tried<T>(first: Event, result: &Result<T, AllocError>) -> Event {
        let reason = match result {
            Ok(_) => 0,
            Err(AllocError::Contended) => 2,
            Err(AllocError::Forbidden | AllocError::BadOrder | AllocError::NoZone) => 3,
            Err(_) => 1,
        };
        Event::ALL[first as usize + reason]
    }
}

/// The counters of one CPU.
#[derive(Debug)]
#[repr(C, align(128))]
pub(crate) struct CpuStats {
    events: [AtomicU64; Event::ALL.len()],
    /// Blocks handed out, by type and order.
    out: [[AtomicU64; MAX_ORDER + 1]; PageType::COUNT],
    /// Blocks that came back, by type and order. On another CPU than they went out, so only sums over CPUs mean something.
    back: [[AtomicU64; MAX_ORDER + 1]; PageType::COUNT],
    /// Nesting of free paths on this CPU, for rule 3.
    free_depth: AtomicU64,
    /// What is counted from any context: an interrupt between the load and the store of the counters above would be lost, so
    /// these are added to by atomic instructions.
    any: AnyContext,
    /// What this CPU has to free.
    deferred: DeferredObjects,
}

/// Counters that any context adds to.
#[derive(Debug)]
struct AnyContext {
    events: [AtomicU64; Event::ALL.len()],
    /// Pages handed out, by type.
    out: [AtomicU64; PageType::COUNT],
    /// Pages that came back, by type.
    back: [AtomicU64; PageType::COUNT],
}

impl CpuStats {
    pub(crate) fn new() -> CpuStats {
        CpuStats {
            events: [const { AtomicU64::new(0) }; Event::ALL.len()],
            out: [const { [const { AtomicU64::new(0) }; MAX_ORDER + 1] }; PageType::COUNT],
            back: [const { [const { AtomicU64::new(0) }; MAX_ORDER + 1] }; PageType::COUNT],
            free_depth: AtomicU64::new(0),
            any: AnyContext {
                events: [const { AtomicU64::new(0) }; Event::ALL.len()],
                out: [const { AtomicU64::new(0) }; PageType::COUNT],
                back: [const { AtomicU64::new(0) }; PageType::COUNT],
            },
            deferred: DeferredObjects::new(),
        }
    }

    /// Objects that wait for the next normal free.
    #[inline]
    pub(crate) fn deferred(&self) -> &DeferredObjects {
        &self.deferred
    }

    /// Adds to a counter from any context.
    #[inline]
    pub(crate) fn add_any(&self, event: Event, n: u64) {
        self.any.events[event as usize].fetch_add(n, Ordering::Relaxed);
    }

    /// A block was handed out in any context.
    #[inline]
    pub(crate) fn block_out_any(&self, kind: PageType, order: usize) {
        self.any.out[kind as usize].fetch_add(1 << order, Ordering::Relaxed);
    }

    /// A block came back in any context.
    #[inline]
    pub(crate) fn block_back_any(&self, kind: PageType, order: usize) {
        self.any.back[kind as usize].fetch_add(1 << order, Ordering::Relaxed);
    }

    /// Adds to a counter of the CPU the caller is pinned to: a load and a store, nobody else writes it.
    #[inline]
    pub(crate) fn add<P: Platform>(&self, _pin: &Pin<'_, P>, event: Event, n: u64) {
        add(&self.events[event as usize], n);
    }

    /// A block was handed out: one addition, from which pages, requests and their orders follow.
    #[inline]
    pub(crate) fn block_out<P: Platform>(&self, _pin: &Pin<'_, P>, kind: PageType, order: usize) {
        add(&self.out[kind as usize][order], 1);
    }

    /// A block came back.
    #[inline]
    pub(crate) fn block_back<P: Platform>(&self, _pin: &Pin<'_, P>, kind: PageType, order: usize) {
        add(&self.back[kind as usize][order], 1);
    }

    /// A block that was counted as handed out as one type is of another.
    pub(crate) fn block_retyped<P: Platform>(
        &self,
        _pin: &Pin<'_, P>,
        from: PageType,
        to: PageType,
        order: usize,
    ) {
        add(&self.out[from as usize][order], u64::MAX);
        add(&self.out[to as usize][order], 1);
    }

    /// Is this CPU on a free path? Then nothing may be allocated.
    #[inline]
    pub(crate) fn on_free_path(&self) -> bool {
        self.free_depth.load(Ordering::Relaxed) != 0
    }

    pub(crate) fn event(&self, event: Event) -> u64 {
        match event {
            Event::PgAlloc => pages(&self.out).wrapping_add(self.any.out.iter().map(load).sum()),
            Event::PgFree => pages(&self.back).wrapping_add(self.any.back.iter().map(load).sum()),
            Event::PcpHit => {
                let requests = self
                    .out
                    .iter()
                    .flatten()
                    .map(load)
                    .fold(0, u64::wrapping_add);
                let others = [
                    Event::PcpRefill,
                    Event::ZoneAlloc,
                    Event::AllocAt,
                    Event::MetaPage,
                ];
                requests.saturating_sub(others.iter().map(|&e| self.event(e)).sum())
            }
            event => load(&self.events[event as usize])
                .wrapping_add(load(&self.any.events[event as usize])),
        }
    }

    /// Pages of this type handed out on this CPU less those that came back on it; wraps.
    pub(crate) fn pages(&self, kind: PageType) -> u64 {
        let sum = |row: &[AtomicU64]| {
            row.iter()
                .enumerate()
                .fold(0u64, |sum, (order, n)| sum.wrapping_add(load(n) << order))
        };
        sum(&self.out[kind as usize])
            .wrapping_add(load(&self.any.out[kind as usize]))
            .wrapping_sub(sum(&self.back[kind as usize]))
            .wrapping_sub(load(&self.any.back[kind as usize]))
    }
}

/// The caller is pinned, and on a free path, as long as this lives: whoever allocates on this CPU meanwhile breaks rule 3. Also
/// if a report of corruption unwinds.
#[must_use]
pub(crate) struct FreePath<'a, P: Platform> {
    stats: &'a CpuStats,
    before: u64,
    pin: Pin<'a, P>,
}

impl<'a, P: Platform> FreePath<'a, P> {
    /// `stats` are those of the CPU that is pinned.
    #[inline]
    pub(crate) fn new(stats: &'a CpuStats, pin: Pin<'a, P>) -> FreePath<'a, P> {
        let before = stats.free_depth.load(Ordering::Relaxed);
        stats.free_depth.store(before + 1, Ordering::Relaxed);
        FreePath { stats, before, pin }
    }

    #[inline]
    pub(crate) fn pin(&self) -> &Pin<'a, P> {
        &self.pin
    }
}

impl<P: Platform> Drop for FreePath<'_, P> {
    #[inline]
    fn drop(&mut self) {
        self.stats.free_depth.store(self.before, Ordering::Relaxed);
    }
}

fn load(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

fn pages(table: &[[AtomicU64; MAX_ORDER + 1]; PageType::COUNT]) -> u64 {
    let row = |row: &[AtomicU64; MAX_ORDER + 1]| {
        row.iter()
            .enumerate()
            .fold(0u64, |sum, (order, n)| sum.wrapping_add(load(n) << order))
    };
    table.iter().map(row).fold(0, u64::wrapping_add)
}

#[inline]
fn add(counter: &AtomicU64, n: u64) {
    counter.store(
        counter.load(Ordering::Relaxed).wrapping_add(n),
        Ordering::Relaxed,
    );
}
