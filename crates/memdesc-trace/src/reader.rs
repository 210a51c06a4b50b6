//! A file in large blocks: decompression by magic bytes, progress, and where a damaged file broke.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::TraceError;
use crate::event::Event;
use crate::parser::Parser;

/// How much text is parsed at a time.
const BLOCK: usize = 1 << 20;

/// Files made with `zstd --long` need a larger window than decoders allow by themselves.
const WINDOW_LOG_MAX: u32 = 31;

/// After so many broken lines without any event a file is no recording, however long it is.
const HOPELESS: u64 = 10_000;

/// How far the reading of a file has come.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Progress {
    /// Bytes read of the file as it lies there.
    pub bytes_read: u64,
    /// Its size, where it has one.
    pub bytes_total: Option<u64>,
    /// Lines parsed.
    pub lines: u64,
    /// Events among them.
    pub events: u64,
}

/// Where a file broke off or its compressed data was damaged. What came before is kept.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Truncated {
    /// The offset in the decompressed text.
    pub offset: u64,
    /// The line that is not whole, from 1.
    pub line: u64,
    /// What the decompressor says.
    pub reason: String,
}

impl std::fmt::Display for Truncated {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Truncated {
            offset,
            line,
            reason,
        } = self;
        write!(
            f,
            "broke off in line {line}, at byte {offset} of the decompressed text ({reason})"
        )
    }
}

/// Counts what passes through, visible while a decoder owns it.
struct Counted<R> {
    inner: R,
    count: Arc<AtomicU64>,
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buf)?;
        // Only this thread counts; the atomic lets the decoder be sent to another.
        self.count.fetch_add(n as u64, Ordering::Relaxed);
        Ok(n)
    }
}

/// Text or raw data, decompressed if the magic bytes say so.
pub(crate) struct Source {
    data: Box<dyn Read + Send>,
    path: PathBuf,
    compressed: bool,
    read: Arc<AtomicU64>,
    total: Option<u64>,
}

impl Source {
    /// Opens a file; `-` is standard input.
    pub(crate) fn open(path: &Path) -> Result<Source, TraceError> {
        let io_error = |source| TraceError::Io {
            path: path.into(),
            source,
        };
        if path == Path::new("-") {
            return Source::new(io::stdin(), path, None);
        }
        let file = File::open(path).map_err(io_error)?;
        let meta = file.metadata().map_err(io_error)?;
        // Files in /proc say 0 and are not.
        let total = (meta.is_file() && meta.len() > 0).then_some(meta.len());
        Source::new(file, path, total)
    }

    pub(crate) fn new(
        raw: impl Read + Send + 'static,
        path: &Path,
        total: Option<u64>,
    ) -> Result<Source, TraceError> {
        let io_error = |source| TraceError::Io {
            path: path.into(),
            source,
        };
        let read = Arc::new(AtomicU64::new(0));
        let mut raw = Counted {
            inner: raw,
            count: Arc::clone(&read),
        };
        let mut magic = Vec::with_capacity(8);
        raw.by_ref()
            .take(8)
            .read_to_end(&mut magic)
            .map_err(io_error)?;
        if let Some((what, hint)) = foreign(&magic) {
            return Err(TraceError::WrongFormat {
                path: path.into(),
                what,
                hint,
            });
        }
        let zstd = magic.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]);
        let gzip = magic.starts_with(&[0x1f, 0x8b]);
        let whole = io::BufReader::with_capacity(256 << 10, io::Cursor::new(magic).chain(raw));
        let data: Box<dyn Read + Send> = if zstd {
            let mut decoder = zstd::stream::read::Decoder::with_buffer(whole).map_err(io_error)?;
            decoder.window_log_max(WINDOW_LOG_MAX).map_err(io_error)?;
            Box::new(decoder)
        } else if gzip {
            Box::new(flate2::bufread::MultiGzDecoder::new(whole))
        } else {
            Box::new(whole)
        };
        Ok(Source {
            data,
            path: path.into(),
            compressed: zstd || gzip,
            read,
            total,
        })
    }

    /// Fills the buffer as far as the data goes; an error comes with what was filled before it.
    pub(crate) fn fill(&mut self, buf: &mut [u8]) -> (usize, Option<io::Error>) {
        let mut len = 0;
        while len < buf.len() {
            match self.data.read(&mut buf[len..]) {
                Ok(0) => break,
                Ok(n) => len += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return (len, Some(e)),
            }
        }
        (len, None)
    }

    /// All of it; damaged compressed data is an error.
    pub(crate) fn read_whole(mut self) -> Result<Vec<u8>, TraceError> {
        let mut bytes = Vec::new();
        match self.data.read_to_end(&mut bytes) {
            Ok(_) => Ok(bytes),
            Err(e) => Err(self.error(e)),
        }
    }

    fn error(&self, source: io::Error) -> TraceError {
        if self.compressed && source.raw_os_error().is_none() {
            TraceError::Compressed {
                path: self.path.clone(),
                reason: source.to_string(),
            }
        } else {
            TraceError::Io {
                path: self.path.clone(),
                source,
            }
        }
    }
}

