//! The steps of a check: run them all, say at the end what failed and what could not be run.

use std::io::IsTerminal;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use crate::balloon;
use crate::metal::{self, Missing};
use crate::recordings;
use crate::replay_metal;
use crate::targets;

/// Runs steps and remembers how they ended.
#[derive(Default)]
pub(crate) struct Runner {
    steps: Vec<Step>,
}

struct Step {
    name: String,
    took: Duration,
    end: End,
}

enum End {
    Passed,
    Failed(String),
    Skipped(String),
}

/// cargo, as the workspace uses it.
fn cargo(args: &[&str]) -> Command {
    // Within `cargo xtask`, CARGO is the cargo of the pinned toolchain; `cargo +nightly` needs the rustup proxy.
    let mut command = Command::new("cargo");
    command.args(args);
    command
}

impl Runner {
    fn step(&mut self, name: &str, run: impl FnOnce() -> End) {
        println!("\n=== {name}");
        let start = Instant::now();
        let end = run();
        self.steps.push(Step {
            name: name.to_owned(),
            took: start.elapsed(),
            end,
        });
    }

    fn command(&mut self, name: &str, mut command: Command) {
        self.step(name, || run(&mut command));
    }

    pub(crate) fn format(&mut self) {
        self.command("format", cargo(&["fmt", "--all", "--check"]));
    }

    pub(crate) fn lint(&mut self) {
        let args = [
            "clippy",
            "--workspace",
            "--all-targets",
            "--",
            "-D",
            "warnings",
        ];
        self.command("lints", cargo(&args));
    }

    pub(crate) fn tests(&mut self) {
        self.command(
            "tests",
            cargo(&["test", "--workspace", "--exclude", "xtask"]),
        );
        // All of the core's tests once more, with every lock checked.
        let args = [
            "test",
            "--release",
            "-p",
            "memdesc",
            "--features",
            "lockdep,checked",
        ];
        self.command("the core under lockdep", cargo(&args));
        // The checks of debug builds in optimised code: another schedule, the same answers.
        self.command("owner map, optimised and checked", owner_map());
    }

    /// The core's integration tests with free memory inaccessible, checked, zeroed, and all of it at once; with `each` also with the
    /// other services, and with some objects guarded, each by itself.
    pub(crate) fn free_pages(&mut self, each: bool) {
        let mut settings = vec!["pagealloc", "poison", "init_on_free", "all"];
        if each {
            settings.extend(["init_on_alloc", "reporting", "kfence"]);
        }
        for setting in settings {
            let mut command = cargo(&["test", "-p", "memdesc", "--tests"]);
            command.env("MEMDESC_FREEPAGE", setting);
            self.command(&format!("the core, free pages: {setting}"), command);
        }
    }

    pub(crate) fn loom(&mut self, preemptions: Option<u32>) {
        let mut command = cargo(&[
            "test",
            "--release",
            "-p",
            "memdesc",
            "--lib",
            "--target-dir",
            "target/loom",
        ]);
        command.env("RUSTFLAGS", "--cfg loom");
        let name = match preemptions {
            Some(n) => {
                command.env("LOOM_MAX_PREEMPTIONS", n.to_string());
                format!("models under loom, {n} preemptions")
            }
            None => "models under loom, unbounded".to_owned(),
        };
        self.command(&name, command);
    }

    /// The unit tests, the way of pages and objects once, the page state machine in small, and some of address spaces; `all` runs the other tests too, which takes an hour or more.
    pub(crate) fn miri(&mut self, all: bool) {
        self.step("core under Miri, strict provenance", || {
            if let Err(why) = set_up_miri() {
                return End::Skipped(why);
            }
            let mut command = cargo(&["+nightly", "miri", "test", "-p", "memdesc", "--lib"]);
            if all {
                command.arg("--tests");
            } else {
                command.args(["--test", "buddy_state_machine"]);
            }
            command.args(["--target-dir", "target/miri"]);
            let mut commands = vec![command];
            if !all {
                // The way of pages and objects once, and the few tests of address spaces that are done in seconds.
                let mut some = cargo(&["+nightly", "miri", "test", "-p", "memdesc"]);
                some.args(["--test", "mmap", "--test", "selftest"]);
                some.args(["--target-dir", "target/miri", "--", "only_folios"]);
                some.args(["private_data_comes", "a_folio_moves", "go_round"]);
                commands.push(some);
            }
            for mut command in commands {
                command.env(
                    "MIRIFLAGS",
                    "-Zmiri-strict-provenance -Zmiri-disable-isolation",
                );
                match run(&mut command) {
                    End::Passed => {}
                    other => return other,
                }
            }
            End::Passed
        });
    }

    pub(crate) fn docs(&mut self) {
        let mut command = cargo(&[
            "doc",
            "--workspace",
            "--no-deps",
            "--document-private-items",
        ]);
        command.env(
            "RUSTDOCFLAGS",
            "-D warnings -A rustdoc::private_intra_doc_links",
        );
        self.command("docs", command);
    }

