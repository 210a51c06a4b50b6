//! Look-up and search, without a lock and without waiting (`xas_load`, `xas_find`, `xas_find_marked`).
//!
//! A walk goes down from the root and follows what it reads. A node that left the tree meanwhile holds what it held when it left,
//! which is after the walk came to it: so what it says was true at a moment of the walk.

use core::ptr::NonNull;

use super::node::{MAX_INDEX, Mark, Node, SLOTS};
use super::slot::Slot;
use super::{Entry, Found, XArray};

/// The face of a tree for who looks: see [`XArray::reader`] and [`Locked::reader`](super::Locked::reader).
#[derive(Clone, Copy, Debug)]
pub struct Reader<'a> {
    tree: &'a XArray,
}

/// One step of a search.
enum Step<'a> {
    /// This, in that node; in none, if it is the root itself.
    Found(Found, Option<&'a Node>),
    /// Nothing before this index; none after all if there is none.
    Skip(Option<u64>),
}

impl<'a> Reader<'a> {
    pub(super) fn new(tree: &'a XArray) -> Reader<'a> {
        Reader { tree }
    }

    #[cfg(all(test, loom))]
    pub(super) fn root(self) -> Slot {
        self.tree.head()
    }

    #[inline]
    fn node(self, node: NonNull<Node>) -> &'a Node {
        // SAFETY: a slot led here. Whoever makes a `Reader` promises a read section as long as `'a`, or the writer's place: the node is freed
        // after neither.
        unsafe { node.as_ref() }
    }

    /// What is at the index (`xa_load`, `filemap_get_entry`).
    ///
    /// # Context
    ///
    /// Any.
    #[inline]
    pub fn load(&self, index: u64) -> Option<Entry> {
        self.get(index).map(|found| found.entry)
    }

    /// What is at the index, and from where to where (`xas_get_order`).
    ///
    /// # Context
    ///
    /// Any.
    #[inline]
    pub fn get(&self, index: u64) -> Option<Found> {
        self.walk(index).map(|(found, _)| found)
    }

    /// Has the entry at the index the mark (`xa_get_mark`)? No if there is none.
    ///
    /// # Context
    ///
    /// Any.
    pub fn is_marked(&self, index: u64, mark: Mark) -> bool {
        loop {
            let moves = self.tree.moves();
            let (found, node) = match self.walk(index) {
                Some((found, Some(node))) => (found, node),
                Some((_, None)) => return self.tree.any_marked(mark),
                None => return false,
            };
            if node.marked(mark, node.offset_of(found.index)) {
                return true;
            }
            // As in a search: the mark may have gone to the parts of what was found, or from them.
            if self.get(index) == Some(found) && self.tree.moves() == moves {
                return false;
            }
        }
    }

    #[inline]
    fn walk(&self, index: u64) -> Option<(Found, Option<&'a Node>)> {
        let mut node = match self.tree.head() {
            Slot::Value(entry, _) if index == 0 => return Some((first(entry), None)),
            Slot::Node(root) => self.node(root),
            _ => return None,
        };
        if index > node.last() {
            return None;
        }
        loop {
            let (offset, slot) = node.resolve(node.offset_of(index));
            match slot {
                Slot::Value(entry, sub) => {
                    return Some((at(node, index, offset, entry, sub), Some(node)));
                }
                Slot::Node(below) => node = self.node(below),
                _ => return None,
            }
        }
    }

    /// The first entry that is at any index of `from..=to` and has the mark, if one is asked for (`xa_find`). It may begin before `from`
    /// and end after `to`.
    ///
    /// # Context
    ///
    /// Any. Goes past at most one node for each level and 64 empty ones at once; what is searched is bounded by the tree.
    pub fn find(&self, from: u64, to: u64, mark: Option<Mark>) -> Option<Found> {
        self.seek(from, to, mark).map(|(found, _)| found)
    }

