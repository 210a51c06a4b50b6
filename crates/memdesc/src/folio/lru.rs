//! Folios by age: for each node two lists of file folios and two of anonymous ones, and one of those that nobody may evict.
//!
//! A list's links are the first 8 bytes of the folio, two page frame numbers: the same that link a free block, since a
//! folio is never both. Which list a folio is in follows from its word and its flags ACTIVE and UNEVICTABLE, which change only
//! under the lock while LRU is set. Who takes a folio off its list (*isolates* it) by clearing LRU has it for himself, among those who
//! want to move or evict it.
//!
//! Source: `lruvec`, `folio_isolate_lru`, `folio_mark_accessed`, `workingset` of Linux, the two-list kind.
//!
//! Lock order: a leaf.

use crate::address::Pfn;
use crate::desc::{Folio, FolioFlags, Held, PfnList};
use crate::lockdep::classes;
use crate::memmap::{MemMap, PageType, Word};
use crate::mm::Mm;
use crate::platform::{Holder, Platform};
use crate::sync::{SpinGuard, SpinLock};

/// Which list.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(usize)]
pub enum LruList {
    /// Anonymous, not used of late.
    InactiveAnon = 0,
    /// Anonymous, in use.
    ActiveAnon = 1,
    /// File cache, not used of late.
    InactiveFile = 2,
    /// File cache, in use.
    ActiveFile = 3,
    /// Not to be evicted.
    Unevictable = 4,
}

impl LruList {
    /// All of them.
    pub const ALL: [LruList; 5] = [
        LruList::InactiveAnon,
        LruList::ActiveAnon,
        LruList::InactiveFile,
        LruList::ActiveFile,
        LruList::Unevictable,
    ];

    fn of(folio: &Folio, kind: PageType) -> LruList {
        if folio.has_flag(FolioFlags::UNEVICTABLE) {
            return LruList::Unevictable;
        }
        match (kind == PageType::File, folio.has_flag(FolioFlags::ACTIVE)) {
            (false, false) => LruList::InactiveAnon,
            (false, true) => LruList::ActiveAnon,
            (true, false) => LruList::InactiveFile,
            (true, true) => LruList::ActiveFile,
        }
    }
}

#[derive(Clone, Copy, Debug)]
struct List {
    ends: PfnList,
    pages: u64,
    folios: u64,
}

/// The lists of a node.
#[derive(Debug)]
pub(crate) struct Lruvec(SpinLock<[List; 5]>);

impl Lruvec {
    pub(crate) fn new() -> Lruvec {
        Lruvec(SpinLock::new(
            [List {
                ends: PfnList::EMPTY,
                pages: 0,
                folios: 0,
            }; 5],
        ))
    }
}

/// What is in the lists: pages and folios.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct LruView {
    /// Pages, by list.
    pub pages: [u64; 5],
    /// Folios, by list.
    pub folios: [u64; 5],
}

/// Folios that were taken off their lists, each with a reference: linked through `next`, counted.
#[derive(Debug)]
#[must_use = "isolated folios are put back or freed"]
pub(crate) struct Isolated {
    head: Pfn,
    pub(crate) folios: u32,
    pub(crate) scanned: u32,
}

impl Isolated {
    pub(crate) fn new() -> Isolated {
        Isolated {
            head: Pfn::NONE,
            folios: 0,
            scanned: 0,
        }
    }

    /// Adds an isolated folio.
    pub(crate) fn push(&mut self, map: &MemMap, head: Pfn) {
        map.buddy(head).set_next(self.head);
        self.head = head;
        self.folios += 1;
    }

    pub(crate) fn pop(&mut self, map: &MemMap) -> Option<Pfn> {
        if self.head == Pfn::NONE {
            return None;
        }
        let head = self.head;
        self.head = map.buddy(head).next();
        self.folios -= 1;
        Some(head)
    }
}

fn link(map: &MemMap, list: &mut List, pfn: Pfn, word: Word, at_tail: bool) {
    list.ends
        .link(map, pfn, word.desc(), at_tail, "lru: about to link");
    list.pages += 1 << word.order();
    list.folios += 1;
}

fn unlink(map: &MemMap, list: &mut List, pfn: Pfn, word: Word) {
    list.ends
        .unlink(map, pfn, word.desc(), "lru: about to unlink");
    list.pages -= 1 << word.order();
    list.folios -= 1;
}

