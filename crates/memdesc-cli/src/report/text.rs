//! The report for people.

use std::fmt::Write;
use std::time::Duration;

use memdesc::{MAX_ORDER, PageType};

use super::census;
use super::format::{bytes, n, rate, right};
use super::picture;
use crate::handles::Purpose;
use crate::replay::latency::{Group, Path, Summary};
use crate::replay::{Claims, Replay, Told};
use memdesc_replay::counts::Failures;

/// Samples of broken lines that are shown.
const SAMPLES: usize = 3;
const BAR: usize = 24;
const MAP_WIDTH: usize = 96;

pub(super) struct Page(String);

impl Page {
    pub(super) fn head(&mut self, title: &str) {
        let _ = writeln!(self.0, "\n{title}");
    }

    pub(super) fn line(&mut self, text: &str) {
        let _ = writeln!(self.0, "  {}", text.trim_end());
    }

    fn row(&mut self, name: &str, value: &str) {
        self.line(&format!("{name:<34}{}", right(value, 14)));
    }

    fn note(&mut self, name: &str, value: &str, note: &str) {
        self.line(&format!("{name:<34}{}  {note}", right(value, 14)));
    }

    /// Only if there is something to count.
    pub(super) fn some(&mut self, name: &str, value: u64, note: &str) {
        if value > 0 {
            self.note(name, &n(value), note);
        }
    }
}

/// The whole report.
pub(crate) fn report(replay: &Replay) -> String {
    let mut page = Page(String::new());
    recording(&mut page, replay);
    traffic(&mut page, replay);
    failures(&mut page, replay);
    ledger(&mut page, replay);
    census::text(&mut page, replay);
    fragmentation(&mut page, replay);
    deferred(&mut page, replay);
    latencies(&mut page, replay);
    speed(&mut page, replay);
    teardown(&mut page, replay);
    page.0
}

fn recording(page: &mut Page, replay: &Replay) {
    let recording = &replay.source.recording;
    let events = recording.events.len() as u64;
    let seconds = recording
        .time_span()
        .map_or(0.0, |t| (t.end - t.start) as f64 / 1e9);
    let _ = writeln!(page.0, "Recording  {}", replay.source.name);
    if let Some(kernel) = &replay.source.kernel {
        page.row("Linux", kernel);
    }
    page.note(
        "events",
        &n(events),
        if replay.limited {
            "the first of it, as asked for"
        } else {
            ""
        },
    );
    page.row("seconds", &format!("{seconds:.3}"));
    page.row("CPUs", &replay.cpus.to_string());
    page.note(
        "memory",
        &bytes(replay.ram_bytes),
        &format!("from {}", replay.memory_from),
    );
    match replay.slabs_told {
        Some(Told::ByAddress(base)) => page.row("direct map at", &format!("{base:#x}")),
        Some(Told::ByFlags) => page.line(
            "No direct map fits the objects' addresses (hashed, perhaps): slab pages are told by their gfp flags, \
             and some may be counted twice. --direct-map-base names it.",
        ),
        None => page.line("Pages only: slab pages are replayed as pages."),
    }
    let skipped = &recording.skipped;
    page.some("broken lines, left out", skipped.broken_lines, "");
    for sample in skipped.samples.iter().take(SAMPLES) {
        page.line(&format!("  {sample}"));
    }
    page.some(
        "impossible events, left out",
        replay.impossible,
        "pages or orders that there are not",
    );
    page.some(
        "other events, left out",
        skipped.other_events,
        "no allocations",
    );
    page.some("events that Linux lost", skipped.lost_events, "");
    page.some(
        "unknown gfp names",
        skipped.unknown_gfp_names,
        "events kept, flag missing",
    );
    page.some(
        "events out of order",
        recording.out_of_order,
        "replayed as they stand",
    );
    if let Some(truncated) = &recording.truncated {
        page.line(&format!("The file {truncated}."));
    }
    let Some(claims) = &replay.claims else {
        page.line(
            "No snapshot of before: memory is empty at the start, and layouts cannot be compared.",
        );
        return;
    };
    page.head("Layout before the first event, as Linux had it");
    page.line(&format!(
        "{:<34}{}{}",
        "",
        right("blocks", 14),
        right("pages", 14)
    ));
    for (i, name) in Claims::NAMES.iter().enumerate() {
        let name = name.replace('_', " ");
        page.line(&format!(
            "{name:<34}{}{}",
            right(&n(claims.blocks[i]), 14),
            right(&n(claims.pages[i]), 14)
        ));
    }
    page.line(&format!(
        "{:<34}{}{}",
        "all",
        right(&n(claims.all_blocks()), 14),
        right(&n(claims.all_pages()), 14)
    ));
    page.some(
        "at another place",
        claims.elsewhere,
        "blocks: our own metadata lies there",
    );
    page.some("not to be had", claims.refused, "blocks");
    page.some(
        "early boot",
        claims.early_boot_pages,
        "pages, Linux's memory map mostly: free here, we have our own",
    );
}

