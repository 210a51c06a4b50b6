//! The guarded pool, by the cases of Linux's `mm/kfence/kfence_test.c`, and what is ours.
//!
//! A kernel's page fault handler here is [`HostBuilder::on_fault`], which hands the fault on to [`Mm::kfence_handle_fault`]: it reports, opens the page, and
//! the access goes through. Without one the process dies with a message: seen in child processes.
//!
//! | Linux | here |
//! |---|---|
//! | `test_out_of_bounds_read`, `_write` | `out_of_bounds` |
//! | `test_use_after_free_read` | `use_after_free` |
//! | `test_use_after_free_read_nofault` | not there: a handler that knows that the access may fail does not hand it on, and nothing is reported |
//! | `test_double_free`, `test_invalid_addr_free` | `double_and_invalid_frees` |
//! | `test_corruption`, `test_kmalloc_aligned_oob_write` | `canaries` |
//! | `test_free_bulk`, `test_memcache_alloc_bulk` | `bulk` |
//! | `test_init_on_free` | `init_on_free` |
//! | `test_kmalloc_aligned_oob_read` | `out_of_bounds_behind_a_gap` |
//! | `test_memcache_ctor` | `constructors` |
//! | `test_memcache_typesafe_by_rcu` | `typesafe_by_rcu` |
//! | `test_krealloc` | `krealloc` |
//! | `test_gfpzero` | `gfpzero` |
//! | `test_invalid_access` | `invalid_access` |
//! | `test_shrink_memcache` | `shrink` |
//! | KASAN's `mempool_*` on guarded elements | `elements_of_mempools`: stray accesses beside them as ever, canaries when they are freed for good; in a pool they stay accessible |

mod common;

use std::ptr::NonNull;

use common::*;
use memdesc::gfp::{
    __GFP_ACCOUNT, __GFP_DMA, __GFP_FAST_TRY, __GFP_RCU_PREPAID, __GFP_ZERO, GFP_ATOMIC, GFP_KERNEL,
};
use memdesc::*;
use memdesc_host::Host;

/// A machine with a handler.
struct Kernel {
    mm: Box<Mm<Host>>,
    reports: Reports,
    machine: Machine,
}

impl Kernel {
    fn with(objects: usize, change: impl FnOnce(&mut Config)) -> Kernel {
        let mut machine = Machine::flat(4096);
        machine.config.kfence_objects = objects;
        // Every allocation, so the tests know what they get.
        machine.config.kfence_sample = 1;
        change(&mut machine.config);
        let (reports, later) = (Reports::default(), Later::<Host>::default());
        let handler = later.clone();
        let host = reports.on(machine.host()).on_fault(move |at, write, ip| {
            let mm = handler.get();
            mm.is_some_and(|mm| mm.kfence_handle_fault(at, write, ip))
        });
        let mm = Box::new(machine.boot_on(host.build().unwrap()));
        later.set(&mm);
        Kernel {
            mm,
            reports,
            machine,
        }
    }

    fn new() -> Kernel {
        Kernel::with(16, |_| {})
    }

