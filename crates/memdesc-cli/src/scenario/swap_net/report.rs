//! What is said of it.

use std::fmt::Write as _;

use serde_json::{Value, json};

use super::memory::{Asked, Site};
use super::reserves::Node;
use super::settings::{Bounds, Size, Weather};
use super::sim::{LOOK, Stuck};
use super::{Mode, Run};
use crate::cli::SwapNetArgs;

/// All runs of a mode.
pub(super) struct Tally {
    pub(super) mode: Mode,
    seeds: u64,
    locked: Vec<u64>,
    /// The first machine that came to a stop.
    stuck: Option<(u64, Stuck)>,
    /// Seeds with wrong contents, a ledger that does not balance, or something lost.
    unsound: Vec<u64>,
    wrong: u64,
    unbalanced: u64,
    lost: u64,
    seconds: f64,
    counts: [u64; COUNTS.len()],
    asked: [Asked; Site::COUNT],
    most: [u64; 4],
    most_early: usize,
    /// The tree of reserves, each at its highest.
    nodes: Vec<Node>,
}

/// What is counted, and added up.
const COUNTS: [&str; 23] = [
    "simulated_ns",
    "events",
    "touches",
    "swap_outs",
    "swap_ins",
    "clean_pages_dropped",
    "waits",
    "packets_sent",
    "acks_sent",
    "retransmits",
    "server_retransmits",
    "frames_received",
    "lost",
    "duplicated",
    "reordered",
    "no_receive_page",
    "no_receive_head",
    "dropped_after_the_look",
    "too_early_or_here_already",
    "queued_by_others",
    "not_queued_by_others",
    "read_by_others",
    "refused_to_others",
];

impl Tally {
    pub(super) fn new(mode: Mode) -> Tally {
        Tally {
            mode,
            seeds: 0,
            locked: Vec::new(),
            stuck: None,
            unsound: Vec::new(),
            wrong: 0,
            unbalanced: 0,
            lost: 0,
            seconds: 0.0,
            counts: [0; COUNTS.len()],
            asked: Default::default(),
            most: [0; 4],
            most_early: 0,
            nodes: Vec::new(),
        }
    }

    pub(super) fn add(&mut self, seed: u64, run: Run) {
        self.seeds += 1;
        self.seconds += run.seconds;
        if !run.sound() {
            self.unsound.push(seed);
        }
        self.wrong += run.end.wrong + run.corruptions;
        self.unbalanced += u64::from(!run.balanced);
        self.lost += run.lost;
        let end = run.end;
        let counts = [
            end.simulated,
            end.events,
            end.swapped.touched,
            end.swapped.outs,
            end.swapped.ins,
            end.swapped.clean,
            end.swapped.waits,
            end.packets,
            end.acks,
            end.resent,
            end.server_resent,
            end.received,
            end.lost,
            end.doubled,
            end.late,
            end.no_page,
            end.no_head,
            end.after_look,
            end.useless,
            end.for_others,
            end.others_full,
            end.others_read,
            end.others_refused,
        ];
        for (sum, n) in self.counts.iter_mut().zip(counts) {
            *sum += n;
        }
        for (sum, asked) in self.asked.iter_mut().zip(run.asked) {
            sum.times += asked.times;
            sum.refused += asked.refused;
            sum.emergency += asked.emergency;
        }
        for (most, held) in self.most.iter_mut().zip(run.held) {
            *most = (*most).max(held.most);
        }
        self.most_early = self.most_early.max(end.most_early);
        if self.nodes.is_empty() {
            self.nodes = run.nodes;
        } else {
            for (node, now) in self.nodes.iter_mut().zip(run.nodes) {
                node.max_taken_pages = node.max_taken_pages.max(now.max_taken_pages);
                node.max_usage = node.max_usage.max(now.max_usage);
                node.refusals += now.refusals;
            }
        }
        if let Some(stuck) = end.stuck {
            self.locked.push(seed);
            self.stuck.get_or_insert((seed, stuck));
        }
    }

    /// What is promised: nothing wrong, nothing lost; and with reserves that nothing is refused and every machine gets through.
    pub(super) fn ok(&self) -> bool {
        let refused = self.asked.iter().any(|asked| asked.refused > 0);
        self.unsound.is_empty()
            && (self.mode != Mode::Reserves || self.locked.is_empty() && !refused)
    }
}

/// A row: what it is, and what there is to say of each mode.
fn row(text: &mut String, name: &str, cells: impl IntoIterator<Item = String>) {
    let _ = write!(text, "  {name:<30}");
    for cell in cells {
        let _ = write!(text, "{cell:>22}");
    }
    let _ = writeln!(text);
}

