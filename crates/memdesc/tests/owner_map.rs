//! Several threads, all orders mixed, memory nearly full: no page and no object is ever handed out twice.
//!
//! An owner map outside the allocator says who has each page. What a thread gets must belong to nobody, what it gives back
//! must still be its own; blocks change hands between threads before they are freed. `MEMDESC_STRESS_SECONDS` sets how long
//! each test runs.

mod common;

use std::ptr::NonNull;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use common::*;
use memdesc::gfp::{self, GFP_ATOMIC, GFP_HIGHUSER_MOVABLE, GFP_KERNEL, GFP_NOWAIT};
use memdesc::*;
use memdesc_host::Host;

const THREADS: usize = 4;

fn duration() -> Duration {
    let seconds = std::env::var("MEMDESC_STRESS_SECONDS")
        .ok()
        .and_then(|s| s.parse().ok());
    Duration::from_millis(seconds.map_or(2500, |s: u64| s * 1000))
}

/// When to stop: after a time, or under Miri after so many rounds.
struct Until(Instant, AtomicU64, AtomicBool);

impl Until {
    fn new() -> Until {
        Until(
            Instant::now() + duration(),
            AtomicU64::new(0),
            AtomicBool::new(false),
        )
    }

    fn done(&self) -> bool {
        let round = self.1.fetch_add(1, Ordering::Relaxed);
        if std::thread::panicking() || self.2.load(Ordering::Relaxed) {
            return true;
        }
        if cfg!(miri) {
            round > 80
        } else {
            round.is_multiple_of(16) && Instant::now() >= self.0
        }
    }
}

/// Stops the others if the thread that has it panics.
struct StopOnPanic<'a>(&'a Until);

impl Drop for StopOnPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.2.store(true, Ordering::Relaxed);
        }
    }
}

struct Owners(Vec<AtomicU32>);

impl Owners {
    fn new(pages: u32) -> Owners {
        Owners((0..pages).map(|_| AtomicU32::new(0)).collect())
    }

    fn take(&self, pfn: Pfn, order: usize, who: u32) {
        for page in &self.0[pfn.0 as usize..][..1 << order] {
            let before = page.swap(who, Ordering::Relaxed);
            assert_eq!(
                before, 0,
                "{pfn:?} order {order} was handed to {who} while {before} had it"
            );
        }
    }

    fn give(&self, pfn: Pfn, order: usize, who: u32) {
        for page in &self.0[pfn.0 as usize..][..1 << order] {
            let before = page.swap(0, Ordering::Relaxed);
            assert_eq!(
                before, who,
                "{pfn:?} order {order} of {who} was taken by {before}"
            );
        }
    }
}

/// Blocks on their way from one thread to another.
type Mailboxes<T> = [Mutex<Vec<T>>; THREADS];

/// Allocates by a random mix of calls.
fn alloc_some(mm: &Mm<Host>, rng: &mut Rng, orders: &[usize]) -> Option<(Pfn, usize)> {
    let order = orders[rng.below(orders.len())];
    let got = match rng.below(6) {
        0 => mm.alloc_pages(GFP_NOWAIT, order),
        1 => mm.alloc_pages(GFP_KERNEL, order),
        2 => mm.alloc_pages(GFP_ATOMIC, order),
        3 => mm.alloc_pages(GFP_NOWAIT | gfp::__GFP_RECLAIMABLE, order),
        4 => mm.alloc_folio(GFP_HIGHUSER_MOVABLE, order, FolioKind::Anon),
        _ => mm.alloc_page_table(GFP_NOWAIT, order),
    };
    got.ok().map(|pfn| (pfn, order))
}

