//! Caches and kmalloc against a plain model.
//!
//! Each live object is filled with a pattern of its own. Objects never overlap, keep their contents, are aligned; zeroed ones read
//! zero; what a constructor left is there when an object is handed out again; the slabinfo view says what the model says; a
//! cache with live objects is not destroyed and names exactly them.

mod common;

use std::collections::BTreeMap;
use std::ptr::NonNull;

use common::*;
use memdesc::gfp::{self, GFP_ATOMIC, GFP_KERNEL, GFP_NOWAIT};
use memdesc::*;
use memdesc_host::{CpuGuard, Host};
use proptest::prelude::{Just, ProptestConfig, Strategy, any, prop_oneof};

#[derive(Clone, Copy, Debug)]
enum Op {
    Alloc { cache: usize, zero: bool },
    Bulk { cache: usize, n: usize },
    Kmalloc { size: usize, gfp: usize, zero: bool },
    Krealloc { which: usize, size: usize },
    Free { which: usize },
    FreeMany { n: usize },
    BulkFree { cache: usize, n: usize },
    Shrink { cache: usize },
    ShrinkAll,
    Destroy { cache: usize },
    Cpu { cpu: usize },
    Many { cache: usize, n: usize },
}

fn op() -> impl Strategy<Value = Op> {
    let cache = 0..SPECS.len();
    let size = prop_oneof![6 => 1..300usize, 3 => 300..9000usize, 1 => 9000..100_000usize];
    prop_oneof![
        6 => (cache.clone(), any::<bool>()).prop_map(|(cache, zero)| Op::Alloc { cache, zero }),
        2 => (cache.clone(), 1..130usize).prop_map(|(cache, n)| Op::Bulk { cache, n }),
        6 => (size.clone(), 0..4usize, any::<bool>()).prop_map(|(size, gfp, zero)| Op::Kmalloc { size, gfp, zero }),
        4 => (any::<usize>(), size).prop_map(|(which, size)| Op::Krealloc { which, size }),
        10 => any::<usize>().prop_map(|which| Op::Free { which }),
        3 => (1..200usize).prop_map(|n| Op::FreeMany { n }),
        2 => (cache.clone(), 1..130usize).prop_map(|(cache, n)| Op::BulkFree { cache, n }),
        1 => cache.clone().prop_map(|cache| Op::Shrink { cache }),
        1 => Just(Op::ShrinkAll),
        1 => cache.clone().prop_map(|cache| Op::Destroy { cache }),
        2 => (0..8usize).prop_map(|cpu| Op::Cpu { cpu }),
        2 => (cache, 1..600usize).prop_map(|(cache, n)| Op::Many { cache, n }),
    ]
}

/// What constructed objects look like.
const MADE: u8 = 0xc7;

fn ctor<const N: usize>(object: NonNull<u8>) {
    fill(object, N, MADE);
}

struct Spec {
    name: &'static str,
    size: usize,
    align: usize,
    flags: CacheFlags,
    ctor: Option<fn(NonNull<u8>)>,
}

const fn spec(name: &'static str, size: usize, align: usize, flags: CacheFlags) -> Spec {
    Spec {
        name,
        size,
        align,
        flags,
        ctor: None,
    }
}

const PLAIN: CacheFlags = CacheFlags::EMPTY;

static SPECS: [Spec; 14] = [
    spec("eight", 8, 8, PLAIN),
    spec("one", 1, 1, PLAIN),
    spec("twenty-four", 24, 8, PLAIN),
    spec("hundred", 104, 8, CacheFlags::HWCACHE_ALIGN),
    spec("inode", 1128, 8, CacheFlags::RECLAIM_ACCOUNT),
    spec("page", 4096, 4096, PLAIN),
    spec("large", 9000, 64, PLAIN),
    spec("no sheaves", 40, 16, CacheFlags::NO_SHEAVES),
    spec("red", 24, 8, CacheFlags::RED_ZONE),
    spec("poison", 56, 8, CacheFlags::POISON),
    spec("user", 8, 32, CacheFlags::STORE_USER),
    spec("all", 120, 64, ALL),
    Spec {
        name: "made",
        size: 64,
        align: 8,
        flags: PLAIN,
        ctor: Some(ctor::<64>),
    },
    Spec {
        name: "made, checked",
        size: 100,
        align: 4,
        flags: ALL,
        ctor: Some(ctor::<100>),
    },
];

