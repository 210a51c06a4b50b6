//! The hypervisor's balloon: `virtio-balloon` (Virtual I/O Device 1.2, 5.5). The device says how many pages it wants, [`work`] puts them into the memory manager's
//! [`Balloon`] or takes them out, and what goes in and out passes by here ([`give_or_take`]) and is told to the device, by page numbers. Large free blocks
//! are reported to it ([`report`]), by address.
//!
//! That the device wants something else comes as an interrupt, by the device's pin and the I/O APIC (QEMU's device has no MSI-X), where the firmware has put
//! it on one of the first sixteen inputs; the device is asked at every tick of a second all the same, so that it works without. Buffers are waited for
//! awake: the device is done before the CPU comes back from the notification, or next to.
//!
//! **Memory runs out**: an allocation that found nothing has the balloon give back ([`Balloon::deflate_on_oom`]), if the device has agreed to that. It is filled again
//! after a pause. One that cannot be filled as far as it is wanted is tried again then, too.
//!
//! **What reported memory holds** is unknown: the device may have it read as zeros, or leave it alone. Where free pages are filled (`init_on_free`, `page_poison`) the
//! device is told with what, and may leave nothing else in them; QEMU then takes none but those of zeros. A device that cannot be told is given no reports.
//!
//! Lock order: the device's lock comes after all locks of the memory manager; what is called with it held allocates nothing.

use core::ptr::NonNull;
use core::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, Ordering};

use bitflags::bitflags;
use memdesc::gfp::GFP_HIGHUSER;
use memdesc::{Balloon, BalloonOp, Mm, NotReported, PAGE_SIZE, Pfn, Reported};
use spin::{Mutex, Once};
use virtio_drivers::queue::VirtQueue;
use virtio_drivers::transport::Transport;
use virtio_drivers::transport::pci::bus::DeviceFunction;
use virtio_drivers::transport::pci::{PciTransport, VIRTIO_VENDOR_ID, VirtioPciError};

use crate::paging::MapError;
use crate::platform::Metal;
use crate::virtio::{self, Machine};
use crate::{apic, ioapic, log, memory, pci, percpu, remote, time};

/// Of a device of this version of the standard, and of one that can be of an older one too.
const DEVICE_IDS: [u16; 2] = [0x1045, 0x1002];

bitflags! {
    /// What a device offers (5.5.3, and 6 for the last).
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    struct Features: u64 {
        /// The device must be told before pages that come out of the balloon are used. They always are.
        const VIRTIO_BALLOON_F_MUST_TELL_HOST = 1 << 0;
        /// There is a queue for statistics.
        const VIRTIO_BALLOON_F_STATS_VQ = 1 << 1;
        /// The balloon may give back by itself when memory is out.
        const VIRTIO_BALLOON_F_DEFLATE_ON_OOM = 1 << 2;
        /// There is a queue for hints of what is free, for a machine that moves.
        const VIRTIO_BALLOON_F_FREE_PAGE_HINT = 1 << 3;
        /// The device wants to know what free pages are filled with.
        const VIRTIO_BALLOON_F_PAGE_POISON = 1 << 4;
        /// There is a queue for reports of what is free.
        const VIRTIO_BALLOON_F_REPORTING = 1 << 5;
        /// The device is not of the time before the standard.
        const VIRTIO_F_VERSION_1 = 1 << 32;
    }
}

/// The device's configuration (5.5.4), by offset.
const NUM_PAGES: usize = 0;
const ACTUAL: usize = 4;
const POISON_VAL: usize = 12;

/// Queues (5.5.2).
const INFLATEQ: u16 = 0;
const DEFLATEQ: u16 = 1;
/// The queue for reports is the last there is. By the standard it is number 4; by QEMU and Linux, which leave out what the device does not have, it may be
/// an earlier one.
const REPORTING_VQ: [u16; 3] = [4, 3, 2];

