//! Where nodes come from, and the stock of them that a writer brings along: nothing is allocated under the tree's lock.

use core::fmt;
use core::ptr::{NonNull, null_mut};

use super::node::{BITS, INDEX_BITS, MAX_INDEX, MAX_LEVELS, Node, SLOTS, level_of, levels_for};
use crate::sync::atomic::Ordering;

/// Memory for nodes, and the ways back.
///
/// # Safety
///
/// [`alloc`](Self::alloc) gives memory of a [`Node`]'s size and alignment that is the caller's alone, until it comes back by `free` or
/// `free_rcu`. `free_rcu` leaves it as it is (but for what [`Node::rcu_head`] leads to) until every read section that was open
/// when it was called is over.
pub unsafe trait NodeSource {
    /// Memory for a node, contents unspecified.
    ///
    /// # Context
    ///
    /// What the implementation wants; never called under the tree's lock.
    fn alloc(&self) -> Option<NonNull<Node>>;

    /// Takes back what nobody ever saw. Never called under the tree's lock.
    fn free(&self, node: NonNull<Node>);

    /// Takes it back after a grace period. Called under the tree's lock: allocates nothing, cannot fail.
    fn free_rcu(&self, node: NonNull<Node>);
}

// SAFETY: the same source.
unsafe impl<S: NodeSource + ?Sized> NodeSource for &S {
    fn alloc(&self) -> Option<NonNull<Node>> {
        (**self).alloc()
    }
    fn free(&self, node: NonNull<Node>) {
        (**self).free(node);
    }
    fn free_rcu(&self, node: NonNull<Node>) {
        (**self).free_rcu(node);
    }
}

/// The source had no more.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NoNodes;

impl fmt::Display for NoNodes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("no memory for the nodes of a tree")
    }
}

impl core::error::Error for NoNodes {}

/// A stock of nodes, for a writer to take along (`xas_nomem`, `radix_tree_preload`); what is left goes back when it is dropped.
///
/// Whoever erases only brings an empty one: it knows where nodes go.
pub struct Nodes<'s, S: NodeSource + ?Sized> {
    source: &'s S,
    /// Linked by `parent`.
    first: Option<NonNull<Node>>,
    len: usize,
}

impl<'s, S: NodeSource + ?Sized> Nodes<'s, S> {
    /// An empty stock.
    pub const fn new(source: &'s S) -> Self {
        Nodes {
            source,
            first: None,
            len: 0,
        }
    }

    /// How many there are.
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Are there none?
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Sees to it that there are at least `len`, see [`store_needs`] and [`split_needs`].
    ///
    /// # Errors
    ///
    /// The source had no more; what there is stays.
    ///
    /// # Context
    ///
    /// That of the source's `alloc`; not under the tree's lock.
    pub fn fill(&mut self, len: usize) -> Result<(), NoNodes> {
        while self.len < len {
            let node = self.source.alloc().ok_or(NoNodes)?;
            // SAFETY: memory for a node, ours alone.
            unsafe { node.write(Node::new()) };
            self.push(node);
        }
        Ok(())
    }

    pub(super) fn source(&self) -> &'s S {
        self.source
    }

    fn push(&mut self, node: NonNull<Node>) {
        // SAFETY: in the stock it is ours alone, and lives.
        let parent = unsafe { &node.as_ref().parent };
        parent.store(
            self.first.map_or(null_mut(), NonNull::as_ptr),
            Ordering::Relaxed,
        );
        self.first = Some(node);
        self.len += 1;
    }

    fn pop(&mut self) -> Option<NonNull<Node>> {
        let node = self.first?;
        // SAFETY: as in `push`.
        let parent = unsafe { &node.as_ref().parent };
        self.first = NonNull::new(parent.load(Ordering::Relaxed));
        self.len -= 1;
        Some(node)
    }

    /// A node for that place. The writer has made sure that there are enough.
    pub(super) fn take(
        &mut self,
        parent: Option<NonNull<Node>>,
        shift: u32,
        offset: usize,
    ) -> NonNull<Node> {
        let Some(mut node) = self.pop() else {
            unreachable!("the writer counted them before he began")
        };
        // SAFETY: in the stock it was ours alone, and nobody is led to it yet.
        let fresh = unsafe { node.as_mut() };
        fresh.shift = shift as u8;
        fresh.offset = offset as u8;
        // Relaxed: readers do not look, and the lock leads from writer to writer.
        fresh.parent.store(
            parent.map_or(null_mut(), NonNull::as_ptr),
            Ordering::Relaxed,
        );
        #[cfg(loom)]
        fresh.poke(0);
        node
    }
}

impl<S: NodeSource + ?Sized> Drop for Nodes<'_, S> {
    fn drop(&mut self) {
        while let Some(node) = self.pop() {
            self.source.free(node);
        }
    }
}

impl<S: NodeSource + ?Sized> fmt::Debug for Nodes<'_, S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Nodes").field("len", &self.len).finish()
    }
}

/// How many nodes [`store`](super::Locked::store) of this order at this index takes at the worst, whatever is in the tree: a tree that has
/// nothing but index 0 grows to the full height, and the way down shares nothing with the way up (`radix_tree_preload`).
///
/// At most 17.
pub const fn store_needs(index: u64, order: u32) -> usize {
    if index > MAX_INDEX || order > INDEX_BITS {
        return 0;
    }
    let (levels, level) = (levels_for(index, order), level_of(order));
    let grown = if levels == 0 {
        0
    } else {
        2 * levels - 1 - level
    };
    // In a tree that is higher than this index needs, there may be nothing on the way down from its root.
    let down = MAX_LEVELS - 1 - level;
    if grown > down {
        grown as usize
    } else {
        down as usize
    }
}

/// How many nodes [`split`](super::Locked::split) from one order to a smaller one takes (`xas_split_alloc`): none if both
/// have their slots on one level, else one for each slot, and below it.
pub const fn split_needs(from_order: u32, to_order: u32) -> usize {
    if from_order > INDEX_BITS || to_order > from_order {
        return 0;
    }
    let (mut at, to) = (level_of(from_order), level_of(to_order));
    let (mut nodes, mut slots) = (0_usize, 1 << (from_order % BITS));
    while at > to {
        nodes = nodes.saturating_add(slots);
        slots = slots.saturating_mul(SLOTS);
        at -= 1;
    }
    nodes
}
