//! A timer that interrupts its own thread with a signal, and a handler that gets what belongs to it.

use std::io;
use std::mem::MaybeUninit;
use std::sync::Once;

use super::Handler;
use crate::error::Error;

/// Runs its handler on the thread that started it, until it is stopped.
pub(super) struct Timer {
    timer: libc::timer_t,
    signal: libc::c_int,
    handler: *mut Handler,
}

/// The two signals: the second is not blocked while the first is handled.
fn signal(which: usize) -> libc::c_int {
    libc::SIGRTMIN() + which as libc::c_int
}

extern "C" fn on_signal(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel gives a valid siginfo, and timers of ours carry their handler; a handler is alone with itself: its timer
    // signals one thread, and the signal is blocked while it is handled. errno is the interrupted code's.
    unsafe {
        let errno = *libc::__errno_location();
        let handler = (*info).si_value().sival_ptr.cast::<Handler>();
        (*handler).run();
        *libc::__errno_location() = errno;
    }
}

fn last_error(what: &'static str) -> Error {
    Error::Timer(what, io::Error::last_os_error())
}

fn install() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        for which in 0..2 {
            // SAFETY: a valid sigaction for a signal that nobody else uses; the handler calls only what any context may.
            unsafe {
                let mut action = MaybeUninit::<libc::sigaction>::zeroed().assume_init();
                action.sa_sigaction = on_signal as *const () as usize;
                action.sa_flags = libc::SA_SIGINFO | libc::SA_RESTART;
                libc::sigemptyset(&raw mut action.sa_mask);
                if which == 1 {
                    // Nothing interrupts an NMI.
                    libc::sigaddset(&raw mut action.sa_mask, signal(0));
                }
                libc::sigaction(signal(which), &raw const action, std::ptr::null_mut());
            }
        }
    });
}

impl Timer {
    /// Interrupts the calling thread so many times a second.
    pub(super) fn start(hz: u32, which: usize, handler: Handler) -> Result<Timer, Error> {
        install();
        let handler = Box::into_raw(Box::new(handler));
        // SAFETY: all structures are valid for the calls; the handler lives until `stop`.
        unsafe {
            let mut event = MaybeUninit::<libc::sigevent>::zeroed().assume_init();
            event.sigev_notify = libc::SIGEV_THREAD_ID;
            event.sigev_signo = signal(which);
            event.sigev_notify_thread_id = libc::gettid();
            event.sigev_value = libc::sigval {
                sival_ptr: handler.cast(),
            };
            let mut timer = std::ptr::null_mut();
            if libc::timer_create(libc::CLOCK_MONOTONIC, &raw mut event, &raw mut timer) != 0 {
                drop(Box::from_raw(handler));
                return Err(last_error("timer_create"));
            }
            let interval = libc::timespec {
                tv_sec: 0,
                tv_nsec: 1_000_000_000 / i64::from(hz.max(2)),
            };
            let spec = libc::itimerspec {
                it_interval: interval,
                it_value: interval,
            };
            let timer = Timer {
                timer,
                signal: signal(which),
                handler,
            };
            if libc::timer_settime(timer.timer, 0, &raw const spec, std::ptr::null_mut()) != 0 {
                let error = last_error("timer_settime");
                drop(timer.stop());
                return Err(error);
            }
            Ok(timer)
        }
    }

    /// Stops the timer, and gives the handler back. On the thread that started it.
    pub(super) fn stop(self) -> Box<Handler> {
        // SAFETY: the timer is ours. A signal that is pending still is delivered before the unblocked call below returns, or was
        // dropped with the timer; after that nobody has the handler.
        unsafe {
            libc::timer_delete(self.timer);
            let mut set = MaybeUninit::<libc::sigset_t>::zeroed().assume_init();
            libc::sigemptyset(&raw mut set);
            libc::sigaddset(&raw mut set, self.signal);
            libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
            let nothing = libc::timespec {
                tv_sec: 0,
                tv_nsec: 0,
            };
            while libc::sigtimedwait(&raw const set, std::ptr::null_mut(), &raw const nothing) > 0 {
            }
            libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const set, std::ptr::null_mut());
            Box::from_raw(self.handler)
        }
    }
}
