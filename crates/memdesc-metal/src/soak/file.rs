//! A file that is larger than what is left for it, so that its pages come and go: read and written by calls, by all workers; and its disk.
//!
//! The first word of a page says which page of the file it is, and what was written last. Each page has one worker who writes to it, and that one finds exactly
//! what it wrote, wherever the page was meanwhile: through a call or through a mapping.

use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering};

use memdesc::PAGE_SIZE;
use memdesc::filemap::{FileError, MappingOps};

use super::{Count, Soak, Worker};
use crate::{thread, wrong};

/// Pages that are read more often than others.
const HOT: usize = 512;

/// Remembers the first word of each page, and makes up the others.
pub(crate) struct Disk {
    first: Vec<AtomicU64>,
    /// Words written back that should have been others.
    wrong: AtomicU64,
}

/// Any other word of a page.
fn word_of(page: u64, word: usize) -> u64 {
    (page << 16 | word as u64).wrapping_mul(0x2545_f491_4f6c_dd1d)
}

/// The first word of a page, and the number of another that is wrong.
fn look_at(page: u64, bytes: &[u8]) -> (u64, Option<usize>) {
    let mut words = bytes
        .chunks_exact(8)
        .map(|word| word.try_into().map_or(0, u64::from_ne_bytes));
    let first = words.next().unwrap_or(0);
    let wrong = words
        .zip(1..)
        .find_map(|(found, word)| (found != word_of(page, word)).then_some(word));
    (first, wrong)
}

/// The first word of a page to which this was written last.
pub(super) fn first(page: u64, turn: u32) -> u64 {
    page << 32 | u64::from(turn)
}

impl Disk {
    pub(super) fn new(pages: u64) -> Disk {
        let first = (0..pages).map(|page| AtomicU64::new(first(page, 0)));
        Disk {
            first: first.collect(),
            wrong: AtomicU64::new(0),
        }
    }

    /// The first word of a page, as the disk has it.
    fn first(&self, page: u64) -> u64 {
        self.first[page as usize].load(Ordering::Acquire)
    }

    /// Pages that came with other words than they should have.
    pub(super) fn wrong(&self) -> u64 {
        self.wrong.load(Ordering::Relaxed)
    }

    /// Pages, from this one on, each `step`-th, that it has not as they were written.
    pub(super) fn lost(&self, from: u64, step: usize, written: &[u32]) -> Option<(u64, u64)> {
        (from..self.pages())
            .step_by(step)
            .find(|&page| self.first(page) != first(page, written[page as usize]))
            .map(|page| (page, self.first(page)))
    }

    pub(super) fn pages(&self) -> u64 {
        self.first.len() as u64
    }
}

impl MappingOps for Disk {
    fn read_folio(&self, index: u64, pages: &mut [u8]) -> Result<(), FileError> {
        for (nth, page) in (index..).zip(pages.chunks_mut(PAGE_SIZE)) {
            let first = self.first.get(nth as usize).ok_or(FileError::End)?;
            for (word, bytes) in page.chunks_exact_mut(8).enumerate() {
                bytes.copy_from_slice(&word_of(nth, word).to_ne_bytes());
            }
            page[..8].copy_from_slice(&first.load(Ordering::Acquire).to_ne_bytes());
        }
        Ok(())
    }

    fn writepage(&self, index: u64, pages: &[u8]) -> Result<(), FileError> {
        for (nth, page) in (index..).zip(pages.chunks(PAGE_SIZE)) {
            let first = self.first.get(nth as usize).ok_or(FileError::End)?;
            // SAFETY: the page's first eight bytes, aligned; users may write to them at this moment, eight at once.
            let value = unsafe { page.as_ptr().cast::<u64>().read_volatile() };
            // Users write to no other word of the file's own pages.
            if look_at(nth, page).1.is_some() {
                self.wrong.fetch_add(1, Ordering::Relaxed);
            }
            first.store(value, Ordering::Release);
        }
        Ok(())
    }
}

