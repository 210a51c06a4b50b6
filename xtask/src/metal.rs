//! The image on bare metal: built, booted by QEMU as several machines, each of which tests itself.
//!
//! QEMU and the target are installed where that may be done; where it may not, the step is skipped, and says what to run.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Result, bail, ensure};

use crate::qemu::{self, Limits};

pub(crate) const QEMU: &str = "qemu-system-x86_64";
const TARGET: &str = "x86_64-unknown-none";
/// What `isa-debug-exit` makes of the image's two ways to end.
pub(crate) const SUCCESS: i32 = 33;
pub(crate) const FAILURE: i32 = 35;
/// No machine takes that long, on a busy host and emulated, nor is silent for so long.
pub(crate) const LIMITS: Limits = Limits {
    total: Duration::from_secs(400),
    silence: Duration::from_secs(120),
};

/// Why nothing could be booted.
pub(crate) enum Missing {
    /// It could not be installed: what to run.
    Skip(String),
    /// Something else.
    Failed(String),
}

/// A machine to boot.
pub(crate) struct Machine {
    pub(crate) name: String,
    cpus: u32,
    memory: &'static str,
    cmdline: String,
    more: &'static [&'static str],
    /// It runs the image in which every lock is checked.
    lockdep: bool,
    /// It ends as a failure, with all of these in its log; empty: it ends well.
    crashes: &'static [&'static str],
    /// It does not end, and `crashes` is what is found out about it.
    hangs: bool,
    /// All of the core's own tests pass on it, and none is skipped.
    suite: bool,
    /// Its firmware lists each CPU three times.
    listed_again: bool,
    /// What is in the line that sums it up.
    says: &'static str,
    limits: Limits,
}

impl Machine {
    fn new(cpus: u32, memory: &'static str) -> Machine {
        Machine {
            name: format!("{cpus} CPU{}, {memory}", if cpus == 1 { "" } else { "s" }),
            cpus,
            memory,
            cmdline: "suite=none".into(),
            more: &["-cpu", "max"],
            lockdep: false,
            crashes: &[],
            hangs: false,
            suite: false,
            listed_again: false,
            says: "passed, ",
            limits: LIMITS,
        }
    }

    /// The core's own tests run on it too: each flush and each barrier waits for all CPUs, so on a host with fewer of them this takes long.
    fn with_suite(self) -> Machine {
        Machine {
            cmdline: String::new(),
            suite: true,
            limits: Limits {
                total: 4 * LIMITS.total,
                ..LIMITS
            },
            ..self
        }
    }

    /// This machine soaks for so long, with these dice or any.
    fn soaks(self, how_long: Duration, seed: Option<u64>) -> Machine {
        let seconds = how_long.as_secs().max(1);
        let seed = seed.map(|seed| format!(" seed={seed}"));
        Machine {
            name: format!("{}: a soak of {seconds} s", self.name),
            cmdline: format!("soak={seconds}{}", seed.unwrap_or_default()),
            says: "the ledger balances",
            limits: Limits {
                // Its clock may be slow, where it was measured on a busy host.
                total: LIMITS.total + 3 * how_long,
                ..LIMITS
            },
            ..self
        }
    }
}

/// The machines for a soak: one as it is, and one in which every lock is checked.
pub(crate) fn soaks(how_long: Duration, seed: Option<u64>) -> [Machine; 2] {
    [false, true].map(|lockdep| {
        let mut machine = Machine::new(4, "512M");
        if lockdep {
            machine.name += ", every lock checked";
        }
        machine.lockdep = lockdep;
        machine.soaks(how_long, seed)
    })
}

/// How long a soak is that is one check of many.
const SHORT_SOAK: Duration = Duration::from_secs(25);

