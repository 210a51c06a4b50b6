//! How much lies in a pool, and who waits for it: the protocol, apart from what elements are and who sleeps how.
//!
//! Elements on the shelf, the queue and `missing` change under the lock. What is read without it:
//!
//! - *`missing`*, by who frees an element: 0, and he need not come in. He may read an old value. That he does no harm: call an element *taken* if it came off
//!   the shelf; its free comes after its take, so it reads what that take wrote or something later. Look at the last time that `missing` was 0: each take
//!   after it reads no 0 when its element is freed, so it comes in and puts one back. So when nobody has a taken element any more, the shelf is full,
//!   whatever was read. (Relaxed will do: all of it is the order of one word's values.)
//! - *`turn`*, by who goes to sleep, who read it under the lock that showed him too little. Who puts something back that the first in the queue can do with
//!   turns it after his own hold. Holds are in an order: either the sleeper's look came later, and saw what was put back, or his `turn` is old and he does
//!   not sleep.
//! - *`epoch`*: somebody says that it is worth asking for ordinary memory again.
//!
//! A request takes all that it needs at once or nothing, so nobody waits with a part of the shelf in his hands: two who each have a half cannot wait for each
//! other. And the queue is one: who came first is served first, and nobody is served past it, so a request for many is not starved by requests for one. What
//! is missing is in the hands of requests that were served; when they free it, the first in the queue is served.

use core::cell::Cell;

use crate::sync::atomic::{AtomicU32, Ordering};
use crate::sync::{SpinGuard, SpinLock, Waiter};

/// The shelf of a pool, its queue, and what is known of them without the lock.
#[derive(Debug)]
pub(crate) struct Level {
    /// Elements that the shelf has less than it should.
    missing: AtomicU32,
    /// How many it should have.
    min: AtomicU32,
    turn: AtomicU32,
    epoch: AtomicU32,
    /// How long the queue is; for who comes by.
    waiting: AtomicU32,
    shelf: SpinLock<Shelf>,
}

/// What the lock guards.
///
/// # Invariants
///
/// `at` leads to room for `room` pointers, of which the first `curr` are elements that nobody has; `curr` and `min` are at most `room`. Places in the queue
/// live until they have left it.
#[derive(Debug)]
pub(crate) struct Shelf {
    at: *mut *mut u8,
    room: usize,
    curr: usize,
    min: usize,
    first: *const Place,
    last: *const Place,
    pub(crate) counts: Counts,
}

// SAFETY: the pointers lead to what is reached only under the lock that this is in; elements are nobody's.
unsafe impl Send for Shelf {}

/// What happened.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counts {
    pub(crate) taken: u64,
    pub(crate) refills: u64,
    pub(crate) waits: u64,
    pub(crate) low: usize,
}

/// A place in the queue, on the stack of who waits. Reached under the lock only.
#[derive(Debug)]
pub(crate) struct Place {
    need: Cell<usize>,
    next: Cell<*const Place>,
    prev: Cell<*const Place>,
}

impl Place {
    pub(crate) fn new() -> Place {
        Place {
            need: Cell::new(0),
            next: Cell::new(core::ptr::null()),
            prev: Cell::new(core::ptr::null()),
        }
    }
}

/// What came of a request.
#[must_use]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Take {
    /// All that was needed. Is the next in the queue to be woken?
    All { wake: bool },
    /// Nothing: to sleep until this is no longer the turn.
    Wait(u32),
    /// More than the pool ever has.
    TooMany,
}

impl Level {
    /// Of a pool that has all it shall have.
    ///
    /// # Safety
    ///
    /// `at` leads to room for `room` pointers, all of them to elements that nobody has; it is this pool's until it says otherwise.
    pub(crate) unsafe fn full(at: *mut *mut u8, room: usize) -> Level {
        Level {
            missing: AtomicU32::new(0),
            min: AtomicU32::new(room as u32),
            turn: AtomicU32::new(0),
            epoch: AtomicU32::new(0),
            waiting: AtomicU32::new(0),
            shelf: SpinLock::new(Shelf {
                at,
                room,
                curr: room,
                min: room,
                first: core::ptr::null(),
                last: core::ptr::null(),
                counts: Counts {
                    low: room,
                    ..Counts::default()
                },
            }),
        }
    }

    /// Is an element that is freed wanted here? To be asked again under the lock.
    #[inline]
    pub(crate) fn is_short(&self) -> bool {
        self.missing.load(Ordering::Relaxed) != 0
    }

