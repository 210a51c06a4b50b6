//! Reserves between two steps: what is on its way back is charged until it can be taken again, so who may charge finds it.
#![allow(missing_docs)]

mod common;
#[path = "common/reserves.rs"]
mod shared;

use std::cell::Cell;

use common::*;
use memdesc::gfp::*;
use memdesc::*;
use memdesc_host::Host;
use shared::*;

thread_local! {
    static AT: Cell<&'static str> = const { Cell::new("") };
    static SAW: Cell<u32> = const { Cell::new(0) };
    static LOOKS: Cell<Option<*const (dyn Fn() + 'static)>> = const { Cell::new(None) };
}

fn hook(label: &'static str) {
    if AT.get() != label {
        return;
    }
    AT.set("");
    SAW.set(SAW.get() + 1);
    if let Some(looks) = LOOKS.get() {
        // SAFETY: set by `at`, which is still running.
        unsafe { (*looks)() };
    }
}

/// Does `work`, and at its first point of this label `looks`.
fn at(label: &'static str, looks: &dyn Fn(), work: impl FnOnce()) {
    assert!(inject::set_hook(Some(hook)), "a build with points");
    // SAFETY: not used after `looks` ends: taken back below.
    let lasting: *const (dyn Fn() + 'static) = unsafe { std::mem::transmute(looks) };
    LOOKS.set(Some(lasting));
    AT.set(label);
    let before = SAW.get();
    work();
    AT.set("");
    LOOKS.set(None);
    assert_eq!(SAW.get(), before + 1, "{label} was not met");
}

#[test]
fn the_charge_goes_after_what_it_is_for() {
    // What looks here charges, under a lock that may not be held then: with one CPU no harm is done, and the checker of locks would say so.
    if !cfg!(any(debug_assertions, feature = "checked")) || cfg!(feature = "lockdep") {
        return;
    }
    let machine = Machine::flat(1024).unsampled();
    let mm: Mm<Host> = machine.boot();
    let cache = mm
        .kmem_cache_create("objects", 1000, 0, CacheFlags::EMPTY, None)
        .unwrap();
    let objects = Demand::Objects {
        cache: &cache,
        count: 1,
    };
    let objects = mm.reserve("objects", objects).unwrap();
    let frags = mm.reserve("frags", Demand::Pages { order: 1, count: 1 });
    let frags = frags.unwrap();
    objects.connect(None).unwrap();
    frags.connect(None).unwrap();
    let adversary = Adversary::take_all(&mm);
    for _ in 0..3 {
        let object = objects.kmem_cache_alloc(&cache, GFP_ATOMIC).unwrap();
        let charged = || assert_eq!(objects.charge(1), Err(AllocError::ReserveLimit));
        at("slab lists: about to give", &charged, || {
            cache_free(&mm, &cache, object);
        });
        let pfn = frags.alloc_pages(GFP_ATOMIC, 1).unwrap();
        let refused = || assert_eq!(frags.charge(1), Err(AllocError::ReserveLimit));
        at("reserve: about to push", &refused, || free(&mm, pfn));
        assert_eq!((view(&objects).usage, view(&frags).usage), (0, 0));
    }
    adversary.give_all(&mm);
    [objects, frags].into_iter().for_each(down);
    mm.kmem_cache_destroy(cache).unwrap();
    end(&machine, &mm);
}
