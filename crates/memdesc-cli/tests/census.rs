//! The census of a replay beside Linux's snapshots, on small recordings whose pages are known one by one.
#![allow(missing_docs)]

mod common;

use common::{Text, at, folder, json, memdesc, number, stdout, write};

const ANON_GFP: &str = "GFP_HIGHUSER_MOVABLE|__GFP_ZERO|__GFP_COMP";
const FILE_GFP: &str = "GFP_HIGHUSER_MOVABLE|__GFP_WRITE|__GFP_COMP";
const SLAB_GFP: &str = "GFP_KERNEL|__GFP_RECLAIMABLE|__GFP_NOWARN|__GFP_NORETRY|__GFP_COMP";

// Bits of kpageflags.
const LRU: u64 = 1 << 5;
const SLAB: u64 = 1 << 7;
const BUDDY: u64 = 1 << 10;
const ANON: u64 = 1 << 12 | LRU;
const HEAD: u64 = 1 << 15;
const TAIL: u64 = 1 << 16;
const TABLE: u64 = 1 << 26;
const RESERVED: u64 = 1 << 32;

/// The flags of 64 MiB.
struct Flags(Vec<u64>);

impl Flags {
    fn new() -> Flags {
        let mut flags = Flags(vec![BUDDY; 16384]);
        flags.0[..16].fill(RESERVED);
        flags
    }

    /// A block of this order.
    fn set(&mut self, pfn: usize, order: u32, what: u64) {
        let pages = 1 << order;
        self.0[pfn..pfn + pages].fill(what);
        if order > 0 && what != BUDDY {
            self.0[pfn] |= HEAD;
            self.0[pfn + 1..pfn + pages].fill(what | TAIL);
        }
    }

    fn bytes(&self) -> Vec<u8> {
        self.0.iter().flat_map(|f| f.to_le_bytes()).collect()
    }
}

/// A recording with two snapshots, in which every kind of difference occurs.
fn recording(name: &str) -> String {
    let mut before = Flags::new();
    before.set(0x100, 0, ANON);
    before.set(0x108, 3, LRU);
    before.set(0x120, 0, LRU);
    before.set(0x200, 1, SLAB);
    before.set(0x210, 0, TABLE);
    before.set(0x220, 0, ANON);
    let mut after = Flags(before.0.clone());
    let mut text = Text::default();
    // As flags say: two anonymous pages, a large folio of a file, a slab.
    for pfn in [0x400, 0x401] {
        text.alloc(pfn, 0, ANON_GFP);
        after.set(pfn as usize, 0, ANON);
    }
    text.alloc(0x410, 4, FILE_GFP);
    after.set(0x410, 4, LRU);
    text.alloc(0x440, 2, SLAB_GFP);
    after.set(0x440, 2, SLAB);
    // Flags say anonymous, the snapshot says file: shmem.
    text.alloc(0x402, 0, ANON_GFP);
    after.set(0x402, 0, LRU);
    // The same, but freed before the end: flags are all there is.
    text.alloc(0x403, 0, ANON_GFP);
    text.free(0x403, 0);
    // Bare by its flags, a page table by the snapshot.
    text.alloc(0x404, 0, "GFP_KERNEL");
    after.set(0x404, 0, TABLE);
    // Freed after the last event.
    text.alloc(0x480, 0, ANON_GFP);
    // Freed, and taken again after the last event.
    text.free(0x108, 3);
    after.set(0x108, 3, BUDDY);
    after.set(0x108, 0, ANON);
    // Handed out again since, as part of something larger.
    text.alloc(0x4a0, 0, ANON_GFP);
    after.set(0x4a0, 1, LRU);
    // Changed without an event.
    after.set(0x220, 0, LRU);
    let folder = folder(name);
    write(&folder, "kpageflags.before", before.bytes());
    write(&folder, "kpageflags.after", after.bytes());
    write(&folder, "events.txt", &text.text);
    folder.display().to_string()
}

