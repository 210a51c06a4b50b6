//! Kernel stacks: areas with a guard page on both sides, of which each CPU keeps two for the next thread.
//!
//! Seed 003: "currently allocated by vmalloc, but should never be mapped" by users; their kind says so
//! ([`VmAreaKind::may_be_mapped`](crate::VmAreaKind::may_be_mapped)). A stack that overflows runs into a guard page and not into its neighbour, and [`Mm::explain_address`]
//! says whose it was. Source: `alloc_thread_stack_node`, `NR_CACHED_STACKS` in `kernel/fork.c` of Linux 6.18.

use core::panic::Location;
use core::ptr::NonNull;

use super::area::Want;
use crate::address::{PAGE_SHIFT, PAGE_SIZE};
use crate::desc::{VmArea, VmAreaKind};
use crate::error::AllocError;
use crate::gfp::{self, GFP_KERNEL};
use crate::memcg::{Charge, MemcgStat};
use crate::mm::Mm;
use crate::platform::{Pin, Platform, might_sleep};
use crate::sync::atomic::{AtomicPtr, Ordering};

/// Stacks that a CPU keeps.
const NR_CACHED_STACKS: usize = 2;
/// Guard pages below a stack.
const LEAD: u8 = 1;

/// The stacks that a CPU keeps. Whoever swaps one out has it; any context, any CPU.
#[derive(Debug)]
#[repr(align(64))]
pub(crate) struct StackCache([AtomicPtr<VmArea>; NR_CACHED_STACKS]);

impl StackCache {
    pub(crate) fn new() -> StackCache {
        StackCache([const { AtomicPtr::new(core::ptr::null_mut()) }; NR_CACHED_STACKS])
    }

    /// One that is right. Others are put back, or handed to `out` if their place was taken meanwhile.
    fn take(
        &self,
        is_right: impl Fn(&VmArea) -> bool,
        out: impl Fn(NonNull<VmArea>),
    ) -> Option<NonNull<VmArea>> {
        for slot in &self.0 {
            // Acquire pairs with the Release in `put`: what was done to it before is done.
            let Some(area) = NonNull::new(slot.swap(core::ptr::null_mut(), Ordering::Acquire))
            else {
                continue;
            };
            crate::inject::point("stack cache: taken");
            // SAFETY: a live area in a slot is its, and now ours.
            if is_right(unsafe { area.as_ref() }) {
                return Some(area);
            }
            if !self.put(area) {
                out(area);
            }
        }
        None
    }

    /// Keeps one if there is room.
    fn put(&self, area: NonNull<VmArea>) -> bool {
        let none = core::ptr::null_mut();
        self.0.iter().any(|slot| {
            // Release: as in `take`.
            slot.compare_exchange(none, area.as_ptr(), Ordering::Release, Ordering::Relaxed)
                .is_ok()
        })
    }
}

/// A kernel stack that somebody has. Given back by [`Mm::free_kernel_stack`]; dropped, it is lost.
#[derive(Debug)]
#[must_use = "a stack that is dropped is never freed"]
pub struct KernelStack {
    area: NonNull<VmArea>,
    bottom: NonNull<u8>,
    size: usize,
}

// SAFETY: it is memory that belongs to whoever has this.
unsafe impl Send for KernelStack {}
// SAFETY: shared, it gives out addresses.
unsafe impl Sync for KernelStack {}

impl KernelStack {
    /// The lowest address. The page below is a guard.
    pub fn bottom(&self) -> NonNull<u8> {
        self.bottom
    }

    /// One past the highest address: what the stack pointer starts with. A guard lies there.
    pub fn top(&self) -> *mut u8 {
        self.bottom.as_ptr().wrapping_add(self.size)
    }

    /// Bytes, without the guards.
    pub fn size(&self) -> usize {
        self.size
    }
}

