//! The areas by address: an AVL tree through the descriptors, each of which knows the largest hole between the areas below it, so that the
//! lowest hole that is large enough is found in one descent (Linux keeps a second tree, of the holes, with a descriptor for each).
//!
//! Places are pages from the start of the range. Nothing here allocates or locks; whoever calls holds the lock round the tree.

use core::ptr::NonNull;

use crate::desc::VmArea;
use crate::sync::atomic::{AtomicPtr, Ordering};

/// An AVL tree of 2^32 nodes is no higher.
const MAX_HEIGHT: usize = 48;

/// The tree.
///
/// # Invariants
///
/// What it links are descriptors of areas that were inserted and not removed: they live, and their links are the tree's. Areas do not overlap.
#[derive(Debug)]
pub(crate) struct AreaTree {
    root: *mut VmArea,
    /// Pages in the range.
    pages: u32,
    len: usize,
}

// SAFETY: it leads to descriptors that are shared between CPUs by design.
unsafe impl Send for AreaTree {}

/// The way from the root to a node: each with whether it goes on to the right.
struct Path {
    steps: [(*mut VmArea, bool); MAX_HEIGHT],
    len: usize,
}

impl Path {
    fn new() -> Path {
        Path {
            steps: [(core::ptr::null_mut(), false); MAX_HEIGHT],
            len: 0,
        }
    }

    fn push(&mut self, node: &VmArea, right: bool) {
        self.steps[self.len] = ((&raw const *node).cast_mut(), right);
        self.len += 1;
    }
}

fn load(link: &AtomicPtr<VmArea>) -> Option<&VmArea> {
    // SAFETY: by the invariant of the tree; the caller borrows it.
    unsafe { link.load(Ordering::Relaxed).as_ref() }
}

fn left(node: &VmArea) -> Option<&VmArea> {
    load(&node.left)
}

fn right(node: &VmArea) -> Option<&VmArea> {
    load(&node.right)
}

fn height(node: Option<&VmArea>) -> u8 {
    node.map_or(0, |n| n.height.load(Ordering::Relaxed))
}

fn ptr(node: Option<&VmArea>) -> *mut VmArea {
    node.map_or(core::ptr::null_mut(), |n| (&raw const *n).cast_mut())
}

fn first(node: &VmArea) -> u32 {
    node.first.load(Ordering::Relaxed)
}

fn last(node: &VmArea) -> u32 {
    node.last.load(Ordering::Relaxed)
}

fn hole(node: &VmArea) -> u32 {
    node.hole.load(Ordering::Relaxed)
}

fn set_child(node: &VmArea, is_right: bool, child: *mut VmArea) {
    let link = if is_right { &node.right } else { &node.left };
    link.store(child, Ordering::Relaxed);
}

/// The hole before a node, down to the areas to its left in its subtree.
fn hole_before(node: &VmArea) -> u32 {
    left(node).map_or(0, |l| node.start() - last(l))
}

/// The hole after it.
fn hole_after(node: &VmArea) -> u32 {
    right(node).map_or(0, |r| first(r) - node.end())
}

/// What a node says of its subtree, from what its children say of theirs.
fn summary(node: &VmArea) -> (u8, u32, u32, u32) {
    let (l, r) = (left(node), right(node));
    (
        1 + height(l).max(height(r)),
        l.map_or(node.start(), first),
        r.map_or(node.end(), last),
        hole_before(node)
            .max(hole_after(node))
            .max(l.map_or(0, hole))
            .max(r.map_or(0, hole)),
    )
}

fn update(node: &VmArea) {
    let (height, first, last, hole) = summary(node);
    node.height.store(height, Ordering::Relaxed);
    node.first.store(first, Ordering::Relaxed);
    node.last.store(last, Ordering::Relaxed);
    node.hole.store(hole, Ordering::Relaxed);
}

/// Makes a child the root of its parent's subtree.
fn rotate<'t>(node: &'t VmArea, up: &'t VmArea, up_is_right: bool) -> &'t VmArea {
    let middle = if up_is_right { left(up) } else { right(up) };
    set_child(node, up_is_right, ptr(middle));
    set_child(up, !up_is_right, ptr(Some(node)));
    update(node);
    update(up);
    up
}

/// A node whose subtrees are right, and differ by two levels at most: says what is the root of them now.
fn balance(node: &VmArea) -> &VmArea {
    let (l, r) = (left(node), right(node));
    match (height(l), height(r)) {
        (high, low) if high > low + 1 => {
            let Some(mut up) = l else { return node };
            if let Some(inner) = right(up).filter(|i| height(Some(i)) > height(left(up))) {
                up = rotate(up, inner, true);
            }
            rotate(node, up, false)
        }
        (low, high) if high > low + 1 => {
            let Some(mut up) = r else { return node };
            if let Some(inner) = left(up).filter(|i| height(Some(i)) > height(right(up))) {
                up = rotate(up, inner, false);
            }
            rotate(node, up, true)
        }
        _ => {
            update(node);
            node
        }
    }
}

