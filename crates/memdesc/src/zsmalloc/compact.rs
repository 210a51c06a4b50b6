//! Compaction: objects move from the emptiest zspage of a class to the fullest, until what is free is not worth a zspage any more.
//!
//! An object moves while nobody is at it, under the lock of its class, and its slot says so meanwhile: who wants it waits for that lock. What somebody is
//! at stays, and its zspage with it.
//!
//! Source: `__zs_compact`, `migrate_zspage`, `zs_shrinker_scan` of Linux 6.18. There the whole pool is locked against readers.

use super::ZsPool;
use super::class::{SizeClass, ZS_SIZE_CLASSES};
use super::pool::{ClassLists, PoolCore, class};
use super::zspage::Place;
use crate::address::{PAGE_SIZE, Pfn};
use crate::mm::Mm;
use crate::platform::Platform;
use crate::sync::atomic::Ordering;

/// Zspages of which nothing could be moved, before a class is left alone.
const PATIENCE: u32 = 8;

/// What became of one pair of zspages.
struct Round {
    moved: u64,
    /// The source, if it is empty now.
    emptied: Option<Pfn>,
}

impl<P: Platform> Mm<P> {
    /// Moves objects together and frees the pages that come free (`zs_compact`). Says how many pages. If somebody else is at it,
    /// none.
    ///
    /// # Context
    ///
    /// Any that may pin a CPU, but it may take long: a lock is held for no longer than the objects of one zspage take to be copied.
    pub fn zs_compact(&self, pool: &ZsPool<'_>) -> usize {
        self.compact_pool(self.pool(pool))
    }

    fn compact_pool(&self, pool: &PoolCore) -> usize {
        if pool.compacting.swap(1, Ordering::Acquire) != 0 {
            return 0;
        }
        let freed = (0..ZS_SIZE_CLASSES)
            .map(|index| self.compact_class(pool, index))
            .sum();
        pool.pages_compacted
            .fetch_add(freed as u64, Ordering::Relaxed);
        pool.compacting.store(0, Ordering::Release);
        freed
    }

    /// Compacts all pools, for memory that is short (`zs_shrinker_scan`). Allocates nothing, waits for nobody but the holders of classes.
    pub(crate) fn zs_shrink(&self) -> usize {
        let mut freed = 0;
        self.for_each_pool(|pool| freed += self.compact_pool(pool));
        freed
    }

    fn compact_class(&self, pool: &PoolCore, index: usize) -> usize {
        let class = class(index);
        if class.objects == 1 {
            return 0;
        }
        let (mut freed, mut idle) = (0, 0);
        while idle < PATIENCE {
            let mut lists = self.class_lock(pool, index);
            let Some(round) = self.compact_pair(&mut lists, class) else {
                break;
            };
            drop(lists);
            pool.objects_moved.fetch_add(round.moved, Ordering::Relaxed);
            idle = if round.moved == 0 { idle + 1 } else { 0 };
            if let Some(head) = round.emptied {
                self.free_zspage(head);
                freed += usize::from(class.pages);
            }
        }
        freed
    }

    /// Moves what can be moved of the emptiest zspage to the fullest; `None` if that would free nothing.
    fn compact_pair(&self, lists: &mut ClassLists, class: &SizeClass) -> Option<Round> {
        if lists.wasted(class) == 0 {
            return None;
        }
        let to = lists.fullest()?;
        self.zs_unlist(lists, to, class);
        let Some(from) = lists.emptiest() else {
            self.zs_list(lists, to, class, false);
            return None;
        };
        self.zs_unlist(lists, from, class);
        let moved = self.move_objects(from, to, class);
        self.zs_list(lists, to, class, false);
        // To the tail: if it has what cannot be moved, others come first.
        self.zs_list(lists, from, class, true);
        let empty = self.zsdesc(from).inuse() == 0;
        lists.zspages -= u64::from(empty);
        Some(Round {
            moved,
            emptied: empty.then_some(from),
        })
    }

    /// Moves objects until the one is empty or the other full (`migrate_zspage`). Both are in no list.
    fn move_objects(&self, from: Pfn, to: Pfn, class: &SizeClass) -> u64 {
        let (source, target) = (self.zsdesc(from), self.zsdesc(to));
        let mut at = Place {
            page: from,
            offset: 0,
        };
        let mut moved = 0;
        for index in 0..u32::from(class.objects) {
            if source.inuse() == 0 || target.inuse() == usize::from(class.objects) {
                break;
            }
            if let Some(owner) = self.zs_owner(source, at, class) {
                let slot = self.slot_at(owner);
                if slot.try_move() {
                    crate::inject::point("zsmalloc: moving");
                    let (new, place) = self.zs_pop(to, target, class, owner);
                    self.copy_object(at, new, class.capacity());
                    slot.moved(new.page, place);
                    self.zs_push(source, class, at, index);
                    moved += 1;
                }
            }
            at.offset += usize::from(class.size);
            if at.offset >= PAGE_SIZE && index + 1 < u32::from(class.objects) {
                at.offset -= PAGE_SIZE;
                at.page = self.zs_next(at.page);
            }
        }
        moved
    }

    /// Copies an object (`zs_object_copy`), of which both places may cross pages.
    fn copy_object(&self, from: Place, to: Place, len: usize) {
        let mut done = 0;
        while done < len {
            let (source, n) = self.zs_bytes(from, done, len - done);
            let (target, n) = self.zs_bytes(to, done, n);
            // SAFETY: two objects of one class, both long enough and within their pages; the one is ours by its slot, the other was free, and both
            // are under the lock of their class.
            unsafe { target.copy_from_nonoverlapping(source, n) };
            done += n;
        }
    }
}
