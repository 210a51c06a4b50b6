//! A recording in binary: for who has no files, no decompressor and little time, such as the image on bare metal.
//!
//! All numbers are little-endian. Version 1:
//!
//! | offset | bytes | what |
//! |---|---|---|
//! | 0 | 8 | `MDRECORD` |
//! | 8 | 4 | the version: 1 |
//! | 12 | 4 | how many caches |
//! | 16 | 8 | how many events |
//! | 24 | 4 | one more than the highest page in the events |
//! | 28 | 4 | bytes of the table of caches, a multiple of 8 |
//! | 32 | 8 | zero |
//! | 40 | 4 | CRC-32 (IEEE) of all that follows the header |
//! | 44 | 4 | CRC-32 of the 44 bytes before |
//! | 48 | | the caches: each the bytes asked for (4), the bytes taken (4), the length of the name (4), the name in UTF-8; then zeros |
//! | | 32 each | the events |
//!
//! An event:
//!
//! | offset | bytes | what |
//! |---|---|---|
//! | 0 | 8 | nanoseconds on the recording's clock |
//! | 8 | 8 | the page frame, or the object's address; 0 if there is none |
//! | 16 | 4 | the order, the bytes asked for, or the number of the cache (all ones: not known); 0 if there is none |
//! | 20 | 4 | the mobility, or the bytes taken; 0 if there is none |
//! | 24 | 4 | the gfp flags, in the bits that [`Flags`] has; 0 if there are none |
//! | 28 | 2 | the CPU |
//! | 30 | 1 | what happened: 0 to 7 in the order of [`EventKind`] |
//! | 31 | 1 | zero |
//!
//! A reader takes nothing on trust: what is cut off, damaged or cannot be is an error that says at which byte.

use alloc::string::String;
use alloc::vec::Vec;

use memdesc::MAX_ORDER;
use memdesc::gfp::Flags;

use crate::event::{Cache, CacheId, CacheTable, Event, EventKind};

/// What it begins with.
pub const MAGIC: [u8; 8] = *b"MDRECORD";
/// The version that is written, and the only one that is read.
pub const VERSION: u32 = 1;

const HEADER: usize = 48;
const EVENT: usize = 32;
/// The fixed part of a cache.
const CACHE: usize = 12;

/// Why a recording in binary could not be read or written.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BinaryError {
    /// It does not begin as one.
    #[error(
        "not a recording in binary: it begins with {found:02x?}, not with \"MDRECORD\"; make one with `memdesc cut RECORDING --binary FILE`"
    )]
    NotBinary {
        /// The first bytes, eight at most.
        found: Vec<u8>,
    },
    /// A version that is not known here.
    #[error("a recording in binary of version {found}; this reads version {VERSION}")]
    Version {
        /// The version that it says.
        found: u32,
    },
    /// It is shorter than its header says, or longer.
    #[error("the recording breaks off at byte {found}: its header says {expected} bytes")]
    Truncated {
        /// Bytes that there are.
        found: u64,
        /// Bytes that there should be.
        expected: u64,
    },
    /// There is something behind its end.
    #[error("something follows the recording, which ends at byte {end}")]
    Longer {
        /// Where it ends.
        end: u64,
    },
    /// A checksum does not match.
    #[error(
        "the recording is damaged: the {part} (from byte {offset}) has checksum {found:#010x}, not {expected:#010x}"
    )]
    Damaged {
        /// Which part.
        part: &'static str,
        /// Where it begins.
        offset: u64,
        /// The checksum that it has.
        found: u32,
        /// The one that it should have.
        expected: u32,
    },
    /// The checksums match, and yet it cannot be.
    #[error("byte {offset} of the recording: {what} cannot be {found}")]
    Impossible {
        /// Where it stands.
        offset: u64,
        /// What stands there.
        what: &'static str,
        /// Its value.
        found: u64,
    },
    /// There is no memory to read it into.
    #[error("no memory for {events} events")]
    NoMemory {
        /// How many it has.
        events: u64,
    },
}

/// Does this begin as a recording in binary?
pub fn is_binary(bytes: &[u8]) -> bool {
    bytes.starts_with(&MAGIC)
}

