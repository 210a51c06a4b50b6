//! Threads as CPUs.
//!
//! A claimed CPU belongs to one thread until its guard goes: pinning is reading a thread-local. A floating CPU belongs to
//! whoever took it last by compare-exchange, for the length of one pin.

use std::cell::{Cell, RefCell};
use std::marker::PhantomData;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

const NO_CPU: u32 = u32::MAX;

thread_local! {
    /// Of which host this thread is a CPU, which one, and how deep its pins are nested.
    static CURRENT: Current = const {
        Current {
            host: Cell::new(0),
            cpu: Cell::new(NO_CPU),
            depth: Cell::new(0),
            before: Cell::new((0, NO_CPU)),
        }
    };
}

thread_local! {
    /// Every CPU this thread has claimed, of any host, the latest last.
    static CLAIMS: RefCell<Vec<(u64, u32)>> = const { RefCell::new(Vec::new()) };
}

struct Current {
    host: Cell<u64>,
    cpu: Cell<u32>,
    /// Only counted on floating CPUs.
    depth: Cell<u32>,
    /// What the thread was before it pinned itself to a floating CPU: perhaps a CPU of another host.
    before: Cell<(u64, u32)>,
}

/// The CPUs of a host.
#[derive(Debug)]
pub(crate) struct Cpus {
    id: u64,
    claimable: usize,
    taken: Vec<AtomicBool>,
}

impl Cpus {
    pub(crate) fn new(claimable: usize, floating: usize) -> Cpus {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Cpus {
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            claimable,
            taken: (0..claimable + floating)
                .map(|_| AtomicBool::new(false))
                .collect(),
        }
    }

    pub(crate) fn count(&self) -> usize {
        self.taken.len()
    }

    pub(crate) fn claim(&self, cpu: usize) -> Option<CpuGuard<'_>> {
        if cpu >= self.claimable || !take(&self.taken[cpu]) {
            return None;
        }
        CLAIMS.with(|claims| claims.borrow_mut().push((self.id, cpu as u32)));
        CURRENT.with(|c| {
            debug_assert_eq!(
                c.depth.get(),
                0,
                "a CPU claimed while pinned to a floating one"
            );
            c.host.set(self.id);
            c.cpu.set(cpu as u32);
        });
        Some(CpuGuard {
            cpus: self,
            cpu,
            _not_send: PhantomData,
        })
    }

    #[inline]
    pub(crate) fn pin(&self) -> usize {
        CURRENT.with(|c| {
            if c.host.get() == self.id && c.depth.get() == 0 {
                return c.cpu.get() as usize;
            }
            self.pin_floating(c)
        })
    }

    #[cold]
    fn pin_floating(&self, current: &Current) -> usize {
        if current.depth.get() > 0 {
            assert_eq!(
                current.host.get(),
                self.id,
                "pinned to a CPU of another host"
            );
            current.depth.set(current.depth.get() + 1);
            return current.cpu.get() as usize;
        }
        let mut round = 0u32;
        loop {
            // Floating CPUs first; with none, any that nobody has claimed.
            let floating = self.claimable..self.taken.len();
            let free = floating
                .chain(0..self.claimable)
                .find(|&cpu| take(&self.taken[cpu]));
            if let Some(cpu) = free {
                current.before.set((
                    current.host.replace(self.id),
                    current.cpu.replace(cpu as u32),
                ));
                current.depth.set(1);
                return cpu;
            }
            round += 1;
            if round.is_multiple_of(16) {
                std::thread::yield_now();
            }
            std::hint::spin_loop();
        }
    }

    #[inline]
    pub(crate) fn unpin(&self, cpu: usize) {
        CURRENT.with(|c| {
            let depth = c.depth.get();
            if depth == 0 {
                return;
            }
            c.depth.set(depth - 1);
            if depth == 1 {
                let (host, before) = c.before.get();
                c.host.set(host);
                c.cpu.set(before);
                // Release pairs with the Acquire in `take`: the next to have this CPU sees what was done on it.
                self.taken[cpu].store(false, Ordering::Release);
            }
        });
    }
}

fn take(flag: &AtomicBool) -> bool {
    !flag.load(Ordering::Relaxed)
        && flag
            .compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed)
            .is_ok()
}

/// The calling thread is this CPU as long as this lives.
#[derive(Debug)]
pub struct CpuGuard<'a> {
    cpus: &'a Cpus,
    cpu: usize,
    /// The claim is the thread's.
    _not_send: PhantomData<*const ()>,
}

impl CpuGuard<'_> {
    /// Which CPU.
    pub fn cpu(&self) -> usize {
        self.cpu
    }

    /// The thread, which may have claimed several CPUs, is this one from now on. One thread can play a whole machine.
    #[inline]
    pub fn switch(&self) {
        CURRENT.with(|c| {
            c.host.set(self.cpus.id);
            c.cpu.set(self.cpu as u32);
        });
    }
}

impl Drop for CpuGuard<'_> {
    fn drop(&mut self) {
        let mine = (self.cpus.id, self.cpu as u32);
        let latest = CLAIMS.with(|claims| {
            let mut claims = claims.borrow_mut();
            claims.retain(|&claim| claim != mine);
            claims.last().copied()
        });
        CURRENT.with(|c| {
            // Guards may go in any order. If the thread is this CPU right now, it is the latest it still has a claim to.
            if (c.host.get(), c.cpu.get()) == mine {
                let (host, cpu) = latest.unwrap_or((0, NO_CPU));
                c.host.set(host);
                c.cpu.set(cpu);
            }
        });
        // Release pairs with the Acquire in `take`.
        self.cpus.taken[self.cpu].store(false, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guards_go_in_any_order() {
        let (a, b) = (Cpus::new(2, 1), Cpus::new(1, 0));
        let first = a.claim(0).unwrap();
        let second = a.claim(1).unwrap();
        let other = b.claim(0).unwrap();
        assert_eq!(
            (b.pin(), a.pin()),
            (0, 2),
            "on the other host the thread floats"
        );
        a.unpin(2);
        drop(first);
        // Somebody else has CPU 0 now; this thread must not become it again.
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let theirs = a.claim(0).unwrap();
                assert_eq!(a.pin(), 0);
                std::mem::forget(theirs);
            });
        });
        drop(other);
        assert_eq!(a.pin(), 1);
        drop(second);
        assert_eq!(a.pin(), 2, "only the floating one is left");
        a.unpin(2);
        assert!(a.claim(0).is_none());
        assert!(a.claim(2).is_none(), "a floating CPU cannot be claimed");
    }
}
