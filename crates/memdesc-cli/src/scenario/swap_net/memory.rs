//! Where the network stack's memory comes from: one face, an implementation for each way to answer "and if there is none?".
//!
//! The stack knows [`Book`] only. It hands out [`Piece`]s, which give themselves back, and keeps count of who asked for what and was refused.

use std::cell::Cell;
use std::ptr::NonNull;

use memdesc::gfp::{
    __GFP_MEMALLOC, __GFP_NOMEMALLOC, __GFP_NORETRY, __GFP_NOWARN, Flags, GFP_ATOMIC,
};
use memdesc::{AllocError, Cache, CacheFlags, Mm, PAGE_SIZE, Pfn};
use memdesc_host::Host;

/// Bytes of a `struct sk_buff`, as the head of every packet.
pub(super) const HEAD_BYTES: usize = 232;

/// What pages are for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Pages {
    /// A frame that comes is put there before anybody can look at it.
    Receive,
    /// What is sent is copied there where the device cannot reach the page itself.
    Fragment,
}

/// What data is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(usize)]
pub(super) enum Data {
    Packet = 0,
    Ack = 1,
    Request = 2,
    Copy = 3,
}

/// Memory as it was had.
#[derive(Clone, Copy, Debug)]
pub(super) struct Raw<T> {
    pub(super) at: T,
    /// Ordinary memory would not have served this: what is in it must not stay but for swap.
    pub(super) emergency: bool,
}

/// Where the stack's memory comes from.
///
/// # Safety
///
/// What is handed out is the caller's alone until it is freed: [`HEAD_BYTES`], as many bytes as were asked for, a page.
pub(super) unsafe trait Memory {
    fn head(&self) -> Result<Raw<NonNull<u8>>, AllocError>;
    fn data(&self, size: usize, of: Data) -> Result<Raw<NonNull<u8>>, AllocError>;
    fn page(&self, of: Pages) -> Result<Raw<Pfn>, AllocError>;

    /// # Safety
    ///
    /// From [`head`](Self::head), and nobody uses it any more.
    unsafe fn free_head(&self, head: Raw<NonNull<u8>>);

    /// # Safety
    ///
    /// From [`data`](Self::data), and nobody uses it any more.
    unsafe fn free_data(&self, data: Raw<NonNull<u8>>);

    /// # Safety
    ///
    /// From [`page`](Self::page), for the same, and nobody uses it any more.
    unsafe fn free_page(&self, page: Raw<Pfn>, of: Pages);
}

/// Linux's way since 3.6: ordinary memory, and if there is none whatever is left below the marks, without a bound (`kmalloc_reserve`, `__netdev_alloc_skb`).
pub(super) struct Today<'m> {
    mm: &'m Mm<Host>,
    heads: &'m Cache<'m>,
}

/// As one asks where one may not sleep, and is content with an error.
pub(super) const ATOMIC: Flags = Flags::from_bits(GFP_ATOMIC.bits() | __GFP_NOWARN.bits());
/// The first try: nobody's reserves.
const ORDINARY: Flags =
    Flags::from_bits(ATOMIC.bits() | __GFP_NOMEMALLOC.bits() | __GFP_NORETRY.bits());
/// The second: all of memory.
const EMERGENCY: Flags = Flags::from_bits(ATOMIC.bits() | __GFP_MEMALLOC.bits());

/// Ordinary memory, else what is left.
fn twice<T>(get: impl Fn(Flags) -> Result<T, AllocError>) -> Result<Raw<T>, AllocError> {
    if let Ok(at) = get(ORDINARY) {
        return Ok(Raw {
            at,
            emergency: false,
        });
    }
    let at = get(EMERGENCY)?;
    Ok(Raw {
        at,
        emergency: true,
    })
}

impl<'m> Today<'m> {
    pub(super) fn new(mm: &'m Mm<Host>, heads: &'m Cache<'m>) -> Self {
        Today { mm, heads }
    }
}

