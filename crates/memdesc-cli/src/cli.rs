//! The command line.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::scenario::swap_net::Mode;

const EXIT_CODES: &str = "\
Exit codes:
  0  all is well
  1  something failed: an allocation where Linux had none fail, a ledger that does not balance, a page that did not come back,
     contents that were overwritten
  2  wrong usage, or nothing could be replayed
  3  the recording breaks off; what was good of it is replayed, and all is well with that";

/// A memory manager in which struct page is one word: what it would do on your machine.
#[derive(Debug, Parser)]
#[command(name = "memdesc", version, after_help = EXIT_CODES)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Replay what a Linux kernel's allocators did on ours, and report
    #[command(after_help = EXIT_CODES)]
    Replay(Replay),
    /// Cut the beginning of a recording out, with the snapshots before it
    Cut(Cut),
    /// What metadata costs, a page, for memory that is all of one kind
    Ledger(LedgerArgs),
    /// Interrupt threads that allocate, thousands of times a second, with handlers that allocate as well, and see that nothing breaks
    #[command(after_help = EXIT_CODES)]
    Storm(StormArgs),
    /// Run a workload on a machine of its own, and see whether all that should be served is
    #[command(after_help = EXIT_CODES)]
    Scenario {
        #[command(subcommand)]
        what: Scenario,
    },
    /// Measure side by side with what one would use instead
    Bench {
        #[command(subcommand)]
        what: Bench,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum Scenario {
    /// Memory full of file pages, then anonymous demand: does reclaim keep up?
    PageCache(PageCacheArgs),
    /// Eight address spaces on two CPUs that fork, fault, unmap, move, compact and reclaim, with allocations failing at random
    AddressSpaces(AddressSpacesArgs),
    /// A spike of memory that is freed again: does the process give it back?
    FreePageReporting(FreePageReportingArgs),
    /// Pages compressed with lz4, stored, read back, half of them freed, compacted: how dense are they, beside Linux's zsmalloc?
    Zsmalloc(ZsmallocArgs),
    /// Everything that memory can be used for, all at the same time, at random, while pages fail and allocations fail on purpose
    Purposes(PurposesArgs),
    /// Swap over a network whose stack needs memory itself: which machines lock up, with what kind of reserve?
    SwapNet(SwapNetArgs),
}

#[derive(Debug, Args)]
pub(crate) struct SwapNetArgs {
    /// Where the network stack's memory comes from
    #[arg(long, value_name = "WHAT", default_value = "all")]
    pub(crate) with: SwapNetWith,
    /// So many machines for each, one a seed from 1 on
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    pub(crate) seeds: u64,
    /// Only this one, with a full report
    #[arg(long, value_name = "N", conflicts_with = "seeds")]
    pub(crate) seed: Option<u64>,
    /// So many MiB of memory
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u32).range(16..=64))]
    pub(crate) mib: u32,
    /// The working set is so many times memory
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(2..=16))]
    pub(crate) working_set: u32,
    /// So often a page is touched, by all processes together
    #[arg(long, value_name = "N", default_value_t = 10_000, value_parser = clap::value_parser!(u64).range(1000..=100_000_000))]
    pub(crate) touches: u64,
    /// `vm.min_free_kbytes`, rather than what Linux makes it for so much memory: what only those get who may go below the marks
    #[arg(long, value_name = "N")]
    pub(crate) min_free_kbytes: Option<u64>,
    /// So many seconds of simulated time nothing may get on, all caches empty, before it is said that a machine is locked up
    #[arg(long, value_name = "S", default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub(crate) patience: u64,
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
    /// No progress bar
    #[arg(long, short)]
    pub(crate) quiet: bool,
}

/// Where the network stack's memory comes from.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub(crate) enum SwapNetWith {
    /// A tree of reserves, sized by the stack's own bounds
    Reserves,
    /// Mempools of heads and of pages; data from kmalloc at GFP_ATOMIC
    Mempools,
    /// The same, and data from whatever is left if there is no ordinary memory (not among all)
    MempoolsMemalloc,
    /// Ordinary memory, then whatever is left, without a bound: as in Linux
    Nothing,
    /// Nothing, mempools, reserves
    All,
}

impl SwapNetWith {
    pub(crate) fn modes(self) -> &'static [Mode] {
        match self {
            SwapNetWith::Nothing => &[Mode::Nothing],
            SwapNetWith::Mempools => &[Mode::Mempools],
            SwapNetWith::Reserves => &[Mode::Reserves],
            SwapNetWith::MempoolsMemalloc => &[Mode::MempoolsMemalloc],
            SwapNetWith::All => &Mode::ALL,
        }
    }
}

