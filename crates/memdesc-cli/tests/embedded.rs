//! The recording inside the program.
#![allow(missing_docs)]

mod common;

use common::{at, json, memdesc, number, stderr, stdout};

#[test]
fn replays_with_all_that_must_be_said() {
    let report = json(&[]);
    assert_eq!(number(&report, "events.total"), 400_000);
    for key in [
        "events.per_second",
        "pages.allocated",
        "pages.freed",
        "pages.live",
        "slab.allocated",
        "slab.freed",
        "slab.live",
        "ledger.memmap_bytes",
        "ledger.descriptor_bytes",
        "ledger.other_metadata_bytes",
        "fragmentation.pinned_pageblocks",
        "fragmentation.linux_pinned_pageblocks",
    ] {
        assert!(at(&report, key).as_f64().expect(key) > 0.0, "{key}");
    }
    for key in [
        "pages.failed",
        "slab.failed",
        "purity.allocations_on_free",
        "teardown.missing_pages",
    ] {
        assert_eq!(number(&report, key), 0, "{key}");
    }
    assert_eq!(at(&report, "ledger.balanced"), true);
    assert_eq!(at(&report, "teardown.all_pages_back"), true);
    assert_eq!(at(&report, "ledger.struct_page_percent"), 1.5625);
    assert!(at(&report, "ledger.percent").as_f64().unwrap() <= 0.30);
    let ram = number(&report, "ledger.ram_bytes");
    assert!(ram > 23 << 30 && ram < 25 << 30);
    for key in [
        "fragmentation.free_by_order",
        "fragmentation.linux_free_by_order",
    ] {
        assert_eq!(at(&report, key).as_array().unwrap().len(), 11, "{key}");
    }
    for call in ["page_alloc", "page_free", "slab_alloc", "slab_free"] {
        let row = |key: &str| number(&report, &format!("latency_ns.{call}.{key}"));
        assert!(row("p50") <= row("p99") && row("p99") <= row("p999") && row("p999") <= row("max"));
        assert!(row("max") > 0);
    }
    // What came is what went and what stays.
    let pages = |key: &str| number(&report, &format!("pages.{key}"));
    assert_eq!(
        pages("from_snapshot") + pages("allocated"),
        pages("freed") + pages("live")
    );
    let slab = |key: &str| number(&report, &format!("slab.{key}"));
    assert_eq!(slab("allocated"), slab("freed") + slab("live"));
    assert_eq!(number(&report, "teardown.blocks"), pages("live"));
    assert_eq!(number(&report, "teardown.objects"), slab("live"));
    // The layout was taken whole, each block at its place.
    assert_eq!(number(&report, "snapshot.refused"), 0);
}

#[test]
fn census() {
    let report = json(&[]);
    let census = |key: &str| at(&report, &format!("census.{key}"));
    // The machine that was taken over is the one of the snapshot, page by page, but for what stands elsewhere.
    assert!(census("start.percent").as_f64().unwrap() >= 99.99);
    assert!(census("end").is_null(), "the recording is a beginning");
    // What there is at the end is what there was, and what the events made of it.
    let count =
        |side: &str, of: &str, what: &str| number(&report, &format!("census.{side}.{of}.{what}"));
    for of in ["anon", "file", "page_table", "slab", "bare"] {
        let (then, now) = (
            count("start.linux", of, "pages"),
            count("replay", of, "pages"),
        );
        assert!(then.abs_diff(now) * 2 < then, "{of}: {then}, then {now}");
        assert!(count("replay", of, "allocations") <= now);
    }
    // It is the ledger's, type by type.
    let ledger = |index: usize| number(&report, &format!("ledger.pages.by_type.{index}"));
    let pages = |of: &str| count("replay", of, "pages");
    assert_eq!(pages("page_table"), ledger(5));
    assert_eq!(pages("file"), ledger(6));
    assert_eq!(pages("anon"), ledger(7));
    assert_eq!(pages("reserved"), ledger(12));
    assert_eq!(
        pages("slab") + pages("bare"),
        ledger(2) + ledger(3) + ledger(4)
    );
    assert_eq!(pages("metadata"), number(&report, "ledger.pages.metadata"));
    let all = [
        "anon",
        "file",
        "page_table",
        "slab",
        "bare",
        "reserved",
        "metadata",
        "free",
    ];
    assert_eq!(
        all.into_iter().map(pages).sum::<u64>(),
        number(&report, "ledger.pages.given")
    );
    let folio = census("pages_per_folio.file.replay").as_f64().unwrap();
    assert!((1.3..1.8).contains(&folio), "{folio}");
    assert_eq!(census("pages_per_folio.anon.replay"), 1.0);
    assert!(census("metadata_bytes_per_page").as_f64().unwrap() < 16.0);
}

