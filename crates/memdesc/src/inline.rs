//! What a page is for that has no descriptor: the facts that its word holds itself.
//!
//! | facts | bits 47..7 | bits 6..0 |
//! |---|---|---|
//! | [`Reserved`] | 0 | which |
//! | [`Offline`] | of a balloon: the next block's page number | which |
//! | [`Poisoned`] | of a guard: the `struct buddy` that it keeps, in units of 8 bytes; of a bad page: is it in a range that is off line? | which |
//!
//! Source: `PG_reserved`, `PageOffline`, `PageGuard` and `PG_hwpoison` of Linux, which are bits and types of a `struct page`; `memblock_reserve`.

use crate::address::{MAX_ORDER, Pfn, PhysAddr};
use crate::compaction::Obstacle;
use crate::memmap::heads::blocks;
use crate::memmap::{DescClass, PageType, Word};
use crate::mm::Mm;
use crate::platform::Platform;

const WHAT_BITS: u32 = 7;
const WHAT_MASK: u64 = (1 << WHAT_BITS) - 1;

/// What reserved memory is for.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u64)]
pub enum Reserved {
    /// Firmware, and whatever else was taken before the allocator came up.
    Other = 0,
    /// The memory map and the allocator's own tables.
    MemMap = 1,
    /// The kernel's text.
    KernelText = 2,
    /// The kernel's data.
    KernelData = 3,
}

impl Reserved {
    /// The name in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Reserved::Other => "reserved",
            Reserved::MemMap => "memory_map",
            Reserved::KernelText => "kernel_text",
            Reserved::KernelData => "kernel_data",
        }
    }
}

/// Why memory is offline.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u64)]
pub enum Offline {
    /// Taken off line ([`Mm::offline_pages`]).
    Hotplug = 0,
    /// On its way back on line.
    Claimed = 1,
    /// Given to the hypervisor by a [`Balloon`](crate::Balloon).
    Balloon = 2,
}

impl Offline {
    /// The name in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Offline::Hotplug | Offline::Claimed => "offline",
            Offline::Balloon => "balloon",
        }
    }
}

/// Why memory may not be touched.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u64)]
pub enum Poisoned {
    /// It is broken ([`Mm::memory_failure`]).
    HwPoison = 0,
    /// It is a guard ([`Mm::guard_pages`]).
    Guard = 1,
}

impl Poisoned {
    /// The name in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Poisoned::HwPoison => "hwpoison",
            Poisoned::Guard => "guard",
        }
    }
}

/// The facts of an inline word.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Facts {
    Reserved(Reserved),
    Offline(Offline),
    Poisoned(Poisoned),
}

impl Facts {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Facts::Reserved(what) => what.name(),
            Facts::Offline(what) => what.name(),
            Facts::Poisoned(what) => what.name(),
        }
    }
}

impl Word {
    /// What a word without a descriptor says; `None` for all others.
    pub(crate) const fn inline_facts(self) -> Option<Facts> {
        let what = self.facts() & WHAT_MASK;
        Some(match self.kind() {
            PageType::Reserved => Facts::Reserved(match what {
                1 => Reserved::MemMap,
                2 => Reserved::KernelText,
                3 => Reserved::KernelData,
                _ => Reserved::Other,
            }),
            PageType::Offline => Facts::Offline(match what {
                0 => Offline::Hotplug,
                1 => Offline::Claimed,
                _ => Offline::Balloon,
            }),
            PageType::Poisoned => Facts::Poisoned(match what {
                0 => Poisoned::HwPoison,
                _ => Poisoned::Guard,
            }),
            _ => return None,
        })
    }

    /// Bad memory?
    pub(crate) const fn is_hwpoison(self) -> bool {
        matches!(
            self.inline_facts(),
            Some(Facts::Poisoned(Poisoned::HwPoison))
        )
    }