    /// How many elements there should be.
    pub(crate) fn min(&self) -> usize {
        self.min.load(Ordering::Relaxed) as usize
    }

    /// Is it worth asking for ordinary memory since then? Asked after the turn was read.
    pub(crate) fn epoch(&self) -> u32 {
        self.epoch.load(Ordering::Relaxed)
    }

    /// How many wait.
    pub(crate) fn waiting(&self) -> u32 {
        self.waiting.load(Ordering::Relaxed)
    }

    pub(crate) fn lock<W: Waiter>(&self, waiter: W) -> Hold<'_, W> {
        let shelf = self.shelf.lock(waiter);
        Hold { level: self, shelf }
    }

    /// Unless somebody has it. From any context.
    pub(crate) fn try_lock<W: Waiter>(&self, waiter: W) -> Option<Hold<'_, W>> {
        let shelf = self.shelf.try_lock(waiter)?;
        Some(Hold { level: self, shelf })
    }

    /// Has those who wait look again: after the hold in which there was a reason to.
    pub(crate) fn wake(&self, unpark_all: impl FnOnce(&AtomicU32)) {
        // Release pairs with the Acquire in `take`: who sees the turn sees the epoch.
        self.turn.fetch_add(1, Ordering::Release);
        unpark_all(&self.turn);
    }

    /// Has those who wait ask for ordinary memory again.
    pub(crate) fn retry(&self, unpark_all: impl FnOnce(&AtomicU32)) {
        if self.waiting() > 0 {
            self.epoch.fetch_add(1, Ordering::Relaxed);
            self.wake(unpark_all);
        }
    }

    /// Where those who wait sleep.
    pub(crate) fn turn(&self) -> &AtomicU32 {
        &self.turn
    }
}

/// The shelf, locked.
pub(crate) struct Hold<'a, W: Waiter> {
    level: &'a Level,
    shelf: SpinGuard<'a, Shelf, W>,
}

