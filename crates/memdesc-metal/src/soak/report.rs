//! Who is told of free memory, and does with it what a hypervisor may: it holds something else afterwards. Whoever had a reported block in his hands
//! would find that in it; who asks for zeroed memory must not.

use core::sync::atomic::{AtomicU64, Ordering};

use memdesc::{NotReported, PAGE_SIZE, Pfn, Reported};

use super::things::SCRIBBLE;
use crate::memory;

/// Reports, and those of them that were refused.
static REPORTS: AtomicU64 = AtomicU64::new(0);

/// These blocks are free. One report is refused, one reads zero, two read anything.
pub(crate) fn report(blocks: &[(Pfn, usize)]) -> Result<Reported, NotReported> {
    let nth = REPORTS.fetch_add(1, Ordering::Relaxed);
    let Some(mm) = memory::mm() else {
        return Err(NotReported);
    };
    let (byte, result) = match nth % 8 {
        0 => (SCRIBBLE, Err(NotReported)),
        1..=3 => (0, Ok(Reported::Zeroed)),
        _ => (SCRIBBLE, Ok(Reported::Unknown)),
    };
    for &(pfn, order) in blocks {
        // SAFETY: free, and nobody's before this returns.
        unsafe {
            mm.page_address(pfn).write_bytes(byte, PAGE_SIZE << order);
        }
    }
    result
}
