//! vmalloc: memory that is contiguous by address and not by page, from a range of addresses that the platform can map as it likes.
//!
//! Each allocation is an *area* ([`VmArea`]): a place in the range, its pages, and a page after them (of a kernel stack, before them too) that
//! is never mapped. Its blocks keep their `struct buddy`, whose 8 bytes hold the address of the area: so from any page it is word, buddy, area,
//! and freeing needs no descriptor.
//!
//! - `tree`: which addresses are whose, and where there is room;
//! - `area`: an area's addresses from first to last, and their lazy return;
//! - `pages`: its pages, the list of them, and their translations;
//! - `kvmalloc`: contiguous pages if they are at hand, else an area;
//! - `stack`: kernel stacks;
//! - `view`: what is where.
//!
//! **The way back is lazy**, as in Linux. The translations and the pages go back at once; the addresses are kept until a *purge*, since before
//! they are used again every CPU has to forget what it knew of them, and once for a thousand areas costs what it costs for one.
//! Purges come when enough has piled up, when there is no room otherwise, and with [`Mm::tick`] and [`Mm::shrink`].
//!
//! **Contexts.** Translations are made and removed by the platform, which may want memory or other CPUs for it: so [`Mm::vmalloc`] may
//! sleep, and a free in any context but [`Context::Task`] is put on a stack that needs no lock, linked through the
//! dead memory itself, for the next free that may do it, or a tick.
//!
//! Lock order: `vmap_purge` (sleeps; held round a purge), then the lock of the tree, which is a leaf: nothing is allocated, freed or called
//! under it.
//!
//! Source: `mm/vmalloc.c` of Linux 6.18; seed 003 for what an area's pages lead to.

mod area;
mod kvmalloc;
mod pages;
mod stack;
mod tree;
mod view;

use core::panic::Location;
use core::ptr::NonNull;

use crate::address::{PAGE_SHIFT, PAGE_SIZE, PAGEBLOCK_ORDER, Pfn};
use crate::desc::{VmArea, VmAreaKind};
use crate::error::AllocError;
use crate::gfp::{self, Flags};
use crate::memcg::{Charge, area_stat};
use crate::memmap::BootSlice;
use crate::mm::Mm;
use crate::platform::{Context, Platform, might_sleep};
use crate::report::Corruption;
use crate::sync::atomic::AtomicU64;
use crate::sync::{PtrStack, SpinLock};

use area::Want;
pub use stack::KernelStack;
pub(crate) use stack::StackCache;
use tree::AreaTree;
pub use view::{AddressInfo, VmAreaView, VmallocInfo};

/// Places in the range are 32-bit; this many leave room for sums.
const MAX_PAGES: usize = 1 << 31;
/// A freed area of so many pages for each doubling of CPUs may wait for a purge (`lazy_max_pages`): 32 MiB.
const LAZY_PAGES: u64 = (32 << 20) >> PAGE_SHIFT;
/// Flags of a request that its descriptor and its list do not share: which memory, and what is done to it.
const NOT_NESTED: u32 = crate::slab::object::ZONE_FLAGS;

/// All of vmalloc's state.
pub(crate) struct Vmalloc {
    base: *mut u8,
    /// Pages in the range; 0 if the platform has none.
    pages: u32,
    tree: SpinLock<AreaTree>,
    /// One purge at a time, so that who needs room waits for one that is under way (`vmap_purge_lock`).
    purging: SpinLock<()>,
    /// Areas that wait for a purge, and how many pages of the range they keep.
    lazy: PtrStack<VmArea>,
    lazy_pages: AtomicU64,
    lazy_max: u64,
    purges: AtomicU64,
    /// Frees from other contexts, linked through what is freed.
    deferred: PtrStack<u8>,
    stacks: BootSlice<StackCache>,
    /// Where lists of blocks lie: bytes in slabs, pages of large kmalloc, pages of areas.
    pub(crate) lists: [AtomicU64; 3],
}

// SAFETY: the base is only an address to add to; what is reached through it is its owners' business.
unsafe impl Send for Vmalloc {}
// SAFETY: the same.
unsafe impl Sync for Vmalloc {}

