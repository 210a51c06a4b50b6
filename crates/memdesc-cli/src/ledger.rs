//! What metadata costs, a page, for memory that is all of one kind.

use memdesc::gfp::{GFP_HIGHUSER_MOVABLE, GFP_KERNEL};
use memdesc::{MemRange, PAGE_SIZE, PageType, PhysAddr};
use serde_json::json;

use crate::cli;
use crate::error::Error;
use crate::handles::{Machine, Purpose};
use crate::output;
use crate::replay::mix;
use crate::report::picture;

const STRUCT_PAGE: f64 = 64.0;

/// A way to fill memory, and what it may cost.
struct Fill {
    key: &'static str,
    name: &'static str,
    kind: Kind,
    /// Bytes a page at most, where DESIGN.md says so.
    limit: Option<f64>,
}

enum Kind {
    Nothing,
    Pages(Purpose, usize),
    Objects(usize),
}

const FILLS: [Fill; 9] = [
    Fill {
        key: "empty",
        name: "nothing",
        kind: Kind::Nothing,
        limit: None,
    },
    Fill {
        key: "folios",
        name: "every page a folio",
        kind: Kind::Pages(Purpose::Anon, 0),
        limit: Some(56.0),
    },
    Fill {
        key: "bare",
        name: "bare single pages",
        kind: Kind::Pages(Purpose::Bare, 0),
        limit: Some(24.0),
    },
    Fill {
        key: "page_tables",
        name: "page tables",
        kind: Kind::Pages(Purpose::PageTable, 0),
        limit: Some(STRUCT_PAGE),
    },
    Fill {
        key: "folios_order_2",
        name: "folios of 16 KiB",
        kind: Kind::Pages(Purpose::File, 2),
        limit: Some(STRUCT_PAGE),
    },
    Fill {
        key: "folios_order_9",
        name: "folios of 2 MiB",
        kind: Kind::Pages(Purpose::Anon, 9),
        limit: Some(STRUCT_PAGE),
    },
    Fill {
        key: "kmalloc_64",
        name: "objects of 64 B",
        kind: Kind::Objects(64),
        limit: Some(STRUCT_PAGE),
    },
    Fill {
        key: "kmalloc_256",
        name: "objects of 256 B",
        kind: Kind::Objects(256),
        limit: Some(STRUCT_PAGE),
    },
    Fill {
        key: "kmalloc_4096",
        name: "objects of 4 KiB",
        kind: Kind::Objects(4096),
        limit: Some(STRUCT_PAGE),
    },
];

/// What a fill came to.
struct Cost {
    /// Bytes of metadata, a page of RAM, over the whole machine.
    bytes_per_page: f64,
    percent: f64,
    /// What a plain reading of the seeds costs for the same blocks, a page.
    plain: f64,
    pages: u64,
    balanced: bool,
}

impl Fill {
    fn is_within(&self, cost: &Cost) -> bool {
        cost.balanced && self.limit.is_none_or(|limit| cost.bytes_per_page <= limit)
    }

    fn measure(&self, bytes: u64) -> Result<Cost, Error> {
        let ranges = [MemRange {
            start: PhysAddr(0),
            end: PhysAddr(bytes & !4095),
            node: 0,
        }];
        let machine = Machine::new(&ranges, 1).map_err(|source| Error::Machine {
            name: "ledger".into(),
            mib: bytes >> 20,
            cpus: 1,
            source,
        })?;
        let Some(_cpu) = machine.mm.platform().claim(0) else {
            return Err(Error::Usage("no CPU could be claimed".into()));
        };
        // Nothing is given back: the machine ends with this, and nobody looks into its memory.
        match self.kind {
            Kind::Nothing => {}
            Kind::Pages(purpose, order) => {
                let gfp = match purpose {
                    Purpose::Anon | Purpose::File => GFP_HIGHUSER_MOVABLE,
                    _ => GFP_KERNEL,
                };
                while machine.alloc(purpose, gfp, order).is_ok() {}
            }
            Kind::Objects(size) => while machine.kmalloc(size, GFP_KERNEL).is_ok() {},
        }
        let ledger = machine.mm.ledger();
        let (mix, _) = mix::survey(&machine, &ledger);
        let handed_out = PageType::ALL
            .iter()
            .filter(|&&kind| kind != PageType::Reserved)
            .map(|&kind| ledger.by_type[kind as usize])
            .sum();
        Ok(Cost {
            bytes_per_page: ledger.metadata_bytes() as f64 / ledger.given as f64,
            percent: ledger.percent(),
            plain: mix.plain_seeds_bytes() as f64 / ledger.given as f64,
            pages: handed_out,
            balanced: ledger.balanced,
        })
    }
}

/// Measures all of them. 1 if one costs too much.
pub(crate) fn run(args: &cli::LedgerArgs) -> Result<u8, Error> {
    let mut text = format!(
        "Metadata in bytes for each page of RAM, of {} MiB filled to the last page\n\n{:<22}{:>10}{:>10}{:>8}{:>14}{:>13}\n",
        args.memory >> 20,
        "",
        "memdesc",
        "%",
        "limit",
        "struct page",
        "plain seeds"
    );
    let mut rows = serde_json::Map::new();
    let mut all_within = true;
    for fill in FILLS {
        let cost = fill.measure(args.memory)?;
        let within = fill.is_within(&cost);
        all_within &= within;
        let limit = fill.limit.map_or(String::new(), |l| format!("{l:.0}"));
        text += &format!(
            "{:<22}{:>10.3}{:>10.4}{limit:>8}{STRUCT_PAGE:>14.0}{:>13.1}   {:<12}{}\n",
            fill.name,
            cost.bytes_per_page,
            cost.percent,
            cost.plain,
            picture::bar(cost.bytes_per_page / STRUCT_PAGE, 12),
            match within {
                false => "TOO MUCH",
                true if cost.bytes_per_page > STRUCT_PAGE => "more than struct page",
                true => "",
            },
        );
        let row = json!({
            "bytes_per_page": cost.bytes_per_page, "percent": cost.percent, "limit": fill.limit,
            "plain_seeds_bytes_per_page": cost.plain, "struct_page_bytes_per_page": STRUCT_PAGE,
            "pages_handed_out": cost.pages, "balanced": cost.balanced, "within": within,
        });
        rows.insert(fill.key.into(), row);
    }
    if args.json {
        let object = json!({ "ram_bytes": args.memory & !(PAGE_SIZE as u64 - 1), "fills": rows, "within": all_within });
        output::print(&format!("{object:#}\n"));
    } else {
        output::print(&text);
    }
    Ok(u8::from(!all_within))
}
