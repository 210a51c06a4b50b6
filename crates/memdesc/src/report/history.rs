//! Page history: who had a block last and who gave it back, as far as a bounded table remembers (`page_owner`).
//!
//! Linux keeps 16 bytes and more for every page. Here nothing but the word grows with the number of pages, so the table has as many entries as
//! [`Config::page_owner`](crate::Config::page_owner) says: [`WAYS`] to a set, the set found by the block's first page. A set that is full drops
//! the entry that was written longest ago, and counts that it did: a report then says that there was something.
//!
//! | state of an entry | `seq` | who may write it |
//! |---|---|---|
//! | empty or whole | even | who makes it odd |
//! | being written | odd | who made it odd |
//!
//! Written from any context, outside all locks. A block is in one pair of hands when it is handed out and when it comes back, so the events of
//! one block never race; those of others only want its entry. Who finds an entry in somebody's hands takes another, and waits for nobody.

use core::panic::Location;

use super::depot::StackId;
use super::{PageTrack, Track};
use crate::address::{MAX_ORDER, Pfn};
use crate::memmap::{BootSlice, PageType};
use crate::sync::atomic::{AtomicPtr, AtomicU32, AtomicU64, Ordering, fence};

/// Entries in a set.
pub(crate) const WAYS: usize = 8;
/// A CPU's number where there was none.
pub(crate) const NO_CPU: u32 = u16::MAX as u32;

/// What the table remembers of a block.
#[derive(Clone, Copy, Debug)]
pub struct PageHistory {
    /// The first page of the block that was handed out or came back.
    pub head: Pfn,
    /// When it was handed out last.
    pub allocated: Option<PageTrack>,
    /// When it came back last.
    pub freed: Option<PageTrack>,
}

impl PageHistory {
    /// The order that the block had at its last event.
    fn order(&self) -> usize {
        let latest = |track: Option<PageTrack>| track.map_or((0, 0), |t| (t.serial, t.order));
        latest(self.allocated).max(latest(self.freed)).1
    }

    /// When the last event was.
    fn serial(&self) -> u64 {
        let serial = |track: Option<PageTrack>| track.map_or(0, |t| t.serial);
        serial(self.allocated).max(serial(self.freed))
    }
}

/// An event as it lies in an entry.
#[repr(C)]
struct Event {
    location: AtomicPtr<Location<'static>>,
    when: AtomicU64,
    /// Its place among all events; 0 for none.
    serial: AtomicU64,
    stack: AtomicU32,
    /// CPU 16 bits, order 8, type 8.
    facts: AtomicU32,
}

impl Event {
    fn new() -> Event {
        Event {
            location: AtomicPtr::new(core::ptr::null_mut()),
            when: AtomicU64::new(0),
            serial: AtomicU64::new(0),
            stack: AtomicU32::new(0),
            facts: AtomicU32::new(0),
        }
    }

    fn set(&self, track: &PageTrack) {
        let location: *const Location<'static> = track.track.location;
        self.location.store(location.cast_mut(), Ordering::Relaxed);
        self.when.store(track.track.when, Ordering::Relaxed);
        self.serial.store(track.serial, Ordering::Relaxed);
        self.stack
            .store(track.track.stack.bits(), Ordering::Relaxed);
        let facts = track.track.cpu.min(NO_CPU)
            | (track.order as u32) << 16
            | u32::from(track.kind as u8) << 24;
        self.facts.store(facts, Ordering::Relaxed);
    }

    fn clear(&self) {
        self.serial.store(0, Ordering::Relaxed);
    }

    /// Where it was called from is an address until the entry is known to have been whole.
    fn load(&self) -> (RawTrack, *mut Location<'static>) {
        let facts = self.facts.load(Ordering::Relaxed);
        let raw = RawTrack {
            when: self.when.load(Ordering::Relaxed),
            serial: self.serial.load(Ordering::Relaxed),
            stack: self.stack.load(Ordering::Relaxed),
            facts,
        };
        (raw, self.location.load(Ordering::Relaxed))
    }
}

struct RawTrack {
    when: u64,
    serial: u64,
    stack: u32,
    facts: u32,
}

impl RawTrack {
    /// # Safety
    ///
    /// The location is null or was stored by [`Event::set`].
    unsafe fn track(&self, location: *mut Location<'static>) -> Option<PageTrack> {
        if self.serial == 0 {
            return None;
        }
        Some(PageTrack {
            track: Track {
                // SAFETY: the caller's promise.
                location: unsafe { location.as_ref() }?,
                cpu: self.facts & NO_CPU,
                when: self.when,
                stack: StackId::from_bits(self.stack),
            },
            order: (self.facts >> 16 & 0xff) as usize,
            kind: PageType::ALL[(self.facts >> 24) as usize % PageType::COUNT],
            serial: self.serial,
        })
    }
}

/// An entry: the last two events of a block.
#[repr(C, align(64))]
pub(crate) struct Entry {
    seq: AtomicU32,
    pfn: AtomicU32,
    events: [Event; 2],
}

impl Entry {
    pub(crate) fn new() -> Entry {
        Entry {
            seq: AtomicU32::new(0),
            pfn: AtomicU32::new(Pfn::NONE.0),
            events: [Event::new(), Event::new()],
        }
    }

    /// Has the entry to write, if nobody else does and it is still as it was seen.
    fn claim(&self, seq: u32) -> bool {
        let claimed = seq & 1 == 0
            && self
                .seq
                .compare_exchange(seq, seq + 1, Ordering::Acquire, Ordering::Relaxed)
                .is_ok();
        // What is written from here on is seen after the odd number: pairs with the fence in `read`.
        fence(Ordering::Release);
        claimed
    }

