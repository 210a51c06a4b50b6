//! Debug caches: red zones, poison, and who did it.
//!
//! ```text
//! slot: | left red zone | object (rounded up to 8) | right red zone, 8 | allocated by | freed by |
//! ```
//!
//! Patterns are Linux's (`include/linux/poison.h`): red zones 0xbb while free and 0xcc while handed out, a free object
//! 0x6b with 0xa5 as its last byte, a fresh one 0x5a. The right red zone starts at the byte after what was asked for.
//! A debug cache has no sheaves: every operation goes to the slab, under its lock, and is checked.
//!
//! This is the only room that reads and writes objects that it does not own as a user would; each function says
//! why it may.

use core::panic::Location;
use core::ptr::NonNull;

use super::cache::{CacheCore, CacheFlags};
use super::object::Caller;
use crate::address::Pfn;
use crate::mm::Mm;
use crate::platform::Platform;
use crate::report::{Corruption, StackId, Track};

const RED_INACTIVE: u8 = 0xbb;
const RED_ACTIVE: u8 = 0xcc;
const POISON_FREE: u8 = 0x6b;
const POISON_END: u8 = 0xa5;
const POISON_INUSE: u8 = 0x5a;

/// A bad byte: its offset from the object's start, what was found, what was expected.
type Byte = (isize, u8, u8);

/// Bytes of right red zone behind the rounded object.
const RED_TAIL: usize = 8;
/// Bytes of one track.
const TRACK: usize = size_of::<RawTrack>();

/// Who did something, as it lies behind an object. Users' overruns can reach it, hence the check word.
#[derive(Clone, Copy)]
#[repr(C)]
struct RawTrack {
    location: Option<&'static Location<'static>>,
    when: u64,
    cpu: u32,
    /// What was asked for, in bytes.
    asked: u32,
    stack: StackId,
    check: u64,
}

impl RawTrack {
    fn seal(location: usize, when: u64, cpu: u32, asked: u32, stack: StackId) -> u64 {
        let stack = u64::from(stack.bits()).rotate_left(48);
        (location as u64 ^ when.rotate_left(17) ^ u64::from(cpu) << 32 ^ u64::from(asked) ^ stack)
            .wrapping_mul(0x9e37_79b9_7f4a_7c15)
            ^ 0x6d65_6d64_6573_6321
    }
}

/// Bytes before and after an object in its slot.
pub(crate) const fn slot_extra(
    _object_size: usize,
    align: usize,
    flags: CacheFlags,
) -> (usize, usize) {
    let red = flags.contains(CacheFlags::RED_ZONE);
    let user = flags.contains(CacheFlags::STORE_USER);
    let lead = if red { align } else { 0 };
    let tail = if red { RED_TAIL } else { 0 } + if user { 2 * TRACK } else { 0 };
    (lead, tail)
}

fn rounded(core: &CacheCore) -> usize {
    (core.geometry.object_size as usize).next_multiple_of(8)
}

/// Where the track is: 0 allocated, 1 freed.
fn track_ptr(core: &CacheCore, object: NonNull<u8>, which: usize) -> *mut RawTrack {
    let red = if core.flags.contains(CacheFlags::RED_ZONE) {
        RED_TAIL
    } else {
        0
    };
    object
        .as_ptr()
        .wrapping_add(rounded(core) + red + which * TRACK)
        .cast()
}

/// A slot's bytes around and in the object.
///
/// # Safety
///
/// The caller is alone with the slot: it is in a new slab, or just taken from or about to go back to one.
unsafe fn fill(object: NonNull<u8>, from: isize, len: usize, pattern: u8) {
    // SAFETY: `from..from + len` lies in the object's slot, which the caller has to himself.
    unsafe { object.as_ptr().offset(from).write_bytes(pattern, len) };
}

/// The first byte of a stretch of the slot that is not the pattern.
fn first_bad(object: NonNull<u8>, from: isize, len: usize, pattern: u8) -> Option<Byte> {
    (from..from + len as isize).find_map(|offset| {
        // SAFETY: callers pass stretches of the object's slot, which is initialised from slab creation on; a read
        // through a volatile pointer, since a faulty user may be writing to it, which is what we are looking for.
        let found = unsafe { object.as_ptr().offset(offset).read_volatile() };
        (found != pattern).then_some((offset, found, pattern))
    })
}

/// Writes what a free object looks like: red zones inactive, and poison where the cache poisons.
///
/// # Safety
///
/// As [`fill`]'s.
unsafe fn fill_free(core: &CacheCore, object: NonNull<u8>) {
    let size = core.geometry.object_size as usize;
    // SAFETY: all stretches are within the slot, which the caller has to himself.
    unsafe {
        if core.flags.contains(CacheFlags::RED_ZONE) {
            let lead = core.geometry.lead as usize;
            fill(object, -(lead as isize), lead, RED_INACTIVE);
            let tail = rounded(core) + RED_TAIL - size;
            fill(object, size as isize, tail, RED_INACTIVE);
        }
        if poisons(core) {
            fill(object, 0, size - 1, POISON_FREE);
            fill(object, size as isize - 1, 1, POISON_END);
        }
    }
}

