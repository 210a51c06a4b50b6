//! Memory full of file pages, then demand for anonymous memory, while the file is still being read: reclaim has to keep up.
//!
//! What Linux would have served is every request here: a machine whose memory is mostly clean or writable file cache is not out of memory.
//! Anonymous demand ends at a share of memory that leaves room for the rest.

use std::fmt::Write as _;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use memdesc::filemap::Mapping;
use memdesc::gfp::{GFP_ATOMIC, GFP_KERNEL};
use memdesc::mmap::{Map, MmStruct, VmFlags};
use memdesc::{Config, Event, Mm, PageType};
use memdesc_host::{Host, UserView, ram};
use serde_json::json;

use super::disk::{Disk, original};
use crate::cli::PageCacheArgs;
use crate::error::Error;
use crate::rng::Rng;
use crate::{output, progress};

/// What was seen.
#[derive(Default)]
struct Seen {
    pages: u64,
    file_after_fill: u64,
    file_folios: u64,
    anon: u64,
    anon_failed: u64,
    atomic: u64,
    atomic_failed: u64,
    large: u64,
    large_failed: u64,
    read: u64,
    read_failed: u64,
    wrong: u64,
    reclaimed: u64,
    scanned: u64,
    stalls: u64,
    written_back: u64,
    disk_reads: u64,
    fault_ns: Vec<u64>,
    metadata_per_page: f64,
    balanced: bool,
    lost: u64,
    seconds: f64,
}

impl Seen {
    fn failed(&self) -> u64 {
        self.anon_failed + self.atomic_failed + self.large_failed + self.read_failed
    }

    fn ok(&self) -> bool {
        self.failed() == 0 && self.wrong == 0 && self.balanced && self.lost == 0
    }

    fn percentile(&self, share: f64) -> u64 {
        let last = self.fault_ns.len().saturating_sub(1);
        let at = (last as f64 * share) as usize;
        self.fault_ns.get(at).copied().unwrap_or(0)
    }
}

/// Runs it; the exit code.
pub(crate) fn run(args: &PageCacheArgs) -> Result<u8, Error> {
    let seen = scenario(args)?;
    output::print_found(args.run.json, || object(&seen), || report(&seen));
    Ok(u8::from(!seen.ok()))
}

fn scenario(args: &PageCacheArgs) -> Result<Seen, Error> {
    let start = Instant::now();
    let pages = args.memory << 8;
    let ranges = [ram(0, pages)];
    let host = Host::builder().memory(&ranges).cpus(2).build();
    let config = Config {
        memory_is_zeroed: true,
        ..Config::default()
    };
    let mm = Mm::new(host.map_err(Error::Host)?, &config, &ranges).map_err(Error::Init)?;
    let file_pages = u64::from(pages) * 4;
    let disk = Disk::new(file_pages);
    let mut seen = Seen {
        pages: u64::from(pages),
        ..Seen::default()
    };
    {
        let file = Mapping::new(&mm, &disk, file_pages).map_err(Error::Alloc)?;
        fill(&mm, &file, args, &mut seen);
        demand(&mm, &file, args, &mut seen)?;
        seen.disk_reads = disk.reads();
        seen.written_back = disk.writes();
    }
    seen.reclaimed = mm.event(Event::PgSteal);
    seen.scanned = mm.event(Event::PgScan);
    seen.stalls = mm.event(Event::SlowPath);
    mm.shrink();
    let ledger = mm.ledger();
    seen.balanced = ledger.balanced;
    seen.lost = [PageType::Anon, PageType::File, PageType::PageTable]
        .iter()
        .map(|&kind| mm.pages_of(kind))
        .sum();
    seen.seconds = start.elapsed().as_secs_f64();
    seen.fault_ns.sort_unstable();
    Ok(seen)
}