    fn cache(&self, size: usize, flags: CacheFlags) -> Cache<'_> {
        // Its own memory is not what is looked at.
        self.mm.kfence_set_sample(0);
        let cache = self.mm.kmem_cache_create("test", size, 8, flags, None);
        self.mm.kfence_set_sample(1);
        cache.unwrap()
    }

    /// An object at this end of its page, of a cache or of kmalloc.
    #[track_caller]
    fn alloc(&self, cache: Option<&Cache<'_>>, size: usize, end: End, gfp: Flags) -> NonNull<u8> {
        for _ in 0..3 {
            let object = match cache {
                Some(cache) => self.mm.kmem_cache_alloc(cache, gfp).unwrap(),
                None => self.mm.kmalloc(size, gfp).unwrap(),
            };
            assert!(self.mm.is_kfence_address(object.as_ptr()), "not guarded");
            let left = object.addr().get().is_multiple_of(PAGE_SIZE);
            if end == End::Any || left == (end == End::Left) {
                return object;
            }
            kfree(&self.mm, object);
        }
        panic!("always at the same end");
    }

    fn finish(self) {
        assert_eq!(self.reports.take(), []);
        assert_eq!(self.mm.kfence_info().in_use, 0);
        teardown(&self.machine, &self.mm);
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum End {
    Left,
    Right,
    Any,
}

fn read(at: *const u8) -> u8 {
    // SAFETY: in the arena; the handler opens what is inaccessible.
    unsafe { at.read_volatile() }
}

fn write(at: *mut u8, byte: u8) {
    // SAFETY: as above; out of bounds on purpose.
    unsafe { at.write_volatile(byte) };
}

fn by(object: NonNull<u8>, offset: isize) -> *mut u8 {
    object.as_ptr().wrapping_offset(offset)
}

/// A report of this object, which this file allocated.
#[track_caller]
fn of(seen: &Seen, what: Corruption, object: NonNull<u8>, cache: &str) {
    assert_eq!(
        (seen.what, seen.address, seen.cache.as_deref()),
        (what, object.addr().get(), Some(cache)),
        "{}",
        seen.text
    );
    let (file, _) = seen.allocated.as_ref().expect("who allocated it");
    assert!(file.ends_with("kfence.rs"), "{}", seen.text);
}

#[cfg(not(miri))]
mod faults {
    use super::*;

    #[track_caller]
    fn says(seen: &Seen, write: bool, at: *const u8, where_: &str) {
        let how = if write { "write to" } else { "read of" };
        let access = format!("{how} {:#x} by the code at", at.addr());
        assert!(
            seen.text.contains(&access) && seen.text.contains(where_),
            "{access}, {where_}: {}",
            seen.text
        );
    }

    #[test]
    fn out_of_bounds() {
        let k = Kernel::new();
        let test = k.cache(32, CacheFlags::EMPTY);
        for (cache, name) in [(None, "kmalloc-32"), (Some(&test), "test")] {
            for is_write in [false, true] {
                let touch = |at: *mut u8| {
                    if is_write {
                        write(at, 7)
                    } else {
                        read(at);
                    }
                };
                for (end, offset, where_) in [
                    (End::Left, -1, "1 B left of kfence-#"),
                    (End::Left, -100, "100 B left of"),
                    (End::Right, 32, "1 B right of"),
                    (End::Right, 32 + 4095, "4096 B right of"),
                ] {
                    let object = k.alloc(cache, 32, end, GFP_KERNEL);
                    touch(by(object, offset));
                    let seen = k.reports.one();
                    of(&seen, Corruption::OutOfBounds, object, name);
                    says(&seen, is_write, by(object, offset), where_);
                    assert!(seen.text.contains("size 32"), "{}", seen.text);
                    assert_eq!(seen.freed, None);
                    // Opened for this object, and shut when it goes.
                    touch(by(object, offset));
                    assert_eq!(k.reports.take(), []);
                    kfree(&k.mm, object);
                    touch(by(object, offset));
                    let what = k.reports.one().what;
                    assert_eq!(what, Corruption::InvalidAccess);
                }
            }
        }
        k.mm.kmem_cache_destroy(test).unwrap();
        k.finish();
    }

    /// Between two objects the nearer one was overrun.
    #[test]
    fn the_nearer_of_two() {
        let k = Kernel::new();
        let a = k.alloc(None, 64, End::Right, GFP_KERNEL);
        let guard = a.as_ptr().wrapping_add(64);
        let b = k.alloc(None, 64, End::Left, GFP_KERNEL);
        assert_eq!(b.as_ptr(), guard.wrapping_add(PAGE_SIZE), "side by side");
        read(guard.wrapping_add(10));
        of(&k.reports.one(), Corruption::OutOfBounds, a, "kmalloc-64");
        kfree(&k.mm, a);
        // Shut with its object; now only the other is left.
        read(guard.wrapping_add(10));
        let seen = k.reports.one();
        of(&seen, Corruption::OutOfBounds, b, "kmalloc-64");
        assert!(seen.text.contains("4086 B left of"), "{}", seen.text);
        kfree(&k.mm, b);
        k.finish();
    }

    #[test]
    fn use_after_free() {
        let k = Kernel::new();
        for is_write in [false, true] {
            let object = k.alloc(None, 40, End::Any, GFP_KERNEL);
            let line = line!() + 1;
            kfree(&k.mm, object);
            let at = by(object, 39);
            if is_write {
                write(at, 1);
            } else {
                read(at);
            }
            let seen = k.reports.one();
            of(&seen, Corruption::UseAfterFree, object, "kmalloc-64");
            says(&seen, is_write, at, "byte 39 of kfence-#");
            let (file, at) = seen.freed.unwrap();
            assert!(file.ends_with("kfence.rs") && at == line, "{}", seen.text);
        }
        k.finish();
    }

    /// A free slot is the last to be used again, so its object is missed for as long as can be.
    #[test]
    fn free_slots_wait_in_line() {
        let k = Kernel::new();
        let first = k.alloc(None, 64, End::Any, GFP_KERNEL);
        kfree(&k.mm, first);
        let page = |p: NonNull<u8>| p.addr().get() / PAGE_SIZE;
        for _ in 0..15 {
            let other = k.alloc(None, 64, End::Any, GFP_KERNEL);
            assert_ne!(page(other), page(first));
            kfree(&k.mm, other);
            read(first.as_ptr());
            // Open since the first look.
            for seen in k.reports.take() {
                assert_eq!(seen.what, Corruption::UseAfterFree);
            }
        }
        let again = k.alloc(None, 64, End::Any, GFP_KERNEL);
        assert_eq!(page(again), page(first));
        kfree(&k.mm, again);
        // And shut again.
        read(first.as_ptr());
        assert_eq!(k.reports.one().what, Corruption::UseAfterFree);
        k.finish();
    }

    #[test]
    fn out_of_bounds_behind_a_gap() {
        let k = Kernel::new();
        // 73 bytes aligned to 8: up to 7 bytes behind are in the page.
        let object = k.alloc(None, 73, End::Right, GFP_KERNEL);
        assert!(object.addr().get().is_multiple_of(8));
        let gap = (PAGE_SIZE - (object.addr().get() + 73) % PAGE_SIZE) as isize;
        assert_eq!(gap, 7);
        read(by(object, 73));
        read(by(object, 79));
        assert_eq!(k.reports.take(), []);
        read(by(object, 80));
        let seen = k.reports.one();
        of(&seen, Corruption::OutOfBounds, object, "kmalloc-96");
        says(&seen, false, by(object, 80), "8 B right of");
        kfree(&k.mm, object);
        k.finish();
    }

    #[test]
    fn init_on_free() {
        let k = Kernel::with(16, |config| config.init_on_free = true);
        let object = k.alloc(None, 64, End::Any, GFP_KERNEL);
        fill(object, 64, 0x5a);
        kfree(&k.mm, object);
        // The first look is reported; nothing of what was there is seen.
        assert_eq!(read(object.as_ptr()), 0);
        assert_eq!(k.reports.one().what, Corruption::UseAfterFree);
        assert!(bytes(object, 64).iter().all(|&b| b == 0));
        k.finish();
    }

    #[test]
    fn invalid_access() {
        let k = Kernel::new();
        let first = k.mm.page_address(k.mm.kfence_info().first);
        for at in [first.wrapping_add(10), first.wrapping_add(PAGE_SIZE + 10)] {
            read(at);
            let seen = k.reports.one();
            assert_eq!(
                (seen.what, seen.address),
                (Corruption::InvalidAccess, at.addr())
            );
            assert!(
                seen.text.contains("where there is no object"),
                "{}",
                seen.text
            );
        }
        assert!(!k.mm.kfence_handle_fault(first.addr() - 1, false, 0));
        k.finish();
    }

    #[test]
    fn typesafe_by_rcu() {
        let k = Kernel::new();
        let test = k.cache(32, CacheFlags::TYPESAFE_BY_RCU);
        let object = k.alloc(Some(&test), 32, End::Any, GFP_KERNEL);
        write(object.as_ptr(), 42);
        let section = k.mm.rcu_read_lock();
        kfree(&k.mm, object);
        // Still what it was, as long as somebody reads.
        assert_eq!(read(object.as_ptr()), 42);
        assert_eq!(k.reports.take(), []);
        assert_eq!(k.mm.kfence_info().waiting, 1);
        kfree(&k.mm, object);
        of(&k.reports.one(), Corruption::DoubleFree, object, "test");
        k.mm.tick();
        assert_eq!(read(object.as_ptr()), 42);
        drop(section);
        (0..3).for_each(|_| k.mm.tick());
        read(object.as_ptr());
        of(&k.reports.one(), Corruption::UseAfterFree, object, "test");
        // The cache waits for its objects.
        let object = k.alloc(Some(&test), 32, End::Any, GFP_KERNEL);
        kfree(&k.mm, object);
        k.mm.kmem_cache_destroy(test).unwrap();
        k.finish();
    }

    #[test]
    fn krealloc() {
        let k = Kernel::new();
        let object = k.alloc(None, 32, End::Any, GFP_KERNEL);
        // SAFETY: live memory.
        assert_eq!(unsafe { k.mm.ksize(object) }, 32);
        (0..32).for_each(|i| write(by(object, i), i as u8));
        let object = ptr_realloc(&k, object, 32 * 3);
        // SAFETY: live memory.
        assert_eq!(unsafe { k.mm.ksize(object) }, 32 * 3);
        (0..32).for_each(|i| assert_eq!(read(by(object, i)), i as u8));
        (0..96).for_each(|i| write(by(object, i), i as u8));
        let small = ptr_realloc(&k, object, 32);
        (0..32).for_each(|i| assert_eq!(read(by(small, i)), i as u8));
        assert_ne!(small, object);
        // What it was before is gone.
        read(object.as_ptr());
        of(
            &k.reports.one(),
            Corruption::UseAfterFree,
            object,
            "kmalloc-96",
        );
        kfree(&k.mm, small);
        read(small.as_ptr());
        of(
            &k.reports.one(),
            Corruption::UseAfterFree,
            small,
            "kmalloc-32",
        );
        // Of what is freed nothing is copied.
        // SAFETY: wrong on purpose: it is told, and nothing is given back twice.
        let new = unsafe { k.mm.krealloc(object, 200, GFP_KERNEL) }.unwrap();
        of(
            &k.reports.one(),
            Corruption::DoubleFree,
            object,
            "kmalloc-96",
        );
        kfree(&k.mm, new);
        k.finish();
    }

    fn ptr_realloc(k: &Kernel, object: NonNull<u8>, size: usize) -> NonNull<u8> {
        // SAFETY: live memory of ours, used by its new address alone.
        unsafe { k.mm.krealloc(object, size, GFP_KERNEL) }.unwrap()
    }

    /// Without a handler: what is said before the process dies.
    #[test]
    fn the_message_of_who_dies() {
        const CASE: &str = "MEMDESC_KFENCE_CASE";
        let die = |case: &str| {
            let mut machine = Machine::flat(4096);
            machine.config.kfence_objects = 4;
            machine.config.kfence_sample = 1;
            let mm = machine.boot();
            let object = mm.kmalloc(64, GFP_KERNEL).unwrap();
            match case {
                "left" => write(by(object, -3), 1),
                "after" => {
                    kfree(&mm, object);
                    read(by(object, 5));
                }
                "nobody" => _ = read(by(object, 3 * PAGE_SIZE as isize)),
                _ => unreachable!(),
            }
        };
        if let Ok(case) = std::env::var(CASE) {
            return die(&case);
        }
        for (case, texts) in [
            (
                "left",
                &[
                    "KFENCE: out-of-bounds write to",
                    ", 3 B left of kfence-#0",
                    "size 64, cache kmalloc-64]",
                    "allocated by",
                ][..],
            ),
            (
                "after",
                &[
                    "KFENCE: use-after-free read of",
                    "byte 5 of",
                    "freed by",
                    "kfence.rs",
                ],
            ),
            (
                "nobody",
                &["KFENCE: invalid read of", "where there is no object"],
            ),
        ] {
            let output = std::process::Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "faults::the_message_of_who_dies", "--nocapture"])
                .env(CASE, case)
                .output()
                .unwrap();
            use std::os::unix::process::ExitStatusExt;
            assert_eq!(output.status.signal(), Some(libc::SIGSEGV), "{case}");
            let said = String::from_utf8_lossy(&output.stderr);
            texts
                .iter()
                .for_each(|text| assert!(said.contains(text), "{case}, {text}: {said}"));
        }
    }
}

