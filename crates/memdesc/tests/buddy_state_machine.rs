//! The page API against a plain model, on machines of different shapes.
//!
//! After every step: nothing overlaps, all is aligned, RAM, of one zone, and every page of what was handed out leads to its head. Every few
//! steps the whole machine is compared page by page, the ledger with it. In the end everything is freed, comes back, and
//! merges as far as it goes.

mod common;

use common::*;
use memdesc::gfp::{self, GFP_ATOMIC, GFP_DMA, GFP_HIGHUSER_MOVABLE, GFP_KERNEL, GFP_NOWAIT};
use memdesc::*;
use memdesc_host::Host;
use proptest::prelude::{Just, ProptestConfig, Strategy, any, prop_oneof};

#[derive(Clone, Copy, Debug)]
enum Op {
    Pages {
        order: usize,
        gfp: usize,
    },
    Folio {
        order: usize,
        file: bool,
    },
    Table {
        order: usize,
    },
    At {
        place: u32,
        order: usize,
    },
    Retype {
        which: usize,
        to: usize,
    },
    Free {
        which: usize,
    },
    FreeMany {
        n: usize,
    },
    DrainAll,
    Tick,
    Shrink,
    SetPageblock {
        place: u32,
        mt: usize,
    },
    Cpu {
        cpu: usize,
    },
    /// Many pages of one order at once: fills memory.
    Many {
        order: usize,
        gfp: usize,
        n: usize,
    },
}

const GFPS: [Flags; 6] = [
    GFP_KERNEL,
    GFP_ATOMIC,
    GFP_HIGHUSER_MOVABLE,
    GFP_NOWAIT,
    GFP_DMA,
    gfp::GFP_DMA32,
];

fn gfp_of(index: usize) -> Flags {
    if index == 3 {
        GFP_NOWAIT | gfp::__GFP_RECLAIMABLE
    } else {
        GFPS[index % GFPS.len()]
    }
}

fn op() -> impl Strategy<Value = Op> {
    let order = prop_oneof![4 => 0..4usize, 2 => 4..9usize, 1 => 9..11usize];
    prop_oneof![
        8 => (order.clone(), 0..6usize).prop_map(|(order, gfp)| Op::Pages { order, gfp }),
        4 => (order.clone(), any::<bool>()).prop_map(|(order, file)| Op::Folio { order, file }),
        2 => (order.clone()).prop_map(|order| Op::Table { order }),
        2 => (any::<u32>(), order.clone()).prop_map(|(place, order)| Op::At { place, order }),
        2 => (any::<usize>(), 0..5usize).prop_map(|(which, to)| Op::Retype { which, to }),
        10 => any::<usize>().prop_map(|which| Op::Free { which }),
        2 => (1..200usize).prop_map(|n| Op::FreeMany { n }),
        1 => Just(Op::DrainAll),
        1 => Just(Op::Tick),
        1 => Just(Op::Shrink),
        1 => (any::<u32>(), 0..3usize).prop_map(|(place, mt)| Op::SetPageblock { place, mt }),
        2 => (0..8usize).prop_map(|cpu| Op::Cpu { cpu }),
        3 => (order, 0..6usize, 1..400usize).prop_map(|(order, gfp, n)| Op::Many { order, gfp, n }),
    ]
}

/// What holds of watermarks: a request held to the low mark first and to the min mark in the end, with no discount, is served only from a
/// zone in which, before the request and all per-CPU pages counted, more was free than the mark and the lowmem protection, the
/// block itself less its first page not counted. What a refill takes along, and slabs of descriptors, come on top.
fn check_watermark(
    machine: &Machine,
    before: &[ZoneView],
    pcp: &[u64],
    pfn: Pfn,
    order: usize,
    gfp: Flags,
) {
    let at = before
        .iter()
        .position(|z| z.kind == machine.zone_of(pfn) && z.node == machine.node_of(pfn.0))
        .unwrap();
    let zone = &before[at];
    let mut min = zone.watermarks[0];
    if gfp.contains(gfp::__GFP_HIGH) {
        min -= min / 2;
        if !gfp.allow_blocking() {
            min -= min / 4;
        }
    }
    let reserve = machine.lowmem_reserve(before, zone, gfp.zone_type());
    let had = zone.free + pcp[at];
    assert!(
        had > min + reserve + (1 << order) - 1,
        "{gfp:?} got {pfn:?} order {order} from {:?} node {} with {had} free, min {min}, reserve {reserve}",
        zone.kind,
        zone.node
    );
    assert!(zone.kind <= gfp.zone_type());
}

struct Test<'m> {
    mm: &'m Mm<Host>,
    pages: Pages,
    cpus: usize,
    rng: Rng,
}

