//! Every form of a line, and every form of a broken one.

use super::*;
use memdesc::gfp::{__GFP_COMP, Flags, GFP_HIGHUSER_MOVABLE, GFP_KERNEL};

fn names() -> Names {
    Names {
        gfp: GfpNames::new(),
        caches: CacheNames::new(),
    }
}

fn event(line: &str) -> (u64, u16, EventKind) {
    match parse(line.as_bytes(), &mut names()) {
        Ok(Line::Event(e, false)) => (e.time_ns, e.cpu, e.kind()),
        other => panic!("{line}: {other:?}"),
    }
}

fn kind(fields: &str) -> EventKind {
    event(&format!("[000]   799.175799: {fields}")).2
}

fn line(line: &str) -> Parsed<Line> {
    parse(line.as_bytes(), &mut names())
}

const CACHE: CacheId = CacheId(0);

#[test]
fn the_recordings_lines() {
    let alloc = "[000]   799.178445:        kmem:mm_page_alloc: page=0x192cf0 pfn=0x192cf0 order=0 migratetype=1 gfp_flags=GFP_HIGHUSER_MOVABLE|__GFP_COMP";
    let gfp = GFP_HIGHUSER_MOVABLE | __GFP_COMP;
    let page = EventKind::PageAlloc {
        pfn: 0x192cf0,
        order: 0,
        migratetype: 1,
        gfp,
    };
    assert_eq!(event(alloc), (799_178_445_000, 0, page));
    assert_eq!(
        kind("kmem:mm_page_free: page=0x19cd7b pfn=0x19cd7b order=3"),
        EventKind::PageFree {
            pfn: 0x19cd7b,
            order: 3
        }
    );
    assert_eq!(
        kind("kmem:mm_page_free_batched: page=0x19cd7b pfn=0x19cd7b order=0"),
        EventKind::PageFreeBatched { pfn: 0x19cd7b }
    );
    assert_eq!(
        kind(
            "kmem:kmalloc: call_site=sched_setaffinity+0x10c ptr=0xffff8881047086e0 bytes_req=30 bytes_alloc=32 gfp_flags=GFP_KERNEL node=-1 accounted=false"
        ),
        EventKind::Kmalloc {
            ptr: 0xffff_8881_0470_86e0,
            bytes_req: 30,
            bytes_alloc: 32,
            gfp: GFP_KERNEL
        }
    );
    assert_eq!(
        kind("kmem:kfree: call_site=sched_setaffinity+0x160 ptr=0xffff8881047086e0"),
        EventKind::Kfree {
            ptr: 0xffff_8881_0470_86e0
        }
    );
    assert_eq!(
        kind(
            "kmem:kmem_cache_alloc: call_site=alloc_empty_file+0x3c ptr=0xffff88815bef1e40 name=filp bytes_req=184 bytes_alloc=192 gfp_flags=GFP_KERNEL node=-1 accounted=true"
        ),
        EventKind::CacheAlloc {
            cache: CACHE,
            ptr: 0xffff_8881_5bef_1e40,
            gfp: GFP_KERNEL
        }
    );
    assert_eq!(
        kind(
            "kmem:kmem_cache_free: call_site=dequeue_signal+0x12c ptr=0xffff88810516f320 name=sigqueue"
        ),
        EventKind::CacheFree {
            cache: CACHE,
            ptr: 0xffff_8881_0516_f320
        }
    );
}

#[test]
fn perf_scripts_default_fields() {
    let tail = "kmem:kfree: call_site=foo+0x160 ptr=0xffff8881047086e0";
    let free = EventKind::Kfree {
        ptr: 0xffff_8881_0470_86e0,
    };
    for task in [
        "cargo  1234",
        "           cargo  1234/1235",
        "tokio-runtime w 77",
        "kworker/u8:1-ev    11",
        ":-1    -1",
        "[weird [007] 1.5: x  12",
        "swapper     0",
    ] {
        assert_eq!(
            event(&format!("{task} [001]   799.175799: {tail}")),
            (799_175_799_000, 1, free)
        );
    }
    // --ns
    assert_eq!(
        event(&format!("cargo 1 [001] 799.175799123: {tail}")).0,
        799_175_799_123
    );
}

#[test]
fn ftrace_lines() {
    let fields = "kmalloc: call_site=__alloc+0x1/0x2 [btrfs] ptr=00000000abcd bytes_req=8 bytes_alloc=8 gfp_flags=GFP_KERNEL";
    let kmalloc = EventKind::Kmalloc {
        ptr: 0xabcd,
        bytes_req: 8,
        bytes_alloc: 8,
        gfp: GFP_KERNEL,
    };
    for prefix in [
        "          <idle>-0       [001] d.h1.   100.123456: ",
        "          <idle>-0       [001] d.h1   100.123456: ",
        "          <idle>-0       [001]   100.123456: ",
        "            bash-1977    (   1977) [001] .....   100.123456: ",
        "   a b [x] c-1977    [001] .....   100.123456:    ",
    ] {
        assert_eq!(
            event(&format!("{prefix}{fields}")),
            (100_123_456_000, 1, kmalloc),
            "{prefix}"
        );
    }
}

