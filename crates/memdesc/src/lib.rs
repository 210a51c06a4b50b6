//! A memory manager for kernels in which `struct page` is one 8-byte typed word.
#![no_std]

pub mod address;
pub mod gfp;
pub mod page_alloc;
