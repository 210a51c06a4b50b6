//! Accounting: who is charged for what, that limits hold, and that whatever was charged is uncharged once, by whatever path it goes.
#![allow(missing_docs)]

mod common;

use std::cell::Cell;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use common::*;
use memdesc::filemap::{FileError, Mapping, MappingOps};
use memdesc::gfp::*;
use memdesc::mmap::{Map, MmStruct, VmFlags};
use memdesc::rcu::RcuHead;
use memdesc::*;
use memdesc_host::Host;

const PAGE: u64 = PAGE_SIZE as u64;
const NONE: u64 = u64::MAX;
const RW: VmFlags = VmFlags::READ_WRITE;

fn boot() -> Mm<Host> {
    Machine::flat(8192).boot()
}

/// What is charged is what is in memory, and the ledger balances.
#[track_caller]
fn check<P: Platform>(mm: &Mm<P>) {
    mm.memcg_check().unwrap();
    ledger(mm);
}

/// All is gone, also what goes later.
#[track_caller]
fn empty<P: Platform>(mm: &Mm<P>, group: &MemCgroup<'_, P>, what: &str) {
    mm.shrink();
    mm.rcu_work();
    assert_eq!(group.usage(), 0, "{what}: {group:?}");
    assert_eq!(group.stat().stats, [0; MemcgStat::COUNT], "{what}");
    check(mm);
}

struct Disk;

impl MappingOps for Disk {
    fn read_folio(&self, _index: u64, pages: &mut [u8]) -> Result<(), FileError> {
        pages.fill(7);
        Ok(())
    }
    fn writepage(&self, _index: u64, _pages: &[u8]) -> Result<(), FileError> {
        Ok(())
    }
}

/// A guard that could not be made leaves the pages charged as they were: they are uncharged once.
#[test]
fn a_guard_that_fails_is_charged_once() {
    let mm = boot();
    let group = mm.memcg_create(None, "guards", NONE).unwrap();
    let _scope = Host::memcg_scope(group.id());
    let mut failed = 0;
    for nth in 0..4 {
        // Pages under a folio's descriptor, which a guard cannot keep.
        let folio = mm.alloc_folio(GFP_KERNEL, 2, FolioKind::Anon).unwrap();
        // SAFETY: ours.
        unsafe { mm.free_pages(folio) };
        let page = mm.alloc_pages(GFP_KERNEL_ACCOUNT, 2).unwrap();
        mm.shrink();
        mm.platform().faults().fail_nth(nth);
        // SAFETY: ours, bare.
        let guarded = unsafe { mm.guard_pages(page) };
        mm.platform().faults().off();
        match guarded {
            Ok(()) => {
                assert_eq!(group.usage(), 0);
                // SAFETY: a guard of ours.
                unsafe { mm.unguard_pages(page) };
            }
            Err(_) => {
                failed += 1;
                assert_eq!(group.usage(), 4 * PAGE);
            }
        }
        check(&mm);
        // SAFETY: ours, bare again.
        unsafe { mm.free_pages(page) };
        empty(&mm, &group, "guards");
    }
    assert!(failed > 0);
}

#[test]
fn limits_of_a_tree() {
    let mm = boot();
    let top = mm.memcg_create(None, "top", 10 * PAGE).unwrap();
    let left = mm.memcg_create(Some(&top), "left", NONE).unwrap();
    let right = mm.memcg_create(Some(&top), "right", 4 * PAGE).unwrap();
    let scope = Host::memcg_scope(right.id());
    let four = mm.alloc_pages(GFP_KERNEL_ACCOUNT, 2).unwrap();
    // Its own limit, then its parent's.
    assert_eq!(
        mm.alloc_pages(GFP_KERNEL_ACCOUNT, 0),
        Err(AllocError::Limit)
    );
    // Not asked to be charged.
    let plain = mm.alloc_pages(GFP_KERNEL, 0).unwrap();
    let inner = Host::memcg_scope(left.id());
    assert_eq!(
        mm.alloc_pages(GFP_KERNEL_ACCOUNT, 3),
        Err(AllocError::Limit)
    );
    let two = mm.alloc_pages(GFP_KERNEL_ACCOUNT, 1).unwrap();
    drop(inner);
    assert_eq!(
        (top.usage(), left.usage(), right.usage()),
        (6 * PAGE, 2 * PAGE, 4 * PAGE)
    );
    assert_eq!(
        (
            mm.memcg_of_page(four),
            mm.memcg_of_page(two),
            mm.memcg_of_page(plain)
        ),
        (right.id(), left.id(), 0)
    );
    // Any page of it, and the tails above order 3 as well.
    assert_eq!(mm.memcg_of_page(four.add(3)), right.id());
    // Each try counted once, at the level that refused; who may wait tries twice.
    assert_eq!(
        (top.failcnt() > 0, left.failcnt(), right.failcnt() > 0),
        (true, 0, true)
    );
    check(&mm);
    // A limit below what is there is not set.
    assert_eq!(top.set_limit(5 * PAGE), Err(AllocError::Busy));
    assert_eq!(top.limit(), 10 * PAGE);
    top.set_limit(6 * PAGE).unwrap();
    free(&mm, four);
    free(&mm, two);
    free(&mm, plain);
    assert_eq!((top.watermark(), right.watermark()), (6 * PAGE, 4 * PAGE));
    drop(scope);
    empty(&mm, &top, "all");
    assert!(
        format!("{top:?}").contains("top (of 0): 0 of 24576, at most 24576"),
        "{top:?}"
    );
}

