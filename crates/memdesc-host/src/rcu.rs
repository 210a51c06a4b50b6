//! RCU for threads. Readers need not register: a thread's first read section gets it a slot, and its end gives the slot back.
//!
//! A thread that sleeps holds up nobody, unless it sleeps in a read section: its slot reads zero. The fast path is a
//! thread-local pointer, a load and two stores; the fence is membarrier(2), paid by who waits.
//!
//! A signal handler may open a section at any instruction, also while its thread is being given a slot. On a thread without one
//! it reads anonymously, by atomic counters.

use std::cell::RefCell;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, Ordering, compiler_fence};
use std::time::{Duration, Instant};

use memdesc::Context;
use memdesc::rcu::domain::Domain;
use memdesc::rcu::engine::{Readers, Slot, Stall};

/// Slots made at once.
const CHUNK: usize = 32;
/// Turns of waiting before a waiter sleeps.
const SPINS: u32 = 64;

/// A function that hears of readers that hold up a grace period.
pub type StallFn = dyn Fn(&Stall) + Send + Sync;

struct Chunk {
    slots: [Slot; CHUNK],
    taken: [AtomicBool; CHUNK],
    next: *const Chunk,
}

/// All slots of an instance. Threads that have one keep it alive.
struct Table {
    /// Chunks, the latest first; they stay where they are until the table goes.
    chunks: AtomicPtr<Chunk>,
    asymmetric: bool,
    start: Instant,
    stall: Option<Box<StallFn>>,
}

// SAFETY: the chunks are shared, made of atomics, and only ever added to while the table is shared.
unsafe impl Send for Table {}
// SAFETY: the same.
unsafe impl Sync for Table {}

/// Of which instance the thread has a slot at hand, and which: the pointer counts only while the number is right, and is null
/// while the two are being changed.
struct Cached {
    instance: AtomicU64,
    slot: AtomicPtr<Slot>,
}

thread_local! {
    static CACHED: Cached = const {
        Cached {
            instance: AtomicU64::new(0),
            slot: AtomicPtr::new(std::ptr::null_mut()),
        }
    };
    /// All slots that this thread has.
    static MINE: RefCell<Mine> = const { RefCell::new(Mine(Vec::new())) };
}

struct Mine(Vec<Own>);

struct Own {
    instance: u64,
    table: Arc<Table>,
    slot: NonNull<Slot>,
    taken: NonNull<AtomicBool>,
}

impl Drop for Mine {
    fn drop(&mut self) {
        cache(0, std::ptr::null_mut());
        for own in &self.0 {
            // SAFETY: the table, which we keep alive, has it. Release pairs with the Acquire in `claim`.
            unsafe { own.taken.as_ref() }.store(false, Ordering::Release);
        }
    }
}

fn cache(instance: u64, slot: *mut Slot) {
    CACHED.with(|cached| {
        cached.slot.store(std::ptr::null_mut(), Ordering::Relaxed);
        compiler_fence(Ordering::SeqCst);
        cached.instance.store(instance, Ordering::Relaxed);
        compiler_fence(Ordering::SeqCst);
        cached.slot.store(slot, Ordering::Relaxed);
    });
}

impl Table {
    /// A slot that nobody has, a new one if there is none.
    fn claim(&self) -> (NonNull<Slot>, NonNull<AtomicBool>) {
        loop {
            let mut at = self.chunks.load(Ordering::Acquire).cast_const();
            // SAFETY: chunks live as long as the table.
            while let Some(chunk) = unsafe { at.as_ref() } {
                for (slot, taken) in chunk.slots.iter().zip(&chunk.taken) {
                    // Acquire pairs with the Release in `Mine::drop`.
                    let got =
                        taken.compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed);
                    if got.is_ok() {
                        return (NonNull::from(slot), NonNull::from(taken));
                    }
                }
                at = chunk.next;
            }
            let first = self.chunks.load(Ordering::Relaxed);
            let chunk = Box::into_raw(Box::new(Chunk {
                slots: std::array::from_fn(|_| Slot::new()),
                taken: std::array::from_fn(|_| AtomicBool::new(false)),
                next: first,
            }));
            // Release pairs with the Acquire loads of `chunks`.
            let added =
                self.chunks
                    .compare_exchange(first, chunk, Ordering::Release, Ordering::Relaxed);
            if added.is_err() {
                // SAFETY: nobody saw it.
                drop(unsafe { Box::from_raw(chunk) });
            }
        }
    }
}

