//! Counters, one set per CPU, written by their CPU alone: what `/proc/vmstat` is made of.

use crate::memmap::PageType;
use crate::platform::{Pin, Platform};
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
    /// Requests that found a block in the per-CPU list.
    PcpHit = "pcp_hit",
    /// Requests that refilled a per-CPU list from the zone.
    PcpRefill = "pcp_refill",
    /// Drains of a per-CPU list into the zone.
    PcpDrain = "pcp_drain",
    /// Requests served by the zone directly.
    ZoneAlloc = "zone_alloc",
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
}

/// The counters of one CPU.
#[derive(Debug)]
#[repr(C, align(128))]
pub(crate) struct CpuStats {
    events: [AtomicU64; Event::ALL.len()],
    /// Pages handed out by type, less pages that came back; wraps, only the sum over CPUs means something.
    pages: [AtomicU64; PageType::COUNT],
    /// Nesting of free paths on this CPU, for rule 3.
    free_depth: AtomicU64,
}

impl CpuStats {
    pub(crate) fn new() -> CpuStats {
        CpuStats {
            events: [const { AtomicU64::new(0) }; Event::ALL.len()],
            pages: [const { AtomicU64::new(0) }; PageType::COUNT],
            free_depth: AtomicU64::new(0),
        }
    }

    /// Adds to a counter of the CPU the caller is pinned to: a load and a store, nobody else writes it.
    #[inline]
    pub(crate) fn add<P: Platform>(&self, _pin: &Pin<'_, P>, event: Event, n: u64) {
        add(&self.events[event as usize], n);
    }

    /// Pages of this type were handed out.
    #[inline]
    pub(crate) fn pages_in<P: Platform>(&self, _pin: &Pin<'_, P>, kind: PageType, pages: u64) {
        add(&self.pages[kind as usize], pages);
    }

    /// Pages of this type came back.
    #[inline]
    pub(crate) fn pages_out<P: Platform>(&self, _pin: &Pin<'_, P>, kind: PageType, pages: u64) {
        add(&self.pages[kind as usize], pages.wrapping_neg());
    }

    /// Enters a free path.
    #[inline]
    pub(crate) fn enter_free<P: Platform>(&self, _pin: &Pin<'_, P>) {
        add(&self.free_depth, 1);
    }

    /// Leaves it.
    #[inline]
    pub(crate) fn leave_free<P: Platform>(&self, _pin: &Pin<'_, P>) {
        add(&self.free_depth, u64::MAX);
    }

    /// Is this CPU on a free path? Then nothing may be allocated.
    #[inline]
    pub(crate) fn on_free_path(&self) -> bool {
        self.free_depth.load(Ordering::Relaxed) != 0
    }

    pub(crate) fn event(&self, event: Event) -> u64 {
        self.events[event as usize].load(Ordering::Relaxed)
    }

    pub(crate) fn pages(&self, kind: PageType) -> u64 {
        self.pages[kind as usize].load(Ordering::Relaxed)
    }
}

#[inline]
fn add(counter: &AtomicU64, n: u64) {
    counter.store(
        counter.load(Ordering::Relaxed).wrapping_add(n),
        Ordering::Relaxed,
    );
}
