//! Sheaves: a stack of objects per CPU and cache, so that most requests share nothing with anyone.
//!
//! An array, not a list through the objects: handing an object out does not touch it. Refilled and flushed by the half, so
//! a CPU that allocates and frees in turn never goes to the slabs.
//!
//! Lock order: a sheaf's [`LocalLock`] is a leaf.

use core::ptr::NonNull;

use crate::lockdep::{Acquire, classes};
use crate::platform::{Checked, Pin, Platform, PlatformBarriers};
use crate::sync::atomic::{AtomicPtr, Ordering};
use crate::sync::{LocalLock, UnsafeCell};

/// The most objects a sheaf holds.
pub(crate) const SHEAF_MAX: usize = 60;
/// The most objects that go to or come from the slabs at once.
pub(crate) const BATCH: usize = SHEAF_MAX / 2;

/// The head of a CPU's sheaf; its objects follow it in memory.
///
/// # Invariants
///
/// `objects[..count]` are objects of the cache that nobody uses and whose bits say "handed out". Both are reached only
/// under the lock.
#[derive(Debug)]
#[repr(C)]
struct Sheaf {
    lock: LocalLock,
    count: UnsafeCell<u32>,
    _pad: u32,
}

/// The sheaves of a cache: one per CPU, all of `stride` bytes.
#[derive(Debug)]
pub(crate) struct Sheaves {
    base: AtomicPtr<u8>,
    stride: u32,
    capacity: u32,
}

impl Sheaves {
    /// None: every request goes to the slabs.
    pub(crate) const fn none() -> Sheaves {
        Sheaves {
            base: AtomicPtr::new(core::ptr::null_mut()),
            stride: 0,
            capacity: 0,
        }
    }

    /// How many objects a sheaf of this cache should hold: what Linux takes, by size.
    pub(crate) const fn capacity_for(size: usize) -> usize {
        match size {
            0..=255 => SHEAF_MAX,
            256..=511 => 28,
            512..=1023 => 12,
            1024..=4095 => 8,
            _ => 4,
        }
    }

    /// Bytes for so many CPUs.
    pub(crate) const fn bytes(capacity: usize, nr_cpus: usize) -> usize {
        Self::stride_for(capacity) * nr_cpus
    }

    const fn stride_for(capacity: usize) -> usize {
        (size_of::<Sheaf>() + capacity * 8).next_multiple_of(64)
    }

    /// Sheaves in this memory.
    ///
    /// # Safety
    ///
    /// `memory` leads to [`bytes`](Self::bytes) zeroed bytes, 64-byte aligned, that are this cache's alone as long as it lives.
    pub(crate) unsafe fn new(memory: NonNull<u8>, capacity: usize) -> Sheaves {
        // All-zero bytes are an empty sheaf whose lock is free.
        Sheaves {
            base: AtomicPtr::new(memory.as_ptr()),
            stride: Self::stride_for(capacity) as u32,
            capacity: capacity as u32,
        }
    }

    pub(crate) fn memory(&self) -> Option<NonNull<u8>> {
        NonNull::new(self.base.load(Ordering::Relaxed))
    }

    #[inline]
    pub(crate) fn capacity(&self) -> usize {
        self.capacity as usize
    }

    #[inline]
    fn sheaf(&self, cpu: usize) -> (&Sheaf, *mut *mut u8) {
        let base = self.base.load(Ordering::Relaxed);
        // SAFETY: `new` was given memory for every CPU, and a pinned CPU's number is below their count.
        let at = unsafe { base.add(cpu * self.stride as usize) };
        // SAFETY: a sheaf starts there, aligned, and every bit pattern that zeroing and we leave there is valid; its objects
        // follow it.
        unsafe {
            (
                &*at.cast::<Sheaf>(),
                at.add(size_of::<Sheaf>()).cast::<*mut u8>(),
            )
        }
    }

