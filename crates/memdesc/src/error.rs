//! Why a request was refused. Errors are values: each says which case.

use core::fmt;

use crate::address::PhysAddr;

/// An allocation that could not be had. Nothing has changed when one of these comes back.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum AllocError {
    /// No zone that the flags allow has a free block of this order.
    NoBlock,
    /// There is memory, but it lies under the watermark that these flags may go to.
    Watermark,
    /// The descriptors that a split or the new owner needs could not be had.
    NoDescriptor,
    /// The order is above [`MAX_ORDER`](crate::address::MAX_ORDER).
    BadOrder,
    /// The size is zero where it may not be, or above what the call serves.
    BadSize,
    /// The machine has no memory of the wanted kind at all: no such node or zone.
    NoZone,
    /// The page asked for by number is not free, or not memory.
    Busy,
    /// A request that only tries found this CPU's lists, and where it may look the zones, without what it wants.
    Empty,
    /// A request that only tries found somebody inside: what it interrupted, or another CPU. Trying again from the same context
    /// finds the same.
    Contended,
    /// A request that only tries may not be made here, or not for this: the context has no CPU, or the order is not kept in
    /// per-CPU lists.
    Forbidden,
    /// The range for vmalloc has no hole of this size, or the platform has no such range.
    NoAddressSpace,
    /// The platform could not make translations: no memory for page tables.
    NoPageTable,
    /// The memory cgroup, or one above it, would stand above its limit, and nothing of it could be reclaimed.
    Limit,
    /// The object is to be charged to a memory cgroup, and its cache does not keep whom objects are charged to: it was made without
    /// [`CacheFlags::ACCOUNT`](crate::CacheFlags::ACCOUNT) and [`CacheFlags::OWNERS`](crate::CacheFlags::OWNERS).
    NoOwners,
    /// The reserve, or one above it, would stand above its limit; or what is asked for is not what it was made for.
    ReserveLimit,
    /// The reserve is not connected: nothing is set aside for it.
    Detached,
    /// There are as many as there can be.
    TooMany,
    /// Fault injection said so.
    Injected,
}

impl fmt::Display for AllocError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            AllocError::NoBlock => "no free block of this order in any allowed zone",
            AllocError::Watermark => "what is free lies under the watermark",
            AllocError::NoDescriptor => "no memory for the descriptors",
            AllocError::BadOrder => "order above MAX_ORDER",
            AllocError::BadSize => "size not served",
            AllocError::NoZone => "no memory of the wanted node or zone",
            AllocError::Busy => "the wanted page is not free",
            AllocError::Empty => "nothing there to be had without a lock",
            AllocError::Contended => "somebody is inside, and this request does not wait",
            AllocError::Forbidden => "not to be tried here",
            AllocError::NoAddressSpace => "no room in the address range for vmalloc",
            AllocError::NoPageTable => "the addresses could not be mapped",
            AllocError::Limit => "the memory cgroup's limit is reached",
            AllocError::NoOwners => "the cache does not keep whom its objects are charged to",
            AllocError::ReserveLimit => "the reserve's limit is reached",
            AllocError::Detached => "the reserve is not connected",
            AllocError::TooMany => "as many as there can be",
            AllocError::Injected => "fault injected",
        })
    }
}

impl core::error::Error for AllocError {}

/// Why a memory manager could not be brought up.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum InitError {
    /// No range of RAM was given.
    NoMemory,
    /// A range is empty or ends before it starts.
    EmptyRange(PhysAddr),
    /// Two ranges overlap, at this address.
    Overlap(PhysAddr),
    /// What is reserved here is empty, or is not in the ranges as a whole.
    BadReserved(PhysAddr),
    /// A range reaches past [`MAX_PFN`](crate::address::MAX_PFN): 16 TiB.
    TooHigh(PhysAddr),
    /// The platform does not map this range.
    NotMapped(PhysAddr),
    /// More than [`MAX_NODES`](crate::config::MAX_NODES) nodes.
    TooManyNodes(u8),
    /// No CPU, or more than [`MAX_CPUS`](crate::config::MAX_CPUS).
    BadCpuCount(usize),
    /// The memory map and the first slabs do not fit: so many bytes in one piece were wanted.
    TooSmall(u64),
    /// [`Platform::direct_map`](crate::Platform::direct_map) is not at the start of a page.
    BadDirectMap(usize),
    /// A [`Memblock`](crate::Memblock) has no room for another piece.
    TooManyRanges,
    /// This [`Heap`](crate::Heap) has a memory manager already.
    Twice,
}

impl fmt::Display for InitError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            InitError::NoMemory => f.write_str("no range of RAM was given"),
            InitError::EmptyRange(at) => write!(f, "the range at {at:?} is empty"),
            InitError::Overlap(at) => write!(f, "two ranges overlap at {at:?}"),
            InitError::BadReserved(at) => {
                write!(f, "what is reserved at {at:?} is empty or no memory")
            }
            InitError::TooHigh(at) => write!(f, "the range at {at:?} reaches past 16 TiB"),
            InitError::NotMapped(at) => write!(f, "the platform does not map the range at {at:?}"),
            InitError::TooManyNodes(n) => write!(f, "node {n}: at most 8 nodes are supported"),
            InitError::BadCpuCount(n) => write!(f, "{n} CPUs: 1 to 1024 are supported"),
            InitError::TooSmall(n) => {
                write!(f, "no piece of RAM holds the {n} bytes needed to boot")
            }
            InitError::BadDirectMap(at) => {
                write!(f, "the direct map at {at:#x} is not aligned to a page")
            }
            InitError::TooManyRanges => f.write_str("more pieces of memory than there is room for"),
            InitError::Twice => f.write_str("this heap has a memory manager already"),
        }
    }
}

impl core::error::Error for InitError {}
