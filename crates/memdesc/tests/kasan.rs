//! What Linux's `kasan_test_c` and `mm/kfence` tests ask for, case by case.
//!
//! KASAN has a shadow byte for every eight and sees each single access, reads too. Here a stray *write* is seen by red zones and poison, when the object is freed, is
//! handed out again, or [`Mm::validate`] comes by; a stray *read* only where memory is inaccessible: beside one object in so many ([`Config::kfence_objects`]), free pages
//! ([`Config::debug_pagealloc`]), the guards of vmalloc areas, and memory that is not mapped. Such a touch kills, and is seen here in a child process.
//!
//! | Linux | here |
//! |---|---|
//! | `kmalloc_oob_right`, `_left`, `_node_oob_right`, `kmalloc_oob_16`, `kmalloc_oob_in_memset`, `_memset_2` to `_16`, `_memmove_*`, `krealloc_*_oob` | `writes_out_of_bounds` |
//! | the same by a read | a red zone is memory: not seen |
//! | `kmalloc_large_oob_right`, `page_alloc_oob_right` | the next block is somebody's, or free and inaccessible: `pages_out_of_bounds` |
//! | `kmalloc_large_uaf`, `page_alloc_uaf` | inaccessible: `pages_after_free`; `kmalloc_large_invalid_free`: `invalid_frees` |
//! | `krealloc_uaf`, `kmalloc_uaf`, `_16`, `_memset`, `uaf2`, `uaf3` | `writes_after_free` |
//! | `kmalloc_memmove_negative_size`, `_invalid_size`, `strings`, `bitops`, `atomics`, `stack`, `globals`, `alloca`, `copy_user`, `rust_uaf` | the compiler's instrumentation, or Rust's types; not the allocator's |
//! | `kfree_via_page`, `kfree_via_phys`, `ksize_unpoisons_memory`, `ksize_uaf` | `kfree_by_other_ways`, `ksize_of_what_is_freed` |
//! | `kmem_cache_oob`, `_accounted`, `_bulk`, `_double_free`, `_invalid_free`, `_double_destroy`, `_rcu_uaf` | `caches`; a cache destroyed is a handle that is gone, so twice does not compile |
//! | `double_kzfree` | `double_free_after_wiping` |
//! | `rcu_uaf`, `kmalloc_workqueue` | `writes_after_free`, after the grace period |
//! | `mempool_kmalloc_oob_right`, `mempool_slab_oob_right` | `mempool_out_of_bounds`; `mempool_kmalloc_large_oob_right`: the next block is somebody's, as above |
//! | `mempool_kmalloc_uaf`, `mempool_slab_uaf` | `mempool_after_free`, when it is taken out again; `mempool_kmalloc_large_uaf`, `mempool_page_alloc_uaf`: the same with `page_poison`, and inaccessible: `mempool_pages_after_free` |
//! | `mempool_kmalloc_double_free`, `_large_double_free`, `mempool_slab_double_free`, `mempool_page_alloc_double_free`, `mempool_kmalloc_invalid_free`, `_large_invalid_free` | `mempool_invalid_frees`, with those of slabs and pages |
//! | `vmalloc_oob`, `vmap_tags`, `vm_map_ram_tags`, `vmalloc_percpu` | `vmalloc_out_of_bounds`; there are no tags |
//! | KFENCE `out_of_bounds_read`, `_write`, `use_after_free_read`, `double_free`, `invalid_addr_free`, `corruption`, `free_bulk`, `init_on_free`, `kmalloc_aligned_oob_*`, `memcache_*`, `krealloc`, `gfpzero`, `invalid_access`, `shrink_memcache` | `kfence.rs`, of guarded objects; without the pool `writes_out_of_bounds`, `invalid_frees`, `caches`, and `meminit.rs` |

mod common;

use std::ptr::NonNull;

use common::*;
use memdesc::gfp::{GFP_ATOMIC, GFP_KERNEL};
use memdesc::*;
use memdesc_host::Host;

fn boot() -> (Mm<Host>, Reports) {
    let mut machine = Machine::flat(8192).unsampled();
    machine.config.slab_debug = ALL;
    machine.config.page_owner = 4096;
    let reports = Reports::default();
    let mm = machine.boot_on(reports.on(machine.host()).build().unwrap());
    (mm, reports)
}

