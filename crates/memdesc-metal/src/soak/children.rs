//! Children: processes that fork in trees, copy on write, map and unmap, some in a group that lets them have little; and threads that live for a moment. Each says in
//! the end that it found what it should, or that there was no memory; nothing of it is left, whatever failed.

use core::sync::atomic::Ordering;

use arrayvec::ArrayVec;
use memdesc::gfp::{__GFP_NOWARN, GFP_KERNEL};

use super::things::{fill, first_wrong};
use super::{Count, Soak, Worker};
use crate::process::{self, KILLED, Program};
use crate::thread::{self, JoinHandle};
use crate::{sched, wrong};

unsafe extern "C" {
    safe static user_demand: u8;
    safe static user_cow: u8;
    safe static user_tree: u8;
    safe static user_map: u8;
}

/// Children that a worker has at most.
const CHILDREN: usize = 4;
/// What a process says that got no memory for a fork or an area; and one that was killed because there was none for a page, to its parent.
const ENOMEM: u32 = -12i32 as u32;
const PAGE_FAULT: u32 = 14;
/// Calls of each other that a thread's stack takes.
const DEEP: u64 = 12;

/// Children, and what each is to say.
pub(crate) type Children = ArrayVec<(JoinHandle, u64), CHILDREN>;

impl Worker {
    pub(super) fn children(&mut self, soak: &Soak) {
        let mut at = 0;
        while at < self.children.len() {
            if self.children[at].0.is_done() {
                let (child, wanted) = self.children.swap_remove(at);
                said(soak, child.join(), wanted);
            } else {
                at += 1;
            }
        }
        if self.children.is_full() {
            return;
        }
        let child = match self.dice.below(8) {
            0..=2 => self.thread(soak),
            kind => self.process(soak, kind),
        };
        match child {
            Some(child) => self.children.push(child),
            None => soak.count(Count::Refused),
        }
    }

    /// Waits for all of them.
    pub(super) fn join_children(&mut self, soak: &Soak) {
        for (child, wanted) in self.children.drain(..) {
            said(soak, child.join(), wanted);
        }
    }

    fn process(&mut self, soak: &Soak, kind: usize) -> Option<(JoinHandle, u64)> {
        let pages = 1 + self.dice.below(64) as u64;
        let (entry, arguments, wanted): (&'static u8, _, _) = match kind {
            3..=4 => {
                let depth = 1 + self.dice.below(3) as u64;
                (&user_tree, [depth, pages], (2 << depth) - 1)
            }
            5 => (&user_cow, [pages, 0], 42),
            6 => (&user_map, [1 + pages % 8, pages], 9),
            _ => {
                let sum = (0..pages).map(|page| 3 * page + 7).sum();
                (&user_demand, [pages, 0], sum)
            }
        };
        let program = Program {
            entry,
            arguments,
            pages,
        };
        // Some of them have to do with what their group has.
        let group = if self.one_in(3) { soak.group.id() } else { 0 };
        let charged = &thread::current().memcg;
        charged.store(group, Ordering::Relaxed);
        let started = process::start(&soak.text, soak.mm, &program);
        charged.store(0, Ordering::Relaxed);
        soak.count(Count::Processes);
        Some((started.ok()?, wanted))
    }

    fn thread(&mut self, soak: &Soak) -> Option<(JoinHandle, u64)> {
        let (mm, stamp) = (soak.mm, self.stamp());
        let size = 8 * (1 + self.dice.below(400));
        let wanted = descend(stamp, 0);
        let run = move || {
            let object = mm.kmalloc(size, GFP_KERNEL | __GFP_NOWARN).ok();
            if let Some(object) = object {
                // SAFETY: ours, and that large.
                unsafe { fill(object, size, stamp) };
            }
            let said = descend(stamp, DEEP);
            sched::sleep_ms(stamp >> 8 & 3);
            let Some(object) = object else {
                return said;
            };
            // SAFETY: ours, filled, and freed once.
            unsafe {
                let wrong = first_wrong(object, size, stamp);
                mm.kfree(object);
                if wrong.is_some() { 0 } else { said }
            }
        };
        soak.count(Count::Threads);
        Some((thread::spawn("soak", run).ok()?, wanted))
    }
}

/// What a child said is what it was to say, or that there was no memory.
fn said(soak: &Soak, said: u64, wanted: u64) {
    let (low, high) = (said as u32, said >> 32);
    match (said == wanted, low) {
        (true, _) => {}
        // Who is killed says so himself, and his parent that a child said something else.
        (false, ENOMEM | PAGE_FAULT) if high != 0 => soak.count(Count::Died),
        _ => wrong!(
            soak,
            "a child said {said:#x}, not {wanted:#x}{}",
            if said & KILLED != 0 { ": killed" } else { "" }
        ),
    }
}

/// Writes to the stack on the way down, lets others run there, and finds it on the way back: the stamp, or 0.
#[inline(never)]
fn descend(stamp: u64, deep: u64) -> u64 {
    let words: [u64; 32] = core::array::from_fn(|n| stamp ^ deep << 8 ^ n as u64);
    let words = core::hint::black_box(&words);
    let below = match deep {
        0 => stamp,
        1 => {
            sched::yield_now();
            descend(stamp, 0)
        }
        _ => descend(stamp, deep - 1),
    };
    let is_so = |(n, &word): (usize, &u64)| word == stamp ^ deep << 8 ^ n as u64;
    if core::hint::black_box(words).iter().enumerate().all(is_so) {
        below
    } else {
        0
    }
}
