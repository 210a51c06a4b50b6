//! The whole table of memory types, as `ARCHITECTURE.md` has it: each is allocated, found by its head and by every tail, refused what it forbids by a message that
//! names type and page, and freed; then the ledger balances. The document's rows are held against what is found here.
#![allow(missing_docs)]

mod common;

use std::collections::BTreeMap;

use common::{Machine, Reports, page, range};
use memdesc::gfp::*;
use memdesc::mmap::*;
use memdesc::*;
use memdesc_host::Host;

const PAGES: u32 = 8192;

/// How users may have pages of a type.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Mappable {
    No,
    /// By `insert_page` and by faults; each mapping keeps them.
    Counted,
    /// By `insert_pfn`; who maps them answers for it.
    Uncounted,
}

/// The calls that free something, of which one or none is right.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Call {
    FreePages,
    FreePagesNolock,
    Kfree,
    Vfree,
    PutPoolPage,
}

const CALLS: [Call; 5] = [
    Call::FreePages,
    Call::FreePagesNolock,
    Call::Kfree,
    Call::Vfree,
    Call::PutPoolPage,
];

/// Something of a type.
struct Made<'m> {
    head: Pfn,
    order: usize,
    /// Calls that free it; the others have to be refused.
    right: &'static [Call],
    free: Box<dyn FnOnce() + 'm>,
}

struct Row {
    name: &'static str,
    /// In bytes; nothing for what the word says itself.
    descriptor: Option<usize>,
    mappable: Mappable,
    make: for<'m> fn(&'m Mm<Host>) -> Made<'m>,
}

fn call(mm: &Mm<Host>, what: Call, pfn: Pfn) {
    // SAFETY: wrong calls are found and refused; right ones are of the test's own pages.
    unsafe {
        match what {
            Call::FreePages => mm.free_pages(pfn),
            Call::FreePagesNolock => mm.free_pages_nolock(pfn),
            Call::Kfree => mm.kfree(page(mm, pfn)),
            Call::Vfree => mm.vfree(page(mm, pfn)),
            Call::PutPoolPage => mm.page_pool_put_page(pfn),
        }
    }
}

const PAGE_CALLS: &[Call] = &[Call::FreePages, Call::FreePagesNolock];

/// Freed by `free_pages`.
fn block(mm: &Mm<Host>, head: Pfn, order: usize) -> Made<'_> {
    Made {
        head,
        order,
        right: PAGE_CALLS,
        free: Box::new(move || common::free(mm, head)),
    }
}

fn folio(mm: &Mm<Host>, kind: FolioKind) -> Made<'_> {
    block(mm, mm.alloc_folio(GFP_KERNEL, 4, kind).unwrap(), 4)
}

/// The kernel's own for good.
fn kernel(mm: &Mm<Host>, what: Reserved) -> Made<'_> {
    mm.reserve_pages(Pfn(7168), 64, what).unwrap();
    Made {
        head: Pfn(7168),
        order: 6,
        right: &[],
        free: Box::new(|| ()),
    }
}

struct Ring;

impl OwnType for Ring {
    const NUMBER: u8 = 1;
    const NAME: &'static str = "ring";
    const MAPPABLE: bool = true;
}

