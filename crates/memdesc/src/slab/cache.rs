//! A cache: what its objects look like, and the slabs it has.
//!
//! A slab is in the list for its fullness, by eighths, and the fullest that is not full is allocated from first: the others are
//! left to become empty. At most [`MIN_PARTIAL`] empty ones are kept. A slab being made or given back is in no list.
//!
//! Lock order: a cache's list lock is a leaf.

use core::fmt;
use core::marker::PhantomData;
use core::ops::BitOr;
use core::ptr::NonNull;

use super::sheaf::Sheaves;
use crate::address::{MAX_ORDER, PAGE_SIZE, Pfn};
use crate::desc::{BITMAP_INLINE, Buddy, Slab, SlabList};
use crate::gfp::Flags;
use crate::memmap::{Flaw, MemMap};
use crate::sync::SpinLock;
use crate::sync::atomic::{AtomicPtr, AtomicU32};

/// Empty slabs a cache keeps for the next burst (`MIN_PARTIAL`).
pub(crate) const MIN_PARTIAL: u32 = 5;
/// Slabs larger than this are used only if an object does not fit otherwise (`slub_max_order`).
const SLAB_MAX_ORDER: usize = 3;
/// Longest name kept; the rest is cut off.
const NAME_LEN: usize = 40;

/// What a cache does beyond handing out objects (Linux's `SLAB_*`).
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct CacheFlags(u32);

impl CacheFlags {
    /// Nothing.
    pub const EMPTY: CacheFlags = CacheFlags(0);
    /// Bytes before and after each object are checked (`SLAB_RED_ZONE`).
    pub const RED_ZONE: CacheFlags = CacheFlags(1 << 0);
    /// Free objects are filled with a pattern that is checked (`SLAB_POISON`).
    pub const POISON: CacheFlags = CacheFlags(1 << 1);
    /// Who allocated and who freed is kept with each object (`SLAB_STORE_USER`).
    pub const STORE_USER: CacheFlags = CacheFlags(1 << 2);
    /// Objects start at a cache line (`SLAB_HWCACHE_ALIGN`).
    pub const HWCACHE_ALIGN: CacheFlags = CacheFlags(1 << 3);
    /// A shrinker can free the objects: their pages are reclaimable (`SLAB_RECLAIM_ACCOUNT`).
    pub const RECLAIM_ACCOUNT: CacheFlags = CacheFlags(1 << 4);
    /// Pages from ZONE_DMA (`SLAB_CACHE_DMA`).
    pub const CACHE_DMA: CacheFlags = CacheFlags(1 << 5);
    /// No per-CPU sheaves: every operation goes to the slabs.
    pub const NO_SHEAVES: CacheFlags = CacheFlags(1 << 6);
    /// Slab pages go back only after a grace period: a reader who found an object without a lock finds one of the same kind there
    /// as long as he reads (`SLAB_TYPESAFE_BY_RCU`). Free objects keep what they hold.
    pub const TYPESAFE_BY_RCU: CacheFlags = CacheFlags(1 << 8);
    /// Objects can be freed after a grace period by [`kfree_rcu_prepaid`](crate::Mm::kfree_rcu_prepaid), without a head, memory or
    /// waiting: 2 bits an object and 16 bytes a slab.
    pub const RCU_PREPAID: CacheFlags = CacheFlags(1 << 9);
    /// Each object is charged to whom [`Platform::current_memcg`](crate::Platform::current_memcg) says (`SLAB_ACCOUNT`): 2 bytes an object for who that is.
    pub const ACCOUNT: CacheFlags = CacheFlags(1 << 10);
    /// Objects asked for with [`__GFP_ACCOUNT`](crate::gfp::__GFP_ACCOUNT) are charged, the others are not: 2 bytes an object.
    pub const OWNERS: CacheFlags = CacheFlags(1 << 11);
    /// Objects are zeroed when they are handed out; set by what [`Config`](crate::Config) says.
    pub(crate) const INIT_ON_ALLOC: CacheFlags = CacheFlags(1 << 12);
    /// Objects are zeroed when they are free.
    pub(crate) const INIT_ON_FREE: CacheFlags = CacheFlags(1 << 13);
    /// Slabs of single pages: the caches that the page allocator itself lives on.
    pub(crate) const SINGLE_PAGES: CacheFlags = CacheFlags(1 << 7);

    /// All of the flags that check objects.
    pub const DEBUG: CacheFlags = CacheFlags(0b111);

