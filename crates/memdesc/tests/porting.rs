//! `docs/porting.md` and the traits that it is about say the same: each method has a section, each section a method, and a default where the document says so.

use std::collections::BTreeMap;

const DOC: &str = include_str!("../../../docs/porting.md");

/// The traits, and where they are.
const TRAITS: [(&str, &str); 3] = [
    ("Platform", include_str!("../src/platform.rs")),
    ("Cpus", include_str!("../src/rcu/cpus.rs")),
    ("Rcu", include_str!("../src/rcu/mod.rs")),
];

/// What each section says, in this order.
const ITEMS: [&str; 5] = ["Holds", "Called", "Default", "Linux", "Wrong"];

/// The methods of a trait, and whether they have a default. From the source as rustfmt leaves it: items of a trait are indented by four.
fn methods(source: &'static str, name: &str) -> BTreeMap<&'static str, bool> {
    let head = format!("pub unsafe trait {name}:");
    let start = source.find(&head).expect("the trait is there");
    let body = &source[start..];
    let body = &body[..body.find("\n}\n").expect("it ends")];
    let mut found = BTreeMap::new();
    let mut lines = body.lines();
    while let Some(line) = lines.next() {
        let Some(item) = line.strip_prefix("    ").filter(|l| !l.starts_with(' ')) else {
            continue;
        };
        let item = item.strip_prefix("unsafe ").unwrap_or(item);
        let Some(rest) = item.strip_prefix("fn ") else {
            continue;
        };
        let name = &rest[..rest.find(['(', '<']).expect("a name")];
        // The signature may be longer than a line.
        let mut end = line;
        while !end.ends_with([';', '{', '}']) {
            end = lines.next().expect("a signature ends");
        }
        found.insert(name, !end.ends_with(';'));
    }
    found
}

/// The sections about a trait: what follows each `###` under its `##`.
fn sections(name: &str) -> BTreeMap<&'static str, &'static str> {
    let head = format!("\n## `{name}`, method by method\n");
    let start = DOC.find(&head).expect("the document has a part about it") + head.len();
    let part = &DOC[start..];
    let part = &part[..part.find("\n## ").expect("more follows")];
    let mut found = BTreeMap::new();
    for section in part.split("\n### ").skip(1) {
        let (title, text) = section.split_once('\n').expect("a title has a text");
        let method = title
            .strip_prefix('`')
            .and_then(|t| t.strip_suffix('`'))
            .unwrap_or_else(|| panic!("{title:?} is not the name of a method"));
        let again = found.insert(method, text);
        assert!(again.is_none(), "{name}::{method} has two sections");
    }
    found
}

#[test]
fn every_method_has_a_section_and_every_section_a_method() {
    for (name, source) in TRAITS {
        let (methods, sections) = (methods(source, name), sections(name));
        let of = |map: Vec<&'static str>| map;
        assert_eq!(
            of(methods.keys().copied().collect()),
            of(sections.keys().copied().collect()),
            "methods of {name}, and sections about them"
        );
        for (method, text) in sections {
            let items: Vec<&str> = text.lines().filter(|line| line.starts_with("- ")).collect();
            assert_eq!(items.len(), ITEMS.len(), "{name}::{method}");
            for (item, what) in items.iter().zip(ITEMS) {
                let start = format!("- *{what}.* ");
                let said = item.strip_prefix(&start);
                let said = said.unwrap_or_else(|| panic!("{name}::{method}: {start:?} is missing"));
                assert!(said.len() > 3, "{name}::{method} says nothing of {what:?}");
                if what == "Default" {
                    assert_eq!(
                        said != "None.",
                        methods[method],
                        "{name}::{method}: has it a default?"
                    );
                }
            }
        }
    }
}

/// The scan sees what there is to see: nothing of a trait is skipped because it is written in another way.
#[test]
fn the_scan_sees_all_methods() {
    for (name, source) in TRAITS {
        let start = source.find(&format!("pub unsafe trait {name}:")).unwrap();
        let body = &source[start..];
        let body = &body[..body.find("\n}\n").unwrap()];
        let all = body
            .lines()
            .filter(|l| !l.trim_start().starts_with("//"))
            .map(|l| l.matches("fn ").count())
            .sum::<usize>();
        assert_eq!(methods(source, name).len(), all, "{name}");
    }
    assert!(!methods(TRAITS[0].1, "Platform")["pin"]);
    assert!(methods(TRAITS[0].1, "Platform")["vmap"]);
}

/// Names of functions in the text that are not headings: tests and files of the image, and the memory manager's calls.
#[test]
fn what_the_document_points_to_is_there() {
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");
    for (path, _) in DOC
        .match_indices("`crates/")
        .chain(DOC.match_indices("`examples/"))
        .chain(DOC.match_indices("`docs/"))
    {
        let path = &DOC[path + 1..];
        let path = &path[..path.find('`').unwrap()];
        let there = std::path::Path::new(root).join(path).exists();
        assert!(there, "{path} is not there");
    }
    let tests = [
        "barriers_reach_all_cpus",
        "an_nmi_leaves_pins_alone",
        "all_memory_can_be_had",
        "nothing_is_left",
        "nmi_storm",
        "interrupts_allocate",
    ];
    let list = include_str!("../../memdesc-metal/src/tests/mod.rs");
    for test in tests {
        assert!(
            DOC.contains(test) && list.contains(&format!("::{test}")),
            "{test}"
        );
    }
    assert!(!DOC.contains("```rust,"), "all code runs");
    assert!(DOC.contains("```rust\n"));
}
