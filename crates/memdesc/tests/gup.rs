//! Pages of users taken without a lock, while they are unmapped, moved, split, forked and had by others: at each point of the walk once, and
//! by chance.
//!
//! Every page of the space says which address it is of. Whoever has a page that came back fills it with something else.
#![allow(missing_docs)]

mod common;

use std::cell::Cell;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use common::{Machine, Rng, fill};
use memdesc::filemap::{FileError, Mapping, MappingOps};
use memdesc::gfp::*;
use memdesc::mmap::*;
use memdesc::*;
use memdesc_host::Host;

const PAGE: u64 = 4096;
const RW: VmFlags = VmFlags::READ_WRITE;
/// What others write.
const GARBAGE: u8 = 0xa5;
/// How long the test goes on that does things by chance.
const STRESS: Duration = Duration::from_secs(3);

type Space<'m> = MmStruct<'m, Host>;

/// What the page at this address says.
fn tag(addr: u64) -> u64 {
    addr ^ 0x7a67_0000_0000_0000
}

fn set_tag(space: &Space<'_>, addr: u64) {
    space.write(addr, &tag(addr).to_ne_bytes()).unwrap();
}

/// A word of a page that somebody has, and that others may write to.
fn word(mm: &Mm<Host>, page: Pfn, nth: usize) -> &AtomicU64 {
    // SAFETY: the direct map maps it (promise 1 of platforms); it is aligned, and any bytes are a number.
    unsafe { &*mm.page_address(page).cast::<AtomicU64>().add(nth) }
}

/// Bare pages come back to the allocator with other contents than they had.
fn spoil_and_free(mm: &Mm<Host>, head: Pfn, order: usize) {
    for page in 0..1 << order {
        fill(common::page(mm, head.add(page)), PAGE as usize, GARBAGE);
    }
    common::free(mm, head);
}

/// Takes what came back last, and spoils it.
fn reuse(mm: &Mm<Host>, pages: usize) {
    let mut had = Vec::new();
    for nth in 0..pages {
        // Of both kinds of mobility, since freed pages wait in lists by kind.
        let gfp = if nth % 2 == 0 {
            GFP_HIGHUSER_MOVABLE
        } else {
            GFP_KERNEL
        };
        had.extend(mm.alloc_pages(gfp, 0));
    }
    for page in had {
        spoil_and_free(mm, page, 0);
    }
    let objects: Vec<NonNull<u8>> = (0..8)
        .filter_map(|_| mm.kmalloc(1024, GFP_KERNEL).ok())
        .collect();
    for object in objects {
        fill(object, 1024, GARBAGE);
        common::kfree(mm, object);
    }
}

/// Moves the folio at this address, if it can be moved now.
fn migrate(mm: &Mm<Host>, space: &Space<'_>, addr: u64) -> bool {
    let Some((folio, page)) = space.page_at(addr) else {
        return false;
    };
    let order = folio.order();
    drop(folio);
    let Ok(to) = mm.alloc_pages(GFP_HIGHUSER_MOVABLE, order) else {
        return false;
    };
    // SAFETY: bare pages of ours.
    match unsafe { mm.migrate_folio(page, to) } {
        Ok(old) => {
            spoil_and_free(mm, old, order);
            true
        }
        Err(_) => {
            common::free(mm, to);
            false
        }
    }
}

fn split(mm: &Mm<Host>, space: &Space<'_>, addr: u64) -> bool {
    space
        .page_at(addr)
        .is_some_and(|(folio, _)| folio.order() > 0 && mm.split_folio(&folio, 0).is_ok())
}

/// A child that writes to some of what it has, and goes.
fn fork_and_drop(space: &Space<'_>, at: &[u64]) {
    // No memory, or an area that is not there.
    let Ok(child) = space.fork(99) else { return };
    for &addr in at {
        let _ = child.write(addr, &[GARBAGE; 16]);
    }
}

fn check<'m>(mm: &Mm<Host>, spaces: &[&Space<'m>]) {
    let mut seen = vec![0; mm.ledger().given as usize + 1];
    MmStruct::check_all(spaces, &mut seen).unwrap();
}

