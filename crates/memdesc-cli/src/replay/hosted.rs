//! The loop, and what its calls go to: a machine in this process, on which each call is made by the CPU that made it in Linux, and timed.

use std::time::{Duration, Instant};

use memdesc::gfp::Flags;
use memdesc::slab::KMALLOC_MAX_CACHE_SIZE;
use memdesc::{AllocError, Cache, Event as Counter};
use memdesc_host::{CpuGuard, Host};
use memdesc_replay::handles::{Handles, MAX_CACHES};
use memdesc_replay::{Backend, Engine};
use memdesc_trace::{CacheId, CacheTable, Event};

use super::deferred::{Backlog, Deferred};
use super::latency::{Clock, Latencies, Path};
use crate::handles::{Machine, OwnedBlock, OwnedObject, Purpose};

/// Events between two looks at the clock and the metadata.
const CHUNK: usize = 1 << 15;

/// Nanoseconds between two rounds of upkeep: Linux does it every second (`vm.stat_interval`).
const TICK: u64 = 1_000_000_000;

/// The machine.
pub(crate) struct Hosted<'m> {
    handles: Handles<'m, Host>,
    guards: &'m [CpuGuard<'m>],
    cpu: usize,
    caches: Vec<Option<Cache<'m>>>,
    /// Caches made.
    pub(crate) caches_made: u64,
    clock: Clock,
    pub(crate) latencies: Latencies,
    /// The most bytes of metadata seen, and after how many events.
    pub(crate) peak: (u64, usize),
    /// Which frees are deferred, if any.
    deferred: Option<Deferred<'m>>,
    /// When the CPUs do their upkeep next, on the recording's clock.
    next_tick: u64,
}

/// How long the loop took.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct LoopTime {
    pub(crate) wall: Duration,
    /// Nanoseconds a tick of the clock.
    pub(crate) ns_per_tick: f64,
}

impl<'m> Hosted<'m> {
    /// For so many caches in the recording.
    pub(crate) fn new(
        machine: &'m Machine,
        guards: &'m [CpuGuard<'m>],
        caches: usize,
        deferred: Option<Deferred<'m>>,
    ) -> Hosted<'m> {
        let clock = Clock::new();
        let floor = clock.floor();
        Hosted {
            handles: machine.handles(),
            guards,
            cpu: usize::MAX,
            caches: (0..caches).map(|_| None).collect(),
            caches_made: 0,
            clock,
            latencies: Latencies::new(floor),
            peak: (0, 0),
            deferred,
            next_tick: 0,
        }
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
                self.handles.mm().tick();
            }
            self.cpu = usize::MAX;
        }
        self.next_tick = now + TICK;
    }

    #[inline]
    fn counter(&self, counter: Counter) -> u64 {
        let cpu = self.cpu % self.guards.len();
        self.handles.mm().cpu_event(cpu, counter)
    }

    #[inline]
    fn timed_alloc(
        &mut self,
        large: bool,
        alloc: impl FnOnce(Handles<'m, Host>) -> Result<OwnedObject, AllocError>,
    ) -> Result<OwnedObject, AllocError> {
        let before = [Counter::SheafRefill, Counter::SlabNew].map(|c| self.counter(c));
        let start = self.clock.now();
        let result = alloc(self.handles);
        let ticks = self.clock.now().wrapping_sub(start);
        let [refill, new] = [Counter::SheafRefill, Counter::SlabNew].map(|c| self.counter(c));
        let path = if large {
            Path::LargeAlloc
        } else if new != before[1] {
            Path::SlabNew
        } else if refill != before[0] {
            Path::SheafRefill
        } else {
            Path::SheafHit
        };
        if result.is_ok() {
            self.latencies.record(path, ticks);
        }
        result
    }

    /// The cache comes with its first object.
    #[cold]
    fn create_cache(
        &mut self,
        number: usize,
        id: CacheId,
        table: &CacheTable,
    ) -> Result<(), AllocError> {
        let cache = table.get(id).ok_or(AllocError::BadSize)?;
        let made = self.handles.cache_create(cache)?;
        if self.caches.len() <= number {
            self.caches.resize_with(number + 1, || None);
        }
        self.caches[number] = Some(made);
        self.caches_made += 1;
        Ok(())
    }
}