impl Vmalloc {
    pub(crate) fn new<P: Platform>(platform: &P, stacks: BootSlice<StackCache>) -> Vmalloc {
        let (base, bytes) = match platform.vmalloc_range() {
            Some(range) => (range.cast::<u8>().as_ptr(), range.len()),
            None => (core::ptr::null_mut(), 0),
        };
        // Whole pages only.
        let cut = base.addr().next_multiple_of(PAGE_SIZE) - base.addr();
        let pages = (bytes.saturating_sub(cut) >> PAGE_SHIFT).min(MAX_PAGES) as u32;
        let cpus = u64::from(platform.nr_cpus().ilog2()) + 1;
        Vmalloc {
            base: base.wrapping_add(cut),
            pages,
            tree: SpinLock::new(AreaTree::new(pages)),
            purging: SpinLock::new(()),
            lazy: PtrStack::new(),
            lazy_pages: AtomicU64::new(0),
            lazy_max: cpus * LAZY_PAGES,
            purges: AtomicU64::new(0),
            deferred: PtrStack::new(),
            stacks,
            lists: [const { AtomicU64::new(0) }; 3],
        }
    }

    /// The address of a page of the range.
    fn at(&self, page: u32) -> *mut u8 {
        self.base.wrapping_add((page as usize) << PAGE_SHIFT)
    }

    /// The page of the range that an address lies in.
    #[inline]
    fn page_of(&self, addr: usize) -> Option<u32> {
        let page = addr.wrapping_sub(self.base.addr()) >> PAGE_SHIFT;
        (page < self.pages as usize).then_some(page as u32)
    }
}

impl<P: Platform> Mm<P> {
    /// At least `size` bytes, contiguous by address (`vmalloc`), in whole pages. Its pages are of any place in memory that the flags allow, and lead to
    /// [`Memory::Vmalloc`](crate::Memory::Vmalloc).
    ///
    /// # Context
    ///
    /// May sleep.
    ///
    /// # Errors
    ///
    /// [`AllocError::BadSize`] for 0 and for more than there is memory; [`AllocError::NoAddressSpace`] if the range is full, or the platform has
    /// none; [`AllocError::Forbidden`] for flags that do not let it sleep; else why there was no memory. Nothing is left behind.
    ///
    /// # Examples
    ///
    /// ```
    /// use memdesc::gfp::GFP_KERNEL;
    /// use memdesc::{Config, Mm};
    /// use memdesc_host::Host;
    ///
    /// let (host, ranges) = Host::small(4096).unwrap();
    /// let mm = Mm::new(host, &Config::default(), &ranges).unwrap();
    /// // More than the page allocator has in one piece.
    /// let ptr = mm.vmalloc(5 << 20, GFP_KERNEL).unwrap();
    /// // SAFETY: ours, 5 MiB long, and freed once.
    /// unsafe {
    ///     ptr.add((5 << 20) - 1).write(42);
    ///     mm.vfree(ptr);
    /// }
    /// ```
    #[track_caller]
    pub fn vmalloc(&self, size: usize, gfp: Flags) -> Result<NonNull<u8>, AllocError> {
        self.vmalloc_order(size, gfp, 0, Location::caller())
    }

    /// [`vmalloc`](Self::vmalloc) of memory that reads zero (`vzalloc`).
    ///
    /// # Context
    ///
    /// May sleep.
    ///
    /// # Errors
    ///
    /// As [`vmalloc`](Self::vmalloc).
    #[track_caller]
    pub fn vzalloc(&self, size: usize, gfp: Flags) -> Result<NonNull<u8>, AllocError> {
        self.vmalloc_order(size, gfp | gfp::__GFP_ZERO, 0, Location::caller())
    }

    /// [`vmalloc`](Self::vmalloc) from blocks of 2 MiB, aligned to 2 MiB, if the size is worth one and they are to be had (`vmalloc_huge`): the
    /// platform can then map it with large pages. The size is rounded up to 2 MiB then.
    ///
    /// # Context
    ///
    /// May sleep.
    ///
    /// # Errors
    ///
    /// As [`vmalloc`](Self::vmalloc).
    #[track_caller]
    pub fn vmalloc_huge(&self, size: usize, gfp: Flags) -> Result<NonNull<u8>, AllocError> {
        let caller = Location::caller();
        if size >= PAGE_SIZE << PAGEBLOCK_ORDER {
            let lightly = gfp::__GFP_NORETRY | gfp::__GFP_NOWARN;
            let lightly = Flags::from_bits(gfp.bits() & !gfp::__GFP_NOFAIL.bits()) | lightly;
            if let Ok(ptr) = self.vmalloc_order(size, lightly, PAGEBLOCK_ORDER, caller) {
                return Ok(ptr);
            }
        }
        self.vmalloc_order(size, gfp, 0, caller)
    }