/// The machines; all of them, or those that show the most in a short time.
pub(crate) fn machines(all: bool) -> Vec<Machine> {
    let mut machines = Vec::new();
    for memory in ["64M", "512M", "4G"] {
        for cpus in [1, 2, 4] {
            machines.push(match (cpus, memory) {
                // The core's own tests too, on all CPUs at once.
                (_, "512M") => Machine::new(cpus, memory).with_suite(),
                _ => Machine::new(cpus, memory),
            });
        }
    }
    machines.push(Machine {
        name: "2 CPUs, 64G, fresh".into(),
        cmdline: "memory=fresh words=count suite=none".into(),
        // The host need not have so much: the pages that are not touched are nowhere.
        more: &[
            "-cpu",
            "max",
            "-object",
            "memory-backend-ram,id=ram,size=64G,reserve=off",
            "-machine",
            "memory-backend=ram",
        ],
        ..Machine::new(2, "64G")
    });
    machines.push(Machine {
        name: "4 CPUs, 2G in 2 nodes".into(),
        more: &[
            "-cpu",
            "max",
            "-object",
            "memory-backend-ram,id=ram0,size=1G",
            "-object",
            "memory-backend-ram,id=ram1,size=1G",
            "-numa",
            "node,nodeid=0,cpus=0-1,memdev=ram0",
            "-numa",
            "node,nodeid=1,cpus=2-3,memdev=ram1",
        ],
        ..Machine::new(4, "2G")
    });
    machines.push(Machine {
        name: "2 CPUs, 512M, an old CPU".into(),
        more: &["-cpu", "qemu64"],
        ..Machine::new(2, "512M")
    });
    machines.push(Machine {
        name: "4 CPUs, 512M, every lock checked".into(),
        lockdep: true,
        ..Machine::new(4, "512M").with_suite()
    });
    machines.push(Machine {
        name: "2 CPUs, 64M, locks sleep".into(),
        cmdline: "rt".into(),
        ..Machine::new(2, "64M")
    });
    machines.push(Machine {
        name: "2 CPUs, 64M, each listed again and again".into(),
        cmdline: "suite=none tests=cpu".into(),
        listed_again: true,
        ..Machine::new(2, "64M")
    });
    if all {
        machines.push(Machine::new(8, "1G"));
        machines.push(Machine::new(8, "64M"));
        machines.push(Machine {
            name: "4 CPUs, 64M, locks sleep, every lock checked".into(),
            cmdline: "rt".into(),
            lockdep: true,
            ..Machine::new(4, "64M")
        });
        machines.extend(soaks(SHORT_SOAK, None));
    } else {
        machines.push(Machine::new(4, "512M").soaks(SHORT_SOAK, None));
    }
    machines.push(Machine {
        name: "a CPU hangs".into(),
        cmdline: "crash=hang".into(),
        // The others' stacks too.
        crashes: &["CPU 1: at 0x", "in hang (", "run_job", "CPU 0: called from"],
        hangs: true,
        says: "in hang (",
        limits: Limits {
            silence: Duration::from_secs(5),
            ..LIMITS
        },
        ..Machine::new(2, "64M")
    });
    machines.push(Machine {
        name: "a stack overflows".into(),
        cmdline: "crash=stack".into(),
        crashes: &["double fault", "guard page before", "kernel stack of 4711"],
        says: "guard page before",
        ..Machine::new(2, "64M")
    });
    machines.push(Machine {
        name: "a thread's stack overflows".into(),
        cmdline: "crash=thread".into(),
        crashes: &[
            "double fault",
            "(deep) ran over the end of its own stack",
            "guard page before",
        ],
        says: "(deep) ran over the end of its own stack",
        ..Machine::new(2, "64M")
    });
    machines.push(Machine {
        name: "an object is freed twice".into(),
        cmdline: "crash=double-free".into(),
        crashes: &["freed twice", "kmalloc-128", "crash.rs"],
        says: "kmalloc-128",
        ..Machine::new(2, "64M")
    });
    machines
}

fn works(program: &str, args: &[&str]) -> bool {
    let mut command = Command::new(program);
    command
        .args(args)
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}

