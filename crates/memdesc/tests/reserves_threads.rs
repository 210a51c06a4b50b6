//! Reserves at real sizes: random trees and demands, threads that stay within their part of them and others that take all else at the highest priority, on
//! several CPUs, on one, and where locks sleep. No entitled request fails, nobody else gets what was set aside, and nobody writes into what is another's.
#![allow(missing_docs)]

mod common;
#[path = "common/reserves.rs"]
mod shared;

use std::ptr::NonNull;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use common::*;
use memdesc::gfp::*;
use memdesc::*;
use memdesc_host::Host;
use shared::*;

/// What a leaf is for, as its users see it.
#[derive(Clone, Copy, Debug)]
enum What {
    /// Of this cache, of so many bytes each.
    Objects(usize, usize),
    KmallocObjects(usize),
    Kmalloc(usize, usize),
    Pages(usize),
}

impl What {
    fn random(rng: &mut Rng, caches: &[usize]) -> What {
        match rng.below(4) {
            0 => {
                let cache = rng.below(caches.len());
                What::Objects(cache, caches[cache])
            }
            1 => What::KmallocObjects(1 + rng.below(10_000)),
            2 => {
                let min = 16 + rng.below(500);
                What::Kmalloc(min, min + rng.below(12_000))
            }
            _ => What::Pages(rng.below(4)),
        }
    }

    fn demand<'a>(self, caches: &'a [Cache<'a>], n: usize) -> Demand<'a> {
        match self {
            What::Objects(cache, _) => Demand::Objects {
                cache: &caches[cache],
                count: n,
            },
            What::KmallocObjects(size) => Demand::KmallocObjects { size, count: n },
            What::Kmalloc(min, max) => Demand::Kmalloc { bytes: n, min, max },
            What::Pages(order) => Demand::Pages { order, count: n },
        }
    }

    /// A fair amount of it.
    fn amount(self, rng: &mut Rng) -> usize {
        match self {
            What::Kmalloc(_, max) => 4 * max + rng.below(40_000),
            What::Pages(_) => 4 + rng.below(12),
            _ => 4 + rng.below(60),
        }
    }
}

struct Leaf<'a> {
    reserve: Reserve<'a, Host>,
    what: What,
    /// What each of its users may have at once.
    share: usize,
}

/// Something that a user has.
struct Mine {
    ptr: NonNull<u8>,
    size: usize,
    pages: bool,
    cost: usize,
    mark: u64,
}

// SAFETY: whoever has it has the memory.
unsafe impl Send for Mine {}

impl Mine {
    fn fill(&self) {
        for word in 0..self.size / 8 {
            // SAFETY: ours, at least this large, and aligned to 8.
            unsafe { self.ptr.cast::<u64>().add(word).write(self.mark) };
        }
    }

    /// Nobody wrote into it.
    fn check(&self) {
        for word in 0..self.size / 8 {
            // SAFETY: as above, and filled.
            let there = unsafe { self.ptr.cast::<u64>().add(word).read() };
            assert_eq!(there, self.mark, "word {word} of {} bytes", self.size);
        }
    }
}

/// Freed by whoever comes along, and by whom it is to be counted then.
type Parcels<'a> = Mutex<Vec<(Mine, &'a AtomicUsize)>>;

struct World<'a> {
    mm: &'a Mm<Host>,
    caches: &'a [Cache<'a>],
    parcels: Parcels<'a>,
    stop: AtomicBool,
    served: AtomicU64,
    from_reserve: AtomicU64,
}

/// One who stays within his share.
struct User<'w, 'a> {
    world: &'w World<'a>,
    leaf: &'w Leaf<'a>,
    rng: Rng,
    used: usize,
    /// What others freed for him.
    returned: &'a AtomicUsize,
    live: Vec<Mine>,
}

impl User<'_, '_> {
    fn request(&mut self) -> Option<(usize, usize)> {
        // Size, and what it counts.
        let (size, cost) = match self.leaf.what {
            What::Objects(_, size) => (size, 1),
            What::KmallocObjects(most) => (1 + self.rng.below(most), 1),
            What::Kmalloc(min, max) => {
                let size = if self.rng.one_in(4) {
                    min + self.rng.below(max - min + 1)
                } else {
                    min + self.rng.below((max - min).min(300) + 1)
                };
                (size, size)
            }
            What::Pages(order) => (4096 << order, 1),
        };
        self.used -= self.returned.swap(0, Ordering::AcqRel);
        (self.used + cost <= self.leaf.share).then_some((size, cost))
    }

