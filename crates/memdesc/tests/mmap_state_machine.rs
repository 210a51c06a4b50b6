//! Random histories of address spaces and a file against a plain model: who sees which byte where. Half of the accesses are real loads and stores
//! through the process's own mappings; folios are moved, split, reclaimed and compacted all the while. After each step that may upset them the counts agree with the
//! tables, and at the end the ledger balances.
#![cfg(not(miri))]
#![allow(missing_docs)]

mod common;

use std::collections::BTreeMap;
use std::sync::Mutex;

use common::Machine;
use memdesc::filemap::{FileError, Mapping, MappingOps};
use memdesc::gfp::*;
use memdesc::mmap::*;
use memdesc::*;
use memdesc_host::{Host, UserView};
use proptest::prelude::*;

const PAGES: u64 = 1536;
const FILE: u64 = 1200;
const FIRST: u64 = 512;

#[derive(Clone, Debug)]
enum Op {
    Map {
        space: usize,
        page: u64,
        len: u64,
        what: u8,
    },
    Unmap {
        space: usize,
        page: u64,
        len: u64,
    },
    Protect {
        space: usize,
        page: u64,
        len: u64,
        write: bool,
    },
    Write {
        space: usize,
        page: u64,
        value: u8,
        real: bool,
    },
    Read {
        space: usize,
        page: u64,
        real: bool,
    },
    Fork {
        space: usize,
    },
    Exit {
        space: usize,
    },
    Pin {
        space: usize,
        page: u64,
    },
    Unpin,
    Move {
        space: usize,
        page: u64,
    },
    Split {
        space: usize,
        page: u64,
        to: usize,
    },
    Compact {
        space: usize,
        page: u64,
    },
    FileWrite {
        page: u64,
        value: u8,
    },
    Writeback,
    Truncate {
        pages: u64,
    },
    Reclaim,
    Check,
}

fn op() -> impl Strategy<Value = Op> {
    let space = 0..4usize;
    // Near each other, so that things meet.
    let page = prop_oneof![6 => 0..8u64, 2 => 508..516u64, 2 => 1022..1028u64, 1 => 0..PAGES];
    let len = prop_oneof![1..20u64, 1..700u64];
    prop_oneof![
        4 => (space.clone(), page.clone(), len.clone(), 0..6u8)
            .prop_map(|(space, page, len, what)| Op::Map { space, page, len, what }),
        2 => (space.clone(), page.clone(), len.clone()).prop_map(|(space, page, len)| Op::Unmap { space, page, len }),
        1 => (space.clone(), page.clone(), len, any::<bool>())
            .prop_map(|(space, page, len, write)| Op::Protect { space, page, len, write }),
        12 => (space.clone(), page.clone(), any::<u8>(), any::<bool>())
            .prop_map(|(space, page, value, real)| Op::Write { space, page, value, real }),
        8 => (space.clone(), page.clone(), any::<bool>()).prop_map(|(space, page, real)| Op::Read { space, page, real }),
        2 => space.clone().prop_map(|space| Op::Fork { space }),
        1 => space.clone().prop_map(|space| Op::Exit { space }),
        1 => (space.clone(), page.clone()).prop_map(|(space, page)| Op::Pin { space, page }),
        1 => Just(Op::Unpin),
        3 => (space.clone(), page.clone()).prop_map(|(space, page)| Op::Move { space, page }),
        2 => (space.clone(), page.clone(), 0..5usize).prop_map(|(space, page, to)| Op::Split { space, page, to }),
        1 => (space, page.clone()).prop_map(|(space, page)| Op::Compact { space, page }),
        3 => (page, any::<u8>()).prop_map(|(page, value)| Op::FileWrite { page, value }),
        1 => Just(Op::Writeback),
        1 => (0..FILE).prop_map(|pages| Op::Truncate { pages }),
        1 => Just(Op::Reclaim),
        2 => Just(Op::Check),
    ]
}

/// A page of a space, as the model knows it.
#[derive(Clone, Copy, Debug)]
struct Page {
    value: Value,
    writable: bool,
}

#[derive(Clone, Copy, Debug)]
enum Value {
    Own(u8),
    Private(u64),
    Shared(u64),
}

