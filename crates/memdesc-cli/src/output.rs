//! Standard output, whose reader may go away at any time.

use std::io::{ErrorKind, Write};

use serde_json::Value;

/// Prints. If nobody reads any more, the program ends quietly, as others do in a pipe.
pub(crate) fn print(text: &str) {
    let mut out = std::io::stdout().lock();
    if let Err(error) = out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        if error.kind() != ErrorKind::BrokenPipe {
            eprintln!("memdesc: standard output: {error}");
        }
        std::process::exit(if error.kind() == ErrorKind::BrokenPipe {
            141
        } else {
            2
        });
    }
}

/// Prints what was found: as one JSON value if that is wanted, else in words.
pub(crate) fn print_found(
    json: bool,
    value: impl FnOnce() -> Value,
    text: impl FnOnce() -> String,
) {
    if json {
        print(&format!("{:#}\n", value()));
    } else {
        print(&text());
    }
}
