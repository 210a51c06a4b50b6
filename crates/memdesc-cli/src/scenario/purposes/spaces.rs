//! Address spaces of the scenario: areas of each kind, of which every other one belongs to a thread, who alone maps, writes and unmaps it and so knows
//! what must be in it. All threads look, fork, move, split and make pages fail.

use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

use memdesc::Pfn;
use memdesc::gfp::{__GFP_RECLAIM, GFP_HIGHUSER_MOVABLE};
use memdesc::mmap::{Access, FaultError, Map, MmStruct, UserPages, VmFlags};
use memdesc_host::Host;

use super::things::is_all;
use super::work::Worker;
use super::{CPUS, Count, FILE_PAGES, read, try_write};

pub(super) const SPACES: usize = 4;
const KINDS: usize = 4;
const AREAS: usize = KINDS * CPUS;
/// 2 MiB and a little.
const AREA: usize = 520;
/// Pages from one area to the next.
const STRIDE: usize = 1024;
const FIRST: usize = 512;
pub(super) const TOP: u64 = ((FIRST + AREAS * STRIDE) * 4096) as u64;

/// What a page is known to hold.
const NOTHING: u8 = 0;
const ANYTHING: u8 = 1;
const WRITTEN: u8 = 2;

/// The kind of area that drivers put their pages into.
const DRIVERS: usize = 3;

/// Pages that a device has.
pub(super) type Pins<'m> = Vec<(UserPages<'m, Host>, u8)>;

/// A space, and what is known of it.
pub(super) struct Live<'m> {
    pub(super) space: MmStruct<'m, Host>,
    known: Vec<AtomicU8>,
    mapped: [AtomicBool; AREAS],
}

impl<'m> Live<'m> {
    pub(super) fn new(space: MmStruct<'m, Host>) -> Live<'m> {
        Live {
            space,
            known: (0..AREAS * AREA).map(|_| AtomicU8::new(NOTHING)).collect(),
            mapped: [const { AtomicBool::new(false) }; AREAS],
        }
    }

    fn known(&self, area: usize, page: usize) -> &AtomicU8 {
        &self.known[area * AREA + page]
    }

    fn forget(&self, area: usize, what: u8) {
        for known in &self.known[area * AREA..][..AREA] {
            known.store(what, Ordering::Relaxed);
        }
    }
}

fn addr(area: usize, page: usize) -> u64 {
    ((FIRST + area * STRIDE + page) * 4096) as u64
}

fn flags_of(area: usize) -> (VmFlags, bool) {
    let rw = VmFlags::READ_WRITE;
    match area / CPUS {
        0 => (rw, false),
        1 => (rw.with(VmFlags::LARGE).with(VmFlags::HUGE), false),
        2 => (rw, true),
        _ => (rw, false),
    }
}

/// What this page is full of, once it is written.
fn pattern(area: usize, page: usize) -> u8 {
    ((area * 31 + page * 7) % 251) as u8 + 1
}

/// May these bytes be in a page of which no more is known?
fn may_be(bytes: &[u8], area: usize, page: usize, known: u8) -> bool {
    let fresh = match area / CPUS {
        2 => u64::from_le_bytes(bytes[..8].try_into().unwrap_or_default()) >> 32 == page as u64,
        // Of whoever had it: one byte all over.
        DRIVERS => return is_all(bytes, bytes[0]),
        _ => is_all(bytes, 0),
    };
    let written = is_all(bytes, pattern(area, page));
    match known {
        NOTHING => fresh,
        WRITTEN => written,
        _ => fresh || written,
    }
}

impl<'s, 'm> Worker<'s, 'm> {
    pub(super) fn spaces(&mut self) {
        match self.rng.below(100) {
            0..=54 => self.touch(),
            55..=69 => self.look_at_theirs(),
            70..=79 => self.map_or_unmap(),
            80..=82 => self.fork(),
            83 => self.exit(),
            84..=89 => self.pin(),
            90..=95 => self.migrate(),
            _ => self.split(),
        }
    }

