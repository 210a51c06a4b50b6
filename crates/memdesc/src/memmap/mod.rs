//! The memory map: one word per page.
//!
//! [`word`] is the word itself, [`map`] finds it, [`heads`] knows which word speaks for a page. Lower than everything else: knows nothing of who uses it.

pub(crate) mod bad;
pub(crate) mod heads;
pub(crate) mod map;
pub(crate) mod word;

pub use heads::Found;
pub(crate) use map::{BootSlice, Checks, Flaw, MemMap, Region};
pub(crate) use word::{COUNTED, Contents, TailCount};
pub use word::{DescClass, PageType, TAIL_WORDS_ORDER, Word};
