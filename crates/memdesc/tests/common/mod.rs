//! What the integration tests share: machines to run on, a random number generator, looks at a machine from outside.
#![allow(
    dead_code,
    missing_docs,
    unreachable_pub,
    unused_imports,
    unused_macros
)]

use std::sync::atomic::{AtomicU8, Ordering};

use memdesc::*;
use memdesc_host::Host;
pub use memdesc_selftest::{
    Rng, bytes, cache_free, descriptors, fill, free, kfree, ledger, page, scaled, slabinfo, users,
    vmstat, zones,
};

/// Runs a test on so many values, the same ones every time; the smallest that fails is shown.
pub fn for_cases<S: proptest::strategy::Strategy>(
    cases: usize,
    values: &S,
    test: impl Fn(S::Value),
) {
    use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
    let config = Config {
        cases: cases as u32,
        failure_persistence: None,
        ..Config::default()
    };
    let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    let mut runner = TestRunner::new_with_rng(config, rng);
    let tried = runner.run(values, |value| {
        test(value);
        Ok(())
    });
    if let Err(why) = tried {
        panic!("{why}");
    }
}

/// The default, with the free-page services that the environment names: any test runs with any of them.
///
/// `MEMDESC_FREEPAGE=pagealloc,poison,init_on_free,init_on_alloc,reporting,kfence`, or `all`.
pub fn base_config() -> Config {
    let mut config = Config::default();
    let wanted = std::env::var("MEMDESC_FREEPAGE").unwrap_or_default();
    for name in wanted.split(',').filter(|name| !name.is_empty()) {
        match name {
            "pagealloc" => config.debug_pagealloc = true,
            "poison" => config.page_poison = true,
            "init_on_free" => config.init_on_free = true,
            "init_on_alloc" => config.init_on_alloc = true,
            "reporting" => report_small(&mut config),
            "kfence" => guard_some(&mut config),
            "all" => {
                config.debug_pagealloc = true;
                config.page_poison = true;
                config.init_on_free = true;
                config.init_on_alloc = true;
                report_small(&mut config);
            }
            other => panic!("MEMDESC_FREEPAGE: there is no {other:?}"),
        }
    }
    config
}

/// Reporting as a machine of a few MiB can have it: at every tick, and of smaller blocks.
pub fn report_small(config: &mut Config) {
    config.page_reporting = true;
    config.page_reporting_order = 4;
    config.page_reporting_delay_ns = 0;
}

/// A few of the objects are guarded, wherever they are allocated.
pub fn guard_some(config: &mut Config) {
    config.kfence_objects = 24;
    config.kfence_sample = 5;
}

/// A machine to test on.
#[derive(Clone, Debug)]
pub struct Machine {
    pub name: &'static str,
    pub ranges: Vec<MemRange>,
    pub config: Config,
    pub cpus: usize,
    pub nodes: usize,
}

pub fn range(start: u32, end: u32, node: u8) -> MemRange {
    MemRange {
        start: Pfn(start).phys(),
        end: Pfn(end).phys(),
        node,
    }
}

impl Machine {
    pub fn new(name: &'static str, ranges: &[MemRange]) -> Machine {
        Machine {
            name,
            ranges: ranges.to_vec(),
            config: Config {
                memory_is_zeroed: true,
                ..base_config()
            },
            cpus: 1,
            nodes: 1,
        }
    }

    /// One range of so many pages from 0 on.
    pub fn flat(pages: u32) -> Machine {
        Machine::new("flat", &[range(0, pages, 0)])
    }

    /// Free pages are inaccessible.
    pub fn guarded(mut self) -> Machine {
        self.config.debug_pagealloc = true;
        self
    }

    /// No object is guarded, whatever the environment says: for what is about bytes beside objects, or counts pages.
    pub fn unsampled(mut self) -> Machine {
        self.config.kfence_objects = 0;
        self
    }

    pub fn cpus(mut self, cpus: usize) -> Machine {
        self.cpus = cpus;
        self
    }

    pub fn host(&self) -> memdesc_host::HostBuilder {
        Host::builder()
            .memory(&self.ranges)
            .cpus(self.cpus)
            .nodes(self.nodes)
    }

