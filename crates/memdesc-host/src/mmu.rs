//! What a machine does when users touch memory: it walks the page tables, notes that they came, and remembers the translation; and if the
//! tables do not let them, the kernel's fault handler runs.
//!
//! The process's own mappings are the *translation buffer*: a [`UserView`] is a window as long as an address space, in which nothing is mapped
//! until it is touched. A touch is a SIGSEGV; its handler walks the tables of the space as the machine would, sets ACCESSED and DIRTY, and maps the
//! page of the arena there. [`Platform::flush_tlb`](memdesc::Platform::flush_tlb) takes it away again. So what a thread reads through a
//! view is what a user process on a real machine would read, and a translation that should have been flushed is one that is used.
//!
//! Lock order: a view's lock is taken by the handler and by flushes, round one system call and a look at the entry.

use std::ptr::NonNull;
use std::sync::Once;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, Ordering};

use memdesc::mmap::{Access, FaultError, MmStruct};

use crate::{Host, Window};

/// Address spaces with numbers below this can be viewed.
pub const MAX_ASID: usize = 256;

/// A view, as the handler sees it.
struct View {
    window: Window,
    space: *const MmStruct<'static, Host>,
    lock: AtomicBool,
    /// Translations remembered since all were forgotten.
    filled: AtomicU64,
}

/// The views of a host, by address space.
pub(crate) struct Mmu {
    views: Box<[AtomicPtr<View>; MAX_ASID]>,
    faults: AtomicU64,
    fills: AtomicU64,
    flushes: AtomicU64,
}

/// What the machine did.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct MmuStats {
    /// Page faults: the tables did not let somebody.
    pub faults: u64,
    /// Translations remembered.
    pub fills: u64,
    /// Ranges forgotten, where something may have been remembered.
    pub flushes: u64,
}

/// All views of the process, for the handler: it is told an address and nothing else.
static ALL: [AtomicPtr<View>; 1024] = [const { AtomicPtr::new(std::ptr::null_mut()) }; 1024];

/// Who looks for a view or a guard at this moment, or flushes a view that may not be his; who lets go of one waits for them.
static SEARCHING: AtomicU64 = AtomicU64::new(0);

/// One of them.
pub(crate) struct Search;

impl Search {
    pub(crate) fn new() -> Search {
        // SeqCst, here and in `UserView::drop`: either the search sees that the view is gone, or who drops it sees the search.
        SEARCHING.fetch_add(1, Ordering::SeqCst);
        Search
    }

    /// Nobody who began to look before this still does.
    pub(crate) fn wait_for_all() {
        while SEARCHING.load(Ordering::SeqCst) != 0 {
            std::thread::yield_now();
        }
    }
}

impl Drop for Search {
    fn drop(&mut self) {
        SEARCHING.fetch_sub(1, Ordering::SeqCst);
    }
}

/// The view that an address is in.
fn view_of(addr: usize) -> Option<*const View> {
    let _search = Search::new();
    ALL.iter().find_map(|place| {
        let view = place.load(Ordering::SeqCst);
        // SAFETY: a view waits for all searches before it goes.
        let contains = unsafe { view.as_ref() }.is_some_and(|v| v.window.contains(addr));
        contains.then_some(view.cast_const())
    })
}

impl Mmu {
    pub(crate) fn new() -> Mmu {
        Mmu {
            views: Box::new([const { AtomicPtr::new(std::ptr::null_mut()) }; MAX_ASID]),
            faults: AtomicU64::new(0),
            fills: AtomicU64::new(0),
            flushes: AtomicU64::new(0),
        }
    }

    pub(crate) fn stats(&self) -> MmuStats {
        MmuStats {
            faults: self.faults.load(Ordering::Relaxed),
            fills: self.fills.load(Ordering::Relaxed),
            flushes: self.flushes.load(Ordering::Relaxed),
        }
    }

    /// Forgets the translations of a range.
    pub(crate) fn flush(&self, asid: u64, start: u64, end: u64) {
        let Some(slot) = self.views.get(asid as usize) else {
            return;
        };
        // The space is there, but its view may be let go of: who moves pages flushes whenever he likes.
        let _search = Search::new();
        // SAFETY: a view waits for all searches before it goes.
        let Some(view) = (unsafe { slot.load(Ordering::SeqCst).as_ref() }) else {
            return;
        };
        let end = end.min(view.window.len() as u64);
        if start >= end {
            return;
        }
        view.locked(|| {
            if view.filled.load(Ordering::Relaxed) == 0 {
                return;
            }
            self.flushes.fetch_add(1, Ordering::Relaxed);
            if start == 0 && end == view.window.len() as u64 {
                view.filled.store(0, Ordering::Relaxed);
            }
            let done = view.window.unmap(start as usize, (end - start) as usize);
            // One mapping becomes two if the range is in its middle, and the process may have as many as it can have.
            if done.is_err() {
                view.forget_all();
            }
        });
    }
}