fn check_all<'m>(mm: &Mm<Host>, space: &Space<'m>, child: Option<&Space<'m>>) {
    match child {
        Some(child) => check(mm, &[space, child]),
        None => check(mm, &[space]),
    }
}

fn ends_balanced(mm: &Mm<Host>) {
    mm.shrink();
    let ledger = mm.ledger();
    assert!(ledger.balanced, "{ledger:?}");
    for kind in [PageType::Anon, PageType::File, PageType::PageTable] {
        assert_eq!(mm.pages_of(kind), 0, "{kind:?}");
    }
}

/// What happens while somebody walks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Event {
    /// The pages are unmapped, and had by others.
    Gone,
    /// The same, and new ones are mapped there.
    GoneAndBack,
    Moved,
    /// Twice: away, and perhaps back.
    MovedTwice,
    Split,
    /// Split, and all parts but the one at the address go.
    SplitAndTrimmed,
    Forked,
    /// Forked, and the child lives on.
    Shared,
}

const EVENTS: [Event; 8] = [
    Event::Gone,
    Event::GoneAndBack,
    Event::Moved,
    Event::MovedTwice,
    Event::Split,
    Event::SplitAndTrimmed,
    Event::Forked,
    Event::Shared,
];

const POINTS: [&str; 4] = [
    "gup: entry seen",
    "folio_get: looked up",
    "folio_get: guessed",
    "folio_get: looked again",
];

/// What is to happen at a point: set by the thread that walks, taken when it happens.
#[derive(Clone, Copy)]
struct Plan {
    point: &'static str,
    event: Event,
    scene: *const Scene<'static, 'static>,
}

struct Scene<'a, 'm> {
    mm: &'m Mm<Host>,
    space: &'a Space<'m>,
    /// The area, and the address in it that is walked to.
    start: u64,
    len: u64,
    addr: u64,
    child: std::sync::Mutex<Option<Space<'m>>>,
    happened: AtomicBool,
}

thread_local! {
    static PLAN: Cell<Option<Plan>> = const { Cell::new(None) };
}

fn hook(label: &'static str) {
    let Some(plan) = PLAN.get().filter(|plan| plan.point == label) else {
        return;
    };
    PLAN.set(None);
    // SAFETY: the scene outlives the walk, and only shared references to it exist.
    let scene = unsafe { &*plan.scene };
    // On another CPU: who walks is in a read section, and may not sleep.
    std::thread::scope(|scope| scope.spawn(|| scene.act(plan.event)).join()).unwrap();
}

impl Scene<'_, '_> {
    fn act(&self, event: Event) {
        let (mm, space, addr) = (self.mm, self.space, self.addr);
        let pages = (self.len / PAGE) as usize;
        match event {
            Event::Gone | Event::GoneAndBack => {
                space.munmap(self.start, self.len).unwrap();
                reuse(mm, 4 * pages);
                if event == Event::GoneAndBack {
                    self.map();
                }
            }
            Event::Moved => {
                migrate(mm, space, addr);
            }
            Event::MovedTwice => {
                migrate(mm, space, addr);
                reuse(mm, 4 * pages);
                migrate(mm, space, addr);
            }
            Event::Split | Event::SplitAndTrimmed => {
                split(mm, space, addr);
                if event == Event::SplitAndTrimmed {
                    let next = addr + PAGE;
                    space.munmap(self.start, addr - self.start).unwrap();
                    space.munmap(next, self.start + self.len - next).unwrap();
                }
            }
            Event::Forked => fork_and_drop(space, &[addr]),
            Event::Shared => *self.child.lock().unwrap() = Some(space.fork(2).unwrap()),
        }
        reuse(mm, pages);
        self.happened.store(true, Ordering::Relaxed);
    }

    fn map(&self) {
        let flags = RW.with(VmFlags::LARGE);
        self.space
            .mmap(Some(self.start), self.len, flags, Map::Anon)
            .unwrap();
        for page in 0..self.len / PAGE {
            set_tag(self.space, self.start + page * PAGE);
        }
    }
}

