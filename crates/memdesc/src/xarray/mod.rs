//! An index of numbers by page number: the tree of a page cache, read without a lock.
//!
//! [`XArray`] maps indices below 2^52 to [`Entry`]s, numbers of 60 bits that are the user's: a page frame number, a shadow of what was
//! evicted. An entry has an order: it is at 2^order aligned indices at once. It can be marked, and marks can be searched for.
//! Readers walk it under RCU and wait for nobody. Writers are kept apart by a lock of the user's, and bring the memory that they may need:
//! nothing is allocated under the lock, and erasing allocates nothing at all.
//!
//! It is a radix tree of 64 slots a node, as high as the largest index needs, in the manner of Linux's XArray (`lib/xarray.c`). It is
//! our own because no crate offers in `no_std` what a page cache asks of its index: look-up under RCU, marks, and entries at many indices.
//!
//! Rooms: `slot` (what a slot says), `node` (bytes and geometry), `nodes` (where nodes come from), `read` (look-up and search),
//! `write` (store, erase, mark), `split`, `check` (the invariants), `models` (model checks).
//!
//! # What a reader may rely on
//!
//! [`load`](Reader::load) returns something that the index held at a moment of the call. A store, erasure or split of an order above 0 reaches
//! its indices one after the other, except [`replace`](Locked::replace), which is one store. A search finds
//! every entry that was there, and had the mark, all the time; marks and entries are looked at one after the other, so whoever finds
//! something by a mark looks again when he has what keeps it in place (a reference, a lock on the page).
//!
//! # Example
//!
//! ```
//! use memdesc::rcu;
//! use memdesc::xarray::{Entry, Mark, Node, NodeSource, Nodes, XArray, store_needs};
//! use memdesc::{Config, Mm, Platform, gfp};
//! use memdesc_host::Host;
//! use std::ptr::NonNull;
//!
//! /// Nodes are objects of the slab that is freed after a grace period, at no cost in memory.
//! struct Slab<'m>(&'m Mm<Host>);
//!
//! // SAFETY: the object is as large as a node; prepaid objects are freed after a grace period.
//! unsafe impl NodeSource for Slab<'_> {
//!     fn alloc(&self) -> Option<NonNull<Node>> {
//!         let gfp = gfp::GFP_KERNEL | gfp::__GFP_RCU_PREPAID;
//!         Some(self.0.kmalloc(size_of::<Node>(), gfp).ok()?.cast())
//!     }
//!     fn free(&self, node: NonNull<Node>) {
//!         // SAFETY: from `alloc`, and nobody's any more.
//!         unsafe { self.0.kfree(node.cast()) }
//!     }
//!     fn free_rcu(&self, node: NonNull<Node>) {
//!         // SAFETY: the same.
//!         unsafe { self.0.kfree_rcu_prepaid(node.cast()) }
//!     }
//! }
//!
//! let (host, ranges) = Host::small(2048)?;
//! let mm = Mm::new(host, &Config::default(), &ranges)?;
//! let slab = Slab(&mm);
//! let tree = XArray::new();
//!
//! // A folio of 4 pages at 1000 to 1003.
//! let folio = Entry::new(77).unwrap();
//! let mut nodes = Nodes::new(&slab);
//! nodes.fill(store_needs(1000, 2))?;
//! {
//!     // SAFETY: nobody else has the tree.
//!     let mut tree = unsafe { tree.locked(&mut nodes) };
//!     tree.store(1000, 2, folio, |_| ())?;
//!     tree.set_mark(1003, Mark::Dirty);
//! }
//!
//! let rcu = mm.platform().rcu();
//! let section = rcu::read_lock(rcu);
//! // SAFETY: it is this RCU that nodes are freed after.
//! let reader = unsafe { tree.reader(&section) };
//! assert_eq!(reader.load(1001), Some(folio));
//! let dirty = reader.find(0, u64::MAX, Some(Mark::Dirty)).unwrap();
//! assert_eq!((dirty.index, dirty.order), (1000, 2));
//! assert_eq!(reader.range(0, u64::MAX, None).count(), 1);
//! drop(section);
//!
//! // SAFETY: as above.
//! unsafe { tree.locked(&mut nodes) }.erase_all(|gone| assert_eq!(gone.entry, folio));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod check;
#[cfg(all(test, loom))]
mod models;
mod node;
mod nodes;
mod read;
mod slot;
mod split;
#[cfg(all(test, not(loom)))]
mod tests;
mod write;

use core::fmt;
use core::ptr::null_mut;

use crate::rcu::{Rcu, ReadGuard};
use crate::sync::atomic::{AtomicPtr, AtomicU32, Ordering};

pub use node::{MAX_INDEX, Mark, Node};
pub use nodes::{NoNodes, NodeSource, Nodes, split_needs, store_needs};
pub use read::{Range, Reader};
pub use slot::Entry;
pub use write::Locked;

use slot::Slot;

/// An entry, and where it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Found {
    /// The first index.
    pub index: u64,
    /// It is at `1 << order` indices.
    pub order: u32,
    /// The entry.
    pub entry: Entry,
}

impl Found {
    /// The last index.
    pub const fn last(&self) -> u64 {
        self.index | ((1 << self.order) - 1)
    }
}

/// Why a writer was refused. Nothing has changed when one of these comes back.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum XaError {
    /// The index is above [`MAX_INDEX`], not aligned to the order, or the order is above what can be there.
    BadIndex,
    /// The range is a part of this entry: split or erase that first.
    Covered(Found),
    /// There is no entry of the order to be split; this is there.
    NotThere(Option<Found>),
    /// The stock has fewer nodes than these: fill it up and try again.
    Nodes(usize),
}

