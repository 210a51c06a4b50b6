//! The memdesc: all that the memory map holds for a page, in 8 bytes.
//!
//! ```text
//!  63   62..60  59..57        56..53  52..48   47..46  45..5                  4..0
//! ┌────┬───────┬─────────────┬───────┬────────┬───────┬──────────────────────┬──────┐
//! │ P  │ class │ migratetype │ order │ number │ free  │ descriptor: phys >> 3 │ type │
//! └────┴───────┴─────────────┴───────┴────────┴───────┴──────────────────────┴──────┘
//! ```
//!
//! | field | meaning | who may change it |
//! |---|---|---|
//! | type | [`PageType`]; 0 is "nothing starts here" | with the block free: the zone lock's holder, or the owner of the per-CPU list it is in. With the block handed out: its owner |
//! | descriptor | physical address of the descriptor, 8-byte aligned; for types without one bits 52 to 5 are the facts themselves | as the type |
//! | free | of a free block: what is known of its contents, [`Contents`] | as the type |
//! | number | of the kernel's own types, which one; of compressed memory, what the page is in its zspage | as the type |
//! | order | of the block or allocation this page belongs to | as the type |
//! | migratetype | of the free list a free block is in | as the type |
//! | class | [`DescClass`]: which cache the descriptor's memory came from | whoever sets the descriptor |
//! | P | free: in a per-CPU list. Handed out: taken from a [reserve](crate::reserve) | as the type |
//!
//! **What a word says, and for which pages.** A block is described by the word of its first page, its head. In a
//! free block, and in an allocation above [`TAIL_WORDS_ORDER`], the other words are zero, which says "look further
//! left". In an allocation of order 3 or less all words are the same: they share one cache line, and an object's
//! slab is found by one load. So a word that is not zero is always true of its page, and a zero word sends
//! the reader to the possible heads, nearest first: clear the lowest set bit of the page number, look again.
//! Splitting order 10 for a single page therefore writes 11 words, not 1024; merging them back, 11.
//!
//! In a folio the words of all tails are *tail counts*, of no type: how often each page is mapped by itself ([`TailCount`]). A reader passes
//! over them as over zero, and zero is what they are when nobody maps the folio, so when it is free.
//!
//! A word of zero that no head covers was never handed out: an untouched map of zero bytes is valid.

use core::fmt;

use crate::address::PhysAddr;
use crate::page_alloc::MigrateType;
use crate::sync::atomic::{AtomicU64, Ordering};

/// Allocations up to this order have every word written: 8 words, one cache line.
pub const TAIL_WORDS_ORDER: usize = 3;

const TYPE_BITS: u32 = 5;
const DESC_SHIFT: u32 = 5;
/// A page frame number has 32 bits, an address in a page 12, and descriptors are 8-byte aligned.
const DESC_BITS: u32 = 41;
const FREE_SHIFT: u32 = 46;
const FREE_BITS: u32 = 2;
const NUMBER_SHIFT: u32 = 48;
const NUMBER_BITS: u32 = 5;
/// The facts of a type without a descriptor take the place of all three.
const FACT_BITS: u32 = DESC_BITS + FREE_BITS + NUMBER_BITS;
const ORDER_SHIFT: u32 = 53;
const MIGRATE_SHIFT: u32 = 57;
const CLASS_SHIFT: u32 = 60;
const P_BIT: u64 = 1 << 63;

const TYPE_MASK: u64 = (1 << TYPE_BITS) - 1;
const DESC_MASK: u64 = ((1 << DESC_BITS) - 1) << DESC_SHIFT;
/// The kernel's own types with this bit in their number have descriptors that begin with a folio's.
pub(crate) const COUNTED: u8 = 1 << (NUMBER_BITS - 1);

