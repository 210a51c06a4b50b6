//! Page history: who had a block last and who gave it back, as far as a bounded table remembers (`page_owner`).
//!
//! Linux keeps 16 bytes and more for every page. Here nothing but the word grows with the number of pages, so the table has as many entries as
//! [`Config::page_owner`](crate::Config::page_owner) says: [`WAYS`] to a set, the set found by the block's first page. A set that is full drops
//! the entry that was written longest ago, and counts that it did: a report then says that there was something. How an entry is written and read
//! is in [`entry`](super::entry).
//!
//! Written from any context, outside all locks. A block is in one pair of hands when it is handed out and when it comes back, so the events of
//! one block never race; those of others only want its entry. Who finds an entry in somebody's hands takes another, and waits for nobody.

use super::entry::{Entry, Event, PageHistory, PageTrack};
use crate::address::{MAX_ORDER, Pfn};
use crate::memmap::BootSlice;
use crate::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// Entries in a set.
pub(crate) const WAYS: usize = 8;

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
    /// The same table once more, to be read.
    pub(crate) fn again(&self) -> History {
        History::new(self.entries.again(), self.sets.again())
    }

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
