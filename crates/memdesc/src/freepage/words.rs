//! What pages are, for those who cannot ask the memory manager: a platform's fault handler.

use crate::address::Pfn;
use crate::memmap::{Found, MemMap};
use crate::report::PageHistory;
use crate::report::history::History;
use crate::slab::KfenceFault;
use crate::slab::kfence::View;

/// The memory map, to be read by the platform that the memory manager runs on. It is where it is for as long as the memory is.
#[derive(Debug)]
pub struct PageWords(MemMap, View, History);

impl PageWords {
    pub(crate) fn new(map: &MemMap, kfence: &View, history: &History) -> PageWords {
        PageWords(map.again(), kfence.again(), history.again())
    }

    /// Who had a page last, and who gave it back, as [`Mm::page_history`](crate::Mm::page_history) says it.
    ///
    /// # Safety
    ///
    /// As [`lookup`](Self::lookup).
    ///
    /// # Context
    ///
    /// Any: loads.
    pub unsafe fn history(&self, pfn: Pfn) -> Option<PageHistory> {
        self.2.look(pfn).0
    }

    /// Whose object of the guarded pool was touched; `None` for addresses that are not in it. For platforms that end here; those that go on call
    /// [`Mm::kfence_handle_fault`](crate::Mm::kfence_handle_fault).
    ///
    /// # Safety
    ///
    /// As [`lookup`](Self::lookup).
    ///
    /// # Context
    ///
    /// Any: loads.
    pub unsafe fn kfence_fault(
        &self,
        address: usize,
        write: bool,
        ip: usize,
    ) -> Option<KfenceFault> {
        self.1.fault(address, write, ip)
    }

    /// The block that a page belongs to, and its word; `None` for a hole and for what was never handed out. What it says may be stale when
    /// it comes back.
    ///
    /// # Safety
    ///
    /// The memory that was given to the memory manager is still there, and still its: the platform and the manager live.
    ///
    /// # Context
    ///
    /// Any: a few loads.
    pub unsafe fn lookup(&self, pfn: Pfn) -> Option<Found> {
        self.0.lookup(pfn)
    }
}
