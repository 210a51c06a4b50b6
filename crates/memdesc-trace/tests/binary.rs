//! Recordings in binary: what is written is read, and no bytes make the reader panic or believe them.

use memdesc::gfp::{Flags, GFP_KERNEL};
use memdesc_trace::binary::{self, Binary, BinaryError};
use memdesc_trace::{Cache, CacheId, CacheTable, Event, EventKind};
use proptest::prelude::*;

const HEADER: usize = 48;

fn caches() -> CacheTable {
    let mut table = CacheTable::default();
    for (name, bytes_req, bytes_alloc) in [("filp", 184, 192), ("käse", 7, 8), ("", 64, 64)] {
        table.add(Cache {
            name: name.into(),
            bytes_req,
            bytes_alloc,
        });
    }
    table
}

fn kind() -> impl Strategy<Value = EventKind> {
    let gfp = || any::<u32>().prop_map(Flags::from_bits);
    let pfn = || 0..1u32 << 30;
    let order = || 0..=memdesc::MAX_ORDER as u8;
    let cache = || prop_oneof![9 => (0..3u32).prop_map(CacheId), 1 => Just(CacheId::UNKNOWN)];
    prop_oneof![
        (pfn(), order(), any::<u8>(), gfp()).prop_map(|(pfn, order, migratetype, gfp)| {
            EventKind::PageAlloc {
                pfn,
                order,
                migratetype,
                gfp,
            }
        }),
        (order(), any::<u8>(), gfp()).prop_map(|(order, migratetype, gfp)| {
            EventKind::PageAllocFailed {
                order,
                migratetype,
                gfp,
            }
        }),
        (pfn(), order()).prop_map(|(pfn, order)| EventKind::PageFree { pfn, order }),
        pfn().prop_map(|pfn| EventKind::PageFreeBatched { pfn }),
        (any::<u64>(), any::<u32>(), any::<u32>(), gfp()).prop_map(
            |(ptr, bytes_req, bytes_alloc, gfp)| EventKind::Kmalloc {
                ptr,
                bytes_req,
                bytes_alloc,
                gfp,
            }
        ),
        any::<u64>().prop_map(|ptr| EventKind::Kfree { ptr }),
        (cache(), any::<u64>(), gfp()).prop_map(|(cache, ptr, gfp)| EventKind::CacheAlloc {
            cache,
            ptr,
            gfp
        }),
        (cache(), any::<u64>()).prop_map(|(cache, ptr)| EventKind::CacheFree { cache, ptr }),
    ]
}

fn events() -> impl Strategy<Value = Vec<Event>> {
    let event = (any::<u64>(), any::<u16>(), kind());
    let event = event.prop_map(|(time, cpu, kind)| Event::new(time, cpu, kind));
    prop::collection::vec(event, 0..60)
}

/// Makes the checksums right again, as somebody would who wants to be believed.
fn seal(bytes: &mut [u8]) {
    if bytes.len() >= HEADER {
        let body = crc32fast::hash(&bytes[HEADER..]);
        bytes[40..44].copy_from_slice(&body.to_le_bytes());
        let header = crc32fast::hash(&bytes[..44]);
        bytes[44..HEADER].copy_from_slice(&header.to_le_bytes());
    }
}

