//! The end of a pool, which its pages may outlive: who is the last to have anything to do with it, and that no page is left behind in it.
//!
//! Users are the queue and every page, idle ones too. A page that becomes idle is left on the pool's stack; who leaves it there then asks
//! [`left_behind`](Life::left_behind), and who ends the pool first says so ([`end`](Life::end)) and then takes the stack. Each writes, then reads what the other writes,
//! in an order that both agree on (SeqCst): one of the two takes the page. After his own push or leave a caller knows the pool only as memory that is a pool's (it is
//! type-stable): another may have freed it, and it may be another pool by now, whose stack he may take as well if that is dying.

use crate::sync::atomic::{AtomicU32, Ordering, fence};
use crate::sync::seq_cst;

/// Who uses a pool, and whether it is to go.
#[derive(Debug)]
pub(crate) struct Life {
    users: AtomicU32,
    dying: AtomicU32,
}

impl Life {
    #[cfg(loom)]
    pub(crate) fn new() -> Life {
        Life {
            users: AtomicU32::new(1),
            dying: AtomicU32::new(0),
        }
    }

    /// A pool with one user, its queue.
    pub(crate) fn begin(&self) {
        self.users.store(1, Ordering::Relaxed);
        self.dying.store(0, Ordering::Relaxed);
    }

    /// How many there are.
    pub(crate) fn users(&self) -> u32 {
        self.users.load(Ordering::Acquire)
    }

    /// One more; the caller is one.
    pub(crate) fn join(&self) {
        self.users.fetch_add(1, Ordering::Relaxed);
    }

    /// One less. `true`: it was the last, and frees the pool.
    #[must_use]
    pub(crate) fn leave(&self) -> bool {
        // AcqRel: what all others did with the pool is over for the last.
        self.users.fetch_sub(1, Ordering::AcqRel) == 1
    }

    /// Is it known to be ending? A hint.
    pub(crate) fn is_dying(&self) -> bool {
        self.dying.load(Ordering::Relaxed) != 0
    }

    /// The caller has left something on the stack. Must he take it again, since who ends the pool may have looked already?
    pub(crate) fn left_behind(&self) -> bool {
        // The push was SeqCst, and so is this: both before the fence in `end`, or what was written there is seen.
        seq_cst::reading();
        self.dying.load(Ordering::SeqCst) != 0
    }

    /// Nothing shall be left on the stack any more; the caller takes what is there.
    pub(crate) fn end(&self) {
        self.dying.store(1, Ordering::Relaxed);
        // Pairs with `left_behind`: who does not see that it ends there has pushed before.
        fence(Ordering::SeqCst);
    }

    /// Planted bug: the look is in no order with the push.
    #[cfg(loom)]
    pub(crate) fn left_behind_carelessly(&self) -> bool {
        self.dying.load(Ordering::Relaxed) != 0
    }
}
