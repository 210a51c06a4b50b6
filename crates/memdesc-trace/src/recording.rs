//! A recording read whole, with the snapshots that lie beside it.

use std::ops::Range;
use std::path::{Path, PathBuf};

use crate::error::TraceError;
use crate::event::{CacheTable, Event};
use crate::parser::{Parser, Skipped};
use crate::reader::{Progress, Reader, Truncated};
use crate::snapshot::Snapshot;

/// What a folder's file of events may be called.
const EVENTS: [&str; 3] = ["events.txt", "events.txt.zst", "events.txt.gz"];

/// The events of a real kernel's allocators, and what was left out of them.
#[derive(Clone, Debug, Default)]
pub struct Recording {
    /// The events in the order of the file.
    pub events: Vec<Event>,
    /// The caches that they refer to.
    pub caches: CacheTable,
    /// What was read and is no event.
    pub skipped: Skipped,
    /// Where the file broke off, if it did.
    pub truncated: Option<Truncated>,
    /// Lines read.
    pub lines: u64,
    /// Bytes of text read.
    pub bytes: u64,
    /// Events that bear an earlier time than the one before them: CPUs' buffers are merged only
    /// roughly. [`sort_by_time`](Recording::sort_by_time) puts them in order.
    pub out_of_order: u64,
    /// The state of memory before the first event.
    pub before: Option<Snapshot>,
    /// The state of memory after the last event.
    pub after: Option<Snapshot>,
}

impl Recording {
    /// Reads a recording: a folder that holds `events.txt` (or `.zst`, `.gz`), a file of events, or
    /// `-` for standard input. Snapshots beside the events (`buddyinfo.before`, …) are read too.
    ///
    /// `progress` is called after each block of 1 MiB of text.
    pub fn open(
        path: impl AsRef<Path>,
        progress: &mut impl FnMut(Progress),
    ) -> Result<Recording, TraceError> {
        let (file, folder) = locate(path.as_ref())?;
        let mut recording = Recording::read(Reader::open(&file)?, progress)?;
        if let Some(folder) = folder {
            recording.before = Snapshot::load(&folder, ".before")?.non_empty();
            recording.after = Snapshot::load(&folder, ".after")?.non_empty();
        }
        Ok(recording)
    }

    /// Reads all that a reader gives.
    pub fn read(
        mut reader: Reader,
        progress: &mut impl FnMut(Progress),
    ) -> Result<Recording, TraceError> {
        let mut events = Vec::new();
        while reader.append_batch(&mut events)? {
            progress(reader.progress());
        }
        let (parser, truncated) = reader.into_parts();
        Ok(Recording::from_parts(events, parser, truncated))
    }

    fn from_parts(events: Vec<Event>, parser: Parser, truncated: Option<Truncated>) -> Recording {
        let (lines, bytes, out_of_order) = (parser.lines(), parser.bytes(), parser.out_of_order());
        let (caches, skipped) = parser.into_parts();
        Recording {
            events,
            caches,
            skipped,
            truncated,
            lines,
            bytes,
            out_of_order,
            before: None,
            after: None,
        }
    }

    /// The time of the first and the last event, if there are any.
    pub fn time_span(&self) -> Option<Range<u64>> {
        let times = || self.events.iter().map(|e| e.time_ns);
        Some(times().min()?..times().max()?)
    }

    /// One more than the highest CPU, 0 without events.
    pub fn cpus(&self) -> usize {
        self.events
            .iter()
            .map(|e| usize::from(e.cpu) + 1)
            .max()
            .unwrap_or(0)
    }

    /// Sorts the events by time; those of one instant stay in the order of the file.
    pub fn sort_by_time(&mut self) {
        // Nearly sorted already, which the stable sort makes use of.
        self.events.sort_by_key(|e| e.time_ns);
        self.out_of_order = 0;
    }

    /// Keeps the events of a window of time (nanoseconds on the recording's clock), at most `limit`
    /// of them. A snapshot stays only if the events still begin just behind it, or end just before.
    pub fn cut(&mut self, window: Range<u64>, limit: usize) {
        let whole = self.events.len();
        let first = self.events.first().copied();
        let last = self.events.last().copied();
        self.events.retain(|e| window.contains(&e.time_ns));
        self.events.truncate(limit);
        if self.events.len() < whole {
            self.before = self
                .before
                .take()
                .filter(|_| self.events.first().copied() == first);
            self.after = self
                .after
                .take()
                .filter(|_| self.events.last().copied() == last);
        }
        let disorder = self
            .events
            .windows(2)
            .filter(|w| w[1].time_ns < w[0].time_ns);
        self.out_of_order = disorder.count() as u64;
    }
}

/// Parses a recording that is in memory. There are no errors: what cannot be read is counted.
pub fn parse_bytes(text: &[u8]) -> Recording {
    let mut parser = Parser::new();
    let mut events = Vec::new();
    parser.feed(text, &mut events);
    parser.finish(&mut events);
    Recording::from_parts(events, parser, None)
}

/// The file of events, and the folder where snapshots may be.
fn locate(path: &Path) -> Result<(PathBuf, Option<PathBuf>), TraceError> {
    if path == Path::new("-") {
        return Ok((path.into(), None));
    }
    if !path.is_dir() {
        let folder = match path.parent() {
            Some(parent) if parent != Path::new("") => parent,
            _ => Path::new("."),
        };
        return Ok((path.into(), Some(folder.into())));
    }
    let file = EVENTS
        .iter()
        .map(|name| path.join(name))
        .find(|file| file.exists());
    match file {
        Some(file) => Ok((file, Some(path.into()))),
        None => Err(TraceError::NoEventsFile { path: path.into() }),
    }
}
