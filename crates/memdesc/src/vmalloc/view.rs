//! What is where in the vmalloc range: for fault handlers, `/proc/vmallocinfo` and tests.

use core::fmt;
use core::panic::Location;

use crate::address::{PAGE_SHIFT, Pfn};
use crate::desc::{VmArea, VmAreaKind, VmAreaState as State};
use crate::mm::Mm;
use crate::platform::{Context, Platform};
use crate::sync::atomic::Ordering;

/// An area as it was at one moment: a row of the vmallocinfo view.
#[derive(Clone, Copy, Debug)]
pub struct VmAreaView {
    /// The first address that is mapped.
    pub start: usize,
    /// Bytes mapped, from there on; guards are not counted.
    pub size: usize,
    /// The same in pages.
    pub pages: usize,
    /// The order of its blocks.
    pub order: usize,
    /// What it is for.
    pub kind: VmAreaKind,
    /// Its memory is gone, its addresses are kept until a purge.
    pub freed: bool,
    /// Whose kernel stack it is; `None` of one that is kept for the next thread, and of other kinds.
    pub owner: Option<u64>,
    /// Who allocated it.
    pub caller: &'static Location<'static>,
}

impl fmt::Display for VmAreaView {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let end = self.start + self.size;
        write!(f, "{:#x}-{end:#x} {}", self.start, self.kind.name())?;
        if let Some(owner) = self.owner {
            write!(f, " of {owner}")?;
        }
        write!(f, " pages={} {}", self.pages, self.caller)?;
        f.write_str(if self.freed { " unpurged" } else { "" })
    }
}

/// What an address of the vmalloc range is: the answer of [`Mm::explain_address`].
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum AddressInfo {
    /// Not of the range at all.
    NotVmalloc,
    /// Nobody's.
    Hole,
    /// In a live area.
    Area(VmAreaView),
    /// In the guard page before an area: what overflows downwards, a stack, comes here.
    GuardBefore(VmAreaView),
    /// In the guard page after an area.
    GuardAfter(VmAreaView),
    /// In an area that is being made, or was freed: a use after free, if its memory was the caller's.
    Stale(VmAreaView),
    /// The tree is being changed, and this context cannot wait.
    Contended,
}

impl fmt::Display for AddressInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            AddressInfo::NotVmalloc => f.write_str("no vmalloc address"),
            AddressInfo::Hole => f.write_str("nobody's address"),
            AddressInfo::Area(area) => write!(f, "in {area}"),
            AddressInfo::GuardBefore(area) => write!(f, "guard page before {area}"),
            AddressInfo::GuardAfter(area) => write!(f, "guard page after {area}"),
            AddressInfo::Stale(area) => write!(f, "in what was {area}"),
            AddressInfo::Contended => f.write_str("not known: the areas are being changed"),
        }
    }
}

/// The vmalloc range in numbers (the `Vmalloc` lines of `/proc/meminfo`, and what purges did).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VmallocInfo {
    /// Bytes in the range.
    pub total: u64,
    /// Bytes of pages in areas, kernel stacks included, `vmap` not.
    pub used: u64,
    /// The largest hole, in bytes.
    pub largest_hole: u64,
    /// Areas, those that wait for a purge included.
    pub areas: usize,
    /// Bytes of addresses that wait for a purge.
    pub lazy: u64,
    /// So many may wait before a free makes a purge (`lazy_max_pages`).
    pub lazy_max: u64,
    /// Purges so far: flushes of all CPUs' translations.
    pub purges: u64,
}

impl<P: Platform> Mm<P> {
    /// An area as it is now. Of one that is not the caller's the answer may be stale.
    pub fn vm_area_view(&self, area: &VmArea) -> VmAreaView {
        let (start, size) = self.vmalloc.mapped(area);
        VmAreaView {
            start: start.addr(),
            size,
            pages: area.pages(),
            order: area.order(),
            kind: area.kind(),
            freed: area.state() == State::Freed,
            owner: area.owner(),
            caller: area.caller(),
        }
    }