// SAFETY: what the memory manager hands out, once each.
unsafe impl Memory for Today<'_> {
    fn head(&self) -> Result<Raw<NonNull<u8>>, AllocError> {
        twice(|gfp| self.mm.kmem_cache_alloc(self.heads, gfp))
    }

    fn data(&self, size: usize, _of: Data) -> Result<Raw<NonNull<u8>>, AllocError> {
        twice(|gfp| self.mm.kmalloc(size, gfp))
    }

    fn page(&self, _of: Pages) -> Result<Raw<Pfn>, AllocError> {
        twice(|gfp| self.mm.alloc_pages(gfp, 0))
    }

    unsafe fn free_head(&self, head: Raw<NonNull<u8>>) {
        // SAFETY: the caller's promise.
        unsafe { self.mm.kmem_cache_free(self.heads, head.at) }
    }

    unsafe fn free_data(&self, data: Raw<NonNull<u8>>) {
        // SAFETY: the caller's promise.
        unsafe { self.mm.kfree(data.at) }
    }

    unsafe fn free_page(&self, page: Raw<Pfn>, _of: Pages) {
        // SAFETY: the caller's promise.
        unsafe { self.mm.free_pages(page.at) }
    }
}

/// At which place in the stack memory is asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(usize)]
pub(super) enum Site {
    /// What is known of a page on its way, until the server has answered.
    Request,
    SendHead,
    SendData,
    SendFragment,
    /// The second head of a packet, which the device has (`skb_clone`).
    SendClone,
    AckHead,
    AckData,
    ReceiveHead,
    ReceivePage,
    /// A small frame is copied, so that its page can stay with the device.
    ReceiveCopy,
}

impl Site {
    pub(super) const COUNT: usize = 10;
    pub(super) const ALL: [Site; Site::COUNT] = [
        Site::Request,
        Site::SendHead,
        Site::SendData,
        Site::SendFragment,
        Site::SendClone,
        Site::AckHead,
        Site::AckData,
        Site::ReceiveHead,
        Site::ReceivePage,
        Site::ReceiveCopy,
    ];

    pub(super) fn name(self) -> &'static str {
        match self {
            Site::Request => "request",
            Site::SendHead => "send: head",
            Site::SendData => "send: data",
            Site::SendFragment => "send: fragment",
            Site::SendClone => "send: second head",
            Site::AckHead => "ack: head",
            Site::AckData => "ack: data",
            Site::ReceiveHead => "receive: head",
            Site::ReceivePage => "receive: page",
            Site::ReceiveCopy => "receive: copy",
        }
    }

    fn kind(self) -> Kind {
        match self {
            Site::SendHead | Site::SendClone | Site::AckHead | Site::ReceiveHead => Kind::Head,
            Site::Request => Kind::Data(Data::Request),
            Site::SendData => Kind::Data(Data::Packet),
            Site::AckData => Kind::Data(Data::Ack),
            Site::ReceiveCopy => Kind::Data(Data::Copy),
            Site::SendFragment => Kind::Page(Pages::Fragment),
            Site::ReceivePage => Kind::Page(Pages::Receive),
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Head,
    Data(Data),
    Page(Pages),
}

impl Kind {
    fn nth(self) -> usize {
        match self {
            Kind::Head => 0,
            Kind::Data(_) => 1,
            Kind::Page(Pages::Receive) => 2,
            Kind::Page(Pages::Fragment) => 3,
        }
    }
}

/// What a place asked for.
#[derive(Clone, Copy, Default, Debug)]
pub(super) struct Asked {
    pub(super) times: u64,
    pub(super) refused: u64,
    pub(super) emergency: u64,
}

/// What the stack has of a kind: heads in pieces, data in bytes as asked for, pages.
#[derive(Clone, Copy, Default, Debug)]
pub(super) struct Held {
    pub(super) now: u64,
    pub(super) most: u64,
}

/// Hands out the stack's memory and keeps count.
pub(super) struct Book<'m> {
    mm: &'m Mm<Host>,
    memory: &'m dyn Memory,
    asked: [Cell<Asked>; Site::COUNT],
    held: [Cell<Held>; 4],
}

