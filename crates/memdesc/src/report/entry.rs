//! What is remembered of one block, in an entry that any context writes and reads, and nobody waits for.
//!
//! | state of an entry | `seq` | who may write it |
//! |---|---|---|
//! | empty or whole | even | who makes it odd |
//! | being written | odd | who made it odd |
//!
//! Who reads has what it held when its number was even, the same before and after, or nothing.

use core::panic::Location;

use super::depot::StackId;
use crate::address::Pfn;
use crate::memmap::word::PageType;
use crate::sync::atomic::{AtomicPtr, AtomicU32, AtomicU64, Ordering, fence};

/// A CPU's number where there was none.
pub(crate) const NO_CPU: u32 = u16::MAX as u32;

/// Who did something, and when.
#[derive(Clone, Copy, Debug)]
pub struct Track {
    /// The caller.
    pub location: &'static Location<'static>,
    /// On this CPU; 65535 where there was none.
    pub cpu: u32,
    /// At this time, in the platform's unit.
    pub when: u64,
    /// With this call stack ([`Mm::stack`](crate::Mm::stack)).
    pub stack: StackId,
}

/// Who had a block of pages, or gave it back, and as what.
#[derive(Clone, Copy, Debug)]
pub struct PageTrack {
    /// Who, where and when.
    pub track: Track,
    /// The order that the block had.
    pub order: usize,
    /// The type that it had, or was to get.
    pub kind: PageType,
    /// Its place among all events, for which of two was later.
    pub(crate) serial: u64,
}

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
    pub(super) fn order(&self) -> usize {
        let latest = |track: Option<PageTrack>| track.map_or((0, 0), |t| (t.serial, t.order));
        latest(self.allocated).max(latest(self.freed)).1
    }

    /// When the last event was.
    pub(super) fn serial(&self) -> u64 {
        let serial = |track: Option<PageTrack>| track.map_or(0, |t| t.serial);
        serial(self.allocated).max(serial(self.freed))
    }
}

/// An event as it lies in an entry.
#[repr(C)]
pub(super) struct Event {
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

    pub(super) fn set(&self, track: &PageTrack) {
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

    pub(super) fn clear(&self) {
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
    pub(super) pfn: AtomicU32,
    pub(super) events: [Event; 2],
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
    pub(super) fn claim(&self, seq: u32) -> bool {
        self.claim_as(seq, true)
    }

    /// `fenced` is for the models, which leave out what it is for.
    #[inline]
    pub(super) fn claim_as(&self, seq: u32, fenced: bool) -> bool {
        let claimed = seq & 1 == 0
            && self
                .seq
                .compare_exchange(seq, seq + 1, Ordering::Acquire, Ordering::Relaxed)
                .is_ok();
        // What is written from here on is seen after the odd number: pairs with the fence in `read`.
        if fenced {
            fence(Ordering::Release);
        }
        claimed
    }

    pub(super) fn release(&self) {
        // Release: what was written, to who sees the even number.
        self.release_as(Ordering::Release);
    }

    /// `order` is for the models.
    #[inline]
    pub(super) fn release_as(&self, order: Ordering) {
        let seq = self.seq.load(Ordering::Relaxed);
        self.seq.store(seq.wrapping_add(1), order);
    }

    /// What it holds, if it was whole; with the number under which it was.
    pub(super) fn read(&self) -> Option<(u32, PageHistory)> {
        self.read_as(true)
    }

    /// `twice` is for the models.
    #[inline]
    pub(super) fn read_as(&self, twice: bool) -> Option<(u32, PageHistory)> {
        // Acquire: pairs with the Release in `release`.
        let seq = self.seq.load(Ordering::Acquire);
        let pfn = self.pfn.load(Ordering::Relaxed);
        let events = [self.events[0].load(), self.events[1].load()];
        fence(Ordering::Acquire);
        if seq & 1 != 0 || twice && self.seq.load(Ordering::Relaxed) != seq {
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
