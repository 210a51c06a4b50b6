//! The groups: found by number, made, deleted, and used again.
//!
//! A table of two levels leads from a number to a group: 256 leaves of 256. Table and groups are made when they are first needed, and stay: a group that is
//! gone is used again for the next one. So a number leads to a group or to nothing, without a lock, whatever happens meanwhile; and
//! whoever goes by a number keeps the group from going by what he has: its handle, a pin, or memory that is charged to it. Who has none of these and
//! asks too late charges whoever has the number now, or nobody: his accounting is wrong, nothing else.

use core::ptr::NonNull;

use super::MemcgStat;
use super::counter::{Counter, Left, Level};
use crate::error::AllocError;
use crate::gfp;
use crate::mm::Mm;
use crate::name::AtomicName;
use crate::platform::Platform;
use crate::sync::atomic::{AtomicPtr, AtomicU16, AtomicU32, AtomicU64, Ordering};
use crate::sync::{PfnStack, SpinLock};

use crate::address::Pfn;

const LEAF: usize = 256;

/// A group.
///
/// # Invariants
///
/// `id` never changes. `parent` and `name` change while nobody has it (its counter's word is zero), by who makes it.
#[repr(C, align(64))]
pub(crate) struct Group {
    pub(crate) counter: Counter,
    /// By what it is charged itself; the sum is less than the counter's bytes by what its children have.
    pub(super) stats: [AtomicU64; MemcgStat::COUNT],
    /// For who counts again.
    pub(super) seen: AtomicU64,
    parent: AtomicPtr<Group>,
    pub(super) name: AtomicName,
    id: AtomicU16,
    /// The next that is gone.
    free: AtomicU32,
}

const _: () = assert!(size_of::<Group>() <= 256);

impl Level for Group {
    #[inline]
    fn counter(&self) -> &Counter {
        &self.counter
    }

    #[inline]
    fn parent(&self) -> Option<&Group> {
        // SAFETY: null, or a group, which stays memory of a group for ever; all its fields are atomics.
        unsafe { self.parent.load(Ordering::Relaxed).as_ref() }
    }
}

impl Group {
    pub(crate) fn id(&self) -> u16 {
        self.id.load(Ordering::Relaxed)
    }

    pub(crate) fn up(&self) -> Option<&Group> {
        Level::parent(self)
    }

    /// Is it this one, or below it?
    pub(crate) fn is_within(&self, top: &Group) -> bool {
        let mut at = Some(self);
        while let Some(group) = at {
            if core::ptr::eq(group, top) {
                return true;
            }
            at = group.up();
        }
        false
    }
}

type Leaf = [AtomicPtr<Group>; LEAF];
type Table = [AtomicPtr<Leaf>; LEAF];

/// What who makes groups has.
#[derive(Debug)]
pub(crate) struct Making {
    /// Numbers up to here were given out.
    last: u16,
    /// Groups to use again, linked through `free`.
    free: u32,
}

/// All groups.
#[derive(Debug)]
pub(crate) struct Memcgs {
    /// Null until the first is made: accounting is off.
    table: AtomicPtr<Table>,
    pub(super) making: SpinLock<Making>,
    /// Groups that went, from any context.
    gone: PfnStack,
    zombies: AtomicU64,
    /// Of kmalloc memory: table, leaves and groups.
    bytes: AtomicU64,
}

impl Memcgs {
    pub(crate) fn new() -> Memcgs {
        Memcgs {
            table: AtomicPtr::new(core::ptr::null_mut()),
            making: SpinLock::new(Making {
                last: 0,
                free: Pfn::NONE.0,
            }),
            gone: PfnStack::new(),
            zombies: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
        }
    }

    /// Was there ever a group?
    #[inline]
    pub(crate) fn in_use(&self) -> bool {
        !self.table.load(Ordering::Relaxed).is_null()
    }

