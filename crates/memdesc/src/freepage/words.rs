//! What pages are, for those who cannot ask the memory manager: a platform's fault handler.

use crate::address::Pfn;
use crate::memmap::{Found, MemMap};

/// The memory map, to be read by the platform that the memory manager runs on. It is where it is for as long as the memory is.
#[derive(Debug)]
pub struct PageWords(MemMap);

impl PageWords {
    pub(crate) fn new(map: &MemMap) -> PageWords {
        PageWords(map.again())
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
