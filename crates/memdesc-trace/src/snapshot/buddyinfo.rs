//! `/proc/buddyinfo` and `/proc/pagetypeinfo`: free blocks by order, zone and mobility.

use std::path::Path;

use super::text::{Row, empty};
use crate::error::TraceError;

/// Orders that are told apart: 0 to 10.
pub const ORDERS: usize = 11;

/// Free blocks of a zone.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ZoneFree {
    /// The node.
    pub node: u32,
    /// The zone's name.
    pub zone: String,
    /// Free blocks of each order.
    pub blocks: [u64; ORDERS],
}

impl ZoneFree {
    /// Free pages, all orders together.
    pub fn pages(&self) -> u64 {
        self.blocks
            .iter()
            .enumerate()
            .map(|(order, n)| n << order)
            .sum()
    }
}

/// `/proc/buddyinfo`.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct BuddyInfo {
    /// The zones, in order.
    pub zones: Vec<ZoneFree>,
}

fn orders(row: &Row<'_>, rest: &str) -> Result<[u64; ORDERS], TraceError> {
    const COUNTS: &str = "the number of free blocks of each order, 0 to 10 (kernels with more orders are not supported)";
    let mut words = rest.split_ascii_whitespace();
    let mut blocks = [0; ORDERS];
    for (i, count) in blocks.iter_mut().enumerate() {
        match words.next() {
            Some(word) => {
                // pagetypeinfo stops counting: `>100000`.
                let word = word.strip_prefix('>').unwrap_or(word);
                *count = row.number::<u32>(Some(word), COUNTS)?.into();
            }
            // Kernels may be built with fewer orders.
            None if i > 0 => break,
            None => return Err(row.wrong(COUNTS)),
        }
    }
    if words.any(|w| w != "0") {
        Err(row.wrong(COUNTS))
    } else {
        Ok(blocks)
    }
}

impl BuddyInfo {
    pub(super) fn parse(text: &str, path: &Path) -> Result<BuddyInfo, TraceError> {
        let mut zones = Vec::new();
        for row in Row::all(text, path).filter(|row| !row.text.trim().is_empty()) {
            let (node, zone, rest) = row
                .node_and_zone()
                .ok_or_else(|| row.wrong("a line `Node 0, zone Normal …`"))?;
            zones.push(ZoneFree {
                node,
                zone: zone.into(),
                blocks: orders(&row, rest)?,
            });
        }
        if zones.is_empty() {
            return Err(empty(path, "a line `Node 0, zone Normal …`"));
        }
        Ok(BuddyInfo { zones })
    }

    /// All zones together.
    pub fn by_order(&self) -> [u64; ORDERS] {
        let mut sum = [0; ORDERS];
        for zone in &self.zones {
            sum.iter_mut()
                .zip(zone.blocks)
                .for_each(|(sum, n)| *sum += n);
        }
        sum
    }

    /// Free pages of all zones.
    pub fn pages(&self) -> u64 {
        self.zones.iter().map(ZoneFree::pages).sum()
    }
}

/// Free blocks of one mobility in a zone.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TypeFree {
    /// The node.
    pub node: u32,
    /// The zone's name.
    pub zone: String,
    /// The mobility's name (`Movable`).
    pub migratetype: String,
    /// Free blocks of each order. The kernel stops counting at 100 000.
    pub blocks: [u64; ORDERS],
}

/// Pageblocks of a zone by mobility.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ZoneBlocks {
    /// The node.
    pub node: u32,
    /// The zone's name.
    pub zone: String,
    /// Mobility and number of pageblocks.
    pub blocks: Vec<(String, u64)>,
}

/// `/proc/pagetypeinfo`.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct PageTypeInfo {
    /// The order of a pageblock.
    pub pageblock_order: u32,
    /// Free blocks by zone and mobility.
    pub free: Vec<TypeFree>,
    /// Pageblocks by zone and mobility.
    pub pageblocks: Vec<ZoneBlocks>,
}

impl PageTypeInfo {
    pub(super) fn parse(text: &str, path: &Path) -> Result<PageTypeInfo, TraceError> {
        let mut info = PageTypeInfo::default();
        let mut types: Option<Vec<String>> = None;
        for row in Row::all(text, path).filter(|row| !row.text.trim().is_empty()) {
            if let Some(order) = row.text.strip_prefix("Page block order:") {
                info.pageblock_order =
                    row.number(Some(order.trim()), "the order of a pageblock")?;
            } else if let Some(names) = row.text.strip_prefix("Number of blocks type") {
                types = Some(names.split_ascii_whitespace().map(String::from).collect());
            } else if row.text.starts_with("Node") {
                let expected = "a line `Node 0, zone Normal, type Movable …`";
                let (node, zone, rest) = row.node_and_zone().ok_or_else(|| row.wrong(expected))?;
                let zone = zone.to_string();
                if let Some(types) = &types {
                    let mut words = rest.split_ascii_whitespace();
                    let count = |name: &String| {
                        Ok((
                            name.clone(),
                            row.number(words.next(), "a number for each mobility")?,
                        ))
                    };
                    let blocks = types.iter().map(count).collect::<Result<_, TraceError>>()?;
                    info.pageblocks.push(ZoneBlocks { node, zone, blocks });
                } else {
                    let (_, rest) = rest
                        .split_once("type ")
                        .ok_or_else(|| row.wrong(expected))?;
                    let rest = rest.trim_start();
                    let (name, rest) = rest.split_once(' ').ok_or_else(|| row.wrong(expected))?;
                    let migratetype = name.to_string();
                    info.free.push(TypeFree {
                        node,
                        zone,
                        migratetype,
                        blocks: orders(&row, rest)?,
                    });
                }
            }
        }
        if info.free.is_empty() {
            return Err(empty(path, "lines `Node 0, zone Normal, type Movable …`"));
        }
        Ok(info)
    }
}
