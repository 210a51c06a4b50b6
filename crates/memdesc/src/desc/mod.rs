//! Descriptors: what a word leads to.
//!
//! Each is allocated when pages get a purpose, and its first 8 bytes are a [`Buddy`]: the links of the free block that
//! its pages become when the owner lets go (*morph*). The rest stays what it was until the memory has
//! a new owner, so a stale reader that looks at a [`Folio`]'s count finds zero there, not somebody's list link.

mod buddy;
pub(crate) mod counts;
mod folio;
mod ptdesc;
mod slab;
mod vmarea;
mod zsdesc;

pub(crate) use buddy::{Buddy, DescList, PfnList};
pub use counts::Held;
pub(crate) use counts::{Put, Taken};
pub use folio::{Folio, FolioFlags};
pub(crate) use folio::{FolioPrivate, Place};
pub use ptdesc::PtDesc;
pub use slab::Slab;
pub(crate) use slab::{BITMAP_INLINE, SlabList};
pub(crate) use vmarea::{INLINE as VMAREA_INLINE, State as VmAreaState};
pub use vmarea::{VmArea, VmAreaKind};
pub use zsdesc::ZsDesc;
pub(crate) use zsdesc::{MAX_INDEX as ZS_MAX_INDEX, MAX_POOLS as ZS_MAX_POOLS};