    /// Are all of `other` set?
    pub const fn contains(self, other: CacheFlags) -> bool {
        self.0 & other.0 == other.0
    }

    /// Is any of `other` set?
    pub const fn intersects(self, other: CacheFlags) -> bool {
        self.0 & other.0 != 0
    }
}

impl BitOr for CacheFlags {
    type Output = CacheFlags;
    fn bitor(self, other: CacheFlags) -> CacheFlags {
        CacheFlags(self.0 | other.0)
    }
}

impl fmt::Debug for CacheFlags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = [
            (Self::RED_ZONE, "Z"),
            (Self::POISON, "P"),
            (Self::STORE_USER, "U"),
            (Self::HWCACHE_ALIGN, "A"),
            (Self::RECLAIM_ACCOUNT, "a"),
            (Self::CACHE_DMA, "d"),
            (Self::NO_SHEAVES, "-"),
            (Self::TYPESAFE_BY_RCU, "R"),
            (Self::RCU_PREPAID, "p"),
            (Self::ACCOUNT, "C"),
            (Self::OWNERS, "c"),
        ];
        f.write_str("slab flags ")?;
        names
            .iter()
            .filter(|(flag, _)| self.contains(*flag))
            .try_for_each(|(_, n)| f.write_str(n))
    }
}

/// What the cache is for; descriptor caches get their slabs in another way.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Role {
    /// An ordinary cache.
    Objects,
    /// `kmem_cache_buddy`.
    Buddies,
    /// `kmem_cache_slab`.
    Slabs,
    /// Folios and page table descriptors: ordinary, but counted as metadata.
    Descriptors,
    /// Pages of the guarded pool that no object is in: see [`kfence`](super::kfence).
    Guarded,
}

/// Where things are in a slab and in the slot of an object.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Geometry {
    /// Bytes the user asked for.
    pub(crate) object_size: u32,
    /// Bytes from one object to the next.
    pub(crate) size: u32,
    /// From a slot's start to its object: the left red zone.
    pub(crate) lead: u32,
    /// The first slot in the slab: after the bitmap, if there is one in the page.
    pub(crate) first: u32,
    pub(crate) objects: u32,
    pub(crate) order: u32,
    /// From an object's start to the 8 bytes that link it to others once it is dead: 0, in the object itself, unless what it
    /// holds must outlive it.
    pub(crate) link: u32,
    pub(crate) align: u32,
    /// Slabs have the bits of prepaid frees.
    prepaid: bool,
    /// Slabs have a vector of whom objects are charged to.
    owners: bool,
    /// `ceil(2^32 / size)`: a division by multiplication.
    reciprocal: u64,
}

impl Geometry {
    /// A page of the guarded pool: one object, and where it is stands in the slab.
    pub(crate) const GUARDED: Geometry = Geometry {
        object_size: PAGE_SIZE as u32,
        size: PAGE_SIZE as u32,
        lead: 0,
        first: 0,
        objects: 1,
        order: 0,
        link: 0,
        align: 8,
        prepaid: false,
        owners: false,
        reciprocal: (1u64 << 32).div_ceil(PAGE_SIZE as u64),
    };

    /// The geometry for objects of this size (`calculate_sizes`, `calculate_order`); `None` if they do not fit a block.
    ///
    /// `keeps`: what a free object holds must stay, so its link lies behind it, 8 bytes more.
    pub(crate) fn new(
        object_size: usize,
        align: usize,
        flags: CacheFlags,
        keeps: bool,
    ) -> Option<Geometry> {
        if object_size == 0
            || object_size > PAGE_SIZE << MAX_ORDER
            || !align.is_power_of_two()
            || align > PAGE_SIZE
        {
            return None;
        }
        let align = align
            .max(8)
            .max(if flags.contains(CacheFlags::HWCACHE_ALIGN) {
                // As small as the object allows, up to a cache line.
                object_size.next_power_of_two().min(64)
            } else {
                8
            });
        let (lead, tail) = super::debug::slot_extra(object_size, align, flags);
        // Of an object as long as its link fewer bytes may have been asked for; the others are red zone.
        let keeps = keeps || flags.contains(CacheFlags::RED_ZONE) && object_size <= 8;
        let link = if keeps { 8 } else { 0 };
        let size = (lead + object_size.next_multiple_of(8) + tail + link).next_multiple_of(align);
        let order = if flags.contains(CacheFlags::SINGLE_PAGES) {
            0
        } else {
            slab_order(size)?
        };
        let geometry = Geometry {
            object_size: object_size as u32,
            size: size as u32,
            lead: lead as u32,
            first: 0,
            objects: 0,
            order: 0,
            link: if keeps { (size - lead - 8) as u32 } else { 0 },
            align: align as u32,
            prepaid: flags.contains(CacheFlags::RCU_PREPAID),
            owners: flags.has_owners(),
            reciprocal: (1u64 << 32).div_ceil(size as u64),
        };
        let mut geometry = geometry.with_order(order);
        while geometry.objects == 0 {
            // The bits took the room of the only object.
            let order = geometry.order as usize + 1;
            if order > MAX_ORDER {
                return None;
            }
            geometry = geometry.with_order(order);
        }
        Some(geometry)
    }

