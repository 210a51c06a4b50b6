//! Address spaces of users: areas, faults, copy on write, fork, unmapping, and the way back from a folio to who maps it.
//!
//! What may be mapped are folios, anonymous or of a file; a page table entry keeps its folio alive. Everything else is refused by type
//! ([`MmStruct::insert_page`]), but what a driver vouches for ([`MmStruct::insert_pfn`]).
//!
//! **Who describes where an anonymous page is mapped.** Address spaces that were forked from each other are a *family*, and since nothing
//! moves an area within an address space, an anonymous page is at the same address in all that have it. So an anonymous folio leads to
//! its family, its index is its address, and the reverse map asks each member. (Linux has chains of `anon_vma`s, which survive `mremap` and
//! do not look at relatives that cannot have the page.)
//!
//! Lock order: `mmap_lock` of an address space; the folio lock; the list of a family's members (`anon_vma`) or of a file's areas (`i_mmap`);
//! the lock of a page table (`ptl`); all leaves of the page allocator. Nothing is allocated or freed under a `ptl`. Page tables go
//! with their last area, after a grace period, and all of them with their address space; so whoever has the `mmap_lock`, or is in a read section, needs no
//! other lock to walk them.

mod access;
mod check;
mod family;
mod fault;
mod fork;
mod gup;
mod hwpoison;
mod insert;
mod rmap;
mod space;
mod vma;
mod zap;

pub use access::Walked;
pub use check::{MapError, MapReport};
pub use fault::{Access, FaultError};
pub use gup::UserPages;
pub use insert::InsertError;
pub(crate) use rmap::Unmap;
pub use space::{MmStruct, Rss};
pub(crate) use vma::VmaList;
pub use vma::{Map, VmFlags, VmaView};
