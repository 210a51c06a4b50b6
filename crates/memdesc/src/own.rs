//! Types of the kernel's own: pages under a descriptor that it defines, in a few lines.
//!
//! A kernel says what it wants to know of such pages ([`OwnType`]), registers the type ([`Mm::register_type`]), and gets pages of which each leads to
//! that. In memory a descriptor is a head of the memory manager's and the kernel's value behind it: 8 bytes of head (the links of the free block, once
//! the pages are free), or 32, a folio's, where users may map the pages, which then are counted as folios are: the last to have them frees them.
//!
//! Source: the `yours` of the memory types; seed 000's `alloc_pages_desc`; seed 003: "arbitrary".

use core::fmt;
use core::marker::PhantomData;
use core::ops::Deref;
use core::ptr::NonNull;

use crate::address::{Pfn, PhysAddr};
use crate::desc::Folio;
use crate::error::AllocError;
use crate::folio::FolioRef;
use crate::gfp::{self, Flags};
use crate::memmap::{COUNTED, DescClass, PageType, Word};
use crate::mm::Mm;
use crate::owner::Memory;
use crate::platform::Platform;
use crate::slab::{Cache, CacheFlags};
use crate::sync::atomic::{AtomicPtr, Ordering};

/// At most so many types of the kernel's own.
pub const MAX_OWN_TYPES: usize = COUNTED as usize - 1;

/// What a kernel wants to know of pages of its own.
///
/// # Examples
///
/// ```
/// use memdesc::{*, gfp::*};
/// use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
///
/// /// The pages of a ring that a device and a user share.
/// struct Ring {
///     packets: AtomicU32,
/// }
///
/// impl OwnType for Ring {
///     const NUMBER: u8 = 0;
///     const NAME: &'static str = "ring";
///     const MAPPABLE: bool = true;
/// }
///
/// # let (host, ram) = memdesc_host::Host::small(16384)?;
/// # let mm = Mm::new(host, &Config::default(), &ram)?;
/// let rings = mm.register_type::<Ring>()?;
/// let ring = rings.alloc(GFP_KERNEL, 2, Ring { packets: AtomicU32::new(3) }).map_err(|(why, _)| why)?;
///
/// // Any page of it leads there.
/// let found = rings.get(ring.add(3)).expect("ours");
/// assert_eq!(found.packets.load(Relaxed), 3);
/// assert_eq!((found.head(), mm.type_name(ring)), (ring, "ring"));
/// drop(found);
/// // SAFETY: ours, and nobody uses it any more.
/// unsafe { mm.free_pages(ring) };
/// assert!(rings.get(ring).is_none());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
/// A value may borrow nothing: it stays as long as its pages, and whoever lets them go last may come late.
///
/// ```compile_fail,E0478
/// struct Borrows<'a>(&'a u32);
/// impl<'a> memdesc::OwnType for Borrows<'a> {
///     const NUMBER: u8 = 1;
///     const NAME: &'static str = "borrows";
/// }
/// ```
pub trait OwnType: Sync + Sized + 'static {
    /// Which of the kernel's own types this is: below [`MAX_OWN_TYPES`], and no other's.
    const NUMBER: u8;
    /// Its name, in reports.
    const NAME: &'static str;
    /// May users map it ([`insert_page`](crate::mmap::MmStruct::insert_page))? Its pages are counted then.
    const MAPPABLE: bool = false;

    /// Nobody has the pages any more; they are about to go back. The value is not dropped.
    ///
    /// # Context
    ///
    /// Whichever the last of them was let go in. Allocates nothing.
    fn freed(&self) {}
}

/// A registered type, as the memory manager knows it.
#[derive(Debug)]
pub(crate) struct OwnInfo {
    name: &'static str,
    mappable: bool,
    freed: unsafe fn(*mut u8),
}

struct Info<T>(PhantomData<T>);

impl<T: OwnType> Info<T> {
    const INFO: &'static OwnInfo = &OwnInfo {
        name: T::NAME,
        mappable: T::MAPPABLE,
        freed: freed::<T>,
    };
    /// Where the value is in a descriptor.
    const OFFSET: usize = if T::MAPPABLE { size_of::<Folio>() } else { 8 };
    /// The number in words: one more than the type's, since 0 is that of pages under a descriptor that the kernel brought itself
    /// ([`Mm::alloc_pages_desc`]), of which nothing is known.
    const NUMBER: u8 = if T::MAPPABLE {
        (T::NUMBER + 1) | COUNTED
    } else {
        T::NUMBER + 1
    };
    const CHECK: () = {
        assert!(
            (T::NUMBER as usize) < MAX_OWN_TYPES,
            "the number of the type is too large"
        );
        assert!(align_of::<T>() <= 8, "descriptors are 8-byte aligned");
        assert!(
            !core::mem::needs_drop::<T>(),
            "the value is not dropped: see `OwnType::freed`"
        );
    };
}

