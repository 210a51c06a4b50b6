//! Tests of user mode: memory comes on demand, forks copy on write, who strays is killed, loops are preempted, and trees of processes on all CPUs leave nothing behind.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering};

use memdesc::filemap::Mapping;
use memdesc::mmap::{Map, VmFlags};

use super::{Machine, Outcome, Passed, ledger, on_all, quiet, settled};
use crate::platform::Metal;
use crate::process::{self, KILLED, Program};
use crate::thread::{self, JoinHandle};
use crate::users::Space;
use crate::{apic, check, gdt, memory, percpu, sched, smp, time, traps, users};

unsafe extern "C" {
    safe static user_hello: u8;
    pub(super) safe static user_demand: u8;
    safe static user_cow: u8;
    pub(super) safe static user_tree: u8;
    safe static user_spin: u8;
    safe static user_forever: u8;
    safe static user_map: u8;
    safe static user_lead: u8;
    safe static user_segments: u8;
    safe static user_bad: u8;
    safe static user_bad_kinds: u8;
}

/// Runs these at once; what they said.
pub(super) fn run_all(
    file: &Mapping<'static, Metal>,
    machine: &Machine,
    programs: &[Program],
) -> Result<Vec<u64>, String> {
    let mut handles = Vec::with_capacity(programs.len());
    let mut result = Ok(());
    for program in programs {
        match process::start(file, machine.mm, program) {
            Ok(handle) => handles.push(handle),
            Err(why) => result = Err(why.to_string()),
        }
    }
    let said = handles.into_iter().map(JoinHandle::join).collect();
    result.map(|()| said)
}

pub(super) fn program(entry: &'static u8, arguments: [u64; 2], pages: u64) -> Program {
    Program {
        entry,
        arguments,
        pages,
    }
}

pub(super) fn text_file(machine: &Machine) -> Result<Mapping<'static, Metal>, String> {
    process::text_file(machine.mm).map_err(|why| why.to_string())
}

/// All are gone, and so is what they had.
pub(super) fn nothing_is_left(machine: &Machine, before: u64) -> Result<(), String> {
    // What is left are the workers.
    smp::wait_until(|| process::alive() == 0 && thread::alive() == machine.cpus as u64 + 1);
    let after = rest(machine);
    check!(
        after == before,
        "{before} pages were free or metadata, {after} are ({} at first)",
        machine.settled
    );
    Ok(())
}

pub(super) fn rest(machine: &Machine) -> u64 {
    quiet(machine);
    let ledger = ledger(machine);
    if ledger.balanced { settled(&ledger) } else { 0 }
}

/// A process says something; another touches pages: its text, its stack and its memory come by faults, one each.
pub(super) fn users_are_paged_on_demand(machine: &Machine) -> Outcome {
    const PAGES: u64 = 50;
    let before = rest(machine);
    let file = text_file(machine)?;
    process::take_console();
    let hello = run_all(&file, machine, &[program(&user_hello, [0; 2], 1)])?;
    let said = process::take_console();
    check!(
        hello == [18] && &said[..] == b"hello from ring 3\n",
        "{hello:x?}, {:?}",
        core::str::from_utf8(&said)
    );
    let faults = users::FAULTS.load(Ordering::Relaxed);
    let sums = run_all(&file, machine, &[program(&user_demand, [PAGES, 0], PAGES)])?;
    let faults = users::FAULTS.load(Ordering::Relaxed) - faults;
    let wanted: u64 = (0..PAGES).map(|i| 3 * i + 7).sum();
    check!(sums == [wanted], "{sums:x?}, not {wanted:x}");
    // A page is read first, and then written.
    check!(
        (PAGES..=2 * PAGES + 4).contains(&faults),
        "{faults} faults for {PAGES} pages"
    );
    drop((file, hello, sums));
    nothing_is_left(machine, before)?;
    Ok(Passed::Says(format!(
        "{faults} faults for {PAGES} pages{}",
        if users::are_guarded() {
            ", the kernel kept out"
        } else {
            ""
        }
    )))
}