pub(super) fn report(size: Size, args: &SwapNetArgs, tallies: &[Tally]) -> String {
    let bounds = Bounds::STACK;
    let seeds = match args.seed {
        Some(seed) => format!("seed {seed}{}", weather(seed)),
        None => format!("seeds 1 to {}", args.seeds),
    };
    let mut text = format!(
        "swap over a network: {} MiB of memory, a working set of {} MiB, {} processes that touch {} pages, {seeds}\n\n",
        size.memory >> 8,
        size.working_set >> 8,
        bounds.processes,
        size.touches,
    );
    let text_ref = &mut text;
    let mut line = |name: &str, of: &dyn Fn(&Tally) -> String| {
        row(text_ref, name, tallies.iter().map(of));
    };
    line("with", &|t| t.mode.name().into());
    line("machines", &|t| t.seeds.to_string());
    line("finished", &|t| {
        (t.seeds - t.locked.len() as u64).to_string()
    });
    line("LOCKED UP", &|t| t.locked.len().to_string());
    line("simulated, ms each", &|t| {
        format!("{:.1}", t.each(t.counts[0]) / 1e6)
    });
    line("wall, ms each", &|t| {
        format!("{:.1}", t.seconds * 1e3 / t.seeds.max(1) as f64)
    });
    for (nth, name) in COUNTS.iter().enumerate().skip(1) {
        line(&name.replace('_', " "), &|t| t.counts[nth].to_string());
    }
    line("memory asked for, and refused:", &|_| String::new());
    for (nth, site) in Site::ALL.iter().enumerate() {
        line(&format!("  {}", site.name()), &|t| {
            format!("{} {:>10}", t.asked[nth].times, t.asked[nth].refused)
        });
    }
    line("served by emergency memory", &|t| {
        let emergency = t.asked.iter().map(|asked| asked.emergency);
        emergency.sum::<u64>().to_string()
    });
    line("the stack had at most:", &|_| String::new());
    let bound = [
        ("  heads", bounds.heads()),
        ("  bytes of data", bounds.data()),
        ("  pages to receive into", bounds.receive_pages()),
        ("  fragments", bounds.fragments),
    ];
    for (nth, (name, _)) in bound.iter().enumerate() {
        line(name, &|t| t.most[nth].to_string());
    }
    line("  frames in reassembly", &|t| t.most_early.to_string());
    line("things WRONG", &|t| t.wrong.to_string());
    line("ledgers that do not balance", &|t| t.unbalanced.to_string());
    line("pages and objects lost", &|t| t.lost.to_string());
    let _ = writeln!(
        text,
        "\n  by its own bounds the stack needs at most {} heads, {} bytes of data, {} pages to receive into, {} fragments for swap; what it had beyond that \
         is in the sockets of others",
        bound[0].1, bound[1].1, bound[2].1, bound[3].1,
    );
    for tally in tallies {
        tally.say_stuck(&mut text);
        tally.say_tree(&mut text);
        if !tally.unsound.is_empty() {
            let _ = writeln!(
                text,
                "\n{}: WRONG with seeds {}",
                tally.mode.name(),
                list(&tally.unsound)
            );
        }
    }
    text
}

/// What it is like with this seed.
fn weather(seed: u64) -> String {
    let w = Weather::of(seed);
    let us = |ns: u64| ns / 1000;
    format!(
        "\n\n  of 1000 frames {} are lost, {} doubled, {} late; a frame for others every {} us, in a flood every {} us; of 100 packets {} are copied, {} go \
         through a fragment\n  others hold up to {} % of memory at GFP_ATOMIC, take up to {} % at once, and have a round every {} us; their sockets queue up to {} %",
        w.lost,
        w.doubled,
        w.late,
        us(w.noise_ns),
        us(w.flood_ns),
        w.copied,
        w.bounced,
        w.greed,
        w.burst,
        us(w.greed_ns),
        w.rcvbuf,
    )
}

/// The first numbers of a list.
fn list(seeds: &[u64]) -> String {
    let mut text: Vec<_> = seeds.iter().take(12).map(u64::to_string).collect();
    if seeds.len() > text.len() {
        text.push("...".into());
    }
    text.join(", ")
}

impl Tally {
    /// A sum over all seeds, for one of them.
    fn each(&self, sum: u64) -> f64 {
        sum as f64 / self.seeds.max(1) as f64
    }

