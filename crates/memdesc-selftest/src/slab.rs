//! Objects and bare pages: the way of each once, values in caches, descriptors of one's own.

use alloc::vec;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicUsize, Ordering};

use memdesc::gfp::{__GFP_MEMALLOC, __GFP_ZERO, GFP_ATOMIC, GFP_HIGHUSER_MOVABLE, GFP_KERNEL};
use memdesc::*;

use crate::Lab;

struct Counted<'a>(&'a AtomicUsize, u64);

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

/// Boot memory and page 0, which the ledger counts as metadata.
fn reserved<P: Platform>(mm: &Mm<P>) -> u64 {
    mm.ledger().walk.by_type[PageType::Reserved as usize]
}

/// Pages go round.
pub fn pages_go_round<L: Lab>(lab: &L) {
    let mm = lab.flat(if cfg!(miri) { 2048 } else { 16384 }).boot();
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
    assert_eq!(mm.event(Event::AllocOnFree), 0);
}

/// Objects go round.
pub fn objects_go_round<L: Lab>(lab: &L) {
    let mm = lab.flat(if cfg!(miri) { 2048 } else { 16384 }).boot();
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
}

/// Values are dropped once and given back.
pub fn values_are_dropped_once_and_given_back<L: Lab>(lab: &L) {
    let mm = lab.flat(2048).boot();
    let dropped = AtomicUsize::new(0);
    let cache = KmemCache::new(&mm, "counted", CacheFlags::EMPTY).unwrap();
    let mut boxes: Vec<_> = (0..500)
        .map(|i| cache.alloc(GFP_KERNEL, Counted(&dropped, i)).ok().unwrap())
        .collect();
    for (i, value) in boxes.iter_mut().enumerate() {
        assert_eq!(value.1, i as u64);
        value.1 += 1;
    }
    assert!(boxes.iter().enumerate().all(|(i, b)| b.1 == i as u64 + 1));
    drop(boxes.split_off(100));
    assert_eq!(dropped.load(Ordering::Relaxed), 400);
    drop(boxes);
    assert_eq!(dropped.load(Ordering::Relaxed), 500);
    cache.destroy().unwrap();
    mm.shrink();
    assert!(mm.ledger().balanced);
    assert_eq!(
        mm.pages_of(PageType::Slab),
        mm.ledger().metadata - reserved(&mm)
    );
}

/// A leaked value keeps its cache.
pub fn a_leaked_value_keeps_its_cache<L: Lab>(lab: &L) {
    let mm = lab.flat(2048).boot();
    let cache = KmemCache::new(&mm, "leaky", CacheFlags::EMPTY).unwrap();
    core::mem::forget(cache.alloc(GFP_KERNEL, 7u64).ok().unwrap());
    assert_eq!(cache.destroy(), Err(1));
    let mut seen = 0;
    mm.slabinfo(|c| seen += u64::from(c.name == "leaky") * c.active_objs);
    assert_eq!(seen, 1);
}

/// Bulk pages are pages.
pub fn bulk_pages_are_pages<L: Lab>(lab: &L) {
    let mm = lab.flat(4096).boot();
    let mut pages = [Pfn::NONE; 700];
    assert_eq!(
        mm.alloc_pages_bulk(GFP_KERNEL | __GFP_ZERO, &mut pages),
        700
    );
    let mut sorted = pages.to_vec();
    sorted.sort_unstable();
    sorted.dedup();
    assert_eq!(sorted.len(), 700);
    for &pfn in &pages {
        assert!(matches!(mm.lookup(pfn), (head, 0, Memory::Bare) if head == pfn));
    }
    assert_eq!(mm.pages_of(PageType::Bare), 700);
    // SAFETY: allocated above, freed once.
    unsafe { mm.free_pages_bulk(&pages) };
    assert_eq!(mm.pages_of(PageType::Bare), 0);
    // More than there is: as many as there are.
    let mut all = vec![Pfn::NONE; 5000];
    let n = mm.alloc_pages_bulk(GFP_KERNEL, &mut all);
    assert!((3000..4096).contains(&n), "{n}");
    assert!(mm.ledger().balanced);
}