fn write(object: NonNull<u8>, offset: isize, len: usize) {
    // SAFETY: within the object's slab or block, which stay mapped; out of bounds on purpose.
    unsafe { object.offset(offset).write_bytes(0x5d, len) };
}

#[track_caller]
fn object(seen: &Seen, what: Corruption, at: NonNull<u8>, bad: isize) {
    assert_eq!(
        (seen.what, seen.address),
        (what, at.addr().get()),
        "{}",
        seen.text
    );
    assert_eq!(seen.byte.map(|b| b.0), Some(bad), "{}", seen.text);
    let (file, _) = seen
        .allocated
        .as_ref()
        .expect("who allocated it is not known");
    assert!(file.ends_with("kasan.rs"), "{}", seen.text);
}

#[test]
fn writes_out_of_bounds() {
    let (mm, reports) = boot();
    // Size asked for, and a write: from where, how long. What is reported, and which byte is the first bad one.
    let (left, right) = (Corruption::RedzoneLeft, Corruption::RedzoneRight);
    for (name, size, from, len, what, bad) in [
        (
            "kmalloc_oob_right, off by one",
            115usize,
            115isize,
            1usize,
            right,
            115isize,
        ),
        ("kmalloc_oob_right, the 8 after", 120, 125, 1, right, 125),
        ("kmalloc_oob_left", 15, -1, 1, left, -1),
        ("kmalloc_node_oob_right", 4096, 4096, 1, right, 4096),
        ("kmalloc_oob_16", 13, 0, 16, right, 13),
        ("kmalloc_oob_in_memset", 123, 0, 128, right, 123),
        ("kmalloc_oob_memset_2", 127, 126, 2, right, 127),
        ("kmalloc_oob_memset_4", 125, 122, 4, right, 125),
        ("kmalloc_oob_memset_8", 121, 114, 8, right, 121),
        ("kmalloc_oob_memset_16", 113, 98, 16, right, 113),
        ("kmalloc_big_oob_right", 8187, 8187, 1, right, 8187),
        ("kfence kmalloc_aligned_oob_write", 73, 73, 1, right, 73),
        ("kfence corruption, before", 32, -3, 1, left, -3),
        ("kfence corruption, behind", 32, 32, 1, right, 32),
    ] {
        let p = mm.kmalloc(size, GFP_KERNEL).unwrap();
        write(p, from, len);
        kfree(&mm, p);
        object(&reports.one(), what, p, bad);
        let _ = name;
    }
    // Copies: memmove within and over the end.
    let p = mm.kmalloc(64, GFP_KERNEL).unwrap();
    // SAFETY: within the slab; 8 bytes too far.
    unsafe { p.copy_to(p.add(8), 64) };
    kfree(&mm, p);
    object(&reports.one(), right, p, 64);
    // krealloc_more_oob, krealloc_less_oob: the zone moves with what is asked for.
    for (from, to) in [(201, 235), (235, 201), (17, 19), (60, 50)] {
        let p = mm.kmalloc(from, GFP_KERNEL).unwrap();
        // SAFETY: live memory of ours, used by its new address alone.
        let p = unsafe { mm.krealloc(p, to, GFP_KERNEL) }.unwrap();
        write(p, 0, to);
        assert_eq!(mm.validate(|r| panic!("{r}")).errors(), 0);
        write(p, to as isize, 1);
        kfree(&mm, p);
        object(&reports.one(), right, p, to as isize);
    }
}

