//! A pool: a lock and lists for each size class, and the table of all pools.

use core::fmt;
use core::marker::PhantomData;
use core::panic::Location;
use core::ptr::NonNull;

use super::class::{SIZE_CLASSES, SizeClass, ZS_SIZE_CLASSES};
use crate::desc::{PfnList, ZS_MAX_POOLS};
use crate::error::AllocError;
use crate::gfp;
use crate::lockdep::classes;
use crate::mm::Mm;
use crate::platform::{FaultPoint, Holder, Platform};
use crate::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use crate::sync::{SpinGuard, SpinLock};

/// The class of handles, after those of objects.
pub(crate) const HANDLES: usize = ZS_SIZE_CLASSES;
/// A page of handles: 8 bytes each. One is left out, so that their numbers fit the descriptor.
pub(crate) const HANDLE_CLASS: SizeClass = SizeClass {
    size: 8,
    pages: 1,
    objects: 511,
};
/// Lists of zspages by fullness, in tenths. Those that are full or empty are in none: the empty ones are freed.
pub(crate) const GROUPS: usize = 10;
/// Longest name kept; the rest is cut off.
const NAME_LEN: usize = 32;

/// The list for a zspage with so many objects in use, if it is in one (`get_fullness_group`).
pub(crate) fn group(inuse: usize, objects: usize) -> Option<usize> {
    (inuse > 0 && inuse < objects).then(|| inuse * GROUPS / objects)
}

/// What the lock of a class guards, with all freelists, and what zspages of the class say in their descriptors and objects.
#[derive(Debug)]
pub(crate) struct ClassLists {
    /// Zspages by fullness.
    pub(crate) groups: [PfnList; GROUPS],
    /// All zspages, those in no list too.
    pub(crate) zspages: u64,
    /// Objects in use.
    pub(crate) inuse: u64,
}

impl ClassLists {
    /// Free objects that are worth whole zspages, in zspages (`zs_can_compact`).
    pub(crate) fn wasted(&self, class: &SizeClass) -> u64 {
        let objects = u64::from(class.objects);
        (self.zspages * objects - self.inuse) / objects
    }
}

/// A pool, as it lies in memory.
pub(crate) struct PoolCore {
    /// Which memory manager's it is.
    pub(crate) owner: usize,
    /// Its place in the table.
    pub(crate) number: usize,
    /// Counts handles, so that an old one is told from a new one at the same place.
    pub(crate) generation: AtomicU32,
    /// Somebody compacts it.
    pub(crate) compacting: AtomicU32,
    /// Pages that compaction freed.
    pub(crate) pages_compacted: AtomicU64,
    /// Objects that it moved.
    pub(crate) objects_moved: AtomicU64,
    pub(crate) classes: [SpinLock<ClassLists>; ZS_SIZE_CLASSES + 1],
    name: [u8; NAME_LEN],
    name_len: u8,
}

impl PoolCore {
    /// Writes a pool to memory for one; not by value, which would be kilobytes of stack.
    ///
    /// # Safety
    ///
    /// `at` is memory of this size and alignment, the caller's alone.
    unsafe fn init(at: NonNull<PoolCore>, owner: usize, number: usize, name: &str) {
        let mut end = name.len().min(NAME_LEN);
        while !name.is_char_boundary(end) {
            end -= 1;
        }
        let mut bytes = [0; NAME_LEN];
        bytes[..end].copy_from_slice(&name.as_bytes()[..end]);
        let pool = at.as_ptr();
        // SAFETY: the caller's promise; fields are written, none is read.
        unsafe {
            (&raw mut (*pool).owner).write(owner);
            (&raw mut (*pool).number).write(number);
            // Not the same for every pool, so that handles of one that is gone are not taken for those of the next.
            (&raw mut (*pool).generation).write(AtomicU32::new(at.addr().get() as u32 >> 12));
            (&raw mut (*pool).compacting).write(AtomicU32::new(0));
            (&raw mut (*pool).pages_compacted).write(AtomicU64::new(0));
            (&raw mut (*pool).objects_moved).write(AtomicU64::new(0));
            (&raw mut (*pool).name).write(bytes);
            (&raw mut (*pool).name_len).write(end as u8);
            for i in 0..=ZS_SIZE_CLASSES {
                (&raw mut (*pool).classes[i]).write(SpinLock::new(ClassLists {
                    groups: [PfnList::EMPTY; GROUPS],
                    zspages: 0,
                    inuse: 0,
                }));
            }
        }
    }

    pub(crate) fn name(&self) -> &str {
        core::str::from_utf8(&self.name[..usize::from(self.name_len)]).unwrap_or("?")
    }
}

