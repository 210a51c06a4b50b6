//! One JSON object.

use serde_json::{Map, Value, json};

use crate::replay::latency::{Group, Path, Summary};
use crate::replay::{Claims, Replay, Told};
use memdesc_replay::counts::Failures;

fn failures(failures: &Failures, unit: &str) -> Value {
    let row = |(&(why, of), &n): (&(&str, u64), &u64)| json!({ "why": why, unit: of, "count": n });
    failures.iter().map(row).collect()
}

fn summary(summary: Summary) -> Value {
    let Summary {
        count,
        mean,
        p50,
        p99,
        p999,
        max,
    } = summary;
    json!({ "p50": p50, "p99": p99, "p999": p999, "max": max, "mean": round(mean, 1), "count": count })
}

/// So many digits behind the point, so that nobody takes the rest for true.
pub(super) fn round(value: f64, digits: i32) -> f64 {
    let scale = 10f64.powi(digits);
    (value * scale).round() / scale
}

fn latencies(replay: &Replay) -> Value {
    let ns = replay.times.replay.ns_per_tick;
    let mut all = Map::new();
    for group in Group::ALL {
        all.insert(
            group.key().into(),
            summary(replay.latencies.group(group, ns)),
        );
    }
    let path = |&path: &Path| {
        (
            path.key().to_string(),
            summary(replay.latencies.path(path, ns)),
        )
    };
    all.insert(
        "paths".into(),
        Path::ALL.iter().map(path).collect::<Map<_, _>>().into(),
    );
    let floor = replay.latencies.floor as f64 * ns;
    all.insert("measuring_floor_subtracted".into(), json!(round(floor, 1)));
    all.into()
}

fn snapshot(claims: &Claims) -> Value {
    let of = |values: &[u64; 6]| -> Map<String, Value> {
        Claims::NAMES
            .iter()
            .zip(values)
            .map(|(name, n)| (name.to_string(), json!(n)))
            .collect()
    };
    json!({
        "blocks": of(&claims.blocks),
        "pages": of(&claims.pages),
        "elsewhere": claims.elsewhere,
        "refused": claims.refused,
        "early_boot_pages_left_free": claims.early_boot_pages,
        "unmovable_pageblocks": claims.unmovable_pageblocks,
    })
}

