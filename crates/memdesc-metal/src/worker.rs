//! The kernel's own threads: a worker on each CPU, for its periodic work, what was kicked, and the dead; and one that reclaims when memory is low (`kswapd`), which then
//! makes large blocks if one was wanted (`kcompactd`).
//!
//! They rest while somebody looks at a quiet moment ([`pause`]).

use core::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};

use memdesc::{AllocError, Mm, PAGEBLOCK_ORDER};

use crate::percpu::{self, PerCpu};
use crate::platform::Metal;
use crate::thread::Thread;
use crate::{memory, park, sched, thread};

/// How many want the workers to rest, and how many of these are at work.
static PAUSES: AtomicU32 = AtomicU32::new(0);
static BUSY: AtomicU32 = AtomicU32::new(0);

/// What kswapd parks on: raised by every call; the largest order that was wanted since it looked.
static WANTED: AtomicU32 = AtomicU32::new(0);
static ORDER: AtomicUsize = AtomicUsize::new(0);

/// How often it ran, and the pages that it made free.
pub(crate) static RECLAIMS: AtomicU64 = AtomicU64::new(0);
pub(crate) static RECLAIMED: AtomicU64 = AtomicU64::new(0);

/// Starts them: one for each CPU that runs, and one more.
///
/// # Errors
///
/// No memory.
pub(crate) fn start(mm: &'static Mm<Metal>) -> Result<(), AllocError> {
    for cpu in percpu::online() {
        // Nobody waits for its end.
        drop(thread::spawn_on("worker", cpu.cpu(), move || work(mm))?);
    }
    drop(thread::spawn("kswapd", move || kswapd(mm))?);
    Ok(())
}

/// The workers rest as long as this lives.
#[derive(Debug)]
#[must_use = "the workers go on when it is dropped"]
pub(crate) struct Pause(());

/// Has the workers rest, and waits until they do. In a thread that may sleep, and that none of them waits for.
pub(crate) fn pause() -> Pause {
    // SeqCst: with `at_work`, one of the two sees the other.
    PAUSES.fetch_add(1, Ordering::SeqCst);
    while BUSY.load(Ordering::SeqCst) > 0 {
        sched::relax();
    }
    Pause(())
}

impl Drop for Pause {
    fn drop(&mut self) {
        PAUSES.fetch_sub(1, Ordering::SeqCst);
        park::unpark_all(&PAUSES);
    }
}

/// Does a piece of work outside of all pauses.
fn at_work(f: impl FnOnce()) {
    loop {
        BUSY.fetch_add(1, Ordering::SeqCst);
        let pauses = PAUSES.load(Ordering::SeqCst);
        if pauses == 0 {
            break;
        }
        BUSY.fetch_sub(1, Ordering::SeqCst);
        park::park(&PAUSES, pauses);
    }
    f();
    BUSY.fetch_sub(1, Ordering::SeqCst);
}

/// The work of a CPU, on it.
fn work(mm: &'static Mm<Metal>) -> u64 {
    // Bound, so it stays right.
    let me = percpu::this();
    loop {
        let seen = me.work.load(Ordering::Acquire);
        at_work(|| {
            bury_all(me, mm);
            memory::work();
        });
        park::park(&me.work, seen);
    }
}

/// Is there any for a CPU's worker? Then it is woken: in the timer's interrupt.
pub(crate) fn tick(me: &PerCpu) {
    if memory::has_work(me) {
        wake(me);
    }
}

fn wake(me: &PerCpu) {
    me.work.fetch_add(1, Ordering::Release);
    park::unpark(&me.work);
}

/// A thread ended on this CPU, which has left its stack. With interrupts off.
pub(crate) fn bury(me: &PerCpu, thread: &Thread) {
    // Only this CPU pushes, with interrupts off, and its worker takes all.
    thread
        .next
        .store(me.dead.load(Ordering::Relaxed), Ordering::Relaxed);
    while let Err(first) = me.dead.compare_exchange(
        thread.next.load(Ordering::Relaxed),
        thread.as_ptr(),
        Ordering::Release,
        Ordering::Relaxed,
    ) {
        thread.next.store(first, Ordering::Relaxed);
    }
    wake(me);
}

fn bury_all(me: &PerCpu, mm: &Mm<Metal>) {
    let mut at = me.dead.swap(core::ptr::null_mut(), Ordering::Acquire);
    // SAFETY: dead threads are the worker's until they are buried.
    while let Some(thread) = unsafe { at.as_ref() } {
        at = thread.next.load(Ordering::Relaxed);
        thread.bury(mm);
    }
}

/// Memory is low: kswapd is woken. Any context.
pub(crate) fn wake_kswapd(order: usize) {
    ORDER.fetch_max(order, Ordering::Relaxed);
    WANTED.fetch_add(1, Ordering::Release);
    park::unpark(&WANTED);
}

fn kswapd(mm: &'static Mm<Metal>) -> u64 {
    let mut seen = 0;
    loop {
        park::park(&WANTED, seen);
        let wanted = WANTED.load(Ordering::Acquire);
        if wanted == seen {
            continue;
        }
        seen = wanted;
        let mut freed = 0;
        at_work(|| {
            let order = ORDER.swap(0, Ordering::Relaxed);
            freed = mm.kswapd();
            RECLAIMS.fetch_add(1, Ordering::Relaxed);
            RECLAIMED.fetch_add(freed as u64, Ordering::Relaxed);
            if (1..=PAGEBLOCK_ORDER).contains(&order) {
                mm.compact(order);
            }
        });
        // Not again at once: each run empties the lists of all CPUs, and if there was nothing to be had there will not be so soon.
        sched::sleep_ms(if freed > 0 { 10 } else { 100 });
    }
}
