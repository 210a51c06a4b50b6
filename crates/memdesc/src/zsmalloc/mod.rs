//! zsmalloc: compressed memory, objects of odd sizes packed into pages (`mm/zsmalloc.c`, for zram and zswap).
//!
//! A [`ZsPool`] hands out objects of up to a page, by [`ZsHandle`]. Objects of a [`SizeClass`] lie in *zspages*, up to 8 pages that need
//! not lie together, across the borders of pages; a handle stays the same when [`zs_compact`](crate::Mm::zs_compact) moves the object. So there is no pointer to an
//! object but for as long as it is read.
//!
//! ```
//! use memdesc::{Config, Memory, Mm, PageType};
//! use memdesc::gfp::GFP_KERNEL;
//! use memdesc_host::Host;
//!
//! let (host, ram) = Host::small(16384)?;
//! let mm = Mm::new(host, &Config::default(), &ram)?;
//! let pool = mm.zs_create_pool("zram0")?;
//! let data = [7; 1300];
//! let mut handles = Vec::new();
//! for _ in 0..300 {
//!     let handle = mm.zs_malloc(&pool, data.len(), GFP_KERNEL)?;
//!     mm.zs_obj_write(&pool, handle, &data)?;
//!     handles.push(handle);
//! }
//! // 3 of 1312 bytes in a page: 100 pages. As kmalloc-1536 they would be 125.
//! assert_eq!(mm.zs_get_total_pages(&pool), 100);
//!
//! // Two of three go, and what is left moves together.
//! for (i, handle) in handles.iter().enumerate().filter(|(i, _)| i % 3 != 0) {
//!     mm.zs_free(&pool, *handle);
//! }
//! assert_eq!(mm.zs_get_total_pages(&pool), 100);
//! assert_eq!(mm.zs_compact(&pool), 66);
//! let mut copy = [0; 1300];
//! for handle in handles.iter().step_by(3) {
//!     let view = mm.zs_obj_read_begin(&pool, *handle, &mut copy)?;
//!     assert_eq!(*view, data);
//!     mm.zs_obj_read_end(view);
//!     mm.zs_free(&pool, *handle);
//! }
//! assert_eq!(mm.pages_of(PageType::Zsmalloc), 0);
//! mm.zs_destroy_pool(pool).expect("all objects are free");
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # What it costs
//!
//! | | here | Linux 6.18 |
//! |---|---:|---:|
//! | of an object, in its zspage | 6 bytes | 8 |
//! | its handle | 8 | 8 |
//! | of a page | 8, its word; 8, its buddy | 64, its `struct page` |
//! | of a zspage | 8 more for the first page's descriptor, 16 bytes in all | 56 |
//!
//! # Locks
//!
//! A class's lock (`zs_class`) is a leaf, and never held together with that of another class: it guards the lists, the freelists, and what an object says of
//! whose it is. The table of pools (`zs_pools`) is a mutex outside of it, taken by who makes a pool or takes one down, and only tried by reclaim. Pages
//! are had and given back with neither held.
//!
//! Who reads, writes or frees an object takes it by its slot, one compare-exchange without a lock. Compaction holds the lock of the class and only ever
//! tries to take a slot; who finds an object moving waits for the lock. So there is no order between slots and locks to be got wrong. A page that moves is moved in
//! the same way, with all objects that have a byte in it.

mod access;
mod class;
mod compact;
mod handle;
mod migrate;
mod pool;
mod zspage;

pub use access::{ZsError, ZsView};
pub use class::{
    SIZE_CLASSES, SizeClass, ZS_MAX_ALLOC_SIZE, ZS_MAX_PAGES_PER_ZSPAGE, ZS_MIN_ALLOC_SIZE,
    ZS_SIZE_CLASS_DELTA, ZS_SIZE_CLASSES, linux_class_index,
};
pub use handle::ZsHandle;
pub(crate) use migrate::is_movable;
pub(crate) use pool::ZsPools;
pub use pool::{ZsDestroyError, ZsPool, ZsPoolStats};
