//! What is said of an access that faulted: which object is the nearest, and on which side of it and how far away it was.
//!
//! Read without a lock, allocating nothing: by a fault handler that may have struck anywhere.

use core::fmt;
use core::panic::Location;

use super::slot::{CacheName, Slot, State};
use crate::address::{PAGE_SHIFT, Pfn};
use crate::memmap::BootSlice;
use crate::mm::Mm;
use crate::platform::Platform;
use crate::report::{Corruption, Track};
use crate::sync::atomic::Ordering;

/// Where the pool is, and its slots: what a fault handler needs. Page 2i + 1 of the pool is that of slot i, the others are guards.
#[derive(Debug)]
pub(crate) struct View {
    /// The address of its first page.
    base: usize,
    /// 0 if there is none.
    bytes: usize,
    slots: BootSlice<Slot>,
}

impl View {
    pub(crate) fn new(base: usize, slots: BootSlice<Slot>) -> View {
        let bytes = super::pool_pages(slots.len()) << PAGE_SHIFT;
        View { base, bytes, slots }
    }

    pub(crate) fn again(&self) -> View {
        View {
            base: self.base,
            bytes: self.bytes,
            slots: self.slots.again(),
        }
    }

    pub(crate) fn slots(&self) -> &[Slot] {
        &self.slots
    }

    /// Is this address in the pool (`is_kfence_address`)?
    #[inline]
    pub(crate) fn contains(&self, address: usize) -> bool {
        address.wrapping_sub(self.base) < self.bytes
    }

    /// The place in the pool of the page that this address is in.
    pub(crate) fn page_of(&self, address: usize) -> Option<usize> {
        let offset = address.wrapping_sub(self.base);
        (offset < self.bytes).then_some(offset >> PAGE_SHIFT)
    }

    /// The slot whose page this is.
    pub(crate) fn slot_at(&self, page: usize) -> Option<(usize, &Slot)> {
        if page.is_multiple_of(2) {
            return None;
        }
        self.slots.get(page / 2).map(|slot| (page / 2, slot))
    }

    /// Whose access this was; `None` if the address is not in the pool.
    pub(crate) fn fault(&self, address: usize, write: bool, ip: usize) -> Option<KfenceFault> {
        let page = self.page_of(address)?;
        let mut fault = KfenceFault {
            what: Corruption::InvalidAccess,
            address,
            write,
            ip,
            object: None,
        };
        if let Some((index, slot)) = self.slot_at(page) {
            if slot.state() != State::Unused && slot.size() > 0 {
                fault.what = Corruption::UseAfterFree;
                fault.object = Some(KfenceObject::new(index, slot));
            }
            return Some(fault);
        }
        // A guard: of the objects left and right of it that are in use the nearer one was overrun.
        let beside = [page.checked_sub(1), Some(page + 1)];
        let beside = beside.into_iter().flatten().filter_map(|p| self.slot_at(p));
        let live = beside.filter(|(_, slot)| {
            let state = slot.state();
            state == State::InUse || state == State::Deferred || state == State::Waiting
        });
        let nearest = live
            .map(|(index, slot)| KfenceObject::new(index, slot))
            .min_by_key(|object| object.distance(address).unsigned_abs());
        if let Some(object) = nearest {
            fault.what = Corruption::OutOfBounds;
            fault.object = Some(object);
        }
        Some(fault)
    }
}

/// An object of the guarded pool, as a report has it.
#[derive(Clone, Copy, Debug)]
pub struct KfenceObject {
    /// Which of the pool's places it is in.
    pub index: usize,
    /// Its address.
    pub address: usize,
    /// Bytes that were asked for.
    pub size: usize,
    /// Who allocated it.
    pub allocated: Option<Track>,
    /// Who freed it, if it is free.
    pub freed: Option<Track>,
    name: CacheName,
}

impl KfenceObject {
    fn new(index: usize, slot: &Slot) -> KfenceObject {
        let (allocated, freed) = slot.tracks();
        KfenceObject {
            index,
            address: slot.at(),
            size: slot.size(),
            allocated,
            freed,
            name: slot.name(),
        }
    }

