//! Splitting an entry where it is into smaller ones (`xas_split`), for a folio that is split or truncated in the middle.

use core::ptr::NonNull;

use super::node::{BITS, Mark, Node, SLOTS};
use super::nodes::{NodeSource, split_needs};
use super::slot::Slot;
use super::write::{Locked, node};
use super::{Entry, XaError};

/// What the parts are.
struct Parts<F> {
    order: u32,
    /// A bit for each mark that the whole had.
    marks: u32,
    entries: F,
}

impl<F> Parts<F> {
    fn marks(&self) -> impl Iterator<Item = Mark> {
        let marks = self.marks;
        Mark::ALL.into_iter().filter(move |m| marks & m.bit() != 0)
    }
}

impl<S: NodeSource + ?Sized> Locked<'_, '_, S> {
    /// Puts entries of `to_order` in the place of the one of `from_order` that is at `index`; `entries` says which, for the first index of
    /// each, in no certain order. All have the marks of the whole. Readers see the whole or the part at each index, never neither.
    ///
    /// # Errors
    ///
    /// [`XaError::NotThere`] if there is no entry of this order; [`XaError::BadIndex`] if `to_order` is above it;
    /// [`XaError::Nodes`] if there are fewer than [`split_needs`] in the stock.
    pub fn split(
        &mut self,
        index: u64,
        from_order: u32,
        to_order: u32,
        entries: impl FnMut(u64) -> Entry,
    ) -> Result<(), XaError> {
        let (found, at) = match self.place(index) {
            Some((found, at)) if found.order == from_order => (found, at),
            other => return Err(XaError::NotThere(other.map(|(found, _)| found))),
        };
        if to_order > from_order {
            return Err(XaError::BadIndex);
        }
        let needs = split_needs(from_order, to_order);
        if needs > self.nodes.len() {
            return Err(XaError::Nodes(needs));
        }
        let mut entries = entries;
        let Some(at) = at else {
            self.tree.set_head(Slot::Value(entries(0), 0));
            return Ok(());
        };
        // SAFETY: we are the writer, and came down to it.
        let here = unsafe { node(at) };
        let shift = u32::from(here.shift);
        let offset = here.offset_of(found.index);
        let mut parts = Parts {
            order: to_order,
            marks: here.marks_in(offset, 1),
            entries,
        };
        if parts.marks != 0 {
            self.tree.move_marks();
        }
        let len = 1 << (from_order - shift);
        // From the right to the left, and the whole's own slot last: until then its siblings lead to it, see `Node::resolve`.
        if to_order >= shift {
            let sub = to_order - shift;
            for first in (offset..offset + len).step_by(1 << sub).rev() {
                self.part(here, found.index, first, sub, &mut parts);
            }
        } else {
            for slot in (offset..offset + len).rev() {
                let below = self.below(at, here, found.index, slot, &mut parts);
                // Marks before slots, as everywhere.
                parts.marks().for_each(|m| _ = here.mark(m, slot, true));
                here.set(slot, Slot::Node(below));
            }
        }
        // An entry in the root's first slot may have kept the tree so high; the nodes that it became need not.
        self.shrink();
        Ok(())
    }

    /// One part, in slots of a node.
    fn part(
        &self,
        here: &Node,
        index: u64,
        first: usize,
        sub: u32,
        parts: &mut Parts<impl FnMut(u64) -> Entry>,
    ) {
        let entry = (parts.entries)(here.index_of(index, first));
        parts.marks().for_each(|m| _ = here.mark(m, first, true));
        here.set(first, Slot::Value(entry, sub));
        for slot in first + 1..first + (1 << sub) {
            here.set(slot, Slot::Sibling(first));
        }
    }

    /// A node full of parts, or of nodes with them, that nobody is led to yet. Its depth, at most 8, bounds the recursion.
    fn below(
        &mut self,
        above: NonNull<Node>,
        above_node: &Node,
        index: u64,
        offset: usize,
        parts: &mut Parts<impl FnMut(u64) -> Entry>,
    ) -> NonNull<Node> {
        let shift = u32::from(above_node.shift) - BITS;
        let index = above_node.index_of(index, offset);
        let at = self.nodes.take(Some(above), shift, offset);
        // SAFETY: taken just now, and nobody else's before it is published.
        let new = unsafe { node(at) };
        new.add(SLOTS as i32);
        if parts.order >= shift {
            let sub = parts.order - shift;
            for first in (0..SLOTS).step_by(1 << sub) {
                self.part(new, index, first, sub, parts);
            }
        } else {
            for slot in 0..SLOTS {
                let below = self.below(at, new, index, slot, parts);
                parts.marks().for_each(|m| _ = new.mark(m, slot, true));
                new.set(slot, Slot::Node(below));
            }
        }
        at
    }
}
