//! Each event as the calls that it means.
//!
//! What came before the recording, what was not traced and what was freed in part is made up for here, so that a call frees what another got, and
//! every block and object goes back once.

mod slab;

use alloc::vec::Vec;

use memdesc::AllocError;
use memdesc::gfp::Flags;
use memdesc_trace::{CacheId, CacheTable, Event, EventKind};

use crate::classify;
use crate::corrections::Corrections;
use crate::counts::{PageCounts, SlabCounts, Traffic, reason};
use crate::handles::{Purpose, Token};
use crate::objects::Objects;
use crate::pages::{Freed, Holder, Pages};
use crate::slabs::SlabPages;

/// What the calls go to.
pub trait Backend {
    /// Stands for a block of pages.
    type Block: Token;
    /// Stands for an object.
    type Object;

    /// The next event: its time on the recording's clock, and its CPU.
    fn begin(&mut self, time_ns: u64, cpu: u16);

    /// Pages for a purpose.
    ///
    /// # Errors
    ///
    /// The memory manager's.
    fn alloc(&mut self, purpose: Purpose, gfp: Flags, order: u8)
    -> Result<Self::Block, AllocError>;

    /// Pages go back. `order` is what they were asked for with.
    fn free(&mut self, block: Self::Block, order: u8);

    /// An object of kmalloc's.
    ///
    /// # Errors
    ///
    /// The memory manager's.
    fn kmalloc(&mut self, size: usize, gfp: Flags) -> Result<Self::Object, AllocError>;

    /// An object of a cache.
    ///
    /// # Errors
    ///
    /// The memory manager's; [`AllocError::BadSize`] for a cache that is not known.
    fn cache_alloc(
        &mut self,
        id: CacheId,
        table: &CacheTable,
        gfp: Flags,
    ) -> Result<Self::Object, AllocError>;

    /// An object goes back.
    fn free_object(&mut self, object: Self::Object);
}

/// What the events work on.
pub struct Engine<B: Backend> {
    /// What the calls go to.
    pub backend: B,
    /// Linux's pages.
    pub pages: Pages<B::Block>,
    /// Linux's objects.
    pub objects: Objects<B::Object>,
    slabs: Option<SlabPages>,
    /// Events by kind.
    pub traffic: Traffic,
    /// Calls for pages.
    pub page_counts: PageCounts,
    /// Calls for objects.
    pub slab_counts: SlabCounts,
    dead: Vec<B::Object>,
    /// What the last snapshot knows better than flags.
    pub corrections: Corrections,
}

impl<B: Backend> Engine<B> {
    /// `slabs` is `None` if objects are not replayed.
    pub fn new(
        backend: B,
        pages: Pages<B::Block>,
        objects: Objects<B::Object>,
        slabs: Option<SlabPages>,
    ) -> Engine<B> {
        Engine {
            backend,
            pages,
            objects,
            slabs,
            traffic: Traffic::default(),
            page_counts: PageCounts::default(),
            slab_counts: SlabCounts::default(),
            dead: Vec::new(),
            corrections: Corrections::default(),
        }
    }

    /// Replays the event with this number. All of its pages lie below [`Pages::len`].
    #[inline]
    pub fn event(&mut self, index: usize, event: &Event, table: &CacheTable) {
        self.backend.begin(event.time_ns, event.cpu);
        match event.kind() {
            EventKind::PageAlloc {
                pfn, order, gfp, ..
            } => {
                self.traffic.page_alloc += 1;
                self.page_alloc(index, pfn, order, gfp);
            }
            EventKind::PageAllocFailed { .. } => self.traffic.page_alloc_failed += 1,
            EventKind::PageFree { pfn, order } => {
                self.traffic.page_free += 1;
                self.page_free(pfn, order);
            }
            EventKind::PageFreeBatched { .. } => self.traffic.page_free_batched += 1,
            EventKind::Kmalloc {
                ptr,
                bytes_req,
                gfp,
                ..
            } => {
                self.traffic.kmalloc += 1;
                self.object_alloc(ptr, bytes_req.into(), |backend| {
                    backend.kmalloc(bytes_req as usize, gfp)
                });
            }
            EventKind::Kfree { ptr } => {
                self.traffic.kfree += 1;
                self.object_free(ptr);
            }
            EventKind::CacheAlloc { cache, ptr, gfp } => {
                self.traffic.cache_alloc += 1;
                let size = table.get(cache).map_or(0, |c| c.bytes_req.into());
                self.object_alloc(ptr, size, |backend| backend.cache_alloc(cache, table, gfp));
            }
            EventKind::CacheFree { ptr, .. } => {
                self.traffic.cache_free += 1;
                self.object_free(ptr);
            }
        }
    }

