//! Per-CPU pages: free blocks that one CPU keeps for itself, so that most requests never see the zone lock.
//!
//! A list is a stack, linked through the blocks' buddies like everything else, so it needs no memory of its
//! own and has no bound but the mark. Lists per mobility for orders 0 to 3, and two for order 9.
//!
//! Lock order: a CPU's [`LocalLock`] is a leaf. A refill takes blocks under the zone lock into a chain on the
//! stack, drops it, and pushes the chain here; a drain the other way round.

use super::buddy::Block;
use crate::address::{PAGEBLOCK_ORDER, Pfn};
use crate::lockdep::{Acquire, classes};
use crate::memmap::word::AtomicWord;
use crate::memmap::{Flaw, MemMap, Word};
use crate::page_alloc::MigrateType;
use crate::platform::{Checked, Pin, Platform, PlatformBarriers};
use crate::sync::atomic::{AtomicU32, Ordering};
use crate::sync::{LocalLock, PfnStack, UnsafeCell};

/// Orders below this have a list per mobility.
const PCP_ORDERS: usize = 4;
/// How many lists: mobilities × orders 0–3, and order 9 movable or not.
const NR_LISTS: usize = MigrateType::PCP_TYPES * PCP_ORDERS + 2;
/// A refill takes up to `batch << PCP_BATCH_SCALE_MAX` pages when refills follow each other.
const PCP_BATCH_SCALE_MAX: u32 = 5;

/// Blocks put in by a refill in one hold of the lock.
const FILL_HOLD: u32 = 64;

/// Is this order kept in per-CPU lists?
#[inline]
pub(crate) const fn allowed(order: usize) -> bool {
    order < PCP_ORDERS || order == PAGEBLOCK_ORDER
}

#[inline]
const fn index(order: usize, mt: MigrateType) -> usize {
    // What is kept for atomic allocations is not kept apart here; it returns to its own lists by the zone.
    let mt = if matches!(mt, MigrateType::HighAtomic) {
        MigrateType::Unmovable
    } else {
        mt
    };
    if order < PCP_ORDERS {
        order * MigrateType::PCP_TYPES + mt as usize
    } else {
        PCP_ORDERS * MigrateType::PCP_TYPES + matches!(mt, MigrateType::Movable) as usize
    }
}

const fn order_of(index: usize) -> usize {
    if index < PCP_ORDERS * MigrateType::PCP_TYPES {
        index / MigrateType::PCP_TYPES
    } else {
        PAGEBLOCK_ORDER
    }
}

/// Blocks chained through their buddies, outside any list.
#[derive(Debug)]
#[must_use = "pages would be lost"]
pub(crate) struct Chain {
    head: Pfn,
    pub(crate) blocks: u32,
}

impl Chain {
    pub(crate) const fn new() -> Chain {
        Chain {
            head: Pfn::NONE,
            blocks: 0,
        }
    }

    #[inline]
    pub(crate) fn push(&mut self, map: &MemMap, block: Block) {
        map.word(block.pfn).publish(block.word);
        map.buddy_at(block.word.desc()).set_next(self.head);
        self.head = block.pfn;
        self.blocks += 1;
    }

    #[inline]
    pub(crate) fn pop(&mut self, map: &MemMap) -> Option<Block> {
        if self.head == Pfn::NONE {
            return None;
        }
        let pfn = self.head;
        let word = map.word(pfn).load_owned();
        self.head = map.buddy_at(word.desc()).next();
        self.blocks -= 1;
        Some(Block { pfn, word })
    }
}

/// What the local lock guards.
///
/// # Invariants
///
/// `count` is the number of pages in all lists; `counts[i]` the number of blocks in list `i`. Each block's head's word says
/// free, its order, and P.
#[derive(Debug)]
struct Lists {
    heads: [Pfn; NR_LISTS],
    counts: [u32; NR_LISTS],
    count: u32,
    /// More pages than this and some go back to the zone.
    high: u32,
    high_min: u32,
    high_max: u32,
    batch: u32,
    /// log2 of how much the next refill is scaled up: grows while refills follow each other, reset by a drain.
    alloc_factor: u32,
    /// Drains in a row, for the same on the way back.
    free_factor: u32,
    /// Where the next drain starts.
    next: u32,
}

