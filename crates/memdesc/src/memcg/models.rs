//! Model checks of charges under loom: two who want the last of a limit, a limit that falls meanwhile, and a group that goes while it is charged.

use loom::sync::Arc;
use loom::thread;

use super::counter::{Counter, Left, Level, Refused, UNLIMITED, charge, uncharge};
use crate::sync::atomic::{AtomicU32, Ordering};

/// A group, and how often it was let go of.
struct Group {
    counter: Counter,
    parent: Option<Arc<Group>>,
    released: AtomicU32,
}

impl Level for Group {
    fn counter(&self) -> &Counter {
        &self.counter
    }
    fn parent(&self) -> Option<&Group> {
        self.parent.as_deref()
    }
}

fn group(parent: Option<&Arc<Group>>, limit: u64) -> Arc<Group> {
    let counter = Counter::new();
    counter.init(limit);
    if let Some(parent) = parent {
        assert!(parent.counter.pin());
    }
    Arc::new(Group {
        counter,
        parent: parent.cloned(),
        released: AtomicU32::new(0),
    })
}

fn release(group: &Group) {
    assert!(!group.counter.is_alive(), "let go of while somebody has it");
    assert_eq!(group.released.fetch_add(1, Ordering::Relaxed), 0, "twice");
    if let Some(parent) = &group.parent
        && parent.counter.unpin() == Left::Last
    {
        release(parent);
    }
}

/// Two children of a group with room for one charge; `how` charges a level.
fn two_at_a_limit() {
    let top = group(None, 1);
    let threads: [_; 2] = core::array::from_fn(|_| {
        let child = group(Some(&top), UNLIMITED);
        let top = top.clone();
        thread::spawn(move || {
            let got = charge(&*child, 1, &release).is_ok();
            assert!(top.counter.usage() <= 1, "above the limit");
            if got {
                uncharge(&*child, 1, &release).unwrap();
            }
            assert_eq!(child.counter.usage(), 0);
            got
        })
    });
    let got = threads.map(|t| t.join().unwrap());
    // Nobody can be in the way of both.
    assert!(got.contains(&true));
    assert_eq!((top.counter.usage(), top.counter.watermark()), (0, 1));
}

#[test]
fn no_level_is_above_its_limit() {
    loom::model(two_at_a_limit);
}

#[test]
#[should_panic(expected = "above the limit")]
fn comparing_and_then_adding_overshoots() {
    loom::model(|| {
        let top = group(None, 1);
        let other = top.clone();
        let other = thread::spawn(move || other.counter.try_charge_late(1).is_ok());
        let _ = top.counter.try_charge_late(1);
        other.join().unwrap();
        assert!(top.counter.usage() <= 1, "above the limit");
    });
}

fn falling(set: fn(&Counter, u64) -> Result<(), u64>) {
    let top = group(None, 2);
    let other = top.clone();
    let other = thread::spawn(move || charge(&*other, 2, &release).is_ok());
    if set(&top.counter, 1).is_ok() {
        // Perhaps one is still to be undone; what was granted is not.
        let got = other.join().unwrap();
        assert!(!got && top.counter.usage() == 0, "above the new limit");
    } else {
        other.join().unwrap();
    }
}

#[test]
fn a_limit_holds_from_when_it_is_set() {
    loom::model(|| falling(Counter::set_limit));
}

#[test]
#[should_panic(expected = "above the new limit")]
fn a_limit_set_by_looking_does_not() {
    loom::model(|| falling(Counter::set_limit_looking));
}

#[test]
fn a_group_is_let_go_of_once() {
    loom::model(|| {
        let top = group(None, UNLIMITED);
        let child = group(Some(&top), UNLIMITED);
        let other = child.clone();
        let other = thread::spawn(move || match charge(&*other, 3, &release) {
            Ok(()) => uncharge(&*other, 3, &release).unwrap(),
            Err((why, _)) => assert_eq!(why, Refused::Offline),
        });
        // Both handles go, the parent's first: its child keeps it.
        if top.counter.offline() == Left::Last {
            release(&top);
        }
        if child.counter.offline() == Left::Last {
            release(&child);
        }
        other.join().unwrap();
        for group in [&child, &top] {
            assert_eq!(group.released.load(Ordering::Relaxed), 1, "for ever");
            assert!(!group.counter.is_alive());
        }
    });
}
