//! What happens in the middle of a page's failure, at labelled points: its owner frees it between two looks, it fails again while it goes out
//! of use, or while it waits to leave a list.
#![cfg(not(miri))]

mod common;

use std::cell::Cell;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};

use common::*;
use memdesc::gfp::GFP_KERNEL;
use memdesc::*;
use memdesc_host::{Host, interrupt};

/// The hook is one for all threads.
static ONE: Mutex<()> = Mutex::new(());

/// Points off at the end, however that comes.
struct Hooked;

impl Hooked {
    /// `None` in a build without points.
    fn set(hook: fn(&'static str)) -> Option<Hooked> {
        inject::set_hook(Some(hook)).then_some(Hooked)
    }
}

impl Drop for Hooked {
    fn drop(&mut self) {
        inject::set_hook(None);
    }
}

thread_local! {
    /// The block that its owner frees when the point is reached.
    static GOES: Cell<Option<(*const Mm<Host>, Pfn)>> = const { Cell::new(None) };
}

fn owner_frees(label: &'static str) {
    if label == "memory failure: in use"
        && let Some((mm, pfn)) = GOES.take()
    {
        // Where it stays free for a while before it goes out of use.
        // SAFETY: the test's, which waits for us; the pages are its, and it does not use them any more.
        unsafe { (*mm).free_pages_nolock(pfn) };
    }
}

/// The owner is faster than the second look: the page is not the kernel's any more, but out of use.
#[test]
fn freed_between_two_looks() {
    let _one = ONE.lock().unwrap_or_else(|e| e.into_inner());
    let Some(_hooked) = Hooked::set(owner_frees) else {
        return;
    };
    let mm = Machine::flat(4096).boot();
    for order in [0, 3, 5, 10] {
        let block = mm.alloc_pages(GFP_KERNEL, order).unwrap();
        GOES.set(Some((&raw const mm, block)));
        let page = block.add((1 << order) / 3);
        let failure = mm.memory_failure(page);
        assert!(GOES.take().is_none());
        assert_eq!(failure.result, MfResult::Recovered, "{failure}");
        assert!(matches!(mm.lookup(page).2, Memory::HwPoison));
    }
    assert_eq!(mm.num_poisoned_pages(), 4);
}

const IDLE: u32 = 0;
/// The block with the bad page in it is being freed: its note is taken, its word not yet written.
const TAKEN: u32 = 1;
/// The same page was noted once more.
const AGAIN: u32 = 2;
static STAGE: AtomicU32 = AtomicU32::new(IDLE);

fn wait_for(stage: u32) {
    while STAGE.load(Ordering::Acquire) != stage {
        std::thread::yield_now();
    }
}

fn fails_again(label: &'static str) {
    match label {
        "zone: bad page taken" if STAGE.load(Ordering::Acquire) == IDLE => {
            STAGE.store(TAKEN, Ordering::Release);
            wait_for(AGAIN);
        }
        "memory failure: noted" if STAGE.load(Ordering::Acquire) == TAKEN => {
            STAGE.store(AGAIN, Ordering::Release);
        }
        _ => {}
    }
}

/// A page that is bad and in use fails again (errors are reported as often as they strike) while it goes out of use: it is bad once, and what was noted
/// of it is gone with it.
#[test]
fn fails_again_while_it_goes_out_of_use() {
    let _one = ONE.lock().unwrap_or_else(|e| e.into_inner());
    let mm = Machine::flat(4096).cpus(2).boot();
    let block = mm.alloc_pages(GFP_KERNEL, 4).unwrap();
    let page = block.add(6);
    assert_eq!(mm.memory_failure(page).result, MfResult::Delayed);
    let Some(_hooked) = Hooked::set(fails_again) else {
        return;
    };
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let _cpu = mm.platform().claim(1).unwrap();
            free(&mm, block);
        });
        scope.spawn(|| {
            let _cpu = mm.platform().claim(0).unwrap();
            wait_for(TAKEN);
            let failure = mm.memory_failure(page);
            assert_eq!(failure.result, MfResult::Recovered, "{failure}");
        });
    });
    assert_eq!(mm.num_poisoned_pages(), 1);
    mm.unpoison_memory(page).unwrap();
    assert!(matches!(mm.lookup(page).2, Memory::Free { .. }));
    assert_eq!(mm.num_poisoned_pages(), 0);
    ledger(&mm);
}

thread_local! {
    /// The folio that its last holder lets go of in an NMI.
    static LET_GO: Cell<Option<(*const Mm<Host>, Pfn)>> = const { Cell::new(None) };
    /// Looks at a page that somebody has.
    static LOOKS: Cell<u32> = const { Cell::new(0) };
}

/// More looks than any wait may take where nobody else does anything.
const MOST_LOOKS: u32 = 1000;

fn let_go_under_the_lru_lock(label: &'static str) {
    match label {
        "lru: about to link" | "lru: about to unlink" => {
            if let Some((mm, head)) = LET_GO.take() {
                let _nmi = interrupt::nmi();
                // SAFETY: the test's, which waits for us; the folio is its, and it does not use it any more.
                unsafe { (*mm).free_pages_nolock(head) };
            }
        }
        "memory failure: in use" => {
            LOOKS.set(LOOKS.get() + 1);
            assert!(LOOKS.get() < MOST_LOOKS, "nobody frees it but a tick");
        }
        _ => {}
    }
}

/// A folio that nobody has waits to leave its list, since its last holder let go where the list's lock was held. No tick comes, and nobody else frees
/// anything: who handles its failure sees to it himself, whichever way the folio of the interrupted one was going.
#[test]
fn fails_while_it_waits_to_leave_its_list() {
    let _one = ONE.lock().unwrap_or_else(|e| e.into_inner());
    let Some(_hooked) = Hooked::set(let_go_under_the_lru_lock) else {
        return;
    };
    let mm = Machine::flat(4096).boot();
    let listed = || {
        let head = mm.alloc_folio(GFP_KERNEL, 0, FolioKind::File).unwrap();
        let folio = mm.folio_get(head).unwrap();
        mm.folio_add_lru(&folio, head);
        head
    };
    for linking in [true, false] {
        let head = listed();
        let other = listed();
        LOOKS.set(0);
        LET_GO.set(Some((&raw const mm, head)));
        let interrupted = if linking { listed() } else { other };
        free(&mm, interrupted);
        assert!(LET_GO.take().is_none(), "the list's lock was not met");
        // Nobody's, and not free: it waits.
        assert!(matches!(mm.lookup(head).2, Memory::File(_)));
        assert!(mm.folio_get(head).is_none());

        let failure = mm.memory_failure(head);
        assert_eq!(failure.result, MfResult::Recovered, "{failure}");
        assert!(LOOKS.get() > 1, "it waited for nothing");
        assert!(matches!(mm.lookup(head).2, Memory::HwPoison));
        if linking {
            free(&mm, other);
        }
    }
    assert_eq!(mm.num_poisoned_pages(), 2);
    ledger(&mm);
}
