//! The ready-made heap: `alloc`'s requests, served by a memory manager, in every context.

use std::alloc::{GlobalAlloc, Layout};
use std::cell::Cell;
use std::ptr::{self, NonNull};
use std::sync::OnceLock;

use memdesc::gfp::GFP_KERNEL;
use memdesc::rcu::cpus::PlatformRcu;
use memdesc::slab::CacheFlags;
use memdesc::{Config, Context, Heap, InitError, MAX_ORDER, Memblock, Mm, PAGE_SIZE, Platform};
use memdesc_host::Host;
use proptest::prelude::*;

/// A machine of one CPU in a piece of this process's memory, in a context that the test says: the least that a platform can be.
#[derive(Clone, Copy)]
struct Machine(NonNull<u8>, &'static OnceLock<PlatformRcu<Machine, 1>>);

// SAFETY: a test has it on one thread at a time, and the memory is nobody else's.
unsafe impl Sync for Machine {}
// SAFETY: the same.
unsafe impl Send for Machine {}

thread_local!(static CONTEXT: Cell<Context> = const { Cell::new(Context::Atomic) });

// SAFETY: the memory is what `machine` leaked, for ever; each test has a machine of its own, which has one thread, and no interrupts.
unsafe impl Platform for Machine {
    fn direct_map(&self) -> *mut u8 {
        self.0.as_ptr()
    }
    fn nr_cpus(&self) -> usize {
        1
    }
    fn pin(&self) -> usize {
        0
    }
    unsafe fn unpin(&self, _cpu: usize) {}
    type Rcu = PlatformRcu<Machine, 1>;
    fn rcu(&self) -> &Self::Rcu {
        self.1.get().unwrap()
    }
    fn context(&self) -> Context {
        CONTEXT.get()
    }
}

/// A heap over so many MiB, and what it was before them.
fn heap(mib: usize, config: &Config) -> (&'static Heap<Machine>, &'static Mm<Machine>) {
    let size = mib << 20;
    // SAFETY: the layout is not empty. Aligned to a page and no more: so is what a boot loader maps.
    let memory = unsafe { std::alloc::alloc(Layout::from_size_align(size, PAGE_SIZE).unwrap()) };
    let memory = NonNull::new(memory).unwrap();
    // The platform leads to its RCU, which holds the platform: a kernel has both in statics.
    let rcu: &'static OnceLock<_> = Box::leak(Box::new(OnceLock::new()));
    let machine = Machine(memory, rcu);
    let _ = rcu.set(PlatformRcu::of(machine));
    let mut ram = Memblock::<4>::new();
    ram.add(0..size as u64).unwrap();
    let heap: &'static Heap<Machine> = Box::leak(Box::new(Heap::new()));
    let mm = heap.init(machine, config, ram.ranges()).unwrap();
    (heap, mm)
}

#[test]
fn nothing_before_memory_is_taken_over_and_one_memory_manager_after() {
    static HEAP: Heap<Host> = Heap::new();
    let layout = Layout::new::<u64>();
    // SAFETY: the layout is not empty; null may be freed before there is anything.
    unsafe {
        assert!(HEAP.alloc(layout).is_null() && HEAP.alloc_zeroed(layout).is_null());
        HEAP.dealloc(ptr::dangling_mut(), layout);
    }
    let (host, _) = Host::small(4096).unwrap();
    assert!(matches!(
        HEAP.init(host, &Config::default(), &[]),
        Err(InitError::NoMemory)
    ));
    assert!(HEAP.get().is_none());
    // A failure is not the end.
    let (host, ram) = Host::small(4096).unwrap();
    let mm = HEAP.init(host, &Config::default(), &ram).unwrap();
    assert!(ptr::eq(mm, HEAP.get().unwrap()));
    let (host, ram) = Host::small(4096).unwrap();
    assert!(matches!(
        HEAP.init(host, &Config::default(), &ram),
        Err(InitError::Twice)
    ));
    // SAFETY: the layout is not empty; freed once.
    unsafe {
        let value = HEAP.alloc(layout);
        assert!(!value.is_null());
        HEAP.dealloc(value, layout);
    }
}

/// A request that is out.
struct Live {
    ptr: *mut u8,
    layout: Layout,
    byte: u8,
}

impl Live {
    fn check(&self, len: usize) {
        // SAFETY: live, and this long.
        let bytes = unsafe { std::slice::from_raw_parts(self.ptr, len) };
        assert!(bytes.iter().all(|b| *b == self.byte), "{:?}", self.layout);
    }
    fn fill(&self) {
        // SAFETY: live, and this long.
        unsafe { self.ptr.write_bytes(self.byte, self.layout.size()) };
    }
}

fn contexts() -> impl Strategy<Value = Context> {
    prop_oneof![
        Just(Context::Task),
        Just(Context::Atomic),
        Just(Context::HardIrq),
        Just(Context::Nmi)
    ]
}

fn size() -> impl Strategy<Value = usize> {
    prop_oneof![6 => 1..300usize, 3 => 1..9000usize, 1 => 1..200_000usize]
}

#[derive(Clone, Debug)]
enum Op {
    Alloc {
        size: usize,
        align: u32,
        zeroed: bool,
    },
    Realloc {
        which: usize,
        size: usize,
    },
    Free {
        which: usize,
    },
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        3 => (size(), 0..16u32, any::<bool>()).prop_map(|(size, align, zeroed)| Op::Alloc { size, align, zeroed }),
        3 => (any::<usize>(), size()).prop_map(|(which, size)| Op::Realloc { which, size }),
        2 => any::<usize>().prop_map(|which| Op::Free { which }),
    ]
}

