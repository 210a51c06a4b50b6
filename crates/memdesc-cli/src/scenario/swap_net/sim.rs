//! The simulation: events in order of their time, the same ones for the same seed; and when to say that nothing will happen any more.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};

use memdesc::{Cache, Mm};
use memdesc_host::Host;
use rustc_hash::FxBuildHasher;

use super::memory::{Asked, Book, Held, Site};
use super::others::Others;
use super::pager::{Page, Process, Request, Swapped};
use super::rx::Receive;
use super::server::{Out, Server, Store};
use super::settings::{Bounds, Size, Weather};
use super::tx::Send;
use super::wire::{HEADER_BYTES, Header, NO_SEQ, Say, Wire};
use crate::rng::Rng;

/// How often it is looked whether anything gets on, in nanoseconds: five times the longest wait for an acknowledgement. After the first such time in which
/// nothing did, caches are emptied and all is tried again; if then for [`Size::patience`] more nothing goes out, and the server cannot be heard or has nothing to
/// say, nothing ever will.
pub(super) const LOOK: u64 = 500_000_000;
/// After ten times as many it is said in any case.
const STARVED: u64 = 10;
/// Refused requests are tried again after so long, twice as long each time.
const RETRY_MIN: u64 = 500_000;
const RETRY_MAX: u64 = 64_000_000;
/// The memory manager's own housekeeping.
const TICK: u64 = 50_000_000;

/// What happens.
pub(super) enum Event {
    /// A process goes on.
    Run(u16),
    /// A packet has left the device.
    Left,
    ToServer(Vec<u8>),
    ToClient(Vec<u8>),
    /// For acknowledgements, of the stack and of the server.
    Timeout,
    ServerTimeout,
    DelayedAck,
    /// What was refused is tried again.
    Retry,
    /// A frame for somebody else.
    Noise,
    /// Other users of memory.
    Others,
    Kswapd,
    Tick,
}

struct Due {
    at: u64,
    nth: u64,
    event: Event,
}

impl PartialEq for Due {
    fn eq(&self, other: &Due) -> bool {
        (self.at, self.nth) == (other.at, other.nth)
    }
}

impl Eq for Due {}

impl PartialOrd for Due {
    fn partial_cmp(&self, other: &Due) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Due {
    fn cmp(&self, other: &Due) -> std::cmp::Ordering {
        (self.at, self.nth).cmp(&(other.at, other.nth))
    }
}

/// Everything there is.
pub(super) struct World<'a> {
    pub(super) mm: &'a Mm<Host>,
    pub(super) book: &'a Book<'a>,
    pub(super) bounds: Bounds,
    pub(super) weather: Weather,
    pub(super) rng: Rng,
    pub(super) now: u64,
    due: BinaryHeap<Reverse<Due>>,
    nth: u64,
    events: u64,

    pub(super) tx: Send<'a>,
    pub(super) rx: Receive<'a>,
    pub(super) wire: Wire,
    pub(super) server: Server<'a>,
    pub(super) others: Others<'a>,

    pub(super) pages: Vec<Page>,
    /// Those that may be chosen to go.
    pub(super) resident: Vec<u32>,
    pub(super) hand: usize,
    pub(super) processes: Vec<Process>,
    pub(super) running: usize,
    /// The process that had a page last for which several waited.
    pub(super) turn: usize,
    pub(super) requests: HashMap<u64, Request<'a>, FxBuildHasher>,
    pub(super) next_id: u64,
    pub(super) writing: usize,
    pub(super) faults: u64,
    pub(super) swapped: Swapped,

    pub(super) rto_armed: bool,
    pub(super) ack_armed: bool,
    pub(super) kswapd_armed: bool,
    server_armed: bool,
    retry_armed: bool,
    retry: u64,
    last_progress: u64,
    /// Looks since, those in a row that found nothing, and what had been asked for by the last.
    looks: u64,
    quiet: u64,
    patience: u64,
    asked_then: [Asked; Site::COUNT],
    moves_then: u64,
    pub(super) wrong: u64,
}

/// How a machine came to a stop.
pub(super) struct Stuck {
    /// Simulated time at which something got on last.
    pub(super) since: u64,
    /// When it was certain.
    pub(super) said: u64,
    /// Since the last look: what was asked for.
    pub(super) asked: [Asked; Site::COUNT],
    /// Pages of writes that had begun, and were not done.
    pub(super) writing: usize,
    /// Free pages, and the min mark.
    pub(super) free: u64,
    pub(super) min: u64,
    /// Packets not acknowledged, and of them never sent; requests with no packet yet.
    pub(super) unacked: usize,
    pub(super) unsent: usize,
    pub(super) jobs: usize,
    pub(super) ring: usize,
    pub(super) early: usize,
    /// What the stack holds.
    pub(super) held: [Held; 4],
    /// Frames that others' sockets hold, and bytes that others have.
    pub(super) others: (usize, usize),
    /// Processes that wait for memory, and for a page.
    pub(super) processes: (usize, usize),
}