    fn release(&self) {
        let seq = self.seq.load(Ordering::Relaxed);
        self.seq.store(seq.wrapping_add(1), Ordering::Release);
    }

    /// What it holds, if it was whole; with the number under which it was.
    fn read(&self) -> Option<(u32, PageHistory)> {
        // Acquire: pairs with the Release in `release`.
        let seq = self.seq.load(Ordering::Acquire);
        let pfn = self.pfn.load(Ordering::Relaxed);
        let events = [self.events[0].load(), self.events[1].load()];
        fence(Ordering::Acquire);
        if seq & 1 != 0 || self.seq.load(Ordering::Relaxed) != seq {
            return None;
        }
        // SAFETY: only `set` and `new` store there.
        let track = |i: usize| unsafe { events[i].0.track(events[i].1) };
        let history = PageHistory {
            head: Pfn(pfn),
            allocated: track(0),
            freed: track(1),
        };
        Some((seq, history))
    }
}

/// A set's own counter.
#[repr(C)]
pub(crate) struct SetInfo {
    /// Entries dropped for others, and events for which there was no entry to be had.
    dropped: AtomicU32,
}

impl SetInfo {
    pub(crate) fn new() -> SetInfo {
        SetInfo {
            dropped: AtomicU32::new(0),
        }
    }
}

/// What is remembered of all pages.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct PageOwnerInfo {
    /// Entries there are.
    pub entries: usize,
    /// Entries in use.
    pub used: usize,
    /// Entries that made room for others.
    pub dropped: u64,
}

/// The table.
pub(crate) struct History {
    entries: BootSlice<Entry>,
    sets: BootSlice<SetInfo>,
    serial: AtomicU64,
}

impl History {
    /// Over entries of [`WAYS`] for each set.
    pub(crate) fn new(entries: BootSlice<Entry>, sets: BootSlice<SetInfo>) -> History {
        History {
            entries,
            sets,
            serial: AtomicU64::new(0),
        }
    }

    /// Sets for so many entries.
    pub(crate) fn sets_for(entries: usize) -> usize {
        entries.div_ceil(WAYS)
    }

    /// Is anything remembered at all?
    #[inline]
    pub(crate) fn is_on(&self) -> bool {
        !self.sets.is_empty()
    }

    fn set(&self, head: Pfn) -> (&SetInfo, &[Entry]) {
        let hash = (u64::from(head.0).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) as usize;
        let set = hash % self.sets.len();
        (&self.sets[set], &self.entries[set * WAYS..][..WAYS])
    }

    /// A block was handed out, or came back. From any context; by whom it is in the hands of.
    pub(crate) fn note(&self, head: Pfn, freed: bool, mut track: PageTrack) {
        track.serial = self.serial.fetch_add(1, Ordering::Relaxed) + 1;
        let (set, entries) = self.set(head);
        // Its own entry. Nobody but us writes it under this page number; but somebody may be taking it away.
        let own = entries.iter().find_map(|entry| {
            let (seq, held) = entry.read()?;
            (held.head == head && entry.claim(seq)).then_some(entry)
        });
        if let Some(entry) = own {
            if !freed {
                // Who gave it back before this one had it is not of interest beside who has it now, but is kept for who asks.
                entry.events[0].set(&track);
            } else {
                entry.events[1].set(&track);
            }
            return entry.release();
        }
        // An empty one, or the one written longest ago. Each attempt that fails is somebody else's success.
        for _ in 0..WAYS {
            let whole = entries
                .iter()
                .filter_map(|entry| Some((entry, entry.read()?)));
            let Some((entry, (seq, old))) = whole.min_by_key(|(_, (_, held))| held.serial()) else {
                break;
            };
            if !entry.claim(seq) {
                continue;
            }
            if old.head != Pfn::NONE {
                set.dropped.fetch_add(1, Ordering::Relaxed);
            }
            entry.pfn.store(head.0, Ordering::Relaxed);
            entry.events.iter().for_each(Event::clear);
            entry.events[usize::from(freed)].set(&track);
            return entry.release();
        }
        set.dropped.fetch_add(1, Ordering::Relaxed);
    }

    /// What is known of the block that this page was part of when it last changed hands; and were entries dropped among which it may have been?
    pub(crate) fn look(&self, pfn: Pfn) -> (Option<PageHistory>, bool) {
        if !self.is_on() || pfn == Pfn::NONE {
            return (None, false);
        }
        let (mut latest, mut dropped) = (None::<PageHistory>, false);
        for order in 0..=MAX_ORDER {
            let head = pfn.align_down(order);
            let (set, entries) = self.set(head);
            dropped |= set.dropped.load(Ordering::Relaxed) != 0;
            if order > 0 && head == pfn.align_down(order - 1) {
                continue;
            }
            for (_, found) in entries.iter().filter_map(Entry::read) {
                let covers =
                    found.head == head && pfn.0 - head.0 < 1 << found.order().min(MAX_ORDER);
                if covers && latest.is_none_or(|l| l.serial() < found.serial()) {
                    latest = Some(found);
                }
            }
        }
        (latest, dropped)
    }

    pub(crate) fn info(&self) -> PageOwnerInfo {
        let whole = self.entries.iter().filter_map(Entry::read);
        PageOwnerInfo {
            entries: self.entries.len(),
            used: whole.filter(|(_, held)| held.head != Pfn::NONE).count(),
            dropped: self
                .sets
                .iter()
                .map(|set| u64::from(set.dropped.load(Ordering::Relaxed)))
                .sum(),
        }
    }
}

impl core::fmt::Debug for History {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        self.info().fmt(f)
    }
}
