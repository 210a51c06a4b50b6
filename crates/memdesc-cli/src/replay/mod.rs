//! Replays a recording on our allocator.

mod ahead;
pub(crate) mod census;
pub(crate) mod deferred;
mod hosted;
pub(crate) mod latency;
mod layout;
pub(crate) mod linux;
pub(crate) mod machine;
pub(crate) mod mix;
pub(crate) mod source;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use memdesc::{Event as Counter, Fragmentation, Ledger, PageType};
use memdesc_replay::counts::{PageCounts, SlabCounts, Traffic};
use memdesc_replay::objects::Objects;
use memdesc_replay::pages::Pages;
pub(crate) use memdesc_replay::slabs::Told;
use memdesc_replay::{Corrections, Engine, classify, has_objects, slabs};
use memdesc_trace::snapshot::evidence::Evidence;
use memdesc_trace::{Event, EventKind, Recording, Snapshot};

use crate::error::Error;
use crate::handles::{Machine, Purpose};
use crate::progress;

use ahead::LastEvents;
use census::{Beside, Census, Side};
use deferred::{Backlog, Deferred};
use hosted::{Hosted, LoopTime};
use latency::Latencies;
pub(crate) use layout::Claims;
use linux::LinuxFragmentation;
use mix::{Mix, Picture};
use source::Source;

/// How to replay.
#[derive(Clone, Debug, Default)]
pub(crate) struct Options {
    pub(crate) path: Option<PathBuf>,
    pub(crate) no_snapshot: bool,
    pub(crate) pages_only: bool,
    pub(crate) cpus: Option<usize>,
    pub(crate) memory: Option<u64>,
    pub(crate) limit: Option<usize>,
    pub(crate) direct_map_base: Option<u64>,
    /// The share of the objects' frees that is deferred, in percent, and how long a grace period is, in milliseconds.
    pub(crate) rcu: Option<(f64, f64)>,
    pub(crate) quiet: bool,
}

/// How long each phase took.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Times {
    pub(crate) parse: Duration,
    /// Reading snapshots and taking Linux's layout.
    pub(crate) setup: Duration,
    /// Telling slab pages.
    pub(crate) pair: Duration,
    pub(crate) replay: LoopTime,
    /// Inside our allocator.
    pub(crate) allocator: Duration,
    pub(crate) teardown: Duration,
}

impl Times {
    /// Text to results: what events a second are counted by.
    pub(crate) fn overall(&self) -> Duration {
        self.parse + self.pair + self.replay.wall
    }
}

/// What is left when everything was given back.
#[derive(Clone, Debug)]
pub(crate) struct Teardown {
    pub(crate) ledger: Ledger,
    pub(crate) blocks: u64,
    pub(crate) objects: u64,
    pub(crate) stuck_caches: Vec<String>,
    /// Pages that were given and are neither free, nor metadata, nor reserved by the layout.
    pub(crate) missing: u64,
    pub(crate) free_blocks: u64,
}

/// A cache of descriptors at the end of the recording.
#[derive(Clone, Debug)]
pub(crate) struct DescriptorCache {
    pub(crate) name: String,
    pub(crate) size: usize,
    pub(crate) live: u64,
    pub(crate) in_sheaves: u64,
    pub(crate) room: u64,
    pub(crate) bytes: u64,
}

impl DescriptorCache {
    fn all(machine: &Machine) -> Vec<DescriptorCache> {
        let mut all = Vec::new();
        machine.mm.slabinfo(|cache| {
            if cache.metadata {
                all.push(DescriptorCache {
                    name: cache.name.to_string(),
                    size: cache.size,
                    live: cache.active_objs,
                    in_sheaves: cache.in_sheaves,
                    room: cache.num_objs,
                    bytes: cache.num_slabs * (cache.pages_per_slab * memdesc::PAGE_SIZE) as u64,
                });
            }
        });
        all
    }
}

/// Pages in per-CPU lists, by zoneinfo.
fn pcp_of(snapshot: Option<&Snapshot>) -> Option<u64> {
    let zones = &snapshot?.zoneinfo.as_ref()?.zones;
    Some(zones.iter().map(|zone| zone.pcp_pages()).sum())
}

