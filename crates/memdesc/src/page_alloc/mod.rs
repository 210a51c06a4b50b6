//! The page allocator.
mod types;
pub use types::{MigrateType, ZoneType};