impl Test<'_> {
    fn pcp(&self) -> Vec<u64> {
        let zones = zones(self.mm).len();
        (0..zones)
            .map(|z| {
                (0..self.cpus)
                    .map(|cpu| u64::from(self.mm.pcp(cpu, z).count))
                    .sum()
            })
            .collect()
    }

    fn alloc(&mut self, gfp: Flags, order: usize, kind: Kind) -> bool {
        let before = zones(self.mm);
        let pcp = self.pcp();
        let mm = self.mm;
        let got = match kind {
            Kind::Bare | Kind::Large => mm.alloc_pages(gfp, order),
            Kind::File => mm.alloc_folio(gfp, order, FolioKind::File),
            Kind::Anon => mm.alloc_folio(gfp, order, FolioKind::Anon),
            Kind::Table => mm.alloc_page_table(gfp, order),
        };
        match got {
            Ok(pfn) => {
                check_watermark(&self.pages.machine, &before, &pcp, pfn, order, gfp);
                self.pages.got(mm, pfn, order, kind);
                true
            }
            Err(why) => {
                use AllocError::{NoBlock, NoDescriptor, NoZone, Watermark};
                assert!(
                    matches!(why, NoBlock | NoDescriptor | NoZone | Watermark),
                    "{why:?}"
                );
                let zone = gfp.zone_type();
                assert_eq!(
                    why == NoZone,
                    before.iter().all(|z| z.kind > zone),
                    "{why:?} {gfp:?}"
                );
                false
            }
        }
    }

    fn step(&mut self, op: Op, guards: &[memdesc_host::CpuGuard<'_>]) {
        let mm = self.mm;
        match op {
            Op::Pages { order, gfp } => drop(self.alloc(gfp_of(gfp), order, Kind::Bare)),
            Op::Folio { order, file } => {
                self.alloc(
                    GFP_HIGHUSER_MOVABLE,
                    order,
                    if file { Kind::File } else { Kind::Anon },
                );
            }
            Op::Table { order } => drop(self.alloc(GFP_KERNEL, order, Kind::Table)),
            Op::At { place, order } => {
                let pfn = Pfn(place % self.pages.machine.end()).align_down(order);
                let all = (pfn.0..pfn.0 + (1 << order)).collect::<Vec<_>>();
                // Whole and free, not in a per-CPU list, before the call: then it must be had.
                let (head, o, memory) = mm.lookup(pfn);
                let whole = matches!(memory, Memory::Free { in_pcp: false })
                    && o >= order
                    && head.align_down(o) == head;
                match mm.alloc_pages_at(pfn, order) {
                    Ok(()) => self.pages.got(mm, pfn, order, Kind::Bare),
                    Err(AllocError::NoDescriptor) => {}
                    Err(why) => {
                        assert!(
                            matches!(why, AllocError::Busy | AllocError::NoZone),
                            "{why:?}"
                        );
                        // Descriptors for the split may be made of what is left when there is nothing else.
                        let still = matches!(mm.lookup(pfn).2, Memory::Free { in_pcp: false })
                            && mm.lookup(pfn).1 >= order;
                        assert!(
                            !(whole && still),
                            "{pfn:?} order {order} is free and could not be had: {why:?}"
                        );
                        let hole = all.iter().any(|&p| !self.pages.machine.is_ram(p));
                        assert!(!hole || why == AllocError::NoZone);
                    }
                }
            }
            Op::Retype { which, to } => {
                if self.pages.live.is_empty() {
                    return;
                }
                let index = which % self.pages.live.len();
                let block = &mut self.pages.live[index];
                let kind = [Kind::Bare, Kind::File, Kind::Anon, Kind::Table, Kind::Large][to];
                // SAFETY: the head of an allocation of ours.
                match unsafe { mm.retype(block.pfn, kind.page_type()) } {
                    Ok(()) => {
                        assert_eq!(block.kind, Kind::Bare);
                        block.kind = kind;
                    }
                    Err(AllocError::Busy) => assert_ne!(block.kind, Kind::Bare),
                    Err(why) => assert_eq!(why, AllocError::NoDescriptor),
                }
                block.check(mm);
            }
            Op::Free { which } => {
                if !self.pages.live.is_empty() {
                    self.pages.free(mm, which % self.pages.live.len());
                }
            }
            Op::FreeMany { n } => {
                for _ in 0..n.min(self.pages.live.len()) {
                    let index = self.rng.below(self.pages.live.len());
                    self.pages.free(mm, index);
                }
            }
            Op::DrainAll => {
                mm.drain_all();
                assert_eq!(ledger(mm).pcp, 0);
            }
            Op::Shrink => drop(mm.shrink()),
            // Per-CPU lists shrink, free blocks get descriptors of their own.
            Op::Tick => mm.tick(),
            Op::SetPageblock { place, mt } => {
                let pfn = Pfn(place % self.pages.machine.end());
                mm.set_pageblock_migratetype(pfn, MigrateType::ALL[mt]);
            }
            Op::Cpu { cpu } => guards[cpu % guards.len()].switch(),
            Op::Many { order, gfp, n } => {
                let n = n.min(scaled(400, 20)) >> order.saturating_sub(2).min(6);
                for i in 0..n {
                    let kind = if i % 3 == 0 { Kind::Anon } else { Kind::Bare };
                    if !self.alloc(gfp_of(gfp), order, kind) {
                        break;
                    }
                }
            }
        }
    }
}

