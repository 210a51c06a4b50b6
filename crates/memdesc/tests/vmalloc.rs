//! vmalloc: memory that is read and written through its addresses, guards that kill, addresses that come back lazily.
//!
//! Nothing here can run under Miri, which has no page tables to change.
#![cfg(not(miri))]

#[path = "common/areas.rs"]
mod areas;
mod common;

use std::ptr::NonNull;

use areas::*;
use common::*;
use memdesc::gfp::{GFP_ATOMIC, GFP_KERNEL, GFP_NOWAIT};
use memdesc::rcu::RcuHead;
use memdesc::*;
use memdesc_host::interrupt;

#[test]
fn errors() {
    let machine = Machine::flat(1024);
    let mm = machine.boot_on(machine.host().vmalloc(2 << 20).build().unwrap());
    assert_eq!(mm.vmalloc(0, GFP_KERNEL), Err(AllocError::BadSize));
    assert_eq!(mm.vmalloc(5 << 20, GFP_KERNEL), Err(AllocError::BadSize));
    assert_eq!(mm.vmalloc(usize::MAX, GFP_KERNEL), Err(AllocError::BadSize));
    assert_eq!(
        mm.vmalloc(2 << 20, GFP_KERNEL),
        Err(AllocError::NoAddressSpace)
    );
    assert_eq!(mm.vmalloc(4096, GFP_ATOMIC), Err(AllocError::Forbidden));
    assert_eq!(mm.vmalloc(4096, GFP_NOWAIT), Err(AllocError::Forbidden));
    // SAFETY: refused.
    unsafe {
        assert_eq!(mm.vmap(&[]), Err(AllocError::BadSize));
        assert_eq!(mm.vmap(&[Pfn(5000)]), Err(AllocError::BadSize));
    }
    assert!(mm.alloc_kernel_stack(0, 1).is_err());
    // More than memory has.
    let most: Vec<_> = std::iter::from_fn(|| mm.vmalloc(100 << 10, GFP_KERNEL).ok()).collect();
    assert!(most.len() > 10);
    most.into_iter().for_each(|ptr| vfree(&mm, ptr));
    end(&machine, &mm);

    let none = machine.boot_on(machine.host().vmalloc(0).build().unwrap());
    assert_eq!(
        none.vmalloc(4096, GFP_KERNEL),
        Err(AllocError::NoAddressSpace)
    );
    assert_eq!(
        none.vmalloc_info(),
        VmallocInfo {
            lazy_max: 32 << 20,
            ..Default::default()
        }
    );
    // Without such a range it is kmalloc in earnest.
    let ptr = none.kvmalloc(1 << 20, GFP_KERNEL).unwrap();
    kvfree(&none, ptr);
    end(&machine, &none);
}

#[test]
fn guards_kill() {
    let machine = Machine::flat(1024);
    let mm = machine.boot();
    let a = mm.vmalloc(3 * PAGE_SIZE, GFP_KERNEL).unwrap();
    let b = mm.vmalloc(PAGE_SIZE, GFP_KERNEL).unwrap();
    let last = offset(a.as_ptr(), 3 * PAGE_SIZE as isize - 1);
    assert_eq!((touch(a.as_ptr(), true), touch(last, true)), (0, 0));
    assert_eq!(touch(offset(last, 1), false), libc::SIGSEGV);
    assert_eq!(touch(offset(last, PAGE_SIZE as isize), true), libc::SIGSEGV);
    // The next area comes right behind the guard.
    assert_eq!(b.as_ptr(), offset(last, PAGE_SIZE as isize + 1));
    assert_eq!(touch(b.as_ptr(), true), 0);
    let AddressInfo::GuardAfter(area) = mm.explain_address(offset(last, 100).addr()) else {
        panic!("{:?}", mm.explain_address(offset(last, 100).addr()))
    };
    assert_eq!((area.start, area.pages), (a.addr().get(), 3));
    // A use after free dies as well, though the address is still kept.
    vfree(&mm, a);
    assert_eq!(touch(a.as_ptr(), false), libc::SIGSEGV);
    let said = mm.explain_address(a.addr().get());
    assert!(
        matches!(said, AddressInfo::Stale(area) if area.freed),
        "{said}"
    );
    assert!(mm.find_vm_area(a.addr().get()).is_none() && mm.vmalloc_to_pfn(a.as_ptr()).is_none());
    mm.tick();
    assert!(matches!(
        mm.explain_address(a.addr().get()),
        AddressInfo::Hole
    ));
    assert!(matches!(
        mm.explain_address(mm.page_address(Pfn(9)).addr()),
        AddressInfo::NotVmalloc
    ));
    vfree(&mm, b);
    end(&machine, &mm);
}

