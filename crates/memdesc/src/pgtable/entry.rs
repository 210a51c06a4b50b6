//! A page table entry, in the format of x86-64.
//!
//! Where the bits are is the machine's; what the software bits and the entries that are not present mean is ours:
//!
//! | P | what | bits |
//! |---|---|---|
//! | 1 | a table, a page of 4 KiB, or with PS one of 2 MiB | the machine's |
//! | 1 | *special*: a page that is no folio, and not counted | the machine's, and bit 10 |
//! | 0 | nothing | 0 |
//! | 0 | *migration*: the page is being moved; whoever needs it waits for the folio's lock | bit 9, the rights as they were, the page frame number |
//! | 0 | *hwpoison*: the page was broken, and what it held is lost | bit 11, the page frame number |
//! | 0 | *splitting*: 2 MiB are about to be mapped by pages; whoever needs them waits for the table's lock | PS, the rest as it was |

use crate::address::{Pfn, PhysAddr};
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::seq_cst;

/// What an entry allows, and what the machine noted in it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(transparent)]
pub struct Prot(u64);

impl Prot {
    /// Nothing but reading, by the kernel.
    pub const READ: Prot = Prot(0);
    /// May be written.
    pub const WRITE: Prot = Prot(1 << 1);
    /// Users may.
    pub const USER: Prot = Prot(1 << 2);
    /// Was used. Set by the machine.
    pub const ACCESSED: Prot = Prot(1 << 5);
    /// Was written. Set by the machine.
    pub const DIRTY: Prot = Prot(1 << 6);
    /// The same in all address spaces.
    pub const GLOBAL: Prot = Prot(1 << 8);
    /// May not be executed.
    pub const NO_EXECUTE: Prot = Prot(1 << 63);

    const MASK: u64 = Prot::WRITE.0
        | Prot::USER.0
        | Prot::ACCESSED.0
        | Prot::DIRTY.0
        | Prot::GLOBAL.0
        | Prot::NO_EXECUTE.0;

    /// All of both.
    #[must_use]
    pub const fn with(self, other: Prot) -> Prot {
        Prot(self.0 | other.0)
    }

    /// Without these.
    #[must_use]
    pub const fn without(self, other: Prot) -> Prot {
        Prot(self.0 & !other.0)
    }

    /// Are all of these in it?
    pub const fn contains(self, other: Prot) -> bool {
        self.0 & other.0 == other.0
    }

    /// As bits of an x86-64 entry.
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// From bits of an x86-64 entry; others are dropped.
    pub const fn from_bits(bits: u64) -> Prot {
        Prot(bits & Prot::MASK)
    }
}

const PRESENT: u64 = 1 << 0;
const HUGE: u64 = 1 << 7;
const MIGRATION: u64 = 1 << 9;
const SPECIAL: u64 = 1 << 10;
const HWPOISON: u64 = 1 << 11;
const FRAME: u64 = 0x000f_ffff_ffff_f000;
const RIGHTS: u64 = Prot::WRITE.0 | Prot::USER.0 | Prot::NO_EXECUTE.0;

/// An entry, as a value.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
#[repr(transparent)]
pub struct Entry(pub(super) u64);

impl Entry {
    /// Nothing is there.
    pub const NONE: Entry = Entry(0);

    /// Leads to a page; `huge` on the second level: one of 2 MiB.
    pub const fn leaf(pfn: Pfn, huge: bool, prot: Prot) -> Entry {
        Entry(pfn.phys().0 | PRESENT | if huge { HUGE } else { 0 } | prot.0)
    }

    /// Leads to a table. What may be done is said by the leaves.
    pub const fn table(pfn: Pfn) -> Entry {
        Entry(pfn.phys().0 | PRESENT | Prot::WRITE.0 | Prot::USER.0)
    }

    /// The page is being moved; the same may be done with it afterwards as before.
    pub const fn migration(pfn: Pfn, prot: Prot) -> Entry {
        Entry(pfn.phys().0 | MIGRATION | prot.0 & RIGHTS)
    }

