//! An interrupt at every labelled point of vmalloc's work, as `interrupts.rs` does it for pages and objects: the handler frees areas and stacks
//! that it was given, and asks what addresses are.
#![cfg(not(miri))]

mod common;

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::ptr::NonNull;

use common::{Machine, bytes, fill, teardown};
use memdesc::gfp::GFP_KERNEL;
use memdesc::rcu::RcuHead;
use memdesc::*;
use memdesc_host::{Host, interrupt};

/// What handlers may free.
#[derive(Default)]
struct Gifts {
    areas: Vec<(NonNull<u8>, usize, u8)>,
    stacks: Vec<KernelStack>,
}

struct Run {
    mm: *const Mm<Host>,
    passed: u64,
    strike: u64,
    struck: bool,
    is_nmi: bool,
    gifts: Gifts,
    labels: BTreeMap<&'static str, u64>,
}

thread_local! {
    static RUN: RefCell<Option<Run>> = const { RefCell::new(None) };
    static BUSY: Cell<bool> = const { Cell::new(false) };
}

fn point(label: &'static str) {
    if BUSY.replace(true) {
        return;
    }
    let strike = RUN.with_borrow_mut(|run| {
        let run = run.as_mut()?;
        run.passed += 1;
        if run.struck || run.passed < run.strike {
            return None;
        }
        run.struck = true;
        *run.labels.entry(label).or_default() += 1;
        Some((run.mm, run.is_nmi, std::mem::take(&mut run.gifts)))
    });
    if let Some((mm, is_nmi, gifts)) = strike {
        // SAFETY: the machine outlives the run.
        handler(unsafe { &*mm }, is_nmi, gifts);
    }
    BUSY.set(false);
}

fn handler(mm: &Mm<Host>, is_nmi: bool, gifts: Gifts) {
    let _guard = if is_nmi {
        interrupt::nmi()
    } else {
        interrupt::hardirq()
    };
    for (i, (ptr, size, byte)) in gifts.areas.into_iter().enumerate() {
        assert!(bytes(ptr, size).iter().all(|&b| b == byte));
        match mm.explain_address(ptr.addr().get()) {
            AddressInfo::Area(area) => assert_eq!(area.start, ptr.addr().get()),
            AddressInfo::Contended => {}
            other => panic!("{other}"),
        }
        // SAFETY: the handler's, and large enough for the head.
        unsafe {
            if i == 0 {
                let head = ptr.cast::<RcuHead>();
                head.write(RcuHead::new());
                mm.kvfree_rcu(ptr, head);
            } else {
                mm.vfree(ptr);
            }
        }
    }
    for stack in gifts.stacks {
        let guard = mm.explain_address(stack.bottom().as_ptr().wrapping_sub(1).addr());
        assert!(matches!(
            guard,
            AddressInfo::GuardBefore(_) | AddressInfo::Contended
        ));
        // SAFETY: the handler's, and nobody runs on it.
        unsafe { mm.free_kernel_stack(stack) };
    }
}

fn gifts(mm: &Mm<Host>) -> Gifts {
    let mut gifts = Gifts::default();
    for (i, size) in [20_000, 1, 30_000].into_iter().enumerate() {
        let ptr = mm.vmalloc(size, GFP_KERNEL).unwrap();
        fill(ptr, size, i as u8 + 1);
        gifts.areas.push((ptr, size, i as u8 + 1));
    }
    let stacks = (0..3).map(|i| mm.alloc_kernel_stack(2, i).unwrap());
    gifts.stacks.extend(stacks);
    gifts
}

/// All that vmalloc does, a little of each.
fn work(mm: &Mm<Host>) {
    let a = mm.vmalloc(50_000, GFP_KERNEL).unwrap();
    fill(a, 50_000, 0xa5);
    let stack = mm.alloc_kernel_stack(2, 7).unwrap();
    let b = mm.vzalloc(5000, GFP_KERNEL).unwrap();
    assert!(bytes(a, 50_000).iter().all(|&b| b == 0xa5));
    // SAFETY: ours, used no more.
    unsafe {
        mm.free_kernel_stack(stack);
        mm.vfree(a);
    }
    let stack = mm.alloc_kernel_stack(1, 8).unwrap();
    assert!(bytes(b, 5000).iter().all(|&b| b == 0));
    // SAFETY: as above.
    unsafe {
        mm.kvfree_rcu_mightsleep(b);
        mm.free_kernel_stack(stack);
    }
    mm.tick();
    let c = mm.vmalloc(PAGE_SIZE, GFP_KERNEL).unwrap();
    // SAFETY: as above.
    unsafe { mm.vfree(c) };
    mm.for_each_vm_area(|_| {});
    mm.shrink();
}

#[test]
fn an_interrupt_at_every_point() {
    if !memdesc::inject::set_hook(Some(point)) {
        return;
    }
    let mut labels = BTreeMap::new();
    for is_nmi in [false, true] {
        for strike in 1.. {
            let machine = Machine::flat(2048);
            let mm = machine.boot();
            let _cpu = mm.platform().claim(0).unwrap();
            let gifts = gifts(&mm);
            let run = Run {
                mm: &raw const mm,
                passed: 0,
                strike,
                struck: false,
                is_nmi,
                gifts,
                labels: BTreeMap::new(),
            };
            RUN.set(Some(run));
            work(&mm);
            let run = RUN.take().unwrap();
            for (label, n) in run.labels {
                *labels.entry(label).or_insert(0) += n;
            }
            if !run.struck {
                handler(&mm, is_nmi, run.gifts);
            }
            mm.check_vm_areas().unwrap();
            // The barrier in a shrink may leave a blank page of pointers, which the next one drops.
            mm.shrink();
            teardown(&machine, &mm);
            assert_eq!(mm.vmalloc_info().areas, 0, "struck at {strike}");
            if !run.struck {
                break;
            }
        }
    }
    println!("{labels:#?}");
    for label in [
        "vmalloc: claimed",
        "vmalloc: unmapped",
        "vmalloc: empty",
        "vmalloc: about to be purged",
        "vmalloc: about to be mapped",
        "stack cache: taken",
    ] {
        assert!(labels.contains_key(label), "{label} was never struck");
    }
}
