//! Threads as CPUs.
//!
//! A claimed CPU belongs to one thread until its guard goes: pinning is reading a thread-local. A floating CPU belongs to
//! whoever took it last by compare-exchange, for the length of one pin.

use std::cell::Cell;
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
        let before = CURRENT.with(|c| {
            debug_assert_eq!(
                c.depth.get(),
                0,
                "a CPU claimed while pinned to a floating one"
            );
            (c.host.replace(self.id), c.cpu.replace(cpu as u32))
        });
        Some(CpuGuard {
            cpus: self,
            cpu,
            before,
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
    before: (u64, u32),
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
        CURRENT.with(|c| {
            // Guards of one thread may go in any order: only the CPU that the thread is right now is given up.
            if c.host.get() == self.cpus.id && c.cpu.get() == self.cpu as u32 {
                let before = self.before;
                let back = before.0 == self.cpus.id
                    && self.cpus.taken[before.1 as usize].load(Ordering::Relaxed);
                if back || before.0 != self.cpus.id {
                    c.host.set(before.0);
                    c.cpu.set(before.1);
                } else {
                    c.host.set(0);
                    c.cpu.set(NO_CPU);
                }
            }
        });
        self.cpus.taken[self.cpu].store(false, Ordering::Release);
    }
}
