//! Objects for those who may neither wait nor take a lock that could be theirs already: `kmalloc_nolock`, `kfree_nolock`.
//!
//! On the way out: this CPU's sheaf, a partial slab if nobody has the lists, a new slab from pages got the same way, and for
//! kmalloc the next larger classes, since another cache's locks are other locks. On the way back: the sheaf, else a stack
//! that needs no lock, linked through the dead objects, which the next normal free on the CPU empties. So freeing cannot
//! fail, whoever allocated. (Linux 6.18 takes back by `kfree_nolock` only what `kmalloc_nolock` gave, serves no large sizes, and
//! refuses with one CPU in an NMI and under RT in interrupts.)

use core::panic::Location;
use core::ptr::NonNull;

use super::cache::{CacheCore, Lists};
use super::kmalloc::{CLASSES, Kind, Where, class_of, large_order};
use super::object::{Caller, ZONE_FLAGS};
use crate::address::{Pfn, PhysAddr};
use crate::desc::{DescList, Slab};
use crate::error::AllocError;
use crate::gfp::Flags;
use crate::lockdep::classes;
use crate::memcg::{Charge, MemcgStat};
use crate::memmap::{DescClass, PageType, Word};
use crate::mm::Mm;
use crate::page_alloc::nolock::Try;
use crate::platform::{Holder, Pin, Platform};
use crate::report::Corruption;
use crate::stats::Event;
use crate::sync::atomic::{AtomicPtr, AtomicU64, Ordering};
use crate::sync::{PtrStack, SpinGuard};

/// Larger classes tried when the right one has nothing (Linux: one).
const LARGER: usize = 2;

/// Dead objects that wait for the next normal free: a stack that any context and any CPU pushes on, only ever taken as a whole.
#[derive(Debug)]
pub(crate) struct DeferredObjects {
    stack: PtrStack<u8>,
    /// Pushed so far, ahead of the push: how many there can be at most in what is taken.
    pushed: AtomicU64,
}

impl DeferredObjects {
    pub(crate) fn new() -> DeferredObjects {
        DeferredObjects {
            stack: PtrStack::new(),
            pushed: AtomicU64::new(0),
        }
    }

    #[inline]
    pub(crate) fn any(&self) -> bool {
        !self.stack.is_empty()
    }
}

impl<P: Platform> Mm<P> {
    /// An object, from any context.
    pub(crate) fn cache_try_alloc(
        &self,
        core: &CacheCore,
        gfp: Flags,
        how: Try,
        caller: Caller,
    ) -> Result<NonNull<u8>, AllocError> {
        let pin = Pin::try_new(&self.pages.platform);
        let result = match &pin {
            Some(pin) => self.try_object(pin, core, gfp, how),
            None => Err(AllocError::Forbidden),
        };
        let stats = self.pages.any_stats(pin.as_ref());
        if core.is_metadata() {
            return result;
        }
        if how == Try::Lists {
            stats.add_any(Event::tried(Event::FastObjects, &result), 1);
        }
        let object = result?;
        stats.add_any(Event::SlabAlloc, 1);
        self.on_alloc(
            core,
            object,
            gfp,
            core.geometry.object_size as usize,
            caller,
        );
        Ok(object)
    }

    fn try_object(
        &self,
        pin: &Pin<'_, P>,
        core: &CacheCore,
        gfp: Flags,
        how: Try,
    ) -> Result<NonNull<u8>, AllocError> {
        let mut why = AllocError::Empty;
        if core.sheaves.capacity() > 0 {
            match core.sheaves.try_owner(pin, |stack| stack.pop()) {
                Some(Some(object)) => return Ok(object),
                Some(None) => {}
                None => why = AllocError::Contended,
            }
        }
        if how == Try::Lists {
            return Err(why);
        }
        let mut out = [core::ptr::null_mut()];
        match self.try_lists(core) {
            Some(mut lists) => {
                self.take_partial(core, &mut lists, &mut out);
            }
            None => return Err(AllocError::Contended),
        }
        if out[0].is_null() && !core.is_metadata() {
            self.try_new_slab(core, gfp, &mut out)
                .map_err(|new| if new == AllocError::Empty { why } else { new })?;
        }
        NonNull::new(out[0]).ok_or(why)
    }