    /// The word of bad memory.
    pub(crate) const fn hwpoison(order: usize) -> Word {
        Word::inline(PageType::Poisoned, order, Poisoned::HwPoison as u64)
    }

    /// The word of a bad page in a range that is off line: nobody may have it when it is good again.
    pub(crate) const fn hwpoison_offline() -> Word {
        let facts = 1 << WHAT_BITS | Poisoned::HwPoison as u64;
        Word::inline(PageType::Poisoned, 0, facts)
    }

    /// Of a bad page: is the range that it is in off line?
    pub(crate) const fn is_hwpoison_offline(self) -> bool {
        self.is_hwpoison() && self.facts() >> WHAT_BITS != 0
    }

    /// The word of a block in a balloon, before `next` in its list.
    pub(crate) const fn balloon(order: usize, next: Pfn) -> Word {
        let facts = (next.0 as u64) << WHAT_BITS | Offline::Balloon as u64;
        Word::inline(PageType::Offline, order, facts)
    }

    /// Of a balloon's block: the next in its list.
    pub(crate) const fn balloon_next(self) -> Pfn {
        Pfn((self.facts() >> WHAT_BITS) as u32)
    }

    /// The word of a guard that keeps a `struct buddy`, to be had back without one being allocated.
    pub(crate) const fn guard(order: usize, buddy: PhysAddr) -> Word {
        let facts = buddy.0 >> 3 << WHAT_BITS | Poisoned::Guard as u64;
        Word::inline(PageType::Poisoned, order, facts)
    }

    /// Of a guard: its `struct buddy`.
    pub(crate) const fn guard_buddy(self) -> PhysAddr {
        PhysAddr(self.facts() >> WHAT_BITS << 3)
    }
}