impl<W: Waiter> Hold<'_, W> {
    fn changed(&mut self) {
        let shelf = &mut *self.shelf;
        let missing = shelf.min.saturating_sub(shelf.curr);
        self.level.missing.store(missing as u32, Ordering::Relaxed);
        self.level.min.store(shelf.min as u32, Ordering::Relaxed);
        shelf.counts.low = shelf.counts.low.min(shelf.curr);
    }

    /// Fills `out` from the shelf, if there are as many and nobody else is first in the queue. `place` is the caller's in it, which he leaves with what he
    /// wanted.
    pub(crate) fn take(&mut self, out: &mut [*mut u8], place: Option<&Place>) -> Take {
        let shelf = &mut *self.shelf;
        let need = out.len();
        if need > shelf.min {
            return Take::TooMany;
        }
        let me = place.map_or(core::ptr::null(), |place| &raw const *place);
        if shelf.first != me || shelf.curr < need {
            if let Some(place) = place {
                place.need.set(need);
            }
            // Acquire: see `wake`.
            return Take::Wait(self.level.turn.load(Ordering::Acquire));
        }
        shelf.curr -= need;
        shelf.counts.taken += need as u64;
        // SAFETY: by the invariant `need` elements from `curr` on are there; they are no longer counted, so the caller has them alone.
        unsafe {
            shelf
                .at
                .add(shelf.curr)
                .copy_to_nonoverlapping(out.as_mut_ptr(), need);
        }
        if let Some(place) = place {
            self.leave(place);
        }
        self.changed();
        Take::All { wake: self.wakes() }
    }

    /// One more waits, for so many. He leaves the queue before the place goes.
    pub(crate) fn join(&mut self, place: &Place, need: usize) {
        let shelf = &mut *self.shelf;
        let at: *const Place = place;
        place.need.set(need);
        place.next.set(core::ptr::null());
        place.prev.set(shelf.last);
        // SAFETY: places in the queue live, by the invariant, and are reached under the lock only.
        match unsafe { shelf.last.as_ref() } {
            Some(last) => last.next.set(at),
            None => shelf.first = at,
        }
        shelf.last = at;
        shelf.counts.waits += 1;
        self.level.waiting.fetch_add(1, Ordering::Relaxed);
    }

    /// One waits no longer.
    pub(crate) fn leave(&mut self, place: &Place) {
        let shelf = &mut *self.shelf;
        let (next, prev) = (place.next.get(), place.prev.get());
        // SAFETY: as in `join`.
        match unsafe { prev.as_ref() } {
            Some(prev) => prev.next.set(next),
            None => shelf.first = next,
        }
        // SAFETY: as in `join`.
        match unsafe { next.as_ref() } {
            Some(next) => next.prev.set(prev),
            None => shelf.last = prev,
        }
        self.level.waiting.fetch_sub(1, Ordering::Relaxed);
    }

    /// Could the first in the queue be served, or told that he never will be? Then he is to be woken.
    pub(crate) fn wakes(&self) -> bool {
        // SAFETY: as in `join`.
        let first = unsafe { self.shelf.first.as_ref() };
        first.is_some_and(|first| {
            let need = first.need.get();
            need <= self.shelf.curr || need > self.shelf.min
        })
    }

    /// Puts an element back; `false` if there are enough.
    #[must_use]
    pub(crate) fn give(&mut self, element: *mut u8) -> bool {
        let shelf = &mut *self.shelf;
        if shelf.curr >= shelf.min {
            return false;
        }
        // SAFETY: `curr` is below `min`, so within the room.
        unsafe { shelf.at.add(shelf.curr).write(element) };
        shelf.curr += 1;
        shelf.counts.refills += 1;
        self.changed();
        true
    }

    /// Is this element on the shelf? For the check for double frees.
    #[cfg(not(loom))]
    pub(crate) fn contains(&self, element: *mut u8) -> bool {
        // SAFETY: by the invariant.
        let there = unsafe { core::slice::from_raw_parts(self.shelf.at, self.shelf.curr) };
        there.contains(&element)
    }

    /// How many elements there are, and should be.
    pub(crate) fn level(&self) -> (usize, usize) {
        (self.shelf.curr, self.shelf.min)
    }

    #[cfg(not(loom))]
    pub(crate) fn counts(&self) -> Counts {
        self.shelf.counts
    }

    /// There shall be so many, no more than now.
    #[cfg(not(loom))]
    pub(crate) fn lower(&mut self, min: usize) {
        self.shelf.min = min.min(self.shelf.min);
        self.changed();
    }

    /// Takes one off that is there beyond `keep`.
    #[cfg(not(loom))]
    pub(crate) fn pop_above(&mut self, keep: usize) -> Option<*mut u8> {
        let shelf = &mut *self.shelf;
        if shelf.curr <= keep {
            return None;
        }
        shelf.curr -= 1;
        // SAFETY: it was below `curr`, so it is there.
        let element = unsafe { shelf.at.add(shelf.curr).read() };
        self.changed();
        Some(element)
    }

    /// Another shelf, for `room` elements, which there shall be from now on: those of `with` that find a place beside those from here. Gives the old shelf,
    /// with its room, and how many of `with` found none: they lie at the start of the old shelf, the caller's again. `None`: there is more here than the new
    /// one holds.
    ///
    /// # Safety
    ///
    /// `at` leads to room for `room` pointers, the pool's from here on, of which the first `with` are elements that nobody has.
    #[cfg(not(loom))]
    pub(crate) unsafe fn replace(
        &mut self,
        at: *mut *mut u8,
        room: usize,
        with: usize,
    ) -> Option<(*mut *mut u8, usize, usize)> {
        let shelf = &mut *self.shelf;
        if shelf.curr > room {
            return None;
        }
        let keep = with.min(room - shelf.curr);
        let (old, spare) = (shelf.at, with - keep);
        // SAFETY: `keep + curr` is at most `room`. What is not kept is at most `curr`, since `with` is at most `room`, so the old shelf has room for it once
        // it is copied from. The two do not overlap: one is the pool's, the other was the caller's.
        unsafe {
            let rest = at.add(keep);
            if spare == 0 {
                rest.copy_from_nonoverlapping(old, shelf.curr);
            } else {
                for i in 0..shelf.curr {
                    let (ours, theirs) = (old.add(i).read(), rest.add(i).read());
                    rest.add(i).write(ours);
                    if i < spare {
                        old.add(i).write(theirs);
                    }
                }
            }
        }
        let old_room = core::mem::replace(&mut shelf.room, room);
        shelf.at = at;
        shelf.curr += keep;
        shelf.min = room;
        shelf.counts.low = shelf.curr;
        self.changed();
        Some((old, old_room, spare))
    }

    /// Where the shelf is, and its room.
    #[cfg(not(loom))]
    pub(crate) fn shelf(&self) -> (*mut *mut u8, usize) {
        (self.shelf.at, self.shelf.room)
    }
}