/// The kind of the capability that leads to the byte which says why the device interrupts (4.1.4.5).
const VIRTIO_PCI_CAP_ISR_CFG: u8 = 3;

/// Page numbers told at once: a page of them. The standard has no bound; Linux tells 256.
const PFNS: usize = PAGE_SIZE / size_of::<u32>();
/// Blocks in a report, as the core has it and QEMU's queue is long.
const REPORTED: usize = 32;
/// Pages that are moved by one call of [`work`].
const CHUNK: u32 = 1 << 14;
/// What could not be moved is tried again after so long.
const PAUSE_NS: u64 = 200_000_000;
/// The device is asked what it wants after so long, if it says nothing.
const POLL_NS: u64 = 1_000_000_000;

/// Why there is no balloon, though there is a device.
#[derive(Debug)]
pub(crate) enum BalloonError {
    /// Its registers cannot be mapped.
    Map(MapError),
    /// It is no device of virtio that can be used.
    Pci(VirtioPciError),
    /// It is older than the standard.
    Legacy,
    /// No memory for its queues, or they are too short, or its configuration is.
    Virtio(virtio_drivers::Error),
    /// No page for page numbers.
    NoMemory,
}

impl core::fmt::Display for BalloonError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            BalloonError::Map(why) => write!(f, "its registers cannot be mapped: {why:?}"),
            BalloonError::Pci(why) => why.fmt(f),
            BalloonError::Legacy => f.write_str("it is older than the standard"),
            BalloonError::Virtio(why) => why.fmt(f),
            BalloonError::NoMemory => f.write_str("no memory"),
        }
    }
}

impl From<virtio_drivers::Error> for BalloonError {
    fn from(why: virtio_drivers::Error) -> BalloonError {
        BalloonError::Virtio(why)
    }
}

/// The device. Fields are dropped in this order: it is reset before its queues go.
struct Device {
    transport: PciTransport,
    inflateq: VirtQueue<Machine, 16>,
    deflateq: VirtQueue<Machine, 16>,
    reporting_vq: Option<(u16, VirtQueue<Machine, REPORTED>)>,
    /// A page for the numbers of pages: only who has the device touches it.
    pfns: NonNull<[u32; PFNS]>,
    /// Pages that the device has, as it was told.
    actual: u32,
}

// SAFETY: the page belongs to the device, and may be touched from any CPU.
unsafe impl Send for Device {}

static DEVICE: Once<Mutex<Device>> = Once::new();
static BALLOON: Once<Balloon<'static, Metal>> = Once::new();
/// The byte that says why the device interrupts; reading it takes the interrupt back.
static ISR: AtomicPtr<u8> = AtomicPtr::new(core::ptr::null_mut());
/// The device wants something, or may.
static CHANGED: AtomicBool = AtomicBool::new(true);
/// A CPU is filling or emptying the balloon.
static WORKING: AtomicBool = AtomicBool::new(false);
/// When to look again.
static NEXT: AtomicU64 = AtomicU64::new(0);
/// Reports are taken.
static REPORTING: AtomicBool = AtomicBool::new(false);
/// Interrupts that said that the device's configuration changed.
pub(crate) static CONFIG_CHANGES: AtomicU64 = AtomicU64::new(0);

/// Is there a device? Before the memory manager is there, too.
pub(crate) fn find() -> Option<DeviceFunction> {
    pci::find(VIRTIO_VENDOR_ID, &DEVICE_IDS)
}

/// Waits until the device has used a buffer that was just put into the queue.
///
/// # Safety
///
/// As for [`VirtQueue::add`]: the buffers may be shared with the device until this returns.
unsafe fn transact<'a, const SIZE: usize>(
    transport: &mut PciTransport,
    index: u16,
    queue: &mut VirtQueue<Machine, SIZE>,
    inputs: &'a [&'a [u8]],
    outputs: &'a mut [&'a mut [u8]],
) -> Result<(), virtio_drivers::Error> {
    // SAFETY: the caller's promise; this returns when the device is through with them.
    let token = unsafe { queue.add(inputs, outputs)? };
    if queue.should_notify() {
        transport.notify(index);
    }
    while !queue.can_pop() {
        remote::serve();
        core::hint::spin_loop();
    }
    // SAFETY: the buffers that were added, in the same order.
    unsafe { queue.pop_used(token, inputs, outputs).map(|_| ()) }
}