    fn try_lists<'a>(&'a self, core: &'a CacheCore) -> Option<SpinGuard<'a, Lists, Holder<'a, P>>> {
        let holder = Holder::trying(&self.pages.platform, self.pages.rt, &classes::SLAB_LISTS);
        core.lists.try_lock(holder)
    }

    /// A new slab, and objects from it.
    fn try_new_slab(
        &self,
        core: &CacheCore,
        gfp: Flags,
        out: &mut [*mut u8],
    ) -> Result<(), AllocError> {
        let gfp = Flags::from_bits(gfp.bits() & !ZONE_FLAGS) | core.gfp;
        let order = core.smallest.order as usize;
        let kind = PageType::Slab;
        let block = self
            .pages
            .try_block(kind, gfp, order, None, Try::Locks, self)?;
        let word = if block.word.class() == DescClass::Slab {
            block.word.to_owned(kind)
        } else {
            let caller = Location::caller();
            match self.cache_try_alloc(self.slab_cache(), Flags::EMPTY, Try::Locks, caller) {
                Ok(desc) => {
                    self.try_put_desc(block.word);
                    let desc = self.pages.phys(desc.as_ptr());
                    Word::described(kind, order, desc, DescClass::Slab)
                }
                Err(why) => {
                    self.pages.free_block_nolock(kind, block.pfn, block.word);
                    return Err(why);
                }
            }
        };
        let slab = self.make_slab(core, block.pfn, word.desc(), false, order);
        match self.try_lists(core) {
            Some(mut lists) => {
                self.take_and_list_in(core, &mut lists, slab, out);
                Ok(())
            }
            None => {
                // Nobody knows the slab: it goes back as it came.
                self.pages.free_block_nolock(kind, block.pfn, word);
                Err(AllocError::Contended)
            }
        }
    }

    /// Gives the descriptor of a word back.
    pub(crate) fn try_put_desc(&self, word: Word) {
        self.try_put_desc_at(word.desc());
    }

    /// Gives a descriptor back, from any context.
    pub(crate) fn try_put_desc_at(&self, desc: PhysAddr) {
        let mut list = DescList::new();
        list.push(&self.pages.map, desc);
        self.descs_put_nolock(list);
    }

    /// Some buddies, or none at all.
    pub(crate) fn descs_get_nolock(&self, n: usize) -> Result<DescList, AllocError> {
        let pin = Pin::try_new(&self.pages.platform).ok_or(AllocError::Forbidden)?;
        let map = &self.pages.map;
        let core = self.buddy_cache();
        let mut list = DescList::new();
        let mut why = AllocError::Empty;
        let popped = core.sheaves.try_owner(&pin, |stack| {
            while list.len() < n {
                let Some(object) = stack.pop() else { break };
                list.push(map, map.phys(object.as_ptr()));
            }
        });
        if popped.is_none() {
            why = AllocError::Contended;
        }
        let mut batch = [core::ptr::null_mut(); crate::page_alloc::buddy::LADDER];
        if list.len() < n {
            match self.try_lists(core) {
                Some(mut lists) => {
                    let missing = n - list.len();
                    let taken = self.take_partial(core, &mut lists, &mut batch[..missing]);
                    drop(lists);
                    for object in &batch[..taken] {
                        list.push(map, map.phys(*object));
                    }
                }
                None => why = AllocError::Contended,
            }
        }
        if list.len() < n {
            self.descs_put_nolock(list);
            return Err(why);
        }
        Ok(list)
    }

    pub(crate) fn descs_put_nolock(&self, list: DescList) {
        self.each_desc(list, |core, object| self.free_object_nolock(core, object));
    }

    /// An object comes back, from any context.
    pub(crate) fn free_object_nolock(&self, core: &CacheCore, object: NonNull<u8>) {
        let guarded = self.kfence.contains(object.as_ptr());
        if guarded && !self.kfence_defer(core, object) {
            return;
        }
        if core.flags.has_owners() {
            self.uncharge_object(core, object);
        }
        self.init_on_free(core, object);
        let pin = Pin::try_new(&self.pages.platform);
        let stats = self.pages.any_stats(pin.as_ref());
        let reserve = core.reserved.load(Ordering::Relaxed) != 0
            && self.object_is_reserve(core, object.as_ptr());
        if core.sheaves.capacity() > 0
            && !guarded
            && !reserve
            && let Some(pin) = &pin
            && core.sheaves.try_owner(pin, |stack| stack.push(object)) == Some(true)
        {
            if core.role == super::cache::Role::Objects {
                stats.add_any(Event::SlabFree, 1);
            }
            stats.add_any(Event::NolockKfree, 1);
            return;
        }
        stats.add_any(Event::NolockKfreeDeferred, 1);
        let deferred = stats.deferred();
        deferred.pushed.fetch_add(1, Ordering::Relaxed);
        let link = self.link_of(core, object);
        deferred.stack.push(object.as_ptr(), |next| {
            link.store(next, Ordering::Relaxed);
            crate::inject::point("deferred objects: about to push");
        });
    }

    /// Where a dead object keeps its link: in itself, or behind it if what it holds must stay.
    fn link_of(&self, core: &CacheCore, object: NonNull<u8>) -> &AtomicPtr<u8> {
        if let Some((_, slot)) = self.kfence.slot_of(object.as_ptr()) {
            return &slot.link;
        }
        let at = object
            .as_ptr()
            .wrapping_add(core.geometry.link as usize)
            .cast::<AtomicPtr<u8>>();
        // SAFETY: within the object's slot, 8-byte aligned, initialised memory of the arena; the object is dead, so nobody but the
        // stack of deferred objects uses these bytes, as this atomic.
        unsafe { &*at }
    }

    /// Frees what was deferred on this CPU.
    #[cold]
    #[inline(never)]
    pub(crate) fn free_deferred(&self) {
        let cpu = self.pages.pin().cpu();
        self.free_deferred_of(cpu);
        self.free_dying();
    }

    /// Frees what was deferred on all CPUs; says how many objects.
    pub(crate) fn free_all_deferred(&self) -> usize {
        self.free_dying();
        (0..self.pages.stats.len())
            .map(|cpu| self.free_deferred_of(cpu))
            .sum()
    }

    fn free_deferred_of(&self, cpu: usize) -> usize {
        let deferred = self.pages.stats[cpu].deferred();
        let mut at = deferred.stack.take();
        let most = deferred.pushed.load(Ordering::Relaxed);
        let mut freed = 0;
        while let Some(object) = NonNull::new(at) {
            let caller = Location::caller();
            let Ok(Where::Object(core)) = self.where_is(object.as_ptr()) else {
                self.report_object(Corruption::WrongType, None, object.as_ptr(), caller);
                break;
            };
            if freed as u64 == most {
                // More than were ever pushed: one is in it twice, and the list goes round.
                self.report_object(Corruption::DoubleFree, Some(core), object.as_ptr(), caller);
                break;
            }
            at = self.link_of(core, object).load(Ordering::Relaxed);
            self.cache_free(self.pages.free_path(), core, object, false, caller);
            freed += 1;
        }
        freed
    }

    /// `size` bytes, as [`kmalloc`](Self::kmalloc), without waiting or taking a lock that somebody holds.
    ///
    /// What may be asked for is what `kmalloc` serves: any size up to 4 MiB. Of `gfp` only the kind of memory and `__GFP_ZERO` count.
    ///
    /// # Context
    ///
    /// Any: interrupt, NMI, signal handler, inside the allocator itself; with one CPU, and in the RT configuration. A cache made with
    /// debug flags fills and checks the object as ever, on the spot.
    ///
    /// # Errors
    ///
    /// [`AllocError::Empty`], [`AllocError::Contended`] or [`AllocError::Forbidden`]; asking again in the same context does not
    /// help. [`AllocError::BadSize`] as `kmalloc`.
    #[track_caller]
    pub fn kmalloc_nolock(&self, size: usize, gfp: Flags) -> Result<NonNull<u8>, AllocError> {
        let caller = Location::caller();
        let Some(class) = class_of(size) else {
            return self.try_large(size, gfp, Try::Locks);
        };
        let result = self.kmalloc_class_nolock(class, gfp, caller);
        let pin = Pin::try_new(&self.pages.platform);
        let stats = self.pages.any_stats(pin.as_ref());
        stats.add_any(Event::tried(Event::TryObjects, &result), 1);
        result
    }

    fn kmalloc_class_nolock(
        &self,
        class: usize,
        gfp: Flags,
        caller: Caller,
    ) -> Result<NonNull<u8>, AllocError> {
        let mut why = AllocError::Empty;
        let memcg = self.memcg_for(gfp);
        let kind = if memcg == 0 {
            Kind::of(gfp)
        } else {
            Kind::Cgroup
        };
        for class in class..CLASSES.len().min(class + 1 + LARGER) {
            let core = self.kmalloc_cache(kind, class);
            let charge = self.charge_object(core, memcg, Flags::EMPTY)?;
            match self.cache_try_alloc(core, gfp, Try::Locks, caller) {
                Ok(object) => {
                    self.keep_charge(core, object, charge);
                    return Ok(object);
                }
                // What stood in the way first is the reason.
                Err(new) if why == AllocError::Empty => why = new,
                Err(_) => {}
            }
        }
        Err(why)
    }

    pub(crate) fn try_large(
        &self,
        size: usize,
        gfp: Flags,
        how: Try,
    ) -> Result<NonNull<u8>, AllocError> {
        let kind = PageType::LargeKmalloc;
        let order = large_order(size)?;
        let (memcg, stat) = (self.memcg_for(gfp), MemcgStat::Kernel);
        let charge = self.charge_pages(memcg, Flags::EMPTY, order, stat)?;
        let block = self.pages.try_block(kind, gfp, order, None, how, self)?;
        let word = block.word.to_owned(kind);
        let word = self.pages.set_memcg(word, charge.map_or(0, Charge::keep));
        self.pages.map.publish_block(block.pfn, word);
        let ptr = self.pages.map.virt(block.pfn.phys());
        NonNull::new(ptr).ok_or(AllocError::Empty)
    }

    /// Frees what `kmalloc`, [`kmalloc_nolock`](Self::kmalloc_nolock) or a cache gave, without waiting or taking a lock.
    /// Cannot fail.
    ///
    /// What cannot go into this CPU's sheaf now waits for its next normal free (or [`tick`](Self::tick)). A free object that
    /// still waits when it is freed again is reported then, not now.
    ///
    /// # Safety
    ///
    /// As [`kfree`](Self::kfree).
    ///
    /// # Context
    ///
    /// Any, as `kmalloc_nolock`.
    #[track_caller]
    pub unsafe fn kfree_nolock(&self, ptr: NonNull<u8>) {
        match self.where_is(ptr.as_ptr()) {
            // What checks objects does so under locks: later.
            Ok(Where::Object(core)) => self.free_object_nolock(core, ptr),
            Ok(Where::Pages(found)) if found.word.is_reserve() => {
                self.reserve_pages_back(found.head, found.word);
            }
            Ok(Where::Pages(found)) => {
                let kind = PageType::LargeKmalloc;
                self.pages.free_block_nolock(kind, found.head, found.word);
            }
            Err(what) => self.report_object(what, None, ptr.as_ptr(), Location::caller()),
        }
    }

    /// Pages, as [`alloc_pages_node`](Self::alloc_pages_node), without waiting or taking a lock that somebody holds: this CPU's
    /// lists of any mobility, then the zones whose lock is free. Any order.
    ///
    /// Source: `alloc_pages_nolock` of Linux 6.18, without its refusals.
    ///
    /// # Context
    ///
    /// Any, as [`kmalloc_nolock`](Self::kmalloc_nolock).
    ///
    /// # Errors
    ///
    /// As `kmalloc_nolock`; [`AllocError::BadOrder`] and [`AllocError::NoZone`] as `alloc_pages_node`.
    #[track_caller]
    pub fn alloc_pages_nolock(
        &self,
        gfp: Flags,
        node: Option<usize>,
        order: usize,
    ) -> Result<Pfn, AllocError> {
        let kind = PageType::Bare;
        let (memcg, stat) = (self.memcg_for(gfp), MemcgStat::Kernel);
        let charge = self.charge_pages(memcg, Flags::EMPTY, order, stat)?;
        let block = self
            .pages
            .try_block(kind, gfp, order, node, Try::Locks, self)?;
        let word = block.word.to_owned(kind);
        let word = self.pages.set_memcg(word, charge.map_or(0, Charge::keep));
        self.pages.map.publish_block(block.pfn, word);
        Ok(block.pfn)
    }

    /// Frees an allocation of whatever type but slabs, as [`free_pages`](Self::free_pages), without waiting or taking a lock.
    /// Cannot fail: what cannot go into this CPU's list now waits for its next normal free.
    ///
    /// # Safety
    ///
    /// As `free_pages`.
    ///
    /// # Context
    ///
    /// Any, as `kmalloc_nolock`.
    #[track_caller]
    pub unsafe fn free_pages_nolock(&self, pfn: Pfn) {
        let word = self.pages.map.owned_word(pfn);
        if self.check_owned(pfn, word, Location::caller()) {
            if word.is_folio() && !self.lru_try_forget(pfn) {
                return;
            }
            if word.is_reserve() {
                return self.reserve_pages_back(pfn, word);
            }
            if word.kind() == PageType::Yours {
                self.own_freed(word);
            }
            self.pages.free_block_nolock(word.kind(), pfn, word);
        }
    }

    /// Takes objects from a slab nobody knows yet, then lists it.
    pub(crate) fn take_and_list_in(
        &self,
        core: &CacheCore,
        lists: &mut Lists,
        slab: &Slab,
        out: &mut [*mut u8],
    ) -> usize {
        lists.enter(core.geometry_of(slab));
        let n = self.take_from(core, slab, out);
        lists.inuse += n as u64;
        if slab.inuse() == 0 {
            lists.nr_empty += 1;
        }
        lists.relist(&self.pages.map, slab);
        n
    }

    /// Takes objects from partial slabs, if there are any.
    pub(crate) fn take_partial(
        &self,
        core: &CacheCore,
        lists: &mut Lists,
        out: &mut [*mut u8],
    ) -> usize {
        let map = &self.pages.map;
        let mut n = 0;
        while n < out.len() && lists.next_partial() != Pfn::NONE {
            if map.checks.on() && !self.next_fits(core, lists) {
                break;
            }
            let slab = super::cache::slab_of(map, lists.next_partial());
            if slab.inuse() == 0 {
                lists.nr_empty -= 1;
            }
            crate::inject::point("slab lists: about to take");
            n += self.take_from(core, slab, &mut out[n..]);
            crate::inject::point("slab lists: taken");
            lists.relist(map, slab);
        }
        lists.inuse += n as u64;
        n
    }
}
