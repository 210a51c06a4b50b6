//! What is live by type, in blocks: for what others would pay for the same.

use memdesc::{Ledger, Memory, PAGE_SIZE, Pfn};

use crate::handles::Machine;

/// Blocks of each kind at one moment, and the bytes of two other ways to describe them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Mix {
    pub(crate) free: u64,
    pub(crate) bare: u64,
    pub(crate) folios: u64,
    pub(crate) page_tables: u64,
    pub(crate) slabs: u64,
    pub(crate) large_kmalloc: u64,
    pub(crate) ram_pages: u64,
}

/// Sizes in the seeds, read plainly.
const WORD: u64 = 8;
const SEED_BUDDY: u64 = 40;
const SEED_FOLIO: u64 = 80;
const SEED_SLAB: u64 = 64;
const STRUCT_PAGE: u64 = 64;

/// How full memory is, piece by piece from bottom to top.
#[derive(Clone, Debug, Default)]
pub(crate) struct Picture {
    /// Bytes of a piece.
    pub(crate) piece: u64,
    /// The share of each piece that is taken. Holes have no piece.
    pub(crate) taken: Vec<f64>,
}

/// Pieces of the picture, about.
const PIECES: u64 = 768;

/// Looks at every block of memory.
pub(crate) fn survey(machine: &Machine, ledger: &Ledger) -> (Mix, Picture) {
    let mm = &machine.mm;
    let mut mix = Mix {
        ram_pages: ledger.given,
        ..Mix::default()
    };
    let piece = (ledger.given / PIECES).next_power_of_two().max(1);
    let mut taken = vec![0u64; ledger.given.div_ceil(piece) as usize];
    // Pages of memory so far, holes left out.
    let mut seen = 0u64;
    for (start, end) in machine.ram() {
        let mut pfn = start;
        while pfn < end {
            let (head, order, memory) = mm.lookup(Pfn(pfn));
            let next = match memory {
                Memory::Hole | Memory::Untouched => pfn + 1,
                _ => (head.0 + (1 << order)).clamp(pfn + 1, end),
            };
            let is_free = match memory {
                Memory::Free { .. } => {
                    mix.free += 1;
                    true
                }
                Memory::Hole | Memory::Untouched => true,
                Memory::Bare => {
                    mix.bare += 1;
                    false
                }
                Memory::Anon(_) | Memory::File(_) => {
                    mix.folios += 1;
                    false
                }
                Memory::PageTable(_) => {
                    mix.page_tables += 1;
                    false
                }
                Memory::Slab(_) => {
                    mix.slabs += 1;
                    false
                }
                Memory::LargeKmalloc => {
                    mix.large_kmalloc += 1;
                    false
                }
                _ => false,
            };
            for page in (0..u64::from(next - pfn)).filter(|_| !is_free) {
                taken[((seen + page) / piece) as usize] += 1;
            }
            seen += u64::from(next - pfn);
            pfn = next;
        }
    }
    // Slabs of descriptors are ours, not the workload's.
    let mut ours = 0;
    mm.slabinfo(|cache| ours += if cache.metadata { cache.num_slabs } else { 0 });
    mix.slabs = mix.slabs.saturating_sub(ours);
    let share =
        |(i, &n): (usize, &u64)| n as f64 / piece.min(ledger.given - i as u64 * piece) as f64;
    let picture = Picture {
        piece: piece * PAGE_SIZE as u64,
        taken: taken.iter().enumerate().map(share).collect(),
    };
    (mix, picture)
}

impl Mix {
    /// Blocks that are not free.
    pub(crate) fn allocated(&self) -> u64 {
        self.bare + self.folios + self.page_tables + self.slabs + self.large_kmalloc
    }

    /// What a plain reading of the seeds costs: a word a page, a 40-byte buddy for every block, free or not, and an 80-byte
    /// folio or a 64-byte slab beside it where there is one.
    pub(crate) fn plain_seeds_bytes(&self) -> u64 {
        self.ram_pages * WORD
            + (self.free + self.allocated()) * SEED_BUDDY
            + self.folios * SEED_FOLIO
            + self.slabs * SEED_SLAB
    }

    pub(crate) fn struct_page_bytes(&self) -> u64 {
        self.ram_pages * STRUCT_PAGE
    }

    /// As a share of memory.
    pub(crate) fn percent(&self, bytes: u64) -> f64 {
        bytes as f64 * 100.0 / (self.ram_pages * PAGE_SIZE as u64).max(1) as f64
    }
}