    /// Works on the sheaf of the CPU the caller is pinned to.
    #[inline]
    pub(crate) fn owner<P: Platform, R>(
        &self,
        pin: &Pin<'_, P>,
        f: impl FnOnce(&mut Stack<'_>) -> R,
    ) -> R {
        let (sheaf, objects) = self.sheaf(pin.cpu());
        let _checked = Checked::new(pin.platform(), &classes::SHEAF, Acquire::Lock);
        let _guard = sheaf.lock.enter(&PlatformBarriers(pin.platform()));
        f(&mut Stack::new(sheaf, objects, self.capacity))
    }

    /// As `owner`, unless somebody is inside. From any context.
    #[inline]
    pub(crate) fn try_owner<P: Platform, R>(
        &self,
        pin: &Pin<'_, P>,
        f: impl FnOnce(&mut Stack<'_>) -> R,
    ) -> Option<R> {
        let (sheaf, objects) = self.sheaf(pin.cpu());
        let _guard = sheaf.lock.try_enter(&PlatformBarriers(pin.platform()))?;
        Some(f(&mut Stack::new(sheaf, objects, self.capacity)))
    }

    /// Works on any CPU's sheaf.
    pub(crate) fn remote<P: Platform, R>(
        &self,
        platform: &P,
        cpu: usize,
        f: impl FnOnce(&mut Stack<'_>) -> R,
    ) -> R {
        let (sheaf, objects) = self.sheaf(cpu);
        // An interrupt here that came to this CPU's own would wait for us.
        let _pin = Pin::new(platform);
        let _checked = Checked::new(platform, &classes::SHEAF, Acquire::Lock);
        let _guard = sheaf.lock.enter_remote(&PlatformBarriers(platform));
        f(&mut Stack::new(sheaf, objects, self.capacity))
    }
}

/// A sheaf whose lock is held.
#[derive(Debug)]
pub(crate) struct Stack<'a> {
    count: &'a mut u32,
    objects: *mut *mut u8,
    capacity: u32,
}

impl<'a> Stack<'a> {
    #[inline]
    fn new(sheaf: &'a Sheaf, objects: *mut *mut u8, capacity: u32) -> Stack<'a> {
        // SAFETY: the caller holds the sheaf's lock, so this is the only reference to its count.
        let count = unsafe { &mut *sheaf.count.get_mut_ptr() };
        Stack {
            count,
            objects,
            capacity,
        }
    }

    #[inline]
    pub(crate) fn pop(&mut self) -> Option<NonNull<u8>> {
        if *self.count == 0 {
            return None;
        }
        *self.count -= 1;
        crate::inject::point("sheaf: popped");
        // SAFETY: below `count`, so within the array and written by `push`.
        NonNull::new(unsafe { *self.objects.add(*self.count as usize) })
    }

    /// Puts an object in; `false` if there is no room.
    #[inline]
    pub(crate) fn push(&mut self, object: NonNull<u8>) -> bool {
        if *self.count == self.capacity {
            return false;
        }
        // SAFETY: below the capacity, so within the array.
        unsafe { *self.objects.add(*self.count as usize) = object.as_ptr() };
        crate::inject::point("sheaf: about to count");
        *self.count += 1;
        true
    }

    /// Takes the coldest objects out, as many as `out` has room for; says how many.
    pub(crate) fn take_cold(&mut self, out: &mut [*mut u8]) -> usize {
        let n = out.len().min(*self.count as usize);
        // SAFETY: the first `n` are within the array and written; the rest moves down within it.
        unsafe {
            self.objects.copy_to_nonoverlapping(out.as_mut_ptr(), n);
            self.objects
                .add(n)
                .copy_to(self.objects, *self.count as usize - n);
        }
        *self.count -= n as u32;
        n
    }

    /// Is this object in here? For the check for double frees.
    pub(crate) fn contains(&self, object: NonNull<u8>) -> bool {
        // SAFETY: all below `count` are written.
        (0..*self.count as usize).any(|i| unsafe { *self.objects.add(i) } == object.as_ptr())
    }

    pub(crate) fn len(&self) -> usize {
        *self.count as usize
    }
}
