//! What a block of pages is for, told from the flags it was asked for with.
//!
//! A tracepoint does not say who asks. But each of the large users asks in its own way:
//!
//! | asked with | it is |
//! |---|---|
//! | `__GFP_MOVABLE`, and `__GFP_WRITE`, or no `__GFP_FS`, or `__GFP_NORETRY` without `__GFP_NOMEMALLOC` | page cache: a write, a file system, readahead |
//! | `__GFP_MOVABLE` otherwise (`GFP_HIGHUSER_MOVABLE` with or without `__GFP_ZERO`, `GFP_TRANSHUGE`) | anonymous: a fault, a copy on write, a huge page |
//! | order 0 or 1, `GFP_KERNEL`, `__GFP_ZERO`, `__GFP_COMP`, neither movable nor reclaimable | a page table (`GFP_PGTABLE_USER`) |
//! | `__GFP_COMP`, `__GFP_NOWARN` and `__GFP_NORETRY`, not movable | a slab (`allocate_slab`), but for large ones from `GFP_ATOMIC`, which are a network's fragments |
//! | order 0, `__GFP_COMP` without `__GFP_FS`, neither of the above | a block device's page cache (`grow_dev_folio`): file systems' metadata |
//! | anything else | bare pages: drivers, pipes, vmalloc, kernel stacks |
//!
//! Where a later snapshot shows what became of an allocation, that counts: see `ahead.rs`. By it these rules are right for all but a few
//! hundred of 400 000 pages.

use memdesc::gfp::{
    __GFP_ACCOUNT, __GFP_COMP, __GFP_FS, __GFP_HIGH, __GFP_MOVABLE, __GFP_NOMEMALLOC,
    __GFP_NORETRY, __GFP_NOWARN, __GFP_RECLAIMABLE, __GFP_WRITE, __GFP_ZERO, Flags, GFP_KERNEL,
};

use crate::handles::Purpose;

/// What pages asked for like this are for.
#[inline]
pub fn purpose(gfp: Flags, order: u8) -> Purpose {
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
    } else if looks_like_slab(gfp, order) {
        Purpose::Slab
    } else if looks_like_buffers(gfp, order) {
        Purpose::File
    } else {
        Purpose::Bare
    }
}

/// A page of a block device's cache?
fn looks_like_buffers(gfp: Flags, order: u8) -> bool {
    let never =
        __GFP_FS | __GFP_ZERO | __GFP_NORETRY | __GFP_RECLAIMABLE | __GFP_ACCOUNT | __GFP_HIGH;
    order == 0 && gfp.contains(__GFP_COMP) && !gfp.intersects(never)
}

/// From this order on, what is asked for atomically and only tried is a network's fragments (`page_frag_cache`).
const FRAGMENTS_ORDER: u8 = 3;

/// Does it look like a slab (`allocate_slab()` asks like this)? Of the recordings whose addresses tell, this finds all but three of
/// thirteen thousand, and takes nothing else for one.
pub fn looks_like_slab(gfp: Flags, order: u8) -> bool {
    let fragments = order >= FRAGMENTS_ORDER
        && gfp.contains(__GFP_HIGH)
        && !gfp.intersects(__GFP_NOMEMALLOC | __GFP_RECLAIMABLE);
    gfp.contains(__GFP_COMP | __GFP_NOWARN | __GFP_NORETRY)
        && !gfp.contains(__GFP_MOVABLE)
        && !fragments
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
        assert_eq!(
            of("GFP_NOWAIT|__GFP_IO|__GFP_FS|__GFP_COMP|__GFP_ACCOUNT", 1),
            Purpose::Bare
        );
        assert_eq!(of("GFP_NOWAIT", 0), Purpose::Bare);
    }
    #[test]
    fn slabs() {
        for (gfp, order) in [
            (
                "GFP_NOFS|__GFP_RECLAIMABLE|__GFP_NOWARN|__GFP_NORETRY|__GFP_COMP",
                0,
            ),
            ("GFP_NOWAIT|__GFP_NORETRY|__GFP_COMP|__GFP_THISNODE", 1),
            (
                "__GFP_IO|__GFP_FS|__GFP_NOWARN|__GFP_NORETRY|__GFP_COMP|__GFP_NOMEMALLOC",
                3,
            ),
            (
                "GFP_ATOMIC|__GFP_NOWARN|__GFP_NORETRY|__GFP_COMP|__GFP_NOMEMALLOC",
                3,
            ),
            (
                "GFP_ATOMIC|__GFP_RECLAIMABLE|__GFP_NOWARN|__GFP_NORETRY|__GFP_COMP",
                1,
            ),
        ] {
            assert_eq!(of(gfp, order), Purpose::Slab, "{gfp}");
        }
        let fragments = "GFP_ATOMIC|__GFP_NOWARN|__GFP_NORETRY|__GFP_COMP";
        assert_eq!(of(fragments, 3), Purpose::Bare);
        assert_eq!(of(fragments, 0), Purpose::Slab);
    }

    #[test]
    fn file_systems_metadata() {
        for gfp in [
            "GFP_NOWAIT|__GFP_COMP",
            "GFP_NOFS|__GFP_COMP",
            "GFP_NOFS|__GFP_NOFAIL|__GFP_COMP|__GFP_HARDWALL",
        ] {
            assert_eq!(of(gfp, 0), Purpose::File, "{gfp}");
            assert_eq!(of(gfp, 3), Purpose::Bare, "{gfp}");
        }
        assert_eq!(of("GFP_ATOMIC|__GFP_COMP", 0), Purpose::Bare);
        assert_eq!(of("GFP_NOFS", 0), Purpose::Bare);
    }
}