/// The per-CPU pages of one CPU and zone.
#[derive(Debug)]
#[repr(C, align(64))]
pub(crate) struct PerCpuPages {
    lock: LocalLock,
    deferred: Deferred,
    lists: UnsafeCell<Lists>,
}

/// Blocks freed where the lists could not be entered: a stack that any context, and any CPU, pushes on without a lock, and that
/// is only ever taken as a whole, so that no block can come back under a pusher's hands. Linked through the blocks'
/// buddies. The next normal free on the CPU takes it to the zone.
#[derive(Debug)]
struct Deferred {
    stack: PfnStack,
    /// Pages in it, for the ledger.
    pages: AtomicU32,
}

/// Somebody is inside.
#[derive(Debug)]
pub(crate) struct Contended;

/// There is a bad page in the block.
struct BadPage;

// SAFETY: `lists` is reached only through `owner` and `remote`, which hold the local lock.
unsafe impl Sync for PerCpuPages {}
// SAFETY: it owns nothing that belongs to a thread.
unsafe impl Send for PerCpuPages {}

/// What a look at one CPU's lists shows.
#[derive(Clone, Copy, Debug, Default)]
pub struct PcpView {
    /// Pages in the lists, those freed without a lock and not yet taken further included.
    pub count: u32,
    /// The mark above which pages go back.
    pub high: u32,
    /// The batch of a refill or drain, before scaling.
    pub batch: u32,
}

impl PerCpuPages {
    /// Lists for a zone of this many pages (`zone_batchsize`, `zone_highsize`).
    pub(crate) fn new(managed: u64, low_mark: u64, nr_cpus: usize) -> PerCpuPages {
        let quarter = (managed / 1024).min(256) / 4;
        let scaled = (quarter + quarter / 2).max(1);
        let batch = ((1u64 << scaled.ilog2()) - 1).max(1) as u32;
        let per_cpu = |pages: u64| (pages / nr_cpus as u64).min(u64::from(u32::MAX / 2)) as u32;
        let high_min = per_cpu(low_mark).max(batch * 4);
        let high_max = per_cpu(managed / 8).max(high_min);
        PerCpuPages {
            lock: LocalLock::new(),
            deferred: Deferred {
                stack: PfnStack::new(),
                pages: AtomicU32::new(0),
            },
            lists: UnsafeCell::new(Lists {
                heads: [Pfn::NONE; NR_LISTS],
                counts: [0; NR_LISTS],
                count: 0,
                high: high_min,
                high_min,
                high_max,
                batch,
                alloc_factor: 0,
                free_factor: 0,
                next: 0,
            }),
        }
    }

    #[inline]
    fn owner<P: Platform, R>(&self, pin: &Pin<'_, P>, f: impl FnOnce(&mut Lists) -> R) -> R {
        let _checked = Checked::new(pin.platform(), &classes::PCP, Acquire::Lock);
        let _guard = self.lock.enter(&PlatformBarriers(pin.platform()));
        // SAFETY: the local lock is held, so this is the only reference.
        f(unsafe { &mut *self.lists.get_mut_ptr() })
    }

    fn remote<P: Platform, R>(&self, platform: &P, f: impl FnOnce(&mut Lists) -> R) -> R {
        // An interrupt here that came to this CPU's own would wait for us.
        let _pin = Pin::new(platform);
        let _checked = Checked::new(platform, &classes::PCP, Acquire::Lock);
        let _guard = self.lock.enter_remote(&PlatformBarriers(platform));
        // SAFETY: as in `owner`.
        f(unsafe { &mut *self.lists.get_mut_ptr() })
    }