struct Object {
    ptr: NonNull<u8>,
    size: usize,
    tag: u8,
    /// Which cache; none for kmalloc.
    cache: Option<usize>,
    gfp: Flags,
}

struct Test<'m> {
    mm: &'m Mm<Host>,
    caches: Vec<Option<Cache<'m>>>,
    live: Vec<Object>,
    /// Address to length.
    space: BTreeMap<usize, usize>,
    base: BTreeMap<String, u64>,
    next: u8,
    rng: Rng,
}

fn active(mm: &Mm<Host>) -> BTreeMap<String, u64> {
    let mut all = BTreeMap::new();
    mm.slabinfo(|c| {
        if !c.metadata {
            all.insert(c.name.to_owned(), c.active_objs);
        }
    });
    all
}

fn class_name(size: usize, gfp: Flags) -> String {
    let prefix = if gfp.contains(gfp::__GFP_DMA) {
        "dma-kmalloc-"
    } else if gfp.contains(gfp::__GFP_RECLAIMABLE) {
        "kmalloc-rcl-"
    } else {
        "kmalloc-"
    };
    if size >= 1024 {
        format!("{prefix}{}k", size / 1024)
    } else {
        format!("{prefix}{size}")
    }
}

/// The class that serves a size.
fn class_of(size: usize) -> usize {
    match size {
        65..=96 => 96,
        129..=192 => 192,
        _ => size.next_power_of_two().max(8),
    }
}

impl<'m> Test<'m> {
    fn new(mm: &'m Mm<Host>) -> Test<'m> {
        let mut test = Test {
            mm,
            caches: SPECS.iter().map(|_| None).collect(),
            live: Vec::new(),
            space: BTreeMap::new(),
            base: BTreeMap::new(),
            next: 0,
            rng: Rng(5),
        };
        for index in 0..SPECS.len() {
            test.create(index);
        }
        // The sheaves of these caches are kmalloc memory too.
        mm.shrink();
        test.base = active(mm);
        test
    }

    fn create(&mut self, index: usize) {
        let spec = &SPECS[index];
        let cache = self
            .mm
            .kmem_cache_create(spec.name, spec.size, spec.align, spec.flags, spec.ctor)
            .unwrap();
        assert_eq!((cache.name(), cache.object_size()), (spec.name, spec.size));
        self.caches[index] = Some(cache);
    }

    fn cache(&self, index: usize) -> &Cache<'_> {
        self.caches[index].as_ref().unwrap()
    }

    /// The allocator handed this out.
    #[track_caller]
    fn got(
        &mut self,
        ptr: NonNull<u8>,
        size: usize,
        align: usize,
        cache: Option<usize>,
        gfp: Flags,
    ) {
        let at = ptr.addr().get();
        assert!(
            at.is_multiple_of(align),
            "{at:#x} is not aligned to {align}"
        );
        let before = self.space.range(..at + size).next_back();
        assert!(
            before.is_none_or(|(&a, &len)| a + len <= at),
            "{at:#x} + {size} overlaps {before:x?}"
        );
        self.space.insert(at, size);
        if gfp.contains(gfp::__GFP_ZERO) {
            assert!(bytes(ptr, size).iter().all(|&b| b == 0), "not zeroed");
        } else if cache.is_some_and(|c| SPECS[c].ctor.is_some()) {
            assert!(
                bytes(ptr, size).iter().all(|&b| b == MADE),
                "what the constructor left is gone"
            );
        }
        self.next = self.next.wrapping_add(1);
        fill(ptr, size, self.next);
        self.live.push(Object {
            ptr,
            size,
            tag: self.next,
            cache,
            gfp,
        });
    }

    /// The test gives this up.
    #[track_caller]
    fn forget(&mut self, index: usize) -> Object {
        let object = self.live.swap_remove(index);
        assert!(
            bytes(object.ptr, object.size)
                .iter()
                .all(|&b| b == object.tag),
            "contents changed"
        );
        self.space.remove(&object.ptr.addr().get());
        if object.cache.is_some_and(|c| SPECS[c].ctor.is_some()) {
            fill(object.ptr, object.size, MADE);
        }
        object
    }

