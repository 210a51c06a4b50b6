//! The CPU's own interrupt controller (xAPIC, by memory): its timer, and interrupts to other CPUs.
//!
//! Registers and what is in them: Intel SDM, volume 3, chapter "Advanced Programmable Interrupt Controller".

use core::sync::atomic::{AtomicPtr, AtomicU64, Ordering};

use x86_64::instructions::interrupts;
use x86_64::instructions::port::Port;
use x86_64::registers::model_specific::Msr;

use crate::paging::{self, MapError};
use crate::percpu::PerCpu;

/// The timer's vector.
pub(crate) const TIMER_VECTOR: u8 = 0x20;
/// Another CPU wants something.
pub(crate) const CALL_VECTOR: u8 = 0x21;
/// Another CPU has a thread for this one.
pub(crate) const RESCHEDULE_VECTOR: u8 = 0x22;
/// A PCI device has something to say.
pub(crate) const DEVICE_VECTOR: u8 = 0x23;
/// An interrupt that was none.
pub(crate) const SPURIOUS_VECTOR: u8 = 0xff;
/// Ticks in a second.
pub(crate) const HZ: u64 = 100;

const BASE_MSR: u32 = 0x1b;
const ID: usize = 0x20;
const EOI: usize = 0xb0;
const SPURIOUS: usize = 0xf0;
const ICR_LOW: usize = 0x300;
const ICR_HIGH: usize = 0x310;
const LVT_TIMER: usize = 0x320;
const LVT_LINT1: usize = 0x360;
const TIMER_INITIAL: usize = 0x380;
const TIMER_CURRENT: usize = 0x390;
const TIMER_DIVIDE: usize = 0x3e0;

const ENABLED: u32 = 1 << 8;
const PERIODIC: u32 = 1 << 17;
const MASKED: u32 = 1 << 16;
const DIVIDE_BY_16: u32 = 0b0011;
const PENDING: u32 = 1 << 12;
const NMI: u32 = 0b100 << 8;
const INIT: u32 = 0b101 << 8 | 1 << 14;
const STARTUP: u32 = 0b110 << 8 | 1 << 14;

static REGISTERS: AtomicPtr<u8> = AtomicPtr::new(core::ptr::null_mut());
static TIMER_HZ: AtomicU64 = AtomicU64::new(0);

fn read(register: usize) -> u32 {
    let at = REGISTERS.load(Ordering::Relaxed).wrapping_add(register);
    // SAFETY: the device's page, mapped by `init` before anything else is called, and a register in it.
    unsafe { at.cast::<u32>().read_volatile() }
}

fn write(register: usize, value: u32) {
    let at = REGISTERS.load(Ordering::Relaxed).wrapping_add(register);
    // SAFETY: as in `read`; every CPU has registers of its own there.
    unsafe { at.cast::<u32>().write_volatile(value) }
}

/// Maps it, and silences the old interrupt controllers.
pub(crate) fn init() -> Result<(), MapError> {
    // SAFETY: every CPU with 64 bits has this register.
    let base = unsafe { Msr::new(BASE_MSR).read() } & 0x000f_ffff_ffff_f000;
    REGISTERS.store(paging::map_device(0, base)?, Ordering::Relaxed);
    for port in [0x21, 0xa1] {
        // SAFETY: the two controllers' masks.
        unsafe { Port::<u8>::new(port).write(0xff) };
    }
    Ok(())
}

/// Turns the calling CPU's on. NMIs from outside come in on the second pin, as firmware has it.
pub(crate) fn enable() {
    write(LVT_LINT1, NMI);
    write(SPURIOUS, ENABLED | u32::from(SPURIOUS_VECTOR));
}

/// The calling CPU's number here.
pub(crate) fn id() -> u32 {
    read(ID) >> 24
}

/// The interrupt has been taken.
pub(crate) fn end_of_interrupt() {
    write(EOI, 0);
}

/// Has the timer count without interrupting, for calibration; gives what has been counted.
pub(crate) fn free_running() -> impl Fn() -> u64 {
    write(TIMER_DIVIDE, DIVIDE_BY_16);
    write(LVT_TIMER, MASKED | u32::from(TIMER_VECTOR));
    write(TIMER_INITIAL, u32::MAX);
    || u64::from(u32::MAX - read(TIMER_CURRENT))
}

/// The timer counts so often in a second.
pub(crate) fn set_timer_hz(hz: u64) {
    TIMER_HZ.store(hz, Ordering::Relaxed);
}

/// Starts the calling CPU's timer.
pub(crate) fn start_timer() {
    write(TIMER_DIVIDE, DIVIDE_BY_16);
    write(LVT_TIMER, PERIODIC | u32::from(TIMER_VECTOR));
    let count = TIMER_HZ.load(Ordering::Relaxed) / HZ;
    write(TIMER_INITIAL, count.clamp(1, u64::from(u32::MAX)) as u32);
}

/// One command at a time: a tick between the two halves could send one of its own. NMIs send none.
fn command(apic_id: u32, what: u32) {
    interrupts::without_interrupts(|| {
        while read(ICR_LOW) & PENDING != 0 {
            core::hint::spin_loop();
        }
        write(ICR_HIGH, apic_id << 24);
        write(ICR_LOW, what);
    });
}

/// Interrupts a CPU.
pub(crate) fn send(cpu: &PerCpu, vector: u8) {
    command(cpu.apic_id.load(Ordering::Relaxed), u32::from(vector));
}

/// Strikes a CPU with an NMI.
pub(crate) fn send_nmi(cpu: &PerCpu) {
    command(cpu.apic_id.load(Ordering::Relaxed), NMI);
}

/// The first of the messages that start a CPU.
pub(crate) fn send_init(apic_id: u32) {
    command(apic_id, INIT);
}

/// The second and third: it starts at this page of the first MiB.
pub(crate) fn send_startup(apic_id: u32, page: u8) {
    command(apic_id, STARTUP | u32::from(page));
}
