//! One machine in QEMU, from its start to its end: its lines as they come, and, when it hangs, where each of its CPUs is.
//!
//! A machine that says nothing for a while hangs. Then its monitor (QMP) is asked for all CPUs' registers; and, since those say little of what called what, a byte is sent to its serial port
//! and an NMI to all CPUs: the image's handler finds the byte and says how it came to be where it is. Addresses are looked up in the image.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use addr2line::Loader;
use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

/// How long a machine may take.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// In all.
    pub(crate) total: Duration,
    /// Without a word.
    pub(crate) silence: Duration,
}

/// How a machine ended.
pub(crate) struct Ended {
    /// QEMU's exit code, if it ended by itself.
    pub(crate) code: Option<i32>,
    /// What it said, and QEMU.
    pub(crate) log: String,
    pub(crate) errors: String,
    /// It did not end: why it was ended, and where its CPUs were.
    pub(crate) hung: Option<String>,
    pub(crate) took: Duration,
}

/// How long the CPUs have to say where they are.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// Runs the machine that this command starts, whose first serial port is standard input and output. `on_line` sees each line as it comes.
pub(crate) fn run(
    mut command: Command,
    image: &Path,
    limits: Limits,
    on_line: &mut dyn FnMut(&str),
) -> Result<Ended> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let start = Instant::now();
    let nth = NEXT.fetch_add(1, Ordering::Relaxed);
    let socket = std::env::temp_dir().join(format!("memdesc-{}-{nth}.qmp", std::process::id()));
    let _socket = Removed(socket.clone());
    let mut child = command
        .arg("-qmp")
        .arg(format!("unix:{},server=on,wait=off", socket.display()))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot run QEMU")?;
    let lines = lines(child.stdout.take().context("no output")?);
    let mut errors = child.stderr.take().context("no output")?;
    let errors = thread::spawn(move || {
        let mut bytes = Vec::new();
        // What came before an error is what there is.
        let _ = errors.read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    });
    let mut log = String::new();
    let mut heard = Instant::now();
    let hung = loop {
        match lines.recv_timeout(Duration::from_millis(100)) {
            Ok(line) => {
                heard = Instant::now();
                on_line(&line);
                log.push_str(&line);
                log.push('\n');
            }
            // Its end of the pipe is closed: it ends.
            Err(RecvTimeoutError::Disconnected) => break None,
            Err(RecvTimeoutError::Timeout) => {}
        }
        let why = if start.elapsed() > limits.total {
            format!("no end after {} s", limits.total.as_secs())
        } else if heard.elapsed() > limits.silence {
            format!("not a word for {} s", limits.silence.as_secs())
        } else {
            continue;
        };
        let places = match whereabouts(&mut child, &socket, &lines, image) {
            Ok(places) => places,
            Err(why) => format!("where its CPUs are cannot be found out: {why:#}"),
        };
        break Some(format!("{why}\n{places}"));
    };
    if hung.is_some() {
        child.kill()?;
    }
    let status = child.wait()?;
    Ok(Ended {
        code: status.code(),
        log,
        errors: errors.join().unwrap_or_default(),
        hung,
        took: start.elapsed(),
    })
}

/// A file that goes with this.
pub(crate) struct Removed(pub(crate) PathBuf);

impl Drop for Removed {
    fn drop(&mut self) {
        // QEMU has removed it, if it ended by itself.
        let _ = std::fs::remove_file(&self.0);
    }
}

/// The lines that come out of a pipe, each as it comes.
pub(crate) fn lines(pipe: impl Read + Send + 'static) -> Receiver<String> {
    let (send, receive) = mpsc::channel();
    thread::spawn(move || {
        let mut pipe = BufReader::new(pipe);
        let mut bytes = Vec::new();
        while pipe.read_until(b'\n', &mut bytes).is_ok_and(|n| n > 0) {
            let line = String::from_utf8_lossy(bytes.trim_ascii_end()).into_owned();
            if send.send(line).is_err() {
                break;
            }
            bytes.clear();
        }
    });
    receive
}

