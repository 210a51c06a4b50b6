//! Replays what a real Linux kernel's allocators did on an [`Mm`](memdesc::Mm), wherever that runs.
//!
//! In two halves, since the events of a recording are not calls: Linux frees parts of blocks, frees what nobody was seen to allocate, and hands out again
//! what was never seen to come back.
//!
//! - The [`Engine`] makes calls of events, and counts. What it calls is a [`Backend`]: a memory manager (`memdesc replay`), or a [`Planner`], which writes
//!   the calls down.
//! - A [`Plan`] is calls that are written down, each with the CPU that makes it; a [`Run`] makes them, on all CPUs at once, each after those that it
//!   needs. The image on bare metal replays so.
//!
//! Everything is `no_std` and allocates: bookkeeping is a user of memory like any other.

#![cfg_attr(not(test), no_std)]
#![deny(missing_docs)]

extern crate alloc;

pub mod classify;
pub mod corrections;
pub mod counts;
mod engine;
pub mod handles;
pub mod objects;
pub mod pages;
mod plan;
mod run;
pub mod slabs;

pub use corrections::Corrections;
pub use engine::{Backend, Engine};
pub use plan::{Options, Plan, Planner, Slot, has_objects};
pub use run::{Done, Left, Run, StartError};

/// A map from numbers, which are what they are: no hash of a stranger's choice.
pub type FxHashMap<K, V> = hashbrown::HashMap<K, V, rustc_hash::FxBuildHasher>;
/// A set of such.
pub type FxHashSet<K> = hashbrown::HashSet<K, rustc_hash::FxBuildHasher>;
