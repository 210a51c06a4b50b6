//! The processes, their pages, and who makes room: a page goes when the server has said that it keeps it.

use memdesc::gfp::{__GFP_DIRECT_RECLAIM, __GFP_NOWARN, Flags, GFP_HIGHUSER_MOVABLE};
use memdesc::{FolioKind, PAGE_SIZE, Pfn};

use super::memory::{Piece, Site};
use super::settings::{REQUEST_MAX, REQUEST_MIN};
use super::sim::{Event, World};
use super::tx::Job;
use super::wire::Say;
use crate::rng::Rng;

/// A process' page: nobody waits inside the allocation, the simulation waits outside.
const USER: Flags = Flags::from_bits(
    GFP_HIGHUSER_MOVABLE.bits() & !__GFP_DIRECT_RECLAIM.bits() | __GFP_NOWARN.bits(),
);
/// Touches in one go.
const TURN: u64 = 64;
/// Nanoseconds of a touch.
const TOUCH_NS: u64 = 1000;
/// Pages that a process is at home in for a while.
const HOME: u64 = 64;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    /// Never touched.
    Nothing,
    Here(Pfn),
    /// Here, and on its way to the server.
    Leaving(Pfn),
    /// With the server only.
    Away,
    /// Asked for.
    Coming(Pfn),
}

/// A page of the working set.
#[derive(Clone, Copy)]
pub(super) struct Page {
    state: State,
    /// What it holds.
    version: u32,
    dirty: bool,
    referenced: bool,
    /// The server has this version.
    kept: bool,
}

impl Page {
    pub(super) const NOTHING: Page = Page {
        state: State::Nothing,
        version: 0,
        dirty: false,
        referenced: false,
        kept: false,
    };
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Wait {
    No,
    Memory,
    Page(u32),
}

/// One that touches pages.
pub(super) struct Process {
    rng: Rng,
    home: u64,
    left: u64,
    wait: Wait,
    /// The touch that could not be done.
    again: Option<(u32, bool)>,
}

impl Process {
    pub(super) fn new(seed: u64, touches: u64) -> Process {
        Process {
            rng: Rng(seed),
            home: 0,
            left: touches,
            wait: Wait::No,
            again: None,
        }
    }
}

/// A page on its way, in one direction.
pub(super) struct Request<'a> {
    _memory: Piece<'a>,
    page: u32,
    say: Say,
    /// Bytes that are here.
    got: usize,
}

/// What happened to pages.
#[derive(Clone, Copy, Default)]
pub(super) struct Swapped {
    pub(super) touched: u64,
    pub(super) outs: u64,
    pub(super) ins: u64,
    /// Had a copy already, and went at once.
    pub(super) clean: u64,
    pub(super) waits: u64,
}

/// The words of a page.
fn words(page: u32, version: u32) -> impl Iterator<Item = u64> {
    let first = Rng(u64::from(page) << 32 | u64::from(version)).next();
    (0..).map(move |nth: u64| first.wrapping_add(nth.wrapping_mul(0x9e37_79b9_7f4a_7c15)))
}

fn fill(bytes: &mut [u8], page: u32, version: u32) {
    for (chunk, word) in bytes.chunks_exact_mut(8).zip(words(page, version)) {
        chunk.copy_from_slice(&word.to_le_bytes());
    }
}

fn holds(bytes: &[u8], page: u32, version: u32) -> bool {
    let mut differs = 0;
    for (chunk, word) in bytes.chunks_exact(8).zip(words(page, version)) {
        let mut value = [0; 8];
        value.copy_from_slice(chunk);
        differs |= u64::from_le_bytes(value) ^ word;
    }
    differs == 0
}