    fn take(&mut self) {
        let Some((size, cost)) = self.request() else {
            return;
        };
        let (mm, leaf) = (self.world.mm, self.leaf);
        let gfp = match self.rng.below(4) {
            0 => GFP_KERNEL | __GFP_NORETRY,
            1 => GFP_NOWAIT | __GFP_NOWARN,
            _ => GFP_ATOMIC,
        };
        let by_task = self.rng.one_in(3);
        let _scope = by_task.then(|| Host::reserve_scope(leaf.reserve.id()));
        let got = match (leaf.what, by_task) {
            (What::Objects(cache, _), true) => mm.kmem_cache_alloc(&self.world.caches[cache], gfp),
            (What::Objects(cache, _), false) => leaf
                .reserve
                .kmem_cache_alloc(&self.world.caches[cache], gfp),
            (What::Pages(order), true) => mm.alloc_pages(gfp, order).map(|pfn| page(mm, pfn)),
            (What::Pages(order), false) => leaf
                .reserve
                .alloc_pages(gfp, order)
                .map(|pfn| page(mm, pfn)),
            (_, true) => mm.kmalloc(size, gfp),
            (_, false) => leaf.reserve.kmalloc(size, gfp),
        };
        let ptr = got.unwrap_or_else(|why| {
            panic!(
                "{why}: {size} bytes with {} of {} in use, by task: {by_task}: {:?} {:?}",
                self.used,
                leaf.share,
                leaf.what,
                view(&leaf.reserve)
            )
        });
        let from = &self.world.from_reserve;
        from.fetch_add(
            u64::from(mm.is_from_reserve(ptr.as_ptr())),
            Ordering::Relaxed,
        );
        self.world.served.fetch_add(1, Ordering::Relaxed);
        self.used += cost;
        let mine = Mine {
            ptr,
            size,
            pages: matches!(leaf.what, What::Pages(_)),
            cost,
            mark: self.rng.next(),
        };
        mine.fill();
        self.live.push(mine);
    }

    fn give(&mut self) {
        if self.live.is_empty() {
            return;
        }
        let mine = self.live.swap_remove(self.rng.below(self.live.len()));
        mine.check();
        let (mm, cost) = (self.world.mm, mine.cost);
        let pfn = mm.virt_to_pfn(mine.ptr.as_ptr());
        // SAFETY: ours in all cases, and not used any more.
        unsafe {
            match self.rng.below(12) {
                // Somebody else.
                0 | 1 => {
                    let mut parcels = self.world.parcels.lock().unwrap();
                    return parcels.push((mine, self.returned));
                }
                2 | 3 if mine.pages => mm.free_pages_nolock(pfn),
                4 if mine.pages => mm.free_pages_bulk(&[pfn]),
                _ if mine.pages => mm.free_pages(pfn),
                // What waits is in use until the round ends.
                2 => return mm.kfree_nolock(mine.ptr),
                3 if mine.size >= size_of::<rcu::RcuHead>() => {
                    let head = mine.ptr.cast::<rcu::RcuHead>();
                    head.write(rcu::RcuHead::new());
                    return mm.kvfree_rcu(mine.ptr, head);
                }
                4 if matches!(self.leaf.what, What::Objects(..)) => {
                    let What::Objects(cache, _) = self.leaf.what else {
                        unreachable!()
                    };
                    mm.kmem_cache_free_bulk(&self.world.caches[cache], &[mine.ptr.as_ptr()]);
                }
                5 if mm.is_prepaid(mine.ptr) => return mm.kfree_rcu_prepaid(mine.ptr),
                5 => mm.kvfree(mine.ptr),
                _ => mm.kfree(mine.ptr),
            }
        }
        self.used -= cost;
    }

