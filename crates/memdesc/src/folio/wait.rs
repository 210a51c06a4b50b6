//! Waiting for a bit of a folio's flags to go (`folio_wait_bit`, `folio_wake_bit`): the protocol, apart from who sleeps how.
//!
//! Who waits reads the turn of the word he will sleep on, says so in the flags, and sleeps if the bit is still there and the turn the
//! same. Who clears the bit takes WAITERS with it in the same step; if it was there, he turns the word and wakes all.
//!
//! So a waiter either said so before the bit was cleared, and then the turn that he read is over before he is woken; or he says so after, and then
//! finds the bit gone, or had by another, who will find WAITERS. Bits and folios share WAITERS and turns: a wake-up too many is a look too many.

use crate::desc::{Folio, FolioFlags};
use crate::sync::atomic::{AtomicU32, Ordering};

impl Folio {
    /// Sleeps while the flag is set, by `park`, which returns at once if the word is no longer what it is given; may come back early.
    pub(super) fn wait_once(
        &self,
        flag: FolioFlags,
        turns: &AtomicU32,
        park: impl FnOnce(&AtomicU32, u32),
    ) {
        // Before WAITERS is set: a turn that was read later may be the one that is waited for.
        // Acquire keeps it before.
        let turn = turns.load(Ordering::Acquire);
        self.set_flag(FolioFlags::WAITERS);
        if self.has_flag(flag) {
            park(turns, turn);
        }
    }

    /// Clears a flag that others may wait for, and wakes them by `unpark_all`.
    pub(super) fn clear_and_wake(
        &self,
        flag: FolioFlags,
        turns: &AtomicU32,
        unpark_all: impl FnOnce(&AtomicU32),
    ) {
        if self.clear_flags(flag, FolioFlags::WAITERS) {
            // Release pairs with the Acquire in `wait_once`: who sees the turn sees the flag gone.
            turns.fetch_add(1, Ordering::Release);
            unpark_all(turns);
        }
    }
}
