//! memdesc as the memory manager of a bare-metal x86-64 machine.
//!
//! An image that a PVH loader starts (`qemu-system-x86_64 -kernel`), that takes over all memory, starts all CPUs, and tests itself on them. It prints to the
//! first serial port and ends the machine through `isa-debug-exit`. With a module (`-initrd`) it replays that instead: a recording of a Linux kernel's allocators.
//!
//! | command line | what |
//! |---|---|
//! | `memory=fresh` | the machine's memory is zero where the firmware was not |
//! | `words=count` | the words written at boot are counted, however large the machine is |
//! | `rt` | the locks of the memory manager sleep (`PREEMPT_RT`) |
//! | `init_on_free=1`, `page_poison=1` | free pages are filled |
//! | `tests=WORD`, `suite=none` | only the tests with the word in their names; without the core's own |
//! | `soak=SECONDS`, `seed=NUMBER` | everything at once for so long ([`soak`]) |
//! | `balloon` | what a hypervisor's balloon does, step by step with who looks at it from outside |
//! | `rcu=PERCENT` | a replay defers that share of the frees of objects |
//! | `crash=stack`, `thread`, `double-free`, `hang` | what is reported when a stack overflows, a thread's does, an object is freed twice, a CPU hangs |
//!
//! What happens in order is in [`metal_start`]; each step is a room.
#![no_std]
#![no_main]

extern crate alloc;

mod acpi;
mod apic;
mod balloon;
mod boot;
mod exit;
mod gdt;
mod ioapic;
mod log;
mod memory;
mod module;
mod paging;
mod park;
mod pci;
mod percpu;
mod platform;
mod process;
mod pvh;
mod ranges;
mod remote;
mod replay;
mod sched;
mod smp;
mod soak;
mod tests;
mod thread;
mod time;
mod traps;
mod users;
mod virtio;
mod vmap;
mod whereabouts;
mod worker;

use core::panic::PanicInfo;
use core::sync::atomic::Ordering;

use crate::boot::KERNEL_BASE;
use crate::exit::{Exit, exit};
use crate::module::Module;
use crate::ranges::Ranges;

/// Where `boot.s` comes out: 64 bits, interrupts off, the first GiB mapped.
#[unsafe(no_mangle)]
#[unsafe(link_section = ".init.text")]
extern "C" fn metal_start(start_info: u32) -> ! {
    percpu::init(0);
    time::start();
    log::init();
    gdt::init(gdt::first_stacks());
    traps::init();
    // SAFETY: from the loader's EBX, and nothing has been written to memory but the image's own.
    let Some(boot) = (unsafe { pvh::read(start_info) }) else {
        panic!(
            "no PVH start info at {start_info:#x}: start this with a PVH loader (qemu-system-x86_64 -kernel)"
        );
    };
    log!("memdesc {} on metal", env!("CARGO_PKG_VERSION"));
    log!("Command line: {}", boot.cmdline());
    memory::log_firmware_map(boot);

    let (topology, ranges, tables_end) = match take_stock(boot) {
        Ok(found) => found,
        Err(why) => panic!("the machine's memory cannot be mapped: {why:?}"),
    };
    memory::log_ranges(&ranges);
    let module = module::find(boot);

    platform::init();
    let before = time::tsc();
    let mm = match memory::init(boot, &ranges, tables_end, module.as_ref()) {
        Ok(mm) => mm,
        Err(why) => panic!("memory cannot be taken over: {why}"),
    };
    let cycles = time::tsc() - before;
    // SAFETY: `find` has it from the loader, and memory was taken over with it in use.
    let module = module.map(|bytes| unsafe { Module::new(mm, bytes) });
    // From here on this is a thread, which may sleep for locks.
    percpu::this().online.store(true, Ordering::SeqCst);
    apic::start_timer();
    x86_64::instructions::interrupts::enable();
    log!("memory taken over in {} us", time::cycles_to_us(cycles));
    // Looking at every page of a large machine takes longer than all that is done here.
    let written = memory::is_small(&ranges) || boot.value("words") == Some("count");
    let written = written.then(|| memory::words_written(&ranges));
    if let Some((words, blocks)) = written {
        log!("memory map: {words} words written, for {blocks} largest blocks");
    }
    memory::log_memory(mm);

    if let Err(why) = vmap::init(mm) {
        panic!("no page tables for vmalloc: {why}");
    }
    users::init();
    if let Err(why) = thread::init(mm).and_then(|()| thread::init_idle(mm, 0)) {
        panic!("no memory for threads: {why}");
    }
    sched::start();
    let running = match smp::start(mm, &topology) {
        Ok(running) => running,
        Err(why) => panic!("no stacks for the other CPUs: {why}"),
    };
    log!("smp: {running} of {} CPUs run", percpu::nr_cpus());

    if let Err(why) = balloon::start(mm) {
        log!("virtio-balloon: cannot be used: {why}");
    }

    if let Err(why) = worker::start(mm) {
        panic!("no memory for workers: {why}");
    }

    // The first CPU too runs on a stack with guards from here on.
    let stack = match mm.alloc_kernel_stack(smp::STACK_PAGES, 0) {
        Ok(stack) => stack,
        Err(why) => panic!("no stack for the first CPU: {why}"),
    };
    // SAFETY: just made, and never given back. All that is needed from here on goes with the closure: nobody comes back to the stack that this is on.
    unsafe {
        traps::call_on_stack(stack.top(), move || {
            if running == percpu::nr_cpus() {
                // SAFETY: all CPUs have left what they came up in, and this one its first stack, to which it does not come back.
                memory::free_init(mm);
            } else {
                log!("A CPU may still come up: what it would come up in is kept");
            }
            if let Some(what) = boot.value("crash") {
                tests::crash::crash(mm, what);
            }
            let mut machine = tests::Machine {
                settled: 0,
                ranges,
                mm,
                boot,
                written,
                cpus: running,
            };
            exit(match (module, boot.value("soak")) {
                (Some(module), _) => replay::run(&machine, module),
                (None, Some(seconds)) => soak::run(&mut machine, seconds),
                (None, None) if boot.has("balloon") => tests::balloon::run(&mut machine),
                (None, None) => tests::run(&mut machine),
            });
        });
    }
    exit(Exit::Failure)
}

