//! Physical memory: address space from mmap, not a byte of it touched. Under Miri, which knows no mmap, the heap.

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

/// The arena.
#[derive(Debug)]
pub(crate) struct Arena {
    base: *mut u8,
    bytes: usize,
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
        Ok(Arena {
            base: sys::reserve(bytes)?,
            bytes,
        })
    }

    /// Does it reach this far?
    pub(crate) fn reaches(&self, end: u64) -> bool {
        end <= self.bytes as u64
    }

    #[inline]
    pub(crate) fn base(&self) -> *mut u8 {
        self.base
    }

    /// Makes bytes accessible.
    pub(crate) fn open(&self, offset: usize, len: usize) {
        sys::protect(self.base.wrapping_add(offset), len, true);
    }

    /// Makes bytes inaccessible.
    pub(crate) fn close(&self, offset: usize, len: usize) {
        sys::protect(self.base.wrapping_add(offset), len, false);
    }

    pub(crate) fn open_all(&self) {
        self.open(0, self.bytes);
    }

    pub(crate) fn resident_bytes(&self) -> u64 {
        sys::resident(self.base, self.bytes)
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        sys::release(self.base, self.bytes);
    }
}

#[cfg(not(miri))]
mod sys {
    use super::HostError;

    pub(super) fn reserve(bytes: usize) -> Result<*mut u8, HostError> {
        // SAFETY: a fresh private mapping at an address of the kernel's choice touches nothing that exists.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(HostError::Reserve {
                bytes,
                source: std::io::Error::last_os_error(),
            });
        }
        Ok(base.cast())
    }

    pub(super) fn release(base: *mut u8, bytes: usize) {
        // SAFETY: exactly the mapping made by `reserve`; the arena is being dropped, nobody uses it any more.
        unsafe { libc::munmap(base.cast(), bytes) };
    }

    pub(super) fn protect(at: *mut u8, len: usize, open: bool) {
        let prot = if open {
            libc::PROT_READ | libc::PROT_WRITE
        } else {
            libc::PROT_NONE
        };
        // SAFETY: within the arena, page aligned; the allocator says that nobody uses these pages.
        let result = unsafe { libc::mprotect(at.cast(), len, prot) };
        assert_eq!(
            result,
            0,
            "mprotect: {} (vm.max_map_count?)",
            std::io::Error::last_os_error()
        );
    }

    pub(super) fn resident(base: *mut u8, bytes: usize) -> u64 {
        const CHUNK: usize = 1 << 20;
        let pages = bytes / 4096;
        let mut seen = vec![0u8; CHUNK.min(pages)];
        let mut resident = 0u64;
        for first in (0..pages).step_by(CHUNK) {
            let n = CHUNK.min(pages - first);
            // SAFETY: `seen` has a byte for each of the `n` pages; the range lies in the arena.
            let result = unsafe {
                libc::mincore(
                    base.wrapping_add(first * 4096).cast(),
                    n * 4096,
                    seen.as_mut_ptr(),
                )
            };
            if result == 0 {
                resident += seen[..n].iter().filter(|&&b| b & 1 != 0).count() as u64 * 4096;
            }
        }
        resident
    }
}

#[cfg(miri)]
mod sys {
    use super::HostError;
    use std::alloc::Layout;

    fn layout(bytes: usize) -> Layout {
        Layout::from_size_align(bytes, 1 << 22).unwrap()
    }

    pub(super) fn reserve(bytes: usize) -> Result<*mut u8, HostError> {
        // SAFETY: `bytes` is not zero.
        Ok(unsafe { std::alloc::alloc_zeroed(layout(bytes)) })
    }

    pub(super) fn release(base: *mut u8, bytes: usize) {
        // SAFETY: made by `reserve` with the same layout.
        unsafe { std::alloc::dealloc(base, layout(bytes)) };
    }

    pub(super) fn protect(_at: *mut u8, _len: usize, _open: bool) {}

    pub(super) fn resident(_base: *mut u8, _bytes: usize) -> u64 {
        0
    }
}
