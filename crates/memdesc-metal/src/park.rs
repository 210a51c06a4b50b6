//! Sleeping on a word (`futex`): what the memory manager's sleeping locks wait by ([`Platform::park`](memdesc::Platform::park)).
//!
//! Who sleeps is in the list of his word's bucket, linked through his descriptor, so nothing is allocated. He looks at the word with the bucket locked; who wakes changes
//! the word first and locks the bucket then: one of the two sees the other. A bucket that nobody sleeps in is not locked.
//!
//! An NMI may let go of a lock that somebody waits for, and cannot wait for the bucket: it notes the bucket, and the next interrupt, or the idle loop, wakes all in
//! it ([`wake_noted`]); who was woken for nothing looks at his word again.
//!
//! Lock order: a bucket is locked with interrupts off, and nothing under it; who is woken goes to a run queue after it was dropped.

use core::sync::atomic::{AtomicPtr, AtomicU32, AtomicU64, Ordering, fence};

use spin::Mutex;
use x86_64::instructions::interrupts;

use crate::thread::{self, State, Thread};
use crate::{percpu, remote, sched};

const BUCKETS: usize = 64;

struct Bucket {
    /// Those in the list, and those about to be.
    sleepers: AtomicU32,
    first: Mutex<AtomicPtr<Thread>>,
}

static TABLE: [Bucket; BUCKETS] = [const {
    Bucket {
        sleepers: AtomicU32::new(0),
        first: Mutex::new(AtomicPtr::new(core::ptr::null_mut())),
    }
}; BUCKETS];

/// Buckets that NMIs want woken.
static NOTED: AtomicU64 = AtomicU64::new(0);

/// How often a thread slept, was woken, and how often an NMI left that to others.
pub(crate) static SLEPT: AtomicU64 = AtomicU64::new(0);
pub(crate) static WOKEN: AtomicU64 = AtomicU64::new(0);
pub(crate) static FROM_NMI: AtomicU64 = AtomicU64::new(0);

fn index(word: &AtomicU32) -> usize {
    let address = (&raw const *word).addr() as u64;
    (address.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 58) as usize
}

/// Sleeps as long as the word has this value; may come back early. In a thread that may sleep.
pub(crate) fn park(word: &AtomicU32, value: u32) {
    if !sched::is_up() {
        // The first thread, while nobody else is there.
        for _ in 0..256 {
            if word.load(Ordering::Relaxed) != value {
                return;
            }
            remote::serve();
            core::hint::spin_loop();
        }
        return;
    }
    assert!(interrupts::are_enabled(), "a thread sleeps while pinned");
    interrupts::disable();
    let (me, bucket) = (thread::current(), &TABLE[index(word)]);
    // SeqCst: with the fence in `wake`, one of the two sees the other.
    bucket.sleepers.fetch_add(1, Ordering::SeqCst);
    let first = bucket.first.lock();
    if word.load(Ordering::SeqCst) == value {
        me.word
            .store((&raw const *word).cast_mut(), Ordering::Relaxed);
        me.next
            .store(first.load(Ordering::Relaxed), Ordering::Relaxed);
        first.store(me.as_ptr(), Ordering::Relaxed);
        me.set_state(State::Asleep);
        drop(first);
        SLEPT.fetch_add(1, Ordering::Relaxed);
        sched::schedule();
    } else {
        drop(first);
        bucket.sleepers.fetch_sub(1, Ordering::SeqCst);
    }
    interrupts::enable();
}

/// Wakes one who sleeps on the word. Any context.
pub(crate) fn unpark(word: &AtomicU32) {
    wake(word, false);
}

/// Wakes all who do. Any context.
pub(crate) fn unpark_all(word: &AtomicU32) {
    wake(word, true);
}

fn wake(word: &AtomicU32, all: bool) {
    // The caller has changed the word: pairs with `sleepers` in `park`.
    fence(Ordering::SeqCst);
    let index = index(word);
    let bucket = &TABLE[index];
    if bucket.sleepers.load(Ordering::SeqCst) == 0 {
        return;
    }
    if percpu::in_nmi() {
        FROM_NMI.fetch_add(1, Ordering::Relaxed);
        NOTED.fetch_or(1 << index, Ordering::Release);
        return;
    }
    let address = (&raw const *word).addr();
    take(bucket, all, |thread| {
        thread.word.load(Ordering::Relaxed).addr() == address
    });
}

/// Wakes all in the buckets that NMIs noted. With interrupts off, but in no NMI.
pub(crate) fn wake_noted() {
    if NOTED.load(Ordering::Relaxed) == 0 {
        return;
    }
    let mut noted = NOTED.swap(0, Ordering::Acquire);
    while noted != 0 {
        let index = noted.trailing_zeros() as usize;
        noted &= noted - 1;
        take(&TABLE[index], true, |_| true);
    }
}

/// Takes sleepers out of a bucket, the one who slept longest or `all`, and wakes them, oldest first.
fn take(bucket: &Bucket, all: bool, wanted: impl Fn(&Thread) -> bool) {
    interrupts::without_interrupts(|| {
        let mut taken: *mut Thread = core::ptr::null_mut();
        let first = bucket.first.lock();
        let mut link: &AtomicPtr<Thread> = &first;
        let mut oldest = None;
        // SAFETY: who is in the list sleeps, and lives, until he is taken out of it under this lock.
        while let Some(thread) = unsafe { link.load(Ordering::Relaxed).as_ref() } {
            if wanted(thread) && all {
                link.store(thread.next.load(Ordering::Relaxed), Ordering::Relaxed);
                thread.next.store(taken, Ordering::Relaxed);
                taken = thread.as_ptr();
                continue;
            }
            if wanted(thread) {
                oldest = Some((link, thread));
            }
            link = &thread.next;
        }
        if let Some((link, thread)) = oldest {
            link.store(thread.next.load(Ordering::Relaxed), Ordering::Relaxed);
            thread.next.store(core::ptr::null_mut(), Ordering::Relaxed);
            taken = thread.as_ptr();
        }
        drop(first);
        // SAFETY: out of the list and still asleep: only we wake him.
        while let Some(thread) = unsafe { taken.as_ref() } {
            taken = thread.next.load(Ordering::Relaxed);
            bucket.sleepers.fetch_sub(1, Ordering::SeqCst);
            WOKEN.fetch_add(1, Ordering::Relaxed);
            sched::wake(thread);
        }
    });
}
