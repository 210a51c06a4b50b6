//! Which signal handlers are interrupts: a handler says so itself, for as long as its guard lives.
//!
//! The calls that may be made from any context need no such word. It is for what depends on the context: the context checker, and
//! read sections on threads that never opened one before, which cannot be given a slot in a handler.

use std::marker::PhantomData;
use std::sync::atomic::{AtomicU32, Ordering, compiler_fence};

use memdesc::Context;

thread_local! {
    /// How many handlers run on top of each other on this thread, and how many of them are NMIs, in the upper half.
    static DEPTH: AtomicU32 = const { AtomicU32::new(0) };
}

const NMI: u32 = 1 << 16;

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
        0 => Context::Task,
        n if n >= NMI => Context::Nmi,
        _ => Context::HardIrq,
    }
}
