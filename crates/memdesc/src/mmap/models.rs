//! Model checks of the lockless walker under loom: the real entry, word and counts, two pages with contents that loom watches, one who walks and
//! takes, and one who meanwhile unmaps, moves, splits or forks.
//!
//! A walker that got hold of a page finds there what belongs to the address, and nobody writes to it behind his back. Each look that
//! the walker takes is left out once, and loom finds out what it is for.

use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::thread;

use crate::address::{Pfn, PhysAddr};
use crate::desc::counts::{Held, Put, Taken};
use crate::desc::folio::Folio;
use crate::memmap::heads::{Found, climb};
use crate::memmap::word::{AtomicWord, DescClass, PageType, Word};
use crate::page_alloc::MigrateType;
use crate::pgtable::entry::{AtomicEntry, Entry, Prot};
use crate::sync::atomic::{AtomicU32, Ordering};

/// What the page at the address contains.
const OURS: u32 = 7;
/// The same, after the walker has written to it.
const WRITTEN: u32 = 8;
/// What another owner's page contains.
const THEIRS: u32 = 66;

const REF_AND_MAP: Held = Held::new(1, 1, 0);

/// What the walker does before he is sure. All of it, but for planted bugs.
#[derive(Clone, Copy)]
struct Looks {
    guess: bool,
    entry: bool,
    word: bool,
}

const ALL: Looks = Looks {
    guess: true,
    entry: true,
    word: true,
};

struct World {
    /// The one that maps the address.
    entry: AtomicEntry,
    words: [AtomicWord; 2],
    folios: [Folio; 2],
    contents: [UnsafeCell<u32>; 2],
    frees: [AtomicU32; 2],
}

// SAFETY: who reaches `contents` when is what the models check.
unsafe impl Sync for World {}
// SAFETY: the same.
unsafe impl Send for World {}

const RW: Prot = Prot::WRITE.with(Prot::USER);

fn anon(which: usize, order: usize) -> Word {
    let desc = PhysAddr(64 * (which as u64 + 1));
    Word::described(PageType::Anon, order, desc, DescClass::Anon)
}

fn bare(which: usize) -> Word {
    anon(which, 0).to_owned(PageType::Bare)
}

impl World {
    /// The address leads to page 0, which is folio 0, of which this is held; page 1 is bare.
    fn new(held: Held) -> World {
        let world = World {
            entry: AtomicEntry::new(Entry::leaf(Pfn(0), false, RW)),
            words: [AtomicWord::zero(), AtomicWord::zero()],
            folios: [Folio::free(), Folio::free()],
            contents: [UnsafeCell::new(OURS), UnsafeCell::new(0)],
            frees: [AtomicU32::new(0), AtomicU32::new(0)],
        };
        world.words[0].publish(anon(0, 0));
        world.words[1].publish(bare(1));
        world.folios[0].init(Pfn(0));
        world.folios[0].counts().init(held);
        world
    }

    /// Pages 0 and 1 are folio 0, and the address leads to page 1.
    fn large(held: Held) -> World {
        let world = World::new(held);
        world.words[0].publish(anon(0, 1));
        world.words[1].publish(Word::ZERO);
        world.write(1, OURS);
        world.entry.store(Entry::leaf(Pfn(1), false, RW));
        world
    }

    fn read(&self, page: u32) -> u32 {
        // SAFETY: loom checks that nobody writes meanwhile.
        self.contents[page as usize].with(|c| unsafe { *c })
    }

    fn write(&self, page: u32, value: u32) {
        // SAFETY: loom checks that nobody else is at it.
        self.contents[page as usize].with_mut(|c| unsafe { *c = value });
    }

    fn folio(&self, word: Word) -> &Folio {
        &self.folios[(word.desc().0 / 64 - 1) as usize]
    }

