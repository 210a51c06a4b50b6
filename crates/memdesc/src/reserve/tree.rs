//! The nodes: found by number, made, put under each other, taken apart, and used again.
//!
//! A node's memory stays a node's for good, so a number leads to a node or to nothing, without a lock: whoever frees what came from a reserve goes by the number
//! that the slab or the page has. What keeps a node meanwhile is what is charged to it.
//!
//! **Charging.** Each node has two counters ([`Counter`], checked by loom): *own*, for what is taken from its own store, and *all*, for that and for what
//! its children have. A charge goes own → all → the parent's all → … → the root's, each compared with its limit before it is added, and none or every one
//! of them takes it.
//!
//! Lock order: the structure (parents, demands, limits, who is connected) changes under `reserves`, a mutex that is held over allocations; the stores are under
//! a lock of their own, see [`store`](super::store).

use core::ptr::NonNull;

use super::geometry::{Bound, Class};
use super::wait::Waiters;
use crate::address::{MAX_ORDER, PAGE_SHIFT, Pfn};
use crate::error::AllocError;
use crate::gfp;
use crate::lockdep::classes;
use crate::memcg::counter::{Counter, Level, Underflow, charge, uncharge};
use crate::memcg::counter::{Refused, UNLIMITED};
use crate::mm::Mm;
use crate::name::AtomicName;
use crate::platform::{Holder, Platform};
use crate::slab::CacheCore;
use crate::slab::kmalloc::{CLASSES, KMALLOC_MAX_CACHE_SIZE, Kind, class_of, large_order};
use crate::sync::atomic::{AtomicPtr, AtomicU16, AtomicU32, AtomicU64, Ordering};
use crate::sync::{PfnStack, SpinGuard, SpinLock};

/// The most nodes.
pub(crate) const MAX_NODES: usize = 512;
/// The most levels below the root.
pub(super) const MAX_DEPTH: usize = 16;
/// Orders.
pub(super) const ORDERS: usize = MAX_ORDER + 1;

/// For what stays for good: never from a reserve itself, whoever asks.
const LASTING: gfp::Flags =
    gfp::Flags::from_bits(gfp::GFP_KERNEL.bits() | gfp::__GFP_NOMEMALLOC.bits());

/// What a node guarantees, by itself. All but how much never changes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Shape {
    None,
    /// Of this cache.
    Objects(NonNull<CacheCore>),
    /// Of at most this size, all from the class of it.
    KmallocObjects {
        size: usize,
    },
    Kmalloc {
        min: usize,
        max: usize,
    },
    Pages {
        order: usize,
    },
}

/// How a node serves a request of kmalloc.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Serve {
    /// From the cache of this class.
    Class(usize),
    /// By pages of this order.
    Large(usize),
}

impl Serve {
    fn of(size: usize) -> Option<Serve> {
        match class_of(size) {
            Some(class) => Some(Serve::Class(class)),
            None => large_order(size).ok().map(Serve::Large),
        }
    }

    /// The bytes of what is handed out.
    fn size(self) -> u64 {
        match self {
            Serve::Class(class) => CLASSES[class] as u64,
            Serve::Large(order) => 1 << (order + PAGE_SHIFT as usize),
        }
    }

    /// The least that is asked for of it.
    fn least(self) -> usize {
        match self {
            Serve::Class(0) => 1,
            Serve::Class(class) => CLASSES[class - 1] + 1,
            Serve::Large(order) => {
                let below = 1usize << (order - 1 + PAGE_SHIFT as usize);
                below.max(KMALLOC_MAX_CACHE_SIZE) + 1
            }
        }
    }
}

/// A counter in the tree.
#[derive(Debug)]
pub(crate) struct Rung {
    pub(crate) counter: Counter,
    up: AtomicPtr<Rung>,
}

impl Level for Rung {
    fn counter(&self) -> &Counter {
        &self.counter
    }