#[test]
fn writes_after_free() {
    let (mm, reports) = boot();
    for (name, size, offset, by_rcu) in [
        ("kmalloc_uaf", 10usize, 8isize, false),
        ("kmalloc_uaf_16", 16, 0, false),
        ("kmalloc_uaf_memset", 33, 0, false),
        ("kmalloc_uaf2", 43, 40, false),
        ("kmalloc_uaf3", 128, 8, false),
        ("krealloc_uaf", 201, 0, false),
        ("rcu_uaf", 64, 4, true),
    ] {
        let p = mm.kmalloc(size, GFP_KERNEL).unwrap();
        if by_rcu {
            // SAFETY: ours, the head lies in it, and nobody uses it but the bug below.
            unsafe { mm.kvfree_rcu(p, p.cast()) };
            mm.kvfree_rcu_barrier();
        } else {
            kfree(&mm, p);
        }
        write(p, offset, 1);
        let mut seen = Vec::new();
        let found = mm.validate(|r| seen.push((r.what, r.address, r.byte.map(|b| b.0))));
        assert_eq!(found.errors(), 1, "{name}: {seen:?}");
        assert_eq!(
            seen,
            [(Corruption::Poison, p.addr().get(), Some(offset))],
            "{name}"
        );
        // Who gets it next.
        assert_eq!(mm.kmalloc(size, GFP_ATOMIC).unwrap(), p);
        let seen = reports.one();
        object(&seen, Corruption::Poison, p, offset);
        assert!(seen.freed.is_some(), "{name}: {}", seen.text);
    }
    // krealloc of what is freed.
    let p = mm.kmalloc(201, GFP_KERNEL).unwrap();
    kfree(&mm, p);
    // SAFETY: wrong on purpose: it is told, and nothing is given back twice.
    let q = unsafe { mm.krealloc(p, 1000, GFP_KERNEL) };
    assert_eq!(reports.one().what, Corruption::DoubleFree);
    kfree(&mm, q.unwrap());
    assert_eq!(reports.take(), []);
}

#[test]
fn invalid_frees() {
    let (mm, reports) = boot();
    let inside = |p: NonNull<u8>, by: usize| p.map_addr(|a| a.saturating_add(by));
    for (size, by) in [(128usize, 1usize), (32, 8), (8, 4), (5000, 4096)] {
        let p = mm.kmalloc(size, GFP_KERNEL).unwrap();
        kfree(&mm, inside(p, by));
        let seen = reports.one();
        assert_eq!(
            (seen.what, seen.address),
            (Corruption::NotAHead, p.addr().get() + by)
        );
        kfree(&mm, p);
        kfree(&mm, p);
        let seen = reports.one();
        assert_eq!(
            (seen.what, seen.address),
            (Corruption::DoubleFree, p.addr().get())
        );
        assert!(
            seen.freed.is_some() && seen.allocated.is_some(),
            "{}",
            seen.text
        );
    }
    // kmalloc_large_invalid_free, and twice.
    let p = mm.kmalloc(100_000, GFP_KERNEL).unwrap();
    kfree(&mm, inside(p, 1));
    assert_eq!(reports.one().what, Corruption::NotAHead);
    kfree(&mm, p);
    kfree(&mm, p);
    let seen = reports.one();
    assert_eq!(seen.what, Corruption::DoubleFree);
    assert!(
        seen.text.contains("page freed as large_kmalloc order 5"),
        "{}",
        seen.text
    );
    // kfence invalid_addr_free: nobody's.
    let stack = 0u64;
    kfree(&mm, NonNull::from(&stack).cast());
    let seen = reports.one();
    assert_eq!(seen.what, Corruption::NotRam, "{}", seen.text);
    assert_eq!(mm.validate(|r| panic!("{r}")).errors(), 0);
}

#[test]
fn kfree_by_other_ways() {
    let (mm, reports) = boot();
    // kfree_via_page, kfree_via_phys: the address is the object's, however it was come by.
    let p = mm.kmalloc(4096, GFP_KERNEL).unwrap();
    let pfn = mm.virt_to_pfn(p.as_ptr());
    let offset = p.addr().get() - mm.page_address(pfn).addr();
    let again = NonNull::new(mm.page_address(pfn).wrapping_add(offset)).unwrap();
    kfree(&mm, again);
    assert_eq!(reports.take(), []);
    kfree(&mm, p);
    assert_eq!(reports.one().what, Corruption::DoubleFree);
}

#[test]
fn ksize_of_what_is_freed() {
    let (mm, reports) = boot();
    let p = mm.kmalloc(115, GFP_KERNEL).unwrap();
    // Asking how much there is does not make it the caller's: ksize_unpoisons_memory, since 6.1.
    // SAFETY: live memory.
    assert_eq!(unsafe { mm.ksize(p) }, 128);
    write(p, 115, 1);
    kfree(&mm, p);
    object(&reports.one(), Corruption::RedzoneRight, p, 115);
}

