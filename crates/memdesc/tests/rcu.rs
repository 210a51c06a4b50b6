//! RCU and what is freed by it: nothing while a reader looks, everything at the barrier, and bounded in between.

mod common;

use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::{Rng, range, scaled};
use memdesc::rcu::{Rcu, RcuHead};
use memdesc::*;
use memdesc_host::Host;

const GFP: Flags = gfp::GFP_KERNEL;

fn machine_with(config: Config, builder: memdesc_host::HostBuilder) -> Mm<Host> {
    let ranges = [range(0, 16_384, 0)];
    let host = builder.memory(&ranges).build().unwrap();
    let config = Config {
        memory_is_zeroed: true,
        ..config
    };
    Mm::new(host, &config, &ranges).unwrap()
}

fn machine(config: Config) -> Mm<Host> {
    machine_with(config, Host::builder().floating(4))
}

/// How an object is given up.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Form {
    Head,
    MightSleep,
    Prepaid,
    Call,
    /// Large memory, with a head.
    Large,
}

/// What readers look at. Alive, all of it says so.
#[repr(C)]
struct Object {
    head: RcuHead,
    mm: AtomicPtr<Mm<Host>>,
    generation: AtomicU64,
    alive: AtomicU64,
    again: AtomicU64,
}

const ALIVE: u64 = 0x616c_6976_6521_2121;

fn size(form: Form) -> usize {
    if form == Form::Large {
        9000
    } else {
        size_of::<Object>()
    }
}

fn alloc(mm: &Mm<Host>, form: Form, generation: u64) -> Result<NonNull<Object>, AllocError> {
    let flags = if form == Form::Prepaid {
        GFP | gfp::__GFP_RCU_PREPAID
    } else {
        GFP
    };
    let object = mm.kmalloc(size(form), flags)?.cast::<Object>();
    // SAFETY: ours, large and aligned enough.
    unsafe {
        object.write(Object {
            head: RcuHead::new(),
            mm: AtomicPtr::new((&raw const *mm).cast_mut()),
            generation: AtomicU64::new(generation),
            alive: AtomicU64::new(ALIVE),
            again: AtomicU64::new(generation),
        });
    }
    Ok(object)
}

unsafe fn kfree_callback(head: NonNull<RcuHead>) {
    let object = head.cast::<Object>();
    // SAFETY: the head is the object's first field; the machine outlives its objects.
    unsafe {
        let mm = object.as_ref().mm.load(Ordering::Relaxed);
        (*mm).kfree(object.cast());
    }
}

/// # Safety
///
/// The object is unlinked.
unsafe fn retire(mm: &Mm<Host>, form: Form, object: NonNull<Object>) {
    // SAFETY: the caller's promise; the head is the object's first field.
    unsafe {
        match form {
            Form::Head | Form::Large => mm.kvfree_rcu(object.cast(), object.cast()),
            Form::MightSleep => mm.kvfree_rcu_mightsleep(object.cast()),
            Form::Prepaid => mm.kfree_rcu_prepaid(object.cast()),
            Form::Call => mm.platform().rcu().call(object.cast(), kfree_callback),
        }
    }
}

fn look(object: &Object) -> u64 {
    let generation = object.generation.load(Ordering::Relaxed);
    assert_eq!(
        object.alive.load(Ordering::Relaxed),
        ALIVE,
        "freed while a reader looks"
    );
    assert_eq!(
        object.again.load(Ordering::Relaxed),
        generation,
        "reused while a reader looks"
    );
    generation
}

