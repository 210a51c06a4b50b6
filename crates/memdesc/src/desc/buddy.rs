//! `struct buddy`: what describes a free block, in 8 bytes.
//!
//! Seed 000's has flags, a list head, the order and a page pointer: 40 bytes. Here order, list and state are in the
//! word, the page is where the word was found, and the two links are 32-bit page frame numbers, so nothing else is
//! left. That is what makes *keep* affordable: a bare page carries its buddy with it, 16 bytes a page in all.
//!
//! The memory of a buddy that is not in use is itself a link in a [`DescList`].

use crate::address::{Pfn, PhysAddr};
use crate::memmap::{MemMap, Word};
use crate::sync::atomic::{AtomicU32, Ordering};

/// The links of a free block, and the first 8 bytes of every descriptor.
///
/// # Invariants
///
/// While the block is in a zone's free list: both neighbours, under the zone lock. In a per-CPU list: `next`
/// only, under that CPU's lock. While pages are handed out: the owner's, but for `prev` of pages that are charged.
#[derive(Debug)]
#[repr(C, align(8))]
pub(crate) struct Buddy {
    next: AtomicU32,
    prev: AtomicU32,
}

const _: () = assert!(size_of::<Buddy>() == 8);

impl Buddy {
    #[inline]
    pub(crate) fn next(&self) -> Pfn {
        Pfn(self.next.load(Ordering::Relaxed))
    }

    #[inline]
    pub(crate) fn prev(&self) -> Pfn {
        Pfn(self.prev.load(Ordering::Relaxed))
    }

    #[inline]
    pub(crate) fn set_next(&self, pfn: Pfn) {
        self.next.store(pfn.0, Ordering::Relaxed);
    }

    #[inline]
    pub(crate) fn set_prev(&self, pfn: Pfn) {
        self.prev.store(pfn.0, Ordering::Relaxed);
    }

    /// The address that the 8 bytes hold while they are not links.
    #[inline]
    pub(crate) fn address(&self) -> PhysAddr {
        let low = u64::from(self.next.load(Ordering::Relaxed));
        let high = u64::from(self.prev.load(Ordering::Relaxed));
        PhysAddr((high << 32 | low) << 3)
    }

    /// Whom the pages are charged to, if their word says that they are. It lies where links are backward ones, which nothing has that is handed
    /// out: what waits for a grace period is linked forward only.
    #[inline]
    pub(crate) fn memcg(&self) -> u16 {
        self.prev.load(Ordering::Relaxed) as u16
    }

    #[inline]
    pub(crate) fn set_memcg(&self, memcg: u16) {
        self.prev.store(u32::from(memcg), Ordering::Relaxed);
    }

    /// Has them hold an address, of something 8-byte aligned.
    #[inline]
    pub(crate) fn set_address(&self, at: PhysAddr) {
        self.next.store((at.0 >> 3) as u32, Ordering::Relaxed);
        self.prev.store((at.0 >> 35) as u32, Ordering::Relaxed);
    }
}

/// The ends of a list of blocks, linked through their descriptors by page frame number.
///
/// # Invariants
///
/// Both ends are [`Pfn::NONE`], or each block between them has its neighbours in its links. Under the lock of whoever has the list.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PfnList {
    pub(crate) head: Pfn,
    pub(crate) tail: Pfn,
}

impl PfnList {
    pub(crate) const EMPTY: PfnList = PfnList {
        head: Pfn::NONE,
        tail: Pfn::NONE,
    };

    /// Adds a block that is in no list, whose descriptor is `desc`. `point` is where a test may interrupt.
    #[inline]
    pub(crate) fn link(
        &mut self,
        map: &MemMap,
        pfn: Pfn,
        desc: PhysAddr,
        at_tail: bool,
        point: &'static str,
    ) {
        let links = map.buddy_at(desc);
        let (next, prev) = if at_tail {
            (Pfn::NONE, self.tail)
        } else {
            (self.head, Pfn::NONE)
        };
        links.set_next(next);
        links.set_prev(prev);
        crate::inject::point(point);
        if next == Pfn::NONE {
            self.tail = pfn;
        } else {
            map.buddy(next).set_prev(pfn);
        }
        if prev == Pfn::NONE {
            self.head = pfn;
        } else {
            map.buddy(prev).set_next(pfn);
        }
    }