fn run(machine: &Machine, ops: &[Op]) {
    let mm = machine.boot();
    assert_eq!(ledger(&mm).by_type, [0; PageType::COUNT]);
    let guards: Vec<_> = (0..machine.cpus)
        .map(|cpu| mm.platform().claim(cpu).unwrap())
        .collect();
    let mut test = Test {
        mm: &mm,
        pages: Pages::new(machine),
        cpus: machine.cpus,
        rng: Rng(ops.len() as u64),
    };
    for (i, &op) in ops.iter().enumerate() {
        test.step(op, &guards);
        if i % 32 == 31 {
            test.pages.check(&mm);
        } else {
            ledger(&mm);
        }
    }
    test.pages.check(&mm);
    let mut rng = Rng(7);
    test.pages.free_all(&mm, &mut rng);
    teardown(machine, &mm);
}

fn config() -> ProptestConfig {
    ProptestConfig {
        cases: scaled(24, 1) as u32,
        failure_persistence: None,
        max_shrink_iters: 2000,
        ..ProptestConfig::default()
    }
}

fn on(index: usize) {
    let machines = machines();
    let Some(machine) = machines.get(index) else {
        return;
    };
    let ops = proptest::collection::vec(op(), 1..=scaled(300, 10));
    let mut runner = proptest::test_runner::TestRunner::new_with_rng(
        config(),
        proptest::test_runner::TestRng::deterministic_rng(
            proptest::test_runner::RngAlgorithm::ChaCha,
        ),
    );
    if let Err(why) = runner.run(&ops, |ops| {
        run(machine, &ops);
        Ok(())
    }) {
        panic!("{}: {why}", machine.name);
    }
}

#[test]
fn zones_below_each_other() {
    on(0);
}

#[test]
fn two_nodes() {
    on(1);
}

#[test]
fn movable_zone() {
    on(2);
}

#[test]
fn unaligned_start_and_end() {
    on(3);
}

#[test]
fn holes() {
    on(4);
}

#[test]
fn adjacent_ranges() {
    on(5);
}

/// In the background free blocks get descriptors of their own for what their last owners left them: nothing is
/// lost, and what is live is not touched.
#[test]
fn settling_loses_nothing() {
    let machine = Machine::flat(scaled(16384, 2048) as u32);
    let mm = machine.boot();
    let mut pages = Pages::new(&machine);
    while let Ok(pfn) = mm.alloc_folio(GFP_NOWAIT | gfp::__GFP_MOVABLE, 0, FolioKind::File) {
        pages.got(&mm, pfn, 0, Kind::File);
        if pages.live.len() == scaled(usize::MAX, 300) {
            break;
        }
        let Memory::File(folio) = mm.lookup(pfn).2 else {
            unreachable!()
        };
        // SAFETY: the folio is ours until it is freed below.
        let folio = unsafe { folio.as_ref() };
        // SAFETY: in no list, mapped by nobody, neither moved nor split.
        unsafe { folio.set_mapping(1 << 20, u64::from(pfn.0)) };
    }
    for index in (0..pages.live.len()).rev() {
        if pages.live[index].pfn.0.is_multiple_of(2) {
            pages.free(&mm, index);
        }
    }
    // Not `shrink`, which settles everything at once.
    mm.drain_all();
    let before = slabinfo(&mm, "kmem_cache_buddy").0;
    for _ in 0..scaled(20, 1) {
        mm.tick();
        pages.check(&mm);
    }
    let after = slabinfo(&mm, "kmem_cache_buddy").0;
    assert!(
        cfg!(miri) || after > before + 1000,
        "{before} buddies in use, settled {after}"
    );
    for block in &pages.live {
        let Memory::File(folio) = mm.lookup(block.pfn).2 else {
            unreachable!()
        };
        // SAFETY: the folio is ours until it is freed below.
        let folio = unsafe { folio.as_ref() };
        assert_eq!(
            (folio.mapping(), folio.index()),
            (1 << 20, u64::from(block.pfn.0))
        );
    }
    pages.free_all(&mm, &mut Rng(2));
    teardown(&machine, &mm);
}