/// A new slab's object.
pub(crate) fn on_new(core: &CacheCore, object: NonNull<u8>) {
    // SAFETY: the slab is not listed yet, nobody else knows the slot; all stretches are within it.
    unsafe {
        fill_free(core, object);
        if !poisons(core) {
            fill(object, 0, core.geometry.object_size as usize, POISON_INUSE);
        }
        if core.flags.contains(CacheFlags::STORE_USER) {
            track_ptr(core, object, 0)
                .cast::<u8>()
                .write_bytes(0, 2 * TRACK);
        }
    }
}

/// A constructor's state must survive in free objects, so they are not poisoned.
fn poisons(core: &CacheCore) -> bool {
    // What a constructor made must stay, and what a reader of a type-stable cache may still look at.
    core.flags.contains(CacheFlags::POISON)
        && core.ctor.is_none()
        && !core.flags.contains(CacheFlags::TYPESAFE_BY_RCU)
}

/// An object is about to be handed out, for `asked` bytes.
pub(crate) fn on_alloc<P: Platform>(
    mm: &Mm<P>,
    core: &CacheCore,
    object: NonNull<u8>,
    asked: usize,
    caller: Caller,
) {
    let size = core.geometry.object_size as usize;
    if poisons(core) {
        let bad = first_bad(object, 0, size - 1, POISON_FREE)
            .or_else(|| first_bad(object, size as isize - 1, 1, POISON_END));
        if let Some(byte) = bad {
            report(mm, core, object, Corruption::Poison, byte, caller);
        }
        // SAFETY: the object has just been taken from its slab and is ours alone.
        unsafe { fill(object, 0, size, POISON_INUSE) };
    }
    if core.flags.contains(CacheFlags::RED_ZONE) {
        let lead = core.geometry.lead as usize;
        let bad = first_bad(object, -(lead as isize), lead, RED_INACTIVE);
        if let Some(byte) = bad {
            report(mm, core, object, Corruption::RedzoneLeft, byte, caller);
        }
        let bad = first_bad(
            object,
            size as isize,
            rounded(core) + RED_TAIL - size,
            RED_INACTIVE,
        );
        if let Some(byte) = bad {
            report(mm, core, object, Corruption::RedzoneRight, byte, caller);
        }
        // SAFETY: as above. The red zone starts where the request ends.
        unsafe {
            fill(object, -(lead as isize), lead, RED_ACTIVE);
            fill(
                object,
                asked as isize,
                rounded(core) + RED_TAIL - asked,
                RED_ACTIVE,
            );
        }
    }
    write_track(mm, core, object, 0, asked, caller);
}

/// An object is about to go back to its slab. `false`: it is not fit to, leave it.
pub(crate) fn on_free<P: Platform>(
    mm: &Mm<P>,
    core: &CacheCore,
    object: NonNull<u8>,
    caller: Caller,
) -> bool {
    let wrong = match mm.locate(core, object.as_ptr()) {
        Err(what) => Some(what),
        Ok((slab, index)) => {
            let _lists = mm.lists(core);
            slab.is_free(&mm.pages.map, index)
                .then_some(Corruption::DoubleFree)
        }
    };
    if let Some(what) = wrong {
        mm.report_object(what, Some(core), object.as_ptr(), caller);
        return false;
    }
    let size = core.geometry.object_size as usize;
    let mut fit = true;
    if core.flags.contains(CacheFlags::RED_ZONE) {
        let lead = core.geometry.lead as usize;
        let asked = asked(core, object).unwrap_or(size).min(size);
        if let Some(byte) = first_bad(object, -(lead as isize), lead, RED_ACTIVE) {
            report(mm, core, object, Corruption::RedzoneLeft, byte, caller);
            fit = false;
        }
        let bad = first_bad(
            object,
            asked as isize,
            rounded(core) + RED_TAIL - asked,
            RED_ACTIVE,
        );
        if let Some(byte) = bad {
            report(mm, core, object, Corruption::RedzoneRight, byte, caller);
            fit = false;
        }
    }
    // SAFETY: the object's owner has given it up, and its bit still says handed out, so it is ours alone.
    unsafe { fill_free(core, object) };
    write_track(mm, core, object, 1, size, caller);
    fit
}