/// The machine as it is: page tables for all of its memory, its CPUs, the memory that is to be taken over, and where the page tables behind the image end.
#[unsafe(link_section = ".init.text")]
fn take_stock(boot: &pvh::BootInfo) -> Result<(acpi::Topology, Ranges, u64), paging::MapError> {
    let image = boot::image();
    let (start, end) = (image.start - KERNEL_BASE, image.end - KERNEL_BASE);
    let home = boot
        .memory
        .iter()
        .find(|e| e.kind == pvh::Kind::Ram && e.start <= start && end <= e.end);
    let Some(home) = home else {
        panic!("the image lies in what the firmware says is no memory");
    };
    // Up to the module, if the loader has put it behind the image.
    let module = boot.module.map(|(start, _)| start);
    let module = module.filter(|&module| module >= end);
    paging::init_boot_memory(module.map_or(home.end, |module| home.end.min(module)));
    paging::map_image()?;
    for entry in boot.memory.iter().filter(|e| e.kind.is_memory()) {
        paging::map_direct(entry.start, entry.end)?;
    }
    apic::init()?;
    // SAFETY: the image, the stack in it, the direct map and the interrupt controller are mapped in them.
    unsafe { paging::activate() };
    apic::enable();
    percpu::this().apic_id.store(apic::id(), Ordering::Relaxed);
    let (tsc_hz, timer_hz) = time::calibrate(apic::free_running());
    apic::set_timer_hz(timer_hz);
    log!(
        "tsc: {} MHz, timer: {} MHz",
        tsc_hz / 1_000_000,
        timer_hz / 1_000_000
    );

    let mut topology = acpi::read(boot.rsdp);
    topology.include(apic::id());
    if let Some(at) = topology.ioapic {
        ioapic::init(at)?;
    }
    percpu::set_nr_cpus(topology.cpus.len());
    let me = apic::id();
    for cpu in topology.cpus.iter().filter(|cpu| cpu.apic_id == me) {
        percpu::this()
            .node
            .store(usize::from(cpu.node), Ordering::Relaxed);
    }
    log!(
        "acpi: {} CPUs, {} ranges of memory with a node",
        topology.cpus.len(),
        topology.memory.len()
    );
    if topology.dropped > 0 {
        log!(
            "acpi: {} CPUs more than there is room for",
            topology.dropped
        );
    }
    let (end, tables) = paging::close_boot_memory();
    log!(
        "direct map: {tables} page tables, {}",
        if paging::features().gib_pages {
            "pages of 1 GiB"
        } else {
            "pages of 2 MiB"
        }
    );
    let ranges = ranges::usable(&boot.memory, &topology.memory);
    Ok((topology, ranges, end))
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    traps::stop_others();
    log::take_over();
    tests::suite::panicked();
    let (id, name) = thread::on_cpu(percpu::this().cpu());
    log!(
        "PANIC on CPU {} in thread {id} ({name}): {info}",
        percpu::this().cpu()
    );
    traps::log_callers(traps::frame_pointer());
    exit(Exit::Failure)
}
