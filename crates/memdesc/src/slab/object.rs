//! The way of an object, sheaf → partial slab → new slab and back; and the way of a slab.

use core::panic::Location;
use core::ptr::NonNull;

use super::cache::{CacheCore, CacheFlags, Lists, MIN_PARTIAL, Role, slab_of};
use super::debug;
use super::sheaf::BATCH;
use crate::address::{PAGE_SHIFT, Pfn, PhysAddr};
use crate::desc::{DescList, Slab, SlabList};
use crate::error::AllocError;
use crate::gfp::{self, Flags};
use crate::lockdep::classes;
use crate::memmap::{DescClass, Flaw, PageType, Word};
use crate::mm::Mm;
use crate::page_alloc::alloc::Descriptors;
use crate::page_alloc::nolock::Try;
use crate::platform::{FaultPoint, Holder, Pin, Platform, ReclaimRequest, might_lock, might_sleep};
use crate::report::Corruption;
use crate::stats::{Event, FreePath};
use crate::sync::SpinGuard;
use crate::sync::atomic::Ordering;

/// Who called, for debug caches and reports.
pub(crate) type Caller = &'static Location<'static>;

/// Flags that say which pages, and are the cache's to decide.
pub(crate) const ZONE_FLAGS: u32 = gfp::__GFP_DMA.bits()
    | gfp::__GFP_DMA32.bits()
    | gfp::__GFP_HIGHMEM.bits()
    | gfp::__GFP_MOVABLE.bits()
    | gfp::__GFP_RECLAIMABLE.bits()
    | gfp::__GFP_RCU_PREPAID.bits()
    | gfp::__GFP_ZERO.bits();

