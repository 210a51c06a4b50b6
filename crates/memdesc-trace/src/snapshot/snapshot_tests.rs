//! Small files of each kind, good and broken.

use super::*;

const BUDDY: &str = "\
Node 0, zone      DMA      0      0      0      0      0      0      0      0      1      1      3 
Node 0, zone   Normal   2798    148    734    734    438    238     96     35     12      1     15 
";

const ZONES: &str = "\
Node 0, zone      DMA
  per-node stats
      nr_inactive_anon 78926
  pages free     3840
        boost    0
        min      44
        low      55
        high     66
        promo    77
        spanned  4095
        present  3998
        managed  3840
        cma      0
        protection: (0, 3019, 5707, 5707, 5707)
      nr_free_pages 3840
  pagesets
    cpu: 0
              count:    7
              high:     9
              batch:    1
              high_min: 27
  vm stats threshold: 4
    cpu: 1
              count:    2
              high:     0
              batch:    63
  node_unreclaimable:  0
  start_pfn:           1
Node 0, zone  Movable
  pages free     0
        protection: (0, 0)
";

const TYPES: &str = "\
Page block order: 9
Pages per block:  512

Free pages count per migrate type at order       0      1      2      3      4      5      6      7      8      9     10 
Node    0, zone      DMA, type    Unmovable      0      0      0      0      0      0      0      0      1      0      0 
Node    0, zone      DMA, type      Movable >100000      0      0      0      0      0      0      0      0      1      3 

Number of blocks type     Unmovable      Movable 
Node 0, zone      DMA            1            7 
";

const SLAB: &str = "\
slabinfo - version: 2.1
# name            <active_objs> <num_objs> <objsize> <objperslab> <pagesperslab> : tunables <limit> <batchcount> <sharedfactor> : slabdata <active_slabs> <num_slabs> <sharedavail>
bio-312               12     24    320   12    1 : tunables    0    0    0 : slabdata      1      2      0
";

const IOMEM: &str = "\
00000000-00000fff : Reserved
00001000-0009fbff : System RAM
00100000-bfffffff : System RAM
  01000000-02209987 : Kernel code
100000000-63fffffff : System RAM
";

fn path() -> &'static Path {
    Path::new("x.before")
}

#[test]
fn buddyinfo() {
    let info = BuddyInfo::parse(BUDDY, path()).unwrap();
    assert_eq!(info.zones[0].pages(), 3840);
    assert_eq!(
        (info.zones[1].zone.as_str(), info.zones[1].blocks[10]),
        ("Normal", 15)
    );
    assert_eq!(info.by_order()[8], 13);
    let e = BuddyInfo::parse("Node 0, zone DMA 1 x", path())
        .unwrap_err()
        .to_string();
    assert!(
        e.starts_with("x.before:1: expected the number of free blocks"),
        "{e}"
    );
    assert!(BuddyInfo::parse("", path()).is_err());
    assert!(BuddyInfo::parse("Node 0, zone DMA", path()).is_err());
}

#[test]
fn pagetypeinfo() {
    let info = PageTypeInfo::parse(TYPES, path()).unwrap();
    assert_eq!(info.pageblock_order, 9);
    assert_eq!(info.free[1].migratetype, "Movable");
    assert_eq!(info.free[1].blocks[0], 100_000);
    assert_eq!(
        info.pageblocks[0].blocks,
        [("Unmovable".into(), 1), ("Movable".into(), 7)]
    );
    assert!(PageTypeInfo::parse("Node 0, zone DMA\n", path()).is_err());
}

#[test]
fn zoneinfo() {
    let info = ZoneInfo::parse(ZONES, path()).unwrap();
    let zone = &info.zones[0];
    assert_eq!(
        (zone.free, zone.min, zone.low, zone.high),
        (3840, 44, 55, 66)
    );
    assert_eq!(
        (zone.spanned, zone.present, zone.managed),
        (4095, 3998, 3840)
    );
    assert_eq!(
        (zone.start_pfn, zone.end_pfn(), zone.pcp_pages()),
        (1, 4096, 9)
    );
    assert_eq!(zone.protection, [0, 3019, 5707, 5707, 5707]);
    assert_eq!((zone.pcp[0].high, zone.pcp[1].batch), (9, 63));
    assert_eq!(info.zones[1].name, "Movable");
    let e = ZoneInfo::parse("Node 0, zone DMA\n  min x\n", path())
        .unwrap_err()
        .to_string();
    assert!(
        e.starts_with("x.before:2: expected a number of pages"),
        "{e}"
    );
}