/// After a fork both write to what they share at the same time, and each finds its own; on all CPUs.
pub(super) fn users_copy_on_write(machine: &Machine) -> Outcome {
    let before = rest(machine);
    let file = text_file(machine)?;
    let programs: Vec<Program> = (0..2 * machine.cpus)
        .map(|_| program(&user_cow, [40, 0], 40))
        .collect();
    let said = run_all(&file, machine, &programs)?;
    check!(said.iter().all(|said| *said == 42), "{said:x?}");
    drop((file, programs, said));
    nothing_is_left(machine, before)?;
    Ok(Passed::Ok)
}

/// What is unmapped is gone, and what comes in its place is zero.
pub(super) fn users_map_and_unmap(machine: &Machine) -> Outcome {
    let before = rest(machine);
    let file = text_file(machine)?;
    let programs: Vec<Program> = (0..2 * machine.cpus)
        .map(|_| program(&user_map, [20, 12], 1))
        .collect();
    let said = run_all(&file, machine, &programs)?;
    check!(said.iter().all(|said| *said == 9), "{said:x?}");
    drop((file, programs, said));
    nothing_is_left(machine, before)?;
    Ok(Passed::Ok)
}

/// Who touches what is not his, or does what only the kernel may, is killed; the others never notice.
pub(super) fn strays_are_killed(machine: &Machine) -> Outcome {
    let before = rest(machine);
    let kinds = (&raw const user_bad_kinds).addr() as u64;
    let file = text_file(machine)?;
    let kills = process::KILLS.load(Ordering::Relaxed);
    let programs: Vec<Program> = (0..kinds)
        .flat_map(|kind| {
            [
                program(&user_bad, [kind, 0], 1),
                program(&user_cow, [5, 0], 5),
            ]
        })
        .collect();
    let said = run_all(&file, machine, &programs)?;
    let kills = process::KILLS.load(Ordering::Relaxed) - kills;
    for (kind, pair) in said.chunks(2).enumerate() {
        check!(
            pair[0] & KILLED != 0,
            "kind {kind} got away with {:x}",
            pair[0]
        );
        check!(
            pair[1] == 42,
            "the one beside kind {kind} said {:x}",
            pair[1]
        );
    }
    check!(kills == kinds, "{kills} kills for {kinds} kinds");
    drop((file, programs, said));
    nothing_is_left(machine, before)?;
    Ok(Passed::Says(format!("{kills} of {kinds} kinds")))
}

/// Loops that never call get no more than their share, and find all registers as they left them; one that never ends is ended.
pub(super) fn users_are_preempted(machine: &Machine) -> Outcome {
    const TURNS: u64 = 20_000_000;
    let before = rest(machine);
    let file = text_file(machine)?;
    let preempted = |cpu: &percpu::PerCpu| cpu.preemptions.load(Ordering::Relaxed);
    let sum: u64 = percpu::online().map(preempted).sum();
    let forever: Vec<JoinHandle> = (0..machine.cpus)
        .filter_map(|_| process::start(&file, machine.mm, &program(&user_forever, [0; 2], 1)).ok())
        .collect();
    let programs: Vec<Program> = (0..2 * machine.cpus)
        .map(|_| program(&user_spin, [TURNS, 0], 1))
        .collect();
    let said = run_all(&file, machine, &programs);
    let started = forever.len();
    let ended: Vec<bool> = forever
        .iter()
        .map(|process| {
            let still = !process.is_done();
            process::end(process);
            still
        })
        .collect();
    let killed: Vec<u64> = forever.into_iter().map(JoinHandle::join).collect();
    let said = said?;
    check!(started == machine.cpus && ended.iter().all(|still| *still));
    check!(killed.iter().all(|said| said & KILLED != 0), "{killed:x?}");
    check!(said.iter().all(|said| *said == TURNS), "{said:x?}");
    let preempted = percpu::online().map(preempted).sum::<u64>() - sum;
    check!(preempted >= machine.cpus as u64, "{preempted} preemptions");
    drop((file, programs, said, killed, ended));
    nothing_is_left(machine, before)?;
    Ok(Passed::Says(format!("{preempted} preemptions")))
}

fn trees(machine: &Machine, depth: u64, pages: u64) -> Result<(Vec<Program>, u64), String> {
    let tree = program(&user_tree, [depth, pages], pages);
    Ok(((0..machine.cpus).map(|_| tree).collect(), (2 << depth) - 1))
}