const FREE_MASK: u64 = ((1 << FREE_BITS) - 1) << FREE_SHIFT;
const NUMBER_MASK: u64 = ((1 << NUMBER_BITS) - 1) << NUMBER_SHIFT;
const FACT_MASK: u64 = DESC_MASK | FREE_MASK | NUMBER_MASK;
const ORDER_MASK: u64 = 0xf << ORDER_SHIFT;
const MIGRATE_MASK: u64 = 0x7 << MIGRATE_SHIFT;
const CLASS_MASK: u64 = 0x7 << CLASS_SHIFT;

const _: () = assert!(DESC_SHIFT + FACT_BITS == ORDER_SHIFT);
const _: () = assert!(
    TYPE_MASK
        ^ DESC_MASK
        ^ FREE_MASK
        ^ NUMBER_MASK
        ^ ORDER_MASK
        ^ MIGRATE_MASK
        ^ CLASS_MASK
        ^ P_BIT
        == u64::MAX,
    "the fields cover the word without overlap"
);

/// What a page is, from the low bits of its word.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
pub enum PageType {
    /// Nothing starts here: a tail, or never handed out.
    None = 0,
    /// A free block; a `struct buddy`.
    Free = 1,
    /// Bare pages (`alloc_pages`, drivers); the `buddy` is kept.
    Bare = 2,
    /// A slab; a `struct slab`.
    Slab = 3,
    /// Large kmalloc; the `buddy` is kept.
    LargeKmalloc = 4,
    /// A page table; a `ptdesc`.
    PageTable = 5,
    /// File cache; a `folio`.
    File = 6,
    /// Anonymous memory; a `folio`.
    Anon = 7,
    /// Part of a vmalloc area; the `buddy` is kept, and holds the address of the `vmap_area`.
    Vmalloc = 8,
    /// Network pool.
    NetPool = 9,
    /// Compressed memory; the first page of a zspage has its `zsdesc`, the others keep their `buddy`, which says where that is.
    Zsmalloc = 10,
    /// Device memory.
    Device = 11,
    /// Inline: kernel text and data, firmware, the memory map itself, per-CPU areas.
    Reserved = 12,
    /// Inline: given away to a hypervisor (balloon), or logically offline.
    Offline = 13,
    /// Inline: bad memory, or a guard.
    Poisoned = 14,
    /// A type of the kernel's own: which, says the word's number.
    Yours = 15,
    /// A driver's pages that users may map; a `folio` in no mapping.
    Driver = 16,
    /// Set aside in a reserve, and nobody's: the descriptor that it will have when it is taken.
    SetAside = 17,
}

/// By the low bits of a word. Those that no type has say nothing.
const KINDS: [PageType; 1 << TYPE_BITS] = {
    let mut kinds = [PageType::None; 1 << TYPE_BITS];
    let mut i = 0;
    while i < PageType::COUNT {
        kinds[i] = PageType::ALL[i];
        i += 1;
    }
    kinds
};

/// What is known of what a free block holds.
///
/// Of two that merge what is known of both; of a part what is known of the whole.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Contents(u64);

impl Contents {
    /// Nothing.
    pub(crate) const UNKNOWN: Contents = Contents(0);
    /// What the free-page services left in it: the pattern of free memory.
    pub(crate) const CLEAN: Contents = Contents(1 << FREE_SHIFT);
    /// It was reported, and has not been touched since: nothing may be expected of what it holds.
    pub(crate) const REPORTED: Contents = Contents(2 << FREE_SHIFT);

    /// Is this known?
    pub(crate) const fn contains(self, other: Contents) -> bool {
        self.0 & other.0 == other.0
    }

    /// Both.
    pub(crate) const fn with(self, other: Contents) -> Contents {
        Contents(self.0 | other.0)
    }

    /// What is known of both.
    pub(crate) const fn and(self, other: Contents) -> Contents {
        Contents(self.0 & other.0)
    }
}

