//! Page tables of x86-64, four levels, on `ptdesc`s.
//!
//! Level 4 is the root, level 1 has the pages of 4 KiB, level 2 may have pages of 2 MiB. Each table has a lock for its entries. Readers
//! need none: tables go back only after a grace period, so whoever walks in a read section finds tables all the way, though perhaps
//! not the ones that count any more.
//!
//! Lock order: the lock of a table (`ptl`) is taken alone, or that of a level-1 table under that of its level-2 table. Nothing is
//! allocated or freed under it.

mod deferred;
mod entry;
mod frames;
mod tables;
#[cfg(feature = "x86_64")]
mod x86;

pub(crate) use deferred::RcuPages;
pub(crate) use entry::AtomicEntry;
pub use entry::{Entry, Prot};
pub use tables::{PageTables, Translation};
pub(crate) use tables::{Slot, WalkError, index_of, span};
#[cfg(feature = "x86_64")]
pub use x86::Frames;
