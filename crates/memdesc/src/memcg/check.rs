//! What groups have: the listing, and a walk over all memory that counts again.

use core::fmt;

use super::MemcgStat;
use super::group::Group;
use crate::address::{PAGE_SHIFT, PAGE_SIZE, Pfn};
use crate::desc::VmAreaKind;
use crate::memmap::{PageType, Word};
use crate::mm::Mm;
use crate::platform::Platform;
use crate::sync::atomic::Ordering;

/// A group in the listing ([`Mm::memcg_stat`]).
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct MemcgView {
    /// Its number.
    pub id: u16,
    /// Its parent's; 0 for none.
    pub parent: u16,
    /// It takes charges; else it was deleted, and is a zombie.
    pub online: bool,
    /// Its handle, children, and files that charge it.
    pub pins: u64,
    /// Bytes charged to it and to all below it.
    pub usage: u64,
    /// The most that was.
    pub watermark: u64,
    /// Its limit.
    pub limit: u64,
    /// How often the limit refused.
    pub failcnt: u64,
    /// Bytes charged to it alone, by [`MemcgStat`].
    pub stats: [u64; MemcgStat::COUNT],
    name: [u8; 32],
    name_len: u8,
}

impl MemcgView {
    /// Its name.
    pub fn name(&self) -> &str {
        core::str::from_utf8(&self.name[..usize::from(self.name_len)]).unwrap_or("?")
    }

    /// Bytes charged to it alone, for this.
    pub fn of(&self, stat: MemcgStat) -> u64 {
        self.stats[stat as usize]
    }
}

impl fmt::Debug for MemcgView {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for MemcgView {
    /// A line: `7 job (of 3): 36864 of 65536, at most 40960, refused 0; anon 32768 pagetables 4096`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let zombie = if self.online { "" } else { ", a zombie" };
        write!(
            f,
            "{} {} (of {}{zombie}): {} of {}, at most {}, refused {};",
            self.id,
            self.name(),
            self.parent,
            self.usage,
            self.limit,
            self.watermark,
            self.failcnt
        )?;
        for stat in MemcgStat::ALL.into_iter().filter(|&s| self.of(s) > 0) {
            write!(f, " {} {}", stat.name(), self.of(stat))?;
        }
        Ok(())
    }
}

/// Counters that do not say what is in memory ([`Mm::memcg_check`]).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MemcgMismatch {
    /// The group; one that does not exist if something is charged to it all the same.
    pub id: u16,
    /// For what; none for the sum of all, the children's included.
    pub stat: Option<MemcgStat>,
    /// As the group has it.
    pub counted: u64,
    /// As it is in memory.
    pub found: u64,
}

impl fmt::Display for MemcgMismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = self.stat.map_or("all of it", MemcgStat::name);
        write!(
            f,
            "memcg {}: {what}: {} counted, {} in memory",
            self.id, self.counted, self.found
        )
    }
}

impl core::error::Error for MemcgMismatch {}

impl Group {
    pub(crate) fn view(&self) -> MemcgView {
        let mut name = [0; 32];
        let name_len = self.name.get(&mut name).len() as u8;
        MemcgView {
            id: self.id(),
            parent: self.up().map_or(0, Group::id),
            online: self.counter.is_online(),
            pins: self.counter.pins(),
            usage: self.counter.usage(),
            watermark: self.counter.watermark(),
            limit: self.counter.limit(),
            failcnt: self.counter.failcnt(),
            stats: core::array::from_fn(|i| self.stats[i].load(Ordering::Relaxed)),
            name,
            name_len,
        }
    }
}

impl<P: Platform> Mm<P> {
    /// Visits all groups, zombies included: the listing. `visit` may neither make a group nor set a limit.
    ///
    /// # Context
    ///
    /// May sleep.
    pub fn memcg_stat(&self, mut visit: impl FnMut(&MemcgView)) {
        let making = self.memcg_mutex();
        self.pages.memcg.each(&making, |group| visit(&group.view()));
    }

    /// Counts again, page by page and object by object, what is charged to whom. Exact at a quiet moment: no request in flight on any CPU.
    ///
    /// # Context
    ///
    /// May sleep. Walks the memory map once for each [`MemcgStat`].
    ///
    /// # Errors
    ///
    /// The first group whose counters say something else.
    pub fn memcg_check(&self) -> Result<(), MemcgMismatch> {
        let memcg = &self.pages.memcg;
        let making = self.memcg_mutex();
        let mut wrong = None;
        for stat in MemcgStat::ALL {
            memcg.each(&making, |group| group.seen.store(0, Ordering::Relaxed));
            self.each_charge(|id, what, bytes| {
                if what != stat {
                    return;
                }
                match memcg.get(id).filter(|group| group.counter.is_alive()) {
                    Some(group) => {
                        group.seen.fetch_add(bytes, Ordering::Relaxed);
                    }
                    None => {
                        wrong.get_or_insert(MemcgMismatch {
                            id,
                            stat: Some(stat),
                            counted: 0,
                            found: bytes,
                        });
                    }
                }
            });
            memcg.each(&making, |group| {
                let counted = group.stats[stat as usize].load(Ordering::Relaxed);
                let found = group.seen.load(Ordering::Relaxed);
                if counted != found {
                    wrong.get_or_insert(MemcgMismatch {
                        id: group.id(),
                        stat: Some(stat),
                        counted,
                        found,
                    });
                }
            });
        }
        // Of each group all that it and those below it have.
        memcg.each(&making, |group| group.seen.store(0, Ordering::Relaxed));
        memcg.each(&making, |group| {
            let own = group.stats.iter().map(|s| s.load(Ordering::Relaxed)).sum();
            let mut at = Some(group);
            while let Some(group) = at {
                group.seen.fetch_add(own, Ordering::Relaxed);
                at = group.up();
            }
        });
        memcg.each(&making, |group| {
            let (counted, found) = (group.counter.usage(), group.seen.load(Ordering::Relaxed));
            if counted != found {
                wrong.get_or_insert(MemcgMismatch {
                    id: group.id(),
                    stat: None,
                    counted,
                    found,
                });
            }
        });
        wrong.map_or(Ok(()), Err)
    }

    /// Visits all that is charged: whom, for what, how many bytes.
    fn each_charge(&self, mut visit: impl FnMut(u16, MemcgStat, u64)) {
        self.for_each_block(|_: Pfn, pages, word: Word| match word.kind() {
            PageType::Slab => {
                let slab = self.pages.map.slab_at(word.desc());
                self.each_charged(slab, |id, bytes| visit(id, MemcgStat::Slab, bytes));
            }
            PageType::Vmalloc => {
                if let Some(area) = self.vm_area_of(word) {
                    // SAFETY: it has this page, and does not go at a quiet moment.
                    let area = unsafe { area.as_ref() };
                    let stat = area_stat(area.kind());
                    if area.memcg() != 0 {
                        visit(area.memcg(), stat, u64::from(pages) << PAGE_SHIFT);
                    }
                }
            }
            _ => {
                if let Some(stat) = word.stat()
                    && word.is_charged()
                {
                    let bytes = u64::from(pages) * PAGE_SIZE as u64;
                    visit(self.pages.memcg_of(word), stat, bytes);
                }
            }
        });
    }
}

/// For what an area is charged.
pub(crate) const fn area_stat(kind: VmAreaKind) -> MemcgStat {
    match kind {
        VmAreaKind::Stack => MemcgStat::KernelStack,
        VmAreaKind::Vmalloc | VmAreaKind::Vmap => MemcgStat::Vmalloc,
    }
}
