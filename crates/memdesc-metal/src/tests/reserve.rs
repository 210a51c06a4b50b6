//! Memory that was promised, when all other memory is gone.

use alloc::format;
use alloc::string::ToString;
use alloc::vec::Vec;
use core::ptr::{NonNull, null_mut};
use core::sync::atomic::{AtomicPtr, AtomicU64, Ordering};

use memdesc::gfp::{__GFP_NORETRY, __GFP_NOWARN, GFP_ATOMIC, GFP_KERNEL};
use memdesc::{Demand, PAGEBLOCK_ORDER, Platform};

use super::memory::{give_all_pages, take_all_pages};
use super::{Machine, Outcome, Passed, ledger, on_all};
use crate::check;
use crate::platform::Metal;

/// Objects promised, and how large they are.
const COUNT: usize = 64;
const SIZE: usize = 1500;

/// All CPUs together get as many objects as were promised, with interrupts off, after everything else was taken.
pub(super) fn a_reserve_is_there_when_memory_is_gone(machine: &Machine) -> Outcome {
    let mm = machine.mm;
    let demand = Demand::KmallocObjects {
        size: SIZE,
        count: COUNT,
    };
    let reserve = mm.reserve("metal", demand).map_err(|why| why.to_string())?;
    reserve.connect(None).map_err(|why| why.to_string())?;

    let objects: Vec<AtomicPtr<u8>> = (0..COUNT).map(|_| AtomicPtr::new(null_mut())).collect();
    let (next, reserved, failed) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
    // Room for all of them beforehand.
    let mut plain = Vec::with_capacity(4096);
    let mut large = Vec::with_capacity((ledger(machine).given >> PAGEBLOCK_ORDER) as usize + 1);
    while let Ok(pfn) = mm.alloc_pages(GFP_KERNEL | __GFP_NORETRY | __GFP_NOWARN, PAGEBLOCK_ORDER) {
        large.push(pfn);
    }
    let small = take_all_pages(mm, GFP_KERNEL).0;
    let last = take_all_pages(mm, GFP_ATOMIC).0;
    // What slabs have left is not promised to anybody.
    while plain.len() < plain.capacity()
        && let Ok(object) = mm.kmalloc(SIZE, GFP_ATOMIC | __GFP_NOWARN)
    {
        plain.push(object);
    }
    let result = on_all(|_| {
        // Locks that sleep are not for who is pinned.
        let pinned = (!machine.boot.has("rt")).then(|| Metal.pin());
        loop {
            let at = next.fetch_add(1, Ordering::Relaxed) as usize;
            let Some(place) = objects.get(at) else {
                break;
            };
            match reserve.kmalloc(SIZE, GFP_ATOMIC | __GFP_NOWARN) {
                Ok(object) => {
                    // SAFETY: ours, and that long.
                    unsafe { object.write_bytes(at as u8, SIZE) };
                    reserved.fetch_add(
                        u64::from(mm.is_from_reserve(object.as_ptr())),
                        Ordering::Relaxed,
                    );
                    place.store(object.as_ptr(), Ordering::Release);
                }
                // There is no memory for saying so now.
                Err(_) => {
                    failed.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
        if let Some(pinned) = pinned {
            // SAFETY: from `pin` above.
            unsafe { Metal.unpin(pinned) };
        }
        Ok(())
    });
    let mut wrong = 0;
    for (at, place) in objects.iter().enumerate() {
        if let Some(object) = NonNull::new(place.load(Ordering::Acquire)) {
            // SAFETY: ours, that long, and freed once.
            unsafe {
                let bytes = core::slice::from_raw_parts(object.as_ptr(), SIZE);
                wrong += usize::from(bytes.iter().any(|byte| *byte != at as u8));
                mm.kfree(object);
            }
        }
    }
    for object in plain {
        // SAFETY: ours, and freed once.
        unsafe { mm.kfree(object) };
    }
    give_all_pages(mm, last);
    give_all_pages(mm, small);
    for pfn in large {
        // SAFETY: ours, and freed once.
        unsafe { mm.free_pages(pfn) };
    }
    result?;
    let failed = failed.load(Ordering::Relaxed);
    check!(
        failed == 0,
        "{failed} of {COUNT} objects that were promised did not come"
    );
    check!(wrong == 0, "{wrong} objects were written by somebody else");
    let reserved = reserved.load(Ordering::Relaxed);
    check!(reserved > 0, "memory was not gone");
    reserve.disconnect().map_err(|why| why.to_string())?;
    check!(reserve.destroy().is_ok());
    check!(ledger(machine).balanced);
    Ok(Passed::Says(format!(
        "{COUNT} objects of {SIZE} B, {reserved} of them set aside"
    )))
}
