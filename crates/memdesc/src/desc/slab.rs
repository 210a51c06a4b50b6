//! `struct slab`: what is needed to hand out a slab's objects, and to give its pages back, in 48 bytes.
//!
//! Which objects are free is a bitmap here, not a list through the objects: a free object is never written, a double
//! free is one bit that is set already, and a whole refill is a few `tzcnt`. Slabs of more than 128 objects
//! keep the bitmap in the first bytes of the slab instead.

use core::fmt;
use core::ptr::NonNull;

use super::Buddy;
use crate::address::{Pfn, PhysAddr};
use crate::memmap::MemMap;
use crate::slab::CacheCore;
use crate::sync::atomic::{AtomicPtr, AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

/// Words of bitmap in the descriptor.
const BITMAP_WORDS: usize = 2;
/// Slabs of up to so many objects have their bitmap in the descriptor.
pub(crate) const BITMAP_INLINE: usize = BITMAP_WORDS * 64;

/// Which of its cache's lists a slab is in: 0 for none, else one more than the share of its objects that are handed out, in
/// [`Self::SHARES`]ths, up to full; then those of slabs from reserves.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(transparent)]
pub(crate) struct SlabList(u8);

impl SlabList {
    /// Into how many parts fullness is divided.
    pub(crate) const SHARES: usize = 8;
    /// How many lists there are: the last three are of slabs from reserves.
    pub(crate) const COUNT: usize = Self::SHARES + 4;
    /// From a reserve, and no object handed out.
    pub(crate) const RESERVE_EMPTY: SlabList = SlabList(Self::SHARES as u8 + 2);
    /// From a reserve, with free objects and with some handed out.
    pub(crate) const RESERVE_PARTIAL: SlabList = SlabList(Self::SHARES as u8 + 3);
    /// From a reserve, and full.
    pub(crate) const RESERVE_FULL: SlabList = SlabList(Self::SHARES as u8 + 4);
    /// In none: being set up, or being given back.
    pub(crate) const NONE: SlabList = SlabList(0);

    /// The list for a slab with so many objects handed out.
    #[inline]
    pub(crate) const fn of(inuse: usize, objects: usize) -> SlabList {
        SlabList((inuse * Self::SHARES / objects) as u8 + 1)
    }

    /// Its place in the table of lists.
    #[inline]
    pub(crate) const fn index(self) -> usize {
        (self.0 as usize).wrapping_sub(1)
    }
}

/// The descriptor of a slab.
///
/// # Invariants
///
/// Guarded by its cache's list lock, but for `cache`, `pfn`, `order` and `objects`, which do not change while the slab
/// lives. A set bit is a free object; `inuse + set bits == objects`.
#[repr(C, align(16))]
pub struct Slab {
    /// Neighbours in the cache's list, as page frame numbers; the free block's links afterwards.
    links: Buddy,
    cache: AtomicPtr<CacheCore>,
    pfn: AtomicU32,
    objects: AtomicU16,
    inuse: AtomicU16,
    order: AtomicU8,
    list: AtomicU8,
    /// Lies in the page that it describes (`__alloc_slab`).
    self_described: AtomicU8,
    /// 1: a page of the guarded pool, with one object, at `at` ([`kfence`](crate::slab::kfence)).
    guarded: AtomicU8,
    at: AtomicU16,
    /// The number of the [reserve](crate::reserve) that its pages are from; 0: ordinary.
    reserve: AtomicU16,
    bitmap: [AtomicU64; BITMAP_WORDS],
}

const _: () = assert!(size_of::<Slab>() == 48);

impl Slab {
    /// Sets the descriptor up: all objects free, in no list.
    pub(crate) fn init(
        &self,
        map: &MemMap,
        cache: NonNull<CacheCore>,
        pfn: Pfn,
        order: usize,
        objects: usize,
        self_described: bool,
    ) {
        self.cache.store(cache.as_ptr(), Ordering::Relaxed);
        self.pfn.store(pfn.0, Ordering::Relaxed);
        self.objects.store(objects as u16, Ordering::Relaxed);
        self.inuse.store(0, Ordering::Relaxed);
        self.order.store(order as u8, Ordering::Relaxed);
        self.list.store(SlabList::NONE.0, Ordering::Relaxed);
        self.self_described
            .store(u8::from(self_described), Ordering::Relaxed);
        self.guarded.store(0, Ordering::Relaxed);
        self.reserve.store(0, Ordering::Relaxed);
        for (i, word) in self.bitmap(map).iter().enumerate() {
            let left = objects.saturating_sub(i * 64);
            let bits = if left >= 64 {
                u64::MAX
            } else {
                (1 << left) - 1
            };
            word.store(bits, Ordering::Relaxed);
        }
    }

    /// From here on it describes a page of the guarded pool.
    pub(crate) fn set_guarded(&self) {
        self.at.store(0, Ordering::Relaxed);
        self.guarded.store(1, Ordering::Relaxed);
    }

    /// A page of the guarded pool changes its cache, and where in the page the object is. It is in no list.
    pub(crate) fn assign(&self, cache: NonNull<CacheCore>, at: usize) {
        self.at.store(at as u16, Ordering::Relaxed);
        self.cache.store(cache.as_ptr(), Ordering::Relaxed);
    }

    /// Is it a page of the guarded pool? Such a slab is never allocated from as others are, nor given back.
    #[inline]
    pub(crate) fn is_guarded(&self) -> bool {
        self.guarded.load(Ordering::Relaxed) != 0
    }

    /// Where in its page the object of a guarded slab is.
    pub(crate) fn guarded_at(&self) -> usize {
        usize::from(self.at.load(Ordering::Relaxed))
    }

    pub(crate) fn links(&self) -> &Buddy {
        &self.links
    }

    /// The address of its cache, for a look without a lock: the cache may be gone by the time it is compared.
    pub(crate) fn cache_ptr(&self) -> *const CacheCore {
        self.cache.load(Ordering::Relaxed)
    }

    pub(crate) fn cache(&self) -> NonNull<CacheCore> {
        match NonNull::new(self.cache.load(Ordering::Relaxed)) {
            Some(cache) => cache,
            None => unreachable!("a slab without a cache"),
        }
    }

    pub(crate) fn pfn(&self) -> Pfn {
        Pfn(self.pfn.load(Ordering::Relaxed))
    }

    /// The order of its pages.
    pub fn order(&self) -> usize {
        usize::from(self.order.load(Ordering::Relaxed))
    }

    /// How many objects it holds.
    pub fn objects(&self) -> usize {
        usize::from(self.objects.load(Ordering::Relaxed))
    }

    /// How many of them are handed out or in a CPU's sheaf.
    pub fn inuse(&self) -> usize {
        usize::from(self.inuse.load(Ordering::Relaxed))
    }

    /// Does it lie in the page that it describes? Such a page stays: its descriptor cannot outlive it.
    pub fn is_self_described(&self) -> bool {
        self.self_described.load(Ordering::Relaxed) != 0
    }

    /// From here on its pages are those of this reserve.
    pub(crate) fn set_reserve(&self, id: u16) {
        self.reserve.store(id, Ordering::Relaxed);
    }

    /// The number of the reserve that its pages are from; 0 if they are from none.
    #[inline]
    pub(crate) fn reserve(&self) -> u16 {
        self.reserve.load(Ordering::Relaxed)
    }

    /// The list that it belongs to.
    #[inline]
    pub(crate) fn home(&self) -> SlabList {
        let (inuse, objects) = (self.inuse(), self.objects());
        if self.reserve() == 0 {
            SlabList::of(inuse, objects)
        } else if inuse == 0 {
            SlabList::RESERVE_EMPTY
        } else if inuse < objects {
            SlabList::RESERVE_PARTIAL
        } else {
            SlabList::RESERVE_FULL
        }
    }

    pub(crate) fn list(&self) -> SlabList {
        SlabList(self.list.load(Ordering::Relaxed))
    }

    pub(crate) fn set_list(&self, list: SlabList) {
        self.list.store(list.0, Ordering::Relaxed);
    }

    fn bitmap<'a>(&'a self, map: &'a MemMap) -> &'a [AtomicU64] {
        let objects = self.objects();
        if objects <= BITMAP_INLINE {
            return &self.bitmap[..objects.div_ceil(64)];
        }
        let ptr = map.virt(self.pfn().phys()).cast::<AtomicU64>();
        // SAFETY: such a slab's cache leaves `bitmap_bytes` at the start of the slab, page aligned, for this; they are
        // only ever accessed as these atomics while the slab lives.
        unsafe { core::slice::from_raw_parts(ptr, objects.div_ceil(64)) }
    }

    /// Bytes at the start of a slab of so many objects that the bitmap takes.
    pub(crate) const fn bitmap_bytes(objects: usize) -> usize {
        if objects <= BITMAP_INLINE {
            0
        } else {
            objects.div_ceil(64) * 8
        }
    }

    /// Hands out free objects, as indices, until `want` says no more.
    pub(crate) fn take(&self, map: &MemMap, mut want: usize, mut each: impl FnMut(usize)) {
        let mut taken = 0;
        for (i, word) in self.bitmap(map).iter().enumerate() {
            let mut bits = word.load(Ordering::Relaxed);
            while bits != 0 && want > 0 {
                each(i * 64 + bits.trailing_zeros() as usize);
                bits &= bits - 1;
                taken += 1;
                want -= 1;
            }
            word.store(bits, Ordering::Relaxed);
            if want == 0 {
                break;
            }
        }
        self.inuse
            .store((self.inuse() + taken) as u16, Ordering::Relaxed);
    }

    /// Takes an object back; `false` if it is free already.
    pub(crate) fn give(&self, map: &MemMap, index: usize) -> bool {
        let word = &self.bitmap(map)[index / 64];
        let bits = word.load(Ordering::Relaxed);
        let bit = 1 << (index % 64);
        if bits & bit != 0 {
            return false;
        }
        word.store(bits | bit, Ordering::Relaxed);
        self.inuse
            .store((self.inuse() - 1) as u16, Ordering::Relaxed);
        true
    }

    /// Takes a word's worth of objects back; says how many, `None` if one is free already (the others are taken back).
    pub(crate) fn give_word(&self, map: &MemMap, word: usize, bits: u64) -> Option<usize> {
        let cell = &self.bitmap(map)[word];
        let before = cell.load(Ordering::Relaxed);
        cell.store(before | bits, Ordering::Relaxed);
        let n = (bits & !before).count_ones() as usize;
        self.inuse
            .store((self.inuse() - n) as u16, Ordering::Relaxed);
        (bits & before == 0).then_some(n)
    }

    /// How many of its objects are free, by the bitmap; and do bits stand where there are no objects?
    pub(crate) fn count_free(&self, map: &MemMap) -> (usize, bool) {
        let (mut free, mut astray) = (0, false);
        for (i, word) in self.bitmap(map).iter().enumerate() {
            let bits = word.load(Ordering::Relaxed);
            free += bits.count_ones() as usize;
            let left = self.objects() - i * 64;
            astray |= left < 64 && bits >> left != 0;
        }
        (free, astray)
    }

    /// Sets both counts right: of a slab of so many objects.
    pub(crate) fn repair(&self, map: &MemMap, objects: usize) {
        self.objects.store(objects as u16, Ordering::Relaxed);
        if let Some(last) = self.bitmap(map).last()
            && !objects.is_multiple_of(64)
        {
            let bits = last.load(Ordering::Relaxed);
            last.store(bits & ((1 << (objects % 64)) - 1), Ordering::Relaxed);
        }
        let (free, _) = self.count_free(map);
        self.inuse.store((objects - free) as u16, Ordering::Relaxed);
    }

    /// Is this object free?
    pub(crate) fn is_free(&self, map: &MemMap, index: usize) -> bool {
        self.bitmap(map)[index / 64].load(Ordering::Relaxed) >> (index % 64) & 1 != 0
    }
}

impl fmt::Debug for Slab {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Slab")
            .field("pfn", &self.pfn())
            .field("order", &self.order())
            .field("inuse", &self.inuse())
            .field("objects", &self.objects())
            .finish_non_exhaustive()
    }
}

impl MemMap {
    /// The slab descriptor at this address.
    #[inline]
    pub(crate) fn slab_at(&self, desc: PhysAddr) -> &Slab {
        let ptr = self.virt(desc).cast::<Slab>();
        debug_assert!(ptr.is_aligned() && desc.0 != 0);
        // SAFETY: `desc` comes from a word that says slab, and such words lead to 48 bytes of a slab of descriptors that
        // stay allocated as long as the word says so; all fields are atomics, every bit pattern is valid.
        unsafe { &*ptr }
    }
}
