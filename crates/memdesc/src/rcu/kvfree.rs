//! `kvfree_rcu`: memory that is freed after a grace period, without a callback for each piece.
//!
//! Each CPU keeps *blocks*: a page of pointers each, one kind of block for slab objects and one for large memory. A full
//! block remembers the grace period that it waits for, and is freed in bulk when that is over, a run of objects of one
//! cache at a time. Source: `mm/slab_common.c` of Linux 6.18 and seed 001, whose fast try is where the pages come from.
//!
//! - *With a head* ([`Mm::kvfree_rcu`]): from any context, never allocates for it, never fails. Where no page is to be had, or somebody
//!   is inside, the object's own head puts it on a stack.
//! - *Without* ([`Mm::kvfree_rcu_mightsleep`]): where no page is to be had it waits for the grace period there and then.
//! - *Prepaid*: see [`prepaid`](super::prepaid).
//!
//! Nobody drains in the background: who queues pointers in a context that may sleep frees some that are due in passing, faster than he
//! queues; one that may not kicks the platform, and [`Mm::tick`] does the rest. So a flood pays for itself, and its backlog is a few blocks. If readers keep
//! a grace period from ending, blocks add up to [`Config::kvfree_backlog`](crate::Config::kvfree_backlog), and then who floods waits, if he may.
//!
//! Lock order: that of a CPU's blocks is a leaf; nothing is freed under it.

use core::ptr::NonNull;

use super::block::{Block, CHANNELS, Inner, Krc, MIN_CACHED, Queued};
use super::{Cookie, Rcu, RcuHead};
use crate::address::PAGE_SIZE;
use crate::error::AllocError;
use crate::gfp;
use crate::memmap::PageType;
use crate::mm::Mm;
use crate::page_alloc::nolock::Try;
use crate::platform::{Context, Pin, Platform, might_sleep};
use crate::slab::kmalloc::Where;
use crate::stats::Event;
use crate::sync::atomic::{AtomicPtr, Ordering};

/// Full blocks worth a grace period: one membarrier or one round of IPIs for so many pointers.
const WORTH_IT: u32 = 3;
/// So many objects that wait by their heads are worth as much as a full block.
const HEADS: u64 = 256;
/// Every so many pointers some of the ripe block are freed, half as many again.
const STRIDE: u64 = 16;

impl<P: Platform> Mm<P> {
    fn krc(&self, pin: Option<&Pin<'_, P>>) -> &Krc {
        &self.krcs[pin.map_or(0, Pin::cpu)]
    }

    /// On its own CPU as its owner, from another as a remote.
    fn with_krc<R>(&self, cpu: usize, mut f: impl FnMut(&mut Inner) -> R) -> R {
        let (krc, platform) = (&self.krcs[cpu], &self.pages.platform);
        let pin = self.pages.pin();
        if pin.cpu() == cpu
            && let Some(result) = krc.try_owner(&pin, &mut f)
        {
            return result;
        }
        drop(pin);
        krc.remote(platform, f)
    }

    fn channel_of(&self, ptr: NonNull<u8>) -> usize {
        // Large memory is whole pages.
        if !ptr.addr().get().is_multiple_of(PAGE_SIZE) {
            return 0;
        }
        if self.is_vmalloc_addr(ptr.as_ptr()) {
            return 1;
        }
        let kind = self.pages.map.lookup(self.virt_to_pfn(ptr.as_ptr()));
        usize::from(kind.is_none_or(|found| found.word.kind() != PageType::Slab))
    }

