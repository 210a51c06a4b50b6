//! Names seen before are not read again: gfp flag strings and cache names by their bytes.

use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::string::String;
use alloc::vec::Vec;

use memdesc::gfp::Flags;

use crate::event::{Cache, CacheId, CacheTable};
use crate::scan;

/// Where a string lies in a table of `SLOTS`: cheap, and good enough for what kernels print.
#[inline]
fn slot_of(name: &[u8]) -> usize {
    let word = |at: usize| {
        name.get(at..at + 8).map_or(0, |w| {
            u64::from_le_bytes(w.try_into().expect("eight bytes"))
        })
    };
    let mixed = if name.len() >= 8 {
        word(0) ^ word(name.len() - 8).rotate_left(23) ^ word(name.len() / 2 - 4).rotate_left(41)
    } else {
        name.iter().fold(0, |w, &b| w << 8 | u64::from(b))
    };
    let hash = (mixed ^ name.len() as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (hash >> 56) as usize
}

const SLOTS: usize = 256;

/// A table from bytes to a value in which the newest string of a slot displaces the older.
struct Recent<T> {
    slots: Vec<Option<(Box<[u8]>, T)>>,
}

impl<T: Copy> Recent<T> {
    fn new() -> Self {
        Recent {
            slots: (0..SLOTS).map(|_| None).collect(),
        }
    }

    #[inline]
    fn get(&self, name: &[u8]) -> Option<T> {
        match &self.slots[slot_of(name)] {
            Some((known, value)) if **known == *name => Some(*value),
            _ => None,
        }
    }

    fn put(&mut self, name: &[u8], value: T) {
        self.slots[slot_of(name)] = Some((name.into(), value));
    }
}

/// Flags as read from their names.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Gfp {
    /// The flags that are known.
    pub(crate) flags: Flags,
    /// Was there a name that this version does not know?
    pub(crate) unknown_name: bool,
}

/// Reads `gfp_flags=` values.
pub(crate) struct GfpNames(Recent<Gfp>);

impl GfpNames {
    pub(crate) fn new() -> Self {
        GfpNames(Recent::new())
    }

    /// The flags of `GFP_KERNEL|__GFP_ZERO|0x400000`, or `None` if these are no flags.
    #[inline]
    pub(crate) fn read(&mut self, text: &[u8]) -> Option<Gfp> {
        match self.0.get(text) {
            Some(gfp) => Some(gfp),
            None => self.read_new(text),
        }
    }

    #[cold]
    fn read_new(&mut self, text: &[u8]) -> Option<Gfp> {
        let mut gfp = Gfp {
            flags: Flags::EMPTY,
            unknown_name: false,
        };
        for name in text.split(|&b| b == b'|') {
            gfp.flags |= match one_flag(name)? {
                Some(flags) => flags,
                None => {
                    gfp.unknown_name = true;
                    Flags::EMPTY
                }
            };
        }
        self.0.put(text, gfp);
        Some(gfp)
    }
}

/// `None`: no flag at all. `Some(None)`: looks like one, of another kernel version.
fn one_flag(name: &[u8]) -> Option<Option<Flags>> {
    if name == b"none" {
        return Some(Some(Flags::EMPTY));
    }
    if let Some((bits, [])) = scan::number(name) {
        return u32::try_from(bits)
            .ok()
            .map(|bits| Some(Flags::from_bits(bits)));
    }
    let text = core::str::from_utf8(name).ok()?;
    if let Some(flags) = Flags::from_name(text) {
        return Some(Some(flags));
    }
    let plausible = text.trim_start_matches('_').starts_with("GFP_")
        && name
            .iter()
            .all(|b| b.is_ascii_uppercase() || b.is_ascii_digit() || *b == b'_');
    plausible.then_some(None)
}

/// Gives caches their ids.
pub(crate) struct CacheNames {
    recent: Recent<CacheId>,
    by_name: BTreeMap<Box<[u8]>, Vec<CacheId>>,
    pub(crate) table: CacheTable,
}

