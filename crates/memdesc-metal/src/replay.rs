//! Replays the module: a recording of a Linux kernel's allocators, on all CPUs of this machine.
//!
//! The module is a recording in binary (`memdesc cut --binary`) or as text. One CPU reads it and makes a plan of it (`memdesc-replay`), gives the module's memory
//! back, and then all CPUs make the plan's calls, each those of its share. What is reported bears the names that `memdesc replay --json` has for it. Memory
//! is empty at the start, as for `memdesc replay --no-snapshot`: Linux's pages have numbers that this machine does not have.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt::Display;

use memdesc::{Ledger, PAGE_SIZE, PageType};
use memdesc_replay::counts::{PageCounts, SlabCounts};
use memdesc_replay::handles::{Handles, Purpose};
use memdesc_replay::slabs::Told;
use memdesc_replay::{Done, Left, Options, Plan, Run};
use memdesc_trace::binary::{self, Binary};
use memdesc_trace::{Event, EventKind, Parser};
use spin::Mutex;

use crate::exit::Exit;
use crate::module::Module;
use crate::platform::Metal;
use crate::tests::{self, Machine};
use crate::{log, memory, smp, time};

/// `struct page` of Linux, in bytes.
const STRUCT_PAGE: u64 = 64;

/// Replays the module, and says how it went.
pub(crate) fn run(machine: &Machine, module: Module) -> Exit {
    match replay(machine, module) {
        Ok(wrong) if wrong.is_empty() => {
            log!("replay: passed, all is well");
            Exit::Success
        }
        Ok(wrong) => {
            for what in &wrong {
                log!("replay: FAILED: {what}");
            }
            Exit::Failure
        }
        Err(why) => {
            log!("replay: FAILED: the module: {why}");
            Exit::Failure
        }
    }
}

/// A line of the report: a name, and its value.
fn says(name: &str, value: impl Display) {
    log!("  {name:<42} {value:>12}");
}

/// A line that explains its value.
fn says_more(name: &str, value: impl Display, more: impl Display) {
    log!("  {name:<42} {value:>12}  {more}");
}

/// The recording in the module.
fn read(module: &[u8]) -> Result<Binary, String> {
    if binary::is_binary(module) {
        return binary::read(module).map_err(|why| format!("{why}"));
    }
    read_text(module)
}

/// The recording in the module, as perf or ftrace print it.
fn read_text(module: &[u8]) -> Result<Binary, String> {
    let compressed = [&b"\x28\xb5\x2f\xfd"[..], b"\x1f\x8b"];
    if compressed.iter().any(|magic| module.starts_with(magic)) {
        return Err("compressed; decompress it, or make a recording in binary of it with `memdesc cut RECORDING --binary FILE`".into());
    }
    let (mut parser, mut events) = (Parser::new(), Vec::new());
    parser.feed(module, &mut events);
    parser.finish(&mut events);
    let lines = parser.lines();
    let (caches, skipped) = parser.into_parts();
    if events.is_empty() {
        return Err(match skipped.samples.first() {
            Some(broken) => format!(
                "not a recording: {broken}; make one with `memdesc cut RECORDING --binary FILE`"
            ),
            None => format!("no events in {lines} lines"),
        });
    }
    if let Some(broken) = skipped.samples.first() {
        let n = skipped.broken_lines;
        log!("replay: {n} of {lines} lines are broken and left out, the first: {broken}");
    }
    let all = events.len();
    events.retain(|event| pages_of(event).is_none_or(|(_, order)| order <= memdesc::MAX_ORDER));
    if events.len() < all {
        let n = all - events.len();
        log!("replay: {n} events of blocks that cannot be are left out");
    }
    let ends = events.iter().filter_map(pages_of);
    let end = ends.map(|(pfn, order)| u64::from(pfn) + (1 << order)).max();
    let pages = u32::try_from(end.unwrap_or(0)).map_err(|_| "a page beyond all memory")?;
    Ok(Binary {
        events,
        caches,
        pages,
    })
}

/// The pages of an event.
fn pages_of(event: &Event) -> Option<(u32, usize)> {
    match event.kind() {
        EventKind::PageAlloc { pfn, order, .. } | EventKind::PageFree { pfn, order } => {
            Some((pfn, order.into()))
        }
        _ => None,
    }
}

