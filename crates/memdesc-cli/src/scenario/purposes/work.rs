//! What the threads do: everything at random.

use memdesc::gfp::*;
use memdesc::{
    Flags, FolioKind, MfResult, Mm, PagePool, PagePoolParams, PageType, Pfn, ReclaimRequest,
};
use memdesc_host::Host;

use super::spaces::Pins;
use super::things::{Held, Thing};
use super::{Count, DEVICE_PAGES, Dma, Note, Ring, Shared, read, try_write};
use crate::rng::Rng;

/// Orders, small ones much more often.
fn order(rng: &mut Rng) -> usize {
    match rng.below(100) {
        0..=59 => 0,
        60..=89 => rng.below(4),
        90..=98 => rng.below(8),
        _ => rng.below(11),
    }
}

/// Flags of all sorts, and whether pages have to be zero.
fn flags(rng: &mut Rng, shared: &Shared<'_>) -> (Flags, bool) {
    let mut gfp = [
        GFP_KERNEL,
        GFP_KERNEL,
        GFP_HIGHUSER_MOVABLE,
        GFP_ATOMIC,
        GFP_NOWAIT,
    ][rng.below(5)];
    if rng.one_in(3) {
        gfp |= __GFP_ACCOUNT;
    }
    let zero = rng.one_in(3);
    if zero {
        gfp |= __GFP_ZERO;
    }
    (gfp, zero || shared.zeroed)
}

/// A thread.
pub(super) struct Worker<'s, 'm> {
    pub(super) shared: &'s Shared<'m>,
    /// Its CPU; the one after the last is the thread that has none.
    pub(super) me: usize,
    pub(super) rng: Rng,
    pub(super) mine: Vec<Held>,
    /// Pages that they take.
    pub(super) weight: u64,
    pub(super) queues: Vec<PagePool<'m, Host>>,
    pub(super) pins: Pins<'m>,
    /// Allocations, pages mapped: one after the other, so that each has another byte.
    pub(super) turn: u64,
}

