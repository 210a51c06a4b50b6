//! The census of the replay beside that of Linux's snapshot, type by type and page by page.
//!
//! Sums may agree by chance, so each page of Linux is compared too: what stands for it here, and what the snapshot says of it.
//! Where they differ the page's last event says why: see [`Differences`].

use memdesc::{CensusKind, MAX_ORDER};
use memdesc_trace::snapshot::layout::{Layout, LayoutKind};

use super::ahead::{LastEvent, LastEvents};
use super::layout::in_ram;
use crate::handles::Machine;
use memdesc_replay::pages::{Holder, Pages};

/// What both sides have: the rows of the table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(usize)]
pub(crate) enum Type {
    Anon,
    File,
    PageTable,
    /// Slabs of users' objects; of Linux those from before the recording, for which bare pages stand here.
    Slab,
    Bare,
    Reserved,
    /// Linux's early boot memory, `struct page`s mostly, and our memory map and slabs of descriptors.
    Metadata,
    Free,
}

impl Type {
    pub(crate) const ALL: [Type; 8] = [
        Type::Anon,
        Type::File,
        Type::PageTable,
        Type::Slab,
        Type::Bare,
        Type::Reserved,
        Type::Metadata,
        Type::Free,
    ];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Type::Anon => "anon",
            Type::File => "file",
            Type::PageTable => "page_table",
            Type::Slab => "slab",
            Type::Bare => "bare",
            Type::Reserved => "reserved",
            Type::Metadata => "metadata",
            Type::Free => "free",
        }
    }

    /// Do both sides have it for the same reason? Free memory is what the others leave, and metadata is each side's own.
    pub(crate) const fn is_compared(self) -> bool {
        !matches!(self, Type::Metadata | Type::Free)
    }

    /// Are its allocations known, and not only its pages?
    pub(crate) const fn has_blocks(self) -> bool {
        !matches!(self, Type::Reserved | Type::Metadata | Type::Free)
    }

    fn of_layout(kind: LayoutKind, flagged: bool) -> Option<Type> {
        Some(match kind {
            LayoutKind::Anon => Type::Anon,
            LayoutKind::File => Type::File,
            LayoutKind::PageTable => Type::PageTable,
            LayoutKind::Slab => Type::Slab,
            LayoutKind::Reserved if flagged => Type::Reserved,
            LayoutKind::Reserved => Type::Metadata,
            LayoutKind::OtherAllocated | LayoutKind::Offline | LayoutKind::HwPoison => Type::Bare,
            LayoutKind::Free | LayoutKind::FreePerCpu | LayoutKind::FreeUninitialised => Type::Free,
            LayoutKind::NoPage => return None,
        })
    }

    fn of_holder(holder: Holder) -> Option<Type> {
        Some(match holder {
            Holder::Nobody => Type::Free,
            Holder::Bare => Type::Bare,
            Holder::Anon => Type::Anon,
            Holder::File => Type::File,
            Holder::PageTable => Type::PageTable,
            Holder::OldSlab | Holder::Slab => Type::Slab,
            Holder::Reserved => Type::Reserved,
            Holder::Unseen => Type::Metadata,
            Holder::Failed => return None,
        })
    }

    fn of_census(kind: CensusKind) -> Type {
        match kind {
            CensusKind::Free | CensusKind::PerCpu | CensusKind::Untouched => Type::Free,
            CensusKind::Slab => Type::Slab,
            CensusKind::PageTable => Type::PageTable,
            CensusKind::File => Type::File,
            CensusKind::Anon => Type::Anon,
            CensusKind::Metadata | CensusKind::MemMap => Type::Metadata,
            CensusKind::Kernel | CensusKind::KernelText | CensusKind::KernelData => Type::Reserved,
            _ => Type::Bare,
        }
    }
}

/// One type on one side.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Count {
    pub(crate) pages: u64,
    pub(crate) blocks: u64,
    pub(crate) by_order: [u64; MAX_ORDER + 1],
}

impl Count {
    fn add(&mut self, pages: u64, order: Option<usize>) {
        self.pages += pages;
        if let Some(order) = order {
            self.blocks += 1;
            self.by_order[order.min(MAX_ORDER)] += 1;
        }
    }

    /// Blocks of more than one page.
    pub(crate) fn large(&self) -> u64 {
        self.blocks - self.by_order[0]
    }

    pub(crate) fn pages_a_block(&self) -> f64 {
        self.pages as f64 / self.blocks.max(1) as f64
    }
}

/// All types on one side.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Side([Count; Type::ALL.len()]);

impl Side {
    pub(crate) fn of(&self, of: Type) -> &Count {
        &self.0[of as usize]
    }

    /// Our machine as it is now. Bare pages that stand for a slab of Linux are slabs; says how many blocks of them there are.
    pub(crate) fn of_machine(machine: &Machine, pages: &Pages) -> (Side, u64) {
        let mut side = Side::default();
        let stands_for_slab = pages.heads_of(Holder::OldSlab);
        machine.mm.census_visit(|step| {
            let mut of = Type::of_census(step.kind);
            if of == Type::Bare && stands_for_slab.contains(&step.pfn.0) {
                of = Type::Slab;
            }
            side.0[of as usize].add(step.pages.into(), step.order);
        });
        (side, stands_for_slab.len() as u64)
    }

