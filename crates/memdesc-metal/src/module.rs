//! The module that the loader brought (`-initrd`): memory that is in use when memory is taken over ([`memory`]), and is given back when its
//! reader is done with it.

use core::ops::{Deref, Range};

use memdesc::{Mm, PAGE_SIZE, Pfn, PhysAddr};

use crate::log;
use crate::memory;
use crate::paging::phys_to_virt;
use crate::platform::Metal;
use crate::pvh::{BootInfo, Kind};

/// Where the module lies, if there is one: its bytes. Panics if that is no memory.
pub(crate) fn find(boot: &BootInfo) -> Option<Range<u64>> {
    let (start, end) = boot.module?;
    let mut ram = boot.memory.iter().filter(|e| e.kind == Kind::Ram);
    if !ram.any(|e| e.start <= start && end <= e.end) {
        panic!("the module ({start:#x}-{end:#x}) does not lie in memory");
    }
    log!("module: {} bytes at {start:#x}", end - start);
    Some(start..end)
}

/// The module's bytes, and the pages that they lie in, which are given back with it.
#[derive(Debug)]
pub(crate) struct Module {
    bytes: Range<u64>,
    mm: &'static Mm<Metal>,
}

impl Module {
    /// # Safety
    ///
    /// There they are, nobody writes to them, and the memory manager was told that they are in use.
    pub(crate) unsafe fn new(mm: &'static Mm<Metal>, bytes: Range<u64>) -> Module {
        Module { bytes, mm }
    }

    /// How many pages it takes.
    pub(crate) fn pages(&self) -> u64 {
        let page = PAGE_SIZE as u64;
        self.bytes.end.div_ceil(page) - self.bytes.start / page
    }
}

impl Deref for Module {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        let length = (self.bytes.end - self.bytes.start) as usize;
        // SAFETY: the promise made to `new`.
        unsafe { core::slice::from_raw_parts(phys_to_virt(self.bytes.start), length) }
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        let first = Pfn::containing(PhysAddr(self.bytes.start));
        // SAFETY: whoever read it is done.
        match unsafe { self.mm.free_reserved(first, self.pages() as u32) } {
            Ok(pages) => memory::log_freed("initrd", pages),
            Err(why) => log!("initrd memory is kept: {why}"),
        }
    }
}
