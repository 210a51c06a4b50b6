//! What a block of pages is for, told from the flags it was asked for with.
//!
//! A tracepoint does not say who asks. But each of the large users asks in its own way:
//!
//! | asked with | it is |
//! |---|---|
//! | `__GFP_MOVABLE`, and `__GFP_WRITE`, or no `__GFP_FS`, or `__GFP_NORETRY` without `__GFP_NOMEMALLOC` | page cache: a write, a file system, readahead |
//! | `__GFP_MOVABLE` otherwise (`GFP_HIGHUSER_MOVABLE` with or without `__GFP_ZERO`, `GFP_TRANSHUGE`) | anonymous: a fault, a copy on write, a huge page |
//! | order 0 or 1, `GFP_KERNEL`, `__GFP_ZERO`, `__GFP_COMP`, neither movable nor reclaimable | a page table (`GFP_PGTABLE_USER`) |
//! | anything else | bare pages: drivers, pipes, vmalloc, kernel stacks |
//!
//! File and anonymous memory have the same descriptor, so a mistake between them (shmem) changes no ledger.

use memdesc::gfp::{
    __GFP_COMP, __GFP_FS, __GFP_MOVABLE, __GFP_NOMEMALLOC, __GFP_NORETRY, __GFP_NOWARN,
    __GFP_RECLAIMABLE, __GFP_WRITE, __GFP_ZERO, Flags, GFP_KERNEL,
};

use crate::handles::Purpose;

/// What pages asked for like this are for.
#[inline]
pub(crate) fn purpose(gfp: Flags, order: u8) -> Purpose {
    if gfp.contains(__GFP_MOVABLE) {
        let readahead = gfp.contains(__GFP_NORETRY) && !gfp.contains(__GFP_NOMEMALLOC);
        if gfp.contains(__GFP_WRITE) || !gfp.contains(__GFP_FS) || readahead {
            Purpose::File
        } else {
            Purpose::Anon
        }
    } else if order <= 1
        && gfp.contains(GFP_KERNEL | __GFP_ZERO | __GFP_COMP)
        && !gfp.contains(__GFP_RECLAIMABLE)
    {
        Purpose::PageTable
    } else {
        Purpose::Bare
    }
}

/// Does it look like a slab? For recordings whose addresses do not tell (`allocate_slab()` asks like this).
pub(crate) fn looks_like_slab(gfp: Flags) -> bool {
    gfp.contains(__GFP_COMP | __GFP_NOWARN | __GFP_NORETRY) && !gfp.contains(__GFP_MOVABLE)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As perf prints them.
    fn of(names: &str, order: u8) -> Purpose {
        let mut gfp = Flags::EMPTY;
        for name in names.split('|') {
            gfp |= Flags::from_name(name).unwrap();
        }
        purpose(gfp, order)
    }

    #[test]
    fn purposes() {
        assert_eq!(
            of("GFP_HIGHUSER_MOVABLE|__GFP_ZERO|__GFP_COMP", 0),
            Purpose::Anon
        );
        assert_eq!(of("GFP_HIGHUSER_MOVABLE|__GFP_COMP", 0), Purpose::Anon);
        assert_eq!(of("GFP_TRANSHUGE|__GFP_NORETRY", 9), Purpose::Anon);
        assert_eq!(
            of("GFP_HIGHUSER_MOVABLE|__GFP_WRITE|__GFP_COMP", 0),
            Purpose::File
        );
        let readahead = "GFP_NOFS|__GFP_HIGHMEM|__GFP_MOVABLE|__GFP_NOWARN|__GFP_NORETRY|__GFP_COMP|__GFP_HARDWALL";
        assert_eq!(of(readahead, 2), Purpose::File);
        assert_eq!(
            of("GFP_KERNEL_ACCOUNT|__GFP_ZERO|__GFP_COMP", 0),
            Purpose::PageTable
        );
        assert_eq!(
            of("GFP_KERNEL|__GFP_ZERO|__GFP_COMP", 0),
            Purpose::PageTable
        );
        assert_eq!(
            of("GFP_KERNEL_ACCOUNT|__GFP_ZERO|__GFP_COMP", 2),
            Purpose::Bare
        );
        assert_eq!(of("GFP_HIGHUSER|__GFP_ACCOUNT", 0), Purpose::Bare);
        assert_eq!(of("GFP_NOWAIT", 0), Purpose::Bare);
    }
}
