//! The calls of a [`Plan`], on all CPUs at once.
//!
//! Each CPU makes its own calls in the order of the plan. Two things it waits for:
//!
//! - A free for its allocation, which may be another CPU's: until that has been made the slot is empty.
//! - Not to be too far ahead: a call is made at most [`WINDOW`] calls before the slowest CPU's next. Otherwise one CPU might allocate all that the others are
//!   going to free later, and the memory that the recording took would not do.
//!
//! Who has to wait for one of the two waits on until the slowest CPU is [`NEAR`].
//!
//! That ends: of all calls that are not made look at the first. What it waits for comes before it, and is made; and the CPU that makes it is the slowest one,
//! which is near itself. So it is made.
//!
//! A slot's values: [`EMPTY`] until its allocation is made and after its free is, [`FAILED`], or what was got.

use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;
use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use memdesc::{AllocError, Cache, MAX_ORDER, Platform};
use memdesc_trace::CacheTable;

use crate::counts::reason;
use crate::handles::{Handles, OwnedBlock, OwnedObject, Purpose, Token};
use crate::plan::{Call, Op, Plan};

/// Calls that a CPU may be ahead of the slowest.
const WINDOW: usize = 4096;
/// Who waits goes on when the slowest CPU's next call is not so many calls behind: a wait may cost a sleep, so it should not be one for every call.
const NEAR: usize = WINDOW / 4;
/// Calls between two looks at the bytes of descriptors, by the first CPU.
const SAMPLE: u64 = 1024;
/// Calls between two times that a CPU does what else it has to do.
const UPKEEP: u64 = 256;

const EMPTY: u64 = 0;
const FAILED: u64 = 1;
/// Added to a page frame.
const BLOCK: u64 = 2;

/// What one CPU did, or all of them.
#[derive(Clone, Debug, Default)]
pub struct Done {
    /// Calls made, failed ones too.
    pub calls: u64,
    /// Blocks allocated, by purpose.
    pub by_purpose: [u64; Purpose::ALL.len()],
    /// Their pages, by purpose.
    pub pages_by_purpose: [u64; Purpose::ALL.len()],
    /// Blocks allocated, by order.
    pub by_order: [u64; MAX_ORDER + 1],
    /// Blocks freed, and their pages.
    pub freed: u64,
    /// Pages of them.
    pub freed_pages: u64,
    /// Objects from kmalloc.
    pub kmalloc: u64,
    /// Objects from caches.
    pub cache_alloc: u64,
    /// Objects freed, deferred ones too.
    pub objects_freed: u64,
    /// Objects whose free was deferred.
    pub deferred: u64,
    /// Blocks that could not be had.
    pub pages_failed: u64,
    /// Objects that could not be had.
    pub objects_failed: u64,
    /// Why the first of them could not, and its order or size.
    pub first_failure: Option<(&'static str, u64)>,
    /// Frees of what could not be had: nothing is done for them.
    pub frees_of_failed: u64,
    /// Frees that waited for another CPU's allocation.
    pub waited_for_allocation: u64,
    /// Times that it waited for the slowest CPU.
    pub waited_for_others: u64,
    /// The most bytes of descriptors that were seen.
    pub peak_descriptor_bytes: u64,
}

impl Done {
    /// Blocks allocated.
    pub fn allocated(&self) -> u64 {
        self.by_purpose.iter().sum()
    }

    /// Pages allocated.
    pub fn allocated_pages(&self) -> u64 {
        self.pages_by_purpose.iter().sum()
    }

    /// Objects allocated.
    pub fn objects(&self) -> u64 {
        self.kmalloc + self.cache_alloc
    }

    /// Adds what another CPU did.
    pub fn add(&mut self, other: &Done) {
        fn each(sums: &mut [u64], numbers: &[u64]) {
            sums.iter_mut().zip(numbers).for_each(|(sum, n)| *sum += n);
        }
        each(&mut self.by_purpose, &other.by_purpose);
        each(&mut self.pages_by_purpose, &other.pages_by_purpose);
        each(&mut self.by_order, &other.by_order);
        self.calls += other.calls;
        self.freed += other.freed;
        self.freed_pages += other.freed_pages;
        self.kmalloc += other.kmalloc;
        self.cache_alloc += other.cache_alloc;
        self.objects_freed += other.objects_freed;
        self.deferred += other.deferred;
        self.pages_failed += other.pages_failed;
        self.objects_failed += other.objects_failed;
        self.first_failure = self.first_failure.or(other.first_failure);
        self.frees_of_failed += other.frees_of_failed;
        self.waited_for_allocation += other.waited_for_allocation;
        self.waited_for_others += other.waited_for_others;
        self.peak_descriptor_bytes = self.peak_descriptor_bytes.max(other.peak_descriptor_bytes);
    }
}

/// What was given back at the end.
#[derive(Clone, Debug, Default)]
pub struct Left {
    /// Blocks that were live.
    pub blocks: u64,
    /// Objects that were live.
    pub objects: u64,
    /// Caches that would not go: name, and how many objects.
    pub stuck: Vec<(String, u64)>,
}

/// Why a run cannot begin.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum StartError {
    /// A cache could not be made.
    Cache {
        /// Its name.
        name: String,
        /// Why.
        why: AllocError,
    },
    /// No memory for the slots.
    NoMemory {
        /// How many.
        slots: u32,
    },
}

