//! A stray write hits the memory map, a free block's links, a slab's bitmap or counts, a folio's descriptor: a report says so, nothing is followed that
//! leads astray, and `validate` finds what nobody came by, and sets lists and counts right (`CONFIG_DEBUG_LIST`, `list_del corruption`).
//!
//! The writes are raw ones, at the addresses where the memory manager keeps what is its own.

mod common;

use common::*;
use memdesc::gfp::{GFP_HIGHUSER_MOVABLE, GFP_KERNEL};
use memdesc::*;
use memdesc_host::Host;

struct Bench {
    mm: &'static Mm<Host>,
    reports: Reports,
    words: *mut u64,
}

const PAGES: u32 = 2048;

impl Bench {
    fn new() -> Bench {
        Bench::of(Machine::flat(PAGES).unsampled())
    }

    fn of(mut machine: Machine) -> Bench {
        machine.config.page_owner = 4096;
        machine.config.check_pages = true;
        let reports = Reports::default();
        let mm = machine.boot_on(reports.on(machine.host()).build().unwrap());
        let mm: &'static Mm<Host> = Box::leak(Box::new(mm));
        let words = words(mm);
        Bench { mm, reports, words }
    }

    fn word(&self, pfn: Pfn) -> u64 {
        // SAFETY: `words` leads to a word a page; read as the bytes that they are.
        unsafe { self.words.add(pfn.0 as usize).read_volatile() }
    }

    fn overwrite(&self, pfn: Pfn, word: u64) -> u64 {
        let old = self.word(pfn);
        // SAFETY: as above; the test is alone with the machine.
        unsafe { self.words.add(pfn.0 as usize).write_volatile(word) };
        old
    }

    /// Where the word of this page leads.
    fn desc(&self, pfn: Pfn) -> *mut u32 {
        let physical = (self.word(pfn) >> 5 & ((1 << 41) - 1)) << 3;
        let base = self.mm.page_address(Pfn(0));
        base.wrapping_add(physical as usize).cast()
    }

    /// The only report is this, of this page.
    #[track_caller]
    fn expect(&self, what: Corruption, pfn: Pfn) -> Seen {
        let seen = self.reports.one();
        assert_eq!((seen.what, seen.pfn), (what, pfn), "{}", seen.text);
        assert!(
            seen.text
                .starts_with(&format!("memdesc: {}: address", what.text()))
        );
        assert!(
            seen.text.contains(&format!("pfn {:#x}", pfn.0)),
            "{}",
            seen.text
        );
        seen
    }

    /// All is well.
    #[track_caller]
    fn clean(&self) {
        let found = self.mm.validate(|report| panic!("{report}"));
        assert_eq!(found, Validation::default());
    }
}

/// Where the words are: an allocation of order 3 has eight that are the same, somewhere in the memory that was taken at boot.
fn words(mm: &Mm<Host>) -> *mut u64 {
    let pfn = mm.alloc_pages(GFP_KERNEL, 3).unwrap();
    let first = (0..PAGES)
        .find(|&p| matches!(mm.lookup(Pfn(p)).2, Memory::Reserved(Reserved::MemMap)) && p != 0);
    let start = mm.page_address(Pfn(first.unwrap())).cast::<u64>();
    let len = (PAGES - first.unwrap()) as usize * 512;
    // SAFETY: boot memory, which is mapped and initialised.
    let at = |i: usize| unsafe { start.add(i).read_volatile() };
    let found = (0..len - 8).find(|&i| {
        let word = at(i);
        word & 0x1f == PageType::Bare as u64
            && word >> 53 & 0xf == 3
            && (1..8).all(|n| at(i + n) == word)
            && at(i + 8) != word
    });
    let words = start
        .wrapping_add(found.unwrap())
        .wrapping_sub(pfn.0 as usize);
    free(mm, pfn);
    words
}