#[test]
fn kernel_stacks() {
    let machine = Machine::flat(2048).cpus(2);
    let mm = machine.boot();
    let cpu = mm.platform().claim(0).unwrap();
    let stack = mm.alloc_kernel_stack(4, 77).unwrap();
    assert_eq!(stack.size(), 4 * PAGE_SIZE);
    assert!(bytes(stack.bottom(), stack.size()).iter().all(|&b| b == 0));
    let (bottom, top) = (stack.bottom().as_ptr(), stack.top());
    assert_eq!((touch(bottom, true), touch(offset(top, -1), true)), (0, 0));
    assert_eq!(touch(offset(bottom, -1), true), libc::SIGSEGV);
    assert_eq!(
        touch(offset(bottom, -(PAGE_SIZE as isize)), true),
        libc::SIGSEGV
    );
    assert_eq!(touch(top, true), libc::SIGSEGV);
    let below = mm.explain_address(offset(bottom, -8).addr());
    let AddressInfo::GuardBefore(area) = below else {
        panic!("{below}")
    };
    assert_eq!(
        (area.owner, area.kind, area.start),
        (Some(77), VmAreaKind::Stack, bottom.addr())
    );
    assert!(!area.kind.may_be_mapped() && VmAreaKind::Vmalloc.may_be_mapped());
    assert!(
        below.to_string().contains("guard page before")
            && below.to_string().contains("kernel stack of 77")
    );
    // From a handler, too: an overflow is found out in one.
    {
        let _nmi = interrupt::nmi();
        assert!(
            matches!(mm.explain_address(top.addr()), AddressInfo::GuardAfter(area) if area.owner == Some(77))
        );
    }
    let (_, _, memory) = mm.lookup(mm.vmalloc_to_pfn(bottom).unwrap());
    assert!(matches!(memory, Memory::Vmalloc(_)), "{memory:?}");

    // Two are kept for the next threads of this CPU, clean, and of the right size.
    fill(stack.bottom(), stack.size(), 0xcc);
    let more: Vec<_> = (0..3)
        .map(|i| mm.alloc_kernel_stack(4, i).unwrap())
        .collect();
    free_stack(&mm, stack);
    more.into_iter().for_each(|stack| free_stack(&mm, stack));
    assert_eq!(ledger(&mm).by_type[PageType::Vmalloc as usize], 8);
    assert_eq!(mm.find_vm_area(bottom.addr()).unwrap().owner, None);
    cpu.switch();
    let other_size = mm.alloc_kernel_stack(2, 5).unwrap();
    assert_ne!(other_size.bottom().as_ptr(), bottom);
    let again = mm.alloc_kernel_stack(4, 6).unwrap();
    assert_eq!(again.bottom().as_ptr(), bottom);
    assert!(bytes(again.bottom(), again.size()).iter().all(|&b| b == 0));
    assert_eq!(mm.find_vm_area(bottom.addr()).unwrap().owner, Some(6));
    // Another CPU has others.
    {
        let other = mm.platform().claim(1).unwrap();
        let stack = mm.alloc_kernel_stack(4, 8).unwrap();
        assert_ne!(stack.bottom().as_ptr(), bottom);
        free_stack(&mm, stack);
        drop(other);
    }
    // From an interrupt what is not kept waits.
    let third: Vec<_> = (0..3)
        .map(|i| mm.alloc_kernel_stack(4, i).unwrap())
        .collect();
    {
        let _irq = interrupt::hardirq();
        free_stack(&mm, again);
        free_stack(&mm, other_size);
        third.into_iter().for_each(|stack| free_stack(&mm, stack));
    }
    assert!(mm.pages_of(PageType::Vmalloc) > 12);
    mm.tick();
    // Two of this CPU, one of the other; what is kept first is kept.
    assert_eq!(mm.pages_of(PageType::Vmalloc), 4 + 2 + 4);
    drop(cpu);
    end(&machine, &mm);
}

