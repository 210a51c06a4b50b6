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
    for (least, size) in CLASSES
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
    let mut name = [0; 32];
    let view = reserve.view(&mut name);
    kept.into_iter().for_each(|ptr| kfree(mm, ptr));
    reserve.disconnect().unwrap();
    assert!(reserve.destroy().is_ok());
    (view.max_taken_pages, view.pages)
}

#[test]
fn the_bound_of_a_mix_is_nearly_reached_and_twice_the_bytes_is_not_enough() {
    let mm = boot();
    for row in table("## Any mix of sizes") {
        let number = |i: usize| row[i].replace(' ', "").parse::<usize>().unwrap();
        let (bytes, min, max) = (number(0), number(1), number(2));
        let (pinned, bound) = worst(&mm, bytes, min, max);
        let twice = 2 * bytes.div_ceil(PAGE_SIZE) as u64;
        let ratio = bound as f64 / pinned as f64;
        println!("| {bytes} | {min} | {max} | {twice} | {pinned} | {bound} | {ratio:.2} |");
        assert!(pinned <= bound);
        let said = [number(3), number(4), number(5)].map(|n| n as u64);
        assert_eq!(said, [twice, pinned, bound], "docs/reserves.md: {row:?}");
        assert_eq!(row[6], format!("{ratio:.2}"), "docs/reserves.md: {row:?}");
    }
}

/// The worked example: what a driver author sets up, and what it comes to.
#[test]
fn the_worked_example_is_what_it_says() {
    let mm = boot();
    let cache = mm
        .kmem_cache_create("skbuff_head", 232, 64, CacheFlags::EMPTY, None)
        .unwrap();
    let demands = [
        (
            "requests",
            Demand::KmallocObjects {
                size: 192,
                count: 64,
            },
        ),
        (
            "heads",
            Demand::Objects {
                cache: &cache,
                count: 320,
            },
        ),
        (
            "data",
            Demand::Kmalloc {
                bytes: 48 << 10,
                min: 64,
                max: 704,
            },
        ),
        (
            "frames",
            Demand::KmallocObjects {
                size: 2048,
                count: 64,
            },
        ),
        (
            "pages",
            Demand::Pages {
                order: 0,
                count: 32,
            },
        ),
    ];
    let rows = table("## A worked example");
    assert_eq!(rows.len(), demands.len() + 1);
    let group = mm.reserve("nbd0", Demand::None).unwrap();
    let (mut pages, mut bytes) = (0, 0);
    for ((name, demand), row) in demands.into_iter().zip(&rows) {
        let bound = mm.reserve_estimate(demand).unwrap();
        println!(
            "| {name} | | {} | {} |",
            bound.pages(),
            bound.descriptor_bytes
        );
        assert_eq!(row[0], format!("`{name}`"));
        assert_eq!(
            row[2],
            bound.pages().to_string(),
            "docs/reserves.md: {name}"
        );
        assert_eq!(
            row[3],
            bound.descriptor_bytes.to_string(),
            "docs/reserves.md: {name}"
        );
        (pages, bytes) = (pages + bound.pages(), bytes + bound.descriptor_bytes);
        mm.reserve(name, demand)
            .unwrap()
            .connect(Some(&group))
            .unwrap();
    }
    println!("| sum | | {pages} | {bytes} |");
    let sum = &rows[demands.len()];
    assert_eq!((&sum[2], &sum[3]), (&pages.to_string(), &bytes.to_string()));
    group.connect(None).unwrap();
    assert_eq!(mm.set_aside_pages(), pages);
}
