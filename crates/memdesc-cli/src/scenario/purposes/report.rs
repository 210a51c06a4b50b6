//! What is said of it.

use std::fmt::Write as _;

use memdesc::Event;
use serde_json::{Value, json};

use super::check::Checked;
use super::{COUNTS, Shared};
use crate::cli::PurposesArgs;

/// How it went.
pub(super) struct Outcome {
    pub(super) seconds: f64,
    pub(super) mib: u32,
    pub(super) seed: u64,
    pub(super) services: String,
    pub(super) counts: Vec<u64>,
    pub(super) events: Vec<(&'static str, u64)>,
    pub(super) points: u64,
    pub(super) failures: u64,
    pub(super) looks: u64,
    pub(super) figures: Vec<(&'static str, u64)>,
    pub(super) wrong: u64,
    pub(super) texts: Vec<String>,
    pub(super) own: u64,
    pub(super) balanced: bool,
    pub(super) lost: u64,
    pub(super) zombies: u64,
    /// Free pages were inaccessible to the end, if that was asked for.
    pub(super) guarded: bool,
}

impl Outcome {
    pub(super) fn new(
        args: &PurposesArgs,
        shared: &Shared<'_>,
        checked: &Checked,
        points: u64,
        failures: u64,
    ) -> Outcome {
        let mm = shared.mm;
        let events = [
            Event::PgAlloc,
            Event::SlabAlloc,
            Event::PgSteal,
            Event::PgMigrateSuccess,
            Event::CompactSuccess,
            Event::SlowPath,
            Event::PgReported,
        ];
        let depot = mm.stack_depot_info();
        Outcome {
            seconds: 0.0,
            mib: args.mib,
            seed: args.run.seed,
            services: args.services.to_string(),
            counts: Vec::new(),
            events: events.iter().map(|&e| (e.name(), mm.event(e))).collect(),
            points,
            failures,
            looks: checked.looks,
            figures: vec![
                ("pages free at least", checked.least_free.unwrap_or(0)),
                ("pages bad at most", checked.most_bad),
                ("pages in the balloon at most", checked.most_balloon),
                ("device pages in use at most", checked.most_device),
                ("entries of users at most", checked.entries),
                ("bytes of call stacks", depot.used as u64),
            ],
            wrong: 0,
            texts: Vec::new(),
            own: 0,
            balanced: false,
            lost: 0,
            zombies: 0,
            guarded: true,
        }
    }

    pub(super) fn ok(&self) -> bool {
        self.wrong == 0 && self.balanced && self.lost == 0 && self.zombies == 0
    }

    fn all(&self) -> impl Iterator<Item = (&'static str, u64)> {
        let counts = COUNTS
            .iter()
            .zip(&self.counts)
            .map(|((_, name), &n)| (*name, n));
        let events = self.events.iter().copied();
        counts.chain(events)
    }
}

pub(super) fn report(outcome: &Outcome) -> String {
    let mut text = String::new();
    let mut line = |s: String| {
        let _ = writeln!(text, "{s}");
    };
    line(format!(
        "everything at once: 3 threads, 2 CPUs, {} MiB, seed {}, services: {}, {:.0} s",
        outcome.mib, outcome.seed, outcome.services, outcome.seconds
    ));
    let all: Vec<_> = outcome.all().collect();
    let half = all.len().div_ceil(2);
    for nth in 0..half {
        let column = |at: usize| {
            let (name, n) = all.get(at)?;
            Some(format!("  {name:<32}{n:>12}"))
        };
        line(
            [column(nth), column(half + nth)]
                .into_iter()
                .flatten()
                .collect(),
        );
    }
    for (name, n) in &outcome.figures {
        line(format!("  {name:<32}{n:>12}"));
    }
    line(format!(
        "  {} of {} allocations failed on purpose",
        outcome.failures, outcome.points
    ));
    if !outcome.guarded {
        line("  free pages were inaccessible only until the process had as many mappings as it may have".to_owned());
    }
    line(format!(
        "  checked {} times while all stood still: ledger, words, lists, counts, charges, tables, areas, census",
        outcome.looks
    ));
    line(format!(
        "  at the end everything was let go: ledger {}, {} pages lost, {} groups left",
        if outcome.balanced {
            "balanced"
        } else {
            "NOT balanced"
        },
        outcome.lost,
        outcome.zombies
    ));
    for what in &outcome.texts {
        line(format!("  WRONG: {what}"));
    }
    line(match outcome.wrong {
        0 => "  nothing is wrong".to_owned(),
        n => format!("  {n} things are WRONG; again with --seed {}", outcome.seed),
    });
    text
}

pub(super) fn object(outcome: &Outcome) -> Value {
    let pairs = |all: &mut dyn Iterator<Item = (&'static str, u64)>| -> serde_json::Map<_, _> {
        all.map(|(name, n)| (name.to_owned(), json!(n))).collect()
    };
    json!({
        "seconds": outcome.seconds,
        "mib": outcome.mib,
        "seed": outcome.seed,
        "services": outcome.services,
        "counts": pairs(&mut outcome.all()),
        "figures": pairs(&mut outcome.figures.iter().copied()),
        "fault_points": outcome.points,
        "faults_injected": outcome.failures,
        "checks": outcome.looks,
        "wrong": outcome.wrong,
        "what": outcome.texts,
        "balanced": outcome.balanced,
        "lost_pages": outcome.lost,
        "groups_left": outcome.zombies,
        "guarded": outcome.guarded,
        "ok": outcome.ok(),
    })
}
