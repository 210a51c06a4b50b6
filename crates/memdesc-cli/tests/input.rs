//! Bad input, and cuts.
#![allow(missing_docs)]

mod common;

use std::path::Path;
use std::process::{Command, Stdio};

use common::{Text, folder, json, memdesc, number, stderr, stdout, write};

/// Expects this exit code, and these words on standard error.
fn fails(args: &[&str], code: i32, words: &[&str]) {
    let output = memdesc(args);
    let said = stderr(&output);
    assert_eq!(output.status.code(), Some(code), "{args:?}: {said}");
    for word in words {
        assert!(said.contains(word), "{args:?}: no {word:?} in {said:?}");
    }
    assert!(!said.contains("panicked"), "{said}");
}

fn one_page() -> Text {
    let mut text = Text::default();
    text.alloc(0x10, 0, "GFP_KERNEL");
    text
}

#[test]
fn nothing_to_replay() {
    let folder = folder("nothing");
    let at = folder.display().to_string();
    fails(
        &["replay", "/nonexistent/recording"],
        2,
        &["/nonexistent/recording"],
    );
    fails(&["replay", &at], 2, &["no events.txt", "perf script"]);
    let empty = write(&folder, "empty.txt", "");
    fails(&["replay", &empty], 2, &["empty.txt", "no events"]);
    let prose = write(&folder, "prose.txt", "It was a dark and stormy night.\n");
    fails(
        &["replay", &prose],
        2,
        &["prose.txt", "line 1", "not a recording", "stormy"],
    );
    let other = write(
        &folder,
        "other.txt",
        "[000]   1.000000: sched:sched_switch: prev_comm=a\n",
    );
    fails(&["replay", &other], 2, &["other.txt", "kmem"]);
    let binary = write(&folder, "perf.data", b"PERFILE2\0\0\0\0");
    fails(&["replay", &binary], 2, &["perf.data", "perf script"]);
    let objects = write(
        &folder,
        "objects.txt",
        "[000] 1.000000: kmem:kfree: call_site=f ptr=0xffff888000001000\n",
    );
    fails(
        &["replay", "--pages-only", &objects],
        2,
        &["nothing", "--pages-only"],
    );
}

#[test]
fn machines_that_cannot_be() {
    let folder = folder("machines");
    let mut text = Text::default();
    text.alloc(0xffff_fff0, 0, "GFP_KERNEL");
    let far = write(&folder, "far.txt", &text.text);
    fails(&["replay", &far], 2, &["16 TiB"]);
    let near = write(&folder, "near.txt", &one_page().text);
    fails(&["replay", &near, "--memory", "20T"], 2, &["16 TiB"]);
    let mut text = Text::default();
    text.alloc(0x10_0000, 0, "GFP_KERNEL");
    let beyond = write(&folder, "beyond.txt", &text.text);
    fails(
        &["replay", &beyond, "--memory", "1G"],
        2,
        &["0x100000", "0x40000", "--memory"],
    );
    let mut text = Text::default();
    text.alloc(0x4000, 14, "GFP_KERNEL");
    let order = write(&folder, "order.txt", &text.text);
    fails(&["replay", &order], 2, &["order 14"]);
    let mut text = Text::default();
    text.event(
        5000,
        "mm_page_alloc: page=0x1 pfn=0x10 order=0 migratetype=0 gfp_flags=GFP_KERNEL",
    );
    let cpus = write(&folder, "cpus.txt", &text.text);
    fails(&["replay", &cpus], 2, &["5001 CPUs"]);
    assert_eq!(number(&json(&[&cpus, "--cpus", "4"]), "pages.live"), 1);
    fails(&["replay", "--memory", "much"], 2, &["much"]);
}

#[test]
fn broken_lines_are_counted() {
    let folder = folder("broken");
    let mut text = one_page().text;
    text += "[000]   1.000003: kmem:mm_page_alloc: page=0x1 pfn=\nhalf a li";
    let path = write(&folder, "events.txt", &text);
    let report = json(&[&path]);
    assert_eq!(number(&report, "recording.broken_lines"), 2);
    assert_eq!(number(&report, "pages.allocated"), 1);
    let shown = stdout(&memdesc(&["replay", &path]));
    assert!(shown.contains("line 2: expected"), "{shown}");
}

#[test]
fn snapshots_that_are_broken() {
    let folder = folder("snapshots");
    write(&folder, "events.txt", &one_page().text);
    write(&folder, "buddyinfo.before", "Node 0, zone\n");
    let at = folder.display().to_string();
    fails(&["replay", &at], 2, &["buddyinfo.before:1"]);
}

#[test]
fn a_file_that_breaks_off() {
    let folder = folder("truncated");
    let whole = std::fs::read(recording().join("events.txt.zst")).unwrap();
    let path = write(&folder, "events.txt.zst", &whole[..whole.len() / 4]);
    fails(
        &["replay", "--json", &path],
        3,
        &["broke off in line", "replayed"],
    );
    let output = memdesc(&["replay", "--json", &path]);
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(number(&report, "events.total") > 10_000);
    assert!(report["recording"]["truncated"].is_string());
    // So little of it that there is nothing.
    let path = write(&folder, "head.txt.zst", &whole[..100]);
    fails(&["replay", &path], 2, &["head.txt.zst"]);
}

#[test]
fn readers_that_go_away() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_memdesc"))
        .args(["replay", "--limit", "1000"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(141));
    assert_eq!(stderr(&output), "");
}

fn recording() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/recordings/build"))
}

#[test]
fn cuts_replay_alike() {
    let out = folder("cut").join("deep/cut");
    let out_text = out.display().to_string();
    let from = recording().display().to_string();
    let cut = memdesc(&["cut", &from, "--events", "30000", "--out", &out_text]);
    assert_eq!(cut.status.code(), Some(0), "{}", stderr(&cut));
    assert!(stdout(&cut).contains("30000 events") && out.join("kpageflags.before.zst").exists());
    let (whole, cut) = (json(&["--limit", "30000"]), json(&[&out_text]));
    for key in ["pages", "slab", "ledger", "fragmentation", "snapshot"] {
        assert_eq!(whole[key], cut[key], "{key}");
    }

    // From the middle: no snapshot says what memory was like then.
    let middle = folder("cut-middle").display().to_string();
    let args = [
        "cut",
        &from,
        "--from-events",
        "1000",
        "--seconds",
        "0.01",
        "--out",
        &middle,
    ];
    assert_eq!(memdesc(&args).status.code(), Some(0));
    let report = json(&[&middle]);
    assert!(report["snapshot"].is_null());
    assert!(report["recording"]["seconds"].as_f64().unwrap() <= 0.01);
    fails(&["cut", &from, "--out", &middle], 2, &["--events"]);
    fails(
        &[
            "cut",
            &from,
            "--from-events",
            "9999999",
            "--events",
            "1",
            "--out",
            &middle,
        ],
        2,
        &["400000"],
    );
}
