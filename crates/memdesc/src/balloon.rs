//! The balloon: memory that the hypervisor asks back, and returns.
//!
//! What is in a balloon is off line: the word of each block says so and holds the number of the next block, so the balloon's lists need neither memory
//! nor a field of a page. The blocks' descriptors go back to their caches: ballooned memory costs its words and nothing more.
//!
//! **Large blocks first**, 2 MiB where there are any. Linux gives 4 KiB at a time: 512 page numbers and 512 words where one does, 2 MiB
//! of the hypervisor's tables broken into pieces and the host's large page with them, and what comes back is dust that takes
//! compaction to be large again. A block that is larger than what is wanted back is halved by writing two words.
//!
//! **Deflating must work when memory is out**, since that is when it is asked for ([`Balloon::deflate_on_oom`]), and a block that comes back needs a
//! descriptor. So a balloon keeps 32 of them, 256 bytes, for as long as it is there. If there are none to be had otherwise these serve, and
//! one page that they bring back is enough for the next 500 descriptors. It gives nothing to the hypervisor until it has them.
//!
//! Lock order: the balloon's lock is a leaf; neither descriptors nor pages change hands under it.
//!
//! Source: `mm/balloon_compaction.c`, `virtio_balloon.c` (`fill_balloon`, `leak_balloon`, `virtio_balloon_oom_notify`) of Linux.

use crate::address::{MAX_ORDER, PAGEBLOCK_ORDER, Pfn, PhysAddr};
use crate::desc::DescList;
use crate::gfp::{self, Flags};
use crate::lockdep::classes;
use crate::memmap::Word;
use crate::mm::Mm;
use crate::page_alloc::alloc::Descriptors;
use crate::platform::{BalloonOp, Holder, Platform, ReclaimRequest};
use crate::shrinker::Shrinker;
use crate::stats::Event;
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::{SpinGuard, SpinLock};

/// Blocks that go to the platform at once.
const BATCH: usize = 32;
/// Descriptors kept for when there is no memory.
const RESERVE: usize = BATCH;
/// The least that is given back when memory is out (`VIRTIO_BALLOON_OOM_NR_PAGES`).
const OOM_PAGES: u32 = 256;

/// Blocks of pages: the first page and the order.
type Batch = [(Pfn, usize); BATCH];

/// A balloon.
///
/// # Examples
///
/// ```
/// use memdesc::{Balloon, CensusKind, Config, Memory, Mm, Pfn, gfp::GFP_HIGHUSER};
/// use memdesc_host::Host;
///
/// let (host, ram) = Host::small(16384)?;
/// let mm = Mm::new(host, &Config::default(), &ram)?;
/// let balloon = Balloon::new(&mm);
/// assert_eq!(balloon.inflate(5000, GFP_HIGHUSER), 5000);
/// let census = mm.census();
/// let inside = census.of(CensusKind::Balloon);
/// // Nine blocks of 2 MiB and what is left: as few as can be, and no descriptor.
/// assert_eq!((inside.pages, inside.by_order[9], inside.descriptors), (5000, 9, 0));
/// assert_eq!(balloon.deflate(1000), 1000);
/// assert_eq!(balloon.pages(), 4000);
/// drop(balloon);
/// assert_eq!(mm.census().of(CensusKind::Balloon).pages, 0);
/// assert!(mm.ledger().balanced);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Balloon<'m, P: Platform> {
    mm: &'m Mm<P>,
    inside: SpinLock<Inside>,
    /// Copy of what is in it, for who asks without the lock.
    pages: AtomicU64,
    deflate_on_oom: bool,
}

/// # Invariants
///
/// Each list leads through the words of its blocks, which all say that they are a balloon's and of the list's order.
#[derive(Debug)]
struct Inside {
    heads: [Pfn; MAX_ORDER + 1],
    pages: u64,
    reserve: DescList,
}

impl Inside {
    fn push<P: Platform>(&mut self, mm: &Mm<P>, pfn: Pfn, order: usize) {
        mm.pages
            .map
            .publish_block(pfn, Word::balloon(order, self.heads[order]));
        self.heads[order] = pfn;
        self.pages += 1 << order;
    }

