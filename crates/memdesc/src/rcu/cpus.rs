//! RCU for a kernel that has none: the readers are its CPUs, which stay where they are while they read.
//!
//! As Linux's without preemption in read sections: a section pins its CPU. [`CpuRcu`] is a static of the kernel's, and its
//! [`Platform::Rcu`]. [`PlatformRcu`] is the same with nothing more to implement: it asks the platform.

use super::domain::Domain;
use super::engine::{Engine, Readers, Slot, Stall};
use crate::platform::Platform;

/// The CPUs of a kernel.
///
/// # Safety
///
/// Promises 2 and 3 of [`Platform`], for these functions of the same names.
pub unsafe trait Cpus: Sync {
    /// Keeps the caller on its CPU and says which it is. Nests. Any context.
    fn pin(&self) -> usize;
    /// Undoes one `pin`.
    ///
    /// # Safety
    ///
    /// `cpu` is what the latest `pin` that is not undone gave.
    unsafe fn unpin(&self, cpu: usize);
    /// The reader's half of an asymmetric fence; a full one by default.
    #[inline]
    fn light_barrier(&self) {
        core::sync::atomic::fence(core::sync::atomic::Ordering::SeqCst);
    }
    /// The other half.
    fn heavy_barrier(&self) {
        core::sync::atomic::fence(core::sync::atomic::Ordering::SeqCst);
    }
    /// One turn of waiting, the `round`-th; `nap`: the caller is in no hurry and may sleep.
    fn relax(&self, _round: u32, _nap: bool) {
        core::hint::spin_loop();
    }
    /// Monotonic nanoseconds, for reports of stalls.
    fn now(&self) -> u64 {
        0
    }
    /// A CPU holds up a grace period for long: `stall.reader` is its number.
    fn stall(&self, _stall: &Stall) {}
}

/// RCU among up to `N` CPUs.
pub type CpuRcu<C, const N: usize> = Domain<CpuReaders<C, N>>;

/// A platform's CPUs: pins, barriers and time are those of [`Platform`].
///
/// Two things a platform cannot say and `Cpus` can: what to do while one waits for a grace period that is in no hurry (here it spins), and where to report who holds one up (here nowhere).
#[derive(Clone, Copy, Debug, Default)]
pub struct PlatformCpus<P>(pub P);

// SAFETY: `Platform` promises the same for the same functions.
unsafe impl<P: Platform> Cpus for PlatformCpus<P> {
    #[inline]
    fn pin(&self) -> usize {
        self.0.pin()
    }
    #[inline]
    unsafe fn unpin(&self, cpu: usize) {
        // SAFETY: the caller's promise.
        unsafe { self.0.unpin(cpu) }
    }
    #[inline]
    fn light_barrier(&self) {
        self.0.light_barrier();
    }
    fn heavy_barrier(&self) {
        self.0.heavy_barrier();
    }
    fn relax(&self, round: u32, _nap: bool) {
        self.0.relax(round);
        core::hint::spin_loop();
    }
    fn now(&self) -> u64 {
        self.0.now()
    }
}

/// RCU among up to `N` CPUs of a platform, which implements nothing more for it:
///
/// ```
/// # use memdesc::Platform;
/// use memdesc::rcu::cpus::PlatformRcu;
///
/// #[derive(Clone, Copy)]
/// struct Machine;
/// static RCU: PlatformRcu<Machine, 1> = PlatformRcu::of(Machine);
///
/// // SAFETY: never used.
/// unsafe impl Platform for Machine {
///     type Rcu = PlatformRcu<Machine, 1>;
///     fn rcu(&self) -> &Self::Rcu {
///         &RCU
///     }
/// #   fn direct_map(&self) -> *mut u8 { core::ptr::null_mut() }
/// #   fn nr_cpus(&self) -> usize { 1 }
/// #   fn pin(&self) -> usize { 0 }
/// #   unsafe fn unpin(&self, _cpu: usize) {}
///     // ...
/// }
/// ```
pub type PlatformRcu<P, const N: usize> = CpuRcu<PlatformCpus<P>, N>;

impl<P: Platform, const N: usize> PlatformRcu<P, N> {
    /// The RCU of this platform.
    pub const fn of(platform: P) -> Self {
        Domain::new(CpuReaders::new(PlatformCpus(platform)), Engine::STALL_NS)
    }
}

