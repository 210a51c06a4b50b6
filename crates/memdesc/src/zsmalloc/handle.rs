//! Handles: 8 bytes each that say where an object is, and who is at it. They stay where they are when the object moves.
//!
//! Linux takes them from a slab cache, 8 bytes too. Here a pool has pages of them, which are zspages of a class of their own: the place of a slot is then
//! 41 bits, so that an object needs 6 bytes to say whose it is, not 8, and what a stale handle leads to is a slot of some pool as long as
//! anybody can look, since the pages go back after a grace period.
//!
//! | bits of a slot | what |
//! |---:|---|
//! | 0..32 | the page that the object starts in; of a free slot, the next that is free |
//! | 32..41 | which object of its zspage |
//! | 41..49 | its class |
//! | 49..54 | who is at it: [`Access`] |
//! | 54..63 | generation: another for the next object that gets this slot |
//! | 63 | in use |
//!
//! | bits of a [`ZsHandle`] | what |
//! |---:|---|
//! | 0..9 | which slot |
//! | 9..41 | of which page |
//! | 41..49 | class |
//! | 49..58 | generation |
//! | 58..64 | pool |
//!
//! A handle that was freed is known by its slot, which is free, or has another class or generation: one in 512 that come to the same slot and class is not
//! found.

use core::num::NonZeroU64;

use super::pool::{Caller, PoolCore};
use super::{ZsError, zspage::Part};
use crate::address::Pfn;
use crate::memmap::PageType;
use crate::mm::Mm;
use crate::platform::Platform;
use crate::report::{Corruption, Report};
use crate::sync::atomic::{AtomicU32, Ordering};

const INDEX_MASK: u32 = 511;
const CLASS_SHIFT: u32 = 9;
const ACCESS_SHIFT: u32 = 17;
const ACCESS_MASK: u32 = 31;
const GENERATION_SHIFT: u32 = 22;
const GENERATION_MASK: u32 = 511;
const LIVE: u32 = 1 << 31;

/// An object of a pool. It stays the same when the object moves.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(transparent)]
pub struct ZsHandle(NonZeroU64);

impl ZsHandle {
    /// As a number, for a table of the owner's.
    pub const fn into_raw(self) -> u64 {
        self.0.get()
    }

    /// From a number that [`into_raw`](Self::into_raw) gave. Of any other number nothing worse comes than
    /// [`ZsError::NoSuchObject`], a report, or somebody else's object; `None` for 0.
    pub const fn from_raw(raw: u64) -> Option<ZsHandle> {
        match NonZeroU64::new(raw) {
            Some(raw) => Some(ZsHandle(raw)),
            None => None,
        }
    }

    pub(super) fn slot(self) -> SlotRef {
        SlotRef::unpack(self.0.get())
    }

    fn class(self) -> usize {
        (self.0.get() >> 41 & 0xff) as usize
    }

    fn generation(self) -> u32 {
        (self.0.get() >> 49) as u32 & GENERATION_MASK
    }

    fn pool(self) -> usize {
        (self.0.get() >> 58) as usize
    }
}

/// Where a slot is: what an object says of whose it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct SlotRef {
    pub(crate) page: Pfn,
    pub(crate) index: u32,
}

impl SlotRef {
    /// In 41 bits.
    pub(crate) fn pack(self) -> u64 {
        u64::from(self.page.0) << 9 | u64::from(self.index)
    }

    pub(crate) fn unpack(bits: u64) -> SlotRef {
        SlotRef {
            page: Pfn((bits >> 9) as u32),
            index: bits as u32 & INDEX_MASK,
        }
    }
}

/// Who is at an object.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
#[repr(transparent)]
pub(crate) struct Access(u32);

