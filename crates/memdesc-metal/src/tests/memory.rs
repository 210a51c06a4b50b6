//! Tests of one CPU: what booting wrote, pages, objects, collections.

use alloc::alloc::Layout;
use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::format;
use alloc::string::ToString;
use alloc::vec::Vec;

use memdesc::gfp::{__GFP_NORETRY, __GFP_NOWARN, Flags, GFP_KERNEL};
use memdesc::rcu::Rcu;
use memdesc::{
    CacheFlags, CensusKind, Event, MAX_ORDER, Memory, Mm, PAGE_SIZE, PAGEBLOCK_ORDER, Pfn,
};

use super::{Machine, Outcome, Passed, ledger, settled};
use crate::boot::{KERNEL_BASE, image};
use crate::platform::Metal;
use crate::pvh::{Entry, Kind};
use crate::{check, percpu, ranges, traps};

/// Pages that are free, wherever they are kept.
pub(super) fn free_pages(machine: &Machine) -> u64 {
    let ledger = ledger(machine);
    ledger.free + ledger.untouched + ledger.pcp
}

/// Rule 2: taking over memory writes words in proportion to the number of largest blocks, not of pages.
pub(super) fn words_written_at_boot(machine: &Machine) -> Outcome {
    let Some((words, blocks)) = machine.written else {
        return Ok(Passed::Skipped("not counted: words=count does"));
    };
    // Besides, what was in use is cut into blocks: some twenty words for each end of its five pieces.
    check!(
        words > 0 && words <= blocks + 128,
        "{words} words for {blocks} largest blocks"
    );
    Ok(Passed::Says(format!(
        "{words} words, {blocks} largest blocks"
    )))
}

/// Rule 9: counters and a walk over the memory map agree, page by page.
pub(super) fn the_ledger_balances(machine: &Machine) -> Outcome {
    let ledger = ledger(machine);
    check!(ledger.balanced, "{ledger:?}");
    Ok(Passed::Says(format!(
        "{} pages given, {} B of metadata",
        ledger.given,
        ledger.metadata_bytes()
    )))
}

/// Blocks of each order are aligned, of their size, and nobody else's.
pub(super) fn pages_of_every_order(machine: &Machine) -> Outcome {
    let mm = machine.mm;
    let before = {
        mm.shrink();
        free_pages(machine)
    };
    let mut blocks = Vec::new();
    for round in 0..4u64 {
        for order in 0..=MAX_ORDER {
            let pfn = mm
                .alloc_pages(GFP_KERNEL, order)
                .map_err(|why| format!("order {order}: {why}"))?;
            check!(pfn.is_aligned(order), "{pfn:?} of order {order}");
            let words = (PAGE_SIZE << order) / 8;
            let stamp = round << 8 | order as u64;
            // SAFETY: the block was just handed out, and is that long.
            let memory = unsafe {
                core::slice::from_raw_parts_mut(mm.page_address(pfn).cast::<u64>(), words)
            };
            memory
                .iter_mut()
                .step_by(512)
                .for_each(|word| *word = stamp);
            memory[words - 1] = stamp;
            blocks.push((pfn, words, stamp));
        }
    }
    for (pfn, words, stamp) in blocks {
        // SAFETY: as above.
        let memory =
            unsafe { core::slice::from_raw_parts(mm.page_address(pfn).cast::<u64>(), words) };
        let right =
            memory.iter().step_by(512).all(|word| *word == stamp) && memory[words - 1] == stamp;
        check!(right, "{pfn:?} was written by somebody else");
        // SAFETY: ours, and used no more.
        unsafe { mm.free_pages(pfn) };
    }
    mm.shrink();
    let after = free_pages(machine);
    check!(after == before, "{before} pages were free, {after} are");
    check!(ledger(machine).balanced);
    Ok(Passed::Ok)
}

