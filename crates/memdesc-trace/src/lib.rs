//! Reads what Linux tells of its memory: perf script and ftrace text, `/proc/kpageflags` and friends.
//!
//! A [`Recording`] is what the kernel's allocators did, event by event; a [`Snapshot`] is what its
//! memory looked like at one moment. Both come from files that others wrote, so every line may be
//! broken: what cannot be read is counted and shown ([`Skipped`]), never dropped in silence.
//!
//! ```
//! let recording = memdesc_trace::parse_bytes(
//!     b"[000]   799.178445: kmem:mm_page_alloc: page=0x192cf0 pfn=0x192cf0 order=0 migratetype=1 gfp_flags=GFP_KERNEL\n",
//! );
//! assert_eq!(recording.events.len(), 1);
//! assert_eq!(recording.skipped.broken_lines, 0);
//! ```

#![deny(missing_docs)]
#![forbid(unsafe_code)]

mod error;
mod event;
mod intern;
mod line;
mod parser;
mod reader;
mod recording;
mod scan;
pub mod snapshot;
mod write;

pub use error::TraceError;
pub use event::{Cache, CacheId, CacheTable, Event, EventKind};
pub use parser::{BrokenLine, Parser, SAMPLES, Skipped};
pub use reader::{Progress, Reader, Truncated};
pub use recording::{Recording, parse_bytes};
pub use snapshot::Snapshot;
pub use write::{write_event, write_recording};
