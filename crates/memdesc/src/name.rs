//! A short name that may be read while it is written: of groups and reserves, whose memory is used again.

use crate::sync::atomic::{AtomicU16, AtomicU64, Ordering};

/// Bytes of a name that are kept.
pub(crate) const NAME_LEN: usize = 32;

/// A name. All-zero memory is an empty one.
#[derive(Debug)]
pub(crate) struct AtomicName {
    bytes: [AtomicU64; NAME_LEN / 8],
    len: AtomicU16,
}

impl AtomicName {
    pub(crate) const fn new() -> AtomicName {
        AtomicName {
            bytes: [const { AtomicU64::new(0) }; NAME_LEN / 8],
            len: AtomicU16::new(0),
        }
    }

    /// What does not fit is cut off.
    pub(crate) fn set(&self, name: &str) {
        let mut len = name.len().min(NAME_LEN);
        while !name.is_char_boundary(len) {
            len -= 1;
        }
        let mut bytes = [0; NAME_LEN];
        bytes[..len].copy_from_slice(&name.as_bytes()[..len]);
        for (cell, chunk) in self.bytes.iter().zip(bytes.chunks_exact(8)) {
            let mut word = [0; 8];
            word.copy_from_slice(chunk);
            cell.store(u64::from_ne_bytes(word), Ordering::Relaxed);
        }
        self.len.store(len as u16, Ordering::Relaxed);
    }

    pub(crate) fn get<'b>(&self, into: &'b mut [u8; NAME_LEN]) -> &'b str {
        for (cell, chunk) in self.bytes.iter().zip(into.chunks_exact_mut(8)) {
            chunk.copy_from_slice(&cell.load(Ordering::Relaxed).to_ne_bytes());
        }
        let len = usize::from(self.len.load(Ordering::Relaxed)).min(NAME_LEN);
        core::str::from_utf8(&into[..len]).unwrap_or("?")
    }
}