impl<'s, 'm> Worker<'s, 'm> {
    pub(super) fn mm(&self) -> &'m Mm<Host> {
        self.shared.mm
    }

    /// What everybody does: some hundred things in a row, then it gives way to who wants to look at all of it.
    pub(super) fn run(&mut self) {
        let _cpu = self.shared.mm.platform().claim(self.me);
        while !self.shared.stopped() {
            let _at_work = read(&self.shared.gate);
            for _ in 0..64 {
                self.step();
            }
        }
        let _at_work = read(&self.shared.gate);
        self.pins.clear();
        self.queues.clear();
        self.shared.left().append(&mut self.mine);
    }

    /// The thread without a CPU of its own keeps house.
    pub(super) fn keep_house(&mut self) {
        while !self.shared.stopped() {
            {
                let _at_work = read(&self.shared.gate);
                match self.rng.below(12) {
                    0..=1 => self.tick(),
                    2..=3 => self.failure(),
                    4..=5 => self.unpoison(),
                    6 => self.reclaim(),
                    7 => self.census(),
                    _ => self.step(),
                }
            }
            std::thread::sleep(std::time::Duration::from_micros(50));
        }
        let _at_work = read(&self.shared.gate);
        self.pins.clear();
        self.queues.clear();
        self.shared.left().append(&mut self.mine);
    }

    fn step(&mut self) {
        let shared = self.shared;
        // Whom it is charged to: the group stays as long as the step takes.
        let group = read(&shared.groups[self.rng.below(shared.groups.len())]);
        let id = group.as_ref().map_or(0, memdesc::MemCgroup::id);
        let scope = (!self.rng.one_in(3)).then(|| Host::memcg_scope(id));
        match self.rng.below(1000) {
            0..=119 => self.pages(),
            120..=169 => self.folio(),
            170..=299 => self.objects(),
            300..=329 => self.vmalloc(),
            330..=429 => self.compressed(),
            430..=499 => self.net(),
            500..=529 => self.device(),
            530..=549 => self.own(),
            550..=699 => self.look_or_free(),
            700..=839 => self.spaces(),
            840..=859 => self.file(),
            860..=884 => self.exchange(),
            885..=899 => self.map_mine(),
            900..=929 => self.failure(),
            930..=959 => self.unpoison(),
            960..=967 => self.balloon(),
            968..=975 => self.guard(),
            976..=979 => self.contig(),
            980..=983 => self.hotplug(),
            984 => self.reclaim(),
            985 => self.caches(),
            986..=989 => self.tick(),
            990 => self.rare(),
            _ => {
                drop((scope, group));
                self.groups();
            }
        }
        while self.weight > shared.share {
            self.free_one();
        }
    }

    fn byte(&mut self) -> u8 {
        self.turn += 1;
        (self.turn % 253) as u8 + 1
    }

    /// From here on it has this.
    fn keep(&mut self, thing: Thing, zeroed: bool) {
        let byte = self.byte();
        let held = Held { thing, byte };
        held.fill(self.shared, zeroed);
        self.weight += held.thing.weight();
        self.mine.push(held);
    }

    fn take_one(&mut self) -> Option<Held> {
        if self.mine.is_empty() {
            self.weight = 0;
            return None;
        }
        let which = self.rng.below(self.mine.len());
        let held = self.mine.swap_remove(which);
        self.weight -= held.thing.weight().min(self.weight);
        Some(held)
    }

    fn put_one(&mut self, held: Held) {
        self.weight += held.thing.weight();
        self.mine.push(held);
    }

    fn free_one(&mut self) {
        let Some(held) = self.take_one() else { return };
        let queue = match held.thing {
            // The queue's own way, of its own pages.
            Thing::Net { page, at: 0, len } if len >= 4096 && self.rng.one_in(3) => {
                let queues = self.queues.len();
                (queues > 0).then(|| (self.rng.below(queues), page))
            }
            _ => None,
        };
        if let Some((queue, page)) = queue {
            held.check(self.shared);
            self.shared.count(Count::Frees);
            // SAFETY: ours to give up; the queue looks whether it is one of its own.
            unsafe { self.queues[queue].recycle_direct(page) };
            return;
        }
        if let Err(held) = held.release(self.shared, &mut self.rng) {
            self.shared.count(Count::Refused);
            self.put_one(held);
        }
    }

    fn look_or_free(&mut self) {
        match self.take_one() {
            Some(held) if self.rng.one_in(3) => {
                held.check(self.shared);
                self.put_one(held);
            }
            Some(held) => {
                self.put_one(held);
                self.free_one();
            }
            None => {}
        }
    }

    fn refused<T, E>(&self, result: Result<T, E>) -> Option<T> {
        if result.is_err() {
            self.shared.count(Count::Refused);
        }
        result.ok()
    }

    fn pages(&mut self) {
        let mm = self.mm();
        let (gfp, zeroed) = flags(&mut self.rng, self.shared);
        let order = order(&mut self.rng);
        if self.rng.one_in(16) {
            let mut bulk = [Pfn::NONE; 16];
            let n = mm.alloc_pages_bulk(gfp, &mut bulk);
            for &pfn in &bulk[..n] {
                let users = false;
                self.keep(
                    Thing::Pages {
                        pfn,
                        order: 0,
                        users,
                    },
                    zeroed,
                );
            }
            return self.shared.count(Count::Pages);
        }
        let got = match self.rng.below(8) {
            0 => mm.alloc_pages_nolock(gfp, None, order),
            1 => mm.alloc_pages(gfp | __GFP_FAST_TRY, order),
            2 => mm.alloc_page_table(gfp, order.min(1)),
            _ => mm.alloc_pages(gfp, order),
        };
        let Some(pfn) = self.refused(got) else { return };
        let (_, order, memory) = mm.lookup(pfn);
        let mut users = false;
        if self.rng.one_in(8) && memory.name() == "bare" {
            let kind = [
                PageType::Anon,
                PageType::File,
                PageType::Driver,
                PageType::PageTable,
                PageType::LargeKmalloc,
            ][self.rng.below(5)];
            // SAFETY: ours, bare, whole.
            if unsafe { mm.retype(pfn, kind) }.is_ok() {
                self.shared.count(Count::Retyped);
                users = kind == PageType::Driver;
            }
        }
        self.shared.count(Count::Pages);
        self.keep(Thing::Pages { pfn, order, users }, zeroed);
    }

    fn folio(&mut self) {
        let mm = self.mm();
        let (gfp, zeroed) = flags(&mut self.rng, self.shared);
        let order = order(&mut self.rng);
        let kind = [FolioKind::File, FolioKind::Anon, FolioKind::Driver][self.rng.below(3)];
        let Some(pfn) = self.refused(mm.alloc_folio(gfp, order, kind)) else {
            return;
        };
        if kind != FolioKind::Driver
            && self.rng.one_in(2)
            && let Some(folio) = mm.folio_get(pfn)
        {
            mm.folio_add_lru(&folio, pfn);
        }
        self.shared.count(Count::Folios);
        let users = kind == FolioKind::Driver;
        self.keep(Thing::Pages { pfn, order, users }, zeroed);
    }

    fn objects(&mut self) {
        let mm = self.mm();
        let (mut gfp, _) = flags(&mut self.rng, self.shared);
        gfp = gfp & !(__GFP_HIGHMEM | __GFP_MOVABLE);
        let zeroed = gfp.contains(__GFP_ZERO);
        if self.rng.one_in(2) {
            let cache = self.rng.below(self.shared.caches.len());
            let got = mm.kmem_cache_alloc(&self.shared.caches[cache], gfp & !__GFP_ACCOUNT);
            if let Some(ptr) = self.refused(got) {
                self.shared.count(Count::Objects);
                self.keep(Thing::Object { cache, ptr }, zeroed);
            }
            return;
        }
        let len = match self.rng.below(20) {
            0..=15 => 1 + self.rng.below(1024),
            16..=18 => 1 + self.rng.below(8192),
            _ => 1 + self.rng.below(100_000),
        };
        let prepaid = len < 4096 && self.rng.one_in(8);
        if prepaid {
            gfp |= __GFP_RCU_PREPAID;
        }
        let got = match self.rng.below(8) {
            0 if !prepaid => mm.kmalloc_nolock(len, gfp),
            1 if !prepaid && gfp.allow_blocking() => mm.kvmalloc(len, gfp),
            _ => mm.kmalloc(len, gfp),
        };
        if let Some(ptr) = self.refused(got) {
            self.shared.count(Count::Objects);
            self.keep(Thing::Memory { ptr, len, prepaid }, zeroed);
        }
    }

    fn vmalloc(&mut self) {
        let mm = self.mm();
        let zeroed = self.rng.one_in(2);
        let account = if self.rng.one_in(2) {
            GFP_KERNEL_ACCOUNT
        } else {
            GFP_KERNEL
        };
        if self.rng.one_in(2) {
            let got = mm.alloc_kernel_stack(1 << self.rng.below(3), self.turn);
            if let Some(stack) = self.refused(got) {
                self.shared.count(Count::Stacks);
                self.keep(Thing::Stack(stack), true);
            }
            return;
        }
        let most = if self.rng.one_in(20) { 1 << 20 } else { 65536 };
        let len = 1 + self.rng.below(most);
        let got = match (zeroed, self.rng.one_in(8)) {
            (true, _) => mm.vzalloc(len, account),
            (_, true) => mm.vmalloc_huge(len, account),
            _ => mm.vmalloc(len, account),
        };
        if let Some(ptr) = self.refused(got) {
            self.shared.count(Count::Vmallocs);
            let prepaid = false;
            self.keep(Thing::Memory { ptr, len, prepaid }, zeroed);
        }
    }

    fn compressed(&mut self) {
        let pool = self.rng.below(self.shared.compressed.len());
        let zs = &self.shared.compressed[pool];
        if self.rng.one_in(100) {
            self.mm().zs_compact(zs);
            return self.shared.count(Count::ZsCompacts);
        }
        let len = 1 + self.rng.below(4096);
        let (gfp, _) = flags(&mut self.rng, self.shared);
        let got = self.mm().zs_malloc(zs, len, gfp & !__GFP_ZERO);
        if let Some(handle) = self.refused(got) {
            self.shared.count(Count::Compressed);
            self.keep(Thing::Compressed { pool, handle, len }, false);
        }
    }

    fn net(&mut self) {
        let mm = self.mm();
        if self.queues.len() < 2 || self.rng.one_in(100) {
            let params = PagePoolParams {
                order: if self.rng.one_in(4) { 1 } else { 0 },
                pool_size: 1 << self.rng.below(8),
                node: None,
                ops: self.rng.one_in(2).then_some(&Dma),
            };
            let Some(queue) = self.refused(mm.page_pool_create(params)) else {
                return;
            };
            self.queues.push(queue);
            if self.queues.len() > 3 {
                // Its pages may be out.
                let which = self.rng.below(self.queues.len());
                drop(self.queues.swap_remove(which));
            }
            return self.shared.count(Count::NetPools);
        }
        let (gfp, _) = flags(&mut self.rng, self.shared);
        let gfp = gfp & !(__GFP_ACCOUNT | __GFP_ZERO);
        let queue = self.rng.below(self.queues.len());
        let (page, at, len) = if self.rng.one_in(2) {
            let got = self.queues[queue].alloc(gfp);
            let Some(page) = self.refused(got) else {
                return;
            };
            (page, 0, 4096 << mm.lookup(page).1)
        } else {
            let len = 1 + self.rng.below(2048);
            let got = self.queues[queue].alloc_frag(len, gfp);
            let Some((page, at)) = self.refused(got) else {
                return;
            };
            (page, at, len)
        };
        self.shared.count(Count::NetPages);
        self.keep(Thing::Net { page, at, len }, false);
    }

    fn device(&mut self) {
        let order = [0, 0, 0, 1, 3][self.rng.below(5)];
        let mut device = self
            .shared
            .device
            .write()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        let nth = self.rng.below(DEVICE_PAGES as usize >> order) << order;
        let pfn = device.start().add(nth as u32);
        let got = device.folio(pfn, order, GFP_KERNEL & !__GFP_RECLAIM);
        drop(device);
        if self.refused(got).is_some() {
            self.shared.count(Count::Device);
            self.keep(Thing::Device { pfn, order }, false);
        }
    }

    fn own(&mut self) {
        let (gfp, zeroed) = flags(&mut self.rng, self.shared);
        let gfp = gfp & !__GFP_ACCOUNT;
        let order = order(&mut self.rng);
        let users = self.rng.one_in(2);
        let byte = (self.turn % 251) as u8;
        let got = if users {
            let ring = Ring { byte };
            self.shared
                .rings
                .alloc(gfp, order, ring)
                .map_err(|(why, _)| why)
        } else {
            let note = Note { byte };
            self.shared
                .notes
                .alloc(gfp, order, note)
                .map_err(|(why, _)| why)
        };
        let Some(pfn) = self.refused(got) else { return };
        let tail = pfn.add(self.rng.below(1 << order) as u32);
        // SAFETY: ours.
        let said = unsafe {
            match users {
                true => self.shared.rings.of(tail).map(|r| r.byte),
                false => self.shared.notes.of(tail).map(|n| n.byte),
            }
        };
        if said != Some(byte) {
            self.shared
                .wrong(format!("own type of {tail:?}: {said:?}, not {byte}"));
        }
        self.shared.count(Count::Own);
        self.shared.own_made();
        self.keep(Thing::Pages { pfn, order, users }, zeroed);
    }

    /// What one thread has another gets.
    fn exchange(&mut self) {
        let shared = self.shared;
        if let Some(held) = self.take_one() {
            shared.left().push(held);
        }
        let theirs = {
            let mut left = shared.left();
            let n = left.len();
            (n > 16).then(|| left.swap_remove(self.rng.below(n)))
        };
        if let Some(held) = theirs {
            shared.count(Count::Exchanges);
            held.check(shared);
            self.put_one(held);
        }
    }

    /// Pages of a thread's own, in an address space.
    fn map_mine(&mut self) {
        let Some(held) = self.take_one() else { return };
        let page = match held.thing {
            Thing::Pages {
                pfn,
                order,
                users: true,
            }
            | Thing::Device { pfn, order } => Some((pfn, order)),
            // A whole page; of others' bytes this thread knows nothing.
            Thing::Net { page, at: 0, len } if len >= 4096 => Some((page, 0)),
            _ => None,
        };
        if let Some((pfn, order)) = page {
            let page = pfn.add(self.rng.below(1 << order) as u32);
            self.insert(page, held.byte);
        }
        self.put_one(held);
    }

    /// A page fails, or is about to.
    fn failure(&mut self) {
        let shared = self.shared;
        if shared.failed().len() as u64 > shared.ram / 128 {
            return self.unpoison();
        }
        let mm = self.mm();
        let pfn = match self.rng.below(4) {
            0 => self.a_page_of_mine(),
            1 => self.a_users_page(),
            _ => None,
        };
        let pfn = pfn.unwrap_or_else(|| Pfn(self.rng.below_u64(shared.ram) as u32));
        if self.rng.one_in(3) {
            if mm.soft_offline_page(pfn).is_ok() {
                shared.count(Count::SoftOffline);
                shared.failed().push(pfn);
            }
            return;
        }
        let failure = mm.memory_failure(pfn);
        shared.count(match failure.result {
            MfResult::Ignored => return shared.count(Count::FailIgnored),
            MfResult::Failed => Count::FailFailed,
            MfResult::Delayed => Count::FailDelayed,
            MfResult::Recovered => Count::FailRecovered,
        });
        shared.failed().push(pfn);
    }

    fn a_page_of_mine(&mut self) -> Option<Pfn> {
        if self.mine.is_empty() {
            return None;
        }
        let which = self.rng.below(self.mine.len());
        let (pfn, order) = self.mine[which].thing.page()?;
        Some(pfn.add(self.rng.below(1 << order) as u32))
    }

    fn unpoison(&mut self) {
        let shared = self.shared;
        let pfn = {
            let mut failed = shared.failed();
            let n = failed.len();
            if n < 8 {
                return;
            }
            failed.swap_remove(self.rng.below(n))
        };
        match self.mm().unpoison_memory(pfn) {
            Ok(()) => shared.count(Count::Unpoisoned),
            // Another failed page brought it back with it.
            Err(memdesc::AllocError::Busy) => shared.count(Count::NotBad),
            Err(_) => shared.failed().push(pfn),
        }
    }

    fn balloon(&mut self) {
        let balloon = self.shared.balloon;
        let most = self.shared.ram / 8;
        if balloon.pages() < most && self.rng.one_in(2) {
            balloon.inflate(1 + self.rng.below(600) as u32, GFP_HIGHUSER);
            self.shared.count(Count::Inflates);
        } else {
            balloon.deflate(1 + self.rng.below(1200) as u32);
            self.shared.count(Count::Deflates);
        }
    }

    fn guard(&mut self) {
        let (gfp, _) = flags(&mut self.rng, self.shared);
        let order = order(&mut self.rng).min(4);
        let got = if self.rng.one_in(2) {
            self.mm().alloc_guard(gfp, order)
        } else {
            let pages = self.shared.ram >> order;
            let pfn = Pfn((self.rng.below_u64(pages) << order) as u32);
            self.mm().guard_free_pages(pfn, order).map(|()| pfn)
        };
        if let Some(pfn) = self.refused(got) {
            self.shared.count(Count::Guards);
            self.keep(Thing::Guard(pfn), false);
        }
    }

    /// An aligned range of memory.
    fn range(&mut self, orders: std::ops::Range<usize>) -> (Pfn, u32) {
        let order = orders.start + self.rng.below(orders.len());
        let nth = self.rng.below_u64(self.shared.ram >> order);
        (Pfn((nth << order) as u32), 1 << order)
    }

    fn contig(&mut self) {
        let (start, pages) = self.range(2..9);
        // Not always so that it fits.
        let pages = pages - self.rng.below(4) as u32;
        if self
            .refused(self.mm().alloc_contig_range(start, pages))
            .is_some()
        {
            self.shared.count(Count::Ranges);
            self.keep(Thing::Contig { start, pages }, false);
        }
    }

    fn hotplug(&mut self) {
        let (start, pages) = self.range(4..10);
        if self
            .refused(self.mm().offline_pages(start, pages))
            .is_some()
        {
            self.shared.count(Count::Offlines);
            self.keep(Thing::Offline { start, pages }, false);
        }
    }

    fn reclaim(&mut self) {
        let mm = self.mm();
        match self.rng.below(4) {
            0 => {
                mm.kswapd();
            }
            1 => {
                mm.compact(self.rng.below(10));
            }
            _ => {
                mm.try_to_free_pages(&ReclaimRequest {
                    gfp: GFP_KERNEL,
                    order: self.rng.below(4),
                    attempt: self.rng.below(4) as u32,
                });
            }
        }
        self.shared.count(Count::Reclaims);
    }

    /// A cache that comes and goes.
    fn caches(&mut self) {
        let mm = self.mm();
        let flags = super::cache_flags(self.rng.below(super::CACHES));
        let got = mm.kmem_cache_create("passing", 8 + self.rng.below(600), 0, flags, None);
        let Some(cache) = self.refused(got) else {
            return;
        };
        let mut objects = Vec::new();
        for _ in 0..self.rng.below(200) {
            objects.extend(mm.kmem_cache_alloc(&cache, GFP_KERNEL));
        }
        for object in objects {
            // SAFETY: ours.
            unsafe { mm.kmem_cache_free(&cache, object) };
        }
        self.shared.count(Count::Caches);
        if let Err(left) = mm.kmem_cache_destroy(cache) {
            self.shared
                .wrong(format!("a cache with {} objects that are not", left.live));
        }
    }

    fn tick(&mut self) {
        let mm = self.mm();
        self.shared.count(Count::Ticks);
        match self.rng.below(3) {
            0 => mm.tick(),
            1 => {
                mm.rcu_work();
            }
            _ => {
                if let Ok(pages) = mm.page_report() {
                    self.shared.add(Count::Reported, pages);
                }
            }
        }
    }

    fn census(&mut self) {
        let seen = self.mm().census().pages();
        if seen != self.shared.ram {
            self.shared
                .wrong(format!("a census of {seen} of {} pages", self.shared.ram));
        }
        self.shared.count(Count::Censuses);
    }

    fn rare(&mut self) {
        match self.rng.below(8) {
            0 => {
                self.mm().shrink();
                self.shared.count(Count::Shrinks);
            }
            1 => self.mm().drain_all(),
            _ => self.census(),
        }
    }

    /// Groups come, get other limits, and go.
    fn groups(&mut self) {
        let shared = self.shared;
        let which = self.rng.below(shared.groups.len());
        let limit = (1 + self.rng.below_u64(64)) << 17;
        match self.rng.below(3) {
            0 => {
                let Some(mut slot) = try_write(&shared.groups[which]) else {
                    return;
                };
                *slot = None;
                let parent = self.rng.below(shared.groups.len());
                let parent = shared.groups[parent].try_read().ok();
                let parent = parent.as_ref().and_then(|p| p.as_ref());
                let got = self.mm().memcg_create(parent, "job", limit);
                *slot = self.refused(got);
                shared.count(Count::Groups);
            }
            1 => {
                if let Some(group) = &*read(&shared.groups[which]) {
                    let _may_be_over = group.set_limit(limit);
                    shared.count(Count::Limits);
                }
            }
            _ => self.charge_space(),
        }
    }
}