    pub fn boot(&self) -> Mm<Host> {
        self.boot_on(self.host().build().unwrap())
    }

    pub fn boot_on<P: Platform>(&self, platform: P) -> Mm<P> {
        Mm::new(platform, &self.config, &self.ranges).unwrap()
    }

    /// Is this page RAM?
    pub fn is_ram(&self, pfn: u32) -> bool {
        self.ranges
            .iter()
            .any(|r| Pfn(pfn).phys() >= r.start && Pfn(pfn).phys() < r.end)
    }

    pub fn end(&self) -> u32 {
        self.ranges
            .iter()
            .map(|r| (r.end.0 >> PAGE_SHIFT) as u32)
            .max()
            .unwrap()
    }

    pub fn node_of(&self, pfn: u32) -> usize {
        let range = self
            .ranges
            .iter()
            .find(|r| Pfn(pfn).phys() >= r.start && Pfn(pfn).phys() < r.end);
        usize::from(range.unwrap().node)
    }

    pub fn zone_of(&self, pfn: Pfn) -> ZoneType {
        let at = pfn.phys();
        if at < self.config.dma_limit {
            ZoneType::Dma
        } else if self.config.movable_from.is_some_and(|m| at >= m) {
            ZoneType::Movable
        } else if at < self.config.dma32_limit {
            ZoneType::Dma32
        } else {
            ZoneType::Normal
        }
    }

    /// Pages that a zone keeps from requests that could have been served from `highest`.
    pub fn lowmem_reserve(&self, zones: &[ZoneView], zone: &ZoneView, highest: ZoneType) -> u64 {
        let ratio = self
            .config
            .lowmem_reserve_ratio
            .get(zone.kind as usize)
            .copied()
            .unwrap_or(0);
        let above: u64 = zones
            .iter()
            .filter(|z| z.node == zone.node && z.kind > zone.kind && z.kind <= highest)
            .map(|z| z.managed)
            .sum();
        above.checked_div(ratio).unwrap_or(0)
    }
}

const MIB: u64 = 1 << 20;

/// Machines of different shapes, all small.
pub fn machines() -> Vec<Machine> {
    let p = |mib: u32| mib * 256;
    if cfg!(miri) {
        return vec![Machine::new("unaligned", &[range(3, p(8) - 5, 0)])];
    }
    let mut zones = Machine::new("zones", &[range(0, p(64), 0)]);
    zones.config.dma_limit = PhysAddr(4 * MIB);
    zones.config.dma32_limit = PhysAddr(24 * MIB);
    let mut nodes = Machine::new(
        "two nodes",
        &[range(0, p(32) + 77, 0), range(p(32) + 77, p(64), 1)],
    );
    nodes.nodes = 2;
    nodes.cpus = 2;
    let mut movable = Machine::new("movable", &[range(1, p(48), 0)]);
    movable.config.movable_from = Some(PhysAddr(24 * MIB));
    movable.config.dma_limit = PhysAddr(2 * MIB);
    let unaligned = Machine::new("unaligned", &[range(3, p(40) - 5, 0)]);
    let holes = Machine::new(
        "holes",
        &[
            range(0, 5000, 0),
            range(5120, 9000, 0),
            range(9001, 9003, 0),
            range(12289, p(64) + 7, 0),
        ],
    );
    let adjacent = Machine::new(
        "adjacent ranges",
        &[
            range(p(32), p(40), 0),
            range(0, p(32), 0),
            range(p(40), p(44), 0),
        ],
    );
    vec![zones, nodes, movable, unaligned, holes, adjacent]
}

/// What a child process of ours dies of when it touches this address; 0 if it lives. Pages hold afterwards what they held.
#[cfg(not(miri))]
pub fn touch(at: *mut u8, write: bool) -> i32 {
    // SAFETY: the child does nothing but touch memory and end, and so needs no lock that another thread had.
    unsafe {
        let child = libc::fork();
        assert!(child >= 0);
        if child == 0 {
            libc::prctl(libc::PR_SET_DUMPABLE, 0);
            libc::signal(libc::SIGSEGV, libc::SIG_DFL);
            libc::signal(libc::SIGBUS, libc::SIG_DFL);
            if write {
                // Physical memory is the parent's too. The processor writes here whatever it finds, and nothing was read before.
                let byte = AtomicU8::from_ptr(at);
                let _ = byte.compare_exchange(1, 1, Ordering::SeqCst, Ordering::SeqCst);
            } else {
                at.read_volatile();
            }
            libc::_exit(0);
        }
        let mut status = 0;
        assert_eq!(libc::waitpid(child, &mut status, 0), child);
        if libc::WIFSIGNALED(status) {
            libc::WTERMSIG(status)
        } else {
            0
        }
    }
}

