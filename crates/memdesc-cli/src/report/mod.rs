//! What is said of a replay: to people, and to programs.

mod census;
mod format;
pub(crate) mod json;
pub(crate) mod picture;
pub(crate) mod text;
