//! The memory manager of this machine: how it comes up, its periodic work, and what its log says about memory.

use core::fmt;
use core::ops::Range;
use core::sync::atomic::{AtomicBool, Ordering};

use arrayvec::ArrayVec;
use memdesc::rcu::Rcu;
use memdesc::{
    AddressInfo, Config, Heap, InitError, MAX_ORDER, MemRange, Mm, PAGE_SIZE, Pfn, PhysAddr,
    Reserved, ReservedRange, TAIL_WORDS_ORDER,
};
use spin::Once;

use crate::apic::HZ;
use crate::boot::{AP_BASE, KERNEL_BASE, image};
use crate::log;
use crate::paging::{self, DIRECT_MAP, VMALLOC_SIZE, VMALLOC_START};
use crate::percpu::{self, PerCpu};
use crate::platform::{self, Metal};
use crate::pvh::{BootInfo, Kind};
use crate::ranges::Ranges;
use crate::{balloon, soak, worker};

/// The memory manager, and with it `alloc`'s collections.
#[global_allocator]
static HEAP: Heap<Metal> = Heap::new();

/// It, once it is there.
pub(crate) fn mm() -> Option<&'static Mm<Metal>> {
    HEAP.get()
}

/// Where the firmware has been before us: below this, memory may hold anything.
const FIRMWARE_END: u64 = 4 << 30;

/// Is the memory that the memory map will lie in zero? So it is if whoever started the machine says that its memory is fresh
/// (`memory=fresh`), and the firmware was never there.
fn is_zeroed(boot: &BootInfo, ranges: &[MemRange]) -> bool {
    let length = |r: &&MemRange| r.end.0 - r.start.0;
    let longest = ranges.iter().max_by_key(length);
    boot.value("memory") == Some("fresh") && longest.is_some_and(|r| r.start.0 >= FIRMWARE_END)
}

/// What is in use when memory is taken over.
static IN_USE: Once<ArrayVec<ReservedRange, 8>> = Once::new();

/// What is in use when memory is taken over: the page that other CPUs start in, the image by its pieces, the page tables behind it, up to here, and the
/// module.
#[unsafe(link_section = ".init.text")]
fn in_use(tables_end: u64, module: Option<&Range<u64>>) -> &'static [ReservedRange] {
    let image = image();
    let phys = |virt: u64| virt - KERNEL_BASE;
    let (module_start, module_end) = module.map_or((0, 0), |module| (module.start, module.end));
    let pieces = [
        (AP_BASE, AP_BASE + PAGE_SIZE as u64, Reserved::Other),
        (
            phys(image.start),
            phys(image.text_end),
            Reserved::KernelText,
        ),
        (
            phys(image.text_end),
            phys(image.init_start),
            Reserved::KernelData,
        ),
        (phys(image.init_start), phys(image.end), Reserved::Other),
        (phys(image.end), tables_end, Reserved::KernelData),
        (module_start, module_end, Reserved::Other),
    ];
    let ranges = pieces.into_iter().filter(|(start, end, _)| start < end);
    let ranges = ranges.map(|(start, end, what)| ReservedRange {
        start: PhysAddr(start),
        end: PhysAddr(end),
        what,
    });
    IN_USE.call_once(|| ranges.collect())
}

/// Gives back what was only used to come up (`free_initmem`): the page that CPUs start in, and the pieces of the image that are used once, which are mapped in
/// the direct map only from here on.
///
/// # Safety
///
/// No CPU will start any more, nor is any in what is given back, or on the stack in it.
pub(crate) unsafe fn free_init(mm: &Mm<Metal>) {
    let image = image();
    if let Err(why) = paging::unmap_image(image.init_start, image.end) {
        log!("initmem: {why:?}");
        return;
    }
    let pieces = [
        ("SMP trampoline", AP_BASE, AP_BASE + PAGE_SIZE as u64),
        (
            "unused kernel image (initmem)",
            image.init_start - KERNEL_BASE,
            image.end - KERNEL_BASE,
        ),
    ];
    for (what, start, end) in pieces {
        let pages = ((end - start) / PAGE_SIZE as u64) as u32;
        let first = Pfn((start / PAGE_SIZE as u64) as u32);
        // SAFETY: the caller's promise.
        match unsafe { mm.free_reserved(first, pages) } {
            Ok(pages) => log_freed(what, pages),
            Err(why) => log!("{what} memory is kept: {why}"),
        }
    }
}

