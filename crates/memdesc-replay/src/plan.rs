//! Calls written down: what a recording means, before anybody does it, with the CPU that does each.
//!
//! What an event means does not depend on what a memory manager answers, as long as it does not fail: so one CPU can go through the events beforehand,
//! and all of them can do the calls at once. Each allocation has a [`Slot`], and what it gets is kept there until the call that frees it takes it out.
//! Calls are in the order of the recording, in which what is freed was allocated before: see [`Run`](crate::Run).

use alloc::vec;
use alloc::vec::Vec;

use memdesc::AllocError;
use memdesc::gfp::Flags;
use memdesc_trace::{CacheId, CacheTable, Event, EventKind};

use crate::counts::{PageCounts, SlabCounts, Traffic};
use crate::engine::{Backend, Engine};
use crate::handles::{MAX_CACHES, Purpose, Token};
use crate::objects::Objects;
use crate::pages::Pages;
use crate::slabs::{self, Told};

/// How a plan is made.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// CPUs that the calls are for.
    pub cpus: usize,
    /// Of 100 frees of objects so many are deferred.
    pub deferred_percent: u32,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            cpus: 1,
            deferred_percent: 0,
        }
    }
}

/// What is called.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Call {
    Alloc(Purpose),
    Free,
    Kmalloc,
    CacheAlloc,
    FreeObject,
    /// After a grace period.
    FreeObjectLater,
}

/// One call.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Op {
    pub(crate) slot: u32,
    pub(crate) gfp: Flags,
    /// Bytes of kmalloc's, or the number of the cache among [`Plan::caches`].
    pub(crate) size: u32,
    pub(crate) cpu: u8,
    pub(crate) order: u8,
    pub(crate) call: Call,
}

/// Where what an allocation gets is kept.
#[derive(Debug)]
pub struct Slot(u32);

impl Token for Slot {
    #[inline]
    fn into_raw(self) -> u32 {
        self.0
    }

    #[inline]
    unsafe fn from_raw(raw: u32) -> Slot {
        Slot(raw)
    }
}

/// So many events of one of Linux's CPUs are done by one of ours before another does those that follow, if ours are more.
const STRETCH: u32 = 256;

/// Which of our CPUs does the events of which of Linux's: if ours are fewer, the one with the number modulo ours; if they are more, Linux's CPU moves on to
/// another of ours every [`STRETCH`] events, as a thread does, so that all of ours have work.
#[derive(Debug)]
struct Lanes {
    ours: u32,
    theirs: u32,
    /// Events of each of Linux's CPUs so far.
    seen: Vec<u32>,
}

impl Lanes {
    fn new(ours: usize, events: &[Event]) -> Lanes {
        let theirs = events.iter().map(|e| usize::from(e.cpu) + 1).max();
        let theirs = theirs.unwrap_or(1);
        Lanes {
            ours: ours.clamp(1, MAX_CPUS) as u32,
            theirs: theirs as u32,
            seen: vec![0; theirs],
        }
    }

    #[inline]
    fn next(&mut self, cpu: u16) -> u8 {
        let seen = &mut self.seen[usize::from(cpu)];
        let stretch = if self.ours > self.theirs {
            *seen / STRETCH
        } else {
            0
        };
        *seen += 1;
        ((u32::from(cpu) + self.theirs.wrapping_mul(stretch)) % self.ours) as u8
    }
}

/// CPUs at most.
pub(crate) const MAX_CPUS: usize = 256;

/// Writes calls down.
#[derive(Debug)]
pub struct Planner {
    ops: Vec<Op>,
    slots: u32,
    lanes: Lanes,
    cpu: u8,
    /// By the recording's number, one more than the number of ours.
    cache_numbers: Vec<u32>,
    caches: Vec<CacheId>,
    /// Of 100 frees so many are deferred, and how far it is to the next.
    deferred_percent: u32,
    wheel: u32,
    /// Pages that are out, and the most that were.
    live: u64,
    peak: u64,
}