    /// Frees an object after a grace period (`kvfree_rcu`, two arguments): what `kmalloc`, a cache or `vmalloc` gave.
    ///
    /// # Safety
    ///
    /// As [`kfree`](Self::kfree), but readers that entered before may go on using the object. `head` lies in it, or lives as
    /// long as it does, and is used for nothing else.
    ///
    /// # Context
    ///
    /// Any, an NMI and a signal handler that says what it is included. Allocates nothing that it needs, cannot fail. May free what is due if the
    /// context allows, and in a thread that may sleep waits when far too much is queued.
    #[inline]
    pub unsafe fn kvfree_rcu(&self, object: NonNull<u8>, head: NonNull<RcuHead>) {
        let channel = self.channel_of(object);
        let pin = Pin::try_new(&self.pages.platform);
        let krc = self.krc(pin.as_ref());
        let mut queued = pin
            .as_ref()
            .and_then(|pin| krc.try_owner(pin, |inner| self.record(inner, channel, object)));
        if let Some(Queued::NoBlock) = queued
            && let Some(pin) = &pin
            && let Ok(block) = self.blank_block(gfp::__GFP_FAST_TRY)
        {
            queued = self.push_with(pin, krc, block, channel, object);
        }
        if matches!(queued, None | Some(Queued::NoBlock)) {
            let n = krc.nr_heads.fetch_add(1, Ordering::Relaxed) + 1;
            krc.hungry.store(1, Ordering::Relaxed);
            if n.is_multiple_of(HEADS) {
                queued = Some(Queued::Full);
            }
            // SAFETY: the head is ours until the grace period is over.
            unsafe {
                let what: &AtomicPtr<()> = &head.as_ref().what;
                what.store(object.as_ptr().cast(), Ordering::Relaxed);
                krc.heads.push_head(head);
            }
            self.pages
                .any_stats(pin.as_ref())
                .add_any(Event::KvfreeHead, 1);
        }
        drop(pin);
        self.kvfree_after(queued);
    }

    /// What is to be done once a pointer is queued and the CPU let go of.
    #[inline]
    fn kvfree_after(&self, queued: Option<Queued>) {
        match queued {
            Some(Queued::Full) => self.kvfree_full(),
            Some(Queued::Ripe) => self.kvfree_some(),
            _ => {}
        }
    }

    /// Frees an object after a grace period (`kvfree_rcu_mightsleep`, one argument); it needs no head. Waits for the grace
    /// period if there is no memory for the pointer.
    ///
    /// # Safety
    ///
    /// As [`kvfree_rcu`](Self::kvfree_rcu).
    ///
    /// # Context
    ///
    /// May sleep. Not in a read section.
    pub unsafe fn kvfree_rcu_mightsleep(&self, object: NonNull<u8>) {
        might_sleep(&self.pages.platform, "kvfree_rcu_mightsleep");
        let channel = self.channel_of(object);
        let mut blank = None;
        let mut round = 0;
        loop {
            let pin = self.pages.pin();
            let krc = self.krc(Some(&pin));
            let queued = match blank.take() {
                Some(block) => self.push_with(&pin, krc, block, channel, object),
                None => krc.try_owner(&pin, |inner| self.record(inner, channel, object)),
            };
            match queued {
                Some(Queued::Yes | Queued::Full | Queued::Ripe) => {
                    drop(pin);
                    return self.kvfree_after(queued);
                }
                // Another CPU drains: soon over.
                None => {
                    drop(pin);
                    self.pages.platform.relax(round);
                    round = round.saturating_add(1);
                }
                Some(Queued::NoBlock) => {
                    drop(pin);
                    let lightly = gfp::GFP_KERNEL
                        | gfp::__GFP_NORETRY
                        | gfp::__GFP_NOMEMALLOC
                        | gfp::__GFP_NOWARN;
                    let block = self
                        .blank_block(gfp::__GFP_FAST_TRY)
                        .or_else(|_| self.blank_block(lightly));
                    match block {
                        Ok(block) => blank = Some(block),
                        Err(_) => {
                            let pin = self.pages.pin();
                            self.pages
                                .any_stats(Some(&pin))
                                .add_any(Event::KvfreeWaited, 1);
                            drop(pin);
                            self.pages.platform.rcu().synchronize();
                            // SAFETY: the caller's promise, and the grace period is over.
                            unsafe { self.kvfree(object) };
                            return;
                        }
                    }
                }
            }
        }
    }

    /// Puts a pointer in. A block that is full then waits from now on.
    #[inline]
    fn record(&self, inner: &mut Inner, channel: usize, object: NonNull<u8>) -> Queued {
        let queued = inner.push(channel, object.as_ptr(), || self.pages.platform.now());
        match queued {
            // One cookie for all of the block: all in it were unlinked before.
            Queued::Full => inner.close(channel, self.pages.platform.rcu().get_state()),
            Queued::Yes if !inner.ripe.is_null() && inner.nr.is_multiple_of(STRIDE) => {
                return Queued::Ripe;
            }
            _ => {}
        }
        queued
    }