impl<P: Platform> Mm<P> {
    /// Takes the lock of a cache's slab lists. Not pinned where locks sleep.
    pub(crate) fn lists<'a>(&'a self, core: &'a CacheCore) -> SpinGuard<'a, Lists, Holder<'a, P>> {
        core.lists.lock(Holder::new(
            &self.pages.platform,
            self.pages.rt,
            &classes::SLAB_LISTS,
        ))
    }

    /// An object of this cache.
    #[inline]
    pub(crate) fn cache_alloc(
        &self,
        core: &CacheCore,
        gfp: Flags,
        caller: Caller,
    ) -> Result<NonNull<u8>, AllocError> {
        if gfp.contains(gfp::__GFP_FAST_TRY) {
            return self.cache_try_alloc(core, gfp, Try::Lists, caller);
        }
        if gfp.allow_blocking() {
            might_sleep(&self.pages.platform, "an allocation of an object");
        }
        might_lock(&self.pages.platform, self.pages.rt, &classes::SLAB_LISTS);
        if self.pages.platform.should_fail(FaultPoint::CacheAlloc) {
            let object = self.entitled_object(core, gfp, AllocError::Injected)?;
            let size = core.geometry.object_size as usize;
            self.on_alloc(core, object, gfp, size, caller);
            return Ok(object);
        }
        let object = match self.sheaf_pop(core) {
            Some(object) => object,
            None => self.cache_alloc_slow(core, gfp)?,
        };
        self.on_alloc(
            core,
            object,
            gfp,
            core.geometry.object_size as usize,
            caller,
        );
        Ok(object)
    }

    /// Checks and marks an object that is about to be handed out.
    #[inline]
    pub(crate) fn on_alloc(
        &self,
        core: &CacheCore,
        object: NonNull<u8>,
        gfp: Flags,
        asked: usize,
        caller: Caller,
    ) {
        if core.is_debug() {
            debug::on_alloc(self, core, object, asked, caller);
        }
        if gfp.contains(gfp::__GFP_ZERO) || core.flags.contains(CacheFlags::INIT_ON_ALLOC) {
            // SAFETY: the object is ours alone until we return it, and has this many bytes.
            unsafe { object.write_bytes(0, core.geometry.object_size as usize) };
        }
    }

    /// An object from this CPU's sheaf.
    #[inline]
    fn sheaf_pop(&self, core: &CacheCore) -> Option<NonNull<u8>> {
        let pin = self.pages.pin();
        let stats = self.pages.stats(&pin);
        if stats.on_free_path() {
            self.pages.allocation_on_free(&pin);
        }
        if core.sheaves.capacity() == 0 {
            return None;
        }
        let object = core.sheaves.owner(&pin, |stack| stack.pop())?;
        if core.role == Role::Objects {
            stats.add(&pin, Event::SlabAlloc, 1);
        }
        Some(object)
    }

    /// Refills the sheaf from the slabs, half of it, and takes one.
    #[cold]
    #[inline(never)]
    fn cache_alloc_slow(&self, core: &CacheCore, gfp: Flags) -> Result<NonNull<u8>, AllocError> {
        let mut batch = [core::ptr::null_mut(); BATCH];
        let want = (core.sheaves.capacity() / 2).clamp(1, BATCH);
        let taken = self.slabs_take(core, gfp, &mut batch[..want]);
        if self.pages.map.checks.pending() {
            self.report_flaws();
        }
        let pin = self.pages.pin();
        let stats = self.pages.stats(&pin);
        let n = match taken {
            Ok(n) => n,
            Err(why) => {
                stats.add(&pin, Event::SlabAllocFail, 1);
                drop(pin);
                return self.entitled_object(core, gfp, why);
            }
        };
        if core.role == Role::Objects {
            stats.add(&pin, Event::SlabAlloc, 1);
            stats.add(&pin, Event::SheafRefill, 1);
        }
        // The last one taken is ours, the rest is for the next.
        let mut left = n - 1;
        if left > 0 {
            core.sheaves.owner(&pin, |stack| {
                while left > 0 && NonNull::new(batch[left - 1]).is_none_or(|o| stack.push(o)) {
                    left -= 1;
                }
            });
            drop(pin);
            // Somebody else on this CPU filled it in the meantime.
            if left > 0 {
                self.slabs_give(core, &batch[..left], false, Location::caller());
            }
        }
        match NonNull::new(batch[n - 1]) {
            Some(object) => Ok(object),
            None => unreachable!("a slab handed out a null object"),
        }
    }

    /// Objects straight from the slabs: at least one, or an error.
    pub(crate) fn slabs_take(
        &self,
        core: &CacheCore,
        gfp: Flags,
        out: &mut [*mut u8],
    ) -> Result<usize, AllocError> {
        let n = self.slabs_take_partial(core, out);
        if n > 0 {
            return Ok(n);
        }
        match core.role {
            Role::Buddies | Role::Slabs => self.meta_slab(core, out),
            // Its pages are what they are.
            Role::Guarded => Err(AllocError::Empty),
            Role::Objects | Role::Descriptors => {
                let slab = self.new_slab(core, gfp)?;
                Ok(self.take_and_list(core, slab, out))
            }
        }
    }

    /// Objects from partial slabs, if there are any.
    pub(crate) fn slabs_take_partial(&self, core: &CacheCore, out: &mut [*mut u8]) -> usize {
        self.take_partial(core, &mut self.lists(core), out)
    }

    pub(crate) fn take_from(&self, core: &CacheCore, slab: &Slab, out: &mut [*mut u8]) -> usize {
        let base = self.pages.map.virt(slab.pfn().phys());
        let geometry = core.geometry_of(slab);
        let mut n = 0;
        slab.take(&self.pages.map, out.len(), |index| {
            out[n] = base.wrapping_add(geometry.offset(index));
            n += 1;
        });
        n
    }

    /// Takes objects from a fresh slab before anyone else can, then lists it. That is why a request never has to ask for a
    /// second slab, and the chain of seed 000 stays short however many others are at it.
    pub(crate) fn take_and_list(
        &self,
        core: &CacheCore,
        slab: &Slab,
        out: &mut [*mut u8],
    ) -> usize {
        // Descriptors of the slab may be out already, and come back on another CPU: the lock comes first.
        self.take_and_list_in(core, &mut self.lists(core), slab, out)
    }

    /// A slab for users' objects, in no list yet (`allocate_slab`).
    fn new_slab(&self, core: &CacheCore, gfp: Flags) -> Result<&Slab, AllocError> {
        if self.pages.platform.should_fail(FaultPoint::NewSlab) {
            return Err(AllocError::Injected);
        }
        let gfp = Flags::from_bits(gfp.bits() & !ZONE_FLAGS) | core.gfp;
        let take = |gfp, order: u32| {
            self.pages
                .alloc_block(PageType::Slab, gfp, order as usize, None, self)
        };
        let (wanted, least) = (core.geometry.order, core.smallest.order);
        let block = if wanted > least {
            // Not worth reclaiming for, nor a reserve: a smaller one will do.
            let lightly = (gfp
                & !(gfp::__GFP_DIRECT_RECLAIM | gfp::__GFP_NOFAIL | gfp::__GFP_HIGH))
                | gfp::__GFP_NOWARN
                | gfp::__GFP_NORETRY
                | gfp::__GFP_NOMEMALLOC;
            take(lightly, wanted).or_else(|_| take(gfp, least))?
        } else {
            take(gfp, wanted)?
        };
        let word = self.own_block(block, DescClass::Slab, PageType::Slab, None)?;
        Ok(self.make_slab(core, block.pfn, word.desc(), false, word.order()))
    }

    /// Makes a block into a slab: the descriptor first, the word last.
    pub(crate) fn make_slab(
        &self,
        core: &CacheCore,
        pfn: Pfn,
        desc: PhysAddr,
        self_described: bool,
        order: usize,
    ) -> &Slab {
        let map = &self.pages.map;
        let slab = map.slab_at(desc);
        let geometry = core.geometry_at(order);
        slab.init(
            map,
            NonNull::from(core),
            pfn,
            order,
            geometry.objects as usize,
            self_described,
        );
        self.prepaid_init(core, slab);
        self.owners_init(core, slab);
        if core.is_debug() || core.ctor.is_some() {
            let base = map.virt(pfn.phys());
            for index in 0..geometry.objects as usize {
                let object = base.wrapping_add(geometry.offset(index));
                let Some(object) = NonNull::new(object) else {
                    unreachable!()
                };
                if core.is_debug() {
                    debug::on_new(core, object);
                }
                if let Some(ctor) = core.ctor {
                    ctor(object);
                }
            }
        }
        map.publish_block(
            pfn,
            Word::described(PageType::Slab, order, desc, DescClass::Slab),
        );
        // From any context.
        let pin = Pin::try_new(&self.pages.platform);
        let stats = self.pages.any_stats(pin.as_ref());
        stats.add_any(Event::SlabNew, 1);
        slab
    }

    /// An object comes back. `nested` while descriptors are given back.
    #[inline]
    pub(crate) fn cache_free(
        &self,
        path: FreePath<'_, P>,
        core: &CacheCore,
        object: NonNull<u8>,
        nested: bool,
        caller: Caller,
    ) {
        let pin = path.pin();
        let stats = self.pages.stats(pin);
        if core.role == Role::Objects {
            stats.add(pin, Event::SlabFree, 1);
        }
        if self.kfence.contains(object.as_ptr()) {
            return self.kfence_free(path, core, object, caller);
        }
        if core.flags.has_owners() {
            self.uncharge_object(core, object);
        }
        let reserve = core.reserved.load(Ordering::Relaxed) != 0
            && self.object_is_reserve(core, object.as_ptr());
        if reserve || core.sheaves.capacity() == 0 {
            let _path = self.pages.may_sleep(path);
            if !core.is_debug() || debug::on_free(self, core, object, caller) {
                self.init_on_free(core, object);
                self.slabs_give(core, &[object.as_ptr()], nested, caller);
            }
            return;
        }
        let path = if cfg!(any(debug_assertions, feature = "checked")) {
            let path = self.pages.may_sleep(path);
            if !self.check_free(core, object, caller) {
                return;
            }
            path.unwrap_or_else(|| self.pages.free_path())
        } else {
            path
        };
        self.init_on_free(core, object);
        if !core.sheaves.owner(path.pin(), |stack| stack.push(object)) {
            self.flush_and_push(path, core, object, nested, caller);
        }
    }

    /// Flushes half of a full sheaf and puts the object in.
    #[cold]
    #[inline(never)]
    fn flush_and_push(
        &self,
        path: FreePath<'_, P>,
        core: &CacheCore,
        object: NonNull<u8>,
        nested: bool,
        caller: Caller,
    ) {
        let pin = path.pin();
        let mut batch = [core::ptr::null_mut(); BATCH];
        let half = (core.sheaves.capacity() / 2).clamp(1, BATCH);
        let (n, pushed) = core.sheaves.owner(pin, |stack| {
            let n = stack.take_cold(&mut batch[..half]);
            (n, stack.push(object))
        });
        debug_assert!(pushed, "a sheaf that was just flushed is full");
        if core.role == Role::Objects {
            self.pages.stats(pin).add(pin, Event::SheafFlush, 1);
        }
        let _path = self.pages.may_sleep(path);
        self.slabs_give(core, &batch[..n], nested, caller);
    }

    /// Takes many objects of one cache back: into the sheaf as far as they fit, the rest straight to the slabs.
    pub(crate) fn cache_free_run(&self, core: &CacheCore, objects: &[*mut u8], caller: Caller) {
        let checked = cfg!(any(debug_assertions, feature = "checked"));
        let served = core.flags.contains(CacheFlags::INIT_ON_FREE);
        let one_by_one = core.is_debug()
            || core.flags.has_owners()
            || served
            || checked
            || core.reserved.load(Ordering::Relaxed) != 0
            || self.kfence.contains_any(objects);
        if one_by_one || core.sheaves.capacity() == 0 {
            for object in objects.iter().filter_map(|o| NonNull::new(*o)) {
                self.cache_free(self.pages.free_path(), core, object, false, caller);
            }
            return;
        }
        let path = self.pages.free_path();
        let stats = self.pages.stats(path.pin());
        stats.add(path.pin(), Event::SlabFree, objects.len() as u64);
        let pushed = core.sheaves.owner(path.pin(), |stack| {
            let fits = |o: &&*mut u8| NonNull::new(**o).is_some_and(|o| stack.push(o));
            objects.iter().take_while(fits).count()
        });
        let _path = self.pages.may_sleep(path);
        for batch in objects[pushed..].chunks(64) {
            self.slabs_give(core, batch, false, caller);
        }
    }

    /// Is the slab that would be allocated from next one of this cache, and do its counts agree? They are set right if not; if it is none, its list is
    /// forgotten. Under the list lock.
    #[cold]
    pub(crate) fn next_fits(&self, core: &CacheCore, lists: &mut Lists) -> bool {
        let map = &self.pages.map;
        let head = lists.next_partial();
        let at = lists.by_share.iter().rposition(|list| list.head == head);
        let slab = map.region(head).and_then(|_| map.slab_behind(head.phys()));
        let slab = slab.filter(|(slab, _)| core::ptr::eq(slab.cache_ptr(), core));
        let (Some((slab, _)), Some(at)) = (slab, at) else {
            lists.drop_list(map, at.unwrap_or(0), head, Flaw::Word);
            return false;
        };
        if slab.list().index() != at || !lists.agrees(map, slab) {
            lists.drop_list(map, at, head, Flaw::Links);
            return false;
        }
        self.check_counts(core, slab);
        // By its list it has a free object.
        slab.inuse() < slab.objects() || {
            lists.relist(map, slab);
            false
        }
    }

    /// Sets a slab's counts right if they do not agree. Under the list lock.
    #[cold]
    pub(crate) fn check_counts(&self, core: &CacheCore, slab: &Slab) -> bool {
        let map = &self.pages.map;
        let objects = core.geometry_of(slab).objects as usize;
        let right = slab.objects() == objects && {
            let (free, astray) = slab.count_free(map);
            !astray && slab.inuse() + free == objects
        };
        if !right {
            map.checks.note(slab.pfn(), Flaw::Counts);
            slab.repair(map, objects);
        }
        right
    }

    /// Which slab of this cache an object is from, and which object it is there.
    pub(crate) fn locate(
        &self,
        core: &CacheCore,
        object: *const u8,
    ) -> Result<(&Slab, usize), Corruption> {
        let phys = self.pages.map.phys(object);
        let Ok(pfn) = u32::try_from(phys.0 >> PAGE_SHIFT) else {
            return Err(Corruption::NotRam);
        };
        let found = self.pages.map.lookup(Pfn(pfn)).ok_or(Corruption::NotRam)?;
        if found.word.kind() != PageType::Slab {
            return Err(Corruption::WrongType);
        }
        if self.pages.map.checks.on() && self.pages.map.slab_behind(phys).is_none() {
            return Err(Corruption::BadWord);
        }
        let slab = self.pages.map.slab_at(found.word.desc());
        if slab.cache() != NonNull::from(core) {
            return Err(Corruption::WrongCache);
        }
        let offset = (phys.0 - found.head.phys().0) as usize;
        match core.index_in(slab, offset) {
            Some(index) => Ok((slab, index)),
            None => Err(Corruption::NotAHead),
        }
    }

    /// Is this a live object of the cache? Reports what it is otherwise.
    #[cold]
    fn check_free(&self, core: &CacheCore, object: NonNull<u8>, caller: Caller) -> bool {
        let wrong = match self.locate(core, object.as_ptr()) {
            Err(wrong) => Some(wrong),
            Ok((slab, index)) => {
                let free = {
                    let _lists = self.lists(core);
                    slab.is_free(&self.pages.map, index)
                };
                let in_sheaf = || {
                    let pin = self.pages.pin();
                    core.sheaves.owner(&pin, |stack| stack.contains(object))
                };
                (free || in_sheaf()).then_some(Corruption::DoubleFree)
            }
        };
        if let Some(what) = wrong {
            self.report_object(what, Some(core), object.as_ptr(), caller);
        }
        wrong.is_none()
    }

    /// Objects go back to their slabs, in one hold of the list lock. Slabs left empty beyond a few go back to the page
    /// allocator.
    pub(crate) fn slabs_give(
        &self,
        core: &CacheCore,
        objects: &[*mut u8],
        nested: bool,
        caller: Caller,
    ) {
        let map = &self.pages.map;
        // Slabs to discard, chained through their links.
        let mut empty = Pfn::NONE;
        let mut wrong = None;
        {
            let mut lists = self.lists(core);
            for &object in objects {
                let (slab, index) = match self.locate(core, object) {
                    Ok(found) => found,
                    Err(what) => {
                        wrong = Some((what, object));
                        continue;
                    }
                };
                if map.checks.on() {
                    self.check_counts(core, slab);
                }
                crate::inject::point("slab lists: about to give");
                if !slab.give(map, index) {
                    wrong = Some((Corruption::DoubleFree, object));
                    continue;
                }
                lists.inuse -= 1;
                // A slab that is still being made is listed by its maker.
                if slab.list() == SlabList::NONE {
                    continue;
                }
                if slab.reserve() != 0 {
                    lists.relist(map, slab);
                    // Last: what is free again may be charged again.
                    self.reserve_objects_back(core, slab, 1);
                } else if slab.inuse() > 0 {
                    lists.relist(map, slab);
                } else if lists.nr_empty < MIN_PARTIAL || !self.prepaid_idle(core, slab) {
                    lists.nr_empty += 1;
                    lists.relist(map, slab);
                } else {
                    lists.leave(map, slab, core.geometry_of(slab));
                    slab.links().set_next(empty);
                    empty = slab.pfn();
                }
            }
        }
        if let Some((what, object)) = wrong {
            self.report_object(what, Some(core), object, caller);
        }
        if map.checks.pending() {
            self.report_flaws();
        }
        self.discard_from(core, empty, nested);
    }

    /// Gives slabs that are in no list back to the page allocator: the `struct slab` becomes the free block's buddy.
    pub(crate) fn discard(&self, mut chain: Pfn, nested: bool) {
        while chain != Pfn::NONE {
            let pfn = chain;
            let word = self.pages.map.word(pfn).load_owned();
            chain = self.pages.map.slab_at(word.desc()).links().next();
            let path = self.pages.free_path();
            let stats = self.pages.stats(path.pin());
            stats.block_back(path.pin(), PageType::Slab, word.order());
            stats.add(path.pin(), Event::SlabDiscard, 1);
            self.pages.free_block(path, pfn, word, nested, self);
        }
    }

    /// Takes the empty slabs out of a cache and gives them back (`kmem_cache_shrink`), sheaves first. Says how many pages.
    pub(crate) fn cache_shrink(&self, core: &CacheCore) -> usize {
        if core.role == Role::Guarded {
            return 0;
        }
        for cpu in 0..self.pages.platform.nr_cpus() {
            if core.sheaves.capacity() == 0 {
                break;
            }
            let mut batch = [core::ptr::null_mut(); BATCH];
            // What it held when we came; a CPU that frees meanwhile could keep us here for ever.
            for _ in 0..=core.sheaves.capacity() / BATCH {
                let n = core.sheaves.remote(&self.pages.platform, cpu, |stack| {
                    stack.take_cold(&mut batch)
                });
                if n == 0 {
                    break;
                }
                self.slabs_give(core, &batch[..n], false, Location::caller());
            }
        }
        let map = &self.pages.map;
        let mut empty = Pfn::NONE;
        let mut pages = 0;
        {
            let mut lists = self.lists(core);
            let mut at = lists.by_share[0].head;
            while at != Pfn::NONE {
                let slab = slab_of(map, at);
                at = slab.links().next();
                if slab.inuse() == 0 && self.prepaid_idle(core, slab) {
                    lists.leave(map, slab, core.geometry_of(slab));
                    lists.nr_empty -= 1;
                    slab.links().set_next(empty);
                    empty = slab.pfn();
                    pages += 1 << slab.order();
                }
            }
        }
        self.discard_from(core, empty, false);
        pages
    }

    /// Tells the platform of an object gone wrong.
    #[cold]
    pub(crate) fn report_object(
        &self,
        what: Corruption,
        core: Option<&CacheCore>,
        object: *const u8,
        caller: Caller,
    ) {
        let phys = self.pages.map.phys(object);
        let pfn = u32::try_from(phys.0 >> PAGE_SHIFT).map_or(Pfn::NONE, Pfn);
        // The page of a vmalloc address is known under a lock only.
        let area = self.is_vmalloc_addr(object) && self.may_free_here();
        let (what, pfn) = match area.then(|| self.vmalloc_to_pfn(object)).flatten() {
            Some(pfn) => (Corruption::WrongType, pfn),
            None => (what, pfn),
        };
        let mut report = self.report_at(what, pfn, object.addr(), caller);
        let name;
        if let Some((_, slot)) = self.kfence.slot_of(object) {
            // Whose it was, if it is nobody's now.
            name = slot.name();
            report.cache = Some(name.as_str());
            (report.allocated, report.freed) = slot.tracks();
        } else if let Some(core) = core {
            report.cache = Some(core.name());
            if let Some(object) = NonNull::new(object.cast_mut()) {
                report = self.report_with(report, core, object);
            }
        }
        self.pages.platform.corruption(&report);
    }
}

