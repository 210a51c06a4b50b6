//! A ready-made `#[global_allocator]`: `alloc`'s collections on a memory manager.
//!
//! A [`Heap`] is a static. It holds the memory manager itself, which does not exist before memory has been taken over: until then it
//! has nothing to give. Small requests are kmalloc's, and large ones too, or vmalloc's where the platform has that.

use core::alloc::{GlobalAlloc, Layout};
use core::cell::UnsafeCell;
use core::fmt;
use core::mem::MaybeUninit;
use core::ptr::NonNull;

use crate::address::PAGE_SIZE;
use crate::config::{Config, MemRange};
use crate::error::InitError;
use crate::gfp::{__GFP_NOWARN, __GFP_ZERO, Flags, GFP_ATOMIC, GFP_KERNEL};
use crate::mm::Mm;
use crate::platform::{Context, Platform};
use crate::sync::atomic::{AtomicU32, Ordering};

/// [`Heap::init`] has not been called, or failed.
const EMPTY: u32 = 0;
/// Somebody is in it.
const FILLING: u32 = 1;
/// The memory manager is there, and stays.
const THERE: u32 = 2;

/// A memory manager that comes up once and stays, as the allocator of `Box`, `Vec` and all that `alloc` has.
///
/// In a kernel:
///
/// ```no_run,standalone_crate
/// # use memdesc_host::Host as Machine;
/// #[global_allocator]
/// static HEAP: memdesc::Heap<Machine> = memdesc::Heap::new();
/// ```
///
/// which serves nothing before [`init`](Self::init). What it asks for: `GFP_KERNEL` where [`Platform::context`] says [`Context::Task`], else `GFP_ATOMIC`; in an NMI the
/// `_nolock` calls. An interrupt handler may use it if [`Platform::pin`] keeps interrupts out.
///
/// ```
/// use core::alloc::{GlobalAlloc, Layout};
/// use memdesc::{Config, Heap};
/// use memdesc_host::Host;
///
/// static HEAP: Heap<Host> = Heap::new();
/// let layout = Layout::new::<[u64; 100]>();
/// // SAFETY: the layout is not empty.
/// assert!(unsafe { HEAP.alloc(layout) }.is_null());
///
/// let (host, ram) = Host::small(8192)?;
/// let mm = HEAP.init(host, &Config::default(), &ram)?;
/// // SAFETY: the layout is not empty; freed once, with the same.
/// unsafe {
///     let array = HEAP.alloc_zeroed(layout);
///     assert_eq!(array.cast::<[u64; 100]>().read(), [0; 100]);
///     assert!(matches!(mm.lookup(mm.virt_to_pfn(array)).2, memdesc::Memory::Slab(_)));
///     HEAP.dealloc(array, layout);
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Heap<P: Platform> {
    state: AtomicU32,
    /// # Invariants
    ///
    /// Written by who brought `state` from [`EMPTY`] to [`FILLING`], and never again once that is [`THERE`].
    mm: UnsafeCell<MaybeUninit<Mm<P>>>,
}

// SAFETY: the memory manager is moved in once and never out, nor dropped; after that there are only shared references to it.
unsafe impl<P: Platform> Sync for Heap<P> where Mm<P>: Sync {}

impl<P: Platform> Heap<P> {
    /// Without a memory manager: every request fails.
    pub const fn new() -> Heap<P> {
        Heap {
            state: AtomicU32::new(EMPTY),
            mm: UnsafeCell::new(MaybeUninit::uninit()),
        }
    }

