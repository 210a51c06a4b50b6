//! One event of a recording, in 32 bytes, and the table of caches that events refer to.

use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;

use memdesc::gfp::Flags;

/// A cache of the [`CacheTable`] of the same recording.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(transparent)]
pub struct CacheId(pub u32);

impl CacheId {
    /// The kernel did not say which cache it was (older kernels leave out `name=`).
    pub const UNKNOWN: CacheId = CacheId(u32::MAX);

    /// The index into the table, unless the cache is unknown.
    #[inline]
    pub fn index(self) -> Option<usize> {
        (self != CacheId::UNKNOWN).then_some(self.0 as usize)
    }
}

/// What a slab cache is known by.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Cache {
    /// The name; empty where an older kernel gave only the sizes. Bytes that are not UTF-8 are
    /// replaced.
    pub name: String,
    /// Bytes in an object as asked for; 0 while only frees have been seen.
    pub bytes_req: u32,
    /// Bytes that an object takes; 0 while only frees have been seen.
    pub bytes_alloc: u32,
}

/// The caches that a recording mentions, in order of appearance.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct CacheTable(pub(crate) Vec<Cache>);

impl CacheTable {
    /// The cache with this id; `None` for [`CacheId::UNKNOWN`] and for ids of other recordings.
    #[inline]
    pub fn get(&self, id: CacheId) -> Option<&Cache> {
        self.0.get(id.0 as usize)
    }

    /// The first cache with this name.
    pub fn find(&self, name: &str) -> Option<CacheId> {
        self.0
            .iter()
            .position(|c| c.name == name)
            .map(|i| CacheId(i as u32))
    }

    /// Adds a cache, for recordings that are made and not read.
    pub fn add(&mut self, cache: Cache) -> CacheId {
        let id = CacheId(self.0.len() as u32);
        self.0.push(cache);
        id
    }

    /// All of them with their ids.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (CacheId, &Cache)> {
        self.0
            .iter()
            .enumerate()
            .map(|(i, c)| (CacheId(i as u32), c))
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Are there none?
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// What happened.
///
/// Linux does not trace everything: objects that are allocated or freed in bulk, and so most of what
/// `kfree_rcu` frees, come and go without an event. An allocation at an address that is taken means
/// that the object there was freed unseen.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum EventKind {
    /// `mm_page_alloc`: a block of pages was handed out. Slab's own pages are among them.
    PageAlloc {
        /// The first page.
        pfn: u32,
        /// log2 of the number of pages.
        order: u8,
        /// The mobility asked for, as Linux numbers it.
        migratetype: u8,
        /// What the caller wanted.
        gfp: Flags,
    },
    /// `mm_page_alloc` without a page: the allocation failed.
    PageAllocFailed {
        /// log2 of the number of pages.
        order: u8,
        /// The mobility asked for, as Linux numbers it.
        migratetype: u8,
        /// What the caller wanted.
        gfp: Flags,
    },
    /// `mm_page_free`: a block came back.
    PageFree {
        /// The first page.
        pfn: u32,
        /// log2 of the number of pages.
        order: u8,
    },
    /// `mm_page_free_batched`: the free of this page was one of a batch. It comes with a
    /// [`PageFree`](EventKind::PageFree) of the same page and is no second free.
    PageFreeBatched {
        /// The page.
        pfn: u32,
    },
    /// `kmalloc` or `kmalloc_node`. `ptr` 0 is a failed one.
    Kmalloc {
        /// The virtual address.
        ptr: u64,
        /// Bytes asked for.
        bytes_req: u32,
        /// Bytes that it takes.
        bytes_alloc: u32,
        /// What the caller wanted.
        gfp: Flags,
    },
    /// `kfree`. `ptr` 0 is `kfree(NULL)`, which does nothing.
    Kfree {
        /// The virtual address.
        ptr: u64,
    },
    /// `kmem_cache_alloc` or `kmem_cache_alloc_node`. `ptr` 0 is a failed one.
    CacheAlloc {
        /// The cache, with its sizes in the table.
        cache: CacheId,
        /// The virtual address.
        ptr: u64,
        /// What the caller wanted.
        gfp: Flags,
    },
    /// `kmem_cache_free`.
    CacheFree {
        /// The cache.
        cache: CacheId,
        /// The virtual address.
        ptr: u64,
    },
}

