//! Network pool: pages that go round between a device's receive queue and those who read packets, without the page allocator.
//!
//! ```text
//! alloc → the queue's own list → what others gave back (the stack, taken whole) → the page allocator, 64 at a time
//! put   → the last to have the page: onto the stack, if the pool is below its bound → else back to the page allocator
//! ```
//!
//! A page of a pool is under a folio's descriptor, so users may map it (TCP zero-copy receive) and the stack may pin it; whoever lets go of it last,
//! in whatever context, gives it back to its pool. Linux keeps an array for the queue and a ring with two locks for others; here both are lists through the
//! descriptors, whose first 8 bytes nobody needs while the page is idle, and the second is a stack that any context pushes on and only ever is taken whole.
//!
//! | in the descriptor | while handed out | while idle |
//! |---|---|---|
//! | links | the driver's | the next idle page |
//! | references | who has it, and one for each fragment (`pp_ref_count`) | 0: a stale reader gets nothing |
//! | index | the pool's number (16 bits), the device's page number for it (36 bits) | the same: pages stay mapped for the device |
//!
//! A pool may end before its pages do: see [`life`].
//!
//! No lock is taken here.
//!
//! Source: `net/core/page_pool.c` of Linux.

mod life;

use core::cell::UnsafeCell;
use core::fmt;
use core::panic::Location;
use core::ptr::NonNull;

use self::life::Life;
use crate::address::{PAGE_SHIFT, PAGE_SIZE, Pfn};
use crate::desc::{Folio, Held, Put};
use crate::error::AllocError;
use crate::gfp::Flags;
use crate::memmap::{DescClass, PageType, Word};
use crate::mm::{BuiltIn, Mm};
use crate::platform::{Context, Platform};
use crate::report::{Corruption, Report};
use crate::sync::PfnStack;
use crate::sync::atomic::{AtomicPtr, AtomicU32, AtomicU64, Ordering};

/// At most so many pools.
pub const MAX_PAGE_POOLS: usize = 256;
/// Pages that are asked for at once (`PP_ALLOC_CACHE_REFILL`).
const REFILL: u32 = 64;
/// Bits of the device's page number in a folio's index.
const DMA_BITS: u32 = 36;

/// How a device reaches a pool's pages. The pages stay mapped for it as long as they are the pool's.
pub trait PagePoolOps: Sync {
    /// Maps pages for the device: its address for them, below 2^48 and a multiple of the page size; `None` if it cannot reach them. Another address is
    /// unmapped again, and the pool does not take the pages: a descriptor has no room for it.
    fn dma_map(&self, pfn: Pfn, order: usize) -> Option<u64>;
    /// The pages leave the pool. From any context.
    fn dma_unmap(&self, pfn: Pfn, order: usize, addr: u64);
}

/// What a pool is to be (`page_pool_params`).
#[derive(Clone, Copy, Default)]
pub struct PagePoolParams {
    /// Pages are of this order.
    pub order: usize,
    /// At most so many lie idle (`pool_size`).
    pub pool_size: u32,
    /// Pages come from this node, or near it.
    pub node: Option<usize>,
    /// How the device reaches them; `None`: by their physical addresses.
    pub ops: Option<&'static dyn PagePoolOps>,
}

impl fmt::Debug for PagePoolParams {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PagePoolParams")
            .field("order", &self.order)
            .field("pool_size", &self.pool_size)
            .field("node", &self.node)
            .finish_non_exhaustive()
    }
}

/// What happened in a pool (`page_pool_stats`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PagePoolStats {
    /// Served from the queue's own list.
    pub alloc_fast: u64,
    /// Times the queue's list was empty and the stack was not.
    pub alloc_refill: u64,
    /// Times the page allocator was asked.
    pub alloc_slow: u64,
    /// Pages that came from it.
    pub pages_in: u64,
    /// Pages that the queue itself put back into its list.
    pub recycle_cached: u64,
    /// Pages that were put back onto the stack, as far as the queue has taken them from there.
    pub recycle_ring: u64,
    /// Pages that found the pool full.
    pub recycle_full: u64,
    /// Pages that went back to the page allocator, those included.
    pub pages_out: u64,
}

