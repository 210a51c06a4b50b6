//! Bad memory: a page fails, and what can be saved is saved. It never comes back.
//!
//! | what the page is | what is done | outcome |
//! |---|---|---|
//! | free, untouched | taken out of its block; the rest stays usable | recovered |
//! | a clean page of a file | leaves its mapping, users are unmapped: a reader reads it again | recovered |
//! | a dirty page of a file | the same, the mapping has an error, users are told and find [`FaultError::HwPoison`](crate::mmap::FaultError::HwPoison) | recovered, contents lost |
//! | anonymous | users are told and find the same; a child made by a fork as well | recovered, contents lost |
//! | in a large folio | that is split first, so only the one page is lost; if it cannot be split, only the one page is unmapped | as above, or failed |
//! | had or pinned by others besides | users are told; it goes out of use when the last of them lets go | failed |
//! | bare, slab, page table, vmalloc, a driver's, a network pool's, a type of the kernel's own | it stays what it is, and goes out of use when its owner frees it, the rest of the block stays usable | delayed |
//! | off line, in a balloon, a guard | nobody uses it; it goes out of use when it comes back | delayed |
//! | reserved, device memory | not the page allocator's | ignored |
//!
//! Where a page is bad and in use is remembered in [`memmap::bad`](crate::memmap), so that its owner may free it from any context, which allocates
//! nothing. There is room for 32 of them; what can be saved at once is saved however many there are. A slab or an area of vmalloc that is kept for reuse
//! is used with the bad page in it till it goes back. A network pool gives a bad page back instead of keeping it for the next packet; one that lies idle at
//! that moment goes round once more. What is broken is neither filled on its way back nor copied by a migration: a large folio that could not be split
//! stays where it is.
//!
//! Lock order: `mf_mutex` is the outermost of all; under it what a migration takes.
//!
//! Source: `memory_failure`, `soft_offline_page`, `unpoison_memory`, `take_page_off_buddy` of Linux.

use crate::address::Pfn;
use crate::desc::{DescList, Folio, FolioFlags, Place};
use crate::error::AllocError;
use crate::folio::FolioRef;
use crate::gfp;
use crate::inline::{Facts, Offline, Poisoned};
use crate::lockdep::classes;
use crate::memmap::bad::Health;
use crate::memmap::{Found, PageType, Word};
use crate::mm::Mm;
use crate::mmap::Unmap;
use crate::page_alloc::alloc::Descriptors;
use crate::page_alloc::buddy::LADDER;
use crate::platform::{Holder, Platform, might_sleep};
use crate::stats::Event;
use crate::sync::SpinGuard;

/// Attempts at splitting or moving a folio that others have at the moment.
const ATTEMPTS: u32 = 4;
/// Rounds of waiting for one who has a folio for a moment only: reclaim, a look-up.
const ROUNDS: u32 = 128;

/// What became of a page that failed (`enum mf_result`).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum MfResult {
    /// Nothing was done.
    Ignored,
    /// Others still have it. It goes out of use when they let go; unless so many wait for that already that it cannot be remembered, which the
    /// page's name says then.
    Failed,
    /// It is still in use, by the kernel or by nobody. It goes out of use when it comes back.
    Delayed,
    /// It is out of use.
    Recovered,
}

impl MfResult {
    /// In a word.
    pub const fn name(self) -> &'static str {
        match self {
            MfResult::Ignored => "ignored",
            MfResult::Failed => "failed",
            MfResult::Delayed => "delayed",
            MfResult::Recovered => "recovered",
        }
    }
}

/// What the page was (`enum mf_action_page_type`).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[non_exhaustive]
pub enum FailedPage {
    /// No RAM.
    NotRam,
    /// It failed before.
    AlreadyBad,
    /// Free in a zone.
    Free,
    /// Free in a CPU's list, or on its way.
    PerCpu,
    /// Never handed out.
    Untouched,
    /// The kernel's: of this type.
    Kernel(PageType),
    /// A folio that is in no mapping.
    Alone,
    /// A file's, as on disk.
    CleanFile,
    /// A file's, newer than on disk.
    DirtyFile,
    /// Anonymous memory.
    Anon,
    /// Reserved, device memory, off line, a balloon's, a guard: by its name.
    Other(&'static str),
}

impl FailedPage {
    /// In words.
    pub const fn name(self) -> &'static str {
        match self {
            FailedPage::NotRam => "no memory",
            FailedPage::AlreadyBad => "already hardware poisoned page",
            FailedPage::Free => "free buddy page",
            FailedPage::PerCpu => "free per-CPU page",
            FailedPage::Untouched => "page never handed out",
            FailedPage::Kernel(PageType::Slab) => "kernel slab page",
            FailedPage::Kernel(PageType::PageTable) => "page table page",
            FailedPage::Kernel(PageType::Vmalloc) => "vmalloc page",
            FailedPage::Kernel(_) => "kernel page",
            FailedPage::Alone => "folio in no mapping",
            FailedPage::CleanFile => "clean file page",
            FailedPage::DirtyFile => "dirty file page",
            FailedPage::Anon => "anonymous page",
            FailedPage::Other(name) => name,
        }
    }
}

