//! Any events survive being written and read; no bytes make the parser panic or lose count.

use memdesc::gfp::Flags;
use memdesc_trace::{
    Cache, CacheId, CacheTable, Event, EventKind, Parser, Recording, parse_bytes, write_recording,
};
use proptest::prelude::*;

const CACHES: [(&str, u32, u32); 4] = [
    ("filp", 184, 192),
    ("dentry", 192, 192),
    ("my cache", 7, 8),
    ("names_cache", 4096, 4096),
];

fn kind() -> impl Strategy<Value = EventKind> {
    let gfp = || any::<u32>().prop_map(Flags::from_bits);
    let pfn = || 1..u32::MAX;
    let cache = || (0..CACHES.len() as u32).prop_map(CacheId);
    let ptr = || prop_oneof![1 => Just(0), 9 => any::<u64>()];
    prop_oneof![
        (pfn(), 0..32u8, any::<u8>(), gfp()).prop_map(|(pfn, order, migratetype, gfp)| {
            EventKind::PageAlloc {
                pfn,
                order,
                migratetype,
                gfp,
            }
        }),
        (0..32u8, any::<u8>(), gfp()).prop_map(|(order, migratetype, gfp)| {
            EventKind::PageAllocFailed {
                order,
                migratetype,
                gfp,
            }
        }),
        (pfn(), 0..32u8).prop_map(|(pfn, order)| EventKind::PageFree { pfn, order }),
        pfn().prop_map(|pfn| EventKind::PageFreeBatched { pfn }),
        (ptr(), any::<u32>(), any::<u32>(), gfp()).prop_map(
            |(ptr, bytes_req, bytes_alloc, gfp)| {
                EventKind::Kmalloc {
                    ptr,
                    bytes_req,
                    bytes_alloc,
                    gfp,
                }
            }
        ),
        ptr().prop_map(|ptr| EventKind::Kfree { ptr }),
        (cache(), ptr(), gfp()).prop_map(|(cache, ptr, gfp)| EventKind::CacheAlloc {
            cache,
            ptr,
            gfp
        }),
        (cache(), ptr()).prop_map(|(cache, ptr)| EventKind::CacheFree { cache, ptr }),
        ptr().prop_map(|ptr| EventKind::CacheFree {
            cache: CacheId::UNKNOWN,
            ptr
        }),
    ]
}

fn events() -> impl Strategy<Value = Vec<Event>> {
    // As many whole nanoseconds as microseconds, which are written differently.
    let time = prop_oneof![any::<u64>(), (0..u64::MAX / 1000).prop_map(|us| us * 1000)];
    let event =
        (time, any::<u16>(), kind()).prop_map(|(time, cpu, kind)| Event::new(time, cpu, kind));
    prop::collection::vec(event, 0..40)
}

fn written(events: Vec<Event>) -> (Recording, Vec<u8>) {
    let mut caches = CacheTable::default();
    for (name, bytes_req, bytes_alloc) in CACHES {
        caches.add(Cache {
            name: name.into(),
            bytes_req,
            bytes_alloc,
        });
    }
    let recording = Recording {
        events,
        caches,
        ..Recording::default()
    };
    let mut text = Vec::new();
    write_recording(&mut text, &recording).unwrap();
    (recording, text)
}

/// The event with the cache's name for its number, which depends on the order of appearance.
fn named<'a>(event: &Event, caches: &'a CacheTable) -> (Event, Option<&'a str>) {
    let (kind, cache) = match event.kind() {
        EventKind::CacheAlloc { cache, ptr, gfp } => (
            EventKind::CacheAlloc {
                cache: CacheId(0),
                ptr,
                gfp,
            },
            Some(cache),
        ),
        EventKind::CacheFree { cache, ptr } => (
            EventKind::CacheFree {
                cache: CacheId(0),
                ptr,
            },
            Some(cache),
        ),
        kind => (kind, None),
    };
    let name = cache
        .and_then(|cache| caches.get(cache))
        .map(|cache| &*cache.name);
    (Event::new(event.time_ns, event.cpu, kind), name)
}

/// Every line is counted once.
fn balance(recording: &Recording) -> u64 {
    let s = &recording.skipped;
    s.broken_lines + s.other_events + s.comments + s.blank_lines + recording.events.len() as u64
}

proptest! {
    #[test]
    fn round_trip(events in events()) {
        let (recording, text) = written(events);
        let back = parse_bytes(&text);
        prop_assert_eq!(back.skipped.broken_lines, 0, "{:?}", back.skipped.samples);
        prop_assert_eq!(back.events.len(), recording.events.len());
        for (a, b) in recording.events.iter().zip(&back.events) {
            prop_assert_eq!(named(a, &recording.caches), named(b, &back.caches));
        }
        for (_, cache) in back.caches.iter().filter(|(_, cache)| cache.bytes_alloc != 0) {
            let known = CACHES.iter().any(|c| *c == (&*cache.name, cache.bytes_req, cache.bytes_alloc));
            prop_assert!(known, "{:?}", cache);
        }
        let mut again = Vec::new();
        write_recording(&mut again, &back).unwrap();
        if back.caches.iter().all(|(_, cache)| cache.bytes_alloc != 0) {
            prop_assert_eq!(again, text);
        }
    }

    #[test]
    fn pieces_make_no_difference(events in events(), size in 1..200usize) {
        let (_, text) = written(events);
        let mut parser = Parser::new();
        let mut found = Vec::new();
        for piece in text.chunks(size) {
            parser.feed(piece, &mut found);
        }
        parser.finish(&mut found);
        prop_assert_eq!(found, parse_bytes(&text).events);
    }

    #[test]
    fn any_bytes(bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
        let recording = parse_bytes(&bytes);
        prop_assert!(balance(&recording) <= recording.lines);
    }

    #[test]
    fn bytes_that_look_like_lines(bytes in "[\\[\\]0-9a-fkmr:=.|# \\n_GFPx(-]{0,300}") {
        let recording = parse_bytes(bytes.as_bytes());
        prop_assert!(balance(&recording) <= recording.lines);
    }

    #[test]
    fn mutated_lines(
        events in events(),
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0..4u8), 1..8),
    ) {
        let (_, mut text) = written(events);
        for (at, byte, how) in edits {
            if text.is_empty() {
                break;
            }
            let at = at.index(text.len());
            match how {
                0 => text[at] = byte,
                1 => drop(text.remove(at)),
                2 => text.insert(at, byte),
                _ => text.truncate(at),
            }
        }
        let recording = parse_bytes(&text);
        prop_assert!(balance(&recording) <= recording.lines);
        let mut out = Vec::new();
        write_recording(&mut out, &recording).unwrap();
    }
}
