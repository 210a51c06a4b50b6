//! `ptdesc`: a page of page table, in 32 bytes. Never mapped by users.
//!
//! | bytes | what | Linux |
//! |---|---|---|
//! | 0–7 | links while the table waits for a grace period or is deposited; of the free block once it is free | `pt_rcu_head`, `pt_list`, 16 |
//! | 8–11 | the lock of the entries (`ptl`) | `ptl`, 4 or 8 |
//! | 12–15 | the first of the tables that are deposited here, for when a huge page is mapped by pages | `pmd_huge_pte`, 8 |
//! | 16–23 | whose it is | `pt_mm`, 8 |
//! | 24–31 | where it stands: the first address it maps, with its level in the low bits | `pt_index`, 8 |

use core::fmt;

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::address::Pfn;
use crate::sync::SpinLock;

/// The descriptor of a page table page.
///
/// # Invariants
///
/// Type-stable like [`Folio`](super::Folio): a lockless walker may hold it while the page goes back.
#[repr(C, align(16))]
pub struct PtDesc {
    links: [AtomicU32; 2],
    pub(crate) lock: SpinLock<()>,
    deposit: AtomicU32,
    owner: AtomicU64,
    index: AtomicU64,
}

const _: () = assert!(size_of::<PtDesc>() == 32);

impl PtDesc {
    pub(crate) fn init(&self) {
        self.lock.reset();
        self.deposit.store(Pfn::NONE.0, Ordering::Relaxed);
        self.owner.store(0, Ordering::Relaxed);
        self.index.store(0, Ordering::Relaxed);
    }

    /// Whose table it is: a number of the owner's choice.
    pub fn owner(&self) -> u64 {
        self.owner.load(Ordering::Acquire)
    }

    /// Says whose table this is, on which level (1: its entries lead to pages of 4 KiB), and the first address it maps.
    pub fn set_owner(&self, owner: u64, level: u8, address: u64) {
        self.index
            .store(address & !0xfff | u64::from(level), Ordering::Relaxed);
        self.owner.store(owner, Ordering::Release);
    }

    /// The first address the table maps.
    pub fn address(&self) -> u64 {
        self.index.load(Ordering::Relaxed) & !0xfff
    }

    /// Its level, 1 to 4; 0 if nobody said.
    pub fn level(&self) -> u8 {
        (self.index.load(Ordering::Relaxed) & 0xf) as u8
    }

    /// The first of the tables deposited here. Under the lock.
    pub(crate) fn deposit(&self) -> Pfn {
        Pfn(self.deposit.load(Ordering::Relaxed))
    }

    pub(crate) fn set_deposit(&self, first: Pfn) {
        self.deposit.store(first.0, Ordering::Relaxed);
    }
}

impl fmt::Debug for PtDesc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PtDesc")
            .field("links", &self.links)
            .field("owner", &self.owner())
            .field("level", &self.level())
            .field("address", &self.address())
            .finish_non_exhaustive()
    }
}