/// Objects of all sizes from 1 byte to 4 MiB are as large and as aligned as was asked.
pub(super) fn objects_of_every_size(machine: &Machine) -> Outcome {
    let mm = machine.mm;
    let mut objects = Vec::new();
    let mut size = 1;
    while size <= 4 << 20 {
        for size in [size, size + size / 2] {
            if size > 4 << 20 {
                continue;
            }
            let object = mm
                .kmalloc(size, GFP_KERNEL)
                .map_err(|why| format!("{size} B: {why}"))?;
            check!(
                !size.is_power_of_two()
                    || size < 8
                    || object.addr().get().is_multiple_of(size.min(PAGE_SIZE))
            );
            // SAFETY: ours, and that long.
            unsafe {
                check!(mm.ksize(object) >= size);
                object.write(size as u8);
                object.add(size - 1).write(size as u8);
            }
            objects.push((object, size));
        }
        size *= 2;
    }
    for (object, size) in objects {
        // SAFETY: ours, that long, and freed once.
        unsafe {
            check!(
                object.add(size - 1).read() == size as u8,
                "{size} B were written by somebody else"
            );
            mm.kfree(object);
        }
    }
    check!(ledger(machine).balanced);
    Ok(Passed::Ok)
}

/// A cache gives objects of its own, and ends when all are back.
pub(super) fn a_cache_lives_and_dies(machine: &Machine) -> Outcome {
    let mm = machine.mm;
    let cache = mm
        .kmem_cache_create("metal", 104, 8, CacheFlags::EMPTY, None)
        .map_err(|why| why.to_string())?;
    let mut objects = Vec::new();
    for i in 0..3000u64 {
        let object = mm
            .kmem_cache_alloc(&cache, GFP_KERNEL)
            .map_err(|why| why.to_string())?;
        // SAFETY: ours, 104 bytes long.
        unsafe { object.cast::<u64>().add(12).write(i) };
        objects.push(object);
    }
    for (i, object) in objects.into_iter().enumerate() {
        // SAFETY: the same; freed once.
        unsafe {
            check!(object.cast::<u64>().add(12).read() == i as u64);
            mm.kmem_cache_free(&cache, object);
        }
    }
    check!(mm.kmem_cache_destroy(cache).is_ok(), "objects are left");
    check!(ledger(machine).balanced);
    Ok(Passed::Ok)
}

/// Takes pages until there are no more, linked through themselves; the last one and how many.
pub(super) fn take_all_pages(mm: &Mm<Metal>, gfp: Flags) -> (Pfn, u64) {
    let (mut last, mut pages) = (Pfn::NONE, 0);
    while let Ok(pfn) = mm.alloc_pages(gfp | __GFP_NORETRY | __GFP_NOWARN, 0) {
        // SAFETY: ours from here on.
        unsafe { mm.page_address(pfn).cast::<Pfn>().write(last) };
        (last, pages) = (pfn, pages + 1);
    }
    (last, pages)
}

/// Gives them back.
pub(super) fn give_all_pages(mm: &Mm<Metal>, mut last: Pfn) {
    while last != Pfn::NONE {
        // SAFETY: from `take_all_pages`, written there, and freed once.
        unsafe {
            let next = mm.page_address(last).cast::<Pfn>().read();
            mm.free_pages(last);
            last = next;
        }
    }
}

