//! What the firmware's tables say: which CPUs there are (MADT), and which memory and which CPU is of which node (SRAT). ACPI 6.5, 5.2.
//!
//! Read here, in few lines: the `acpi` crate wants a nightly compiler (6.1.1), or is a pre-release (7.0.0) in which an SRAT's entries are read amiss.

use arrayvec::ArrayVec;

use crate::log;
use crate::paging::{self, phys_to_virt};
use crate::percpu::MAX_CPUS;

/// Ranges of memory with a node.
pub(crate) const MAX_AFFINITIES: usize = 32;
/// No table is that long.
const MAX_LENGTH: usize = 1 << 20;
/// What every table starts with; its length is at byte 4.
const HEADER: usize = 36;

/// Memory of a node.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Affinity {
    /// The first byte.
    pub(crate) start: u64,
    /// One past the last.
    pub(crate) end: u64,
    /// The node.
    pub(crate) node: u8,
}

/// A CPU.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cpu {
    /// Its number at the interrupt controllers.
    pub(crate) apic_id: u32,
    /// Its node.
    pub(crate) node: u8,
}

/// What was found.
#[derive(Clone, Debug, Default)]
pub(crate) struct Topology {
    /// Usable CPUs, in the firmware's order.
    pub(crate) cpus: ArrayVec<Cpu, MAX_CPUS>,
    /// CPUs that there was no room for.
    pub(crate) dropped: usize,
    /// Memory of nodes; empty where there is only one.
    pub(crate) memory: ArrayVec<Affinity, MAX_AFFINITIES>,
    /// Where the interrupt controller of devices is, the one of the first interrupts.
    pub(crate) ioapic: Option<u64>,
    /// Nodes of CPUs, by their numbers.
    nodes: ArrayVec<(u32, u8), MAX_CPUS>,
}

/// Why a table cannot be read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Unreadable {
    /// It does not begin as it should.
    Signature,
    /// Its bytes do not add up to 0.
    Checksum,
    /// It is too short for what it should hold, or longer than any table is.
    Length,
    /// It is where no memory can be.
    Address,
    /// No memory for the page tables of where it lies.
    Unmapped,
}

/// Bytes of physical memory, mapped if they are not yet.
///
/// # Safety
///
/// There is memory, which nobody writes to as long as the tables are read.
unsafe fn bytes(at: u64, length: usize) -> Result<&'static [u8], Unreadable> {
    let end = at.checked_add(length as u64);
    let end = end.filter(|&end| end <= paging::direct_map_end());
    paging::map_direct(at, end.ok_or(Unreadable::Address)?).map_err(|_| Unreadable::Unmapped)?;
    // SAFETY: mapped, and the caller's promise.
    Ok(unsafe { core::slice::from_raw_parts(phys_to_virt(at), length) })
}

