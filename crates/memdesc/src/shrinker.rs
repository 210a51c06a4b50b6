//! Shrinkers: caches above the memory manager that can let objects go when memory is short.
//!
//! Source: `register_shrinker`, `do_shrink_slab` of Linux. A shrinker says how much it could free, and is asked for a
//! share that grows with each failed attempt.

use crate::config::MAX_SHRINKERS;
use crate::lockdep::classes;
use crate::mm::Mm;
use crate::platform::{Holder, Platform, ReclaimRequest};
use crate::sync::SpinGuard;

/// Something that can free memory on request.
pub trait Shrinker: Sync {
    /// About how many objects could be freed now; 0 to be left alone.
    fn count_objects(&self) -> usize;

    /// Frees up to `nr` objects; says how many it freed. Called where the allocation that needs memory may sleep; may
    /// free, must not allocate with `__GFP_DIRECT_RECLAIM`.
    fn scan_objects(&self, nr: usize, request: &ReclaimRequest) -> usize;
}

/// The registered shrinkers.
pub(crate) type Shrinkers = [Option<&'static dyn Shrinker>; MAX_SHRINKERS];

impl<P: Platform> Mm<P> {
    fn shrinkers(&self) -> SpinGuard<'_, Shrinkers, Holder<'_, P>> {
        self.shrinkers.lock(Holder::new(
            &self.pages.platform,
            self.pages.rt,
            &classes::SHRINKERS,
        ))
    }

    /// Adds a shrinker; `false` if there are [`MAX_SHRINKERS`] already.
    pub fn register_shrinker(&self, shrinker: &'static dyn Shrinker) -> bool {
        let mut table = self.shrinkers();
        match table.iter_mut().find(|s| s.is_none()) {
            Some(slot) => {
                *slot = Some(shrinker);
                true
            }
            None => false,
        }
    }

    /// Removes a shrinker; `false` if it was not there. A call to it may still be under way.
    pub fn unregister_shrinker(&self, shrinker: &'static dyn Shrinker) -> bool {
        let mut table = self.shrinkers();
        let is_it =
            |s: &Option<&'static dyn Shrinker>| s.is_some_and(|s| core::ptr::addr_eq(s, shrinker));
        match table.iter_mut().find(|s| is_it(s)) {
            Some(slot) => {
                *slot = None;
                true
            }
            None => false,
        }
    }

    /// Asks every shrinker for a share of what it has (`shrink_slab`): an eighth at first, all of it at the third retry.
    pub(crate) fn shrink_slab(&self, request: &ReclaimRequest) -> usize {
        let table = *self.shrinkers();
        let mut freed = 0;
        for shrinker in table.into_iter().flatten() {
            let count = shrinker.count_objects();
            if count > 0 {
                let share = (count >> 3u32.saturating_sub(request.attempt)).max(1);
                freed += shrinker.scan_objects(share, request);
            }
        }
        freed += self.zs_shrink();
        freed += self.kvfree_shrink() + self.prepaid_tick();
        freed += self.rcu_pages_due() + self.vmalloc_shrink(false);
        // Objects that went left slabs empty, perhaps; those are pages.
        if request.attempt > 0 || freed > 0 {
            self.for_each_cache(|core| freed += self.cache_shrink(core));
            freed += self.discard_due();
        }
        freed
    }
}