/// What a run came to.
pub(super) struct End {
    pub(super) stuck: Option<Stuck>,
    pub(super) simulated: u64,
    pub(super) events: u64,
    pub(super) wrong: u64,
    pub(super) swapped: Swapped,
    pub(super) packets: u64,
    pub(super) acks: u64,
    pub(super) resent: u64,
    pub(super) server_resent: u64,
    pub(super) received: u64,
    pub(super) lost: u64,
    pub(super) doubled: u64,
    pub(super) late: u64,
    pub(super) no_page: u64,
    pub(super) no_head: u64,
    pub(super) after_look: u64,
    pub(super) most_early: usize,
    pub(super) useless: u64,
    pub(super) for_others: u64,
    pub(super) others_full: u64,
    pub(super) others_read: u64,
    pub(super) others_refused: u64,
}

impl<'a> World<'a> {
    pub(super) fn new(
        mm: &'a Mm<Host>,
        heads: &'a Cache<'a>,
        book: &'a Book<'a>,
        store: &'a mut Store,
        size: Size,
        seed: u64,
    ) -> World<'a> {
        let (bounds, weather) = (Bounds::STACK, Weather::of(seed));
        // The same numbers for each part, whatever the others draw.
        let of = |nth: u64| Rng(seed.wrapping_mul(0x1_0000_0001) ^ nth << 56).next();
        store.clear(size.working_set);
        let share = size.touches / bounds.processes as u64;
        let mut world = World {
            mm,
            book,
            bounds,
            weather,
            rng: Rng(of(1)),
            now: 0,
            due: BinaryHeap::with_capacity(1024),
            nth: 0,
            events: 0,
            tx: Send::default(),
            rx: Receive::default(),
            wire: Wire::new(of(2), weather),
            server: Server::new(store, &bounds, Wire::new(of(3), weather)),
            others: Others::new(mm, heads, weather, size.memory, of(4)),
            pages: vec![Page::NOTHING; size.working_set as usize],
            resident: Vec::with_capacity(size.memory as usize),
            hand: 0,
            processes: (0..bounds.processes)
                .map(|nth| Process::new(of(16 + nth as u64), share))
                .collect(),
            running: bounds.processes,
            turn: 0,
            requests: HashMap::default(),
            next_id: 0,
            writing: 0,
            faults: 0,
            swapped: Swapped::default(),
            rto_armed: false,
            ack_armed: false,
            kswapd_armed: false,
            server_armed: false,
            retry_armed: false,
            retry: RETRY_MIN,
            last_progress: 0,
            looks: 0,
            quiet: 0,
            patience: size.patience * 1_000_000_000 / LOOK,
            asked_then: Default::default(),
            moves_then: 0,
            wrong: 0,
        };
        world.refill();
        for nth in 0..bounds.processes {
            world.at(nth as u64, Event::Run(nth as u16));
        }
        world.at(0, Event::Noise);
        world.at(0, Event::Others);
        world.at(TICK, Event::Tick);
        world
    }

    pub(super) fn at(&mut self, at: u64, event: Event) {
        self.nth += 1;
        let nth = self.nth;
        self.due.push(Reverse(Due { at, nth, event }));
    }

    /// Something got on.
    pub(super) fn progress(&mut self) {
        self.last_progress = self.now;
        self.retry = RETRY_MIN;
        self.looks = 0;
    }

    /// Memory was refused to something that has to happen.
    pub(super) fn stalled(&mut self) {
        if !self.retry_armed {
            self.retry_armed = true;
            self.at(self.now + self.retry, Event::Retry);
            self.retry = (self.retry * 2).min(RETRY_MAX);
        }
    }

    /// Free pages of all zones, and what reclaim aims at: their high marks, and the boost, which goes when that is reached.
    pub(super) fn free_and_high(&self) -> (u64, u64) {
        let (mut free, mut high) = (0, 0);
        self.mm.zoneinfo(|zone| {
            free += zone.free;
            high += zone.watermarks[2] + zone.watermarks[3];
        });
        (free, high)
    }

    /// Until all touches are done, or nothing gets on any more.
    pub(super) fn go(&mut self) -> End {
        let mut stuck = None;
        while self.running > 0 {
            let Some(Reverse(due)) = self.due.pop() else {
                break;
            };
            self.now = due.at;
            self.events += 1;
            if self.now - self.last_progress > LOOK * (self.looks + 1) && self.is_stuck() {
                stuck = Some(self.stuck());
                break;
            }
            self.happens(due.event);
        }
        self.end(stuck)
    }

    fn happens(&mut self, event: Event) {
        match event {
            Event::Run(nth) => self.run(usize::from(nth)),
            Event::Left => self.left(),
            Event::ToClient(frame) => self.frame(&frame),
            Event::ToServer(frame) => self.with_server(|server, now, out| {
                server.frame(now, frame, out);
            }),
            Event::ServerTimeout => {
                self.server_armed = false;
                if self.server.deadline.is_some_and(|at| at <= self.now) {
                    self.with_server(|server, now, out| server.timeout(now, out));
                }
                self.arm_server();
            }
            Event::Timeout => self.timeout(),
            Event::DelayedAck => self.delayed_ack(),
            Event::Retry => {
                self.retry_armed = false;
                self.refill();
                self.push();
                self.kswapd();
                self.memory_came_free();
            }
            Event::Noise => self.noise(),
            Event::Others => {
                let freed = self.others.round() | self.others.readers();
                if freed {
                    self.memory_came_free();
                }
                let (_, pause) = self.others.pauses(self.now);
                self.at(self.now + pause, Event::Others);
            }
            Event::Kswapd => self.kswapd(),
            Event::Tick => {
                self.mm.platform().set_clock(self.now);
                self.mm.tick();
                self.at(self.now + TICK, Event::Tick);
            }
        }
    }

    fn with_server(&mut self, f: impl FnOnce(&mut Server<'a>, u64, Out<'_>)) {
        let mut out = Vec::new();
        f(&mut self.server, self.now, &mut |at, frame| {
            out.push((at, frame));
        });
        for (at, frame) in out {
            self.at(at, Event::ToClient(frame));
        }
        self.arm_server();
    }

    fn arm_server(&mut self) {
        if !self.server_armed
            && let Some(at) = self.server.deadline
        {
            self.server_armed = true;
            self.at(at, Event::ServerTimeout);
        }
    }

    /// A frame for somebody else comes.
    fn noise(&mut self) {
        let len = self.others.payload();
        let mut frame = vec![0; HEADER_BYTES + len];
        let header = Header {
            conn: 2 + self.rng.below(100) as u32,
            len: len as u32,
            seq: NO_SEQ,
            say: Say::Data,
            ..Header::ACK
        };
        header.write(&mut frame);
        self.frame(&frame);
        let (pause, _) = self.others.pauses(self.now);
        self.at(self.now + pause, Event::Noise);
    }

    /// Nothing got on for another while: will it ever?
    fn is_stuck(&mut self) -> bool {
        self.looks += 1;
        // Requests, packets that went to the device, frames of the server that were looked at.
        let moves = self.next_id + self.tx.packets + self.tx.acks + self.rx.from_server;
        let asked = Site::ALL.map(|site| self.book.asked(site));
        if self.looks == 1 {
            // What lies in lists and caches is given back before anything is said.
            self.mm.shrink();
            self.quiet = 0;
            self.retry = RETRY_MIN;
            self.stalled();
        } else {
            let heads = |asked: &[Asked; Site::COUNT]| {
                let asked = asked[Site::ReceiveHead as usize];
                asked.times - asked.refused
            };
            // It cannot be heard, or has nothing to say: everything that it said was acknowledged.
            let deaf = heads(&asked) == heads(&self.asked_then);
            let silent = self.server.deadline.is_none();
            self.quiet += 1;
            if moves != self.moves_then || !deaf && !silent {
                self.quiet = 0;
            }
            if self.quiet >= self.patience || self.looks > STARVED * self.patience {
                return true;
            }
        }
        self.moves_then = moves;
        self.asked_then = asked;
        false
    }

    fn stuck(&self) -> Stuck {
        let asked = Site::ALL.map(|site| {
            let (now, then) = (self.book.asked(site), self.asked_then[site as usize]);
            Asked {
                times: now.times - then.times,
                refused: now.refused - then.refused,
                emergency: now.emergency - then.emergency,
            }
        });
        let mut marks = (0, 0);
        self.mm.zoneinfo(|zone| {
            marks.0 += zone.free;
            marks.1 += zone.watermarks[0];
        });
        let (unacked, unsent) = self.tx.waiting();
        Stuck {
            since: self.last_progress,
            said: self.now,
            asked,
            writing: self.writing,
            free: marks.0,
            min: marks.1,
            unacked,
            unsent,
            jobs: self.tx.jobs.len(),
            ring: self.rx.ring(),
            early: self.rx.early(),
            held: self.book.held(),
            others: self.others.has(),
            processes: self.waiting(),
        }
    }

    /// Checks what every page holds, and lets go of everything, in whatever state it is.
    fn end(&mut self, stuck: Option<Stuck>) -> End {
        self.due.clear();
        self.tx.clear();
        self.rx.clear();
        self.others.clear();
        self.requests.clear();
        self.check_and_free();
        End {
            stuck,
            simulated: self.now,
            events: self.events,
            wrong: self.wrong + self.server.wrong,
            swapped: self.swapped,
            packets: self.tx.packets,
            acks: self.tx.acks,
            resent: self.tx.resent,
            server_resent: self.server.resent,
            received: self.rx.frames,
            lost: self.wire.lost + self.server.wire.lost,
            doubled: self.wire.doubled + self.server.wire.doubled,
            late: self.wire.late + self.server.wire.late,
            no_page: self.rx.no_page,
            no_head: self.rx.no_head,
            after_look: self.rx.after_look,
            most_early: self.rx.most_early,
            useless: self.rx.useless,
            for_others: self.others.frames_queued,
            others_full: self.others.frames_full,
            others_read: self.others.read,
            others_refused: self.others.refused,
        }
    }
}