/// Sees to it that there is this QEMU, of this package.
pub(crate) fn set_up_qemu(qemu: &str, package: &str) -> Result<(), Missing> {
    if works(qemu, &["--version"]) {
        return Ok(());
    }
    let install = ["install", "-y", "--no-install-recommends", package];
    let is_root = Command::new("id")
        .arg("-u")
        .output()
        .is_ok_and(|out| out.stdout.trim_ascii() == b"0");
    if is_root && works("apt-get", &["--version"]) {
        println!("apt-get {}", install.join(" "));
        if (works("apt-get", &install)
            || works("apt-get", &["update"]) && works("apt-get", &install))
            && works(qemu, &["--version"])
        {
            return Ok(());
        }
    }
    Err(Missing::Skip(format!(
        "no {qemu}; to have it: apt-get install {package}"
    )))
}

/// Sees to it that there is this target.
pub(crate) fn set_up_target(target: &str) -> Result<(), Missing> {
    let has = || {
        Command::new("rustc")
            .args(["--print", "target-libdir", "--target", target])
            .output()
            .is_ok_and(|out| {
                let dir = String::from_utf8_lossy(&out.stdout).trim().to_owned();
                Path::new(&dir).is_dir()
            })
    };
    if has() || works("rustup", &["target", "add", target]) && has() {
        return Ok(());
    }
    Err(Missing::Skip(format!(
        "no target; to have it: rustup target add {target}"
    )))
}

/// The image, as it is and with every lock checked.
pub(crate) struct Images {
    pub(crate) plain: PathBuf,
    lockdep: PathBuf,
}

impl Images {
    /// The image as it is.
    pub(crate) fn plain(&self) -> &Path {
        &self.plain
    }
}

/// Builds the images.
pub(crate) fn build() -> Result<Images, Missing> {
    set_up_qemu(QEMU, "qemu-system-x86")?;
    set_up_target(TARGET)?;
    cargo("metal", &["fmt", "--check"])?;
    cargo("metal", &["clippy", "--release", "--", "-D", "warnings"])?;
    Ok(Images {
        plain: cargo("metal", &["build", "--release"])?,
        lockdep: cargo(
            "metal-lockdep",
            &["build", "--release", "--features", "lockdep"],
        )?,
    })
}

/// Runs cargo in the image's folder, which says what it is built with; where to is said here, whatever the environment says. Where the image is then.
fn cargo(target: &str, args: &[&str]) -> Result<PathBuf, Missing> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let out = root.join("target").join(target);
    let status = Command::new("cargo")
        .args(args)
        .current_dir(root.join("crates/memdesc-metal"))
        .env("CARGO_TARGET_DIR", &out)
        .status();
    match status {
        Ok(status) if status.success() => Ok(out.join(TARGET).join("release/memdesc-metal")),
        Ok(status) => {
            let what = args.join(" ");
            Err(Missing::Failed(format!("cargo {what} ended with {status}")))
        }
        Err(why) => Err(Missing::Failed(format!("cannot run cargo: {why}"))),
    }
}

/// The body of one more MADT (ACPI 6.5, 5.2.12): each CPU as one with a number of 8 bits, and as one with 32.
fn madt(cpus: u32) -> Vec<u8> {
    const LOCAL_APIC: u32 = 0xfee0_0000;
    let mut table = [LOCAL_APIC.to_le_bytes(), 1u32.to_le_bytes()].concat();
    for cpu in 0..cpus {
        table.extend([0, 8, cpu as u8, cpu as u8, 1, 0, 0, 0]);
        table.extend([9, 16, 0, 0]);
        table.extend([cpu, 1, cpu].map(u32::to_le_bytes).concat());
    }
    table
}

/// What is wrong with the core's own tests in a log, if anything is: all that it says there are have passed.
fn wrong_with_suite(log: &str) -> Option<String> {
    let of = |line: &str, start: &str| line.split_once(start)?.1.parse::<usize>().ok();
    let Some(planned) = log.lines().find_map(|line| of(line, "] 1..")) else {
        return Some("the core's own tests did not run".into());
    };
    let all = format!("# the core's tests: {planned} ok, 0 skipped");
    (planned == 0 || !log.contains(&all)).then(|| format!("no line {all:?}"))
}