#[test]
fn types_and_differences() {
    let report = json(&[&recording("census"), "--memory", "64M"]);
    let census = |key: &str| number(&report, &format!("census.{key}"));
    let share = |key: &str| at(&report, &format!("census.{key}")).as_f64().unwrap();
    // Taken over as it was, with its orders.
    assert_eq!(share("start.percent"), 100.0);
    assert_eq!(census("start.pages"), 1 + 8 + 1 + 2 + 1 + 1);
    assert_eq!(census("start.linux.file.allocations"), 2);
    assert_eq!(at(&report, "census.start.linux.file.by_order.3"), 1);
    // What became of it.
    assert_eq!(census("corrected_by_snapshot"), 2);
    for (of, pages, allocations) in [
        ("anon", 6, 6),
        ("file", 18, 3),
        ("page_table", 2, 2),
        ("slab", 6, 2),
        ("bare", 0, 0),
    ] {
        assert_eq!(census(&format!("replay.{of}.pages")), pages, "{of}");
        let blocks = census(&format!("replay.{of}.allocations"));
        assert_eq!(blocks, allocations, "{of}");
    }
    for (of, pages, allocations) in [
        ("anon", 4, 4),
        ("file", 21, 5),
        ("page_table", 2, 2),
        ("slab", 6, 2),
    ] {
        assert_eq!(census(&format!("end.linux.{of}.pages")), pages, "{of}");
        let blocks = census(&format!("end.linux.{of}.allocations"));
        assert_eq!(blocks, allocations, "{of}");
    }
    let differences = |key: &str| census(&format!("end.differences.{key}"));
    assert_eq!(differences("freed_since"), 1);
    assert_eq!(differences("taken_since"), 1);
    // 0x220, and the page beside 0x4a0, which no event knows.
    assert_eq!(differences("without_event"), 2);
    assert_eq!(differences("other_type"), 1);
    assert_eq!(differences("guessed"), 0);
    // 0x100, 0x120, 0x200, 0x210, and what the events made.
    let same = 1 + 1 + 2 + 1 + 2 + 16 + 4 + 1 + 1;
    assert_eq!(census("end.same_type_pages"), same);
    assert_eq!(census("end.pages"), same + 5);
    assert_eq!(at(&report, "census.largest_difference.type"), "file");
    assert_eq!(at(&report, "census.largest_difference.pages"), -3);
    assert_eq!(census("bare_slabs"), 2);
    assert_eq!(share("pages_per_folio.file.replay"), 6.0);
    assert_eq!(share("pages_per_folio.file.linux"), 4.2);
    assert!(share("metadata_bytes_per_page") > 8.0);
    assert_eq!(number(&report, "pages.by_purpose.slab"), 1);
    assert_eq!(number(&report, "teardown.missing_pages"), 0);
}

#[test]
fn flags_alone_without_the_last_snapshot() {
    let path = recording("census_no_snapshot");
    let report = json(&[&path, "--memory", "64M", "--no-snapshot"]);
    let census = |key: &str| number(&report, &format!("census.{key}"));
    assert!(at(&report, "census.end").is_null());
    assert!(at(&report, "census.start").is_null());
    assert_eq!(census("corrected_by_snapshot"), 0);
    assert_eq!(census("replay.anon.pages"), 5);
    assert_eq!(census("replay.bare.pages"), 1);
    assert_eq!(census("replay.slab.pages"), 4);
}

#[test]
fn table_for_people() {
    let path = recording("census_text");
    let text = stdout(&memdesc(&["replay", &path, "--memory", "64M"]));
    for part in [
        "Census at the end of the recording, beside Linux's snapshot after it",
        "page by page",
        "largest difference: file, 3 pages fewer here",
        "freed between the last event and the snapshot",
        "pages a file folio: 6.00, Linux 4.20; 1 large, Linux 2",
    ] {
        assert!(text.contains(part), "no {part:?} in\n{text}");
    }
}