#[test]
fn double_and_invalid_frees() {
    let k = Kernel::new();
    let test = k.cache(48, CacheFlags::EMPTY);
    let other = k.cache(48, CacheFlags::EMPTY);
    for (cache, name) in [(None, "kmalloc-64"), (Some(&test), "test")] {
        let free = |object| match cache {
            Some(cache) => cache_free(&k.mm, cache, object),
            None => kfree(&k.mm, object),
        };
        let object = k.alloc(cache, 48, End::Any, GFP_KERNEL);
        free(object.map_addr(|a| a.saturating_add(1)));
        let seen = k.reports.one();
        assert_eq!(seen.what, Corruption::NotAHead, "{}", seen.text);
        assert_eq!(seen.cache.as_deref(), Some(name));
        if cache.is_some() {
            cache_free(&k.mm, &other, object);
            of(&k.reports.one(), Corruption::WrongCache, object, name);
        }
        fill(object, 48, 1);
        free(object);
        assert_eq!(k.reports.take(), []);
        free(object);
        let seen = k.reports.one();
        of(&seen, Corruption::DoubleFree, object, name);
        assert!(seen.freed.is_some(), "{}", seen.text);
    }
    // A guard page is nobody's.
    let guard = k.mm.page_address(k.mm.kfence_info().first);
    kfree(&k.mm, NonNull::new(guard).unwrap());
    assert_eq!(k.reports.one().what, Corruption::WrongType);
    cache_free(&k.mm, &test, NonNull::new(guard).unwrap());
    assert_eq!(k.reports.one().what, Corruption::WrongType);
    k.mm.kmem_cache_destroy(test).unwrap();
    k.mm.kmem_cache_destroy(other).unwrap();
    k.finish();
}