/// What all who put a page share.
#[repr(C, align(64))]
pub(crate) struct PoolCore {
    /// The link of the free list once the pool is gone.
    _link: AtomicU64,
    stack: PfnStack,
    /// Idle pages on the stack.
    stacked: AtomicU32,
    /// Idle pages in the queue's own list, as the queue, which alone changes it, tells the others.
    listed: AtomicU32,
    life: Life,
    bound: AtomicU32,
    id: AtomicU32,
    recycle_full: AtomicU64,
    pages_out: AtomicU64,
    /// Not changed while there are users.
    ops: UnsafeCell<Option<&'static dyn PagePoolOps>>,
}

#[cfg(not(loom))]
const _: () = assert!(size_of::<PoolCore>() == 128);

/// All pools, by number.
pub(crate) struct Pools([AtomicPtr<PoolCore>; MAX_PAGE_POOLS]);

impl Pools {
    pub(crate) fn new() -> Pools {
        Pools([const { AtomicPtr::new(core::ptr::null_mut()) }; MAX_PAGE_POOLS])
    }
}

/// A pool, as the one queue has it that takes pages out of it.
///
/// # Context
///
/// Its methods are called from one context at a time, as the borrow checker sees to: of a network device, from its poll function. Pages are put from anywhere.
pub struct PagePool<'m, P: Platform> {
    mm: &'m Mm<P>,
    core: NonNull<PoolCore>,
    params: PagePoolParams,
    /// The queue's own list.
    first: Pfn,
    listed: u32,
    /// The page that fragments are cut from, and the first byte that is left of it.
    frag: Option<(Pfn, usize)>,
    stats: PagePoolStats,
}

// SAFETY: the core is shared by design; all else is plain data.
unsafe impl<P: Platform> Send for PagePool<'_, P> {}

impl<P: Platform> fmt::Debug for PagePool<'_, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PagePool")
            .field("params", &self.params)
            .field("inflight", &self.inflight())
            .field("stats", &self.stats())
            .finish()
    }
}

// SAFETY: `ops` is written by who makes the pool, before anybody finds it, and read by its users; all else is atomic.
unsafe impl Sync for PoolCore {}