/// What a recording in binary holds.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Binary {
    /// The events, in the order of the recording.
    pub events: Vec<Event>,
    /// The caches that they refer to.
    pub caches: CacheTable,
    /// One more than the highest page in the events.
    pub pages: u32,
}

/// The fields of an event: address, first, second, gfp and what happened.
fn parts(kind: EventKind) -> (u64, u32, u32, Flags, u8) {
    let none = Flags::EMPTY;
    match kind {
        EventKind::PageAlloc {
            pfn,
            order,
            migratetype,
            gfp,
        } => (pfn.into(), order.into(), migratetype.into(), gfp, 0),
        EventKind::PageAllocFailed {
            order,
            migratetype,
            gfp,
        } => (0, order.into(), migratetype.into(), gfp, 1),
        EventKind::PageFree { pfn, order } => (pfn.into(), order.into(), 0, none, 2),
        EventKind::PageFreeBatched { pfn } => (pfn.into(), 0, 0, none, 3),
        EventKind::Kmalloc {
            ptr,
            bytes_req,
            bytes_alloc,
            gfp,
        } => (ptr, bytes_req, bytes_alloc, gfp, 4),
        EventKind::Kfree { ptr } => (ptr, 0, 0, none, 5),
        EventKind::CacheAlloc { cache, ptr, gfp } => (ptr, cache.0, 0, gfp, 6),
        EventKind::CacheFree { cache, ptr } => (ptr, cache.0, 0, none, 7),
    }
}

/// One more than the last page of an event, if it has pages.
fn end_of(kind: EventKind) -> Option<u64> {
    match kind {
        EventKind::PageAlloc { pfn, order, .. } | EventKind::PageFree { pfn, order } => {
            Some(u64::from(pfn) + (1 << order.min(32)))
        }
        EventKind::PageFreeBatched { pfn } => Some(u64::from(pfn) + 1),
        _ => None,
    }
}

/// Writes events as a recording in binary.
///
/// # Errors
///
/// [`BinaryError::Impossible`] for an event that could not be read again: of an order above the largest, of pages that no machine has, or of a cache
/// that is not in the table. The offset is where it would have stood.
pub fn write(events: &[Event], caches: &CacheTable) -> Result<Vec<u8>, BinaryError> {
    let mut table = Vec::new();
    for (_, cache) in caches.iter() {
        table.extend_from_slice(&cache.bytes_req.to_le_bytes());
        table.extend_from_slice(&cache.bytes_alloc.to_le_bytes());
        table.extend_from_slice(&(cache.name.len() as u32).to_le_bytes());
        table.extend_from_slice(cache.name.as_bytes());
    }
    table.resize(table.len().next_multiple_of(8), 0);
    let ends = events.iter().filter_map(|e| end_of(e.kind()));
    let pages = ends.max().unwrap_or(0).min(u64::from(u32::MAX)) as u32;

    let mut out = Vec::with_capacity(HEADER + table.len() + events.len() * EVENT);
    out.extend_from_slice(&MAGIC);
    out.extend_from_slice(&VERSION.to_le_bytes());
    out.extend_from_slice(&(caches.len() as u32).to_le_bytes());
    out.extend_from_slice(&(events.len() as u64).to_le_bytes());
    out.extend_from_slice(&pages.to_le_bytes());
    out.extend_from_slice(&(table.len() as u32).to_le_bytes());
    out.resize(HEADER, 0);
    out.extend_from_slice(&table);
    for event in events {
        let offset = out.len() as u64;
        let (address, first, second, gfp, tag) = parts(event.kind());
        out.extend_from_slice(&event.time_ns.to_le_bytes());
        out.extend_from_slice(&address.to_le_bytes());
        out.extend_from_slice(&first.to_le_bytes());
        out.extend_from_slice(&second.to_le_bytes());
        out.extend_from_slice(&gfp.bits().to_le_bytes());
        out.extend_from_slice(&event.cpu.to_le_bytes());
        out.extend_from_slice(&[tag, 0]);
        check(event.kind(), offset, pages, caches.len())?;
    }
    let body = crc32fast::hash(&out[HEADER..]);
    out[40..44].copy_from_slice(&body.to_le_bytes());
    let header = crc32fast::hash(&out[..44]);
    out[44..HEADER].copy_from_slice(&header.to_le_bytes());
    Ok(out)
}

