//! The context checker: may this lock be taken here, and may this code sleep? Linux's lockdep in small.
//!
//! Seed 001 begins with its complaint: "BUG: Invalid wait context", an allocator's lock that sleeps on a real-time kernel, taken under a
//! raw one. Each lock has a [`LockClass`] with a [`WaitType`]; each thread of execution has a [`Task`], the stack of what it holds. Every
//! acquisition is checked, whether it goes wrong this time or not:
//!
//! - a lock that may sleep under one that may not, and in contexts that may not;
//! - an allocation that may sleep, in atomic context;
//! - an order of two classes that was the other way round before, over any number of steps;
//! - a lock that is taken in interrupts and elsewhere held with interrupts on.
//!
//! A [`Report`] names both sides, and comes once for each problem. A kernel that has one [`Lockdep`] for all its locks tells it of its own
//! by [`Lockdep::acquire`], and hands it to the memory manager in [`Platform::with_lockdep`](crate::Platform::with_lockdep). The calls
//! are made in builds with the feature `lockdep`.

use core::fmt;
use core::panic::Location;

use crate::platform::Context;
use crate::sync::atomic::{AtomicPtr, AtomicU32, Ordering};

/// Classes that one checker knows; locks of others are not checked, and counted.
pub const MAX_CLASSES: usize = 32;
/// Locks that one thread of execution holds at once; more are not checked, and counted.
pub const MAX_HELD: usize = 16;
/// Classes named in a chain.
const MAX_CHAIN: usize = 6;

/// How a lock is waited for.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum WaitType {
    /// By spinning, always (`raw_spinlock_t`).
    Raw,
    /// By spinning, and by sleeping on a real-time kernel (`spinlock_t`).
    Config,
    /// By sleeping (a mutex).
    Sleep,
}

/// What kind of lock it is. Locks of one class are taken for each other's equals; a class is known by its address.
#[derive(Debug)]
pub struct LockClass {
    /// For reports.
    pub name: &'static str,
    /// How it is waited for.
    pub wait: WaitType,
}

/// The classes of the memory manager's own locks.
pub mod classes {
    use super::{LockClass, WaitType};

