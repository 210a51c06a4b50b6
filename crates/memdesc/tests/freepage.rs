//! Free-page services: what is left in free pages, what is found in them, who reaches them.

mod common;

use std::panic::Location;
use std::ptr::NonNull;

use common::*;
use memdesc::gfp::{
    self, __GFP_MEMALLOC, __GFP_ZERO, GFP_ATOMIC, GFP_HIGHUSER_MOVABLE, GFP_KERNEL, GFP_NOWAIT,
};
use memdesc::*;
use memdesc_host::Host;

/// One of the combinations of services, by number.
#[derive(Clone, Copy, Debug)]
struct Services {
    init_on_alloc: bool,
    init_on_free: bool,
    page_poison: bool,
    debug_pagealloc: bool,
    reporting: bool,
}

impl Services {
    const NONE: Services = Services::number(0);

    const fn number(n: u32) -> Services {
        Services {
            init_on_alloc: n & 1 != 0,
            init_on_free: n & 2 != 0,
            page_poison: n & 4 != 0,
            debug_pagealloc: n & 8 != 0,
            reporting: n & 16 != 0,
        }
    }

    fn all() -> impl Iterator<Item = Services> {
        (0..32).map(Services::number)
    }

    fn fills(self) -> bool {
        self.init_on_free || self.page_poison
    }

    fn pattern(self) -> u8 {
        if self.init_on_free { 0 } else { 0xaa }
    }

    /// A machine with these services and no others, whatever the environment says.
    fn machine(self, pages: u32) -> Machine {
        let mut machine = Machine::flat(pages).unsampled();
        machine.config = Config {
            memory_is_zeroed: true,
            init_on_alloc: self.init_on_alloc,
            init_on_free: self.init_on_free,
            page_poison: self.page_poison,
            debug_pagealloc: self.debug_pagealloc,
            ..Config::default()
        };
        if self.reporting {
            report_small(&mut machine.config);
        }
        machine
    }
}

/// Bytes of the test's own: neither zero nor poison.
fn tag(n: usize) -> u8 {
    (n % 64) as u8 | 0x40
}

/// What a page that was just handed out holds.
fn held(mm: &Mm<impl Platform>, pfn: Pfn, order: usize) -> &'static [u8] {
    bytes(page(mm, pfn), PAGE_SIZE << order)
}

fn all_are(bytes: &[u8], byte: u8) -> bool {
    bytes.iter().all(|&b| b == byte)
}

/// Hands all memory out once: what was never handed out is not filled, and a block that merges with it is not checked.
fn touch_all(mm: &Mm<impl Platform>) {
    let mut blocks = Vec::new();
    for order in (0..=MAX_ORDER).rev() {
        let get = || mm.alloc_pages(GFP_NOWAIT | __GFP_MEMALLOC, order);
        blocks.extend(std::iter::from_fn(|| get().ok()));
    }
    blocks.into_iter().for_each(|pfn| free(mm, pfn));
    mm.drain_all();
}

/// `do_alloc_pages_order` and `test_pages` of Linux's lib/test_meminit.c.
fn garbage_seen(services: Services) -> usize {
    let machine = services.machine(8192);
    let mm = machine.boot();
    let mut failures = 0;
    for order in 0..=MAX_ORDER {
        for gfp in [GFP_KERNEL, GFP_HIGHUSER_MOVABLE] {
            let pfn = mm.alloc_pages(gfp, order).unwrap();
            fill(page(&mm, pfn), PAGE_SIZE << order, 0x55);
            free(&mm, pfn);
            let pfn = mm.alloc_pages(gfp, order).unwrap();
            failures += usize::from(!all_are(held(&mm, pfn, order), 0));
            fill(page(&mm, pfn), PAGE_SIZE << order, 0x55);
            free(&mm, pfn);
        }
    }
    teardown(&machine, &mm);
    failures
}

