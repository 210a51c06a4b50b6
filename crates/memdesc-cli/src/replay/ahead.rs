//! What the events and the last snapshot together know before the replay begins: the last event of each page, and what became
//! of the allocations that nobody frees.
//!
//! An allocation whose pages are still out at the last event is shown by the snapshot taken after it, with its type: file,
//! anonymous, a page table, a slab. Where its gfp flags say something else, the snapshot is right and the flags are not. But the
//! snapshot is of a later moment. Pages without a type there were freed in between and say nothing; nor do pages whose
//! compound page is not of the event's order, since those were freed and handed out again.

use memdesc_trace::snapshot::kpageflags::{KPF_COMPOUND_HEAD, KPF_COMPOUND_TAIL, PageKind};
use memdesc_trace::{Event, EventKind};

use memdesc_replay::{Corrections, classify};

use crate::handles::Purpose;

/// Which events a page was in last.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum LastEvent {
    /// None at all.
    Never,
    /// It was freed.
    Freed,
    /// It was allocated, by the event with this number.
    Allocated(usize),
}

/// The last event of each page. One number a page: 0 for none, 1 for freed, else two more than the event's.
pub(crate) struct LastEvents(Vec<u32>);

impl LastEvents {
    /// Looks at all events; `pages` is one more than the highest page there is.
    pub(crate) fn find(events: &[Event], pages: usize) -> LastEvents {
        let mut last = vec![0u32; pages];
        for (i, event) in events.iter().enumerate() {
            let (pfn, order, mark) = match event.kind() {
                EventKind::PageAlloc { pfn, order, .. } => (pfn, order, i as u32 + 2),
                EventKind::PageFree { pfn, order } => (pfn, order, 1),
                _ => continue,
            };
            last[pfn as usize..pfn as usize + (1 << order)].fill(mark);
        }
        LastEvents(last)
    }

    /// Of one page.
    pub(crate) fn of(&self, pfn: u32) -> LastEvent {
        match self.0.get(pfn as usize) {
            None | Some(0) => LastEvent::Never,
            Some(1) => LastEvent::Freed,
            Some(&n) => LastEvent::Allocated(n as usize - 2),
        }
    }

    /// Compares flags with the snapshot's for all that is still out. `skip` names events that are not replayed as pages.
    pub(crate) fn corrections(
        &self,
        events: &[Event],
        flags: &[u64],
        skip: impl Fn(usize) -> bool,
    ) -> Corrections {
        let mut list = Vec::new();
        for page in 0..self.0.len().min(flags.len()) as u32 {
            let LastEvent::Allocated(index) = self.of(page) else {
                continue;
            };
            let EventKind::PageAlloc {
                pfn, order, gfp, ..
            } = events[index].kind()
            else {
                continue;
            };
            // Heads only; a block whose head was freed before the rest is left to its flags.
            if pfn != page || skip(index) {
                continue;
            }
            if let Some(shown) = shown(&flags[page as usize..], order)
                && shown != classify::purpose(gfp, order)
            {
                list.push((index as u32, shown));
            }
        }
        Corrections::new(list)
    }
}

/// What the snapshot shows of a block of this order whose flags begin here; `None` if it is another block, or nothing is shown.
fn shown(flags: &[u64], order: u8) -> Option<Purpose> {
    let purpose = match PageKind::of(*flags.first()?) {
        PageKind::Anon => Purpose::Anon,
        PageKind::File => Purpose::File,
        PageKind::PageTable => Purpose::PageTable,
        PageKind::Slab => Purpose::Slab,
        _ => return None,
    };
    let pages = match flags[0] & (KPF_COMPOUND_HEAD | KPF_COMPOUND_TAIL) {
        0 => 1,
        KPF_COMPOUND_HEAD => {
            let is_tail = |&&f: &&u64| f & KPF_COMPOUND_TAIL != 0;
            1 + flags[1..].iter().take_while(is_tail).count()
        }
        _ => return None,
    };
    (pages == 1 << order).then_some(purpose)
}

#[cfg(test)]
mod tests {
    use memdesc::gfp::{__GFP_ZERO, Flags, GFP_HIGHUSER_MOVABLE, GFP_KERNEL};
    use memdesc_trace::snapshot::kpageflags::{
        KPF_ANON, KPF_BUDDY, KPF_LRU, KPF_PGTABLE, KPF_SLAB,
    };

    use super::*;

    fn alloc(pfn: u32, order: u8, gfp: Flags) -> Event {
        let kind = EventKind::PageAlloc {
            pfn,
            order,
            migratetype: 0,
            gfp,
        };
        Event::new(0, 0, kind)
    }

    fn free(pfn: u32, order: u8) -> Event {
        Event::new(0, 0, EventKind::PageFree { pfn, order })
    }

    #[test]
    fn the_last_event_of_a_page() {
        let events = [alloc(4, 2, GFP_KERNEL), free(5, 0), alloc(5, 0, GFP_KERNEL)];
        let last = LastEvents::find(&events, 16);
        assert_eq!(last.of(3), LastEvent::Never);
        assert_eq!(last.of(4), LastEvent::Allocated(0));
        assert_eq!(last.of(5), LastEvent::Allocated(2));
        assert_eq!(last.of(99), LastEvent::Never);
        assert_eq!(LastEvents::find(&events[..2], 16).of(5), LastEvent::Freed);
    }

    #[test]
    fn the_snapshot_knows_better() {
        let anon = GFP_HIGHUSER_MOVABLE | __GFP_ZERO;
        let events = [
            alloc(0, 0, anon),        // shown as file: it is
            alloc(1, 0, anon),        // as flags say
            alloc(2, 0, anon),        // freed after the last event
            alloc(4, 2, anon),        // a compound page of that order
            alloc(8, 0, anon),        // handed out again: the head of a larger one
            alloc(10, 0, GFP_KERNEL), // a page table
            alloc(11, 0, GFP_KERNEL), // a slab
            alloc(12, 0, anon),       // freed by an event
            free(12, 0),
            alloc(13, 0, GFP_KERNEL), // not replayed
        ];
        let (head, tail) = (KPF_LRU | KPF_COMPOUND_HEAD, KPF_LRU | KPF_COMPOUND_TAIL);
        let flags = [
            KPF_LRU,
            KPF_ANON,
            KPF_BUDDY,
            0,
            head,
            tail,
            tail,
            tail,
            head,
            tail,
            KPF_PGTABLE,
            KPF_SLAB,
            KPF_LRU,
            KPF_SLAB,
        ];
        let last = LastEvents::find(&events, 16);
        let mut corrections = last.corrections(&events, &flags, |index| index == 9);
        assert_eq!(corrections.len(), 4);
        let all: Vec<_> = (0..events.len()).map(|i| corrections.of(i)).collect();
        let mut expected = vec![None; events.len()];
        expected[0] = Some(Purpose::File);
        expected[3] = Some(Purpose::File);
        expected[5] = Some(Purpose::PageTable);
        expected[6] = Some(Purpose::Slab);
        assert_eq!(all, expected);
    }
}