/// Everything was freed: gives back what is kept for later, and checks that all memory came back and merged.
#[track_caller]
pub fn teardown<P: Platform>(machine: &Machine, mm: &Mm<P>) {
    mm.shrink();
    mm.page_report().unwrap();
    let after = ledger(mm);
    assert_eq!(users(&after), 0, "{after:#?}");
    assert_eq!(after.pcp, 0);
    assert_eq!(mm.event(Event::AllocOnFree), 0);
    mm.slabinfo(|c| assert!(c.metadata || c.num_slabs == 0, "{c:?}"));
    let free_blocks = merged(machine, mm);
    // Each free block has one descriptor, each slab has one, and there are no others: none was lost.
    let (mut descriptors, mut slabs) = (0, 0);
    mm.slabinfo(|c| {
        slabs += c.num_slabs;
        descriptors += c.active_objs;
    });
    assert_eq!(
        descriptors,
        free_blocks + slabs,
        "{free_blocks} free blocks, {slabs} slabs"
    );
}

/// No two free buddies are left apart: nothing can be merged any further. Per-CPU lists are empty. Says how many free blocks
/// there are, untouched memory not counted.
#[track_caller]
pub fn merged<P: Platform>(machine: &Machine, mm: &Mm<P>) -> u64 {
    let mut blocks = 0;
    let mut at = 0;
    while at < machine.end() {
        let (head, order, memory) = mm.lookup(Pfn(at));
        if matches!(memory, Memory::Free { in_pcp: false }) && head == Pfn(at) {
            let buddy = head.buddy(order);
            if order < MAX_ORDER {
                let (h, o, m) = mm.lookup(buddy);
                let apart = (h, o) == (buddy, order) && matches!(m, Memory::Free { in_pcp: false });
                let same = machine.is_ram(buddy.0)
                    && machine.node_of(buddy.0) == machine.node_of(at)
                    && machine.zone_of(buddy) == machine.zone_of(head);
                assert!(
                    !(apart && same),
                    "{head:?} and {buddy:?} are free, order {order}, and were not merged"
                );
            }
            blocks += 1;
            at += 1 << order;
        } else {
            at += 1;
        }
    }
    blocks
}

/// Of each page: who has it, by a number of the test's own; 0 for nobody.
#[derive(Clone, Debug, Default)]
pub struct OwnerMap(Vec<u32>);

impl OwnerMap {
    pub fn new(pages: u32) -> OwnerMap {
        OwnerMap(vec![0; pages as usize])
    }

    #[track_caller]
    pub fn take(&mut self, pfn: Pfn, order: usize, who: u32) {
        for (i, page) in self.0[pfn.0 as usize..][..1 << order]
            .iter_mut()
            .enumerate()
        {
            assert_eq!(
                *page, 0,
                "page {i} of {pfn:?} order {order} belongs to somebody"
            );
            *page = who;
        }
    }

    #[track_caller]
    pub fn give(&mut self, pfn: Pfn, order: usize, who: u32) {
        for page in &mut self.0[pfn.0 as usize..][..1 << order] {
            assert_eq!(std::mem::take(page), who);
        }
    }

    pub fn owner(&self, pfn: u32) -> u32 {
        self.0[pfn as usize]
    }

    pub fn held(&self) -> u64 {
        self.0.iter().filter(|&&p| p != 0).count() as u64
    }
}

/// What a block that the test has should look like.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    Bare,
    File,
    Anon,
    Table,
    Large,
}

impl Kind {
    pub fn page_type(self) -> PageType {
        match self {
            Kind::Bare => PageType::Bare,
            Kind::File => PageType::File,
            Kind::Anon => PageType::Anon,
            Kind::Table => PageType::PageTable,
            Kind::Large => PageType::LargeKmalloc,
        }
    }

