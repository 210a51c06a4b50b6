//! QEMU's `virt` machine with 64-bit ARM CPUs: how it starts (`aarch64.s`), how it talks and ends.

#[path = "device_tree.rs"]
mod device_tree;

pub(crate) use device_tree::memory;

core::arch::global_asm!(include_str!("aarch64.s"));

/// Where physical address 0 is mapped, and how much from there on: where it is, as `aarch64.s` does it.
pub(crate) const DIRECT_MAP: usize = 0;
pub(crate) const MAPPED: u64 = 512 << 30;

/// Writes a byte to the serial port, a PL011.
pub(crate) fn put(byte: u8) {
    // SAFETY: the port is the machine's, mapped as a device, and nobody else's.
    unsafe { core::ptr::with_exposed_provenance_mut::<u8>(0x0900_0000).write_volatile(byte) };
}

/// Ends the machine through semihosting: QEMU ends with 0 or 1.
pub(crate) fn exit(well: bool) -> ! {
    const SYS_EXIT: u64 = 0x18;
    const APPLICATION_EXIT: u64 = 0x20026;
    let how = [APPLICATION_EXIT, u64::from(!well)];
    // SAFETY: without semihosting this is an exception, and there is no handler: the machine stands still.
    unsafe {
        core::arch::asm!("hlt #0xf000", in("x0") SYS_EXIT, in("x1") &raw const how, options(noreturn))
    }
}