    fn say_tree(&self, text: &mut String) {
        if self.nodes.is_empty() {
            return;
        }
        let _ = writeln!(
            text,
            "\nthe tree of reserves, over all seeds\n  {:<24}{:<10}{:>8}{:>12}{:>12}{:>12}{:>12}{:>10}",
            "", "", "pages", "most taken", "limit", "usage", "most", "refusals"
        );
        for node in &self.nodes {
            let name = format!("{:1$}{2}", "", node.depth * 2, node.name);
            // Pages are taken where something is guaranteed.
            let taken = match node.kind {
                "" => String::new(),
                _ => node.max_taken_pages.to_string(),
            };
            let _ = writeln!(
                text,
                "  {name:<24}{:<10}{:>8}{:>12}{:>12}{:>12}{:>12}{:>10}",
                node.kind, node.pages, taken, node.limit, node.usage, node.max_usage, node.refusals
            );
        }
    }

    fn say_stuck(&self, text: &mut String) {
        let Some((seed, stuck)) = &self.stuck else {
            return;
        };
        let mut line = |said: String| {
            let _ = writeln!(text, "{said}");
        };
        line(format!(
            "\n{}: locked up with seeds {}; seed {seed} like this:",
            self.mode.name(),
            list(&self.locked)
        ));
        line(format!(
            "  after {:.1} ms nothing got on any more; {:.0} ms later, with all caches emptied, nothing could be sent, and the server was not heard or had nothing to say",
            stuck.since as f64 / 1e6,
            (stuck.said - stuck.since) as f64 / 1e6
        ));
        line(format!(
            "  {} pages free, under the min mark of {}; {} processes wait for memory, {} for a page",
            stuck.free, stuck.min, stuck.processes.0, stuck.processes.1
        ));
        line(format!(
            "  {} pages wait to be written: {} packets are not acknowledged ({} of them never sent), {} requests have no packet yet; {} pages for frames to \
             come, {} frames wait for one before them",
            stuck.writing, stuck.unacked, stuck.unsent, stuck.jobs, stuck.ring, stuck.early
        ));
        let [heads, data, receive, fragments] = stuck.held.map(|held| held.now);
        line(format!(
            "  the stack has {heads} heads, {data} bytes of data, {receive} pages to receive into, {fragments} fragments; of these {} frames are in the \
             sockets of others, who have {} KiB besides",
            stuck.others.0,
            stuck.others.1 >> 10
        ));
        line(format!(
            "  in its last {:.0} ms it asked for",
            LOOK as f64 / 1e6
        ));
        for (site, asked) in Site::ALL.iter().zip(stuck.asked) {
            if asked.times > 0 {
                line(format!(
                    "    {:<20}{:>8} times, and was refused {:>8}",
                    site.name(),
                    asked.times,
                    asked.refused
                ));
            }
        }
    }
}

pub(super) fn object(size: Size, tallies: &[Tally]) -> Value {
    let modes = tallies.iter().map(|t| (t.mode.name().to_owned(), one(t)));
    let modes: serde_json::Map<_, _> = modes.collect();
    let bounds = Bounds::STACK;
    json!({
        "memory_pages": size.memory,
        "working_set_pages": size.working_set,
        "touches": size.touches,
        "bounds": {
            "heads": bounds.heads(),
            "data_bytes": bounds.data(),
            "receive_pages": bounds.receive_pages(),
            "fragments": bounds.fragments,
        },
        "modes": modes,
        "ok": tallies.iter().all(Tally::ok),
    })
}

fn one(t: &Tally) -> Value {
    let counts = COUNTS.iter().zip(t.counts);
    let counts: serde_json::Map<_, _> = counts.map(|(k, n)| ((*k).to_owned(), json!(n))).collect();
    let asked = Site::ALL.iter().zip(t.asked).map(|(site, asked)| {
        let said =
            json!({"times": asked.times, "refused": asked.refused, "emergency": asked.emergency});
        (site.name().to_owned(), said)
    });
    let asked: serde_json::Map<_, _> = asked.collect();
    json!({
        "machines": t.seeds,
        "finished": t.seeds - t.locked.len() as u64,
        "locked_up": t.locked.len(),
        "locked_up_seeds": t.locked,
        "seconds": t.seconds,
        "counts": counts,
        "memory": asked,
        "most": {
            "heads": t.most[0],
            "data_bytes": t.most[1],
            "receive_pages": t.most[2],
            "fragments": t.most[3],
            "reassembly": t.most_early,
        },
        "reserves": t.nodes.iter().map(node).collect::<Vec<_>>(),
        "wrong": t.wrong,
        "unbalanced": t.unbalanced,
        "lost": t.lost,
        "unsound_seeds": t.unsound,
    })
}

fn node(node: &Node) -> Value {
    json!({
        "name": node.name,
        "depth": node.depth,
        "kind": node.kind,
        "pages": node.pages,
        "max_taken_pages": node.max_taken_pages,
        "limit": node.limit,
        "usage": node.usage,
        "max_usage": node.max_usage,
        "refusals": node.refusals,
    })
}