    /// Frees what somebody else left to be freed.
    fn carry(&mut self) {
        let parcel = self.world.parcels.lock().unwrap().pop();
        if let Some((mine, owner)) = parcel {
            mine.check();
            put(self.world.mm, &mine);
            // Only now may he have another.
            owner.fetch_add(mine.cost, Ordering::AcqRel);
        }
    }

    fn run(mut self, steps: usize) {
        for _ in 0..steps {
            match self.rng.below(8) {
                0..=3 => self.take(),
                4..=6 => self.give(),
                _ => self.carry(),
            }
        }
        for mine in std::mem::take(&mut self.live) {
            mine.check();
            put(self.world.mm, &mine);
        }
    }
}

fn put(mm: &Mm<Host>, mine: &Mine) {
    if mine.pages {
        free(mm, mm.virt_to_pfn(mine.ptr.as_ptr()));
    } else {
        kfree(mm, mine.ptr);
    }
}

/// Takes and frees whatever it can get.
fn greedy(world: &World<'_>, seed: u64, mut pages: Vec<Pfn>) {
    let (mm, mut rng) = (world.mm, Rng(seed));
    let mut objects: Vec<Mine> = Vec::new();
    let mut steps = 0u64;
    while !world.stop.load(Ordering::Relaxed) {
        steps += 1;
        let gfp = GREEDY;
        match rng.below(10) {
            0 | 1 if !pages.is_empty() => free(mm, pages.swap_remove(rng.below(pages.len()))),
            2 | 3 if !objects.is_empty() => {
                let mine = objects.swap_remove(rng.below(objects.len()));
                mine.check();
                put(mm, &mine);
            }
            4 | 5 => {
                if let Ok(pfn) = mm.alloc_pages(gfp, rng.below(5)) {
                    assert!(!mm.page_is_from_reserve(pfn), "a page of a reserve");
                    pages.push(pfn);
                }
            }
            n => {
                let (got, size) = if n == 6 {
                    let cache = &world.caches[rng.below(world.caches.len())];
                    (mm.kmem_cache_alloc(cache, gfp), 64)
                } else {
                    let most = 16_000 >> rng.below(10);
                    let size = 1 + rng.below(most);
                    (mm.kmalloc(size, gfp), size)
                };
                if let Ok(ptr) = got {
                    assert!(!mm.is_from_reserve(ptr.as_ptr()), "an object of a reserve");
                    let mine = Mine {
                        ptr,
                        size,
                        pages: false,
                        cost: 0,
                        mark: rng.next(),
                    };
                    mine.fill();
                    objects.push(mine);
                }
            }
        }
        if steps.is_multiple_of(200) {
            mm.tick();
        }
    }
    objects.iter().for_each(|mine| put(mm, mine));
    pages.into_iter().for_each(|pfn| free(mm, pfn));
}

struct Setup {
    floating: usize,
    rt: bool,
    /// All ordinary memory fails by injection.
    faults: bool,
}

