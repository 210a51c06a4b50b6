//! What a group's memory comes to, its limit, and who keeps the group: one word that is charged and uncharged without a lock.
//!
//! ```text
//!  63       62      48 47                     0
//! ┌────────┬──────────┬────────────────────────┐
//! │ online │ pins     │ bytes                  │
//! └────────┴──────────┴────────────────────────┘
//! ```
//!
//! | field | meaning | who changes it |
//! |---|---|---|
//! | bytes | charged to the group and to all below it | who charges: a compare-exchange on each level, from the group up |
//! | pins | its handle, each child, each mapping that charges it | who has one of them |
//! | online | new charges are taken | the handle, once, when it goes |
//!
//! **Why no level is ever above its limit.** Linux adds first and takes back what was too much (`page_counter_try_charge`), so its counters overshoot
//! for a moment. Here the sum is compared with the limit and then put in the place of exactly the word that it was made from: what was
//! compared is what is stored. A level further up that refuses has the levels below undone, which never stood above their limits either.
//! The price of the undoing is the same as in Linux: for that moment another charge may be refused that would have fitted.
//!
//! **Why a limit holds from when it is set.** Who lowers it stores the new one first and then *modifies* the word (adds nothing), so all charges come
//! before it or after it. Those before it he sees; those after it read the word that he released, so they see the new limit, for
//! each looks at the limit again after its charge. One that was compared with the old limit stands above the new one until that look, and is undone by it.
//!
//! **Why a group goes once.** It goes when the word becomes zero: offline, no pins, no bytes. Nothing raises a word that is zero, since charges want
//! *online*, pins want a pin, and charges from below are the child's, which has one. So exactly one change leads to zero, and who makes it lets go of the group.
//!
//! Source: `mm/page_counter.c` of Linux 6.18.

use core::ptr;

use crate::sync::atomic::{AtomicU64, Ordering};

const ONLINE: u64 = 1 << 63;
const PIN: u64 = 1 << 48;
const PIN_MASK: u64 = ONLINE - PIN;
const BYTES: u64 = PIN - 1;

/// No limit (`PAGE_COUNTER_MAX`): more than there can be.
pub(crate) const UNLIMITED: u64 = BYTES;

/// Does anything keep the group after this change?
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[must_use = "who is the last lets go of the group"]
pub(crate) enum Left {
    Alive,
    /// Nothing: the caller lets go of it.
    Last,
}

/// Why a level took no charge.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Refused {
    /// It would stand above its limit.
    Limit,
    /// It takes none of its own any more.
    Offline,
    /// Its limit was lowered meanwhile; the charge is undone.
    Lowered(Left),
}

/// More was to be uncharged than is charged.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Underflow;

/// The counter of one group.
#[derive(Debug)]
pub(crate) struct Counter {
    word: AtomicU64,
    limit: AtomicU64,
    watermark: AtomicU64,
    failcnt: AtomicU64,
}

impl Counter {
    /// Of nobody, as zeroed memory is.
    pub(crate) fn new() -> Counter {
        Counter {
            word: AtomicU64::new(0),
            limit: AtomicU64::new(0),
            watermark: AtomicU64::new(0),
            failcnt: AtomicU64::new(0),
        }
    }

    /// Begins: online, with the handle's pin. Of a counter that nobody has.
    pub(crate) fn init(&self, limit: u64) {
        self.limit.store(limit.min(UNLIMITED), Ordering::Relaxed);
        self.watermark.store(0, Ordering::Relaxed);
        self.failcnt.store(0, Ordering::Relaxed);
        // Release: who charges sees the above. Pairs with the compare-exchange there.
        self.word.store(ONLINE | PIN, Ordering::Release);
    }

    /// Takes charges of its own from now on, or no more. By one who keeps it. What is charged already is seen by [`usage`](Self::usage) afterwards.
    pub(crate) fn set_online(&self, online: bool) {
        // AcqRel: between all charges before it and all that come after.
        if online {
            self.word.fetch_or(ONLINE, Ordering::AcqRel);
        } else {
            self.word.fetch_and(!ONLINE, Ordering::AcqRel);
        }
    }

    /// What is charged.
    pub(crate) fn usage(&self) -> u64 {
        self.word.load(Ordering::Acquire) & BYTES
    }

    pub(crate) fn pins(&self) -> u64 {
        (self.word.load(Ordering::Acquire) & PIN_MASK) >> 48
    }

    pub(crate) fn is_online(&self) -> bool {
        self.word.load(Ordering::Acquire) & ONLINE != 0
    }

    /// Is it anybody's?
    pub(crate) fn is_alive(&self) -> bool {
        self.word.load(Ordering::Acquire) != 0
    }

    pub(crate) fn limit(&self) -> u64 {
        self.limit.load(Ordering::Relaxed)
    }