/// Words that no page of ours can have.
fn bad_words(pfn: Pfn) -> [(&'static str, u64); 5] {
    let bare = PageType::Bare as u64;
    let desc = |physical: u64| physical >> 3 << 5;
    [
        ("a descriptor in no RAM", bare | desc(1 << 40)),
        (
            "a descriptor in a page that is no slab",
            bare | desc(u64::from(pfn.0) << 12),
        ),
        ("a descriptor at 0", bare),
        (
            "an order that its page is not aligned to",
            bare | desc(0x5000) | 5 << 53,
        ),
        ("text", u64::from_le_bytes(*b"ABCDEFG\x02")),
    ]
}

#[test]
fn a_word_that_was_overwritten_is_not_followed() {
    for which in 0..5 {
        let b = Bench::new();
        let _before = b.mm.alloc_pages(GFP_KERNEL, 0).unwrap();
        let pfn = b.mm.alloc_pages(GFP_KERNEL, 0).unwrap();
        let (name, word) = bad_words(pfn)[which];
        let old = b.overwrite(pfn, word);
        free(b.mm, pfn);
        let seen = b.reports.take();
        assert_eq!(seen.len(), 1, "{name}: {seen:?}");
        assert!(
            matches!(
                seen[0].what,
                Corruption::BadWord
                    | Corruption::WrongType
                    | Corruption::NotAHead
                    | Corruption::DoubleFree
            ),
            "{name}: {}",
            seen[0].text
        );
        assert!(
            seen[0].text.contains("page allocated as bare order 0"),
            "{}",
            seen[0].text
        );
        // Nothing was taken back; put right, it can be.
        b.overwrite(pfn, old);
        b.clean();
        free(b.mm, pfn);
        assert_eq!(b.reports.take(), [], "{name}");
        b.clean();
        ledger(b.mm);
    }
}

/// A word that leads to the last bytes of a slab: a descriptor there would reach into the page behind it, which is free and not to be touched.
#[test]
fn a_descriptor_does_not_reach_out_of_its_slab() {
    let b = Bench::of(Machine::flat(PAGES).guarded());
    let mut had: Vec<_> = (0..400)
        .map(|_| b.mm.alloc_pages(GFP_KERNEL, 0).unwrap())
        .collect();
    // Every other one, so that slabs have neighbours that are ours.
    had.iter()
        .filter(|pfn| pfn.0 % 2 == 0)
        .for_each(|&pfn| free(b.mm, pfn));
    had.retain(|pfn| pfn.0 % 2 == 1);
    b.mm.drain_all();
    let objects: Vec<_> = (0..1000)
        .map(|_| b.mm.kmalloc(64, GFP_KERNEL).unwrap())
        .collect();
    let slab = |pfn: Pfn| matches!(b.mm.lookup(pfn).2, Memory::Slab(_));
    let behind = had.iter().position(|&pfn| slab(Pfn(pfn.0 - 1)));
    let behind = had.swap_remove(behind.expect("a slab before a page of ours"));
    free(b.mm, behind);
    let end = u64::from(behind.0) << 12;
    let pfn = had[7];
    for (kind, class) in [
        (PageType::File, 1),
        (PageType::Anon, 5),
        (PageType::Slab, 2),
        (PageType::PageTable, 3),
    ] {
        for back in [8, 16] {
            let word = kind as u64 | (end - back) >> 3 << 5 | class << 60;
            let old = b.overwrite(pfn, word);
            free(b.mm, pfn);
            assert_eq!(b.reports.take().len(), 1, "{kind:?}, {back} bytes");
            b.overwrite(pfn, old);
        }
    }
    b.clean();
    had.into_iter().for_each(|pfn| free(b.mm, pfn));
    objects.into_iter().for_each(|object| kfree(b.mm, object));
    assert_eq!(b.reports.take(), []);
}

#[test]
fn validate_finds_words() {
    let b = Bench::new();
    let folio =
        b.mm.alloc_folio(GFP_HIGHUSER_MOVABLE, 2, FolioKind::File)
            .unwrap();
    let table = b.mm.alloc_page_table(GFP_KERNEL, 0).unwrap();
    let large = b.mm.alloc_pages(GFP_KERNEL, 5).unwrap();
    let small = b.mm.alloc_pages(GFP_KERNEL, 2).unwrap();
    b.clean();
    let untouched = (0..PAGES)
        .rev()
        .map(Pfn)
        .find(|&p| matches!(b.mm.lookup(p).2, Memory::Untouched));
    for (name, pfn, word) in [
        (
            "a folio that says page table",
            folio,
            b.word(folio) & !0x1f | PageType::Bare as u64 | 1 << 60,
        ),
        (
            "a page table that leads 8 bytes off",
            table,
            b.word(table) + (1 << 5),
        ),
        ("a tail of a large block", large.add(17), 0x1234_5602),
        (
            "a tail that is not as its head",
            small.add(3),
            b.word(small) ^ 1 << 53,
        ),
        ("a head that is zero", small, 0),
        ("memory that nobody ever had", untouched.unwrap(), 77),
    ] {
        let old = b.overwrite(pfn, word);
        let mut reports = Vec::new();
        let found =
            b.mm.validate(|r| reports.push((r.what, r.pfn, r.to_string())));
        assert!(found.words >= 1, "{name}: {found:?}");
        assert!(
            reports
                .iter()
                .any(|r| r.0 == Corruption::BadWord && r.1 == pfn || r.1 == pfn.add(1)),
            "{name}: {reports:#?}"
        );
        b.overwrite(pfn, old);
        // A word is only told of. Lists that were made anew meanwhile are as they were.
        b.mm.validate(|_| {});
        b.clean();
    }
    for pfn in [folio, table, large, small] {
        free(b.mm, pfn);
    }
    assert_eq!(b.reports.take(), []);
    ledger(b.mm);
}

/// Free blocks in a zone's list whose buddies are not, so that nothing merges.
fn listed(b: &Bench) -> (Vec<Pfn>, Vec<Pfn>) {
    let pages: Vec<Pfn> = (0..64)
        .map(|_| b.mm.alloc_pages(GFP_KERNEL, 4).unwrap())
        .collect();
    let (keep, give): (Vec<Pfn>, Vec<Pfn>) = pages.iter().partition(|p| p.0 & 16 != 0);
    give.iter().for_each(|&pfn| free(b.mm, pfn));
    (keep, give)
}

#[test]
fn links_of_a_free_block() {
    for (name, next) in [
        ("nowhere", 0xdead_beef),
        ("itself", 0),
        ("a page that is not free", 1),
        ("another list", 2),
    ] {
        let b = Bench::new();
        let (keep, give) = listed(&b);
        b.clean();
        let victim = give[5];
        let next = match next {
            0 => victim.0,
            1 => keep[0].0,
            2 => give[0].0 + 1,
            other => other,
        };
        // SAFETY: the first 8 bytes of the free block's descriptor, in a slab.
        unsafe { b.desc(victim).write_volatile(next) };
        // Its buddy comes back, and it would be taken out of its list.
        free(b.mm, victim.buddy(4));
        let seen = b.expect(Corruption::BadLinks, victim);
        assert!(
            seen.text.contains("page freed as bare order 4"),
            "{name}: {}",
            seen.text
        );
        // It was merged all the same: by its word it is free. The rest of its list is not listed.
        let mut reports = Vec::new();
        let found = b.mm.validate(|r| reports.push(r.to_string()));
        assert_eq!((found.links, found.repaired), (1, 1), "{name}: {reports:?}");
        b.clean();
        keep.iter()
            .filter(|&&p| p != victim.buddy(4))
            .for_each(|&p| free(b.mm, p));
        assert_eq!(b.reports.take(), [], "{name}");
        b.mm.drain_all();
        ledger(b.mm);
    }
}

#[test]
fn links_that_validate_finds_first() {
    let b = Bench::new();
    let (keep, give) = listed(&b);
    // SAFETY: as above; the second link.
    unsafe { b.desc(give[7]).add(1).write_volatile(3) };
    let mut reports = Vec::new();
    let found = b.mm.validate(|r| reports.push((r.what, r.to_string())));
    assert_eq!(
        (found.links, found.errors(), found.repaired),
        (1, 1, 1),
        "{reports:?}"
    );
    assert!(
        reports[0].1.contains("list links overwritten"),
        "{reports:?}"
    );
    b.clean();
    keep.iter().for_each(|&p| free(b.mm, p));
    assert_eq!(b.reports.take(), []);
    ledger(b.mm);
}

#[test]
fn links_of_a_per_cpu_list() {
    for word in [false, true] {
        let b = Bench::new();
        let pages: Vec<Pfn> = (0..8)
            .map(|_| b.mm.alloc_pages(GFP_KERNEL, 0).unwrap())
            .collect();
        pages.iter().for_each(|&p| free(b.mm, p));
        // The last one freed comes out first.
        let victim = pages[7];
        if word {
            b.overwrite(victim, 0x77);
        } else {
            // SAFETY: the free block's descriptor.
            unsafe { b.desc(victim).write_volatile(0x0bad_0bad) };
        }
        let got = b.mm.alloc_pages(GFP_KERNEL, 0).unwrap();
        b.expect(
            if word {
                Corruption::BadWord
            } else {
                Corruption::BadLinks
            },
            victim,
        );
        // Without the word it is not handed out; with it, it is.
        assert_eq!(got == victim, !word);
        // The rest of the list is lost, and nothing of it comes out twice.
        let more: Vec<Pfn> = (0..100)
            .map(|_| b.mm.alloc_pages(GFP_KERNEL, 0).unwrap())
            .collect();
        assert!(!more.contains(&got) && pages[..7].iter().all(|p| !more.contains(p)));
        assert_eq!(b.reports.take(), []);
    }
}

/// A slab's descriptor: links 8 bytes, cache 8, pfn 4, objects 2, in use 2, order, list, …, bitmap from 32 on.
const OBJECTS: usize = 10;
const INUSE: usize = 11;
const BITMAP: usize = 16;

#[test]
fn counts_and_bitmap_of_a_slab() {
    for (name, field, value) in [
        ("in use, too many", INUSE, 40),
        ("in use, none", INUSE, 0),
        ("objects", OBJECTS, 9000),
        ("a bit", BITMAP, 0),
    ] {
        for by_validate in [false, true] {
            let b = Bench::new();
            let cache =
                b.mm.kmem_cache_create("victim", 256, 8, CacheFlags::NO_SHEAVES, None)
                    .unwrap();
            let objects: Vec<_> = (0..5)
                .map(|_| b.mm.kmem_cache_alloc(&cache, GFP_KERNEL).unwrap())
                .collect();
            let pfn = b.mm.lookup(b.mm.virt_to_pfn(objects[0].as_ptr())).0;
            let at = b.desc(pfn).cast::<u16>().wrapping_add(field);
            // SAFETY: a field of the slab's descriptor, which the test is alone with.
            let old = unsafe { at.read_volatile() };
            let new = if field == BITMAP { old ^ 0x8000 } else { value };
            // SAFETY: as above.
            unsafe { at.write_volatile(new) };
            if by_validate {
                let mut reports = Vec::new();
                let found = b.mm.validate(|r| reports.push(r.to_string()));
                assert!(
                    found.counts >= 1 && found.repaired >= 1,
                    "{name}: {found:?} {reports:?}"
                );
                assert!(
                    reports.iter().any(|r| r.contains("victim")),
                    "{name}: {reports:?}"
                );
                assert!(
                    found.links == 0 && found.words == 0,
                    "{name}: {found:?} {reports:?}"
                );
                b.clean();
            } else {
                cache_free(b.mm, &cache, objects[4]);
                b.expect(Corruption::BadCounts, pfn);
                objects[..4]
                    .iter()
                    .for_each(|&o| cache_free(b.mm, &cache, o));
                assert_eq!(b.reports.take(), [], "{name}");
                if field != BITMAP {
                    // The counts were set right; a lost bit is a lost object, which nobody can tell from one in use.
                    b.mm.kmem_cache_shrink(&cache);
                    assert_eq!(slabinfo(b.mm, "victim").0, 0, "{name}");
                    b.clean();
                }
            }
        }
    }
}

#[test]
fn links_of_a_slab() {
    let b = Bench::new();
    let cache =
        b.mm.kmem_cache_create("victim", 256, 8, CacheFlags::NO_SHEAVES, None)
            .unwrap();
    let all: Vec<_> = (0..200)
        .map(|_| b.mm.kmem_cache_alloc(&cache, GFP_KERNEL).unwrap())
        .collect();
    // One of each slab goes back, so that they are partial.
    let pfn = b.mm.lookup(b.mm.virt_to_pfn(all[40].as_ptr())).0;
    // SAFETY: the links of the slab's descriptor.
    unsafe { b.desc(pfn).write_volatile(0x7777_7777) };
    cache_free(b.mm, &cache, all[40]);
    b.expect(Corruption::BadLinks, pfn);
    let found = b.mm.validate(|_| {});
    assert!(found.errors() >= 1 && found.repaired >= 1, "{found:?}");
    b.clean();
    all.iter()
        .enumerate()
        .filter(|(i, _)| *i != 40)
        .for_each(|(_, &o)| cache_free(b.mm, &cache, o));
    assert_eq!(b.reports.take(), []);
    b.mm.kmem_cache_shrink(&cache);
    assert_eq!(slabinfo(b.mm, "victim").0, 0);
    b.mm.kmem_cache_destroy(cache).unwrap();
    ledger(b.mm);
}

#[test]
fn a_slab_whose_descriptor_leads_elsewhere() {
    let b = Bench::new();
    let object = b.mm.kmalloc(100, GFP_KERNEL).unwrap();
    let pfn = b.mm.lookup(b.mm.virt_to_pfn(object.as_ptr())).0;
    let cache = b.desc(pfn).cast::<u64>().wrapping_add(1);
    // SAFETY: the slab's pointer to its cache; put right again below.
    let old = unsafe { cache.replace(0x4141_4141_4141_4141) };
    kfree(b.mm, object);
    let seen = b.reports.one();
    assert_eq!(seen.what, Corruption::BadWord, "{}", seen.text);
    assert!(seen.text.contains("cache unknown"), "{}", seen.text);
    // SAFETY: as above.
    unsafe { cache.write(old) };
    kfree(b.mm, object);
    assert_eq!(b.reports.take(), []);
    b.clean();
}

#[test]
fn the_counts_of_a_folio() {
    let b = Bench::new();
    let pfn =
        b.mm.alloc_folio(GFP_HIGHUSER_MOVABLE, 0, FolioKind::Anon)
            .unwrap();
    let counts = b.desc(pfn).cast::<u64>().wrapping_add(1);
    // SAFETY: the folio's counts; put right again below.
    let old = unsafe { counts.replace(0) };
    let mut reports = Vec::new();
    let found =
        b.mm.validate(|r| reports.push((r.what, r.pfn, r.to_string())));
    assert_eq!((found.counts, found.errors()), (1, 1), "{reports:?}");
    assert_eq!((reports[0].0, reports[0].1), (Corruption::BadCounts, pfn));
    assert!(reports[0].2.contains("refs 0, mapped 0"), "{reports:?}");
    // SAFETY: as above.
    unsafe { counts.write(old) };
    b.clean();
    free(b.mm, pfn);
    assert_eq!(b.reports.take(), []);
}
