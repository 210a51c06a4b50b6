//! `memdesc storm`, in short.
#![allow(missing_docs)]

use std::process::{Command, Output};

fn storm(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_memdesc"));
    command.arg("storm").args(args).output().unwrap()
}

#[test]
fn a_short_storm_loses_nothing() {
    let out = storm(&["--seconds", "1", "--json"]);
    assert!(
        out.status.success(),
        "{}",
        String::from_utf8_lossy(&out.stderr)
    );
    let all: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    let all = all.as_array().unwrap();
    assert_eq!(all.len(), 3);
    for outcome in all {
        assert_eq!(outcome["corruptions"], 0);
        assert_eq!(outcome["lost_pages"], 0);
        assert_eq!(outcome["balanced"], true);
        assert!(outcome["interrupts"].as_u64().unwrap() > 1000, "{outcome}");
        for event in ["fast_pages", "try_pages", "try_objects", "nolock_free"] {
            let n = outcome["events"][event].as_u64().unwrap();
            assert!(n > 0, "{event}: {outcome}");
        }
    }
}

#[test]
fn a_configuration_that_is_none() {
    let out = storm(&["--config", "mp"]);
    assert_eq!(out.status.code(), Some(2));
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(said.contains("smp, up, rt"), "{said}");
}