impl AreaTree {
    /// No areas in a range of so many pages.
    pub(crate) fn new(pages: u32) -> AreaTree {
        AreaTree {
            root: core::ptr::null_mut(),
            pages,
            len: 0,
        }
    }

    fn root(&self) -> Option<&VmArea> {
        // SAFETY: by the invariant.
        unsafe { self.root.as_ref() }
    }

    /// How many areas there are.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// The largest hole, in pages.
    pub(crate) fn largest_hole(&self) -> u32 {
        match self.root() {
            Some(root) => hole(root).max(first(root)).max(self.pages - last(root)),
            None => self.pages,
        }
    }

    /// The lowest place for `pages` pages, such that `skew` pages more are a multiple of `align`.
    pub(crate) fn find_room(&self, pages: u32, align: u32, skew: u32) -> Option<u32> {
        // A hole that large has room wherever it starts.
        let wanted = pages.checked_add(align - 1)?;
        let aligned = |at: u32| (at + skew).next_multiple_of(align) - skew;
        let Some(root) = self.root() else {
            return (self.pages >= wanted).then(|| aligned(0));
        };
        if first(root) >= wanted {
            return Some(aligned(0));
        }
        let mut at = Some(root).filter(|root| hole(root) >= wanted);
        while let Some(node) = at {
            let (l, r) = (left(node), right(node));
            if let Some(l) = l.filter(|l| hole(l) >= wanted) {
                at = Some(l);
            } else if hole_before(node) >= wanted {
                return Some(aligned(node.start() - hole_before(node)));
            } else if hole_after(node) >= wanted {
                return Some(aligned(node.end()));
            } else {
                at = r.filter(|r| hole(r) >= wanted);
            }
        }
        (self.pages - last(root) >= wanted).then(|| aligned(last(root)))
    }

    /// Adds an area that has its place, which is free.
    ///
    /// # Safety
    ///
    /// It lives until it is removed, and its links are nobody else's.
    pub(crate) unsafe fn insert(&mut self, area: NonNull<VmArea>) {
        // SAFETY: the caller's promise.
        let new = unsafe { area.as_ref() };
        set_child(new, false, core::ptr::null_mut());
        set_child(new, true, core::ptr::null_mut());
        update(new);
        let mut path = Path::new();
        let mut at = self.root();
        while let Some(node) = at {
            let is_right = new.start() > node.start();
            debug_assert!(new.end() <= node.start() || new.start() >= node.end());
            path.push(node, is_right);
            at = if is_right { right(node) } else { left(node) };
        }
        self.unwind(&path, area.as_ptr());
        self.len += 1;
    }

    /// Takes an area out.
    pub(crate) fn remove(&mut self, area: NonNull<VmArea>) {
        let mut path = Path::new();
        // SAFETY: the caller has an area of this tree.
        let target = unsafe { area.as_ref() };
        let mut at = self.root();
        while let Some(node) = at.filter(|node| !core::ptr::eq(*node, target)) {
            let is_right = target.start() > node.start();
            path.push(node, is_right);
            at = if is_right { right(node) } else { left(node) };
        }
        let orphan = match (left(target), right(target)) {
            (None, other) | (other, None) => ptr(other),
            (Some(_), Some(mut next)) => {
                // The next one by address takes its place; what was to the right of that moves up there.
                let place = path.len;
                path.push(target, true);
                while let Some(l) = left(next) {
                    path.push(next, false);
                    next = l;
                }
                let orphan = ptr(right(next));
                set_child(next, false, ptr(left(target)));
                set_child(next, true, ptr(right(target)));
                path.steps[place].0 = ptr(Some(next));
                orphan
            }
        };
        self.unwind(&path, orphan);
        self.len -= 1;
    }

    /// Hangs a subtree in at the end of a path, and makes right what is above it.
    fn unwind(&mut self, path: &Path, mut child: *mut VmArea) {
        for &(node, is_right) in path.steps[..path.len].iter().rev() {
            // SAFETY: what is in a path is in the tree.
            let node = unsafe { &*node };
            set_child(node, is_right, child);
            child = ptr(Some(balance(node)));
        }
        self.root = child;
    }

    /// The area that has this page, guards included.
    pub(crate) fn find(&self, page: u32) -> Option<&VmArea> {
        self.next(page).filter(|area| area.start() <= page)
    }

    /// The first area that ends after this page.
    pub(crate) fn next(&self, page: u32) -> Option<&VmArea> {
        let (mut at, mut best) = (self.root(), None);
        while let Some(node) = at {
            if node.end() > page {
                best = Some(node);
                at = left(node);
            } else {
                at = right(node);
            }
        }
        best
    }