/// Formats that are mistaken for text at times.
fn foreign(magic: &[u8]) -> Option<(&'static str, &'static str)> {
    let of = |bytes: &[u8]| magic.starts_with(bytes);
    if of(b"PERFILE2") || of(b"2ELIFREP") {
        let hint = "print it with `perf script -F cpu,time,event,trace -i FILE > events.txt`";
        Some(("a recording of perf in binary", hint))
    } else if of(b"\x17\x08Dtraci") {
        Some((
            "a recording of trace-cmd in binary",
            "print it with `trace-cmd report FILE > events.txt`",
        ))
    } else if of(b"\xfd7zXZ\0") {
        Some((
            "compressed with xz",
            "decompress it with `xz -d FILE`, or use zstd or gzip",
        ))
    } else if of(b"BZh") {
        Some((
            "compressed with bzip2",
            "decompress it with `bzip2 -d FILE`, or use zstd or gzip",
        ))
    } else {
        None
    }
}

/// Reads a recording block by block, for those who need not keep it whole.
///
/// ```no_run
/// # fn main() -> Result<(), memdesc_trace::TraceError> {
/// let mut reader = memdesc_trace::Reader::open("events.txt.zst".as_ref())?;
/// let mut events = Vec::new();
/// while reader.next_batch(&mut events)? {
///     println!("{} events", events.len());
/// }
/// # Ok(())
/// # }
/// ```
pub struct Reader {
    source: Source,
    parser: Parser,
    block: Vec<u8>,
    events: u64,
    done: bool,
    truncated: Option<Truncated>,
}

impl Reader {
    /// Opens a file of events; `-` is standard input.
    pub fn open(path: &Path) -> Result<Reader, TraceError> {
        Ok(Reader::of(Source::open(path)?))
    }

    /// Reads from anything; `name` is what errors call it.
    pub fn new(raw: impl Read + Send + 'static, name: &Path) -> Result<Reader, TraceError> {
        Ok(Reader::of(Source::new(raw, name, None)?))
    }

    fn of(source: Source) -> Reader {
        let block = vec![0; BLOCK];
        Reader {
            source,
            parser: Parser::new(),
            block,
            events: 0,
            done: false,
            truncated: None,
        }
    }

    /// Replaces `events` with those of the next block. `false`: there is no more.
    pub fn next_batch(&mut self, events: &mut Vec<Event>) -> Result<bool, TraceError> {
        events.clear();
        self.append_batch(events)
    }

    /// Appends the events of the next block. `false`: there is no more.
    pub(crate) fn append_batch(&mut self, events: &mut Vec<Event>) -> Result<bool, TraceError> {
        if self.done {
            return Ok(false);
        }
        let before = events.len();
        let (len, error) = self.source.fill(&mut self.block);
        self.parser.feed(&self.block[..len], events);
        self.done = len < self.block.len();
        match error {
            Some(e) => {
                self.done = true;
                if !self.source.compressed || e.raw_os_error().is_some() || self.parser.bytes() == 0
                {
                    return Err(self.source.error(e));
                }
                let line = self.parser.lines() + 1;
                self.parser.break_off();
                self.truncated = Some(Truncated {
                    offset: self.parser.bytes(),
                    line,
                    reason: e.to_string(),
                });
            }
            None if self.done => self.parser.finish(events),
            None => {}
        }
        self.events += (events.len() - before) as u64;
        self.judge()?;
        Ok(events.len() > before || !self.done)
    }

    /// Is this a recording at all?
    fn judge(&self) -> Result<(), TraceError> {
        let skipped = self.parser.skipped();
        if self.events > 0 || !(self.done || skipped.broken_lines > HOPELESS) {
            return Ok(());
        }
        let path = self.source.path.clone();
        let lines = self.parser.lines();
        if let Some(first) = skipped
            .samples
            .first()
            .filter(|_| skipped.other_events == 0)
        {
            return Err(TraceError::NotARecording {
                path,
                line: first.line,
                found: first.text.clone(),
                expected: first.expected,
                hint: "make one with `perf script -F cpu,time,event,trace` or from ftrace's `trace`",
            });
        }
        match (&self.truncated, skipped.other_events) {
            (_, _) if !self.done => Ok(()),
            (_, other @ 1..) => Err(TraceError::NoKmemEvents { path, other }),
            (Some(broken), 0) => Err(TraceError::Compressed {
                path,
                reason: broken.to_string(),
            }),
            (None, 0) => Err(TraceError::Empty { path, lines }),
        }
    }

    /// How far it has come.
    pub fn progress(&self) -> Progress {
        Progress {
            bytes_read: self.source.read.load(Ordering::Relaxed),
            bytes_total: self.source.total,
            lines: self.parser.lines(),
            events: self.events,
        }
    }

    /// The parser, for what it has counted and the caches it has seen.
    pub fn parser(&self) -> &Parser {
        &self.parser
    }

    /// Where the file broke off, once that has been met.
    pub fn truncated(&self) -> Option<&Truncated> {
        self.truncated.as_ref()
    }

    pub(crate) fn into_parts(self) -> (Parser, Option<Truncated>) {
        (self.parser, self.truncated)
    }
}