/// Trees of processes that fork each other and write to what they share, on all CPUs at once: each finds what it should, and all memory comes back.
pub(super) fn trees_of_users_on_all_cpus(machine: &Machine) -> Outcome {
    let before = rest(machine);
    let file = text_file(machine)?;
    let (programs, wanted) = trees(machine, 4, 12)?;
    let forks = process::FORKS.load(Ordering::Relaxed);
    let calls = process::CALLS.load(Ordering::Relaxed);
    let said = run_all(&file, machine, &programs)?;
    let forks = process::FORKS.load(Ordering::Relaxed) - forks;
    let calls = process::CALLS.load(Ordering::Relaxed) - calls;
    check!(
        said.iter().all(|said| *said == wanted),
        "{said:x?}, not {wanted:x}"
    );
    check!(forks == (wanted - 1) * machine.cpus as u64, "{forks} forks");
    drop((file, programs, said));
    nothing_is_left(machine, before)?;
    Ok(Passed::Says(format!(
        "{forks} forks, {calls} calls, at most {} B of stack in the kernel",
        process::MOST_STACK.load(Ordering::Relaxed)
    )))
}

/// An NMI that strikes the kernel while `gs` is still the user's finds its CPU all the same; and the kernel does not touch users' memory unless it says so.
pub(super) fn the_kernel_keeps_to_its_own(machine: &Machine) -> Outcome {
    on_all(|cpu| {
        let me = percpu::of(cpu);
        let before = me.nmis.load(Ordering::Relaxed);
        traps::strike_with_users_gs();
        check!(percpu::this().cpu() == cpu);
        check!(me.nmis.load(Ordering::Relaxed) == before + 1);
        Ok(())
    })?;
    let space = Space::new(machine.mm, 1).map_err(|why| why.to_string())?;
    let at = space
        .mmap(None, 4096, VmFlags::READ_WRITE, Map::Anon)
        .map_err(|why| why.to_string())?;
    space.write(at, &[1]).map_err(|why| why.to_string())?;
    let said = users::with_space(&space, || {
        let may = traps::probe(at as usize);
        users::allow(false);
        let may_not = traps::probe(at as usize);
        users::allow(true);
        (may, may_not)
    });
    drop(space);
    check!(said == (true, !users::are_guarded()), "{said:?}");
    // What is the kernel's is nothing that users have.
    let own = (&raw const LURE).addr();
    check!(traps::probe(own) && traps::user_load(own).is_none() && !traps::user_store(own, 0));
    check!(ledger(machine).balanced);
    if !users::are_guarded() {
        return Ok(Passed::Says(
            "the CPU does not keep the kernel out".to_string(),
        ));
    }
    Ok(Passed::Ok)
}

/// NMIs that strike processes, and the kernel on the way in and out, and allocate, change nothing.
pub(super) fn nmis_strike_users(machine: &Machine) -> Outcome {
    /// Allocates and frees; the CPU that it is on it finds by `gs`.
    fn on_nmi() {
        if let Some(mm) = memory::mm()
            && percpu::this()
                .nmis
                .load(Ordering::Relaxed)
                .is_multiple_of(4)
            && let Ok(object) = mm.kmalloc_nolock(64, memdesc::gfp::Flags::EMPTY)
        {
            // SAFETY: ours, and freed once.
            unsafe { mm.kfree_nolock(object) };
        }
    }
    let before = rest(machine);
    let file = text_file(machine)?;
    let count = |cpu: &percpu::PerCpu| cpu.nmis.load(Ordering::Relaxed);
    let sum: u64 = percpu::online().map(count).sum();
    traps::set_on_nmi(Some(on_nmi));
    let (mut rounds, mut wrong, start) = (0, None, time::now());
    while wrong.is_none() && (rounds < 2 || time::now() - start < 500_000_000) {
        let (mut programs, wanted) = trees(machine, 2, 5)?;
        programs.extend((0..machine.cpus).map(|_| program(&user_map, [10, 3], 1)));
        let mut handles = Vec::with_capacity(programs.len());
        for program in &programs {
            match process::start(&file, machine.mm, program) {
                Ok(handle) => handles.push(handle),
                Err(why) => wrong = Some(why.to_string()),
            }
        }
        let mut turn = 0;
        while !handles.iter().all(JoinHandle::is_done) {
            apic::send_nmi(percpu::of(turn % machine.cpus));
            turn += 1;
            time::delay_us(50);
            if turn.is_multiple_of(8) {
                sched::yield_now();
            }
        }
        let said: Vec<u64> = handles.into_iter().map(JoinHandle::join).collect();
        let (of_trees, of_maps) = said.split_at(machine.cpus.min(said.len()));
        if of_trees.iter().any(|said| *said != wanted) || of_maps.iter().any(|said| *said != 9) {
            wrong = Some(format!("{said:x?}, not {wanted:x} and 9"));
        }
        rounds += 1;
    }
    time::delay_us(20_000);
    traps::set_on_nmi(None);
    if let Some(why) = wrong {
        return Err(why);
    }
    let nmis = percpu::online().map(count).sum::<u64>() - sum;
    check!(nmis > 0, "no NMI came");
    drop(file);
    nothing_is_left(machine, before)?;
    Ok(Passed::Says(format!("{nmis} NMIs, {rounds} rounds")))
}

