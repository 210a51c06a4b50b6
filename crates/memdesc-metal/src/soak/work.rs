//! Pages of all kinds, objects, vmalloc areas and kernel stacks: had, kept for a while, left for another worker, let go.

use memdesc::gfp::{
    __GFP_FAST_TRY, __GFP_NORETRY, __GFP_NOWARN, __GFP_RCU_PREPAID, __GFP_ZERO, Flags, GFP_ATOMIC,
    GFP_HIGHUSER_MOVABLE, GFP_KERNEL, GFP_NOWAIT,
};
use memdesc::{FolioKind, PAGE_SIZE};

use super::things::{Held, Thing};
use super::{Count, LEFT, Soak, Worker};

impl Worker {
    pub(super) fn work(&mut self, soak: &Soak) {
        match self.dice.below(100) {
            0..=29 => self.pages(soak),
            30..=54 => self.memory(soak),
            55..=66 => self.object(soak),
            67..=69 => self.stack(soak),
            70..=84 => self.let_go(soak),
            85..=94 => self.leave(soak),
            _ => self.look(soak),
        }
    }

    /// How a request is made, and whether it is to be zero.
    fn gfp(&mut self) -> (Flags, bool) {
        let gfp = match self.dice.below(8) {
            0 => GFP_ATOMIC,
            1 => GFP_NOWAIT,
            2 => GFP_KERNEL | __GFP_NORETRY,
            _ => GFP_KERNEL,
        };
        let zeroed = self.one_in(4);
        let zero = if zeroed { __GFP_ZERO } else { Flags::EMPTY };
        (gfp | zero | __GFP_NOWARN, zeroed)
    }

    /// Keeps what was had, or counts that it was not.
    fn keep<E>(&mut self, soak: &Soak, had: Result<Thing, E>, zeroed: bool) {
        let Ok(thing) = had else {
            return soak.count(Count::Refused);
        };
        soak.count(Count::Got);
        let weight = thing.weight();
        let held = Held::new(soak, thing, self.stamp(), zeroed);
        while self.mine.is_full() || self.weight + weight > soak.ram / 8 / soak.workers as u64 {
            if !self.let_one_go(soak) {
                break;
            }
        }
        self.weight += weight;
        if let Err(full) = self.mine.try_push(held) {
            full.element().release(soak, &mut self.dice);
        }
    }

    fn pages(&mut self, soak: &Soak) {
        let mm = soak.mm;
        let order = match self.dice.below(64) {
            0 => 9,
            1..=3 => 5,
            n => n % 4,
        };
        let (gfp, zeroed) = self.gfp();
        let had = match self.dice.below(10) {
            0 => mm.alloc_folio(gfp, order, FolioKind::Anon),
            1 => mm.alloc_folio(gfp, order, FolioKind::File),
            2 => mm.alloc_page_table(gfp, 0),
            3 => {
                let zero = if zeroed { __GFP_ZERO } else { Flags::EMPTY };
                mm.alloc_pages_nolock(zero | __GFP_FAST_TRY, None, order)
            }
            4 => mm.alloc_pages(GFP_HIGHUSER_MOVABLE | __GFP_NOWARN, order),
            _ => mm.alloc_pages(gfp, order),
        };
        let thing = had.map(|pfn| Thing::Pages {
            pfn,
            order: mm.lookup(pfn).1,
        });
        // Those of the fifth kind did not ask for it.
        self.keep(soak, thing, false);
        let zero = mm.alloc_pages(GFP_KERNEL | __GFP_ZERO | __GFP_NOWARN, order.min(6));
        let thing = zero.map(|pfn| Thing::Pages {
            pfn,
            order: order.min(6),
        });
        self.keep(soak, thing, true);
    }

    fn memory(&mut self, soak: &Soak) {
        let mm = soak.mm;
        let (gfp, zeroed) = self.gfp();
        // Small ones most of all, a few too large for a slab, and a few of vmalloc's.
        let len = match self.dice.below(32) {
            0 => PAGE_SIZE * (1 + self.dice.below(40)),
            1..=3 => PAGE_SIZE + self.dice.below(2 * PAGE_SIZE),
            _ => 16 + self.dice.below(2000),
        };
        let len = len.next_multiple_of(8);
        let prepaid = len < 2048 && self.one_in(8);
        let had = if prepaid {
            mm.kmalloc(len, gfp | __GFP_RCU_PREPAID)
        } else {
            match self.dice.below(8) {
                0 => mm.kmalloc_nolock(len, if zeroed { __GFP_ZERO } else { Flags::EMPTY }),
                1 if gfp.allow_blocking() => mm.vmalloc(len, gfp),
                2 if gfp.allow_blocking() => mm.kvmalloc(len, gfp),
                _ => mm.kmalloc(len, gfp),
            }
        };
        let thing = had.map(|ptr| Thing::Memory { ptr, len, prepaid });
        self.keep(soak, thing, zeroed);
    }

    fn object(&mut self, soak: &Soak) {
        let cache = self.dice.below(soak.caches.len());
        let (gfp, _) = self.gfp();
        let gfp = Flags::from_bits(gfp.bits() & !__GFP_ZERO.bits());
        let had = soak.mm.kmem_cache_alloc(&soak.caches[cache], gfp);
        self.keep(soak, had.map(|ptr| Thing::Object { cache, ptr }), false);
    }

    fn stack(&mut self, soak: &Soak) {
        let pages = 1 + self.dice.below(8);
        let had = soak.mm.alloc_kernel_stack(pages, self.serial);
        self.keep(soak, had.map(Thing::Stack), false);
    }

    /// Lets one thing go; was there any?
    fn let_one_go(&mut self, soak: &Soak) -> bool {
        if self.mine.is_empty() {
            return false;
        }
        let at = self.dice.below(self.mine.len());
        let held = self.mine.swap_remove(at);
        self.weight -= held.thing.weight();
        held.release(soak, &mut self.dice);
        true
    }

    fn let_go(&mut self, soak: &Soak) {
        for _ in 0..1 + self.dice.below(16) {
            self.let_one_go(soak);
        }
    }

    /// Leaves something for another worker, and lets go of what was left.
    fn leave(&mut self, soak: &Soak) {
        if self.mine.is_empty() {
            return;
        }
        let at = self.dice.below(self.mine.len());
        let Some(mut place) = soak.left[self.dice.below(LEFT)].try_lock() else {
            return;
        };
        let held = self.mine.swap_remove(at);
        self.weight -= held.thing.weight();
        let left = place.replace(held);
        drop(place);
        if let Some(left) = left {
            soak.count(Count::Exchanged);
            left.release(soak, &mut self.dice);
        }
    }

    /// Looks at something that is kept.
    fn look(&mut self, soak: &Soak) {
        if !self.mine.is_empty() {
            let at = self.dice.below(self.mine.len());
            self.mine[at].check(soak);
        }
    }
}
