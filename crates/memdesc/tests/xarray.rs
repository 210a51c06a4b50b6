//! The tree of a page cache under its readers: interrupted ones, interrupting ones, and threads.

mod common;

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::mem::MaybeUninit;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use common::{Rng, scaled};
use memdesc::rcu::{self, Rcu};
use memdesc::xarray::*;
use memdesc::{Mm, Platform, gfp, inject};
use memdesc_host::Host;

/// Nodes are objects of the slab, prepaid.
struct Slab<'m>(&'m Mm<Host>);

// SAFETY: the object is as large as a node; prepaid objects are freed after a grace period.
unsafe impl NodeSource for Slab<'_> {
    fn alloc(&self) -> Option<NonNull<Node>> {
        let gfp = gfp::GFP_KERNEL | gfp::__GFP_RCU_PREPAID;
        Some(self.0.kmalloc(size_of::<Node>(), gfp).ok()?.cast())
    }
    fn free(&self, node: NonNull<Node>) {
        // SAFETY: from `alloc`.
        unsafe { self.0.kfree(node.cast()) }
    }
    fn free_rcu(&self, node: NonNull<Node>) {
        // SAFETY: the same.
        unsafe { self.0.kfree_rcu_prepaid(node.cast()) }
    }
}

/// Boxes; what is freed waits until the test says that no reader is inside.
#[derive(Default)]
struct Parked(RefCell<Vec<NonNull<Node>>>);

// SAFETY: one thread, which opens no read section across `settle`.
unsafe impl NodeSource for Parked {
    fn alloc(&self) -> Option<NonNull<Node>> {
        NonNull::new(Box::into_raw(Box::<MaybeUninit<Node>>::new_uninit()).cast())
    }
    fn free(&self, node: NonNull<Node>) {
        // SAFETY: from `alloc`.
        drop(unsafe { Box::from_raw(node.as_ptr()) });
    }
    fn free_rcu(&self, node: NonNull<Node>) {
        self.0.borrow_mut().push(node);
    }
}

impl Parked {
    fn settle(&self) {
        let parked = std::mem::take(&mut *self.0.borrow_mut());
        parked.into_iter().for_each(|node| self.free(node));
    }
}

fn entry(value: u64) -> Entry {
    Entry::new(value).unwrap()
}

type Marks = [bool; 3];
/// What a tree holds, by first index.
type State = BTreeMap<u64, (Found, Marks)>;

fn at(state: &State, index: u64) -> Option<(Found, Marks)> {
    let (_, there) = state.range(..=index).next_back()?;
    (there.0.last() >= index).then_some(*there)
}

/// One RCU for all trees of this file's boxes: nobody waits for it.
struct Rig {
    tree: XArray,
    parked: Parked,
    mm: Mm<Host>,
}

impl Rig {
    fn new() -> Rig {
        let (host, ranges) = Host::small(2048).unwrap();
        Rig {
            tree: XArray::new(),
            parked: Parked::default(),
            mm: Mm::new(host, &common::base_config(), &ranges).unwrap(),
        }
    }