#[test]
fn test_meminit_pages() {
    let on_alloc = Services::number(1);
    let on_free = Services::number(2);
    assert_eq!(garbage_seen(on_alloc), 0);
    assert_eq!(garbage_seen(on_free), 0);
    assert_eq!(garbage_seen(Services::number(3)), 0);
    // Otherwise it would be seen: the test is one.
    assert!(garbage_seen(Services::NONE) > MAX_ORDER);
}

/// Blocks that were zeroed when they came back are not zeroed again, and those that were not are.
#[test]
fn zeroing_is_saved_where_it_may_be() {
    let mut machine = Services::number(2).machine(8192);
    machine.config.memory_is_zeroed = false;
    let host = machine.host().build().unwrap();
    // SAFETY: the arena is ours until the memory manager takes it over.
    unsafe { host.direct_map().write_bytes(0xee, 8192 * PAGE_SIZE) };
    let mm = machine.boot_on(host);
    let zeroed = |order| {
        let before = mm.event(Event::PgZeroSaved);
        let pfn = mm.alloc_pages(GFP_KERNEL | __GFP_ZERO, order).unwrap();
        assert!(all_are(held(&mm, pfn, order), 0));
        (pfn, mm.event(Event::PgZeroSaved) - before)
    };
    for order in [0, 3, 5, 9] {
        // Never freed: what the memory held before the machine came up.
        let (pfn, saved) = zeroed(order);
        assert_eq!(saved, 0, "order {order}");
        fill(page(&mm, pfn), PAGE_SIZE << order, 0x55);
        free(&mm, pfn);
        if order <= 3 {
            // From the per-CPU list, the very same.
            let (again, saved) = zeroed(order);
            assert_eq!((again, saved), (pfn, 1 << order));
            free(&mm, again);
        }
        mm.drain_all();
    }
    // Merged with what nobody zeroed: as a whole it is not zero.
    let all = || {
        let mut blocks = Vec::new();
        for order in (0..=MAX_ORDER).rev() {
            while let Ok(pfn) = mm.alloc_pages(GFP_NOWAIT | __GFP_MEMALLOC | __GFP_ZERO, order) {
                assert!(all_are(held(&mm, pfn, order), 0), "{pfn:?} order {order}");
                blocks.push((pfn, order));
            }
        }
        blocks
    };
    for (pfn, order) in all() {
        fill(page(&mm, pfn), PAGE_SIZE << order, 0x66);
        free(&mm, pfn);
    }
    mm.drain_all();
    // All of it has come back by now, and is zero as a whole, whichever way it merged; but what was split for slabs on the way.
    let before = mm.event(Event::PgZeroSaved);
    let blocks = all();
    let pages: u64 = blocks.iter().map(|(_, order)| 1 << order).sum();
    assert_eq!(mm.event(Event::PgZeroSaved) - before, pages);
    // Split, merged, settled, and in bulk.
    for (pfn, order) in blocks {
        fill(page(&mm, pfn), PAGE_SIZE << order, 0x66);
        free(&mm, pfn);
    }
    mm.shrink();
    let before = mm.event(Event::PgZeroSaved);
    let mut out = [Pfn(0); 500];
    assert_eq!(
        mm.alloc_pages_bulk(GFP_KERNEL | __GFP_ZERO, &mut out),
        out.len()
    );
    assert!(out.iter().all(|&pfn| all_are(held(&mm, pfn, 0), 0)));
    assert_eq!(mm.event(Event::PgZeroSaved) - before, 500);
    out.iter().for_each(|&pfn| free(&mm, pfn));
    // Blocks that lay on the descriptors of folios, and got buddies of their own.
    let get = |_| mm.alloc_folio(GFP_HIGHUSER_MOVABLE, 0, FolioKind::File);
    let mut folios: Vec<Pfn> = (0..3000).map_while(|i| get(i).ok()).collect();
    folios.sort_unstable();
    for pair in folios.chunks(2) {
        fill(page(&mm, pair[0]), PAGE_SIZE, 0x44);
        free(&mm, pair[0]);
    }
    mm.shrink();
    let before = mm.event(Event::PgZeroSaved);
    let gfp = GFP_HIGHUSER_MOVABLE | __GFP_ZERO;
    assert_eq!(mm.alloc_pages_bulk(gfp, &mut out), out.len());
    assert!(out.iter().all(|&pfn| all_are(held(&mm, pfn, 0), 0)));
    assert_eq!(mm.event(Event::PgZeroSaved) - before, 500);
    let rest = folios.chunks(2).filter_map(|pair| pair.get(1));
    rest.chain(&out).for_each(|&pfn| free(&mm, pfn));
    teardown(&machine, &mm);
}