    /// Linux as a snapshot shows it. `flags` are the snapshot's, `ram` the pages that are memory here.
    pub(crate) fn of_layout(layout: &Layout, flags: &[u64], ram: &[(u32, u32)]) -> Side {
        let mut side = Side::default();
        for block in &layout.blocks {
            let ours = in_ram(block, ram);
            if block.kind == LayoutKind::Reserved {
                for page in ours.flatten() {
                    if let Some(of) = Type::of_layout(block.kind, flags[page as usize] != 0) {
                        side.0[of as usize].pages += 1;
                    }
                }
            } else if let Some(of) = Type::of_layout(block.kind, true) {
                let order = block.pages.ilog2() as usize;
                let pages: u64 = ours.map(|range| range.len() as u64).sum();
                if pages > 0 {
                    side.0[of as usize].add(pages, of.has_blocks().then_some(order));
                }
            }
        }
        side
    }
}

/// Pages of Linux, by how what stands for them agrees with the snapshot. Pages that are free or reserved in both count nowhere.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Differences {
    /// The same type in both.
    pub(crate) same: u64,
    /// Allocated by their last event, free in the snapshot: they were freed in between.
    pub(crate) freed_since: u64,
    /// Freed by their last event, taken in the snapshot.
    pub(crate) taken_since: u64,
    /// Of different types in the snapshots before and after, or free in one, and no event mentions them.
    pub(crate) without_event: u64,
    /// Without flags in the snapshot, and nothing tells bare pages from those in per-CPU lists: the snapshot's type is a guess.
    pub(crate) guessed: u64,
    /// Allocated by their last event as one type, another in the snapshot: the flags mislead, or it was handed out again since.
    pub(crate) other_type: u64,
    /// By type, without what changed hands since: pages that have it in both, and in one.
    settled: [(u64, u64); Type::ALL.len()],
}

impl Differences {
    /// All that the allocator has handed out on either side.
    pub(crate) fn all(&self) -> u64 {
        self.same
            + self.freed_since
            + self.taken_since
            + self.without_event
            + self.guessed
            + self.other_type
    }

    /// The share that is the same, in percent.
    pub(crate) fn percent(&self) -> f64 {
        percent(self.same, self.all())
    }

    /// The share of a type's pages that have it in both, without what changed hands since.
    pub(crate) fn percent_of(&self, of: Type) -> f64 {
        let (both, one) = self.settled[of as usize];
        percent(both, both + one)
    }

    /// The share that is the same without what changed hands between the last event and the snapshot, of which the replay cannot know.
    pub(crate) fn settled_percent(&self) -> f64 {
        percent(self.same, self.all() - self.freed_since - self.taken_since)
    }
}

fn percent(part: u64, all: u64) -> f64 {
    if all == 0 {
        return 100.0;
    }
    part as f64 * 100.0 / all as f64
}

/// Compares page by page. `last` is `None` for the snapshot before the first event.
pub(crate) fn compare(
    pages: &Pages,
    layout: &Layout,
    flags: &[u64],
    ram: &[(u32, u32)],
    last: Option<&LastEvents>,
) -> Differences {
    let mut all = Differences::default();
    for block in &layout.blocks {
        for pfn in in_ram(block, ram).flatten() {
            let flagged = flags[pfn as usize] != 0;
            let theirs = Type::of_layout(block.kind, flagged);
            let ours = Type::of_holder(pages.holder(pfn));
            let (Some(theirs), Some(ours)) = (theirs, ours) else {
                continue;
            };
            let mut settled = true;
            let place = match last.map_or(LastEvent::Never, |last| last.of(pfn)) {
                // Free in both, or from before there was an allocator.
                _ if ours == theirs && !ours.has_blocks() => continue,
                _ if ours == theirs => &mut all.same,
                LastEvent::Allocated(_) if theirs == Type::Free => {
                    settled = false;
                    &mut all.freed_since
                }
                LastEvent::Freed if theirs != Type::Free => {
                    settled = false;
                    &mut all.taken_since
                }
                LastEvent::Never if !flagged => &mut all.guessed,
                LastEvent::Never => &mut all.without_event,
                LastEvent::Allocated(_) | LastEvent::Freed => &mut all.other_type,
            };
            *place += 1;
            if ours == theirs {
                all.settled[ours as usize].0 += 1;
            } else if settled {
                all.settled[ours as usize].1 += 1;
                all.settled[theirs as usize].1 += 1;
            }
        }
    }
    all
}

/// Both sides at one moment.
#[derive(Clone, Debug)]
pub(crate) struct Beside {
    pub(crate) linux: Side,
    pub(crate) differences: Differences,
}