impl View {
    fn locked<R>(&self, f: impl FnOnce() -> R) -> R {
        let mut round = 0u32;
        while self
            .lock
            .compare_exchange_weak(false, true, Ordering::Acquire, Ordering::Relaxed)
            .is_err()
        {
            round += 1;
            if round.is_multiple_of(64) {
                std::thread::yield_now();
            }
            std::hint::spin_loop();
        }
        let result = f();
        self.lock.store(false, Ordering::Release);
        result
    }

    fn forget_all(&self) {
        self.filled.store(0, Ordering::Relaxed);
        let done = self.window.unmap(0, self.window.len());
        done.expect("one mapping in place of all can always be had");
    }

    /// For no longer than the view is borrowed, whatever the lifetime inside says: that is the space's own business.
    fn space(&self) -> &MmStruct<'static, Host> {
        // SAFETY: the view borrows its space.
        unsafe { &*self.space }
    }

    fn host(&self) -> &Host {
        self.space().mm().platform()
    }

    /// Somebody touched an address: walks, and has the kernel bring what is missing. `false`: he may not.
    fn touch(&self, addr: u64, access: Access) -> bool {
        let mmu = &self.host().mmu;
        let mut patience = 10_000;
        loop {
            let mut full = false;
            let found = self.space().walk_as_machine(addr, access, |look| {
                self.locked(|| {
                    // Under the lock: a flush that comes now forgets what is remembered here.
                    let Some(found) = look() else { return };
                    self.filled.fetch_add(1, Ordering::Relaxed);
                    let at = found.addr as usize;
                    let done = self.window.map(at, found.pfn, found.pages, found.writable);
                    full = done.is_err();
                });
            });
            if full {
                // The process has as many mappings as it can have: forget them, of all spaces.
                let _search = Search::new();
                for slot in self.host().mmu.views.iter() {
                    // SAFETY: a view waits for all searches before it goes.
                    if let Some(view) = unsafe { slot.load(Ordering::SeqCst).as_ref() } {
                        view.locked(|| view.forget_all());
                    }
                }
                continue;
            }
            if found {
                mmu.fills.fetch_add(1, Ordering::Relaxed);
                return true;
            }
            mmu.faults.fetch_add(1, Ordering::Relaxed);
            match self.space().handle_fault(addr, access) {
                Ok(()) => {}
                // A user process waits, or is killed in the end.
                Err(FaultError::Oom(_)) if patience > 0 => {
                    patience -= 1;
                    std::thread::yield_now();
                }
                Err(_) => return false,
            }
        }
    }
}

/// An address space as its users see it: `base + address` leads to what the page tables say, brought in by faults.
///
/// # Examples
///
/// ```
/// use memdesc::{Config, Mm, mmap::{Map, MmStruct, VmFlags}};
/// use memdesc_host::{Host, UserView};
///
/// let (host, ram) = Host::small(16384)?;
/// let mm = Mm::new(host, &Config::default(), &ram)?;
/// let space = MmStruct::with_top(&mm, 1, 64 << 20)?;
/// let at = space.mmap(None, 1 << 20, VmFlags::READ_WRITE, Map::Anon)?;
/// let view = UserView::new(&space)?;
/// // SAFETY: in an area that may be read and written, by this thread alone.
/// unsafe {
///     assert_eq!(view.ptr(at).read(), 0); // a page fault
///     view.ptr(at).write(7); // another
/// }
/// let mut seen = [0];
/// space.read(at, &mut seen)?;
/// assert_eq!(seen, [7]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct UserView<'s> {
    /// From a box, and reached by this pointer and its copies in the tables only.
    view: NonNull<View>,
    _space: std::marker::PhantomData<&'s MmStruct<'s, Host>>,
}

// SAFETY: a view is an address; what it leads to is reached by raw pointers only.
unsafe impl Send for UserView<'_> {}
// SAFETY: the same.
unsafe impl Sync for UserView<'_> {}

