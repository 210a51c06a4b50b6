//! The mapping itself, and what stands behind it.

use core::fmt;
use core::ptr::NonNull;

use crate::address::{Pfn, PhysAddr};
use crate::error::AllocError;
use crate::gfp;
use crate::lockdep::classes;
use crate::memcg::MemCgroup;
use crate::mm::{BuiltIn, Mm};
use crate::mmap::VmaList;
use crate::platform::{Holder, Platform};
use crate::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};
use crate::sync::{SpinGuard, SpinLock};
use crate::xarray::{MAX_INDEX, Node, NodeSource, Nodes, XArray};

/// Where the pages of a file come from and go to: a disk, a network, a test. Offsets and lengths are of whole pages.
pub trait MappingOps: Sync {
    /// Fills pages from this page of the file on. Called with the folio locked; may sleep.
    ///
    /// # Errors
    ///
    /// They could not be read: whoever wants them hears of it.
    fn read_folio(&self, index: u64, pages: &mut [u8]) -> Result<(), FileError>;

    /// Writes pages back. The folio is under writeback; may sleep, must not allocate with `__GFP_FS`.
    ///
    /// # Errors
    ///
    /// They could not be written: they stay dirty.
    fn writepage(&self, index: u64, pages: &[u8]) -> Result<(), FileError>;

    /// Memory is short: may what was attached to a folio go ([`Mm::folio_attach_private`])? If so, whatever it stood for is given up here. Called
    /// with the folio locked and clean; must not sleep for memory (`release_folio`). By default it stays, and its folio with it.
    fn release_folio(&self, _private: u64) -> bool {
        false
    }
}

/// Why a page of a file could not be had.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FileError {
    /// The file ends before.
    End,
    /// It could not be read or written.
    Io,
    /// There is no memory.
    Alloc(AllocError),
}

impl fmt::Display for FileError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            FileError::End => f.write_str("the file ends before"),
            FileError::Io => f.write_str("reading or writing failed"),
            FileError::Alloc(why) => write!(f, "out of memory: {why}"),
        }
    }
}

impl core::error::Error for FileError {}

impl From<AllocError> for FileError {
    fn from(why: AllocError) -> FileError {
        FileError::Alloc(why)
    }
}

/// A mapping's own data.
#[repr(C, align(16))]
pub(crate) struct MappingCore {
    pub(super) pages: XArray,
    /// Of the index.
    lock: SpinLock<()>,
    i_mmap: SpinLock<VmaList>,
    /// The handle, and the areas that map the file.
    refs: AtomicU32,
    /// Pages of the file.
    pub(super) size: AtomicU64,
    /// Pages in the cache.
    pub(super) nrpages: AtomicU64,
    /// Where readahead goes on, and how far it goes next: a page of the file, and a number of pages.
    pub(super) ra_next: AtomicU64,
    pub(super) ra_pages: AtomicU32,
    /// Something that was written to the file was lost, and nobody was told yet.
    error: AtomicU32,
    /// Whom its pages are charged to, if not to who wants them first; pinned.
    pub(super) memcg: AtomicU16,
    /// Outlives the memory manager's borrow in the handle and in the address spaces, which keep it.
    pub(super) ops: *const dyn MappingOps,
}

/// A file's pages in memory.
///
/// # Examples
///
/// ```
/// use memdesc::{Config, Mm, filemap::{FileError, Mapping, MappingOps}};
/// use memdesc_host::Host;
///
/// struct Zeroes;
/// impl MappingOps for Zeroes {
///     fn read_folio(&self, _index: u64, pages: &mut [u8]) -> Result<(), FileError> {
///         pages.fill(0);
///         Ok(())
///     }
///     fn writepage(&self, _index: u64, _pages: &[u8]) -> Result<(), FileError> {
///         Ok(())
///     }
/// }
/// let (host, ram) = Host::small(16384)?;
/// let mm = Mm::new(host, &Config::default(), &ram)?;
/// let file = Mapping::new(&mm, &Zeroes, 1000)?;
/// let folio = file.get(17)?;
/// assert_eq!(folio.refcount(), 2, "the cache's and ours");
/// drop(folio);
/// file.write(17 * 4096, b"dirty")?;
/// assert_eq!(file.writeback(0..=u64::MAX)?, 1);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Mapping<'m, P: Platform> {
    pub(crate) mm: &'m Mm<P>,
    core: NonNull<MappingCore>,
}

// SAFETY: a mapping is shared between CPUs by design; `ops` is `Sync`.
unsafe impl<P: Platform> Send for Mapping<'_, P> {}
// SAFETY: the same.
unsafe impl<P: Platform> Sync for Mapping<'_, P> {}