    /// Do the blocks that this one's links lead to lead back to it (`__list_del_entry_valid`)? Nothing is read but words, and links of blocks that are
    /// free with the same order and mobility as this one's `word` says.
    #[cold]
    pub(crate) fn agrees(&self, map: &MemMap, pfn: Pfn, word: Word) -> bool {
        if !map.is_in_slab(word.desc()) {
            return false;
        }
        let links = map.buddy_at(word.desc());
        let back = |at: Pfn, link: fn(&Buddy) -> Pfn| {
            let found = map.owned_word(at);
            found.is_free_in_zone(word.order())
                && found.migratetype() == word.migratetype()
                && map.is_in_slab(found.desc())
                && link(map.buddy_at(found.desc())) == pfn
        };
        let (next, prev) = (links.next(), links.prev());
        let right = if next == Pfn::NONE {
            self.tail == pfn
        } else {
            back(next, Buddy::prev)
        };
        let left = if prev == Pfn::NONE {
            self.head == pfn
        } else {
            back(prev, Buddy::next)
        };
        right && left
    }

    /// Takes a block out.
    #[inline]
    pub(crate) fn unlink(&mut self, map: &MemMap, pfn: Pfn, desc: PhysAddr, point: &'static str) {
        let links = map.buddy_at(desc);
        let (next, prev) = (links.next(), links.prev());
        crate::inject::point(point);
        if next == Pfn::NONE {
            debug_assert_eq!(self.tail, pfn);
            self.tail = prev;
        } else {
            map.buddy(next).set_prev(prev);
        }
        if prev == Pfn::NONE {
            debug_assert_eq!(self.head, pfn);
            self.head = next;
        } else {
            map.buddy(prev).set_next(next);
        }
    }
}

impl MemMap {
    /// The links of a block, given its head.
    #[inline]
    pub(crate) fn buddy(&self, head: Pfn) -> &Buddy {
        self.buddy_at(self.word(head).load_owned().desc())
    }

    /// The links in the descriptor at this physical address.
    #[inline]
    pub(crate) fn buddy_at(&self, desc: PhysAddr) -> &Buddy {
        let ptr = self.virt(desc).cast::<Buddy>();
        debug_assert!(ptr.is_aligned() && desc.0 != 0);
        // SAFETY: `desc` is the address of a descriptor, which is at least 8 bytes in a slab page that is never given
        // back while the descriptor is in use; every bit pattern is a valid `Buddy`, and it is accessed as atomics only.
        unsafe { &*ptr }
    }
}

/// Descriptors nobody uses at the moment, chained through their own memory: what a split takes along under the zone
/// lock, and what a merge brings back. Never allocates, and has no bound.
#[derive(Debug)]
#[must_use = "descriptors would be lost"]
pub(crate) struct DescList {
    /// The first descriptor's physical address; 0 when empty (page 0 never holds descriptors).
    head: PhysAddr,
    len: u32,
}

impl DescList {
    pub(crate) const fn new() -> DescList {
        DescList {
            head: PhysAddr(0),
            len: 0,
        }
    }

    /// Its two words, to be kept elsewhere.
    pub(crate) fn into_parts(self) -> (PhysAddr, u32) {
        (self.head, self.len)
    }

    /// From what [`into_parts`](Self::into_parts) gave, once.
    pub(crate) fn from_parts(head: PhysAddr, len: u32) -> DescList {
        DescList { head, len }
    }

    #[inline]
    pub(crate) fn len(&self) -> usize {
        self.len as usize
    }

    #[inline]
    pub(crate) fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Adds a descriptor that nothing leads to any more.
    #[inline]
    pub(crate) fn push(&mut self, map: &MemMap, desc: PhysAddr) {
        map.buddy_at(desc).set_address(self.head);
        self.head = desc;
        self.len += 1;
    }

    /// Adds all of another, one by one: it is short.
    pub(crate) fn append(&mut self, map: &MemMap, mut other: DescList) {
        while let Some(desc) = other.pop(map) {
            self.push(map, desc);
        }
    }

    /// Takes one out.
    #[inline]
    pub(crate) fn pop(&mut self, map: &MemMap) -> Option<PhysAddr> {
        if self.len == 0 {
            return None;
        }
        let desc = self.head;
        self.head = map.buddy_at(desc).address();
        self.len -= 1;
        Some(desc)
    }
}
