//! The slab allocator: objects of one size, out of pages.
//!
//! | room | what |
//! |---|---|
//! | [`cache`] | a cache: geometry, its slabs, the lists they are in |
//! | [`sheaf`] | a CPU's stack of objects in front of them: no lock shared with anyone |
//! | [`object`] | the way of an object: alloc, free, bulk, and of a slab: new, discard |
//! | [`lifecycle`] | of a cache: create, shrink, destroy, look at |
//! | [`bootstrap`] | descriptors: how the first slabs come up out of nothing, and where the recursion stops |
//! | [`kmalloc`] | size classes |
//! | [`nolock`] | objects from any context |
//! | [`prefill`] | objects that are had before they are needed |
//! | [`rest`] | objects that are nobody's and in no slab |
//! | [`pointers`] | where those stand |
//! | [`kfence`] | a guarded pool: one allocation in so many, between pages that nobody can touch |
//! | [`debug`] | red zones, poison, who did it |
//! | [`typed`] | `KmemCache<T>` |
//!
//! An object leads to its slab through the memory map: page frame number, word, descriptor. Nothing in the page says so.

pub(crate) mod bootstrap;
pub(crate) mod cache;
pub(crate) mod debug;
pub(crate) mod init;
pub(crate) mod kfence;
pub(crate) mod kmalloc;
mod lifecycle;
pub(crate) mod nolock;
pub(crate) mod object;
pub(crate) mod pointers;
mod prefill;
mod rest;
pub(crate) mod sheaf;
pub(crate) mod typed;

pub use cache::{Cache, CacheFlags, CacheView, DestroyError};
pub(crate) use cache::{CacheCore, slab_of};
pub use kfence::{KfenceFault, KfenceInfo, KfenceObject};
pub use kmalloc::KMALLOC_MAX_CACHE_SIZE;
pub(crate) use nolock::DeferredObjects;
pub use prefill::PrefilledSheaf;
pub use typed::{KmemCache, SlabBox};