    fn read<R>(&self, f: impl FnOnce(Reader<'_>) -> R) -> R {
        let section = rcu::read_lock(self.mm.platform().rcu());
        // SAFETY: boxes are freed in `settle`, where no reader is.
        f(unsafe { self.tree.reader(&section) })
    }

    fn state(&self) -> State {
        let marks = |r: &Reader<'_>, i| Mark::ALL.map(|m| r.is_marked(i, m));
        self.read(|r| {
            let all = r.range(0, u64::MAX, None);
            all.map(|f| (f.index, (f, marks(&r, f.index)))).collect()
        })
    }

    /// Something that a writer does.
    fn write(&self, rng: &mut Rng, value: u64) {
        let mut nodes = Nodes::new(&self.parked);
        let order = [0, 0, 1, 2, 3, 6, 7][rng.below(7)];
        let index = somewhere(rng) >> order << order;
        let next = self.read(|r| r.find(index, u64::MAX, None));
        nodes.fill(store_needs(index, order)).unwrap();
        if let Some(next) = next {
            nodes
                .fill(split_needs(next.order, next.order.saturating_sub(3)))
                .unwrap();
        }
        // SAFETY: one thread writes.
        let mut tree = unsafe { self.tree.locked(&mut nodes) };
        let mark = Mark::ALL[rng.below(3)];
        match (rng.below(12), next) {
            (0..4, _) => drop(tree.store(index, order, entry(value), |_| ())),
            (4..6, Some(next)) => drop(tree.erase(next.last())),
            (6..8, Some(next)) => {
                let to = next.order.saturating_sub(3);
                tree.split(next.index, next.order, to, |i| {
                    entry(value << 20 | i & 0xfffff)
                })
                .unwrap();
            }
            (8, Some(next)) => drop(tree.replace(next.index, entry(value))),
            (9..11, Some(next)) => drop(tree.set_mark(next.index, mark)),
            (11, Some(next)) => drop(tree.clear_mark(next.index, mark)),
            _ => (),
        }
        tree.check().unwrap();
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        let mut nodes = Nodes::new(&self.parked);
        // SAFETY: nobody else is here.
        unsafe { self.tree.locked(&mut nodes) }.erase_all(|_| ());
        self.parked.settle();
    }
}

/// A small crowded place, and far ones that make the tree grow.
fn somewhere(rng: &mut Rng) -> u64 {
    match rng.below(10) {
        0 => 0,
        1 => 1 << (6 * rng.below(5)),
        2 => 4096 + rng.below(64) as u64,
        _ => rng.below(24) as u64 + 56,
    }
}

/// One test at a time has the hook.
fn hooked(hook: fn(&'static str)) -> Option<impl Drop> {
    static ALONE: Mutex<()> = Mutex::new(());
    struct Off(#[allow(dead_code)] MutexGuard<'static, ()>);
    impl Drop for Off {
        fn drop(&mut self) {
            inject::set_hook(None);
        }
    }
    let alone = ALONE.lock().unwrap_or_else(|e| e.into_inner());
    inject::set_hook(Some(hook)).then_some(Off(alone))
}

type Strike = Box<dyn FnMut()>;

thread_local! {
    /// What happens at every point that this thread passes, but within itself.
    static STRIKE: RefCell<Option<Strike>> = const { RefCell::new(None) };
    static POINTS: Cell<u64> = const { Cell::new(0) };
}

fn strike(label: &'static str) {
    if !label.starts_with("xarray") {
        return;
    }
    STRIKE.with(|s| {
        if let Ok(mut s) = s.try_borrow_mut()
            && let Some(s) = s.as_mut()
        {
            POINTS.set(POINTS.get() + 1);
            s();
        }
    });
}

fn striking<R>(strike: impl FnMut(), f: impl FnOnce() -> R) -> R {
    let strike: Box<dyn FnMut() + '_> = Box::new(strike);
    // SAFETY: it is taken out again before what it borrows goes.
    let strike = unsafe { std::mem::transmute::<Box<dyn FnMut() + '_>, Strike>(strike) };
    STRIKE.set(Some(strike));
    let result = f();
    STRIKE.set(None);
    result
}

/// An interrupt between any two stores of a writer sees at each index what was there before or what is there after, and is never kept
/// waiting.
#[test]
fn an_interrupt_reads_at_every_step_of_a_writer() {
    let Some(_off) = hooked(strike) else {
        return;
    };
    let (rig, mut rng) = (Rig::new(), Rng(1));
    let places: Vec<u64> = (0..90)
        .chain([4096, 4100, 4159, 1 << 18, 1 << 24])
        .collect();
    for n in 0..scaled(3000, 2) as u64 {
        let before = rig.state();
        let seen = RefCell::new(Vec::new());
        let look = || {
            rig.read(|r| {
                for index in &places {
                    seen.borrow_mut().push((*index, r.get(*index)));
                }
                // What has the mark all the time is the first or comes later.
                seen.borrow_mut()
                    .push((u64::MAX, r.find(0, u64::MAX, Some(Mark::Dirty))));
            });
        };
        striking(look, || rig.write(&mut rng, n + 1));
        let after = rig.state();
        let states = [&before, &after];
        for (index, found) in seen.take() {
            if index == u64::MAX {
                not_missed(&states, 0, u64::MAX, 0, found);
            } else {
                possible(&states, index, found);
            }
        }
        rig.parked.settle();
    }
    assert!(POINTS.take() > scaled(10_000, 1) as u64);
}

/// What was found at the index was there in one of the states.
fn possible(states: &[&State], index: u64, found: Option<Found>) {
    let all: Vec<_> = states
        .iter()
        .map(|s| at(s, index).map(|(f, _)| f))
        .collect();
    assert!(
        all.contains(&found),
        "at {index}: {found:?} is none of {all:?}"
    );
}

/// Nothing was passed over that was there, and marked, in all the states.
fn not_missed(states: &[&State], from: u64, to: u64, mark: usize, found: Option<Found>) {
    if let Some(f) = found {
        assert!(f.last() >= from && f.index <= to);
        assert!(
            states
                .iter()
                .any(|s| s.get(&f.index).is_some_and(|(g, _)| *g == f)),
            "{f:?}"
        );
    }
    let passed = |i: u64| from <= i && i <= to && found.is_none_or(|f| i < f.index);
    for (there, _) in states[0].values() {
        for index in [there.index, there.last()] {
            let marked = |s: &&State| at(s, index).is_some_and(|(_, marks)| marks[mark]);
            let missed = passed(index) && states.iter().all(marked);
            assert!(!missed, "{index} is missed: {found:?}, {states:?}");
        }
    }
}

/// A writer on another CPU does all it wants between any two loads of a reader.
#[test]
fn a_writer_writes_at_any_step_of_a_reader() {
    let Some(_off) = hooked(strike) else {
        return;
    };
    let rig = Rig::new();
    let rng = RefCell::new(Rng(2));
    for n in 0..scaled(20_000, 4) as u64 {
        let mut states = vec![rig.state()];
        let (index, len, m) = {
            let rng = &mut *rng.borrow_mut();
            (somewhere(rng), rng.below(100) as u64, rng.below(3))
        };
        let mut writes = 0;
        let write = || {
            let rng = &mut *rng.borrow_mut();
            while writes < 6 && !rng.one_in(3) {
                writes += 1;
                rig.write(rng, n * 8 + writes);
                states.push(rig.state());
            }
        };
        let (got, found) = if n % 2 == 0 {
            (Some(striking(write, || rig.read(|r| r.get(index)))), None)
        } else {
            let mark = Some(Mark::ALL[m]);
            let find = || rig.read(|r| r.find(index, index + len, mark));
            (None, Some(striking(write, find)))
        };
        let states: Vec<&State> = states.iter().collect();
        if let Some(got) = got {
            possible(&states, index, got);
        }
        if let Some(found) = found {
            not_missed(&states, index, index + len, m, found);
        }
        rig.parked.settle();
        rig.write(&mut rng.borrow_mut(), n * 8 + 7);
    }
}

/// Readers on threads against a writer, on the slab and its RCU. An entry says where it belongs, so a reader knows whether it is right.
#[test]
fn readers_meet_nothing_foreign() {
    let ranges = [common::range(0, 16_384, 0)];
    let host = Host::builder().floating(4).memory(&ranges).build().unwrap();
    let mm = Mm::new(host, &common::base_config(), &ranges).unwrap();
    let (tree, stop, looks) = (XArray::new(), AtomicBool::new(false), AtomicU64::new(0));
    // Always there: the writer never touches it, but the tree above it.
    const KEPT: u64 = 5;
    let slab = Slab(&mm);
    let belongs = |f: Found| {
        let (value, wide) = (f.entry.get() & 0xffff_ffff, f.entry.get() >> 32);
        assert_eq!(
            (value, wide),
            (f.index & 0xffff_ffff | 1 << 31, u64::from(f.order))
        );
    };
    let make =
        |index: u64, order: u32| entry(u64::from(order) << 32 | index & 0xffff_ffff | 1 << 31);
    {
        let mut nodes = Nodes::new(&slab);
        nodes.fill(store_needs(KEPT, 0)).unwrap();
        // SAFETY: nobody else is here yet.
        let mut tree = unsafe { tree.locked(&mut nodes) };
        tree.store(KEPT, 0, make(KEPT, 0), |_| ()).unwrap();
        tree.set_mark(KEPT, Mark::Writeback);
    }
    std::thread::scope(|scope| {
        for n in 0..2 {
            let (mm, tree, stop, looks) = (&mm, &tree, &stop, &looks);
            scope.spawn(move || {
                let mut rng = Rng(n + 10);
                while !stop.load(Ordering::Relaxed) {
                    let section = rcu::read_lock(mm.platform().rcu());
                    // SAFETY: the slab frees after this RCU.
                    let r = unsafe { tree.reader(&section) };
                    for _ in 0..16 {
                        let index = somewhere(&mut rng);
                        if let Some(f) = r.get(index) {
                            assert!(f.index <= index && index <= f.last());
                            belongs(f);
                        }
                        assert_eq!(r.load(KEPT), Some(make(KEPT, 0)));
                        let kept = r.find(0, KEPT, Some(Mark::Writeback)).unwrap();
                        belongs(kept);
                        looks.fetch_add(1, Ordering::Relaxed);
                    }
                    let mut last = None;
                    for f in r.range(0, u64::MAX, None) {
                        belongs(f);
                        assert!(last < Some(f.last()));
                        last = Some(f.last());
                    }
                }
            });
        }
        let mut rng = Rng(3);
        let end = Instant::now() + Duration::from_millis(scaled(800, 0) as u64);
        let mut rounds = 0;
        while rounds < scaled(2000, 10) || Instant::now() < end {
            rounds += 1;
            let order = [0, 1, 3, 6, 7][rng.below(5)];
            let index = somewhere(&mut rng) >> order << order;
            let mut nodes = Nodes::new(&slab);
            nodes
                .fill(store_needs(index, order).max(split_needs(7, 4)))
                .unwrap();
            // SAFETY: this thread alone writes.
            let mut tree = unsafe { tree.locked(&mut nodes) };
            match (rng.below(4), tree.reader().get(index)) {
                (0, Some(f)) if f.index != KEPT => drop(tree.erase(index)),
                (1, Some(f)) if f.order > 0 => {
                    let to = f.order.saturating_sub(3);
                    tree.split(f.index, f.order, to, |i| make(i, to)).unwrap();
                }
                (2, _) => drop(tree.set_mark(index, Mark::Dirty)),
                _ if index > KEPT => drop(tree.store(index, order, make(index, order), |_| ())),
                _ => (),
            }
            if rounds % 64 == 0 {
                mm.tick();
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    let mut nodes = Nodes::new(&slab);
    // SAFETY: the readers are gone.
    let mut last = unsafe { tree.locked(&mut nodes) };
    last.check().unwrap();
    last.erase_all(belongs);
    mm.platform().rcu().synchronize();
    mm.shrink();
    assert!(mm.ledger().balanced);
    println!("{} looks", looks.load(Ordering::Relaxed));
}
