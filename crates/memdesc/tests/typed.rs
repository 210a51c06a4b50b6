//! The safe faces: values in a `KmemCache`, shrinkers, bulk pages, and two memory managers side by side.

mod common;

use std::sync::atomic::{AtomicUsize, Ordering};

use memdesc::gfp::{__GFP_MEMALLOC, __GFP_NORETRY, __GFP_ZERO, GFP_ATOMIC, GFP_KERNEL};
use memdesc::*;
use memdesc_host::Host;

fn mm(pages: u32) -> Mm<Host> {
    let (host, ranges) = Host::small(pages).unwrap();
    let config = Config {
        memory_is_zeroed: true,
        ..common::base_config()
    };
    Mm::new(host, &config, &ranges).unwrap()
}

struct Counted<'a>(&'a AtomicUsize, u64);

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

#[test]
fn values_are_dropped_once_and_given_back() {
    let mm = mm(2048);
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

/// Boot memory and page 0, which the ledger counts as metadata.
fn reserved(mm: &Mm<Host>) -> u64 {
    mm.ledger().walk.by_type[PageType::Reserved as usize]
}

#[test]
fn a_leaked_value_keeps_its_cache() {
    let mm = mm(2048);
    let cache = KmemCache::new(&mm, "leaky", CacheFlags::EMPTY).unwrap();
    std::mem::forget(cache.alloc(GFP_KERNEL, 7u64).ok().unwrap());
    assert_eq!(cache.destroy(), Err(1));
    let mut seen = 0;
    mm.slabinfo(|c| seen += u64::from(c.name == "leaky") * c.active_objs);
    assert_eq!(seen, 1);
}

struct Hoard {
    mm: std::sync::OnceLock<&'static Mm<Host>>,
    pages: std::sync::Mutex<Vec<Pfn>>,
    asked: AtomicUsize,
}

impl Shrinker for Hoard {
    fn count_objects(&self) -> usize {
        self.pages.lock().unwrap().len()
    }

    fn scan_objects(&self, nr: usize, request: &ReclaimRequest) -> usize {
        assert!(request.gfp.allow_blocking());
        self.asked.fetch_add(1, Ordering::Relaxed);
        let mut pages = self.pages.lock().unwrap();
        let from = pages.len().saturating_sub(nr);
        let let_go = pages.split_off(from);
        let mm = self.mm.get().unwrap();
        // SAFETY: pages of the hoard, taken out of it just now.
        let_go.iter().for_each(|&pfn| unsafe { mm.free_pages(pfn) });
        let_go.len()
    }
}

#[test]
fn shrinkers_make_room() {
    let mm: &'static Mm<Host> = Box::leak(Box::new(mm(4096)));
    let hoard: &'static Hoard = Box::leak(Box::new(Hoard {
        mm: std::sync::OnceLock::new(),
        pages: Default::default(),
        asked: AtomicUsize::new(0),
    }));
    hoard.mm.set(mm).unwrap();
    assert!(mm.register_shrinker(hoard));
    while let Ok(pfn) = mm.alloc_pages(GFP_ATOMIC, 0) {
        hoard.pages.lock().unwrap().push(pfn);
    }
    let held = hoard.count_objects();
    assert_eq!(
        hoard.asked.load(Ordering::Relaxed),
        0,
        "an atomic request asks nobody"
    );
    let pfn = mm.alloc_pages(GFP_KERNEL, 0).expect("the hoard can let go");
    assert!(hoard.asked.load(Ordering::Relaxed) > 0 && hoard.count_objects() < held);
    // SAFETY: allocated above.
    unsafe { mm.free_pages(pfn) };
    assert!(mm.unregister_shrinker(hoard) && !mm.unregister_shrinker(hoard));
    let asked = hoard.asked.load(Ordering::Relaxed);
    while let Ok(pfn) = mm.alloc_pages(GFP_KERNEL | __GFP_NORETRY, 0) {
        hoard.pages.lock().unwrap().push(pfn);
    }
    assert_eq!(hoard.asked.load(Ordering::Relaxed), asked);
    assert!(mm.ledger().balanced);
}

#[test]
fn bulk_pages_are_pages() {
    let mm = mm(4096);
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

#[test]
fn ten_of_them() {
    let all: Vec<_> = (0..10).map(|_| mm(1024)).collect();
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

#[test]
#[should_panic(expected = "belongs to another memory manager")]
fn a_cache_of_another_is_refused() {
    let (a, b) = (mm(1024), mm(1024));
    let cache = a
        .kmem_cache_create("a", 32, 8, CacheFlags::EMPTY, None)
        .unwrap();
    let _ = b.kmem_cache_alloc(&cache, GFP_KERNEL);
}

/// The order a cache wants cannot be had, but single pages can: Linux falls back to the smallest slabs, and so do we.
#[test]
fn slabs_get_smaller_when_memory_is_in_pieces() {
    let mm = mm(4096);
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
#[test]
fn descriptors_of_ones_own() {
    let mm = mm(4096);
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