#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Tag {
    PageAlloc,
    PageAllocFailed,
    PageFree,
    PageFreeBatched,
    Kmalloc,
    Kfree,
    CacheAlloc,
    CacheFree,
}

/// An event: when, on which CPU, and [what](Event::kind).
///
/// A recording holds millions of these, so the kind is kept taken apart: as an enum beside the CPU
/// it would take 40 bytes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Event {
    /// Nanoseconds on the recording's clock (since boot, mostly).
    pub time_ns: u64,
    address: u64,
    /// Bytes asked for, order, or cache.
    first: u32,
    /// Bytes taken, or mobility.
    second: u32,
    gfp: Flags,
    /// The CPU it happened on.
    pub cpu: u16,
    tag: Tag,
}

const _: () = assert!(size_of::<Event>() == 32);

impl Event {
    /// Puts an event together.
    #[inline]
    pub fn new(time_ns: u64, cpu: u16, kind: EventKind) -> Event {
        let none = Flags::EMPTY;
        let (tag, address, first, second, gfp) = match kind {
            EventKind::PageAlloc {
                pfn,
                order,
                migratetype,
                gfp,
            } => (
                Tag::PageAlloc,
                pfn.into(),
                order.into(),
                migratetype.into(),
                gfp,
            ),
            EventKind::PageAllocFailed {
                order,
                migratetype,
                gfp,
            } => (
                Tag::PageAllocFailed,
                0,
                order.into(),
                migratetype.into(),
                gfp,
            ),
            EventKind::PageFree { pfn, order } => {
                (Tag::PageFree, pfn.into(), order.into(), 0, none)
            }
            EventKind::PageFreeBatched { pfn } => (Tag::PageFreeBatched, pfn.into(), 0, 0, none),
            EventKind::Kmalloc {
                ptr,
                bytes_req,
                bytes_alloc,
                gfp,
            } => (Tag::Kmalloc, ptr, bytes_req, bytes_alloc, gfp),
            EventKind::Kfree { ptr } => (Tag::Kfree, ptr, 0, 0, none),
            EventKind::CacheAlloc { cache, ptr, gfp } => (Tag::CacheAlloc, ptr, cache.0, 0, gfp),
            EventKind::CacheFree { cache, ptr } => (Tag::CacheFree, ptr, cache.0, 0, none),
        };
        Event {
            time_ns,
            address,
            first,
            second,
            gfp,
            cpu,
            tag,
        }
    }

    /// What happened.
    #[inline]
    pub fn kind(&self) -> EventKind {
        let &Event {
            address: ptr,
            first,
            second,
            gfp,
            ..
        } = self;
        let (pfn, order, migratetype) = (ptr as u32, first as u8, second as u8);
        match self.tag {
            Tag::PageAlloc => EventKind::PageAlloc {
                pfn,
                order,
                migratetype,
                gfp,
            },
            Tag::PageAllocFailed => EventKind::PageAllocFailed {
                order,
                migratetype,
                gfp,
            },
            Tag::PageFree => EventKind::PageFree { pfn, order },
            Tag::PageFreeBatched => EventKind::PageFreeBatched { pfn },
            Tag::Kmalloc => EventKind::Kmalloc {
                ptr,
                bytes_req: first,
                bytes_alloc: second,
                gfp,
            },
            Tag::Kfree => EventKind::Kfree { ptr },
            Tag::CacheAlloc => EventKind::CacheAlloc {
                cache: CacheId(first),
                ptr,
                gfp,
            },
            Tag::CacheFree => EventKind::CacheFree {
                cache: CacheId(first),
                ptr,
            },
        }
    }
}

impl fmt::Debug for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Event")
            .field("time_ns", &self.time_ns)
            .field("cpu", &self.cpu)
            .field("kind", &self.kind())
            .finish()
    }
}
