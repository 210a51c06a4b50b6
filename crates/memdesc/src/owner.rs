//! Pages and their owners: handing out blocks under a descriptor, and taking them back.
//!
//! Two ways to answer "who describes a page that comes back":
//! - *keep*: bare pages and large kmalloc carry the free block's `struct buddy` with them, 8 bytes;
//! - *morph*: an owner's descriptor is put in the buddy's place, the buddy goes back to its cache, and when the owner lets
//!   go the descriptor's memory becomes the buddy. If the next owner wants a descriptor of the same class, it is
//!   that memory as it is: no cache is asked at all.

use core::ptr::NonNull;

use crate::address::{Pfn, PhysAddr};
use crate::desc::{Folio, FolioFlags, Held, PtDesc, Put, Slab, VmArea, ZsDesc};
use crate::error::AllocError;
use crate::gfp::{self, Flags};
use crate::inline::{Facts, Offline, Poisoned, Reserved};
use crate::memcg::{Charge, MemcgStat};
use crate::memmap::{DescClass, Found, PageType, Word};
use crate::mm::{BuiltIn, Mm};
use crate::page_alloc::MigrateType;
use crate::page_alloc::buddy::Block;
use crate::page_alloc::nolock::Try;
use crate::platform::{FaultPoint, Platform};
use crate::report::{Corruption, Report};
use crate::slab::Cache;
use crate::stats::{Event, FreePath};
use crate::sync::atomic::Ordering;

/// What kind of memory a folio is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FolioKind {
    /// File cache.
    File,
    /// Anonymous.
    Anon,
    /// A driver's, for users to map: in no mapping, in no list.
    Driver,
}

/// Where a lookup leads: a descriptor that may be gone by the time it is looked at.
///
/// A word is read without a lock. That the page still leads there, and that the memory still holds a descriptor, is for the
/// caller to know: he owns the pages, or holds a reference that keeps them.
#[derive(Debug)]
#[repr(transparent)]
pub struct DescPtr<T>(NonNull<T>);

// By hand: an address may be copied whatever it leads to.
impl<T> Clone for DescPtr<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for DescPtr<T> {}

impl<T> DescPtr<T> {
    pub(crate) fn new(ptr: *mut T) -> Option<DescPtr<T>> {
        NonNull::new(ptr).map(DescPtr)
    }

    /// The address.
    pub fn as_ptr(self) -> *mut T {
        self.0.as_ptr()
    }

    /// The descriptor.
    ///
    /// # Safety
    ///
    /// The pages stay handed out, under this descriptor, as long as the reference lives: the caller owns them, or holds a
    /// reference that he took while they were.
    pub unsafe fn as_ref<'a>(self) -> &'a T {
        // SAFETY: the caller's promise; all fields of descriptors are atomics.
        unsafe { self.0.as_ref() }
    }
}

// SAFETY: it is an address; what is behind it is reached only by the unsafe `as_ref`.
unsafe impl<T: Sync> Send for DescPtr<T> {}
// SAFETY: the same.
unsafe impl<T: Sync> Sync for DescPtr<T> {}

/// What a page is part of: the answer of [`Mm::lookup`]. Code for slabs cannot be handed a folio.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum Memory {
    /// Not RAM that the memory map knows.
    Hole,
    /// Never handed out: free, without so much as a descriptor.
    Untouched,
    /// Free; `in_pcp` if in a per-CPU list.
    Free {
        /// In a per-CPU list rather than the zone's.
        in_pcp: bool,
    },
    /// Bare pages.
    Bare,
    /// Set aside in a reserve.
    SetAside,
    /// A slab.
    Slab(DescPtr<Slab>),
    /// Large kmalloc.
    LargeKmalloc,
    /// A page table.
    PageTable(DescPtr<PtDesc>),
    /// File cache.
    File(DescPtr<Folio>),
    /// Anonymous memory.
    Anon(DescPtr<Folio>),
    /// A driver's pages that users may map.
    Driver(DescPtr<Folio>),
    /// Of a network pool.
    NetPool(DescPtr<Folio>),
    /// Device memory; with a descriptor if the device has given it a purpose.
    Device(Option<DescPtr<Folio>>),
    /// Part of a vmalloc area.
    Vmalloc(DescPtr<VmArea>),
    /// Compressed memory: the descriptor of the zspage that the page is part of.
    Zsmalloc(DescPtr<ZsDesc>),
    /// Reserved.
    Reserved(Reserved),
    /// Off line.
    Offline,
    /// Given to the hypervisor by a balloon.
    Balloon,
    /// Bad memory.
    HwPoison,
    /// A guard.
    Guard,
    /// A type whose descriptor the kernel brings itself: the descriptor's address.
    Yours(PageType, DescPtr<u8>),
}