#[test]
fn double_free_after_wiping() {
    let (mm, reports) = boot();
    let p = mm.kmalloc(16, GFP_KERNEL).unwrap();
    // SAFETY: ours.
    unsafe { p.write_bytes(0, 16) };
    kfree(&mm, p);
    kfree(&mm, p);
    assert_eq!(reports.one().what, Corruption::DoubleFree);
}

#[test]
fn caches() {
    let (mm, reports) = boot();
    for flags in [ALL, ALL | CacheFlags::RECLAIM_ACCOUNT] {
        let cache = mm
            .kmem_cache_create("test_cache", 200, 0, flags, None)
            .unwrap();
        // kmem_cache_oob, kmem_cache_accounted
        let p = mm.kmem_cache_alloc(&cache, GFP_KERNEL).unwrap();
        write(p, 200, 1);
        cache_free(&mm, &cache, p);
        object(&reports.one(), Corruption::RedzoneRight, p, 200);
        // kmem_cache_bulk: clean
        let mut many = [std::ptr::null_mut(); 10];
        mm.kmem_cache_alloc_bulk(&cache, GFP_KERNEL, &mut many)
            .unwrap();
        many.iter()
            .for_each(|&o| fill(NonNull::new(o).unwrap(), 200, 0x42));
        // kfence free_bulk: one of them is clobbered, one is there twice
        let clobbered = NonNull::new(many[3]).unwrap();
        write(clobbered, -1, 1);
        many[7] = many[6];
        // SAFETY: wrong on purpose.
        unsafe { mm.kmem_cache_free_bulk(&cache, &many) };
        let seen = reports.take();
        assert_eq!(seen.len(), 2, "{seen:#?}");
        object(&seen[0], Corruption::RedzoneLeft, clobbered, -1);
        assert_eq!(seen[1].what, Corruption::DoubleFree);
        // kmem_cache_double_free, kmem_cache_invalid_free
        let p = mm.kmem_cache_alloc(&cache, GFP_KERNEL).unwrap();
        cache_free(&mm, &cache, p.map_addr(|a| a.saturating_add(1)));
        assert_eq!(reports.one().what, Corruption::NotAHead);
        cache_free(&mm, &cache, p);
        cache_free(&mm, &cache, p);
        assert_eq!(reports.one().what, Corruption::DoubleFree);
    }
    // kmem_cache_rcu_uaf: what a reader looks at in a section is an object still; what is written to it after is not seen, since
    // a free object of such a cache keeps what it holds. Its zones are checked.
    let cache = mm
        .kmem_cache_create(
            "test_cache",
            200,
            0,
            ALL | CacheFlags::TYPESAFE_BY_RCU,
            None,
        )
        .unwrap();
    let p = mm.kmem_cache_alloc(&cache, GFP_KERNEL).unwrap();
    fill(p, 200, 0x11);
    let read = mm.rcu_read_lock();
    cache_free(&mm, &cache, p);
    assert!(bytes(p, 200).iter().all(|&b| b == 0x11));
    write(p, 200, 1);
    drop(read);
    let q = mm.kmem_cache_alloc(&cache, GFP_KERNEL).unwrap();
    assert_eq!(q, p);
    object(&reports.one(), Corruption::RedzoneRight, p, 200);
}

/// Elements that came out of the pool, not from ordinary memory.
fn preallocated(mm: &Mm<Host>, pool: &Mempool<'_, Host>, n: usize) -> Vec<NonNull<u8>> {
    mm.platform().faults().fail_one_in(1, 1);
    let all = (0..n).map(|_| pool.alloc(GFP_ATOMIC).unwrap()).collect();
    mm.platform().faults().off();
    all
}

#[track_caller]
fn put(pool: &Mempool<'_, Host>, element: NonNull<u8>) {
    // SAFETY: the pool's, ours and used no more; or wrong on purpose.
    unsafe { pool.free(element) };
}

