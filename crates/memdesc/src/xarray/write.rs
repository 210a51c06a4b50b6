//! The writer's side: store, replace, erase, mark; growing and shrinking (`xas_store`, `xas_expand`, `xas_delete_node`, `xas_shrink`).

use core::ptr::{NonNull, null_mut};

use super::node::{BITS, MAX_INDEX, Mark, Node, SLOTS, last_of, level_of, levels_for};
use super::nodes::{NodeSource, Nodes};
use super::slot::Slot;
use super::{Entry, Found, Reader, XArray, XaError};
use crate::sync::atomic::Ordering;

/// The face of a tree for its writer: see [`XArray::locked`].
#[derive(Debug)]
pub struct Locked<'a, 's, S: NodeSource + ?Sized> {
    pub(super) tree: &'a XArray,
    pub(super) nodes: &'a mut Nodes<'s, S>,
}

/// A node of the tree, for its writer.
///
/// # Safety
///
/// The caller is the tree's writer, has come to the node through its slots, and does not use the result after he freed the node.
pub(super) unsafe fn node<'n>(at: NonNull<Node>) -> &'n Node {
    // SAFETY: the caller's promise: nobody but him takes nodes out.
    unsafe { at.as_ref() }
}

pub(super) fn parent(node: &Node) -> Option<NonNull<Node>> {
    // Relaxed: only writers look, and the lock leads from one to the next.
    NonNull::new(node.parent.load(Ordering::Relaxed))
}

impl<'a, 's, S: NodeSource + ?Sized> Locked<'a, 's, S> {
    pub(super) fn new(tree: &'a XArray, nodes: &'a mut Nodes<'s, S>) -> Self {
        Locked { tree, nodes }
    }

