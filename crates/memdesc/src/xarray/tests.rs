//! Unit tests, and a state machine against a map that has an entry for each index.

use std::boxed::Box;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::vec::Vec;

use core::ptr::NonNull;

use proptest::prelude::{ProptestConfig, Strategy, any, prop_oneof};
use proptest::test_runner::{RngAlgorithm, TestRng, TestRunner};

use super::*;

/// Boxes, freed at once: there are no readers, and a writer who touches what he freed is found by Miri.
#[derive(Default)]
struct Boxes {
    live: AtomicUsize,
    made: AtomicUsize,
}

// SAFETY: boxes; tests that have readers use another.
unsafe impl NodeSource for Boxes {
    fn alloc(&self) -> Option<NonNull<Node>> {
        self.live.fetch_add(1, Ordering::Relaxed);
        self.made.fetch_add(1, Ordering::Relaxed);
        NonNull::new(Box::into_raw(Box::<core::mem::MaybeUninit<Node>>::new_uninit()).cast())
    }
    fn free(&self, node: NonNull<Node>) {
        self.live.fetch_sub(1, Ordering::Relaxed);
        // SAFETY: from `alloc`.
        drop(unsafe { Box::from_raw(node.as_ptr()) });
    }
    fn free_rcu(&self, node: NonNull<Node>) {
        self.free(node);
    }
}

fn entry(value: u64) -> Entry {
    Entry::new(value).unwrap()
}

/// A tree with its lock held: the test is its only user.
struct Tree {
    tree: XArray,
    boxes: Boxes,
}

impl Tree {
    fn new() -> Tree {
        Tree {
            tree: XArray::new(),
            boxes: Boxes::default(),
        }
    }

    fn with<R>(&self, nodes: usize, f: impl FnOnce(&mut Locked<'_, '_, Boxes>) -> R) -> R {
        let mut nodes_in_stock = Nodes::new(&self.boxes);
        nodes_in_stock.fill(nodes).unwrap();
        // SAFETY: the test is alone.
        let mut locked = unsafe { self.tree.locked(&mut nodes_in_stock) };
        let result = f(&mut locked);
        let nodes = locked.check().unwrap();
        drop(nodes_in_stock);
        assert_eq!(nodes, self.boxes.live.load(Ordering::Relaxed));
        result
    }

    fn store(&self, index: u64, order: u32, value: u64) -> Result<Vec<Found>, XaError> {
        let mut replaced = Vec::new();
        self.with(store_needs(index, order), |t| {
            let takes = t.store_takes(index, order);
            let before = t.nodes.len();
            let result = t.store(index, order, entry(value), |f| replaced.push(f));
            assert_eq!(takes.map(|n| before - n), result.map(|()| t.nodes.len()));
            result
        })?;
        Ok(replaced)
    }