    /// Takes a block from the list, hottest first.
    #[inline]
    pub(crate) fn pop<P: Platform>(
        &self,
        pin: &Pin<'_, P>,
        map: &MemMap,
        order: usize,
        mt: MigrateType,
    ) -> Option<Block> {
        self.owner(pin, |lists| lists.pop(map, index(order, mt)))
    }

    /// Takes up to `n` order-0 blocks, under one hold of the lock.
    pub(crate) fn pop_many<P: Platform>(
        &self,
        pin: &Pin<'_, P>,
        map: &MemMap,
        n: usize,
        mt: MigrateType,
        mut each: impl FnMut(Block),
    ) {
        self.owner(pin, |lists| {
            for _ in 0..n {
                let Some(block) = lists.pop(map, index(0, mt)) else {
                    break;
                };
                each(block);
            }
        });
    }

    /// Puts a block in: its tails' words are zero. If that is one too many, so many pages should be drained. A block with a bad page in it is
    /// deferred: the zone cuts it out.
    #[inline]
    pub(crate) fn push<P: Platform>(
        &self,
        pin: &Pin<'_, P>,
        map: &MemMap,
        cell: &AtomicWord,
        pfn: Pfn,
        word: Word,
        mt: MigrateType,
    ) -> Option<u32> {
        let over = self.owner(pin, |lists| {
            // Inside: who marks a page enters the lists afterwards, and finds it in them or finds us gone.
            if map.bad.hits(pfn, word.order()) {
                return Err(BadPage);
            }
            let word = word.to_pcp(mt);
            lists.push(map, cell, index(word.order(), mt), Block { pfn, word });
            Ok((lists.count > lists.high).then(|| lists.drain_size()))
        });
        over.unwrap_or_else(|BadPage| {
            self.defer(map, cell, Block { pfn, word }, mt);
            None
        })
    }

    /// How many blocks a refill should take.
    pub(crate) fn refill_size<P: Platform>(
        &self,
        pin: &Pin<'_, P>,
        order: usize,
        plenty: bool,
    ) -> u32 {
        self.owner(pin, |lists| {
            lists.free_factor = 0;
            if order == PAGEBLOCK_ORDER {
                return 1;
            }
            let pages = lists.batch << lists.alloc_factor;
            if lists.alloc_factor < PCP_BATCH_SCALE_MAX && order == 0 {
                lists.alloc_factor += 1;
            }
            // Refills in a row say that the mark is too low; plenty of memory says that it may be raised.
            if plenty {
                lists.high = (lists.high + lists.batch).min(lists.high_max);
            } else {
                lists.high = lists
                    .high
                    .saturating_sub(lists.batch << PCP_BATCH_SCALE_MAX)
                    .max(lists.high_min);
            }
            let room = lists.high.saturating_sub(lists.count).max(lists.batch);
            (pages.min(room) >> order).max(1)
        })
    }

    /// Puts a whole refill in; gives one block of it back to the caller.
    pub(crate) fn fill<P: Platform>(
        &self,
        pin: &Pin<'_, P>,
        map: &MemMap,
        mut chain: Chain,
        order: usize,
        mt: MigrateType,
    ) {
        // By pieces: an interrupt that finds somebody inside goes without.
        while chain.blocks > 0 {
            self.owner(pin, |lists| {
                for _ in 0..FILL_HOLD {
                    let Some(Block { pfn, word }) = chain.pop(map) else {
                        break;
                    };
                    let word = word.to_pcp(mt);
                    lists.push(map, map.word(pfn), index(order, mt), Block { pfn, word });
                }
            });
        }
    }

    /// Takes up to `pages` pages out, from all lists in turn.
    pub(crate) fn take<P: Platform>(&self, pin: &Pin<'_, P>, map: &MemMap, pages: u32) -> Chain {
        self.owner(pin, |lists| lists.take(map, pages))
    }

