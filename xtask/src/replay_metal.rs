//! A recording, replayed by the image on bare metal and by `memdesc replay` in a process: the same file, and the same numbers.
//!
//! What the events of a recording mean does not depend on the machine, so all that counts calls and what is live by type is compared exactly: every line of the
//! image's report whose name is a path in `memdesc replay --json`. Not compared is [`OWN`]: what a machine has for itself.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::metal::{FAILURE, Images, LIMITS, SUCCESS, qemu_for};
use crate::qemu;

/// The recording that `memdesc replay` replays if it is not told which.
const BUILT_IN: &str = "crates/memdesc-cli/recordings/build";

/// What is a machine's own: the size of its memory, and what depends on that, on how many CPUs keep objects and pages for themselves, and on which of them came
/// first.
const OWN: [&str; 5] = [
    "ledger.ram_bytes",
    "ledger.memmap_bytes",
    "ledger.descriptor_bytes",
    "ledger.percent",
    "ledger.peak_percent",
];
/// Numbers that are compared, at least: of a report that lacks some nothing would be wrong.
const COMPARED: usize = 50;

/// A recording, and what `memdesc replay` says of it.
pub(crate) struct Prepared {
    file: PathBuf,
    hosted: Value,
}

impl Prepared {
    pub(crate) fn summary(&self) -> String {
        let number = |path: &str| {
            self.hosted
                .pointer(path)
                .and_then(Value::as_u64)
                .unwrap_or(0)
        };
        format!(
            "in a process: {} events, {} blocks of pages and {} objects allocated",
            number("/events/total"),
            number("/pages/allocated"),
            number("/slab/allocated"),
        )
    }
}

/// Runs the command `memdesc`: what it printed.
fn memdesc(args: &[&str]) -> Result<Vec<u8>> {
    let mut command = Command::new("cargo");
    command.args(["run", "--quiet", "--release", "-p", "memdesc-cli", "--"]);
    let output = command.args(args).output().context("cannot run cargo")?;
    if !output.status.success() {
        let errors = String::from_utf8_lossy(&output.stderr);
        bail!(
            "memdesc {}: {}: {}",
            args.join(" "),
            output.status,
            errors.trim()
        );
    }
    Ok(output.stdout)
}

/// Makes a module of a recording (the built-in one for `None`), and replays it in a process.
pub(crate) fn prepare(recording: Option<&Path>, events: usize) -> Result<Prepared> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let folder = root.join("target/replay");
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let built_in = root.join(BUILT_IN);
    let from = recording.unwrap_or(&built_in);
    let name = from.file_name().context("a recording without a name")?;
    let file = folder.join(name).with_extension("mdr");
    let text = |path: &Path| -> Result<String> {
        Ok(path.to_str().context("a path that is no text")?.to_owned())
    };
    let (from, to, events) = (text(from)?, text(&file)?, events.to_string());
    memdesc(&["cut", &from, "--binary", &to, "--events", &events])?;
    let json = memdesc(&["replay", "--json", &to])?;
    let hosted = serde_json::from_slice(&json).context("--json printed no JSON")?;
    Ok(Prepared { file, hosted })
}

/// A machine to replay on.
pub(crate) struct Machine {
    cpus: u32,
    memory: String,
    /// Of the command line.
    cmdline: &'static str,
}

impl Machine {
    pub(crate) fn name(&self) -> String {
        let s = if self.cpus == 1 { "" } else { "s" };
        let with = if self.cmdline.is_empty() { "" } else { ", " };
        format!(
            "{} CPU{s}, {}{with}{}",
            self.cpus, self.memory, self.cmdline
        )
    }
}

/// The machines: memory is what the built-in recording needs, or what others may need.
pub(crate) fn machines(built_in: bool, memory: Option<&str>) -> Vec<Machine> {
    let memory = memory.unwrap_or(if built_in { "512M" } else { "8G" });
    let machine = |cpus, cmdline| Machine {
        cpus,
        memory: memory.to_owned(),
        cmdline,
    };
    let mut machines: Vec<Machine> = [1, 2, 4].map(|cpus| machine(cpus, "")).into();
    machines.push(machine(4, "rcu=50"));
    machines
}

/// Boots the image with a module: how it ended, and its log.
fn boot(images: &Images, machine: &Machine, module: &Path) -> Result<(Option<i32>, String)> {
    let mut command = qemu_for(&machine.cpus.to_string(), &machine.memory);
    command
        .args(["-cpu", "max"])
        .args(["-append", machine.cmdline, "-kernel"])
        .arg(&images.plain)
        .arg("-initrd")
        .arg(module);
    let ended = qemu::run(command, &images.plain, LIMITS, &mut |_| ())?;
    let (log, errors) = (ended.log, ended.errors);
    ensure!(
        ended.hung.is_none(),
        "{}\n{log}{errors}",
        ended.hung.unwrap_or_default()
    );
    Ok((ended.code, log))
}

