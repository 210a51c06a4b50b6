//! The way of a request: who is entitled to what, charging, waiting for it, and taking.
//!
//! Ordinary memory first, then a charge to the reserve and to every level above it, then the store. Lock order: as in [`store`](super::store).

use core::panic::Location;
use core::ptr::NonNull;

use super::node::{Node, Serve, Shape};
use crate::address::Pfn;
use crate::desc::Slab;
use crate::error::AllocError;
use crate::gfp::{self, Flags};
use crate::memmap::{PageType, Word};
use crate::mm::Mm;
use crate::platform::{Platform, might_sleep};
use crate::report::{Corruption, Report};
use crate::slab::CacheCore;
use crate::slab::kmalloc::Kind;
use crate::slab::object::Caller;
use crate::sync::atomic::Ordering;

/// What says where the memory has to be, or that it is told apart when it is freed: what was set aside is not that. And what may take no lock.
pub(super) const ELSEWHERE: Flags = Flags::from_bits(
    gfp::__GFP_DMA.bits()
        | gfp::__GFP_DMA32.bits()
        | gfp::__GFP_RCU_PREPAID.bits()
        | gfp::__GFP_FAST_TRY.bits(),
);

/// May a request at its limit wait for an uncharge?
pub(super) fn may_wait(gfp: Flags) -> bool {
    gfp.allow_blocking() && !gfp.contains(gfp::__GFP_NORETRY)
}

/// For the attempt at ordinary memory: it neither reclaims nor takes from where it is not yet meant to.
pub(super) fn ordinary(gfp: Flags) -> Flags {
    (gfp & !(gfp::__GFP_DIRECT_RECLAIM | gfp::__GFP_NOFAIL | gfp::__GFP_MEMALLOC))
        | gfp::__GFP_NOMEMALLOC
        | gfp::__GFP_NOWARN
}

impl<P: Platform> Mm<P> {
    /// The reserve that a request is entitled to.
    #[cold]
    fn entitled(&self, gfp: Flags) -> Option<&Node> {
        let reserves = &self.pages.reserves;
        // Who only tries takes no lock either.
        if !reserves.in_use() || gfp.intersects(gfp::__GFP_NOMEMALLOC | gfp::__GFP_FAST_TRY) {
            return None;
        }
        let task = self.platform().current_reserve();
        let id = match task {
            0 if gfp.contains(gfp::__GFP_MEMALLOC) => reserves.memalloc.load(Ordering::Relaxed),
            id => id,
        };
        let node = reserves.get(id).filter(|node| node.is_alive())?;
        // Requests through a sizing reserve are the parent's.
        if node.is_sizing() {
            return reserves.get(node.parent());
        }
        Some(node)
    }

    /// Does the task have a reserve, so that it must not reclaim (`PF_MEMALLOC`)?
    #[cold]
    pub(crate) fn is_entitled(&self, gfp: Flags) -> bool {
        // Whatever the flags say: what reclaims and waits for itself never ends.
        let task = self.pages.reserves.in_use() && self.platform().current_reserve() != 0;
        task || self.entitled(gfp).is_some()
    }

