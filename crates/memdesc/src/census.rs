//! The census: what every page is, from any CPU, at any moment, while all others go on.
//!
//! A walk over the memory map that takes no lock and allocates nothing: a word is loaded, the block it heads is counted and
//! stepped over. What changes under the walk is counted as what it was or as what it became. Each page of RAM is counted
//! exactly once whatever happens, since a step is as long as what it counts, and ends at the region's end at the latest.
//!
//! **Exact at a quiet moment**: page by page what the [ledger](Mm::ledger) says (`tests/census.rs` asserts it). Only what is allocated
//! as users allocate, pages of pointers to what [`kvfree_rcu`](Mm::kvfree_rcu) frees and long lists of vmalloc areas' pages, is metadata
//! to the ledger and to the census what its words say. Otherwise:
//!
//! - the sum of all pages is always the RAM given, and what nobody touches during the walk is counted exactly;
//! - types, blocks and orders are off by no more than what changed hands meanwhile: memory that is freed behind the walk and
//!   handed out before it is counted twice, the other way round not at all;
//! - where the head of a block is gone before the walk comes to the rest of it, that rest has pages and no block:
//!   [`Census::torn`] says how many there were. Where nothing can be told it is [`CensusKind::Unsettled`].

use core::fmt;

use crate::address::{MAX_ORDER, Pfn};
use crate::desc::{Buddy, Folio, PtDesc, Slab, ZsDesc};
use crate::inline::{Facts, Offline, Poisoned, Reserved};
use crate::memmap::{DescClass, Found, PageType, Region, Word};
use crate::mm::Mm;
use crate::platform::Platform;
use crate::rcu::ReadGuard;
use crate::slab::CacheCore;

