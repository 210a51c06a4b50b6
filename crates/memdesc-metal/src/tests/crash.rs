//! Accidents, for the reports of them: each ends the machine.

use memdesc::Mm;
use memdesc::gfp::GFP_KERNEL;

use crate::platform::Metal;
use crate::{percpu, smp, thread, traps};

/// Whose stack it is that overflows.
const OWNER: u64 = 4711;

/// Has this accident happen.
pub(crate) fn crash(mm: &'static Mm<Metal>, what: &str) -> ! {
    match what {
        "stack" => overflow(mm),
        "thread" => overflow_in_thread(),
        "double-free" => double_free(mm),
        "hang" => smp::on_all_cpus(&hang),
        _ => {}
    }
    panic!("crash={what} did not end the machine");
}

/// Uses a page of stack for each turn.
fn deeper(turns: usize) -> u8 {
    let page = core::hint::black_box([turns as u8; 4096]);
    if turns == 0 {
        return page[0];
    }
    deeper(turns - 1).wrapping_add(page[turns % 4096])
}

/// Runs over the end of a stack.
fn overflow(mm: &'static Mm<Metal>) {
    if let Ok(stack) = mm.alloc_kernel_stack(4, OWNER) {
        // SAFETY: just made, and nobody else's. It is too small by intention.
        unsafe {
            traps::call_on_stack(stack.top(), || {
                core::hint::black_box(deeper(100));
            });
        }
    }
}

/// A thread does so on its own, on whatever CPU.
fn overflow_in_thread() {
    let deep = thread::spawn("deep", || u64::from(deeper(100)));
    if let Ok(deep) = deep {
        deep.join();
    }
}

/// Frees an object twice.
fn double_free(mm: &'static Mm<Metal>) {
    if let Ok(object) = mm.kmalloc(100, GFP_KERNEL) {
        // SAFETY: none: this is the accident.
        unsafe {
            mm.kfree(object);
            mm.kfree(object);
        }
    }
}

/// The last CPU does nothing any more, not even serve the others; they wait for it.
fn hang(cpu: usize) {
    if cpu == percpu::nr_cpus() - 1 {
        x86_64::instructions::interrupts::disable();
        loop {
            core::hint::spin_loop();
        }
    }
}
