//! Reserves: memory that is there when everything else is gone, for those entitled and for nobody else.
//!
//! Writing memory back over a network needs memory: packets, headers, slab pages. Seed 004 argues about how to promise it; Linux merged a pool under a
//! watermark that whoever has `__GFP_MEMALLOC` may empty, and throttles. Here a promise is a [`Demand`]: so many objects of a cache, so many bytes of kmalloc,
//! so many pages. From it follows a number of pages ([`Mm::reserve_estimate`], [`geometry`]), which are set aside when the reserve is connected, with the
//! descriptors that they will need. After that no request within the demand fails, whatever the order of requests and frees, however large the mix.
//!
//! ```
//! # use memdesc::{Config, Demand, Mm, gfp::*};
//! # let (host, ram) = memdesc_host::Host::small(4096)?;
//! # let mm = Mm::new(host, &Config::default(), &ram)?;
//! // A group, and what it needs below it.
//! let swap = mm.reserve("nbd0", Demand::None)?;
//! let data = mm.reserve("data", Demand::Kmalloc { bytes: 64 << 10, min: 64, max: 2048 })?;
//! let frags = mm.reserve("frags", Demand::Pages { order: 0, count: 32 })?;
//! data.connect(Some(&swap))?;
//! frags.connect(Some(&swap))?;
//! // Only now is anything set aside.
//! swap.connect(None)?;
//! // Ordinary memory while there is some, then what was set aside. Freed by the ordinary kfree.
//! let head = data.kmalloc(700, GFP_ATOMIC)?;
//! // SAFETY: ours, and not used any more.
//! unsafe { mm.kfree(head) };
//! # assert_eq!(mm.set_aside_pages(), mm.pages_of(memdesc::PageType::SetAside));
//! swap.disconnect()?;
//! assert_eq!(mm.set_aside_pages(), 0);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! | room | what |
//! |---|---|
//! | [`geometry`] | from a demand to a bound in pages, and why it is one |
//! | [`node`] | what a node promises and charges; its counters |
//! | [`tree`] | the nodes: found by number, made; what they need |
//! | [`connect`] | connected, taken apart, resized; limits |
//! | [`store`] | what is set aside: blocks, slabs; how they are taken and come back |
//! | [`wait`] | waiting for an uncharge |
//! | [`request`] | who is entitled; charge, wait, take |
//! | [`view`] | the listing |
//! | here | what users see |
//!
//! **Who is entitled.** Who has the handle; or a task whose [`Platform::current_reserve`] names a reserve (`PF_MEMALLOC`), by all of its ordinary calls; or a request
//! with `__GFP_MEMALLOC`, from the reserve that [`Mm::set_memalloc_reserve`] named; none of them with `__GFP_NOMEMALLOC`. An entitled request never reclaims
//! by itself: it is what reclaim waits for.
//!
//! **What is charged** is the reserve's memory only: a request that ordinary memory serves costs nothing. An object is charged what its class is asked for at
//! least, so a sum of requests within the demand is always within the limit. The charge goes with the memory: whoever frees it, by whatever call, takes it back, for the
//! slab and the page know whose they are ([`Mm::is_from_reserve`]).
//!
//! What is freed after a grace period is charged until then: who uses `kfree_rcu` has to count what waits. What [`Mm::kfree_nolock`] leaves for later is charged until
//! somebody finishes it: a request at the limit does that itself, but does not wait for another CPU that is at it just then. Pages do not wait, whoever frees them.
//!
//! Source: seed 004; Peter Zijlstra's `mm/reserve.c` (2007 to 2009), whose interface this follows and whose defects it does not.

mod connect;
pub(crate) mod geometry;
mod node;
mod request;
pub(crate) mod store;
pub(crate) mod tree;
mod view;
pub(crate) mod wait;

use core::fmt;
use core::panic::Location;
use core::ptr::NonNull;

use crate::address::{MAX_ORDER, PAGE_SHIFT, PAGE_SIZE, Pfn};
use crate::error::AllocError;
use crate::gfp::{self, Flags};
use crate::memcg::counter::UNLIMITED;
use crate::memmap::{PageType, Word};
use crate::mm::Mm;
use crate::name::NAME_LEN;
use crate::platform::{Platform, might_sleep};
use crate::slab::{Cache, CacheFlags};
use crate::sync::atomic::Ordering;
pub use geometry::Bound;
use node::{Node, Shape};
use request::{ELSEWHERE, ordinary};
pub(crate) use tree::Reserves;
pub use view::ReserveView;

