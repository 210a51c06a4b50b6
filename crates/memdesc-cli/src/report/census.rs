//! The census of the replay's end beside Linux's last snapshot: for people and as an object.

use serde_json::{Map, Value, json};

use super::format::{n, right};
use super::json::round;
use super::text::Page;
use crate::replay::Replay;
use crate::replay::census::{Beside, Count, Differences, Side, Type, agreement};

/// Orders that are named, as a share of a type's allocations in percent; the rest is summed up.
const NAMED_SHARE: f64 = 0.05;

/// Bytes of a bare page's descriptor.
const BUDDY: u64 = 8;

/// The part of the report for people.
pub(super) fn text(page: &mut Page, replay: &Replay) {
    let census = &replay.census;
    page.head(match census.linux {
        Some(_) => "Census at the end of the recording, beside Linux's snapshot after it",
        None => "Census at the end of the recording  (no snapshot after it to stand beside)",
    });
    let linux = census.linux.as_ref().map(|beside| &beside.linux);
    let mut title = format!(
        "{:<14}{}{}",
        "",
        right("pages", 12),
        right("allocations", 14)
    );
    if linux.is_some() {
        title += &format!(
            "   Linux{}{}{}{}",
            right("pages", 10),
            right("allocations", 14),
            right("sums agree", 14),
            right("page by page", 15)
        );
    }
    page.line(&title);
    for of in Type::ALL {
        let ours = census.replay.of(of);
        let mut row = format!("{:<14}{}", of.name().replace('_', " "), count(of, ours));
        if let Some(linux) = linux {
            let theirs = linux.of(of);
            row += &format!("        {}", &count(of, theirs)[2..]);
            if of.is_compared() {
                let percent = agreement(ours.pages, theirs.pages);
                row += &right(&format!("{percent:.2} %"), 14);
                let settled = census.linux.as_ref().map(|l| l.differences.percent_of(of));
                let settled = settled.filter(|_| of.has_blocks());
                row += &settled.map_or(String::new(), |p| right(&format!("{p:.2} %"), 15));
            }
        }
        page.line(&row);
    }
    if let Some(beside) = &census.linux {
        agreement_lines(page, replay, beside);
    }
    if let Some(start) = &census.start {
        let same = &start.differences;
        page.line(&format!(
            "at the start, beside the snapshot before it: {:.2} % of {} pages the same type",
            same.percent(),
            n(same.all())
        ));
    }
    for of in [Type::File, Type::Anon] {
        folios(page, of, &census.replay, linux);
    }
    let bytes = replay.ledger.metadata_bytes() as f64 / replay.ledger.given.max(1) as f64;
    page.line(&format!(
        "all metadata: {bytes:.2} B a page; struct page 64.00"
    ));
    if census.bare_slabs > 0 {
        // A slab's descriptor less a bare page's.
        let more = census.bare_slabs * (size_of::<memdesc::Slab>() as u64 - BUDDY);
        page.line(&format!(
            "({} of the slabs stand for objects that are not replayed, as bare pages; as slabs they would take {} more, {:.2} B a page)",
            n(census.bare_slabs),
            super::format::bytes(more),
            more as f64 / replay.ledger.given.max(1) as f64
        ));
    }
}

/// Pages, and allocations if they are known.
fn count(of: Type, count: &Count) -> String {
    let blocks = if of.has_blocks() {
        n(count.blocks)
    } else {
        "–".into()
    };
    format!("{}{}", right(&n(count.pages), 12), right(&blocks, 14))
}

fn agreement_lines(page: &mut Page, replay: &Replay, beside: &Beside) {
    let all = &beside.differences;
    page.line(&format!(
        "all, page by page: {:.2} % of {} have the same type; {:.2} % of those that did not change hands after the last event (the last column)",
        all.percent(),
        n(all.all()),
        all.settled_percent()
    ));
    if let Some((of, by)) = replay.census.largest_difference() {
        let side = if by < 0 { "fewer" } else { "more" };
        page.line(&format!(
            "largest difference: {}, {} pages {side} here",
            of.name().replace('_', " "),
            n(by.unsigned_abs())
        ));
    }
    for (_, text, pages) in reasons(all) {
        page.some("  pages that differ", pages, text);
    }
    page.line(&format!(
        "{} allocations were given the type that the snapshot shows and not the one that their flags say",
        n(replay.census.corrected)
    ));
}

