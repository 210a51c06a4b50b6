//! Page frame numbers, physical addresses and the sizes that everything is counted in.

use core::fmt;

/// log2 of the page size.
pub const PAGE_SHIFT: u32 = 12;
/// Bytes in a page.
pub const PAGE_SIZE: usize = 1 << PAGE_SHIFT;
/// The largest order the page allocator hands out: 1024 pages, 4 MiB.
pub const MAX_ORDER: usize = 10;
/// The order of a pageblock, the unit of mobility: 512 pages, 2 MiB.
pub const PAGEBLOCK_ORDER: usize = 9;
/// Pages in a pageblock.
pub const PAGEBLOCK_PAGES: u32 = 1 << PAGEBLOCK_ORDER;
/// One past the largest page frame number: 16 TiB of physical address space. Links between
/// descriptors are 32-bit page frame numbers, and the last one means "none".
pub const MAX_PFN: u32 = u32::MAX;

/// A page frame number: a physical address in pages.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
#[repr(transparent)]
pub struct Pfn(pub u32);

impl Pfn {
    /// No page: the end of a list.
    pub const NONE: Pfn = Pfn(u32::MAX);

    /// The frame that holds this physical address.
    #[inline]
    pub const fn containing(phys: PhysAddr) -> Pfn {
        Pfn((phys.0 >> PAGE_SHIFT) as u32)
    }

    /// The physical address of the frame's first byte.
    #[inline]
    pub const fn phys(self) -> PhysAddr {
        PhysAddr((self.0 as u64) << PAGE_SHIFT)
    }

    /// Is this the first frame of a naturally aligned block of `order`?
    #[inline]
    pub const fn is_aligned(self, order: usize) -> bool {
        self.0 & ((1 << order) - 1) == 0
    }

    /// The first frame of the block of `order` that this frame lies in.
    #[inline]
    pub const fn align_down(self, order: usize) -> Pfn {
        Pfn(self.0 & !((1u32 << order) - 1))
    }

    /// The block that this one of `order` merges with.
    #[inline]
    pub const fn buddy(self, order: usize) -> Pfn {
        Pfn(self.0 ^ (1 << order))
    }

    /// The frame `pages` further on.
    #[inline]
    pub const fn add(self, pages: u32) -> Pfn {
        Pfn(self.0 + pages)
    }
}

impl fmt::Debug for Pfn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if *self == Pfn::NONE {
            f.write_str("pfn none")
        } else {
            write!(f, "pfn {:#x}", self.0)
        }
    }
}

/// A physical address in bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct PhysAddr(pub u64);

impl fmt::Debug for PhysAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "phys {:#x}", self.0)
    }
}
