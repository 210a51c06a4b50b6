//! What the parsers of `/proc` files share: lines with their numbers, words, and errors that name
//! them.

use std::path::Path;

use crate::error::TraceError;
use crate::parser::clip;

/// One line of a file of a snapshot.
#[derive(Clone, Copy)]
pub(super) struct Row<'a> {
    pub(super) text: &'a str,
    line: usize,
    path: &'a Path,
}

impl<'a> Row<'a> {
    /// The lines of a file.
    pub(super) fn all(text: &'a str, path: &'a Path) -> impl Iterator<Item = Row<'a>> {
        text.lines().enumerate().map(move |(i, text)| Row {
            text,
            line: i + 1,
            path,
        })
    }

    /// The error that this line is not what it should be.
    pub(super) fn wrong(&self, expected: &'static str) -> TraceError {
        TraceError::Snapshot {
            path: self.path.into(),
            line: self.line as u64,
            expected,
            found: clip(self.text.as_bytes()),
        }
    }

    /// The words of the line.
    pub(super) fn words(&self) -> impl Iterator<Item = &'a str> {
        self.text.split_ascii_whitespace()
    }

    /// A number that must be there.
    pub(super) fn number<T: std::str::FromStr>(
        &self,
        word: Option<&str>,
        expected: &'static str,
    ) -> Result<T, TraceError> {
        word.and_then(|w| w.parse().ok())
            .ok_or_else(|| self.wrong(expected))
    }

    /// `Node 0, zone   Normal` and the rest behind it.
    pub(super) fn node_and_zone(&self) -> Option<(u32, &'a str, &'a str)> {
        let rest = self.text.strip_prefix("Node")?.trim_start();
        let (node, rest) = rest.split_once(',')?;
        let rest = rest.trim_start().strip_prefix("zone")?.trim_start();
        let end = rest.find([' ', ',']).unwrap_or(rest.len());
        Some((node.parse().ok()?, &rest[..end], &rest[end..]))
    }
}

/// The error that a file ends too early.
pub(super) fn empty(path: &Path, expected: &'static str) -> TraceError {
    TraceError::Snapshot {
        path: path.into(),
        line: 1,
        expected,
        found: String::new(),
    }
}