/// Ten of them.
pub fn ten_of_them<L: Lab>(lab: &L) {
    let all: Vec<_> = (0..10).map(|_| lab.flat(1024).boot()).collect();
    let objects: Vec<_> = all
        .iter()
        .map(|mm| mm.kmalloc(64, GFP_KERNEL).unwrap())
        .collect();
    for (i, mm) in all.iter().enumerate() {
        assert!(mm.ledger().balanced);
        // SAFETY: each from its own.
        unsafe { mm.kfree(objects[i]) };
    }
}

/// The order a cache wants cannot be had, but single pages can: Linux falls back to the smallest slabs, and so do we.
pub fn slabs_get_smaller_when_memory_is_in_pieces<L: Lab>(lab: &L) {
    let mm = lab.flat(4096).boot();
    mm.kfence_set_sample(0);
    let cache = mm
        .kmem_cache_create("inode", 1128, 8, CacheFlags::EMPTY, None)
        .unwrap();
    let mut wanted = 0;
    mm.slabinfo(|c| wanted += usize::from(c.name == "inode") * c.pages_per_slab);
    assert!(wanted > 1, "such objects want slabs of several pages");
    let mut pages = Vec::new();
    while let Ok(pfn) = mm.alloc_pages(GFP_ATOMIC | __GFP_MEMALLOC, 0) {
        pages.push(pfn);
    }
    for pfn in pages.iter().filter(|pfn| pfn.0.is_multiple_of(2)) {
        // SAFETY: allocated above, freed once.
        unsafe { mm.free_pages(*pfn) };
    }
    mm.drain_all();
    assert!(mm.alloc_pages(GFP_ATOMIC | __GFP_MEMALLOC, 1).is_err());
    let objects: Vec<_> = (0..100)
        .map(|i| {
            let object = mm.kmem_cache_alloc(&cache, GFP_KERNEL).unwrap();
            // SAFETY: ours, 1128 bytes long.
            unsafe { object.write_bytes(i, 1128) };
            object
        })
        .collect();
    mm.slabinfo(|c| {
        if c.name == "inode" {
            assert_eq!(c.pages, c.num_slabs, "all of them single pages");
            assert_eq!(c.num_objs, 3 * c.num_slabs);
        }
    });
    for (i, object) in objects.into_iter().enumerate() {
        // SAFETY: ours until it is freed here, from this cache.
        unsafe {
            let bytes = core::slice::from_raw_parts(object.as_ptr(), 1128);
            assert!(bytes.iter().all(|&b| b == i as u8));
            mm.kmem_cache_free(&cache, object);
        }
    }
    mm.kmem_cache_destroy(cache).unwrap();
    assert!(mm.ledger().balanced);
}

/// Pages under a descriptor that the kernel brings: all of them lead to it, and its memory comes back to its cache.
pub fn descriptors_of_ones_own<L: Lab>(lab: &L) {
    let mm = lab.flat(4096).boot();
    let cache = mm
        .kmem_cache_create("netpool", 64, 16, CacheFlags::EMPTY, None)
        .unwrap();
    let mut blocks = Vec::new();
    for order in [0, 2, 5, 0, 9, 0] {
        let desc = mm.kmem_cache_alloc(&cache, GFP_KERNEL).unwrap();
        // SAFETY: an object of 64 bytes of a cache of this memory manager, given up until the pages are freed.
        let pfn = unsafe { mm.alloc_pages_desc(GFP_KERNEL, order, desc) };
        let pfn = pfn.unwrap();
        for page in 0..1 << order {
            let (head, o, Memory::Yours(kind, found)) = mm.lookup(pfn.add(page)) else {
                panic!("page {page} of order {order} leads elsewhere")
            };
            assert_eq!((head, o, kind), (pfn, order, PageType::Yours));
            assert_eq!(found.as_ptr(), desc.as_ptr());
        }
        blocks.push(pfn);
    }
    assert_eq!(mm.pages_of(PageType::Yours), 3 + 4 + 32 + 512);
    for pfn in blocks {
        // SAFETY: allocated above, freed once.
        unsafe { mm.free_pages(pfn) };
    }
    assert!(mm.ledger().balanced);
    // Free blocks lie on some of them until they are settled.
    mm.shrink();
    mm.kmem_cache_destroy(cache)
        .expect("every descriptor came back");
    assert!(mm.ledger().balanced);
}
