//! A pool: made, changed, looked at, taken down.

use core::fmt;
use core::panic::Location;
use core::ptr::NonNull;

use super::element::Elements;
use super::level::{Counts, Hold, Level};
use crate::error::AllocError;
use crate::gfp::Flags;
use crate::lockdep::classes;
use crate::mm::Mm;
use crate::platform::{Holder, Platform};
use crate::slab::Cache;
use crate::slab::object::Caller;
use crate::slab::pointers::Pointers;
use crate::sync::SpinGuard;
use crate::sync::atomic::{AtomicPtr, Ordering};

/// Longest name kept; the rest is cut off.
const NAME_LEN: usize = 32;

/// What the elements of a pool are.
#[derive(Clone, Copy, Debug)]
pub enum MempoolKind<'c> {
    /// Pages of this order (`mempool_create_page_pool`): where they lie in the direct map; see [`Mm::virt_to_pfn`].
    Pages {
        /// The order.
        order: usize,
    },
    /// Objects of a cache, which stays as long as the pool does (`mempool_create_slab_pool`).
    Slab(&'c Cache<'c>),
    /// kmalloc memory (`mempool_create_kmalloc_pool`).
    Kmalloc {
        /// How much.
        size: usize,
    },
}

impl MempoolKind<'_> {
    /// Its name.
    pub const fn name(&self) -> &'static str {
        match self {
            MempoolKind::Pages { .. } => "pages",
            MempoolKind::Slab(_) => "slab",
            MempoolKind::Kmalloc { .. } => "kmalloc",
        }
    }
}

/// A pool, as it lies in memory.
struct PoolCore {
    level: Level,
    /// The next in the list; under the list's lock.
    next: AtomicPtr<PoolCore>,
    kind: &'static str,
    element_size: usize,
    name: [u8; NAME_LEN],
    name_len: u8,
}

impl PoolCore {
    fn name(&self) -> &str {
        core::str::from_utf8(&self.name[..usize::from(self.name_len)]).unwrap_or("?")
    }
}

/// All pools.
#[derive(Debug)]
pub(crate) struct Mempools {
    head: *mut PoolCore,
}

impl Mempools {
    pub(crate) const EMPTY: Mempools = Mempools {
        head: core::ptr::null_mut(),
    };
}

// SAFETY: the pointer leads to pools, which are shared between CPUs by design, but for their links, which this list's lock guards.
unsafe impl Send for Mempools {}

/// A pool. Dropping it gives back what lies in it; elements that are out are then what they are, and freed as such. [`destroy`](Self::destroy) looks first.
///
/// # Context
///
/// Dropping it may sleep, and allocates nothing.
pub struct Mempool<'c, P: Platform> {
    pub(super) mm: &'c Mm<P>,
    core: NonNull<PoolCore>,
    pub(super) elements: Elements<'c>,
}

// SAFETY: a `PoolCore` is shared between CPUs by design, and so is a cache.
unsafe impl<P: Platform> Send for Mempool<'_, P> {}
// SAFETY: the same.
unsafe impl<P: Platform> Sync for Mempool<'_, P> {}

impl<P: Platform> fmt::Debug for Mempool<'_, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Mempool").field(&self.view()).finish()
    }
}

/// What a pool has and did.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MempoolView<'a> {
    /// Its name.
    pub name: &'a str,
    /// What its elements are: [`MempoolKind::name`].
    pub kind: &'static str,
    /// Bytes of an element.
    pub element_size: usize,
    /// Elements that are set aside (`min_nr`).
    pub min_nr: usize,
    /// Elements that lie there (`curr_nr`).
    pub curr_nr: usize,
    /// The fewest that lay there since it was made or made larger.
    pub low: usize,
    /// How many wait.
    pub waiting: usize,
    /// Elements that were taken from what was set aside.
    pub taken: u64,
    /// Elements that came back to it.
    pub refills: u64,
    /// Requests that had to wait.
    pub waits: u64,
}