#[test]
fn canaries() {
    let k = Kernel::new();
    let (left, right) = (Corruption::RedzoneLeft, Corruption::RedzoneRight);
    for (size, end, offset, what) in [
        (32, End::Left, 32isize, right),
        (32, End::Left, 4095, right),
        (32, End::Right, -1, left),
        (32, End::Right, -4064, left),
        // kmalloc_aligned_oob_write
        (73, End::Right, 73, right),
    ] {
        let object = k.alloc(None, size, end, GFP_KERNEL);
        assert_eq!(k.mm.validate(|r| panic!("{r}")).errors(), 0);
        let at = by(object, offset);
        let was = read(at);
        assert_eq!(was, 0xaa ^ (at.addr() & 7) as u8);
        write(at, !was);
        // Found by who looks, and when it is freed.
        let mut seen = Vec::new();
        k.mm.validate(|r| seen.push((r.what, r.byte)));
        assert_eq!(seen, [(what, Some((offset, !was, was)))]);
        kfree(&k.mm, object);
        let seen = k.reports.one();
        assert_eq!(seen.byte, Some((offset, !was, was)), "{}", seen.text);
        assert_eq!((seen.what, seen.address), (what, object.addr().get()));
        assert!(seen.text.contains("^^"), "{}", seen.text);
        assert_eq!(k.mm.validate(|r| panic!("{r}")).errors(), 0);
    }
    k.finish();
}

