//! The push parser: pieces of text of any size in, events out, everything left out counted.

use alloc::string::String;
use alloc::vec::Vec;

use crate::event::{CacheTable, Event};
use crate::intern::{CacheNames, GfpNames};
use crate::line::{self, Line, Names};

/// How many broken lines are kept as samples.
pub const SAMPLES: usize = 10;

/// A longer line than this is no event. It bounds what a file without line ends can take.
const LONGEST_LINE: usize = 64 << 10;

/// Everything that was read and is no event.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Skipped {
    /// Lines that should have been events and are not.
    pub broken_lines: u64,
    /// Events that tell of no allocation: other `kmem:*` ones, other subsystems.
    pub other_events: u64,
    /// Events that the tracer says it lost.
    pub lost_events: u64,
    /// Comments.
    pub comments: u64,
    /// Blank lines and lines of call chains.
    pub blank_lines: u64,
    /// Events that are kept although one of their gfp flags has a name from another kernel version;
    /// that flag is missing in them.
    pub unknown_gfp_names: u64,
    /// The first broken lines, at most [`SAMPLES`].
    pub samples: Vec<BrokenLine>,
}

/// A line that could not be read.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BrokenLine {
    /// Its number, from 1.
    pub line: u64,
    /// What should have stood there.
    pub expected: &'static str,
    /// Its text, clipped.
    pub text: String,
}

impl core::fmt::Display for BrokenLine {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(
            f,
            "line {}: expected {}, found {:?}",
            self.line, self.expected, self.text
        )
    }
}

/// Turns the text of a recording into events, piece by piece.
pub struct Parser {
    names: Names,
    skipped: Skipped,
    /// The beginning of a line whose end has not come yet.
    partial: Vec<u8>,
    /// Inside a line that is too long: everything up to its end is dropped.
    too_long: bool,
    lines: u64,
    bytes: u64,
    last_time: u64,
    out_of_order: u64,
}

impl Default for Parser {
    fn default() -> Self {
        Parser::new()
    }
}

impl Parser {
    /// A parser at the beginning of a recording.
    pub fn new() -> Parser {
        Parser {
            names: Names {
                gfp: GfpNames::new(),
                caches: CacheNames::new(),
            },
            skipped: Skipped::default(),
            partial: Vec::new(),
            too_long: false,
            lines: 0,
            bytes: 0,
            last_time: 0,
            out_of_order: 0,
        }
    }

    /// Takes the next piece of text and appends the events of all lines that end in it.
    pub fn feed(&mut self, mut text: &[u8], events: &mut Vec<Event>) {
        self.bytes += text.len() as u64;
        if !self.partial.is_empty() || self.too_long {
            let Some(end) = memchr::memchr(b'\n', text) else {
                return self.keep(text);
            };
            self.keep(&text[..end]);
            self.end_partial(events);
            text = &text[end + 1..];
        }
        let mut start = 0;
        for end in memchr::memchr_iter(b'\n', text) {
            self.line(&text[start..end], events);
            start = end + 1;
        }
        self.keep(&text[start..]);
    }

    /// The text is over: a last line without a line end is read too.
    pub fn finish(&mut self, events: &mut Vec<Event>) {
        if !self.partial.is_empty() || self.too_long {
            self.end_partial(events);
        }
    }

    /// The text breaks off: what has come of the last line is dropped. Returns how many bytes.
    pub fn break_off(&mut self) -> usize {
        self.too_long = false;
        core::mem::take(&mut self.partial).len()
    }

    /// Lines read so far.
    pub fn lines(&self) -> u64 {
        self.lines
    }

    /// Bytes of text taken so far.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Events that bear an earlier time than the one before them.
    pub fn out_of_order(&self) -> u64 {
        self.out_of_order
    }

    /// What was left out so far.
    pub fn skipped(&self) -> &Skipped {
        &self.skipped
    }

    /// The caches seen so far.
    pub fn caches(&self) -> &CacheTable {
        &self.names.caches.table
    }

    /// The caches, and what was left out.
    pub fn into_parts(self) -> (CacheTable, Skipped) {
        (self.names.caches.table, self.skipped)
    }

    fn keep(&mut self, text: &[u8]) {
        if self.too_long {
            return;
        }
        self.partial.extend_from_slice(text);
        if self.partial.len() > LONGEST_LINE {
            self.too_long = true;
            self.partial.truncate(LONGEST_LINE);
        }
    }

    fn end_partial(&mut self, events: &mut Vec<Event>) {
        let partial = core::mem::take(&mut self.partial);
        if core::mem::take(&mut self.too_long) {
            self.lines += 1;
            self.broken(&partial, "a line below 64 KiB");
        } else {
            self.line(&partial, events);
        }
        // Keeps its memory: there is one such line in each piece.
        self.partial = partial;
        self.partial.clear();
    }

    #[inline]
    fn line(&mut self, line: &[u8], events: &mut Vec<Event>) {
        self.lines += 1;
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        match line::parse(line, &mut self.names) {
            Ok(Line::Event(event, unknown_gfp_name)) => {
                self.skipped.unknown_gfp_names += u64::from(unknown_gfp_name);
                self.out_of_order += u64::from(event.time_ns < self.last_time);
                self.last_time = event.time_ns;
                events.push(event);
            }
            Ok(Line::Other) => self.skipped.other_events += 1,
            Ok(Line::Lost(events)) => self.skipped.lost_events += events,
            Ok(Line::Comment) => self.skipped.comments += 1,
            Ok(Line::Blank) => self.skipped.blank_lines += 1,
            Err(expected) => self.broken(line, expected),
        }
    }

    #[cold]
    fn broken(&mut self, line: &[u8], expected: &'static str) {
        self.skipped.broken_lines += 1;
        if self.skipped.samples.len() < SAMPLES {
            let text = clip(line);
            self.skipped.samples.push(BrokenLine {
                line: self.lines,
                expected,
                text,
            });
        }
    }
}

/// The longest text of a file that an error quotes.
const CLIP: usize = 120;

/// The beginning of a line, fit to be printed.
pub(crate) fn clip(line: &[u8]) -> String {
    let text = String::from_utf8_lossy(&line[..line.len().min(CLIP)]);
    let mut text: String = text
        .chars()
        .map(|c| {
            if c.is_control() && c != '\t' {
                '\u{fffd}'
            } else {
                c
            }
        })
        .collect();
    if line.len() > CLIP {
        text.push('…');
    }
    text
}
