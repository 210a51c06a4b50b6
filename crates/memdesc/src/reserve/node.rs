//! A node of the tree: what it promises, what it charges for what, its counters and its store.

use core::ptr::NonNull;

use crate::address::{MAX_ORDER, PAGE_SHIFT, Pfn};
use crate::memcg::counter::{Counter, Level, UNLIMITED};
use crate::name::AtomicName;
use crate::slab::CacheCore;
use crate::slab::kmalloc::{CLASSES, KMALLOC_MAX_CACHE_SIZE, class_of, large_order};
use crate::sync::PfnStack;
use crate::sync::atomic::{AtomicPtr, AtomicU16, AtomicU32, AtomicU64, Ordering};

/// Orders.
pub(super) const ORDERS: usize = MAX_ORDER + 1;

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
    pub(super) fn of(size: usize) -> Option<Serve> {
        match class_of(size) {
            Some(class) => Some(Serve::Class(class)),
            None => large_order(size).ok().map(Serve::Large),
        }
    }

    /// The bytes of what is handed out.
    pub(super) fn size(self) -> u64 {
        match self {
            Serve::Class(class) => CLASSES[class] as u64,
            Serve::Large(order) => 1 << (order + PAGE_SHIFT as usize),
        }
    }

    /// The least that is asked for of it.
    pub(super) fn least(self) -> usize {
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
    pub(super) up: AtomicPtr<Rung>,
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
    pub(super) fn new() -> Rung {
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
    pub(super) shape: AtomicU32,
    pub(super) sizes: [AtomicU64; 2],
    pub(super) cache: AtomicPtr<CacheCore>,
    /// Objects, bytes or blocks of its own demand.
    pub(super) amount: AtomicU64,
    /// A number of pages instead of the bound; [`u64::MAX`]: the bound.
    pub(super) pages: AtomicU64,
    /// No more than this in all, whatever the sum of demands.
    pub(super) cap: AtomicU64,
    pub(super) name: AtomicName,
    pub(super) id: AtomicU16,
    /// Of the parent; 0: none.
    pub(super) parent: AtomicU16,
    /// Somebody has it.
    pub(super) alive: AtomicU16,
    /// Things are set aside for it.
    pub(super) connected: AtomicU16,
    /// It has no store of its own: its demand is added to its parent's.
    pub(super) sizing: AtomicU16,
}

const _: () = assert!(size_of::<Node>() <= 768);

impl Node {
    /// One that is in no tree, to ask what it would be.
    pub(super) fn detached(shape: Shape) -> Node {
        let node = Node::new(0);
        node.set_shape(shape);
        node
    }

    pub(super) fn new(id: u16) -> Node {
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

    pub(super) fn set_shape(&self, shape: Shape) {
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

impl Node {
    /// Where its charges begin.
    pub(super) fn first(&self) -> &Rung {
        if self.shape() == Shape::None {
            &self.all
        } else {
            &self.own
        }
    }
}
