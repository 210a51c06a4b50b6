//! Pages of memory compressed with lz4 and stored by zsmalloc, as zram does: read back and compared, a half at random freed, compacted, compared again.
//! How dense they lie is set beside what Linux's zsmalloc would make of the same sizes; what a store and a load take beside kmalloc and boxes.

use std::fmt::Write as _;
use std::time::Instant;

use memdesc::gfp::GFP_KERNEL;
use memdesc::zsmalloc::{ZsHandle, ZsPool, ZsPoolStats};
use memdesc::{Config, Mm, PageType};
use memdesc_host::{Host, ram};
use serde_json::{Value, json};

use super::contents::{Contents, Kind, PAGE};
use super::linux_zsmalloc::Linux;
use crate::cli::ZsmallocArgs;
use crate::error::Error;
use crate::rng::Rng;
use crate::{output, progress};

/// Objects that times are taken with, at most.
const TIMED: usize = 100_000;
/// Rounds of each way, in turn.
const ROUNDS: usize = 5;

/// A stored page.
#[derive(Clone, Copy)]
struct Stored {
    page: u32,
    len: u16,
    handle: ZsHandle,
}

/// How it stands at one moment.
struct Standing {
    what: &'static str,
    objects: u64,
    bytes: u64,
    stats: ZsPoolStats,
    /// Where its zspages are as full as they can be.
    linux: Option<Linux>,
}

impl Standing {
    fn density(&self, pages: u64) -> f64 {
        self.bytes as f64 / (pages * PAGE as u64).max(1) as f64
    }

    /// Bytes that describe the pages of objects, their words too.
    fn descriptors(&self) -> u64 {
        // A page of handles has 16 and a word.
        self.stats.descriptor_bytes - self.stats.handle_pages * 16 + self.stats.pages * 8
    }

    fn handles(&self) -> u64 {
        self.stats.handle_pages * (PAGE as u64 + 16 + 8)
    }

    fn all(&self) -> u64 {
        self.stats.pages * PAGE as u64 + self.descriptors() + self.handles()
    }
}

/// One way to keep bytes: median times in nanoseconds an object, and pages.
struct Way {
    name: &'static str,
    store: f64,
    load: f64,
    free: f64,
    density: Option<f64>,
}

#[derive(Default)]
struct Seen {
    objects: u64,
    kinds: [(u64, u64); 5],
    with_program: bool,
    kept_whole: u64,
    standings: Vec<Standing>,
    compacted_pages: u64,
    compact_ms: f64,
    moved: u64,
    wrong: u64,
    pages_left: u64,
    balanced: bool,
    ways: Vec<Way>,
    timed: usize,
    seconds: f64,
}

impl Seen {
    fn ok(&self) -> bool {
        self.wrong == 0 && self.pages_left == 0 && self.balanced
    }

    fn compressed(&self) -> u64 {
        self.kinds.iter().map(|kind| kind.1).sum()
    }
}

/// Runs it; the exit code.
pub(crate) fn run(args: &ZsmallocArgs) -> Result<u8, Error> {
    let seen = scenario(args)?;
    output::print_found(args.run.json, || object(&seen), || report(&seen));
    Ok(u8::from(!seen.ok()))
}

fn machine(bytes: u64) -> Result<Mm<Host>, Error> {
    let ranges = [ram(0, (bytes / PAGE as u64) as u32)];
    let host = Host::builder().memory(&ranges).cpus(1).build();
    let config = Config {
        memory_is_zeroed: true,
        ..Config::default()
    };
    Mm::new(host.map_err(Error::Host)?, &config, &ranges).map_err(Error::Init)
}