    /// The page that was here is broken.
    pub const fn hwpoison(pfn: Pfn) -> Entry {
        Entry(pfn.phys().0 | HWPOISON)
    }

    /// Was a page here that is broken?
    pub const fn is_hwpoison(self) -> bool {
        self.0 & (PRESENT | HWPOISON) == HWPOISON
    }

    /// With what an area gives but the right to write, which only a fault that writes may give.
    pub(crate) const fn granting(self, area: Prot) -> Entry {
        Entry((self.0 | area.0 & Prot::USER.0) & !(Prot::NO_EXECUTE.0 & !area.0))
    }

    /// Leads to a page that is no folio.
    pub const fn special(pfn: Pfn, prot: Prot) -> Entry {
        Entry(pfn.phys().0 | PRESENT | SPECIAL | prot.0)
    }

    /// Does it lead to a page that is not counted?
    pub const fn is_special(self) -> bool {
        self.0 & (PRESENT | SPECIAL) == PRESENT | SPECIAL
    }

    /// What an entry of 2 MiB is while it is being split: gone for the machine, but not for those who look whether something is mapped.
    pub(crate) const fn splitting(self) -> Entry {
        Entry(self.0 & !PRESENT)
    }

    /// Is it being split?
    pub(crate) const fn is_splitting(self) -> bool {
        self.0 & (PRESENT | MIGRATION | HUGE) == HUGE
    }

    /// Is nothing there?
    pub const fn is_none(self) -> bool {
        self.0 == 0
    }

    /// Does it lead somewhere?
    pub const fn is_present(self) -> bool {
        self.0 & PRESENT != 0
    }

    /// Does it lead to a page of 2 MiB?
    pub const fn is_huge(self) -> bool {
        self.0 & (PRESENT | HUGE) == PRESENT | HUGE
    }

    /// Is the page being moved?
    pub const fn is_migration(self) -> bool {
        self.0 & (PRESENT | MIGRATION) == MIGRATION
    }

    /// The page or table, present or on the move.
    pub const fn pfn(self) -> Pfn {
        Pfn::containing(PhysAddr(self.0 & FRAME))
    }

    /// What is allowed.
    pub const fn prot(self) -> Prot {
        Prot::from_bits(self.0)
    }

    /// Without what the machine notes at any time: for telling whether it still is what it was.
    pub(crate) const fn without_notes(self) -> u64 {
        self.0 & !(Prot::ACCESSED.0 | Prot::DIRTY.0)
    }

    /// The bits.
    pub const fn bits(self) -> u64 {
        self.0
    }
}

impl core::fmt::Debug for Entry {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        if self.is_none() {
            return f.write_str("none");
        }
        let what = match (self.is_migration(), self.is_huge()) {
            _ if self.is_hwpoison() => "hwpoison",
            (true, _) => "migration",
            (_, true) => "huge",
            _ => "present",
        };
        write!(f, "{what} {:?} {:#x}", self.pfn(), self.prot().0)
    }
}

/// An entry in its table. The machine sets ACCESSED and DIRTY at any time, so all who change one do so by atomic instructions, under the
/// table's lock.
#[derive(Debug)]
#[repr(transparent)]
pub(crate) struct AtomicEntry(AtomicU64);

impl AtomicEntry {
    #[cfg(loom)]
    pub(crate) fn new(entry: Entry) -> AtomicEntry {
        AtomicEntry(AtomicU64::new(entry.0))
    }

    /// Planted bug for the model checker: takes rights away without an order that the look at the pins is part of.
    #[cfg(loom)]
    pub(crate) fn clear_acq_rel(&self, prot: Prot) -> Entry {
        Entry(self.0.fetch_and(!prot.0, Ordering::AcqRel))
    }

    /// Reads it. Acquire pairs with the Release of who stored it: what it leads to is ready.
    #[inline]
    pub(crate) fn load(&self) -> Entry {
        Entry(self.0.load(Ordering::Acquire))
    }