fn traffic(page: &mut Page, replay: &Replay) {
    let (events, pages, slab) = (&replay.traffic, &replay.pages, &replay.slab);
    page.head("Traffic                             events in the recording");
    for (name, count, note) in [
        ("mm_page_alloc", events.page_alloc, ""),
        ("mm_page_free", events.page_free, ""),
        (
            "mm_page_free_batched",
            events.page_free_batched,
            "come with an mm_page_free, are no frees",
        ),
        ("kmalloc", events.kmalloc, ""),
        ("kfree", events.kfree, ""),
        ("kmem_cache_alloc", events.cache_alloc, ""),
        ("kmem_cache_free", events.cache_free, ""),
    ] {
        page.note(name, &n(count), note);
    }
    page.head("Pages                                       blocks");
    page.some("there before", pages.from_snapshot, "");
    let of = |p: Purpose| {
        format!(
            "{} {}",
            n(pages.by_purpose[p as usize]),
            p.name().replace('_', " ")
        )
    };
    let by = Purpose::ALL.map(of).join(", ");
    page.note("allocated", &n(pages.allocated), &by);
    page.row("freed", &n(pages.freed));
    page.row("live at the end", &n(pages.live));
    let note = format!(
        "and {} freed: our slabs take pages of their own",
        n(pages.slab_freed)
    );
    page.some("Linux's slabs, left out", pages.slab_allocated, &note);
    page.some("freed, never seen allocated", pages.free_unseen, "");
    page.some(
        "reused, never seen freed",
        pages.free_implied,
        "freed at the reuse",
    );
    page.some(
        "freed in part",
        pages.free_in_part,
        "the block goes with its last part",
    );
    page.some(
        "freed together",
        pages.free_joined,
        "several blocks of ours, one of Linux",
    );
    page.some("reserved, freed by Linux", pages.free_reserved, "kept here");
    if replay.slabs_told.is_none() && slab.skipped == 0 {
        return;
    }
    page.head("Objects");
    page.note(
        "allocated",
        &n(slab.allocated),
        &format!("in {} caches and kmalloc", slab.caches),
    );
    page.row("freed", &n(slab.freed));
    page.row("live at the end", &n(slab.live));
    page.some("kfree(NULL)", slab.free_null, "");
    page.some("freed, never seen allocated", slab.free_unseen, "");
    page.some(
        "reused, never seen freed",
        slab.free_implied,
        "bulk and kfree_rcu frees are not traced",
    );
    page.some("gone with their slab", slab.free_with_slab, "the same");
    page.some("left out", slab.skipped, "events: --pages-only");
}

fn failures(page: &mut Page, replay: &Replay) {
    page.head("Failures where Linux had none");
    let list = |failures: &Failures, unit: &str| -> String {
        let row = |(&(why, of), &n): (&(&str, u64), &u64)| format!("{n} × {why} at {unit} {of}");
        failures.iter().map(row).collect::<Vec<_>>().join(", ")
    };
    page.note(
        "pages",
        &n(replay.pages.failed),
        &list(&replay.pages.failures, "order"),
    );
    page.note(
        "objects",
        &n(replay.slab.failed),
        &list(&replay.slab.failures, "size"),
    );
    let theirs = replay.traffic.page_alloc_failed + replay.slab.linux_failed;
    page.some("failed in Linux, not replayed", theirs, "");
    page.row("allocations on a free path", &n(replay.alloc_on_free));
    page.some("reports of corruption", replay.corruptions.0, "");
}

