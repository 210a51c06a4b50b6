//! Pages that go back after a grace period (`pte_free_defer`, `tlb_remove_table`): page tables, whose lockless walkers may still be inside.
//!
//! Nothing is allocated for it: a page that waits is linked through its descriptor. Two stages: *fresh* pages are collected until
//! those that *wait* for their grace period are through.
//!
//! Lock order: `waiting` is a leaf, and only ever tried.

use crate::address::Pfn;
use crate::lockdep::classes;
use crate::mm::Mm;
use crate::platform::{Holder, Platform};
use crate::rcu::{Cookie, Rcu};
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::{PfnStack, SpinLock};

/// Pages on their way out.
#[derive(Debug)]
pub(crate) struct RcuPages {
    fresh: PfnStack,
    waiting: SpinLock<(Pfn, Cookie)>,
    /// How many wait, in all.
    pages: AtomicU64,
}

/// So many are worth a kick before the next tick.
const WORTH_IT: u64 = 64;

impl RcuPages {
    pub(crate) fn new() -> RcuPages {
        RcuPages {
            fresh: PfnStack::new(),
            waiting: SpinLock::new((Pfn::NONE, Cookie::ENDED)),
            pages: AtomicU64::new(0),
        }
    }
}

impl<P: Platform> Mm<P> {
    /// Frees a page after a grace period. It is nobody's any more, and is not linked anywhere through its descriptor.
    pub(crate) fn free_page_rcu(&self, pfn: Pfn) {
        let links = self.pages.map.buddy(pfn);
        self.rcu_pages.fresh.push(pfn, |next| links.set_next(next));
        if self
            .rcu_pages
            .pages
            .fetch_add(1, Ordering::Relaxed)
            .is_multiple_of(WORTH_IT)
        {
            self.pages.platform.kick();
        }
    }

    /// Pages that wait for a grace period.
    pub(crate) fn rcu_pages_waiting(&self) -> u64 {
        self.rcu_pages.pages.load(Ordering::Relaxed)
    }

    /// Frees those whose grace period is over, and has one begin for those that came since. Does not wait. Says how many.
    pub(crate) fn rcu_pages_due(&self) -> usize {
        let rcu = self.pages.platform.rcu();
        let mut freed = 0;
        // Twice: what is begun here may be over at once.
        for _ in 0..2 {
            if self.rcu_pages_waiting() == 0 {
                break;
            }
            let holder = Holder::trying(&self.pages.platform, self.pages.rt, &classes::DISCARDS);
            let Some(mut waiting) = self.rcu_pages.waiting.try_lock(holder) else {
                break;
            };
            if waiting.0 == Pfn::NONE {
                *waiting = (self.rcu_pages.fresh.take(), rcu.start_poll());
            }
            let cookie = waiting.1;
            drop(waiting);
            rcu.advance();
            if !rcu.poll_state(cookie) {
                break;
            }
            let holder = Holder::trying(&self.pages.platform, self.pages.rt, &classes::DISCARDS);
            let Some(mut waiting) = self.rcu_pages.waiting.try_lock(holder) else {
                break;
            };
            if waiting.1 != cookie {
                continue;
            }
            let mut at = core::mem::replace(&mut waiting.0, Pfn::NONE);
            drop(waiting);
            while at != Pfn::NONE {
                let next = self.pages.map.buddy(at).next();
                // SAFETY: it was given up to us, and its grace period is over.
                unsafe { self.free_pages(at) };
                self.rcu_pages.pages.fetch_sub(1, Ordering::Relaxed);
                freed += 1;
                at = next;
            }
        }
        freed
    }

    /// Frees all of them; waits for grace periods if the caller may.
    pub(crate) fn rcu_pages_all(&self) -> usize {
        let mut freed = 0;
        let mut round = 0;
        loop {
            freed += self.rcu_pages_due();
            if self.rcu_pages_waiting() == 0 || !self.may_wait() {
                return freed;
            }
            self.pages.platform.rcu().synchronize_expedited();
            self.pages.platform.relax(round);
            round += 1;
        }
    }
}
