//! Lines over the first serial port, each with the time since boot, as the kernel log of Linux has them.
//!
//! Lock order: the port's lock is a leaf, held with interrupts off. Who prints in an NMI tries it, and is lost if it is taken.

use core::fmt::{self, Write};

use spin::{Mutex, MutexGuard};
use uart_16550::Uart16550;
use uart_16550::backend::PioBackend;
use x86_64::instructions::interrupts;

use crate::{percpu, time};

const COM1: u16 = 0x3f8;

struct Serial(Option<Uart16550<PioBackend>>);

static SERIAL: Mutex<Serial> = Mutex::new(Serial(None));

impl Write for Serial {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        if let Some(port) = &mut self.0 {
            for piece in text.split_inclusive('\n') {
                match piece.strip_suffix('\n') {
                    Some(line) => {
                        port.send_bytes_exact(line.as_bytes());
                        port.send_bytes_exact(b"\r\n");
                    }
                    None => port.send_bytes_exact(piece.as_bytes()),
                }
            }
        }
        Ok(())
    }
}

/// Sets the port up. Without one there is no log.
pub(crate) fn init() {
    // SAFETY: the port is the PC's first serial one, and nobody else's.
    let Ok(mut port) = (unsafe { Uart16550::new_port(COM1) }) else {
        return;
    };
    if port.init(uart_16550::Config::default()).is_ok() {
        SERIAL.lock().0 = Some(port);
    }
}

/// Writes a line.
pub(crate) fn line(what: fmt::Arguments<'_>) {
    interrupts::without_interrupts(|| {
        let serial = if percpu::in_nmi() {
            let Some(serial) = SERIAL.try_lock() else {
                return;
            };
            serial
        } else {
            loop {
                if let Some(serial) = SERIAL.try_lock() {
                    break serial;
                }
                crate::remote::serve();
                core::hint::spin_loop();
            }
        };
        write_to(serial, what);
    });
}

fn write_to(mut serial: MutexGuard<'_, Serial>, what: fmt::Arguments<'_>) {
    let us = time::now() / 1000;
    let (s, us) = (us / 1_000_000, us % 1_000_000);
    // The port cannot fail.
    let _ = writeln!(serial, "[{s:5}.{us:06}] {what}");
}

/// Writes a line of a machine that hangs, in an NMI: whoever holds the port's lock for long will not give it back.
pub(crate) fn insist(what: fmt::Arguments<'_>) {
    for _ in 0..10_000_000 {
        if let Some(serial) = SERIAL.try_lock() {
            return write_to(serial, what);
        }
        core::hint::spin_loop();
    }
    take_over();
    line(what);
}

/// A byte that came in, if one did. In a thread.
pub(crate) fn receive() -> Option<u8> {
    interrupts::without_interrupts(|| {
        let mut serial = SERIAL.try_lock()?;
        serial.0.as_mut()?.try_receive_byte().ok()
    })
}

/// The machine is ending: whoever held the port's lock will not give it back.
pub(crate) fn take_over() {
    // SAFETY: all other CPUs have been stopped, or are about to die with us: a garbled line is the worst.
    unsafe { SERIAL.force_unlock() };
}

/// Writes a line to the log.
#[macro_export]
macro_rules! log {
    ($($what:tt)*) => { $crate::log::line(format_args!($($what)*)) };
}