/// What all that runs at random has.
#[derive(Debug, Args)]
pub(crate) struct Run {
    /// Where the random numbers begin
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) seed: u64,
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
    /// No progress bars
    #[arg(long, short)]
    pub(crate) quiet: bool,
}

#[derive(Debug, Args)]
pub(crate) struct FreePageReportingArgs {
    /// So many MiB of memory
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u32).range(64..=65_536))]
    pub(crate) mib: u32,
    /// Report free blocks of this order and above
    #[arg(long, value_name = "N", default_value_t = 9, value_parser = order)]
    pub(crate) order: usize,
    #[command(flatten)]
    pub(crate) run: Run,
}

fn order(text: &str) -> Result<usize, String> {
    let n: usize = text.parse().map_err(|_| format!("{text:?} is no number"))?;
    (n <= 10)
        .then_some(n)
        .ok_or_else(|| format!("order {n}: 0 to 10"))
}

#[derive(Debug, Args)]
pub(crate) struct PurposesArgs {
    /// So long
    #[arg(long, value_name = "S", default_value_t = 10)]
    pub(crate) seconds: u64,
    /// So many MiB of memory
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = clap::value_parser!(u32).range(64..=65_536))]
    pub(crate) mib: u32,
    /// What is done with free pages: all, none, default (all but debug_pagealloc), or a list of init_on_alloc, init_on_free,
    /// page_poison, page_reporting, debug_pagealloc
    #[arg(long, value_name = "LIST", default_value = "default", value_parser = services)]
    pub(crate) services: Services,
    /// One allocation in so many fails on purpose; 0: none
    #[arg(long, value_name = "N", default_value_t = 3000)]
    pub(crate) fail_one_in: u32,
    /// Record whole call stacks with whoever has memory: about half as fast
    #[arg(long)]
    pub(crate) stacks: bool,
    #[command(flatten)]
    pub(crate) run: Run,
}

/// What can be done with free pages.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Service {
    InitOnAlloc,
    InitOnFree,
    PagePoison,
    PageReporting,
    DebugPagealloc,
}

impl Service {
    const ALL: [(Service, &str); 5] = [
        (Service::InitOnAlloc, "init_on_alloc"),
        (Service::InitOnFree, "init_on_free"),
        (Service::PagePoison, "page_poison"),
        (Service::PageReporting, "page_reporting"),
        (Service::DebugPagealloc, "debug_pagealloc"),
    ];
}

/// Those that are on.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Services(Vec<Service>);

impl Services {
    pub(crate) fn has(&self, service: Service) -> bool {
        self.0.contains(&service)
    }
}

impl std::fmt::Display for Services {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let on = Service::ALL
            .iter()
            .filter(|(service, _)| self.has(*service));
        let names: Vec<_> = on.map(|(_, name)| *name).collect();
        f.write_str(if names.is_empty() { "none" } else { "" })?;
        f.write_str(&names.join(","))
    }
}

fn services(text: &str) -> Result<Services, String> {
    let all = Service::ALL.map(|(service, _)| service);
    match text {
        "all" => return Ok(Services(all.to_vec())),
        "none" => return Ok(Services(Vec::new())),
        "default" => return Ok(Services(all[..4].to_vec())),
        _ => {}
    }
    let one = |name: &str| {
        let found = Service::ALL.iter().find(|(_, known)| *known == name);
        let known: Vec<_> = Service::ALL.iter().map(|(_, known)| *known).collect();
        found.map(|(service, _)| *service).ok_or_else(|| {
            format!(
                "{name:?} is none of {}, all, none, default",
                known.join(", ")
            )
        })
    };
    text.split(',')
        .map(one)
        .collect::<Result<_, _>>()
        .map(Services)
}

#[derive(Debug, Args)]
pub(crate) struct PageCacheArgs {
    /// So many MiB of memory
    #[arg(long, value_name = "MIB", default_value_t = 256, value_parser = clap::value_parser!(u32).range(64..=65_536))]
    pub(crate) memory: u32,
    #[command(flatten)]
    pub(crate) run: Run,
}