#[test]
fn purges_at_need() {
    let machine = Machine::flat(4096);
    // Room for 16 areas of a page, with their guards.
    let mm = machine.boot_on(machine.host().vmalloc(32 * PAGE_SIZE).build().unwrap());
    for round in 0..100 {
        let all: Vec<_> = (0..16)
            .map(|_| mm.vmalloc(1, GFP_KERNEL).unwrap())
            .collect();
        assert_eq!(
            mm.vmalloc(1, GFP_KERNEL),
            Err(AllocError::NoAddressSpace),
            "{round}"
        );
        all.into_iter().for_each(|ptr| vfree(&mm, ptr));
    }
    // Stacks that are kept are in nobody's way, nor is what waits since an interrupt.
    for i in 0..2 {
        let stack = mm.alloc_kernel_stack(13, i).unwrap();
        free_stack(&mm, stack);
    }
    let last = mm.vmalloc(PAGE_SIZE, GFP_KERNEL).unwrap();
    {
        let _irq = interrupt::hardirq();
        vfree(&mm, last);
    }
    let all = mm.vmalloc(31 * PAGE_SIZE, GFP_KERNEL).unwrap();
    vfree(&mm, all);
    // Enough piles up.
    let mm = machine.boot();
    let max = mm.vmalloc_info().lazy_max;
    for _ in 0..max / (4 << 20) + 1 {
        let ptr = mm.vmalloc(4 << 20, GFP_KERNEL).unwrap();
        vfree(&mm, ptr);
        assert!(mm.vmalloc_info().lazy <= max);
    }
    assert_eq!(mm.vmalloc_info().purges, 1);
    end(&machine, &mm);
}

#[test]
fn freed_from_anywhere() {
    let machine = Machine::flat(4096);
    let mm = machine.boot();
    let mut all: Vec<_> = (0..6)
        .map(|i| mm.vmalloc(i * 5000 + 1, GFP_KERNEL).unwrap())
        .collect();
    let keep = all.pop().unwrap();
    let pages = mm.pages_of(PageType::Vmalloc);
    for (i, ptr) in all.into_iter().enumerate() {
        let guards = (i % 3 == 0).then(interrupt::atomic);
        let irq = (i % 3 == 1).then(interrupt::hardirq);
        let nmi = (i % 3 == 2).then(interrupt::nmi);
        vfree(&mm, ptr);
        // Nothing happens there and then; not even in a tick there.
        if nmi.is_some() {
            mm.vmalloc_to_pfn(std::ptr::null());
        }
        drop((guards, irq, nmi));
        assert_eq!(mm.pages_of(PageType::Vmalloc), pages);
    }
    // The next free in a thread takes them along.
    vfree(&mm, keep);
    assert_eq!(mm.pages_of(PageType::Vmalloc), 0);
    let ptr = mm.vmalloc(1, GFP_KERNEL).unwrap();
    {
        let _atomic = interrupt::atomic();
        vfree(&mm, ptr);
    }
    assert_eq!(mm.pages_of(PageType::Vmalloc), 1);
    mm.tick();
    assert_eq!(
        (mm.pages_of(PageType::Vmalloc), mm.vmalloc_info().areas),
        (0, 0)
    );
    end(&machine, &mm);
}

#[test]
fn wrong_frees_are_reported() {
    let machine = Machine::flat(2048);
    let reports = Reports::default();
    let mm = machine.boot_on(reports.on(machine.host()).build().unwrap());
    let ptr = mm.vmalloc(3 * PAGE_SIZE, GFP_KERNEL).unwrap();
    let pfn = mm.vmalloc_to_pfn(ptr.as_ptr()).unwrap();
    free(&mm, pfn);
    let seen = reports.one();
    assert_eq!(
        (seen.what, seen.kind, seen.pfn),
        (Corruption::WrongType, PageType::Vmalloc, pfn)
    );
    vfree(
        &mm,
        NonNull::new(offset(ptr.as_ptr(), PAGE_SIZE as isize)).unwrap(),
    );
    assert_eq!(reports.one().what, Corruption::NotAHead);
    kfree(&mm, ptr);
    let seen = reports.one();
    assert_eq!((seen.what, seen.pfn), (Corruption::WrongType, pfn));
    // SAFETY: refused, and reported.
    unsafe { mm.vunmap(ptr) };
    assert_eq!(reports.one().what, Corruption::WrongType);
    let small = mm.kmalloc(64, GFP_KERNEL).unwrap();
    vfree(&mm, small);
    assert_eq!(reports.one().what, Corruption::WrongType);
    {
        let _irq = interrupt::hardirq();
        vfree(&mm, small);
    }
    assert_eq!(reports.one().what, Corruption::WrongType);
    kfree(&mm, small);
    let stack = mm.alloc_kernel_stack(1, 1).unwrap();
    vfree(&mm, stack.bottom());
    assert_eq!(reports.one().what, Corruption::WrongType);
    free_stack(&mm, stack);
    check_area(&mm, ptr, 3 * PAGE_SIZE);
    vfree(&mm, ptr);
    vfree(&mm, ptr);
    let seen = reports.one();
    assert_eq!(
        (seen.what, seen.address),
        (Corruption::DoubleFree, ptr.addr().get())
    );
    mm.tick();
    vfree(&mm, ptr);
    assert_eq!(reports.one().what, Corruption::NotRam);
    end(&machine, &mm);
}

