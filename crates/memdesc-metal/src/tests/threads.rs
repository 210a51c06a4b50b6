//! Tests of threads: they run on all CPUs, are preempted and moved, sleep on the memory manager's locks and are woken, and leave nothing behind.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::ptr::null_mut;
use core::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, Ordering};

use memdesc::filemap::{FileError, Mapping, MappingOps};
use memdesc::gfp::GFP_KERNEL;
use memdesc::mmap::{Map, VmFlags};
use memdesc::{AddressInfo, PAGE_SIZE, Platform};
use spin::Mutex;

use super::{Machine, Outcome, Passed, Random, here, ledger, quiet, settled};
use crate::platform::Metal;
use crate::thread::{self, JoinHandle, State};
use crate::traps::{self, probe};
use crate::users::{Space, with_space};
use crate::{apic, check, park, percpu, sched, time};

const PAGE: u64 = PAGE_SIZE as u64;
/// Nothing here takes so long, on a busy host.
pub(super) const TOO_LONG_NS: u64 = 20_000_000_000;

/// Runs `f` in so many threads at once, with each one's number, on the CPUs that `bound` says; the first of what went wrong.
pub(super) fn in_threads(
    count: usize,
    bound: impl Fn(usize) -> Option<usize>,
    f: impl Fn(usize) -> Result<(), String> + Sync,
) -> Result<(), String> {
    let wrong = Mutex::new(None);
    let (shared, f) = (&wrong, &f);
    let mut handles = Vec::with_capacity(count);
    for i in 0..count {
        let run = move || {
            if let Err(why) = f(i) {
                shared.lock().get_or_insert((i, why));
            }
            0
        };
        // SAFETY: what it borrows lives until all have been joined, below.
        match unsafe { thread::spawn_unchecked("test", bound(i), run) } {
            Ok(handle) => handles.push(handle),
            Err(why) => {
                wrong.lock().get_or_insert((i, why.to_string()));
                break;
            }
        }
    }
    handles.into_iter().map(JoinHandle::join).for_each(drop);
    match wrong.into_inner() {
        Some((i, why)) => Err(format!("thread {i}: {why}")),
        None => Ok(()),
    }
}

/// Waits, but not for ever.
fn wait(what: &str, is_so: impl Fn() -> bool) -> Result<(), String> {
    let until = time::now() + TOO_LONG_NS;
    while !is_so() {
        check!(time::now() < until, "waited too long: {what}");
        sched::relax();
    }
    Ok(())
}

/// Threads run on all CPUs, each on a stack of its own whose guards say whose it is; who is bound stays where he is.
pub(super) fn threads_run_everywhere(machine: &Machine) -> Outcome {
    let mm = machine.mm;
    let (seen, arrived) = (AtomicU64::new(0), AtomicU64::new(0));
    let (cpus, count) = (machine.cpus as u64, 3 * machine.cpus);
    in_threads(
        count,
        |_| None,
        |_| {
            // All are there at once, until all CPUs have been seen.
            arrived.fetch_add(1, Ordering::AcqRel);
            wait("all CPUs run threads", || {
                seen.fetch_or(1 << here(), Ordering::Relaxed);
                arrived.load(Ordering::Acquire) == count as u64
                    && seen.load(Ordering::Relaxed).count_ones() as u64 == cpus
            })?;
            let (local, id) = (0u64, thread::current().id());
            let at = (&raw const local).addr();
            let AddressInfo::Area(area) = mm.explain_address(at) else {
                return Err(format!("the stack is {}", mm.explain_address(at)));
            };
            check!(
                area.owner == Some(id),
                "{id} runs on the stack of {:?}",
                area.owner
            );
            check!(!probe(area.start - 1) && !probe(area.start + area.size));
            let below = mm.explain_address(area.start - 8);
            check!(
                matches!(below, AddressInfo::GuardBefore(area) if area.owner == Some(id)),
                "below the stack of {id}: {below}"
            );
            Ok(())
        },
    )?;
    in_threads(
        2 * machine.cpus,
        |i| Some(i % machine.cpus),
        |i| {
            for turn in 0..100 {
                let cpu = here();
                check!(
                    cpu == i % machine.cpus,
                    "bound to {}, found on {cpu}",
                    i % machine.cpus
                );
                if turn % 30 == 29 {
                    sched::sleep_ms(1);
                } else {
                    sched::yield_now();
                }
            }
            Ok(())
        },
    )?;
    Ok(Passed::Says(format!("{} threads", 5 * machine.cpus)))
}

