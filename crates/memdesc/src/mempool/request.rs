//! The way of a request: ordinary memory, the pool, ordinary memory with reclaim, the queue. And the way back.

use core::panic::Location;
use core::ptr::NonNull;

use super::level::{Place, Take};
use super::pool::{Mempool, MempoolKind};
use crate::error::AllocError;
use crate::gfp::{self, Flags};
use crate::lockdep::classes;
use crate::platform::{Holder, Platform, might_lock, might_sleep};
use crate::report::Corruption;
use crate::slab::kmalloc::Where;
use crate::slab::object::Caller;

/// What must not be asked of ordinary memory, since it has another way: to try for ever, and to use what is for those who free memory.
const NEVER: Flags = Flags::from_bits(
    gfp::__GFP_NOFAIL.bits() | gfp::__GFP_RETRY_MAYFAIL.bits() | gfp::__GFP_MEMALLOC.bits(),
);
/// How ordinary memory is asked.
const LIGHTLY: Flags = Flags::from_bits(
    gfp::__GFP_NOMEMALLOC.bits() | gfp::__GFP_NORETRY.bits() | gfp::__GFP_NOWARN.bits(),
);
/// What is left out where it is not to wait.
const SLOWLY: Flags = Flags::from_bits(gfp::__GFP_DIRECT_RECLAIM.bits() | gfp::__GFP_IO.bits());

/// How ordinary memory is asked at first.
#[inline]
fn first(gfp: Flags) -> Flags {
    gfp & !NEVER & !SLOWLY | LIGHTLY
}

/// The caller is in the queue as long as this lives, unless he left it with what he wanted.
struct Queued<'p, 'c, P: Platform> {
    pool: &'p Mempool<'c, P>,
    place: &'p Place,
    served: bool,
}

impl<P: Platform> Drop for Queued<'_, '_, P> {
    fn drop(&mut self) {
        if !self.served {
            let mut hold = self.pool.lock();
            hold.leave(self.place);
            let wake = hold.wakes();
            drop(hold);
            self.pool.wake(wake);
        }
    }
}

