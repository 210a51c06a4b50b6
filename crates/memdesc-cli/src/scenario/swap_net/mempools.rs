//! Mempools for what has a fixed size, as one would use them without writing the network stack anew (`mempool_create_slab_pool`, `mempool_create_page_pool`).
//!
//! Heads come from a pool of heads, pages from pools of pages, as many as the stack can have at most. Packets' data has any size from 64 bytes to two KiB and
//! comes from `kmalloc`; there is no pool for that, so it stays as it was before the stack was written anew for `__GFP_MEMALLOC`: GFP_ATOMIC, which
//! everybody may say. Or, as a form between the two, as it is today.

use std::cell::RefCell;
use std::ptr::NonNull;

use memdesc::gfp::{__GFP_NOWARN, GFP_ATOMIC};
use memdesc::{AllocError, Cache, Mm, Pfn};
use memdesc_host::Host;

use super::memory::{Data, Memory, ORDINARY, Pages, Raw, Today};
use super::settings::Bounds;

/// Elements that are kept for when there are no others.
struct Pool<T> {
    elements: RefCell<Vec<T>>,
    /// So many at most: `min_nr`.
    min: usize,
}

impl<T> Pool<T> {
    fn new(min: usize, get: impl Fn() -> Result<T, AllocError>) -> Result<Self, AllocError> {
        let mut elements = Vec::with_capacity(min);
        for _ in 0..min {
            elements.push(get()?);
        }
        let elements = RefCell::new(elements);
        Ok(Pool { elements, min })
    }

    /// `mempool_alloc` where one may not sleep.
    fn get(&self, ordinary: Result<T, AllocError>) -> Result<Raw<T>, AllocError> {
        match ordinary {
            Ok(at) => Ok(Raw {
                at,
                emergency: false,
            }),
            Err(why) => self.elements.borrow_mut().pop().map_or(Err(why), |at| {
                Ok(Raw {
                    at,
                    emergency: true,
                })
            }),
        }
    }

    /// `mempool_free`: fills the pool first, whatever the element was. What there is no room for comes back.
    fn put(&self, at: T) -> Option<T> {
        let mut elements = self.elements.borrow_mut();
        if elements.len() < self.min {
            elements.push(at);
            return None;
        }
        Some(at)
    }
}

/// Pools of heads and of pages; data as today.
pub(super) struct Mempools<'m> {
    mm: &'m Mm<Host>,
    heads: &'m Cache<'m>,
    head_pool: Pool<NonNull<u8>>,
    receive: Pool<Pfn>,
    fragments: Pool<Pfn>,
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
        let page = || mm.alloc_pages(ORDINARY, 0);
        Ok(Mempools {
            mm,
            heads,
            head_pool: Pool::new(bounds.heads(), || mm.kmem_cache_alloc(heads, ORDINARY))?,
            receive: Pool::new(bounds.receive_pages(), page)?,
            fragments: Pool::new(bounds.fragments, page)?,
            today: Today::new(mm, heads),
            memalloc,
        })
    }

    fn pages(&self, of: Pages) -> &Pool<Pfn> {
        match of {
            Pages::Receive => &self.receive,
            Pages::Fragment => &self.fragments,
        }
    }
}

// SAFETY: what the memory manager hands out, once each; an element is in a pool or somebody's.
unsafe impl Memory for Mempools<'_> {
    fn head(&self) -> Result<Raw<NonNull<u8>>, AllocError> {
        self.head_pool
            .get(self.mm.kmem_cache_alloc(self.heads, ORDINARY))
    }

    fn data(&self, size: usize, of: Data) -> Result<Raw<NonNull<u8>>, AllocError> {
        if self.memalloc {
            return self.today.data(size, of);
        }
        let at = self.mm.kmalloc(size, GFP_ATOMIC | __GFP_NOWARN)?;
        Ok(Raw {
            at,
            emergency: false,
        })
    }

    fn page(&self, of: Pages) -> Result<Raw<Pfn>, AllocError> {
        self.pages(of).get(self.mm.alloc_pages(ORDINARY, 0))
    }

    unsafe fn free_head(&self, head: Raw<NonNull<u8>>) {
        if let Some(at) = self.head_pool.put(head.at) {
            // SAFETY: the caller's promise.
            unsafe { self.mm.kmem_cache_free(self.heads, at) }
        }
    }

    unsafe fn free_data(&self, data: Raw<NonNull<u8>>) {
        // SAFETY: the caller's promise.
        unsafe { self.today.free_data(data) }
    }

    unsafe fn free_page(&self, page: Raw<Pfn>, of: Pages) {
        if let Some(at) = self.pages(of).put(page.at) {
            // SAFETY: the caller's promise.
            unsafe { self.mm.free_pages(at) }
        }
    }
}

impl Drop for Mempools<'_> {
    fn drop(&mut self) {
        for head in self.head_pool.elements.get_mut().drain(..) {
            // SAFETY: in the pool, so nobody's.
            unsafe { self.mm.kmem_cache_free(self.heads, head) }
        }
        for pool in [&mut self.receive, &mut self.fragments] {
            for page in pool.elements.get_mut().drain(..) {
                // SAFETY: in the pool, so nobody's.
                unsafe { self.mm.free_pages(page) }
            }
        }
    }
}
