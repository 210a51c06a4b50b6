//! A disk for scenarios: remembers the first eight bytes of each page, and makes up what was never written.

use std::sync::atomic::{AtomicU64, Ordering};

use memdesc::filemap::{FileError, MappingOps};

/// A file of so many pages.
pub(super) struct Disk {
    first: Vec<AtomicU64>,
    reads: AtomicU64,
    writes: AtomicU64,
}

impl Disk {
    pub(super) fn new(pages: u64) -> Disk {
        Disk {
            first: (0..pages)
                .map(|page| AtomicU64::new(original(page)))
                .collect(),
            reads: AtomicU64::new(0),
            writes: AtomicU64::new(0),
        }
    }

    pub(super) fn reads(&self) -> u64 {
        self.reads.load(Ordering::Relaxed)
    }

    pub(super) fn writes(&self) -> u64 {
        self.writes.load(Ordering::Relaxed)
    }
}

/// What a page that was never written begins with.
pub(super) fn original(page: u64) -> u64 {
    page << 32
}

impl MappingOps for Disk {
    fn read_folio(&self, index: u64, pages: &mut [u8]) -> Result<(), FileError> {
        self.reads.fetch_add(1, Ordering::Relaxed);
        for (nth, page) in (index as usize..).zip(pages.chunks_mut(4096)) {
            let first = self.first.get(nth).ok_or(FileError::End)?;
            page[..8].copy_from_slice(&first.load(Ordering::Acquire).to_le_bytes());
        }
        Ok(())
    }

    fn writepage(&self, index: u64, pages: &[u8]) -> Result<(), FileError> {
        self.writes.fetch_add(1, Ordering::Relaxed);
        for (nth, page) in (index as usize..).zip(pages.chunks(4096)) {
            let first = self.first.get(nth).ok_or(FileError::End)?;
            // Users may write to the page at this moment: read as they write, eight bytes at once.
            // SAFETY: aligned, and in the page.
            let value = unsafe { page.as_ptr().cast::<u64>().read_volatile() };
            first.store(u64::from_le(value), Ordering::Release);
        }
        Ok(())
    }
}