/// All of memory comes but what the watermarks keep, 2 MiB at a time and then by pages, and all of it comes back.
pub(super) fn all_memory_can_be_had(machine: &Machine) -> Outcome {
    let mm = machine.mm;
    mm.shrink();
    let before = free_pages(machine);
    let metadata = ledger(machine).metadata;
    // Room for all of them beforehand; the blocks are not touched, so that the hypervisor need not find memory for them.
    let mut large = Vec::with_capacity((before >> PAGEBLOCK_ORDER) as usize + 1);
    while let Ok(pfn) = mm.alloc_pages(GFP_KERNEL | __GFP_NORETRY | __GFP_NOWARN, PAGEBLOCK_ORDER) {
        large.push(pfn);
    }
    let (small, small_blocks) = take_all_pages(mm, GFP_KERNEL);
    let large_blocks = large.len() as u64;
    let had = (large_blocks << PAGEBLOCK_ORDER) + small_blocks;
    let left = free_pages(machine);
    let balanced = ledger(machine).balanced;
    give_all_pages(mm, small);
    for pfn in large {
        // SAFETY: ours, and freed once.
        unsafe { mm.free_pages(pfn) };
    }
    mm.shrink();
    let after = free_pages(machine);
    check!(balanced && ledger(machine).balanced);
    check!(
        had * 100 >= before * 95,
        "{had} pages of {before} came, {left} are left"
    );
    // Free blocks are described where untouched memory was not; and a slab that describes itself stays for good.
    let kept = ledger(machine).metadata - metadata;
    check!(
        after + kept == before && kept <= 64 + before / (1 << 18),
        "{before} pages were free, {after} are, {kept} became metadata"
    );
    Ok(Passed::Says(format!(
        "{large_blocks} blocks of 2 MiB and {small_blocks} pages of {before} pages"
    )))
}

/// `alloc`'s collections, and what is aligned more than usual.
pub(super) fn collections(_machine: &Machine) -> Outcome {
    #[repr(align(4096))]
    struct Page([u8; PAGE_SIZE]);
    let mut map = BTreeMap::new();
    for i in 0..2000u64 {
        map.insert(i.wrapping_mul(0x9e37_79b9_7f4a_7c15), i.to_string());
    }
    let right = map
        .iter()
        .all(|(k, v)| v.parse() == Ok(k.wrapping_mul(0xf1de_83e1_9937_733d)));
    check!(right, "a map holds something else");
    // More than a slab, and more than the page allocator has in one piece.
    let mut long: Vec<u64> = (0..(1 << 16)).collect();
    long.resize(5 << 17, 7);
    check!(long[65535] == 65535 && long[(5 << 17) - 1] == 7);
    for (size, align) in [
        (1, 16),
        (10, 256),
        (100, 4096),
        (5000, 8192),
        (300_000, 4096),
    ] {
        let layout = Layout::from_size_align(size, align).map_err(|why| why.to_string())?;
        let several: [*mut u8; 3] = core::array::from_fn(|_| {
            // SAFETY: of a size that is not 0.
            unsafe { alloc::alloc::alloc_zeroed(layout) }
        });
        for ptr in several {
            check!(
                !ptr.is_null() && ptr.addr().is_multiple_of(align),
                "{ptr:?} for {layout:?}"
            );
            // SAFETY: ours, that long, freed once with its layout.
            unsafe {
                check!(
                    core::slice::from_raw_parts(ptr, size)
                        .iter()
                        .all(|byte| *byte == 0)
                );
                ptr.write_bytes(0xff, size);
                alloc::alloc::dealloc(ptr, layout);
            }
        }
    }
    let pages: Vec<Box<Page>> = (0..8).map(|i| Box::new(Page([i; PAGE_SIZE]))).collect();
    for (i, page) in pages.iter().enumerate() {
        check!((&raw const **page).addr().is_multiple_of(PAGE_SIZE) && page.0[4095] == i as u8);
    }
    Ok(Passed::Ok)
}

/// After everything: what was taken is back, and the ledger balances still.
pub(super) fn nothing_is_left(machine: &Machine) -> Outcome {
    let mm = machine.mm;
    mm.rcu().barrier();
    mm.shrink();
    let ledger = ledger(machine);
    check!(ledger.balanced, "{ledger:?}");
    let (before, after) = (machine.settled, settled(&ledger));
    check!(
        before == after,
        "{before} pages were free or metadata before the tests, {after} are"
    );
    let (free, given) = (ledger.free + ledger.untouched + ledger.pcp, ledger.given);
    let on_free = mm.event(Event::AllocOnFree);
    check!(on_free == 0, "{on_free} allocations on a free path");
    Ok(Passed::Says(format!(
        "{free} pages of {given} are free, {} B of metadata",
        ledger.metadata_bytes()
    )))
}

