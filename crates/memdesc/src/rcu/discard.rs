//! Slabs of type-stable caches go back to the page allocator only after a grace period (`SLAB_TYPESAFE_BY_RCU`).
//!
//! A reader who found an object without a lock may look at it after it was freed, and finds an object of the same kind, perhaps
//! another one. That holds as long as the slab's page is what it was; so an empty slab waits here. The descriptors of
//! the memory manager itself are such objects: see [`Mm::folio_get`](crate::Mm::folio_get).
//!
//! Lock order: `waiting` is a leaf, and only ever tried.

use super::{Cookie, Rcu};
use crate::address::Pfn;
use crate::lockdep::classes;
use crate::memmap::MemMap;
use crate::mm::Mm;
use crate::platform::{Context, Holder, Platform};
use crate::slab::CacheCore;
use crate::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use crate::sync::{PfnStack, SpinLock};

/// So many empty slabs are worth a kick before the next tick.
const WORTH_IT: u32 = 16;

/// Empty slabs on their way out.
#[derive(Debug)]
pub(crate) struct Discards {
    fresh: PfnStack,
    nr_fresh: AtomicU32,
    /// Pages of descriptors' slabs in here, for the ledger.
    metadata: AtomicU64,
    waiting: SpinLock<Waiting>,
}

#[derive(Debug)]
struct Waiting {
    head: Pfn,
    cookie: Cookie,
}

impl Discards {
    pub(crate) fn new() -> Discards {
        Discards {
            fresh: PfnStack::new(),
            nr_fresh: AtomicU32::new(0),
            metadata: AtomicU64::new(0),
            waiting: SpinLock::new(Waiting {
                head: Pfn::NONE,
                cookie: Cookie::ENDED,
            }),
        }
    }

    /// Pages of descriptors' slabs in here.
    pub(crate) fn metadata_pages(&self) -> u64 {
        self.metadata.load(Ordering::Relaxed)
    }

    fn push(&self, map: &MemMap, pfn: Pfn) {
        let links = map.slab_at(map.word(pfn).load_owned().desc()).links();
        self.fresh.push(pfn, |next| links.set_next(next));
        self.nr_fresh.fetch_add(1, Ordering::Relaxed);
    }

    fn take(&self) -> Pfn {
        self.nr_fresh.store(0, Ordering::Relaxed);
        self.fresh.take()
    }
}

impl<P: Platform> Mm<P> {
    /// Gives back empty slabs of a cache that are in no list, a chain through their links: at once, or after a grace period.
    pub(crate) fn discard_from(&self, core: &CacheCore, mut chain: Pfn, nested: bool) {
        if !core.is_type_stable() || chain == Pfn::NONE {
            return self.discard(chain, nested);
        }
        let map = &self.pages.map;
        while chain != Pfn::NONE {
            let pfn = chain;
            let slab = crate::slab::slab_of(map, pfn);
            chain = slab.links().next();
            if core.is_metadata() {
                let pages = 1 << slab.order();
                self.discards.metadata.fetch_add(pages, Ordering::Relaxed);
            }
            self.discards.push(map, pfn);
        }
        // Not here: this may be a free path, pinned, and a grace period's barrier wants interrupts on.
        if self
            .discards
            .nr_fresh
            .load(Ordering::Relaxed)
            .is_multiple_of(WORTH_IT)
        {
            self.pages.platform.kick();
        }
    }

    /// Gives back the slabs whose grace period is over, and has one begin for those that came since. Does not wait. Says how many
    /// pages went back.
    pub(crate) fn discard_due(&self) -> usize {
        let rcu = self.pages.platform.rcu();
        let mut pages = 0;
        // Twice: what is begun here may be over at once.
        for _ in 0..2 {
            let holder = Holder::trying(&self.pages.platform, self.pages.rt, &classes::DISCARDS);
            let Some(mut waiting) = self.discards.waiting.try_lock(holder) else {
                return pages;
            };
            if waiting.head == Pfn::NONE && !self.discards.fresh.is_empty() {
                waiting.head = self.discards.take();
                waiting.cookie = rcu.start_poll();
            }
            if waiting.head == Pfn::NONE {
                return pages;
            }
            let cookie = waiting.cookie;
            drop(waiting);
            rcu.advance();
            if !rcu.poll_state(cookie) {
                return pages;
            }
            let holder = Holder::trying(&self.pages.platform, self.pages.rt, &classes::DISCARDS);
            let Some(mut waiting) = self.discards.waiting.try_lock(holder) else {
                return pages;
            };
            if waiting.cookie != cookie {
                continue;
            }
            let chain = core::mem::replace(&mut waiting.head, Pfn::NONE);
            drop(waiting);
            pages += self.discard_chain(chain);
        }
        pages
    }

    fn discard_chain(&self, chain: Pfn) -> usize {
        let map = &self.pages.map;
        let (mut at, mut pages, mut metadata) = (chain, 0, 0);
        while at != Pfn::NONE {
            let slab = crate::slab::slab_of(map, at);
            let n = 1 << slab.order();
            pages += n;
            // SAFETY: a cache waits for its slabs in here before it goes.
            if unsafe { slab.cache().as_ref() }.is_metadata() {
                metadata += n as u64;
            }
            at = slab.links().next();
        }
        self.discard(chain, false);
        self.discards
            .metadata
            .fetch_sub(metadata, Ordering::Relaxed);
        pages
    }

    /// Gives back all slabs that wait; says how many pages that were. Waits for grace periods if the caller may.
    pub(crate) fn discard_all(&self) -> usize {
        let mut pages = 0;
        let mut round = 0;
        loop {
            let done = self.discard_due();
            pages += done;
            let left = !self.discards.fresh.is_empty() || {
                let holder = Holder::new(&self.pages.platform, self.pages.rt, &classes::DISCARDS);
                self.discards.waiting.lock(holder).head != Pfn::NONE
            };
            if !left || !self.may_wait() {
                return pages;
            }
            self.pages.platform.rcu().synchronize_expedited();
            self.pages.platform.relax(round);
            round += 1;
        }
    }

    /// May the caller sleep, and would not wait for himself?
    pub(crate) fn may_wait(&self) -> bool {
        let platform = &self.pages.platform;
        platform.context() == Context::Task && !platform.rcu().reading()
    }
}
