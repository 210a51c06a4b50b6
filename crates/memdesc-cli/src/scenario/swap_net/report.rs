//! What is said of it.

use std::fmt::Write as _;

use serde_json::{Value, json};

use super::memory::{Asked, Held, Site};
use super::settings::{Bounds, Size};
use super::sim::{PATIENCE, Stuck};
use super::{Mode, Run};

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
}

/// What is counted, and added up.
const COUNTS: [&str; 20] = [
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
    "queued_by_others",
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
            end.for_others,
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
        if let Some(stuck) = end.stuck {
            self.locked.push(seed);
            self.stuck.get_or_insert((seed, stuck));
        }
    }

    /// What is promised: nothing wrong, nothing lost.
    pub(super) fn ok(&self) -> bool {
        self.unsound.is_empty()
    }
}

pub(super) fn report(size: Size, tallies: &[Tally], seed: Option<u64>) -> String {
    let _ = (size, seed, Bounds::STACK, PATIENCE);
    let mut text = String::new();
    for t in tallies {
        let _ = writeln!(text, "{:?} seeds {} locked {} wrong {} unb {} lost {} secs {:.3}", t.mode, t.seeds, t.locked.len(), t.wrong, t.unbalanced, t.lost, t.seconds);
        for (n, c) in COUNTS.iter().zip(t.counts) { let _ = writeln!(text, "   {n} {c}"); }
        for (s, a) in Site::ALL.iter().zip(t.asked) { let _ = writeln!(text, "   {} {a:?}", s.name()); }
        let _ = writeln!(text, "   most {:?} early {}", t.most, t.most_early);
        if let Some((seed, s)) = &t.stuck { let _ = writeln!(text, "   stuck {seed} since {} freed {} writing {} free {} min {} unacked {} unsent {} jobs {} ring {} early {} held {:?} others {:?} proc {:?} asked {:?}", s.since, s.freed, s.writing, s.free, s.min, s.unacked, s.unsent, s.jobs, s.ring, s.early, s.held, s.others, s.processes, s.asked); }
    }
    text
}

pub(super) fn object(_size: Size, tallies: &[Tally]) -> Value {
    json!({"n": tallies.len()})
}
#[allow(unused)]
fn x(_: Held) {}
