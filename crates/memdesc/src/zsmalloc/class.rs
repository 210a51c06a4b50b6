//! Size classes: how long objects are and how many pages make a zspage. All of it is known when this is compiled.
//!
//! Source: `get_size_class_index`, `calculate_zspage_chain_size`, `can_merge` of Linux 6.18, with its default `CONFIG_ZSMALLOC_CHAIN_SIZE` of 8. Only the
//! bytes that an object has before its data are different: 6, behind the data, instead of 8.

use crate::address::PAGE_SIZE;

/// Bytes of an object that say whose it is, at its end: its handle's place, or the next free object. Linux's `ZS_HANDLE_SIZE` is 8.
pub(crate) const HEADER: usize = 6;
/// The longest data.
pub const ZS_MAX_ALLOC_SIZE: usize = PAGE_SIZE;
/// The smallest class (`ZS_MIN_ALLOC_SIZE`).
pub const ZS_MIN_ALLOC_SIZE: usize = 32;
/// From one class to the next (`ZS_SIZE_CLASS_DELTA`), before classes are merged.
pub const ZS_SIZE_CLASS_DELTA: usize = PAGE_SIZE >> 8;
/// Pages in a zspage at most (`CONFIG_ZSMALLOC_CHAIN_SIZE`).
pub const ZS_MAX_PAGES_PER_ZSPAGE: usize = 8;
/// Classes before they are merged (`ZS_SIZE_CLASSES`).
const SIZES: usize = (ZS_MAX_ALLOC_SIZE - ZS_MIN_ALLOC_SIZE) / ZS_SIZE_CLASS_DELTA + 1;

/// A size class.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SizeClass {
    /// Bytes from one object to the next.
    pub size: u16,
    /// Pages of a zspage.
    pub pages: u8,
    /// Objects in a zspage.
    pub objects: u16,
}

impl SizeClass {
    /// The class of this size before it is merged with others.
    pub(crate) const fn of(size: usize) -> SizeClass {
        let mut pages = 1;
        // A power of two fits a page without waste.
        if !size.is_power_of_two() {
            let (mut least, mut n) = (usize::MAX, 1);
            while n <= ZS_MAX_PAGES_PER_ZSPAGE {
                let waste = n * PAGE_SIZE % size;
                if waste < least {
                    least = waste;
                    pages = n;
                }
                n += 1;
            }
        }
        SizeClass {
            size: size as u16,
            pages: pages as u8,
            objects: (pages * PAGE_SIZE / size) as u16,
        }
    }

    /// One object a page: what says whose it is lies in the descriptor, and all of the page is data.
    #[inline]
    pub const fn is_huge(&self) -> bool {
        self.pages == 1 && self.objects == 1
    }

    /// Bytes of data that fit an object.
    #[inline]
    pub const fn capacity(&self) -> usize {
        if self.is_huge() {
            self.size as usize
        } else {
            self.size as usize - HEADER
        }
    }

    /// Classes with as many pages and objects are one: the larger.
    const fn merges(&self, other: &SizeClass) -> bool {
        self.pages == other.pages && self.objects == other.objects
    }
}

const fn unmerged(index: usize) -> SizeClass {
    SizeClass::of(ZS_MIN_ALLOC_SIZE + index * ZS_SIZE_CLASS_DELTA)
}

const fn count() -> usize {
    let (mut n, mut i) = (1, 1);
    while i < SIZES {
        n += !unmerged(i - 1).merges(&unmerged(i)) as usize;
        i += 1;
    }
    n
}

/// How many classes there are.
pub const ZS_SIZE_CLASSES: usize = count();

const _: () = assert!(
    ZS_SIZE_CLASSES < 255,
    "the class of handles comes after them"
);