impl Memory {
    /// The type's name.
    pub const fn name(&self) -> &'static str {
        match self {
            Memory::Hole => "no memory",
            Memory::Untouched => "untouched",
            Memory::Free { .. } => "free",
            Memory::Bare => "bare",
            Memory::SetAside => "set_aside",
            Memory::Slab(_) => "slab",
            Memory::LargeKmalloc => "large_kmalloc",
            Memory::Vmalloc(_) => "vmalloc",
            Memory::Zsmalloc(_) => "zsmalloc",
            Memory::PageTable(_) => "page_table",
            Memory::File(_) => "file",
            Memory::Anon(_) => "anon",
            Memory::Driver(_) => "driver",
            Memory::NetPool(_) => "net_pool",
            Memory::Device(_) => "device",
            Memory::Reserved(what) => what.name(),
            Memory::Offline => Offline::Hotplug.name(),
            Memory::Balloon => Offline::Balloon.name(),
            Memory::HwPoison => Poisoned::HwPoison.name(),
            Memory::Guard => Poisoned::Guard.name(),
            Memory::Yours(kind, _) => kind.name(),
        }
    }
}

impl<P: Platform> Mm<P> {
    /// Bare pages (`alloc_pages`): 2^order of them, aligned to their size. They keep their `struct buddy`, 8 bytes.
    ///
    /// # Context
    ///
    /// With `__GFP_FAST_TRY` any at all, an NMI included (folios, page tables and objects too); else with `__GFP_DIRECT_RECLAIM` it
    /// may sleep; else any context that may pin a CPU.
    ///
    /// # Errors
    ///
    /// Why not; nothing has changed then.
    #[inline]
    #[track_caller]
    pub fn alloc_pages(&self, gfp: Flags, order: usize) -> Result<Pfn, AllocError> {
        self.alloc_pages_node(None, gfp, order)
    }

    /// [`alloc_pages`](Self::alloc_pages) from a certain node, or near it.
    ///
    /// # Errors
    ///
    /// The same.
    #[inline]
    #[track_caller]
    pub fn alloc_pages_node(
        &self,
        node: Option<usize>,
        gfp: Flags,
        order: usize,
    ) -> Result<Pfn, AllocError> {
        if gfp.contains(gfp::__GFP_ACCOUNT) {
            let (memcg, stat) = (self.active_memcg(), MemcgStat::Kernel);
            let got = self
                .charge_pages(memcg, gfp, order, stat)
                .and_then(|charge| {
                    let got = self.new_pages(node, gfp, order, Charge::of(&charge));
                    Charge::settle(charge, got)
                });
            // Not charged to two: see there.
            return got.or_else(|why| self.entitled_pages(gfp, order, why));
        }
        self.new_pages(node, gfp, order, 0)
    }

