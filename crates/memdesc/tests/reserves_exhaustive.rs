//! Reserves by exhaustion: for small demands every order of requests and frees within the charge is tried, on the real memory manager with all other memory
//! taken. Every entitled request succeeds, every other fails, and one page less than an exact bound is too little.
//!
//! A state is what the choice of the next object depends on: of each kind of object how many slabs are empty, how many are full, and the partly used ones,
//! in the order in which they became so. It is read from outside: which page each live object lies in, and what the memory map says of that page. The search
//! goes breadth first, each state reached by playing the path to it from an empty store, and ends when no state leads to a new one: histories of
//! any length are in it.
//!
//! `MEMDESC_EXHAUSTIVE=n` searches larger demands: `n` more objects, `n` KiB more.
#![allow(missing_docs)]

mod common;
#[path = "common/reserves.rs"]
mod shared;

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ptr::NonNull;

use common::*;
use memdesc::gfp::*;
use memdesc::*;
use memdesc_host::Host;
use shared::*;

/// What is asked for.
#[derive(Clone, Copy, Debug)]
enum What<'a> {
    Object(&'a Cache<'a>),
    Kmalloc(usize),
    Pages(usize),
}

/// A kind of request.
#[derive(Clone, Copy, Debug)]
struct Request<'a> {
    /// Of which reserve.
    of: usize,
    what: What<'a>,
    /// What it counts in the demand.
    bytes: u64,
    /// How many lie in a block.
    per_block: usize,
    order: usize,
}

/// What is searched.
struct Case<'a> {
    mm: &'a Mm<Host>,
    reserves: &'a [Reserve<'a, Host>],
    /// Of each reserve: bytes.
    demands: &'a [u64],
    /// Of all together.
    cap: u64,
    requests: &'a [Request<'a>],
}

/// The blocks that requests of one kind have.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Default)]
struct Blocks {
    empty: u8,
    full: u8,
    /// Objects in the partly used ones; the first became so last.
    partial: Vec<u8>,
}

type State = Vec<Blocks>;

#[derive(Clone, Copy, Debug)]
enum Op {
    Take(usize),
    /// One from a full block.
    FreeFull(usize),
    /// One from this block of the partly used ones.
    FreePartial(usize, usize),
    Tick,
}

struct Block {
    request: usize,
    head: Pfn,
    live: Vec<NonNull<u8>>,
    /// When it became empty, partly used, or full.
    since: u64,
}

/// A store on its way from empty.
struct Run<'a> {
    case: &'a Case<'a>,
    blocks: Vec<Block>,
    used: Vec<u64>,
    now: u64,
}

