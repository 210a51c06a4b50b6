//! An object's life: made, written, read, freed.

use core::fmt;
use core::ops::Deref;
use core::panic::Location;
use core::ptr::NonNull;

use super::class::{self, ZS_SIZE_CLASSES};
use super::handle::{Slot, ZsHandle};
use super::pool::{ZsPool, class as class_at};
use super::zspage::{Place, page_flags};
use crate::address::PAGE_SIZE;
use crate::error::AllocError;
use crate::gfp::{self, Flags};
use crate::mm::Mm;
use crate::platform::{Platform, might_sleep};
use crate::sync::atomic::Ordering;

/// Why an object cannot be had.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum ZsError {
    /// The handle leads to no object of this pool: it was freed, or never was one.
    NoSuchObject,
    /// Somebody reads or writes it.
    Busy,
    /// More bytes than the object has.
    TooLong {
        /// So many bytes fit.
        capacity: usize,
    },
}

impl fmt::Display for ZsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ZsError::NoSuchObject => f.write_str("the handle leads to no object of this pool"),
            ZsError::Busy => f.write_str("somebody reads or writes the object"),
            ZsError::TooLong { capacity } => {
                write!(f, "the object has room for {capacity} bytes")
            }
        }
    }
}

impl core::error::Error for ZsError {}

/// An object as bytes in a row, to be read: in place, or copied to the caller's buffer where it crosses two pages. As long as it lives the object is
/// neither moved nor freed.
pub struct ZsView<'a> {
    bytes: &'a [u8],
    slot: &'a Slot,
}

impl Deref for ZsView<'_> {
    type Target = [u8];
    #[inline]
    fn deref(&self) -> &[u8] {
        self.bytes
    }
}

impl Drop for ZsView<'_> {
    #[inline]
    fn drop(&mut self) {
        self.slot.unread();
    }
}

impl fmt::Debug for ZsView<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ZsView")
            .field("len", &self.bytes.len())
            .finish_non_exhaustive()
    }
}

impl<P: Platform> Mm<P> {
    /// An object of `size` bytes (`zs_malloc`). What it holds is not said: write it before it is read.
    ///
    /// # Context
    ///
    /// With `__GFP_DIRECT_RECLAIM` it may sleep; else any context that may pin a CPU. With `__GFP_MOVABLE` its pages lie among those that can be
    /// moved, which they can.
    ///
    /// # Errors
    ///
    /// [`AllocError::BadSize`] for 0 and for more than a page; [`AllocError::Forbidden`] with `__GFP_FAST_TRY`; else why there was no memory.
    pub fn zs_malloc(
        &self,
        pool: &ZsPool<'_>,
        size: usize,
        gfp: Flags,
    ) -> Result<ZsHandle, AllocError> {
        let core = self.pool(pool);
        let index = class::class_index(size).ok_or(AllocError::BadSize)?;
        if gfp.contains(gfp::__GFP_FAST_TRY) {
            return Err(AllocError::Forbidden);
        }
        if gfp.allow_blocking() {
            might_sleep(&self.pages.platform, "an allocation of compressed memory");
        }
        let (gfp, class) = (page_flags(gfp), class_at(index));
        let slot = self.take_slot(core, gfp)?;
        let generation = core.generation.fetch_add(1, Ordering::Relaxed);
        let made = self.zs_take(core, index, gfp, |head, desc| {
            let (at, place) = self.zs_pop(head, desc, class, slot);
            // Under the lock: who moves the objects of this zspage next finds a slot that is right.
            self.slot_at(slot).set(at.page, place, index, generation);
        });
        match made {
            Ok(()) => Ok(self.handle_of(core, slot)),
            Err(why) => {
                self.give_slot(core, slot);
                Err(why)
            }
        }
    }

    /// Frees an object (`zs_free`). A handle that leads to none, or to one that somebody reads or writes, is reported, and nothing is changed.
    ///
    /// # Context
    ///
    /// Any that may pin a CPU; where locks sleep, one that may sleep. Allocates nothing, cannot fail.
    #[track_caller]
    pub fn zs_free(&self, pool: &ZsPool<'_>, handle: ZsHandle) {
        let core = self.pool(pool);
        let slot = match self.take_object(core, handle, true) {
            Ok(slot) => slot,
            Err(why) => return self.report_handle(core, handle, why, Location::caller()),
        };
        crate::inject::point("zsmalloc: about to be freed");
        // It stays where it is: it is ours.
        let (state, page) = (slot.held(), slot.page());
        let (index, class) = (state.class(), class_at(state.class()));
        let at = Place {
            page,
            offset: (state.index() as usize * usize::from(class.size)) & (PAGE_SIZE - 1),
        };
        let mut lists = self.class_lock(core, index);
        // Under the lock: the first page may move, if nothing of this object is in it.
        let head = self.zs_head(page);
        if self.zsdesc(head).pool() != core.number {
            // A number that was made up, and met an object of another pool.
            drop(lists);
            slot.disown();
            return self.report_handle(core, handle, ZsError::NoSuchObject, Location::caller());
        }
        let empty = self.zs_relist(&mut lists, head, class, |desc| {
            self.zs_push(desc, class, at, state.index());
            desc.inuse() == 0
        });
        lists.zspages -= u64::from(empty);
        drop(lists);
        self.give_slot(core, handle.slot());
        if empty {
            self.free_zspage(head);
        }
    }

