//! The self-tests: each a function that says what is wrong, run one after the other, a line each.

pub(crate) mod balloon;
mod cpus;
pub(crate) mod crash;
mod memory;
pub(crate) mod nmi;
mod pressure;
mod reserve;
pub(crate) mod suite;
mod threads;
mod usermode;
mod users;
mod vmalloc;

use alloc::string::String;

use core::sync::atomic::{AtomicUsize, Ordering};

use memdesc::rcu::Rcu;
use memdesc::{Demand, Ledger, Mm, PageType};
use spin::Mutex;

use crate::exit::Exit;
use crate::platform::Metal;
use crate::pvh::BootInfo;
use crate::ranges::Ranges;
use crate::{log, percpu, smp, time, worker};

/// What a test is given.
pub(crate) struct Machine {
    pub(crate) mm: &'static Mm<Metal>,
    pub(crate) boot: &'static BootInfo,
    /// Words that were not zero when memory had been taken over, and how many largest blocks it has; if that was counted.
    pub(crate) written: Option<(u64, u64)>,
    /// The memory it was given.
    pub(crate) ranges: Ranges,
    /// What [`settled`] said before the tests.
    pub(crate) settled: u64,
    /// CPUs that run.
    pub(crate) cpus: usize,
}

/// How a test ends that did not fail.
pub(crate) enum Passed {
    /// As it should.
    Ok,
    /// As it should, and this is worth saying.
    Says(String),
    /// It could not be done on this machine.
    Skipped(&'static str),
}

pub(crate) type Outcome = Result<Passed, String>;

type Test = fn(&Machine) -> Outcome;

/// Fails the test with what is wrong and where unless it holds.
#[macro_export]
macro_rules! check {
    ($holds:expr) => {
        $crate::check!($holds, "{}", stringify!($holds))
    };
    ($holds:expr, $($why:tt)+) => {
        if !$holds {
            return Err(alloc::format!("{}:{}: {}", file!(), line!(), format_args!($($why)+)));
        }
    };
}

const TESTS: &[(&str, Test)] = &[
    ("words_written_at_boot", memory::words_written_at_boot),
    ("the_ledger_balances", memory::the_ledger_balances),
    (
        "all_memory_is_accounted_for",
        memory::all_memory_is_accounted_for,
    ),
    ("memory_of_the_firmware", memory::memory_of_the_firmware),
    ("pages_of_every_order", memory::pages_of_every_order),
    ("objects_of_every_size", memory::objects_of_every_size),
    ("a_cache_lives_and_dies", memory::a_cache_lives_and_dies),
    ("all_memory_can_be_had", memory::all_memory_can_be_had),
    ("collections", memory::collections),
    ("vmalloc_has_guards", vmalloc::vmalloc_has_guards),
    ("stacks_have_owners", vmalloc::stacks_have_owners),
    (
        "others_forget_translations",
        vmalloc::others_forget_translations,
    ),
    ("timers_tick", cpus::timers_tick),
    ("cpus_have_numbers", cpus::cpus_have_numbers),
    (
        "cpus_allocate_from_their_node",
        cpus::cpus_allocate_from_their_node,
    ),
    ("pages_go_between_cpus", cpus::pages_go_between_cpus),
    ("objects_go_between_cpus", cpus::objects_go_between_cpus),
    ("barriers_reach_all_cpus", cpus::barriers_reach_all_cpus),
    (
        "lists_are_drained_under_load",
        cpus::lists_are_drained_under_load,
    ),
    (
        "readers_hold_up_grace_periods",
        cpus::readers_hold_up_grace_periods,
    ),
    ("frees_wait_for_readers", cpus::frees_wait_for_readers),
    ("collections_on_all_cpus", cpus::collections_on_all_cpus),
    ("memory_comes_on_demand", users::memory_comes_on_demand),
    ("a_fork_copies_on_write", users::a_fork_copies_on_write),
    ("threads_share_a_space", users::threads_share_a_space),
    ("what_is_unmapped_is_gone", users::what_is_unmapped_is_gone),
    ("every_cpu_forks", users::every_cpu_forks),
    ("threads_run_everywhere", threads::threads_run_everywhere),
    ("loops_are_preempted", threads::loops_are_preempted),
    ("sleepers_wake_in_time", threads::sleepers_wake_in_time),
    (
        "locks_put_threads_to_sleep",
        threads::locks_put_threads_to_sleep,
    ),
    ("nmis_wake_threads", threads::nmis_wake_threads),
    (
        "memory_moves_with_threads",
        threads::memory_moves_with_threads,
    ),
    ("threads_come_and_go", threads::threads_come_and_go),
    (
        "a_reserve_is_its_threads",
        pressure::a_reserve_is_its_threads,
    ),
    ("kswapd_reclaims", pressure::kswapd_reclaims),
    (
        "users_are_paged_on_demand",
        usermode::users_are_paged_on_demand,
    ),
    ("users_copy_on_write", usermode::users_copy_on_write),
    ("users_map_and_unmap", usermode::users_map_and_unmap),
    ("strays_are_killed", usermode::strays_are_killed),
    ("users_are_preempted", usermode::users_are_preempted),
    (
        "trees_of_users_on_all_cpus",
        usermode::trees_of_users_on_all_cpus,
    ),
    (
        "the_kernel_keeps_to_its_own",
        usermode::the_kernel_keeps_to_its_own,
    ),
    ("nmis_strike_users", usermode::nmis_strike_users),
    (
        "users_lead_no_walk_of_the_stack",
        usermode::users_lead_no_walk_of_the_stack,
    ),
    (
        "users_see_no_segments_of_others",
        usermode::users_see_no_segments_of_others,
    ),
    ("groups_limit_processes", pressure::groups_limit_processes),
    (
        "forks_fail_when_memory_is_gone",
        pressure::forks_fail_when_memory_is_gone,
    ),
    (
        "a_reserve_is_there_when_memory_is_gone",
        reserve::a_reserve_is_there_when_memory_is_gone,
    ),
    ("interrupts_allocate", nmi::interrupts_allocate),
    ("an_nmi_leaves_pins_alone", nmi::an_nmi_leaves_pins_alone),
    ("faults_in_an_nmi", nmi::faults_in_an_nmi),
    ("nmi_storm", nmi::nmi_storm),
    ("nothing_is_left", memory::nothing_is_left),
];

/// Has the machine settle: what is made once and stays is made, what is kept for later is given back, and what that comes to is noted.
pub(crate) fn settle(machine: &mut Machine) {
    // The first reserve makes what all later ones hang on, which stays.
    if let Ok(first) = machine.mm.reserve("first", Demand::None) {
        let connected = first.connect(None).and_then(|()| first.disconnect());
        if connected.is_err() || first.destroy().is_err() {
            log!("a reserve of nothing could not be made");
        }
    }
    // So does the first group.
    drop(machine.mm.memcg_create(None, "first", u64::MAX));
    machine.mm.shrink();
    machine.settled = settled(&ledger(machine));
}

/// Runs them, all or those that the command line names.
pub(crate) fn run(machine: &mut Machine) -> Exit {
    settle(machine);
    let wanted = machine.boot.value("tests").unwrap_or("");
    let (mut passed, mut failed, mut skipped) = (0, 0, 0);
    for (name, test) in TESTS.iter().filter(|(name, _)| name.contains(wanted)) {
        let before = time::now();
        let outcome = test(machine);
        let ms = (time::now() - before) / 1_000_000;
        match outcome {
            Ok(Passed::Ok) => {
                passed += 1;
                log!("test {name} ... ok ({ms} ms)");
            }
            Ok(Passed::Says(what)) => {
                passed += 1;
                log!("test {name} ... ok ({ms} ms): {what}");
            }
            Ok(Passed::Skipped(why)) => {
                skipped += 1;
                log!("test {name} ... skipped: {why}");
            }
            Err(why) => {
                failed += 1;
                log!("test {name} ... FAILED: {why}");
            }
        }
    }
    // The core's own, unless they are not wanted.
    if machine.boot.value("suite") != Some("none") {
        let core = suite::run(machine, wanted);
        passed += core.passed;
        skipped += core.skipped;
        failed += core.failed;
    }
    log!("{passed} passed, {failed} failed, {skipped} skipped");
    if failed == 0 && passed > 0 {
        Exit::Success
    } else {
        Exit::Failure
    }
}

/// The ledger of a quiet moment: the other CPUs wait meanwhile, outside of everything, and the workers rest.
pub(crate) fn ledger(machine: &Machine) -> Ledger {
    let _pause = worker::pause();
    let (waiting, found) = (AtomicUsize::new(0), Mutex::new(None));
    smp::on_all_cpus(&|cpu| {
        let is_first = cpu == 0;
        if !is_first {
            waiting.fetch_add(1, Ordering::AcqRel);
        }
        smp::wait_until(|| waiting.load(Ordering::Acquire) == machine.cpus - 1);
        if !is_first {
            smp::wait_until(|| found.lock().is_some());
        }
        if is_first {
            let ledger = machine.mm.ledger();
            *found.lock() = Some(ledger);
        }
    });
    // `on_all_cpus` has run it on the first CPU too.
    found.into_inner().unwrap_or_else(|| machine.mm.ledger())
}

/// What waits for readers is freed, and what is kept for later goes back.
pub(crate) fn quiet(machine: &Machine) {
    machine.mm.rcu().barrier();
    machine.mm.shrink();
}

/// Which CPU this is, for the moment.
pub(crate) fn here() -> usize {
    let cpu = percpu::pin();
    percpu::unpin();
    cpu
}

/// Pages that are free or the memory manager's own, after all that it keeps for later has been given back: the same before and after a test, whatever it did.
pub(crate) fn settled(ledger: &Ledger) -> u64 {
    // Page tables of vmalloc's range stay.
    let tables = ledger.by_type[PageType::PageTable as usize];
    ledger.free + ledger.untouched + ledger.pcp + ledger.metadata + tables
}

/// A sequence that looks random, the same for the same start.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(start: u64) -> Random {
        Random(start.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// Below `n`.
    pub(crate) fn below(&mut self, n: usize) -> usize {
        // xorshift64*.
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % n
    }
}

/// Runs `f` on all CPUs; the first of what went wrong.
pub(crate) fn on_all(f: impl Fn(usize) -> Result<(), String> + Sync) -> Result<(), String> {
    let wrong = Mutex::new(None);
    smp::on_all_cpus(&|cpu| {
        if let Err(why) = f(cpu) {
            wrong.lock().get_or_insert((cpu, why));
        }
    });
    match wrong.into_inner() {
        Some((cpu, why)) => Err(alloc::format!("CPU {cpu}: {why}")),
        None => Ok(()),
    }
}