fn pages_stress(machine: &Machine, orders: &[usize], share: u64, claimed: bool) {
    let builder = Host::builder().memory(&machine.ranges);
    let builder = if claimed {
        builder.cpus(THREADS).floating(1)
    } else {
        builder.floating(2)
    };
    let mm = machine.boot_on(builder.build().unwrap());
    let owners = Owners::new(machine.end());
    let mail: Mailboxes<(Pfn, usize, u32)> = Default::default();
    let until = Until::new();
    let got = AtomicU64::new(0);
    // As much as each thread may hold: all together nearly everything.
    let budget = mm.ledger().given * share / 100 / THREADS as u64;
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let (mm, owners, mail, until, got) = (&mm, &owners, &mail, &until, &got);
            scope.spawn(move || {
                let _stop = StopOnPanic(until);
                let _cpu = claimed.then(|| mm.platform().claim(thread).unwrap());
                let mut rng = Rng(thread as u64 + 1);
                let mut live: Vec<(Pfn, usize, u32)> = Vec::new();
                let mut held = 0u64;
                let mut serial = 0u32;
                while !until.done() {
                    if held < budget && rng.below(100) < 60 {
                        if let Some((pfn, order)) = alloc_some(mm, &mut rng, orders) {
                            serial += 1;
                            let who = (thread as u32 + 1) << 28 | serial & 0xfff_ffff;
                            owners.take(pfn, order, who);
                            held += 1 << order;
                            live.push((pfn, order, who));
                            got.fetch_add(1, Ordering::Relaxed);
                        } else if !live.is_empty() {
                            // Full: make room.
                            for _ in 0..live.len().min(8) {
                                let (pfn, order, who) = live.swap_remove(rng.below(live.len()));
                                held -= 1 << order;
                                owners.give(pfn, order, who);
                                free(mm, pfn);
                            }
                        }
                    } else if !live.is_empty() {
                        let (pfn, order, who) = live.swap_remove(rng.below(live.len()));
                        held -= 1 << order;
                        let (head, o, _) = mm.lookup(pfn.add(rng.below(1 << order) as u32));
                        assert_eq!((head, o), (pfn, order));
                        if rng.one_in(3) {
                            mail[rng.below(THREADS)]
                                .lock()
                                .unwrap()
                                .push((pfn, order, who));
                        } else {
                            owners.give(pfn, order, who);
                            free(mm, pfn);
                        }
                    }
                    for (pfn, order, who) in std::mem::take(&mut *mail[thread].lock().unwrap()) {
                        owners.give(pfn, order, who);
                        free(mm, pfn);
                    }
                }
                for (pfn, order, who) in live {
                    owners.give(pfn, order, who);
                    free(mm, pfn);
                }
            });
        }
        // A fifth thread, on a floating CPU: drains, shrinks, changes pageblocks.
        let (mm, until) = (&mm, &until);
        scope.spawn(move || {
            let _stop = StopOnPanic(until);
            let mut rng = Rng(99);
            while !until.done() {
                match rng.below(5) {
                    0 => mm.drain_all(),
                    3 => mm.tick(),
                    1 => drop(mm.shrink()),
                    2 => {
                        let pfn = Pfn(rng.below(machine.end() as usize) as u32);
                        mm.set_pageblock_migratetype(pfn, MigrateType::ALL[rng.below(3)]);
                    }
                    _ => {}
                }
                std::thread::sleep(Duration::from_micros(300));
            }
        });
    });
    for (pfn, order, who) in mail.into_iter().flat_map(|m| m.into_inner().unwrap()) {
        owners.give(pfn, order, who);
        free(&mm, pfn);
    }
    println!(
        "{}: {} blocks, {} slow",
        machine.name,
        got.into_inner(),
        mm.event(Event::SlowPath)
    );
    teardown(machine, &mm);
}

fn arena() -> Machine {
    Machine::flat(if cfg!(miri) { 2048 } else { 16384 })
}

#[test]
fn pages_all_orders_nearly_full() {
    pages_stress(&arena(), &[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10], 97, true);
}

#[test]
fn pages_small_orders_nearly_full() {
    pages_stress(&arena(), &[0, 0, 0, 1, 2, 3, 4], 99, true);
}

#[test]
fn pages_on_floating_cpus() {
    pages_stress(&arena(), &[0, 0, 1, 3, 4, 7, 8, 9, 10], 97, false);
}

/// An object on its way from one thread to another.
#[derive(Clone, Copy)]
struct Object {
    ptr: NonNull<u8>,
    size: usize,
    tag: u8,
    /// Which shared cache; none for kmalloc.
    cache: Option<usize>,
}

// SAFETY: a live object belongs to whoever has this, on whatever thread.
unsafe impl Send for Object {}

impl Object {
    fn new(ptr: NonNull<u8>, size: usize, tag: u8, cache: Option<usize>) -> Object {
        fill(ptr, size, tag);
        Object {
            ptr,
            size,
            tag,
            cache,
        }
    }

    /// Nobody else wrote here.
    fn check(&self) {
        let bytes = bytes(self.ptr, self.size);
        let bad = bytes.iter().position(|&b| b != self.tag);
        assert!(
            bad.is_none(),
            "byte {bad:?} of an object of {} is not {:#x}: {bytes:x?}",
            self.size,
            self.tag
        );
    }

