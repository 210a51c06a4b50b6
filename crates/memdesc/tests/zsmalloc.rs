//! Compressed memory against a plain model: what was stored comes back, whatever moves meanwhile; handles that are wrong are found; each allocation may
//! fail; and when all is freed nothing is left.
#![cfg(not(miri))]

mod common;

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};

use common::*;
use memdesc::gfp::{__GFP_FAST_TRY, __GFP_MOVABLE, GFP_ATOMIC, GFP_KERNEL, GFP_NOWAIT};
use memdesc::zsmalloc::{SIZE_CLASSES, ZsError, ZsHandle, ZsPool};
use memdesc::*;
use memdesc_host::Host;
use proptest::prelude::{Just, ProptestConfig, Strategy, any, prop_oneof};

/// Bytes that only this object has.
fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut rng = Rng(seed);
    let mut bytes: Vec<u8> = (0..len.div_ceil(8))
        .flat_map(|_| rng.next().to_le_bytes())
        .collect();
    bytes.truncate(len);
    bytes
}

/// Sizes as compression gives them: some small, many middling, some that do not shrink.
fn size(rng: &mut Rng) -> usize {
    match rng.below(10) {
        0 => 1 + rng.below(64),
        1 => 3600 + rng.below(497),
        _ => 1 + rng.below(3700),
    }
}

/// A pool and what should be in it.
struct Model<'m> {
    mm: &'m Mm<Host>,
    pool: &'m ZsPool<'m>,
    objects: HashMap<ZsHandle, Vec<u8>>,
    order: Vec<ZsHandle>,
    next: u64,
}

