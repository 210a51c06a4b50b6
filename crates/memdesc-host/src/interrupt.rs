//! Which signal handlers are interrupts: a handler says so itself, for as long as its guard lives.
//!
//! The calls that may be made from any context need no such word. It is for what depends on the context: the context checker, and
//! read sections on threads that never opened one before, which cannot be given a slot in a handler.

use std::marker::PhantomData;
use std::sync::atomic::{AtomicU32, Ordering, compiler_fence};

use memdesc::Context;
use memdesc::lockdep::Task;

thread_local! {
    /// How many handlers run on top of each other on this thread, and how many of them are NMIs, in the upper half.
    static DEPTH: AtomicU32 = const { AtomicU32::new(0) };
}

thread_local! {
    /// What the thread holds, for the context checker.
    pub(crate) static TASK: Task = const { Task::new() };
    /// How often interrupts are off.
    static OFF: AtomicU32 = const { AtomicU32::new(0) };
    /// How many reasons there are not to sleep.
    static ATOMIC: AtomicU32 = const { AtomicU32::new(0) };
}

const NMI: u32 = 1 << 16;

/// Interrupts are off on this thread as long as this lives. It is only said so, for the context checker: no signal is blocked.
#[derive(Debug)]
#[must_use]
pub struct Off(PhantomData<*const ()>);

/// Says that interrupts are off (`local_irq_save`).
pub fn off() -> Off {
    OFF.with(|off| off.store(off.load(Ordering::Relaxed) + 1, Ordering::Relaxed));
    Off(PhantomData)
}

impl Drop for Off {
    fn drop(&mut self) {
        OFF.with(|off| off.store(off.load(Ordering::Relaxed) - 1, Ordering::Relaxed));
    }
}

/// The thread may not sleep as long as this lives: it holds a lock of the kernel's that spins.
#[derive(Debug)]
#[must_use]
pub struct Atomic(PhantomData<*const ()>);

/// Says that the thread may not sleep (`preempt_disable`).
pub fn atomic() -> Atomic {
    ATOMIC.with(|n| n.store(n.load(Ordering::Relaxed) + 1, Ordering::Relaxed));
    Atomic(PhantomData)
}

impl Drop for Atomic {
    fn drop(&mut self) {
        ATOMIC.with(|n| n.store(n.load(Ordering::Relaxed) - 1, Ordering::Relaxed));
    }
}

/// Are they on?
pub(crate) fn enabled() -> bool {
    OFF.with(|off| off.load(Ordering::Relaxed)) == 0
}

/// The thread runs a handler as long as this lives.
#[derive(Debug)]
#[must_use]
pub struct Interrupt {
    adds: u32,
    _not_send: PhantomData<*const ()>,
}

fn enter(adds: u32) -> Interrupt {
    DEPTH.with(|depth| {
        // A handler on top of us undoes what it adds, so a load and a store will do.
        let now = depth.load(Ordering::Relaxed);
        depth.store(now + adds, Ordering::Relaxed);
    });
    compiler_fence(Ordering::SeqCst);
    Interrupt {
        adds,
        _not_send: PhantomData,
    }
}

/// The caller is an interrupt handler. From a signal handler.
pub fn hardirq() -> Interrupt {
    enter(1)
}

/// The caller is a handler that nothing can keep out. From a signal handler.
pub fn nmi() -> Interrupt {
    enter(NMI + 1)
}

impl Drop for Interrupt {
    fn drop(&mut self) {
        compiler_fence(Ordering::SeqCst);
        DEPTH.with(|depth| {
            let now = depth.load(Ordering::Relaxed);
            depth.store(now - self.adds, Ordering::Relaxed);
        });
    }
}

/// What the thread is at the moment.
pub fn context() -> Context {
    match DEPTH.with(|depth| depth.load(Ordering::Relaxed)) {
        0 if ATOMIC.with(|n| n.load(Ordering::Relaxed)) > 0 || !enabled() => Context::Atomic,
        0 => Context::Task,
        n if n >= NMI => Context::Nmi,
        _ => Context::HardIrq,
    }
}