fn scenario(args: &ZsmallocArgs) -> Result<Seen, Error> {
    let start = Instant::now();
    let contents = Contents::new(args.run.seed);
    let objects = u64::from(args.objects);
    let mut seen = Seen {
        objects,
        with_program: contents.has_program(),
        ..Seen::default()
    };
    // Room for all, should nothing shrink; what is not touched costs nothing.
    let mm = machine(objects * (PAGE as u64 + 64) + (64 << 20))?;
    {
        let _cpu = mm.platform().claim(0);
        let pool = mm.zs_create_pool("scenario").map_err(Error::Alloc)?;
        life(&mm, &pool, &contents, args, &mut seen)?;
        if let Err(left) = mm.zs_destroy_pool(pool) {
            seen.wrong += left.objects;
        }
        mm.shrink();
        seen.pages_left = mm.pages_of(PageType::Zsmalloc) + mm.pages_of(PageType::Bare);
        seen.balanced = mm.ledger().balanced;
    }
    drop(mm);
    times(&contents, args, &mut seen)?;
    seen.seconds = start.elapsed().as_secs_f64();
    Ok(seen)
}

/// A page compressed: as it is stored. What does not shrink enough is stored as it is, as zram does.
fn compress<'a>(page: &'a [u8; PAGE], out: &'a mut [u8], huge: usize) -> &'a [u8] {
    match lz4_flex::block::compress_into(page, out) {
        Ok(len) if len < huge => &out[..len],
        _ => page,
    }
}

fn life(
    mm: &Mm<Host>,
    pool: &ZsPool<'_>,
    contents: &Contents,
    args: &ZsmallocArgs,
    seen: &mut Seen,
) -> Result<(), Error> {
    let huge = mm.zs_huge_class_size();
    let mut out = vec![0; lz4_flex::block::get_maximum_output_size(PAGE)];
    let mut page = [0; PAGE];
    let mut linux = Linux::new();
    let mut stored = Vec::with_capacity(args.objects as usize);
    let bar = progress::share(args.run.quiet, "storing");
    for n in 0..args.objects {
        let kind = contents.page(n.into(), &mut page);
        let data = compress(&page, &mut out, huge);
        let handle = mm
            .zs_malloc(pool, data.len(), GFP_KERNEL)
            .map_err(Error::Alloc)?;
        mm.zs_obj_write(pool, handle, data).map_err(Error::Zs)?;
        linux.add(n.into(), data.len());
        seen.kinds[kind as usize].0 += 1;
        seen.kinds[kind as usize].1 += data.len() as u64;
        seen.kept_whole += u64::from(data.len() == PAGE);
        stored.push(Stored {
            page: n,
            len: data.len() as u16,
            handle,
        });
        step(&bar, n, args.objects);
    }
    bar.finish_and_clear();
    stand(mm, pool, "all stored", &stored, Some(linux), seen);
    check(mm, pool, contents, &stored, args, "reading", seen);

    // A half goes, at random.
    let mut rng = Rng(args.run.seed);
    for i in (1..stored.len()).rev() {
        stored.swap(i, rng.below(i + 1));
    }
    for gone in stored.drain(args.objects as usize / 2..) {
        mm.zs_free(pool, gone.handle);
    }
    stand(mm, pool, "half freed", &stored, None, seen);
    let before = Instant::now();
    seen.compacted_pages = mm.zs_compact(pool) as u64;
    seen.compact_ms = before.elapsed().as_secs_f64() * 1e3;
    seen.moved = mm.zs_pool_stats(pool).objects_moved;
    let mut linux = Linux::new();
    stored
        .iter()
        .for_each(|s| linux.add(s.page.into(), s.len.into()));
    stand(mm, pool, "compacted", &stored, Some(linux), seen);
    check(mm, pool, contents, &stored, args, "again", seen);
    for last in stored {
        mm.zs_free(pool, last.handle);
    }
    Ok(())
}

fn step(bar: &indicatif::ProgressBar, n: u32, of: u32) {
    if n.is_multiple_of(4096) {
        bar.set_position(u64::from(n) * 1000 / u64::from(of.max(1)));
    }
}

