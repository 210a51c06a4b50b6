//! The crates, and no deferring at all, with the process's allocator.

use std::sync::atomic::{AtomicPtr, Ordering};
use std::time::{Duration, Instant};

use super::{FREED, OBJECT, Scheme, Tally};

/// An object; with `COUNTS` its end is told.
struct Object<const COUNTS: bool>([u64; OBJECT / 8]);

impl<const COUNTS: bool> Object<COUNTS> {
    fn new(value: u64) -> Object<COUNTS> {
        let mut words = [0; OBJECT / 8];
        words[0] = value;
        Object(words)
    }
}

impl<const COUNTS: bool> Drop for Object<COUNTS> {
    fn drop(&mut self) {
        if COUNTS {
            FREED.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// A thread's pointer, on a cache line of its own.
#[repr(align(128))]
struct Padded<T>(T);

type Slots<const COUNTS: bool> = Vec<Padded<AtomicPtr<Object<COUNTS>>>>;

fn slots<const COUNTS: bool>(threads: usize) -> Slots<COUNTS> {
    (0..threads)
        .map(|_| {
            Padded(AtomicPtr::new(Box::into_raw(Box::new(
                Object::<COUNTS>::new(1),
            ))))
        })
        .collect()
}

fn free_slots<const COUNTS: bool>(slots: &mut Slots<COUNTS>) {
    for slot in slots {
        // SAFETY: from `Box::into_raw`, and nobody else has it any more.
        drop(unsafe { Box::from_raw(*slot.0.get_mut()) });
    }
}

/// Timed and counted pointers of a scheme.
struct Both {
    timed: Slots<false>,
    counted: Slots<true>,
}

impl Both {
    fn new(threads: usize) -> Both {
        Both {
            timed: slots(threads),
            counted: slots(threads),
        }
    }
}

impl Both {
    /// Gives up `n` objects of a thread by `timed`, or with a tally by `counted`, which is the same for the other kind of object.
    #[inline(always)]
    fn run(
        &self,
        thread: usize,
        n: u64,
        tally: Option<&Tally>,
        timed: impl Fn(&AtomicPtr<Object<false>>, u64),
        counted: impl Fn(&AtomicPtr<Object<true>>, u64),
    ) {
        match tally {
            None => turns(n, None, |i| timed(&self.timed[thread].0, i)),
            Some(_) => turns(n, tally, |i| counted(&self.counted[thread].0, i)),
        }
    }
}

impl Drop for Both {
    fn drop(&mut self) {
        free_slots(&mut self.timed);
        free_slots(&mut self.counted);
    }
}

/// Runs the turn `n` times; looks at the backlog now and then.
#[inline(always)]
fn turns(n: u64, tally: Option<&Tally>, mut turn: impl FnMut(u64)) {
    match tally {
        None => (0..n).for_each(turn),
        Some(tally) => {
            for i in 0..n {
                tally.retired();
                turn(i);
                if i % 16 == 0 {
                    tally.sample(|_| FREED.load(Ordering::Relaxed));
                }
            }
        }
    }
}

/// Calls `push` until all is free, or a second is over.
fn until_free(tally: Option<&Tally>, mut push: impl FnMut()) {
    let start = Instant::now();
    loop {
        push();
        let Some(tally) = tally else { return };
        tally.sample(|_| FREED.load(Ordering::Relaxed));
        let all = tally.freed.load(Ordering::Relaxed) >= tally.retired.load(Ordering::Relaxed);
        if all || start.elapsed() > Duration::from_secs(1) {
            return;
        }
    }
}

/// Frees at once: right only because nobody reads.
pub(super) struct Floor(Both);

impl Floor {
    pub(super) fn new(threads: usize) -> Floor {
        Floor(Both::new(threads))
    }
}

impl Scheme for Floor {
    fn name(&self) -> &'static str {
        "floor"
    }
    fn floor(&self) -> &'static str {
        "floor"
    }
    fn run(&self, thread: usize, n: u64, tally: Option<&Tally>) {
        fn turn<const COUNTS: bool>(slot: &AtomicPtr<Object<COUNTS>>, i: u64) {
            let new = Box::into_raw(Box::new(Object::new(i)));
            let old = slot.swap(new, Ordering::AcqRel);
            // SAFETY: from `Box::into_raw`; there are no readers in this scheme.
            drop(unsafe { Box::from_raw(old) });
        }
        self.0.run(thread, n, tally, turn, turn);
    }
    fn read(&self, thread: usize, n: u64) {
        let slot = &self.0.timed[thread].0;
        for _ in 0..n {
            // SAFETY: nobody frees it while this thread reads.
            std::hint::black_box(unsafe { (*slot.load(Ordering::Acquire)).0[0] });
        }
    }
    fn flush(&self, tally: Option<&Tally>) {
        until_free(tally, || {});
    }
}

/// crossbeam-epoch: a pin for each object.
pub(super) struct Epoch(Both);

impl Epoch {
    pub(super) fn new(threads: usize) -> Epoch {
        Epoch(Both::new(threads))
    }
}

impl Scheme for Epoch {
    fn name(&self) -> &'static str {
        "crossbeam-epoch"
    }
    fn floor(&self) -> &'static str {
        "floor"
    }
    fn run(&self, thread: usize, n: u64, tally: Option<&Tally>) {
        fn turn<const COUNTS: bool>(slot: &AtomicPtr<Object<COUNTS>>, i: u64) {
            let new = Box::into_raw(Box::new(Object::new(i)));
            let guard = crossbeam_epoch::pin();
            let old = slot.swap(new, Ordering::AcqRel);
            // SAFETY: unlinked, and from `Box::into_raw`.
            unsafe {
                guard.defer_destroy(crossbeam_epoch::Shared::from(old.cast_const()));
            }
        }
        self.0.run(thread, n, tally, turn, turn);
    }
    fn read(&self, thread: usize, n: u64) {
        let slot = &self.0.timed[thread].0;
        for _ in 0..n {
            let _guard = crossbeam_epoch::pin();
            // SAFETY: pinned.
            std::hint::black_box(unsafe { (*slot.load(Ordering::Acquire)).0[0] });
        }
    }
    fn flush(&self, tally: Option<&Tally>) {
        until_free(tally, || crossbeam_epoch::pin().flush());
    }
}

