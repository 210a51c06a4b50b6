//! Call stacks of the process, and their symbols. Not from signal handlers: unwinding and debug information take locks.

use std::ffi::c_void;
use std::fmt::{self, Write};

/// The memory manager's own frames, which all stacks begin with and nobody wants to see.
const OWN: &[&str] = &["backtrace::", "memdesc_host::", "memdesc::"];
/// Frames looked at before the caller of the memory manager must have come.
const INNER: usize = 24;

/// Return addresses of the caller, innermost first, from the memory manager's caller on if that can be told; says how many.
pub(crate) fn save(frames: &mut [usize]) -> usize {
    let mut all = [0; 48];
    let mut n = 0;
    backtrace::trace(|frame| {
        all[n] = frame.ip().addr();
        // The outermost frame has none.
        let more = all[n] != 0;
        n += usize::from(more);
        more && n < all.len()
    });
    let own = |&address: &usize| {
        let mut own = false;
        backtrace::resolve(
            std::ptr::without_provenance_mut::<c_void>(address),
            |symbol| {
                own = symbol
                    .name()
                    .is_some_and(|name| is_own(&format!("{name:#}")));
            },
        );
        own
    };
    let first = all[..n.min(INNER)]
        .iter()
        .rposition(own)
        .map_or(0, |last| last + 1);
    let kept = (n - first).min(frames.len());
    frames[..kept].copy_from_slice(&all[first..first + kept]);
    kept
}

fn is_own(name: &str) -> bool {
    let name = name.trim_start_matches('<');
    OWN.iter().any(|own| name.starts_with(own))
}

/// Writes function, file and line; of functions inlined into each other the two innermost that are not the memory manager's own.
pub(crate) fn symbol(address: usize, out: &mut dyn Write) -> fmt::Result {
    let mut result = Ok(());
    let mut named = 0;
    backtrace::resolve(
        std::ptr::without_provenance_mut::<c_void>(address),
        |symbol| {
            let Some(name) = symbol.name().map(|name| format!("{name:#}")) else {
                return;
            };
            if result.is_err() || named == 2 || is_own(&name) {
                return;
            }
            let inlined = if named > 0 { ", inlined into " } else { "" };
            named += 1;
            result = write!(out, "{inlined}{name}");
            if let (Some(file), Some(line)) = (symbol.filename(), symbol.lineno()) {
                result = result.and_then(|()| write!(out, " at {}:{line}", file.display()));
            }
        },
    );
    if named == 0 {
        return write!(out, "{address:#x}");
    }
    result
}
