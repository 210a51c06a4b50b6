//! Areas of an address space (`vm_area_struct`), by address, and the areas that map a file.

use core::ptr::NonNull;

use super::space::SpaceCore;
use crate::filemap::{Mapping, MappingCore};
use crate::pgtable::Prot;
use crate::platform::Platform;
use crate::sync::atomic::{AtomicPtr, AtomicU32, AtomicU64, Ordering};

/// What may be done in an area, and how its memory comes to be.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(transparent)]
pub struct VmFlags(u32);

impl VmFlags {
    /// May be read.
    pub const READ: VmFlags = VmFlags(1 << 0);
    /// May be written.
    pub const WRITE: VmFlags = VmFlags(1 << 1);
    /// May be executed.
    pub const EXEC: VmFlags = VmFlags(1 << 2);
    /// What is written goes to the file, and others see it.
    pub const SHARED: VmFlags = VmFlags(1 << 3);
    /// Pages of 2 MiB are welcome (`MADV_HUGEPAGE`).
    pub const HUGE: VmFlags = VmFlags(1 << 4);
    /// Anonymous memory comes in folios of 64 KiB mapped by page where there is room (multi-size THP).
    pub const LARGE: VmFlags = VmFlags(1 << 5);
    /// To be read and written.
    pub const READ_WRITE: VmFlags = VmFlags(0b11);

    /// All of both.
    #[must_use]
    pub const fn with(self, other: VmFlags) -> VmFlags {
        VmFlags(self.0 | other.0)
    }

    /// Without these.
    #[must_use]
    pub const fn without(self, other: VmFlags) -> VmFlags {
        VmFlags(self.0 & !other.0)
    }

    /// Are all of these in it?
    pub const fn contains(self, other: VmFlags) -> bool {
        self.0 & other.0 == other.0
    }

    /// What an entry for a page of the area allows at first: not to write. Users have no business where nothing may be done.
    pub(crate) fn prot(self) -> Prot {
        let any = VmFlags::READ_WRITE.with(VmFlags::EXEC);
        match (self.contains(VmFlags::EXEC), self.0 & any.0) {
            (true, _) => Prot::USER,
            (false, 0) => Prot::NO_EXECUTE,
            (false, _) => Prot::USER.with(Prot::NO_EXECUTE),
        }
    }
}

/// What is to be mapped.
#[derive(Debug)]
pub enum Map<'a, 'm, P: Platform> {
    /// Memory that reads zero at first.
    Anon,
    /// A file, from this page on.
    File(&'a Mapping<'m, P>, u64),
}

/// An area. Changed by who has the `mmap_lock` for writing, if it maps a file under the lock of the file's list as well.
#[derive(Debug)]
pub(crate) struct Vma {
    start: AtomicU64,
    end: AtomicU64,
    flags: AtomicU32,
    /// A driver put pages into it (`VM_MIXEDMAP`), which no fault brings again: 0 or 1. Set under the `mmap_lock` for reading.
    mixed: AtomicU32,
    /// The page of the file at `start`; of anonymous memory, `start` in pages.
    pgoff: AtomicU64,
    pub(crate) mapping: Option<NonNull<MappingCore>>,
    pub(crate) space: NonNull<SpaceCore>,
    /// The next one by address.
    pub(crate) next: AtomicPtr<Vma>,
    /// In the file's list.
    mmap_next: AtomicPtr<Vma>,
    mmap_prev: AtomicPtr<Vma>,
}

impl Vma {
    pub(crate) fn new(
        space: NonNull<SpaceCore>,
        start: u64,
        end: u64,
        flags: VmFlags,
        mapping: Option<NonNull<MappingCore>>,
        pgoff: u64,
    ) -> Vma {
        Vma {
            start: AtomicU64::new(start),
            end: AtomicU64::new(end),
            flags: AtomicU32::new(flags.0),
            mixed: AtomicU32::new(0),
            pgoff: AtomicU64::new(pgoff),
            mapping,
            space,
            next: AtomicPtr::new(core::ptr::null_mut()),
            mmap_next: AtomicPtr::new(core::ptr::null_mut()),
            mmap_prev: AtomicPtr::new(core::ptr::null_mut()),
        }
    }

    pub(crate) fn start(&self) -> u64 {
        self.start.load(Ordering::Relaxed)
    }