/// Everything that a report can say.
pub(crate) struct Replay {
    pub(crate) source: Source,
    pub(crate) cpus: usize,
    pub(crate) ram_bytes: u64,
    pub(crate) memory_from: &'static str,
    pub(crate) limited: bool,
    /// Events of pages that cannot be, left out.
    pub(crate) impossible: u64,
    pub(crate) slabs_told: Option<Told>,
    pub(crate) claims: Option<Claims>,
    pub(crate) times: Times,
    pub(crate) traffic: Traffic,
    pub(crate) pages: PageCounts,
    pub(crate) slab: SlabCounts,
    pub(crate) ledger: Ledger,
    pub(crate) mix: Mix,
    /// What all pages are, beside what they are in Linux's snapshots.
    pub(crate) census: Census,
    /// Bytes of descriptors at their peak, and after how many events.
    pub(crate) peak: (u64, usize),
    pub(crate) fragmentation: Fragmentation,
    pub(crate) linux_before: Option<LinuxFragmentation>,
    pub(crate) linux_after: Option<LinuxFragmentation>,
    pub(crate) linux_derived: Option<LinuxFragmentation>,
    pub(crate) latencies: Latencies,
    pub(crate) alloc_on_free: u64,
    pub(crate) vmstat: Vec<(&'static str, u64)>,
    /// The caches that descriptors come from: name, live objects, room for objects, bytes.
    pub(crate) descriptor_caches: Vec<DescriptorCache>,
    /// Pages in Linux's per-CPU lists, before and after.
    pub(crate) linux_pcp: (Option<u64>, Option<u64>),
    pub(crate) picture: Picture,
    /// What deferred frees let lie about.
    pub(crate) backlog: Option<Backlog>,
    pub(crate) teardown: Teardown,
    pub(crate) corruptions: (u64, Option<String>),
}

impl Replay {
    /// What went wrong, in words. Nothing: all is well.
    pub(crate) fn failures(&self) -> Vec<String> {
        let mut all = Vec::new();
        let mut check = |bad: bool, text: String| {
            if bad {
                all.push(text);
            }
        };
        let (pages, slab) = (self.pages.failed, self.slab.failed);
        check(
            pages > 0,
            format!("{pages} page allocations failed where Linux had none fail"),
        );
        check(
            slab > 0,
            format!("{slab} object allocations failed where Linux had none fail"),
        );
        check(
            !self.ledger.balanced,
            "the ledger does not balance at the end of the recording".into(),
        );
        let down = &self.teardown;
        check(
            !down.ledger.balanced,
            "the ledger does not balance after the teardown".into(),
        );
        check(
            down.missing > 0,
            format!("{} pages did not come back", down.missing),
        );
        check(
            self.alloc_on_free > 0,
            format!("{} allocations on free paths", self.alloc_on_free),
        );
        let left = self.backlog.as_ref().map_or(0, |b| b.left);
        check(
            left > 0,
            format!("{left} objects are not free after the barrier"),
        );
        for cache in &down.stuck_caches {
            check(true, format!("a cache could not be destroyed: {cache}"));
        }
        if let (n @ 1.., Some(first)) = &self.corruptions {
            check(
                true,
                format!("{n} reports of corruption, the first: {first}"),
            );
        }
        all
    }

    /// Linux's fragmentation at the end of the recording, and how it is known.
    pub(crate) fn linux(&self) -> Option<(LinuxFragmentation, &'static str)> {
        let snapshot = self.linux_after.map(|l| (l, "snapshot"));
        snapshot.or(self.linux_derived.map(|l| (l, "events")))
    }

    /// Metadata at its peak, as a share of memory.
    pub(crate) fn peak_percent(&self) -> f64 {
        let ledger = &self.ledger;
        let descriptors = self.peak.0.max(ledger.descriptor_bytes);
        let bytes = ledger.memmap_bytes + ledger.other_metadata_bytes + descriptors;
        bytes as f64 * 100.0 / self.ram_bytes.max(1) as f64
    }