fn stand(
    mm: &Mm<Host>,
    pool: &ZsPool<'_>,
    what: &'static str,
    stored: &[Stored],
    linux: Option<Linux>,
    seen: &mut Seen,
) {
    let stats = mm.zs_pool_stats(pool);
    seen.wrong += u64::from(stats.objects != stored.len() as u64);
    seen.standings.push(Standing {
        what,
        objects: stats.objects,
        bytes: stored.iter().map(|s| u64::from(s.len)).sum(),
        stats,
        linux,
    });
}

/// Reads all that should be there, and compares it with what was stored.
fn check(
    mm: &Mm<Host>,
    pool: &ZsPool<'_>,
    contents: &Contents,
    stored: &[Stored],
    args: &ZsmallocArgs,
    what: &str,
    seen: &mut Seen,
) {
    let (mut page, mut back) = ([0; PAGE], [0; PAGE]);
    let mut copy = [0; PAGE];
    let bar = progress::share(args.run.quiet, what);
    for (n, object) in stored.iter().enumerate() {
        contents.page(object.page.into(), &mut page);
        let len = usize::from(object.len);
        let right = match mm.zs_obj_read_begin(pool, object.handle, &mut copy[..len]) {
            Ok(view) if len == PAGE => *view == page,
            Ok(view) => {
                let len = lz4_flex::block::decompress_into(&view, &mut back);
                len.is_ok_and(|len| len == PAGE) && back == page
            }
            Err(_) => false,
        };
        seen.wrong += u64::from(!right);
        step(&bar, n as u32, stored.len() as u32);
    }
    bar.finish_and_clear();
}

/// What is timed: each way stores, loads and frees the same objects.
trait Keeper {
    fn store(&mut self, data: &[u8]) -> Result<(), Error>;
    /// What all bytes of the object come to.
    fn load(&mut self, which: usize, len: usize) -> Result<u64, Error>;
    /// Pages in use, where that can be said.
    fn pages(&self) -> Option<u64>;
    fn free_all(&mut self, order: &[u32]);
}

fn sum(bytes: &[u8]) -> u64 {
    let words = bytes.chunks_exact(8);
    let rest = words.remainder().iter().map(|&b| u64::from(b)).sum::<u64>();
    words.fold(rest, |sum, word| {
        let word = <[u8; 8]>::try_from(word).unwrap_or_default();
        sum.wrapping_add(u64::from_le_bytes(word))
    })
}

struct Zs<'m> {
    mm: &'m Mm<Host>,
    pool: &'m ZsPool<'m>,
    handles: Vec<ZsHandle>,
    copy: [u8; PAGE],
}

impl Keeper for Zs<'_> {
    fn store(&mut self, data: &[u8]) -> Result<(), Error> {
        let handle = self.mm.zs_malloc(self.pool, data.len(), GFP_KERNEL);
        let handle = handle.map_err(Error::Alloc)?;
        self.mm
            .zs_obj_write(self.pool, handle, data)
            .map_err(Error::Zs)?;
        self.handles.push(handle);
        Ok(())
    }

    fn load(&mut self, which: usize, len: usize) -> Result<u64, Error> {
        let handle = self.handles[which];
        let view = self
            .mm
            .zs_obj_read_begin(self.pool, handle, &mut self.copy[..len]);
        view.map(|view| sum(&view)).map_err(Error::Zs)
    }

    fn pages(&self) -> Option<u64> {
        let stats = self.mm.zs_pool_stats(self.pool);
        Some(stats.pages + stats.handle_pages)
    }

    fn free_all(&mut self, order: &[u32]) {
        for &which in order {
            self.mm.zs_free(self.pool, self.handles[which as usize]);
        }
        self.handles.clear();
    }
}

struct Kmalloc<'m> {
    mm: &'m Mm<Host>,
    objects: Vec<std::ptr::NonNull<u8>>,
    before: u64,
}

impl Kmalloc<'_> {
    fn slab_pages(mm: &Mm<Host>) -> u64 {
        mm.pages_of(PageType::Slab) + mm.pages_of(PageType::LargeKmalloc)
    }
}

