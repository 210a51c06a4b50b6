//! Mempools for what has a fixed size, as one would use them without writing the network stack anew.
//!
//! Heads come from a pool of heads, pages from pools of pages, as many as the stack can have at most. Packets' data has any size from 64 bytes to two KiB and
//! comes from `kmalloc`; there is no pool for that, so it stays as it was before the stack was written anew for `__GFP_MEMALLOC`: GFP_ATOMIC, which
//! everybody may say. Or, as a form between the two, as it is today.

use std::ptr::NonNull;

use memdesc::gfp::GFP_KERNEL;
use memdesc::{AllocError, Cache, Mempool, MempoolKind, Mm, Pfn};
use memdesc_host::Host;

use super::memory::{ATOMIC, Data, Memory, Pages, Raw, Today};
use super::settings::Bounds;

type Pool<'m> = Mempool<'m, Host>;

/// Pools of heads and of pages; data from elsewhere.
pub(super) struct Mempools<'m> {
    mm: &'m Mm<Host>,
    heads: Pool<'m>,
    receive: Pool<'m>,
    fragments: Pool<'m>,
    today: Today<'m>,
    /// Data comes from whatever is left.
    memalloc: bool,
}

impl<'m> Mempools<'m> {
    /// Filled while there still is memory.
    pub(super) fn new(
        mm: &'m Mm<Host>,
        heads: &'m Cache<'m>,
        bounds: &Bounds,
        memalloc: bool,
    ) -> Result<Self, AllocError> {
        let pool = |name, kind, min_nr| mm.mempool_create(name, kind, min_nr, GFP_KERNEL);
        let pages = MempoolKind::Pages { order: 0 };
        Ok(Mempools {
            mm,
            heads: pool("skb heads", MempoolKind::Slab(heads), bounds.heads())?,
            receive: pool("receive buffers", pages, bounds.receive_pages())?,
            fragments: pool("fragments", pages, bounds.fragments)?,
            today: Today::new(mm, heads),
            memalloc,
        })
    }

    fn pages(&self, of: Pages) -> &Pool<'m> {
        match of {
            Pages::Receive => &self.receive,
            Pages::Fragment => &self.fragments,
        }
    }

    /// Takes the pools down: how many of them lacked something.
    pub(super) fn close(self) -> u64 {
        let pools = [self.heads, self.receive, self.fragments];
        let busy = pools.into_iter().map(|pool| pool.destroy().is_err());
        busy.map(u64::from).sum()
    }
}

/// What was set aside is what ordinary memory would not have served.
fn element(pool: &Pool<'_>) -> Result<Raw<NonNull<u8>>, AllocError> {
    let taken = pool.view().taken;
    let at = pool.alloc(ATOMIC)?;
    let emergency = pool.view().taken > taken;
    Ok(Raw { at, emergency })
}

// SAFETY: what the memory manager hands out, once each; an element is in a pool or somebody's.
unsafe impl Memory for Mempools<'_> {
    fn head(&self) -> Result<Raw<NonNull<u8>>, AllocError> {
        element(&self.heads)
    }

    fn data(&self, size: usize, of: Data) -> Result<Raw<NonNull<u8>>, AllocError> {
        if self.memalloc {
            return self.today.data(size, of);
        }
        let at = self.mm.kmalloc(size, ATOMIC)?;
        Ok(Raw {
            at,
            emergency: false,
        })
    }

    fn page(&self, of: Pages) -> Result<Raw<Pfn>, AllocError> {
        let Raw { at, emergency } = element(self.pages(of))?;
        let at = self.mm.virt_to_pfn(at.as_ptr());
        Ok(Raw { at, emergency })
    }

    unsafe fn free_head(&self, head: Raw<NonNull<u8>>) {
        // SAFETY: the caller's promise.
        unsafe { self.heads.free(head.at) }
    }

    unsafe fn free_data(&self, data: Raw<NonNull<u8>>) {
        // SAFETY: the caller's promise.
        unsafe { self.today.free_data(data) }
    }

    unsafe fn free_page(&self, page: Raw<Pfn>, of: Pages) {
        if let Some(at) = NonNull::new(self.mm.page_address(page.at)) {
            // SAFETY: the caller's promise.
            unsafe { self.pages(of).free(at) }
        }
    }
}
