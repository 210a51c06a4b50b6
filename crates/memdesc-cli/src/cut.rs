//! Cuts the beginning of a recording out: a small one with the same snapshots before it.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use memdesc_trace::{Event, Recording, binary, write_recording};

use crate::cli;
use crate::error::Error;
use crate::progress;
use crate::replay::machine;

/// Slow to write, small to keep.
const LEVEL: i32 = 19;

/// Makes the cut. Says what it made.
pub(crate) fn run(args: &cli::Cut) -> Result<String, Error> {
    let bar = progress::bytes(false);
    let read = Recording::open(&args.recording, &mut |p| progress::reading(&bar, p));
    bar.finish_and_clear();
    let mut recording = read?;
    if args.from_events >= recording.events.len() {
        let all = recording.events.len();
        return Err(Error::Usage(format!(
            "--from-events {}: there are {all} events",
            args.from_events
        )));
    }
    recording.events.drain(..args.from_events);
    let until = end_of(&recording.events, args.seconds);
    let limit = args.events.unwrap_or(usize::MAX).min(until);
    recording.events.truncate(limit);
    if recording.events.is_empty() {
        return Err(Error::Usage(
            "nothing is left of the recording: more --events or --seconds".into(),
        ));
    }

    let mut said = String::new();
    if let Some(file) = &args.binary {
        said += &binary(file, &mut recording)?;
    }
    if let Some(folder) = &args.out {
        said += &text(args, folder, &recording)?;
    }
    Ok(said)
}

fn io_error(path: &Path) -> impl FnOnce(io::Error) -> Error + use<> {
    let path = path.to_path_buf();
    move |source| Error::Io { path, source }
}

/// Makes one file of the events.
fn binary(file: &Path, recording: &mut Recording) -> Result<String, Error> {
    let shape = machine::shape(&recording.events, recording.cpus(), None, None, None)?;
    let left_out = machine::leave_out_impossible(&mut recording.events, &shape)?;
    let bytes = binary::write(&recording.events, &recording.caches)?;
    File::create(file)
        .and_then(|mut to| to.write_all(&bytes))
        .map_err(io_error(file))?;
    let mut said = format!(
        "{}: {} events, {} bytes\n",
        file.display(),
        recording.events.len(),
        bytes.len()
    );
    if left_out > 0 {
        said += &format!("left out: {left_out} events of pages that cannot be\n");
    }
    Ok(said)
}

/// Makes a folder: the events as text, and the snapshots before them.
fn text(args: &cli::Cut, folder: &Path, recording: &Recording) -> Result<String, Error> {
    fs::create_dir_all(folder).map_err(io_error(folder))?;
    let file = folder.join("events.txt.zst");
    let size = write_events(&file, recording).map_err(io_error(&file))?;
    let mut said = format!(
        "{}: {} events, {size} bytes\n",
        file.display(),
        recording.events.len()
    );
    // A snapshot of before the first event says nothing of a later moment.
    if args.from_events == 0 {
        for from in snapshots(&args.recording).map_err(io_error(&args.recording))? {
            let (to, size) = copy(&from, folder).map_err(io_error(&from))?;
            said += &format!("{}: {size} bytes\n", to.display());
        }
    }
    Ok(said)
}

/// How many events lie within the first `seconds`.
fn end_of(events: &[Event], seconds: Option<f64>) -> usize {
    let (Some(seconds), Some(first)) = (seconds, events.first()) else {
        return events.len();
    };
    let end = first
        .time_ns
        .saturating_add((seconds.max(0.0) * 1e9) as u64);
    events
        .iter()
        .position(|e| e.time_ns > end)
        .unwrap_or(events.len())
}

fn write_events(path: &Path, recording: &Recording) -> io::Result<u64> {
    let mut out = zstd::Encoder::new(File::create(path)?, LEVEL)?;
    out.include_checksum(true)?;
    let mut out = io::BufWriter::with_capacity(1 << 20, out);
    write_recording(&mut out, recording)?;
    let file = out
        .into_inner()
        .map_err(io::IntoInnerError::into_error)?
        .finish()?;
    Ok(file.metadata()?.len())
}

/// The files beside a recording that tell of the moment before it.
fn snapshots(recording: &Path) -> io::Result<Vec<PathBuf>> {
    let folder = match recording.parent() {
        _ if recording.is_dir() => recording,
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    let mut all = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let of_before = name == "kernel"
            || name
                .trim_end_matches(".zst")
                .trim_end_matches(".gz")
                .ends_with(".before");
        if of_before && path.is_file() {
            all.push(path);
        }
    }
    all.sort();
    Ok(all)
}

/// Copies a file; large ones are compressed if they are not.
fn copy(from: &Path, folder: &Path) -> io::Result<(PathBuf, u64)> {
    let name = from.file_name().unwrap_or_default().to_string_lossy();
    let data = fs::read(from)?;
    let to;
    let data = if name.starts_with("kpage") && name.ends_with(".before") {
        to = folder.join(format!("{name}.zst"));
        zstd::encode_all(&data[..], LEVEL)?
    } else {
        to = folder.join(&*name);
        data
    };
    // Through a writer of our own, so that a read-only source does not make a read-only copy.
    File::create(&to)?.write_all(&data)?;
    Ok((to, data.len() as u64))
}
