//! The kernel's page tables: the image with the rights of its pieces, the direct map of all memory in pages as large as they come, devices.
//!
//! They are made before there is a memory manager, out of memory behind the image ([`BootMemory`]). What comes later, vmalloc's range, is
//! made of the memory manager's own tables (`vmap`).
//!
//! | addresses | what |
//! |---|---|
//! | `0xffff_8880_0000_0000` | the direct map: physical address 0 is here |
//! | `0xffff_c900_0000_0000` | vmalloc |
//! | `0xffff_ffff_8000_0000` | the image, as if physical address 0 were here |
//! | `0xffff_ffff_ffe0_0000` | devices |
//!
//! As Linux has them (`Documentation/arch/x86/x86_64/mm.rst`).

use core::sync::atomic::{AtomicU64, Ordering};

use raw_cpuid::CpuId;
use spin::Mutex;
use x86_64::registers::control::{Cr3, Cr3Flags, Cr4, Cr4Flags};
use x86_64::structures::paging::{PageTableFlags as Flags, PhysFrame};
use x86_64::{PhysAddr, VirtAddr};

use crate::boot::{KERNEL_BASE, image};

/// Where physical address 0 is mapped.
pub(crate) const DIRECT_MAP: u64 = 0xffff_8880_0000_0000;
/// The first address of vmalloc.
pub(crate) const VMALLOC_START: u64 = 0xffff_c900_0000_0000;
/// How many: what one entry of the root maps.
pub(crate) const VMALLOC_SIZE: u64 = 1 << 39;
const DEVICES: u64 = 0xffff_ffff_ffe0_0000;

const SIZE_4K: u64 = 1 << 12;
const SIZE_2M: u64 = 1 << 21;
const SIZE_1G: u64 = 1 << 30;

/// Address bits of an entry.
const FRAME: u64 = 0x000f_ffff_ffff_f000;

#[repr(C, align(4096))]
struct Table([AtomicU64; 512]);

static ROOT: Table = Table([const { AtomicU64::new(0) }; 512]);

/// A physical address in the direct map.
pub(crate) fn phys_to_virt(phys: u64) -> *mut u8 {
    core::ptr::with_exposed_provenance_mut((DIRECT_MAP + phys) as usize)
}

/// What the machine can do about pages.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Features {
    /// Pages of 1 GiB.
    pub(crate) gib_pages: bool,
    /// Bits of a physical address.
    pub(crate) phys_bits: u8,
}

/// Asks the CPU.
pub(crate) fn features() -> Features {
    let cpuid = CpuId::new();
    let ext = cpuid.get_extended_processor_and_feature_identifiers();
    let sizes = cpuid.get_processor_capacity_feature_info();
    Features {
        gib_pages: ext.is_some_and(|f| f.has_1gib_pages()),
        phys_bits: sizes.map_or(36, |s| s.physical_address_bits()),
    }
}

/// Where physical addresses end that the direct map has room for, and the CPU.
pub(crate) fn direct_map_end() -> u64 {
    (VMALLOC_START - DIRECT_MAP).min(1 << features().phys_bits.min(52))
}

/// The memory behind the image, as far as it is used before the memory manager is there.
#[derive(Debug)]
pub(crate) struct BootMemory {
    next: u64,
    end: u64,
    tables: u64,
}

static BOOT_MEMORY: Mutex<BootMemory> = Mutex::new(BootMemory {
    next: 0,
    end: 0,
    tables: 0,
});

impl BootMemory {
    /// A page of zeros.
    fn take(&mut self) -> Option<u64> {
        if self.next + SIZE_4K > self.end {
            return None;
        }
        let page = self.next;
        self.next += SIZE_4K;
        self.tables += 1;
        // SAFETY: memory behind the image that the firmware says is ours, below 1 GiB and so mapped from the start, and handed out once.
        unsafe { phys_to_virt(page).write_bytes(0, SIZE_4K as usize) };
        Some(page)
    }
}

/// Boot memory is what lies behind the image, up to here.
#[unsafe(link_section = ".init.text")]
pub(crate) fn init_boot_memory(end: u64) {
    let mut memory = BOOT_MEMORY.lock();
    memory.next = image().end - KERNEL_BASE;
    // What the first page tables map.
    memory.end = end.min(SIZE_1G);
}

