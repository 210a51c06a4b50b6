//! *Prepaid* objects: who allocates one has paid for its deferred free, so that the free needs no head in the object, allocates
//! nothing, never waits and cannot fail, from any context. Linux has nothing like it: there a head-less free may have to sleep.
//!
//! A slab of such a cache has two bits for each object beside the one that says "free": *pending*, freed and waiting for a
//! grace period to be asked for, and *waiting*, for one that runs. A free sets a bit; the first in a slab since the last
//! harvest also puts the slab on its CPU's stack. A harvest moves all pending bits of the stacked slabs to waiting ones; when the
//! grace period is over, a slab's waiting objects become free by as many `or`s as it has words. No pointer is ever stored.
//!
//! What it costs: 2 bits an object and 16 bytes a slab. For objects of 64 bytes that is 0.5 bytes each; the price of a
//! [`RcuHead`](super::RcuHead) is 16.
//!
//! A slab that is stacked or waits is not given back, also if all its objects are free by then: the free that stacked it is in a
//! read section from before its bit until after the stack, so once the grace period of that bit is over, what the slab's `state`
//! says about the stack is the truth.
//!
//! Lock order: none but the cache's list lock, one at a time. A CPU's `harvest` is only ever tried.

use core::panic::Location;
use core::ptr::NonNull;

use super::{Cookie, Rcu};
use crate::address::Pfn;
use crate::desc::Slab;
use crate::lockdep::classes;
use crate::mm::Mm;
use crate::platform::{Holder, Pin, Platform};
use crate::report::Corruption;
use crate::slab::kmalloc::Where;
use crate::slab::{CacheCore, CacheFlags, slab_of};
use crate::stats::Event;
use crate::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use crate::sync::{PfnStack, SpinLock};

/// So many slabs on a CPU's stack are worth a grace period.
const WORTH_IT: u32 = 32;

/// At the start of a slab of a prepaid cache, behind the bitmap of free objects if that is there: this, the pending bits, the
/// waiting bits.
#[repr(C)]
struct Header {
    /// The next slab on the stack.
    next: AtomicU32,
    /// The next of the harvest; a slab that is harvested may be stacked again already.
    next_harvested: AtomicU32,
    /// On a CPU's stack: 1.
    stacked: AtomicU32,
    /// In a harvest: 1. Its waiting bits are in use.
    harvested: AtomicU32,
}

/// Bytes for all that in a slab of so many objects.
pub(crate) const fn bytes(objects: usize) -> usize {
    size_of::<Header>() + 2 * words(objects) * 8
}

/// Is what lies here in no list?
pub(crate) fn is_idle(side: *mut u8) -> bool {
    // SAFETY: callers pass what a slot of the guarded pool has in the place of a slab's: `bytes(1)`, aligned to 8, never given to anyone else, and
    // any bytes are a header.
    let header = unsafe { &*side.cast::<Header>() };
    header.stacked.load(Ordering::Acquire) == 0 && header.harvested.load(Ordering::Acquire) == 0
}

const fn words(objects: usize) -> usize {
    objects.div_ceil(64)
}

/// The objects whose bits are set. Each word is looked at once, when its turn comes, by `read`: who hands an object on takes its bit away before.
fn set_bits(words: &[AtomicU64], read: fn(&AtomicU64) -> u64) -> impl Iterator<Item = usize> {
    words.iter().enumerate().flat_map(move |(i, word)| {
        let mut bits = read(word);
        core::iter::from_fn(move || {
            let bit = (bits != 0).then(|| bits.trailing_zeros() as usize)?;
            bits &= bits - 1;
            Some(i * 64 + bit)
        })
    })
}

/// The prepaid frees of one CPU.
#[derive(Debug)]
#[repr(C, align(64))]
pub(crate) struct Prepaid {
    /// Slabs with pending bits: a stack that any context pushes on, only ever taken as a whole.
    stack: PfnStack,
    nr_stacked: AtomicU32,
    /// Large memory: the same, linked through its buddies, which are idle while the memory is handed out.
    large: PfnStack,
    harvest: SpinLock<Harvest>,
}