/// What a reserve guarantees by itself; its children's demands come on top.
#[derive(Clone, Copy, Debug)]
pub enum Demand<'a> {
    /// Nothing: it is there for its children.
    None,
    /// So many objects of a cache.
    Objects {
        /// The cache; not one made with [`CacheFlags::RCU_PREPAID`].
        cache: &'a Cache<'a>,
        /// How many at once.
        count: usize,
    },
    /// So many objects of kmalloc, all served from the class of the largest.
    KmallocObjects {
        /// The largest, in bytes.
        size: usize,
        /// How many at once.
        count: usize,
    },
    /// So many bytes of kmalloc, as asked for, in any mix of sizes.
    Kmalloc {
        /// The sum of what is asked for at once.
        bytes: usize,
        /// The smallest request; a smaller one is served and charged as if it were as large.
        min: usize,
        /// The largest request.
        max: usize,
    },
    /// So many blocks of pages.
    Pages {
        /// Their order.
        order: usize,
        /// How many at once.
        count: usize,
    },
}

/// A reserve. Dropping the handle leaves it as it is; [`destroy`](Self::destroy) takes it down.
#[must_use]
pub struct Reserve<'m, P: Platform> {
    mm: &'m Mm<P>,
    node: &'m Node,
}

/// More was to be uncharged than was [charged](Reserve::charge); nothing has changed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Unbalanced {
    /// What is charged so.
    pub usage: u64,
}

impl fmt::Display for Unbalanced {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "more is to be uncharged than the {} bytes that are charged",
            self.usage
        )
    }
}

impl core::error::Error for Unbalanced {}

/// A reserve that could not be destroyed: it is connected, or has children. The handle comes back.
#[derive(Debug)]
pub struct DestroyReserveError<'m, P: Platform> {
    /// The reserve; as it was.
    pub reserve: Reserve<'m, P>,
}

impl<P: Platform> fmt::Debug for Reserve<'_, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut name = [0; NAME_LEN];
        let name = self.node.name.get(&mut name);
        f.debug_tuple("Reserve").field(&name).finish()
    }
}

/// Makes a demand's shape and amount of it.
fn shape_of(demand: &Demand<'_>) -> Result<(Shape, u64), AllocError> {
    let most = PAGE_SIZE << MAX_ORDER;
    let ok = |good: bool| good.then_some(()).ok_or(AllocError::BadSize);
    Ok(match *demand {
        Demand::None => (Shape::None, 0),
        Demand::Objects { cache, count } => {
            let core = cache.core();
            // Their slabs wait for what nobody who counts objects knows of.
            ok(!core.flags.contains(CacheFlags::RCU_PREPAID) && !core.is_metadata())?;
            (Shape::Objects(NonNull::from(core)), count as u64)
        }
        Demand::KmallocObjects { size, count } => {
            ok((1..=most).contains(&size))?;
            (Shape::KmallocObjects { size }, count as u64)
        }
        Demand::Kmalloc { bytes, min, max } => {
            ok(min <= max && (1..=most).contains(&max))?;
            (
                Shape::Kmalloc {
                    min: min.max(1),
                    max,
                },
                bytes as u64,
            )
        }
        Demand::Pages { order, count } => {
            if order > MAX_ORDER {
                return Err(AllocError::BadOrder);
            }
            (Shape::Pages { order }, count as u64)
        }
    })
}

impl<P: Platform> Mm<P> {
    /// A reserve, detached: nothing is set aside for it yet. Of the name 32 bytes are kept (`mem_reserve_init`).
    ///
    /// # Context
    ///
    /// May sleep.
    ///
    /// # Errors
    ///
    /// [`AllocError::BadSize`], [`AllocError::BadOrder`] for a demand that cannot be; [`AllocError::TooMany`] for more than 511; no memory.
    pub fn reserve(&self, name: &str, demand: Demand<'_>) -> Result<Reserve<'_, P>, AllocError> {
        self.make_reserve(name, &demand, false)
    }

    /// A reserve without a store of its own: its demand is added to that of the parent that it is connected to, which has the same kind
    /// of demand, and requests through it are the parent's. So many users can size one pool that they share.
    ///
    /// # Errors
    ///
    /// As [`reserve`](Self::reserve).
    pub fn reserve_sizing(
        &self,
        name: &str,
        demand: Demand<'_>,
    ) -> Result<Reserve<'_, P>, AllocError> {
        self.make_reserve(name, &demand, true)
    }

