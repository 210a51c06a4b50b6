//! Freed by the wrong call: every kind of memory against every call that is not its own. Each gives one report, which names the page and its
//! type, and nothing is taken back: the right call frees it after all.
#![cfg(not(miri))]

mod common;

use std::ptr::NonNull;

use common::*;
use memdesc::gfp::{GFP_HIGHUSER_MOVABLE, GFP_KERNEL};
use memdesc::*;
use memdesc_host::Host;

/// What there is to free, and its type's name in a report.
struct Thing {
    name: &'static str,
    /// As the word says it.
    kind: &'static str,
    pfn: Pfn,
    /// Its address, if it has one of its own; else the direct map's.
    ptr: NonNull<u8>,
    /// The calls that it is right for, or that cannot be told from the right one.
    right: &'static [&'static str],
}

const CALLS: [&str; 9] = [
    "free_pages",
    "free_pages_nolock",
    "kfree",
    "kfree_nolock",
    "kvfree",
    "vfree",
    "vunmap",
    "kmem_cache_free",
    "kfree_rcu_prepaid",
];

fn call(mm: &Mm<Host>, cache: &Cache<'_>, which: &str, thing: &Thing) {
    // SAFETY: wrong on purpose: what is looked for is that each is told from the right call, and leaves the memory alone.
    unsafe {
        match which {
            "free_pages" => mm.free_pages(thing.pfn),
            "free_pages_nolock" => mm.free_pages_nolock(thing.pfn),
            "kfree" => mm.kfree(thing.ptr),
            "kfree_nolock" => mm.kfree_nolock(thing.ptr),
            "kvfree" => mm.kvfree(thing.ptr),
            "vfree" => mm.vfree(thing.ptr),
            "vunmap" => mm.vunmap(thing.ptr),
            "kmem_cache_free" => mm.kmem_cache_free(cache, thing.ptr),
            "kfree_rcu_prepaid" => mm.kfree_rcu_prepaid(thing.ptr),
            other => panic!("no call {other}"),
        }
    }
}

