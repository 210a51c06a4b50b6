//! Rule 7, try means try: what the fast try and the nolock calls do and do not, and what they say when they fail.

mod common;

use std::cell::Cell;
use std::ptr::NonNull;

use common::{Hooked, fill, free, kfree, range};
use memdesc::*;
use memdesc_host::Host;

const FAST: Flags = gfp::__GFP_FAST_TRY;
const KERNEL: Flags = gfp::GFP_KERNEL;

fn machine(rt: bool) -> Mm<Hooked> {
    debugged(rt, CacheFlags::EMPTY)
}

fn debugged(rt: bool, slab_debug: CacheFlags) -> Mm<Hooked> {
    let ranges = [range(0, 16_384, 0)];
    let host = Host::builder()
        .memory(&ranges)
        .cpus(2)
        .floating(1)
        .build()
        .unwrap();
    let config = Config {
        memory_is_zeroed: true,
        preempt_rt: rt,
        slab_debug,
        ..common::base_config()
    };
    Mm::new(Hooked::new(host), &config, &ranges).unwrap()
}

thread_local! {
    static AT: Cell<(&'static str, u32)> = const { Cell::new(("", 0)) };
    static MM: Cell<*const Mm<Hooked>> = const { Cell::new(std::ptr::null()) };
    static SAW: Cell<Option<Result<(), AllocError>>> = const { Cell::new(None) };
}

/// Does this build have labelled points? Optimised ones without the feature `checked` have none.
fn points() -> bool {
    cfg!(any(debug_assertions, feature = "checked"))
}

/// What is tried where the code is interrupted.
type Try = fn(&Mm<Hooked>) -> Result<(), AllocError>;

/// Runs `work` with `try_` done at the first point of this label, and says what came out. `None`: the label was not met.
fn interrupted(
    mm: &Mm<Hooked>,
    label: &'static str,
    try_: Try,
    work: impl FnOnce(),
) -> Option<Result<(), AllocError>> {
    thread_local! {
        static TRY: Cell<Option<Try>> = const { Cell::new(None) };
    }
    fn hook(label: &'static str) {
        let (wanted, n) = AT.get();
        if n == 0 || wanted != label {
            return;
        }
        AT.set(("", 0));
        // SAFETY: set by `interrupted`, which is still running.
        let mm = unsafe { &*MM.get() };
        SAW.set(TRY.get().map(|f| f(mm)));
    }
    assert!(inject::set_hook(Some(hook)), "a build with points");
    TRY.set(Some(try_));
    MM.set(mm);
    SAW.set(None);
    AT.set((label, 1));
    work();
    AT.set(("", 0));
    SAW.take()
}

fn put(mm: &Mm<Hooked>, pfn: Pfn) {
    // SAFETY: just had.
    unsafe { mm.free_pages_nolock(pfn) }
}

/// Only what is in this CPU's lists, of the wanted mobility first and then of the others; nobody is woken, nothing is refilled.
#[test]
fn rule_7_only_this_cpus_lists() {
    let mm = machine(false);
    let cpu = mm.platform().host.claim(0).unwrap();
    assert_eq!(
        mm.alloc_pages(FAST, 0),
        Err(AllocError::Empty),
        "nothing was refilled yet"
    );
    // A movable page in the list, and no other.
    let refills = mm.event(Event::PcpRefill);
    let movable = mm.alloc_pages(gfp::GFP_HIGHUSER_MOVABLE, 0).unwrap();
    free(&mm, movable);
    let in_lists = common::ledger(&mm).pcp;
    let mut got: Vec<Pfn> = Vec::new();
    while let Ok(pfn) = mm.alloc_pages(FAST, 0) {
        got.push(pfn);
    }
    assert!(
        got.contains(&movable),
        "a movable page serves an unmovable request"
    );
    assert_eq!(
        got.len() as u64,
        in_lists,
        "all that was in the lists, and no more"
    );
    assert_eq!(
        mm.event(Event::PcpRefill),
        refills + 1,
        "the ordinary request's, and no other"
    );
    assert_eq!(mm.event(Event::ZoneAlloc), 0);
    assert!(mm.platform().wakes.lock().unwrap().is_empty());
    assert_eq!(mm.alloc_pages(FAST, 0), Err(AllocError::Empty));
    // Flags that say how far to go do not count.
    assert_eq!(mm.alloc_pages(FAST | KERNEL, 0), Err(AllocError::Empty));
    assert_eq!(mm.event(Event::SlowPath), 0);
    // The other CPU's lists are not ours.
    got.into_iter().for_each(|pfn| free(&mm, pfn));
    drop(cpu);
    let _other = mm.platform().host.claim(1).unwrap();
    assert_eq!(mm.alloc_pages(FAST, 0), Err(AllocError::Empty));
    assert_eq!(mm.event(Event::FastPagesContended), 0);
    assert!(mm.event(Event::FastPagesEmpty) >= 4);
}

/// The wanted mobility comes first.
#[test]
fn rule_7_the_wanted_mobility_first() {
    let mm = machine(false);
    let _cpu = mm.platform().host.claim(0).unwrap();
    let unmovable = mm.alloc_pages(KERNEL, 0).unwrap();
    let movable = mm.alloc_pages(gfp::GFP_HIGHUSER_MOVABLE, 0).unwrap();
    mm.drain_all();
    free(&mm, unmovable);
    free(&mm, movable);
    assert_eq!(mm.alloc_pages(FAST | gfp::__GFP_MOVABLE, 0), Ok(movable));
    assert_eq!(mm.alloc_pages(FAST | gfp::__GFP_MOVABLE, 0), Ok(unmovable));
}

/// Each reason, where it is the right one.
#[test]
fn rule_7_reasons() {
    if !points() {
        return;
    }
    for rt in [false, true] {
        let mm = machine(rt);
        let cpu = mm.platform().host.claim(0).unwrap();
        assert_eq!(
            mm.alloc_pages(FAST, 5),
            Err(AllocError::Forbidden),
            "no per-CPU list"
        );
        assert_eq!(mm.alloc_pages(FAST, 11), Err(AllocError::BadOrder));
        assert_eq!(mm.kmalloc(0, FAST), Err(AllocError::BadSize));
        assert_eq!(
            mm.alloc_pages_nolock(Flags::EMPTY, Some(99), 0),
            Err(AllocError::NoZone)
        );
        free(&mm, mm.alloc_pages(KERNEL, 0).unwrap());
        kfree(&mm, mm.kmalloc(64, KERNEL).unwrap());

        // Inside the per-CPU lists: contended, whatever is in them.
        let fast: Try = |mm| mm.alloc_pages(FAST, 0).map(|pfn| put(mm, pfn));
        let work = || free(&mm, mm.alloc_pages(KERNEL, 0).unwrap());
        for label in [
            "local lock: busy",
            "pcp: about to unlink",
            "pcp: about to link",
            "local lock: about to be dropped",
        ] {
            let saw = interrupted(&mm, label, fast, work);
            assert_eq!(saw, Some(Err(AllocError::Contended)), "{label}, rt {rt}");
        }
        // Before and after, all is well.
        for label in ["local lock: about to be taken", "local lock: dropped"] {
            let saw = interrupted(&mm, label, fast, work);
            assert_eq!(saw, Some(Ok(())), "{label}, rt {rt}");
        }
        // Inside the zone: the per-CPU list still serves; what only the zone has is contended.
        let zone = || {
            let pfn = mm.alloc_pages(KERNEL, 6).unwrap();
            free(&mm, pfn);
        };
        for label in [
            "lock: taken",
            "zone: about to unlink",
            "zone: about to link",
            "lock: about to be dropped",
        ] {
            assert_eq!(
                interrupted(&mm, label, fast, zone),
                Some(Ok(())),
                "{label}, rt {rt}"
            );
            let large: Try = |mm| {
                mm.alloc_pages_nolock(Flags::EMPTY, None, 7)
                    .map(|pfn| put(mm, pfn))
            };
            let saw = interrupted(&mm, label, large, zone);
            assert_eq!(saw, Some(Err(AllocError::Contended)), "{label}, rt {rt}");
        }
        let after: Try = |mm| {
            mm.alloc_pages_nolock(Flags::EMPTY, None, 7)
                .map(|pfn| put(mm, pfn))
        };
        assert_eq!(interrupted(&mm, "lock: dropped", after, zone), Some(Ok(())));
        // Inside the sheaf: a partial slab serves. Inside the slab lists: the next larger class does.
        kfree(&mm, mm.kmalloc(96, KERNEL).unwrap());
        let object: Try = |mm| {
            let object = mm.kmalloc_nolock(64, Flags::EMPTY)?;
            // SAFETY: just had.
            let size = unsafe { mm.ksize(object) };
            // SAFETY: the same.
            unsafe { mm.kfree_nolock(object) };
            LARGER.set(size > 64);
            Ok(())
        };
        thread_local!(static LARGER: Cell<bool> = const { Cell::new(false) });
        let one = || kfree(&mm, mm.kmalloc(64, KERNEL).unwrap());
        let saw = interrupted(&mm, "sheaf: popped", object, one);
        assert_eq!((saw, LARGER.get()), (Some(Ok(())), false));
        let many = || {
            let all: Vec<_> = (0..200).map(|_| mm.kmalloc(64, KERNEL).unwrap()).collect();
            all.into_iter().for_each(|o| kfree(&mm, o));
        };
        let saw = interrupted(&mm, "slab lists: about to take", object, many);
        assert_eq!((saw, LARGER.get()), (Some(Ok(())), true));

        // A thread without a CPU, when all are taken.
        let _others = mm.platform().host.claim(1).unwrap();
        let pin = std::thread::scope(|scope| {
            let mm = &mm;
            scope
                .spawn(move || {
                    // The only floating CPU is this thread's for the length of a call: take it for good.
                    let held = mm.platform().pin();
                    let other = std::thread::scope(|scope| {
                        scope.spawn(move || mm.alloc_pages(FAST, 0)).join().unwrap()
                    });
                    // SAFETY: from `pin` above.
                    unsafe { mm.platform().unpin(held) };
                    other
                })
                .join()
                .unwrap()
        });
        assert_eq!(pin, Err(AllocError::Forbidden));
        drop(cpu);
    }
}

/// Any order, any size that kmalloc serves.
#[test]
fn any_order_and_size() {
    for rt in [false, true] {
        let mm = machine(rt);
        let _cpu = mm.platform().host.claim(0).unwrap();
        // The first descriptors come the ordinary way.
        free(&mm, mm.alloc_pages(KERNEL, 0).unwrap());
        let pages: Vec<_> = (0..=MAX_ORDER)
            .map(|order| (order, mm.alloc_pages_nolock(gfp::__GFP_ZERO, None, order)))
            .collect();
        for (order, pfn) in &pages {
            let pfn = pfn.unwrap_or_else(|why| panic!("order {order}: {why}"));
            assert!(pfn.0.is_multiple_of(1 << order));
            let (head, found, memory) = mm.lookup(pfn.add((1 << order) - 1));
            assert!(matches!(memory, Memory::Bare) && (head, found) == (pfn, *order));
        }
        for size in [
            1,
            8,
            9,
            64,
            100,
            192,
            193,
            4096,
            8192,
            8193,
            100_000,
            4 << 20,
        ] {
            let object = mm
                .kmalloc_nolock(size, gfp::__GFP_ZERO)
                .unwrap_or_else(|why| panic!("size {size}, rt {rt}: {why}"));
            assert!(common::bytes(object, size).iter().all(|&b| b == 0));
            fill(object, size, 7);
            // SAFETY: just had.
            unsafe { mm.kfree_nolock(object) };
        }
        assert_eq!(mm.kmalloc_nolock(0, Flags::EMPTY), Err(AllocError::BadSize));
        assert_eq!(
            mm.kmalloc_nolock((4 << 20) + 1, Flags::EMPTY),
            Err(AllocError::BadSize)
        );
        for (_, pfn) in pages {
            put(&mm, pfn.unwrap());
        }
        mm.shrink();
        let ledger = common::ledger(&mm);
        assert!(
            ledger.balanced && common::users(&ledger) == 0,
            "{ledger:#?}"
        );
    }
}

/// Who allocated does not matter, nor on which CPU.
#[test]
fn frees_whoever_allocated() {
    let mm = machine(false);
    let (a, b) = (
        mm.platform().host.claim(0).unwrap(),
        mm.platform().host.claim(1).unwrap(),
    );
    for round in 0..200 {
        a.switch();
        let ordinary = mm.kmalloc(200, KERNEL).unwrap();
        let tried = mm.kmalloc_nolock(200, Flags::EMPTY).unwrap();
        let folio = mm.alloc_folio(KERNEL, 1, FolioKind::File).unwrap();
        let bare = mm
            .alloc_pages_nolock(Flags::EMPTY, None, round % 6)
            .unwrap();
        let table = mm.alloc_page_table(KERNEL, 0).unwrap();
        b.switch();
        // SAFETY: just had, each freed once.
        unsafe {
            mm.kfree_nolock(ordinary);
            mm.kfree(tried);
            mm.free_pages_nolock(folio);
            mm.free_pages(bare);
            mm.free_pages_nolock(table);
        }
    }
    mm.shrink();
    let ledger = common::ledger(&mm);
    assert!(
        ledger.balanced && common::users(&ledger) == 0,
        "{ledger:#?}"
    );
    assert_eq!(mm.event(Event::AllocOnFree), 0);
}

/// What could not be freed at once is freed by the next normal free, or by a tick.
#[test]
fn the_next_normal_free_takes_it_further() {
    if !points() {
        return;
    }
    for by_tick in [false, true] {
        let mm = machine(false);
        let _cpu = mm.platform().host.claim(0).unwrap();
        // Order 6 has no per-CPU list.
        let (large, small) = (
            mm.alloc_pages(KERNEL, 6).unwrap(),
            mm.alloc_pages(KERNEL, 0).unwrap(),
        );
        put(&mm, large);
        assert_eq!(mm.event(Event::NolockFreeDeferred), 1);
        assert!(matches!(mm.lookup(large).2, Memory::Free { in_pcp: true }));
        let before = common::ledger(&mm);
        assert!(before.balanced, "deferred pages are counted: {before:#?}");
        if by_tick {
            mm.tick();
        } else {
            free(&mm, small);
        }
        assert!(
            matches!(mm.lookup(large).2, Memory::Free { in_pcp: false }),
            "still deferred"
        );
        if by_tick {
            free(&mm, small);
        }

        // An object, while its sheaf is busy.
        let object = mm.kmalloc(64, KERNEL).unwrap();
        thread_local!(static OBJECT: Cell<Option<NonNull<u8>>> = const { Cell::new(None) });
        OBJECT.set(Some(object));
        let later: Try = |mm| {
            // SAFETY: the test's object, which nobody uses.
            unsafe { mm.kfree_nolock(OBJECT.take().unwrap()) };
            Ok(())
        };
        let saw = interrupted(&mm, "sheaf: popped", later, || {
            let other = mm.kmalloc(64, KERNEL).unwrap();
            assert_eq!(common::slabinfo(&mm, "kmalloc-64").0, 2, "it waits");
            if by_tick {
                mm.tick();
            } else {
                kfree(&mm, mm.kmalloc(500, KERNEL).unwrap());
            }
            assert_eq!(common::slabinfo(&mm, "kmalloc-64").0, 1, "still deferred");
            kfree(&mm, other);
        });
        assert_eq!(saw, Some(Ok(())));
        assert_eq!(mm.event(Event::NolockKfreeDeferred), 1);
    }
}

/// Objects that keep what their constructor made are not written when they are freed, however they are.
#[test]
fn what_a_constructor_made_stays() {
    fn ctor(object: NonNull<u8>) {
        fill(object, 40, 0xc7);
    }
    let mm = machine(false);
    let _cpu = mm.platform().host.claim(0).unwrap();
    // Without sheaves every nolock free is deferred, by a link.
    let cache = mm
        .kmem_cache_create("made", 40, 8, CacheFlags::NO_SHEAVES, Some(ctor))
        .unwrap();
    for _ in 0..3 {
        let objects: Vec<_> = (0..300)
            .map(|_| mm.kmem_cache_alloc(&cache, KERNEL).unwrap())
            .collect();
        for object in &objects {
            assert!(
                common::bytes(*object, 40).iter().all(|&b| b == 0xc7),
                "a constructed object was written"
            );
        }
        // SAFETY: each once.
        objects
            .into_iter()
            .for_each(|o| unsafe { mm.kfree_nolock(o) });
        mm.tick();
    }
    assert!(mm.event(Event::NolockKfreeDeferred) >= 900);
    mm.kmem_cache_destroy(cache).unwrap();
}

/// An object that waits to be freed is linked with others, and not in bytes that its owner did not ask for: those are looked at.
#[test]
fn a_dead_object_has_its_red_zone() {
    for flags in [
        CacheFlags::RED_ZONE,
        CacheFlags::RED_ZONE | CacheFlags::POISON | CacheFlags::STORE_USER,
    ] {
        let mm = debugged(false, flags);
        let _cpu = mm.platform().host.claim(0).unwrap();
        for size in 1..=16 {
            let objects: Vec<_> = (0..20).map(|_| mm.kmalloc(size, KERNEL).unwrap()).collect();
            objects.iter().for_each(|o| fill(*o, size, 0x5a));
            // SAFETY: each once.
            objects
                .into_iter()
                .for_each(|o| unsafe { mm.kfree_nolock(o) });
            mm.tick();
        }
        assert!(mm.event(Event::NolockKfreeDeferred) >= 320);
        assert!(mm.ledger().balanced);
    }
}

/// Folios, page tables and objects by fast try: this CPU's descriptors, or nothing.
#[test]
fn fast_try_of_everything() {
    let mm = machine(false);
    let _cpu = mm.platform().host.claim(0).unwrap();
    let user = gfp::GFP_HIGHUSER_MOVABLE;
    // Warm: pages and descriptors in this CPU's lists.
    free(&mm, mm.alloc_folio(user, 0, FolioKind::Anon).unwrap());
    let warm: Vec<_> = (0..40)
        .map(|_| mm.alloc_folio(user, 0, FolioKind::Anon).unwrap())
        .collect();
    warm.into_iter().for_each(|pfn| free(&mm, pfn));
    let folio = mm
        .alloc_folio(FAST | gfp::__GFP_MOVABLE, 0, FolioKind::Anon)
        .unwrap();
    assert!(matches!(mm.lookup(folio).2, Memory::Anon(_)));
    free(&mm, folio);
    // No page table descriptor was ever made: the page goes back.
    let before = common::ledger(&mm);
    assert!(matches!(
        mm.alloc_page_table(FAST, 0),
        Err(AllocError::Empty)
    ));
    let after = common::ledger(&mm);
    assert_eq!((before.pcp, before.by_type), (after.pcp, after.by_type));
    assert!(after.balanced);
    assert_eq!(
        mm.kmalloc(300, FAST),
        Err(AllocError::Empty),
        "no sheaf has any"
    );
    kfree(&mm, mm.kmalloc(300, KERNEL).unwrap());
    let object = mm.kmalloc(300, FAST).unwrap();
    kfree(&mm, object);
    assert_eq!(mm.event(Event::FastObjects), 1);
}

/// Watermarks: what lies under the min mark is not for the nolock calls.
#[test]
fn nolock_leaves_the_reserve() {
    let mm = machine(false);
    let _cpu = mm.platform().host.claim(0).unwrap();
    let mut got = Vec::new();
    loop {
        // The ordinary way brings descriptors, and stops at the same mark.
        let ordinary = mm.alloc_pages(gfp::GFP_NOWAIT, 0);
        let tried = mm.alloc_pages_nolock(Flags::EMPTY, None, 0);
        if let (Err(_), Err(why)) = (ordinary, tried) {
            assert_eq!(why, AllocError::Empty);
            break;
        }
        got.extend(ordinary.into_iter().chain(tried));
    }
    for zone in common::zones(&mm) {
        let [min, ..] = zone.watermarks;
        // Slabs of descriptors heed no mark; a few pages are theirs.
        assert!(
            zone.free + 32 >= min,
            "{} free, the mark is at {min}",
            zone.free
        );
    }
    assert!(
        mm.alloc_pages(gfp::GFP_ATOMIC, 0).is_ok(),
        "the reserve is there for those in need"
    );
}

/// Between the look at the word and the reference, the page is freed and its descriptor becomes another page's folio's. That folio is not
/// what was asked for: it is given up again, unharmed.
#[test]
fn folio_get_looks_again() {
    if !points() {
        return;
    }
    let mm = machine(false);
    let _cpu = mm.platform().host.claim(0).unwrap();
    let user = gfp::GFP_HIGHUSER_MOVABLE;
    let folios: Vec<_> = (0..5)
        .map(|_| mm.alloc_folio(user, 0, FolioKind::Anon).unwrap())
        .collect();
    // The others keep the slab of descriptors where it is.
    let pfn = folios[2];
    thread_local! {
        static ASKED: Cell<Pfn> = const { Cell::new(Pfn(0)) };
        static OTHER: Cell<Option<Pfn>> = const { Cell::new(None) };
    }
    fn descriptor(mm: &Mm<Hooked>, pfn: Pfn) -> *const Folio {
        match mm.lookup(pfn).2 {
            Memory::Anon(desc) => desc.as_ptr(),
            _ => std::ptr::null(),
        }
    }
    ASKED.set(pfn);
    let reuse: Try = |mm| {
        let pfn = ASKED.get();
        let desc = descriptor(mm, pfn);
        free(mm, pfn);
        mm.shrink();
        mm.alloc_pages_at(pfn, 0)?;
        for _ in 0..300 {
            let other = mm.alloc_folio(gfp::GFP_HIGHUSER_MOVABLE, 0, FolioKind::Anon)?;
            if descriptor(mm, other) == desc {
                OTHER.set(Some(other));
                return Ok(());
            }
        }
        Ok(())
    };
    let mut got = true;
    let saw = interrupted(&mm, "folio_get: looked up", reuse, || {
        got = mm.folio_get(pfn).is_some();
    });
    assert_eq!(saw, Some(Ok(())));
    let other = OTHER.get().expect("the descriptor serves another page");
    assert!(!got, "a reference to another page's folio");
    let Memory::Anon(desc) = mm.lookup(other).2 else {
        panic!("the other folio is gone")
    };
    // SAFETY: ours.
    assert_eq!(unsafe { desc.as_ref() }.refcount(), 1);
}

/// The owner lets go while somebody has a reference: who puts the last one frees, also if he has it by mistake.
#[test]
fn the_last_reference_frees() {
    let mm = machine(false);
    let _cpu = mm.platform().host.claim(0).unwrap();
    let pfn = mm.alloc_folio(KERNEL, 2, FolioKind::File).unwrap();
    let folio = mm.folio_get(pfn.add(3)).unwrap();
    assert_eq!((folio.head(), folio.refcount()), (pfn, 2));
    let again = folio.clone();
    free(&mm, pfn);
    assert!(
        matches!(mm.lookup(pfn).2, Memory::File(_)),
        "freed under a reference"
    );
    drop(folio);
    assert!(matches!(mm.lookup(pfn).2, Memory::File(_)));
    drop(again);
    assert!(matches!(mm.lookup(pfn).2, Memory::Free { .. }));
    assert!(mm.folio_get(pfn).is_none());
    assert!(mm.folio_get(Pfn(u32::MAX - 1)).is_none());
    mm.shrink();
    let ledger = common::ledger(&mm);
    assert!(
        ledger.balanced && common::users(&ledger) == 0,
        "{ledger:#?}"
    );
}