    fn free(&mut self, index: usize) {
        let object = self.forget(index);
        match object.cache {
            Some(cache) if !self.rng.one_in(4) => {
                cache_free(self.mm, self.cache(cache), object.ptr)
            }
            // kfree finds the cache by itself.
            _ => kfree(self.mm, object.ptr),
        }
    }

    fn of(&self, cache: usize) -> Vec<usize> {
        (0..self.live.len())
            .filter(|&i| self.live[i].cache == Some(cache))
            .collect()
    }

    fn alloc(&mut self, cache: usize, zero: bool) {
        let spec = &SPECS[cache];
        let zero = zero && spec.ctor.is_none();
        let gfp = if zero {
            GFP_KERNEL | gfp::__GFP_ZERO
        } else {
            GFP_KERNEL
        };
        let ptr = self.mm.kmem_cache_alloc(self.cache(cache), gfp).unwrap();
        self.got(ptr, spec.size, spec.align, Some(cache), gfp);
    }

    fn step(&mut self, op: Op, cpus: &[CpuGuard<'_>]) {
        let mm = self.mm;
        match op {
            Op::Alloc { cache, zero } => self.alloc(cache, zero),
            Op::Many { cache, n } => {
                let n = (n * 64 / SPECS[cache].size).clamp(1, scaled(600, 10));
                (0..n).for_each(|_| self.alloc(cache, false));
            }
            Op::Bulk { cache, n } => {
                let spec = &SPECS[cache];
                let mut out =
                    vec![std::ptr::null_mut(); n.min(scaled(130, 12)).min(1 + 100_000 / spec.size)];
                mm.kmem_cache_alloc_bulk(self.cache(cache), GFP_NOWAIT, &mut out)
                    .unwrap();
                for ptr in out {
                    self.got(
                        NonNull::new(ptr).unwrap(),
                        spec.size,
                        spec.align,
                        Some(cache),
                        GFP_NOWAIT,
                    );
                }
            }
            Op::Kmalloc { size, gfp, zero } => {
                let mut gfp = [
                    GFP_KERNEL,
                    GFP_ATOMIC,
                    GFP_KERNEL | gfp::__GFP_RECLAIMABLE,
                    GFP_KERNEL | gfp::__GFP_DMA,
                ][gfp];
                if zero {
                    gfp |= gfp::__GFP_ZERO;
                }
                let ptr = mm.kmalloc(size, gfp).unwrap();
                // SAFETY: live memory from kmalloc.
                let class = unsafe { mm.ksize(ptr) };
                assert!(class >= size);
                let align = if size.is_power_of_two() {
                    size.clamp(8, 4096)
                } else {
                    8
                };
                self.got(ptr, size, align, None, gfp);
            }
            Op::Krealloc { which, size } => {
                let all: Vec<_> = (0..self.live.len())
                    .filter(|&i| self.live[i].cache.is_none())
                    .collect();
                if all.is_empty() {
                    return;
                }
                let old = self.forget(all[which % all.len()]);
                let gfp = Flags::from_bits(old.gfp.bits() & !gfp::__GFP_ZERO.bits());
                // SAFETY: live memory from kmalloc; the old pointer is not used again.
                let new = unsafe { mm.krealloc(old.ptr, size, gfp) }.unwrap();
                let kept = old.size.min(size);
                assert!(
                    bytes(new, kept).iter().all(|&b| b == old.tag),
                    "krealloc lost {kept} bytes of {}",
                    old.size
                );
                self.got(new, size, 8, None, gfp);
            }
            Op::Free { which } => {
                if !self.live.is_empty() {
                    self.free(which % self.live.len());
                }
            }
            Op::FreeMany { n } => {
                for _ in 0..n.min(self.live.len()) {
                    let index = self.rng.below(self.live.len());
                    self.free(index);
                }
            }
            Op::BulkFree { cache, n } => {
                let mut gone = Vec::new();
                for index in self.of(cache).into_iter().rev().take(n) {
                    gone.push(self.forget(index).ptr.as_ptr());
                }
                // SAFETY: objects of this cache, each once, given up by the model.
                unsafe { mm.kmem_cache_free_bulk(self.cache(cache), &gone) };
            }
            Op::Shrink { cache } => {
                mm.kmem_cache_shrink(self.cache(cache));
                let (active, total, slabs) = slabinfo(mm, SPECS[cache].name);
                assert_eq!(active, self.of(cache).len() as u64);
                assert!(active <= total && (slabs == 0) == (active == 0));
            }
            Op::ShrinkAll => self.check(),
            Op::Destroy { cache } => self.destroy(cache),
            Op::Cpu { cpu } => cpus[cpu % cpus.len()].switch(),
        }
    }

    fn destroy(&mut self, cache: usize) {
        let live: Vec<_> = self
            .of(cache)
            .into_iter()
            .map(|i| self.live[i].ptr.addr().get())
            .collect();
        let handle = self.caches[cache].take().unwrap();
        match self.mm.kmem_cache_destroy(handle) {
            Ok(()) => {
                assert!(
                    live.is_empty(),
                    "{} was destroyed with live objects",
                    SPECS[cache].name
                );
                self.mm.slabinfo(|c| assert_ne!(c.name, SPECS[cache].name));
                self.create(cache);
            }
            Err(DestroyError {
                cache: handle,
                live: n,
            }) => {
                assert_eq!(n, live.len() as u64);
                let mut listed = Vec::new();
                self.mm.live_objects(&handle, |object, track| {
                    listed.push(object.addr());
                    let tracked = SPECS[cache].flags.contains(CacheFlags::STORE_USER);
                    // Of guarded objects it is always known.
                    let guarded = self.mm.is_kfence_address(object);
                    assert_eq!(track.is_some(), tracked || guarded);
                    if let Some(track) = track {
                        assert!(
                            track.location.file().ends_with("slab_state_machine.rs"),
                            "{track:?}"
                        );
                    }
                });
                let mut live = live;
                live.sort_unstable();
                listed.sort_unstable();
                assert_eq!(listed, live);
                self.caches[cache] = Some(handle);
            }
        }
    }

    /// Everything given back that can be: the views say what the model says.
    fn check(&mut self) {
        self.mm.shrink();
        ledger(self.mm);
        let mut expected = self.base.clone();
        for object in &self.live {
            assert!(
                bytes(object.ptr, object.size)
                    .iter()
                    .all(|&b| b == object.tag),
                "contents changed"
            );
            let name = match object.cache {
                Some(cache) => SPECS[cache].name.to_owned(),
                // SAFETY: live memory from kmalloc.
                None => match unsafe { self.mm.ksize(object.ptr) } {
                    // Of a guarded object what was asked for: the class is the next.
                    size @ 0..=8192 => class_name(class_of(size), object.gfp),
                    _ => continue,
                },
            };
            *expected.get_mut(&name).unwrap() += 1;
        }
        assert_eq!(active(self.mm), expected);
    }
}

fn run(debug: CacheFlags, ops: &[Op]) {
    // All of it ZONE_DMA, so that dma-kmalloc has the same chances.
    let mut machine = Machine::flat(scaled(12288, 2048) as u32).cpus(2);
    machine.config.dma_limit = PhysAddr(1 << 30);
    machine.config.slab_debug = debug;
    let mm = machine.boot();
    let cpus: Vec<_> = (0..2)
        .map(|cpu| mm.platform().claim(cpu).unwrap())
        .collect();
    let mut test = Test::new(&mm);
    for (i, &op) in ops.iter().enumerate() {
        test.step(op, &cpus);
        if i % 16 == 15 {
            ledger(&mm);
        }
    }
    test.check();
    while !test.live.is_empty() {
        let index = test.rng.below(test.live.len());
        test.free(index);
    }
    for cache in test.caches.drain(..).flatten() {
        mm.kmem_cache_destroy(cache).unwrap();
    }
    teardown(&machine, &mm);
}

fn state_machine(debug: CacheFlags) {
    let config = ProptestConfig {
        cases: scaled(150, 1) as u32,
        failure_persistence: None,
        max_shrink_iters: 2000,
        ..ProptestConfig::default()
    };
    let rng = proptest::test_runner::TestRng::deterministic_rng(
        proptest::test_runner::RngAlgorithm::ChaCha,
    );
    let mut runner = proptest::test_runner::TestRunner::new_with_rng(config, rng);
    let ops = proptest::collection::vec(op(), 1..=scaled(300, 25));
    if let Err(why) = runner.run(&ops, |ops| {
        run(debug, &ops);
        Ok(())
    }) {
        panic!("{why}");
    }
}

#[test]
fn objects() {
    state_machine(PLAIN);
}

#[test]
fn objects_with_kmalloc_checked() {
    state_machine(ALL);
}
