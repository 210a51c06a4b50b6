//! Splitting a large folio into smaller ones: the same pages, more descriptors.
//!
//! All descriptors are had before anything changes, so a split either happens or leaves everything as it was. While it happens
//! the folio is *frozen*: its counts are zero, so nobody can get hold of it, and whoever looks up one of its pages finds the old
//! head or a new one, and fails to guess on either.
//!
//! Source: `__split_unmapped_folio`, `folio_split` of Linux.

use core::panic::Location;

use crate::address::Pfn;
use crate::desc::{DescList, FolioFlags, Held, Place};
use crate::error::AllocError;
use crate::gfp;
use crate::memmap::{DescClass, PageType, Word};
use crate::mm::{BuiltIn, Mm};
use crate::platform::{FaultPoint, Platform};

const LISTED: FolioFlags = FolioFlags::LRU.with(FolioFlags::ISOLATED);

impl<P: Platform> Mm<P> {
    /// Descriptors for what a split makes, or none at all.
    pub(crate) fn split_descriptors(
        &self,
        kind: PageType,
        parts: usize,
    ) -> Result<DescList, AllocError> {
        if self.pages.platform.should_fail(FaultPoint::Owner) {
            return Err(AllocError::NoDescriptor);
        }
        let cache = self.built_in(if kind == PageType::File {
            BuiltIn::File
        } else {
            BuiltIn::Anon
        });
        let mut list = DescList::new();
        for _ in 0..parts {
            let flags = gfp::GFP_NOWAIT | gfp::__GFP_MEMALLOC;
            match self.cache_alloc(cache, flags, Location::caller()) {
                Ok(desc) => list.push(&self.pages.map, self.pages.phys(desc.as_ptr())),
                Err(_) => {
                    use crate::page_alloc::alloc::Descriptors;
                    self.put(list);
                    return Err(AllocError::NoDescriptor);
                }
            }
        }
        Ok(list)
    }

    /// Splits a frozen folio that nobody maps, and that is in no LRU list: its pages are under folios of `to` from now on, all frozen,
    /// with the flags and the place in the mapping that it had. Takes its descriptors out of `spare`.
    pub(crate) fn split_frozen(&self, head: Pfn, to: usize, spare: &mut DescList) {
        let map = &self.pages.map;
        let word = map.word(head).load_owned();
        let (kind, order) = (word.kind(), word.order());
        let folio = self.folio_at(word.desc());
        debug_assert!(folio.held() == Held::default() && !folio.has_flag(FolioFlags::LRU));
        debug_assert!(self.tails_are_unmapped(head, order));
        let class = if kind == PageType::File {
            DescClass::File
        } else {
            DescClass::Anon
        };
        // The old word last: until then every page leads to it or to a part.
        for nth in (1..1u32 << (order - to)).rev() {
            let part = head.add(nth << to);
            let Some(desc) = spare.pop(map) else {
                unreachable!("as many descriptors as parts")
            };
            let new = self.folio_at(desc);
            new.freeze_new();
            new.init_part(folio, u64::from(nth) << to, part);
            // Charged, if the whole is.
            let new = Word::described(kind, to, desc, class).with_number(word.number());
            map.word(part).publish(new);
        }
        let rest = Word::described(kind, to, word.desc(), word.class());
        map.word(head).publish(rest.with_number(word.number()));
    }

    /// Splits a folio that the caller alone has, mapped nowhere and in no mapping, into folios of order `to`, each of them his
    /// (`split_folio` of pages fresh from the allocator).
    ///
    /// # Errors
    ///
    /// [`AllocError::Busy`] if it is no folio, somebody else has it, it is in a list or a mapping, or its order is not larger; [`AllocError::NoDescriptor`]. Nothing has changed then.
    pub fn split_folio_alone(&self, head: Pfn, to: usize) -> Result<(), AllocError> {
        let Some(word) = self.pages.map.region(head).map(|r| r.word(head).load()) else {
            return Err(AllocError::Busy);
        };
        if !word.is_folio() || word.order() <= to {
            return Err(AllocError::Busy);
        }
        let parts = 1usize << (word.order() - to);
        let mut spare = self.split_descriptors(word.kind(), parts - 1)?;
        // Frozen in the read section that the word was seen in, and the page's own still: the caller may be mistaken about whose it is.
        let read = self.rcu_read_lock();
        let folio = self.folio_at(word.desc());
        let same = || self.pages.map.word(head).load() == word;
        let mut alone = same() && folio.counts().freeze(Held::REF);
        if alone && !(same() && matches!(folio.place(), Place::Head(_)) && !folio.has_flag(LISTED))
        {
            folio.counts().unfreeze(Held::REF);
            alone = false;
        }
        drop(read);
        if !alone {
            use crate::page_alloc::alloc::Descriptors;
            self.put(spare);
            return Err(AllocError::Busy);
        }
        self.split_frozen(head, to, &mut spare);
        for part in self.parts(head, parts, to) {
            self.folio_of(part).counts().unfreeze(Held::REF);
        }
        Ok(())
    }

    /// The heads of what a folio was split into.
    pub(crate) fn parts(&self, head: Pfn, parts: usize, to: usize) -> impl Iterator<Item = Pfn> {
        (0..parts as u32).map(move |nth| head.add(nth << to))
    }

    /// The folio that this page heads, which the caller has.
    pub(crate) fn folio_of(&self, head: Pfn) -> &crate::desc::Folio {
        self.folio_at(self.pages.map.word(head).load_owned().desc())
    }
}