#[derive(Debug, Args)]
pub(crate) struct ZsmallocArgs {
    /// So many pages are compressed and stored
    #[arg(long, value_name = "N", default_value_t = 1_000_000, value_parser = clap::value_parser!(u32).range(100..=16_000_000))]
    pub(crate) objects: u32,
    #[command(flatten)]
    pub(crate) run: Run,
}

#[derive(Debug, Args)]
pub(crate) struct AddressSpacesArgs {
    /// So long
    #[arg(long, value_name = "S", default_value_t = 10)]
    pub(crate) seconds: u64,
    /// One allocation in so many fails on purpose; 0: none
    #[arg(long, value_name = "N", default_value_t = 500)]
    pub(crate) fail_one_in: u32,
    #[command(flatten)]
    pub(crate) run: Run,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Bench {
    /// Deferred frees: kvfree_rcu, prepaid and call_rcu beside crossbeam-epoch, seize, haphazard, and liburcu where it is installed
    Rcu(BenchRcu),
}

#[derive(Debug, Args)]
pub(crate) struct BenchRcu {
    /// With so many threads, each number in turn
    #[arg(long, value_name = "N,...", value_delimiter = ',', default_value = "1,2", value_parser = threads)]
    pub(crate) threads: Vec<usize>,
    /// So many objects a thread and round
    #[arg(long, value_name = "N", default_value_t = 1_000_000, value_parser = clap::value_parser!(u64).range(1000..))]
    pub(crate) objects: u64,
    /// So many rounds, in each of which every scheme has its turn
    #[arg(long, value_name = "N", default_value_t = 7, value_parser = rounds)]
    pub(crate) rounds: usize,
    /// Only these schemes, and the floors they stand on
    #[arg(long, value_name = "NAME,...", value_delimiter = ',')]
    pub(crate) only: Vec<String>,
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
    /// No progress bar
    #[arg(long, short)]
    pub(crate) quiet: bool,
}

fn threads(text: &str) -> Result<usize, String> {
    let n: usize = text.parse().map_err(|_| format!("{text:?} is no number"))?;
    (1..=64)
        .contains(&n)
        .then_some(n)
        .ok_or_else(|| format!("{n} threads: 1 to 64"))
}

fn rounds(text: &str) -> Result<usize, String> {
    let n: usize = text.parse().map_err(|_| format!("{text:?} is no number"))?;
    (1..=1000)
        .contains(&n)
        .then_some(n)
        .ok_or_else(|| format!("{n} rounds: 1 to 1000"))
}

#[derive(Debug, Args)]
pub(crate) struct Replay {
    /// A folder with events.txt[.zst|.gz] and snapshots, a file of events (`perf script -F cpu,time,event,trace`, ftrace's
    /// `trace`), or - for standard input. Without it, a recording that is inside the program
    pub(crate) recording: Option<PathBuf>,
    /// Print one JSON object instead of the report. Counts of pages are of blocks; `*_pages` count pages
    #[arg(long)]
    pub(crate) json: bool,
    /// Begin with empty memory, whatever the snapshot says
    #[arg(long)]
    pub(crate) no_snapshot: bool,
    /// Replay pages only: Linux's slab pages as pages, no objects
    #[arg(long)]
    pub(crate) pages_only: bool,
    /// So many CPUs, rather than those in the events
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub(crate) cpus: Option<u16>,
    /// So much memory from address 0, rather than what the snapshot or the events say (24G, 512M)
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub(crate) memory: Option<u64>,
    /// Only the first N events
    #[arg(long, value_name = "N")]
    pub(crate) limit: Option<usize>,
    /// Where Linux maps physical address 0, if it is not found by itself
    #[arg(long, value_name = "ADDRESS", value_parser = address)]
    pub(crate) direct_map_base: Option<u64>,
    /// Free so many percent of the objects after a grace period (`kvfree_rcu`), and show how many lie about
    #[arg(long, value_name = "PERCENT", value_parser = percent)]
    pub(crate) rcu: Option<f64>,
    /// A grace period takes at least so many milliseconds of the recording's time
    #[arg(long, value_name = "MS", default_value_t = 10.0, value_parser = milliseconds, requires = "rcu")]
    pub(crate) rcu_grace: f64,
    /// No progress bars, no warnings
    #[arg(long, short)]
    pub(crate) quiet: bool,
}

fn percent(text: &str) -> Result<f64, String> {
    let wrong = || format!("{text:?} is no share: 10%, 0.5, at most 100");
    let n: f64 = text.trim_end_matches('%').parse().map_err(|_| wrong())?;
    (0.0..=100.0).contains(&n).then_some(n).ok_or_else(wrong)
}

fn milliseconds(text: &str) -> Result<f64, String> {
    let wrong = || format!("{text:?} is no time in milliseconds: 0.1 to 10000");
    let n: f64 = text.parse().map_err(|_| wrong())?;
    (0.1..=10_000.0).contains(&n).then_some(n).ok_or_else(wrong)
}

#[derive(Debug, Args)]
pub(crate) struct Cut {
    /// A recording, as for replay
    pub(crate) recording: PathBuf,
    /// The folder to make: events.txt.zst and the snapshots before it
    #[arg(long, value_name = "DIR", required_unless_present = "binary")]
    pub(crate) out: Option<PathBuf>,
    /// The file to make, of the events alone, in binary: for the image on bare metal, and for replay
    #[arg(long, value_name = "FILE")]
    pub(crate) binary: Option<PathBuf>,
    /// So many events from the beginning
    #[arg(long, value_name = "N", required_unless_present_any = ["seconds", "binary"])]
    pub(crate) events: Option<usize>,
    /// So much time from the beginning
    #[arg(long, value_name = "S")]
    pub(crate) seconds: Option<f64>,
    /// Leave out this many events at the beginning; the snapshots stay behind then
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) from_events: usize,
}