/// Descriptors come from `kmem_cache_buddy`, and go back to whatever cache they are from.
impl<P: Platform> Descriptors for Mm<P> {
    fn get(&self, n: usize) -> Result<DescList, AllocError> {
        if self.pages.platform.should_fail(FaultPoint::Descriptors) {
            return Err(AllocError::NoDescriptor);
        }
        let map = &self.pages.map;
        let core = self.buddy_cache();
        let mut list = DescList::new();
        {
            let pin = self.pages.pin();
            core.sheaves.owner(&pin, |stack| {
                while list.len() < n {
                    let Some(object) = stack.pop() else { break };
                    list.push(map, map.phys(object.as_ptr()));
                }
            });
        }
        while list.len() < n {
            let mut batch = [core::ptr::null_mut(); BATCH];
            // A refill brings some for the next time as well.
            match self.slabs_take(core, gfp::GFP_NOWAIT, &mut batch) {
                Ok(taken) => {
                    batch[..taken]
                        .iter()
                        .for_each(|object| list.push(map, map.phys(*object)));
                }
                Err(_) => {
                    self.put(list);
                    return Err(AllocError::NoDescriptor);
                }
            }
        }
        Ok(list)
    }

    fn try_get(&self, n: usize) -> Result<DescList, AllocError> {
        self.descs_get_nolock(n)
    }

