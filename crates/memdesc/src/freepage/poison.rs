//! Poison: is what was left in free pages still there when they are handed out? If not, somebody wrote to memory that was not his.
//!
//! As in Linux (`check_poison_mem`), a page that was written is reported and handed out all the same: the write is in the past, the page is as
//! good as any, and who kept a pointer to it would have as good a chance to hit the next one. A kernel that would rather stop does so in
//! [`Platform::corruption`].

use core::panic::Location;

use crate::address::{PAGE_SIZE, Pfn};
use crate::memmap::Word;
use crate::page_alloc::alloc::PageAllocator;
use crate::platform::{Pin, Platform};
use crate::report::{Corruption, Report};
use crate::stats::Event;

/// What was done to a free page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PageDamage {
    /// The offset of the last bad byte in the page; [`Report::byte`] has the first.
    pub last: u32,
    /// How many bytes are bad.
    pub bytes: u32,
    /// One bit of one byte: failing memory rather than a stray pointer, most likely.
    pub single_bit: bool,
}

impl<P: Platform> PageAllocator<P> {
    /// Is the whole block still what it was filled with? Reports each page that is not.
    #[track_caller]
    pub(super) fn check_pages(&self, pfn: Pfn, order: usize, word: Word, pattern: u8) -> bool {
        let mut clean = true;
        for page in 0..1 << order {
            let pfn = pfn.add(page);
            if !self.holds(pfn, pattern) {
                clean = false;
                self.report_damage(pfn, word, pattern, Location::caller());
            }
        }
        clean
    }

    fn holds(&self, pfn: Pfn, pattern: u8) -> bool {
        let ptr = self.map.virt(pfn.phys()).cast::<u64>();
        let wanted = u64::from_ne_bytes([pattern; 8]);
        // By lines, so that most of the work needs no branch.
        (0..PAGE_SIZE / 64).all(|line| {
            let differ = (0..8).fold(0, |differ, i| {
                // SAFETY: in the page, which nobody has and which was filled, aligned. Volatile: a faulty user may be writing to it, which is
                // what we are looking for.
                differ | (unsafe { ptr.add(line * 8 + i).read_volatile() } ^ wanted)
            });
            differ == 0
        })
    }

    #[cold]
    #[inline(never)]
    fn report_damage(&self, pfn: Pfn, word: Word, pattern: u8, caller: &'static Location<'static>) {
        let ptr = self.map.virt(pfn.phys());
        // SAFETY: as in `holds`.
        let byte = |offset: usize| unsafe { ptr.add(offset).read_volatile() };
        let mut first = None;
        let (mut last, mut bytes) = (0, 0);
        for offset in 0..PAGE_SIZE {
            let found = byte(offset);
            if found != pattern {
                first = first.or(Some((offset as isize, found, pattern)));
                last = offset as u32;
                bytes += 1;
            }
        }
        // One who writes may have put back what was there by now.
        let single_bit = bytes == 1 && first.is_some_and(|(_, f, p)| (f ^ p).is_power_of_two());
        let damage = PageDamage {
            last,
            bytes,
            single_bit,
        };
        {
            let pin = Pin::try_new(&self.platform);
            self.any_stats(pin.as_ref()).add_any(Event::PgPoisonBad, 1);
        }
        let what = Corruption::PagePoison(damage);
        let report = self.report_plain(what, pfn, ptr.addr(), caller);
        self.platform.corruption(&Report {
            word,
            byte: first,
            ..report
        });
    }
}
