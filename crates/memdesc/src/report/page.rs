//! What a page is, for reports: read from the memory map and the descriptor without believing either.
//!
//! A word that was overwritten may lead anywhere. So before anything is read through it, what it leads to must be a page whose own word says slab, which
//! is memory that is handed out and mapped; and before it is believed, the descriptor must be an object in use of the cache of its class.

use core::panic::Location;
use core::ptr::NonNull;

use super::{Corruption, Dump, ObjectState, PageTrack, Recorded, Report, StackId, Stacks, Track};
use crate::address::{MAX_ORDER, PAGE_SHIFT, PAGE_SIZE, Pfn, PhysAddr};
use crate::desc::{Folio, Held, PtDesc, Slab, VmArea};
use crate::inline::Facts;
use crate::memmap::{DescClass, MemMap, PageType, Word};
use crate::mm::{BuiltIn, Mm};
use crate::page_alloc::alloc::PageAllocator;
use crate::platform::{Pin, Platform};
use crate::slab::CacheCore;
use crate::slab::debug;

/// A page, its block, and what describes it.
#[derive(Clone, Copy, Debug)]
pub struct PageState<'a> {
    /// The page.
    pub pfn: Pfn,
    /// The first page of its block.
    pub head: Pfn,
    /// The block's order.
    pub order: usize,
    /// The word that speaks for it.
    pub word: Word,
    /// What it is, in words.
    pub state: &'static str,
    /// What its descriptor says.
    pub desc: DescState<'a>,
}

/// What a descriptor says.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum DescState<'a> {
    /// There is none.
    None,
    /// The facts of a word that has them itself.
    Facts(u64),
    /// The links of a free block.
    Buddy {
        /// Where it is.
        address: usize,
        /// The next block in the list.
        next: Pfn,
        /// The one before.
        prev: Pfn,
    },
    /// A `struct buddy` that its block keeps while it is handed out.
    Kept {
        /// Where it is.
        address: usize,
    },
    /// A `struct slab`.
    Slab {
        /// Where it is.
        address: usize,
        /// The name of its cache, if it has one that there is.
        cache: Option<&'a str>,
        /// Objects handed out or in sheaves.
        inuse: usize,
        /// Objects.
        objects: usize,
    },
    /// A folio.
    Folio {
        /// Where it is.
        address: usize,
        /// References, mappings, pins.
        held: Held,
        /// The mapping it is in.
        mapping: u64,
        /// Its index there.
        index: u64,
    },
    /// A page table's.
    PtDesc {
        /// Where it is.
        address: usize,
        /// Whose table it is.
        owner: u64,
        /// On which level.
        level: u8,
        /// The first address it maps.
        maps: u64,
    },
    /// An area of addresses.
    VmArea {
        /// Where it is.
        address: usize,
        /// Pages mapped.
        pages: usize,
    },
    /// A descriptor that the kernel brought.
    Yours {
        /// Where it is.
        address: usize,
    },
    /// The word leads to no descriptor.
    Astray {
        /// Where it leads instead.
        physical: u64,
    },
}

impl MemMap {
    /// May something be read at this physical address: is it in a slab, as descriptors are?
    pub(crate) fn is_in_slab(&self, phys: PhysAddr) -> bool {
        if phys.0 & 7 != 0 || phys.0 >> PAGE_SHIFT == 0 {
            return false;
        }
        let found = self.lookup(Pfn::containing(phys));
        found.is_some_and(|f| f.word.kind() == PageType::Slab)
    }

    /// May a descriptor of this type be read there: is it aligned, and its last bytes in a slab too? At the end of one it would reach into
    /// what lies behind.
    pub(crate) fn may_hold<T>(&self, phys: PhysAddr) -> bool {
        let last = PhysAddr(phys.0 + size_of::<T>() as u64 - 8);
        phys.0.is_multiple_of(align_of::<T>() as u64)
            && self.is_in_slab(phys)
            && self.is_in_slab(last)
    }

    /// The slab that this physical address lies in, and the offset there; `None` if the words that lead to it make no sense.
    pub(crate) fn slab_behind(&self, phys: PhysAddr) -> Option<(&Slab, usize)> {
        let found = self.lookup(Pfn::containing(phys))?;
        let desc = found.word.desc();
        if found.word.kind() != PageType::Slab || !self.may_hold::<Slab>(desc) {
            return None;
        }
        let slab = self.slab_at(desc);
        let right = slab.pfn() == found.head && slab.order() == found.word.order();
        right.then(|| (slab, (phys.0 - found.head.phys().0) as usize))
    }
}