impl Keeper for Kmalloc<'_> {
    fn store(&mut self, data: &[u8]) -> Result<(), Error> {
        let object = self
            .mm
            .kmalloc(data.len(), GFP_KERNEL)
            .map_err(Error::Alloc)?;
        // SAFETY: ours, and as long.
        unsafe {
            object.copy_from_nonoverlapping(std::ptr::NonNull::from(data).cast(), data.len())
        };
        self.objects.push(object);
        Ok(())
    }

    fn load(&mut self, which: usize, len: usize) -> Result<u64, Error> {
        // SAFETY: ours, of this length, written when it was stored.
        Ok(sum(unsafe {
            std::slice::from_raw_parts(self.objects[which].as_ptr(), len)
        }))
    }

    fn pages(&self) -> Option<u64> {
        Some(Kmalloc::slab_pages(self.mm) - self.before)
    }

    fn free_all(&mut self, order: &[u32]) {
        for &which in order {
            // SAFETY: ours, each once.
            unsafe { self.mm.kfree(self.objects[which as usize]) };
        }
        self.objects.clear();
    }
}

#[derive(Default)]
struct Boxes(Vec<Option<Box<[u8]>>>);

impl Keeper for Boxes {
    fn store(&mut self, data: &[u8]) -> Result<(), Error> {
        self.0.push(Some(data.into()));
        Ok(())
    }

    fn load(&mut self, which: usize, _: usize) -> Result<u64, Error> {
        Ok(self.0[which].as_deref().map_or(0, sum))
    }

    fn pages(&self) -> Option<u64> {
        None
    }

    fn free_all(&mut self, order: &[u32]) {
        for &which in order {
            self.0[which as usize] = None;
        }
        self.0.clear();
    }
}

/// Times of a round: store, load, free, in nanoseconds an object.
type Times = [f64; 3];

fn times(contents: &Contents, args: &ZsmallocArgs, seen: &mut Seen) -> Result<(), Error> {
    let n = (args.objects as usize).min(TIMED);
    let mm = machine(n as u64 * 3 * PAGE as u64 + (64 << 20))?;
    let _cpu = mm.platform().claim(0);
    let pool = mm.zs_create_pool("timed").map_err(Error::Alloc)?;
    let huge = mm.zs_huge_class_size();
    let (mut all, mut ends) = (Vec::new(), vec![0]);
    let mut out = vec![0; lz4_flex::block::get_maximum_output_size(PAGE)];
    let mut page = [0; PAGE];
    for i in 0..n {
        contents.page(i as u64, &mut page);
        all.extend_from_slice(compress(&page, &mut out, huge));
        ends.push(all.len());
    }
    let mut order: Vec<u32> = (0..n as u32).collect();
    let mut rng = Rng(args.run.seed);
    for i in (1..n).rev() {
        order.swap(i, rng.below(i + 1));
    }
    let objects = Objects { all, ends, order };
    let mut ways: [(&str, Vec<Times>, Option<u64>); 3] = [
        ("zsmalloc", Vec::new(), None),
        ("kmalloc", Vec::new(), None),
        ("Vec<Box<[u8]>>", Vec::new(), None),
    ];
    let bar = progress::share(args.run.quiet, "timing");
    for round in 0..ROUNDS {
        let mut zs = Zs {
            mm: &mm,
            pool: &pool,
            handles: Vec::with_capacity(n),
            copy: [0; PAGE],
        };
        objects.round(&mut zs, &mut ways[0], seen)?;
        let mut kmalloc = Kmalloc {
            mm: &mm,
            objects: Vec::with_capacity(n),
            before: Kmalloc::slab_pages(&mm),
        };
        objects.round(&mut kmalloc, &mut ways[1], seen)?;
        // So that no way finds the other's pages warm.
        mm.shrink();
        objects.round(&mut Boxes(Vec::with_capacity(n)), &mut ways[2], seen)?;
        bar.set_position((round as u64 + 1) * 1000 / ROUNDS as u64);
    }
    bar.finish_and_clear();
    if let Err(left) = mm.zs_destroy_pool(pool) {
        seen.wrong += left.objects;
    }
    seen.timed = n;
    seen.ways = ways
        .into_iter()
        .map(|(name, times, pages)| Way {
            name,
            store: median(&times, 0),
            load: median(&times, 1),
            free: median(&times, 2),
            density: pages.map(|pages| objects.all.len() as f64 / (pages * PAGE as u64) as f64),
        })
        .collect();
    Ok(())
}

