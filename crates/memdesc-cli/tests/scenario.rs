//! `memdesc scenario`, in short.
#![allow(missing_docs)]

use std::process::{Command, Output};

fn scenario(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_memdesc"));
    command.arg("scenario").args(args).output().unwrap()
}

fn json(args: &[&str]) -> serde_json::Value {
    let out = scenario(args);
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{said}");
    serde_json::from_slice(&out.stdout).unwrap()
}

#[test]
fn memory_full_of_files_makes_room() {
    let seen = json(&["page-cache", "--memory", "96", "--json"]);
    for kind in ["anonymous", "reads", "atomic", "order_3"] {
        assert_eq!(seen[kind]["failed"], 0, "{seen}");
        assert!(seen[kind]["served"].as_u64().unwrap() > 100, "{seen}");
    }
    assert_eq!(
        (&seen["wrong"], &seen["lost_pages"]),
        (&0.into(), &0.into())
    );
    // Nearly all of memory was file pages, and as many as anonymous memory needed went.
    assert!(seen["file_pages_after_fill"].as_u64().unwrap() > 20_000);
    assert!(seen["reclaimed_pages"].as_u64().unwrap() > 18_000);
}

#[test]
fn address_spaces_for_a_moment() {
    let seen = json(&["address-spaces", "--seconds", "3", "--json"]);
    assert!(seen["disagrees"].is_null(), "{seen}");
    assert_eq!(seen["references_left"], 0);
    assert_eq!(
        (&seen["wrong"], &seen["lost_pages"]),
        (&0.into(), &0.into())
    );
    assert_eq!(seen["balanced"], true);
    assert!(seen["faults_injected"].as_u64().unwrap() > 0);
    for what in [
        "loads",
        "forks",
        "folios moved",
        "folios split",
        "ranges cleared",
        "pgsteal",
    ] {
        assert!(seen["counts"][what].as_u64().unwrap() > 0, "{what}: {seen}");
    }
}

#[test]
fn a_scenario_that_is_none() {
    let out = scenario(&["page-table"]);
    assert_eq!(out.status.code(), Some(2));
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(said.contains("page-cache"), "{said}");
}
