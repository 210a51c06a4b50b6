//! The page cache: a mapping (`struct address_space`) indexes the folios of a file.
//!
//! The index is the crate's own [`XArray`](crate::xarray::XArray): look-up under RCU without a lock, one entry for a large folio, marks
//! for what is dirty. An entry holds the folio's first page and, in the tree's own bits, its order; the cache has one reference to each of its folios,
//! however large.
//!
//! Lock order: the folio lock, then `i_mmap` for the areas that map the file; `i_pages`, the lock of the index, is a leaf that
//! is also taken under a page table's lock, to mark what an entry noted as dirty.

mod dirty;
mod find;
mod mapping;
mod readahead;
mod truncate;

pub(crate) use mapping::MappingCore;
pub use mapping::{FileError, Mapping, MappingOps};
