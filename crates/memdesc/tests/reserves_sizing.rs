//! `docs/reserves.md`, "How to size a reserve": its numbers are those that come out here, and its claims about what is enough and what is not are tried.
#![allow(missing_docs)]

mod common;

use common::*;
use memdesc::gfp::*;
use memdesc::*;
use memdesc_host::Host;

const DOC: &str = include_str!("../../../docs/reserves.md");

fn boot() -> Mm<Host> {
    Machine::flat(8192).unsampled().boot()
}

/// The rows of the first table of a section: cells, trimmed, without the head.
fn table(section: &str) -> Vec<Vec<String>> {
    let (_, rest) = DOC.split_once(section).expect("there is such a section");
    let lines = rest.lines().skip_while(|line| !line.starts_with('|'));
    let rows = lines.take_while(|line| line.starts_with('|')).skip(2);
    let cells = |row: &str| {
        row.trim_matches('|')
            .split('|')
            .map(|c| c.trim().to_owned())
            .collect()
    };
    rows.map(cells).collect()
}

/// The least that a class of kmalloc is asked for, and its size.
const CLASSES: [(usize, usize); 13] = [
    (1, 8),
    (9, 16),
    (17, 32),
    (33, 64),
    (65, 96),
    (97, 128),
    (129, 192),
    (193, 256),
    (257, 512),
    (513, 1024),
    (1025, 2048),
    (2049, 4096),
    (4097, 8192),
];

/// The worst that a user may do within so many bytes, as far as we know: all of the bytes in objects of the smallest class, then one object kept a page, the rest
/// in the next, and so on. Says how many pages he pinned, and the bound.
fn worst(mm: &Mm<Host>, bytes: usize, min: usize, max: usize) -> (u64, u64) {
    let reserve = mm
        .reserve("mix", Demand::Kmalloc { bytes, min, max })
        .unwrap();
    reserve.connect(None).unwrap();
    let host = mm.platform();
    // Nothing ordinary is to be had.
    host.faults().fail_one_in(1, 0);
    let (mut kept, mut left) = (Vec::new(), bytes);
    for (least, _) in CLASSES
        .into_iter()
        .filter(|&(least, size)| least <= max && size >= min)
    {
        let asked = least.max(min);
        let mut pages = std::collections::BTreeMap::new();
        while left >= asked {
            let ptr = reserve
                .kmalloc(asked, GFP_ATOMIC)
                .expect("within the charge");
            let page = mm.virt_to_pfn(ptr.as_ptr());
            pages.entry(page).or_insert_with(Vec::new).push(ptr);
            left -= asked;
        }
        for objects in pages.into_values() {
            let (first, rest) = objects.split_first().unwrap();
            kept.push(*first);
            rest.iter().for_each(|&ptr| kfree(mm, ptr));
            left += asked * rest.len();
        }
    }
    host.faults().off();
    let view = reserve.view();
    kept.into_iter().for_each(|ptr| kfree(mm, ptr));
    reserve.disconnect().unwrap();
    assert!(reserve.destroy().is_ok());
    (view.max_taken_pages, view.pages)
}

/// The document's rows have to be these.
fn said(section: &str, rows: &[String]) {
    let there: Vec<String> = table(section)
        .iter()
        .map(|cells| format!("| {} |", cells.join(" | ")))
        .collect();
    let rows_text = rows.join("\n");
    assert!(
        there == rows,
        "docs/reserves.md, {section}: the table should say\n{rows_text}"
    );
}

#[test]
fn the_bound_of_a_mix_is_nearly_reached_and_twice_the_bytes_is_not_enough() {
    let mm = boot();
    let rows = table("## Any mix of sizes").into_iter().map(|row| {
        let [bytes, min, max] = [0, 1, 2].map(|i: usize| row[i].parse().unwrap());
        let (pinned, bound) = worst(&mm, bytes, min, max);
        let twice = 2 * bytes.div_ceil(PAGE_SIZE) as u64;
        assert!(twice < pinned && pinned <= bound);
        let ratio = bound as f64 / pinned as f64;
        format!("| {bytes} | {min} | {max} | {twice} | {pinned} | {bound} | {ratio:.2} |")
    });
    let rows: Vec<String> = rows.collect();
    said("## Any mix of sizes", &rows);
}

/// The worked example: what a driver author sets up, and what it comes to.
#[test]
fn the_worked_example_is_what_it_says() {
    let mm = boot();
    let cache = mm
        .kmem_cache_create("skbuff_head", 232, 64, CacheFlags::EMPTY, None)
        .unwrap();
    let objects = |size, count| Demand::KmallocObjects { size, count };
    let demands = [
        ("requests", "64 objects of 192 bytes", objects(192, 64)),
        (
            "heads",
            "320 objects of the cache",
            Demand::Objects {
                cache: &cache,
                count: 320,
            },
        ),
        (
            "data",
            "48 KiB in 64 to 704 bytes",
            Demand::Kmalloc {
                bytes: 48 << 10,
                min: 64,
                max: 704,
            },
        ),
        ("frames", "64 objects of 2048 bytes", objects(2048, 64)),
        (
            "frags",
            "32 pages",
            Demand::Pages {
                order: 0,
                count: 32,
            },
        ),
    ];
    let group = mm.reserve("nbd0", Demand::None).unwrap();
    let (mut pages, mut bytes, mut rows) = (0, 0, Vec::new());
    for (name, what, demand) in demands {
        let bound = mm.reserve_estimate(demand).unwrap();
        let (n, more) = (bound.pages(), bound.descriptor_bytes);
        rows.push(format!("| `{name}` | {what} | {n} | {more} |"));
        (pages, bytes) = (pages + n, bytes + more);
        let child = mm.reserve(name, demand).unwrap();
        child.connect(Some(&group)).unwrap();
    }
    rows.push(format!("| `nbd0` | the sum | {pages} | {bytes} |"));
    said("## A worked example", &rows);
    group.connect(None).unwrap();
    assert_eq!(mm.set_aside_pages(), pages);
}