/// Where all CPUs are, a line for each place.
fn whereabouts(
    child: &mut Child,
    socket: &Path,
    lines: &Receiver<String>,
    image: &Path,
) -> Result<String> {
    let symbols = Symbols::of(image);
    let mut monitor = Monitor::connect(socket, LAST_WORDS * 2)?;
    let registers = json!({ "command-line": "info registers -a" });
    let registers = monitor.ask("human-monitor-command", registers)?;
    let mut places = String::new();
    let mut cpu = "CPU#0";
    for word in registers.as_str().unwrap_or_default().split_whitespace() {
        if word.starts_with("CPU#") {
            cpu = word;
        }
        if let Some(rip) = word.strip_prefix("RIP=") {
            let address = u64::from_str_radix(rip, 16).unwrap_or(0);
            places += &format!("{cpu} at {address:#018x} {}\n", symbols.name(address));
        }
    }
    // The byte first, so that the handler finds it.
    let port = child.stdin.as_mut().context("no way to its serial port")?;
    port.write_all(b"?")?;
    port.flush()?;
    thread::sleep(Duration::from_millis(100));
    monitor.ask("inject-nmi", json!({}))?;
    let until = Instant::now() + LAST_WORDS;
    while let Ok(line) = lines.recv_timeout(until.saturating_duration_since(Instant::now())) {
        places += &symbols.named(&line);
        places.push('\n');
    }
    Ok(places)
}

/// Talks to QEMU (QEMU Machine Protocol).
pub(crate) struct Monitor {
    to: UnixStream,
    from: BufReader<UnixStream>,
}

impl Monitor {
    /// An answer is waited for so long.
    pub(crate) fn connect(socket: &Path, patience: Duration) -> Result<Monitor> {
        let to = UnixStream::connect(socket).context("QEMU's monitor")?;
        to.set_read_timeout(Some(patience))?;
        let from = BufReader::new(to.try_clone()?);
        let mut monitor = Monitor { to, from };
        monitor.line()?;
        monitor.ask("qmp_capabilities", json!({}))?;
        Ok(monitor)
    }

    fn line(&mut self) -> Result<Value> {
        let mut line = String::new();
        if self.from.read_line(&mut line)? == 0 {
            bail!("the monitor is closed");
        }
        Ok(serde_json::from_str(&line)?)
    }

    /// Has QEMU do something; what it answers.
    pub(crate) fn ask(&mut self, what: &str, arguments: Value) -> Result<Value> {
        let request = json!({ "execute": what, "arguments": arguments });
        writeln!(self.to, "{request}")?;
        loop {
            // Events come in between.
            let mut answer = self.line()?;
            if let Some(error) = answer.get("error") {
                bail!("{what}: {error}");
            }
            if let Some(result) = answer.get_mut("return") {
                return Ok(result.take());
            }
        }
    }
}

/// The end of a path, from the folder of crates, registry or library on.
fn shortened(path: &str) -> &str {
    let from = ["/crates/", "/library/", "/registry/"]
        .iter()
        .find_map(|folder| path.find(folder));
    from.map_or(path, |at| &path[at + 1..])
}

/// The image's names and lines.
struct Symbols(Option<Loader>);

impl Symbols {
    fn of(image: &Path) -> Symbols {
        Symbols(Loader::new(image).ok())
    }

    /// What is at an address; nothing if that is not known.
    fn name(&self, address: u64) -> String {
        let Some(loader) = &self.0 else {
            return String::new();
        };
        let mut names = Vec::new();
        if let Ok(mut frames) = loader.find_frames(address) {
            while let Ok(Some(frame)) = frames.next() {
                let function = frame.function.as_ref().and_then(|f| f.demangle().ok());
                let at = frame.location.and_then(|l| Some((l.file?, l.line?)));
                let mut name = function.map_or("?".into(), |f| f.into_owned());
                if let Some((file, line)) = at {
                    name += &format!(" ({}:{line})", shortened(file));
                }
                names.push(name);
            }
        }
        if names.is_empty() {
            names.extend(loader.find_symbol(address).map(str::to_owned));
        }
        names.join(", in ")
    }

    /// A line, with the name of the first address of the image that is in it.
    fn named(&self, line: &str) -> String {
        let address = line
            .split_whitespace()
            .filter_map(|word| word.strip_prefix("0x"))
            .find_map(|hex| u64::from_str_radix(hex, 16).ok());
        // What was called from there was called by the instruction before.
        let name = address.map(|at| self.name(at.saturating_sub(1)));
        match name {
            Some(name) if !name.is_empty() => format!("{line} {name}"),
            _ => line.to_owned(),
        }
    }
}
