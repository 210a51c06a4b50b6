//! Recordings in binary: cut out of text, and replayed as the text is.
#![allow(missing_docs)]

mod common;

use std::fs;
use std::path::PathBuf;

use common::{at, json, memdesc, stderr, stdout};

/// A file of this test's own.
fn file(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name)
}

/// The beginning of the built-in recording, in binary.
fn cut(name: &str) -> PathBuf {
    let to = file(name);
    let built_in = concat!(env!("CARGO_MANIFEST_DIR"), "/recordings/build");
    let path = to.to_str().unwrap();
    let output = memdesc(&["cut", built_in, "--events", "50000", "--binary", path]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert!(
        stdout(&output).contains("50000 events, "),
        "{}",
        stdout(&output)
    );
    to
}

#[test]
fn the_same_as_the_text() {
    let path = cut("same.mdr");
    let binary = json(&[path.to_str().unwrap()]);
    let text = json(&["--no-snapshot", "--limit", "50000"]);
    for key in [
        "pages",
        "slab",
        "ledger",
        "census",
        "fragmentation",
        "vmstat",
        "teardown",
    ] {
        assert_eq!(at(&binary, key), at(&text, key), "{key}");
    }
    assert_eq!(at(&binary, "events.by_kind"), at(&text, "events.by_kind"));
    assert_eq!(at(&binary, "recording.cpus"), at(&text, "recording.cpus"));
}

#[test]
fn damage_is_named() {
    let path = cut("damaged.mdr");
    let good = fs::read(&path).unwrap();
    let says = |bytes: &[u8], what: &str| {
        fs::write(&path, bytes).unwrap();
        let output = memdesc(&["replay", path.to_str().unwrap()]);
        assert_eq!(output.status.code(), Some(2), "{}", stdout(&output));
        let said = stderr(&output);
        assert!(
            said.contains(what) && said.contains("damaged.mdr"),
            "{said}"
        );
    };
    says(&good[..good.len() - 1], "breaks off at byte");
    let mut flipped = good.clone();
    flipped[1000] ^= 1;
    says(&flipped, "damaged: the body");
    let mut later = good;
    later[8] = 2;
    says(&later, "version 2");
}

#[test]
fn a_cut_goes_somewhere() {
    let built_in = concat!(env!("CARGO_MANIFEST_DIR"), "/recordings/build");
    let output = memdesc(&["cut", built_in, "--events", "10"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("--out"), "{}", stderr(&output));
}
