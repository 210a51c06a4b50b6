//! Mempools: a minimum of elements set aside, so that who waits for one gets it (`mm/mempool.c`).
//!
//! ```
//! use memdesc::{*, gfp::*};
//!
//! # let (host, ram) = memdesc_host::Host::small(16384)?;
//! # let mm = Mm::new(host, &Config::default(), &ram)?;
//! // Writing out a page needs one of these, and pages are written out because memory is short.
//! let bios = mm.mempool_create("bio", MempoolKind::Kmalloc { size: 256 }, 4, GFP_KERNEL)?;
//! let bio = bios.alloc(GFP_NOIO)?;
//! // SAFETY: ours, from this pool.
//! unsafe { bios.free(bio) };
//! bios.destroy().expect("all are back");
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! A request asks for ordinary memory first, without reclaim, reserves or complaints; then takes an element of the pool; then, if it may sleep, asks with
//! reclaim, and waits until the pool has what it needs. Freeing refills the pool while it lacks something, else gives back to ordinary memory. So whoever
//! holds no more than the pool's minimum, all users together, never fails and never waits for ever, if nothing else is left in the machine.
//!
//! | | Linux | here |
//! |---|---|---|
//! | who waits | asks again every 5 s | asks again at every [`tick`](crate::Mm::tick), without reclaim |
//! | order of who waits | any; a request for many waits as long as others take what comes back | the queue's: see [`level`] |
//! | a request for many | as many as there are in all, `GFP_KERNEL` | the same, with any flags: all or none |
//! | elements in the pool | linked by an array | the same; not touched, and free as far as checks go |
//! | `mempool_resize` to more | may leave the pool short | whole, or nothing has changed |
//! | destroying it | what is out is the caller's affair | an error value while the pool lacks something |
//!
//! An element may also be freed as what it is, by `kfree` and so on; it is missing in the pool then, until [`resize`](Mempool::resize) fills it up.
//!
//! # What is done to elements in the pool
//!
//! An object of a debug cache is checked when it comes in, and marked and poisoned as a free one; when it is handed out that is checked, so a write to it
//! meanwhile is found. Pages are treated as free ones by the services that are on (`page_poison`, `init_on_free`, `debug_pagealloc`: they are inaccessible).
//! An element that is freed to the pool twice is found where checks are on, and what is no element of the pool's is reported and left alone. Nobody is
//! charged for an element in the pool, nor for one that is taken out of it: that is the machine's.
//!
//! # Locks
//!
//! A pool's lock (`mempool`) is a leaf; elements are had, checked and given back outside of it. The list of pools (`mempools`) sleeps, is outside of it, and
//! only tried by ticks. While somebody waits he holds neither, nor anything of the pool; so nothing of the pool is ever held by who waits for the pool.

mod element;
pub(crate) mod level;
mod pool;
mod request;

pub(crate) use pool::Mempools;
pub use pool::{Mempool, MempoolBusy, MempoolKind, MempoolView};
