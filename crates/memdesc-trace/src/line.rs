//! One line to one event: the prefixes of perf script and ftrace, and the fields of `kmem:*`.

use crate::event::{CacheId, Event, EventKind};
use crate::intern::{CacheNames, GfpNames};
use crate::scan::{self, find_key};

/// What a line turned out to be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Line {
    /// An event of the page or slab allocator. `true`: a flag's name was unknown.
    Event(Event, bool),
    /// An event that says nothing about an allocation.
    Other,
    /// The tracer says that it lost this many events.
    Lost(u64),
    /// A comment.
    Comment,
    /// Nothing, or a line of a call chain.
    Blank,
}

/// Why a line is not what it should be: what was expected.
pub(crate) type Expected = &'static str;

type Parsed<T> = Result<T, Expected>;

/// The names that lines refer to.
pub(crate) struct Names {
    pub(crate) gfp: GfpNames,
    pub(crate) caches: CacheNames,
}

/// Reads one line, without its line end.
#[inline]
pub(crate) fn parse(line: &[u8], names: &mut Names) -> Parsed<Line> {
    match line {
        [b'[', ..] => match prefix(line) {
            Ok((cpu, time_ns, event)) => body(cpu, time_ns, event, names),
            // A task may be called `[x`.
            Err(_) => with_task(line, names),
        },
        _ => with_task(line, names),
    }
}

/// `[001] d.h1.   799.175799:`, and what follows.
#[inline]
fn prefix(s: &[u8]) -> Parsed<(u16, u64, &[u8])> {
    const CPU: &str = "a CPU in brackets, like [001]";
    let s = s.strip_prefix(b"[").ok_or(CPU)?;
    let (cpu, s) = scan::digits(s).ok_or(CPU)?;
    let cpu = u16::try_from(cpu).map_err(|_| "a CPU below 65536")?;
    let s = scan::skip_blanks(s.strip_prefix(b"]").ok_or(CPU)?);
    let found = scan::time_ns(s).or_else(|| {
        // ftrace prints the state of interrupts and preemption in between.
        let (_state, rest) = scan::token(s);
        scan::time_ns(scan::skip_blanks(rest))
    });
    let (time_ns, s) = found.ok_or("a time in seconds, like 799.175799:")?;
    let s = s.strip_prefix(b":").ok_or("a colon after the time")?;
    Ok((cpu, time_ns, scan::skip_blanks(s)))
}

/// A line that begins with the task: its name may hold anything, brackets and colons too.
fn with_task(line: &[u8], names: &mut Names) -> Parsed<Line> {
    let mut expected = "a CPU in brackets, like [001]";
    let mut first = None;
    for at in memchr::memchr_iter(b'[', line) {
        match prefix(&line[at..]) {
            Ok((cpu, time_ns, event)) => {
                let found = body(cpu, time_ns, event, names);
                match found {
                    // Something that looks like a prefix in a task's name leads to no known event.
                    Ok(Line::Other) | Err(_) => first = first.or(Some(found)),
                    _ => return found,
                }
            }
            Err(wanted) if at == 0 || matches!(line[at - 1], b' ' | b'\t') => expected = wanted,
            Err(_) => {}
        }
    }
    match first {
        Some(found) => found,
        None => odd(line, expected),
    }
}

/// A line without CPU and time: a comment, a word on losses, a call chain, or broken.
#[cold]
fn odd(line: &[u8], expected: Expected) -> Parsed<Line> {
    let text = scan::skip_blanks(line).trim_ascii_end();
    if text.is_empty() {
        return Ok(Line::Blank);
    }
    if let [b'#', ..] = text {
        return Ok(overwritten(text).map_or(Line::Comment, Line::Lost));
    }
    if let Some(lost) = lost(text) {
        return Ok(Line::Lost(lost));
    }
    // `        ffffffff813c1d2e kmem_cache_alloc+0x1ae ([kernel.kallsyms])`, or ftrace's ` => symbol`
    let indented = text.len() < line.len() && matches!(line[0], b' ' | b'\t');
    let frame = text.starts_with(b"=> ")
        || scan::hex_digits(text)
            .is_some_and(|(_, rest)| text.len() - rest.len() >= 4 && rest.first() == Some(&b' '));
    if indented && frame {
        Ok(Line::Blank)
    } else {
        Err(expected)
    }
}

