//! What has to be so: while all threads stand still, and when everything is let go.

use std::sync::PoisonError;

use memdesc::mmap::{MapError, MmStruct};
use memdesc::{Mm, PageType};
use memdesc_host::Host;

use super::report::Outcome;
use super::{Count, DEVICE_PAGES, DMA_MAPPED, OWN_FREED, PASSING, Shared, Wrong, read};
use crate::rng::Rng;

/// Looks at everything so far, and the most that was seen.
#[derive(Default)]
pub(super) struct Checked {
    pub(super) looks: u64,
    pub(super) most_bad: u64,
    pub(super) most_balloon: u64,
    pub(super) most_device: u64,
    pub(super) least_free: Option<u64>,
    pub(super) entries: u64,
}

impl Checked {
    /// Looks at everything. Nobody is at work.
    pub(super) fn look(&mut self, shared: &Shared<'_>) {
        let (mm, wrong) = (shared.mm, shared.wrong);
        self.looks += 1;
        words(mm, wrong);
        let census = mm.census();
        if census.pages() != shared.ram || census.torn > 0 {
            wrong.add(format!(
                "{} of {} pages in the census, {} of them torn",
                census.pages(),
                shared.ram,
                census.torn
            ));
        }
        let slots: Vec<_> = shared.spaces.iter().map(read).collect();
        let live = slots.iter().filter_map(|slot| slot.as_ref());
        let spaces: Vec<_> = live.map(|live| &live.space).collect();
        let mut seen = vec![0; (2 * shared.ram) as usize + DEVICE_PAGES as usize];
        match MmStruct::check_all(&spaces, &mut seen) {
            Ok(report) => self.entries = self.entries.max(report.pages + report.huge),
            Err(why) => {
                let (MapError::Page(page, ..) | MapError::Folio(page, ..)) = why else {
                    return wrong.add(format!("counts and tables: {why:?}"));
                };
                let found = mm.lookup(page);
                let (name, history) = (mm.type_name(page), mm.page_history(page));
                wrong.add(format!(
                    "counts and tables: {why:?}: {name} {found:?}, {history:?}"
                ));
            }
        }
        let free = census.free_pages();
        self.least_free = Some(self.least_free.unwrap_or(free).min(free));
        self.most_bad = self.most_bad.max(mm.num_poisoned_pages());
        self.most_balloon = self.most_balloon.max(shared.balloon.pages());
        self.most_device = self.most_device.max(mm.device_pages_in_use());
    }
}

/// The ledger, words, lists, areas and charges.
fn words(mm: &Mm<Host>, wrong: &Wrong) {
    let ledger = mm.ledger();
    if !ledger.balanced {
        wrong.add(format!("the ledger does not balance: {ledger:?}"));
    }
    let found = mm.validate(|report| wrong.add(format!("validate: {report}")));
    if found.errors() > 0 {
        wrong.add(format!("validate: {found:?}"));
    }
    if let Err(why) = mm.memcg_check() {
        wrong.add(why.to_string());
    }
    if let Err(why) = mm.check_vm_areas() {
        wrong.add(format!("vmalloc areas: {why}"));
    }
}

/// Pages of each type before anything was made; bytes of objects that somebody has, and of tables that are kept for good, those of groups among them.
pub(super) struct Baseline {
    pages: Vec<u64>,
    objects: u64,
    tables: u64,
}

/// Bytes of objects that somebody has.
fn objects(mm: &Mm<Host>) -> u64 {
    let mut bytes = 0;
    mm.slabinfo(|cache| {
        if !cache.metadata {
            bytes += cache.active_objs * cache.object_size as u64;
        }
    });
    bytes
}

impl Baseline {
    pub(super) fn of(mm: &Mm<Host>) -> Baseline {
        mm.shrink();
        let count = |&kind| mm.pages_of(kind);
        Baseline {
            pages: PageType::ALL.iter().map(count).collect(),
            objects: objects(mm),
            tables: mm.ledger().other_metadata_bytes,
        }
    }
}

