//! vmalloc against a plain model of address ranges: nothing overlaps, guards lie between, the tree is as it should be after each step.
#![cfg(not(miri))]

#[path = "common/areas.rs"]
mod areas;
mod common;

use std::collections::BTreeMap;
use std::ptr::NonNull;

use areas::*;
use common::*;
use memdesc::gfp::GFP_KERNEL;
use memdesc::*;
use memdesc_host::{Host, interrupt};
use proptest::prelude::*;

#[derive(Clone, Debug)]
enum Op {
    Alloc(usize),
    Huge,
    Stack(usize),
    Map(usize),
    Free(usize),
    FreeLater(usize),
    Tick,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        5 => (1usize..20).prop_map(Op::Alloc),
        1 => Just(Op::Huge),
        2 => (1usize..5).prop_map(Op::Stack),
        1 => (1usize..9).prop_map(Op::Map),
        5 => any::<usize>().prop_map(Op::Free),
        1 => any::<usize>().prop_map(Op::FreeLater),
        1 => Just(Op::Tick),
    ]
}

enum Live {
    Memory(NonNull<u8>),
    Stack(KernelStack),
    Mapped(NonNull<u8>),
}

/// The plain model: which addresses are taken, guards included, and by what.
#[derive(Default)]
struct Model {
    /// Start → end, of live areas.
    taken: BTreeMap<usize, usize>,
    /// Of freed ones, until a purge.
    lazy: BTreeMap<usize, usize>,
    purges: u64,
}

impl Model {
    fn look(&mut self, mm: &Mm<Host>) {
        let now = mm.vmalloc_info().purges;
        if now != self.purges {
            self.purges = now;
            self.lazy.clear();
        }
    }

    #[track_caller]
    fn take(&mut self, mm: &Mm<Host>, start: usize, end: usize, total: (usize, usize)) {
        self.look(mm);
        assert!(start >= total.0 && end <= total.1, "outside");
        for (s, e) in self.taken.iter().chain(&self.lazy) {
            assert!(
                end <= *s || start >= *e,
                "{start:#x}-{end:#x} overlaps {s:#x}-{e:#x}"
            );
        }
        self.taken.insert(start, end);
    }

    fn give(&mut self, mm: &Mm<Host>, start: usize) {
        let end = self.taken.remove(&start).unwrap();
        self.lazy.insert(start, end);
        self.look(mm);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn against_a_model_of_ranges(ops in prop::collection::vec(op(), 1..120)) {
        let machine = Machine::flat(8192);
        let bytes = 2000 * PAGE_SIZE;
        let mm = machine.boot_on(machine.host().vmalloc(bytes).build().unwrap());
        let base = mm.platform().vmalloc_range().unwrap().addr().get();
        let total = (base, base + bytes);
        let page = mm.alloc_pages(GFP_KERNEL, 0).unwrap();
        let mut model = Model::default();
        let mut live = Vec::new();
        let end = |live: Live| match live {
            Live::Memory(ptr) => vfree(&mm, ptr),
            Live::Stack(stack) => {
                free_stack(&mm, stack);
                // What a CPU keeps is not free; this makes it so.
                mm.shrink();
            }
            // SAFETY: not used any more.
            Live::Mapped(ptr) => unsafe { mm.vunmap(ptr) },
        };
        for op in ops {
            let got = match op {
                Op::Alloc(pages) => mm.vmalloc(pages * PAGE_SIZE, GFP_KERNEL).ok().map(Live::Memory),
                Op::Huge => mm.vmalloc_huge(2 << 20, GFP_KERNEL).ok().map(Live::Memory),
                Op::Stack(pages) => mm.alloc_kernel_stack(pages, 1).ok().map(Live::Stack),
                // SAFETY: the page is ours as long as it is mapped.
                Op::Map(pages) => unsafe { mm.vmap(&vec![page; pages]) }.ok().map(Live::Mapped),
                Op::Free(index) | Op::FreeLater(index) => {
                    if !live.is_empty() {
                        let (start, area) = live.swap_remove(index % live.len());
                        if matches!(op, Op::FreeLater(_)) && matches!(area, Live::Memory(_)) {
                            let irq = interrupt::hardirq();
                            end(area);
                            drop(irq);
                        } else {
                            end(area);
                        }
                        model.give(&mm, start);
                    }
                    None
                }
                Op::Tick => {
                    mm.tick();
                    model.look(&mm);
                    None
                }
            };
            if let Some(area) = got {
                let (ptr, lead) = match &area {
                    Live::Memory(ptr) | Live::Mapped(ptr) => (ptr.as_ptr(), 0),
                    Live::Stack(stack) => (stack.bottom().as_ptr(), PAGE_SIZE),
                };
                let view = mm.find_vm_area(ptr.addr()).unwrap();
                prop_assert!(ptr.addr().is_multiple_of(PAGE_SIZE << view.order));
                let start = ptr.addr() - lead;
                model.take(&mm, start, ptr.addr() + view.size + PAGE_SIZE, total);
                // SAFETY: ours, all of it.
                unsafe { ptr.write_bytes(1, view.size) };
                let guard = mm.explain_address(offset(ptr, view.size as isize).addr());
                prop_assert!(matches!(guard, AddressInfo::GuardAfter(area) if area.start == ptr.addr()));
                live.push((start, area));
            }
            mm.check_vm_areas().unwrap();
        }
        let mut rows = Vec::new();
        mm.for_each_vm_area(|area| if !area.freed { rows.push(area.start) });
        // What was freed in an interrupt may still be there.
        let has_row = |start: usize| rows.contains(&start) || rows.contains(&(start + PAGE_SIZE));
        prop_assert!(live.iter().all(|(start, _)| has_row(*start)));
        live.into_iter().for_each(|(_, area)| end(area));
        free(&mm, page);
        areas::end(&machine, &mm);
    }
}