fn median(times: &[Times], which: usize) -> f64 {
    let mut sorted: Vec<f64> = times.iter().map(|t| t[which]).collect();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(0.0)
}

struct Objects {
    all: Vec<u8>,
    ends: Vec<usize>,
    /// In which they are loaded and freed.
    order: Vec<u32>,
}

impl Objects {
    fn object(&self, which: usize) -> &[u8] {
        &self.all[self.ends[which]..self.ends[which + 1]]
    }

    fn round(
        &self,
        keeper: &mut impl Keeper,
        way: &mut (&str, Vec<Times>, Option<u64>),
        seen: &mut Seen,
    ) -> Result<(), Error> {
        let n = self.order.len();
        let per = |from: Instant| from.elapsed().as_nanos() as f64 / n as f64;
        let start = Instant::now();
        for which in 0..n {
            keeper.store(self.object(which))?;
        }
        let store = per(start);
        way.2 = keeper.pages();
        let start = Instant::now();
        let mut loaded = 0u64;
        for &which in &self.order {
            let which = which as usize;
            let len = self.ends[which + 1] - self.ends[which];
            loaded = loaded.wrapping_add(keeper.load(which, len)?);
        }
        let load = per(start);
        let right = (0..n).fold(0u64, |all, i| all.wrapping_add(sum(self.object(i))));
        seen.wrong += u64::from(loaded != right);
        let start = Instant::now();
        keeper.free_all(&self.order);
        way.1.push([store, load, per(start)]);
        Ok(())
    }
}

