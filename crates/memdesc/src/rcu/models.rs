//! Model checks of RCU and of what is built on it, under loom, each with a planted bug that loom must find.

use std::vec::Vec;

use core::ptr::NonNull;

use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::thread;

use super::engine::{Engine, IN_SLOT, NEST_BITS, Readers, Slot};
use super::{Callback, Cookie, HeadStack, RcuHead};
use crate::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
use crate::sync::{Barriers, LocalLock};

/// The readers of a model: a thread's slot, or none.
#[derive(Clone)]
struct Env {
    slots: Arc<Vec<Slot>>,
    me: Option<usize>,
    /// Planted bug: the reader has no fence.
    weak: bool,
}

impl Env {
    fn new(slots: usize) -> Env {
        Env {
            slots: Arc::new((0..slots).map(|_| Slot::new()).collect()),
            me: None,
            weak: false,
        }
    }

    fn of(&self, me: usize) -> Env {
        Env {
            me: Some(me),
            ..self.clone()
        }
    }
}

// SAFETY: each thread of a model has a slot of its own.
unsafe impl Readers for Env {
    fn slot(&self) -> Option<&Slot> {
        self.me.map(|me| &self.slots[me])
    }
    fn for_each(&self, visit: &mut dyn FnMut(&Slot)) {
        self.slots.iter().for_each(visit);
    }
    fn light(&self) {
        if !self.weak {
            fence(Ordering::SeqCst);
        }
    }
    fn heavy(&self) {
        fence(Ordering::SeqCst);
    }
    fn relax(&self, _round: u32, _nap: bool) {}
    fn now(&self) -> u64 {
        0
    }
}

impl Barriers for Env {
    fn light(&self) {
        fence(Ordering::SeqCst);
    }
    fn heavy(&self) {
        fence(Ordering::SeqCst);
    }
    fn relax(&self, _round: u32) {}
}

/// Something that readers find as long as it is linked. Who frees it writes, which loom lets nobody read at the same time.
struct Thing {
    linked: AtomicU32,
    contents: UnsafeCell<u32>,
}

// SAFETY: read while linked and in a read section, written after a grace period, which the models check.
unsafe impl Sync for Thing {}
// SAFETY: the same.
unsafe impl Send for Thing {}

impl Thing {
    fn new() -> Arc<Thing> {
        Arc::new(Thing {
            linked: AtomicU32::new(1),
            contents: UnsafeCell::new(7),
        })
    }

    fn look(&self) {
        if self.linked.load(Ordering::Acquire) == 1 {
            // SAFETY: loom panics if the thing is being freed.
            self.contents.with(|p| assert_eq!(unsafe { *p }, 7));
        }
    }

    fn unlink(&self) {
        self.linked.store(0, Ordering::Relaxed);
    }

    fn free(&self) {
        // SAFETY: loom panics if anyone reads.
        self.contents.with_mut(|p| unsafe { *p = 0x6b });
    }
}

fn read(engine: &Engine, env: &Env, thing: &Thing, relaxed: Relaxed) {
    let token = if relaxed == Relaxed::Lock {
        // Planted bug: `read_lock` with a store that does not release the section before.
        let number = engine.started.load(Ordering::Relaxed) << NEST_BITS | 1;
        env.slot().unwrap().ctr.store(number, Ordering::Relaxed);
        Readers::light(env);
        IN_SLOT
    } else {
        engine.read_lock(env)
    };
    thing.look();
    if relaxed == Relaxed::Unlock {
        // Planted bug: what was read is not released.
        env.slot().unwrap().ctr.store(0, Ordering::Relaxed);
    } else {
        // SAFETY: the token is from just now.
        unsafe { engine.read_unlock(env, token) };
    }
}

fn wait(engine: &Engine, env: &Env, cookie: Cookie) {
    engine.cond_synchronize(env, cookie, true);
}

/// Planted bugs: a store of the reader that releases nothing.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
enum Relaxed {
    #[default]
    No,
    Lock,
    Unlock,
}

#[derive(Clone, Copy, Default)]
struct Bugs {
    weak: bool,
    relaxed: Relaxed,
    /// The grace period that runs already is taken for one that began after.
    early: bool,
}

fn grace_period(readers: usize, sections: usize, anonymous: bool, bugs: Bugs) {
    loom::model(move || {
        let engine = Arc::new(Engine::new(u64::MAX));
        let mut env = Env::new(if anonymous { 1 } else { readers });
        env.weak = bugs.weak;
        let thing = Thing::new();
        let handles: Vec<_> = (0..readers)
            .map(|i| {
                let (engine, thing) = (engine.clone(), thing.clone());
                let env = if anonymous { env.clone() } else { env.of(i) };
                thread::spawn(move || {
                    for _ in 0..sections {
                        read(&engine, &env, &thing, bugs.relaxed);
                    }
                })
            })
            .collect();
        if bugs.early {
            // One that began before the unlinking, and is not over.
            engine.need(Cookie(2));
            engine.advance(&env);
        }
        thing.unlink();
        let mut cookie = engine.get_state();
        if bugs.early {
            cookie = Cookie(cookie.0 - 1);
        }
        wait(&engine, &env, cookie);
        thing.free();
        handles.into_iter().for_each(|h| h.join().unwrap());
    });
}