    /// The same objects in slabs of this order, in which at least one fits.
    fn with_order(self, order: usize) -> Geometry {
        let (bytes, size) = (PAGE_SIZE << order, self.size as usize);
        let mut objects = bytes / size;
        let mut first = 0;
        if objects > BITMAP_INLINE || self.prepaid || self.owners {
            let header = |objects| {
                let prepaid = if self.prepaid {
                    crate::rcu::prepaid::bytes(objects)
                } else {
                    0
                };
                let owners = if self.owners {
                    crate::memcg::owners_bytes(objects)
                } else {
                    0
                };
                Slab::bitmap_bytes(objects) + prepaid + owners
            };
            // The bits take the place of some objects.
            while objects > 0 && (first + objects * size > bytes || first < header(objects)) {
                first = header(objects).next_multiple_of(self.align as usize);
                if first + objects * size > bytes {
                    objects -= 1;
                    first = header(objects).next_multiple_of(self.align as usize);
                }
            }
        }
        Geometry {
            first: first as u32,
            objects: objects as u32,
            order: order as u32,
            ..self
        }
    }

    /// The smallest slabs that hold such objects: for when the wanted order cannot be had (Linux's `oo_min`).
    fn smallest(self) -> Geometry {
        let size = self.size as usize;
        let least = (0..self.order as usize)
            .find(|&order| PAGE_SIZE << order >= size && self.with_order(order).objects > 0);
        least.map_or(self, |order| self.with_order(order))
    }

    /// Where object `index` is, from the slab's start.
    #[inline]
    pub(crate) fn offset(&self, index: usize) -> usize {
        self.first as usize + index * self.size as usize + self.lead as usize
    }

    /// Which object starts at this offset; `None` if none does.
    #[inline]
    pub(crate) fn index(&self, offset: usize) -> Option<usize> {
        let from = offset.checked_sub(self.first as usize + self.lead as usize)?;
        // Exact for all offsets below 2^32 / size, and a slab is at most 4 MiB: checked by a test.
        let index = ((from as u64 * self.reciprocal) >> 32) as usize;
        (index * self.size as usize == from && index < self.objects as usize).then_some(index)
    }
}

/// The order of slabs: the least that wastes no more than a sixteenth, an eighth, a quarter; at least the object must fit.
fn slab_order(size: usize) -> Option<usize> {
    let fits = (0..=MAX_ORDER).find(|&order| PAGE_SIZE << order >= size)?;
    if PAGE_SIZE / size > BITMAP_INLINE {
        // Their bitmap lies in the slab; the descriptor at least is shared by more pages.
        return Some(SLAB_MAX_ORDER);
    }

    // Linux wants more objects in a slab the more CPUs there are; sheaves do that job here, eight will do.
    let min_objects = 8;
    for fraction in [16, 8, 4, 2] {
        for order in fits..=SLAB_MAX_ORDER.max(fits) {
            let bytes = PAGE_SIZE << order;
            if bytes % size <= bytes / fraction
                && (bytes / size >= min_objects || order >= SLAB_MAX_ORDER)
            {
                return Some(order);
            }
        }
    }
    Some(fits)
}

/// A list of slabs, linked by page frame number.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SlabHead {
    pub(crate) head: Pfn,
    pub(crate) nr: u32,
}

/// What the list lock guards, with all bitmaps of the cache's slabs.
#[derive(Debug)]
pub(crate) struct Lists {
    /// Slabs by fullness, up to those that are full; behind them those from reserves, from which only the entitled are served.
    pub(crate) by_share: [SlabHead; SlabList::COUNT],
    /// Slabs with no object handed out; they are in the first list.
    pub(crate) nr_empty: u32,
    /// Objects handed out, those in sheaves included.
    pub(crate) inuse: u64,
    /// Objects in all slabs.
    pub(crate) objects: u64,
    /// Pages of all slabs.
    pub(crate) pages: u64,
    /// Bytes of bitmaps that lie in the slabs.
    pub(crate) bitmap_bytes: u64,
}