    /// Lets the mark fall back towards its minimum by a quarter, as long as use does not raise it again
    /// (`decay_pcp_high`; an eighth there, but here a page in a list also keeps its last owner's descriptor from going back). Says how many pages are above it then.
    pub(crate) fn decay<P: Platform>(&self, pin: &Pin<'_, P>) -> u32 {
        self.owner(pin, |lists| {
            if lists.high > lists.high_min {
                let floor = lists
                    .count
                    .saturating_sub(lists.batch << PCP_BATCH_SCALE_MAX);
                lists.high = (lists.high - (lists.high >> 2))
                    .max(floor)
                    .max(lists.high_min);
            }
            lists.count.saturating_sub(lists.high)
        })
    }

    /// Takes everything out, from any CPU, and lowers the mark: memory is short.
    pub(crate) fn take_all<P: Platform>(&self, platform: &P, map: &MemMap) -> Chain {
        self.remote(platform, |lists| {
            lists.high = lists.high_min;
            lists.alloc_factor = 0;
            lists.take(map, u32::MAX)
        })
    }

    /// Takes a block from any mobility's list, the wanted one first, unless somebody is inside. From any context.
    pub(crate) fn try_pop<P: Platform>(
        &self,
        pin: &Pin<'_, P>,
        map: &MemMap,
        order: usize,
        mt: MigrateType,
    ) -> Result<Option<Block>, Contended> {
        let guard = self.lock.try_enter(&PlatformBarriers(pin.platform()));
        let _guard = guard.ok_or(Contended)?;
        // SAFETY: as in `owner`.
        let lists = unsafe { &mut *self.lists.get_mut_ptr() };
        let own = index(order, mt);
        let all = MigrateType::ALL[..MigrateType::PCP_TYPES].iter();
        let others = all.map(|&other| index(order, other));
        Ok(core::iter::once(own)
            .chain(others)
            .find_map(|list| lists.pop(map, list)))
    }

    /// Puts a block in unless somebody is inside, or there is a bad page in it; `false` if so. From any context. Leaves it to the next normal free to
    /// drain what is too much.
    pub(crate) fn try_push<P: Platform>(
        &self,
        pin: &Pin<'_, P>,
        map: &MemMap,
        cell: &AtomicWord,
        pfn: Pfn,
        word: Word,
        mt: MigrateType,
    ) -> bool {
        let Some(_guard) = self.lock.try_enter(&PlatformBarriers(pin.platform())) else {
            return false;
        };
        if map.bad.hits(pfn, word.order()) {
            return false;
        }
        // SAFETY: as in `owner`.
        let lists = unsafe { &mut *self.lists.get_mut_ptr() };
        let word = word.to_pcp(mt);
        lists.push(map, cell, index(word.order(), mt), Block { pfn, word });
        true
    }

    /// Frees a block without entering the lists. From any context and any CPU; cannot fail.
    pub(crate) fn defer(&self, map: &MemMap, cell: &AtomicWord, block: Block, mt: MigrateType) {
        let order = block.word.order();
        cell.publish(block.word.to_pcp(mt));
        self.deferred.pages.fetch_add(1 << order, Ordering::Relaxed);
        let links = map.buddy_at(block.word.desc());
        self.deferred.stack.push(block.pfn, |next| {
            links.set_next(next);
            crate::inject::point("deferred pages: about to push");
        });
    }

    /// Is there something to free?
    #[inline]
    pub(crate) fn has_deferred(&self) -> bool {
        !self.deferred.stack.is_empty()
    }

    /// Takes all that was deferred, from any CPU.
    pub(crate) fn take_deferred(&self, map: &MemMap) -> Chain {
        let head = self.deferred.stack.take();
        if head == Pfn::NONE {
            return Chain::new();
        }
        let mut chain = Chain { head, blocks: 0 };
        let (mut at, mut pages) = (head, 0);
        while at != Pfn::NONE {
            let word = map.word(at).load_owned();
            pages += 1 << word.order();
            chain.blocks += 1;
            at = map.buddy_at(word.desc()).next();
        }
        self.deferred.pages.fetch_sub(pages, Ordering::Relaxed);
        chain
    }

