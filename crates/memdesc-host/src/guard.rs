//! Free pages that nobody reaches: `kernel_map_pages` by mprotect(2), `report_free_pages` by punching holes into the file that is physical memory,
//! and what is said of a stray access before the process dies of it.
//!
//! Every range of pages that is inaccessible beside one that is not is a mapping of its own, and a process may have no more than
//! `vm.max_map_count` of them. When that many are there, guarding ends: everything is made accessible, which is one mapping, and standard
//! error says so once. A test that relies on the guard asks [`Host::guards_free_pages`](crate::Host::guards_free_pages).

use std::fmt::Write;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicPtr, Ordering};

use memdesc::{NotReported, PAGE_SHIFT, PAGE_SIZE, PageWords, Pfn, Reported};

use crate::arena::Arena;
use crate::mmu::Search;

/// Writes what else is known of a page into the message about a stray access. Called in a signal handler, that may have struck anywhere: no heap, no lock.
pub type StrayFn = dyn Fn(Pfn, &mut dyn Write) + Send + Sync;

/// A page fault handler: the address, whether it was a write, where the instruction is. Says whether the access may be made again.
pub type FaultFn = dyn Fn(usize, bool, usize) -> bool + Send + Sync;

/// The guard of one host.
pub(crate) struct Guard {
    state: Box<State>,
}

/// Where the handler finds it.
struct State {
    base: usize,
    bytes: usize,
    /// The process had no room for more mappings.
    ended: AtomicBool,
    words: OnceLock<PageWords>,
    on_stray: Option<Box<StrayFn>>,
    on_fault: Option<Box<FaultFn>>,
}

/// The guards that the handler knows: it is told an address and nothing else.
static ALL: [AtomicPtr<State>; 1024] = [const { AtomicPtr::new(std::ptr::null_mut()) }; 1024];

impl Guard {
    pub(crate) fn new(
        arena: &Arena,
        on_stray: Option<Box<StrayFn>>,
        on_fault: Option<Box<FaultFn>>,
    ) -> Guard {
        Guard {
            state: Box::new(State {
                base: arena.base().addr(),
                bytes: arena.len(),
                ended: AtomicBool::new(false),
                words: OnceLock::new(),
                on_stray,
                on_fault,
            }),
        }
    }

    /// From here on stray accesses to these pages are told with what they are.
    pub(crate) fn watch(&self, words: PageWords) {
        if self.state.words.set(words).is_err() {
            return;
        }
        crate::mmu::install();
        let this = (&raw const *self.state).cast_mut();
        let none = std::ptr::null_mut();
        // With more hosts than places the others' accesses are deadly without a message.
        let _ = ALL.iter().find(|place| {
            place
                .compare_exchange(none, this, Ordering::AcqRel, Ordering::Relaxed)
                .is_ok()
        });
    }

    pub(crate) fn ended(&self) -> bool {
        self.state.ended.load(Ordering::Relaxed)
    }

    /// Any context: one system call.
    pub(crate) fn map(&self, arena: &Arena, pfn: Pfn, order: usize, enable: bool) {
        if self.ended() {
            return;
        }
        let offset = (pfn.0 as usize) << PAGE_SHIFT;
        if arena.protect(offset, PAGE_SIZE << order, enable).is_ok() {
            // Who found that there is no room may have opened everything before this closed it.
            if !enable && self.ended() {
                let _ = arena.protect(0, arena.len(), true);
            }
            return;
        }
        if !self.state.ended.swap(true, Ordering::SeqCst) {
            let mut text = Text::new();
            let _ = writeln!(
                text,
                "memdesc: no room for another mapping (vm.max_map_count): free pages are accessible from here on"
            );
            text.print();
        }
        let opened = arena.protect(0, arena.len(), true);
        assert!(
            opened.is_ok(),
            "mprotect: {opened:?}: one mapping in place of many can always be had"
        );
    }