    /// A block of up to `most` pages: the smallest there is, or the half of one. It still says that it is a balloon's.
    fn pop<P: Platform>(&mut self, mm: &Mm<P>, most: u32) -> Option<(Pfn, usize)> {
        let order = self.heads.iter().position(|&head| head != Pfn::NONE)?;
        let pfn = self.heads[order];
        self.heads[order] = mm.pages.map.word(pfn).load_owned().balloon_next();
        self.pages -= 1 << order;
        let mut kept = order;
        while 1 << kept > most {
            kept -= 1;
            self.push(mm, pfn.add(1 << kept), kept);
        }
        if kept < order {
            let word = Word::balloon(kept, Pfn::NONE);
            mm.pages.map.publish_block(pfn, word);
        }
        Some((pfn, kept))
    }
}

impl<'m, P: Platform> Balloon<'m, P> {
    /// An empty one.
    pub fn new(mm: &'m Mm<P>) -> Self {
        Balloon {
            mm,
            inside: SpinLock::new(Inside {
                heads: [Pfn::NONE; MAX_ORDER + 1],
                pages: 0,
                reserve: DescList::new(),
            }),
            pages: AtomicU64::new(0),
            deflate_on_oom: false,
        }
    }

    /// It gives back when memory is out (`VIRTIO_BALLOON_F_DEFLATE_ON_OOM`), once it is [registered](Mm::register_shrinker): after everything else was asked in
    /// vain, before an allocation fails.
    #[must_use]
    pub fn deflate_on_oom(mut self) -> Self {
        self.deflate_on_oom = true;
        self
    }

    /// Pages in it.
    pub fn pages(&self) -> u64 {
        self.pages.load(Ordering::Relaxed)
    }

    fn inside(&self) -> SpinGuard<'_, Inside, Holder<'_, P>> {
        let platform = &self.mm.pages.platform;
        self.inside
            .lock(Holder::new(platform, self.mm.pages.rt, &classes::BALLOON))
    }

    /// Gives so many pages to the hypervisor, as far as they are to be had without going under the watermarks, with one attempt at reclaim where `gfp`
    /// allows it: says how many (`fill_balloon`). `gfp` says from where, usually `GFP_HIGHUSER`; `__GFP_NORETRY` and `__GFP_NOMEMALLOC` are added.
    ///
    /// # Context
    ///
    /// As [`Mm::alloc_pages`] with `gfp`; not in an interrupt.
    pub fn inflate(&self, pages: u32, gfp: Flags) -> u32 {
        if !self.fill_reserve() {
            return 0;
        }
        let mm = self.mm;
        let gfp = gfp | gfp::__GFP_NORETRY | gfp::__GFP_NOMEMALLOC | gfp::__GFP_NOWARN;
        let mut batch: Batch = [(Pfn::NONE, 0); BATCH];
        let (mut done, mut order) = (0, PAGEBLOCK_ORDER);
        while done < pages {
            let (mut n, mut now) = (0, 0);
            while n < BATCH && done + now < pages {
                order = order.min((pages - done - now).ilog2() as usize);
                // Nothing is reclaimed or moved to make a large one.
                let flags = if order > 0 {
                    gfp & !gfp::__GFP_RECLAIM
                } else {
                    gfp
                };
                match mm.alloc_pages(flags, order) {
                    Ok(pfn) => {
                        batch[n] = (pfn, order);
                        n += 1;
                        now += 1 << order;
                    }
                    Err(_) if order > 0 => order -= 1,
                    Err(_) => break,
                }
            }
            if n == 0 {
                break;
            }
            self.take_in(&batch[..n], now);
            done += now;
        }
        done
    }

    /// Bare pages of ours go in.
    fn take_in(&self, batch: &[(Pfn, usize)], pages: u32) {
        let mm = self.mm;
        // First gone, then in the list: who takes them out of it has them back.
        for &(pfn, order) in batch {
            mm.pages.platform.pages_freed(pfn, order);
        }
        mm.pages.platform.balloon_pages(batch, BalloonOp::Inflate);
        for &(pfn, order) in batch {
            mm.bare_to_inline(pfn, Word::balloon(order, Pfn::NONE));
        }
        let mut inside = self.inside();
        for &(pfn, order) in batch {
            inside.push(mm, pfn, order);
        }
        self.pages.store(inside.pages, Ordering::Relaxed);
        drop(inside);
        self.count(Event::BalloonInflate, pages);
    }

