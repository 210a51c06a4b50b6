//! A place of the guarded pool: what is in it, who had it, and what its page is filled with beside it (`struct kfence_metadata`).
//!
//! All of it is atomics, so that the report of a fault, which may strike anywhere, reads it without a lock: it may see half of a change, and
//! then prints it.

use core::panic::Location;
use core::ptr::NonNull;

use crate::platform::{Pin, Platform};
use crate::report::entry::NO_CPU;
use crate::report::{StackId, Track};
use crate::sync::atomic::{AtomicPtr, AtomicU32, AtomicU64, Ordering};

/// What becomes of a slot.
///
/// | state | set by | the page |
/// |---|---|---|
/// | `Unused`, `Free` | [`Slot::set_state`], by who took it out of use | inaccessible; in the list of free slots, or on its way there |
/// | `Busy` | who took it from that list; [`Slot::claim`] | changes |
/// | `InUse` | who made it `Busy`, as the object is handed out | accessible |
/// | `Deferred` | [`Slot::claim`]: freed where no lock may be taken, and waits for the next normal free | accessible |
/// | `Waiting` | who made it `Busy`: freed, of a type-stable cache, waits for a grace period | accessible |
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub(crate) enum State {
    /// No object was ever in it.
    Unused = 0,
    /// An object was.
    Free = 1,
    Busy = 2,
    InUse = 3,
    Deferred = 4,
    Waiting = 5,
}

impl State {
    fn of(bits: u32) -> State {
        match bits {
            0 => State::Unused,
            1 => State::Free,
            3 => State::InUse,
            4 => State::Deferred,
            5 => State::Waiting,
            _ => State::Busy,
        }
    }
}

/// Words of a cache's name that are kept.
const NAME_WORDS: usize = 5;

/// The name of the cache that an object is from: a copy, since the cache may be gone when it is wanted.
#[derive(Clone, Copy)]
pub(crate) struct CacheName {
    bytes: [u8; NAME_WORDS * 8],
    len: usize,
}

impl CacheName {
    pub(crate) fn as_str(&self) -> &str {
        core::str::from_utf8(&self.bytes[..self.len]).unwrap_or("?")
    }
}

impl core::fmt::Debug for CacheName {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Who did something.
#[derive(Debug)]
struct TrackCell {
    location: AtomicPtr<Location<'static>>,
    when: AtomicU64,
    cpu: AtomicU32,
    stack: AtomicU32,
}

impl TrackCell {
    fn new() -> TrackCell {
        TrackCell {
            location: AtomicPtr::new(core::ptr::null_mut()),
            when: AtomicU64::new(0),
            cpu: AtomicU32::new(0),
            stack: AtomicU32::new(0),
        }
    }

    fn set(&self, track: Option<Track>) {
        let Some(track) = track else {
            return self
                .location
                .store(core::ptr::null_mut(), Ordering::Relaxed);
        };
        self.when.store(track.when, Ordering::Relaxed);
        self.cpu.store(track.cpu, Ordering::Relaxed);
        self.stack.store(track.stack.bits(), Ordering::Relaxed);
        let location = (&raw const *track.location).cast_mut();
        self.location.store(location, Ordering::Relaxed);
    }

    fn get(&self) -> Option<Track> {
        // SAFETY: null, or stored by `set`, from a reference that is valid for ever.
        let location = unsafe { self.location.load(Ordering::Relaxed).as_ref() }?;
        Some(Track {
            location,
            cpu: self.cpu.load(Ordering::Relaxed),
            when: self.when.load(Ordering::Relaxed),
            stack: StackId::from_bits(self.stack.load(Ordering::Relaxed)),
        })
    }
}

/// Who calls, here and now. From any context.
pub(crate) fn track<P: Platform>(
    pages: &crate::page_alloc::alloc::PageAllocator<P>,
    caller: &'static Location<'static>,
) -> Track {
    Track {
        location: caller,
        cpu: Pin::try_new(&pages.platform).map_or(NO_CPU, |pin| pin.cpu() as u32),
        when: pages.platform.now(),
        stack: pages.save_stack(caller),
    }
}

/// A slot.
///
/// # Invariants
///
/// Who made it `Busy` has it to himself, and is the only one who writes `at`, `size`, `name` and the tracks.
#[derive(Debug)]
#[repr(C, align(64))]
pub(crate) struct Slot {
    state: AtomicU32,
    /// The next in the list of free slots; guarded by that list's lock.
    pub(super) next: AtomicU32,
    at: AtomicU64,
    size: AtomicU32,
    /// 1: a fault made the guard page left of it accessible.
    pub(super) opened: AtomicU32,
    /// The grace period that it waits for.
    pub(super) cookie: AtomicU64,
    /// The next in a list of objects whose free is deferred: not in the object, whose bytes are all somebody's or a canary.
    pub(crate) link: AtomicPtr<u8>,
    /// What other slabs have before their first object: the bits of prepaid frees, and whom the object is charged to.
    side: [AtomicU64; SIDE_WORDS],
    allocated: TrackCell,
    freed: TrackCell,
    name: [AtomicU64; NAME_WORDS],
    name_len: AtomicU32,
}

const SIDE_WORDS: usize = 5;
const _: () = assert!(
    SIDE_WORDS * 8 >= crate::rcu::prepaid::bytes(1) + crate::memcg::owners_bytes(1),
    "room for what a slab of one object has before it"
);

impl Slot {
    pub(crate) fn new() -> Slot {
        Slot {
            state: AtomicU32::new(State::Unused as u32),
            next: AtomicU32::new(0),
            at: AtomicU64::new(0),
            size: AtomicU32::new(0),
            opened: AtomicU32::new(0),
            cookie: AtomicU64::new(0),
            link: AtomicPtr::new(core::ptr::null_mut()),
            side: [const { AtomicU64::new(0) }; SIDE_WORDS],
            allocated: TrackCell::new(),
            freed: TrackCell::new(),
            name: [const { AtomicU64::new(0) }; NAME_WORDS],
            name_len: AtomicU32::new(0),
        }
    }

