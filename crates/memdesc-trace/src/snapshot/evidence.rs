//! What the events of a recording prove about single pages of a snapshot before or behind it.

use memdesc::gfp::Flags;

use crate::event::{Event, EventKind};

/// For each page: proved free, proved allocated, or never touched.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Evidence {
    free: Vec<u64>,
    allocated: Vec<u64>,
}

impl Evidence {
    /// About the moment before the first event: what is allocated first was free, what is freed
    /// first was allocated.
    pub fn of_start<'a>(events: impl IntoIterator<Item = &'a Event>) -> Evidence {
        Evidence::collect(events, |_, _| true, false)
    }

    /// About the moment behind the last event, told by the last event of each page.
    ///
    /// A snapshot that is taken after a recording has ended is of a later moment: much was freed in
    /// between, perf's own buffers not the least. Use this where the last event counts, not for what
    /// the snapshot's counters say.
    pub fn of_end<'a, I>(events: I) -> Evidence
    where
        I: IntoIterator<Item = &'a Event>,
        I::IntoIter: DoubleEndedIterator,
    {
        Evidence::collect(events.into_iter().rev(), |_, _| false, true)
    }

    /// The same about the pages without flags of a snapshot that was taken some time after the last event. `bare` says of an
    /// allocation whether its pages bear no flags; the pages of others would bear some if they were still allocated, and so are
    /// free.
    pub fn of_end_without_flags<'a, I>(events: I, bare: impl Fn(Flags, u8) -> bool) -> Evidence
    where
        I: IntoIterator<Item = &'a Event>,
        I::IntoIter: DoubleEndedIterator,
    {
        let freed_since = |gfp, order| !bare(gfp, order);
        Evidence::collect(events.into_iter().rev(), freed_since, true)
    }

    /// Whether an allocation proves that its pages are free at the moment in question, and whether a free does. The first proof
    /// counts.
    fn collect<'a>(
        events: impl IntoIterator<Item = &'a Event>,
        by_alloc: impl Fn(Flags, u8) -> bool,
        by_free: bool,
    ) -> Evidence {
        let mut evidence = Evidence::default();
        for event in events {
            let (pfn, order, is_free) = match event.kind() {
                EventKind::PageAlloc {
                    pfn, order, gfp, ..
                } => (pfn, order, by_alloc(gfp, order)),
                EventKind::PageFree { pfn, order } => (pfn, order, by_free),
                _ => continue,
            };
            // A broken order must not make one event cost the memory of all.
            let end = u64::from(pfn)
                .saturating_add(1 << order.min(18))
                .min(u32::MAX.into());
            for page in u64::from(pfn)..end {
                evidence.first(page as usize, is_free);
            }
        }
        evidence
    }

    fn first(&mut self, page: usize, free: bool) {
        let (word, bit) = (page / 64, 1 << (page % 64));
        if word >= self.free.len() {
            self.free.resize(word + 1, 0);
            self.allocated.resize(word + 1, 0);
        }
        if (self.free[word] | self.allocated[word]) & bit == 0 {
            let set = if free {
                &mut self.free
            } else {
                &mut self.allocated
            };
            set[word] |= bit;
        }
    }

    /// `Some(true)`: free for certain, `Some(false)`: allocated for certain.
    #[inline]
    pub fn is_free(&self, pfn: u32) -> Option<bool> {
        let (word, bit) = (pfn as usize / 64, 1u64 << (pfn % 64));
        let has = |set: &[u64]| set.get(word).is_some_and(|w| w & bit != 0);
        if has(&self.free) {
            Some(true)
        } else if has(&self.allocated) {
            Some(false)
        } else {
            None
        }
    }
}