#[test]
fn bulk() {
    let k = Kernel::new();
    let test = k.cache(64, CacheFlags::EMPTY);
    for n in [5, 100] {
        let mut many = vec![std::ptr::null_mut(); n];
        k.mm.kmem_cache_alloc_bulk(&test, GFP_KERNEL, &mut many)
            .unwrap();
        let guarded = |p: &&*mut u8| k.mm.is_kfence_address(**p);
        let nr = many.iter().filter(guarded).count();
        assert_eq!(nr, n.min(16), "of {n}");
        many.iter()
            .for_each(|&p| fill(NonNull::new(p).unwrap(), 64, 3));
        let clobbered = *many.iter().filter(guarded).nth(2).unwrap();
        let clobbered = NonNull::new(clobbered).unwrap();
        let right = clobbered.addr().get().is_multiple_of(PAGE_SIZE);
        write(by(clobbered, if right { 64 } else { -1 }), 3);
        // SAFETY: ours, each once.
        unsafe { k.mm.kmem_cache_free_bulk(&test, &many) };
        assert_eq!(k.reports.one().address, clobbered.addr().get());
        assert_eq!(k.mm.kfence_info().in_use, 0);
    }
    k.mm.kmem_cache_destroy(test).unwrap();
    k.finish();
}

#[test]
fn constructors() {
    let k = Kernel::new();
    k.mm.kfence_set_sample(0);
    let ctor = |object: NonNull<u8>| fill(object, 32, b'x');
    let test =
        k.mm.kmem_cache_create("test", 32, 8, CacheFlags::EMPTY, Some(ctor))
            .unwrap();
    k.mm.kfence_set_sample(1);
    for end in [End::Left, End::Right] {
        let object = k.alloc(Some(&test), 32, end, GFP_KERNEL);
        assert!(bytes(object, 32).iter().all(|&b| b == b'x'));
        fill(object, 32, 0);
        // Where no lock may be taken: the link of what is freed later is not in the object, nor behind it.
        // SAFETY: ours.
        unsafe { k.mm.kfree_nolock(object) };
        k.mm.tick();
        assert_eq!(k.mm.kfence_info().in_use, 0);
    }
    k.mm.kmem_cache_destroy(test).unwrap();
    k.finish();
}

