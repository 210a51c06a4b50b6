//! The soak: everything that memory can be used for, at the same time and at random, for as long as one likes; and then the books.
//!
//! A worker takes small steps, each of a kind that the dice choose, and keeps what it got: pages, objects, stacks, address spaces, pages of a file. Memory is
//! kept short by a [ballast](house) that grows and shrinks, so reclaim, shrinkers, deferred frees and the slow way run all the time, and free blocks are
//! [reported](report) to somebody who writes all over them. NMIs [strike](nmi) meanwhile, and allocate. Whoever has memory writes a pattern of its own into it, and
//! finds it when it lets go.
//!
//! Every ten seconds all workers stand still and the books are looked at; at the end everything is given back, and memory has to be as it was
//! ([`books`]). What is done is in `soak/`, a room for each kind of work:
//!
//! | room | work |
//! |---|---|
//! | [`things`] | what a worker can have, its pattern, and the ways of letting it go |
//! | [`work`] | pages, objects, vmalloc areas, kernel stacks with their guards; frees by other CPUs |
//! | [`spaces`] | address spaces: faults, forks, copy on write, munmap, migration |
//! | [`file`](mod@file) | pages of a file, which reclaim takes |
//! | [`vigil`] | CPUs that stay with a few pages, which others move meanwhile |
//! | [`children`] | processes in trees, and threads, that come and go |
//! | [`readers`] | what readers find under RCU, and what is replaced meanwhile |
//! | [`promises`] | reserves and mempools when all else is gone |
//! | [`house`] | the ballast, the shrinker, compaction, pages that go bad |
//! | [`nmi`], [`report`] | who strikes, and who is told of free memory |
//!
//! A step may sleep in the memory manager's locks, and whoever takes it may be preempted: no lock of the soak's own is waited for, they are tried. Nothing is
//! allocated for the soak itself after its start, since memory is out most of the time: what grows has its room from the beginning.
//!
//! Command line: `soak=SECONDS`, and `seed=NUMBER` for dice that were thrown before.

pub(crate) mod books;
mod children;
mod file;
mod house;
mod nmi;
mod promises;
mod readers;
pub(crate) mod report;
mod spaces;
mod things;
mod vigil;
mod work;

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::fmt;
use core::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use arrayvec::ArrayVec;
use memdesc::filemap::Mapping;
use memdesc::{
    AllocError, Cache, CacheFlags, Config, Demand, MemCgroup, Mempool, MempoolKind, Mm, PAGE_SIZE,
    PAGEBLOCK_ORDER, Pfn, Reserve,
};
use spin::Mutex;

use self::children::Children;
use self::file::Disk;
use self::readers::Nodes;
use self::spaces::{COMMON_PAGES, Place};
use self::things::Held;
use crate::exit::Exit;
use crate::platform::Metal;
use crate::pvh::BootInfo;
use crate::tests::{Machine, Random};
use crate::users::Space;
use crate::{log, memory, percpu, process, smp, thread, time, worker};

/// From one line to the next, and from one look at the books to the next.
const LINE_NS: u64 = 5_000_000_000;
const LOOK_NS: u64 = 10_000_000_000;
/// What is wrong is said so often; then it is known.
const SAY_WRONG: u64 = 8;
/// Things that a worker has at most.
pub(crate) const MINE: usize = 192;
/// Places in which one worker leaves something for another.
const LEFT: usize = 32;
/// Address spaces.
pub(crate) const PLACES: usize = 6;
/// Objects of the reserve, and elements of the mempool.
pub(crate) const PROMISED: usize = 24;
pub(crate) const PROMISED_SIZE: usize = 700;

