//! How long each call took: the time stamp counter, and a small log-linear histogram for each path.

use std::time::Duration;
#[cfg(not(target_arch = "x86_64"))]
use std::time::Instant;

/// Sub-buckets of each power of two: values are kept to within 1/32.
const SUB_BITS: u32 = 5;
const BUCKETS: usize = (64 - SUB_BITS as usize + 1) << SUB_BITS;

/// Ticks of a clock that is cheap to read.
#[derive(Debug)]
pub(crate) struct Clock {
    #[cfg(not(target_arch = "x86_64"))]
    start: Instant,
}

impl Clock {
    pub(crate) fn new() -> Clock {
        Clock {
            #[cfg(not(target_arch = "x86_64"))]
            start: Instant::now(),
        }
    }

    /// The time, in ticks.
    #[inline]
    pub(crate) fn now(&self) -> u64 {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: every x86-64 has this instruction; it has no effect but its result.
        unsafe {
            core::arch::x86_64::_rdtsc()
        }
        #[cfg(not(target_arch = "x86_64"))]
        {
            self.start.elapsed().as_nanos() as u64
        }
    }

    /// What two readings with nothing between them differ by on average: it is in every measured time, and taken off again.
    pub(crate) fn floor(&self) -> u64 {
        const ROUNDS: usize = 4096;
        let mut times: Vec<u64> = (0..ROUNDS)
            .map(|_| {
                let start = self.now();
                self.now().saturating_sub(start)
            })
            .collect();
        // Without those in which something else came between.
        times.sort_unstable();
        times[..ROUNDS * 9 / 10].iter().sum::<u64>() / (ROUNDS as u64 * 9 / 10)
    }
}

/// How long something took, many times.
#[derive(Clone, Debug)]
pub(crate) struct Histogram {
    buckets: Box<[u32]>,
    count: u64,
    sum: u64,
    max: u64,
}

impl Histogram {
    pub(crate) fn new() -> Histogram {
        Histogram {
            buckets: vec![0; BUCKETS].into(),
            count: 0,
            sum: 0,
            max: 0,
        }
    }

    #[inline]
    pub(crate) fn record(&mut self, value: u64) {
        self.buckets[bucket(value)] += 1;
        self.count += 1;
        self.sum += value;
        self.max = self.max.max(value);
    }

    pub(crate) fn merge(&mut self, other: &Histogram) {
        for (a, b) in self.buckets.iter_mut().zip(&other.buckets) {
            *a += b;
        }
        self.count += other.count;
        self.sum += other.sum;
        self.max = self.max.max(other.max);
    }

    /// All of it, less `floor` for each.
    fn without(&self, floor: u64) -> u64 {
        self.sum.saturating_sub(self.count * floor)
    }

    /// The value that this share of all is not above.
    fn quantile(&self, share: f64) -> u64 {
        let rank = ((self.count as f64 * share).ceil() as u64).max(1);
        let mut seen = 0;
        for (i, &n) in self.buckets.iter().enumerate() {
            seen += u64::from(n);
            if seen >= rank {
                return upper(i).min(self.max);
            }
        }
        self.max
    }

    /// In nanoseconds, at `ns` nanoseconds a tick, with `floor` ticks taken off.
    fn summary(&self, ns: f64, floor: u64) -> Summary {
        let to_ns = |ticks: u64| (ticks.saturating_sub(floor) as f64 * ns).round() as u64;
        let at = |share| to_ns(self.quantile(share));
        if self.count == 0 {
            return Summary::default();
        }
        Summary {
            count: self.count,
            mean: self.without(floor) as f64 * ns / self.count as f64,
            p50: at(0.5),
            p99: at(0.99),
            p999: at(0.999),
            max: to_ns(self.max),
        }
    }
}

#[inline]
fn bucket(value: u64) -> usize {
    let log = (value | 1 << SUB_BITS).ilog2();
    let shift = log - SUB_BITS;
    ((shift as usize) << SUB_BITS) + (value >> shift) as usize
}

/// The largest value of a bucket.
fn upper(bucket: usize) -> u64 {
    let sub = 1 << SUB_BITS;
    if bucket < 2 * sub {
        return bucket as u64;
    }
    let shift = (bucket >> SUB_BITS) as u32 - 1;
    let top = (bucket & (sub - 1)) as u64 + sub as u64;
    ((top + 1) << shift).wrapping_sub(1)
}

/// Percentiles in nanoseconds.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Summary {
    pub(crate) count: u64,
    pub(crate) mean: f64,
    pub(crate) p50: u64,
    pub(crate) p99: u64,
    pub(crate) p999: u64,
    pub(crate) max: u64,
}

