//! Swap over a network, simulated: memory is full, and to free a page it has to be sent, which needs memory.
//!
//! A working set of several times memory is touched at random. A page goes only when a server on the network has acknowledged it, and the network stack takes its
//! memory from the same memory manager as all the others, who take what they can get. If the stack is refused what it needs to send, or to receive the
//! acknowledgement, nothing will ever be freed: the machine is locked up. Time is simulated, everything else (pages, objects, their contents) is real.
//!
//! Source: "foundations for reserve-based allocation" and "swap over networked storage" (Peter Zijlstra, 2007 to 2009), swap over NBD and NFS as merged
//! (Mel Gorman, 2012).

mod memory;
mod mempools;
mod others;
mod pager;
mod report;
mod reserves;
mod rx;
mod server;
mod settings;
mod sim;
mod tx;
mod wire;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use memdesc::{Cache, Config, Demand, Mm, PageType, PhysAddr};
use memdesc_host::{Host, ram};

use crate::cli::SwapNetArgs;
use crate::error::Error;
use crate::{output, progress};
use memory::{Asked, Book, Held, Memory, Site, Today};
use mempools::Mempools;
use reserves::{Node, Reserves};
use server::Store;
use settings::{Bounds, Size};
use sim::{End, World};

/// Where the stack's memory comes from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Mode {
    Nothing,
    Mempools,
    Reserves,
    /// Mempools, and whatever is left for what they do not serve.
    MempoolsMemalloc,
}

impl Mode {
    pub(crate) const ALL: [Mode; 3] = [Mode::Nothing, Mode::Mempools, Mode::Reserves];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Mode::Nothing => "nothing",
            Mode::Mempools => "mempools",
            Mode::Reserves => "reserves",
            Mode::MempoolsMemalloc => "mempools-memalloc",
        }
    }
}

/// One seed on one machine.
struct Run {
    end: End,
    asked: [Asked; Site::COUNT],
    held: [Held; 4],
    balanced: bool,
    /// Pages and objects that nobody gave back.
    lost: u64,
    /// The tree of reserves.
    nodes: Vec<Node>,
    corruptions: u64,
    seconds: f64,
}

impl Run {
    /// Is what the memory manager did right, whether or not the machine came to a stop?
    fn sound(&self) -> bool {
        self.end.wrong == 0 && self.balanced && self.lost == 0 && self.corruptions == 0
    }
}

/// Runs it; the exit code.
pub(crate) fn run(args: &SwapNetArgs) -> Result<u8, Error> {
    let memory = args.mib << 8;
    let size = Size {
        memory,
        working_set: memory * args.working_set,
        touches: args.touches,
        min_free_kbytes: args.min_free_kbytes,
        patience: args.patience,
    };
    let seeds = match args.seed {
        Some(seed) => seed..=seed,
        None => 1..=args.seeds,
    };
    let modes = args.with.modes();
    let total = (seeds.clone().count() * modes.len()) as u64;
    let bar = progress::share(args.quiet, "swapping");
    let mut store = Store::default();
    let mut tallies: Vec<_> = modes.iter().map(|&mode| report::Tally::new(mode)).collect();
    let mut done = 0;
    for seed in seeds {
        for tally in &mut tallies {
            tally.add(seed, one(tally.mode, size, seed, &mut store)?);
            done += 1;
            bar.set_position(done * 1000 / total);
        }
    }
    bar.finish_and_clear();
    output::print_found(
        args.json,
        || report::object(size, &tallies),
        || report::report(size, args, &tallies),
    );
    Ok(u8::from(!tallies.iter().all(report::Tally::ok)))
}

/// Objects that users have, in all caches.
fn live(mm: &Mm<Host>) -> u64 {
    let mut live = 0;
    mm.slabinfo(|cache| {
        if !cache.metadata {
            live += cache.active_objs;
        }
    });
    live
}

/// Pages that are nobody's at the end of a run.
const PASSING: [PageType; 3] = [PageType::Anon, PageType::Bare, PageType::LargeKmalloc];

fn one(mode: Mode, size: Size, seed: u64, store: &mut Store) -> Result<Run, Error> {
    let start = Instant::now();
    let ranges = [ram(0, size.memory)];
    let corruptions = Arc::new(AtomicU64::new(0));
    let seen = Arc::clone(&corruptions);
    let host = Host::builder()
        .memory(&ranges)
        .vmalloc(0)
        .on_corruption(move |report| {
            if seen.fetch_add(1, Ordering::Relaxed) == 0 {
                eprintln!("memdesc: {report}");
            }
        })
        .build()
        .map_err(Error::Host)?;
    let config = Config {
        memory_is_zeroed: true,
        // One zone: what is left below its marks is all there is.
        dma_limit: PhysAddr(0),
        dma32_limit: PhysAddr(0),
        min_free_kbytes: size.min_free_kbytes,
        ..Config::default()
    };
    let mm = Mm::new(host, &config, &ranges).map_err(Error::Init)?;
    let Some(_cpu) = mm.platform().claim(0) else {
        return Err(Error::Usage("no CPU could be claimed".into()));
    };
    // What the memory manager keeps of reserves that are gone is there before anything is counted.
    let nodes = (0..Reserves::NODES).map(|_| mm.reserve("", Demand::None));
    let nodes: Vec<_> = nodes.collect::<Result<_, _>>().map_err(Error::Alloc)?;
    let destroyed = nodes.into_iter().map(|node| node.destroy().is_err());
    let mut left: u64 = destroyed.map(u64::from).sum();
    let before = live(&mm);
    let mut nodes = Vec::new();
    let heads = memory::heads(&mm).map_err(Error::Alloc)?;
    let (end, asked, held) = match mode {
        Mode::Nothing => {
            let memory = Today::new(&mm, &heads);
            simulate(&mm, &heads, &memory, store, size, seed)
        }
        Mode::Mempools | Mode::MempoolsMemalloc => {
            let memalloc = mode == Mode::MempoolsMemalloc;
            let memory = Mempools::new(&mm, &heads, &Bounds::STACK, memalloc);
            let memory = memory.map_err(Error::Alloc)?;
            let done = simulate(&mm, &heads, &memory, store, size, seed);
            left += memory.close();
            done
        }
        Mode::Reserves => {
            let memory = Reserves::new(&mm, &heads, &Bounds::STACK).map_err(Error::Alloc)?;
            let done = simulate(&mm, &heads, &memory, store, size, seed);
            let more;
            (nodes, more) = memory.close();
            left += more + nodes.iter().map(|node| node.usage).sum::<u64>();
            done
        }
    };
    if let Err(error) = mm.kmem_cache_destroy(heads) {
        left += error.live.max(1);
    }
    mm.shrink();
    let pages: u64 = PASSING.iter().map(|&kind| mm.pages_of(kind)).sum();
    let lost = left + pages + live(&mm).abs_diff(before);
    Ok(Run {
        end,
        asked,
        held,
        balanced: mm.ledger().balanced,
        lost,
        nodes,
        corruptions: corruptions.load(Ordering::Relaxed),
        seconds: start.elapsed().as_secs_f64(),
    })
}

fn simulate(
    mm: &Mm<Host>,
    heads: &Cache<'_>,
    memory: &dyn Memory,
    store: &mut Store,
    size: Size,
    seed: u64,
) -> (End, [Asked; Site::COUNT], [Held; 4]) {
    let book = Book::new(mm, memory);
    let end = World::new(mm, heads, &book, store, size, seed).go();
    (end, Site::ALL.map(|site| book.asked(site)), book.held())
}