/// A pool that could not be destroyed: it lacks elements. The pool comes back.
pub struct MempoolBusy<'c, P: Platform> {
    /// The pool; it stays usable.
    pub pool: Mempool<'c, P>,
    /// How many elements it lacks.
    pub missing: usize,
}

impl<P: Platform> fmt::Debug for MempoolBusy<'_, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MempoolBusy")
            .field("pool", &self.pool)
            .field("missing", &self.missing)
            .finish()
    }
}

impl<P: Platform> fmt::Display for MempoolBusy<'_, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, missing) = (self.pool.name(), self.missing);
        write!(f, "pool {name} lacks {missing} elements")
    }
}

impl<P: Platform> core::error::Error for MempoolBusy<'_, P> {}

impl<P: Platform> Mm<P> {
    /// A pool with `min_nr` elements set aside (`mempool_create`). From which zone they are is what these flags say, for all that it ever hands out.
    ///
    /// # Context
    ///
    /// May sleep.
    ///
    /// # Errors
    ///
    /// Why there was no memory, nothing has changed then; [`AllocError::BadSize`] for no elements, for more than half a million, and for a size that kmalloc
    /// does not serve; [`AllocError::BadOrder`]; [`AllocError::NoZone`] for prepaid kmalloc memory from ZONE_DMA.
    ///
    /// # Panics
    ///
    /// If the cache belongs to another memory manager.
    #[track_caller]
    pub fn mempool_create<'c>(
        &'c self,
        name: &str,
        kind: MempoolKind<'c>,
        min_nr: usize,
        gfp: Flags,
    ) -> Result<Mempool<'c, P>, AllocError> {
        if min_nr == 0 {
            return Err(AllocError::BadSize);
        }
        if let MempoolKind::Slab(cache) = kind {
            self.checked(cache);
        }
        let elements = Elements::new(self, kind, gfp)?;
        let caller = Location::caller();
        let mut shelf = self.pointers(min_nr, gfp)?;
        let filled = elements.fill(self, gfp, shelf.as_mut());
        let memory = filled.and_then(|()| {
            self.side_alloc(size_of::<PoolCore>(), gfp)
                .inspect_err(|_| {
                    elements.release(self, shelf.as_slice(), caller);
                })
        });
        let core = match memory {
            Ok(memory) => memory.cast::<PoolCore>(),
            Err(why) => {
                self.free_pointers(shelf);
                return Err(why);
            }
        };
        let mut end = name.len().min(NAME_LEN);
        while !name.is_char_boundary(end) {
            end -= 1;
        }
        let mut bytes = [0; NAME_LEN];
        bytes[..end].copy_from_slice(&name.as_bytes()[..end]);
        let (at, room) = shelf.into_raw();
        let value = PoolCore {
            // SAFETY: room for `min_nr`, the pool's until it is taken down; all of it is filled.
            level: unsafe { Level::full(at, room) },
            next: AtomicPtr::new(core::ptr::null_mut()),
            kind: kind.name(),
            element_size: elements.size(),
            name: bytes,
            name_len: end as u8,
        };
        // SAFETY: allocated for it, aligned to 8, and ours.
        unsafe { core.write(value) };
        let mut list = self.mempools();
        // SAFETY: just written, and known to nobody yet.
        unsafe { core.as_ref() }
            .next
            .store(list.head, Ordering::Relaxed);
        list.head = core.as_ptr();
        drop(list);
        Ok(Mempool {
            mm: self,
            core,
            elements,
        })
    }

    /// Visits all pools. `visit` may neither make one nor take one down.
    ///
    /// # Context
    ///
    /// May sleep.
    pub fn mempool_info(&self, mut visit: impl FnMut(MempoolView<'_>)) {
        let list = self.mempools();
        let mut at = list.head;
        while let Some(core) = NonNull::new(at) {
            // SAFETY: pools are taken out of the list under its lock before they are freed.
            let core = unsafe { core.as_ref() };
            visit(self.mempool_view(core));
            at = core.next.load(Ordering::Relaxed);
        }
    }

    /// Has those who wait for a pool ask for ordinary memory again. Does not wait: where somebody is at the list it is left to the next tick.
    pub(crate) fn mempools_retry(&self) {
        let holder = Holder::trying(&self.pages.platform, true, &classes::MEMPOOLS);
        let Some(list) = self.mempool_list.try_lock(holder) else {
            return;
        };
        let mut at = list.head;
        while let Some(core) = NonNull::new(at) {
            // SAFETY: as in `mempool_info`.
            let core = unsafe { core.as_ref() };
            core.level
                .retry(|turn| self.pages.platform.unpark_all(turn));
            at = core.next.load(Ordering::Relaxed);
        }
    }

    fn mempools(&self) -> SpinGuard<'_, Mempools, Holder<'_, P>> {
        let platform = &self.pages.platform;
        // A mutex in every configuration: held over a visit to all pools.
        self.mempool_list
            .lock(Holder::new(platform, true, &classes::MEMPOOLS))
    }

    fn mempool_view<'a>(&self, core: &'a PoolCore) -> MempoolView<'a> {
        let platform = &self.pages.platform;
        let hold = core
            .level
            .lock(Holder::new(platform, self.pages.rt, &classes::MEMPOOL));
        let (curr_nr, min_nr) = hold.level();
        let Counts {
            taken,
            refills,
            waits,
            low,
        } = hold.counts();
        MempoolView {
            name: core.name(),
            kind: core.kind,
            element_size: core.element_size,
            min_nr,
            curr_nr,
            low,
            waiting: core.level.waiting() as usize,
            taken,
            refills,
            waits,
        }
    }
}

