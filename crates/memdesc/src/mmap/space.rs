//! An address space (`mm_struct`): its areas, its page tables, its family.

use core::marker::PhantomData;
use core::ptr::NonNull;

use super::family::Family;
use super::vma::{Map, VmFlags, Vma, VmaView};
use crate::address::{PAGE_SIZE, Pfn};
use crate::error::AllocError;
use crate::gfp::{self, Flags};
use crate::lockdep::classes;
use crate::memcg::MemCgroup;
use crate::mm::Mm;
use crate::platform::{Holder, Platform};
use crate::sync::atomic::{AtomicPtr, AtomicU64, Ordering};
use crate::sync::{RwGuard, RwLock};

/// Where areas may be: above the first 64 KiB, so that null pointers fault, and in the lower half.
const LOWEST: u64 = 0x1_0000;
const HIGHEST: u64 = 1 << 47;

/// An address space's own data.
pub(crate) struct SpaceCore {
    pub(crate) root: Pfn,
    pub(crate) asid: u64,
    lock: RwLock,
    /// The first area. Read with the lock, changed with it for writing.
    first: AtomicPtr<Vma>,
    pub(super) family: NonNull<Family>,
    /// Under the family's lock.
    pub(super) family_next: AtomicPtr<SpaceCore>,
    /// One past the highest address: of a hosted space, the length of its window.
    top: u64,
    anon: AtomicU64,
    file: AtomicU64,
}

/// Pages mapped (`rss_stat`).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Rss {
    /// Anonymous.
    pub anon: u64,
    /// Of files.
    pub file: u64,
}

impl SpaceCore {
    /// All areas, by address. With the lock.
    pub(super) fn vmas(&self) -> impl Iterator<Item = &Vma> {
        let mut at = self.first.load(Ordering::Relaxed);
        core::iter::from_fn(move || {
            // SAFETY: areas are taken out under the lock for writing before they go, and the caller has the lock.
            let vma = unsafe { at.as_ref() }?;
            at = vma.next.load(Ordering::Relaxed);
            Some(vma)
        })
    }

    /// The area that this address is in. With the lock.
    pub(super) fn find_vma(&self, addr: u64) -> Option<&Vma> {
        self.vmas()
            .find(|vma| addr < vma.end())
            .filter(|vma| addr >= vma.start())
    }

    pub(super) fn count(&self, anon: bool, pages: u64) {
        let counter = if anon { &self.anon } else { &self.file };
        counter.fetch_add(pages, Ordering::Relaxed);
    }
}

/// An address space of users.
///
/// # Examples
///
/// ```
/// use memdesc::{Config, Mm, mmap::{Map, MmStruct, VmFlags}};
/// use memdesc_host::Host;
///
/// let (host, ram) = Host::small(16384)?;
/// let mm = Mm::new(host, &Config::default(), &ram)?;
/// let parent = MmStruct::new(&mm, 1)?;
/// let at = parent.mmap(None, 1 << 20, VmFlags::READ_WRITE, Map::Anon)?;
/// parent.write(at, b"hello")?;
///
/// let child = parent.fork(2)?;
/// child.write(at, b"jolly")?; // copies the page
/// let mut seen = [0; 5];
/// parent.read(at, &mut seen)?;
/// assert_eq!(&seen, b"hello");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// What stands behind a file outlives all who map it:
///
/// ```compile_fail,E0597
/// # use memdesc::{Config, Mm, filemap::{FileError, Mapping, MappingOps}, mmap::{Map, MmStruct, VmFlags}};
/// # struct Zeroes(u8);
/// # impl MappingOps for Zeroes {
/// #     fn read_folio(&self, _: u64, pages: &mut [u8]) -> Result<(), FileError> { pages.fill(self.0); Ok(()) }
/// #     fn writepage(&self, _: u64, _: &[u8]) -> Result<(), FileError> { Ok(()) }
/// # }
/// # let (host, ram) = memdesc_host::Host::small(16384).unwrap();
/// # let mm = Mm::new(host, &Config::default(), &ram).unwrap();
/// let space = MmStruct::new(&mm, 1).unwrap();
/// {
///     let disk = Zeroes(0);
///     let file = Mapping::new(&mm, &disk, 10).unwrap();
///     space.mmap(None, 4096, VmFlags::READ, Map::File(&file, 0)).unwrap();
/// }
/// ```
pub struct MmStruct<'m, P: Platform> {
    pub(super) mm: &'m Mm<P>,
    core: NonNull<SpaceCore>,
    /// Neither longer nor shorter: a space keeps the files that it maps, and with them what stands behind them, which lives for `'m` and no longer.
    _files: PhantomData<fn(&'m ()) -> &'m ()>,
}