/// What the firmware calls memory is the memory manager's, to the page: what it ever handed out or may, the kernel's text and data by name, and what it keeps its own books in.
pub(super) fn all_memory_is_accounted_for(machine: &Machine) -> Outcome {
    let mm = machine.mm;
    let page = PAGE_SIZE as u64;
    let firmware = machine.boot.memory.iter().filter(|e| e.kind.is_memory());
    let (mut bytes, mut cut) = (0, 0);
    for entry in firmware {
        let (start, end) = (entry.start.next_multiple_of(page), entry.end & !(page - 1));
        bytes += entry.end - entry.start;
        cut += start - entry.start + entry.end - end;
    }
    let given = ledger(machine).given;
    check!(
        bytes == given * page + cut,
        "{bytes} B of memory, of which {cut} B are no whole pages; {given} pages were given"
    );
    let (mut managed, mut present) = (0, 0);
    mm.zoneinfo(|zone| {
        managed += zone.managed;
        present += zone.present;
    });
    let census = mm.census();
    let of = |kind: CensusKind| census.of(kind).pages;
    let (text, data) = (of(CensusKind::KernelText), of(CensusKind::KernelData));
    let (books, other) = (of(CensusKind::MemMap), of(CensusKind::Kernel));
    check!(
        present == given && given == managed + text + data + books + other,
        "{given} pages given, {present} present; {managed} managed, {text} text, {data} data, {books} of books, {other} kept"
    );
    let image = image();
    check!(text == (image.text_end - image.start) / page);
    check!(data > (image.init_start - image.text_end) / page);
    // Where a CPU did not start, it may still want them.
    let init = (image.end - image.init_start) / page + 1;
    let all_run = machine.cpus == percpu::nr_cpus();
    check!(
        other == if all_run { 0 } else { init },
        "{other} pages are kept of {init} that were used to come up"
    );
    // They are memory like any other, and are not where the image was any more.
    let first = ((image.init_start - KERNEL_BASE) / page) as u32;
    let reserved = |pfn: u32| matches!(mm.lookup(Pfn(pfn)).2, Memory::Reserved(_));
    let kept = (first..first + init as u32 - 1).filter(|pfn| reserved(*pfn));
    check!(kept.count() == if all_run { 0 } else { init as usize - 1 });
    check!(traps::probe(image.init_start as usize) != all_run);
    Ok(Passed::Says(format!(
        "{bytes} B of memory: {managed} pages managed, {text} text, {data} data, {books} of books, {cut} B no whole pages"
    )))
}

/// ACPI's tables are memory once they have been read; what overlaps with something else is none.
pub(super) fn memory_of_the_firmware(_machine: &Machine) -> Outcome {
    let entry = |start, end, kind| Entry { start, end, kind };
    let map = [
        entry(0x1000, 0x5800, Kind::Ram),
        entry(0x10_0000, 0x20_0000, Kind::Ram),
        entry(0x20_0000, 0x21_0000, Kind::Acpi),
        entry(0x21_0000, 0x22_0000, Kind::Nvs),
        entry(0x30_0000, 0x40_0000, Kind::Ram),
        entry(0x38_0800, 0x38_0900, Kind::Reserved),
    ];
    let found = ranges::usable(&map, &[]);
    let found: Vec<_> = found.iter().map(|r| (r.start.0, r.end.0)).collect();
    let wanted = [
        (0x1000, 0x5000),
        (0x10_0000, 0x21_0000),
        (0x30_0000, 0x38_0000),
        (0x38_1000, 0x40_0000),
    ];
    check!(found == wanted, "{found:x?}");
    Ok(Passed::Ok)
}
