//! `/proc/zoneinfo`: sizes, watermarks and per-CPU lists of each zone.

use std::path::Path;

use super::text::{Row, empty};
use crate::error::TraceError;

/// A per-CPU list of a zone.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct PerCpuPages {
    /// The CPU.
    pub cpu: u32,
    /// Pages in it.
    pub count: u64,
    /// Above this many, some go back to the zone.
    pub high: u64,
    /// How many are moved at a time.
    pub batch: u64,
}

/// A zone. Everything is in pages.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Zone {
    /// The node.
    pub node: u32,
    /// The name.
    pub name: String,
    /// Free pages, those in per-CPU lists not included.
    pub free: u64,
    /// The min watermark.
    pub min: u64,
    /// The low watermark.
    pub low: u64,
    /// The high watermark.
    pub high: u64,
    /// From the first page to the last, holes included.
    pub spanned: u64,
    /// Pages that exist.
    pub present: u64,
    /// Pages that the buddy allocator was given.
    pub managed: u64,
    /// The first page.
    pub start_pfn: u64,
    /// What this zone keeps for requests that need it, by the zone that a request prefers.
    pub protection: Vec<u64>,
    /// The per-CPU lists.
    pub pcp: Vec<PerCpuPages>,
}

impl Zone {
    /// Pages in per-CPU lists.
    pub fn pcp_pages(&self) -> u64 {
        self.pcp.iter().map(|list| list.count).sum()
    }

    /// One past the last page.
    pub fn end_pfn(&self) -> u64 {
        self.start_pfn.saturating_add(self.spanned)
    }
}

/// `/proc/zoneinfo`.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct ZoneInfo {
    /// The zones, empty ones included.
    pub zones: Vec<Zone>,
}

impl ZoneInfo {
    pub(super) fn parse(text: &str, path: &Path) -> Result<ZoneInfo, TraceError> {
        let mut zones: Vec<Zone> = Vec::new();
        // `high:` of a per-CPU list follows `count:`, `high` of a watermark has no colon.
        for row in Row::all(text, path) {
            if row.text.starts_with("Node") {
                let (node, name, _) = row
                    .node_and_zone()
                    .ok_or_else(|| row.wrong("a line `Node 0, zone Normal`"))?;
                zones.push(Zone {
                    node,
                    name: name.into(),
                    ..Zone::default()
                });
                continue;
            }
            let mut words = row.words();
            let Some(key) = words.next() else { continue };
            let zone = zones
                .last_mut()
                .ok_or_else(|| row.wrong("a line `Node 0, zone DMA` first"))?;
            let number = |word: Option<&str>| match row.number(word, "a number of pages")? {
                // More than any address space has; sums of them cannot overflow.
                n if n > 1u64 << 52 => Err(row.wrong("a number of pages")),
                n => Ok(n),
            };
            match key {
                "pages" => {
                    let count = words.nth(1);
                    zone.free = number(count)?;
                }
                "min" => zone.min = number(words.next())?,
                "low" => zone.low = number(words.next())?,
                "high" => zone.high = number(words.next())?,
                "spanned" => zone.spanned = number(words.next())?,
                "present" => zone.present = number(words.next())?,
                "managed" => zone.managed = number(words.next())?,
                "start_pfn:" => zone.start_pfn = number(words.next())?,
                "protection:" => {
                    let list = row
                        .text
                        .split_once('(')
                        .and_then(|(_, l)| l.split_once(')'));
                    let (list, _) = list.ok_or_else(|| row.wrong("protection: (0, 3019, …)"))?;
                    zone.protection = list
                        .split(',')
                        .map(|word| number(Some(word.trim())))
                        .collect::<Result<_, _>>()?;
                }
                "cpu:" => {
                    let cpu = row.number(words.next(), "the number of a CPU")?;
                    zone.pcp.push(PerCpuPages {
                        cpu,
                        ..PerCpuPages::default()
                    });
                }
                "count:" | "high:" | "batch:" => {
                    let value = number(words.next())?;
                    let list = zone
                        .pcp
                        .last_mut()
                        .ok_or_else(|| row.wrong("a line `cpu: 0` first"))?;
                    match key {
                        "count:" => list.count = value,
                        "high:" => list.high = value,
                        _ => list.batch = value,
                    }
                }
                _ => {}
            }
        }
        if zones.is_empty() {
            return Err(empty(path, "a line `Node 0, zone DMA`"));
        }
        Ok(ZoneInfo { zones })
    }
}
