//! The page allocator: zones, buddies, per-CPU lists.
//!
//! A request flows one way: [`alloc`] asks the per-CPU list ([`pcp`]), then the zone ([`zone`], [`buddy`],
//! [`fallback`]) if the [`watermark`] allows it. Those who may not wait go through [`nolock`]. Whichever way, pages change hands in [`prep`]. Knows the memory map below it, and of what is above only that
//! descriptors come from somewhere ([`alloc::Descriptors`]).

pub(crate) mod alloc;
pub(crate) mod buddy;
pub(crate) mod exact;
pub(crate) mod fallback;
pub(crate) mod free;
pub(crate) mod nolock;
pub(crate) mod pcp;
pub(crate) mod prep;
pub(crate) mod settle;
mod types;
pub(crate) mod watermark;
pub(crate) mod zone;

pub use pcp::PcpView;
pub use types::{MigrateType, ZoneType};
