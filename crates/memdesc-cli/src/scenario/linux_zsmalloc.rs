//! What Linux 6.18 would need for the same objects.
//!
//! From its source: size classes, pages of a zspage and the bytes before each object as `mm/zsmalloc.c` has them (`CONFIG_ZSMALLOC_CHAIN_SIZE` 8); of each page
//! a `struct zpdesc`, which is its `struct page`, 64 bytes (`mm/zpdesc.h`); of each zspage a `struct zspage`: bit fields 4, `inuse` 4, `freeobj` 4, padding 4, `first_zpdesc` 8, `list` 16,
//! `pool` 8, `zsl` 8 (a spinlock and a count, without debugging): 56; of each object a handle, 8 bytes of the slab `zs_handle`, 512 to a page that itself has a `struct page`.
//! Zspages are taken to be as full as they can be, as they are here after compaction. Handles are taken to lie in the order in which they were made; a page of
//! them stays as long as one is in use, there as here.

use std::collections::BTreeSet;

use memdesc::zsmalloc::{SIZE_CLASSES, ZS_SIZE_CLASSES, linux_class_index};

const STRUCT_PAGE: u64 = 64;
const STRUCT_ZSPAGE: u64 = 56;
const HANDLES_A_PAGE: u64 = 512;

/// Objects by class.
#[derive(Clone)]
pub(crate) struct Linux {
    objects: [u64; ZS_SIZE_CLASSES],
    /// Pages of handles.
    handles: BTreeSet<u64>,
}

impl Linux {
    pub(crate) fn new() -> Linux {
        Linux {
            objects: [0; ZS_SIZE_CLASSES],
            handles: BTreeSet::new(),
        }
    }

    /// The object that was made as the `nth`, from 0.
    pub(crate) fn add(&mut self, nth: u64, size: usize) {
        self.handles.insert(nth / HANDLES_A_PAGE);
        if let Some(index) = linux_class_index(size) {
            self.objects[index] += 1;
        }
    }

    fn zspages(&self) -> impl Iterator<Item = (u64, u64)> {
        let classes = self.objects.iter().zip(&SIZE_CLASSES);
        classes.map(|(n, class)| (n.div_ceil(class.objects.into()), class.pages.into()))
    }

    /// Pages of objects.
    pub(crate) fn pages(&self) -> u64 {
        self.zspages().map(|(n, pages)| n * pages).sum()
    }

    /// Bytes of what describes those pages.
    pub(crate) fn descriptor_bytes(&self) -> u64 {
        let zspages: u64 = self.zspages().map(|(n, _)| n).sum();
        self.pages() * STRUCT_PAGE + zspages * STRUCT_ZSPAGE
    }

    /// Bytes of handles and what describes their pages.
    pub(crate) fn handle_bytes(&self) -> u64 {
        self.handles.len() as u64 * (4096 + STRUCT_PAGE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn by_hand() {
        let mut linux = Linux::new();
        // 1000 + 8 bytes: class 1008, of which 4 fit a page and 4 pages 16.
        (0..17).for_each(|nth| linux.add(nth, 1000));
        // A page of its own.
        linux.add(511, 3625);
        let class = SIZE_CLASSES.iter().find(|c| c.size >= 1008).unwrap();
        let zspages = 17u64.div_ceil(class.objects.into());
        let pages = zspages * u64::from(class.pages);
        assert_eq!(linux.pages(), pages + 1);
        assert_eq!(
            linux.descriptor_bytes(),
            64 * (pages + 1) + 56 * (zspages + 1)
        );
        assert_eq!(linux.handle_bytes(), 4160);
        // Alone in its page of handles.
        linux.add(5000, 1);
        assert_eq!(linux.handle_bytes(), 2 * 4160);
    }
}