/// Threads that wait for each other without letting go of their CPU all go on, since the tick takes it from them; registers and flags are as they were.
pub(super) fn loops_are_preempted(machine: &Machine) -> Outcome {
    const TURNS: u64 = 6;
    let counts = [const { AtomicU64::new(0) }; 3 * percpu::MAX_CPUS];
    let before: u64 = preemptions();
    in_threads(
        3 * machine.cpus,
        |i| Some(i / 3),
        |i| {
            let first = i / 3 * 3;
            let until = time::now() + TOO_LONG_NS;
            for turn in 1..=TURNS {
                counts[i].store(turn, Ordering::Release);
                // The other two of this CPU must have had it as often.
                while (first..first + 3).any(|other| counts[other].load(Ordering::Acquire) < turn) {
                    check!(time::now() < until, "nobody took the CPU in turn {turn}");
                    core::hint::spin_loop();
                }
            }
            check!(Metal.irqs_enabled());
            Ok(())
        },
    )?;
    let preempted = preemptions() - before;
    check!(preempted >= TURNS, "{preempted} preemptions");
    Ok(Passed::Says(format!("{preempted} preemptions")))
}

fn preemptions() -> u64 {
    percpu::online()
        .map(|cpu| cpu.preemptions.load(Ordering::Relaxed))
        .sum()
}

/// Who sleeps for a time wakes after it, and not long after.
pub(super) fn sleepers_wake_in_time(machine: &Machine) -> Outcome {
    let latest = AtomicU64::new(0);
    in_threads(
        2 * machine.cpus,
        |_| None,
        |i| {
            for turn in 0..3 {
                let ms = 5 + (i as u64 * 7 + turn * 13) % 40;
                let start = time::now();
                sched::sleep_ms(ms);
                let took = time::now() - start;
                check!(took >= ms * 1_000_000, "{ms} ms took {took} ns");
                latest.fetch_max(took - ms * 1_000_000, Ordering::Relaxed);
            }
            Ok(())
        },
    )?;
    let latest = latest.load(Ordering::Relaxed) / 1_000_000;
    check!(latest < 5000, "somebody slept {latest} ms longer");
    Ok(Passed::Says(format!("at most {latest} ms late")))
}

/// A file of zeros.
pub(super) struct Zeros;

impl MappingOps for Zeros {
    fn read_folio(&self, _index: u64, pages: &mut [u8]) -> Result<(), FileError> {
        pages.fill(0);
        Ok(())
    }
    fn writepage(&self, _index: u64, _pages: &[u8]) -> Result<(), FileError> {
        Ok(())
    }
}

pub(super) static ZEROS: Zeros = Zeros;

