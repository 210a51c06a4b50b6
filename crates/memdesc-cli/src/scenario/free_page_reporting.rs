//! A spike of memory, and what is left of it in the process: free page reporting has to give the rest back to the system.
//!
//! Most of memory is filled with folios and objects, every byte of them written; then all but a tenth is freed, and a page here and there that
//! stays keeps its neighbours from becoming large blocks again. Ticks go by, free blocks are reported, and what is resident has to fall to what
//! is in use and what is too small to be reported.

use std::fmt::Write as _;
use std::ptr::NonNull;
use std::time::Instant;

use memdesc::gfp::{__GFP_NORETRY, GFP_HIGHUSER_MOVABLE, GFP_KERNEL};
use memdesc::{Config, Event, FolioKind, Mm, PAGE_SIZE, Pfn, ZoneView};
use memdesc_host::{Host, ram};
use serde_json::json;

use crate::cli::FreePageReportingArgs;
use crate::error::Error;
use crate::rng::Rng;
use crate::{output, progress};

const SECOND: u64 = 1_000_000_000;
/// Seconds of the machine's own time that go by after the frees.
const TICKS: u64 = 10;
/// Of so many folios and objects of the spike one stays as it lies, whatever is freed round it.
const STRAGGLERS: usize = 8192;

/// What was seen. Resident numbers are bytes, all others pages.
#[derive(Default)]
struct Seen {
    pages: u64,
    order: usize,
    folios: u64,
    objects: u64,
    before: u64,
    spike: u64,
    freed: u64,
    reported: u64,
    in_use: u64,
    metadata: u64,
    small: u64,
    pcp: u64,
    pages_reported: u64,
    batches: u64,
    wrong: u64,
    balanced: bool,
    seconds: f64,
}

impl Seen {
    /// What may be resident in the end.
    fn allowed(&self) -> u64 {
        (self.in_use + self.metadata + self.small + self.pcp) * PAGE_SIZE as u64
    }

    fn ok(&self) -> bool {
        self.reported <= self.allowed() && self.wrong == 0 && self.balanced
    }
}

/// A block of the spike, and what it was filled with.
enum Block {
    Folio(Pfn, usize),
    Object(NonNull<u8>, usize),
}

/// Runs it; the exit code.
pub(crate) fn run(args: &FreePageReportingArgs) -> Result<u8, Error> {
    let seen = scenario(args)?;
    output::print_found(args.run.json, || object(&seen), || report(&seen));
    Ok(u8::from(!seen.ok()))
}

fn scenario(args: &FreePageReportingArgs) -> Result<Seen, Error> {
    let start = Instant::now();
    let pages = args.mib << 8;
    let ranges = [ram(0, pages)];
    let host = Host::builder().memory(&ranges).build();
    let config = Config {
        memory_is_zeroed: true,
        page_reporting: true,
        page_reporting_order: args.order,
        ..Config::default()
    };
    let mm = Mm::new(host.map_err(Error::Host)?, &config, &ranges).map_err(Error::Init)?;
    let mut now = SECOND;
    let mut tick = || {
        now += SECOND;
        mm.platform().set_clock(now);
        mm.tick();
    };
    tick();
    let mut seen = Seen {
        pages: u64::from(pages),
        order: args.order,
        before: mm.platform().resident_bytes(),
        ..Seen::default()
    };
    let blocks = spike(&mm, args, &mut seen);
    seen.spike = mm.platform().resident_bytes();
    let kept = free_most(&mm, blocks, args, &mut seen);
    seen.freed = mm.platform().resident_bytes();
    // What a CPU keeps in its lists, pages from all over memory, keeps their neighbours from merging. An idle one gives it back.
    mm.drain_all();
    let bar = progress::share(args.run.quiet, "reporting");
    for second in 0..TICKS {
        tick();
        bar.set_position(second * 1000 / TICKS);
    }
    bar.finish_and_clear();
    seen.reported = mm.platform().resident_bytes();
    seen.pages_reported = mm.event(Event::PgReported);
    seen.batches = mm.event(Event::ReportBatch);
    let ledger = mm.ledger();
    seen.balanced = ledger.balanced;
    seen.in_use = ledger.by_type.iter().sum();
    seen.metadata = ledger.metadata;
    seen.pcp = ledger.pcp;
    mm.zoneinfo(|zone| seen.small += small(&zone, args.order));
    // What stayed is what it was; what was reported can be used again.
    for (block, byte) in kept {
        seen.wrong += u64::from(!holds(&mm, &block, byte));
        give(&mm, block);
    }
    let blocks = spike(&mm, args, &mut Seen::default());
    for (block, byte) in blocks {
        seen.wrong += u64::from(!holds(&mm, &block, byte));
        give(&mm, block);
    }
    mm.shrink();
    seen.balanced &= mm.ledger().balanced;
    seen.seconds = start.elapsed().as_secs_f64();
    Ok(seen)
}

/// Free pages in blocks that are too small to be reported.
fn small(zone: &ZoneView, order: usize) -> u64 {
    let rows = zone.free_blocks.iter().take(order).enumerate();
    rows.map(|(order, row)| row.iter().sum::<u64>() << order)
        .sum()
}

