//! What the loader says: `hvm_start_info` of Xen's `xen/include/public/arch-x86/hvm/start_info.h`, which QEMU and Firecracker fill too.
//!
//! It lies in memory that is going to be used, so it is copied before anything else is done.

use arrayvec::ArrayVec;
use spin::Once;

use crate::paging::phys_to_virt;

/// Pieces of memory at most.
pub(crate) const MAX_ENTRIES: usize = 64;
const MAX_CMDLINE: usize = 256;

const MAGIC: u32 = 0x336e_c578;

#[repr(C)]
#[derive(Clone, Copy)]
struct StartInfo {
    magic: u32,
    version: u32,
    flags: u32,
    nr_modules: u32,
    modlist: u64,
    cmdline: u64,
    rsdp: u64,
    memmap: u64,
    memmap_entries: u32,
    _reserved: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct MemmapEntry {
    start: u64,
    size: u64,
    kind: u32,
    _reserved: u32,
}

/// `hvm_modlist_entry`.
#[repr(C)]
#[derive(Clone, Copy)]
struct ModuleEntry {
    start: u64,
    size: u64,
    cmdline: u64,
    _reserved: u64,
}

/// What a piece of the memory map is: the types of e820.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Kind {
    /// Memory.
    Ram,
    /// Not to be touched.
    Reserved,
    /// ACPI's tables; memory, once they have been read.
    Acpi,
    /// ACPI's for good.
    Nvs,
    /// Broken.
    Unusable,
    /// Something newer.
    Other,
}

/// A piece of the memory map.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Entry {
    /// The first byte.
    pub(crate) start: u64,
    /// One past the last.
    pub(crate) end: u64,
    /// What it is.
    pub(crate) kind: Kind,
}

/// The loader's information.
#[derive(Debug)]
pub(crate) struct BootInfo {
    /// The firmware's memory map.
    pub(crate) memory: ArrayVec<Entry, MAX_ENTRIES>,
    /// Pieces that there was no room for.
    pub(crate) dropped: usize,
    /// Where ACPI's tables start; 0 if that is not known.
    pub(crate) rsdp: u64,
    /// Where the first module lies that the loader brought (`-initrd` of QEMU): its first byte, and one past its last.
    pub(crate) module: Option<(u64, u64)>,
    cmdline: ArrayVec<u8, MAX_CMDLINE>,
}

impl BootInfo {
    /// The kernel's command line.
    pub(crate) fn cmdline(&self) -> &str {
        core::str::from_utf8(&self.cmdline).unwrap_or("")
    }

    /// Is this word in the command line?
    pub(crate) fn has(&self, word: &str) -> bool {
        self.cmdline().split_whitespace().any(|w| w == word)
    }

    /// The value of `name=value` in the command line.
    pub(crate) fn value(&self, name: &str) -> Option<&str> {
        self.cmdline()
            .split_whitespace()
            .find_map(|w| w.strip_prefix(name)?.strip_prefix('='))
    }
}

static INFO: Once<BootInfo> = Once::new();

/// What the loader said, once it has been read.
pub(crate) fn info() -> Option<&'static BootInfo> {
    INFO.get()
}

/// Copies what the loader says; `None` if it is no PVH loader.
///
/// # Safety
///
/// `at` is what the loader left in EBX, and what it leads to is still there and mapped: the first GiB of physical memory.
#[unsafe(link_section = ".init.text")]
pub(crate) unsafe fn read(at: u32) -> Option<&'static BootInfo> {
    let at: *const StartInfo = phys_to_virt(u64::from(at)).cast();
    // SAFETY: the caller's promise; the structure is aligned to nothing in particular.
    let info = unsafe { at.read_unaligned() };
    if info.magic != MAGIC || info.version < 1 {
        return None;
    }
    let mut boot = BootInfo {
        memory: ArrayVec::new(),
        dropped: 0,
        rsdp: info.rsdp,
        module: None,
        cmdline: ArrayVec::new(),
    };
    if info.nr_modules > 0 && info.modlist != 0 {
        let first: *const ModuleEntry = phys_to_virt(info.modlist).cast();
        // SAFETY: the loader's promise: there is one at least.
        let entry = unsafe { first.read_unaligned() };
        let end = entry.start.saturating_add(entry.size);
        boot.module = (entry.size > 0).then_some((entry.start, end));
    }
    let entries: *const MemmapEntry = phys_to_virt(info.memmap).cast();
    for i in 0..info.memmap_entries as usize {
        // SAFETY: the loader's promise: there are so many.
        let entry = unsafe { entries.add(i).read_unaligned() };
        let kind = match entry.kind {
            1 => Kind::Ram,
            2 => Kind::Reserved,
            3 => Kind::Acpi,
            4 => Kind::Nvs,
            5 => Kind::Unusable,
            _ => Kind::Other,
        };
        let piece = Entry {
            start: entry.start,
            end: entry.start.saturating_add(entry.size),
            kind,
        };
        if boot.memory.try_push(piece).is_err() {
            boot.dropped += 1;
        }
    }
    if info.cmdline != 0 {
        let text = phys_to_virt(info.cmdline);
        for i in 0..MAX_CMDLINE {
            // SAFETY: the loader's promise: a string that ends with a zero, which was not seen yet.
            match unsafe { text.add(i).read() } {
                0 => break,
                byte => boot.cmdline.push(byte),
            }
        }
    }
    Some(INFO.call_once(|| boot))
}