impl PageType {
    /// How many there are.
    pub const COUNT: usize = 18;
    /// All of them, by number.
    pub const ALL: [PageType; 18] = [
        PageType::None,
        PageType::Free,
        PageType::Bare,
        PageType::Slab,
        PageType::LargeKmalloc,
        PageType::PageTable,
        PageType::File,
        PageType::Anon,
        PageType::Vmalloc,
        PageType::NetPool,
        PageType::Zsmalloc,
        PageType::Device,
        PageType::Reserved,
        PageType::Offline,
        PageType::Poisoned,
        PageType::Yours,
        PageType::Driver,
        PageType::SetAside,
    ];

    /// Does the word lead to a descriptor (or a kept `buddy`), rather than hold facts inline?
    #[inline]
    pub const fn has_descriptor(self) -> bool {
        !matches!(
            self,
            PageType::None | PageType::Reserved | PageType::Offline | PageType::Poisoned
        )
    }

    /// Is it a type whose owner gives its pages back by `free_pages`?
    #[inline]
    pub const fn is_owned_block(self) -> bool {
        use PageType::{Device, Free, NetPool, SetAside, Slab, Vmalloc, Zsmalloc};
        self.has_descriptor()
            && !matches!(
                self,
                Free | Slab | Vmalloc | Device | NetPool | Zsmalloc | SetAside
            )
    }

    /// Can the owner move or reclaim such pages? Decides whether a pageblock is worth stealing.
    #[inline]
    pub const fn is_movable(self) -> bool {
        matches!(self, PageType::File | PageType::Anon)
    }

    /// The name in reports and ledgers.
    pub const fn name(self) -> &'static str {
        match self {
            PageType::None => "none",
            PageType::Free => "free",
            PageType::Bare => "bare",
            PageType::Slab => "slab",
            PageType::LargeKmalloc => "large_kmalloc",
            PageType::PageTable => "page_table",
            PageType::File => "file",
            PageType::Anon => "anon",
            PageType::Vmalloc => "vmalloc",
            PageType::NetPool => "net_pool",
            PageType::Zsmalloc => "zsmalloc",
            PageType::Device => "device",
            PageType::Reserved => "reserved",
            PageType::Offline => "offline",
            PageType::Poisoned => "poisoned",
            PageType::Yours => "yours",
            PageType::Driver => "driver",
            PageType::SetAside => "set_aside",
        }
    }
}

/// Which cache a descriptor's memory came from: where it goes back to when it is no longer needed.
///
/// A descriptor outlives its type. When an owner lets a page go, the memory of its descriptor becomes the free
/// block's `struct buddy` (*morph*), and if the next owner wants the same class it becomes his descriptor.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
pub enum DescClass {
    /// A `struct buddy`, 8 bytes.
    Buddy = 0,
    /// A `folio` of file cache, 32 bytes.
    File = 1,
    /// A `struct slab`, 48 bytes.
    Slab = 2,
    /// A `ptdesc`, 32 bytes.
    PtDesc = 3,
    /// Of the kernel's own caches.
    Yours = 4,
    /// A `folio` of anonymous memory. Kept apart from those of files: processes end and files stay, and a slab with both
    /// would never come free.
    Anon = 5,
    /// A `zsdesc`, 16 bytes.
    Zs = 6,
}

/// A memdesc: the word of one page, as a value.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
#[repr(transparent)]
pub struct Word(u64);

impl Word {
    /// Nothing starts here.
    pub const ZERO: Word = Word(0);

    /// A word that leads to a descriptor at `desc`, which is 8-byte aligned and below 2^44.
    #[inline]
    pub const fn described(kind: PageType, order: usize, desc: PhysAddr, class: DescClass) -> Word {
        debug_assert!(desc.0 & 7 == 0 && desc.0 >> 44 == 0 && order < 16);
        Word(
            kind as u64
                | (desc.0 >> 3) << DESC_SHIFT
                | (order as u64) << ORDER_SHIFT
                | (class as u64) << CLASS_SHIFT,
        )
    }

