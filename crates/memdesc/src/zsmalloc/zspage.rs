//! Zspages: pages that are taken together for the objects of a class, and how objects lie in them.
//!
//! An object is `size` bytes from a multiple of `size` on, over the border of two pages if need be. Its last [`HEADER`] bytes, which never cross
//! one, say whose it is; of a free object, which is the next. So a free touches one cache line of the object, and data is aligned to 16.
//! A huge object has all of its page; its descriptor says whose it is.
//!
//! The pages are the pool's own while they are handed out, so that the freelist may lie in them.

use core::ptr::NonNull;

use super::class::{HEADER, SizeClass};
use super::handle::SlotRef;
use super::pool::{ClassLists, HANDLES, PoolCore, class, group};
use crate::address::{PAGE_SHIFT, PAGE_SIZE, Pfn, PhysAddr};
use crate::desc::{ZS_MAX_INDEX, ZsDesc};
use crate::error::AllocError;
use crate::gfp::{self, Flags};
use crate::memmap::{DescClass, PageType, Word};
use crate::mm::Mm;
use crate::owner::DescPtr;
use crate::platform::{FaultPoint, Platform};

/// What a page is in its zspage: the number in its word. What leads to a `zsdesc` cannot be told by the class of the descriptor, since a
/// kept buddy may have been anything.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub(crate) enum Part {
    /// The first page: a `zsdesc`.
    Head = 1,
    /// Another: a `buddy` that holds the next page and the first.
    Tail = 2,
    /// A page of handles: a `zsdesc`.
    Handles = 3,
}

impl Part {
    #[inline]
    pub(crate) fn of(word: Word) -> Part {
        match word.number() {
            2 => Part::Tail,
            3 => Part::Handles,
            _ => Part::Head,
        }
    }
}

/// An object says that it is in use by this bit of its header, above the place of its slot.
const ALLOCATED: u64 = 1 << 47;

/// Where an object lies.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    /// The page it starts in.
    pub(crate) page: Pfn,
    /// Where in that.
    pub(crate) offset: usize,
}

impl ClassLists {
    /// The fullest zspage with a free object (`find_get_zspage`).
    pub(crate) fn fullest(&self) -> Option<Pfn> {
        let heads = self.groups.iter().rev().map(|list| list.head);
        heads.into_iter().find(|&head| head != Pfn::NONE)
    }

    /// The emptiest that has an object in use.
    pub(crate) fn emptiest(&self) -> Option<Pfn> {
        let heads = self.groups.iter().map(|list| list.head);
        heads.into_iter().find(|&head| head != Pfn::NONE)
    }
}

impl<P: Platform> Mm<P> {
    pub(super) fn zsdesc_at(&self, desc: PhysAddr) -> &ZsDesc {
        let ptr = self.pages.map.virt(desc).cast::<ZsDesc>();
        // SAFETY: heads of zspages lead to objects of the zsdesc cache, 16 bytes, 8-byte aligned; all fields are atomics, every bit pattern is valid.
        unsafe { &*ptr }
    }

    /// The descriptor of a zspage, given its first page.
    pub(super) fn zsdesc(&self, head: Pfn) -> &ZsDesc {
        self.zsdesc_at(self.pages.map.word(head).load_owned().desc())
    }

    /// The descriptor that a page leads to without a lock. `None` for a page on its way out.
    pub(crate) fn zsdesc_of(&self, word: Word) -> Option<DescPtr<ZsDesc>> {
        // Descriptors of slabs are type-stable as long as we read.
        let _read = self.rcu_read_lock();
        let mut word = word;
        if Part::of(word) == Part::Tail {
            // Links of a block that is free by now can look like any page.
            let head = self.pages.map.buddy_at(word.desc()).prev();
            word = self.pages.map.region(head)?.word(head).load();
        }
        let leads = word.kind() == PageType::Zsmalloc && Part::of(word) != Part::Tail;
        leads
            .then(|| DescPtr::new(self.pages.map.virt(word.desc()).cast()))
            .flatten()
    }

    /// The first page of the zspage that this page of it is in. Under the lock of its class, or with an object in it held.
    pub(super) fn zs_head(&self, page: Pfn) -> Pfn {
        let word = self.pages.map.word(page).load_owned();
        match Part::of(word) {
            Part::Tail => self.pages.map.buddy_at(word.desc()).prev(),
            _ => page,
        }
    }