    /// Gives the memory behind free blocks back to the system.
    pub(crate) fn report(
        &self,
        arena: &Arena,
        blocks: &[(Pfn, usize)],
    ) -> Result<Reported, NotReported> {
        for &(pfn, order) in blocks {
            let offset = (pfn.0 as usize) << PAGE_SHIFT;
            arena
                .punch(offset, PAGE_SIZE << order)
                .map_err(|_| NotReported)?;
        }
        Ok(Reported::Zeroed)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let this = (&raw const *self.state).cast_mut();
        let none = std::ptr::null_mut();
        for place in &ALL {
            let _ = place.compare_exchange(this, none, Ordering::SeqCst, Ordering::Relaxed);
        }
        Search::wait_for_all();
    }
}

/// The guard whose arena an address is in.
fn state_of(_search: &Search, addr: usize) -> Option<&State> {
    ALL.iter().find_map(|place| {
        // SAFETY: a guard waits for all searches before it goes.
        let state = unsafe { place.load(Ordering::SeqCst).as_ref() }?;
        (addr.wrapping_sub(state.base) < state.bytes).then_some(state)
    })
}

/// Has the kernel's fault handler look at an access, if the address is in an arena that is watched: `true`, and it is made again. In the signal
/// handler.
pub(crate) fn handle(addr: usize, write: bool, ip: usize) -> bool {
    let search = Search::new();
    let state = state_of(&search, addr);
    state.is_some_and(|s| s.on_fault.as_ref().is_some_and(|f| f(addr, write, ip)))
}

/// Says whose page was touched, if the address is in an arena that is watched. In the signal handler.
pub(crate) fn tell_stray(addr: usize, write: bool, ip: usize) {
    let search = Search::new();
    let Some(state) = state_of(&search, addr) else {
        return;
    };
    let offset = addr - state.base;
    let pfn = Pfn((offset >> PAGE_SHIFT) as u32);
    let mut text = Text::new();
    // SAFETY: as below.
    let guarded = state
        .words
        .get()
        .and_then(|w| unsafe { w.kfence_fault(addr, write, ip) });
    if let Some(fault) = guarded {
        let _ = writeln!(text, "memdesc: KFENCE: {fault}");
        return text.print();
    }
    let what = if write { "write to" } else { "read of" };
    let _ = write!(
        text,
        "memdesc: stray {what} {addr:#x}: byte {} of page {:#x}",
        offset % PAGE_SIZE,
        pfn.0
    );
    // SAFETY: the host lives, since its guard does, and it is the host that the words are of: it is dropped with its memory manager, or
    // after it.
    let word = state.words.get().and_then(|w| unsafe { w.lookup(pfn) });
    let _ = match word {
        Some(found) => write!(
            text,
            ", page {} of a block that says: {:?}",
            pfn.0 - found.head.0,
            found.word
        ),
        None => write!(text, ", which was never handed out"),
    };
    // SAFETY: as above.
    let history = state.words.get().and_then(|w| unsafe { w.history(pfn) });
    if let Some(history) = history {
        let _ = write!(text, "; {history}");
    }
    if let Some(f) = &state.on_stray {
        let _ = write!(text, "; ");
        f(pfn, &mut text);
    }
    let _ = writeln!(text);
    text.print();
}

/// A text without a heap.
struct Text {
    bytes: [u8; 1024],
    len: usize,
}

impl Text {
    fn new() -> Text {
        Text {
            bytes: [0; 1024],
            len: 0,
        }
    }

    /// By write(2), which may be called from a signal handler.
    fn print(&self) {
        #[cfg(not(miri))]
        // SAFETY: reads what is ours; standard error or nothing.
        unsafe {
            libc::write(2, self.bytes.as_ptr().cast(), self.len)
        };
    }
}

impl Write for Text {
    fn write_str(&mut self, s: &str) -> std::fmt::Result {
        // What is too long is cut, with room for the end of the line.
        let room = self.bytes.len() - self.len;
        let end = if s == "\n" { 1 } else { s.len() };
        let end = end.min(if s == "\n" {
            room
        } else {
            room.saturating_sub(1)
        });
        self.bytes[self.len..self.len + end].copy_from_slice(&s.as_bytes()[..end]);
        self.len += end;
        Ok(())
    }
}
