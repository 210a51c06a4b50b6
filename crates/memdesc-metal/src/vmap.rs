//! vmalloc's translations, in page tables of the memory manager's own (`memdesc::pgtable`).
//!
//! Its trees map the lower half of addresses. vmalloc's range is one entry of the root, 512 GiB; so it is mapped in a tree at the addresses from 0 on,
//! whose first entry becomes the kernel's root's entry for the range.

use memdesc::gfp::GFP_KERNEL;
use memdesc::pgtable::{PageTables, Prot};
use memdesc::{AllocError, Mm, Pfn};
use spin::Once;

use crate::paging::{self, VMALLOC_SIZE, VMALLOC_START};
use crate::platform::Metal;

static TABLES: Once<PageTables<'static, Metal>> = Once::new();

const PAGE_SIZE: usize = memdesc::PAGE_SIZE;
/// Of a page of 2 MiB.
const LARGE_PAGES: usize = 512;

/// Makes the tree. Once, before the first use of vmalloc, while one CPU runs.
///
/// # Errors
///
/// No memory.
pub(crate) fn init(mm: &'static Mm<Metal>) -> Result<(), AllocError> {
    let tables = PageTables::new(mm, GFP_KERNEL)?;
    // Something has to be mapped for there to be a table that the root can lead to; it stays when the page goes.
    let page = mm.alloc_pages(GFP_KERNEL, 0)?;
    let mapped = tables.map(0, page, 1, prot(), GFP_KERNEL);
    tables.unmap(0);
    // SAFETY: ours, and mapped no more; no CPU touched it there.
    unsafe { mm.free_pages(page) };
    mapped?;
    let entry = paging::first_entry(tables.root().phys().0);
    paging::set_root_entry(VMALLOC_START, entry);
    TABLES.call_once(|| tables);
    Ok(())
}

fn prot() -> Prot {
    Prot::WRITE
        .with(Prot::GLOBAL)
        .with(Prot::NO_EXECUTE)
        .with(Prot::ACCESSED)
        .with(Prot::DIRTY)
}

/// Where an address of the range is in the tree.
fn place(addr: usize) -> u64 {
    addr as u64 % VMALLOC_SIZE
}

/// Maps pages, by 2 MiB where that fits.
pub(crate) fn map(addr: usize, pfn: Pfn, pages: usize) -> Result<(), AllocError> {
    let tables = TABLES.get().ok_or(AllocError::NoPageTable)?;
    let mut done = 0;
    while done < pages {
        let (at, page) = (place(addr + done * PAGE_SIZE), pfn.add(done as u32));
        let large = pages - done >= LARGE_PAGES
            && at.is_multiple_of((LARGE_PAGES * PAGE_SIZE) as u64)
            && page.is_aligned(9);
        // Where there were small pages once there is still a table for them.
        if large && tables.map(at, page, 2, prot(), GFP_KERNEL).is_ok() {
            done += LARGE_PAGES;
            continue;
        }
        tables.map(at, page, 1, prot(), GFP_KERNEL)?;
        done += 1;
    }
    Ok(())
}

/// Removes translations.
pub(crate) fn unmap(start: usize, end: usize) {
    let Some(tables) = TABLES.get() else {
        return;
    };
    let mut at = start;
    while at < end {
        let large = tables.unmap(place(at)).is_some_and(|old| old.is_huge());
        at += if large {
            LARGE_PAGES * PAGE_SIZE
        } else {
            PAGE_SIZE
        };
    }
}