    fn look<R>(&self, f: impl FnOnce(Reader<'_>) -> R) -> R {
        f(Reader::new(&self.tree))
    }

    fn get(&self, index: u64) -> Option<Found> {
        self.look(|r| r.get(index))
    }

    fn find(&self, from: u64, to: u64, mark: Option<Mark>) -> Option<Found> {
        self.look(|r| r.find(from, to, mark))
    }

    fn erase(&self, index: u64) -> Option<Found> {
        self.with(0, |t| t.erase(index))
    }

    fn nodes(&self) -> usize {
        self.boxes.live.load(Ordering::Relaxed)
    }

    fn end(self) {
        self.with(0, |t| t.erase_all(|_| ()));
        assert_eq!(self.nodes(), 0);
        assert!(self.tree.is_empty());
    }
}

fn found(index: u64, order: u32, value: u64) -> Found {
    Found {
        index,
        order,
        entry: entry(value),
    }
}

#[test]
fn entries_have_sixty_bits() {
    assert_eq!(Entry::new(0), None);
    assert_eq!(Entry::new(1 << 60), None);
    assert_eq!(
        Entry::new((1 << 60) - 1).map(Entry::get),
        Some((1 << 60) - 1)
    );
    assert_eq!(size_of::<Option<Entry>>(), 8);
    assert_eq!(size_of::<XArray>(), 16);
}

#[test]
fn the_first_index_alone_has_no_node() {
    let t = Tree::new();
    assert_eq!(t.store(0, 0, 5), Ok(Vec::new()));
    assert_eq!(t.nodes(), 0);
    assert_eq!(t.get(0), Some(found(0, 0, 5)));
    assert_eq!(t.get(1), None);
    assert!(t.with(0, |t| t.set_mark(0, Mark::Dirty)));
    assert_eq!(t.find(0, 9, Some(Mark::Dirty)), Some(found(0, 0, 5)));
    assert_eq!(t.store(0, 0, 6), Ok(Vec::from([found(0, 0, 5)])));
    // Growing keeps the entry and its mark, shrinking too.
    assert_eq!(t.store(MAX_INDEX, 0, 7), Ok(Vec::new()));
    assert_eq!(t.nodes(), 17);
    assert_eq!(t.find(0, 9, Some(Mark::Dirty)), Some(found(0, 0, 6)));
    assert_eq!(t.find(1, u64::MAX, None), Some(found(MAX_INDEX, 0, 7)));
    assert_eq!(t.erase(MAX_INDEX), Some(found(MAX_INDEX, 0, 7)));
    assert_eq!(t.nodes(), 0);
    assert_eq!(t.find(0, 9, Some(Mark::Dirty)), Some(found(0, 0, 6)));
    assert_eq!(t.erase(0), Some(found(0, 0, 6)));
    assert!(!t.tree.any_marked(Mark::Dirty));
    t.end();
}

#[test]
fn an_empty_tree_grows_by_one_way_down() {
    let t = Tree::new();
    t.store(MAX_INDEX, 0, 1).unwrap();
    assert_eq!(t.nodes(), 9);
    t.end();
}

#[test]
fn what_cannot_be_is_refused() {
    let t = Tree::new();
    assert_eq!(t.store(MAX_INDEX + 1, 0, 1), Err(XaError::BadIndex));
    assert_eq!(t.store(1, 1, 1), Err(XaError::BadIndex));
    assert_eq!(t.store(0, 53, 1), Err(XaError::BadIndex));
    assert_eq!(t.store(0, 52, 1), Ok(Vec::new()));
    let whole = found(0, 52, 1);
    assert_eq!(whole.last(), MAX_INDEX);
    assert_eq!(t.get(MAX_INDEX), Some(whole));
    assert_eq!(t.store(64, 0, 2), Err(XaError::Covered(whole)));
    let split = |from, to| t.with(0, |t| t.split(5, from, to, |_| entry(2)));
    assert_eq!(split(3, 0), Err(XaError::NotThere(Some(whole))));
    assert_eq!(split(52, 53), Err(XaError::BadIndex));
    assert_eq!(split(52, 47), Err(XaError::Nodes(16)));
    assert_eq!(t.erase(12345), Some(whole));
    let refused = t.with(0, |t| t.store(4096, 3, entry(1), |_| ()));
    assert_eq!(refused, Err(XaError::Nodes(3)));
    t.end();
}

#[test]
fn a_large_entry_takes_the_place_of_small_ones() {
    let t = Tree::new();
    let small = [3, 64, 65, 100, 130, 200, 4095];
    for (i, index) in small.into_iter().enumerate() {
        t.store(index, 0, i as u64 + 1).unwrap();
    }
    t.with(0, |t| assert!(t.set_mark(130, Mark::ToWrite)));
    // The second node goes with all that is in it, and a part of the third level.
    let replaced = t.store(64, 6, 50).unwrap();
    assert_eq!(
        replaced.iter().map(|f| f.index).collect::<Vec<_>>(),
        [64, 65, 100]
    );
    let replaced = t.store(0, 8, 51).unwrap();
    let bases: Vec<_> = replaced.iter().map(|f| (f.index, f.order)).collect();
    assert_eq!(bases, [(3, 0), (64, 6), (130, 0), (200, 0)]);
    assert_eq!(t.find(255, 255, Some(Mark::ToWrite)), Some(found(0, 8, 51)));
    assert_eq!(t.get(256), None);
    // Root and the node of 4095.
    assert_eq!(t.nodes(), 2);
    t.end();
}

#[test]
fn a_split_keeps_marks_and_covers_all() {
    for (from, to) in [
        (3, 0),
        (5, 3),
        (6, 0),
        (7, 6),
        (8, 2),
        (13, 6),
        (9, 9),
        (0, 0),
    ] {
        let t = Tree::new();
        let index = 3 << 13;
        t.store(index, from, 1).unwrap();
        t.with(0, |t| t.set_mark(index, Mark::Dirty));
        t.with(split_needs(from, to), |t| {
            t.split(index, from, to, |i| entry(i + 2)).unwrap();
            assert!(t.nodes.is_empty());
        });
        let all: Vec<_> = t.with(0, |t| {
            t.reader().range(0, u64::MAX, Some(Mark::Dirty)).collect()
        });
        let parts = (index..index + (1 << from)).step_by(1 << to);
        assert_eq!(all, parts.map(|i| found(i, to, i + 2)).collect::<Vec<_>>());
        t.end();
    }
}

#[test]
fn a_split_lets_the_tree_shrink() {
    let t = Tree::new();
    t.store(0, 6, 1).unwrap();
    assert_eq!(t.nodes(), 1);
    t.with(1, |t| t.split(0, 6, 0, |i| entry(i + 1)).unwrap());
    assert_eq!(t.nodes(), 1);
    t.end();
}

#[test]
fn replacing_keeps_order_and_marks() {
    let t = Tree::new();
    assert_eq!(t.with(0, |t| t.replace(9, entry(1))), None);
    t.store(8, 3, 1).unwrap();
    t.with(0, |t| t.set_mark(12, Mark::Writeback));
    assert_eq!(t.with(0, |t| t.replace(15, entry(2))), Some(found(8, 3, 1)));
    assert_eq!(t.find(9, 9, Some(Mark::Writeback)), Some(found(8, 3, 2)));
    assert!(t.with(0, |t| t.clear_mark(10, Mark::Writeback)));
    assert!(!t.with(0, |t| t.clear_mark(10, Mark::Writeback)));
    t.end();
}

/// Where things happen: near powers of the fan-out, near the end, and in one crowded place.
fn index() -> impl Strategy<Value = u64> {
    prop_oneof![
        4 => 0_u64..300,
        2 => (0_u32..9, 0_u64..6, 1_u64..4)
            .prop_map(|(level, near, times)| (times << (6 * level)).saturating_sub(3) + near),
        1 => (0_u64..200).prop_map(|n| MAX_INDEX - n),
        2 => (0_u64..5000).prop_map(|n| (7 << 30) + n),
        1 => any::<u64>().prop_map(|n| n & MAX_INDEX),
    ]
}

#[derive(Clone, Debug)]
enum Op {
    Store(u64, u32),
    Erase(u64),
    Replace(u64),
    Mark(u64, usize, bool),
    /// To this many orders less.
    Split(u64, u32),
    Find(u64, u64, usize),
    /// Erases whatever comes next.
    EraseNext(u64),
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        5 => (index(), 0_u32..=10).prop_map(|(i, o)| Op::Store(i >> o << o, o)),
        3 => index().prop_map(|i| Op::Store(i, 0)),
        3 => index().prop_map(Op::EraseNext),
        2 => index().prop_map(Op::Erase),
        1 => index().prop_map(Op::Replace),
        3 => (index(), 0_usize..3, any::<bool>()).prop_map(|(i, m, to)| Op::Mark(i, m, to)),
        2 => (index(), 0_u32..=7).prop_map(|(i, by)| Op::Split(i, by)),
        4 => (index(), 0_u64..5000, 0_usize..4).prop_map(|(i, len, m)| Op::Find(i, len, m)),
    ]
}

