//! The slab's part of Linux's `lib/test_meminit`: what objects hold when they are handed out, by caches with and without constructor, type-stable or not,
//! asked for zeroed or not; and that what RCU readers may still look at stays until they are done.
//!
//! | Linux | here |
//! |---|---|
//! | `test_kmemcache`: sizes 8 to 1024 × {ctor, RCU, zero} | `caches` |
//! | `do_kmem_cache_size_bulk` | `bulk` |
//! | `do_kmem_cache_rcu_persistent` | `contents_stay_until_the_grace_period` |
//! | `test_kmalloc`, `test_kvmalloc` | `kmalloc_reads_zero` |
//! | `test_pages`, `init_on_free` of pages | with the free-page services |

mod common;

use std::ptr::NonNull;

use common::*;
use memdesc::gfp::{__GFP_ZERO, GFP_KERNEL};
use memdesc::*;

const GARBAGE: u8 = 0x9a;

fn ctor(object: NonNull<u8>) {
    // SAFETY: a new object of at least 8 bytes, nobody else's yet.
    unsafe { object.write_bytes(0x5c, 8) };
}

#[test]
fn caches() {
    let machine = Machine::flat(4096).unsampled();
    let mm = machine.boot();
    for size in (3..=10).map(|n| 1usize << n) {
        for debug in [CacheFlags::EMPTY, ALL] {
            for (has_ctor, rcu, zero) in (0..8).map(|n| (n & 1 != 0, n & 2 != 0, n & 4 != 0)) {
                // Linux forbids to zero what a constructor made.
                if has_ctor && zero {
                    continue;
                }
                let stable = if rcu {
                    CacheFlags::TYPESAFE_BY_RCU
                } else {
                    CacheFlags::EMPTY
                };
                let cache = mm
                    .kmem_cache_create(
                        "test_cache",
                        size,
                        1,
                        debug | stable,
                        has_ctor.then_some(ctor as fn(NonNull<u8>)),
                    )
                    .unwrap();
                let gfp = if zero {
                    GFP_KERNEL | __GFP_ZERO
                } else {
                    GFP_KERNEL
                };
                for _ in 0..10 {
                    let p = mm.kmem_cache_alloc(&cache, gfp).unwrap();
                    if zero {
                        assert!(bytes(p, size).iter().all(|&b| b == 0), "{size} {debug:?}");
                    }
                    if has_ctor {
                        assert!(bytes(p, 8).iter().all(|&b| b == 0x5c), "{size} {debug:?}");
                    }
                    fill(p, size, GARBAGE);
                    if has_ctor {
                        // The owner puts back what the constructor made.
                        ctor(p);
                    }
                    let copy = bytes(p, size).to_vec();
                    {
                        // A reader in a section sees what there was, in a type-stable cache or one with a constructor.
                        let _read = mm.rcu_read_lock();
                        cache_free(&mm, &cache, p);
                        if rcu || has_ctor {
                            assert_eq!(bytes(p, size), copy, "{size} {debug:?}");
                        }
                    }
                }
                mm.kmem_cache_destroy(cache).unwrap();
            }
        }
    }
    teardown(&machine, &mm);
}

#[test]
fn bulk() {
    let machine = Machine::flat(4096).unsampled();
    let mm = machine.boot();
    for size in (3..=10).map(|n| 1usize << n) {
        for debug in [CacheFlags::EMPTY, ALL] {
            let cache = mm
                .kmem_cache_create("test_cache", size, 1, debug, None)
                .unwrap();
            for round in 0..10 {
                let mut objects = [std::ptr::null_mut(); 100];
                mm.kmem_cache_alloc_bulk(&cache, GFP_KERNEL | __GFP_ZERO, &mut objects)
                    .unwrap();
                for &object in &objects {
                    let object = NonNull::new(object).unwrap();
                    assert!(
                        bytes(object, size).iter().all(|&b| b == 0),
                        "{size} {round}"
                    );
                    fill(object, size, GARBAGE);
                }
                // SAFETY: all ours, and used no more.
                unsafe { mm.kmem_cache_free_bulk(&cache, &objects) };
            }
            mm.kmem_cache_destroy(cache).unwrap();
        }
    }
    teardown(&machine, &mm);
}

#[test]
fn contents_stay_until_the_grace_period() {
    let machine = Machine::flat(4096).unsampled();
    let mm = machine.boot();
    for size in [8, 64, 512, 1024] {
        let cache = mm
            .kmem_cache_create("test_cache", size, 1, CacheFlags::TYPESAFE_BY_RCU, None)
            .unwrap();
        let p = mm.kmem_cache_alloc(&cache, GFP_KERNEL).unwrap();
        fill(p, size, GARBAGE);
        let read = mm.rcu_read_lock();
        cache_free(&mm, &cache, p);
        // Whatever is done to the cache meanwhile: its slabs do not go.
        mm.kmem_cache_shrink(&cache);
        for _ in 0..1000 {
            assert!(bytes(p, size).iter().all(|&b| b == GARBAGE), "{size}");
        }
        drop(read);
        mm.kmem_cache_destroy(cache).unwrap();
    }
    teardown(&machine, &mm);
}