#[test]
fn nothing_is_freed_while_a_reader_looks() {
    grace_period(1, 2, false, Bugs::default());
}

#[test]
fn nothing_is_freed_while_one_of_two_readers_looks() {
    grace_period(2, 1, false, Bugs::default());
}

#[test]
fn nothing_is_freed_while_an_anonymous_reader_looks() {
    grace_period(1, 1, true, Bugs::default());
}

#[test]
#[should_panic]
fn planted_bug_reader_without_fence() {
    let weak = true;
    let bugs = Bugs {
        weak,
        ..Bugs::default()
    };
    grace_period(1, 2, false, bugs);
}

#[test]
#[should_panic]
fn planted_bug_unlock_relaxed() {
    let relaxed = Relaxed::Unlock;
    let bugs = Bugs {
        relaxed,
        ..Bugs::default()
    };
    grace_period(1, 1, false, bugs);
}

#[test]
#[should_panic]
fn planted_bug_lock_relaxed() {
    let relaxed = Relaxed::Lock;
    let bugs = Bugs {
        relaxed,
        ..Bugs::default()
    };
    grace_period(1, 2, false, bugs);
}

#[test]
#[should_panic]
fn planted_bug_cookie_of_the_running_grace_period() {
    let early = true;
    let bugs = Bugs {
        early,
        ..Bugs::default()
    };
    grace_period(1, 1, false, bugs);
}

/// A head whose callback frees a thing.
#[repr(C)]
struct Headed {
    head: RcuHead,
    thing: Arc<Thing>,
    called: Arc<AtomicU32>,
}

unsafe fn free_headed(head: NonNull<RcuHead>) {
    // SAFETY: it is the first field of a leaked box.
    let headed = unsafe { std::boxed::Box::from_raw(head.as_ptr().cast::<Headed>()) };
    headed.thing.free();
    headed.called.fetch_add(1, Ordering::Relaxed);
}

fn callback(early: bool) {
    loom::model(move || {
        let engine = Arc::new(Engine::new(u64::MAX));
        let env = Env::new(2);
        let thing = Thing::new();
        let called = Arc::new(AtomicU32::new(0));
        let reader = {
            let (engine, env, thing) = (engine.clone(), env.of(1), thing.clone());
            thread::spawn(move || {
                read(&engine, &env, &thing, Relaxed::No);
                // Whoever comes along pushes on.
                engine.need(Cookie(2));
                engine.advance(&env);
            })
        };
        let env = env.of(0);
        thing.unlink();
        let headed = std::boxed::Box::new(Headed {
            head: RcuHead::new(),
            thing: thing.clone(),
            called: called.clone(),
        });
        let head = NonNull::from(std::boxed::Box::leak(headed)).cast();
        // SAFETY: the box is the engine's until the callback has it.
        unsafe { engine.call(&env, head, free_headed as Callback) };
        if early {
            // Planted bug: the grace period that is beginning may have collected already.
            engine.barrier_until(&env, engine.get_state());
        } else {
            engine.barrier(&env);
        }
        assert_eq!(
            called.load(Ordering::Relaxed),
            1,
            "the barrier came back early"
        );
        reader.join().unwrap();
    });
}

#[test]
fn a_callback_is_called_once_after_the_readers() {
    callback(false);
}

#[test]
#[should_panic]
fn planted_bug_barrier_of_the_beginning_grace_period() {
    callback(true);
}

/// Deferred frees: pushed by anyone without a lock, taken as a whole.
fn deferred(relaxed: bool) {
    loom::model(move || {
        let stack = Arc::new(HeadStack::new());
        let freed = Arc::new(AtomicU32::new(0));
        let things: Vec<_> = (0..2).map(|_| Thing::new()).collect();
        let handles: Vec<_> = things
            .iter()
            .map(|thing| {
                let (stack, thing, freed) = (stack.clone(), thing.clone(), freed.clone());
                thread::spawn(move || {
                    // The owner's last access: who takes it from the stack must see it as past.
                    // SAFETY: loom panics if somebody else has it.
                    thing.contents.with_mut(|p| unsafe { *p = 8 });
                    let headed = std::boxed::Box::new(Headed {
                        head: RcuHead::new(),
                        thing,
                        called: freed,
                    });
                    let head = NonNull::from(std::boxed::Box::leak(headed)).cast::<RcuHead>();
                    // SAFETY: the box is the stack's.
                    unsafe { stack.push_head(head) };
                })
            })
            .collect();
        let take = || {
            let mut at = if relaxed {
                stack.take_relaxed()
            } else {
                stack.take()
            };
            while let Some(head) = NonNull::new(at) {
                // SAFETY: taken heads are ours.
                unsafe {
                    at = head.as_ref().next.load(Ordering::Relaxed);
                    free_headed(head);
                }
            }
        };
        take();
        handles.into_iter().for_each(|h| h.join().unwrap());
        take();
        assert_eq!(freed.load(Ordering::Relaxed), 2);
    });
}

