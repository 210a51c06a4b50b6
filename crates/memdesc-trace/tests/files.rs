//! Recordings as files: compression, damage, folders, and what is no recording.

use std::io::Write;
use std::path::PathBuf;

use memdesc_trace::{Event, Reader, Recording, TraceError, parse_bytes};

const LINE: &str = "[001]   799.178411:                kmem:kfree: call_site=sched_setaffinity+0x160 ptr=0xffff8881047086e0\n";

struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Folder {
        let path =
            std::env::temp_dir().join(format!("memdesc-trace-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Folder(path)
    }

    fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.0.join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn open(path: &PathBuf) -> Result<Recording, TraceError> {
    Recording::open(path, &mut |_| ())
}

/// Lines that do not compress to nothing, more than one block of them.
fn text() -> Vec<u8> {
    let mut x = 1u64;
    let mut text = Vec::new();
    for i in 0..30_000u64 {
        x = x
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        writeln!(
            text,
            "[000] {i:5}.{:06}: kmem:kfree: call_site=a ptr={x:#x}",
            x % 1_000_000
        )
        .unwrap();
    }
    text
}

fn zst(bytes: &[u8], window_log: u32) -> Vec<u8> {
    let mut encoder = zstd::Encoder::new(Vec::new(), 3).unwrap();
    encoder.long_distance_matching(true).unwrap();
    encoder.window_log(window_log).unwrap();
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn gz(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

#[test]
fn plain_zst_and_gz_are_the_same() {
    let folder = Folder::new("same");
    let text = text();
    let events = parse_bytes(&text).events;
    assert_eq!(events.len(), 30_000);
    // The name does not matter, the first bytes do.
    for (name, bytes) in [
        ("plain", text.clone()),
        ("a", zst(&text, 27)),
        ("b", gz(&text)),
    ] {
        let path = folder.file(name, &bytes);
        let mut progress = Vec::new();
        let recording = Recording::open(&path, &mut |p| progress.push(p)).unwrap();
        assert_eq!(recording.events, events, "{name}");
        assert_eq!((recording.truncated, recording.lines), (None, 30_000));
        let last = progress.last().unwrap();
        assert_eq!((last.events, last.lines), (30_000, 30_000));
        assert_eq!(
            (last.bytes_read, last.bytes_total),
            (bytes.len() as u64, Some(bytes.len() as u64))
        );
        let mut reader = Reader::open(&path).unwrap();
        let (mut batch, mut streamed) = (Vec::new(), Vec::<Event>::new());
        while reader.next_batch(&mut batch).unwrap() {
            streamed.extend(&batch);
        }
        assert_eq!(streamed, events, "{name}");
    }
}

#[test]
fn truncated_files_keep_what_was_good() {
    let folder = Folder::new("truncated");
    let text = text();
    let events = parse_bytes(&text).events;
    for (name, whole) in [("a.zst", zst(&text, 27)), ("b.gz", gz(&text))] {
        let path = folder.file(name, &whole[..whole.len() * 3 / 4]);
        let recording = open(&path).unwrap();
        let broken = recording.truncated.unwrap();
        let n = recording.events.len();
        assert!(n > 10_000 && n < 30_000, "{name}: {n}");
        assert_eq!(recording.events, events[..n], "{name}");
        assert_eq!(recording.skipped.broken_lines, 0, "{name}");
        assert_eq!(broken.line, n as u64 + 1, "{name}");
        assert_eq!(broken.offset, recording.bytes, "{name}");
        assert!(!broken.reason.is_empty());
    }
    // Damage in the middle.
    let mut damaged = gz(&text);
    let middle = damaged.len() / 2;
    damaged[middle..middle + 64].fill(0x55);
    let recording = open(&folder.file("c.gz", &damaged)).unwrap();
    assert!(recording.truncated.is_some());
    // Nothing good at all.
    let whole = zst(&text, 27);
    let error = open(&folder.file("d.zst", &whole[..6])).unwrap_err();
    assert!(matches!(error, TraceError::Compressed { .. }), "{error}");
}

#[test]
fn folders_and_snapshots() {
    let folder = Folder::new("folder");
    let error = open(&folder.0).unwrap_err();
    assert!(matches!(error, TraceError::NoEventsFile { .. }), "{error}");
    let file = folder.file("events.txt", LINE.repeat(3).as_bytes());
    folder.file(
        "buddyinfo.before",
        b"Node 0, zone Normal 1 2 3 4 5 6 7 8 9 10 11\n",
    );
    for path in [&folder.0, &file] {
        let recording = open(path).unwrap();
        assert_eq!(recording.events.len(), 3);
        assert_eq!(recording.before.unwrap().free_by_order().unwrap()[10], 11);
        assert_eq!(recording.after, None);
    }
    let error = open(&folder.0.join("missing")).unwrap_err();
    assert!(matches!(error, TraceError::Io { .. }), "{error}");
}

#[test]
fn what_is_no_recording() {
    let folder = Folder::new("none");
    let error = |bytes: &[u8]| open(&folder.file("x", bytes)).unwrap_err();
    assert!(matches!(error(b""), TraceError::Empty { lines: 0, .. }));
    assert!(matches!(
        error(b"# tracer: nop\n\n"),
        TraceError::Empty { lines: 2, .. }
    ));
    assert!(matches!(
        error(b"PERFILE2\0\0\0"),
        TraceError::WrongFormat { .. }
    ));
    assert!(matches!(
        error(b"[000] 1.0: sched:x: y\n"),
        TraceError::NoKmemEvents { other: 1, .. }
    ));
    let e = error(b"\nDear reader,\n");
    assert!(matches!(e, TraceError::NotARecording { line: 2, .. }));
    assert!(
        e.to_string().contains("Dear reader,") && e.to_string().contains("perf script"),
        "{e}"
    );
    // Long before the end of a large file.
    let e = error(&b"nothing here\n".repeat(500_000));
    assert!(matches!(e, TraceError::NotARecording { line: 1, .. }));
    // Binary without a line end.
    assert!(matches!(
        error(&vec![0xa5; 5 << 20]),
        TraceError::NotARecording { line: 1, .. }
    ));
}

#[test]
fn broken_lines_are_counted_and_shown() {
    let mut text = LINE
        .replace("kfree: call_site", "kfree: cal")
        .replace("ptr=", "p=")
        .repeat(20);
    text.push_str(LINE);
    let recording = parse_bytes(text.as_bytes());
    assert_eq!(
        (recording.events.len(), recording.skipped.broken_lines),
        (1, 20)
    );
    assert_eq!(recording.skipped.samples.len(), memdesc_trace::SAMPLES);
    let sample = &recording.skipped.samples[1];
    assert_eq!((sample.line, sample.expected), (2, "a field ptr="));
    assert!(
        sample
            .to_string()
            .starts_with("line 2: expected a field ptr=, found \"[001]")
    );
}

#[test]
fn cutting() {
    let mut text = String::new();
    for i in 0..10 {
        text.push_str(&LINE.replace("799.178411", &format!("{}.0", 9 - i)));
    }
    let mut recording = parse_bytes(text.as_bytes());
    assert_eq!(recording.out_of_order, 9);
    assert_eq!(recording.time_span(), Some(0..9_000_000_000));
    assert_eq!(recording.cpus(), 2);
    recording.sort_by_time();
    recording.cut(2_000_000_000..8_000_000_000, 4);
    let times: Vec<_> = recording
        .events
        .iter()
        .map(|e| e.time_ns / 1_000_000_000)
        .collect();
    assert_eq!(times, [2, 3, 4, 5]);
}
