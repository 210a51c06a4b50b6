//! A guarded pool of a few objects, in which stray reads and writes are found at once (KFENCE).
//!
//! ```text
//! | guard | object 0 ..... | guard | ..... object 1 | guard | ...
//! ```
//!
//! Each of its objects has a page of its own between two that nobody can touch, and lies at the left end of it or the right by turns; the rest of the page
//! are canaries, which are looked at when it is freed. A free object's page cannot be touched either, and waits at the end of the line of
//! those that come next. Of all ordinary allocations one in so many is served from here, whatever its cache, if it fits a page.
//!
//! An object's page is a slab of its cache, of one object, for as long as it is in use; its `struct slab` says that it is guarded and where in the page the
//! object is. So the object is found, charged, listed, freed by whatever call and reported like any other. Else the page is a slab of the
//! cache `kfence`, and counts as metadata. What other slabs have before their first object (bits of prepaid frees, whom it is charged to) lies in the
//! [slot](slot::Slot). A free goes by the address: [`Pool::contains`] is one subtraction and one comparison, false for all if there is no pool.
//!
//! | room | what |
//! |---|---|
//! | this | the way of an object in and out |
//! | [`pool`] | where it is, its free slots, how often it is used |
//! | [`slot`] | what is known of one place |
//! | [`fault`] | what is said of an access that faulted |
//!
//! Lock order: the list of free slots is a leaf, like a cache's list lock; neither is taken under the other. Who takes a slot out of use does so by its state.
//!
//! Source: `mm/kfence` of Linux. Different here: how often is by count (and by time, if wanted); the free list, like Linux's, is first in, first out, but
//! which end of its page an object gets is by turns, not by chance; an object of `kmalloc` is aligned to its size only where that is a power of two, so
//! that fewer bytes behind it go unguarded.

mod fault;
mod pool;
mod slot;

pub(crate) use fault::View;
pub use fault::{KfenceFault, KfenceObject};
pub use pool::KfenceInfo;
pub(crate) use pool::{Countdown, Pool};
pub(crate) use slot::Slot;
use slot::State;

use core::panic::Location;
use core::ptr::NonNull;

use super::cache::{CacheCore, CacheFlags, Geometry, Role, slab_of};
use super::object::Caller;
use crate::address::{PAGE_SIZE, Pfn};
use crate::desc::Slab;
use crate::error::{AllocError, InitError};
use crate::gfp::{self, Flags};
use crate::lockdep::classes;
use crate::memmap::{DescClass, PageType, Word};
use crate::mm::{BuiltIn, Mm};
use crate::platform::{FaultPoint, Holder, Platform, might_lock, might_sleep};
use crate::rcu::{Cookie, Rcu};
use crate::report::{Corruption, Report};
use crate::stats::{Event, FreePath};
use crate::sync::atomic::Ordering;

/// Slots looked at for one whose last deferred free is over.
const LOOKS: usize = 4;
/// Flags of requests for certain memory, which the pool is not.
const CERTAIN: Flags = Flags::from_bits(gfp::__GFP_DMA.bits() | gfp::__GFP_DMA32.bits());

/// Pages of a pool of so many objects.
pub(crate) const fn pool_pages(objects: usize) -> usize {
    if objects == 0 { 0 } else { 2 * objects + 1 }
}

impl<P: Platform> Mm<P> {
    /// Makes the pool's pages slabs without an object, and inaccessible. Once, when all else is there.
    pub(crate) fn kfence_init(&self) -> Result<(), InitError> {
        let map = &self.pages.map;
        let pool = &self.kfence;
        let core = self.built_in(BuiltIn::Kfence);
        self.kfence_set_sample(pool.sample.load(Ordering::Relaxed));
        for (pfn, order) in crate::memmap::heads::blocks(pool.pages().start, pool.pages().end) {
            self.pages.platform.kernel_map_pages(pfn, order, false);
        }
        for index in 0..pool.view.slots().len() {
            let mut desc = [core::ptr::null_mut()];
            self.slabs_take(self.slab_cache(), gfp::GFP_KERNEL, &mut desc)
                .map_err(|_| InitError::TooSmall(pool.pages().len() as u64 * PAGE_SIZE as u64))?;
            let (desc, pfn) = (self.pages.phys(desc[0]), pool.pfn(index));
            let slab = map.slab_at(desc);
            slab.init(map, NonNull::from(core), pfn, 0, 1, false);
            slab.set_guarded();
            map.publish_block(
                pfn,
                Word::described(PageType::Slab, 0, desc, DescClass::Slab),
            );
            self.count_retyped(PageType::Reserved, PageType::Slab, 0);
            self.kfence_list_free(core, slab);
            self.kfence_push(index);
        }
        Ok(())
    }

