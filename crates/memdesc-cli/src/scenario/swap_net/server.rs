//! The swap server: keeps pages, answers, and speaks the same protocol from the other end. It has all the memory it wants.

use std::collections::{BTreeMap, VecDeque};

use memdesc::PAGE_SIZE;

use super::settings::{Bounds, MSS};
use super::wire::{HEADER_BYTES, Header, NO_SEQ, SWAP, Say, Wire, stamp};

/// The first wait for an acknowledgement, and the longest, in nanoseconds.
pub(super) const RTO_MIN: u64 = 4_000_000;
pub(super) const RTO_MAX: u64 = 100_000_000;

/// Takes a frame, and when it arrives.
pub(super) type Out<'a> = &'a mut dyn FnMut(u64, Vec<u8>);

/// The pages that are kept. Its memory serves seed after seed.
#[derive(Default)]
pub(super) struct Store {
    /// Where a page is; 0 if it is not kept.
    places: Vec<u32>,
    bytes: Vec<u8>,
    used: usize,
}

impl Store {
    pub(super) fn clear(&mut self, pages: u32) {
        self.places.clear();
        self.places.resize(pages as usize, 0);
        self.used = 0;
    }

    pub(super) fn get(&self, page: u64) -> Option<&[u8]> {
        let place = (*self.places.get(page as usize)? as usize).checked_sub(1)?;
        self.bytes.get(place * PAGE_SIZE..(place + 1) * PAGE_SIZE)
    }

    fn put(&mut self, page: u64, offset: usize, bytes: &[u8]) -> Option<()> {
        let place = self.places.get_mut(page as usize)?;
        if *place == 0 {
            self.used += 1;
            *place = u32::try_from(self.used).ok()?;
            if self.bytes.len() < self.used * PAGE_SIZE {
                self.bytes.resize(self.used * PAGE_SIZE, 0);
            }
        }
        let start = (*place as usize - 1) * PAGE_SIZE + offset;
        let end = (*place as usize * PAGE_SIZE).min(start + bytes.len());
        self.bytes
            .get_mut(start..end)
            .filter(|to| to.len() == bytes.len())?
            .copy_from_slice(bytes);
        Some(())
    }
}

/// The other end.
pub(super) struct Server<'s> {
    pub(super) store: &'s mut Store,
    window: u64,
    received: u64,
    early: BTreeMap<u64, Vec<u8>>,
    unacked: VecDeque<Vec<u8>>,
    first_unacked: u64,
    /// Packets of `unacked` that were sent at least once.
    sent: usize,
    since_ack: u32,
    doubles: u32,
    recover: u64,
    rto: u64,
    /// When the oldest packet is sent again.
    pub(super) deadline: Option<u64>,
    pub(super) resent: u64,
    /// Frames or requests that make no sense.
    pub(super) wrong: u64,
    pub(super) wire: Wire,
}