/// Who waits for a folio's lock sleeps, so that his CPU is free, until it is given back; and so does who waits for an address space's.
pub(super) fn locks_put_threads_to_sleep(machine: &Machine) -> Outcome {
    const SLEEPERS: usize = 4;
    let mm = machine.mm;
    let file = Mapping::new(mm, &ZEROS, 4).map_err(|why| why.to_string())?;
    let folio = file.get(1).map_err(|why| why.to_string())?;
    let lock = mm.folio_lock(&folio);
    let (threads, got) = (
        [const { AtomicPtr::new(null_mut()) }; SLEEPERS],
        AtomicU64::new(0),
    );
    let mut handles = Vec::with_capacity(SLEEPERS);
    for place in &threads {
        let (folio, got) = (&folio, &got);
        let run = move || {
            place.store(thread::current().as_ptr(), Ordering::Release);
            let _lock = mm.folio_lock(folio);
            got.fetch_add(1, Ordering::AcqRel)
        };
        // SAFETY: what it borrows lives until it has been joined, below.
        let handle = unsafe { thread::spawn_unchecked("sleeper", None, run) };
        handles.push(handle.map_err(|why| why.to_string())?);
    }
    let asleep = || {
        threads.iter().all(|place| {
            // SAFETY: the thread is not joined yet, so its descriptor is there.
            let thread = unsafe { place.load(Ordering::Acquire).as_ref() };
            thread.is_some_and(|thread| thread.state() == State::Asleep)
        })
    };
    let slept = wait("all sleep for the lock", asleep);
    sched::sleep_ms(30);
    let (still, early) = (asleep(), got.load(Ordering::Acquire));
    let woken = park::WOKEN.load(Ordering::Relaxed);
    drop(lock);
    handles.into_iter().map(JoinHandle::join).for_each(drop);
    let woken = park::WOKEN.load(Ordering::Relaxed) - woken;
    slept?;
    check!(still && early == 0, "{early} had a lock that was held");
    check!(got.load(Ordering::Acquire) == SLEEPERS as u64);
    check!(woken >= SLEEPERS as u64, "{woken} were woken");
    drop(folio);
    drop(file);

    // A word that has changed already is not slept on.
    let word: &'static AtomicU32 = &WORD;
    let value = word.load(Ordering::Acquire);
    let late = thread::spawn("late", move || {
        Platform::park(&Metal, word, value.wrapping_add(1));
        0
    });
    let late = late.map_err(|why| why.to_string())?;
    let came_back = wait("who came too late to sleep", || late.is_done());
    park::unpark_all(word);
    late.join();
    came_back?;

    // One address space: faults of many threads, which read-lock it, between areas that come and go.
    let space = Space::new(mm, 1).map_err(|why| why.to_string())?;
    let at = space
        .mmap(None, 64 * PAGE, VmFlags::READ_WRITE, Map::Anon)
        .map_err(|why| why.to_string())?;
    let sleeps = park::SLEPT.load(Ordering::Relaxed);
    in_threads(
        3 * machine.cpus,
        |_| None,
        |i| {
            let mut random = Random::new(i as u64 + 5);
            for _ in 0..60 {
                let own = space
                    .mmap(None, 4 * PAGE, VmFlags::READ_WRITE, Map::Anon)
                    .map_err(|why| why.to_string())?;
                with_space(&space, || {
                    for address in [own, own + 3 * PAGE, at + random.below(64) as u64 * PAGE] {
                        let place: *const AtomicU64 =
                            core::ptr::with_exposed_provenance(address as usize);
                        // SAFETY: mapped to be read and written, by atomics only.
                        unsafe { &*place }.fetch_add(1, Ordering::Relaxed);
                    }
                });
                space.munmap(own, 4 * PAGE).map_err(|why| why.to_string())?;
            }
            Ok(())
        },
    )?;
    let sleeps = park::SLEPT.load(Ordering::Relaxed) - sleeps;
    let mut sum = 0;
    for page in 0..64 {
        let mut word = [0; 8];
        space
            .read(at + page * PAGE, &mut word)
            .map_err(|why| why.to_string())?;
        sum += u64::from_le_bytes(word);
    }
    check!(
        sum == 180 * machine.cpus as u64,
        "{sum} of {} were counted",
        180 * machine.cpus
    );
    drop(space);
    check!(ledger(machine).balanced);
    Ok(Passed::Says(format!(
        "{sleeps} sleeps for an address space"
    )))
}

/// What threads of these tests sleep on.
static WORD: AtomicU32 = AtomicU32::new(0);

/// An NMI wakes who sleeps on a word: not itself, but soon.
pub(super) fn nmis_wake_threads(_machine: &Machine) -> Outcome {
    fn on_nmi() {
        WORD.fetch_add(1, Ordering::AcqRel);
        Platform::unpark_all(&Metal, &WORD);
    }
    let (seen, done) = (AtomicU64::new(0), AtomicBool::new(false));
    let noted = park::FROM_NMI.load(Ordering::Relaxed);
    let (count, end) = (&seen, &done);
    let sleeper = move || {
        let mut last = WORD.load(Ordering::Acquire);
        while !end.load(Ordering::Acquire) {
            Platform::park(&Metal, &WORD, last);
            let now = WORD.load(Ordering::Acquire);
            if now != last {
                last = now;
                count.fetch_add(1, Ordering::AcqRel);
            }
        }
        0
    };
    // SAFETY: joined below.
    let handle = unsafe { thread::spawn_unchecked("sleeper", None, sleeper) }
        .map_err(|why| why.to_string())?;
    traps::set_on_nmi(Some(on_nmi));
    let mut result = Ok(());
    for turn in 1..=10 {
        let waits = || handle.thread().state() == State::Asleep;
        result = result
            .and_then(|()| wait("it sleeps", waits))
            .and_then(|()| {
                let target = turn % percpu::online().count();
                apic::send_nmi(percpu::of(target));
                wait("it was woken", || {
                    seen.load(Ordering::Acquire) >= turn as u64
                })
            });
    }
    time::delay_us(10_000);
    traps::set_on_nmi(None);
    done.store(true, Ordering::Release);
    while !handle.is_done() {
        WORD.fetch_add(1, Ordering::AcqRel);
        park::unpark_all(&WORD);
        sched::relax();
    }
    handle.join();
    result?;
    let noted = park::FROM_NMI.load(Ordering::Relaxed) - noted;
    check!(noted > 0, "no NMI found a sleeper");
    Ok(Passed::Says(format!("{noted} sleepers found by NMIs")))
}

