//! `vmap_area`: what describes an area of the vmalloc range, and every page in it, in 96 bytes.
//!
//! Linux has a `vm_struct` (72 bytes), a `vmap_area` (72), another for each hole, and 8 bytes a page. Here holes are what lies between areas,
//! places are counted in pages from the start of the range, and a page's place in the list is 4 bytes: its number.
//!
//! | bytes | what |
//! |---:|---|
//! | 0 | children in the tree of areas |
//! | 16 | link in the stack of areas that were freed and wait for a purge |
//! | 24 | the list of blocks, where there are more than [`INLINE`] |
//! | 32 | who allocated |
//! | 40 | whose kernel stack |
//! | 48 | where it starts and ends, guards included |
//! | 56 | of its subtree: first start, last end, largest hole |
//! | 68 | pages mapped |
//! | 72 | up to [`INLINE`] blocks: a kernel stack needs no list |
//! | 88 | height in the tree, order of the blocks, kind, state, guards before, has an owner, whom it is charged to |

use core::fmt;
use core::panic::Location;

use crate::address::Pfn;
use crate::sync::atomic::{AtomicPtr, AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

/// So many blocks are listed in the descriptor itself.
pub(crate) const INLINE: usize = 4;

/// What an area is for.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
pub enum VmAreaKind {
    /// Memory of [`vmalloc`](crate::Mm::vmalloc) and its kin.
    Vmalloc = 0,
    /// Pages of somebody else's, mapped by [`vmap`](crate::Mm::vmap).
    Vmap = 1,
    /// A kernel stack.
    Stack = 2,
}

impl VmAreaKind {
    const ALL: [VmAreaKind; 3] = [VmAreaKind::Vmalloc, VmAreaKind::Vmap, VmAreaKind::Stack];

    /// May users map the pages of such an area? A kernel stack's never (seed 003).
    pub const fn may_be_mapped(self) -> bool {
        !matches!(self, VmAreaKind::Stack)
    }

    /// Its name in reports.
    pub const fn name(self) -> &'static str {
        match self {
            VmAreaKind::Vmalloc => "vmalloc",
            VmAreaKind::Vmap => "vmap",
            VmAreaKind::Stack => "kernel stack",
        }
    }
}

/// How far an area's life is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub(crate) enum State {
    /// Being filled: nobody knows its address (`VM_UNINITIALIZED`).
    New = 0,
    Live = 1,
    /// Its pages are gone or going; only the addresses are kept, until a purge.
    Freed = 2,
}

/// The descriptor of an area.
///
/// # Invariants
///
/// Links, what is said of the subtree, and the state change under the lock of the tree. `pages` grows while the area is new, and the blocks of so
/// many pages are in the list; they stay the same while it is live.
#[repr(C, align(8))]
pub struct VmArea {
    pub(crate) left: AtomicPtr<VmArea>,
    pub(crate) right: AtomicPtr<VmArea>,
    pub(crate) next: AtomicPtr<VmArea>,
    list: AtomicPtr<AtomicU32>,
    caller: AtomicPtr<Location<'static>>,
    owner: AtomicU64,
    start: AtomicU32,
    end: AtomicU32,
    pub(crate) first: AtomicU32,
    pub(crate) last: AtomicU32,
    pub(crate) hole: AtomicU32,
    pages: AtomicU32,
    inline: [AtomicU32; INLINE],
    pub(crate) height: AtomicU8,
    order: AtomicU8,
    kind: AtomicU8,
    state: AtomicU8,
    lead: AtomicU8,
    has_owner: AtomicU8,
    memcg: AtomicU16,
}

const _: () = assert!(size_of::<VmArea>() == 96);

impl VmArea {
    /// Sets it up: in no tree, without pages.
    pub(crate) fn init(
        &self,
        kind: VmAreaKind,
        lead: u8,
        order: usize,
        caller: &'static Location<'static>,
    ) {
        for link in [&self.left, &self.right, &self.next] {
            link.store(core::ptr::null_mut(), Ordering::Relaxed);
        }
        self.list.store(core::ptr::null_mut(), Ordering::Relaxed);
        self.kind.store(kind as u8, Ordering::Relaxed);
        self.state.store(State::New as u8, Ordering::Relaxed);
        self.lead.store(lead, Ordering::Relaxed);
        self.order.store(order as u8, Ordering::Relaxed);
        self.pages.store(0, Ordering::Relaxed);
        self.set_caller(caller);
        self.set_owner(None);
        self.memcg.store(0, Ordering::Relaxed);
    }

    /// Whom it is charged to; 0 for nobody.
    pub fn memcg(&self) -> u16 {
        self.memcg.load(Ordering::Relaxed)
    }

    pub(crate) fn set_memcg(&self, memcg: u16) {
        self.memcg.store(memcg, Ordering::Relaxed);
    }

    /// The charge is taken back: by whom, if there is one.
    pub(crate) fn take_memcg(&self) -> u16 {
        self.memcg.swap(0, Ordering::AcqRel)
    }

