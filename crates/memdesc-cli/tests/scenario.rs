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
fn everything_at_once_for_a_moment() {
    for services in ["none", "default"] {
        let seen = json(&[
            "purposes",
            "--seconds",
            "3",
            "--mib",
            "64",
            "--services",
            services,
            "--json",
        ]);
        assert_eq!(seen["ok"], true, "{seen}");
        assert_eq!(
            (&seen["wrong"], &seen["lost_pages"]),
            (&0.into(), &0.into())
        );
        assert!(seen["checks"].as_u64().unwrap() > 1, "{seen}");
        for what in [
            "frees",
            "objects compressed",
            "pages and fragments of them",
            "drivers' pages mapped",
            "forks",
            "pages failed: recovered",
            "ranges off line",
            "balloon deflated",
            "groups come and gone",
        ] {
            assert!(seen["counts"][what].as_u64().unwrap() > 0, "{what}: {seen}");
        }
    }
    let out = scenario(&["purposes", "--services", "zeroes"]);
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(said.contains("is none of init_on_alloc"), "{said}");
    assert_eq!(out.status.code(), Some(2));
}

#[test]
fn a_spike_is_given_back() {
    for order in ["9", "6"] {
        let seen = json(&[
            "free-page-reporting",
            "--mib",
            "96",
            "--order",
            order,
            "--json",
        ]);
        let resident = |when: &str| seen["resident_bytes"][when].as_u64().unwrap();
        let (spike, freed, after) = (
            resident("at_the_spike"),
            resident("after_the_frees"),
            resident("after_reporting"),
        );
        assert!(resident("before") < 2 << 20, "{seen}");
        assert!(spike > 86 << 20, "{seen}");
        // Freeing alone gives nothing back.
        assert!(freed + (1 << 20) > spike, "{seen}");
        assert!(after <= seen["allowed_bytes"].as_u64().unwrap(), "{seen}");
        assert!(after * 2 < spike, "{seen}");
        assert!(seen["pages_reported"].as_u64().unwrap() * 4096 + (1 << 20) >= spike - after);
        assert_eq!(
            (&seen["wrong"], &seen["balanced"]),
            (&0.into(), &true.into())
        );
    }
}

#[test]
fn a_table_in_a_pipe() {
    let out = scenario(&["free-page-reporting", "--mib", "64"]);
    let text = String::from_utf8_lossy(&out.stdout);
    assert!(out.status.success(), "{text}");
    assert!(
        out.stderr.is_empty(),
        "{}",
        String::from_utf8_lossy(&out.stderr)
    );
    for row in [
        "before",
        "at the spike",
        "after the frees",
        "after reporting",
        "in use",
        "metadata",
        "per-CPU lists",
    ] {
        assert!(text.contains(row), "{text}");
    }
    let out = scenario(&["free-page-reporting", "--order", "11"]);
    assert_eq!(out.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&out.stderr).contains("order 11: 0 to 10"));
}

#[test]
fn a_scenario_that_is_none() {
    let out = scenario(&["page-table"]);
    assert_eq!(out.status.code(), Some(2));
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(said.contains("page-cache"), "{said}");
}

#[test]
fn compressed_pages_come_back() {
    let seen = json(&["zsmalloc", "--objects", "20000", "--json"]);
    assert_eq!(
        (&seen["wrong"], &seen["pages_left"], &seen["balanced"]),
        (&0.into(), &0.into(), &true.into()),
        "{seen}"
    );
    let number = |value: &serde_json::Value| value.as_f64().unwrap();
    let standing = |n: usize| &seen["standings"][n];
    for (n, objects) in [(0, 20_000), (1, 10_000), (2, 10_000)] {
        assert_eq!(standing(n)["objects"], objects, "{seen}");
    }
    // A half that is freed at random leaves its pages; compaction gives them back.
    assert!(number(&standing(1)["density"]) < 0.6 * number(&standing(0)["density"]));
    assert!(number(&standing(2)["density"]) > 0.9 * number(&standing(0)["density"]));
    assert!(number(&seen["compaction"]["pages_freed"]) > 100.0);
    for n in [0, 2] {
        let (here, linux) = (standing(n), &standing(n)["linux"]);
        // Of few objects a class's last zspage counts for more than what an object saves.
        assert!(
            number(&here["pages"]) < 1.02 * number(&linux["pages"]),
            "{here}"
        );
        assert!(number(&here["descriptor_bytes"]) < number(&linux["descriptor_bytes"]) / 2.0);
    }
    assert!(number(&seen["compressed_bytes"]) < 0.6 * number(&seen["bytes_in"]));
    // The same seed, the same bytes.
    let again = json(&["zsmalloc", "--objects", "20000", "--json"]);
    assert_eq!(seen["standings"], again["standings"]);
}