/// As Linux says it (`free_reserved_area`).
pub(crate) fn log_freed(what: &str, pages: u32) {
    let kib = pages as usize * PAGE_SIZE / 1024;
    log!("Freeing {what} memory: {kib}K");
}

/// Takes over memory, of which that up to `tables_end` behind the image is in use, and the module.
///
/// # Errors
///
/// The memory manager's.
#[unsafe(link_section = ".init.text")]
pub(crate) fn init(
    boot: &BootInfo,
    ranges: &[MemRange],
    tables_end: u64,
    module: Option<&Range<u64>>,
) -> Result<&'static Mm<Metal>, InitError> {
    let is_on = |name| boot.value(name) == Some("1");
    let config = Config {
        memory_is_zeroed: is_zeroed(boot, ranges),
        preempt_rt: boot.has("rt"),
        init_on_free: is_on("init_on_free"),
        page_poison: is_on("page_poison"),
        reserved: in_use(tables_end, module),
        ..soak::config(
            boot,
            Config {
                // Where there is somebody to report to.
                page_reporting: balloon::find().is_some(),
                ..Config::default()
            },
        )
    };
    let mm = HEAP.init(Metal, &config, ranges)?;
    log!(
        "memory map: {}",
        if config.memory_is_zeroed {
            "the memory is fresh, no word of it was cleared"
        } else {
            "cleared, since the firmware may have used the memory"
        }
    );
    Ok(mm)
}

/// What free pages are filled with, if they are: four bytes of it (`virtio_balloon_config.poison_val`).
pub(crate) fn free_pattern() -> Option<u32> {
    const PAGE_POISON: u32 = 0xaaaa_aaaa;
    let boot = crate::pvh::info()?;
    let is_on = |name| boot.value(name) == Some("1");
    match (is_on("init_on_free"), is_on("page_poison")) {
        (true, _) => Some(0),
        (_, true) => Some(PAGE_POISON),
        _ => None,
    }
}

static KICKED: AtomicBool = AtomicBool::new(false);

/// There is work: see [`work`]. Any context.
pub(crate) fn kick() {
    KICKED.store(true, Ordering::Release);
}

/// The timer's tick, in its interrupt: grace periods are pushed on, the rest waits for a thread.
pub(crate) fn timer_tick() {
    let me = percpu::this();
    let ticks = me.ticks.load(Ordering::Relaxed) + 1;
    me.ticks.store(ticks, Ordering::Relaxed);
    if let Some(mm) = mm() {
        mm.rcu().advance();
    }
    worker::tick(me);
}

fn is_due(me: &PerCpu) -> bool {
    let ticks = me.ticks.load(Ordering::Relaxed);
    ticks - me.ticks_worked.load(Ordering::Relaxed) >= HZ
}

/// Is there something to do for a CPU's worker?
pub(crate) fn has_work(me: &PerCpu) -> bool {
    is_due(me) || KICKED.load(Ordering::Relaxed)
}

/// The periodic work of the calling CPU, if it is due, and what was kicked. In a thread that is bound to it.
pub(crate) fn work() {
    let Some(mm) = mm() else {
        return;
    };
    balloon::work();
    let me = percpu::this();
    if is_due(me) {
        me.ticks_worked
            .store(me.ticks.load(Ordering::Relaxed), Ordering::Relaxed);
        mm.tick();
    } else if KICKED.swap(false, Ordering::AcqRel) {
        mm.rcu_work();
    }
}

/// What an address is, for a report of a fault.
pub(crate) fn explain(address: usize) -> impl fmt::Display {
    struct Explained(usize);
    impl fmt::Display for Explained {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            let address = self.0 as u64;
            let image = image();
            match mm().map(|mm| mm.explain_address(self.0)) {
                Some(AddressInfo::NotVmalloc) | None => {}
                Some(info) => return write!(f, "{info}"),
            }
            f.write_str(match address {
                0..4096 => "a null pointer",
                a if a < 1 << 47 => "an address of users",
                a if (DIRECT_MAP..VMALLOC_START).contains(&a) => "the direct map",
                a if (VMALLOC_START..VMALLOC_START + VMALLOC_SIZE).contains(&a) => {
                    "vmalloc's range"
                }
                a if a >= image.start && a < image.text_end => "the image's text",
                a if a >= image.text_end && a < image.rodata_end => "the image's constants",
                a if a >= image.rodata_end && a < image.init_start => "the image's data",
                a if a >= image.init_start && a < image.end => "what the image used to come up",
                _ => "nobody's address",
            })
        }
    }
    Explained(address)
}

