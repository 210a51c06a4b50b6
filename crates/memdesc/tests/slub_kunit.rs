//! Linux's `slub_kunit`, case by case.
//!
//! Linux counts an error for each line that it prints of one fault, so a clobbered zone counts 2; here a fault is one report.
//!
//! | Linux | here |
//! |---|---|
//! | `clobber_zone` | validate finds it, and the free does |
//! | `next_pointer` | objects hold no pointers; what decides which are free is a bitmap and two counts: `bitmap_and_counts` |
//! | `first_word`, `clobber_50th_byte` | validate finds it, and who gets the object next |
//! | `clobber_redzone_free` | the same |
//! | `kmalloc_redzone_access` | validate finds it |
//! | `kfree_rcu`, `kfree_rcu_wq_destroy` | no report, and the cache goes |
//! | `leak_destroy` | the cache stays, and the object is named |
//! | `krealloc_redzone_zeroing` | the same bytes as there |
//! | kmalloc buckets | there are none here |

mod common;

use std::ptr::NonNull;

use common::*;
use memdesc::gfp::{__GFP_ZERO, GFP_KERNEL};
use memdesc::*;
use memdesc_host::Host;

fn boot(slab_debug: CacheFlags) -> (Mm<Host>, Reports) {
    let mut machine = Machine::flat(2048);
    machine.config.slab_debug = slab_debug;
    let reports = Reports::default();
    let mm = machine.boot_on(reports.on(machine.host()).build().unwrap());
    (mm, reports)
}

fn poke(object: NonNull<u8>, offset: usize, byte: u8) {
    // SAFETY: within the object's slab, which stays mapped.
    unsafe { object.add(offset).write_volatile(byte) };
}

/// What validate says of a cache: the only error, and what it is.
#[track_caller]
fn only(
    mm: &Mm<Host>,
    cache: &Cache<'_>,
    what: Corruption,
    object: NonNull<u8>,
    bad: isize,
) -> String {
    let mut reports = Vec::new();
    let found = mm.validate_slab_cache(cache, |r| {
        reports.push((r.what, r.address, r.byte.map(|b| b.0), r.to_string()));
    });
    assert_eq!((found.errors(), reports.len()), (1, 1), "{reports:#?}");
    let (kind, address, byte, text) = reports.remove(0);
    assert_eq!(
        (kind, address, byte),
        (what, object.addr().get(), Some(bad)),
        "{text}"
    );
    text
}

#[track_caller]
fn clean(mm: &Mm<Host>, cache: &Cache<'_>) {
    let found = mm.validate_slab_cache(cache, |r| panic!("{r}"));
    assert_eq!(found, Validation::default());
}

#[test]
fn clobber_zone() {
    let (mm, reports) = boot(CacheFlags::EMPTY);
    let cache = mm
        .kmem_cache_create("TestSlub_RZ_alloc", 64, 0, CacheFlags::RED_ZONE, None)
        .unwrap();
    let p = mm.kmem_cache_alloc(&cache, GFP_KERNEL).unwrap();
    let q = mm.kmem_cache_alloc(&cache, GFP_KERNEL).unwrap();
    clean(&mm, &cache);
    poke(p, 64, 0x12);
    let text = only(&mm, &cache, Corruption::RedzoneRight, p, 64);
    // The bytes are shown, and the neighbour.
    assert!(
        text.contains("12 cc cc cc") && text.contains("^^"),
        "{text}"
    );
    assert!(
        text.contains(&format!("{:#x}, in use", q.addr().get())),
        "{text}"
    );
    cache_free(&mm, &cache, p);
    assert_eq!(reports.one().what, Corruption::RedzoneRight);
    cache_free(&mm, &cache, q);
}