    /// `MemMap::lookup`.
    fn lookup(&self, pfn: Pfn) -> Option<Found> {
        let word = |at: Pfn| self.words[at.0 as usize].load();
        let own = word(pfn);
        if own.is_tail() {
            return climb(pfn, word);
        }
        let head = pfn.align_down(own.order());
        Some(Found { head, word: own })
    }

    /// `folio_release`: whoever has the page next writes to it.
    fn release(&self, head: Pfn) {
        let word = &self.words[head.0 as usize];
        word.publish(word.load_owned().to_free(0, MigrateType::Movable));
        self.write(head.0, 0);
        self.frees[head.0 as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// `folio_put`; says whether the pages are free now.
    fn put(&self, folio: &Folio, head: Pfn, what: Held) -> bool {
        let last = folio.put_counts(what, head) == Put::Last;
        if last {
            self.release(head);
        }
        last
    }

    /// `try_user_page` and `folio_take`.
    fn take(&self, what: Held, write: bool, looks: Looks) -> Option<Got<'_>> {
        let seen = self.entry.load();
        if !seen.is_present() || write && !seen.prot().contains(Prot::WRITE) {
            return None;
        }
        let page = seen.pfn();
        let found @ Found { head, word } = self.lookup(page)?;
        if !word.is_folio() {
            return None;
        }
        let folio = self.folio(word);
        let still = || {
            (!looks.word || self.lookup(page) == Some(found))
                && (!looks.entry || self.entry.is_still(seen))
        };
        if !looks.guess {
            let got = still() && folio.counts().try_get(what);
            return got.then_some(Got { folio, head, page });
        }
        match folio.counts().take(what, still) {
            Taken::Yes => Some(Got { folio, head, page }),
            Taken::No => None,
            Taken::Last => {
                self.release(folio.going());
                None
            }
        }
    }

    /// A walker who reads the page that he gets.
    fn walk(&self, what: Held, looks: Looks) {
        if let Some(got) = self.take(what, false, looks) {
            assert_eq!(self.read(got.page.0), OURS, "somebody else's");
            self.put(got.folio, got.head, what);
        }
    }

    fn frees(&self) -> [u32; 2] {
        [0, 1].map(|page: usize| self.frees[page].load(Ordering::Relaxed))
    }
}

/// What a walker took.
struct Got<'a> {
    folio: &'a Folio,
    head: Pfn,
    page: Pfn,
}

/// One walks, one does something else, and then both are done.
fn beside<R: Send + 'static>(
    world: World,
    walk: impl FnOnce(&World) -> R + Send + 'static,
    other: impl FnOnce(&World),
) -> (Arc<World>, R) {
    let world = Arc::new(world);
    let walker = {
        let world = world.clone();
        thread::spawn(move || walk(&world))
    };
    other(&world);
    let result = walker.join().unwrap();
    (world, result)
}

/// The owner unmaps the page and was the last to have it; the next one writes to it, perhaps by the same descriptor.
fn unmapped_and_had_by_another(what: Held, looks: Looks) {
    let unmap = |w: &World| {
        w.entry.replace(Entry::NONE);
        if w.put(&w.folios[0], Pfn(0), Held::MAP) {
            w.write(0, THEIRS);
            w.folios[0].init(Pfn(0));
            w.words[0].publish(anon(0, 0));
        }
    };
    let (world, ()) = beside(World::new(Held::MAP), move |w| w.walk(what, looks), unmap);
    assert_eq!(world.frees(), [1, 0]);
    let held = world.folios[0].held();
    assert!(held == Held::REF || held == Held::default(), "{held:?}");
}

#[test]
fn a_page_is_unmapped_and_had_by_another() {
    for what in [Held::REF, Held::PIN] {
        loom::model(move || unmapped_and_had_by_another(what, ALL));
    }
}

#[test]
#[should_panic]
fn planted_bug_reference_without_a_second_look_at_the_entry() {
    let looks = Looks {
        entry: false,
        ..ALL
    };
    loom::model(move || unmapped_and_had_by_another(Held::REF, looks));
}