    /// What other slabs have before their first object.
    pub(crate) fn slab_side(&self, slab: &Slab) -> *mut u8 {
        let page = self.pages.map.virt(slab.pfn().phys());
        if slab.is_guarded()
            && let Some((_, slot)) = self.kfence.slot_of(page)
        {
            return slot.side();
        }
        page.wrapping_add(Slab::bitmap_bytes(slab.objects()))
    }

    fn kfence_push(&self, index: usize) {
        let (platform, rt) = (&self.pages.platform, self.pages.rt);
        let mut free = self
            .kfence
            .free
            .lock(Holder::new(platform, rt, &classes::KFENCE));
        free.push(self.kfence.view.slots(), index);
    }

    /// The slot that has been free for longest; `None` also if somebody else is at the list.
    fn kfence_pop(&self) -> Option<usize> {
        let (platform, rt) = (&self.pages.platform, self.pages.rt);
        let slots = self.kfence.view.slots();
        let holder = Holder::trying(platform, rt, &classes::KFENCE);
        let mut free = self.kfence.free.try_lock(holder)?;
        for _ in 0..LOOKS {
            let index = free.pop(slots)?;
            // One that a faulty user freed for later twice may be in a list still, by its slot.
            if crate::rcu::prepaid::is_idle(slots[index].side()) {
                return Some(index);
            }
            free.push(slots, index);
        }
        None
    }

    /// A slab in no list becomes one without an object.
    fn kfence_list_free(&self, core: &CacheCore, slab: &Slab) {
        let mut lists = self.lists(core);
        lists.enter(&Geometry::GUARDED);
        lists.nr_empty += 1;
        lists.relist(&self.pages.map, slab);
    }

    /// An object of a cache, if it is this allocation's turn.
    #[inline]
    pub(crate) fn kfence_object(
        &self,
        core: &CacheCore,
        gfp: Flags,
        caller: Caller,
    ) -> Option<Result<NonNull<u8>, AllocError>> {
        if !self.kfence.samples() {
            return None;
        }
        let geometry = &core.geometry;
        let (size, align) = (geometry.object_size as usize, geometry.align as usize);
        self.kfence_alloc(core, size, align, gfp, caller)
    }

    /// Is it this allocation's turn? Then an object of the pool, of `size` bytes, if there is room.
    #[cold]
    #[inline(never)]
    pub(crate) fn kfence_alloc(
        &self,
        core: &CacheCore,
        size: usize,
        align: usize,
        gfp: Flags,
        caller: Caller,
    ) -> Option<Result<NonNull<u8>, AllocError>> {
        let certain = gfp.intersects(CERTAIN | gfp::__GFP_FAST_TRY)
            || core.flags.contains(CacheFlags::CACHE_DMA);
        if certain || core.role != Role::Objects || core.geometry.object_size as usize > PAGE_SIZE {
            return None;
        }
        let pool = &self.kfence;
        let sample = pool.sample.load(Ordering::Relaxed);
        {
            let pin = self.pages.pin();
            let countdown = &pool.countdowns[pin.cpu()].0;
            // An interrupt between the load and the store loses a count, that is all.
            let left = countdown.load(Ordering::Relaxed);
            if left > 1 {
                countdown.store(left - 1, Ordering::Relaxed);
                return None;
            }
            if pool.interval_ns > 0 {
                let now = self.pages.platform.now();
                if now.saturating_sub(pool.last.load(Ordering::Relaxed)) < pool.interval_ns {
                    return None;
                }
                pool.last.store(now, Ordering::Relaxed);
            }
            countdown.store(sample, Ordering::Relaxed);
            let stats = self.pages.stats(&pin);
            if stats.on_free_path() {
                self.pages.allocation_on_free(&pin);
            }
        }
        if gfp.allow_blocking() {
            might_sleep(&self.pages.platform, "an allocation of an object");
        }
        might_lock(&self.pages.platform, self.pages.rt, &classes::SLAB_LISTS);
        self.kfence_poll();
        let Some(index) = self.kfence_pop() else {
            pool.skipped.fetch_add(1, Ordering::Relaxed);
            return None;
        };
        if self.pages.platform.should_fail(FaultPoint::CacheAlloc) {
            self.kfence_push(index);
            return Some(Err(AllocError::Injected));
        }
        let object = self.kfence_place(core, index, size, align, gfp, caller);
        let pin = self.pages.pin();
        self.pages.stats(&pin).add(&pin, Event::SlabAlloc, 1);
        Some(Ok(object))
    }