/// The readers of a [`CpuRcu`]: a slot for each CPU.
#[derive(Debug)]
pub struct CpuReaders<C, const N: usize> {
    cpus: C,
    slots: [Slot; N],
}

impl<C: Cpus, const N: usize> CpuReaders<C, N> {
    /// Nobody reads yet.
    pub const fn new(cpus: C) -> CpuReaders<C, N> {
        let mut slots = [const { Slot::new() }; N];
        let mut cpu = 0;
        while cpu < N {
            slots[cpu] = Slot::of(cpu as u64);
            cpu += 1;
        }
        CpuReaders { cpus, slots }
    }

    /// The CPUs.
    pub fn cpus(&self) -> &C {
        &self.cpus
    }
}

// SAFETY: who uses a CPU's slot stays on it: in a read section by the section's pin. Between two instructions of anyone else's use, which are
// single loads and atomic pushes, it does not matter whose slot it is. Barriers as `Cpus` promises.
unsafe impl<C: Cpus, const N: usize> Readers for CpuReaders<C, N> {
    #[inline]
    fn enter(&self) {
        // Until the section is closed.
        self.cpus.pin();
    }
    #[inline]
    fn leave(&self) {
        let cpu = self.cpus.pin();
        // SAFETY: the pin of `enter`, and the one just made: both of this CPU.
        unsafe {
            self.cpus.unpin(cpu);
            self.cpus.unpin(cpu);
        }
    }
    #[inline]
    fn slot(&self) -> Option<&Slot> {
        let cpu = self.cpus.pin();
        // SAFETY: from `pin`, just now.
        unsafe { self.cpus.unpin(cpu) };
        self.slots.get(cpu)
    }
    fn for_each(&self, visit: &mut dyn FnMut(&Slot)) {
        self.slots.iter().for_each(visit);
    }
    #[inline]
    fn light(&self) {
        self.cpus.light_barrier();
    }
    fn heavy(&self) {
        self.cpus.heavy_barrier();
    }
    fn relax(&self, round: u32, nap: bool) {
        self.cpus.relax(round, nap);
    }
    fn now(&self) -> u64 {
        self.cpus.now()
    }
    fn stall(&self, stall: &Stall) {
        self.cpus.stall(stall);
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use crate::rcu::{Rcu, read_lock};
    use std::cell::Cell;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::vec::Vec;

    std::thread_local!(static CPU: Cell<usize> = const { Cell::new(0) });

    /// Threads that say which CPU they are.
    struct Threads;

    // SAFETY: each thread of the test is a CPU of its own; full fences on both sides.
    unsafe impl Cpus for Threads {
        fn pin(&self) -> usize {
            CPU.get()
        }
        unsafe fn unpin(&self, cpu: usize) {
            assert_eq!(cpu, CPU.get());
        }
        fn relax(&self, _round: u32, _nap: bool) {
            std::thread::yield_now();
        }
    }

    #[test]
    fn cpus_read_while_another_waits() {
        let rcu = &CpuRcu::new(CpuReaders::<Threads, 4>::new(Threads), u64::MAX);
        // Readers see both or neither of what is changed with a grace period between.
        let (one, two) = (&AtomicU64::new(0), &AtomicU64::new(0));
        let rounds = if cfg!(miri) { 20 } else { 2000 };
        std::thread::scope(|scope| {
            let readers: Vec<_> = (1..4)
                .map(|cpu| {
                    scope.spawn(move || {
                        CPU.set(cpu);
                        for _ in 0..rounds {
                            let _read = read_lock(rcu);
                            let _nested = read_lock(rcu);
                            assert!(rcu.reading());
                            // `two` follows `one` a grace period behind: whoever entered before `one` changed does not see the other.
                            let earlier = one.load(Ordering::Acquire);
                            std::thread::yield_now();
                            let later = two.load(Ordering::Acquire);
                            assert!(later <= earlier, "{earlier} {later}");
                        }
                    })
                })
                .collect();
            for round in 1..rounds / 4 {
                one.store(round, Ordering::Relaxed);
                rcu.synchronize();
                two.store(round, Ordering::Relaxed);
            }
            readers.into_iter().for_each(|r| r.join().unwrap());
        });
        assert!(!rcu.reading());
        rcu.barrier();
    }
}
