//! The scheduler: a run queue on each CPU, round robin, with the timer's tick as its time slice.
//!
//! [`schedule`] is the only place where a CPU changes threads, with interrupts off and nothing pinned. It is called by who sleeps, ends or lets others run, and at the end of
//! an interrupt that struck a thread with its interrupts on, if somebody else is to run ([`preempt`]): so who pins his CPU, which is interrupts off, is not preempted.
//! A thread that is woken goes to a CPU that has nothing to do, or where it ran last; a CPU that has nothing to do takes ready threads from others.
//!
//! A thread that goes to sleep can be woken on another CPU before its own has left its stack: who wakes it waits until it has (`on_cpu`, as Linux's
//! `try_to_wake_up`). That is soon, since the other's interrupts are off and it waits for nobody.
//!
//! Lock order: a run queue is locked with interrupts off, and nothing under it; a second one is only tried.

use core::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};

use spin::Mutex;
use x86_64::instructions::interrupts;

use crate::percpu::{self, MAX_CPUS, PerCpu};
use crate::thread::{self, State, Thread};
use crate::{apic, park, time, users, worker};

unsafe extern "C" {
    /// See `switch.s`.
    unsafe fn switch_stacks(from: *mut (), to: *mut ()) -> *mut ();
}

/// Threads in the order in which they came.
struct List {
    first: *mut Thread,
    last: *mut Thread,
}

// SAFETY: who is in a list lives; what is done with it is done under its lock.
unsafe impl Send for List {}

impl List {
    const EMPTY: List = List {
        first: core::ptr::null_mut(),
        last: core::ptr::null_mut(),
    };

    fn push(&mut self, thread: &Thread) {
        thread.next.store(core::ptr::null_mut(), Ordering::Relaxed);
        // SAFETY: who is in the list lives.
        match unsafe { self.last.as_ref() } {
            Some(last) => last.next.store(thread.as_ptr(), Ordering::Relaxed),
            None => self.first = thread.as_ptr(),
        }
        self.last = thread.as_ptr();
    }

    /// Takes the first that is wanted.
    fn take(&mut self, wanted: impl Fn(&Thread) -> bool) -> Option<&'static Thread> {
        let mut before: Option<&Thread> = None;
        // SAFETY: as above; it lives as long as it is in a list or runs, which is what becomes of it now.
        let mut at: Option<&'static Thread> = unsafe { self.first.as_ref() };
        while let Some(thread) = at {
            let next = thread.next.load(Ordering::Relaxed);
            if wanted(thread) {
                match before {
                    Some(before) => before.next.store(next, Ordering::Relaxed),
                    None => self.first = next,
                }
                if next.is_null() {
                    self.last = before.map_or(core::ptr::null_mut(), Thread::as_ptr);
                }
                return Some(thread);
            }
            before = Some(thread);
            // SAFETY: the same.
            at = unsafe { next.as_ref() };
        }
        None
    }
}

/// A CPU's threads that are ready, and those that sleep for a time.
struct Queue {
    lists: Mutex<(List, List)>,
    /// How many are ready.
    ready: AtomicU64,
    sleep: AtomicU64,
}

static QUEUES: [Queue; MAX_CPUS] = [const {
    Queue {
        lists: Mutex::new((List::EMPTY, List::EMPTY)),
        ready: AtomicU64::new(0),
        sleep: AtomicU64::new(0),
    }
}; MAX_CPUS];

static UP: AtomicBool = AtomicBool::new(false);

/// Are there threads?
pub(crate) fn is_up() -> bool {
    UP.load(Ordering::Relaxed)
}

/// From here on there are.
pub(crate) fn start() {
    UP.store(true, Ordering::Release);
}

/// Where a thread goes that ran on this CPU last: there, unless another one has less to do by more than the thread itself.
fn least_busy(last: usize) -> usize {
    let load = |cpu: &PerCpu| {
        let running = u64::from(!cpu.idle.load(Ordering::Relaxed));
        running + QUEUES[cpu.cpu()].ready.load(Ordering::Relaxed)
    };
    let least = percpu::online().min_by_key(|cpu| load(cpu));
    match least {
        Some(least) if load(least) + 1 < load(percpu::of(last)) => least.cpu(),
        Some(least) if least.idle.load(Ordering::Relaxed) => least.cpu(),
        _ => last,
    }
}

