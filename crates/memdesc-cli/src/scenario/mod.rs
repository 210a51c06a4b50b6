//! Scenarios: whole workloads on a machine of their own, with an answer at the end.

pub(crate) mod address_spaces;
mod contents;
mod disk;
pub(crate) mod free_page_reporting;
mod linux_zsmalloc;
pub(crate) mod page_cache;
pub(crate) mod purposes;
pub(crate) mod swap_net;
pub(crate) mod zsmalloc;