    /// Puts an object into a free slot that is the caller's.
    fn kfence_place(
        &self,
        core: &CacheCore,
        index: usize,
        size: usize,
        align: usize,
        gfp: Flags,
        caller: Caller,
    ) -> NonNull<u8> {
        let map = &self.pages.map;
        let pool = &self.kfence;
        let (slot, pfn) = (&pool.view.slots()[index], pool.pfn(index));
        slot.set_state(State::Busy);
        // At the right end every other time.
        let turn = pool.allocs.fetch_add(1, Ordering::Relaxed);
        let at = if turn.is_multiple_of(2) {
            0
        } else {
            (PAGE_SIZE - size) & !(align - 1)
        };
        let slab = slab_of(map, pfn);
        let idle = self.built_in(BuiltIn::Kfence);
        {
            let mut lists = self.lists(idle);
            lists.nr_empty -= 1;
            lists.leave(map, slab, &Geometry::GUARDED);
        }
        slab.assign(NonNull::from(core), at);
        slot.clear_side();
        slab.take(map, 1, |_| {});
        {
            let mut lists = self.lists(core);
            lists.enter(&Geometry::GUARDED);
            lists.inuse += 1;
            lists.relist(map, slab);
        }
        self.kfence_shut(index);
        self.pages.platform.kernel_map_pages(pfn, 0, true);
        let page = map.virt(pfn.phys());
        let (Some(page), Some(object)) = (NonNull::new(page), NonNull::new(page.wrapping_add(at)))
        else {
            unreachable!("a page of the pool at null")
        };
        // SAFETY: the page is the slot's, which is ours, and accessible; all stretches are within it.
        unsafe {
            slot::write_canaries(page, at);
            slot::write_canaries(page.add(at + size), PAGE_SIZE - at - size);
            if gfp.contains(gfp::__GFP_ZERO) || core.flags.contains(CacheFlags::INIT_ON_ALLOC) {
                object.write_bytes(0, size);
            }
        }
        if let Some(ctor) = core.ctor {
            ctor(object);
        }
        let track = slot::track(&self.pages, caller);
        slot.fill(object.addr().get(), size, core.name(), track);
        pool.in_use.fetch_add(1, Ordering::Relaxed);
        slot.set_state(State::InUse);
        object
    }

    /// Why this cannot be freed, if it cannot; else it is the caller's to take out of use.
    fn kfence_claim(
        &self,
        core: &CacheCore,
        object: *const u8,
        to: State,
    ) -> Result<(usize, &Slot), Corruption> {
        let (index, slot) = self.kfence.slot_of(object).ok_or(Corruption::WrongType)?;
        if slot.at() != object.addr() {
            return Err(Corruption::NotAHead);
        }
        let state = slot.state();
        let in_use = state == State::InUse || state == State::Deferred && to == State::Busy;
        if !in_use {
            return Err(Corruption::DoubleFree);
        }
        let slab = slab_of(&self.pages.map, self.kfence.pfn(index));
        if !core::ptr::eq(slab.cache_ptr(), core) {
            return Err(Corruption::WrongCache);
        }
        match slot.claim(state, to) {
            true => Ok((index, slot)),
            false => Err(Corruption::DoubleFree),
        }
    }

