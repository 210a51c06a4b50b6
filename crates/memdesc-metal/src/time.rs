//! Time: the time stamp counter, whose pace the old interval timer tells.

use core::arch::x86_64::_rdtsc;
use core::sync::atomic::{AtomicU64, Ordering};

use x86_64::instructions::port::Port;

/// The interval timer counts so often in a second.
const PIT_HZ: u64 = 1_193_182;
/// Calibration takes 1/100 s.
const CALIBRATION: u64 = PIT_HZ / 100;

static START: AtomicU64 = AtomicU64::new(0);
static TSC_HZ: AtomicU64 = AtomicU64::new(0);

/// The counter.
pub(crate) fn tsc() -> u64 {
    // SAFETY: every x86-64 CPU has it.
    unsafe { _rdtsc() }
}

/// Time starts.
pub(crate) fn start() {
    START.store(tsc(), Ordering::Relaxed);
}

/// Nanoseconds since [`start`]; 0 before [`calibrate`].
pub(crate) fn now() -> u64 {
    let hz = TSC_HZ.load(Ordering::Relaxed);
    if hz == 0 {
        return 0;
    }
    let cycles = tsc().wrapping_sub(START.load(Ordering::Relaxed));
    (u128::from(cycles) * 1_000_000_000 / u128::from(hz)) as u64
}

/// Waits. Serves other CPUs meanwhile.
pub(crate) fn delay_us(us: u64) {
    let until = now() + us * 1000;
    while now() < until {
        crate::remote::serve();
        core::hint::spin_loop();
    }
}

/// Measures are taken so often; on a busy host some take in what others ran meanwhile, so the shortest counts.
const MEASURES: usize = 8;

/// Measures the counter's pace, and what else `read` counts meanwhile; gives both in a second.
pub(crate) fn calibrate(read: impl Fn() -> u64) -> (u64, u64) {
    let measures = core::iter::repeat_with(|| measure(&read)).take(MEASURES);
    let (cycles, other) = measures.min().unwrap_or((1, 1));
    let hz = cycles * PIT_HZ / CALIBRATION;
    TSC_HZ.store(hz, Ordering::Relaxed);
    (hz, other * PIT_HZ / CALIBRATION)
}

/// What the counter counts while the interval timer counts to [`CALIBRATION`], and what `read` does.
fn measure(read: impl Fn() -> u64) -> (u64, u64) {
    let (mut gate, mut command, mut data) = (
        Port::<u8>::new(0x61),
        Port::<u8>::new(0x43),
        Port::<u8>::new(0x42),
    );
    // SAFETY: the second channel of the interval timer, and the speaker's gate, which nobody else uses.
    unsafe {
        // The gate up, the speaker off; one shot; the count.
        let old = gate.read();
        gate.write((old & !2) | 1);
        command.write(0b1011_0000);
        data.write(CALIBRATION as u8);
        data.write((CALIBRATION >> 8) as u8);
        // The gate down and up starts it.
        let armed = gate.read();
        gate.write(armed & !1);
        gate.write(armed | 1);
        let before = (tsc(), read());
        while gate.read() & 0x20 == 0 {}
        (tsc() - before.0, read().wrapping_sub(before.1))
    }
}

/// So many cycles of the counter, in microseconds.
pub(crate) fn cycles_to_us(cycles: u64) -> u64 {
    let hz = TSC_HZ.load(Ordering::Relaxed).max(1);
    (u128::from(cycles) * 1_000_000 / u128::from(hz)) as u64
}
