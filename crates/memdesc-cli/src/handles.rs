//! The memory manager of a process behind safe calls: [`memdesc_replay::handles`], on a machine of our own.

use std::sync::{Arc, Mutex, PoisonError};

use memdesc::{AllocError, Config, InitError, MemRange, Mm, PAGE_SHIFT, PhysAddr};
use memdesc_host::{Host, HostError};
use memdesc_replay::handles::Handles;
pub(crate) use memdesc_replay::handles::{OwnedBlock, OwnedObject, Purpose};

/// Corruption that the core reported: how often, and the first report.
#[derive(Clone, Debug, Default)]
pub(crate) struct Corruptions(Arc<Mutex<(u64, Option<String>)>>);

impl Corruptions {
    fn add(&self, report: String) {
        let mut seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        seen.0 += 1;
        seen.1.get_or_insert(report);
    }

    pub(crate) fn get(&self) -> (u64, Option<String>) {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

/// Why there is no machine.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MachineError {
    #[error("{0}")]
    Host(#[from] HostError),
    #[error("the memory manager does not come up: {0}")]
    Init(#[from] InitError),
}

/// A machine in a process: memory, CPUs, and the memory manager on them.
pub(crate) struct Machine {
    pub(crate) mm: Mm<Host>,
    pub(crate) corruptions: Corruptions,
    ram: Vec<(u32, u32)>,
}

impl Machine {
    pub(crate) fn new(ranges: &[MemRange], cpus: usize) -> Result<Machine, MachineError> {
        let corruptions = Corruptions::default();
        let reports = corruptions.clone();
        let host = Host::builder()
            .memory(ranges)
            .cpus(cpus)
            .on_corruption(move |report| reports.add(report.to_string()))
            .build()?;
        let config = Config {
            memory_is_zeroed: true,
            ..Config::default()
        };
        let mm = Mm::new(host, &config, ranges)?;
        let page = |at: PhysAddr| (at.0 >> PAGE_SHIFT) as u32;
        let ram = ranges
            .iter()
            .map(|r| (page(r.start), page(r.end)))
            .collect();
        Ok(Machine {
            mm,
            corruptions,
            ram,
        })
    }

    /// The page ranges of memory.
    pub(crate) fn ram(&self) -> impl Iterator<Item = (u32, u32)> + '_ {
        self.ram.iter().copied()
    }

    /// Its memory manager behind safe calls.
    #[inline]
    pub(crate) fn handles(&self) -> Handles<'_, Host> {
        // SAFETY: there is one machine in this program, and who frees an object looks its cache up by the object's own number.
        unsafe { Handles::new(&self.mm) }
    }

    /// These very pages.
    pub(crate) fn claim(
        &self,
        pfn: u32,
        order: usize,
        purpose: Purpose,
    ) -> Result<OwnedBlock, AllocError> {
        self.handles().claim(pfn, order, purpose)
    }

    #[inline]
    pub(crate) fn free(&self, block: OwnedBlock) {
        self.handles().free(block);
    }
}