    /// An area of this thread's.
    fn my_area(&mut self) -> usize {
        self.rng.below(KINDS) * CPUS + self.me % CPUS
    }

    fn is_owner(&self) -> bool {
        self.me < CPUS
    }

    fn a_page(&mut self) -> usize {
        let near = self.rng.one_in(2);
        self.rng.below(if near { 16 } else { AREA })
    }

    /// The page is broken: what was in it is lost, and the area begins anew.
    fn lost(&self, live: &Live<'m>, area: usize) {
        self.shared.count(Count::Lost);
        live.mapped[area].store(false, Ordering::Relaxed);
        if live
            .space
            .munmap(addr(area, 0), AREA as u64 * 4096)
            .is_err()
        {
            live.mapped[area].store(true, Ordering::Relaxed);
            return live.forget(area, ANYTHING);
        }
        live.forget(area, NOTHING);
    }

    fn touch(&mut self) {
        if !self.is_owner() {
            return self.look_at_theirs();
        }
        let slot = self.rng.below(SPACES);
        let guard = read(&self.shared.spaces[slot]);
        let Some(live) = &*guard else { return };
        for _ in 0..8 {
            let (area, page) = (self.my_area(), self.a_page());
            if !live.mapped[area].load(Ordering::Relaxed) {
                continue;
            }
            let known = live.known(area, page);
            let mut bytes = [0; 4096];
            match live.space.read(addr(area, page), &mut bytes) {
                Ok(()) => {
                    let state = known.load(Ordering::Relaxed);
                    if !may_be(&bytes, area, page, state) {
                        self.shared.wrong(format!(
                            "space {slot}, area {area}, page {page}, known {state}: {:?}",
                            &bytes[..16]
                        ));
                    }
                }
                Err(FaultError::HwPoison) => return self.lost(live, area),
                Err(FaultError::Oom(_)) => self.shared.count(Count::Refused),
                Err(why) => self
                    .shared
                    .wrong(format!("space {slot}, area {area}, page {page}: {why}")),
            }
            self.shared.count(Count::Reads);
            if area / CPUS == DRIVERS || self.rng.one_in(2) {
                continue;
            }
            let full = [pattern(area, page); 4096];
            let before = known.swap(ANYTHING, Ordering::Relaxed);
            match live.space.write(addr(area, page), &full) {
                Ok(()) => known.store(WRITTEN, Ordering::Relaxed),
                Err(FaultError::HwPoison) => return self.lost(live, area),
                Err(FaultError::Oom(_)) => {
                    known.store(before, Ordering::Relaxed);
                    self.shared.count(Count::Refused);
                }
                Err(why) => self.shared.wrong(format!(
                    "space {slot}, area {area}, page {page}, written: {why}"
                )),
            }
            self.shared.count(Count::Writes);
        }
    }

    /// Any page of any space, whose owner may be at it.
    fn look_at_theirs(&mut self) {
        let slot = self.rng.below(SPACES);
        let guard = read(&self.shared.spaces[slot]);
        let Some(live) = &*guard else { return };
        let (area, page) = (self.rng.below(AREAS), self.a_page());
        let mut bytes = [0; 64];
        if area / CPUS == 2 || live.space.read(addr(area, page), &mut bytes).is_err() {
            return;
        }
        let pattern = pattern(area, page);
        let right = if area / CPUS == DRIVERS {
            // The page may change between two bytes.
            true
        } else {
            bytes.iter().all(|&b| b == 0 || b == pattern)
        };
        if !right {
            self.shared.wrong(format!(
                "space {slot}, area {area}, page {page} of another: {bytes:?}, not {pattern:#04x}"
            ));
        }
        self.shared.count(Count::Reads);
    }

