//! `memdesc bench`: side by side with what a user would pick instead.

use std::fmt::Write as _;

use memdesc_bench::rcu::{self, Options, Outcome, Row, median};
use serde_json::json;

use crate::cli::BenchRcu;
use crate::error::Error;
use crate::{output, progress};

/// Runs `memdesc bench rcu`; says how it ended.
pub(crate) fn rcu(args: &BenchRcu) -> Result<u8, Error> {
    let options = Options {
        threads: args.threads.clone(),
        objects: args.objects,
        rounds: args.rounds,
        only: args.only.clone(),
    };
    let bar = progress::share(args.quiet, "measuring");
    let outcome = rcu::run(&options, |done| bar.set_position((done * 1000.0) as u64))
        .map_err(|why| Error::Usage(why.to_string()))?;
    bar.finish_and_clear();
    output::print_found(
        args.json,
        || object(&options, &outcome),
        || table(&options, &outcome),
    );
    Ok(0)
}

fn cores() -> usize {
    std::thread::available_parallelism().map_or(0, usize::from)
}

fn table(options: &Options, outcome: &Outcome) -> String {
    let mut text = String::new();
    let mut line = |s: String| {
        let _ = writeln!(text, "{s}");
    };
    line(format!(
        "Objects of {} bytes, swapped in and given up; {} a thread and round, medians of {} interleaved rounds on {} cores.",
        rcu::OBJECT,
        options.objects,
        options.rounds,
        cores()
    ));
    line("The crates and liburcu use the process's allocator, jemalloc; memdesc its own kmalloc. Each is held against its own floor.".into());
    line(format!(
        "\n{:<20}{:>8}{:>11}{:>12}{:>8}{:>10}{:>14}",
        "", "threads", "ns/object", "over floor", "ratio", "ns/read", "peak backlog"
    ));
    for row in &outcome.rows {
        let ns = median(&row.ns);
        let ratio = ns / (ns - row.over_floor);
        line(format!(
            "{:<20}{:>8}{:>11.1}{:>12.1}{:>8.2}{:>10.2}{:>14}{}",
            row.name,
            row.threads,
            ns,
            row.over_floor,
            ratio,
            median(&row.read_ns),
            row.peak,
            if row.all_freed {
                ""
            } else {
                "  (not all freed in a second)"
            }
        ));
    }
    for (name, why) in &outcome.missing {
        line(format!("{name:<20}{why}"));
    }
    text
}

fn object(options: &Options, outcome: &Outcome) -> serde_json::Value {
    let rows: Vec<_> = outcome.rows.iter().map(row).collect();
    let missing: Vec<_> = outcome
        .missing
        .iter()
        .map(|(name, why)| json!({ "name": name, "why": why }))
        .collect();
    json!({
        "object_bytes": rcu::OBJECT,
        "objects": options.objects,
        "rounds": options.rounds,
        "cores": cores(),
        "rows": rows,
        "missing": missing,
    })
}

fn row(row: &Row) -> serde_json::Value {
    json!({
        "name": row.name,
        "threads": row.threads,
        "ns_per_object": median(&row.ns),
        "ns_per_object_min": row.ns.first(),
        "ns_per_object_max": row.ns.last(),
        "ns_over_floor": row.over_floor,
        "ns_per_read": median(&row.read_ns),
        "peak_backlog": row.peak,
        "all_freed": row.all_freed,
    })
}
