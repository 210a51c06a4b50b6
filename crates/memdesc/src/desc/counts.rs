//! How often a folio is referenced, mapped and pinned: one word, so that all of it is read, compared and frozen at once.
//!
//! ```text
//!  63      56 55       42 41          22 21          0
//! ┌──────────┬───────────┬──────────────┬─────────────┐
//! │ guesses  │ pins      │ maps         │ refs        │
//! └──────────┴───────────┴──────────────┴─────────────┘
//! ```
//!
//! | field | held by | Linux |
//! |---|---|---|
//! | refs | whoever has the folio: its owner, the page cache, an isolated folio's isolator, a [`FolioRef`](crate::FolioRef) | the part of `_refcount` that is neither of the next two |
//! | maps | each page table entry that maps it or a page of it | `_large_mapcount` or `_mapcount`, and a reference each in `_refcount` |
//! | pins | those whose devices write to it (`FOLL_PIN`) | 1024 in `_refcount` of a small folio, `_pincount` of a large one |
//! | guesses | lockless readers between "the word led here" and "it still does" | one more in `_refcount`: speculative references disturb who counts |
//!
//! The folio lives as long as refs, maps or pins are not zero. Guesses keep nothing alive, but who frees waits for them: the
//! last of the others leaves the pages' number behind, and the last guess frees. So "nobody but me" ([`Counts::freeze`]) is
//! one compare-exchange that no stale reader can make a false statement of, and "is it pinned?" is never a guess from
//! a large number, as `folio_maybe_dma_pinned` is.
//!
//! | transition | who | |
//! |---|---|---|
//! | 0 → one ref | who allocates | [`init`](Counts::init), Release |
//! | alive → one guess more | anyone in a read section | [`guess`](Counts::guess) |
//! | guess → ref or pin | who guessed right | [`confirm`](Counts::confirm), if still alive |
//! | guess → none | who guessed wrong | [`retract`](Counts::retract): may be the last |
//! | alive → one less | who has it | [`put`](Counts::put): may be the last |
//! | exactly these, no guesses → 0 | who locked the folio | [`freeze`](Counts::freeze), [`unfreeze`](Counts::unfreeze) |

use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::seq_cst;

/// A number of references, mappings and pins.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Held {
    /// References by those who have the folio.
    pub refs: u32,
    /// Page table entries that map it, or pages of it.
    pub maps: u32,
    /// Pins.
    pub pins: u32,
}

impl Held {
    /// One reference.
    pub const REF: Held = Held::new(1, 0, 0);
    /// One mapping.
    pub const MAP: Held = Held::new(0, 1, 0);
    /// One pin.
    pub const PIN: Held = Held::new(0, 0, 1);

    /// So many of each.
    pub const fn new(refs: u32, maps: u32, pins: u32) -> Held {
        Held { refs, maps, pins }
    }

    /// Linux's `folio_ref_count`: a mapping and a pin are references too.
    pub const fn total(self) -> u32 {
        self.refs + self.maps + self.pins
    }

    /// Can so much more be counted?
    pub(crate) fn has_room_for(self, what: Held) -> bool {
        u64::from(self.refs) + u64::from(what.refs) <= REFS_MAX
            && u64::from(self.maps) + u64::from(what.maps) <= MAPS_MAX
            && u64::from(self.pins) + u64::from(what.pins) <= PINS_MAX
    }

    const fn pack(self) -> u64 {
        self.refs as u64 | (self.maps as u64) << MAPS | (self.pins as u64) << PINS
    }

    const fn unpack(bits: u64) -> Held {
        Held {
            refs: (bits & REFS_MAX) as u32,
            maps: (bits >> MAPS & MAPS_MAX) as u32,
            pins: (bits >> PINS & PINS_MAX) as u32,
        }
    }
}

const MAPS: u32 = 22;
const PINS: u32 = 42;
const GUESSES: u32 = 56;
const REFS_MAX: u64 = (1 << MAPS) - 1;
const MAPS_MAX: u64 = (1 << (PINS - MAPS)) - 1;
const PINS_MAX: u64 = (1 << (GUESSES - PINS)) - 1;
const ALIVE: u64 = (1 << GUESSES) - 1;
const GUESS: u64 = 1 << GUESSES;
const GUESSES_MAX: u64 = 0xff;

/// What became of the folio when something was let go.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[must_use = "the last one frees"]
pub(crate) enum Put {
    /// Somebody still has it, or will free it.
    Alive,
    /// That was the last: the caller frees it.
    Last,
}

