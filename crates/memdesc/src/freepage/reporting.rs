//! Free page reporting: large free blocks are shown to whoever lends the memory, a hypervisor by a balloon, so that he can use it elsewhere.
//!
//! A cycle takes up to [`CAPACITY`] free blocks off a zone's lists, so that nobody can be handed them meanwhile, tells the platform with no lock
//! held, and puts them back with REPORTED in their words. A block with that bit is passed over until it has been handed out. Where Linux's flag is lost in a
//! split (`page_del_and_expand` clears it), here the parts keep it; a merge with a block that was not reported is a new block, as there.
//! Memory that nobody touched since boot was never lent in the first place and is not reported; a reported block goes to the end of its
//! list, so that what is still backed is handed out first.
//!
//! Linux looks for blocks along the free lists and rotates them to remember how far it has come. Here the search goes by address, from a
//! place that the cycle remembers: it holds the zone lock for a bounded number of steps and never meets a block twice.
//!
//! A block that comes free asks for a cycle ([`notify`](LockedZone::notify_free)); [`Mm::tick`] starts it after a delay. While a block is with the platform
//! its word says that it is in a per-CPU list, though it is in none: the ledger is exact at quiet moments, and a report is none.
//!
//! Lock order: the zone lock is a leaf, and held over a bounded search and over putting back at most [`CAPACITY`] blocks.
//!
//! Source: `mm/page_reporting.c` of Linux 6.12.

use crate::address::{MAX_ORDER, Pfn};
use crate::config::Config;
use crate::desc::DescList;
use crate::memmap::{Contents, Word};
use crate::mm::Mm;
use crate::page_alloc::alloc::{Descriptors, PageAllocator};
use crate::page_alloc::buddy::Block;
use crate::page_alloc::zone::{LockedZone, Zone};
use crate::platform::Platform;
use crate::stats::Event;
use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Blocks in one report (`PAGE_REPORTING_CAPACITY`).
pub(crate) const CAPACITY: usize = 32;
/// Steps of the search in one hold of the zone lock.
const LOOK_HOLD: usize = 256;

/// What reported memory reads as, from the report on until somebody writes to it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reported {
    /// Anything.
    Unknown,
    /// Zeros.
    Zeroed,
}

/// The platform could not report the blocks, or not all of them, or there is nobody to report to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NotReported;

impl core::fmt::Display for NotReported {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("free pages could not be reported")
    }
}

impl core::error::Error for NotReported {}

/// Whether, what and when to report.
#[derive(Debug)]
pub(crate) struct Reporting {
    /// Blocks of this order or above; above [`MAX_ORDER`]: none.
    order: usize,
    delay_ns: u64,
    /// When the next cycle is due, in the platform's time and never 0; 0: nothing is to be done.
    due: AtomicU64,
    /// A cycle is running.
    active: AtomicBool,
}

/// What a zone knows of it.
#[derive(Debug)]
pub(crate) struct ZoneReporting {
    order: usize,
    /// A block came free that was not reported.
    wanted: AtomicBool,
}

impl Reporting {
    pub(crate) fn new(config: &Config) -> Reporting {
        Reporting {
            order: order_of(config),
            delay_ns: config.page_reporting_delay_ns,
            due: AtomicU64::new(0),
            active: AtomicBool::new(false),
        }
    }
}

impl ZoneReporting {
    pub(crate) fn new(config: &Config) -> ZoneReporting {
        ZoneReporting {
            order: order_of(config),
            wanted: AtomicBool::new(false),
        }
    }
}

fn order_of(config: &Config) -> usize {
    if config.page_reporting {
        config.page_reporting_order.min(MAX_ORDER)
    } else {
        MAX_ORDER + 1
    }
}