    // In two places; the one where nobody is charged must not pay for the other.
    #[inline(always)]
    #[track_caller]
    fn new_pages(
        &self,
        node: Option<usize>,
        gfp: Flags,
        order: usize,
        memcg: u16,
    ) -> Result<Pfn, AllocError> {
        let block = self
            .pages
            .alloc_block(PageType::Bare, gfp, order, node, self);
        let block = match block {
            Ok(block) => block,
            // To two nobody charges: who has a reserve is not charged to a group as well.
            Err(why) if memcg != 0 => return Err(why),
            Err(why) => return self.entitled_pages(gfp, order, why),
        };
        let word = block.word.to_owned(PageType::Bare);
        let word = self.pages.set_memcg(word, memcg);
        self.pages.map.publish_block(block.pfn, word);
        Ok(block.pfn)
    }

    /// Pages under a descriptor that the caller brings (`alloc_pages_desc` of seed 000): every page of the block will lead
    /// to it. The descriptor is given up to the memory manager until [`free_pages`](Self::free_pages), which then owns it:
    /// its memory serves as the free block's `struct buddy` and goes back to its cache one day. They are [`PageType::Yours`], of no registered type.
    /// Never charged: what such a descriptor says is the kernel's.
    ///
    /// # Safety
    ///
    /// `desc` is an object of a cache of this memory manager, at least 8 bytes and 8-byte aligned, and its first 8 bytes are
    /// not used by the owner while pages lead to it only if they are his (links).
    ///
    /// # Errors
    ///
    /// As [`alloc_pages`](Self::alloc_pages); the descriptor then is still the caller's.
    #[track_caller]
    pub unsafe fn alloc_pages_desc(
        &self,
        gfp: Flags,
        order: usize,
        desc: NonNull<u8>,
    ) -> Result<Pfn, AllocError> {
        let kind = PageType::Yours;
        let block = self.pages.alloc_block(kind, gfp, order, None, self)?;
        self.put_desc(block.word.desc());
        let desc = self.pages.phys(desc.as_ptr());
        self.pages.map.publish_block(
            block.pfn,
            Word::described(kind, order, desc, DescClass::Yours),
        );
        Ok(block.pfn)
    }

    /// A folio: pages that users can map, under a 32-byte descriptor, with one reference.
    ///
    /// # Errors
    ///
    /// As [`alloc_pages`](Self::alloc_pages).
    #[inline]
    #[track_caller]
    pub fn alloc_folio(
        &self,
        gfp: Flags,
        order: usize,
        kind: FolioKind,
    ) -> Result<Pfn, AllocError> {
        if gfp.contains(gfp::__GFP_ACCOUNT) {
            return self.alloc_folio_memcg(gfp, order, kind, self.active_memcg());
        }
        self.new_folio(gfp, order, kind, 0)
    }

    // In two places; the one where nobody is charged must not pay for the other.
    #[inline(always)]
    #[track_caller]
    pub(crate) fn new_folio(
        &self,
        gfp: Flags,
        order: usize,
        kind: FolioKind,
        memcg: u16,
    ) -> Result<Pfn, AllocError> {
        let (kind, class) = match kind {
            FolioKind::File => (PageType::File, DescClass::File),
            FolioKind::Anon => (PageType::Anon, DescClass::Anon),
            FolioKind::Driver => (PageType::Driver, DescClass::File),
        };
        let block = self.pages.alloc_block(kind, gfp, order, None, self)?;
        let word = self.own_block(block, class, kind, Some(gfp))?;
        self.folio_at(word.desc()).init(block.pfn);
        let word = self.pages.set_memcg(word, memcg);
        // Only the head's word: those of the tails count how often each is mapped.
        self.pages.map.word(block.pfn).publish(word);
        Ok(block.pfn)
    }

    /// Page table pages, under a `ptdesc`.
    ///
    /// # Errors
    ///
    /// As [`alloc_pages`](Self::alloc_pages).
    #[inline]
    #[track_caller]
    pub fn alloc_page_table(&self, gfp: Flags, order: usize) -> Result<Pfn, AllocError> {
        if gfp.contains(gfp::__GFP_ACCOUNT) {
            return self.alloc_page_table_memcg(gfp, order, self.active_memcg());
        }
        self.new_page_table(gfp, order, 0)
    }