    fn parent(&self) -> Option<&Rung> {
        // SAFETY: null, or a rung of a node, which stays one for ever; all its fields are atomics.
        unsafe { self.up.load(Ordering::Relaxed).as_ref() }
    }
}

impl Rung {
    fn new() -> Rung {
        Rung {
            counter: Counter::new(),
            up: AtomicPtr::new(core::ptr::null_mut()),
        }
    }
}

/// Blocks of a node.
#[derive(Debug)]
pub(crate) struct Stock {
    /// Those that nobody has, linked through their descriptors.
    pub(super) idle: AtomicU32,
    pub(super) nr_idle: AtomicU32,
    /// Those that it has at all, taken or not.
    pub(super) owned: AtomicU32,
    /// Those that it should have.
    pub(super) target: AtomicU32,
}

/// A node.
///
/// # Invariants
///
/// `id` never changes. `shape`, `cache` and `name` change while the node is nobody's. `idle`, `nr_idle` and `owned` are under the lock of the stores; all
/// else under the mutex of the tree, but for the counters.
#[repr(C, align(64))]
pub(crate) struct Node {
    pub(super) own: Rung,
    pub(super) all: Rung,
    pub(super) stocks: [Stock; ORDERS],
    /// Blocks that came back, from any context; on their way to `idle`.
    pub(super) returned: PfnStack,
    /// Pages that are not idle, and the most there ever were.
    pub(super) taken: AtomicU64,
    pub(super) max_taken: AtomicU64,
    pub(super) waits: AtomicU64,
    /// Of what is charged: that which no memory of the node's goes with.
    pub(super) by_hand: AtomicU64,
    /// The shape: which, and two sizes.
    shape: AtomicU32,
    sizes: [AtomicU64; 2],
    cache: AtomicPtr<CacheCore>,
    /// Objects, bytes or blocks of its own demand.
    pub(super) amount: AtomicU64,
    /// A number of pages instead of the bound; [`u64::MAX`]: the bound.
    pub(super) pages: AtomicU64,
    /// No more than this in all, whatever the sum of demands.
    pub(super) cap: AtomicU64,
    pub(super) name: AtomicName,
    id: AtomicU16,
    /// Of the parent; 0: none.
    parent: AtomicU16,
    /// Somebody has it.
    alive: AtomicU16,
    /// Things are set aside for it.
    connected: AtomicU16,
    /// It has no store of its own: its demand is added to its parent's.
    sizing: AtomicU16,
}

const _: () = assert!(size_of::<Node>() <= 768);

impl Node {
    /// One that is in no tree, to ask what it would be.
    pub(super) fn detached(shape: Shape) -> Node {
        let node = Node::new(0);
        node.set_shape(shape);
        node
    }

    fn new(id: u16) -> Node {
        Node {
            own: Rung::new(),
            all: Rung::new(),
            stocks: [const {
                Stock {
                    idle: AtomicU32::new(Pfn::NONE.0),
                    nr_idle: AtomicU32::new(0),
                    owned: AtomicU32::new(0),
                    target: AtomicU32::new(0),
                }
            }; ORDERS],
            returned: PfnStack::new(),
            taken: AtomicU64::new(0),
            max_taken: AtomicU64::new(0),
            waits: AtomicU64::new(0),
            by_hand: AtomicU64::new(0),
            shape: AtomicU32::new(0),
            sizes: [const { AtomicU64::new(0) }; 2],
            cache: AtomicPtr::new(core::ptr::null_mut()),
            amount: AtomicU64::new(0),
            pages: AtomicU64::new(u64::MAX),
            cap: AtomicU64::new(UNLIMITED),
            name: AtomicName::new(),
            id: AtomicU16::new(id),
            parent: AtomicU16::new(0),
            alive: AtomicU16::new(0),
            connected: AtomicU16::new(0),
            sizing: AtomicU16::new(0),
        }
    }

    pub(crate) fn id(&self) -> u16 {
        self.id.load(Ordering::Relaxed)
    }

