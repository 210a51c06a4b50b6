//! What the device tree says of memory.

use fdt::Fdt;
use memdesc::{InitError, Memblock};

/// Adds what is memory, but for the device tree itself.
///
/// # Safety
///
/// `tree` is where the loader left the device tree, and nothing has been written to memory that is not the image's.
pub(crate) unsafe fn memory<const N: usize>(
    tree: usize,
    memory: &mut Memblock<N>,
) -> Result<(), InitError> {
    // SAFETY: the caller's promise.
    let fdt = unsafe { Fdt::from_ptr(core::ptr::with_exposed_provenance(tree)) };
    let fdt = fdt.unwrap_or_else(|why| panic!("no device tree at {tree:#x}: {why}"));
    for region in fdt.memory().regions() {
        let start = region.starting_address.addr() as u64;
        memory.add(start..start + region.size.unwrap_or(0) as u64)?;
    }
    memory.remove(tree as u64..(tree + fdt.total_size()) as u64)
}
