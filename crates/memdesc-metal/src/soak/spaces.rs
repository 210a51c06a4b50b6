//! Address spaces, touched through the machine's own walks: what a page holds is known of each, whichever relatives, migrations and reclaim it has been through.
//!
//! A place holds an address space and what is known of its pages. Who works in it has its lock, but its relatives run on other CPUs at the same time, and share its pages.
//! One address space is everybody's, each worker with pages of its own in it.

use alloc::boxed::Box;
use alloc::vec;

use memdesc::filemap::Mapping;
use memdesc::mmap::{Access, FaultError, Map, VmFlags};
use memdesc::{AllocError, Mm, PAGE_SIZE};

use super::{Count, PLACES, Soak, Worker};
use crate::platform::Metal;
use crate::traps::{user_load, user_store};
use crate::users::{Space, with_space};
use crate::wrong;

const PAGE: u64 = PAGE_SIZE as u64;
/// Where the last word of a page is.
const LAST: u64 = PAGE - 8;

/// Pages of the common address space.
pub(super) const COMMON_PAGES: usize = 512;
pub(super) const COMMON: u64 = 0x70_0000_0000;

/// What is known of a page of which nothing is known.
const UNKNOWN: u32 = u32::MAX;

/// An area that is in every place.
struct Area {
    start: u64,
    pages: usize,
    flags: VmFlags,
    what: What,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum What {
    Anon,
    /// What is written goes to the file.
    Shared,
    /// What is written is the address space's own.
    Private,
}

const RW: VmFlags = VmFlags::READ_WRITE;
const AREAS: [Area; 5] = [
    Area {
        start: 0x10_0000_0000,
        pages: 128,
        flags: RW,
        what: What::Anon,
    },
    Area {
        start: 0x20_0000_0000,
        pages: 128,
        flags: RW.with(VmFlags::LARGE),
        what: What::Anon,
    },
    Area {
        start: 0x30_0000_0000,
        pages: 1024,
        flags: RW.with(VmFlags::HUGE),
        what: What::Anon,
    },
    Area {
        start: 0x40_0000_0000,
        pages: 512,
        flags: RW.with(VmFlags::SHARED),
        what: What::Shared,
    },
    Area {
        start: 0x50_0000_0000,
        pages: 64,
        flags: RW,
        what: What::Private,
    },
];

/// The area that maps the file to be read and written.
pub(super) const SHARED: usize = 3;

/// The areas' pages in one row.
const PAGES: usize = {
    let (mut sum, mut at) = (0, 0);
    while at < AREAS.len() {
        sum += AREAS[at].pages;
        at += 1;
    }
    sum
};

/// An address space, and what is known of it.
pub(crate) struct Place {
    pub(super) space: Space,
    mapped: [bool; AREAS.len()],
    /// The page of the file at which the areas that map it begin.
    window: u64,
    /// What was written to each page last: 0 for nothing.
    known: Box<[u32]>,
    turn: u32,
}

impl Place {
    pub(super) fn new(
        mm: &'static Mm<Metal>,
        file: &Mapping<'static, Metal>,
        asid: u64,
    ) -> Result<Place, AllocError> {
        let mut place = Place {
            space: Space::new(mm, asid)?,
            mapped: [false; AREAS.len()],
            window: asid * 600 % (file.size() - 600),
            known: vec![0; PAGES].into_boxed_slice(),
            turn: 0,
        };
        for area in 0..AREAS.len() {
            place.map(file, area)?;
        }
        Ok(place)
    }

    fn map(&mut self, file: &Mapping<'static, Metal>, area: usize) -> Result<(), AllocError> {
        let Area {
            start,
            pages,
            flags,
            what,
        } = AREAS[area];
        let map = match what {
            What::Anon => Map::Anon,
            What::Shared | What::Private => Map::File(file, self.window),
        };
        self.space
            .mmap(Some(start), pages as u64 * PAGE, flags, map)?;
        self.mapped[area] = true;
        Ok(())
    }

