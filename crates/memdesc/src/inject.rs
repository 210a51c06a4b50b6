//! Labelled points inside the allocator, at which a test lets an interrupt happen.
//!
//! A real interrupt strikes between any two instructions, by chance. A test that wants to see *every* state that one can meet
//! installs a hook, which is called at each point with its label, in debug builds and with the feature `checked`; the hook then
//! does what an interrupt handler may do. Elsewhere a point is nothing at all.

#[cfg(all(any(debug_assertions, feature = "checked"), not(loom)))]
mod hook {
    use core::sync::atomic::{AtomicPtr, Ordering};

    /// The one thing in the crate that is not part of a value: a test's, never a kernel's.
    static HOOK: AtomicPtr<()> = AtomicPtr::new(core::ptr::null_mut());

    pub(crate) fn set(hook: Option<fn(&'static str)>) {
        let hook = hook.map_or(core::ptr::null_mut(), |f| f as *mut ());
        // Release pairs with the Acquire in `point`.
        HOOK.store(hook, Ordering::Release);
    }

    #[inline]
    pub(crate) fn point(label: &'static str) {
        let hook = HOOK.load(Ordering::Acquire);
        if !hook.is_null() {
            // SAFETY: only `set` stores here, and it stores such functions.
            let hook = unsafe { core::mem::transmute::<*mut (), fn(&'static str)>(hook) };
            hook(label);
        }
    }
}

#[cfg(all(any(debug_assertions, feature = "checked"), not(loom)))]
pub(crate) use hook::point;

/// A point at which an interrupt may be made to happen.
#[cfg(not(all(any(debug_assertions, feature = "checked"), not(loom))))]
#[inline(always)]
pub(crate) fn point(_label: &'static str) {}

/// Calls `hook` at every labelled point from now on, on every thread; says whether this build has points at all.
#[cfg(not(loom))]
pub fn set_hook(hook: Option<fn(&'static str)>) -> bool {
    #[cfg(any(debug_assertions, feature = "checked"))]
    hook::set(hook);
    let _ = hook;
    cfg!(any(debug_assertions, feature = "checked"))
}