/// Lets go of all that the threads left, and of what they shared. No faults any more.
pub(super) fn let_go(shared: Shared<'_>, outcome: &mut Outcome) {
    let (mm, wrong) = (shared.mm, shared.wrong);
    let mut rng = Rng(1);
    let mut left = std::mem::take(&mut *shared.left());
    // What is off line comes last: its descriptors may need what the others free.
    for _ in 0..64 {
        for held in std::mem::take(&mut left) {
            if let Err(held) = held.release(&shared, &mut rng) {
                left.push(held);
            }
        }
        if left.is_empty() {
            break;
        }
        mm.shrink();
    }
    for held in &left {
        wrong.add(format!("not let go: {}", held.thing.name(&shared)));
    }
    for slot in &shared.spaces {
        *slot.write().unwrap_or_else(PoisonError::into_inner) = None;
    }
    for pages in [u32::MAX; 8] {
        shared.balloon.deflate(pages);
    }
    if shared.balloon.pages() > 0 {
        wrong.add(format!(
            "{} pages stay in the balloon",
            shared.balloon.pages()
        ));
    }
    for slot in &shared.groups {
        *slot.write().unwrap_or_else(PoisonError::into_inner) = None;
    }
    // Pages that failed while somebody had them go out of use now.
    mm.shrink();
    for _ in 0..8 {
        for pfn in std::mem::take(&mut *shared.failed()) {
            match mm.unpoison_memory(pfn) {
                Ok(()) => shared.count(Count::Unpoisoned),
                Err(memdesc::AllocError::Busy) => shared.count(Count::NotBad),
                Err(_) => shared.failed().push(pfn),
            }
        }
    }
    if mm.num_poisoned_pages() > 0 {
        let left = mm.num_poisoned_pages();
        wrong.add(format!("{left} pages stay bad that nobody knows of"));
    }
    let device = shared.device.into_inner();
    let device = device.unwrap_or_else(PoisonError::into_inner);
    if let Err(device) = device.unplug() {
        wrong.add(format!("{} pages of the device in use", device.in_use()));
    }
    outcome.own = shared.own.into_inner();
    outcome.counts = shared
        .counts
        .iter()
        .map(|n| n.load(std::sync::atomic::Ordering::Relaxed))
        .collect();
}

/// Nothing is left.
pub(super) fn at_the_end(mm: &Mm<Host>, before: &Baseline, wrong: &Wrong, outcome: &mut Outcome) {
    use std::sync::atomic::Ordering::Relaxed;
    mm.shrink();
    mm.shrink();
    words(mm, wrong);
    let ledger = mm.ledger();
    outcome.balanced = ledger.balanced;
    for (nth, &kind) in PageType::ALL.iter().enumerate() {
        let (was, is) = (before.pages[nth], mm.pages_of(kind));
        let passing = PASSING.contains(&kind);
        let kept = matches!(kind, PageType::LargeKmalloc | PageType::Vmalloc);
        if (passing && is != 0) || (kept && is > was) {
            outcome.lost += is - if passing { 0 } else { was };
            wrong.add(format!(
                "{is} pages of {} at the end, {was} before",
                kind.name()
            ));
        }
    }
    // What groups were made of stays for the next ones, and is in the ledger.
    let kept = before.objects + ledger.other_metadata_bytes.saturating_sub(before.tables);
    let left = objects(mm);
    if left > kept {
        wrong.add(format!(
            "{left} bytes of objects at the end, where {kept} are kept"
        ));
        mm.slabinfo(|cache| {
            if cache.active_objs > 0 && !cache.metadata {
                let (name, pages) = (cache.name, cache.pages);
                let objects = cache.active_objs;
                wrong.add(format!("{objects} objects of {name} in {pages} pages"));
            }
        });
    }
    outcome.zombies = mm.memcg_zombies();
    mm.memcg_stat(|group| wrong.add(format!("a group is left: {group}")));
    let freed = OWN_FREED.load(Relaxed);
    if freed != outcome.own {
        wrong.add(format!(
            "{freed} of {} own pages were told that they go",
            outcome.own
        ));
    }
    let mapped = DMA_MAPPED.load(Relaxed);
    if mapped != 0 {
        wrong.add(format!("{mapped} blocks stay mapped for network devices"));
    }
    let queued = mm.kvfree_queued();
    if queued != 0 {
        wrong.add(format!("{queued} objects wait to be freed"));
    }
}
