//! Model checks of a folio's counts under loom: guesses against the last put, and against those who freeze.

use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::thread;

use super::counts::{Confirmed, Counts, Held, Put};
use crate::sync::atomic::{AtomicU32, Ordering};

/// A folio, the word that leads to it, and its contents: written by who frees or moves it, read by who has it.
struct Model {
    counts: Counts,
    word: AtomicU32,
    left: AtomicU32,
    contents: UnsafeCell<u32>,
    frees: AtomicU32,
}

// SAFETY: that `contents` is reached by one at a time is what the models check.
unsafe impl Sync for Model {}
// SAFETY: the same.
unsafe impl Send for Model {}

impl Model {
    fn new() -> Arc<Model> {
        let model = Model {
            counts: Counts::zero(),
            word: AtomicU32::new(1),
            left: AtomicU32::new(0),
            contents: UnsafeCell::new(7),
            frees: AtomicU32::new(0),
        };
        model.counts.init(Held::REF);
        Arc::new(model)
    }

    fn free(&self) {
        self.word.store(0, Ordering::Release);
        // SAFETY: loom checks.
        self.contents.with_mut(|c| unsafe { *c = 0 });
        self.frees.fetch_add(1, Ordering::Relaxed);
    }

    fn put(&self, what: Held) {
        if self
            .counts
            .put(what, || self.left.store(1, Ordering::Relaxed))
            == Put::Last
        {
            self.free();
        }
    }

    fn read(&self) {
        // SAFETY: loom checks.
        self.contents
            .with(|c| assert_eq!(unsafe { *c }, 7, "somebody else's"));
    }

    /// `folio_take`, and a look at what was had.
    fn take_and_put(&self, what: Held) {
        if self.word.load(Ordering::Acquire) != 1 || !self.counts.guess() {
            return;
        }
        if self.word.load(Ordering::Acquire) == 1 && self.counts.confirm(what) == Confirmed::Yes {
            self.read();
            self.put(what);
        } else if self.counts.retract() == Put::Last {
            assert_eq!(
                self.left.load(Ordering::Relaxed),
                1,
                "which pages are these?"
            );
            self.free();
        }
    }
}

fn freed_once(careless: bool) {
    let model = Model::new();
    let readers: [_; 2] = core::array::from_fn(|i| {
        let model = model.clone();
        thread::spawn(move || model.take_and_put(if i == 0 { Held::REF } else { Held::PIN }))
    });
    if careless {
        if model.counts.put_carelessly(Held::REF) == Put::Last {
            model.free();
        }
    } else {
        model.put(Held::REF);
    }
    for reader in readers {
        reader.join().unwrap();
    }
    assert_eq!(model.frees.load(Ordering::Relaxed), 1);
    assert_eq!(model.counts.held(), Held::default());
}

#[test]
fn whoever_is_last_frees_and_knows_which_pages() {
    loom::model(|| freed_once(false));
}

#[test]
#[should_panic]
fn a_last_owner_who_ignores_guesses_is_caught() {
    loom::model(|| freed_once(true));
}

#[test]
fn who_freezes_is_alone() {
    loom::model(|| {
        let model = Model::new();
        let reader = {
            let model = model.clone();
            thread::spawn(move || model.take_and_put(Held::REF))
        };
        if model.counts.freeze(Held::REF) {
            // Moved: contents change hands while nobody can look.
            // SAFETY: loom checks.
            model.contents.with_mut(|c| unsafe { *c = 8 });
            model.contents.with_mut(|c| unsafe { *c = 7 });
            model.counts.unfreeze(Held::REF);
        }
        reader.join().unwrap();
        assert_eq!(model.counts.held(), Held::REF);
        model.put(Held::REF);
        assert_eq!(model.frees.load(Ordering::Relaxed), 1);
    });
}

#[test]
#[should_panic]
fn who_only_looks_before_he_moves_is_caught() {
    loom::model(|| {
        let model = Model::new();
        let reader = {
            let model = model.clone();
            thread::spawn(move || model.take_and_put(Held::REF))
        };
        // Planted bug: looks at the count instead of freezing it.
        if model.counts.held() == Held::REF {
            // SAFETY: loom checks, and finds it.
            model.contents.with_mut(|c| unsafe { *c = 8 });
            model.contents.with_mut(|c| unsafe { *c = 7 });
        }
        reader.join().unwrap();
    });
}
