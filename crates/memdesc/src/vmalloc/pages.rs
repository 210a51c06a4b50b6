//! An area's pages: had one by one or in larger blocks, listed, mapped; and given back.

use core::ptr::NonNull;

use super::area::{Want, nested};
use crate::address::{PAGE_SHIFT, PAGE_SIZE, Pfn};
use crate::desc::{VMAREA_INLINE, VmArea, VmAreaKind};
use crate::error::AllocError;
use crate::gfp::Flags;
use crate::memcg::area_stat;
use crate::memmap::{PageType, Word};
use crate::mm::{BuiltIn, Mm};
use crate::owner::DescPtr;
use crate::platform::{FaultPoint, Platform};
use crate::slab::kmalloc::{CLASSES, class_of, large_order};
use crate::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// Pages taken in one hold of a CPU's list (`vm_area_alloc_pages`).
const BULK: usize = 100;

impl<P: Platform> Mm<P> {
    /// Gives a new area its pages, maps them, and makes it live. If it fails, what the area has by then is in it.
    pub(super) fn fill_area(
        &self,
        area: NonNull<VmArea>,
        want: &Want,
        gfp: Flags,
    ) -> Result<(), AllocError> {
        self.new_list(area, want.pages >> want.order, want, gfp)?;
        self.get_pages(area, want, gfp)?;
        self.map_area(area)?;
        self.publish_area(area);
        Ok(())
    }

    /// The same with pages of somebody else's.
    pub(super) fn borrow_pages(
        &self,
        area: NonNull<VmArea>,
        pages: &[Pfn],
    ) -> Result<(), AllocError> {
        // SAFETY: the caller's, and new.
        let desc = unsafe { area.as_ref() };
        let want = Want {
            kind: VmAreaKind::Vmap,
            pages: pages.len(),
            order: 0,
            lead: 0,
            caller: desc.caller(),
        };
        self.new_list(area, pages.len(), &want, crate::gfp::GFP_KERNEL)?;
        for &pfn in pages {
            // SAFETY: the list has room for all of them.
            unsafe { desc.push_block(pfn) };
        }
        self.map_area(area)?;
        self.publish_area(area);
        Ok(())
    }

    /// A list for so many blocks: 4 bytes each, in the descriptor if they fit. A list of more than kmalloc has in one piece is itself an area.
    fn new_list(
        &self,
        area: NonNull<VmArea>,
        blocks: usize,
        want: &Want,
        gfp: Flags,
    ) -> Result<(), AllocError> {
        if blocks <= VMAREA_INLINE {
            return Ok(());
        }
        let bytes = blocks * size_of::<AtomicU32>();
        let list = self.kvmalloc_for(bytes, nested(gfp), want.caller)?;
        let (counter, n) = self.list_counter(list, bytes);
        counter.fetch_add(n, Ordering::Relaxed);
        // SAFETY: new, and the caller's; the memory is long enough, aligned to 8, and freed with the last page.
        unsafe { area.as_ref().set_list(list.as_ptr().cast()) };
        Ok(())
    }

    /// Where the ledger counts a list, and as how much.
    fn list_counter(&self, list: NonNull<u8>, bytes: usize) -> (&AtomicU64, u64) {
        let (which, n) = self.kvmalloc_cost(list, bytes);
        (&self.vmalloc.lists[which], n)
    }

    /// What memory of [`kvmalloc`](Self::kvmalloc) costs that users do not have: 0 and bytes of slab objects, 1 and pages of large kmalloc, or 2 and pages of
    /// vmalloc.
    pub(crate) fn kvmalloc_cost(&self, ptr: NonNull<u8>, bytes: usize) -> (usize, u64) {
        if self.is_vmalloc_addr(ptr.as_ptr()) {
            return (2, bytes.div_ceil(PAGE_SIZE) as u64);
        }
        match class_of(bytes) {
            Some(class) => (0, CLASSES[class] as u64),
            None => (1, large_order(bytes).map_or(0, |order| 1 << order)),
        }
    }

    fn get_pages(&self, area: NonNull<VmArea>, want: &Want, gfp: Flags) -> Result<(), AllocError> {
        let kind = PageType::Vmalloc;
        // SAFETY: the caller's, and new.
        let desc = unsafe { area.as_ref() };
        let address = self.pages.phys(area.as_ptr().cast());
        let own = |pfn: Pfn, word: Word| {
            // The block's buddy is kept, and holds the area's address while it is ours.
            self.pages.map.buddy_at(word.desc()).set_address(address);
            self.pages.map.publish_block(pfn, word.to_owned(kind));
            // SAFETY: the list has room for all that is wanted, and no more are taken.
            unsafe { desc.push_block(pfn) };
        };
        while desc.pages() < want.pages {
            let first = desc.pages();
            if want.order == 0 {
                let n = (want.pages - first).min(BULK);
                self.pages
                    .alloc_bulk(kind, gfp, n, |block| own(block.pfn, block.word));
                for index in first..desc.pages() {
                    // SAFETY: the area is ours.
                    if let Some((pfn, _)) = unsafe { desc.page(index) } {
                        self.pages.note_alloc_by(kind, pfn, 0, want.caller);
                    }
                }
                if desc.pages() > first {
                    continue;
                }
            }
            // Nothing in this CPU's list: one by the ordinary way, which refills it.
            let block = self.pages.alloc_block(kind, gfp, want.order, None, self)?;
            self.pages
                .note_alloc_by(kind, block.pfn, want.order, want.caller);
            own(block.pfn, block.word);
        }
        Ok(())
    }

