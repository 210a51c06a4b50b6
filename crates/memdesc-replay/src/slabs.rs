//! Which pages Linux's slab took for itself.
//!
//! They are in `mm_page_alloc` like all others. When its objects are replayed, our slab takes pages of its own for them,
//! so replaying those of Linux too would count them twice. An object's address, less the base of the direct map, is a
//! physical address: if it lies in pages that are allocated at that moment, these are a slab (or a large kmalloc).

use alloc::vec;
use alloc::vec::Vec;

use memdesc::gfp::__GFP_MOVABLE;
use memdesc_trace::{Event, EventKind};

use crate::classify;
use crate::objects::ZERO_SIZE_PTR;

/// Where x86-64 maps physical address 0 without KASLR.
pub const DEFAULT_BASE: u64 = 0xffff_8880_0000_0000;
/// With KASLR the base is a multiple of this.
const BASE_ALIGN: u64 = 1 << 30;
/// Events that a base is judged by.
const SAMPLE: usize = 300_000;
/// Bases that are tried at most.
const CANDIDATES: u64 = 4096;

/// How slab pages were told.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Told {
    /// By addresses, with this base.
    ByAddress(u64),
    /// By gfp flags: no base fits the addresses (ftrace hashes them unless told not to).
    ByFlags,
}

/// The page allocations that are Linux's slabs, by event.
pub struct SlabPages {
    bits: Vec<u64>,
    /// How they were told.
    pub told: Told,
}

impl SlabPages {
    /// Is the allocation by this event one?
    #[inline]
    pub fn contains(&self, event: usize) -> bool {
        self.bits[event / 64] & 1 << (event % 64) != 0
    }

    fn add(&mut self, event: usize) {
        self.bits[event / 64] |= 1 << (event % 64);
    }
}

/// The address of an object that an event is about.
#[inline]
fn object(kind: EventKind) -> Option<u64> {
    match kind {
        EventKind::Kmalloc { ptr, .. }
        | EventKind::CacheAlloc { ptr, .. }
        | EventKind::Kfree { ptr }
        | EventKind::CacheFree { ptr, .. } => (ptr > ZERO_SIZE_PTR).then_some(ptr),
        _ => None,
    }
}

#[inline]
fn page_of(ptr: u64, base: u64, pages: usize) -> Option<usize> {
    let page = ptr.wrapping_sub(base) >> 12;
    (page < pages as u64).then_some(page as usize)
}

/// Finds the slab pages among the events. `pages` is one more than the highest page there is.
pub fn find(events: &[Event], pages: usize, base: Option<u64>) -> SlabPages {
    let base = base.or_else(|| find_base(events, pages));
    let mut slabs = SlabPages {
        bits: vec![0; events.len() / 64 + 1],
        told: base.map_or(Told::ByFlags, Told::ByAddress),
    };
    match base {
        Some(base) => by_address(events, pages, base, |event, _| slabs.add(event)),
        None => {
            for (i, event) in events.iter().enumerate() {
                if matches!(event.kind(), EventKind::PageAlloc { gfp, order, .. } if classify::looks_like_slab(gfp, order))
                {
                    slabs.add(i);
                }
            }
        }
    }
    slabs
}

/// Calls `found` with each page allocation that an object lies in, once or more, and the object's event.
fn by_address(events: &[Event], pages: usize, base: u64, mut found: impl FnMut(usize, usize)) {
    // Which event allocated a page, from 1.
    let mut owner = vec![0u32; pages];
    for (i, event) in events.iter().enumerate() {
        match event.kind() {
            EventKind::PageAlloc { pfn, order, .. } => {
                owner[pfn as usize..pfn as usize + (1 << order)].fill(i as u32 + 1);
            }
            EventKind::PageFree { pfn, order } => {
                owner[pfn as usize..pfn as usize + (1 << order)].fill(0);
            }
            kind => {
                let page = object(kind).and_then(|ptr| page_of(ptr, base, pages));
                if let Some(page) = page
                    && owner[page] != 0
                {
                    found(owner[page] as usize - 1, i);
                }
            }
        }
    }
}