#[test]
fn bitmap_and_counts() {
    let (mm, reports) = boot(CacheFlags::EMPTY);
    let cache = mm
        .kmem_cache_create("TestSlub_next_ptr_free", 64, 0, CacheFlags::POISON, None)
        .unwrap();
    let p = mm.kmem_cache_alloc(&cache, GFP_KERNEL).unwrap();
    let Memory::Slab(desc) = mm.lookup(mm.virt_to_pfn(p.as_ptr())).2 else {
        panic!("no slab")
    };
    cache_free(&mm, &cache, p);
    // Bytes 20 and 22 of the descriptor are its counts, 32 and on its bitmap.
    let bitmap = desc.as_ptr().cast::<u64>().wrapping_add(4);
    // SAFETY: the slab's descriptor, which nobody else uses.
    let before = unsafe { bitmap.replace(bitmap.read() & !(1 << 7)) };
    let found = mm.validate_slab_cache(&cache, |r| assert_eq!(r.what, Corruption::BadCounts));
    // The slab's count and the cache's.
    assert!(
        found.counts >= 1 && found.errors() == found.counts,
        "{found:?}"
    );
    clean(&mm, &cache);
    // Repaired by hand, and the counts are wrong once more; then right.
    // SAFETY: as above.
    unsafe { bitmap.write(before) };
    let found = mm.validate_slab_cache(&cache, |_| {});
    assert!(
        found.counts >= 1 && found.errors() == found.counts,
        "{found:?}"
    );
    clean(&mm, &cache);
    assert_eq!(reports.take(), []);
    mm.kmem_cache_destroy(cache).unwrap();
}

#[test]
fn first_word_and_50th_byte() {
    for offset in [0usize, 50] {
        let (mm, reports) = boot(CacheFlags::EMPTY);
        let cache = mm
            .kmem_cache_create("TestSlub_poison", 64, 0, CacheFlags::POISON, None)
            .unwrap();
        let p = mm.kmem_cache_alloc(&cache, GFP_KERNEL).unwrap();
        cache_free(&mm, &cache, p);
        clean(&mm, &cache);
        poke(p, offset, 0x78);
        only(&mm, &cache, Corruption::Poison, p, offset as isize);
        assert_eq!(mm.kmem_cache_alloc(&cache, GFP_KERNEL).unwrap(), p);
        assert_eq!(reports.one().byte, Some((offset as isize, 0x78, 0x6b)));
        clean(&mm, &cache);
        cache_free(&mm, &cache, p);
        mm.kmem_cache_destroy(cache).unwrap();
    }
}

#[test]
fn clobber_redzone_free() {
    let (mm, reports) = boot(CacheFlags::EMPTY);
    let cache = mm
        .kmem_cache_create("TestSlub_RZ_free", 64, 0, CacheFlags::RED_ZONE, None)
        .unwrap();
    let p = mm.kmem_cache_alloc(&cache, GFP_KERNEL).unwrap();
    cache_free(&mm, &cache, p);
    poke(p, 64, 0xab);
    only(&mm, &cache, Corruption::RedzoneRight, p, 64);
    assert_eq!(mm.kmem_cache_alloc(&cache, GFP_KERNEL).unwrap(), p);
    assert_eq!(reports.one().byte, Some((64, 0xab, 0xbb)));
}

#[test]
fn kmalloc_redzone_access() {
    let (mm, reports) = boot(ALL);
    let p = mm.kmalloc(18, GFP_KERNEL).unwrap();
    assert_eq!(mm.validate(|r| panic!("{r}")).errors(), 0);
    poke(p, 18, 0xab);
    poke(p, 19, 0xab);
    let mut reports_of = Vec::new();
    let found = mm.validate(|r| reports_of.push((r.what, r.byte, r.cache.map(str::to_owned))));
    assert_eq!((found.objects, found.errors()), (1, 1));
    let cache = Some("kmalloc-32".to_owned());
    assert_eq!(
        reports_of,
        [(Corruption::RedzoneRight, Some((18, 0xab, 0xcc)), cache)]
    );
    kfree(&mm, p);
    assert_eq!(reports.one().what, Corruption::RedzoneRight);
}