fn rows() -> Vec<Row> {
    use Mappable::{Counted, No, Uncounted};
    let row = |name, descriptor, mappable, make| Row {
        name,
        descriptor,
        mappable,
        make,
    };
    vec![
        row("free", Some(8), No, |mm| {
            // Out and back: free, and not where the test's own requests for kernel memory look first.
            let kernel = mm.alloc_pages(GFP_KERNEL, 0).unwrap();
            let head = mm.alloc_pages(GFP_HIGHUSER_MOVABLE, 9).unwrap();
            common::free(mm, head);
            let (head, order, _) = mm.lookup(head);
            Made {
                head,
                order,
                right: &[],
                free: Box::new(move || common::free(mm, kernel)),
            }
        }),
        row("bare", Some(8), No, |mm| {
            block(mm, mm.alloc_pages(GFP_KERNEL, 2).unwrap(), 2)
        }),
        row("set_aside", Some(8), No, |mm| {
            let demand = Demand::Pages { order: 4, count: 1 };
            let reserve = mm.reserve("table", demand).unwrap();
            reserve.connect(None).unwrap();
            let found = (0..PAGES).find(|&pfn| matches!(mm.lookup(Pfn(pfn)).2, Memory::SetAside));
            Made {
                head: Pfn(found.unwrap()),
                order: 4,
                right: &[],
                free: Box::new(move || {
                    reserve.disconnect().unwrap();
                    assert!(reserve.destroy().is_ok());
                }),
            }
        }),
        row("driver", Some(size_of::<Folio>()), Counted, |mm| {
            folio(mm, FolioKind::Driver)
        }),
        row("slab", Some(size_of::<Slab>()), No, |mm| {
            let object = mm.kmalloc(512, GFP_KERNEL).unwrap();
            let (head, order, _) = mm.lookup(mm.virt_to_pfn(object.as_ptr()));
            Made {
                head,
                order,
                right: &[Call::Kfree],
                free: Box::new(move || common::kfree(mm, object)),
            }
        }),
        row("large_kmalloc", Some(8), No, |mm| {
            let object = mm.kmalloc(60_000, GFP_KERNEL).unwrap();
            Made {
                head: mm.virt_to_pfn(object.as_ptr()),
                order: 4,
                right: &[Call::FreePages, Call::FreePagesNolock, Call::Kfree],
                free: Box::new(move || common::kfree(mm, object)),
            }
        }),
        row("page_table", Some(size_of::<PtDesc>()), No, |mm| {
            block(mm, mm.alloc_page_table(GFP_KERNEL, 0).unwrap(), 0)
        }),
        row("file", Some(size_of::<Folio>()), Counted, |mm| {
            folio(mm, FolioKind::File)
        }),
        row("anon", Some(size_of::<Folio>()), Counted, |mm| {
            folio(mm, FolioKind::Anon)
        }),
        row("vmalloc", Some(size_of::<VmArea>()), Uncounted, |mm| {
            let area = mm.vmalloc(4096, GFP_KERNEL).unwrap();
            Made {
                head: mm.vmalloc_to_pfn(area.as_ptr()).unwrap(),
                order: 0,
                right: &[],
                // SAFETY: ours.
                free: Box::new(move || unsafe { mm.vfree(area) }),
            }
        }),
        row("kernel stack", Some(size_of::<VmArea>()), No, |mm| {
            let stack = mm.alloc_kernel_stack(1, 7).unwrap();
            Made {
                head: mm.vmalloc_to_pfn(stack.bottom().as_ptr()).unwrap(),
                order: 0,
                right: &[],
                // SAFETY: ours, and nobody runs on it.
                free: Box::new(move || unsafe { mm.free_kernel_stack(stack) }),
            }
        }),
        row("net_pool", Some(size_of::<Folio>()), Counted, |mm| {
            let params = PagePoolParams {
                order: 1,
                pool_size: 4,
                ..Default::default()
            };
            let mut pool = mm.page_pool_create(params).unwrap();
            let head = pool.alloc(GFP_KERNEL).unwrap();
            Made {
                head,
                order: 1,
                right: &[Call::PutPoolPage],
                free: Box::new(move || {
                    call(mm, Call::PutPoolPage, head);
                    drop(pool);
                }),
            }
        }),
        row("device", Some(size_of::<Folio>()), Counted, |mm| {
            let mut device = mm.memremap_pages(Pfn(2 * PAGES), 512).unwrap();
            let head = Pfn(2 * PAGES + 8);
            device.folio(head, 3, GFP_KERNEL).unwrap();
            Made {
                head,
                order: 3,
                right: &[],
                free: Box::new(move || {
                    // SAFETY: the device's reference.
                    unsafe { device.put(head) };
                    device.unplug().unwrap();
                }),
            }
        }),
        row("ring", Some(size_of::<Folio>()), Counted, |mm| {
            let rings = mm.register_type::<Ring>().unwrap();
            let Ok(head) = rings.alloc(GFP_KERNEL, 2, Ring) else {
                unreachable!()
            };
            Made {
                head,
                order: 2,
                right: PAGE_CALLS,
                free: Box::new(move || {
                    common::free(mm, head);
                    rings.unregister().unwrap();
                }),
            }
        }),
        row("zsmalloc", Some(size_of::<ZsDesc>()), No, |mm| {
            let pool = mm.zs_create_pool("table").unwrap();
            let handle = mm.zs_malloc(&pool, 2000, GFP_KERNEL).unwrap();
            let mut head = Pfn(0);
            mm.census_visit(|step| {
                if step.kind == CensusKind::Zsmalloc {
                    head = step.pfn;
                }
            });
            Made {
                head,
                order: 0,
                right: &[],
                free: Box::new(move || {
                    mm.zs_free(&pool, handle);
                    mm.zs_destroy_pool(pool).unwrap();
                }),
            }
        }),
        row("memory_map", None, No, |mm| {
            let head = mm.lookup(Pfn(PAGES - 1)).0;
            Made {
                head,
                order: mm.lookup(head).1,
                right: &[],
                free: Box::new(|| ()),
            }
        }),
        row("kernel_text", None, No, |mm| {
            kernel(mm, Reserved::KernelText)
        }),
        row("kernel_data", None, No, |mm| {
            kernel(mm, Reserved::KernelData)
        }),
        row("offline", None, No, |mm| {
            mm.offline_pages(Pfn(6144), 512).unwrap();
            Made {
                head: Pfn(6144),
                order: 9,
                right: &[],
                free: Box::new(move || mm.online_pages(Pfn(6144), 512).unwrap()),
            }
        }),
        row("balloon", None, No, |mm| {
            let balloon = Balloon::new(mm);
            assert_eq!(balloon.inflate(512, GFP_KERNEL), 512);
            let mut found = (Pfn(0), 0);
            mm.census_visit(|step| {
                if step.kind == CensusKind::Balloon {
                    found = (step.pfn, step.order.unwrap());
                }
            });
            Made {
                head: found.0,
                order: found.1,
                right: &[],
                free: Box::new(move || {
                    assert_eq!(balloon.deflate(512), 512);
                }),
            }
        }),
        row("guard", None, No, |mm| {
            let head = mm.alloc_guard(GFP_KERNEL, 3).unwrap();
            Made {
                head,
                order: 3,
                right: &[],
                free: Box::new(move || {
                    // SAFETY: ours.
                    unsafe { mm.unguard_pages(head) };
                    common::free(mm, head);
                }),
            }
        }),
        row("hwpoison", None, No, |mm| {
            let head = mm.alloc_pages(GFP_KERNEL, 0).unwrap();
            common::free(mm, head);
            assert_eq!(mm.memory_failure(head).result, MfResult::Recovered);
            Made {
                head,
                order: 0,
                right: &[],
                free: Box::new(move || mm.unpoison_memory(head).unwrap()),
            }
        }),
    ]
}