#[test]
fn gfpzero() {
    let k = Kernel::new();
    let mut again = 0;
    for _ in 0..40 {
        let object = k.alloc(None, 100, End::Any, GFP_KERNEL | __GFP_ZERO);
        assert!(bytes(object, 100).iter().all(|&b| b == 0));
        fill(object, 100, 0xff);
        kfree(&k.mm, object);
        again += 1;
    }
    assert!(again > k.mm.kfence_info().objects, "some were used before");
    k.finish();
}

#[test]
fn shrink() {
    let k = Kernel::new();
    let test = k.cache(32, CacheFlags::EMPTY);
    let object = k.alloc(Some(&test), 32, End::Any, GFP_KERNEL);
    fill(object, 32, 9);
    assert_eq!(k.mm.kmem_cache_shrink(&test), 0);
    k.mm.shrink();
    assert_eq!(slabinfo(&k.mm, "test"), (1, 1, 1));
    assert!(bytes(object, 32).iter().all(|&b| b == 9));
    ledger(&k.mm);
    // And a cache with a guarded object is not taken down, and says which it is.
    let failed = k.mm.kmem_cache_destroy(test).unwrap_err();
    assert_eq!(failed.live, 1);
    let mut live = Vec::new();
    k.mm.live_objects(&failed.cache, |at, track| {
        live.push((at.cast_mut(), track.is_some()))
    });
    assert_eq!(live, [(object.as_ptr(), true)]);
    k.mm.report_leaks(&failed.cache);
    of(&k.reports.one(), Corruption::ObjectsLeft, object, "test");
    kfree(&k.mm, object);
    k.mm.kmem_cache_destroy(failed.cache).unwrap();
    k.finish();
}

#[test]
fn elements_of_mempools() {
    let k = Kernel::new();
    let pool =
        k.mm.mempool_create("pool", MempoolKind::Kmalloc { size: 100 }, 2, GFP_KERNEL)
            .unwrap();
    // What is set aside is not guarded: it would keep the slots from others.
    let own = k.mm.kfence_info().in_use;
    let put = |element| {
        // SAFETY: the pool's, ours and used no more, or wrong on purpose.
        unsafe { pool.free(element) };
    };
    k.mm.platform().faults().fail_one_in(1, 1);
    let plain = [(); 2].map(|()| pool.alloc(GFP_ATOMIC).unwrap());
    k.mm.platform().faults().off();
    assert!(plain.iter().all(|p| !k.mm.is_kfence_address(p.as_ptr())));
    // An element of ordinary memory is, and fills the gap in the pool.
    let guarded = pool.alloc(GFP_KERNEL).unwrap();
    assert!(k.mm.is_kfence_address(guarded.as_ptr()));
    fill(guarded, 100, 7);
    put(guarded);
    put(guarded);
    of(
        &k.reports.one(),
        Corruption::DoubleFree,
        guarded,
        "kmalloc-128",
    );
    assert_eq!(
        (pool.view().curr_nr, k.mm.kfence_info().in_use),
        (1, own + 1)
    );
    put(plain[0]);
    put(plain[1]);
    // Taken out, it is as long as was asked for, and what is written beside it is found when it is freed for good.
    k.mm.platform().faults().fail_one_in(1, 1);
    let zeroed = [(); 2].map(|()| pool.alloc(GFP_ATOMIC | __GFP_ZERO).unwrap());
    k.mm.platform().faults().off();
    assert!(zeroed.contains(&guarded));
    for p in zeroed {
        assert!(bytes(p, 100).iter().all(|&b| b == 0));
    }
    write(
        by(
            guarded,
            if guarded.addr().get().is_multiple_of(PAGE_SIZE) {
                100
            } else {
                -1
            },
        ),
        0,
    );
    zeroed.into_iter().for_each(put);
    assert_eq!(k.reports.take(), []);
    pool.destroy().unwrap();
    let seen = k.reports.one();
    assert!(
        matches!(
            seen.what,
            Corruption::RedzoneRight | Corruption::RedzoneLeft
        ),
        "{}",
        seen.text
    );
    assert_eq!(k.mm.kfence_info().in_use, 0);
    k.finish();
}