    fn vmalloc_order(
        &self,
        size: usize,
        gfp: Flags,
        order: usize,
        caller: &'static Location<'static>,
    ) -> Result<NonNull<u8>, AllocError> {
        if size == 0 || size as u64 > self.boot.ram {
            return Err(AllocError::BadSize);
        }
        let want = Want {
            kind: VmAreaKind::Vmalloc,
            pages: size.div_ceil(PAGE_SIZE).next_multiple_of(1 << order),
            order,
            lead: 0,
            caller,
        };
        let area = self.alloc_area(&want, gfp)?;
        // SAFETY: just made, and nobody else's yet.
        self.area_ptr(unsafe { area.as_ref() })
    }

    /// An area with pages of its own, mapped and live.
    fn alloc_area(&self, want: &Want, gfp: Flags) -> Result<NonNull<VmArea>, AllocError> {
        if !gfp.allow_blocking() || gfp.contains(gfp::__GFP_FAST_TRY) {
            return Err(AllocError::Forbidden);
        }
        might_sleep(&self.pages.platform, "vmalloc");
        self.vfree_deferred();
        let bytes = (want.pages * PAGE_SIZE) as u64;
        let memcg = self.memcg_for(gfp);
        let charge = self.memcg_charge(memcg, bytes, area_stat(want.kind), gfp)?;
        let area = self.new_area(want, gfp)?;
        match self.fill_area(area, want, gfp) {
            Ok(()) => {
                // SAFETY: just made, and nobody else's yet.
                unsafe { area.as_ref() }.set_memcg(charge.map_or(0, Charge::keep));
                Ok(area)
            }
            Err(why) => {
                self.undo_area(area);
                Err(why)
            }
        }
    }

    /// Maps pages that the caller has at addresses one after the other (`vmap`). They stay his, whatever type they are of, and he keeps them until
    /// [`vunmap`](Self::vunmap).
    ///
    /// # Safety
    ///
    /// The caller may read and write the pages as long as they are mapped: they are his, or those whose they are know of it.
    ///
    /// # Context
    ///
    /// May sleep.
    ///
    /// # Errors
    ///
    /// As [`vmalloc`](Self::vmalloc); also [`AllocError::BadSize`] for a page that is no RAM.
    ///
    /// # Examples
    ///
    /// ```
    /// use memdesc::gfp::GFP_KERNEL;
    /// use memdesc::{Config, Mm, PAGE_SIZE};
    /// use memdesc_host::Host;
    ///
    /// let (host, ranges) = Host::small(1024).unwrap();
    /// let mm = Mm::new(host, &Config::default(), &ranges).unwrap();
    /// let a = mm.alloc_pages(GFP_KERNEL, 0).unwrap();
    /// let b = mm.alloc_pages(GFP_KERNEL, 0).unwrap();
    /// // SAFETY: the pages are ours, and unmapped before they are freed.
    /// unsafe {
    ///     let both = mm.vmap(&[b, a]).unwrap();
    ///     both.add(PAGE_SIZE).write(7);
    ///     assert_eq!(mm.page_address(a).read(), 7);
    ///     mm.vunmap(both);
    ///     mm.free_pages(a);
    ///     mm.free_pages(b);
    /// }
    /// ```
    #[track_caller]
    pub unsafe fn vmap(&self, pages: &[Pfn]) -> Result<NonNull<u8>, AllocError> {
        let ram = |pfn: &Pfn| self.pages.map.region(*pfn).is_some();
        if pages.is_empty() || !pages.iter().all(ram) {
            return Err(AllocError::BadSize);
        }
        might_sleep(&self.pages.platform, "vmap");
        self.vfree_deferred();
        let want = Want {
            kind: VmAreaKind::Vmap,
            pages: pages.len(),
            order: 0,
            lead: 0,
            caller: Location::caller(),
        };
        let area = self.new_area(&want, gfp::GFP_KERNEL)?;
        match self.borrow_pages(area, pages) {
            // SAFETY: just made, and nobody else's yet.
            Ok(()) => self.area_ptr(unsafe { area.as_ref() }),
            Err(why) => {
                self.undo_area(area);
                Err(why)
            }
        }
    }

    /// Frees what [`vmalloc`](Self::vmalloc) and its kin gave (`vfree`). Its pages go back at once. Another address is reported to the platform.
    ///
    /// # Safety
    ///
    /// `ptr` is from them, and nobody uses the memory any more.
    ///
    /// # Context
    ///
    /// Any. In a thread that may sleep it is done on the spot; elsewhere the first bytes of the memory link it into a list that the next free in such a thread,
    /// or a tick, works off (`vfree_atomic`). Allocates nothing, cannot fail.
    #[track_caller]
    pub unsafe fn vfree(&self, ptr: NonNull<u8>) {
        let caller = Location::caller();
        if self.may_free_here() {
            self.vfree_deferred();
            return self.free_area(ptr, caller, |kind| kind == VmAreaKind::Vmalloc);
        }
        // SAFETY: the caller's promise.
        unsafe { self.defer_area(ptr, caller) };
    }