/// One walk with one event at one point.
fn walk_once(mm: &Mm<Host>, point: &'static str, event: Event, pin: bool, write: bool) {
    let space = MmStruct::new(mm, 1).unwrap();
    let start = 0x100_0000;
    let scene = Scene {
        mm,
        space: &space,
        start,
        len: 16 * PAGE,
        addr: start + 9 * PAGE,
        child: std::sync::Mutex::new(None),
        happened: AtomicBool::new(false),
    };
    scene.map();
    PLAN.set(Some(Plan {
        point,
        event,
        scene: (&raw const scene).cast(),
    }));
    let access = if write { Access::Write } else { Access::Read };
    let taken = if pin {
        space.pin_user_page(scene.addr, access)
    } else {
        space.get_user_page(scene.addr, access)
    };
    let what = format!("{event:?} at {point}, pin {pin}, write {write}");
    assert!(
        PLAN.take().is_none() && scene.happened.load(Ordering::Relaxed),
        "{what}"
    );
    match taken {
        Ok(page) => {
            let value = || word(mm, page.pfn(), 0).load(Ordering::Relaxed);
            assert_eq!(value(), tag(scene.addr), "{what}");
            // It stays ours, whatever is done with pages that nobody has.
            reuse(mm, 64);
            assert_eq!(value(), tag(scene.addr), "{what}");
            // What is pinned for writing is not what a child reads, and what is mapped is what is pinned.
            if pin && write {
                word(mm, page.pfn(), 1).store(1, Ordering::Relaxed);
                let mut seen = [0; 8];
                if let Some(child) = &*scene.child.lock().unwrap() {
                    child.read(scene.addr + 8, &mut seen).unwrap();
                    assert_eq!(u64::from_ne_bytes(seen), 0, "{what}");
                }
                if space.read(scene.addr + 8, &mut seen).is_ok() && event != Event::GoneAndBack {
                    assert_eq!(u64::from_ne_bytes(seen), 1, "{what}");
                }
            }
            // Still ours when nobody maps it any more.
            let child = scene.child.lock().unwrap().take();
            check_all(mm, &space, child.as_ref());
            drop(child);
            space.munmap(start, scene.len).unwrap();
            reuse(mm, 64);
            assert_eq!(value(), tag(scene.addr), "{what}");
        }
        Err(why) => assert!(
            why == FaultError::Segv && event == Event::Gone,
            "{what}: {why}"
        ),
    }
    check_all(mm, &space, scene.child.into_inner().unwrap().as_ref());
}

#[test]
fn whatever_happens_at_each_point_of_the_walk() {
    if !inject::set_hook(Some(hook)) {
        return;
    }
    let mm = Machine::flat(16 << 8).cpus(4).boot();
    // Under Miri, where it is slow, where it matters most.
    let points = if cfg!(miri) { &POINTS[1..2] } else { &POINTS };
    for &point in points {
        for event in EVENTS {
            for (pin, write) in [(false, false), (true, true), (true, false)] {
                walk_once(&mm, point, event, pin, write);
            }
        }
    }
    ends_balanced(&mm);
}

/// A file whose pages say at which address they are mapped.
struct Tagged(u64);

impl MappingOps for Tagged {
    fn read_folio(&self, index: u64, pages: &mut [u8]) -> Result<(), FileError> {
        for (nth, page) in (0..).zip(pages.chunks_mut(PAGE as usize)) {
            page.fill(0);
            page[..8].copy_from_slice(&tag(self.0 + (index + nth) * PAGE).to_ne_bytes());
        }
        Ok(())
    }

    fn writepage(&self, _index: u64, _pages: &[u8]) -> Result<(), FileError> {
        Ok(())
    }
}

const ANON: u64 = 0x100_0000;
const FILE: u64 = 0x800_0000;
const PAGES: u64 = 256;

