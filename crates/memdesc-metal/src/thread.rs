//! Kernel threads: their descriptors, stacks and ends. Who runs when is `sched`'s.
//!
//! A thread has a stack of vmalloc's with guard pages, whose owner is the thread's number, and a descriptor from a cache of the memory manager's. It may be moved to another
//! CPU whenever it does not run, unless it is bound. When it has ended, a worker of its last CPU (`worker`) frees its stack, which nobody runs on any more, and then says
//! that it is done. The descriptor goes with the last who refers to it, a grace period later: others may look at who runs on a CPU ([`on_cpu`]) in a read section.
//!
//! | state | who has it | next |
//! |---|---|---|
//! | ready | a run queue | running |
//! | running | its CPU | ready (preempted, or lets others run), asleep, dead |
//! | asleep | a bucket of `park`, or a CPU's timers | ready |
//! | dead | the worker of its last CPU | nothing: its stack is freed |

use core::cell::UnsafeCell;
use core::ptr::NonNull;
use core::sync::atomic::{
    AtomicBool, AtomicPtr, AtomicU16, AtomicU32, AtomicU64, AtomicUsize, Ordering,
};

use memdesc::gfp::GFP_KERNEL;
use memdesc::lockdep::Task;
use memdesc::rcu::RcuHead;
use memdesc::{AllocError, Cache, CacheFlags, KernelStack, Mm, PAGE_SIZE};
use spin::Once;
use x86_64::instructions::interrupts;

use crate::percpu::{self, MAX_CPUS};
use crate::platform::Metal;
use crate::process::Running;
use crate::users::Space;
use crate::{memory, park, sched};

/// Pages of a thread's stack (`THREAD_SIZE`).
pub(crate) const STACK_PAGES: usize = 4;
/// The first number of a thread that is none of those that CPUs start with and idle in.
pub(crate) const FIRST_ID: u64 = 100;

/// It may run anywhere.
const ANYWHERE: usize = usize::MAX;

/// What a thread does: see the table above.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub(crate) enum State {
    Ready,
    Running,
    Asleep,
    Dead,
}

/// A thread's descriptor.
#[repr(C)]
pub(crate) struct Thread {
    /// Its stack pointer while it does not run; `switch_stacks` knows that this is the first word.
    sp: AtomicUsize,
    /// Where traps from user mode push to while it is there; 0 if it is a kernel's thread. `enter_user` knows where this is.
    pub(crate) user_traps: AtomicUsize,
    state: AtomicU32,
    /// A CPU is on its stack, which is true until some while after it ceased to run.
    pub(crate) on_cpu: AtomicBool,
    /// Where it runs or ran last, and where it must.
    pub(crate) cpu: AtomicUsize,
    bound: AtomicUsize,
    /// It goes to another CPU as soon as this one has left its stack.
    pub(crate) leaves: AtomicBool,
    /// In the list that has it.
    pub(crate) next: AtomicPtr<Thread>,
    /// The word that it sleeps on.
    pub(crate) word: AtomicPtr<AtomicU32>,
    /// When it is to be woken.
    pub(crate) wake_at: AtomicU64,
    id: AtomicU64,
    name: &'static str,
    /// Nobody's but who made it, until it runs, and the worker's, once it is dead.
    stack: UnsafeCell<Option<KernelStack>>,
    /// The scheduler, until it is dead, and the handle.
    refs: AtomicU32,
    /// It has ended, its stack is free, and this is what it says.
    done: AtomicU32,
    value: AtomicU64,
    /// For the context checker: what it holds.
    pub(crate) task: Task,
    /// The reserve it is entitled to, and the group it is charged to.
    pub(crate) reserve: AtomicU16,
    pub(crate) memcg: AtomicU16,
    /// The address space that it runs in, if any, and the process that it is.
    pub(crate) space: AtomicPtr<Space>,
    pub(crate) running: AtomicPtr<Running>,
    /// The process is to end.
    pub(crate) killed: AtomicBool,
    /// How often it went to another CPU, and how often it was preempted.
    pub(crate) moves: AtomicU64,
    pub(crate) preemptions: AtomicU64,
    rcu: RcuHead,
}

