//! Debug caches: each kind of corruption gives exactly the right report, like `slub_kunit` in Linux.

mod common;

use std::panic::Location;
use std::ptr::NonNull;

use common::*;
use memdesc::gfp::GFP_KERNEL;
use memdesc::*;
use memdesc_host::Host;

fn boot(slab_debug: CacheFlags) -> (Mm<Host>, Reports) {
    let mut machine = Machine::flat(2048).unsampled();
    machine.config.slab_debug = slab_debug;
    let reports = Reports::default();
    let mm = machine.boot_on(reports.on(machine.host()).build().unwrap());
    (mm, reports)
}

/// Writes where one should not; says what was there.
fn poke(object: NonNull<u8>, offset: isize, byte: u8) -> u8 {
    // SAFETY: within the object's slab, which stays mapped.
    unsafe { object.offset(offset).replace(byte) }
}

#[track_caller]
fn here() -> (String, u32) {
    let l = Location::caller();
    (l.file().to_owned(), l.line())
}

struct Bench {
    /// Never taken down, so that the cache can stand beside it.
    mm: &'static Mm<Host>,
    cache: Cache<'static>,
    reports: Reports,
}

impl Bench {
    fn new(size: usize, flags: CacheFlags) -> Bench {
        let (mm, reports) = boot(CacheFlags::EMPTY);
        let mm: &'static Mm<Host> = Box::leak(Box::new(mm));
        let cache = mm
            .kmem_cache_create("TestSlub", size, 8, flags, None)
            .unwrap();
        Bench { mm, cache, reports }
    }

    #[track_caller]
    fn alloc(&self) -> NonNull<u8> {
        self.mm.kmem_cache_alloc(&self.cache, GFP_KERNEL).unwrap()
    }

    #[track_caller]
    fn free(&self, object: NonNull<u8>) {
        cache_free(self.mm, &self.cache, object);
    }

    /// The only report: this, of this object of this cache, and the ledger still balances.
    #[track_caller]
    fn expect(&self, what: Corruption, object: NonNull<u8>) -> Seen {
        let seen = self.reports.one();
        assert_eq!(seen.what, what, "{seen:?}");
        assert_eq!(seen.cache.as_deref(), Some("TestSlub"));
        assert_eq!(seen.address, object.addr().get());
        assert_eq!(seen.pfn, self.mm.virt_to_pfn(object.as_ptr()));
        assert_eq!(seen.kind, PageType::Slab);
        assert!(
            seen.text.contains("TestSlub") && seen.text.contains(what.text()),
            "{}",
            seen.text
        );
        ledger(self.mm);
        seen
    }

    fn active(&self) -> u64 {
        self.mm.kmem_cache_shrink(&self.cache);
        slabinfo(self.mm, "TestSlub").0
    }
}

#[test]
fn clean_use_is_silent() {
    for size in [1, 8, 24, 100, 1000, 5000] {
        for flags in [
            CacheFlags::RED_ZONE,
            CacheFlags::POISON,
            CacheFlags::STORE_USER,
            ALL,
        ] {
            let b = Bench::new(size, flags);
            for round in 0..3 {
                let objects: Vec<_> = (0..scaled(100, 4)).map(|_| b.alloc()).collect();
                objects.iter().for_each(|&o| fill(o, size, round));
                objects.into_iter().for_each(|o| b.free(o));
            }
            assert_eq!(b.reports.take(), []);
            assert_eq!(b.active(), 0);
            b.mm.kmem_cache_destroy(b.cache).unwrap();
        }
    }
}

#[test]
fn left_redzone() {
    for offset in [-1, -8] {
        let b = Bench::new(24, ALL);
        let (o, at) = (b.alloc(), here());
        poke(o, offset, 0x12);
        let freed = (b.free(o), here()).1;
        let seen = b.expect(Corruption::RedzoneLeft, o);
        assert_eq!(seen.byte, Some((offset, 0x12, 0xcc)));
        assert_eq!((seen.allocated, seen.caller), (Some(at), freed));
        // Left alone for good: it does not go back.
        assert_eq!(b.active(), 1);
        assert_ne!(b.alloc(), o);
    }
}

#[test]
fn right_redzone() {
    // The redzone starts with the first byte that was not asked for, rounding up included.
    for (size, offset) in [(24, 24), (24, 31), (21, 21), (21, 23), (21, 31)] {
        let b = Bench::new(size, ALL);
        let (o, at) = (b.alloc(), here());
        poke(o, offset, 0x34);
        let freed = (b.free(o), here()).1;
        let seen = b.expect(Corruption::RedzoneRight, o);
        assert_eq!(seen.byte, Some((offset, 0x34, 0xcc)));
        assert_eq!((seen.allocated, seen.caller), (Some(at), freed));
        assert_eq!(b.active(), 1);
    }
}

#[test]
fn redzone_without_other_checks() {
    let b = Bench::new(24, CacheFlags::RED_ZONE);
    let o = b.alloc();
    poke(o, 24, 0);
    b.free(o);
    let seen = b.expect(Corruption::RedzoneRight, o);
    assert_eq!((seen.byte, seen.allocated), (Some((24, 0, 0xcc)), None));
}

