//! Everything that memory can be used for, all at the same time: three threads on two CPUs do it at random, while pages fail, memory goes off line and
//! comes back, groups get other limits and allocations fail on purpose.
//!
//! Whoever has memory fills it with a byte of his own and finds it when he looks and when he lets go. Some times a second all threads stand still, and the
//! ledger, all words, lists and counts, the groups' charges and the address spaces' tables are looked at; at the end everything is let go, and memory
//! must be as it was at the beginning.

mod check;
mod report;
mod spaces;
mod things;
mod work;

use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, Instant};

use memdesc::filemap::Mapping;
use memdesc::mmap::MmStruct;
use memdesc::zsmalloc::ZsPool;
use memdesc::{
    Balloon, Cache, CacheFlags, Config, DevicePages, MemCgroup, Mm, OwnPages, OwnType, PagePoolOps,
    PageType, Pfn, Shrinker,
};
use memdesc_host::{Host, ram};

use self::check::{Baseline, Checked};
use self::report::Outcome;
use self::spaces::Live;
use self::things::Held;
use self::work::Worker;
use super::disk::Disk;
use crate::cli::{PurposesArgs, Service};
use crate::error::Error;
use crate::rng::Rng;
use crate::{output, progress};

/// That threads claim; one thread more has none of its own.
const CPUS: usize = 2;
const GROUPS: usize = 6;
const CACHES: usize = 6;
const FILE_PAGES: u64 = 8192;
const DEVICE_PAGES: u32 = 512;
/// From one look at everything to the next.
const BETWEEN: Duration = Duration::from_millis(300);

macro_rules! counts {
    ($($name:ident = $text:literal,)*) => {
        #[derive(Clone, Copy)]
        enum Count { $($name),* }
        const COUNTS: &[(Count, &str)] = &[$((Count::$name, $text)),*];
    };
}

counts! {
    Pages = "bare pages, page tables",
    Retyped = "of them given another type",
    Folios = "folios",
    Objects = "objects",
    Vmallocs = "vmalloc areas",
    Stacks = "kernel stacks",
    Compressed = "objects compressed",
    ZsCompacts = "pools compacted",
    NetPools = "network pools made",
    NetPages = "pages and fragments of them",
    Device = "folios of device memory",
    Own = "pages of own types",
    Guards = "guards",
    Ranges = "ranges of one's own",
    Offlines = "ranges off line",
    Onlines = "ranges back on line",
    Inflates = "balloon inflated",
    Deflates = "balloon deflated",
    Caches = "caches made and destroyed",
    Looks = "looks at contents",
    Frees = "frees",
    Deferred = "of them after a grace period",
    Exchanges = "freed by another thread",
    Maps = "areas mapped",
    Unmaps = "areas unmapped",
    Reads = "reads by users",
    Writes = "writes by users",
    Inserts = "drivers' pages mapped",
    Forks = "forks",
    Exits = "exits",
    Pins = "pins",
    Moves = "folios moved",
    Splits = "folios split",
    FileReads = "reads of the file",
    FileWrites = "writes to the file",
    Charged = "spaces to another group",
    Groups = "groups come and gone",
    Limits = "limits set",
    FailRecovered = "pages failed: recovered",
    FailDelayed = "pages failed: delayed",
    FailFailed = "pages failed: failed",
    FailIgnored = "pages failed: ignored",
    SoftOffline = "pages about to fail, emptied",
    Lost = "users who found it out",
    Unpoisoned = "pages unpoisoned",
    NotBad = "pages that were good again",
    Reclaims = "reclaims, compactions",
    Ticks = "ticks, grace periods, reports",
    Reported = "free pages reported",
    Shrinks = "shrinks",
    Censuses = "censuses",
    Refused = "refused: no memory, busy, limit",
}

/// A type of the kernel's own that users may map.
struct Ring {
    byte: u8,
}

/// One that they may not.
struct Note {
    byte: u8,
}

/// Own pages that went back.
static OWN_FREED: AtomicU64 = AtomicU64::new(0);
/// Blocks that network devices have mapped.
static DMA_MAPPED: AtomicI64 = AtomicI64::new(0);