/// The base of the direct map: the usual one if the addresses fit it, else the multiple of 1 GiB with which objects lie in
/// pages that were allocated for the kernel, and not in those of users.
fn find_base(events: &[Event], pages: usize) -> Option<u64> {
    let addresses = || events.iter().filter_map(|e| object(e.kind()));
    let (mut all, mut fit) = (0u64, 0u64);
    for ptr in addresses().take(SAMPLE) {
        all += 1;
        fit += u64::from(page_of(ptr, DEFAULT_BASE, pages).is_some());
    }
    if all == 0 || fit * 100 >= all * 95 {
        return Some(DEFAULT_BASE);
    }
    // A few addresses may be no objects of the direct map: those in the upper half are taken.
    let kernel = || addresses().take(SAMPLE).filter(|&ptr| ptr >> 56 == 0xff);
    let (low, high) = (kernel().min()?, kernel().max()?);
    let first = high
        .saturating_sub((pages as u64) << 12)
        .next_multiple_of(BASE_ALIGN);
    let last = low & !(BASE_ALIGN - 1);
    if first > last || (last - first) / BASE_ALIGN >= CANDIDATES {
        return None;
    }
    let tries = (last - first) / BASE_ALIGN + 1;
    let sample = &events[..events.len().min(SAMPLE.min(30_000_000 / tries as usize))];
    let score = |base: u64| {
        let (mut good, mut bad) = (0i64, 0i64);
        by_address(sample, pages, base, |alloc, _| match sample[alloc].kind() {
            EventKind::PageAlloc { gfp, .. } if gfp.contains(__GFP_MOVABLE) => bad += 1,
            _ => good += 1,
        });
        good - 10 * bad
    };
    (0..tries)
        .map(|i| first + i * BASE_ALIGN)
        .map(|base| (score(base), base))
        .filter(|&(score, _)| score > 0)
        .max()
        .map(|(_, base)| base)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recording(base: u64) -> Vec<Event> {
        let mut text = String::new();
        for i in 0..50u64 {
            let pfn = 0x1000 + i * 0x3000;
            let user = pfn + 1;
            let ptr = base + (pfn << 12) + 64;
            text += &format!(
                "[000] 1.{i:06}: kmem:mm_page_alloc: page=0x0 pfn={pfn:#x} order=0 migratetype=0 gfp_flags=GFP_KERNEL|__GFP_COMP\n\
                 [000] 1.{i:06}: kmem:mm_page_alloc: page=0x0 pfn={user:#x} order=0 migratetype=1 gfp_flags=GFP_HIGHUSER_MOVABLE\n\
                 [000] 1.{i:06}: kmem:kmalloc: call_site=f ptr={ptr:#x} bytes_req=64 bytes_alloc=64 gfp_flags=GFP_KERNEL\n"
            );
        }
        memdesc_trace::parse_bytes(text.as_bytes()).events
    }

    #[test]
    fn bases_are_found() {
        for base in [DEFAULT_BASE, 0xffff_9c41_4000_0000, 0xff11_0001_8000_0000] {
            let events = recording(base);
            let slabs = find(&events, 0x100_000, None);
            assert_eq!(slabs.told, Told::ByAddress(base), "{base:#x}");
            for i in 0..50 {
                assert!(slabs.contains(3 * i) && !slabs.contains(3 * i + 1));
            }
        }
    }

    #[test]
    fn hashed_addresses() {
        let mut events = recording(DEFAULT_BASE);
        for event in &mut events {
            if let EventKind::Kmalloc {
                ptr,
                bytes_req,
                bytes_alloc,
                gfp,
            } = event.kind()
            {
                let ptr = ptr.wrapping_mul(0x9e37_79b9) & 0xffff_ffff;
                *event = Event::new(
                    0,
                    0,
                    EventKind::Kmalloc {
                        ptr,
                        bytes_req,
                        bytes_alloc,
                        gfp,
                    },
                );
            }
        }
        assert_eq!(find(&events, 0x100_000, None).told, Told::ByFlags);
    }
}
