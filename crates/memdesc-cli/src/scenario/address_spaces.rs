//! Eight address spaces on two CPUs that fork, write, read files, unmap, compact, migrate and reclaim, with allocations failing at random.
//!
//! Each space has areas of every kind; every other one belongs to a thread, which alone writes to it, maps and unmaps it, and so knows what it must read there,
//! by real loads and stores. All else is anybody's: forks while others fault, exits, pins, moves, splits, compaction, reclaim, writeback. Every page
//! begins with its number, so that a page in the wrong place is seen by all. At the end the counts are compared with the tables.

use std::fmt::Write as _;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{RwLock, RwLockReadGuard};
use std::time::{Duration, Instant};

use memdesc::filemap::Mapping;
use memdesc::gfp::{__GFP_RECLAIM, GFP_HIGHUSER_MOVABLE, GFP_KERNEL};
use memdesc::mmap::{Access, Map, MmStruct, VmFlags};
use memdesc::{Config, Event, Mm, PageType, Pfn, ReclaimRequest};
use memdesc_host::{Host, UserView, ram};
use serde_json::json;

use super::disk::Disk;
use crate::cli::AddressSpacesArgs;
use crate::error::Error;
use crate::rng::Rng;
use crate::{output, progress};

const SPACES: usize = 8;
const AREAS: u64 = 8;
/// Pages of an area: 2 MiB and a little.
const AREA: u64 = 640;
/// Pages from one area to the next.
const STRIDE: u64 = 1024;
const FIRST: u64 = 512;
const TOP: u64 = (FIRST + AREAS * STRIDE) * 4096;
/// 384 MiB.
const PAGES: u32 = 96 << 10;
/// Half as much again.
const FILE: u64 = 144 << 10;
/// Not known: another thread was writing when the space was copied.
const UNKNOWN: u64 = u64::MAX;

macro_rules! counts {
    ($($name:ident = $text:literal,)*) => {
        #[derive(Clone, Copy)]
        enum Count { $($name),* }
        const COUNTS: &[(Count, &str)] = &[$((Count::$name, $text)),*];
    };
}

counts! {
    Loads = "loads",
    Stores = "stores",
    Calls = "reads and writes by call",
    Maps = "areas mapped",
    Unmaps = "areas unmapped",
    Forks = "forks",
    Exits = "exits",
    Pins = "pins",
    Moves = "folios moved",
    Splits = "folios split",
    Ranges = "ranges cleared",
    Reclaims = "reclaims",
    FileReads = "reads of the file",
    FileWrites = "writes to the file",
    Writebacks = "writebacks",
    Refused = "refused for want of memory",
}

/// A space, its view, and what its owners wrote.
struct Live<'m> {
    view: Option<UserView<'static>>,
    space: Box<MmStruct<'m, Host>>,
    /// By page: 0 for what was never written, [`UNKNOWN`], or what it must begin with.
    model: Vec<AtomicU64>,
    /// Areas that are mapped.
    mapped: [AtomicBool; AREAS as usize],
}

impl Drop for Live<'_> {
    fn drop(&mut self) {
        // The view borrows the space.
        self.view = None;
    }
}

struct Shared<'m> {
    mm: &'m Mm<Host>,
    file: &'m Mapping<'m, Host>,
    spaces: Vec<RwLock<Option<Live<'m>>>>,
    asid: AtomicU64,
    stop: AtomicBool,
    counts: Vec<AtomicU64>,
    wrong: AtomicU64,
}