    pub fn is(self, memory: &Memory) -> bool {
        match self {
            Kind::Bare => matches!(memory, Memory::Bare),
            Kind::File => matches!(memory, Memory::File(_)),
            Kind::Anon => matches!(memory, Memory::Anon(_)),
            Kind::Table => matches!(memory, Memory::PageTable(_)),
            Kind::Large => matches!(memory, Memory::LargeKmalloc),
        }
    }
}

/// A block that the test has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Block {
    pub pfn: Pfn,
    pub order: usize,
    pub kind: Kind,
    pub id: u32,
}

impl Block {
    /// Every page of it leads to it, in the right type.
    #[track_caller]
    pub fn check<P: Platform>(&self, mm: &Mm<P>) {
        for page in 0..1 << self.order {
            let (head, order, memory) = mm.lookup(self.pfn.add(page));
            assert_eq!(
                (head, order),
                (self.pfn, self.order),
                "page {page} of {self:?}"
            );
            assert!(
                self.kind.is(&memory),
                "page {page} of {self:?} is {memory:?}"
            );
        }
    }
}

/// The plain model of a page allocator: who has what.
#[derive(Debug)]
pub struct Pages {
    pub machine: Machine,
    pub owners: OwnerMap,
    pub live: Vec<Block>,
    next: u32,
}

impl Pages {
    pub fn new(machine: &Machine) -> Pages {
        Pages {
            machine: machine.clone(),
            owners: OwnerMap::new(machine.end()),
            live: Vec::new(),
            next: 0,
        }
    }

    /// The allocator handed this out.
    #[track_caller]
    pub fn got<P: Platform>(&mut self, mm: &Mm<P>, pfn: Pfn, order: usize, kind: Kind) {
        self.next += 1;
        let block = Block {
            pfn,
            order,
            kind,
            id: self.next,
        };
        assert!(pfn.is_aligned(order), "{block:?}");
        assert!(
            (pfn.0..pfn.0 + (1 << order)).all(|p| self.machine.is_ram(p)),
            "{block:?} is not RAM"
        );
        let place = |p: u32| (self.machine.node_of(p), self.machine.zone_of(Pfn(p)));
        assert_eq!(
            place(pfn.0),
            place(pfn.0 + (1 << order) - 1),
            "{block:?} crosses zones"
        );
        self.owners.take(pfn, order, block.id);
        block.check(mm);
        self.live.push(block);
    }

    /// Frees the live block with this place in the list.
    #[track_caller]
    pub fn free<P: Platform>(&mut self, mm: &Mm<P>, index: usize) {
        let block = self.live.swap_remove(index);
        block.check(mm);
        self.owners.give(block.pfn, block.order, block.id);
        free(mm, block.pfn);
        let (_, _, memory) = mm.lookup(block.pfn);
        // Freed pages may have become a slab of descriptors at most in another CPU's hands; here nobody else is at it.
        assert!(
            matches!(memory, Memory::Free { .. }),
            "{block:?} was freed and is {memory:?}"
        );
    }

    pub fn free_all<P: Platform>(&mut self, mm: &Mm<P>, rng: &mut Rng) {
        while !self.live.is_empty() {
            let index = rng.below(self.live.len());
            self.free(mm, index);
        }
    }

    /// The whole machine, page by page, against the model.
    #[track_caller]
    pub fn check<P: Platform>(&self, mm: &Mm<P>) {
        let mut by_type = [0; PageType::COUNT];
        for block in &self.live {
            block.check(mm);
            by_type[block.kind.page_type() as usize] += 1u64 << block.order;
        }
        let ledger = ledger(mm);
        assert_eq!(ledger.by_type, by_type);
        let mut metadata = 0;
        for pfn in 0..self.machine.end() {
            let (head, order, memory) = mm.lookup(Pfn(pfn));
            if !self.machine.is_ram(pfn) {
                assert!(
                    matches!(memory, Memory::Hole),
                    "{pfn:#x} is a hole and says {memory:?}"
                );
                continue;
            }
            assert!(head.0 <= pfn && pfn - head.0 < 1 << order);
            if self.owners.owner(pfn) == 0 {
                match memory {
                    Memory::Free { .. } | Memory::Untouched => {}
                    Memory::Slab(_) | Memory::Reserved(Reserved::MemMap) => metadata += 1,
                    _ => panic!("{pfn:#x} was not handed out and is {memory:?}"),
                }
            }
        }
        assert_eq!(metadata, ledger.metadata);
    }
}