impl fmt::Display for StartError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            StartError::Cache { name, why } => {
                write!(f, "the cache {name:?} could not be made: {why}")
            }
            StartError::NoMemory { slots } => write!(f, "no memory for {slots} slots"),
        }
    }
}

impl core::error::Error for StartError {}

/// How far a CPU is: the number of its next call; on a line of its own.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Progress(AtomicUsize);

/// A run of a plan on a memory manager.
///
/// Every CPU of the plan calls [`cpu`](Self::cpu) once, all at the same time; then one calls [`end`](Self::end).
pub struct Run<'m, 'p, P: Platform> {
    handles: Handles<'m, P>,
    plan: &'p Plan,
    slots: Vec<AtomicU64>,
    caches: Vec<Cache<'m>>,
    progress: Vec<Progress>,
}

impl<'m, 'p, P: Platform> Run<'m, 'p, P> {
    /// Makes the caches, and room for what will be had: the calls themselves need nothing more.
    ///
    /// # Context
    ///
    /// May sleep.
    ///
    /// # Errors
    ///
    /// No memory.
    pub fn new(
        handles: Handles<'m, P>,
        plan: &'p Plan,
        table: &CacheTable,
    ) -> Result<Run<'m, 'p, P>, StartError> {
        let mut slots = Vec::new();
        let no_memory = |_| StartError::NoMemory { slots: plan.slots };
        slots
            .try_reserve_exact(plan.slots as usize)
            .map_err(no_memory)?;
        slots.resize_with(plan.slots as usize, || AtomicU64::new(EMPTY));
        let mut caches: Vec<Cache<'m>> = Vec::with_capacity(plan.caches.len());
        for &id in &plan.caches {
            let cache = table.get(id);
            let made = cache
                .ok_or(AllocError::BadSize)
                .and_then(|cache| handles.cache_create(cache));
            match made {
                Ok(cache) => caches.push(cache),
                Err(why) => {
                    for cache in caches {
                        // It is empty.
                        let _ = handles.destroy(cache);
                    }
                    let name = cache.map_or(String::new(), |c| c.name.clone());
                    return Err(StartError::Cache { name, why });
                }
            }
        }
        let mut progress = Vec::new();
        progress.resize_with(plan.cpus, Progress::default);
        Ok(Run {
            handles,
            plan,
            slots,
            caches,
            progress,
        })
    }

    /// Makes the calls of this CPU. `wait` waits until what it is given says yes; `upkeep` is called now and then.
    ///
    /// # Context
    ///
    /// May sleep. On the CPU itself, once.
    pub fn cpu(&self, cpu: usize, wait: impl Fn(&dyn Fn() -> bool), upkeep: impl Fn()) -> Done {
        let mut done = Done::default();
        let Some(progress) = self.progress.get(cpu) else {
            return done;
        };
        let mut allowed = 0;
        let mine = self.plan.ops.iter().enumerate();
        for (i, op) in mine.filter(|(_, op)| usize::from(op.cpu) == cpu) {
            // Others look at it to wait, not to see what was done: that the slots say.
            progress.0.store(i, Ordering::Relaxed);
            if i >= allowed {
                allowed = self.slowest() + WINDOW;
                if i >= allowed {
                    done.waited_for_others += 1;
                    wait(&|| self.slowest() + NEAR > i);
                    allowed = self.slowest() + WINDOW;
                }
            }
            self.call(i, op, &mut done, &wait);
            done.calls += 1;
            if done.calls.is_multiple_of(UPKEEP) {
                upkeep();
            }
            if cpu == 0 && done.calls.is_multiple_of(SAMPLE) {
                done.peak_descriptor_bytes = done
                    .peak_descriptor_bytes
                    .max(self.handles.descriptor_bytes());
            }
        }
        // It is in nobody's way any more.
        progress.0.store(usize::MAX / 2, Ordering::Relaxed);
        done
    }

    /// The first call that is perhaps not made.
    fn slowest(&self) -> usize {
        let all = self.progress.iter().map(|p| p.0.load(Ordering::Relaxed));
        all.min().unwrap_or(0)
    }

