//! Tests of memdesc that run wherever it does, as Linux's KUnit suites do: `tests/selftest.rs` of the core runs each in a process, and the bare-metal image runs
//! them all at boot, on all CPUs.
//!
//! A test is a function of a [`Lab`], from which it has its machines: memory managers of its own, of so many pages, which are there for nobody else. It needs no thread,
//! no clock and nothing else of its surroundings. What is wrong is a panic. The [table](for_each_suite) names all of them, and how much memory each wants.
//!
//! A new test: a function in the room of its suite, and its line in the table.
#![no_std]

extern crate alloc;

mod helpers;
pub mod mapping;
pub mod mmap;
pub mod purposes;
pub mod reserves;
pub mod slab;
pub mod vmalloc;
pub mod zsmalloc;

use core::ops::Deref;

use memdesc::{Config, Mm, Platform};

pub use helpers::*;

/// Where tests run: it makes machines.
pub trait Lab {
    /// What their memory managers run on.
    type Platform: Platform;

    /// A memory manager, as long as it is wanted. Nothing of it is there afterwards.
    type Booted<'l>: Deref<Target = Mm<Self::Platform>>
    where
        Self: 'l;

    /// What a test begins with: the default, and what is to be tried with all of them.
    fn config(&self) -> Config;

    /// Boots a machine with one range of so many pages, aligned to the largest block.
    fn boot(&self, config: &Config, pages: u32) -> Self::Booted<'_>;

    /// Can this address be read?
    fn can_read(&self, at: *const u8) -> bool;

    /// A machine with one range of so many pages.
    fn flat(&self, pages: u32) -> Flat<'_, Self>
    where
        Self: Sized,
    {
        Flat {
            lab: self,
            config: self.config(),
            pages,
        }
    }
}

/// A machine with one range of memory, before it is booted.
pub struct Flat<'l, L> {
    lab: &'l L,
    /// How it will be set up.
    pub config: Config,
    pages: u32,
}

impl<L> core::fmt::Debug for Flat<'_, L> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Flat")
            .field("pages", &self.pages)
            .finish_non_exhaustive()
    }
}

impl<'l, L: Lab> Flat<'l, L> {
    /// Free pages are inaccessible, where that can be.
    #[must_use]
    pub fn guarded(mut self) -> Self {
        self.config.debug_pagealloc = true;
        self
    }

    /// No object is guarded: for what is about bytes beside objects, or counts pages.
    #[must_use]
    pub fn unsampled(mut self) -> Self {
        self.config.kfence_objects = 0;
        self
    }

    /// Boots it.
    pub fn boot(&self) -> L::Booted<'l> {
        self.lab.boot(&self.config, self.pages)
    }
}

/// A test.
pub struct Case<L> {
    /// `suite::test`.
    pub name: &'static str,
    /// It runs in so much memory, all its machines together.
    pub mib: u32,
    /// Panics if something is wrong.
    pub run: fn(&L),
}

impl<L> core::fmt::Debug for Case<L> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(self.name)
    }
}

/// Gives the table of all tests to a macro: suites, the tests of each, and for each how many MiB its machines have together. Attributes are for who runs them one by one
/// in a process.
#[macro_export]
macro_rules! for_each_suite {
    ($what:ident) => {
        $what! {
            slab {
                pages_go_round 64;
                objects_go_round 64;
                values_are_dropped_once_and_given_back 8;
                a_leaked_value_keeps_its_cache 8;
                bulk_pages_are_pages 16;
                ten_of_them 40;
                slabs_get_smaller_when_memory_is_in_pieces 16;
                descriptors_of_ones_own 16;
            }
            #[cfg(not(miri))]
            vmalloc {
                memory_is_there 32;
                pages_of_ones_own 4;
                addresses_come_back_lazily 16;
                kvmalloc_of_all_sizes 64;
                kvmalloc_where_nothing_is_contiguous 8;
                large_blocks 32;
                kvrealloc 64;
            }
            mmap {
                memory_comes_when_it_is_touched_and_is_copied_when_it_is_written 64;
                large_folios_are_mapped_by_page_and_split_under_their_users 64;
                files_are_shared_and_private_written_back_and_truncated 64;
                what_is_read_in_order_is_read_ahead_in_large_folios 64;
                a_folio_moves_and_keeps_its_descriptor 64;
                what_is_pinned_stays_and_is_the_parents 64;
                what_a_child_had_read_does_not_change_under_it 64;
                tables_go_with_their_last_area 64;
                a_range_is_cleared_and_goes_off_line 64;
                a_large_block_is_had_by_compaction 64;
                file_pages_make_room 64;
                private_data_comes_and_goes 64;
                what_a_child_has_pinned_to_read_does_not_change_under_it 64;
                what_is_pinned_is_what_is_written_whoever_looks_at_it 64;
                private_data_and_locked_memory_keep_folios 64;
                two_mebibytes_at_once_and_page_by_page 128;
            }
            mapping {
                a_fault_that_writes_to_two_mebibytes_of_a_file_makes_it_dirty 64;
                a_folio_outlives_its_family 64;
                rights_are_taken_and_given 64;
                numbers_that_are_too_large_are_refused 32;
                #[cfg_attr(miri, ignore)]
                two_mebibytes_are_mapped_often 128;
                what_is_pinned_to_be_read_is_no_longer_shared 64;
                #[cfg_attr(miri, ignore)]
                pins_that_cannot_be_counted_are_refused 16;
            }
            purposes {
                driver_pages 16;
                the_user_of_a_drivers_page_keeps_it 16;
                a_pool_recycles 16;
                a_pool_ends_before_its_pages_do 16;
                fragments_share_a_page 16;
                the_kernels_own_types 16;
                idle_pages_are_nobodys 16;
            }
            reserves {
                as_many_and_as_deep_as_there_can_be 16;
                the_listing 16;
                what_is_no_reserves_says_so 16;
                a_view_is_a_line 16;
            }
            #[cfg(not(miri))]
            zsmalloc {
                every_size_comes_back 64;
                every_page_leads_to_its_zspage 32;
                so_many_readers_and_no_more 16;
                a_pool_with_objects_stays 16;
                what_is_read_is_not_moved 32;
            }
        }
    };
}

macro_rules! table {
    ($($(#[$of_suite:meta])* $suite:ident { $($(#[$of_test:meta])* $name:ident $mib:literal;)* })*) => {
        impl<L: Lab + 'static> Case<L> {
            /// All tests.
            pub const ALL: &'static [Case<L>] = &[$($(Case {
                name: concat!(stringify!($suite), "::", stringify!($name)),
                mib: $mib,
                run: $suite::$name::<L>,
            }),*),*];
        }
    };
}

for_each_suite!(table);