/// All classes, by size; and of each size before merging the class it came to.
const TABLES: ([SizeClass; ZS_SIZE_CLASSES], [u8; SIZES]) = {
    let mut classes = [SizeClass {
        size: 0,
        pages: 0,
        objects: 0,
    }; ZS_SIZE_CLASSES];
    let mut index = [0; SIZES];
    let (mut n, mut i) = (0, 0);
    while i < SIZES {
        let class = unmerged(i);
        if i > 0 && !classes[n].merges(&class) {
            n += 1;
        }
        assert!(class.objects as u32 <= 256, "their numbers fit a slot");
        classes[n] = class;
        index[i] = n as u8;
        i += 1;
    }
    (classes, index)
};

/// All classes, by size.
pub static SIZE_CLASSES: [SizeClass; ZS_SIZE_CLASSES] = TABLES.0;
static INDEX: [u8; SIZES] = TABLES.1;

/// The class for an object of which `size` bytes are data and what it has besides (`get_size_class_index`).
const fn class_for(size: usize) -> usize {
    let index = size
        .saturating_sub(ZS_MIN_ALLOC_SIZE)
        .div_ceil(ZS_SIZE_CLASS_DELTA);
    if index < SIZES {
        INDEX[index] as usize
    } else {
        ZS_SIZE_CLASSES - 1
    }
}

/// The class for so many bytes of data (`zs_lookup_class_index`); more than [`ZS_MAX_ALLOC_SIZE`] have none.
pub(crate) const fn class_index(size: usize) -> Option<usize> {
    if size == 0 || size > ZS_MAX_ALLOC_SIZE {
        return None;
    }
    Some(class_for(size + HEADER))
}

/// The class that Linux 6.18 has for so many bytes: the same classes, 8 bytes before the data.
pub const fn linux_class_index(size: usize) -> Option<usize> {
    if size == 0 || size > ZS_MAX_ALLOC_SIZE {
        return None;
    }
    Some(class_for(size + 8))
}

/// Data of this size or more has a page of its own (`zs_huge_class_size`).
pub(crate) const HUGE_CLASS_SIZE: usize = {
    let mut i = ZS_SIZE_CLASSES;
    while i > 0 && TABLES.0[i - 1].is_huge() {
        i -= 1;
    }
    TABLES.0[i - 1].capacity() + 1
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_size_has_the_smallest_class_that_holds_it() {
        for size in 1..=ZS_MAX_ALLOC_SIZE {
            let index = class_index(size).unwrap();
            let class = &SIZE_CLASSES[index];
            assert!(class.capacity() >= size, "{size} in {class:?}");
            assert!(
                index == 0 || SIZE_CLASSES[index - 1].capacity() < size || class.is_huge(),
                "{size} in {class:?}"
            );
            assert_eq!(class.is_huge(), size >= HUGE_CLASS_SIZE);
            let linux = linux_class_index(size).unwrap();
            assert!(linux >= index && linux <= index + 1);
        }
        assert_eq!((class_index(0), class_index(4097)), (None, None));
    }

    #[test]
    fn as_linux_has_them() {
        // By hand, from `calculate_zspage_chain_size`: size, objects and pages.
        for (size, objects, pages) in [
            (32, 128, 1),
            (48, 256, 3),
            (64, 64, 1),
            (96, 128, 3),
            (2048, 2, 1),
            (3264, 5, 4),
            (3632, 9, 8),
            (4096, 1, 1),
        ] {
            let class = SIZE_CLASSES.iter().find(|c| c.size == size).unwrap();
            assert_eq!((class.objects, class.pages), (objects, pages), "{size}");
        }
        // The smallest object that Linux gives a page of its own is 3625 bytes: 3632 - 8 + 1.
        assert_eq!(HUGE_CLASS_SIZE, 3632 - HEADER + 1);
        assert!(SIZE_CLASSES.windows(2).all(|w| w[0].size < w[1].size));
        for class in &SIZE_CLASSES {
            let (bytes, used) = (
                usize::from(class.pages) * PAGE_SIZE,
                usize::from(class.objects) * usize::from(class.size),
            );
            assert!(used <= bytes && bytes - used < usize::from(class.size));
            // What an object has besides its data never crosses pages.
            assert_eq!(class.size % 16, 0);
        }
    }
}