/// Fills nine tenths of memory: folios of several sizes, and objects.
fn spike(mm: &Mm<Host>, args: &FreePageReportingArgs, seen: &mut Seen) -> Vec<(Block, u8)> {
    let bar = progress::share(args.run.quiet, "filling");
    let mut rng = Rng(args.run.seed);
    let mut blocks = Vec::new();
    let wanted = u64::from(args.mib) * 256 * 9 / 10;
    let mut bytes = 0;
    while bytes < wanted * PAGE_SIZE as u64 {
        let byte = rng.below_u64(255) as u8 + 1;
        let got = if rng.below_u64(8) == 0 {
            let size = 256 << rng.below_u64(4);
            seen.objects += 1;
            let object = mm.kmalloc(size, GFP_KERNEL | __GFP_NORETRY);
            object.map(|object| (Block::Object(object, size), size, object.as_ptr()))
        } else {
            let order = [0, 0, 2, 4][rng.below_u64(4) as usize];
            seen.folios += 1;
            let gfp = GFP_HIGHUSER_MOVABLE | __GFP_NORETRY;
            let folio = mm.alloc_folio(gfp, order, FolioKind::Anon);
            folio.map(|pfn| {
                let bytes = PAGE_SIZE << order;
                (Block::Folio(pfn, bytes), bytes, mm.page_address(pfn))
            })
        };
        let Ok((block, size, at)) = got else { break };
        // SAFETY: ours, of that size.
        unsafe { at.write_bytes(byte, size) };
        blocks.push((block, byte));
        bytes += size as u64;
        if blocks.len() % 1024 == 0 {
            bar.set_position(bytes * 1000 / (wanted * PAGE_SIZE as u64));
        }
    }
    bar.finish_and_clear();
    blocks
}

/// Frees all but the first tenth and a few stragglers, in a random order; gives what stays.
fn free_most(
    mm: &Mm<Host>,
    blocks: Vec<(Block, u8)>,
    args: &FreePageReportingArgs,
    seen: &mut Seen,
) -> Vec<(Block, u8)> {
    let bar = progress::share(args.run.quiet, "freeing");
    let mut rng = Rng(args.run.seed ^ 1);
    let stays = blocks.len() / 10;
    let mut kept = Vec::new();
    let mut others = Vec::new();
    for (index, block) in blocks.into_iter().enumerate() {
        if index < stays || index % STRAGGLERS == STRAGGLERS / 2 {
            kept.push(block);
        } else {
            others.push(block);
        }
    }
    let total = others.len() as u64;
    while !others.is_empty() {
        let index = rng.below_u64(others.len() as u64) as usize;
        let (block, byte) = others.swap_remove(index);
        seen.wrong += u64::from(!holds(mm, &block, byte));
        give(mm, block);
        if others.len() % 1024 == 0 {
            bar.set_position((total - others.len() as u64) * 1000 / total);
        }
    }
    bar.finish_and_clear();
    kept
}

fn holds(mm: &Mm<Host>, block: &Block, byte: u8) -> bool {
    let (at, len) = match *block {
        Block::Folio(pfn, len) => (mm.page_address(pfn), len),
        Block::Object(object, len) => (object.as_ptr(), len),
    };
    // SAFETY: ours, of that length, and written when we got it.
    let held = unsafe { std::slice::from_raw_parts(at, len) };
    held.iter().all(|&b| b == byte)
}

fn give(mm: &Mm<Host>, block: Block) {
    // SAFETY: ours, and not used again.
    unsafe {
        match block {
            Block::Folio(pfn, _) => mm.free_pages(pfn),
            Block::Object(object, _) => mm.kfree(object),
        }
    }
}

fn report(seen: &Seen) -> String {
    let mut text = String::new();
    let mut line = |s: String| {
        let _ = writeln!(text, "{s}");
    };
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let of_pages = |pages: u64| mib(pages * PAGE_SIZE as u64);
    line(format!(
        "free page reporting: {:.0} MiB of memory, blocks of order {} and above, {:.1} s",
        of_pages(seen.pages),
        seen.order,
        seen.seconds
    ));
    line(format!("  {:<38}{:>10}", "resident", "MiB"));
    for (name, bytes) in [
        ("before", seen.before),
        ("at the spike", seen.spike),
        ("after the frees", seen.freed),
        ("after reporting", seen.reported),
    ] {
        line(format!("    {name:<36}{:>10.1}", mib(bytes)));
    }
    line("  what may be resident then".to_owned());
    for (name, pages) in [
        ("in use", seen.in_use),
        ("metadata", seen.metadata),
        ("free, in blocks under the order", seen.small),
        ("free, in per-CPU lists", seen.pcp),
    ] {
        line(format!("    {name:<36}{:>10.1}", of_pages(pages)));
    }
    line(format!("    {:<36}{:>10.1}", "all", mib(seen.allowed())));
    line(format!(
        "  {} pages in {} reports; {} blocks with wrong contents, ledger {}",
        seen.pages_reported,
        seen.batches,
        seen.wrong,
        if seen.balanced {
            "balanced"
        } else {
            "NOT balanced"
        }
    ));
    if seen.reported > seen.allowed() {
        line(format!(
            "  MORE RESIDENT THAN THERE SHOULD BE: {:.1} MiB",
            mib(seen.reported - seen.allowed())
        ));
    }
    text
}

fn object(seen: &Seen) -> serde_json::Value {
    json!({
        "pages": seen.pages,
        "order": seen.order,
        "seconds": seen.seconds,
        "folios": seen.folios,
        "objects": seen.objects,
        "resident_bytes": {
            "before": seen.before,
            "at_the_spike": seen.spike,
            "after_the_frees": seen.freed,
            "after_reporting": seen.reported,
        },
        "in_use_pages": seen.in_use,
        "metadata_pages": seen.metadata,
        "free_in_small_blocks_pages": seen.small,
        "free_in_pcp_pages": seen.pcp,
        "allowed_bytes": seen.allowed(),
        "pages_reported": seen.pages_reported,
        "reports": seen.batches,
        "wrong": seen.wrong,
        "balanced": seen.balanced,
    })
}