    pub(crate) fn watermark(&self) -> u64 {
        self.watermark.load(Ordering::Relaxed)
    }

    pub(crate) fn reset_watermark(&self) {
        self.watermark.store(self.usage(), Ordering::Relaxed);
    }

    pub(crate) fn failcnt(&self) -> u64 {
        self.failcnt.load(Ordering::Relaxed)
    }

    /// Charges this level, if it stays within its limit; `own` if it is the group itself rather than one above it.
    pub(crate) fn try_charge(&self, n: u64, own: bool) -> Result<(), Refused> {
        let mut now = self.word.load(Ordering::Relaxed);
        loop {
            if own && now & ONLINE == 0 {
                return Err(Refused::Offline);
            }
            let sum = (now & BYTES).saturating_add(n);
            if sum > self.limit() {
                self.failcnt.fetch_add(1, Ordering::Relaxed);
                return Err(Refused::Limit);
            }
            // AcqRel: pairs with `init` and `set_limit`, whose stores are seen by what follows.
            match self
                .word
                .compare_exchange_weak(now, now + n, Ordering::AcqRel, Ordering::Relaxed)
            {
                Ok(_) => {
                    if sum > self.limit() {
                        // Lowered since it was compared. What was just added is there to be taken back.
                        self.failcnt.fetch_add(1, Ordering::Relaxed);
                        let left = self.uncharge(n).unwrap_or(Left::Alive);
                        return Err(Refused::Lowered(left));
                    }
                    if sum > self.watermark() {
                        self.watermark.fetch_max(sum, Ordering::Relaxed);
                    }
                    return Ok(());
                }
                Err(other) => now = other,
            }
        }
    }

    /// Planted bug: adds what was compared some time ago.
    #[cfg(all(test, loom))]
    pub(crate) fn try_charge_late(&self, n: u64) -> Result<(), Refused> {
        if self.usage() + n > self.limit() {
            return Err(Refused::Limit);
        }
        self.word.fetch_add(n, Ordering::AcqRel);
        Ok(())
    }

    /// Takes a charge back from this level; nothing changes if it has not that much.
    pub(crate) fn uncharge(&self, n: u64) -> Result<Left, Underflow> {
        let mut now = self.word.load(Ordering::Relaxed);
        loop {
            if now & BYTES < n {
                return Err(Underflow);
            }
            // AcqRel: who is the last sees all that the others did with the group.
            match self
                .word
                .compare_exchange_weak(now, now - n, Ordering::AcqRel, Ordering::Relaxed)
            {
                Ok(_) if now == n => return Ok(Left::Last),
                Ok(_) => return Ok(Left::Alive),
                Err(other) => now = other,
            }
        }
    }

    /// One more who keeps it, by one who does; `false` if they are too many.
    pub(crate) fn pin(&self) -> bool {
        let add = |now: u64| (now & PIN_MASK != PIN_MASK).then_some(now + PIN);
        self.word
            .fetch_update(Ordering::AcqRel, Ordering::Relaxed, add)
            .is_ok()
    }

    pub(crate) fn unpin(&self) -> Left {
        self.drop_bits(PIN)
    }

    /// The handle goes: no charges of its own from here on.
    pub(crate) fn offline(&self) -> Left {
        self.drop_bits(ONLINE | PIN)
    }

    fn drop_bits(&self, bits: u64) -> Left {
        let before = self.word.fetch_sub(bits, Ordering::AcqRel);
        debug_assert!(before & PIN_MASK != 0);
        if before == bits {
            Left::Last
        } else {
            Left::Alive
        }
    }

    /// Another limit, at which it stands or below which it stays from here on; `Err` with what is charged if that is more, and the limit is as it
    /// was (`page_counter_set_max`). One at a time.
    pub(crate) fn set_limit(&self, limit: u64) -> Result<(), u64> {
        // Nobody is refused for a limit that cannot be.
        let usage = self.usage();
        if usage > limit {
            return Err(usage);
        }
        let before = self.limit.swap(limit.min(UNLIMITED), Ordering::Relaxed);
        // Between all charges before it and all charges after it: see the top.
        let usage = self.word.fetch_add(0, Ordering::AcqRel) & BYTES;
        if usage <= limit {
            return Ok(());
        }
        self.limit.store(before, Ordering::Relaxed);
        Err(usage)
    }

    /// Planted bug: looks at the word without ordering the charges.
    #[cfg(all(test, loom))]
    pub(crate) fn set_limit_looking(&self, limit: u64) -> Result<(), u64> {
        let before = self.limit.swap(limit, Ordering::Relaxed);
        let usage = self.usage();
        if usage <= limit {
            return Ok(());
        }
        self.limit.store(before, Ordering::Relaxed);
        Err(usage)
    }
}

/// A group in its tree.
pub(crate) trait Level {
    fn counter(&self) -> &Counter;
    /// The next one up; none below the root. As long as the group is anybody's.
    fn parent(&self) -> Option<&Self>;
}

