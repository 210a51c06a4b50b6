//! Model checks of readers against the writer, under loom, with 4 slots a node, and planted bugs that loom must find.

use std::boxed::Box;
use std::vec::Vec;

use core::cell::RefCell;
use core::ptr::NonNull;

use loom::sync::Arc;
use loom::thread;

use super::*;
use crate::rcu::engine::{Engine, Readers, Slot as ReaderSlot};
use crate::sync::atomic::fence;

/// Boxes. What is freed stays, poisoned, until the model ends: loom panics if a reader looks at it, or has not finished to.
#[derive(Default)]
struct Boxes {
    all: RefCell<Vec<NonNull<Node>>>,
    retired: RefCell<Vec<NonNull<Node>>>,
}

// SAFETY: boxes that live as long as this does, which is longer than the threads of a model.
unsafe impl NodeSource for Boxes {
    fn alloc(&self) -> Option<NonNull<Node>> {
        let node = NonNull::from(Box::leak(Box::new(Node::new())));
        self.all.borrow_mut().push(node);
        Some(node)
    }
    fn free(&self, _node: NonNull<Node>) {}
    fn free_rcu(&self, node: NonNull<Node>) {
        self.retired.borrow_mut().push(node);
    }
}

impl Boxes {
    /// A grace period is over.
    fn free_retired(&self) {
        for node in self.retired.borrow_mut().drain(..) {
            // SAFETY: it lives until the model ends.
            unsafe { node.as_ref() }.poke(0x6b);
        }
    }
}

impl Drop for Boxes {
    fn drop(&mut self) {
        for node in self.all.borrow_mut().drain(..) {
            // SAFETY: leaked above; the stock reads nodes of its own before this goes.
            drop(unsafe { Box::from_raw(node.as_ptr()) });
        }
    }
}

fn entry(value: u64) -> Entry {
    Entry::new(value).unwrap()
}

fn with(tree: &XArray, boxes: &Boxes, write: impl FnOnce(&mut Locked<'_, '_, Boxes>)) {
    let mut nodes = Nodes::new(boxes);
    nodes.fill(4).unwrap();
    // SAFETY: one thread of a model writes.
    let mut locked = unsafe { tree.locked(&mut nodes) };
    write(&mut locked);
    locked.check().unwrap();
}

fn store(tree: &mut Locked<'_, '_, Boxes>, index: u64, order: u32, value: u64) {
    tree.store(index, order, entry(value), |_| ()).unwrap();
}