#[derive(Debug)]
struct Harvest {
    /// Slabs.
    head: Pfn,
    /// Large memory, linked through its buddies.
    large: Pfn,
    cookie: Cookie,
}

impl Prepaid {
    pub(crate) fn new() -> Prepaid {
        Prepaid {
            stack: PfnStack::new(),
            nr_stacked: AtomicU32::new(0),
            large: PfnStack::new(),
            harvest: SpinLock::new(Harvest {
                head: Pfn::NONE,
                large: Pfn::NONE,
                cookie: Cookie::ENDED,
            }),
        }
    }

    fn push(&self, header: &Header, pfn: Pfn) -> u32 {
        self.stack.push(pfn, |next| {
            header.next.store(next.0, Ordering::Relaxed);
            crate::inject::point("prepaid: about to stack");
        });
        self.nr_stacked.fetch_add(1, Ordering::Relaxed) + 1
    }
}

impl<P: Platform> Mm<P> {
    fn prepaid_header(
        &self,
        core: &CacheCore,
        slab: &Slab,
    ) -> (&Header, &[AtomicU64], &[AtomicU64]) {
        let objects = slab.objects();
        let header = self.slab_side(slab);
        debug_assert!(core.flags.contains(CacheFlags::RCU_PREPAID) || slab.is_guarded());
        // SAFETY: the geometry of a prepaid cache leaves `bytes` before the first object, 8-byte aligned, zeroed by `prepaid_init`, and the guarded
        // pool has as much for a slab of its; only accessed as these atomics as long as the slab lives.
        unsafe {
            let bits = header.add(size_of::<Header>()).cast::<AtomicU64>();
            let n = words(objects);
            (
                &*header.cast::<Header>(),
                core::slice::from_raw_parts(bits, n),
                core::slice::from_raw_parts(bits.add(n), n),
            )
        }
    }

    /// A new slab: nothing pending.
    pub(crate) fn prepaid_init(&self, core: &CacheCore, slab: &Slab) {
        if core.flags.contains(CacheFlags::RCU_PREPAID) {
            let objects = slab.objects();
            let at = self.pages.map.virt(slab.pfn().phys());
            // SAFETY: the slab is being made, nobody knows it; the geometry leaves this much room.
            unsafe {
                at.add(Slab::bitmap_bytes(objects))
                    .write_bytes(0, bytes(objects));
            }
        }
    }

    /// May an empty slab go? Not while it is stacked or harvested.
    pub(crate) fn prepaid_idle(&self, core: &CacheCore, slab: &Slab) -> bool {
        if !core.flags.contains(CacheFlags::RCU_PREPAID) {
            return true;
        }
        let (header, _, _) = self.prepaid_header(core, slab);
        header.stacked.load(Ordering::Acquire) == 0 && header.harvested.load(Ordering::Acquire) == 0
    }