    /// Takes over the memory in `ranges`, as [`Mm::new`] does; from here on the heap has something to give.
    ///
    /// # Context
    ///
    /// Once, while the kernel boots, on a stack with 32 KiB left: the memory manager is made on it.
    ///
    /// # Errors
    ///
    /// As [`Mm::new`], and it may be tried again; [`InitError::Twice`] if the heap has a memory manager, or gets one at this moment.
    pub fn init(
        &'static self,
        platform: P,
        config: &Config,
        ranges: &[MemRange],
    ) -> Result<&'static Mm<P>, InitError> {
        // Acquire pairs with the Release below, of one who failed.
        let first =
            self.state
                .compare_exchange(EMPTY, FILLING, Ordering::Acquire, Ordering::Relaxed);
        if first.is_err() {
            return Err(InitError::Twice);
        }
        match Mm::new(platform, config, ranges) {
            Ok(mm) => {
                // SAFETY: only who made it FILLING is here, and nobody reads before it is THERE.
                let mm = unsafe { &*(*self.mm.get()).write(mm) };
                // Release pairs with the Acquire in `get`.
                self.state.store(THERE, Ordering::Release);
                Ok(mm)
            }
            Err(why) => {
                self.state.store(EMPTY, Ordering::Release);
                Err(why)
            }
        }
    }

    /// The memory manager, once it is there.
    ///
    /// # Context
    ///
    /// Any.
    #[inline]
    pub fn get(&self) -> Option<&Mm<P>> {
        // Acquire pairs with the Release in `init`: who sees that it is there sees it whole.
        if self.state.load(Ordering::Acquire) != THERE {
            return None;
        }
        // SAFETY: written before THERE was stored, and not again.
        Some(unsafe { (*self.mm.get()).assume_init_ref() })
    }

    #[inline]
    #[track_caller]
    fn request(&self, layout: Layout, more: Flags) -> *mut u8 {
        let Some(mm) = self.get() else {
            return core::ptr::null_mut();
        };
        let size = kmalloc_size(layout);
        let got = match mm.platform().context() {
            // Areas of vmalloc are aligned to pages, which is enough but for who wants more.
            Context::Task if layout.align() <= PAGE_SIZE => mm.kvmalloc(size, GFP_KERNEL | more),
            Context::Task => mm.kmalloc(size, GFP_KERNEL | more),
            Context::Atomic | Context::HardIrq => mm.kmalloc(size, GFP_ATOMIC | more),
            Context::Nmi => mm.kmalloc_nolock(size, __GFP_NOWARN | more),
        };
        match got {
            // Blocks are aligned in physical memory; beyond a page the direct map need not be.
            Ok(ptr) if ptr.addr().get() % layout.align() != 0 => {
                // SAFETY: just allocated, and nobody's.
                unsafe { self.give_back(mm, ptr) };
                core::ptr::null_mut()
            }
            Ok(ptr) => ptr.as_ptr(),
            Err(_) => core::ptr::null_mut(),
        }
    }

    /// # Safety
    ///
    /// `ptr` is from `request`, and nobody uses it any more.
    #[inline]
    #[track_caller]
    unsafe fn give_back(&self, mm: &Mm<P>, ptr: NonNull<u8>) {
        if mm.is_vmalloc_addr(ptr.as_ptr()) || mm.platform().context() != Context::Nmi {
            // SAFETY: the caller's promise.
            unsafe { mm.kvfree(ptr) };
        } else {
            // SAFETY: the same.
            unsafe { mm.kfree_nolock(ptr) };
        }
    }
}

impl<P: Platform> Default for Heap<P> {
    fn default() -> Heap<P> {
        Heap::new()
    }
}

impl<P: Platform> fmt::Debug for Heap<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Heap").field(&self.get()).finish()
    }
}

/// What to ask kmalloc for: it aligns a power of two to itself, all else to 8.
#[inline]
const fn kmalloc_size(layout: Layout) -> usize {
    let (size, align) = (layout.size(), layout.align());
    if align <= 8 {
        size
    } else if size > align {
        size.next_power_of_two()
    } else {
        align
    }
}

// SAFETY: what is given is as long and as aligned as was asked (kmalloc promises it, and it is looked at again), and is the caller's until it is freed. It does not unwind.
unsafe impl<P: Platform> GlobalAlloc for Heap<P>
where
    Mm<P>: Sync,
{
    #[inline]
    #[track_caller]
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        self.request(layout, Flags::EMPTY)
    }

    #[inline]
    #[track_caller]
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        self.request(layout, __GFP_ZERO)
    }

    #[inline]
    #[track_caller]
    unsafe fn dealloc(&self, ptr: *mut u8, _layout: Layout) {
        if let (Some(mm), Some(ptr)) = (self.get(), NonNull::new(ptr)) {
            // SAFETY: the caller's promise: it is from `alloc`.
            unsafe { self.give_back(mm, ptr) };
        }
    }

    /// Where the memory has room, it stays: `Vec` asks for more by doubling, and a size class often has it.
    #[track_caller]
    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        let (Some(mm), Some(old)) = (self.get(), NonNull::new(ptr)) else {
            return core::ptr::null_mut();
        };
        // SAFETY: the caller's promise: not more than `isize::MAX` with this alignment.
        let new = unsafe { Layout::from_size_align_unchecked(new_size, layout.align()) };
        let context = mm.platform().context();
        if context == Context::Nmi || layout.align() > PAGE_SIZE {
            let to = self.request(new, Flags::EMPTY);
            if !to.is_null() {
                // SAFETY: both are live, distinct, and at least this long; the old one is the caller's to give up.
                unsafe {
                    to.copy_from_nonoverlapping(ptr, layout.size().min(new_size));
                    self.give_back(mm, old);
                }
            }
            return to;
        }
        let gfp = if context == Context::Task {
            GFP_KERNEL
        } else {
            GFP_ATOMIC
        };
        // SAFETY: live memory from `alloc`, which is one of kvrealloc's, and not used if it has moved.
        let to = unsafe { mm.kvrealloc(old, kmalloc_size(new), gfp) };
        to.map_or(core::ptr::null_mut(), NonNull::as_ptr)
    }
}