#[test]
fn each_kind_of_memory_by_each_wrong_call() {
    let mut machine = Machine::flat(16384);
    machine.config.page_owner = 4096;
    let reports = Reports::default();
    let mm = machine.boot_on(reports.on(machine.host()).build().unwrap());
    let cache = mm
        .kmem_cache_create("victim", 64, 8, CacheFlags::EMPTY, None)
        .unwrap();
    let other = mm
        .kmem_cache_create("other", 64, 8, CacheFlags::EMPTY, None)
        .unwrap();
    let movable = GFP_HIGHUSER_MOVABLE;
    let at = |pfn| page(&mm, pfn);
    let mut things = Vec::new();
    let mut add = |name, kind, pfn, ptr: NonNull<u8>, right| {
        things.push(Thing {
            name,
            kind,
            pfn,
            ptr,
            right,
        });
    };
    let pages: &[&str] = &["free_pages", "free_pages_nolock"];
    let bare = mm.alloc_pages(GFP_KERNEL, 1).unwrap();
    add("bare pages", "bare", bare, at(bare), pages);
    add(
        "the second of them",
        "bare",
        bare.add(1),
        at(bare.add(1)),
        &[],
    );
    let large = mm.alloc_pages(GFP_KERNEL, 6).unwrap();
    add(
        "the middle of a large block",
        "bare",
        large.add(33),
        at(large.add(33)),
        &[],
    );
    let file = mm.alloc_folio(movable, 2, FolioKind::File).unwrap();
    add("a file folio", "file", file, at(file), pages);
    add(
        "a file folio's tail",
        "file",
        file.add(3),
        at(file.add(3)),
        &[],
    );
    let anon = mm.alloc_folio(movable, 0, FolioKind::Anon).unwrap();
    add("an anonymous folio", "anon", anon, at(anon), pages);
    let table = mm.alloc_page_table(GFP_KERNEL, 0).unwrap();
    add("a page table", "page_table", table, at(table), pages);
    let kmalloc = mm.kmalloc(20_000, GFP_KERNEL).unwrap();
    let pfn = mm.virt_to_pfn(kmalloc.as_ptr());
    // Pages are freed as pages whoever they were allocated for: Linux does it too.
    add(
        "large kmalloc",
        "large_kmalloc",
        pfn,
        kmalloc,
        &[
            "free_pages",
            "free_pages_nolock",
            "kfree",
            "kfree_nolock",
            "kvfree",
            "kfree_rcu_prepaid",
        ],
    );
    let inside = kmalloc.map_addr(|a| a.saturating_add(PAGE_SIZE + 8));
    add(
        "the middle of large kmalloc",
        "large_kmalloc",
        pfn.add(1),
        inside,
        &[],
    );
    let object = mm.kmem_cache_alloc(&other, GFP_KERNEL).unwrap();
    let pfn = mm.virt_to_pfn(object.as_ptr());
    add(
        "an object of another cache",
        "slab",
        pfn,
        object,
        &["kfree", "kfree_nolock", "kvfree"],
    );
    let area = mm.vmalloc(3 * PAGE_SIZE, GFP_KERNEL).unwrap();
    let pfn = mm.vmalloc_to_pfn(area.as_ptr()).unwrap();
    add(
        "a page of vmalloc, by its direct address",
        "vmalloc",
        pfn,
        at(pfn),
        &[],
    );
    add("vmalloc", "vmalloc", pfn, area, &["vfree", "kvfree"]);
    let inside = area.map_addr(|a| a.saturating_add(PAGE_SIZE));
    let pfn = mm.vmalloc_to_pfn(inside.as_ptr()).unwrap();
    add("the middle of vmalloc", "vmalloc", pfn, inside, &[]);
    // SAFETY: the pages are ours, and stay so.
    let mapped = unsafe { mm.vmap(&[bare]) }.unwrap();
    add(
        "what vmap mapped",
        "bare",
        bare,
        mapped,
        &["vunmap", "free_pages", "free_pages_nolock"],
    );
    let stack = mm.alloc_kernel_stack(4, 7).unwrap();
    let pfn = mm.vmalloc_to_pfn(stack.bottom().as_ptr()).unwrap();
    add("a kernel stack's page", "vmalloc", pfn, at(pfn), &[]);
    add("a kernel stack", "vmalloc", pfn, stack.bottom(), &[]);
    let freed = mm.alloc_pages(GFP_KERNEL, 3).unwrap();
    free(&mm, freed);
    add("free pages", "free", freed, at(freed), &[]);
    let reserved = (0..16384)
        .map(Pfn)
        .rfind(|&p| matches!(mm.lookup(p).2, Memory::Reserved(_)))
        .unwrap();
    add("the memory map", "reserved", reserved, at(reserved), &[]);
    let offline = (1..30)
        .map(|n| Pfn(n << 9))
        .find(|&p| mm.offline_pages(p, 512).is_ok())
        .unwrap();
    add("offline memory", "offline", offline, at(offline), &[]);
    let untouched = (0..16384)
        .map(Pfn)
        .rfind(|&p| matches!(mm.lookup(p).2, Memory::Untouched))
        .unwrap();
    add(
        "what was never handed out",
        "none",
        untouched,
        at(untouched),
        &[],
    );

    let before = mm.census();
    let mut cases = 0;
    for thing in &things {
        for which in CALLS {
            if thing.right.contains(&which) {
                continue;
            }
            if thing.pfn.phys().0 != mm.virt_to_pfn(thing.ptr.as_ptr()).phys().0
                && which.starts_with("free_pages")
            {
                // The page of an area: by its number, tried above by its own line.
                continue;
            }
            call(&mm, &cache, which, thing);
            let seen = reports.take();
            assert_eq!(seen.len(), 1, "{} by {which}: {seen:#?}", thing.name);
            let text = &seen[0].text;
            let first = text.lines().next().unwrap();
            let names = first.contains(&format!("pfn {:#x},", thing.pfn.0))
                && first.contains(&format!("says: {} order", thing.kind));
            // An address of the vmalloc range is told by its address where the page cannot be looked up without a lock.
            assert!(names, "{} by {which}: {text}", thing.name);
            assert!(!matches!(seen[0].what, Corruption::BadWord), "{text}");
            let desc = match thing.kind {
                "bare" | "large_kmalloc" => "buddy at",
                "file" | "anon" => "folio at",
                "page_table" => "ptdesc at",
                "slab" => "slab at",
                "vmalloc" => "vmap_area at",
                "free" => ": next ",
                "reserved" => "facts 0x1",
                "offline" => "offline, order 9",
                _ => "never handed out",
            };
            assert!(text.contains(desc), "{} by {which}: {text}", thing.name);
            assert!(
                text.contains("\n  block before: ") || text.contains("\n  block after: "),
                "{text}"
            );
            assert!(
                text.contains("\n  page allocated as ") || text.contains("it never changed hands"),
                "{text}"
            );
            cases += 1;
        }
    }
    assert!(cases > 120, "{cases}");
    assert_eq!(mm.census(), before, "something changed hands");
    // By the right call each goes.
    mm.online_pages(offline, 512).unwrap();
    kfree(&mm, kmalloc);
    cache_free(&mm, &other, object);
    // SAFETY: all ours, and none is used any more.
    unsafe {
        mm.vunmap(mapped);
        mm.vfree(area);
        mm.free_kernel_stack(stack);
    }
    for pfn in [bare, large, file, anon, table] {
        free(&mm, pfn);
    }
    assert_eq!(reports.take(), []);
    mm.kmem_cache_destroy(cache).unwrap();
    mm.kmem_cache_destroy(other).unwrap();
    assert_eq!(mm.validate(|r| panic!("{r}")), Validation::default());
    teardown(&machine, &mm);
}