    /// Frees an object of a prepaid cache after a grace period: no head, no memory, no waiting, no failure. Objects from
    /// [`kmem_cache_create`](Self::kmem_cache_create) with [`CacheFlags::RCU_PREPAID`], or from `kmalloc` with
    /// [`__GFP_RCU_PREPAID`](crate::gfp::__GFP_RCU_PREPAID).
    ///
    /// # Safety
    ///
    /// As [`kfree`](Self::kfree), but readers that entered before may go on using the object.
    ///
    /// # Context
    ///
    /// Any, an NMI and a signal handler that says what it is included.
    #[track_caller]
    pub unsafe fn kfree_rcu_prepaid(&self, object: NonNull<u8>) {
        let caller = Location::caller();
        let core = match self.where_is(object.as_ptr()) {
            Ok(Where::Object(core)) if core.flags.contains(CacheFlags::RCU_PREPAID) => core,
            Ok(Where::Pages(found)) => return self.prepaid_large(found),
            Ok(Where::Object(_)) => {
                return self.report_object(Corruption::WrongType, None, object.as_ptr(), caller);
            }
            Err(what) => return self.report_object(what, None, object.as_ptr(), caller),
        };
        let (slab, index) = match self.locate(core, object.as_ptr()) {
            Ok(found) => found,
            Err(what) => {
                return self.report_object(what, Some(core), object.as_ptr(), caller);
            }
        };
        let mut many = false;
        {
            // From before the bit until after the stack: see the top.
            let _read = super::read_lock(self.pages.platform.rcu());
            let (header, pending, waiting) = self.prepaid_header(core, slab);
            let bit = 1 << (index % 64);
            let word = index / 64;
            // Before ours is set, which a harvest may move there at once.
            let waits = waiting[word].load(Ordering::Relaxed);
            // Release pairs with the Acquire in `harvest`; the rest is order with `stacked`.
            let before = pending[word].fetch_or(bit, Ordering::AcqRel);
            if (before | waits) & bit != 0 {
                drop(_read);
                let what = Corruption::DoubleFree;
                return self.report_object(what, Some(core), object.as_ptr(), caller);
            }
            crate::inject::point("prepaid: pending");
            if header.stacked.load(Ordering::Acquire) == 0
                && header.stacked.swap(1, Ordering::AcqRel) == 0
            {
                let pin = Pin::try_new(&self.pages.platform);
                let cpu = &self.prepaid[pin.as_ref().map_or(0, Pin::cpu)];
                many = cpu.push(header, slab.pfn()).is_multiple_of(WORTH_IT);
            }
        }
        if many {
            self.prepaid_many();
        }
    }

    /// Is the deferred free of this memory paid for: may it be given to [`kfree_rcu_prepaid`](Self::kfree_rcu_prepaid)? Large memory
    /// always is: its descriptor has room for a link.
    ///
    /// # Safety
    ///
    /// `ptr` is live memory from `kmalloc` or a cache.
    pub unsafe fn is_prepaid(&self, ptr: NonNull<u8>) -> bool {
        match self.where_is(ptr.as_ptr()) {
            Ok(Where::Object(core)) => core.flags.contains(CacheFlags::RCU_PREPAID),
            Ok(Where::Pages(_)) => true,
            Err(_) => false,
        }
    }

    #[cold]
    fn prepaid_large(&self, found: crate::memmap::Found) {
        let links = self.pages.map.buddy_at(found.word.desc());
        let pin = Pin::try_new(&self.pages.platform);
        let cpu = &self.prepaid[pin.as_ref().map_or(0, Pin::cpu)];
        cpu.large.push(found.head, |next| links.set_next(next));
        drop(pin);
        self.prepaid_many();
    }

    #[cold]
    #[inline(never)]
    fn prepaid_many(&self) {
        match self.may_free_here() {
            true => {
                let cpu = self.pages.pin().cpu();
                self.prepaid_work(cpu);
            }
            false => self.pages.platform.kick(),
        }
    }

    /// The periodic work, for all CPUs; says how many objects came free.
    pub(crate) fn prepaid_tick(&self) -> usize {
        (0..self.prepaid.len())
            .map(|cpu| self.prepaid_work(cpu))
            .sum()
    }

    /// Does anything wait?
    pub(crate) fn prepaid_any(&self) -> bool {
        self.prepaid.iter().any(|cpu| {
            let holder = Holder::new(&self.pages.platform, self.pages.rt, &classes::HARVEST);
            let harvest = cpu.harvest.lock(holder);
            !cpu.stack.is_empty()
                || !cpu.large.is_empty()
                || harvest.head != Pfn::NONE
                || harvest.large != Pfn::NONE
        })
    }