impl Backend for Hosted<'_> {
    type Block = OwnedBlock;
    type Object = OwnedObject;

    #[inline]
    fn begin(&mut self, time_ns: u64, cpu: u16) {
        if time_ns >= self.next_tick {
            self.tick(time_ns);
        }
        if let Some(deferred) = &mut self.deferred
            && time_ns >= deferred.next
        {
            deferred.turn(time_ns);
        }
        let cpu = usize::from(cpu);
        if cpu != self.cpu {
            self.cpu = cpu;
            self.guards[cpu % self.guards.len()].switch();
        }
    }

    #[inline]
    fn alloc(&mut self, purpose: Purpose, gfp: Flags, order: u8) -> Result<OwnedBlock, AllocError> {
        let before =
            [Counter::PcpRefill, Counter::ZoneAlloc, Counter::SlowPath].map(|c| self.counter(c));
        let start = self.clock.now();
        let result = self.handles.alloc(purpose, gfp, order.into());
        let ticks = self.clock.now().wrapping_sub(start);
        if result.is_ok() {
            let [refill, zone, slow] = [Counter::PcpRefill, Counter::ZoneAlloc, Counter::SlowPath]
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
        }
        result
    }

    #[inline]
    fn free(&mut self, block: OwnedBlock, order: u8) {
        let before = self.counter(Counter::PcpDrain);
        let start = self.clock.now();
        self.handles.free(block);
        let ticks = self.clock.now().wrapping_sub(start);
        let path = if self.counter(Counter::PcpDrain) != before {
            Path::PcpDrain
        } else if order <= 3 || usize::from(order) == memdesc::PAGEBLOCK_ORDER {
            Path::PcpFree
        } else {
            Path::ZoneFree
        };
        self.latencies.record(path, ticks);
    }

    #[inline]
    fn kmalloc(&mut self, size: usize, gfp: Flags) -> Result<OwnedObject, AllocError> {
        self.timed_alloc(size > KMALLOC_MAX_CACHE_SIZE, |handles| {
            handles.kmalloc(size, gfp)
        })
    }

    #[inline]
    fn cache_alloc(
        &mut self,
        id: CacheId,
        table: &CacheTable,
        gfp: Flags,
    ) -> Result<OwnedObject, AllocError> {
        let number = id
            .index()
            .filter(|&n| n < MAX_CACHES)
            .ok_or(AllocError::BadSize)?;
        if self.caches.get(number).is_none_or(Option::is_none) {
            self.create_cache(number, id, table)?;
        }
        // Out of its place for the call, so that the engine is free for the clock.
        let Some(cache) = self.caches[number].take() else {
            return Err(AllocError::BadSize);
        };
        let result = self.timed_alloc(false, |handles| handles.cache_alloc(&cache, number, gfp));
        self.caches[number] = Some(cache);
        result
    }

    #[inline]
    fn free_object(&mut self, object: OwnedObject) {
        if let Some(deferred) = &mut self.deferred
            && deferred.takes()
        {
            let cache = object.cache().and_then(|n| self.caches.get(n)?.as_ref());
            deferred.free(object, cache);
            return;
        }
        let cache = object.cache().and_then(|n| self.caches.get(n)?.as_ref());
        let before = [Counter::SheafFlush, Counter::PgFree].map(|c| self.counter(c));
        let start = self.clock.now();
        self.handles.free_object(object, cache);
        let ticks = self.clock.now().wrapping_sub(start);
        let [flush, pages] = [Counter::SheafFlush, Counter::PgFree].map(|c| self.counter(c));
        let path = if flush != before[0] {
            Path::SheafFlush
        } else if pages != before[1] {
            Path::LargeFree
        } else {
            Path::SheafFree
        };
        self.latencies.record(path, ticks);
    }
}

/// Replays all events. `progress` hears after how many it is.
pub(crate) fn run(
    engine: &mut Engine<Hosted<'_>>,
    events: &[Event],
    table: &CacheTable,
    mut progress: impl FnMut(usize),
) -> LoopTime {
    let mut wall = Duration::ZERO;
    let mut ticks = 0;
    for (n, chunk) in events.chunks(CHUNK).enumerate() {
        let (start, start_ticks) = (Instant::now(), engine.backend.clock.now());
        for (i, event) in chunk.iter().enumerate() {
            engine.event(n * CHUNK + i, event, table);
        }
        ticks += engine.backend.clock.now().saturating_sub(start_ticks);
        wall += start.elapsed();
        let done = n * CHUNK + chunk.len();
        let metadata = engine.backend.handles.descriptor_bytes();
        if metadata > engine.backend.peak.0 {
            engine.backend.peak = (metadata, done);
        }
        progress(done);
    }
    LoopTime {
        wall,
        ns_per_tick: wall.as_nanos() as f64 / (ticks as f64).max(1.0),
    }
}

/// Frees everything that is live and destroys the caches. Says how many blocks and objects that were, and which caches would not go.
pub(crate) fn tear_down(engine: &mut Engine<Hosted<'_>>) -> (u64, u64, Vec<String>) {
    let (blocks, objects) = engine.take_all(
        |hosted, object| {
            let cache = object.cache().and_then(|n| hosted.caches.get(n)?.as_ref());
            hosted.handles.free_object(object, cache);
        },
        |hosted, block| hosted.handles.free(block),
    );
    let Hosted {
        handles, caches, ..
    } = &mut engine.backend;
    let mut stuck = Vec::new();
    for cache in caches.iter_mut().filter_map(Option::take) {
        if let Err(left) = handles.destroy(cache) {
            stuck.push(format!("{}: {} objects left", left.cache.name(), left.live));
        }
    }
    (blocks, objects, stuck)
}