#[test]
fn counters() {
    let mem = MemInfo::parse("MemFree:  12 kB\nHugePages_Total:  3\n", path()).unwrap();
    assert_eq!(
        (mem.get("MemFree"), mem.get("HugePages_Total")),
        (Some(12 << 10), Some(3))
    );
    assert!(MemInfo::parse("MemFree 12", path()).is_err());
    let vm = VmStat::parse("nr_free_pages 12\nx -1\ny 18446744073709551615\n", path()).unwrap();
    assert_eq!(
        (vm.get("nr_free_pages"), vm.get("x"), vm.get("y")),
        (Some(12), Some(-1), Some(-1))
    );
    assert!(VmStat::parse("nr_free_pages\n", path()).is_err());
    let slab = SlabInfo::parse(SLAB, path()).unwrap();
    let cache = slab.get("bio-312").unwrap();
    assert_eq!(
        (cache.active_objects, cache.objects, cache.object_size),
        (12, 24, 320)
    );
    assert_eq!(
        (cache.objects_per_slab, cache.slabs, cache.pages()),
        (12, 2, 2)
    );
    assert!(SlabInfo::parse("bio-312 12 12", path()).is_err());
}

#[test]
fn iomem() {
    let info = IoMem::parse(IOMEM, path()).unwrap();
    let ram: Vec<_> = info.system_ram().collect();
    assert_eq!(
        ram,
        [
            0x1000..=0x9fbff,
            0x10_0000..=0xbfff_ffff,
            0x1_0000_0000..=0x6_3fff_ffff
        ]
    );
    assert_eq!(info.ram_pfns().next(), Some(1..0x9f));
    assert_eq!(
        (info.ranges[3].depth, info.ranges[3].name.as_str()),
        (1, "Kernel code")
    );
    assert!(IoMem::parse("12-zz : System RAM", path()).is_err());
    assert!(IoMem::parse("20-10 : System RAM", path()).is_err());
    let hidden = "00000000-00000000 : Reserved\n00000000-00000000 : System RAM\n";
    assert!(
        IoMem::parse(hidden, path())
            .unwrap_err()
            .to_string()
            .contains("as root")
    );
}

#[test]
fn a_folder() {
    let dir = std::env::temp_dir().join(format!("memdesc-trace-snapshot-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    assert_eq!(Snapshot::load(&dir, ".before").unwrap().non_empty(), None);
    std::fs::write(dir.join("buddyinfo.before"), BUDDY).unwrap();
    let words: Vec<u8> = [0u64, 1 << 10]
        .iter()
        .flat_map(|w| w.to_le_bytes())
        .collect();
    std::fs::write(
        dir.join("kpageflags.before.zst"),
        zstd::encode_all(&*words, 0).unwrap(),
    )
    .unwrap();
    let snapshot = Snapshot::load(&dir, ".before").unwrap();
    assert_eq!(snapshot.kpageflags.as_deref(), Some(&[0, 1 << 10][..]));
    assert_eq!(snapshot.free_by_order().unwrap()[10], 18);
    assert_eq!(snapshot.zoneinfo, None);
    std::fs::write(dir.join("meminfo.before"), "nonsense").unwrap();
    let e = Snapshot::load(&dir, ".before").unwrap_err().to_string();
    assert!(e.contains("meminfo.before:1: expected"), "{e}");
    std::fs::remove_dir_all(&dir).unwrap();
}

proptest::proptest! {
    /// Whatever a file holds: an error or a result, and a layout from it, no panic.
    #[test]
    fn damaged_files(
        edits in proptest::collection::vec((0..6usize, 0..3000usize, 0..40u8), 0..12),
        pages in proptest::collection::vec(0..64u8, 1..3000),
    ) {
        let mut files = [BUDDY, ZONES, TYPES, SLAB, IOMEM, "MemTotal: 12 kB\n"].map(String::from);
        for (file, at, what) in edits {
            let (file, bytes) = (&mut files[file], b"0123456789 -:,()>NoZz\n\t99999999999999999999");
            let at = at % file.len();
            let new = char::from(bytes[usize::from(what) % bytes.len()]);
            file.replace_range(at..at + 1, new.encode_utf8(&mut [0; 4]));
        }
        let [buddy, zones, types, slab, iomem, mem] = files;
        let _ = (PageTypeInfo::parse(&types, path()), SlabInfo::parse(&slab, path()));
        let _ = VmStat::parse(&mem, path());
        let snapshot = Snapshot {
            buddyinfo: BuddyInfo::parse(&buddy, path()).ok(),
            zoneinfo: ZoneInfo::parse(&zones, path()).ok(),
            iomem: IoMem::parse(&iomem, path()).ok(),
            meminfo: MemInfo::parse(&mem, path()).ok(),
            kpageflags: Some(pages.iter().map(|&bit| 1u64 << bit & !(1 << 63)).collect()),
            ..Snapshot::default()
        };
        let layout = snapshot.layout(None).unwrap();
        let covered: usize = layout.blocks.iter().map(|b| b.pages as usize).sum();
        proptest::prop_assert_eq!(covered, pages.len());
        layout.pageblocks();
    }
}