#[test]
#[should_panic]
fn planted_bug_pin_without_a_second_look_at_the_entry() {
    let looks = Looks {
        entry: false,
        ..ALL
    };
    loom::model(move || unmapped_and_had_by_another(Held::PIN, looks));
}

#[test]
#[should_panic]
fn planted_bug_looks_before_it_is_kept() {
    let looks = Looks {
        guess: false,
        ..ALL
    };
    loom::model(move || unmapped_and_had_by_another(Held::REF, looks));
}

/// The same page comes back to the same address, under another descriptor, while the old one serves another page; and goes again.
fn had_again_under_another_descriptor(looks: Looks) {
    let other = |w: &World| {
        w.entry.replace(Entry::NONE);
        if !w.put(&w.folios[0], Pfn(0), Held::MAP) {
            return;
        }
        w.write(1, THEIRS);
        w.folios[0].init(Pfn(1));
        w.words[1].publish(anon(0, 0));
        w.write(0, OURS);
        w.folios[1].init(Pfn(0));
        w.folios[1].counts().init(Held::MAP);
        w.words[0].publish(anon(1, 0));
        w.entry.store(Entry::leaf(Pfn(0), false, RW));
        w.entry.replace(Entry::NONE);
        w.put(&w.folios[1], Pfn(0), Held::MAP);
    };
    let walk = move |w: &World| w.walk(Held::REF, looks);
    let (world, ()) = beside(World::new(Held::MAP), walk, other);
    assert!(world.frees()[0] >= 1 && world.frees()[1] == 0);
    assert_eq!(world.folios[1].held(), Held::default());
}

#[test]
fn a_page_comes_back_under_another_descriptor() {
    loom::model(|| had_again_under_another_descriptor(ALL));
}

#[test]
#[should_panic]
fn planted_bug_no_second_look_at_the_word() {
    let looks = Looks { word: false, ..ALL };
    loom::model(move || had_again_under_another_descriptor(looks));
}

/// How a folio is moved.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Move {
    /// `migrate_isolated`.
    Frozen,
    /// Planted bug: copies first, and then sees whether it may.
    CopiesFirst,
    /// Planted bug: counts who has it, and does not stop anybody from getting it.
    Counts,
    /// Planted bug: leaves the word of the old page as it was until others can have the folio again.
    LateWord,
}

/// The folio moves to page 1; page 0 is bare then, and somebody's.
fn migrate(w: &World, how: Move) {
    let folio = &w.folios[0];
    w.entry.replace(Entry::migration(Pfn(0), Prot::WRITE));
    assert!(!w.put(folio, Pfn(0), Held::MAP), "who moves it has it");
    let copy = || w.write(1, w.read(0));
    if how == Move::CopiesFirst {
        copy();
    }
    let alone = match how {
        Move::Counts => folio.held() == Held::REF,
        _ => folio.counts().freeze(Held::REF),
    };
    if alone {
        if how != Move::CopiesFirst {
            copy();
        }
        w.words[1].publish(anon(0, 0));
        if how == Move::LateWord {
            folio.counts().unfreeze(Held::REF);
            w.words[0].publish(bare(1));
        } else {
            w.words[0].publish(bare(1));
            if how != Move::Counts {
                folio.counts().unfreeze(Held::REF);
            }
        }
        w.write(0, THEIRS);
    }
    let now = Pfn(u32::from(alone));
    assert!(folio.counts().try_get(Held::MAP));
    w.entry.store(Entry::leaf(now, false, RW));
    w.put(folio, now, Held::REF);
}

/// A walker who writes to the page that he gets: says whether he did.
fn walk_and_write(w: &World, what: Held) -> bool {
    let got = w.take(what, true, ALL);
    if let Some(got) = &got {
        w.write(got.page.0, WRITTEN);
        assert!(!w.put(got.folio, got.head, what), "it is mapped, or moved");
    }
    got.is_some()
}

