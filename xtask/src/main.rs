//! What a developer of memdesc runs. `cargo xtask test` is all that CI runs, and sets up what it lacks.

mod balloon;
mod metal;
mod qemu;
mod recordings;
mod replay_metal;
mod steps;
mod targets;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use steps::Runner;

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Checks of memdesc")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Everything: format, lints, tests, models, Miri, docs, and the replay.
    Test {
        /// Replay the recordings in this folder too, and hold them to the numbers.
        #[arg(long, env = "MEMDESC_RECORDINGS")]
        recordings: Option<PathBuf>,
        /// Leave out what takes minutes: models and Miri.
        #[arg(long)]
        quick: bool,
    },
    /// The model checks under loom.
    Loom {
        /// Without a bound on preemptions. Takes long.
        #[arg(long)]
        full: bool,
    },
    /// The core's tests under Miri, with strict provenance. Wants a nightly toolchain.
    Miri {
        /// The integration tests too, in small. Takes an hour or more.
        #[arg(long)]
        all: bool,
    },
    /// The owner map and the other threaded tests, for a long time; the core's tests with each free-page service.
    Stress {
        /// Seconds for each test.
        #[arg(long, default_value_t = 60)]
        seconds: u64,
    },
    /// The minimal kernel (`examples/minimal-kernel`), and the core, for x86-64, 64-bit ARM and RISC-V: builds them, and boots it on each. A part of `metal`.
    Targets {
        /// Print the machines' logs.
        #[arg(long, short)]
        verbose: bool,
    },
    /// The bare-metal image: builds it, boots it in QEMU with 1, 2 and 4 CPUs and 64 MiB to 64 GiB, and has it test itself.
    Metal {
        /// Print the machines' logs.
        #[arg(long, short)]
        verbose: bool,
        /// Replay a recording on it and nothing else: a folder or a file as for `memdesc replay`, the built-in one without a value.
        #[arg(long, value_name = "RECORDING")]
        #[allow(clippy::option_option)]
        replay: Option<Option<PathBuf>>,
        /// So many events of it at most.
        #[arg(
            long,
            value_name = "N",
            default_value_t = 1_000_000,
            requires = "replay"
        )]
        events: usize,
        /// On machines with so much memory, as QEMU's `-m` has it.
        #[arg(long, value_name = "SIZE", requires = "replay")]
        memory: Option<String>,
        /// Only the machines with this in their names.
        #[arg(
            long,
            value_name = "WORD",
            default_value = "",
            hide_default_value = true
        )]
        only: String,
        /// Do everything that memory can be used for at the same time, for so long (90s, 10m, 1h): on a machine with 4 CPUs and 512 MiB, and then on one in which every lock is checked.
        #[arg(long, value_name = "DURATION")]
        soak: Option<humantime::Duration>,
        /// The soak's dice, as it prints them.
        #[arg(long, requires = "soak")]
        seed: Option<u64>,
    },
    /// Replays every recording in a folder and holds it to the numbers.
    Replay {
        /// A folder of recordings.
        recordings: PathBuf,
    },
}

fn main() -> ExitCode {
    let mut runner = Runner::default();
    match Cli::parse().command {
        Command::Test { recordings, quick } => {
            runner.format();
            runner.lint();
            runner.tests();
            if !quick {
                runner.free_pages(false);
                runner.loom(Some(3));
                runner.miri(false);
            }
            runner.docs();
            runner.storm(if quick { 2 } else { 20 });
            runner.scenarios(if quick { 5 } else { 60 });
            runner.swap_net(if quick { 20 } else { 300 });
            runner.everything(if quick { 5 } else { 20 });
            runner.targets(false);
            runner.metal(!quick, "", false);
            runner.metal_replay(None, usize::MAX, None, false);
            runner.replay_built_in();
            if let Some(folder) = recordings {
                runner.replay(&folder);
            }
        }
        Command::Loom { full } => runner.loom((!full).then_some(3)),
        Command::Miri { all } => runner.miri(all),
        Command::Stress { seconds } => {
            runner.stress(seconds);
            runner.free_pages(true);
            runner.storm(seconds);
            runner.scenarios(seconds);
            runner.everything(seconds);
            runner.swap_net(2000);
        }
        Command::Targets { verbose } => runner.targets(verbose),
        Command::Metal {
            verbose,
            replay: Some(recording),
            events,
            memory,
            ..
        } => {
            let memory = memory.as_deref();
            runner.metal_replay(recording.as_deref(), events, memory, verbose);
        }
        Command::Metal {
            verbose,
            soak: Some(how_long),
            only,
            seed,
            ..
        } => runner.soak(how_long.into(), seed, &only, verbose),
        Command::Metal { verbose, only, .. } => {
            runner.targets(verbose);
            runner.metal(true, &only, verbose);
            runner.metal_replay(None, usize::MAX, None, verbose);
        }
        Command::Replay { recordings } => runner.replay(&recordings),
    }
    runner.finish()
}
