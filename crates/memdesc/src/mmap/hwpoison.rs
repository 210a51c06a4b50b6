//! A page that users have is broken: they are told, and find an entry that says so in its place.
//!
//! Source: `hwpoison_user_mappings`, `kill_procs` and `TTU_HWPOISON` of Linux.

use super::family::FamilyRef;
use super::zap::{Gather, PAGE};
use crate::address::Pfn;
use crate::desc::Folio;
use crate::folio::Mapped;
use crate::mm::Mm;
use crate::pgtable::Entry;
use crate::platform::Platform;

impl<P: Platform> Mm<P> {
    /// Puts an entry that says so in the place of each that maps this page of the folio, and tells the platform; says how many. The
    /// folio's other pages stay mapped. The folio is locked, and the caller has a reference; `family` is what [`rmap_family`](Self::rmap_family) said.
    pub(crate) fn rmap_poison(
        &self,
        folio: &Folio,
        head: Pfn,
        page: Pfn,
        family: Option<&FamilyRef<'_, P>>,
    ) -> u32 {
        if folio.mapcount() == 0 {
            return 0;
        }
        let wanted = u64::from(page.0 - head.0);
        let mut told = 0;
        self.rmap_walk(folio, head, family, |space, addr, nth, pages| {
            if wanted < nth || wanted >= nth + pages {
                return;
            }
            let at = addr + (wanted - nth) * PAGE;
            let huge = self
                .walk_to(space.root, at, 2)
                .map(|slot| self.settled(&slot));
            if huge.is_some_and(|e| e.is_huge() && page >= e.pfn() && page.0 - e.pfn().0 < 512) {
                // By pages, which needs no memory.
                self.split_huge(space, at);
            }
            let mut gather = Gather::new();
            let hit = {
                let Some((slot, _lock, _read)) = self.walk_and_lock(space.root, at) else {
                    return;
                };
                let seen = slot.entry.load();
                let hit = seen.is_present() && !seen.is_special() && seen.pfn() == page;
                if hit {
                    let old = slot.entry.replace(Entry::hwpoison(page));
                    self.gather(space, &mut gather, old, Mapped::Page(0), at);
                }
                hit
            };
            self.gather_flush(space, &mut gather);
            if hit {
                told += 1;
                self.pages
                    .platform
                    .memory_failure_notify(space.asid, at, page);
            }
        });
        told
    }
}