impl Device {
    fn new(mm: &'static Mm<Metal>, at: DeviceFunction) -> Result<(Device, Features), BalloonError> {
        pci::enable(at);
        for (phys, length) in pci::memory(at) {
            virtio::map_registers(phys, length).map_err(BalloonError::Map)?;
        }
        let mut transport =
            PciTransport::new::<Machine, _>(&mut pci::root(), at).map_err(BalloonError::Pci)?;
        let offered = Features::from_bits_truncate(transport.read_device_features());
        if !offered.contains(Features::VIRTIO_F_VERSION_1) {
            return Err(BalloonError::Legacy);
        }
        let mut wanted = Features::VIRTIO_BALLOON_F_MUST_TELL_HOST
            | Features::VIRTIO_BALLOON_F_DEFLATE_ON_OOM
            | Features::VIRTIO_BALLOON_F_REPORTING
            | Features::VIRTIO_F_VERSION_1;
        // As Linux's `virtballoon_validate`: what free pages hold matters, or does not, or cannot be kept.
        let poison = memory::free_pattern();
        if poison.is_some() {
            wanted |= Features::VIRTIO_BALLOON_F_PAGE_POISON;
            if !offered.contains(Features::VIRTIO_BALLOON_F_PAGE_POISON) {
                wanted -= Features::VIRTIO_BALLOON_F_REPORTING;
            }
        }
        let features = transport.begin_init(wanted);
        let inflateq = VirtQueue::new(&mut transport, INFLATEQ, false, false)?;
        let deflateq = VirtQueue::new(&mut transport, DEFLATEQ, false, false)?;
        let mut reporting_vq = None;
        if features.contains(Features::VIRTIO_BALLOON_F_REPORTING) {
            let last = REPORTING_VQ
                .into_iter()
                .find(|&index| transport.max_queue_size(index) > 0);
            let index = last.ok_or(virtio_drivers::Error::InvalidParam)?;
            reporting_vq = Some((index, VirtQueue::new(&mut transport, index, false, false)?));
        }
        let page = mm
            .alloc_pages(memdesc::gfp::GFP_KERNEL, 0)
            .ok()
            .and_then(|pfn| NonNull::new(mm.page_address(pfn)));
        let mut device = Device {
            transport,
            inflateq,
            deflateq,
            reporting_vq,
            pfns: page.ok_or(BalloonError::NoMemory)?.cast(),
            actual: 0,
        };
        // Everything is waited for, and a change of the configuration interrupts whatever the queues say.
        device.inflateq.set_dev_notify(false);
        device.deflateq.set_dev_notify(false);
        if let Some((_, queue)) = &mut device.reporting_vq {
            queue.set_dev_notify(false);
        }
        if features.contains(Features::VIRTIO_BALLOON_F_PAGE_POISON) {
            let value = poison.unwrap_or(0);
            device.transport.write_config_space(POISON_VAL, value)?;
        }
        device.transport.finish_init();
        Ok((device, features))
    }