    /// The page after this one in its zspage, if it is not the last.
    pub(super) fn zs_next(&self, page: Pfn) -> Pfn {
        let word = self.pages.map.word(page).load_owned();
        match Part::of(word) {
            Part::Tail => self.pages.map.buddy_at(word.desc()).next(),
            Part::Head => self.zsdesc_at(word.desc()).second(),
            Part::Handles => Pfn::NONE,
        }
    }

    /// Where an object lies.
    pub(super) fn zs_place(&self, head: Pfn, class: &SizeClass, index: u32) -> Place {
        let at = index as usize * usize::from(class.size);
        let mut page = head;
        for _ in 0..at >> PAGE_SHIFT {
            page = self.zs_next(page);
        }
        Place {
            page,
            offset: at & (PAGE_SIZE - 1),
        }
    }

    /// An object's bytes from `from` on, up to `len` of them: as many as lie in one page.
    ///
    /// The object is long enough, and its zspage stays: somebody is at the object, or has the lock of its class.
    pub(super) fn zs_bytes(&self, at: Place, from: usize, len: usize) -> (NonNull<u8>, usize) {
        let mut offset = at.offset + from;
        let mut page = at.page;
        if offset >= PAGE_SIZE {
            page = self.zs_next(page);
            offset -= PAGE_SIZE;
        }
        let ptr = self.pages.map.virt(page.phys()).wrapping_add(offset);
        match NonNull::new(ptr) {
            Some(ptr) => (ptr, len.min(PAGE_SIZE - offset)),
            None => unreachable!("a page at null"),
        }
    }

    fn header_at(&self, at: Place, class: &SizeClass) -> NonNull<[u16; 3]> {
        let (ptr, len) = self.zs_bytes(at, usize::from(class.size) - HEADER, HEADER);
        debug_assert!(len == HEADER && ptr.cast::<u16>().is_aligned());
        ptr.cast()
    }

    /// What an object says of itself. Under the lock of its class.
    fn header(&self, at: Place, class: &SizeClass) -> u64 {
        let ptr = self.header_at(at, class);
        // SAFETY: inside a page of the zspage, 2-aligned since sizes are multiples of 16; nobody gets these bytes to see, and who changes them
        // has the lock that we have.
        let [low, middle, high] = unsafe { ptr.read() };
        u64::from(low) | u64::from(middle) << 16 | u64::from(high) << 32
    }

    fn set_header(&self, at: Place, class: &SizeClass, bits: u64) {
        let ptr = self.header_at(at, class);
        // SAFETY: as in `header`.
        unsafe { ptr.write([bits as u16, (bits >> 16) as u16, (bits >> 32) as u16]) };
    }

    /// Whose an object is; `None` if it is free. Under the lock of its class.
    pub(super) fn zs_owner(&self, desc: &ZsDesc, at: Place, class: &SizeClass) -> Option<SlotRef> {
        if class.is_huge() {
            let bits = u64::from(desc.second().0) << 9 | u64::from(desc.free());
            return (desc.inuse() > 0).then(|| SlotRef::unpack(bits));
        }
        let bits = self.header(at, class);
        (bits & ALLOCATED != 0).then(|| SlotRef::unpack(bits & !ALLOCATED))
    }

    /// Takes the first free object of a zspage that has one, for this slot. Under the lock of its class.
    pub(super) fn zs_pop(
        &self,
        head: Pfn,
        desc: &ZsDesc,
        class: &SizeClass,
        owner: SlotRef,
    ) -> (Place, u32) {
        let index = if class.is_huge() { 0 } else { desc.free() };
        let at = self.zs_place(head, class, index);
        if class.is_huge() {
            desc.set_second(owner.page);
            desc.set_free(owner.index);
        } else {
            desc.set_free(self.header(at, class) as u32);
            self.set_header(at, class, owner.pack() | ALLOCATED);
        }
        desc.add_inuse(1);
        (at, index)
    }

    /// An object is free again. Under the lock of its class.
    pub(super) fn zs_push(&self, desc: &ZsDesc, class: &SizeClass, at: Place, index: u32) {
        if !class.is_huge() {
            self.set_header(at, class, u64::from(desc.free()));
            desc.set_free(index);
        }
        desc.add_inuse(-1);
    }