/// What the tree should be: entries by first index, with order, value and marks.
#[derive(Default)]
struct Model(BTreeMap<u64, What>);

/// Order, value, marks.
type What = (u32, u64, [bool; 3]);

impl Model {
    fn at(&self, index: u64) -> Option<(u64, What)> {
        let (first, what) = self.0.range(..=index).next_back()?;
        (first >> what.0 == index >> what.0).then_some((*first, *what))
    }

    /// The next from `index` on that has the mark.
    fn next(&self, index: u64, mark: Option<usize>) -> Option<Found> {
        let from = self.at(index).map_or(index, |(first, _)| first);
        let mut all = self.0.range(from..);
        let (first, what) = all.find(|(_, what)| mark.is_none_or(|m| what.2[m]))?;
        Some(found(*first, what.0, what.1))
    }

    fn store(&mut self, index: u64, order: u32, value: u64) -> Result<Vec<Found>, XaError> {
        let last = index + (1 << order) - 1;
        if last > MAX_INDEX {
            return Err(XaError::BadIndex);
        }
        if let Some((first, (larger, value, _))) = self.at(index)
            && larger > order
        {
            return Err(XaError::Covered(found(first, larger, value)));
        }
        let inside: Vec<u64> = self.0.range(index..=last).map(|(i, _)| *i).collect();
        let mut marks = [false; 3];
        let mut replaced = Vec::new();
        for first in inside {
            let (order, value, had) = self.0.remove(&first).unwrap();
            (0..3).for_each(|m| marks[m] |= had[m]);
            replaced.push(found(first, order, value));
        }
        self.0.insert(index, (order, value, marks));
        Ok(replaced)
    }
}

