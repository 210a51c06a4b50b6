//! What happened, in numbers.

use alloc::collections::BTreeMap;

use memdesc::AllocError;

use crate::handles::Purpose;

/// A failure of ours where Linux had none: why, and the order (of pages) or size (of objects).
pub type Failures = BTreeMap<(&'static str, u64), u64>;

/// The name of a reason to fail.
pub fn reason(why: AllocError) -> &'static str {
    match why {
        AllocError::NoBlock => "no_block",
        AllocError::Watermark => "watermark",
        AllocError::NoDescriptor => "no_descriptor",
        AllocError::BadOrder => "bad_order",
        AllocError::BadSize => "bad_size",
        AllocError::NoZone => "no_zone",
        AllocError::Busy => "busy",
        AllocError::Injected => "injected",
        _ => "other",
    }
}

/// Events by kind, as the recording has them.
#[derive(Clone, Debug, Default)]
pub struct Traffic {
    /// `mm_page_alloc`.
    pub page_alloc: u64,
    /// `mm_page_alloc` without a page.
    pub page_alloc_failed: u64,
    /// `mm_page_free`.
    pub page_free: u64,
    /// `mm_page_free_batched`, which is no second free.
    pub page_free_batched: u64,
    /// `kmalloc` and `kmalloc_node`.
    pub kmalloc: u64,
    /// `kfree`.
    pub kfree: u64,
    /// `kmem_cache_alloc` and `kmem_cache_alloc_node`.
    pub cache_alloc: u64,
    /// `kmem_cache_free`.
    pub cache_free: u64,
}

/// Pages. Blocks unless said otherwise.
#[derive(Clone, Debug, Default)]
pub struct PageCounts {
    /// Blocks that the snapshot had.
    pub from_snapshot: u64,
    /// Allocated.
    pub allocated: u64,
    /// Pages of those.
    pub allocated_pages: u64,
    /// Allocated, by purpose.
    pub by_purpose: [u64; Purpose::ALL.len()],
    /// Allocated, by order.
    pub by_order: [u64; memdesc::MAX_ORDER + 1],
    /// Freed.
    pub freed: u64,
    /// Pages of those.
    pub freed_pages: u64,
    /// Failed, where Linux had none fail.
    pub failed: u64,
    /// Why.
    pub failures: Failures,
    /// Live at the end.
    pub live: u64,
    /// Frees of blocks that nobody was seen to allocate.
    pub free_unseen: u64,
    /// Blocks freed because their pages were handed out again.
    pub free_implied: u64,
    /// Frees of a part of a block: the block goes when its last part does.
    pub free_in_part: u64,
    /// Frees that took several blocks of ours together.
    pub free_joined: u64,
    /// Frees of reserved memory, which ours does not give back.
    pub free_reserved: u64,
    /// Linux's slabs, left to the objects: allocations and frees.
    pub slab_allocated: u64,
    /// Frees of Linux's slabs.
    pub slab_freed: u64,
}

/// Objects.
#[derive(Clone, Debug, Default)]
pub struct SlabCounts {
    /// Allocated.
    pub allocated: u64,
    /// Freed.
    pub freed: u64,
    /// Failed, where Linux had none fail.
    pub failed: u64,
    /// Why.
    pub failures: Failures,
    /// Live at the end.
    pub live: u64,
    /// Caches made.
    pub caches: u64,
    /// `kfree(NULL)`.
    pub free_null: u64,
    /// Frees of objects that nobody was seen to allocate.
    pub free_unseen: u64,
    /// Objects freed because their address was handed out again.
    pub free_implied: u64,
    /// Objects freed because their slab was.
    pub free_with_slab: u64,
    /// Allocations that failed in Linux.
    pub linux_failed: u64,
    /// Events that were left out (`--pages-only`).
    pub skipped: u64,
}