/// Puts a ready thread into the queue of a CPU, which it has do it if it sleeps. In a thread or an interrupt.
pub(crate) fn enqueue(thread: &Thread) {
    interrupts::without_interrupts(|| {
        let me = percpu::this();
        let last = thread.cpu.load(Ordering::Relaxed);
        let is_idle = |cpu: usize| percpu::of(cpu).idle.load(Ordering::Relaxed);
        let cpu = match thread.bound() {
            Some(cpu) => cpu,
            None if is_idle(last) => last,
            None => least_busy(last),
        };
        let queue = &QUEUES[cpu];
        {
            let mut lists = queue.lists.lock();
            lists.0.push(thread);
            queue.ready.fetch_add(1, Ordering::Relaxed);
        }
        // SeqCst: pairs with `idle`, which says that it is and then looks at the queue.
        fence(Ordering::SeqCst);
        let target = percpu::of(cpu);
        if target.idle.load(Ordering::SeqCst) {
            target.resched.store(true, Ordering::Release);
            if !core::ptr::eq(target, me) {
                apic::send(target, apic::RESCHEDULE_VECTOR);
            }
        }
    });
}

/// Makes a thread ready that sleeps; whoever is first does. In a thread or an interrupt, with interrupts off.
pub(crate) fn wake(thread: &Thread) {
    if !thread.wakes() {
        return;
    }
    // Acquire pairs with the Release in `finish`: its registers are saved.
    while thread.on_cpu.load(Ordering::Acquire) {
        core::hint::spin_loop();
    }
    enqueue(thread);
}

