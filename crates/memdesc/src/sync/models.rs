//! Model checks: every lock-free protocol of the crate, under loom, and planted bugs that loom must find.
//!
//! `cargo xtask loom` runs them; LOOM_MAX_PREEMPTIONS bounds the search (3 in CI, unbounded with `--full`).

use std::vec::Vec;

use loom::sync::Arc;
use loom::thread;

use super::atomic::{AtomicU32, Ordering, fence};
use super::{Barriers, LocalLock, RwLock, RwWaiter, SpinLock, UnsafeCell, Waiter};
use crate::address::{Pfn, PhysAddr};
use crate::memmap::heads::climb;
use crate::memmap::word::{AtomicWord, DescClass, PageType, Word};

/// Full fences on both sides: the textbook form of the asymmetric ones.
pub(crate) struct Fences;

impl Barriers for Fences {
    fn light(&self) {
        fence(Ordering::SeqCst);
    }
    fn heavy(&self) {
        fence(Ordering::SeqCst);
    }
    fn relax(&self, _round: u32) {}
}

/// Planted bug: no fence at all.
struct NoFences;

impl Barriers for NoFences {
    fn light(&self) {}
    fn heavy(&self) {}
    fn relax(&self, _round: u32) {}
}

struct Guarded {
    lock: LocalLock,
    value: UnsafeCell<u32>,
}

// SAFETY: the models reach `value` only under `lock`; that this is enough is what they check.
unsafe impl Sync for Guarded {}
// SAFETY: the same.
unsafe impl Send for Guarded {}

fn bump(value: &UnsafeCell<u32>) {
    // SAFETY: the caller holds the lock; loom's cell panics if that does not exclude everyone else.
    unsafe { *value.get_mut_ptr() += 1 };
}

fn owner_and_remotes(barriers: impl Barriers + Send + Sync + 'static, remotes: u32, rounds: u32) {
    let barriers = Arc::new(barriers);
    let shared = Arc::new(Guarded {
        lock: LocalLock::new(),
        value: UnsafeCell::new(0),
    });
    let handles: Vec<_> = (0..remotes)
        .map(|_| {
            let (shared, barriers) = (shared.clone(), barriers.clone());
            thread::spawn(move || {
                let _guard = shared.lock.enter_remote(&*barriers);
                bump(&shared.value);
            })
        })
        .collect();
    for _ in 0..rounds {
        let _guard = shared.lock.enter(&*barriers);
        bump(&shared.value);
    }
    for handle in handles {
        handle.join().unwrap();
    }
    let _guard = shared.lock.enter(&*barriers);
    // SAFETY: all others are gone.
    assert_eq!(unsafe { *shared.value.get_mut_ptr() }, rounds + remotes);
}

#[test]
fn local_lock_excludes_owner_and_remote() {
    loom::model(|| owner_and_remotes(Fences, 1, 2));
}

#[test]
fn local_lock_excludes_remotes_from_each_other() {
    loom::model(|| owner_and_remotes(Fences, 2, 0));
}

#[test]
#[should_panic]
fn planted_bug_local_lock_without_fences() {
    loom::model(|| owner_and_remotes(NoFences, 1, 2));
}

/// The fast try of a per-CPU list against a drain on another CPU: the owner tries, the remote waits.
fn fast_try_and_remote(barriers: impl Barriers + Send + Sync + 'static) {
    let barriers = Arc::new(barriers);
    let shared = Arc::new(Guarded {
        lock: LocalLock::new(),
        value: UnsafeCell::new(0),
    });
    let handle = {
        let (shared, barriers) = (shared.clone(), barriers.clone());
        thread::spawn(move || {
            let _guard = shared.lock.enter_remote(&*barriers);
            bump(&shared.value);
        })
    };
    let mut got = 0;
    for _ in 0..2 {
        if let Some(_guard) = shared.lock.try_enter(&*barriers) {
            // An interrupt that strikes here finds somebody inside.
            assert!(shared.lock.try_enter(&*barriers).is_none());
            bump(&shared.value);
            got += 1;
        }
    }
    handle.join().unwrap();
    let _guard = shared.lock.enter(&*barriers);
    // SAFETY: all others are gone.
    assert_eq!(unsafe { *shared.value.get_mut_ptr() }, got + 1);
}

