//! Windows: ranges of the process's address space in which pages of the arena appear at other addresses, as page tables would have it.
//! For vmalloc, and for address spaces of users.
//!
//! What is mapped nowhere is inaccessible: who touches it dies by SIGSEGV, or its handler decides. Mapping and unmapping are one system
//! call each, without heap or lock, so a signal handler may do both.

use std::io;
use std::sync::Arc;

use memdesc::{PAGE_SIZE, Pfn};

use crate::Host;
use crate::arena::Memory;

/// A range of addresses, reserved as long as this lives.
///
/// # Invariants
///
/// Every page of it is a page of the arena or inaccessible; no other mapping of the process ever lies in it.
#[derive(Debug)]
pub struct Window {
    base: *mut u8,
    len: usize,
    memory: Arc<Memory>,
}

// SAFETY: a window is an address, a length and a file; what its addresses lead to is reached by raw pointers only.
unsafe impl Send for Window {}
// SAFETY: the same; the kernel puts concurrent changes in some order.
unsafe impl Sync for Window {}

impl Window {
    /// Reserves `bytes` of addresses, in whole pages, starting at a multiple of `align` (a power of two). Nothing is mapped in them yet. The
    /// window keeps the host's memory, not the host.
    ///
    /// # Errors
    ///
    /// The kernel's, if it does not give that much; [`io::ErrorKind::InvalidInput`] for a size of 0 or an alignment that is no power of two;
    /// [`io::ErrorKind::Unsupported`] under Miri.
    ///
    /// # Examples
    ///
    /// ```
    /// use memdesc::Pfn;
    /// use memdesc_host::{Host, Window};
    ///
    /// let (host, _) = Host::small(16).unwrap();
    /// let window = Window::new(&host, 8 * 4096, 2 << 20).unwrap();
    /// window.map(4096, Pfn(7), 2, true).unwrap();
    /// assert_eq!(window.base().addr() % (2 << 20), 0);
    /// // SAFETY: mapped just now, and nobody has any memory of this host.
    /// unsafe { window.base().add(4096).write(1) };
    /// window.unmap(4096, 2 * 4096).unwrap();
    /// ```
    pub fn new(host: &Host, bytes: usize, align: usize) -> io::Result<Window> {
        Window::on(host.arena.memory().clone(), bytes, align)
    }

    pub(crate) fn on(memory: Arc<Memory>, bytes: usize, align: usize) -> io::Result<Window> {
        let len = bytes
            .checked_next_multiple_of(PAGE_SIZE)
            .filter(|&len| len > 0 && align.is_power_of_two())
            .ok_or(io::ErrorKind::InvalidInput)?;
        let base = sys::reserve(len, align.max(PAGE_SIZE))?;
        Ok(Window { base, len, memory })
    }

    /// Where it starts.
    #[inline]
    pub fn base(&self) -> *mut u8 {
        self.base
    }

    /// How long it is, in bytes.
    #[inline]
    #[expect(clippy::len_without_is_empty, reason = "a window is never empty")]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Does this address lie in it?
    #[inline]
    pub fn contains(&self, addr: usize) -> bool {
        addr.wrapping_sub(self.base.addr()) < self.len
    }