    /// Everything that [`find`](Self::find) finds one after the other (`xas_for_each`, `xas_for_each_marked`, `filemap_get_folios`).
    pub fn range(&self, from: u64, to: u64, mark: Option<Mark>) -> Range<'a> {
        Range {
            reader: *self,
            next: (from <= to).then_some(from),
            to,
            mark,
            node: None,
        }
    }

    /// Calls `visit` with what [`range`](Self::range) gives, as long as it says to go on.
    pub fn for_each_from(
        &self,
        from: u64,
        mark: Option<Mark>,
        mut visit: impl FnMut(Found) -> bool,
    ) {
        for found in self.range(from, MAX_INDEX, mark) {
            if !visit(found) {
                return;
            }
        }
    }

    fn seek(&self, from: u64, to: u64, mark: Option<Mark>) -> Option<(Found, Option<&'a Node>)> {
        let mut next = from;
        while next <= to {
            let moves = self.tree.moves();
            let step = self.step(next, mark);
            if mark.is_some() && self.tree.moves() != moves {
                continue;
            }
            match step {
                Step::Found(found, node) => {
                    return (found.index <= to).then_some((found, node));
                }
                Step::Skip(after) => next = after?,
            }
        }
        None
    }

    /// Walks down to the first that may be at `index` or after, through slots that are in use, or marked.
    fn step(&self, mut index: u64, mark: Option<Mark>) -> Step<'a> {
        if mark.is_some_and(|m| !self.tree.any_marked(m)) {
            return Step::Skip(None);
        }
        let mut node = match self.tree.head() {
            Slot::Value(entry, _) if index == 0 => return Step::Found(first(entry), None),
            Slot::Node(root) => self.node(root),
            _ => return Step::Skip(None),
        };
        let last = node.last();
        if index > last {
            return Step::Skip(None);
        }
        loop {
            match scan(node, index, mark) {
                Scan::Found(found) => return Step::Found(found, Some(node)),
                Scan::Down(from, below) => (index, node) = (from, self.node(below)),
                Scan::None(after) => return Step::Skip((after <= last).then_some(after)),
            }
        }
    }
}

/// What a node has at an index or after it.
enum Scan {
    Found(Found),
    /// Perhaps below this node, from this index on.
    Down(u64, NonNull<Node>),
    /// Nothing; the node ends before this index.
    None(u64),
}

fn scan(node: &Node, index: u64, mark: Option<Mark>) -> Scan {
    let start = node.offset_of(index);
    let mut offset = start;
    while offset < SLOTS {
        // The slot before its mark: of an entry that is split, the parts are marked before they are there.
        let (first, slot) = node.resolve(offset);
        let here = match slot {
            Slot::Empty => false,
            _ => mark.is_none_or(|m| node.marked(m, first)),
        };
        match slot {
            Slot::Value(entry, sub) if here => {
                return Scan::Found(at(node, index, first, entry, sub));
            }
            Slot::Node(below) if here => {
                let from = if offset == start {
                    index
                } else {
                    node.index_of(index, offset)
                };
                return Scan::Down(from, below);
            }
            // Not marked; or the mark went elsewhere after the slot was read, and then the slot has changed before it.
            Slot::Value(..) | Slot::Node(_) if node.resolve(offset) != (first, slot) => continue,
            Slot::Value(_, sub) => offset = first + (1 << sub),
            _ => offset += 1,
        }
        if let Some(m) = mark {
            let next = node.next_marked(m, offset).unwrap_or(SLOTS);
            // Who stores over several moves their marks to the first. So if no mark is seen here, look at the slot once more, after the marks:
            // a sibling's mark is at what it leads to.
            if next > offset && offset < SLOTS && matches!(node.slot(offset), Slot::Sibling(_)) {
                continue;
            }
            offset = next;
        }
    }
    Scan::None(node.index_of(index, SLOTS))
}

fn at(node: &Node, index: u64, offset: usize, entry: Entry, sub: u32) -> Found {
    Found {
        index: node.index_of(index, offset),
        order: u32::from(node.shift) + sub,
        entry,
    }
}

fn first(entry: Entry) -> Found {
    Found {
        index: 0,
        order: 0,
        entry,
    }
}

/// Finds one entry after the other: see [`Reader::range`].
///
/// It stays in the node where it found the last one, and so costs a look at a slot for each that lies beside another.
#[derive(Clone, Debug)]
pub struct Range<'a> {
    reader: Reader<'a>,
    next: Option<u64>,
    to: u64,
    mark: Option<Mark>,
    /// Where the last one was, and the first index that it covers.
    node: Option<(&'a Node, u64)>,
}

impl Range<'_> {
    /// What has been searched ends before this index; `None` at the end.
    pub fn next_index(&self) -> Option<u64> {
        self.next
    }
}

impl Iterator for Range<'_> {
    type Item = Found;

    fn next(&mut self) -> Option<Found> {
        let from = self.next?;
        let tree = self.reader.tree;
        let beside = self.node.and_then(|(node, base)| {
            let moves = tree.moves();
            // If it leaves after this look, it held then what it holds.
            let inside = node.index_of(from, 0) == base && !node.dead();
            let found = inside.then(|| scan(node, from, self.mark))?;
            let steady = self.mark.is_none() || tree.moves() == moves;
            match found {
                Scan::Found(found) if steady => Some(found),
                _ => None,
            }
        });
        let found = match beside {
            Some(found) if found.index <= self.to => Some(found),
            Some(_) => None,
            None => self
                .reader
                .seek(from, self.to, self.mark)
                .map(|(found, node)| {
                    self.node = node.map(|n| (n, n.index_of(found.index, 0)));
                    found
                }),
        };
        self.next = found.and_then(|f| f.last().checked_add(1).filter(|next| *next <= self.to));
        found
    }
}
