//! Threads as CPUs.
//!
//! A claimed CPU belongs to one thread until its guard goes: pinning is reading a thread-local. A floating CPU belongs to
//! whoever took it last by compare-exchange, for the length of one pin.
//!
//! A signal handler may strike between any two instructions here, and pins and unpins like the thread it runs on. So what a
//! thread is at the moment is one word, which changes by one store, and a handler leaves it as it found it.

use std::cell::RefCell;
use std::marker::PhantomData;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, compiler_fence};

/// Which CPU a thread is: the host's number, the CPU's, and how deep it is pinned to a floating one, in one word.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Identity {
    host: u32,
    cpu: u16,
    depth: u16,
}

impl Identity {
    /// Of no host.
    const NONE: Identity = Identity {
        host: 0,
        cpu: 0,
        depth: 0,
    };

    const fn pack(self) -> u64 {
        (self.host as u64) << 32 | (self.cpu as u64) << 16 | self.depth as u64
    }

    const fn unpack(bits: u64) -> Identity {
        Identity {
            host: (bits >> 32) as u32,
            cpu: (bits >> 16) as u16,
            depth: bits as u16,
        }
    }
}

struct Current {
    identity: AtomicU64,
    /// What the thread was before it pinned itself to a floating CPU: perhaps a CPU of another host.
    before: AtomicU64,
}

impl Current {
    #[inline]
    fn get(&self) -> Identity {
        Identity::unpack(self.identity.load(Ordering::Relaxed))
    }

    #[inline]
    fn set(&self, identity: Identity) {
        self.identity.store(identity.pack(), Ordering::Relaxed);
    }
}

thread_local! {
    static CURRENT: Current = const {
        Current {
            identity: AtomicU64::new(Identity::NONE.pack()),
            before: AtomicU64::new(Identity::NONE.pack()),
        }
    };
}

thread_local! {
    /// Every CPU this thread has claimed, of any host, the latest last.
    static CLAIMS: RefCell<Vec<Identity>> = const { RefCell::new(Vec::new()) };
}

/// The CPUs of a host.
#[derive(Debug)]
pub(crate) struct Cpus {
    id: u32,
    claimable: usize,
    taken: Vec<AtomicBool>,
}

impl Cpus {
    pub(crate) fn new(claimable: usize, floating: usize) -> Cpus {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let id = NEXT.fetch_add(1, Ordering::Relaxed);
        Cpus {
            id: u32::try_from(id).expect("fewer than 2^32 hosts in the life of a process"),
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
        let identity = Identity {
            host: self.id,
            cpu: cpu as u16,
            depth: 0,
        };
        CLAIMS.with(|claims| claims.borrow_mut().push(identity));
        CURRENT.with(|c| {
            debug_assert_eq!(
                c.get().depth,
                0,
                "a CPU claimed while pinned to a floating one"
            );
            c.set(identity);
        });
        Some(CpuGuard {
            cpus: self,
            identity,
            _not_send: PhantomData,
        })
    }

    #[inline]
    pub(crate) fn pin(&self) -> usize {
        CURRENT.with(|c| {
            let now = c.get();
            if now.host == self.id && now.depth == 0 {
                return usize::from(now.cpu);
            }
            self.pin_floating(c)
        })
    }

    /// As `pin`; `None` where that would have to wait.
    #[inline]
    pub(crate) fn try_pin(&self) -> Option<usize> {
        CURRENT.with(|c| {
            let now = c.get();
            if now.host == self.id && now.depth == 0 {
                return Some(usize::from(now.cpu));
            }
            if now.depth > 0 && now.host != self.id {
                return None;
            }
            self.try_floating(c)
        })
    }

    #[cold]
    fn pin_floating(&self, current: &Current) -> usize {
        let mut round = 0u32;
        loop {
            if let Some(cpu) = self.try_floating(current) {
                return cpu;
            }
            round += 1;
            if round.is_multiple_of(16) {
                std::thread::yield_now();
            }
            std::hint::spin_loop();
        }
    }

    #[cold]
    fn try_floating(&self, current: &Current) -> Option<usize> {
        let now = current.get();
        if now.depth > 0 {
            assert_eq!(now.host, self.id, "pinned to a CPU of another host");
            current.set(Identity {
                depth: now.depth + 1,
                ..now
            });
            return Some(usize::from(now.cpu));
        }
        // Floating CPUs first; with none, any that nobody has claimed.
        let floating = self.claimable..self.taken.len();
        let cpu = floating
            .chain(0..self.claimable)
            .find(|&cpu| take(&self.taken[cpu]))?;
        // A handler that strikes here floats as well, on another CPU, and leaves both words with what is in them now.
        current.before.store(now.pack(), Ordering::Relaxed);
        current.set(Identity {
            host: self.id,
            cpu: cpu as u16,
            depth: 1,
        });
        // For handlers: from here on the CPU is seen to be ours.
        compiler_fence(Ordering::SeqCst);
        Some(cpu)
    }

    #[inline]
    pub(crate) fn unpin(&self, cpu: usize) {
        CURRENT.with(|c| {
            let now = c.get();
            if now.depth == 0 {
                return;
            }
            if now.depth > 1 {
                return c.set(Identity {
                    depth: now.depth - 1,
                    ..now
                });
            }
            c.set(Identity::unpack(c.before.load(Ordering::Relaxed)));
            // Release pairs with the Acquire in `take`: the next to have this CPU sees what was done on it.
            self.taken[cpu].store(false, Ordering::Release);
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
    identity: Identity,
    /// The claim is the thread's.
    _not_send: PhantomData<*const ()>,
}

impl CpuGuard<'_> {
    /// Which CPU.
    pub fn cpu(&self) -> usize {
        usize::from(self.identity.cpu)
    }

    /// The thread, which may have claimed several CPUs, is this one from now on. One thread can play a whole machine.
    #[inline]
    pub fn switch(&self) {
        CURRENT.with(|c| c.set(self.identity));
    }
}

impl Drop for CpuGuard<'_> {
    fn drop(&mut self) {
        let latest = CLAIMS.with(|claims| {
            let mut claims = claims.borrow_mut();
            claims.retain(|claim| *claim != self.identity);
            claims.last().copied()
        });
        CURRENT.with(|c| {
            // Guards may go in any order. If the thread is this CPU right now, it is the latest it still has a claim to.
            if c.get() == self.identity {
                c.set(latest.unwrap_or(Identity::NONE));
            }
        });
        // Release pairs with the Acquire in `take`.
        self.cpus.taken[self.cpu()].store(false, Ordering::Release);
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
        assert_eq!((a.pin(), a.try_pin()), (2, Some(2)), "pins nest");
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let one = a.claim(1).unwrap();
                std::thread::scope(|scope| {
                    scope.spawn(|| assert_eq!(a.try_pin(), None, "none left, and nobody waits"));
                });
                drop(one);
            });
        });
        a.unpin(2);
        assert_eq!(a.try_pin(), Some(2));
        a.unpin(2);
        a.unpin(2);
        assert_eq!(CURRENT.with(Current::get), Identity::NONE);
    }
}
