//! The nodes: found by number, made, put under each other, taken apart, and used again.
//!
//! A node's memory stays a node's for good, so a number leads to a node or to nothing, without a lock: whoever frees what came from a reserve goes by the number
//! that the slab or the page has. What keeps a node meanwhile is what is charged to it.
//!
//! **Charging.** Each node has two counters ([`Counter`](crate::memcg::counter::Counter), checked by loom): *own*, for what is taken from its own store, and *all*, for that and for what
//! its children have. A charge goes own → all → the parent's all → … → the root's, each compared with its limit before it is added, and none or every one
//! of them takes it.
//!
//! Lock order: the structure (parents, demands, limits, who is connected) changes under `reserves`, a mutex that is held over allocations; the stores are under
//! a lock of their own, see [`store`](super::store).

use super::geometry::{Bound, Class};
use super::node::{Node, ORDERS, Serve, Shape};
use super::wait::Waiters;
use crate::address::{MAX_ORDER, PAGE_SHIFT};
use crate::error::AllocError;
use crate::gfp;
use crate::lockdep::classes;
use crate::memcg::counter::{Level, Underflow, charge, uncharge};
use crate::memcg::counter::{Refused, UNLIMITED};
use crate::mm::Mm;
use crate::platform::{Holder, Platform};
use crate::slab::CacheCore;
use crate::slab::kmalloc::{CLASSES, KMALLOC_MAX_CACHE_SIZE, Kind, large_order};
use crate::sync::atomic::{AtomicPtr, AtomicU16, AtomicU64, Ordering};
use crate::sync::{SpinGuard, SpinLock};

/// The most nodes.
pub(crate) const MAX_NODES: usize = 512;
/// The most levels below the root.
pub(super) const MAX_DEPTH: usize = 16;

/// For what stays for good: never from a reserve itself, whoever asks.
const LASTING: gfp::Flags =
    gfp::Flags::from_bits(gfp::GFP_KERNEL.bits() | gfp::__GFP_NOMEMALLOC.bits());

/// What who changes the tree has.
#[derive(Debug)]
pub(crate) struct Making {
    /// Numbers up to here were given out.
    last: u16,
}

type Table = [AtomicPtr<Node>; MAX_NODES];

/// All reserves of a memory manager.
#[derive(Debug)]
pub(crate) struct Reserves {
    /// Null until the first is made.
    table: AtomicPtr<Table>,
    making: SpinLock<Making>,
    /// The stores.
    pub(super) stores: SpinLock<()>,
    pub(super) waiters: Waiters,
    /// Of requests with `__GFP_MEMALLOC` that have no other; 0: none.
    pub(super) memalloc: AtomicU16,
    /// Of kmalloc memory: the table and the nodes.
    bytes: AtomicU64,
}

impl Reserves {
    pub(crate) fn new() -> Reserves {
        Reserves {
            table: AtomicPtr::new(core::ptr::null_mut()),
            making: SpinLock::new(Making { last: 0 }),
            stores: SpinLock::new(()),
            waiters: Waiters::new(),
            memalloc: AtomicU16::new(0),
            bytes: AtomicU64::new(0),
        }
    }

    /// Was there ever a reserve?
    #[inline]
    pub(crate) fn in_use(&self) -> bool {
        !self.table.load(Ordering::Relaxed).is_null()
    }

    /// Bytes that the nodes take: metadata.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    fn cell(&self, id: u16) -> Option<&AtomicPtr<Node>> {
        // SAFETY: null, or a table, zeroed when it was made and there for good; atomics only. Acquire pairs with the Release of who made it, here and below.
        let table = unsafe { self.table.load(Ordering::Acquire).as_ref() }?;
        table.get(usize::from(id).checked_sub(1)?)
    }

    /// The node with this number, if there ever was one.
    pub(crate) fn get(&self, id: u16) -> Option<&Node> {
        // SAFETY: as above.
        unsafe { self.cell(id)?.load(Ordering::Acquire).as_ref() }
    }

    /// All nodes that somebody has.
    pub(crate) fn nodes(&self) -> impl Iterator<Item = &Node> {
        let all = (1..=MAX_NODES as u16).map_while(|id| self.get(id));
        all.filter(|node| node.is_alive())
    }

    /// Those right below this one.
    pub(super) fn children(&self, node: &Node) -> impl Iterator<Item = &Node> {
        let id = node.id();
        self.nodes().filter(move |child| child.parent() == id)
    }

    /// Is it this one, or below it?
    pub(super) fn is_within(&self, node: &Node, top: &Node) -> bool {
        let mut at = Some(node);
        for _ in 0..=MAX_DEPTH {
            match at {
                Some(node) if core::ptr::eq(node, top) => return true,
                Some(node) => at = self.get(node.parent()),
                None => return false,
            }
        }
        false
    }

    /// Levels from this one up to the top.
    pub(super) fn height(&self, node: &Node) -> usize {
        core::iter::successors(Some(node), |node| self.get(node.parent()))
            .take(MAX_DEPTH + 1)
            .count()
    }

    /// Levels from this one down.
    pub(super) fn depth(&self, node: &Node) -> usize {
        let below = self.nodes().filter(|n| self.is_within(n, node));
        let levels = below.map(|n| self.height(n) - self.height(node) + 1);
        levels.max().unwrap_or(1)
    }

    /// Charges the node's own store and all levels above; or, of a node that is there for its children, the levels alone.
    pub(super) fn charge(&self, node: &Node, bytes: u64) -> Result<(), AllocError> {
        match charge(node.first(), bytes, &|_| ()) {
            Ok(()) => Ok(()),
            Err((Refused::Offline, _)) => Err(AllocError::Detached),
            Err(_) => Err(AllocError::ReserveLimit),
        }
    }

    /// Takes a charge back.
    pub(super) fn uncharge(&self, node: &Node, bytes: u64) -> Result<(), Underflow> {
        uncharge(node.first(), bytes, &|_| ())
    }

    /// Does it take charges?
    pub(super) fn is_online(&self, node: &Node) -> bool {
        node.first().counter.is_online()
    }

    /// Can so much never be charged, whoever lets go of what?
    pub(super) fn never(&self, node: &Node, bytes: u64) -> bool {
        let rungs = core::iter::successors(Some(node.first()), |rung| rung.parent());
        rungs
            .take(MAX_DEPTH + 2)
            .any(|rung| bytes > rung.counter.limit())
    }
}