    /// What ordinary memory did not serve, from the reserve that the request is entitled to, or from one below it that is for such.
    fn serve_entitled<T>(
        &self,
        gfp: Flags,
        why: AllocError,
        charge_of: impl Fn(&Node) -> Option<u64>,
        take: impl Fn(&Node) -> Option<T>,
    ) -> Result<T, AllocError> {
        if gfp.intersects(ELSEWHERE) {
            return Err(why);
        }
        let Some(top) = self.entitled(gfp) else {
            return Err(why);
        };
        let reserves = &self.pages.reserves;
        let serving = || {
            let within = reserves.nodes().filter(|n| reserves.is_within(n, top));
            within.filter_map(|n| charge_of(n).filter(|_| !n.is_sizing()).map(|c| (n, c)))
        };
        let mut refused = why;
        loop {
            for (node, charge) in serving() {
                match self.take_charged(node, charge, gfp::GFP_NOWAIT, || None, || take(node)) {
                    Ok(got) => return Ok(got),
                    Err(why) => refused = why,
                }
            }
            // For whichever of them has room first.
            let waits = |&(node, charge): &(&Node, u64)| {
                reserves.is_online(node) && !reserves.never(node, charge)
            };
            if !may_wait(gfp) || !serving().any(|each| waits(&each)) {
                return Err(refused);
            }
            let again = || {
                let charged =
                    serving().find(|&(node, charge)| self.charge_reserve(node, charge).is_ok());
                // None of them waits any more: its place in the tree has changed.
                charged
                    .map(Some)
                    .or_else(|| (!serving().any(|each| waits(&each))).then_some(None))
            };
            top.waits.fetch_add(1, Ordering::Relaxed);
            match self.wait_for_uncharge(again) {
                Some(Some((node, charge))) => {
                    if let Some(got) = take(node) {
                        return Ok(got);
                    }
                    self.reserve_uncharge(node, charge, (Pfn::NONE, Word::ZERO));
                    return Err(AllocError::NoBlock);
                }
                Some(None) => return Err(refused),
                None => {}
            }
        }
    }

    /// Sleeps once for an uncharge, unless `again` finds that it need not.
    fn wait_for_uncharge<T>(&self, again: impl FnOnce() -> Option<T>) -> Option<T> {
        let platform = self.platform();
        might_sleep(platform, "waiting for a reserve");
        let waiters = &self.pages.reserves.waiters;
        let got = waiters.wait_once(again, |turn, value| {
            platform.park(turn, value);
            platform.relax(0);
        });
        if got.is_none() {
            self.free_all_deferred();
        }
        got
    }

    /// An object of a cache that ordinary memory did not serve.
    #[cold]
    #[inline(never)]
    pub(crate) fn entitled_object(
        &self,
        core: &CacheCore,
        gfp: Flags,
        why: AllocError,
    ) -> Result<NonNull<u8>, AllocError> {
        self.serve_entitled(
            gfp,
            why,
            |node| match node.shape() {
                Shape::Objects(_) => node.charge_of_object(core),
                // By size: a larger class may serve it.
                _ => None,
            },
            |node| self.take_reserve_object(node, core),
        )
    }

    /// Kmalloc's memory that it did not get otherwise, whatever kind was asked for: there nobody is charged, and nothing is kept apart.
    #[cold]
    #[inline(never)]
    pub(crate) fn entitled_kmalloc(
        &self,
        size: usize,
        gfp: Flags,
        why: AllocError,
        caller: Caller,
    ) -> Result<NonNull<u8>, AllocError> {
        self.serve_entitled(
            gfp,
            why,
            |node| node.serve(size).map(|(_, charge)| charge),
            |node| self.take_kmalloc(node, node.serve(size)?.0, size, gfp, caller),
        )
    }

    /// Memory of kmalloc for what has been charged.
    pub(super) fn take_kmalloc(
        &self,
        node: &Node,
        serve: Serve,
        size: usize,
        gfp: Flags,
        caller: Caller,
    ) -> Option<NonNull<u8>> {
        match serve {
            Serve::Class(class) => {
                let core = self.kmalloc_cache(Kind::Normal, class);
                let object = self.take_reserve_object(node, core)?;
                self.finish_kmalloc(core, object, size, gfp, caller);
                Some(object)
            }
            Serve::Large(order) => {
                let pfn = self.take_pages(node, order, PageType::LargeKmalloc, gfp)?;
                NonNull::new(self.page_address(pfn))
            }
        }
    }

