//! How a report is printed: one line that says it all in short, and then all that is known, as KASAN and SLUB do.

use core::fmt;

use super::entry::NO_CPU;
use super::page::{DescState, PageState};
use super::{Corruption, PageHistory, Recorded, Report, Track};
use crate::address::{PAGE_SIZE, Pfn};
use crate::freepage::PageDamage;

/// Bytes in a line of a dump.
const ROW: usize = 16;

impl fmt::Display for Report<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.first_line(f)?;
        if let Some(page) = &self.page {
            write!(f, "\n  page: {page}")?;
        }
        for (name, track) in [("allocated", self.allocated), ("freed", self.freed)] {
            if let Some(track) = track {
                write!(f, "\n  {name} {}", Who(&track))?;
                self.stack(f, &track)?;
            }
        }
        match &self.history {
            Recorded::Off => {}
            Recorded::Nothing => f.write_str("\n  page history: it never changed hands")?,
            Recorded::Dropped => f.write_str("\n  page history dropped")?,
            Recorded::History(history) => {
                for (name, event) in [("allocated", history.allocated), ("freed", history.freed)] {
                    if let Some(event) = event {
                        let (kind, order) = (event.kind.name(), event.order);
                        let (who, head) = (Who(&event.track), history.head);
                        write!(
                            f,
                            "\n  page {name} as {kind} order {order}, {head:?}, {who}"
                        )?;
                        self.stack(f, &event.track)?;
                    }
                }
            }
        }
        for (name, page) in ["before", "after"].iter().zip(&self.neighbours) {
            if let Some(page) = page {
                write!(f, "\n  block {name}: {page}")?;
            }
        }
        for (name, object) in ["before", "after"].iter().zip(&self.objects) {
            if let Some(object) = object {
                let state = if object.free { "free" } else { "in use" };
                write!(f, "\n  object {name}: {:#x}, {state}", object.address)?;
                if let Some(track) = &object.track {
                    let did = if object.free { "freed" } else { "allocated" };
                    write!(f, ", {did} {}", Who(track))?;
                }
            }
        }
        self.bytes(f)
    }
}

impl Report<'_> {
    fn first_line(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "memdesc: {}: ", self.what.text())?;
        if let Some(fault) = &self.kfence {
            write!(f, "{fault}; ")?;
        }
        if let Some(cache) = self.cache {
            write!(f, "object {:#x} of {cache}", self.address)?;
        } else {
            write!(f, "address {:#x}", self.address)?;
        }
        write!(
            f,
            ", {:?}, its word says: {:?}; caller {}",
            self.pfn, self.word, self.caller
        )?;
        if let Some((offset, found, expected)) = self.byte {
            write!(f, "; byte {offset}: {found:#04x}, expected {expected:#04x}")?;
        }
        if let Corruption::PagePoison(PageDamage { last, bytes, .. }) = self.what {
            write!(f, "; {bytes} bytes differ, the last is {last}")?;
        }
        for (name, track) in [("allocated", self.allocated), ("freed", self.freed)] {
            if let Some(track) = track {
                write!(f, "; {name} {}", Who(&track))?;
            }
        }
        Ok(())
    }

    fn stack(&self, f: &mut fmt::Formatter<'_>, track: &Track) -> fmt::Result {
        let Some(lookup) = self.stacks.0 else {
            return Ok(());
        };
        if track.stack == super::StackId::LOST {
            return f.write_str("\n      (its stack is lost: the depot was full)");
        }
        let Some(stack) = lookup.stack(track.stack) else {
            return Ok(());
        };
        for &frame in stack.frames() {
            f.write_str("\n      ")?;
            lookup.symbol(frame, f)?;
        }
        Ok(())
    }

    /// The bytes, with an arrow under the first bad one.
    fn bytes(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Some(dump), Some((bad, ..))) = (&self.dump, self.byte) else {
            return Ok(());
        };
        for (i, row) in dump.bytes[..dump.len].chunks(ROW).enumerate() {
            let from = dump.from + (i * ROW) as isize;
            write!(f, "\n  {:>6}:", from)?;
            for byte in row {
                write!(f, " {byte:02x}")?;
            }
            let column = bad - from;
            if (0..row.len() as isize).contains(&column) {
                let indent = 10 + 3 * column as usize;
                write!(f, "\n{:indent$}^^", "")?;
            }
        }
        Ok(())
    }
}

/// By whom, on which CPU, when.
struct Who<'a>(&'a Track);

/// In one line.
impl fmt::Display for PageHistory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let events = [("freed", self.freed), ("allocated", self.allocated)];
        let mut between = "";
        for (name, event) in events {
            if let Some(event) = event {
                let (kind, order) = (event.kind.name(), event.order);
                let who = Who(&event.track);
                write!(f, "{between}{name} as {kind} order {order} {who}")?;
                between = ", ";
            }
        }
        Ok(())
    }
}

impl fmt::Display for Who<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let track = self.0;
        write!(f, "by {} on cpu ", track.location)?;
        match track.cpu {
            NO_CPU => f.write_str("?")?,
            cpu => write!(f, "{cpu}")?,
        }
        write!(f, " at {}", track.when)
    }
}

impl fmt::Display for PageState<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pages = 1u32 << self.order;
        write!(f, "{}, order {}", self.state, self.order)?;
        if pages > 1 {
            write!(
                f,
                ", {:?} to {:#x}",
                self.head,
                self.head.0.wrapping_add(pages - 1)
            )?;
            if self.pfn != self.head {
                write!(
                    f,
                    ", of which it is page {}",
                    self.pfn.0.wrapping_sub(self.head.0)
                )?;
            }
        } else {
            write!(f, ", {:?}", self.head)?;
        }
        write!(f, ", word {:#018x}{}", self.word.bits(), self.desc)
    }
}

impl fmt::Display for DescState<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let link = |pfn: Pfn| Link(pfn);
        match *self {
            DescState::None => Ok(()),
            DescState::Facts(0) => Ok(()),
            DescState::Facts(facts) => write!(f, ", facts {facts:#x}"),
            DescState::Buddy {
                address,
                next,
                prev,
            } => write!(
                f,
                "; buddy at {address:#x}: next {}, prev {}",
                link(next),
                link(prev)
            ),
            DescState::Kept { address } => write!(f, "; buddy at {address:#x}, kept"),
            DescState::Slab {
                address,
                cache,
                inuse,
                objects,
            } => write!(
                f,
                "; slab at {address:#x}: cache {}, {inuse} of {objects} objects in use",
                cache.unwrap_or("unknown")
            ),
            DescState::Folio {
                address,
                held,
                mapping,
                index,
            } => write!(
                f,
                "; folio at {address:#x}: refs {}, mapped {}, pinned {}, mapping {mapping:#x}, index {index}",
                held.refs, held.maps, held.pins
            ),
            DescState::PtDesc {
                address,
                owner,
                level,
                maps,
            } => write!(
                f,
                "; ptdesc at {address:#x}: level {level}, owner {owner:#x}, maps {maps:#x}"
            ),
            DescState::VmArea { address, pages } => write!(
                f,
                "; vmap_area at {address:#x}: {pages} pages, {} KiB",
                pages * (PAGE_SIZE >> 10)
            ),
            DescState::Yours { address } => {
                write!(f, "; descriptor of the kernel's own at {address:#x}")
            }
            DescState::Astray { physical } => {
                write!(f, "; leads to {physical:#x}, where there is no descriptor")
            }
        }
    }
}

struct Link(Pfn);

impl fmt::Display for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Pfn::NONE => f.write_str("none"),
            Pfn(pfn) => write!(f, "{pfn:#x}"),
        }
    }
}
