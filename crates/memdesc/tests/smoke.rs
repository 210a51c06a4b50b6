//! The way of pages and objects, once.

mod common;

use memdesc::gfp::{GFP_HIGHUSER_MOVABLE, GFP_KERNEL};
use memdesc::*;
use memdesc_host::Host;

fn mm(pages: u32) -> Mm<Host> {
    let (host, ranges) = Host::small(pages).unwrap();
    Mm::new(
        host,
        &Config {
            memory_is_zeroed: true,
            ..common::base_config()
        },
        &ranges,
    )
    .unwrap()
}

#[test]
fn pages_go_round() {
    let mm = mm(if cfg!(miri) { 2048 } else { 16384 });
    let before = mm.ledger();
    assert!(before.balanced, "{before:?}");
    let mut all = Vec::new();
    // Miri is a thousand times slower: fewer of each, and the ledger only now and then.
    let (orders, singles) = if cfg!(miri) { (7, 10) } else { (10, 500) };
    for order in (0..=orders).chain(vec![0; singles]).chain(0..=orders) {
        let pfn = mm.alloc_pages(GFP_KERNEL, order).unwrap();
        for page in 0..1 << order {
            let (head, o, memory) = mm.lookup(pfn.add(page));
            assert_eq!((head, o), (pfn, order));
            assert!(matches!(memory, Memory::Bare), "{memory:?}");
        }
        all.push(pfn);
        if !cfg!(miri) || all.len() % 8 == 0 {
            let ledger = mm.ledger();
            assert!(ledger.balanced, "{order} {ledger:?}");
        }
    }
    for order in [0, 3, if cfg!(miri) { 5 } else { 9 }] {
        all.push(
            mm.alloc_folio(GFP_HIGHUSER_MOVABLE, order, FolioKind::Anon)
                .unwrap(),
        );
        all.push(mm.alloc_page_table(GFP_KERNEL, 0).unwrap());
    }
    for pfn in all {
        // SAFETY: allocated above, freed once.
        unsafe { mm.free_pages(pfn) };
    }
    mm.shrink();
    let after = mm.ledger();
    assert!(after.balanced, "{after:?}");
    println!("{after:?}");
    assert_eq!(mm.event(Event::AllocOnFree), 0);
    mm.vmstat(|n, v| println!("{n} {v}"));
}

#[test]
fn objects_go_round() {
    let mm = mm(if cfg!(miri) { 2048 } else { 16384 });
    let mut all = Vec::new();
    for size in (1..20000).step_by(if cfg!(miri) { 997 } else { 37 }) {
        let ptr = mm
            .kmalloc(size, GFP_KERNEL | memdesc::gfp::__GFP_ZERO)
            .unwrap();
        // SAFETY: live, ours, and at least `size` bytes long.
        unsafe {
            assert!(mm.ksize(ptr) >= size);
            ptr.write_bytes(0x77, size);
        }
        all.push(ptr);
    }
    assert!(mm.ledger().balanced);
    for ptr in all {
        // SAFETY: allocated above, freed once.
        unsafe { mm.kfree(ptr) };
    }
    let cache = mm
        .kmem_cache_create("test", 104, 8, CacheFlags::EMPTY, None)
        .unwrap();
    let objs: Vec<_> = (0..if cfg!(miri) { 150 } else { 10000 })
        .map(|_| mm.kmem_cache_alloc(&cache, GFP_KERNEL).unwrap())
        .collect();
    for o in objs {
        // SAFETY: from this cache, freed once.
        unsafe { mm.kmem_cache_free(&cache, o) };
    }
    mm.kmem_cache_destroy(cache).unwrap();
    mm.shrink();
    let after = mm.ledger();
    assert!(after.balanced, "{after:?}");
    println!("{after:?}");
    mm.slabinfo(|c| {
        if c.num_slabs > 0 {
            println!("{c:?}")
        }
    });
}
