//! The books: looked at while all workers stand still, and closed at the end, when everything has to be as it was.

use core::sync::atomic::Ordering;

use memdesc::rcu::Rcu;
use memdesc::{Event, Ledger, Mm, PageType};

use super::{Count, Soak, nmi, nmis};
use crate::exit::Exit;
use crate::platform::Metal;
use crate::tests::{Machine, ledger, settled};
use crate::{log, process, time, users, wrong};

/// What the counters say.
pub(super) struct Counted {
    pub(super) allocations: u64,
    pub(super) faults: u64,
    pub(super) reclaimed: u64,
    pub(super) moved: u64,
    pub(super) reported: u64,
    pub(super) nmis: u64,
    pub(super) free: u64,
}

impl Counted {
    pub(super) fn of(mm: &Mm<Metal>) -> Counted {
        let mut free = 0;
        mm.zoneinfo(|zone| free += zone.free);
        Counted {
            allocations: mm.event(Event::PgAlloc) + mm.event(Event::SlabAlloc),
            faults: users::FAULTS.load(Ordering::Relaxed),
            reclaimed: mm.event(Event::PgSteal),
            moved: mm.event(Event::PgMigrateSuccess),
            reported: mm.event(Event::PgReported),
            nmis: nmis(),
            free,
        }
    }
}

/// Pages that were free, wherever they were kept.
fn free(ledger: &Ledger) -> u64 {
    ledger.free + ledger.untouched + ledger.pcp
}

/// What there was before.
pub(super) struct Before {
    pub(super) free: u64,
    settled: u64,
    pages: [u64; PageType::COUNT],
}

impl Before {
    pub(super) fn of(machine: &Machine) -> Before {
        let ledger = ledger(machine);
        Before {
            free: free(&ledger),
            settled: settled(&ledger),
            pages: ledger.by_type,
        }
    }
}

/// What was done.
pub(super) struct Totals {
    seconds: u64,
    counted: Counted,
    counts: [u64; 12],
}

impl Totals {
    pub(super) fn of(soak: &Soak) -> Totals {
        Totals {
            seconds: (time::now() - soak.start) / 1_000_000_000,
            counted: Counted::of(soak.mm),
            counts: [
                Count::Forks,
                Count::Exhausted,
                Count::Elements,
                Count::Bad,
                Count::Exchanged,
                Count::Deferred,
                Count::Replaced,
                Count::Vigils,
                Count::Synced,
                Count::Processes,
                Count::Threads,
                Count::Died,
            ]
            .map(|count| soak.counted(count)),
        }
    }
}

/// A look at everything, while nobody is at work.
pub(super) fn look(soak: &Soak) {
    let mm = soak.mm;
    let ledger = mm.ledger();
    if !ledger.balanced {
        wrong!(soak, "the ledger does not balance: {ledger:?}");
    }
    let found = mm.validate(|report| wrong!(soak, "{report}"));
    if found.errors() > 0 {
        wrong!(soak, "{found:?}");
    }
    let (mut pages, mut torn) = (0, 0);
    mm.census_visit(|step| {
        pages += u64::from(step.pages);
        torn += u64::from(step.order.is_none() && step.kind != memdesc::CensusKind::Untouched);
    });
    if pages != soak.ram || torn > 0 {
        wrong!(
            soak,
            "{pages} of {} pages in the census, {torn} of them torn",
            soak.ram
        );
    }
    let strays = process::STRAYS.load(Ordering::Relaxed);
    if strays > 0 {
        wrong!(soak, "{strays} processes were not let touch what is theirs");
    }
    if let Err(why) = mm.check_vm_areas() {
        wrong!(soak, "vmalloc areas: {why}");
    }
    if let Err(why) = mm.memcg_check() {
        wrong!(soak, "charges: {why}");
    }
    if nmi::wrong() > 0 {
        wrong!(soak, "{} times wrong in an NMI", nmi::wrong());
    }
}