impl Lists {
    /// Puts a slab that is in no list at the front of one.
    pub(crate) fn add(&mut self, map: &MemMap, slab: &Slab, list: SlabList) {
        let pfn = slab.pfn();
        let head = &mut self.by_share[list.index()];
        slab.links().set_next(head.head);
        slab.links().set_prev(Pfn::NONE);
        if head.head != Pfn::NONE {
            slab_of(map, head.head).links().set_prev(pfn);
        }
        head.head = pfn;
        head.nr += 1;
        slab.set_list(list);
    }

    /// The slab to allocate from next; [`Pfn::NONE`] if all are full.
    pub(crate) fn next_partial(&self) -> Pfn {
        let partial = self.by_share[..SlabList::SHARES].iter().rev();
        partial
            .map(|list| list.head)
            .find(|&head| head != Pfn::NONE)
            .unwrap_or(Pfn::NONE)
    }

    /// Puts a slab whose objects came or went into the list it belongs to.
    pub(crate) fn relist(&mut self, map: &MemMap, slab: &Slab) {
        let (list, now) = (slab.home(), slab.list());
        if list != now {
            if now != SlabList::NONE {
                self.remove(map, slab);
            }
            self.add(map, slab, list);
        }
    }

    /// A new slab is counted.
    pub(crate) fn enter(&mut self, geometry: &Geometry) {
        self.objects += u64::from(geometry.objects);
        self.pages += 1 << geometry.order;
        self.bitmap_bytes += u64::from(geometry.first);
    }

    /// A slab leaves its list and the count, to be given back.
    pub(crate) fn leave(&mut self, map: &MemMap, slab: &Slab, geometry: &Geometry) {
        self.remove(map, slab);
        self.objects -= u64::from(geometry.objects);
        self.pages -= 1 << geometry.order;
        self.bitmap_bytes -= u64::from(geometry.first);
    }

    /// How many slabs there are.
    pub(crate) fn nr_slabs(&self) -> u32 {
        self.by_share.iter().map(|list| list.nr).sum()
    }

    /// Do the slabs that this one's links lead to lead back to it?
    #[cold]
    pub(crate) fn agrees(&self, map: &MemMap, slab: &Slab) -> bool {
        let back = |at: Pfn, link: fn(&Buddy) -> Pfn| {
            let found = map.region(at).and_then(|_| map.slab_behind(at.phys()));
            found.is_some_and(|(other, offset)| {
                offset == 0
                    && core::ptr::eq(other.cache_ptr(), slab.cache_ptr())
                    && other.list() == slab.list()
                    && link(other.links()) == slab.pfn()
            })
        };
        let Some(list) = self.by_share.get(slab.list().index()) else {
            return false;
        };
        let (next, prev) = (slab.links().next(), slab.links().prev());
        let left = if prev == Pfn::NONE {
            list.head == slab.pfn()
        } else {
            back(prev, Buddy::next)
        };
        left && (next == Pfn::NONE || back(next, Buddy::prev))
    }

    /// Forgets a list whose links are broken; [`Mm::validate`](crate::Mm::validate) finds the slabs again.
    #[cold]
    pub(crate) fn drop_list(&mut self, map: &MemMap, at: usize, pfn: Pfn, flaw: Flaw) {
        map.checks.note(pfn, flaw);
        self.by_share[at] = SlabHead {
            head: Pfn::NONE,
            nr: 0,
        };
    }

    /// Takes a slab out of its list.
    pub(crate) fn remove(&mut self, map: &MemMap, slab: &Slab) {
        if map.checks.on() && !self.agrees(map, slab) {
            let at = slab.list().index().min(SlabList::COUNT - 1);
            self.drop_list(map, at, slab.pfn(), Flaw::Links);
            return slab.set_list(SlabList::NONE);
        }
        let (next, prev) = (slab.links().next(), slab.links().prev());
        if next != Pfn::NONE {
            slab_of(map, next).links().set_prev(prev);
        }
        let head = &mut self.by_share[slab.list().index()];
        head.nr -= 1;
        if prev == Pfn::NONE {
            head.head = next;
        } else {
            slab_of(map, prev).links().set_next(next);
        }
        slab.set_list(SlabList::NONE);
    }
}

/// The slab whose first page this is.
pub(crate) fn slab_of(map: &MemMap, head: Pfn) -> &Slab {
    map.slab_at(map.word(head).load_owned().desc())
}