    fn map_or_unmap(&mut self) {
        if !self.is_owner() {
            return;
        }
        let slot = self.rng.below(SPACES);
        let guard = read(&self.shared.spaces[slot]);
        let Some(live) = &*guard else { return };
        let area = self.my_area();
        let (mapped, len) = (&live.mapped[area], AREA as u64 * 4096);
        if mapped.load(Ordering::Relaxed) {
            if !self.rng.one_in(3) {
                return;
            }
            if live.space.munmap(addr(area, 0), len).is_err() {
                return self.shared.count(Count::Refused);
            }
            mapped.store(false, Ordering::Relaxed);
            live.forget(area, NOTHING);
            self.shared.count(Count::Unmaps);
        } else {
            let (flags, file) = flags_of(area);
            let what = if file {
                Map::File(self.shared.file, 0)
            } else {
                Map::Anon
            };
            match live.space.mmap(Some(addr(area, 0)), len, flags, what) {
                Ok(_) => {
                    mapped.store(true, Ordering::Relaxed);
                    self.shared.count(Count::Maps);
                }
                Err(_) => self.shared.count(Count::Refused),
            }
        }
    }

    /// Puts a page of the caller's, full of this byte, into a space, and uses it there.
    pub(super) fn insert(&mut self, page: Pfn, byte: u8) {
        if !self.is_owner() {
            return;
        }
        let slot = self.rng.below(SPACES);
        let guard = read(&self.shared.spaces[slot]);
        let Some(live) = &*guard else { return };
        let area = DRIVERS * CPUS + self.me;
        let at = addr(area, self.rng.below(AREA));
        if !live.mapped[area].load(Ordering::Relaxed) || live.space.insert_page(at, page).is_err() {
            return self.shared.count(Count::Refused);
        }
        self.shared.count(Count::Inserts);
        let mut bytes = [0; 4096];
        let result = live
            .space
            .write(at + 100, &[byte; 300])
            .and_then(|()| live.space.read(at, &mut bytes));
        match result {
            Ok(()) if is_all(&bytes, byte) => {}
            Ok(()) => self.shared.wrong(format!(
                "{page:?} at {at:#x} of space {slot}: {:?}, not {byte:#04x}",
                &bytes[..16]
            )),
            Err(FaultError::HwPoison) => self.lost(live, area),
            Err(FaultError::Oom(_)) => self.shared.count(Count::Refused),
            Err(why) => self
                .shared
                .wrong(format!("{page:?} at {at:#x} of space {slot}: {why}")),
        }
    }

    fn fork(&mut self) {
        if !self.is_owner() {
            return;
        }
        let (from, to) = (self.rng.below(SPACES), self.rng.below(SPACES));
        if from == to {
            return;
        }
        let guard = read(&self.shared.spaces[from]);
        let Some(parent) = &*guard else { return };
        // Who takes two slots waits for the second only if nobody has it.
        let Some(mut target) = try_write(&self.shared.spaces[to]) else {
            return;
        };
        let Ok(space) = parent.space.fork(self.shared.asid()) else {
            return self.shared.count(Count::Refused);
        };
        let child = Live::new(space);
        for area in 0..AREAS {
            if area % CPUS != self.me {
                // Its owner may be at work on it: the child starts without.
                let len = AREA as u64 * 4096;
                if child.space.munmap(addr(area, 0), len).is_err() {
                    return self.shared.count(Count::Refused);
                }
                continue;
            }
            child.mapped[area].store(
                parent.mapped[area].load(Ordering::Relaxed),
                Ordering::Relaxed,
            );
            for page in 0..AREA {
                let known = parent.known(area, page).load(Ordering::Relaxed);
                child.known(area, page).store(known, Ordering::Relaxed);
            }
        }
        *target = Some(child);
        self.shared.count(Count::Forks);
    }

    fn exit(&mut self) {
        let slot = self.rng.below(SPACES);
        let Some(mut target) = try_write(&self.shared.spaces[slot]) else {
            return;
        };
        *target = None;
        match MmStruct::with_top(self.shared.mm, self.shared.asid(), TOP) {
            Ok(space) => *target = Some(Live::new(space)),
            Err(_) => self.shared.count(Count::Refused),
        }
        self.shared.count(Count::Exits);
    }