    pub(super) fn parent(&self) -> u16 {
        self.parent.load(Ordering::Relaxed)
    }

    pub(super) fn is_alive(&self) -> bool {
        self.alive.load(Ordering::Acquire) != 0
    }

    pub(super) fn is_connected(&self) -> bool {
        self.connected.load(Ordering::Relaxed) != 0
    }

    pub(super) fn is_sizing(&self) -> bool {
        self.sizing.load(Ordering::Relaxed) != 0
    }

    pub(super) fn amount(&self) -> u64 {
        self.amount.load(Ordering::Relaxed)
    }

    pub(crate) fn shape(&self) -> Shape {
        let size = |i: usize| self.sizes[i].load(Ordering::Relaxed) as usize;
        match self.shape.load(Ordering::Relaxed) {
            1 => {
                NonNull::new(self.cache.load(Ordering::Relaxed)).map_or(Shape::None, Shape::Objects)
            }
            2 => Shape::KmallocObjects { size: size(0) },
            3 => Shape::Kmalloc {
                min: size(0),
                max: size(1),
            },
            4 => Shape::Pages { order: size(0) },
            _ => Shape::None,
        }
    }

    fn set_shape(&self, shape: Shape) {
        let (which, a, b) = match shape {
            Shape::None => (0, 0, 0),
            Shape::Objects(core) => {
                self.cache.store(core.as_ptr(), Ordering::Relaxed);
                (1, 0, 0)
            }
            Shape::KmallocObjects { size } => (2, size, 0),
            Shape::Kmalloc { min, max } => (3, min, max),
            Shape::Pages { order } => (4, order, 0),
        };
        self.shape.store(which, Ordering::Relaxed);
        self.sizes[0].store(a as u64, Ordering::Relaxed);
        self.sizes[1].store(b as u64, Ordering::Relaxed);
    }

    /// How a request of kmalloc is served, and what is charged for it; `None` if it is not what the node is for.
    pub(crate) fn serve(&self, size: usize) -> Option<(Serve, u64)> {
        match self.shape() {
            Shape::KmallocObjects { size: most } if (1..=most).contains(&size) => {
                let serve = Serve::of(most)?;
                Some((serve, serve.size()))
            }
            Shape::Kmalloc { min, max } if (1..=max).contains(&size) => {
                let serve = Serve::of(size.max(min))?;
                Some((serve, serve.least().max(min) as u64))
            }
            _ => None,
        }
    }

    /// What is charged for an object of a cache; `None` if the node is not for such.
    pub(crate) fn charge_of_object(&self, core: &CacheCore) -> Option<u64> {
        match self.shape() {
            Shape::Objects(cache) => {
                (cache == NonNull::from(core)).then_some(u64::from(core.geometry.object_size))
            }
            Shape::KmallocObjects { .. } | Shape::Kmalloc { .. } => {
                self.charge_of(Serve::of(core.geometry.object_size as usize)?)
            }
            _ => None,
        }
    }

    /// What is charged for what is handed out so, whoever asked for how much of it; `None` if the node is not for such.
    pub(super) fn charge_of(&self, serve: Serve) -> Option<u64> {
        match self.shape() {
            Shape::KmallocObjects { size } => (Serve::of(size)? == serve).then_some(serve.size()),
            Shape::Kmalloc { min, max } => (serve.least() <= max && serve.size() >= min as u64)
                .then_some(serve.least().max(min) as u64),
            _ => None,
        }
    }

    /// What is charged for pages of this order; `None` if the node is not for such.
    pub(crate) fn charge_of_pages(&self, order: usize) -> Option<u64> {
        let size = 1usize << (order + PAGE_SHIFT as usize);
        match self.shape() {
            Shape::Pages { order: own } => (own == order).then_some(size as u64),
            _ => self.charge_of(Serve::of(size)?),
        }
    }