/// Reads and writes through the file until it has passed through memory once and a half.
fn fill(mm: &Mm<Host>, file: &Mapping<'_, Host>, args: &PageCacheArgs, seen: &mut Seen) {
    let _cpu = mm.platform().claim(0);
    let bar = progress::share(args.run.quiet, "filling");
    let total = seen.pages * 3 / 2;
    for page in 0..total {
        let mut first = [0; 8];
        match file.read(page * 4096, &mut first) {
            Ok(()) => seen.wrong += u64::from(u64::from_le_bytes(first) != original(page)),
            Err(_) => seen.read_failed += 1,
        }
        seen.read += 1;
        // A tenth of what is cached is dirty.
        if page % 10 == 3
            && file
                .write(page * 4096, &(original(page) + 1).to_le_bytes())
                .is_err()
        {
            seen.read_failed += 1;
        }
        if page % 1024 == 0 {
            bar.set_position(page * 1000 / total);
        }
    }
    bar.finish_and_clear();
    seen.file_after_fill = mm.pages_of(PageType::File);
    let lists = mm.lru_view(0);
    seen.file_folios = lists.folios[2] + lists.folios[3];
    seen.metadata_per_page = mm.ledger().metadata_bytes() as f64 / seen.pages as f64;
}

/// Anonymous memory for most of the machine, page by page, by real stores, with a reader of the file and atomic requests beside it.
fn demand(
    mm: &Mm<Host>,
    file: &Mapping<'_, Host>,
    args: &PageCacheArgs,
    seen: &mut Seen,
) -> Result<(), Error> {
    let wanted = seen.pages * 3 / 4;
    let top = (wanted * 4096).next_multiple_of(2 << 20) + (4 << 20);
    let space = MmStruct::with_top(mm, 1, top).map_err(Error::Alloc)?;
    let at = space
        .mmap(None, wanted * 4096, VmFlags::READ_WRITE, Map::Anon)
        .map_err(Error::Alloc)?;
    let view = UserView::new(&space).map_err(Error::View)?;
    let stop = &AtomicBool::new(false);
    let reader = &[const { AtomicU64::new(0) }; 7];
    let bar = progress::share(args.run.quiet, "demand");
    std::thread::scope(|scope| {
        scope.spawn(move || beside(mm, file, args.run.seed, stop, reader));
        let _cpu = mm.platform().claim(0);
        for page in 0..wanted {
            let before = Instant::now();
            // A fault that fails is one that the process dies of, so the software path asks first.
            if space.write(at + page * 4096, &page.to_le_bytes()).is_ok() {
                // SAFETY: in the area, by this thread alone.
                let value = unsafe { view.ptr(at + page * 4096).cast::<u64>().read_volatile() };
                seen.wrong += u64::from(value != page);
                seen.anon += 1;
            } else {
                seen.anon_failed += 1;
            }
            seen.fault_ns.push(before.elapsed().as_nanos() as u64);
            if page % 1024 == 0 {
                bar.set_position(page * 1000 / wanted);
            }
        }
        for page in 0..wanted {
            // SAFETY: as above.
            let value = unsafe { view.ptr(at + page * 4096).cast::<u64>().read_volatile() };
            seen.wrong += u64::from(value != page);
        }
        std::thread::sleep(Duration::from_millis(100));
        stop.store(true, Ordering::Relaxed);
    });
    bar.finish_and_clear();
    let n = |i: usize| reader[i].load(Ordering::Relaxed);
    seen.read += n(0);
    seen.read_failed += n(1);
    seen.wrong += n(2);
    seen.atomic += n(3);
    seen.atomic_failed += n(4);
    seen.large += n(5);
    seen.large_failed += n(6);
    Ok(())
}