#[test]
fn kfree_rcu() {
    for flags in [CacheFlags::EMPTY, ALL] {
        let (mm, reports) = boot(CacheFlags::EMPTY);
        let cache = mm
            .kmem_cache_create("TestSlub_kfree_rcu", 64, 0, flags, None)
            .unwrap();
        let p = mm.kmem_cache_alloc(&cache, GFP_KERNEL).unwrap();
        // SAFETY: ours, the head lies in it, and nobody uses it any more.
        unsafe { mm.kvfree_rcu(p, p.cast()) };
        mm.kvfree_rcu_barrier();
        assert_eq!(mm.kmem_cache_destroy(cache).map_err(|e| e.live), Ok(()));
        assert_eq!(reports.take(), []);
    }
}

#[test]
fn kfree_rcu_wq_destroy() {
    let (mm, reports) = boot(CacheFlags::EMPTY);
    for round in 0..scaled(20, 2) {
        let cache = mm
            .kmem_cache_create("TestSlub_kfree_rcu_wq", 64, 0, ALL, None)
            .unwrap();
        let p = mm.kmem_cache_alloc(&cache, GFP_KERNEL).unwrap();
        // SAFETY: as above.
        unsafe { mm.kvfree_rcu(p, p.cast()) };
        // Another thread takes it down, sooner or later, while the free is under way.
        std::thread::scope(|scope| {
            let (mm, reports) = (&mm, &reports);
            scope.spawn(move || {
                std::thread::sleep(std::time::Duration::from_micros(round as u64 * 37 % 300));
                mm.kvfree_rcu_barrier();
                assert_eq!(mm.kmem_cache_destroy(cache).map_err(|e| e.live), Ok(()));
                assert_eq!(reports.take(), []);
            });
        });
    }
}

#[test]
fn leak_destroy() {
    let (mm, reports) = boot(CacheFlags::EMPTY);
    let cache = mm
        .kmem_cache_create("TestSlub_leak_destroy", 64, 0, ALL, None)
        .unwrap();
    let p = mm.kmem_cache_alloc(&cache, GFP_KERNEL).unwrap();
    let cache = match mm.kmem_cache_destroy(cache) {
        Err(DestroyError { cache, live: 1 }) => cache,
        other => panic!("{other:?}"),
    };
    mm.report_leaks(&cache);
    let seen = reports.one();
    assert_eq!(
        (seen.what, seen.address),
        (Corruption::ObjectsLeft, p.addr().get())
    );
    assert!(
        seen.text
            .contains("allocated by crates/memdesc/tests/slub_kunit.rs"),
        "{}",
        seen.text
    );
    cache_free(&mm, &cache, p);
    mm.kmem_cache_destroy(cache).unwrap();
}

#[test]
fn krealloc_redzone_zeroing() {
    let (mm, reports) = boot(ALL);
    let p = mm.kmalloc(48, GFP_KERNEL | __GFP_ZERO).unwrap();
    fill(p, 48, 0xff);
    let all = || bytes(p, 64).to_vec();
    // SAFETY: live memory of ours; it stays where it is.
    let shrunk = unsafe { mm.krealloc(p, 40, GFP_KERNEL | __GFP_ZERO) }.unwrap();
    assert_eq!(shrunk, p);
    assert!(all()[..40].iter().all(|&b| b == 0xff) && all()[40..].iter().all(|&b| b == 0xcc));
    // SAFETY: as above.
    let grown = unsafe { mm.krealloc(p, 56, GFP_KERNEL | __GFP_ZERO) }.unwrap();
    assert_eq!(grown, p);
    assert!(all()[..40].iter().all(|&b| b == 0xff), "{:02x?}", all());
    assert!(all()[40..56].iter().all(|&b| b == 0), "{:02x?}", all());
    assert!(all()[56..].iter().all(|&b| b == 0xcc), "{:02x?}", all());
    assert_eq!(mm.validate(|r| panic!("{r}")).errors(), 0);
    // SAFETY: as above; it moves this time.
    let moved = unsafe { mm.krealloc(p, 112, GFP_KERNEL | __GFP_ZERO) }.unwrap();
    assert_ne!(moved, p);
    assert!(bytes(moved, 40).iter().all(|&b| b == 0xff));
    assert!(
        bytes(moved, 112)[40..].iter().all(|&b| b == 0),
        "{:02x?}",
        bytes(moved, 112)
    );
    kfree(&mm, moved);
    assert_eq!(reports.take(), []);
}