    /// Where it maps the file, from which of its pages, and how many.
    pub(super) fn shared(&self) -> Option<(u64, u64, usize)> {
        let Area { start, pages, .. } = AREAS[SHARED];
        self.mapped[SHARED].then_some((start, self.window, pages))
    }

    fn known(&mut self, area: usize) -> &mut [u32] {
        let before: usize = AREAS[..area].iter().map(|a| a.pages).sum();
        &mut self.known[before..][..AREAS[area].pages]
    }
}

/// What the first word of a page of anonymous memory is once this has been written.
fn pattern(at: u64, turn: u32) -> u64 {
    u64::from(turn) << 32 ^ at
}

/// Can a page at this address begin with that?
pub(super) fn is_pattern(at: u64, found: u64) -> bool {
    found == 0 || found as u32 == at as u32
}

/// The address space of all.
pub(super) fn common(mm: &'static Mm<Metal>, asid: u64) -> Result<Space, AllocError> {
    let space = Space::new(mm, asid)?;
    space.mmap(Some(COMMON), COMMON_PAGES as u64 * PAGE, RW, Map::Anon)?;
    Ok(space)
}

/// Somebody was not let: it has to be for want of memory.
pub(super) fn not_let(soak: &Soak, space: &Space, at: u64, access: Access) {
    match space.handle_fault(at, access) {
        // It may have been short of memory, and is not any more.
        Ok(()) | Err(FaultError::Oom(_)) => soak.count(Count::Refused),
        Err(why) => wrong!(
            soak,
            "{access:?} at {at:#x} of space {}: {why}",
            space.asid()
        ),
    }
}

impl Worker {
    pub(super) fn spaces(&mut self, soak: &Soak) {
        match self.dice.below(100) {
            0..=59 => self.touch(soak),
            60..=74 => self.touch_common(soak),
            75..=82 => self.fork(soak),
            83..=89 => self.unmap(soak),
            90..=95 => self.migrate(soak),
            96..=97 => self.protect(soak),
            _ => self.split(soak),
        }
    }

    /// Reads and writes pages of a place.
    fn touch(&mut self, soak: &Soak) {
        let Some(mut place) = soak.places[self.dice.below(PLACES)].try_lock() else {
            return;
        };
        let place = &mut *place;
        for _ in 0..1 + self.dice.below(24) {
            let area = self.dice.below(AREAS.len());
            if !place.mapped[area] {
                continue;
            }
            let page = self.dice.below(AREAS[area].pages);
            match AREAS[area].what {
                What::Shared => self.touch_shared(soak, place, area, page),
                what => self.touch_own(soak, place, area, page, what == What::Private),
            }
        }
    }

    /// A page that belongs to the address space alone, once it was written.
    fn touch_own(
        &mut self,
        soak: &Soak,
        place: &mut Place,
        area: usize,
        page: usize,
        of_file: bool,
    ) {
        let at = AREAS[area].start + page as u64 * PAGE;
        let (known, asid) = (place.known(area)[page], place.space.asid());
        let window = place.window;
        let write = self.one_in(2);
        let seen = with_space(&place.space, || {
            Some((user_load(at as usize)?, user_load((at + LAST) as usize)?))
        });
        let Some((first, last)) = seen else {
            return not_let(soak, &place.space, at, Access::Read);
        };
        let right = match known {
            UNKNOWN => true,
            0 if of_file => first >> 32 == window + page as u64,
            0 => first == 0 && last == 0,
            turn => first == pattern(at, turn) && last == !pattern(at, turn),
        };
        if !right {
            wrong!(
                soak,
                "page {page} of area {area} of space {asid} holds {first:#x} and {last:#x}, known is {known}, so {:#x}",
                pattern(at, known)
            );
        }
        if !write {
            return;
        }
        place.turn = (place.turn + 1) % (UNKNOWN - 1);
        let turn = place.turn + 1;
        let pattern = pattern(at, turn);
        let (first, last) = with_space(&place.space, || {
            let first = user_store(at as usize, pattern);
            (first, first && user_store((at + LAST) as usize, !pattern))
        });
        place.known(area)[page] = match (first, last) {
            (false, _) => known,
            (true, false) => UNKNOWN,
            (true, true) => turn,
        };
        if !last {
            not_let(soak, &place.space, at, Access::Write);
        }
    }