macro_rules! kinds {
    ($($(#[$doc:meta])* $name:ident = $text:literal,)*) => {
        /// What the census counts pages as: the [`PageType`]s, with what is free, slab and reserved taken apart.
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
        #[repr(usize)]
        pub enum CensusKind { $($(#[$doc])* $name,)* }

        impl CensusKind {
            /// All of them.
            pub const ALL: &[CensusKind] = &[$(CensusKind::$name),*];

            /// The name in reports.
            pub const fn name(self) -> &'static str {
                match self { $(CensusKind::$name => $text),* }
            }
        }
    };
}

kinds! {
    /// Free, in a zone's list.
    Free = "free",
    /// Free, in a per-CPU list or on its way into or out of one.
    PerCpu = "free_per_cpu",
    /// Free and never handed out: pages, but no blocks.
    Untouched = "free_untouched",
    /// Bare pages.
    Bare = "bare",
    /// Set aside in a reserve, and taken by nobody.
    SetAside = "set_aside",
    /// Slabs of users' objects.
    Slab = "slab",
    /// Slabs of descriptors, and pages of the guarded pool that hold no object.
    Metadata = "metadata",
    /// Large kmalloc.
    LargeKmalloc = "large_kmalloc",
    /// Page tables.
    PageTable = "page_table",
    /// File cache.
    File = "file",
    /// Anonymous memory.
    Anon = "anon",
    /// Parts of vmalloc areas.
    Vmalloc = "vmalloc",
    /// Network pools.
    NetPool = "net_pool",
    /// Compressed memory.
    Zsmalloc = "zsmalloc",
    /// Device memory.
    Device = "device",
    /// The memory map and the other tables from boot.
    MemMap = "memory_map",
    /// Kernel text.
    KernelText = "kernel_text",
    /// Kernel data.
    KernelData = "kernel_data",
    /// Otherwise reserved: firmware, and what was taken before the allocator came up.
    Kernel = "kernel",
    /// Off line.
    Offline = "offline",
    /// Given to the hypervisor by a balloon.
    Balloon = "balloon",
    /// Bad memory.
    HwPoison = "hwpoison",
    /// Guards.
    Guard = "guard",
    /// A driver's pages that users may map.
    Driver = "driver",
    /// The kernel's own types.
    Yours = "yours",
    /// On its way from one state to another: no word spoke for it when it was looked at. 0 at a quiet moment.
    Unsettled = "unsettled",
}

impl CensusKind {
    /// How many there are.
    pub const COUNT: usize = Self::ALL.len();

    /// Is it free memory?
    pub const fn is_free(self) -> bool {
        matches!(self, Self::Free | Self::PerCpu | Self::Untouched)
    }

    /// Of a word that is not of a slab.
    fn of(word: Word) -> CensusKind {
        match word.kind() {
            PageType::None => CensusKind::Unsettled,
            PageType::Free if word.is_in_pcp() => CensusKind::PerCpu,
            PageType::Free => CensusKind::Free,
            PageType::Bare => CensusKind::Bare,
            PageType::SetAside => CensusKind::SetAside,
            PageType::Slab => CensusKind::Slab,
            PageType::LargeKmalloc => CensusKind::LargeKmalloc,
            PageType::PageTable => CensusKind::PageTable,
            PageType::File => CensusKind::File,
            PageType::Anon => CensusKind::Anon,
            PageType::Vmalloc => CensusKind::Vmalloc,
            PageType::NetPool => CensusKind::NetPool,
            PageType::Zsmalloc => CensusKind::Zsmalloc,
            PageType::Device => CensusKind::Device,
            PageType::Reserved | PageType::Offline | PageType::Poisoned => {
                match word.inline_facts() {
                    Some(Facts::Reserved(Reserved::MemMap)) => CensusKind::MemMap,
                    Some(Facts::Reserved(Reserved::KernelText)) => CensusKind::KernelText,
                    Some(Facts::Reserved(Reserved::KernelData)) => CensusKind::KernelData,
                    Some(Facts::Reserved(Reserved::Other)) | None => CensusKind::Kernel,
                    Some(Facts::Offline(Offline::Balloon)) => CensusKind::Balloon,
                    Some(Facts::Offline(_)) => CensusKind::Offline,
                    Some(Facts::Poisoned(Poisoned::HwPoison)) => CensusKind::HwPoison,
                    Some(Facts::Poisoned(Poisoned::Guard)) => CensusKind::Guard,
                }
            }
            PageType::Driver => CensusKind::Driver,
            PageType::Yours => CensusKind::Yours,
        }
    }
}

/// A step of the walk: pages that are counted together.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CensusStep {
    /// The first page.
    pub pfn: Pfn,
    /// How many.
    pub pages: u32,
    /// As what.
    pub kind: CensusKind,
    /// The order of the block that starts here. `None` for untouched memory, and for the rest of a block whose head was not seen.
    pub order: Option<usize>,
    /// Where the block's descriptor came from, if it has one.
    pub class: Option<DescClass>,
}

/// The census of one kind.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct KindCensus {
    /// Pages.
    pub pages: u64,
    /// Blocks: allocations, or blocks in free lists.
    pub blocks: u64,
    /// Blocks by order. A large folio is one of order 1 or more.
    pub by_order: [u64; MAX_ORDER + 1],
    /// Blocks that have a descriptor.
    pub descriptors: u64,
    /// Bytes of descriptors, without what hangs on them (a folio's private data), and without those of the kernel's own caches,
    /// whose sizes are its own business.
    pub descriptor_bytes: u64,
}

impl KindCensus {
    const EMPTY: KindCensus = KindCensus {
        pages: 0,
        blocks: 0,
        by_order: [0; MAX_ORDER + 1],
        descriptors: 0,
        descriptor_bytes: 0,
    };

    /// Bytes of the memory map for these pages.
    pub const fn word_bytes(&self) -> u64 {
        self.pages * size_of::<Word>() as u64
    }

    /// Descriptors and words.
    pub const fn bytes(&self) -> u64 {
        self.descriptor_bytes + self.word_bytes()
    }

    /// Blocks of more than one page.
    pub const fn large(&self) -> u64 {
        self.blocks - self.by_order[0]
    }

    /// Pages a block on average, 0 without blocks.
    pub fn pages_a_block(&self) -> f64 {
        if self.blocks == 0 {
            return 0.0;
        }
        self.pages as f64 / self.blocks as f64
    }

    fn count(&mut self, step: &CensusStep) {
        self.pages += u64::from(step.pages);
        if let Some(order) = step.order {
            self.blocks += 1;
            self.by_order[order.min(MAX_ORDER)] += 1;
        }
        if let Some(class) = step.class {
            self.descriptors += 1;
            self.descriptor_bytes += descriptor_bytes(class);
        }
    }
}

/// What a descriptor of a class takes; 0 for the kernel's own.
const fn descriptor_bytes(class: DescClass) -> u64 {
    let bytes = match class {
        DescClass::Buddy => size_of::<Buddy>(),
        DescClass::File | DescClass::Anon => size_of::<Folio>(),
        DescClass::Slab => size_of::<Slab>(),
        DescClass::PtDesc => size_of::<PtDesc>(),
        DescClass::Zs => size_of::<ZsDesc>(),
        DescClass::Yours => 0,
    };
    bytes as u64
}

/// What all pages are: the sum of a walk. Some 2.5 KiB; who has no stack for that uses [`Mm::census_visit`].
#[derive(Clone, PartialEq, Eq)]
pub struct Census {
    kinds: [KindCensus; CensusKind::COUNT],
    /// Pages counted without the head of their block. 0 at a quiet moment.
    pub torn: u64,
}

impl Census {
    /// Nothing counted yet.
    pub const fn new() -> Census {
        Census {
            kinds: [KindCensus::EMPTY; CensusKind::COUNT],
            torn: 0,
        }
    }

    /// Adds a step of a walk.
    pub fn count(&mut self, step: &CensusStep) {
        self.kinds[step.kind as usize].count(step);
        if step.order.is_none() && step.kind != CensusKind::Untouched {
            self.torn += u64::from(step.pages);
        }
    }

    /// One kind.
    pub const fn of(&self, kind: CensusKind) -> &KindCensus {
        &self.kinds[kind as usize]
    }

    /// All kinds of which there is something.
    pub fn iter(&self) -> impl Iterator<Item = (CensusKind, &KindCensus)> {
        CensusKind::ALL
            .iter()
            .map(|&kind| (kind, self.of(kind)))
            .filter(|(_, of)| of.pages > 0)
    }

    /// All pages: always the RAM given.
    pub fn pages(&self) -> u64 {
        self.kinds.iter().map(|of| of.pages).sum()
    }

    /// Free pages.
    pub fn free_pages(&self) -> u64 {
        let free = self.iter().filter(|(kind, _)| kind.is_free());
        free.map(|(_, of)| of.pages).sum()
    }

    /// Bytes of all descriptors, in use; the slabs they lie in are [`CensusKind::Metadata`], with what is idle in them.
    pub fn descriptor_bytes(&self) -> u64 {
        self.kinds.iter().map(|of| of.descriptor_bytes).sum()
    }
}

impl Default for Census {
    fn default() -> Census {
        Census::new()
    }
}

impl fmt::Debug for Census {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut all = f.debug_struct("Census");
        for (kind, of) in self.iter() {
            all.field(kind.name(), of);
        }
        all.field("torn", &self.torn).finish()
    }
}

impl<P: Platform> Mm<P> {
    /// What every page is, by type and by order.
    ///
    /// Exact at a quiet moment, and otherwise off by no more than what changes during the walk; the sum of all pages is always
    /// the RAM given.
    ///
    /// # Context
    ///
    /// Any. Takes no lock, waits for nobody, and stops nobody.
    ///
    /// # Examples
    ///
    /// ```
    /// use memdesc::gfp::GFP_HIGHUSER_MOVABLE;
    /// use memdesc::{CensusKind, Config, FolioKind, Mm};
    /// use memdesc_host::Host;
    ///
    /// let (host, ram) = Host::small(16384)?;
    /// let mm = Mm::new(host, &Config::default(), &ram)?;
    /// let small = mm.alloc_folio(GFP_HIGHUSER_MOVABLE, 0, FolioKind::File)?;
    /// let large = mm.alloc_folio(GFP_HIGHUSER_MOVABLE, 4, FolioKind::File)?;
    ///
    /// let census = mm.census();
    /// let file = census.of(CensusKind::File);
    /// assert_eq!((file.blocks, file.large(), file.pages), (2, 1, 17));
    /// assert_eq!((file.by_order[0], file.by_order[4]), (1, 1));
    /// assert_eq!(file.word_bytes(), 17 * 8);
    /// // Every page is counted once.
    /// assert_eq!(census.pages(), 16384);
    /// # let _ = (small, large);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn census(&self) -> Census {
        let mut census = Census::new();
        self.census_visit(|step| census.count(&step));
        census
    }

    /// The walk itself: `visit` gets every step of it, by address. It may do what it likes, but the longer it takes the more
    /// changes under the walk.
    ///
    /// # Context
    ///
    /// Any, as far as the walk is concerned.
    pub fn census_visit(&self, mut visit: impl FnMut(CensusStep)) {
        for region in self.pages.map.regions() {
            let mut at = region.start;
            while at < region.end {
                let step = self.census_step(region, at);
                visit(step);
                // At least 1, at most what is left of the region.
                at += step.pages;
            }
        }
    }

    /// What is counted from this page on. Never nothing, and never beyond the region.
    fn census_step(&self, region: &Region, at: u32) -> CensusStep {
        let left = region.end - at;
        let pfn = Pfn(at);
        // Acquire: where it says that nothing starts here, the untouched range is read after it.
        let mut word = region.word(pfn).load();
        let mut reading = None;
        if word.kind() == PageType::Slab {
            // Whose it is stands in its descriptor, which stays one as long as the section is open.
            reading = Some(self.rcu_read_lock());
            word = region.word(pfn).load();
        }
        if word.kind() == PageType::None {
            let (start, end) = region.untouched();
            if at >= start && at < end {
                return CensusStep {
                    pfn,
                    pages: end - at,
                    kind: CensusKind::Untouched,
                    order: None,
                    class: None,
                };
            }
            return self.census_rest(pfn, left);
        }
        let Some((order, pages)) = block_at(pfn, word, left) else {
            return self.census_rest(pfn, left);
        };
        CensusStep {
            pfn,
            pages,
            kind: self.census_kind(word, reading.as_ref()),
            order: Some(order),
            class: class_of(word),
        }
    }

    /// The rest of a block that came to be under the walk, after its head was passed.
    #[cold]
    fn census_rest(&self, pfn: Pfn, left: u32) -> CensusStep {
        let mut step = CensusStep {
            pfn,
            pages: 1,
            kind: CensusKind::Unsettled,
            order: None,
            class: None,
        };
        let reading = self.rcu_read_lock();
        if let Some(found) = self.pages.map.lookup(pfn)
            && let Some(pages) = rest_of(pfn, found, left)
        {
            step.pages = pages;
            step.kind = self.census_kind(found.word, Some(&reading));
        }
        step
    }

    /// What a word says that was loaded in this section. A slab's without one is a user's.
    fn census_kind(&self, word: Word, reading: Option<&ReadGuard<'_, P::Rcu>>) -> CensusKind {
        if word.kind() == PageType::Slab && reading.is_some() {
            // Type-stable (rule 6): a `struct slab` still, if perhaps another slab's by now or nobody's. Its cache may be gone, so
            // it is compared and not looked into; those of descriptors are built in and stay.
            let cache = self.pages.map.slab_at(word.desc()).cache_ptr();
            if self.built_in_at(cache).is_some_and(CacheCore::is_metadata) {
                return CensusKind::Metadata;
            }
        }
        CensusKind::of(word)
    }

    /// The built-in cache at this address, if there is one.
    fn built_in_at(&self, cache: *const CacheCore) -> Option<&CacheCore> {
        let first = self.built_in.as_ptr();
        let bytes = cache.addr().checked_sub(first.addr())?;
        self.built_in.get(bytes / size_of::<CacheCore>())
    }
}