/// QEMU with so many CPUs and so much memory, the first serial port on standard input and output, and a way for the image to end it.
pub(crate) fn qemu_for(cpus: &str, memory: &str) -> Command {
    let mut command = Command::new(QEMU);
    command
        .args([
            "-accel", "tcg", "-display", "none", "-monitor", "none", "-serial", "stdio",
        ])
        .args([
            "-no-reboot",
            "-device",
            "isa-debug-exit,iobase=0xf4,iosize=0x04",
        ])
        .args(["-smp", cpus, "-m", memory]);
    command
}

/// Boots a machine and waits for its end: the line that sums it up, and what is worth saying besides. `on_line` sees each of its lines as it comes.
pub(crate) fn boot(
    images: &Images,
    machine: &Machine,
    mut on_line: impl FnMut(&str),
) -> Result<String> {
    let image = if machine.lockdep {
        &images.lockdep
    } else {
        &images.plain
    };
    let mut command = qemu_for(&machine.cpus.to_string(), machine.memory);
    command
        .args(machine.more)
        .args(["-append", &machine.cmdline, "-kernel"])
        .arg(image);
    let table = std::env::temp_dir().join(format!("memdesc-{}.madt", std::process::id()));
    let table = qemu::Removed(table);
    if machine.listed_again {
        std::fs::write(&table.0, madt(machine.cpus))?;
        command.arg("-acpitable");
        command.arg(format!("sig=APIC,data={}", table.0.display()));
    }
    let ended = qemu::run(command, image, machine.limits, &mut on_line)?;
    let (log, errors) = (&ended.log, &ended.errors);
    let is_wrong =
        |what: &str| -> Result<String> { bail!("{}: {what}\n{log}{errors}", machine.name) };
    let places = match (&ended.hung, machine.hangs) {
        (Some(places), true) => places,
        (None, true) => return is_wrong("it did not hang"),
        (Some(places), false) => return is_wrong(places),
        (None, false) => "",
    };
    let wanted = if machine.crashes.is_empty() {
        SUCCESS
    } else {
        FAILURE
    };
    if !machine.hangs && ended.code != Some(wanted) {
        let code = ended.code.unwrap_or(-1);
        return is_wrong(&format!("ended with {code}, not {wanted}"));
    }
    let said = |text: &str| log.contains(text) || places.contains(text);
    if let Some(lacks) = machine.crashes.iter().find(|text| !said(text)) {
        return is_wrong(&format!("its report does not say {lacks:?}\n{places}"));
    }
    if let Some(what) = wrong_with_suite(log).filter(|_| machine.suite) {
        return is_wrong(&what);
    }
    let line = |text: &str| {
        let mut lines = log.lines().chain(places.lines());
        let line = lines.find(|line| line.contains(text))?;
        Some(
            line.split_once("] ")
                .map_or(line, |(_, rest)| rest)
                .trim()
                .to_owned(),
        )
    };
    ensure!(
        line(machine.says).is_some(),
        "{}: no line with {:?}\n{log}",
        machine.name,
        machine.says
    );
    let parts = [
        line("taken over in"),
        line("words written, for"),
        line(machine.says),
    ];
    let parts: Vec<String> = parts.into_iter().flatten().collect();
    let took = ended.took.as_secs_f64();
    Ok(format!(
        "{}: {} ({took:.1} s)",
        machine.name,
        parts.join("; ")
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_suite_that_did_not_run_is_no_success() {
        let log = |planned: &str, end: &str| format!("[ 1.0] {planned}\n[ 2.0] {end}\n");
        let all = log("1..54", "# the core's tests: 54 ok, 0 skipped");
        assert_eq!(wrong_with_suite(&all), None);
        for wrong in [
            String::new(),
            log("1..54", "# the core's tests: 53 ok, 1 skipped"),
            log("1..54", "# the core's tests: 4 ok, 0 skipped"),
            log("1..54", ""),
            log("1..0", "# the core's tests: 0 ok, 0 skipped"),
        ] {
            assert!(wrong_with_suite(&wrong).is_some(), "{wrong}");
        }
    }
}
