//! Deferred frees side by side: what one costs above a plain free, what a reader pays, and how much lies about.
//!
//! Each thread has a pointer that readers could follow. A turn allocates an object of 64 bytes, writes to it, swaps it in, and gives
//! the old one up. Schemes take turns, round by round, and medians are taken over the rounds. The backlog is counted in a pass of its own,
//! which is not timed.

mod liburcu;
mod ours;
mod peers;

use std::sync::Barrier;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Bytes of an object.
pub const OBJECT: usize = 64;

/// What is measured.
#[derive(Clone, Debug)]
pub struct Options {
    /// How many threads, each number in turn.
    pub threads: Vec<usize>,
    /// Objects a thread gives up in one round.
    pub objects: u64,
    /// Rounds.
    pub rounds: usize,
    /// Only these schemes.
    pub only: Vec<String>,
}

/// A way to free later.
pub(crate) trait Scheme: Sync {
    fn name(&self) -> &'static str;
    /// The scheme that frees at once, with the same allocator.
    fn floor(&self) -> &'static str;
    /// The calling thread is the `thread`-th: gives up `n` objects. With `counts`, tells the tally.
    fn run(&self, thread: usize, n: u64, counts: Option<&Tally>);
    /// Opens and closes `n` read sections, and follows the pointer in each.
    fn read(&self, thread: usize, n: u64);
    /// Frees all that can be freed now.
    fn flush(&self, tally: Option<&Tally>);
}

/// How many objects were given up, and how many of them are free.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    retired: AtomicU64,
    freed: AtomicU64,
    peak: AtomicU64,
}

/// The tally that deleters tell: they have no room for a reference.
static FREED: AtomicU64 = AtomicU64::new(0);

impl Tally {
    fn retired(&self) {
        self.retired.fetch_add(1, Ordering::Relaxed);
    }

    /// Looks how many lie about now. `freed` says how many are free, given how many were given up: in this order, so that a thread that
    /// loses its CPU in between does not take what others did meanwhile for a backlog.
    fn sample(&self, freed: impl FnOnce(u64) -> u64) {
        let retired = self.retired.load(Ordering::SeqCst);
        let freed = freed(retired);
        self.freed.fetch_max(freed, Ordering::Relaxed);
        self.peak
            .fetch_max(retired.saturating_sub(freed), Ordering::Relaxed);
    }
}

/// One line of the result.
#[derive(Clone, Debug)]
pub struct Row {
    /// The scheme.
    pub name: &'static str,
    /// How many threads.
    pub threads: usize,
    /// Nanoseconds for each object, over the rounds, sorted.
    pub ns: Vec<f64>,
    /// Nanoseconds for each read section, sorted.
    pub read_ns: Vec<f64>,
    /// Median over that of the floor, in nanoseconds.
    pub over_floor: f64,
    /// Objects that lay about at most, in the counted pass.
    pub peak: u64,
    /// Were all freed in the end?
    pub all_freed: bool,
}

/// The median of what is sorted.
pub fn median(sorted: &[f64]) -> f64 {
    match sorted {
        [] => 0.0,
        _ => (sorted[sorted.len() / 2] + sorted[(sorted.len() - 1) / 2]) / 2.0,
    }
}

/// What came out.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The lines, by number of threads.
    pub rows: Vec<Row>,
    /// Schemes that could not be measured, and why.
    pub missing: Vec<(&'static str, String)>,
}

/// Why nothing could be measured.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A scheme of this name there is none.
    #[error("{0:?} is no scheme: {1}")]
    Unknown(String, String),
    /// The machine for memdesc cannot be made.
    #[error("the machine for memdesc: {0}")]
    Machine(String),
}

/// All schemes there are.
pub const NAMES: [&str; 9] = [
    "floor",
    "crossbeam-epoch",
    "seize",
    "haphazard",
    "liburcu",
    "memdesc floor",
    "memdesc call_rcu",
    "memdesc kvfree_rcu",
    "memdesc prepaid",
];