/// All checks of a debug cache.
pub const ALL: CacheFlags = CacheFlags::DEBUG;

pub type ReportFn = dyn Fn(&[(Pfn, usize)]) -> Result<Reported, NotReported> + Send + Sync;
/// A function that hears of blocks that go into a balloon or come out of it.
pub type OnBalloon = dyn Fn(&[(Pfn, usize)], BalloonOp) + Send + Sync;

/// A host with hooks of the test's own before it.
pub struct Hooked {
    pub host: Host,
    /// Called for pages that come back.
    pub on_free: Option<Box<dyn Fn(Pfn, usize) + Send + Sync>>,
    /// Called for what goes into a balloon or comes out of it.
    pub on_balloon: Option<Box<OnBalloon>>,
    /// Called for direct reclaim.
    pub on_reclaim: Option<Box<dyn Fn(ReclaimRequest) -> usize + Send + Sync>>,
    /// What it answers.
    pub keeps_free_contents: bool,
    /// Called for free blocks that are reported.
    pub on_report: Option<Box<ReportFn>>,
    /// Each time background reclaim was woken: node and order.
    pub wakes: std::sync::Mutex<Vec<(usize, usize)>>,
}

impl Hooked {
    pub fn new(host: Host) -> Hooked {
        Hooked {
            host,
            on_free: None,
            on_balloon: None,
            on_reclaim: None,
            on_report: None,
            keeps_free_contents: true,
            wakes: Default::default(),
        }
    }
}

// SAFETY: everything that the promises are about is the host's, which keeps them.
unsafe impl Platform for Hooked {
    fn direct_map(&self) -> *mut u8 {
        self.host.direct_map()
    }
    fn nr_cpus(&self) -> usize {
        self.host.nr_cpus()
    }
    fn pin(&self) -> usize {
        self.host.pin()
    }
    unsafe fn unpin(&self, cpu: usize) {
        // SAFETY: the caller's promise.
        unsafe { self.host.unpin(cpu) }
    }
    fn cpu_to_node(&self, cpu: usize) -> usize {
        self.host.cpu_to_node(cpu)
    }
    fn light_barrier(&self) {
        self.host.light_barrier();
    }
    fn heavy_barrier(&self) {
        self.host.heavy_barrier();
    }
    fn relax(&self, round: u32) {
        self.host.relax(round);
    }
    fn try_pin(&self) -> Option<usize> {
        self.host.try_pin()
    }
    fn park(&self, word: &std::sync::atomic::AtomicU32, value: u32) {
        self.host.park(word, value);
    }
    fn unpark(&self, word: &std::sync::atomic::AtomicU32) {
        self.host.unpark(word);
    }
    fn unpark_all(&self, word: &std::sync::atomic::AtomicU32) {
        self.host.unpark_all(word);
    }
    type Rcu = memdesc_host::HostRcu;
    fn rcu(&self) -> &Self::Rcu {
        self.host.rcu()
    }
    fn context(&self) -> Context {
        self.host.context()
    }
    fn with_lockdep(&self, f: &mut dyn FnMut(&lockdep::Lockdep, &lockdep::Task)) {
        self.host.with_lockdep(f);
    }
    fn reclaim(&self, request: ReclaimRequest) -> usize {
        self.on_reclaim.as_ref().map_or(0, |f| f(request))
    }
    fn wake_reclaim(&self, node: usize, order: usize) {
        self.wakes.lock().unwrap().push((node, order));
    }
    fn pages_allocated(&self, pfn: Pfn, order: usize) {
        self.host.pages_allocated(pfn, order);
    }
    fn pages_freed(&self, pfn: Pfn, order: usize) {
        self.host.pages_freed(pfn, order);
        if let Some(f) = &self.on_free {
            f(pfn, order);
        }
    }
    fn kernel_map_pages(&self, pfn: Pfn, order: usize, enable: bool) {
        self.host.kernel_map_pages(pfn, order, enable);
    }
    fn report_free_pages(&self, blocks: &[(Pfn, usize)]) -> Result<Reported, NotReported> {
        match &self.on_report {
            Some(f) => f(blocks),
            None => self.host.report_free_pages(blocks),
        }
    }
    fn keeps_free_contents(&self) -> bool {
        self.keeps_free_contents
    }
    fn taken_over(&self, config: &Config, words: PageWords) {
        self.host.taken_over(config, words);
    }
    fn balloon_pages(&self, blocks: &[(Pfn, usize)], op: BalloonOp) {
        self.host.balloon_pages(blocks, op);
        if let Some(f) = &self.on_balloon {
            f(blocks, op);
        }
    }
    fn should_fail(&self, point: FaultPoint) -> bool {
        self.host.should_fail(point)
    }
    fn current_memcg(&self) -> u16 {
        self.host.current_memcg()
    }
    fn current_reserve(&self) -> u16 {
        self.host.current_reserve()
    }
    fn now(&self) -> u64 {
        self.host.now()
    }
    fn save_stack(&self, frames: &mut [usize]) -> usize {
        self.host.save_stack(frames)
    }
    fn symbol(&self, address: usize, out: &mut dyn std::fmt::Write) -> std::fmt::Result {
        self.host.symbol(address, out)
    }
    fn corruption(&self, report: &Report<'_>) {
        self.host.corruption(report);
    }
}

