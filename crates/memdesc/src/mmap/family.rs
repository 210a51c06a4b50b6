//! A family: the address spaces that were forked from each other, and may have each other's anonymous pages.
//!
//! A folio leads to its family by number and keeps it from nothing: the last member may go while somebody follows. So a family is
//! freed after a grace period, and who follows takes a reference unless there is none left.

use core::ptr::NonNull;

use super::space::SpaceCore;
use crate::error::AllocError;
use crate::gfp::Flags;
use crate::lockdep::classes;
use crate::mm::Mm;
use crate::platform::{Holder, Platform};
use crate::rcu::RcuHead;
use crate::sync::atomic::{AtomicU32, Ordering};
use crate::sync::{SpinGuard, SpinLock};

/// A family.
#[repr(C, align(16))]
pub(crate) struct Family {
    rcu: RcuHead,
    /// Members, and those who follow a folio here.
    refs: AtomicU32,
    members: SpinLock<Members>,
}

/// The first member.
pub(crate) struct Members(pub(super) *mut SpaceCore);

// SAFETY: members are reached under the list's lock, and leave before they go.
unsafe impl Send for Members {}

impl Members {
    /// All members.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &SpaceCore> {
        let mut at = self.0;
        core::iter::from_fn(move || {
            // SAFETY: members leave, under the lock that the caller has, before they go.
            let space = unsafe { at.as_ref() }?;
            at = space.family_next.load(Ordering::Relaxed);
            Some(space)
        })
    }
}

/// A reference to a family.
pub(crate) struct FamilyRef<'m, P: Platform> {
    mm: &'m Mm<P>,
    family: NonNull<Family>,
}

impl<P: Platform> core::ops::Deref for FamilyRef<'_, P> {
    type Target = Family;
    fn deref(&self) -> &Family {
        // SAFETY: our reference keeps it.
        unsafe { self.family.as_ref() }
    }
}

impl<P: Platform> Drop for FamilyRef<'_, P> {
    fn drop(&mut self) {
        self.mm.family_put(self.family);
    }
}

impl<P: Platform> Mm<P> {
    /// A family without members, and a reference to it.
    pub(super) fn family_new(&self, gfp: Flags) -> Result<NonNull<Family>, AllocError> {
        let object = self.kmalloc(size_of::<Family>().next_power_of_two(), gfp)?;
        let family = object.cast::<Family>();
        // SAFETY: an object that large, aligned to its size, ours.
        unsafe {
            family.write(Family {
                rcu: RcuHead::new(),
                refs: AtomicU32::new(1),
                members: SpinLock::new(Members(core::ptr::null_mut())),
            });
        }
        Ok(family)
    }

    /// The number of a family for a folio's `mapping`.
    pub(super) fn family_handle(&self, family: NonNull<Family>) -> u64 {
        self.pages.phys(family.as_ptr().cast()).0 >> 4
    }

    /// The family that a folio leads to, if it has members still. In a read section in which somebody mapped the folio: nothing else keeps the
    /// family's memory.
    pub(super) fn family_get(&self, handle: u64) -> Option<FamilyRef<'_, P>> {
        let at = crate::address::PhysAddr(handle << 4);
        let family = NonNull::new(self.pages.map.virt(at).cast::<Family>())?;
        // SAFETY: a folio that is mapped led here in the caller's read section, so the family's memory is still one.
        let refs = unsafe { &family.as_ref().refs };
        let mut now = refs.load(Ordering::Relaxed);
        while now != 0 {
            match refs.compare_exchange_weak(now, now + 1, Ordering::Acquire, Ordering::Relaxed) {
                Ok(_) => return Some(FamilyRef { mm: self, family }),
                Err(seen) => now = seen,
            }
        }
        None
    }

    pub(super) fn family_put(&self, family: NonNull<Family>) {
        // SAFETY: the caller's reference.
        let core = unsafe { family.as_ref() };
        if core.refs.fetch_sub(1, Ordering::AcqRel) == 1 {
            // SAFETY: nobody gets a reference any more; those who try are in read sections.
            unsafe { self.kvfree_rcu(family.cast(), NonNull::from(&core.rcu)) };
        }
    }

    /// The list of members, locked. May sleep.
    pub(super) fn family_members<'a>(
        &'a self,
        family: &'a Family,
    ) -> SpinGuard<'a, Members, Holder<'a, P>> {
        let holder = Holder::new(&self.pages.platform, true, &classes::ANON_VMA);
        family.members.lock(holder)
    }

    /// Enters an address space, with a reference.
    pub(super) fn family_join(&self, family: NonNull<Family>, space: &SpaceCore) {
        // SAFETY: the caller has a reference, or is a member.
        let core = unsafe { family.as_ref() };
        core.refs.fetch_add(1, Ordering::Relaxed);
        let mut members = self.family_members(core);
        space.family_next.store(members.0, Ordering::Relaxed);
        members.0 = (&raw const *space).cast_mut();
    }

    /// Takes an address space out, and its reference.
    pub(super) fn family_leave(&self, space: &SpaceCore) {
        // SAFETY: a member has a reference.
        let core = unsafe { space.family.as_ref() };
        {
            let mut members = self.family_members(core);
            let this = (&raw const *space).cast_mut();
            let next = space.family_next.load(Ordering::Relaxed);
            if members.0 == this {
                members.0 = next;
            } else if let Some(before) = members
                .iter()
                .find(|m| m.family_next.load(Ordering::Relaxed) == this)
            {
                before.family_next.store(next, Ordering::Relaxed);
            }
        }
        self.family_put(space.family);
    }
}