impl Planner {
    #[inline]
    fn push(&mut self, call: Call, slot: u32, gfp: Flags, order: u8, size: u32) {
        self.ops.push(Op {
            slot,
            gfp,
            size,
            cpu: self.cpu,
            order,
            call,
        });
    }

    #[inline]
    fn slot(&mut self) -> u32 {
        self.slots += 1;
        self.slots - 1
    }
}

impl Backend for Planner {
    type Block = Slot;
    type Object = Slot;

    #[inline]
    fn begin(&mut self, _time_ns: u64, cpu: u16) {
        self.cpu = self.lanes.next(cpu);
    }

    fn alloc(&mut self, purpose: Purpose, gfp: Flags, order: u8) -> Result<Slot, AllocError> {
        let slot = self.slot();
        self.push(Call::Alloc(purpose), slot, gfp, order, 0);
        self.live += 1 << order;
        self.peak = self.peak.max(self.live);
        Ok(Slot(slot))
    }

    fn free(&mut self, block: Slot, order: u8) {
        self.push(Call::Free, block.0, Flags::EMPTY, order, 0);
        self.live -= 1 << order;
    }

    fn kmalloc(&mut self, size: usize, gfp: Flags) -> Result<Slot, AllocError> {
        let size = u32::try_from(size).map_err(|_| AllocError::BadSize)?;
        let slot = self.slot();
        self.push(Call::Kmalloc, slot, gfp, 0, size);
        Ok(Slot(slot))
    }

    fn cache_alloc(
        &mut self,
        id: CacheId,
        table: &CacheTable,
        gfp: Flags,
    ) -> Result<Slot, AllocError> {
        let known = id.index().filter(|&n| n < self.cache_numbers.len());
        let number = known.ok_or(AllocError::BadSize)?;
        table.get(id).ok_or(AllocError::BadSize)?;
        if self.cache_numbers[number] == 0 {
            if self.caches.len() == MAX_CACHES {
                return Err(AllocError::BadSize);
            }
            self.caches.push(id);
            self.cache_numbers[number] = self.caches.len() as u32;
        }
        let slot = self.slot();
        let ours = self.cache_numbers[number] - 1;
        self.push(Call::CacheAlloc, slot, gfp, 0, ours);
        Ok(Slot(slot))
    }

    fn free_object(&mut self, object: Slot) {
        self.wheel += self.deferred_percent;
        let call = if self.wheel >= 100 {
            self.wheel -= 100;
            Call::FreeObjectLater
        } else {
            Call::FreeObject
        };
        self.push(call, object.0, Flags::EMPTY, 0, 0);
    }
}

/// All calls of a recording.
#[derive(Debug)]
pub struct Plan {
    pub(crate) ops: Vec<Op>,
    pub(crate) slots: u32,
    pub(crate) cpus: usize,
    /// The caches that objects come from, in the order of their first objects.
    pub(crate) caches: Vec<CacheId>,
    /// Events by kind.
    pub traffic: Traffic,
    /// Calls for pages, if none fails.
    pub pages: PageCounts,
    /// Calls for objects, if none fails.
    pub objects: SlabCounts,
    /// The most pages that are out at one time, in the order of the recording, objects' slabs left out.
    pub peak_pages: u64,
    /// How slab pages were told, if there are objects.
    pub told: Option<Told>,
}

/// Are there objects among the events?
pub fn has_objects(events: &[Event]) -> bool {
    use EventKind::{CacheAlloc, CacheFree, Kfree, Kmalloc};
    let is_object = |e: &Event| {
        matches!(
            e.kind(),
            Kmalloc { .. } | Kfree { .. } | CacheAlloc { .. } | CacheFree { .. }
        )
    };
    events.iter().any(is_object)
}

