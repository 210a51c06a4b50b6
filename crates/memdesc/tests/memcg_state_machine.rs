//! Random histories of groups against a plain model: pages, folios, objects and areas that are charged, freed by any path, split, moved and retyped; limits that
//! refuse exactly when the model says so; groups deleted while something is charged to them.
#![allow(missing_docs)]

mod common;

use std::collections::BTreeMap;
use std::ptr::NonNull;

use common::*;
use memdesc::gfp::*;
use memdesc::*;
use memdesc_host::Host;

const PAGE: u64 = PAGE_SIZE as u64;

/// What the model knows of a group.
#[derive(Clone, Debug)]
struct Group {
    parent: u16,
    online: bool,
    children: u32,
    limit: u64,
    usage: u64,
    watermark: u64,
    stats: [u64; MemcgStat::COUNT],
}

#[derive(Default)]
struct Model(BTreeMap<u16, Group>);

impl Model {
    /// The group and all above it.
    fn path(&self, id: u16) -> Vec<u16> {
        let mut path = Vec::new();
        let mut at = id;
        while at != 0 {
            path.push(at);
            at = self.0[&at].parent;
        }
        path
    }

    /// Whom a charge to this group goes to: the nearest that is online.
    fn charged(&self, id: u16) -> u16 {
        let mut path = self.path(id).into_iter();
        path.find(|id| self.0[id].online).unwrap_or(0)
    }

    fn fits(&self, id: u16, bytes: u64) -> bool {
        let room = |id: &u16| self.0[id].usage + bytes <= self.0[id].limit;
        self.path(id).iter().all(room)
    }

    /// A level above refuses: those below it stood higher for a moment.
    fn refuse(&mut self, id: u16, bytes: u64) {
        for at in self.path(id) {
            let group = self.0.get_mut(&at).unwrap();
            if group.usage + bytes > group.limit {
                break;
            }
            group.watermark = group.watermark.max(group.usage + bytes);
        }
    }

    fn charge(&mut self, id: u16, stat: MemcgStat, bytes: u64) {
        for at in self.path(id) {
            let group = self.0.get_mut(&at).unwrap();
            group.usage += bytes;
            group.watermark = group.watermark.max(group.usage);
        }
        if let Some(group) = self.0.get_mut(&id) {
            group.stats[stat as usize] += bytes;
        }
    }

    fn uncharge(&mut self, id: u16, stat: MemcgStat, bytes: u64) {
        for at in self.path(id) {
            self.0.get_mut(&at).unwrap().usage -= bytes;
        }
        if let Some(group) = self.0.get_mut(&id) {
            group.stats[stat as usize] -= bytes;
        }
        self.bury(id);
    }

    /// Zombies go when nothing keeps them, from below.
    fn bury(&mut self, mut id: u16) {
        while let Some(group) = self.0.get(&id)
            && !group.online
            && group.usage == 0
            && group.children == 0
        {
            let parent = group.parent;
            self.0.remove(&id);
            if let Some(parent) = self.0.get_mut(&parent) {
                parent.children -= 1;
            }
            id = parent;
        }
    }
}

enum What {
    Pages(Pfn),
    Folio(Pfn, usize),
    Object(NonNull<u8>),
    Area(NonNull<u8>),
}

/// Something that was had, whom it is charged to, as what.
struct Had {
    what: What,
    id: u16,
    stat: MemcgStat,
    bytes: u64,
}

/// What an object of this size is charged as: its slot, of the class, and two bytes.
fn object_bytes(size: usize) -> (MemcgStat, u64) {
    let classes = [8, 16, 32, 64, 96, 128, 192, 256, 512, 1024, 2048];
    match classes.into_iter().find(|&class| class >= size) {
        Some(class) => (MemcgStat::Slab, class as u64 + 2),
        None => (MemcgStat::Kernel, size.next_power_of_two() as u64),
    }
}

struct Test<'m> {
    mm: &'m Mm<Host>,
    model: Model,
    live: Vec<MemCgroup<'m, Host>>,
    had: Vec<Had>,
    rng: Rng,
}

