//! The stack's receiving side. A frame needs a page to lie in and a head before anybody can look whose it is.

use std::collections::{BTreeMap, VecDeque};

use memdesc::PAGE_SIZE;

use super::memory::{HEAD_BYTES, Piece, Site};
use super::settings::{COPYBREAK, DATA_MIN};
use super::sim::{Event, World};
use super::wire::{HEADER_BYTES, Header, NO_SEQ, SWAP, Say};

/// How long an acknowledgement waits for company, in nanoseconds.
const DELAYED_ACK: u64 = 300_000;

/// A frame that was received.
pub(super) struct Frame<'a> {
    head: Piece<'a>,
    /// The page that it came in, or a copy of its own size.
    buffer: Piece<'a>,
    header: Header,
}

/// The receiving side.
#[derive(Default)]
pub(super) struct Receive<'a> {
    /// Pages that the device may put frames into.
    ring: VecDeque<Piece<'a>>,
    /// All packets below this came, and were dealt with.
    pub(super) received: u64,
    early: BTreeMap<u64, Frame<'a>>,
    pub(super) since_ack: u32,
    pub(super) most_early: usize,
    pub(super) frames: u64,
    /// Of them the server's, looked at.
    pub(super) from_server: u64,
    /// No page was there for the device.
    pub(super) no_page: u64,
    /// No head.
    pub(super) no_head: u64,
    /// Somebody else's, in emergency memory: dropped after the look.
    pub(super) after_look: u64,
    /// Of the swap connection, here already or too early to be kept.
    pub(super) useless: u64,
}

impl Receive<'_> {
    pub(super) fn ring(&self) -> usize {
        self.ring.len()
    }

    pub(super) fn early(&self) -> usize {
        self.early.len()
    }

    /// Lets go of everything.
    pub(super) fn clear(&mut self) {
        self.ring.clear();
        self.early.clear();
    }
}

impl<'a> World<'a> {
    /// Gives the device pages until the ring is full.
    pub(super) fn refill(&mut self) {
        while self.rx.ring.len() < self.bounds.ring {
            match self.book.get(Site::ReceivePage, 0) {
                Ok(page) => self.rx.ring.push_back(page),
                Err(_) => {
                    self.stalled();
                    return;
                }
            }
        }
    }

    /// A frame is at the device.
    pub(super) fn frame(&mut self, frame: &[u8]) {
        self.rx.frames += 1;
        let Some(mut page) = self.rx.ring.pop_front() else {
            self.rx.no_page += 1;
            self.refill();
            return;
        };
        let len = frame.len().min(PAGE_SIZE);
        page.bytes_mut()[..len].copy_from_slice(&frame[..len]);
        let Ok(head) = self.book.get(Site::ReceiveHead, HEAD_BYTES) else {
            self.rx.no_head += 1;
            self.rx.ring.push_back(page);
            return;
        };
        let mut buffer = page;
        if len <= COPYBREAK
            && let Ok(mut copy) = self.book.get(Site::ReceiveCopy, len.max(DATA_MIN))
        {
            copy.bytes_mut()[..len].copy_from_slice(&buffer.bytes()[..len]);
            self.rx.ring.push_back(std::mem::replace(&mut buffer, copy));
        }
        self.refill();
        // Only now can it be looked at.
        let Some(header) = Header::read(buffer.bytes()) else {
            self.wrong += 1;
            return;
        };
        if header.conn != SWAP {
            if head.emergency || buffer.emergency {
                self.rx.after_look += 1;
            } else {
                self.others.queue(head, buffer);
            }
            return;
        }
        self.rx.from_server += 1;
        self.acknowledged(&header);
        if header.seq == NO_SEQ {
            return;
        }
        self.in_order(Frame {
            head,
            buffer,
            header,
        });
    }

    /// A packet of the swap connection that says something.
    fn in_order(&mut self, mut frame: Frame<'a>) {
        let seq = frame.header.seq;
        frame.head.bytes_mut()[..8].copy_from_slice(&seq.to_le_bytes());
        if seq != self.rx.received {
            let ahead = seq.wrapping_sub(self.rx.received);
            let room = self.rx.early.len() < self.bounds.reassembly;
            if seq < self.rx.received || ahead > self.bounds.reassembly as u64 || !room {
                self.rx.useless += 1;
            } else {
                self.rx.early.insert(seq, frame);
                self.rx.most_early = self.rx.most_early.max(self.rx.early.len());
            }
            self.send_ack();
            return;
        }
        self.deliver(&frame);
        drop(frame);
        while let Some(frame) = self.rx.early.remove(&self.rx.received) {
            self.deliver(&frame);
        }
        if self.rx.since_ack >= 2 || !self.rx.early.is_empty() {
            self.send_ack();
        } else if !self.ack_armed {
            // Nothing may follow that carries it.
            self.ack_armed = true;
            self.at(self.now + DELAYED_ACK, Event::DelayedAck);
        }
    }

    /// The acknowledgement has waited for long enough.
    pub(super) fn delayed_ack(&mut self) {
        self.ack_armed = false;
        if self.rx.since_ack > 0 {
            self.send_ack();
        }
    }

    fn deliver(&mut self, frame: &Frame<'_>) {
        let header = &frame.header;
        self.wrong += u64::from(frame.head.bytes()[..8] != header.seq.to_le_bytes());
        self.rx.received += 1;
        self.rx.since_ack += 1;
        self.progress();
        match header.say {
            Say::Written => self.written(header.id),
            Say::Data => {
                let end = HEADER_BYTES + header.len as usize;
                match frame.buffer.bytes().get(HEADER_BYTES..end) {
                    Some(bytes) => self.data(header.id, header.offset as usize, bytes),
                    None => self.wrong += 1,
                }
            }
            Say::Ack | Say::Write | Say::Read => self.wrong += 1,
        }
    }
}