/// What a class looks like, that of handles too.
#[inline]
pub(crate) fn class(index: usize) -> &'static SizeClass {
    SIZE_CLASSES.get(index).unwrap_or(&HANDLE_CLASS)
}

/// The pools, by number. Null: none.
#[derive(Debug)]
pub(crate) struct ZsPools {
    pools: [*mut PoolCore; ZS_MAX_POOLS],
}

impl ZsPools {
    pub(crate) const EMPTY: ZsPools = ZsPools {
        pools: [core::ptr::null_mut(); ZS_MAX_POOLS],
    };
}

// SAFETY: the pointers lead to pools, which are shared between CPUs by design.
unsafe impl Send for ZsPools {}

/// A pool of compressed memory, of the memory manager that `'m` borrows. Dropping it leaves the pool as it is; give it to
/// [`zs_destroy_pool`](Mm::zs_destroy_pool) to take it down.
#[must_use = "a pool that is dropped stays"]
pub struct ZsPool<'m> {
    core: NonNull<PoolCore>,
    _mm: PhantomData<&'m PoolCore>,
}

// SAFETY: a `PoolCore` is shared between CPUs by design; all of it is atomics, locks and constants.
unsafe impl Send for ZsPool<'_> {}
// SAFETY: the same.
unsafe impl Sync for ZsPool<'_> {}

impl ZsPool<'_> {
    #[inline]
    pub(crate) fn core(&self) -> &PoolCore {
        // SAFETY: the handle is made with the pool, and destroying the pool consumes it.
        unsafe { self.core.as_ref() }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        self.core().name()
    }
}

impl fmt::Debug for ZsPool<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ZsPool").field(&self.name()).finish()
    }
}

/// A pool that could not be destroyed: objects are left. The pool comes back.
#[derive(Debug)]
pub struct ZsDestroyError<'m> {
    /// The pool; it stays usable.
    pub pool: ZsPool<'m>,
    /// How many objects are left.
    pub objects: u64,
}

impl fmt::Display for ZsDestroyError<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "pool {} has {} objects left",
            self.pool.name(),
            self.objects
        )
    }
}

impl core::error::Error for ZsDestroyError<'_> {}

/// What a pool has (`struct zs_pool_stats`, and the sums of its classes).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ZsPoolStats {
    /// Objects in use.
    pub objects: u64,
    /// Objects that there is room for in its zspages.
    pub room: u64,
    /// Zspages.
    pub zspages: u64,
    /// Their pages.
    pub pages: u64,
    /// Pages of handles.
    pub handle_pages: u64,
    /// Bytes of descriptors of all these pages, words not counted.
    pub descriptor_bytes: u64,
    /// Pages that compaction freed (`pages_compacted`).
    pub pages_compacted: u64,
    /// Objects that compaction moved.
    pub objects_moved: u64,
}

impl<P: Platform> Mm<P> {
    /// The pool, if it is one of ours.
    #[inline]
    pub(super) fn pool<'p>(&self, pool: &'p ZsPool<'_>) -> &'p PoolCore {
        let core = pool.core();
        assert!(
            core.owner == self.id(),
            "pool {} belongs to another memory manager",
            core.name()
        );
        core
    }

