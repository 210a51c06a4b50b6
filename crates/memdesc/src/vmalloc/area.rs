//! An area's addresses: found room for, claimed by who frees it, kept until a purge, given back.

use core::panic::Location;
use core::ptr::NonNull;

use super::tree::AreaTree;
use super::{NOT_NESTED, Vmalloc};
use crate::address::PAGE_SHIFT;
use crate::desc::{VmArea, VmAreaKind, VmAreaState as State};
use crate::error::AllocError;
use crate::gfp::Flags;
use crate::lockdep::classes;
use crate::mm::{BuiltIn, Mm};
use crate::platform::{FaultPoint, Holder, Platform};
use crate::report::Corruption;
use crate::sync::SpinGuard;
use crate::sync::atomic::Ordering;

/// Areas removed in one hold of the lock of the tree.
const PURGE_HOLD: usize = 32;

/// What is asked for.
pub(super) struct Want {
    pub(super) kind: VmAreaKind,
    /// To be mapped; a multiple of a block's.
    pub(super) pages: usize,
    pub(super) order: usize,
    /// Guard pages before.
    pub(super) lead: u8,
    pub(super) caller: &'static Location<'static>,
}

/// The flags of memory that an allocation needs for itself.
pub(super) fn nested(gfp: Flags) -> Flags {
    Flags::from_bits(gfp.bits() & !NOT_NESTED)
}

impl Vmalloc {
    /// The first address that is mapped, and how many bytes.
    pub(super) fn mapped(&self, area: &VmArea) -> (*mut u8, usize) {
        (self.at(area.first_page()), area.pages() << PAGE_SHIFT)
    }

    /// How many pages it has when it has all of them.
    pub(super) fn planned(&self, area: &VmArea) -> usize {
        (area.end() - area.first_page() - 1) as usize
    }
}

impl<P: Platform> Mm<P> {
    /// Takes the lock of the tree.
    pub(super) fn areas(&self) -> SpinGuard<'_, AreaTree, Holder<'_, P>> {
        self.vmalloc.tree.lock(Holder::new(
            &self.pages.platform,
            self.pages.rt,
            &classes::VMAP,
        ))
    }

    /// The same if nobody has it. From any context.
    pub(super) fn try_areas(&self) -> Option<SpinGuard<'_, AreaTree, Holder<'_, P>>> {
        self.vmalloc.tree.try_lock(Holder::trying(
            &self.pages.platform,
            self.pages.rt,
            &classes::VMAP,
        ))
    }

    /// The pointer that the owner of an area gets.
    pub(super) fn area_ptr(&self, area: &VmArea) -> Result<NonNull<u8>, AllocError> {
        NonNull::new(self.vmalloc.mapped(area).0).ok_or(AllocError::NoAddressSpace)
    }

    /// A descriptor, and a place in the range (`alloc_vmap_area`). It has no pages yet.
    pub(super) fn new_area(&self, want: &Want, gfp: Flags) -> Result<NonNull<VmArea>, AllocError> {
        // Linux's guard page is after the area; a stack has one on the side it grows to as well.
        let span = want.pages.saturating_add(usize::from(want.lead) + 1);
        let span = u32::try_from(span).unwrap_or(u32::MAX);
        if span > self.vmalloc.pages {
            return Err(AllocError::NoAddressSpace);
        }
        if self.pages.platform.should_fail(FaultPoint::VmapArea) {
            return Err(AllocError::Injected);
        }
        // Before the lock.
        let core = self.built_in(BuiltIn::VmArea);
        let area = self
            .cache_alloc(core, nested(gfp), want.caller)?
            .cast::<VmArea>();
        // SAFETY: an object of the cache of areas, ours; all fields are atomics, for which every bit pattern is valid.
        unsafe { area.as_ref() }.init(want.kind, want.lead, want.order, want.caller);
        for last in [false, true] {
            if self.place_area(area, span) {
                return Ok(area);
            }
            if !last {
                self.vmalloc_shrink(true);
            }
        }
        self.free_area_desc(area);
        Err(AllocError::NoAddressSpace)
    }

    fn place_area(&self, area: NonNull<VmArea>, span: u32) -> bool {
        // SAFETY: the caller's, from `new_area`.
        let desc = unsafe { area.as_ref() };
        let align = 1u32 << desc.order();
        // What is aligned is the address, wherever the range starts.
        let skew = (self.vmalloc.base.addr() >> PAGE_SHIFT) as u32 & (align - 1);
        let mut tree = self.areas();
        let Some(start) = tree.find_room(span, align, skew) else {
            return false;
        };
        desc.set_place(start, start + span);
        // SAFETY: it lives until it is freed, and is removed before.
        unsafe { tree.insert(area) };
        true
    }

    /// The area has all it needs: from here on it can be found and freed.
    pub(super) fn publish_area(&self, area: NonNull<VmArea>) {
        let tree = self.areas();
        // SAFETY: in the tree, and so alive.
        unsafe { area.as_ref() }.set_state(State::Live);
        drop(tree);
    }

