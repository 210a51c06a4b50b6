//! Reads what Linux tells of its memory: perf script and ftrace text, `/proc/kpageflags` and friends.
//!
//! A [`Recording`] is what the kernel's allocators did, event by event; a [`Snapshot`] is what its
//! memory looked like at one moment. Both come from files that others wrote, so every line may be
//! broken: what cannot be read is counted and shown ([`Skipped`]), never dropped in silence.
//!
//! ```
//! # #[cfg(feature = "std")] {
//! let recording = memdesc_trace::parse_bytes(
//!     b"[000]   799.178445: kmem:mm_page_alloc: page=0x192cf0 pfn=0x192cf0 order=0 migratetype=1 gfp_flags=GFP_KERNEL\n",
//! );
//! assert_eq!(recording.events.len(), 1);
//! assert_eq!(recording.skipped.broken_lines, 0);
//! # }
//! ```
//!
//! Without the feature `std` there is what a kernel can use, which has no files: the [`Parser`], and recordings in [`binary`].

#![cfg_attr(not(feature = "std"), no_std)]
#![deny(missing_docs)]
#![forbid(unsafe_code)]

extern crate alloc;

pub mod binary;
#[cfg(feature = "std")]
mod error;
mod event;
mod intern;
mod line;
mod parser;
#[cfg(feature = "std")]
mod reader;
#[cfg(feature = "std")]
mod recording;
mod scan;
#[cfg(feature = "std")]
pub mod snapshot;
#[cfg(feature = "std")]
mod write;

#[cfg(feature = "std")]
pub use error::TraceError;
pub use event::{Cache, CacheId, CacheTable, Event, EventKind};
pub use parser::{BrokenLine, Parser, SAMPLES, Skipped};
#[cfg(feature = "std")]
pub use reader::{Progress, Reader, Truncated};
#[cfg(feature = "std")]
pub use recording::{Recording, parse_bytes};
#[cfg(feature = "std")]
pub use snapshot::Snapshot;
#[cfg(feature = "std")]
pub use write::{write_event, write_recording};
