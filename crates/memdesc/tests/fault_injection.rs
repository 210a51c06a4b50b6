//! An allocation is made to fail at every point that it passes: it fails as a value, and nothing is lost or changed.
//!
//! What may change when an operation fails: slabs that were made in passing stay for the next one, so pages may move from free
//! to metadata, and to slabs of which no object is handed out; after a shrink the users' pages are what they were,
//! type by type, and free pages and metadata together as many. What was live is untouched.

mod common;

use std::ptr::NonNull;

use common::*;
use memdesc::gfp::{self, GFP_ATOMIC, GFP_HIGHUSER_MOVABLE, GFP_KERNEL, GFP_NOWAIT};
use memdesc::*;
use memdesc_host::Host;

/// A machine in use: pages of all types and objects, fragmented.
struct State<'m> {
    machine: Machine,
    pages: Pages,
    objects: Vec<(NonNull<u8>, usize, u8)>,
    cache: Option<Cache<'m>>,
}

fn machine() -> Machine {
    // With all zones, so that fallbacks are passed through as well.
    let mut machine = Machine::flat(scaled(4096, 2048) as u32);
    machine.config.dma_limit = PhysAddr(1 << 20);
    machine.config.dma32_limit = PhysAddr(4 << 20);
    machine
}

/// How the machine is when the operation comes.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Start {
    /// Nothing was ever handed out.
    Empty,
    /// Everything was in use, every other block is free again, nothing is cached.
    Fragmented,
    /// The same, with full per-CPU lists and sheaves.
    Warm,
}

fn start<'m>(mm: &'m Mm<Host>, start: Start) -> State<'m> {
    let machine = machine();
    let mut state = State {
        pages: Pages::new(&machine),
        machine,
        objects: Vec::new(),
        cache: None,
    };
    if start == Start::Empty {
        return state;
    }
    let mut rng = Rng(3);
    for round in 0..scaled(600, 60) {
        let order = [0, 0, 0, 1, 2, 3, 5][rng.below(7)];
        let (got, kind) = match round % 4 {
            0 => (
                mm.alloc_folio(GFP_HIGHUSER_MOVABLE, order, FolioKind::Anon),
                Kind::Anon,
            ),
            1 => (mm.alloc_page_table(GFP_KERNEL, 0), Kind::Table),
            _ => (mm.alloc_pages(GFP_NOWAIT, order), Kind::Bare),
        };
        let order = if kind == Kind::Table { 0 } else { order };
        let Ok(pfn) = got else { break };
        state.pages.got(mm, pfn, order, kind);
    }
    for index in (0..state.pages.live.len()).rev().filter(|i| i % 2 == 0) {
        state.pages.free(mm, index);
    }
    for round in 0..60 {
        let size = 1 + rng.below(3000);
        let ptr = mm.kmalloc(size, GFP_KERNEL).unwrap();
        fill(ptr, size, round);
        state.objects.push((ptr, size, round));
    }
    state.cache = Some(
        mm.kmem_cache_create("objects", 104, 8, CacheFlags::EMPTY, None)
            .unwrap(),
    );
    if start == Start::Fragmented {
        mm.shrink();
    }
    state
}

impl State<'_> {
    fn check(&self, mm: &Mm<Host>) {
        for &(ptr, size, byte) in &self.objects {
            assert!(bytes(ptr, size).iter().all(|&b| b == byte));
        }
        for block in &self.pages.live {
            block.check(mm);
        }
    }

    fn free_all(mut self, mm: &Mm<Host>) {
        self.pages.free_all(mm, &mut Rng(9));
        self.objects.drain(..).for_each(|(ptr, ..)| kfree(mm, ptr));
        if let Some(cache) = self.cache.take() {
            mm.kmem_cache_destroy(cache).unwrap();
        }
        teardown(&self.machine, mm);
    }
}

/// What must not change.
#[derive(Debug, PartialEq)]
struct Snapshot {
    by_type: [u64; PageType::COUNT],
    free_and_metadata: u64,
    /// Objects handed out, of each cache of users' objects.
    active: Vec<(String, u64)>,
}

fn snapshot(mm: &Mm<Host>) -> Snapshot {
    let ledger = ledger(mm);
    let mut active = Vec::new();
    mm.slabinfo(|c| {
        if !c.metadata {
            active.push((c.name.to_owned(), c.active_objs));
        }
    });
    active.sort();
    Snapshot {
        by_type: ledger.by_type,
        free_and_metadata: ledger.free + ledger.untouched + ledger.pcp + ledger.metadata,
        active,
    }
}

