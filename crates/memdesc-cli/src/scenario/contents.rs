//! Pages with contents as memory has them, each made from a number, the same every time: text, tables of structs, mostly zero, real code, noise.

use crate::rng::Rng;

/// Bytes of a page.
pub(crate) const PAGE: usize = 4096;

/// What a page is like.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(usize)]
pub(crate) enum Kind {
    Text = 0,
    Structs = 1,
    Zeros = 2,
    Program = 3,
    Noise = 4,
}

impl Kind {
    pub(crate) const ALL: [Kind; 5] = [
        Kind::Text,
        Kind::Structs,
        Kind::Zeros,
        Kind::Program,
        Kind::Noise,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Kind::Text => "text",
            Kind::Structs => "structs",
            Kind::Zeros => "zero-rich",
            Kind::Program => "program",
            Kind::Noise => "noise",
        }
    }
}

const WORDS: [&str; 48] = [
    "page",
    "the",
    "memory",
    "of",
    "a",
    "folio",
    "and",
    "lock",
    "is",
    "allocated",
    "to",
    "in",
    "buddy",
    "list",
    "when",
    "freed",
    "zone",
    "by",
    "owner",
    "kernel",
    "node",
    "with",
    "reclaim",
    "from",
    "slab",
    "its",
    "object",
    "that",
    "reference",
    "count",
    "mapping",
    "for",
    "writeback",
    "dirty",
    "it",
    "compressed",
    "class",
    "on",
    "fault",
    "address",
    "or",
    "table",
    "entry",
    "are",
    "migrate",
    "be",
    "\n",
    "0x",
];

/// All pages of a run.
pub(crate) struct Contents {
    seed: u64,
    /// This program's own file, if it can be read.
    program: Vec<u8>,
}

impl Contents {
    pub(crate) fn new(seed: u64) -> Contents {
        let program = std::env::current_exe().and_then(std::fs::read);
        Contents {
            seed,
            program: program.unwrap_or_default(),
        }
    }

    /// Has it real bytes too?
    pub(crate) fn has_program(&self) -> bool {
        self.program.len() >= 2 * PAGE
    }

    /// Writes page `n`; says of what kind it is.
    pub(crate) fn page(&self, n: u64, page: &mut [u8; PAGE]) -> Kind {
        let mut rng = Rng(self.seed.wrapping_mul(0x1_0000_0001) ^ n.wrapping_mul(0x9e37_79b9));
        let kind = match rng.below(16) {
            0..=4 => Kind::Text,
            5..=8 => Kind::Structs,
            9..=11 => Kind::Zeros,
            12..=14 if self.has_program() => Kind::Program,
            12..=14 => Kind::Text,
            _ => Kind::Noise,
        };
        match kind {
            Kind::Text => text(&mut rng, page),
            Kind::Structs => structs(&mut rng, page),
            Kind::Zeros => zeros(&mut rng, page),
            Kind::Program => {
                let at = rng.below(self.program.len() - PAGE) & !15;
                page.copy_from_slice(&self.program[at..at + PAGE]);
            }
            Kind::Noise => {
                for chunk in page.chunks_mut(8) {
                    chunk.copy_from_slice(&rng.next().to_le_bytes());
                }
            }
        }
        kind
    }
}

fn text(rng: &mut Rng, page: &mut [u8; PAGE]) {
    let mut at = 0;
    while at < PAGE {
        // Some words come much more often than others.
        let word = WORDS[rng.below(WORDS.len()).min(rng.below(WORDS.len()))];
        let number;
        let word = if word == "0x" {
            number = format!("0x{:x}", rng.next() >> 40);
            number.as_str()
        } else {
            word
        };
        for byte in word.bytes().chain([b' ']).take(PAGE - at) {
            page[at] = byte;
            at += 1;
        }
    }
}

/// A table of 48-byte structs: pointers into a few places, small counts, flags, a time.
fn structs(rng: &mut Rng, page: &mut [u8; PAGE]) {
    let base = 0xffff_8880_0000_0000 | (rng.next() >> 36 << 12);
    let mut time = rng.next() >> 20;
    page.fill(0);
    for item in page.chunks_exact_mut(48) {
        time += rng.below_u64(100_000);
        let fields = [
            base + (rng.below_u64(4096) << 6),
            base + (rng.below_u64(4096) << 6),
            rng.below_u64(8),
            rng.below_u64(1 << 20) << 32 | rng.below_u64(64),
            time,
            0,
        ];
        for (field, value) in item.chunks_exact_mut(8).zip(fields) {
            field.copy_from_slice(&value.to_le_bytes());
        }
    }
}

fn zeros(rng: &mut Rng, page: &mut [u8; PAGE]) {
    page.fill(0);
    for _ in 0..1 + rng.below(120) {
        let at = rng.below(PAGE / 8) * 8;
        page[at..at + 8].copy_from_slice(&(rng.next() >> rng.below(56)).to_le_bytes());
    }
}