    /// Has the platform map the area's pages, run by run.
    fn map_area(&self, area: NonNull<VmArea>) -> Result<(), AllocError> {
        let platform = &self.pages.platform;
        // SAFETY: the caller's, and new.
        let desc = unsafe { area.as_ref() };
        let start = self.vmalloc.mapped(desc).0.addr();
        // SAFETY: as above.
        let page = |index| unsafe { desc.page(index) };
        let mut done = 0;
        while let Some((pfn, mut run)) = page(done) {
            while let Some((next, more)) = page(done + run)
                && next == pfn.add(run as u32)
            {
                run += more;
            }
            if platform.should_fail(FaultPoint::Vmap) {
                return Err(AllocError::Injected);
            }
            crate::inject::point("vmalloc: about to be mapped");
            platform.vmap(start + (done << PAGE_SHIFT), pfn, run)?;
            done += run;
        }
        Ok(())
    }

    /// Takes away the area's translations, its pages if they are its own, and its list.
    pub(super) fn empty_area(&self, area: NonNull<VmArea>) {
        // SAFETY: the caller's: claimed, or not live yet.
        let desc = unsafe { area.as_ref() };
        let (start, bytes) = self.vmalloc.mapped(desc);
        let pages = desc.pages();
        if pages > 0 {
            let start = start.addr();
            self.pages.platform.vunmap(start, start + bytes);
            crate::inject::point("vmalloc: unmapped");
        }
        self.uncharge_area(desc);
        if desc.kind() != VmAreaKind::Vmap {
            let mut index = 0;
            // SAFETY: as above.
            while let Some((pfn, block)) = unsafe { desc.page(index) } {
                let word = self.pages.map.word(pfn).load_owned();
                self.take_back(self.pages.free_path(), pfn, word);
                index += block;
            }
        }
        crate::inject::point("vmalloc: empty");
        self.free_list(desc);
    }

    /// Whoever is charged for the area no longer is. Of an area that is the caller's.
    pub(super) fn uncharge_area(&self, desc: &VmArea) {
        let memcg = desc.take_memcg();
        if memcg != 0 {
            let bytes = (desc.pages() * PAGE_SIZE) as u64;
            let address = self.vmalloc.mapped(desc).0.addr();
            let of = (Pfn::NONE, Word::ZERO, address);
            self.pages
                .memcg_uncharge(memcg, bytes, area_stat(desc.kind()), of);
        }
    }

    fn free_list(&self, desc: &VmArea) {
        let Some(list) = NonNull::new(desc.list().cast::<u8>()) else {
            return;
        };
        // How long it is said when it was made: the area may not have got all its pages.
        let blocks = self.vmalloc.planned(desc) >> desc.order();
        let (counter, n) = self.list_counter(list, blocks * size_of::<AtomicU32>());
        counter.fetch_sub(n, Ordering::Relaxed);
        // SAFETY: it needs none any more, and what is null is not freed again.
        unsafe { desc.set_list(core::ptr::null_mut()) };
        // SAFETY: from `new_list`, and nobody else knows of it.
        unsafe { self.kvfree(list) };
    }

    /// The area whose page this is, by the buddy that its block kept. `None` for pages on their way out.
    ///
    /// What comes out lies in a slab of such descriptors, whatever happens meanwhile; that it is this page's is for those to know who keep it.
    pub(crate) fn vm_area_of(&self, word: Word) -> Option<DescPtr<VmArea>> {
        // Descriptors of slabs are type-stable as long as we read.
        let _read = crate::rcu::read_lock(self.rcu());
        let address = self.pages.map.buddy_at(word.desc()).address();
        // Links of a block that is free by now can look like any address.
        let pfn = u32::try_from(address.0 >> PAGE_SHIFT).ok()?;
        let found = self.pages.map.lookup(Pfn(pfn))?;
        if found.word.kind() != PageType::Slab {
            return None;
        }
        let cache = self.pages.map.slab_at(found.word.desc()).cache();
        let wanted = NonNull::from(self.built_in(BuiltIn::VmArea));
        let area = self.pages.map.virt(address).cast::<VmArea>();
        DescPtr::new(area).filter(|_| cache == wanted)
    }
}