    /// Tells the device of the pages of a block; and how many it has then.
    fn tell(
        &mut self,
        blocks: &[(Pfn, usize)],
        op: BalloonOp,
    ) -> Result<(), virtio_drivers::Error> {
        let mut pages = blocks
            .iter()
            .flat_map(|&(pfn, order)| pfn.0..pfn.0 + (1 << order));
        loop {
            // SAFETY: the device's page, which nobody else has; the device only reads it, and only in `transact`.
            let pfns = unsafe { self.pfns.as_mut() };
            let mut n = 0;
            for (slot, pfn) in pfns.iter_mut().zip(&mut pages) {
                *slot = pfn.to_le();
                n += 1;
            }
            if n == 0 {
                break;
            }
            // SAFETY: the first `n` numbers of the page, as bytes.
            let bytes = unsafe { core::slice::from_raw_parts(pfns.as_ptr().cast::<u8>(), 4 * n) };
            let (index, queue) = match op {
                BalloonOp::Inflate => (INFLATEQ, &mut self.inflateq),
                BalloonOp::Deflate => (DEFLATEQ, &mut self.deflateq),
            };
            // SAFETY: nobody writes to the page until it returns.
            unsafe { transact(&mut self.transport, index, queue, &[bytes], &mut [])? };
            match op {
                BalloonOp::Inflate => self.actual += n as u32,
                // Fewer than went in, if the device did not take some.
                BalloonOp::Deflate => self.actual = self.actual.saturating_sub(n as u32),
            }
        }
        self.transport
            .write_config_space(ACTUAL, self.actual.to_le())
    }

    fn num_pages(&self) -> Result<u32, virtio_drivers::Error> {
        let pages = self.transport.read_config_space::<u32>(NUM_PAGES)?;
        Ok(u32::from_le(pages))
    }
}

/// Starts the device, if the machine has one. Says whether it does.
///
/// # Errors
///
/// It has one, and it cannot be used.
pub(crate) fn start(mm: &'static Mm<Metal>) -> Result<bool, BalloonError> {
    let Some(at) = find() else {
        return Ok(false);
    };
    let (device, features) = Device::new(mm, at)?;
    REPORTING.store(device.reporting_vq.is_some(), Ordering::Relaxed);
    DEVICE.call_once(|| Mutex::new(device));
    let on_oom = features.contains(Features::VIRTIO_BALLOON_F_DEFLATE_ON_OOM);
    let balloon = BALLOON.call_once(|| {
        let balloon = Balloon::new(mm);
        if on_oom {
            balloon.deflate_on_oom()
        } else {
            balloon
        }
    });
    let on_oom = on_oom && mm.register_shrinker(balloon);
    let isr = pci::vendor_capability(at, VIRTIO_PCI_CAP_ISR_CFG)
        .and_then(|phys| virtio::registers(phys, 1));
    let line = isr.and_then(|isr| {
        ISR.store(isr.as_ptr(), Ordering::Release);
        let line = pci::interrupt_line(at)?;
        ioapic::route(line, apic::DEVICE_VECTOR, percpu::of(0)).then_some(line)
    });
    struct Line(Option<u32>);
    impl core::fmt::Display for Line {
        fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
            match self.0 {
                Some(line) => write!(f, "interrupt {line}"),
                None => f.write_str("no interrupt, asked every second"),
            }
        }
    }
    let yes = |yes| if yes { "yes" } else { "no" };
    log!(
        "virtio-balloon {at}: free page reporting {}, deflates when memory is out {}, {}",
        yes(REPORTING.load(Ordering::Relaxed)),
        yes(on_oom),
        Line(line)
    );
    Ok(true)
}

/// The device's interrupt.
pub(crate) fn interrupt() {
    const DEVICE_CONFIGURATION_INTERRUPT: u8 = 1 << 1;
    let isr = ISR.load(Ordering::Acquire);
    if isr.is_null() {
        return;
    }
    // SAFETY: the device's register, mapped for good; reading it has the device let go of its pin.
    let why = unsafe { isr.read_volatile() };
    if why & DEVICE_CONFIGURATION_INTERRUPT != 0 {
        CONFIG_CHANGES.fetch_add(1, Ordering::Relaxed);
        CHANGED.store(true, Ordering::Release);
    }
}

/// The balloon, if there is one.
pub(crate) fn balloon() -> Option<&'static Balloon<'static, Metal>> {
    BALLOON.get()
}