    #[inline]
    fn page_alloc(&mut self, index: usize, pfn: u32, order: u8, gfp: Flags) {
        if self.pages.is_taken(pfn, order) {
            self.reused(pfn, order);
        }
        if self
            .slabs
            .as_ref()
            .is_some_and(|slabs| slabs.contains(index))
        {
            self.pages.mark(pfn, order, Holder::Slab);
            self.page_counts.slab_allocated += 1;
            return;
        }
        let purpose = self
            .corrections
            .of(index)
            .unwrap_or_else(|| classify::purpose(gfp, order));
        match self.backend.alloc(purpose, gfp, order) {
            Ok(block) => {
                self.pages.put(pfn, order, Holder::of(purpose), block);
                let counts = &mut self.page_counts;
                counts.allocated += 1;
                counts.allocated_pages += 1 << order;
                counts.by_purpose[purpose as usize] += 1;
                counts.by_order[usize::from(order).min(memdesc::MAX_ORDER)] += 1;
            }
            Err(why) => {
                self.pages.mark(pfn, order, Holder::Failed);
                self.page_failed(why, order);
            }
        }
    }

    #[cold]
    fn page_failed(&mut self, why: AllocError, order: u8) {
        self.page_counts.failed += 1;
        *self
            .page_counts
            .failures
            .entry((reason(why), order.into()))
            .or_default() += 1;
    }

    /// Pages are handed out that were never seen to come back: whole blocks did, then.
    #[cold]
    #[inline(never)]
    fn reused(&mut self, pfn: u32, order: u8) {
        let end = pfn + (1 << order);
        for page in pfn..end {
            let Some((head, size)) = self.pages.block_of(page) else {
                continue;
            };
            match self.pages.holder(page) {
                Holder::Slab => {
                    self.free_objects_of(head, size);
                    self.page_counts.slab_freed += 1;
                }
                // It was free after all.
                Holder::Unseen => {
                    let _ = self.pages.take(page, 0);
                    continue;
                }
                _ => self.page_counts.free_implied += 1,
            }
            // Only what is still of this block: parts may have been freed, and handed out to others.
            for other in head..head + (1 << size) {
                if self.pages.block_of(other) == Some((head, size)) {
                    let freed = self.pages.take(other, 0);
                    self.give_back(freed);
                }
            }
        }
    }

    #[inline]
    fn page_free(&mut self, pfn: u32, order: u8) {
        match self.pages.holder(pfn) {
            Holder::Slab => {
                self.page_counts.slab_freed += 1;
                self.free_objects_of(pfn, order);
            }
            Holder::OldSlab if self.slabs.is_some() => self.free_objects_of(pfn, order),
            _ => {}
        }
        let freed = self.pages.take(pfn, order);
        let counts = &mut self.page_counts;
        counts.free_unseen += u64::from(freed.unknown > 0);
        counts.free_in_part += u64::from(freed.in_part > 0);
        counts.free_reserved += u64::from(freed.reserved > 0);
        counts.free_joined += u64::from(!freed.more.is_empty());
        self.give_back(freed);
    }

    #[inline]
    fn give_back(&mut self, freed: Freed<B::Block>) {
        if let Some((block, _, order)) = freed.first {
            self.free_block(block, order);
        }
        for (block, _, order) in freed.more {
            self.free_block(block, order);
        }
    }

    #[inline]
    fn free_block(&mut self, block: B::Block, order: u8) {
        self.backend.free(block, order);
        self.page_counts.freed += 1;
        self.page_counts.freed_pages += 1 << order;
    }

    /// Linux's slab gave these pages back, so its objects are gone, seen or not.
    fn free_objects_of(&mut self, pfn: u32, order: u8) {
        let mut dead = core::mem::take(&mut self.dead);
        for page in pfn..pfn + (1 << order) {
            self.objects.take_page(page, &mut dead);
        }
        for object in dead.drain(..) {
            self.slab_counts.free_with_slab += 1;
            self.free_object(object);
        }
        self.dead = dead;
    }

    /// Takes everything that is live, for the teardown. Says how many blocks and objects that were.
    pub fn take_all(
        &mut self,
        mut free_object: impl FnMut(&mut B, B::Object),
        mut free: impl FnMut(&mut B, B::Block),
    ) -> (u64, u64) {
        let mut objects = 0;
        for object in self.objects.drain() {
            free_object(&mut self.backend, object);
            objects += 1;
        }
        let backend = &mut self.backend;
        let blocks = self.pages.take_all(|block| free(backend, block));
        (blocks, objects)
    }
}
