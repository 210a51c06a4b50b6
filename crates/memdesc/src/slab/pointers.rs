//! Memory beside objects: arrays of pointers to those that are kept for somebody, and what goes with them.
//!
//! A free object is never touched, so where it is has to stand somewhere else: in an array that is allocated when the keeping begins. It is kmalloc memory that
//! users do not have; the ledger counts it as metadata, by class or by pages.

use core::ptr::NonNull;

use super::kmalloc::{CLASSES, class_of, large_order};
use super::object::ZONE_FLAGS;
use crate::error::AllocError;
use crate::gfp::{self, Flags};
use crate::mm::Mm;
use crate::platform::Platform;
use crate::sync::atomic::{AtomicU64, Ordering};

/// What memory beside objects costs: bytes of slab objects, pages of large kmalloc.
#[derive(Debug)]
pub(crate) struct SideCost(pub(crate) [AtomicU64; 2]);

impl SideCost {
    pub(crate) fn new() -> SideCost {
        SideCost([const { AtomicU64::new(0) }; 2])
    }
}

/// An array of pointers, allocated.
///
/// # Invariants
///
/// `at` leads to `len` pointers' room, this array's alone; to nothing if there is none.
#[derive(Debug)]
#[must_use = "it is given back by free_pointers"]
pub(crate) struct Pointers {
    at: NonNull<*mut u8>,
    len: usize,
}

impl Pointers {
    /// Without room.
    pub(crate) const NONE: Pointers = Pointers {
        at: NonNull::dangling(),
        len: 0,
    };

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Where it is and for how many, to be put together again by [`from_raw`](Self::from_raw).
    pub(crate) fn into_raw(self) -> (*mut *mut u8, usize) {
        (self.at.as_ptr(), self.len)
    }

    /// # Safety
    ///
    /// From [`into_raw`](Self::into_raw), once.
    pub(crate) unsafe fn from_raw(at: *mut *mut u8, len: usize) -> Pointers {
        // SAFETY: it came from a pointer that is not null.
        let at = unsafe { NonNull::new_unchecked(at) };
        Pointers { at, len }
    }

    pub(crate) fn as_mut(&mut self) -> &mut [*mut u8] {
        // SAFETY: by the invariant, and null pointers were written to all of it when it was made.
        unsafe { core::slice::from_raw_parts_mut(self.at.as_ptr(), self.len) }
    }

    pub(crate) fn as_slice(&self) -> &[*mut u8] {
        // SAFETY: as above.
        unsafe { core::slice::from_raw_parts(self.at.as_ptr(), self.len) }
    }
}

// SAFETY: the array is owned, and pointers are plain data.
unsafe impl Send for Pointers {}

impl<P: Platform> Mm<P> {
    /// Memory beside objects.
    pub(crate) fn side_alloc(&self, bytes: usize, gfp: Flags) -> Result<NonNull<u8>, AllocError> {
        let not = ZONE_FLAGS | gfp::__GFP_ACCOUNT.bits();
        let memory = self.kmalloc(bytes, Flags::from_bits(gfp.bits() & !not))?;
        let (which, n) = side_cost(bytes);
        self.side_cost.0[which].fetch_add(n, Ordering::Relaxed);
        Ok(memory)
    }

    /// Gives it back. Allocates nothing, cannot fail.
    ///
    /// # Safety
    ///
    /// `memory` is from [`side_alloc`](Self::side_alloc), for so many bytes, and nobody uses it any more.
    pub(crate) unsafe fn side_free(&self, memory: NonNull<u8>, bytes: usize) {
        let (which, n) = side_cost(bytes);
        self.side_cost.0[which].fetch_sub(n, Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { self.kfree(memory) };
    }

    /// An array of `n` null pointers.
    pub(crate) fn pointers(&self, n: usize, gfp: Flags) -> Result<Pointers, AllocError> {
        if n == 0 {
            return Ok(Pointers::NONE);
        }
        let bytes = n.checked_mul(size_of::<*mut u8>());
        let at = self.side_alloc(bytes.ok_or(AllocError::BadSize)?, gfp)?;
        let at = at.cast::<*mut u8>();
        for i in 0..n {
            // SAFETY: within the memory just allocated, which is ours and aligned to 8.
            unsafe { at.add(i).write(core::ptr::null_mut()) };
        }
        Ok(Pointers { at, len: n })
    }

    /// Gives an array back. Allocates nothing, cannot fail.
    pub(crate) fn free_pointers(&self, pointers: Pointers) {
        if pointers.len > 0 {
            // SAFETY: by the invariant it is the array's alone, and the array goes here.
            unsafe {
                self.side_free(pointers.at.cast(), pointers.len * size_of::<*mut u8>());
            }
        }
    }
}

/// What so many bytes cost, and as what: 0 for bytes of a class, 1 for pages.
fn side_cost(bytes: usize) -> (usize, u64) {
    match class_of(bytes) {
        Some(class) => (0, CLASSES[class] as u64),
        None => (1, 1 << large_order(bytes).unwrap_or(0)),
    }
}