    /// The live area that an address lies in (`find_vm_area`); guards are in none.
    ///
    /// # Context
    ///
    /// As [`explain_address`](Self::explain_address).
    pub fn find_vm_area(&self, addr: usize) -> Option<VmAreaView> {
        match self.explain_address(addr) {
            AddressInfo::Area(area) => Some(area),
            _ => None,
        }
    }

    /// What an address of the vmalloc range is, guard pages included: for a fault handler that wants to say who ran over what.
    ///
    /// # Context
    ///
    /// Any. In a thread, sure to have an answer; elsewhere it does not wait for who changes the areas at the moment.
    pub fn explain_address(&self, addr: usize) -> AddressInfo {
        let Some(page) = self.vmalloc.page_of(addr) else {
            return AddressInfo::NotVmalloc;
        };
        let tree = if self.pages.platform.context() == Context::Task {
            self.areas()
        } else {
            match self.try_areas() {
                Some(tree) => tree,
                None => return AddressInfo::Contended,
            }
        };
        let Some(area) = tree.find(page) else {
            return AddressInfo::Hole;
        };
        let view = self.vm_area_view(area);
        let at = page.checked_sub(area.first_page());
        match area.state() {
            State::New | State::Freed => AddressInfo::Stale(view),
            State::Live => match at {
                None => AddressInfo::GuardBefore(view),
                Some(at) if at as usize >= view.pages => AddressInfo::GuardAfter(view),
                Some(_) => AddressInfo::Area(view),
            },
        }
    }

    /// The page that a vmalloc address leads to (`vmalloc_to_pfn`); `None` if it leads nowhere.
    ///
    /// # Context
    ///
    /// A thread, or under a lock that spins; not an interrupt.
    pub fn vmalloc_to_pfn(&self, addr: *const u8) -> Option<Pfn> {
        let page = self.vmalloc.page_of(addr.addr())?;
        let tree = self.areas();
        let area = tree.find(page)?;
        if area.state() != State::Live {
            return None;
        }
        let index = page.checked_sub(area.first_page())?;
        // SAFETY: live, under the lock of the tree.
        unsafe { area.page(index as usize) }.map(|(pfn, _)| pfn)
    }

    /// Visits the areas by address: the vmallocinfo view. Those that come or go meanwhile may be missed.
    ///
    /// # Context
    ///
    /// As [`vmalloc_to_pfn`](Self::vmalloc_to_pfn). `visit` is called without a lock.
    pub fn for_each_vm_area(&self, mut visit: impl FnMut(VmAreaView)) {
        let mut page = 0;
        loop {
            let view = {
                let tree = self.areas();
                let Some(area) = tree.next(page) else { return };
                page = area.end();
                (area.state() != State::New).then(|| self.vm_area_view(area))
            };
            if let Some(view) = view {
                visit(view);
            }
        }
    }

    /// The range in numbers.
    ///
    /// # Context
    ///
    /// As [`vmalloc_to_pfn`](Self::vmalloc_to_pfn).
    pub fn vmalloc_info(&self) -> VmallocInfo {
        let vmalloc = &self.vmalloc;
        let bytes = |pages: u64| pages << PAGE_SHIFT;
        let (areas, hole) = {
            let tree = self.areas();
            (tree.len(), tree.largest_hole())
        };
        VmallocInfo {
            total: bytes(vmalloc.pages.into()),
            used: bytes(self.pages_of(crate::memmap::PageType::Vmalloc)),
            largest_hole: bytes(hole.into()),
            areas,
            lazy: bytes(vmalloc.lazy_pages.load(Ordering::Relaxed)),
            lazy_max: bytes(vmalloc.lazy_max),
            purges: vmalloc.purges.load(Ordering::Relaxed),
        }
    }

    /// Are the areas as they should be? Says how many there are, or what is wrong. Visits all of them under the lock.
    #[doc(hidden)]
    pub fn check_vm_areas(&self) -> Result<usize, &'static str> {
        self.areas().check()
    }
}
