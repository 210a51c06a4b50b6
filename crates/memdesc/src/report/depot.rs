//! The stack depot: each call stack is kept once, in memory that never grows, and has a number of 32 bits (`lib/stackdepot.c`).
//!
//! ```text
//! buckets: [ first record of each chain, as a number ]
//! cells:   | next | hash, frames | location | frame … | next | hash, frames | location | frame … | free …
//! ```
//!
//! A stack is the caller's place in the source, and up to [`MAX_FRAMES`] return addresses if the platform has them. Records are only ever added,
//! at the head of their bucket's chain, by one compare-exchange; so any context may save one, an NMI that strikes in the middle of another's
//! saving included. Who loses the race looks at what came before him: that is why the same stack never gets two numbers.
//! No record is ever taken out, and a full depot says so: [`StackId::LOST`].

use core::fmt;
use core::ops::Deref;
use core::panic::Location;

use crate::sync::atomic::{AtomicPtr, AtomicU32, Ordering};

/// Return addresses kept of a stack, at most.
pub const MAX_FRAMES: usize = 16;
/// Cells of a record before its frames.
const HEADER: usize = 3;
/// What a record takes on average, for how many buckets there are: one for two of them.
const CELLS_A_BUCKET: usize = 2 * (HEADER + 8);

/// Which stack: its number in the depot (`depot_stack_handle_t`).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
#[repr(transparent)]
pub struct StackId(u32);

impl StackId {
    /// None was saved: there is no depot.
    pub const NONE: StackId = StackId(0);
    /// One would have been saved, but the depot is full.
    pub const LOST: StackId = StackId(u32::MAX);

    pub(crate) const fn bits(self) -> u32 {
        self.0
    }

    pub(crate) const fn from_bits(bits: u32) -> StackId {
        StackId(bits)
    }
}

/// A stack out of the depot.
#[derive(Clone, Copy, Debug)]
pub struct Stack {
    /// Who called the memory manager.
    pub location: &'static Location<'static>,
    frames: [usize; MAX_FRAMES],
    len: usize,
}

impl Stack {
    /// The return addresses, innermost first; none if the platform has none.
    pub fn frames(&self) -> &[usize] {
        &self.frames[..self.len]
    }
}

/// What a depot holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct DepotInfo {
    /// Bytes there are for stacks.
    pub bytes: usize,
    /// Bytes taken.
    pub used: usize,
    /// Stacks that did not fit, each time one was to be saved.
    pub lost: u32,
}

/// A word of a record: a number, or the address of a location.
#[repr(transparent)]
pub(crate) struct Cell(AtomicPtr<Location<'static>>);

impl Cell {
    pub(crate) fn new() -> Cell {
        Cell(AtomicPtr::new(core::ptr::null_mut()))
    }

    fn set(&self, value: usize) {
        self.0
            .store(core::ptr::without_provenance_mut(value), Ordering::Relaxed);
    }

    fn get(&self) -> usize {
        self.0.load(Ordering::Relaxed).addr()
    }
}

/// The depot. Where its tables lie is the business of who makes it.
///
/// # Invariants
///
/// A bucket holds 0 or one more than the place of a record, which is whole; and so do the first cells of records that a bucket leads to.
pub(crate) struct Depot<B, C> {
    buckets: B,
    cells: C,
    /// Cells taken.
    used: AtomicU32,
    lost: AtomicU32,
}

/// A stack that is looked for.
struct Key<'a> {
    location: &'static Location<'static>,
    frames: &'a [usize],
    hash: u32,
}