#[test]
fn a_fast_try_excludes_a_drain() {
    loom::model(|| fast_try_and_remote(Fences));
}

#[test]
#[should_panic]
fn planted_bug_fast_try_without_fences() {
    loom::model(|| fast_try_and_remote(NoFences));
}

/// Waits by spinning, or by sleeping on a futex of loom's mutex and condition: a wake-up that is lost is a deadlock, which loom
/// reports.
#[derive(Clone)]
pub(crate) struct Waits {
    sleeps: bool,
    /// Planted bug: nobody is woken, or one instead of all.
    forgets: bool,
    // loom's own Arc cannot be dropped by a thread that unwinds from a deadlock.
    futex: std::sync::Arc<(loom::sync::Mutex<()>, loom::sync::Condvar)>,
}

impl Waits {
    pub(crate) fn new(sleeps: bool, forgets: bool) -> Waits {
        let futex = (loom::sync::Mutex::new(()), loom::sync::Condvar::new());
        let futex = std::sync::Arc::new(futex);
        Waits {
            sleeps,
            forgets,
            futex,
        }
    }
}

impl Waiter for Waits {
    fn sleeps(&self) -> bool {
        self.sleeps
    }
    fn relax(&self, _round: u32) {}
    fn park(&self, word: &AtomicU32, value: u32) {
        let held = self.futex.0.lock().unwrap();
        if word.load(Ordering::Relaxed) == value {
            drop(self.futex.1.wait(held).unwrap());
        }
    }
    fn unpark(&self, _word: &AtomicU32) {
        if !self.forgets {
            let _held = self.futex.0.lock().unwrap();
            self.futex.1.notify_one();
        }
    }
}

impl RwWaiter for Waits {
    fn unpark_all(&self, _word: &AtomicU32) {
        let _held = self.futex.0.lock().unwrap();
        if self.forgets {
            self.futex.1.notify_one();
        } else {
            self.futex.1.notify_all();
        }
    }
}

fn lock_excludes(sleeps: bool, forgets: bool) {
    loom::model(move || {
        let waits = Waits::new(sleeps, forgets);
        let lock = Arc::new(SpinLock::new(0));
        let (other, trier) = (lock.clone(), lock.clone());
        let (w1, w2) = (waits.clone(), waits.clone());
        // Two who spin and one who does not are more than loom sees the end of.
        let handle = sleeps.then(|| thread::spawn(move || *other.lock(w1) += 1));
        let trying = thread::spawn(move || match trier.try_lock(w2) {
            Some(mut value) => {
                *value += 1;
                1
            }
            None => 0,
        });
        *lock.lock(waits.clone()) += 1;
        let locked = handle.map_or(0, |h| h.join().map(|()| 1).unwrap());
        let tried = trying.join().unwrap();
        assert_eq!(*lock.lock(waits), 1 + locked + tried);
    });
}

#[test]
fn spinning_lock_excludes() {
    lock_excludes(false, false);
}

#[test]
fn spinning_lock_excludes_who_spins() {
    loom::model(|| {
        let waits = Waits::new(false, false);
        let lock = Arc::new(SpinLock::new(0));
        let (other, w) = (lock.clone(), waits.clone());
        let handle = thread::spawn(move || *other.lock(w) += 1);
        *lock.lock(waits.clone()) += 1;
        handle.join().unwrap();
        assert_eq!(*lock.lock(waits), 2);
    });
}

#[test]
fn sleeping_lock_excludes() {
    lock_excludes(true, false);
}

#[test]
#[should_panic]
fn planted_bug_sleeper_not_woken() {
    lock_excludes(true, true);
}