#[test]
fn compressed_pages_in_words() {
    let out = scenario(&["zsmalloc", "--objects", "2000", "--seed", "7"]);
    assert!(out.status.success());
    // Nothing but the report: there is no terminal.
    assert!(out.stderr.is_empty());
    let said = String::from_utf8(out.stdout).unwrap();
    for word in [
        "Linux 6.18",
        "density",
        "compacted: 1000 objects",
        "kmalloc",
        "ledger balanced",
    ] {
        assert!(said.contains(word), "{said}");
    }
    assert_eq!(
        scenario(&["zsmalloc", "--objects", "5"]).status.code(),
        Some(2)
    );
}

/// Little is left under the marks, so that some of a few machines lock up.
const LITTLE: [&str; 2] = ["--min-free-kbytes", "128"];

#[test]
fn swap_over_a_network_needs_reserves() {
    let seen = json(&["swap-net", "--seeds", "24", "--json", LITTLE[0], LITTLE[1]]);
    let modes = &seen["modes"];
    for (name, mode) in modes.as_object().unwrap() {
        let n = |what: &str| mode[what].as_u64().unwrap();
        assert_eq!(n("machines"), 24, "{name}");
        assert_eq!(n("finished") + n("locked_up"), 24, "{name}");
        // Also after a machine came to a stop.
        for what in ["wrong", "unbalanced", "lost"] {
            assert_eq!(n(what), 0, "{name}: {mode}");
        }
        for what in [
            "swap_outs",
            "swap_ins",
            "retransmits",
            "lost",
            "duplicated",
            "reordered",
            "dropped_after_the_look",
        ] {
            let count = mode["counts"][what].as_u64().unwrap();
            assert!(count > 0, "{name}, {what}: {mode}");
        }
    }
    let refused = |mode: &str, sites: &[&str]| {
        let asked = modes[mode]["memory"].as_object().unwrap().iter();
        let asked = asked.filter(|(site, _)| sites.iter().any(|of| site.contains(of)));
        asked
            .map(|(_, asked)| asked["refused"].as_u64().unwrap())
            .sum::<u64>()
    };
    assert!(modes["nothing"]["locked_up"].as_u64().unwrap() > 0);
    assert!(refused("nothing", &["head"]) > 0);
    // What has a fixed size is always there, and what has none is not.
    assert_eq!(refused("mempools", &["head", "page", "fragment"]), 0);
    assert!(refused("mempools", &["data"]) > 0);
    assert_eq!(modes["reserves"]["locked_up"], 0);
    assert_eq!(refused("reserves", &[""]), 0);
    let nodes = modes["reserves"]["reserves"].as_array().unwrap();
    assert_eq!(nodes.len(), 10);
    for node in nodes {
        let n = |what: &str| node[what].as_u64().unwrap();
        assert!(n("max_usage") > 0, "{node}");
        assert!(n("max_usage") <= n("limit"), "{node}");
        assert!(n("max_taken_pages") <= n("pages"), "{node}");
        assert_eq!((n("usage"), n("refusals")), (0, 0), "{node}");
    }
}

#[test]
fn a_locked_up_machine_locks_up_again() {
    let run = |args: &[&str]| {
        let args = [&["swap-net", "--with", "nothing", "--json"], args, &LITTLE].concat();
        let mut seen = json(&args);
        let mode = &mut seen["modes"]["nothing"];
        mode["seconds"] = 0.into();
        mode.clone()
    };
    let all = run(&["--seeds", "24"]);
    let seed = all["locked_up_seeds"][0].as_u64().unwrap().to_string();
    let alone = run(&["--seed", &seed]);
    assert_eq!(alone["locked_up"], 1, "{alone}");
    assert_eq!(run(&["--seed", &seed]), alone);
    // However long one waits.
    let later = run(&["--seed", &seed, "--patience", "30"]);
    assert_eq!(later["locked_up"], 1, "{later}");
    for what in ["swap_ins", "touches"] {
        assert_eq!(later["counts"][what], alone["counts"][what], "{what}");
    }
    let args = ["swap-net", "--seed", &seed, "--with", "nothing"];
    let out = scenario(&[&args[..], &LITTLE].concat());
    let text = String::from_utf8_lossy(&out.stdout);
    for said in [
        "LOCKED UP",
        "like this",
        "under the min mark",
        "receive: head",
    ] {
        assert!(text.contains(said), "{text}");
    }
}

#[test]
fn swap_over_a_network_in_a_pipe() {
    let out = scenario(&["swap-net", "--seeds", "2"]);
    let text = String::from_utf8_lossy(&out.stdout);
    assert!(out.status.success(), "{text}");
    assert!(
        out.stderr.is_empty(),
        "{}",
        String::from_utf8_lossy(&out.stderr)
    );
    for row in [
        "nothing",
        "mempools",
        "reserves",
        "swap outs",
        "the tree of reserves",
        "receive buffers",
    ] {
        assert!(text.contains(row), "{text}");
    }
    for wrong in [
        &["swap-net", "--mib", "8"][..],
        &["swap-net", "--seeds", "0"],
        &["swap-net", "--seed", "1", "--seeds", "2"],
        &["swap-net", "--with", "hope"],
    ] {
        assert_eq!(scenario(wrong).status.code(), Some(2), "{wrong:?}");
    }
}