#[test]
fn is_the_same_every_time() {
    let (a, b) = (json(&["--limit", "100000"]), json(&["--limit", "100000"]));
    for key in [
        "pages",
        "slab",
        "ledger",
        "census",
        "fragmentation",
        "snapshot",
        "vmstat",
    ] {
        assert_eq!(at(&a, key), at(&b, key), "{key}");
    }
}

#[test]
fn options() {
    let plain = json(&["--no-snapshot", "--limit", "50000"]);
    assert!(at(&plain, "snapshot").is_null());
    assert!(at(&plain, "fragmentation.linux_free_by_order").is_null());
    assert!(at(&plain, "fragmentation.linux_pinned_pageblocks").is_null());
    assert_eq!(number(&plain, "pages.from_snapshot"), 0);

    let pages = json(&["--pages-only", "--limit", "50000"]);
    assert_eq!(number(&pages, "slab.allocated"), 0);
    assert_eq!(number(&pages, "pages.linux_slab_allocated"), 0);
    assert!(number(&pages, "slab.skipped") > 0);

    let one = json(&[
        "--cpus",
        "1",
        "--memory",
        "32G",
        "--no-snapshot",
        "--limit",
        "50000",
    ]);
    assert_eq!(number(&one, "recording.cpus"), 1);
    assert_eq!(number(&one, "ledger.ram_bytes"), 32 << 30);
}

#[test]
fn report_for_people() {
    let output = memdesc(&["replay", "--limit", "50000"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let text = stdout(&output);
    for part in [
        "Layout before the first event",
        "Traffic",
        "Failures where Linux had none",
        "Ledger",
        "struct page",
        "a plain reading of the seeds",
        "Census at the end of the recording",
        "Fragmentation",
        "Latency",
        "Speed",
        "All is well.",
    ] {
        assert!(text.contains(part), "no {part:?} in\n{text}");
    }
    assert!(stderr(&output).is_empty(), "no progress bar in a pipe");
}

#[test]
fn what_metadata_costs() {
    let output = memdesc(&["ledger", "--memory", "256M", "--json"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let cost = |fill: &str| {
        at(&report, &format!("fills.{fill}.bytes_per_page"))
            .as_f64()
            .unwrap()
    };
    assert!(cost("folios") <= 48.0 && cost("mapped") <= 48.0 && cost("linux_mix") <= 32.0);
    assert!(cost("bare") <= 24.0 && cost("folios_order_9") < 12.0);
    assert!(stdout(&memdesc(&["ledger", "--memory", "64M"])).contains("bare single pages"));
}

#[test]
fn deferred_frees() {
    let plain = json(&[]);
    assert!(at(&plain, "rcu").is_null());
    let report = json(&["--rcu", "50%"]);
    let (deferred, freed) = (
        number(&report, "rcu.deferred"),
        number(&report, "slab.freed"),
    );
    assert!(
        deferred.abs_diff(freed / 2) <= freed / 100,
        "{deferred} of {freed}"
    );
    assert_eq!(number(&plain, "slab.freed"), freed);
    let (peak, mean) = (number(&report, "rcu.peak"), number(&report, "rcu.mean"));
    assert!(0 < mean && mean < peak && peak < deferred);
    assert_eq!(number(&report, "rcu.left"), 0);
    assert_eq!(number(&report, "teardown.missing_pages"), 0);
    // Longer grace periods let more lie about.
    let slow = json(&["--rcu", "50%", "--rcu-grace", "100"]);
    assert!(number(&slow, "rcu.mean") > 2 * mean);
    // All of it.
    let all = json(&["--rcu", "100"]);
    assert!(number(&all, "rcu.deferred") > deferred * 3 / 2);
}

#[test]
fn shares_that_are_none() {
    for bad in ["101", "-1", "half"] {
        let out = memdesc(&["--rcu", bad]);
        assert_eq!(out.status.code(), Some(2), "{bad}");
    }
}