/// What readers and writers share: the lock, and a value that loom watches.
struct ReadAndWritten {
    lock: RwLock,
    value: loom::cell::UnsafeCell<u32>,
}

// SAFETY: `value` is reached only under `lock`; that this is enough is what the models check.
unsafe impl Sync for ReadAndWritten {}
// SAFETY: the same.
unsafe impl Send for ReadAndWritten {}

impl ReadAndWritten {
    fn write(&self, waits: &Waits) {
        let _guard = self.lock.write(waits.clone());
        // SAFETY: the lock is held for writing; loom checks that this excludes all others.
        self.value.with_mut(|v| unsafe { *v += 1 });
    }

    fn read(&self, waits: &Waits) -> u32 {
        let _guard = self.lock.read(waits.clone());
        // SAFETY: the lock is held for reading; loom checks that this excludes who writes.
        self.value.with(|v| unsafe { *v })
    }
}

/// So many threads that write once and that read once, beside one that does as the last argument says.
fn readers_and_writers(forgets: bool, writers: usize, readers: usize, main_writes: bool) {
    loom::model(move || {
        let waits = Waits::new(true, forgets);
        let shared = std::sync::Arc::new(ReadAndWritten {
            lock: RwLock::new(),
            value: loom::cell::UnsafeCell::new(0),
        });
        let threads: Vec<_> = (0..writers + readers)
            .map(|nth| {
                let (shared, waits) = (shared.clone(), waits.clone());
                thread::spawn(move || {
                    if nth < writers {
                        shared.write(&waits);
                    } else {
                        assert!(shared.read(&waits) <= writers as u32 + 1);
                    }
                })
            })
            .collect();
        if main_writes {
            shared.write(&waits);
        } else {
            shared.read(&waits);
        }
        for thread in threads {
            thread.join().unwrap();
        }
        let written = writers as u32 + u32::from(main_writes);
        assert_eq!(shared.read(&waits), written);
    });
}

#[test]
fn writers_exclude_each_other() {
    readers_and_writers(false, 1, 0, true);
}

#[test]
fn a_writer_excludes_readers_and_all_are_woken() {
    readers_and_writers(false, 0, 2, true);
}

#[test]
fn a_writer_waits_for_readers_and_keeps_others_out() {
    readers_and_writers(false, 1, 1, false);
}

#[test]
fn a_reader_waits_for_two_writers() {
    readers_and_writers(false, 1, 1, true);
}

#[test]
#[should_panic]
fn planted_bug_one_of_the_readers_is_not_woken() {
    readers_and_writers(true, 0, 2, true);
}

/// A per-CPU list in small: the owner pushes and pops, a remote takes all; no page is lost or had twice.
#[test]
fn per_cpu_list_loses_nothing() {
    struct List {
        lock: LocalLock,
        pages: UnsafeCell<Vec<u32>>,
    }
    // SAFETY: reached only under the lock, which the model checks.
    unsafe impl Sync for List {}
    // SAFETY: the same.
    unsafe impl Send for List {}
    loom::model(|| {
        let list = Arc::new(List {
            lock: LocalLock::new(),
            pages: UnsafeCell::new(Vec::from([1, 2])),
        });
        let remote = list.clone();
        let handle = thread::spawn(move || {
            let _guard = remote.lock.enter_remote(&Fences);
            // SAFETY: the lock is held.
            core::mem::take(unsafe { &mut *remote.pages.get_mut_ptr() })
        });
        let popped = {
            let _guard = list.lock.enter(&Fences);
            // SAFETY: the lock is held.
            unsafe { &mut *list.pages.get_mut_ptr() }.pop()
        };
        {
            let _guard = list.lock.enter(&Fences);
            // SAFETY: the lock is held.
            unsafe { &mut *list.pages.get_mut_ptr() }.push(3);
        }
        let mut all = handle.join().unwrap();
        let _guard = list.lock.enter(&Fences);
        // SAFETY: the lock is held.
        all.extend(unsafe { &*list.pages.get_mut_ptr() });
        all.extend(popped);
        all.sort_unstable();
        assert_eq!(all, [1, 2, 3]);
    });
}