fn world(seed: u64, setup: &Setup) {
    let mut machine = Machine::flat(6144).unsampled();
    machine.config.preempt_rt = setup.rt;
    let host = machine.host().cpus(0).floating(setup.floating);
    let mm = machine.boot_on(host.build().unwrap());
    let mut rng = Rng(seed);
    let flags = [
        CacheFlags::EMPTY,
        CacheFlags::TYPESAFE_BY_RCU,
        CacheFlags::DEBUG,
        CacheFlags::NO_SHEAVES,
        CacheFlags::OWNERS,
    ];
    let sizes: Vec<usize> = (0..3).map(|_| 64 + rng.below(2500)).collect();
    let caches: Vec<Cache<'_>> = sizes
        .iter()
        .map(|&size| {
            let flags = flags[rng.below(flags.len())];
            mm.kmem_cache_create("objects", size, 0, flags, None)
                .unwrap()
        })
        .collect();

    // Groups below groups, and leaves below any of them; connected from either end.
    let mut groups: Vec<Reserve<'_, Host>> = Vec::new();
    let early = rng.one_in(2);
    for _ in 0..1 + rng.below(4) {
        let group = mm.reserve("group", Demand::None).unwrap();
        match rng.below(groups.len() + 1) {
            0 if early => group.connect(None).unwrap(),
            0 => {}
            n => group.connect(Some(&groups[n - 1])).unwrap(),
        }
        groups.push(group);
    }
    let users = 2;
    let (mut leaves, mut sizings) = (Vec::new(), Vec::new());
    for _ in 0..2 + rng.below(4) {
        let what = What::random(&mut rng, &sizes);
        let mut amount = what.amount(&mut rng);
        let reserve = mm.reserve("leaf", what.demand(&caches, amount)).unwrap();
        reserve
            .connect(Some(&groups[rng.below(groups.len())]))
            .unwrap();
        let mut sized = 0;
        for _ in 0..rng.below(3) {
            let more = what.amount(&mut rng);
            let sizing = mm
                .reserve_sizing("sizing", what.demand(&caches, more))
                .unwrap();
            sizing.connect(Some(&reserve)).unwrap();
            sizings.push(sizing);
            amount += more;
            sized += more;
        }
        if rng.one_in(2) {
            // It was of another size for a while.
            let own = amount - sized;
            for n in [what.amount(&mut rng), own] {
                reserve.resize(what.demand(&caches, n)).unwrap();
            }
        }
        leaves.push(Leaf {
            reserve,
            what,
            share: amount / users,
        });
    }
    if !early {
        for group in &groups {
            match group.connect(None) {
                Ok(()) | Err(AllocError::Busy) => {}
                Err(why) => panic!("{why}"),
            }
        }
    }
    let bound = mm.set_aside_pages();
    assert!(bound > 0);
    let mut held = 0;
    mm.reserve_info(|view| {
        if view.depth == 0 {
            held += view.held_pages;
            assert_eq!((view.held_pages, view.usage), (view.pages, 0));
        }
    });
    assert_eq!(held, bound);

    let adversary = Adversary::take_all(&mm);
    let objects = adversary.objects;
    let mut pages = adversary.pages;
    if setup.faults {
        mm.platform().faults().fail_one_in(1, seed);
    }
    for round in 0..2 {
        let returned: Vec<AtomicUsize> = (0..leaves.len() * users)
            .map(|_| AtomicUsize::new(0))
            .collect();
        let world = World {
            mm: &mm,
            caches: &caches,
            parcels: Mutex::default(),
            stop: AtomicBool::new(false),
            served: AtomicU64::new(0),
            from_reserve: AtomicU64::new(0),
        };
        std::thread::scope(|scope| {
            let greedy_ones: Vec<_> = (0..2)
                .map(|n| {
                    let half = pages.split_off(pages.len() / (2 - n));
                    let seed = seed * 31 + round + n as u64;
                    let world = &world;
                    scope.spawn(move || greedy(world, seed, half))
                })
                .collect();
            let users: Vec<_> = returned
                .iter()
                .enumerate()
                .map(|(n, returned)| {
                    let user = User {
                        world: &world,
                        leaf: &leaves[n / users],
                        rng: Rng(seed ^ (n as u64) << 32 ^ round),
                        used: 0,
                        returned,
                        live: Vec::new(),
                    };
                    scope.spawn(move || user.run(scaled(1500, 40)))
                })
                .collect();
            let ended: Vec<_> = users.into_iter().map(|user| user.join()).collect();
            world.stop.store(true, Ordering::Relaxed);
            let more: Vec<_> = greedy_ones.into_iter().map(|one| one.join()).collect();
            ended.into_iter().chain(more).for_each(|end| end.unwrap());
        });
        for (mine, _) in world.parcels.into_inner().unwrap() {
            mine.check();
            put(&mm, &mine);
        }
        mm.kvfree_rcu_barrier();
        // What waits on other CPUs, too.
        mm.shrink();
        let from = world.from_reserve.into_inner();
        assert!(from > 0, "nothing was taken from a reserve");
        if setup.faults {
            assert_eq!(from, world.served.into_inner());
        }
        for leaf in &leaves {
            assert_eq!(view(&leaf.reserve).usage, 0, "{:?}", view(&leaf.reserve));
        }
        mm.tick();
        let adversary = Adversary::take_all(&mm);
        pages = adversary.pages;
        for object in adversary.objects {
            kfree(&mm, object);
        }
        let typesafe: u64 = leaves.iter().map(|l| view(&l.reserve).taken_pages).sum();
        assert_eq!(mm.set_aside_pages() + typesafe, bound);
    }
    mm.platform().faults().off();
    pages.into_iter().for_each(|pfn| free(&mm, pfn));
    objects.into_iter().for_each(|ptr| kfree(&mm, ptr));
    sizings.into_iter().for_each(down);
    leaves.into_iter().for_each(|leaf| down(leaf.reserve));
    groups.into_iter().rev().for_each(down);
    for cache in caches {
        mm.kmem_cache_destroy(cache).unwrap();
    }
    end(&machine, &mm);
}