/// # Safety
///
/// `desc` is a descriptor of the type, whose value is set.
unsafe fn freed<T: OwnType>(desc: *mut u8) {
    // SAFETY: the caller's promise; the value is shared at most.
    let value = unsafe { &*desc.wrapping_add(Info::<T>::OFFSET).cast::<T>() };
    value.freed();
}

/// The types that are registered, by number.
#[derive(Debug)]
pub(crate) struct OwnTypes([AtomicPtr<OwnInfo>; MAX_OWN_TYPES]);

impl OwnTypes {
    pub(crate) fn new() -> OwnTypes {
        OwnTypes([const { AtomicPtr::new(core::ptr::null_mut()) }; MAX_OWN_TYPES])
    }

    /// `None` for a type that is not registered, and for pages of none.
    fn of(&self, word: Word) -> Option<&'static OwnInfo> {
        let number = usize::from(word.number() & !COUNTED).checked_sub(1)?;
        let slot = &self.0[number];
        // SAFETY: null, or a constant.
        unsafe { slot.load(Ordering::Acquire).as_ref() }
    }
}

/// A type of the kernel's own, registered: where its pages come from. Dropped, it leaves the type registered for good, since pages may be out: see
/// [`unregister`](OwnPages::unregister).
///
/// # Invariants
///
/// Words of this number lead to descriptors of `T`, since nobody else can register the number.
pub struct OwnPages<'m, P: Platform, T: OwnType> {
    mm: &'m Mm<P>,
    cache: Option<Cache<'m>>,
    _type: PhantomData<fn(T) -> T>,
}

impl<P: Platform, T: OwnType> fmt::Debug for OwnPages<'_, P, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("OwnPages").field(&T::NAME).finish()
    }
}

/// A reference to counted pages of the kernel's own.
#[derive(Debug)]
pub struct OwnRef<'m, P: Platform, T> {
    folio: FolioRef<'m, P>,
    value: NonNull<T>,
}

// SAFETY: a counted reference to a value that is shared between CPUs.
unsafe impl<P: Platform, T: Sync> Send for OwnRef<'_, P, T> {}
// SAFETY: the same.
unsafe impl<P: Platform, T: Sync> Sync for OwnRef<'_, P, T> {}

impl<P: Platform, T> OwnRef<'_, P, T> {
    /// The first page.
    pub fn head(&self) -> Pfn {
        self.folio.head()
    }
}

impl<P: Platform, T> Deref for OwnRef<'_, P, T> {
    type Target = T;
    fn deref(&self) -> &T {
        // SAFETY: the reference keeps the pages, and they their descriptor.
        unsafe { self.value.as_ref() }
    }
}

impl<P: Platform> Mm<P> {
    /// Registers a type of the kernel's own.
    ///
    /// # Context
    ///
    /// May sleep.
    ///
    /// # Errors
    ///
    /// [`AllocError::Busy`] if the number is taken; no memory for the cache of its descriptors.
    pub fn register_type<T: OwnType>(&self) -> Result<OwnPages<'_, P, T>, AllocError> {
        const { Info::<T>::CHECK };
        // Type-stable, as every descriptor (rule 6).
        let cache = self.create_cache(
            T::NAME,
            Info::<T>::OFFSET + size_of::<T>(),
            8,
            CacheFlags::TYPESAFE_BY_RCU,
            None,
        )?;
        let slot = &self.own_types.0[usize::from(T::NUMBER)];
        let info = core::ptr::from_ref(Info::<T>::INFO).cast_mut();
        let taken = slot.compare_exchange(
            core::ptr::null_mut(),
            info,
            Ordering::AcqRel,
            Ordering::Relaxed,
        );
        let mut pages = OwnPages {
            mm: self,
            cache: Some(cache),
            _type: PhantomData,
        };
        if taken.is_err() {
            if let Some(cache) = pages.cache.take() {
                let _nothing_in_it = self.kmem_cache_destroy(cache);
            }
            return Err(AllocError::Busy);
        }
        Ok(pages)
    }

    /// What this page is, by name: of the kernel's own types, theirs; of vmalloc memory, what it is for.
    ///
    /// # Context
    ///
    /// Any.
    pub fn type_name(&self, pfn: Pfn) -> &'static str {
        let _read = self.rcu_read_lock();
        if let Memory::Vmalloc(area) = self.lookup(pfn).2 {
            // SAFETY: type-stable until `_read` goes: an area, though perhaps no longer this page's.
            return unsafe { area.as_ref() }.kind().name();
        }
        match self.pages.map.lookup(pfn) {
            Some(found) if found.word.kind() == PageType::Yours => {
                let info = self.own_types.of(found.word);
                info.map_or(PageType::Yours.name(), |info| info.name)
            }
            _ => self.lookup(pfn).2.name(),
        }
    }

    /// May pages of this word be mapped uncounted ([`insert_pfn`](crate::mmap::MmStruct::insert_pfn))? If the kernel brought their descriptor and
    /// said nothing, or of a type that says so.
    pub(crate) fn own_may_be_mapped(&self, pfn: Pfn) -> bool {
        match self.pages.map.lookup(pfn) {
            Some(found) if found.word.kind() == PageType::Yours => {
                !found.word.is_counted()
                    && self
                        .own_types
                        .of(found.word)
                        .is_none_or(|info| info.mappable)
            }
            _ => false,
        }
    }

    /// Nobody has these pages any more.
    pub(crate) fn own_freed(&self, word: Word) {
        // Descriptors that came by `alloc_pages_desc` are of no registered type.
        if let Some(info) = self.own_types.of(word) {
            // SAFETY: words of this number lead to descriptors of the type, whose value was set when they were published.
            unsafe { (info.freed)(self.pages.map.virt(word.desc())) };
        }
    }
}

