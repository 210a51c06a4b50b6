//! What a worker can have of memory, with a pattern of its own in it: how it is written, looked at, and let go.

use core::ptr::NonNull;

use memdesc::rcu::RcuHead;
use memdesc::{KernelStack, PAGE_SIZE, Pfn};

use super::{Count, Soak};
use crate::tests::Random;
use crate::traps::probe;
use crate::wrong;

/// What the reporter writes over free memory.
pub(super) const SCRIBBLE: u8 = 0xd7;
/// Of what is longer only some words are written and looked at.
const WHOLE: usize = 2 * PAGE_SIZE;
const STEP: usize = 64;

/// Memory that somebody has.
pub(crate) enum Thing {
    /// Bare pages, folios, page tables: what `free_pages` takes.
    Pages {
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
}

/// With what was written into it.
pub(crate) struct Held {
    pub(super) thing: Thing,
    stamp: u64,
}

// SAFETY: memory that one worker has at a time; it may be freed by another than had it.
unsafe impl Send for Held {}

/// The words that are written and looked at, by number, of so many bytes.
fn words(len: usize) -> impl Iterator<Item = usize> {
    let n = len / 8;
    let step = if len <= WHOLE { 1 } else { STEP };
    (0..n).step_by(step).chain(n.checked_sub(1))
}

/// Writes a pattern.
///
/// # Safety
///
/// The memory is the caller's, aligned to 8 and that long.
pub(super) unsafe fn fill(at: NonNull<u8>, len: usize, stamp: u64) {
    for word in words(len) {
        // SAFETY: the caller's promise.
        unsafe { at.cast::<u64>().add(word).write(stamp ^ word as u64) };
    }
}

/// The first word that is not as it was written, by number, and what is there.
///
/// # Safety
///
/// As for [`fill`], and that was done.
pub(super) unsafe fn first_wrong(at: NonNull<u8>, len: usize, stamp: u64) -> Option<(usize, u64)> {
    words(len).find_map(|word| {
        // SAFETY: the caller's promise.
        let found = unsafe { at.cast::<u64>().add(word).read() };
        (found != stamp ^ word as u64).then_some((word, found))
    })
}

/// Whose handwriting that is.
pub(super) fn whose(found: u64) -> &'static str {
    if found == u64::from_ne_bytes([SCRIBBLE; 8]) {
        "it was reported while somebody had it"
    } else if found == 0 {
        "it was zeroed"
    } else {
        "somebody else wrote to it"
    }
}

impl Thing {
    /// Where its bytes are.
    pub(super) fn bytes(&self, soak: &Soak) -> (NonNull<u8>, usize) {
        match *self {
            Thing::Pages { pfn, order } => {
                let at = NonNull::new(soak.mm.page_address(pfn)).unwrap_or(NonNull::dangling());
                (at, PAGE_SIZE << order)
            }
            Thing::Memory { ptr, len, .. } => (ptr, len),
            Thing::Object { cache, ptr } => (ptr, soak.caches[cache].object_size()),
            Thing::Stack(ref stack) => (stack.bottom(), stack.size()),
        }
    }

    /// Pages that it takes.
    pub(super) fn weight(&self) -> u64 {
        match *self {
            Thing::Pages { order, .. } => 1 << order,
            Thing::Memory { len, .. } => len.div_ceil(PAGE_SIZE) as u64,
            Thing::Object { .. } => 0,
            Thing::Stack(ref stack) => (stack.size() / PAGE_SIZE) as u64,
        }
    }

    fn name(&self) -> &'static str {
        match self {
            Thing::Pages { .. } => "pages",
            Thing::Memory { .. } => "memory",
            Thing::Object { .. } => "an object",
            Thing::Stack(_) => "a kernel stack",
        }
    }
}

impl Held {
    /// Writes the pattern; where it was to be zero, it has to be.
    pub(super) fn new(soak: &Soak, thing: Thing, stamp: u64, zeroed: bool) -> Held {
        let (at, len) = thing.bytes(soak);
        if zeroed {
            for word in words(len) {
                // SAFETY: ours alone, that long, and initialised, since it was asked for zeroed.
                let found = unsafe { at.cast::<u64>().add(word).read() };
                if found != 0 {
                    let name = thing.name();
                    wrong!(
                        soak,
                        "{name} at {at:?} was asked for zeroed: word {word} of {len} bytes is {found:#x}"
                    );
                    break;
                }
            }
        }
        // SAFETY: ours alone, and that long.
        unsafe { fill(at, len, stamp) };
        let held = Held { thing, stamp };
        held.look_at_guards(soak);
        held
    }

    /// What has guards has nothing beside it that can be read.
    fn look_at_guards(&self, soak: &Soak) {
        let (at, len) = self.thing.bytes(soak);
        if !soak.mm.is_vmalloc_addr(at.as_ptr()) {
            return;
        }
        let (start, end) = (
            at.addr().get(),
            (at.addr().get() + len).next_multiple_of(PAGE_SIZE),
        );
        let below = matches!(self.thing, Thing::Stack(_)) && probe(start - 8);
        if below || probe(end) || !probe(start) || !probe(end - 1) {
            wrong!(
                soak,
                "{} from {start:#x} to {end:#x}: guards that can be read, or memory that cannot",
                self.thing.name()
            );
        }
    }

    /// Looks for the pattern.
    pub(super) fn check(&self, soak: &Soak) {
        let (at, len) = self.thing.bytes(soak);
        // SAFETY: ours alone, that long, and filled.
        if let Some((word, found)) = unsafe { first_wrong(at, len, self.stamp) } {
            wrong!(
                soak,
                "{} at {at:?}: word {word} of {len} bytes is {found:#x}, not {:#x}: {}",
                self.thing.name(),
                self.stamp ^ word as u64,
                whose(found)
            );
        }
    }

    /// Looks for it once more, and lets it go in one of the ways there are.
    pub(super) fn release(self, soak: &Soak, dice: &mut Random) {
        self.check(soak);
        let mm = soak.mm;
        soak.count(Count::Freed);
        // SAFETY: all of it is ours, whole, and used by nobody any more; an object has room for its head.
        unsafe {
            match self.thing {
                Thing::Pages { pfn, .. } if dice.below(8) == 0 => mm.free_pages_nolock(pfn),
                Thing::Pages { pfn, .. } => mm.free_pages(pfn),
                Thing::Memory {
                    ptr, prepaid: true, ..
                } => {
                    soak.count(Count::Deferred);
                    mm.kfree_rcu_prepaid(ptr);
                }
                Thing::Memory { ptr, len, .. } => match dice.below(8) {
                    0..=2 if len >= size_of::<RcuHead>() => {
                        soak.count(Count::Deferred);
                        mm.kvfree_rcu(ptr, ptr.cast());
                    }
                    3 => {
                        soak.count(Count::Deferred);
                        mm.kvfree_rcu_mightsleep(ptr);
                    }
                    4 if !mm.is_vmalloc_addr(ptr.as_ptr()) => mm.kfree_nolock(ptr),
                    _ => mm.kvfree(ptr),
                },
                Thing::Object { cache, ptr } => mm.kmem_cache_free(&soak.caches[cache], ptr),
                Thing::Stack(stack) => mm.free_kernel_stack(stack),
            }
        }
    }
}