/// By every way of freeing, also where no lock may be taken, and under RT.
#[test]
fn all_ways_back() {
    for rt in [false, true] {
        for slab_debug in [CacheFlags::EMPTY, ALL] {
            let k = Kernel::with(16, |config| {
                config.preempt_rt = rt;
                config.slab_debug = slab_debug;
            });
            let mm = &k.mm;
            let name = |n: usize| format!("kmalloc-{n}");
            let new = || k.alloc(None, 64, End::Any, GFP_KERNEL);
            assert_eq!(slabinfo(mm, &name(64)), (0, 0, 0));
            let p = new();
            assert_eq!(slabinfo(mm, &name(64)), (1, 1, 1));
            let pfn = mm.virt_to_pfn(p.as_ptr());
            assert!(matches!(mm.lookup(pfn), (head, 0, Memory::Slab(_)) if head == pfn));
            ledger(mm);
            // SAFETY: ours.
            unsafe { mm.kfree_nolock(p) };
            assert_eq!(
                mm.kfence_info().in_use,
                1,
                "not before the next normal free"
            );
            // SAFETY: wrong on purpose.
            unsafe { mm.kfree_nolock(p) };
            of(&k.reports.one(), Corruption::DoubleFree, p, "kmalloc-64");
            mm.tick();
            assert_eq!(mm.kfence_info().in_use, 0);
            let p = new();
            // SAFETY: ours, and the head lies in it.
            unsafe { mm.kvfree_rcu(p, p.cast()) };
            mm.kvfree_rcu_barrier();
            assert_eq!(mm.kfence_info().in_use, 0);
            let p = k.alloc(None, 64, End::Any, GFP_KERNEL | __GFP_RCU_PREPAID);
            let section = mm.rcu_read_lock();
            // SAFETY: ours; then wrong on purpose.
            unsafe {
                mm.kfree_rcu_prepaid(p);
                mm.kfree_rcu_prepaid(p);
            }
            of(
                &k.reports.one(),
                Corruption::DoubleFree,
                p,
                "kmalloc-rcu-64",
            );
            fill(p, 64, 1);
            mm.tick();
            assert_eq!(mm.kfence_info().in_use, 1);
            drop(section);
            mm.kvfree_rcu_barrier();
            assert_eq!(mm.kfence_info().in_use, 0);
            k.finish();
        }
    }
}

/// Charged, and no longer: at once, and after a grace period.
#[test]
fn charges() {
    let k = Kernel::new();
    let mm = &k.mm;
    mm.kfence_set_sample(0);
    let group = mm.memcg_create(None, "job", u64::MAX).unwrap();
    mm.kfence_set_sample(1);
    let _scope = Host::memcg_scope(group.id());
    for by_rcu in [false, true] {
        let p = k.alloc(None, 64, End::Any, GFP_KERNEL | __GFP_ACCOUNT);
        // SAFETY: live.
        assert_eq!(unsafe { mm.memcg_of_object(p) }, group.id());
        assert!(group.stat().usage > 0);
        mm.memcg_check().unwrap();
        if by_rcu {
            // SAFETY: ours.
            unsafe { mm.kfree_rcu_prepaid(p) };
            mm.kvfree_rcu_barrier();
        } else {
            kfree(mm, p);
        }
        assert_eq!(group.stat().usage, 0);
        mm.memcg_check().unwrap();
    }
    assert_eq!(mm.kfence_info().in_use, 0);
}

