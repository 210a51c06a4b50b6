//! What the caller of an allocation wants and may do: Linux's gfp flags.
//!
//! Names and meanings are those of `include/linux/gfp_types.h` (6.18); the spelling of the type is
//! Rust-for-Linux's `kernel::alloc::Flags`. A flag word says three things at once: from which zone,
//! with which mobility, and how far the allocator may go to get it.

use core::fmt;
use core::ops::{BitAnd, BitOr, BitOrAssign, Not};

use crate::page_alloc::{MigrateType, ZoneType};

/// A set of gfp flags.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
#[repr(transparent)]
pub struct Flags(u32);

macro_rules! bits {
    ($($(#[$doc:meta])* $name:ident = $bit:expr;)*) => {
        $($(#[$doc])* pub const $name: Flags = Flags(1 << $bit);)*
        /// Every single-bit flag by its name.
        const SINGLE: &[(&str, Flags)] = &[$((stringify!($name), $name)),*];
    };
}

bits! {
    /// From ZONE_DMA.
    __GFP_DMA = 0;
    /// May come from high memory (no such zone on 64 bit; kept for its name).
    __GFP_HIGHMEM = 1;
    /// From ZONE_DMA32 or below.
    __GFP_DMA32 = 2;
    /// The owner can move or reclaim it: ZONE_MOVABLE is allowed.
    __GFP_MOVABLE = 3;
    /// A shrinker can free it.
    __GFP_RECLAIMABLE = 4;
    /// High priority: may use half of what lies under the min watermark.
    __GFP_HIGH = 5;
    /// May start physical IO.
    __GFP_IO = 6;
    /// May call down to the file system.
    __GFP_FS = 7;
    /// Zero the contents.
    __GFP_ZERO = 8;
    /// May reclaim directly, and so may sleep.
    __GFP_DIRECT_RECLAIM = 10;
    /// May wake the background reclaimer.
    __GFP_KSWAPD_RECLAIM = 11;
    /// The caller intends to dirty the page.
    __GFP_WRITE = 12;
    /// Do not report a failure.
    __GFP_NOWARN = 13;
    /// Retry for long, but fail in the end.
    __GFP_RETRY_MAYFAIL = 14;
    /// Never fail while reclaim makes progress.
    __GFP_NOFAIL = 15;
    /// Give up after one light attempt at reclaim.
    __GFP_NORETRY = 16;
    /// May use all memory: the caller will free more very soon.
    __GFP_MEMALLOC = 17;
    /// A compound page. Every allocation is one here; kept for its name.
    __GFP_COMP = 18;
    /// Never use the emergency reserves.
    __GFP_NOMEMALLOC = 19;
    /// Enforce the cpuset.
    __GFP_HARDWALL = 20;
    /// Only from the given node.
    __GFP_THISNODE = 21;
    /// Charge it to the memory cgroup that [`Platform::current_memcg`](crate::Platform::current_memcg) says. Not with `__GFP_DMA` for `kmalloc`.
    __GFP_ACCOUNT = 22;
    /// Zero memory tags as well.
    __GFP_ZEROTAGS = 23;
    /// Zeroing may be left out.
    __GFP_SKIP_ZERO = 24;
    /// KASAN need not poison it.
    __GFP_SKIP_KASAN = 25;
    /// Not for lockdep.
    __GFP_NOLOCKDEP = 26;
    /// No slab object extensions.
    __GFP_NO_OBJ_EXT = 27;
    /// This CPU's lists or nothing: no lock, no wake-up, no refill, from any context (seed 001's flag, which Linux never merged). All that
    /// says how far a request may go is ignored then.
    __GFP_FAST_TRY = 28;
    /// For `kmalloc`: the object's deferred free is paid for now, so that
    /// [`kfree_rcu_prepaid`](crate::Mm::kfree_rcu_prepaid) needs neither memory nor time. Not with `__GFP_DMA`.
    __GFP_RCU_PREPAID = 29;
}

/// Both ways of reclaim.
pub const __GFP_RECLAIM: Flags = __GFP_DIRECT_RECLAIM.or(__GFP_KSWAPD_RECLAIM);
/// Cannot sleep; may take from the atomic reserve.
pub const GFP_ATOMIC: Flags = __GFP_HIGH.or(__GFP_KSWAPD_RECLAIM);
/// The ordinary kernel allocation: may sleep, reclaim, do IO.
pub const GFP_KERNEL: Flags = __GFP_RECLAIM.or(__GFP_IO).or(__GFP_FS);
/// [`GFP_KERNEL`], charged to the cgroup.
pub const GFP_KERNEL_ACCOUNT: Flags = GFP_KERNEL.or(__GFP_ACCOUNT);
/// Cannot sleep; no reserve.
pub const GFP_NOWAIT: Flags = __GFP_KSWAPD_RECLAIM.or(__GFP_NOWARN);
/// Reclaim without IO.
pub const GFP_NOIO: Flags = __GFP_RECLAIM;
/// Reclaim without the file system.
pub const GFP_NOFS: Flags = __GFP_RECLAIM.or(__GFP_IO);
/// For user space, not movable.
pub const GFP_USER: Flags = GFP_KERNEL.or(__GFP_HARDWALL);
/// ZONE_DMA.
pub const GFP_DMA: Flags = __GFP_DMA;
/// ZONE_DMA32.
pub const GFP_DMA32: Flags = __GFP_DMA32;
/// For user space, may be high memory, not movable.
pub const GFP_HIGHUSER: Flags = GFP_USER.or(__GFP_HIGHMEM);
/// For user space and movable: anonymous and file memory.
pub const GFP_HIGHUSER_MOVABLE: Flags = GFP_HIGHUSER.or(__GFP_MOVABLE).or(__GFP_SKIP_KASAN);
/// A transparent huge page, without any reclaim.
pub const GFP_TRANSHUGE_LIGHT: Flags = GFP_HIGHUSER_MOVABLE
    .or(__GFP_COMP)
    .or(__GFP_NOMEMALLOC)
    .or(__GFP_NOWARN)
    .minus(__GFP_RECLAIM);
/// A transparent huge page, with direct reclaim.
pub const GFP_TRANSHUGE: Flags = GFP_TRANSHUGE_LIGHT.or(__GFP_DIRECT_RECLAIM);

/// Composite names, the largest first, as `show_gfp_flags()` prints them.
const COMPOSITE: &[(&str, Flags)] = &[
    ("GFP_TRANSHUGE", GFP_TRANSHUGE),
    ("GFP_TRANSHUGE_LIGHT", GFP_TRANSHUGE_LIGHT),
    ("GFP_HIGHUSER_MOVABLE", GFP_HIGHUSER_MOVABLE),
    ("GFP_HIGHUSER", GFP_HIGHUSER),
    ("GFP_USER", GFP_USER),
    ("GFP_KERNEL_ACCOUNT", GFP_KERNEL_ACCOUNT),
    ("GFP_KERNEL", GFP_KERNEL),
    ("GFP_NOFS", GFP_NOFS),
    ("GFP_ATOMIC", GFP_ATOMIC),
    ("GFP_NOIO", GFP_NOIO),
    ("GFP_NOWAIT", GFP_NOWAIT),
    ("GFP_DMA", GFP_DMA),
    ("GFP_DMA32", GFP_DMA32),
    ("__GFP_RECLAIM", __GFP_RECLAIM),
];

impl Flags {
    /// No flag at all.
    pub const EMPTY: Flags = Flags(0);

    const fn or(self, other: Flags) -> Flags {
        Flags(self.0 | other.0)
    }

    const fn minus(self, other: Flags) -> Flags {
        Flags(self.0 & !other.0)
    }

    /// The bits as Linux 6.18 numbers them.
    #[inline]
    pub const fn bits(self) -> u32 {
        self.0
    }

    /// Flags from Linux's bits. Unknown bits are kept: they mean nothing here and do no harm.
    #[inline]
    pub const fn from_bits(bits: u32) -> Flags {
        Flags(bits)
    }

    /// Are all of `other` set?
    #[inline]
    pub const fn contains(self, other: Flags) -> bool {
        self.0 & other.0 == other.0
    }

    /// Is any of `other` set?
    #[inline]
    pub const fn intersects(self, other: Flags) -> bool {
        self.0 & other.0 != 0
    }

    /// The flag or composite of this name (`GFP_KERNEL`, `__GFP_ZERO`), as perf prints it.
    pub fn from_name(name: &str) -> Option<Flags> {
        COMPOSITE
            .iter()
            .chain(SINGLE)
            .find(|(n, _)| *n == name)
            .map(|&(_, f)| f)
    }

    /// The highest zone that may serve this (`gfp_zone()`).
    #[inline]
    pub const fn zone_type(self) -> ZoneType {
        if self.contains(__GFP_DMA) {
            ZoneType::Dma
        } else if self.contains(__GFP_DMA32) {
            ZoneType::Dma32
        } else if self.contains(__GFP_HIGHMEM.or(__GFP_MOVABLE)) {
            ZoneType::Movable
        } else {
            ZoneType::Normal
        }
    }

    /// The mobility of what is allocated (`gfp_migratetype()`).
    #[inline]
    pub const fn migratetype(self) -> MigrateType {
        if self.contains(__GFP_MOVABLE) {
            MigrateType::Movable
        } else if self.contains(__GFP_RECLAIMABLE) {
            MigrateType::Reclaimable
        } else {
            MigrateType::Unmovable
        }
    }

    /// May the allocation sleep (`gfpflags_allow_blocking()`)?
    #[inline]
    pub const fn allow_blocking(self) -> bool {
        self.contains(__GFP_DIRECT_RECLAIM)
    }
}

impl BitOr for Flags {
    type Output = Flags;
    #[inline]
    fn bitor(self, other: Flags) -> Flags {
        self.or(other)
    }
}

impl BitOrAssign for Flags {
    #[inline]
    fn bitor_assign(&mut self, other: Flags) {
        self.0 |= other.0;
    }
}

impl BitAnd for Flags {
    type Output = Flags;
    #[inline]
    fn bitand(self, other: Flags) -> Flags {
        Flags(self.0 & other.0)
    }
}

impl Not for Flags {
    type Output = Flags;
    #[inline]
    fn not(self) -> Flags {
        Flags(!self.0)
    }
}

impl fmt::Display for Flags {
    /// As Linux prints them: composites first, `|` between, an unknown rest in hex, `none` for none.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rest = *self;
        let mut first = true;
        for &(name, flag) in COMPOSITE.iter().chain(SINGLE) {
            if rest.contains(flag) {
                write!(f, "{}{name}", if first { "" } else { "|" })?;
                first = false;
                rest = rest.minus(flag);
            }
        }
        match (first, rest.0) {
            (true, 0) => f.write_str("none"),
            (_, 0) => Ok(()),
            (true, bits) => write!(f, "{bits:#x}"),
            (false, bits) => write!(f, "|{bits:#x}"),
        }
    }
}

impl fmt::Debug for Flags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use std::string::ToString;

    #[test]
    fn names_go_round() {
        for &(name, flag) in COMPOSITE.iter().chain(SINGLE) {
            assert_eq!(Flags::from_name(name), Some(flag), "{name}");
            let mut back = Flags::EMPTY;
            for part in flag.to_string().split('|') {
                back |= Flags::from_name(part).unwrap();
            }
            assert_eq!(back, flag, "{name}");
        }
        assert_eq!(
            (GFP_HIGHUSER_MOVABLE | __GFP_COMP).to_string(),
            "GFP_HIGHUSER_MOVABLE|__GFP_COMP"
        );
        assert_eq!(Flags::EMPTY.to_string(), "none");
        assert_eq!(Flags::from_bits(1 << 31).to_string(), "0x80000000");
    }

    #[test]
    fn zones_and_mobility() {
        assert_eq!(GFP_KERNEL.zone_type(), ZoneType::Normal);
        assert_eq!(GFP_DMA.zone_type(), ZoneType::Dma);
        assert_eq!((GFP_KERNEL | __GFP_DMA32).zone_type(), ZoneType::Dma32);
        assert_eq!(GFP_HIGHUSER.zone_type(), ZoneType::Normal);
        assert_eq!(GFP_HIGHUSER_MOVABLE.zone_type(), ZoneType::Movable);
        assert_eq!(GFP_HIGHUSER_MOVABLE.migratetype(), MigrateType::Movable);
        assert_eq!(
            (GFP_KERNEL | __GFP_RECLAIMABLE).migratetype(),
            MigrateType::Reclaimable
        );
        assert!(!GFP_ATOMIC.allow_blocking() && GFP_KERNEL.allow_blocking());
    }
}