fn run(config: &Config, ops: Vec<(Context, Op)>) {
    let (heap, mm) = heap(8, config);
    let mut live: Vec<Live> = Vec::new();
    let mut next = 0u8;
    for (context, op) in ops {
        CONTEXT.set(context);
        next = next.wrapping_add(1);
        match op {
            Op::Alloc {
                size,
                align,
                zeroed,
            } => {
                let layout = Layout::from_size_align(size, 1 << align).unwrap();
                // SAFETY: the layout is not empty.
                let ptr = unsafe {
                    if zeroed {
                        heap.alloc_zeroed(layout)
                    } else {
                        heap.alloc(layout)
                    }
                };
                if ptr.is_null() {
                    // Only who tries may be refused here, or who wants more than the direct map is aligned to.
                    assert!(context == Context::Nmi || layout.align() > PAGE_SIZE);
                    continue;
                }
                assert!(ptr.addr().is_multiple_of(layout.align()), "{layout:?}");
                let mut new = Live {
                    ptr,
                    layout,
                    byte: 0,
                };
                if zeroed {
                    new.check(size);
                }
                new.byte = next;
                new.fill();
                live.push(new);
            }
            Op::Realloc { which, size } if !live.is_empty() => {
                let at = which % live.len();
                let one = &mut live[at];
                // SAFETY: live, of this layout.
                let ptr = unsafe { heap.realloc(one.ptr, one.layout, size) };
                if ptr.is_null() {
                    assert!(context == Context::Nmi || one.layout.align() > PAGE_SIZE);
                    continue;
                }
                assert!(ptr.addr().is_multiple_of(one.layout.align()));
                let kept = one.layout.size().min(size);
                one.ptr = ptr;
                one.layout = Layout::from_size_align(size, one.layout.align()).unwrap();
                one.check(kept);
                one.fill();
            }
            Op::Free { which } if !live.is_empty() => {
                let one = live.swap_remove(which % live.len());
                one.check(one.layout.size());
                // SAFETY: live, of this layout, and not used again.
                unsafe { heap.dealloc(one.ptr, one.layout) };
            }
            _ => {}
        }
        for one in &live {
            one.check(one.layout.size());
        }
    }
    CONTEXT.set(Context::Atomic);
    for one in live {
        // SAFETY: as above.
        unsafe { heap.dealloc(one.ptr, one.layout) };
    }
    mm.tick();
    mm.shrink();
    let ledger = mm.ledger();
    assert!(ledger.balanced, "{ledger:?}");
    // Nothing is out: what is not free is metadata.
    let free = ledger.free + ledger.untouched + ledger.pcp;
    assert_eq!(free + ledger.metadata, ledger.given, "{ledger:?}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 1 } else { 48 }))]

    /// Whatever is asked for, in whatever context, keeps its bytes, is aligned, and comes back.
    #[test]
    fn requests_keep_what_is_written(ops in prop::collection::vec((contexts(), op()), 1..if cfg!(miri) { 12 } else { 120 })) {
        run(&Config::default(), ops);
    }

    /// Under red zones and poison a request has the bytes that it asked for and not one more: what grows in place must not run over them.
    #[test]
    fn requests_are_within_red_zones(ops in prop::collection::vec((contexts(), op()), 1..if cfg!(miri) { 12 } else { 120 })) {
        let config = Config {
            slab_debug: CacheFlags::RED_ZONE | CacheFlags::POISON | CacheFlags::STORE_USER,
            ..Config::default()
        };
        run(&config, ops);
    }
}

#[test]
fn sizes_that_cannot_be_had_give_nothing() {
    let (heap, mm) = heap(8, &Config::default());
    CONTEXT.set(Context::Task);
    for size in [
        (PAGE_SIZE << MAX_ORDER) + 1,
        7 << 20,
        isize::MAX as usize - 8,
    ] {
        let layout = Layout::from_size_align(size, 8).unwrap();
        // SAFETY: the layout is not empty.
        assert!(unsafe { heap.alloc(layout) }.is_null());
    }
    // An alignment whose next power of two of the size is more than there are addresses.
    let layout = Layout::from_size_align(isize::MAX as usize - 63, 64).unwrap();
    // SAFETY: the layout is not empty.
    assert!(unsafe { heap.alloc(layout) }.is_null());
    assert!(mm.ledger().balanced);
}

#[test]
fn the_line_of_the_boot_log() {
    let (_, mm) = heap(16, &Config::default());
    let line = mm.ledger().to_string();
    let ledger = mm.ledger();
    let free = (ledger.free + ledger.untouched + ledger.pcp) * 4;
    assert!(
        line.starts_with(&format!("Memory: {free}K/16384K available (")),
        "{line}"
    );
    assert!(line.contains("32K memory map"), "{line}");
}

#[test]
fn a_direct_map_in_the_middle_of_a_page_is_refused() {
    /// The same, 8 bytes beside.
    struct Beside(Machine);
    // SAFETY: never gets to own memory.
    unsafe impl Platform for Beside {
        fn direct_map(&self) -> *mut u8 {
            self.0.direct_map().wrapping_add(8)
        }
        fn nr_cpus(&self) -> usize {
            1
        }
        fn pin(&self) -> usize {
            0
        }
        unsafe fn unpin(&self, _cpu: usize) {}
        type Rcu = PlatformRcu<Machine, 1>;
        fn rcu(&self) -> &Self::Rcu {
            self.0.rcu()
        }
    }
    let (_, mm) = heap(8, &Config::default());
    let mut ram = Memblock::<1>::new();
    ram.add(0..8 << 20).unwrap();
    let refused = Mm::new(Beside(*mm.platform()), &Config::default(), ram.ranges());
    assert!(
        matches!(refused, Err(InitError::BadDirectMap(at)) if at % PAGE_SIZE == 8),
        "{refused:?}"
    );
}

/// A platform that names a node beyond all that there can be is served all the same, by every way to memory.
#[test]
fn a_node_beyond_all_others_is_the_last() {
    struct Far(Machine);
    // SAFETY: as `Machine`, which has nothing of this memory.
    unsafe impl Platform for Far {
        fn direct_map(&self) -> *mut u8 {
            self.0.direct_map()
        }
        fn nr_cpus(&self) -> usize {
            1
        }
        fn pin(&self) -> usize {
            0
        }
        unsafe fn unpin(&self, _cpu: usize) {}
        type Rcu = PlatformRcu<Machine, 1>;
        fn rcu(&self) -> &Self::Rcu {
            self.0.rcu()
        }
        fn cpu_to_node(&self, _cpu: usize) -> usize {
            usize::MAX
        }
    }
    let (_, first) = heap(8, &Config::default());
    let mut ram = Memblock::<1>::new();
    ram.add(0..8 << 20).unwrap();
    // What the first one had is never touched again.
    let mm = Mm::new(Far(*first.platform()), &Config::default(), ram.ranges()).unwrap();
    let page = mm.alloc_pages(GFP_KERNEL, 3).unwrap();
    let nolock = mm.alloc_pages_nolock(GFP_KERNEL, None, 0).unwrap();
    // To the last page: the first slabs of descriptors are taken where there is any.
    let mut pages = Vec::new();
    while let Ok(page) = mm.alloc_pages(GFP_KERNEL, 0) {
        pages.push(page);
    }
    assert!(pages.len() > 1000);
    for page in pages.into_iter().chain([page, nolock]) {
        // SAFETY: ours, each once.
        unsafe { mm.free_pages(page) };
    }
    mm.shrink();
    assert!(mm.ledger().balanced);
}

/// What grows where it is takes its red zone with it: by `kvrealloc` as by `krealloc`.
#[test]
fn the_red_zone_moves_with_the_end() {
    let config = Config {
        slab_debug: CacheFlags::RED_ZONE | CacheFlags::STORE_USER,
        ..Config::default()
    };
    let (_, mm) = heap(8, &config);
    let ptr = mm.kmalloc(4976, GFP_KERNEL).unwrap();
    // SAFETY: ours, and not used after it moved.
    unsafe {
        ptr.write_bytes(7, 4976);
        let grown = mm.kvrealloc(ptr, 8000, GFP_KERNEL).unwrap();
        assert_eq!(grown, ptr, "the class has room");
        grown.write_bytes(8, 8000);
        let moved = mm.kvrealloc(grown, 100, GFP_KERNEL).unwrap();
        assert_eq!(moved.add(99).read(), 8);
        mm.kvfree(moved);
    }
    assert!(mm.ledger().balanced);
}