/// A cache, as it lies in memory.
#[repr(C, align(64))]
pub(crate) struct CacheCore {
    pub(crate) sheaves: Sheaves,
    pub(crate) geometry: Geometry,
    /// For slabs of a smaller order, when the wanted one cannot be had.
    pub(crate) smallest: Geometry,
    pub(crate) flags: CacheFlags,
    /// Added to the caller's for the slab's pages.
    pub(crate) gfp: Flags,
    pub(crate) role: Role,
    pub(crate) ctor: Option<fn(NonNull<u8>)>,
    /// Which memory manager it belongs to.
    pub(crate) owner: usize,
    pub(crate) lists: SpinLock<Lists>,
    /// Of descriptors: not 0 if much of the slabs is free, and what lies in the emptier half of them had better move. Written by the
    /// periodic work.
    pub(crate) sparse: AtomicU32,
    /// Slabs from reserves: as long as there are any, who frees an object looks whether it is from one. Changed under the list lock.
    pub(crate) reserved: AtomicU32,
    /// Reserves made for this cache: it cannot be destroyed before them.
    pub(crate) reserves: AtomicU32,
    /// The next in the list of all caches; guarded by that list's lock.
    pub(crate) next: AtomicPtr<CacheCore>,

    name: [u8; NAME_LEN],
    name_len: u8,
}

impl CacheCore {
    #[expect(
        clippy::too_many_arguments,
        reason = "all of them differ per cache, and it is made in two places"
    )]
    pub(crate) fn new(
        name: &str,
        geometry: Geometry,
        flags: CacheFlags,
        gfp: Flags,
        role: Role,
        ctor: Option<fn(NonNull<u8>)>,
        sheaves: Sheaves,
        owner: usize,
    ) -> CacheCore {
        let mut bytes = [0; NAME_LEN];
        let mut len = name.len().min(NAME_LEN);
        while !name.is_char_boundary(len) {
            len -= 1;
        }
        bytes[..len].copy_from_slice(&name.as_bytes()[..len]);
        CacheCore {
            sheaves,
            geometry,
            smallest: geometry.smallest(),
            flags,
            gfp,
            role,
            ctor,
            owner,
            lists: SpinLock::new(Lists {
                by_share: [SlabHead {
                    head: Pfn::NONE,
                    nr: 0,
                }; SlabList::COUNT],
                nr_empty: 0,
                inuse: 0,
                objects: 0,
                pages: 0,
                bitmap_bytes: 0,
            }),
            sparse: AtomicU32::new(0),
            reserved: AtomicU32::new(0),
            reserves: AtomicU32::new(0),
            next: AtomicPtr::new(core::ptr::null_mut()),

            name: bytes,
            name_len: len as u8,
        }
    }

    pub(crate) fn name(&self) -> &str {
        core::str::from_utf8(&self.name[..self.name_len as usize]).unwrap_or("?")
    }

    /// Where things are in this slab; of a guarded one only how much there is.
    #[inline]
    pub(crate) fn geometry_of(&self, slab: &Slab) -> &Geometry {
        if slab.is_guarded() {
            return const { &Geometry::GUARDED };
        }
        self.geometry_at(slab.order())
    }

    /// Where an object is in this slab, from its start.
    pub(crate) fn offset_in(&self, slab: &Slab, index: usize) -> usize {
        if slab.is_guarded() {
            return slab.guarded_at();
        }
        self.geometry_at(slab.order()).offset(index)
    }

    /// Which object of this slab starts at this offset.
    #[inline]
    pub(crate) fn index_in(&self, slab: &Slab, offset: usize) -> Option<usize> {
        if slab.is_guarded() {
            return (offset == slab.guarded_at()).then_some(0);
        }
        self.geometry_at(slab.order()).index(offset)
    }

    /// Where things are in a slab of this order, which is the wanted one or the smallest.
    #[inline]
    pub(crate) fn geometry_at(&self, order: usize) -> &Geometry {
        if order == self.geometry.order as usize {
            &self.geometry
        } else {
            &self.smallest
        }
    }

    /// Does it check its objects?
    #[inline]
    pub(crate) fn is_debug(&self) -> bool {
        self.flags.intersects(CacheFlags::DEBUG)
    }

    /// Do its slabs go back only after a grace period?
    pub(crate) fn is_type_stable(&self) -> bool {
        self.is_metadata() || self.flags.contains(CacheFlags::TYPESAFE_BY_RCU)
    }

    /// Do its slabs hold descriptors, not users' objects?
    pub(crate) fn is_metadata(&self) -> bool {
        self.role != Role::Objects
    }
}