/// Where the descriptor of a block came from. A guard keeps its `struct buddy` beside the word's facts.
fn class_of(word: Word) -> Option<DescClass> {
    if word.inline_facts() == Some(Facts::Poisoned(Poisoned::Guard)) {
        return Some(DescClass::Buddy);
    }
    word.kind().has_descriptor().then(|| word.class())
}

/// The order of the block that this word says begins here, and how many of its pages are among the `left` that there are. `None` if
/// it is the word of a tail: up to order 3 they may say what their head says.
fn block_at(pfn: Pfn, word: Word, left: u32) -> Option<(usize, u32)> {
    let order = word.order().min(MAX_ORDER);
    pfn.is_aligned(order).then(|| (order, left.min(1 << order)))
}

/// The pages from here to the end of the block that was found, of the `left` that there are. `None` if it does not reach here.
fn rest_of(pfn: Pfn, found: Found, left: u32) -> Option<u32> {
    let end = u64::from(found.head.0) + (1 << found.word.order().min(MAX_ORDER));
    let rest = end.checked_sub(pfn.0.into())?;
    (rest > 0).then(|| left.min(rest as u32))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn word(order: usize) -> Word {
        Word::inline(PageType::Reserved, order, 0)
    }

    #[test]
    fn stale_heads_do_not_reach_beyond_what_is_left() {
        assert_eq!(block_at(Pfn(1024), word(10), 5000), Some((10, 1024)));
        assert_eq!(block_at(Pfn(1024), word(10), 700), Some((10, 700)));
        assert_eq!(block_at(Pfn(1024), word(0), 1), Some((0, 1)));
        // An order that there is not.
        assert_eq!(block_at(Pfn(1 << 15), word(15), 5000), Some((10, 1024)));
        assert_eq!(block_at(Pfn(1025), word(10), 5000), None);
        assert_eq!(block_at(Pfn(12), word(3), 5000), None);
    }

    #[test]
    fn the_rest_of_a_block() {
        let found = |head, order| Found {
            head: Pfn(head),
            word: word(order),
        };
        assert_eq!(rest_of(Pfn(13), found(8, 3), 100), Some(3));
        assert_eq!(rest_of(Pfn(13), found(8, 3), 2), Some(2));
        assert_eq!(rest_of(Pfn(16), found(8, 3), 100), None);
        assert_eq!(rest_of(Pfn(17), found(8, 3), 100), None);
        assert_eq!(
            rest_of(Pfn(u32::MAX - 1), found(u32::MAX - 1023, 10), 9),
            Some(2)
        );
    }
}
