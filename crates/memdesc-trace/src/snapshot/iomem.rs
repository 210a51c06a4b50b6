//! `/proc/iomem`: which physical addresses are memory.

use std::ops::RangeInclusive;
use std::path::Path;

use super::text::{Row, empty};
use crate::error::TraceError;

/// A range of physical addresses.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct IoRange {
    /// The addresses, the last included.
    pub addresses: RangeInclusive<u64>,
    /// How deep it lies within others; 0 for outermost.
    pub depth: usize,
    /// What it is.
    pub name: String,
}

/// `/proc/iomem`.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct IoMem {
    /// The ranges in order of address, inner ones after their outer one.
    pub ranges: Vec<IoRange>,
}

impl IoMem {
    pub(super) fn parse(text: &str, path: &Path) -> Result<IoMem, TraceError> {
        let expected = "a line `00001000-0009fbff : System RAM`";
        let mut ranges = Vec::new();
        for row in Row::all(text, path).filter(|row| !row.text.trim().is_empty()) {
            let inner = row.text.trim_start();
            let depth = (row.text.len() - inner.len()) / 2;
            let (addresses, name) = inner.split_once(" : ").ok_or_else(|| row.wrong(expected))?;
            let hex = |s: &str| u64::from_str_radix(s, 16).map_err(|_| row.wrong(expected));
            let (start, end) = addresses
                .split_once('-')
                .ok_or_else(|| row.wrong(expected))?;
            let addresses = hex(start)?..=hex(end)?;
            if addresses.is_empty() {
                return Err(row.wrong("a range whose end lies behind its start"));
            }
            ranges.push(IoRange {
                addresses,
                depth,
                name: name.trim().into(),
            });
        }
        if ranges.is_empty() {
            return Err(empty(path, expected));
        }
        if ranges.len() > 1 && ranges.iter().all(|r| *r.addresses.end() == 0) {
            return Err(empty(
                path,
                "addresses: they are hidden from all but root, read it as root",
            ));
        }
        Ok(IoMem { ranges })
    }

    /// The ranges of memory, in bytes.
    pub fn system_ram(&self) -> impl Iterator<Item = RangeInclusive<u64>> {
        let ram = self.ranges.iter().filter(|r| r.name == "System RAM");
        ram.map(|r| r.addresses.clone())
    }

    /// The whole pages of memory as first page and one past the last.
    pub fn ram_pfns(&self) -> impl Iterator<Item = std::ops::Range<u64>> {
        self.system_ram().filter_map(|r| {
            let first = r.start().div_ceil(4096);
            let end = (u128::from(*r.end()) + 1) / 4096;
            (u128::from(first) < end).then_some(first..end as u64)
        })
    }
}
