//! A PC: how it starts (`x86_64.s`), what its loader says of memory, how it talks and ends.

use memdesc::{InitError, Memblock};
use x86_64::instructions::{hlt, port::Port};

core::arch::global_asm!(include_str!("x86_64.s"), options(att_syntax));

/// Where physical address 0 is mapped, and how much from there on: as `x86_64.s` does it.
pub(crate) const DIRECT_MAP: usize = 0xffff_8000_0000_0000;
pub(crate) const MAPPED: u64 = 4 << 30;

/// `hvm_start_info` of Xen's `start_info.h`, as far as it is read.
#[repr(C)]
struct StartInfo {
    _magic_version_flags_modules: [u32; 4],
    _modules_cmdline_rsdp: [u64; 3],
    memmap: u64,
    memmap_entries: u32,
}

#[repr(C)]
struct MemmapEntry {
    start: u64,
    size: u64,
    /// As in e820: 1 is RAM.
    kind: u32,
    _reserved: u32,
}

/// Adds what the loader says is memory.
///
/// # Safety
///
/// `info` is what the loader left, and nothing has been written to memory that is not the image's.
pub(crate) unsafe fn memory<const N: usize>(
    info: usize,
    memory: &mut Memblock<N>,
) -> Result<(), InitError> {
    // SAFETY: the caller's promise, and the loader's: there are so many entries.
    let entries = unsafe {
        let info = &*core::ptr::with_exposed_provenance::<StartInfo>(info);
        let entries = core::ptr::with_exposed_provenance::<MemmapEntry>(info.memmap as usize);
        core::slice::from_raw_parts(entries, info.memmap_entries as usize)
    };
    for entry in entries.iter().filter(|entry| entry.kind == 1) {
        memory.add(entry.start..entry.start + entry.size)?;
    }
    memory.remove(0..1 << 20) // the firmware's
}

/// Writes a byte to the first serial port.
pub(crate) fn put(byte: u8) {
    // SAFETY: the port is the PC's first serial one, and nobody else's.
    unsafe { Port::new(0x3f8).write(byte) };
}

/// Ends the machine: QEMU's `isa-debug-exit` makes it 33 or 35.
pub(crate) fn exit(well: bool) -> ! {
    // SAFETY: the port is the device's, or nobody's.
    unsafe { Port::new(0xf4).write(if well { 0x10u32 } else { 0x11 }) };
    loop {
        hlt();
    }
}
