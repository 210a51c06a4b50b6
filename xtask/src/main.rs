//! What a developer of memdesc runs. `cargo xtask test` is all that CI runs, and sets up what it lacks.

mod balloon;
mod metal;
mod recordings;
mod steps;

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
    /// The bare-metal image: builds it, boots it in QEMU with 1, 2 and 4 CPUs and 64 MiB to 64 GiB, and has it test itself.
    Metal {
        /// Print the machines' logs.
        #[arg(long, short)]
        verbose: bool,
        /// Only the machines with this in their names.
        #[arg(long, default_value = "")]
        only: String,
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
            runner.metal(!quick, false, "");
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
        Command::Metal { verbose, only } => runner.metal(true, verbose, &only),
        Command::Replay { recordings } => runner.replay(&recordings),
    }
    runner.finish()
}