/// Everything; what went wrong in it, or why it could not be done.
fn replay(machine: &Machine, module: Module) -> Result<Vec<String>, String> {
    let mm = machine.mm;
    mm.shrink();
    let settled = tests::settled(&tests::ledger(machine)) + module.pages();
    let start = time::now();
    let recording = read(&module)?;
    drop(module);
    if recording.events.is_empty() {
        return Err("no events".into());
    }
    let read_in = time::now() - start;

    let (events, pages) = (recording.events.len(), recording.pages as usize);
    let needed = Plan::memory_needed(events, pages) as u64;
    let ledger = tests::ledger(machine);
    let free = (ledger.free + ledger.untouched + ledger.pcp) * PAGE_SIZE as u64;
    if needed > free {
        return Err(format!(
            "{events} events and {pages} pages take up to {} MiB to plan, and {} MiB are free: give the machine more memory, or cut the recording",
            needed >> 20,
            free >> 20
        ));
    }
    let options = Options {
        cpus: machine.cpus,
        deferred_percent: machine
            .boot
            .value("rcu")
            .and_then(|n| n.parse().ok())
            .unwrap_or(0),
    };
    let start = time::now();
    let plan = Plan::new(&recording.events, &recording.caches, pages, options);
    let planned_in = time::now() - start;
    log!(
        "replay: {events} events read in {} ms, planned in {} ms: {} calls on {} CPUs, {:?}",
        read_in / 1_000_000,
        planned_in / 1_000_000,
        plan.calls(),
        machine.cpus,
        plan.calls_by_cpu()
    );

    // SAFETY: there is one memory manager, and a plan frees each object with its own cache.
    let handles: Handles<'_, Metal> = unsafe { Handles::new(mm) };
    let run = Run::new(handles, &plan, &recording.caches).map_err(|why| format!("{why}"))?;
    let before = tests::ledger(machine);
    let free = before.free + before.untouched + before.pcp;
    if plan.peak_pages > free {
        return Err(format!(
            "{} MiB of pages are out at its peak, and {} MiB are free: give the machine more memory, or cut the recording",
            (plan.peak_pages * PAGE_SIZE as u64) >> 20,
            (free * PAGE_SIZE as u64) >> 20
        ));
    }
    let all = Mutex::new(Done::default());
    let start = time::now();
    smp::on_all_cpus(&|cpu| {
        let done = run.cpu(cpu, |is_so| smp::wait_until(is_so), memory::work);
        all.lock().add(&done);
    });
    let took = time::now() - start;
    let after = tests::ledger(machine);
    let done = all.into_inner();

    let start = time::now();
    let left = run.end();
    let down_in = time::now() - start;
    report(&plan, events, &done, [&before, &after], took);
    let planned = Planned {
        calls: plan.calls() as u64,
        pages: plan.pages.clone(),
        objects: plan.objects.clone(),
    };
    drop((plan, recording));
    // Twice: the first gives back descriptors, the second the slabs that they were in.
    mm.shrink();
    mm.shrink();
    let down = tests::ledger(machine);
    let missing = settled.abs_diff(tests::settled(&down));
    log!(
        "replay: teardown in {} ms; all memory of the module and of the plan is given back",
        down_in / 1_000_000
    );
    says_more("teardown.blocks", left.blocks, "were live");
    says_more("teardown.objects", left.objects, "were live");
    says_more("teardown.missing_pages", missing, "did not come back");
    says("teardown.balanced", down.balanced);
    says("purity.allocations_on_free", on_free(machine));
    // What is said of it takes memory again.
    let mut wrong = failures(&planned, &done, &after, &left);
    let mut check = |bad: bool, what: String| {
        if bad {
            wrong.push(what);
        }
    };
    check(missing > 0, format!("{missing} pages did not come back"));
    check(
        !down.balanced,
        "the ledger does not balance after the teardown".into(),
    );
    let n = on_free(machine);
    check(n > 0, format!("{n} allocations on free paths"));
    Ok(wrong)
}

/// Allocations on free paths: there are none.
fn on_free(machine: &Machine) -> u64 {
    machine.mm.event(memdesc::Event::AllocOnFree)
}