/// Runs `op` with a fault at each point that it passes, each time on a machine of its own, until none is passed any more.
/// `op` undoes what it did if it succeeded.
fn every_point(name: &str, op: impl Fn(&Mm<Host>, &State<'_>) -> Result<(), AllocError>) {
    for from in [Start::Empty, Start::Fragmented, Start::Warm] {
        let (mut failed, mut survived) = (0, 0);
        for n in 0.. {
            assert!(n < 3000, "{name}: no end");
            let machine = machine();
            let mm = machine.boot();
            let state = start(&mm, from);
            let before = snapshot(&mm);
            mm.platform().faults().fail_nth(n);
            let result = op(&mm, &state);
            let (_, fired) = mm.platform().faults().off();
            let now = snapshot(&mm);
            state.check(&mm);
            if result.is_err() {
                assert!(
                    fired > 0,
                    "{name} from {from:?} failed without a fault: {result:?}"
                );
                for kind in PageType::ALL {
                    let (was, is) = (before.by_type[kind as usize], now.by_type[kind as usize]);
                    let same = was == is || kind == PageType::Slab && is > was;
                    assert!(
                        same,
                        "{name} from {from:?}, fault {n}: {kind:?} had {was} pages and has {is}"
                    );
                }
                assert_eq!(before.active, now.active, "{name} from {from:?}, fault {n}");
                failed += 1;
            } else {
                survived += fired;
            }
            if from != Start::Warm {
                mm.shrink();
                assert_eq!(snapshot(&mm), before, "{name} from {from:?}, fault {n}");
            }
            state.free_all(&mm);
            if fired == 0 {
                assert!(result.is_ok(), "{name} from {from:?}: {result:?}");
                break;
            }
        }
        println!("{name} from {from:?}: failed at {failed} points, got round {survived}");
        assert!(failed > 0, "{name}: no fault made it fail");
    }
}

#[test]
fn pages_of_each_order() {
    for order in [0, 1, 3, 4, 7, 9] {
        for gfp in [GFP_KERNEL, GFP_NOWAIT, GFP_ATOMIC, GFP_HIGHUSER_MOVABLE] {
            if order > 4 && gfp != GFP_KERNEL {
                continue;
            }
            every_point(&format!("alloc_pages order {order} {gfp:?}"), |mm, _| {
                mm.alloc_pages(gfp, order).map(|pfn| free(mm, pfn))
            });
        }
    }
}

#[test]
fn folios_and_page_tables() {
    for order in [0, 3, 6] {
        every_point(&format!("alloc_folio order {order}"), |mm, _| {
            mm.alloc_folio(GFP_HIGHUSER_MOVABLE, order, FolioKind::File)
                .map(|pfn| free(mm, pfn))
        });
    }
    every_point("alloc_page_table", |mm, _| {
        mm.alloc_page_table(GFP_KERNEL, 0).map(|pfn| free(mm, pfn))
    });
}

#[test]
fn kmalloc() {
    for size in [8, 100, 8192, 20_000] {
        every_point(&format!("kmalloc {size}"), |mm, _| {
            mm.kmalloc(size, GFP_KERNEL | gfp::__GFP_ZERO)
                .map(|ptr| kfree(mm, ptr))
        });
    }
}

#[test]
fn krealloc() {
    every_point("krealloc", |mm, _| {
        let mut ptr = mm.kmalloc(100, GFP_KERNEL)?;
        fill(ptr, 100, 0x31);
        for size in [5000, 50_000, 60] {
            // SAFETY: live memory from kmalloc; the old pointer is used again only if this fails.
            match unsafe { mm.krealloc(ptr, size, GFP_KERNEL) } {
                Ok(new) => ptr = new,
                Err(why) => {
                    // As it was.
                    assert!(bytes(ptr, 60).iter().all(|&b| b == 0x31));
                    kfree(mm, ptr);
                    return Err(why);
                }
            }
            assert!(bytes(ptr, 60).iter().all(|&b| b == 0x31));
        }
        kfree(mm, ptr);
        Ok(())
    });
}

#[test]
fn caches() {
    every_point("kmem_cache_create", |mm, _| {
        let cache = mm.kmem_cache_create("new", 300, 8, CacheFlags::EMPTY, None)?;
        mm.kmem_cache_destroy(cache).unwrap();
        Ok(())
    });
    every_point("kmem_cache_alloc_bulk", |mm, state| {
        let own = if state.cache.is_none() {
            Some(mm.kmem_cache_create("own", 104, 8, CacheFlags::EMPTY, None)?)
        } else {
            None
        };
        let Some(cache) = own.as_ref().or(state.cache.as_ref()) else {
            unreachable!()
        };
        let mut out = [std::ptr::null_mut(); 300];
        let result = mm.kmem_cache_alloc_bulk(cache, GFP_KERNEL, &mut out);
        if result.is_ok() {
            // SAFETY: 300 objects of this cache, just handed out.
            unsafe { mm.kmem_cache_free_bulk(cache, &out) };
        }
        if let Some(own) = own {
            mm.kmem_cache_destroy(own).unwrap();
        }
        result
    });
}

#[test]
fn retype() {
    for kind in [PageType::Anon, PageType::PageTable] {
        every_point(&format!("retype to {kind:?}"), |mm, _| {
            let pfn = mm.alloc_pages(GFP_KERNEL, 2)?;
            // SAFETY: the head of bare pages of ours.
            let result = unsafe { mm.retype(pfn, kind) };
            let (head, order, memory) = mm.lookup(pfn.add(3));
            assert_eq!((head, order), (pfn, 2));
            assert_eq!(result.is_err(), matches!(memory, Memory::Bare));
            free(mm, pfn);
            result
        });
    }
}

#[test]
fn pages_at() {
    for order in [0, 5] {
        every_point(&format!("alloc_pages_at order {order}"), |mm, _| {
            let fits = |&pfn: &u32| {
                let (_, o, memory) = mm.lookup(Pfn(pfn));
                let last = Pfn(pfn + (1 << order) - 1);
                matches!(memory, Memory::Untouched)
                    && matches!(mm.lookup(last).2, Memory::Untouched)
                    || matches!(memory, Memory::Free { in_pcp: false }) && o > order
            };
            let place = (0..4096 - 64)
                .filter(|pfn| pfn % 64 == 32)
                .rfind(fits)
                .unwrap();
            mm.alloc_pages_at(Pfn(place), order)?;
            assert_eq!(mm.lookup(Pfn(place)).0, Pfn(place));
            free(mm, Pfn(place));
            Ok(())
        });
    }
}

/// Faults at random through a long life: the model holds, and all comes back.
#[test]
fn random_faults() {
    for (one_in, seed) in [(2, 1), (5, 2), (20, 3), (100, 4)] {
        let machine = machine();
        let mm = machine.boot();
        let mut pages = Pages::new(&machine);
        let mut objects: Vec<(NonNull<u8>, usize, u8)> = Vec::new();
        let mut rng = Rng(seed);
        let mut failures = 0;
        for round in 0..scaled(20_000, 100) {
            mm.platform().faults().fail_one_in(one_in, rng.next());
            let order = [0, 0, 0, 0, 1, 2, 3, 6, 9][rng.below(9)];
            let got = match rng.below(10) {
                0 | 1 => Some((mm.alloc_pages(GFP_KERNEL, order), Kind::Bare)),
                2 => Some((
                    mm.alloc_folio(GFP_HIGHUSER_MOVABLE, order, FolioKind::Anon),
                    Kind::Anon,
                )),
                3 => Some((mm.alloc_page_table(GFP_NOWAIT, order), Kind::Table)),
                4 | 5 => {
                    let size = 1 + rng.below(6000);
                    match mm.kmalloc(size, GFP_KERNEL) {
                        Ok(ptr) => {
                            fill(ptr, size, round as u8);
                            objects.push((ptr, size, round as u8));
                        }
                        Err(_) => failures += 1,
                    }
                    None
                }
                6 if !objects.is_empty() => {
                    let index = rng.below(objects.len());
                    let (ptr, size, byte) = objects[index];
                    let to = 1 + rng.below(6000);
                    // SAFETY: live memory from kmalloc; the old pointer is used again only if this fails.
                    match unsafe { mm.krealloc(ptr, to, GFP_NOWAIT) } {
                        Ok(new) => {
                            assert!(bytes(new, size.min(to)).iter().all(|&b| b == byte));
                            fill(new, to, byte);
                            objects[index] = (new, to, byte);
                        }
                        Err(_) => failures += 1,
                    }
                    None
                }
                7 | 8 if !objects.is_empty() => {
                    let (ptr, size, byte) = objects.swap_remove(rng.below(objects.len()));
                    assert!(bytes(ptr, size).iter().all(|&b| b == byte));
                    kfree(&mm, ptr);
                    None
                }
                _ => {
                    for _ in 0..rng.below(6).min(pages.live.len()) {
                        let index = rng.below(pages.live.len());
                        pages.free(&mm, index);
                    }
                    None
                }
            };
            mm.platform().faults().off();
            match got {
                Some((Ok(pfn), kind)) => pages.got(&mm, pfn, order, kind),
                Some((Err(_), _)) => failures += 1,
                None => {}
            }
            if round % 512 == 0 {
                for block in &pages.live {
                    block.check(&mm);
                }
                ledger(&mm);
            }
        }
        assert!(failures > 20, "{failures}");
        pages.free_all(&mm, &mut rng);
        objects.into_iter().for_each(|(ptr, size, byte)| {
            assert!(bytes(ptr, size).iter().all(|&b| b == byte));
            kfree(&mm, ptr);
        });
        teardown(&machine, &mm);
    }
}

/// Every other slab of descriptors cannot be had: what was gathered for a split by then goes back.
#[test]
fn descriptors_run_out() {
    let machine = machine();
    let mm = machine.boot();
    let mut rng = Rng(11);
    for _ in 0..scaled(12, 1) {
        let mut pages = Pages::new(&machine);
        let mut failures = 0;
        for _ in 0..scaled(6000, 200) {
            mm.platform().faults().fail_one_in(2, rng.next());
            let got = mm.alloc_pages(GFP_NOWAIT | gfp::__GFP_MEMALLOC, 0);
            mm.platform().faults().off();
            match got {
                Ok(pfn) => pages.got(&mm, pfn, 0, Kind::Bare),
                Err(_) => failures += 1,
            }
        }
        assert!(failures > 0);
        pages.free_all(&mm, &mut rng);
        teardown(&machine, &mm);
    }
}