impl<P: Platform> Mm<P> {
    fn lruvec(&self, pfn: Pfn) -> SpinGuard<'_, [List; 5], Holder<'_, P>> {
        self.lruvec_of(self.node_of(pfn))
    }

    fn node_of(&self, pfn: Pfn) -> usize {
        self.pages.map.region(pfn).map_or(0, |region| {
            usize::from(self.pages.zones[region.zone as usize].node)
        })
    }

    fn lruvec_of(&self, node: usize) -> SpinGuard<'_, [List; 5], Holder<'_, P>> {
        let holder = Holder::new(&self.pages.platform, self.pages.rt, &classes::LRU);
        self.lruvecs[node].0.lock(holder)
    }

    /// The nodes that have lists.
    pub(crate) fn lru_nodes(&self) -> usize {
        self.lruvecs.len()
    }

    /// Enters a folio that the caller has into its list, as the youngest (`folio_add_lru`). Nothing happens if it is in one, or if somebody has
    /// taken it off and will put it back. `head` is its first page; panics if not.
    ///
    /// # Context
    ///
    /// Any that may take a lock.
    pub fn folio_add_lru(&self, folio: &Folio, head: Pfn) {
        assert!(self.is_head_of(folio, head), "{head:?} heads another");
        self.lru_enter(
            folio,
            head,
            false,
            FolioFlags::LRU.with(FolioFlags::ISOLATED),
        );
    }

    /// Is this the folio's first page? Of a folio that the caller has.
    pub(crate) fn is_head_of(&self, folio: &Folio, head: Pfn) -> bool {
        let word = match self.pages.map.region(head) {
            Some(region) => region.word(head).load(),
            None => return false,
        };
        word.is_folio() && core::ptr::eq(self.folio_at(word.desc()), folio)
    }

    /// Puts an isolated folio back, as the youngest or as the oldest of its list (`folio_putback_lru`), without the isolator's reference.
    pub(crate) fn lru_insert(&self, folio: &Folio, head: Pfn, oldest: bool) {
        self.lru_enter(folio, head, oldest, FolioFlags::LRU);
    }

    fn lru_enter(&self, folio: &Folio, head: Pfn, oldest: bool, unless: FolioFlags) {
        let word = self.pages.map.word(head).load_owned();
        let mut lists = self.lruvec(head);
        if folio.has_flag(unless) {
            return;
        }
        folio.clear_flag(FolioFlags::ISOLATED);
        let list = LruList::of(folio, word.kind());
        link(
            &self.pages.map,
            &mut lists[list as usize],
            head,
            word,
            oldest,
        );
        // Last, under the lock: who clears it finds the folio linked.
        folio.set_flag(FolioFlags::LRU);
    }

    /// Takes a folio that the caller has off its list; `false` if it is in none, or another isolates it (`folio_isolate_lru`). The
    /// caller's reference keeps it until he puts it back.
    pub(crate) fn lru_isolate(&self, folio: &Folio, head: Pfn) -> bool {
        let mut lists = self.lruvec(head);
        if !folio.clear_flag(FolioFlags::LRU) {
            return false;
        }
        folio.set_flag(FolioFlags::ISOLATED);
        let word = self.pages.map.word(head).load_owned();
        let list = LruList::of(folio, word.kind());
        unlink(&self.pages.map, &mut lists[list as usize], head, word);
        true
    }

    /// A folio that nobody has any more leaves its list (`__page_cache_release`).
    pub(crate) fn lru_forget(&self, head: Pfn) {
        let folio = self.folio_at(self.pages.map.word(head).load_owned().desc());
        // An isolator cannot be in between: he would have a reference.
        let was_listed = self.lru_isolate(folio, head);
        debug_assert!(was_listed);
    }

    /// The same from any context; `false` if the lock was held by somebody: then the folio goes with the next tick, or when memory is short.
    pub(crate) fn lru_try_forget(&self, head: Pfn) -> bool {
        let word = self.pages.map.word(head).load_owned();
        let folio = self.folio_at(word.desc());
        if !folio.has_flag(FolioFlags::LRU) {
            return true;
        }
        let holder = Holder::trying(&self.pages.platform, self.pages.rt, &classes::LRU);
        if let Some(mut lists) = self.lruvecs[self.node_of(head)].0.try_lock(holder) {
            folio.clear_flag(FolioFlags::LRU);
            let list = LruList::of(folio, word.kind());
            unlink(&self.pages.map, &mut lists[list as usize], head, word);
            return true;
        }
        // Nobody has it any more, so its place in a mapping means nothing: the link of those that wait.
        self.dying
            .push(head, |next| folio.set_index(u64::from(next.0)));
        false
    }