    /// Takes so many pages back, if there are as many: says how many (`leak_balloon`). They are free then. Fewer also if there are no descriptors for more,
    /// which is when memory is out and others take what came back faster than it comes.
    ///
    /// # Context
    ///
    /// Any that may pin a CPU, but no interrupt; needs no memory.
    pub fn deflate(&self, pages: u32) -> u32 {
        let mm = self.mm;
        let mut done = 0;
        while done < pages {
            let mut batch: Batch = [(Pfn::NONE, 0); BATCH];
            let (mut n, mut now) = (0, 0);
            // All descriptors first: a batch's from the caches, or what was kept.
            let mut spare = mm.get(BATCH).unwrap_or(DescList::new());
            {
                let mut inside = self.inside();
                if spare.is_empty() {
                    core::mem::swap(&mut spare, &mut inside.reserve);
                }
                while n < BATCH.min(spare.len()) && done + now < pages {
                    let Some(block) = inside.pop(mm, pages - done - now) else {
                        break;
                    };
                    batch[n] = block;
                    n += 1;
                    now += 1 << block.1;
                }
                self.pages.store(inside.pages, Ordering::Relaxed);
            }
            if n > 0 {
                self.give_back(&batch[..n], &mut spare);
            }
            self.keep(spare);
            if n == 0 {
                break;
            }
            done += now;
            self.count(Event::BalloonDeflate, now);
        }
        done
    }

    fn give_back(&self, batch: &[(Pfn, usize)], spare: &mut DescList) {
        let mm = self.mm;
        mm.pages.platform.balloon_pages(batch, BalloonOp::Deflate);
        for &(pfn, order) in batch {
            let desc: Option<PhysAddr> = spare.pop(&mm.pages.map);
            let Some(desc) = desc else {
                unreachable!("no more blocks than descriptors")
            };
            mm.pages.platform.pages_allocated(pfn, order);
            mm.inline_to_bare(pfn, desc);
            // SAFETY: bare pages that came out of the balloon: ours.
            unsafe { mm.free_pages(pfn) };
        }
    }

    /// Has the reserve what it needs?
    fn fill_reserve(&self) -> bool {
        let missing = RESERVE - self.inside().reserve.len().min(RESERVE);
        if missing == 0 {
            return true;
        }
        match self.mm.get(missing) {
            Ok(list) => {
                self.keep(list);
                true
            }
            Err(_) => false,
        }
    }

    /// Keeps descriptors as far as the reserve wants them; the others go back.
    fn keep(&self, mut list: DescList) {
        {
            let map = &self.mm.pages.map;
            let mut inside = self.inside();
            while inside.reserve.len() < RESERVE
                && let Some(desc) = list.pop(map)
            {
                inside.reserve.push(map, desc);
            }
        }
        if !list.is_empty() {
            self.mm.put(list);
        }
    }

    fn count(&self, event: Event, pages: u32) {
        let pin = self.mm.pages.pin();
        let stats = self.mm.pages.stats(&pin);
        stats.add(&pin, event, u64::from(pages));
    }
}

impl<P: Platform> Shrinker for Balloon<'_, P> {
    fn count_objects(&self) -> usize {
        if self.deflate_on_oom {
            self.pages() as usize
        } else {
            0
        }
    }

    fn scan_objects(&self, _nr: usize, request: &ReclaimRequest) -> usize {
        // Not before others were asked: the hypervisor has better use for it than a cache. So a balloon that is being filled never empties itself.
        if request.attempt == 0 {
            return 0;
        }
        self.deflate(OOM_PAGES.max(1 << request.order)) as usize
    }
}

impl<P: Platform> Drop for Balloon<'_, P> {
    /// Everything comes back.
    fn drop(&mut self) {
        let mut round = 0;
        while self.pages() > 0 && round < 1 << 20 {
            if self.deflate(u32::MAX) == 0 {
                self.mm.pages.platform.relax(63);
                round += 1;
            }
        }
        let reserve = core::mem::replace(&mut self.inside().reserve, DescList::new());
        if !reserve.is_empty() {
            self.mm.put(reserve);
        }
    }
}

impl<P: Platform> core::fmt::Debug for Balloon<'_, P> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Balloon")
            .field("pages", &self.pages())
            .field("deflate_on_oom", &self.deflate_on_oom)
            .finish_non_exhaustive()
    }
}
