//! Whom pages are charged to: said by their word and their descriptor, taken back when they are freed.

use super::MemcgStat;
use super::charge::Charge;
use crate::address::{PAGE_SIZE, Pfn};
use crate::error::AllocError;
use crate::gfp::{self, Flags};
use crate::memmap::{PageType, Word};
use crate::mm::Mm;
use crate::owner::FolioKind;
use crate::page_alloc::alloc::PageAllocator;
use crate::platform::Platform;

/// The number in the word of pages that are charged. (Those of the kernel's own types have their own numbers, and are never charged.)
const CHARGED: u8 = 1;

impl Word {
    /// Are the pages charged to somebody? As long as the word says so, the descriptor says to whom.
    #[inline]
    pub(crate) fn is_charged(self) -> bool {
        self.number() != 0 && self.stat().is_some()
    }

    /// For what such pages are charged; none of types that never are.
    pub(super) fn stat(self) -> Option<MemcgStat> {
        match self.kind() {
            PageType::Anon if self.is_folio() => Some(MemcgStat::Anon),
            PageType::File if self.is_folio() => Some(MemcgStat::File),
            PageType::Bare | PageType::LargeKmalloc | PageType::Driver => Some(MemcgStat::Kernel),
            PageType::PageTable => Some(MemcgStat::PageTables),
            _ => None,
        }
    }

    /// Bytes of the block.
    fn bytes(self) -> u64 {
        (PAGE_SIZE as u64) << self.order()
    }
}

impl<P: Platform> PageAllocator<P> {
    /// Whom pages are charged to; 0 for nobody. Of pages that the caller has, or that do not change.
    pub(crate) fn memcg_of(&self, word: Word) -> u16 {
        if !word.is_charged() {
            0
        } else if word.is_counted() {
            self.folio_owner(word).0
        } else {
            self.map.buddy_at(word.desc()).memcg()
        }
    }

    fn folio_owner(&self, word: Word) -> (u16, &crate::desc::Folio) {
        let ptr = self.map.virt(word.desc()).cast::<crate::desc::Folio>();
        // SAFETY: as `folio_at`: words of folios lead to folios, all of whose fields are atomics.
        let folio = unsafe { &*ptr };
        (folio.owner(), folio)
    }

    /// Notes in the descriptor whom new pages are charged to, and says the word to publish.
    #[inline]
    pub(crate) fn set_memcg(&self, word: Word, memcg: u16) -> Word {
        if memcg == 0 {
            return word;
        }
        if word.is_counted() {
            self.folio_owner(word).1.set_owner(memcg);
        } else {
            self.map.buddy_at(word.desc()).set_memcg(memcg);
        }
        word.with_number(CHARGED)
    }

    /// Nobody is charged for these pages any more, if anybody was: they are freed ([`prep_free`](Self::prep_free), which looks first), become something
    /// that is never charged, or are charged to another. Gives the word without it.
    #[cold]
    #[inline(never)]
    pub(crate) fn uncharge_block(&self, pfn: Pfn, word: Word) -> Word {
        if word.is_charged()
            && let Some(stat) = word.stat()
        {
            let memcg = self.memcg_of(word);
            let address = pfn.phys().0 as usize;
            self.memcg_uncharge(memcg, word.bytes(), stat, (pfn, word, address));
        }
        word.with_number(0)
    }
}

impl<P: Platform> Mm<P> {
    /// A charge for pages to whom the caller's are charged, if his flags say that they are.
    pub(crate) fn charge_pages(
        &self,
        memcg: u16,
        gfp: Flags,
        order: usize,
        stat: MemcgStat,
    ) -> Result<Option<Charge<'_, P>>, AllocError> {
        if order > crate::address::MAX_ORDER {
            return Err(AllocError::BadOrder);
        }
        self.memcg_charge(memcg, (PAGE_SIZE as u64) << order, stat, gfp)
    }

    /// [`alloc_folio`](Self::alloc_folio), charged to the group with this number (`mem_cgroup_charge`); 0 for nobody. With `__GFP_ACCOUNT` and
    /// `alloc_folio`, [`Platform::current_memcg`] is charged.
    ///
    /// # Context
    ///
    /// As [`alloc_pages`](Self::alloc_pages).
    ///
    /// # Errors
    ///
    /// As [`alloc_pages`](Self::alloc_pages); [`AllocError::Limit`] if it does not fit.
    #[inline]
    #[track_caller]
    pub fn alloc_folio_memcg(
        &self,
        gfp: Flags,
        order: usize,
        kind: FolioKind,
        memcg: u16,
    ) -> Result<Pfn, AllocError> {
        if memcg == 0 {
            return self.new_folio(gfp, order, kind, 0);
        }
        let stat = match kind {
            FolioKind::Anon => MemcgStat::Anon,
            FolioKind::File => MemcgStat::File,
            FolioKind::Driver => MemcgStat::Kernel,
        };
        let charge = self.charge_pages(memcg, gfp, order, stat)?;
        let got = self.new_folio(gfp, order, kind, Charge::of(&charge));
        Charge::settle(charge, got)
    }

    /// Whom the pages of an allocation are charged to; 0 for nobody. Of pages that the caller has; of objects see [`memcg_of_object`](Self::memcg_of_object).
    pub fn memcg_of_page(&self, pfn: Pfn) -> u16 {
        // Who does not have them reads a descriptor that may be another's by now, but is one.
        let _read = self.rcu_read_lock();
        match self.pages.map.lookup(pfn) {
            Some(found) if found.word.kind() == PageType::Vmalloc => {
                let Some(area) = self.vm_area_of(found.word) else {
                    return 0;
                };
                // SAFETY: type-stable until `_read` goes: an area, though perhaps another.
                unsafe { area.as_ref() }.memcg()
            }
            Some(found) => self.pages.memcg_of(found.word),
            None => 0,
        }
    }

    /// Pages that are charged change their type.
    pub(crate) fn memcg_retype(&self, old: Word, new: Word, memcg: u16) -> Word {
        if let (Some(from), Some(to)) = (old.stat(), new.stat())
            && memcg != 0
        {
            self.pages.memcg.restat(memcg, old.bytes(), from, to);
        }
        self.pages.set_memcg(new, memcg)
    }

    /// Pages that are in use are charged to another group from here on, or to nobody. Of a page table whose owner the caller is.
    pub(crate) fn memcg_move_table(&self, table: Pfn, memcg: u16) -> Result<(), AllocError> {
        let word = self.pages.map.word(table).load_owned();
        let charge =
            self.charge_pages(memcg, gfp::GFP_KERNEL, word.order(), MemcgStat::PageTables)?;
        let bare = self.pages.uncharge_block(table, word);
        let new = self.pages.set_memcg(bare, charge.map_or(0, Charge::keep));
        self.pages.map.publish_block(table, new);
        Ok(())
    }
}