    /// A word that holds its facts itself: up to 48 bits of them.
    #[inline]
    pub const fn inline(kind: PageType, order: usize, facts: u64) -> Word {
        debug_assert!(facts >> FACT_BITS == 0 && order < 16);
        Word(kind as u64 | facts << DESC_SHIFT | (order as u64) << ORDER_SHIFT)
    }

    /// The bits, for reports.
    #[inline]
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// Does it say nothing of its own, so that one has to look further left? A tail's may still count how often the page is mapped.
    #[inline]
    pub const fn is_tail(self) -> bool {
        self.0 & TYPE_MASK == 0
    }

    /// The type.
    #[inline]
    pub const fn kind(self) -> PageType {
        KINDS[(self.0 & TYPE_MASK) as usize]
    }

    /// The order of the block this word speaks for.
    #[inline]
    pub const fn order(self) -> usize {
        ((self.0 & ORDER_MASK) >> ORDER_SHIFT) as usize
    }

    /// The physical address of the descriptor.
    #[inline]
    pub const fn desc(self) -> PhysAddr {
        PhysAddr(((self.0 & DESC_MASK) >> DESC_SHIFT) << 3)
    }

    /// The inline facts.
    #[inline]
    pub const fn facts(self) -> u64 {
        (self.0 & FACT_MASK) >> DESC_SHIFT
    }

    /// The free list a free block is in.
    #[inline]
    pub const fn migratetype(self) -> MigrateType {
        MigrateType::ALL[((self.0 & MIGRATE_MASK) >> MIGRATE_SHIFT) as usize & 3]
    }

    /// Where the descriptor's memory came from.
    #[inline]
    pub const fn class(self) -> DescClass {
        match (self.0 & CLASS_MASK) >> CLASS_SHIFT {
            0 => DescClass::Buddy,
            1 => DescClass::File,
            2 => DescClass::Slab,
            3 => DescClass::PtDesc,
            5 => DescClass::Anon,
            6 => DescClass::Zs,
            _ => DescClass::Yours,
        }
    }

    /// Does it lead to a folio of ours? A file's or anonymous pages may also have a descriptor that the kernel brought.
    #[inline]
    pub(crate) fn is_folio(self) -> bool {
        matches!(self.kind(), PageType::File | PageType::Anon)
            && matches!(self.class(), DescClass::File | DescClass::Anon)
    }

    /// Are these pages that nobody but their owner has, that he frees by `free_pages`, and that are nobody's afterwards: not a reserve's?
    #[inline]
    pub(crate) const fn is_only_owners(self) -> bool {
        const TYPES: u32 = 1 << PageType::Bare as u32
            | 1 << PageType::LargeKmalloc as u32
            | 1 << PageType::PageTable as u32;
        TYPES >> (self.0 & TYPE_MASK) & 1 != 0 && self.0 & P_BIT == 0
    }

    /// Handed out, and taken from a reserve?
    #[inline]
    pub const fn is_reserve(self) -> bool {
        self.0 & P_BIT != 0 && self.0 & TYPE_MASK != PageType::Free as u64
    }

    /// The same, taken from a reserve.
    pub(crate) const fn with_reserve(self) -> Word {
        Word(self.0 | P_BIT)
    }

    /// Does it lead to what is counted as a folio is, so that users may map it? A folio, or pages of a driver, a network pool or a device under a folio's
    /// descriptor, or those of the kernel's own types that begin with one.
    #[inline]
    pub(crate) fn is_counted(self) -> bool {
        match self.kind() {
            PageType::File | PageType::Anon => self.is_folio(),
            PageType::Driver | PageType::NetPool | PageType::Device => {
                self.class() == DescClass::File
            }
            PageType::Yours => self.number() & COUNTED != 0,
            _ => false,
        }
    }

