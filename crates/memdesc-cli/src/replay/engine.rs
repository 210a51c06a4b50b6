//! The loop: each event as the matching call, on the CPU that did it.

mod slab;

use std::time::{Duration, Instant};

use memdesc::gfp::Flags;
use memdesc::{AllocError, Cache, Event as Counter};
use memdesc_host::CpuGuard;
use memdesc_trace::{CacheTable, Event, EventKind};

use super::ahead::Corrections;
use super::classify;
use super::counts::{PageCounts, SlabCounts, Traffic, reason};
use super::deferred::{Backlog, Deferred};
use super::latency::{Clock, Latencies, Path};
use super::objects::Objects;
use super::pages::{Freed, Holder, Pages};
use super::slabs::SlabPages;
use crate::handles::{Machine, OwnedBlock, OwnedObject};

/// Events between two looks at the clock and the metadata.
const CHUNK: usize = 1 << 15;
/// Cache numbers are kept in 16 bits.
const MAX_CACHES: usize = u16::MAX as usize - 1;

/// What the loop works on.
pub(crate) struct Engine<'m> {
    machine: &'m Machine,
    guards: &'m [CpuGuard<'m>],
    cpu: usize,
    pub(crate) pages: Pages,
    pub(crate) objects: Objects,
    slabs: Option<SlabPages>,
    caches: Vec<Option<Cache<'m>>>,
    clock: Clock,
    pub(crate) latencies: Latencies,
    pub(crate) traffic: Traffic,
    pub(crate) page_counts: PageCounts,
    pub(crate) slab_counts: SlabCounts,
    /// The most bytes of metadata seen, and after how many events.
    pub(crate) peak: (u64, usize),
    dead: Vec<OwnedObject>,
    /// Which frees are deferred, if any.
    pub(crate) deferred: Option<Deferred<'m>>,
    /// When the CPUs do their upkeep next, on the recording's clock.
    next_tick: u64,
    /// What the last snapshot knows better than flags.
    pub(crate) corrections: Corrections,
}

/// Nanoseconds between two rounds of upkeep: Linux does it every second (`vm.stat_interval`).
const TICK: u64 = 1_000_000_000;

/// How long the loop took.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct LoopTime {
    pub(crate) wall: Duration,
    /// Nanoseconds a tick of the clock.
    pub(crate) ns_per_tick: f64,
}

