//! memdesc: objects from its kmalloc, freed at once, by a callback each, by `kvfree_rcu`, and prepaid.

use std::ptr::NonNull;
use std::sync::atomic::{AtomicPtr, Ordering};

use memdesc::rcu::{Rcu, RcuHead};
use memdesc::{Config, Event, Mm, gfp};
use memdesc_host::{Host, ram};

use super::{FREED, OBJECT, Scheme, Tally};

/// Pages of the machine: 256 MiB.
const PAGES: u32 = 65_536;
/// Callbacks are looked after once in so many objects.
const CALLBACKS: u64 = 512;

/// How objects are freed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Form {
    Floor,
    Call,
    Kvfree,
    Prepaid,
}

impl Form {
    pub(super) const ALL: [Form; 4] = [Form::Floor, Form::Call, Form::Kvfree, Form::Prepaid];
}

#[repr(C)]
struct Object {
    head: RcuHead,
    mm: *const Mm<Host>,
    value: u64,
    _rest: [u64; 4],
}

const _: () = assert!(size_of::<Object>() == OBJECT);

/// A thread's pointer, on a cache line of its own.
#[repr(align(128))]
struct Padded(AtomicPtr<Object>);

/// One form, on a machine of its own.
pub(super) struct Ours {
    form: Form,
    mm: Box<Mm<Host>>,
    slots: Vec<Padded>,
}

unsafe fn free(head: NonNull<RcuHead>) {
    let object = head.cast::<Object>();
    // SAFETY: the head is the object's first field; the machine outlives its objects.
    unsafe { (*object.as_ref().mm).kfree(object.cast()) };
}

unsafe fn free_counted(head: NonNull<RcuHead>) {
    FREED.fetch_add(1, Ordering::Relaxed);
    // SAFETY: the caller's promise.
    unsafe { free(head) };
}

impl Ours {
    pub(super) fn new(form: Form, threads: usize) -> Result<Ours, String> {
        let ranges = [ram(0, PAGES)];
        let host = Host::builder()
            .memory(&ranges)
            .cpus(threads)
            .floating(1)
            .build()
            .map_err(|why| why.to_string())?;
        let config = Config {
            memory_is_zeroed: true,
            ..Config::default()
        };
        let mm = Mm::new(host, &config, &ranges).map_err(|why| why.to_string())?;
        let mut ours = Ours {
            form,
            mm: Box::new(mm),
            slots: Vec::new(),
        };
        ours.slots = (0..threads)
            .map(|_| Padded(AtomicPtr::new(ours.object(1).as_ptr())))
            .collect();
        Ok(ours)
    }

    #[inline]
    fn object(&self, value: u64) -> NonNull<Object> {
        let flags = if self.form == Form::Prepaid {
            gfp::GFP_KERNEL | gfp::__GFP_RCU_PREPAID
        } else {
            gfp::GFP_KERNEL
        };
        let Ok(object) = self.mm.kmalloc(OBJECT, flags) else {
            panic!("256 MiB are not enough: the backlog has run away")
        };
        let object = object.cast::<Object>();
        // SAFETY: ours, large and aligned enough.
        unsafe { (&raw mut (*object.as_ptr()).value).write(value) };
        object
    }

    #[inline]
    fn turns(
        &self,
        slot: &AtomicPtr<Object>,
        n: u64,
        mut retire: impl FnMut(u64, NonNull<Object>),
    ) {
        for i in 0..n {
            let new = self.object(i);
            let old = slot.swap(new.as_ptr(), Ordering::AcqRel);
            let Some(old) = NonNull::new(old) else {
                unreachable!("the pointer is never null")
            };
            retire(i, old);
        }
    }

    fn retire_all(&self, slot: &AtomicPtr<Object>, n: u64, tally: Option<&Tally>) {
        let mm = &*self.mm;
        match self.form {
            Form::Floor => self.turns(slot, n, |_, old| {
                // SAFETY: unlinked, and there are no readers in this scheme.
                unsafe { mm.kfree(old.cast()) };
            }),
            Form::Kvfree => self.turns(slot, n, |i, old| {
                // SAFETY: unlinked, and the head is the object's first field.
                unsafe { mm.kvfree_rcu(old.cast(), old.cast()) };
                self.look(i, tally);
            }),
            Form::Prepaid => self.turns(slot, n, |i, old| {
                // SAFETY: as above.
                unsafe { mm.kfree_rcu_prepaid(old.cast()) };
                self.look(i, tally);
            }),
            Form::Call => {
                let rcu = mm.rcu();
                let callback = if tally.is_some() { free_counted } else { free };
                self.turns(slot, n, |i, mut old| {
                    // SAFETY: as above.
                    unsafe {
                        old.as_mut().mm = mm;
                        rcu.call(old.cast(), callback);
                    }
                    if i % CALLBACKS == CALLBACKS - 1 {
                        rcu.advance();
                        rcu.run_callbacks();
                    }
                    self.look(i, tally);
                });
            }
        }
    }

    /// Tells the tally, in the pass that counts.
    #[inline]
    fn look(&self, i: u64, tally: Option<&Tally>) {
        let Some(tally) = tally else { return };
        tally.retired();
        // A look costs a barrier on all CPUs; blocks are 509 pointers.
        if i.is_multiple_of(61) {
            tally.sample(|retired| self.freed(retired));
        }
    }

    /// How many are free, of so many given up.
    fn freed(&self, retired: u64) -> u64 {
        match self.form {
            Form::Floor => retired,
            Form::Call => FREED.load(Ordering::Relaxed),
            Form::Kvfree => retired.saturating_sub(self.mm.kvfree_queued()),
            Form::Prepaid => self.prepaid_freed(),
        }
    }

    fn prepaid_freed(&self) -> u64 {
        self.mm
            .event(Event::PrepaidFreed)
            .saturating_sub(FREED.load(Ordering::Relaxed))
    }
}

impl Scheme for Ours {
    fn name(&self) -> &'static str {
        match self.form {
            Form::Floor => "memdesc floor",
            Form::Call => "memdesc call_rcu",
            Form::Kvfree => "memdesc kvfree_rcu",
            Form::Prepaid => "memdesc prepaid",
        }
    }
    fn floor(&self) -> &'static str {
        "memdesc floor"
    }
    fn run(&self, thread: usize, n: u64, tally: Option<&Tally>) {
        let _cpu = self.mm.platform().claim(thread);
        if tally.is_some() && self.form == Form::Prepaid {
            // What was freed before this pass does not count.
            let before = self.mm.event(Event::PrepaidFreed);
            let _ = FREED.compare_exchange(0, before, Ordering::Relaxed, Ordering::Relaxed);
        }
        self.retire_all(&self.slots[thread].0, n, tally);
    }
    fn read(&self, thread: usize, n: u64) {
        let slot = &self.slots[thread].0;
        if self.form == Form::Floor {
            for _ in 0..n {
                // SAFETY: nobody frees it while this thread reads.
                std::hint::black_box(unsafe { (*slot.load(Ordering::Acquire)).value });
            }
            return;
        }
        for _ in 0..n {
            let _read = self.mm.rcu_read_lock();
            // SAFETY: linked, and in a read section.
            std::hint::black_box(unsafe { (*slot.load(Ordering::Acquire)).value });
        }
    }
    fn flush(&self, tally: Option<&Tally>) {
        self.mm.rcu().barrier();
        self.mm.kvfree_rcu_barrier();
        if let Some(tally) = tally {
            tally.sample(|retired| self.freed(retired));
        }
    }
}