impl<'s> Server<'s> {
    pub(super) fn new(store: &'s mut Store, bounds: &Bounds, wire: Wire) -> Server<'s> {
        Server {
            store,
            window: bounds.reassembly as u64,
            received: 0,
            early: BTreeMap::new(),
            unacked: VecDeque::new(),
            first_unacked: 0,
            sent: 0,
            since_ack: 0,
            doubles: 0,
            recover: 0,
            rto: RTO_MIN,
            deadline: None,
            resent: 0,
            wrong: 0,
            wire,
        }
    }

    /// A frame came. What goes out is given to `out` with the time at which it arrives.
    pub(super) fn frame(&mut self, now: u64, frame: Vec<u8>, out: Out<'_>) {
        let Some(header) = Header::read(&frame).filter(|header| header.conn == SWAP) else {
            self.wrong += 1;
            return;
        };
        self.acknowledged(now, header, out);
        if header.seq == NO_SEQ {
            return;
        }
        if header.seq != self.received {
            if header.seq > self.received && self.early.len() < 512 {
                self.early.insert(header.seq, frame);
            }
            self.ack(now, out);
            return;
        }
        self.deliver(&header, &frame);
        while let Some(frame) = self.early.remove(&self.received) {
            match Header::read(&frame) {
                Some(header) => self.deliver(&header, &frame),
                None => self.wrong += 1,
            }
            self.since_ack += 1;
        }
        self.since_ack += 1;
        if !self.send(now, out) && self.since_ack >= 2 {
            self.ack(now, out);
        }
    }

    /// In order now.
    fn deliver(&mut self, header: &Header, frame: &[u8]) {
        self.received += 1;
        let (start, page) = (header.offset as usize, header.page);
        match header.say {
            Say::Write => {
                let bytes = &frame[HEADER_BYTES..];
                if bytes.len() != header.len as usize
                    || self.store.put(page, start, bytes).is_none()
                {
                    self.wrong += 1;
                } else if start + bytes.len() == PAGE_SIZE {
                    self.answer(header, Say::Written, 0, &[]);
                }
            }
            Say::Read => match self.store.get(page).map(<[u8]>::to_vec) {
                Some(bytes) => {
                    for offset in (0..PAGE_SIZE).step_by(MSS) {
                        let end = PAGE_SIZE.min(offset + MSS);
                        self.answer(header, Say::Data, offset, &bytes[offset..end]);
                    }
                }
                None => self.wrong += 1,
            },
            Say::Ack | Say::Written | Say::Data => self.wrong += 1,
        }
    }

    fn answer(&mut self, to: &Header, say: Say, offset: usize, bytes: &[u8]) {
        let header = Header {
            len: bytes.len() as u32,
            seq: self.first_unacked + self.unacked.len() as u64,
            say,
            offset: offset as u32,
            ..*to
        };
        let mut frame = vec![0; HEADER_BYTES + bytes.len()];
        header.write(&mut frame);
        frame[HEADER_BYTES..].copy_from_slice(bytes);
        self.unacked.push_back(frame);
    }

    fn acknowledged(&mut self, now: u64, header: Header, out: Out<'_>) {
        if header.ack > self.first_unacked {
            let n = ((header.ack - self.first_unacked) as usize).min(self.sent);
            self.unacked.drain(..n);
            self.sent -= n;
            self.first_unacked += n as u64;
            self.doubles = 0;
            self.rto = RTO_MIN;
            self.deadline = (self.sent > 0).then_some(now + self.rto);
            if self.sent > 0 && self.first_unacked < self.recover {
                self.again(now, out);
            }
            self.send(now, out);
        } else if header.seq == NO_SEQ && self.sent > 0 && header.ack == self.first_unacked {
            self.doubles += 1;
            if self.doubles == 3 && self.first_unacked >= self.recover {
                self.recover = self.first_unacked + self.sent as u64;
                self.again(now, out);
            }
        }
    }

    /// Sends what the window has room for. Did anything go?
    fn send(&mut self, now: u64, out: Out<'_>) -> bool {
        let room = self.unacked.len().min(self.window as usize);
        let any = self.sent < room;
        while self.sent < room {
            self.put(now, self.sent, out);
            self.sent += 1;
            self.deadline.get_or_insert(now + self.rto);
        }
        any
    }

    fn put(&mut self, now: u64, nth: usize, out: Out<'_>) {
        let mut frame = self.unacked[nth].clone();
        stamp(&mut frame, self.received);
        self.since_ack = 0;
        self.carry(now, frame, out);
    }

    fn again(&mut self, now: u64, out: Out<'_>) {
        self.resent += 1;
        self.put(now, 0, out);
    }

    /// The deadline is over.
    pub(super) fn timeout(&mut self, now: u64, out: Out<'_>) {
        self.deadline = None;
        if self.sent > 0 {
            self.rto = (self.rto * 2).min(RTO_MAX);
            self.recover = self.first_unacked + self.sent as u64;
            self.doubles = 0;
            self.again(now, out);
            self.deadline = Some(now + self.rto);
        }
    }

    fn ack(&mut self, now: u64, out: Out<'_>) {
        let mut frame = vec![0; HEADER_BYTES];
        Header::ACK.write(&mut frame);
        stamp(&mut frame, self.received);
        self.since_ack = 0;
        self.carry(now, frame, out);
    }

    fn carry(&mut self, now: u64, frame: Vec<u8>, out: Out<'_>) {
        match self.wire.carry(now) {
            [Some(at), Some(again)] => {
                out(again, frame.clone());
                out(at, frame);
            }
            [Some(at), None] => out(at, frame),
            _ => {}
        }
    }
}