// SAFETY: an address space is shared between CPUs by design; its lists change under its lock.
unsafe impl<P: Platform> Send for MmStruct<'_, P> {}
// SAFETY: the same.
unsafe impl<P: Platform> Sync for MmStruct<'_, P> {}

/// The `mmap_lock`.
pub(super) type MmapGuard<'a, P> = RwGuard<'a, Holder<'a, P>>;

impl<'m, P: Platform> MmStruct<'m, P> {
    /// An empty address space. `asid` is what [`Platform::flush_tlb`] will hear of it.
    ///
    /// # Context
    ///
    /// May sleep, as all calls on address spaces.
    ///
    /// # Errors
    ///
    /// No memory.
    pub fn new(mm: &'m Mm<P>, asid: u64) -> Result<Self, AllocError> {
        let family = mm.family_new(gfp::GFP_KERNEL)?;
        let space = Self::in_family(mm, asid, family, HIGHEST, mm.active_memcg());
        // A member has a reference of its own.
        mm.family_put(family);
        space
    }

    /// An empty address space that ends at `top`: of a hosted one, the length of its window.
    ///
    /// # Errors
    ///
    /// No memory.
    pub fn with_top(mm: &'m Mm<P>, asid: u64, top: u64) -> Result<Self, AllocError> {
        let family = mm.family_new(gfp::GFP_KERNEL)?;
        let space = Self::in_family(mm, asid, family, top.min(HIGHEST), mm.active_memcg());
        mm.family_put(family);
        space
    }

    /// An empty address space that joins a family.
    pub(super) fn in_family(
        mm: &'m Mm<P>,
        asid: u64,
        family: NonNull<Family>,
        top: u64,
        memcg: u16,
    ) -> Result<Self, AllocError> {
        let root = mm.new_table(gfp::GFP_KERNEL, asid, 4, 0, memcg)?;
        let object = match mm.kmalloc(size_of::<SpaceCore>(), gfp::GFP_KERNEL) {
            Ok(object) => object,
            Err(why) => {
                // SAFETY: ours alone.
                unsafe { mm.free_pages(root) };
                return Err(why);
            }
        };
        let core = object.cast::<SpaceCore>();
        // SAFETY: an object of that size, ours.
        unsafe {
            core.write(SpaceCore {
                root,
                asid,
                lock: RwLock::new(),
                first: AtomicPtr::new(core::ptr::null_mut()),
                family,
                family_next: AtomicPtr::new(core::ptr::null_mut()),
                top,
                anon: AtomicU64::new(0),
                file: AtomicU64::new(0),
            });
        }
        let space = MmStruct {
            mm,
            core,
            _files: PhantomData,
        };
        mm.family_join(family, space.core());
        Ok(space)
    }

    pub(super) fn core(&self) -> &SpaceCore {
        // SAFETY: it lives as long as the handle.
        unsafe { self.core.as_ref() }
    }

