//! Moving a page of a zspage: other memory, the same descriptors, so that memory can be made contiguous or taken offline.
//!
//! As with folios the two pages exchange what their words lead to: the new page's word leads to the `zsdesc`, or the buddy that says where that is, and the old
//! page is a bare one. All objects that have a byte in the page are held meanwhile, as if they moved; if somebody is at one of them, the page stays.
//! Pages of handles stay always: a handle is where its slot is.
//!
//! Source: `zs_page_migrate`, `zs_page_isolate` of Linux.

use super::class::{SizeClass, ZS_SIZE_CLASSES};
use super::pool::{PoolCore, class};
use super::zspage::Part;
use crate::address::{PAGE_SHIFT, PAGE_SIZE, Pfn};
use crate::desc::ZsDesc;
use crate::memmap::{PageType, Word};
use crate::mm::Mm;
use crate::platform::Platform;

/// Does this word speak for a page that [`Mm::zs_migrate`] may move?
pub(crate) fn is_movable(word: Word) -> bool {
    word.kind() == PageType::Zsmalloc && Part::of(word) != Part::Handles
}

/// The objects that have a byte in the page with this place in its zspage.
fn objects_in(class: &SizeClass, place: usize) -> core::ops::RangeInclusive<u32> {
    let size = usize::from(class.size);
    let first = (place << PAGE_SHIFT) / size;
    let last = ((place << PAGE_SHIFT) + PAGE_SIZE - 1) / size;
    first as u32..=last.min(usize::from(class.objects) - 1) as u32
}

impl<P: Platform> Mm<P> {
    /// Moves a page of compressed memory to `to`, a bare page of the caller's. If that went, `page` is bare and his instead.
    ///
    /// # Context
    ///
    /// May sleep.
    pub(crate) fn zs_migrate(&self, page: Pfn, to: Pfn) -> bool {
        let Some(region) = self.pages.map.region(page) else {
            return false;
        };
        if self.pages.map.bad.is_deadly(page, 0) {
            return false;
        }
        let (number, index) = {
            let _reading = self.rcu_read_lock();
            let word = region.word(page).load();
            let desc = if is_movable(word) {
                self.zsdesc_of(word)
            } else {
                None
            };
            let Some(desc) = desc else {
                return false;
            };
            // SAFETY: descriptors of slabs are type-stable as long as we read; what it says is looked at again under the lock.
            let desc = unsafe { desc.as_ref() };
            (desc.pool(), desc.class())
        };
        let mut moved = false;
        if index < ZS_SIZE_CLASSES {
            self.for_each_pool(|pool| {
                if pool.number == number {
                    moved = self.migrate_in(pool, index, page, to);
                }
            });
        }
        moved
    }

    fn migrate_in(&self, pool: &PoolCore, index: usize, page: Pfn, to: Pfn) -> bool {
        let (map, class) = (&self.pages.map, class(index));
        let mut lists = self.class_lock(pool, index);
        // Until it is known that the zspage has objects in use, and so stays, its descriptors are only type-stable.
        let reading = self.rcu_read_lock();
        // Acquire: it may be somebody else's, who makes or frees a zspage without our lock. Those have no object in use.
        let word = map.word(page).load();
        if !is_movable(word) {
            return false;
        }
        let head = self.zs_head(page);
        let Some(first) = map.region(head).map(|region| region.word(head).load()) else {
            return false;
        };
        if !is_movable(first) || Part::of(first) != Part::Head {
            return false;
        }
        let desc = self.zsdesc_at(first.desc());
        if desc.class() != index || desc.pool() != pool.number || desc.inuse() == 0 {
            return false;
        }
        drop(reading);
        let (mut before, mut place, mut at) = (Pfn::NONE, 0, head);
        while at != page {
            if place + 1 == usize::from(class.pages) {
                // A page of a zspage whose head was freed already, and is that of another by now.
                return false;
            }
            (before, place, at) = (at, place + 1, self.zs_next(at));
        }
        if !self.hold_objects(head, desc, class, place) {
            return false;
        }
        crate::inject::point("zsmalloc: page moving");
        let bare = map.word(to).load_owned();
        debug_assert!(bare.kind() == PageType::Bare && bare.order() == 0);
        self.copy_pages(page, to, 0);
        let now = if head == page {
            self.zs_unlist(&mut lists, head, class);
            to
        } else {
            head
        };
        map.word(to).publish(word);
        map.word(page).publish(bare);
        if head == page {
            if class.pages > 1 {
                let mut tail = desc.second();
                while tail != Pfn::NONE {
                    map.buddy(tail).set_prev(to);
                    tail = map.buddy(tail).next();
                }
            }
            self.zs_list(&mut lists, to, class, false);
        } else if before == head {
            desc.set_second(to);
        } else {
            map.buddy(before).set_next(to);
        }
        for object in objects_in(class, place) {
            let at = self.zs_place(now, class, object);
            if let Some(owner) = self.zs_owner(desc, at, class) {
                self.slot_at(owner).moved(at.page, object);
            }
        }
        true
    }

    /// Holds all objects that have a byte in this page of a zspage; none of them, if somebody is at one.
    fn hold_objects(&self, head: Pfn, desc: &ZsDesc, class: &SizeClass, place: usize) -> bool {
        let owner = |object| {
            let at = self.zs_place(head, class, object);
            (at.page, self.zs_owner(desc, at, class))
        };
        for object in objects_in(class, place) {
            let (_, Some(slot)) = owner(object) else {
                continue;
            };
            if self.slot_at(slot).try_move() {
                continue;
            }
            for held in *objects_in(class, place).start()..object {
                if let (page, Some(slot)) = owner(held) {
                    self.slot_at(slot).moved(page, held);
                }
            }
            return false;
        }
        true
    }
}