    fn push_with(
        &self,
        pin: &Pin<'_, P>,
        krc: &Krc,
        block: NonNull<Block>,
        channel: usize,
        object: NonNull<u8>,
    ) -> Option<Queued> {
        let mut kept = false;
        let queued = krc.try_owner(pin, |inner| {
            // Room for one is made, however few are to be kept.
            let keep = core::mem::replace(&mut inner.keep, u32::MAX);
            kept = inner.add_blank(block);
            inner.keep = keep;
            self.record(inner, channel, object)
        });
        if !kept {
            self.free_block_page(block);
        }
        queued
    }

    /// A page for pointers.
    fn blank_block(&self, gfp: gfp::Flags) -> Result<NonNull<Block>, AllocError> {
        let kind = PageType::Bare;
        let block = if gfp.contains(gfp::__GFP_FAST_TRY) {
            self.pages
                .try_block(kind, gfp::Flags::EMPTY, 0, None, Try::Lists, self)?
        } else {
            self.pages.alloc_block(kind, gfp, 0, None, self)?
        };
        self.pages
            .map
            .publish_block(block.pfn, block.word.to_owned(kind));
        self.kvfree_pages.fetch_add(1, Ordering::Relaxed);
        NonNull::new(self.page_address(block.pfn).cast()).ok_or(AllocError::Empty)
    }

    fn free_block_page(&self, block: NonNull<Block>) {
        self.kvfree_pages.fetch_sub(1, Ordering::Relaxed);
        // SAFETY: from `blank_block`, and nobody has it any more.
        unsafe { self.free_pages_nolock(self.virt_to_pfn(block.as_ptr().cast())) };
    }

    /// May what is due be freed here? That takes locks that sleep under RT, and the caller may hold a raw one (seed 001's complaint).
    pub(crate) fn may_free_here(&self) -> bool {
        self.pages.platform.context() == Context::Task
    }

    /// A block is full: frees what is due; waits, if that is allowed, when far too much is queued.
    #[cold]
    #[inline(never)]
    fn kvfree_full(&self) {
        if !self.may_free_here() {
            return self.pages.platform.kick();
        }
        let cpu = self.pages.pin().cpu();
        let rcu = self.pages.platform.rcu();
        let krc = &self.krcs[cpu];
        let (full, nr) = self.with_krc(cpu, |inner| {
            inner.ripen(|cookie| rcu.poll_state(cookie));
            (inner.nr_full, inner.nr)
        });
        let heads = krc.nr_heads.load(Ordering::Relaxed);
        if heads > 0 {
            // A batch that is due goes, the next one gets its grace period, and those who come now a page.
            self.kvfree_heads(cpu);
            self.kvfree_feed(cpu);
        }
        if full >= WORTH_IT || heads > 0 {
            rcu.start_poll();
            rcu.advance();
            self.with_krc(cpu, |inner| inner.ripen(|cookie| rcu.poll_state(cookie)));
        }
        // Behind by more than is emptied in passing.
        let nr = nr + heads;
        if nr > u64::from(self.kvfree_backlog) / 2 {
            self.kvfree_due(cpu);
        }
        if nr > u64::from(self.kvfree_backlog) && self.may_wait() {
            self.pages
                .any_stats(Some(&self.pages.pin()))
                .add_any(Event::KvfreeThrottled, 1);
            rcu.synchronize_expedited();
            self.kvfree_due(cpu);
        }
    }

    /// Frees some of the ripe block: a few more than were queued since the last time. They fit the sheaf, from which as many were taken
    /// meanwhile, if the CPU allocates as much as it frees; so nothing goes to the slabs, and no lock is shared with anyone.
    #[inline(never)]
    fn kvfree_some(&self) {
        if !self.may_free_here() {
            return;
        }
        let cpu = self.pages.pin().cpu();
        let krc = &self.krcs[cpu];
        let rcu = self.pages.platform.rcu();
        let mut out = [core::ptr::null_mut(); STRIDE as usize * 3 / 2];
        let (n, spare) = self.with_krc(cpu, |inner| {
            let (n, empty) = inner.take_ripe(&mut out);
            // Under the lock: they are in one of the two counts for whoever looks.
            krc.draining.fetch_add(n as u64, Ordering::Relaxed);
            inner.ripen(|cookie| rcu.poll_state(cookie));
            (n, empty.filter(|block| !inner.add_blank(*block)))
        });
        self.kfree_bulk_unchecked(&out[..n]);
        // Release pairs with the Acquire in `kvfree_queued`.
        krc.draining.fetch_sub(n as u64, Ordering::Release);
        if let Some(block) = spare {
            self.free_block_page(block);
        }
    }