impl<P: Platform> Mm<P> {
    /// Keeps a range for good, for the kernel itself: text, data, firmware (`memblock_reserve`). At boot, before anybody had anything; or later, if all of
    /// it is free, or was offline and came back. No descriptor is left behind.
    ///
    /// # Context
    ///
    /// May wait for other CPUs. Pages that were never handed out are made into free blocks up to the range, so at boot reserve from low to high.
    ///
    /// # Errors
    ///
    /// The first page that is not free, or for which there was no descriptor. The range is as it was then.
    ///
    /// # Examples
    ///
    /// ```
    /// use memdesc::{CensusKind, Config, Memory, Mm, Pfn, Reserved};
    /// use memdesc_host::Host;
    ///
    /// let (host, ram) = Host::small(16384)?;
    /// let mm = Mm::new(host, &Config::default(), &ram)?;
    /// mm.reserve_pages(Pfn(256), 1000, Reserved::KernelText)?;
    /// assert!(matches!(mm.lookup(Pfn(700)).2, Memory::Reserved(Reserved::KernelText)));
    /// assert_eq!(mm.census().of(CensusKind::KernelText).pages, 1000);
    /// assert!(mm.reserve_pages(Pfn(1000), 1000, Reserved::KernelData).is_err(), "256 of them are text");
    /// assert!(mm.ledger().balanced);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn reserve_pages(&self, start: Pfn, pages: u32, what: Reserved) -> Result<(), Obstacle> {
        let obstacle = |pfn: Pfn| Obstacle {
            pfn,
            kind: self
                .pages
                .map
                .lookup(pfn)
                .map_or(PageType::None, |f| f.word.kind()),
            movable: false,
        };
        let end = start.0.checked_add(pages).ok_or(obstacle(start))?;
        // All of them bare first: the caller's, whatever comes.
        let mut at = start.0;
        while at < end {
            match self.take_free_at(Pfn(at), end) {
                Some(order) => at += 1 << order,
                None => {
                    let why = obstacle(Pfn(at));
                    let mut taken = start.0;
                    while taken < at {
                        let order = self.order_of(Pfn(taken));
                        // SAFETY: bare pages that we took just now.
                        unsafe { self.free_pages(Pfn(taken)) };
                        taken += 1 << order;
                    }
                    return Err(why);
                }
            }
        }
        let mut at = start.0;
        while at < end {
            let order = self.order_of(Pfn(at));
            self.bare_to_inline(
                Pfn(at),
                Word::inline(PageType::Reserved, order, what as u64),
            );
            at += 1 << order;
        }
        Ok(())
    }

    /// Takes the largest free block that starts here and ends by `end`; says of which order.
    fn take_free_at(&self, at: Pfn, end: u32) -> Option<usize> {
        for drained in [false, true] {
            if drained {
                self.drain_all();
            }
            let (_, most) = blocks(at.0, end).next()?;
            let got = (0..=most.min(MAX_ORDER))
                .rev()
                .find(|&order| self.alloc_pages_at(at, order).is_ok());
            if got.is_some() {
                return got;
            }
        }
        None
    }

    /// Bare pages of the caller's are for something from now on that needs no descriptor: theirs goes back.
    pub(crate) fn bare_to_inline(&self, pfn: Pfn, new: Word) {
        let old = self.pages.map.word(pfn).load_owned();
        debug_assert!(old.kind() == PageType::Bare && old.order() == new.order());
        let old = self.pages.uncharge_block(pfn, old);
        self.count_retyped(PageType::Bare, new.kind(), new.order());
        self.pages.map.publish_block(pfn, new);
        self.put_desc(old.desc());
    }

    /// And back: bare pages of the caller's under this `struct buddy`.
    pub(crate) fn inline_to_bare(&self, pfn: Pfn, buddy: PhysAddr) {
        let old = self.pages.map.word(pfn).load_owned();
        let order = old.order();
        self.count_retyped(old.kind(), PageType::Bare, order);
        let new = Word::described(PageType::Bare, order, buddy, DescClass::Buddy);
        self.pages.map.publish_block(pfn, new);
    }

    pub(crate) fn count_retyped(&self, from: PageType, to: PageType, order: usize) {
        let pin = self.pages.pin();
        self.pages.stats(&pin).block_retyped(&pin, from, to, order);
    }

    /// Says of bare pages that they are the kernel's own for good: [`reserve_pages`](Self::reserve_pages) for pages that one has already. Those from a [reserve](crate::reserve)
    /// stay what they are.
    ///
    /// # Safety
    ///
    /// `pfn` is the head of bare pages that the caller owns, and never frees.
    pub unsafe fn mark_reserved(&self, pfn: Pfn) {
        let word = self.pages.map.word(pfn).load_owned();
        if word.kind() == PageType::Bare && !word.is_reserve() {
            let facts = Reserved::Other as u64;
            self.bare_to_inline(pfn, Word::inline(PageType::Reserved, word.order(), facts));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn facts_go_round() {
        for what in [
            Reserved::Other,
            Reserved::MemMap,
            Reserved::KernelText,
            Reserved::KernelData,
        ] {
            let word = Word::inline(PageType::Reserved, 3, what as u64);
            assert_eq!(word.inline_facts(), Some(Facts::Reserved(what)));
        }
        for next in [Pfn(0), Pfn(77), Pfn(u32::MAX - 1), Pfn::NONE] {
            let word = Word::balloon(9, next);
            assert_eq!(word.inline_facts(), Some(Facts::Offline(Offline::Balloon)));
            assert_eq!((word.order(), word.balloon_next()), (9, next));
        }
        for buddy in [8, 0x1008, (1 << 44) - 8] {
            let word = Word::guard(0, PhysAddr(buddy));
            assert_eq!(word.inline_facts(), Some(Facts::Poisoned(Poisoned::Guard)));
            assert_eq!(word.guard_buddy().0, buddy);
        }
        assert!(Word::hwpoison(4).is_hwpoison() && !Word::guard(4, PhysAddr(8)).is_hwpoison());
        assert_eq!(Word::ZERO.inline_facts(), None);
    }
}