impl<'c, P: Platform> Mempool<'c, P> {
    pub(super) fn level(&self) -> &Level {
        // SAFETY: the pool goes with this handle.
        unsafe { &self.core.as_ref().level }
    }

    pub(super) fn lock(&self) -> Hold<'_, Holder<'_, P>> {
        let pages = &self.mm.pages;
        let holder = Holder::new(&pages.platform, pages.rt, &classes::MEMPOOL);
        self.level().lock(holder)
    }

    /// After the hold in which somebody was found to be served.
    pub(super) fn wake(&self, wake: bool) {
        if wake {
            self.level()
                .wake(|turn| self.mm.pages.platform.unpark_all(turn));
        }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        // SAFETY: the pool goes with this handle, and its name does not change.
        unsafe { self.core.as_ref() }.name()
    }

    /// What it has and did.
    pub fn view(&self) -> MempoolView<'_> {
        // SAFETY: the pool goes with this handle; its link is not looked at.
        self.mm.mempool_view(unsafe { self.core.as_ref() })
    }

    /// Does it lack nothing (`mempool_is_saturated`)? Any context.
    pub fn is_saturated(&self) -> bool {
        !self.level().is_short()
    }

    /// From now on so many elements are set aside (`mempool_resize`). With as many as now or more it lacks nothing afterwards, whatever is out; with fewer,
    /// what is too much is given back, and who waits for more than that is refused.
    ///
    /// # Context
    ///
    /// May sleep if the flags allow it, and it becomes no smaller. Others may use the pool meanwhile.
    ///
    /// # Errors
    ///
    /// Why there was no memory, nothing has changed then; [`AllocError::BadSize`] for no elements, and for more than half a million.
    #[track_caller]
    pub fn resize(&self, min_nr: usize, gfp: Flags) -> Result<(), AllocError> {
        if min_nr == 0 {
            return Err(AllocError::BadSize);
        }
        let caller = Location::caller();
        loop {
            let (curr, done) = {
                let mut hold = self.lock();
                let (curr, min) = hold.level();
                if min_nr < min {
                    hold.lower(min_nr);
                }
                (curr, min_nr < min || min_nr == min && curr >= min)
            };
            if done || self.extend(min_nr, curr, gfp, caller)?.is_some() {
                break;
            }
        }
        // Who waits for more than there will be learns of it, and who can be served now.
        self.wake(true);
        self.trim(caller);
        Ok(())
    }

    /// Brings a shelf for `min_nr` elements with what `curr` leave missing. `None`: the pool changed meanwhile.
    #[track_caller]
    fn extend(
        &self,
        min_nr: usize,
        curr: usize,
        gfp: Flags,
        caller: Caller,
    ) -> Result<Option<()>, AllocError> {
        let (mm, with) = (self.mm, min_nr.saturating_sub(curr));
        let mut shelf = mm.pointers(min_nr, gfp)?;
        if let Err(why) = self.elements.fill(mm, gfp, &mut shelf.as_mut()[..with]) {
            mm.free_pointers(shelf);
            return Err(why);
        }
        let (at, room) = shelf.into_raw();
        // SAFETY: room for `min_nr`, the first `with` filled with elements at rest, the pool's from here on.
        let old = unsafe { self.lock().replace(at, room, with) };
        let (at, room, spare, done) = match old {
            Some((at, room, spare)) => (at, room, spare, Some(())),
            None => (at, room, with, None),
        };
        // SAFETY: the old shelf, or the new one if the pool did not take it.
        let shelf = unsafe { Pointers::from_raw(at, room) };
        self.elements
            .release(mm, &shelf.as_slice()[..spare], caller);
        mm.free_pointers(shelf);
        Ok(done)
    }

    /// Gives back what lies there beyond the minimum.
    #[track_caller]
    fn trim(&self, caller: Caller) {
        loop {
            let extra = {
                let mut hold = self.lock();
                let (_, min) = hold.level();
                hold.pop_above(min)
            };
            match extra {
                Some(element) => self.elements.release(self.mm, &[element], caller),
                None => break,
            }
        }
    }

    /// Takes the pool down (`mempool_destroy`).
    ///
    /// # Context
    ///
    /// May sleep. Allocates nothing.
    ///
    /// # Errors
    ///
    /// It lacks elements: somebody has them, or freed them as what they are. It comes back, with how many.
    pub fn destroy(self) -> Result<(), MempoolBusy<'c, P>> {
        let (curr, min) = self.lock().level();
        if curr < min {
            let missing = min - curr;
            return Err(MempoolBusy {
                pool: self,
                missing,
            });
        }
        drop(self);
        Ok(())
    }
}

impl<P: Platform> Drop for Mempool<'_, P> {
    fn drop(&mut self) {
        let mut list = self.mm.mempools();
        let me = self.core.as_ptr();
        // SAFETY: pools in the list live until they are taken out under its lock, and this one is in it.
        let next = unsafe { self.core.as_ref() }.next.load(Ordering::Relaxed);
        if list.head == me {
            list.head = next;
        } else {
            let mut at = list.head;
            // SAFETY: as above.
            while let Some(other) = unsafe { at.as_ref() } {
                at = other.next.load(Ordering::Relaxed);
                if at == me {
                    other.next.store(next, Ordering::Relaxed);
                    break;
                }
            }
        }
        drop(list);
        let caller = Location::caller();
        loop {
            // Nobody else has the pool.
            let element = self.lock().pop_above(0);
            let Some(element) = element else { break };
            self.elements.release(self.mm, &[element], caller);
        }
        let (at, room) = self.lock().shelf();
        // SAFETY: the shelf that the pool had, which is empty, and its memory; nobody is led to either any more.
        unsafe {
            self.mm.free_pointers(Pointers::from_raw(at, room));
            self.mm.side_free(self.core.cast(), size_of::<PoolCore>());
        }
    }
}