/// Threads that are moved between CPUs have what they allocated, and free it wherever they are.
pub(super) fn memory_moves_with_threads(machine: &Machine) -> Outcome {
    const TURNS: usize = 400;
    let mm = machine.mm;
    let (moves, on_other) = (AtomicU64::new(0), AtomicU64::new(0));
    in_threads(
        4 * machine.cpus,
        |_| None,
        |i| {
            let mut random = Random::new(i as u64 + 3);
            let mut held = Vec::with_capacity(8);
            for turn in 0..TURNS {
                let size = 16 << random.below(8);
                let object = mm
                    .kmalloc(size, GFP_KERNEL)
                    .map_err(|why| why.to_string())?;
                let order = random.below(3);
                let page = mm
                    .alloc_pages(GFP_KERNEL, order)
                    .map_err(|why| why.to_string())?;
                let stamp = (i << 32 | turn) as u64;
                // SAFETY: ours, that long.
                unsafe {
                    object.cast::<u64>().add(size / 8 - 1).write(stamp);
                    mm.page_address(page).cast::<u64>().write(stamp);
                }
                held.push((object, size, page, stamp, here()));
                match random.below(40) {
                    0 => sched::sleep_ms(1),
                    // Wherever the scheduler would have it, for a while.
                    20 => {
                        let cpu = random.below(machine.cpus);
                        sched::bind(Some(cpu));
                        check!(here() == cpu, "bound to {cpu}, found on {}", here());
                    }
                    21 => sched::bind(None),
                    1..10 => drop(sched::yield_now()),
                    _ => {}
                }
                if held.len() == held.capacity() || turn == TURNS - 1 {
                    for (object, size, page, stamp, cpu) in held.drain(..) {
                        on_other.fetch_add(u64::from(cpu != here()), Ordering::Relaxed);
                        // SAFETY: the same; freed once.
                        unsafe {
                            let seen = [
                                object.cast::<u64>().add(size / 8 - 1).read(),
                                mm.page_address(page).cast::<u64>().read(),
                            ];
                            mm.kfree(object);
                            mm.free_pages(page);
                            check!(seen == [stamp; 2], "{seen:x?} in what was {stamp:x}");
                        }
                    }
                }
            }
            moves.fetch_add(
                thread::current().moves.load(Ordering::Relaxed),
                Ordering::Relaxed,
            );
            Ok(())
        },
    )?;
    let (moves, on_other) = (
        moves.load(Ordering::Relaxed),
        on_other.load(Ordering::Relaxed),
    );
    check!(
        machine.cpus == 1 || on_other > 0,
        "nothing was freed on another CPU, {moves} moves"
    );
    check!(ledger(machine).balanced);
    Ok(Passed::Says(format!(
        "{moves} moves, {on_other} things freed on another CPU"
    )))
}

/// Of many threads that live for a moment nothing is left: stacks and descriptors go back.
pub(super) fn threads_come_and_go(machine: &Machine) -> Outcome {
    const THREADS: usize = 300;
    let rest = || {
        quiet(machine);
        settled(&ledger(machine))
    };
    let (before, alive) = (rest(), thread::alive());
    let ran = AtomicU64::new(0);
    let mut ids = Vec::with_capacity(THREADS);
    for round in 0..THREADS / 20 {
        let mut handles = Vec::with_capacity(20);
        for i in 0..20u64 {
            let ran = &ran;
            let run = move || {
                ran.fetch_add(1, Ordering::AcqRel);
                i * 3
            };
            // SAFETY: joined below.
            let handle = unsafe { thread::spawn_unchecked("short", None, run) };
            handles.push(handle.map_err(|why| why.to_string())?);
        }
        // Some are waited for in the order in which they came, some the other way round.
        if round % 2 == 1 {
            handles.reverse();
        }
        let mut sum = 0;
        for handle in handles {
            ids.push(handle.thread().id());
            sum += handle.join();
        }
        check!(sum == 570, "the threads of round {round} said {sum}");
    }
    ids.sort_unstable();
    ids.dedup();
    check!(
        ids.len() == THREADS,
        "{} numbers for {THREADS} threads",
        ids.len()
    );
    // Nobody waits for this one.
    drop(thread::spawn("alone", || 0).map_err(|why| why.to_string())?);
    wait("all are gone", || thread::alive() == alive)?;
    drop(ids);
    let after = rest();
    check!(ran.load(Ordering::Acquire) == THREADS as u64);
    check!(
        after == before,
        "{before} pages were free or metadata, {after} are"
    );
    Ok(Passed::Says(format!(
        "{THREADS} threads, {} in all",
        thread::spawned()
    )))
}