#[test]
fn names_and_numbers() {
    let mm = boot();
    assert_eq!(mm.memcg_zombies(), 0);
    let long = "ein Name mit Umlauten: äöüäöüäöüäöü";
    let first = mm.memcg_create(None, long, NONE).unwrap();
    let id = first.id();
    assert!(id != 0 && long.starts_with(first.stat().name()) && first.stat().name().len() >= 31);
    drop(first);
    assert_eq!(mm.memcg_zombies(), 0);
    // The number and its memory are used again. To the byte: guarded objects are in pages that were metadata before.
    mm.kfence_set_sample(0);
    let bytes = ledger(&mm).metadata_bytes();
    let again = mm.memcg_create(None, "again", PAGE).unwrap();
    assert_eq!((again.id(), again.limit(), again.failcnt()), (id, PAGE, 0));
    assert_eq!(ledger(&mm).metadata_bytes(), bytes);
    let many: Vec<_> = (0..600)
        .map(|n| mm.memcg_create(Some(&again), &n.to_string(), NONE).unwrap())
        .collect();
    let mut seen = 0;
    mm.memcg_stat(|view| {
        assert!(view.online && (view.id == again.id() || view.parent == again.id()));
        seen += 1;
    });
    assert_eq!(seen, 601);
    // 601 groups of 256 bytes and three leaves more.
    let more = ledger(&mm).metadata_bytes() - bytes;
    assert!((600 * 256..600 * 256 + 64 * 1024).contains(&more), "{more}");
    assert_eq!(again.stat().pins, 601);
    drop(many);
    assert_eq!((again.stat().pins, mm.memcg_zombies()), (1, 0));
}

#[test]
fn zombies_stay_until_the_last_of_it_and_take_no_more() {
    let mm = boot();
    let top = mm.memcg_create(None, "top", NONE).unwrap();
    let job = mm.memcg_create(Some(&top), "job", NONE).unwrap();
    let child = mm.memcg_create(Some(&job), "child", NONE).unwrap();
    let (job_id, child_id) = (job.id(), child.id());
    let scope = Host::memcg_scope(child_id);
    let page = mm.alloc_pages(GFP_KERNEL_ACCOUNT, 0).unwrap();
    drop(child);
    drop(job);
    assert_eq!(mm.memcg_zombies(), 2);
    // What is charged to who is gone is charged to the nearest who is not.
    let later = mm.alloc_pages(GFP_KERNEL_ACCOUNT, 1).unwrap();
    assert_eq!(mm.memcg_of_page(later), top.id());
    let mut views = Vec::new();
    mm.memcg_stat(|view| views.push(*view));
    assert_eq!(views.iter().filter(|v| !v.online).count(), 2);
    check(&mm);
    free(&mm, page);
    assert_eq!((mm.memcg_zombies(), top.stat().pins), (0, 1));
    // Both numbers are free again.
    let a = mm.memcg_create(None, "a", NONE).unwrap();
    let b = mm.memcg_create(None, "b", NONE).unwrap();
    let mut ids = [a.id(), b.id()];
    ids.sort_unstable();
    let mut before = [job_id, child_id];
    before.sort_unstable();
    assert_eq!(ids, before);
    drop(scope);
    free(&mm, later);
    empty(&mm, &top, "all");
}

#[test]
fn off_is_nothing() {
    let mm = boot();
    // Without a group, and for nobody, objects are of the ordinary caches.
    let _scope = Host::memcg_scope(3);
    for round in 0..2 {
        let object = mm.kmalloc(100, GFP_KERNEL_ACCOUNT).unwrap();
        assert!(round > 0 || slabinfo(&mm, "kmalloc-cg-128").1 == 0);
        // SAFETY: live.
        assert_eq!(unsafe { mm.memcg_of_object(object) }, 0);
        kfree(&mm, object);
        // From here on there are groups, but not this one.
        drop(mm.memcg_create(None, "some", NONE).unwrap());
    }
    check(&mm);
}

