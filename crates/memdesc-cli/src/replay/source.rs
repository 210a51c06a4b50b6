//! Where a recording comes from: a path, or the one inside the program.

use std::fs::File;
use std::io::{Cursor, Read};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use memdesc_trace::{Reader, Recording, Snapshot, TraceError, binary};

use crate::error::Error;
use crate::progress;

macro_rules! embedded {
    ($($name:literal,)*) => {
        &[$(($name, include_bytes!(concat!("../../recordings/build/", $name)))),*]
    };
}

/// The recording inside the program, file by file: those that a replay looks at.
const EMBEDDED: &[(&str, &[u8])] = embedded![
    "events.txt.zst",
    "kernel",
    "buddyinfo.before",
    "iomem.before",
    "kpageflags.before.zst",
    "meminfo.before",
    "zoneinfo.before",
];
/// What the embedded recording is called.
const EMBEDDED_NAME: &str = "(built in: the beginning of a cargo build)";

/// A recording, and how long it took to read.
pub(crate) struct Source {
    pub(crate) name: String,
    pub(crate) kernel: Option<String>,
    pub(crate) recording: Recording,
    pub(crate) parse: Duration,
    /// Reading the snapshots.
    pub(crate) load: Duration,
}

/// Reads a recording, or the embedded one.
pub(crate) fn load(path: Option<&Path>, snapshots: bool, quiet: bool) -> Result<Source, Error> {
    Ok(match path {
        Some(path) if is_binary(path) => from_binary(path)?,
        Some(path) => from_path(path, snapshots, quiet)?,
        None => embedded(snapshots, quiet)?,
    })
}

/// Is it a file that begins as a recording in binary does? What cannot be read is not: who reads it then says why.
fn is_binary(path: &Path) -> bool {
    let mut magic = [0; binary::MAGIC.len()];
    let file = path.is_file().then(|| File::open(path).ok()).flatten();
    file.is_some_and(|mut file| file.read_exact(&mut magic).is_ok() && binary::is_binary(&magic))
}

/// What `memdesc cut --binary` has written.
fn from_binary(path: &Path) -> Result<Source, Error> {
    let start = Instant::now();
    let bytes = std::fs::read(path).map_err(|source| Error::Io {
        path: path.into(),
        source,
    })?;
    let read = binary::read(&bytes).map_err(|source| Error::BinaryFile {
        path: path.into(),
        source,
    })?;
    let recording = Recording {
        events: read.events,
        caches: read.caches,
        bytes: bytes.len() as u64,
        ..Recording::default()
    };
    Ok(Source {
        name: path.display().to_string(),
        kernel: None,
        recording,
        parse: start.elapsed(),
        load: Duration::ZERO,
    })
}

fn from_path(path: &Path, snapshots: bool, quiet: bool) -> Result<Source, TraceError> {
    let start = Instant::now();
    let bar = progress::bytes(quiet);
    let mut parse = None;
    let recording = Recording::open(path, &mut |p| {
        progress::reading(&bar, p);
        parse = Some(start.elapsed());
    });
    bar.finish_and_clear();
    let mut recording = recording?;
    let all = start.elapsed();
    let parse = parse.unwrap_or(all);
    if !snapshots {
        recording.before = None;
        recording.after = None;
    }
    let folder = if path.is_dir() {
        Some(path)
    } else {
        path.parent()
    };
    let kernel = folder.and_then(|f| std::fs::read_to_string(f.join("kernel")).ok());
    Ok(Source {
        name: path.display().to_string(),
        kernel: kernel
            .map(|k| k.trim().to_string())
            .filter(|k| !k.is_empty()),
        recording,
        parse,
        load: all.saturating_sub(parse),
    })
}

fn embedded(snapshots: bool, quiet: bool) -> Result<Source, TraceError> {
    let name = PathBuf::from(EMBEDDED_NAME);
    let events = EMBEDDED.iter().find(|(n, _)| n.starts_with("events.txt"));
    let events = events.map_or(&[][..], |(_, data)| data);
    let start = Instant::now();
    let bar = progress::bytes(quiet);
    let reader = Reader::new(Cursor::new(events), &name)?;
    let recording = Recording::read(reader, &mut |p| progress::reading(&bar, p));
    bar.finish_and_clear();
    let mut recording = recording?;
    let parse = start.elapsed();
    if snapshots {
        recording.before = Snapshot::from_files(EMBEDDED, ".before")?.non_empty();
    }
    let kernel = EMBEDDED.iter().find(|(n, _)| *n == "kernel");
    Ok(Source {
        name: EMBEDDED_NAME.into(),
        kernel: kernel.map(|(_, data)| String::from_utf8_lossy(data).trim().to_string()),
        recording,
        parse,
        load: start.elapsed().saturating_sub(parse),
    })
}
