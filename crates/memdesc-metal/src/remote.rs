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
use crate::{apic, paging};

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

/// Does what other CPUs want of this one. Any context but an NMI.
pub(crate) fn serve() {
    let me = percpu::this();
    // Acquire pairs with the Release of who asked: the range is there.
    if me.wanted.load(Ordering::Acquire) == me.done.load(Ordering::Relaxed) {
        return;
    }
    // Not interrupted by itself, between taking the flag and having flushed.
    interrupts::without_interrupts(|| {
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

/// Asks all other CPUs that run, and waits until they have done it.
fn ask(flush: bool) {
    // Pairs with the fence in `serve`, and with that of a CPU that comes up: what was stored before is seen after it.
    fence(Ordering::SeqCst);
    let me = percpu::pin();
    let others = || percpu::online().filter(move |cpu| cpu.cpu() != me);
    let mut targets = [0; percpu::MAX_CPUS];
    for cpu in others() {
        if flush {
            cpu.flush.store(true, Ordering::Release);
        }
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
    ask(false);
}

/// After this no CPU remembers translations of these addresses. Not in an NMI.
pub(crate) fn flush(start: u64, end: u64) {
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
    ask(true);
    SHOOTDOWN.locked.store(false, Ordering::Release);
    percpu::unpin();
}