fn moved_under_a_walker(what: Held, how: Move) {
    let walk = move |w: &World| walk_and_write(w, what);
    let (world, wrote) = beside(World::new(REF_AND_MAP), walk, |w| migrate(w, how));
    let page = world.entry.load().pfn();
    let expected = if wrote { WRITTEN } else { OURS };
    assert_eq!(world.read(page.0), expected, "what was written is lost");
    assert_eq!(world.folios[0].held(), Held::MAP);
    assert_eq!(world.frees(), [0, 0]);
}

#[test]
fn a_page_moves_with_what_was_written_to_it() {
    for what in [Held::REF, Held::PIN] {
        loom::model(move || moved_under_a_walker(what, Move::Frozen));
    }
}

#[test]
#[should_panic]
fn planted_bug_copied_before_it_is_frozen() {
    loom::model(|| moved_under_a_walker(Held::PIN, Move::CopiesFirst));
}

#[test]
#[should_panic]
fn planted_bug_moved_without_being_frozen() {
    loom::model(|| moved_under_a_walker(Held::PIN, Move::Counts));
}

/// Who goes by page number alone (`folio_get`) has no entry to look at: the word of the old page is all that tells him.
fn moved_under_a_number(how: Move) {
    let by_number = |w: &World| {
        let found = w.lookup(Pfn(0)).unwrap();
        if !found.word.is_folio() {
            return;
        }
        let folio = w.folio(found.word);
        match folio
            .counts()
            .take(Held::REF, || w.lookup(Pfn(0)) == Some(found))
        {
            Taken::Yes => {
                assert_eq!(w.read(0), OURS, "somebody else's");
                w.put(folio, Pfn(0), Held::REF);
            }
            Taken::No => {}
            Taken::Last => w.release(folio.going()),
        }
    };
    let (world, ()) = beside(World::new(REF_AND_MAP), by_number, |w| migrate(w, how));
    assert_eq!(world.folios[0].held(), Held::MAP);
}

#[test]
fn a_page_moves_from_under_its_number() {
    loom::model(|| moved_under_a_number(Move::Frozen));
}

#[test]
#[should_panic]
fn planted_bug_old_word_written_after_it_is_thawed() {
    loom::model(|| moved_under_a_number(Move::LateWord));
}

/// A folio of two pages, of which the address has the second, is split; then the second is unmapped, and is somebody else's.
fn split_under_a_walker(what: Held, looks: Looks, freezes: bool) {
    let other = move |w: &World| {
        let [old, new] = &w.folios;
        w.entry.replace(Entry::migration(Pfn(1), Prot::WRITE));
        assert!(!w.put(old, Pfn(0), Held::MAP), "who splits it has it");
        let alone = if freezes {
            old.counts().freeze(Held::REF)
        } else {
            old.held() == Held::REF
        };
        let (folio, head) = if alone {
            // `split_frozen`: the old word last.
            new.freeze_new();
            new.init_part(old, 1, Pfn(1));
            w.words[1].publish(anon(1, 0));
            w.words[0].publish(anon(0, 0));
            if freezes {
                old.counts().unfreeze(Held::REF);
            }
            new.counts().unfreeze(Held::REF);
            (new, Pfn(1))
        } else {
            (old, Pfn(0))
        };
        assert!(folio.counts().try_get(Held::MAP));
        w.entry.store(Entry::leaf(Pfn(1), false, RW));
        if alone {
            w.put(new, Pfn(1), Held::REF);
            w.entry.replace(Entry::NONE);
            w.put(new, head, Held::MAP);
        }
    };
    let walk = move |w: &World| w.walk(what, looks);
    let (world, ()) = beside(World::large(REF_AND_MAP), walk, other);
    let split = !world.entry.load().is_present();
    assert_eq!(world.frees(), [0, u32::from(split)]);
    let left = if split { Held::REF } else { REF_AND_MAP };
    assert_eq!(world.folios[0].held(), left);
    assert_eq!(world.folios[1].held(), Held::default());
}