impl<P: Platform> Mm<P> {
    /// A kernel stack of so many pages, all zero, for this owner: a thread's number, by which [`explain_address`](Self::explain_address) names him.
    ///
    /// # Context
    ///
    /// May sleep.
    ///
    /// # Errors
    ///
    /// As [`vmalloc`](Self::vmalloc).
    ///
    /// # Examples
    ///
    /// ```
    /// use memdesc::{AddressInfo, Config, Mm};
    /// use memdesc_host::Host;
    ///
    /// let (host, ranges) = Host::small(1024).unwrap();
    /// let mm = Mm::new(host, &Config::default(), &ranges).unwrap();
    /// let stack = mm.alloc_kernel_stack(4, 1234).unwrap();
    /// // What a fault handler asks when a push went too far.
    /// let fault = stack.bottom().addr().get() - 8;
    /// let AddressInfo::GuardBefore(area) = mm.explain_address(fault) else {
    ///     panic!("not the guard page")
    /// };
    /// assert_eq!(area.owner, Some(1234));
    /// // SAFETY: nobody runs on it.
    /// unsafe { mm.free_kernel_stack(stack) };
    /// ```
    #[track_caller]
    pub fn alloc_kernel_stack(&self, pages: usize, owner: u64) -> Result<KernelStack, AllocError> {
        let caller = Location::caller();
        if pages == 0 || pages as u64 > self.boot.ram >> PAGE_SHIFT {
            return Err(AllocError::BadSize);
        }
        might_sleep(&self.pages.platform, "alloc_kernel_stack");
        // Also of one that is kept from before: it was nobody's.
        let (memcg, bytes) = (self.active_memcg(), (pages * PAGE_SIZE) as u64);
        let charge = self.memcg_charge(memcg, bytes, MemcgStat::KernelStack, GFP_KERNEL)?;
        let cpu = self.pages.pin().cpu();
        let cached = self.vmalloc.stacks[cpu].take(
            |area| area.pages() == pages,
            |area| self.free_stack_area(area),
        );
        let (area, is_cached) = match cached {
            Some(area) => (area, true),
            None => {
                let want = Want {
                    kind: VmAreaKind::Stack,
                    pages,
                    order: 0,
                    lead: LEAD,
                    caller,
                };
                (self.alloc_area(&want, GFP_KERNEL | gfp::__GFP_ZERO)?, false)
            }
        };
        // SAFETY: live, and ours.
        let desc = unsafe { area.as_ref() };
        desc.set_caller(caller);
        desc.set_owner(Some(owner));
        let bottom = self.area_ptr(desc)?;
        let size = pages * PAGE_SIZE;
        if is_cached {
            // What the last thread left is nothing for the next one.
            // SAFETY: mapped, and ours alone.
            unsafe { bottom.write_bytes(0, size) };
        }
        desc.set_memcg(charge.map_or(0, Charge::keep));
        Ok(KernelStack { area, bottom, size })
    }

    /// Gives a stack back: this CPU keeps it for the next thread, or it is freed.
    ///
    /// # Safety
    ///
    /// It is of this memory manager, and nobody runs on it or uses its memory any more.
    ///
    /// # Context
    ///
    /// Any, as [`vfree`](Self::vfree).
    pub unsafe fn free_kernel_stack(&self, stack: KernelStack) {
        // SAFETY: a live area, the stack's.
        let desc = unsafe { stack.area.as_ref() };
        desc.set_owner(None);
        self.uncharge_area(desc);
        if let Some(pin) = Pin::try_new(&self.pages.platform)
            && self.vmalloc.stacks[pin.cpu()].put(stack.area)
        {
            return;
        }
        self.free_stack_area(stack.area);
    }

    fn free_stack_area(&self, area: NonNull<VmArea>) {
        // SAFETY: a live area that is the caller's.
        let Ok(bottom) = self.area_ptr(unsafe { area.as_ref() }) else {
            return;
        };
        let caller = Location::caller();
        if self.may_free_here() {
            self.vfree_deferred();
            self.free_area(bottom, caller, |kind| kind == VmAreaKind::Stack);
        } else {
            // SAFETY: an area with pages of its own, and nobody's any more.
            unsafe { self.defer_area(bottom, caller) };
        }
    }

    /// Frees the stacks that CPUs keep. Says how many.
    pub(super) fn drop_cached_stacks(&self) -> usize {
        let mut n = 0;
        for cache in self.vmalloc.stacks.iter() {
            while let Some(area) = cache.take(|_| true, |_| {}) {
                self.free_stack_area(area);
                n += 1;
            }
        }
        n
    }
}