    fn free(self, mm: &Mm<Host>, caches: &[Cache<'_>]) {
        self.check();
        match self.cache {
            Some(cache) => cache_free(mm, &caches[cache], self.ptr),
            None => kfree(mm, self.ptr),
        }
    }
}

/// Objects, freed on other threads than they were allocated on, while others drain, shrink, and make and destroy caches.
#[test]
fn objects_across_threads() {
    let machine = arena();
    let mm = machine.boot_on(
        Host::builder()
            .memory(&machine.ranges)
            .cpus(THREADS)
            .floating(1)
            .build()
            .unwrap(),
    );
    let caches: Vec<_> = [
        ("eight", 8, CacheFlags::EMPTY),
        ("hundred", 104, CacheFlags::EMPTY),
        ("large", 9000, CacheFlags::EMPTY),
        ("no sheaves", 48, CacheFlags::NO_SHEAVES),
        ("checked", 24, ALL),
    ]
    .map(|(name, size, flags)| mm.kmem_cache_create(name, size, 8, flags, None).unwrap())
    .into();
    let until = Until::new();
    let mail: Mailboxes<Object> = Default::default();
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let (mm, caches, mail, until) = (&mm, &caches[..], &mail, &until);
            scope.spawn(move || {
                let _stop = StopOnPanic(until);
                let _cpu = mm.platform().claim(thread).unwrap();
                let mut rng = Rng(thread as u64 + 10);
                let mut live: Vec<Object> = Vec::new();
                let limit = scaled(6000, 100);
                while !until.done() {
                    let tag = rng.next() as u8;
                    if live.len() < limit && rng.below(100) < 55 {
                        if rng.one_in(2) {
                            let index = rng.below(caches.len());
                            let size = caches[index].object_size();
                            if rng.one_in(20) {
                                let mut out = [std::ptr::null_mut(); 50];
                                if mm
                                    .kmem_cache_alloc_bulk(&caches[index], GFP_KERNEL, &mut out)
                                    .is_ok()
                                {
                                    let new = |p| {
                                        Object::new(
                                            NonNull::new(p).unwrap(),
                                            size,
                                            tag,
                                            Some(index),
                                        )
                                    };
                                    live.extend(out.map(new));
                                }
                            } else if let Ok(ptr) = mm.kmem_cache_alloc(&caches[index], GFP_KERNEL)
                            {
                                live.push(Object::new(ptr, size, tag, Some(index)));
                            }
                        } else {
                            let most = if rng.one_in(8) {
                                scaled(30_000, 6000)
                            } else {
                                300
                            };
                            let size = 1 + rng.below(most);
                            if let Ok(ptr) = mm.kmalloc(size, GFP_ATOMIC) {
                                live.push(Object::new(ptr, size, tag, None));
                            }
                        }
                    } else if !live.is_empty() {
                        let object = live.swap_remove(rng.below(live.len()));
                        if rng.one_in(2) {
                            mail[rng.below(THREADS)].lock().unwrap().push(object);
                        } else {
                            object.free(mm, caches);
                        }
                    }
                    for object in std::mem::take(&mut *mail[thread].lock().unwrap()) {
                        object.free(mm, caches);
                    }
                    if rng.one_in(400) {
                        own_cache(mm, &mut rng, thread);
                    }
                }
                live.into_iter().for_each(|object| object.free(mm, caches));
            });
        }
        let (mm, until) = (&mm, &until);
        scope.spawn(move || {
            let _stop = StopOnPanic(until);
            while !until.done() {
                {
                    mm.shrink();
                    let mut n = 0;
                    mm.slabinfo(|c| n += c.active_objs);
                }
                std::thread::sleep(Duration::from_micros(200));
                mm.drain_all();
            }
        });
    });
    for object in mail.into_iter().flat_map(|m| m.into_inner().unwrap()) {
        object.free(&mm, &caches);
    }
    for cache in caches {
        mm.kmem_cache_destroy(cache).unwrap();
    }
    teardown(&machine, &mm);
}

/// A cache of this thread alone, from creation to destruction.
fn own_cache(mm: &Mm<Host>, rng: &mut Rng, thread: usize) {
    let size = 1 + rng.below(2000);
    let Ok(cache) = mm.kmem_cache_create(
        &format!("thread {thread}"),
        size,
        8,
        CacheFlags::EMPTY,
        None,
    ) else {
        return;
    };
    let mut live = Vec::new();
    for _ in 0..rng.below(scaled(300, 10)) {
        if let Ok(ptr) = mm.kmem_cache_alloc(&cache, GFP_KERNEL) {
            live.push(Object::new(ptr, size, thread as u8, None));
        }
    }
    for object in live {
        object.check();
        cache_free(mm, &cache, object.ptr);
    }
    mm.kmem_cache_destroy(cache).unwrap();
}
