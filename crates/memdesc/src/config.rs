//! What a user of the memory manager decides before it comes up.

use crate::address::PhysAddr;
use crate::reserved::ReservedRange;

/// At most so many NUMA nodes.
pub const MAX_NODES: usize = 8;
/// At most so many CPUs.
pub const MAX_CPUS: usize = 1024;

/// At most so many registered shrinkers.
pub const MAX_SHRINKERS: usize = 32;

/// A piece of physical memory, as the platform's memory map gives it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MemRange {
    /// The first byte. Rounded up to a page.
    pub start: PhysAddr,
    /// One past the last byte. Rounded down to a page.
    pub end: PhysAddr,
    /// The NUMA node.
    pub node: u8,
}

/// The knobs. [`Config::default`] is Linux's choice wherever Linux has one.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// ZONE_DMA ends here (16 MiB).
    pub dma_limit: PhysAddr,
    /// ZONE_DMA32 ends here (4 GiB).
    pub dma32_limit: PhysAddr,
    /// Memory from here on is ZONE_MOVABLE (`kernelcore=`); none by default.
    pub movable_from: Option<PhysAddr>,
    /// What of the ranges is in use already. Nobody is handed it, nor is it touched, until it is [given back](crate::Mm::free_reserved); blocks
    /// do not merge across its start.
    pub reserved: &'static [ReservedRange],
    /// `vm.min_free_kbytes`; computed from the size of memory as Linux does when `None`.
    pub min_free_kbytes: Option<u64>,
    /// `vm.watermark_scale_factor`, in 1/10000 of a zone.
    pub watermark_scale_factor: u64,
    /// `vm.lowmem_reserve_ratio` for DMA, DMA32 and Normal; 0 turns it off.
    pub lowmem_reserve_ratio: [u64; 3],
    /// The memory that the memory map is put into reads as zero already (fresh from a hypervisor
    /// or from mmap): taking over then writes next to nothing.
    pub memory_is_zeroed: bool,
    /// A real-time kernel (`CONFIG_PREEMPT_RT`): the locks of zones, of caches' slab lists and of the list of caches sleep, and
    /// their holders may be preempted and migrated. The per-CPU lists stay raw: a few instructions, never waited for.
    pub preempt_rt: bool,
    /// Pointers that `kvfree_rcu` lets lie on a CPU before it makes who queues more wait, if he may.
    pub kvfree_backlog: u32,
    /// How long a block of pointers that does not get full lies before its grace period is asked for, in nanoseconds (`KFREE_DRAIN_JIFFIES`:
    /// 5 s).
    pub kvfree_drain_ns: u64,
    /// Bytes for call stacks (`stack_depot`), each of which is kept once; 0 for none. Counted as metadata, like the next.
    pub stack_depot: usize,
    /// Blocks of which it is remembered who had them last and who gave them back (`page_owner`), 64 bytes and more each; 0 for none. When more change
    /// hands, those are forgotten that did so longest ago.
    pub page_owner: usize,
    /// Words, links and counts are checked before they are followed, as they always are in debug builds (`CONFIG_DEBUG_LIST`, `check_pages`): a stray write
    /// into the memory map or a descriptor then gives a report.
    pub check_pages: bool,
    /// Objects that the guarded pool has room for (`CONFIG_KFENCE_NUM_OBJECTS`, 255 in Linux); 0 for no pool. Two pages each, and one: see [`KfenceInfo`](crate::KfenceInfo).
    /// Needs [`Platform::kernel_map_pages`](crate::Platform::kernel_map_pages) to find what does not show in a page's own bytes.
    pub kfence_objects: usize,
    /// One ordinary allocation of an object in so many is served from the guarded pool, of each CPU's; 0 for none until
    /// [`kfence_set_sample`](crate::Mm::kfence_set_sample).
    pub kfence_sample: u32,
    /// And at most one in so many nanoseconds (`kfence.sample_interval`, 100 ms in Linux); 0 for as many as there are.
    pub kfence_interval_ns: u64,
    /// Debug flags for every cache (`slab_debug=`).
    pub slab_debug: crate::slab::CacheFlags,
    /// Zero pages and objects when they are handed out (`init_on_alloc`); not objects with a constructor, of type-stable caches, or that are poisoned.
    pub init_on_alloc: bool,
    /// Zero pages and objects when they come back (`init_on_free`), with the same exceptions: what was in them is gone. Who asks for zeroed pages gets those that still are without
    /// another pass.
    pub init_on_free: bool,
    /// Fill pages with 0xaa when they come back, with zeros if [`init_on_free`](Self::init_on_free) is on too, and see whether that is still
    /// there when they are handed out (`page_poison`). Memory that was never handed out is not filled, so a block that merges with such is
    /// not checked until it has been handed out as a whole.
    pub page_poison: bool,
    /// Make free pages inaccessible (`debug_pagealloc`), by [`Platform::kernel_map_pages`](crate::Platform::kernel_map_pages). Memory that was
    /// never handed out stays as the platform mapped it.
    pub debug_pagealloc: bool,
    /// Report large free blocks to the platform ([`Platform::report_free_pages`](crate::Platform::report_free_pages)).
    pub page_reporting: bool,
    /// Blocks of this order and above (`page_reporting_order`; the pageblock's by default).
    pub page_reporting_order: usize,
    /// How long blocks lie before they are reported, in nanoseconds (`PAGE_REPORTING_DELAY`: 2 s): what is used again soon is not worth it.
    pub page_reporting_delay_ns: u64,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            dma_limit: PhysAddr(16 << 20),
            dma32_limit: PhysAddr(4 << 30),
            movable_from: None,
            reserved: &[],
            min_free_kbytes: None,
            watermark_scale_factor: 10,
            lowmem_reserve_ratio: [256, 256, 32],
            memory_is_zeroed: false,
            preempt_rt: false,
            kvfree_backlog: 4096,
            kvfree_drain_ns: 5_000_000_000,
            stack_depot: 0,
            page_owner: 0,
            check_pages: false,
            kfence_objects: 0,
            kfence_sample: 1000,
            kfence_interval_ns: 0,
            slab_debug: crate::slab::CacheFlags::EMPTY,
            init_on_alloc: false,
            init_on_free: false,
            page_poison: false,
            debug_pagealloc: false,
            page_reporting: false,
            page_reporting_order: crate::address::PAGEBLOCK_ORDER,
            page_reporting_delay_ns: 2_000_000_000,
        }
    }
}