fn ledger(page: &mut Page, replay: &Replay) {
    let (ledger, mix) = (&replay.ledger, &replay.mix);
    let given = replay.ram_bytes.max(1) as f64;
    let pages = ledger.given.max(1) as f64;
    page.head("Ledger at the end of the recording");
    page.row("RAM", &bytes(replay.ram_bytes));
    let mut cost = |name: &str, value: u64, width: f64| {
        let percent = value as f64 * 100.0 / given;
        page.line(&format!(
            "{name:<34}{}{}%  {:>6.2} B/page  {}",
            right(&bytes(value), 14),
            right(&format!("{percent:.4}"), 10),
            value as f64 / pages,
            picture::bar(percent / width, BAR),
        ));
    };
    let full = 1.5625;
    cost("memory map, a word a page", ledger.memmap_bytes, full);
    cost("descriptors", ledger.descriptor_bytes, full);
    cost("other", ledger.other_metadata_bytes, full);
    cost("all of it", ledger.metadata_bytes(), full);
    let descriptors = replay.peak.0.max(ledger.descriptor_bytes);
    cost(
        "at its peak",
        ledger.memmap_bytes + ledger.other_metadata_bytes + descriptors,
        full,
    );
    cost(
        "a plain reading of the seeds",
        mix.plain_seeds_bytes(),
        full,
    );
    cost("struct page", mix.struct_page_bytes(), full);
    for cache in replay.descriptor_caches.iter().filter(|c| c.bytes > 0) {
        page.line(&format!(
            "  {:<32}{}  {} of {} in use, {} B each",
            cache.name,
            right(&bytes(cache.bytes), 14),
            n(cache.live),
            n(cache.room),
            cache.size,
        ));
    }
    page.line(&format!(
        "for {} free blocks, {} bare, {} folios, {} page tables, {} slabs, {} large kmalloc",
        n(mix.free),
        n(mix.bare),
        n(mix.folios),
        n(mix.page_tables),
        n(mix.slabs),
        n(mix.large_kmalloc)
    ));
    page.line("(the seeds, read plainly: 8 B a page, a 40 B buddy a block, 80 B more a folio, 64 B a slab)");
    let by = |kind: PageType| n(ledger.by_type[kind as usize]);
    page.line(&format!(
        "pages: {} free, {} in per-CPU lists, {} untouched, {} anon, {} file, {} bare, {} slab, {} page tables, {} reserved, {} metadata",
        n(ledger.free), n(ledger.pcp), n(ledger.untouched), by(PageType::Anon), by(PageType::File),
        by(PageType::Bare), by(PageType::Slab), by(PageType::PageTable), by(PageType::Reserved), n(ledger.metadata),
    ));
    page.row("balanced", if ledger.balanced { "yes" } else { "NO" });
}

fn fragmentation(page: &mut Page, replay: &Replay) {
    let ours = &replay.fragmentation;
    let linux = replay.linux();
    page.head("Fragmentation at the end of the recording");
    let source = match linux {
        Some((_, "snapshot")) => "Linux: its own count after the recording, of initialised memory",
        Some(_) => {
            "Linux: the layout before and the events since, merged as far as can be; per-CPU lists count as free blocks"
        }
        None => "Linux: not known without a snapshot",
    };
    page.line(source);
    let shares = |orders: &[u64; MAX_ORDER + 1]| -> [f64; MAX_ORDER + 1] {
        let all: u64 = orders.iter().enumerate().map(|(o, n)| n << o).sum();
        std::array::from_fn(|o| (orders[o] << o) as f64 / all.max(1) as f64)
    };
    page.line(&format!(
        "free blocks{}   share of free memory",
        right("ours", 14)
    ));
    let our_shares = shares(&ours.free_by_order);
    for (order, share) in our_shares.into_iter().enumerate() {
        let mut line = format!(
            "order {order:>2}   {}   {:<BAR$}",
            right(&n(ours.free_by_order[order]), 14),
            picture::bar(share, BAR)
        );
        if let Some((linux, _)) = linux {
            line += &format!(
                "   Linux {}   {}",
                right(&n(linux.free_by_order[order]), 9),
                picture::bar(shares(&linux.free_by_order)[order], BAR)
            );
        }
        page.line(&line);
    }
    let beside = |of: fn(&crate::replay::linux::LinuxFragmentation) -> u64| {
        linux.map_or(String::new(), |(l, _)| format!("Linux {}", n(of(&l))))
    };
    page.note(
        "pinned 2 MiB blocks",
        &n(ours.pinned_pageblocks),
        &beside(|l| l.pinned_pageblocks),
    );
    page.note(
        "free 2 MiB blocks",
        &n(ours.free_pageblocks),
        &beside(|l| l.free_pageblocks),
    );
    if let (Some(before), Some(derived)) = (replay.linux_before, replay.linux_derived) {
        let text = format!(
            "{} before; {} by the events since",
            n(before.pinned_pageblocks),
            n(derived.pinned_pageblocks)
        );
        page.note("Linux's pinned 2 MiB blocks", "", &text);
    }
    let after = replay.linux_pcp.1.or(replay.linux_pcp.0);
    let moment = if replay.linux_pcp.1.is_some() {
        ""
    } else {
        " before the recording"
    };
    let theirs = after.map_or(String::new(), |p| format!("Linux {}{moment}", n(p)));
    page.note("pages in per-CPU lists", &n(replay.ledger.pcp), &theirs);
    page.line(&format!(
        "memory from bottom to top, a character {}: · free  ░▒▓ in part  █ full",
        bytes(replay.picture.piece)
    ));
    for row in picture::map(&replay.picture.taken, MAP_WIDTH) {
        page.line(&format!("  {row}"));
    }
}