    /// A device writes to a page while its owner goes on, and keeps it for a while.
    fn pin(&mut self) {
        if !self.is_owner() {
            return;
        }
        if self.pins.len() > self.rng.below(16) {
            let which = self.rng.below(self.pins.len());
            let (pin, byte) = self.pins.swap_remove(which);
            let at = self.shared.mm.page_address(pin.pfn());
            // SAFETY: pinned.
            let bytes = unsafe { std::slice::from_raw_parts(at, 4096) };
            if !is_all(bytes, byte) {
                let page = pin.pfn();
                self.shared.wrong(format!(
                    "{page:?} is pinned: {:?}, not {byte:#04x}",
                    &bytes[..16]
                ));
            }
            return;
        }
        let guard = read(&self.shared.spaces[self.rng.below(SPACES)]);
        let Some(live) = &*guard else { return };
        let (area, page) = (self.my_area(), self.a_page());
        if area / CPUS == DRIVERS || !live.mapped[area].load(Ordering::Relaxed) {
            return;
        }
        let pin = match live.space.pin_user_page(addr(area, page), Access::Write) {
            Ok(pin) => pin,
            Err(FaultError::HwPoison) => return self.lost(live, area),
            Err(_) => return self.shared.count(Count::Refused),
        };
        self.shared.count(Count::Pins);
        let byte = pattern(area, page);
        let known = live.known(area, page);
        known.store(ANYTHING, Ordering::Relaxed);
        let at = self.shared.mm.page_address(pin.pfn());
        // SAFETY: pinned, and of an area that this thread alone writes to.
        unsafe { at.write_bytes(byte, 4096) };
        known.store(WRITTEN, Ordering::Relaxed);
        self.pins.push((pin, byte));
    }

    /// A page of some space.
    pub(super) fn a_users_page(&mut self) -> Option<Pfn> {
        let guard = read(&self.shared.spaces[self.rng.below(SPACES)]);
        let live = guard.as_ref()?;
        let (area, page) = (self.rng.below(AREAS), self.a_page());
        Some(live.space.page_at(addr(area, page))?.1)
    }

    fn migrate(&mut self) {
        let mm = self.shared.mm;
        let Some(page) = self.a_users_page() else {
            return;
        };
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
        let Some(folio) = self.a_users_page().and_then(|page| mm.folio_get(page)) else {
            return;
        };
        let to = self.rng.below(4);
        if mm.split_folio(&folio, to).is_ok() {
            self.shared.count(Count::Splits);
        }
    }

    /// The file: read, written, written back.
    pub(super) fn file(&mut self) {
        let file = self.shared.file;
        let page = AREA as u64 + self.rng.below_u64(FILE_PAGES - AREA as u64);
        let mut first = [0; 8];
        for page in page..(page + self.rng.below_u64(32)).min(FILE_PAGES) {
            match file.read(page * 4096, &mut first) {
                Ok(()) if u64::from_le_bytes(first) >> 32 == page => {}
                Ok(()) => {
                    let found = u64::from_le_bytes(first);
                    self.shared
                        .wrong(format!("page {page} of the file: {found:#x}"));
                }
                Err(_) => self.shared.count(Count::Refused),
            }
            self.shared.count(Count::FileReads);
        }
        if self.rng.one_in(4) {
            self.turn += 1;
            let new = crate::scenario::disk::original(page) | self.turn & 0xffff_ffff;
            match file.write(page * 4096, &new.to_le_bytes()) {
                Ok(()) => self.shared.count(Count::FileWrites),
                Err(_) => self.shared.count(Count::Refused),
            }
        }
        if self.rng.one_in(40) {
            let _ = file.writeback(page..=page + 1024);
        }
    }

    /// From here on a space is charged to another group, or to nobody.
    pub(super) fn charge_space(&mut self) {
        let guard = read(&self.shared.spaces[self.rng.below(SPACES)]);
        let Some(live) = &*guard else { return };
        let group = read(&self.shared.groups[self.rng.below(self.shared.groups.len())]);
        if live.space.set_memcg(group.as_ref()).is_ok() {
            self.shared.count(Count::Charged);
        }
    }
}