    pub(crate) fn state(&self) -> State {
        // Acquire pairs with the Release in `set_state`.
        State::of(self.state.load(Ordering::Acquire))
    }

    pub(super) fn set_state(&self, state: State) {
        self.state.store(state as u32, Ordering::Release);
    }

    /// From one state to another, if it is in that still: of several who try one does it.
    pub(super) fn claim(&self, from: State, to: State) -> bool {
        // Acquire pairs with the Release in `set_state`.
        self.state
            .compare_exchange(from as u32, to as u32, Ordering::AcqRel, Ordering::Relaxed)
            .is_ok()
    }

    /// The object's address.
    pub(crate) fn at(&self) -> usize {
        self.at.load(Ordering::Relaxed) as usize
    }

    /// Bytes that were asked for.
    pub(crate) fn size(&self) -> usize {
        self.size.load(Ordering::Relaxed) as usize
    }

    /// Who allocated it, and who freed it.
    pub(crate) fn tracks(&self) -> (Option<Track>, Option<Track>) {
        (self.allocated.get(), self.freed.get())
    }

    pub(crate) fn name(&self) -> CacheName {
        let mut bytes = [0; NAME_WORDS * 8];
        for (word, out) in self.name.iter().zip(bytes.chunks_exact_mut(8)) {
            out.copy_from_slice(&word.load(Ordering::Relaxed).to_ne_bytes());
        }
        let len = self.name_len.load(Ordering::Relaxed) as usize;
        CacheName {
            bytes,
            len: len.min(bytes.len()),
        }
    }

    /// An object of so many bytes is in it from here on.
    pub(super) fn fill(&self, at: usize, size: usize, name: &str, track: Track) {
        self.at.store(at as u64, Ordering::Relaxed);
        self.size.store(size as u32, Ordering::Relaxed);
        let mut bytes = [0; NAME_WORDS * 8];
        let len = name.len().min(bytes.len());
        bytes[..len].copy_from_slice(&name.as_bytes()[..len]);
        for (word, bytes) in self.name.iter().zip(bytes.chunks_exact(8)) {
            let mut eight = [0; 8];
            eight.copy_from_slice(bytes);
            word.store(u64::from_ne_bytes(eight), Ordering::Relaxed);
        }
        self.name_len.store(len as u32, Ordering::Relaxed);
        self.allocated.set(Some(track));
        self.freed.set(None);
    }

    pub(super) fn note_free(&self, track: Track) {
        self.freed.set(Some(track));
    }

    /// See [`Slot`]: the bytes that stand for those before the first object of other slabs.
    pub(super) fn side(&self) -> *mut u8 {
        self.side.as_ptr().cast_mut().cast()
    }

    /// Nobody is charged, nothing pending.
    pub(super) fn clear_side(&self) {
        self.side
            .iter()
            .for_each(|word| word.store(0, Ordering::Relaxed));
    }
}

/// What a byte of the page holds that is not the object's (`KFENCE_CANARY_PATTERN_U8`).
pub(crate) fn canary(address: usize) -> u8 {
    0xaa ^ (address as u8 & 7)
}

/// Fills a stretch with canaries.
///
/// # Safety
///
/// The stretch may be written, and is the caller's alone.
pub(super) unsafe fn write_canaries(at: NonNull<u8>, len: usize) {
    for i in 0..len {
        // SAFETY: the caller's promise.
        unsafe { at.add(i).write(canary(at.addr().get() + i)) };
    }
}

/// The first byte of a stretch that is not its canary: where, and what it is.
///
/// # Safety
///
/// The stretch may be read.
pub(super) unsafe fn first_dead(at: NonNull<u8>, len: usize) -> Option<(usize, u8)> {
    (0..len).find_map(|i| {
        // SAFETY: the caller's promise; volatile, since a faulty user may be writing, which is what we are looking for.
        let found = unsafe { at.add(i).read_volatile() };
        (found != canary(at.addr().get() + i)).then_some((i, found))
    })
}
