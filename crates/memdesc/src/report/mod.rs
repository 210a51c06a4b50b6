//! Corruption, found: who, where, what the word said, and what lies around it.
//!
//! A report is made without allocating, from any context, out of what the memory map and the descriptors say at that moment, and what was recorded:
//! [`depot`] keeps call stacks, [`history`] who had which page, [`entry`] what it remembers of one, [`page`] reads what a page is without trusting it, [`validate`] looks at everything.

pub(crate) mod depot;
mod display;
pub(crate) mod entry;
pub(crate) mod history;
mod page;
mod validate;

use core::fmt;
use core::panic::Location;

use crate::address::Pfn;
use crate::freepage::PageDamage;
use crate::memmap::Word;
use crate::page_alloc::alloc::PageAllocator;
use crate::platform::Platform;
use crate::slab::KfenceFault;

pub use depot::{DepotInfo, MAX_FRAMES, Stack, StackId};
pub use entry::{PageHistory, PageTrack, Track};
pub use history::PageOwnerInfo;
pub(crate) use page::dump;
pub use page::{DescState, PageState};
pub use validate::Validation;

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
    /// A word of the memory map says what cannot be: it leads to no descriptor of its class, or does not fit its page.
    BadWord,
    /// The links of a free block or a slab lead to what does not lead back (`list_del corruption`).
    BadLinks,
    /// A descriptor's counts do not agree with what they count.
    BadCounts,
    /// A free page was written.
    PagePoison(PageDamage),
    /// Freed while somebody reads or writes it.
    InUse,
    /// More was to be taken back from a memory cgroup than was charged to it.
    Uncharged,
    /// A guarded object's neighbourhood was touched.
    OutOfBounds,
    /// A guarded object was touched after it was freed.
    UseAfterFree,
    /// Guarded memory that is nobody's was touched.
    InvalidAccess,
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
            Corruption::ObjectsLeft => "cache destroyed with live objects",
            Corruption::BadWord => "word overwritten",
            Corruption::BadLinks => "list links overwritten",
            Corruption::BadCounts => "counts overwritten",
            Corruption::PagePoison(damage) if damage.single_bit => {
                "single bit error in a free page"
            }
            Corruption::PagePoison(_) => "page written after free",
            Corruption::InUse => "freed while it is being read or written",
            Corruption::Uncharged => "uncharged without having been charged",
            Corruption::OutOfBounds => "touched out of bounds",
            Corruption::UseAfterFree => "touched after free",
            Corruption::InvalidAccess => "touched though it is nobody's",
        }
    }
}

/// What was recorded of a page ([`Config::page_owner`](crate::Config::page_owner)).
#[derive(Clone, Copy, Debug)]
pub enum Recorded {
    /// Nothing is recorded.
    Off,
    /// Nothing was, and nothing has been dropped that could have been this page's: it never changed hands.
    Nothing,
    /// Nothing is left; there may have been something.
    Dropped,
    /// This.
    History(PageHistory),
}

/// An object beside the one that the report is of.
#[derive(Clone, Copy, Debug)]
pub struct ObjectState {
    /// Its address.
    pub address: usize,
    /// Free, in its slab.
    pub free: bool,
    /// Who has it, if it is in use; who freed it, if it is free; as far as that is recorded.
    pub track: Option<Track>,
}

/// Bytes around what is wrong.
#[derive(Clone, Copy, Debug)]
pub struct Dump {
    /// The offset of the first of them from the object's start.
    pub from: isize,
    /// So many of them count.
    pub len: usize,
    /// The bytes.
    pub bytes: [u8; 64],
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
    /// What the page is now, if it is RAM.
    pub page: Option<PageState<'a>>,
    /// Who had the page and who gave it back.
    pub history: Recorded,
    /// The blocks before and after, where there is RAM.
    pub neighbours: [Option<PageState<'a>>; 2],
    /// The objects before and after in the slab.
    pub objects: [Option<ObjectState>; 2],
    /// Bytes around the first bad one.
    pub dump: Option<Dump>,
    /// The access that faulted, if it was one to the guarded pool.
    pub kfence: Option<KfenceFault>,
    pub(crate) stacks: Stacks<'a>,
}

impl Report<'_> {
    /// Visits the call stacks that belong to the report, each with what it did; `None` for those of which there are no addresses.
    pub fn for_each_stack(&self, mut visit: impl FnMut(&'static str, Track, Option<Stack>)) {
        let tracks = [
            ("allocated", self.allocated),
            ("freed", self.freed),
            ("page allocated", self.page_track(false)),
            ("page freed", self.page_track(true)),
        ];
        for (name, track) in tracks {
            if let Some(track) = track {
                visit(
                    name,
                    track,
                    self.stacks.0.and_then(|s| s.stack(track.stack)),
                );
            }
        }
    }

    fn page_track(&self, freed: bool) -> Option<Track> {
        let Recorded::History(history) = self.history else {
            return None;
        };
        let track = if freed {
            history.freed
        } else {
            history.allocated
        };
        track.map(|t| t.track)
    }
}

/// What a report asks while it is printed: stacks by number, and names of addresses.
pub(crate) trait Lookup {
    fn stack(&self, id: StackId) -> Option<Stack>;
    fn symbol(&self, address: usize, out: &mut dyn fmt::Write) -> fmt::Result;
}

/// Whom a report asks.
#[derive(Clone, Copy)]
pub(crate) struct Stacks<'a>(pub(crate) Option<&'a dyn Lookup>);

impl fmt::Debug for Stacks<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("..")
    }
}

impl<P: Platform> Lookup for PageAllocator<P> {
    fn stack(&self, id: StackId) -> Option<Stack> {
        self.depot.get(id)
    }

    fn symbol(&self, address: usize, out: &mut dyn fmt::Write) -> fmt::Result {
        self.platform.symbol(address, out)
    }
}