#[track_caller]
fn here() -> (String, u32) {
    let at = Location::caller();
    (at.file().to_owned(), at.line())
}

#[test]
fn who_freed_an_overwritten_page_is_named() {
    let mut machine = Machine::flat(8192);
    machine.config.page_poison = true;
    machine.config.page_owner = 4096;
    // The pattern is 0xaa, and the test can write to free pages.
    machine.config.init_on_free = false;
    machine.config.debug_pagealloc = false;
    machine.config.page_reporting = false;
    let reports = Reports::default();
    let mm = machine.boot_on(reports.on(machine.host()).build().unwrap());
    let pfn = mm.alloc_pages(GFP_KERNEL, 2).unwrap();
    let line = line!() + 1;
    free(&mm, pfn);
    fill(page(&mm, pfn.add(1)), 1, 0xaa);
    fill(
        NonNull::new(mm.page_address(pfn.add(1)).wrapping_add(77)).unwrap(),
        1,
        1,
    );
    let again = mm.alloc_pages(GFP_KERNEL, 2).unwrap();
    assert_eq!(again, pfn);
    let text = reports.one().text;
    let who = format!(
        "page freed as bare order 2, {pfn:?}, by {}:{line}:",
        file!()
    );
    assert!(text.contains(&who), "{text}");
    assert!(text.contains("byte 77: 0x01, expected 0xaa"), "{text}");
    free(&mm, again);
}