impl<P: Platform> Mempool<'_, P> {
    /// An element (`mempool_alloc`). With `__GFP_ZERO` it reads zero.
    ///
    /// # Context
    ///
    /// With `__GFP_DIRECT_RECLAIM` it may sleep, and then does not fail; with `__GFP_FAST_TRY` any at all; else any that may pin a CPU.
    ///
    /// # Errors
    ///
    /// Only of who may not sleep: why there was no ordinary memory, and there is nothing in the pool but what somebody waits for already;
    /// [`AllocError::Contended`] with `__GFP_FAST_TRY` if somebody is at the pool.
    #[inline]
    #[track_caller]
    pub fn alloc(&self, gfp: Flags) -> Result<NonNull<u8>, AllocError> {
        if gfp.allow_blocking() && !gfp.contains(gfp::__GFP_FAST_TRY) {
            might_sleep(&self.mm.pages.platform, "mempool_alloc");
        }
        match self.elements.alloc(self.mm, first(gfp)) {
            Ok(element) => Ok(element),
            Err(why) => {
                let mut out = [core::ptr::null_mut()];
                self.alloc_slow(gfp, &mut out, 0, why)?;
                NonNull::new(out[0]).ok_or(why)
            }
        }
    }

    /// Fills `out` with elements, or fails with none (`mempool_alloc_bulk`). What is taken from the pool is taken at once, so two who ask like this never
    /// wait for each other.
    ///
    /// # Context
    ///
    /// As [`alloc`](Self::alloc).
    ///
    /// # Errors
    ///
    /// As [`alloc`](Self::alloc), and `out` holds null pointers; [`AllocError::BadSize`] for more than are set aside, even if there is ordinary memory.
    #[track_caller]
    pub fn alloc_bulk(&self, gfp: Flags, out: &mut [*mut u8]) -> Result<(), AllocError> {
        out.fill(core::ptr::null_mut());
        if out.len() > self.level().min() {
            return Err(AllocError::BadSize);
        }
        if gfp.allow_blocking() && !gfp.contains(gfp::__GFP_FAST_TRY) {
            might_sleep(&self.mm.pages.platform, "mempool_alloc_bulk");
        }
        let mut n = 0;
        match self.ordinary(first(gfp), out, &mut n) {
            Ok(()) => Ok(()),
            Err(why) => self.alloc_slow(gfp, out, n, why),
        }
    }

    /// Fills `out` from `n` on from ordinary memory, as far as that goes.
    #[track_caller]
    fn ordinary(&self, gfp: Flags, out: &mut [*mut u8], n: &mut usize) -> Result<(), AllocError> {
        while *n < out.len() {
            out[*n] = self.elements.alloc(self.mm, gfp)?.as_ptr();
            *n += 1;
        }
        Ok(())
    }

    /// Ordinary memory had only the first `n`: the rest from the pool, or by reclaim, or by waiting.
    #[cold]
    #[inline(never)]
    #[track_caller]
    fn alloc_slow(
        &self,
        gfp: Flags,
        out: &mut [*mut u8],
        mut n: usize,
        mut why: AllocError,
    ) -> Result<(), AllocError> {
        let platform = &self.mm.pages.platform;
        let tries = gfp.contains(gfp::__GFP_FAST_TRY);
        let mut reclaims = gfp.allow_blocking() && !tries;
        let place = Place::new();
        let mut queued: Option<Queued<'_, '_, P>> = None;
        let mut round = 0;
        loop {
            let epoch = self.level().epoch();
            let hold = if tries {
                let holder = Holder::trying(platform, self.mm.pages.rt, &classes::MEMPOOL);
                self.level().try_lock(holder)
            } else {
                Some(self.lock())
            };
            let Some(mut hold) = hold else {
                self.give_back(gfp, out, n);
                return Err(AllocError::Contended);
            };
            let turn = match hold.take(&mut out[n..], queued.as_ref().map(|q| q.place)) {
                Take::All { wake } => {
                    if let Some(queued) = &mut queued {
                        queued.served = true;
                    }
                    drop(hold);
                    self.wake(wake);
                    for element in out[n..].iter().filter_map(|e| NonNull::new(*e)) {
                        self.elements.roused(self.mm, element, gfp);
                    }
                    return Ok(());
                }
                Take::TooMany => {
                    drop(hold);
                    self.give_back(gfp, out, n);
                    return Err(AllocError::BadSize);
                }
                Take::Wait(turn) => turn,
            };
            if !gfp.allow_blocking() || tries {
                drop(hold);
                self.give_back(gfp, out, n);
                return Err(why);
            }
            if core::mem::take(&mut reclaims) {
                // Not in the queue: reclaim may come to ask this pool itself.
                drop(hold);
                match self.ordinary(gfp & !NEVER | LIGHTLY, out, &mut n) {
                    Ok(()) => return Ok(()),
                    Err(now) => why = now,
                }
                continue;
            }
            if queued.is_none() {
                hold.join(&place, out.len() - n);
                queued = Some(Queued {
                    pool: self,
                    place: &place,
                    served: false,
                });
            }
            drop(hold);
            // After the turn was read: who makes memory free says so before he turns it.
            if self.level().epoch() == epoch {
                platform.park(self.level().turn(), turn);
                platform.relax(round);
                round = round.wrapping_add(1);
            }
            if self.level().epoch() != epoch && self.ordinary(first(gfp), out, &mut n).is_ok() {
                return Ok(());
            }
        }
    }

    /// A request failed: what ordinary memory gave goes back.
    fn give_back(&self, gfp: Flags, out: &mut [*mut u8], n: usize) {
        self.elements.give_back(self.mm, gfp, &out[..n]);
        out.fill(core::ptr::null_mut());
    }

    /// Gives an element back (`mempool_free`): to the pool while it lacks some, else to ordinary memory. Wakes who waits for it.
    ///
    /// # Safety
    ///
    /// `element` is from this pool, or another that is the same kind of memory, and nobody uses it any more.
    ///
    /// # Context
    ///
    /// Any in which it may be freed as what it is: any that may pin a CPU. Allocates nothing, does not wait, cannot fail.
    #[inline]
    #[track_caller]
    pub unsafe fn free(&self, element: NonNull<u8>) {
        might_lock(&self.mm.pages.platform, self.mm.pages.rt, &classes::MEMPOOL);
        if self.elements.careful && self.lies_here(element, Location::caller()) {
            return;
        }
        // What is a reserve's goes back there: a pool would keep it, and hand it to anybody.
        if self.level().is_short() && !self.mm.is_from_reserve(element.as_ptr()) {
            return self.refill(element, Location::caller());
        }
        // SAFETY: the caller's promise.
        unsafe { self.elements.free(self.mm, element) };
    }

    /// Gives many back (`mempool_free_bulk`).
    ///
    /// # Safety
    ///
    /// Each is as [`free`](Self::free) wants it.
    #[track_caller]
    pub unsafe fn free_bulk(&self, elements: &[*mut u8]) {
        for element in elements.iter().filter_map(|e| NonNull::new(*e)) {
            // SAFETY: the caller's promise.
            unsafe { self.free(element) };
        }
    }

    /// Is it in the pool already? That is reported.
    #[cold]
    fn lies_here(&self, element: NonNull<u8>, caller: Caller) -> bool {
        let twice = self.lock().contains(element.as_ptr());
        if twice {
            self.report(Corruption::DoubleFree, element, caller);
        }
        twice
    }

    #[cold]
    fn report(&self, what: Corruption, element: NonNull<u8>, caller: Caller) {
        let core = match self.elements.kind {
            MempoolKind::Slab(cache) => Some(cache.core()),
            MempoolKind::Kmalloc { .. } => match self.mm.where_is(element.as_ptr()) {
                Ok(Where::Object(core)) => Some(core),
                _ => None,
            },
            MempoolKind::Pages { .. } => None,
        };
        self.mm.report_object(what, core, element.as_ptr(), caller);
    }

    /// The pool lacks something, or did just now.
    #[cold]
    #[inline(never)]
    #[track_caller]
    fn refill(&self, element: NonNull<u8>, caller: Caller) {
        if let Err(what) = self.elements.check(self.mm, element.as_ptr()) {
            return self.report(what, element, caller);
        }
        if !self.elements.rests(self.mm, element, caller) {
            return;
        }
        let mut hold = self.lock();
        let put = hold.give(element.as_ptr());
        let wake = put && hold.wakes();
        drop(hold);
        self.wake(wake);
        if !put {
            self.elements.release(self.mm, &[element.as_ptr()], caller);
        }
    }
}
