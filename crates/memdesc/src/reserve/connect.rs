//! Nodes under nodes: connected, taken apart, resized, and their limits. All of it under the mutex of the tree.
//!
//! Either all of a change happens or nothing: what has to be had is had first, and what cannot be is seen before anything is taken back.

use super::node::{Node, ORDERS};
use super::tree::MAX_DEPTH;
use crate::error::AllocError;
use crate::mm::Mm;
use crate::platform::Platform;
use crate::sync::atomic::Ordering;

impl<P: Platform> Mm<P> {
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
