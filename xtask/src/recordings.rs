//! Replays recordings through the command, as a user would, and holds what it prints to the numbers of the design.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

/// Metadata on the recordings' mixes may take so much of RAM.
const MAX_PERCENT: f64 = 0.30;

/// Every recording in a folder: a folder with events in it.
pub(crate) fn in_folder(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = folder
        .read_dir()
        .with_context(|| format!("cannot read {}", folder.display()))?;
    let mut found = Vec::new();
    for entry in entries {
        let path = entry?.path();
        let has_events = ["events.txt", "events.txt.zst", "events.txt.gz"]
            .iter()
            .any(|f| path.join(f).exists());
        if has_events {
            found.push(path);
        }
    }
    ensure!(!found.is_empty(), "no recording in {}", folder.display());
    found.sort();
    Ok(found)
}

/// Replays one recording (the built-in one for `None`) and checks what came out; a line of summary.
pub(crate) fn check(recording: Option<&Path>) -> Result<String> {
    let mut command = Command::new("cargo");
    command.args([
        "run",
        "--quiet",
        "--release",
        "-p",
        "memdesc-cli",
        "--",
        "replay",
        "--json",
    ]);
    command.args(recording);
    let output = command.output().context("cannot run cargo")?;
    if !output.status.success() {
        bail!(
            "{}: {}",
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    let json: Value = serde_json::from_slice(&output.stdout).context("--json printed no JSON")?;
    let number = |path: &str| -> Result<f64> {
        let pointer = format!("/{}", path.replace('.', "/"));
        json.pointer(&pointer)
            .and_then(Value::as_f64)
            .with_context(|| format!("no number {path}"))
    };
    for zero in ["pages.failed", "slab.failed", "purity.allocations_on_free"] {
        ensure!(number(zero)? == 0.0, "{zero} is {}", number(zero)?);
    }
    ensure!(
        json.pointer("/ledger/balanced") == Some(&Value::Bool(true)),
        "the ledger does not balance"
    );
    // A short cut of a small machine has its fixed costs on few pages; the share of a whole one is what counts.
    let percent = number("ledger.percent")?;
    ensure!(
        percent <= MAX_PERCENT,
        "metadata takes {percent:.3} % of RAM"
    );
    Ok(format!(
        "{:.0} events at {:.2} M/s; {} pages and {} objects allocated, none failed; metadata {percent:.3} % of RAM, struct page {:.2} %",
        number("events.total")?,
        number("events.per_second")? / 1e6,
        number("pages.allocated")?,
        number("slab.allocated")?,
        number("ledger.struct_page_percent")?,
    ))
}