    /// The memory manager it belongs to.
    pub fn mm(&self) -> &'m Mm<P> {
        self.mm
    }

    /// The root of its page tables: what goes into CR3.
    pub fn root(&self) -> Pfn {
        self.core().root
    }

    /// The number it was made with.
    pub fn asid(&self) -> u64 {
        self.core().asid
    }

    /// The group that its pages and tables are charged to; 0 for nobody. A new space begins with [`Platform::current_memcg`]'s, a forked one with its
    /// parent's. The charge for the root of its tables keeps the group.
    pub fn memcg(&self) -> u16 {
        self.mm.memcg_of_table(self.root())
    }

    /// Charges to this group from here on, or to nobody. What it has stays charged as it is, but for the root of its tables, which goes along
    /// (`mem_cgroup_attach_task`, without moving charges, as in the second version of cgroups).
    ///
    /// # Errors
    ///
    /// [`AllocError::Limit`] if not even the root fits. Everything is as it was then.
    ///
    /// # Panics
    ///
    /// If the group belongs to another memory manager.
    pub fn set_memcg(&self, group: Option<&MemCgroup<'m, P>>) -> Result<(), AllocError> {
        assert!(
            group.is_none_or(|group| group.is_of(self.mm)),
            "another memory manager's group"
        );
        let _lock = self.write_lock();
        let memcg = group.map_or(0, MemCgroup::id);
        self.mm.memcg_move_table(self.root(), memcg)
    }

    /// One past its highest address.
    pub fn top(&self) -> u64 {
        self.core().top
    }

    /// Pages mapped.
    pub fn rss(&self) -> Rss {
        Rss {
            anon: self.core().anon.load(Ordering::Relaxed),
            file: self.core().file.load(Ordering::Relaxed),
        }
    }

    pub(super) fn read_lock(&self) -> MmapGuard<'_, P> {
        let platform = &self.mm.pages.platform;
        let holder = Holder::new(platform, true, &classes::MMAP);
        self.core().lock.read(holder)
    }

    pub(super) fn write_lock(&self) -> MmapGuard<'_, P> {
        let platform = &self.mm.pages.platform;
        let holder = Holder::new(platform, true, &classes::MMAP);
        self.core().lock.write(holder)
    }

    /// Visits all areas, by address (`/proc/pid/maps`).
    pub fn for_each_vma(&self, visit: impl FnMut(VmaView)) {
        let _lock = self.read_lock();
        let view = |vma: &Vma| VmaView {
            start: vma.start(),
            end: vma.end(),
            flags: vma.flags(),
            file: vma.mapping.is_some(),
            pgoff: vma.pgoff(),
        };
        self.core().vmas().map(view).for_each(visit);
    }

    /// Maps `len` bytes at this address, or where there is room, replacing nothing (`mmap` with `MAP_FIXED_NOREPLACE`): the pages come
    /// with the first access.
    ///
    /// # Errors
    ///
    /// [`AllocError::Busy`] if something is mapped there; [`AllocError::NoZone`] if there is no room, or outside of the address space;
    /// [`AllocError::BadSize`] for no bytes, an address that is not a page's, pages that no file can have, a file of another memory manager, or
    /// anonymous memory that is to be shared (that would be a file without a name); no memory.
    pub fn mmap(
        &self,
        addr: Option<u64>,
        len: u64,
        flags: VmFlags,
        what: Map<'_, 'm, P>,
    ) -> Result<u64, AllocError> {
        let page = PAGE_SIZE as u64;
        let len = len.checked_next_multiple_of(page).unwrap_or(0);
        if len == 0 || addr.is_some_and(|a| !a.is_multiple_of(page)) {
            return Err(AllocError::BadSize);
        }
        let fits = match &what {
            Map::Anon => !flags.contains(VmFlags::SHARED),
            Map::File(file, pgoff) => {
                let end = pgoff.checked_add(len / page);
                core::ptr::eq(file.mm, self.mm)
                    && end.is_some_and(|end| end <= crate::xarray::MAX_INDEX)
            }
        };
        if !fits {
            return Err(AllocError::BadSize);
        }
        let object = self.mm.kmalloc(size_of::<Vma>(), gfp::GFP_KERNEL)?;
        let lock = self.write_lock();
        let start = match self.room(addr, len, flags) {
            Ok(start) => start,
            Err(why) => {
                drop(lock);
                // SAFETY: ours.
                unsafe { self.mm.kfree(object) };
                return Err(why);
            }
        };
        let (mapping, pgoff) = match what {
            Map::Anon => (None, start / page),
            Map::File(file, pgoff) => (Some(file.core_ptr()), pgoff),
        };
        let vma = object.cast::<Vma>();
        // SAFETY: an object of that size, ours.
        unsafe {
            vma.write(Vma::new(
                self.core,
                start,
                start + len,
                flags,
                mapping,
                pgoff,
            ));
        }
        // SAFETY: just written.
        unsafe { self.link(vma) };
        Ok(start)
    }

    /// Where an area can go.
    fn room(&self, addr: Option<u64>, len: u64, flags: VmFlags) -> Result<u64, AllocError> {
        let core = self.core();
        if let Some(start) = addr {
            let end = start.checked_add(len).filter(|&end| end <= core.top);
            let end = end.filter(|_| start >= LOWEST).ok_or(AllocError::NoZone)?;
            let taken = core.vmas().any(|v| v.start() < end && start < v.end());
            return if taken {
                Err(AllocError::Busy)
            } else {
                Ok(start)
            };
        }
        // Where pages of 2 MiB are welcome, so that they fit.
        let align = if flags.contains(VmFlags::HUGE) && len >= 2 << 20 {
            2 << 20
        } else {
            PAGE_SIZE as u64
        };
        // Below 2^48 from here on, and so are all sums.
        if len > HIGHEST {
            return Err(AllocError::NoZone);
        }
        let mut start = LOWEST.next_multiple_of(align);
        for vma in core.vmas() {
            if start + len <= vma.start() {
                break;
            }
            start = vma.end().next_multiple_of(align).max(start);
        }
        if start + len <= core.top {
            Ok(start)
        } else {
            Err(AllocError::NoZone)
        }
    }

    /// Enters an area: into the list, and into its file's.
    ///
    /// # Safety
    ///
    /// A new area of this space that overlaps none. With the lock for writing, or of a space that nobody else has.
    pub(super) unsafe fn link(&self, vma: NonNull<Vma>) {
        // SAFETY: the caller's promise.
        unsafe { self.link_after(vma, || {}) };
    }

    /// The same, for the upper part of an area that `cut` cuts short: nobody who goes through the file's list sees one without the other, or he would
    /// miss what the upper part maps.
    ///
    /// # Safety
    ///
    /// As for `link`, after `cut`.
    unsafe fn link_after(&self, vma: NonNull<Vma>, cut: impl FnOnce()) {
        // SAFETY: the caller's promise.
        let this = unsafe { vma.as_ref() };
        if let Some(mapping) = this.mapping {
            // SAFETY: a mapping lives as long as areas map it.
            let mapping = unsafe { mapping.as_ref() };
            self.mm.mapping_get(mapping);
            let mut list = self.mm.i_mmap(mapping);
            cut();
            // SAFETY: new, and taken out before it goes.
            unsafe { list.insert(vma) };
        } else {
            cut();
        }
        let core = self.core();
        let before = core.vmas().take_while(|v| v.start() < this.start()).last();
        let place = before.map_or(&core.first, |v| &v.next);
        this.next
            .store(place.load(Ordering::Relaxed), Ordering::Relaxed);
        place.store(vma.as_ptr(), Ordering::Relaxed);
    }

    /// Takes the area that starts here out of the lists and frees it; what it maps is unmapped already. With the lock for writing.
    fn unlink(&self, start: u64) {
        let core = self.core();
        let before = core.vmas().take_while(|v| v.start() < start).last();
        let place = before.map_or(&core.first, |v| &v.next);
        // By the list's own pointer: one from a reference may be read by, not freed by.
        let Some(vma) = NonNull::new(place.load(Ordering::Relaxed)) else {
            unreachable!("the area is in the list")
        };
        // SAFETY: in the list, and the lock is held for writing.
        let this = unsafe { vma.as_ref() };
        debug_assert_eq!(this.start(), start);
        place.store(this.next.load(Ordering::Relaxed), Ordering::Relaxed);
        if let Some(mapping) = this.mapping {
            // SAFETY: a mapping lives as long as areas map it.
            let mapping = unsafe { mapping.as_ref() };
            // SAFETY: `link` put it there.
            unsafe { self.mm.i_mmap(mapping).remove(vma) };
        }
        if let Some(mapping) = this.mapping {
            self.mm.mapping_put(mapping);
        }
        // SAFETY: from `kmalloc`, and in no list any more.
        unsafe { self.mm.kfree(vma.cast()) };
    }

    /// Cuts the areas so that one starts at `at`, if any reaches across it. Takes `spare` if it needs it.
    fn split_at(&self, at: u64, spare: &mut Option<NonNull<u8>>) {
        let Some(vma) = self.core().vmas().find(|v| v.start() < at && at < v.end()) else {
            return;
        };
        let Some(object) = spare.take() else {
            unreachable!("an area for each end")
        };
        let new = object.cast::<Vma>();
        let upper = Vma::new(
            self.core,
            at,
            vma.end(),
            vma.flags(),
            vma.mapping,
            vma.index(at),
        )
        .mixed_like(vma);
        // SAFETY: an object of that size, ours.
        unsafe { new.write(upper) };
        // SAFETY: just written; the rest of the old one is cut off.
        unsafe { self.link_after(new, || vma.set_end(at)) };
    }

    /// Does something with all areas from `start` to `end`, cut to that, and with the lock for writing.
    fn change(
        &self,
        start: u64,
        len: u64,
        f: impl FnOnce(&Self, u64, u64),
    ) -> Result<(), AllocError> {
        let page = PAGE_SIZE as u64;
        let end = start
            .checked_add(len.checked_next_multiple_of(page).unwrap_or(0))
            .filter(|&end| end > start && start.is_multiple_of(page))
            .ok_or(AllocError::BadSize)?;
        // Before the lock: an area for each end, since a hole in the middle of one makes two.
        let mut spare = [None, None];
        for place in &mut spare {
            match self.mm.kmalloc(size_of::<Vma>(), gfp::GFP_KERNEL) {
                Ok(object) => *place = Some(object),
                Err(why) => {
                    self.drop_spare(spare);
                    return Err(why);
                }
            }
        }
        {
            let _lock = self.write_lock();
            self.split_at(start, &mut spare[0]);
            self.split_at(end, &mut spare[1]);
            f(self, start, end);
        }
        self.drop_spare(spare);
        Ok(())
    }

    fn drop_spare(&self, spare: [Option<NonNull<u8>>; 2]) {
        for object in spare.into_iter().flatten() {
            // SAFETY: from `kmalloc`, not used.
            unsafe { self.mm.kfree(object) };
        }
    }

    /// Unmaps a range; where nothing is mapped, nothing happens (`munmap`).
    ///
    /// # Errors
    ///
    /// [`AllocError::BadSize`] for no bytes or an address that is not a page's; no memory for the area that a hole makes.
    pub fn munmap(&self, start: u64, len: u64) -> Result<(), AllocError> {
        self.change(start, len, |space, start, end| {
            space.mm.zap_range(space.core(), start, end);
            space.unlink_range(start, end);
            space.mm.free_page_tables(space.core(), start, end);
        })
    }

    fn unlink_range(&self, start: u64, end: u64) {
        while let Some(vma) = self
            .core()
            .vmas()
            .find(|v| v.start() >= start && v.end() <= end)
        {
            self.unlink(vma.start());
        }
    }

    /// Changes what may be done in a range (`mprotect`).
    ///
    /// # Errors
    ///
    /// As [`munmap`](Self::munmap).
    pub fn mprotect(&self, start: u64, len: u64, flags: VmFlags) -> Result<(), AllocError> {
        self.change(start, len, |space, start, end| {
            let rights = VmFlags::READ_WRITE.with(VmFlags::EXEC);
            let rest = flags.without(flags.without(rights));
            for vma in space.core().vmas() {
                if vma.start() >= start && vma.end() <= end {
                    vma.set_flags(vma.flags().without(rights).with(rest));
                }
            }
            // Less may be done from now on: rights come back with the next fault.
            space
                .mm
                .protect_range(space.core(), start, end, rest.prot());
        })
    }

    pub(super) fn gfp() -> Flags {
        gfp::GFP_KERNEL
    }
}

impl<P: Platform> Drop for MmStruct<'_, P> {
    /// The address space goes (`exit_mmap`).
    fn drop(&mut self) {
        let core = self.core();
        self.mm.zap_range(core, 0, core.top);
        self.mm.pages.platform.flush_tlb(core.asid, 0, core.top);
        {
            let _lock = self.write_lock();
            self.unlink_range(0, u64::MAX);
        }
        self.mm.family_leave(core);
        self.mm.free_tables(core.root, 4);
        // SAFETY: from `kmalloc`; out of its family's list, so nobody else leads here.
        unsafe { self.mm.kfree(self.core.cast()) };
    }
}

impl<P: Platform> core::fmt::Debug for MmStruct<'_, P> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("MmStruct")
            .field("asid", &self.asid())
            .field("rss", &self.rss())
            .finish_non_exhaustive()
    }
}