impl Access {
    pub(crate) const NOBODY: Access = Access(0);
    /// So many may read it at once.
    const READERS: u32 = 29;
    /// One who writes it, or frees it. Two of them, or one and a reader, are a bug of the owner's.
    pub(crate) const OWNER: Access = Access(30);
    /// Compaction moves it, and holds the lock of its class meanwhile.
    pub(crate) const MOVING: Access = Access(31);
}

/// What a slot says but for the page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct State(u32);

impl State {
    fn is_live(self) -> bool {
        self.0 & LIVE != 0
    }

    pub(crate) fn index(self) -> u32 {
        self.0 & INDEX_MASK
    }

    pub(crate) fn class(self) -> usize {
        (self.0 >> CLASS_SHIFT & 0xff) as usize
    }

    fn access(self) -> Access {
        Access(self.0 >> ACCESS_SHIFT & ACCESS_MASK)
    }

    fn with_access(self, access: Access) -> State {
        State(self.0 & !(ACCESS_MASK << ACCESS_SHIFT) | access.0 << ACCESS_SHIFT)
    }

    fn generation(self) -> u32 {
        self.0 >> GENERATION_SHIFT & GENERATION_MASK
    }
}

/// A slot.
///
/// # Invariants
///
/// `page` is written by who has it free, by who made its object, and under [`Access::MOVING`]; it is read by those who have the object for themselves
/// or as readers.
#[derive(Debug)]
#[repr(C, align(8))]
pub(crate) struct Slot {
    page: AtomicU32,
    state: AtomicU32,
}

const _: () = assert!(size_of::<Slot>() == 8);

impl Slot {
    /// Makes it free, before this one.
    pub(crate) fn set_free(&self, next: u32) {
        self.page.store(next, Ordering::Relaxed);
        // Release: who still looks at it finds it free, or what it was.
        self.state.store(0, Ordering::Release);
    }

    /// The next free one, of a free one.
    pub(crate) fn next_free(&self) -> u32 {
        self.page.load(Ordering::Relaxed)
    }

    /// Has it lead to a new object.
    pub(crate) fn set(&self, page: Pfn, index: u32, class: usize, generation: u32) {
        self.page.store(page.0, Ordering::Relaxed);
        let state = index
            | (class as u32) << CLASS_SHIFT
            | (generation & GENERATION_MASK) << GENERATION_SHIFT
            | LIVE;
        // Release pairs with the Acquire of who takes it.
        self.state.store(state, Ordering::Release);
    }

    pub(crate) fn page(&self) -> Pfn {
        Pfn(self.page.load(Ordering::Relaxed))
    }

    /// What it says to one who is at its object, so that it stays.
    pub(crate) fn held(&self) -> State {
        State(self.state.load(Ordering::Relaxed))
    }

    /// Takes the object to move it, if nobody is at it. Under the lock of its class.
    pub(crate) fn try_move(&self) -> bool {
        let state = State(self.state.load(Ordering::Relaxed));
        debug_assert!(state.is_live());
        let moving = state.with_access(Access::MOVING);
        // Acquire pairs with the Release in `release`: what the last one did to the object comes before it is copied.
        state.access() == Access::NOBODY
            && self
                .state
                .compare_exchange(state.0, moving.0, Ordering::Acquire, Ordering::Relaxed)
                .is_ok()
    }

    /// It is elsewhere now.
    pub(crate) fn moved(&self, page: Pfn, index: u32) {
        self.page.store(page.0, Ordering::Relaxed);
        let state = State(self.held().0 & !INDEX_MASK | index).with_access(Access::NOBODY);
        // Release: who takes it finds it there.
        self.state.store(state.0, Ordering::Release);
    }

    /// A reader is done with it.
    #[inline]
    pub(crate) fn unread(&self) {
        // Release pairs with the Acquire of who takes it next.
        self.state.fetch_sub(1 << ACCESS_SHIFT, Ordering::Release);
    }

    /// Its owner is done with it.
    pub(crate) fn disown(&self) {
        // Release: as above.
        self.state
            .fetch_sub(Access::OWNER.0 << ACCESS_SHIFT, Ordering::Release);
    }
}