/// A number of so many bytes. The caller has seen that they are there.
fn number<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut number = [0; N];
    number.copy_from_slice(&bytes[at..at + N]);
    number
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(number(bytes, at))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(number(bytes, at))
}

fn impossible<T>(offset: u64, what: &'static str, found: u64) -> Result<T, BinaryError> {
    Err(BinaryError::Impossible {
        offset,
        what,
        found,
    })
}

/// Can this event be?
fn check(kind: EventKind, offset: u64, pages: u32, caches: usize) -> Result<(), BinaryError> {
    use EventKind::{CacheAlloc, CacheFree, PageAlloc, PageAllocFailed, PageFree};
    if let PageAlloc { order, .. } | PageAllocFailed { order, .. } | PageFree { order, .. } = kind
        && usize::from(order) > MAX_ORDER
    {
        return impossible(offset + 16, "an order", order.into());
    }
    if let Some(end) = end_of(kind)
        && end > u64::from(pages).min(u64::from(memdesc::address::MAX_PFN))
    {
        return impossible(offset + 8, "the last page of an event", end - 1);
    }
    if let CacheAlloc { cache, .. } | CacheFree { cache, .. } = kind
        && cache.index().is_some_and(|n| n >= caches)
    {
        return impossible(offset + 16, "the number of a cache", cache.0.into());
    }
    Ok(())
}

/// An event of 32 bytes.
fn event(bytes: &[u8], offset: u64, pages: u32, caches: usize) -> Result<Event, BinaryError> {
    let (address, first, second) = (u64_at(bytes, 8), u32_at(bytes, 16), u32_at(bytes, 20));
    let gfp = Flags::from_bits(u32_at(bytes, 24));
    let cpu = u16::from_le_bytes(number(bytes, 28));
    let narrow = |at: u64, what, value: u64, most: u64| {
        if value > most {
            impossible(offset + at, what, value)
        } else {
            Ok(value)
        }
    };
    let pfn = || narrow(8, "a page frame", address, u32::MAX.into()).map(|n| n as u32);
    let order = || narrow(16, "an order", first.into(), MAX_ORDER as u64).map(|n| n as u8);
    let migratetype = || narrow(20, "a mobility", second.into(), u8::MAX.into()).map(|n| n as u8);
    let kind = match bytes[30] {
        0 => EventKind::PageAlloc {
            pfn: pfn()?,
            order: order()?,
            migratetype: migratetype()?,
            gfp,
        },
        1 => EventKind::PageAllocFailed {
            order: order()?,
            migratetype: migratetype()?,
            gfp,
        },
        2 => EventKind::PageFree {
            pfn: pfn()?,
            order: order()?,
        },
        3 => EventKind::PageFreeBatched { pfn: pfn()? },
        4 => EventKind::Kmalloc {
            ptr: address,
            bytes_req: first,
            bytes_alloc: second,
            gfp,
        },
        5 => EventKind::Kfree { ptr: address },
        6 => EventKind::CacheAlloc {
            cache: CacheId(first),
            ptr: address,
            gfp,
        },
        7 => EventKind::CacheFree {
            cache: CacheId(first),
            ptr: address,
        },
        other => return impossible(offset + 30, "what happened", other.into()),
    };
    check(kind, offset, pages, caches)?;
    // One way to write each event: what is not used is zero.
    let (address_used, first_used, second_used, gfp_used, _) = parts(kind);
    for (at, used, found) in [
        (8, address_used, address),
        (16, first_used.into(), first.into()),
        (20, second_used.into(), second.into()),
        (24, gfp_used.bits().into(), u32_at(bytes, 24).into()),
        (31, 0, bytes[31].into()),
    ] {
        if used != found {
            return impossible(offset + at, "a field that this event does not have", found);
        }
    }
    Ok(Event::new(u64_at(bytes, 0), cpu, kind))
}