macro_rules! counts {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// What is counted.
        #[derive(Clone, Copy)]
        pub(crate) enum Count { $($(#[$doc])* $name),* }
        const COUNTS: usize = [$(Count::$name),*].len();
    };
}

counts! {
    /// Things had, refused, looked at and let go; by another worker than had them; after a grace period.
    Got,
    Refused,
    Freed,
    Exchanged,
    Deferred,
    Forks,
    Unmaps,
    Migrated,
    Reads,
    Writes,
    /// Times that everything was taken and the reserve was there all the same; elements of the mempool.
    Exhausted,
    Elements,
    /// Pages that went bad.
    Bad,
    /// Nodes that readers looked at, and that were replaced.
    Looked,
    Replaced,
    /// Blocks that were zeroed or written over when they were reported.
    Scribbled,
    /// Vigils; times that the disk was compared; children that were started.
    Vigils,
    Synced,
    Processes,
    Threads,
    /// That ended for want of memory.
    Died,
}

/// What all workers have.
pub(crate) struct Soak {
    pub(crate) mm: &'static Mm<Metal>,
    pub(crate) workers: usize,
    /// Pages of RAM.
    pub(crate) ram: u64,
    pub(crate) disk: &'static Disk,
    pub(crate) file: Mapping<'static, Metal>,
    /// A group with little room.
    pub(crate) group: MemCgroup<'static, Metal>,
    /// Programs for users, and the threads that there are without them.
    pub(crate) text: Mapping<'static, Metal>,
    threads: u64,
    pub(crate) caches: ArrayVec<Cache<'static>, 4>,
    pub(crate) reserve: Reserve<'static, Metal>,
    /// One worker at a time takes what was promised.
    pub(crate) exhausting: Mutex<Vec<Pfn>>,
    pub(crate) pool: Mempool<'static, Metal>,
    pub(crate) places: Vec<Mutex<Place>>,
    /// The address space that all workers touch.
    pub(crate) common: Space,
    pub(crate) left: [Mutex<Option<Held>>; LEFT],
    pub(crate) ballast: Mutex<Vec<Pfn>>,
    pub(crate) bad: Mutex<ArrayVec<Pfn, 16>>,
    pub(crate) start: u64,
    pub(crate) asid: AtomicU64,
    counts: [AtomicU64; COUNTS],
    wrong: AtomicU64,
    stop: AtomicBool,
    /// Everybody is to stand still; those who do; and those who are through.
    still: AtomicBool,
    standing: AtomicUsize,
    ended: AtomicUsize,
}

/// One who works.
pub(crate) struct Worker {
    pub(crate) me: usize,
    pub(crate) dice: Random,
    pub(crate) mine: ArrayVec<Held, MINE>,
    /// Pages that these things take.
    pub(crate) weight: u64,
    /// What it wrote to its pages of the file.
    pub(crate) written: Vec<u32>,
    /// And to its pages of the common address space.
    pub(crate) common: Vec<u32>,
    /// Room to look at a page.
    pub(crate) bytes: Vec<u8>,
    /// What it started that may still run.
    pub(crate) children: Children,
    pub(crate) serial: u64,
}

/// Says what is wrong.
#[macro_export]
macro_rules! wrong {
    ($soak:expr, $($what:tt)+) => { $soak.wrong(format_args!($($what)+)) };
}

impl Soak {
    pub(crate) fn count(&self, what: Count) {
        self.counts[what as usize].fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn counted(&self, what: Count) -> u64 {
        self.counts[what as usize].load(Ordering::Relaxed)
    }

    /// Something is wrong: it is said, and the soak ends.
    #[track_caller]
    pub(crate) fn wrong(&self, what: fmt::Arguments<'_>) {
        if self.wrong.fetch_add(1, Ordering::AcqRel) < SAY_WRONG {
            let at = core::panic::Location::caller();
            log!("soak: WRONG: {what} ({}:{})", at.file(), at.line());
        }
        self.stop.store(true, Ordering::Release);
    }

    /// It is over, or is about to be.
    pub(crate) fn stopped(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    /// A number for an address space.
    pub(crate) fn asid(&self) -> u64 {
        self.asid.fetch_add(1, Ordering::Relaxed)
    }

    /// Stands still as long as that is wanted.
    fn stand_still(&self, worker: &mut Worker) {
        if self.still.load(Ordering::Acquire) {
            worker.join_children(self);
            self.standing.fetch_add(1, Ordering::AcqRel);
            smp::wait_until(|| !self.still.load(Ordering::Acquire));
            self.standing.fetch_sub(1, Ordering::AcqRel);
        }
    }

    /// Waits for those whose parents did not.
    fn wait_for_orphans(&self) {
        smp::wait_until(|| process::alive() == 0 && thread::alive() == self.threads);
    }

    /// Runs `f` while nobody else does anything.
    fn while_all_stand(&self, f: impl FnOnce()) {
        self.still.store(true, Ordering::Release);
        let others = || self.standing.load(Ordering::Acquire) + self.ended.load(Ordering::Acquire);
        smp::wait_until(|| others() >= self.workers - 1);
        self.wait_for_orphans();
        nmi::quiet(true);
        let pause = worker::pause();
        f();
        drop(pause);
        nmi::quiet(false);
        self.still.store(false, Ordering::Release);
        smp::wait_until(|| self.standing.load(Ordering::Acquire) == 0);
    }

    /// The line that says how far it is.
    fn line(&self) {
        let passed = (time::now() - self.start) / 1_000_000_000;
        let counted = books::Counted::of(self.mm);
        log!(
            "soak {passed:4} s: {} allocations, {} faults, {} forks, {} pages reclaimed, {} moved, {} reported, {} NMIs, {} exhausted, {} refused; {} pages free",
            counted.allocations,
            counted.faults,
            self.counted(Count::Forks),
            counted.reclaimed,
            counted.moved,
            counted.reported,
            counted.nmis,
            self.counted(Count::Exhausted),
            self.counted(Count::Refused),
            counted.free,
        );
    }
}

impl Worker {
    fn new(me: usize, seed: u64, disk: &Disk) -> Worker {
        Worker {
            me,
            dice: Random::new(seed.wrapping_add(1).wrapping_mul(1 + me as u64 * 2)),
            mine: ArrayVec::new(),
            weight: 0,
            written: alloc::vec![0; disk.pages() as usize],
            common: alloc::vec![0; COMMON_PAGES],
            bytes: alloc::vec![0; PAGE_SIZE],
            children: Children::new(),
            serial: 0,
        }
    }

    pub(crate) fn one_in(&mut self, n: usize) -> bool {
        self.dice.below(n) == 0
    }

    /// A pattern that nobody else has.
    pub(crate) fn stamp(&mut self) -> u64 {
        self.serial += 1;
        (self.serial << 8 | self.me as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1
    }

    fn step(&mut self, soak: &Soak) {
        match self.dice.below(100) {
            0..=33 => self.work(soak),
            34..=51 => self.spaces(soak),
            52..=70 => self.file(soak),
            71..=80 => self.readers(soak),
            81..=84 => self.promises(soak),
            85..=87 => self.vigil(soak),
            88 => self.children(soak),
            _ => self.keep_house(soak),
        }
        if self.one_in(16) {
            nmi::strike_another(&mut self.dice, self.me, soak.workers);
        }
    }

    /// Steps until it is over; the first worker also looks after the others.
    fn run(&mut self, soak: &Soak, until: u64) {
        let (mut line, mut look) = (soak.start + LINE_NS, soak.start + LOOK_NS);
        while !soak.stopped() {
            memory::work();
            self.step(soak);
            soak.stand_still(self);
            let now = time::now();
            if self.me != 0 {
                continue;
            }
            nmi::aim(now, soak.workers);
            if now >= line {
                line = now + LINE_NS;
                soak.line();
            }
            if now >= look {
                self.join_children(soak);
                soak.while_all_stand(|| books::look(soak));
                look = time::now() + LOOK_NS;
            }
            if now >= until {
                soak.stop.store(true, Ordering::Release);
            }
        }
        self.join_children(soak);
        // What it has goes where it is.
        while let Some(held) = self.mine.pop() {
            held.release(soak, &mut self.dice);
        }
        soak.ended.fetch_add(1, Ordering::AcqRel);
    }
}

/// How the memory manager is set up for a soak: what it does in the background it does often.
pub(crate) fn config(boot: &BootInfo, config: Config) -> Config {
    if boot.value("soak").is_none() {
        return config;
    }
    Config {
        page_reporting: true,
        page_reporting_order: 6,
        page_reporting_delay_ns: 20_000_000,
        kvfree_drain_ns: 100_000_000,
        ..config
    }
}

/// Soaks the machine for so many seconds.
pub(crate) fn run(machine: &mut Machine, seconds: &str) -> Exit {
    let Ok(seconds) = seconds.parse::<u64>() else {
        log!("soak={seconds}: not a number of seconds");
        return Exit::Failure;
    };
    let seed = match machine.boot.value("seed").map(str::parse::<u64>) {
        None => time::tsc() >> 4 & 0xffff_ffff,
        Some(Ok(seed)) => seed,
        Some(Err(why)) => {
            log!("seed: {why}");
            return Exit::Failure;
        }
    };
    crate::tests::settle(machine);
    let before = books::Before::of(machine);
    log!(
        "soak: {seconds} s on {} CPUs, {} pages free, seed={seed}",
        machine.cpus,
        before.free
    );
    let soak = match set_up(machine) {
        Ok(soak) => soak,
        Err(why) => {
            log!("soak: nothing to begin with: {why}");
            return Exit::Failure;
        }
    };
    let until = soak.start + seconds * 1_000_000_000;
    let workers: Vec<Mutex<Worker>> = (0..soak.workers)
        .map(|me| Mutex::new(Worker::new(me, seed, soak.disk)))
        .collect();
    if let Err(why) = readers::set_up(&soak) {
        log!("soak: nothing to begin with: {why}");
        return Exit::Failure;
    }
    nmi::start();
    smp::on_all_cpus(&|cpu| {
        if let Some(worker) = workers.get(cpu) {
            worker.lock().run(&soak, until);
        }
    });
    nmi::end(soak.mm);
    soak.line();
    let totals = books::Totals::of(&soak);
    soak.wait_for_orphans();
    let workers: Vec<Worker> = workers.into_iter().map(Mutex::into_inner).collect();
    if soak.file.writeback(0..=u64::MAX).is_ok() {
        for worker in &workers {
            let lost = soak
                .disk
                .lost(worker.me as u64, soak.workers, &worker.written);
            if let Some((page, found)) = lost {
                wrong!(
                    soak,
                    "page {page} was written {} times and written back, and the disk has {found:#x}",
                    worker.written[page as usize]
                );
            }
        }
    }
    drop(workers);
    let found = give_back(soak);
    books::close(machine, &before, &totals, found)
}

/// All that there is to begin with.
fn set_up(machine: &Machine) -> Result<Box<Soak>, AllocError> {
    let mm = machine.mm;
    let ram = mm.ledger().given;
    let disk: &'static Disk = Box::leak(Box::new(Disk::new(ram * 2 / 5)));
    let file = Mapping::new(mm, disk, disk.pages())?;
    let group = mm.memcg_create(None, "soak", (ram / 400).max(128) * PAGE_SIZE as u64)?;
    let text = process::text_file(mm)?;
    let mut caches = ArrayVec::new();
    let kinds = [
        ("soak-plain", 72, CacheFlags::EMPTY),
        ("soak-aligned", 200, CacheFlags::HWCACHE_ALIGN),
        ("soak-typesafe", 120, CacheFlags::TYPESAFE_BY_RCU),
        ("soak-debug", 56, CacheFlags::DEBUG),
    ];
    for (name, size, flags) in kinds {
        caches.push(mm.kmem_cache_create(name, size, 8, flags, None)?);
    }
    let demand = Demand::KmallocObjects {
        size: PROMISED_SIZE,
        count: PROMISED,
    };
    let reserve = mm.reserve("soak", demand)?;
    reserve.connect(None)?;
    let pool = mm.mempool_create(
        "soak",
        MempoolKind::Kmalloc {
            size: PROMISED_SIZE,
        },
        PROMISED,
        memdesc::gfp::GFP_KERNEL,
    )?;
    let mut places = Vec::new();
    for asid in 0..PLACES as u64 {
        places.push(Mutex::new(Place::new(mm, &file, asid)?));
    }
    let common = spaces::common(mm, PLACES as u64)?;
    house::start(mm);
    Ok(Box::new(Soak {
        mm,
        workers: machine.cpus,
        ram,
        disk,
        file,
        group,
        text,
        threads: thread::alive(),
        caches,
        reserve,
        exhausting: Mutex::new(Vec::with_capacity(1024)),
        pool,
        places,
        common,
        left: [const { Mutex::new(None) }; LEFT],
        ballast: Mutex::new(Vec::with_capacity((ram >> PAGEBLOCK_ORDER) as usize)),
        bad: Mutex::new(ArrayVec::new()),
        start: time::now(),
        asid: AtomicU64::new(PLACES as u64 + 1),
        counts: [const { AtomicU64::new(0) }; COUNTS],
        wrong: AtomicU64::new(0),
        stop: AtomicBool::new(false),
        still: AtomicBool::new(false),
        standing: AtomicUsize::new(0),
        ended: AtomicUsize::new(0),
    }))
}

/// Everything goes back. How many things were found wrong, in the end or before.
fn give_back(soak: Box<Soak>) -> u64 {
    let mut dice = Random::new(1);
    for place in &soak.left {
        if let Some(held) = place.lock().take() {
            held.release(&soak, &mut dice);
        }
    }
    readers::end(&soak);
    house::end(&soak);
    let Soak {
        mm,
        disk,
        file,
        group,
        text,
        caches,
        reserve,
        pool,
        places,
        common,
        wrong,
        ..
    } = *soak;
    let mut wrong = wrong.into_inner();
    let mut say = |what: fmt::Arguments<'_>| {
        log!("soak: WRONG: {what}");
        wrong += 1;
    };
    drop(places);
    drop(common);
    if let Err(why) = file.writeback(0..=u64::MAX) {
        say(format_args!("what is dirty cannot be written: {why}"));
    }
    drop((file, text, group));
    // SAFETY: leaked by `set_up`; nobody leads to it any more, since the file and who mapped it are gone.
    drop(unsafe { Box::from_raw(core::ptr::from_ref(disk).cast_mut()) });
    if let Err(busy) = pool.destroy() {
        say(format_args!("{busy}"));
    }
    if reserve.disconnect().is_err() || reserve.destroy().is_err() {
        say(format_args!("the reserve is in use"));
    }
    memdesc::rcu::Rcu::barrier(mm.rcu());
    mm.shrink();
    for cache in caches {
        if let Err(left) = mm.kmem_cache_destroy(cache) {
            let name = left.cache.name();
            say(format_args!("{} objects of {name} are left", left.live));
        }
    }
    wrong
}

/// The nodes that readers find.
static NODES: Nodes = Nodes::new();

/// NMIs that all CPUs got.
fn nmis() -> u64 {
    (0..percpu::nr_cpus())
        .map(|cpu| percpu::of(cpu).nmis.load(Ordering::Relaxed))
        .sum()
}