/// `# entries-in-buffer/entries-written: 205/4000   #P:2`: the difference was overwritten.
fn overwritten(comment: &[u8]) -> Option<u64> {
    let counts = find_key(comment, b"entries-in-buffer/entries-written:")?;
    let (kept, rest) = scan::digits(scan::skip_blanks(counts))?;
    let (written, _) = scan::digits(rest.strip_prefix(b"/")?)?;
    written.checked_sub(kept).filter(|&lost| lost > 0)
}

/// `CPU:1 [LOST 12 EVENTS]`, `PERF_RECORD_LOST lost 12`, `CPU 1: 12 events lost`,
/// `CPU:1 [EVENTS DROPPED]`.
fn lost(text: &[u8]) -> Option<u64> {
    let words = || {
        text.split(|b| matches!(b, b' ' | b'[' | b']' | b'!' | b'.'))
            .filter(|w| !w.is_empty())
    };
    let is_loss = |w: &[u8]| w.eq_ignore_ascii_case(b"lost") || w == b"DROPPED";
    let about_events = |w: &[u8]| w.len() >= 5 && w[..5].eq_ignore_ascii_case(b"event");
    let of_perf = text.windows(16).any(|w| w == b"PERF_RECORD_LOST");
    let told = words().any(is_loss) && words().any(about_events);
    if !(of_perf || told) {
        return None;
    }
    let mut numbers = words().filter_map(|w| scan::digits(w).filter(|(_, rest)| rest.is_empty()));
    Some(numbers.next_back().map_or(1, |(n, _)| n.max(1)))
}

/// From the event's name on.
#[inline]
fn body(cpu: u16, time_ns: u64, s: &[u8], names: &mut Names) -> Parsed<Line> {
    let s = s.strip_prefix(b"kmem:").unwrap_or(s);
    let Some(colon) = memchr::memchr(b':', s) else {
        return nameless(s);
    };
    let (name, fields) = (&s[..colon], &s[colon + 1..]);
    let mut unknown_name = false;
    let mut gfp = |fields| {
        let (text, _) = scan::token(find_key(fields, b"gfp_flags=").ok_or("a field gfp_flags=")?);
        let gfp = names
            .gfp
            .read(text.trim_ascii_end())
            .ok_or("gfp flags by name")?;
        unknown_name = gfp.unknown_name;
        Ok::<_, Expected>(gfp.flags)
    };
    let kind = match name {
        b"mm_page_alloc" => {
            let (pfn, fields) = pfn(fields)?;
            let (order, fields) = order(fields)?;
            let (migratetype, fields) = migratetype(fields)?;
            let gfp = gfp(fields)?;
            match pfn {
                None | Some(0) => EventKind::PageAllocFailed {
                    order,
                    migratetype,
                    gfp,
                },
                Some(pfn) => EventKind::PageAlloc {
                    pfn,
                    order,
                    migratetype,
                    gfp,
                },
            }
        }
        b"mm_page_free" => {
            let (pfn, fields) = freed_pfn(fields)?;
            let (order, _) = order(fields)?;
            EventKind::PageFree { pfn, order }
        }
        b"mm_page_free_batched" => EventKind::PageFreeBatched {
            pfn: freed_pfn(fields)?.0,
        },
        b"kmalloc" | b"kmalloc_node" => {
            let (ptr, fields) = ptr(fields)?;
            let (bytes_req, fields) = bytes(fields, b"bytes_req=")?;
            let (bytes_alloc, fields) = bytes(fields, b"bytes_alloc=")?;
            EventKind::Kmalloc {
                ptr,
                bytes_req,
                bytes_alloc,
                gfp: gfp(fields)?,
            }
        }
        b"kfree" => EventKind::Kfree {
            ptr: ptr(fields)?.0,
        },
        b"kmem_cache_alloc" | b"kmem_cache_alloc_node" => {
            let (ptr, fields) = ptr(fields)?;
            let (name, fields) = match scan::skip_blanks(fields).strip_prefix(b"name=") {
                Some(named) => {
                    let (name, _) = scan::split_key(named, b"bytes_req=")
                        .ok_or("a field bytes_req= after the name")?;
                    (name, &named[name.len()..])
                }
                None => (&b""[..], fields),
            };
            let (bytes_req, fields) = bytes(fields, b"bytes_req=")?;
            let (bytes_alloc, fields) = bytes(fields, b"bytes_alloc=")?;
            let gfp = gfp(fields)?;
            let cache = names.caches.of_alloc(name, bytes_req, bytes_alloc);
            EventKind::CacheAlloc { cache, ptr, gfp }
        }
        b"kmem_cache_free" => {
            let (ptr, fields) = ptr(fields)?;
            let cache = match find_key(fields, b"name=").map(<[u8]>::trim_ascii_end) {
                None | Some([]) => CacheId::UNKNOWN,
                Some(name) => names.caches.of_free(name),
            };
            EventKind::CacheFree { cache, ptr }
        }
        _ => return nameless(s),
    };
    Ok(Line::Event(Event::new(time_ns, cpu, kind), unknown_name))
}