/// What [`Mm::memory_failure`] found and did.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MemoryFailure {
    /// The page.
    pub pfn: Pfn,
    /// What it was.
    pub page: FailedPage,
    /// What became of it.
    pub result: MfResult,
    /// Users that were told: entries that mapped it ([`Platform::memory_failure_notify`]).
    pub users: u32,
    /// Contents were lost that are nowhere else.
    pub lost: bool,
}

impl core::fmt::Display for MemoryFailure {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let MemoryFailure { pfn, users, .. } = *self;
        let (page, result) = (self.page.name(), self.result.name());
        write!(f, "{pfn:?}: recovery action for {page}: {result}")?;
        if self.lost {
            write!(f, ", contents lost, {users} users told")?;
        }
        Ok(())
    }
}

/// How far one look came.
enum Step {
    Done(FailedPage, MfResult, u32, bool),
    /// Something changed, or somebody has to finish first.
    Again,
}

impl<P: Platform> Mm<P> {
    pub(crate) fn mf_mutex(&self) -> SpinGuard<'_, (), Holder<'_, P>> {
        might_sleep(&self.pages.platform, "memory_failure");
        let holder = Holder::new(&self.pages.platform, true, &classes::MEMORY_FAILURE);
        self.mf_lock.lock(holder)
    }