#[test]
fn kmalloc_redzone_starts_at_what_was_asked() {
    let (mm, reports) = boot(ALL);
    for (asked, offset) in [(18, 18), (18, 31), (32, 32), (1, 1), (5000, 5000)] {
        let (p, at) = (mm.kmalloc(asked, GFP_KERNEL).unwrap(), here());
        fill(p, asked, 0xff);
        poke(p, offset, 0x56);
        kfree(&mm, p);
        let seen = reports.one();
        assert_eq!(
            (seen.what, seen.byte),
            (Corruption::RedzoneRight, Some((offset, 0x56, 0xcc))),
            "{asked}"
        );
        assert_eq!(seen.allocated, Some(at));
        assert!(seen.cache.unwrap().starts_with("kmalloc-"));
    }
    // After krealloc in place, with the new size.
    let p = mm.kmalloc(60, GFP_KERNEL).unwrap();
    // SAFETY: live memory from kmalloc; the old pointer is not used again.
    let q = unsafe { mm.krealloc(p, 50, GFP_KERNEL) }.unwrap();
    assert_eq!(p, q);
    poke(q, 49, 1);
    poke(q, 50, 0x57);
    kfree(&mm, q);
    assert_eq!(reports.one().byte, Some((50, 0x57, 0xcc)));
    // Zeroing stops at what was asked for.
    let p = mm.kmalloc(20, GFP_KERNEL | gfp::__GFP_ZERO).unwrap();
    assert!(bytes(p, 20).iter().all(|&b| b == 0));
    kfree(&mm, p);
    assert_eq!(reports.take(), []);
}

#[test]
fn use_after_free() {
    for (offset, expected) in [(0, 0x6b), (7, 0x6b), (22, 0x6b), (23, 0xa5)] {
        let b = Bench::new(24, ALL);
        let (o, at) = (b.alloc(), here());
        let freed = (b.free(o), here()).1;
        assert_eq!(poke(o, offset, 0x78), expected);
        // The next to get it finds out.
        assert_eq!(b.alloc(), o);
        let seen = b.expect(Corruption::Poison, o);
        assert_eq!(seen.byte, Some((offset, 0x78, expected)));
        assert_eq!((seen.allocated, seen.freed), (Some(at), Some(freed)));
    }
}

#[test]
fn redzones_of_a_free_object() {
    for (offset, what) in [
        (-1, Corruption::RedzoneLeft),
        (24, Corruption::RedzoneRight),
        (31, Corruption::RedzoneRight),
    ] {
        let b = Bench::new(24, ALL);
        let o = b.alloc();
        b.free(o);
        assert_eq!(poke(o, offset, 0x9a), 0xbb);
        assert_eq!(b.alloc(), o);
        assert_eq!(b.expect(what, o).byte, Some((offset, 0x9a, 0xbb)));
    }
}

#[test]
fn double_free() {
    for flags in [
        ALL,
        CacheFlags::STORE_USER,
        CacheFlags::RED_ZONE,
        CacheFlags::EMPTY,
        CacheFlags::NO_SHEAVES,
    ] {
        let b = Bench::new(24, flags);
        let (_keep, o) = (b.alloc(), b.alloc());
        let first = (b.free(o), here()).1;
        let second = (b.free(o), here()).1;
        let seen = b.expect(Corruption::DoubleFree, o);
        assert_eq!(seen.caller, second);
        if flags.contains(CacheFlags::STORE_USER) {
            assert_eq!(seen.freed, Some(first));
        }
        assert_eq!(b.active(), 1, "{flags:?}");
        // It is in the cache once, not twice.
        let (x, y) = (b.alloc(), b.alloc());
        assert_ne!(x, y);
    }
}

#[test]
fn wrong_cache() {
    for flags in [ALL, CacheFlags::EMPTY, CacheFlags::NO_SHEAVES] {
        let b = Bench::new(24, flags);
        let other = b.mm.kmem_cache_create("other", 24, 8, flags, None).unwrap();
        let o = b.mm.kmem_cache_alloc(&other, GFP_KERNEL).unwrap();
        b.free(o);
        b.expect(Corruption::WrongCache, o);
        // Still live, still its own cache's.
        cache_free(b.mm, &other, o);
        assert_eq!(b.reports.take(), []);
        b.mm.kmem_cache_destroy(other).unwrap();
    }
}

#[test]
fn interior_pointer() {
    for flags in [ALL, CacheFlags::EMPTY, CacheFlags::NO_SHEAVES] {
        let b = Bench::new(24, flags);
        let o = b.alloc();
        let inside = o.map_addr(|a| a.saturating_add(8));
        b.free(inside);
        b.expect(Corruption::NotAHead, inside);
        b.free(o);
        assert_eq!(b.reports.take(), []);
        assert_eq!(b.active(), 0);
    }
}

#[test]
fn contents_of_the_neighbours_stay() {
    let b = Bench::new(24, ALL);
    let objects: Vec<_> = (0..20).map(|_| b.alloc()).collect();
    objects.iter().for_each(|&o| fill(o, 24, 0x42));
    // A wild write over a whole object, redzones and tracks included.
    let bad = objects[9];
    for offset in 0..120 {
        poke(bad, offset, 0xee);
    }
    b.free(bad);
    let seen = b.reports.take();
    assert!(
        seen.iter().any(|s| s.what == Corruption::RedzoneRight),
        "{seen:?}"
    );
    // The track was overwritten: nothing is read out of it.
    assert!(seen.iter().all(|s| s.allocated.is_none()), "{seen:?}");
}

#[test]
fn live_objects_are_named() {
    let b = Bench::new(24, ALL);
    let (o, at) = (b.alloc(), here());
    b.mm.report_leaks(&b.cache);
    let seen = b.expect(Corruption::ObjectsLeft, o);
    assert_eq!(seen.allocated, Some(at));
    let Err(DestroyError { live, cache }) = b.mm.kmem_cache_destroy(b.cache) else {
        panic!("destroyed")
    };
    assert_eq!(live, 1);
    cache_free(b.mm, &cache, o);
    b.mm.kmem_cache_destroy(cache).unwrap();
}
