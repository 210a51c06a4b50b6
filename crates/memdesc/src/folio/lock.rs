//! The folio lock: a bit of the flags, and a table of words to sleep on.
//!
//! Who has it may enter the folio into a mapping or take it out, write it back, unmap it everywhere, split it and move
//! it. It is held over reading and writing to disk, so it sleeps in every configuration. Those who wait sleep on one of a few words that
//! folios share by their address (`folio_wait_table` of Linux): a bit in the flags says that somebody does.

use crate::desc::{Folio, FolioFlags};
use crate::mm::Mm;
use crate::platform::{Platform, might_sleep};
use core::sync::atomic::AtomicU32;

const WORDS: usize = 64;

/// Words to sleep on.
#[derive(Debug)]
pub(crate) struct WaitTable([AtomicU32; WORDS]);

impl WaitTable {
    pub(crate) fn new() -> WaitTable {
        WaitTable([const { AtomicU32::new(0) }; WORDS])
    }

    fn word(&self, folio: &Folio) -> &AtomicU32 {
        let address = (&raw const *folio).addr();
        // Folios lie 32 bytes apart: some bits of which one, and of which page.
        &self.0[(address >> 5 ^ address >> 13) % WORDS]
    }
}

/// The folio is locked as long as this lives.
#[must_use]
pub struct FolioLock<'a, P: Platform> {
    mm: &'a Mm<P>,
    folio: &'a Folio,
}

impl<'a, P: Platform> FolioLock<'a, P> {
    /// The folio.
    pub fn folio(&self) -> &'a Folio {
        self.folio
    }

    pub(crate) fn is_of(&self, mm: &Mm<P>) -> bool {
        core::ptr::eq(self.mm, mm)
    }
}

impl<P: Platform> core::fmt::Debug for FolioLock<'_, P> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_tuple("FolioLock").field(self.folio).finish()
    }
}

impl<P: Platform> Drop for FolioLock<'_, P> {
    fn drop(&mut self) {
        self.mm.folio_clear_and_wake(self.folio, FolioFlags::LOCKED);
    }
}

impl<P: Platform> Mm<P> {
    /// Locks a folio that the caller has (`folio_lock`).
    ///
    /// # Context
    ///
    /// May sleep.
    pub fn folio_lock<'a>(&'a self, folio: &'a Folio) -> FolioLock<'a, P> {
        might_sleep(&self.pages.platform, "folio_lock");
        while folio.set_flag(FolioFlags::LOCKED) {
            self.folio_wait(folio, FolioFlags::LOCKED);
        }
        FolioLock { mm: self, folio }
    }

    /// Locks it if nobody has (`folio_trylock`). Any context.
    pub fn folio_trylock<'a>(&'a self, folio: &'a Folio) -> Option<FolioLock<'a, P>> {
        (!folio.set_flag(FolioFlags::LOCKED)).then_some(FolioLock { mm: self, folio })
    }

    /// Waits until the folio is no longer under writeback (`folio_wait_writeback`).
    ///
    /// # Context
    ///
    /// May sleep.
    pub fn folio_wait_writeback(&self, folio: &Folio) {
        while folio.has_flag(FolioFlags::WRITEBACK) {
            self.folio_wait(folio, FolioFlags::WRITEBACK);
        }
    }

    /// Sleeps as long as the flag is set; may come back early.
    fn folio_wait(&self, folio: &Folio, flag: FolioFlags) {
        let turns = self.folio_waits.word(folio);
        folio.wait_once(flag, turns, |turns, turn| {
            self.pages.platform.park(turns, turn);
            self.pages.platform.relax(0);
        });
    }

    /// Clears a flag that others may wait for.
    pub(crate) fn folio_clear_and_wake(&self, folio: &Folio, flag: FolioFlags) {
        let turns = self.folio_waits.word(folio);
        folio.clear_and_wake(flag, turns, |turns| {
            self.pages.platform.unpark_all(turns);
        });
    }
}