    /// The same, charged to this group; 0 for nobody.
    #[track_caller]
    pub(crate) fn alloc_page_table_memcg(
        &self,
        gfp: Flags,
        order: usize,
        memcg: u16,
    ) -> Result<Pfn, AllocError> {
        if memcg == 0 {
            return self.new_page_table(gfp, order, 0);
        }
        let charge = self.charge_pages(memcg, gfp, order, MemcgStat::PageTables)?;
        let got = self.new_page_table(gfp, order, Charge::of(&charge));
        Charge::settle(charge, got)
    }

    // In two places; the one where nobody is charged must not pay for the other.
    #[inline(always)]
    #[track_caller]
    fn new_page_table(&self, gfp: Flags, order: usize, memcg: u16) -> Result<Pfn, AllocError> {
        let block = self
            .pages
            .alloc_block(PageType::PageTable, gfp, order, None, self)?;
        let word = self.own_block(block, DescClass::PtDesc, PageType::PageTable, Some(gfp))?;
        self.ptdesc_at(word.desc()).init();
        let word = self.pages.set_memcg(word, memcg);
        self.pages.map.publish_block(block.pfn, word);
        Ok(block.pfn)
    }

    /// Many bare pages of order 0 at once (`alloc_pages_bulk`): fills `out` from the front, says how many there were. The
    /// per-CPU list is entered once for all it has, and refilled by the batch.
    #[track_caller]
    pub fn alloc_pages_bulk(&self, gfp: Flags, out: &mut [Pfn]) -> usize {
        let mut n = 0;
        // Charged one by one.
        let at_once = !gfp.contains(gfp::__GFP_ACCOUNT) || self.active_memcg() == 0;
        while n < out.len() {
            let most = if at_once { out.len() - n } else { 0 };
            let taken = self.pages.alloc_bulk(PageType::Bare, gfp, most, |block| {
                let word = block.word.to_owned(PageType::Bare);
                self.pages.map.publish_block(block.pfn, word);
                out[n] = block.pfn;
                n += 1;
            });
            if taken == 0 {
                // Empty: one by the ordinary way, which refills the list.
                match self.alloc_pages(gfp, 0) {
                    Ok(pfn) => out[n] = pfn,
                    Err(_) => break,
                }
                n += 1;
            }
        }
        n
    }

    /// Frees many allocations (`free_pages_bulk`).
    ///
    /// # Safety
    ///
    /// Each is as [`free_pages`](Self::free_pages) wants it.
    #[track_caller]
    pub unsafe fn free_pages_bulk(&self, pages: &[Pfn]) {
        for &pfn in pages {
            // SAFETY: the caller's promise.
            unsafe { self.free_pages(pfn) };
        }
    }

    /// Takes a certain block out of free memory, as bare pages (`alloc_contig_range` of one block).
    ///
    /// # Errors
    ///
    /// [`AllocError::Busy`] if it is not free as one, or in a per-CPU list.
    #[track_caller]
    pub fn alloc_pages_at(&self, pfn: Pfn, order: usize) -> Result<(), AllocError> {
        let block = self.pages.alloc_block_at(pfn, order, self)?;
        self.pages
            .map
            .publish_block(block.pfn, block.word.to_owned(PageType::Bare));
        Ok(())
    }

