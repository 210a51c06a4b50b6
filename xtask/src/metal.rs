//! The image on bare metal: built, booted by QEMU as several machines, each of which tests itself.
//!
//! QEMU and the target are installed where that may be done; where it may not, the step is skipped, and says what to run.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

pub(crate) const QEMU: &str = "qemu-system-x86_64";
const TARGET: &str = "x86_64-unknown-none";
/// What `isa-debug-exit` makes of the image's two ways to end.
pub(crate) const SUCCESS: i32 = 33;
const FAILURE: i32 = 35;
/// No machine takes that long, on a busy host and emulated.
const TIMEOUT: Duration = Duration::from_secs(150);

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
    cmdline: &'static str,
    more: &'static [&'static str],
    /// It runs the image in which every lock is checked.
    lockdep: bool,
    /// It ends as a failure, with all of these in its log; empty: it ends well.
    crashes: &'static [&'static str],
}

impl Machine {
    fn new(cpus: u32, memory: &'static str) -> Machine {
        Machine {
            name: format!("{cpus} CPU{}, {memory}", if cpus == 1 { "" } else { "s" }),
            cpus,
            memory,
            cmdline: "",
            more: &["-cpu", "max"],
            lockdep: false,
            crashes: &[],
        }
    }
}

/// The machines; all of them, or those that show the most in a short time.
pub(crate) fn machines(all: bool) -> Vec<Machine> {
    let mut machines = Vec::new();
    for memory in ["64M", "512M", "4G"] {
        for cpus in [1, 2, 4] {
            machines.push(Machine::new(cpus, memory));
        }
    }
    machines.push(Machine {
        name: "2 CPUs, 64G, fresh".into(),
        cmdline: "memory=fresh words=count",
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
        ..Machine::new(4, "512M")
    });
    if all {
        machines.push(Machine::new(8, "1G"));
    }
    machines.push(Machine {
        name: "a stack overflows".into(),
        cmdline: "crash=stack",
        crashes: &["double fault", "guard page before", "kernel stack of 4711"],
        ..Machine::new(2, "64M")
    });
    machines.push(Machine {
        name: "an object is freed twice".into(),
        cmdline: "crash=double-free",
        crashes: &["freed twice", "kmalloc-128", "crash.rs"],
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

fn set_up_qemu() -> Result<(), Missing> {
    if works(QEMU, &["--version"]) {
        return Ok(());
    }
    let install = [
        "install",
        "-y",
        "--no-install-recommends",
        "qemu-system-x86",
    ];
    let is_root = Command::new("id")
        .arg("-u")
        .output()
        .is_ok_and(|out| out.stdout.trim_ascii() == b"0");
    if is_root && works("apt-get", &["--version"]) {
        println!("apt-get {}", install.join(" "));
        if (works("apt-get", &install)
            || works("apt-get", &["update"]) && works("apt-get", &install))
            && works(QEMU, &["--version"])
        {
            return Ok(());
        }
    }
    Err(Missing::Skip(
        "no QEMU; to have it: apt-get install qemu-system-x86".to_owned(),
    ))
}

fn set_up_target() -> Result<(), Missing> {
    let has = || {
        Command::new("rustc")
            .args(["--print", "target-libdir", "--target", TARGET])
            .output()
            .is_ok_and(|out| {
                let dir = String::from_utf8_lossy(&out.stdout).trim().to_owned();
                Path::new(&dir).is_dir()
            })
    };
    if has() || works("rustup", &["target", "add", TARGET]) && has() {
        return Ok(());
    }
    Err(Missing::Skip(format!(
        "no target; to have it: rustup target add {TARGET}"
    )))
}

/// The image, as it is and with every lock checked.
pub(crate) struct Images {
    plain: PathBuf,
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
    set_up_qemu()?;
    set_up_target()?;
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

/// Boots a machine and waits for its end: the line that sums its tests up, and what is worth saying besides.
pub(crate) fn boot(images: &Images, machine: &Machine, verbose: bool) -> Result<String> {
    let start = Instant::now();
    let mut child = Command::new(QEMU)
        .args([
            "-accel", "tcg", "-display", "none", "-monitor", "none", "-serial", "stdio",
        ])
        .args([
            "-no-reboot",
            "-device",
            "isa-debug-exit,iobase=0xf4,iosize=0x04",
        ])
        .args(["-smp", &machine.cpus.to_string(), "-m", machine.memory])
        .args(machine.more)
        .args(["-append", machine.cmdline, "-kernel"])
        .arg(if machine.lockdep {
            &images.lockdep
        } else {
            &images.plain
        })
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot run QEMU")?;
    let reader = |mut pipe: Box<dyn Read + Send>| {
        thread::spawn(move || {
            let mut bytes = Vec::new();
            // What came before an error is what there is.
            let _ = pipe.read_to_end(&mut bytes);
            String::from_utf8_lossy(&bytes).replace('\r', "")
        })
    };
    let log = reader(Box::new(child.stdout.take().context("no output")?));
    let errors = reader(Box::new(child.stderr.take().context("no output")?));
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break Some(status);
        }
        if start.elapsed() > TIMEOUT {
            child.kill()?;
            child.wait()?;
            break None;
        }
        thread::sleep(Duration::from_millis(20));
    };
    let log = log.join().unwrap_or_default();
    let errors = errors.join().unwrap_or_default();
    let is_wrong =
        |what: &str| -> Result<String> { bail!("{}: {what}\n{log}{errors}", machine.name) };
    let Some(status) = status else {
        return is_wrong(&format!("no end after {} s", TIMEOUT.as_secs()));
    };
    if verbose {
        print!("{log}");
    }
    let wanted = if machine.crashes.is_empty() {
        SUCCESS
    } else {
        FAILURE
    };
    if status.code() != Some(wanted) {
        return is_wrong(&format!("ended with {status}, not {wanted}"));
    }
    if let Some(lacks) = machine.crashes.iter().find(|text| !log.contains(**text)) {
        return is_wrong(&format!("its report does not say {lacks:?}"));
    }
    let said = if machine.crashes.is_empty() {
        "passed, "
    } else {
        machine.crashes[1]
    };
    let line = |text: &str| {
        let line = log.lines().find(|line| line.contains(text))?;
        Some(
            line.split_once("] ")
                .map_or(line, |(_, rest)| rest)
                .trim()
                .to_owned(),
        )
    };
    ensure!(
        line(said).is_some(),
        "{}: no line with {said:?}\n{log}",
        machine.name
    );
    let parts = [
        line("taken over in"),
        line("words written, for"),
        line(said),
    ];
    let parts: Vec<String> = parts.into_iter().flatten().collect();
    let took = start.elapsed().as_secs_f64();
    Ok(format!(
        "{}: {} ({took:.1} s)",
        machine.name,
        parts.join("; ")
    ))
}