    /// Takes the lock of a class. Not pinned where locks sleep.
    pub(super) fn class_lock<'a>(
        &'a self,
        pool: &'a PoolCore,
        class: usize,
    ) -> SpinGuard<'a, ClassLists, Holder<'a, P>> {
        pool.classes[class].lock(Holder::new(
            &self.pages.platform,
            self.pages.rt,
            &classes::ZS_CLASS,
        ))
    }

    fn zs_pools(&self) -> SpinGuard<'_, ZsPools, Holder<'_, P>> {
        // A mutex in every configuration: held over a compaction of all pools.
        self.zs_pools
            .lock(Holder::new(&self.pages.platform, true, &classes::ZS_POOLS))
    }

    /// A pool of compressed memory (`zs_create_pool`). It has no pages yet.
    ///
    /// # Context
    ///
    /// May sleep.
    ///
    /// # Errors
    ///
    /// No memory for it; [`AllocError::Busy`] if there are 64 already.
    pub fn zs_create_pool(&self, name: &str) -> Result<ZsPool<'_>, AllocError> {
        if self.pages.platform.should_fail(FaultPoint::ZsPool) {
            return Err(AllocError::Injected);
        }
        let memory = self.kmalloc(size_of::<PoolCore>(), gfp::GFP_KERNEL)?;
        let core = memory.cast::<PoolCore>();
        let mut table = self.zs_pools();
        let Some(number) = table.pools.iter().position(|pool| pool.is_null()) else {
            drop(table);
            // SAFETY: ours, and nobody knows of it.
            unsafe { self.kfree(memory) };
            return Err(AllocError::Busy);
        };
        // SAFETY: kmalloc'd for it, aligned for a power of two, and ours.
        unsafe { PoolCore::init(core, self.id(), number, name) };
        table.pools[number] = core.as_ptr();
        Ok(ZsPool {
            core,
            _mm: PhantomData,
        })
    }

    /// Takes a pool down (`zs_destroy_pool`).
    ///
    /// # Context
    ///
    /// May sleep.
    ///
    /// # Errors
    ///
    /// Objects are left: the pool stays, and comes back with their number.
    pub fn zs_destroy_pool<'m>(&self, pool: ZsPool<'m>) -> Result<(), ZsDestroyError<'m>> {
        let core = self.pool(&pool);
        // Under the lock of the table nobody reclaims from it, and who has the pool is here.
        let mut table = self.zs_pools();
        let objects = self.zs_stats(core).objects;
        // A handle whose slot could not be given back counts as an object: its page is still there.
        let handles = self.class_lock(core, HANDLES).inuse;
        if objects.max(handles) > 0 {
            drop(table);
            return Err(ZsDestroyError {
                pool,
                objects: objects.max(handles),
            });
        }
        table.pools[core.number] = core::ptr::null_mut();
        drop(table);
        // SAFETY: kmalloc'd in `zs_create_pool`; the only handle to it goes here.
        unsafe { self.kfree(pool.core.cast()) };
        Ok(())
    }

    /// Visits all pools; none is made or taken down meanwhile. Does not wait: where somebody is at the table it visits none.
    pub(super) fn for_each_pool(&self, mut visit: impl FnMut(&PoolCore)) {
        let holder = Holder::trying(&self.pages.platform, true, &classes::ZS_POOLS);
        let Some(table) = self.zs_pools.try_lock(holder) else {
            return;
        };
        for core in table.pools.iter().filter_map(|&pool| NonNull::new(pool)) {
            // SAFETY: pools are taken out of the table under its lock before they are freed.
            visit(unsafe { core.as_ref() });
        }
    }

    pub(super) fn zs_stats(&self, pool: &PoolCore) -> ZsPoolStats {
        let mut stats = ZsPoolStats {
            pages_compacted: pool.pages_compacted.load(Ordering::Relaxed),
            objects_moved: pool.objects_moved.load(Ordering::Relaxed),
            ..ZsPoolStats::default()
        };
        for index in 0..=HANDLES {
            let (zspages, inuse) = {
                let lists = self.class_lock(pool, index);
                (lists.zspages, lists.inuse)
            };
            let class = class(index);
            let pages = zspages * u64::from(class.pages);
            let tails = pages - zspages;
            stats.descriptor_bytes += zspages * size_of::<crate::desc::ZsDesc>() as u64
                + tails * size_of::<crate::desc::Buddy>() as u64;
            if index == HANDLES {
                stats.handle_pages = pages;
            } else {
                stats.objects += inuse;
                stats.room += zspages * u64::from(class.objects);
                stats.zspages += zspages;
                stats.pages += pages;
            }
        }
        stats
    }

    /// What a pool has (`zs_pool_stats`). Exact at a quiet moment.
    ///
    /// # Context
    ///
    /// Any that may pin a CPU.
    pub fn zs_pool_stats(&self, pool: &ZsPool<'_>) -> ZsPoolStats {
        self.zs_stats(self.pool(pool))
    }

    /// Pages that hold a pool's objects (`zs_get_total_pages`), those of handles not counted.
    pub fn zs_get_total_pages(&self, pool: &ZsPool<'_>) -> u64 {
        self.zs_pool_stats(pool).pages
    }

    /// Visits the classes of a pool that have zspages: which, how many zspages, how many objects are in use.
    pub fn zs_for_each_class(
        &self,
        pool: &ZsPool<'_>,
        mut visit: impl FnMut(&'static SizeClass, u64, u64),
    ) {
        let core = self.pool(pool);
        for (index, class) in SIZE_CLASSES.iter().enumerate() {
            let (zspages, inuse) = {
                let lists = self.class_lock(core, index);
                (lists.zspages, lists.inuse)
            };
            if zspages > 0 {
                visit(class, zspages, inuse);
            }
        }
    }
}

/// Who called, for reports.
pub(crate) type Caller = &'static Location<'static>;