    /// Is all as it should be? Says what is not. For tests: visits everything.
    pub(crate) fn check(&self) -> Result<usize, &'static str> {
        fn visit(node: &VmArea, count: &mut usize, end: &mut u32) -> Result<(), &'static str> {
            if let Some(l) = left(node) {
                visit(l, count, end)?;
            }
            if node.start() < *end || node.end() <= node.start() {
                return Err("areas overlap or are out of order");
            }
            *end = node.end();
            *count += 1;
            if let Some(r) = right(node) {
                visit(r, count, end)?;
            }
            if height(left(node)).abs_diff(height(right(node))) > 1 {
                return Err("out of balance");
            }
            let said = (height(Some(node)), first(node), last(node), hole(node));
            if said != summary(node) {
                return Err("a node says what is not so of its subtree");
            }
            Ok(())
        }
        let (mut count, mut end) = (0, 0);
        if let Some(root) = self.root() {
            visit(root, &mut count, &mut end)?;
        }
        if end > self.pages {
            return Err("an area lies past the end");
        }
        if count != self.len {
            return Err("the count is wrong");
        }
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::desc::VmAreaKind;
    use core::panic::Location;
    use std::boxed::Box;
    use std::collections::BTreeMap;
    use std::vec::Vec;

    fn area(start: u32, pages: u32) -> NonNull<VmArea> {
        let zeroed = Box::<VmArea>::new_zeroed();
        // SAFETY: atomics only; zero is valid for them.
        let area = unsafe { zeroed.assume_init() };
        area.init(VmAreaKind::Vmap, 0, 0, Location::caller());
        area.set_place(start, start + pages);
        NonNull::from(Box::leak(area))
    }

    /// The lowest place by looking at everything.
    fn lowest(model: &BTreeMap<u32, u32>, pages: u32, align: u32, skew: u32, total: u32) -> u32 {
        let mut at = 0;
        for (start, end) in model
            .iter()
            .map(|(&s, &e)| (s, e))
            .chain([(total, u32::MAX)])
        {
            if start - at >= pages + align - 1 {
                return (at + skew).next_multiple_of(align) - skew;
            }
            at = end;
        }
        u32::MAX
    }

    #[test]
    fn against_a_plain_map() {
        const TOTAL: u32 = 3000;
        let mut tree = AreaTree::new(TOTAL);
        let mut model = BTreeMap::new();
        let mut live = Vec::new();
        let mut seed = 1u64;
        let mut below = |n: u64| {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1);
            ((seed >> 33) % n) as u32
        };
        let rounds = if cfg!(miri) { 200 } else { 20_000 };
        for round in 0..rounds {
            let full = round / 500 % 2 == 0;
            if below(4) < if full { 3 } else { 1 } || live.is_empty() {
                let (pages, align) = (1 + below(12), 1 << below(4));
                let skew = below(align.into());
                let room = tree.find_room(pages, align, skew);
                let wanted = lowest(&model, pages, align, skew, TOTAL);
                assert_eq!(room.unwrap_or(u32::MAX), wanted);
                if let Some(start) = room {
                    let area = area(start, pages);
                    model.insert(start, start + pages);
                    // SAFETY: leaked until it is removed.
                    unsafe { tree.insert(area) };
                    live.push(area);
                }
            } else {
                let area = live.swap_remove(below(live.len() as u64) as usize);
                tree.remove(area);
                // SAFETY: leaked by `area`, and in no tree any more.
                let area = unsafe { Box::from_raw(area.as_ptr()) };
                model.remove(&area.start());
            }
            if round % 16 == 0 {
                assert_eq!(tree.check(), Ok(model.len()));
            }
            let page = below(TOTAL.into());
            let found = model.range(..=page).next_back().filter(|(_, e)| **e > page);
            assert_eq!(tree.find(page).map(VmArea::start), found.map(|(s, _)| *s));
            let next = tree.next(page).map(VmArea::start);
            assert_eq!(
                next,
                model.iter().find(|(_, e)| **e > page).map(|(s, _)| *s)
            );
        }
        for area in live {
            tree.remove(area);
            // SAFETY: as above.
            drop(unsafe { Box::from_raw(area.as_ptr()) });
        }
        assert_eq!((tree.check(), tree.largest_hole()), (Ok(0), TOTAL));
    }

    #[test]
    fn in_order_and_out_again() {
        let mut tree = AreaTree::new(10_000);
        let n = if cfg!(miri) { 64 } else { 1000 };
        let areas: Vec<_> = (0..n).map(|i| area(i * 3, 2)).collect();
        for &area in &areas {
            // SAFETY: leaked until the end.
            unsafe { tree.insert(area) };
        }
        assert_eq!(tree.check(), Ok(n as usize));
        assert!(usize::from(height(tree.root())) <= 2 * n.ilog2() as usize);
        assert_eq!(tree.find_room(1, 1, 0), Some(2));
        assert_eq!(tree.find_room(2, 1, 0), Some((n - 1) * 3 + 2));
        for area in areas {
            tree.remove(area);
            // SAFETY: leaked above, and in no tree any more.
            drop(unsafe { Box::from_raw(area.as_ptr()) });
            assert!(tree.check().is_ok());
        }
    }
}