    /// The cache that it is from.
    pub fn cache(&self) -> &str {
        self.name.as_str()
    }

    /// How far an address is out of its bounds: negative, so many bytes before its first; positive, so many behind its last, 1 for the byte
    /// next to it; 0 for one of its own.
    pub fn distance(&self, address: usize) -> isize {
        let end = self.address.wrapping_add(self.size);
        if address < self.address {
            -((self.address - address) as isize)
        } else if address >= end {
            (address - end) as isize + 1
        } else {
            0
        }
    }
}

/// An access to the guarded pool that faulted.
#[derive(Clone, Copy, Debug)]
pub struct KfenceFault {
    /// [`Corruption::OutOfBounds`], [`Corruption::UseAfterFree`], or [`Corruption::InvalidAccess`] where no object is near.
    pub what: Corruption,
    /// What was touched.
    pub address: usize,
    /// By a write?
    pub write: bool,
    /// By the instruction at this address, as the fault handler has it; 0 if it does not know.
    pub ip: usize,
    /// The object whose bounds were left, or that was freed.
    pub object: Option<KfenceObject>,
}

impl fmt::Display for KfenceFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let how = if self.write { "write to" } else { "read of" };
        let what = match self.what {
            Corruption::OutOfBounds => "out-of-bounds",
            Corruption::UseAfterFree => "use-after-free",
            _ => "invalid",
        };
        write!(f, "{what} {how} {:#x}", self.address)?;
        if self.ip != 0 {
            write!(f, " by the code at {:#x}", self.ip)?;
        }
        let Some(object) = &self.object else {
            return f.write_str(", where there is no object");
        };
        let (index, size, cache) = (object.index, object.size, object.cache());
        match object.distance(self.address) {
            0 => write!(f, ", byte {} of", self.address.wrapping_sub(object.address))?,
            n if n < 0 => write!(f, ", {} B left of", -n)?,
            n => write!(f, ", {n} B right of")?,
        }
        write!(
            f,
            " kfence-#{index} [{:#x}, size {size}, cache {cache}]",
            object.address
        )?;
        for (name, track) in [("allocated", object.allocated), ("freed", object.freed)] {
            if let Some(track) = track {
                write!(f, ", {name} by {}", track.location)?;
                if track.stack != crate::report::StackId::NONE {
                    write!(f, " (stack {:#x})", track.stack.bits())?;
                }
            }
        }
        Ok(())
    }
}

impl<P: Platform> Mm<P> {
    /// For a kernel's page fault handler (`kfence_handle_page_fault`): was it the guarded pool that was touched
    /// ([`Config::kfence_objects`](crate::Config::kfence_objects))? Then this reports whose object it was, by
    /// [`Platform::corruption`], makes the page accessible, and says `true`: the access may be made again, and goes through. `ip` is where the
    /// instruction is, 0 if that is not known.
    ///
    /// A guard that was touched is one again once an object beside it comes or goes; the page of a free object once it has been another's.
    ///
    /// # Context
    ///
    /// Any. Takes no lock, allocates nothing.
    #[track_caller]
    pub fn kfence_handle_fault(&self, address: usize, is_write: bool, ip: usize) -> bool {
        let caller = Location::caller();
        let pool = &self.kfence;
        let view = pool.view();
        let (Some(fault), Some(page)) = (view.fault(address, is_write, ip), view.page_of(address))
        else {
            return false;
        };
        pool.bugs.fetch_add(1, Ordering::Relaxed);
        let pfn = Pfn(pool.first().0 + page as u32);
        let mut report = self.report_at(fault.what, pfn, address, caller);
        if let Some(object) = &fault.object {
            report.address = object.address;
            report.cache = Some(object.cache());
            (report.allocated, report.freed) = (object.allocated, object.freed);
        }
        report.kfence = Some(fault);
        self.pages.platform.corruption(&report);
        if page.is_multiple_of(2) {
            pool.opened(page).store(1, Ordering::Relaxed);
        }
        self.pages.platform.kernel_map_pages(pfn, 0, true);
        true
    }
}