/// The pools of Linux's cases whose elements are objects.
fn pools_of_objects(f: impl Fn(&Mm<Host>, &Reports, &Mempool<'_, Host>, usize)) {
    for slab in [false, true] {
        let (mm, reports) = boot();
        let cache = mm
            .kmem_cache_create("test_cache", 123, 0, ALL, None)
            .unwrap();
        let (kind, size) = if slab {
            (MempoolKind::Slab(&cache), 123)
        } else {
            (MempoolKind::Kmalloc { size: 115 }, 115)
        };
        let pool = mm.mempool_create("test", kind, 4, GFP_KERNEL).unwrap();
        f(&mm, &reports, &pool, size);
        assert_eq!(reports.take(), []);
        assert_eq!(mm.validate(|r| panic!("{r}")).errors(), 0);
    }
}

#[test]
fn mempool_out_of_bounds() {
    pools_of_objects(|mm, reports, pool, size| {
        for (offset, what) in [
            (size as isize, Corruption::RedzoneRight),
            (size as isize + 3, Corruption::RedzoneRight),
            (-1, Corruption::RedzoneLeft),
        ] {
            let p = preallocated(mm, pool, 1)[0];
            write(p, 0, size);
            write(p, offset, 1);
            put(pool, p);
            object(&reports.one(), what, p, offset);
            // It is left alone, and the pool is one short until it is filled up.
            assert_eq!(pool.view().curr_nr, 3);
            pool.resize(4, GFP_KERNEL).unwrap();
        }
    });
}

#[test]
fn mempool_after_free() {
    pools_of_objects(|mm, reports, pool, size| {
        for offset in [0, size as isize - 1] {
            let p = preallocated(mm, pool, 1)[0];
            put(pool, p);
            assert!(pool.is_saturated());
            write(p, offset, 1);
            // Who gets it next, and who had it.
            assert_eq!(preallocated(mm, pool, 1), [p]);
            let seen = reports.one();
            object(&seen, Corruption::Poison, p, offset);
            assert!(seen.freed.is_some(), "{}", seen.text);
            put(pool, p);
        }
    });
    // mempool_kmalloc_large_uaf, mempool_page_alloc_uaf: by the pattern of free pages.
    let mut machine = Machine::flat(8192).unsampled();
    machine.config.page_poison = true;
    machine.config.debug_pagealloc = false;
    machine.config.init_on_free = false;
    let damaged = Reports::default();
    let mm = machine.boot_on(damaged.on(machine.host()).build().unwrap());
    for kind in [
        MempoolKind::Pages { order: 2 },
        MempoolKind::Kmalloc { size: 8193 },
    ] {
        let pool = mm.mempool_create("test", kind, 4, GFP_KERNEL).unwrap();
        let p = preallocated(&mm, &pool, 1)[0];
        put(&pool, p);
        write(p, 5000, 1);
        assert_eq!(preallocated(&mm, &pool, 1), [p]);
        let seen = damaged.one();
        assert!(
            matches!(seen.what, Corruption::PagePoison(_)),
            "{}",
            seen.text
        );
        assert_eq!(seen.byte, Some((5000 - 4096, 0x5d, 0xaa)));
        put(&pool, p);
    }
    assert_eq!(damaged.take(), []);
}

#[test]
fn mempool_invalid_frees() {
    let inside = |p: NonNull<u8>, by: usize| p.map_addr(|a| a.saturating_add(by));
    let (mm, reports) = boot();
    let cache = mm
        .kmem_cache_create("test_cache", 123, 0, ALL, None)
        .unwrap();
    let other = mm.kmem_cache_create("other", 123, 0, ALL, None).unwrap();
    for (kind, by) in [
        (MempoolKind::Kmalloc { size: 128 }, 1),
        (MempoolKind::Slab(&cache), 8),
        (MempoolKind::Kmalloc { size: 8193 }, 1),
        (MempoolKind::Pages { order: 2 }, PAGE_SIZE),
    ] {
        let pool = mm.mempool_create("test", kind, 4, GFP_KERNEL).unwrap();
        let two = preallocated(&mm, &pool, 2);
        put(&pool, inside(two[0], by));
        let seen = reports.one();
        assert_eq!(
            (seen.what, seen.address),
            (Corruption::NotAHead, two[0].addr().get() + by),
            "{kind:?}"
        );
        // Twice, while the pool lacks one and when it does not.
        for nth in 0..2 {
            put(&pool, two[nth]);
            assert_eq!(pool.view().curr_nr, 3 + nth);
            put(&pool, two[0]);
            let seen = reports.one();
            assert_eq!(
                (seen.what, seen.address),
                (Corruption::DoubleFree, two[0].addr().get()),
                "{kind:?}"
            );
            assert_eq!(pool.view().curr_nr, 3 + nth);
        }
        // What is no element of this pool's.
        let one = preallocated(&mm, &pool, 1)[0];
        let stranger = mm.kmem_cache_alloc(&other, GFP_KERNEL).unwrap();
        let small = mm.kmalloc(8, GFP_KERNEL).unwrap();
        put(&pool, small);
        let seen = reports.one().what;
        assert!(
            matches!(
                seen,
                Corruption::WrongType | Corruption::WrongCache | Corruption::NotAHead
            ),
            "{seen:?}"
        );
        if matches!(kind, MempoolKind::Slab(_)) {
            put(&pool, stranger);
            assert_eq!(reports.one().what, Corruption::WrongCache);
        }
        kfree(&mm, small);
        cache_free(&mm, &other, stranger);
        put(&pool, one);
        pool.destroy().unwrap();
    }
    assert_eq!(reports.take(), []);
    assert_eq!(mm.validate(|r| panic!("{r}")).errors(), 0);
}

/// Reads and writes where memory is inaccessible.
#[cfg(not(miri))]
mod inaccessible {
    use super::*;

    #[track_caller]
    fn dies(at: *mut u8) {
        for write in [false, true] {
            assert_eq!(touch(at, write), libc::SIGSEGV, "write: {write}");
        }
    }

    fn guarded() -> Mm<Host> {
        Machine::flat(8192).unsampled().guarded().boot()
    }

    #[test]
    fn pages_after_free() {
        let mm = guarded();
        for order in [0, 4, 9] {
            let pfn = mm.alloc_pages(GFP_KERNEL, order).unwrap();
            let at = mm.page_address(pfn);
            assert_eq!((touch(at, false), touch(at, true)), (0, 0));
            free(&mm, pfn);
            dies(at);
            dies(at.wrapping_add((PAGE_SIZE << order) - 1));
        }
        // kmalloc_large_uaf
        let p = mm.kmalloc(8193 + 10, GFP_KERNEL).unwrap();
        assert_eq!(touch(p.as_ptr(), true), 0);
        kfree(&mm, p);
        dies(p.as_ptr());
    }

    #[test]
    fn mempool_pages_after_free() {
        let mm = guarded();
        for kind in [
            MempoolKind::Pages { order: 0 },
            MempoolKind::Pages { order: 4 },
            MempoolKind::Kmalloc { size: 8193 },
        ] {
            let pool = mm.mempool_create("test", kind, 4, GFP_KERNEL).unwrap();
            let p = preallocated(&mm, &pool, 1)[0];
            assert_eq!((touch(p.as_ptr(), false), touch(p.as_ptr(), true)), (0, 0));
            put(&pool, p);
            dies(p.as_ptr());
            assert_eq!(preallocated(&mm, &pool, 1), [p]);
            assert_eq!(touch(p.as_ptr(), true), 0);
            put(&pool, p);
            pool.destroy().unwrap();
        }
    }

    #[test]
    fn pages_out_of_bounds() {
        let mm = guarded();
        let two = mm.alloc_pages(GFP_KERNEL, 5).unwrap();
        free(&mm, two);
        // The lower half, with the upper half free behind it.
        mm.alloc_pages_at(two, 4).unwrap();
        let end = mm.page_address(two).wrapping_add(PAGE_SIZE << 4);
        assert_eq!(touch(end.wrapping_sub(1), true), 0);
        dies(end);
    }

    #[test]
    fn vmalloc_out_of_bounds() {
        let mm = guarded();
        let p = mm.vmalloc(PAGE_SIZE * 2 - 100, GFP_KERNEL).unwrap();
        let end = p.as_ptr().wrapping_add(2 * PAGE_SIZE);
        assert_eq!(
            (touch(end.wrapping_sub(1), true), touch(p.as_ptr(), true)),
            (0, 0)
        );
        dies(end);
        // SAFETY: ours, and used no more but to see it die.
        unsafe { mm.vfree(p) };
        dies(p.as_ptr());
    }
}