/// The report as an object.
pub(crate) fn object(replay: &Replay) -> Value {
    let Replay {
        source,
        times,
        traffic,
        pages,
        slab,
        ledger,
        teardown,
        mix,
        ..
    } = replay;
    let recording = &source.recording;
    let seconds = recording
        .time_span()
        .map_or(0.0, |t| (t.end - t.start) as f64 / 1e9);
    let total = recording.events.len() as u64;
    let rate = |d: std::time::Duration| (total as f64 / d.as_secs_f64().max(1e-9)).round();
    let linux = replay.linux();
    let frag = &replay.fragmentation;
    let down = &teardown.ledger;
    let order_counts: Vec<u64> = pages.by_order.to_vec();
    let purposes: Map<String, Value> = crate::handles::Purpose::ALL
        .iter()
        .map(|&p| (p.name().to_string(), json!(pages.by_purpose[p as usize])))
        .collect();
    json!({
        "recording": {
            "name": source.name, "kernel": source.kernel, "seconds": seconds, "cpus": replay.cpus,
            "memory_from": replay.memory_from, "limited": replay.limited,
            "lines": recording.lines, "text_bytes": recording.bytes,
            "broken_lines": recording.skipped.broken_lines,
            "impossible_events": replay.impossible,
            "other_events": recording.skipped.other_events,
            "lost_events": recording.skipped.lost_events,
            "unknown_gfp_names": recording.skipped.unknown_gfp_names,
            "out_of_order": recording.out_of_order,
            "truncated": recording.truncated.as_ref().map(ToString::to_string),
            "direct_map_base": match replay.slabs_told {
                Some(Told::ByAddress(base)) => json!(format!("{base:#x}")),
                _ => Value::Null,
            },
        },
        "events": {
            "total": total,
            "per_second": replay.events_per_second().round(),
            "parse_per_second": rate(times.parse),
            "replay_per_second": rate(times.replay.wall),
            "parse_seconds": times.parse.as_secs_f64(),
            "pairing_seconds": times.pair.as_secs_f64(),
            "replay_seconds": times.replay.wall.as_secs_f64(),
            "allocator_seconds": times.allocator.as_secs_f64(),
            "allocator_calls": replay.latencies.calls(),
            "setup_seconds": times.setup.as_secs_f64(),
            "teardown_seconds": times.teardown.as_secs_f64(),
            "by_kind": {
                "mm_page_alloc": traffic.page_alloc,
                "mm_page_alloc_failed": traffic.page_alloc_failed,
                "mm_page_free": traffic.page_free,
                "mm_page_free_batched": traffic.page_free_batched,
                "kmalloc": traffic.kmalloc,
                "kfree": traffic.kfree,
                "kmem_cache_alloc": traffic.cache_alloc,
                "kmem_cache_free": traffic.cache_free,
            },
        },
        "snapshot": replay.claims.as_ref().map(snapshot),
        "pages": {
            "from_snapshot": pages.from_snapshot,
            "allocated": pages.allocated, "freed": pages.freed, "failed": pages.failed, "live": pages.live,
            "allocated_pages": pages.allocated_pages, "freed_pages": pages.freed_pages,
            "failures": failures(&pages.failures, "order"),
            "linux_failed": traffic.page_alloc_failed,
            "by_purpose": purposes, "by_order": order_counts,
            "free_unseen": pages.free_unseen, "free_implied": pages.free_implied,
            "free_in_part": pages.free_in_part, "free_joined": pages.free_joined,
            "free_reserved": pages.free_reserved,
            "linux_slab_allocated": pages.slab_allocated, "linux_slab_freed": pages.slab_freed,
        },
        "slab": {
            "allocated": slab.allocated, "freed": slab.freed, "failed": slab.failed, "live": slab.live,
            "failures": failures(&slab.failures, "size"),
            "linux_failed": slab.linux_failed,
            "caches": slab.caches, "free_null": slab.free_null, "free_unseen": slab.free_unseen,
            "free_implied": slab.free_implied, "free_with_slab": slab.free_with_slab,
            "skipped": slab.skipped,
        },
        "ledger": {
            "ram_bytes": replay.ram_bytes,
            "memmap_bytes": ledger.memmap_bytes,
            "descriptor_bytes": ledger.descriptor_bytes,
            "other_metadata_bytes": ledger.other_metadata_bytes,
            "percent": round(ledger.percent(), 5),
            "struct_page_percent": 1.5625,
            "plain_seeds_bytes": mix.plain_seeds_bytes(),
            "plain_seeds_percent": round(mix.percent(mix.plain_seeds_bytes()), 5),
            "peak_descriptor_bytes": replay.peak.0,
            "peak_percent": round(replay.peak_percent(), 5),
            "balanced": ledger.balanced && down.balanced,
            "pages": { "given": ledger.given, "free": ledger.free, "untouched": ledger.untouched,
                "pcp": ledger.pcp, "metadata": ledger.metadata, "by_type": ledger.by_type.to_vec() },
            "caches": replay.descriptor_caches.iter().map(|c| json!({
                "name": c.name, "size": c.size, "live": c.live, "in_sheaves": c.in_sheaves,
                "room": c.room, "bytes": c.bytes,
            })).collect::<Value>(),
            "blocks": { "free": mix.free, "bare": mix.bare, "folios": mix.folios,
                "page_tables": mix.page_tables, "slabs": mix.slabs, "large_kmalloc": mix.large_kmalloc },
        },
        "census": super::census::object(replay),
        "purity": {
            "allocations_on_free": replay.alloc_on_free,
            "corruption_reports": replay.corruptions.0,
        },
        "fragmentation": {
            "free_by_order": frag.free_by_order.to_vec(),
            "linux_free_by_order": linux.map(|(l, _)| l.free_by_order.to_vec()),
            "pinned_pageblocks": frag.pinned_pageblocks,
            "linux_pinned_pageblocks": linux.map(|(l, _)| l.pinned_pageblocks),
            "free_pageblocks": frag.free_pageblocks,
            "linux_free_pageblocks": linux.map(|(l, _)| l.free_pageblocks),
            "pcp_pages": ledger.pcp,
            "linux_pcp_pages_before": replay.linux_pcp.0,
            "linux_pcp_pages": replay.linux_pcp.1,
            "linux_source": linux.map(|(_, source)| source),
            "linux_pinned_pageblocks_before": replay.linux_before.map(|l| l.pinned_pageblocks),
            "linux_pinned_pageblocks_by_events": replay.linux_derived.map(|l| l.pinned_pageblocks),
        },
        "rcu": replay.backlog.as_ref().map(|b| json!({
            "deferred": b.deferred, "grace_ms": b.grace_ms, "grace_periods": b.grace_periods,
            "peak": b.peak(), "mean": b.mean(), "by_heads": b.by_heads, "left": b.left,
            "backlog": b.columns(240),
        })),
        "latency_ns": latencies(replay),
        "teardown": {
            "blocks": teardown.blocks, "objects": teardown.objects,
            "missing_pages": teardown.missing, "all_pages_back": teardown.missing == 0 && down.balanced,
            "balanced": down.balanced, "metadata_pages": down.metadata,
            "descriptor_bytes": down.descriptor_bytes,
            "stuck_caches": teardown.stuck_caches,
        },
        "vmstat": replay.vmstat.iter().map(|&(n, v)| (n.to_string(), json!(v))).collect::<Map<_, _>>(),
    })
}
