//! `memdesc bench rcu`, in short: the figures mean nothing here, but that all that is given up is freed.
#![allow(missing_docs)]

use std::process::{Command, Output};

fn bench(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_memdesc"));
    command.args(["bench", "rcu"]).args(args).output().unwrap()
}

#[test]
fn every_scheme_frees_all() {
    let out = bench(&[
        "--objects",
        "20000",
        "--rounds",
        "2",
        "--threads",
        "1,2",
        "--json",
    ]);
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{said}");
    let result: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    let rows = result["rows"].as_array().unwrap();
    let missing = result["missing"].as_array().unwrap();
    assert_eq!(rows.len() + 2 * missing.len(), 18);
    for row in rows {
        assert_eq!(row["all_freed"], true, "{row}");
        assert!(row["ns_per_object"].as_f64().unwrap() > 0.0, "{row}");
        let defers = !row["name"].as_str().unwrap().contains("floor");
        assert!(
            !defers || row["peak_backlog"].as_u64().unwrap() > 0,
            "{row}"
        );
    }
}

#[test]
fn a_scheme_that_is_none() {
    let out = bench(&["--only", "epoch"]);
    assert_eq!(out.status.code(), Some(2));
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(said.contains("crossbeam-epoch, seize"), "{said}");
}

#[test]
fn the_table_lines_up() {
    let out = bench(&[
        "--objects",
        "2000",
        "--rounds",
        "1",
        "--threads",
        "1",
        "--only",
        "memdesc kvfree_rcu",
    ]);
    let text = String::from_utf8_lossy(&out.stdout);
    let rows: Vec<_> = text.lines().filter(|l| l.starts_with("memdesc ")).collect();
    assert_eq!(rows.len(), 2, "{text}");
    assert_eq!(rows[0].len(), rows[1].len(), "{text}");
}