/// `write` against `read`; nothing is freed before both are over.
fn model(
    before: fn(&mut Locked<'_, '_, Boxes>),
    write: fn(&mut Locked<'_, '_, Boxes>),
    read: fn(Reader<'_>),
) {
    loom::model(move || {
        let (tree, boxes) = (Arc::new(XArray::new()), Boxes::default());
        with(&tree, &boxes, before);
        let shared = tree.clone();
        let reader = thread::spawn(move || read(Reader::new(&shared)));
        with(&tree, &boxes, write);
        reader.join().unwrap();
        boxes.free_retired();
    });
}

fn load(reader: Reader<'_>, index: u64) -> u64 {
    reader.load(index).map_or(0, Entry::get)
}

#[test]
fn a_tree_grows_under_a_reader() {
    model(
        |t| store(t, 0, 0, 1),
        |t| store(t, 5, 0, 2),
        |r| {
            assert!([0, 2].contains(&load(r, 5)));
            assert_eq!(load(r, 0), 1);
        },
    );
}

#[test]
fn a_tree_begins_under_a_reader() {
    model(
        |_| (),
        |t| store(t, 5, 0, 2),
        |r| {
            let found = r.find(0, 9, None).map_or(0, |f| f.index);
            assert!([0, 5].contains(&found));
        },
    );
}

/// Each index has the whole or its part, and is never empty, though another part is erased at once.
fn split(read: fn(Reader<'_>)) {
    model(
        |t| store(t, 4, 1, 9),
        |t| {
            t.split(4, 1, 0, entry).unwrap();
            t.erase(4);
            store(t, 4, 0, 8);
        },
        read,
    );
}

#[test]
fn a_split_is_seen_whole_or_in_parts() {
    split(|r| assert!([9, 5].contains(&load(r, 5))));
}

#[test]
fn the_first_part_of_a_split_is_seen() {
    split(|r| assert!([9, 4, 0, 8].contains(&load(r, 4))));
}

/// Planted bug: a sibling is followed without a look whether it is still one.
#[test]
#[should_panic]
fn planted_bug_sibling_believed() {
    split(|r| {
        let Slot::Node(root) = r.root() else {
            panic!("a root");
        };
        // SAFETY: nothing is freed.
        let root = unsafe { root.as_ref() };
        let Slot::Node(leaf) = root.slot(1) else {
            panic!("a leaf");
        };
        // SAFETY: the same.
        let leaf = unsafe { leaf.as_ref() };
        let slot = match leaf.slot(1) {
            Slot::Sibling(first) => leaf.slot(first),
            slot => slot,
        };
        let Slot::Value(entry, _) = slot else {
            panic!("it is never empty");
        };
        assert!([9, 5].contains(&entry.get()));
    });
}

#[test]
fn a_split_into_nodes_is_seen_whole_or_in_parts() {
    model(
        |t| store(t, 0, 3, 9),
        |t| t.split(0, 3, 1, |i| entry(i + 1)).unwrap(),
        |r| {
            assert!([9, 5].contains(&load(r, 5)));
            assert!([9, 1].contains(&load(r, 1)));
        },
    );
}

#[test]
fn a_larger_entry_comes_over_small_ones() {
    model(
        |t| {
            store(t, 4, 0, 4);
            store(t, 6, 1, 6);
            store(t, 0, 1, 1);
        },
        |t| store(t, 4, 2, 9),
        |r| {
            assert!([6, 9].contains(&load(r, 7)));
            assert!([0, 9].contains(&load(r, 5)));
        },
    );
}

#[test]
fn siblings_come_over_siblings() {
    model(
        |t| {
            store(t, 0, 2, 4);
            store(t, 4, 2, 6);
        },
        |t| {
            store(t, 0, 3, 9);
            t.split(0, 3, 2, |i| entry(i + 20)).unwrap();
        },
        |r| assert!([6, 9, 24].contains(&load(r, 5))),
    );
}

#[test]
fn an_erased_sibling_is_not_its_neighbour() {
    model(
        |t| store(t, 4, 1, 9),
        |t| {
            t.erase(5);
            store(t, 4, 0, 1);
        },
        |r| assert!([0, 9].contains(&load(r, 5))),
    );
}

/// What has the mark all the time is found, wherever the mark goes.
#[test]
fn a_mark_is_found_while_it_moves_to_the_first() {
    model(
        |t| {
            store(t, 4, 0, 4);
            store(t, 5, 0, 5);
            t.set_mark(5, Mark::Dirty);
        },
        |t| store(t, 4, 1, 9),
        |r| assert!(r.find(0, 9, Some(Mark::Dirty)).is_some()),
    );
}

#[test]
fn a_mark_is_found_while_it_moves_up() {
    model(
        |t| {
            store(t, 5, 0, 5);
            t.set_mark(5, Mark::Dirty);
        },
        |t| store(t, 0, 3, 9),
        |r| assert!(r.find(5, 9, Some(Mark::Dirty)).is_some()),
    );
}

#[test]
fn a_mark_is_found_while_it_moves_to_a_part() {
    model(
        |t| {
            store(t, 4, 1, 9);
            t.set_mark(5, Mark::Dirty);
        },
        |t| {
            t.split(4, 1, 0, entry).unwrap();
            t.clear_mark(4, Mark::Dirty);
        },
        |r| assert!(r.find(5, 9, Some(Mark::Dirty)).is_some()),
    );
}

#[test]
fn a_mark_is_found_while_the_tree_grows() {
    model(
        |t| {
            store(t, 0, 0, 4);
            t.set_mark(0, Mark::Dirty);
        },
        |t| store(t, 5, 0, 9),
        |r| assert!(r.find(0, 9, Some(Mark::Dirty)).is_some()),
    );
}

/// The readers of a model: one, with a slot.
struct Env {
    slot: Arc<ReaderSlot>,
    reads: bool,
}

// SAFETY: one thread reads.
unsafe impl Readers for Env {
    fn slot(&self) -> Option<&ReaderSlot> {
        self.reads.then_some(&*self.slot)
    }
    fn for_each(&self, visit: &mut dyn FnMut(&ReaderSlot)) {
        visit(&self.slot);
    }
    fn light(&self) {
        fence(Ordering::SeqCst);
    }
    fn heavy(&self) {
        fence(Ordering::SeqCst);
    }
    fn relax(&self, _round: u32, _nap: bool) {}
    fn now(&self) -> u64 {
        0
    }
}

/// The nodes of what is erased are freed when the reader is gone, and not before.
fn erase_and_free(waits: bool) {
    loom::model(move || {
        let (tree, boxes) = (Arc::new(XArray::new()), Boxes::default());
        let engine = Arc::new(Engine::new(u64::MAX));
        let slot = Arc::new(ReaderSlot::new());
        with(&tree, &boxes, |t| {
            store(t, 0, 0, 1);
            store(t, 5, 0, 2);
        });
        let reader = {
            let (tree, engine) = (tree.clone(), engine.clone());
            let env = Env {
                slot: slot.clone(),
                reads: true,
            };
            thread::spawn(move || {
                let token = engine.read_lock(&env);
                let reader = Reader::new(&tree);
                assert!([0, 2].contains(&load(reader, 5)));
                assert_eq!(load(reader, 0), 1);
                // SAFETY: the token is from just now.
                unsafe { engine.read_unlock(&env, token) };
            })
        };
        with(&tree, &boxes, |t| {
            t.erase(5);
        });
        assert_eq!(boxes.retired.borrow().len(), 3);
        if waits {
            let env = Env { slot, reads: false };
            engine.cond_synchronize(&env, engine.get_state(), true);
        }
        boxes.free_retired();
        reader.join().unwrap();
    });
}

#[test]
fn a_node_is_freed_after_its_readers() {
    erase_and_free(true);
}

#[test]
#[should_panic]
fn planted_bug_freed_without_a_grace_period() {
    erase_and_free(false);
}

/// A node is seen with what it holds.
fn publish(relaxed: bool) {
    loom::model(move || {
        let (tree, boxes) = (Arc::new(XArray::new()), Boxes::default());
        let shared = tree.clone();
        let reader = thread::spawn(move || assert_eq!(load(Reader::new(&shared), 5) & !2, 0));
        let mut nodes = Nodes::new(&boxes);
        nodes.fill(2).unwrap();
        let root = nodes.take(None, node::BITS, 0);
        tree.set_head(Slot::Node(root));
        let leaf = nodes.take(Some(root), 0, 1);
        // SAFETY: nothing is freed before the model ends.
        let (above, below) = unsafe { (root.as_ref(), leaf.as_ref()) };
        below.set(1, Slot::Value(entry(2), 0));
        if relaxed {
            above.set_relaxed(1, Slot::Node(leaf));
        } else {
            above.set(1, Slot::Node(leaf));
        }
        reader.join().unwrap();
    });
}

#[test]
fn who_sees_a_node_sees_what_it_holds() {
    publish(false);
}

#[test]
#[should_panic]
fn planted_bug_node_published_relaxed() {
    publish(true);
}
