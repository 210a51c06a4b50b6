//! The minimal kernel, and the core, for each machine that they know: built, counted, booted by QEMU, and held to what they print.
//!
//! Targets and QEMUs are installed where that may be done; where it may not, the step is skipped, and says what to run.

use std::fs;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::metal::{self, Missing};
use crate::qemu::{self, Ended};

/// A machine that the minimal kernel runs on.
pub(crate) struct Target {
    pub(crate) triple: &'static str,
    /// Its own files in the kernel's `src`, by what their names begin with; `main.rs` is everybody's.
    files: &'static [&'static str],
    qemu: &'static str,
    package: &'static str,
    args: &'static [&'static str],
    /// QEMU's exit codes: all is well; panic.
    ends: (i32, i32),
}

/// All of them.
pub(crate) const TARGETS: [Target; 3] = [
    Target {
        triple: "x86_64-unknown-none",
        files: &["x86_64."],
        qemu: "qemu-system-x86_64",
        package: "qemu-system-x86",
        args: &[
            "-accel",
            "tcg",
            "-cpu",
            "max",
            "-device",
            "isa-debug-exit,iobase=0xf4,iosize=0x04",
        ],
        ends: (33, 35),
    },
    Target {
        triple: "aarch64-unknown-none",
        files: &["aarch64.", "device_tree."],
        qemu: "qemu-system-aarch64",
        package: "qemu-system-arm",
        args: &["-machine", "virt", "-cpu", "cortex-a72", "-semihosting"],
        ends: (0, 1),
    },
    Target {
        triple: "riscv64gc-unknown-none-elf",
        files: &["riscv64.", "device_tree."],
        qemu: "qemu-system-riscv64",
        package: "qemu-system-misc",
        args: &["-machine", "virt", "-bios", "none"],
        ends: (0, 1),
    },
];

/// Memory of a machine, and how that ends.
pub(crate) struct Size {
    pub(crate) memory: &'static str,
    ends: End,
}

enum End {
    /// All is well, and so many KiB were taken over.
    Given(RangeInclusive<u64>),
    /// A panic that says this.
    Panics(&'static str),
}

impl Target {
    /// A usual size, a larger one, and nearly nothing; and what is special on this machine.
    pub(crate) fn sizes(&self) -> Vec<Size> {
        let given = |memory, kib| Size {
            memory,
            ends: End::Given(kib),
        };
        let mut sizes = vec![
            given("64M", 62 << 10..=64 << 10),
            given("2G", 2046 << 10..=2048 << 10),
            given("3M", 1 << 10..=3 << 10),
        ];
        if self.triple.starts_with("x86_64") {
            // Above 4 GiB nothing is mapped, so nothing is taken over there; below there is a hole of 1 GiB.
            sizes.push(given("5G", 3070 << 10..=3072 << 10));
        }
        if self.triple.starts_with("riscv64") {
            // QEMU finds no place for the device tree.
            sizes.push(Size {
                memory: "512K",
                ends: End::Panics("no device tree at "),
            });
        }
        sizes
    }
}

/// The kernel has fewer lines of its own than this: all that is common, and one machine's.
const MAX_LINES: usize = 200;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn kernel() -> PathBuf {
    root().join("examples/minimal-kernel")
}

/// Lines of code: neither empty nor only a comment.
fn lines(path: &Path) -> Result<usize> {
    let text = fs::read_to_string(path)?;
    let asm = path.extension().is_some_and(|e| e == "s");
    let mut in_comment = false;
    let code = text.lines().map(str::trim).filter(|line| {
        let was_in_comment = in_comment;
        if was_in_comment || line.starts_with("/*") {
            in_comment = !line.ends_with("*/");
            return false;
        }
        let is_comment = line.starts_with("//") || asm && line.starts_with('#');
        !line.is_empty() && !is_comment
    });
    Ok(code.count())
}

/// Counts the kernel's own lines for each machine: Rust, assembly and linker scripts.
pub(crate) fn size() -> Result<String> {
    let mut said = Vec::new();
    for target in &TARGETS {
        let mut sum = 0;
        for entry in fs::read_dir(kernel().join("src"))? {
            let path = entry?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if name == "main.rs" || target.files.iter().any(|start| name.starts_with(start)) {
                sum += lines(&path)?;
            }
        }
        let triple = target.triple;
        ensure!(
            sum > 100,
            "{triple}: {sum} lines of code cannot be all that there is"
        );
        ensure!(
            sum < MAX_LINES,
            "{triple}: {sum} lines of code, which is not under {MAX_LINES}"
        );
        said.push(format!("{triple}: {sum}"));
    }
    // What is not counted above has no code.
    for entry in fs::read_dir(kernel())? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let known = [
            "src",
            ".cargo",
            "target",
            "Cargo.toml",
            "Cargo.lock",
            "rust-toolchain.toml",
        ];
        ensure!(known.contains(&&*name), "{name} is not counted");
    }
    Ok(format!("lines of code: {}", said.join(", ")))
}