/// The end: everything has been given back. `wrong` is what was found so far.
pub(super) fn close(machine: &Machine, before: &Before, totals: &Totals, wrong: u64) -> Exit {
    let mm = machine.mm;
    let mut wrong = wrong;
    let mut say = |what: core::fmt::Arguments<'_>| {
        log!("soak: WRONG: {what}");
        wrong += 1;
    };
    mm.rcu().barrier();
    mm.shrink();
    mm.shrink();
    let ledger = ledger(machine);
    if !ledger.balanced {
        say(format_args!("the ledger does not balance: {ledger:?}"));
    }
    let found = mm.validate(|report| log!("soak: WRONG: {report}"));
    if found.errors() > 0 {
        say(format_args!("{found:?}"));
    }
    let (is, was) = (settled(&ledger), before.settled);
    if is != was {
        say(format_args!(
            "{was} pages were free or metadata at the start, {is} are"
        ));
    }
    for (kind, (is, was)) in PageType::ALL
        .iter()
        .zip(ledger.by_type.iter().zip(&before.pages))
    {
        // Slabs of descriptors, and page tables of vmalloc's range, are what was just summed up.
        let summed = matches!(kind, PageType::Slab | PageType::PageTable);
        if is != was && !summed {
            say(format_args!(
                "{is} pages of {}, {was} at the start",
                kind.name()
            ));
        }
    }
    let census = mm.census();
    if census.pages() != ledger.given || census.torn > 0 {
        say(format_args!(
            "{} of {} pages in the census, {} torn",
            census.pages(),
            ledger.given,
            census.torn
        ));
    }
    let strays = process::STRAYS.load(Ordering::Relaxed);
    if strays > 0 {
        say(format_args!(
            "{strays} processes were not let touch what is theirs"
        ));
    }
    if let Err(why) = mm.check_vm_areas() {
        say(format_args!("vmalloc areas: {why}"));
    }
    let on_free = mm.event(Event::AllocOnFree);
    if on_free > 0 {
        say(format_args!("{on_free} allocations on a free path"));
    }
    let queued = mm.kvfree_queued();
    if queued > 0 {
        say(format_args!("{queued} objects wait to be freed"));
    }
    if nmi::wrong() > 0 {
        say(format_args!("{} times wrong in an NMI", nmi::wrong()));
    }
    let [
        forks,
        exhausted,
        elements,
        bad,
        exchanged,
        deferred,
        replaced,
        vigils,
        synced,
        processes,
        threads,
        died,
    ] = totals.counts;
    let Counted {
        allocations,
        faults,
        reclaimed,
        moved,
        reported,
        nmis,
        ..
    } = totals.counted;
    log!(
        "soak: {allocations} allocations, {faults} faults, {forks} forks, {reclaimed} pages reclaimed, {moved} moved, {reported} reported, {bad} bad for a while"
    );
    log!(
        "soak: {nmis} NMIs with {} allocations, {exhausted} times all memory was gone, {elements} elements of a mempool, {exchanged} freed by others, {deferred} after a grace period, {replaced} replaced under readers",
        nmi::got()
    );
    log!(
        "soak: {vigils} vigils, {synced} times the disk was compared, {processes} processes and {threads} threads were started, {died} of them found no memory"
    );
    // A soak that did nothing found nothing.
    let idle = [
        allocations,
        faults,
        forks,
        reclaimed,
        moved,
        reported,
        nmis,
        exhausted,
        deferred,
        vigils,
        synced,
        processes,
        threads,
    ];
    if totals.seconds >= 15 && idle.contains(&0) {
        say(format_args!("some of this was never done"));
    }
    let (free, given) = (free(&ledger), ledger.given);
    let verdict = if wrong == 0 {
        "the ledger balances"
    } else {
        "FAILED"
    };
    log!(
        "soak: {} s, {verdict}: {free} pages of {given} are free, {} were at the start, {} B of metadata; {wrong} wrong",
        totals.seconds,
        before.free,
        ledger.metadata_bytes()
    );
    if wrong == 0 {
        Exit::Success
    } else {
        Exit::Failure
    }
}