    /// Events that became calls or are accounted for, a second.
    pub(crate) fn events_per_second(&self) -> f64 {
        self.source.recording.events.len() as f64 / self.times.overall().as_secs_f64().max(1e-9)
    }
}

/// Does everything.
pub(crate) fn run(options: &Options) -> Result<Replay, Error> {
    let mut source = source::load(options.path.as_deref(), !options.no_snapshot, options.quiet)?;
    let limited = options
        .limit
        .is_some_and(|n| n < source.recording.events.len());
    if let Some(limit) = options.limit.filter(|_| limited) {
        source.recording.events.truncate(limit);
        source.recording.after = None;
    }
    let mut times = Times {
        parse: source.parse,
        ..Times::default()
    };
    let shape = {
        let Recording { events, before, .. } = &source.recording;
        let cpus = source.recording.cpus();
        machine::shape(events, cpus, before.as_ref(), options.memory, options.cpus)?
    };
    let impossible = machine::leave_out_impossible(&mut source.recording.events, &shape)?;
    let recording = &source.recording;
    let (events, before) = (&recording.events, recording.before.as_ref());
    let nothing = |why: &str| Error::Nothing {
        name: source.name.clone(),
        why: why.into(),
    };
    if events.is_empty() {
        return Err(nothing("no events"));
    }

    let objects_too = !options.pages_only && has_objects(events);
    let start = Instant::now();
    let slabs = objects_too.then(|| slabs::find(events, shape.pages, options.direct_map_base));
    // A look ahead, if there is a snapshot to look at.
    let after = recording.after.as_ref();
    let after_flags = after.and_then(|snapshot| snapshot.kpageflags.as_deref());
    let last = after_flags.map(|_| LastEvents::find(events, shape.pages));
    let corrections = match (&last, after_flags) {
        (Some(last), Some(flags)) => last.corrections(events, flags, |event| {
            slabs.as_ref().is_some_and(|s| s.contains(event))
        }),
        _ => Corrections::default(),
    };
    times.pair = start.elapsed();
    let slabs_told = slabs.as_ref().map(|s| s.told);
    if options.pages_only {
        let is_page = |e: &Event| {
            matches!(
                e.kind(),
                EventKind::PageAlloc { .. } | EventKind::PageFree { .. }
            )
        };
        if !events.iter().any(is_page) {
            return Err(nothing("--pages-only, and there is no event of a page"));
        }
    }

    let start = Instant::now();
    let machine = Machine::new(&shape.ranges, shape.cpus).map_err(|why| Error::Machine {
        name: source.name.clone(),
        mib: shape.bytes() >> 20,
        cpus: shape.cpus,
        source: why,
    })?;
    let guards: Vec<_> = (0..shape.cpus)
        .filter_map(|cpu| machine.mm.platform().claim(cpu))
        .collect();
    guards[0].switch();
    let mut pages = Pages::new(shape.pages);
    let (mut claims, mut census_start) = (None, None);
    if let Some(snapshot) = before
        && let Some(flags) = &snapshot.kpageflags
        && let Some(layout) = snapshot.layout(Some(&Evidence::of_start(events)))
    {
        claims = Some(layout::claim(
            &machine,
            &mut pages,
            &layout,
            flags,
            &shape.ram(),
        ));
        census_start = Some(Beside {
            linux: Side::of_layout(&layout, flags, &shape.ram()),
            differences: census::compare(&pages, &layout, flags, &shape.ram(), None),
        });
    }
    let base = match slabs_told {
        Some(Told::ByAddress(base)) => Some(base),
        _ => None,
    };
    let objects = Objects::new(base, shape.pages);
    times.setup = source.load + start.elapsed();

    let deferred = options
        .rcu
        .filter(|_| objects_too)
        .map(|(percent, grace_ms)| Deferred::new(&machine, percent, grace_ms));
    let mut engine = Engine::new(
        Hosted::new(&machine, &guards, recording.caches.len(), deferred),
        pages,
        objects,
        slabs,
    );
    let corrected = corrections.len() as u64;
    engine.corrections = corrections;
    let bar = progress::events(options.quiet, events.len() as u64);
    times.replay = hosted::run(&mut engine, events, &recording.caches, |done| {
        bar.set_position(done as u64)
    });
    bar.finish_and_clear();
    times.allocator = engine.backend.latencies.total(times.replay.ns_per_tick);

    // The end of the recording.
    let ledger = machine.mm.ledger();
    let fragmentation = machine.mm.fragmentation();
    let (mix, picture) = mix::survey(&machine, &ledger);
    let layout_after = after.and_then(|snapshot| {
        let bare = |gfp, order| classify::purpose(gfp, order) == Purpose::Bare;
        snapshot.layout(Some(&Evidence::of_end_without_flags(events, bare)))
    });
    let (census_replay, bare_slabs) = Side::of_machine(&machine, &engine.pages);
    let census = Census {
        replay: census_replay,
        bare_slabs,
        linux: after_flags.zip(layout_after).map(|(flags, layout)| Beside {
            linux: Side::of_layout(&layout, flags, &shape.ram()),
            differences: census::compare(
                &engine.pages,
                &layout,
                flags,
                &shape.ram(),
                last.as_ref(),
            ),
        }),
        start: census_start,
        corrected,
    };
    let mut page_counts = engine.page_counts.clone();
    page_counts.from_snapshot = claims.as_ref().map_or(0, |c| c.all_blocks() - c.blocks[5]);
    page_counts.live =
        (page_counts.from_snapshot + page_counts.allocated).saturating_sub(page_counts.freed);
    let mut slab_counts = engine.slab_counts.clone();
    slab_counts.live = engine.objects.len() as u64;
    slab_counts.caches = engine.backend.caches_made;
    let linux_derived = claims
        .as_ref()
        .map(|_| linux::of_events(&engine.pages, &shape.ram()));
    let linux_before = before.and_then(linux::of_snapshot);
    let linux_after = recording.after.as_ref().and_then(linux::of_snapshot);
    let linux_pcp = (pcp_of(before), pcp_of(recording.after.as_ref()));
    let descriptor_caches = DescriptorCache::all(&machine);
    let mut vmstat = Vec::new();
    machine.mm.vmstat(|name, value| vmstat.push((name, value)));

    let start = Instant::now();
    let backlog = engine.backend.end_deferred();
    let teardown = tear_down(&machine, &mut engine, claims.as_ref());
    times.teardown = start.elapsed();
    let Engine {
        backend, traffic, ..
    } = engine;
    let Hosted {
        latencies, peak, ..
    } = backend;
    let alloc_on_free = machine.mm.event(Counter::AllocOnFree);
    let corruptions = machine.corruptions.get();
    Ok(Replay {
        cpus: shape.cpus,
        ram_bytes: shape.bytes(),
        memory_from: shape.memory_from,
        limited,
        impossible,
        slabs_told,
        claims,
        times,
        traffic,
        pages: page_counts,
        slab: slab_counts,
        ledger,
        mix,
        census,
        peak,
        fragmentation,
        linux_before,
        linux_after,
        linux_derived,
        latencies,
        alloc_on_free,
        vmstat,
        descriptor_caches,
        linux_pcp,
        picture,
        backlog,
        teardown,
        corruptions,
        source,
    })
}

fn tear_down(
    machine: &Machine,
    engine: &mut Engine<Hosted<'_>>,
    claims: Option<&Claims>,
) -> Teardown {
    let (blocks, objects, stuck_caches) = hosted::tear_down(engine);
    // Twice: the first gives back descriptors, the second the slabs that they were in.
    machine.mm.shrink();
    machine.mm.shrink();
    let ledger = machine.mm.ledger();
    let reserved = claims.map_or(0, |c| c.reserved_pages);
    let back = ledger.free + ledger.untouched + ledger.pcp + ledger.metadata + reserved;
    let left: u64 = ledger.by_type.iter().sum();
    let kept = ledger.by_type[PageType::Reserved as usize];
    let missing = ledger
        .given
        .saturating_sub(back)
        .max(left.saturating_sub(kept));
    let free_blocks = machine.mm.fragmentation().free_by_order.iter().sum();
    Teardown {
        ledger,
        blocks,
        objects,
        stuck_caches,
        missing,
        free_blocks,
    }
}