impl Shared<'_> {
    fn count(&self, what: Count) {
        self.counts[what as usize].fetch_add(1, Ordering::Relaxed);
    }

    fn wrong(&self, what: std::fmt::Arguments<'_>) {
        if self.wrong.fetch_add(1, Ordering::Relaxed) < 8 {
            eprintln!("memdesc: {what}");
        }
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn addr(area: u64, page: u64) -> u64 {
    (FIRST + area * STRIDE + page) * 4096
}

/// What a page must begin with in its upper half: who it is. Pages of files say which page of the file they are.
fn tag(area: u64, page: u64) -> u64 {
    (1 + area * STRIDE + page) << 40
}

fn flags_of(area: u64) -> (VmFlags, bool) {
    let rw = VmFlags::READ_WRITE;
    match area / 2 {
        0 => (rw, false),
        1 => (rw.with(VmFlags::LARGE), false),
        2 => (rw.with(VmFlags::HUGE), false),
        // Private: what is written is the space's own, what is not is the file's.
        _ => (rw, true),
    }
}

impl<'m> Live<'m> {
    fn new(space: MmStruct<'m, Host>) -> Result<Live<'m>, Error> {
        let space = Box::new(space);
        // SAFETY: the view goes before its space: see `drop`. The space lies in a box, so it stays where it is.
        let borrowed: &'static MmStruct<'_, Host> = unsafe { &*(&raw const *space).cast() };
        Ok(Live {
            view: Some(UserView::new(borrowed).map_err(Error::View)?),
            space,
            model: (0..AREAS * STRIDE).map(|_| AtomicU64::new(0)).collect(),
            mapped: [const { AtomicBool::new(false) }; AREAS as usize],
        })
    }

    fn expected(&self, area: u64, page: u64) -> &AtomicU64 {
        &self.model[(area * STRIDE + page) as usize]
    }
}

/// Is this what the page may begin with? What the owner knows it begins with, or for others anything that is this page's.
fn may_be(value: u64, known: u64, area: u64, page: u64) -> bool {
    let (_, file) = flags_of(area);
    let original = if file { super::disk::original(page) } else { 0 };
    match known {
        0 => value == original,
        UNKNOWN => value == original || value >> 40 == tag(area, page) >> 40,
        known => value == known,
    }
}

struct Worker<'s, 'm> {
    shared: &'s Shared<'m>,
    me: u64,
    rng: Rng,
    turn: u64,
}

type Slot<'s, 'm> = RwLockReadGuard<'s, Option<Live<'m>>>;

impl<'s, 'm> Worker<'s, 'm> {
    fn slot(&mut self) -> (usize, Slot<'s, 'm>) {
        let slot = self.rng.below(SPACES);
        let guard = self.shared.spaces[slot].read();
        (
            slot,
            guard.unwrap_or_else(std::sync::PoisonError::into_inner),
        )
    }

    fn run(&mut self) {
        let _cpu = self.shared.mm.platform().claim(self.me as usize);
        while !self.shared.stop.load(Ordering::Relaxed) {
            match self.rng.below_u64(1000) {
                0..=599 => self.touch(),
                600..=679 => self.call(),
                680..=739 => self.map_or_unmap(),
                740..=742 => self.fork(),
                743 => self.exit(),
                744..=809 => self.pin(),
                810..=849 => self.migrate(),
                850..=879 => self.split(),
                880..=884 => self.clear_range(),
                885..=889 => self.reclaim(),
                890..=979 => self.file(),
                980..=983 => {
                    let from = self.rng.below_u64(FILE);
                    let _ = self.shared.file.writeback(from..=from + 4096);
                    self.shared.count(Count::Writebacks);
                }
                _ => self.shared.mm.tick(),
            }
        }
    }

    /// An area of this thread's, and a page of it.
    fn mine(&mut self) -> (u64, u64) {
        let area = self.rng.below_u64(AREAS / 2) * 2 + self.me;
        // Near each other half of the time.
        let page = if self.rng.below_u64(2) == 0 {
            self.rng.below_u64(16)
        } else {
            self.rng.below_u64(AREA)
        };
        (area, page)
    }

    /// Loads and stores.
    fn touch(&mut self) {
        let (slot, guard) = self.slot();
        let Some(live) = &*guard else { return };
        for _ in 0..16 {
            let (area, page) = self.mine();
            if !live.mapped[area as usize].load(Ordering::Relaxed) {
                continue;
            }
            let Some(view) = &live.view else { return };
            let at = view.ptr(addr(area, page)).cast::<u64>();
            // SAFETY: mapped, by this thread, who alone unmaps it; the space stays as long as the slot is held.
            let value = unsafe { at.read_volatile() };
            self.shared.count(Count::Loads);
            let known = live.expected(area, page).load(Ordering::Relaxed);
            if !may_be(value, known, area, page) {
                self.shared.wrong(format_args!(
                    "space {slot}, area {area}, page {page}: {value:#x}, not {known:#x}"
                ));
                return;
            }
            if self.rng.below_u64(2) == 0 {
                self.turn += 1;
                let new = tag(area, page) | self.turn << 1 | self.me;
                // SAFETY: as above, and this thread alone writes here.
                unsafe { at.write_volatile(new) };
                live.expected(area, page).store(new, Ordering::Relaxed);
                self.shared.count(Count::Stores);
            }
        }
    }

    /// Any page of any space by the calls, which may fail.
    fn call(&mut self) {
        let (slot, guard) = self.slot();
        let Some(live) = &*guard else { return };
        let (area, page) = (self.rng.below_u64(AREAS), self.rng.below_u64(AREA));
        let mut first = [0; 8];
        if live.space.read(addr(area, page), &mut first).is_ok() {
            let value = u64::from_le_bytes(first);
            if !may_be(value, UNKNOWN, area, page) {
                self.shared.wrong(format_args!(
                    "space {slot}, area {area}, page {page}: {value:#x} by call"
                ));
            }
        }
        let (area, page) = self.mine();
        self.turn += 1;
        let new = tag(area, page) | self.turn << 1 | self.me;
        let expected = live.expected(area, page);
        match live.space.write(addr(area, page), &new.to_le_bytes()) {
            Ok(()) => expected.store(new, Ordering::Relaxed),
            Err(memdesc::mmap::FaultError::Oom(_)) => self.shared.count(Count::Refused),
            Err(_) => {}
        }
        self.shared.count(Count::Calls);
    }

    fn map_or_unmap(&mut self) {
        let (_, guard) = self.slot();
        let Some(live) = &*guard else { return };
        let (area, _) = self.mine();
        let mapped = &live.mapped[area as usize];
        if mapped.load(Ordering::Relaxed) {
            if self.rng.below_u64(3) > 0 {
                return;
            }
            mapped.store(false, Ordering::Relaxed);
            if live.space.munmap(addr(area, 0), AREA * 4096).is_err() {
                mapped.store(true, Ordering::Relaxed);
                return self.shared.count(Count::Refused);
            }
            for page in 0..AREA {
                live.expected(area, page).store(0, Ordering::Relaxed);
            }
            self.shared.count(Count::Unmaps);
        } else {
            let (flags, file) = flags_of(area);
            let what = if file {
                Map::File(self.shared.file, 0)
            } else {
                Map::Anon
            };
            match live
                .space
                .mmap(Some(addr(area, 0)), AREA * 4096, flags, what)
            {
                Ok(_) => {
                    mapped.store(true, Ordering::Relaxed);
                    self.shared.count(Count::Maps);
                }
                Err(_) => self.shared.count(Count::Refused),
            }
        }
    }

    /// A space becomes a copy of another, which goes on being used meanwhile.
    fn fork(&mut self) {
        let (from, guard) = self.slot();
        let to = self.rng.below(SPACES);
        let Some(parent) = guard.as_ref().filter(|_| to != from) else {
            return;
        };
        // Who takes two slots waits for the second only if nobody has it.
        let Ok(mut target) = self.shared.spaces[to].try_write() else {
            return;
        };
        let asid = self.shared.asid.fetch_add(1, Ordering::Relaxed) % 200;
        // Areas that another maps and unmaps meanwhile: what was so before and after is so in the child.
        let before: Vec<bool> = parent
            .mapped
            .iter()
            .map(|m| m.load(Ordering::SeqCst))
            .collect();
        let known: Vec<u64> = parent
            .model
            .iter()
            .map(|v| v.load(Ordering::Relaxed))
            .collect();
        let child = match parent.space.fork(asid) {
            Ok(child) => child,
            Err(_) => return self.shared.count(Count::Refused),
        };
        let Ok(live) = Live::new(child) else {
            // Its number is still viewed.
            return;
        };
        for area in 0..AREAS {
            let mine = area % 2 == self.me;
            if !mine {
                // The other thread may be at work on it: the child starts without.
                if live.space.munmap(addr(area, 0), AREA * 4096).is_err() {
                    return self.shared.count(Count::Refused);
                }
                continue;
            }
            live.mapped[area as usize].store(before[area as usize], Ordering::Relaxed);
            for page in 0..AREA {
                let known = known[(area * STRIDE + page) as usize];
                live.expected(area, page).store(known, Ordering::Relaxed);
            }
        }
        *target = Some(live);
        self.shared.count(Count::Forks);
    }

    fn exit(&mut self) {
        let slot = self.rng.below(SPACES);
        let Ok(mut target) = self.shared.spaces[slot].try_write() else {
            return;
        };
        *target = None;
        let asid = self.shared.asid.fetch_add(1, Ordering::Relaxed) % 200;
        if let Ok(space) = MmStruct::with_top(self.shared.mm, asid, TOP)
            && let Ok(live) = Live::new(space)
        {
            *target = Some(live);
        } else {
            self.shared.count(Count::Refused);
        }
        self.shared.count(Count::Exits);
    }

    /// A device reads a page while its owner goes on.
    fn pin(&mut self) {
        let (slot, guard) = self.slot();
        let Some(live) = &*guard else { return };
        let (area, page) = self.mine();
        if !live.mapped[area as usize].load(Ordering::Relaxed) {
            return;
        }
        let Ok(pin) = live.space.pin_user_page(addr(area, page), Access::Write) else {
            return self.shared.count(Count::Refused);
        };
        self.shared.count(Count::Pins);
        for _ in 0..self.rng.below_u64(64) {
            std::hint::spin_loop();
        }
        self.turn += 1;
        let new = tag(area, page) | self.turn << 1 | self.me;
        let at = self.shared.mm.page_address(pin.pfn()).cast::<u64>();
        // SAFETY: pinned, and of an area that this thread alone writes to: a device of its own.
        unsafe { at.write_volatile(new) };
        live.expected(area, page).store(new, Ordering::Relaxed);
        let Some(view) = &live.view else { return };
        // SAFETY: as in `touch`.
        let value = unsafe { view.ptr(addr(area, page)).cast::<u64>().read_volatile() };
        if value != new {
            self.shared.wrong(format_args!(
                "space {slot}, area {area}, page {page}: {value:#x}, the device wrote {new:#x}"
            ));
        }
    }

    /// Somewhere in some space.
    fn anywhere(&mut self) -> Option<Pfn> {
        let (_, guard) = self.slot();
        let live = guard.as_ref()?;
        let (area, page) = (self.rng.below_u64(AREAS), self.rng.below_u64(AREA));
        let (_, page) = live.space.page_at(addr(area, page))?;
        Some(page)
    }

    fn migrate(&mut self) {
        let mm = self.shared.mm;
        let Some(page) = self.anywhere() else { return };
        let (_, order, _) = mm.lookup(page);
        let Ok(to) = mm.alloc_pages(GFP_HIGHUSER_MOVABLE & !__GFP_RECLAIM, order) else {
            return;
        };
        // SAFETY: bare pages of ours.
        let moved = unsafe { mm.migrate_folio(page, to) };
        if moved.is_ok() {
            self.shared.count(Count::Moves);
        }
        // SAFETY: the one that is not used is ours.
        unsafe { mm.free_pages(moved.unwrap_or(to)) };
    }

    fn split(&mut self) {
        let mm = self.shared.mm;
        let Some(folio) = self.anywhere().and_then(|page| mm.folio_get(page)) else {
            return;
        };
        let to = self.rng.below_u64(4) as usize;
        if mm.split_folio(&folio, to).is_ok() {
            self.shared.count(Count::Splits);
        }
    }

    fn clear_range(&mut self) {
        let mm = self.shared.mm;
        let Some(page) = self.anywhere() else { return };
        let pages = 1u32 << (4 + self.rng.below_u64(6));
        let start = Pfn(page.0 & !(pages - 1));
        if mm.alloc_contig_range(start, pages).is_ok() {
            self.shared.count(Count::Ranges);
            // SAFETY: just had.
            unsafe { mm.free_contig_range(start, pages) };
        }
    }

    fn reclaim(&mut self) {
        let request = ReclaimRequest {
            gfp: GFP_KERNEL,
            order: self.rng.below_u64(4) as usize,
            attempt: self.rng.below_u64(4) as u32,
        };
        self.shared.mm.try_to_free_pages(&request);
        self.shared.count(Count::Reclaims);
    }

    /// The file, beyond what the spaces map: each thread writes to every other page.
    fn file(&mut self) {
        let page = AREA + self.rng.below_u64((FILE - AREA) / 2) * 2 + self.me;
        let mut first = [0; 8];
        for page in page..(page + self.rng.below_u64(64)).min(FILE) {
            self.shared.count(Count::FileReads);
            match self.shared.file.read(page * 4096, &mut first) {
                Ok(()) if u64::from_le_bytes(first) >> 32 == page => {}
                Ok(()) => {
                    let value = u64::from_le_bytes(first);
                    return self
                        .shared
                        .wrong(format_args!("page {page} of the file: {value:#x}"));
                }
                Err(_) => self.shared.count(Count::Refused),
            }
        }
        if self.rng.below_u64(4) == 0 {
            self.turn += 1;
            let new = super::disk::original(page) | self.turn & 0xffff_ffff;
            match self.shared.file.write(page * 4096, &new.to_le_bytes()) {
                Ok(()) => self.shared.count(Count::FileWrites),
                Err(_) => self.shared.count(Count::Refused),
            }
        }
    }
}

/// How it went.
struct Outcome {
    seconds: f64,
    counts: Vec<u64>,
    events: Vec<(&'static str, u64)>,
    wrong: u64,
    points: u64,
    failures: u64,
    mapped: Option<memdesc::mmap::MapReport>,
    disagrees: Option<String>,
    balanced: bool,
    lost: u64,
}

impl Outcome {
    fn ok(&self) -> bool {
        let referenced = self.mapped.is_some_and(|m| m.referenced > 0);
        self.wrong == 0
            && self.disagrees.is_none()
            && !referenced
            && self.balanced
            && self.lost == 0
    }
}

/// Runs it; the exit code.
pub(crate) fn run(args: &AddressSpacesArgs) -> Result<u8, Error> {
    let outcome = scenario(args)?;
    output::print_found(args.run.json, || object(&outcome), || report(&outcome));
    Ok(u8::from(!outcome.ok()))
}

fn scenario(args: &AddressSpacesArgs) -> Result<Outcome, Error> {
    let start = Instant::now();
    let ranges = [ram(0, PAGES)];
    let host = Host::builder().memory(&ranges).cpus(2).floating(1).build();
    let config = Config {
        memory_is_zeroed: true,
        ..Config::default()
    };
    let mm = &Mm::new(host.map_err(Error::Host)?, &config, &ranges).map_err(Error::Init)?;
    let disk = Disk::new(FILE);
    let mut outcome;
    {
        let file = &Mapping::new(mm, &disk, FILE).map_err(Error::Alloc)?;
        let mut spaces = Vec::new();
        for asid in 0..SPACES as u64 {
            let space = MmStruct::with_top(mm, asid, TOP).map_err(Error::Alloc)?;
            spaces.push(RwLock::new(Some(Live::new(space)?)));
        }
        let shared = &Shared {
            mm,
            file,
            spaces,
            asid: AtomicU64::new(SPACES as u64),
            stop: AtomicBool::new(false),
            counts: COUNTS.iter().map(|_| AtomicU64::new(0)).collect(),
            wrong: AtomicU64::new(0),
        };
        if args.fail_one_in > 0 {
            mm.platform()
                .faults()
                .fail_one_in(args.fail_one_in, args.run.seed);
        }
        std::thread::scope(|scope| {
            for me in 0..2 {
                let rng = Rng(args.run.seed * 2 + me);
                scope.spawn(move || {
                    Worker {
                        shared,
                        me,
                        rng,
                        turn: 0,
                    }
                    .run()
                });
            }
            let bar = progress::seconds(args.run.quiet, args.seconds, "spaces");
            while start.elapsed() < Duration::from_secs(args.seconds)
                && !shared.stop.load(Ordering::Relaxed)
            {
                std::thread::sleep(Duration::from_millis(50));
                bar.set_position(start.elapsed().as_secs());
            }
            bar.finish_and_clear();
            shared.stop.store(true, Ordering::Relaxed);
        });
        let (points, failures) = mm.platform().faults().off();
        let guards: Vec<_> = shared
            .spaces
            .iter()
            .map(|s| s.read().unwrap_or_else(std::sync::PoisonError::into_inner))
            .collect();
        let all: Vec<_> = guards
            .iter()
            .filter_map(|g| g.as_ref())
            .map(|l| &*l.space)
            .collect();
        let mut seen = vec![0; PAGES as usize + 1];
        let checked = MmStruct::check_all(&all, &mut seen);
        outcome = Outcome {
            seconds: start.elapsed().as_secs_f64(),
            counts: shared
                .counts
                .iter()
                .map(|n| n.load(Ordering::Relaxed))
                .collect(),
            events: [
                Event::PgSteal,
                Event::PgMigrateSuccess,
                Event::CompactSuccess,
                Event::SlowPath,
            ]
            .iter()
            .map(|&event| (event.name(), mm.event(event)))
            .collect(),
            wrong: shared.wrong.load(Ordering::Relaxed),
            points,
            failures,
            mapped: checked.ok(),
            disagrees: checked.err().map(|why| format!("{why:?}")),
            balanced: false,
            lost: 0,
        };
        let machine = mm.platform().mmu_stats();
        outcome.events.extend([
            ("faults", machine.faults),
            ("translations", machine.fills),
            ("flushes", machine.flushes),
        ]);
        drop(all);
        drop(guards);
        for slot in &shared.spaces {
            *slot
                .write()
                .unwrap_or_else(std::sync::PoisonError::into_inner) = None;
        }
    }
    mm.shrink();
    outcome.balanced = mm.ledger().balanced;
    outcome.lost = [PageType::Anon, PageType::File, PageType::PageTable]
        .iter()
        .map(|&kind| mm.pages_of(kind))
        .sum();
    Ok(outcome)
}

fn report(outcome: &Outcome) -> String {
    let mut text = String::new();
    let mut line = |s: String| {
        let _ = writeln!(text, "{s}");
    };
    line(format!(
        "address spaces: {SPACES} spaces, 2 CPUs, {:.0} MiB, {:.0} s",
        f64::from(PAGES) / 256.0,
        outcome.seconds
    ));
    for ((_, name), n) in COUNTS.iter().zip(&outcome.counts) {
        line(format!("  {name:<28}{n:>12}"));
    }
    for (name, n) in &outcome.events {
        line(format!("  {name:<28}{n:>12}"));
    }
    line(format!(
        "  {} of {} allocations failed on purpose",
        outcome.failures, outcome.points
    ));
    if let Some(mapped) = outcome.mapped {
        line(format!(
            "  at the end {} folios, {} of them mapped by nobody, {} entries of 4 KiB and {} of 2 MiB: every count agrees",
            mapped.folios, mapped.unmapped, mapped.pages, mapped.huge
        ));
        if mapped.referenced > 0 {
            line(format!(
                "  {} folios have references that NOBODY PUT",
                mapped.referenced
            ));
        }
    }
    if let Some(why) = &outcome.disagrees {
        line(format!("  COUNTS DISAGREE with the tables: {why}"));
    }
    line(format!(
        "  {} pages with wrong contents, ledger {}, {} pages lost",
        outcome.wrong,
        if outcome.balanced {
            "balanced"
        } else {
            "NOT balanced"
        },
        outcome.lost
    ));
    text
}

fn object(outcome: &Outcome) -> serde_json::Value {
    let counts: serde_json::Map<_, _> = COUNTS
        .iter()
        .zip(&outcome.counts)
        .map(|((_, name), n)| ((*name).to_owned(), json!(n)))
        .chain(
            outcome
                .events
                .iter()
                .map(|(name, n)| ((*name).to_owned(), json!(n))),
        )
        .collect();
    json!({
        "seconds": outcome.seconds,
        "counts": counts,
        "fault_points": outcome.points,
        "faults_injected": outcome.failures,
        "folios": outcome.mapped.map(|m| m.folios),
        "entries": outcome.mapped.map(|m| m.pages),
        "huge_entries": outcome.mapped.map(|m| m.huge),
        "references_left": outcome.mapped.map(|m| m.referenced),
        "disagrees": outcome.disagrees,
        "wrong": outcome.wrong,
        "balanced": outcome.balanced,
        "lost_pages": outcome.lost,
    })
}