impl Drop for Table {
    fn drop(&mut self) {
        let mut at = self.chunks.load(Ordering::Acquire);
        while !at.is_null() {
            // SAFETY: from `Box::into_raw`, and the last who could use it is us.
            at = unsafe { Box::from_raw(at) }.next.cast_mut();
        }
    }
}

/// RCU among the threads of the process. Any number of them.
pub type HostRcu = Domain<Threads>;

/// The readers of a [`HostRcu`].
pub struct Threads {
    instance: u64,
    table: Arc<Table>,
}

impl std::fmt::Debug for Threads {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Threads")
            .field("instance", &self.instance)
            .finish_non_exhaustive()
    }
}

/// Reports readers that hold up a grace period for longer than `stall_ns` to `stall`, or to standard error.
pub fn host_rcu(stall_ns: u64, stall: Option<Box<StallFn>>) -> HostRcu {
    Domain::new(Threads::new(stall), stall_ns)
}

impl Threads {
    fn new(stall: Option<Box<StallFn>>) -> Threads {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Threads {
            instance: NEXT.fetch_add(1, Ordering::Relaxed),
            table: Arc::new(Table {
                chunks: AtomicPtr::new(std::ptr::null_mut()),
                asymmetric: crate::register_membarrier(),
                start: Instant::now(),
                stall,
            }),
        }
    }

    #[cold]
    #[inline(never)]
    fn slot_slow(&self) -> Option<&Slot> {
        // In a handler the list may be half way through a change. At the end of a thread it is gone.
        if crate::interrupt::context() > Context::Atomic {
            return None;
        }
        let slot = MINE.try_with(|mine| {
            let mut mine = mine.borrow_mut();
            let own = mine.0.iter().find(|own| own.instance == self.instance);
            if let Some(own) = own {
                return own.slot;
            }
            let (slot, taken) = self.table.claim();
            // SAFETY: the table has it.
            unsafe { slot.as_ref() }.set_owner(thread_id());
            // Instances that are gone, but for us, are let go of.
            mine.0.retain(|own| Arc::strong_count(&own.table) > 1);
            mine.0.push(Own {
                instance: self.instance,
                table: Arc::clone(&self.table),
                slot,
                taken,
            });
            slot
        });
        let slot = slot.ok()?;
        cache(self.instance, slot.as_ptr());
        // SAFETY: the table, which we keep alive, has it.
        Some(unsafe { slot.as_ref() })
    }
}

// SAFETY: a slot is its thread's until the thread ends; all slots are in the table. Barriers as `Host` has them.
unsafe impl Readers for Threads {
    #[inline]
    fn slot(&self) -> Option<&Slot> {
        let slot = CACHED.with(|cached| {
            if cached.instance.load(Ordering::Relaxed) == self.instance {
                cached.slot.load(Ordering::Relaxed)
            } else {
                std::ptr::null_mut()
            }
        });
        // SAFETY: the instance's number says that it is from our table, which we keep alive.
        match unsafe { slot.as_ref() } {
            Some(slot) => Some(slot),
            None => self.slot_slow(),
        }
    }

    fn for_each(&self, visit: &mut dyn FnMut(&Slot)) {
        let mut at = self.table.chunks.load(Ordering::Acquire).cast_const();
        // SAFETY: chunks live as long as the table.
        while let Some(chunk) = unsafe { at.as_ref() } {
            chunk.slots.iter().for_each(&mut *visit);
            at = chunk.next;
        }
    }

    #[inline]
    fn light(&self) {
        crate::light_barrier(self.table.asymmetric);
    }

    fn heavy(&self) {
        crate::heavy_barrier(self.table.asymmetric);
    }

    fn relax(&self, round: u32, nap: bool) {
        if round < SPINS {
            std::hint::spin_loop();
        } else if nap {
            std::thread::sleep(Duration::from_micros(50));
        } else {
            std::thread::yield_now();
        }
    }

    fn now(&self) -> u64 {
        self.table.start.elapsed().as_nanos() as u64
    }

    fn stall(&self, stall: &Stall) {
        match &self.table.stall {
            Some(f) => f(stall),
            None => {
                let who = stall
                    .reader
                    .map_or("a signal handler's reader".to_owned(), |id| {
                        format!("thread {id}")
                    });
                eprintln!(
                    "memdesc: rcu: grace period {} stalls for {} ms, held up by {who}",
                    stall.grace_period,
                    stall.waited_ns / 1_000_000
                );
            }
        }
    }
}

fn thread_id() -> u64 {
    #[cfg(all(target_os = "linux", not(miri)))]
    // SAFETY: gettid(2) takes nothing and cannot fail.
    return unsafe { libc::gettid() } as u64;
    #[cfg(not(all(target_os = "linux", not(miri))))]
    return 0;
}
