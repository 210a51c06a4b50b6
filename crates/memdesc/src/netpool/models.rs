//! Model checks of a pool's end under loom: every page goes back once, and the pool once, after all of them.

use std::boxed::Box;
use std::sync::Arc;

use loom::thread;

use super::life::Life;
use crate::sync::PtrStack;
use crate::sync::atomic::{AtomicPtr, AtomicU32, Ordering};

/// A page: where it links to while idle, and how often it went back.
struct Page {
    next: AtomicPtr<Page>,
    back: AtomicU32,
}

struct Pool {
    life: Life,
    stack: PtrStack<Page>,
    pages: [Box<Page>; 2],
    freed: AtomicU32,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    Right,
    NoFence,
    NoLook,
}

impl Pool {
    fn new() -> Arc<Pool> {
        let page = || {
            Box::new(Page {
                next: AtomicPtr::new(core::ptr::null_mut()),
                back: AtomicU32::new(0),
            })
        };
        let pool = Pool {
            life: Life::new(),
            stack: PtrStack::new(),
            pages: [page(), page()],
            freed: AtomicU32::new(0),
        };
        pool.life.join();
        pool.life.join();
        Arc::new(pool)
    }

    /// `PagePool::drop`, `pool_put`.
    fn leave(&self) {
        if self.life.leave() {
            assert!(
                self.pages
                    .iter()
                    .all(|p| p.back.load(Ordering::Relaxed) == 1)
            );
            assert_eq!(self.freed.fetch_add(1, Ordering::Relaxed), 0, "freed twice");
        }
    }

    fn release(&self, page: &Page) {
        assert_eq!(page.back.fetch_add(1, Ordering::Relaxed), 0, "back twice");
        self.leave();
    }

    fn drain(&self) {
        let mut at = self.stack.take();
        // SAFETY: pages live as long as the model, and who took them from the stack has them alone.
        while let Some(page) = unsafe { at.as_ref() } {
            at = page.next.load(Ordering::Relaxed);
            self.release(page);
        }
    }

    /// `page_pool_return`.
    fn put(&self, nth: usize, way: Way) {
        let page: *mut Page = (&raw const *self.pages[nth]).cast_mut();
        if self.life.is_dying() {
            return self.release(&self.pages[nth]);
        }
        // SAFETY: as above; the fields are atomics.
        self.stack.push(page, |next| unsafe {
            (*page).next.store(next, Ordering::Relaxed)
        });
        let behind = match way {
            Way::Right => self.life.left_behind(),
            Way::NoFence => self.life.left_behind_carelessly(),
            Way::NoLook => false,
        };
        if behind {
            self.drain();
        }
    }

    fn end(&self) {
        self.life.end();
        self.drain();
        self.leave();
    }
}

fn check(way: Way) {
    loom::model(move || {
        let pool = Pool::new();
        let puts: std::vec::Vec<_> = (0..2)
            .map(|nth| {
                let pool = pool.clone();
                thread::spawn(move || pool.put(nth, way))
            })
            .collect();
        pool.end();
        for put in puts {
            put.join().unwrap();
        }
        assert_eq!(
            pool.freed.load(Ordering::Relaxed),
            1,
            "a page was left behind"
        );
    });
}

#[test]
fn every_page_goes_back_once_and_the_pool_after_them() {
    check(Way::Right);
}

#[test]
#[should_panic = "a page was left behind"]
fn without_the_fence_a_page_is_left_behind() {
    check(Way::NoFence);
}

#[test]
#[should_panic = "a page was left behind"]
fn without_the_look_a_page_is_left_behind() {
    check(Way::NoLook);
}