impl CacheNames {
    pub(crate) fn new() -> Self {
        CacheNames {
            recent: Recent::new(),
            by_name: BTreeMap::new(),
            table: CacheTable::default(),
        }
    }

    /// The cache of an allocation. Caches of one name and different sizes are different ones.
    #[inline]
    pub(crate) fn of_alloc(&mut self, name: &[u8], bytes_req: u32, bytes_alloc: u32) -> CacheId {
        if let Some(id) = self.recent.get(name) {
            let cache = &self.table.0[id.0 as usize];
            if cache.bytes_req == bytes_req && cache.bytes_alloc == bytes_alloc {
                return id;
            }
        }
        self.find(name, Some((bytes_req, bytes_alloc)))
    }

    /// The cache of a free: the one of this name that was last allocated from.
    #[inline]
    pub(crate) fn of_free(&mut self, name: &[u8]) -> CacheId {
        match self.recent.get(name) {
            Some(id) => id,
            None => self.find(name, None),
        }
    }

    #[cold]
    fn find(&mut self, name: &[u8], sizes: Option<(u32, u32)>) -> CacheId {
        let caches = &mut self.table.0;
        let ids = self.by_name.entry(name.into()).or_default();
        let known = ids.iter().copied().rev().find(|id| {
            let cache = &mut caches[id.0 as usize];
            let Some((bytes_req, bytes_alloc)) = sizes else {
                return true;
            };
            if (cache.bytes_req, cache.bytes_alloc) == (0, 0) {
                (cache.bytes_req, cache.bytes_alloc) = (bytes_req, bytes_alloc);
            }
            (cache.bytes_req, cache.bytes_alloc) == (bytes_req, bytes_alloc)
        });
        let id = known.unwrap_or_else(|| {
            let (bytes_req, bytes_alloc) = sizes.unwrap_or((0, 0));
            let name = String::from_utf8_lossy(name).into_owned();
            caches.push(Cache {
                name,
                bytes_req,
                bytes_alloc,
            });
            CacheId(caches.len() as u32 - 1)
        });
        // The newest one last: frees go by name alone.
        ids.retain(|&other| other != id);
        ids.push(id);
        self.recent.put(name, id);
        id
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use memdesc::gfp::{__GFP_ZERO, GFP_KERNEL};

    #[test]
    fn gfp_strings() {
        let mut names = GfpNames::new();
        let known = |flags| {
            Some(Gfp {
                flags,
                unknown_name: false,
            })
        };
        for _ in 0..2 {
            assert_eq!(
                names.read(b"GFP_KERNEL|__GFP_ZERO"),
                known(GFP_KERNEL | __GFP_ZERO)
            );
            assert_eq!(names.read(b"none"), known(Flags::EMPTY));
            assert_eq!(
                names.read(b"GFP_KERNEL|0x80000000"),
                known(GFP_KERNEL | Flags::from_bits(1 << 31))
            );
            assert_eq!(names.read(b"0xcc0"), known(GFP_KERNEL));
            assert_eq!(
                names.read(b"GFP_KERNEL|__GFP_COLD"),
                Some(Gfp {
                    flags: GFP_KERNEL,
                    unknown_name: true
                })
            );
            assert_eq!(names.read(b"GFP_KERNEL|"), None);
            assert_eq!(names.read(b"gfp"), None);
            assert_eq!(names.read(b""), None);
            assert_eq!(names.read(b"0x1ffffffff"), None);
        }
    }

    #[test]
    fn caches_by_name_and_size() {
        let mut names = CacheNames::new();
        let freed = names.of_free(b"filp");
        assert_eq!(
            names.of_alloc(b"filp", 184, 192),
            freed,
            "the first allocation tells the size"
        );
        let other = names.of_alloc(b"filp", 232, 256);
        assert_ne!(other, freed);
        assert_eq!(
            names.of_free(b"filp"),
            other,
            "a free is of the cache used last"
        );
        assert_eq!(names.of_alloc(b"filp", 184, 192), freed);
        assert_eq!(names.of_free(b"filp"), freed);
        assert_eq!(names.table.len(), 2);
        assert_eq!(names.table.get(freed).unwrap().bytes_alloc, 192);
    }
}