// SAFETY: all but the stack is atomic or does not change; of the stack see there.
unsafe impl Sync for Thread {}

impl Thread {
    const fn new(id: u64, name: &'static str, bound: usize) -> Thread {
        Thread {
            sp: AtomicUsize::new(0),
            user_traps: AtomicUsize::new(0),
            state: AtomicU32::new(State::Ready as u32),
            on_cpu: AtomicBool::new(false),
            cpu: AtomicUsize::new(0),
            bound: AtomicUsize::new(bound),
            leaves: AtomicBool::new(false),
            next: AtomicPtr::new(core::ptr::null_mut()),
            word: AtomicPtr::new(core::ptr::null_mut()),
            wake_at: AtomicU64::new(0),
            id: AtomicU64::new(id),
            name,
            stack: UnsafeCell::new(None),
            refs: AtomicU32::new(2),
            done: AtomicU32::new(0),
            value: AtomicU64::new(0),
            task: Task::new(),
            reserve: AtomicU16::new(0),
            memcg: AtomicU16::new(0),
            space: AtomicPtr::new(core::ptr::null_mut()),
            running: AtomicPtr::new(core::ptr::null_mut()),
            killed: AtomicBool::new(false),
            moves: AtomicU64::new(0),
            preemptions: AtomicU64::new(0),
            rcu: RcuHead::new(),
        }
    }

    /// Its number.
    pub(crate) fn id(&self) -> u64 {
        self.id.load(Ordering::Relaxed)
    }

    pub(crate) fn name(&self) -> &'static str {
        self.name
    }

    pub(crate) fn as_ptr(&self) -> *mut Thread {
        (&raw const *self).cast_mut()
    }

    /// The CPU that it must run on, if that is said.
    pub(crate) fn bound(&self) -> Option<usize> {
        match self.bound.load(Ordering::Relaxed) {
            ANYWHERE => None,
            cpu => Some(cpu),
        }
    }

    /// Its own, by `sched::bind`.
    pub(crate) fn set_bound(&self, cpu: Option<usize>) {
        self.bound.store(cpu.unwrap_or(ANYWHERE), Ordering::Relaxed);
    }

    pub(crate) fn state(&self) -> State {
        // Acquire pairs with the Release of whoever changed it.
        match self.state.load(Ordering::Acquire) {
            0 => State::Ready,
            1 => State::Running,
            2 => State::Asleep,
            _ => State::Dead,
        }
    }

    pub(crate) fn set_state(&self, state: State) {
        self.state.store(state as u32, Ordering::Release);
    }

    /// It is no longer asleep but ready; `false` if it was not asleep: somebody else has woken it.
    pub(crate) fn wakes(&self) -> bool {
        let (asleep, ready) = (State::Asleep as u32, State::Ready as u32);
        self.state
            .compare_exchange(asleep, ready, Ordering::AcqRel, Ordering::Relaxed)
            .is_ok()
    }

    /// One who refers to it does so no more; the last frees it.
    fn put(&self) {
        // Release and Acquire: what the others did with it is over.
        if self.refs.fetch_sub(1, Ordering::AcqRel) > 1 {
            return;
        }
        if let (Some(mm), Some(object)) = (memory::mm(), NonNull::new(self.as_ptr())) {
            // SAFETY: from the cache; nobody finds it but readers that are at it, and the head is used for nothing else.
            unsafe { mm.kvfree_rcu(object.cast(), NonNull::from(&self.rcu)) };
        }
    }

    /// Frees what a dead thread had, and says that it is done. In a thread that may sleep; for the worker, once.
    pub(crate) fn bury(&self, mm: &Mm<Metal>) {
        // SAFETY: it is dead and off its CPU, so this is the only one who looks.
        if let Some(stack) = unsafe { (*self.stack.get()).take() } {
            // SAFETY: nobody runs on it any more.
            unsafe { mm.free_kernel_stack(stack) };
        }
        ALIVE.fetch_sub(1, Ordering::AcqRel);
        // Release pairs with the Acquire in `join`.
        self.done.store(1, Ordering::Release);
        park::unpark_all(&self.done);
        self.put();
    }
}