/// Takes pages and looks what they say, until it is over; says how many.
fn walker(mm: &Mm<Host>, space: &Space<'_>, over: &AtomicBool) -> u64 {
    let mut rng = Rng(1);
    let mut taken = 0;
    // What was written to each page last.
    let mut last = vec![0; PAGES as usize];
    while !over.load(Ordering::Relaxed) {
        let nth = rng.below(PAGES as usize);
        let anon = !rng.one_in(3);
        let addr = if anon { ANON } else { FILE } + nth as u64 * PAGE;
        let write = anon && rng.one_in(2);
        let access = if write { Access::Write } else { Access::Read };
        let got = if write || rng.one_in(2) {
            space.pin_user_page(addr, access)
        } else {
            space.get_user_page(addr, access)
        };
        let page = match got {
            Ok(page) => page,
            Err(FaultError::Segv) => continue,
            Err(why) => panic!("{why}"),
        };
        taken += 1;
        let (first, second) = (word(mm, page.pfn(), 0), word(mm, page.pfn(), 1));
        // Zero: nobody has written to it since it came. A file's is never.
        let mut seen = if anon { 0 } else { tag(addr) };
        for _ in 0..rng.below(40) {
            let now = first.load(Ordering::Relaxed);
            assert!(
                now == seen || now == tag(addr),
                "{now:#x} at {addr:#x}, before {seen:#x}"
            );
            seen = now;
            std::hint::spin_loop();
        }
        if write {
            // Only we write here, so it is what we wrote last, or the page is a new one.
            let before = second.load(Ordering::Relaxed);
            assert!(
                before == 0 || before == last[nth],
                "{before}, not {}: lost",
                last[nth]
            );
            last[nth] += 1;
            second.store(last[nth], Ordering::Relaxed);
            first.store(tag(addr), Ordering::Relaxed);
            std::hint::spin_loop();
            assert_eq!(
                second.load(Ordering::Relaxed),
                last[nth],
                "written by another"
            );
        }
    }
    taken
}

/// One thing that happens to pages that others may be walking to.
fn disturb<'m>(mm: &Mm<Host>, space: &Space<'m>, file: &Mapping<'m, Host>, rng: &mut Rng) {
    let page = rng.below(PAGES as usize) as u64;
    let addr = ANON + page * PAGE;
    let flags = RW.with(VmFlags::LARGE);
    match rng.below(12) {
        0 | 1 => {
            let pages = (1 + rng.below(32) as u64).min(PAGES - page);
            space.munmap(addr, pages * PAGE).unwrap();
            reuse(mm, 2 * pages as usize);
            space
                .mmap(Some(addr), pages * PAGE, flags, Map::Anon)
                .unwrap();
        }
        2 | 3 => {
            migrate(mm, space, addr);
        }
        4 => {
            migrate(mm, space, FILE + page * PAGE);
        }
        5 | 6 => {
            split(mm, space, addr);
        }
        7 => fork_and_drop(space, &[addr, ANON]),
        8 => {
            // All that is cached of the file, and clean.
            let request = ReclaimRequest {
                gfp: GFP_KERNEL,
                order: 0,
                attempt: 3,
            };
            mm.try_to_free_pages(&request);
            reuse(mm, 64);
        }
        9 => {
            space.munmap(FILE + page * PAGE, PAGE).unwrap();
            let shared = VmFlags::READ.with(VmFlags::SHARED);
            space
                .mmap(
                    Some(FILE + page * PAGE),
                    PAGE,
                    shared,
                    Map::File(file, page),
                )
                .unwrap();
        }
        10 => set_tag(space, addr),
        _ => reuse(mm, 32),
    }
}

#[test]
#[cfg_attr(miri, ignore = "by chance, for seconds")]
fn pages_are_taken_while_everything_happens_to_them() {
    let mm = Machine::flat(16 << 8).cpus(4).boot();
    let disk = Tagged(FILE);
    {
        let file = Mapping::new(&mm, &disk, PAGES).unwrap();
        let space = MmStruct::new(&mm, 1).unwrap();
        let shared = VmFlags::READ.with(VmFlags::SHARED);
        space
            .mmap(Some(ANON), PAGES * PAGE, RW.with(VmFlags::LARGE), Map::Anon)
            .unwrap();
        space
            .mmap(Some(FILE), PAGES * PAGE, shared, Map::File(&file, 0))
            .unwrap();
        let over = AtomicBool::new(false);
        let taken = std::thread::scope(|scope| {
            let walker = scope.spawn(|| walker(&mm, &space, &over));
            let (mut rng, start) = (Rng(2), Instant::now());
            while start.elapsed() < STRESS && !walker.is_finished() {
                disturb(&mm, &space, &file, &mut rng);
            }
            over.store(true, Ordering::Relaxed);
            walker.join().unwrap()
        });
        assert!(taken > 1000, "{taken} pages taken");
        check(&mm, &[&space]);
    }
    ends_balanced(&mm);
}
