//! A tree of reserves: what the stack's own bounds come to is set aside, and is there.
//!
//! A group for the swap device, and below it what it needs: heads, data by what it is for, pages to receive into, fragments. The demands are the bounds of
//! [`Bounds`], to the last piece: within them nothing is ever refused, and who has no handle gets nothing of it.

use std::ptr::NonNull;

use memdesc::{AllocError, Cache, Demand, Mm, Pfn, Reserve};
use memdesc_host::Host;

use super::memory::{ATOMIC, Data, Memory, Pages, Raw};
use super::settings::{ACK_MAX, Bounds, COPYBREAK, DATA_MAX, HEADERS, REQUEST_MAX};

/// A reserve in the listing, as it stood when all was done.
#[derive(Clone, Debug)]
pub(super) struct Node {
    pub(super) name: String,
    pub(super) depth: usize,
    pub(super) kind: &'static str,
    pub(super) pages: u64,
    pub(super) max_taken_pages: u64,
    pub(super) limit: u64,
    pub(super) usage: u64,
    pub(super) max_usage: u64,
    pub(super) refusals: u64,
}

/// The tree.
pub(super) struct Reserves<'m> {
    mm: &'m Mm<Host>,
    cache: &'m Cache<'m>,
    /// Each before those below it.
    groups: Vec<Reserve<'m, Host>>,
    heads: Reserve<'m, Host>,
    data: [Reserve<'m, Host>; 4],
    receive: Reserve<'m, Host>,
    fragments: Reserve<'m, Host>,
}

impl<'m> Reserves<'m> {
    /// Nodes of the tree, the root apart.
    pub(super) const NODES: usize = 9;

    /// Made and connected while there still is memory.
    pub(super) fn new(
        mm: &'m Mm<Host>,
        cache: &'m Cache<'m>,
        bounds: &Bounds,
    ) -> Result<Self, AllocError> {
        let swap = mm.reserve("swap-net", Demand::None)?;
        let group = mm.reserve("data", Demand::None)?;
        let below = |name: &str, demand: Demand<'_>, parent: &Reserve<'m, Host>| {
            let node = mm.reserve(name, demand)?;
            node.connect(Some(parent))?;
            Ok::<_, AllocError>(node)
        };
        let count = bounds.heads();
        let heads = below("heads", Demand::Objects { cache, count }, &swap)?;
        group.connect(Some(&swap))?;
        let packets = Demand::Kmalloc {
            bytes: bounds.sndbuf,
            min: HEADERS,
            max: DATA_MAX,
        };
        let acks = Demand::KmallocObjects {
            size: ACK_MAX,
            count: bounds.device,
        };
        let requests = Demand::KmallocObjects {
            size: REQUEST_MAX,
            count: bounds.requests(),
        };
        let copies = Demand::KmallocObjects {
            size: COPYBREAK,
            count: bounds.reassembly + 1,
        };
        let page = |count| Demand::Pages { order: 0, count };
        let reserves = Reserves {
            mm,
            cache,
            heads,
            data: [
                below("packets", packets, &group)?,
                below("acks", acks, &group)?,
                below("requests", requests, &group)?,
                below("copies", copies, &group)?,
            ],
            receive: below("receive buffers", page(bounds.receive_pages()), &swap)?,
            fragments: below("fragments", page(bounds.fragments), &swap)?,
            groups: vec![swap, group],
        };
        // Only now is anything set aside.
        reserves.groups[0].connect(None)?;
        Ok(reserves)
    }

    /// Takes the tree down: how it stood, and how many of it could not be.
    pub(super) fn close(self) -> (Vec<Node>, u64) {
        let mut nodes = Vec::new();
        self.mm.reserve_info(|view| {
            nodes.push(Node {
                name: view.name().to_owned(),
                depth: view.depth,
                kind: view.kind,
                pages: view.pages,
                max_taken_pages: view.max_taken_pages,
                limit: view.limit,
                usage: view.usage,
                max_usage: view.max_usage,
                refusals: view.refusals,
            });
        });
        let mut left = 0;
        let [packets, acks, requests, copies] = self.data;
        let leaves = [
            self.heads,
            packets,
            acks,
            requests,
            copies,
            self.receive,
            self.fragments,
        ];
        left += u64::from(self.groups[0].disconnect().is_err());
        for node in leaves.into_iter().chain(self.groups.into_iter().rev()) {
            // The group itself is disconnected already.
            let _ = node.disconnect();
            left += u64::from(node.destroy().is_err());
        }
        (nodes, left)
    }

    fn object(&self, got: Result<NonNull<u8>, AllocError>) -> Result<Raw<NonNull<u8>>, AllocError> {
        let at = got?;
        let emergency = self.mm.is_from_reserve(at.as_ptr());
        Ok(Raw { at, emergency })
    }
}

// SAFETY: what the memory manager hands out, once each.
unsafe impl Memory for Reserves<'_> {
    fn head(&self) -> Result<Raw<NonNull<u8>>, AllocError> {
        self.object(self.heads.kmem_cache_alloc(self.cache, ATOMIC))
    }

    fn data(&self, size: usize, of: Data) -> Result<Raw<NonNull<u8>>, AllocError> {
        self.object(self.data[of as usize].kmalloc(size, ATOMIC))
    }

    fn page(&self, of: Pages) -> Result<Raw<Pfn>, AllocError> {
        let reserve = match of {
            Pages::Receive => &self.receive,
            Pages::Fragment => &self.fragments,
        };
        let at = reserve.alloc_pages(ATOMIC, 0)?;
        let emergency = self.mm.page_is_from_reserve(at);
        Ok(Raw { at, emergency })
    }

    unsafe fn free_head(&self, head: Raw<NonNull<u8>>) {
        // SAFETY: the caller's promise.
        unsafe { self.mm.kmem_cache_free(self.cache, head.at) }
    }

    unsafe fn free_data(&self, data: Raw<NonNull<u8>>) {
        // SAFETY: the caller's promise.
        unsafe { self.mm.kfree(data.at) }
    }

    unsafe fn free_page(&self, page: Raw<Pfn>, _of: Pages) {
        // SAFETY: the caller's promise.
        unsafe { self.mm.free_pages(page.at) }
    }
}