/// Where `enter_user` finds what.
pub(crate) const USER_TRAPS: usize = core::mem::offset_of!(Thread, user_traps);
const _: () = assert!(core::mem::offset_of!(Thread, sp) == 0);

/// What each CPU starts in, and runs the tests' work for all CPUs in: on the stack that it started on.
static FIRST: [Thread; MAX_CPUS] = {
    let mut threads = [const { Thread::new(0, "main", 0) }; MAX_CPUS];
    let mut cpu = 0;
    while cpu < MAX_CPUS {
        threads[cpu] = Thread::new(cpu as u64, "main", cpu);
        threads[cpu].state = AtomicU32::new(State::Running as u32);
        threads[cpu].on_cpu = AtomicBool::new(true);
        threads[cpu].cpu = AtomicUsize::new(cpu);
        cpu += 1;
    }
    threads
};

/// What each CPU does when there is nothing to do.
static IDLE: [Thread; MAX_CPUS] = {
    let mut threads = [const { Thread::new(0, "idle", 0) }; MAX_CPUS];
    let mut cpu = 0;
    while cpu < MAX_CPUS {
        threads[cpu] = Thread::new((MAX_CPUS + cpu) as u64, "idle", cpu);
        threads[cpu].cpu = AtomicUsize::new(cpu);
        cpu += 1;
    }
    threads
};

static CACHE: Once<Cache<'static>> = Once::new();
static NEXT_ID: AtomicU64 = AtomicU64::new(FIRST_ID);
/// Threads that have a stack.
static ALIVE: AtomicU64 = AtomicU64::new(0);

/// The thread that a CPU starts in.
pub(crate) fn first(cpu: usize) -> &'static Thread {
    &FIRST[cpu]
}

/// The thread that it idles in.
pub(crate) fn idle(cpu: usize) -> &'static Thread {
    &IDLE[cpu]
}

/// Threads that were spawned and are not done.
pub(crate) fn alive() -> u64 {
    ALIVE.load(Ordering::Acquire)
}

/// How many were spawned.
pub(crate) fn spawned() -> u64 {
    NEXT_ID.load(Ordering::Relaxed) - FIRST_ID
}

/// The calling thread. It lives as long as it calls.
#[inline]
pub(crate) fn current() -> &'static Thread {
    // SAFETY: a CPU's thread is there as long as the CPU runs it, and the caller is that thread, or an interrupt on top of it.
    unsafe { &*percpu::current() }
}

/// Who runs on a CPU: a number and a name, for a report. Any context.
pub(crate) fn on_cpu(cpu: usize) -> (u64, &'static str) {
    let look = || {
        // SAFETY: descriptors go a grace period after they were last seen here.
        let thread = unsafe { percpu::of(cpu).current.load(Ordering::Acquire).as_ref() };
        thread.map_or((0, "nobody"), |thread| (thread.id(), thread.name))
    };
    match memory::mm() {
        Some(mm) => {
            let _read = mm.rcu_read_lock();
            look()
        }
        None => look(),
    }
}

/// What is made before the first thread.
///
/// # Errors
///
/// No memory.
pub(crate) fn init(mm: &'static Mm<Metal>) -> Result<(), AllocError> {
    let (size, align) = (size_of::<Thread>(), align_of::<Thread>());
    let cache = mm.kmem_cache_create("thread", size, align, CacheFlags::EMPTY, None)?;
    CACHE.call_once(|| cache);
    Ok(())
}