    #[inline]
    fn call(&self, i: usize, op: &Op, done: &mut Done, wait: &impl Fn(&dyn Fn() -> bool)) {
        let order = usize::from(op.order);
        let object =
            |result: Result<OwnedObject, AllocError>, done: &mut Done, size: u64| match result {
                Ok(object) => {
                    self.fill(op, object.into_raw());
                    true
                }
                Err(why) => {
                    done.objects_failed += 1;
                    done.first_failure.get_or_insert((reason(why), size));
                    self.fill(op, FAILED);
                    false
                }
            };
        match op.call {
            Call::Alloc(purpose) => match self.handles.alloc(purpose, op.gfp, order) {
                Ok(block) => {
                    self.fill(op, u64::from(block.into_raw()) + BLOCK);
                    done.by_purpose[purpose as usize] += 1;
                    done.pages_by_purpose[purpose as usize] += 1 << order;
                    done.by_order[order.min(MAX_ORDER)] += 1;
                }
                Err(why) => {
                    done.pages_failed += 1;
                    done.first_failure
                        .get_or_insert((reason(why), order as u64));
                    self.fill(op, FAILED);
                }
            },
            Call::Kmalloc => {
                let size = op.size as usize;
                let result = self.handles.kmalloc(size, op.gfp);
                done.kmalloc += u64::from(object(result, done, op.size.into()));
            }
            Call::CacheAlloc => {
                let number = op.size as usize;
                let cache = &self.caches[number];
                let result = self.handles.cache_alloc(cache, number, op.gfp);
                let size = cache.object_size() as u64;
                done.cache_alloc += u64::from(object(result, done, size));
            }
            Call::Free => {
                if let Some(block) = self.take_block(i, op, done, wait) {
                    self.handles.free(block);
                    done.freed += 1;
                    done.freed_pages += 1 << order;
                }
            }
            Call::FreeObject => {
                if let Some(object) = self.take_object(i, op, done, wait) {
                    let cache = object.cache().map(|n| &self.caches[n]);
                    self.handles.free_object(object, cache);
                    done.objects_freed += 1;
                }
            }
            Call::FreeObjectLater => {
                if let Some(object) = self.take_object(i, op, done, wait) {
                    let size = object.cache().map(|n| self.caches[n].object_size());
                    let deferred = self.handles.free_object_later(object, size);
                    done.deferred += u64::from(deferred);
                    done.objects_freed += 1;
                }
            }
        }
    }

    #[inline]
    fn fill(&self, op: &Op, value: u64) {
        // Release pairs with the Acquire in `take`: what the allocation wrote is seen by who frees.
        self.slots[op.slot as usize].store(value, Ordering::Release);
    }

    /// What the slot got, as soon as it has got it. It has one free in the plan.
    #[inline]
    fn take(
        &self,
        i: usize,
        op: &Op,
        done: &mut Done,
        wait: &impl Fn(&dyn Fn() -> bool),
    ) -> Option<u64> {
        let slot = &self.slots[op.slot as usize];
        // Whoever else might come for it, by a mistake, finds nothing.
        let mut value = slot.swap(EMPTY, Ordering::Acquire);
        if value == EMPTY {
            done.waited_for_allocation += 1;
            wait(&|| slot.load(Ordering::Relaxed) != EMPTY && self.slowest() + NEAR > i);
            value = slot.swap(EMPTY, Ordering::Acquire);
        }
        if value == FAILED || value == EMPTY {
            done.frees_of_failed += 1;
            return None;
        }
        Some(value)
    }

    fn take_block(
        &self,
        i: usize,
        op: &Op,
        done: &mut Done,
        wait: &impl Fn(&dyn Fn() -> bool),
    ) -> Option<OwnedBlock> {
        let value = self.take(i, op, done, wait)?;
        // SAFETY: a plan frees pages by the slots that it allocated pages into, each once, and `take` has emptied it in one step: `call` put the block in.
        Some(unsafe { OwnedBlock::from_raw((value - BLOCK) as u32) })
    }

    fn take_object(
        &self,
        i: usize,
        op: &Op,
        done: &mut Done,
        wait: &impl Fn(&dyn Fn() -> bool),
    ) -> Option<OwnedObject> {
        let value = self.take(i, op, done, wait)?;
        // SAFETY: as in `take_block`, of an object.
        unsafe { OwnedObject::from_raw(value) }
    }

    /// Every CPU is through: frees what is live, and destroys the caches.
    ///
    /// # Context
    ///
    /// May sleep.
    pub fn end(self) -> Left {
        let mut left = Left::default();
        let mut unused = Done::default();
        let allocations = self.plan.ops.iter().filter(|op| {
            !matches!(
                op.call,
                Call::Free | Call::FreeObject | Call::FreeObjectLater
            )
        });
        for op in allocations {
            let value = self.slots[op.slot as usize].load(Ordering::Acquire);
            if value == EMPTY || value == FAILED {
                continue;
            }
            if matches!(op.call, Call::Alloc(_)) {
                let block = self.take_block(0, op, &mut unused, &|_| {});
                left.blocks += block.map_or(0, |block| {
                    self.handles.free(block);
                    1
                });
            } else {
                let object = self.take_object(0, op, &mut unused, &|_| {});
                left.objects += object.map_or(0, |object| {
                    let cache = object.cache().map(|n| &self.caches[n]);
                    self.handles.free_object(object, cache);
                    1
                });
            }
        }
        for cache in self.caches {
            if let Err(stuck) = self.handles.destroy(cache) {
                left.stuck
                    .push((String::from(stuck.cache.name()), stuck.live));
            }
        }
        left
    }
}
