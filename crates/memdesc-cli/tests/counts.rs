//! Small recordings whose numbers are known.
#![allow(missing_docs)]

mod common;

use common::{Text, at, folder, json, number, write};

const BASE: u64 = 0xffff_8880_0000_0000;
const ANON: &str = "GFP_HIGHUSER_MOVABLE|__GFP_ZERO|__GFP_COMP";
const FILE: &str = "GFP_HIGHUSER_MOVABLE|__GFP_WRITE|__GFP_COMP";
const TABLE: &str = "GFP_KERNEL_ACCOUNT|__GFP_ZERO|__GFP_COMP";
const SLAB: &str = "GFP_KERNEL|__GFP_NOWARN|__GFP_NORETRY|__GFP_COMP";

fn object(pfn: u64, offset: u64) -> u64 {
    BASE + (pfn << 12) + offset
}

#[test]
fn pages() {
    let mut text = Text::default();
    text.alloc(0x100, 0, ANON);
    text.alloc(0x200, 2, FILE);
    text.alloc(0x300, 0, TABLE);
    text.alloc(0x400, 3, "GFP_KERNEL");
    text.alloc(0x1000, 9, ANON);
    text.free(0x100, 0);
    text.event(1, "mm_page_free_batched: page=0x1 pfn=0x100 order=0");
    // Never seen allocated.
    text.free(0x500, 0);
    text.free(0x600, 1);
    // Handed out again without a free: the same, and one page of a larger block.
    text.alloc(0x300, 0, ANON);
    text.alloc(0x201, 0, ANON);
    // A large block comes back in parts: half, a page that is handed out again, and the rest.
    text.free(0x1000, 8);
    text.free(0x1100, 0);
    text.alloc(0x1100, 0, ANON);
    for page in 0x1101..0x1200 {
        text.free(page, 0);
    }
    // Two single pages come back as one block.
    text.alloc(0x700, 0, ANON);
    text.alloc(0x701, 0, ANON);
    text.free(0x700, 1);
    // An allocation that failed in Linux.
    text.event(
        0,
        "mm_page_alloc: page=(nil) pfn=0x0 order=9 migratetype=1 gfp_flags=GFP_TRANSHUGE",
    );
    let path = write(&folder("pages"), "events.txt", &text.text);
    let report = json(&[&path]);
    let pages = |key: &str| number(&report, &format!("pages.{key}"));
    assert_eq!(pages("allocated"), 10);
    // 0x100, 0x300, 0x200 with its tail, 0x1000, 0x700 and 0x701.
    assert_eq!(pages("freed"), 6);
    // 0x400, 0x300, 0x201, 0x1100.
    assert_eq!(pages("live"), 4);
    assert_eq!(pages("free_unseen"), 2);
    assert_eq!(pages("free_implied"), 2);
    assert_eq!(pages("free_in_part"), 1 + 1 + 254);
    assert_eq!(pages("free_joined"), 1);
    assert_eq!(pages("failed"), 0);
    assert_eq!(pages("linux_failed"), 1);
    assert_eq!(
        pages("allocated_pages"),
        1 + 4 + 1 + 8 + 512 + 1 + 1 + 1 + 1 + 1
    );
    assert_eq!(pages("freed_pages"), 1 + 1 + 4 + 512 + 2);
    let by = |key: &str| number(&report, &format!("pages.by_purpose.{key}"));
    assert_eq!(
        (by("anon"), by("file"), by("page_table"), by("bare")),
        (7, 1, 1, 1)
    );
    assert_eq!(number(&report, "events.by_kind.mm_page_free_batched"), 1);
    assert_eq!(number(&report, "slab.allocated"), 0);
    assert_eq!(number(&report, "teardown.blocks"), 4);
    assert_eq!(number(&report, "recording.cpus"), 2);
    let types = at(&report, "ledger.pages.by_type").as_array().unwrap();
    assert_eq!(
        types.iter().map(|t| t.as_u64().unwrap()).sum::<u64>(),
        8 + 3
    );
}

#[test]
fn objects() {
    let mut text = Text::default();
    // A slab of two pages, one of a single page, and a user's page beside them.
    text.alloc(0x10, 1, SLAB);
    text.alloc(0x20, 0, SLAB);
    text.alloc(0x30, 0, ANON);
    text.cache_alloc("dentry", object(0x10, 0), 192);
    text.cache_alloc("dentry", object(0x11, 0x40), 192);
    text.kmalloc(object(0x20, 8), 8);
    text.kmalloc(object(0x20, 16), 5);
    // Large kmalloc: its pages are in the trace as well.
    text.alloc(0x40, 3, "GFP_KERNEL|__GFP_COMP");
    text.kmalloc(object(0x40, 0), 20_000);
    // Nothing, nothing, never seen, freed by the other call.
    text.kfree(0);
    text.kfree(16);
    text.kfree(object(0x99, 0));
    text.cache_free("dentry", object(0x98, 0));
    text.cache_free("kmalloc-8", object(0x20, 8));
    text.kfree(object(0x10, 0));
    // Handed out again without a free.
    text.kmalloc(object(0x20, 16), 8);
    // The slab goes, and with it an object whose free was not seen.
    text.free(0x10, 1);
    text.kfree(object(0x40, 0));
    text.free(0x40, 3);
    // Failed in Linux.
    text.kmalloc(0, 100);
    let path = write(&folder("objects"), "events.txt", &text.text);
    let report = json(&[&path]);
    let slab = |key: &str| number(&report, &format!("slab.{key}"));
    assert_eq!(slab("allocated"), 6);
    assert_eq!(slab("freed"), 5);
    assert_eq!(slab("live"), 1);
    assert_eq!(slab("free_null"), 2);
    assert_eq!(slab("free_unseen"), 2);
    assert_eq!(slab("free_implied"), 1);
    assert_eq!(slab("free_with_slab"), 1);
    assert_eq!(slab("linux_failed"), 1);
    assert_eq!(slab("failed"), 0);
    assert_eq!(slab("caches"), 1);
    let pages = |key: &str| number(&report, &format!("pages.{key}"));
    assert_eq!(
        (pages("allocated"), pages("freed"), pages("live")),
        (1, 0, 1),
        "only the user's page is ours"
    );
    assert_eq!(
        (pages("linux_slab_allocated"), pages("linux_slab_freed")),
        (3, 2)
    );
    assert_eq!(
        at(&report, "recording.direct_map_base"),
        "0xffff888000000000"
    );
    assert_eq!(number(&report, "teardown.objects"), 1);

    let pages_only = json(&[&path, "--pages-only"]);
    assert_eq!(number(&pages_only, "pages.allocated"), 4);
    assert_eq!(number(&pages_only, "pages.freed"), 2);
}

#[test]
fn impossible_events_among_many() {
    let mut text = Text::default();
    // Page 0 is how Linux prints an allocation that failed.
    for page in 1..=300 {
        text.alloc(page, 0, ANON);
    }
    text.alloc(0x4000, 14, ANON);
    let path = write(&folder("impossible"), "events.txt", &text.text);
    let report = json(&[&path]);
    assert_eq!(number(&report, "recording.impossible_events"), 1);
    assert_eq!(number(&report, "events.total"), 300);
    assert_eq!(number(&report, "pages.live"), 300);
}
