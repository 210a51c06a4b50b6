//! Where a CPU is, for a machine that hangs: somebody outside sends a byte to the first serial port and then an NMI to all CPUs. The handler of each sees the byte,
//! which nobody reads, and says once what its CPU was at and how it came there.

use core::sync::atomic::{AtomicU32, Ordering};

use x86_64::instructions::port::Port;

use crate::{log, percpu, traps};

/// The first serial port's line status; a byte has come.
const LINE_STATUS: u16 = 0x3fd;
const DATA_READY: u8 = 1;

/// CPUs that have said it.
static SAID: AtomicU32 = AtomicU32::new(0);

/// In an NMI's handler, which struck what was here: says so if somebody wants to know.
pub(crate) fn say_if_asked(rip: u64, frame_pointer: usize) {
    // SAFETY: reading it changes nothing but the error bits, which nobody looks at.
    let status: u8 = unsafe { Port::new(LINE_STATUS).read() };
    let cpu = percpu::this().cpu();
    if status & DATA_READY == 0 || SAID.fetch_or(1 << cpu, Ordering::Relaxed) & 1 << cpu != 0 {
        return;
    }
    let mut frames = [0; 16];
    let n = traps::backtrace(frame_pointer, &mut frames);
    log::insist(format_args!("CPU {cpu}: at {rip:#018x}"));
    for at in &frames[..n] {
        log::insist(format_args!("CPU {cpu}: called from {at:#018x}"));
    }
}