fn boot(reports: &Reports) -> (Machine, Mm<Host>) {
    let machine = Machine::flat(PAGES);
    let host = machine.host().device(range(2 * PAGES, 2 * PAGES + 512, 0));
    let mm = machine.boot_on(reports.on(host).build().unwrap());
    // The words of a device's memory stay when it goes.
    let device = mm.memremap_pages(Pfn(2 * PAGES), 512).unwrap();
    device.unplug().unwrap();
    (machine, mm)
}

/// The message says which page it is about, and what that page is.
#[track_caller]
fn names(text: &str, name: &str, pfn: Pfn) {
    assert!(text.contains(name), "{name}: {text}");
    assert!(text.contains(&format!("{pfn:?}")), "{pfn:?}: {text}");
}

#[test]
fn the_whole_table() {
    for row in rows() {
        let reports = Reports::default();
        let (_, mm) = boot(&reports);
        // What is reserved is so for good; and the table of reserves stays.
        assert!(mm.reserve("first", Demand::None).unwrap().destroy().is_ok());
        let users =
            |ledger: &Ledger| common::users(ledger) - ledger.by_type[PageType::Reserved as usize];
        let before = users(&common::ledger(&mm));
        let made = (row.make)(&mm);
        let (head, order) = (made.head, made.order);
        let name = mm.type_name(head);
        assert_eq!(name, row.name);

        // Found by its head and by every tail.
        for nth in 0..1 << order {
            let (h, o, memory) = mm.lookup(head.add(nth));
            assert_eq!((h, o), (head, order), "{name}: page {nth} is {memory:?}");
            assert_eq!(mm.type_name(head.add(nth)), name);
        }

        // Mapped, or not.
        let last = head.add((1 << order) - 1);
        let counted = row.mappable == Mappable::Counted;
        assert_eq!(mm.folio_get(last).is_some(), counted, "{name}");
        {
            let space = MmStruct::new(&mm, 1).unwrap();
            let at = space
                .mmap(None, 8192, VmFlags::READ_WRITE, Map::Anon)
                .unwrap();
            match space.insert_page(at, last) {
                Ok(()) => assert!(counted, "{name} was mapped"),
                Err(why) => {
                    assert_eq!(
                        (counted, why),
                        (false, InsertError::Refused(last, row.name))
                    );
                    names(&why.to_string(), name, last);
                }
            }
            // SAFETY: the pages stay as long as the space.
            match unsafe { space.insert_pfn(at + 4096, last) } {
                Ok(()) => assert_eq!(row.mappable, Mappable::Uncounted, "{name}"),
                Err(why) => {
                    assert_ne!(row.mappable, Mappable::Uncounted, "{name}");
                    names(&why.to_string(), name, last);
                }
            }
            if row.mappable != Mappable::No {
                let there = if counted { at } else { at + 4096 };
                // Calls read and write what is counted.
                assert_eq!(space.write(there, &[1]).is_ok(), counted, "{name}");
                let page = space.pin_user_page(there, Access::Write);
                assert_eq!(page.is_ok(), counted, "{name}");
            }
        }
        assert!(reports.take().is_empty());

        // Freed by the wrong call, or at the wrong page.
        for what in CALLS {
            // A kernel stack's page is vmalloc memory to who frees pages.
            let named = match name {
                "kernel stack" => "vmalloc",
                name => name,
            };
            if !made.right.contains(&what) {
                call(&mm, what, head);
                names(&reports.one().text, named, head);
                assert_eq!(mm.lookup(head).0, head, "{name} after {what:?}");
            } else if order > 0 && what != Call::PutPoolPage && name != "slab" {
                call(&mm, what, head.add(1));
                names(&reports.one().text, named, head.add(1));
            }
        }
        for nth in 0..1 << order {
            assert_eq!(
                (mm.lookup(head.add(nth)).0, mm.type_name(head)),
                (head, name)
            );
        }

        // Freed by the right one.
        (made.free)();
        assert!(reports.take().is_empty(), "{name}");
        mm.shrink();
        mm.shrink();
        let after = common::ledger(&mm);
        assert_eq!(users(&after), before, "{name}: {after:?}");
    }
}

