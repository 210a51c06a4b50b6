//! The PCI bus: what is on it, by the two ports of configuration mechanism #1 (PCI Local Bus Specification 3.0, 3.2.2.3.2), which every PC has.
//!
//! Bridges are followed by the numbers that the firmware gave the buses behind them; the firmware's addresses of devices stay.
//!
//! Lock order: the lock of the ports is a leaf, held with interrupts off: one register chooses what the other one is.

use arrayvec::ArrayVec;
use spin::Mutex;
use virtio_drivers::transport::pci::bus::{
    BarInfo, Command, ConfigurationAccess, DeviceFunction, HeaderType, PciRoot,
};
use x86_64::instructions::{interrupts, port::Port};

const CONFIG_ADDRESS: u16 = 0xcf8;
const CONFIG_DATA: u16 = 0xcfc;
const ENABLE: u32 = 1 << 31;
/// In a bridge's configuration: the number of the bus behind it, in bits 8 to 15.
const BUS_NUMBERS: u8 = 0x18;
/// The line of the old interrupt controllers that the firmware has put the device on, and the device's pin: 0 for none.
const INTERRUPT: u8 = 0x3c;
/// Buses that are looked at.
const MAX_BUSES: usize = 32;

static PORTS: Mutex<()> = Mutex::new(());

/// Configuration space, by the ports.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ConfigPorts;

impl ConfigPorts {
    fn access<R>(
        device: DeviceFunction,
        register: u8,
        f: impl FnOnce(&mut Port<u32>, &mut Port<u32>) -> R,
    ) -> R {
        let DeviceFunction {
            bus,
            device,
            function,
        } = device;
        let address = ENABLE
            | u32::from(bus) << 16
            | u32::from(device) << 11
            | u32::from(function) << 8
            | u32::from(register & !3);
        interrupts::without_interrupts(|| {
            let _ports = loop {
                if let Some(ports) = PORTS.try_lock() {
                    break ports;
                }
                crate::remote::serve();
                core::hint::spin_loop();
            };
            let (mut at, mut data) = (Port::new(CONFIG_ADDRESS), Port::new(CONFIG_DATA));
            // SAFETY: the two ports are the bus's, or nobody's; who has the lock has them alone.
            unsafe { at.write(address) };
            f(&mut at, &mut data)
        })
    }
}

impl ConfigurationAccess for ConfigPorts {
    fn read_word(&self, device: DeviceFunction, register: u8) -> u32 {
        // SAFETY: reading what the address says; all ones where there is nothing.
        ConfigPorts::access(device, register, |_, data| unsafe { data.read() })
    }

    fn write_word(&mut self, device: DeviceFunction, register: u8, value: u32) {
        // SAFETY: the device is the caller's.
        ConfigPorts::access(device, register, |_, data| unsafe { data.write(value) });
    }

    unsafe fn unsafe_clone(&self) -> Self {
        ConfigPorts
    }
}

/// The root of the bus.
pub(crate) fn root() -> PciRoot<ConfigPorts> {
    PciRoot::new(ConfigPorts)
}

/// The first device with this vendor and one of these numbers.
pub(crate) fn find(vendor: u16, devices: &[u16]) -> Option<DeviceFunction> {
    let root = root();
    let mut buses: ArrayVec<u8, MAX_BUSES> = ArrayVec::new();
    buses.push(0);
    let mut next = 0;
    while let Some(&bus) = buses.get(next) {
        next += 1;
        for (at, info) in root.enumerate_bus(bus) {
            if info.vendor_id == vendor && devices.contains(&info.device_id) {
                return Some(at);
            }
            if info.header_type == HeaderType::PciPciBridge {
                let behind = (ConfigPorts.read_word(at, BUS_NUMBERS) >> 8) as u8;
                // Each once, in whatever circle they are numbered; more than there is room for are left alone.
                if !buses.contains(&behind) {
                    let _ = buses.try_push(behind);
                }
            }
        }
    }
    None
}

/// Lets a device answer at its addresses and reach memory; the interrupt on its pin too.
pub(crate) fn enable(device: DeviceFunction) {
    let mut root = root();
    let (_, command) = root.get_status_command(device);
    let wanted =
        (command | Command::MEMORY_SPACE | Command::BUS_MASTER) - Command::INTERRUPT_DISABLE;
    root.set_command(device, wanted);
}

/// Where a device's memory is: address and length of each piece.
pub(crate) fn memory(device: DeviceFunction) -> ArrayVec<(u64, u64), 6> {
    let bars = root().bars(device).unwrap_or_default();
    let memory = bars.into_iter().flatten().filter_map(|bar| match bar {
        BarInfo::Memory { address, size, .. } if address != 0 => Some((address, size)),
        _ => None,
    });
    memory.collect()
}

/// Where a capability of the device says that something is: of this kind of the vendor's own, the address of its first byte. (Of virtio: the spec's 4.1.4.)
pub(crate) fn vendor_capability(device: DeviceFunction, kind: u8) -> Option<u64> {
    const VENDOR: u8 = 0x09;
    let root = root();
    let found = root
        .capabilities(device)
        .find(|c| c.id == VENDOR && (c.private_header >> 8) as u8 == kind)?;
    let bar = ConfigPorts.read_word(device, found.offset + 4) as u8;
    let offset = ConfigPorts.read_word(device, found.offset + 8);
    let info = crate::pci::root().bar_info(device, bar).ok()??;
    match info {
        BarInfo::Memory { address, .. } if address != 0 => Some(address + u64::from(offset)),
        _ => None,
    }
}

/// The input of the interrupt controller that a device's interrupt comes to, where the firmware has put it on one of the first sixteen; those go to
/// the old controllers and the new one alike.
pub(crate) fn interrupt_line(device: DeviceFunction) -> Option<u32> {
    let word = ConfigPorts.read_word(device, INTERRUPT);
    let (line, pin) = (word & 0xff, word >> 8 & 0xff);
    (pin != 0 && (1..16).contains(&line)).then_some(line)
}