/// No more is taken: where what was taken ends, and how many tables it is.
#[unsafe(link_section = ".init.text")]
pub(crate) fn close_boot_memory() -> (u64, u64) {
    let mut memory = BOOT_MEMORY.lock();
    memory.end = memory.next;
    (memory.next, memory.tables)
}

/// Why something could not be mapped.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum MapError {
    /// No memory for a table.
    NoMemory,
}

fn table_at(phys: u64) -> &'static Table {
    let table: *const Table = phys_to_virt(phys).cast_const().cast();
    // SAFETY: only entries of our tables lead here: pages from boot memory, mapped, never given back, and accessed as atomics only.
    unsafe { &*table }
}

/// The entry for an address at this level (1 for 4 KiB), making tables on the way; `None` if a larger page is there.
fn entry(
    memory: &mut BootMemory,
    addr: u64,
    level: u32,
) -> Result<Option<&'static AtomicU64>, MapError> {
    let mut table = &ROOT;
    for at in (1..=4).rev() {
        let entry = &table.0[(addr >> (12 + 9 * (at - 1))) as usize % 512];
        if at == level {
            return Ok(Some(entry));
        }
        let seen = entry.load(Ordering::Acquire);
        let next = if seen & Flags::PRESENT.bits() == 0 {
            let page = memory.take().ok_or(MapError::NoMemory)?;
            let bits = page | (Flags::PRESENT | Flags::WRITABLE).bits();
            entry.store(bits, Ordering::Release);
            page
        } else if seen & Flags::HUGE_PAGE.bits() != 0 {
            return Ok(None);
        } else {
            seen & FRAME
        };
        table = table_at(next);
    }
    Ok(None)
}

/// Maps this physical memory into the direct map, in whole pages, each as large as fits. What is there already stays. Before boot memory is closed.
#[unsafe(link_section = ".init.text")]
pub(crate) fn map_direct(start: u64, end: u64) -> Result<(), MapError> {
    let gib_pages = features().gib_pages;
    let mut memory = BOOT_MEMORY.lock();
    let flags = Flags::PRESENT
        | Flags::WRITABLE
        | Flags::NO_EXECUTE
        | Flags::GLOBAL
        | Flags::ACCESSED
        | Flags::DIRTY;
    let mut at = start & !(SIZE_4K - 1);
    while at < end {
        let fits = |size| at.is_multiple_of(size) && at + size <= end;
        let sizes = [
            (3, SIZE_1G, Flags::HUGE_PAGE),
            (2, SIZE_2M, Flags::HUGE_PAGE),
            (1, SIZE_4K, Flags::empty()),
        ];
        let allowed = |level, size| level == 1 || fits(size) && (level < 3 || gib_pages);
        for (level, size, large) in sizes {
            if !allowed(level, size) {
                continue;
            }
            let Some(entry) = entry(&mut memory, DIRECT_MAP + at, level)? else {
                // In a larger page that is there.
                at += size;
                break;
            };
            let seen = entry.load(Ordering::Relaxed);
            let is_table = level > 1 && seen & Flags::HUGE_PAGE.bits() == 0;
            if seen & Flags::PRESENT.bits() == 0 {
                entry.store(at | (flags | large).bits(), Ordering::Release);
            } else if is_table {
                // Some of it is mapped by smaller ones.
                continue;
            }
            at += size;
            break;
        }
    }
    Ok(())
}

/// Maps a device's page; where it is.
pub(crate) fn map_device(index: u64, phys: u64) -> Result<*mut u8, MapError> {
    let addr = DEVICES + index * SIZE_4K;
    let flags = Flags::PRESENT
        | Flags::WRITABLE
        | Flags::NO_EXECUTE
        | Flags::NO_CACHE
        | Flags::WRITE_THROUGH;
    let entry = entry(&mut BOOT_MEMORY.lock(), addr, 1)?;
    entry
        .ok_or(MapError::NoMemory)?
        .store(phys | flags.bits(), Ordering::Release);
    Ok(core::ptr::with_exposed_provenance_mut(addr as usize))
}

/// Pages of devices that [`map_registers`] has handed out; those before are [`map_device`]'s.
static REGISTER_PAGES: AtomicU64 = AtomicU64::new(16);
/// What one table maps.
const DEVICE_PAGES: u64 = 512;