/// What the calls were, and what memory was like at the end of the recording.
fn report(plan: &Plan, events: usize, done: &Done, [before, after]: [&Ledger; 2], took: u64) {
    log!("replay: events in the recording");
    says("events.total", events);
    let traffic = &plan.traffic;
    for (name, count) in [
        ("mm_page_alloc", traffic.page_alloc),
        ("mm_page_alloc_failed", traffic.page_alloc_failed),
        ("mm_page_free", traffic.page_free),
        ("mm_page_free_batched", traffic.page_free_batched),
        ("kmalloc", traffic.kmalloc),
        ("kfree", traffic.kfree),
        ("kmem_cache_alloc", traffic.cache_alloc),
        ("kmem_cache_free", traffic.cache_free),
    ] {
        says(&format!("events.by_kind.{name}"), count);
    }
    match plan.told {
        Some(Told::ByAddress(base)) => says("recording.direct_map_base", format!("{base:#x}")),
        Some(Told::ByFlags) => says("recording.direct_map_base", "unknown"),
        None => {}
    }

    log!("replay: blocks of pages, as all CPUs together have done it");
    says("pages.allocated", done.allocated());
    for purpose in Purpose::ALL {
        let n = done.by_purpose[purpose as usize];
        says(&format!("pages.by_purpose.{}", purpose.name()), n);
    }
    for (order, n) in done.by_order.iter().enumerate() {
        says(&format!("pages.by_order.{order}"), n);
    }
    says("pages.allocated_pages", done.allocated_pages());
    says("pages.freed", done.freed);
    says("pages.freed_pages", done.freed_pages);
    says("pages.live", done.allocated() - done.freed);
    says_more("pages.failed", done.pages_failed, "where Linux had none");
    let pages = &plan.pages;
    says_more("pages.free_unseen", pages.free_unseen, "left out");
    says("pages.free_implied", pages.free_implied);
    says("pages.free_in_part", pages.free_in_part);
    says("pages.free_joined", pages.free_joined);
    says_more(
        "pages.linux_slab_allocated",
        pages.slab_allocated,
        "left out",
    );
    says_more("pages.linux_slab_freed", pages.slab_freed, "left out");

    log!("replay: objects, as all CPUs together have done it");
    says("slab.allocated", done.objects());
    says_more("kmalloc", done.kmalloc, "of them");
    says_more("kmem_cache_alloc", done.cache_alloc, "of them");
    says("slab.caches", plan.objects.caches);
    says("slab.freed", done.objects_freed);
    says_more("deferred", done.deferred, "of them, by kvfree_rcu");
    says("slab.live", done.objects() - done.objects_freed);
    says_more("slab.failed", done.objects_failed, "where Linux had none");
    let objects = &plan.objects;
    says("slab.free_null", objects.free_null);
    says_more("slab.free_unseen", objects.free_unseen, "left out");
    says("slab.free_implied", objects.free_implied);
    says("slab.free_with_slab", objects.free_with_slab);

    log!("replay: memory at the end of the recording");
    for (name, kind) in [
        ("anon", PageType::Anon),
        ("file", PageType::File),
        ("page_table", PageType::PageTable),
        ("bare", PageType::Bare),
    ] {
        let of = |ledger: &Ledger| ledger.by_type[kind as usize];
        let pages = of(after) as i64 - of(before) as i64;
        says_more(
            &format!("census.replay.{name}.pages"),
            pages,
            "more than before",
        );
    }
    let ram = after.given * PAGE_SIZE as u64;
    let percent = |bytes: u64| {
        let ten_thousandths = bytes * 1_000_000 / ram.max(1);
        format!(
            "{}.{:04}",
            ten_thousandths / 10_000,
            ten_thousandths % 10_000
        )
    };
    let fixed = after.metadata_bytes() - after.descriptor_bytes;
    let peak = fixed + done.peak_descriptor_bytes.max(after.descriptor_bytes);
    says_more("ledger.ram_bytes", ram, "of this machine");
    says("ledger.memmap_bytes", after.memmap_bytes);
    says("ledger.descriptor_bytes", after.descriptor_bytes);
    says_more(
        "ledger.percent",
        percent(after.metadata_bytes()),
        "metadata of RAM",
    );
    says_more("ledger.peak_percent", percent(peak), "at its peak");
    says_more(
        "ledger.struct_page_percent",
        percent(after.given * STRUCT_PAGE),
        "struct page would take",
    );
    says("ledger.balanced", after.balanced);
    says_more(
        "peak pages",
        plan.peak_pages,
        "live, in the order of the recording",
    );

    log!("replay: time");
    says_more("replay ms", took / 1_000_000, "on all CPUs");
    says("calls", done.calls);
    let ns = took.checked_div(done.calls).unwrap_or(0);
    says_more("ns a call", ns, "of this machine, which may be emulated");
    says_more(
        "frees that waited",
        done.waited_for_allocation,
        "for another CPU's allocation",
    );
    says_more("waits", done.waited_for_others, "for the slowest CPU");
}

/// What a plan was, in numbers.
struct Planned {
    calls: u64,
    pages: PageCounts,
    objects: SlabCounts,
}

/// What went wrong by the end of the recording, in words.
fn failures(plan: &Planned, done: &Done, after: &Ledger, left: &Left) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut check = |bad: bool, what: String| {
        if bad {
            wrong.push(what);
        }
    };
    let first = done.first_failure.map_or(String::new(), |(why, size)| {
        format!(", the first of order or size {size}: {why}")
    });
    let (pages, objects) = (done.pages_failed, done.objects_failed);
    check(
        pages > 0,
        format!("{pages} page allocations failed where Linux had none fail{first}"),
    );
    check(
        objects > 0,
        format!("{objects} object allocations failed where Linux had none fail{first}"),
    );
    check(
        done.calls != plan.calls,
        format!("{} calls of {} were made", done.calls, plan.calls),
    );
    if pages + objects == 0 {
        // What was done is what was planned.
        for (what, done, planned) in [
            ("blocks allocated", done.allocated(), plan.pages.allocated),
            ("blocks freed", done.freed, plan.pages.freed),
            ("pages freed", done.freed_pages, plan.pages.freed_pages),
            ("objects allocated", done.objects(), plan.objects.allocated),
            ("objects freed", done.objects_freed, plan.objects.freed),
            ("blocks left", left.blocks, plan.pages.live),
            ("objects left", left.objects, plan.objects.live),
        ] {
            check(done != planned, format!("{what}: {done}, not {planned}"));
        }
    }
    for (name, objects) in &left.stuck {
        check(
            true,
            format!("the cache {name} could not be destroyed: {objects} objects left"),
        );
    }
    check(
        !after.balanced,
        "the ledger does not balance at the end of the recording".into(),
    );
    wrong
}