    /// Frees what is due on a CPU; says how many pointers and heads.
    pub(crate) fn kvfree_due(&self, cpu: usize) -> usize {
        let krc = &self.krcs[cpu];
        let rcu = self.pages.platform.rcu();
        let mut freed = 0;
        loop {
            let block = self.with_krc(cpu, |inner| {
                let block = inner.due(|cookie| rcu.poll_state(cookie))?;
                // SAFETY: a block that was taken out is ours.
                let nr = unsafe { (*block.as_ptr()).nr };
                // Under the lock: it is in one of the two counts for whoever looks.
                krc.draining.fetch_add(nr, Ordering::Relaxed);
                Some(block)
            });
            let Some(block) = block else { break };
            // SAFETY: the block is ours, and all it records is due.
            let records = unsafe {
                let nr = (*block.as_ptr()).nr as usize;
                core::slice::from_raw_parts((&raw const (*block.as_ptr()).records).cast(), nr)
            };
            self.kfree_bulk_unchecked(records);
            freed += records.len();
            // Release pairs with the Acquire in `kvfree_queued`.
            krc.draining
                .fetch_sub(records.len() as u64, Ordering::Release);
            if !self.with_krc(cpu, |inner| inner.add_blank(block)) {
                self.free_block_page(block);
            }
        }
        freed + self.kvfree_heads(cpu)
    }

    /// Frees those that came by their heads, if that is due, and lets the next batch wait: one at a time. Says how many were freed.
    fn kvfree_heads(&self, cpu: usize) -> usize {
        let krc = &self.krcs[cpu];
        let rcu = self.pages.platform.rcu();
        if krc.nr_heads.load(Ordering::Relaxed) == 0 {
            return 0;
        }
        let due = self.with_krc(cpu, |inner| {
            if inner.heads.is_null() || !rcu.poll_state(Cookie(inner.cookie)) {
                return core::ptr::null_mut();
            }
            core::mem::replace(&mut inner.heads, core::ptr::null_mut())
        });
        let heads = self.free_heads(due);
        krc.nr_heads.fetch_sub(heads as u64, Ordering::Release);
        self.with_krc(cpu, |inner| {
            if inner.heads.is_null() && !krc.heads.is_empty() {
                inner.heads = krc.heads.take();
                inner.cookie = rcu.start_poll().0;
            }
        });
        heads
    }

    fn free_heads(&self, mut at: *mut RcuHead) -> usize {
        let mut batch = [core::ptr::null_mut(); 64];
        let (mut n, mut freed) = (0, 0);
        while let Some(head) = NonNull::new(at) {
            // SAFETY: heads whose grace period is over are ours; the next is read before the object goes.
            unsafe {
                batch[n] = head.as_ref().what.load(Ordering::Relaxed).cast();
                at = head.as_ref().next.load(Ordering::Relaxed);
            }
            n += 1;
            if n == batch.len() || at.is_null() {
                self.kfree_bulk_unchecked(&batch[..n]);
                freed += n;
                n = 0;
            }
        }
        freed
    }

    /// The periodic work: blocks that have lain half full for long wait from now on, blank pages are provided, what is due is freed.
    pub(crate) fn kvfree_tick(&self, hurry: bool) -> usize {
        let platform = &self.pages.platform;
        let rcu = platform.rcu();
        let now = platform.now();
        let mut freed = 0;
        for cpu in 0..self.krcs.len() {
            self.with_krc(cpu, |inner| {
                for channel in 0..CHANNELS {
                    let lain = now.saturating_sub(inner.since[channel]);
                    if !inner.filling[channel].is_null() && (hurry || lain >= self.kvfree_drain_ns)
                    {
                        inner.close(channel, rcu.start_poll());
                    }
                }
                if inner.nr_full > 0 {
                    rcu.start_poll();
                }
                if now >= inner.keep_again {
                    inner.keep = MIN_CACHED;
                }
            });
            self.kvfree_feed(cpu);
            // Collects heads; pushes on; and what is begun here may be over at once.
            freed += self.kvfree_due(cpu);
            rcu.advance();
            freed += self.kvfree_due(cpu);
        }
        freed
    }

