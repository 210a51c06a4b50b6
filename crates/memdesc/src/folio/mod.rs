//! What happens to folios: taken by number, locked, mapped, listed by age, split, moved, let go.
//!
//! Lock order: the folio lock (a bit of its flags, sleeps) before all others here; an LRU list's lock is a leaf.

mod get;
mod lock;
mod lru;
mod mapcount;
mod migrate;
mod private;
mod split;
mod wait;

pub use get::FolioRef;
pub use lock::FolioLock;
pub(crate) use lock::WaitTable;
pub(crate) use lru::Lruvec;
pub use lru::{LruList, LruView};
pub(crate) use mapcount::Mapped;
