//! Whom a thread's allocations are charged to.

use std::cell::Cell;
use std::marker::PhantomData;

use memdesc::Context;

thread_local! {
    static CURRENT: Cell<u16> = const { Cell::new(0) };
}

/// This thread's; nobody in an interrupt, which serves whom it likes.
#[inline]
pub(crate) fn current() -> u16 {
    let current = CURRENT.get();
    if current != 0 && crate::interrupt::context() > Context::Atomic {
        return 0;
    }
    current
}

/// The thread charges a group as long as this lives, and then whom it did before.
#[derive(Debug)]
#[must_use = "the scope ends when it is dropped"]
pub struct MemcgScope {
    before: u16,
    /// Of this thread.
    _here: PhantomData<*const ()>,
}

impl MemcgScope {
    pub(crate) fn new(id: u16) -> MemcgScope {
        MemcgScope {
            before: CURRENT.replace(id),
            _here: PhantomData,
        }
    }
}

impl Drop for MemcgScope {
    fn drop(&mut self) {
        CURRENT.set(self.before);
    }
}