/// Gives the idle thread of a CPU its stack. Before the CPU starts.
///
/// # Errors
///
/// No memory.
pub(crate) fn init_idle(mm: &'static Mm<Metal>, cpu: usize) -> Result<(), AllocError> {
    unsafe extern "C" fn run(_: *mut ()) -> u64 {
        sched::idle()
    }
    let thread = idle(cpu);
    let stack = mm.alloc_kernel_stack(STACK_PAGES, thread.id())?;
    // SAFETY: it never ran.
    unsafe { lay_out(thread, stack.top(), run, core::ptr::null_mut()) };
    // SAFETY: nobody else has it yet.
    unsafe { *thread.stack.get() = Some(stack) };
    Ok(())
}

type Entry = unsafe extern "C" fn(*mut ()) -> u64;

/// Makes a stack, from this top down, look as if its thread had left it by `switch_stacks` just before `thread_start`.
///
/// # Safety
///
/// Nobody runs on it, and the thread does not run.
unsafe fn lay_out(thread: &Thread, top: *mut u8, entry: Entry, argument: *mut ()) {
    unsafe extern "C" {
        safe static thread_start: u8;
    }
    // Aligned so that `thread_start`, which calls, has a stack of whole 16 bytes.
    let top = (top.addr() & !15) as u64;
    let words: [u64; 10] = [
        0,                                       // r15
        0,                                       // r14
        argument.expose_provenance() as u64,     // r13
        (entry as *const ()).addr() as u64,      // r12
        0,                                       // rbx
        0,                                       // rbp
        0x2,                                     // rflags: interrupts off
        (&raw const thread_start).addr() as u64, // where to
        0,                                       // where a walk of the stack ends
        0,
    ];
    let at = top - size_of_val(&words) as u64;
    let to: *mut [u64; 10] = core::ptr::with_exposed_provenance_mut(at as usize);
    // SAFETY: in the stack, which is the thread's, who does not run.
    unsafe { to.write(words) };
    thread.sp.store(at as usize, Ordering::Release);
}

/// Where a new thread comes out, from `thread_start`: `last` ran before on this CPU.
#[unsafe(no_mangle)]
unsafe extern "C" fn thread_begin(last: *mut Thread, entry: Entry, argument: *mut ()) -> ! {
    // SAFETY: from `switch_stacks`.
    sched::finish(unsafe { &*last });
    interrupts::enable();
    // SAFETY: what `lay_out` was given together.
    let value = unsafe { entry(argument) };
    exit(value)
}

/// The calling thread ends. Nothing on its stack is dropped.
pub(crate) fn exit(value: u64) -> ! {
    let me = current();
    me.value.store(value, Ordering::Relaxed);
    interrupts::disable();
    me.set_state(State::Dead);
    sched::schedule();
    unreachable!("a dead thread runs");
}

/// A thread that somebody waits for, or not.
#[derive(Debug)]
#[must_use = "nobody waits for a thread whose handle is dropped"]
pub(crate) struct JoinHandle(NonNull<Thread>);

// SAFETY: a reference to what may be referred to from anywhere.
unsafe impl Send for JoinHandle {}
// SAFETY: the same.
unsafe impl Sync for JoinHandle {}

impl JoinHandle {
    pub(crate) fn thread(&self) -> &Thread {
        // SAFETY: it lives as long as the handle.
        unsafe { self.0.as_ref() }
    }

    /// Has it ended?
    pub(crate) fn is_done(&self) -> bool {
        // Acquire pairs with the Release in `bury`.
        self.thread().done.load(Ordering::Acquire) != 0
    }

    /// Waits for its end; what it said. In a thread.
    pub(crate) fn join(self) -> u64 {
        while !self.is_done() {
            park::park(&self.thread().done, 0);
        }
        self.thread().value.load(Ordering::Relaxed)
    }
}

