//! Fault injection: which allocation fails.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use memdesc::FaultPoint;

/// Makes allocations fail on purpose. Off, it costs a load.
#[derive(Debug, Default)]
pub struct Faults {
    armed: AtomicBool,
    /// Points passed since it was armed.
    passed: AtomicU64,
    /// Fail at this one, 0-based; `u64::MAX` for none.
    fail_at: AtomicU64,
    /// Fail one in so many, at random; 0 for none.
    one_in: AtomicU32,
    seed: AtomicU64,
    failed: AtomicU64,
}

impl Faults {
    /// The `n`-th point passed from now on fails, and only that.
    pub fn fail_nth(&self, n: u64) {
        self.passed.store(0, Ordering::Relaxed);
        self.failed.store(0, Ordering::Relaxed);
        self.fail_at.store(n, Ordering::Relaxed);
        self.one_in.store(0, Ordering::Relaxed);
        self.armed.store(true, Ordering::Relaxed);
    }

    /// One point in `n` fails, at random from this seed.
    pub fn fail_one_in(&self, n: u32, seed: u64) {
        self.fail_at.store(u64::MAX, Ordering::Relaxed);
        self.failed.store(0, Ordering::Relaxed);
        self.seed.store(seed, Ordering::Relaxed);
        self.one_in.store(n, Ordering::Relaxed);
        self.armed.store(true, Ordering::Relaxed);
    }

    /// No more faults. Says how many points were passed and how many failed.
    pub fn off(&self) -> (u64, u64) {
        self.armed.store(false, Ordering::Relaxed);
        (
            self.passed.load(Ordering::Relaxed),
            self.failed.load(Ordering::Relaxed),
        )
    }

    #[inline]
    pub(crate) fn should_fail(&self, point: FaultPoint) -> bool {
        self.armed.load(Ordering::Relaxed) && self.decide(point)
    }

    #[cold]
    fn decide(&self, _point: FaultPoint) -> bool {
        let n = self.passed.fetch_add(1, Ordering::Relaxed);
        let one_in = self.one_in.load(Ordering::Relaxed);
        let fail = if one_in > 0 {
            let seed = self
                .seed
                .fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed);
            let mut x = seed ^ seed >> 30;
            x = x.wrapping_mul(0xbf58_476d_1ce4_e5b9);
            x ^= x >> 27;
            x.wrapping_mul(0x94d0_49bb_1331_11eb) >> 33 < (1u64 << 31) / u64::from(one_in)
        } else {
            n == self.fail_at.load(Ordering::Relaxed)
        };
        if fail {
            self.failed.fetch_add(1, Ordering::Relaxed);
        }
        fail
    }
}