impl<'m, P: Platform> Mapping<'m, P> {
    /// An empty cache of a file of `size` pages (below 2^52: what an index can have).
    ///
    /// # Context
    ///
    /// May sleep, as all calls on mappings.
    ///
    /// # Errors
    ///
    /// No memory.
    pub fn new(mm: &'m Mm<P>, ops: &'m dyn MappingOps, size: u64) -> Result<Self, AllocError> {
        let object = mm.kmalloc(
            size_of::<MappingCore>().next_power_of_two(),
            gfp::GFP_KERNEL,
        )?;
        let core = object.cast::<MappingCore>();
        let ops: *const (dyn MappingOps + 'm) = ops;
        // SAFETY: only the lifetime changes; whoever follows the pointer does so through a handle or an address space that live no longer than 'm.
        let ops = unsafe {
            core::mem::transmute::<*const (dyn MappingOps + 'm), *const (dyn MappingOps + 'static)>(
                ops,
            )
        };
        // SAFETY: an object that large, aligned to its size, ours.
        unsafe {
            core.write(MappingCore {
                pages: XArray::new(),
                lock: SpinLock::new(()),
                i_mmap: SpinLock::new(VmaList::new()),
                refs: AtomicU32::new(1),
                size: AtomicU64::new(size.min(MAX_INDEX)),
                nrpages: AtomicU64::new(0),
                ra_next: AtomicU64::new(0),
                ra_pages: AtomicU32::new(0),
                error: AtomicU32::new(0),
                memcg: AtomicU16::new(0),
                ops,
            });
        }
        Ok(Mapping { mm, core })
    }

    pub(crate) fn core(&self) -> &MappingCore {
        // SAFETY: the handle has a reference.
        unsafe { self.core.as_ref() }
    }

    pub(crate) fn core_ptr(&self) -> NonNull<MappingCore> {
        self.core
    }

    /// Charges what is brought in from here on to this group, which stays until the file goes, as a zombie if need be. Without a group, as at first, whoever
    /// wants a page first is charged: an address space's group for its faults, else [`Platform::current_memcg`].
    ///
    /// # Errors
    ///
    /// [`AllocError::TooMany`] if too many keep the group.
    ///
    /// # Panics
    ///
    /// If the group belongs to another memory manager.
    pub fn set_memcg(&self, group: Option<&MemCgroup<'m, P>>) -> Result<(), AllocError> {
        assert!(
            group.is_none_or(|group| group.is_of(self.mm)),
            "another memory manager's group"
        );
        if group.is_some_and(|group| !group.group().counter.pin()) {
            return Err(AllocError::TooMany);
        }
        let memcg = group.map_or(0, MemCgroup::id);
        let before = self.core().memcg.swap(memcg, Ordering::AcqRel);
        // Who read it just now may charge somebody else: see `memcg::group`.
        self.mm.pages.memcg.unpin(before);
        Ok(())
    }

    /// Pages in the cache.
    pub fn nrpages(&self) -> u64 {
        self.core().nrpages.load(Ordering::Relaxed)
    }

    /// Was something lost that was written to the file? Says so once (`filemap_check_errors`).
    ///
    /// # Errors
    ///
    /// [`FileError::Io`] if so.
    pub fn check_errors(&self) -> Result<(), FileError> {
        match self.core().error.swap(0, Ordering::Relaxed) {
            0 => Ok(()),
            _ => Err(FileError::Io),
        }
    }

    /// Pages of the file.
    pub fn size(&self) -> u64 {
        self.core().size.load(Ordering::Relaxed)
    }
}

impl MappingCore {
    /// What stands behind it.
    pub(crate) fn ops(&self) -> *const dyn MappingOps {
        self.ops
    }

    /// Something that was written to the file is lost (`mapping_set_error`): who writes back next hears of it.
    pub(crate) fn set_error(&self) {
        self.error.store(1, Ordering::Relaxed);
    }

    /// Pages of the file.
    pub(crate) fn pages(&self) -> u64 {
        self.size.load(Ordering::Relaxed)
    }
}

impl<P: Platform> Drop for Mapping<'_, P> {
    /// The cache goes with the last area that maps the file, and with it what is dirty: write it back first.
    fn drop(&mut self) {
        self.mm.mapping_put(self.core);
    }
}

impl<P: Platform> fmt::Debug for Mapping<'_, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mapping")
            .field("size", &self.size())
            .field("nrpages", &self.nrpages())
            .finish_non_exhaustive()
    }
}