/// Each way to write to a free page is found, in the right place, by who gets the page; and by nobody else.
#[test]
fn overwrites_of_free_pages_are_found() {
    for services in [Services::number(4), Services::number(6)] {
        let pattern = services.pattern();
        let reports = Reports::default();
        let machine = services.machine(8192);
        let mm = machine.boot_on(reports.on(machine.host()).build().unwrap());
        touch_all(&mm);
        let poke = |pfn: Pfn, offset: usize, byte: u8| {
            // SAFETY: in the arena, and nobody's: it is the test that nobody should.
            unsafe { page(&mm, pfn).add(offset).write(byte) };
        };
        // (offset, byte) written, and what is told: first bad byte, last, how many, one bit.
        type Case = (&'static [(usize, u8)], (isize, u8), (u32, u32, bool));
        let cases: [Case; 6] = [
            (&[(0, 1)], (0, 1), (0, 1, pattern == 0)),
            (&[(4095, 0xab)], (4095, 0xab), (4095, 1, pattern == 0xaa)),
            (&[(1234, 0x80)], (1234, 0x80), (1234, 1, pattern == 0)),
            (&[(77, 0xa8)], (77, 0xa8), (77, 1, pattern == 0xaa)),
            (&[(9, 3)], (9, 3), (9, 1, false)),
            (&[(100, 1), (101, 2), (3000, 4)], (100, 1), (3000, 3, false)),
        ];
        for order in [0, 1, 3, 4, 6, 9, 10] {
            for (writes, (first, found), (last, n, single_bit)) in cases {
                let pfn = mm.alloc_pages(GFP_KERNEL, order).unwrap();
                fill(page(&mm, pfn), PAGE_SIZE << order, 0x11);
                free(&mm, pfn);
                let bad = pfn.add((1 << order) * 2 / 3);
                writes.iter().for_each(|&(at, byte)| poke(bad, at, byte));
                let (again, at) = (mm.alloc_pages(GFP_KERNEL, order).unwrap(), here());
                assert_eq!(again, pfn, "order {order}");
                let seen = reports.one();
                let damage = PageDamage {
                    last,
                    bytes: n,
                    single_bit,
                };
                assert_eq!(seen.what, Corruption::PagePoison(damage));
                assert_eq!((seen.pfn, seen.kind), (bad, PageType::Free));
                assert_eq!(seen.byte, Some((first, found, pattern)));
                assert_eq!(seen.caller, at);
                let expected = if single_bit {
                    "single bit error in a free page"
                } else {
                    "page written after free"
                };
                assert!(seen.text.contains(expected), "{}", seen.text);
                let tail = format!("{n} bytes differ, the last is {last}");
                assert!(seen.text.contains(&tail), "{}", seen.text);
                // Handed out all the same, and good as new.
                fill(page(&mm, again), PAGE_SIZE << order, 0x11);
                free(&mm, again);
                let again = mm.alloc_pages(GFP_KERNEL, order).unwrap();
                free(&mm, again);
                assert_eq!(reports.take(), []);
                mm.drain_all();
            }
        }
        assert_eq!(mm.event(Event::PgPoisonBad), 7 * 6);
        // Who wants zeros gets zeros.
        let pfn = mm.alloc_pages(GFP_KERNEL, 2).unwrap();
        free(&mm, pfn);
        poke(pfn.add(3), 17, 0x42);
        let again = mm.alloc_pages(GFP_KERNEL | __GFP_ZERO, 2).unwrap();
        assert_eq!((again, reports.one().pfn), (pfn, pfn.add(3)));
        assert!(all_are(held(&mm, again, 2), 0));
        free(&mm, again);
        // Other ways to get pages find it too. Each page of a block that was split is looked at by who gets it.
        type Way = fn(&Mm<Host>) -> Vec<Pfn>;
        let ways: [Way; 5] = [
            |mm| {
                let mut out = vec![Pfn(0); 1 << 6];
                assert_eq!(mm.alloc_pages_bulk(GFP_KERNEL, &mut out), 1 << 6);
                out
            },
            |mm| {
                let get = || mm.alloc_pages_nolock(GFP_ATOMIC, None, 0);
                std::iter::from_fn(|| get().ok()).take(1 << 6).collect()
            },
            |mm| {
                let get = || mm.alloc_folio(GFP_KERNEL, 0, FolioKind::File);
                std::iter::from_fn(|| get().ok()).take(1 << 6).collect()
            },
            |mm| {
                let get = |_| mm.alloc_page_table(GFP_KERNEL, 0).unwrap();
                (0..1 << 6).map(get).collect()
            },
            |mm| {
                let area = mm.vmalloc(PAGE_SIZE << 6, GFP_KERNEL).unwrap();
                let pfn = |i: usize| mm.vmalloc_to_pfn(area.as_ptr().wrapping_add(i << PAGE_SHIFT));
                let pages = (0..1 << 6).map(|i| pfn(i).unwrap()).collect();
                // SAFETY: the area is ours.
                unsafe { mm.vfree(area) };
                pages
            },
        ];
        for (index, way) in ways.into_iter().enumerate() {
            // What slabs it takes, it takes now.
            for pfn in way(&mm) {
                if index < 4 {
                    free(&mm, pfn);
                }
            }
            mm.drain_all();
            let single = mm.alloc_pages(GFP_KERNEL, 0).unwrap();
            mm.set_pageblock_migratetype(single, MigrateType::Unmovable);
            free(&mm, single);
            poke(single, 4000, 0x77);
            let mut pages = way(&mm);
            assert!(pages.contains(&single), "way {index}");
            let seen = reports.one();
            assert_eq!((seen.pfn, seen.byte.unwrap().0), (single, 4000));
            if index < 4 {
                pages.drain(..).for_each(|pfn| free(&mm, pfn));
            }
        }
        // By number, out of the middle of a larger block; the rest of it is still looked at.
        let pfn = mm.alloc_pages(GFP_KERNEL, 8).unwrap();
        free(&mm, pfn);
        mm.drain_all();
        poke(pfn.add(100), 5, 0x77);
        poke(pfn.add(200), 6, 0x77);
        mm.alloc_pages_at(pfn.add(100), 0).unwrap();
        assert_eq!(reports.one().pfn, pfn.add(100));
        mm.alloc_pages_at(pfn.add(192), 6).unwrap();
        assert_eq!(reports.one().pfn, pfn.add(200));
        free(&mm, pfn.add(100));
        free(&mm, pfn.add(192));
        teardown(&machine, &mm);
        assert_eq!(reports.take(), []);
    }
}

/// A platform that does not keep what is in free pages is not asked for it.
#[test]
fn contents_that_the_platform_does_not_keep() {
    for number in 0..8 {
        let services = Services::number(number);
        let machine = services.machine(4096);
        let reports = Reports::default();
        let host = reports.on(machine.host()).build().unwrap();
        let base = host.direct_map().expose_provenance();
        let mut hooked = Hooked::new(host);
        hooked.keeps_free_contents = false;
        hooked.on_free = Some(Box::new(move |pfn, order| {
            let at =
                std::ptr::with_exposed_provenance_mut::<u8>(base + (pfn.0 as usize * PAGE_SIZE));
            // SAFETY: the pages are the platform's while they are free.
            unsafe { at.write_bytes(0x99, PAGE_SIZE << order) };
        }));
        let mm = machine.boot_on(hooked);
        for order in [0, 2, 5, 9] {
            for gfp in [GFP_KERNEL, GFP_KERNEL | __GFP_ZERO] {
                let pfn = mm.alloc_pages(gfp, order).unwrap();
                free(&mm, pfn);
                let pfn = mm.alloc_pages(gfp, order).unwrap();
                if services.init_on_alloc || gfp.contains(__GFP_ZERO) {
                    assert!(all_are(held(&mm, pfn, order), 0), "{services:?}");
                }
                free(&mm, pfn);
            }
        }
        assert_eq!(reports.take(), []);
        assert_eq!(mm.event(Event::PgZeroSaved), 0);
    }
}

/// Can a byte be read? The kernel says, without a signal.
fn readable(ptr: *const u8) -> bool {
    let mut ends = [0; 2];
    // SAFETY: plain system calls; a bad address is an error of write(2).
    unsafe {
        assert_eq!(libc::pipe(ends.as_mut_ptr()), 0);
        let n = libc::write(ends[1], ptr.cast(), 1);
        libc::close(ends[0]);
        libc::close(ends[1]);
        n == 1
    }
}

/// What a test has, and what it wrote there.
enum Mine {
    Pages(Pfn, usize, bool),
    Object(std::ptr::NonNull<u8>, usize),
    Area(std::ptr::NonNull<u8>, usize),
}

struct Life<'a> {
    mm: &'a Mm<Host>,
    services: Services,
    mine: Vec<(Mine, u8)>,
    rng: Rng,
    alone: bool,
}