    /// Bytes that the groups take: metadata.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    pub(super) fn zombies(&self) -> u64 {
        self.zombies.load(Ordering::Relaxed)
    }

    fn leaf(&self, id: u16) -> Option<&AtomicPtr<Leaf>> {
        // SAFETY: null, or a table, zeroed when it was made and there for good; atomics only. Acquire pairs with the Release of who
        // made it, here and below.
        let table = unsafe { self.table.load(Ordering::Acquire).as_ref() }?;
        Some(&table[usize::from(id) / LEAF])
    }

    fn cell(&self, id: u16) -> Option<&AtomicPtr<Group>> {
        // SAFETY: as above.
        let leaf = unsafe { self.leaf(id)?.load(Ordering::Acquire).as_ref() }?;
        Some(&leaf[usize::from(id) % LEAF])
    }

    /// The group with this number, if there ever was one.
    #[inline]
    pub(crate) fn get(&self, id: u16) -> Option<&Group> {
        // SAFETY: as above.
        unsafe { self.cell(id)?.load(Ordering::Acquire).as_ref() }
    }

    /// The handle goes.
    pub(super) fn delete(&self, group: &Group) {
        self.zombies.fetch_add(1, Ordering::Relaxed);
        if group.counter.offline() == Left::Last {
            self.release(group);
        }
    }

    /// Whoever has a pin lets go of it.
    pub(crate) fn unpin(&self, id: u16) {
        if let Some(group) = self.get(id)
            && group.counter.unpin() == Left::Last
        {
            self.release(group);
        }
    }

    /// Nothing keeps the group any more: its number is free, and its parent has a child less. From any context.
    pub(super) fn release(&self, group: &Group) {
        let mut next = Some(group);
        while let Some(group) = next {
            // Before somebody makes it another.
            next = group.up();
            let set = |first: Pfn| group.free.store(first.0, Ordering::Relaxed);
            self.gone.push(Pfn(u32::from(group.id())), set);
            self.zombies.fetch_sub(1, Ordering::Relaxed);
            next = next.filter(|parent| parent.counter.unpin() == Left::Last);
        }
    }

    /// All groups that somebody has, by number. Under the mutex: none is made meanwhile.
    pub(super) fn each(&self, making: &Making, mut visit: impl FnMut(&Group)) {
        let alive = |id| self.get(id).filter(|group| group.counter.is_alive());
        (1..=making.last).filter_map(alive).for_each(&mut visit);
    }
}

impl<P: Platform> Mm<P> {
    pub(super) fn new_group(
        &self,
        parent: Option<&Group>,
        name: &str,
        limit: u64,
    ) -> Result<&Group, AllocError> {
        let memcg = &self.pages.memcg;
        let mut making = self.memcg_mutex();
        if making.free == Pfn::NONE.0 {
            making.free = memcg.gone.take().0;
        }
        let group = match u16::try_from(making.free).ok().and_then(|id| memcg.get(id)) {
            Some(group) => group,
            None => {
                let next = making.last.checked_add(1).filter(|&id| id < u16::MAX);
                let id = next.ok_or(AllocError::TooMany)?;
                let group = self.group_memory(id)?;
                making.last = id;
                making.free = u32::from(id);
                // It is free until it is somebody's.
                group.free.store(Pfn::NONE.0, Ordering::Relaxed);
                group
            }
        };
        // Under its parent, which has a handle, or else it stays where it is.
        if parent.is_some_and(|parent| !parent.counter.pin()) {
            return Err(AllocError::TooMany);
        }
        making.free = group.free.load(Ordering::Relaxed);
        let up = parent.map_or(core::ptr::null(), |parent| &raw const *parent);
        group.parent.store(up.cast_mut(), Ordering::Relaxed);
        group.name.set(name);
        debug_assert!(group.stats.iter().all(|s| s.load(Ordering::Relaxed) == 0));
        group.counter.init(limit);
        Ok(group)
    }

    /// Memory for a group with this number, which never had one: zero, and there for good.
    fn group_memory(&self, id: u16) -> Result<&Group, AllocError> {
        let memcg = &self.pages.memcg;
        if memcg.leaf(id).is_none() {
            let table = self.zeroed::<Table>()?;
            memcg.table.store(table.as_ptr(), Ordering::Release);
        }
        let leaf = memcg.leaf(id).ok_or(AllocError::NoBlock)?;
        if leaf.load(Ordering::Relaxed).is_null() {
            leaf.store(self.zeroed::<Leaf>()?.as_ptr(), Ordering::Release);
        }
        let cell = memcg.cell(id).ok_or(AllocError::NoBlock)?;
        if cell.load(Ordering::Relaxed).is_null() {
            let group = self.zeroed::<Group>()?;
            // SAFETY: zeroed, and nobody else's yet; all fields are atomics.
            unsafe { group.as_ref() }.id.store(id, Ordering::Relaxed);
            cell.store(group.as_ptr(), Ordering::Release);
        }
        memcg.get(id).ok_or(AllocError::NoBlock)
    }

    fn zeroed<T>(&self) -> Result<NonNull<T>, AllocError> {
        let bytes = size_of::<T>().next_power_of_two();
        let memory = self.kmalloc(bytes, gfp::GFP_KERNEL | gfp::__GFP_ZERO)?;
        self.pages
            .memcg
            .bytes
            .fetch_add(bytes as u64, Ordering::Relaxed);
        Ok(memory.cast())
    }
}