/// Why pages differ: key, words, how many.
fn reasons(all: &Differences) -> [(&'static str, &'static str, u64); 5] {
    [
        (
            "freed_since",
            "freed between the last event and the snapshot",
            all.freed_since,
        ),
        (
            "taken_since",
            "freed by their last event and taken again since",
            all.taken_since,
        ),
        (
            "without_event",
            "of another type before than after, and in no event",
            all.without_event,
        ),
        (
            "guessed",
            "without flags, bare or in per-CPU lists: a guess",
            all.guessed,
        ),
        (
            "other_type",
            "handed out again since, or their flags mislead",
            all.other_type,
        ),
    ]
}

/// How large folios are.
fn folios(page: &mut Page, of: Type, replay: &Side, linux: Option<&Side>) {
    let ours = replay.of(of);
    if ours.blocks == 0 {
        return;
    }
    let mut line = format!(
        "pages {} {} folio: {:.2}",
        if of == Type::Anon { "an" } else { "a" },
        of.name(),
        ours.pages_a_block()
    );
    if let Some(theirs) = linux.map(|linux| linux.of(of)) {
        line += &format!(", Linux {:.2}", theirs.pages_a_block());
    }
    line += &format!("; {} large", n(ours.large()));
    if let Some(theirs) = linux.map(|linux| linux.of(of)) {
        line += &format!(", Linux {}", n(theirs.large()));
    }
    let named = |(order, &blocks): (usize, &u64)| {
        let share = blocks as f64 * 100.0 / ours.blocks as f64;
        (order > 0 && share >= NAMED_SHARE).then(|| format!("{order}: {}", n(blocks)))
    };
    let orders: Vec<_> = ours.by_order.iter().enumerate().filter_map(named).collect();
    if !orders.is_empty() {
        line += &format!(" (by order {})", orders.join(", "));
    }
    page.line(&line);
}

fn side(side: &Side) -> Value {
    let one = |of: Type| {
        let count = side.of(of);
        let mut row = Map::new();
        row.insert("pages".into(), json!(count.pages));
        if of.has_blocks() {
            row.insert("allocations".into(), json!(count.blocks));
            row.insert("by_order".into(), json!(count.by_order));
        }
        (of.name().to_string(), Value::from(row))
    };
    Type::ALL.into_iter().map(one).collect::<Map<_, _>>().into()
}

fn beside(beside: &Beside) -> Value {
    let all = &beside.differences;
    let reasons = reasons(all).into_iter();
    let pages: Map<_, _> = reasons
        .map(|(key, _, pages)| (key.to_string(), json!(pages)))
        .collect();
    let compared = Type::ALL.into_iter().filter(|of| of.has_blocks());
    let by_type: Map<_, _> = compared
        .map(|of| {
            let percent = round(all.percent_of(of), 4);
            (of.name().to_string(), json!(percent))
        })
        .collect();
    json!({
        "linux": side(&beside.linux),
        "settled_percent_by_type": by_type,
        "same_type_pages": all.same,
        "pages": all.all(),
        "percent": round(all.percent(), 4),
        "settled_percent": round(all.settled_percent(), 4),
        "differences": pages,
    })
}

/// The object.
pub(super) fn object(replay: &Replay) -> Value {
    let census = &replay.census;
    let linux = census.linux.as_ref().map(|beside| &beside.linux);
    let agree: Option<Map<_, _>> = linux.map(|linux| {
        let compared = Type::ALL.into_iter().filter(|of| of.is_compared());
        compared
            .map(|of| {
                let percent = agreement(census.replay.of(of).pages, linux.of(of).pages);
                (of.name().to_string(), json!(round(percent, 4)))
            })
            .collect()
    });
    let folio = |of: Type| {
        json!({
            "replay": round(census.replay.of(of).pages_a_block(), 4),
            "linux": linux.map(|linux| round(linux.of(of).pages_a_block(), 4)),
        })
    };
    let bytes = replay.ledger.metadata_bytes() as f64 / replay.ledger.given.max(1) as f64;
    json!({
        "replay": side(&census.replay),
        "end": census.linux.as_ref().map(beside),
        "start": census.start.as_ref().map(beside),
        "agreement_percent": agree,
        "largest_difference": census.largest_difference().map(|(of, by)| json!({ "type": of.name(), "pages": by })),
        "bare_slabs": census.bare_slabs,
        "corrected_by_snapshot": census.corrected,
        "pages_per_folio": { "file": folio(Type::File), "anon": folio(Type::Anon) },
        "metadata_bytes_per_page": round(bytes, 4),
    })
}