    /// Puts memory on the stack of what waits to be freed. From any context.
    ///
    /// # Safety
    ///
    /// It is the start of an area with pages of its own, and nobody uses it any more.
    unsafe fn defer_area(&self, ptr: NonNull<u8>, caller: &'static Location<'static>) {
        if !self.is_vmalloc_addr(ptr.as_ptr()) || !ptr.addr().get().is_multiple_of(PAGE_SIZE) {
            return self.report_area(Corruption::NotRam, ptr, caller);
        }
        let link = ptr.cast::<*mut u8>();
        // SAFETY: the start of dead memory that is still mapped, page aligned.
        let set = |next| unsafe { link.write(next) };
        self.vmalloc.deferred.push(ptr.as_ptr(), set);
        self.pages.platform.kick();
    }

    /// Frees what could not be freed where it was. Says how many areas.
    pub(crate) fn vfree_deferred(&self) -> usize {
        let mut freed = 0;
        // Again and again: what is freed may have a list that is itself an area, and is put there then.
        while !self.vmalloc.deferred.is_empty() {
            let mut at = self.vmalloc.deferred.take();
            crate::inject::point("vfree: taken");
            while let Some(ptr) = NonNull::new(at) {
                // SAFETY: what is in the stack holds its link, written by who pushed it.
                at = unsafe { ptr.cast::<*mut u8>().read() };
                self.free_area(ptr, Location::caller(), |kind| kind != VmAreaKind::Vmap);
                freed += 1;
            }
        }
        freed
    }

    /// Takes the translations of [`vmap`](Self::vmap) away again (`vunmap`). The pages are the caller's, as before.
    ///
    /// # Safety
    ///
    /// `ptr` is from [`vmap`](Self::vmap), and nobody uses these addresses any more.
    ///
    /// # Context
    ///
    /// A thread that may sleep.
    #[track_caller]
    pub unsafe fn vunmap(&self, ptr: NonNull<u8>) {
        might_sleep(&self.pages.platform, "vunmap");
        self.free_area(ptr, Location::caller(), |kind| kind == VmAreaKind::Vmap);
    }

    /// A live area ends: translations, pages and list go, the addresses wait for a purge.
    fn free_area(
        &self,
        ptr: NonNull<u8>,
        caller: &'static Location<'static>,
        is_right: impl Fn(VmAreaKind) -> bool,
    ) {
        match self.claim_area(ptr.addr().get(), is_right) {
            Ok(area) => {
                self.empty_area(area);
                self.retire_area(area);
            }
            Err(what) => self.report_area(what, ptr, caller),
        }
    }

    #[cold]
    fn report_area(&self, what: Corruption, ptr: NonNull<u8>, caller: &'static Location<'static>) {
        if !self.is_vmalloc_addr(ptr.as_ptr()) {
            // Perhaps of another call's memory.
            let found = self.where_is(ptr.as_ptr());
            let what = match found {
                Err(Corruption::NotRam) => what,
                _ => Corruption::WrongType,
            };
            return self.report_object(what, None, ptr.as_ptr(), caller);
        }
        // Which page it leads to is known under a lock only.
        let look = |this: &Self| this.vmalloc_to_pfn(ptr.as_ptr());
        let pfn = self.may_free_here().then(|| look(self)).flatten();
        let pfn = pfn.unwrap_or(Pfn::NONE);
        let report = self.report_at(what, pfn, ptr.addr().get(), caller);
        self.pages.platform.corruption(&report);
    }

    /// Is this an address of the vmalloc range (`is_vmalloc_addr`)?
    ///
    /// # Context
    ///
    /// Any.
    #[inline]
    pub fn is_vmalloc_addr(&self, ptr: *const u8) -> bool {
        self.vmalloc.page_of(ptr.addr()).is_some()
    }

    /// What was freed elsewhere is freed, and with `purge` addresses come back. Not in interrupts, where other CPUs cannot be waited for.
    pub(crate) fn vmalloc_work(&self, purge: bool) {
        if self.pages.platform.context() <= Context::Atomic {
            self.vfree_deferred();
            if purge {
                self.purge_areas(false);
            }
        }
    }

    /// Memory or addresses are short: all that is kept for later goes. Says how many areas that were. `wait` for a purge that is under way.
    pub(crate) fn vmalloc_shrink(&self, wait: bool) -> usize {
        self.vfree_deferred() + self.drop_cached_stacks() + self.purge_areas(wait)
    }
}
