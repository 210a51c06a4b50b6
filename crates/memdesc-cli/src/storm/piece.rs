//! A piece of memory that somebody has, in one word, so that it can change hands by one atomic exchange.

use std::ptr::NonNull;

use memdesc::{AllocError, Mm, PAGE_SIZE, Pfn};
use memdesc_host::Host;

/// The sizes of objects.
pub(super) const SIZES: [usize; 9] = [8, 24, 64, 96, 200, 600, 2000, 8192, 20_000];
/// Bytes at both ends that are filled and checked.
const CHECKED: usize = 64;

const PAGES: u64 = 1 << 63;

/// `pages 1 | byte 7 | order or class 8 | page frame number or address 48`; 0 for none.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Piece(u64);

impl From<u64> for Piece {
    fn from(bits: u64) -> Piece {
        Piece(bits)
    }
}

impl From<Piece> for u64 {
    fn from(piece: Piece) -> u64 {
        piece.0
    }
}

impl Piece {
    pub(super) const NONE: Piece = Piece(0);

    pub(super) fn is_none(self) -> bool {
        self.0 == 0
    }

    /// Pages, if they were had: filled with the byte.
    pub(super) fn pages(
        mm: &Mm<Host>,
        result: Result<Pfn, AllocError>,
        order: usize,
        byte: u8,
    ) -> Piece {
        let Ok(pfn) = result else { return Piece::NONE };
        let piece = Piece(PAGES | u64::from(byte) << 56 | (order as u64) << 48 | u64::from(pfn.0));
        piece.fill(mm);
        piece
    }

    /// An object, if it was had: filled with the byte.
    pub(super) fn object(result: Result<NonNull<u8>, AllocError>, class: usize, byte: u8) -> Piece {
        let Ok(object) = result else {
            return Piece::NONE;
        };
        let at = object.as_ptr().expose_provenance() as u64;
        let piece = Piece(u64::from(byte) << 56 | (class as u64) << 48 | at);
        piece.ends(object).for_each(|at| {
            // SAFETY: within the object, which is ours.
            unsafe { at.write(byte) }
        });
        piece
    }

    fn class(self) -> usize {
        (self.0 >> 48) as usize & 0xff
    }

    fn byte(self) -> u8 {
        (self.0 >> 56) as u8 & 0x7f
    }

    /// Bytes of it.
    pub(super) fn size(self) -> usize {
        if self.0 & PAGES != 0 {
            PAGE_SIZE << self.class()
        } else {
            SIZES[self.class()]
        }
    }

    pub(super) fn pfn(self) -> Pfn {
        Pfn(self.0 as u32)
    }

    /// The object; none if it is pages.
    pub(super) fn object_ptr(self) -> Option<NonNull<u8>> {
        let address = self.0 as usize & ((1 << 48) - 1);
        (self.0 & PAGES == 0)
            .then(|| NonNull::new(std::ptr::with_exposed_provenance_mut(address)))
            .flatten()
    }

    fn start(self, mm: &Mm<Host>) -> NonNull<u8> {
        self.object_ptr()
            .or_else(|| NonNull::new(mm.page_address(self.pfn())))
            .expect("memory is nowhere at null")
    }

    fn ends(self, start: NonNull<u8>) -> impl Iterator<Item = *mut u8> {
        let size = self.size();
        let offsets = (0..size.min(CHECKED)).chain(size.saturating_sub(CHECKED)..size);
        offsets.map(move |offset| start.as_ptr().wrapping_add(offset))
    }

    fn fill(self, mm: &Mm<Host>) {
        self.ends(self.start(mm)).for_each(|at| {
            // SAFETY: within the piece, which is ours.
            unsafe { at.write(self.byte()) }
        });
    }

    /// Does it hold what was put there?
    pub(super) fn check(self, mm: &Mm<Host>) -> bool {
        // SAFETY: within the piece, which is ours.
        self.ends(self.start(mm))
            .all(|at| unsafe { at.read() } == self.byte())
    }
}