/// The table of caches.
fn read_caches(table: &[u8], count: u32) -> Result<CacheTable, BinaryError> {
    let mut caches = CacheTable::default();
    let mut at = 0;
    for n in 0..count {
        let offset = (HEADER + at) as u64;
        let left = table.len() - at;
        if left < CACHE {
            return impossible(
                offset,
                "the number of caches that are in the table",
                n.into(),
            );
        }
        let length = u32_at(table, at + 8) as usize;
        if length > left - CACHE {
            return impossible(offset + 8, "the length of a cache's name", length as u64);
        }
        let name = &table[at + CACHE..at + CACHE + length];
        let name = match core::str::from_utf8(name) {
            Ok(name) => String::from(name),
            Err(why) => {
                let bad = why.valid_up_to();
                let byte = name[bad].into();
                return impossible(offset + (CACHE + bad) as u64, "a byte of a name", byte);
            }
        };
        caches.add(Cache {
            name,
            bytes_req: u32_at(table, at),
            bytes_alloc: u32_at(table, at + 4),
        });
        at += CACHE + length;
    }
    let padding = &table[at..];
    match padding.iter().position(|&b| b != 0) {
        _ if padding.len() >= 8 => {
            let found = padding.len() as u64;
            impossible((HEADER + at) as u64, "the padding of the table", found)
        }
        Some(i) => impossible((HEADER + at + i) as u64, "padding", padding[i].into()),
        None => Ok(caches),
    }
}

/// Reads a recording in binary.
///
/// # Errors
///
/// What is wrong with it, and at which byte.
pub fn read(bytes: &[u8]) -> Result<Binary, BinaryError> {
    if !is_binary(bytes) {
        let found = bytes[..bytes.len().min(MAGIC.len())].into();
        return Err(BinaryError::NotBinary { found });
    }
    let found = bytes.len() as u64;
    if bytes.len() < HEADER {
        let expected = HEADER as u64;
        return Err(BinaryError::Truncated { found, expected });
    }
    let damaged = |part, from: usize, to: usize, expected| {
        let found = crc32fast::hash(&bytes[from..to]);
        let offset = from as u64;
        let error = BinaryError::Damaged {
            part,
            offset,
            found,
            expected,
        };
        if found == expected {
            Ok(())
        } else {
            Err(error)
        }
    };
    let version = u32_at(bytes, 8);
    if version != VERSION {
        return Err(BinaryError::Version { found: version });
    }
    damaged("header", 0, 44, u32_at(bytes, 44))?;
    let (count, events, pages) = (u32_at(bytes, 12), u64_at(bytes, 16), u32_at(bytes, 24));
    let table = u32_at(bytes, 28);
    if !table.is_multiple_of(8) {
        return impossible(28, "the length of the table of caches", table.into());
    }
    if u64_at(bytes, 32) != 0 {
        return impossible(32, "a field that is not used", u64_at(bytes, 32));
    }
    let length = events.checked_mul(EVENT as u64);
    let expected = length.and_then(|n| n.checked_add(HEADER as u64 + u64::from(table)));
    let Some(expected) = expected else {
        return impossible(16, "the number of events", events);
    };
    if found < expected {
        return Err(BinaryError::Truncated { found, expected });
    }
    if found > expected {
        return Err(BinaryError::Longer { end: expected });
    }
    damaged("body", HEADER, bytes.len(), u32_at(bytes, 40))?;

    let start = HEADER + table as usize;
    let caches = read_caches(&bytes[HEADER..start], count)?;
    let mut list = Vec::new();
    // It is here, so its length fits; whether there is as much memory again is another thing.
    if list.try_reserve_exact(events as usize).is_err() {
        return Err(BinaryError::NoMemory { events });
    }
    for (n, record) in bytes[start..].chunks_exact(EVENT).enumerate() {
        let offset = (start + n * EVENT) as u64;
        list.push(event(record, offset, pages, caches.len())?);
    }
    let highest = list.iter().filter_map(|e| end_of(e.kind())).max();
    if highest.unwrap_or(0) != u64::from(pages) {
        return impossible(24, "one more than the highest page", pages.into());
    }
    Ok(Binary {
        events: list,
        caches,
        pages,
    })
}
