//! The safe faces: values in a `KmemCache`, shrinkers, bulk pages, and two memory managers side by side.

mod common;

use std::sync::atomic::{AtomicUsize, Ordering};

use memdesc::gfp::{__GFP_NORETRY, GFP_ATOMIC, GFP_KERNEL};
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
#[should_panic(expected = "belongs to another memory manager")]
fn a_cache_of_another_is_refused() {
    let (a, b) = (mm(1024), mm(1024));
    let cache = a
        .kmem_cache_create("a", 32, 8, CacheFlags::EMPTY, None)
        .unwrap();
    let _ = b.kmem_cache_alloc(&cache, GFP_KERNEL);
}