    /// Look-up and search, for who holds the lock: what it finds stays as long as the result is used.
    pub fn reader(&self) -> Reader<'_> {
        Reader::new(self.tree)
    }

    /// How many nodes [`store`](Self::store) would take now, and whether it would be refused otherwise.
    ///
    /// # Errors
    ///
    /// Those of `store`, except [`XaError::Nodes`].
    pub fn store_takes(&self, index: u64, order: u32) -> Result<usize, XaError> {
        if index > MAX_INDEX || order > MAX_INDEX.count_ones() || index & ((1 << order) - 1) != 0 {
            return Err(XaError::BadIndex);
        }
        let (levels, level) = (levels_for(index, order), level_of(order));
        let head = self.tree.own_head();
        let high = match head {
            // Nothing to be kept on the way up, so there is nothing but the way down.
            Slot::Empty => return Ok(levels.saturating_sub(level) as usize),
            // SAFETY: we are the writer, and the root is in the tree.
            Slot::Node(root) => u32::from(unsafe { node(root) }.shift) / BITS + 1,
            _ => 0,
        };
        let grown = levels.saturating_sub(high);
        let mut at = levels.max(high);
        let mut below = head;
        // Down from the root that is or will be; `at` counts the levels from this one down. A level that is to grow has one slot, the first, and
        // below it is the next such, or what is the root now.
        while at > high.max(level) {
            at -= 1;
            if index > last_of(at) {
                return Ok((grown + at - level) as usize);
            }
        }
        while let Slot::Node(down) = below
            && at > level
        {
            at -= 1;
            // SAFETY: we are the writer, and came down to it.
            let here = unsafe { node(down) };
            let (first, slot) = here.own_resolve(here.offset_of(index));
            match slot {
                Slot::Node(_) => below = slot,
                Slot::Value(entry, sub) => {
                    let found = Found {
                        index: here.index_of(index, first),
                        order: u32::from(here.shift) + sub,
                        entry,
                    };
                    return if found.order > order {
                        Err(XaError::Covered(found))
                    } else {
                        Ok(grown as usize)
                    };
                }
                _ => return Ok((grown + at - level) as usize),
            }
        }
        Ok(grown as usize)
    }

    /// Puts an entry at the `1 << order` indices from `index` on (`xas_store`). `replaced` hears what was there, entry by entry; the new one
    /// has a mark if any of them had. Readers see the old entries or the new one at each index, never neither.
    ///
    /// # Errors
    ///
    /// [`XaError::BadIndex`]; [`XaError::Covered`] if a larger entry is there; [`XaError::Nodes`] if the stock is too small, which it
    /// never is with [`store_needs`](super::store_needs).
    pub fn store(
        &mut self,
        index: u64,
        order: u32,
        entry: Entry,
        mut replaced: impl FnMut(Found),
    ) -> Result<(), XaError> {
        let takes = self.store_takes(index, order)?;
        if takes > self.nodes.len() {
            return Err(XaError::Nodes(takes));
        }
        self.grow(levels_for(index, order));
        let Slot::Node(root) = self.tree.own_head() else {
            // No level is needed, and none is there: index 0 alone.
            if let Slot::Value(entry, _) = self.tree.own_head() {
                replaced(Found {
                    index: 0,
                    order: 0,
                    entry,
                });
            }
            self.tree.set_head(Slot::Value(entry, 0));
            return Ok(());
        };
        let level = level_of(order);
        let mut at = root;
        loop {
            // SAFETY: we are the writer, and came down to it.
            let here = unsafe { node(at) };
            let shift = u32::from(here.shift);
            let offset = here.offset_of(index);
            if shift == level * BITS {
                self.fill_slots(here, index, offset, order - shift, entry, &mut replaced);
                return Ok(());
            }
            at = match here.own(offset) {
                Slot::Node(below) => below,
                _ => {
                    let below = self.nodes.take(Some(at), shift - BITS, offset);
                    here.add(1);
                    here.set(offset, Slot::Node(below));
                    below
                }
            };
        }
    }

    /// Puts another entry in the place of the one that is there, of the same order and with the same marks, by a single store: readers see
    /// either, and at all indices the same. What was there; nothing happens if there was nothing. Takes no nodes.
    pub fn replace(&mut self, index: u64, entry: Entry) -> Option<Found> {
        match self.place(index)? {
            (found, None) => {
                self.tree.set_head(Slot::Value(entry, 0));
                Some(found)
            }
            (found, Some(at)) => {
                // SAFETY: we are the writer, and came down to it.
                let here = unsafe { node(at) };
                let sub = found.order - u32::from(here.shift);
                here.set(here.offset_of(found.index), Slot::Value(entry, sub));
                Some(found)
            }
        }
    }

    /// Takes out the entry that is at the index, at all its indices and with its marks (`xa_erase`). Takes no nodes, and gives back
    /// those that are empty.
    pub fn erase(&mut self, index: u64) -> Option<Found> {
        let (found, at) = self.place(index)?;
        let Some(at) = at else {
            self.tree.set_head(Slot::Empty);
            Mark::ALL
                .iter()
                .for_each(|m| _ = self.tree.mark_root(*m, false));
            return Some(found);
        };
        // SAFETY: we are the writer, and came down to it; it goes at the earliest in `prune`.
        let here = unsafe { node(at) };
        let offset = here.offset_of(found.index);
        let sub = found.order - u32::from(here.shift);
        let len = 1 << sub;
        // The entry itself last: until then its siblings lead to it, see `Node::resolve`.
        (offset..offset + len)
            .rev()
            .for_each(|k| here.set(k, Slot::Empty));
        here.add(-(len as i32));
        self.clear_up(here, offset, len);
        self.prune(at);
        self.shrink();
        Some(found)
    }

    /// Takes everything out; `visit` hears what there was, in order (`xa_destroy`, `truncate_inode_pages`).
    pub fn erase_all(&mut self, mut visit: impl FnMut(Found)) {
        let head = self.tree.own_head();
        self.tree.set_head(Slot::Empty);
        Mark::ALL
            .iter()
            .for_each(|m| _ = self.tree.mark_root(*m, false));
        match head {
            Slot::Value(entry, _) => visit(Found {
                index: 0,
                order: 0,
                entry,
            }),
            Slot::Node(root) => self.tear_down(root, 0, &mut visit),
            _ => (),
        }
    }

    /// Marks the entry at the index (`xas_set_mark`). Was it there, and not marked yet?
    pub fn set_mark(&mut self, index: u64, mark: Mark) -> bool {
        match self.place(index) {
            None => false,
            Some((_, None)) => !self.tree.mark_root(mark, true),
            Some((found, Some(at))) => {
                // SAFETY: we are the writer, and came down to it.
                let here = unsafe { node(at) };
                self.mark_up(here, here.offset_of(found.index), mark)
            }
        }
    }

    /// Takes the mark from the entry at the index (`xas_clear_mark`). Was it there, and marked?
    pub fn clear_mark(&mut self, index: u64, mark: Mark) -> bool {
        match self.place(index) {
            None => false,
            Some((_, None)) => self.tree.mark_root(mark, false),
            Some((found, Some(at))) => {
                // SAFETY: we are the writer, and came down to it.
                let here = unsafe { node(at) };
                let offset = here.offset_of(found.index);
                if !here.mark(mark, offset, false) {
                    return false;
                }
                self.unmark_above(here, mark);
                true
            }
        }
    }

    /// The entry at the index and its node; no node if it is the root itself.
    pub(super) fn place(&self, index: u64) -> Option<(Found, Option<NonNull<Node>>)> {
        let mut at = match self.tree.own_head() {
            Slot::Value(entry, _) if index == 0 => {
                return Some((
                    Found {
                        index: 0,
                        order: 0,
                        entry,
                    },
                    None,
                ));
            }
            Slot::Node(root) => root,
            _ => return None,
        };
        // SAFETY: we are the writer, and it is the root.
        if index > unsafe { node(at) }.last() {
            return None;
        }
        loop {
            // SAFETY: we are the writer, and came down to it.
            let here = unsafe { node(at) };
            let (first, slot) = here.own_resolve(here.offset_of(index));
            match slot {
                Slot::Node(below) => at = below,
                Slot::Value(entry, sub) => {
                    let found = Found {
                        index: here.index_of(index, first),
                        order: u32::from(here.shift) + sub,
                        entry,
                    };
                    return Some((found, Some(at)));
                }
                _ => return None,
            }
        }
    }

    /// Makes the tree so many levels high at least. What is the root now becomes the first slot below a new one.
    fn grow(&mut self, levels: u32) {
        loop {
            let head = self.tree.own_head();
            let high = match head {
                Slot::Empty if levels > 0 => {
                    let root = self.nodes.take(None, (levels - 1) * BITS, 0);
                    self.tree.set_head(Slot::Node(root));
                    return;
                }
                // SAFETY: we are the writer, and it is the root.
                Slot::Node(root) => u32::from(unsafe { node(root) }.shift) / BITS + 1,
                _ => 0,
            };
            if high >= levels {
                return;
            }
            let root = self.nodes.take(None, high * BITS, 0);
            // SAFETY: taken just now, and published below.
            let new = unsafe { node(root) };
            new.set(0, head);
            new.add(1);
            for mark in Mark::ALL {
                new.mark(mark, 0, self.tree.any_marked(mark));
            }
            if let Slot::Node(old) = head {
                // SAFETY: we are the writer, and it is the root still. Relaxed: only writers look.
                unsafe { node(old) }
                    .parent
                    .store(root.as_ptr(), Ordering::Relaxed);
            }
            self.tree.set_head(Slot::Node(root));
        }
    }

    /// Makes `1 << sub` slots the entry's, whatever they are.
    fn fill_slots(
        &mut self,
        here: &Node,
        index: u64,
        offset: usize,
        sub: u32,
        entry: Entry,
        replaced: &mut impl FnMut(Found),
    ) {
        let len = 1 << sub;
        let marks = here.marks_in(offset, len);
        if marks != 0 && (len > 1 || matches!(here.own(offset), Slot::Node(_))) {
            self.tree.move_marks();
        }
        // Marks are there before the slot is, and go after the slots have: a search that misses the one finds the other.
        for mark in Mark::ALL.into_iter().filter(|m| marks & m.bit() != 0) {
            here.mark(mark, offset, true);
        }
        // First the entry, which covers all; then the siblings, left to right: see `Node::resolve`.
        for at in offset..offset + len {
            let old = here.own(at);
            let new = if at == offset {
                Slot::Value(entry, sub)
            } else {
                Slot::Sibling(offset)
            };
            here.set(at, new);
            let base = here.index_of(index, at);
            match old {
                Slot::Empty => here.add(1),
                Slot::Node(below) => self.tear_down(below, base, replaced),
                Slot::Value(entry, sub) => {
                    let order = u32::from(here.shift) + sub;
                    replaced(Found {
                        index: base,
                        order,
                        entry,
                    });
                }
                Slot::Sibling(_) => (),
            }
        }
        if len > 1 {
            here.clear_marks(offset + 1, len - 1);
        }
    }

    /// Frees a subtree that nobody is led to any more. Its depth, at most 8, bounds the recursion.
    fn tear_down(&self, at: NonNull<Node>, base: u64, visit: &mut impl FnMut(Found)) {
        {
            // SAFETY: we are the writer, and unlinked it; it is freed below.
            let here = unsafe { node(at) };
            here.bury();
            for offset in 0..SLOTS {
                let index = here.index_of(base, offset);
                match here.own(offset) {
                    Slot::Node(below) => self.tear_down(below, index, visit),
                    Slot::Value(entry, sub) => {
                        let order = u32::from(here.shift) + sub;
                        visit(Found {
                            index,
                            order,
                            entry,
                        });
                    }
                    _ => (),
                }
            }
        }
        self.nodes.source().free_rcu(at);
    }

    /// Takes the node out if it is empty, and then perhaps those above.
    fn prune(&mut self, mut at: NonNull<Node>) {
        loop {
            let above = {
                // SAFETY: we are the writer, and it is in the tree until it is freed below.
                let here = unsafe { node(at) };
                if here.used() != 0 {
                    return;
                }
                let above = parent(here);
                match above {
                    None => self.tree.set_head(Slot::Empty),
                    Some(above) => {
                        // SAFETY: the parent of what is in the tree is in the tree.
                        let above = unsafe { node(above) };
                        above.set(usize::from(here.offset), Slot::Empty);
                        above.add(-1);
                    }
                }
                here.bury();
                above
            };
            self.nodes.source().free_rcu(at);
            match above {
                None => return,
                Some(above) => at = above,
            }
        }
    }

    /// Takes the root out as long as only its first slot is used, and that can be the root itself.
    pub(super) fn shrink(&mut self) {
        while let Slot::Node(root) = self.tree.own_head() {
            {
                // SAFETY: we are the writer, and it is the root until it is freed below.
                let here = unsafe { node(root) };
                let only = here.own(0);
                match only {
                    _ if here.used() != 1 => return,
                    Slot::Node(below) => {
                        // SAFETY: as above. Relaxed: only writers look.
                        unsafe { node(below) }
                            .parent
                            .store(null_mut(), Ordering::Relaxed);
                    }
                    Slot::Value(..) if here.shift == 0 => (),
                    _ => return,
                }
                self.tree.set_head(only);
                here.bury();
            }
            self.nodes.source().free_rcu(root);
        }
    }

    /// Marks a slot, then those that lead to it: whoever is led by a mark finds it. Was it not marked yet?
    fn mark_up(&self, mut here: &Node, mut offset: usize, mark: Mark) -> bool {
        let mut first = true;
        while !here.mark(mark, offset, true) {
            first = false;
            let Some(above) = parent(here) else {
                self.tree.mark_root(mark, true);
                break;
            };
            offset = usize::from(here.offset);
            // SAFETY: the parent of what is in the tree is in the tree, and we are the writer.
            here = unsafe { node(above) };
        }
        !first
    }

    /// A mark of the node went: takes it from those that lead here, as far as nothing else has it.
    pub(super) fn unmark_above(&self, mut here: &Node, mark: Mark) {
        while !here.any_marked(mark) {
            let Some(above) = parent(here) else {
                self.tree.mark_root(mark, false);
                return;
            };
            let offset = usize::from(here.offset);
            // SAFETY: the parent of what is in the tree is in the tree, and we are the writer.
            here = unsafe { node(above) };
            here.mark(mark, offset, false);
        }
    }

    fn clear_up(&self, here: &Node, offset: usize, len: usize) {
        let had = here.clear_marks(offset, len);
        for mark in Mark::ALL.into_iter().filter(|m| had & m.bit() != 0) {
            self.unmark_above(here, mark);
        }
    }
}