    /// Pages that ordinary memory did not serve.
    #[cold]
    #[inline(never)]
    #[track_caller]
    pub(crate) fn entitled_pages(
        &self,
        gfp: Flags,
        order: usize,
        why: AllocError,
    ) -> Result<Pfn, AllocError> {
        self.serve_entitled(
            gfp,
            why,
            |node| match node.shape() {
                Shape::Pages { .. } => node.charge_of_pages(order),
                _ => None,
            },
            |node| self.take_pages(node, order, PageType::Bare, gfp),
        )
    }

    /// Charges, waiting for it if the flags allow that, and takes. `ordinary` is tried again after each wait.
    pub(super) fn take_charged<T>(
        &self,
        node: &Node,
        charge: u64,
        gfp: Flags,
        ordinary: impl Fn() -> Option<T>,
        take: impl Fn() -> Option<T>,
    ) -> Result<T, AllocError> {
        let reserves = &self.pages.reserves;
        let mut flushed = false;
        loop {
            let mut charged = self.charge_reserve(node, charge);
            if charged == Err(AllocError::ReserveLimit) {
                if !flushed {
                    // What was freed where it could not be finished is free.
                    flushed = true;
                    if self.free_all_deferred() > 0 {
                        continue;
                    }
                }
                if !may_wait(gfp) || reserves.never(node, charge) {
                    return Err(AllocError::ReserveLimit);
                }
                node.waits.fetch_add(1, Ordering::Relaxed);
                let again = || {
                    let charged = self.charge_reserve(node, charge);
                    (charged != Err(AllocError::ReserveLimit)).then_some(charged)
                };
                match self.wait_for_uncharge(again) {
                    Some(second) => charged = second,
                    None => {
                        if let Some(got) = ordinary() {
                            return Ok(got);
                        }
                        continue;
                    }
                }
            }
            charged?;
            return match take() {
                Some(got) => Ok(got),
                None => {
                    // A page of it failed, or it was given fewer than its bound.
                    self.reserve_uncharge(node, charge, (Pfn::NONE, Word::ZERO));
                    Err(AllocError::NoBlock)
                }
            };
        }
    }

    /// Charges. One at a time: a charge that a level further up refuses stands in nobody's way meanwhile.
    pub(super) fn charge_reserve(&self, node: &Node, bytes: u64) -> Result<(), AllocError> {
        let _held = self.lock_stores();
        self.pages.reserves.charge(node, bytes)
    }

    /// Takes a charge back, and wakes who waits for that.
    ///
    /// # Context
    ///
    /// Any.
    #[track_caller]
    pub(crate) fn reserve_uncharge(&self, node: &Node, bytes: u64, of: (Pfn, Word)) {
        if self.pages.reserves.uncharge(node, bytes).is_err() {
            let (pfn, word) = of;
            let address = pfn.phys().0 as usize;
            let report = self.report_at(Corruption::Uncharged, pfn, address, Location::caller());
            self.pages.platform.corruption(&Report { word, ..report });
        }
        self.wake_waiting();
    }

    /// Whoever waits for an uncharge looks again.
    pub(super) fn wake_waiting(&self) {
        let platform = self.platform();
        let waiters = &self.pages.reserves.waiters;
        waiters.wake(|turn| platform.unpark_all(turn));
    }

    /// `n` objects of a slab from a reserve are free again: what was charged for them is not any more. The bits say free already; the list lock may be held.
    pub(crate) fn reserve_objects_back(&self, core: &CacheCore, slab: &Slab, n: usize) {
        let (node, pfn) = (self.pages.reserves.get(slab.reserve()), slab.pfn());
        if let Some(node) = node
            && let Some(charge) = node.charge_of_object(core)
        {
            self.reserve_uncharge(node, charge * n as u64, (pfn, Word::ZERO));
        }
    }

    /// Is an object of a cache that has slabs from reserves in one of those?
    #[cold]
    pub(crate) fn object_is_reserve(&self, core: &CacheCore, object: *const u8) -> bool {
        !core.is_metadata()
            && self
                .locate(core, object)
                .is_ok_and(|(slab, _)| slab.reserve() != 0)
    }
}