impl<P: Platform> PageAllocator<P> {
    /// The caller's stack, by number. From any context.
    pub(crate) fn save_stack(&self, caller: &'static Location<'static>) -> StackId {
        if !self.depot.is_on() {
            return StackId::NONE;
        }
        let mut frames = [0; super::MAX_FRAMES];
        let n = self.platform.save_stack(&mut frames).min(frames.len());
        self.depot.save(caller, &frames[..n])
    }

    /// A block was handed out. From any context, outside all locks.
    #[inline]
    #[track_caller]
    pub(crate) fn note_alloc(&self, kind: PageType, pfn: Pfn, order: usize) {
        if self.history.is_on() {
            self.note(kind, pfn, order, false, Location::caller());
        }
    }

    /// The same, where who asked is known by another way.
    #[inline]
    pub(crate) fn note_alloc_by(
        &self,
        kind: PageType,
        pfn: Pfn,
        order: usize,
        caller: &'static Location<'static>,
    ) {
        if self.history.is_on() {
            self.note(kind, pfn, order, false, caller);
        }
    }

    /// A block came back. From any context, outside all locks.
    #[inline]
    #[track_caller]
    pub(crate) fn note_free(&self, kind: PageType, pfn: Pfn, order: usize) {
        if self.history.is_on() {
            self.note(kind, pfn, order, true, Location::caller());
        }
    }

    #[cold]
    #[inline(never)]
    fn note(
        &self,
        kind: PageType,
        pfn: Pfn,
        order: usize,
        freed: bool,
        caller: &'static Location<'static>,
    ) {
        let cpu = Pin::try_new(&self.platform).map_or(super::entry::NO_CPU, |p| p.cpu() as u32);
        let track = Track {
            location: caller,
            cpu,
            when: self.platform.now(),
            stack: self.save_stack(caller),
        };
        let track = PageTrack {
            track,
            order,
            kind,
            serial: 0,
        };
        self.history.note(pfn, freed, track);
    }

    /// A report of a page with what the memory map says of it and round it, and what was recorded; without descriptors. From any context; takes no lock.
    #[cold]
    pub(crate) fn report_plain(
        &self,
        what: Corruption,
        pfn: Pfn,
        address: usize,
        caller: &'static Location<'static>,
    ) -> Report<'_> {
        let page = self.page_state(pfn);
        let neighbours = match page {
            Some(page) => {
                let end = u64::from(page.head.0) + (1 << page.order);
                let before = page.head.0.checked_sub(1);
                let after = u32::try_from(end).ok();
                [before, after].map(|pfn| self.page_state(Pfn(pfn?)))
            }
            None => [None; 2],
        };
        let history = match self.history.look(pfn) {
            _ if !self.history.is_on() || page.is_none() => Recorded::Off,
            (Some(history), _) => Recorded::History(history),
            (None, true) => Recorded::Dropped,
            (None, false) => Recorded::Nothing,
        };
        Report {
            what,
            cache: None,
            pfn,
            word: page.map_or(Word::ZERO, |page| page.word),
            address,
            byte: None,
            allocated: None,
            freed: None,
            caller,
            page,
            history,
            neighbours,
            objects: [None; 2],
            dump: None,
            kfence: None,
            stacks: Stacks(Some(self)),
        }
    }

    /// What a page is, without its descriptor; `None` if it is not memory that the map knows.
    #[cold]
    fn page_state(&self, pfn: Pfn) -> Option<PageState<'_>> {
        let map = &self.map;
        let region = map.any_region(pfn)?;
        let Some(found) = map.lookup(pfn) else {
            let (start, end) = region.untouched();
            let untouched = pfn.0 >= start && pfn.0 < end;
            return Some(PageState {
                pfn,
                head: pfn,
                order: 0,
                word: region.word(pfn).load(),
                state: if untouched {
                    "never handed out"
                } else {
                    "in no block"
                },
                desc: DescState::None,
            });
        };
        let word = found.word;
        let state = match word.kind() {
            PageType::Free if word.is_in_pcp() => "free, in a per-CPU list",
            kind => word.inline_facts().map_or(kind.name(), Facts::name),
        };
        Some(PageState {
            pfn,
            head: found.head,
            order: word.order().min(MAX_ORDER),
            word,
            state,
            desc: DescState::None,
        })
    }
}