macro_rules! paths {
    ($($(#[$doc:meta])* $name:ident = $key:literal, $group:ident, $text:literal;)*) => {
        /// The ways that a call can go.
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        #[repr(usize)]
        pub(crate) enum Path { $($(#[$doc])* $name),* }

        impl Path {
            pub(crate) const ALL: &[Path] = &[$(Path::$name),*];

            pub(crate) const fn key(self) -> &'static str {
                match self { $(Path::$name => $key),* }
            }

            pub(crate) const fn group(self) -> Group {
                match self { $(Path::$name => Group::$group),* }
            }

            pub(crate) const fn text(self) -> &'static str {
                match self { $(Path::$name => $text),* }
            }
        }
    };
}

/// The four kinds of call.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Group {
    PageAlloc,
    PageFree,
    SlabAlloc,
    SlabFree,
}

impl Group {
    pub(crate) const ALL: [Group; 4] = [
        Group::PageAlloc,
        Group::PageFree,
        Group::SlabAlloc,
        Group::SlabFree,
    ];

    pub(crate) const fn key(self) -> &'static str {
        match self {
            Group::PageAlloc => "page_alloc",
            Group::PageFree => "page_free",
            Group::SlabAlloc => "slab_alloc",
            Group::SlabFree => "slab_free",
        }
    }
}

paths! {
    PcpHit = "pcp_hit", PageAlloc, "per-CPU list";
    PcpRefill = "pcp_refill", PageAlloc, "refill of the list";
    Zone = "zone", PageAlloc, "zone, split";
    Slow = "slow_path", PageAlloc, "slow path";
    PcpFree = "pcp_free", PageFree, "per-CPU list";
    PcpDrain = "pcp_drain", PageFree, "drain of the list";
    ZoneFree = "zone_free", PageFree, "zone, merge";
    SheafHit = "slab_hit", SlabAlloc, "sheaf";
    SheafRefill = "slab_refill", SlabAlloc, "refill of the sheaf";
    SlabNew = "slab_new", SlabAlloc, "a new slab";
    LargeAlloc = "large_alloc", SlabAlloc, "large kmalloc";
    SheafFree = "slab_free_hit", SlabFree, "sheaf";
    SheafFlush = "slab_flush", SlabFree, "flush of the sheaf";
    LargeFree = "large_free", SlabFree, "large kmalloc";
}

/// A histogram for each path.
#[derive(Debug)]
pub(crate) struct Latencies {
    paths: Vec<Histogram>,
    /// Ticks that a measurement takes by itself.
    pub(crate) floor: u64,
}

impl Latencies {
    pub(crate) fn new(floor: u64) -> Latencies {
        Latencies {
            paths: vec![Histogram::new(); Path::ALL.len()],
            floor,
        }
    }

    #[inline]
    pub(crate) fn record(&mut self, path: Path, ticks: u64) {
        self.paths[path as usize].record(ticks);
    }

    /// Of one path, at `ns` nanoseconds a tick.
    pub(crate) fn path(&self, path: Path, ns: f64) -> Summary {
        self.paths[path as usize].summary(ns, self.floor)
    }

    /// Of all paths of a kind of call.
    pub(crate) fn group(&self, group: Group, ns: f64) -> Summary {
        let mut sum = Histogram::new();
        for &path in Path::ALL.iter().filter(|p| p.group() == group) {
            sum.merge(&self.paths[path as usize]);
        }
        sum.summary(ns, self.floor)
    }

    /// All calls together.
    pub(crate) fn total(&self, ns: f64) -> Duration {
        let ticks: u64 = self.paths.iter().map(|h| h.without(self.floor)).sum();
        Duration::from_nanos((ticks as f64 * ns) as u64)
    }

    pub(crate) fn calls(&self) -> u64 {
        self.paths.iter().map(|h| h.count).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_cover_everything() {
        for value in (0..10_000).chain([u64::MAX, u64::MAX / 2, 1 << 40, (1 << 40) - 1]) {
            let i = bucket(value);
            assert!(i < BUCKETS, "{value}");
            assert!(upper(i) >= value, "{value} is above its bucket");
            assert!(
                upper(i) - value <= value / 32,
                "{value} is far below {}",
                upper(i)
            );
            assert!(
                i == 0 || upper(i - 1) < value,
                "{value} fits a lower bucket"
            );
        }
    }

    #[test]
    fn percentiles() {
        let mut h = Histogram::new();
        (1..=1000).for_each(|v| h.record(v));
        let s = h.summary(1.0, 0);
        assert_eq!((s.count, s.max), (1000, 1000));
        assert!(
            (500..=516).contains(&s.p50) && (990..=1000).contains(&s.p99),
            "{s:?}"
        );
        assert_eq!(h.summary(1.0, 100).max, 900);
        assert_eq!(Histogram::new().summary(1.0, 5).max, 0);
    }
}