impl<'a> Run<'a> {
    fn new(case: &'a Case<'a>) -> Run<'a> {
        Run {
            case,
            blocks: Vec::new(),
            used: vec![0; case.reserves.len()],
            now: 0,
        }
    }

    fn fits(&self, request: &Request<'_>) -> bool {
        self.used[request.of] + request.bytes <= self.case.demands[request.of]
            && self.used.iter().sum::<u64>() + request.bytes <= self.case.cap
    }

    fn ask(&self, request: &Request<'_>) -> Result<NonNull<u8>, AllocError> {
        let reserve = &self.case.reserves[request.of];
        match request.what {
            What::Object(cache) => reserve.kmem_cache_alloc(cache, GFP_ATOMIC),
            What::Kmalloc(size) => reserve.kmalloc(size, GFP_ATOMIC),
            What::Pages(order) => {
                let pfn = reserve.alloc_pages(GFP_ATOMIC, order)?;
                Ok(page(self.case.mm, pfn))
            }
        }
    }

    /// Who asks for more than was agreed gets nothing.
    fn refuses(&self, request: &Request<'_>) {
        let got = self.ask(request);
        assert_eq!(got.err(), Some(AllocError::ReserveLimit), "{request:?}");
    }

    fn take(&mut self, nth: usize) -> Result<(), AllocError> {
        let request = &self.case.requests[nth];
        let object = self.ask(request)?;
        let mm = self.case.mm;
        assert!(mm.is_from_reserve(object.as_ptr()));
        let (head, order, memory) = mm.lookup(mm.virt_to_pfn(object.as_ptr()));
        assert_eq!(order, request.order, "{request:?} is in {memory:?}");
        self.used[request.of] += request.bytes;
        self.now += 1;
        // An empty slab may have become this block.
        self.blocks
            .retain(|b| b.head != head || b.request == nth || !b.live.is_empty());
        self.forget_idle();
        let at = match self.blocks.iter().position(|b| b.head == head) {
            Some(at) => at,
            None => {
                self.blocks.push(Block {
                    request: nth,
                    head,
                    live: Vec::new(),
                    since: self.now,
                });
                self.blocks.len() - 1
            }
        };
        let block = &mut self.blocks[at];
        assert_eq!(block.request, nth, "two kinds in one block");
        assert!(!block.live.contains(&object), "handed out twice");
        let before = share(block.live.len(), request.per_block);
        block.live.push(object);
        assert!(block.live.len() <= request.per_block);
        if share(block.live.len(), request.per_block) != before {
            block.since = self.now;
        }
        Ok(())
    }

    /// Blocks that are nobody's slab any more.
    fn forget_idle(&mut self) {
        let mm = self.case.mm;
        self.blocks.retain(|b| {
            !b.live.is_empty()
                || (matches!(mm.lookup(b.head).2, Memory::Slab(_))
                    && mm.page_is_from_reserve(b.head))
        });
    }

    fn free(&mut self, block: usize) {
        let mm = self.case.mm;
        self.now += 1;
        let block = &mut self.blocks[block];
        let request = &self.case.requests[block.request];
        let before = share(block.live.len(), request.per_block);
        let object = block.live.pop().unwrap();
        match request.what {
            What::Object(cache) => cache_free(mm, cache, object),
            What::Kmalloc(_) => kfree(mm, object),
            What::Pages(_) => free(mm, mm.virt_to_pfn(object.as_ptr())),
        }
        if share(block.live.len(), request.per_block) != before {
            block.since = self.now;
        }
        self.used[request.of] -= request.bytes;
        self.forget_idle();
    }

    /// Its blocks of a kind that have `live` objects in some sense, the last to become so first.
    fn of(&self, request: usize, what: u8) -> Vec<usize> {
        let k = self.case.requests[request].per_block;
        let mut found: Vec<usize> = (0..self.blocks.len())
            .filter(|&b| self.blocks[b].request == request)
            .filter(|&b| share(self.blocks[b].live.len(), k) == what)
            .collect();
        found.sort_by_key(|&b| std::cmp::Reverse(self.blocks[b].since));
        found
    }

    fn play(&mut self, op: Op) -> Result<(), AllocError> {
        match op {
            Op::Take(request) => return self.take(request),
            Op::FreeFull(request) => self.free(self.of(request, 2)[0]),
            Op::FreePartial(request, nth) => self.free(self.of(request, 1)[nth]),
            Op::Tick => {
                self.case.mm.tick();
                self.forget_idle();
            }
        }
        Ok(())
    }

    fn state(&self) -> State {
        let of = |request| Blocks {
            empty: self.of(request, 0).len() as u8,
            full: self.of(request, 2).len() as u8,
            partial: self
                .of(request, 1)
                .iter()
                .map(|&b| self.blocks[b].live.len() as u8)
                .collect(),
        };
        (0..self.case.requests.len()).map(of).collect()
    }

    /// Back to an empty store.
    fn end(mut self) {
        while let Some(block) = self.blocks.iter().position(|b| !b.live.is_empty()) {
            self.free(block);
        }
        self.case.mm.tick();
    }
}

/// Empty, partly used, full.
fn share(live: usize, per_block: usize) -> u8 {
    match live {
        0 => 0,
        n if n == per_block => 2,
        _ => 1,
    }
}

/// What a search found.
#[derive(Clone, Copy, Debug, Default)]
struct Found {
    states: usize,
    transitions: usize,
    /// The most blocks of each order that hold anything.
    blocks: [u64; MAX_ORDER + 1],
    /// The most pages.
    pages: u64,
}

