//! How far a request may go: watermarks, the discounts of those in need, and lowmem protection.
//!
//! Source: `__zone_watermark_ok`, `gfp_to_alloc_flags`, `setup_per_zone_wmarks`, `setup_per_zone_lowmem_reserve` of Linux 6.12.

use super::zone::Zone;
use crate::config::Config;
use crate::gfp::{self, Flags};
use crate::page_alloc::ZoneType;
use crate::sync::atomic::Ordering;

/// Which mark a request is held to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Mark {
    Min,
    Low,
    /// All memory (`ALLOC_NO_WATERMARKS`).
    None,
}

/// What a request may do, worked out from its flags (`gfp_to_alloc_flags`).
#[derive(Clone, Copy, Debug)]
pub(crate) struct AllocFlags {
    pub(crate) mark: Mark,
    /// `__GFP_HIGH`: half of what lies under the min mark.
    pub(crate) min_reserve: bool,
    /// Cannot sleep and is in need: a quarter more.
    pub(crate) non_block: bool,
    /// May take the blocks kept for atomic high orders.
    pub(crate) highatomic: bool,
}

impl AllocFlags {
    /// For the first attempt: the low mark, no discounts.
    pub(crate) const FIRST: AllocFlags = AllocFlags {
        mark: Mark::Low,
        min_reserve: false,
        non_block: false,
        highatomic: false,
    };

    /// For the slow path.
    pub(crate) fn slow(gfp: Flags, order: usize) -> AllocFlags {
        let min_reserve = gfp.contains(gfp::__GFP_HIGH);
        let blocking = gfp.allow_blocking();
        let non_block = !blocking && min_reserve && !gfp.contains(gfp::__GFP_NOMEMALLOC);
        let mark = if gfp.contains(gfp::__GFP_MEMALLOC) && !gfp.contains(gfp::__GFP_NOMEMALLOC) {
            Mark::None
        } else {
            Mark::Min
        };
        AllocFlags {
            mark,
            min_reserve,
            non_block,
            highatomic: non_block && order > 0,
        }
    }
}

impl Zone {
    /// Is the zone well above its low mark? The fast path's form of [`watermark_ok`](Self::watermark_ok).
    #[inline]
    pub(crate) fn has_headroom(&self, order: usize, highest: ZoneType) -> bool {
        self.headroom.load(Ordering::Relaxed)
            >= self.lowmem_reserve[highest as usize] + (1 << order)
    }

    /// May a request that could be served from `highest` take a block of `order` here (`__zone_watermark_ok`)?
    #[inline]
    pub(crate) fn watermark_ok(&self, order: usize, highest: ZoneType, flags: AllocFlags) -> bool {
        let mut min = match flags.mark {
            Mark::None => return true,
            Mark::Min => {
                self.marks.min + self.marks.boost.load(Ordering::Relaxed).min(self.marks.min)
            }
            Mark::Low => self.marks.low + self.marks.boost.load(Ordering::Relaxed),
        };
        if flags.min_reserve {
            // The boost is for background reclaim; those in need are held to the bare mark.
            min = self.marks.min - self.marks.min / 2;
            if flags.non_block {
                min -= min / 4;
            }
        }
        let mut free = self.free_pages();
        if !flags.highatomic {
            free = free.saturating_sub(self.nr_highatomic.load(Ordering::Relaxed));
        }
        free = free.saturating_sub((1 << order) - 1);
        free > min + self.lowmem_reserve[highest as usize]
    }
}

/// Sets the marks and the lowmem protection of all zones (`setup_per_zone_wmarks`).
pub(crate) fn set_up(zones: &mut [Zone], config: &Config) {
    let lowmem: u64 = zones
        .iter()
        .filter(|z| z.kind != ZoneType::Movable)
        .map(|z| z.managed)
        .sum();
    let min_free_kbytes = config
        .min_free_kbytes
        .unwrap_or_else(|| (lowmem * 4 * 16).isqrt().clamp(128, 262_144));
    let pages_min = min_free_kbytes / 4;
    for zone in zones.iter_mut() {
        let min = if zone.kind == ZoneType::Movable {
            // Kernel allocations cannot come from here: a token mark, as in Linux.
            (zone.managed / 1024).clamp(32, 128).min(zone.managed / 4)
        } else {
            // A machine of a few MiB would be all reserve otherwise.
            (pages_min * zone.managed / lowmem.max(1)).min(zone.managed / 8)
        };
        let step = (min / 4).max(zone.managed * config.watermark_scale_factor / 10_000);
        zone.marks.min = min;
        zone.marks.low = min + step;
        zone.marks.high = min + 2 * step;
    }
    // What a zone keeps from requests that could have been served higher up is in proportion to what is higher up.
    for i in 0..zones.len() {
        let (node, kind) = (zones[i].node, zones[i].kind);
        let mut above = 0;
        for highest in ZoneType::ALL {
            if highest <= kind {
                continue;
            }
            above += zones
                .iter()
                .filter(|z| z.node == node && z.kind == highest)
                .map(|z| z.managed)
                .sum::<u64>();
            let ratio = config
                .lowmem_reserve_ratio
                .get(kind as usize)
                .copied()
                .unwrap_or(0);
            // A ratio of 0 turns the protection off.
            zones[i].lowmem_reserve[highest as usize] = above.checked_div(ratio).unwrap_or(0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn discounts() {
        let high = AllocFlags::slow(gfp::GFP_ATOMIC, 0);
        assert!(high.min_reserve && high.non_block && !high.highatomic);
        assert!(AllocFlags::slow(gfp::GFP_ATOMIC, 2).highatomic);
        let kernel = AllocFlags::slow(gfp::GFP_KERNEL, 0);
        assert!(!kernel.min_reserve && !kernel.non_block);
        let nowait = AllocFlags::slow(gfp::GFP_NOWAIT, 0);
        assert!(
            !nowait.min_reserve && !nowait.non_block,
            "GFP_NOWAIT alone gets no reserve"
        );
        let mem = gfp::GFP_KERNEL | gfp::__GFP_MEMALLOC;
        assert_eq!(AllocFlags::slow(mem, 0).mark, Mark::None);
        assert_eq!(
            AllocFlags::slow(mem | gfp::__GFP_NOMEMALLOC, 0).mark,
            Mark::Min
        );
    }
}