/// A line of a report: a name, and its value.
fn number(line: &str) -> Option<(&str, &str)> {
    let (_, line) = line.split_once("] ")?;
    let mut words = line.strip_prefix("  ")?.split_whitespace();
    let (name, value) = (words.next()?, words.next()?);
    let of_names = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "._".contains(c);
    (name.contains('.') && name.chars().all(of_names)).then_some((name, value))
}

/// Are they the same?
fn same(guest: &str, hosted: &Value) -> bool {
    match hosted {
        Value::Bool(is) => guest == is.to_string(),
        Value::String(text) => guest == text,
        Value::Number(n) => guest.parse::<f64>().ok() == n.as_f64(),
        _ => false,
    }
}

/// Replays on a machine, and compares what it counted with what was counted in a process.
pub(crate) fn compare(
    images: &Images,
    prepared: &Prepared,
    machine: &Machine,
    verbose: bool,
) -> Result<String> {
    let start = Instant::now();
    let (status, log) = boot(images, machine, &prepared.file)?;
    if verbose {
        print!("{log}");
    }
    ensure!(
        status == Some(SUCCESS),
        "ended with {status:?}, not {SUCCESS}\n{log}"
    );
    let numbers: BTreeMap<&str, &str> = log.lines().filter_map(number).collect();
    let (mut compared, mut wrong) = (0, Vec::new());
    for (name, value) in &numbers {
        if OWN.contains(name) {
            continue;
        }
        let hosted = prepared
            .hosted
            .pointer(&format!("/{}", name.replace('.', "/")));
        match hosted {
            Some(hosted) if same(value, hosted) => compared += 1,
            Some(hosted) => wrong.push(format!("{name} is {value}, and {hosted} in a process")),
            None => wrong.push(format!("{name} is not known in a process")),
        }
    }
    ensure!(wrong.is_empty(), "{}\n{log}", wrong.join("\n"));
    ensure!(
        compared >= COMPARED,
        "only {compared} numbers to compare\n{log}"
    );
    let line = |text: &str| {
        let line = log.lines().find(|line| line.contains(text))?;
        Some(line.split_once("] ").map_or(line, |(_, rest)| rest).trim())
    };
    let ms = line("replay ms").and_then(|line| line.split_whitespace().nth(2));
    Ok(format!(
        "{}; in {} ms; metadata {} % of RAM; {compared} numbers as in a process ({:.1} s)",
        line("planned in").unwrap_or("no plan"),
        ms.unwrap_or("?"),
        numbers.get("ledger.percent").unwrap_or(&"?"),
        start.elapsed().as_secs_f64(),
    ))
}

/// A module that is no recording, or none any more.
pub(crate) struct Bad {
    pub(crate) name: &'static str,
    /// Made out of a good one.
    make: fn(Vec<u8>) -> Vec<u8>,
    /// What the image says.
    says: &'static str,
}

/// They end in a failure that says what is wrong.
pub(crate) const BAD: [Bad; 5] = [
    Bad {
        name: "a recording that breaks off",
        make: |mut bytes| {
            bytes.truncate(bytes.len() / 2 + 5);
            bytes
        },
        says: "the recording breaks off at byte",
    },
    Bad {
        name: "a damaged recording",
        make: |mut bytes| {
            let middle = bytes.len() / 2;
            bytes[middle] ^= 0x10;
            bytes
        },
        says: "the recording is damaged: the body",
    },
    Bad {
        name: "a recording of the future",
        make: |mut bytes| {
            bytes[8] = 9;
            bytes
        },
        says: "a recording in binary of version 9",
    },
    Bad {
        name: "no recording",
        make: |_| b"Dear Sir or Madam,\n\nplease find enclosed\n".to_vec(),
        says: "not a recording: line 1: expected",
    },
    Bad {
        name: "a compressed recording",
        make: |_| b"\x28\xb5\x2f\xfd and so on".to_vec(),
        says: "compressed; decompress it",
    },
];

/// The image refuses such a module.
pub(crate) fn refuses(
    images: &Images,
    prepared: &Prepared,
    bad: &Bad,
    verbose: bool,
) -> Result<String> {
    let good = fs::read(&prepared.file)?;
    let file = prepared.file.with_extension("bad");
    fs::write(&file, (bad.make)(good))?;
    let machine = Machine {
        cpus: 2,
        memory: "256M".to_owned(),
        cmdline: "",
    };
    let (status, log) = boot(images, &machine, &file)?;
    fs::remove_file(&file)?;
    if verbose {
        print!("{log}");
    }
    ensure!(
        status == Some(FAILURE),
        "ended with {status:?}, not {FAILURE}\n{log}"
    );
    let line = log.lines().find(|line| line.contains(bad.says));
    let line = line.with_context(|| format!("the log does not say {:?}\n{log}", bad.says))?;
    Ok(line
        .split_once("] ")
        .map_or(line, |(_, rest)| rest)
        .to_owned())
}
