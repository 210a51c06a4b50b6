//! What a thread can have of memory, filled with a byte of its own: how it is looked at, and how it is let go.

use std::ptr::NonNull;

use memdesc::rcu::RcuHead;
use memdesc::zsmalloc::ZsHandle;
use memdesc::{KernelStack, Pfn};

use super::{Count, Shared};
use crate::rng::Rng;

/// Memory that somebody has.
pub(super) enum Thing {
    /// Bare pages, folios, page tables, pages of a type of the kernel's own: what `free_pages` takes.
    Pages {
        pfn: Pfn,
        order: usize,
        /// Counted pages that are no folio: users may map them.
        users: bool,
    },
    Contig {
        start: Pfn,
        pages: u32,
    },
    Guard(Pfn),
    Offline {
        start: Pfn,
        pages: u32,
    },
    /// A page of a network pool, or a fragment of one.
    Net {
        page: Pfn,
        at: usize,
        len: usize,
    },
    Device {
        pfn: Pfn,
        order: usize,
    },
    /// What `kvfree` takes.
    Memory {
        ptr: NonNull<u8>,
        len: usize,
        /// Its deferred free is paid for.
        prepaid: bool,
    },
    /// Of the cache with this number.
    Object {
        cache: usize,
        ptr: NonNull<u8>,
    },
    Stack(KernelStack),
    /// Of the pool with this number.
    Compressed {
        pool: usize,
        handle: ZsHandle,
        len: usize,
    },
}

/// With what it was filled with.
pub(super) struct Held {
    pub(super) thing: Thing,
    pub(super) byte: u8,
}

// SAFETY: memory that one thread has at a time; it may be freed by another than had it.
unsafe impl Send for Held {}

/// Are all these bytes `byte`?
pub(super) fn is_all(bytes: &[u8], byte: u8) -> bool {
    let word = u64::from_ne_bytes([byte; 8]);
    let words = bytes.chunks_exact(8);
    let rest = words.remainder().iter().all(|&b| b == byte);
    rest && words
        .fold(0, |differs, chunk| {
            let chunk: [u8; 8] = chunk.try_into().unwrap_or_default();
            differs | (u64::from_ne_bytes(chunk) ^ word)
        })
        .eq(&0)
}

/// The first byte that is not what it should be.
fn first_wrong(bytes: &[u8], byte: u8) -> String {
    match bytes.iter().position(|&b| b != byte) {
        Some(at) => {
            let wrong = bytes.iter().filter(|&&b| b != byte).count();
            format!(
                "{wrong} of {} bytes, the first at {at}: {:#04x}, not {byte:#04x}",
                bytes.len(),
                bytes[at]
            )
        }
        // It was another moment ago.
        None => format!("{} bytes are {byte:#04x} again", bytes.len()),
    }
}

impl Thing {
    /// Where its bytes are; none of what nobody may touch, or of what has no address.
    fn bytes(&self, shared: &Shared<'_>) -> Option<(NonNull<u8>, usize)> {
        let at = |pfn: Pfn| NonNull::new(shared.mm.page_address(pfn));
        match *self {
            Thing::Pages { pfn, order, .. } | Thing::Device { pfn, order } => {
                Some((at(pfn)?, 4096 << order))
            }
            Thing::Contig { start, pages } => Some((at(start)?, pages as usize * 4096)),
            Thing::Net {
                page,
                at: from,
                len,
            } => {
                let page = at(page)?;
                // SAFETY: a fragment lies in its page.
                Some((unsafe { page.add(from) }, len))
            }
            Thing::Memory { ptr, len, .. } => Some((ptr, len)),
            Thing::Object { cache, ptr } => Some((ptr, shared.caches[cache].object_size())),
            Thing::Stack(ref stack) => Some((stack.bottom(), stack.size())),
            Thing::Guard(_) | Thing::Offline { .. } | Thing::Compressed { .. } => None,
        }
    }

    /// In words.
    pub(super) fn name(&self, shared: &Shared<'_>) -> String {
        match *self {
            Thing::Pages { pfn, order, .. } => {
                format!("{} {pfn:?} of order {order}", shared.mm.type_name(pfn))
            }
            Thing::Contig { start, pages } => format!("{pages} pages in a row from {start:?}"),
            Thing::Guard(pfn) => format!("guard {pfn:?}"),
            Thing::Offline { start, pages } => format!("{pages} pages off line from {start:?}"),
            Thing::Net { page, at, len } => format!("{len} bytes at {at} of net pool {page:?}"),
            Thing::Device { pfn, order } => format!("device {pfn:?} of order {order}"),
            Thing::Memory { ptr, len, .. } => format!("{len} bytes of kvmalloc at {ptr:p}"),
            Thing::Object { cache, ptr } => {
                format!("object {ptr:p} of {}", shared.caches[cache].name())
            }
            Thing::Stack(ref stack) => format!("stack at {:p}", stack.bottom()),
            Thing::Compressed { pool, len, .. } => format!("{len} compressed bytes of pool {pool}"),
        }
    }

    /// A page of it, of what has pages.
    pub(super) fn page(&self) -> Option<(Pfn, usize)> {
        match *self {
            Thing::Pages { pfn, order, .. } | Thing::Device { pfn, order } => Some((pfn, order)),
            Thing::Contig { start, .. } => Some((start, 0)),
            Thing::Net { page, .. } => Some((page, 0)),
            _ => None,
        }
    }

