//! Measurements of memdesc beside what a user would pick instead, all in one run, since a figure by itself says little about a
//! noisy machine.
//!
//! [`rcu`] measures deferred frees.

pub mod rcu;
