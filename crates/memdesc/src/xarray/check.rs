//! The invariants of a tree, for tests: everything that a writer relies on.

use core::ptr::NonNull;

use super::node::{BITS, MAX_LEVELS, Mark, Node, SLOTS};
use super::nodes::NodeSource;
use super::slot::Slot;
use super::write::{Locked, node, parent};

impl<S: NodeSource + ?Sized> Locked<'_, '_, S> {
    /// Walks the whole tree: how many nodes it has.
    ///
    /// # Errors
    ///
    /// What is wrong.
    #[doc(hidden)]
    pub fn check(&self) -> Result<usize, &'static str> {
        let Slot::Node(root) = self.tree.own_head() else {
            return match self.tree.own_head() {
                Slot::Value(_, 0) => Ok(0),
                Slot::Empty if Mark::ALL.iter().any(|m| self.tree.any_marked(*m)) => {
                    Err("an empty tree is marked")
                }
                Slot::Empty => Ok(0),
                _ => Err("what the root cannot be"),
            };
        };
        // SAFETY: we are the writer, and it is the root.
        let here = unsafe { node(root) };
        if here.used() == 1
            && (matches!(here.own(0), Slot::Node(_))
                || here.shift == 0 && matches!(here.own(0), Slot::Value(..)))
        {
            return Err("the root could be taken out");
        }
        for mark in Mark::ALL {
            if here.any_marked(mark) != self.tree.any_marked(mark) {
                return Err("a mark of the tree is not its root's");
            }
        }
        if u32::from(here.shift) / BITS >= MAX_LEVELS {
            return Err("too high");
        }
        self.check_node(root, None, u32::from(here.shift), 0)
    }

    fn check_node(
        &self,
        at: NonNull<Node>,
        above: Option<NonNull<Node>>,
        shift: u32,
        offset: usize,
    ) -> Result<usize, &'static str> {
        // SAFETY: we are the writer, and came down to it.
        let here = unsafe { node(at) };
        if parent(here) != above || usize::from(here.offset) != offset {
            return Err("a node does not know where it is");
        }
        if u32::from(here.shift) != shift {
            return Err("a node on the wrong level");
        }
        let (mut used, mut nodes, mut covered) = (0, 1, 0..0);
        for slot in 0..SLOTS {
            let marked = |m: &Mark| here.marked(*m, slot);
            let what = here.own(slot);
            used += u32::from(what != Slot::Empty);
            match what {
                Slot::Sibling(first) if first == covered.start && covered.contains(&slot) => (),
                _ if covered.contains(&slot) => return Err("a hole in an entry"),
                Slot::Sibling(_) => return Err("a sibling of nothing"),
                Slot::Value(_, sub) => {
                    covered = slot..slot + (1 << sub);
                    if slot & ((1 << sub) - 1) != 0 || covered.end > SLOTS || sub >= BITS {
                        return Err("an entry of the wrong size");
                    }
                    continue;
                }
                Slot::Node(below) => {
                    let Some(shift) = shift.checked_sub(BITS) else {
                        return Err("a node below the lowest level");
                    };
                    nodes += self.check_node(below, Some(at), shift, slot)?;
                    // SAFETY: as above.
                    let below = unsafe { node(below) };
                    if Mark::ALL.iter().any(|m| below.any_marked(*m) != marked(m)) {
                        return Err("a mark of a node is not what is below");
                    }
                    continue;
                }
                Slot::Empty => (),
            }
            if Mark::ALL.iter().any(marked) {
                return Err("a mark of nothing");
            }
        }
        if used != here.used() {
            return Err("the count is wrong");
        }
        if used == 0 {
            return Err("an empty node");
        }
        Ok(nodes)
    }
}