impl<P: Platform> Mm<P> {
    /// Who had this page last, and who gave it back: of the block that it was part of when it last changed hands. `None` if
    /// [`Config::page_owner`](crate::Config::page_owner) is 0, if it never did, or if what was known made room for others.
    ///
    /// # Context
    ///
    /// Any.
    pub fn page_history(&self, pfn: Pfn) -> Option<super::PageHistory> {
        self.pages.history.look(pfn).0
    }

    /// How full the table of page histories is.
    ///
    /// # Context
    ///
    /// Any.
    pub fn page_owner_info(&self) -> super::PageOwnerInfo {
        self.pages.history.info()
    }

    /// A call stack that was saved (`stack_depot_fetch`).
    ///
    /// # Context
    ///
    /// Any.
    pub fn stack(&self, id: StackId) -> Option<super::Stack> {
        self.pages.depot.get(id)
    }

    /// How full the depot of call stacks is.
    ///
    /// # Context
    ///
    /// Any.
    pub fn stack_depot_info(&self) -> super::DepotInfo {
        self.pages.depot.info()
    }

    /// A report of a page, with all that is known of it. Who makes it adds what only he knows. From any context; takes no lock.
    #[cold]
    pub(crate) fn report_at(
        &self,
        what: Corruption,
        pfn: Pfn,
        address: usize,
        caller: &'static Location<'static>,
    ) -> Report<'_> {
        // The descriptors that are looked at stay descriptors as long as we read.
        let _read = self.rcu_read_lock();
        let mut report = self.pages.report_plain(what, pfn, address, caller);
        let seen = [&mut report.page].into_iter().chain(&mut report.neighbours);
        for page in seen.flatten() {
            page.desc = self.desc_state(page.word);
            if page.word.kind() == PageType::Yours {
                page.state = self.type_name(page.pfn);
            }
        }
        report
    }

    /// Adds what is known of an object of this cache: who had it, its neighbours, and the bytes round the first bad one.
    #[cold]
    pub(crate) fn report_with<'a>(
        &'a self,
        mut report: Report<'a>,
        core: &'a CacheCore,
        object: NonNull<u8>,
    ) -> Report<'a> {
        report.cache = Some(core.name());
        let map = &self.pages.map;
        let Some((slab, offset)) = map.slab_behind(self.pages.phys(object.as_ptr())) else {
            return report;
        };
        if !core::ptr::eq(slab.cache_ptr(), core) || slab.is_guarded() {
            return report;
        }
        let geometry = core.geometry_of(slab);
        let Some(index) = geometry.index(offset) else {
            return report;
        };
        (report.allocated, report.freed) = debug::tracks(core, object);
        let base = object.as_ptr().wrapping_sub(offset);
        let beside = [index.checked_sub(1), Some(index + 1)];
        report.objects = beside.map(|index| {
            let index = index.filter(|&i| i < geometry.objects as usize)?;
            let object = NonNull::new(base.wrapping_add(geometry.offset(index)))?;
            let free = slab.is_free(map, index);
            let (allocated, freed) = debug::tracks(core, object);
            Some(ObjectState {
                address: object.addr().get(),
                free,
                track: if free { freed } else { allocated },
            })
        });
        if let Some((bad, ..)) = report.byte {
            report.dump = Some(dump(base, PAGE_SIZE << slab.order(), offset, bad));
        }
        report
    }

    fn desc_state(&self, word: Word) -> DescState<'_> {
        let map = &self.pages.map;
        if !word.kind().has_descriptor() {
            return match word.kind() {
                PageType::None => DescState::None,
                _ => DescState::Facts(word.facts()),
            };
        }
        let desc = word.desc();
        if !map.is_in_slab(desc) {
            return DescState::Astray { physical: desc.0 };
        }
        let address = map.virt(desc).addr();
        match word.kind() {
            PageType::Slab if map.may_hold::<Slab>(desc) => {
                let slab = map.slab_at(desc);
                DescState::Slab {
                    address,
                    cache: self.cache_at(slab.cache_ptr()).map(CacheCore::name),
                    inuse: slab.inuse(),
                    objects: slab.objects(),
                }
            }
            _ if word.is_counted() && map.may_hold::<Folio>(desc) => {
                let folio = self.folio_at(desc);
                DescState::Folio {
                    address,
                    held: folio.held(),
                    mapping: folio.mapping(),
                    index: folio.index(),
                }
            }
            PageType::PageTable
                if word.class() == DescClass::PtDesc && map.may_hold::<PtDesc>(desc) =>
            {
                let ptdesc = self.ptdesc_at(desc);
                DescState::PtDesc {
                    address,
                    owner: ptdesc.owner(),
                    level: ptdesc.level(),
                    maps: ptdesc.address(),
                }
            }
            PageType::Vmalloc => match self.vm_area_of(word) {
                Some(area) if map.may_hold::<VmArea>(self.pages.phys(area.as_ptr().cast())) => {
                    // SAFETY: it lies in a slab of such descriptors, which are type-stable in the caller's read section; all of its fields
                    // are atomics.
                    let pages = unsafe { area.as_ref() }.pages();
                    let address = area.as_ptr().addr();
                    DescState::VmArea { address, pages }
                }
                _ => DescState::Astray { physical: desc.0 },
            },
            PageType::Bare | PageType::LargeKmalloc => DescState::Kept { address },
            PageType::Free => {
                let buddy = map.buddy_at(desc);
                DescState::Buddy {
                    address,
                    next: buddy.next(),
                    prev: buddy.prev(),
                }
            }
            _ => DescState::Yours { address },
        }
    }

    /// The cache at this address, if there is one: built in, or an object of the cache of caches.
    pub(crate) fn cache_at(&self, cache: *const CacheCore) -> Option<&CacheCore> {
        let first = self.built_in.as_ptr();
        let bytes = cache.addr().wrapping_sub(first.addr());
        if bytes < self.built_in.len() * size_of::<CacheCore>() {
            let core = &self.built_in[bytes / size_of::<CacheCore>()];
            return core::ptr::eq(core, cache).then_some(core);
        }
        let phys = self.pages.phys(cache.cast());
        if phys.0 >> 44 != 0 || !self.is_object_of(self.cache_cache(), phys) {
            return None;
        }
        let core = self.pages.map.virt(phys).cast::<CacheCore>();
        // SAFETY: an object in use of the cache of caches, in which only whole caches are handed out to others.
        Some(unsafe { &*core })
    }

    /// Is there an object in use of this cache at this address? Looks without a lock; of an object that stays in use the answer is true.
    fn is_object_of(&self, core: &CacheCore, phys: PhysAddr) -> bool {
        let map = &self.pages.map;
        let Some((slab, offset)) = map.slab_behind(phys) else {
            return false;
        };
        // A slab that waits for its grace period leads to its cache still.
        core::ptr::eq(slab.cache_ptr(), core)
            && core
                .index_in(slab, offset)
                .is_some_and(|index| !slab.is_free(map, index))
    }

    /// Does a word lead to what it says: a descriptor in use, of the cache of its class?
    pub(crate) fn word_is_sane(&self, pfn: Pfn, word: Word) -> bool {
        let order = word.order();
        if order > MAX_ORDER || !pfn.is_aligned(order) {
            return false;
        }
        if !word.kind().has_descriptor() {
            return true;
        }
        let core = match word.class() {
            DescClass::Buddy => self.buddy_cache(),
            DescClass::File => self.built_in(BuiltIn::File),
            DescClass::Anon => self.built_in(BuiltIn::Anon),
            DescClass::Slab => self.slab_cache(),
            DescClass::PtDesc => self.built_in(BuiltIn::PtDesc),
            DescClass::Zs => self.built_in(BuiltIn::ZsDesc),
            DescClass::Yours => return self.pages.map.is_in_slab(word.desc()),
        };
        let fits = match word.kind() {
            PageType::Slab => word.class() == DescClass::Slab,
            _ => true,
        };
        fits && self.is_object_of(core, word.desc())
    }
}

/// The bytes of a slab round the bad one: `offset` is the object's, `bad` is counted from there.
pub(crate) fn dump(base: *const u8, bytes: usize, offset: usize, bad: isize) -> Dump {
    let mut dump = Dump {
        from: 0,
        len: 0,
        bytes: [0; 64],
    };
    let at = offset.saturating_add_signed(bad);
    let from = (at & !15).saturating_sub(16);
    let to = bytes.min(from + dump.bytes.len());
    dump.from = from as isize - offset as isize;
    dump.len = to.saturating_sub(from);
    for (byte, at) in dump.bytes.iter_mut().zip(from..to) {
        // SAFETY: within the slab, which is mapped and initialised from its first object to the end of its last as debug caches and guarded pages are; volatile, since
        // a faulty user may be writing.
        *byte = unsafe { base.add(at).read_volatile() };
    }
    dump
}