/// Maps a device's registers, at any time; where they are. `start` is the address of a page.
pub(crate) fn map_registers(start: u64, pages: u64) -> Result<*mut u8, MapError> {
    let take = |taken: u64| {
        let end = taken.checked_add(pages)?;
        (end <= DEVICE_PAGES).then_some(end)
    };
    let first = REGISTER_PAGES
        .fetch_update(Ordering::Relaxed, Ordering::Relaxed, take)
        .map_err(|_| MapError::NoMemory)?;
    for i in 0..pages {
        // The table has been there since the first device was mapped.
        map_device(first + i, start + i * SIZE_4K)?;
    }
    Ok(core::ptr::with_exposed_provenance_mut(
        (DEVICES + first * SIZE_4K) as usize,
    ))
}

/// Maps the image: text to be executed, constants to be read, the rest to be written.
#[unsafe(link_section = ".init.text")]
pub(crate) fn map_image() -> Result<(), MapError> {
    let image = image();
    let mut memory = BOOT_MEMORY.lock();
    let mut at = image.start;
    while at < image.end {
        let is_text = at < image.text_end || (image.init_start..image.init_text_end).contains(&at);
        let flags = if is_text {
            Flags::PRESENT
        } else if at < image.rodata_end {
            Flags::PRESENT | Flags::NO_EXECUTE
        } else {
            Flags::PRESENT | Flags::WRITABLE | Flags::NO_EXECUTE
        };
        if let Some(entry) = entry(&mut memory, at, 1)? {
            let bits = (at - KERNEL_BASE) | (flags | Flags::GLOBAL).bits();
            entry.store(bits, Ordering::Release);
        }
        at += SIZE_4K;
    }
    Ok(())
}

/// Maps these pages of the image no more, on no CPU.
pub(crate) fn unmap_image(start: u64, end: u64) -> Result<(), MapError> {
    let mut at = start;
    while at < end {
        // Its tables are there since `map_image`.
        if let Some(entry) = entry(&mut BOOT_MEMORY.lock(), at, 1)? {
            entry.store(0, Ordering::Release);
        }
        at += SIZE_4K;
    }
    crate::remote::flush(start, end);
    Ok(())
}

/// The root's physical address: what goes into CR3.
pub(crate) fn root() -> u64 {
    (&raw const ROOT).addr() as u64 - KERNEL_BASE
}

/// Puts an entry into the root that leads to a table of somebody else's: vmalloc's.
pub(crate) fn set_root_entry(addr: u64, bits: u64) {
    ROOT.0[(addr >> 39) as usize % 512].store(bits, Ordering::Release);
}

/// Makes the kernel's half of this root the kernel's.
pub(crate) fn share_kernel_half(root: u64) {
    let half = ROOT.0.iter().zip(&table_at(root).0).skip(256);
    half.for_each(|(from, to)| to.store(from.load(Ordering::Acquire), Ordering::Release));
}

/// The first entry of a table, wherever it is in the direct map.
pub(crate) fn first_entry(table: u64) -> u64 {
    table_at(table).0[0].load(Ordering::Acquire)
}

/// Uses these tables on the calling CPU, and lets it keep what is the same in all address spaces.
///
/// # Safety
///
/// The image, its stack and all that the CPU uses are mapped in them.
pub(crate) unsafe fn activate() {
    let frame = PhysFrame::containing_address(PhysAddr::new(root()));
    // SAFETY: the caller's promise.
    unsafe {
        Cr3::write(frame, Cr3Flags::empty());
        Cr4::update(|cr4| cr4.insert(Cr4Flags::PAGE_GLOBAL));
    }
}

/// Pages that are forgotten one by one rather than all at once (`tlb_single_page_flush_ceiling`).
const FLUSH_CEILING: u64 = 33;

/// Has this CPU forget translations.
pub(crate) fn flush_local(start: u64, end: u64) {
    if end.saturating_sub(start) > FLUSH_CEILING * SIZE_4K {
        let cr4 = Cr4::read();
        // SAFETY: forgets everything, that of all address spaces too; what is mapped does not change.
        unsafe {
            Cr4::write(cr4 - Cr4Flags::PAGE_GLOBAL);
            Cr4::write(cr4);
        }
        return;
    }
    let mut at = start & !(SIZE_4K - 1);
    while at < end {
        x86_64::instructions::tlb::flush(VirtAddr::new_truncate(at));
        at += SIZE_4K;
    }
}
