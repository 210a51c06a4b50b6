//! What a thread's allocations are to the memory manager: whom they are charged to, and which reserve they are entitled to.

use std::cell::Cell;
use std::marker::PhantomData;
use std::thread::LocalKey;

use memdesc::Context;

thread_local! {
    static MEMCG: Cell<u16> = const { Cell::new(0) };
    static RESERVE: Cell<u16> = const { Cell::new(0) };
}

/// This thread's group; nobody in an interrupt, which serves whom it likes.
#[inline]
pub(crate) fn memcg() -> u16 {
    of_thread(&MEMCG)
}

/// This thread's reserve; none in an interrupt.
pub(crate) fn reserve() -> u16 {
    of_thread(&RESERVE)
}

#[inline]
fn of_thread(which: &'static LocalKey<Cell<u16>>) -> u16 {
    let current = which.get();
    if current != 0 && crate::interrupt::context() > Context::Atomic {
        return 0;
    }
    current
}

/// The thread charges a group, or has a reserve, as long as this lives, and then what it did before.
#[derive(Debug)]
#[must_use = "the scope ends when it is dropped"]
pub struct TaskScope {
    which: &'static LocalKey<Cell<u16>>,
    before: u16,
    /// Of this thread.
    _here: PhantomData<*const ()>,
}

impl TaskScope {
    pub(crate) fn memcg(id: u16) -> TaskScope {
        TaskScope::new(&MEMCG, id)
    }

    pub(crate) fn reserve(id: u16) -> TaskScope {
        TaskScope::new(&RESERVE, id)
    }

    fn new(which: &'static LocalKey<Cell<u16>>, id: u16) -> TaskScope {
        TaskScope {
            which,
            before: which.replace(id),
            _here: PhantomData,
        }
    }
}

impl Drop for TaskScope {
    fn drop(&mut self) {
        self.which.set(self.before);
    }
}