impl LockedZone<'_> {
    /// A block is put into a list: asks for a cycle if there is something new to report (`page_reporting_notify_free`).
    #[inline]
    pub(crate) fn notify_free(&self, order: usize, contents: Contents) {
        let reporting = &self.zone.reporting;
        if order >= reporting.order && !contents.contains(Contents::REPORTED) {
            reporting.wanted.store(true, Ordering::Relaxed);
        }
    }

    /// Takes blocks that were not reported off the lists, from `at` on, and says where to go on when they are back; `None` at the end of the
    /// zone, or if it should keep what is left.
    fn isolate_unreported(&mut self, order: usize, mut at: Pfn, batch: &mut Batch) -> Option<Pfn> {
        let size = 1u32 << order;
        let keep = keep(self.zone, order);
        for _ in 0..LOOK_HOLD {
            if batch.len == CAPACITY {
                return Some(at);
            }
            let region = self.region_from(at)?;
            if at.0 < region.start {
                at = Pfn(region.start.next_multiple_of(size));
                continue;
            }
            let (start, end) = region.untouched();
            if at.0 >= start && at.0 < end {
                at = Pfn(end.next_multiple_of(size));
                continue;
            }
            let word = region.word(at).load_owned();
            // Blocks of this order or above start at such addresses only; what is smaller is stepped over.
            let step = if word.is_tail() {
                size
            } else {
                size.max(1 << word.order())
            };
            let whole = word.order() >= order && word.is_free_in_zone(word.order());
            if whole && !word.contents().contains(Contents::REPORTED) {
                let free = self.lists.nr_listed + self.lists.nr_untouched;
                if free < keep + u64::from(step) {
                    return (batch.len > 0).then_some(at);
                }
                self.unlink(at, word);
                batch.push(self.detach(at, word));
            }
            at = Pfn(at.0.checked_add(step)?);
        }
        Some(at)
    }
}

/// Pages that a zone keeps while blocks are with the platform: the low mark and as much as a report may have, so that requests meanwhile
/// find something. Of a small zone a report has no more than a quarter; by Linux's rule, the first part alone, it would never be reported.
fn keep(zone: &Zone, order: usize) -> u64 {
    let marks = &zone.marks;
    let boost = marks.boost.load(Ordering::Relaxed);
    marks.low + boost + ((CAPACITY as u64) << order).min(zone.managed / 4)
}

/// Blocks with the platform.
struct Batch {
    blocks: [(Pfn, usize); CAPACITY],
    words: [Word; CAPACITY],
    len: usize,
    pages: u64,
}

impl Batch {
    fn new() -> Batch {
        Batch {
            blocks: [(Pfn::NONE, 0); CAPACITY],
            words: [Word::ZERO; CAPACITY],
            len: 0,
            pages: 0,
        }
    }

    fn push(&mut self, block: Block) {
        let order = block.word.order();
        self.blocks[self.len] = (block.pfn, order);
        self.words[self.len] = block.word;
        self.len += 1;
        self.pages += 1 << order;
    }
}

/// Blocks that are with the platform until this goes; also if a report unwinds, of which nothing is known then.
struct Away<'a, P: Platform, D: Descriptors> {
    pages: &'a PageAllocator<P>,
    index: usize,
    batch: &'a Batch,
    contents: Contents,
    descs: &'a D,
}

impl<P: Platform, D: Descriptors> Drop for Away<'_, P, D> {
    fn drop(&mut self) {
        self.pages
            .put_back(self.index, self.batch, self.contents, self.descs);
    }
}

/// A cycle runs until this goes.
struct Cycle<'a>(&'a AtomicBool);

impl Drop for Cycle<'_> {
    fn drop(&mut self) {
        // Release: pairs with the Acquire of the next one.
        self.0.store(false, Ordering::Release);
    }
}

impl<P: Platform> PageAllocator<P> {
    /// Reports what is to be reported of one zone. Says how many pages, or that the platform did not want them.
    fn report_zone(&self, index: usize, descs: &impl Descriptors) -> Result<u64, NotReported> {
        let mut next = Some(Pfn(0));
        let mut pages = 0;
        while let Some(at) = next {
            let mut batch = Batch::new();
            next = self
                .lock(index)
                .isolate_unreported(self.reporting.order, at, &mut batch);
            if batch.len == 0 {
                continue;
            }
            crate::inject::point("reporting: isolated");
            let mut away = Away {
                pages: self,
                index,
                batch: &batch,
                contents: Contents::UNKNOWN,
                descs,
            };
            let result = self.platform.report_free_pages(&batch.blocks[..batch.len]);
            away.contents = match result {
                Ok(Reported::Zeroed) if self.services.trusts_zeros() => {
                    Contents::REPORTED.with(Contents::CLEAN)
                }
                Ok(_) => Contents::REPORTED,
                // Some may be gone.
                Err(NotReported) => Contents::UNKNOWN,
            };
            drop(away);
            result?;
            pages += batch.pages;
            let pin = self.pin();
            let stats = self.stats(&pin);
            stats.add(&pin, Event::PgReported, batch.pages);
            stats.add(&pin, Event::ReportBatch, 1);
        }
        Ok(pages)
    }