struct Disk(Mutex<BTreeMap<u64, u8>>);

impl MappingOps for Disk {
    fn read_folio(&self, index: u64, pages: &mut [u8]) -> Result<(), FileError> {
        let written = self.0.lock().unwrap();
        for (nth, page) in (index..).zip(pages.chunks_mut(4096)) {
            page.fill(written.get(&nth).copied().unwrap_or(nth as u8));
        }
        Ok(())
    }
    fn writepage(&self, index: u64, pages: &[u8]) -> Result<(), FileError> {
        let mut written = self.0.lock().unwrap();
        for (nth, page) in (index..).zip(pages.chunks(4096)) {
            written.insert(nth, page[0]);
        }
        Ok(())
    }
}

struct Model {
    spaces: Vec<BTreeMap<u64, Page>>,
    file: BTreeMap<u64, u8>,
    size: u64,
}

impl Model {
    fn of_file(&self, index: u64) -> Option<u8> {
        (index < self.size).then(|| self.file.get(&index).copied().unwrap_or(index as u8))
    }

    fn read(&self, space: usize, page: u64) -> Option<u8> {
        match self.spaces[space].get(&page)?.value {
            Value::Own(v) => Some(v),
            Value::Private(index) | Value::Shared(index) => self.of_file(index),
        }
    }

    fn write(&mut self, space: usize, page: u64, value: u8) -> bool {
        if self.read(space, page).is_none() {
            return false;
        }
        let Some(p) = self.spaces[space].get_mut(&page).filter(|p| p.writable) else {
            return false;
        };
        match p.value {
            Value::Shared(index) => {
                self.file.insert(index, value);
            }
            _ => p.value = Value::Own(value),
        }
        true
    }
}

fn addr(page: u64) -> u64 {
    (FIRST + page) * 4096
}