    /// Gives allocated pages another type, for those whose purpose is known only later: bare pages become a folio or a page
    /// table and so on.
    ///
    /// # Safety
    ///
    /// `pfn` is the head of bare pages that the caller owns.
    ///
    /// # Errors
    ///
    /// [`AllocError::Busy`] for pages that are not bare, or from a reserve. No memory for the descriptor; the pages are as they were. [`AllocError::BadSize`] for a type that has no built-in descriptor.
    pub unsafe fn retype(&self, pfn: Pfn, kind: PageType) -> Result<(), AllocError> {
        let word = self.pages.map.word(pfn).load_owned();
        // What is a reserve's comes back to it as it is.
        if word.kind() != PageType::Bare || word.is_reserve() {
            return Err(AllocError::Busy);
        }
        let memcg = self.pages.memcg_of(word);
        let class = match kind {
            PageType::Anon => DescClass::Anon,
            PageType::File | PageType::Driver => DescClass::File,
            PageType::PageTable => DescClass::PtDesc,
            PageType::LargeKmalloc | PageType::Bare => DescClass::Buddy,
            _ => return Err(AllocError::BadSize),
        };
        let new = match self.swap_desc(word, class, Flags::EMPTY)? {
            Some(desc) => Word::described(kind, word.order(), desc, class),
            None => word.to_owned(kind),
        };
        if new.is_counted() {
            self.folio_at(new.desc()).init(pfn);
            let new = self.memcg_retype(word, new, memcg);
            let region = self.pages.map.region(pfn);
            region.inspect(|r| r.clear_tails(pfn, new.order()));
            self.pages.map.word(pfn).publish(new);
        } else {
            if class == DescClass::PtDesc {
                self.ptdesc_at(new.desc()).init();
            }
            let new = self.memcg_retype(word, new, memcg);
            self.pages.map.publish_block(pfn, new);
        }
        let pin = self.pages.pin();
        self.pages
            .stats(&pin)
            .block_retyped(&pin, word.kind(), kind, word.order());
        Ok(())
    }

    /// Frees an allocation of whatever type but slabs: the word tells its order and whose descriptor it has
    /// (`__free_pages`, `free_pages_desc`). Of a folio it puts the owner's reference; if others have some, the last of them
    /// frees it.
    ///
    /// # Safety
    ///
    /// `pfn` is the head of an allocation of this memory manager that nobody uses any more.
    ///
    /// # Context
    ///
    /// Any that may pin a CPU. Allocates nothing, does not wait, cannot fail.
    #[inline]
    #[track_caller]
    pub unsafe fn free_pages(&self, pfn: Pfn) {
        let caller = core::panic::Location::caller();
        let path = self.pages.free_path();
        let word = self.pages.map.owned_word(pfn);
        if word.is_only_owners() && pfn.is_aligned(word.order()) && !self.pages.map.checks.on() {
            return self.take_back(path, pfn, word);
        }
        self.free_shared(path, pfn, word, caller);
    }

    /// The same for pages that others may have as well, and for those that are not to be freed like this.
    #[inline]
    #[track_caller]
    fn free_shared(
        &self,
        path: FreePath<'_, P>,
        pfn: Pfn,
        word: Word,
        caller: &'static core::panic::Location<'static>,
    ) {
        if self.check_owned(pfn, word, caller) {
            if word.is_reserve() {
                return self.reserve_pages_back(pfn, word);
            }
            if word.is_folio() && self.folio_at(word.desc()).has_flag(FolioFlags::LRU) {
                self.lru_forget(pfn);
            }
            if word.kind() == PageType::Yours {
                self.own_freed(word);
            }
            self.take_back(path, pfn, word);
        }
    }

    /// The owner of the pages with this word gives them up: does nobody else have them? Reports what they are if they are not to be freed like this.
    #[inline]
    pub(crate) fn check_owned(
        &self,
        pfn: Pfn,
        word: Word,
        caller: &'static core::panic::Location<'static>,
    ) -> bool {
        if !word.kind().is_owned_block() || !pfn.is_aligned(word.order()) {
            self.report_page(pfn, word, caller);
            return false;
        }
        if self.pages.map.checks.on() && !self.word_is_sane(pfn, word) {
            // Whose they are is not known any more: they are left alone.
            let address = pfn.phys().0 as usize;
            let report = self.report_at(Corruption::BadWord, pfn, address, caller);
            self.pages.platform.corruption(&report);
            return false;
        }
        if !word.is_counted() {
            return true;
        }
        let folio = self.folio_at(word.desc());
        if self.pages.map.checks.on() && folio.held().refs == 0 {
            // Users have it, or a device: the owner's reference was put before.
            let address = pfn.phys().0 as usize;
            let report = self.report_at(Corruption::DoubleFree, pfn, address, caller);
            self.pages.platform.corruption(&Report { word, ..report });
            return false;
        }
        // If somebody else has it, who puts the last one frees.
        folio.put_counts(Held::REF, pfn) == Put::Last
    }

