//! A file that is larger than what is left for it, so that its pages come and go: read and written by calls, by all workers; and its disk.
//!
//! The first word of a page says which page of the file it is, and what was written last. Each page has one worker who writes to it, and that one finds exactly
//! what it wrote, wherever the page was meanwhile: through a call or through a mapping.

use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering};

use memdesc::PAGE_SIZE;
use memdesc::filemap::{FileError, MappingOps};

use super::{Count, Soak, Worker};
use crate::wrong;

/// Pages that are read more often than others.
const HOT: usize = 512;

/// Remembers the first word of each page, and makes up the others.
pub(crate) struct Disk {
    first: Vec<AtomicU64>,
}

/// The word in the middle of a page.
fn middle(page: u64) -> u64 {
    page.wrapping_mul(0x2545_f491_4f6c_dd1d)
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
        }
    }

    pub(super) fn pages(&self) -> u64 {
        self.first.len() as u64
    }
}

const WORDS: usize = PAGE_SIZE / 8;

impl MappingOps for Disk {
    fn read_folio(&self, index: u64, pages: &mut [u8]) -> Result<(), FileError> {
        for (nth, page) in (index..).zip(pages.chunks_mut(PAGE_SIZE)) {
            let first = self.first.get(nth as usize).ok_or(FileError::End)?;
            page.fill(0);
            page[..8].copy_from_slice(&first.load(Ordering::Acquire).to_ne_bytes());
            page[WORDS * 4..][..8].copy_from_slice(&middle(nth).to_ne_bytes());
            page[WORDS * 8 - 8..].copy_from_slice(&middle(!nth).to_ne_bytes());
        }
        Ok(())
    }

    fn writepage(&self, index: u64, pages: &[u8]) -> Result<(), FileError> {
        for (nth, page) in (index..).zip(pages.chunks(PAGE_SIZE)) {
            let first = self.first.get(nth as usize).ok_or(FileError::End)?;
            // SAFETY: the page's first eight bytes, aligned; users may write to them at this moment, eight at once.
            let value = unsafe { page.as_ptr().cast::<u64>().read_volatile() };
            first.store(value, Ordering::Release);
        }
        Ok(())
    }
}

impl Worker {
    pub(super) fn file(&mut self, soak: &Soak) {
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
                if soak.file.writeback(page..=page + 512).is_err() {
                    soak.count(Count::Refused);
                }
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
        for page in from..to {
            let word = |at: usize| {
                let mut bytes = [0; 8];
                let offset = page * PAGE_SIZE as u64 + at as u64;
                let read = soak.file.read(offset, &mut bytes);
                read.map(|()| u64::from_ne_bytes(bytes))
            };
            let found = (word(0), word(WORDS * 4), word(WORDS * 8 - 8));
            soak.count(Count::Reads);
            match found {
                (Ok(a), Ok(b), Ok(c)) => {
                    if !self.is_first(soak, page, a) || b != middle(page) || c != middle(!page) {
                        let mine = self.writes_to(soak, page);
                        let turn = self.written[page as usize];
                        wrong!(
                            soak,
                            "page {page} of the file reads {a:#x}, {b:#x}, {c:#x}, written last: {turn} (by this worker: {mine})"
                        );
                    }
                }
                (a, b, c) => {
                    for found in [a, b, c] {
                        self.not_read(soak, page, found.err());
                    }
                    break;
                }
            }
        }
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