#[test]
fn the_document_says_the_same() {
    let text = include_str!("../../../ARCHITECTURE.md");
    let (_, table) = text
        .split_once("## Memory types")
        .expect("there is a table");
    let lines = table.lines().skip_while(|l| !l.starts_with("|---"));
    let written: BTreeMap<String, Vec<String>> = lines
        .skip(1)
        .take_while(|l| l.starts_with('|'))
        .map(|l| {
            let cells = l.trim_matches('|').split('|');
            let cells: Vec<_> = cells.map(|c| c.trim().replace('`', "")).collect();
            (cells[0].clone(), cells)
        })
        .collect();
    let rows = rows();
    for row in &rows {
        let cells = &written
            .get(row.name)
            .unwrap_or_else(|| panic!("no row for {}", row.name));
        let bytes = row.descriptor.map_or("none".to_owned(), |n| n.to_string());
        assert_eq!(cells[2], bytes, "{}", row.name);
        let mappable = match row.mappable {
            Mappable::No => "no",
            Mappable::Counted => "counted",
            Mappable::Uncounted => "uncounted",
        };
        assert_eq!(cells[3], mappable, "{}", row.name);
        let path = cells.last().unwrap().trim_start_matches("tests/");
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests")
            .join(path);
        assert!(path.exists(), "{path:?}");
    }
    assert_eq!(written.len(), rows.len(), "{:?}", written.keys());
}
