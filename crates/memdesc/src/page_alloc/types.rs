//! The small vocabulary of the page allocator: zones by kind, mobility by kind.

/// The kinds of zone, lowest first. A request for one may be served from any below it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(u8)]
pub enum ZoneType {
    /// The first 16 MiB: old devices.
    Dma = 0,
    /// Below 4 GiB: devices with 32-bit addresses.
    Dma32 = 1,
    /// Ordinary memory.
    Normal = 2,
    /// Only what can be moved or reclaimed.
    Movable = 3,
}

impl ZoneType {
    /// How many kinds there are.
    pub const COUNT: usize = 4;
    /// All of them, lowest first.
    pub const ALL: [ZoneType; 4] = [
        ZoneType::Dma,
        ZoneType::Dma32,
        ZoneType::Normal,
        ZoneType::Movable,
    ];

    /// The name in `/proc/buddyinfo`.
    pub const fn name(self) -> &'static str {
        match self {
            ZoneType::Dma => "DMA",
            ZoneType::Dma32 => "DMA32",
            ZoneType::Normal => "Normal",
            ZoneType::Movable => "Movable",
        }
    }
}

/// Mobility: pages that can be moved are kept apart from those that cannot, a pageblock at a time.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
pub enum MigrateType {
    /// Stays where it is until its owner frees it.
    Unmovable = 0,
    /// Can be moved or reclaimed.
    Movable = 1,
    /// Can be reclaimed by a shrinker, not moved.
    Reclaimable = 2,
    /// Kept for high-order allocations that may not sleep.
    HighAtomic = 3,
}

impl MigrateType {
    /// How many kinds there are.
    pub const COUNT: usize = 4;
    /// How many of them have per-CPU lists (`MIGRATE_PCPTYPES`).
    pub const PCP_TYPES: usize = 3;
    /// All of them.
    pub const ALL: [MigrateType; 4] = [
        MigrateType::Unmovable,
        MigrateType::Movable,
        MigrateType::Reclaimable,
        MigrateType::HighAtomic,
    ];

    /// The kind with this number (the `migratetype=` of Linux's tracepoints).
    pub const fn from_index(index: usize) -> Option<MigrateType> {
        if index < Self::COUNT {
            Some(Self::ALL[index])
        } else {
            None
        }
    }

    /// The name in `/proc/pagetypeinfo`.
    pub const fn name(self) -> &'static str {
        match self {
            MigrateType::Unmovable => "Unmovable",
            MigrateType::Movable => "Movable",
            MigrateType::Reclaimable => "Reclaimable",
            MigrateType::HighAtomic => "HighAtomic",
        }
    }

    /// Where to look when the own lists are empty, best first (Linux's `fallbacks[][]`).
    pub const fn fallbacks(self) -> &'static [MigrateType] {
        use MigrateType::{HighAtomic, Movable, Reclaimable, Unmovable};
        match self {
            Unmovable => &[Reclaimable, Movable],
            Movable => &[Reclaimable, Unmovable],
            Reclaimable => &[Unmovable, Movable],
            HighAtomic => &[],
        }
    }
}