/// How often, and what is never guarded.
#[test]
fn what_is_sampled() {
    let k = Kernel::with(100, |config| config.kfence_sample = 7);
    let guarded = |p: NonNull<u8>| k.mm.is_kfence_address(p.as_ptr());
    let all: Vec<_> = (0..700)
        .map(|_| k.mm.kmalloc(64, GFP_ATOMIC).unwrap())
        .collect();
    let at: Vec<_> = (0..700).filter(|&i| guarded(all[i])).collect();
    assert_eq!(at.len(), 100);
    assert!(at.windows(2).all(|w| w[1] - w[0] == 7), "{at:?}");
    assert_eq!(
        (k.mm.kfence_info().in_use, k.mm.kfence_info().skipped),
        (100, 0)
    );
    // No room: as if there were no pool.
    let more: Vec<_> = (0..70)
        .map(|_| k.mm.kmalloc(64, GFP_ATOMIC).unwrap())
        .collect();
    assert!(!more.iter().any(|&p| guarded(p)));
    assert_eq!(k.mm.kfence_info().skipped, 10);
    all.into_iter().chain(more).for_each(|p| kfree(&k.mm, p));
    k.mm.kfence_set_sample(1);
    // Too large; certain memory; a context that may not.
    for (size, gfp) in [
        (4097, GFP_KERNEL),
        (64, GFP_KERNEL | __GFP_DMA),
        (64, __GFP_FAST_TRY),
    ] {
        let p = k.mm.kmalloc(size, gfp).unwrap();
        assert!(!guarded(p), "{size} {gfp:?}");
        kfree(&k.mm, p);
    }
    let p = k.mm.kmalloc_nolock(64, GFP_ATOMIC).unwrap();
    assert!(!guarded(p));
    kfree(&k.mm, p);
    let p = k.mm.kmalloc(4096, GFP_KERNEL).unwrap();
    assert!(guarded(p) && p.addr().get().is_multiple_of(4096));
    kfree(&k.mm, p);
    k.finish();
    // By time as well.
    let k = Kernel::with(100, |config| config.kfence_interval_ns = 1000);
    k.mm.platform().set_clock(10_000);
    let mut n = 0;
    for i in 0..100 {
        k.mm.platform().set_clock(10_000 + 100 * i);
        let p = k.mm.kmalloc(8, GFP_KERNEL).unwrap();
        n += u32::from(k.mm.is_kfence_address(p.as_ptr()));
        kfree(&k.mm, p);
    }
    assert_eq!(n, 10);
    k.finish();
}

/// Several CPUs at it at once, each freeing what others allocated.
#[test]
fn many_threads() {
    let mut machine = Machine::flat(8192).cpus(2);
    machine.config.kfence_objects = 8;
    machine.config.kfence_sample = 2;
    let mm = machine.boot();
    let (to, from) = std::sync::mpsc::sync_channel::<usize>(64);
    std::thread::scope(|s| {
        s.spawn(|| {
            let _cpu = mm.platform().claim(0).unwrap();
            for i in 0..scaled(20_000, 50) {
                let p = mm.kmalloc(8 + i % 500, GFP_KERNEL).unwrap();
                fill(p, 8 + i % 500, i as u8);
                to.send(p.as_ptr().expose_provenance()).unwrap();
            }
            drop(to);
        });
        s.spawn(|| {
            let _cpu = mm.platform().claim(1).unwrap();
            for (i, p) in from.into_iter().enumerate() {
                let p = NonNull::new(std::ptr::with_exposed_provenance_mut::<u8>(p)).unwrap();
                assert!(bytes(p, 8 + i % 500).iter().all(|&b| b == i as u8));
                kfree(&mm, p);
            }
        });
    });
    let info = mm.kfence_info();
    assert!(info.allocs > 10 && info.allocs == info.frees, "{info:?}");
    let _cpu = mm.platform().claim(0).unwrap();
    teardown(&machine, &mm);
}