impl World<'_> {
    /// What is in a page of a process.
    ///
    /// # Safety
    ///
    /// It is a page of the working set that is here, or the caller has a reference to it.
    pub(super) unsafe fn page_bytes(&self, pfn: Pfn) -> &[u8] {
        // SAFETY: a whole page, that stays as long as nobody changes this world; written to through `page_bytes_mut` only.
        unsafe { std::slice::from_raw_parts(self.mm.page_address(pfn), PAGE_SIZE) }
    }

    /// # Safety
    ///
    /// It is a page of the working set that is here.
    unsafe fn page_bytes_mut(&mut self, pfn: Pfn) -> &mut [u8] {
        // SAFETY: as above, and nobody else is here meanwhile: there is one thread.
        unsafe { std::slice::from_raw_parts_mut(self.mm.page_address(pfn), PAGE_SIZE) }
    }

    /// A process' turn.
    pub(super) fn run(&mut self, nth: usize) {
        if self.processes[nth].wait != Wait::No {
            return;
        }
        for _ in 0..TURN {
            let pages = self.pages.len() as u64;
            let process = &mut self.processes[nth];
            if process.left == 0 {
                self.running -= 1;
                process.wait = Wait::Page(u32::MAX);
                return;
            }
            let (page, write) = process.again.take().unwrap_or_else(|| {
                let rng = &mut process.rng;
                if process.home == 0 || rng.one_in(256) {
                    process.home = 1 + rng.below_u64(pages - HOME);
                }
                let page = match rng.below(4) {
                    0 => rng.below_u64(pages),
                    _ => process.home - 1 + rng.below_u64(HOME),
                };
                (page as u32, rng.one_in(2))
            });
            let wait = self.touch(page, write);
            let process = &mut self.processes[nth];
            if wait == Wait::No {
                process.left -= 1;
                self.swapped.touched += 1;
                self.progress();
                continue;
            }
            (process.wait, process.again) = (wait, Some((page, write)));
            self.swapped.waits += 1;
            if wait == Wait::Memory {
                self.stalled();
            }
            return;
        }
        self.at(self.now + TURN * TOUCH_NS, Event::Run(nth as u16));
    }

    fn touch(&mut self, nth: u32, write: bool) -> Wait {
        let page = self.pages[nth as usize];
        match page.state {
            State::Nothing => {
                let Some(pfn) = self.new_page() else {
                    return Wait::Memory;
                };
                // SAFETY: just had.
                fill(unsafe { self.page_bytes_mut(pfn) }, nth, 1);
                self.resident.push(nth);
                self.pages[nth as usize] = Page {
                    state: State::Here(pfn),
                    version: 1,
                    dirty: true,
                    referenced: true,
                    kept: false,
                };
                Wait::No
            }
            State::Here(pfn) => {
                self.look(pfn, nth, page.version);
                let page = &mut self.pages[nth as usize];
                page.referenced = true;
                if write {
                    page.version += 1;
                    (page.dirty, page.kept) = (true, false);
                    let version = page.version;
                    // SAFETY: it is here.
                    fill(unsafe { self.page_bytes_mut(pfn) }, nth, version);
                }
                Wait::No
            }
            // What is being written must stay as it is.
            State::Leaving(_) if write => Wait::Page(nth),
            State::Leaving(pfn) => {
                self.look(pfn, nth, page.version);
                self.pages[nth as usize].referenced = true;
                Wait::No
            }
            State::Coming(_) => Wait::Page(nth),
            State::Away => {
                let Some(pfn) = self.new_page() else {
                    return Wait::Memory;
                };
                if !self.ask(nth, Say::Read, None) {
                    // SAFETY: just had.
                    unsafe { self.mm.free_pages(pfn) };
                    return Wait::Memory;
                }
                self.pages[nth as usize].state = State::Coming(pfn);
                self.push();
                Wait::Page(nth)
            }
        }
    }

    /// The first words of a page that is here.
    fn look(&mut self, pfn: Pfn, nth: u32, version: u32) {
        // SAFETY: callers found it here.
        let bytes = unsafe { self.page_bytes(pfn) };
        let good = holds(&bytes[..64], nth, version);
        self.wrong += u64::from(!good);
    }

    fn new_page(&mut self) -> Option<Pfn> {
        self.faults += 1;
        let got = self.mm.alloc_folio(USER, 0, FolioKind::Anon);
        if got.is_err() || self.faults.is_multiple_of(4) {
            self.wake_kswapd();
        }
        got.ok()
    }

    /// Gets the server to do something with a page.
    fn ask(&mut self, page: u32, say: Say, from: Option<Pfn>) -> bool {
        let size = REQUEST_MIN + self.rng.below(REQUEST_MAX - REQUEST_MIN + 1);
        let Ok(mut memory) = self.book.get(Site::Request, size) else {
            self.stalled();
            return false;
        };
        memory.bytes_mut().fill(page as u8);
        self.next_id += 1;
        let id = self.next_id;
        self.requests.insert(
            id,
            Request {
                _memory: memory,
                page,
                say,
                got: 0,
            },
        );
        self.tx.jobs.push_back(Job {
            id,
            say,
            page,
            from,
            offset: 0,
        });
        true
    }

    pub(super) fn wake_kswapd(&mut self) {
        if !self.kswapd_armed {
            self.kswapd_armed = true;
            self.at(self.now + 20_000, Event::Kswapd);
        }
    }

    /// Makes room until so much is free, or on its way to be, as the high mark asks for.
    pub(super) fn kswapd(&mut self) {
        self.kswapd_armed = false;
        let (free, high) = self.free_and_high();
        let mut want = (high + 32).saturating_sub(free + self.writing as u64);
        let mut looks = self.resident.len() * 2;
        let mut any = false;
        while want > 0 && looks > 0 && !self.resident.is_empty() {
            looks -= 1;
            self.hand = if self.hand + 1 < self.resident.len() {
                self.hand + 1
            } else {
                0
            };
            let nth = self.resident[self.hand];
            let page = &mut self.pages[nth as usize];
            let State::Here(pfn) = page.state else {
                continue;
            };
            if page.referenced {
                page.referenced = false;
                continue;
            }
            if !page.dirty && page.kept {
                page.state = State::Away;
                self.resident.swap_remove(self.hand);
                // SAFETY: the process' own; nobody has it any more.
                unsafe { self.mm.free_pages(pfn) };
                self.swapped.clean += 1;
                (any, want) = (true, want - 1);
                continue;
            }
            if self.writing >= self.bounds.writes || !self.ask(nth, Say::Write, Some(pfn)) {
                break;
            }
            self.pages[nth as usize].state = State::Leaving(pfn);
            self.resident.swap_remove(self.hand);
            self.writing += 1;
            self.swapped.outs += 1;
            want -= 1;
        }
        self.push();
        if any {
            self.memory_came_free();
        }
    }

    /// The server keeps the page: only now may it go.
    pub(super) fn written(&mut self, id: u64) {
        let Some(request) = self.requests.remove(&id).filter(|r| r.say == Say::Write) else {
            self.wrong += 1;
            return;
        };
        self.writing -= 1;
        let nth = request.page;
        drop(request);
        let page = &mut self.pages[nth as usize];
        let State::Leaving(pfn) = page.state else {
            self.wrong += 1;
            return;
        };
        (page.dirty, page.kept) = (false, true);
        if page.referenced {
            page.state = State::Here(pfn);
            self.resident.push(nth);
        } else {
            page.state = State::Away;
            // SAFETY: the process' own. Packets that still have it have references.
            unsafe { self.mm.free_pages(pfn) };
            self.page_came_free();
        }
        self.page_came(nth);
        self.wake_kswapd();
    }

    /// A part of a page came back.
    pub(super) fn data(&mut self, id: u64, offset: usize, bytes: &[u8]) {
        let Some(request) = self.requests.get_mut(&id).filter(|r| r.say == Say::Read) else {
            self.wrong += 1;
            return;
        };
        let nth = request.page;
        request.got += bytes.len();
        let complete = request.got >= PAGE_SIZE;
        let (State::Coming(pfn), end) = (self.pages[nth as usize].state, offset + bytes.len())
        else {
            self.wrong += 1;
            return;
        };
        // SAFETY: it was had for what comes, and is nobody else's.
        match unsafe { self.page_bytes_mut(pfn) }.get_mut(offset..end) {
            Some(to) => to.copy_from_slice(bytes),
            None => self.wrong += 1,
        }
        if complete {
            self.requests.remove(&id);
            let version = self.pages[nth as usize].version;
            // SAFETY: as above.
            let good = holds(unsafe { self.page_bytes(pfn) }, nth, version);
            self.wrong += u64::from(!good);
            let page = &mut self.pages[nth as usize];
            page.state = State::Here(pfn);
            (page.dirty, page.kept, page.referenced) = (false, true, true);
            self.resident.push(nth);
            self.swapped.ins += 1;
            self.page_came(nth);
        }
    }

    fn page_came(&mut self, page: u32) {
        self.wake(Wait::Page(page));
    }

    /// A page came free: for one of those who wait, in turn.
    fn page_came_free(&mut self) {
        for _ in 0..self.processes.len() {
            self.turn = (self.turn + 1) % self.processes.len();
            if self.processes[self.turn].wait == Wait::Memory {
                self.processes[self.turn].wait = Wait::No;
                self.at(self.now, Event::Run(self.turn as u16));
                return;
            }
        }
    }

    pub(super) fn memory_came_free(&mut self) {
        self.wake(Wait::Memory);
    }

    fn wake(&mut self, wait: Wait) {
        for nth in 0..self.processes.len() {
            if self.processes[nth].wait == wait {
                self.processes[nth].wait = Wait::No;
                self.at(self.now, Event::Run(nth as u16));
            }
        }
    }

    /// Processes that wait for memory, and for a page.
    pub(super) fn waiting(&self) -> (usize, usize) {
        let count = |f: fn(Wait) -> bool| self.processes.iter().filter(|p| f(p.wait)).count();
        (
            count(|wait| wait == Wait::Memory),
            count(|wait| matches!(wait, Wait::Page(page) if page != u32::MAX)),
        )
    }

    /// Looks at every page that there is, wherever it is, and gives back what is here.
    pub(super) fn check_and_free(&mut self) {
        for nth in 0..self.pages.len() {
            let page = self.pages[nth];
            let good = match page.state {
                State::Here(pfn) | State::Leaving(pfn) => {
                    // SAFETY: it is here.
                    holds(unsafe { self.page_bytes(pfn) }, nth as u32, page.version)
                }
                State::Away | State::Coming(_) => {
                    let kept = self.server.store.get(nth as u64);
                    kept.is_some_and(|bytes| holds(bytes, nth as u32, page.version))
                }
                State::Nothing => continue,
            };
            self.wrong += u64::from(!good);
            if let State::Here(pfn) | State::Leaving(pfn) | State::Coming(pfn) = page.state {
                // SAFETY: the process' own, and the processes are gone.
                unsafe { self.mm.free_pages(pfn) };
            }
            self.pages[nth].state = State::Nothing;
        }
    }
}
