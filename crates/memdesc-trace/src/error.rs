//! What can go wrong while reading: which file, which line, what was expected, what to do.

use std::path::PathBuf;

/// Why a recording or a snapshot could not be read.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// The file cannot be opened or read.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// A folder without a recording.
    #[error("{}: no events.txt, events.txt.zst or events.txt.gz in this folder: name the file itself, \
             or make one with `perf script -F cpu,time,event,trace > events.txt`", path.display())]
    NoEventsFile {
        /// The folder.
        path: PathBuf,
    },
    /// There is nothing in the file, or comments only.
    #[error("{}: no events in it ({lines} lines, all blank or comments): record with \
             `perf record -a -e 'kmem:*'` while something runs", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
        /// Lines that were read.
        lines: u64,
    },
    /// Events there are, of other subsystems only.
    #[error("{}: {other} events and none of kmem that tells of an allocation: record with \
             `perf record -a -e 'kmem:*'`", path.display())]
    NoKmemEvents {
        /// The file.
        path: PathBuf,
        /// Events of others.
        other: u64,
    },
    /// Nothing in the file could be recognised.
    #[error("{}: not a recording: line {line} reads {found:?}, expected {expected}; {hint}", path.display())]
    NotARecording {
        /// The file.
        path: PathBuf,
        /// The first line that was not understood, from 1.
        line: u64,
        /// Its text, clipped.
        found: String,
        /// What should have stood there.
        expected: &'static str,
        /// What to do.
        hint: &'static str,
    },
    /// A file in a binary format that another tool turns into text.
    #[error("{}: this is {what}; {hint}", path.display())]
    WrongFormat {
        /// The file.
        path: PathBuf,
        /// What it is.
        what: &'static str,
        /// What to do.
        hint: &'static str,
    },
    /// A compressed file that is damaged from the start.
    #[error("{}: cannot be decompressed ({reason}): copy it again", path.display())]
    Compressed {
        /// The file.
        path: PathBuf,
        /// What the decompressor says.
        reason: String,
    },
    /// A file of a snapshot is not what it should be.
    #[error("{}:{line}: expected {expected}, found {found:?}", path.display())]
    Snapshot {
        /// The file.
        path: PathBuf,
        /// The line, from 1; for files of pages the number of the page, from 0.
        line: u64,
        /// What should have stood there.
        expected: &'static str,
        /// What stands there, clipped.
        found: String,
    },
}