    /// Free and in a zone's free list (not in a per-CPU list): may be merged with.
    #[inline]
    pub(crate) const fn is_free_in_zone(self, order: usize) -> bool {
        // One compare: type, order and the per-CPU bit all at once.
        self.0 & (TYPE_MASK | ORDER_MASK | P_BIT)
            == PageType::Free as u64 | (order as u64) << ORDER_SHIFT
    }

    /// Free and in a per-CPU list.
    #[inline]
    pub(crate) const fn is_in_pcp(self) -> bool {
        self.0 & (TYPE_MASK | P_BIT) == PageType::Free as u64 | P_BIT
    }

    /// Of a free block: what is known of its contents.
    #[inline]
    pub(crate) const fn contents(self) -> Contents {
        Contents(self.0 & FREE_MASK)
    }

    /// The same free block, or one on its way to be free, of whose contents this is known.
    #[inline]
    pub(crate) const fn with_contents(self, contents: Contents) -> Word {
        Word(self.0 & !FREE_MASK | contents.0)
    }

    /// Which of the kernel's own types it is; of compressed memory, what the page is in its zspage.
    #[inline]
    pub const fn number(self) -> u8 {
        ((self.0 & NUMBER_MASK) >> NUMBER_SHIFT) as u8
    }

    /// The same, of this type of the kernel's own, or with this part in its zspage.
    #[inline]
    pub(crate) const fn with_number(self, number: u8) -> Word {
        debug_assert!(number >> NUMBER_BITS == 0);
        Word(self.0 & !NUMBER_MASK | (number as u64) << NUMBER_SHIFT)
    }

    /// The same descriptor, now of a free block in a zone's list.
    #[inline]
    pub(crate) const fn to_free(self, order: usize, mt: MigrateType) -> Word {
        Word(
            self.0 & (DESC_MASK | CLASS_MASK | FREE_MASK)
                | PageType::Free as u64
                | (order as u64) << ORDER_SHIFT
                | (mt as u64) << MIGRATE_SHIFT,
        )
    }

    /// The same descriptor and order, now in a per-CPU list.
    #[inline]
    pub(crate) const fn to_pcp(self, mt: MigrateType) -> Word {
        Word(
            self.0 & (DESC_MASK | CLASS_MASK | ORDER_MASK | FREE_MASK)
                | PageType::Free as u64
                | (mt as u64) << MIGRATE_SHIFT
                | P_BIT,
        )
    }

    /// The same descriptor and order, now of a handed-out block of this type.
    #[inline]
    pub(crate) const fn to_owned(self, kind: PageType) -> Word {
        Word(self.0 & (DESC_MASK | CLASS_MASK | ORDER_MASK) | kind as u64)
    }
}

/// A count in the word of a large folio's tail. The first tail's word has three.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub(crate) enum TailCount {
    /// How often this page is mapped by itself.
    Page = 5,
    /// In the first tail's word: how often the head's page is.
    Head = 25,
    /// In the first tail's word: how often the folio is mapped as a whole.
    Entire = 45,
}

/// 20 bits each; 19 of the last.
const TAIL_COUNT_MASK: u64 = (1 << 20) - 1;

impl TailCount {
    pub(crate) const fn of(self, word: Word) -> u32 {
        (word.0 >> self as u32 & TAIL_COUNT_MASK) as u32
    }
}

impl fmt::Debug for Word {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = self.kind();
        write!(f, "{} order {}", kind.name(), self.order())?;
        if kind.has_descriptor() {
            write!(f, " desc {:#x} ({:?})", self.desc().0, self.class())?;
        } else if self.facts() != 0 {
            write!(f, " facts {:#x}", self.facts())?;
        }
        if kind == PageType::Free {
            write!(
                f,
                " {}{}",
                self.migratetype().name(),
                if self.is_in_pcp() { " pcp" } else { "" }
            )?;
        }
        Ok(())
    }
}

