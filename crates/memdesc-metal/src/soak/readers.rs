//! Nodes that readers find under RCU, in threads and in NMIs, while others are put in their places: what is freed later holds what it held as long as a reader
//! may have it.

use core::ptr::{NonNull, null_mut};
use core::sync::atomic::{AtomicPtr, AtomicU64, Ordering};

use memdesc::gfp::{__GFP_NOWARN, Flags, GFP_KERNEL};
use memdesc::rcu::{Rcu, RcuHead};
use memdesc::{AllocError, Context, Mm, Platform};

use super::things::SCRIBBLE;
use super::{Count, NODES, Soak, Worker};
use crate::platform::Metal;
use crate::wrong;

/// Few, so that what is read is what is replaced.
const PLACES: usize = 4;
/// Objects that are had and freed again right after one was replaced: if it had been freed, it would be one of them.
const CHURN: usize = 6;

/// What readers find.
#[repr(C)]
pub(super) struct Node {
    head: RcuHead,
    stamp: AtomicU64,
    check: AtomicU64,
}

/// Where they look.
pub(super) struct Nodes([AtomicPtr<Node>; PLACES]);

impl Nodes {
    pub(super) const fn new() -> Nodes {
        Nodes([const { AtomicPtr::new(null_mut()) }; PLACES])
    }

    /// A look at one of them; what is wrong with it. Any context.
    pub(super) fn look(&self, mm: &Mm<Metal>, which: usize, turns: usize) -> Option<(u64, u64)> {
        let _read = mm.rcu_read_lock();
        let node = self.0[which % PLACES].load(Ordering::Acquire);
        // SAFETY: found in a read section, so not freed before its end.
        let node = unsafe { node.as_ref() }?;
        let stamp = node.stamp.load(Ordering::Relaxed);
        // It is written before it is found, and never again.
        (0..turns).find_map(|_| {
            core::hint::spin_loop();
            let seen = (
                node.stamp.load(Ordering::Relaxed),
                node.check.load(Ordering::Relaxed),
            );
            (seen != (stamp, !stamp)).then_some(seen)
        })
    }

    /// Puts another in its place; what was there is freed when nobody reads it any more. Any context.
    pub(super) fn replace(
        &self,
        mm: &Mm<Metal>,
        which: usize,
        stamp: u64,
    ) -> Result<(), AllocError> {
        let size = size_of::<Node>();
        let node = if Metal.context() == Context::Nmi {
            mm.kmalloc_nolock(size, Flags::EMPTY)?
        } else {
            mm.kmalloc(size, GFP_KERNEL | __GFP_NOWARN)?
        };
        let node = node.cast::<Node>();
        // SAFETY: ours, that large, and aligned.
        unsafe {
            node.write(Node {
                head: RcuHead::new(),
                stamp: AtomicU64::new(stamp),
                check: AtomicU64::new(!stamp),
            });
        }
        let old = self.0[which % PLACES].swap(node.as_ptr(), Ordering::AcqRel);
        if let Some(old) = NonNull::new(old) {
            // SAFETY: nobody finds it any more, and its head is used for nothing else.
            unsafe { mm.kvfree_rcu(old.cast(), NonNull::from(&old.as_ref().head)) };
        }
        Ok(())
    }
}

/// Fills all places.
pub(super) fn set_up(soak: &Soak) -> Result<(), AllocError> {
    (0..PLACES).try_for_each(|which| NODES.replace(soak.mm, which, which as u64))
}

/// Empties them. Nobody reads any more.
pub(super) fn end(soak: &Soak) {
    for place in &NODES.0 {
        if let Some(node) = NonNull::new(place.swap(null_mut(), Ordering::AcqRel)) {
            // SAFETY: nobody else has it.
            unsafe { soak.mm.kfree(node.cast()) };
        }
    }
}

/// Writes over all objects of that size that come to hand.
fn churn(soak: &Soak) {
    let size = size_of::<Node>();
    let had = [(); CHURN].map(|()| {
        soak.mm
            .kmalloc(size, GFP_KERNEL | __GFP_NOWARN)
            .inspect(|object| {
                // SAFETY: ours, and that large.
                unsafe { object.write_bytes(SCRIBBLE, size) };
            })
    });
    for object in had.into_iter().flatten() {
        // SAFETY: ours, and freed once.
        unsafe { soak.mm.kfree(object) };
    }
}

impl Worker {
    pub(super) fn readers(&mut self, soak: &Soak) {
        let which = self.dice.below(PLACES);
        match self.dice.below(64) {
            0 => soak.mm.rcu().synchronize(),
            1..=39 => {
                let stamp = self.stamp();
                match NODES.replace(soak.mm, which, stamp) {
                    Ok(()) => {
                        soak.count(Count::Replaced);
                        churn(soak);
                    }
                    Err(_) => soak.count(Count::Refused),
                }
            }
            _ => {
                soak.count(Count::Looked);
                // Some look for a while: others replace it meanwhile.
                let turns = if self.one_in(4) { 40 } else { 4000 };
                if let Some((stamp, check)) = NODES.look(soak.mm, which, turns) {
                    wrong!(
                        soak,
                        "a node was written while it was read: {stamp:#x}, {check:#x}"
                    );
                }
            }
        }
    }
}
