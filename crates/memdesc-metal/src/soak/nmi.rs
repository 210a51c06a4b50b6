//! NMIs that allocate, free and read under RCU: sent from one CPU to another, and by the interval timer through the interrupt controller of devices.

use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use memdesc::Mm;

use super::NODES;
use crate::platform::Metal;
use crate::tests::{Random, nmi};
use crate::{apic, ioapic, memory, percpu, smp, time, traps};

/// Strikes in a second, by the timer.
const STRIKES_HZ: u32 = 997;
const AIM_NS: u64 = 1_000_000_000;

/// Handlers do nothing; how many of them run.
static QUIET: AtomicBool = AtomicBool::new(true);
static INSIDE: AtomicU32 = AtomicU32::new(0);
/// When the timer is to strike another CPU.
static AIM: AtomicU64 = AtomicU64::new(0);
/// What readers in handlers saw wrong.
static WRONG: AtomicU64 = AtomicU64::new(0);

fn on_nmi() {
    INSIDE.fetch_add(1, Ordering::SeqCst);
    if !QUIET.load(Ordering::SeqCst)
        && let Some(mm) = memory::mm()
    {
        nmi::on_nmi();
        let me = percpu::this();
        let n = me.nmis.load(Ordering::Relaxed) as usize;
        if NODES.look(mm, n, 50).is_some() {
            WRONG.fetch_add(1, Ordering::Relaxed);
        }
        if n.is_multiple_of(8) {
            // There may be no memory for it here and now.
            let _ = NODES.replace(mm, n / 8 + me.cpu(), n as u64);
        }
    }
    INSIDE.fetch_sub(1, Ordering::SeqCst);
}

pub(super) fn start() {
    traps::set_on_nmi(Some(on_nmi));
    quiet(false);
}

/// Whether handlers do nothing from here on. None does anything any more when this comes back.
pub(super) fn quiet(is_so: bool) {
    QUIET.store(is_so, Ordering::SeqCst);
    smp::wait_until(|| !is_so || INSIDE.load(Ordering::SeqCst) == 0);
}

/// No more of them; what they kept is given back.
pub(super) fn end(mm: &Mm<Metal>) {
    quiet(true);
    ioapic::stop();
    // None is on its way any more.
    time::delay_us(20_000);
    traps::set_on_nmi(None);
    nmi::give_back(mm);
}

/// What handlers saw that was not so.
pub(super) fn wrong() -> u64 {
    WRONG.load(Ordering::Relaxed) + nmi::WRONG.load(Ordering::Relaxed)
}

/// What they got.
pub(super) fn got() -> u64 {
    nmi::GOT.load(Ordering::Relaxed)
}

/// The timer strikes one CPU after the other, a second each.
pub(super) fn aim(now: u64, cpus: usize) {
    if now >= AIM.load(Ordering::Relaxed) {
        AIM.store(now + AIM_NS, Ordering::Relaxed);
        let cpu = (now / AIM_NS) as usize % cpus;
        ioapic::strike(percpu::of(cpu), STRIKES_HZ);
    }
}

/// Strikes another CPU.
pub(super) fn strike_another(dice: &mut Random, me: usize, cpus: usize) {
    let other = dice.below(cpus);
    if other != me {
        apic::send_nmi(percpu::of(other));
    }
}
