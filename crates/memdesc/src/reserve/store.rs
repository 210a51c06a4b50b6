//! What is set aside: whole blocks, each with the descriptor that it will have when it is taken, so that taking one needs nothing.
//!
//! ```text
//!              fill                    take                         take of the last kind of object
//!  ordinary ─────────► idle (set_aside) ────► pages | slab, partial ◄──────────► slab, full
//!           ◄─────────        ▲  ▲             │        │      ▲
//!              trim           │  └─────────────┘        ▼      │ take
//!                             │    free (a stack)      slab, empty
//!                             └─────────────────────────┘
//!                               when a block is wanted, or the tick
//! ```
//!
//! **Why no request within its charge fails.** Who frees makes what he frees available first and takes the charge back afterwards: an object's bit is set in its
//! slab, a block is pushed on the stack, and then the counter falls. Who takes has charged before, and then sees, under the one lock of the stores,
//! every slab and every block of the node: none is ever on its way between two places where he does not look. An empty slab stays in its cache's list until
//! somebody who holds the lock makes an idle block of it. So the argument of [`geometry`](super::geometry) holds at each moment and not only at quiet ones.
//!
//! **No laundering.** A slab from a reserve is in a list of its own, from which only this file takes; its objects never enter a sheaf, for who frees one asks the
//! slab. An ordinary request never sees it.
//!
//! Lock order: the lock of the stores, then a cache's list lock. What happens to a block that changes hands (poison, zeroing, mapping) happens under it: no
//! block may be seen missing meanwhile.

use core::ptr::NonNull;

use super::node::{Node, ORDERS, Serve, Shape};
use super::tree::Blocks;
use crate::address::Pfn;
use crate::desc::{Slab, SlabList};
use crate::error::AllocError;
use crate::gfp::{self, Flags};
use crate::lockdep::classes;

use crate::memmap::{Contents, DescClass, PageType, Word};
use crate::mm::Mm;
use crate::page_alloc::buddy::Block;
use crate::platform::{Holder, Pin, Platform};
use crate::slab::cache::{CacheCore, CacheFlags, Lists, slab_of};
use crate::slab::kmalloc::Kind;
use crate::sync::SpinGuard;
use crate::sync::atomic::Ordering;

/// The lock of the stores is held.
pub(super) type Held<'a, P> = SpinGuard<'a, (), Holder<'a, P>>;

