//! `/proc/meminfo`, `/proc/vmstat` and `/proc/slabinfo`: names with numbers.

use std::collections::BTreeMap;
use std::path::Path;

use super::text::{Row, empty};
use crate::error::TraceError;

/// `/proc/meminfo`.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct MemInfo {
    /// Bytes by name (`MemFree`); where the kernel gives no unit, the bare number.
    pub values: BTreeMap<String, u64>,
}

impl MemInfo {
    pub(super) fn parse(text: &str, path: &Path) -> Result<MemInfo, TraceError> {
        let mut values = BTreeMap::new();
        for row in Row::all(text, path).filter(|row| !row.text.trim().is_empty()) {
            let expected = "a line `MemFree: 123 kB`";
            let (name, value) = row
                .text
                .split_once(':')
                .ok_or_else(|| row.wrong(expected))?;
            let mut words = value.split_ascii_whitespace();
            let number: u64 = row.number(words.next(), expected)?;
            let unit = match words.next() {
                Some("kB") => 1024,
                None => 1,
                Some(_) => return Err(row.wrong(expected)),
            };
            let bytes = number
                .checked_mul(unit)
                .ok_or_else(|| row.wrong(expected))?;
            values.insert(name.trim().to_string(), bytes);
        }
        if values.is_empty() {
            return Err(empty(path, "a line `MemFree: 123 kB`"));
        }
        Ok(MemInfo { values })
    }

    /// The value with this name, in bytes.
    pub fn get(&self, name: &str) -> Option<u64> {
        self.values.get(name).copied()
    }
}

/// `/proc/vmstat`.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct VmStat {
    /// Numbers by name (`nr_free_pages`).
    pub values: BTreeMap<String, i64>,
}

impl VmStat {
    pub(super) fn parse(text: &str, path: &Path) -> Result<VmStat, TraceError> {
        let mut values = BTreeMap::new();
        for row in Row::all(text, path).filter(|row| !row.text.trim().is_empty()) {
            let mut words = row.words();
            let name = words.next().unwrap_or_default().to_string();
            // Counters are unsigned and may have passed the middle of their range.
            let value: i128 = row.number(words.next(), "a name and a number")?;
            let value = i64::try_from(value).unwrap_or(value as u64 as i64);
            values.insert(name, value);
        }
        if values.is_empty() {
            return Err(empty(path, "a line `nr_free_pages 123`"));
        }
        Ok(VmStat { values })
    }

    /// The number with this name.
    pub fn get(&self, name: &str) -> Option<i64> {
        self.values.get(name).copied()
    }
}

/// A cache in `/proc/slabinfo`.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct SlabCache {
    /// The name; caches that were merged show under one of their names.
    pub name: String,
    /// Objects in use, roughly: those in per-CPU slabs count as used.
    pub active_objects: u64,
    /// Objects that there is room for.
    pub objects: u64,
    /// Bytes that an object takes.
    pub object_size: u64,
    /// Objects in a slab.
    pub objects_per_slab: u64,
    /// Pages in a slab.
    pub pages_per_slab: u64,
    /// Slabs.
    pub slabs: u64,
}

impl SlabCache {
    /// Pages that the cache holds.
    pub fn pages(&self) -> u64 {
        self.slabs.saturating_mul(self.pages_per_slab)
    }
}

/// `/proc/slabinfo`.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct SlabInfo {
    /// The caches.
    pub caches: Vec<SlabCache>,
}

impl SlabInfo {
    pub(super) fn parse(text: &str, path: &Path) -> Result<SlabInfo, TraceError> {
        let expected = "a line `name active objects size per_slab pages : tunables … : slabdata active slabs shared`";
        let mut caches = Vec::new();
        let mut header = false;
        for row in Row::all(text, path).filter(|row| !row.text.trim().is_empty()) {
            if row.text.starts_with("slabinfo - version:") || row.text.starts_with('#') {
                header = true;
                continue;
            }
            let (front, slabdata) = row
                .text
                .split_once(": slabdata")
                .ok_or_else(|| row.wrong(expected))?;
            let front = front.split(" : tunables").next().unwrap_or(front);
            // From the end: a cache's name may contain spaces.
            let mut numbers = front.split_ascii_whitespace().rev();
            let mut next = || row.number(numbers.next(), expected);
            let (pages_per_slab, objects_per_slab, object_size) = (next()?, next()?, next()?);
            let (objects, active_objects) = (next()?, next()?);
            let mut name: Vec<&str> = numbers.collect();
            name.reverse();
            let slabs = row.number(slabdata.split_ascii_whitespace().nth(1), expected)?;
            caches.push(SlabCache {
                name: name.join(" "),
                active_objects,
                objects,
                object_size,
                objects_per_slab,
                pages_per_slab,
                slabs,
            });
        }
        if caches.is_empty() && !header {
            return Err(empty(path, "slabinfo - version: 2.1"));
        }
        Ok(SlabInfo { caches })
    }

    /// The cache with this name.
    pub fn get(&self, name: &str) -> Option<&SlabCache> {
        self.caches.iter().find(|cache| cache.name == name)
    }
}