    pub(crate) fn stress(&mut self, seconds: u64) {
        let mut command = owner_map();
        command.env("MEMDESC_STRESS_SECONDS", seconds.to_string());
        self.command(&format!("threaded tests, {seconds} s each"), command);
    }

    /// Interrupts that allocate, in each configuration.
    pub(crate) fn storm(&mut self, seconds: u64) {
        let seconds = seconds.to_string();
        let args = ["run", "--release", "--quiet", "-p", "memdesc-cli", "--"];
        let mut command = cargo(&args);
        command.args(["storm", "--quiet", "--seconds", &seconds]);
        self.command(&format!("storm of interrupts, 3 × {seconds} s"), command);
    }

    /// Address spaces that fork, fault, move and are reclaimed; and memory full of files.
    pub(crate) fn scenarios(&mut self, seconds: u64) {
        let seconds = seconds.to_string();
        self.command(
            &format!("address spaces on two CPUs, {seconds} s"),
            scenario(&["address-spaces", "--seconds", &seconds]),
        );
        self.command("file pages make room", scenario(&["page-cache"]));
        self.command("a spike is given back", scenario(&["free-page-reporting"]));
    }

    /// So many machines that swap over a network: with reserves every one of them finishes.
    pub(crate) fn swap_net(&mut self, seeds: u32) {
        let seeds = seeds.to_string();
        self.command(
            &format!("swap over a network, {seeds} machines"),
            scenario(&["swap-net", "--seeds", &seeds]),
        );
    }

    /// Every use of memory at once, as long as one likes.
    pub(crate) fn everything(&mut self, seconds: u64) {
        let seconds = seconds.to_string();
        self.command(
            &format!("everything at once, {seconds} s"),
            scenario(&["purposes", "--seconds", &seconds]),
        );
    }

    pub(crate) fn replay_built_in(&mut self) {
        self.step(
            "replay of the built-in recording",
            || match recordings::check(None) {
                Ok(summary) => passed(&summary),
                Err(why) => End::Failed(format!("{why:#}")),
            },
        );
    }

    pub(crate) fn replay(&mut self, folder: &Path) {
        let found = match recordings::in_folder(folder) {
            Ok(found) => found,
            Err(why) => {
                self.step("replay", || End::Failed(format!("{why:#}")));
                return;
            }
        };
        for recording in found {
            let name = format!("replay of {}", recording.display());
            self.step(&name, || match recordings::check(Some(&recording)) {
                Ok(summary) => passed(&summary),
                Err(why) => End::Failed(format!("{why:#}")),
            });
        }
    }

    /// The minimal kernel on each machine that it knows, and the core built for it; with their logs if `verbose`.
    pub(crate) fn targets(&mut self, verbose: bool) {
        self.step("minimal kernel: its size", || match targets::size() {
            Ok(summary) => passed(&summary),
            Err(why) => End::Failed(format!("{why:#}")),
        });
        for target in &targets::TARGETS {
            let mut kernel = None;
            self.step(
                &format!("{}: build", target.triple),
                || match targets::build(target) {
                    Ok(built) => {
                        kernel = Some(built);
                        End::Passed
                    }
                    Err(Missing::Skip(why)) => End::Skipped(why),
                    Err(Missing::Failed(why)) => End::Failed(why),
                },
            );
            let Some(kernel) = kernel else {
                continue;
            };
            for size in target.sizes() {
                self.step(
                    &format!("{}: minimal kernel, {}", target.triple, size.memory),
                    || match targets::boot(target, &kernel, &size, verbose) {
                        Ok(Ok(summary)) => passed(&summary),
                        Ok(Err(Missing::Skip(why))) => End::Skipped(why),
                        Ok(Err(Missing::Failed(why))) => End::Failed(why),
                        Err(why) => End::Failed(format!("{why:#}")),
                    },
                );
            }
        }
    }

    /// The image on bare metal, on several machines; `all` of them, or those with this in their names, and with their logs if `verbose`.
    pub(crate) fn metal(&mut self, all: bool, only: &str, verbose: bool) {
        let Some(images) = self.images() else {
            return;
        };
        for guest in balloon::GUESTS.iter().filter(|g| g.name.contains(only)) {
            self.step(&format!("metal: {}", guest.name), || {
                match balloon::run(&images, guest, verbose) {
                    Ok(summary) => passed(&summary),
                    Err(why) => End::Failed(format!("{why:#}")),
                }
            });
        }
        for machine in metal::machines(all)
            .iter()
            .filter(|m| m.name.contains(only))
        {
            self.boot(&images, machine, verbose);
        }
    }

    /// Everything that memory can be used for at the same time, for so long. The machines' lines are shown as they come, unless nobody looks.
    pub(crate) fn soak(
        &mut self,
        how_long: Duration,
        seed: Option<u64>,
        only: &str,
        verbose: bool,
    ) {
        let shown = verbose || std::io::stdout().is_terminal();
        if let Some(images) = self.images() {
            for machine in metal::soaks(how_long, seed)
                .iter()
                .filter(|m| m.name.contains(only))
            {
                self.boot(&images, machine, shown);
            }
        }
    }

