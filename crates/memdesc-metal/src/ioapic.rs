//! The interrupt controller of devices, for two purposes: to make the interval timer's interrupt an NMI, as Linux's first NMI watchdog did, since a machine with one
//! CPU has nobody else who could strike it in the middle of something; and for the interrupt of a PCI device.
//!
//! Registers: Intel 82093AA; the interval timer is on pin 2, where the firmware's tables put interrupt 0.

use core::sync::atomic::{AtomicPtr, Ordering};

use x86_64::instructions::interrupts;
use x86_64::instructions::port::Port;

use crate::paging::{self, MapError};
use crate::percpu::PerCpu;

const TIMER_PIN: u32 = 2;
const REDIRECTION: u32 = 0x10;
const NMI: u32 = 0b100 << 8;
const MASKED: u32 = 1 << 16;
const WINDOW: usize = 0x10;
/// The interval timer counts so often in a second.
const PIT_HZ: u32 = 1_193_182;

static REGISTERS: AtomicPtr<u8> = AtomicPtr::new(core::ptr::null_mut());

/// Maps it, where the firmware says that it is.
pub(crate) fn init(phys: u64) -> Result<(), MapError> {
    REGISTERS.store(paging::map_device(1, phys)?, Ordering::Relaxed);
    Ok(())
}

fn write(register: u32, value: u32) {
    let base = REGISTERS.load(Ordering::Relaxed);
    interrupts::without_interrupts(|| {
        // SAFETY: the device's page, as the caller has seen; the one register chooses what the other one is.
        unsafe {
            base.cast::<u32>().write_volatile(register);
            base.wrapping_add(WINDOW)
                .cast::<u32>()
                .write_volatile(value);
        }
    });
}

/// Strikes a CPU so often in a second, until [`stop`]. Is there something that could?
pub(crate) fn strike(cpu: &PerCpu, hz: u32) -> bool {
    if REGISTERS.load(Ordering::Relaxed).is_null() {
        return false;
    }
    let count = (PIT_HZ / hz).clamp(1, 0xffff);
    // SAFETY: the first channel of the interval timer, which nobody else uses: it counts down again and again.
    unsafe {
        Port::<u8>::new(0x43).write(0b0011_0100);
        Port::<u8>::new(0x40).write(count as u8);
        Port::<u8>::new(0x40).write((count >> 8) as u8);
    }
    let register = REDIRECTION + 2 * TIMER_PIN;
    write(register + 1, cpu.apic_id.load(Ordering::Relaxed) << 24);
    write(register, NMI);
    true
}

/// Has a device's interrupt on this input, one that is held until the device has been asked why, come to a CPU as this vector. Is there a controller?
pub(crate) fn route(input: u32, vector: u8, cpu: &PerCpu) -> bool {
    const LEVEL: u32 = 1 << 15;
    if REGISTERS.load(Ordering::Relaxed).is_null() {
        return false;
    }
    let register = REDIRECTION + 2 * input;
    write(register + 1, cpu.apic_id.load(Ordering::Relaxed) << 24);
    // Active when high, which the tables of QEMU's firmware say of the inputs that PCI has.
    write(register, u32::from(vector) | LEVEL);
    true
}

/// No more of it.
pub(crate) fn stop() {
    if !REGISTERS.load(Ordering::Relaxed).is_null() {
        write(REDIRECTION + 2 * TIMER_PIN, MASKED);
    }
}