fn report(seen: &Seen) -> String {
    let mut text = String::new();
    let mut line = |s: String| {
        let _ = writeln!(text, "{s}");
    };
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    line(format!(
        "zsmalloc: {} pages compressed with lz4 and stored, {:.1} s",
        seen.objects, seen.seconds
    ));
    for kind in Kind::ALL {
        let (n, bytes) = seen.kinds[kind as usize];
        if n > 0 {
            line(format!(
                "  {:<12}{n:>10} pages, {:>6.0} bytes each when compressed",
                kind.name(),
                bytes as f64 / n as f64
            ));
        }
    }
    line(format!(
        "  bytes in    {:>10.1} MiB, compressed {:.1} MiB; {} pages are kept as they are",
        mib(seen.objects * PAGE as u64),
        mib(seen.compressed()),
        seen.kept_whole,
    ));
    for standing in &seen.standings {
        line(String::new());
        let all = |bytes: u64| bytes as f64 / standing.bytes.max(1) as f64;
        line(format!(
            "  {:<34}{:>12}{:>14}",
            format!("{}: {} objects", standing.what, standing.objects),
            "here",
            if standing.linux.is_some() {
                "Linux 6.18"
            } else {
                ""
            },
        ));
        let (objects, pages) = (standing.objects.max(1) as f64, standing.stats.pages);
        let linux = standing.linux.as_ref();
        let mut row = |what: &str, here: String, linux: Option<String>| {
            line(format!(
                "    {what:<32}{here:>12}{:>14}",
                linux.unwrap_or_default()
            ));
        };
        row(
            "pages",
            pages.to_string(),
            linux.map(|l| l.pages().to_string()),
        );
        row(
            "density: stored bytes / pages",
            format!("{:.2} %", 100.0 * standing.density(pages)),
            linux.map(|l| format!("{:.2} %", 100.0 * standing.density(l.pages()))),
        );
        row(
            "descriptors, bytes a page",
            format!("{:.2}", standing.descriptors() as f64 / pages as f64),
            linux.map(|l| format!("{:.2}", l.descriptor_bytes() as f64 / l.pages() as f64)),
        );
        row(
            "handles, bytes an object",
            format!("{:.2}", standing.handles() as f64 / objects),
            linux.map(|l| format!("{:.2}", l.handle_bytes() as f64 / objects)),
        );
        row(
            "all memory / stored bytes",
            format!("{:.4}", all(standing.all())),
            linux.map(|l| {
                let bytes = l.pages() * PAGE as u64 + l.descriptor_bytes() + l.handle_bytes();
                format!("{:.4}", all(bytes))
            }),
        );
    }
    line(format!(
        "\n  compaction moved {} objects and freed {} pages in {:.1} ms",
        seen.moved, seen.compacted_pages, seen.compact_ms
    ));
    line(format!(
        "\n  {:<22}{:>12}{:>12}{:>12}{:>12}",
        format!("ns, {} objects", seen.timed),
        "store",
        "load",
        "free",
        "density"
    ));
    for way in &seen.ways {
        line(format!(
            "    {:<20}{:>12.0}{:>12.0}{:>12.0}{:>12}",
            way.name,
            way.store,
            way.load,
            way.free,
            way.density
                .map_or("-".into(), |d| format!("{:.2} %", 100.0 * d)),
        ));
    }
    line(format!(
        "  {} objects with wrong contents, {} pages left, ledger {}",
        seen.wrong,
        seen.pages_left,
        if seen.balanced {
            "balanced"
        } else {
            "NOT balanced"
        }
    ));
    text
}

fn object(seen: &Seen) -> Value {
    let standing = |s: &Standing| {
        json!({
            "when": s.what,
            "objects": s.objects,
            "stored_bytes": s.bytes,
            "pages": s.stats.pages,
            "zspages": s.stats.zspages,
            "handle_pages": s.stats.handle_pages,
            "density": s.density(s.stats.pages),
            "descriptor_bytes": s.descriptors(),
            "handle_bytes": s.handles(),
            "all_bytes": s.all(),
            "linux": s.linux.as_ref().map(|l| json!({
                "pages": l.pages(),
                "density": s.density(l.pages()),
                "descriptor_bytes": l.descriptor_bytes(),
                "handle_bytes": l.handle_bytes(),
                "all_bytes": l.pages() * PAGE as u64 + l.descriptor_bytes() + l.handle_bytes(),
            })),
        })
    };
    let kinds = Kind::ALL.iter().map(|&kind| {
        let (pages, bytes) = seen.kinds[kind as usize];
        (
            kind.name().to_owned(),
            json!({"pages": pages, "compressed_bytes": bytes}),
        )
    });
    json!({
        "objects": seen.objects,
        "seconds": seen.seconds,
        "bytes_in": seen.objects * PAGE as u64,
        "compressed_bytes": seen.compressed(),
        "kept_whole": seen.kept_whole,
        "with_program": seen.with_program,
        "kinds": kinds.collect::<serde_json::Map<_, _>>(),
        "standings": seen.standings.iter().map(standing).collect::<Vec<_>>(),
        "compaction": {
            "pages_freed": seen.compacted_pages,
            "objects_moved": seen.moved,
            "ms": seen.compact_ms,
        },
        "timed_objects": seen.timed,
        "ns_an_object": seen.ways.iter().map(|way| json!({
            "name": way.name,
            "store": way.store,
            "load": way.load,
            "free": way.free,
            "density": way.density,
        })).collect::<Vec<_>>(),
        "wrong": seen.wrong,
        "pages_left": seen.pages_left,
        "balanced": seen.balanced,
    })
}