/// Time and CPU are there, the event is none of ours.
#[cold]
fn nameless(s: &[u8]) -> Parsed<Line> {
    if s.trim_ascii().is_empty() {
        return Err("the name of an event");
    }
    if s.starts_with(b"PERF_RECORD_LOST") {
        return Ok(Line::Lost(lost(s).unwrap_or(1)));
    }
    Ok(Line::Other)
}

/// The page's number; `None` for what Linux prints when there is no page.
#[inline]
fn pfn(fields: &[u8]) -> Parsed<(Option<u32>, &[u8])> {
    let value = find_key(fields, b"pfn=").ok_or("a field pfn=")?;
    let (pfn, rest) = scan::number(value).ok_or("a number in pfn=")?;
    match u32::try_from(pfn) {
        // The last one means "none" in links.
        Ok(pfn) if pfn != u32::MAX => Ok((Some(pfn), rest)),
        _ if pfn == u64::MAX => Ok((None, rest)),
        _ => Err("a pfn below 2^32 - 1 (16 TiB)"),
    }
}

#[inline]
fn freed_pfn(fields: &[u8]) -> Parsed<(u32, &[u8])> {
    let (pfn, rest) = pfn(fields)?;
    Ok((pfn.ok_or("the pfn of a page")?, rest))
}

#[inline]
fn order(fields: &[u8]) -> Parsed<(u8, &[u8])> {
    let value = find_key(fields, b"order=").ok_or("a field order=")?;
    match scan::number(value) {
        Some((order @ 0..=31, rest)) => Ok((order as u8, rest)),
        _ => Err("an order from 0 to 31"),
    }
}

#[inline]
fn migratetype(fields: &[u8]) -> Parsed<(u8, &[u8])> {
    let value = find_key(fields, b"migratetype=").ok_or("a field migratetype=")?;
    match scan::number(value) {
        Some((kind @ 0..=255, rest)) => Ok((kind as u8, rest)),
        _ => Err("a number in migratetype="),
    }
}

#[inline]
fn ptr(fields: &[u8]) -> Parsed<(u64, &[u8])> {
    let value = find_key(fields, b"ptr=").ok_or("a field ptr=")?;
    scan::pointer(value).ok_or("an address in ptr=")
}

#[inline]
fn bytes<'a>(fields: &'a [u8], key: &'static [u8]) -> Parsed<(u32, &'a [u8])> {
    let value = find_key(fields, key).ok_or("fields bytes_req= and bytes_alloc=")?;
    match scan::number(value) {
        Some((bytes, rest)) if bytes <= u32::MAX.into() => Ok((bytes as u32, rest)),
        _ => Err("a size below 4 GiB"),
    }
}

#[cfg(test)]
#[path = "line_tests.rs"]
mod tests;
