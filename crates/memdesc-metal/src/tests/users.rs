//! Tests of address spaces, through the machine's own walks of the tables: what is touched comes, what is shared is copied, what is unmapped is gone.

use alloc::format;
use alloc::string::{String, ToString};
use core::sync::atomic::{AtomicU64, Ordering};

use memdesc::PAGE_SIZE;
use memdesc::mmap::{Map, VmFlags};

use super::{Machine, Outcome, Passed, Random, ledger, on_all};
use crate::check;
use crate::traps::probe;
use crate::users::{self, Space, with_space};

const PAGE: u64 = PAGE_SIZE as u64;

fn space(machine: &Machine, asid: u64) -> Result<Space, String> {
    Space::new(machine.mm, asid).map_err(|why| why.to_string())
}

fn anon(space: &Space, pages: u64, flags: VmFlags) -> Result<u64, String> {
    space
        .mmap(None, pages * PAGE, flags, Map::Anon)
        .map_err(|why| why.to_string())
}

/// Reads a word of the address space that runs.
///
/// # Safety
///
/// It may be read.
unsafe fn read(at: u64) -> u64 {
    let at: *const u64 = core::ptr::with_exposed_provenance(at as usize);
    // SAFETY: the caller's promise.
    unsafe { at.read_volatile() }
}

/// Writes one.
///
/// # Safety
///
/// It may be written, and nobody else does.
unsafe fn write(at: u64, value: u64) {
    let at: *mut u64 = core::ptr::with_exposed_provenance_mut(at as usize);
    // SAFETY: the caller's promise.
    unsafe { at.write_volatile(value) }
}

/// Pages come when they are touched, zero, one for each fault; pages of 2 MiB where they are welcome.
pub(super) fn memory_comes_on_demand(machine: &Machine) -> Outcome {
    const PAGES: u64 = 100;
    let space = space(machine, 1)?;
    let at = anon(&space, PAGES, VmFlags::READ_WRITE)?;
    let before = users::FAULTS.load(Ordering::Relaxed);
    with_space(&space, || {
        for page in 0..PAGES {
            // SAFETY: mapped to be read and written, and nobody else knows it.
            unsafe {
                check!(read(at + page * PAGE + 8) == 0, "page {page} is not zero");
                write(at + page * PAGE, page);
            }
        }
        for page in 0..PAGES {
            // SAFETY: as above.
            let seen = unsafe { read(at + page * PAGE) };
            check!(seen == page, "page {page} holds {seen}");
        }
        check!(
            !probe((at + PAGES * PAGE) as usize),
            "what is not mapped can be read"
        );
        Ok(())
    })?;
    let faults = users::FAULTS.load(Ordering::Relaxed) - before;
    check!(space.rss().anon == PAGES, "{:?}", space.rss());
    check!(
        faults > PAGES && faults <= 2 * PAGES + 1,
        "{faults} faults for {PAGES} pages"
    );
    let huge = anon(&space, 1024, VmFlags::READ_WRITE.with(VmFlags::HUGE))?;
    let inner = huge.next_multiple_of(512 * PAGE);
    let before = users::FAULTS.load(Ordering::Relaxed);
    with_space(&space, || {
        for page in 0..512 {
            // SAFETY: as above.
            unsafe { write(inner + page * PAGE, page) };
        }
    });
    let huge_faults = users::FAULTS.load(Ordering::Relaxed) - before;
    check!(huge_faults == 1, "{huge_faults} faults for a page of 2 MiB");
    // What the machine wrote is in the page that the memory manager says is there.
    let Some((folio, page)) = space.page_at(inner + 7 * PAGE) else {
        return Err("no page where one was written".to_string());
    };
    // SAFETY: the page is held by the reference, and nobody writes to it.
    let seen = unsafe { space.mm().page_address(page).cast::<u64>().read() };
    check!(
        seen == 7 && folio.order() == 9,
        "{page:?} of order {} holds {seen}",
        folio.order()
    );
    drop(folio);
    drop(space);
    check!(ledger(machine).balanced);
    Ok(Passed::Says(format!(
        "{faults} faults for {PAGES} pages, {huge_faults} for 2 MiB"
    )))
}

/// After a fork both see what was there, and each its own writes only.
pub(super) fn a_fork_copies_on_write(machine: &Machine) -> Outcome {
    const PAGES: u64 = 50;
    let parent = space(machine, 1)?;
    let at = anon(&parent, PAGES, VmFlags::READ_WRITE)?;
    let fill = |start: u64, step: usize| {
        for page in (0..PAGES).step_by(step) {
            // SAFETY: mapped to be written, and nobody else runs the address space.
            unsafe { write(at + page * PAGE, start + page) };
        }
    };
    let holds = |who: &str, page: u64, wanted: u64| -> Result<(), String> {
        // SAFETY: mapped to be read.
        let seen = unsafe { read(at + page * PAGE) };
        check!(
            seen == wanted,
            "page {page} of the {who} holds {seen}, not {wanted}"
        );
        Ok(())
    };
    with_space(&parent, || fill(1000, 1));
    let child = parent.fork(2).map_err(|why| why.to_string())?;
    with_space(&child, || {
        (0..PAGES).try_for_each(|page| holds("child", page, 1000 + page))?;
        fill(2000, 2);
        (0..PAGES).try_for_each(|page| {
            holds(
                "child",
                page,
                page + if page % 2 == 0 { 2000 } else { 1000 },
            )
        })
    })?;
    with_space(&parent, || {
        (0..PAGES).try_for_each(|page| holds("parent", page, 1000 + page))?;
        fill(3000, 3);
        Ok::<(), String>(())
    })?;
    with_space(&child, || {
        (0..PAGES).try_for_each(|page| {
            holds(
                "child",
                page,
                page + if page % 2 == 0 { 2000 } else { 1000 },
            )
        })
    })?;
    drop(parent);
    with_space(&child, || holds("child", 1, 1001))?;
    drop(child);
    check!(ledger(machine).balanced);
    Ok(Passed::Ok)
}