impl Worker {
    pub(super) fn file(&mut self, soak: &Soak) {
        // Some of what is read is charged to a group with little room, which takes what it has from its own pages; for that it looks at all there are, so this is slow.
        let group = if self.one_in(16) { soak.group.id() } else { 0 };
        let charged = &thread::current().memcg;
        charged.store(group, Ordering::Relaxed);
        self.file_step(soak);
        charged.store(0, Ordering::Relaxed);
        if soak.disk.wrong() > 0 {
            wrong!(soak, "{} pages were written back wrong", soak.disk.wrong());
        }
    }

    fn file_step(&mut self, soak: &Soak) {
        match self.dice.below(16) {
            0..=9 => self.read_run(soak),
            10..=13 => self.write_page(soak),
            14 => {
                let page = self.a_page(soak);
                // What cannot be read ahead is read when it is wanted.
                let _ = soak.file.will_need(page, 64);
            }
            _ => {
                let page = self.a_page(soak);
                self.write_back(soak, page);
            }
        }
    }

    /// Writes some pages back. The disk has what this worker wrote to them, then.
    fn write_back(&mut self, soak: &Soak, from: u64) {
        let end = (from + 512).min(soak.disk.pages());
        if soak.file.writeback(from..=end - 1).is_err() {
            return soak.count(Count::Refused);
        }
        soak.count(Count::Synced);
        let own = (from..end).filter(|&page| self.writes_to(soak, page));
        for page in own {
            let (found, turn) = (soak.disk.first(page), self.written[page as usize]);
            if found != first(page, turn) {
                return wrong!(
                    soak,
                    "page {page} was written {turn} times and written back, and the disk has {found:#x}"
                );
            }
        }
    }

    fn a_page(&mut self, soak: &Soak) -> u64 {
        let pages = soak.disk.pages() as usize;
        let hot = self.one_in(4);
        self.dice.below(if hot { HOT.min(pages) } else { pages }) as u64
    }

    /// Is this worker the one who writes to that page of the file?
    pub(super) fn writes_to(&self, soak: &Soak, page: u64) -> bool {
        page as usize % soak.workers == self.me
    }

    /// What the first word of a page may be.
    pub(super) fn is_first(&self, soak: &Soak, page: u64, found: u64) -> bool {
        if self.writes_to(soak, page) {
            found == first(page, self.written[page as usize])
        } else {
            found >> 32 == page
        }
    }

    fn read_run(&mut self, soak: &Soak) {
        let from = self.a_page(soak);
        let to = (from + 1 + self.dice.below(48) as u64).min(soak.disk.pages());
        let mut bytes = core::mem::take(&mut self.bytes);
        for page in from..to {
            soak.count(Count::Reads);
            if let Err(why) = soak.file.read(page * PAGE_SIZE as u64, &mut bytes) {
                self.not_read(soak, page, Some(why));
                break;
            }
            let (found, wrong) = look_at(page, &bytes);
            if !self.is_first(soak, page, found) || wrong.is_some() {
                let mine = self.writes_to(soak, page);
                let turn = self.written[page as usize];
                wrong!(
                    soak,
                    "page {page} of the file begins with {found:#x}, written last: {turn} (by this worker: {mine}); another word that is wrong: {wrong:?}"
                );
            }
        }
        self.bytes = bytes;
    }

    fn not_read(&self, soak: &Soak, page: u64, why: Option<FileError>) {
        match why {
            None => {}
            Some(FileError::Alloc(_)) => soak.count(Count::Refused),
            Some(why) => wrong!(soak, "page {page} of the file: {why}"),
        }
    }

    /// A page of this worker's, near that one.
    pub(super) fn own_page(&self, soak: &Soak, near: u64) -> u64 {
        let page = near - near % soak.workers as u64 + self.me as u64;
        if page < soak.disk.pages() {
            page
        } else {
            self.me as u64
        }
    }

    fn write_page(&mut self, soak: &Soak) {
        let near = self.a_page(soak);
        let page = self.own_page(soak, near);
        let turn = self.written[page as usize].wrapping_add(1);
        let written = soak
            .file
            .write(page * PAGE_SIZE as u64, &first(page, turn).to_ne_bytes());
        match written {
            Ok(()) => {
                self.written[page as usize] = turn;
                soak.count(Count::Writes);
            }
            Err(why) => self.not_read(soak, page, Some(why)),
        }
    }
}