impl<P: Platform> Mm<P> {
    /// A pool for one receive queue (`page_pool_create`).
    ///
    /// # Context
    ///
    /// May sleep.
    ///
    /// # Errors
    ///
    /// [`AllocError::BadOrder`]; [`AllocError::Busy`] if there are [`MAX_PAGE_POOLS`]; no memory.
    ///
    /// # Examples
    ///
    /// ```
    /// use memdesc::{*, gfp::*};
    ///
    /// # let (host, ram) = memdesc_host::Host::small(16384)?;
    /// # let mm = Mm::new(host, &Config::default(), &ram)?;
    /// let mut pool = mm.page_pool_create(PagePoolParams { pool_size: 256, ..Default::default() })?;
    /// let page = pool.alloc(GFP_ATOMIC)?;
    /// // A user looks at what was received, for longer than the driver has it.
    /// let user = mm.folio_get(page).expect("alive");
    /// // SAFETY: the driver's reference.
    /// unsafe { mm.page_pool_put_page(page) };
    /// assert_eq!(pool.inflight(), 1);
    /// drop(user);
    /// // The last to have it gave it back to the pool, not to the page allocator.
    /// assert_eq!((pool.inflight(), pool.idle()), (0, 64));
    /// assert_eq!(mm.lookup(page).2.name(), "net_pool");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[track_caller]
    pub fn page_pool_create(&self, params: PagePoolParams) -> Result<PagePool<'_, P>, AllocError> {
        if params.order > crate::address::MAX_ORDER {
            return Err(AllocError::BadOrder);
        }
        let cache = self.built_in(BuiltIn::PagePool);
        let object = self.cache_alloc(cache, crate::gfp::GFP_KERNEL, Location::caller())?;
        let core = object.cast::<PoolCore>();
        // SAFETY: an object of that cache, and nobody's; who still looks at the pool that was here looks at atomics. Set before it is read as an option.
        let pool = unsafe {
            (&raw mut (*core.as_ptr()).ops).write(UnsafeCell::new(params.ops));
            core.as_ref()
        };
        let _nothing = pool.stack.take();
        for counter in [&pool.recycle_full, &pool.pages_out] {
            counter.store(0, Ordering::Relaxed);
        }
        pool.stacked.store(0, Ordering::Relaxed);
        pool.listed.store(0, Ordering::Relaxed);
        pool.bound.store(params.pool_size, Ordering::Relaxed);
        pool.life.begin();
        let free = |slot: &AtomicPtr<PoolCore>| {
            slot.compare_exchange(
                core::ptr::null_mut(),
                core.as_ptr(),
                Ordering::AcqRel,
                Ordering::Relaxed,
            )
            .is_ok()
        };
        let Some(id) = self.pools.0.iter().position(free) else {
            self.put_desc(self.pages.phys(object.as_ptr()));
            return Err(AllocError::Busy);
        };
        pool.id.store(id as u32, Ordering::Relaxed);
        Ok(PagePool {
            mm: self,
            core,
            params,
            first: Pfn::NONE,
            listed: 0,
            frag: None,
            stats: PagePoolStats::default(),
        })
    }

    /// The pool that a page is of, as its descriptor says. With the read section open: what is found may be gone, but is a pool.
    fn pool_of(&self, folio: &Folio) -> &PoolCore {
        let id = (folio.index() >> DMA_BITS) as usize;
        let core = self.pools.0[id % MAX_PAGE_POOLS].load(Ordering::Acquire);
        // SAFETY: a page of the pool keeps it, and there is one: the caller's.
        unsafe { &*core }
    }

    /// Lets go of a page of a pool, or of a fragment of one (`page_pool_put_page`, `skb_pp_recycle`). Who is the last gives it back to the pool. `page` may be
    /// any page of the block.
    ///
    /// # Safety
    ///
    /// The reference is the caller's to give up.
    ///
    /// # Context
    ///
    /// Any, an NMI included.
    #[track_caller]
    pub unsafe fn page_pool_put_page(&self, page: Pfn) {
        let caller = Location::caller();
        let found = self.pages.map.lookup(page);
        let Some(found) = found.filter(|f| f.word.kind() == PageType::NetPool) else {
            let word = found.map_or(Word::ZERO, |f| f.word);
            self.report_pool(Corruption::WrongType, page, word, caller);
            return;
        };
        let folio = self.folio_at(found.word.desc());
        if folio.held().refs == 0 {
            self.report_pool(Corruption::DoubleFree, page, found.word, caller);
            return;
        }
        if folio.put_counts(Held::REF, found.head) == Put::Last {
            self.page_pool_return(found.head, found.word);
        }
    }

    #[cold]
    fn report_pool(
        &self,
        what: Corruption,
        page: Pfn,
        word: Word,
        caller: &'static Location<'static>,
    ) {
        if what == Corruption::WrongType {
            self.report_page(page, word, caller);
            return;
        }
        let report = self.report_at(what, page, page.phys().0 as usize, caller);
        self.pages.platform.corruption(&Report { word, ..report });
    }

    /// Nobody has this page of a pool any more. From any context.
    pub(crate) fn page_pool_return(&self, head: Pfn, word: Word) {
        // Type-stable until it goes: the pool, once the page is no longer ours.
        let _read = self.rcu_read_lock();
        let pool = self.pool_of(self.folio_at(word.desc()));
        // One that failed does not go round any more.
        if pool.life.is_dying() || self.pages.map.bad.hits(head, word.order()) {
            return self.pool_release(pool, head, word);
        }
        let stacked = pool.stacked.fetch_add(1, Ordering::Relaxed);
        if stacked + pool.listed.load(Ordering::Relaxed) >= pool.bound.load(Ordering::Relaxed) {
            pool.stacked.fetch_sub(1, Ordering::Relaxed);
            pool.recycle_full.fetch_add(1, Ordering::Relaxed);
            return self.pool_release(pool, head, word);
        }
        let links = self.pages.map.buddy_at(word.desc());
        crate::inject::point("page_pool: about to push");
        pool.stack.push(head, |next| links.set_next(next));
        crate::inject::point("page_pool: pushed");
        if pool.life.left_behind() {
            self.pool_drain(pool);
        }
    }

    /// Gives back what lies on a pool's stack. From any context. Says how many pages that were.
    fn pool_drain(&self, pool: &PoolCore) -> usize {
        let mut at = pool.stack.take();
        let mut pages = 0;
        while at != Pfn::NONE {
            let word = self.pages.map.word(at).load_owned();
            let next = self.pages.map.buddy_at(word.desc()).next();
            pool.stacked.fetch_sub(1, Ordering::Relaxed);
            pages += 1 << word.order();
            // Of this pool: a page on the stack keeps it.
            self.pool_release(pool, at, word);
            at = next;
        }
        pages
    }

    /// A page leaves its pool for the page allocator; the pool is not to be looked at after that.
    fn pool_release(&self, pool: &PoolCore, head: Pfn, word: Word) {
        // SAFETY: the page is one of the pool's users.
        if let Some(ops) = unsafe { *pool.ops.get() } {
            let folio = self.folio_at(word.desc());
            ops.dma_unmap(head, word.order(), dma_of(folio));
        }
        pool.pages_out.fetch_add(1, Ordering::Relaxed);
        if self.may_lock() {
            self.take_back(self.pages.free_path(), head, word);
        } else {
            self.pages.free_block_nolock(PageType::NetPool, head, word);
        }
        self.pool_put(pool);
    }

    /// Can the caller have struck inside the allocator, or hold a lock under which none may be taken that sleeps?
    fn may_lock(&self) -> bool {
        match self.pages.platform.context() {
            Context::Task => true,
            Context::Atomic => !self.pages.rt,
            Context::HardIrq | Context::Nmi => false,
        }
    }

    /// A page or the queue leaves the pool; the last takes it away.
    fn pool_put(&self, pool: &PoolCore) {
        if !pool.life.leave() {
            return;
        }
        let id = pool.id.load(Ordering::Relaxed) as usize;
        self.pools.0[id].store(core::ptr::null_mut(), Ordering::Release);
        self.try_put_desc_at(self.pages.phys(core::ptr::from_ref(pool).cast()));
    }

    /// Gives back what lies idle in all pools but in their queues' own lists: memory is short. Says how many pages. From any context.
    pub(crate) fn page_pools_shrink(&self) -> usize {
        let mut pages = 0;
        for slot in &self.pools.0 {
            // Type-stable until it goes.
            let _read = self.rcu_read_lock();
            // SAFETY: null, or a pool, if perhaps one that is gone: its stack is empty then, or another's whose pages may go as well.
            if let Some(pool) = unsafe { slot.load(Ordering::Acquire).as_ref() } {
                pages += self.pool_drain(pool);
            }
        }
        pages
    }
}