    /// A page of the file, which this worker writes to or not.
    fn touch_shared(&mut self, soak: &Soak, place: &Place, area: usize, page: usize) {
        let at = AREAS[area].start + page as u64 * PAGE;
        let index = place.window + page as u64;
        let Some(found) = with_space(&place.space, || user_load(at as usize)) else {
            return not_let(soak, &place.space, at, Access::Read);
        };
        soak.count(Count::Reads);
        if !self.is_first(soak, index, found) {
            let (turn, mine) = (self.written[index as usize], self.writes_to(soak, index));
            wrong!(
                soak,
                "page {index} of the file is mapped and reads {found:#x}, written last: {turn} (by this worker: {mine})"
            );
        }
        if !self.writes_to(soak, index) || self.one_in(3) {
            return;
        }
        let turn = self.written[index as usize].wrapping_add(1);
        let value = super::file::first(index, turn);
        if with_space(&place.space, || user_store(at as usize, value)) {
            self.written[index as usize] = turn;
            soak.count(Count::Writes);
        } else {
            not_let(soak, &place.space, at, Access::Write);
        }
    }

    /// Pages of this worker's in the address space that all workers run at the same time.
    fn touch_common(&mut self, soak: &Soak) {
        let share = COMMON_PAGES / soak.workers;
        let first = self.me * share;
        let start = COMMON + first as u64 * PAGE;
        if self.one_in(12) {
            let len = share as u64 * PAGE;
            if soak.common.munmap(start, len).is_err() {
                return soak.count(Count::Refused);
            }
            soak.count(Count::Unmaps);
            if with_space(&soak.common, || user_load(start as usize)).is_some() {
                wrong!(soak, "{start:#x} can be read after it was unmapped");
            }
            self.common.fill(0);
            let mut tries = 0;
            while soak.common.mmap(Some(start), len, RW, Map::Anon).is_err() {
                tries += 1;
                if tries > 1_000_000 {
                    return wrong!(soak, "no memory for an area in {tries} attempts");
                }
                crate::memory::work();
            }
            return;
        }
        // All of it in one stay, so that what this CPU remembers of pages that others move meanwhile would show.
        with_space(&soak.common, || {
            for _ in 0..1 + self.dice.below(64) {
                let page = self.dice.below(share);
                self.touch_common_page(soak, start, page);
            }
        });
    }

    /// A page of this worker's in the common address space, which this CPU runs.
    pub(super) fn touch_common_page(&mut self, soak: &Soak, start: u64, page: usize) {
        let at = start + page as u64 * PAGE;
        self.look_common_page(soak, start, page);
        let turn = self.common[page] % (UNKNOWN - 1) + 1;
        if user_store(at as usize, pattern(at, turn)) {
            self.common[page] = turn;
        } else {
            not_let(soak, &soak.common, at, Access::Write);
        }
    }

    /// The same, read only.
    pub(super) fn look_common_page(&self, soak: &Soak, start: u64, page: usize) {
        let at = start + page as u64 * PAGE;
        let known = self.common[page];
        let wanted = if known == 0 { 0 } else { pattern(at, known) };
        match user_load(at as usize) {
            Some(seen) if seen != wanted => {
                wrong!(
                    soak,
                    "page {page} of worker {} in the common space holds {seen:#x}, not {wanted:#x}",
                    self.me
                );
            }
            Some(_) => {}
            None => not_let(soak, &soak.common, at, Access::Read),
        }
    }

