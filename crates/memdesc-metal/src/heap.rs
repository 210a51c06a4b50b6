//! `alloc`'s collections on the memory manager: kmalloc, and vmalloc for what is large.

use core::alloc::{GlobalAlloc, Layout};
use core::ptr::NonNull;

use memdesc::gfp::{__GFP_ZERO, Flags, GFP_ATOMIC, GFP_KERNEL};
use memdesc::{Context, PAGE_SIZE, Platform};

use crate::memory;
use crate::platform::Metal;

struct Heap;

#[global_allocator]
static HEAP: Heap = Heap;

/// What to ask kmalloc for: a power of two is aligned to itself, everything to 8.
fn size(layout: Layout) -> usize {
    if layout.align() <= 8 {
        layout.size()
    } else {
        layout.size().max(layout.align()).next_power_of_two()
    }
}

fn alloc(layout: Layout, more: Flags) -> *mut u8 {
    let Some(mm) = memory::mm() else {
        return core::ptr::null_mut();
    };
    let size = size(layout);
    let sleeps = Metal.context() == Context::Task;
    // Pages of vmalloc are aligned to pages, which is enough but for who wants more.
    let found = if sleeps && layout.align() <= PAGE_SIZE {
        mm.kvmalloc(size, GFP_KERNEL | more)
    } else if sleeps {
        mm.kmalloc(size, GFP_KERNEL | more)
    } else {
        mm.kmalloc(size, GFP_ATOMIC | more)
    };
    found.map_or(core::ptr::null_mut(), NonNull::as_ptr)
}

// SAFETY: what kmalloc and vmalloc give is as long and as aligned as was asked, and the caller's until it is freed.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        alloc(layout, Flags::EMPTY)
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        alloc(layout, __GFP_ZERO)
    }

    unsafe fn dealloc(&self, ptr: *mut u8, _layout: Layout) {
        if let (Some(mm), Some(ptr)) = (memory::mm(), NonNull::new(ptr)) {
            // SAFETY: the caller's promise: it is from `alloc`.
            unsafe { mm.kvfree(ptr) };
        }
    }
}