/// What became of a guess that was confirmed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[must_use = "a guess that came too late is still to be retracted"]
pub(crate) enum Confirmed {
    /// The reference is the caller's.
    Yes,
    /// The last owner has gone meanwhile, or the field is full: [`retract`](Counts::retract).
    No,
}

/// What became of an attempt to take a folio that a word, which may be stale, led to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[must_use = "the last one frees"]
pub(crate) enum Taken {
    /// The reference is the caller's.
    Yes,
    /// It was another's, or nobody's.
    No,
    /// The same, and nobody has it any more: the caller frees it.
    Last,
}

/// The counts of a folio.
#[derive(Debug)]
#[repr(transparent)]
pub(crate) struct Counts(AtomicU64);

impl Counts {
    #[cfg(any(test, loom))]
    pub(crate) fn zero() -> Counts {
        Counts(AtomicU64::new(0))
    }

    /// So much is held of a folio that nobody had; all its other fields are set.
    pub(crate) fn init(&self, held: Held) {
        // A store: nobody guesses where nobody has it, and guesses that were made before have been retracted before it was free.
        // Release pairs with the Acquire in `guess`: who gets hold of it sees the other fields.
        self.0.store(held.pack(), Ordering::Release);
    }

    /// What is held now. Stale when it comes back, unless the caller keeps others from changing it.
    #[inline]
    pub(crate) fn held(&self) -> Held {
        Held::unpack(self.0.load(Ordering::Acquire))
    }

    /// Is exactly this held, and does nobody guess? What else the caller keeps others from changing stays so.
    #[inline]
    pub(crate) fn is_exactly(&self, held: Held) -> bool {
        seq_cst::reading();
        self.0.load(Ordering::SeqCst) == held.pack()
    }

    /// Does somebody guess, or has it pinned? SeqCst pairs with `guess`: who write-protects an entry and then asks here either hears
    /// of who is about to pin through that entry, or is seen by him.
    #[inline]
    pub(crate) fn may_be_pinned(&self) -> bool {
        seq_cst::reading();
        self.0.load(Ordering::SeqCst) >> PINS != 0
    }

    /// One more of `what`, unless nobody has the folio or the field is full.
    #[inline]
    pub(crate) fn try_get(&self, what: Held) -> bool {
        self.try_add(what, 0)
    }

    /// Adds to a living folio's counts, and takes so many guesses away in the same step.
    #[inline]
    fn try_add(&self, what: Held, guesses: u64) -> bool {
        let mut old = self.0.load(Ordering::Relaxed);
        loop {
            let held = Held::unpack(old);
            if old & ALIVE == 0 || !held.has_room_for(what) {
                return false;
            }
            let new = old + what.pack() - guesses * GUESS;
            // Acquire pairs with the Release in `init` and `unfreeze`.
            match self
                .0
                .compare_exchange_weak(old, new, Ordering::Acquire, Ordering::Relaxed)
            {
                Ok(_) => return true,
                Err(now) => old = now,
            }
        }
    }

    /// A guess that the word, which may be stale, leads to the right folio; fails if nobody has it (or hundreds guess).
    #[inline]
    pub(crate) fn guess(&self) -> bool {
        let mut old = self.0.load(Ordering::Relaxed);
        loop {
            if old & ALIVE == 0 || old >> GUESSES == GUESSES_MAX {
                return false;
            }
            // Acquire pairs with the Release in `init`: the fields are those of who has it. SeqCst: see `may_be_pinned`.
            match self.0.compare_exchange_weak(
                old,
                old + GUESS,
                Ordering::SeqCst,
                Ordering::Relaxed,
            ) {
                Ok(_) => {
                    seq_cst::written();
                    return true;
                }
                Err(now) => old = now,
            }
        }
    }

    /// The guess was right: it becomes `what`.
    #[inline]
    pub(crate) fn confirm(&self, what: Held) -> Confirmed {
        if self.try_add(what, 1) {
            Confirmed::Yes
        } else {
            Confirmed::No
        }
    }

    /// The guess was wrong, or too late. If it is the last there is of anything, the caller frees the folio, whose pages' number
    /// the last owner has left.
    #[inline]
    pub(crate) fn retract(&self) -> Put {
        // Acquire pairs with the Release in `put`: the number is seen. Release: what was looked at here was looked at before.
        let old = self.0.fetch_sub(GUESS, Ordering::AcqRel);
        debug_assert!(old >= GUESS, "no guess to retract");
        if old == GUESS { Put::Last } else { Put::Alive }
    }