    pub(crate) fn end(&self) -> u64 {
        self.end.load(Ordering::Relaxed)
    }

    pub(crate) fn flags(&self) -> VmFlags {
        VmFlags(self.flags.load(Ordering::Relaxed))
    }

    pub(crate) fn set_flags(&self, flags: VmFlags) {
        self.flags.store(flags.0, Ordering::Relaxed);
    }

    pub(crate) fn pgoff(&self) -> u64 {
        self.pgoff.load(Ordering::Relaxed)
    }

    /// The page of the file, or the number of the page, at this address.
    pub(crate) fn index(&self, addr: u64) -> u64 {
        self.pgoff() + (addr - self.start()) / 4096
    }

    /// Where a page of the file is in the area.
    pub(crate) fn address_of(&self, index: u64) -> Option<u64> {
        let pages = index.checked_sub(self.pgoff())?;
        let addr = self.start() + pages.checked_mul(4096)?;
        (addr < self.end()).then_some(addr)
    }

    /// Cuts the area short.
    pub(crate) fn set_end(&self, end: u64) {
        self.end.store(end, Ordering::Relaxed);
    }

    /// Are there pages in it that a driver put there?
    pub(crate) fn is_mixed(&self) -> bool {
        self.mixed.load(Ordering::Relaxed) != 0
    }

    pub(crate) fn set_mixed(&self) {
        self.mixed.store(1, Ordering::Relaxed);
    }

    /// So has this one, if there are in the other of which it was a part or is a copy.
    pub(crate) fn mixed_like(self, other: &Vma) -> Vma {
        Vma {
            mixed: AtomicU32::new(other.mixed.load(Ordering::Relaxed)),
            ..self
        }
    }

    /// Does writing here make a copy?
    pub(crate) fn is_cow(&self) -> bool {
        !self.flags().contains(VmFlags::SHARED)
    }
}

/// An area, for a look.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct VmaView {
    /// The first address.
    pub start: u64,
    /// One past the last.
    pub end: u64,
    /// What may be done.
    pub flags: VmFlags,
    /// Does it map a file?
    pub file: bool,
    /// The page of the file at its start.
    pub pgoff: u64,
}

/// The areas that map a file. Under the `i_mmap` lock.
#[derive(Debug)]
pub(crate) struct VmaList(*mut Vma);

// SAFETY: the areas in it are reached under the list's lock.
unsafe impl Send for VmaList {}

impl VmaList {
    pub(crate) const fn new() -> VmaList {
        VmaList(core::ptr::null_mut())
    }

    /// # Safety
    ///
    /// The area lives until it is removed, and is in no list.
    pub(crate) unsafe fn insert(&mut self, vma: NonNull<Vma>) {
        // SAFETY: the caller's promise, and areas in the list live.
        unsafe {
            vma.as_ref().mmap_next.store(self.0, Ordering::Relaxed);
            vma.as_ref()
                .mmap_prev
                .store(core::ptr::null_mut(), Ordering::Relaxed);
            if let Some(first) = self.0.as_ref() {
                first.mmap_prev.store(vma.as_ptr(), Ordering::Relaxed);
            }
        }
        self.0 = vma.as_ptr();
    }

    /// # Safety
    ///
    /// The area is in this list.
    pub(crate) unsafe fn remove(&mut self, vma: NonNull<Vma>) {
        // SAFETY: the caller's promise; areas in the list live.
        unsafe {
            let next = vma.as_ref().mmap_next.load(Ordering::Relaxed);
            let prev = vma.as_ref().mmap_prev.load(Ordering::Relaxed);
            match prev.as_ref() {
                Some(prev) => prev.mmap_next.store(next, Ordering::Relaxed),
                None => self.0 = next,
            }
            if let Some(next) = next.as_ref() {
                next.mmap_prev.store(prev, Ordering::Relaxed);
            }
        }
    }

    /// All areas.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Vma> {
        let mut at = self.0;
        core::iter::from_fn(move || {
            // SAFETY: areas in the list live until they are removed, which needs the lock that the caller has.
            let vma = unsafe { at.as_ref() }?;
            at = vma.mmap_next.load(Ordering::Relaxed);
            Some(vma)
        })
    }
}
