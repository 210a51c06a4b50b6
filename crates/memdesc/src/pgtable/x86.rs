//! The types of the `x86_64` crate: page tables' frames from this memory manager for the crate's own mappers, and its flags and
//! addresses for ours.

use x86_64::structures::paging::{
    FrameAllocator, FrameDeallocator, Page, PageSize, PageTableFlags, PhysFrame, Size2MiB, Size4KiB,
};
use x86_64::{PhysAddr, VirtAddr};

use super::tables::PageTables;
use super::{Entry, Prot, Translation};
use crate::address::Pfn;
use crate::error::AllocError;
use crate::gfp::Flags;
use crate::mm::Mm;
use crate::platform::Platform;

// The format is the crate's.
const _: () = {
    assert!(Prot::WRITE.bits() == PageTableFlags::WRITABLE.bits());
    assert!(Prot::USER.bits() == PageTableFlags::USER_ACCESSIBLE.bits());
    assert!(Prot::ACCESSED.bits() == PageTableFlags::ACCESSED.bits());
    assert!(Prot::DIRTY.bits() == PageTableFlags::DIRTY.bits());
    assert!(Prot::GLOBAL.bits() == PageTableFlags::GLOBAL.bits());
    assert!(Prot::NO_EXECUTE.bits() == PageTableFlags::NO_EXECUTE.bits());
    assert!(Entry::leaf(Pfn(0), false, Prot::READ).bits() == PageTableFlags::PRESENT.bits());
};

impl From<PageTableFlags> for Prot {
    fn from(flags: PageTableFlags) -> Prot {
        Prot::from_bits(flags.bits())
    }
}

impl From<Prot> for PageTableFlags {
    fn from(prot: Prot) -> PageTableFlags {
        PageTableFlags::from_bits_retain(prot.bits())
    }
}

impl From<Pfn> for PhysFrame<Size4KiB> {
    fn from(pfn: Pfn) -> Self {
        PhysFrame::containing_address(PhysAddr::new(pfn.phys().0))
    }
}

impl From<PhysFrame<Size4KiB>> for Pfn {
    fn from(frame: PhysFrame<Size4KiB>) -> Pfn {
        Pfn::containing(crate::address::PhysAddr(frame.start_address().as_u64()))
    }
}

/// Frames for page tables: each a page under a `ptdesc`. What the crate's mappers (`OffsetPageTable` and others) build their tables of.
///
/// # Examples
///
/// ```
/// use memdesc::{Config, Mm, gfp::{GFP_KERNEL, __GFP_ZERO}, pgtable::Frames};
/// use memdesc_host::Host;
/// use x86_64::{VirtAddr, structures::paging::{*, mapper::Mapper}};
///
/// let (host, ram) = Host::small(16384)?;
/// let mm = Mm::new(host, &Config::default(), &ram)?;
/// let root = mm.alloc_page_table(GFP_KERNEL | __GFP_ZERO, 0)?;
/// let page = mm.alloc_pages(GFP_KERNEL, 0)?;
/// // SAFETY: the root is an empty table of ours, and the direct map starts where the platform says.
/// let mut mapper = unsafe {
///     let table = &mut *mm.page_address(root).cast::<PageTable>();
///     OffsetPageTable::new(table, VirtAddr::from_ptr(memdesc::Platform::direct_map(mm.platform())))
/// };
/// let at = Page::<Size4KiB>::containing_address(VirtAddr::new(0x40_0000));
/// let flags = PageTableFlags::PRESENT | PageTableFlags::WRITABLE;
/// // SAFETY: nobody runs on these tables.
/// unsafe { mapper.map_to(at, page.into(), flags, &mut Frames(&mm)).unwrap().ignore() };
/// assert_eq!(mapper.translate_page(at).unwrap(), page.into());
/// assert_eq!(mm.pages_of(memdesc::PageType::PageTable), 4);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Frames<'m, P: Platform>(pub &'m Mm<P>);

// SAFETY: the frames are pages that the page allocator hands out once.
unsafe impl<P: Platform> FrameAllocator<Size4KiB> for Frames<'_, P> {
    fn allocate_frame(&mut self) -> Option<PhysFrame<Size4KiB>> {
        let flags = crate::gfp::GFP_KERNEL | crate::gfp::__GFP_ZERO;
        self.0.alloc_page_table(flags, 0).ok().map(Into::into)
    }
}

impl<P: Platform> FrameDeallocator<Size4KiB> for Frames<'_, P> {
    unsafe fn deallocate_frame(&mut self, frame: PhysFrame<Size4KiB>) {
        // After a grace period: somebody may still walk the table.
        self.0.free_page_rcu(frame.into());
    }
}

impl<P: Platform> PageTables<'_, P> {
    /// [`map`](Self::map) in the crate's types: a page of 4 KiB or of 2 MiB. [`AllocError::BadOrder`] for one of 1 GiB.
    ///
    /// # Errors
    ///
    /// As there.
    ///
    /// # Examples
    ///
    /// ```
    /// use memdesc::{Config, Mm, gfp::GFP_KERNEL, pgtable::PageTables};
    /// use memdesc_host::Host;
    /// use x86_64::{PhysAddr, VirtAddr, structures::paging::*};
    ///
    /// let (host, ram) = Host::small(16384)?;
    /// let mm = Mm::new(host, &Config::default(), &ram)?;
    /// let tables = PageTables::new(&mm, GFP_KERNEL)?;
    /// let huge = mm.alloc_pages(GFP_KERNEL, 9)?;
    /// let frame = PhysFrame::<Size2MiB>::from_start_address(PhysAddr::new(huge.phys().0)).unwrap();
    /// let page = Page::<Size2MiB>::containing_address(VirtAddr::new(0x4000_0000));
    /// tables.map_frame(page, frame, PageTableFlags::WRITABLE, GFP_KERNEL)?;
    /// let there = tables.translate_addr(VirtAddr::new(0x4000_0000 + 12345)).unwrap();
    /// assert_eq!(there.as_u64(), huge.phys().0 + 12345);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn map_frame<S: PageSize>(
        &self,
        at: Page<S>,
        frame: PhysFrame<S>,
        flags: PageTableFlags,
        gfp: Flags,
    ) -> Result<(), AllocError> {
        let level = match S::SIZE {
            Size4KiB::SIZE => 1,
            Size2MiB::SIZE => 2,
            _ => return Err(AllocError::BadOrder),
        };
        let phys = crate::address::PhysAddr(frame.start_address().as_u64());
        let addr = at.start_address().as_u64();
        self.map(addr, Pfn::containing(phys), level, flags.into(), gfp)
    }

    /// [`translate`](Self::translate) in the crate's types.
    pub fn translate_addr(&self, at: VirtAddr) -> Option<PhysAddr> {
        let Translation { pfn, .. } = self.translate(at.as_u64())?;
        Some(PhysAddr::new(pfn.phys().0 | at.as_u64() & 0xfff))
    }
}
