//! A hypervisor's balloon, looked at from outside: the image goes through its steps (`memdesc-metal/src/tests/balloon.rs`), and after each the resident memory
//! of QEMU's process is read from `/proc`. QEMU is asked over QMP to give the guest less memory and more.
//!
//! Three guests: one for all steps; one that fills free pages with zeros, which QEMU is told and gives; and one that fills them with a pattern that QEMU cannot
//! give: it must leave reported memory alone, and nothing may fall.

use std::fs;
use std::io::Write;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::metal::{Images, QEMU, SUCCESS};
use crate::qemu::{self, Monitor, Removed};

/// The guest's memory.
const GUEST_MIB: u64 = 1024;
/// What `memdesc-metal/src/tests/balloon.rs` uses: at first, all the time, when all is back, and when memory is out.
const MUCH: u64 = 700;
const STAYS: u64 = 32;
const ALL: u64 = 900;
const MORE: u64 = 128;
/// What the guest is to keep.
const LESS: u64 = 256;
/// And what it cannot.
const TOO_LITTLE: u64 = 8;
/// QEMU's own memory grows and shrinks by that much meanwhile (its bound on translated code is this), and free blocks that are too small to be reported stay.
const SLACK: u64 = 32;
/// No step takes that long on a busy host.
const STEP: Duration = Duration::from_secs(60);

/// A guest to look at.
pub(crate) struct Guest {
    pub(crate) name: &'static str,
    cmdline: &'static str,
    /// Only the steps of free page reporting.
    is_short: bool,
    /// Reported memory goes back to the host.
    falls: bool,
}

/// The guests.
pub(crate) const GUESTS: [Guest; 3] = [
    Guest {
        name: "balloon, all steps",
        cmdline: "balloon",
        is_short: false,
        falls: true,
    },
    Guest {
        name: "balloon, free pages are zeroed",
        cmdline: "balloon short init_on_free=1",
        is_short: true,
        falls: true,
    },
    Guest {
        name: "balloon, free pages are poisoned",
        cmdline: "balloon short page_poison=1",
        is_short: true,
        falls: false,
    },
];

/// QEMU, as long as this lives.
struct Machine {
    child: Child,
    stdin: ChildStdin,
    lines: Receiver<String>,
    log: String,
    socket: Removed,
    monitor: Option<Monitor>,
}

impl Drop for Machine {
    fn drop(&mut self) {
        // It may be gone already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Machine {
    fn start(images: &Images, guest: &Guest) -> Result<Machine> {
        let socket =
            std::env::temp_dir().join(format!("memdesc-balloon-{}.qmp", std::process::id()));
        let _ = fs::remove_file(&socket);
        let mut child = Command::new(QEMU)
            // A bound on what QEMU keeps of translated code, so that what its memory does is what the guest's does.
            .args(["-accel", "tcg,tb-size=32", "-display", "none"])
            .args(["-monitor", "none", "-serial", "stdio", "-no-reboot"])
            .args(["-device", "isa-debug-exit,iobase=0xf4,iosize=0x04"])
            .args([
                "-device",
                "virtio-balloon-pci,id=balloon,free-page-reporting=on,deflate-on-oom=on",
            ])
            .arg("-qmp")
            .arg(format!("unix:{},server=on,wait=off", socket.display()))
            .args([
                "-cpu",
                "max",
                "-smp",
                "2",
                "-m",
                &format!("{GUEST_MIB}M"),
                "-append",
            ])
            .args([guest.cmdline, "-kernel"])
            .arg(images.plain())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .context("cannot run QEMU")?;
        let stdin = child.stdin.take().context("no input")?;
        let stdout = child.stdout.take().context("no output")?;
        let lines = qemu::lines(stdout);
        Ok(Machine {
            child,
            stdin,
            lines,
            log: String::new(),
            socket: Removed(socket),
            monitor: None,
        })
    }

    /// Waits until the guest says that it has come to this step; what else it says about it.
    fn step(&mut self, step: &str) -> Result<String> {
        let until = Instant::now() + STEP;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let line = match self.lines.recv_timeout(left) {
                Ok(line) => line,
                Err(RecvTimeoutError::Timeout) => bail!("no {step:?} after {} s", STEP.as_secs()),
                Err(RecvTimeoutError::Disconnected) => bail!("the machine ended before {step:?}"),
            };
            self.log.push_str(&line);
            self.log.push('\n');
            let Some((_, said)) = line.split_once("] balloon: ") else {
                continue;
            };
            ensure!(!said.starts_with("FAILED"), "the guest says: {said}");
            match said.strip_prefix(step) {
                Some("") => return Ok(String::new()),
                Some(facts) if facts.starts_with(": ") => return Ok(facts[2..].to_owned()),
                _ => bail!("the guest is at {said:?}, not {step:?}"),
            }
        }
    }

