//! A share of the objects' frees deferred, as a kernel with more `kfree_rcu` would have them, and what lies about meanwhile.
//!
//! A recording has no readers, and without any a grace period is over at once. So there is one that always reads, and moves on to a
//! new section every few milliseconds of the recording's time: no grace period is shorter than that.

use memdesc::rcu::{Rcu, ReadGuard};
use memdesc::{Cache, Event as Counter};
use memdesc_host::HostRcu;

use crate::handles::{Machine, OwnedObject};

/// Which frees are deferred, and the reader.
pub(crate) struct Deferred<'m> {
    machine: &'m Machine,
    /// Of 65536 frees so many are deferred.
    share: u32,
    /// Goes round; a free is deferred when it steps over its end.
    wheel: u32,
    grace_ns: u64,
    /// When the reader moves on.
    pub(super) next: u64,
    reader: Option<ReadGuard<'m, HostRcu>>,
    backlog: Backlog,
}

/// How much lay about.
#[derive(Clone, Debug, Default)]
pub(crate) struct Backlog {
    /// Objects whose free was deferred.
    pub(crate) deferred: u64,
    pub(crate) grace_ms: f64,
    pub(crate) grace_periods: u64,
    /// Objects that went by their heads.
    pub(crate) by_heads: u64,
    /// Objects that were not free after the barrier.
    pub(crate) left: u64,
    /// Each time the reader moved on: how many objects waited.
    samples: Vec<u64>,
}

impl Backlog {
    pub(crate) fn peak(&self) -> u64 {
        self.samples.iter().copied().max().unwrap_or(0)
    }

    pub(crate) fn mean(&self) -> u64 {
        self.samples.iter().sum::<u64>() / self.samples.len().max(1) as u64
    }

    /// The most of each of so many equal stretches of time.
    pub(crate) fn columns(&self, columns: usize) -> Vec<u64> {
        let each = self.samples.len().div_ceil(columns).max(1);
        let most = |stretch: &[u64]| stretch.iter().copied().max().unwrap_or(0);
        self.samples.chunks(each).map(most).collect()
    }
}

impl<'m> Deferred<'m> {
    pub(crate) fn new(machine: &'m Machine, percent: f64, grace_ms: f64) -> Deferred<'m> {
        Deferred {
            machine,
            share: (percent * 655.36).round() as u32,
            wheel: 0,
            grace_ns: (grace_ms * 1e6) as u64,
            next: 0,
            reader: Some(machine.mm.rcu_read_lock()),
            backlog: Backlog {
                grace_ms,
                ..Backlog::default()
            },
        }
    }

    /// Is the next free deferred?
    #[inline]
    pub(super) fn takes(&mut self) -> bool {
        self.wheel += self.share;
        let over = self.wheel >= 65_536;
        self.wheel &= 65_535;
        over
    }

    pub(super) fn free(&mut self, object: OwnedObject, cache: Option<&Cache<'_>>) {
        let size = cache.map(Cache::object_size);
        let deferred = self.machine.handles().free_object_later(object, size);
        self.backlog.deferred += u64::from(deferred);
    }

    /// The reader moves on, and a worker frees what is due.
    #[cold]
    pub(super) fn turn(&mut self, now: u64) {
        let mm = &self.machine.mm;
        mm.platform().set_clock(now);
        self.backlog.samples.push(mm.kvfree_queued());
        drop(self.reader.take());
        // For all in one step of the clock: what was asked for before may end, and the next begin.
        mm.rcu().advance();
        self.reader = Some(mm.rcu_read_lock());
        self.backlog.grace_periods += 1;
        mm.rcu_work();
        self.next = now + self.grace_ns;
    }

    /// No more readers: everything is freed.
    pub(super) fn end(mut self) -> Backlog {
        let mm = &self.machine.mm;
        drop(self.reader.take());
        self.backlog.by_heads = mm.event(Counter::KvfreeHead);
        mm.kvfree_rcu_barrier();
        self.backlog.left = mm.kvfree_queued();
        self.backlog
    }
}