    #[cold]
    pub(crate) fn report_page(
        &self,
        pfn: Pfn,
        word: Word,
        caller: &'static core::panic::Location<'static>,
    ) {
        // The tails of larger blocks have no word of their own.
        let found = self.pages.map.lookup(pfn);
        let word = found.map_or(word, |f| f.word);
        let what = match word.kind() {
            _ if self.pages.map.any_region(pfn).is_none() => Corruption::NotRam,
            PageType::Free | PageType::None => Corruption::DoubleFree,
            _ if found.is_some_and(|f| f.head != pfn) => Corruption::NotAHead,
            _ => Corruption::WrongType,
        };
        let report = self.report_at(what, pfn, pfn.phys().0 as usize, caller);
        self.pages.platform.corruption(&Report { word, ..report });
    }

    /// Which memory a page is part of. Any page of an allocation gives the same answer.
    ///
    /// Without a lock or a reference the answer may be stale when it comes back; see [`folio_get`](Self::folio_get).
    pub fn lookup(&self, pfn: Pfn) -> (Pfn, usize, Memory) {
        let Some(region) = self.pages.map.region(pfn) else {
            return self.lookup_device(pfn);
        };
        let Some(Found { head, word }) = self.pages.map.lookup(pfn) else {
            let (start, end) = region.untouched();
            // A block on its way between two states shows no head for a moment.
            let memory = if pfn.0 >= start && pfn.0 < end {
                Memory::Untouched
            } else {
                Memory::Free { in_pcp: false }
            };
            return (pfn, 0, memory);
        };
        let memory = match word.kind() {
            PageType::None => Memory::Untouched,
            PageType::Free => Memory::Free {
                in_pcp: word.is_in_pcp(),
            },
            PageType::Bare => Memory::Bare,
            PageType::SetAside => Memory::SetAside,
            PageType::Slab => Memory::Slab(self.desc_ptr(word)),
            PageType::LargeKmalloc => Memory::LargeKmalloc,
            PageType::PageTable => Memory::PageTable(self.desc_ptr(word)),
            PageType::File => Memory::File(self.desc_ptr(word)),
            PageType::Anon => Memory::Anon(self.desc_ptr(word)),
            PageType::Driver if word.is_counted() => Memory::Driver(self.desc_ptr(word)),
            PageType::NetPool if word.is_counted() => Memory::NetPool(self.desc_ptr(word)),
            PageType::Vmalloc => match self.vm_area_of(word) {
                Some(area) => Memory::Vmalloc(area),
                None => Memory::Free { in_pcp: false },
            },
            PageType::Zsmalloc => match self.zsdesc_of(word) {
                Some(desc) => Memory::Zsmalloc(desc),
                None => Memory::Free { in_pcp: false },
            },
            kind => match word.inline_facts() {
                Some(Facts::Reserved(what)) => Memory::Reserved(what),
                Some(Facts::Offline(Offline::Balloon)) => Memory::Balloon,
                Some(Facts::Offline(_)) => Memory::Offline,
                Some(Facts::Poisoned(Poisoned::HwPoison)) => Memory::HwPoison,
                Some(Facts::Poisoned(Poisoned::Guard)) => Memory::Guard,
                None => Memory::Yours(kind, self.desc_ptr(word)),
            },
        };
        (head, word.order(), memory)
    }

    #[cold]
    fn lookup_device(&self, pfn: Pfn) -> (Pfn, usize, Memory) {
        if self.pages.map.device(pfn).is_none() {
            return (pfn, 0, Memory::Hole);
        }
        match self.pages.map.lookup(pfn) {
            Some(Found { head, word }) => {
                let desc = self.desc_ptr(word);
                (head, word.order(), Memory::Device(Some(desc)))
            }
            None => (pfn, 0, Memory::Device(None)),
        }
    }

