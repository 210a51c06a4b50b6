//! Events back to text, as `perf script -F cpu,time,event,trace` prints them.

use std::io::{self, Write};

use crate::event::{Cache, CacheTable, Event, EventKind};
use crate::recording::Recording;

/// Writes one event as a line.
///
/// What an [`Event`] does not hold is left out (`page=`, `node=`, `accounted=`) or stands as
/// `call_site=0x0`.
pub fn write_event(out: &mut impl Write, event: &Event, caches: &CacheTable) -> io::Result<()> {
    let (seconds, ns) = (event.time_ns / 1_000_000_000, event.time_ns % 1_000_000_000);
    write!(out, "[{:03}] {seconds:5}.", event.cpu)?;
    // Microseconds unless there is more to say, as perf does without and with --ns.
    if ns.is_multiple_of(1000) {
        write!(out, "{:06}: ", ns / 1000)?;
    } else {
        write!(out, "{ns:09}: ")?;
    }
    let unknown = Cache {
        name: String::new(),
        bytes_req: 0,
        bytes_alloc: 0,
    };
    let cache_of = |id| caches.get(id).unwrap_or(&unknown);
    match event.kind() {
        EventKind::PageAlloc {
            pfn,
            order,
            migratetype,
            gfp,
        } => writeln!(
            out,
            "kmem:mm_page_alloc: page={pfn:#x} pfn={pfn:#x} order={order} migratetype={migratetype} gfp_flags={gfp}"
        ),
        EventKind::PageAllocFailed {
            order,
            migratetype,
            gfp,
        } => writeln!(
            out,
            "kmem:mm_page_alloc: page=(nil) pfn=0x0 order={order} migratetype={migratetype} gfp_flags={gfp}"
        ),
        EventKind::PageFree { pfn, order } => {
            writeln!(
                out,
                "kmem:mm_page_free: page={pfn:#x} pfn={pfn:#x} order={order}"
            )
        }
        EventKind::PageFreeBatched { pfn } => {
            writeln!(
                out,
                "kmem:mm_page_free_batched: page={pfn:#x} pfn={pfn:#x} order=0"
            )
        }
        EventKind::Kmalloc {
            ptr,
            bytes_req,
            bytes_alloc,
            gfp,
        } => writeln!(
            out,
            "kmem:kmalloc: call_site=0x0 ptr={ptr:#x} bytes_req={bytes_req} bytes_alloc={bytes_alloc} gfp_flags={gfp}"
        ),
        EventKind::Kfree { ptr } => writeln!(out, "kmem:kfree: call_site=0x0 ptr={ptr:#x}"),
        EventKind::CacheAlloc { cache, ptr, gfp } => {
            let Cache {
                name,
                bytes_req,
                bytes_alloc,
            } = cache_of(cache);
            write!(out, "kmem:kmem_cache_alloc: call_site=0x0 ptr={ptr:#x} ")?;
            if !name.is_empty() {
                write!(out, "name={name} ")?;
            }
            writeln!(
                out,
                "bytes_req={bytes_req} bytes_alloc={bytes_alloc} gfp_flags={gfp}"
            )
        }
        EventKind::CacheFree { cache, ptr } => {
            write!(out, "kmem:kmem_cache_free: call_site=0x0 ptr={ptr:#x}")?;
            match &cache_of(cache).name {
                name if name.is_empty() => writeln!(out),
                name => writeln!(out, " name={name}"),
            }
        }
    }
}

/// Writes all events of a recording.
pub fn write_recording(out: &mut impl Write, recording: &Recording) -> io::Result<()> {
    recording
        .events
        .iter()
        .try_for_each(|event| write_event(out, event, &recording.caches))
}
