//! What is known of an allocation better than its flags say.

use alloc::vec::Vec;

use crate::handles::Purpose;

/// The allocations whose purpose a snapshot knows better, in the order of their events.
#[derive(Clone, Debug, Default)]
pub struct Corrections {
    list: Vec<(u32, Purpose)>,
    next: usize,
}

impl Corrections {
    /// Of these events: number and purpose, in any order.
    pub fn new(mut list: Vec<(u32, Purpose)>) -> Corrections {
        list.sort_unstable_by_key(|&(index, _)| index);
        Corrections { list, next: 0 }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.list.len()
    }

    /// Are there none?
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// The purpose of this event's allocation, if it is one of them. Events are asked about in order.
    #[inline]
    pub fn of(&mut self, index: usize) -> Option<Purpose> {
        let &(event, purpose) = self.list.get(self.next)?;
        if (event as usize) > index {
            return None;
        }
        self.next += 1;
        (event as usize == index).then_some(purpose)
    }
}