    /// Gives it its addresses, as pages from the start of the range.
    pub(crate) fn set_place(&self, start: u32, end: u32) {
        self.start.store(start, Ordering::Relaxed);
        self.end.store(end, Ordering::Relaxed);
    }

    /// Its first page, a guard if it has one before.
    pub(crate) fn start(&self) -> u32 {
        self.start.load(Ordering::Relaxed)
    }

    /// One past its last page, which is a guard.
    pub(crate) fn end(&self) -> u32 {
        self.end.load(Ordering::Relaxed)
    }

    /// Its first page that is mapped.
    pub(crate) fn first_page(&self) -> u32 {
        self.start() + u32::from(self.lead.load(Ordering::Relaxed))
    }

    /// How many pages are mapped.
    pub fn pages(&self) -> usize {
        self.pages.load(Ordering::Relaxed) as usize
    }

    pub(crate) fn set_pages(&self, pages: usize) {
        self.pages.store(pages as u32, Ordering::Relaxed);
    }

    /// The order of its blocks.
    pub fn order(&self) -> usize {
        usize::from(self.order.load(Ordering::Relaxed))
    }

    /// What it is for.
    pub fn kind(&self) -> VmAreaKind {
        VmAreaKind::ALL[usize::from(self.kind.load(Ordering::Relaxed)) % VmAreaKind::ALL.len()]
    }

    pub(crate) fn state(&self) -> State {
        match self.state.load(Ordering::Relaxed) {
            0 => State::New,
            1 => State::Live,
            _ => State::Freed,
        }
    }

    pub(crate) fn set_state(&self, state: State) {
        self.state.store(state as u8, Ordering::Relaxed);
    }

    /// Who allocated it.
    pub fn caller(&self) -> &'static Location<'static> {
        let caller = self.caller.load(Ordering::Relaxed);
        // SAFETY: only `set_caller` stores here, from a reference that lives for ever, and does so before anybody can have the area.
        unsafe { &*caller }
    }

    pub(crate) fn set_caller(&self, caller: &'static Location<'static>) {
        let caller = (&raw const *caller).cast_mut();
        self.caller.store(caller, Ordering::Relaxed);
    }

    /// Whose kernel stack it is; `None` while it is kept for the next one, and for other kinds.
    pub fn owner(&self) -> Option<u64> {
        let owner = self.owner.load(Ordering::Relaxed);
        (self.has_owner.load(Ordering::Relaxed) != 0).then_some(owner)
    }

    pub(crate) fn set_owner(&self, owner: Option<u64>) {
        self.owner.store(owner.unwrap_or(0), Ordering::Relaxed);
        self.has_owner
            .store(u8::from(owner.is_some()), Ordering::Relaxed);
    }

    /// The list of its blocks, if they are not in the descriptor.
    pub(crate) fn list(&self) -> *mut AtomicU32 {
        self.list.load(Ordering::Relaxed)
    }

    /// # Safety
    ///
    /// `list` has room for all blocks that the area will have, is aligned for them, and is the area's until it has no pages any more.
    pub(crate) unsafe fn set_list(&self, list: *mut AtomicU32) {
        self.list.store(list, Ordering::Relaxed);
    }

    /// The place in the list of this block.
    ///
    /// # Safety
    ///
    /// It has so many blocks, or will have.
    unsafe fn slot(&self, block: usize) -> &AtomicU32 {
        let list = self.list();
        if list.is_null() {
            return &self.inline[block];
        }
        // SAFETY: by the promise of `set_list`, and the caller's.
        unsafe { &*list.add(block) }
    }

    /// Says which pages the next block is, and counts its pages.
    ///
    /// # Safety
    ///
    /// There is room for it in the list. Only while the area is new, by who fills it.
    pub(crate) unsafe fn push_block(&self, pfn: Pfn) {
        let pages = self.pages();
        // SAFETY: the caller's promise.
        let slot = unsafe { self.slot(pages >> self.order()) };
        slot.store(pfn.0, Ordering::Relaxed);
        self.set_pages(pages + (1 << self.order()));
    }

    /// The page with this place in the area, and how many pages of its block come after it, itself included.
    ///
    /// # Safety
    ///
    /// The area is the caller's, or he holds the lock of the tree and it is live.
    pub(crate) unsafe fn page(&self, index: usize) -> Option<(Pfn, usize)> {
        if index >= self.pages() {
            return None;
        }
        let (order, within) = (self.order(), index & ((1 << self.order()) - 1));
        // SAFETY: it has so many pages, by the check above, and the list stays while the area is live.
        let head = unsafe { self.slot(index >> order) }.load(Ordering::Relaxed);
        Some((Pfn(head + within as u32), (1 << order) - within))
    }
}

impl fmt::Debug for VmArea {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VmArea")
            .field("kind", &self.kind())
            .field("state", &self.state())
            .field("start", &self.start())
            .field("pages", &self.pages())
            .field("caller", self.caller())
            .finish_non_exhaustive()
    }
}