impl<'m> Model<'m> {
    fn new(mm: &'m Mm<Host>, pool: &'m ZsPool<'m>, seed: u64) -> Model<'m> {
        Model {
            mm,
            pool,
            objects: HashMap::new(),
            order: Vec::new(),
            next: seed << 32,
        }
    }

    fn store(&mut self, size: usize, gfp: Flags) -> Result<(), AllocError> {
        let handle = self.mm.zs_malloc(self.pool, size, gfp)?;
        self.next += 1;
        let data = pattern(self.next, size);
        self.mm.zs_obj_write(self.pool, handle, &data).unwrap();
        assert!(self.objects.insert(handle, data).is_none(), "{handle:?}");
        self.order.push(handle);
        Ok(())
    }

    fn check_one(&self, handle: ZsHandle) {
        let data = &self.objects[&handle];
        let mut copy = vec![0; data.len()];
        let view = self
            .mm
            .zs_obj_read_begin(self.pool, handle, &mut copy)
            .unwrap();
        assert!(*view == **data, "{handle:?}, {} bytes", data.len());
        self.mm.zs_obj_read_end(view);
    }

    fn check(&self) {
        self.order.iter().for_each(|&handle| self.check_one(handle));
    }

    fn rewrite(&mut self, which: usize) {
        let Some(&handle) = self.order.get(which % self.order.len().max(1)) else {
            return;
        };
        self.next += 1;
        let data = self.objects.get_mut(&handle).unwrap();
        *data = pattern(self.next, data.len());
        self.mm.zs_obj_write(self.pool, handle, data).unwrap();
    }

    fn free(&mut self, which: usize) {
        if self.order.is_empty() {
            return;
        }
        let handle = self.order.swap_remove(which % self.order.len());
        self.objects.remove(&handle);
        self.mm.zs_free(self.pool, handle);
        assert_eq!(self.read(handle), Err(ZsError::NoSuchObject));
    }

    fn read(&self, handle: ZsHandle) -> Result<(), ZsError> {
        let mut byte = [0];
        let view = self.mm.zs_obj_read_begin(self.pool, handle, &mut byte)?;
        drop(view);
        Ok(())
    }

    fn free_all(&mut self) {
        while !self.order.is_empty() {
            self.free(self.order.len() / 2);
        }
    }
}

/// What the pool says of itself agrees with itself, with the ledger and with the census.
fn check_counts(mm: &Mm<Host>, pool: &ZsPool<'_>, objects: usize) {
    let stats = mm.zs_pool_stats(pool);
    assert_eq!(stats.objects, objects as u64, "{stats:?}");
    let pages = stats.pages + stats.handle_pages;
    assert_eq!(mm.pages_of(PageType::Zsmalloc), pages, "{stats:?}");
    assert_eq!(ledger(mm).by_type[PageType::Zsmalloc as usize], pages);
    let census = mm.census();
    assert_eq!(census.of(CensusKind::Zsmalloc).pages, pages);
    assert_eq!(
        stats.handle_pages,
        objects.div_ceil(511).max(stats.handle_pages as usize) as u64
    );
    let (mut zspages, mut inuse) = (0, 0);
    mm.zs_for_each_class(pool, |class, n, used| {
        assert!(
            used > 0 && used <= n * u64::from(class.objects),
            "{class:?}"
        );
        zspages += n;
        inuse += used;
    });
    assert_eq!((zspages, inuse), (stats.zspages, stats.objects));
}

/// After compaction of a pool that nobody reads, no class has free objects for a whole zspage.
fn check_compact(mm: &Mm<Host>, pool: &ZsPool<'_>) {
    mm.zs_for_each_class(pool, |class, n, used| {
        let free = n * u64::from(class.objects) - used;
        assert!(
            free < u64::from(class.objects),
            "{class:?}: {n} zspages, {used}"
        );
    });
}

fn no_reports() -> (Machine, Reports) {
    (Machine::flat(16384).guarded().cpus(2), Reports::default())
}

#[test]
fn every_size_comes_back() {
    let machine = Machine::flat(16384).guarded();
    let mm = machine.boot_on(machine.host().build().unwrap());
    let pool = mm.zs_create_pool("sizes").unwrap();
    let mut model = Model::new(&mm, &pool, 1);
    for size in (1..=4096).rev() {
        model.store(size, GFP_KERNEL).unwrap();
    }
    model.check();
    check_counts(&mm, &pool, 4096);
    for refused in [0, 4097, usize::MAX] {
        assert_eq!(
            mm.zs_malloc(&pool, refused, GFP_KERNEL),
            Err(AllocError::BadSize)
        );
        assert_eq!(mm.zs_lookup_class_index(&pool, refused), None);
    }
    assert_eq!(
        mm.zs_malloc(&pool, 8, __GFP_FAST_TRY),
        Err(AllocError::Forbidden)
    );
    // What does not fit is said, and nothing is written.
    let handle = model.order[0];
    let index = mm.zs_lookup_class_index(&pool, 4096).unwrap();
    let capacity = SIZE_CLASSES[index].capacity();
    assert_eq!(capacity, 4096);
    let long = vec![0; capacity + 1];
    let too_long = Err(ZsError::TooLong { capacity });
    assert_eq!(mm.zs_obj_write(&pool, handle, &long), too_long);
    let mut copy = long.clone();
    let view = mm.zs_obj_read_begin(&pool, handle, &mut copy);
    assert_eq!(view.map(|_| ()), too_long);
    // A shorter write leaves the rest.
    mm.zs_obj_write(&pool, handle, b"short").unwrap();
    model.objects.get_mut(&handle).unwrap()[..5].copy_from_slice(b"short");
    model.check();
    model.free_all();
    mm.zs_destroy_pool(pool).unwrap();
    teardown(&machine, &mm);
}

#[test]
fn every_page_leads_to_its_zspage() {
    let machine = Machine::flat(8192).guarded();
    let mm = machine.boot();
    let pool = mm.zs_create_pool("pages").unwrap();
    let handle = mm.zs_malloc(&pool, 3600, GFP_KERNEL).unwrap();
    let stats = mm.zs_pool_stats(&pool);
    assert_eq!((stats.zspages, stats.pages, stats.handle_pages), (1, 8, 1));
    // The first page and the page of handles: 16 bytes; the others keep 8.
    assert_eq!(stats.descriptor_bytes, 2 * 16 + 7 * 8);
    let mut leads = HashMap::new();
    let mut tails = Vec::new();
    for pfn in 0..8192 {
        if let (head, 0, Memory::Zsmalloc(desc)) = mm.lookup(Pfn(pfn)) {
            assert_eq!(head, Pfn(pfn));
            // SAFETY: the object keeps the zspage.
            let desc = unsafe { desc.as_ref() };
            assert_eq!((desc.pool(), desc.inuse()), (0, 1));
            *leads.entry(desc.class()).or_insert(0) += 1;
            tails.push(Pfn(pfn));
        }
    }
    let class = mm.zs_lookup_class_index(&pool, 3600).unwrap();
    assert_eq!(leads.remove(&class), Some(8));
    assert_eq!(leads.into_values().collect::<Vec<_>>(), [1]);
    assert_eq!(tails.len(), 9);
    mm.zs_free(&pool, handle);
    mm.zs_destroy_pool(pool).unwrap();
    teardown(&machine, &mm);
}

#[test]
fn pages_are_not_for_others_to_free_or_to_have() {
    let (machine, reports) = no_reports();
    let mm = machine.boot_on(reports.on(machine.host()).build().unwrap());
    let pool = mm.zs_create_pool("pages").unwrap();
    let handle = mm.zs_malloc(&pool, 3000, GFP_KERNEL).unwrap();
    mm.zs_obj_write(&pool, handle, &[5; 3000]).unwrap();
    let ours = |pfn: &u32| matches!(mm.lookup(Pfn(*pfn)).2, Memory::Zsmalloc(_));
    for pfn in (0..machine.end()).filter(ours).collect::<Vec<_>>() {
        free(&mm, Pfn(pfn));
        assert_eq!(reports.one().what, Corruption::WrongType);
    }
    let mut copy = [0; 3000];
    let view = mm.zs_obj_read_begin(&pool, handle, &mut copy).unwrap();
    assert_eq!(*view, [5; 3000]);
    drop(view);
    mm.zs_free(&pool, handle);
    mm.zs_destroy_pool(pool).unwrap();
    teardown(&machine, &mm);
    assert!(reports.take().is_empty());
}

#[test]
fn wrong_handles_are_found() {
    let (machine, reports) = no_reports();
    let host = reports.on(machine.host());
    let mm = machine.boot_on(host.build().unwrap());
    let (pool, other) = (
        mm.zs_create_pool("one").unwrap(),
        mm.zs_create_pool("other").unwrap(),
    );
    let mut model = Model::new(&mm, &pool, 1);
    for size in [1, 30, 700, 700, 700, 4096, 4000] {
        model.store(size, GFP_KERNEL).unwrap();
    }
    let keep = mm.zs_malloc(&other, 700, GFP_KERNEL).unwrap();
    // Of another pool.
    mm.zs_free(&pool, keep);
    let seen = reports.one();
    assert_eq!(seen.what, Corruption::WrongCache);
    assert_eq!(seen.cache.as_deref(), Some("one"));
    assert!(seen.caller.0.ends_with("zsmalloc.rs"));
    assert_eq!(
        mm.zs_obj_write(&pool, keep, &[1]),
        Err(ZsError::NoSuchObject)
    );
    // A number that was made up to look as if it were of this one.
    let forged = ZsHandle::from_raw(keep.into_raw() & !(63 << 58)).unwrap();
    mm.zs_free(&pool, forged);
    assert_eq!(reports.one().what, Corruption::DoubleFree);
    mm.zs_obj_write(&other, keep, &[1]).unwrap();
    // Freed twice, while others are in its zspage, and when its slot has another object.
    let twice = model.order[3];
    let at = model.order.iter().position(|h| *h == twice).unwrap();
    model.free(at);
    mm.zs_free(&pool, twice);
    assert_eq!(reports.one().what, Corruption::DoubleFree);
    model.store(700, GFP_KERNEL).unwrap();
    mm.zs_free(&pool, twice);
    assert_eq!(reports.one().what, Corruption::DoubleFree);
    assert_eq!(
        mm.zs_obj_write(&pool, twice, &[1]),
        Err(ZsError::NoSuchObject)
    );
    model.check();
    // While it is read, and while it is written.
    let read = model.order[0];
    let mut copy = [0; 1];
    let view = mm.zs_obj_read_begin(&pool, read, &mut copy).unwrap();
    mm.zs_free(&pool, read);
    assert_eq!(reports.one().what, Corruption::InUse);
    assert_eq!(mm.zs_obj_write(&pool, read, &[1]), Err(ZsError::Busy));
    drop(view);
    model.check();
    model.free_all();
    mm.zs_free(&other, keep);
    // When all pages are gone: even those of handles.
    mm.shrink();
    assert_eq!(mm.pages_of(PageType::Zsmalloc), 0);
    mm.zs_free(&pool, twice);
    assert_eq!(reports.one().what, Corruption::DoubleFree);
    // Nonsense.
    for raw in [1, 1 << 40, u64::MAX, 12345 << 9] {
        let handle = ZsHandle::from_raw(raw).unwrap();
        mm.zs_free(&pool, handle);
        assert_eq!(reports.take().len(), 1, "{raw:#x}");
        assert_eq!(model.read(handle), Err(ZsError::NoSuchObject));
    }
    mm.zs_destroy_pool(pool).unwrap();
    mm.zs_destroy_pool(other).unwrap();
    teardown(&machine, &mm);
}

#[test]
fn so_many_readers_and_no_more() {
    let machine = Machine::flat(4096).guarded();
    let mm = machine.boot();
    let pool = mm.zs_create_pool("readers").unwrap();
    let mut model = Model::new(&mm, &pool, 1);
    model.store(100, GFP_KERNEL).unwrap();
    let mut copies = [[0; 100]; 30];
    let mut views = Vec::new();
    for (i, copy) in copies.iter_mut().enumerate() {
        match mm.zs_obj_read_begin(&pool, model.order[0], copy) {
            Ok(view) => views.push(view),
            Err(why) => assert_eq!((why, i), (ZsError::Busy, 29)),
        }
    }
    assert_eq!(views.len(), 29);
    drop(views);
    model.check();
    model.rewrite(0);
    model.check();
    model.free_all();
    mm.zs_destroy_pool(pool).unwrap();
    teardown(&machine, &mm);
}

#[test]
fn a_pool_with_objects_stays() {
    let machine = Machine::flat(4096).guarded();
    let mm = machine.boot();
    let pool = mm
        .zs_create_pool("a name that is longer than what is kept of it")
        .unwrap();
    assert_eq!(pool.name(), "a name that is longer than what ");
    let handles: Vec<_> = (0..37)
        .map(|i| mm.zs_malloc(&pool, 100 * i + 1, GFP_KERNEL).unwrap())
        .collect();
    let left = mm.zs_destroy_pool(pool).unwrap_err();
    assert_eq!(left.objects, 37);
    assert!(left.to_string().ends_with("has 37 objects left"));
    let pool = left.pool;
    handles.iter().for_each(|&handle| mm.zs_free(&pool, handle));
    mm.zs_destroy_pool(pool).unwrap();
    // There is room for 64, and a place that came free is used again.
    let mut pools: Vec<_> = (0..64)
        .map(|_| mm.zs_create_pool("one of many").unwrap())
        .collect();
    assert_eq!(mm.zs_create_pool("too many").unwrap_err(), AllocError::Busy);
    mm.zs_destroy_pool(pools.swap_remove(20)).unwrap();
    pools.push(mm.zs_create_pool("again").unwrap());
    pools
        .into_iter()
        .for_each(|pool| mm.zs_destroy_pool(pool).unwrap());
    teardown(&machine, &mm);
}

#[test]
fn what_is_read_is_not_moved() {
    let machine = Machine::flat(8192).guarded();
    let mm = machine.boot_on(machine.host().build().unwrap());
    let pool = mm.zs_create_pool("views").unwrap();
    let mut model = Model::new(&mm, &pool, 1);
    for _ in 0..3000 {
        model.store(1300, GFP_KERNEL).unwrap();
    }
    let mut rng = Rng(3);
    for _ in 0..2500 {
        model.free(rng.below(model.order.len()));
    }
    // One in five is being read, some in place.
    let mut copies = vec![[0; 1300]; 100];
    let views: Vec<_> = copies
        .iter_mut()
        .enumerate()
        .map(|(i, copy)| {
            mm.zs_obj_read_begin(&pool, model.order[i * 5], copy)
                .unwrap()
        })
        .collect();
    let freed = mm.zs_compact(&pool);
    assert!(freed > 100, "{freed}");
    for (i, view) in views.iter().enumerate() {
        assert!(**view == *model.objects[&model.order[i * 5]]);
    }
    drop(views);
    model.check();
    let then = mm.zs_compact(&pool);
    assert!(then > 0);
    check_compact(&mm, &pool);
    let stats = mm.zs_pool_stats(&pool);
    assert_eq!(stats.pages_compacted, (freed + then) as u64);
    assert_eq!(
        stats.pages,
        500u64.div_ceil(
            SIZE_CLASSES[mm.zs_lookup_class_index(&pool, 1300).unwrap()]
                .objects
                .into()
        ) * u64::from(SIZE_CLASSES[mm.zs_lookup_class_index(&pool, 1300).unwrap()].pages)
    );
    model.check();
    check_counts(&mm, &pool, 500);
    model.free_all();
    mm.zs_destroy_pool(pool).unwrap();
    teardown(&machine, &mm);
}

#[test]
fn pages_move_with_what_is_in_them() {
    let machine = Machine::flat(8192).guarded();
    let mm = machine.boot_on(machine.host().build().unwrap());
    let pool = mm.zs_create_pool("migration").unwrap();
    let mut model = Model::new(&mm, &pool, 1);
    let mut rng = Rng(11);
    for _ in 0..4000 {
        model
            .store(size(&mut rng), GFP_KERNEL | __GFP_MOVABLE)
            .unwrap();
    }
    for _ in 0..1000 {
        model.free(rng.below(model.order.len()));
    }
    let pages = mm.zs_get_total_pages(&pool);
    let ours = |pfn: u32| match mm.lookup(Pfn(pfn)).2 {
        // SAFETY: objects keep it.
        Memory::Zsmalloc(desc) => Some(unsafe { desc.as_ref() }.class()),
        _ => None,
    };
    let handles = SIZE_CLASSES.len();
    let (mut whole, mut moved) = (0, 0);
    for start in (512..8192).step_by(64) {
        let all = start..start + 64;
        let here = all.clone().filter(|&p| ours(p).is_some()).count();
        let fixed = all.clone().find(|&p| ours(p) == Some(handles));
        match mm.alloc_contig_range(Pfn(start), 64) {
            Ok(()) => {
                assert_eq!(fixed, None);
                assert!(all.clone().all(|p| ours(p).is_none()));
                model.check();
                check_counts(&mm, &pool, model.objects.len());
                // SAFETY: the range is ours, and nobody has it.
                unsafe { mm.free_contig_range(Pfn(start), 64) };
                (whole, moved) = (whole + 1, moved + here);
            }
            Err(obstacle) if obstacle.kind == PageType::Zsmalloc => {
                assert!(
                    !obstacle.movable && Some(obstacle.pfn.0) == fixed,
                    "{obstacle:?}"
                );
            }
            Err(_) => {}
        }
    }
    assert!(
        whole > 50 && moved > 1500,
        "{whole} ranges, {moved} of {pages} pages"
    );
    assert_eq!(mm.zs_get_total_pages(&pool), pages);
    // What is read keeps all pages that it lies in.
    let mut copies = vec![[0; 1]; model.order.len()];
    let views: Vec<_> = copies
        .iter_mut()
        .zip(&model.order)
        .map(|(copy, &handle)| mm.zs_obj_read_begin(&pool, handle, copy).unwrap())
        .collect();
    let read: Vec<u32> = (512..8192)
        .filter(|&p| ours(p).is_some_and(|c| c < handles))
        .collect();
    let mut stayed = 0;
    for &page in &read {
        let moves = mm.alloc_contig_range(Pfn(page), 1);
        stayed += usize::from(moves.is_err());
        match moves {
            // SAFETY: ours.
            Ok(()) => unsafe { mm.free_contig_range(Pfn(page), 1) },
            Err(obstacle) => assert!(obstacle.movable, "{obstacle:?}"),
        }
    }
    // The rest has only free objects: a quarter of them are.
    assert!(stayed * 4 > read.len() * 3, "{stayed} of {}", read.len());
    for (view, handle) in views.iter().zip(&model.order) {
        assert_eq!(view[0], model.objects[handle][0]);
    }
    drop(views);
    // And compaction of memory finds large blocks where there was compressed memory all over.
    model.check();
    mm.zs_compact(&pool);
    model.check();
    check_counts(&mm, &pool, model.objects.len());
    model.free_all();
    mm.zs_destroy_pool(pool).unwrap();
    teardown(&machine, &mm);
}

#[test]
fn pages_with_what_is_read_stay() {
    let machine = Machine::flat(8192).guarded();
    let mm = machine.boot();
    let pool = mm.zs_create_pool("full").unwrap();
    let mut model = Model::new(&mm, &pool, 1);
    for size in [1300, 3600, 4096, 700] {
        let class = SIZE_CLASSES[mm.zs_lookup_class_index(&pool, size).unwrap()];
        for _ in 0..2 * class.objects {
            model.store(size, GFP_KERNEL | __GFP_MOVABLE).unwrap();
        }
    }
    let ours = |pfn: &u32| match mm.lookup(Pfn(*pfn)).2 {
        // SAFETY: objects keep it.
        Memory::Zsmalloc(desc) => unsafe { desc.as_ref() }.class() < SIZE_CLASSES.len(),
        _ => false,
    };
    let mut copies = vec![[0; 1]; model.order.len()];
    let views: Vec<_> = copies
        .iter_mut()
        .zip(&model.order)
        .map(|(copy, &handle)| mm.zs_obj_read_begin(&pool, handle, copy).unwrap())
        .collect();
    let pages: Vec<u32> = (0..8192).filter(ours).collect();
    assert_eq!(pages.len() as u64, mm.zs_get_total_pages(&pool));
    for &page in &pages {
        let why = mm.alloc_contig_range(Pfn(page), 1).unwrap_err();
        assert_eq!(
            (why.pfn, why.kind, why.movable),
            (Pfn(page), PageType::Zsmalloc, true)
        );
    }
    drop(views);
    for &page in &pages {
        mm.alloc_contig_range(Pfn(page), 1).unwrap();
        model.check();
        // SAFETY: ours.
        unsafe { mm.free_contig_range(Pfn(page), 1) };
    }
    model.free_all();
    mm.zs_destroy_pool(pool).unwrap();
    teardown(&machine, &mm);
}

#[derive(Clone, Debug)]
enum Op {
    Store { size: usize, n: usize, gfp: usize },
    Rewrite { which: usize },
    Free { which: usize },
    FreeMany { seed: u64, share: usize },
    Compact,
    Shrink,
    Tick,
    Contig { start: u32, pages: u32 },
    Cpu { cpu: usize },
}

fn op() -> impl Strategy<Value = Op> {
    let size = prop_oneof![1 => 1..80usize, 6 => 80..3700usize, 1 => 3600..4097usize];
    prop_oneof![
        12 => (size, 1..40usize, 0..3usize).prop_map(|(size, n, gfp)| Op::Store { size, n, gfp }),
        4 => any::<usize>().prop_map(|which| Op::Rewrite { which }),
        6 => any::<usize>().prop_map(|which| Op::Free { which }),
        4 => (any::<u64>(), 2..6usize).prop_map(|(seed, share)| Op::FreeMany { seed, share }),
        4 => Just(Op::Compact),
        1 => Just(Op::Shrink),
        1 => Just(Op::Tick),
        4 => (0..8192u32, 1..600u32).prop_map(|(start, pages)| Op::Contig { start, pages }),
        2 => (0..4usize).prop_map(|cpu| Op::Cpu { cpu }),
    ]
}

fn run(machine: &Machine, ops: &[Op]) {
    let host = machine.host().build().unwrap();
    let mm = machine.boot_on(host);
    let pool = mm.zs_create_pool("model").unwrap();
    let mut model = Model::new(&mm, &pool, 1);
    let mut cpu = mm.platform().claim(0);
    for op in ops {
        match *op {
            Op::Store { size, n, gfp } => {
                for i in 0..n {
                    let size = (size + i).min(4096);
                    let gfp = [GFP_KERNEL | __GFP_MOVABLE, GFP_NOWAIT, GFP_ATOMIC][gfp];
                    if model.store(size, gfp).is_err() {
                        break;
                    }
                }
            }
            Op::Rewrite { which } => model.rewrite(which),
            Op::Free { which } => model.free(which),
            Op::FreeMany { seed, share } => {
                let mut rng = Rng(seed);
                for _ in 0..model.order.len() * (share - 1) / share {
                    model.free(rng.below(model.order.len()));
                }
            }
            Op::Compact => {
                let before = mm.zs_get_total_pages(&pool);
                let freed = mm.zs_compact(&pool);
                assert_eq!(mm.zs_get_total_pages(&pool), before - freed as u64);
                check_compact(&mm, &pool);
                model.check();
            }
            Op::Shrink => {
                mm.shrink();
                model.check();
            }
            Op::Tick => mm.tick(),
            Op::Contig { start, pages } => {
                let start = 1 + start % (machine.end() - 1);
                let pages = pages.min(machine.end() - start);
                if mm.alloc_contig_range(Pfn(start), pages).is_ok() {
                    model.check();
                    // SAFETY: the range is ours, and nobody has it.
                    unsafe { mm.free_contig_range(Pfn(start), pages) };
                }
                model.check();
            }
            Op::Cpu { cpu: to } => {
                drop(cpu);
                cpu = mm.platform().claim(to % machine.cpus);
            }
        }
        check_counts(&mm, &pool, model.objects.len());
    }
    drop(cpu);
    model.check();
    model.free_all();
    mm.zs_destroy_pool(pool).unwrap();
    teardown(machine, &mm);
}

proptest::proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    #[test]
    fn histories(ops in proptest::collection::vec(op(), 1..60), rt in any::<bool>(), small in any::<bool>()) {
        let mut machine = Machine::flat(if small { 1024 } else { 8192 }).cpus(2);
        machine.config.preempt_rt = rt;
        run(&machine, &ops);
    }
}