/// A word in the memory map.
///
/// A word is published last, with Release, when what it leads to is ready; whoever reads it with Acquire may
/// follow it. Only its owner writes it (see the table above), so a load and a store make a transition.
#[derive(Debug)]
#[repr(transparent)]
pub(crate) struct AtomicWord(AtomicU64);

impl AtomicWord {
    #[cfg(loom)]
    pub(crate) fn zero() -> Self {
        AtomicWord(AtomicU64::new(0))
    }

    /// Planted bug for the model checker: what the word leads to may not be visible yet.
    #[cfg(loom)]
    pub(crate) fn publish_relaxed(&self, word: Word) {
        self.0.store(word.0, Ordering::Relaxed);
    }

    /// Reads the word. Pairs with [`publish`](Self::publish).
    #[inline]
    pub(crate) fn load(&self) -> Word {
        Word(self.0.load(Ordering::Acquire))
    }

    /// Reads the word as the one who wrote it last, or under the lock that he held.
    #[inline]
    pub(crate) fn load_owned(&self) -> Word {
        Word(self.0.load(Ordering::Relaxed))
    }

    /// Makes one word another, if it is that. Of words that several may want to change.
    pub(crate) fn claim(&self, from: Word, to: Word) -> bool {
        self.0
            .compare_exchange(from.0, to.0, Ordering::AcqRel, Ordering::Relaxed)
            .is_ok()
    }

    /// One more in a tail's count. The folio's own count of mappings has room for it, so has this.
    #[inline]
    pub(crate) fn inc_tail(&self, count: TailCount) {
        self.0.fetch_add(1 << count as u32, Ordering::Relaxed);
    }

    /// One less; says what is left.
    #[inline]
    pub(crate) fn dec_tail(&self, count: TailCount) -> u32 {
        let old = Word(self.0.fetch_sub(1 << count as u32, Ordering::Relaxed));
        debug_assert!(
            old.is_tail() && count.of(old) > 0,
            "unmapped once too often: {old:?}"
        );
        count.of(old) - 1
    }

    /// Writes the word: what it leads to is ready. Pairs with [`load`](Self::load).
    #[inline]
    pub(crate) fn publish(&self, word: Word) {
        self.0.store(word.0, Ordering::Release);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn is_eight_bytes() {
        assert_eq!(size_of::<Word>(), 8);
        assert_eq!(size_of::<AtomicWord>(), 8);
    }

    #[test]
    fn fields_go_round() {
        for kind in PageType::ALL {
            for order in 0..=10 {
                for class in [
                    DescClass::Buddy,
                    DescClass::Anon,
                    DescClass::Slab,
                    DescClass::Zs,
                    DescClass::Yours,
                ] {
                    for desc in [8, 0x1000, (1 << 44) - 8] {
                        let w = Word::described(kind, order, PhysAddr(desc), class);
                        assert_eq!(
                            (w.kind(), w.order(), w.desc().0, w.class()),
                            (kind, order, desc, class)
                        );
                        for mt in MigrateType::ALL {
                            let free = w.to_free(order, mt);
                            assert!(free.is_free_in_zone(order) && !free.is_in_pcp());
                            assert!(!free.is_free_in_zone(order + 1));
                            assert_eq!(
                                (free.desc().0, free.class(), free.migratetype()),
                                (desc, class, mt)
                            );
                            let pcp = free.to_pcp(mt);
                            assert!(pcp.is_in_pcp() && !pcp.is_free_in_zone(order));
                            assert_eq!(
                                (pcp.order(), pcp.desc().0, pcp.migratetype()),
                                (order, desc, mt)
                            );
                            let owned = pcp.to_owned(PageType::Anon);
                            assert_eq!((owned.kind(), owned.order()), (PageType::Anon, order));
                            assert!(!owned.is_in_pcp());
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn zero_is_no_type() {
        assert_eq!(Word::ZERO.kind(), PageType::None);
        assert!(!Word::ZERO.kind().has_descriptor());
    }
}