impl<'m> Engine<'m> {
    /// `slabs` is `None` if objects are not replayed.
    pub(crate) fn new(
        machine: &'m Machine,
        guards: &'m [CpuGuard<'m>],
        pages: Pages,
        objects: Objects,
        slabs: Option<SlabPages>,
        caches: usize,
        deferred: Option<Deferred<'m>>,
    ) -> Engine<'m> {
        let clock = Clock::new();
        let floor = clock.floor();
        Engine {
            machine,
            guards,
            cpu: usize::MAX,
            pages,
            objects,
            slabs,
            caches: (0..caches).map(|_| None).collect(),
            clock,
            latencies: Latencies::new(floor),
            traffic: Traffic::default(),
            page_counts: PageCounts::default(),
            slab_counts: SlabCounts::default(),
            peak: (0, 0),
            dead: Vec::new(),
            deferred,
            next_tick: 0,
            corrections: Corrections::default(),
        }
    }

    /// Replays all events. `progress` hears after how many it is.
    pub(crate) fn run(
        &mut self,
        events: &[Event],
        table: &CacheTable,
        mut progress: impl FnMut(usize),
    ) -> LoopTime {
        let mut wall = Duration::ZERO;
        let mut ticks = 0;
        for (n, chunk) in events.chunks(CHUNK).enumerate() {
            let (start, start_ticks) = (Instant::now(), self.clock.now());
            for (i, event) in chunk.iter().enumerate() {
                self.event(n * CHUNK + i, event, table);
            }
            ticks += self.clock.now().saturating_sub(start_ticks);
            wall += start.elapsed();
            let done = n * CHUNK + chunk.len();
            let metadata = self.metadata_bytes();
            if metadata > self.peak.0 {
                self.peak = (metadata, done);
            }
            progress(done);
        }
        LoopTime {
            wall,
            ns_per_tick: wall.as_nanos() as f64 / (ticks as f64).max(1.0),
        }
    }

    /// Bytes of slabs of descriptors, now.
    fn metadata_bytes(&self) -> u64 {
        let mut pages = 0;
        self.machine.mm.slabinfo(|cache| {
            if cache.metadata {
                pages += cache.num_slabs * cache.pages_per_slab as u64;
            }
        });
        pages * memdesc::PAGE_SIZE as u64
    }

    #[inline]
    fn event(&mut self, index: usize, event: &Event, table: &CacheTable) {
        if event.time_ns >= self.next_tick {
            self.tick(event.time_ns);
        }
        if let Some(deferred) = &mut self.deferred
            && event.time_ns >= deferred.next
        {
            deferred.turn(event.time_ns);
        }
        let cpu = usize::from(event.cpu);
        if cpu != self.cpu {
            self.cpu = cpu;
            self.guards[cpu % self.guards.len()].switch();
        }
        match event.kind() {
            EventKind::PageAlloc {
                pfn, order, gfp, ..
            } => {
                self.traffic.page_alloc += 1;
                self.page_alloc(index, pfn, order, gfp);
            }
            EventKind::PageAllocFailed { .. } => self.traffic.page_alloc_failed += 1,
            EventKind::PageFree { pfn, order } => {
                self.traffic.page_free += 1;
                self.page_free(pfn, order);
            }
            EventKind::PageFreeBatched { .. } => self.traffic.page_free_batched += 1,
            EventKind::Kmalloc {
                ptr,
                bytes_req,
                gfp,
                ..
            } => {
                self.traffic.kmalloc += 1;
                self.object_alloc(ptr, bytes_req.into(), |engine| {
                    engine.kmalloc(bytes_req as usize, gfp)
                });
            }
            EventKind::Kfree { ptr } => {
                self.traffic.kfree += 1;
                self.object_free(ptr);
            }
            EventKind::CacheAlloc { cache, ptr, gfp } => {
                self.traffic.cache_alloc += 1;
                let size = table.get(cache).map_or(0, |c| c.bytes_req.into());
                self.object_alloc(ptr, size, |engine| engine.cache_alloc(cache, table, gfp));
            }
            EventKind::CacheFree { ptr, .. } => {
                self.traffic.cache_free += 1;
                self.object_free(ptr);
            }
        }
    }

    /// What was measured: latencies, calls, and the most metadata.
    pub(crate) fn into_results(self) -> (Latencies, Traffic, (u64, usize)) {
        (self.latencies, self.traffic, self.peak)
    }

    /// The recording is over: no more readers, and all that waits is freed.
    pub(crate) fn end_deferred(&mut self) -> Option<Backlog> {
        self.deferred.take().map(Deferred::end)
    }

    /// A second has passed: every CPU does its upkeep.
    #[cold]
    fn tick(&mut self, now: u64) {
        if self.next_tick > 0 {
            for guard in self.guards {
                guard.switch();
                self.machine.mm.tick();
            }
            self.cpu = usize::MAX;
        }
        self.next_tick = now + TICK;
    }

    #[inline]
    fn counter(&self, counter: Counter) -> u64 {
        self.machine
            .mm
            .cpu_event(self.cpu % self.guards.len(), counter)
    }

    #[inline]
    fn page_alloc(&mut self, index: usize, pfn: u32, order: u8, gfp: Flags) {
        if self.pages.is_taken(pfn, order) {
            self.reused(pfn, order);
        }
        if self
            .slabs
            .as_ref()
            .is_some_and(|slabs| slabs.contains(index))
        {
            self.pages.mark(pfn, order, Holder::Slab);
            self.page_counts.slab_allocated += 1;
            return;
        }
        let purpose = self
            .corrections
            .of(index)
            .unwrap_or_else(|| classify::purpose(gfp, order));
        let before =
            [Counter::PcpRefill, Counter::ZoneAlloc, Counter::SlowPath].map(|c| self.counter(c));
        let start = self.clock.now();
        let result = self.machine.alloc(purpose, gfp, order.into());
        let ticks = self.clock.now().wrapping_sub(start);
        match result {
            Ok(block) => {
                let [refill, zone, slow] =
                    [Counter::PcpRefill, Counter::ZoneAlloc, Counter::SlowPath]
                        .map(|c| self.counter(c));
                let path = if slow != before[2] {
                    Path::Slow
                } else if zone != before[1] {
                    Path::Zone
                } else if refill != before[0] {
                    Path::PcpRefill
                } else {
                    Path::PcpHit
                };
                self.latencies.record(path, ticks);
                self.pages.put(pfn, order, Holder::of(purpose), block);
                let counts = &mut self.page_counts;
                counts.allocated += 1;
                counts.allocated_pages += 1 << order;
                counts.by_purpose[purpose as usize] += 1;
                counts.by_order[usize::from(order).min(memdesc::MAX_ORDER)] += 1;
            }
            Err(why) => {
                self.pages.mark(pfn, order, Holder::Failed);
                self.page_failed(why, order);
            }
        }
    }

    #[cold]
    fn page_failed(&mut self, why: AllocError, order: u8) {
        self.page_counts.failed += 1;
        *self
            .page_counts
            .failures
            .entry((reason(why), order.into()))
            .or_default() += 1;
    }

    /// Pages are handed out that were never seen to come back: whole blocks did, then.
    #[cold]
    #[inline(never)]
    fn reused(&mut self, pfn: u32, order: u8) {
        let end = pfn + (1 << order);
        for page in pfn..end {
            let Some((head, size)) = self.pages.block_of(page) else {
                continue;
            };
            match self.pages.holder(page) {
                Holder::Slab => {
                    self.free_objects_of(head, size);
                    self.page_counts.slab_freed += 1;
                }
                // It was free after all.
                Holder::Unseen => {
                    let _ = self.pages.take(page, 0);
                    continue;
                }
                _ => self.page_counts.free_implied += 1,
            }
            // Only what is still of this block: parts may have been freed, and handed out to others.
            for other in head..head + (1 << size) {
                if self.pages.block_of(other) == Some((head, size)) {
                    let freed = self.pages.take(other, 0);
                    self.give_back(freed);
                }
            }
        }
    }

    #[inline]
    fn page_free(&mut self, pfn: u32, order: u8) {
        match self.pages.holder(pfn) {
            Holder::Slab => {
                self.page_counts.slab_freed += 1;
                self.free_objects_of(pfn, order);
            }
            Holder::OldSlab if self.slabs.is_some() => self.free_objects_of(pfn, order),
            _ => {}
        }
        let freed = self.pages.take(pfn, order);
        let counts = &mut self.page_counts;
        counts.free_unseen += u64::from(freed.unknown > 0);
        counts.free_in_part += u64::from(freed.in_part > 0);
        counts.free_reserved += u64::from(freed.reserved > 0);
        counts.free_joined += u64::from(!freed.more.is_empty());
        self.give_back(freed);
    }

    #[inline]
    fn give_back(&mut self, freed: Freed) {
        if let Some((block, _, order)) = freed.first {
            self.free_block(block, order);
        }
        for (block, _, order) in freed.more {
            self.free_block(block, order);
        }
    }

    #[inline]
    fn free_block(&mut self, block: OwnedBlock, order: u8) {
        let before = self.counter(Counter::PcpDrain);
        let start = self.clock.now();
        self.machine.free(block);
        let ticks = self.clock.now().wrapping_sub(start);
        let path = if self.counter(Counter::PcpDrain) != before {
            Path::PcpDrain
        } else if order <= 3 || usize::from(order) == memdesc::PAGEBLOCK_ORDER {
            Path::PcpFree
        } else {
            Path::ZoneFree
        };
        self.latencies.record(path, ticks);
        self.page_counts.freed += 1;
        self.page_counts.freed_pages += 1 << order;
    }

    /// Linux's slab gave these pages back, so its objects are gone, seen or not.
    fn free_objects_of(&mut self, pfn: u32, order: u8) {
        let mut dead = std::mem::take(&mut self.dead);
        for page in pfn..pfn + (1 << order) {
            self.objects.take_page(page, &mut dead);
        }
        for object in dead.drain(..) {
            self.slab_counts.free_with_slab += 1;
            self.free_object(object);
        }
        self.dead = dead;
    }

    /// Frees everything that is live and destroys the caches. Says how many blocks and objects that were, and which caches
    /// would not go.
    pub(crate) fn tear_down(&mut self) -> (u64, u64, Vec<String>) {
        let mut objects = 0;
        for object in self.objects.drain() {
            let cache = object.cache().and_then(|n| self.caches.get(n)?.as_ref());
            self.machine.free_object(object, cache);
            objects += 1;
        }
        let machine = self.machine;
        let blocks = self.pages.take_all(|block| machine.free(block));
        let mut stuck = Vec::new();
        for cache in self.caches.iter_mut().filter_map(Option::take) {
            if let Err(left) = machine.destroy(cache) {
                stuck.push(format!("{}: {} objects left", left.cache.name(), left.live));
            }
        }
        (blocks, objects, stuck)
    }
}