/// The memory manager, for hooks that are made before it.
pub struct Later<P: Platform>(std::sync::Arc<std::sync::atomic::AtomicPtr<Mm<P>>>);

impl<P: Platform> Clone for Later<P> {
    fn clone(&self) -> Self {
        Later(self.0.clone())
    }
}

impl<P: Platform> Default for Later<P> {
    fn default() -> Self {
        Later(Default::default())
    }
}

impl<P: Platform> Later<P> {
    /// `mm` stays where it is as long as hooks may run.
    pub fn set(&self, mm: &Mm<P>) {
        self.0.store(
            (&raw const *mm).cast_mut(),
            std::sync::atomic::Ordering::Release,
        );
    }

    /// Hooks do without it from here on.
    pub fn set_none(&self) {
        self.0
            .store(std::ptr::null_mut(), std::sync::atomic::Ordering::Release);
    }

    pub fn get(&self) -> Option<&Mm<P>> {
        // SAFETY: null or set by `set` to what stays there; only shared references to it exist.
        unsafe { self.0.load(std::sync::atomic::Ordering::Acquire).as_ref() }
    }
}

/// A report that was made, kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    pub what: Corruption,
    pub cache: Option<String>,
    pub pfn: Pfn,
    pub kind: PageType,
    pub address: usize,
    pub byte: Option<(isize, u8, u8)>,
    /// File and line.
    pub allocated: Option<(String, u32)>,
    pub freed: Option<(String, u32)>,
    pub caller: (String, u32),
    pub text: String,
}

/// All reports of a host.
#[derive(Clone, Debug, Default)]
pub struct Reports(std::sync::Arc<std::sync::Mutex<Vec<Seen>>>);

impl Reports {
    pub fn on(&self, builder: memdesc_host::HostBuilder) -> memdesc_host::HostBuilder {
        let all = self.0.clone();
        builder.on_corruption(move |r| {
            let place = |l: &std::panic::Location<'_>| (l.file().to_owned(), l.line());
            all.lock().unwrap().push(Seen {
                what: r.what,
                cache: r.cache.map(str::to_owned),
                pfn: r.pfn,
                kind: r.word.kind(),
                address: r.address,
                byte: r.byte,
                allocated: r.allocated.map(|t| place(t.location)),
                freed: r.freed.map(|t| place(t.location)),
                caller: place(r.caller),
                text: r.to_string(),
            });
        })
    }

    /// What was reported since the last call.
    pub fn take(&self) -> Vec<Seen> {
        std::mem::take(&mut self.0.lock().unwrap())
    }

    /// The one report since the last call.
    #[track_caller]
    pub fn one(&self) -> Seen {
        let all = self.take();
        assert_eq!(all.len(), 1, "{all:#?}");
        all.into_iter().next().unwrap()
    }
}
