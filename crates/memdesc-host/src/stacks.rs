//! Call stacks of the process, and their symbols. Not from signal handlers: unwinding and debug information take locks.

use std::ffi::c_void;
use std::fmt::{self, Write};
use std::path::Path;

use backtrace::Symbol;

/// The crates of the memory manager's own frames, which all stacks begin with and nobody wants to see. Functions are told by where they are written: what is
/// built with line tables only has names without modules.
const OWN: &[&str] = &["backtrace", "memdesc-host", "memdesc"];
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
            |symbol| own = is_own(symbol),
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

/// Is the function written in one of our own crates, wherever that is: `memdesc/src/…`, or `memdesc-0.1.0/src/…` of a registry?
fn is_own(symbol: &Symbol) -> bool {
    symbol.filename().is_some_and(is_own_file)
}

fn is_own_file(path: &Path) -> bool {
    let is_own_folder = |folder: &str| {
        let rest = OWN.iter().filter_map(|own| folder.strip_prefix(own));
        let is_version = |rest: &str| rest.starts_with(|c: char| c.is_ascii_digit());
        { rest }.any(|rest| rest.is_empty() || rest.strip_prefix('-').is_some_and(is_version))
    };
    let folders = || {
        path.iter()
            .map(|folder| folder.to_str().unwrap_or_default())
    };
    folders()
        .zip(folders().skip(1))
        .any(|(folder, next)| next == "src" && is_own_folder(folder))
}

/// Writes function, file and line; of functions inlined into each other the two innermost that are not the memory manager's own.
pub(crate) fn symbol(address: usize, out: &mut dyn Write) -> fmt::Result {
    let mut result = Ok(());
    let mut named = 0;
    backtrace::resolve(
        std::ptr::without_provenance_mut::<c_void>(address),
        |symbol| {
            if result.is_err() || named == 2 || is_own(symbol) {
                return;
            }
            let Some(name) = symbol.name() else {
                return;
            };
            let inlined = if named > 0 { ", inlined into " } else { "" };
            named += 1;
            result = write!(out, "{inlined}{name:#}");
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_files_are_told_from_those_of_who_calls() {
        for own in [
            "/home/me/memdesc/crates/memdesc/src/owner.rs",
            "crates/memdesc-host/src/slab/mod.rs",
            "/home/me/.cargo/registry/src/index/memdesc-0.1.0/src/lib.rs",
            "/home/me/.cargo/registry/src/index/backtrace-0.3.77/src/backtrace/mod.rs",
        ] {
            assert!(is_own_file(Path::new(own)), "{own}");
        }
        for other in [
            "crates/memdesc/tests/page_history.rs",
            "crates/memdesc-cli/src/main.rs",
            "/home/me/memdesc/kernel/src/main.rs",
            "/rustc/1234/library/std/src/sys/backtrace.rs",
        ] {
            assert!(!is_own_file(Path::new(other)), "{other}");
        }
    }
}