    /// Takes `what` of the folio if `still` says, while it cannot go or change, that it is the one that the caller means.
    #[inline]
    pub(crate) fn take(&self, what: Held, still: impl FnOnce() -> bool) -> Taken {
        if !self.guess() {
            return Taken::No;
        }
        if still() && self.confirm(what) == Confirmed::Yes {
            return Taken::Yes;
        }
        match self.retract() {
            Put::Alive => Taken::No,
            Put::Last => Taken::Last,
        }
    }

    /// One less of `what`. If nobody will have it after that but there are guesses, `leave` is called first: it leaves the number of
    /// the pages for the last of them.
    #[inline]
    pub(crate) fn put(&self, what: Held, leave: impl Fn()) -> Put {
        let mut old = self.0.load(Ordering::Relaxed);
        loop {
            debug_assert!(old & ALIVE != 0, "put once too often");
            let new = old - what.pack();
            if new & ALIVE == 0 && new != 0 {
                leave();
            }
            // AcqRel: Release hands on what was done with the folio, and the number; Acquire, for the last, takes that of all others.
            match self
                .0
                .compare_exchange_weak(old, new, Ordering::AcqRel, Ordering::Relaxed)
            {
                Ok(_) if new == 0 => return Put::Last,
                Ok(_) => return Put::Alive,
                Err(now) => old = now,
            }
        }
    }

    /// If exactly this is held and nobody guesses: takes it all away, so that nobody can get hold of the folio
    /// (`folio_ref_freeze`).
    #[inline]
    pub(crate) fn freeze(&self, exactly: Held) -> bool {
        // Acquire pairs with the Release in `put`: all that others did with it is over.
        self.0
            .compare_exchange(exactly.pack(), 0, Ordering::AcqRel, Ordering::Relaxed)
            .is_ok()
    }

    /// Gives it back (`folio_ref_unfreeze`).
    #[inline]
    pub(crate) fn unfreeze(&self, held: Held) {
        self.init(held);
    }

    /// Planted bug for the model checker: the last owner leaves nothing behind for those who guess.
    #[cfg(loom)]
    pub(crate) fn put_carelessly(&self, what: Held) -> Put {
        let old = self.0.fetch_sub(what.pack(), Ordering::AcqRel);
        if (old - what.pack()) & ALIVE == 0 {
            Put::Last
        } else {
            Put::Alive
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use core::cell::Cell;

    #[test]
    fn what_is_dead_cannot_be_got() {
        let c = Counts::zero();
        assert!(!c.try_get(Held::REF) && !c.guess());
        c.init(Held::REF);
        assert!(c.try_get(Held::PIN) && c.try_get(Held::MAP));
        assert_eq!(c.held(), Held::new(1, 1, 1));
        assert_eq!(c.put(Held::REF, || unreachable!()), Put::Alive);
        assert_eq!(c.put(Held::PIN, || unreachable!()), Put::Alive);
        assert_eq!(c.put(Held::MAP, || unreachable!()), Put::Last);
        assert!(!c.try_get(Held::REF));
    }

    #[test]
    fn the_last_guess_frees() {
        let c = Counts::zero();
        let left = Cell::new(false);
        c.init(Held::REF);
        assert!(c.guess());
        assert!(!c.freeze(Held::REF), "somebody guesses");
        assert_eq!(c.put(Held::REF, || left.set(true)), Put::Alive);
        assert!(left.get());
        assert!(!c.guess(), "it is on its way out");
        assert_eq!(c.confirm(Held::REF), Confirmed::No);
        assert_eq!(c.retract(), Put::Last);
    }

    #[test]
    fn a_right_guess_becomes_a_reference() {
        let c = Counts::zero();
        c.init(Held::REF);
        assert!(c.guess());
        assert_eq!(c.confirm(Held::PIN), Confirmed::Yes);
        assert_eq!(c.held(), Held::new(1, 0, 1));
        assert!(!c.freeze(Held::REF) && c.freeze(Held::new(1, 0, 1)));
        assert!(!c.guess());
        c.unfreeze(Held::REF);
        assert!(c.guess());
        assert_eq!(c.retract(), Put::Alive);
    }

    #[test]
    fn full_fields_refuse() {
        let c = Counts::zero();
        c.init(Held::new(REFS_MAX as u32, MAPS_MAX as u32, PINS_MAX as u32));
        assert!(!c.try_get(Held::REF) && !c.try_get(Held::MAP) && !c.try_get(Held::PIN));
        for _ in 0..GUESSES_MAX {
            assert!(c.guess());
        }
        assert!(!c.guess());
        assert_eq!(
            c.held(),
            Held::new(REFS_MAX as u32, MAPS_MAX as u32, PINS_MAX as u32)
        );
    }
}