fn schemes(
    options: &Options,
    missing: &mut Vec<(&'static str, String)>,
) -> Result<Vec<Box<dyn Scheme>>, Error> {
    for name in &options.only {
        if !NAMES.contains(&name.as_str()) {
            return Err(Error::Unknown(name.clone(), NAMES.join(", ")));
        }
    }
    let threads = options.threads.iter().copied().max().unwrap_or(1);
    let mut all: Vec<Box<dyn Scheme>> = vec![
        Box::new(peers::Floor::new(threads)),
        Box::new(peers::Epoch::new(threads)),
        Box::new(peers::Seize::new(threads)),
        Box::new(peers::Haphazard::new(threads)),
    ];
    match liburcu::Liburcu::load(threads) {
        Ok(scheme) => all.push(Box::new(scheme)),
        Err(why) => missing.push(("liburcu", why)),
    }
    for form in ours::Form::ALL {
        all.push(Box::new(
            ours::Ours::new(form, threads).map_err(Error::Machine)?,
        ));
    }
    let wanted = |name: &str| options.only.is_empty() || options.only.iter().any(|o| o == name);
    // A floor is measured for whoever stands on it.
    let floors: Vec<_> = all
        .iter()
        .filter(|s| wanted(s.name()))
        .map(|s| s.floor())
        .collect();
    all.retain(|s| wanted(s.name()) || floors.contains(&s.name()));
    Ok(all)
}

/// Runs `work` on so many threads at once; says how long the slowest took.
fn together(threads: usize, work: impl Fn(usize, &Barrier) -> Duration + Sync) -> Duration {
    let barrier = Barrier::new(threads);
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|thread| {
                let (barrier, work) = (&barrier, &work);
                scope.spawn(move || work(thread, barrier))
            })
            .collect();
        let took = workers.into_iter().map(|w| match w.join() {
            Ok(took) => took,
            Err(panic) => std::panic::resume_unwind(panic),
        });
        took.max().unwrap_or_default()
    })
}

/// Measures. `progress` hears how much of the whole is done, from 0 to 1.
///
/// # Errors
///
/// [`Error`].
pub fn run(options: &Options, mut progress: impl FnMut(f64)) -> Result<Outcome, Error> {
    let mut missing = Vec::new();
    let schemes = schemes(options, &mut missing)?;
    let mut rows = Vec::new();
    let steps = (options.threads.len() * options.rounds * schemes.len()).max(1);
    let mut done = 0;
    for &threads in &options.threads {
        let mut block: Vec<Row> = schemes
            .iter()
            .map(|s| Row {
                name: s.name(),
                threads,
                ns: Vec::new(),
                read_ns: Vec::new(),
                over_floor: 0.0,
                peak: 0,
                all_freed: true,
            })
            .collect();
        for _ in 0..options.rounds {
            for (scheme, row) in schemes.iter().zip(&mut block) {
                let n = options.objects;
                let took = together(threads, |thread, barrier| {
                    scheme.run(thread, n / 20 + 1, None);
                    barrier.wait();
                    let start = Instant::now();
                    scheme.run(thread, n, None);
                    start.elapsed()
                });
                row.ns.push(took.as_nanos() as f64 / n as f64);
                scheme.flush(None);
                let took = together(threads, |thread, barrier| {
                    scheme.read(thread, n / 20 + 1);
                    barrier.wait();
                    let start = Instant::now();
                    scheme.read(thread, n);
                    start.elapsed()
                });
                row.read_ns.push(took.as_nanos() as f64 / n as f64);
                done += 1;
                progress(done as f64 / steps as f64);
            }
        }
        for (scheme, row) in schemes.iter().zip(&mut block) {
            let tally = Tally::default();
            FREED.store(0, Ordering::Relaxed);
            together(threads, |thread, barrier| {
                barrier.wait();
                scheme.run(thread, options.objects, Some(&tally));
                Duration::ZERO
            });
            scheme.flush(Some(&tally));
            row.peak = tally.peak.load(Ordering::Relaxed);
            row.all_freed =
                tally.freed.load(Ordering::Relaxed) >= tally.retired.load(Ordering::Relaxed);
        }
        for row in &mut block {
            row.ns.sort_by(f64::total_cmp);
            row.read_ns.sort_by(f64::total_cmp);
        }
        for i in 0..block.len() {
            let floor = schemes[i].floor();
            let of = block.iter().find(|r| r.name == floor);
            let floor_ns = of.map_or(0.0, |r| median(&r.ns));
            block[i].over_floor = median(&block[i].ns) - floor_ns;
        }
        rows.append(&mut block);
    }
    Ok(Outcome { rows, missing })
}