#[test]
fn kmalloc_reads_zero() {
    let machine = Machine::flat(8192).unsampled();
    let mm = machine.boot();
    for size in [1, 8, 31, 96, 1000, 4096, 8192, 8193, 100_000] {
        for _ in 0..3 {
            let p = mm.kmalloc(size, GFP_KERNEL | __GFP_ZERO).unwrap();
            assert!(bytes(p, size).iter().all(|&b| b == 0), "{size}");
            fill(p, size, GARBAGE);
            kfree(&mm, p);
        }
        if !cfg!(miri) {
            let p = mm.vzalloc(size, GFP_KERNEL).unwrap();
            assert!(bytes(p, size).iter().all(|&b| b == 0), "{size}");
            fill(p, size, GARBAGE);
            // SAFETY: ours, and used no more.
            unsafe { mm.vfree(p) };
        }
    }
    teardown(&machine, &mm);
}

/// `init_on_alloc` and `init_on_free` of objects, by whichever call they come and go.
#[test]
fn objects_hold_nothing() {
    type Free = fn(&Mm<memdesc_host::Host>, &Cache<'_>, NonNull<u8>);
    // SAFETY: objects of the test's own, of that cache, used no more.
    let ways: [(&str, Free); 5] = [
        ("kmem_cache_free", |mm, cache, p| cache_free(mm, cache, p)),
        ("kfree", |mm, _, p| kfree(mm, p)),
        ("nolock", |mm, _, p| unsafe { mm.kfree_nolock(p) }),
        ("kvfree_rcu", |mm, _, p| {
            // SAFETY: as above.
            unsafe { mm.kvfree_rcu_mightsleep(p) };
            mm.kvfree_rcu_barrier();
        }),
        ("prepaid", |mm, _, p| {
            // SAFETY: as above.
            unsafe { mm.kfree_rcu_prepaid(p) };
            mm.kvfree_rcu_barrier();
            mm.shrink();
        }),
    ];
    for debug in [
        CacheFlags::EMPTY,
        CacheFlags::RED_ZONE,
        CacheFlags::STORE_USER,
        CacheFlags::NO_SHEAVES,
    ] {
        for on_free in [false, true] {
            // It looks at objects that are free.
            let mut machine = Machine::flat(8192).unsampled();
            machine.config.init_on_alloc = !on_free;
            machine.config.init_on_free = on_free;
            machine.config.page_poison = false;
            let mm = machine.boot();
            for size in [8, 40, 256, 1024] {
                let flags = debug | CacheFlags::RCU_PREPAID;
                let cache = mm.kmem_cache_create("init", size, 8, flags, None).unwrap();
                // It keeps the slabs.
                let keep = mm.kmem_cache_alloc(&cache, GFP_KERNEL).unwrap();
                for (way, free) in ways {
                    let p = mm.kmem_cache_alloc(&cache, GFP_KERNEL).unwrap();
                    if !on_free {
                        assert!(bytes(p, size).iter().all(|&b| b == 0), "{way} {size}");
                    }
                    fill(p, size, GARBAGE);
                    free(&mm, &cache, p);
                    // What waits for the next normal free is linked through itself.
                    mm.tick();
                    let left = bytes(p, size).to_vec();
                    let gone = left.iter().all(|&b| b == 0);
                    assert!(!on_free || gone, "{way} {size} {debug:?}: {left:x?}");
                }
                cache_free(&mm, &cache, keep);
                mm.shrink();
                mm.kmem_cache_destroy(cache).unwrap();
                for kind in [GFP_KERNEL, GFP_KERNEL | memdesc::gfp::__GFP_RECLAIMABLE] {
                    let p = mm.kmalloc(size, kind).unwrap();
                    if !on_free {
                        assert!(bytes(p, size).iter().all(|&b| b == 0));
                    }
                    fill(p, size, GARBAGE);
                    kfree(&mm, p);
                    if on_free {
                        assert!(bytes(p, size).iter().all(|&b| b == 0), "kmalloc-{size}");
                    }
                }
            }
            let p = mm.kmalloc(100_000, GFP_KERNEL).unwrap();
            fill(p, 100_000, GARBAGE);
            kfree(&mm, p);
            let again = mm.kmalloc(100_000, GFP_KERNEL).unwrap();
            assert_eq!(again, p);
            assert!(bytes(again, 100_000).iter().all(|&b| b == 0));
            kfree(&mm, again);
            teardown(&machine, &mm);
        }
    }
}