impl<P: Platform> Mm<P> {
    /// A slot of a page of handles.
    pub(super) fn slot_at(&self, at: SlotRef) -> &Slot {
        let base = self.pages.map.virt(at.page.phys()).cast::<Slot>();
        debug_assert!(at.index < 512);
        // SAFETY: a page of handles has 512 of them, is accessed as these atomics only, and does not go as long as one of its slots is in use or
        // a section is open in which it was found.
        unsafe { &*base.add(at.index as usize) }
    }

    /// The slot of a handle, if its page is still one of handles. In a read section.
    fn slot_of(&self, handle: ZsHandle) -> Option<&Slot> {
        let at = handle.slot();
        let region = self.pages.map.region(at.page)?;
        // A word that leads to a descriptor, so not of a page that is on its way out: what is freed in this section stays till it ends.
        let word = region.word(at.page).load();
        crate::inject::point("zsmalloc: handle found");
        (word.kind() == PageType::Zsmalloc && Part::of(word) == Part::Handles && at.index < 511)
            .then(|| self.slot_at(at))
    }

    /// Takes the object of a handle: as its owner, or as one reader more.
    pub(super) fn take_object(
        &self,
        pool: &PoolCore,
        handle: ZsHandle,
        owner: bool,
    ) -> Result<&Slot, ZsError> {
        if handle.pool() != pool.number {
            return Err(ZsError::NoSuchObject);
        }
        loop {
            let reading = self.rcu_read_lock();
            let slot = self.slot_of(handle).ok_or(ZsError::NoSuchObject)?;
            let state = State(slot.state.load(Ordering::Relaxed));
            let same = state.is_live()
                && state.class() == handle.class()
                && state.generation() == handle.generation();
            if !same {
                return Err(ZsError::NoSuchObject);
            }
            let taken = match state.access() {
                Access::MOVING => {
                    drop(reading);
                    crate::inject::point("zsmalloc: found moving");
                    // Who moves it holds this lock until it is moved.
                    drop(self.class_lock(pool, handle.class()));
                    continue;
                }
                Access::NOBODY if owner => Access::OWNER,
                Access(n) if !owner && n < Access::READERS => Access(n + 1),
                _ => return Err(ZsError::Busy),
            };
            // Acquire pairs with the Release of who set it up, moved it or was at it last.
            let new = state.with_access(taken);
            if slot
                .state
                .compare_exchange(state.0, new.0, Ordering::Acquire, Ordering::Relaxed)
                .is_ok()
            {
                return Ok(slot);
            }
        }
    }

    /// The handle of a new object.
    pub(super) fn handle_of(&self, pool: &PoolCore, at: SlotRef) -> ZsHandle {
        let state = self.slot_at(at).held();
        let bits = at.pack()
            | (state.class() as u64) << 41
            | u64::from(state.generation()) << 49
            | (pool.number as u64) << 58;
        match NonZeroU64::new(bits) {
            Some(bits) => ZsHandle(bits),
            None => unreachable!("page 0 is never handed out"),
        }
    }

    /// Says that a handle is not what its owner takes it for.
    #[cold]
    pub(super) fn report_handle(
        &self,
        pool: &PoolCore,
        handle: ZsHandle,
        why: ZsError,
        caller: Caller,
    ) {
        let at = handle.slot();
        let region = self.pages.map.region(at.page);
        let what = match why {
            ZsError::Busy => Corruption::InUse,
            _ if region.is_none() => Corruption::NotRam,
            _ if handle.pool() != pool.number => Corruption::WrongCache,
            _ => Corruption::DoubleFree,
        };
        let address = at.page.phys().0 as usize + at.index as usize * size_of::<Slot>();
        let report = self.report_at(what, at.page, address, caller);
        self.pages.platform.corruption(&Report {
            cache: Some(pool.name()),
            ..report
        });
    }
}