/// Two threads store, read, rewrite and free, each its own objects, while a third compacts; and reads what the others may not lose.
fn threads(rt: bool) {
    let mut machine = Machine::flat(16384).guarded().cpus(3);
    machine.config.preempt_rt = rt;
    let mm = machine.boot_on(machine.host().build().unwrap());
    let pool = mm.zs_create_pool("threads").unwrap();
    let (left, moved) = (AtomicUsize::new(2), AtomicUsize::new(0));
    let ranges = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for seed in 1..=2 {
            let (mm, pool, left, ranges) = (&mm, &pool, &left, &ranges);
            scope.spawn(move || {
                let _cpu = mm.platform().claim(seed - 1);
                let mut model = Model::new(mm, pool, seed as u64);
                let mut rng = Rng(seed as u64);
                for round in 0..3_000_000 {
                    // Until the third has had its share, on a machine that others are busy on too.
                    if round >= 60_000 && ranges.load(Ordering::Relaxed) > 10 {
                        break;
                    }
                    // Up for a while, down for a while: so that there is something to compact.
                    let up = round / 5000 % 2 == 0;
                    match rng.below(10) {
                        0..=3 if up => model
                            .store(size(&mut rng), GFP_KERNEL | __GFP_MOVABLE)
                            .unwrap(),
                        0..=3 => model.free(rng.below(model.order.len().max(1))),
                        4..=7 if !model.order.is_empty() => {
                            model.check_one(model.order[rng.below(model.order.len())]);
                        }
                        8 => model.rewrite(rng.below(1 << 20)),
                        _ if rng.one_in(2000) => {
                            mm.zs_compact(pool);
                        }
                        _ => {}
                    }
                }
                model.check();
                model.free_all();
                left.fetch_sub(1, Ordering::Relaxed);
            });
        }
        let _cpu = mm.platform().claim(2);
        let mut rng = Rng(77);
        while left.load(Ordering::Relaxed) > 0 && !std::thread::panicking() {
            moved.fetch_add(mm.zs_compact(&pool), Ordering::Relaxed);
            mm.rcu_work();
            let start = Pfn(64 * (1 + rng.below(200) as u32));
            if mm.alloc_contig_range(start, 64).is_ok() {
                ranges.fetch_add(1, Ordering::Relaxed);
                // SAFETY: the range is ours, and nobody has it.
                unsafe { mm.free_contig_range(start, 64) };
            }
            std::thread::yield_now();
        }
    });
    let stats = mm.zs_pool_stats(&pool);
    assert!(
        stats.objects_moved > 100 && moved.into_inner() > 0,
        "{stats:?}"
    );
    assert!(ranges.into_inner() > 10);
    mm.zs_destroy_pool(pool).unwrap();
    teardown(&machine, &mm);
}

