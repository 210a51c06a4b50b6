//! What one CPU asks of the others: a full barrier, and to forget translations.
//!
//! Who asks raises `wanted` of each other CPU, sends it an interrupt, and waits until its `done` has come as far. A CPU serves what is wanted of it when the
//! interrupt comes, or, with interrupts off, in every loop in which it waits for something ([`serve`]): so two CPUs that ask each other with interrupts off
//! do not wait for ever, nor does one that asks while another waits for its lock.
//!
//! Lock order: the lock of a shootdown is the last one taken; who waits for it serves.

use core::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};

use x86_64::instructions::interrupts;

use crate::percpu::{self, PerCpu};
use crate::{apic, paging, users};

/// One range is being forgotten at a time.
struct Shootdown {
    locked: AtomicBool,
    start: AtomicU64,
    end: AtomicU64,
}

static SHOOTDOWN: Shootdown = Shootdown {
    locked: AtomicBool::new(false),
    start: AtomicU64::new(0),
    end: AtomicU64::new(0),
};

/// Shootdowns, and barriers, that were asked for.
pub(crate) static SHOOTDOWNS: AtomicU64 = AtomicU64::new(0);
pub(crate) static BARRIERS: AtomicU64 = AtomicU64::new(0);
/// CPUs that were asked, over all of them.
pub(crate) static ASKED: AtomicU64 = AtomicU64::new(0);

/// Does what other CPUs want of this one. Any context but an NMI.
pub(crate) fn serve() {
    let is_wanted = |me: &PerCpu| {
        // Acquire pairs with the Release of who asked: the range is there.
        me.wanted.load(Ordering::Acquire) != me.done.load(Ordering::Relaxed)
    };
    // Of another CPU, if the thread is moved just now: then this one's interrupt does what is wanted of it.
    if !is_wanted(percpu::this()) {
        return;
    }
    // Not interrupted by itself, between taking the flag and having flushed; nor moved.
    interrupts::without_interrupts(|| {
        let me = percpu::this();
        let wanted = me.wanted.load(Ordering::Acquire);
        if me.flush.swap(false, Ordering::AcqRel) {
            let start = SHOOTDOWN.start.load(Ordering::Relaxed);
            paging::flush_local(start, SHOOTDOWN.end.load(Ordering::Relaxed));
        }
        fence(Ordering::SeqCst);
        // Release pairs with the Acquire in `ask`: it is done.
        me.done.fetch_max(wanted, Ordering::Release);
    });
}

/// Asks all other CPUs that run, or those with this address space, and waits until they have done it.
fn ask(flush: bool, asid: Option<u64>) {
    // Pairs with the fence in `serve`, and with that of a CPU that comes up: what was stored before is seen after it.
    fence(Ordering::SeqCst);
    let me = percpu::pin();
    let has = move |cpu: &PerCpu| {
        // SeqCst: pairs with that of a CPU that loads an address space.
        let loaded = cpu.asid.load(Ordering::SeqCst);
        asid.is_none_or(|asid| loaded == asid || loaded == users::ANY_SPACE)
    };
    let others = || percpu::online().filter(move |cpu| cpu.cpu() != me && has(cpu));
    let mut targets = [0; percpu::MAX_CPUS];
    for cpu in others() {
        if flush {
            cpu.flush.store(true, Ordering::Release);
        }
        ASKED.fetch_add(1, Ordering::Relaxed);
        targets[cpu.cpu()] = cpu.wanted.fetch_add(1, Ordering::AcqRel) + 1;
        apic::send(cpu, apic::CALL_VECTOR);
    }
    for cpu in (0..percpu::nr_cpus()).map(percpu::of) {
        wait(cpu, targets[cpu.cpu()]);
    }
    fence(Ordering::SeqCst);
    percpu::unpin();
}

fn wait(cpu: &PerCpu, target: u64) {
    while cpu.done.load(Ordering::Acquire) < target {
        serve();
        core::hint::spin_loop();
    }
}

/// After this every CPU has gone through a full barrier. Not in an NMI.
pub(crate) fn heavy_barrier() {
    BARRIERS.fetch_add(1, Ordering::Relaxed);
    ask(false, None);
}

/// After this no CPU remembers translations of these addresses. Not in an NMI.
pub(crate) fn flush(start: u64, end: u64) {
    shoot_down(start, end, None);
}

/// The same of an address space: CPUs that do not run it remember nothing of it.
pub(crate) fn flush_space(asid: u64, start: u64, end: u64) {
    shoot_down(start, end, Some(asid));
}

fn shoot_down(start: u64, end: u64, asid: Option<u64>) {
    SHOOTDOWNS.fetch_add(1, Ordering::Relaxed);
    percpu::pin();
    // Acquire and Release: one shootdown after the other.
    while SHOOTDOWN.locked.swap(true, Ordering::Acquire) {
        serve();
        core::hint::spin_loop();
    }
    SHOOTDOWN.start.store(start, Ordering::Relaxed);
    SHOOTDOWN.end.store(end, Ordering::Relaxed);
    paging::flush_local(start, end);
    ask(true, asid);
    SHOOTDOWN.locked.store(false, Ordering::Release);
    percpu::unpin();
}