/// Deferred frees take memory of either kind.
#[test]
fn kvfree_rcu() {
    let machine = Machine::flat(8192).cpus(2);
    let mm = machine.boot();
    let _cpu = mm.platform().claim(0).unwrap();
    for round in 0..40 {
        let ptr = mm.vmalloc(20_000, GFP_KERNEL).unwrap();
        let head = ptr.cast::<RcuHead>();
        // SAFETY: the memory is ours and large enough for the head.
        unsafe { head.write(RcuHead::new()) };
        let at = offset(ptr.as_ptr(), 9000);
        // SAFETY: ours.
        unsafe { at.write(round) };
        let reader = mm.rcu_read_lock();
        // SAFETY: ours to give up; only the reader above goes on using it.
        unsafe {
            if round % 2 == 0 {
                mm.kvfree_rcu(ptr, head);
            } else {
                let _irq = interrupt::hardirq();
                mm.kvfree_rcu(ptr, head);
            }
        }
        mm.rcu_work();
        // SAFETY: the read section is open, so the memory is still there.
        assert_eq!(unsafe { at.read() }, round);
        drop(reader);
        let other = mm.vmalloc(5000, GFP_KERNEL).unwrap();
        // SAFETY: ours to give up.
        unsafe { mm.kvfree_rcu_mightsleep(other) };
    }
    mm.kvfree_rcu_barrier();
    assert_eq!(mm.pages_of(PageType::Vmalloc), 0);
    drop(_cpu);
    end(&machine, &mm);
}

#[test]
fn two_threads() {
    let machine = Machine::flat(16384).cpus(2);
    // Little room, so that purges come at need, from both.
    let mm = machine.boot_on(machine.host().vmalloc(600 * PAGE_SIZE).build().unwrap());
    std::thread::scope(|scope| {
        for thread in 0..2u64 {
            let mm = &mm;
            scope.spawn(move || {
                let _cpu = mm.platform().claim(thread as usize).unwrap();
                let mut rng = Rng(thread);
                let mut live: Vec<(NonNull<u8>, usize, u8)> = Vec::new();
                let mut stacks = Vec::new();
                for round in 0..4000 {
                    match rng.below(8) {
                        0..4 => {
                            let size = 1 + rng.below(12 * PAGE_SIZE);
                            if live.len() < 30
                                && let Ok(ptr) = mm.vmalloc(size, GFP_KERNEL)
                            {
                                fill(ptr, size, round as u8);
                                live.push((ptr, size, round as u8));
                            }
                        }
                        4 if stacks.len() < 4 => {
                            if let Ok(stack) = mm.alloc_kernel_stack(1 + rng.below(3), round) {
                                fill(stack.bottom(), stack.size(), 1);
                                stacks.push(stack);
                            }
                        }
                        5 if !stacks.is_empty() => {
                            let index = rng.below(stacks.len());
                            free_stack(mm, stacks.swap_remove(index));
                        }
                        6 if rng.one_in(20) => mm.tick(),
                        _ if !live.is_empty() => {
                            let index = rng.below(live.len());
                            let (ptr, size, byte) = live.swap_remove(index);
                            assert!(bytes(ptr, size).iter().all(|&b| b == byte));
                            let _irq = rng.one_in(5).then(interrupt::hardirq);
                            vfree(mm, ptr);
                        }
                        _ => {}
                    }
                    if rng.one_in(100) {
                        mm.check_vm_areas().unwrap();
                        mm.for_each_vm_area(|area| assert!(area.pages > 0));
                    }
                }
                for (ptr, size, byte) in live {
                    assert!(bytes(ptr, size).iter().all(|&b| b == byte));
                    vfree(mm, ptr);
                }
                stacks.into_iter().for_each(|stack| free_stack(mm, stack));
            });
        }
    });
    end(&machine, &mm);
}
