//! The least that a kernel is with memdesc as its memory manager: from the loader to `Box`, `Vec` and `BTreeMap`.
//!
//! Read it from here down; `docs/porting.md` says more about each step. What differs between machines is in a file for each: how it starts, what is memory,
//! how it writes a byte, how it ends.
#![no_std]
#![no_main]

extern crate alloc;

#[cfg_attr(target_arch = "x86_64", path = "x86_64.rs")]
#[cfg_attr(target_arch = "aarch64", path = "aarch64.rs")]
#[cfg_attr(target_arch = "riscv64", path = "riscv64.rs")]
mod machine;

use alloc::{boxed::Box, collections::BTreeMap, format, string::String, vec::Vec};
use core::fmt::{self, Write};
use core::panic::PanicInfo;

use memdesc::gfp::{__GFP_ZERO, GFP_KERNEL};
use memdesc::rcu::cpus::PlatformRcu;
use memdesc::{
    AllocError, CacheFlags, Config, Heap, InitError, KmemCache, Memblock, Memory, Mm, Platform,
};

/// The console.
struct Console;

impl Write for Console {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        text.bytes().for_each(machine::put);
        Ok(())
    }
}

/// A line of the log. The console cannot fail.
macro_rules! log {
    ($($what:tt)*) => { let _ = writeln!(Console, $($what)*); };
}

/// This machine, as the memory manager knows it.
#[derive(Clone, Copy)]
struct Machine;

static RCU: PlatformRcu<Machine, 1> = PlatformRcu::of(Machine);

// SAFETY: all memory that is given away below is mapped at DIRECT_MAP, and is nobody else's: the image is not given away. There is one CPU, with
// interrupts off, so whoever runs is pinned.
unsafe impl Platform for Machine {
    fn direct_map(&self) -> *mut u8 {
        core::ptr::with_exposed_provenance_mut(machine::DIRECT_MAP)
    }
    fn nr_cpus(&self) -> usize {
        1
    }
    fn pin(&self) -> usize {
        0
    }
    unsafe fn unpin(&self, _cpu: usize) {}
    type Rcu = PlatformRcu<Machine, 1>;
    fn rcu(&self) -> &Self::Rcu {
        &RCU
    }
}

/// `Box` and all that come from here, once memory has been taken over.
#[global_allocator]
static HEAP: Heap<Machine> = Heap::new();

/// Where the assembly comes out: on a stack, `.bss` zero, interrupts off. `loader` is what the loader left for us.
#[unsafe(no_mangle)]
extern "C" fn start_kernel(loader: usize) -> ! {
    let mm = take_over(loader).unwrap_or_else(|why| panic!("memory cannot be taken over: {why}"));
    kernel(mm).unwrap_or_else(|why| panic!("{why}"));
    machine::exit(true)
}

/// What is memory, and what of it is ours to give: what is mapped, but for the image.
fn take_over(loader: usize) -> Result<&'static Mm<Machine>, InitError> {
    unsafe extern "C" {
        safe static __executable_start: u8;
        safe static _end: u8;
    }
    let mut memory = Memblock::<64>::new();
    // SAFETY: from the loader, and nothing has been written to memory yet.
    unsafe { machine::memory(loader, &mut memory)? };
    memory.remove(machine::MAPPED..u64::MAX)?;
    memory
        .remove((&raw const __executable_start).addr() as u64..(&raw const _end).addr() as u64)?;
    HEAP.init(Machine, &Config::default(), memory.ranges())
}

/// All that a kernel wants of its memory.
fn kernel(mm: &'static Mm<Machine>) -> Result<(), AllocError> {
    log!("{}", mm.ledger());

    // `alloc` works.
    let boxed = Box::new([7u64; 100]);
    let squares: Vec<u64> = (0..10_000).map(|n| n * n).collect();
    let names: BTreeMap<u64, String> = (0..1000).map(|n| (n, format!("page {n}"))).collect();
    assert!(boxed[99] == 7 && squares[9999] == 99_980_001 && names[&999] == "page 999");
    log!(
        "Box, Vec and BTreeMap: {:?} {:?}",
        squares.last(),
        names.last_key_value()
    );

    // Pages have types: whoever looks finds what they are.
    let page = mm.alloc_pages(GFP_KERNEL | __GFP_ZERO, 0)?;
    let table = mm.alloc_page_table(GFP_KERNEL | __GFP_ZERO, 0)?;
    let slab = mm.virt_to_pfn((&raw const *boxed).cast());
    assert!(matches!(mm.lookup(page).2, Memory::Bare));
    assert!(matches!(mm.lookup(table).2, Memory::PageTable(_)));
    assert!(matches!(mm.lookup(slab).2, Memory::Slab(_)));
    log!("{page:?} is bare, {table:?} a page table, {slab:?} has a slab's objects");
    // SAFETY: ours, and not used any more. One call for all types.
    unsafe {
        mm.free_pages(page);
        mm.free_pages(table);
    }

    // A cache for objects of one type.
    let inodes = KmemCache::new(mm, "inode", CacheFlags::EMPTY)?;
    let inode = inodes.alloc(GFP_KERNEL, (1, "/")).map_err(|(why, _)| why)?;
    log!("an inode: {:?}", *inode);
    drop(inode);
    drop(inodes);

    // All comes back, and the ledger says where every page is.
    drop((boxed, squares, names));
    mm.shrink();
    let ledger = mm.ledger();
    assert!(ledger.balanced && ledger.free + ledger.untouched + ledger.metadata == ledger.given);
    log!("{ledger}");
    Ok(())
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    log!("{info}");
    machine::exit(false)
}