    /// An object of the pool comes back (`__kfence_free`), or what is taken for one.
    #[cold]
    #[inline(never)]
    pub(crate) fn kfence_free(
        &self,
        path: FreePath<'_, P>,
        core: &CacheCore,
        object: NonNull<u8>,
        caller: Caller,
    ) {
        let _path = self.pages.may_sleep(path);
        let (index, slot) = match self.kfence_claim(core, object.as_ptr(), State::Busy) {
            Ok(found) => found,
            Err(what) => {
                self.kfence.bugs.fetch_add(1, Ordering::Relaxed);
                return self.report_object(what, Some(core), object.as_ptr(), caller);
            }
        };
        self.each_dead_canary(index, |what, byte| {
            self.kfence.bugs.fetch_add(1, Ordering::Relaxed);
            self.kfence_report(what, index, byte, caller);
        });
        if core.flags.has_owners() {
            let slab = slab_of(&self.pages.map, self.kfence.pfn(index));
            self.uncharge_index(core, slab, 0);
        }
        slot.note_free(slot::track(&self.pages, caller));
        if core.flags.contains(CacheFlags::TYPESAFE_BY_RCU) {
            // A reader may look at it for as long as his section is open.
            let cookie = self.pages.platform.rcu().start_poll();
            slot.cookie.store(cookie.into_raw(), Ordering::Relaxed);
            self.kfence.waiting.fetch_add(1, Ordering::Relaxed);
            slot.set_state(State::Waiting);
            return;
        }
        self.kfence_release(index, slot);
    }

    /// The same where no lock may be taken: says whether the next normal free is to have it. In any context.
    #[cold]
    #[inline(never)]
    pub(crate) fn kfence_defer(&self, core: &CacheCore, object: NonNull<u8>) -> bool {
        match self.kfence_claim(core, object.as_ptr(), State::Deferred) {
            Ok(_) => true,
            Err(what) => {
                self.kfence.bugs.fetch_add(1, Ordering::Relaxed);
                self.report_object(what, Some(core), object.as_ptr(), Location::caller());
                false
            }
        }
    }

    /// Shuts the guards beside a slot that faults have opened.
    fn kfence_shut(&self, index: usize) {
        let pool = &self.kfence;
        for guard in [2 * index, 2 * index + 2] {
            let opened = pool.opened(guard);
            if opened.load(Ordering::Relaxed) != 0 && opened.swap(0, Ordering::Relaxed) != 0 {
                let pfn = Pfn(pool.first.0 + guard as u32);
                self.pages.platform.kernel_map_pages(pfn, 0, false);
            }
        }
    }

    /// A slot that is the caller's goes to the end of the line, and its page becomes inaccessible.
    fn kfence_release(&self, index: usize, slot: &Slot) {
        let (map, platform, pool) = (&self.pages.map, &self.pages.platform, &self.kfence);
        let pfn = pool.pfn(index);
        let slab = slab_of(map, pfn);
        if pool.zero_on_free {
            let at = map.virt(pfn.phys()).wrapping_add(slab.guarded_at());
            // SAFETY: the object is within its page, which is accessible, and ours since it was taken out of use.
            unsafe { at.write_bytes(0, slot.size()) };
        }
        platform.kernel_map_pages(pfn, 0, false);
        self.kfence_shut(index);
        // SAFETY: a slab's cache lives as long as the slab has an object in use, as this one by its bitmap.
        let core = unsafe { slab.cache().as_ref() };
        {
            let mut lists = self.lists(core);
            lists.leave(map, slab, &Geometry::GUARDED);
            lists.inuse -= 1;
            slab.give(map, 0);
        }
        let idle = self.built_in(BuiltIn::Kfence);
        slab.assign(NonNull::from(idle), slab.guarded_at());
        self.kfence_list_free(idle, slab);
        pool.in_use.fetch_sub(1, Ordering::Relaxed);
        pool.frees.fetch_add(1, Ordering::Relaxed);
        slot.set_state(State::Free);
        self.kfence_push(index);
    }

