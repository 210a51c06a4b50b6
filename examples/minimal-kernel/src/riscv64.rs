//! QEMU's `virt` machine with 64-bit RISC-V CPUs: how it starts (`riscv64.s`), how it talks and ends.

#[path = "device_tree.rs"]
mod device_tree;

pub(crate) use device_tree::memory;

core::arch::global_asm!(include_str!("riscv64.s"));

/// Where physical address 0 is mapped, and how much from there on: all where it is, since there is no paging.
pub(crate) const DIRECT_MAP: usize = 0;
pub(crate) const MAPPED: u64 = u64::MAX;

/// Writes a byte to the serial port, a 16550.
pub(crate) fn put(byte: u8) {
    // SAFETY: the port is the machine's, and nobody else's.
    unsafe { core::ptr::with_exposed_provenance_mut::<u8>(0x1000_0000).write_volatile(byte) };
}

/// Ends the machine through its test device: QEMU ends with 0 or 1.
pub(crate) fn exit(well: bool) -> ! {
    let how = if well { 0x5555 } else { 1 << 16 | 0x3333 };
    // SAFETY: the device is the machine's, and nobody else's.
    unsafe { core::ptr::with_exposed_provenance_mut::<u32>(0x10_0000).write_volatile(how) };
    loop {
        core::hint::spin_loop();
    }
}