/// What is wrong with an object in its slab: free or in use.
pub(crate) fn check(
    core: &CacheCore,
    object: NonNull<u8>,
    free: bool,
) -> [Option<(Corruption, Byte)>; 3] {
    let size = core.geometry.object_size as usize;
    let poison = (free && poisons(core))
        .then(|| {
            first_bad(object, 0, size - 1, POISON_FREE)
                .or_else(|| first_bad(object, size as isize - 1, 1, POISON_END))
        })
        .flatten();
    let (mut left, mut right) = (None, None);
    if core.flags.contains(CacheFlags::RED_ZONE) {
        let (pattern, asked) = if free {
            (RED_INACTIVE, size)
        } else {
            (RED_ACTIVE, asked(core, object).unwrap_or(size).min(size))
        };
        let lead = core.geometry.lead as usize;
        left = first_bad(object, -(lead as isize), lead, pattern);
        right = first_bad(
            object,
            asked as isize,
            rounded(core) + RED_TAIL - asked,
            pattern,
        );
    }
    // Found bad when it was freed, reported, and left alone: in use by the bitmap, and all of it as free objects are.
    if !free && (left.is_some() || right.is_some()) && check(core, object, true) == [None; 3] {
        return [None; 3];
    }
    [
        poison.map(|byte| (Corruption::Poison, byte)),
        left.map(|byte| (Corruption::RedzoneLeft, byte)),
        right.map(|byte| (Corruption::RedzoneRight, byte)),
    ]
}

/// The size of the object changed in place (`krealloc`): the red zone moves.
pub(crate) fn on_resize(core: &CacheCore, object: NonNull<u8>, asked: usize) {
    if core.flags.contains(CacheFlags::RED_ZONE) {
        // SAFETY: the caller owns the object and gives up what lies behind `asked`.
        unsafe {
            fill(
                object,
                asked as isize,
                rounded(core) + RED_TAIL - asked,
                RED_ACTIVE,
            )
        };
    }
    if core.flags.contains(CacheFlags::STORE_USER) {
        let track = track_ptr(core, object, 0);
        // SAFETY: the track is within the slot, aligned to 8 like it, and the caller owns the object.
        unsafe {
            let mut raw = track.read();
            raw.asked = asked as u32;
            let at = raw.location.map_or(0, |l| (&raw const *l).addr());
            raw.check = RawTrack::seal(at, raw.when, raw.cpu, raw.asked, raw.stack);
            track.write(raw);
        }
    }
}

fn write_track<P: Platform>(
    mm: &Mm<P>,
    core: &CacheCore,
    object: NonNull<u8>,
    which: usize,
    asked: usize,
    caller: Caller,
) {
    if !core.flags.contains(CacheFlags::STORE_USER) {
        return;
    }
    let (when, cpu) = (mm.pages.platform.now(), mm.pages.pin().cpu() as u32);
    let stack = mm.pages.save_stack(caller);
    let check = RawTrack::seal((&raw const *caller).addr(), when, cpu, asked as u32, stack);
    let raw = RawTrack {
        location: Some(caller),
        when,
        cpu,
        asked: asked as u32,
        stack,
        check,
    };
    // SAFETY: within the slot and aligned to 8 like it; the object is ours alone.
    unsafe { track_ptr(core, object, which).write(raw) };
}

fn read_track(core: &CacheCore, object: NonNull<u8>, which: usize) -> Option<RawTrack> {
    if !core.flags.contains(CacheFlags::STORE_USER) {
        return None;
    }
    let track = track_ptr(core, object, which);
    // SAFETY: within the slot and aligned. Plain integers are read and the seal is checked before the reference is: bytes
    // that a faulty user wrote do not carry it, but by a chance of one in 2^64.
    unsafe {
        let location = (&raw const (*track).location).cast::<usize>().read();
        let (when, cpu) = ((*track).when, (*track).cpu);
        let (asked, stack, check) = ((*track).asked, (*track).stack, (*track).check);
        let sealed = location != 0 && check == RawTrack::seal(location, when, cpu, asked, stack);
        sealed.then(|| track.read())
    }
}

/// How many of its bytes the object's owner asked for, if that is recorded.
pub(crate) fn asked(core: &CacheCore, object: NonNull<u8>) -> Option<usize> {
    read_track(core, object, 0).map(|t| t.asked as usize)
}

/// Who allocated and who freed, as far as it is recorded and legible.
pub(crate) fn tracks(core: &CacheCore, object: NonNull<u8>) -> (Option<Track>, Option<Track>) {
    let track = |which| {
        let raw = read_track(core, object, which)?;
        Some(Track {
            location: raw.location?,
            cpu: raw.cpu,
            when: raw.when,
            stack: raw.stack,
        })
    };
    (track(0), track(1))
}

#[cold]
fn report<P: Platform>(
    mm: &Mm<P>,
    core: &CacheCore,
    object: NonNull<u8>,
    what: Corruption,
    byte: (isize, u8, u8),
    caller: Caller,
) {
    let pfn = Pfn::containing(mm.pages.phys(object.as_ptr()));
    let mut report = mm.report_at(what, pfn, object.addr().get(), caller);
    report.byte = Some(byte);
    let report = mm.report_with(report, core, object);
    mm.pages.platform.corruption(&report);
}