fn run(ops: &[Op]) {
    let (t, mut model) = (Tree::new(), Model::default());
    for (n, op) in ops.iter().enumerate() {
        let value = n as u64 + 1;
        match *op {
            Op::Store(index, order) => {
                assert_eq!(
                    t.store(index, order, value),
                    model.store(index, order, value)
                );
            }
            Op::Erase(index) | Op::EraseNext(index) => {
                let index = match op {
                    Op::EraseNext(_) => model.next(index, None).map_or(index, |f| f.index),
                    _ => index,
                };
                let gone = model.at(index).map(|(first, (order, value, _))| {
                    model.0.remove(&first);
                    found(first, order, value)
                });
                assert_eq!(t.erase(index), gone);
            }
            Op::Replace(index) => {
                let there = model.at(index).map(|(first, (order, old, marks))| {
                    model.0.insert(first, (order, value, marks));
                    found(first, order, old)
                });
                assert_eq!(t.with(0, |t| t.replace(index, entry(value))), there);
            }
            Op::Mark(index, m, to) => {
                let index = model.next(index, None).map_or(index, |f| f.last());
                let changed = model.at(index).is_some_and(|(first, (.., marks))| {
                    model.0.get_mut(&first).unwrap().2[m] = to;
                    marks[m] != to
                });
                let mark = Mark::ALL[m];
                t.with(0, |t| {
                    let did = if to {
                        t.set_mark(index, mark)
                    } else {
                        t.clear_mark(index, mark)
                    };
                    assert_eq!(did, changed);
                    let is = model.at(index).is_some_and(|(_, (.., marks))| marks[m]);
                    assert_eq!(t.reader().is_marked(index, mark), is);
                });
            }
            Op::Split(index, by) => {
                let Some(whole) = model.next(index, None) else {
                    continue;
                };
                let to = whole.order.saturating_sub(by);
                let (_, _, marks) = model.0.remove(&whole.index).unwrap();
                for part in (whole.index..=whole.last()).step_by(1 << to) {
                    model.0.insert(part, (to, value + part, marks));
                }
                t.with(split_needs(whole.order, to), |t| {
                    t.split(whole.last(), whole.order, to, |i| entry(value + i))
                        .unwrap();
                });
            }
            Op::Find(from, len, m) => {
                let (to, m) = (from + len, m.checked_sub(1));
                let first = model.next(from, m).filter(|f| f.index <= to);
                assert_eq!(t.find(from, to, m.map(|m| Mark::ALL[m])), first);
                let at = model
                    .at(from)
                    .map(|(first, (order, value, _))| found(first, order, value));
                assert_eq!(t.get(from), at);
            }
        }
    }
    for m in [None, Some(0), Some(1), Some(2)] {
        let mark = m.map(|m| Mark::ALL[m]);
        let all: Vec<_> = t.with(0, |t| t.reader().range(0, u64::MAX, mark).collect());
        let marked = model
            .0
            .iter()
            .filter(|(_, what)| m.is_none_or(|m| what.2[m]));
        let wanted: Vec<_> = marked
            .map(|(i, (order, value, _))| found(*i, *order, *value))
            .collect();
        assert_eq!(all, wanted);
    }
    let mut all = Vec::new();
    t.with(0, |t| t.erase_all(|f| all.push(f.index)));
    assert_eq!(all, model.0.into_keys().collect::<Vec<_>>());
    t.end();
}

#[test]
fn like_a_map() {
    let (cases, len) = if cfg!(miri) { (2, 12) } else { (400, 200) };
    let config = ProptestConfig {
        cases,
        failure_persistence: None,
        max_shrink_iters: 5000,
        ..ProptestConfig::default()
    };
    let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    let mut runner = TestRunner::new_with_rng(config, rng);
    let ops = proptest::collection::vec(op(), 1..=len);
    if let Err(why) = runner.run(&ops, |ops| {
        run(&ops);
        Ok(())
    }) {
        panic!("{why}");
    }
}
