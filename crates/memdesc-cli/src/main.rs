//! The command `memdesc`: replays what a real Linux kernel's allocators did, and says what it found; and tries the memory manager hard.

mod bench;
mod cli;
mod cut;
mod error;
mod handles;
mod ledger;
mod output;
mod progress;
mod replay;
mod report;
mod rng;
mod scenario;
mod storm;

use std::process::ExitCode;

use clap::Parser;

use cli::{Cli, Command};
use error::Error;

/// The allocator that peers are measured with.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// Something failed.
const FAILED: u8 = 1;
/// Nothing could be done.
const NOTHING: u8 = 2;
/// The recording broke off.
const BROKEN_OFF: u8 = 3;

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Replay(args) => replay_command(&args),
        Command::Cut(args) => cut::run(&args).map(|text| {
            output::print(&text);
            0
        }),
        Command::Ledger(args) => ledger::run(&args),
        Command::Storm(args) => storm::run(&args),
        Command::Scenario { what } => match what {
            cli::Scenario::PageCache(args) => scenario::page_cache::run(&args),
            cli::Scenario::FreePageReporting(args) => scenario::free_page_reporting::run(&args),
            cli::Scenario::AddressSpaces(args) => scenario::address_spaces::run(&args),
            cli::Scenario::Zsmalloc(args) => scenario::zsmalloc::run(&args),
            cli::Scenario::Purposes(args) => scenario::purposes::run(&args),
            cli::Scenario::SwapNet(args) => scenario::swap_net::run(&args),
        },
        Command::Bench {
            what: cli::Bench::Rcu(args),
        } => bench::rcu(&args),
    };
    match result {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("memdesc: {error}");
            ExitCode::from(NOTHING)
        }
    }
}

fn replay_command(args: &cli::Replay) -> Result<u8, Error> {
    let options = replay::Options {
        path: args.recording.clone(),
        no_snapshot: args.no_snapshot,
        pages_only: args.pages_only,
        cpus: args.cpus.map(usize::from),
        memory: args.memory,
        limit: args.limit,
        direct_map_base: args.direct_map_base,
        rcu: args.rcu.map(|percent| (percent, args.rcu_grace)),
        quiet: args.quiet,
    };
    let replay = replay::run(&options)?;
    output::print_found(
        args.json,
        || report::json::object(&replay),
        || report::text::report(&replay),
    );
    if args.rcu.is_some() && replay.backlog.is_none() {
        eprintln!("memdesc: --rcu: there are no objects among the events, so no free was deferred");
    }
    let failures = replay.failures();
    for failure in &failures {
        eprintln!("memdesc: {failure}");
    }
    let truncated = replay.source.recording.truncated.as_ref();
    if let Some(truncated) = truncated {
        eprintln!(
            "memdesc: {}: {truncated}; what came before is replayed",
            replay.source.name
        );
    }
    Ok(match (failures.is_empty(), truncated) {
        (false, _) => FAILED,
        (true, Some(_)) => BROKEN_OFF,
        (true, None) => 0,
    })
}