    fn try_put(&self, list: DescList) {
        self.descs_put_nolock(list);
    }

    fn reclaim(&self, request: &ReclaimRequest) -> usize {
        let mut freed = self.free_all_deferred()
            + self.page_pools_shrink()
            + self.shrink_slab(request)
            + self.shrink_lru(request);
        // There may be enough, but in pieces.
        if request.order > 0 && (freed == 0 || request.attempt > 0) {
            freed += self.compact(request.order) << request.order;
        }
        freed
    }

    fn report_flaw(&self) {
        self.report_flaws();
    }

    fn is_memalloc(&self, gfp: Flags) -> bool {
        self.is_entitled(gfp)
    }

    fn put(&self, list: DescList) {
        self.each_desc(list, |core, object| {
            let path = self.pages.free_path();
            self.cache_free(path, core, object, true, Location::caller());
        });
    }
}

impl<P: Platform> Mm<P> {
    /// Has each descriptor freed to the cache that it is from, found through the memory map like any object's.
    pub(crate) fn each_desc(&self, mut list: DescList, free: impl Fn(&CacheCore, NonNull<u8>)) {
        let map = &self.pages.map;
        while let Some(desc) = list.pop(map) {
            let Some(object) = NonNull::new(map.virt(desc)) else {
                unreachable!()
            };
            match map.lookup(Pfn::containing(desc)) {
                Some(found) if found.word.kind() == PageType::Slab => {
                    let cache = map.slab_at(found.word.desc()).cache();
                    // SAFETY: a slab's cache lives as long as the slab, and this slab has an object out: `desc`.
                    free(unsafe { cache.as_ref() }, object);
                }
                _ => self.report_object(
                    Corruption::WrongType,
                    None,
                    object.as_ptr(),
                    Location::caller(),
                ),
            }
        }
    }
}