fn worlds(setup: &Setup, seeds: std::ops::Range<u64>) {
    for seed in seeds.take(scaled(usize::MAX, 1)) {
        println!("world {seed}");
        world(seed, setup);
    }
}

/// More by this.
fn seeds(n: u64) -> u64 {
    let factor = std::env::var("MEMDESC_SEEDS").ok();
    n * factor.and_then(|f| f.parse().ok()).unwrap_or(1)
}

#[test]
fn random_trees_on_several_cpus() {
    let setup = Setup {
        floating: 4,
        rt: false,
        faults: false,
    };
    worlds(&setup, 0..seeds(8));
}

#[test]
fn random_trees_where_locks_sleep() {
    let setup = Setup {
        floating: 4,
        rt: true,
        faults: false,
    };
    worlds(&setup, 100..100 + seeds(4));
}

#[test]
fn random_trees_on_one_cpu() {
    let setup = Setup {
        floating: 1,
        rt: false,
        faults: false,
    };
    worlds(&setup, 200..200 + seeds(3));
}

#[test]
fn random_trees_while_all_ordinary_memory_fails() {
    for rt in [false, true] {
        let setup = Setup {
            floating: 4,
            rt,
            faults: true,
        };
        worlds(&setup, 300..300 + seeds(3));
    }
}

/// Who tries to take away what is in use is refused, and nobody notices.
#[test]
fn changes_that_are_refused_do_not_disturb() {
    let machine = Machine::flat(2048).unsampled();
    let host = machine.host().cpus(0).floating(3);
    let mm = machine.boot_on(host.build().unwrap());
    let demand = |count| Demand::Pages { order: 0, count };
    let group = mm.reserve("group", Demand::None).unwrap();
    let frags = mm.reserve("frags", demand(2)).unwrap();
    let sizing = mm.reserve_sizing("sizing", demand(2)).unwrap();
    frags.connect(Some(&group)).unwrap();
    sizing.connect(Some(&frags)).unwrap();
    group.connect(None).unwrap();
    let adversary = Adversary::take_all(&mm);
    let stop = AtomicBool::new(false);
    let mut live: Vec<_> = (0..3)
        .map(|_| frags.alloc_pages(GFP_ATOMIC, 0).unwrap())
        .collect();
    std::thread::scope(|scope| {
        let user = scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                // The fourth, which is within the charge all the time.
                live.push(frags.alloc_pages(GFP_ATOMIC, 0).unwrap());
                free(&mm, live.remove(0));
                live.push(sizing.alloc_pages(GFP_ATOMIC, 0).unwrap());
                free(&mm, live.remove(0));
            }
        });
        for _ in 0..scaled(3000, 20) {
            assert_eq!(group.disconnect(), Err(AllocError::Busy));
            assert_eq!(frags.disconnect(), Err(AllocError::Busy));
            assert_eq!(sizing.disconnect(), Err(AllocError::Busy));
            assert_eq!(group.set_limit(Some(8192)), Err(AllocError::Busy));
            assert_eq!(frags.set_limit(Some(4096)), Err(AllocError::Busy));
            assert_eq!(sizing.resize(demand(0)), Err(AllocError::Busy));
            assert_eq!(frags.resize(demand(0)), Err(AllocError::Busy));
            if user.is_finished() {
                break;
            }
        }
        stop.store(true, Ordering::Relaxed);
        user.join().unwrap();
    });
    live.into_iter().for_each(|pfn| free(&mm, pfn));
    adversary.give_all(&mm);
    assert_eq!((view(&group).held_pages, view(&group).limit), (4, 4 * 4096));
    [sizing, frags, group].into_iter().for_each(down);
    end(&machine, &mm);
}