/// A descriptor in small: what a word leads to.
struct Desc(UnsafeCell<u32>);

// SAFETY: written before its word is published and read after, which the models check.
unsafe impl Sync for Desc {}
// SAFETY: the same.
unsafe impl Send for Desc {}

fn publish_and_read(publish: fn(&AtomicWord, Word)) {
    let word = Arc::new(AtomicWord::zero());
    let desc = Arc::new(Desc(UnsafeCell::new(0)));
    let (w, d) = (word.clone(), desc.clone());
    let handle = thread::spawn(move || {
        // SAFETY: nobody is led here yet.
        unsafe { *d.0.get_mut_ptr() = 7 };
        publish(
            &w,
            Word::described(PageType::Anon, 0, PhysAddr(64), DescClass::Anon),
        );
    });
    let seen = word.load();
    if seen.kind() == PageType::Anon {
        // SAFETY: the word leads here, so it is set up; loom checks that the write above happened before.
        assert_eq!(unsafe { *desc.0.get_mut_ptr() }, 7);
    } else {
        assert!(seen.is_tail());
    }
    handle.join().unwrap();
}

#[test]
fn who_sees_the_word_sees_the_descriptor() {
    loom::model(|| publish_and_read(|word, value| word.publish(value)));
}

#[test]
#[should_panic]
fn planted_bug_word_published_relaxed() {
    loom::model(|| publish_and_read(|word, value| word.publish_relaxed(value)));
}

/// Eight pages. Pages 0–3 are one block whose tails' words are zero, owned by a reader; beside it a block is split and merged
/// again. The reader's tails lead to its head at every moment.
#[test]
fn an_owner_finds_its_head_while_neighbours_split_and_merge() {
    loom::model(|| {
        let words: Arc<Vec<AtomicWord>> = Arc::new((0..8).map(|_| AtomicWord::zero()).collect());
        let word = |order| Word::described(PageType::Anon, order, PhysAddr(64), DescClass::Anon);
        words[0].publish(word(2));
        words[4].publish(word(2));
        let other = words.clone();
        let handle = thread::spawn(move || {
            // Split 4–7 in two, take one half, give it back, merge.
            other[6].publish(word(1));
            other[4].publish(word(1));
            other[6].publish(Word::ZERO);
            other[4].publish(word(2));
        });
        for page in [1, 3] {
            let own = words[page].load();
            assert!(own.is_tail());
            let found = climb(Pfn(page as u32), |p| words[p.0 as usize].load());
            assert_eq!(found.map(|f| f.head), Some(Pfn(0)));
        }
        handle.join().unwrap();
    });
}

/// A reference may be had only while there is one: try-get against the last put.
#[test]
fn try_get_never_revives() {
    loom::model(|| {
        let count = Arc::new(AtomicU32::new(1));
        let freed = Arc::new(AtomicU32::new(0));
        let (c, f) = (count.clone(), freed.clone());
        let handle = thread::spawn(move || {
            if c.fetch_sub(1, Ordering::AcqRel) == 1 {
                f.fetch_add(1, Ordering::Relaxed);
            }
        });
        let mut now = count.load(Ordering::Relaxed);
        let got = loop {
            if now == 0 {
                break false;
            }
            match count.compare_exchange(now, now + 1, Ordering::Acquire, Ordering::Relaxed) {
                Ok(_) => break true,
                Err(seen) => now = seen,
            }
        };
        if got && count.fetch_sub(1, Ordering::AcqRel) == 1 {
            freed.fetch_add(1, Ordering::Relaxed);
        }
        handle.join().unwrap();
        assert_eq!(freed.load(Ordering::Relaxed), 1);
    });
}