    /// Takes a zspage out of its list, if it is in one.
    pub(super) fn zs_unlist(&self, lists: &mut ClassLists, head: Pfn, class: &SizeClass) {
        let word = self.pages.map.word(head).load_owned();
        let desc = self.zsdesc_at(word.desc());
        if let Some(group) = group(desc.inuse(), usize::from(class.objects)) {
            lists.groups[group].unlink(
                &self.pages.map,
                head,
                word.desc(),
                "zsmalloc: in no list yet",
            );
        }
    }

    /// Puts a zspage that is in no list into the one it belongs to, if there is one.
    pub(super) fn zs_list(
        &self,
        lists: &mut ClassLists,
        head: Pfn,
        class: &SizeClass,
        at_tail: bool,
    ) {
        let word = self.pages.map.word(head).load_owned();
        let desc = self.zsdesc_at(word.desc());
        if let Some(group) = group(desc.inuse(), usize::from(class.objects)) {
            lists.groups[group].link(
                &self.pages.map,
                head,
                word.desc(),
                at_tail,
                "zsmalloc: in a list in part",
            );
        }
    }

    /// Visits a zspage with its list before and after, so that `change` may take objects or give them back.
    pub(super) fn zs_relist<R>(
        &self,
        lists: &mut ClassLists,
        head: Pfn,
        class: &SizeClass,
        change: impl FnOnce(&ZsDesc) -> R,
    ) -> R {
        let desc = self.zsdesc(head);
        let of = |desc: &ZsDesc| group(desc.inuse(), usize::from(class.objects));
        let (before, inuse) = (of(desc), desc.inuse());
        // Most changes leave it in its list; only what is in one is looked at by others.
        let result = change(desc);
        let after = of(desc);
        lists.inuse = (lists.inuse + desc.inuse() as u64) - inuse as u64;
        if before != after {
            let at = self.pages.map.word(head).load_owned().desc();
            let map = &self.pages.map;
            if let Some(group) = before {
                lists.groups[group].unlink(map, head, at, "zsmalloc: in no list yet");
            }
            if let Some(group) = after {
                lists.groups[group].link(map, head, at, false, "zsmalloc: in a list in part");
            }
        }
        result
    }

    /// A zspage with a free object, and the lock of its class: a new one if there is none. `take` takes the object.
    pub(super) fn zs_take<R>(
        &self,
        pool: &PoolCore,
        index: usize,
        gfp: Flags,
        take: impl FnOnce(Pfn, &ZsDesc) -> R,
    ) -> Result<R, AllocError> {
        let class = class(index);
        let mut lists = self.class_lock(pool, index);
        let head = match lists.fullest() {
            Some(head) => head,
            None => {
                drop(lists);
                let head = self.new_zspage(pool, index, gfp)?;
                lists = self.class_lock(pool, index);
                lists.zspages += 1;
                head
            }
        };
        Ok(self.zs_relist(&mut lists, head, class, |desc| take(head, desc)))
    }

    /// A zspage with all objects free, in no list (`alloc_zspage`).
    fn new_zspage(&self, pool: &PoolCore, index: usize, gfp: Flags) -> Result<Pfn, AllocError> {
        let class = class(index);
        let handles = index == HANDLES;
        let point = if handles {
            FaultPoint::ZsHandles
        } else {
            FaultPoint::ZsPage
        };
        let map = &self.pages.map;
        // From the last to the first, so that each knows the next.
        let mut next = Pfn::NONE;
        for left in (0..class.pages).rev() {
            match self.zs_page(point, left == 0, gfp) {
                Ok((page, word)) if left == 0 => {
                    let part = if handles { Part::Handles } else { Part::Head };
                    self.zsdesc_at(word.desc()).init(index, pool.number, next);
                    let mut at = next;
                    while at != Pfn::NONE {
                        map.buddy(at).set_prev(page);
                        at = map.buddy(at).next();
                    }
                    map.word(page).publish(word.with_number(part as u8));
                    next = page;
                }
                Ok((page, word)) => {
                    let links = map.buddy_at(word.desc());
                    links.set_next(next);
                    links.set_prev(Pfn::NONE);
                    map.word(page).publish(word.with_number(Part::Tail as u8));
                    next = page;
                }
                Err(why) => {
                    self.free_tails(next);
                    return Err(why);
                }
            }
        }
        if handles {
            for index in 0..u32::from(class.objects) {
                self.slot_at(SlotRef { page: next, index })
                    .set_free(index + 1);
            }
        } else if !class.is_huge() {
            self.init_objects(next, class);
        }
        Ok(next)
    }

