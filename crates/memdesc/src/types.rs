//! The types of memory, one by one: what a page of each is, what describes it, how it is had and given back. An example for each, which
//! runs as a test.
//!
//! All examples have a machine of 64 MiB in this process, `mm`:
//!
//! ```
//! use memdesc::{Config, Mm};
//! use memdesc_host::Host;
//!
//! let (host, ram) = Host::small(16384)?;
//! let mm = Mm::new(host, &Config::default(), &ram)?;
//! assert_eq!(mm.ledger().given, 16384);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Free
//!
//! A `struct buddy` of 8 bytes for each free block; none for what was never handed out. Free memory is never touched.
//!
//! ```
//! # use memdesc::{*, gfp::*};
//! # let (host, ram) = memdesc_host::Host::small(16384)?;
//! # let mm = Mm::new(host, &Config::default(), &ram)?;
//! assert!(matches!(mm.lookup(Pfn(4096)).2, Memory::Untouched));
//! let page = mm.alloc_pages(GFP_KERNEL, 0)?;
//! // SAFETY: ours.
//! unsafe { mm.free_pages(page) };
//! assert!(matches!(mm.lookup(page).2, Memory::Free { in_pcp: true }));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Bare pages
//!
//! What drivers and the kernel itself ask for (`alloc_pages`). They keep their `struct buddy`. Users cannot map them.
//!
//! ```
//! # use memdesc::{*, gfp::*};
//! # let (host, ram) = memdesc_host::Host::small(16384)?;
//! # let mm = Mm::new(host, &Config::default(), &ram)?;
//! let pages = mm.alloc_pages(GFP_KERNEL | __GFP_ZERO, 3)?;
//! // Every page leads to the same block.
//! assert!(matches!(mm.lookup(pages.add(7)), (head, 3, Memory::Bare) if head == pages));
//! // SAFETY: ours, 32 KiB of them, mapped at `page_address`.
//! unsafe {
//!     assert_eq!(mm.page_address(pages).add(7 * 4096).read(), 0);
//!     mm.free_pages(pages);
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Slab
//!
//! Objects of one size, 48 bytes for each [`Slab`](crate::Slab).
//!
//! ```
//! # use memdesc::{*, gfp::*};
//! # let (host, ram) = memdesc_host::Host::small(16384)?;
//! # let mm = Mm::new(host, &Config::default(), &ram)?;
//! let cache = mm.kmem_cache_create("inode", 600, 8, CacheFlags::EMPTY, None)?;
//! let object = mm.kmem_cache_alloc(&cache, GFP_KERNEL | __GFP_ZERO)?;
//! let page = mm.virt_to_pfn(object.as_ptr());
//! assert!(matches!(mm.lookup(page).2, Memory::Slab(_)));
//! // SAFETY: from this cache, not used any more.
//! unsafe { mm.kmem_cache_free(&cache, object) };
//! mm.kmem_cache_destroy(cache).expect("all objects are back");
//! // The same for values of a type, which drop by themselves:
//! let cache = KmemCache::new(&mm, "point", CacheFlags::EMPTY)?;
//! let point = cache.alloc(GFP_KERNEL, (1, 2)).map_err(|(why, _)| why)?;
//! assert_eq!(*point, (1, 2));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # kmalloc
//!
//! Small ones are objects of a slab; from 8 KiB on the word says all there is to say.
//!
//! ```
//! # use memdesc::{*, gfp::*};
//! # let (host, ram) = memdesc_host::Host::small(16384)?;
//! # let mm = Mm::new(host, &Config::default(), &ram)?;
//! let small = mm.kmalloc(100, GFP_KERNEL)?;
//! let large = mm.kmalloc(100_000, GFP_KERNEL)?;
//! assert!(matches!(mm.lookup(mm.virt_to_pfn(large.as_ptr())), (_, 5, Memory::LargeKmalloc)));
//! // SAFETY: ours. One call for both.
//! unsafe {
//!     mm.kfree(small);
//!     mm.kfree(large);
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Page tables
//!
//! A [`PtDesc`](crate::PtDesc) of 32 bytes, with the lock of the entries. Given back after a grace period by [`pgtable::PageTables`](crate::pgtable::PageTables).
//!
//! ```
//! # use memdesc::{*, gfp::*};
//! # let (host, ram) = memdesc_host::Host::small(16384)?;
//! # let mm = Mm::new(host, &Config::default(), &ram)?;
//! let table = mm.alloc_page_table(GFP_KERNEL | __GFP_ZERO, 0)?;
//! let (_, _, Memory::PageTable(desc)) = mm.lookup(table) else { unreachable!() };
//! // SAFETY: the table is ours as long as the reference lives.
//! let desc = unsafe { desc.as_ref() };
//! desc.set_owner(7, 1, 0x20_0000);
//! assert_eq!((desc.owner(), desc.level(), desc.address()), (7, 1, 0x20_0000));
//! // SAFETY: ours, and nobody walks it.
//! unsafe { mm.free_pages(table) };
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # File cache
//!
//! A [`Folio`](crate::Folio) of 32 bytes, whatever its size; users may map it. In a kernel they come from a [`filemap::Mapping`](crate::filemap::Mapping).
//!
//! ```
//! # use memdesc::{*, gfp::*};
//! # let (host, ram) = memdesc_host::Host::small(16384)?;
//! # let mm = Mm::new(host, &Config::default(), &ram)?;
//! let pages = mm.alloc_folio(GFP_HIGHUSER_MOVABLE, 4, FolioKind::File)?;
//! // From any of its pages, by anybody, without a lock:
//! let folio = mm.folio_get(pages.add(9)).expect("it is a folio's");
//! assert_eq!((folio.head(), folio.order(), folio.refcount()), (pages, 4, 2));
//! folio.set_owner(42); // charged to
//! mm.folio_add_lru(&folio, pages);
//! mm.folio_mark_accessed(&folio, pages);
//! assert!(folio.has_flag(FolioFlags::REFERENCED));
//! // SAFETY: our own reference; the other one keeps it.
//! unsafe { mm.free_pages(pages) };
//! assert!(matches!(mm.lookup(pages).2, Memory::File(_)));
//! drop(folio);
//! assert!(matches!(mm.lookup(pages).2, Memory::Free { .. }));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Anonymous memory
//!
//! The same [`Folio`](crate::Folio), of another cache. In a kernel it comes with the first touch of an [`mmap::MmStruct`](crate::mmap::MmStruct).
//!
//! ```
//! # use memdesc::{*, gfp::*};
//! # let (host, ram) = memdesc_host::Host::small(16384)?;
//! # let mm = Mm::new(host, &Config::default(), &ram)?;
//! use memdesc::mmap::{Map, MmStruct, VmFlags};
//!
//! let space = MmStruct::new(&mm, 1)?;
//! let at = space.mmap(None, 1 << 20, VmFlags::READ_WRITE, Map::Anon)?;
//! space.write(at, &[1])?;
//! let (folio, page) = space.page_at(at).expect("just touched");
//! assert_eq!((folio.mapcount(), mm.page_mapcount(page)), (1, 1));
//! // It can be moved: other pages, the same descriptor.
//! drop(folio);
//! let to = mm.alloc_pages(GFP_HIGHUSER_MOVABLE, 0)?;
//! // SAFETY: bare pages of ours.
//! let old = unsafe { mm.migrate_folio(page, to)? };
//! assert_eq!(space.page_at(at).unwrap().1, to);
//! // SAFETY: bare pages now, ours.
//! unsafe { mm.free_pages(old) };
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # vmalloc and kernel stacks
//!
//! One [`VmArea`](crate::VmArea) for all of an area; each of its pages leads there. Guard pages are real.
//!
//! ```
//! # use memdesc::{*, gfp::*};
//! # let (host, ram) = memdesc_host::Host::small(16384)?;
//! # let mm = Mm::new(host, &Config::default(), &ram)?;
//! let area = mm.vmalloc(100_000, GFP_KERNEL)?;
//! let page = mm.vmalloc_to_pfn(area.as_ptr()).expect("mapped");
//! assert!(matches!(mm.lookup(page).2, Memory::Vmalloc(_)));
//! // SAFETY: ours.
//! unsafe { mm.vfree(area) };
//! let stack = mm.alloc_kernel_stack(4, 17)?; // of task 17
//! // SAFETY: nobody runs on it.
//! unsafe { mm.free_kernel_stack(stack) };
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Compressed memory
//!
//! Objects of odd sizes across the borders of pages ([`zsmalloc`](crate::zsmalloc)): a [`ZsDesc`](crate::ZsDesc) of 16 bytes for up to 8 pages, of which the others
//! keep their `struct buddy`. Handles stay when compaction moves the objects.
//!
//! ```
//! # use memdesc::{*, gfp::*};
//! # let (host, ram) = memdesc_host::Host::small(16384)?;
//! # let mm = Mm::new(host, &Config::default(), &ram)?;
//! let pool = mm.zs_create_pool("zram0")?;
//! let handle = mm.zs_malloc(&pool, 1300, GFP_KERNEL)?;
//! mm.zs_obj_write(&pool, handle, &[7; 1300])?;
//! let mut copy = [0; 1300]; // used where the object crosses two pages
//! let view = mm.zs_obj_read_begin(&pool, handle, &mut copy)?;
//! assert_eq!(*view, [7; 1300]);
//! mm.zs_obj_read_end(view);
//! mm.zs_free(&pool, handle);
//! mm.zs_destroy_pool(pool).expect("all objects are free");
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Reserved, offline
//!
//! No descriptor: the word says it all. What it can say is [`Reserved`](crate::Reserved), [`Offline`](crate::Offline) and [`Poisoned`](crate::Poisoned). Users can map
//! none of it, and who frees it is reported with its name.
//!
//! ```
//! # use memdesc::{*, gfp::*};
//! # let (host, ram) = memdesc_host::Host::small(16384)?;
//! # let mm = Mm::new(host, &Config::default(), &ram)?;
//! assert!(matches!(mm.lookup(Pfn(16383)).2, Memory::Reserved(Reserved::MemMap)));
//! mm.offline_pages(Pfn(8192), 1024)?;
//! assert!(matches!(mm.lookup(Pfn(9000)).2, Memory::Offline));
//! mm.online_pages(Pfn(8192), 1024)?;
//! mm.reserve_pages(Pfn(256), 512, Reserved::KernelText)?;
//! assert_eq!(mm.lookup(Pfn(300)).2.name(), "kernel_text");
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Balloon
//!
//! Memory given to the hypervisor: the words of the blocks are the balloon's list. See [`Balloon`](crate::Balloon).
//!
//! ```
//! # use memdesc::{*, gfp::*};
//! # let (host, ram) = memdesc_host::Host::small(16384)?;
//! # let mm = Mm::new(host, &Config::default(), &ram)?;
//! let balloon = Balloon::new(&mm);
//! assert_eq!(balloon.inflate(1024, GFP_HIGHUSER), 1024);
//! assert_eq!(mm.ledger().by_type[PageType::Offline as usize], 1024);
//! assert_eq!(balloon.deflate(100), 100);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Guards
//!
//! Nobody may touch them. Their `struct buddy` waits in the word.
//!
//! ```
//! # use memdesc::{*, gfp::*};
//! # let (host, ram) = memdesc_host::Host::small(16384)?;
//! # let mm = Mm::new(host, &Config::default(), &ram)?;
//! let guard = mm.alloc_guard(GFP_KERNEL, 0)?;
//! assert!(matches!(mm.lookup(guard).2, Memory::Guard));
//! // SAFETY: ours.
//! unsafe {
//!     mm.unguard_pages(guard);
//!     mm.free_pages(guard);
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Bad memory
//!
//! What failed goes out of use, at once or when it comes back ([`Mm::memory_failure`](crate::Mm::memory_failure)).
//!
//! ```
//! # use memdesc::{*, gfp::*};
//! # let (host, ram) = memdesc_host::Host::small(16384)?;
//! # let mm = Mm::new(host, &Config::default(), &ram)?;
//! let failure = mm.memory_failure(Pfn(777));
//! assert_eq!(failure.result, MfResult::Recovered);
//! assert_eq!(failure.to_string(), "pfn 0x309: recovery action for page never handed out: recovered");
//! assert!(matches!(mm.lookup(Pfn(777)).2, Memory::HwPoison));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Driver pages, network pools, devices
//!
//! Counted as folios are, so users map them and whoever has them last lets them go: to the page allocator, to the pool, to the device.
//!
//! ```
//! # use memdesc::{*, gfp::*, mmap::*};
//! # let ram = [memdesc_host::ram(0, 16384)];
//! # let host = memdesc_host::Host::builder().memory(&ram).device(memdesc_host::ram(32768, 512)).build()?;
//! # let mm = Mm::new(host, &Config::default(), &ram)?;
//! let driver = mm.alloc_folio(GFP_KERNEL, 2, FolioKind::Driver)?;
//! let mut pool = mm.page_pool_create(PagePoolParams { pool_size: 64, ..Default::default() })?;
//! let packet = pool.alloc(GFP_ATOMIC)?;
//! let mut device = mm.memremap_pages(Pfn(32768), 512)?; // no RAM: only described
//! device.folio(Pfn(32768), 9, GFP_KERNEL)?;
//! assert!(matches!(mm.lookup(Pfn(32999)).2, Memory::Device(Some(_))));
//!
//! let space = MmStruct::new(&mm, 1)?;
//! let at = space.mmap(None, 1 << 20, VmFlags::READ_WRITE, Map::Anon)?;
//! for (page, nth) in [driver.add(3), packet, Pfn(32999)].into_iter().zip(0..) {
//!     space.insert_page(at + nth * 4096, page)?;
//!     space.write(at + nth * 4096, b"shared")?;
//! }
//! // SAFETY: all ours to give up.
//! unsafe {
//!     mm.free_pages(driver);
//!     mm.page_pool_put_page(packet);
//!     device.put(Pfn(32768));
//! }
//! assert_eq!((pool.inflight(), device.in_use()), (1, 512), "users have them");
//! drop(space);
//! assert_eq!((pool.inflight(), device.in_use()), (0, 0));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Yours
//!
//! A kernel adds a type of its own by saying what it wants to know of such pages: [`OwnType`](crate::OwnType).
//!
//! ```
//! # use memdesc::{*, gfp::*};
//! # let (host, ram) = memdesc_host::Host::small(16384)?;
//! # let mm = Mm::new(host, &Config::default(), &ram)?;
//! struct Firmware(u32);
//! impl OwnType for Firmware {
//!     const NUMBER: u8 = 0;
//!     const NAME: &'static str = "firmware";
//! }
//! let blobs = mm.register_type::<Firmware>()?;
//! let pages = blobs.alloc(GFP_KERNEL, 2, Firmware(7)).map_err(|(why, _)| why)?;
//! assert_eq!(mm.type_name(pages.add(3)), "firmware");
//! // SAFETY: our pages, which stay.
//! assert_eq!(unsafe { blobs.of(pages.add(3)) }.map(|f| f.0), Some(7));
//! // SAFETY: ours. The descriptor serves as the free block's, and goes back to its cache one day.
//! unsafe { mm.free_pages(pages) };
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