    /// A child takes the place of another address space, which ends.
    fn fork(&mut self, soak: &Soak) {
        let (from, to) = (self.dice.below(PLACES), self.dice.below(PLACES));
        if from == to {
            return;
        }
        let Some(parent) = soak.places[from].try_lock() else {
            return;
        };
        let Some(mut place) = soak.places[to].try_lock() else {
            return;
        };
        let Ok(child) = parent.space.fork(soak.asid()) else {
            return soak.count(Count::Refused);
        };
        drop(core::mem::replace(&mut place.space, child));
        place.mapped = parent.mapped;
        place.window = parent.window;
        place.known.copy_from_slice(&parent.known);
        place.turn = parent.turn;
        soak.count(Count::Forks);
    }

    /// An area goes, or comes back.
    fn unmap(&mut self, soak: &Soak) {
        let Some(mut place) = soak.places[self.dice.below(PLACES)].try_lock() else {
            return;
        };
        let area = self.dice.below(AREAS.len());
        let (start, pages) = (AREAS[area].start, AREAS[area].pages);
        if place.mapped[area] {
            let at = start + self.dice.below(pages) as u64 * PAGE;
            if place.space.munmap(start, pages as u64 * PAGE).is_err() {
                return soak.count(Count::Refused);
            }
            place.mapped[area] = false;
            place.known(area).fill(0);
            soak.count(Count::Unmaps);
            if with_space(&place.space, || user_load(at as usize)).is_some() {
                wrong!(soak, "{at:#x} can be read after it was unmapped");
            }
        }
        // Most of the time another one takes its place at once.
        if !self.one_in(4) && place.map(&soak.file, area).is_err() {
            soak.count(Count::Refused);
        }
    }

    /// The address of some page of a place.
    fn somewhere(&mut self, place: &Place) -> Option<(usize, u64)> {
        let area = self.dice.below(AREAS.len());
        let page = self.dice.below(AREAS[area].pages) as u64;
        place.mapped[area].then_some((area, AREAS[area].start + page * PAGE))
    }

    /// A page of somebody's goes elsewhere.
    fn migrate(&mut self, soak: &Soak) {
        if let Some(page) = self.a_users_page(soak) {
            self.move_page(soak, page);
        }
    }

    /// A page that some address space has.
    pub(super) fn a_users_page(&mut self, soak: &Soak) -> Option<memdesc::Pfn> {
        if self.one_in(2) {
            let at = COMMON + self.dice.below(COMMON_PAGES) as u64 * PAGE;
            return Some(soak.common.page_at(at)?.1);
        }
        let place = soak.places[self.dice.below(PLACES)].try_lock()?;
        let (_, at) = self.somewhere(&place)?;
        Some(place.space.page_at(at)?.1)
    }

    /// What may not be written cannot be, until it may be again.
    fn protect(&mut self, soak: &Soak) {
        let Some(mut place) = soak.places[self.dice.below(PLACES)].try_lock() else {
            return;
        };
        let Some((area, at)) = self.somewhere(&place) else {
            return;
        };
        let (start, len) = (AREAS[area].start, AREAS[area].pages as u64 * PAGE);
        if place.space.mprotect(start, len, VmFlags::READ).is_err() {
            return soak.count(Count::Refused);
        }
        if with_space(&place.space, || user_store((at + LAST) as usize, 0)) {
            wrong!(soak, "{at:#x} could be written, and is read-only");
        }
        if place.space.mprotect(start, len, RW).is_err() {
            // No memory for it: the area begins anew.
            if place.space.munmap(start, len).is_ok() {
                place.mapped[area] = false;
                place.known(area).fill(0);
            } else {
                wrong!(soak, "an area as a whole could not be unmapped");
            }
        }
    }

    fn split(&mut self, soak: &Soak) {
        let Some(page) = self.a_users_page(soak) else {
            return;
        };
        if let Some(folio) = soak.mm.folio_get(page) {
            let to = self.dice.below(4);
            if folio.order() > to {
                // Busy, more often than not.
                let _ = soak.mm.split_folio(&folio, to);
            }
        }
    }
}