/// Columns of the picture of the backlog.
const COLUMNS: usize = 60;

fn deferred(page: &mut Page, replay: &Replay) {
    let Some(backlog) = &replay.backlog else {
        return;
    };
    page.head("Deferred frees (kvfree_rcu)");
    let share = backlog.deferred as f64 * 100.0 / replay.slab.freed.max(1) as f64;
    page.note(
        "objects",
        &n(backlog.deferred),
        &format!("{share:.1} % of the frees"),
    );
    page.note(
        "grace periods",
        &n(backlog.grace_periods),
        &format!("of at least {} ms", backlog.grace_ms),
    );
    page.note("lay about at most", &n(backlog.peak()), "objects");
    page.note("  on average", &n(backlog.mean()), "");
    page.note(
        "by their heads",
        &n(backlog.by_heads),
        "no page for pointers was to be had",
    );
    page.note("not free after the barrier", &n(backlog.left), "");
    let columns = backlog.columns(COLUMNS);
    let top = columns.iter().copied().max().unwrap_or(0).max(1);
    let bars = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let picture: String = columns
        .iter()
        .map(|&n| bars[(n * 7).div_ceil(top).min(7) as usize])
        .collect();
    page.line(&format!("over time, up to {}:", n(top)));
    page.line(&format!("  {picture}"));
}

fn latencies(page: &mut Page, replay: &Replay) {
    let ns = replay.times.replay.ns_per_tick;
    page.head(
        "Latency in ns                          calls       p50       p99     p99.9         max",
    );
    let mut row = |name: &str, s: Summary| {
        if s.count > 0 {
            page.line(&format!(
                "{name:<28}{}{:>10}{:>10}{:>10}{:>12}",
                right(&n(s.count), 14),
                s.p50,
                s.p99,
                s.p999,
                s.max
            ));
        }
    };
    for group in Group::ALL {
        row(
            &group.key().replace('_', " "),
            replay.latencies.group(group, ns),
        );
        for &path in Path::ALL.iter().filter(|p| p.group() == group) {
            row(
                &format!("  {}", path.text()),
                replay.latencies.path(path, ns),
            );
        }
    }
    page.line(&format!(
        "The cost of reading the clock, {:.1} ns on average, is taken off; a tick of it is {:.2} ns.",
        replay.latencies.floor as f64 * ns,
        ns
    ));
}

fn speed(page: &mut Page, replay: &Replay) {
    let times = &replay.times;
    let events = replay.source.recording.events.len() as u64;
    let ms = |d: Duration| format!("{:.1} ms", d.as_secs_f64() * 1e3);
    page.head("Speed, one thread");
    page.note(
        "text to results",
        &ms(times.overall()),
        &format!("{} events", rate(events, times.overall())),
    );
    page.note(
        "  reading and parsing",
        &ms(times.parse),
        &rate(events, times.parse),
    );
    page.note("  telling slab pages", &ms(times.pair), "");
    page.note(
        "  replaying",
        &ms(times.replay.wall),
        &rate(events, times.replay.wall),
    );
    let calls = replay.latencies.calls();
    let each = times.allocator.as_secs_f64() * 1e9 / calls.max(1) as f64;
    page.note(
        "    of it in the allocator",
        &ms(times.allocator),
        &format!("{} calls, {each:.1} ns each", n(calls)),
    );
    page.note("beside that: snapshots, layout", &ms(times.setup), "");
}

fn teardown(page: &mut Page, replay: &Replay) {
    let down = &replay.teardown;
    page.head("Teardown");
    page.note(
        "freed",
        &n(down.blocks),
        &format!("blocks, and {} objects", n(down.objects)),
    );
    page.note("pages that did not come back", &n(down.missing), "");
    page.row("balanced", if down.ledger.balanced { "yes" } else { "NO" });
    let kept = format!(
        "of descriptors stay, for {} free blocks and what is cached",
        n(down.free_blocks)
    );
    page.note("", &bytes(down.ledger.descriptor_bytes), &kept);
    let failures = replay.failures();
    if failures.is_empty() {
        page.line("All is well.");
    }
    for failure in failures {
        page.line(&format!("FAILED: {failure}"));
    }
}