/// All states that can be reached. `Err`: the path to a request that failed.
fn search(case: &Case<'_>) -> Result<Found, Vec<Op>> {
    let mut found = Found::default();
    let mut nodes: Vec<(usize, Op)> = vec![(0, Op::Tick)];
    let start: State = vec![Blocks::default(); case.requests.len()];
    let mut seen: HashMap<State, usize> = HashMap::from([(start.clone(), 0)]);
    let mut states = vec![start];
    let mut at = 0;
    while at < nodes.len() {
        let mut path = Vec::new();
        let mut node = at;
        while node != 0 {
            path.push(nodes[node].1);
            node = nodes[node].0;
        }
        path.reverse();
        let mut ops = Vec::new();
        for (request, blocks) in states[at].iter().enumerate() {
            ops.push(Op::Take(request));
            if blocks.full > 0 {
                ops.push(Op::FreeFull(request));
            }
            ops.extend((0..blocks.partial.len()).map(|nth| Op::FreePartial(request, nth)));
        }
        ops.push(Op::Tick);
        for op in ops {
            let mut run = Run::new(case);
            for &op in &path {
                // What worked once works again.
                run.play(op).unwrap();
            }
            assert_eq!(run.state(), states[at], "the path leads elsewhere");
            if let Op::Take(request) = op
                && !run.fits(&case.requests[request])
            {
                run.refuses(&case.requests[request]);
                run.end();
                continue;
            }
            found.transitions += 1;
            if run.play(op).is_err() {
                run.end();
                path.push(op);
                return Err(path);
            }
            let state = run.state();
            if let Entry::Vacant(new) = seen.entry(state.clone()) {
                new.insert(nodes.len());
                nodes.push((at, op));
                let mut blocks = [0; MAX_ORDER + 1];
                for block in run.blocks.iter().filter(|b| !b.live.is_empty()) {
                    blocks[case.requests[block.request].order] += 1;
                }
                let pages = blocks.iter().enumerate().map(|(o, n)| n << o).sum();
                found.pages = found.pages.max(pages);
                for (most, n) in found.blocks.iter_mut().zip(blocks) {
                    *most = n.max(*most);
                }
                for (reserve, &used) in case.reserves.iter().zip(&run.used) {
                    assert_eq!(view(reserve).usage, used, "{state:?}");
                }
                states.push(state);
            }
            run.end();
        }
        at += 1;
    }
    found.states = states.len();
    Ok(found)
}

/// How many of these lie in a block, and its order.
fn per_block(mm: &Mm<Host>, demand: impl Fn(usize) -> Demand<'static>) -> (usize, usize) {
    let pages = |n| mm.reserve_estimate(demand(n)).unwrap().pages();
    let one = pages(1);
    let k = (1..).find(|&n| pages(n + 1) > one).unwrap();
    (k, one.trailing_zeros() as usize)
}

/// Larger demands by this.
fn more() -> usize {
    let more = std::env::var("MEMDESC_EXHAUSTIVE").ok();
    more.and_then(|n| n.parse().ok()).unwrap_or(0)
}

fn boot() -> (Machine, Mm<Host>) {
    let machine = Machine::flat(1024).unsampled();
    let mm = machine.boot();
    (machine, mm)
}

/// Searches one demand by itself: with its bound, or with so many pages.
fn alone<'a>(
    mm: &'a Mm<Host>,
    demand: Demand<'_>,
    bytes: u64,
    requests: &[Request<'a>],
    pages: Option<u64>,
) -> Result<Found, Vec<Op>> {
    let reserve = mm.reserve("alone", demand).unwrap();
    reserve.set_pages(pages).unwrap();
    reserve.connect(None).unwrap();
    let bound = view(&reserve).pages;
    assert_eq!(
        (view(&reserve).held_pages, view(&reserve).limit),
        (bound, bytes)
    );
    let adversary = Adversary::take_all(mm);
    let found = search(&Case {
        mm,
        reserves: std::slice::from_ref(&reserve),
        demands: &[bytes],
        cap: u64::MAX,
        requests,
    });
    adversary.check(mm);
    assert_eq!((view(&reserve).usage, mm.set_aside_pages()), (0, bound));
    adversary.give_all(mm);
    down(reserve);
    found
}

/// One demand whose bound is exact.
fn exact<'a>(
    mm: &'a Mm<Host>,
    name: &str,
    demand: Demand<'_>,
    bytes: u64,
    request: Request<'a>,
) -> Found {
    let bound = mm.reserve_estimate(demand).unwrap().pages();
    let found = alone(mm, demand, bytes, &[request], None);
    let found = found.unwrap_or_else(|path| panic!("{name}: {path:?}"));
    assert_eq!(
        found.pages, bound,
        "{name}: the bound is not what is needed"
    );
    // Of whole blocks there is one fewer.
    let less = alone(mm, demand, bytes, &[request], Some(bound - 1));
    assert!(
        less.is_err(),
        "{name}: {bound} pages are more than it takes"
    );
    found
}

#[derive(Default)]
struct Sum {
    cases: usize,
    states: usize,
    transitions: usize,
}

impl Sum {
    fn add(&mut self, found: Found) {
        self.cases += 1;
        self.states += found.states;
        self.transitions += found.transitions;
    }

