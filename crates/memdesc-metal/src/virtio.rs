//! What virtio drivers need of this machine: memory that devices reach, from the memory manager, and their registers.

use core::ptr::NonNull;

use arrayvec::ArrayVec;
use memdesc::gfp::{__GFP_ZERO, GFP_KERNEL};
use memdesc::{Pfn, PhysAddr};
use spin::Mutex;
use virtio_drivers::{BufferDirection, Hal};

use crate::paging::{self, DIRECT_MAP, MapError};
use crate::{memory, remote};

const PAGE_SIZE: u64 = memdesc::PAGE_SIZE as u64;

/// This machine, for `virtio-drivers`: devices reach all memory at its physical address, and see what the CPUs see.
#[derive(Debug)]
pub(crate) struct Machine;

/// A device's registers that are mapped: physical address, length, and where.
type Mapped = ArrayVec<(u64, u64, usize), 8>;

static MAPPED: Mutex<Mapped> = Mutex::new(ArrayVec::new_const());

/// Maps a device's registers. Before the driver of `virtio-drivers` asks where they are, which cannot be told that there is no room.
///
/// # Errors
///
/// No room in the addresses of devices, or in the list of those that are mapped.
pub(crate) fn map_registers(phys: u64, length: u64) -> Result<(), MapError> {
    let start = phys & !(PAGE_SIZE - 1);
    let pages = (phys + length - start).div_ceil(PAGE_SIZE);
    let virt = paging::map_registers(start, pages)?.addr();
    let mapped = (start, pages * PAGE_SIZE, virt);
    MAPPED
        .lock()
        .try_push(mapped)
        .map_err(|_| MapError::NoMemory)
}

/// Where registers are that [`map_registers`] has mapped.
pub(crate) fn registers(phys: u64, length: u64) -> Option<NonNull<u8>> {
    let mapped = MAPPED.lock();
    let &(start, _, virt) = mapped
        .iter()
        .find(|(start, size, _)| *start <= phys && phys + length <= start + size)?;
    NonNull::new(core::ptr::with_exposed_provenance_mut(
        virt + (phys - start) as usize,
    ))
}

// SAFETY: `dma_alloc` gives pages of the memory manager's, zeroed and nobody else's until `dma_dealloc`; registers are outside of all memory that is
// handed out, and mapped for good.
unsafe impl Hal for Machine {
    fn dma_alloc(pages: usize, _direction: BufferDirection) -> (u64, NonNull<u8>) {
        // Bare pages, as the types have it for what drivers ask for and no user maps. A device finds them at addresses of 64 bits.
        let order = pages.next_power_of_two().ilog2() as usize;
        let found = memory::mm().and_then(|mm| {
            let pfn = mm.alloc_pages(GFP_KERNEL | __GFP_ZERO, order).ok()?;
            Some((pfn.phys().0, NonNull::new(mm.page_address(pfn))?))
        });
        // Address 0 is how the trait says that there is none; page 0 is never handed out.
        found.unwrap_or((0, NonNull::dangling()))
    }

    unsafe fn dma_dealloc(paddr: u64, _vaddr: NonNull<u8>, _pages: usize) -> i32 {
        let Some(mm) = memory::mm() else {
            return -1;
        };
        // SAFETY: the caller's promise: from `dma_alloc`, and the device has let go of them.
        unsafe { mm.free_pages(Pfn((paddr / PAGE_SIZE) as u32)) };
        0
    }

    unsafe fn mmio_phys_to_virt(paddr: u64, size: usize) -> NonNull<u8> {
        match registers(paddr, size as u64) {
            Some(at) => at,
            None => panic!("virtio: registers at {paddr:#x}, outside of what the device has"),
        }
    }

    unsafe fn share(buffer: NonNull<[u8]>, _direction: BufferDirection) -> u64 {
        // Only what lies in the direct map is ever shared.
        buffer.addr().get() as u64 - DIRECT_MAP
    }

    unsafe fn unshare(_paddr: u64, _buffer: NonNull<[u8]>, _direction: BufferDirection) {}
}

/// The lock of a device, in a thread: who waits for it does what other CPUs want meanwhile.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> spin::MutexGuard<'_, T> {
    loop {
        if let Some(guard) = mutex.try_lock() {
            return guard;
        }
        remote::serve();
        core::hint::spin_loop();
    }
}

/// A page's memory as bytes, for a queue's buffer.
pub(crate) fn address(pfn: Pfn) -> *mut u8 {
    let PhysAddr(phys) = pfn.phys();
    paging::phys_to_virt(phys)
}