#[test]
fn a_tail_becomes_a_head() {
    for what in [Held::REF, Held::PIN] {
        loom::model(move || split_under_a_walker(what, ALL, true));
    }
}

#[test]
#[should_panic]
fn planted_bug_old_head_taken_for_a_part() {
    let looks = Looks { word: false, ..ALL };
    loom::model(move || split_under_a_walker(Held::REF, looks, true));
}

#[test]
#[should_panic]
fn planted_bug_split_without_being_frozen() {
    loom::model(|| split_under_a_walker(Held::REF, ALL, false));
}

/// How a fork takes the right to write.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fork {
    /// `share`: takes it, and then asks whether the page is pinned.
    Right,
    /// Planted bug: the same, without an order between the two.
    Unordered,
    /// Planted bug: asks first.
    AsksFirst,
}

/// A fork shares the page, or finds it pinned; the walker pins it for writing, or finds that it may not be written. Not both.
fn forked_under_a_walker(how: Fork, looks: Looks) {
    let walk = move |w: &World| w.take(Held::PIN, true, looks).is_some();
    let mut shared = false;
    let (_, pinned) = beside(World::new(Held::MAP), walk, |w| {
        let counts = w.folios[0].counts();
        let pinned = match how {
            Fork::Right => {
                w.entry.clear(Prot::WRITE);
                counts.may_be_pinned()
            }
            Fork::Unordered => {
                w.entry.clear_acq_rel(Prot::WRITE);
                counts.may_be_pinned()
            }
            Fork::AsksFirst => {
                let pinned = counts.may_be_pinned();
                w.entry.clear(Prot::WRITE);
                pinned
            }
        };
        shared = !pinned;
    });
    assert!(
        !(shared && pinned),
        "a device writes to what the child reads"
    );
}

#[test]
fn a_fork_sees_who_pins_or_is_seen() {
    loom::model(|| forked_under_a_walker(Fork::Right, ALL));
}

#[test]
#[should_panic]
fn planted_bug_fork_without_seq_cst() {
    loom::model(|| forked_under_a_walker(Fork::Unordered, ALL));
}

#[test]
#[should_panic]
fn planted_bug_fork_asks_first() {
    loom::model(|| forked_under_a_walker(Fork::AsksFirst, ALL));
}

#[test]
#[should_panic]
fn planted_bug_fork_and_a_pin_without_a_second_look() {
    let looks = Looks {
        entry: false,
        ..ALL
    };
    loom::model(move || forked_under_a_walker(Fork::Right, looks));
}

/// A page that a child and its parent share. The child gets a reference to read it by, and unmaps it; the parent, who alone maps it then,
/// writes to it only if nobody has it or is about to.
fn written_by_the_parent(minds_guesses: bool) {
    // The entry is the child's; the parent's is left out.
    let world = World::new(Held::new(0, 2, 0));
    let walk = |w: &World| w.walk(Held::REF, ALL);
    let (world, ()) = beside(world, walk, |w| {
        let counts = w.folios[0].counts();
        w.entry.replace(Entry::NONE);
        w.put(&w.folios[0], Pfn(0), Held::MAP);
        let alone = if minds_guesses {
            counts.is_exactly(Held::MAP)
        } else {
            counts.held() == Held::MAP
        };
        if alone {
            w.write(0, THEIRS);
        }
    });
    assert_eq!(world.folios[0].held(), Held::MAP);
}

#[test]
fn who_is_alone_writes_without_a_copy() {
    loom::model(|| written_by_the_parent(true));
}

#[test]
#[should_panic]
fn planted_bug_guesses_are_ignored() {
    loom::model(|| written_by_the_parent(false));
}
