//! The module that the loader brought: memory that is not handed out before its reader is done with it, and is given back then.
//!
//! The loader puts it at the top of memory, where the memory manager lays its memory map. So it is copied down first ([`settle`]), to the beginning of
//! a largest block, and as soon as there is a memory manager its pages are asked for by their numbers ([`Settled::hold`]), before anything else is. Who gets
//! them has them: no page of them was anybody's.

use core::ops::Deref;

use memdesc::{MAX_ORDER, Mm, PAGE_SHIFT, PAGE_SIZE, Pfn};

use crate::log;
use crate::paging::phys_to_virt;
use crate::platform::Metal;
use crate::pvh::{BootInfo, Kind};

/// Bytes of a largest block.
const BLOCK: u64 = (PAGE_SIZE as u64) << MAX_ORDER;
/// ZONE_DMA ends here, which is kept for others.
const DMA_END: u64 = 16 << 20;

/// A module where it stays, in memory that is not taken over yet.
#[derive(Debug)]
pub(crate) struct Settled {
    start: u64,
    bytes: u64,
}

/// Copies the module to where it does not lie in the memory manager's way. Panics if there is no such place.
///
/// # Safety
///
/// Memory is mapped, and is what the loader left it as, but for what lies below `used`. Nobody has taken it over.
pub(crate) unsafe fn settle(boot: &BootInfo, used: u64) -> Option<Settled> {
    let (from, end) = boot.module?;
    let bytes = end - from;
    let start = used.max(DMA_END).next_multiple_of(BLOCK);
    let to_end = start.saturating_add(bytes).next_multiple_of(BLOCK);
    let ram = |start, end| {
        let mut entries = boot.memory.iter().filter(|e| e.kind == Kind::Ram);
        entries.find(|e| e.start <= start && end <= e.end)
    };
    if ram(from, end).is_none() {
        panic!("the module ({from:#x}-{end:#x}) does not lie in memory");
    }
    // As much again is for all else.
    if ram(start, to_end.saturating_add(to_end - start)).is_none() {
        let mib = bytes.div_ceil(1 << 20);
        panic!("the module takes {mib} MiB: this machine is too small for it, give it more memory");
    }
    // SAFETY: both are memory, the caller's promise says that it is mapped and nobody's; they may overlap.
    unsafe { phys_to_virt(start).copy_from(phys_to_virt(from), bytes as usize) };
    log!("module: {bytes} bytes at {from:#x}, moved to {start:#x}");
    Some(Settled { start, bytes })
}

impl Settled {
    /// Its largest blocks.
    fn blocks(&self) -> impl Iterator<Item = Pfn> + use<> {
        let end = self.start + self.bytes;
        (self.start..end)
            .step_by(BLOCK as usize)
            .map(|at| Pfn((at >> PAGE_SHIFT) as u32))
    }

    /// Takes its pages. The first thing that is asked of the memory manager; panics if a page is somebody's.
    pub(crate) fn hold(self, mm: &'static Mm<Metal>) -> Module {
        for block in self.blocks() {
            if let Err(why) = mm.alloc_pages_at(block, MAX_ORDER) {
                panic!(
                    "the module's memory at page {:#x} is somebody's: {why}",
                    block.0
                );
            }
        }
        Module { settled: self, mm }
    }
}

/// The module's bytes, and the pages that they lie in, which are given back with it.
#[derive(Debug)]
pub(crate) struct Module {
    settled: Settled,
    mm: &'static Mm<Metal>,
}

impl Module {
    /// How many pages it takes.
    pub(crate) fn pages(&self) -> u64 {
        (self.settled.blocks().count() as u64) << MAX_ORDER
    }
}

impl Deref for Module {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `settle` has put so many bytes there, and the pages are ours and written by nobody.
        unsafe {
            core::slice::from_raw_parts(
                phys_to_virt(self.settled.start),
                self.settled.bytes as usize,
            )
        }
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        for block in self.settled.blocks() {
            // SAFETY: `hold` got each of these blocks, and whoever read them is done.
            unsafe { self.mm.free_pages(block) };
        }
    }
}