    #[track_caller]
    fn print(&self, what: &str, expected: (usize, usize, usize)) {
        let sum = (self.cases, self.states, self.transitions);
        println!(
            "{what}: {} demands, {} states, {} transitions",
            sum.0, sum.1, sum.2
        );
        if more() == 0 {
            assert_eq!(sum, expected, "the search is not what it was");
        }
    }
}

#[test]
fn objects_of_a_cache() {
    let (machine, mm) = boot();
    let mut sum = Sum::default();
    for (k, size) in [(1, 4000), (2, 2000), (3, 1300), (4, 1000)] {
        let name = format!("of {size}");
        let flags = CacheFlags::EMPTY;
        let cache = mm.kmem_cache_create(&name, size, 0, flags, None).unwrap();
        for count in 1..=8 + more() {
            let demand = Demand::Objects {
                cache: &cache,
                count,
            };
            let bound = mm.reserve_estimate(demand).unwrap().pages();
            assert_eq!(bound, count.div_ceil(k) as u64);
            let request = Request {
                of: 0,
                what: What::Object(&cache),
                bytes: size as u64,
                per_block: k,
                order: 0,
            };
            let bytes = (count * size) as u64;
            sum.add(exact(
                &mm,
                &format!("{count} x {size}"),
                demand,
                bytes,
                request,
            ));
        }
        mm.kmem_cache_destroy(cache).unwrap();
    }
    end(&machine, &mm);
    sum.print("objects", (32, 527, 1620));
}

#[test]
fn pages_of_one_order() {
    let (machine, mm) = boot();
    let mut sum = Sum::default();
    for order in 0..=2 {
        for count in 1..=4 + more() {
            let request = Request {
                of: 0,
                what: What::Pages(order),
                bytes: 4096 << order,
                per_block: 1,
                order,
            };
            let demand = Demand::Pages { order, count };
            let bytes = (count as u64) << (12 + order);
            let name = format!("{count} of order {order}");
            sum.add(exact(&mm, &name, demand, bytes, request));
        }
    }
    end(&machine, &mm);
    sum.print("pages", (12, 42, 102));
}

#[test]
fn kmalloc_of_one_size() {
    let (machine, mm) = boot();
    let mut sum = Sum::default();
    for size in [1024, 2048, 4096, 8192, 12_000] {
        let (per_block, order) = per_block(&mm, |count| Demand::KmallocObjects { size, count });
        let each = size.next_power_of_two() as u64;
        for count in 1..=6 + more() {
            let request = Request {
                of: 0,
                // Smaller ones are served alike.
                what: What::Kmalloc(if count % 2 == 0 { size } else { 1 + size / 3 }),
                bytes: each,
                per_block,
                order,
            };
            let demand = Demand::KmallocObjects { size, count };
            let bytes = count as u64 * each;
            let name = format!("{count} of {size}");
            sum.add(exact(&mm, &name, demand, bytes, request));
        }
    }
    end(&machine, &mm);
    sum.print("kmalloc objects", (30, 310, 842));
}

/// The classes that a mix of kmalloc is served from, each with the least that it is asked for.
fn classes(mm: &Mm<Host>, of: usize, min: usize, max: usize) -> Vec<Request<'static>> {
    let mut requests = Vec::new();
    let mut least = 1;
    for size in SIZES.into_iter().rev().chain([16384]) {
        if least <= max && size >= min {
            let (per_block, order) = per_block(mm, |count| Demand::KmallocObjects { size, count });
            requests.push(Request {
                of,
                what: What::Kmalloc(least.max(min)),
                bytes: least.max(min) as u64,
                per_block,
                order,
            });
        }
        least = size + 1;
    }
    requests
}

