//! Waiting for an uncharge: who is refused at a limit sleeps until somebody lets go of something.
//!
//! Who waits counts himself first and then tries once more; who uncharges does that first and then looks whether anybody is counted. A fence stands between the two steps
//! of each, so one of the two sees the other: either the second try finds what was uncharged, or the one who uncharged wakes. The turn that the waiter read before his
//! second try has gone by then, so he does not fall asleep on it.

use crate::sync::atomic::{AtomicU32, Ordering, fence};

/// Those who wait for an uncharge, anywhere in the tree.
#[derive(Debug)]
pub(crate) struct Waiters {
    waiting: AtomicU32,
    turn: AtomicU32,
}

impl Waiters {
    pub(crate) fn new() -> Waiters {
        Waiters {
            waiting: AtomicU32::new(0),
            turn: AtomicU32::new(0),
        }
    }

    /// Tries, and sleeps once if it did not work. `park` sleeps as long as the word has the value; it may come back early.
    pub(crate) fn wait_once<T>(
        &self,
        again: impl FnOnce() -> Option<T>,
        park: impl FnOnce(&AtomicU32, u32),
    ) -> Option<T> {
        self.waiting.fetch_add(1, Ordering::Relaxed);
        // Pairs with the fence in `wake`.
        fence(Ordering::SeqCst);
        let turn = self.turn.load(Ordering::Acquire);
        let got = again();
        if got.is_none() {
            park(&self.turn, turn);
        }
        self.waiting.fetch_sub(1, Ordering::Relaxed);
        got
    }

    /// Something was uncharged: whoever waits tries again. From any context.
    pub(crate) fn wake(&self, unpark: impl FnOnce(&AtomicU32)) {
        fence(Ordering::SeqCst);
        if self.waiting.load(Ordering::Relaxed) != 0 {
            // Release pairs with the Acquire above: who reads this turn finds what was uncharged.
            self.turn.fetch_add(1, Ordering::Release);
            unpark(&self.turn);
        }
    }
}