/// Frees by one form under random readers, with allocations that fail at random. Says how many.
fn storm(form: Form, frees: usize, config: Config) {
    let mm = &machine(config);
    let table: &Vec<AtomicPtr<Object>> = &(0..64).map(|_| AtomicPtr::default()).collect();
    let stop = &AtomicBool::new(false);
    let generations = &AtomicU64::new(1);
    let looks = &AtomicU64::new(0);
    let peak = &AtomicU64::new(0);
    mm.platform().faults().fail_one_in(7, 1);
    std::thread::scope(|scope| {
        let writers: Vec<_> = (0..2)
            .map(|seed| {
                scope.spawn(move || {
                    let mut rng = Rng(seed);
                    let mut done = 0;
                    while done < frees / 2 {
                        let generation = generations.fetch_add(1, Ordering::Relaxed);
                        let Ok(new) = alloc(mm, form, generation) else {
                            continue;
                        };
                        let slot = &table[rng.below(table.len())];
                        let old = slot.swap(new.as_ptr(), Ordering::AcqRel);
                        if let Some(old) = NonNull::new(old) {
                            // SAFETY: just unlinked, by us alone.
                            unsafe { retire(mm, form, old) };
                            done += 1;
                        }
                        if form == Form::Call && done % 64 == 0 {
                            mm.platform().rcu().advance();
                            mm.platform().rcu().run_callbacks();
                        }
                        if done % 4096 == 0 {
                            peak.fetch_max(mm.kvfree_queued(), Ordering::Relaxed);
                        }
                    }
                })
            })
            .collect();
        for seed in 0..2 {
            scope.spawn(move || {
                let mut rng = Rng(seed + 100);
                while !stop.load(Ordering::Relaxed) {
                    let _read = rcu::read_lock(mm.platform().rcu());
                    let object = table[rng.below(table.len())].load(Ordering::Acquire);
                    // SAFETY: linked when we looked, and we are in a read section.
                    let Some(object) = (unsafe { object.as_ref() }) else {
                        continue;
                    };
                    let generation = look(object);
                    match rng.below(2000) {
                        0 => std::thread::sleep(Duration::from_micros(50)),
                        1..100 => std::thread::yield_now(),
                        n => (0..n / 8).for_each(|_| std::hint::spin_loop()),
                    }
                    let _nested = rcu::read_lock(mm.platform().rcu());
                    assert_eq!(
                        look(object),
                        generation,
                        "another object while a reader looks"
                    );
                    looks.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        for writer in writers {
            if let Err(panic) = writer.join() {
                stop.store(true, Ordering::Relaxed);
                std::panic::resume_unwind(panic);
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    let (passed, failed) = mm.platform().faults().off();
    assert!(failed > 0, "no allocation failed of {passed}");
    mm.platform().rcu().barrier();
    mm.kvfree_rcu_barrier();
    assert_eq!(mm.kvfree_queued(), 0);
    println!(
        "{form:?}: {} looks, peak {} queued, {} by heads, {} waited, {} throttled",
        looks.load(Ordering::Relaxed),
        peak.load(Ordering::Relaxed),
        mm.event(Event::KvfreeHead),
        mm.event(Event::KvfreeWaited),
        mm.event(Event::KvfreeThrottled),
    );
    // Everything is free but what is in the table.
    let live = table
        .iter()
        .filter(|o| !o.load(Ordering::Relaxed).is_null())
        .count() as u64;
    let mut objects = 0;
    mm.slabinfo(|c| {
        if !c.metadata {
            objects += c.active_objs;
        }
    });
    let large = mm.ledger().by_type[PageType::LargeKmalloc as usize] / 4;
    assert_eq!(objects + large, live, "not all is free at the barrier");
    for object in table
        .iter()
        .filter_map(|o| NonNull::new(o.load(Ordering::Relaxed)))
    {
        // SAFETY: the last one has it.
        unsafe { mm.kfree(object.cast()) };
    }
    mm.shrink();
    let ledger = common::ledger(mm);
    assert!(ledger.balanced, "{ledger:#?}");
    assert_eq!(common::users(&ledger), 0, "{ledger:#?}");
}

fn frees() -> usize {
    match std::env::var("MEMDESC_RCU_FREES") {
        Ok(text) => text.parse().expect("MEMDESC_RCU_FREES is a number"),
        Err(_) => scaled(1_000_000, 200),
    }
}

#[test]
fn a_million_frees_by_head() {
    storm(Form::Head, frees(), common::base_config());
}

#[test]
fn a_million_frees_without_a_head() {
    storm(Form::MightSleep, frees(), common::base_config());
}

#[test]
fn a_million_prepaid_frees() {
    storm(Form::Prepaid, frees(), common::base_config());
}

#[test]
fn a_million_callbacks() {
    storm(Form::Call, frees(), common::base_config());
}

#[test]
fn frees_of_large_memory() {
    storm(Form::Large, frees() / 10, common::base_config());
}

/// The same with poison on what is free, and with sleeping locks.
#[test]
fn frees_with_poison_and_rt() {
    for form in [Form::Head, Form::MightSleep, Form::Prepaid, Form::Call] {
        let config = Config {
            slab_debug: CacheFlags::DEBUG,
            preempt_rt: true,
            ..common::base_config()
        };
        storm(form, frees() / 20, config);
    }
}

/// Who floods while a reader holds up the grace period is made to wait, and memory does not run away.
#[test]
fn a_flood_is_throttled() {
    let config = Config {
        kvfree_backlog: 1024,
        ..common::base_config()
    };
    let mm = &machine(config);
    let (reading, done) = (&AtomicBool::new(false), &AtomicBool::new(false));
    let peak = &AtomicU64::new(0);
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let read = rcu::read_lock(mm.platform().rcu());
            reading.store(true, Ordering::Release);
            while mm.event(Event::KvfreeThrottled) == 0 {
                std::thread::yield_now();
            }
            std::thread::sleep(Duration::from_millis(20));
            peak.fetch_max(mm.kvfree_queued(), Ordering::Relaxed);
            assert!(
                !done.load(Ordering::Relaxed),
                "the flood was not made to wait"
            );
            drop(read);
        });
        while !reading.load(Ordering::Acquire) {
            std::thread::yield_now();
        }
        for _ in 0..20_000 {
            let object = alloc(mm, Form::Head, 1).unwrap();
            // SAFETY: nobody else has it.
            unsafe { retire(mm, Form::Head, object) };
        }
        done.store(true, Ordering::Relaxed);
    });
    // One block over the mark is where it is noticed.
    let peak = peak.load(Ordering::Relaxed);
    assert!(peak <= 1024 + 2 * 509, "{peak} were queued");
    mm.kvfree_rcu_barrier();
    assert_eq!(mm.kvfree_queued(), 0);
}

/// Without a page for pointers a flood is bounded all the same, without ticks.
#[test]
fn a_flood_by_heads_is_bounded() {
    let mm = machine(common::base_config());
    let mut peak = 0;
    for i in 0..20_000 {
        let object = alloc(&mm, Form::Head, 1).unwrap();
        mm.platform().faults().fail_one_in(1, 1);
        // SAFETY: nobody else has it.
        unsafe { retire(&mm, Form::Head, object) };
        mm.platform().faults().off();
        if i % 100 == 0 {
            peak = peak.max(mm.kvfree_queued());
        }
    }
    assert!(mm.event(Event::KvfreeHead) >= 20_000);
    assert!(peak < 2_000, "{peak} lay about");
    mm.kvfree_rcu_barrier();
    assert_eq!(mm.kvfree_queued(), 0);
}

/// A reader who frees may not be made to wait for himself.
#[test]
fn a_reader_may_flood() {
    let config = Config {
        kvfree_backlog: 512,
        ..common::base_config()
    };
    let mm = machine(config);
    let read = rcu::read_lock(mm.platform().rcu());
    for _ in 0..5_000 {
        let object = alloc(&mm, Form::Head, 1).unwrap();
        // SAFETY: nobody else has it.
        unsafe { retire(&mm, Form::Head, object) };
    }
    assert_eq!(mm.kvfree_queued(), 5_000);
    drop(read);
    mm.kvfree_rcu_barrier();
    assert_eq!(mm.kvfree_queued(), 0);
}

/// Blocks that do not get full are drained in time, by ticks alone.
#[test]
fn a_tick_drains() {
    let config = Config {
        kvfree_drain_ns: 20_000_000,
        ..common::base_config()
    };
    let mm = machine(config);
    // Time goes by hand.
    mm.platform().set_clock(1);
    // So that a page for pointers is to be had.
    let object = alloc(&mm, Form::Head, 1).unwrap();
    let pages: Vec<_> = (0..8).map(|_| mm.alloc_pages(GFP, 0).unwrap()).collect();
    pages.into_iter().for_each(|pfn| common::free(&mm, pfn));
    // SAFETY: nobody else has it.
    unsafe { retire(&mm, Form::Head, object) };
    assert_eq!(mm.event(Event::KvfreeHead), 0);
    mm.tick();
    assert_eq!(mm.kvfree_queued(), 1, "drained before its time");
    mm.platform().set_clock(20_000_000);
    mm.tick();
    assert_eq!(mm.kvfree_queued(), 1, "drained before its time");
    mm.platform().set_clock(20_000_001);
    mm.tick();
    assert_eq!(mm.kvfree_queued(), 0);
}

/// Without a page to be had: heads wait by themselves, the head-less wait for the grace period, and nothing fails.
#[test]
fn without_a_page() {
    let mm = machine(common::base_config());
    let objects: Vec<_> = (0..100)
        .map(|i| alloc(&mm, Form::Head, i).unwrap())
        .collect();
    let prepaid: Vec<_> = (0..100)
        .map(|i| alloc(&mm, Form::Prepaid, i).unwrap())
        .collect();
    mm.platform().faults().fail_one_in(1, 1);
    for (i, object) in objects.into_iter().enumerate() {
        let form = if i % 2 == 0 {
            Form::Head
        } else {
            Form::MightSleep
        };
        // SAFETY: nobody else has it.
        unsafe { retire(&mm, form, object) };
    }
    for object in prepaid {
        // SAFETY: nobody else has it.
        unsafe { retire(&mm, Form::Prepaid, object) };
    }
    assert_eq!(mm.event(Event::KvfreeHead), 50);
    assert_eq!(mm.event(Event::KvfreeWaited), 50);
    mm.kvfree_rcu_barrier();
    assert_eq!(mm.kvfree_queued(), 0);
    assert_eq!(mm.event(Event::PrepaidFreed), 100);
    mm.platform().faults().off();
}

/// A cache is destroyed with frees in flight, by every form.
#[test]
fn destroy_with_frees_in_flight() {
    let mm = machine(common::base_config());
    for flags in [
        CacheFlags::EMPTY,
        CacheFlags::RCU_PREPAID,
        CacheFlags::TYPESAFE_BY_RCU,
    ] {
        let cache = mm
            .kmem_cache_create("in flight", 64, 8, flags, None)
            .unwrap();
        for i in 0..300 {
            let object = mm.kmem_cache_alloc(&cache, GFP).unwrap();
            // SAFETY: nobody else has it; its first 16 bytes are the head.
            unsafe {
                match i % 3 {
                    0 if flags == CacheFlags::RCU_PREPAID => mm.kfree_rcu_prepaid(object),
                    0 => mm.kvfree_rcu(object, object.cast()),
                    1 => mm.kvfree_rcu_mightsleep(object),
                    _ => mm.kfree_nolock(object),
                }
            }
        }
        mm.kmem_cache_destroy(cache).unwrap();
    }
    // Prepaid and freed twice: seen at the end of the grace period at the latest.
    mm.shrink();
    assert_eq!(common::users(&common::ledger(&mm)), 0);
}

#[test]
fn a_prepaid_object_freed_twice_is_reported() {
    let reports = Arc::new(AtomicU32::new(0));
    let count = reports.clone();
    let builder = Host::builder().on_corruption(move |report| {
        assert_eq!(report.what, Corruption::DoubleFree);
        count.fetch_add(1, Ordering::Relaxed);
    });
    let mm = machine_with(common::base_config(), builder);
    let object = alloc(&mm, Form::Prepaid, 1).unwrap();
    let read = rcu::read_lock(mm.platform().rcu());
    // SAFETY: freeing twice is what is tested; the allocator finds it.
    unsafe {
        retire(&mm, Form::Prepaid, object);
        retire(&mm, Form::Prepaid, object);
    }
    assert_eq!(reports.load(Ordering::Relaxed), 1);
    drop(read);
    mm.kvfree_rcu_barrier();
}

/// What a prepaid object costs: two bits and its share of 16 bytes a slab.
#[test]
fn what_a_prepaid_object_costs() {
    let mm = machine(common::base_config());
    for size in [40, 64, 104, 200] {
        let plain = mm
            .kmem_cache_create("plain", size, 8, CacheFlags::EMPTY, None)
            .unwrap();
        let paid = mm
            .kmem_cache_create("paid", size, 8, CacheFlags::RCU_PREPAID, None)
            .unwrap();
        let mut density = [0.0; 2];
        mm.slabinfo(|c| {
            let which = match c.name {
                "plain" => 0,
                "paid" => 1,
                _ => return,
            };
            density[which] = (c.pages_per_slab * PAGE_SIZE) as f64 / c.objs_per_slab as f64;
        });
        println!(
            "{size}: {:.2} and {:.2} bytes an object",
            density[0], density[1]
        );
        assert!(density[1] - density[0] <= 4.0, "{size}: {density:?}");
        mm.kmem_cache_destroy(plain).unwrap();
        mm.kmem_cache_destroy(paid).unwrap();
    }
}

/// A type-stable cache's pages stay slab pages as long as a reader looks, however empty, and go then.
#[test]
fn type_stable_slabs_wait_for_readers() {
    let mm = machine(common::base_config());
    mm.kfence_set_sample(0);
    for (flags, stays) in [
        (CacheFlags::EMPTY, false),
        (CacheFlags::TYPESAFE_BY_RCU, true),
    ] {
        let cache = mm.kmem_cache_create("stable", 512, 8, flags, None).unwrap();
        let objects: Vec<_> = (0..64)
            .map(|_| mm.kmem_cache_alloc(&cache, GFP).unwrap())
            .collect();
        let pfn = mm.virt_to_pfn(objects[63].as_ptr());
        let read = rcu::read_lock(mm.platform().rcu());
        objects
            .iter()
            .for_each(|&o| common::cache_free(&mm, &cache, o));
        mm.kmem_cache_shrink(&cache);
        mm.shrink();
        let is_slab = matches!(mm.lookup(pfn).2, Memory::Slab(_));
        assert_eq!(is_slab, stays, "{flags:?}");
        drop(read);
        mm.shrink();
        assert!(!matches!(mm.lookup(pfn).2, Memory::Slab(_)));
        mm.kmem_cache_destroy(cache).unwrap();
    }
}

/// Rule 6, for our own descriptors: a folio's descriptor is a folio's as long as a reader looks.
#[test]
fn rule_6_descriptors_are_type_stable() {
    let mm = machine(common::base_config());
    let folios: Vec<_> = (0..1000)
        .map(|_| mm.alloc_folio(GFP, 0, FolioKind::Anon).unwrap())
        .collect();
    let Memory::Anon(desc) = mm.lookup(folios[500]).2 else {
        panic!("not a folio")
    };
    let at = mm.virt_to_pfn(desc.as_ptr().cast());
    let read = rcu::read_lock(mm.platform().rcu());
    folios.iter().for_each(|&pfn| common::free(&mm, pfn));
    mm.shrink();
    assert!(
        matches!(mm.lookup(at).2, Memory::Slab(_)),
        "the descriptor's page has gone"
    );
    // SAFETY: type-stable while we read: a folio, free.
    assert_eq!(unsafe { desc.as_ref() }.refcount(), 0);
    drop(read);
    mm.shrink();
    assert!(
        !matches!(mm.lookup(at).2, Memory::Slab(_)),
        "the descriptor's page stays for ever"
    );
}

/// References by page number, against owners who free and allocate: whoever has one has the page he asked for, and its contents stay.
#[test]
fn folio_get_finds_the_folio_of_the_page() {
    let mm = &machine(common::base_config());
    let stop = &AtomicBool::new(false);
    let (got, missed) = (&AtomicU64::new(0), &AtomicU64::new(0));
    std::thread::scope(|scope| {
        let owners: Vec<_> = (0..2u64)
            .map(|seed| {
                scope.spawn(move || {
                    let mut rng = Rng(seed);
                    let mut mine: Vec<(Pfn, usize)> = Vec::new();
                    for i in 0..scaled(300_000, 300) {
                        if mine.len() < 40 && rng.one_in(2) {
                            let order = rng.below(3);
                            let kind = [FolioKind::Anon, FolioKind::File][rng.below(2)];
                            let Ok(pfn) = mm.alloc_folio(GFP, order, kind) else {
                                continue;
                            };
                            // The folio says which page it is for.
                            let Some(folio) = mm.folio_get(pfn) else {
                                panic!("our own folio")
                            };
                            // SAFETY: in no list, mapped by nobody, neither moved nor split.
                            unsafe { folio.set_mapping(0x1000, u64::from(pfn.0)) };
                            mine.push((pfn, order));
                        } else if !mine.is_empty() {
                            let (pfn, _) = mine.swap_remove(rng.below(mine.len()));
                            // SAFETY: ours, and we forget it.
                            unsafe { mm.free_pages(pfn) };
                        }
                        if i % 20_000 == 0 {
                            mm.tick();
                            mm.shrink();
                        }
                    }
                    for (pfn, _) in mine {
                        // SAFETY: as above.
                        unsafe { mm.free_pages(pfn) };
                    }
                })
            })
            .collect();
        for seed in 10..12 {
            scope.spawn(move || {
                let mut rng = Rng(seed);
                while !stop.load(Ordering::Relaxed) {
                    let pfn = Pfn(1 + rng.below(16_000) as u32);
                    let Some(folio) = mm.folio_get(pfn) else {
                        missed.fetch_add(1, Ordering::Relaxed);
                        continue;
                    };
                    got.fetch_add(1, Ordering::Relaxed);
                    let (head, order, memory) = mm.lookup(pfn);
                    assert!(
                        matches!(memory, Memory::Anon(_) | Memory::File(_)),
                        "{memory:?}"
                    );
                    assert!(head == folio.head() && pfn.0 - head.0 < 1 << order);
                    // Set up, it is for this page; before, it says nothing.
                    if folio.mapping() == 0x1000 {
                        assert_eq!(folio.index(), u64::from(head.0));
                    }
                    drop(folio.clone());
                }
            });
        }
        owners.into_iter().for_each(|o| o.join().unwrap());
        stop.store(true, Ordering::Relaxed);
    });
    println!(
        "{} got, {} missed",
        got.load(Ordering::Relaxed),
        missed.load(Ordering::Relaxed)
    );
    assert!(got.load(Ordering::Relaxed) > 0);
    mm.shrink();
    let ledger = common::ledger(mm);
    assert!(
        ledger.balanced && common::users(&ledger) == 0,
        "{ledger:#?}"
    );
}

/// The polled form, waiting, expedited, barriers and callbacks that queue others.
#[test]
fn every_form_of_waiting() {
    let mm = machine(common::base_config());
    let rcu = mm.platform().rcu();
    assert!(rcu.poll_state(rcu::Cookie::ENDED));
    let cookie = rcu.get_state();
    assert!(!rcu.poll_state(cookie), "nobody asked for it");
    let cookie = rcu.start_poll();
    let read = rcu::read_lock(rcu);
    // The end of an inner section ends nothing.
    drop(rcu::read_lock(rcu));
    assert!(rcu.reading());
    rcu.advance();
    rcu.advance();
    assert!(!rcu.poll_state(cookie), "over while we read");
    drop(read);
    assert!(!rcu.reading());
    rcu.cond_synchronize(cookie);
    assert!(rcu.poll_state(cookie));
    rcu.synchronize();
    rcu.synchronize_expedited();

    static CALLED: AtomicU32 = AtomicU32::new(0);
    static HEADS: [RcuHead; 2] = [RcuHead::new(), RcuHead::new()];
    unsafe fn count(_: NonNull<RcuHead>) {
        CALLED.fetch_add(1, Ordering::Relaxed);
    }
    // SAFETY: static heads, used once each.
    HEADS
        .iter()
        .for_each(|head| unsafe { rcu.call(NonNull::from(head), count) });
    assert_eq!(CALLED.load(Ordering::Relaxed), 0);
    rcu.barrier();
    assert_eq!(CALLED.load(Ordering::Relaxed), 2);
}

/// A thread that sleeps outside a read section holds up nobody; one that reads does, and is named.
#[test]
#[cfg_attr(miri, ignore = "measures time")]
fn a_stall_names_the_reader() {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let log = seen.clone();
    let builder = Host::builder()
        .floating(2)
        .on_rcu_stall(20_000_000, move |stall| log.lock().unwrap().push(*stall));
    let mm = &machine_with(common::base_config(), builder);
    let (tid, ready, go) = (
        &AtomicU64::new(0),
        &AtomicBool::new(false),
        &AtomicBool::new(false),
    );
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // Reads, then sleeps outside: no business of anyone's.
            drop(rcu::read_lock(mm.platform().rcu()));
            while !go.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(5));
            }
        });
        scope.spawn(move || {
            // SAFETY: gettid(2) takes nothing.
            tid.store(unsafe { libc::gettid() } as u64, Ordering::Relaxed);
            let _read = rcu::read_lock(mm.platform().rcu());
            ready.store(true, Ordering::Release);
            while !go.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        while !ready.load(Ordering::Acquire) {
            std::thread::yield_now();
        }
        let cookie = mm.platform().rcu().start_poll();
        while seen.lock().unwrap().is_empty() {
            mm.platform().rcu().advance();
            assert!(!mm.platform().rcu().poll_state(cookie));
            std::thread::sleep(Duration::from_millis(1));
        }
        go.store(true, Ordering::Relaxed);
        mm.platform().rcu().cond_synchronize(cookie);
    });
    let seen = seen.lock().unwrap();
    assert!(
        seen.iter()
            .all(|s| s.reader == Some(tid.load(Ordering::Relaxed))),
        "{seen:?}"
    );
    assert!(seen[0].waited_ns >= 20_000_000);
}

/// Threads come and go, with several machines each; a machine may go before its readers' threads do.
#[test]
fn readers_need_not_register() {
    let keep = machine(common::base_config());
    std::thread::scope(|scope| {
        for _ in 0..8 {
            let keep = &keep;
            scope.spawn(move || {
                for _ in 0..scaled(20, 2) {
                    let other = machine(common::base_config());
                    let outer = rcu::read_lock(keep.platform().rcu());
                    let inner = rcu::read_lock(other.platform().rcu());
                    assert!(keep.platform().rcu().reading() && other.platform().rcu().reading());
                    drop(inner);
                    other.platform().rcu().synchronize();
                    drop(outer);
                    keep.platform().rcu().synchronize();
                }
            });
        }
    });
    keep.platform().rcu().synchronize();
}
