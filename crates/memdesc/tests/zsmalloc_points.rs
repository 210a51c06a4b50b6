//! What happens in the middle of zsmalloc's work, at labelled points: a handle goes stale while it is being looked up, and an object is wanted while it moves.
#![cfg(not(miri))]

mod common;

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, Ordering};
use std::time::Duration;

use common::*;
use memdesc::gfp::GFP_KERNEL;
use memdesc::zsmalloc::{ZsError, ZsHandle, ZsPool};
use memdesc::*;
use memdesc_host::Host;

/// The hook is one for all threads.
static ONE: Mutex<()> = Mutex::new(());

static STAGE: AtomicPtr<Stage> = AtomicPtr::new(std::ptr::null_mut());

struct Stage {
    mm: *const Mm<Host>,
    pool: *const ZsPool<'static>,
    handle: ZsHandle,
}

/// Frees the last object at the point where its handle was found to lead to a page of handles, whose page then goes.
fn free_it(label: &'static str) {
    if label != "zsmalloc: handle found" {
        return;
    }
    let stage = STAGE.swap(std::ptr::null_mut(), Ordering::AcqRel);
    // SAFETY: null, or set by the test, which outlives the call it makes.
    let Some(stage) = (unsafe { stage.as_ref() }) else {
        return;
    };
    // SAFETY: as above.
    let (mm, pool) = unsafe { (&*stage.mm, &*stage.pool) };
    mm.zs_free(pool, stage.handle);
    assert_eq!(mm.zs_pool_stats(pool).handle_pages, 0);
    // All that is due goes: the page must not be.
    mm.rcu_work();
    mm.drain_all();
}

#[test]
fn a_page_of_handles_stays_while_it_is_looked_at() {
    let _one = ONE.lock().unwrap_or_else(|e| e.into_inner());
    let machine = Machine::flat(4096).guarded();
    let mm = machine.boot_on(machine.host().build().unwrap());
    let pool = mm.zs_create_pool("stale").unwrap();
    let handle = mm.zs_malloc(&pool, 100, GFP_KERNEL).unwrap();
    let mut stage = Stage {
        mm: &raw const mm,
        pool: (&raw const pool).cast(),
        handle,
    };
    STAGE.store(&raw mut stage, Ordering::Release);
    let has_points = memdesc::inject::set_hook(Some(free_it));
    let mut copy = [0; 1];
    let found = mm.zs_obj_read_begin(&pool, handle, &mut copy).map(|_| ());
    memdesc::inject::set_hook(None);
    if has_points {
        assert_eq!(found, Err(ZsError::NoSuchObject));
    } else {
        mm.zs_free(&pool, handle);
    }
    mm.zs_destroy_pool(pool).unwrap();
    teardown(&machine, &mm);
}

static MOVES: AtomicU32 = AtomicU32::new(0);
static FOUND: AtomicU32 = AtomicU32::new(0);
static WAITED: AtomicBool = AtomicBool::new(false);

/// Waits with an object half moved until somebody else found it moving.
fn hold_it(label: &'static str) {
    match label {
        "zsmalloc: moving" | "zsmalloc: page moving" => {
            let before = FOUND.load(Ordering::Relaxed);
            MOVES.fetch_add(1, Ordering::Relaxed);
            let mut patience = 200;
            while FOUND.load(Ordering::Relaxed) == before && patience > 0 {
                std::thread::sleep(Duration::from_micros(50));
                patience -= 1;
            }
            WAITED.fetch_or(patience > 0, Ordering::Relaxed);
        }
        "zsmalloc: found moving" => {
            FOUND.fetch_add(1, Ordering::Relaxed);
        }
        _ => {}
    }
}

#[test]
fn who_wants_a_moving_object_waits_for_it() {
    let _one = ONE.lock().unwrap_or_else(|e| e.into_inner());
    for rt in [false, true] {
        let mut machine = Machine::flat(4096).guarded().cpus(2);
        machine.config.preempt_rt = rt;
        let mm = machine.boot_on(machine.host().build().unwrap());
        let pool = mm.zs_create_pool("moving").unwrap();
        let handles: Vec<ZsHandle> = (0..240u64)
            .map(|i| {
                let handle = mm.zs_malloc(&pool, 1300, GFP_KERNEL).unwrap();
                mm.zs_obj_write(&pool, handle, &[i as u8; 1300]).unwrap();
                handle
            })
            .collect();
        for gone in handles.iter().skip(1).step_by(2) {
            mm.zs_free(&pool, *gone);
        }
        for counter in [&MOVES, &FOUND] {
            counter.store(0, Ordering::Relaxed);
        }
        WAITED.store(false, Ordering::Relaxed);
        let done = AtomicBool::new(false);
        let has_points = memdesc::inject::set_hook(Some(hold_it));
        std::thread::scope(|scope| {
            let (mm, pool, handles, done) = (&mm, &pool, &handles, &done);
            scope.spawn(move || {
                let _cpu = mm.platform().claim(1);
                while !done.load(Ordering::Relaxed) {
                    for (i, handle) in handles.iter().enumerate().step_by(2) {
                        let mut copy = [0; 1300];
                        let view = mm.zs_obj_read_begin(pool, *handle, &mut copy).unwrap();
                        assert!(view.iter().all(|&byte| byte == i as u8));
                    }
                }
            });
            let _cpu = mm.platform().claim(0);
            assert!(mm.zs_compact(pool) > 0);
            for pfn in 512..1024 {
                if mm.alloc_contig_range(Pfn(pfn), 1).is_ok() {
                    free(mm, Pfn(pfn));
                }
            }
            done.store(true, Ordering::Relaxed);
        });
        memdesc::inject::set_hook(None);
        if has_points {
            assert!(MOVES.load(Ordering::Relaxed) > 0 && WAITED.load(Ordering::Relaxed));
        }
        for handle in handles.iter().step_by(2) {
            mm.zs_free(&pool, *handle);
        }
        mm.zs_destroy_pool(pool).unwrap();
        teardown(&machine, &mm);
    }
}
