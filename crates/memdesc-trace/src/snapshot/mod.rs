//! The state of memory at one moment, from the files of `/proc`.

pub mod buddyinfo;
mod classify;
pub mod counters;
pub mod evidence;
pub mod iomem;
pub mod kpageflags;
pub mod layout;
mod text;
pub mod zoneinfo;

use std::path::{Path, PathBuf};

use crate::error::TraceError;
use crate::reader::Source;

use buddyinfo::{BuddyInfo, ORDERS, PageTypeInfo, ZoneFree};
use counters::{MemInfo, SlabInfo, VmStat};
use evidence::Evidence;
use iomem::IoMem;
use layout::{Layout, PageBlocks};
use zoneinfo::ZoneInfo;

/// What `/proc` said. The files are read one after another, so they are not quite of one moment.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Snapshot {
    /// `/proc/buddyinfo`.
    pub buddyinfo: Option<BuddyInfo>,
    /// `/proc/pagetypeinfo`.
    pub pagetypeinfo: Option<PageTypeInfo>,
    /// `/proc/zoneinfo`.
    pub zoneinfo: Option<ZoneInfo>,
    /// `/proc/slabinfo`.
    pub slabinfo: Option<SlabInfo>,
    /// `/proc/meminfo`.
    pub meminfo: Option<MemInfo>,
    /// `/proc/vmstat`.
    pub vmstat: Option<VmStat>,
    /// `/proc/iomem`.
    pub iomem: Option<IoMem>,
    /// `/proc/kpageflags`: [`kpageflags`]'s flags for each page.
    pub kpageflags: Option<Vec<u64>>,
    /// `/proc/kpagecount`: how often each page is mapped.
    pub kpagecount: Option<Vec<u64>>,
}

/// Reads one file if it is there, compressed or not.
fn read(folder: &Path, name: &str) -> Result<Option<(Vec<u8>, PathBuf)>, TraceError> {
    for ending in ["", ".zst", ".gz"] {
        let path = folder.join(format!("{name}{ending}"));
        match Source::open(&path) {
            Ok(source) => return Ok(Some((source.read_whole()?, path))),
            Err(TraceError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
            }
            Err(e) => return Err(e),
        }
    }
    Ok(None)
}

/// The same from memory.
fn read_embedded(
    files: &[(&str, &'static [u8])],
    name: &str,
) -> Result<Option<(Vec<u8>, PathBuf)>, TraceError> {
    for ending in ["", ".zst", ".gz"] {
        let wanted = format!("{name}{ending}");
        if let Some((_, data)) = files.iter().find(|(n, _)| *n == wanted) {
            let path = PathBuf::from(wanted);
            let source = Source::new(std::io::Cursor::new(*data), &path, None)?;
            return Ok(Some((source.read_whole()?, path)));
        }
    }
    Ok(None)
}

type File = Result<Option<(Vec<u8>, PathBuf)>, TraceError>;

impl Snapshot {
    /// Reads the files `buddyinfo`, `zoneinfo`, … of a folder, each with `suffix` behind its name
    /// (`.before`) and possibly `.zst` or `.gz` behind that. `Snapshot::load("/proc".as_ref(), "")`
    /// reads the running kernel, as root.
    ///
    /// A file that is missing is `None`; one that cannot be read or understood is an error.
    pub fn load(folder: &Path, suffix: &str) -> Result<Snapshot, TraceError> {
        Snapshot::gather(|name| read(folder, &format!("{name}{suffix}")))
    }

    /// The same from files that are in memory, by their names (`buddyinfo.before`, `kpageflags.before.zst`, …).
    pub fn from_files(
        files: &[(&str, &'static [u8])],
        suffix: &str,
    ) -> Result<Snapshot, TraceError> {
        Snapshot::gather(|name| read_embedded(files, &format!("{name}{suffix}")))
    }

    fn gather(file: impl Fn(&str) -> File) -> Result<Snapshot, TraceError> {
        fn text<T>(
            file: File,
            parse: fn(&str, &Path) -> Result<T, TraceError>,
        ) -> Result<Option<T>, TraceError> {
            let Some((bytes, path)) = file? else {
                return Ok(None);
            };
            parse(&String::from_utf8_lossy(&bytes), &path).map(Some)
        }
        let words = |name| match file(name)? {
            Some((bytes, path)) => kpageflags::words(&bytes, &path).map(Some),
            None => Ok(None),
        };
        Ok(Snapshot {
            buddyinfo: text(file("buddyinfo"), BuddyInfo::parse)?,
            pagetypeinfo: text(file("pagetypeinfo"), PageTypeInfo::parse)?,
            zoneinfo: text(file("zoneinfo"), ZoneInfo::parse)?,
            slabinfo: text(file("slabinfo"), SlabInfo::parse)?,
            meminfo: text(file("meminfo"), MemInfo::parse)?,
            vmstat: text(file("vmstat"), VmStat::parse)?,
            iomem: text(file("iomem"), IoMem::parse)?,
            kpageflags: words("kpageflags")?,
            kpagecount: words("kpagecount")?,
        })
    }

    /// `None` if not a single file was there.
    pub fn non_empty(self) -> Option<Snapshot> {
        (self != Snapshot::default()).then_some(self)
    }

    /// Free blocks by order, all zones together (`buddyinfo`).
    pub fn free_by_order(&self) -> Option<[u64; ORDERS]> {
        self.buddyinfo.as_ref().map(BuddyInfo::by_order)
    }

    /// Free blocks by order for each zone (`buddyinfo`).
    pub fn free_by_order_of_zones(&self) -> Option<&[ZoneFree]> {
        self.buddyinfo.as_ref().map(|info| &*info.zones)
    }

    /// All of memory as blocks. `None` without `kpageflags`; the other files make it better, and so
    /// does a recording that begins or ends here. Pages
    /// without any flag are told apart by what else is known: [`Layout::zones`] says how well.
    pub fn layout(&self, evidence: Option<&Evidence>) -> Option<Layout> {
        classify::build(self, evidence)
    }

    /// How many pageblocks of 2 MiB are free from end to end, and how many are *pinned*: they hold
    /// free memory and an allocated page, and so cannot be handed out whole.
    pub fn pinned_pageblocks(&self) -> Option<PageBlocks> {
        self.layout(None).map(|layout| layout.pageblocks())
    }
}

#[cfg(test)]
#[path = "snapshot_tests.rs"]
mod tests;