impl fmt::Debug for CacheCore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CacheCore")
            .field("name", &self.name())
            .field("geometry", &self.geometry)
            .finish_non_exhaustive()
    }
}

/// A handle to a cache of the memory manager that `'m` borrows. Dropping it leaves the cache as it is; give it to
/// [`kmem_cache_destroy`](crate::Mm::kmem_cache_destroy) to take it down.
#[derive(Debug)]
pub struct Cache<'m> {
    pub(crate) core: NonNull<CacheCore>,
    /// The cache lies in the memory manager's memory.
    pub(crate) _mm: PhantomData<&'m CacheCore>,
}

// SAFETY: a `CacheCore` is shared between CPUs by design; all of it is atomics, locks and constants.
unsafe impl Send for Cache<'_> {}
// SAFETY: the same.
unsafe impl Sync for Cache<'_> {}

impl Cache<'_> {
    #[inline]
    pub(crate) fn core(&self) -> &CacheCore {
        // SAFETY: the handle is made with the cache, and destroying the cache consumes it.
        unsafe { self.core.as_ref() }
    }

    /// The cache's name.
    pub fn name(&self) -> &str {
        self.core().name()
    }

    /// Bytes of an object as asked for.
    pub fn object_size(&self) -> usize {
        self.core().geometry.object_size as usize
    }
}

/// A row of the slabinfo view.
#[derive(Clone, Copy, Debug)]
pub struct CacheView<'a> {
    /// The cache's name.
    pub name: &'a str,
    /// Objects users have.
    pub active_objs: u64,
    /// Objects in all slabs.
    pub num_objs: u64,
    /// Bytes asked for.
    pub object_size: usize,
    /// Bytes from one object to the next.
    pub size: usize,
    /// Objects in a slab.
    pub objs_per_slab: usize,
    /// Pages in a slab.
    pub pages_per_slab: usize,
    /// Slabs.
    pub num_slabs: u64,
    /// Slabs with an object handed out.
    pub active_slabs: u64,
    /// Pages of all slabs.
    pub pages: u64,
    /// Objects in the CPUs' sheaves.
    pub in_sheaves: u64,
    /// Holds descriptors of the memory manager itself.
    pub metadata: bool,
}

/// A cache that could not be destroyed: objects are live. The handle comes back.
#[derive(Debug)]
pub struct DestroyError<'m> {
    /// The cache; it stays usable.
    pub cache: Cache<'m>,
    /// How many objects are live.
    pub live: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn geometry_of_common_sizes() {
        for (size, align) in [
            (8, 8),
            (16, 8),
            (32, 16),
            (64, 16),
            (96, 8),
            (104, 8),
            (192, 8),
            (1128, 8),
            (4096, 8),
            (8192, 8),
        ] {
            for flags in [
                CacheFlags::EMPTY,
                CacheFlags::DEBUG,
                CacheFlags::HWCACHE_ALIGN,
            ] {
                let g = Geometry::new(size, align, flags, false).unwrap();
                let bytes = PAGE_SIZE << g.order;
                assert!(
                    g.objects >= 1 && g.offset(g.objects as usize - 1) + size <= bytes,
                    "{size} {g:?}"
                );
                assert!(g.first as usize >= Slab::bitmap_bytes(g.objects as usize));
                for i in 0..g.objects as usize {
                    assert_eq!(g.index(g.offset(i)), Some(i), "{size} {g:?}");
                    assert_eq!(g.offset(i) % align, 0, "{size} {flags:?}");
                    assert_eq!(g.index(g.offset(i) + 1), None);
                }
                assert_eq!(g.index(g.offset(g.objects as usize)), None);
            }
        }
        let single = |size, align| {
            Geometry::new(size, align, CacheFlags::SINGLE_PAGES, false)
                .unwrap()
                .objects
        };
        assert_eq!(single(8, 8), 504);
        assert_eq!(single(48, 16), 85);
        assert_eq!(
            Geometry::new(32, 16, CacheFlags::EMPTY, false)
                .unwrap()
                .objects,
            128
        );
        assert!(Geometry::new(0, 8, CacheFlags::EMPTY, false).is_none());
        assert!(Geometry::new(8 << 20, 8, CacheFlags::EMPTY, false).is_none());
        assert!(Geometry::new(usize::MAX, 8, CacheFlags::HWCACHE_ALIGN, false).is_none());
    }
}