/// Charges a group and all above it, or nobody. On failure: why, and which level refused.
///
/// `release` lets go of a group whose [`Left`] was the last, and of what that keeps.
pub(crate) fn charge<'a, L: Level>(
    group: &'a L,
    n: u64,
    release: &impl Fn(&L),
) -> Result<(), (Refused, &'a L)> {
    let mut at = group;
    loop {
        if let Err(why) = at.counter().try_charge(n, ptr::eq(at, group)) {
            if why == Refused::Lowered(Left::Last) {
                release(at);
            }
            let mut below = group;
            while !ptr::eq(below, at) {
                let Some(parent) = below.parent() else { break };
                if below.counter().uncharge(n) == Ok(Left::Last) {
                    release(below);
                }
                below = parent;
            }
            return Err((why, at));
        }
        match at.parent() {
            Some(parent) => at = parent,
            None => return Ok(()),
        }
    }
}

/// Takes a charge back from a group and all above it.
pub(crate) fn uncharge<L: Level>(
    group: &L,
    n: u64,
    release: &impl Fn(&L),
) -> Result<(), Underflow> {
    let mut next = Some(group);
    while let Some(at) = next {
        // Before it may go. Its parent still has this charge, so it stays until its turn comes.
        next = at.parent();
        if at.counter().uncharge(n)? == Left::Last {
            release(at);
        }
    }
    Ok(())
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    struct Group<'a> {
        counter: Counter,
        parent: Option<&'a Group<'a>>,
    }

    impl Level for Group<'_> {
        fn counter(&self) -> &Counter {
            &self.counter
        }
        fn parent(&self) -> Option<&Self> {
            self.parent
        }
    }

    fn group<'a>(parent: Option<&'a Group<'a>>, limit: u64) -> Group<'a> {
        let group = Group {
            counter: Counter::new(),
            parent,
        };
        group.counter.init(limit);
        group
    }

    #[test]
    fn every_level_or_none() {
        let none = |_: &Group<'_>| panic!("nobody is the last");
        let top = group(None, 100);
        let child = group(Some(&top), 80);
        assert!(charge(&child, 80, &none).is_ok());
        let (why, at) = charge(&child, 1, &none).unwrap_err();
        assert!(why == Refused::Limit && ptr::eq(at, &child));
        let other = group(Some(&top), UNLIMITED);
        let (why, at) = charge(&other, 21, &none).unwrap_err();
        assert!(why == Refused::Limit && ptr::eq(at, &top));
        // What was charged below is undone, and was never more than what fits.
        assert_eq!((other.counter.usage(), top.counter.usage()), (0, 80));
        assert!(charge(&other, 20, &none).is_ok());
        assert_eq!((top.counter.usage(), top.counter.watermark()), (100, 100));
        assert_eq!((top.counter.failcnt(), child.counter.failcnt()), (1, 1));
        assert_eq!(uncharge(&child, 81, &none), Err(Underflow));
        assert_eq!(uncharge(&child, 80, &none), Ok(()));
        assert_eq!(uncharge(&other, 20, &none), Ok(()));
        assert_eq!((top.counter.usage(), top.counter.watermark()), (0, 100));
    }

    #[test]
    fn a_limit_is_not_set_below_what_is_there() {
        let none = |_: &Group<'_>| panic!("nobody is the last");
        let top = group(None, UNLIMITED);
        charge(&top, 50, &none).ok().unwrap();
        assert_eq!(top.counter.set_limit(49), Err(50));
        assert_eq!(top.counter.limit(), UNLIMITED);
        assert_eq!(top.counter.set_limit(50), Ok(()));
        assert!(charge(&top, 1, &none).is_err());
        // Sums do not wrap.
        top.counter.set_limit(u64::MAX).unwrap();
        assert!(charge(&top, u64::MAX, &none).is_err());
        assert!(charge(&top, UNLIMITED - 50, &none).is_ok());
        assert_eq!(top.counter.usage(), UNLIMITED);
        assert!(charge(&top, 1, &none).is_err() && top.counter.is_online());
    }

    #[test]
    fn a_group_goes_with_the_last_who_keeps_it() {
        let none = |_: &Group<'_>| panic!("nobody is the last");
        let top = group(None, UNLIMITED);
        charge(&top, 5, &none).ok().unwrap();
        assert!(top.counter.pin());
        assert_eq!(top.counter.offline(), Left::Alive);
        assert_eq!(charge(&top, 1, &none).err().unwrap().0, Refused::Offline);
        assert_eq!(top.counter.unpin(), Left::Alive);
        assert_eq!(top.counter.uncharge(4), Ok(Left::Alive));
        assert_eq!(top.counter.uncharge(1), Ok(Left::Last));
        assert!(!top.counter.is_alive());
    }
}
