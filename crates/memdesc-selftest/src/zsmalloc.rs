//! Compressed memory: what is stored is there, whatever is moved.

use alloc::collections::BTreeMap;
use alloc::string::ToString;
use alloc::vec;
use alloc::vec::Vec;

use memdesc::gfp::{__GFP_FAST_TRY, GFP_KERNEL};
use memdesc::zsmalloc::{SIZE_CLASSES, ZsError, ZsHandle, ZsPool};
use memdesc::*;

use crate::{Lab, Rng, all_pages, ledger, teardown};

/// Bytes that only this object has.
pub fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut rng = Rng(seed);
    let mut bytes: Vec<u8> = (0..len.div_ceil(8))
        .flat_map(|_| rng.next().to_le_bytes())
        .collect();
    bytes.truncate(len);
    bytes
}

/// A pool and what should be in it.
pub struct Model<'m, P: Platform> {
    /// See the type.
    pub mm: &'m Mm<P>,
    /// See the type.
    pub pool: &'m ZsPool<'m>,
    /// See the type.
    pub objects: BTreeMap<ZsHandle, Vec<u8>>,
    /// See the type.
    pub order: Vec<ZsHandle>,
    next: u64,
}

impl<'m, P: Platform> Model<'m, P> {
    /// An empty one.
    pub fn new(mm: &'m Mm<P>, pool: &'m ZsPool<'m>, seed: u64) -> Model<'m, P> {
        Model {
            mm,
            pool,
            objects: BTreeMap::new(),
            order: Vec::new(),
            next: seed << 32,
        }
    }

    /// Stores an object of this size.
    pub fn store(&mut self, size: usize, gfp: Flags) -> Result<(), AllocError> {
        let handle = self.mm.zs_malloc(self.pool, size, gfp)?;
        self.next += 1;
        let data = pattern(self.next, size);
        self.mm.zs_obj_write(self.pool, handle, &data).unwrap();
        assert!(self.objects.insert(handle, data).is_none(), "{handle:?}");
        self.order.push(handle);
        Ok(())
    }

    /// It reads as it was written.
    pub fn check_one(&self, handle: ZsHandle) {
        let data = &self.objects[&handle];
        let mut copy = vec![0; data.len()];
        let view = self
            .mm
            .zs_obj_read_begin(self.pool, handle, &mut copy)
            .unwrap();
        assert!(*view == **data, "{handle:?}, {} bytes", data.len());
        self.mm.zs_obj_read_end(view);
    }

    /// All of them do.
    pub fn check(&self) {
        self.order.iter().for_each(|&handle| self.check_one(handle));
    }

    /// Writes another content.
    pub fn rewrite(&mut self, which: usize) {
        let Some(&handle) = self.order.get(which % self.order.len().max(1)) else {
            return;
        };
        self.next += 1;
        let data = self.objects.get_mut(&handle).unwrap();
        *data = pattern(self.next, data.len());
        self.mm.zs_obj_write(self.pool, handle, data).unwrap();
    }

    /// Frees one.
    pub fn free(&mut self, which: usize) {
        if self.order.is_empty() {
            return;
        }
        let handle = self.order.swap_remove(which % self.order.len());
        self.objects.remove(&handle);
        self.mm.zs_free(self.pool, handle);
        assert_eq!(self.read(handle), Err(ZsError::NoSuchObject));
    }

    /// Can it be read?
    pub fn read(&self, handle: ZsHandle) -> Result<(), ZsError> {
        let mut byte = [0];
        let view = self.mm.zs_obj_read_begin(self.pool, handle, &mut byte)?;
        drop(view);
        Ok(())
    }

    /// Frees all.
    pub fn free_all(&mut self) {
        while !self.order.is_empty() {
            self.free(self.order.len() / 2);
        }
    }
}

/// What the pool says of itself agrees with the ledger and the census.
pub fn check_counts<P: Platform>(mm: &Mm<P>, pool: &ZsPool<'_>, objects: usize) {
    let stats = mm.zs_pool_stats(pool);
    assert_eq!(stats.objects, objects as u64, "{stats:?}");
    let pages = stats.pages + stats.handle_pages;
    assert_eq!(mm.pages_of(PageType::Zsmalloc), pages, "{stats:?}");
    assert_eq!(ledger(mm).by_type[PageType::Zsmalloc as usize], pages);
    let census = mm.census();
    assert_eq!(census.of(CensusKind::Zsmalloc).pages, pages);
    assert_eq!(
        stats.handle_pages,
        objects.div_ceil(511).max(stats.handle_pages as usize) as u64
    );
    let (mut zspages, mut inuse) = (0, 0);
    mm.zs_for_each_class(pool, |class, n, used| {
        assert!(
            used > 0 && used <= n * u64::from(class.objects),
            "{class:?}"
        );
        zspages += n;
        inuse += used;
    });
    assert_eq!((zspages, inuse), (stats.zspages, stats.objects));
}

/// After compaction of a pool that nobody reads, no class has free objects for a whole zspage.
pub fn check_compact<P: Platform>(mm: &Mm<P>, pool: &ZsPool<'_>) {
    mm.zs_for_each_class(pool, |class, n, used| {
        let free = n * u64::from(class.objects) - used;
        assert!(
            free < u64::from(class.objects),
            "{class:?}: {n} zspages, {used}"
        );
    });
}

/// Every size comes back.
pub fn every_size_comes_back<L: Lab>(lab: &L) {
    let machine = lab.flat(16384).guarded();
    let mm = machine.boot();
    let pool = mm.zs_create_pool("sizes").unwrap();
    let mut model = Model::new(&mm, &pool, 1);
    for size in (1..=4096).rev() {
        model.store(size, GFP_KERNEL).unwrap();
    }
    model.check();
    check_counts(&mm, &pool, 4096);
    for refused in [0, 4097, usize::MAX] {
        assert_eq!(
            mm.zs_malloc(&pool, refused, GFP_KERNEL),
            Err(AllocError::BadSize)
        );
        assert_eq!(mm.zs_lookup_class_index(&pool, refused), None);
    }
    assert_eq!(
        mm.zs_malloc(&pool, 8, __GFP_FAST_TRY),
        Err(AllocError::Forbidden)
    );
    // What does not fit is said, and nothing is written.
    let handle = model.order[0];
    let index = mm.zs_lookup_class_index(&pool, 4096).unwrap();
    let capacity = SIZE_CLASSES[index].capacity();
    assert_eq!(capacity, 4096);
    let long = vec![0; capacity + 1];
    let too_long = Err(ZsError::TooLong { capacity });
    assert_eq!(mm.zs_obj_write(&pool, handle, &long), too_long);
    let mut copy = long.clone();
    let view = mm.zs_obj_read_begin(&pool, handle, &mut copy);
    assert_eq!(view.map(|_| ()), too_long);
    // A shorter write leaves the rest.
    mm.zs_obj_write(&pool, handle, b"short").unwrap();
    model.objects.get_mut(&handle).unwrap()[..5].copy_from_slice(b"short");
    model.check();
    model.free_all();
    mm.zs_destroy_pool(pool).unwrap();
    teardown(&machine, &mm);
}

/// Every page leads to its zspage.
pub fn every_page_leads_to_its_zspage<L: Lab>(lab: &L) {
    let machine = lab.flat(8192).guarded();
    let mm = machine.boot();
    let pool = mm.zs_create_pool("pages").unwrap();
    let handle = mm.zs_malloc(&pool, 3600, GFP_KERNEL).unwrap();
    let stats = mm.zs_pool_stats(&pool);
    assert_eq!((stats.zspages, stats.pages, stats.handle_pages), (1, 8, 1));
    // The first page and the page of handles: 16 bytes; the others keep 8.
    assert_eq!(stats.descriptor_bytes, 2 * 16 + 7 * 8);
    let mut leads = BTreeMap::new();
    let mut tails = Vec::new();
    for pfn in all_pages(&mm) {
        if let (head, 0, Memory::Zsmalloc(desc)) = mm.lookup(pfn) {
            assert_eq!(head, pfn);
            // SAFETY: the object keeps the zspage.
            let desc = unsafe { desc.as_ref() };
            assert_eq!((desc.pool(), desc.inuse()), (0, 1));
            *leads.entry(desc.class()).or_insert(0) += 1;
            tails.push(pfn);
        }
    }
    let class = mm.zs_lookup_class_index(&pool, 3600).unwrap();
    assert_eq!(leads.remove(&class), Some(8));
    assert_eq!(leads.into_values().collect::<Vec<_>>(), [1]);
    assert_eq!(tails.len(), 9);
    mm.zs_free(&pool, handle);
    mm.zs_destroy_pool(pool).unwrap();
    teardown(&machine, &mm);
}

/// So many readers and no more.
pub fn so_many_readers_and_no_more<L: Lab>(lab: &L) {
    let machine = lab.flat(4096).guarded();
    let mm = machine.boot();
    let pool = mm.zs_create_pool("readers").unwrap();
    let mut model = Model::new(&mm, &pool, 1);
    model.store(100, GFP_KERNEL).unwrap();
    let mut copies = [[0; 100]; 30];
    let mut views = Vec::new();
    for (i, copy) in copies.iter_mut().enumerate() {
        match mm.zs_obj_read_begin(&pool, model.order[0], copy) {
            Ok(view) => views.push(view),
            Err(why) => assert_eq!((why, i), (ZsError::Busy, 29)),
        }
    }
    assert_eq!(views.len(), 29);
    drop(views);
    model.check();
    model.rewrite(0);
    model.check();
    model.free_all();
    mm.zs_destroy_pool(pool).unwrap();
    teardown(&machine, &mm);
}

/// A pool with objects stays.
pub fn a_pool_with_objects_stays<L: Lab>(lab: &L) {
    let machine = lab.flat(4096).guarded();
    let mm = machine.boot();
    let pool = mm
        .zs_create_pool("a name that is longer than what is kept of it")
        .unwrap();
    assert_eq!(pool.name(), "a name that is longer than what ");
    let handles: Vec<_> = (0..37)
        .map(|i| mm.zs_malloc(&pool, 100 * i + 1, GFP_KERNEL).unwrap())
        .collect();
    let left = mm.zs_destroy_pool(pool).unwrap_err();
    assert_eq!(left.objects, 37);
    assert!(left.to_string().ends_with("has 37 objects left"));
    let pool = left.pool;
    handles.iter().for_each(|&handle| mm.zs_free(&pool, handle));
    mm.zs_destroy_pool(pool).unwrap();
    // There is room for 64, and a place that came free is used again.
    let mut pools: Vec<_> = (0..64)
        .map(|_| mm.zs_create_pool("one of many").unwrap())
        .collect();
    assert_eq!(mm.zs_create_pool("too many").unwrap_err(), AllocError::Busy);
    mm.zs_destroy_pool(pools.swap_remove(20)).unwrap();
    pools.push(mm.zs_create_pool("again").unwrap());
    pools
        .into_iter()
        .for_each(|pool| mm.zs_destroy_pool(pool).unwrap());
    teardown(&machine, &mm);
}

/// What is read is not moved.
pub fn what_is_read_is_not_moved<L: Lab>(lab: &L) {
    let machine = lab.flat(8192).guarded();
    let mm = machine.boot();
    let pool = mm.zs_create_pool("views").unwrap();
    let mut model = Model::new(&mm, &pool, 1);
    for _ in 0..3000 {
        model.store(1300, GFP_KERNEL).unwrap();
    }
    let mut rng = Rng(3);
    for _ in 0..2500 {
        model.free(rng.below(model.order.len()));
    }
    // One in five is being read, some in place.
    let mut copies = vec![[0; 1300]; 100];
    let views: Vec<_> = copies
        .iter_mut()
        .enumerate()
        .map(|(i, copy)| {
            mm.zs_obj_read_begin(&pool, model.order[i * 5], copy)
                .unwrap()
        })
        .collect();
    let freed = mm.zs_compact(&pool);
    assert!(freed > 100, "{freed}");
    for (i, view) in views.iter().enumerate() {
        assert!(**view == *model.objects[&model.order[i * 5]]);
    }
    drop(views);
    model.check();
    let then = mm.zs_compact(&pool);
    assert!(then > 0);
    check_compact(&mm, &pool);
    let stats = mm.zs_pool_stats(&pool);
    assert_eq!(stats.pages_compacted, (freed + then) as u64);
    assert_eq!(
        stats.pages,
        500u64.div_ceil(
            SIZE_CLASSES[mm.zs_lookup_class_index(&pool, 1300).unwrap()]
                .objects
                .into()
        ) * u64::from(SIZE_CLASSES[mm.zs_lookup_class_index(&pool, 1300).unwrap()].pages)
    );
    model.check();
    check_counts(&mm, &pool, 500);
    model.free_all();
    mm.zs_destroy_pool(pool).unwrap();
    teardown(&machine, &mm);
}