    /// The image, as it is and with every lock checked.
    fn images(&mut self) -> Option<metal::Images> {
        let mut images = None;
        self.step("metal: the images", || match metal::build() {
            Ok(built) => {
                images = Some(built);
                End::Passed
            }
            Err(Missing::Skip(why)) => End::Skipped(why),
            Err(Missing::Failed(why)) => End::Failed(why),
        });
        images
    }

    fn boot(&mut self, images: &metal::Images, machine: &metal::Machine, shown: bool) {
        let show = |line: &str| {
            if shown {
                println!("{line}");
            }
        };
        self.step(&format!("metal: {}", machine.name), || {
            match metal::boot(images, machine, show) {
                Ok(summary) => passed(&summary),
                Err(why) => End::Failed(format!("{why:#}")),
            }
        });
    }

    /// A recording on bare metal, beside the same one in a process; and modules that are none.
    pub(crate) fn metal_replay(
        &mut self,
        recording: Option<&Path>,
        events: usize,
        memory: Option<&str>,
        verbose: bool,
    ) {
        let mut ready = None;
        self.step("metal: the recording", || {
            let images = match metal::build() {
                Ok(images) => images,
                Err(Missing::Skip(why)) => return End::Skipped(why),
                Err(Missing::Failed(why)) => return End::Failed(why),
            };
            match replay_metal::prepare(recording, events) {
                Ok(prepared) => {
                    println!("{}", prepared.summary());
                    ready = Some((images, prepared));
                    End::Passed
                }
                Err(why) => End::Failed(format!("{why:#}")),
            }
        });
        let Some((images, prepared)) = ready else {
            return;
        };
        for machine in replay_metal::machines(recording.is_none(), memory) {
            self.step(
                &format!("metal replay: {}", machine.name()),
                || match replay_metal::compare(&images, &prepared, &machine, verbose) {
                    Ok(summary) => passed(&summary),
                    Err(why) => End::Failed(format!("{why:#}")),
                },
            );
        }
        if recording.is_some() {
            return;
        }
        for bad in replay_metal::BAD {
            self.step(
                &format!("metal replay: {}", bad.name),
                || match replay_metal::refuses(&images, &prepared, &bad, verbose) {
                    Ok(summary) => passed(&summary),
                    Err(why) => End::Failed(format!("{why:#}")),
                },
            );
        }
    }

    /// The table of all steps, and how it ended as a whole.
    pub(crate) fn finish(self) -> ExitCode {
        println!("\n=== summary");
        let width = self.steps.iter().map(|s| s.name.len()).max().unwrap_or(0);
        let (mut passed, mut failed, mut skipped) = (0, 0, 0);
        for step in &self.steps {
            let (word, why) = match &step.end {
                End::Passed => {
                    passed += 1;
                    ("passed", "")
                }
                End::Failed(why) => {
                    failed += 1;
                    ("FAILED", why.as_str())
                }
                End::Skipped(why) => {
                    skipped += 1;
                    ("skipped", why.as_str())
                }
            };
            println!(
                "{:width$}  {word:7}  {:6.1} s  {why}",
                step.name,
                step.took.as_secs_f64()
            );
        }
        println!("{passed} passed, {failed} failed, {skipped} skipped");
        if failed == 0 {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        }
    }
}

/// The threaded tests, optimised, with the checks of debug builds.
fn owner_map() -> Command {
    cargo(&[
        "test",
        "--release",
        "-p",
        "memdesc",
        "--features",
        "checked",
        "--test",
        "owner_map",
    ])
}

fn passed(summary: &str) -> End {
    println!("{summary}");
    End::Passed
}

fn run(command: &mut Command) -> End {
    match command.status() {
        Ok(status) if status.success() => End::Passed,
        Ok(status) => End::Failed(format!(
            "{} ended with {status}",
            command.get_program().display()
        )),
        Err(why) => End::Failed(format!(
            "cannot run {}: {why}",
            command.get_program().display()
        )),
    }
}

/// Miri comes with nightly; both are installed if they are missing.
fn set_up_miri() -> Result<(), String> {
    let works = || {
        let mut command = cargo(&["+nightly", "miri", "setup"]);
        command.stdout(Stdio::null()).stderr(Stdio::null());
        command.status().is_ok_and(|s| s.success())
    };
    if works() {
        return Ok(());
    }
    for args in [
        [
            "component",
            "add",
            "--toolchain",
            "nightly",
            "miri",
            "rust-src",
        ]
        .as_slice(),
        [
            "toolchain",
            "install",
            "nightly",
            "--profile",
            "minimal",
            "-c",
            "miri",
            "-c",
            "rust-src",
        ]
        .as_slice(),
    ] {
        println!("rustup {}", args.join(" "));
        let done = Command::new("rustup")
            .args(args)
            .status()
            .is_ok_and(|s| s.success());
        if done && works() {
            return Ok(());
        }
    }
    Err("no nightly toolchain with Miri, and rustup could not install one".to_owned())
}

/// `memdesc scenario` with these arguments.
fn scenario(args: &[&str]) -> Command {
    let mut command = cargo(&["run", "--release", "--quiet", "-p", "memdesc-cli", "--"]);
    command.arg("scenario").args(args).arg("--quiet");
    command
}