/// Pages that the device wants.
pub(crate) fn wanted() -> u32 {
    let pages = DEVICE.get().map(|device| virtio::lock(device).num_pages());
    pages.and_then(Result::ok).unwrap_or(0)
}

/// Fills or empties the balloon by a piece, if the device wants another size (`update_balloon_size_func`). In a thread that may sleep.
pub(crate) fn work() {
    let Some(balloon) = balloon() else {
        return;
    };
    let is_due = || CHANGED.load(Ordering::Acquire) || time::now() >= NEXT.load(Ordering::Relaxed);
    if !is_due() || WORKING.swap(true, Ordering::Acquire) {
        return;
    }
    CHANGED.store(false, Ordering::Relaxed);
    // Acquire and Release of the flag above: what the device wants is read after it was taken back; a change from here on raises it again.
    let (wanted, has) = (u64::from(wanted()), balloon.pages());
    let missing = wanted.abs_diff(has).min(u64::from(CHUNK)) as u32;
    let moved = if has < wanted {
        balloon.inflate(missing, GFP_HIGHUSER)
    } else {
        balloon.deflate(missing)
    };
    let pause = match (missing, moved) {
        (0, _) => POLL_NS,
        (missing, moved) if moved < missing => PAUSE_NS,
        _ => 0,
    };
    NEXT.store(time::now() + pause, Ordering::Relaxed);
    WORKING.store(false, Ordering::Release);
}

/// Blocks went into the balloon, or are about to come out: the device is told.
pub(crate) fn give_or_take(blocks: &[(Pfn, usize)], op: BalloonOp) {
    let Some(device) = DEVICE.get() else {
        return;
    };
    let mut device = virtio::lock(device);
    if let Err(why) = device.tell(blocks, op) {
        // One buffer at a time, and the device gives each back: it is not what it says.
        log!("virtio-balloon: {op:?} of {} blocks: {why}", blocks.len());
    }
    if op == BalloonOp::Deflate {
        // Memory may be out: not filled again at once.
        NEXT.store(time::now() + PAUSE_NS, Ordering::Relaxed);
    }
}

/// Turns reports off, and on again if the device takes them (`page_reporting_unregister`).
pub(crate) fn set_reporting(on: bool) {
    let takes = DEVICE
        .get()
        .is_some_and(|device| virtio::lock(device).reporting_vq.is_some());
    REPORTING.store(on && takes, Ordering::Relaxed);
}

/// These blocks are free, and in nobody's hands until this returns: the device may have what is behind them (`virtballoon_free_page_report`).
///
/// # Errors
///
/// There is no device that takes them.
pub(crate) fn report(blocks: &[(Pfn, usize)]) -> Result<Reported, NotReported> {
    let device = DEVICE.get().ok_or(NotReported)?;
    if !REPORTING.load(Ordering::Relaxed) {
        return Err(NotReported);
    }
    let mut device = virtio::lock(device);
    let Device {
        transport,
        reporting_vq: Some((index, queue)),
        ..
    } = &mut *device
    else {
        return Err(NotReported);
    };
    for blocks in blocks.chunks(REPORTED) {
        let mut buffers: [&mut [u8]; REPORTED] = core::array::from_fn(|_| &mut [][..]);
        for (buffer, &(pfn, order)) in buffers.iter_mut().zip(blocks) {
            // SAFETY: nobody else has the block until this function returns, and it is mapped; nobody looks at it here.
            *buffer = unsafe {
                core::slice::from_raw_parts_mut(virtio::address(pfn), PAGE_SIZE << order)
            };
        }
        let buffers = &mut buffers[..blocks.len()];
        // SAFETY: the blocks stay with us until it returns.
        unsafe { transact(transport, *index, queue, &[], buffers) }.map_err(|_| NotReported)?;
    }
    // The device need not have taken any.
    Ok(Reported::Unknown)
}
