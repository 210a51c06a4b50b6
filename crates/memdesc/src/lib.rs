//! A memory manager for kernels in which `struct page` is one 8-byte typed word.
//!
//! See [`Mm`]: give it a [`Platform`] and a memory map, and it hands out pages, folios, page tables and slab objects; [`types`] shows
//! each kind of memory with an example. Above them: address spaces ([`mmap`]), the page cache ([`filemap`]), page tables ([`pgtable`]).
#![no_std]
#![cfg_attr(loom, allow(dead_code, unused_imports, unreachable_pub))]

#[cfg(any(test, loom))]
extern crate std;

/// The code in the guide to porting compiles and runs.
#[cfg(doctest)]
#[doc = include_str!("../../../docs/porting.md")]
struct Porting;

pub mod address;
#[cfg(not(loom))]
mod balloon;
#[cfg(not(loom))]
mod boot;
#[cfg(not(loom))]
pub mod census;
#[cfg(not(loom))]
pub mod config;
#[cfg(not(loom))]
mod desc;
#[cfg(loom)]
mod desc {
    pub(crate) mod counts;
    pub(crate) mod folio;
    #[cfg(test)]
    mod models;
    pub(crate) use folio::{Folio, FolioFlags};
}
#[cfg(not(loom))]
mod device;
#[cfg(not(loom))]
mod error;
#[cfg(not(loom))]
pub mod gfp;
#[cfg(not(loom))]
mod guard;
#[cfg(not(loom))]
mod heap;
#[doc(hidden)]
pub mod inject;
#[cfg(not(loom))]
mod inline;
#[cfg(not(loom))]
pub mod ledger;
#[cfg(not(loom))]
pub mod lockdep;
#[cfg(not(loom))]
mod memmap;
#[cfg(loom)]
mod memmap {
    pub(crate) mod bad;
    pub(crate) mod heads;
    #[cfg(test)]
    mod models;
    pub(crate) mod word;
}
#[cfg(not(loom))]
mod compaction;
#[cfg(not(loom))]
pub mod filemap;
#[cfg(not(loom))]
mod folio;
#[cfg(loom)]
mod folio {
    #[cfg(test)]
    mod models;
    mod wait;
}
#[cfg(not(loom))]
mod freepage;
#[cfg(not(loom))]
pub mod memcg;
#[cfg(loom)]
mod memcg {
    pub(crate) mod counter;
    #[cfg(test)]
    mod models;
}
#[cfg(not(loom))]
mod memblock;
#[cfg(not(loom))]
mod memory_failure;
#[cfg(not(loom))]
mod memory_hotplug;
#[cfg(not(loom))]
pub mod mempool;
#[cfg(loom)]
mod mempool {
    mod level;
    #[cfg(test)]
    mod models;
}
#[cfg(not(loom))]
mod migrate;
#[cfg(not(loom))]
mod mm;
#[cfg(not(loom))]
pub mod mmap;
#[cfg(loom)]
mod mmap {
    #[cfg(test)]
    mod models;
}
#[cfg(not(loom))]
mod name;
#[cfg(not(loom))]
mod netpool;
#[cfg(loom)]
mod netpool {
    mod life;
    #[cfg(test)]
    mod models;
}
#[cfg(not(loom))]
mod own;
#[cfg(not(loom))]
mod owner;
#[cfg(not(loom))]
pub mod page_alloc;
#[cfg(loom)]
mod page_alloc {
    mod types;
    pub(crate) use types::MigrateType;
}
#[cfg(not(loom))]
pub mod pgtable;
#[cfg(loom)]
mod pgtable {
    pub(crate) mod entry;
}
#[cfg(not(loom))]
pub mod platform;
pub mod rcu;
#[cfg(not(loom))]
pub mod report;
#[cfg(loom)]
mod report {
    pub(crate) mod depot;
    pub(crate) mod entry;
    #[cfg(test)]
    mod models;
}
#[cfg(not(loom))]
pub mod reserve;
#[cfg(loom)]
mod reserve {
    #[cfg(test)]
    mod models;
    mod wait;
}
#[cfg(not(loom))]
mod reserved;
#[cfg(not(loom))]
mod shrinker;
#[cfg(not(loom))]
pub mod slab;
#[cfg(not(loom))]
mod stats;
mod sync;
#[cfg(not(loom))]
pub mod types;
#[cfg(not(loom))]
mod vmalloc;
#[cfg(not(loom))]
mod vmscan;
pub mod xarray;
#[cfg(not(loom))]
pub mod zsmalloc;

#[cfg(not(loom))]
pub use {
    address::{MAX_ORDER, PAGE_SHIFT, PAGE_SIZE, PAGEBLOCK_ORDER, Pfn, PhysAddr},
    balloon::Balloon,
    census::{Census, CensusKind, CensusStep, KindCensus},
    compaction::Obstacle,
    config::{Config, MemRange},
    desc::{Folio, FolioFlags, Held, PtDesc, Slab, VmArea, VmAreaKind, ZsDesc},
    device::{DeviceError, DevicePages},
    error::{AllocError, InitError},
    folio::{FolioLock, FolioRef, LruList, LruView},
    freepage::{NotReported, PageDamage, PageWords, Reported},
    gfp::Flags,
    heap::Heap,
    inline::{Offline, Poisoned, Reserved},
    ledger::{Fragmentation, Ledger, Walk, ZoneView},
    memblock::Memblock,
    memcg::{MemCgroup, MemcgMismatch, MemcgStat, MemcgView},
    memmap::{DescClass, Found, PageType, TAIL_WORDS_ORDER, Word},
    memory_failure::{FailedPage, MemoryFailure, MfResult},
    mempool::{Mempool, MempoolBusy, MempoolKind, MempoolView},
    mm::Mm,
    netpool::{MAX_PAGE_POOLS, PagePool, PagePoolOps, PagePoolParams, PagePoolStats},
    own::{MAX_OWN_TYPES, OwnPages, OwnRef, OwnType},
    owner::{DescPtr, FolioKind, Memory},
    page_alloc::{MigrateType, PcpView, ZoneType},
    platform::{BalloonOp, Context, FaultPoint, Platform, ReclaimRequest},
    report::{
        Corruption, DepotInfo, DescState, PageHistory, PageOwnerInfo, PageState, PageTrack,
        Recorded, Report, Stack, StackId, Track, Validation,
    },
    reserve::{Bound, Demand, DestroyReserveError, Reserve, ReserveView, Unbalanced},
    reserved::ReservedRange,
    shrinker::Shrinker,
    slab::{
        Cache, CacheFlags, CacheView, DestroyError, KfenceFault, KfenceInfo, KfenceObject,
        KmemCache, PrefilledSheaf, SlabBox,
    },
    stats::Event,
    vmalloc::{AddressInfo, KernelStack, VmAreaView, VmallocInfo},
};
