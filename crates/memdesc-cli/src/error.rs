//! What ends the program early.

use std::path::PathBuf;

use memdesc::InitError;
use memdesc_host::HostError;
use memdesc_trace::TraceError;

use crate::handles::MachineError;

/// Why there is nothing to report.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("{0}")]
    Trace(#[from] TraceError),
    #[error("{0}")]
    Binary(#[from] memdesc_trace::binary::BinaryError),
    #[error("{path}: {source}", path = .path.display())]
    BinaryFile {
        path: PathBuf,
        source: memdesc_trace::binary::BinaryError,
    },
    #[error("{name}: a machine of {mib} MiB and {cpus} CPUs cannot be made here: {source}")]
    Machine {
        name: String,
        mib: u64,
        cpus: usize,
        source: MachineError,
    },
    #[error("{name}: nothing in it can be replayed: {why}")]
    Nothing { name: String, why: String },
    #[error(
        "page {pfn:#x} is in the events, but memory ends at page {end:#x} (from {memory_from}): say more with --memory, \
         or leave the snapshot aside with --no-snapshot"
    )]
    PageBeyondMemory {
        pfn: u64,
        end: u64,
        memory_from: &'static str,
    },
    #[error("{bytes} bytes of memory are too large: at most 16 TiB can be replayed")]
    TooLarge { bytes: u64 },
    #[error("a block of order {order} is in the events: orders up to 10 can be replayed")]
    OrderTooLarge { order: u8 },
    #[error("{path}: {source}", path = .path.display())]
    Io {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("{0}")]
    Host(HostError),
    #[error("{0}")]
    Init(InitError),
    #[error("{0}")]
    Alloc(memdesc::AllocError),
    #[error("{0}")]
    Zs(memdesc::zsmalloc::ZsError),
    #[error("a view of an address space: {0}")]
    View(std::io::Error),
    #[error("{0}: {1}: this system gives no such timer")]
    Timer(&'static str, std::io::Error),
    #[error("{0}")]
    Usage(String),
}