impl<P: Platform> Mm<P> {
    pub(super) fn lock_stores(&self) -> Held<'_, P> {
        let holder = Holder::new(self.platform(), self.pages.rt, &classes::RESERVE);
        self.pages.reserves.stores.lock(holder)
    }

    /// Pages that were of one type are of another now.
    fn restat(&self, from: PageType, to: PageType, order: usize) {
        let pin = Pin::try_new(self.platform());
        let stats = self.pages.any_stats(pin.as_ref());
        stats.block_back_any(from, order);
        stats.block_out_any(to, order);
    }

    /// How many blocks of each order the node should have.
    pub(super) fn set_target(&self, node: &Node, blocks: &Blocks) {
        for (stock, &n) in node.stocks.iter().zip(blocks) {
            stock.target.store(n, Ordering::Relaxed);
        }
    }

    /// Brings the store up to so many blocks, from ordinary memory. On failure it has what it had.
    pub(super) fn fill_store(&self, node: &Node, blocks: &Blocks) -> Result<(), AllocError> {
        let before: Blocks =
            core::array::from_fn(|order| node.stocks[order].target.load(Ordering::Relaxed));
        for (order, stock) in node.stocks.iter().enumerate() {
            while stock.owned.load(Ordering::Relaxed) < blocks[order] {
                if let Err(why) = self.set_aside(node, order, gfp::GFP_KERNEL | gfp::__GFP_NOWARN) {
                    self.set_target(node, &before);
                    self.trim_store(node);
                    return Err(why);
                }
            }
        }
        self.set_target(node, blocks);
        Ok(())
    }

    /// One block more. Its pages are free from here on, as far as services for free memory go.
    fn set_aside(&self, node: &Node, order: usize, gfp: Flags) -> Result<(), AllocError> {
        let kind = PageType::SetAside;
        let gfp = match node.shape() {
            // SAFETY: the cache is not destroyed before the node.
            Shape::Objects(core) => gfp | unsafe { core.as_ref() }.gfp,
            _ => gfp,
        };
        let block = self.pages.alloc_block(kind, gfp, order, None, self)?;
        let word = match node.shape() {
            Shape::Pages { .. } => block.word.to_owned(kind),
            // Whatever it is taken for, a `struct slab` will do.
            _ => self.own_block(block, DescClass::Slab, kind, None)?,
        };
        let held = self.lock_stores();
        node.stocks[order].owned.fetch_add(1, Ordering::Relaxed);
        let word = self.pages.prep_free(block.pfn, word);
        self.put_idle(&held, node, block.pfn, word);
        Ok(())
    }

    /// Puts a block that has been prepared to be free among the idle ones.
    fn put_idle(&self, _held: &Held<'_, P>, node: &Node, pfn: Pfn, word: Word) {
        let stock = &node.stocks[word.order()];
        let idle = word
            .to_owned(PageType::SetAside)
            .with_contents(word.contents());
        self.pages.map.publish_block(pfn, idle);
        let links = self.pages.map.buddy_at(word.desc());
        links.set_next(Pfn(stock.idle.load(Ordering::Relaxed)));
        stock.idle.store(pfn.0, Ordering::Relaxed);
        stock.nr_idle.fetch_add(1, Ordering::Relaxed);
    }

    /// Takes an idle block of this order; what came back lately is looked through if there is none.
    fn pop_idle(&self, held: &Held<'_, P>, node: &Node, order: usize) -> Option<Block> {
        let map = &self.pages.map;
        let stock = &node.stocks[order];
        loop {
            let pfn = Pfn(stock.idle.load(Ordering::Relaxed));
            if pfn == Pfn::NONE {
                if !self.take_returned(held, node) {
                    return None;
                }
                continue;
            }
            let word = map.word(pfn).load_owned();
            stock
                .idle
                .store(map.buddy_at(word.desc()).next().0, Ordering::Relaxed);
            stock.nr_idle.fetch_sub(1, Ordering::Relaxed);
            if !map.bad.hits(pfn, order) {
                return Some(Block { pfn, word });
            }
            // The zone cuts out what is bad; the tick fetches another. Nobody reads what it held.
            stock.owned.fetch_sub(1, Ordering::Relaxed);
            let word = word.with_contents(Contents::UNKNOWN);
            self.pages
                .prep_alloc(PageType::SetAside, pfn, order, word, Flags::EMPTY);
            self.pages.free_block_nolock(PageType::SetAside, pfn, word);
        }
    }

    /// Lets go of idle blocks with a page that failed.
    fn drop_bad(&self, node: &Node) {
        if !self.pages.map.bad.any() {
            return;
        }
        let held = self.lock_stores();
        for order in 0..ORDERS {
            let mut good = Pfn::NONE;
            while let Some(Block { pfn, word }) = self.pop_idle(&held, node, order) {
                self.pages.map.buddy_at(word.desc()).set_next(good);
                good = pfn;
            }
            while good != Pfn::NONE {
                let word = self.pages.map.word(good).load_owned();
                let next = self.pages.map.buddy_at(word.desc()).next();
                self.put_idle(&held, node, good, word);
                good = next;
            }
        }
    }

    /// Moves what came back to the idle ones; `false` if nothing did.
    fn take_returned(&self, held: &Held<'_, P>, node: &Node) -> bool {
        let mut at = node.returned.take();
        let any = at != Pfn::NONE;
        while at != Pfn::NONE {
            let word = self.pages.map.word(at).load_owned();
            let next = self.pages.map.buddy_at(word.desc()).next();
            self.put_idle(held, node, at, word);
            at = next;
        }
        any
    }

    /// Blocks that are no longer idle.
    fn count_taken(node: &Node, order: usize) {
        let pages = node.taken.fetch_add(1 << order, Ordering::Relaxed) + (1 << order);
        node.max_taken.fetch_max(pages, Ordering::Relaxed);
    }

    /// An object for what has been charged. `None` only if the store has fewer pages than its bound says.
    pub(super) fn take_reserve_object(&self, node: &Node, core: &CacheCore) -> Option<NonNull<u8>> {
        let held = self.lock_stores();
        let from = |list| self.take_listed(node, core, list);
        if let Some(object) =
            from(SlabList::RESERVE_PARTIAL).or_else(|| from(SlabList::RESERVE_EMPTY))
        {
            return Some(object);
        }
        let order = core.smallest.order as usize;
        let block = self.take_block(&held, node, order)?;
        let (pfn, word) = (block.pfn, block.word);
        self.pages
            .prep_alloc(PageType::Slab, pfn, order, word, Flags::EMPTY);
        self.restat(PageType::SetAside, PageType::Slab, order);
        let slab = self.make_slab(core, pfn, word.desc(), false, order);
        slab.set_reserve(node.id());
        let word = self.pages.map.word(pfn).load_owned();
        self.pages.map.publish_block(pfn, word.with_reserve());
        let mut lists = self.lists(core);
        lists.enter(core.geometry_of(slab));
        core.reserved.fetch_add(1, Ordering::Relaxed);
        self.take_one(core, &mut lists, slab)
    }

    /// An idle block, or an empty slab of whatever cache made into one.
    fn take_block(&self, held: &Held<'_, P>, node: &Node, order: usize) -> Option<Block> {
        let block = self.pop_idle(held, node, order).or_else(|| {
            self.retire_slab(held, node, order)?;
            self.pop_idle(held, node, order)
        })?;
        Self::count_taken(node, order);
        Some(block)
    }

    /// An object from a slab of the node's in one of the lists for reserves.
    fn take_listed(&self, node: &Node, core: &CacheCore, list: SlabList) -> Option<NonNull<u8>> {
        let mut lists = self.lists(core);
        let slab = self.find_listed(node, lists.by_share[list.index()].head)?;
        self.take_one(core, &mut lists, slab)
    }

    /// One object of a slab that has one free.
    fn take_one(&self, core: &CacheCore, lists: &mut Lists, slab: &Slab) -> Option<NonNull<u8>> {
        let mut out = [core::ptr::null_mut()];
        lists.inuse += self.take_from(core, slab, &mut out) as u64;
        lists.relist(&self.pages.map, slab);
        NonNull::new(out[0])
    }

    /// The first slab of the node's in a list. Under the list lock.
    fn find_listed(&self, node: &Node, head: Pfn) -> Option<&Slab> {
        let mut at = head;
        while at != Pfn::NONE {
            let slab = slab_of(&self.pages.map, at);
            if slab.reserve() == node.id() {
                return Some(slab);
            }
            at = slab.links().next();
        }
        None
    }

    /// Calls for each cache whose slabs the node may have.
    fn caches_of<R>(
        &self,
        node: &Node,
        mut each: impl FnMut(&CacheCore) -> Option<R>,
    ) -> Option<R> {
        match node.shape() {
            // SAFETY: the cache is not destroyed before the node.
            Shape::Objects(core) => each(unsafe { core.as_ref() }),
            Shape::KmallocObjects { size } => match node.serve(size) {
                Some((Serve::Class(class), _)) => each(self.kmalloc_cache(Kind::Normal, class)),
                _ => None,
            },
            Shape::Kmalloc { .. } => (0..crate::slab::kmalloc::CLASSES.len())
                .map(|class| self.kmalloc_cache(Kind::Normal, class))
                .filter(|core| core.reserved.load(Ordering::Relaxed) != 0)
                .find_map(each),
            Shape::None | Shape::Pages { .. } => None,
        }
    }

    /// Makes an empty slab of this order an idle block, if there is one whose pages nobody may still look at.
    fn retire_slab(&self, held: &Held<'_, P>, node: &Node, order: usize) -> Option<()> {
        let (pfn, word) = self.caches_of(node, |core| {
            let keeps = CacheFlags::TYPESAFE_BY_RCU | CacheFlags::RCU_PREPAID;
            if core.smallest.order as usize != order || core.flags.intersects(keeps) {
                return None;
            }
            let slab = self.unlist_empty(node, core)?;
            Some((slab.pfn(), self.pages.map.word(slab.pfn()).load_owned()))
        })?;
        self.restat(PageType::Slab, PageType::SetAside, order);
        node.taken.fetch_sub(1 << order, Ordering::Relaxed);
        let word = self.pages.prep_free(pfn, word);
        self.put_idle(held, node, pfn, word);
        Some(())
    }

    /// Takes an empty slab of the node's out of its cache.
    fn unlist_empty<'a>(&'a self, node: &Node, core: &CacheCore) -> Option<&'a Slab> {
        let mut lists = self.lists(core);
        let head = lists.by_share[SlabList::RESERVE_EMPTY.index()].head;
        let slab = self.find_listed(node, head)?;
        lists.leave(&self.pages.map, slab, core.geometry_of(slab));
        core.reserved.fetch_sub(1, Ordering::Relaxed);
        Some(slab)
    }

    /// Pages for what has been charged, as [`take_reserve_object`](Self::take_reserve_object).
    #[track_caller]
    pub(super) fn take_pages(
        &self,
        node: &Node,
        order: usize,
        kind: PageType,
        gfp: Flags,
    ) -> Option<Pfn> {
        let held = self.lock_stores();
        let Block { pfn, word } = self.take_block(&held, node, order)?;
        self.pages.prep_alloc(kind, pfn, order, word, gfp);
        self.restat(PageType::SetAside, kind, order);
        // Where pages that are charged to a memory cgroup say to which: those are never from here.
        let links = self.pages.map.buddy_at(word.desc());
        links.set_prev(Pfn(u32::from(node.id())));
        let word = word.to_owned(kind).with_reserve();
        self.pages.map.publish_block(pfn, word);
        Some(pfn)
    }

    /// Pages from a reserve come back to it: first they, then the charge.
    ///
    /// # Context
    ///
    /// Any. Takes no lock, allocates nothing, cannot fail.
    #[cold]
    #[track_caller]
    pub(crate) fn reserve_pages_back(&self, pfn: Pfn, word: Word) {
        let (order, kind) = (word.order(), word.kind());
        let links = self.pages.map.buddy_at(word.desc());
        let node = self.pages.reserves.get(links.prev().0 as u16);
        let charge = node.and_then(|node| Some((node, node.charge_of_pages(order)?)));
        let Some((node, charge)) = charge else {
            self.report_page(pfn, word, core::panic::Location::caller());
            return;
        };
        node.taken.fetch_sub(1 << order, Ordering::Relaxed);
        if self.pages.map.bad.hits(pfn, order) {
            // As in `pop_idle`.
            node.stocks[order].owned.fetch_sub(1, Ordering::Relaxed);
            self.pages.free_block_nolock(kind, pfn, word.to_owned(kind));
        } else {
            self.restat(kind, PageType::SetAside, order);
            let free = self.pages.prep_free(pfn, word.to_owned(kind));
            let idle = free
                .to_owned(PageType::SetAside)
                .with_contents(free.contents());
            self.pages.map.publish_block(pfn, idle);
            node.returned.push(pfn, |next| {
                links.set_next(next);
                crate::inject::point("reserve: about to push");
            });
        }
        self.reserve_uncharge(node, charge, (pfn, word));
    }

    /// Gives back idle blocks above the target; all of them only while nothing is taken, since what is pinned where the bound does not expect it may
    /// need them. Says how many pages went.
    pub(super) fn trim_store(&self, node: &Node) -> u64 {
        let mut pages = 0;
        self.retire_all(node, true);
        for order in 0..ORDERS {
            let stock = &node.stocks[order];
            loop {
                let block = {
                    let held = self.lock_stores();
                    if node.taken.load(Ordering::Relaxed) != 0
                        || stock.owned.load(Ordering::Relaxed)
                            <= stock.target.load(Ordering::Relaxed)
                    {
                        None
                    } else {
                        self.pop_idle(&held, node, order).inspect(|_| {
                            stock.owned.fetch_sub(1, Ordering::Relaxed);
                        })
                    }
                };
                let Some(Block { pfn, word }) = block else {
                    break;
                };
                self.pages
                    .prep_alloc(PageType::SetAside, pfn, order, word, Flags::EMPTY);
                self.take_back(self.pages.free_path(), pfn, word);
                pages += 1 << order;
            }
        }
        pages
    }

    /// Makes all empty slabs idle blocks. Those of caches whose readers may still look are given back after a grace period instead, if `last`: when
    /// the node is taken apart.
    fn retire_all(&self, node: &Node, last: bool) {
        {
            let held = self.lock_stores();
            for order in 0..ORDERS {
                while self.retire_slab(&held, node, order).is_some() {}
            }
        }
        let detached = node
            .stocks
            .iter()
            .all(|s| s.target.load(Ordering::Relaxed) == 0);
        if !last || !detached {
            return;
        }
        let Shape::Objects(core) = node.shape() else {
            return;
        };
        // SAFETY: the cache is not destroyed before the node.
        let core = unsafe { core.as_ref() };
        loop {
            let pfn = {
                let _held = self.lock_stores();
                let Some(slab) = self.unlist_empty(node, core) else {
                    break;
                };
                slab.set_reserve(0);
                slab.links().set_next(Pfn::NONE);
                let order = slab.order();
                node.taken.fetch_sub(1 << order, Ordering::Relaxed);
                node.stocks[order].owned.fetch_sub(1, Ordering::Relaxed);
                slab.pfn()
            };
            self.discard_from(core, pfn, false);
        }
    }

    /// The periodic work: empty slabs become idle blocks, what is above a bound goes back, and what is missing (pages that failed) is fetched.
    pub(crate) fn reserve_tick(&self) {
        if !self.pages.reserves.in_use() {
            return;
        }
        // Who changes the tree brings the stores to their targets himself.
        let Some(_making) = self.try_reserve_mutex() else {
            return;
        };
        for node in self.pages.reserves.nodes().filter(|n| n.is_connected()) {
            self.retire_all(node, false);
            self.drop_bad(node);
            self.trim_store(node);
            for (order, stock) in node.stocks.iter().enumerate() {
                let missing =
                    || stock.owned.load(Ordering::Relaxed) < stock.target.load(Ordering::Relaxed);
                while missing() && self.set_aside(node, order, gfp::GFP_NOWAIT).is_ok() {}
            }
        }
    }
}