#[test]
fn two_threads_and_compaction() {
    threads(false);
}

#[test]
fn two_threads_and_compaction_where_locks_sleep() {
    threads(true);
}

#[test]
fn short_memory_compacts() {
    let machine = Machine::flat(4096).guarded();
    let mm = machine.boot();
    let pool = mm.zs_create_pool("shrinker").unwrap();
    let mut model = Model::new(&mm, &pool, 1);
    let mut rng = Rng(7);
    while mm.ledger().free + mm.ledger().untouched > 1200 {
        for _ in 0..50 {
            model.store(size(&mut rng), GFP_KERNEL).unwrap();
        }
    }
    for _ in 0..model.order.len() * 3 / 4 {
        model.free(rng.below(model.order.len()));
    }
    let held = mm.zs_get_total_pages(&pool);
    let mut pages = Vec::new();
    while let Ok(page) = mm.alloc_pages(GFP_KERNEL, 0) {
        pages.push(page);
    }
    let stats = mm.zs_pool_stats(&pool);
    assert!(stats.pages_compacted > held / 4, "{stats:?} of {held}");
    check_compact(&mm, &pool);
    model.check();
    pages.into_iter().for_each(|page| free(&mm, page));
    model.free_all();
    mm.zs_destroy_pool(pool).unwrap();
    teardown(&machine, &mm);
}