    fn desc_ptr<T>(&self, word: Word) -> DescPtr<T> {
        match NonNull::new(self.pages.map.virt(word.desc()).cast()) {
            Some(ptr) => DescPtr(ptr),
            None => unreachable!("a word that leads to a null descriptor: {word:?}"),
        }
    }

    /// The direct-map address of a page.
    pub fn page_address(&self, pfn: Pfn) -> *mut u8 {
        self.pages.map.virt(pfn.phys())
    }

    /// The page that a direct-map address lies in.
    pub fn virt_to_pfn(&self, ptr: *const u8) -> Pfn {
        Pfn::containing(self.pages.phys(ptr))
    }

    /// Gives the pageblock around `pfn` this mobility, and its free blocks with it (`set_pageblock_migratetype`).
    pub fn set_pageblock_migratetype(&self, pfn: Pfn, mt: MigrateType) {
        self.pages.set_pageblock(pfn, mt);
    }

    /// Gives a fresh block the descriptor its owner wants: its own if the class is right, else a new one. On failure the block
    /// goes back. Says the word to publish.
    #[inline(always)]
    #[track_caller]
    pub(crate) fn own_block(
        &self,
        block: Block,
        class: DescClass,
        kind: PageType,
        asked: Option<Flags>,
    ) -> Result<Word, AllocError> {
        let word = match self.swap_desc(block.word, class, asked.unwrap_or(Flags::EMPTY)) {
            Ok(None) => block.word.to_owned(kind),
            Ok(Some(desc)) => Word::described(kind, block.word.order(), desc, class),
            Err(why) => {
                // Never published, so its word still says free; nobody saw it.
                if asked.is_some_and(|gfp| gfp.contains(gfp::__GFP_FAST_TRY)) {
                    self.pages.free_block_nolock(kind, block.pfn, block.word);
                } else {
                    self.take_back_as(self.pages.free_path(), kind, block.pfn, block.word);
                }
                return Err(why);
            }
        };
        Ok(word)
    }

    /// A descriptor of this class in place of the word's; `None` if the word's will do. The old one goes back.
    #[inline(always)]
    fn swap_desc(
        &self,
        word: Word,
        class: DescClass,
        gfp: Flags,
    ) -> Result<Option<PhysAddr>, AllocError> {
        let tries = gfp.contains(gfp::__GFP_FAST_TRY);
        if word.class() == class {
            if matches!(class, DescClass::File | DescClass::Anon)
                && !tries
                && let Some(desc) = self.evacuate(word.desc(), class)
            {
                return Ok(Some(desc));
            }
            if class != DescClass::Buddy && !tries {
                let pin = self.pages.pin();
                self.pages.stats(&pin).add(&pin, Event::DescReused, 1);
            }
            return Ok(None);
        }
        // Any descriptor can be a kept buddy.
        if class == DescClass::Buddy {
            return Ok(None);
        }
        if self.pages.platform.should_fail(FaultPoint::Owner) {
            return Err(AllocError::NoDescriptor);
        }
        let core = match class {
            DescClass::File => self.built_in(BuiltIn::File),
            DescClass::Anon => self.built_in(BuiltIn::Anon),
            DescClass::Slab => self.slab_cache(),
            DescClass::PtDesc => self.built_in(BuiltIn::PtDesc),
            DescClass::Zs => self.built_in(BuiltIn::ZsDesc),
            DescClass::Buddy | DescClass::Yours => return Ok(None),
        };
        let caller = core::panic::Location::caller();
        if tries {
            let desc = self.cache_try_alloc(core, Flags::EMPTY, Try::Lists, caller)?;
            self.try_put_desc(word);
            return Ok(Some(self.pages.phys(desc.as_ptr())));
        }
        let desc = self
            .cache_alloc(core, gfp::GFP_NOWAIT | gfp::__GFP_MEMALLOC, caller)
            .map_err(|_| AllocError::NoDescriptor)?;
        let desc = self.pages.phys(desc.as_ptr());
        self.put_desc(word.desc());
        Ok(Some(desc))
    }