#[test]
fn older_and_newer_kernels() {
    assert_eq!(
        kind("mm_page_alloc: page=ffffea0000 pfn=123 order=0 migratetype=0 gfp_flags=GFP_KERNEL"),
        EventKind::PageAlloc {
            pfn: 123,
            order: 0,
            migratetype: 0,
            gfp: GFP_KERNEL
        }
    );
    assert_eq!(
        kind(
            "kmem:kmem_cache_alloc: call_site=ffffffff81 ptr=ffff8881 bytes_req=184 bytes_alloc=192 gfp_flags=none"
        ),
        EventKind::CacheAlloc {
            cache: CACHE,
            ptr: 0xffff_8881,
            gfp: Flags::EMPTY
        }
    );
    assert_eq!(
        kind("kmem:kmem_cache_free: call_site=ffffffff81 ptr=0x5"),
        EventKind::CacheFree {
            cache: CacheId::UNKNOWN,
            ptr: 5
        }
    );
    for name in ["kmalloc_node", "kmalloc"] {
        assert_eq!(
            kind(&format!(
                "kmem:{name}: call_site=a ptr=(nil) bytes_req=1 bytes_alloc=8 gfp_flags=GFP_KERNEL|0x400000 node=0"
            )),
            EventKind::Kmalloc {
                ptr: 0,
                bytes_req: 1,
                bytes_alloc: 8,
                gfp: GFP_KERNEL | Flags::from_bits(0x40_0000)
            }
        );
    }
    assert_eq!(
        kind("kmem:kfree: call_site=a ptr=(nil)"),
        EventKind::Kfree { ptr: 0 }
    );
    assert_eq!(
        kind("kmem:kfree: call_site=a ptr=0x0 "),
        EventKind::Kfree { ptr: 0 }
    );
    let cold = "[000] 1.0: mm_page_free_batched: page=0 pfn=1 order=0 cold=1";
    assert_eq!(event(cold).2, EventKind::PageFreeBatched { pfn: 1 });
    let other_kernel = line(
        "[000] 1.0: kmalloc: call_site=a ptr=1 bytes_req=1 bytes_alloc=8 gfp_flags=GFP_TEMPORARY|__GFP_COLD",
    );
    assert!(
        matches!(other_kernel, Ok(Line::Event(_, true))),
        "{other_kernel:?}"
    );
}

#[test]
fn failed_allocations() {
    for pages in [
        "page=(nil) pfn=0x0",
        "page=(nil) pfn=0",
        "page=(nil) pfn=0xffffffffffffffff",
    ] {
        assert_eq!(
            kind(&format!(
                "mm_page_alloc: {pages} order=9 migratetype=1 gfp_flags=GFP_KERNEL"
            )),
            EventKind::PageAllocFailed {
                order: 9,
                migratetype: 1,
                gfp: GFP_KERNEL
            }
        );
    }
}

#[test]
fn cache_names_with_spaces() {
    let mut names = names();
    let alloc = b"[000] 1.0: kmem_cache_alloc: call_site=a ptr=1 name=my cache bytes_req=7 bytes_alloc=8 gfp_flags=none";
    let free = b"[000] 1.0: kmem_cache_free: call_site=a ptr=1 name=my cache";
    assert!(matches!(parse(alloc, &mut names), Ok(Line::Event(..))));
    assert!(matches!(parse(free, &mut names), Ok(Line::Event(..))));
    assert_eq!(names.caches.table.len(), 1);
    assert_eq!(names.caches.table.get(CACHE).unwrap().name, "my cache");
}

#[test]
fn other_events_are_not_broken() {
    for other in [
        "[000] 1.0: kmem:mm_page_alloc_zone_locked: page=0x1 pfn=0x1 order=0 migratetype=1 percpu_refill=0",
        "[000] 1.0: kmem:mm_page_pcpu_drain: page=0x1 pfn=0x1 order=0 migratetype=1",
        "[000] 1.0: kmem:mm_page_alloc_extfrag: page=0x1 pfn=0x1 alloc_order=0",
        "[000] 1.0: kmem:rss_stat: mm_id=1 curr=1 type=MM_ANONPAGES size=4096B",
        "cargo 12 [000] 1.0: sched:sched_switch: prev_comm=kfree: ptr=1",
        "cargo 12 [000] 1.0: page-faults: 0x1",
        "cargo 12 [000] 1.0: foo:kmalloc: ptr=zzz",
        "   bash-1 [000] .... 1.0: some_function <-its_caller",
    ] {
        assert_eq!(line(other), Ok(Line::Other), "{other}");
    }
}

