//! What a slot says: the encoding of entries, siblings and nodes in one pointer-sized word.
//!
//! ```text
//!  63 ........................ 4 3..1 0
//! ┌──────────────────────────────┬─────┬─┐
//! │ entry, not zero              │ sub │1│  an entry; `sub` is its order less the node's shift: it has 2^sub slots of this node
//! ├──────────────────────────────┴───┬─┴─┤
//! │ offset of the entry's first slot │1 0│  a sibling: see there
//! │ address of a node                │0 0│  a node, or null: nothing
//! └──────────────────────────────────┴───┘
//! ```
//!
//! A slot is a pointer, not a number: an address that came out of a number leads nowhere (strict provenance), so nodes are stored as the
//! pointers they are, and everything else as pointers to nothing.
//!
//! Linux finds the order of an entry by counting its siblings, under the lock. Here it stands in the entry's slot, so that who looks
//! without a lock sees entry and order in one load, and can tell whether what he was sent to still covers where he came from. That
//! costs three bits of the entry.

use core::num::NonZeroU64;
use core::ptr::{NonNull, null_mut, without_provenance_mut};

use super::node::Node;

const _: () = assert!(usize::BITS == 64, "an entry fills a 64-bit word");

const VALUE: usize = 1;
const SIBLING: usize = 2;
const TAG: usize = 3;
const SUB_SHIFT: u32 = 1;
const SUB_MASK: usize = 7;
const ENTRY_SHIFT: u32 = 4;
const SIBLING_SHIFT: u32 = 2;

/// What the tree holds for an index: a number of the user's, not zero, of 60 bits. The tree keeps its order beside it.
///
/// Source: value entries of Linux (`xa_mk_value`), which have 63 bits and no order.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(transparent)]
pub struct Entry(NonZeroU64);

impl Entry {
    /// How many bits an entry has.
    pub const BITS: u32 = u64::BITS - ENTRY_SHIFT;

    /// `None` if the number is zero or has more than [`BITS`](Self::BITS) bits.
    pub const fn new(value: u64) -> Option<Entry> {
        match NonZeroU64::new(value) {
            Some(value) if value.get() >> Entry::BITS == 0 => Some(Entry(value)),
            _ => None,
        }
    }

    /// The number.
    pub const fn get(self) -> u64 {
        self.0.get()
    }
}

/// A slot, decoded.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Slot {
    Empty,
    /// The first of `1 << sub` slots.
    Value(Entry, u32),
    /// The value is at this offset, which is smaller.
    Sibling(usize),
    Node(NonNull<Node>),
}

impl Slot {
    #[inline]
    pub(super) fn decode(raw: *mut ()) -> Slot {
        let bits = raw.addr();
        if bits & VALUE != 0 {
            let sub = (bits >> SUB_SHIFT & SUB_MASK) as u32;
            return match NonZeroU64::new((bits >> ENTRY_SHIFT) as u64) {
                Some(value) => Slot::Value(Entry(value), sub),
                None => Slot::Empty,
            };
        }
        if bits & TAG == SIBLING {
            return Slot::Sibling(bits >> SIBLING_SHIFT);
        }
        match NonNull::new(raw.cast()) {
            Some(node) => Slot::Node(node),
            None => Slot::Empty,
        }
    }

    #[inline]
    pub(super) fn encode(self) -> *mut () {
        let bits = match self {
            Slot::Node(node) => return node.as_ptr().cast(),
            Slot::Empty => return null_mut(),
            Slot::Value(entry, sub) => {
                (entry.get() as usize) << ENTRY_SHIFT | (sub as usize) << SUB_SHIFT | VALUE
            }
            Slot::Sibling(offset) => offset << SIBLING_SHIFT | SIBLING,
        };
        without_provenance_mut(bits)
    }
}
