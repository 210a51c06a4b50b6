//! What was promised is there when everything else is gone: a reserve, and a mempool.

use core::ptr::NonNull;

use memdesc::gfp::{__GFP_NORETRY, __GFP_NOWARN, GFP_ATOMIC, GFP_NOIO};
use memdesc::{PAGE_SIZE, PAGEBLOCK_ORDER, Pfn};

use super::things::{fill, first_wrong, whose};
use super::{Count, PROMISED, PROMISED_SIZE, Soak, Worker};
use crate::wrong;

const SIZE: usize = PROMISED_SIZE / 8 * 8;

impl Worker {
    pub(super) fn promises(&mut self, soak: &Soak) {
        if self.one_in(64) {
            self.exhaust(soak);
        } else {
            self.element(soak);
        }
    }

    /// An element of the mempool, for a short while: whoever may sleep gets one, sooner or later.
    fn element(&mut self, soak: &Soak) {
        let sleeps = self.one_in(2);
        let gfp = if sleeps { GFP_NOIO } else { GFP_ATOMIC };
        let element = match soak.pool.alloc(gfp | __GFP_NOWARN) {
            Ok(element) => element,
            Err(why) => {
                if sleeps {
                    wrong!(soak, "a mempool refused one who may sleep: {why}");
                }
                return soak.count(Count::Refused);
            }
        };
        soak.count(Count::Elements);
        let stamp = self.stamp();
        // SAFETY: ours, that long, and given back once.
        unsafe {
            fill(element, SIZE, stamp);
            self.check_promised(soak, element, stamp);
            soak.pool.free(element);
        }
    }

    /// # Safety
    ///
    /// The caller's, and filled.
    unsafe fn check_promised(&self, soak: &Soak, at: NonNull<u8>, stamp: u64) {
        // SAFETY: the caller's promise.
        if let Some((word, found)) = unsafe { first_wrong(at, SIZE, stamp) } {
            let whose = whose(found);
            wrong!(
                soak,
                "what was promised at {at:?}: word {word} is {found:#x}: {whose}"
            );
        }
    }

    /// Takes all that can be had without sleeping, and then what was promised.
    fn exhaust(&mut self, soak: &Soak) {
        let mm = soak.mm;
        let Some(mut large) = soak.exhausting.try_lock() else {
            return;
        };
        let gfp = GFP_ATOMIC | __GFP_NORETRY | __GFP_NOWARN;
        for order in [PAGEBLOCK_ORDER, 6] {
            while large.len() < large.capacity()
                && let Ok(pfn) = mm.alloc_pages(gfp, order)
            {
                large.push(pfn);
            }
        }
        // The others are linked through themselves.
        let mut last = Pfn::NONE;
        while let Ok(pfn) = mm.alloc_pages(gfp, 0) {
            // SAFETY: ours from here on.
            unsafe { mm.page_address(pfn).cast::<Pfn>().write(last) };
            last = pfn;
        }
        let mut objects = [None; PROMISED];
        for (nth, object) in objects.iter_mut().enumerate() {
            match soak.reserve.kmalloc(PROMISED_SIZE, gfp) {
                Ok(got) => {
                    let stamp = self.stamp();
                    // SAFETY: ours, and that long.
                    unsafe { fill(got, SIZE, stamp) };
                    *object = Some((got, stamp));
                }
                Err(why) => {
                    wrong!(
                        soak,
                        "object {nth} of {PROMISED} that were promised did not come: {why}"
                    );
                    break;
                }
            }
        }
        for (object, stamp) in objects.into_iter().flatten() {
            // SAFETY: ours, and freed once.
            unsafe {
                self.check_promised(soak, object, stamp);
                mm.kfree(object);
            }
        }
        while last != Pfn::NONE {
            // SAFETY: taken above, written there, and freed once.
            unsafe {
                let next = mm.page_address(last).cast::<Pfn>().read();
                mm.free_pages(last);
                last = next;
            }
        }
        for pfn in large.drain(..) {
            // SAFETY: taken above, and freed once.
            unsafe { mm.free_pages(pfn) };
        }
        soak.count(Count::Exhausted);
    }
}

const _: () = assert!(SIZE <= PROMISED_SIZE && SIZE < PAGE_SIZE);