    /// Provides blank pages for those who had none.
    fn kvfree_feed(&self, cpu: usize) {
        if self.krcs[cpu].hungry.swap(0, Ordering::Relaxed) == 0 {
            return;
        }
        let lightly = gfp::GFP_NOWAIT | gfp::__GFP_NOMEMALLOC;
        while self.with_krc(cpu, |inner| inner.nr_blank < inner.keep)
            && let Ok(block) = self.blank_block(lightly)
        {
            if !self.with_krc(cpu, |inner| inner.add_blank(block)) {
                self.free_block_page(block);
            }
        }
    }

    /// Waits until all that was given to `kvfree_rcu` and its kin before is freed (`kvfree_rcu_barrier`).
    ///
    /// # Context
    ///
    /// May sleep. Not in a read section.
    pub fn kvfree_rcu_barrier(&self) {
        let rcu = self.pages.platform.rcu();
        // Heads that are behind a running batch take a grace period more, and what is being freed elsewhere a moment. Others may
        // go on queueing: what was there when we came is gone after so many rounds.
        for round in 0.. {
            self.kvfree_tick(true);
            self.prepaid_tick();
            let draining = |k: &Krc| k.draining.load(Ordering::Acquire) > 0;
            let busy = self.krcs.iter().any(draining);
            if !busy && (round >= 4 || self.kvfree_queued() == 0 && !self.prepaid_any()) {
                return;
            }
            if round < 4 {
                rcu.synchronize_expedited();
            } else {
                self.pages.platform.relax(round);
            }
        }
    }

    /// Pointers and objects that wait for their grace period, those of prepaid caches aside.
    ///
    /// # Context
    ///
    /// May wait for other CPUs.
    pub fn kvfree_queued(&self) -> u64 {
        let of = |cpu: usize| {
            let krc = &self.krcs[cpu];
            let nr = self.with_krc(cpu, |inner| inner.nr);
            // Acquire pairs with the Release in `kvfree_due`.
            nr + krc.nr_heads.load(Ordering::Acquire) + krc.draining.load(Ordering::Acquire)
        };
        (0..self.krcs.len()).map(of).sum()
    }

    /// Pages that hold pointers, or wait to.
    pub(crate) fn kvfree_pages(&self) -> u64 {
        self.kvfree_pages.load(Ordering::Relaxed)
    }

    /// Memory is short: blank pages go back and are not collected again for a while (the `rcu-kfree` shrinker); what is due is
    /// freed. Says how many pages and objects came free.
    pub(crate) fn kvfree_shrink(&self) -> usize {
        let platform = &self.pages.platform;
        let mut freed = 0;
        let again = platform.now() + self.kvfree_drain_ns;
        for cpu in 0..self.krcs.len() {
            loop {
                let blank = self.with_krc(cpu, |inner| {
                    inner.keep = 1;
                    inner.keep_again = again;
                    let block = NonNull::new(inner.blank)?;
                    // SAFETY: blank blocks are ours.
                    inner.blank = unsafe { (*block.as_ptr()).next };
                    inner.nr_blank -= 1;
                    Some(block)
                });
                let Some(block) = blank else { break };
                self.free_block_page(block);
                freed += 1;
            }
        }
        freed + self.kvfree_tick(true)
    }

    /// Frees many objects, runs of one cache together.
    pub(crate) fn kfree_bulk_unchecked(&self, objects: &[*mut u8]) {
        let mut rest = objects;
        let caller = core::panic::Location::caller();
        while let Some(first) = rest.first().copied().and_then(NonNull::new) {
            match self.where_is(first.as_ptr()) {
                Ok(Where::Object(core)) => {
                    let same = |&&object: &&*mut u8| match self.where_is(object) {
                        Ok(Where::Object(other)) => core::ptr::eq(core, other),
                        _ => false,
                    };
                    let run = 1 + rest[1..].iter().take_while(same).count();
                    self.cache_free_run(core, &rest[..run], caller);
                    rest = &rest[run..];
                }
                Ok(Where::Pages(found)) if found.word.is_reserve() => {
                    self.reserve_pages_back(found.head, found.word);
                    rest = &rest[1..];
                }
                Ok(Where::Pages(found)) => {
                    self.take_back(self.pages.free_path(), found.head, found.word);
                    rest = &rest[1..];
                }
                Err(_) if self.is_vmalloc_addr(first.as_ptr()) => {
                    // SAFETY: who queued it promised that it is his, and nobody uses it any more.
                    unsafe { self.vfree(first) };
                    rest = &rest[1..];
                }
                Err(what) => {
                    self.report_object(what, None, first.as_ptr(), caller);
                    rest = &rest[1..];
                }
            }
        }
    }
}