impl fmt::Display for XaError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            XaError::BadIndex => f.write_str("index out of range, or not aligned to the order"),
            XaError::Covered(found) => write!(
                f,
                "part of the entry of order {} at {}",
                found.order, found.index
            ),
            XaError::NotThere(_) => f.write_str("no such entry"),
            XaError::Nodes(n) => write!(f, "{n} nodes are needed"),
        }
    }
}

impl core::error::Error for XaError {}

/// The tree (`struct xarray`): 16 bytes, in an inode.
///
/// Dropping it while it is not empty leaks its nodes, since there is nobody to give them to: [`Locked::erase_all`] first.
#[derive(Debug)]
pub struct XArray {
    /// The root, as a slot: a node, the entry of index 0 alone, or nothing.
    head: AtomicPtr<()>,
    /// Which marks there are anywhere, a bit a mark.
    marks: AtomicU32,
    /// How often marks were moved from slot to slot: see [`moves`](Self::moves).
    moves: AtomicU32,
}

const _: () = assert!(cfg!(loom) || size_of::<XArray>() == 16);

impl XArray {
    /// An empty tree.
    #[cfg(not(loom))]
    pub const fn new() -> XArray {
        XArray {
            head: AtomicPtr::new(null_mut()),
            marks: AtomicU32::new(0),
            moves: AtomicU32::new(0),
        }
    }

    /// An empty tree.
    #[cfg(loom)]
    pub fn new() -> XArray {
        XArray {
            head: AtomicPtr::new(null_mut()),
            marks: AtomicU32::new(0),
            moves: AtomicU32::new(0),
        }
    }

    /// Is nothing in it? Any context.
    pub fn is_empty(&self) -> bool {
        self.head.load(Ordering::Relaxed).is_null()
    }

    /// Does any entry have the mark (`xa_marked`)? Any context.
    pub fn any_marked(&self, mark: Mark) -> bool {
        // Acquire pairs with the Release in `mark_root`: who sees the bit sees those below it.
        self.marks.load(Ordering::Acquire) & mark.bit() != 0
    }

    /// The face for who looks without the lock, as long as the read section is open.
    ///
    /// # Safety
    ///
    /// The section is of the RCU after whose grace periods the tree's nodes are freed ([`NodeSource::free_rcu`]).
    ///
    /// # Context
    ///
    /// Any. An interrupt may look while the writer that it interrupted is inside.
    #[inline]
    pub unsafe fn reader<'a, R: Rcu>(&'a self, _section: &'a ReadGuard<'_, R>) -> Reader<'a> {
        Reader::new(self)
    }

    /// The face for the writer, who brings the nodes that he may need.
    ///
    /// # Safety
    ///
    /// As long as the result lives there is no other for this tree, and whoever has it sees what those before him did: the caller holds the
    /// lock that all writers take. All the sources that the tree's writers bring take each other's nodes back, by one RCU, which
    /// is that of its [`readers`](Self::reader).
    ///
    /// # Context
    ///
    /// That of the lock.
    #[inline]
    pub unsafe fn locked<'a, 's, S: NodeSource + ?Sized>(
        &'a self,
        nodes: &'a mut Nodes<'s, S>,
    ) -> Locked<'a, 's, S> {
        Locked::new(self, nodes)
    }

    /// For readers.
    #[inline]
    fn head(&self) -> Slot {
        // Acquire pairs with the Release in `set_head`, as for any slot.
        let head = Slot::decode(self.head.load(Ordering::Acquire));
        crate::inject::point("xarray: the root was read");
        head
    }

    /// For the writer.
    fn own_head(&self) -> Slot {
        Slot::decode(self.head.load(Ordering::Relaxed))
    }

    /// For the writer.
    fn set_head(&self, slot: Slot) {
        // Release pairs with the Acquire in `head`.
        self.head.store(slot.encode(), Ordering::Release);
        crate::inject::point("xarray: the root was written");
    }

    /// A search by marks can tell while *one* store or split moves the mark of an index from slot to slot, by looking again. If that is moved once
    /// more meanwhile, and perhaps back, it cannot; so a step that this number changed under is made again. It changes at the beginning of
    /// such a store or split, of something that is marked, so a writer who is interrupted inside keeps nobody waiting.
    #[inline]
    fn moves(&self) -> u32 {
        // Acquire pairs with the Release in `move_marks`: the moves before are seen whole. At the end of a step: all loads before acquire, so
        // if any of them saw something of a later move, this one sees its number.
        self.moves.load(Ordering::Acquire)
    }

    /// For the writer who is about to.
    fn move_marks(&self) {
        let moves = self.moves.load(Ordering::Relaxed);
        // Release pairs with the Acquire in `moves`.
        self.moves.store(moves.wrapping_add(1), Ordering::Release);
    }

    /// For the writer: the bit before.
    fn mark_root(&self, mark: Mark, to: bool) -> bool {
        let bits = self.marks.load(Ordering::Relaxed);
        let new = if to {
            bits | mark.bit()
        } else {
            bits & !mark.bit()
        };
        // Release pairs with the Acquire in `any_marked`.
        self.marks.store(new, Ordering::Release);
        bits & mark.bit() != 0
    }
}

impl Default for XArray {
    fn default() -> XArray {
        XArray::new()
    }
}