impl<'s> UserView<'s> {
    /// A view of an address space, as long as the space's highest address ([`MmStruct::with_top`]). One at a time for each number
    /// (`asid`), which is below [`MAX_ASID`].
    ///
    /// Who touches an address at which nothing is mapped for that dies by SIGSEGV. A view must not be touched by code that is called by the memory
    /// manager, nor while the thread has a folio locked.
    ///
    /// # Errors
    ///
    /// The kernel's, if it does not give that much room; [`std::io::ErrorKind::InvalidInput`] for a number that is too large or viewed already.
    pub fn new(space: &'s MmStruct<'_, Host>) -> std::io::Result<UserView<'s>> {
        install();
        let invalid = std::io::ErrorKind::InvalidInput;
        let host = space.mm().platform();
        let slot = host.mmu.views.get(space.asid() as usize).ok_or(invalid)?;
        let bytes = usize::try_from(space.top()).map_err(|_| invalid)?;
        let view = Box::new(View {
            window: Window::new(host, bytes, 2 << 20)?,
            space: (&raw const *space).cast(),
            lock: AtomicBool::new(false),
            filled: AtomicU64::new(0),
        });
        let this = Box::into_raw(view);
        let Some(view) = NonNull::new(this) else {
            unreachable!("a box is nowhere at null")
        };
        // From here on it goes as all views do.
        let view = UserView {
            view,
            _space: std::marker::PhantomData,
        };
        let none = std::ptr::null_mut();
        slot.compare_exchange(none, this, Ordering::AcqRel, Ordering::Relaxed)
            .map_err(|_| invalid)?;
        let place = ALL.iter().find(|place| {
            place
                .compare_exchange(none, this, Ordering::AcqRel, Ordering::Relaxed)
                .is_ok()
        });
        if place.is_none() {
            return Err(std::io::ErrorKind::OutOfMemory.into());
        }
        Ok(view)
    }

    fn view(&self) -> &View {
        // SAFETY: from a box that goes with this.
        unsafe { self.view.as_ref() }
    }

    /// Where an address of the space is in the process.
    pub fn ptr(&self, addr: u64) -> *mut u8 {
        assert!(
            addr < self.view().window.len() as u64,
            "outside of the address space"
        );
        self.view().window.base().wrapping_add(addr as usize)
    }
}

impl Drop for UserView<'_> {
    fn drop(&mut self) {
        let this = self.view.as_ptr();
        let none = std::ptr::null_mut();
        for place in ALL.iter().chain(self.view().host().mmu.views.iter()) {
            let _ = place.compare_exchange(this, none, Ordering::SeqCst, Ordering::Relaxed);
        }
        Search::wait_for_all();
        // SAFETY: from a box, in no table any more, and nobody who found it there is still at it.
        drop(unsafe { Box::from_raw(this) });
    }
}

impl std::fmt::Debug for UserView<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("UserView")
            .field("base", &self.view().window.base())
            .finish_non_exhaustive()
    }
}

#[cfg(all(target_os = "linux", target_arch = "x86_64", not(miri)))]
pub(crate) fn install() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: valid sigactions; the handler resolves faults of views, and hands all others to who handled them before.
        unsafe {
            let mut action = std::mem::zeroed::<libc::sigaction>();
            action.sa_sigaction = on_segv as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_NODEFER;
            libc::sigemptyset(&raw mut action.sa_mask);
            libc::sigaction(libc::SIGSEGV, &raw const action, std::ptr::null_mut());
        }
    });
}

#[cfg(not(all(target_os = "linux", target_arch = "x86_64", not(miri))))]
pub(crate) fn install() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {});
}

#[cfg(all(target_os = "linux", target_arch = "x86_64", not(miri)))]
extern "C" fn on_segv(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    const WRITE: i64 = 1 << 1;
    const FETCH: i64 = 1 << 4;
    // SAFETY: the kernel gives valid pointers; errno is the interrupted code's.
    let (errno, addr, code, ip) = unsafe {
        let context = context.cast::<libc::ucontext_t>();
        let regs = &(*context).uc_mcontext.gregs;
        let (code, ip) = (regs[libc::REG_ERR as usize], regs[libc::REG_RIP as usize]);
        let addr = (*info).si_addr().addr();
        (*libc::__errno_location(), addr, code, ip as usize)
    };
    let access = match code {
        code if code & FETCH != 0 => Access::Exec,
        code if code & WRITE != 0 => Access::Write,
        _ => Access::Read,
    };
    // SAFETY: the view that the address is in is being used, so it lives.
    if let Some(view) = view_of(addr).and_then(|view| unsafe { view.as_ref() }) {
        let at = (addr - view.window.base().addr()) as u64;
        if view.touch(at, access) {
            // SAFETY: as above.
            unsafe { *libc::__errno_location() = errno };
            return;
        }
    }
    if crate::guard::handle(addr, access == Access::Write, ip) {
        // SAFETY: as above.
        unsafe { *libc::__errno_location() = errno };
        return;
    }
    // Nobody's fault: back to the default, and the access happens again. First, or a fault in what follows would come here again.
    // SAFETY: a valid signal and disposition.
    unsafe { libc::signal(signal, libc::SIG_DFL) };
    crate::guard::tell_stray(addr, access == Access::Write, ip);
}