proptest! {
    #[test]
    fn what_is_written_is_read(events in events()) {
        let bytes = binary::write(&events, &caches()).unwrap();
        let read = binary::read(&bytes).unwrap();
        prop_assert_eq!(&read.events, &events);
        prop_assert_eq!(&read.caches, &caches());
        let below = events.iter().all(|e| match e.kind() {
            EventKind::PageAlloc { pfn, order, .. } => pfn + (1 << order) <= read.pages,
            _ => true,
        });
        prop_assert!(below);
    }

    #[test]
    fn no_flipped_bit_is_believed(events in events(), at in any::<prop::sample::Index>(), bit in 0..8) {
        let mut bytes = binary::write(&events, &caches()).unwrap();
        let at = at.index(bytes.len());
        bytes[at] ^= 1u8 << bit;
        prop_assert!(binary::read(&bytes).is_err(), "byte {}", at);
    }

    #[test]
    fn no_cut_is_believed(events in events(), at in any::<prop::sample::Index>()) {
        let bytes = binary::write(&events, &caches()).unwrap();
        prop_assert!(binary::read(&bytes[..at.index(bytes.len())]).is_err());
        let mut longer = bytes;
        longer.push(0);
        let is_longer = matches!(binary::read(&longer), Err(BinaryError::Longer { .. }));
        prop_assert!(is_longer);
    }

    /// Whatever is read is what would be written, so nothing in the file was passed over: checksums do not protect from who can count.
    #[test]
    fn what_is_read_can_be(
        events in events(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let mut bytes = binary::write(&events, &caches()).unwrap();
        for (at, value) in changes {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        seal(&mut bytes);
        if let Ok(Binary { events, caches, .. }) = binary::read(&bytes) {
            prop_assert_eq!(binary::write(&events, &caches).unwrap(), bytes);
        }
    }

    #[test]
    fn any_bytes(mut bytes in prop::collection::vec(any::<u8>(), 0..300), begins in any::<bool>()) {
        if begins {
            let start = binary::MAGIC.iter().chain(&[1, 0, 0, 0]);
            bytes.iter_mut().zip(start).for_each(|(to, from)| *to = *from);
            seal(&mut bytes);
        }
        if let Ok(Binary { events, caches, .. }) = binary::read(&bytes) {
            prop_assert_eq!(binary::write(&events, &caches).unwrap(), bytes);
        }
    }
}

/// A good one, with an allocation of pages as its last event.
fn sample() -> Vec<u8> {
    let kind = EventKind::PageAlloc {
        pfn: 64,
        order: 3,
        migratetype: 1,
        gfp: GFP_KERNEL,
    };
    let free = EventKind::Kfree { ptr: 4096 };
    let events = [Event::new(1, 0, free), Event::new(5, 1, kind)];
    binary::write(&events, &caches()).unwrap()
}

#[test]
fn errors_say_where() {
    let good = sample();
    let last = good.len() - 32;
    let with = |at: usize, value: u8| {
        let mut bytes = good.clone();
        bytes[at] = value;
        seal(&mut bytes);
        binary::read(&bytes).unwrap_err().to_string()
    };
    assert!(with(8, 2).contains("version 2"));
    assert!(with(0, b'X').contains("not a recording in binary"));
    assert!(with(32, 1).contains("byte 32 of the recording: a field that is not used"));
    assert_eq!(
        with(last + 16, 11),
        format!("byte {} of the recording: an order cannot be 11", last + 16)
    );
    assert_eq!(
        with(last + 30, 8),
        format!(
            "byte {} of the recording: what happened cannot be 8",
            last + 30
        )
    );
    assert_eq!(
        with(last + 8, 65),
        format!(
            "byte {} of the recording: the last page of an event cannot be 72",
            last + 8
        )
    );
    assert!(with(last + 31, 1).contains("a field that this event does not have"));
    assert!(with(24, 200).contains("byte 24 of the recording: one more than the highest page"));
    // The name of the second cache begins behind the first: 12 and 4 bytes, then 12.
    assert_eq!(
        with(HEADER + 28, 0xff),
        format!(
            "byte {} of the recording: a byte of a name cannot be 255",
            HEADER + 28
        )
    );
    assert!(with(HEADER + 8, 0xff).contains("the length of a cache's name"));
    let half = binary::read(&good[..good.len() / 2]);
    assert!(
        matches!(half, Err(BinaryError::Truncated { expected, .. }) if expected == good.len() as u64)
    );
    assert!(matches!(
        binary::read(b"MDREC"),
        Err(BinaryError::NotBinary { .. })
    ));
    assert!(matches!(
        binary::read(b""),
        Err(BinaryError::NotBinary { .. })
    ));
}

/// A header that promises more than there is makes nobody take memory for it.
#[test]
fn a_long_header() {
    let mut bytes = sample();
    bytes[16..24].copy_from_slice(&u64::MAX.to_le_bytes());
    seal(&mut bytes);
    assert!(matches!(
        binary::read(&bytes),
        Err(BinaryError::Impossible { offset: 16, .. })
    ));
    bytes[16..24].copy_from_slice(&(1u64 << 40).to_le_bytes());
    seal(&mut bytes);
    assert!(matches!(
        binary::read(&bytes),
        Err(BinaryError::Truncated { .. })
    ));
}

#[test]
fn what_could_not_be_read_is_not_written() {
    let free = EventKind::PageFree { pfn: 0, order: 11 };
    let alloc = EventKind::CacheFree {
        cache: CacheId(9),
        ptr: 64,
    };
    for kind in [free, alloc] {
        let written = binary::write(&[Event::new(0, 0, kind)], &caches());
        assert!(
            matches!(written, Err(BinaryError::Impossible { .. })),
            "{kind:?}"
        );
    }
}