    /// Takes a live area from all others, by the address that its owner was given (`find_unlink_vmap_area`).
    pub(super) fn claim_area(
        &self,
        addr: usize,
        is_right: impl Fn(VmAreaKind) -> bool,
    ) -> Result<NonNull<VmArea>, Corruption> {
        let page = self.vmalloc.page_of(addr).ok_or(Corruption::NotRam)?;
        let tree = self.areas();
        let area = tree.find(page).ok_or(Corruption::NotRam)?;
        match area.state() {
            State::Freed => Err(Corruption::DoubleFree),
            State::New => Err(Corruption::NotRam),
            State::Live if self.vmalloc.mapped(area).0.addr() != addr => Err(Corruption::NotAHead),
            State::Live if !is_right(area.kind()) => Err(Corruption::WrongType),
            State::Live => {
                area.set_state(State::Freed);
                crate::inject::point("vmalloc: claimed");
                Ok(NonNull::from(area))
            }
        }
    }

    /// An area without translations or pages: its addresses wait for a purge.
    pub(super) fn retire_area(&self, area: NonNull<VmArea>) {
        // SAFETY: claimed, and so the caller's; purges see it only after the push.
        let desc = unsafe { area.as_ref() };
        let span = u64::from(desc.end() - desc.start());
        let vmalloc = &self.vmalloc;
        let waiting = vmalloc.lazy_pages.fetch_add(span, Ordering::Relaxed) + span;
        vmalloc.lazy.push(area.as_ptr(), |next| {
            desc.next.store(next, Ordering::Relaxed);
        });
        if waiting > vmalloc.lazy_max {
            self.purge_areas(false);
        }
    }

    /// Lets go of the addresses of freed areas, after all CPUs have forgotten them, in one go (`__purge_vmap_area_lazy`). Says how many areas.
    ///
    /// If somebody else is at it, waits for him or leaves it to him.
    pub(super) fn purge_areas(&self, wait: bool) -> usize {
        let (platform, vmalloc) = (&self.pages.platform, &self.vmalloc);
        if !wait && vmalloc.lazy.is_empty() {
            return 0;
        }
        let purging = if wait {
            let holder = Holder::new(platform, true, &classes::VMAP_PURGE);
            Some(vmalloc.purging.lock(holder))
        } else {
            let holder = Holder::trying(platform, true, &classes::VMAP_PURGE);
            vmalloc.purging.try_lock(holder)
        };
        let Some(purging) = purging else { return 0 };
        let all = vmalloc.lazy.take();
        crate::inject::point("vmalloc: about to be purged");
        if all.is_null() {
            return 0;
        }
        let (mut start, mut end) = (u32::MAX, 0);
        let mut at = all;
        // SAFETY: what was taken from the stack is ours, and linked as it was pushed.
        while let Some(area) = unsafe { at.as_ref() } {
            start = start.min(area.start());
            end = end.max(area.end());
            at = area.next.load(Ordering::Relaxed);
        }
        platform.flush_tlb_kernel_range(vmalloc.at(start).addr(), vmalloc.at(end).addr());
        vmalloc.purges.fetch_add(1, Ordering::Relaxed);
        let mut at = all;
        while !at.is_null() {
            let mut tree = self.areas();
            for _ in 0..PURGE_HOLD {
                let Some(area) = NonNull::new(at) else { break };
                // SAFETY: as above; its descriptor goes later.
                at = unsafe { area.as_ref() }.next.load(Ordering::Relaxed);
                tree.remove(area);
            }
        }
        drop(purging);
        let (mut at, mut n) = (all, 0);
        while let Some(area) = NonNull::new(at) {
            // SAFETY: as above; read before the descriptor goes.
            let desc = unsafe { area.as_ref() };
            at = desc.next.load(Ordering::Relaxed);
            let span = u64::from(desc.end() - desc.start());
            vmalloc.lazy_pages.fetch_sub(span, Ordering::Relaxed);
            self.free_area_desc(area);
            n += 1;
        }
        n
    }

    /// An area that never became live: everything goes, at once.
    pub(super) fn undo_area(&self, area: NonNull<VmArea>) {
        // SAFETY: nobody else's before it is live.
        let desc = unsafe { area.as_ref() };
        let (start, end) = (desc.start(), desc.end());
        self.empty_area(area);
        let (start, end) = (self.vmalloc.at(start).addr(), self.vmalloc.at(end).addr());
        self.pages.platform.flush_tlb_kernel_range(start, end);
        self.areas().remove(area);
        self.free_area_desc(area);
    }

    fn free_area_desc(&self, area: NonNull<VmArea>) {
        let core = self.built_in(BuiltIn::VmArea);
        let path = self.pages.free_path();
        self.cache_free(path, core, area.cast(), false, Location::caller());
    }
}