impl Plan {
    /// What making a plan takes at most, in bytes, beside the events themselves: for who has no more memory than there is. `pages` as for
    /// [`new`](Self::new).
    pub fn memory_needed(events: usize, pages: usize) -> usize {
        // Of each page who has it and what began in it, or which event allocated it; of each event two calls and twice an entry of a table; slots.
        let each_page = size_of::<u64>() + size_of::<u16>() + size_of::<u32>();
        let each_event = 2 * size_of::<Op>() + 4 * size_of::<(u64, u64)>() + size_of::<u64>();
        pages
            .saturating_mul(each_page)
            .saturating_add(events.saturating_mul(each_event))
    }

    /// Goes through the events. `pages` is one more than the highest page in them: all of their pages lie below.
    pub fn new(events: &[Event], table: &CacheTable, pages: usize, options: Options) -> Plan {
        let slabs = has_objects(events).then(|| slabs::find(events, pages, None));
        let told = slabs.as_ref().map(|s| s.told);
        let base = match told {
            Some(Told::ByAddress(base)) => Some(base),
            _ => None,
        };
        let allocates = |e: &&Event| {
            matches!(
                e.kind(),
                EventKind::PageAlloc { .. }
                    | EventKind::Kmalloc { .. }
                    | EventKind::CacheAlloc { .. }
            )
        };
        // Each allocation, and its free.
        let calls = 2 * events.iter().filter(allocates).count();
        let planner = Planner {
            ops: Vec::with_capacity(calls),
            slots: 0,
            lanes: Lanes::new(options.cpus, events),
            cpu: 0,
            cache_numbers: vec![0; table.len()],
            caches: Vec::new(),
            deferred_percent: options.deferred_percent.min(100),
            wheel: 0,
            live: 0,
            peak: 0,
        };
        let pages = Pages::new(pages);
        let objects = Objects::new(base, pages.len());
        let mut engine = Engine::new(planner, pages, objects, slabs);
        for (i, event) in events.iter().enumerate() {
            engine.event(i, event, table);
        }
        let Engine {
            backend: planner,
            traffic,
            page_counts: mut pages,
            slab_counts: mut objects,
            ..
        } = engine;
        pages.live = pages.allocated - pages.freed;
        objects.live = objects.allocated - objects.freed;
        objects.caches = planner.caches.len() as u64;
        Plan {
            ops: planner.ops,
            slots: planner.slots,
            cpus: options.cpus.clamp(1, MAX_CPUS),
            caches: planner.caches,
            traffic,
            pages,
            objects,
            peak_pages: planner.peak,
            told,
        }
    }

    /// How many calls there are.
    pub fn calls(&self) -> usize {
        self.ops.len()
    }

    /// How many of them each CPU makes.
    pub fn calls_by_cpu(&self) -> Vec<u64> {
        let mut calls = vec![0; self.cpus];
        for op in &self.ops {
            calls[usize::from(op.cpu)] += 1;
        }
        calls
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lanes(ours: usize, theirs: u16, events: usize) -> Vec<u8> {
        let free = EventKind::Kfree { ptr: 64 };
        let events: Vec<Event> = (0..events)
            .map(|i| Event::new(0, i as u16 % theirs, free))
            .collect();
        let mut lanes = Lanes::new(ours, &events);
        events.iter().map(|e| lanes.next(e.cpu)).collect()
    }

    #[test]
    fn every_cpu_has_work() {
        for (ours, theirs) in [(1, 2), (2, 2), (3, 2), (4, 2), (4, 1), (2, 5), (8, 3)] {
            let all = lanes(ours, theirs, 16 * STRETCH as usize * usize::from(theirs));
            for cpu in 0..ours as u8 {
                assert!(all.contains(&cpu), "{ours} of {theirs}: {cpu}");
            }
            assert!(all.iter().all(|&cpu| usize::from(cpu) < ours));
        }
    }

    #[test]
    fn as_many_cpus_are_the_same_cpus() {
        let all = lanes(2, 2, 5000);
        assert!(
            all.iter()
                .enumerate()
                .all(|(i, &cpu)| cpu as usize == i % 2)
        );
    }
}