    /// Links the objects of a new zspage (`init_zspage`).
    fn init_objects(&self, head: Pfn, class: &SizeClass) {
        let (mut at, last) = (
            Place {
                page: head,
                offset: 0,
            },
            u32::from(class.objects) - 1,
        );
        for index in 0..=last {
            let next = if index == last {
                ZS_MAX_INDEX
            } else {
                index + 1
            };
            self.set_header(at, class, u64::from(next));
            at.offset += usize::from(class.size);
            if at.offset >= PAGE_SIZE && index < last {
                at.offset -= PAGE_SIZE;
                at.page = self.zs_next(at.page);
            }
        }
    }

    /// A page for a zspage, and the word to publish but for its part. The first of them has a `zsdesc`, others keep the descriptor they come with.
    fn zs_page(
        &self,
        point: FaultPoint,
        first: bool,
        gfp: Flags,
    ) -> Result<(Pfn, Word), AllocError> {
        if self.pages.platform.should_fail(point) {
            return Err(AllocError::Injected);
        }
        let kind = PageType::Zsmalloc;
        let block = self.pages.alloc_block(kind, gfp, 0, None, self)?;
        let pfn = block.pfn;
        let word = if first {
            self.own_block(block, DescClass::Zs, kind, None)?
        } else {
            block.word.to_owned(kind)
        };
        Ok((pfn, word))
    }

    /// Frees pages of a zspage from this one, which is not the first, to the last.
    fn free_tails(&self, from: Pfn) {
        let mut page = from;
        while page != Pfn::NONE {
            let word = self.pages.map.word(page).load_owned();
            let next = self.pages.map.buddy_at(word.desc()).next();
            self.take_back(self.pages.free_path(), page, word);
            page = next;
        }
    }

    /// Frees a zspage that has no object in use and is in no list (`__free_zspage`). Without a lock.
    pub(super) fn free_zspage(&self, head: Pfn) {
        let word = self.pages.map.word(head).load_owned();
        let desc = self.zsdesc_at(word.desc());
        debug_assert_eq!(desc.inuse(), 0);
        if Part::of(word) == Part::Handles {
            // Who has a stale handle may still look at its slot. Nobody else can free the page, nor takes it for one of handles from here on.
            let bare = word.to_owned(PageType::Bare);
            let pin = self.pages.pin();
            self.pages
                .stats(&pin)
                .block_retyped(&pin, PageType::Zsmalloc, PageType::Bare, 0);
            drop(pin);
            self.pages.map.word(head).publish(bare);
            self.free_page_rcu(head);
            return;
        }
        let second = if class(desc.class()).pages > 1 {
            desc.second()
        } else {
            Pfn::NONE
        };
        self.take_back(self.pages.free_path(), head, word);
        self.free_tails(second);
    }

    /// A free slot for a handle, the caller's.
    pub(super) fn take_slot(&self, pool: &PoolCore, gfp: Flags) -> Result<SlotRef, AllocError> {
        self.zs_take(pool, HANDLES, handle_flags(gfp), |page, desc| {
            let index = desc.free();
            let at = SlotRef { page, index };
            desc.set_free(self.slot_at(at).next_free());
            desc.add_inuse(1);
            at
        })
    }

    /// The slot is free.
    pub(super) fn give_slot(&self, pool: &PoolCore, at: SlotRef) {
        let mut lists = self.class_lock(pool, HANDLES);
        let empty = self.zs_relist(&mut lists, at.page, class(HANDLES), |desc| {
            self.slot_at(at).set_free(desc.free());
            desc.set_free(at.index);
            desc.add_inuse(-1);
            desc.inuse() == 0
        });
        lists.zspages -= u64::from(empty);
        drop(lists);
        if empty {
            self.free_zspage(at.page);
        }
    }
}

/// Flags for pages of objects: where they lie is the caller's to say, and nobody wants them zeroed.
pub(super) fn page_flags(gfp: Flags) -> Flags {
    gfp & !(gfp::__GFP_RECLAIMABLE | gfp::__GFP_ZERO)
}

/// Flags for pages of handles, which cannot be moved.
fn handle_flags(gfp: Flags) -> Flags {
    gfp & !(gfp::__GFP_MOVABLE | gfp::__GFP_HIGHMEM)
}
