//! What metadata costs, a page, for memory that is all of one kind.

use memdesc::gfp::{GFP_HIGHUSER_MOVABLE, GFP_KERNEL};
use memdesc::mmap::{Map, MmStruct, VmFlags};
use memdesc::{FolioKind, MemRange, PAGE_SIZE, PageType, PhysAddr};
use memdesc_host::Host;
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
    /// Anonymous folios of a page, each mapped by an address space.
    Mapped,
    /// File folios of all sizes, as Linux had them.
    Mix,
    Objects(usize),
}

/// How many of 10 000 file folios were of each order on the machine of the recordings, after a `cargo build`: 1.69 pages each.
const LINUX_MIX: [u64; 10] = [9326, 280, 146, 204, 20, 11, 7, 0, 0, 5];

const FILLS: [Fill; 11] = [
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
        limit: Some(48.0),
    },
    Fill {
        key: "mapped",
        name: "every page mapped",
        kind: Kind::Mapped,
        limit: Some(48.0),
    },
    Fill {
        key: "linux_mix",
        name: "files as Linux has them",
        kind: Kind::Mix,
        limit: Some(48.0),
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
                while machine.handles().alloc(purpose, gfp, order).is_ok() {}
            }
            Kind::Mix => fill_with_mix(&machine),
            Kind::Mapped => {
                // Not given back either, as all else here.
                core::mem::forget(fill_mapped(&machine)?);
            }
            Kind::Objects(size) => while machine.handles().kmalloc(size, GFP_KERNEL).is_ok() {},
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

/// Folios of all orders in Linux's proportions, the same ones every time.
fn fill_with_mix(machine: &Machine) {
    let mut state = 1u64;
    loop {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        let mut left = (state >> 33) % LINUX_MIX.iter().sum::<u64>();
        let order = LINUX_MIX.iter().position(|&n| {
            let here = left < n;
            left = left.saturating_sub(n);
            here
        });
        let order = order.unwrap_or(0);
        let large = machine
            .handles()
            .alloc(Purpose::File, GFP_HIGHUSER_MOVABLE, order);
        if large.is_err()
            && machine
                .handles()
                .alloc(Purpose::File, GFP_HIGHUSER_MOVABLE, 0)
                .is_err()
        {
            return;
        }
    }
}

/// One address space that maps all of memory, page by page; nothing is touched but its tables.
fn fill_mapped(machine: &Machine) -> Result<MmStruct<'_, Host>, Error> {
    let mm = &machine.mm;
    let space = MmStruct::new(mm, 1).map_err(Error::Alloc)?;
    let bytes = mm.ledger().given * PAGE_SIZE as u64;
    let start = space
        .mmap(None, bytes, VmFlags::READ_WRITE, Map::Anon)
        .map_err(Error::Alloc)?;
    for at in (start..start + bytes).step_by(PAGE_SIZE) {
        let Ok(page) = mm.alloc_folio(GFP_HIGHUSER_MOVABLE, 0, FolioKind::Anon) else {
            break;
        };
        let mapped = space.insert_page(at, page);
        // SAFETY: ours; from now on its mapping keeps it, if there is one.
        unsafe { mm.free_pages(page) };
        if mapped.is_err() {
            break;
        }
    }
    Ok(space)
}

/// Measures all of them. 1 if one costs too much.
pub(crate) fn run(args: &cli::LedgerArgs) -> Result<u8, Error> {
    let mut text = format!(
        "Metadata in bytes for each page of RAM, of {} MiB filled to the last page\n\n{:<24}{:>10}{:>10}{:>8}{:>14}{:>13}\n",
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
            "{:<24}{:>10.3}{:>10.4}{limit:>8}{STRUCT_PAGE:>14.0}{:>13.1}   {:<12}{}\n",
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
    let ram_bytes = args.memory & !(PAGE_SIZE as u64 - 1);
    let object = || json!({ "ram_bytes": ram_bytes, "fills": rows, "within": all_within });
    output::print_found(args.json, object, || text);
    Ok(u8::from(!all_within))
}