/// seize.
pub(super) struct Seize {
    collector: seize::Collector,
    slots: Both,
}

impl Seize {
    pub(super) fn new(threads: usize) -> Seize {
        Seize {
            collector: seize::Collector::new(),
            slots: Both::new(threads),
        }
    }
}

impl Scheme for Seize {
    fn name(&self) -> &'static str {
        "seize"
    }
    fn floor(&self) -> &'static str {
        "floor"
    }
    fn run(&self, thread: usize, n: u64, tally: Option<&Tally>) {
        fn turn<const COUNTS: bool>(
            collector: &seize::Collector,
            slot: &AtomicPtr<Object<COUNTS>>,
            i: u64,
        ) {
            let new = Box::into_raw(Box::new(Object::new(i)));
            let old = slot.swap(new, Ordering::AcqRel);
            // SAFETY: unlinked, and from `Box::into_raw`.
            unsafe { collector.retire(old, seize::reclaim::boxed) };
        }
        let collector = &self.collector;
        self.slots.run(
            thread,
            n,
            tally,
            |slot, i| turn(collector, slot, i),
            |slot, i| turn(collector, slot, i),
        );
    }
    fn read(&self, thread: usize, n: u64) {
        use seize::Guard;
        let slot = &self.slots.timed[thread].0;
        for _ in 0..n {
            let guard = self.collector.enter();
            // SAFETY: protected by the guard.
            std::hint::black_box(unsafe { (*guard.protect(slot, Ordering::Acquire)).0[0] });
        }
    }
    fn flush(&self, tally: Option<&Tally>) {
        // SAFETY: called between passes, when no thread is inside and nothing retired can be reached.
        until_free(tally, || unsafe { self.collector.reclaim_all() });
    }
}

/// haphazard: hazard pointers.
pub(super) struct Haphazard(Both);

impl Haphazard {
    pub(super) fn new(threads: usize) -> Haphazard {
        Haphazard(Both::new(threads))
    }
}

impl Scheme for Haphazard {
    fn name(&self) -> &'static str {
        "haphazard"
    }
    fn floor(&self) -> &'static str {
        "floor"
    }
    fn run(&self, thread: usize, n: u64, tally: Option<&Tally>) {
        fn turn<const COUNTS: bool>(slot: &AtomicPtr<Object<COUNTS>>, i: u64) {
            let new = Box::into_raw(Box::new(Object::new(i)));
            let old = slot.swap(new, Ordering::AcqRel);
            // SAFETY: unlinked, and from `Box::into_raw`.
            unsafe {
                haphazard::Domain::global().retire_ptr::<Object<COUNTS>, Box<Object<COUNTS>>>(old);
            }
        }
        self.0.run(thread, n, tally, turn, turn);
    }
    fn read(&self, thread: usize, n: u64) {
        let slot = &self.0.timed[thread].0;
        let mut hazard = haphazard::HazardPointer::new();
        for _ in 0..n {
            // SAFETY: retired in the same domain only.
            let object = unsafe { hazard.protect(slot) };
            std::hint::black_box(object.map(|o| o.0[0]));
            hazard.reset_protection();
        }
    }
    fn flush(&self, tally: Option<&Tally>) {
        until_free(tally, || {
            haphazard::Domain::global().eager_reclaim();
        });
    }
}