    fn make_reserve(
        &self,
        name: &str,
        demand: &Demand<'_>,
        sizing: bool,
    ) -> Result<Reserve<'_, P>, AllocError> {
        might_sleep(self.platform(), "making a reserve");
        let (shape, amount) = shape_of(demand)?;
        if let Demand::Objects { cache, .. } = demand {
            self.checked(cache);
        }
        let mut making = self.reserve_mutex();
        self.reserve_root(&mut making)?;
        let node = self.new_node(&mut making, name, shape, amount, sizing)?;
        Ok(Reserve { mm: self, node })
    }

    /// What has to be set aside for a demand: `kmem_alloc_estimate`, `kmalloc_estimate_fixed`, `kmalloc_estimate_bytes`, but a bound that holds for every order of
    /// requests and frees. Exact but for [`Demand::Kmalloc`] with more than one class.
    ///
    /// # Errors
    ///
    /// As [`reserve`](Self::reserve).
    pub fn reserve_estimate(&self, demand: Demand<'_>) -> Result<Bound, AllocError> {
        let (shape, amount) = shape_of(&demand)?;
        let node = Node::detached(shape);
        let bytes = node.bytes_of(amount).ok_or(AllocError::BadSize)?;
        Ok(self.bound_of(shape, bytes))
    }

    /// Requests with `__GFP_MEMALLOC` that ordinary memory cannot serve take from this reserve, or from those below it; from none if `None`.
    pub fn set_memalloc_reserve(&self, reserve: Option<&Reserve<'_, P>>) {
        let id = reserve.map_or(0, |reserve| reserve.of(self).id());
        self.pages.reserves.memalloc.store(id, Ordering::Relaxed);
    }

    /// Is this memory, of kmalloc or of a cache, from a reserve? Of memory that the caller has (`skb_pfmemalloc`).
    ///
    /// # Context
    ///
    /// Any.
    pub fn is_from_reserve(&self, ptr: *const u8) -> bool {
        u32::try_from(self.pages.phys(ptr).0 >> PAGE_SHIFT)
            .is_ok_and(|pfn| self.page_is_from_reserve(Pfn(pfn)))
    }

    /// Is this page from a reserve (`page_is_pfmemalloc`)?
    ///
    /// # Context
    ///
    /// Any.
    pub fn page_is_from_reserve(&self, pfn: Pfn) -> bool {
        let found = self
            .pages
            .map
            .region(pfn)
            .and_then(|_| self.pages.map.lookup(pfn));
        found.is_some_and(|found| found.word.is_reserve())
    }

    /// Pages that are set aside, and that nobody has now.
    pub fn set_aside_pages(&self) -> u64 {
        self.pages_of(PageType::SetAside)
    }
}