    /// Frees the folios that could not leave their list.
    pub(crate) fn free_dying(&self) {
        let mut at = self.dying.take();
        while at != Pfn::NONE {
            let next = Pfn(self.folio_of(at).index() as u32);
            self.folio_release(at);
            at = next;
        }
    }

    /// Nobody may evict the folio from now on, or they may again (`mlock_folio`): it goes to the list of those, or back. Of a folio that the caller
    /// has; `head` is its first page; panics if not. `false` if somebody has it off its list at this moment.
    ///
    /// # Context
    ///
    /// Any that may take a lock.
    pub fn folio_set_unevictable(&self, folio: &Folio, head: Pfn, locked: bool) -> bool {
        assert!(self.is_head_of(folio, head), "{head:?} heads another");
        if !self.lru_isolate(folio, head) {
            return false;
        }
        if locked {
            folio.set_flag(FolioFlags::UNEVICTABLE);
        } else {
            folio.clear_flag(FolioFlags::UNEVICTABLE);
        }
        self.lru_insert(folio, head, false);
        true
    }

    /// Takes up to `most` folios off the old end of a list, with a reference each. Those that are on their way out are passed over.
    pub(crate) fn lru_isolate_oldest(&self, node: usize, list: LruList, most: u32) -> Isolated {
        let map = &self.pages.map;
        let mut taken = Isolated::new();
        let mut lists = self.lruvec_of(node);
        let lru = &mut lists[list as usize];
        let mut at = lru.ends.tail;
        while at != Pfn::NONE && taken.scanned < most {
            taken.scanned += 1;
            let word = map.word(at).load_owned();
            let folio = self.folio_at(word.desc());
            let prev = map.buddy(at).prev();
            // In the list and under its lock: its descriptor and pages are still what they are, though perhaps nobody's.
            if folio.counts().try_get(Held::REF) {
                folio.clear_flag(FolioFlags::LRU);
                folio.set_flag(FolioFlags::ISOLATED);
                unlink(map, lru, at, word);
                taken.push(map, at);
            }
            at = prev;
        }
        taken
    }

    /// Used again: the second time within the memory of the list makes a folio active (`folio_mark_accessed`).
    ///
    /// # Context
    ///
    /// Any that may take a lock. Of a folio that the caller has; panics if `head` is not its first page.
    pub fn folio_mark_accessed(&self, folio: &Folio, head: Pfn) {
        assert!(self.is_head_of(folio, head), "{head:?} heads another");
        if !folio.has_flag(FolioFlags::REFERENCED) {
            folio.set_flag(FolioFlags::REFERENCED);
            return;
        }
        if !folio.has_flag(FolioFlags::ACTIVE.with(FolioFlags::UNEVICTABLE)) {
            self.lru_set_active(folio, head, true);
            folio.clear_flag(FolioFlags::REFERENCED);
        }
    }

    /// Moves a folio to the active list or back.
    pub(crate) fn lru_set_active(&self, folio: &Folio, head: Pfn, active: bool) {
        let word = self.pages.map.word(head).load_owned();
        let map = &self.pages.map;
        let mut lists = self.lruvec(head);
        let listed = folio.has_flag(FolioFlags::LRU);
        if listed {
            let list = LruList::of(folio, word.kind());
            unlink(map, &mut lists[list as usize], head, word);
        }
        if active {
            folio.set_flag(FolioFlags::ACTIVE);
        } else {
            folio.clear_flag(FolioFlags::ACTIVE);
        }
        if listed {
            let list = LruList::of(folio, word.kind());
            link(map, &mut lists[list as usize], head, word, false);
        }
    }

    /// What is in a node's lists.
    pub fn lru_view(&self, node: usize) -> LruView {
        if node >= self.lruvecs.len() {
            return LruView::default();
        }
        let lists = self.lruvec_of(node);
        LruView {
            pages: core::array::from_fn(|i| lists[i].pages),
            folios: core::array::from_fn(|i| lists[i].folios),
        }
    }
}
