//! Accounting: pages and objects charged to an owner, with limits that hold and counts that add up.
//!
//! Groups are a tree. What is charged to one counts for all above it too, and none of them ever stands above its limit. At a limit, who may
//! wait reclaims file pages of the group first; who may not, or finds nothing, gets [`AllocError::Limit`].
//!
//! - `counter`: what a group's memory comes to, in one word (the only protocol here; `models` checks it);
//! - `group`: the groups, by number, and their life;
//! - `charge`: charging with reclaim, and taking back;
//! - `pages`, `objects`: where it is kept whom something is charged to;
//! - `check`: the listing, and a walk over all memory that counts again.
//!
//! **Who is charged** is said by [`Platform::current_memcg`], for whatever is asked for with
//! [`__GFP_ACCOUNT`](crate::gfp::__GFP_ACCOUNT), from a cache with [`CacheFlags::ACCOUNT`](crate::CacheFlags::ACCOUNT), and for kernel stacks; an address space
//! ([`MmStruct::set_memcg`](crate::mmap::MmStruct::set_memcg)) and a file ([`Mapping::set_memcg`](crate::filemap::Mapping::set_memcg)) have groups of their own; and
//! [`Mm::alloc_folio_memcg`] is told. A group is a number of 16 bits, 0 for nobody:
//!
//! | what | charged as | where the number is |
//! |---|---|---|
//! | folios | pages | the folio's owner |
//! | bare pages, large kmalloc, page tables | pages | the last two bytes of the links, which serve nobody while pages are handed out |
//! | vmalloc areas, kernel stacks | pages | the area |
//! | objects | their slot and 2 bytes | a vector in the slab, 2 bytes an object, for caches that have one |
//!
//! A word says of its pages that they are charged. So pages that are not are freed as ever, and pages that are, by whatever path, are uncharged in the
//! one place that all come through (`prep_free`). An object's number is swapped for 0 when it is freed, by whom and wherever.
//!
//! **A group that is deleted while memory is charged to it** stays as a *zombie* until the last of it is freed, as Linux's offline groups do for folios; and takes no
//! new charges: those go to the nearest group above it that is online. Linux hands a dead group's objects on to its parent (`obj_cgroup`), since its
//! groups are large (per-CPU counters, per-node lists); the price is an indirection for each object. A zombie here is 256 bytes, and freeing
//! changes nothing but numbers, from any context; so nothing is handed on.
//!
//! **No per-CPU stock.** Linux charges 64 pages at a time to its CPU, since its counters are shared by hundreds of CPUs; so a group
//! may be refused memory that is only in stock elsewhere, until that is drained. Here a charge is two atomic instructions, and one more for each level
//! above, and what is refused is what does not fit. It costs more than the allocation itself where that is a page or an object from this CPU's list.
//!
//! Lock order: `memcg` (sleeps) is held while groups are made and limits change, over nothing but allocations' locks. Charging takes no lock.
//!
//! Source: `mm/memcontrol.c` of Linux 6.18.
//!
//! # Examples
//!
//! ```
//! use memdesc::gfp::{__GFP_ACCOUNT, GFP_KERNEL, GFP_KERNEL_ACCOUNT};
//! use memdesc::memcg::MemcgStat;
//! use memdesc::{AllocError, Config, Mm, PAGE_SIZE};
//! use memdesc_host::Host;
//!
//! let (host, ram) = Host::small(4096)?;
//! let mm = Mm::new(host, &Config::default(), &ram)?;
//! let all = mm.memcg_create(None, "all", 16 * PAGE_SIZE as u64)?;
//! let job = mm.memcg_create(Some(&all), "job", u64::MAX)?;
//!
//! // Of a thread, all that is asked for with __GFP_ACCOUNT.
//! let scope = Host::memcg_scope(job.id());
//! let pages = mm.alloc_pages(GFP_KERNEL_ACCOUNT, 3)?;
//! let object = mm.kmalloc(100, GFP_KERNEL_ACCOUNT)?;
//! assert_eq!(mm.alloc_pages(GFP_KERNEL_ACCOUNT, 3), Err(AllocError::Limit), "the object is in the way");
//! assert_eq!(job.stat().of(MemcgStat::Kernel), 8 * PAGE_SIZE as u64);
//! assert!(job.usage() > 8 * PAGE_SIZE as u64 && job.usage() == all.usage());
//! drop(scope);
//!
//! // A group that goes first stays as long as something is charged to it.
//! drop(job);
//! assert_eq!(mm.memcg_zombies(), 1);
//! // SAFETY: ours, and freed once.
//! unsafe {
//!     mm.free_pages(pages);
//!     mm.kfree(object);
//! }
//! assert_eq!((all.usage(), mm.memcg_zombies()), (0, 0));
//! assert_eq!((all.watermark() / PAGE_SIZE as u64, all.failcnt()), (8, 2));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod charge;
mod check;
pub(crate) mod counter;
mod group;
mod objects;
mod pages;

use core::fmt;

pub(crate) use charge::Charge;
pub(crate) use check::area_stat;
pub use check::{MemcgMismatch, MemcgView};
pub(crate) use group::{Group, Memcgs};
pub(crate) use objects::owners_bytes;

use crate::error::AllocError;
use crate::gfp;
use crate::lockdep::classes;
use crate::mm::Mm;
use crate::platform::{Holder, Platform, might_sleep};
use crate::sync::SpinGuard;

/// For what a group is charged.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(usize)]
pub enum MemcgStat {
    /// Anonymous folios.
    Anon = 0,
    /// Folios of files.
    File = 1,
    /// Bare pages and large kmalloc.
    Kernel = 2,
    /// Objects.
    Slab = 3,
    /// Page tables.
    PageTables = 4,
    /// vmalloc areas.
    Vmalloc = 5,
    /// Kernel stacks.
    KernelStack = 6,
}