/// All CPUs run one address space, touch the same pages first, and count in them together: no count is lost.
pub(super) fn threads_share_a_space(machine: &Machine) -> Outcome {
    const PAGES: u64 = 200;
    const TURNS: usize = 2000;
    let space = space(machine, 1)?;
    let at = anon(&space, PAGES, VmFlags::READ_WRITE)?;
    on_all(|cpu| {
        let mut random = Random::new(cpu as u64 + 9);
        with_space(&space, || {
            for _ in 0..TURNS {
                let place = at + random.below(PAGES as usize) as u64 * PAGE;
                let counter: *const AtomicU64 = core::ptr::with_exposed_provenance(place as usize);
                // SAFETY: mapped to be read and written, by atomics only.
                unsafe { &*counter }.fetch_add(1, Ordering::Relaxed);
            }
        });
        Ok(())
    })?;
    let mut sum = 0;
    with_space(&space, || {
        for page in 0..PAGES {
            // SAFETY: mapped, and nobody writes any more.
            sum += unsafe { read(at + page * PAGE) };
        }
    });
    let wanted = (TURNS * machine.cpus) as u64;
    check!(sum == wanted, "{sum} of {wanted} were counted");
    check!(space.rss().anon <= PAGES, "{:?}", space.rss());
    drop(space);
    check!(ledger(machine).balanced);
    Ok(Passed::Ok)
}

/// What one CPU unmaps, or makes read-only, no other one reaches any more, though it did before.
pub(super) fn what_is_unmapped_is_gone(machine: &Machine) -> Outcome {
    const PAGES: u64 = 32;
    let space = space(machine, 1)?;
    let (arrived, stage) = (AtomicU64::new(0), AtomicU64::new(0));
    let at = anon(&space, PAGES, VmFlags::READ_WRITE)?;
    let cpus = machine.cpus as u64;
    let wait = |value: &AtomicU64, wanted: u64| {
        crate::smp::wait_until(|| value.load(Ordering::Acquire) >= wanted);
    };
    on_all(|cpu| {
        with_space(&space, || {
            // What is wrong is said at the end: the others wait for all.
            let mut wrong = None;
            for page in 0..PAGES {
                if cpu == 0 {
                    // SAFETY: mapped to be written.
                    unsafe { write(at + page * PAGE, page + 1) };
                }
                arrived.fetch_add(1, Ordering::AcqRel);
                wait(&arrived, cpus * (3 * page + 1));
                // SAFETY: mapped to be read.
                let seen = unsafe { read(at + page * PAGE) };
                arrived.fetch_add(1, Ordering::AcqRel);
                wait(&arrived, cpus * (3 * page + 2));
                let mut unmapped = Ok(());
                if cpu == 0 {
                    unmapped = space.munmap(at + page * PAGE, PAGE);
                    stage.store(page + 1, Ordering::Release);
                }
                wait(&stage, page + 1);
                let reached = probe((at + page * PAGE) as usize);
                arrived.fetch_add(1, Ordering::AcqRel);
                wait(&arrived, cpus * (3 * page + 3));
                if unmapped.is_err() || seen != page + 1 || reached {
                    wrong.get_or_insert((page, seen, reached, unmapped));
                }
            }
            match wrong {
                Some((page, seen, reached, unmapped)) => Err(format!(
                    "page {page} held {seen}, munmap said {unmapped:?}, can it be read still: {reached}"
                )),
                None => Ok(()),
            }
        })
    })?;
    check!(space.rss().anon == 0, "{:?}", space.rss());
    drop(space);
    check!(ledger(machine).balanced);
    Ok(Passed::Ok)
}

/// Every CPU has an address space of its own, which forks and ends again and again.
pub(super) fn every_cpu_forks(machine: &Machine) -> Outcome {
    const PAGES: u64 = 20;
    on_all(|cpu| {
        let cpu = cpu as u64;
        let mut parent = space(machine, 100 + cpu)?;
        let at = anon(&parent, PAGES, VmFlags::READ_WRITE)?;
        with_space(&parent, || {
            for page in 0..PAGES {
                // SAFETY: mapped to be written, and only this CPU runs it.
                unsafe { write(at + page * PAGE, cpu << 32 | page) };
            }
        });
        for turn in 0..10u64 {
            let child = parent.fork(200 + cpu).map_err(|why| why.to_string())?;
            with_space(&child, || {
                for page in 0..PAGES {
                    // SAFETY: the same.
                    let seen = unsafe { read(at + page * PAGE) };
                    let wanted = cpu << 32 | if page == 0 { turn } else { page };
                    check!(
                        seen == wanted,
                        "page {page} holds {seen:#x} in turn {turn}, not {wanted:#x}"
                    );
                }
                // SAFETY: the same.
                unsafe { write(at, cpu << 32 | (turn + 1)) };
                Ok(())
            })?;
            // The child lives on.
            parent = child;
        }
        Ok(())
    })?;
    check!(ledger(machine).balanced);
    Ok(Passed::Ok)
}