/// Who runs next here: from this CPU's queue; from another's, if that is empty; the idle thread.
fn pick(me: &PerCpu, now: &'static Thread) -> &'static Thread {
    let cpu = me.cpu();
    let queue = &QUEUES[cpu];
    let idle = thread::idle(cpu);
    // Who leaves for another CPU is put there once this one has left its stack.
    let leaves = now.leaves.load(Ordering::Relaxed);
    if leaves {
        now.set_state(State::Ready);
    }
    let goes_on = !leaves && now.state() == State::Running;
    {
        let mut lists = queue.lists.lock();
        if let Some(next) = lists.0.take(|_| true) {
            if goes_on && !core::ptr::eq(now, idle) {
                now.set_state(State::Ready);
                lists.0.push(now);
            } else {
                queue.ready.fetch_sub(1, Ordering::Relaxed);
            }
            return next;
        }
    }
    if goes_on && !core::ptr::eq(now, idle) {
        return now;
    }
    for other in (1..percpu::nr_cpus()).map(|i| (cpu + i) % percpu::nr_cpus()) {
        let queue = &QUEUES[other];
        if queue.ready.load(Ordering::Relaxed) == 0 {
            continue;
        }
        let Some(mut lists) = queue.lists.try_lock() else {
            continue;
        };
        // Not one whose CPU has not left its stack yet.
        let free =
            |thread: &Thread| thread.bound().is_none() && !thread.on_cpu.load(Ordering::Acquire);
        if let Some(thread) = lists.0.take(free) {
            queue.ready.fetch_sub(1, Ordering::Relaxed);
            return thread;
        }
    }
    idle
}

/// Has somebody else run, if there is anybody: the caller goes on if it is running and its turn has come again, or once it has been woken. In a thread, with interrupts
/// off and nothing pinned. Says whether somebody else ran.
pub(crate) fn schedule() -> bool {
    let me = percpu::this();
    debug_assert!(!interrupts::are_enabled());
    assert!(!me.is_busy(), "a thread is to change while pinned");
    let now = thread::current();
    me.resched.store(false, Ordering::Relaxed);
    let next = pick(me, now);
    if core::ptr::eq(now, next) {
        return false;
    }
    next.set_state(State::Running);
    next.on_cpu.store(true, Ordering::Relaxed);
    if next.cpu.swap(me.cpu(), Ordering::Relaxed) != me.cpu() {
        next.moves.fetch_add(1, Ordering::Relaxed);
    }
    me.switches.fetch_add(1, Ordering::Relaxed);
    me.idle.store(false, Ordering::Relaxed);
    // Release pairs with the Acquire of who looks from another CPU: the descriptor is filled.
    me.current.store(next.as_ptr(), Ordering::Release);
    users::install(me, next);
    // SAFETY: `next` is ready and ours alone, its stack as `switch_stacks` or `lay_out` left it; `now` is saved before anybody else may run it.
    let last: &Thread =
        unsafe { &*switch_stacks(now.as_ptr().cast(), next.as_ptr().cast()).cast() };
    // Maybe another CPU, long after.
    finish(last);
    true
}

/// The CPU has left the stack of who ran before. With interrupts off.
pub(crate) fn finish(last: &Thread) {
    let (is_dead, leaves) = (
        last.state() == State::Dead,
        last.leaves.swap(false, Ordering::Relaxed),
    );
    // Release pairs with the Acquire in `wake` and `pick`.
    last.on_cpu.store(false, Ordering::Release);
    if is_dead {
        worker::bury(percpu::this(), last);
    } else if leaves {
        enqueue(last);
    }
}

/// The calling thread runs on this CPU only from here on, and does when this returns; or again on any (`sched_setaffinity`). In a thread with interrupts on.
pub(crate) fn bind(cpu: Option<usize>) {
    let me = thread::current();
    me.set_bound(cpu);
    let Some(cpu) = cpu else {
        return;
    };
    assert!(interrupts::are_enabled(), "a thread moves while pinned");
    interrupts::disable();
    if percpu::this().cpu() != cpu {
        me.leaves.store(true, Ordering::Relaxed);
        schedule();
    }
    interrupts::enable();
}

/// At the end of an interrupt, with interrupts off and nothing pinned: whoever is to run does.
pub(crate) fn preempt() {
    park::wake_noted();
    let me = percpu::this();
    if !is_up() || !me.resched.load(Ordering::Relaxed) {
        return;
    }
    let now = thread::current();
    if QUEUES[me.cpu()].ready.load(Ordering::Relaxed) > 0 && !me.idle.load(Ordering::Relaxed) {
        me.preemptions.fetch_add(1, Ordering::Relaxed);
        now.preemptions.fetch_add(1, Ordering::Relaxed);
    }
    schedule();
}

/// The timer's tick, in its interrupt: who has slept long enough wakes, and who has run for a tick lets others run.
pub(crate) fn tick() {
    if !is_up() {
        return;
    }
    let me = percpu::this();
    let queue = &QUEUES[me.cpu()];
    if queue.sleep.load(Ordering::Relaxed) > 0 {
        let now = time::now();
        let due = |thread: &Thread| thread.wake_at.load(Ordering::Relaxed) <= now;
        loop {
            let found = queue.lists.lock().1.take(due);
            let Some(thread) = found else {
                break;
            };
            queue.sleep.fetch_sub(1, Ordering::Relaxed);
            wake(thread);
        }
    }
    if queue.ready.load(Ordering::Relaxed) > 0 || me.idle.load(Ordering::Relaxed) {
        me.resched.store(true, Ordering::Relaxed);
    }
}

/// Lets others run; says whether anybody did. In a thread with interrupts on; else nothing.
pub(crate) fn yield_now() -> bool {
    if !is_up() || !interrupts::are_enabled() {
        return false;
    }
    interrupts::disable();
    let ran = schedule();
    interrupts::enable();
    ran
}

/// One turn of waiting for what another thread does, in a thread with interrupts on: others run, or the CPU sleeps until the next interrupt, a tick at the latest, so that
/// a host with fewer CPUs than the machine has can run those that are waited for.
pub(crate) fn relax() {
    if !yield_now() {
        x86_64::instructions::hlt();
    }
}

/// A turn of waiting for something that takes long: as [`relax`], where that may be.
pub(crate) fn nap() {
    if is_up() && interrupts::are_enabled() {
        relax();
    }
}

/// Sleeps so long, and up to two ticks longer. In a thread that may sleep.
pub(crate) fn sleep_ms(ms: u64) {
    if !is_up() {
        time::delay_us(ms * 1000);
        return;
    }
    assert!(interrupts::are_enabled(), "a thread sleeps while pinned");
    let me = thread::current();
    interrupts::disable();
    me.wake_at
        .store(time::now() + ms * 1_000_000, Ordering::Relaxed);
    let queue = &QUEUES[percpu::this().cpu()];
    {
        let mut lists = queue.lists.lock();
        me.set_state(State::Asleep);
        lists.1.push(me);
        queue.sleep.fetch_add(1, Ordering::Relaxed);
    }
    schedule();
    interrupts::enable();
}

/// What a CPU does that has nothing to do.
pub(crate) fn idle() -> ! {
    let me = percpu::this();
    loop {
        interrupts::disable();
        park::wake_noted();
        // SeqCst: pairs with `enqueue`.
        me.idle.store(true, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        let ready = QUEUES[me.cpu()].ready.load(Ordering::SeqCst) > 0;
        if ready || me.resched.load(Ordering::Relaxed) {
            schedule();
            interrupts::enable();
        } else {
            interrupts::enable_and_hlt();
        }
    }
}