    /// Frees the objects whose grace period is over, and asks for one for those that are pending. Does not wait.
    fn prepaid_work(&self, cpu: usize) -> usize {
        let cpu = &self.prepaid[cpu];
        let rcu = self.pages.platform.rcu();
        let map = &self.pages.map;
        let mut freed = 0;
        // Twice: what is asked for here may be over at once.
        for _ in 0..2 {
            let holder = Holder::trying(&self.pages.platform, self.pages.rt, &classes::HARVEST);
            let Some(mut harvest) = cpu.harvest.try_lock(holder) else {
                return freed;
            };
            if harvest.head == Pfn::NONE && harvest.large == Pfn::NONE {
                harvest.head = self.prepaid_harvest(cpu);
                harvest.large = cpu.large.take();
                if harvest.head == Pfn::NONE && harvest.large == Pfn::NONE {
                    return freed;
                }
                harvest.cookie = rcu.start_poll();
            }
            let cookie = harvest.cookie;
            // A grace period's barrier wants interrupts on.
            drop(harvest);
            rcu.advance();
            if !rcu.poll_state(cookie) {
                return freed;
            }
            let holder = Holder::trying(&self.pages.platform, self.pages.rt, &classes::HARVEST);
            let Some(mut harvest) = cpu.harvest.try_lock(holder) else {
                return freed;
            };
            if harvest.cookie != cookie {
                continue;
            }
            let chain = core::mem::replace(&mut harvest.head, Pfn::NONE);
            let mut large = core::mem::replace(&mut harvest.large, Pfn::NONE);
            drop(harvest);
            freed += self.prepaid_free(chain);
            while large != Pfn::NONE {
                let (pfn, word) = (large, self.pages.map.word(large).load_owned());
                if word.kind() != crate::memmap::PageType::LargeKmalloc {
                    // It is in the list twice, which goes round.
                    let (at, what) = (map.virt(pfn.phys()), Corruption::DoubleFree);
                    self.report_object(what, None, at, Location::caller());
                    break;
                }
                large = self.pages.map.buddy_at(word.desc()).next();
                if word.is_reserve() {
                    self.reserve_pages_back(pfn, word);
                } else {
                    self.take_back(self.pages.free_path(), pfn, word);
                }
                freed += 1;
            }
        }
        freed
    }

    /// Takes the stack, and moves pending bits to waiting ones. Slabs that are still in another CPU's harvest stay stacked.
    fn prepaid_harvest(&self, cpu: &Prepaid) -> Pfn {
        let map = &self.pages.map;
        let mut chain = Pfn::NONE;
        cpu.nr_stacked.store(0, Ordering::Relaxed);
        let mut at = cpu.stack.take();
        while at != Pfn::NONE {
            let (pfn, slab) = (at, slab_of(map, at));
            // SAFETY: a slab's cache lives as long as the slab, and a stacked slab stays.
            let core = unsafe { slab.cache().as_ref() };
            let (header, pending, waiting) = self.prepaid_header(core, slab);
            at = Pfn(header.next.load(Ordering::Relaxed));
            // Acquire pairs with the Release in `prepaid_free`.
            if header.harvested.load(Ordering::Acquire) != 0 {
                cpu.push(header, pfn);
                continue;
            }
            header.harvested.store(1, Ordering::Relaxed);
            // First: a bit that comes too late for what follows stacks the slab again.
            header.stacked.swap(0, Ordering::AcqRel);
            for (pending, waiting) in pending.iter().zip(waiting) {
                waiting.store(pending.swap(0, Ordering::AcqRel), Ordering::Relaxed);
            }
            header.next_harvested.store(chain.0, Ordering::Relaxed);
            chain = pfn;
        }
        chain
    }