/// What the report says.
#[derive(Clone, Debug)]
pub(crate) struct Census {
    /// The replay at its end.
    pub(crate) replay: Side,
    /// Of its slabs, those that are bare pages: their objects are not replayed.
    pub(crate) bare_slabs: u64,
    /// Linux's last snapshot.
    pub(crate) linux: Option<Beside>,
    /// Linux's first snapshot, and how the machine agreed with it when it was taken over.
    pub(crate) start: Option<Beside>,
    /// Allocations whose type the last snapshot knew better than their flags.
    pub(crate) corrected: u64,
}

impl Census {
    /// The type of what is handed out whose pages differ most, and by how many here less there.
    pub(crate) fn largest_difference(&self) -> Option<(Type, i64)> {
        let linux = &self.linux.as_ref()?.linux;
        let difference = |of: Type| self.replay.of(of).pages as i64 - linux.of(of).pages as i64;
        let handed_out = Type::ALL.into_iter().filter(|of| of.has_blocks());
        handed_out
            .map(|of| (of, difference(of)))
            .max_by_key(|(_, n)| n.abs())
    }
}

/// How far two counts agree: the smaller as a share of the larger, in percent.
pub(crate) fn agreement(ours: u64, theirs: u64) -> f64 {
    percent(ours.min(theirs), ours.max(theirs))
}

#[cfg(test)]
mod tests {
    use memdesc::gfp::GFP_KERNEL;
    use memdesc_trace::snapshot::layout::LayoutBlock;
    use memdesc_trace::{Event, EventKind};

    use super::*;
    use crate::handles::OwnedBlock;
    use memdesc_replay::handles::Token;

    fn block(pfn: u32, pages: u32, kind: LayoutKind) -> LayoutBlock {
        LayoutBlock { pfn, pages, kind }
    }

    #[test]
    fn a_side_of_linux() {
        let layout = Layout {
            blocks: vec![
                block(0, 2, LayoutKind::NoPage),
                block(2, 4, LayoutKind::Reserved),
                block(6, 1, LayoutKind::Anon),
                block(7, 1, LayoutKind::File),
                block(8, 8, LayoutKind::File),
                block(16, 16, LayoutKind::Free),
                block(32, 4, LayoutKind::Slab),
            ],
            zones: Vec::new(),
        };
        let mut flags = vec![1; 36];
        flags[2] = 0;
        let side = Side::of_layout(&layout, &flags, &[(1, 24), (30, 36)]);
        assert_eq!(side.of(Type::Metadata).pages, 1);
        assert_eq!(side.of(Type::Reserved).pages, 3);
        let file = side.of(Type::File);
        assert_eq!((file.pages, file.blocks, file.large()), (9, 2, 1));
        assert_eq!((file.by_order[0], file.by_order[3]), (1, 1));
        assert_eq!(file.pages_a_block(), 4.5);
        assert_eq!(side.of(Type::Free).pages, 10);
        assert_eq!(side.of(Type::Slab).by_order[2], 1);
    }

    #[test]
    fn why_pages_differ() {
        let kinds = [
            LayoutKind::Anon,           // the same
            LayoutKind::Free,           // freed since
            LayoutKind::File,           // taken since
            LayoutKind::File,           // no event
            LayoutKind::OtherAllocated, // no flags
            LayoutKind::File,           // another type
            LayoutKind::Free,           // free in both
        ];
        let blocks = kinds.iter().enumerate();
        let layout = Layout {
            blocks: blocks.map(|(i, &k)| block(i as u32, 1, k)).collect(),
            zones: Vec::new(),
        };
        let mut pages = Pages::new(8);
        for (pfn, holder) in [
            (0, Holder::Anon),
            (1, Holder::Anon),
            (3, Holder::Anon),
            (5, Holder::Anon),
        ] {
            // SAFETY: nothing is ever done with it here.
            let ours = unsafe { OwnedBlock::from_raw(100 + pfn) };
            pages.put(pfn, 0, holder, ours);
        }
        let alloc = |pfn| EventKind::PageAlloc {
            pfn,
            order: 0,
            migratetype: 0,
            gfp: GFP_KERNEL,
        };
        let free = EventKind::PageFree { pfn: 2, order: 0 };
        let events = [alloc(1), alloc(5), free].map(|kind| Event::new(0, 0, kind));
        let last = LastEvents::find(&events, 8);
        let flags = [1, 1, 1, 1, 0, 1, 1];
        let all = compare(&pages, &layout, &flags, &[(0, 7)], Some(&last));
        let expected = Differences {
            same: 1,
            freed_since: 1,
            taken_since: 1,
            without_event: 1,
            guessed: 1,
            other_type: 1,
            // Free here and bare there, a guess: in `Bare` and `Free`.
            settled: [
                (1, 2),
                (0, 2),
                (0, 0),
                (0, 0),
                (0, 1),
                (0, 0),
                (0, 0),
                (0, 1),
            ],
        };
        assert_eq!(all, expected);
        assert_eq!(all.percent_of(Type::PageTable), 100.0);
        assert_eq!(all.all(), 6);
        assert_eq!(all.settled_percent(), 25.0);
    }

    #[test]
    fn shares() {
        assert_eq!(agreement(50, 100), 50.0);
        assert_eq!(agreement(100, 50), 50.0);
        assert_eq!(agreement(0, 0), 100.0);
    }
}