#[test]
fn deferred_frees_are_all_taken_whole() {
    deferred(false);
}

#[test]
#[should_panic]
fn planted_bug_deferred_free_relaxed() {
    deferred(true);
}

/// A block of pointers: its CPU records under the local lock, a drain on another CPU takes it, waits, and frees.
fn hand_over(early: bool) {
    struct Block {
        lock: LocalLock,
        record: UnsafeCell<Option<Cookie>>,
    }
    // SAFETY: reached only under the lock, which the model checks.
    unsafe impl Sync for Block {}
    // SAFETY: the same.
    unsafe impl Send for Block {}
    loom::model(move || {
        let engine = Arc::new(Engine::new(u64::MAX));
        let env = Env::new(1);
        let thing = Thing::new();
        let block = Arc::new(Block {
            lock: LocalLock::new(),
            record: UnsafeCell::new(None),
        });
        let reader = {
            let (engine, env, thing) = (engine.clone(), env.of(0), thing.clone());
            thread::spawn(move || read(&engine, &env, &thing, Relaxed::No))
        };
        let drain = {
            let (engine, env, thing, block) =
                (engine.clone(), env.clone(), thing.clone(), block.clone());
            thread::spawn(move || {
                let taken = {
                    let _guard = block.lock.enter_remote(&env);
                    // SAFETY: the lock is held.
                    block.record.with_mut(|p| unsafe { (*p).take() })
                };
                if let Some(cookie) = taken {
                    wait(&engine, &env, cookie);
                    thing.free();
                }
            })
        };
        // Planted bug: the grace period is asked for before the thing is unlinked.
        let before = engine.get_state();
        if early {
            wait(&engine, &env, before);
        }
        thing.unlink();
        if let Some(_guard) = block.lock.try_enter(&env) {
            let cookie = if early { before } else { engine.get_state() };
            // SAFETY: the lock is held.
            block.record.with_mut(|p| unsafe { *p = Some(cookie) });
        }
        reader.join().unwrap();
        drain.join().unwrap();
    });
}

#[test]
fn a_block_is_handed_over_with_its_grace_period() {
    hand_over(false);
}

#[test]
#[should_panic]
fn planted_bug_cookie_before_the_unlinking() {
    hand_over(true);
}

/// `folio_get` against free and reuse: the page's folio is freed, and its descriptor, which is type-stable, serves another page.
fn try_get(recheck: bool, released: bool) {
    struct Desc {
        refcount: AtomicU32,
        /// Which page it describes; written while nobody can have a reference.
        page: UnsafeCell<u32>,
    }
    // SAFETY: read by those with a reference, written by the owner before there are any, which the model checks.
    unsafe impl Sync for Desc {}
    // SAFETY: the same.
    unsafe impl Send for Desc {}
    loom::model(move || {
        // Words of pages 0 and 1: 1 leads to the descriptor.
        let words = Arc::new([AtomicU64::new(1), AtomicU64::new(0)]);
        let desc = Arc::new(Desc {
            refcount: AtomicU32::new(1),
            page: UnsafeCell::new(0),
        });
        let freed = Arc::new(AtomicU32::new(0));
        let put = |desc: &Desc| desc.refcount.fetch_sub(1, Ordering::AcqRel) == 1;
        let reader = {
            let (words, desc, freed) = (words.clone(), desc.clone(), freed.clone());
            thread::spawn(move || {
                if words[0].load(Ordering::Acquire) == 0 {
                    return;
                }
                let mut count = desc.refcount.load(Ordering::Relaxed);
                loop {
                    if count == 0 {
                        return;
                    }
                    match desc.refcount.compare_exchange(
                        count,
                        count + 1,
                        Ordering::Acquire,
                        Ordering::Relaxed,
                    ) {
                        Ok(_) => break,
                        Err(now) => count = now,
                    }
                }
                if !recheck || words[0].load(Ordering::Acquire) == 1 {
                    // SAFETY: loom panics if somebody writes it now.
                    let page = desc.page.with(|p| unsafe { *p });
                    assert_eq!(page, 0, "a reference to another page's folio");
                }
                if put(&desc) {
                    freed.fetch_add(1, Ordering::Relaxed);
                }
            })
        };
        // The owner lets go. If he was the last, the descriptor serves page 1 from now on.
        if put(&desc) {
            words[0].store(0, Ordering::Release);
            freed.fetch_add(1, Ordering::Relaxed);
            // SAFETY: the count is zero, so there is no reference.
            desc.page.with_mut(|p| unsafe { *p = 1 });
            let order = if released {
                Ordering::Release
            } else {
                Ordering::Relaxed
            };
            desc.refcount.store(1, order);
            words[1].store(1, Ordering::Release);
        }
        reader.join().unwrap();
        assert_eq!(freed.load(Ordering::Relaxed), 1, "freed by exactly one");
    });
}

#[test]
fn a_reference_is_to_the_page_that_was_asked_for() {
    try_get(true, true);
}

#[test]
#[should_panic]
fn planted_bug_no_second_look() {
    try_get(false, true);
}

#[test]
#[should_panic]
fn planted_bug_new_owner_not_released() {
    try_get(false, false);
}