impl<P: Platform> Mm<P> {
    /// The number of a mapping for a folio's `mapping`.
    pub(crate) fn mapping_handle(&self, mapping: &MappingCore) -> u64 {
        self.pages.phys((&raw const *mapping).cast()).0 >> 4
    }

    /// The mapping that a locked folio says it belongs to.
    pub(crate) fn mapping_at(&self, handle: u64) -> NonNull<MappingCore> {
        let at = PhysAddr(handle << 4);
        match NonNull::new(self.pages.map.virt(at).cast()) {
            Some(core) => core,
            None => unreachable!("a mapping is nowhere at null"),
        }
    }

    /// One more has the mapping. The caller has a reference, or keeps one from going.
    pub(crate) fn mapping_get(&self, mapping: &MappingCore) {
        mapping.refs.fetch_add(1, Ordering::Relaxed);
    }

    /// One less; the last one drops what is cached.
    pub(crate) fn mapping_put(&self, mapping: NonNull<MappingCore>) {
        // SAFETY: the caller's reference.
        let core = unsafe { mapping.as_ref() };
        if core.refs.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.filemap_truncate(core, 0);
            // Who took the last folio out may still have the index locked (look-ups take no lock): reclaim has no reference to the mapping,
            // only a folio that belongs to it. He is done with both when he lets go.
            drop(self.i_pages(core));
            debug_assert!(core.nrpages.load(Ordering::Relaxed) == 0 && core.pages.is_empty());
            self.pages.memcg.unpin(core.memcg.load(Ordering::Relaxed));
            // SAFETY: from `kmalloc`; no folio, no area and no handle leads here any more.
            unsafe { self.kfree(mapping.cast()) };
        }
    }

    /// The areas that map the file, locked. May sleep.
    pub(crate) fn i_mmap<'a>(
        &'a self,
        mapping: &'a MappingCore,
    ) -> SpinGuard<'a, VmaList, Holder<'a, P>> {
        let holder = Holder::new(&self.pages.platform, true, &classes::I_MMAP);
        mapping.i_mmap.lock(holder)
    }

    /// The lock of the index.
    pub(super) fn i_pages<'a>(
        &'a self,
        mapping: &'a MappingCore,
    ) -> SpinGuard<'a, (), Holder<'a, P>> {
        let holder = Holder::new(&self.pages.platform, self.pages.rt, &classes::I_PAGES);
        mapping.lock.lock(holder)
    }

    /// Something with the index locked, that needs no nodes.
    pub(crate) fn with_index<R>(
        &self,
        mapping: &MappingCore,
        f: impl FnOnce(&mut crate::xarray::Locked<'_, '_, NodesOf<'_, P>>) -> R,
    ) -> R {
        let source = NodesOf(self);
        let mut none = Nodes::new(&source);
        let _lock = self.i_pages(mapping);
        // SAFETY: the lock is held until the end.
        f(&mut unsafe { mapping.pages.locked(&mut none) })
    }
}

/// Nodes of the index: objects of a cache whose frees after a grace period are paid for in advance.
pub(crate) struct NodesOf<'m, P: Platform>(pub(crate) &'m Mm<P>);

// SAFETY: nodes are objects of a cache of their size and alignment, and `free_rcu` frees after a grace period of the memory manager's RCU.
unsafe impl<P: Platform> NodeSource for NodesOf<'_, P> {
    fn alloc(&self) -> Option<NonNull<Node>> {
        let cache = self.0.built_in(BuiltIn::XaNode);
        let caller = core::panic::Location::caller();
        let object = self.0.cache_alloc(cache, gfp::GFP_KERNEL, caller).ok()?;
        Some(object.cast())
    }

    fn free(&self, node: NonNull<Node>) {
        // SAFETY: from `alloc`, and nobody ever saw it.
        unsafe { self.0.kfree(node.cast()) };
    }

    fn free_rcu(&self, node: NonNull<Node>) {
        // SAFETY: from `alloc`, a cache that is prepaid; unlinked.
        unsafe { self.0.kfree_rcu_prepaid(node.cast()) };
    }
}

/// A page number as an entry of the index.
pub(super) fn entry_of(head: Pfn) -> crate::xarray::Entry {
    match crate::xarray::Entry::new(u64::from(head.0)) {
        Some(entry) => entry,
        None => unreachable!("page 0 is nobody's"),
    }
}

/// And back.
pub(super) fn head_of(entry: crate::xarray::Entry) -> Pfn {
    Pfn(entry.get() as u32)
}
