//! vmalloc with a fault at every point that it passes: it fails as a value, and leaves nothing behind.
#![cfg(not(miri))]

#[path = "common/areas.rs"]
mod areas;
mod common;

use areas::*;
use common::*;
use memdesc::gfp::GFP_KERNEL;
use memdesc::*;
use memdesc_host::Host;

/// What must not change when an allocation fails.
#[derive(Debug, PartialEq)]
struct Snapshot {
    by_type: Vec<u64>,
    rest: u64,
    areas: usize,
    objects: Vec<(String, u64)>,
}

fn snapshot(mm: &Mm<Host>) -> Snapshot {
    let ledger = ledger(mm);
    let mut objects = Vec::new();
    mm.slabinfo(|c| {
        if !c.metadata {
            objects.push((c.name.to_owned(), c.active_objs));
        }
    });
    objects.sort();
    Snapshot {
        by_type: ledger.by_type.to_vec(),
        rest: ledger.free + ledger.untouched + ledger.pcp + ledger.metadata,
        areas: mm.vmalloc_info().areas,
        objects,
    }
}

/// Runs `op` with a fault at each point that it passes, until it passes none any more. It undoes what it did if it succeeds.
fn every_point(name: &str, op: impl Fn(&Mm<Host>) -> Result<(), AllocError>) {
    let (mut failed, mut survived) = (0, 0);
    for n in 0.. {
        assert!(n < 5000, "{name}: no end");
        let machine = Machine::flat(8192);
        let mm = machine.boot();
        // In use: caches are there, lists are not empty.
        let other = mm.vmalloc(50_000, GFP_KERNEL).unwrap();
        let gone = mm.vmalloc(60_000, GFP_KERNEL).unwrap();
        vfree(&mm, gone);
        mm.shrink();
        let before = snapshot(&mm);
        mm.platform().faults().fail_nth(n);
        let result = op(&mm);
        let (_, fired) = mm.platform().faults().off();
        assert!(mm.check_vm_areas().is_ok());
        if result.is_err() {
            assert!(fired > 0, "{name} failed without a fault: {result:?}");
            let now = snapshot(&mm);
            assert_eq!(now.areas, before.areas, "{name}, fault {n}: areas are left");
            assert_eq!(now.objects, before.objects, "{name}, fault {n}");
            failed += 1;
        } else {
            survived += fired;
        }
        mm.shrink();
        assert_eq!(snapshot(&mm), before, "{name}, fault {n}");
        check_area(&mm, other, 50_000);
        vfree(&mm, other);
        end(&machine, &mm);
        if fired == 0 {
            assert!(result.is_ok(), "{name}: {result:?}");
            break;
        }
    }
    println!("{name}: failed at {failed} points, got round {survived}");
    let has_another_way = name == "vmalloc_huge";
    assert!(
        failed > 0 || has_another_way && survived > 0,
        "{name}: no fault made it fail"
    );
}

#[test]
fn faults() {
    for size in [1, 16_384, 16_385, 1 << 20] {
        every_point(&format!("vmalloc {size}"), |mm| {
            mm.vmalloc(size, GFP_KERNEL).map(|ptr| vfree(mm, ptr))
        });
    }
    every_point("vmalloc_huge", |mm| {
        mm.vmalloc_huge(4 << 20, GFP_KERNEL)
            .map(|ptr| vfree(mm, ptr))
    });
    every_point("kernel stack", |mm| {
        mm.alloc_kernel_stack(4, 9)
            .map(|stack| free_stack(mm, stack))
    });
    every_point("vmap", |mm| {
        let pages = [mm.alloc_pages(GFP_KERNEL, 0)?; 1];
        let many = [pages[0]; 9];
        // SAFETY: ours, and unmapped before they are freed.
        let result = unsafe { mm.vmap(&many).map(|ptr| mm.vunmap(ptr)) };
        free(mm, pages[0]);
        result
    });
    every_point("kvmalloc", |mm| {
        mm.kvmalloc(5 << 20, GFP_KERNEL).map(|ptr| kvfree(mm, ptr))
    });
}

/// The list of an area's blocks is too long for kmalloc in one go, or cannot be had so: then it is an area itself.
#[test]
fn lists_that_are_areas() {
    let machine = Machine::flat(16384);
    let mm = machine.boot();
    let mut seen = 0;
    for n in 0..400 {
        mm.platform().faults().fail_nth(n);
        let result = mm.vmalloc(12 << 20, GFP_KERNEL);
        mm.platform().faults().off();
        let areas = mm.vmalloc_info().areas;
        if let Ok(ptr) = result {
            let users = ledger(&mm).by_type[PageType::Vmalloc as usize];
            assert_eq!(users, (12 << 20) / PAGE_SIZE as u64, "a list is no user's");
            seen += usize::from(areas == 2);
            vfree(&mm, ptr);
        }
        mm.shrink();
        assert_eq!(mm.vmalloc_info().areas, 0);
    }
    assert!(seen > 0);
    end(&machine, &mm);
}