    /// Pages that it takes, at most.
    pub(super) fn weight(&self) -> u64 {
        match *self {
            Thing::Pages { order, .. } => 1 << order,
            Thing::Contig { pages, .. } | Thing::Offline { pages, .. } => u64::from(pages),
            Thing::Guard(_) | Thing::Net { .. } => 1,
            Thing::Memory { len, .. } => len.div_ceil(4096) as u64,
            Thing::Stack(ref stack) => (stack.size() / 4096) as u64,
            Thing::Device { .. } | Thing::Object { .. } | Thing::Compressed { .. } => 0,
        }
    }
}

impl Held {
    /// Fills it. `zeroed`: it has to be all zero before.
    pub(super) fn fill(&self, shared: &Shared<'_>, zeroed: bool) {
        if let Thing::Compressed { pool, handle, len } = self.thing {
            let data = [self.byte; 4096];
            let pool = &shared.compressed[pool];
            if let Err(why) = shared.mm.zs_obj_write(pool, handle, &data[..len]) {
                shared.wrong(format!("{}: {why}", self.thing.name(shared)));
            }
        }
        let Some((ptr, len)) = self.thing.bytes(shared) else {
            return;
        };
        if zeroed {
            // SAFETY: ours alone, and as long; made to be zero, so it is initialised.
            let bytes = unsafe { std::slice::from_raw_parts(ptr.as_ptr(), len) };
            if !is_all(bytes, 0) {
                let name = self.thing.name(shared);
                let wrong = first_wrong(bytes, 0);
                shared.wrong(format!("{name} was asked for zeroed: {wrong}"));
            }
        }
        // SAFETY: ours alone, and as long.
        unsafe { ptr.write_bytes(self.byte, len) };
    }

    /// Looks at what is in it.
    pub(super) fn check(&self, shared: &Shared<'_>) {
        shared.count(Count::Looks);
        if let Thing::Compressed { pool, handle, len } = self.thing {
            let mut copy = [0; 4096];
            let pool = &shared.compressed[pool];
            let view = shared.mm.zs_obj_read_begin(pool, handle, &mut copy[..len]);
            let wrong = match view {
                Ok(view) if is_all(&view, self.byte) => None,
                Ok(view) => Some(first_wrong(&view, self.byte)),
                Err(why) => Some(why.to_string()),
            };
            if let Some(wrong) = wrong {
                shared.wrong(format!("{}: {wrong}", self.thing.name(shared)));
            }
        }
        let Some((ptr, len)) = self.thing.bytes(shared) else {
            return;
        };
        // SAFETY: ours, as long, filled; users who have it mapped write what is in it already.
        let bytes = unsafe { std::slice::from_raw_parts(ptr.as_ptr(), len) };
        if !is_all(bytes, self.byte) {
            let name = self.thing.name(shared);
            shared.wrong(format!("{name}: {}", first_wrong(bytes, self.byte)));
        }
    }

    /// Looks at it once more and lets it go, in one of the ways that there are. What could not be let go comes back.
    pub(super) fn release(self, shared: &Shared<'_>, rng: &mut Rng) -> Result<(), Held> {
        self.check(shared);
        let mm = shared.mm;
        shared.count(Count::Frees);
        // SAFETY: all of it is ours, whole, and used by nobody any more; readers of deferred frees there are none.
        unsafe {
            match self.thing {
                Thing::Pages { pfn, .. } if rng.one_in(8) => mm.free_pages_nolock(pfn),
                Thing::Pages { pfn, .. } => mm.free_pages(pfn),
                Thing::Contig { start, pages } => mm.free_contig_range(start, pages),
                Thing::Guard(pfn) => {
                    mm.unguard_pages(pfn);
                    mm.free_pages(pfn);
                }
                Thing::Offline { start, pages } => {
                    if mm.online_pages(start, pages).is_err() {
                        return Err(self);
                    }
                    shared.count(Count::Onlines);
                }
                Thing::Net { page, .. } => mm.page_pool_put_page(page),
                Thing::Device { pfn, .. } => super::read(&shared.device).put(pfn),
                Thing::Memory {
                    ptr, prepaid: true, ..
                } => {
                    shared.count(Count::Deferred);
                    mm.kfree_rcu_prepaid(ptr);
                }
                Thing::Memory { ptr, len, .. } => match rng.below(4) {
                    0 if len >= size_of::<RcuHead>() => {
                        shared.count(Count::Deferred);
                        mm.kvfree_rcu(ptr, ptr.cast());
                    }
                    1 => {
                        shared.count(Count::Deferred);
                        mm.kvfree_rcu_mightsleep(ptr);
                    }
                    _ => mm.kvfree(ptr),
                },
                Thing::Object { ptr, .. } if rng.one_in(4) => {
                    shared.count(Count::Deferred);
                    mm.kvfree_rcu_mightsleep(ptr);
                }
                Thing::Object { cache, ptr } => mm.kmem_cache_free(&shared.caches[cache], ptr),
                Thing::Stack(stack) => mm.free_kernel_stack(stack),
                Thing::Compressed { pool, handle, .. } => {
                    mm.zs_free(&shared.compressed[pool], handle);
                }
            }
        }
        Ok(())
    }
}
