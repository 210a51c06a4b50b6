//! How fast a recording is read: `cargo run --release --example parse -- FILE`.

use std::io::Read;
use std::time::Instant;

use memdesc_trace::{Reader, Recording, parse_bytes};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let path = std::env::args().nth(1).ok_or("usage: parse FILE")?;
    let speed = |what: &str, lines: u64, bytes: u64, start: Instant| {
        let s = start.elapsed().as_secs_f64();
        println!(
            "{what}: {lines} lines in {s:.3} s, {:.2} M lines/s, {:.0} ns a line, {:.0} MB/s",
            lines as f64 / s / 1e6,
            s * 1e9 / lines as f64,
            bytes as f64 / s / 1e6
        );
    };
    let start = Instant::now();
    let mut reader = Reader::open(path.as_ref())?;
    let mut events = Vec::new();
    while reader.next_batch(&mut events)? {}
    speed(
        "streamed",
        reader.parser().lines(),
        reader.parser().bytes(),
        start,
    );

    let start = Instant::now();
    let recording = Recording::open(&path, &mut |_| ())?;
    speed(
        "read whole, with snapshots",
        recording.lines,
        recording.bytes,
        start,
    );
    println!(
        "{} events, {} caches, {} out of order, {:?}, {:?}",
        recording.events.len(),
        recording.caches.len(),
        recording.out_of_order,
        recording.skipped,
        recording.truncated
    );

    let mut text = Vec::new();
    if path.ends_with(".zst") {
        let mut decoder = zstd::Decoder::new(std::fs::File::open(&path)?)?;
        decoder.window_log_max(31)?;
        let start = Instant::now();
        decoder.read_to_end(&mut text)?;
        speed(
            "decompressed alone",
            recording.lines,
            recording.bytes,
            start,
        );
    } else {
        std::fs::File::open(&path)?.read_to_end(&mut text)?;
    }
    for _ in 0..3 {
        let start = Instant::now();
        let parsed = parse_bytes(&text);
        speed("parsed from memory", parsed.lines, parsed.bytes, start);
    }
    let start = Instant::now();
    let mut parser = memdesc_trace::Parser::new();
    for piece in text.chunks(1 << 20) {
        events.clear();
        parser.feed(piece, &mut events);
    }
    speed(
        "parsed from memory, events dropped",
        parser.lines(),
        parser.bytes(),
        start,
    );
    Ok(())
}
