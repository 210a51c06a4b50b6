//! The way in, in assembly, and what it and the linker leave for Rust: see `boot.s` and `kernel.ld`.

use core::arch::global_asm;
use core::sync::atomic::AtomicU64;

global_asm!(include_str!("boot.s"), options(att_syntax));

/// Where the image is linked: physical address 0 would be here.
pub(crate) const KERNEL_BASE: u64 = 0xffff_ffff_8000_0000;
/// The page in the first MiB that other CPUs start in. `boot.s` knows it too.
pub(crate) const AP_BASE: u64 = 0x8000;

unsafe extern "C" {
    safe static __image_start: u8;
    safe static __text_end: u8;
    safe static __rodata_end: u8;
    safe static __init_start: u8;
    safe static __init_text_end: u8;
    safe static __image_end: u8;
    safe static ap_trampoline: u8;
    safe static ap_trampoline_end: u8;
    /// What a CPU that starts loads as its page tables.
    pub(crate) safe static ap_start_cr3: AtomicU64;
    /// And as its stack pointer.
    pub(crate) safe static ap_start_stack: AtomicU64;
    /// And which CPU it is.
    pub(crate) safe static ap_start_cpu: AtomicU64;
}

/// The pieces of the image by what may be done with them: virtual addresses.
pub(crate) struct Image {
    /// The first byte of the text.
    pub(crate) start: u64,
    /// Where constants start.
    pub(crate) text_end: u64,
    /// Where data starts.
    pub(crate) rodata_end: u64,
    /// Where what is used once starts: text, then data.
    pub(crate) init_start: u64,
    /// Where its data starts.
    pub(crate) init_text_end: u64,
    /// One past the last byte.
    pub(crate) end: u64,
}

/// Where the image lies.
pub(crate) fn image() -> Image {
    let at = |symbol: &'static u8| (&raw const *symbol).addr() as u64;
    Image {
        start: at(&__image_start),
        text_end: at(&__text_end),
        rodata_end: at(&__rodata_end),
        init_start: at(&__init_start),
        init_text_end: at(&__init_text_end),
        end: at(&__image_end),
    }
}

/// The code that other CPUs start with, to be copied to [`AP_BASE`].
pub(crate) fn trampoline() -> &'static [u8] {
    let start = &raw const ap_trampoline;
    let len = (&raw const ap_trampoline_end).addr() - start.addr();
    // SAFETY: the two symbols are the ends of one piece of the image's constants.
    unsafe { core::slice::from_raw_parts(start, len) }
}