    /// What so much of this shape charges at most.
    pub(super) fn bytes_of(&self, amount: u64) -> Option<u64> {
        let each = match self.shape() {
            Shape::None => return Some(0),
            // SAFETY: the cache is not destroyed before the node.
            Shape::Objects(core) => u64::from(unsafe { core.as_ref() }.geometry.object_size),
            Shape::KmallocObjects { size } => Serve::of(size)?.size(),
            Shape::Kmalloc { .. } => 1,
            Shape::Pages { order } => 1 << (order + PAGE_SHIFT as usize),
        };
        amount.checked_mul(each).filter(|&bytes| bytes < UNLIMITED)
    }
}

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
    fn height(&self, node: &Node) -> usize {
        core::iter::successors(Some(node), |node| self.get(node.parent()))
            .take(MAX_DEPTH + 1)
            .count()
    }

    /// Levels from this one down.
    fn depth(&self, node: &Node) -> usize {
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

impl Node {
    /// Where its charges begin.
    fn first(&self) -> &Rung {
        if self.shape() == Shape::None {
            &self.all
        } else {
            &self.own
        }
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

    /// Puts a detached node under another, with all that is below it.
    pub(super) fn connect(&self, node: &Node, parent: &Node) -> Result<(), AllocError> {
        let reserves = &self.pages.reserves;
        if node.parent() != 0 || node.id() == 1 || reserves.is_within(parent, node) {
            return Err(AllocError::Busy);
        }
        let root = reserves.get(1);
        let rooted = root.is_some_and(|root| reserves.is_within(parent, root));
        // The root is no level below itself.
        let above = reserves.height(parent) - usize::from(rooted);
        if above + reserves.depth(node) > MAX_DEPTH {
            return Err(AllocError::TooMany);
        }
        if parent.is_sizing() || node.is_sizing() && parent.shape() != node.shape() {
            return Err(AllocError::BadSize);
        }
        node.parent.store(parent.id(), Ordering::Relaxed);
        let result = if parent.is_connected() {
            self.fill_subtree(node, parent)
        } else {
            Ok(())
        };
        if result.is_err() {
            node.parent.store(0, Ordering::Relaxed);
            return result;
        }
        let all = (&raw const parent.all).cast_mut();
        node.all.up.store(all, Ordering::Relaxed);
        self.set_limits(parent);
        if parent.is_connected() {
            for below in reserves.nodes().filter(|n| reserves.is_within(n, node)) {
                below.connected.store(1, Ordering::Relaxed);
                below.all.counter.set_online(true);
                below.own.counter.set_online(!below.is_sizing());
            }
        }
        Ok(())
    }

    /// Fills the stores of all below `node`, and that of its parent if it sizes that; all or none.
    fn fill_subtree(&self, node: &Node, parent: &Node) -> Result<(), AllocError> {
        let reserves = &self.pages.reserves;
        let mut result = Ok(());
        for below in reserves.nodes().filter(|n| reserves.is_within(n, node)) {
            result = result.and_then(|()| self.fill_to_bound(below));
        }
        if node.is_sizing() {
            result = result.and_then(|()| self.fill_to_bound(parent));
        }
        if result.is_err() {
            for below in reserves.nodes().filter(|n| reserves.is_within(n, node)) {
                self.set_target(below, &[0; ORDERS]);
                self.trim_store(below);
            }
            if node.is_sizing() {
                // As if the child were not there.
                node.parent.store(0, Ordering::Relaxed);
                self.trim_to_bound(parent);
            }
        }
        result
    }

    /// Gives a node's store what its bound says.
    pub(super) fn fill_to_bound(&self, node: &Node) -> Result<(), AllocError> {
        if node.is_sizing() {
            return Ok(());
        }
        let bound = self.own_bound(node, node.amount())?;
        let blocks = self.blocks_of(node, &bound)?;
        self.fill_store(node, &blocks)
    }

    /// Gives back what a node's store has above its bound, if nothing is taken from it.
    pub(super) fn trim_to_bound(&self, node: &Node) {
        if let Ok(bound) = self.own_bound(node, node.amount())
            && let Ok(blocks) = self.blocks_of(node, &bound)
        {
            self.set_target(node, &blocks);
            self.trim_store(node);
        }
    }

    /// Sets the limits of a node and of all above it to what their demands come to, or to what was set. What stands above its new limit keeps the old one.
    pub(super) fn set_limits(&self, node: &Node) {
        let mut at = Some(node);
        while let Some(node) = at {
            let _ = self.set_limits_of(node);
            at = self.pages.reserves.get(node.parent());
        }
    }

    /// The same of one node; the sum that stands in the way if there is more than the new limit.
    pub(super) fn set_limits_of(&self, node: &Node) -> Result<(), u64> {
        let sum = self.subtree_bytes(node);
        let own = self
            .own_bound(node, node.amount())
            .map_or(0, |bound| bound.bytes);
        let limit = sum.min(node.cap.load(Ordering::Relaxed));
        // Charges are made under this lock: none meets a limit that cannot be.
        let _held = self.lock_stores();
        node.own.counter.set_limit(own)?;
        node.all.counter.set_limit(limit)
    }

    /// Takes a node out from under its parent, with all that is below it; nothing may be charged in it.
    pub(super) fn disconnect(&self, node: &Node) -> Result<(), AllocError> {
        let reserves = &self.pages.reserves;
        let Some(parent) = reserves.get(node.parent()) else {
            return Err(AllocError::Detached);
        };
        let below = || reserves.nodes().filter(|n| reserves.is_within(n, node));
        {
            // Charges are made under this lock: each comes before all of this or after it, and nobody is refused for a change that cannot be.
            let _held = self.lock_stores();
            let in_use = |n: &Node| n.own.counter.usage() + n.all.counter.usage() > 0;
            // What a sizing one gives its parent may be in use there.
            let given = if node.is_sizing() {
                node.bytes_of(node.amount()).unwrap_or(0)
            } else {
                0
            };
            let own = &parent.own.counter;
            if below().any(in_use) || own.set_limit(own.limit().saturating_sub(given)).is_err() {
                return Err(AllocError::Busy);
            }
            for n in below() {
                n.own.counter.set_online(false);
                n.all.counter.set_online(false);
            }
        }
        node.parent.store(0, Ordering::Relaxed);
        node.all.up.store(core::ptr::null_mut(), Ordering::Relaxed);
        // What stands above its lower limit here was charged to a group by hand.
        self.set_limits(parent);
        for n in below() {
            n.connected.store(0, Ordering::Relaxed);
            self.set_target(n, &[0; ORDERS]);
            self.trim_store(n);
        }
        if node.is_sizing() && parent.is_connected() {
            self.trim_to_bound(parent);
        }
        Ok(())
    }

    /// Another amount. Growing may fail for want of memory; shrinking if more is charged. Nothing has changed then.
    pub(super) fn resize(&self, node: &Node, amount: u64) -> Result<(), AllocError> {
        node.bytes_of(amount).ok_or(AllocError::BadSize)?;
        let before = node.amount.swap(amount, Ordering::Relaxed);
        let reserves = &self.pages.reserves;
        // Whose store it is for.
        let store = if node.is_sizing() {
            reserves.get(node.parent()).unwrap_or(node)
        } else {
            node
        };
        let fails = |why| {
            node.amount.store(before, Ordering::Relaxed);
            self.set_limits(node);
            if store.is_connected() {
                self.trim_to_bound(store);
            }
            Err(why)
        };
        if amount >= before {
            if store.is_connected()
                && let Err(why) = self.fill_to_bound(store)
            {
                return fails(why);
            }
            self.set_limits(node);
            return Ok(());
        }
        let mut at = Some(node);
        while let Some(node) = at {
            if self.set_limits_of(node).is_err() {
                return fails(AllocError::Busy);
            }
            at = reserves.get(node.parent());
        }
        if store.is_connected() {
            self.trim_to_bound(store);
        }
        Ok(())
    }
}