    /// This page is broken (`memory_failure`): takes it out of use, or sees to it that it goes out of use when it comes back. What else can be saved
    /// is saved; the table at the top of the file says what.
    ///
    /// # Context
    ///
    /// May sleep. Without a folio's lock or an `mmap_lock`: where a machine check is taken, this is for the worker that it leaves the
    /// page number to.
    ///
    /// # Examples
    ///
    /// ```
    /// use memdesc::{Config, FailedPage, Memory, MfResult, Mm, gfp::*};
    /// use memdesc::mmap::{FaultError, Map, MmStruct, VmFlags};
    /// use memdesc_host::Host;
    ///
    /// let (host, ram) = Host::small(16384)?;
    /// let mm = Mm::new(host, &Config::default(), &ram)?;
    /// let space = MmStruct::new(&mm, 1)?;
    /// let at = space.mmap(None, 1 << 20, VmFlags::READ_WRITE, Map::Anon)?;
    /// space.write(at, b"lost")?;
    /// let page = space.page_at(at).expect("just touched").1;
    ///
    /// let failure = mm.memory_failure(page);
    /// assert_eq!((failure.page, failure.result), (FailedPage::Anon, MfResult::Recovered));
    /// assert!(failure.lost && failure.users == 1);
    /// assert!(matches!(mm.lookup(page).2, Memory::HwPoison));
    /// // Who touches it learns of it, and may map something else there.
    /// assert_eq!(space.read(at, &mut [0; 4]), Err(FaultError::HwPoison));
    ///
    /// // A bare page is in use until it is freed. Its neighbours come back.
    /// let pages = mm.alloc_pages(GFP_KERNEL, 3)?;
    /// assert_eq!(mm.memory_failure(pages.add(5)).result, MfResult::Delayed);
    /// // SAFETY: ours.
    /// unsafe { mm.free_pages(pages) };
    /// assert!(matches!(mm.lookup(pages.add(5)).2, Memory::HwPoison));
    /// assert!(matches!(mm.lookup(pages.add(4)).2, Memory::Free { .. }));
    /// assert_eq!(mm.num_poisoned_pages(), 2);
    /// assert!(mm.ledger().balanced);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn memory_failure(&self, pfn: Pfn) -> MemoryFailure {
        let _mutex = self.mf_mutex();
        let (page, result, users, lost) = match self.mf_not_ours(pfn) {
            Some(page) => (page, MfResult::Ignored, 0, false),
            None => self.mf_handle(pfn),
        };
        let event = match result {
            MfResult::Ignored => Event::MfIgnored,
            MfResult::Failed => Event::MfFailed,
            MfResult::Delayed => Event::MfDelayed,
            MfResult::Recovered => Event::MfRecovered,
        };
        let pin = self.pages.pin();
        self.pages.stats(&pin).add(&pin, event, 1);
        MemoryFailure {
            pfn,
            page,
            result,
            users,
            lost,
        }
    }

    /// This page works, but not for long (`soft_offline_page`): what it holds is moved away, and it goes out of use.
    ///
    /// # Context
    ///
    /// May sleep. Without a folio's lock or an `mmap_lock`.
    ///
    /// # Errors
    ///
    /// [`AllocError::Busy`] if it is of a type that cannot be moved, or somebody has it; no memory to move it to. It stays in use then.
    ///
    /// # Examples
    ///
    /// ```
    /// use memdesc::{Config, Memory, Mm};
    /// use memdesc::mmap::{Map, MmStruct, VmFlags};
    /// use memdesc_host::Host;
    ///
    /// let (host, ram) = Host::small(16384)?;
    /// let mm = Mm::new(host, &Config::default(), &ram)?;
    /// let space = MmStruct::new(&mm, 1)?;
    /// let at = space.mmap(None, 1 << 20, VmFlags::READ_WRITE, Map::Anon)?;
    /// space.write(at, b"kept")?;
    /// let page = space.page_at(at).expect("just touched").1;
    /// mm.soft_offline_page(page)?;
    /// assert!(matches!(mm.lookup(page).2, Memory::HwPoison));
    /// let mut kept = [0; 4];
    /// space.read(at, &mut kept)?;
    /// assert_eq!(&kept, b"kept");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn soft_offline_page(&self, pfn: Pfn) -> Result<(), AllocError> {
        let _mutex = self.mf_mutex();
        if self.mf_not_ours(pfn).is_some() {
            return Err(AllocError::Busy);
        }
        self.mf_note(pfn, Health::Failing);
        let mut why = AllocError::Busy;
        let mut attempts = 0;
        let mut round = 0;
        while attempts < ATTEMPTS {
            match self.mf_free(pfn) {
                Some(Step::Done(_, MfResult::Recovered, ..)) => return Ok(()),
                Some(Step::Done(..)) => {
                    why = AllocError::NoDescriptor;
                    break;
                }
                Some(Step::Again) => {
                    self.mf_wait(&mut round);
                    continue;
                }
                None => {}
            }
            let is_folio = |f: Found| f.word.is_folio();
            if !self.pages.map.lookup(pfn).is_some_and(is_folio) {
                break;
            }
            let flags = gfp::GFP_HIGHUSER_MOVABLE
                | gfp::__GFP_NORETRY
                | gfp::__GFP_NOMEMALLOC
                | gfp::__GFP_NOWARN;
            match self.migrate_away(pfn, |order| self.alloc_pages(flags, order)) {
                // SAFETY: bare pages, ours since the folio moved.
                Ok(old) => unsafe { self.free_pages(old) },
                Err(other) => {
                    why = other;
                    attempts += 1;
                    self.pages.platform.relax(63);
                }
            }
        }
        if self.mf_forget(pfn) {
            return Err(why);
        }
        // It came back while we looked.
        Ok(())
    }

    /// Takes back that a page is bad, for tests and for those who know better (`unpoison_memory`): if it is out of use it is free again, or off line
    /// with the range that it is in. What users found in its place stays.
    ///
    /// # Context
    ///
    /// May sleep.
    ///
    /// # Errors
    ///
    /// [`AllocError::Busy`] if it is not bad; [`AllocError::NoDescriptor`]: it stays bad then.
    pub fn unpoison_memory(&self, pfn: Pfn) -> Result<(), AllocError> {
        let _mutex = self.mf_mutex();
        if self.pages.map.region(pfn).is_none() {
            return Err(AllocError::Busy);
        }
        if self.mf_forget(pfn) {
            return Ok(());
        }
        let found = self.pages.map.lookup(pfn);
        let Some(Found { head, word }) = found.filter(|f| f.word.is_hwpoison()) else {
            return Err(AllocError::Busy);
        };
        let order = word.order();
        if word.is_hwpoison_offline() {
            // All of the range is off line, and stays so: this page comes back with the others, and is as accessible as they are.
            self.pages.platform.kernel_map_pages(head, 0, true);
            if self.pages.services.on_free() {
                let _ = self.pages.serve_free(head, 0);
            }
            self.pages.map.bad.add_out(-1);
            let pin = self.pages.pin();
            let stats = self.pages.stats(&pin);
            stats.add(&pin, Event::AllocAt, 1);
            stats.block_out(&pin, PageType::Offline, 0);
            let facts = Offline::Hotplug as u64;
            let offline = Word::inline(PageType::Offline, 0, facts);
            self.pages.map.publish_block(head, offline);
            return Ok(());
        }
        let mut spare = self.get(1)?;
        let Some(desc) = spare.pop(&self.pages.map) else {
            return Err(AllocError::NoDescriptor);
        };
        self.put(spare);
        self.pages.platform.pages_allocated(head, order);
        self.pages.platform.kernel_map_pages(head, order, true);
        self.pages.map.bad.add_out(-(1i64 << order));
        {
            let pin = self.pages.pin();
            let stats = self.pages.stats(&pin);
            // Out of which type it came was counted when it came back.
            stats.add(&pin, Event::AllocAt, 1);
            stats.block_out(&pin, PageType::Poisoned, order);
            stats.block_retyped(&pin, PageType::Poisoned, PageType::Bare, order);
        }
        let class = crate::memmap::DescClass::Buddy;
        let bare = Word::described(PageType::Bare, order, desc, class);
        self.pages.map.publish_block(head, bare);
        // SAFETY: bare pages that nobody else has: out of use until now.
        unsafe { self.free_pages(head) };
        Ok(())
    }

    /// Bad pages, in use or not (`num_poisoned_pages`).
    pub fn num_poisoned_pages(&self) -> u64 {
        self.pages.map.bad.out() + u64::from(self.pages.map.bad.pending())
    }

    /// What nothing is done about.
    fn mf_not_ours(&self, pfn: Pfn) -> Option<FailedPage> {
        if self.pages.map.region(pfn).is_none() {
            return Some(match self.pages.map.device(pfn) {
                Some(_) => FailedPage::Other(PageType::Device.name()),
                None => FailedPage::NotRam,
            });
        }
        if self.pages.map.bad.hits(pfn, 0) {
            return Some(FailedPage::AlreadyBad);
        }
        let word = self.pages.map.lookup(pfn)?.word;
        match word.inline_facts() {
            Some(Facts::Reserved(what)) => Some(FailedPage::Other(what.name())),
            Some(Facts::Poisoned(Poisoned::HwPoison)) => Some(FailedPage::AlreadyBad),
            _ => None,
        }
    }

    /// Notes the page as bad, so that no free list takes it from now on.
    fn mf_note(&self, pfn: Pfn, health: Health) {
        // For cutting it out of the largest block there is. Without them more goes out of use with it.
        let spare = self.get(LADDER - 1).unwrap_or(DescList::new());
        self.pages.map.bad.add(pfn, health, spare.into_parts());
        crate::inject::point("memory failure: noted");
        // Who did not see it yet has put the page where we see it.
        if let Some(region) = self.pages.map.region(pfn) {
            drop(self.pages.lock(region.zone as usize));
        }
        self.drain_all();
    }

    /// Takes the note back; `false` if the page went out of use before.
    fn mf_forget(&self, pfn: Pfn) -> bool {
        let Some(region) = self.pages.map.region(pfn) else {
            return false;
        };
        let spare = {
            let _zone = self.pages.lock(region.zone as usize);
            let bad = &self.pages.map.bad;
            bad.find(pfn, 0).map(|(_, nth)| bad.take(nth))
        };
        match spare {
            Some((first, len)) => {
                self.put(DescList::from_parts(first, len));
                true
            }
            None => false,
        }
    }

    fn mf_handle(&self, pfn: Pfn) -> (FailedPage, MfResult, u32, bool) {
        self.mf_note(pfn, Health::Broken);
        let mut whole = 0;
        let mut round = 0;
        loop {
            let step = match self.mf_free(pfn) {
                Some(step) => step,
                None => {
                    crate::inject::point("memory failure: in use");
                    self.mf_used(pfn, &mut whole)
                }
            };
            if let Step::Done(page, result, users, lost) = step {
                if self.pages.map.bad.is_crowded() && self.mf_forget(pfn) {
                    // It stays where it is, and nobody remembers: the slot is for the next one.
                    let page = FailedPage::Other("page, and too many bad ones are in use");
                    return (page, MfResult::Failed, users, lost);
                }
                return (page, result, users, lost);
            }
            self.mf_wait(&mut round);
        }
    }

    /// A round of waiting for a page that somebody is to let go of. Nobody may have it: one that waits for the next tick to leave its list, or for the next
    /// free on another CPU. So now and then what waits is sent on its way.
    fn mf_wait(&self, round: &mut u32) {
        if *round % 32 == 31 {
            self.free_all_deferred();
            self.drain_all();
        }
        self.pages.platform.relax(*round);
        *round = round.wrapping_add(1);
    }

    /// If the page is free, takes it out of use; `None` if it is not. It is noted, so once it is in use it is not free again.
    fn mf_free(&self, pfn: Pfn) -> Option<Step> {
        let map = &self.pages.map;
        let region = map.region(pfn)?;
        let found = map.lookup(pfn);
        let done = |page| Some(Step::Done(page, MfResult::Recovered, 0, false));
        match found.map(|f| f.word) {
            Some(word) if word.is_hwpoison() => {
                // If it was on its way there before it was noted, nobody took the note.
                self.mf_forget(pfn);
                self.mf_close(pfn);
                done(FailedPage::PerCpu)
            }
            Some(word) if word.kind() != PageType::Free => None,
            Some(word) => {
                let mut freed = DescList::new();
                let taken = self
                    .pages
                    .lock(region.zone as usize)
                    .take_bad(pfn, &mut freed);
                self.put(freed);
                if taken {
                    self.mf_close(pfn);
                    return done(FailedPage::Free);
                }
                if word.is_in_pcp() {
                    self.drain_all();
                }
                Some(Step::Again)
            }
            None => {
                let (start, end) = region.untouched();
                if pfn.0 < start || pfn.0 >= end {
                    // On its way between two states.
                    return Some(Step::Again);
                }
                // Carved, it is in a free block. Without descriptors it goes out of use when its first user frees it.
                let Ok(mut spare) = self.get(LADDER) else {
                    let page = FailedPage::Untouched;
                    return Some(Step::Done(page, MfResult::Failed, 0, false));
                };
                let mut freed = DescList::new();
                let taken = {
                    let mut zone = self.pages.lock(region.zone as usize);
                    let untouched = || {
                        let (start, end) = region.untouched();
                        pfn.0 >= start && pfn.0 < end
                    };
                    while untouched() && !spare.is_empty() {
                        zone.carve_from(region, &mut spare);
                    }
                    !untouched() && zone.take_bad(pfn, &mut freed)
                };
                self.put(spare);
                self.put(freed);
                if taken {
                    self.mf_close(pfn);
                    return done(FailedPage::Untouched);
                }
                Some(Step::Again)
            }
        }
    }

    /// A page went out of use: nobody shall touch it, nor what went with it.
    fn mf_close(&self, pfn: Pfn) {
        let found = self.pages.map.lookup(pfn);
        if let Some(Found { head, word }) = found.filter(|f| f.word.is_hwpoison()) {
            let order = word.order();
            self.pages.platform.kernel_map_pages(head, order, false);
        }
    }

    /// A page that somebody has.
    fn mf_used(&self, pfn: Pfn, whole: &mut u32) -> Step {
        let delayed = |page| Step::Done(page, MfResult::Delayed, 0, false);
        let Some(found) = self.pages.map.lookup(pfn) else {
            return Step::Again;
        };
        match found.word.inline_facts() {
            Some(Facts::Offline(what @ (Offline::Hotplug | Offline::Balloon))) => {
                return delayed(FailedPage::Other(what.name()));
            }
            Some(Facts::Poisoned(Poisoned::Guard)) => {
                return delayed(FailedPage::Other(Poisoned::Guard.name()));
            }
            // On its way back on line, or out of use.
            Some(_) => return Step::Again,
            None => {}
        }
        // Its owner was faster.
        if found.word.kind() == PageType::Free {
            return Step::Again;
        }
        if !found.word.is_folio() {
            return delayed(FailedPage::Kernel(found.word.kind()));
        }
        let Some(folio) = self.folio_get(pfn) else {
            return Step::Again;
        };
        if folio.order() > 0 && *whole < ATTEMPTS {
            // Only the one page is to be lost.
            if self.split_folio(&folio, 0).is_err() {
                *whole += 1;
            }
            return Step::Again;
        }
        self.mf_folio(pfn, folio)
    }

    /// A folio, which the caller has: small, or one that cannot be split.
    fn mf_folio(&self, pfn: Pfn, folio: FolioRef<'_, P>) -> Step {
        let head = folio.head();
        let locked = self.folio_lock(&folio);
        // It may have been moved while we waited, or split.
        let still =
            |f: Found| f.head == head && core::ptr::eq(self.folio_at(f.word.desc()), &*folio);
        if !self.pages.map.lookup(pfn).is_some_and(still) {
            return Step::Again;
        }
        self.folio_wait_writeback(&folio);
        let handle = self.folio_mapping(&folio);
        let (page, users, lost) = if !folio.is_file() {
            let family = self.rmap_family(&folio, head);
            let mapped = self.page_mapcount(pfn) > 0;
            let users = self.rmap_poison(&folio, head, pfn, family.as_ref());
            let page = if mapped || handle != 0 {
                FailedPage::Anon
            } else {
                FailedPage::Alone
            };
            (page, users, true)
        } else if handle == 0 {
            (FailedPage::Alone, 0, true)
        } else {
            self.mf_file(pfn, &folio, head, handle)
        };
        drop(locked);
        // Perhaps the last one to have it.
        drop(folio);
        let out = |f: Found| f.word.is_hwpoison();
        let mut round = 0;
        while round < ROUNDS {
            if self.pages.map.lookup(pfn).is_some_and(out) {
                self.mf_close(pfn);
                return Step::Done(page, MfResult::Recovered, users, lost);
            }
            self.mf_wait(&mut round);
        }
        Step::Done(page, MfResult::Failed, users, lost)
    }

    /// A locked folio of a file, not under writeback.
    fn mf_file(&self, pfn: Pfn, folio: &Folio, head: Pfn, handle: u64) -> (FailedPage, u32, bool) {
        // SAFETY: a locked folio that belongs to a mapping keeps it.
        let mapping = unsafe { self.mapping_at(handle).as_ref() };
        // What the entries noted counts; and from now on a write is a fault that says so.
        if self.rmap_clean(folio, head) > 0 {
            self.folio_mark_dirty(folio, head);
        }
        let mut users = 0;
        if folio.has_flag(FolioFlags::DIRTY) {
            users = self.rmap_poison(folio, head, pfn, None);
            if self.order_of(head) > 0 {
                // It cannot be split, and its other pages are good: they stay.
                mapping.set_error();
                return (FailedPage::DirtyFile, users, true);
            }
        }
        while !self.rmap_unmap(folio, head, Unmap::Drop, None) {
            self.pages.platform.relax(63);
        }
        // A write may have slipped in before the last entry went.
        let dirty = folio.has_flag(FolioFlags::DIRTY);
        if dirty {
            mapping.set_error();
        }
        let page = if dirty {
            FailedPage::DirtyFile
        } else {
            FailedPage::CleanFile
        };
        if let Place::Private(_) = folio.place() {
            let private = self.folio_private(folio).unwrap_or(0);
            // SAFETY: it lives as long as the mapping.
            if !unsafe { &*mapping.ops() }.release_folio(private) {
                // Its filesystem keeps it.
                return (page, users, dirty);
            }
        }
        self.filemap_remove(mapping, folio, head);
        (page, users, dirty)
    }

    /// Pieces of a range between the bad pages that are out of use in it.
    pub(crate) fn good_pieces(&self, start: Pfn, pages: u32) -> impl Iterator<Item = (Pfn, u32)> {
        let end = start.0.saturating_add(pages);
        let mut at = start.0;
        let bad = move |pfn: u32| {
            let found = self.pages.map.lookup(Pfn(pfn));
            found.filter(|f| f.word.is_hwpoison())
        };
        core::iter::from_fn(move || {
            while at < end
                && let Some(found) = bad(at)
            {
                at = found.head.0 + (1 << found.word.order());
            }
            let first = at;
            while at < end && bad(at).is_none() {
                at += 1;
            }
            (first < end).then(|| (Pfn(first), at - first))
        })
    }
}