    /// Writes an object from its start (`zs_obj_write`).
    ///
    /// # Context
    ///
    /// As [`zs_free`](Self::zs_free).
    ///
    /// # Errors
    ///
    /// There is no such object, somebody reads or writes it, or it is too short. Nothing is written then.
    pub fn zs_obj_write(
        &self,
        pool: &ZsPool<'_>,
        handle: ZsHandle,
        data: &[u8],
    ) -> Result<(), ZsError> {
        let core = self.pool(pool);
        let slot = self.take_object(core, handle, true)?;
        let result = self.held_place(slot, data.len()).map(|at| {
            let mut done = 0;
            while done < data.len() {
                let (target, n) = self.zs_bytes(at, done, data.len() - done);
                let source = NonNull::from(&data[done..]).cast::<u8>();
                // SAFETY: within the object, which is long enough, and ours by its slot; the data is the caller's, who cannot have the
                // pool's memory but by a view, and there is none of this object.
                unsafe { target.copy_from_nonoverlapping(source, n) };
                done += n;
            }
        });
        slot.disown();
        result
    }

    /// An object's first bytes in a row, as many as `local_copy` is long (`zs_obj_read_begin`): in place where they lie in one page, else copied there.
    /// Until the view goes, or is given to [`zs_obj_read_end`](Self::zs_obj_read_end), the object stays where it is. Up to 29 may read it at once.
    ///
    /// # Context
    ///
    /// As [`zs_free`](Self::zs_free). Between begin and end anything may be done, sleeping too.
    ///
    /// # Errors
    ///
    /// There is no such object, somebody writes it, or it is too short.
    #[inline]
    pub fn zs_obj_read_begin<'a>(
        &'a self,
        pool: &'a ZsPool<'_>,
        handle: ZsHandle,
        local_copy: &'a mut [u8],
    ) -> Result<ZsView<'a>, ZsError> {
        let core = self.pool(pool);
        let slot = self.take_object(core, handle, false)?;
        let len = local_copy.len();
        let at = match self.held_place(slot, len) {
            Ok(at) => at,
            Err(why) => {
                slot.unread();
                return Err(why);
            }
        };
        let bytes = if at.offset + len <= PAGE_SIZE {
            let (ptr, _) = self.zs_bytes(at, 0, len);
            // SAFETY: within a page of the object's zspage; nobody writes it as long as it has a reader, which the view is.
            unsafe { core::slice::from_raw_parts(ptr.as_ptr(), len) }
        } else {
            let mut done = 0;
            while done < len {
                let (source, n) = self.zs_bytes(at, done, len - done);
                let target = NonNull::from(&mut local_copy[done..]).cast::<u8>();
                // SAFETY: as above; the buffer has `len` bytes, and is nowhere in the pool's memory.
                unsafe { source.copy_to_nonoverlapping(target, n) };
                done += n;
            }
            local_copy
        };
        Ok(ZsView { bytes, slot })
    }

    /// Ends a reading (`zs_obj_read_end`). Dropping the view does the same.
    #[inline]
    pub fn zs_obj_read_end(&self, view: ZsView<'_>) {
        drop(view);
    }

    /// Where an object lies that the caller is at, if it has so many bytes.
    #[inline]
    fn held_place(&self, slot: &Slot, len: usize) -> Result<Place, ZsError> {
        let state = slot.held();
        let class = class_at(state.class());
        if len > class.capacity() {
            let capacity = class.capacity();
            return Err(ZsError::TooLong { capacity });
        }
        Ok(Place {
            page: slot.page(),
            offset: (state.index() as usize * usize::from(class.size)) & (PAGE_SIZE - 1),
        })
    }

    /// The class for objects of this size (`zs_lookup_class_index`): its place in [`SIZE_CLASSES`](super::SIZE_CLASSES). `None` for 0 and for more
    /// than a page.
    pub fn zs_lookup_class_index(&self, _pool: &ZsPool<'_>, size: usize) -> Option<usize> {
        class::class_index(size).filter(|&index| index < ZS_SIZE_CLASSES)
    }

    /// Objects of this size or more have a page of their own (`zs_huge_class_size`): who compresses does better to keep them as they are.
    pub const fn zs_huge_class_size(&self) -> usize {
        class::HUGE_CLASS_SIZE
    }
}