    /// Makes `pages` pages from `pfn` on appear from `offset` on, in place of what was there; to be written only if `writable`.
    ///
    /// # Context
    ///
    /// Any, a signal handler included.
    ///
    /// # Errors
    ///
    /// [`io::ErrorKind::InvalidInput`] if the offset is not a page's, or one of both ranges is too long. The kernel's (`vm.max_map_count`: each
    /// run of pages is a mapping of its own); what was there then is still there, or inaccessible.
    pub fn map(&self, offset: usize, pfn: Pfn, pages: usize, writable: bool) -> io::Result<()> {
        let bytes = pages.checked_mul(PAGE_SIZE);
        let bytes = bytes.ok_or(io::ErrorKind::InvalidInput)?;
        let start = pfn.phys().0 as usize;
        if start
            .checked_add(bytes)
            .is_none_or(|end| end > self.memory.bytes)
        {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        sys::map(
            self.at(offset, bytes)?,
            bytes,
            &self.memory,
            start,
            writable,
        )
    }

    /// Makes `bytes` from `offset` on inaccessible.
    ///
    /// # Context
    ///
    /// As [`map`](Self::map).
    ///
    /// # Errors
    ///
    /// As [`map`](Self::map).
    pub fn unmap(&self, offset: usize, bytes: usize) -> io::Result<()> {
        sys::unmap(self.at(offset, bytes)?, bytes)
    }

    /// The address of a range of whole pages that lies in the window.
    fn at(&self, offset: usize, bytes: usize) -> io::Result<*mut u8> {
        let whole = offset.is_multiple_of(PAGE_SIZE) && bytes.is_multiple_of(PAGE_SIZE);
        let inside = offset.checked_add(bytes).is_some_and(|end| end <= self.len);
        if !whole || !inside || bytes == 0 {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        Ok(self.base.wrapping_add(offset))
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        sys::release(self.base, self.len);
    }
}

#[cfg(not(miri))]
mod sys {
    use std::io;
    use std::os::fd::AsRawFd;

    use crate::arena::Memory;

    const NOTHING: libc::c_int = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;

    /// A range with nothing in it.
    pub(super) fn reserve(len: usize, align: usize) -> io::Result<*mut u8> {
        // Room for the worst case, from which the ends are cut off.
        let room = len.checked_add(align).ok_or(io::ErrorKind::InvalidInput)?;
        // SAFETY: a fresh mapping at an address of the kernel's choice touches nothing that exists.
        let start =
            unsafe { libc::mmap(std::ptr::null_mut(), room, libc::PROT_NONE, NOTHING, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = start.cast::<u8>();
        let before = start.addr().next_multiple_of(align) - start.addr();
        let base = start.wrapping_add(before);
        if before > 0 {
            release(start, before);
        }
        if align > before {
            release(base.wrapping_add(len), align - before);
        }
        Ok(base)
    }

    pub(super) fn release(base: *mut u8, len: usize) {
        // SAFETY: a part of what `reserve` mapped that nobody uses, or uses any more.
        unsafe { libc::munmap(base.cast(), len) };
    }

    pub(super) fn map(
        at: *mut u8,
        len: usize,
        memory: &Memory,
        offset: usize,
        writable: bool,
    ) -> io::Result<()> {
        let write = if writable { libc::PROT_WRITE } else { 0 };
        let flags = libc::MAP_SHARED | libc::MAP_FIXED | libc::MAP_NORESERVE;
        let fd = memory.fd.as_raw_fd();
        let offset = libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
        // SAFETY: the range lies in a window, so only what the window had mapped there is replaced.
        let got = unsafe { libc::mmap(at.cast(), len, libc::PROT_READ | write, flags, fd, offset) };
        if got != libc::MAP_FAILED {
            return Ok(());
        }
        let why = io::Error::last_os_error();
        // Old kernels take away what was there before they find that they cannot: nobody else may settle in the hole.
        let flags = NOTHING | libc::MAP_FIXED_NOREPLACE;
        // SAFETY: the range lies in a window, and only what is nobody's is mapped.
        unsafe { libc::mmap(at.cast(), len, libc::PROT_NONE, flags, -1, 0) };
        Err(why)
    }

    pub(super) fn unmap(at: *mut u8, len: usize) -> io::Result<()> {
        let flags = NOTHING | libc::MAP_FIXED;
        // SAFETY: as in `map`.
        let got = unsafe { libc::mmap(at.cast(), len, libc::PROT_NONE, flags, -1, 0) };
        if got == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}

#[cfg(miri)]
mod sys {
    use std::io;

    use crate::arena::Memory;

    pub(super) fn reserve(_len: usize, _align: usize) -> io::Result<*mut u8> {
        Err(io::ErrorKind::Unsupported.into())
    }

    pub(super) fn release(_base: *mut u8, _len: usize) {}

    pub(super) fn map(
        _at: *mut u8,
        _len: usize,
        _memory: &Memory,
        _offset: usize,
        _writable: bool,
    ) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    pub(super) fn unmap(_at: *mut u8, _len: usize) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}
