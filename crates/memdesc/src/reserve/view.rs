//! The listing of reserves.

use core::fmt;

use super::node::{Node, Shape};
use crate::mm::Mm;
use crate::name::NAME_LEN;
use crate::platform::Platform;
use crate::sync::atomic::Ordering;

/// A reserve in the listing.
#[derive(Clone, Copy)]
pub struct ReserveView {
    name: [u8; NAME_LEN],
    name_len: u8,
    /// Its number, for [`Platform::current_reserve`].
    pub id: u16,
    /// Levels below the root.
    pub depth: usize,
    /// Things are set aside for it.
    pub connected: bool,
    /// What it guarantees by itself: `objects`, `kmalloc`, `pages`, or nothing.
    pub kind: &'static str,
    /// Pages that it needs by itself: its bound, or what was set instead.
    pub own_pages: u64,
    /// With all below it.
    pub pages: u64,
    /// Pages that it has, taken ones included; with all below it.
    pub held_pages: u64,
    /// Of its own: pages that are not idle now.
    pub taken_pages: u64,
    /// The most that ever were.
    pub max_taken_pages: u64,
    /// What may be charged to it and all below it, in bytes.
    pub limit: u64,
    /// What is charged.
    pub usage: u64,
    /// The most that ever was.
    pub max_usage: u64,
    /// Times that a request slept for an uncharge.
    pub waits: u64,
    /// Times that a charge was refused here.
    pub refusals: u64,
}

impl ReserveView {
    /// Its name, as far as it is kept.
    pub fn name(&self) -> &str {
        core::str::from_utf8(&self.name[..usize::from(self.name_len)]).unwrap_or("?")
    }
}

impl fmt::Debug for ReserveView {
    /// A line: the name, indented by its level, pages needed, held and taken, the most ever taken; then limit, usage and the most ever, in bytes; waits and refusals.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let indent = 2 * self.depth;
        write!(f, "{:indent$}{} {}: ", "", self.name(), self.kind)?;
        write!(
            f,
            "pages {} held {} taken {} most {}; bytes {} of {} most {}; waits {} refusals {}{}",
            self.pages,
            self.held_pages,
            self.taken_pages,
            self.max_taken_pages,
            self.usage,
            self.limit,
            self.max_usage,
            self.waits,
            self.refusals,
            if self.connected { "" } else { " (detached)" }
        )
    }
}

impl<P: Platform> Mm<P> {
    /// Visits the reserves, each before those below it, the root first; those that are detached at the end (`/proc/reserve_info`).
    ///
    /// # Context
    ///
    /// May sleep; `visit` may not change the tree.
    pub fn reserve_info(&self, mut visit: impl FnMut(ReserveView)) {
        let _making = self.reserve_mutex();
        let tops = self.pages.reserves.nodes().filter(|n| n.parent() == 0);
        for top in tops {
            self.visit_reserve(top, 0, &mut visit);
        }
    }

    fn visit_reserve(&self, node: &Node, depth: usize, visit: &mut impl FnMut(ReserveView)) {
        visit(self.view_of(node, depth));
        for child in self.pages.reserves.children(node) {
            self.visit_reserve(child, depth + 1, visit);
        }
    }

    pub(super) fn view_of(&self, node: &Node, depth: usize) -> ReserveView {
        let reserves = &self.pages.reserves;
        let own_pages = |node: &Node| {
            if node.is_sizing() {
                return 0;
            }
            let bound = self.own_bound(node, node.amount()).ok();
            let blocks = bound.and_then(|bound| self.blocks_of(node, &bound).ok());
            let each = blocks.into_iter().flatten().enumerate();
            each.map(|(order, n)| u64::from(n) << order).sum::<u64>()
        };
        let held = |node: &Node| {
            let each = node.stocks.iter().enumerate();
            each.map(|(order, s)| u64::from(s.owned.load(Ordering::Relaxed)) << order)
                .sum::<u64>()
        };
        let below = || reserves.nodes().filter(|n| reserves.is_within(n, node));
        let all = &node.all.counter;
        let mut name = [0; NAME_LEN];
        let name_len = node.name.get(&mut name).len() as u8;
        ReserveView {
            name,
            name_len,
            id: node.id(),
            depth,
            connected: node.is_connected(),
            kind: match node.shape() {
                Shape::None => "",
                Shape::Objects(_) => "objects",
                Shape::KmallocObjects { .. } | Shape::Kmalloc { .. } => "kmalloc",
                Shape::Pages { .. } => "pages",
            },
            own_pages: own_pages(node),
            pages: below().map(own_pages).sum(),
            held_pages: below().map(held).sum(),
            taken_pages: node.taken.load(Ordering::Relaxed),
            max_taken_pages: node.max_taken.load(Ordering::Relaxed),
            limit: all.limit(),
            usage: all.usage(),
            max_usage: all.watermark(),
            waits: node.waits.load(Ordering::Relaxed),
            refusals: all.failcnt() + node.own.counter.failcnt(),
        }
    }
}