    macro_rules! classes {
        ($($(#[$doc:meta])* $name:ident = $text:literal, $wait:ident;)*) => {
            $($(#[$doc])* pub static $name: LockClass = LockClass { name: $text, wait: WaitType::$wait };)*
        };
    }
    classes! {
        /// A CPU's page lists.
        PCP = "pcp", Raw;
        /// A CPU's sheaf.
        SHEAF = "sheaf", Raw;
        /// A CPU's deferred frees.
        KVFREE = "kvfree", Raw;
        /// A zone.
        ZONE = "zone->lock", Config;
        /// The slab lists of a cache.
        SLAB_LISTS = "cache->lists", Config;
        /// Free slots of the guarded pool.
        KFENCE = "kfence->free", Config;
        /// The entries of a page table.
        PTL = "ptl", Config;
        /// The entries of a page table, under the lock of the one above.
        PTL_NESTED = "ptl/1", Config;
        /// The lists of folios of a node, by age.
        LRU = "lruvec->lock", Config;
        /// The table of shrinkers.
        SHRINKERS = "shrinkers", Config;
        /// A CPU's harvest of prepaid frees.
        HARVEST = "harvest", Config;
        /// Slabs that wait for a grace period.
        DISCARDS = "discards", Config;
        /// The areas of an address space.
        MMAP = "mmap_lock", Sleep;
        /// Who maps a file.
        I_MMAP = "i_mmap", Sleep;
        /// The address spaces that may map an anonymous page.
        ANON_VMA = "anon_vma", Sleep;
        /// The index of a mapping.
        I_PAGES = "i_pages", Config;
        /// The tree of vmalloc areas.
        VMAP = "vmap_area", Config;
        /// A purge of freed vmalloc areas.
        VMAP_PURGE = "vmap_purge", Sleep;
        /// What is in a balloon.
        BALLOON = "balloon", Config;
        /// The tree of reserves.
        RESERVES = "reserves", Sleep;
        /// What is set aside for reserves.
        RESERVE = "reserve->stores", Config;
        /// A page's failure.
        MEMORY_FAILURE = "mf_mutex", Sleep;
        /// A size class of a pool of compressed memory.
        ZS_CLASS = "zs_class", Config;
        /// The table of pools of compressed memory.
        ZS_POOLS = "zs_pools", Sleep;
        /// What lies in a mempool, and who waits for it.
        MEMPOOL = "mempool", Config;
        /// The list of mempools.
        MEMPOOLS = "mempools", Sleep;
        /// The list of caches.
        SLAB_MUTEX = "slab_mutex", Sleep;
        /// Who makes memory cgroups.
        MEMCG = "memcg", Sleep;
    }
}

/// Was the lock waited for?
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Acquire {
    /// If need be.
    Lock,
    /// No: nothing can go wrong by taking it, only by what is taken under it.
    Try,
}

/// Where the code runs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Env {
    /// In what.
    pub context: Context,
    /// Are interrupts on?
    pub irqs_on: bool,
}

/// What one thread of execution holds: of a thread, with the interrupts on top of it.
///
/// An interrupt may strike at any instruction, and pushes and pops here like what it struck: so a push takes its place first and
/// fills it then, and a pop empties it first. A place that is taken and empty is passed over.
#[derive(Debug)]
pub struct Task {
    depth: AtomicU32,
    /// `class + 1 | level << 8`; 0: empty.
    held: [AtomicU32; MAX_HELD],
    at: [AtomicPtr<Location<'static>>; MAX_HELD],
}

impl Default for Task {
    fn default() -> Task {
        Task::new()
    }
}

impl Task {
    /// Holds nothing.
    pub const fn new() -> Task {
        Task {
            depth: AtomicU32::new(0),
            held: [const { AtomicU32::new(0) }; MAX_HELD],
            at: [const { AtomicPtr::new(core::ptr::null_mut()) }; MAX_HELD],
        }
    }

    fn push(&self, class: usize, level: u32, at: &'static Location<'static>) -> bool {
        let place = self.depth.load(Ordering::Relaxed);
        self.depth.store(place + 1, Ordering::Relaxed);
        core::sync::atomic::compiler_fence(Ordering::SeqCst);
        let Some(held) = self.held.get(place as usize) else {
            return false;
        };
        self.at[place as usize].store((&raw const *at).cast_mut(), Ordering::Relaxed);
        held.store((class as u32 + 1) | (level << 8), Ordering::Relaxed);
        true
    }

    /// Takes the latest of this class out, and lowers the stack over all that is empty.
    fn pop(&self, class: usize) {
        let mut depth = self.depth.load(Ordering::Relaxed) as usize;
        let top = depth.min(MAX_HELD);
        let is_it = |held: &AtomicU32| held.load(Ordering::Relaxed) & 0xff == class as u32 + 1;
        match self.held[..top].iter().rposition(is_it) {
            Some(place) => self.held[place].store(0, Ordering::Relaxed),
            // One of those that found no place.
            None if depth > MAX_HELD => depth -= 1,
            None => return,
        }
        core::sync::atomic::compiler_fence(Ordering::SeqCst);
        let empty = |place: usize| self.held[place].load(Ordering::Relaxed) == 0;
        while depth > 0 && depth <= MAX_HELD && empty(depth - 1) {
            depth -= 1;
        }
        self.depth.store(depth as u32, Ordering::Relaxed);
    }

    /// What is held on this level: class and place of acquisition.
    fn held(&self, level: u32) -> impl Iterator<Item = (usize, &'static Location<'static>)> {
        let top = (self.depth.load(Ordering::Relaxed) as usize).min(MAX_HELD);
        (0..top).filter_map(move |i| {
            let held = self.held[i].load(Ordering::Relaxed);
            // SAFETY: only `push` stores here, and before it says that the place is filled.
            let at = unsafe { self.at[i].load(Ordering::Relaxed).as_ref() }?;
            (held != 0 && held >> 8 == level).then(|| ((held & 0xff) as usize - 1, at))
        })
    }
}

/// What is wrong.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Problem {
    /// A lock that may sleep where that is not allowed.
    InvalidWaitContext,
    /// Something that may sleep, called where nothing may.
    SleepInAtomic,
    /// Two classes in both orders.
    OrderInverted,
    /// A class under itself.
    Recursive,
    /// Taken in interrupts, and held with interrupts on.
    IrqUnsafe,
}

/// One side of a problem.
#[derive(Clone, Copy, Debug)]
pub struct Side {
    /// The class's name.
    pub name: &'static str,
    /// Its wait type; none for what is no lock.
    pub wait: Option<WaitType>,
    /// Where it was acquired or called.
    pub at: &'static Location<'static>,
}

/// A problem that was found.
#[derive(Clone, Copy, Debug)]
pub struct Report {
    /// What is wrong.
    pub problem: Problem,
    /// What was being done.
    pub now: Side,
    /// What it does not go with; none if it is the context.
    pub with: Option<Side>,
    /// In what context.
    pub context: Context,
    /// For an inverted order, how it was before, from `now` to `with`.
    pub chain: [Option<&'static str>; MAX_CHAIN],
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.name)?;
        if let Some(wait) = self.wait {
            write!(f, " ({wait:?})")?;
        }
        write!(f, " at {}:{}", self.at.file(), self.at.line())
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = match self.problem {
            Problem::InvalidWaitContext => "BUG: Invalid wait context",
            Problem::SleepInAtomic => "BUG: sleeping function called from invalid context",
            Problem::OrderInverted => "possible circular locking dependency",
            Problem::Recursive => "possible recursive locking",
            Problem::IrqUnsafe => {
                "inconsistent lock state: taken in an interrupt, held with interrupts on"
            }
        };
        write!(
            f,
            "memdesc: {what}\n  {} in {:?} context",
            self.now, self.context
        )?;
        match (&self.with, self.problem) {
            (Some(with), Problem::IrqUnsafe) => write!(f, "\n  the other way at {with}")?,
            (Some(with), Problem::OrderInverted) => write!(f, "\n  before, under it: {with}")?,
            (Some(with), _) => write!(f, "\n  while holding {with}")?,
            (None, _) => {}
        }
        if self.chain[0].is_some() {
            f.write_str("\n  known order:")?;
            for (i, name) in self.chain.iter().flatten().enumerate() {
                write!(f, "{} {name}", if i == 0 { "" } else { " ->" })?;
            }
        }
        Ok(())
    }
}

type At = AtomicPtr<Location<'static>>;

/// A checker: one for all locks that can be held at the same time.
#[derive(Debug)]
pub struct Lockdep {
    rt: AtomicU32,
    classes: [AtomicPtr<LockClass>; MAX_CLASSES],
    /// Bit `j` of `under[i]`: `j` was waited for with `i` held, at `under_at[i][j]`.
    under: [AtomicU32; MAX_CLASSES],
    under_at: [[At; MAX_CLASSES]; MAX_CLASSES],
    /// Where a class was first waited for in an interrupt, and first held with interrupts on.
    in_irq: [At; MAX_CLASSES],
    irqs_on: [At; MAX_CLASSES],
    /// What was reported: by problem, class, and the other class.
    reported: [[AtomicU32; MAX_CLASSES]; 5],
    unchecked: AtomicU32,
}

impl Default for Lockdep {
    fn default() -> Lockdep {
        Lockdep::new()
    }
}

fn level(context: Context) -> u32 {
    match context {
        Context::Task | Context::Atomic => 0,
        Context::HardIrq => 1,
        Context::Nmi => 2,
    }
}

impl Lockdep {
    /// Knows nothing yet.
    pub const fn new() -> Lockdep {
        Lockdep {
            rt: AtomicU32::new(0),
            classes: [const { AtomicPtr::new(core::ptr::null_mut()) }; MAX_CLASSES],
            under: [const { AtomicU32::new(0) }; MAX_CLASSES],
            under_at: [const { [const { AtomicPtr::new(core::ptr::null_mut()) }; MAX_CLASSES] };
                MAX_CLASSES],
            in_irq: [const { AtomicPtr::new(core::ptr::null_mut()) }; MAX_CLASSES],
            irqs_on: [const { AtomicPtr::new(core::ptr::null_mut()) }; MAX_CLASSES],
            reported: [const { [const { AtomicU32::new(0) }; MAX_CLASSES] }; 5],
            unchecked: AtomicU32::new(0),
        }
    }

    /// This is a real-time kernel: locks of [`WaitType::Config`] sleep.
    pub fn set_preempt_rt(&self) {
        self.rt.store(1, Ordering::Relaxed);
    }

    /// Acquisitions that were not checked, for want of room.
    pub fn unchecked(&self) -> u32 {
        self.unchecked.load(Ordering::Relaxed)
    }

    fn index(&self, class: &'static LockClass) -> Option<usize> {
        let wanted = (&raw const *class).cast_mut();
        for (i, at) in self.classes.iter().enumerate() {
            let mut found = at.load(Ordering::Relaxed);
            if found.is_null() {
                found = match at.compare_exchange(
                    found,
                    wanted,
                    Ordering::Relaxed,
                    Ordering::Relaxed,
                ) {
                    Ok(_) => wanted,
                    Err(other) => other,
                };
            }
            if found == wanted {
                return Some(i);
            }
        }
        None
    }

    fn class(&self, index: usize) -> &'static LockClass {
        // SAFETY: only `index` stores here, from `'static` references; indices come from there.
        match unsafe { self.classes[index].load(Ordering::Relaxed).as_ref() } {
            Some(class) => class,
            None => unreachable!("an index of no class"),
        }
    }

    fn side(&self, index: usize, at: &'static Location<'static>) -> Side {
        let class = self.class(index);
        Side {
            name: class.name,
            wait: Some(class.wait),
            at,
        }
    }

    /// Says so the first time.
    fn first_time(&self, problem: Problem, class: usize, other: usize) -> bool {
        let bit = 1 << other;
        self.reported[problem as usize][class].fetch_or(bit, Ordering::Relaxed) & bit == 0
    }

    /// A lock of this class is being taken, here; recorded in any case.
    ///
    /// # Context
    ///
    /// Any.
    pub fn acquire(
        &self,
        env: Env,
        task: &Task,
        class: &'static LockClass,
        how: Acquire,
        at: &'static Location<'static>,
    ) -> Option<Report> {
        let Some(index) = self.index(class) else {
            self.unchecked.fetch_add(1, Ordering::Relaxed);
            return None;
        };
        let level = level(env.context);
        let report = if how == Acquire::Lock {
            self.check(env, level, task, index, at)
        } else {
            None
        };
        if !task.push(index, level, at) {
            self.unchecked.fetch_add(1, Ordering::Relaxed);
        }
        report
    }

    /// The lock is dropped.
    pub fn release(&self, task: &Task, class: &'static LockClass) {
        if let Some(index) = self.index(class) {
            task.pop(index);
        }
    }

    fn check(
        &self,
        env: Env,
        level: u32,
        task: &Task,
        index: usize,
        at: &'static Location<'static>,
    ) -> Option<Report> {
        let wait = self.class(index).wait;
        let mut report = Report {
            problem: Problem::InvalidWaitContext,
            now: self.side(index, at),
            with: None,
            context: env.context,
            chain: [None; MAX_CHAIN],
        };
        let rt = self.rt.load(Ordering::Relaxed) != 0;
        let sleeps = wait == WaitType::Sleep || wait == WaitType::Config && rt;
        let allowed = match env.context {
            Context::Task => true,
            Context::Atomic | Context::HardIrq => !sleeps,
            Context::Nmi => false,
        };
        if !allowed && self.first_time(Problem::InvalidWaitContext, index, index) {
            return Some(report);
        }
        let mut found = None;
        for (held, held_at) in task.held(level) {
            let mut say = |problem, with, chain| {
                if found.is_none() && self.first_time(problem, index, held) {
                    report.problem = problem;
                    report.with = Some(with);
                    report.chain = chain;
                    found = Some(report);
                }
            };
            let with = self.side(held, held_at);
            if held == index {
                say(Problem::Recursive, with, [None; MAX_CHAIN]);
                continue;
            }
            if wait > self.class(held).wait {
                say(Problem::InvalidWaitContext, with, [None; MAX_CHAIN]);
            }
            let bit = 1 << index;
            if self.under[held].load(Ordering::Relaxed) & bit != 0 {
                continue;
            }
            let mut chain = [None; MAX_CHAIN];
            if let Some(next) = self.path(index, held, &mut chain) {
                // SAFETY: stored before its bit was set, from a `'static` reference.
                let before = unsafe { self.under_at[index][next].load(Ordering::Acquire).as_ref() };
                let with = self.side(next, before.unwrap_or(at));
                say(Problem::OrderInverted, with, chain);
                continue;
            }
            set_first(&self.under_at[held][index], at);
            // Release pairs with the Acquire in `path`.
            self.under[held].fetch_or(bit, Ordering::Release);
        }
        found.or_else(|| self.check_irq(env, level, index, report))
    }

    fn check_irq(&self, env: Env, level: u32, index: usize, mut report: Report) -> Option<Report> {
        let at = report.now.at;
        let other = match (level, env.irqs_on) {
            (1, _) => {
                set_first(&self.in_irq[index], at);
                &self.irqs_on[index]
            }
            (0, true) => {
                set_first(&self.irqs_on[index], at);
                &self.in_irq[index]
            }
            _ => return None,
        };
        // SAFETY: from a `'static` reference, or null.
        let other = unsafe { other.load(Ordering::Relaxed).as_ref() }?;
        report.problem = Problem::IrqUnsafe;
        report.with = Some(self.side(index, other));
        self.first_time(Problem::IrqUnsafe, index, index)
            .then_some(report)
    }

    /// Is there a known order from one class to another? Says its first step, and names it.
    fn path(&self, from: usize, to: usize, chain: &mut [Option<&'static str>]) -> Option<usize> {
        // From which class each was reached, breadth first.
        let mut came = [MAX_CLASSES; MAX_CLASSES];
        let (mut seen, mut front) = (1u32 << from, 1u32 << from);
        while front != 0 && seen & 1 << to == 0 {
            let at = front.trailing_zeros() as usize;
            front &= front - 1;
            // Acquire pairs with the Release in `check`.
            let mut new = self.under[at].load(Ordering::Acquire) & !seen;
            seen |= new;
            front |= new;
            while new != 0 {
                came[new.trailing_zeros() as usize] = at;
                new &= new - 1;
            }
        }
        if seen & 1 << to == 0 {
            return None;
        }
        let (mut at, mut first, mut steps) = (to, to, 1);
        while at != from {
            first = at;
            at = came[at];
            steps += 1;
        }
        at = to;
        for place in (0..steps).rev() {
            if let Some(name) = chain.get_mut(place) {
                *name = Some(self.class(at).name);
            }
            if at != from {
                at = came[at];
            }
        }
        Some(first)
    }

    /// Something that may sleep is called, here.
    pub fn might_sleep(
        &self,
        env: Env,
        task: &Task,
        what: &'static str,
        at: &'static Location<'static>,
    ) -> Option<Report> {
        let held = task
            .held(level(env.context))
            .find(|(held, _)| self.class(*held).wait != WaitType::Sleep);
        if env.context == Context::Task && env.irqs_on && held.is_none() {
            return None;
        }
        let report = Report {
            problem: Problem::SleepInAtomic,
            now: Side {
                name: what,
                wait: None,
                at,
            },
            with: held.map(|(held, at)| self.side(held, at)),
            context: env.context,
            chain: [None; MAX_CHAIN],
        };
        let other = held.map_or(MAX_CLASSES - 1, |(held, _)| held);
        let row = env.context as usize;
        self.first_time(Problem::SleepInAtomic, row, other)
            .then_some(report)
    }
}

fn set_first(place: &At, at: &'static Location<'static>) {
    if place.load(Ordering::Relaxed).is_null() {
        place.store((&raw const *at).cast_mut(), Ordering::Release);
    }
}