/// Every allocation of a pool's life fails once.
#[test]
fn every_point_fails_once() {
    let machine = Machine::flat(4096).guarded();
    let (mut failed, mut points) = (0, 0);
    for warm in [false, true] {
        for n in 0.. {
            let mm = machine.boot_on(machine.host().build().unwrap());
            if warm {
                let page = mm.alloc_pages(GFP_KERNEL, 0).unwrap();
                free(&mm, page);
            }
            mm.platform().faults().fail_nth(n);
            let mut errors = 0;
            if let Ok(pool) = mm.zs_create_pool("faults") {
                let mut model = Model::new(&mm, &pool, n);
                for size in [
                    1, 40, 1300, 3000, 3600, 4096, 1300, 600, 600, 600, 600, 600, 600, 600,
                ] {
                    let before = mm.zs_pool_stats(&pool);
                    if model.store(size, GFP_KERNEL).is_err() {
                        errors += 1;
                        // A page of handles that was made is not lost, and nothing else was.
                        let after = mm.zs_pool_stats(&pool);
                        assert_eq!((after.objects, after.pages), (before.objects, before.pages));
                    }
                }
                model.free(2);
                mm.zs_compact(&pool);
                model.check();
                model.free_all();
                mm.zs_destroy_pool(pool).unwrap();
            } else {
                errors += 1;
            }
            let (_, fired) = mm.platform().faults().off();
            teardown(&machine, &mm);
            failed += errors;
            if fired == 0 {
                points += n;
                break;
            }
        }
    }
    // Not all of them are fatal: what a slab of descriptors cannot have may be had elsewhere.
    assert!(points > 100 && failed > points / 2, "{failed} of {points}");
}

/// Faults at random, in the middle of everything.
#[test]
fn faults_at_random() {
    let machine = Machine::flat(8192).guarded();
    let mm = machine.boot();
    let pool = mm.zs_create_pool("faults").unwrap();
    let mut model = Model::new(&mm, &pool, 5);
    let mut rng = Rng(5);
    let mut failed = 0;
    mm.platform().faults().fail_one_in(20, 9);
    for _ in 0..20_000 {
        match rng.below(20) {
            0..=9 => failed += u64::from(model.store(size(&mut rng), GFP_NOWAIT).is_err()),
            10..=18 => model.free(rng.below(1 << 20)),
            _ if rng.one_in(50) => drop(mm.zs_compact(&pool)),
            _ => model.rewrite(rng.below(1 << 20)),
        }
    }
    mm.platform().faults().off();
    assert!(failed > 100, "{failed}");
    check_counts(&mm, &pool, model.objects.len());
    model.check();
    model.free_all();
    mm.zs_destroy_pool(pool).unwrap();
    teardown(&machine, &mm);
}