/// What a process would lead a walk of the kernel's stack to: the last frame, which was called from where nothing is.
static LURE: [usize; 2] = [0, 0x5eed_5eed];

/// A process has in its frame pointer what it likes: who walks the stack in a trap that struck it does not follow that.
pub(super) fn users_lead_no_walk_of_the_stack(machine: &Machine) -> Outcome {
    static WALKS: AtomicU64 = AtomicU64::new(0);
    static LED: AtomicU64 = AtomicU64::new(0);
    fn on_nmi() {
        let mut frames = [0; 16];
        let n = traps::backtrace(traps::frame_pointer(), &mut frames);
        WALKS.fetch_add(1, Ordering::Relaxed);
        LED.fetch_add(u64::from(frames[..n].contains(&LURE[1])), Ordering::Relaxed);
    }
    let before = rest(machine);
    let file = text_file(machine)?;
    let lure = (&raw const LURE).expose_provenance() as u64;
    let mut frames = [0; 2];
    check!(
        traps::backtrace(lure as usize, &mut frames) == 1 && frames[0] == LURE[1],
        "there is nothing to be led to"
    );
    traps::set_on_nmi(Some(on_nmi));
    let mut handles = Vec::with_capacity(machine.cpus);
    for _ in 0..machine.cpus {
        let led = process::start(&file, machine.mm, &program(&user_lead, [lure, 5000], 1));
        handles.extend(led.ok());
    }
    let (started, mut turn) = (handles.len(), 0);
    while !handles.iter().all(JoinHandle::is_done) {
        apic::send_nmi(percpu::of(turn % machine.cpus));
        turn += 1;
        time::delay_us(50);
        sched::yield_now();
    }
    let said: Vec<u64> = handles.into_iter().map(JoinHandle::join).collect();
    time::delay_us(20_000);
    traps::set_on_nmi(None);
    check!(
        started == machine.cpus && said.iter().all(|said| *said == 42),
        "{said:x?}"
    );
    let (walks, led) = (WALKS.load(Ordering::Relaxed), LED.load(Ordering::Relaxed));
    check!(
        walks > 0 && led == 0,
        "{led} of {walks} walks went where a process led them"
    );
    drop((file, said));
    nothing_is_left(machine, before)?;
    Ok(Passed::Says(format!("{walks} walks")))
}

/// What a process has in its segment registers no other sees.
pub(super) fn users_see_no_segments_of_others(machine: &Machine) -> Outcome {
    let before = rest(machine);
    let file = text_file(machine)?;
    // The users' data, as asked for with more rights or less.
    let selectors = (0..4).map(|rights| u64::from(gdt::USER_DATA & !3 | rights));
    let programs: Vec<Program> = (0..machine.cpus)
        .flat_map(|_| selectors.clone())
        .map(|selector| program(&user_segments, [selector, 200], 1))
        .collect();
    let said = run_all(&file, machine, &programs)?;
    check!(said.iter().all(|said| *said == 42), "{said:x?}");
    drop((file, programs, said));
    nothing_is_left(machine, before)?;
    Ok(Passed::Ok)
}
