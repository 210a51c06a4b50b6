//! Model checks of reserves under loom: what is given back is there before it may be charged again; who waits is woken; what is taken apart is charged by
//! nobody.

use loom::sync::Arc;
use loom::thread;

use super::wait::Waiters;
use crate::memcg::counter::{Counter, Left, Refused};
use crate::sync::PtrStack;
use crate::sync::atomic::{AtomicU64, Ordering, fence};

/// A reserve of one block and of one slab with one object: whoever has charged either has to find it.
struct Store {
    counter: Counter,
    /// Blocks that came back.
    returned: PtrStack<u64>,
    /// The slab's free bit; its list lock orders it at least as much as it is here.
    bit: AtomicU64,
    waiters: Waiters,
    /// Something that both write between their steps: loom looks at both orders of those, and not of a load that fails.
    between: AtomicU64,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Order {
    /// First the memory, then the charge.
    AsItIs,
    /// Planted bug: the charge first.
    ChargeFirst,
}

fn store() -> Arc<Store> {
    let counter = Counter::new();
    counter.init(1);
    Arc::new(Store {
        counter,
        returned: PtrStack::new(),
        bit: AtomicU64::new(0),
        waiters: Waiters::new(),
        between: AtomicU64::new(0),
    })
}

impl Store {
    fn uncharge(&self) {
        assert_eq!(self.counter.uncharge(1), Ok(Left::Alive));
        self.between.fetch_add(1, Ordering::Relaxed);
        self.waiters.wake(|_| ());
    }

    fn give_block(&self, block: usize, order: Order) {
        if order == Order::ChargeFirst {
            self.uncharge();
        }
        self.returned
            .push(core::ptr::without_provenance_mut(block), |_| ());
        if order == Order::AsItIs {
            self.uncharge();
        }
    }

    fn give_object(&self, order: Order) {
        if order == Order::ChargeFirst {
            self.uncharge();
        }
        self.bit.store(1, Ordering::Release);
        if order == Order::AsItIs {
            self.uncharge();
        }
    }

    /// Charges and takes, if there is room; `find` is what a taker looks at. There is one: the others wait for the lock.
    fn take(&self, find: impl FnOnce(&Store) -> bool) {
        self.between.fetch_add(1, Ordering::Relaxed);
        let missed = self.counter.try_charge(1, true).is_ok() && !find(self);
        assert!(!missed, "charged, and nothing there");
    }
}

fn block_comes_back(order: Order) {
    let store = store();
    store.counter.try_charge(1, true).unwrap();
    let other = store.clone();
    let freeing = thread::spawn(move || other.give_block(8, order));
    store.take(|s| !s.returned.take().is_null());
    freeing.join().unwrap();
}

fn object_comes_back(order: Order) {
    let store = store();
    store.counter.try_charge(1, true).unwrap();
    let other = store.clone();
    let freeing = thread::spawn(move || other.give_object(order));
    store.take(|s| s.bit.load(Ordering::Acquire) == 1);
    freeing.join().unwrap();
}

#[test]
fn what_is_given_back_is_there_before_it_is_charged_again() {
    loom::model(|| block_comes_back(Order::AsItIs));
    loom::model(|| object_comes_back(Order::AsItIs));
}

#[test]
#[should_panic(expected = "nothing there")]
fn a_block_uncharged_first_is_missed() {
    loom::model(|| block_comes_back(Order::ChargeFirst));
}

#[test]
#[should_panic(expected = "nothing there")]
fn an_object_uncharged_first_is_missed() {
    loom::model(|| object_comes_back(Order::ChargeFirst));
}

/// One waits for the limit, one uncharges. `tries_again`: after it counted itself, as it has to.
fn a_waiter(tries_again: bool) {
    let store = store();
    store.counter.try_charge(1, true).unwrap();
    // A futex: who lies down sees a turn that is over, or is seen by who turned it.
    let asleep = Arc::new(AtomicU64::new(0));
    let (other, sleeper) = (store.clone(), asleep.clone());
    let freeing = thread::spawn(move || {
        assert_eq!(other.counter.uncharge(1), Ok(Left::Alive));
        other.waiters.wake(|_| {
            fence(Ordering::SeqCst);
            sleeper.swap(0, Ordering::Relaxed);
        });
    });
    let again = || {
        let charged = tries_again && store.counter.try_charge(1, true).is_ok();
        charged.then_some(())
    };
    store.waiters.wait_once(again, |turn, value| {
        asleep.store(1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        if turn.load(Ordering::Relaxed) != value {
            asleep.store(0, Ordering::Relaxed);
        }
        // He does not get up before.
        freeing.join().unwrap();
        let lost = asleep.load(Ordering::Relaxed) == 1;
        assert!(!lost, "asleep, and nobody will wake him");
    });
}

#[test]
fn who_waits_is_woken() {
    loom::model(|| a_waiter(true));
}

#[test]
#[should_panic(expected = "nobody will wake him")]
fn who_does_not_try_again_sleeps_on() {
    loom::model(|| a_waiter(false));
}

/// A reserve is taken apart while somebody charges it: own counter, then the one for all.
fn taken_apart(looks_at_usage: bool) {
    let rungs: Arc<[Counter; 2]> = Arc::new(core::array::from_fn(|_| {
        let counter = Counter::new();
        counter.init(1);
        counter
    }));
    let had = Arc::new(AtomicU64::new(0));
    let (theirs, has) = (rungs.clone(), had.clone());
    let charging = thread::spawn(move || {
        match theirs[0].try_charge(1, true) {
            Ok(()) => {}
            Err(Refused::Offline) => return,
            Err(why) => panic!("{why:?}"),
        }
        theirs[1].try_charge(1, false).unwrap();
        has.store(1, Ordering::Relaxed);
    });
    for rung in rungs.iter() {
        rung.set_online(false);
    }
    let charged = looks_at_usage && rungs.iter().any(|r| r.usage() > 0);
    if !charged {
        // Its store is given back: nobody may have charged it, nor do so now.
        assert_eq!(rungs[0].try_charge(1, true), Err(Refused::Offline));
        charging.join().unwrap();
        assert_eq!(had.load(Ordering::Relaxed), 0, "charged, and taken apart");
    } else {
        charging.join().unwrap();
    }
}

#[test]
fn nobody_charges_what_is_taken_apart() {
    loom::model(|| taken_apart(true));
}

#[test]
#[should_panic(expected = "taken apart")]
fn who_does_not_look_takes_it_from_under_somebody() {
    loom::model(|| taken_apart(false));
}
