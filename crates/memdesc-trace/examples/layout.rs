//! How well a snapshot's blocks agree with what the kernel counted:
//! `cargo run --release --example layout -- FOLDER`.

use memdesc_trace::snapshot::evidence::Evidence;
use memdesc_trace::snapshot::layout::LayoutKind;
use memdesc_trace::{Recording, Snapshot};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let path = std::env::args().nth(1).ok_or("usage: layout FOLDER")?;
    let recording = Recording::open(&path, &mut |_| ())?;
    let moments = [("before", &recording.before), ("after", &recording.after)];
    for (name, snapshot) in moments
        .into_iter()
        .filter_map(|(n, s)| Some((n, s.as_ref()?)))
    {
        println!("== {path} {name}");
        show(snapshot, None);
        let evidence = match name {
            "before" => Evidence::of_start(&recording.events),
            _ => Evidence::of_end(&recording.events),
        };
        println!("  with the events as evidence:");
        show(snapshot, Some(&evidence));
    }
    Ok(())
}

fn show(snapshot: &Snapshot, evidence: Option<&Evidence>) {
    let start = std::time::Instant::now();
    let Some(layout) = snapshot.layout(evidence) else {
        return println!("  no kpageflags");
    };
    println!("  {} blocks in {:?}", layout.blocks.len(), start.elapsed());
    for zone in &layout.zones {
        println!("  {zone:?}");
    }
    println!("  orders by kpageflags {:?}", layout.free_by_order());
    println!("  orders by buddyinfo  {:?}", snapshot.free_by_order());
    let mem_free = snapshot
        .meminfo
        .as_ref()
        .and_then(|m| m.get("MemFree"))
        .unwrap_or(0)
        / 4096;
    let pcp: u64 = layout.zones.iter().map(|z| z.per_cpu_counted).sum();
    let free = layout.free_pages();
    let counted = mem_free + pcp;
    let off = free as i64 - counted as i64;
    println!(
        "  free {free}, MemFree and per-CPU lists {counted}: off by {off} ({:.4} %)",
        off as f64 * 100.0 / counted as f64
    );
    let late = layout.pages(LayoutKind::FreeUninitialised);
    println!(
        "  MemFree {mem_free}, buddy and uninitialised {}",
        layout.pages(LayoutKind::Free) + late
    );
    for kind in LayoutKind::ALL {
        println!("  {kind:?} {}", layout.pages(kind));
    }
    println!("  {:?}", layout.pageblocks());
}