impl<'a> Key<'a> {
    fn new(location: &'static Location<'static>, frames: &'a [usize]) -> Key<'a> {
        let frames = &frames[..frames.len().min(MAX_FRAMES)];
        let mut hash = (&raw const *location).addr() as u64;
        for &frame in frames {
            hash = (hash.rotate_left(5) ^ frame as u64).wrapping_mul(0x517c_c1b7_2722_0a95);
        }
        let hash = hash.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        Key {
            location,
            frames,
            hash: (hash >> 32) as u32,
        }
    }

    /// The second cell: the number of frames in the low bits, what is left of the hash above.
    fn mark(&self) -> usize {
        (self.hash & !0xff) as usize | self.frames.len()
    }
}

/// How many buckets and cells a depot of so many bytes has.
pub(crate) fn tables(bytes: usize) -> (usize, usize) {
    let cells = (bytes / size_of::<Cell>()).min((u32::MAX - 2) as usize);
    if cells < HEADER + MAX_FRAMES {
        return (0, 0);
    }
    (cells.div_ceil(CELLS_A_BUCKET), cells)
}

impl<B, C> Depot<B, C>
where
    B: Deref<Target = [AtomicU32]>,
    C: Deref<Target = [Cell]>,
{
    /// An empty one, over zeroed tables.
    pub(crate) fn new(buckets: B, cells: C) -> Self {
        Depot {
            buckets,
            cells,
            used: AtomicU32::new(0),
            lost: AtomicU32::new(0),
        }
    }

    /// Is there one at all?
    #[inline]
    pub(crate) fn is_on(&self) -> bool {
        !self.buckets.is_empty()
    }

    pub(crate) fn info(&self) -> DepotInfo {
        DepotInfo {
            bytes: self.cells.len() * size_of::<Cell>(),
            used: self.used.load(Ordering::Relaxed) as usize * size_of::<Cell>(),
            lost: self.lost.load(Ordering::Relaxed),
        }
    }

    /// The number of a stack, which is saved if it is new. From any context.
    pub(crate) fn save(&self, location: &'static Location<'static>, frames: &[usize]) -> StackId {
        // Release: what the record holds, to who finds it in the chain.
        self.save_as(location, frames, Ordering::Release, true)
    }

    /// `publish` and `again` are for the models, which leave out what they are for.
    #[inline]
    pub(super) fn save_as(
        &self,
        location: &'static Location<'static>,
        frames: &[usize],
        publish: Ordering,
        again: bool,
    ) -> StackId {
        if !self.is_on() {
            return StackId::NONE;
        }
        let key = Key::new(location, frames);
        let bucket = self.bucket(key.hash);
        // Acquire: pairs with the Release of who put the record there.
        let mut head = bucket.load(Ordering::Acquire);
        if let Some(id) = self.find(head, 0, &key) {
            return id;
        }
        let cells = (HEADER + key.frames.len()) as u32;
        let Some(at) = self.reserve(cells) else {
            self.lost.fetch_add(1, Ordering::Relaxed);
            return StackId::LOST;
        };
        let record = &self.cells[at as usize..][..cells as usize];
        record[1].set(key.mark());
        record[2]
            .0
            .store((&raw const *key.location).cast_mut(), Ordering::Relaxed);
        for (cell, &frame) in record[HEADER..].iter().zip(key.frames) {
            cell.set(frame);
        }
        loop {
            record[0].set(head as usize);
            // Acquire on failure: as above.
            match bucket.compare_exchange(head, at + 1, publish, Ordering::Acquire) {
                Ok(_) => return StackId(at + 1),
                Err(now) => {
                    // Somebody was faster; perhaps with the same.
                    if again && let Some(id) = self.find(now, head, &key) {
                        self.give_back(at, cells);
                        return id;
                    }
                    head = now;
                }
            }
        }
    }

    /// What a number stands for; `None` if it is none of this depot's. From any context.
    pub(crate) fn get(&self, id: StackId) -> Option<Stack> {
        if !self.is_on() || id.0 == 0 {
            return None;
        }
        // A number is trusted only if a chain has it; its own cell says which chain, if it is a record's.
        let mark = self.cells.get(id.0 as usize)?.get();
        let mut at = self.bucket(mark as u32).load(Ordering::Acquire);
        while at != 0 && at != id.0 {
            at = self.cells[at as usize - 1].get() as u32;
        }
        if at == 0 { None } else { self.read(at) }
    }

    fn bucket(&self, hash: u32) -> &AtomicU32 {
        // By the kept bits alone, so that a record's cell leads back to its chain.
        &self.buckets[(hash >> 8) as usize % self.buckets.len()]
    }

    /// The record of a stack in the chain from `from` up to `until`.
    fn find(&self, from: u32, until: u32, key: &Key<'_>) -> Option<StackId> {
        let mut at = from;
        while at != until {
            let record = &self.cells[at as usize - 1..];
            let frames = || record[HEADER..].iter().zip(key.frames);
            if record[1].get() == key.mark()
                && core::ptr::eq(record[2].0.load(Ordering::Relaxed), key.location)
                && frames().all(|(cell, &frame)| cell.get() == frame)
            {
                return Some(StackId(at));
            }
            at = record[0].get() as u32;
        }
        None
    }

    fn read(&self, at: u32) -> Option<Stack> {
        let record = &self.cells[at as usize - 1..];
        let len = (record[1].get() & 0xff).min(MAX_FRAMES);
        let mut frames = [0; MAX_FRAMES];
        for (frame, cell) in frames[..len].iter_mut().zip(&record[HEADER..]) {
            *frame = cell.get();
        }
        let location = record[2].0.load(Ordering::Relaxed);
        Some(Stack {
            // SAFETY: the caller found the record in a chain with Acquire, so it is whole, and its third cell holds the address of a
            // `&'static Location`, with its provenance.
            location: unsafe { location.as_ref() }?,
            frames,
            len,
        })
    }

    /// Cells of one's own.
    fn reserve(&self, cells: u32) -> Option<u32> {
        let mut used = self.used.load(Ordering::Relaxed);
        loop {
            if (self.cells.len() as u32).checked_sub(used)? < cells {
                return None;
            }
            // Acquire: pairs with the Release in `give_back`; what he wrote there who gave the cells back is over.
            let taken = self.used.compare_exchange_weak(
                used,
                used + cells,
                Ordering::Acquire,
                Ordering::Relaxed,
            );
            match taken {
                Ok(at) => return Some(at),
                Err(now) => used = now,
            }
        }
    }

    /// Cells that nobody was told of go back, if nobody took others since.
    fn give_back(&self, at: u32, cells: u32) {
        let _ = self
            .used
            .compare_exchange(at + cells, at, Ordering::Release, Ordering::Relaxed);
    }
}

impl<B, C> fmt::Debug for Depot<B, C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Depot").finish_non_exhaustive()
    }
}