/// Which blocks a node's store should have, by order.
pub(super) type Blocks = [u32; ORDERS];

impl<P: Platform> Mm<P> {
    /// The mutex of the tree.
    pub(super) fn reserve_mutex(&self) -> SpinGuard<'_, Making, Holder<'_, P>> {
        let holder = Holder::new(self.platform(), true, &classes::RESERVES);
        self.pages.reserves.making.lock(holder)
    }

    /// The same, if nobody has it.
    pub(super) fn try_reserve_mutex(&self) -> Option<SpinGuard<'_, Making, Holder<'_, P>>> {
        let holder = Holder::trying(self.platform(), true, &classes::RESERVES);
        self.pages.reserves.making.try_lock(holder)
    }

    /// The classes of blocks that a node's own demand may need.
    fn classes_of<'a>(&'a self, shape: Shape) -> impl Iterator<Item = Class> + 'a {
        let slab = |core: &CacheCore, charge: u64| Class {
            charge,
            per_block: u64::from(core.smallest.objects),
            order: core.smallest.order as usize,
            descriptor: size_of::<crate::desc::Slab>() as u64,
        };
        let of = move |serve: Serve, charge: u64| match serve {
            Serve::Class(class) => slab(self.kmalloc_cache(Kind::Normal, class), charge),
            Serve::Large(order) => Class {
                charge,
                per_block: 1,
                order,
                descriptor: size_of::<crate::desc::Slab>() as u64,
            },
        };
        let one = match shape {
            Shape::None | Shape::Kmalloc { .. } => None,
            Shape::Objects(core) => {
                // SAFETY: the cache is not destroyed before the node.
                let core = unsafe { core.as_ref() };
                Some(slab(core, u64::from(core.geometry.object_size)))
            }
            Shape::KmallocObjects { size } => Serve::of(size).map(|s| of(s, s.size())),
            Shape::Pages { order } => Some(Class {
                charge: 1 << (order + PAGE_SHIFT as usize),
                per_block: 1,
                order,
                descriptor: size_of::<u64>() as u64,
            }),
        };
        let (min, max) = match shape {
            Shape::Kmalloc { min, max } => (min, max),
            _ => (1, 0),
        };
        let all = (0..CLASSES.len()).map(Serve::Class);
        let large = large_order(KMALLOC_MAX_CACHE_SIZE + 1).unwrap_or(MAX_ORDER);
        let all = all.chain((large..=MAX_ORDER).map(Serve::Large));
        let mix = all
            .filter(move |s| s.least() <= max && s.size() >= min as u64)
            .map(move |s| of(s, s.least().max(min) as u64));
        one.into_iter().chain(mix)
    }

    /// The bound of so much of this shape.
    pub(super) fn bound_of(&self, shape: Shape, bytes: u64) -> Bound {
        Bound::of(bytes, self.classes_of(shape))
    }

    /// What a node with a store guarantees by itself: its own amount, and those of its children that size it.
    pub(super) fn own_bound(&self, node: &Node, amount: u64) -> Result<Bound, AllocError> {
        let sizing = self.pages.reserves.children(node).filter(|n| n.is_sizing());
        let amount = sizing.fold(amount, |sum, child| sum.saturating_add(child.amount()));
        let bytes = node.bytes_of(amount).ok_or(AllocError::BadSize)?;
        Ok(self.bound_of(node.shape(), bytes))
    }

    /// The bound as the blocks of a store.
    pub(super) fn blocks_of(&self, node: &Node, bound: &Bound) -> Result<Blocks, AllocError> {
        let mut blocks = [0; ORDERS];
        for (block, &n) in blocks.iter_mut().zip(&bound.blocks) {
            *block = u32::try_from(n).map_err(|_| AllocError::BadSize)?;
        }
        let pages = node.pages.load(Ordering::Relaxed);
        if pages != u64::MAX {
            // So many, taken off the largest first.
            let mut over = bound.pages().saturating_sub(pages);
            for (order, block) in blocks.iter_mut().enumerate().rev() {
                let less = (over >> order).min(u64::from(*block));
                *block -= less as u32;
                over -= less << order;
            }
            // Rather fewer than were said than more.
            if over > 0
                && let Some(block) = blocks.iter_mut().find(|block| **block > 0)
            {
                *block -= 1;
            }
        }
        Ok(blocks)
    }

    /// The bytes of a node and all below it, sizing or not: what its limit is, if nobody set a lower one.
    pub(super) fn subtree_bytes(&self, node: &Node) -> u64 {
        let own = node.bytes_of(node.amount()).unwrap_or(UNLIMITED);
        let children = self.pages.reserves.children(node);
        children.fold(own, |sum, child| {
            sum.saturating_add(self.subtree_bytes(child)).min(UNLIMITED)
        })
    }

    /// The root; made when it is first needed.
    pub(super) fn reserve_root(&self, making: &mut Making) -> Result<&Node, AllocError> {
        if let Some(root) = self.pages.reserves.get(1) {
            return Ok(root);
        }
        let root = self.new_node(making, "root", Shape::None, 0, false)?;
        for rung in [&root.own, &root.all] {
            rung.counter.set_online(true);
        }
        root.connected.store(1, Ordering::Relaxed);
        Ok(root)
    }

    /// A node, detached.
    pub(super) fn new_node(
        &self,
        making: &mut Making,
        name: &str,
        shape: Shape,
        amount: u64,
        sizing: bool,
    ) -> Result<&Node, AllocError> {
        let reserves = &self.pages.reserves;
        let gone = (2..=making.last).filter_map(|id| reserves.get(id));
        let node = match gone.into_iter().find(|node| !node.is_alive()) {
            Some(node) => node,
            None => {
                if usize::from(making.last) == MAX_NODES {
                    return Err(AllocError::TooMany);
                }
                let node = self.node_memory(making.last + 1)?;
                making.last += 1;
                node
            }
        };
        node.set_shape(shape);
        let bytes = node.bytes_of(amount).ok_or(AllocError::BadSize)?;
        node.name.set(name);
        node.amount.store(amount, Ordering::Relaxed);
        node.pages.store(u64::MAX, Ordering::Relaxed);
        node.cap.store(UNLIMITED, Ordering::Relaxed);
        node.parent.store(0, Ordering::Relaxed);
        node.sizing.store(u16::from(sizing), Ordering::Relaxed);
        for counter in [&node.max_taken, &node.waits, &node.by_hand] {
            counter.store(0, Ordering::Relaxed);
        }
        node.own.counter.init(bytes);
        node.all.counter.init(bytes);
        for rung in [&node.own, &node.all] {
            rung.counter.set_online(false);
        }
        let all = (&raw const node.all).cast_mut();
        node.own.up.store(all, Ordering::Relaxed);
        node.all.up.store(core::ptr::null_mut(), Ordering::Relaxed);
        if let Shape::Objects(core) = shape {
            // SAFETY: the caller's handle keeps the cache, and from here on the count does.
            unsafe { core.as_ref() }
                .reserves
                .fetch_add(1, Ordering::Relaxed);
        }
        // Release: who finds it alive sees the above.
        node.alive.store(1, Ordering::Release);
        Ok(node)
    }

    /// The node is nobody's any more. Under the mutex; it is detached, has no children, and nothing is charged.
    pub(super) fn free_node(&self, node: &Node) {
        node.alive.store(0, Ordering::Release);
        if let Shape::Objects(core) = node.shape() {
            // SAFETY: the count that is given up here kept the cache.
            unsafe { core.as_ref() }
                .reserves
                .fetch_sub(1, Ordering::Relaxed);
        }
        node.set_shape(Shape::None);
    }

    fn node_memory(&self, id: u16) -> Result<&Node, AllocError> {
        let reserves = &self.pages.reserves;
        if !reserves.in_use() {
            let bytes = size_of::<Table>();
            let table = self.kmalloc(bytes, LASTING | gfp::__GFP_ZERO)?;
            reserves.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
            reserves
                .table
                .store(table.cast().as_ptr(), Ordering::Release);
        }
        let bytes = size_of::<Node>().next_power_of_two();
        let memory = self.kmalloc(bytes, LASTING)?.cast::<Node>();
        // SAFETY: ours, large enough, and as aligned as its class is large.
        unsafe { memory.write(Node::new(id)) };
        reserves.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        match reserves.cell(id) {
            Some(cell) => cell.store(memory.as_ptr(), Ordering::Release),
            None => unreachable!("a node beyond the table"),
        }
        reserves.get(id).ok_or(AllocError::NoBlock)
    }
}