    /// Takes the slots whose grace period is over out of use; says how many.
    fn kfence_poll(&self) -> usize {
        let pool = &self.kfence;
        if pool.waiting.load(Ordering::Relaxed) == 0 {
            return 0;
        }
        let rcu = self.pages.platform.rcu();
        let mut freed = 0;
        for (index, slot) in pool.view.slots().iter().enumerate() {
            let due = slot.state() == State::Waiting
                && rcu.poll_state(Cookie::from_raw(slot.cookie.load(Ordering::Relaxed)));
            if due && slot.claim(State::Waiting, State::Busy) {
                pool.waiting.fetch_sub(1, Ordering::Relaxed);
                self.kfence_release(index, slot);
                freed += 1;
            }
        }
        freed
    }

    /// The periodic work: pushes grace periods on, and takes what is due out of use. Does not wait.
    pub(crate) fn kfence_work(&self) -> usize {
        if self.kfence.waiting.load(Ordering::Relaxed) == 0 {
            return 0;
        }
        self.pages.platform.rcu().advance();
        self.kfence_poll()
    }

    /// Takes all slots that wait out of use. Waits for grace periods if the caller may.
    pub(crate) fn kfence_barrier(&self) {
        let mut round = 0;
        loop {
            self.kfence_work();
            if self.kfence.waiting.load(Ordering::Relaxed) == 0 || !self.may_wait() {
                return;
            }
            self.pages.platform.rcu().synchronize_expedited();
            self.pages.platform.relax(round);
            round += 1;
        }
    }

    /// Visits what is wrong with the canaries of an object in use: left of it, and right of it.
    fn each_dead_canary(&self, index: usize, mut visit: impl FnMut(Corruption, (isize, u8, u8))) {
        let pool = &self.kfence;
        let (slot, page) = (
            &pool.view.slots()[index],
            self.pages.map.virt(pool.pfn(index).phys()),
        );
        let at = slot.at().wrapping_sub(page.addr());
        let end = at + slot.size();
        let stretches = [
            (Corruption::RedzoneLeft, 0, at),
            (Corruption::RedzoneRight, end, PAGE_SIZE - end),
        ];
        for (what, from, len) in stretches {
            let Some(start) = NonNull::new(page.wrapping_add(from)) else {
                continue;
            };
            // SAFETY: within the page, which is accessible as long as its object is not taken out of use.
            if let Some((i, found)) = unsafe { slot::first_dead(start, len) } {
                let expected = slot::canary(start.addr().get() + i);
                let offset = (from + i) as isize - at as isize;
                visit(what, (offset, found, expected));
            }
        }
    }

    /// What is wrong with the objects in use, for [`validate`](Self::validate).
    pub(crate) fn kfence_validate(
        &self,
        caller: Caller,
        mut visit: impl FnMut(Corruption, &Report<'_>),
    ) {
        for (index, slot) in self.kfence.view.slots().iter().enumerate() {
            if slot.state() == State::InUse {
                self.each_dead_canary(index, |what, byte| {
                    self.kfence_with_report(what, index, byte, caller, |r| visit(what, r));
                });
            }
        }
    }

    #[cold]
    fn kfence_report(&self, what: Corruption, index: usize, byte: (isize, u8, u8), caller: Caller) {
        self.kfence_with_report(what, index, byte, caller, |report| {
            self.pages.platform.corruption(report);
        });
    }

    /// A report of an object whose page is accessible.
    #[cold]
    fn kfence_with_report(
        &self,
        what: Corruption,
        index: usize,
        byte: (isize, u8, u8),
        caller: Caller,
        f: impl FnOnce(&Report<'_>),
    ) {
        let pool = &self.kfence;
        let slot = &pool.view.slots()[index];
        let (name, pfn) = (slot.name(), pool.pfn(index));
        let page = self.pages.map.virt(pfn.phys());
        let mut report = self.report_at(what, pfn, slot.at(), caller);
        report.cache = Some(name.as_str());
        report.byte = Some(byte);
        report.allocated = slot.tracks().0;
        let at = slot.at().wrapping_sub(page.addr());
        report.dump = Some(crate::report::dump(page, PAGE_SIZE, at, byte.0));
        f(&report);
    }
}