#[test]
fn comments_and_losses() {
    for comment in [
        "# tracer: nop",
        "#",
        "  # ========",
        "#           TASK-PID     CPU#  |||||  TIMESTAMP  FUNCTION",
    ] {
        assert_eq!(line(comment), Ok(Line::Comment), "{comment}");
    }
    for blank in [
        "",
        "   ",
        "\t        ffffffff813c1d2e kmem_cache_alloc+0x1ae ([kernel.kallsyms])",
        " => kfree",
    ] {
        assert_eq!(line(blank), Ok(Line::Blank), "{blank}");
    }
    for (text, lost) in [
        ("CPU:1 [LOST 12 EVENTS]", 12),
        ("CPU:0 [EVENTS DROPPED]", 1),
        ("CPU:0 [7 EVENTS DROPPED]", 7),
        ("LOST 5 events!", 5),
        ("perf  1234 [000] 799.175799: PERF_RECORD_LOST lost 25", 25),
        ("[000] 799.175799: PERF_RECORD_LOST_SAMPLES lost 3", 3),
        ("# entries-in-buffer/entries-written: 205/4000   #P:2", 3795),
    ] {
        assert_eq!(line(text), Ok(Line::Lost(lost)), "{text}");
    }
    assert_eq!(
        line("# entries-in-buffer/entries-written: 4000/4000   #P:2"),
        Ok(Line::Comment)
    );
}

#[test]
fn broken_lines_say_what_was_expected() {
    let page = "kmem:mm_page_alloc: page=0x1";
    for (text, expected) in [
        ("hello", "a CPU in brackets"),
        ("[abc] 1.0: kfree: ptr=1", "a CPU in brackets"),
        ("[99999] 1.0: kfree: ptr=1", "a CPU below 65536"),
        ("[000] x: kfree: ptr=1", "a time in seconds"),
        ("bash 1 [000] x: kfree: ptr=1", "a time in seconds"),
        ("[000] 1.0 kfree: ptr=1", "a colon after the time"),
        ("[000] 1.0: ", "the name of an event"),
        ("[000] 1.0: kmem:kfree: call_site=a", "a field ptr="),
        (
            "[000] 1.0: kmem:kfree: call_site=a ptr=(____ptrval____)",
            "an address in ptr=",
        ),
        (
            "[000] 1.0: kmem:kfree: call_site=a ptr=0x12345678123456789",
            "an address in ptr=",
        ),
        (
            "[000] 1.0: kmem:kmalloc: ptr=1 bytes_alloc=1",
            "fields bytes_req=",
        ),
        (
            "[000] 1.0: kmem:kmalloc: ptr=1 bytes_req=4294967296 bytes_alloc=1",
            "a size below 4 GiB",
        ),
        (
            "[000] 1.0: kmem:kmalloc: ptr=1 bytes_req=1 bytes_alloc=1",
            "a field gfp_flags=",
        ),
        (
            "[000] 1.0: kmem:kmalloc: ptr=1 bytes_req=1 bytes_alloc=1 gfp_flags=GFP_KER?",
            "gfp flags by name",
        ),
        (
            "[000] 1.0: kmem:kmem_cache_alloc: ptr=1 name=x gfp_flags=none",
            "a field bytes_req= after",
        ),
        ("[000] 1.0: kmem:mm_page_free: order=0", "a field pfn="),
        ("[000] 1.0: kmem:mm_page_free: pfn=0x1", "a field order="),
        (
            "[000] 1.0: kmem:mm_page_free: pfn=0xffffffffffffffff order=0",
            "the pfn of a page",
        ),
        (
            "[000] 1.0: kmem:mm_page_free: pfn=abc order=0",
            "a number in pfn=",
        ),
        (
            "[000] 1.0: kmem:mm_page_free: pfn=4294967295 order=0",
            "a pfn below",
        ),
        ("[000] 1.0: kmem:mm_page_free: pfn=1 order=99", "an order"),
        (
            &format!("[000] 1.0: {page} pfn=0x1 order=0 migratetype=-1"),
            "a number in migratetype=",
        ),
        (
            &format!("[000] 1.0: {page} pfn=0x1 order=0"),
            "a field migratetype=",
        ),
    ] {
        match line(text) {
            Err(found) => assert!(found.starts_with(expected), "{text}: {found}"),
            other => panic!("{text}: {other:?}"),
        }
    }
}