fn run(ops: &[Op], rt: bool) {
    let mut machine = Machine::flat(20 << 8);
    machine.config.preempt_rt = rt;
    let mm = machine.boot();
    let disk = Disk(Mutex::new(BTreeMap::new()));
    let top = addr(PAGES);
    {
        let file = Mapping::new(&mm, &disk, FILE).unwrap();
        // A view borrows its space, and spaces come and go: each lies in a box, and its view goes first.
        let mut spaces: Vec<(Option<UserView<'_>>, Box<MmStruct<'_, Host>>)> = Vec::new();
        let mut asid = 0;
        let mut model = Model {
            spaces: Vec::new(),
            file: BTreeMap::new(),
            size: FILE,
        };
        let mut pins: Vec<(UserPages<'_, Host>, u64, u64)> = Vec::new();
        let view_of = |space: &MmStruct<'_, Host>| {
            // SAFETY: the view is dropped before its box, see above.
            let space: &'static MmStruct<'_, Host> = unsafe { &*(&raw const *space).cast() };
            UserView::new(space).unwrap()
        };
        for op in ops {
            if spaces.is_empty() {
                asid += 1;
                let space = Box::new(MmStruct::with_top(&mm, asid % 256, top).unwrap());
                spaces.push((Some(view_of(&space)), space));
                model.spaces.push(BTreeMap::new());
            }
            let pick = |space: usize| space % spaces.len();
            match *op {
                Op::Map {
                    space,
                    page,
                    len,
                    what,
                } => {
                    let s = pick(space);
                    let len = len.min(PAGES - page);
                    let (flags, index) = match what {
                        0 => (VmFlags::READ_WRITE, None),
                        1 => (VmFlags::READ_WRITE.with(VmFlags::LARGE), None),
                        2 => (VmFlags::READ_WRITE.with(VmFlags::HUGE), None),
                        3 => (VmFlags::READ_WRITE, Some(page)),
                        4 => (VmFlags::READ_WRITE.with(VmFlags::SHARED), Some(page)),
                        _ => (
                            VmFlags::READ_WRITE
                                .with(VmFlags::SHARED)
                                .with(VmFlags::HUGE),
                            Some(page),
                        ),
                    };
                    let map = index.map_or(Map::Anon, |index| Map::File(&file, index));
                    let free = (page..page + len).all(|p| !model.spaces[s].contains_key(&p));
                    let got = spaces[s].1.mmap(Some(addr(page)), len * 4096, flags, map);
                    assert_eq!(
                        got,
                        if free {
                            Ok(addr(page))
                        } else {
                            Err(AllocError::Busy)
                        }
                    );
                    if free {
                        for p in page..page + len {
                            let value = match index {
                                None => Value::Own(0),
                                Some(_) if flags.contains(VmFlags::SHARED) => Value::Shared(p),
                                Some(_) => Value::Private(p),
                            };
                            model.spaces[s].insert(
                                p,
                                Page {
                                    value,
                                    writable: true,
                                },
                            );
                        }
                    }
                }
                Op::Unmap { space, page, len } => {
                    let s = pick(space);
                    let id = spaces[s].1.asid();
                    spaces[s]
                        .1
                        .munmap(addr(page), len.min(PAGES - page) * 4096)
                        .unwrap();
                    for p in page..(page + len).min(PAGES) {
                        model.spaces[s].remove(&p);
                    }
                    pins.retain(|&(_, at, p)| at != id || p < page || p >= page + len);
                }
                Op::Protect {
                    space,
                    page,
                    len,
                    write,
                } => {
                    let s = pick(space);
                    let flags = if write {
                        VmFlags::READ_WRITE
                    } else {
                        VmFlags::READ
                    };
                    spaces[s]
                        .1
                        .mprotect(addr(page), len.min(PAGES - page) * 4096, flags)
                        .unwrap();
                    for p in page..(page + len).min(PAGES) {
                        if let Some(p) = model.spaces[s].get_mut(&p) {
                            p.writable = write;
                        }
                    }
                }
                Op::Write {
                    space,
                    page,
                    value,
                    real,
                } => {
                    let s = pick(space);
                    let may = model.write(s, page, value);
                    if real && may {
                        // SAFETY: the model says that it may be written, and nobody else is there.
                        unsafe {
                            spaces[s]
                                .0
                                .as_ref()
                                .unwrap()
                                .ptr(addr(page))
                                .write_volatile(value)
                        };
                    } else {
                        assert_eq!(
                            spaces[s].1.write(addr(page), &[value]).is_ok(),
                            may,
                            "{op:?}"
                        );
                    }
                }
                Op::Read { space, page, real } => {
                    let s = pick(space);
                    let expected = model.read(s, page);
                    if real && expected.is_some() {
                        // SAFETY: as above, to be read.
                        let v = unsafe {
                            spaces[s]
                                .0
                                .as_ref()
                                .unwrap()
                                .ptr(addr(page))
                                .read_volatile()
                        };
                        assert_eq!(Some(v), expected, "{op:?}");
                    } else {
                        let mut v = [0];
                        let got = spaces[s].1.read(addr(page), &mut v).ok().map(|()| v[0]);
                        assert_eq!(got, expected, "{op:?}");
                    }
                }
                Op::Fork { space } if spaces.len() < 4 => {
                    let s = pick(space);
                    asid += 1;
                    let child = Box::new(spaces[s].1.fork(asid % 256).unwrap());
                    spaces.push((Some(view_of(&child)), child));
                    let same = model.spaces[s].clone();
                    model.spaces.push(same);
                }
                Op::Fork { .. } => {}
                Op::Exit { space } => {
                    let s = pick(space);
                    let (view, space) = spaces.swap_remove(s);
                    pins.retain(|&(_, at, _)| at != space.asid());
                    drop(view);
                    drop(space);
                    model.spaces.swap_remove(s);
                }
                Op::Pin { space, page } => {
                    let s = pick(space);
                    let own = matches!(
                        model.spaces[s].get(&page),
                        Some(Page {
                            value: Value::Own(_),
                            writable: true
                        })
                    );
                    if own && pins.len() < 8 {
                        let pin = spaces[s]
                            .1
                            .pin_user_page(addr(page), Access::Write)
                            .unwrap();
                        pins.push((pin, spaces[s].1.asid(), page));
                    }
                }
                Op::Unpin => {
                    pins.pop();
                }
                Op::Move { space, page } => {
                    let s = pick(space);
                    if let Some((folio, at)) = spaces[s].1.page_at(addr(page)) {
                        let (order, pinned) = (folio.order(), folio.is_pinned());
                        drop(folio);
                        if let Ok(to) = mm.alloc_pages(GFP_HIGHUSER_MOVABLE & !__GFP_RECLAIM, order)
                        {
                            // SAFETY: bare pages of ours.
                            let moved = unsafe { mm.migrate_folio(at, to) };
                            assert_eq!(moved.is_ok(), !pinned, "{op:?} {moved:?}");
                            // SAFETY: the one that is not used any more is ours.
                            unsafe { mm.free_pages(moved.unwrap_or(to)) };
                        }
                    }
                }
                Op::Split { space, page, to } => {
                    let s = pick(space);
                    if let Some((folio, _)) = spaces[s].1.page_at(addr(page)) {
                        let able = folio.order() > to && !folio.is_pinned();
                        assert_eq!(mm.split_folio(&folio, to).is_ok(), able, "{op:?} {folio:?}");
                    }
                }
                Op::Compact { space, page } => {
                    let s = pick(space);
                    if let Some((folio, at)) = spaces[s].1.page_at(addr(page)) {
                        drop(folio);
                        let start = Pfn(at.0 & !63);
                        if mm.alloc_contig_range(start, 64).is_ok() {
                            // SAFETY: just had.
                            unsafe { mm.free_contig_range(start, 64) };
                        }
                    }
                }
                Op::FileWrite { page, value } => {
                    let may = page < model.size;
                    assert_eq!(file.write(page * 4096, &[value]).is_ok(), may);
                    if may {
                        model.file.insert(page, value);
                    }
                }
                Op::Writeback => {
                    file.writeback(0..=u64::MAX).unwrap();
                    assert!(!file.is_dirty());
                    for (index, value) in &model.file {
                        if *index < model.size {
                            assert_eq!(
                                disk.0.lock().unwrap().get(index),
                                Some(value),
                                "page {index}"
                            );
                        }
                    }
                }
                Op::Truncate { pages } => {
                    // Seldom far: else there is soon no file.
                    let pages = model.size.min(pages.max(model.size.saturating_sub(50)));
                    file.truncate(pages);
                    model.size = pages;
                }
                Op::Reclaim => {
                    let request = ReclaimRequest {
                        gfp: GFP_KERNEL,
                        order: 0,
                        attempt: 3,
                    };
                    mm.try_to_free_pages(&request);
                }
                Op::Check => {
                    let mut seen = vec![0; (20 << 8) + 1];
                    let all: Vec<_> = spaces.iter().map(|(_, s)| &**s).collect();
                    let report = MmStruct::check_all(&all, &mut seen).unwrap();
                    assert!(report.referenced <= pins.len() as u64, "{report:?}");
                    for (pin, at, page) in &pins {
                        let s = all.iter().position(|s| s.asid() == *at).unwrap();
                        // SAFETY: pinned.
                        let v = unsafe { mm.page_address(pin.pfn()).read_volatile() };
                        assert_eq!(Some(v), model.read(s, *page), "pinned page {page}");
                    }
                }
            }
        }
        for (s, (_, space)) in spaces.iter().enumerate() {
            for page in 0..PAGES {
                let mut v = [0];
                let got = space.read(addr(page), &mut v).ok().map(|()| v[0]);
                assert_eq!(got, model.read(s, page), "space {s}, page {page}");
            }
        }
        drop(pins);
        for (view, space) in spaces {
            drop(view);
            drop(space);
        }
    }
    mm.shrink();
    let ledger = mm.ledger();
    assert!(ledger.balanced, "{ledger:?}");
    for kind in [PageType::Anon, PageType::File, PageType::PageTable] {
        assert_eq!(mm.pages_of(kind), 0, "{kind:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, failure_persistence: None, max_shrink_iters: 4000, ..ProptestConfig::default() })]
    #[test]
    fn every_byte_is_where_the_model_says(ops in prop::collection::vec(op(), 1..800), rt in any::<bool>()) {
        run(&ops, rt);
    }
}