/// A way in and out; the group is charged in between.
type Way = (&'static str, fn(&Mm<Host>) -> Had);
/// What was had, and how it goes.
type Had = Box<dyn FnOnce(&Mm<Host>)>;
/// The same of a cache that it makes.
type CacheWay = Box<dyn Fn(&Mm<Host>) -> Had>;
/// Allocates and frees, or says why not.
type Try<'a> = Box<dyn Fn(&Mm<Host>) -> Result<(), AllocError> + 'a>;

fn page_ways() -> Vec<Way> {
    const ACCOUNT: Flags = GFP_KERNEL_ACCOUNT;
    fn folio(mm: &Mm<Host>, order: usize) -> Pfn {
        let gfp = GFP_HIGHUSER_MOVABLE | __GFP_ACCOUNT;
        mm.alloc_folio(gfp, order, FolioKind::Anon).unwrap()
    }
    vec![
        ("free_pages, order 0", |mm| {
            let pfn = mm.alloc_pages(ACCOUNT, 0).unwrap();
            Box::new(move |mm| free(mm, pfn))
        }),
        ("free_pages, order 5", |mm| {
            let pfn = mm.alloc_pages(ACCOUNT, 5).unwrap();
            Box::new(move |mm| free(mm, pfn))
        }),
        ("free_pages_nolock", |mm| {
            let pfn = mm.alloc_pages_nolock(ACCOUNT, None, 2).unwrap();
            // SAFETY: ours.
            Box::new(move |mm| unsafe { mm.free_pages_nolock(pfn) })
        }),
        ("the fast try", |mm| {
            let warm: Vec<_> = (0..4)
                .map(|_| mm.alloc_pages(GFP_KERNEL, 0).unwrap())
                .collect();
            warm.into_iter().for_each(|pfn| free(mm, pfn));
            let pfn = mm.alloc_pages(__GFP_FAST_TRY | __GFP_ACCOUNT, 0).unwrap();
            Box::new(move |mm| free(mm, pfn))
        }),
        ("free_pages_bulk", |mm| {
            let mut pages = [Pfn(0); 9];
            assert_eq!(mm.alloc_pages_bulk(ACCOUNT, &mut pages), 9);
            // SAFETY: ours.
            Box::new(move |mm| unsafe { mm.free_pages_bulk(&pages) })
        }),
        ("folio, free_pages", |mm| {
            let pfn = folio(mm, 4);
            Box::new(move |mm| free(mm, pfn))
        }),
        ("folio, nolock", |mm| {
            let pfn = folio(mm, 0);
            // SAFETY: ours.
            Box::new(move |mm| unsafe { mm.free_pages_nolock(pfn) })
        }),
        ("folio, the last reference", |mm| {
            let pfn = folio(mm, 3);
            Box::new(move |mm| {
                let kept = mm.folio_get(pfn.add(5)).unwrap();
                free(mm, pfn);
                assert_ne!(kept.owner(), 0, "still charged");
                mm.memcg_check().unwrap();
            })
        }),
        ("folio, split", |mm| {
            let pfn = folio(mm, 4);
            Box::new(move |mm| {
                mm.split_folio_alone(pfn, 1).unwrap();
                mm.memcg_check().unwrap();
                (0..8).for_each(|n| free(mm, pfn.add(2 * n)));
            })
        }),
        ("page table", |mm| {
            let pfn = mm.alloc_page_table(ACCOUNT, 0).unwrap();
            Box::new(move |mm| free(mm, pfn))
        }),
        ("retyped", |mm| {
            let pfn = mm.alloc_pages(ACCOUNT, 3).unwrap();
            let other = mm.alloc_pages(ACCOUNT, 0).unwrap();
            Box::new(move |mm| {
                // SAFETY: ours.
                unsafe {
                    mm.retype(pfn, PageType::Anon).unwrap();
                    mm.retype(other, PageType::PageTable).unwrap();
                }
                let mut views = Vec::new();
                mm.memcg_stat(|v| views.push(v.stats));
                let [anon, _, kernel, _, tables, _, _] = views[0];
                assert_eq!((anon, kernel, tables), (8 * PAGE, 0, PAGE));
                mm.memcg_check().unwrap();
                free(mm, pfn);
                free(mm, other);
            })
        }),
        ("reserved for good", |mm| {
            let pfn = mm.alloc_pages(ACCOUNT, 1).unwrap();
            // SAFETY: ours, and never freed.
            Box::new(move |mm| unsafe { mm.mark_reserved(pfn) })
        }),
        ("vmalloc", |mm| {
            let ptr = mm.vmalloc(50_000, ACCOUNT).unwrap();
            // SAFETY: ours.
            Box::new(move |mm| unsafe { mm.vfree(ptr) })
        }),
        ("vmalloc, freed later", |mm| {
            let ptr = mm.vmalloc(50_000, ACCOUNT).unwrap();
            Box::new(move |mm| {
                let atomic = memdesc_host::interrupt::atomic();
                // SAFETY: ours.
                unsafe { mm.vfree(ptr) };
                drop(atomic);
                mm.tick();
            })
        }),
        ("a kernel stack", |mm| {
            let stack = mm.alloc_kernel_stack(4, 1).unwrap();
            // SAFETY: ours.
            Box::new(move |mm| unsafe { mm.free_kernel_stack(stack) })
        }),
        ("a kernel stack kept by the CPU", |mm| {
            // SAFETY: ours, and nobody's meanwhile.
            unsafe { mm.free_kernel_stack(mm.alloc_kernel_stack(4, 1).unwrap()) };
            mm.memcg_check().unwrap();
            let stack = mm.alloc_kernel_stack(4, 2).unwrap();
            // SAFETY: ours.
            Box::new(move |mm| unsafe { mm.free_kernel_stack(stack) })
        }),
    ]
}

fn object_ways() -> Vec<Way> {
    const ACCOUNT: Flags = GFP_KERNEL_ACCOUNT;
    vec![
        ("kfree", |mm| {
            let ptr = mm.kmalloc(100, ACCOUNT).unwrap();
            Box::new(move |mm| kfree(mm, ptr))
        }),
        ("kfree of all sizes", |mm| {
            let all: Vec<_> = [1, 8, 96, 1000, 2048, 2049, 4096, 8192, 8193, 100_000]
                .map(|size| mm.kmalloc(size, ACCOUNT | __GFP_ZERO).unwrap())
                .into();
            Box::new(move |mm| all.into_iter().for_each(|ptr| kfree(mm, ptr)))
        }),
        ("kfree_nolock", |mm| {
            let ptr = mm.kmalloc(700, ACCOUNT).unwrap();
            let large = mm.kmalloc(70_000, ACCOUNT).unwrap();
            // SAFETY: ours.
            Box::new(move |mm| unsafe {
                mm.kfree_nolock(ptr);
                mm.kfree_nolock(large);
            })
        }),
        ("kmalloc_nolock", |mm| {
            let all: Vec<_> = [10, 3000, 9000]
                .map(|size| mm.kmalloc_nolock(size, ACCOUNT).unwrap())
                .into();
            Box::new(move |mm| all.into_iter().for_each(|ptr| kfree(mm, ptr)))
        }),
        ("more than a sheaf, by kfree_nolock", |mm| {
            let all: Vec<_> = (0..500).map(|_| mm.kmalloc(64, ACCOUNT).unwrap()).collect();
            Box::new(move |mm| {
                for ptr in all {
                    // SAFETY: ours.
                    unsafe { mm.kfree_nolock(ptr) };
                }
            })
        }),
        ("krealloc", |mm| {
            let ptr = mm.kmalloc(100, ACCOUNT).unwrap();
            // SAFETY: ours.
            let ptr = unsafe { mm.krealloc(ptr, 10_000, ACCOUNT) }.unwrap();
            Box::new(move |mm| kfree(mm, ptr))
        }),
        ("kfree_rcu_prepaid", |mm| {
            let ptr = mm.kmalloc(100, ACCOUNT | __GFP_RCU_PREPAID).unwrap();
            let large = mm.kmalloc(100_000, ACCOUNT | __GFP_RCU_PREPAID).unwrap();
            // SAFETY: ours.
            Box::new(move |mm| unsafe {
                mm.kfree_rcu_prepaid(ptr);
                mm.kfree_rcu_prepaid(large);
            })
        }),
        ("kvfree_rcu", |mm| {
            let all: Vec<_> = [100, 100, 3000, 50_000]
                .map(|size| mm.kvmalloc(size, ACCOUNT).unwrap())
                .into();
            Box::new(move |mm| {
                for ptr in all {
                    // SAFETY: ours, and its head is in it.
                    unsafe { mm.kvfree_rcu(ptr, ptr.cast::<RcuHead>()) };
                }
            })
        }),
        ("kvfree_rcu_mightsleep", |mm| {
            let ptr = mm.vmalloc(50_000, ACCOUNT).unwrap();
            // SAFETY: ours.
            Box::new(move |mm| unsafe { mm.kvfree_rcu_mightsleep(ptr) })
        }),
    ]
}

/// Of a cache of these flags.
fn cache_ways(flags: CacheFlags) -> Vec<(String, CacheWay)> {
    type Free = fn(&Mm<Host>, &Cache<'_>, &[*mut u8]);
    let frees: [(&str, Free); 4] = [
        ("kmem_cache_free", |mm, cache, all| {
            all.iter()
                .for_each(|&o| cache_free(mm, cache, NonNull::new(o).unwrap()));
        }),
        ("kmem_cache_free_bulk", |mm, cache, all| {
            // SAFETY: ours.
            unsafe { mm.kmem_cache_free_bulk(cache, all) };
        }),
        ("kfree_nolock", |mm, _, all| {
            // SAFETY: ours.
            all.iter()
                .for_each(|&o| unsafe { mm.kfree_nolock(NonNull::new(o).unwrap()) });
        }),
        ("kfree_rcu_prepaid", |mm, _, all| {
            // SAFETY: ours.
            all.iter()
                .for_each(|&o| unsafe { mm.kfree_rcu_prepaid(NonNull::new(o).unwrap()) });
        }),
    ];
    let prepaid = flags.contains(CacheFlags::RCU_PREPAID);
    let usable = frees.into_iter().take(if prepaid { 4 } else { 3 });
    usable
        .map(|(name, give)| {
            let way = move |mm: &Mm<Host>| -> Had {
                let cache = mm
                    .kmem_cache_create("charged", 104, 8, flags, None)
                    .unwrap();
                let mut all = vec![std::ptr::null_mut(); 200];
                let gfp = GFP_KERNEL_ACCOUNT;
                mm.kmem_cache_alloc_bulk(&cache, gfp, &mut all[..150])
                    .unwrap();
                for place in &mut all[150..] {
                    *place = mm.kmem_cache_alloc(&cache, gfp).unwrap().as_ptr();
                }
                // The cache outlives what is given back later; it is as long-lived as the memory manager.
                // SAFETY: the handle is of `mm`, which is there when the box is called with it.
                let cache = unsafe { std::mem::transmute::<Cache<'_>, Cache<'static>>(cache) };
                Box::new(move |mm| {
                    give(mm, &cache, &all);
                    mm.shrink();
                    mm.kmem_cache_destroy(cache).unwrap();
                })
            };
            let boxed: CacheWay = Box::new(way);
            (format!("{name} of {flags:?}"), boxed)
        })
        .collect()
}

#[test]
fn uncharged_once_whichever_way_it_goes() {
    let mm = boot();
    let top = mm.memcg_create(None, "top", NONE).unwrap();
    let group = mm.memcg_create(Some(&top), "group", NONE).unwrap();
    let try_way = |name: &str, way: &dyn Fn(&Mm<Host>) -> Had| {
        let scope = Host::memcg_scope(group.id());
        let first = group.usage();
        assert_eq!(first, 0, "{name}");
        let had = way(&mm);
        // Nobody is charged for what is done later.
        drop(scope);
        assert!(group.usage() > 0 && top.usage() == group.usage(), "{name}");
        check(&mm);
        had(&mm);
        empty(&mm, &group, name);
        empty(&mm, &top, name);
    };
    // `retyped` looks at the first group of the listing, so the group comes first there.
    for (name, way) in page_ways().into_iter().chain(object_ways()) {
        if name == "retyped" {
            continue;
        }
        try_way(name, &way);
    }
    let plain = CacheFlags::ACCOUNT;
    for flags in [
        plain,
        CacheFlags::OWNERS,
        plain | CacheFlags::RCU_PREPAID,
        plain | CacheFlags::DEBUG,
        plain | CacheFlags::DEBUG | CacheFlags::RCU_PREPAID,
        plain | CacheFlags::NO_SHEAVES,
        plain | CacheFlags::TYPESAFE_BY_RCU,
    ] {
        for (name, way) in cache_ways(flags) {
            try_way(&name, &*way);
        }
    }
}

#[test]
fn retyped_pages_are_charged_as_what_they_are() {
    let mm = boot();
    let group = mm.memcg_create(None, "group", NONE).unwrap();
    let scope = Host::memcg_scope(group.id());
    let (_, way) = page_ways().into_iter().find(|w| w.0 == "retyped").unwrap();
    way(&mm)(&mm);
    drop(scope);
    empty(&mm, &group, "retyped");
}

#[test]
fn a_charge_moves_with_its_folio() {
    let mm = boot();
    let group = mm.memcg_create(None, "group", NONE).unwrap();
    let other = mm.memcg_create(None, "other", NONE).unwrap();
    let file = Mapping::new(&mm, &Disk, 100).unwrap();
    file.set_memcg(Some(&group)).unwrap();
    let folio = file.get(50).unwrap();
    let (head, order) = (folio.head(), folio.order());
    drop(folio);
    let charged = group.usage();
    // To pages that are charged themselves: the two change places.
    let scope = Host::memcg_scope(other.id());
    let to = mm.alloc_pages(GFP_KERNEL_ACCOUNT, order).unwrap();
    drop(scope);
    // SAFETY: `to` is ours, and what comes back.
    let old = unsafe { mm.migrate_folio(head, to) }.unwrap();
    assert_eq!(old, head);
    assert_eq!(
        (mm.memcg_of_page(old), mm.memcg_of_page(to)),
        (other.id(), group.id())
    );
    assert_eq!((group.usage(), other.usage()), (charged, PAGE << order));
    check(&mm);
    free(&mm, old);
    empty(&mm, &other, "what it was moved from");
    // By compaction too, which moves what it likes.
    for index in (0..100).step_by(2) {
        drop(file.get(index).unwrap());
    }
    let charged = group.usage();
    mm.drain_all();
    let moved = mm.event(Event::PgMigrateSuccess);
    let contig = (1..15)
        .filter(|n| mm.alloc_contig_range(Pfn(n * 512), 512).is_ok())
        .count();
    assert!(contig > 0 && mm.event(Event::PgMigrateSuccess) > moved);
    assert_eq!(group.usage(), charged);
    mm.memcg_check().unwrap();
    drop(file);
    empty(&mm, &group, "moved");
}

#[test]
fn a_cache_says_if_it_cannot_charge() {
    let mm = boot();
    let cache = mm
        .kmem_cache_create("plain", 64, 8, CacheFlags::EMPTY, None)
        .unwrap();
    let group = mm.memcg_create(None, "group", NONE).unwrap();
    let object = mm.kmem_cache_alloc(&cache, GFP_KERNEL_ACCOUNT).unwrap();
    let scope = Host::memcg_scope(group.id());
    assert_eq!(
        mm.kmem_cache_alloc(&cache, GFP_KERNEL_ACCOUNT),
        Err(AllocError::NoOwners)
    );
    assert_eq!(
        mm.kmalloc(64, GFP_KERNEL_ACCOUNT | __GFP_DMA),
        Err(AllocError::NoZone)
    );
    assert_eq!(group.usage(), 0);
    // One that always charges, and one that does so if asked.
    for (flags, charged) in [(CacheFlags::ACCOUNT, true), (CacheFlags::OWNERS, false)] {
        let cache = mm.kmem_cache_create("other", 64, 8, flags, None).unwrap();
        let object = mm.kmem_cache_alloc(&cache, GFP_KERNEL).unwrap();
        assert_eq!(group.usage(), if charged { 66 } else { 0 });
        cache_free(&mm, &cache, object);
        mm.kmem_cache_destroy(cache).unwrap();
    }
    // A typed one too.
    let typed: KmemCache<'_, _, [u64; 4]> =
        KmemCache::new(&mm, "typed", CacheFlags::ACCOUNT).unwrap();
    let value = typed.alloc(GFP_KERNEL, [1; 4]).unwrap();
    assert_eq!(group.usage(), 34);
    drop(value);
    drop(scope);
    cache_free(&mm, &cache, object);
    empty(&mm, &group, "all");
}

#[test]
fn a_guard_that_cannot_be_made_is_charged_as_before() {
    let mm = boot();
    let group = mm.memcg_create(None, "group", NONE).unwrap();
    // Pages under what a folio left, which a guard's word cannot keep.
    let before = mm.alloc_folio(GFP_KERNEL, 0, FolioKind::Anon).unwrap();
    free(&mm, before);
    let scope = Host::memcg_scope(group.id());
    let pfn = mm.alloc_pages(GFP_KERNEL_ACCOUNT, 0).unwrap();
    assert_eq!((pfn, group.usage()), (before, PAGE));
    mm.platform().faults().fail_nth(0);
    // SAFETY: ours.
    let guarded = unsafe { mm.guard_pages(pfn) };
    assert_eq!(mm.platform().faults().off(), (1, 1));
    assert_eq!(guarded, Err(AllocError::NoDescriptor));
    assert_eq!(group.usage(), PAGE);
    check(&mm);
    // SAFETY: ours.
    unsafe { mm.guard_pages(pfn) }.unwrap();
    assert_eq!(group.usage(), 0);
    // SAFETY: ours.
    unsafe { mm.unguard_pages(pfn) };
    free(&mm, pfn);
    drop(scope);
    empty(&mm, &group, "guard");
}

thread_local! {
    /// The page that goes when somebody has guessed that it is there.
    static GOES: Cell<Option<(*const Mm<Host>, Pfn)>> = const { Cell::new(None) };
}

#[test]
fn the_last_guess_uncharges() {
    fn hook(label: &'static str) {
        if label == "folio_get: guessed"
            && let Some((mm, pfn)) = GOES.take()
        {
            // SAFETY: the test's, which waits for us.
            free(unsafe { &*mm }, pfn);
        }
    }
    if !inject::set_hook(Some(hook)) {
        return;
    }
    let mm = boot();
    let group = mm.memcg_create(None, "group", NONE).unwrap();
    for order in [0, 3] {
        let pfn = mm
            .alloc_folio_memcg(GFP_HIGHUSER_MOVABLE, order, FolioKind::File, group.id())
            .unwrap();
        assert_eq!(group.usage(), PAGE << order);
        GOES.set(Some((&raw const mm, pfn)));
        assert!(mm.folio_get(pfn).is_none());
        assert!(GOES.get().is_none());
        empty(&mm, &group, "a guess");
    }
    inject::set_hook(None);
}

#[test]
fn what_was_not_charged_is_reported() {
    let told = Arc::new(AtomicUsize::new(0));
    let hear = told.clone();
    let machine = Machine::flat(4096);
    let host = machine.host().on_corruption(move |report| {
        assert_eq!(report.what, Corruption::Uncharged);
        assert!(
            report.to_string().contains("without having been charged"),
            "{report}"
        );
        hear.fetch_add(1, Ordering::Relaxed);
    });
    let mm = machine.boot_on(host.build().unwrap());
    let group = mm.memcg_create(None, "group", NONE).unwrap();
    let other = mm.memcg_create(None, "other", NONE).unwrap();
    let gfp = GFP_HIGHUSER_MOVABLE;
    let pfn = mm
        .alloc_folio_memcg(gfp, 0, FolioKind::Anon, group.id())
        .unwrap();
    // Somebody writes down another.
    let folio = mm.folio_get(pfn).unwrap();
    folio.set_owner(other.id());
    assert_eq!(
        mm.memcg_check(),
        Err(MemcgMismatch {
            id: group.id(),
            stat: Some(MemcgStat::Anon),
            counted: PAGE,
            found: 0
        })
    );
    drop(folio);
    free(&mm, pfn);
    assert_eq!(told.load(Ordering::Relaxed), 1);
    // Nothing was clamped or made up.
    assert_eq!((group.usage(), other.usage()), (PAGE, 0));
}

#[test]
fn an_address_space_from_birth_to_death() {
    let mm = boot();
    let group = mm.memcg_create(None, "group", NONE).unwrap();
    let other = mm.memcg_create(None, "other", NONE).unwrap();
    let scope = Host::memcg_scope(group.id());
    let parent = MmStruct::new(&mm, 1).unwrap();
    drop(scope);
    assert_eq!((parent.memcg(), group.usage()), (group.id(), PAGE));
    let bytes = 64 * PAGE;
    let at = parent.mmap(None, bytes, RW, Map::Anon).unwrap();
    for nth in 0..64 {
        parent.write(at + nth * PAGE, &[nth as u8]).unwrap();
    }
    let stat = group.stat();
    assert_eq!(stat.of(MemcgStat::Anon), bytes);
    assert_eq!(stat.of(MemcgStat::PageTables), 4 * PAGE);
    check(&mm);

    // A child is charged to the same, until it goes elsewhere; what it copies then is the other's.
    let child = parent.fork(2).unwrap();
    assert_eq!(child.memcg(), group.id());
    let before = group.stat();
    assert_eq!(
        (before.of(MemcgStat::Anon), before.of(MemcgStat::PageTables)),
        (bytes, 8 * PAGE)
    );
    child.set_memcg(Some(&other)).unwrap();
    assert_eq!(other.stat().of(MemcgStat::PageTables), PAGE);
    child.write(at, b"x").unwrap();
    parent.write(at + PAGE, b"y").unwrap();
    assert_eq!(other.stat().of(MemcgStat::Anon), PAGE);
    assert_eq!(group.stat().of(MemcgStat::Anon), bytes + PAGE);
    check(&mm);

    // File pages are whose fault brought them, or the file's group's.
    let file = Mapping::new(&mm, &Disk, 1000).unwrap();
    let map = child
        .mmap(None, 8 * PAGE, VmFlags::READ, Map::File(&file, 0))
        .unwrap();
    child.read(map, &mut [0]).unwrap();
    let has = other.stat().of(MemcgStat::File);
    assert_eq!(has, file.nrpages() * PAGE);
    file.set_memcg(Some(&group)).unwrap();
    drop(file.get(500).unwrap());
    assert_eq!(
        group.stat().of(MemcgStat::File),
        file.nrpages() * PAGE - has
    );
    check(&mm);

    // Large ones.
    let huge = child
        .mmap(None, 4 << 20, RW.with(VmFlags::HUGE), Map::Anon)
        .unwrap();
    child.write(huge + (2 << 20), b"z").unwrap();
    assert!(other.stat().of(MemcgStat::Anon) > PAGE);
    check(&mm);
    child.munmap(huge, 4 << 20).unwrap();

    drop(child);
    mm.shrink();
    assert_eq!(other.stat().of(MemcgStat::Anon), 0);
    parent.munmap(at, bytes).unwrap();
    drop(parent);
    // The file keeps its group's pin, and its pages what they are charged to, until it goes.
    assert_eq!(group.stat().pins, 2);
    drop(file);
    assert_eq!(group.stat().pins, 1);
    empty(&mm, &group, "group");
    empty(&mm, &other, "other");
}

#[test]
fn at_its_limit_a_group_reclaims_its_own() {
    let mm = boot();
    let group = mm.memcg_create(None, "group", 32 * PAGE).unwrap();
    let mine = Mapping::new(&mm, &Disk, 4096).unwrap();
    let theirs = Mapping::new(&mm, &Disk, 4096).unwrap();
    mine.set_memcg(Some(&group)).unwrap();
    for index in 0..200 {
        drop(theirs.get(index * 7).unwrap());
    }
    let others = theirs.nrpages();
    // Far more than fits, through a cache of 32 pages.
    for index in 0..500 {
        drop(mine.get(index).unwrap());
        assert!(group.usage() <= 32 * PAGE);
    }
    assert!(group.watermark() <= 32 * PAGE && group.failcnt() > 0);
    assert!(mine.nrpages() > 0 && mine.nrpages() <= 32);
    assert_eq!(theirs.nrpages(), others, "somebody else's went");
    check(&mm);
    // So does another kind of charge; what may not wait is refused.
    let scope = Host::memcg_scope(group.id());
    while group.usage() < 32 * PAGE {
        mine.get(1000 + group.usage() / PAGE).unwrap();
    }
    assert_eq!(
        mm.alloc_pages(GFP_ATOMIC | __GFP_ACCOUNT, 0),
        Err(AllocError::Limit)
    );
    let pages = mm.alloc_pages(GFP_KERNEL_ACCOUNT, 4).unwrap();
    assert!(mine.nrpages() <= 16);
    // A limit that is lowered as well.
    group.set_limit(17 * PAGE).unwrap();
    assert!(mine.nrpages() <= 1);
    assert_eq!(group.set_limit(15 * PAGE), Err(AllocError::Busy));
    drop(scope);
    free(&mm, pages);
    drop(mine);
    empty(&mm, &group, "all");
    // Reclaim for all looks at all.
    assert!(theirs.nrpages() == others);
}

#[test]
fn each_allocation_fails_once_and_nothing_stays_charged() {
    let machine = Machine::flat(4096);
    let mm = machine.boot();
    let group = mm.memcg_create(None, "group", NONE).unwrap();
    let cache = mm
        .kmem_cache_create("charged", 104, 8, CacheFlags::ACCOUNT, None)
        .unwrap();
    let ways: Vec<(&str, Try<'_>)> = vec![
        (
            "pages",
            Box::new(|mm| mm.alloc_pages(GFP_KERNEL_ACCOUNT, 4).map(|p| free(mm, p))),
        ),
        (
            "folio",
            Box::new(|mm| {
                let gfp = GFP_HIGHUSER_MOVABLE | __GFP_ACCOUNT;
                mm.alloc_folio(gfp, 2, FolioKind::File).map(|p| free(mm, p))
            }),
        ),
        (
            "table",
            Box::new(|mm| {
                mm.alloc_page_table(GFP_KERNEL_ACCOUNT, 0)
                    .map(|p| free(mm, p))
            }),
        ),
        (
            "kmalloc",
            Box::new(|mm| mm.kmalloc(100, GFP_KERNEL_ACCOUNT).map(|p| kfree(mm, p))),
        ),
        (
            "large",
            Box::new(|mm| {
                mm.kmalloc(100_000, GFP_KERNEL_ACCOUNT)
                    .map(|p| kfree(mm, p))
            }),
        ),
        (
            "nolock",
            Box::new(|mm| {
                mm.kmalloc_nolock(100, GFP_KERNEL_ACCOUNT)
                    .map(|p| kfree(mm, p))
            }),
        ),
        (
            "bulk",
            Box::new(|mm| {
                let mut all = [std::ptr::null_mut(); 40];
                mm.kmem_cache_alloc_bulk(&cache, GFP_KERNEL, &mut all)?;
                // SAFETY: ours.
                unsafe { mm.kmem_cache_free_bulk(&cache, &all) };
                Ok(())
            }),
        ),
        (
            "vmalloc",
            Box::new(|mm| {
                // SAFETY: ours.
                mm.vmalloc(100_000, GFP_KERNEL_ACCOUNT)
                    .map(|p| unsafe { mm.vfree(p) })
            }),
        ),
        (
            "stack",
            Box::new(|mm| {
                // SAFETY: ours.
                mm.alloc_kernel_stack(4, 1)
                    .map(|s| unsafe { mm.free_kernel_stack(s) })
            }),
        ),
        (
            "group",
            Box::new(|mm| mm.memcg_create(None, "another", NONE).map(drop)),
        ),
        (
            "space",
            Box::new(|mm| {
                let space = MmStruct::new(mm, 1)?;
                let at = space.mmap(None, 16 * PAGE, RW, Map::Anon)?;
                space.write(at, b"x").map_err(|_| AllocError::Injected)?;
                let child = space.fork(2)?;
                child.write(at, b"y").map_err(|_| AllocError::Injected)
            }),
        ),
    ];
    for (name, way) in &ways {
        let (mut failed, mut n) = (0, 0);
        loop {
            mm.shrink();
            let scope = Host::memcg_scope(group.id());
            mm.platform().faults().fail_nth(n);
            let got = way(&mm);
            let (_, hit) = mm.platform().faults().off();
            drop(scope);
            failed += u64::from(got.is_err());
            empty(&mm, &group, &format!("{name}, failed at {n}"));
            assert_eq!(mm.memcg_zombies(), 0);
            if hit == 0 {
                assert!(got.is_ok(), "{name}: {got:?}");
                break;
            }
            n += 1;
        }
        assert!(
            failed > 0 && n > 1 || *name == "group",
            "{name}: {failed} of {n}"
        );
    }
}

#[test]
fn two_at_a_limit_are_never_above_it() {
    let machine = Machine::flat(8192).cpus(3);
    let mm = machine.boot();
    let top = mm.memcg_create(None, "top", 40 * PAGE).unwrap();
    let groups = [0, 1].map(|_| mm.memcg_create(Some(&top), "one", 30 * PAGE).unwrap());
    let stop = AtomicBool::new(false);
    let refused = AtomicU64::new(0);
    std::thread::scope(|threads| {
        let workers: Vec<_> = (0..2)
            .map(|nth| {
                let (mm, groups, top, refused) = (&mm, &groups, &top, &refused);
                threads.spawn(move || {
                    let _cpu = mm.platform().claim(nth).unwrap();
                    let mut rng = Rng(nth as u64 + 1);
                    let mut had: Vec<(bool, NonNull<u8>, Pfn)> = Vec::new();
                    for _ in 0..scaled(20_000, 100) {
                        let _scope = Host::memcg_scope(groups[rng.below(2)].id());
                        let gfp = GFP_NOWAIT | __GFP_ACCOUNT;
                        let got = if rng.one_in(2) {
                            mm.alloc_pages(gfp, rng.below(3))
                                .map(|p| (true, NonNull::dangling(), p))
                        } else {
                            mm.kmalloc(1 + rng.below(6000), gfp)
                                .map(|o| (false, o, Pfn(0)))
                        };
                        match got {
                            Ok(one) => had.push(one),
                            Err(AllocError::Limit) => {
                                refused.fetch_add(1, Ordering::Relaxed);
                            }
                            Err(why) => panic!("{why}"),
                        }
                        while !had.is_empty() && (rng.one_in(3) || got.is_err()) {
                            let (page, object, pfn) = had.swap_remove(rng.below(had.len()));
                            if page {
                                free(mm, pfn)
                            } else {
                                kfree(mm, object)
                            }
                            if rng.one_in(2) {
                                break;
                            }
                        }
                        assert!(top.usage() <= 40 * PAGE && groups[0].usage() <= 30 * PAGE);
                    }
                    for (page, object, pfn) in had {
                        if page {
                            free(mm, pfn)
                        } else {
                            kfree(mm, object)
                        }
                    }
                })
            })
            .collect();
        // Another goes on changing the limit; it holds from when it is set.
        let setter = threads.spawn(|| {
            let _cpu = mm.platform().claim(2).unwrap();
            let mut set = [0, 0];
            // Once at least, however late this thread begins.
            while !stop.load(Ordering::Relaxed) || set[0] == 0 {
                for pages in [20, 40, 25] {
                    match top.set_limit(pages * PAGE) {
                        Ok(()) => {
                            // A charge that was compared with the old one is undone in a moment.
                            let end = Instant::now() + Duration::from_secs(60);
                            while top.usage() > pages * PAGE {
                                assert!(Instant::now() < end, "above a limit that was set");
                                std::thread::yield_now();
                            }
                            set[0] += 1;
                        }
                        Err(_) => set[1] += 1,
                    }
                }
            }
            set
        });
        let ends: Vec<_> = workers.into_iter().map(|t| t.join()).collect();
        stop.store(true, Ordering::Relaxed);
        ends.into_iter().for_each(|end| end.unwrap());
        assert!(setter.join().unwrap()[0] > 0);
    });
    assert!(refused.load(Ordering::Relaxed) > 0);
    assert!(top.watermark() <= 40 * PAGE);
    empty(&mm, &top, "top");
    groups.iter().for_each(|g| empty(&mm, g, "one"));
}

/// Says that it is over, also if a test fails.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn groups_come_and_go_while_others_charge_them() {
    let machine = Machine::flat(8192).cpus(2);
    let mm = machine.boot();
    let top = mm.memcg_create(None, "top", NONE).unwrap();
    let id = AtomicU64::new(0);
    let stop = AtomicBool::new(false);
    std::thread::scope(|threads| {
        let charger = threads.spawn(|| {
            let _cpu = mm.platform().claim(0).unwrap();
            let (mut had, mut rng) = (Vec::new(), Rng(5));
            while !stop.load(Ordering::Relaxed) {
                let _scope = Host::memcg_scope(id.load(Ordering::Relaxed) as u16);
                had.push(mm.alloc_pages(GFP_NOWAIT | __GFP_ACCOUNT, 0).unwrap());
                if had.len() > 50 {
                    free(&mm, had.swap_remove(rng.below(had.len())));
                }
            }
            had.into_iter().for_each(|pfn| free(&mm, pfn));
        });
        let _cpu = mm.platform().claim(1).unwrap();
        let over = Stop(&stop);
        for _ in 0..scaled(20_000, 50) {
            let group = mm.memcg_create(Some(&top), "short", NONE).unwrap();
            let child = mm.memcg_create(Some(&group), "shorter", NONE).unwrap();
            id.store(u64::from(child.id()), Ordering::Relaxed);
            std::hint::spin_loop();
            drop(group);
            drop(child);
        }
        drop(over);
        charger.join().unwrap();
    });
    assert_eq!((mm.memcg_zombies(), top.stat().pins), (0, 1));
    empty(&mm, &top, "top");
}

/// Charged pages that were to be a guard, and could not for want of a `struct buddy`, are charged as before, and once only.
#[test]
fn a_guard_that_fails_stays_charged() {
    let mm = boot();
    let group = mm.memcg_create(None, "group", NONE).unwrap();
    let _scope = Host::memcg_scope(group.id());
    // A block whose descriptor is a folio's.
    let folio = mm.alloc_folio(GFP_KERNEL, 0, FolioKind::File).unwrap();
    free(&mm, folio);
    let pfn = mm.alloc_pages(GFP_KERNEL_ACCOUNT, 0).unwrap();
    assert_eq!((pfn, group.usage()), (folio, PAGE));
    mm.platform().faults().fail_one_in(1, 1);
    // SAFETY: ours, bare, and nobody uses what they hold.
    let failed = unsafe { mm.guard_pages(pfn) };
    let (_, points) = mm.platform().faults().off();
    assert!(failed.is_err() && points > 0, "{failed:?}");
    assert_eq!((group.usage(), mm.memcg_of_page(pfn)), (PAGE, group.id()));
    check(&mm);
    // And one that is made is charged to nobody.
    // SAFETY: as above.
    unsafe { mm.guard_pages(pfn) }.unwrap();
    assert_eq!(group.usage(), 0);
    check(&mm);
    // SAFETY: our guard; then our pages.
    unsafe {
        mm.unguard_pages(pfn);
        mm.free_pages(pfn);
    }
    empty(&mm, &group, "guards");
}

/// Where a number of a gathered block's is looked for, that of a group lies in charged pages: they are not taken for gathered ones.
#[test]
fn charged_pages_are_in_the_way_of_a_range_whatever_their_number() {
    const START: u32 = 1024;
    let mm = boot();
    let groups: Vec<_> = (0..START)
        .map(|_| mm.memcg_create(None, "group", NONE).unwrap())
        .collect();
    let group = groups.last().unwrap();
    assert_eq!(u32::from(group.id()), START, "as the range's first page");
    let _scope = Host::memcg_scope(group.id());
    let (mut page, mut others) = (Pfn::NONE, Vec::new());
    while page == Pfn::NONE {
        let pfn = mm.alloc_pages(GFP_KERNEL_ACCOUNT, 0).unwrap();
        if pfn > Pfn(START) && pfn < Pfn(START + 512) {
            page = pfn;
        } else {
            others.push(pfn);
        }
    }
    others.into_iter().for_each(|pfn| free(&mm, pfn));
    let obstacle = mm.alloc_contig_range(Pfn(START), 512).unwrap_err();
    assert_eq!((obstacle.pfn, obstacle.kind), (page, PageType::Bare));
    free(&mm, page);
    mm.alloc_contig_range(Pfn(START), 512).unwrap();
    free(&mm, Pfn(START));
    check(&mm);
}