    /// Is it still what the caller saw before he guessed, but for what the machine notes? SeqCst pairs with [`clear`](Self::clear), see
    /// `Counts::may_be_pinned`.
    #[inline]
    pub(crate) fn is_still(&self, seen: Entry) -> bool {
        seq_cst::reading();
        Entry(self.0.load(Ordering::SeqCst)).without_notes() == seen.without_notes()
    }

    #[inline]
    pub(crate) fn store(&self, entry: Entry) {
        self.0.store(entry.0, Ordering::Release);
    }

    /// Puts another in its place; what the machine noted up to then comes with the old one (`ptep_get_and_clear`).
    #[inline]
    pub(crate) fn replace(&self, entry: Entry) -> Entry {
        let old = self.0.swap(entry.0, Ordering::SeqCst);
        seq_cst::written();
        Entry(old)
    }

    /// Takes rights or notes away; says what it was.
    #[inline]
    pub(crate) fn clear(&self, prot: Prot) -> Entry {
        let old = self.0.fetch_and(!prot.0, Ordering::SeqCst);
        seq_cst::written();
        Entry(old)
    }

    /// Takes away the right to write, and what else the area does not give; says what it was.
    #[inline]
    pub(crate) fn restrict(&self, area: Prot) -> Entry {
        let no_execute = area.0 & Prot::NO_EXECUTE.0;
        let taken = Prot::WRITE.0 | Prot::USER.0 & !area.0;
        let less = |old: u64| Some(old & !taken | no_execute);
        match self
            .0
            .fetch_update(Ordering::SeqCst, Ordering::Relaxed, less)
        {
            Ok(old) | Err(old) => Entry(old),
        }
    }

    /// Gives back rights that were taken away under the same hold of the table's lock, so that only notes can have been added.
    #[inline]
    pub(crate) fn add(&self, prot: Prot) {
        self.0.fetch_or(prot.0, Ordering::Release);
    }

    /// Puts another in its place, if it still is what the caller saw.
    #[inline]
    pub(crate) fn swap_if(&self, seen: Entry, new: Entry) -> bool {
        self.0
            .compare_exchange(seen.0, new.0, Ordering::AcqRel, Ordering::Relaxed)
            .is_ok()
    }

    /// Adds rights or notes, if it still is what the caller saw.
    #[inline]
    pub(crate) fn add_if(&self, seen: Entry, prot: Prot) -> bool {
        self.swap_if(seen, Entry(seen.0 | prot.0))
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn kinds_tell_apart() {
        let rw = Prot::WRITE.with(Prot::USER);
        let page = Entry::leaf(Pfn(5), false, rw);
        assert!(page.is_present() && !page.is_huge() && !page.is_migration());
        assert_eq!((page.pfn(), page.prot()), (Pfn(5), rw));
        let huge = Entry::leaf(Pfn(512), true, rw);
        assert!(huge.is_huge() && huge.pfn() == Pfn(512));
        let moving = Entry::migration(Pfn(u32::MAX), rw.with(Prot::DIRTY));
        assert!(moving.is_migration() && !moving.is_present() && !moving.is_huge());
        assert_eq!((moving.pfn(), moving.prot()), (Pfn(u32::MAX), rw));
        assert!(Entry::NONE.is_none() && !Entry::NONE.is_migration());
        let bad = Entry::hwpoison(Pfn(u32::MAX));
        assert!(bad.is_hwpoison() && !bad.is_none() && !bad.is_present() && !bad.is_migration());
        assert!(!bad.is_splitting() && !bad.is_special() && bad.pfn() == Pfn(u32::MAX));
        for other in [page, huge, moving, huge.splitting(), Entry::NONE] {
            assert!(!other.is_hwpoison(), "{other:?}");
        }
        let split = huge.splitting();
        assert!(split.is_splitting() && !split.is_none() && !split.is_present());
        assert!(!split.is_huge() && !split.is_migration() && split.prot() == rw);
        assert!(!huge.is_splitting() && !moving.is_splitting() && !Entry::NONE.is_splitting());
    }
}