impl Test<'_> {
    fn get(&mut self) {
        let mm = self.mm;
        // Perhaps nobody, perhaps a zombie: the current task need not have heard of it.
        let all: Vec<u16> = self.model.0.keys().copied().chain([0]).collect();
        let current = all[self.rng.below(all.len())];
        let order = self.rng.below(4);
        let most = if self.rng.one_in(4) { 20_000 } else { 600 };
        let size = 1 + self.rng.below(most);
        let pages = PAGE << order;
        let (stat, bytes) = match self.rng.below(6) {
            0 => (MemcgStat::Kernel, pages),
            1 => (MemcgStat::Anon, pages),
            2 => (MemcgStat::File, pages),
            3 => (MemcgStat::PageTables, PAGE),
            4 => (MemcgStat::Vmalloc, (order as u64 + 1) * PAGE),
            _ => object_bytes(size),
        };
        let id = self.model.charged(current);
        let scope = Host::memcg_scope(current);
        let gfp = GFP_KERNEL_ACCOUNT;
        let nolock = self.rng.one_in(3);
        let is_object = stat == MemcgStat::Slab || stat == MemcgStat::Kernel && bytes != pages;
        let got = match stat {
            _ if is_object && nolock && size <= 600 => {
                // It may be served by a larger class; what it is then is charged.
                drop(scope);
                return;
            }
            _ if is_object => mm.kmalloc(size, gfp).map(What::Object),
            MemcgStat::Kernel if nolock => mm.alloc_pages_nolock(gfp, None, order).map(What::Pages),
            MemcgStat::Kernel => mm.alloc_pages(gfp, order).map(What::Pages),
            MemcgStat::PageTables => mm.alloc_page_table(gfp, 0).map(What::Pages),
            MemcgStat::Vmalloc => mm.vmalloc(bytes as usize, gfp).map(What::Area),
            MemcgStat::Anon => mm
                .alloc_folio(gfp | __GFP_MOVABLE, order, FolioKind::Anon)
                .map(|pfn| What::Folio(pfn, order)),
            _ => mm
                .alloc_folio_memcg(GFP_HIGHUSER_MOVABLE, order, FolioKind::File, current)
                .map(|pfn| What::Folio(pfn, order)),
        };
        drop(scope);
        if !self.model.fits(id, bytes) {
            assert_eq!(got.err(), Some(AllocError::Limit), "{bytes} to {id}");
            self.model.refuse(id, bytes);
            return;
        }
        let what = match got {
            Ok(what) => what,
            Err(AllocError::Empty) if nolock => {
                // Charged, and taken back.
                self.model.refuse(id, bytes);
                return;
            }
            Err(why) => panic!("{why}: {stat:?} {bytes} to {id}"),
        };
        self.model.charge(id, stat, bytes);
        self.had.push(Had {
            what,
            id,
            stat,
            bytes,
        });
    }

    fn put(&mut self) {
        if self.had.is_empty() {
            return;
        }
        let mm = self.mm;
        let had = self.had.swap_remove(self.rng.below(self.had.len()));
        let nolock = self.rng.one_in(3);
        match had.what {
            // SAFETY: ours.
            What::Pages(pfn) | What::Folio(pfn, _) if nolock => unsafe {
                mm.free_pages_nolock(pfn)
            },
            What::Pages(pfn) | What::Folio(pfn, _) => free(mm, pfn),
            // SAFETY: ours.
            What::Object(ptr) if nolock => unsafe { mm.kfree_nolock(ptr) },
            What::Object(ptr) => kfree(mm, ptr),
            // SAFETY: ours.
            What::Area(ptr) => unsafe { mm.vfree(ptr) },
        }
        self.model.uncharge(had.id, had.stat, had.bytes);
    }

    /// Changes something that is had: split, retyped, or pages that change places with others.
    fn change(&mut self) {
        if self.had.is_empty() {
            return;
        }
        let at = self.rng.below(self.had.len());
        let Had {
            what,
            id,
            stat,
            bytes,
        } = &self.had[at];
        let (id, stat, bytes) = (*id, *stat, *bytes);
        match *what {
            What::Folio(pfn, order) if order > 0 => {
                let to = self.rng.below(order);
                self.mm.split_folio_alone(pfn, to).unwrap();
                self.had.swap_remove(at);
                for nth in 0..1u32 << (order - to) {
                    let what = What::Folio(pfn.add(nth << to), to);
                    let bytes = PAGE << to;
                    self.had.push(Had {
                        what,
                        id,
                        stat,
                        bytes,
                    });
                }
            }
            What::Pages(pfn) if stat == MemcgStat::Kernel => {
                let order = (bytes / PAGE).ilog2() as usize;
                // SAFETY: bare pages of ours.
                unsafe { self.mm.retype(pfn, PageType::Anon) }.unwrap();
                self.model.uncharge_keeping(id, stat, bytes);
                self.model.charge(id, MemcgStat::Anon, bytes);
                let (what, stat) = (What::Folio(pfn, order), MemcgStat::Anon);
                self.had[at] = Had {
                    what,
                    id,
                    stat,
                    bytes,
                };
            }
            _ => {}
        }
    }

    fn make(&mut self) {
        if self.live.len() > 8 {
            return;
        }
        let nth = self.rng.below(self.live.len() + 1);
        let parent = self.live.get(nth);
        let limit = (1 + self.rng.below(60)) as u64 * PAGE * 2;
        let limit = if self.rng.one_in(3) {
            (1 << 48) - 1
        } else {
            limit
        };
        let group = self.mm.memcg_create(parent, "one", limit).unwrap();
        let parent = parent.map_or(0, MemCgroup::id);
        if let Some(parent) = self.model.0.get_mut(&parent) {
            parent.children += 1;
        }
        let before = self.model.0.insert(
            group.id(),
            Group {
                parent,
                online: true,
                children: 0,
                limit,
                usage: 0,
                watermark: 0,
                stats: [0; MemcgStat::COUNT],
            },
        );
        assert!(before.is_none(), "a number that somebody has");
        self.live.push(group);
    }

    fn delete(&mut self) {
        if self.live.is_empty() {
            return;
        }
        let group = self.live.swap_remove(self.rng.below(self.live.len()));
        let id = group.id();
        drop(group);
        self.model.0.get_mut(&id).unwrap().online = false;
        self.model.bury(id);
    }

    fn limit(&mut self) {
        if self.live.is_empty() {
            return;
        }
        let group = &self.live[self.rng.below(self.live.len())];
        let limit = (1 + self.rng.below(80)) as u64 * PAGE;
        let model = self.model.0.get_mut(&group.id()).unwrap();
        if model.usage <= limit {
            group.set_limit(limit).unwrap();
            model.limit = limit;
        } else {
            assert_eq!(group.set_limit(limit), Err(AllocError::Busy));
        }
    }

    fn check(&self) {
        self.mm.memcg_check().unwrap();
        let mut seen = 0;
        self.mm.memcg_stat(|view| {
            let group = &self.model.0[&view.id];
            assert_eq!(
                (
                    view.parent,
                    view.online,
                    view.usage,
                    view.limit,
                    view.watermark,
                    view.stats
                ),
                (
                    group.parent,
                    group.online,
                    group.usage,
                    group.limit,
                    group.watermark,
                    group.stats
                ),
                "{view}"
            );
            assert_eq!(
                view.pins,
                u64::from(group.children) + u64::from(group.online)
            );
            seen += 1;
        });
        assert_eq!(
            seen,
            self.model.0.len(),
            "zombies that nothing keeps, or that are lost"
        );
        let zombies = self.model.0.values().filter(|g| !g.online).count();
        assert_eq!(self.mm.memcg_zombies(), zombies as u64);
        for Had { what, id, .. } in &self.had {
            let found = match *what {
                What::Pages(pfn) | What::Folio(pfn, _) => self.mm.memcg_of_page(pfn),
                // SAFETY: live.
                What::Object(ptr) => unsafe { self.mm.memcg_of_object(ptr) },
                What::Area(_) => continue,
            };
            assert_eq!(found, *id);
        }
    }
}