impl OwnType for Ring {
    const NUMBER: u8 = 0;
    const NAME: &'static str = "ring";
    const MAPPABLE: bool = true;

    fn freed(&self) {
        OWN_FREED.fetch_add(1, Ordering::Relaxed);
    }
}

impl OwnType for Note {
    const NUMBER: u8 = 1;
    const NAME: &'static str = "note";

    fn freed(&self) {
        OWN_FREED.fetch_add(1, Ordering::Relaxed);
    }
}

/// The network devices' side.
struct Dma;

impl PagePoolOps for Dma {
    fn dma_map(&self, pfn: Pfn, _order: usize) -> Option<u64> {
        DMA_MAPPED.fetch_add(1, Ordering::Relaxed);
        Some(pfn.phys().0 | 1 << 40)
    }

    fn dma_unmap(&self, _pfn: Pfn, _order: usize, _addr: u64) {
        DMA_MAPPED.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What is wrong, in words; the first of it ends the run.
#[derive(Default)]
struct Wrong {
    number: AtomicU64,
    texts: Mutex<Vec<String>>,
}

impl Wrong {
    fn add(&self, text: String) {
        self.number.fetch_add(1, Ordering::SeqCst);
        let mut texts = lock(&self.texts);
        if texts.len() < 16 {
            texts.push(text);
        }
    }

    fn any(&self) -> bool {
        self.number.load(Ordering::SeqCst) > 0
    }
}

/// What all threads have.
struct Shared<'m> {
    mm: &'m Mm<Host>,
    file: &'m Mapping<'m, Host>,
    spaces: Vec<RwLock<Option<Live<'m>>>>,
    groups: Vec<RwLock<Option<MemCgroup<'m, Host>>>>,
    compressed: &'m [ZsPool<'m>],
    caches: &'m [Cache<'m>],
    rings: &'m OwnPages<'m, Host, Ring>,
    notes: &'m OwnPages<'m, Host, Note>,
    balloon: &'m Balloon<'m, Host>,
    device: RwLock<DevicePages<'m, Host>>,
    /// On its way from one thread to another.
    left: Mutex<Vec<Held>>,
    /// Failed, or about to.
    failed: Mutex<Vec<Pfn>>,
    /// Read by who is at work, written by who wants to see everything stand still.
    gate: RwLock<()>,
    own: AtomicU64,
    asid: AtomicU64,
    counts: Vec<AtomicU64>,
    wrong: &'m Wrong,
    stop: AtomicBool,
    /// Pages of RAM.
    ram: u64,
    /// Of them a thread has so many at most.
    share: u64,
    /// Pages are zero when they are handed out.
    zeroed: bool,
}

impl Shared<'_> {
    fn count(&self, what: Count) {
        self.add(what, 1);
    }

    fn add(&self, what: Count, n: u64) {
        self.counts[what as usize].fetch_add(n, Ordering::Relaxed);
    }

    fn wrong(&self, text: String) {
        self.wrong.add(text);
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed) || self.wrong.any()
    }

    fn left(&self) -> MutexGuard<'_, Vec<Held>> {
        lock(&self.left)
    }

    fn failed(&self) -> MutexGuard<'_, Vec<Pfn>> {
        lock(&self.failed)
    }

    fn own_made(&self) {
        self.own.fetch_add(1, Ordering::Relaxed);
    }

    fn asid(&self) -> u64 {
        self.asid.fetch_add(1, Ordering::Relaxed) % 4000
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn read<T>(lock: &RwLock<T>) -> RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
}

fn try_write<T>(lock: &RwLock<T>) -> Option<RwLockWriteGuard<'_, T>> {
    lock.try_write().ok()
}

/// Of the caches that there are.
fn cache_flags(which: usize) -> CacheFlags {
    match which {
        0 => CacheFlags::EMPTY,
        1 => CacheFlags::HWCACHE_ALIGN,
        2 => CacheFlags::TYPESAFE_BY_RCU,
        3 => CacheFlags::ACCOUNT,
        4 => CacheFlags::NO_SHEAVES,
        _ => CacheFlags::DEBUG,
    }
}