/// Is there at most so much memory that every page can be looked at while booting?
pub(crate) fn is_small(ranges: &[MemRange]) -> bool {
    const SMALL: u64 = 4 << 30;
    ranges.iter().map(|r| r.end.0 - r.start.0).sum::<u64>() <= SMALL
}

/// How many words of the memory map are not zero, as they are read from it, and how many largest blocks the memory has. Looks at every page.
pub(crate) fn words_written(ranges: &[MemRange]) -> (u64, u64) {
    let (mut words, mut blocks) = (0, 0);
    let first = |at: PhysAddr| (at.0 / PAGE_SIZE as u64) as u32;
    let Some(map) = platform::words() else {
        return (0, 0);
    };
    for range in ranges {
        let (mut at, end) = (first(range.start), first(range.end));
        blocks += u64::from((end - at).div_ceil(1 << MAX_ORDER));
        while at < end {
            // SAFETY: the memory manager lives for ever.
            let Some(found) = (unsafe { map.lookup(Pfn(at)) }) else {
                at += 1;
                continue;
            };
            // A small block has a word for each page, a larger one only for its head.
            let order = found.word.order();
            words += if order <= TAIL_WORDS_ORDER {
                1 << order
            } else {
                1
            };
            at = found.head.0 + (1 << order);
        }
    }
    (words, blocks)
}

/// `BIOS-e820` as Linux prints it.
#[unsafe(link_section = ".init.text")]
pub(crate) fn log_firmware_map(boot: &BootInfo) {
    log!("BIOS-provided physical RAM map:");
    for entry in &boot.memory {
        let last = entry.end.wrapping_sub(1);
        let kind = match entry.kind {
            Kind::Ram => "usable",
            Kind::Reserved => "reserved",
            Kind::Acpi => "ACPI data",
            Kind::Nvs => "ACPI NVS",
            Kind::Unusable => "unusable",
            Kind::Other => "of a type that is not known",
        };
        log!("BIOS-e820: [mem {:#018x}-{last:#018x}] {kind}", entry.start);
    }
    if boot.dropped > 0 {
        log!("BIOS-e820: {} more than there is room for", boot.dropped);
    }
}

/// What the memory manager was given.
#[unsafe(link_section = ".init.text")]
pub(crate) fn log_ranges(ranges: &Ranges) {
    log!("Early memory node ranges");
    for range in ranges {
        let last = range.end.0 - 1;
        log!(
            "  node {:3}: [mem {:#018x}-{last:#018x}]",
            range.node,
            range.start.0
        );
    }
}

/// Zones, nodes and totals.
pub(crate) fn log_memory(mm: &Mm<Metal>) {
    let kib = |pages: u64| pages * (PAGE_SIZE as u64 / 1024);
    mm.zoneinfo(|zone| {
        let [min, low, high, _] = zone.watermarks;
        log!(
            "Node {} {:<8} present {:>9}K, managed {:>9}K; watermarks min {}K low {}K high {}K",
            zone.node,
            zone.kind.name(),
            kib(zone.present),
            kib(zone.managed),
            kib(min),
            kib(low),
            kib(high),
        );
    });
    let ledger = mm.ledger();
    let free = ledger.free + ledger.untouched + ledger.pcp;
    let image = image();
    let hundredths = ledger.metadata_bytes() * 10_000 / (ledger.given * PAGE_SIZE as u64);
    log!(
        "Memory: {}K/{}K available ({}K kernel code, {}K constants, {}K data, {}K init; {}K metadata, {}.{:02} % of memory: {}K memory map, {}K other)",
        kib(free),
        kib(ledger.given),
        (image.text_end - image.start) / 1024,
        (image.rodata_end - image.text_end) / 1024,
        (image.init_start - image.rodata_end) / 1024,
        (image.end - image.init_start) / 1024,
        ledger.metadata_bytes() / 1024,
        hundredths / 100,
        hundredths % 100,
        ledger.memmap_bytes / 1024,
        (ledger.descriptor_bytes + ledger.other_metadata_bytes) / 1024,
    );
}
