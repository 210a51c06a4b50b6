//! Physical memory: a memfd, all of it a hole until it is written, and a mapping of the whole as the direct map. Being a file, its pages can
//! be mapped at other addresses too (see [`Window`](crate::Window)). Under Miri, which knows no mmap, the heap.

use std::sync::Arc;

use memdesc::MemRange;

/// Why a host could not be made.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// The kernel refused the address space.
    #[error(
        "cannot reserve {bytes} bytes of address space for the arena: {source} (is vm.overcommit_memory=2, or a ulimit -v set?)"
    )]
    Reserve {
        /// How much was wanted.
        bytes: usize,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// No memory was asked for.
    #[error("no range of memory was given")]
    NoMemory,
}

/// The file that is physical memory: the byte at a physical address is the byte at that offset. Closed when the arena and all windows
/// on it are gone.
#[derive(Debug)]
pub(crate) struct Memory {
    #[cfg(not(miri))]
    pub(crate) fd: std::os::fd::OwnedFd,
    #[cfg_attr(miri, allow(dead_code))]
    pub(crate) bytes: usize,
}

/// The arena.
#[derive(Debug)]
pub(crate) struct Arena {
    base: *mut u8,
    bytes: usize,
    memory: Arc<Memory>,
}

// SAFETY: the arena is plain memory; who may touch which byte of it is the allocator's business.
unsafe impl Send for Arena {}
// SAFETY: the same.
unsafe impl Sync for Arena {}

impl Arena {
    /// Address space from physical address 0 to the end of the last range.
    pub(crate) fn new(ranges: &[MemRange]) -> Result<Arena, HostError> {
        let end = ranges
            .iter()
            .map(|r| r.end.0)
            .max()
            .ok_or(HostError::NoMemory)?;
        let bytes = (end as usize).next_multiple_of(4096);
        if bytes == 0 {
            return Err(HostError::NoMemory);
        }
        let reserve = |source| HostError::Reserve { bytes, source };
        let memory = sys::memory(bytes).map_err(reserve)?;
        Ok(Arena {
            base: sys::map(&memory).map_err(reserve)?,
            bytes,
            memory: Arc::new(memory),
        })
    }

    /// What it maps.
    pub(crate) fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    /// Does it reach this far?
    pub(crate) fn reaches(&self, end: u64) -> bool {
        end <= self.bytes as u64
    }

    #[inline]
    pub(crate) fn base(&self) -> *mut u8 {
        self.base
    }

    pub(crate) fn len(&self) -> usize {
        self.bytes
    }

    /// Makes bytes accessible, or inaccessible. From any context.
    ///
    /// # Errors
    ///
    /// The kernel's; nothing has changed then.
    pub(crate) fn protect(&self, offset: usize, len: usize, open: bool) -> std::io::Result<()> {
        assert!(offset <= self.bytes && len <= self.bytes - offset);
        sys::protect(self.base.wrapping_add(offset), len, open)
    }

    /// Gives the memory behind whole pages back to the system; they read as zeros from here on.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub(crate) fn punch(&self, offset: usize, len: usize) -> std::io::Result<()> {
        assert!(offset <= self.bytes && len <= self.bytes - offset);
        #[cfg(not(miri))]
        return sys::punch(&self.memory, offset, len);
        #[cfg(miri)]
        {
            // SAFETY: in the arena; the allocator says that nobody uses these pages.
            unsafe { self.base.add(offset).write_bytes(0, len) };
            Ok(())
        }
    }

    pub(crate) fn resident_bytes(&self) -> u64 {
        sys::resident(&self.memory)
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        sys::release(self.base, self.bytes);
    }
}

#[cfg(not(miri))]
mod sys {
    use std::io;
    use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

    use super::Memory;

    /// A file of that size, without a page of it yet.
    pub(super) fn memory(bytes: usize) -> io::Result<Memory> {
        // SAFETY: memfd_create(2) reads the name, which ends in a zero.
        let fd = unsafe { libc::memfd_create(c"memdesc".as_ptr(), libc::MFD_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a descriptor just made, which nobody else knows of.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let length = libc::off_t::try_from(bytes).map_err(io::Error::other)?;
        // SAFETY: ftruncate(2) takes no pointers.
        if unsafe { libc::ftruncate(fd.as_raw_fd(), length) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Memory { fd, bytes })
    }

    pub(super) fn map(memory: &Memory) -> io::Result<*mut u8> {
        // SAFETY: a fresh mapping at an address of the kernel's choice touches nothing that exists.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                memory.bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_NORESERVE,
                memory.fd.as_raw_fd(),
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(base.cast())
    }

    pub(super) fn release(base: *mut u8, bytes: usize) {
        // SAFETY: exactly the mapping made by `map`; the arena is being dropped, nobody uses it any more.
        unsafe { libc::munmap(base.cast(), bytes) };
    }

    pub(super) fn protect(at: *mut u8, len: usize, open: bool) -> io::Result<()> {
        let prot = if open {
            libc::PROT_READ | libc::PROT_WRITE
        } else {
            libc::PROT_NONE
        };
        // SAFETY: within the arena, page aligned; the allocator says that nobody uses these pages.
        let result = unsafe { libc::mprotect(at.cast(), len, prot) };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// Punches a hole into the file. By its descriptor: madvise(2) wants a mapping that may be written.
    pub(super) fn punch(memory: &Memory, offset: usize, len: usize) -> io::Result<()> {
        let range = |n| libc::off_t::try_from(n).map_err(io::Error::other);
        let how = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        // SAFETY: takes no pointers; the allocator says that nobody uses these pages.
        let result =
            unsafe { libc::fallocate(memory.fd.as_raw_fd(), how, range(offset)?, range(len)?) };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// What the file has been given: mincore(2) over a mapping would look each of its holes up by itself.
    pub(super) fn resident(memory: &Memory) -> u64 {
        // SAFETY: plain numbers, for which zeros are valid.
        let mut stat: libc::stat = unsafe { std::mem::zeroed() };
        // SAFETY: fstat(2) writes to what is ours.
        if unsafe { libc::fstat(memory.fd.as_raw_fd(), &mut stat) } != 0 {
            return 0;
        }
        stat.st_blocks as u64 * 512
    }
}

#[cfg(miri)]
mod sys {
    use std::alloc::Layout;
    use std::io;

    use super::Memory;

    fn layout(bytes: usize) -> Layout {
        Layout::from_size_align(bytes, 1 << 22).unwrap()
    }

    pub(super) fn memory(bytes: usize) -> io::Result<Memory> {
        Ok(Memory { bytes })
    }

    pub(super) fn map(memory: &Memory) -> io::Result<*mut u8> {
        // SAFETY: the size is not zero.
        Ok(unsafe { std::alloc::alloc_zeroed(layout(memory.bytes)) })
    }

    pub(super) fn release(base: *mut u8, bytes: usize) {
        // SAFETY: made by `map` with the same layout.
        unsafe { std::alloc::dealloc(base, layout(bytes)) };
    }

    pub(super) fn protect(_at: *mut u8, _len: usize, _open: bool) -> io::Result<()> {
        Ok(())
    }

    pub(super) fn resident(_memory: &Memory) -> u64 {
        0
    }
}