    /// The blocks are free again (`page_reporting_drain`).
    fn put_back(&self, index: usize, batch: &Batch, contents: Contents, descs: &impl Descriptors) {
        let mut freed = DescList::new();
        {
            let mut zone = self.lock(index);
            for (&(pfn, order), word) in batch.blocks.iter().zip(batch.words).take(batch.len) {
                let word = word.with_contents(contents);
                // Their buddies may have come free meanwhile.
                zone.free_block(Block { pfn, word }, order, &mut freed);
            }
        }
        if !freed.is_empty() {
            descs.put(freed);
        }
    }

    /// Reports what is to be reported, of all zones.
    fn report_all(&self, descs: &impl Descriptors) -> Result<u64, NotReported> {
        let reporting = &self.reporting;
        // Acquire and Release: a cycle sees what the one before it did, though it does not depend on it.
        if reporting.order > MAX_ORDER || reporting.active.swap(true, Ordering::Acquire) {
            return Ok(0);
        }
        let _cycle = Cycle(&reporting.active);
        reporting.due.store(0, Ordering::Relaxed);
        let (mut pages, mut result) = (0, Ok(()));
        for (index, zone) in self.zones.iter().enumerate() {
            // Before the search: what comes free behind it asks again.
            zone.reporting.wanted.store(false, Ordering::Relaxed);
            match self.report_zone(index, descs) {
                Ok(more) => pages += more,
                // What was put back asks for another try, after the delay.
                Err(why) => {
                    result = Err(why);
                    break;
                }
            }
        }
        result.map(|()| pages)
    }

    /// Is a cycle due? Asked for at the latest one tick after a block came free.
    fn report_due(&self) -> bool {
        let reporting = &self.reporting;
        if reporting.order > MAX_ORDER {
            return false;
        }
        let wanted = |zone: &Zone| zone.reporting.wanted.load(Ordering::Relaxed);
        if !self.zones.iter().any(wanted) {
            return false;
        }
        let now = self.platform.now();
        let due = now.saturating_add(reporting.delay_ns).max(1);
        // Who asks first says when; who finds that it is time takes the request away.
        match reporting
            .due
            .compare_exchange(0, due, Ordering::Relaxed, Ordering::Relaxed)
        {
            Ok(_) => reporting.delay_ns == 0 && self.take_request(due),
            Err(due) => now >= due && self.take_request(due),
        }
    }

    fn take_request(&self, due: u64) -> bool {
        let due_now = &self.reporting.due;
        due_now
            .compare_exchange(due, 0, Ordering::Relaxed, Ordering::Relaxed)
            .is_ok()
    }
}

impl<P: Platform> Mm<P> {
    /// Reports all large free blocks that were not reported since they came free, now, without the delay that [`tick`](Self::tick) keeps
    /// (`page_reporting_process`). Says how many pages; 0 too if another CPU is at it, or if reporting is not on
    /// ([`Config::page_reporting`]).
    ///
    /// Blocks in per-CPU lists are not looked at ([`drain_all`](Self::drain_all)), nor is memory that was never handed out.
    ///
    /// # Context
    ///
    /// Where [`Platform::report_free_pages`] may be called: it is called with no lock held and not pinned by us.
    ///
    /// # Errors
    ///
    /// The platform could not. What it got has been put back, and will be reported again.
    pub fn page_report(&self) -> Result<u64, NotReported> {
        self.pages.report_all(self)
    }

    /// The periodic part.
    pub(crate) fn page_reporting_tick(&self) {
        if self.pages.report_due() {
            // What could not be reported is tried again.
            let _ = self.pages.report_all(self);
        }
    }
}