    /// A look from any CPU.
    pub(crate) fn view<P: Platform>(&self, platform: &P) -> PcpView {
        let deferred = self.deferred.pages.load(Ordering::Relaxed);
        self.remote(platform, |l| PcpView {
            count: l.count + deferred,
            high: l.high,
            batch: l.batch,
        })
    }
}

impl Lists {
    #[inline]
    fn pop(&mut self, map: &MemMap, list: usize) -> Option<Block> {
        let pfn = self.heads[list];
        if pfn == Pfn::NONE {
            return None;
        }
        let word = map.word(pfn).load_owned();
        if map.checks.on() && !self.check(map, list, pfn, word) {
            return None;
        }
        debug_assert!(word.is_in_pcp(), "{pfn:?} in a per-CPU list says {word:?}");
        crate::inject::point("pcp: about to unlink");
        self.heads[list] = map.buddy_at(word.desc()).next();
        crate::inject::point("pcp: unlinked");
        self.counts[list] -= 1;
        self.count -= 1 << order_of(list);
        Some(Block { pfn, word })
    }

    /// Is the first block of a list one that belongs there, and the next one too? If not, what is left of the list is forgotten.
    #[cold]
    fn check(&mut self, map: &MemMap, list: usize, pfn: Pfn, word: Word) -> bool {
        let fits = |word: Word| {
            word.is_in_pcp()
                && map.is_in_slab(word.desc())
                && index(word.order(), word.migratetype()) == list
        };
        let forget = |lists: &mut Lists, kept: u32| {
            lists.count -= (lists.counts[list] - kept) << order_of(list);
            lists.counts[list] = kept;
        };
        if !fits(word) {
            map.checks.note(pfn, Flaw::Word);
            forget(self, 0);
            self.heads[list] = Pfn::NONE;
            return false;
        }
        let links = map.buddy_at(word.desc());
        let next = links.next();
        if next != Pfn::NONE
            && !map
                .region(next)
                .is_some_and(|r| fits(r.word(next).load_owned()))
        {
            map.checks.note(pfn, Flaw::Links);
            forget(self, 1);
            links.set_next(Pfn::NONE);
        }
        true
    }

    #[inline]
    fn push(&mut self, map: &MemMap, cell: &AtomicWord, list: usize, block: Block) {
        map.buddy_at(block.word.desc()).set_next(self.heads[list]);
        cell.publish(block.word);
        crate::inject::point("pcp: about to link");
        self.heads[list] = block.pfn;
        crate::inject::point("pcp: linked");
        self.counts[list] += 1;
        self.count += 1 << order_of(list);
    }

    #[cold]
    fn drain_size(&mut self) -> u32 {
        self.alloc_factor = self.alloc_factor.saturating_sub(1);
        let pages = (self.batch << self.free_factor).min(self.high / 2).max(1);
        if self.free_factor < PCP_BATCH_SCALE_MAX {
            self.free_factor += 1;
        }
        pages
    }

    fn take(&mut self, map: &MemMap, pages: u32) -> Chain {
        let mut chain = Chain::new();
        let mut taken = 0;
        let mut empty = 0;
        // A few blocks from each list in turn, so that no mobility is stripped bare.
        while taken < pages && empty < NR_LISTS {
            let list = self.next as usize % NR_LISTS;
            let share = (self.counts[list] / 4).max(1);
            let mut got = 0;
            while got < share && taken < pages {
                let Some(block) = self.pop(map, list) else {
                    break;
                };
                chain.push(map, block);
                taken += 1 << order_of(list);
                got += 1;
            }
            empty = if got == 0 { empty + 1 } else { 0 };
            self.next = (list as u32 + 1) % NR_LISTS as u32;
        }
        chain
    }
}