#[derive(Debug, Args)]
pub(crate) struct LedgerArgs {
    /// Of a machine with so much memory
    #[arg(long, value_name = "SIZE", value_parser = size, default_value = "1G")]
    pub(crate) memory: u64,
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
#[command(mut_arg("json", |arg| arg.help("Print a JSON array, an object for each configuration")))]
pub(crate) struct StormArgs {
    /// So long for each configuration
    #[arg(long, value_name = "S", default_value_t = 10)]
    pub(crate) seconds: u64,
    /// So many interrupts a second for each thread; a third as many strike on top of everything, the other handler included
    #[arg(long, value_name = "N", default_value_t = 20_000, value_parser = clap::value_parser!(u32).range(10..=1_000_000))]
    pub(crate) hz: u32,
    /// One configuration rather than all three
    #[arg(long)]
    pub(crate) config: Option<StormConfig>,
    #[command(flatten)]
    pub(crate) run: Run,
}

/// On what kind of machine it storms.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub(crate) enum StormConfig {
    /// Two CPUs
    Smp,
    /// One CPU
    Up,
    /// A real-time kernel: locks that sleep, and fewer CPUs than threads
    Rt,
}

impl StormConfig {
    /// As on the command line.
    pub(crate) fn name(self) -> &'static str {
        match self {
            StormConfig::Smp => "smp",
            StormConfig::Up => "up",
            StormConfig::Rt => "rt",
        }
    }
}

/// `24G`, `512M`, `1048576`.
fn size(text: &str) -> Result<u64, String> {
    let wrong = || format!("{text:?} is no size: 512M, 24G");
    let upper = text.trim().to_ascii_uppercase();
    let plain = upper.trim_end_matches("IB").trim_end_matches('B');
    let (number, shift) = match plain.char_indices().last().ok_or_else(wrong)? {
        (i, 'K') => (&plain[..i], 10),
        (i, 'M') => (&plain[..i], 20),
        (i, 'G') => (&plain[..i], 30),
        (i, 'T') => (&plain[..i], 40),
        _ => (plain, 0),
    };
    let number: u64 = number.trim().parse().map_err(|_| wrong())?;
    let bytes = number.checked_mul(1 << shift).filter(|&b| b >= 1 << 20);
    bytes.ok_or_else(|| format!("{text}: at least 1M and less than 16E"))
}

/// `0xffff888000000000`.
fn address(text: &str) -> Result<u64, String> {
    let hex = text.trim_start_matches("0x").replace('_', "");
    u64::from_str_radix(&hex, 16).map_err(|_| format!("{text:?} is no address: 0xffff888000000000"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_line_is_sound() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn sizes() {
        assert_eq!(size("24G"), Ok(24 << 30));
        assert_eq!(size("512MiB"), Ok(512 << 20));
        assert_eq!(size("1048576"), Ok(1 << 20));
        assert!(
            size("").is_err()
                && size("G").is_err()
                && size("4k").is_err()
                && size("99999999999T").is_err()
        );
        assert_eq!(address("0xffff888000000000"), Ok(0xffff_8880_0000_0000));
    }
}