    /// Where much of the descriptors' slabs is free, and this one lies in an emptier half: another from the fullest slab, and this one goes
    /// back past the sheaves. So slabs that a busy hour left behind come free as pages are used again.
    #[inline]
    fn evacuate(&self, desc: PhysAddr, class: DescClass) -> Option<PhysAddr> {
        let core = self.built_in(if class == DescClass::File {
            BuiltIn::File
        } else {
            BuiltIn::Anon
        });
        if core.sparse.load(Ordering::Relaxed) == 0 {
            return None;
        }
        self.evacuate_slow(core, desc)
    }

    #[cold]
    fn evacuate_slow(&self, core: &crate::slab::CacheCore, desc: PhysAddr) -> Option<PhysAddr> {
        let found = self.pages.map.lookup(Pfn::containing(desc))?;
        let slab = self.pages.map.slab_at(found.word.desc());
        if slab.inuse() * 2 > slab.objects() {
            return None;
        }
        let mut better = [core::ptr::null_mut()];
        if self.slabs_take_partial(core, &mut better) == 0 {
            return None;
        }
        let old = self.pages.map.virt(desc);
        self.slabs_give(core, &[old], true, core::panic::Location::caller());
        Some(self.pages.phys(better[0]))
    }

    /// Looks how full the slabs of folios are, for [`evacuate`](Self::evacuate).
    pub(crate) fn look_for_sparse(&self) {
        for which in [BuiltIn::File, BuiltIn::Anon] {
            let core = self.built_in(which);
            let lists = self.lists(core);
            let free = lists.objects - lists.inuse;
            let sparse = free > lists.objects / 4 && free > 4096;
            core.sparse.store(u32::from(sparse), Ordering::Relaxed);
        }
    }

    /// A handed-out block comes back: its descriptor becomes the free block's.
    #[inline]
    #[track_caller]
    pub(crate) fn take_back(&self, path: FreePath<'_, P>, pfn: Pfn, word: Word) {
        self.take_back_as(path, word.kind(), pfn, word);
    }

    #[inline]
    #[track_caller]
    fn take_back_as(&self, path: FreePath<'_, P>, kind: PageType, pfn: Pfn, word: Word) {
        let stats = self.pages.stats(path.pin());
        stats.block_back(path.pin(), kind, word.order());
        self.pages.free_block(path, pfn, word, false, self);
    }

    pub(crate) fn folio_at(&self, desc: PhysAddr) -> &Folio {
        let ptr = self.pages.map.virt(desc).cast::<Folio>();
        // SAFETY: words of these types lead to objects of the folio caches, 32 bytes, 8-byte aligned; all fields are atomics,
        // every bit pattern is valid.
        unsafe { &*ptr }
    }

    pub(crate) fn ptdesc_at(&self, desc: PhysAddr) -> &PtDesc {
        let ptr = self.pages.map.virt(desc).cast::<PtDesc>();
        // SAFETY: as for folios, with the ptdesc cache.
        unsafe { &*ptr }
    }

    /// A cache of objects of `size` bytes (`kmem_cache_create`). `align` 0 means 8. `ctor` runs once for each object
    /// when its slab is made; free objects keep what it left.
    ///
    /// # Errors
    ///
    /// [`AllocError::BadSize`] for a size of 0 or above 4 MiB or an alignment that is no power of two up to a page; else no memory.
    pub fn kmem_cache_create(
        &self,
        name: &str,
        size: usize,
        align: usize,
        flags: crate::slab::CacheFlags,
        ctor: Option<fn(NonNull<u8>)>,
    ) -> Result<Cache<'_>, AllocError> {
        if self.pages.platform.should_fail(FaultPoint::CacheCreate) {
            return Err(AllocError::Injected);
        }
        self.create_cache(name, size, align.max(1), flags, ctor)
    }
}
