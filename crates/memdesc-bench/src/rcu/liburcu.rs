//! liburcu, flavour memb: `call_rcu` for each object. Loaded at run time where it is installed; its functions are called, where a C program
//! would have the short ones inlined.

use std::alloc::Layout;
use std::cell::RefCell;
use std::sync::atomic::{AtomicPtr, Ordering};

use libloading::{Library, Symbol};

use super::{FREED, OBJECT, Scheme, Tally};

const LAYOUT: Layout = match Layout::from_size_align(OBJECT, 16) {
    Ok(layout) => layout,
    Err(_) => panic!("an object has a layout"),
};

/// As liburcu lays it out: `struct cds_wfcq_node next; void (*func)(struct rcu_head *)`.
#[repr(C)]
struct RcuHead {
    next: *mut RcuHead,
    func: *const (),
}

#[repr(C)]
struct Object {
    head: RcuHead,
    value: u64,
}

type Callback = unsafe extern "C" fn(*mut RcuHead);
type Plain = unsafe extern "C" fn();

/// The library, and what is used of it.
pub(super) struct Liburcu {
    read_lock: Plain,
    read_unlock: Plain,
    register: Plain,
    unregister: Plain,
    barrier: Plain,
    call: unsafe extern "C" fn(*mut RcuHead, Callback),
    slots: Vec<AtomicPtr<Object>>,
    /// Kept loaded for good: threads it registered may end after us.
    _library: &'static Library,
}

thread_local! {
    static REGISTERED: RefCell<Option<Registered>> = const { RefCell::new(None) };
}

/// A thread that liburcu knows of, until it ends.
struct Registered(Plain);

impl Drop for Registered {
    fn drop(&mut self) {
        // SAFETY: this thread was registered.
        unsafe { (self.0)() };
    }
}

unsafe extern "C" fn free(head: *mut RcuHead) {
    // SAFETY: allocated with this layout, and the grace period is over.
    unsafe { std::alloc::dealloc(head.cast(), LAYOUT) };
}

unsafe extern "C" fn free_counted(head: *mut RcuHead) {
    FREED.fetch_add(1, Ordering::Relaxed);
    // SAFETY: as above.
    unsafe { free(head) };
}

impl Liburcu {
    /// Loads it; or says how it can be had.
    pub(super) fn load(threads: usize) -> Result<Liburcu, String> {
        let names = ["liburcu-memb.so.8", "liburcu-memb.so.6", "liburcu-memb.so"];
        // SAFETY: a library that is made to be loaded; its constructors set up its own state.
        let library = names
            .iter()
            .find_map(|name| unsafe { Library::new(*name) }.ok())
            .ok_or("not installed (Debian: apt-get install liburcu8t64, or liburcu8)")?;
        let library: &'static Library = Box::leak(Box::new(library));
        fn get<T: Copy>(library: &'static Library, name: &str) -> Result<T, String> {
            // SAFETY: the types are those of urcu-memb.h.
            let symbol: Result<Symbol<'_, T>, _> = unsafe { library.get(name.as_bytes()) };
            symbol
                .map(|s| *s)
                .map_err(|why| format!("liburcu-memb without {name}: {why}"))
        }
        let call: unsafe extern "C" fn(*mut RcuHead, Callback) =
            get(library, "urcu_memb_call_rcu")?;
        Ok(Liburcu {
            read_lock: get(library, "urcu_memb_read_lock")?,
            read_unlock: get(library, "urcu_memb_read_unlock")?,
            register: get(library, "urcu_memb_register_thread")?,
            unregister: get(library, "urcu_memb_unregister_thread")?,
            barrier: get(library, "urcu_memb_barrier")?,
            call,
            slots: (0..threads).map(|_| AtomicPtr::new(object(1))).collect(),
            _library: library,
        })
    }

    fn register(&self) {
        REGISTERED.with_borrow_mut(|registered| {
            registered.get_or_insert_with(|| {
                // SAFETY: once for each thread.
                unsafe { (self.register)() };
                Registered(self.unregister)
            });
        });
    }
}

fn object(value: u64) -> *mut Object {
    // SAFETY: the layout is not of size zero; an object fits it.
    unsafe {
        let at = std::alloc::alloc(LAYOUT).cast::<Object>();
        if at.is_null() {
            std::alloc::handle_alloc_error(LAYOUT);
        }
        (&raw mut (*at).value).write(value);
        at
    }
}

impl Scheme for Liburcu {
    fn name(&self) -> &'static str {
        "liburcu"
    }
    fn floor(&self) -> &'static str {
        "floor"
    }
    fn run(&self, thread: usize, n: u64, tally: Option<&Tally>) {
        self.register();
        let callback = if tally.is_some() { free_counted } else { free };
        for i in 0..n {
            let old = self.slots[thread].swap(object(i), Ordering::AcqRel);
            // SAFETY: unlinked; the head is its first field.
            unsafe { (self.call)(old.cast(), callback) };
            if let Some(tally) = tally {
                tally.retired();
                if i % 16 == 0 {
                    tally.sample(|_| FREED.load(Ordering::Relaxed));
                }
            }
        }
    }
    fn read(&self, thread: usize, n: u64) {
        self.register();
        for _ in 0..n {
            // SAFETY: the thread is registered, and does not free its own object meanwhile.
            unsafe {
                (self.read_lock)();
                std::hint::black_box((*self.slots[thread].load(Ordering::Acquire)).value);
                (self.read_unlock)();
            }
        }
    }
    fn flush(&self, tally: Option<&Tally>) {
        self.register();
        // SAFETY: not in a read section.
        unsafe { (self.barrier)() };
        if let Some(tally) = tally {
            tally.sample(|_| FREED.load(Ordering::Relaxed));
        }
    }
}