    /// Lets the guest go on.
    fn go(&mut self) -> Result<()> {
        self.stdin.write_all(b"\n")?;
        Ok(self.stdin.flush()?)
    }

    /// QEMU's resident memory, in MiB: what the kernel says of the process as a whole.
    fn resident(&self) -> Result<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:"));
        let kib = line.and_then(|l| l.split_whitespace().next());
        let kib: u64 = kib.context("no VmRSS")?.parse()?;
        Ok(kib >> 10)
    }

    /// And of the mapping that is the guest's memory.
    fn guest_resident(&self) -> Result<u64> {
        let smaps = fs::read_to_string(format!("/proc/{}/smaps", self.child.id()))?;
        let (mut is_ram, mut found) = (false, None);
        for line in smaps.lines() {
            let mut words = line.split_whitespace();
            match (words.next(), words.next()) {
                // A mapping's own line, by its rights.
                (Some(range), Some("rw-p")) => {
                    let ends = range.split_once('-').context("no range")?;
                    let end = u64::from_str_radix(ends.1, 16)?;
                    let length = end - u64::from_str_radix(ends.0, 16)?;
                    is_ram = length >> 20 >= GUEST_MIB;
                }
                (Some(range), Some(rights)) if rights.len() == 4 && range.contains('-') => {
                    is_ram = false;
                }
                (Some("Rss:"), Some(kib)) if is_ram => {
                    found = Some(kib.parse::<u64>()? >> 10);
                    is_ram = false;
                }
                _ => {}
            }
        }
        found.context("no mapping is the guest's memory")
    }

    /// Has QEMU do something; what it answers.
    fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let monitor = match &mut self.monitor {
            Some(monitor) => monitor,
            None => self.monitor.insert(Monitor::connect(&self.socket.0, STEP)?),
        };
        monitor.ask(command, arguments)
    }

    /// Has the guest be of this size.
    fn balloon(&mut self, mib: u64) -> Result<()> {
        self.execute("balloon", json!({"value": mib << 20}))?;
        Ok(())
    }

    /// What the guest is left with, by the balloon.
    fn actual(&mut self) -> Result<u64> {
        let answer = self.execute("query-balloon", json!({}))?;
        let bytes = answer["actual"].as_u64().context("no actual")?;
        Ok(bytes >> 20)
    }

    /// Waits until the guest is of this size.
    fn wait_for_actual(&mut self, mib: u64) -> Result<()> {
        let until = Instant::now() + STEP;
        loop {
            let actual = self.actual()?;
            if actual == mib {
                return Ok(());
            }
            ensure!(
                Instant::now() < until,
                "the guest is left with {actual} MiB, not {mib} MiB"
            );
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits until its size stays the same for a second: what it is then.
    fn settled_actual(&mut self) -> Result<u64> {
        let until = Instant::now() + STEP;
        let mut last = (self.actual()?, Instant::now());
        while last.1.elapsed() < Duration::from_secs(1) {
            ensure!(Instant::now() < until, "the guest's size does not settle");
            thread::sleep(Duration::from_millis(50));
            let actual = self.actual()?;
            if actual != last.0 {
                last = (actual, Instant::now());
            }
        }
        Ok(last.0)
    }
}

/// What was seen, a line for each step.
struct Table(String);

impl Table {
    /// Notes QEMU's memory; gives that of the whole process.
    fn row(&mut self, machine: &Machine, what: &str, facts: &str) -> Result<u64> {
        let (all, guest) = (machine.resident()?, machine.guest_resident()?);
        self.0
            .push_str(&format!("  {what:<28}{all:>6}{guest:>9}   {facts}\n"));
        Ok(all)
    }
}

/// Boots a guest and goes through its steps: the table of what was seen.
pub(crate) fn run(images: &Images, guest: &Guest, verbose: bool) -> Result<String> {
    let start = Instant::now();
    let mut machine = Machine::start(images, guest)?;
    let mut table = Table(format!(
        "  {:<28}{:>6}{:>9}   MiB resident\n",
        "", "QEMU", "guest"
    ));
    let ended = look(&mut machine, guest, &mut table);
    if let Err(why) = ended {
        // What it says last.
        while let Ok(line) = machine.lines.recv_timeout(Duration::from_millis(200)) {
            machine.log.push_str(&line);
            machine.log.push('\n');
        }
        bail!("{}: {why:#}\n{}{}", guest.name, table.0, machine.log);
    }
    if verbose {
        print!("{}", machine.log);
    }
    let took = start.elapsed().as_secs_f64();
    Ok(format!(
        "{} ({took:.1} s)\n{}",
        guest.name,
        table.0.trim_end()
    ))
}

fn look(machine: &mut Machine, guest: &Guest, table: &mut Table) -> Result<()> {
    let facts = machine.step("ready")?;
    let base = table.row(machine, "start", &facts)?;
    machine.go()?;

    let facts = machine.step("touched")?;
    let touched = table.row(machine, "touched", &facts)?;
    ensure!(touched >= MUCH + STAYS, "{MUCH} MiB were touched");
    machine.go()?;

    machine.step("freed")?;
    let freed = table.row(machine, "freed, reporting off", "")?;
    ensure!(
        freed + SLACK >= touched,
        "free memory is gone that was not reported"
    );
    machine.go()?;

    let facts = machine.step("reported")?;
    let reported = table.row(machine, "reported", &facts)?;
    if guest.falls {
        ensure!(
            reported <= base + SLACK,
            "resident memory is {reported} MiB after free pages were reported, and was {base} MiB at the start"
        );
    } else {
        ensure!(
            reported + SLACK >= freed,
            "poisoned memory is gone: {reported} MiB of {freed} MiB"
        );
    }
    machine.go()?;

    machine.step("touched again")?;
    let again = table.row(machine, "touched again", "all of it zeros before")?;
    ensure!(again >= MUCH + STAYS, "{MUCH} MiB were touched again");
    machine.go()?;

    if !guest.is_short {
        look_at_balloon(machine, base, table)?;
    }
    machine.step("passed")?;
    let until = Instant::now() + STEP;
    let status = loop {
        if let Some(status) = machine.child.try_wait()? {
            break status;
        }
        ensure!(Instant::now() < until, "the machine does not end");
        thread::sleep(Duration::from_millis(10));
    };
    ensure!(status.code() == Some(SUCCESS), "ended with {status}");
    Ok(())
}

fn look_at_balloon(machine: &mut Machine, base: u64, table: &mut Table) -> Result<()> {
    machine.step("freed again")?;
    let freed = table.row(machine, "freed, reporting off", "")?;
    ensure!(freed >= MUCH + STAYS, "free memory is gone already");
    machine.balloon(LESS)?;
    machine.wait_for_actual(LESS)?;
    machine.go()?;
    let facts = machine.step("inflated")?;
    let inflated = table.row(machine, &format!("balloon {LESS} MiB"), &facts)?;
    ensure!(
        inflated <= base + LESS + SLACK,
        "resident memory is {inflated} MiB with {LESS} MiB left to the guest"
    );
    machine.balloon(GUEST_MIB)?;
    machine.wait_for_actual(GUEST_MIB)?;
    machine.go()?;

    let facts = machine.step("deflated")?;
    let deflated = table.row(machine, &format!("balloon {GUEST_MIB} MiB"), &facts)?;
    ensure!(deflated >= ALL + STAYS, "{ALL} MiB were touched");
    machine.go()?;

    machine.step("idle")?;
    machine.balloon(TOO_LITTLE)?;
    let actual = machine.settled_actual()?;
    ensure!(
        actual > TOO_LITTLE && actual < STAYS + 2 * SLACK,
        "the guest is left with {actual} MiB"
    );
    machine.go()?;
    let facts = machine.step("short")?;
    let short = table.row(
        machine,
        &format!("balloon {TOO_LITTLE} MiB: {actual}"),
        &facts,
    )?;
    ensure!(
        short <= base + actual + SLACK,
        "resident memory is {short} MiB with {actual} MiB left to the guest"
    );
    machine.go()?;

    let facts = machine.step("out of memory")?;
    let more = machine.actual()?;
    let touched = table.row(machine, &format!("memory is out: {more}"), &facts)?;
    ensure!(
        more >= actual + MORE - SLACK && touched >= short + MORE - SLACK,
        "{MORE} MiB were touched, and the guest has {more} MiB of the {actual} MiB it was left with"
    );
    machine.go()?;

    machine.step("filled again")?;
    let again = machine.actual()?;
    ensure!(
        again <= actual + SLACK,
        "the guest is left with {again} MiB, and was with {actual} MiB"
    );
    table.row(machine, &format!("filled again: {again}"), "")?;
    machine.go()?;
    machine.balloon(GUEST_MIB)?;
    machine.wait_for_actual(GUEST_MIB)?;
    let facts = machine.step("the ledger balances")?;
    // The machine may be ending already: what it said is all there is of this.
    table
        .0
        .push_str(&format!("  the ledger balances: {facts}\n"));
    Ok(())
}