fn adds_up(bytes: &[u8]) -> Result<(), Unreadable> {
    let sum = bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
    if sum == 0 {
        Ok(())
    } else {
        Err(Unreadable::Checksum)
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let four = bytes.get(at..at + 4).and_then(|b| b.try_into().ok());
    four.map_or(0, u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

/// A table as a whole, and its signature.
///
/// # Safety
///
/// As for [`bytes`]: another table leads here.
unsafe fn table(at: u64) -> Result<(&'static [u8], &'static [u8]), Unreadable> {
    // SAFETY: the caller's promise.
    let length = u32_at(unsafe { bytes(at, HEADER)? }, 4) as usize;
    if !(HEADER..=MAX_LENGTH).contains(&length) {
        return Err(Unreadable::Length);
    }
    // SAFETY: the same; the table says how long it is.
    let table = unsafe { bytes(at, length)? };
    adds_up(table)?;
    Ok((&table[..4], table))
}

/// Reads the tables; empty without any. While boot memory is open.
#[unsafe(link_section = ".init.text")]
pub(crate) fn read(rsdp: u64) -> Topology {
    let mut found = Topology::default();
    if rsdp == 0 {
        log!("acpi: the loader knows of no tables");
        return found;
    }
    // SAFETY: the loader says that they are there.
    if let Err(why) = unsafe { read_all(rsdp, &mut found) } {
        log!("acpi: tables cannot be read: {why:?}");
    }
    found
}

/// # Safety
///
/// The tables start there.
#[unsafe(link_section = ".init.text")]
unsafe fn read_all(rsdp: u64, found: &mut Topology) -> Result<(), Unreadable> {
    // SAFETY: the caller's promise, and the table's of where the others are; so for all below.
    let root = unsafe { bytes(rsdp, 36)? };
    if !root.starts_with(b"RSD PTR ") {
        return Err(Unreadable::Signature);
    }
    adds_up(&root[..20])?;
    // Revision 0 has the table of 32-bit addresses only.
    let (list, entry) = match root[15] {
        0 => (u64::from(u32_at(root, 16)), 4),
        _ => (u64_at(root, 24), 8),
    };
    // SAFETY: as above.
    let (_, list) = unsafe { table(list)? };
    for pointer in list[HEADER..].chunks_exact(entry) {
        let at = if entry == 4 {
            u64::from(u32_at(pointer, 0))
        } else {
            u64_at(pointer, 0)
        };
        // SAFETY: as above.
        match unsafe { table(at) } {
            Ok((b"APIC", madt)) => read_madt(madt.get(HEADER + 8..).unwrap_or(&[]), found),
            Ok((b"SRAT", srat)) => read_srat(srat.get(HEADER + 12..).unwrap_or(&[]), found),
            Ok(_) => {}
            Err(why) => log!("acpi: table at {at:#x}: {why:?}"),
        }
    }
    found.set_nodes();
    Ok(())
}

/// Visits the entries of a table: one byte of type, one of length, then what the type says.
fn for_each_entry(mut bytes: &[u8], mut visit: impl FnMut(u8, &[u8])) {
    while let [kind, length, ..] = *bytes {
        let length = usize::from(length);
        if length < 2 || length > bytes.len() {
            log!("acpi: an entry is {length} bytes long, the rest is left alone");
            return;
        }
        let (entry, rest) = bytes.split_at(length);
        visit(kind, entry);
        bytes = rest;
    }
}

/// The entries of a MADT (5.2.12): the CPUs.
#[unsafe(link_section = ".init.text")]
fn read_madt(bytes: &[u8], found: &mut Topology) {
    for_each_entry(bytes, |kind, entry| {
        let (apic_id, flags) = match (kind, entry.len()) {
            (0, 8..) => (u32::from(entry[3]), u32_at(entry, 4)),
            (1, 12..) if u32_at(entry, 8) == 0 => {
                found.ioapic = Some(u64::from(u32_at(entry, 4)));
                return;
            }
            (9, 16..) => (u32_at(entry, 4), u32_at(entry, 8)),
            _ => return,
        };
        // Enabled, and reachable with the eight bits that our interrupts have. Once: what starts a CPU would reset one that runs.
        let is_known = found.cpus.iter().any(|cpu| cpu.apic_id == apic_id);
        if flags & 1 != 0
            && apic_id < 255
            && !is_known
            && found.cpus.try_push(Cpu { apic_id, node: 0 }).is_err()
        {
            found.dropped += 1;
        }
    });
}

/// The entries of an SRAT (5.2.16): whose node is which.
#[unsafe(link_section = ".init.text")]
fn read_srat(bytes: &[u8], found: &mut Topology) {
    for_each_entry(bytes, |kind, entry| match (kind, entry.len()) {
        // A CPU, its number in 8 bits.
        (0, 16..) if u32_at(entry, 4) & 1 != 0 => {
            let high = u32::from_le_bytes([0, entry[9], entry[10], entry[11]]);
            found.set_node(u32::from(entry[3]), u32::from(entry[2]) | high);
        }
        // The same in 32.
        (2, 24..) if u32_at(entry, 12) & 1 != 0 => {
            found.set_node(u32_at(entry, 8), u32_at(entry, 4))
        }
        // Memory that is there, and not such as might be plugged in.
        (1, 40..) if u32_at(entry, 28) & 3 == 1 && u64_at(entry, 16) > 0 => {
            let affinity = Affinity {
                start: u64_at(entry, 8),
                end: u64_at(entry, 8).saturating_add(u64_at(entry, 16)),
                node: u32_at(entry, 2).min(255) as u8,
            };
            if found.memory.try_push(affinity).is_err() {
                log!("acpi: too many ranges in the SRAT");
            }
        }
        _ => {}
    });
}

impl Topology {
    /// This CPU runs, so it is one of them, whatever the tables say.
    pub(crate) fn include(&mut self, apic_id: u32) {
        if self.cpus.iter().any(|cpu| cpu.apic_id == apic_id) {
            return;
        }
        if self.cpus.is_full() {
            self.cpus.pop();
            self.dropped += 1;
        }
        self.cpus.insert(0, Cpu { apic_id, node: 0 });
        self.set_nodes();
    }

    fn set_node(&mut self, apic_id: u32, node: u32) {
        let node = node.min(255) as u8;
        // The SRAT may come before the MADT.
        if self.nodes.try_push((apic_id, node)).is_err() {
            log!("acpi: too many CPUs in the SRAT");
        }
    }

    fn set_nodes(&mut self) {
        for &(apic_id, node) in &self.nodes {
            for cpu in self.cpus.iter_mut().filter(|cpu| cpu.apic_id == apic_id) {
                cpu.node = node;
            }
        }
    }
}
