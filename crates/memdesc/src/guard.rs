//! Guard pages: memory that nobody may touch, in the place of memory that somebody could.
//!
//! A guard is a block whose word says so. Whoever frees it, maps it or takes it for something else is told by its name, and
//! where the platform can, a stray access faults ([`Platform::kernel_map_pages`]). Its `struct buddy` stays with it, in the word, so going back needs no
//! memory and cannot fail.
//!
//! Source: `set_page_guard`, `clear_page_guard`, `debug_guardpage_minorder` of Linux, where a guard is what is left over of a split.

use crate::address::Pfn;
use crate::error::AllocError;
use crate::gfp::{self, Flags};
use crate::inline::{Facts, Poisoned};
use crate::memmap::{DescClass, PageType, Word};
use crate::mm::Mm;
use crate::page_alloc::alloc::Descriptors;
use crate::platform::Platform;

impl<P: Platform> Mm<P> {
    /// A guard of 2^order pages (`set_page_guard` of pages fresh from the allocator). [`unguard_pages`](Self::unguard_pages) makes bare pages of it.
    ///
    /// # Context
    ///
    /// As [`alloc_pages`](Self::alloc_pages), but from no interrupt.
    ///
    /// # Errors
    ///
    /// As [`alloc_pages`](Self::alloc_pages).
    ///
    /// # Examples
    ///
    /// ```
    /// use memdesc::{CensusKind, Config, Memory, Mm, gfp::*};
    /// use memdesc_host::Host;
    ///
    /// let (host, ram) = Host::small(16384)?;
    /// let mm = Mm::new(host, &Config::default(), &ram)?;
    /// let guard = mm.alloc_guard(GFP_KERNEL, 2)?;
    /// assert!(matches!(mm.lookup(guard.add(3)), (head, 2, Memory::Guard) if head == guard));
    /// assert_eq!(mm.census().of(CensusKind::Guard).pages, 4);
    /// // SAFETY: ours, bare pages from here on.
    /// unsafe {
    ///     mm.unguard_pages(guard);
    ///     mm.free_pages(guard);
    /// }
    /// assert!(mm.ledger().balanced);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn alloc_guard(&self, gfp: Flags, order: usize) -> Result<Pfn, AllocError> {
        let pfn = self.alloc_pages(gfp | gfp::__GFP_NOMEMALLOC, order)?;
        // SAFETY: bare pages that we took just now.
        let guarded = unsafe { self.guard_pages(pfn) };
        if let Err(why) = guarded {
            // SAFETY: bare still, and ours.
            unsafe { self.free_pages(pfn) };
            return Err(why);
        }
        Ok(pfn)
    }

    /// Makes a guard of this block, which is free.
    ///
    /// # Context
    ///
    /// Any that may pin a CPU, but no interrupt.
    ///
    /// # Errors
    ///
    /// As [`alloc_pages_at`](Self::alloc_pages_at). It is free as before then.
    pub fn guard_free_pages(&self, pfn: Pfn, order: usize) -> Result<(), AllocError> {
        self.alloc_pages_at(pfn, order)?;
        // SAFETY: bare pages that we took just now.
        let guarded = unsafe { self.guard_pages(pfn) };
        if guarded.is_err() {
            // SAFETY: bare still, and ours.
            unsafe { self.free_pages(pfn) };
        }
        guarded
    }

    /// Makes a guard of bare pages: from now on nobody touches them.
    ///
    /// # Safety
    ///
    /// `pfn` is the head of bare pages that the caller owns, and nobody uses what they hold any more.
    ///
    /// # Context
    ///
    /// Any that may pin a CPU, but no interrupt.
    ///
    /// # Errors
    ///
    /// [`AllocError::Busy`] if they are not bare, or from a reserve; [`AllocError::NoDescriptor`] if what describes them is of another owner's kind, and there was no `struct
    /// buddy` to be had. They are as they were then.
    pub unsafe fn guard_pages(&self, pfn: Pfn) -> Result<(), AllocError> {
        let Some(region) = self.pages.map.region(pfn) else {
            return Err(AllocError::Busy);
        };
        let word = region.word(pfn).load_owned();
        let order = word.order();
        if word.kind() != PageType::Bare || word.is_reserve() || !pfn.is_aligned(order) {
            return Err(AllocError::Busy);
        }
        // The word has no room for where a descriptor came from: it is a `struct buddy`, or becomes one.
        let mut kept = word.desc();
        if word.class() != DescClass::Buddy {
            let mut new = self.get(1)?;
            let Some(buddy) = new.pop(&self.pages.map) else {
                return Err(AllocError::NoDescriptor);
            };
            self.put(new);
            kept = buddy;
        }
        // From here on it cannot fail. Whom they are charged to stands in what described them.
        let _ = self.pages.uncharge_block(pfn, word);
        self.count_retyped(PageType::Bare, PageType::Poisoned, order);
        self.pages.map.publish_block(pfn, Word::guard(order, kept));
        if kept != word.desc() {
            self.put_desc(word.desc());
        }
        self.pages.platform.kernel_map_pages(pfn, order, false);
        Ok(())
    }

    /// Makes bare pages of a guard again. They hold anything. Does nothing to what is no guard.
    ///
    /// # Safety
    ///
    /// `pfn` is the head of a guard that the caller made; the pages are his.
    ///
    /// # Context
    ///
    /// Any that may pin a CPU. Allocates nothing, cannot fail.
    pub unsafe fn unguard_pages(&self, pfn: Pfn) {
        let word = self.pages.map.word(pfn).load_owned();
        if word.inline_facts() == Some(Facts::Poisoned(Poisoned::Guard)) {
            self.pages
                .platform
                .kernel_map_pages(pfn, word.order(), true);
            self.inline_to_bare(pfn, word.guard_buddy());
        }
    }
}