/// The device's address of a page.
fn dma_of(folio: &Folio) -> u64 {
    (folio.index() & ((1 << DMA_BITS) - 1)) << PAGE_SHIFT
}

impl<'m, P: Platform> PagePool<'m, P> {
    fn core(&self) -> &'m PoolCore {
        // SAFETY: the queue is one of the pool's users.
        unsafe { self.core.as_ref() }
    }

    /// A page, with one reference (`page_pool_alloc_pages`). What it holds is not said, whatever the flags say: `__GFP_ZERO` zeroes what comes from the
    /// page allocator, and most pages come from elsewhere. Nobody is charged for it.
    ///
    /// # Errors
    ///
    /// As [`Mm::alloc_pages`]; [`AllocError::NoZone`] if the device cannot reach what was got.
    #[inline]
    pub fn alloc(&mut self, gfp: Flags) -> Result<Pfn, AllocError> {
        match self.pop() {
            Some((head, word)) => {
                self.stats.alloc_fast += 1;
                Ok(self.hand_out(head, word))
            }
            None => self.alloc_slow(gfp),
        }
    }

    /// The first of the queue's own list, still nobody's.
    #[inline]
    fn pop(&mut self) -> Option<(Pfn, Word)> {
        if self.first == Pfn::NONE {
            return None;
        }
        let (mm, head) = (self.mm, self.first);
        let word = mm.pages.map.word(head).load_owned();
        crate::inject::point("page_pool: about to pop");
        self.first = mm.pages.map.buddy_at(word.desc()).next();
        self.set_listed(self.listed - 1);
        Some((head, word))
    }

    #[inline]
    fn hand_out(&self, head: Pfn, word: Word) -> Pfn {
        self.mm.folio_at(word.desc()).counts().init(Held::REF);
        head
    }

    #[cold]
    fn alloc_slow(&mut self, gfp: Flags) -> Result<Pfn, AllocError> {
        let mm = self.mm;
        // What others gave back.
        self.first = self.core().stack.take();
        crate::inject::point("page_pool: stack taken");
        let (mut at, mut taken) = (self.first, 0);
        while at != Pfn::NONE {
            taken += 1;
            at = mm.pages.map.buddy(at).next();
        }
        // In this order: counted twice for a moment, so the bound is kept.
        self.set_listed(taken);
        self.core().stacked.fetch_sub(taken, Ordering::Relaxed);
        self.stats.recycle_ring += u64::from(taken);
        if let Some((head, word)) = self.pop() {
            self.stats.alloc_refill += 1;
            return Ok(self.hand_out(head, word));
        }
        self.stats.alloc_slow += 1;
        let head = self.new_page(gfp)?;
        let more = REFILL.min(self.params.pool_size) >> self.params.order;
        for _ in 1..more {
            // As far as it goes without waiting: nobody asked for these yet.
            let light = Flags::from_bits(gfp.bits() & !crate::gfp::__GFP_DIRECT_RECLAIM.bits());
            let Ok(page) = self.new_page(light) else {
                break;
            };
            self.list(page);
        }
        Ok(self.hand_out(head, mm.pages.map.word(head).load_owned()))
    }

    /// A page of the pool's that nobody has.
    fn new_page(&mut self, gfp: Flags) -> Result<Pfn, AllocError> {
        let (mm, order) = (self.mm, self.params.order);
        let kind = PageType::NetPool;
        let block = mm
            .pages
            .alloc_block(kind, gfp, order, self.params.node, mm)?;
        let word = mm.own_block(block, DescClass::File, kind, Some(gfp))?;
        let dma = match self.params.ops {
            Some(ops) => ops.dma_map(block.pfn, order).filter(|&addr| {
                // What has no room in the descriptor would be read as another pool's number.
                let fits = addr >> (DMA_BITS + PAGE_SHIFT) == 0 && addr % PAGE_SIZE as u64 == 0;
                if !fits {
                    ops.dma_unmap(block.pfn, order, addr);
                }
                fits
            }),
            None => Some(block.pfn.phys().0),
        };
        let Some(dma) = dma else {
            mm.pages.free_block_nolock(kind, block.pfn, word);
            return Err(AllocError::NoZone);
        };
        let id = u64::from(self.core().id.load(Ordering::Relaxed));
        let folio = mm.folio_at(word.desc());
        folio.init_idle(block.pfn);
        folio.set_index(id << DMA_BITS | dma >> PAGE_SHIFT);
        self.core().life.join();
        crate::inject::point("page_pool: about to publish");
        self.stats.pages_in += 1;
        mm.pages.map.word(block.pfn).publish(word);
        Ok(block.pfn)
    }

    /// Enters an idle page into the queue's own list.
    fn list(&mut self, head: Pfn) {
        self.mm.pages.map.buddy(head).set_next(self.first);
        self.first = head;
        self.set_listed(self.listed + 1);
    }

    #[inline]
    fn set_listed(&mut self, listed: u32) {
        self.listed = listed;
        self.core().listed.store(listed, Ordering::Relaxed);
    }

    /// As [`Mm::page_pool_put_page`], by the queue itself: straight into its list, where no other CPU looks (`page_pool_recycle_direct`).
    ///
    /// # Safety
    ///
    /// As there; and the page is of this pool.
    #[track_caller]
    pub unsafe fn recycle_direct(&mut self, page: Pfn) {
        let mm = self.mm;
        let full = self.idle() >= self.params.pool_size;
        match self.ours(page) {
            // Nobody else has it, nor guesses: it is idle from here on.
            Some((head, folio))
                if !full
                    && !mm.pages.map.bad.hits(head, self.params.order)
                    && folio.counts().freeze(Held::REF) =>
            {
                self.stats.recycle_cached += 1;
                self.list(head);
            }
            // SAFETY: the caller's promise.
            _ => unsafe { mm.page_pool_put_page(page) },
        }
    }

    /// Some bytes of a page that is shared with other fragments (`page_pool_alloc_frag`): where they are. Each fragment is put by itself.
    ///
    /// # Errors
    ///
    /// [`AllocError::BadSize`] for more bytes than a block of the pool has; else as [`alloc`](Self::alloc).
    pub fn alloc_frag(&mut self, size: usize, gfp: Flags) -> Result<(Pfn, usize), AllocError> {
        let bytes = PAGE_SIZE << self.params.order;
        if size > bytes {
            return Err(AllocError::BadSize);
        }
        // As Linux aligns them: to a cache line.
        let size = size.max(1).next_multiple_of(64);
        loop {
            let (head, at) = match self.frag {
                Some(frag) => frag,
                None => (self.alloc(gfp)?, 0),
            };
            let desc = self.mm.pages.map.word(head).load_owned().desc();
            if at + size <= bytes && self.mm.folio_at(desc).counts().try_get(Held::REF) {
                self.frag = Some((head, at + size));
                return Ok((head, at));
            }
            self.end_frag();
        }
    }

    /// The page that fragments are cut from is left to those who have some.
    fn end_frag(&mut self) {
        if let Some((head, _)) = self.frag.take() {
            // SAFETY: the queue's own reference.
            unsafe { self.mm.page_pool_put_page(head) };
        }
    }

    /// The device's address of the block of this pool that a page is part of; `None` if it is of no block of this pool.
    pub fn dma_addr(&self, page: Pfn) -> Option<u64> {
        // Who does not have the page reads what may be another's by now, but is a folio.
        let _read = self.mm.rcu_read_lock();
        self.ours(page).map(|(_, folio)| dma_of(folio))
    }

    /// The block of this pool that a page is part of. Of a page that the caller has, or with a read section open.
    fn ours(&self, page: Pfn) -> Option<(Pfn, &'m Folio)> {
        let mm = self.mm;
        let found = mm.pages.map.lookup(page)?;
        if found.word.kind() != PageType::NetPool {
            return None;
        }
        let folio = mm.folio_at(found.word.desc());
        let id = u64::from(self.core().id.load(Ordering::Relaxed));
        (folio.index() >> DMA_BITS == id).then_some((found.head, folio))
    }

    /// Pages that somebody has (`page_pool_inflight`).
    pub fn inflight(&self) -> u32 {
        let all = self.core().life.users() - 1;
        all.saturating_sub(self.idle())
    }

    /// Pages that lie idle.
    pub fn idle(&self) -> u32 {
        self.listed + self.core().stacked.load(Ordering::Relaxed)
    }

    /// What happened so far.
    pub fn stats(&self) -> PagePoolStats {
        let load = |n: &AtomicU64| n.load(Ordering::Relaxed);
        PagePoolStats {
            recycle_full: load(&self.core().recycle_full),
            pages_out: load(&self.core().pages_out),
            ..self.stats
        }
    }
}

impl<P: Platform> Drop for PagePool<'_, P> {
    /// Idle pages go back; those that somebody has go back when he lets go of them, and the pool with the last (`page_pool_destroy`).
    fn drop(&mut self) {
        self.end_frag();
        let (mm, core) = (self.mm, self.core());
        core.life.end();
        crate::inject::point("page_pool: ending");
        while let Some((head, word)) = self.pop() {
            mm.pool_release(core, head, word);
        }
        mm.pool_drain(core);
        mm.pool_put(core);
    }
}
