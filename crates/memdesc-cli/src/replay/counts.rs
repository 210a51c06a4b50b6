//! What happened, in numbers.

use std::collections::BTreeMap;

use memdesc::AllocError;

use crate::handles::Purpose;

/// A failure of ours where Linux had none: why, and the order (of pages) or size (of objects).
pub(crate) type Failures = BTreeMap<(&'static str, u64), u64>;

/// The name of a reason to fail.
pub(crate) fn reason(why: AllocError) -> &'static str {
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
pub(crate) struct Traffic {
    pub(crate) page_alloc: u64,
    pub(crate) page_alloc_failed: u64,
    pub(crate) page_free: u64,
    pub(crate) page_free_batched: u64,
    pub(crate) kmalloc: u64,
    pub(crate) kfree: u64,
    pub(crate) cache_alloc: u64,
    pub(crate) cache_free: u64,
}

/// Pages. Blocks unless said otherwise.
#[derive(Clone, Debug, Default)]
pub(crate) struct PageCounts {
    /// Blocks that the snapshot had.
    pub(crate) from_snapshot: u64,
    pub(crate) allocated: u64,
    pub(crate) allocated_pages: u64,
    pub(crate) by_purpose: [u64; Purpose::ALL.len()],
    pub(crate) by_order: [u64; memdesc::MAX_ORDER + 1],
    pub(crate) freed: u64,
    pub(crate) freed_pages: u64,
    pub(crate) failed: u64,
    pub(crate) failures: Failures,
    pub(crate) live: u64,
    /// Frees of blocks that nobody was seen to allocate.
    pub(crate) free_unseen: u64,
    /// Blocks freed because their pages were handed out again.
    pub(crate) free_implied: u64,
    /// Frees of a part of a block: the block goes when its last part does.
    pub(crate) free_in_part: u64,
    /// Frees that took several blocks of ours together.
    pub(crate) free_joined: u64,
    /// Frees of reserved memory, which ours does not give back.
    pub(crate) free_reserved: u64,
    /// Linux's slabs, left to the objects: allocations and frees.
    pub(crate) slab_allocated: u64,
    pub(crate) slab_freed: u64,
}

/// Objects.
#[derive(Clone, Debug, Default)]
pub(crate) struct SlabCounts {
    pub(crate) allocated: u64,
    pub(crate) freed: u64,
    pub(crate) failed: u64,
    pub(crate) failures: Failures,
    pub(crate) live: u64,
    pub(crate) caches: u64,
    /// `kfree(NULL)`.
    pub(crate) free_null: u64,
    /// Frees of objects that nobody was seen to allocate.
    pub(crate) free_unseen: u64,
    /// Objects freed because their address was handed out again.
    pub(crate) free_implied: u64,
    /// Objects freed because their slab was.
    pub(crate) free_with_slab: u64,
    /// Allocations that failed in Linux.
    pub(crate) linux_failed: u64,
    /// Events that were left out (`--pages-only`).
    pub(crate) skipped: u64,
}