impl Model {
    /// Something is charged as something else in a moment.
    fn uncharge_keeping(&mut self, id: u16, stat: MemcgStat, bytes: u64) {
        for at in self.path(id) {
            self.0.get_mut(&at).unwrap().usage -= bytes;
        }
        if let Some(group) = self.0.get_mut(&id) {
            group.stats[stat as usize] -= bytes;
        }
    }
}

fn history(seed: u64, steps: usize) {
    let mm = Machine::flat(16384).boot();
    let mut test = Test {
        mm: &mm,
        model: Model::default(),
        live: Vec::new(),
        had: Vec::new(),
        rng: Rng(seed),
    };
    for step in 0..steps {
        match test.rng.below(20) {
            0 => test.make(),
            1 if test.rng.one_in(2) => test.delete(),
            2 => test.limit(),
            3 => test.change(),
            4..10 => test.put(),
            _ => test.get(),
        }
        if step % 16 == 0 {
            test.check();
        }
    }
    test.check();
    ledger(&mm);
    while !test.had.is_empty() {
        test.put();
    }
    while !test.live.is_empty() {
        test.delete();
    }
    test.check();
    assert!(test.model.0.is_empty() && mm.memcg_zombies() == 0);
    mm.shrink();
    test.check();
    ledger(&mm);
}

#[test]
fn random_histories() {
    for seed in 1..=scaled(30, 1) as u64 {
        history(seed, scaled(1500, 60));
    }
}