/// The other CPU: reads the file here and there, takes a page now and then as an interrupt would, and three at once as a network would.
fn beside(
    mm: &Mm<Host>,
    file: &Mapping<'_, Host>,
    seed: u64,
    stop: &AtomicBool,
    counts: &[AtomicU64; 7],
) {
    let _cpu = mm.platform().claim(1);
    let mut rng = Rng(seed);
    let add = |i: usize| {
        counts[i].fetch_add(1, Ordering::Relaxed);
    };
    let size = file.size();
    let mut at = size / 2;
    while !stop.load(Ordering::Relaxed) {
        // In order for a while, then elsewhere.
        at = if rng.below_u64(200) == 0 {
            rng.below_u64(size)
        } else {
            (at + 1) % size
        };
        let mut first = [0; 8];
        add(0);
        match file.read(at * 4096, &mut first) {
            Ok(()) if u64::from_le_bytes(first) >> 32 == at => {}
            Ok(()) => add(2),
            Err(_) => add(1),
        }
        if rng.below_u64(16) == 0 {
            add(3);
            match mm.alloc_pages(GFP_ATOMIC, 0) {
                // SAFETY: ours.
                Ok(page) => unsafe { mm.free_pages(page) },
                Err(_) => add(4),
            }
        }
        if rng.below_u64(64) == 0 {
            add(5);
            match mm.alloc_pages(GFP_KERNEL, 3) {
                // SAFETY: ours.
                Ok(page) => unsafe { mm.free_pages(page) },
                Err(_) => add(6),
            }
        }
        if rng.below_u64(64) == 0 {
            // What kswapd does when it is woken.
            mm.kswapd();
        }
    }
}

fn report(seen: &Seen) -> String {
    let mut text = String::new();
    let mut line = |s: String| {
        let _ = writeln!(text, "{s}");
    };
    let mib = |pages: u64| pages as f64 / 256.0;
    line(format!(
        "page cache: {:.0} MiB of memory, 2 CPUs, {:.1} s",
        mib(seen.pages),
        seen.seconds
    ));
    line(format!(
        "  after reading           {:>10.0} MiB of file in {} folios, {:.2} pages each; metadata {:.2} bytes a page",
        mib(seen.file_after_fill),
        seen.file_folios,
        seen.file_after_fill as f64 / seen.file_folios.max(1) as f64,
        seen.metadata_per_page,
    ));
    line(format!(
        "  {:<22}{:>12}{:>10}",
        "asked for", "served", "failed"
    ));
    for (name, asked, failed) in [
        (
            "anonymous pages",
            seen.anon + seen.anon_failed,
            seen.anon_failed,
        ),
        ("reads of the file", seen.read, seen.read_failed),
        ("atomic, order 0", seen.atomic, seen.atomic_failed),
        ("GFP_KERNEL, order 3", seen.large, seen.large_failed),
    ] {
        line(format!("  {name:<22}{:>12}{failed:>10}", asked - failed));
    }
    line(format!(
        "  reclaim                 {:>10.0} MiB, {} folios looked at, {} written back, {} requests went the slow way",
        mib(seen.reclaimed),
        seen.scanned,
        seen.written_back,
        seen.stalls
    ));
    line(format!(
        "  a fault took            {:>10.1} us in the median, {:.1} us for 99 of 100, {:.1} us at worst",
        seen.percentile(0.5) as f64 / 1e3,
        seen.percentile(0.99) as f64 / 1e3,
        seen.percentile(1.0) as f64 / 1e3
    ));
    line(format!(
        "  {} pages with wrong contents, ledger {}, {} pages lost",
        seen.wrong,
        if seen.balanced {
            "balanced"
        } else {
            "NOT balanced"
        },
        seen.lost
    ));
    text
}

fn object(seen: &Seen) -> serde_json::Value {
    json!({
        "pages": seen.pages,
        "seconds": seen.seconds,
        "file_pages_after_fill": seen.file_after_fill,
        "file_folios_after_fill": seen.file_folios,
        "metadata_bytes_per_page": seen.metadata_per_page,
        "anonymous": {"served": seen.anon, "failed": seen.anon_failed},
        "reads": {"served": seen.read - seen.read_failed, "failed": seen.read_failed},
        "atomic": {"served": seen.atomic - seen.atomic_failed, "failed": seen.atomic_failed},
        "order_3": {"served": seen.large - seen.large_failed, "failed": seen.large_failed},
        "reclaimed_pages": seen.reclaimed,
        "scanned": seen.scanned,
        "slow_requests": seen.stalls,
        "folios_written_back": seen.written_back,
        "disk_reads": seen.disk_reads,
        "fault_ns": {
            "p50": seen.percentile(0.5),
            "p99": seen.percentile(0.99),
            "max": seen.percentile(1.0),
        },
        "wrong": seen.wrong,
        "balanced": seen.balanced,
        "lost_pages": seen.lost,
    })
}
