//! A page of page table as what it is: 512 entries in the direct map. The one place that makes references into them.

use super::entry::AtomicEntry;
use crate::address::Pfn;
use crate::mm::Mm;
use crate::platform::Platform;

/// Entries in a table.
pub(super) const ENTRIES: usize = 512;

impl<P: Platform> Mm<P> {
    /// The entries of a table: a page of this memory manager that was handed out as one, and is not freed before the caller's read
    /// section, or his use of the address space, ends.
    #[inline]
    pub(crate) fn table(&self, pfn: Pfn) -> &[AtomicEntry; ENTRIES] {
        let ptr = self.page_address(pfn).cast::<[AtomicEntry; ENTRIES]>();
        // SAFETY: tables are reached only from roots and through entries that lead to tables, which are pages in the direct map
        // (promise 1), page aligned, accessed as atomics only; they go back after a grace period.
        unsafe { &*ptr }
    }
}
