//! Corruption, found: who, where, and what the word said.

use core::fmt;
use core::panic::Location;

use crate::address::Pfn;
use crate::freepage::PageDamage;
use crate::memmap::Word;

/// What is wrong.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Corruption {
    /// Pages or an object freed that are free already.
    DoubleFree,
    /// A pointer into the middle of an object, or a page that is not the head of its allocation.
    NotAHead,
    /// Freed as something that it is not (the word tells what it is).
    WrongType,
    /// Freed to a cache that it is not from.
    WrongCache,
    /// Not memory that the allocator knows.
    NotRam,
    /// Bytes before the object were written.
    RedzoneLeft,
    /// Bytes after the object were written.
    RedzoneRight,
    /// A free object was written.
    Poison,
    /// A cache was destroyed while objects are live.
    ObjectsLeft,
    /// A free page was written.
    PagePoison(PageDamage),
    /// Freed while somebody reads or writes it.
    InUse,
    /// More was to be taken back from a memory cgroup than was charged to it.
    Uncharged,
}

impl Corruption {
    /// In words.
    pub const fn text(self) -> &'static str {
        match self {
            Corruption::DoubleFree => "freed twice",
            Corruption::NotAHead => "freed by a pointer that is not its start",
            Corruption::WrongType => "freed as what it is not",
            Corruption::WrongCache => "freed to the wrong cache",
            Corruption::NotRam => "not memory of this allocator",
            Corruption::RedzoneLeft => "left redzone overwritten",
            Corruption::RedzoneRight => "right redzone overwritten",
            Corruption::Poison => "written after free",
            Corruption::Uncharged => "uncharged without having been charged",
            Corruption::ObjectsLeft => "cache destroyed with live objects",
            Corruption::PagePoison(damage) if damage.single_bit => {
                "single bit error in a free page"
            }
            Corruption::PagePoison(_) => "page written after free",
            Corruption::InUse => "freed while it is being read or written",
        }
    }
}

/// Who did something to an object, and when.
#[derive(Clone, Copy, Debug)]
pub struct Track {
    /// The caller.
    pub location: &'static Location<'static>,
    /// On this CPU.
    pub cpu: u32,
    /// At this time, in the platform's unit.
    pub when: u64,
}

/// A report of corruption.
#[derive(Clone, Copy, Debug)]
pub struct Report<'a> {
    /// What is wrong.
    pub what: Corruption,
    /// The cache, if it is an object's.
    pub cache: Option<&'a str>,
    /// The page.
    pub pfn: Pfn,
    /// What its word said.
    pub word: Word,
    /// The object or page's address.
    pub address: usize,
    /// The first bad byte: offset from the object's start, what was found and what was expected.
    pub byte: Option<(isize, u8, u8)>,
    /// Who allocated it, if that is recorded.
    pub allocated: Option<Track>,
    /// Who freed it, if that is recorded.
    pub freed: Option<Track>,
    /// Who came with it.
    pub caller: &'static Location<'static>,
}

impl fmt::Display for Report<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "memdesc: {}: ", self.what.text())?;
        if let Some(cache) = self.cache {
            write!(f, "object {:#x} of {cache}", self.address)?;
        } else {
            write!(f, "address {:#x}", self.address)?;
        }
        write!(
            f,
            ", {:?}, its word says: {:?}; caller {}",
            self.pfn, self.word, self.caller
        )?;
        // Of a type without a descriptor, what it is for.
        if let Some(facts) = self.word.inline_facts() {
            write!(f, "; it is {}", facts.name())?;
        }
        if let Some((offset, found, expected)) = self.byte {
            write!(f, "; byte {offset}: {found:#04x}, expected {expected:#04x}")?;
        }
        if let Corruption::PagePoison(damage) = self.what {
            let PageDamage { last, bytes, .. } = damage;
            write!(f, "; {bytes} bytes differ, the last is {last}")?;
        }
        for (name, track) in [("allocated", self.allocated), ("freed", self.freed)] {
            if let Some(track) = track {
                write!(
                    f,
                    "; {name} by {} on cpu {} at {}",
                    track.location, track.cpu, track.when
                )?;
            }
        }
        Ok(())
    }
}
