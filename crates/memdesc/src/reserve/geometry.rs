//! From a demand to a bound in pages: how many blocks have to be set aside so that no request within the demand can fail, whatever the order of
//! requests and frees. `docs/reserves.md` has the proofs at length; in short:
//!
//! **Objects of one size.** A slab from a reserve is taken only when all others of its class are full, so after taking the `s`th there are more
//! than `(s - 1) * k` objects out, with `k` to a slab. At most `N` are out at once, so at most `ceil(N / k)` slabs are ever needed, and `N` requests in a row
//! do need them: the bound is exact.
//!
//! **A mix of sizes.** Two limits hold at once. Of class `c`, whose smallest request is `m` bytes, at most `floor(N / m)` objects are out within `N` bytes, so it never
//! takes more slabs than the above for that many. And a block is taken only when the node has no empty slab of its order, so at that moment each of its slabs of
//! that order has an object out, which was charged its class's `m`: the slabs' `m`s come to `N` at most. The most slabs that both limits allow are
//! found by taking the classes with the smallest `m` first, for a slab is a slab whichever class it is of. This is nearly reached: all of the bytes in
//! the smallest class, then one object kept a slab, the rest in the next. What is charged for an object is `m`, the least that its class is asked for: at
//! most what was asked, and known from its class when it is freed.
//!
//! **Pages.** As many blocks of the order as asked for: exact. Blocks are set aside by order and neither split nor merged.
//!
//! What seed 004 writes as `2*N + m` is here: the 2 is `size / m` of each class, and `m`, the metadata, is what the slab layout takes from `k`, plus the
//! descriptor that each block has from the start ([`Bound::descriptor_bytes`]). Sheaves count nothing: no object from a reserve ever enters one.

use crate::address::{MAX_ORDER, PAGE_SIZE};

/// One kind of block that a demand needs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Class {
    /// What one object is charged: the least that is asked for of this class.
    pub(crate) charge: u64,
    /// Objects a block.
    pub(crate) per_block: u64,
    /// The block's order.
    pub(crate) order: usize,
    /// Bytes of the descriptor that a block keeps.
    pub(crate) descriptor: u64,
}

/// What has to be set aside for a demand.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Bound {
    /// Blocks, by order.
    pub blocks: [u64; MAX_ORDER + 1],
    /// Bytes of the descriptors of those blocks, which lie in slabs of their own.
    pub descriptor_bytes: u64,
    /// What may be charged at once, in bytes.
    pub bytes: u64,
}

impl Bound {
    /// Nothing.
    pub(crate) const NONE: Bound = Bound {
        blocks: [0; MAX_ORDER + 1],
        descriptor_bytes: 0,
        bytes: 0,
    };

    /// For `bytes` charged at once, of any mix of these classes, which come with the least charge first.
    pub(crate) fn of(bytes: u64, classes: impl Iterator<Item = Class>) -> Bound {
        let mut bound = Bound {
            bytes,
            ..Bound::NONE
        };
        // What the live objects that keep slabs of an order from being empty may still be charged.
        let mut left = [bytes; MAX_ORDER + 1];
        for class in classes {
            let objects = bytes / class.charge;
            let left = &mut left[class.order];
            let blocks = objects.div_ceil(class.per_block).min(*left / class.charge);
            *left -= blocks * class.charge;
            bound.blocks[class.order] += blocks;
            bound.descriptor_bytes += blocks * class.descriptor;
        }
        bound
    }

    /// The sum in pages.
    pub fn pages(&self) -> u64 {
        let each = self.blocks.iter().enumerate();
        each.map(|(order, n)| n << order).sum()
    }

    /// The sum in bytes, descriptors included: all that it costs.
    pub fn total_bytes(&self) -> u64 {
        self.pages() * PAGE_SIZE as u64 + self.descriptor_bytes
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    extern crate std;
    use std::collections::BTreeSet;
    use std::vec;
    use std::vec::Vec;

    use super::*;

    const fn class(charge: u64, per_block: u64, order: usize) -> Class {
        Class {
            charge,
            per_block,
            order,
            descriptor: 48,
        }
    }

    #[test]
    fn one_size_is_rounded_up_once() {
        for k in 1..=5 {
            for n in 0..=30 {
                let bound = Bound::of(n * 7, [class(7, k, 1)].into_iter());
                assert_eq!(bound.pages(), n.div_ceil(k) * 2);
                assert_eq!(bound.descriptor_bytes, n.div_ceil(k) * 48);
            }
        }
    }

    /// The most blocks that any order of requests and frees can pin, by trying them all: a state is how many blocks of each class have how many
    /// objects out.
    fn need(bytes: u64, classes: &[Class]) -> u64 {
        type State = Vec<Vec<u64>>;
        let pages = |state: &State| -> u64 {
            let each = state.iter().zip(classes);
            each.map(|(slabs, c)| (slabs.len() as u64) << c.order).sum()
        };
        let mut seen: BTreeSet<State> = BTreeSet::new();
        let mut queue: Vec<State> = vec![vec![Vec::new(); classes.len()]];
        let mut most = 0;
        while let Some(state) = queue.pop() {
            if !seen.insert(state.clone()) {
                continue;
            }
            most = most.max(pages(&state));
            let out: u64 = state
                .iter()
                .zip(classes)
                .map(|(slabs, c)| slabs.iter().sum::<u64>() * c.charge)
                .sum();
            for (i, c) in classes.iter().enumerate() {
                if out + c.charge <= bytes {
                    // Any slab with room may serve it; a new one only if there is none.
                    let room: Vec<usize> = (0..state[i].len())
                        .filter(|&s| state[i][s] < c.per_block)
                        .collect();
                    if room.is_empty() {
                        let mut next = state.clone();
                        next[i].push(1);
                        next[i].sort_unstable();
                        queue.push(next);
                    }
                    for s in room {
                        let mut next = state.clone();
                        next[i][s] += 1;
                        next[i].sort_unstable();
                        queue.push(next);
                    }
                }
                for s in 0..state[i].len() {
                    let mut next = state.clone();
                    next[i][s] -= 1;
                    if next[i][s] == 0 {
                        next[i].remove(s);
                    }
                    next[i].sort_unstable();
                    queue.push(next);
                }
            }
        }
        most
    }

    #[test]
    fn every_order_of_requests_stays_within_the_bound_and_one_size_reaches_it() {
        for k in 1..=4 {
            for n in 1..=9 {
                let one = [class(3, k, 0)];
                let bound = Bound::of(n * 3, one.into_iter());
                assert_eq!(need(n * 3, &one), bound.pages(), "{n} objects, {k} a slab");
            }
        }
        for bytes in 4..=16 {
            let two = [class(1, 4, 0), class(2, 2, 0)];
            let bound = Bound::of(bytes, two.into_iter()).pages();
            let need = need(bytes, &two);
            assert!(
                need <= bound && bound * 3 <= need * 4,
                "{bytes}: {need} of {bound}"
            );
        }
    }
}