impl<'m> Book<'m> {
    pub(super) fn new(mm: &'m Mm<Host>, memory: &'m dyn Memory) -> Self {
        Book {
            mm,
            memory,
            asked: Default::default(),
            held: Default::default(),
        }
    }

    /// `size` is asked for where the size is not fixed.
    pub(super) fn get(&self, site: Site, size: usize) -> Result<Piece<'_>, AllocError> {
        let kind = site.kind();
        let got = match kind {
            Kind::Head => self.memory.head().map(|raw| (raw.at, HEAD_BYTES, raw)),
            Kind::Data(of) => self.memory.data(size, of).map(|raw| (raw.at, size, raw)),
            Kind::Page(of) => self.memory.page(of).and_then(|raw| {
                let ptr = self.mm.page_address(raw.at);
                let at = NonNull::new(ptr).ok_or(AllocError::NoBlock)?;
                let emergency = raw.emergency;
                Ok((at, PAGE_SIZE, Raw { at, emergency }))
            }),
        };
        let mut asked = self.asked[site as usize].get();
        asked.times += 1;
        asked.refused += u64::from(got.is_err());
        asked.emergency += u64::from(got.as_ref().is_ok_and(|(_, _, raw)| raw.emergency));
        self.asked[site as usize].set(asked);
        let (at, len, raw) = got?;
        let cell = &self.held[kind.nth()];
        let mut held = cell.get();
        held.now += units(kind, len);
        held.most = held.most.max(held.now);
        cell.set(held);
        Ok(Piece {
            book: self,
            at,
            len,
            kind,
            emergency: raw.emergency,
        })
    }

    pub(super) fn asked(&self, site: Site) -> Asked {
        self.asked[site as usize].get()
    }

    /// Heads, bytes of data, pages to receive into, fragments.
    pub(super) fn held(&self) -> [Held; 4] {
        std::array::from_fn(|nth| self.held[nth].get())
    }
}

fn units(kind: Kind, len: usize) -> u64 {
    match kind {
        Kind::Data(_) => len as u64,
        Kind::Head | Kind::Page(_) => 1,
    }
}

/// A piece of the stack's memory. Goes back when it is dropped.
pub(super) struct Piece<'a> {
    book: &'a Book<'a>,
    at: NonNull<u8>,
    len: usize,
    kind: Kind,
    pub(super) emergency: bool,
}

impl Piece<'_> {
    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn bytes(&self) -> &[u8] {
        // SAFETY: ours, so many bytes; the memory of a hosted machine always holds something.
        unsafe { std::slice::from_raw_parts(self.at.as_ptr(), self.len) }
    }

    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and nobody else has it.
        unsafe { std::slice::from_raw_parts_mut(self.at.as_ptr(), self.len) }
    }
}

impl Drop for Piece<'_> {
    fn drop(&mut self) {
        let book = self.book;
        let (at, emergency) = (self.at, self.emergency);
        // SAFETY: had from there as this kind, and this is the only one who has it.
        unsafe {
            match self.kind {
                Kind::Head => book.memory.free_head(Raw { at, emergency }),
                Kind::Data(_) => book.memory.free_data(Raw { at, emergency }),
                Kind::Page(of) => {
                    let at = book.mm.virt_to_pfn(at.as_ptr());
                    book.memory.free_page(Raw { at, emergency }, of);
                }
            }
        }
        let cell = &book.held[self.kind.nth()];
        let mut held = cell.get();
        held.now -= units(self.kind, self.len);
        cell.set(held);
    }
}

/// The cache of heads.
pub(super) fn heads(mm: &Mm<Host>) -> Result<Cache<'_>, AllocError> {
    mm.kmem_cache_create(
        "skbuff_head_cache",
        HEAD_BYTES,
        0,
        CacheFlags::HWCACHE_ALIGN,
        None,
    )
}