impl Life<'_> {
    /// Fresh pages: nothing of anybody's is in them that should not be.
    fn fresh(&self, held: &[u8], zeroed: bool) {
        if zeroed || self.services.init_on_alloc {
            assert!(all_are(held, 0), "{:?}: not zero", self.services);
        } else if self.services.fills() {
            for page in held.chunks(PAGE_SIZE) {
                let pattern = self.services.pattern();
                // Memory that was never handed out is zero here.
                assert!(
                    all_are(page, pattern) || all_are(page, 0),
                    "{:?}: a freed secret",
                    self.services
                );
            }
        }
    }

    fn keep_pages(&mut self, pfn: Pfn, order: usize, zeroed: bool, nolock: bool) {
        self.fresh(held(self.mm, pfn, order), zeroed);
        let byte = tag(self.rng.below(64));
        fill(page(self.mm, pfn), PAGE_SIZE << order, byte);
        self.mine.push((Mine::Pages(pfn, order, nolock), byte));
    }

    fn get(&mut self) {
        let mm = self.mm;
        let zeroed = self.rng.one_in(2);
        let zero = if zeroed { __GFP_ZERO } else { Flags::EMPTY };
        let order = [0, 0, 0, 1, 2, 3, 4, 6, 8, 9, 10][self.rng.below(11)];
        match self.rng.below(9) {
            0 | 1 => {
                if let Ok(pfn) = mm.alloc_pages(GFP_ATOMIC | zero, order) {
                    self.keep_pages(pfn, order, zeroed, false);
                }
            }
            2 => {
                let order = order.min(4);
                let kind = [FolioKind::File, FolioKind::Anon][self.rng.below(2)];
                if let Ok(pfn) = mm.alloc_folio(GFP_HIGHUSER_MOVABLE | zero, order, kind) {
                    self.keep_pages(pfn, order, zeroed, false);
                }
            }
            3 => {
                if let Ok(pfn) = mm.alloc_page_table(GFP_KERNEL | zero, 0) {
                    self.keep_pages(pfn, 0, zeroed, false);
                }
            }
            4 => {
                let mut out = vec![Pfn(0); 1 + self.rng.below(80)];
                let n = mm.alloc_pages_bulk(GFP_KERNEL | zero, &mut out);
                for &pfn in &out[..n] {
                    self.keep_pages(pfn, 0, zeroed, false);
                }
            }
            5 => {
                if let Ok(pfn) = mm.alloc_pages_nolock(GFP_ATOMIC | zero, None, order) {
                    self.keep_pages(pfn, order, zeroed, true);
                }
            }
            6 => {
                let size = 1 + self.rng.below(20_000);
                if let Ok(object) = mm.kmalloc(size, GFP_KERNEL | zero) {
                    if zeroed {
                        assert!(all_are(bytes(object, size), 0));
                    }
                    let byte = tag(self.rng.below(64));
                    fill(object, size, byte);
                    self.mine.push((Mine::Object(object, size), byte));
                }
            }
            7 => {
                let size = PAGE_SIZE * (1 + self.rng.below(40));
                let area = if zeroed {
                    mm.vzalloc(size, GFP_KERNEL)
                } else {
                    mm.vmalloc(size, GFP_KERNEL)
                };
                if let Ok(area) = area {
                    self.fresh(bytes(area, size), zeroed);
                    let byte = tag(self.rng.below(64));
                    fill(area, size, byte);
                    self.mine.push((Mine::Area(area, size), byte));
                }
            }
            _ => {
                let start = Pfn(self.rng.below(64) as u32 * 64);
                if self.alone && mm.offline_pages(start, 64).is_ok() {
                    mm.online_pages(start, 64).unwrap();
                }
            }
        }
    }

    fn give(&mut self) {
        if self.mine.is_empty() {
            return;
        }
        let index = self.rng.below(self.mine.len());
        let (mine, byte) = self.mine.swap_remove(index);
        match mine {
            // SAFETY, of all: ours, checked to be what we wrote, and not used again.
            Mine::Pages(pfn, order, nolock) => {
                assert!(all_are(held(self.mm, pfn, order), byte));
                if nolock {
                    // SAFETY: above.
                    unsafe { self.mm.free_pages_nolock(pfn) };
                } else {
                    free(self.mm, pfn);
                }
                if self.alone && self.services.debug_pagealloc {
                    let at = page(self.mm, pfn.add((1 << order) - 1));
                    assert!(!readable(at.as_ptr()), "{pfn:?} order {order} is free");
                }
            }
            Mine::Object(object, size) => {
                assert!(all_are(bytes(object, size), byte));
                kfree(self.mm, object);
            }
            Mine::Area(area, size) => {
                assert!(all_are(bytes(area, size), byte));
                // SAFETY: above.
                unsafe { self.mm.vfree(area) };
            }
        }
    }

    fn live(&mut self, ops: usize) {
        for _ in 0..ops {
            // Up and down in waves; memory runs out now and then.
            let up = self.rng.below(100) < 55;
            if up && self.mine.len() < 400 {
                self.get();
            } else {
                self.give();
            }
            match self.rng.below(60) {
                0 => self.mm.drain_all(),
                1 => self.mm.tick(),
                2 => {
                    let _ = self.mm.page_report();
                }
                3 if self.rng.one_in(8) => {
                    self.mm.shrink();
                }
                _ => {}
            }
        }
        while !self.mine.is_empty() {
            self.give();
        }
    }
}