fn config(args: &PurposesArgs) -> Config {
    let on = |service: Service| args.services.has(service);
    Config {
        memory_is_zeroed: true,
        check_pages: true,
        stack_depot: 1 << 20,
        page_owner: 4096,
        kvfree_drain_ns: 50_000_000,
        init_on_alloc: on(Service::InitOnAlloc),
        init_on_free: on(Service::InitOnFree),
        page_poison: on(Service::PagePoison),
        debug_pagealloc: on(Service::DebugPagealloc),
        page_reporting: on(Service::PageReporting),
        page_reporting_order: 6,
        page_reporting_delay_ns: 20_000_000,
        ..Config::default()
    }
}

/// Runs it; the exit code.
pub(crate) fn run(args: &PurposesArgs) -> Result<u8, Error> {
    let outcome = scenario(args)?;
    output::print_found(
        args.run.json,
        || report::object(&outcome),
        || report::report(&outcome),
    );
    Ok(u8::from(!outcome.ok()))
}

fn scenario(args: &PurposesArgs) -> Result<Outcome, Error> {
    let start = Instant::now();
    let pages = args.mib << 8;
    let ranges = [ram(0, pages)];
    let wrong = Arc::new(Wrong::default());
    let heard = wrong.clone();
    let host = Host::builder()
        .memory(&ranges)
        .device(ram(2 * pages, DEVICE_PAGES))
        .cpus(CPUS)
        .floating(2)
        .stacks(args.stacks)
        .on_corruption(move |report| heard.add(format!("corruption: {report}")))
        .build();
    let config = config(args);
    let mm = &Mm::new(host.map_err(Error::Host)?, &config, &ranges).map_err(Error::Init)?;
    let device = mm
        .memremap_pages(Pfn(2 * pages), DEVICE_PAGES)
        .map_err(|why| Error::Usage(why.to_string()))?;
    OWN_FREED.store(0, Ordering::Relaxed);
    DMA_MAPPED.store(0, Ordering::Relaxed);
    let before = Baseline::of(mm);
    let mut outcome = everything(args, start, mm, device, &wrong)?;
    check::at_the_end(mm, &before, &wrong, &mut outcome);
    outcome.guarded = !config.debug_pagealloc || mm.platform().guards_free_pages();
    outcome.seconds = start.elapsed().as_secs_f64();
    outcome.wrong = wrong.number.load(Ordering::SeqCst);
    outcome.texts = std::mem::take(&mut lock(&wrong.texts));
    Ok(outcome)
}

