//! Linux's objects: address there, object here.

use alloc::vec;
use alloc::vec::Vec;

use crate::FxHashMap;

/// Everything up to this address is no object: NULL, and what `kmalloc(0)` gives.
pub const ZERO_SIZE_PTR: u64 = 16;

/// All objects that are live.
pub struct Objects<O> {
    map: FxHashMap<u64, O>,
    /// Where Linux maps physical address 0, if that is known.
    base: Option<u64>,
    /// How many objects begin in each page of Linux.
    in_page: Vec<u16>,
}

impl<O> Objects<O> {
    /// None yet. `pages` is one more than the highest page of Linux; it matters only with a base.
    pub fn new(base: Option<u64>, pages: usize) -> Objects<O> {
        Objects {
            map: FxHashMap::default(),
            base,
            in_page: vec![0; if base.is_some() { pages } else { 0 }],
        }
    }

    /// How many are live.
    pub fn len(&self) -> usize {
        self.map.len()
    }

    /// Are there none?
    pub fn is_empty(&self) -> bool {
        self.map.is_empty()
    }

    #[inline]
    fn count(&mut self, ptr: u64, change: i16) {
        let Some(base) = self.base else { return };
        if let Some(n) = self
            .in_page
            .get_mut((ptr.wrapping_sub(base) >> 12) as usize)
        {
            *n = n.wrapping_add_signed(change);
        }
    }

    /// An object stands for this address. If there was one already, it comes back: its free was not seen.
    #[inline]
    pub fn put(&mut self, ptr: u64, object: O) -> Option<O> {
        let old = self.map.insert(ptr, object);
        if old.is_none() {
            self.count(ptr, 1);
        }
        old
    }

    /// The object of this address, which nobody has from here on.
    #[inline]
    pub fn take(&mut self, ptr: u64) -> Option<O> {
        let object = self.map.remove(&ptr)?;
        self.count(ptr, -1);
        Some(object)
    }

    /// The objects in a page that Linux's slab gave back: they were freed unseen.
    #[inline]
    pub fn take_page(&mut self, pfn: u32, found: &mut Vec<O>) {
        if let (Some(base), Some(1..)) = (self.base, self.in_page.get(pfn as usize)) {
            self.search_page(base, pfn, found);
        }
    }

    #[cold]
    fn search_page(&mut self, base: u64, pfn: u32, found: &mut Vec<O>) {
        let start = base + (u64::from(pfn) << 12);
        for ptr in (start..start + 4096).step_by(8) {
            if self.in_page[pfn as usize] == 0 {
                return;
            }
            found.extend(self.take(ptr));
        }
    }

    /// All of them.
    pub fn drain(&mut self) -> impl Iterator<Item = O> + '_ {
        self.map.drain().map(|(_, object)| object)
    }
}