impl MemcgStat {
    /// How many there are.
    pub const COUNT: usize = 7;
    /// All of them, by number.
    pub const ALL: [MemcgStat; 7] = [
        MemcgStat::Anon,
        MemcgStat::File,
        MemcgStat::Kernel,
        MemcgStat::Slab,
        MemcgStat::PageTables,
        MemcgStat::Vmalloc,
        MemcgStat::KernelStack,
    ];

    /// The name in `memory.stat`.
    pub const fn name(self) -> &'static str {
        match self {
            MemcgStat::Anon => "anon",
            MemcgStat::File => "file",
            MemcgStat::Kernel => "kernel",
            MemcgStat::Slab => "slab",
            MemcgStat::PageTables => "pagetables",
            MemcgStat::Vmalloc => "vmalloc",
            MemcgStat::KernelStack => "kernel_stack",
        }
    }
}

/// A group that memory is charged to (`struct mem_cgroup`). Dropping it deletes the group: it takes no new charges, and is gone with the last of what
/// is charged to it or to its children.
///
/// # Context
///
/// Dropped in any.
pub struct MemCgroup<'m, P: Platform> {
    mm: &'m Mm<P>,
    group: &'m Group,
}

impl<P: Platform> MemCgroup<'_, P> {
    /// Its number: what [`Platform::current_memcg`] says. Not 0; another group's once this one is gone.
    pub fn id(&self) -> u16 {
        self.group.id()
    }

    pub(crate) fn group(&self) -> &Group {
        self.group
    }

    pub(crate) fn is_of(&self, mm: &Mm<P>) -> bool {
        core::ptr::eq(self.mm, mm)
    }

    /// Bytes charged to it and to all below it.
    pub fn usage(&self) -> u64 {
        self.group.counter.usage()
    }

    /// The most that was ever charged; as in Linux, a charge that a group above refused counts for the moment that it took.
    pub fn watermark(&self) -> u64 {
        self.group.counter.watermark()
    }

    /// Has the watermark start again from what is charged now.
    pub fn reset_watermark(&self) {
        self.group.counter.reset_watermark();
    }

    /// How often its limit refused a charge: each attempt, so also when it fitted after reclaim, and more than once when it did not.
    pub fn failcnt(&self) -> u64 {
        self.group.counter.failcnt()
    }

    /// Its limit in bytes; 2^48 - 1 if it has none.
    pub fn limit(&self) -> u64 {
        self.group.counter.limit()
    }

    /// All of that, and what it was charged for.
    pub fn stat(&self) -> MemcgView {
        self.group.view()
    }

    /// Sets the limit, in bytes. If more is charged, file pages of the group are reclaimed first. From then on no more than this is charged, not for a
    /// moment.
    ///
    /// # Context
    ///
    /// May sleep.
    ///
    /// # Errors
    ///
    /// [`AllocError::Busy`]: more is charged, and does not go. The limit is as it was.
    pub fn set_limit(&self, limit: u64) -> Result<(), AllocError> {
        might_sleep(self.mm.platform(), "a memcg's limit");
        for attempt in 0..=charge::MAX_RECLAIM_RETRIES {
            let over = {
                let _one = self.mm.memcg_mutex();
                match self.group.counter.set_limit(limit) {
                    Ok(()) => return Ok(()),
                    Err(usage) => usage - limit,
                }
            };
            let freed = self
                .mm
                .memcg_reclaim(self.group, over, gfp::GFP_KERNEL, attempt);
            if freed == 0 && attempt > 0 {
                break;
            }
        }
        Err(AllocError::Busy)
    }
}

impl<P: Platform> Drop for MemCgroup<'_, P> {
    fn drop(&mut self) {
        self.mm.pages.memcg.delete(self.group);
    }
}

impl<P: Platform> fmt::Debug for MemCgroup<'_, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.stat(), f)
    }
}

impl<P: Platform> Mm<P> {
    /// A new group under `parent`, or under the root, which is nobody and has no limit. `limit` in bytes for it and all below it; of the name
    /// 32 bytes are kept.
    ///
    /// # Context
    ///
    /// May sleep.
    ///
    /// # Errors
    ///
    /// No memory; [`AllocError::TooMany`] if there are 65534 groups, or 32767 children of one parent.
    ///
    /// # Panics
    ///
    /// If the parent belongs to another memory manager.
    pub fn memcg_create<'m>(
        &'m self,
        parent: Option<&MemCgroup<'m, P>>,
        name: &str,
        limit: u64,
    ) -> Result<MemCgroup<'m, P>, AllocError> {
        assert!(
            parent.is_none_or(|parent| parent.is_of(self)),
            "another memory manager's group"
        );
        might_sleep(self.platform(), "memcg_create");
        let group = self.new_group(parent.map(MemCgroup::group), name, limit)?;
        Ok(MemCgroup { mm: self, group })
    }

    /// Groups that were deleted and still have something charged to them, or children.
    pub fn memcg_zombies(&self) -> u64 {
        self.pages.memcg.zombies()
    }

    /// Groups are made, and limits set, by one at a time.
    fn memcg_mutex(&self) -> SpinGuard<'_, group::Making, Holder<'_, P>> {
        let holder = Holder::new(self.platform(), true, &classes::MEMCG);
        self.pages.memcg.making.lock(holder)
    }

    /// Whom the caller's allocations are charged to.
    #[inline]
    pub(crate) fn active_memcg(&self) -> u16 {
        if self.pages.memcg.in_use() {
            self.platform().current_memcg()
        } else {
            0
        }
    }
}