impl<'m, P: Platform> Reserve<'m, P> {
    /// Of this memory manager?
    fn of(&self, mm: &Mm<P>) -> &'m Node {
        assert!(
            core::ptr::eq(self.mm, mm),
            "the reserve belongs to another memory manager"
        );
        self.node
    }

    /// The node whose store serves requests: of a sizing reserve its parent's.
    fn store(&self) -> Result<&'m Node, AllocError> {
        if !self.node.is_sizing() {
            return Ok(self.node);
        }
        let parent = self.mm.pages.reserves.get(self.node.parent());
        parent.ok_or(AllocError::Detached)
    }

    /// The number that [`Platform::current_reserve`] says to entitle a task to this reserve and all below it.
    pub fn id(&self) -> u16 {
        self.node.id()
    }

    /// Puts it, with all below it, under `parent`, or under the root. If that connects it to the root, what it all needs is set aside now, and limits
    /// above grow by it (`mem_reserve_connect`).
    ///
    /// # Context
    ///
    /// May sleep and reclaim.
    ///
    /// # Errors
    ///
    /// No memory for all of it; [`AllocError::Busy`] if it is under a parent, or the parent is below it; [`AllocError::TooMany`] for more than 16 levels;
    /// [`AllocError::BadSize`] for a sizing reserve under one of another kind. Nothing has changed then.
    pub fn connect(&self, parent: Option<&Reserve<'m, P>>) -> Result<(), AllocError> {
        might_sleep(self.mm.platform(), "connecting a reserve");
        let mut making = self.mm.reserve_mutex();
        let parent = match parent {
            Some(parent) => parent.of(self.mm),
            None => self.mm.reserve_root(&mut making)?,
        };
        self.mm.connect(self.node, parent)?;
        self.mm.wake_waiting();
        Ok(())
    }

    /// Takes it out from under its parent; what was set aside goes back (`mem_reserve_disconnect`).
    ///
    /// # Context
    ///
    /// May sleep.
    ///
    /// # Errors
    ///
    /// [`AllocError::Busy`] while anything is charged in it or below it; [`AllocError::Detached`] if it has no parent. Nothing has changed then.
    pub fn disconnect(&self) -> Result<(), AllocError> {
        might_sleep(self.mm.platform(), "disconnecting a reserve");
        self.mm.free_all_deferred();
        let _making = self.mm.reserve_mutex();
        self.mm.disconnect(self.node)?;
        self.mm.wake_waiting();
        Ok(())
    }

    /// Another amount of the same: objects of the same cache, blocks of the same order, bytes in the same sizes.
    ///
    /// # Context
    ///
    /// May sleep and reclaim.
    ///
    /// # Errors
    ///
    /// No memory to grow; [`AllocError::Busy`] to shrink below what is charged; [`AllocError::BadSize`] for a demand of another kind. Nothing has
    /// changed then.
    pub fn resize(&self, demand: Demand<'_>) -> Result<(), AllocError> {
        might_sleep(self.mm.platform(), "resizing a reserve");
        let (shape, amount) = shape_of(&demand)?;
        if shape != self.node.shape() {
            return Err(AllocError::BadSize);
        }
        let _making = self.mm.reserve_mutex();
        self.mm.resize(self.node, amount)?;
        self.mm.wake_waiting();
        Ok(())
    }

    /// No more than this is charged to it and all below it, whatever their demands come to; `None`: what they come to.
    ///
    /// # Errors
    ///
    /// [`AllocError::Busy`] if more is charged.
    pub fn set_limit(&self, bytes: Option<u64>) -> Result<(), AllocError> {
        let _making = self.mm.reserve_mutex();
        let limit = bytes.unwrap_or(UNLIMITED).min(UNLIMITED);
        let before = self.node.cap.swap(limit, Ordering::Relaxed);
        self.mm.set_limits_of(self.node).map_err(|_| {
            self.node.cap.store(before, Ordering::Relaxed);
            AllocError::Busy
        })?;
        self.mm.wake_waiting();
        Ok(())
    }

    /// Has it hold this many pages at most instead of its bound, in whole blocks of those that the bound has; `None`: the bound. Fewer is a bet and not a guarantee;
    /// it never holds more than its bound.
    ///
    /// # Errors
    ///
    /// [`AllocError::Busy`] while it is connected.
    pub fn set_pages(&self, pages: Option<u64>) -> Result<(), AllocError> {
        let _making = self.mm.reserve_mutex();
        if self.node.is_connected() {
            return Err(AllocError::Busy);
        }
        let pages = pages.unwrap_or(u64::MAX);
        self.node.pages.store(pages, Ordering::Relaxed);
        Ok(())
    }

    /// Charges bytes to it and all above it, for memory that is had otherwise (`mem_reserve_pages_charge`).
    ///
    /// # Context
    ///
    /// Any that may pin a CPU.
    ///
    /// # Errors
    ///
    /// [`AllocError::ReserveLimit`]; [`AllocError::Detached`].
    pub fn charge(&self, bytes: u64) -> Result<(), AllocError> {
        let node = self.store()?;
        self.mm.charge_reserve(node, bytes)?;
        node.by_hand.fetch_add(bytes, Ordering::Relaxed);
        Ok(())
    }

    /// Takes back what was charged by [`charge`](Self::charge), and nothing else.
    ///
    /// # Context
    ///
    /// Any.
    ///
    /// # Errors
    ///
    /// [`Unbalanced`] if less was charged so. Nothing has changed then.
    #[track_caller]
    pub fn uncharge(&self, bytes: u64) -> Result<(), Unbalanced> {
        let node = self.store().unwrap_or(self.node);
        // What objects and pages are charged goes with them.
        let less = |usage: u64| usage.checked_sub(bytes);
        node.by_hand
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, less)
            .map_err(|usage| Unbalanced { usage })?;
        self.mm
            .reserve_uncharge(node, bytes, (Pfn::NONE, Word::ZERO));
        Ok(())
    }

    /// Memory as [`kmalloc`](Mm::kmalloc): ordinary if it can be had without reclaim, else from this reserve. At the limit it fails, or waits for an uncharge if
    /// the flags say that it may sleep (and not `__GFP_NORETRY`). Freed by any call that frees such memory. What has to be in a zone of its own, is prepaid or may take no lock
    /// (`__GFP_DMA`, `__GFP_DMA32`, `__GFP_RCU_PREPAID`, `__GFP_FAST_TRY`) is ordinary memory or fails.
    ///
    /// # Context
    ///
    /// As `kmalloc`; with `__GFP_FAST_TRY` nothing is taken from the reserve, which is behind a lock.
    ///
    /// # Errors
    ///
    /// [`AllocError::ReserveLimit`] at the limit, or if no reserve would serve it; [`AllocError::BadSize`] for a size that this one is not for and ordinary
    /// memory did not serve; [`AllocError::Detached`].
    #[track_caller]
    pub fn kmalloc(&self, size: usize, gfp: Flags) -> Result<NonNull<u8>, AllocError> {
        let caller = Location::caller();
        let mm = self.mm;
        let plain = || mm.kmalloc(size, ordinary(gfp));
        let why = match plain() {
            Err(why) => why,
            got => return got,
        };
        if gfp.intersects(ELSEWHERE) {
            return Err(why);
        }
        let node = self.store()?;
        let (serve, charge) = node.serve(size).ok_or(AllocError::BadSize)?;
        mm.take_charged(
            node,
            charge,
            gfp,
            || plain().ok(),
            || mm.take_kmalloc(node, serve, size, gfp, caller),
        )
    }

    /// An object as [`kmem_cache_alloc`](Mm::kmem_cache_alloc), in the way of [`kmalloc`](Self::kmalloc).
    ///
    /// # Context
    ///
    /// As `kmem_cache_alloc`.
    ///
    /// # Errors
    ///
    /// As [`kmalloc`](Self::kmalloc).
    #[track_caller]
    pub fn kmem_cache_alloc(
        &self,
        cache: &Cache<'_>,
        gfp: Flags,
    ) -> Result<NonNull<u8>, AllocError> {
        let caller = Location::caller();
        let mm = self.mm;
        let plain = || mm.kmem_cache_alloc(cache, ordinary(gfp));
        let why = match plain() {
            Err(why) => why,
            got => return got,
        };
        // Of which zone the objects are is the cache's to say.
        if gfp.contains(gfp::__GFP_FAST_TRY) {
            return Err(why);
        }
        let node = self.store()?;
        let core = cache.core();
        let charge = match node.shape() {
            Shape::Objects(_) => node.charge_of_object(core).ok_or(AllocError::BadSize)?,
            _ => return Err(AllocError::BadSize),
        };
        let size = core.geometry.object_size as usize;
        mm.take_charged(
            node,
            charge,
            gfp,
            || plain().ok(),
            || {
                let object = mm.take_reserve_object(node, core)?;
                mm.finish_kmalloc(core, object, size, gfp, caller);
                Some(object)
            },
        )
    }

    /// Bare pages as [`alloc_pages`](Mm::alloc_pages), in the way of [`kmalloc`](Self::kmalloc).
    ///
    /// # Context
    ///
    /// As `alloc_pages`.
    ///
    /// # Errors
    ///
    /// As [`kmalloc`](Self::kmalloc); [`AllocError::BadOrder`] for an order that this reserve is not for.
    #[track_caller]
    pub fn alloc_pages(&self, gfp: Flags, order: usize) -> Result<Pfn, AllocError> {
        let mm = self.mm;
        let plain = || mm.alloc_pages(ordinary(gfp), order);
        let why = match plain() {
            Err(why) => why,
            got => return got,
        };
        if gfp.intersects(ELSEWHERE) {
            return Err(why);
        }
        let node = self.store()?;
        let charge = match node.shape() {
            Shape::Pages { .. } => node.charge_of_pages(order).ok_or(AllocError::BadOrder)?,
            _ => return Err(AllocError::BadSize),
        };
        mm.take_charged(
            node,
            charge,
            gfp,
            || plain().ok(),
            || mm.take_pages(node, order, PageType::Bare, gfp),
        )
    }

    /// How it stands.
    ///
    /// # Context
    ///
    /// May sleep.
    pub fn view(&self) -> ReserveView {
        let _making = self.mm.reserve_mutex();
        self.mm.view_of(self.node, 0)
    }

    /// Takes it down.
    ///
    /// # Context
    ///
    /// May sleep.
    ///
    /// # Errors
    ///
    /// It is connected to a parent, or has children: it comes back.
    pub fn destroy(self) -> Result<(), DestroyReserveError<'m, P>> {
        let making = self.mm.reserve_mutex();
        let reserves = &self.mm.pages.reserves;
        let (charged, children) = (
            self.node.own.counter.usage() + self.node.all.counter.usage(),
            reserves.children(self.node).count(),
        );
        if self.node.parent() != 0 || charged > 0 || children > 0 {
            drop(making);
            return Err(DestroyReserveError { reserve: self });
        }
        let memalloc = &reserves.memalloc;
        if memalloc.load(Ordering::Relaxed) == self.node.id() {
            memalloc.store(0, Ordering::Relaxed);
        }
        self.mm.free_node(self.node);
        Ok(())
    }
}