/// All that there is on this machine, and what is done with it; nothing of it is left.
fn everything<'m>(
    args: &PurposesArgs,
    start: Instant,
    mm: &'m Mm<Host>,
    device: DevicePages<'m, Host>,
    wrong: &Wrong,
) -> Result<Outcome, Error> {
    let disk = Disk::new(FILE_PAGES);
    let names = ["plain", "aligned", "typesafe", "account", "bare", "debug"];
    let mut caches = Vec::new();
    for (which, name) in names.iter().enumerate() {
        let (size, flags) = (16 + which * 72, cache_flags(which));
        let cache = mm.kmem_cache_create(name, size, 0, flags, None);
        caches.push(cache.map_err(Error::Alloc)?);
    }
    let mut compressed = Vec::new();
    for name in ["first", "second"] {
        compressed.push(mm.zs_create_pool(name).map_err(Error::Alloc)?);
    }
    let rings = mm.register_type::<Ring>().map_err(Error::Alloc)?;
    let notes = mm.register_type::<Note>().map_err(Error::Alloc)?;
    let outcome = {
        let balloon = Balloon::new(mm).deflate_on_oom();
        let shrinker: &dyn Shrinker = &balloon;
        // SAFETY: it is taken out before the balloon goes.
        let shrinker: &'static dyn Shrinker = unsafe { std::mem::transmute(shrinker) };
        mm.register_shrinker(shrinker);
        let file = Mapping::new(mm, &disk, FILE_PAGES).map_err(Error::Alloc)?;
        let mut spaces = Vec::new();
        for asid in 0..spaces::SPACES as u64 {
            let space = MmStruct::with_top(mm, asid, spaces::TOP).map_err(Error::Alloc)?;
            spaces.push(RwLock::new(Some(Live::new(space))));
        }
        let shared = Shared {
            mm,
            file: &file,
            spaces,
            groups: (0..GROUPS).map(|_| RwLock::new(None)).collect(),
            compressed: &compressed,
            caches: &caches,
            rings: &rings,
            notes: &notes,
            balloon: &balloon,
            device: RwLock::new(device),
            left: Mutex::new(Vec::new()),
            failed: Mutex::new(Vec::new()),
            gate: RwLock::new(()),
            own: AtomicU64::new(0),
            asid: AtomicU64::new(spaces::SPACES as u64),
            counts: COUNTS.iter().map(|_| AtomicU64::new(0)).collect(),
            wrong,
            stop: AtomicBool::new(false),
            ram: u64::from(args.mib) << 8,
            share: (u64::from(args.mib) << 8) / 5,
            zeroed: args.services.has(Service::InitOnAlloc),
        };
        let mut outcome = threads(args, start, &shared);
        check::let_go(shared, &mut outcome);
        mm.unregister_shrinker(shrinker);
        outcome
    };
    for pool in compressed {
        if let Err(left) = mm.zs_destroy_pool(pool) {
            wrong.add(format!("{} compressed objects are left", left.objects));
        }
    }
    if let Err((_, left)) = rings.unregister() {
        wrong.add(format!("{left} descriptors of rings are left"));
    }
    if let Err((_, left)) = notes.unregister() {
        wrong.add(format!("{left} descriptors of notes are left"));
    }
    for cache in caches {
        if let Err(left) = mm.kmem_cache_destroy(cache) {
            let name = left.cache.name().to_owned();
            wrong.add(format!("{} objects of {name} are left", left.live));
        }
    }
    Ok(outcome)
}

fn threads<'m>(args: &PurposesArgs, start: Instant, shared: &Shared<'m>) -> Outcome {
    let mut checked = Checked::default();
    let faults = shared.mm.platform().faults();
    if args.fail_one_in > 0 {
        faults.fail_one_in(args.fail_one_in, args.run.seed);
    }
    std::thread::scope(|scope| {
        for me in 0..=CPUS {
            let mut worker = Worker {
                shared,
                me,
                rng: Rng(args.run.seed.wrapping_mul(16) + me as u64),
                mine: Vec::new(),
                weight: 0,
                queues: Vec::new(),
                pins: Vec::new(),
                turn: me as u64 * 85,
            };
            scope.spawn(move || {
                if me < CPUS {
                    worker.run();
                } else {
                    worker.keep_house();
                }
            });
        }
        let bar = progress::seconds(args.run.quiet, args.seconds, "purposes");
        let mut last = Instant::now();
        while start.elapsed() < Duration::from_secs(args.seconds) && !shared.stopped() {
            std::thread::sleep(Duration::from_millis(20));
            bar.set_position(start.elapsed().as_secs());
            if last.elapsed() >= BETWEEN {
                let _still = shared.gate.write().unwrap_or_else(PoisonError::into_inner);
                checked.look(shared);
                last = Instant::now();
            }
        }
        bar.finish_and_clear();
        shared.stop.store(true, Ordering::Relaxed);
    });
    let (points, failures) = faults.off();
    checked.look(shared);
    Outcome::new(args, shared, &checked, points, failures)
}

/// Types that no page is of once everything is let go.
const PASSING: [PageType; 11] = [
    PageType::Bare,
    PageType::PageTable,
    PageType::File,
    PageType::Anon,
    PageType::NetPool,
    PageType::Zsmalloc,
    PageType::Offline,
    PageType::Poisoned,
    PageType::Yours,
    PageType::Driver,
    PageType::Device,
];
