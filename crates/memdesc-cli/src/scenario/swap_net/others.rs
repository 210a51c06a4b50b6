//! Other users of the network and of memory: sockets whose readers are processes like all, and who takes at GFP_ATOMIC what he can get.

use std::collections::VecDeque;
use std::ptr::NonNull;

use memdesc::gfp::GFP_NOWAIT;
use memdesc::{Cache, Mm, PAGE_SIZE, Pfn};
use memdesc_host::Host;

use super::memory::{ATOMIC, HEAD_BYTES, Piece};
use super::settings::Weather;
use crate::rng::Rng;

/// What somebody else has.
enum Thing {
    Head(NonNull<u8>),
    Data(NonNull<u8>),
    Page(Pfn),
}

/// All the others.
pub(super) struct Others<'a> {
    mm: &'a Mm<Host>,
    heads: &'a Cache<'a>,
    weather: Weather,
    rng: Rng,
    /// What ordinary sockets have queued, and how much it is.
    sockets: VecDeque<(Piece<'a>, Piece<'a>)>,
    queued: usize,
    rcvbuf: usize,
    flood: bool,
    flood_ends: u64,
    taken: Vec<Thing>,
    taken_bytes: usize,
    greed: usize,
    burst: usize,
    pub(super) frames_queued: u64,
    /// The sockets had as much as they may.
    pub(super) frames_full: u64,
    pub(super) read: u64,
    pub(super) refused: u64,
}

impl<'a> Others<'a> {
    pub(super) fn new(
        mm: &'a Mm<Host>,
        heads: &'a Cache<'a>,
        weather: Weather,
        memory: u32,
        seed: u64,
    ) -> Self {
        let percent = |n: u64| memory as usize * PAGE_SIZE / 100 * n as usize;
        Others {
            mm,
            heads,
            weather,
            rng: Rng(seed),
            sockets: VecDeque::new(),
            queued: 0,
            rcvbuf: percent(weather.rcvbuf),
            flood: false,
            flood_ends: 0,
            taken: Vec::new(),
            taken_bytes: 0,
            greed: percent(weather.greed),
            burst: percent(weather.burst),
            frames_queued: 0,
            frames_full: 0,
            read: 0,
            refused: 0,
        }
    }

    /// Nanoseconds until the next frame for others, and their next round.
    pub(super) fn pauses(&mut self, now: u64) -> (u64, u64) {
        if now >= self.flood_ends {
            self.flood = !self.flood;
            let length = if self.flood { 4_000_000 } else { 12_000_000 };
            self.flood_ends = now + length / 2 + self.rng.below_u64(length);
        }
        let noise = if self.flood {
            self.weather.flood_ns
        } else {
            self.weather.noise_ns
        };
        let mut about = |mean: u64| mean / 2 + self.rng.below_u64(mean);
        (about(noise), about(self.weather.greed_ns))
    }

    /// How many bytes the next frame for others carries.
    pub(super) fn payload(&mut self) -> usize {
        match self.rng.below(3) {
            0 => self.rng.below(200),
            1 => self.rng.below(1392),
            _ => 1392,
        }
    }

    /// A frame for an ordinary socket.
    pub(super) fn queue(&mut self, head: Piece<'a>, buffer: Piece<'a>) {
        let size = head.len() + buffer.len();
        if self.queued + size > self.rcvbuf {
            self.frames_full += 1;
            return;
        }
        self.queued += size;
        self.frames_queued += 1;
        self.sockets.push_back((head, buffer));
    }

    /// Can a process go on? It needs a page of its own now and then, as everybody does.
    fn can_run(&self) -> bool {
        let page = self.mm.alloc_pages(GFP_NOWAIT, 0);
        // SAFETY: just had.
        page.map(|page| unsafe { self.mm.free_pages(page) }).is_ok()
    }

    /// The readers' turn: they are processes, and if they cannot run nobody reads. Says whether anything was freed.
    pub(super) fn readers(&mut self) -> bool {
        if self.sockets.is_empty() || !self.can_run() {
            return false;
        }
        let n = self.rng.below(1 + self.sockets.len().min(64));
        for (head, buffer) in self.sockets.drain(..n) {
            self.queued -= head.len() + buffer.len();
            self.read += 1;
        }
        n > 0
    }

    /// A round of everybody else: takes, and gives back if those can run who would. Says whether anything was freed.
    pub(super) fn round(&mut self) -> bool {
        let mut more = match self.rng.below(8) {
            0 => self.rng.below(self.burst),
            _ => self.rng.below(64 << 10),
        };
        more = more.min(self.greed.saturating_sub(self.taken_bytes));
        while more > 0 {
            let got = match self.rng.below(10) {
                0..=2 => {
                    let head = self.mm.kmem_cache_alloc(self.heads, ATOMIC);
                    head.map(|head| (Thing::Head(head), HEAD_BYTES))
                }
                3..=7 => {
                    let size = 1 << (6 + self.rng.below(6));
                    let data = self.mm.kmalloc(size, ATOMIC);
                    data.map(|data| (Thing::Data(data), size))
                }
                _ => {
                    let page = self.mm.alloc_pages(ATOMIC, 0);
                    page.map(|page| (Thing::Page(page), PAGE_SIZE))
                }
            };
            let Ok((thing, size)) = got else {
                self.refused += 1;
                more = more.saturating_sub(PAGE_SIZE);
                continue;
            };
            more = more.saturating_sub(size);
            self.taken_bytes += size;
            self.taken.push(thing);
        }
        if self.taken.is_empty() || !self.rng.one_in(2) || !self.can_run() {
            return false;
        }
        for _ in 0..self.rng.below(self.taken.len() + 1) / 2 {
            let nth = self.rng.below(self.taken.len());
            let thing = self.taken.swap_remove(nth);
            self.give_back(thing);
        }
        true
    }

    fn give_back(&mut self, thing: Thing) {
        // SAFETY: had from there, and in nobody else's hands.
        let size = unsafe {
            match thing {
                Thing::Head(head) => {
                    self.mm.kmem_cache_free(self.heads, head);
                    HEAD_BYTES
                }
                Thing::Data(data) => {
                    let size = self.mm.ksize(data);
                    self.mm.kfree(data);
                    size
                }
                Thing::Page(page) => {
                    self.mm.free_pages(page);
                    PAGE_SIZE
                }
            }
        };
        self.taken_bytes -= size;
    }

    /// Frames queued, bytes taken.
    pub(super) fn has(&self) -> (usize, usize) {
        (self.sockets.len(), self.taken_bytes)
    }

    /// Lets go of everything.
    pub(super) fn clear(&mut self) {
        self.sockets.clear();
        self.queued = 0;
        while let Some(thing) = self.taken.pop() {
            self.give_back(thing);
        }
    }
}