fn life(mm: &Mm<Host>, services: Services, seed: u64, alone: bool) -> Life<'_> {
    Life {
        mm,
        services,
        mine: Vec::new(),
        rng: Rng(seed),
        alone,
    }
}

/// The whole machine at work, with every combination of the services; every content is looked at, and there is no false report (a report
/// panics).
#[test]
fn every_combination_alone() {
    for (seed, services) in Services::all().enumerate() {
        let machine = services.machine(16 << 8);
        let mm = machine.boot();
        life(&mm, services, seed as u64, true).live(scaled(2500, 20));
        assert!(mm.platform().guards_free_pages());
        teardown(&machine, &mm);
        let reported = mm.event(Event::PgReported);
        assert_eq!(reported > 0, services.reporting, "{services:?}: {reported}");
        if services.init_on_free && !cfg!(miri) {
            assert!(mm.event(Event::PgZeroSaved) > 0);
        }
        assert_eq!(mm.event(Event::PgPoisonBad), 0);
    }
}

#[test]
fn every_combination_on_two_cpus() {
    for (seed, services) in Services::all().enumerate() {
        let machine = services.machine(16 << 8).cpus(2);
        let mm = machine.boot();
        std::thread::scope(|s| {
            for cpu in 0..2 {
                let mm = &mm;
                s.spawn(move || {
                    let _cpu = mm.platform().claim(cpu).unwrap();
                    let seed = seed as u64 * 2 + cpu as u64;
                    life(mm, services, seed, false).live(scaled(1200, 10));
                });
            }
        });
        let _cpu = mm.platform().claim(0).unwrap();
        teardown(&machine, &mm);
        assert_eq!(mm.event(Event::PgReported) > 0, services.reporting);
        assert_eq!(mm.event(Event::PgPoisonBad), 0);
    }
}

/// With nothing on, no page is touched, and with everything on, one that is free is nobody's to reach.
#[test]
fn offline_pages_keep_no_secrets() {
    for number in [2, 4, 10] {
        let services = Services::number(number);
        let machine = services.machine(4096);
        let mm = machine.boot();
        let pfn = mm.alloc_pages(GFP_KERNEL, 6).unwrap();
        fill(page(&mm, pfn), PAGE_SIZE << 6, 0x55);
        free(&mm, pfn);
        mm.offline_pages(pfn, 64).unwrap();
        let at = page(&mm, pfn.add(9));
        if services.debug_pagealloc {
            assert!(!readable(at.as_ptr()));
        } else {
            assert!(all_are(bytes(at, PAGE_SIZE), services.pattern()));
            // Who has it meanwhile may write what he likes.
            fill(at, PAGE_SIZE, 0x77);
        }
        mm.online_pages(pfn, 64).unwrap();
        let again = mm.alloc_pages(GFP_KERNEL | gfp::__GFP_ZERO, 6).unwrap();
        assert!(all_are(held(&mm, again, 6), 0));
        free(&mm, again);
        teardown(&machine, &mm);
    }
}