impl Drop for JoinHandle {
    fn drop(&mut self) {
        self.thread().put();
    }
}

/// Starts a thread that runs `f`, anywhere.
///
/// # Context
///
/// May sleep.
///
/// # Errors
///
/// No memory for its stack or its descriptor.
pub(crate) fn spawn<F>(name: &'static str, f: F) -> Result<JoinHandle, AllocError>
where
    F: FnOnce() -> u64 + Send + 'static,
{
    // SAFETY: it borrows nothing.
    unsafe { spawn_unchecked(name, None, f) }
}

/// Starts one that stays on a CPU.
///
/// # Errors
///
/// As for [`spawn`].
pub(crate) fn spawn_on<F>(name: &'static str, cpu: usize, f: F) -> Result<JoinHandle, AllocError>
where
    F: FnOnce() -> u64 + Send + 'static,
{
    // SAFETY: it borrows nothing.
    unsafe { spawn_unchecked(name, Some(cpu), f) }
}

/// Starts a thread.
///
/// # Safety
///
/// What `f` borrows lives until the thread has been joined.
///
/// # Errors
///
/// As for [`spawn`].
pub(crate) unsafe fn spawn_unchecked<F>(
    name: &'static str,
    cpu: Option<usize>,
    f: F,
) -> Result<JoinHandle, AllocError>
where
    F: FnOnce() -> u64 + Send,
{
    const {
        assert!(size_of::<F>() <= STACK_PAGES * PAGE_SIZE / 4 && align_of::<F>() <= 64);
    }
    unsafe extern "C" fn run<F: FnOnce() -> u64>(f: *mut ()) -> u64 {
        // SAFETY: written by `spawn_unchecked`, and read once.
        let f = unsafe { f.cast::<F>().read() };
        f()
    }
    let (Some(mm), Some(cache)) = (memory::mm(), CACHE.get()) else {
        return Err(AllocError::NoZone);
    };
    let id = NEXT_ID.fetch_add(1, Ordering::Relaxed);
    let object = mm.kmem_cache_alloc(cache, GFP_KERNEL)?.cast::<Thread>();
    let stack = match mm.alloc_kernel_stack(STACK_PAGES, id) {
        Ok(stack) => stack,
        Err(why) => {
            // SAFETY: ours, and nothing was put there.
            unsafe { mm.kmem_cache_free(cache, object.cast()) };
            return Err(why);
        }
    };
    let top = stack.top();
    // SAFETY: an object of that size and alignment, ours.
    let thread = unsafe {
        object.write(Thread::new(id, name, cpu.unwrap_or(ANYWHERE)));
        object.as_ref()
    };
    // What it runs lies at the top of its stack.
    let place = (top.addr() - size_of::<F>()) & !63;
    let place = top.with_addr(place);
    // SAFETY: in the stack, which is ours; the thread does not run yet.
    unsafe {
        place.cast::<F>().write(f);
        lay_out(thread, place, run::<F>, place.cast());
        *thread.stack.get() = Some(stack);
    }
    let here = percpu::pin();
    thread.cpu.store(here, Ordering::Relaxed);
    percpu::unpin();
    ALIVE.fetch_add(1, Ordering::AcqRel);
    let handle = JoinHandle(object);
    sched::enqueue(thread);
    Ok(handle)
}

/// Bytes of the calling thread's stack that were ever used, if it has one of its own (it was zero at first, or another's before).
pub(crate) fn stack_used() -> usize {
    // SAFETY: its own, which stays while it calls.
    let Some(stack) = (unsafe { &*current().stack.get() }) else {
        return 0;
    };
    let words = stack.size() / 8;
    let bottom = stack.bottom().cast::<u64>().as_ptr();
    // SAFETY: in the stack; below what is used nobody writes.
    let unused = (0..words).take_while(|&i| unsafe { bottom.add(i).read_volatile() } == 0);
    stack.size() - unused.count() * 8
}
