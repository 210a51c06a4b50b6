//! `/proc/kpageflags` and `/proc/kpagecount`: one word of facts for each page.

use std::path::Path;

use crate::error::TraceError;

macro_rules! flags {
    ($($(#[$doc:meta])* $name:ident = $bit:expr;)*) => {
        $($(#[$doc])* pub const $name: u64 = 1 << $bit;)*
        /// All flags with their names.
        pub const NAMES: &[(&str, u64)] = &[$((stringify!($name), $name)),*];
    };
}

// include/uapi/linux/kernel-page-flags.h, and from 32 on include/linux/kernel-page-flags.h.
flags! {
    /// Locked, for IO mostly.
    KPF_LOCKED = 0;
    /// An IO error happened.
    KPF_ERROR = 1;
    /// Used since it was last looked at.
    KPF_REFERENCED = 2;
    /// Its data is valid.
    KPF_UPTODATE = 3;
    /// Its data is newer than what is on disk.
    KPF_DIRTY = 4;
    /// In an LRU list.
    KPF_LRU = 5;
    /// In the active LRU list.
    KPF_ACTIVE = 6;
    /// A page of a slab.
    KPF_SLAB = 7;
    /// Being written to disk.
    KPF_WRITEBACK = 8;
    /// To be reclaimed as soon as it is written.
    KPF_RECLAIM = 9;
    /// In a free block of the buddy allocator.
    KPF_BUDDY = 10;
    /// Mapped by a process.
    KPF_MMAP = 11;
    /// Anonymous memory.
    KPF_ANON = 12;
    /// In the swap cache.
    KPF_SWAPCACHE = 13;
    /// Backed by swap: anonymous or shmem.
    KPF_SWAPBACKED = 14;
    /// The first page of a compound page.
    KPF_COMPOUND_HEAD = 15;
    /// Another page of a compound page.
    KPF_COMPOUND_TAIL = 16;
    /// hugetlb.
    KPF_HUGE = 17;
    /// Cannot be reclaimed.
    KPF_UNEVICTABLE = 18;
    /// Bad memory.
    KPF_HWPOISON = 19;
    /// No page has this number.
    KPF_NOPAGE = 20;
    /// Shared by KSM.
    KPF_KSM = 21;
    /// A large folio.
    KPF_THP = 22;
    /// Logically offline, as in a balloon.
    KPF_OFFLINE = 23;
    /// The zero page.
    KPF_ZERO_PAGE = 24;
    /// Not used since it was marked idle.
    KPF_IDLE = 25;
    /// A page table.
    KPF_PGTABLE = 26;
    /// Never given to the buddy allocator.
    KPF_RESERVED = 32;
    /// Locked in memory.
    KPF_MLOCKED = 33;
    /// Its owner's first bit.
    KPF_OWNER_2 = 34;
    /// Has private data, as buffers.
    KPF_PRIVATE = 35;
    /// More private data.
    KPF_PRIVATE_2 = 36;
    /// Its owner's own bit.
    KPF_OWNER_PRIVATE = 37;
    /// The architecture's own bit.
    KPF_ARCH = 38;
    /// Not cached by the CPU.
    KPF_UNCACHED = 39;
    /// Dirtied since soft-dirty bits were cleared.
    KPF_SOFTDIRTY = 40;
    /// The architecture's second bit.
    KPF_ARCH_2 = 41;
    /// Anonymous and of one process only.
    KPF_ANON_EXCLUSIVE = 47;
}

/// Flags that only memory with contents of a file (or shmem) bears, once it is known to be neither
/// anonymous nor of the kernel.
const OF_FILES: u64 = KPF_REFERENCED
    | KPF_UPTODATE
    | KPF_DIRTY
    | KPF_LRU
    | KPF_ACTIVE
    | KPF_WRITEBACK
    | KPF_SWAPBACKED
    | KPF_UNEVICTABLE
    | KPF_THP
    | KPF_MLOCKED;

/// What a page's flags say that it is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum PageKind {
    /// In a free block.
    Buddy,
    /// A slab.
    Slab,
    /// Anonymous memory.
    Anon,
    /// The page cache, shmem included.
    File,
    /// A page table.
    PageTable,
    /// Never given to the buddy allocator: kernel text, the memory map, firmware.
    Reserved,
    /// Logically offline.
    Offline,
    /// Bad memory.
    HwPoison,
    /// Allocated for a purpose that flags do not tell.
    Other,
    /// There is no such page.
    NoPage,
    /// No flag at all: in a per-CPU list, allocated bare, not initialised or not there.
    Nothing,
}

impl PageKind {
    /// Reads the flags of one page.
    pub fn of(flags: u64) -> PageKind {
        let any = |mask: u64| flags & mask != 0;
        if flags == 0 {
            PageKind::Nothing
        } else if any(KPF_NOPAGE) {
            PageKind::NoPage
        } else if any(KPF_HWPOISON) {
            PageKind::HwPoison
        } else if any(KPF_OFFLINE) {
            PageKind::Offline
        } else if any(KPF_BUDDY) {
            PageKind::Buddy
        } else if any(KPF_RESERVED | KPF_ZERO_PAGE) {
            PageKind::Reserved
        } else if any(KPF_SLAB) {
            PageKind::Slab
        } else if any(KPF_PGTABLE) {
            PageKind::PageTable
        } else if any(KPF_ANON | KPF_SWAPCACHE | KPF_KSM) {
            PageKind::Anon
        } else if any(KPF_HUGE) {
            // hugetlb's pool: the flags do not tell what it is used for, only whether it is.
            if any(KPF_MMAP) {
                PageKind::File
            } else {
                PageKind::Other
            }
        } else if any(OF_FILES) {
            PageKind::File
        } else {
            PageKind::Other
        }
    }
}

/// Reads little-endian words.
pub(super) fn words(bytes: &[u8], path: &Path) -> Result<Vec<u64>, TraceError> {
    let (words, rest) = bytes.as_chunks::<8>();
    if !rest.is_empty() || words.is_empty() {
        return Err(TraceError::Snapshot {
            path: path.into(),
            line: words.len() as u64,
            expected: "8 bytes for each page (the file breaks off, or is not from /proc/kpageflags)",
            found: format!("{} bytes", bytes.len()),
        });
    }
    if words.len() >= u32::MAX as usize {
        return Err(TraceError::Snapshot {
            path: path.into(),
            line: words.len() as u64,
            expected: "less than 2^32 pages (16 TiB)",
            found: format!("{} bytes", bytes.len()),
        });
    }
    Ok(words.iter().map(|w| u64::from_le_bytes(*w)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds() {
        let of = PageKind::of;
        assert_eq!(of(0), PageKind::Nothing);
        assert_eq!(of(KPF_BUDDY | KPF_UPTODATE), PageKind::Buddy);
        assert_eq!(of(KPF_SLAB | KPF_COMPOUND_TAIL), PageKind::Slab);
        assert_eq!(of(KPF_MMAP | KPF_ANON | KPF_SWAPBACKED), PageKind::Anon);
        assert_eq!(of(KPF_LRU | KPF_UPTODATE | KPF_PRIVATE), PageKind::File);
        assert_eq!(of(KPF_MMAP | KPF_RESERVED), PageKind::Reserved);
        assert_eq!(of(KPF_COMPOUND_HEAD), PageKind::Other);
        assert_eq!(of(KPF_MMAP), PageKind::Other);
        assert_eq!(of(KPF_PGTABLE), PageKind::PageTable);
        assert_eq!(of(KPF_OFFLINE | KPF_RESERVED), PageKind::Offline);
        assert_eq!(of(KPF_NOPAGE), PageKind::NoPage);
    }

    #[test]
    fn words_are_whole() {
        let path = Path::new("kpageflags");
        assert_eq!(words(&[1, 0, 0, 0, 0, 0, 0, 0], path).unwrap(), [1]);
        assert!(words(&[], path).is_err());
        let broken = words(&[0; 12], path).unwrap_err().to_string();
        assert!(
            broken.contains("kpageflags:1") && broken.contains("12 bytes"),
            "{broken}"
        );
    }
}