fn cargo(dir: &Path, target: &Target, args: &[&str]) -> Result<(), Missing> {
    let status = Command::new("cargo")
        .args(args)
        .current_dir(dir)
        .env("CARGO_BUILD_TARGET", target.triple)
        .env("CARGO_TARGET_DIR", root().join("target/minimal"))
        .status();
    match status {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(Missing::Failed(format!(
            "cargo {} ended with {status}",
            args.join(" ")
        ))),
        Err(why) => Err(Missing::Failed(format!("cannot run cargo: {why}"))),
    }
}

/// Checks the core with all of its features, and builds the kernel. Where the kernel is then.
pub(crate) fn build(target: &Target) -> Result<PathBuf, Missing> {
    metal::set_up_target(target.triple)?;
    let core = ["check", "-p", "memdesc", "--features", "checked,lockdep"];
    cargo(&root(), target, &core)?;
    let format = Command::new("cargo")
        .args(["fmt", "--check"])
        .current_dir(kernel())
        .status();
    if !format.is_ok_and(|status| status.success()) {
        return Err(Missing::Failed("cargo fmt --check failed".to_owned()));
    }
    cargo(
        &kernel(),
        target,
        &["clippy", "--locked", "--release", "--", "-D", "warnings"],
    )
    .and_then(|()| cargo(&kernel(), target, &["build", "--locked", "--release"]))?;
    let out = root().join("target/minimal").join(target.triple);
    Ok(out.join("release/minimal-kernel"))
}

/// Boots the kernel and holds it to what it should print.
pub(crate) fn boot(
    target: &Target,
    kernel: &Path,
    size: &Size,
    verbose: bool,
) -> Result<Result<String, Missing>> {
    if let Err(missing) = metal::set_up_qemu(target.qemu, target.package) {
        return Ok(Err(missing));
    }
    let mut qemu = Command::new(target.qemu);
    qemu.args(["-display", "none", "-monitor", "none", "-serial", "stdio"])
        .args(["-no-reboot", "-m", size.memory])
        .args(target.args)
        .arg("-kernel")
        .arg(kernel);
    let mut show = |line: &str| {
        if verbose {
            println!("{line}");
        }
    };
    let Ended {
        code,
        log,
        errors,
        hung,
        ..
    } = qemu::run(qemu, kernel, metal::LIMITS, &mut show)?;
    if let Some(why) = hung {
        bail!("{why}\n{log}{errors}");
    }
    let Some(code) = code else {
        bail!("it did not end by itself\n{log}{errors}");
    };
    let (well, panics) = target.ends;
    let wanted = match size.ends {
        End::Given(_) => well,
        End::Panics(_) => panics,
    };
    ensure!(
        code == wanted,
        "ended with {code}, not {wanted}\n{log}{errors}"
    );
    let line = |text: &str| {
        log.lines()
            .find(|line| line.contains(text))
            .with_context(|| format!("no line with {text:?}\n{log}{errors}"))
    };
    let kib = match &size.ends {
        End::Given(kib) => kib,
        End::Panics(why) => return Ok(Ok(line(why)?.to_owned())),
    };
    line("Box, Vec and BTreeMap: Some(99980001) Some((999, \"page 999\"))")?;
    line(" is bare, ")?;
    line("an inode: (1, \"/\")")?;
    // Twice: when memory was taken over, and when all had come back.
    let sums: Vec<&str> = log
        .lines()
        .filter(|line| line.starts_with("Memory: "))
        .collect();
    ensure!(sums.len() == 2, "two lines about memory are wanted\n{log}");
    let (free, given) = numbers(sums[0]).context("the line about memory has no numbers")?;
    ensure!(
        kib.contains(&given),
        "{given} KiB are not the machine's\n{log}"
    );
    ensure!(
        free < given && free > given / 100 * 94,
        "{free} KiB are free\n{log}"
    );
    Ok(Ok(sums[0].to_owned()))
}

/// `Memory: 1K/2K available`
fn numbers(line: &str) -> Option<(u64, u64)> {
    let (free, rest) = line.strip_prefix("Memory: ")?.split_once("K/")?;
    let (given, _) = rest.split_once('K')?;
    Some((free.parse().ok()?, given.parse().ok()?))
}