    /// The grace period is over: what waited is free.
    fn prepaid_free(&self, mut chain: Pfn) -> usize {
        let map = &self.pages.map;
        let mut freed = 0;
        while chain != Pfn::NONE {
            let slab = slab_of(map, chain);
            // SAFETY: as in `prepaid_harvest`.
            let core = unsafe { slab.cache().as_ref() };
            let (header, _, waiting) = self.prepaid_header(core, slab);
            chain = Pfn(header.next_harvested.load(Ordering::Relaxed));
            freed += self.prepaid_give(core, slab, header, waiting);
        }
        let pin = Pin::try_new(&self.pages.platform);
        let stats = self.pages.any_stats(pin.as_ref());
        stats.add_any(Event::SlabFree, freed as u64);
        stats.add_any(Event::PrepaidFreed, freed as u64);
        freed
    }

    fn prepaid_give(
        &self,
        core: &CacheCore,
        slab: &Slab,
        header: &Header,
        waiting: &[AtomicU64],
    ) -> usize {
        let map = &self.pages.map;
        if slab.is_guarded() {
            let bits = waiting[0].swap(0, Ordering::Relaxed);
            // Release: as below. First: once it is free, somebody else may have the slot.
            header.harvested.store(0, Ordering::Release);
            let object = map.virt(slab.pfn().phys()).wrapping_add(slab.guarded_at());
            if bits != 0
                && let Some(object) = NonNull::new(object)
            {
                self.kfence_free(self.pages.free_path(), core, object, Location::caller());
            }
            return usize::from(bits != 0);
        }
        let look = |word: &AtomicU64| word.load(Ordering::Relaxed);
        let take = |word: &AtomicU64| word.swap(0, Ordering::Relaxed);
        let base = map.virt(slab.pfn().phys());
        let object = |index| NonNull::new(base.wrapping_add(core.geometry_of(slab).offset(index)));
        if core.flags.has_owners() {
            set_bits(waiting, look).for_each(|index| self.uncharge_index(core, slab, index));
        }
        if core.is_debug() {
            // One by one, each checked as ever.
            let mut freed = 0;
            for object in set_bits(waiting, take).filter_map(object) {
                freed += 1;
                if crate::slab::debug::on_free(self, core, object, Location::caller()) {
                    self.init_on_free(core, object);
                    self.slabs_give(core, &[object.as_ptr()], true, Location::caller());
                }
            }
            // Release pairs with the Acquire in `prepaid_harvest` and `prepaid_idle`.
            header.harvested.store(0, Ordering::Release);
            return freed;
        }
        if core.flags.contains(CacheFlags::INIT_ON_FREE) {
            let objects = set_bits(waiting, look).filter_map(object);
            objects.for_each(|object| self.init_on_free(core, object));
        }
        let mut empty = Pfn::NONE;
        let mut wrong = false;
        let freed = {
            let mut lists = self.lists(core);
            let was_empty = slab.inuse() == 0;
            let mut freed = 0;
            for (i, word) in waiting.iter().enumerate() {
                let bits = word.swap(0, Ordering::Relaxed);
                match slab.give_word(map, i, bits) {
                    Some(n) => freed += n,
                    None => wrong = true,
                }
            }
            lists.inuse -= freed as u64;
            // Release: as above.
            header.harvested.store(0, Ordering::Release);
            if slab.inuse() == 0 && !was_empty {
                lists.nr_empty += 1;
            }
            lists.relist(map, slab);
            let many = lists.nr_empty > crate::slab::cache::MIN_PARTIAL;
            if slab.inuse() == 0 && many && self.prepaid_idle(core, slab) {
                lists.nr_empty -= 1;
                lists.leave(map, slab, core.geometry_of(slab));
                slab.links().set_next(Pfn::NONE);
                empty = slab.pfn();
            }
            freed
        };
        if wrong {
            let at = map.virt(slab.pfn().phys());
            self.report_object(Corruption::DoubleFree, Some(core), at, Location::caller());
        }
        self.discard_from(core, empty, false);
        freed
    }
}
