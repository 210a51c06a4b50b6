//! kvmalloc: memory that need not be contiguous by page, from kmalloc if that is easy, else from vmalloc.

use core::panic::Location;
use core::ptr::NonNull;

use crate::address::PAGE_SIZE;
use crate::error::AllocError;
use crate::gfp::{self, Flags};
use crate::mm::Mm;
use crate::platform::Platform;

/// How hard kmalloc tries before it is left to vmalloc (`kmalloc_gfp_adjust`): contiguous pages are better, but not worth
/// reclaim, unless the caller says that they are.
fn kmalloc_gfp_adjust(gfp: Flags, size: usize) -> Flags {
    if size <= PAGE_SIZE {
        return gfp;
    }
    let mut drop = gfp::__GFP_NOFAIL.bits();
    if !gfp.contains(gfp::__GFP_RETRY_MAYFAIL) {
        drop |= gfp::__GFP_DIRECT_RECLAIM.bits();
    }
    Flags::from_bits(gfp.bits() & !drop) | gfp::__GFP_NOWARN
}

impl<P: Platform> Mm<P> {
    /// At least `size` bytes, contiguous by page if that is easily had (`kvmalloc`). Without a range for vmalloc it is [`kmalloc`](Self::kmalloc).
    ///
    /// # Context
    ///
    /// As [`kmalloc`](Self::kmalloc); flags that do not let it sleep, and memory whose deferred free is prepaid, are served by that alone.
    ///
    /// # Errors
    ///
    /// As [`vmalloc`](Self::vmalloc), or where only kmalloc is asked, as that.
    ///
    /// # Examples
    ///
    /// ```
    /// use memdesc::gfp::GFP_KERNEL;
    /// use memdesc::{Config, Mm};
    /// use memdesc_host::Host;
    ///
    /// let (host, ranges) = Host::small(8192).unwrap();
    /// let mm = Mm::new(host, &Config::default(), &ranges).unwrap();
    /// let small = mm.kvmalloc(100, GFP_KERNEL).unwrap();
    /// let large = mm.kvmalloc(7 << 20, GFP_KERNEL).unwrap();
    /// assert!(!mm.is_vmalloc_addr(small.as_ptr()) && mm.is_vmalloc_addr(large.as_ptr()));
    /// // SAFETY: ours, and freed once.
    /// unsafe {
    ///     mm.kvfree(small);
    ///     mm.kvfree(large);
    /// }
    /// ```
    #[track_caller]
    pub fn kvmalloc(&self, size: usize, gfp: Flags) -> Result<NonNull<u8>, AllocError> {
        self.kvmalloc_for(size, gfp, Location::caller())
    }

    #[track_caller]
    pub(super) fn kvmalloc_for(
        &self,
        size: usize,
        gfp: Flags,
        caller: &'static Location<'static>,
    ) -> Result<NonNull<u8>, AllocError> {
        let only = gfp::__GFP_FAST_TRY | gfp::__GFP_RCU_PREPAID;
        if self.vmalloc.pages == 0 || !gfp.allow_blocking() || gfp.intersects(only) {
            return self.kmalloc(size, gfp);
        }
        match self.kmalloc(size, kmalloc_gfp_adjust(gfp, size)) {
            Err(_) if size > PAGE_SIZE => self.vmalloc_order(size, gfp, 0, caller),
            result => result,
        }
    }

    /// Frees what [`kvmalloc`](Self::kvmalloc), [`kmalloc`](Self::kmalloc) or [`vmalloc`](Self::vmalloc) gave (`kvfree`).
    ///
    /// # Safety
    ///
    /// `ptr` is from them, and nobody uses the memory any more.
    ///
    /// # Context
    ///
    /// Any that may pin a CPU. Allocates nothing, cannot fail.
    #[inline]
    #[track_caller]
    pub unsafe fn kvfree(&self, ptr: NonNull<u8>) {
        if self.is_vmalloc_addr(ptr.as_ptr()) {
            // SAFETY: the caller's promise.
            unsafe { self.vfree(ptr) }
        } else {
            // SAFETY: the same.
            unsafe { self.kfree(ptr) }
        }
    }

    /// Makes an allocation larger or smaller, in place if it has room (`kvrealloc`). Bytes up to the smaller of both sizes are kept; what is new
    /// reads zero with `__GFP_ZERO` only if the memory is another.
    ///
    /// # Safety
    ///
    /// `ptr` is live memory from [`kvmalloc`](Self::kvmalloc), [`kmalloc`](Self::kmalloc) or [`vmalloc`](Self::vmalloc). If this succeeds with
    /// another pointer, the old one is freed.
    ///
    /// # Errors
    ///
    /// As [`kvmalloc`](Self::kvmalloc); the old memory then is as it was.
    #[track_caller]
    pub unsafe fn kvrealloc(
        &self,
        ptr: NonNull<u8>,
        size: usize,
        gfp: Flags,
    ) -> Result<NonNull<u8>, AllocError> {
        let had = match self.find_vm_area(ptr.addr().get()) {
            Some(area) if size != 0 && size <= area.size && size > area.size / 2 => return Ok(ptr),
            Some(area) => area.size,
            // SAFETY: the caller's promise.
            None => match unsafe { self.resize_in_place(ptr, size, gfp) } {
                Ok(()) => return Ok(ptr),
                Err(had) => had,
            },
        };
        let new = self.kvmalloc(size, gfp)?;
        // SAFETY: both are live, distinct, and at least this long; the old one is the caller's to give up.
        unsafe {
            ptr.copy_to_nonoverlapping(new, had.min(size));
            self.kvfree(ptr);
        }
        Ok(new)
    }
}