#[test]
fn mixes_of_kmalloc() {
    let (machine, mm) = boot();
    let (mut sum, mut worst) = (Sum::default(), (0, 1, String::new()));
    let more = more();
    let mixes: &[(usize, usize, &[usize])] = &[
        // Two classes, three, some with pages of higher order.
        (2048, 4096, &[4, 6, 8, 10, 14]),
        (1024, 2048, &[2, 3, 4, 5, 6]),
        (1024, 4096, &[4, 5, 6, 7, 8, 9, 10]),
        (2049, 8192, &[5, 9, 13]),
        (4096, 12_000, &[9, 13, 18]),
        (700, 1500, &[2, 3, 4, 5]),
    ];
    for &(min, max, sizes) in mixes {
        for kib in sizes {
            let bytes = (kib + more) << 10;
            let name = format!("{bytes} bytes of {min} to {max}");
            let demand = Demand::Kmalloc { bytes, min, max };
            let bound = mm.reserve_estimate(demand).unwrap();
            let requests = classes(&mm, 0, min, max);
            let run = |pages| alone(&mm, demand, bytes as u64, &requests, pages);
            let found = run(None).unwrap_or_else(|path| panic!("{name}: {path:?}"));
            let need = found.pages;
            for (have, need) in bound.blocks.iter().zip(found.blocks) {
                assert!(*have >= need, "{name}");
            }
            println!(
                "{name}: bound {}, need {need}, {} states",
                bound.pages(),
                found.states
            );
            if requests.iter().all(|r| r.order == 0) {
                // What is needed is enough by itself, and less is not.
                assert!(run(Some(need)).is_ok(), "{name}: {need}");
                assert!(run(Some(need - 1)).is_err(), "{name}: {need}");
            }
            if bound.pages() * worst.1 > worst.0 * need {
                worst = (bound.pages(), need, name);
            }
            sum.add(found);
        }
    }
    println!("worst: bound {} / need {}: {}", worst.0, worst.1, worst.2);
    if more == 0 {
        assert_eq!((worst.0, worst.1), (10, 4), "{}", worst.2);
    }
    end(&machine, &mm);
    sum.print("mixes", (27, 24351, 146990));
}

#[test]
fn two_under_one_group() {
    let (machine, mm) = boot();
    let mut sum = Sum::default();
    let cache = |name, size| mm.kmem_cache_create(name, size, 0, CacheFlags::EMPTY, None);
    let (twos, threes) = (cache("twos", 2000).unwrap(), cache("threes", 1300).unwrap());
    let objects = |cache, count| Demand::Objects { cache, count };
    let of = |of, cache, size: usize, per_block| Request {
        of,
        what: What::Object(cache),
        bytes: size as u64,
        per_block,
        order: 0,
    };
    let pages = |of, order: usize| Request {
        of,
        what: What::Pages(order),
        bytes: 4096 << order,
        per_block: 1,
        order,
    };
    let kmalloc = |bytes, min, max| Demand::Kmalloc { bytes, min, max };
    let n = 3 + more();
    // Of two caches; both of one cache; pages and a mix; two mixes that share classes.
    let cases: [([Demand<'_>; 2], Vec<Request<'_>>); 4] = [
        (
            [objects(&twos, n), objects(&threes, n + 1)],
            vec![of(0, &twos, 2000, 2), of(1, &threes, 1300, 3)],
        ),
        (
            [objects(&twos, n), objects(&twos, n + 1)],
            vec![of(0, &twos, 2000, 2), of(1, &twos, 2000, 2)],
        ),
        (
            [
                Demand::Pages { order: 1, count: n },
                kmalloc(n << 10, 1024, 2048),
            ],
            [vec![pages(0, 1)], classes(&mm, 1, 1024, 2048)].concat(),
        ),
        (
            [kmalloc(n << 10, 1024, 2048), kmalloc(n << 11, 2048, 4096)],
            [classes(&mm, 0, 1024, 2048), classes(&mm, 1, 2048, 4096)].concat(),
        ),
    ];
    for (nth, (demands, requests)) in cases.iter().enumerate() {
        // As the demands come to, and with less for both.
        for capped in [false, true] {
            let group = mm.reserve("group", Demand::None).unwrap();
            let reserves = demands.map(|demand| mm.reserve("child", demand).unwrap());
            for reserve in &reserves {
                reserve.connect(Some(&group)).unwrap();
            }
            group.connect(None).unwrap();
            let limits = reserves.each_ref().map(|reserve| view(reserve).limit);
            let mut cap = limits.iter().sum();
            if capped {
                cap = cap * 2 / 3;
                group.set_limit(Some(cap)).unwrap();
            }
            let (bound, limit) = (view(&group).pages, view(&group).limit);
            assert_eq!((view(&group).held_pages, limit), (bound, cap));
            let adversary = Adversary::take_all(&mm);
            let found = search(&Case {
                mm: &mm,
                reserves: &reserves,
                demands: &limits,
                cap,
                requests,
            });
            let found = found.unwrap_or_else(|path| panic!("case {nth}: {path:?}"));
            adversary.check(&mm);
            assert_eq!((view(&group).usage, mm.set_aside_pages()), (0, bound));
            adversary.give_all(&mm);
            reserves.into_iter().for_each(down);
            down(group);
            sum.add(found);
        }
    }
    mm.kmem_cache_destroy(twos).unwrap();
    mm.kmem_cache_destroy(threes).unwrap();
    end(&machine, &mm);
    sum.print("groups", (8, 987, 4712));
}