impl<'m, P: Platform, T: OwnType> OwnPages<'m, P, T> {
    /// Pages under a descriptor with this value; [`free_pages`](Mm::free_pages) frees them, of counted ones the last to have them. Nobody is ever
    /// charged for them.
    ///
    /// # Context
    ///
    /// As [`alloc_pages`](Mm::alloc_pages), but not `__GFP_FAST_TRY`.
    ///
    /// # Errors
    ///
    /// As there; [`AllocError::Forbidden`] with `__GFP_FAST_TRY`; [`AllocError::NoOwners`] with `__GFP_ACCOUNT` if somebody would be charged. The value comes back.
    #[track_caller]
    pub fn alloc(&self, gfp: Flags, order: usize, value: T) -> Result<Pfn, (AllocError, T)> {
        let mm = self.mm;
        let Some(cache) = &self.cache else {
            unreachable!("taken by who destroys it")
        };
        if gfp.contains(gfp::__GFP_FAST_TRY) {
            return Err((AllocError::Forbidden, value));
        }
        // The pages are zeroed where that is asked for, the descriptor is not: stale readers look at its counts, which are zero while it is free.
        let desc = match mm.kmem_cache_alloc(cache, gfp & !gfp::__GFP_ZERO) {
            Ok(desc) => desc,
            Err(why) => return Err((why, value)),
        };
        let block = match mm.pages.alloc_block(PageType::Yours, gfp, order, None, mm) {
            Ok(block) => block,
            Err(why) => {
                // SAFETY: ours, and nothing leads to it.
                unsafe { mm.kmem_cache_free(cache, desc) };
                return Err((why, value));
            }
        };
        mm.put_desc(block.word.desc());
        // SAFETY: an object of that size, ours; a stale reader looks at the folio's counts only, which are not written here.
        unsafe {
            desc.as_ptr()
                .wrapping_add(Info::<T>::OFFSET)
                .cast::<T>()
                .write(value)
        };
        let at = mm.pages.phys(desc.as_ptr());
        let word = Word::described(PageType::Yours, order, at, DescClass::Yours)
            .with_number(Info::<T>::NUMBER);
        if T::MAPPABLE {
            mm.folio_at(at).init(block.pfn);
            // Only the head's: those of the tails count how often each is mapped.
            mm.pages.map.word(block.pfn).publish(word);
        } else {
            mm.pages.map.publish_block(block.pfn, word);
        }
        Ok(block.pfn)
    }

    /// A reference to the counted pages that this page is part of, from any context; `None` if it is of another type, or uncounted.
    pub fn get(&self, pfn: Pfn) -> Option<OwnRef<'m, P, T>> {
        let folio = self.mm.folio_get(pfn)?;
        let value = self.value(self.mm.pages.map.word(folio.head()).load())?;
        Some(OwnRef { folio, value })
    }

    /// What the kernel knows of the pages that this page is part of; `None` if it is of another type.
    ///
    /// # Safety
    ///
    /// The caller has the pages as long as the reference lives.
    pub unsafe fn of(&self, pfn: Pfn) -> Option<&T> {
        let value = self.value(self.mm.pages.map.lookup(pfn)?.word)?;
        // SAFETY: a descriptor of this type, by the invariant; the caller keeps it.
        Some(unsafe { value.as_ref() })
    }

    fn value(&self, word: Word) -> Option<NonNull<T>> {
        let ours = word.kind() == PageType::Yours && word.number() == Info::<T>::NUMBER;
        let at = PhysAddr(word.desc().0 + Info::<T>::OFFSET as u64);
        ours.then(|| NonNull::new(self.mm.pages.map.virt(at).cast()))?
    }

    /// Takes the type away.
    ///
    /// # Context
    ///
    /// May sleep.
    ///
    /// # Errors
    ///
    /// How many descriptors are still in use, by pages or by free blocks for which there was no other descriptor; the type stays registered.
    pub fn unregister(mut self) -> Result<(), (Self, u64)> {
        let mm = self.mm;
        // Free blocks may lie on descriptors of this type.
        mm.shrink();
        let Some(cache) = self.cache.take() else {
            return Ok(());
        };
        if let Err(e) = mm.kmem_cache_destroy(cache) {
            self.cache = Some(e.cache);
            return Err((self, e.live));
        }
        mm.own_types.0[usize::from(T::NUMBER)].store(core::ptr::null_mut(), Ordering::Release);
        Ok(())
    }
}
