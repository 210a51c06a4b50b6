//! The stack's sending side: packets are built, kept until they are acknowledged, and sent again when they are not.
//!
//! A packet is a head, linear data of whatever size the headers and what was copied need, and the rest by reference to the page that is swapped, or in a
//! fragment where the device cannot reach that. The device gets a second head for the same data, until the packet has left.

use std::cell::Cell;
use std::collections::VecDeque;
use std::rc::Rc;

use memdesc::{FolioRef, PAGE_SIZE, Pfn};
use memdesc_host::Host;

use super::memory::{HEAD_BYTES, Piece, Site};
use super::server::{RTO_MAX, RTO_MIN};
use super::settings::{ACK_MAX, DATA_MIN, HEADERS, MSS, RPC_MAX};
use super::sim::{Event, World};
use super::wire::{HEADER_BYTES, Header, Say, stamp};

/// What is to be said to the server.
pub(super) struct Job {
    pub(super) id: u64,
    pub(super) say: Say,
    pub(super) page: u32,
    /// Where the page is, if it is to be sent.
    pub(super) from: Option<Pfn>,
    /// So much of it is in packets.
    pub(super) offset: usize,
}

/// What is in flight, by the stack's own count.
#[derive(Default)]
pub(super) struct Flying {
    bytes: Cell<usize>,
    fragments: Cell<usize>,
}

/// Where a packet's payload is.
enum Payload<'a> {
    None,
    /// Behind the headers, from here on.
    Copied(usize),
    Fragment(Piece<'a>),
    /// In the page itself.
    Page(FolioRef<'a, Host>, usize),
}

/// What both heads of a packet lead to.
struct Body<'a> {
    data: Piece<'a>,
    payload: Payload<'a>,
    len: usize,
    flying: Option<Rc<Flying>>,
}

impl Drop for Body<'_> {
    fn drop(&mut self) {
        if let Some(flying) = &self.flying {
            flying.bytes.set(flying.bytes.get() - self.data.len());
            if let Payload::Fragment(_) = self.payload {
                flying.fragments.set(flying.fragments.get() - 1);
            }
        }
    }
}

/// A packet that is not acknowledged.
struct Packet<'a> {
    head: Piece<'a>,
    body: Rc<Body<'a>>,
}

/// What the device has.
struct Leaving<'a> {
    _head: Piece<'a>,
    body: Rc<Body<'a>>,
}

/// The sending side.
#[derive(Default)]
pub(super) struct Send<'a> {
    pub(super) jobs: VecDeque<Job>,
    unacked: VecDeque<Packet<'a>>,
    first_unacked: u64,
    /// Packets of `unacked` that were sent at least once.
    sent: usize,
    device: VecDeque<Leaving<'a>>,
    line_free: u64,
    flying: Rc<Flying>,
    doubles: u32,
    recover: u64,
    rto: u64,
    pub(super) deadline: Option<u64>,
    pub(super) packets: u64,
    pub(super) resent: u64,
    pub(super) acks: u64,
}

/// Nanoseconds that the line needs for a byte: one gigabit a second.
const NS_PER_BYTE: u64 = 8;

impl Send<'_> {
    /// Packets that wait for their acknowledgement, and of them those that never left.
    pub(super) fn waiting(&self) -> (usize, usize) {
        (self.unacked.len(), self.unacked.len() - self.sent)
    }

    /// Lets go of everything.
    pub(super) fn clear(&mut self) {
        self.jobs.clear();
        self.unacked.clear();
        self.device.clear();
    }
}

impl<'a> World<'a> {
    /// Sends what there is to send, as far as the bounds and memory allow.
    pub(super) fn push(&mut self) {
        loop {
            if self.tx.sent < self.tx.unacked.len() {
                if !self.transmit(self.tx.sent) {
                    return;
                }
                self.tx.sent += 1;
                if self.tx.deadline.is_none() {
                    self.tx.rto = self.tx.rto.max(RTO_MIN);
                    self.arm(self.now + self.tx.rto);
                }
                continue;
            }
            if self.tx.unacked.len() >= self.bounds.window || !self.build() {
                return;
            }
        }
    }

    fn arm(&mut self, at: u64) {
        self.tx.deadline = Some(at);
        if !self.rto_armed {
            self.rto_armed = true;
            self.at(at, Event::Timeout);
        }
    }

    /// Makes the next packet. `false` if there is nothing to say, or it has to wait.
    fn build(&mut self) -> bool {
        let Some(job) = self.tx.jobs.front() else {
            return false;
        };
        let len = match job.say {
            Say::Write => MSS.min(PAGE_SIZE - job.offset),
            _ => 0,
        };
        // What the packet looks like is a matter of the packet, not of how often it is tried.
        let mut rng = crate::rng::Rng(job.id << 16 | job.offset as u64);
        let mut size = HEADERS;
        if job.offset == 0 {
            size += rng.below(RPC_MAX + 1);
        }
        let copied = len > 0 && rng.below_u64(100) < self.weather.copied;
        let part_at = size;
        if copied {
            size += len;
        }
        let bounced = !copied && len > 0 && rng.below_u64(100) < self.weather.bounced;
        let flying = &self.tx.flying;
        if flying.bytes.get() + size > self.bounds.sndbuf
            || bounced && flying.fragments.get() >= self.bounds.fragments
        {
            return false;
        }
        let header = Header {
            len: len as u32,
            seq: self.tx.first_unacked + self.tx.unacked.len() as u64,
            say: job.say,
            offset: job.offset as u32,
            page: u64::from(job.page),
            id: job.id,
            ..Header::ACK
        };
        let (from, offset) = (job.from, job.offset);
        let Some((mut head, mut data)) = self.head_and_data(Site::SendHead, Site::SendData, size)
        else {
            return false;
        };
        let fragment = match bounced.then(|| self.book.get(Site::SendFragment, 0)) {
            Some(Ok(fragment)) => Some(fragment),
            Some(Err(_)) => {
                self.stalled();
                return false;
            }
            None => None,
        };
        head.bytes_mut()[..8].copy_from_slice(&header.seq.to_le_bytes());
        header.write(data.bytes_mut());
        let page = from.and_then(|pfn| self.mm.folio_get(pfn));
        let payload = match (page, fragment) {
            (Some(page), _) if copied => {
                // SAFETY: `page` is a reference to it.
                let bytes = unsafe { &self.page_bytes(page.head())[offset..offset + len] };
                data.bytes_mut()[part_at..part_at + len].copy_from_slice(bytes);
                Payload::Copied(part_at)
            }
            (Some(page), Some(mut fragment)) => {
                // SAFETY: `page` is a reference to it.
                let bytes = unsafe { &self.page_bytes(page.head())[offset..offset + len] };
                fragment.bytes_mut()[..len].copy_from_slice(bytes);
                Payload::Fragment(fragment)
            }
            (Some(page), None) => Payload::Page(page, offset),
            (None, _) => Payload::None,
        };
        let flying = &self.tx.flying;
        flying.bytes.set(flying.bytes.get() + data.len());
        if let Payload::Fragment(_) = payload {
            flying.fragments.set(flying.fragments.get() + 1);
        }
        let body = Body {
            data,
            payload,
            len,
            flying: Some(Rc::clone(flying)),
        };
        self.tx.unacked.push_back(Packet {
            head,
            body: Rc::new(body),
        });
        if let Some(job) = self.tx.jobs.front_mut() {
            job.offset += len;
            if job.offset >= PAGE_SIZE || job.say == Say::Read {
                self.tx.jobs.pop_front();
            }
        }
        true
    }

    fn head_and_data(
        &mut self,
        head: Site,
        data: Site,
        size: usize,
    ) -> Option<(Piece<'a>, Piece<'a>)> {
        let book = self.book;
        let got = book.get(head, HEAD_BYTES);
        let got = got.and_then(|head| Ok((head, book.get(data, size)?)));
        if got.is_err() {
            self.stalled();
        }
        got.ok()
    }

    /// Gives the device a packet once more. `false` if it could not be done now.
    fn transmit(&mut self, nth: usize) -> bool {
        if self.tx.device.len() >= self.bounds.device {
            // The device says when it has room.
            return false;
        }
        let Ok(head) = self.book.get(Site::SendClone, HEAD_BYTES) else {
            self.stalled();
            return false;
        };
        self.tx.packets += 1;
        let body = Rc::clone(&self.tx.unacked[nth].body);
        self.leave(head, body);
        true
    }

    fn leave(&mut self, head: Piece<'a>, body: Rc<Body<'a>>) {
        let bytes = (body.data.len() + body.len) as u64;
        let at = self.tx.line_free.max(self.now) + bytes * NS_PER_BYTE;
        self.tx.line_free = at;
        self.tx.device.push_back(Leaving { _head: head, body });
        self.at(at, Event::Left);
    }

    /// Says what is there.
    pub(super) fn send_ack(&mut self) {
        self.rx.since_ack = 0;
        if self.tx.device.len() >= self.bounds.device {
            return;
        }
        let size = DATA_MIN + self.rng.below(ACK_MAX - DATA_MIN + 1);
        // Without memory there is none; the server asks again.
        let book = self.book;
        let Ok(head) = book.get(Site::AckHead, HEAD_BYTES) else {
            return;
        };
        let Ok(mut data) = book.get(Site::AckData, size) else {
            return;
        };
        Header::ACK.write(data.bytes_mut());
        self.tx.acks += 1;
        let body = Rc::new(Body {
            data,
            payload: Payload::None,
            len: 0,
            flying: None,
        });
        self.leave(head, body);
    }

    /// The device is done with the oldest packet that it has: it is on the wire now.
    pub(super) fn left(&mut self) {
        let Some(Leaving { body, _head }) = self.tx.device.pop_front() else {
            return;
        };
        let mut frame = Vec::with_capacity(HEADER_BYTES + body.len);
        frame.extend_from_slice(&body.data.bytes()[..HEADER_BYTES]);
        match &body.payload {
            Payload::None => {}
            Payload::Copied(at) => frame.extend_from_slice(&body.data.bytes()[*at..*at + body.len]),
            Payload::Fragment(page) => frame.extend_from_slice(&page.bytes()[..body.len]),
            Payload::Page(page, at) => {
                // SAFETY: `page` is a reference to it.
                let bytes = unsafe { self.page_bytes(page.head()) };
                frame.extend_from_slice(&bytes[*at..*at + body.len]);
            }
        }
        stamp(&mut frame, self.rx.received);
        drop((body, _head));
        match self.wire.carry(self.now) {
            [Some(at), Some(again)] => {
                self.at(again, Event::ToServer(frame.clone()));
                self.at(at, Event::ToServer(frame));
            }
            [Some(at), None] => self.at(at, Event::ToServer(frame)),
            _ => {}
        }
        self.push();
    }

    /// The server has everything up to here.
    pub(super) fn acknowledged(&mut self, header: &Header) {
        let first = self.tx.first_unacked;
        if header.ack > first {
            let n = ((header.ack - first) as usize).min(self.tx.unacked.len());
            for (seq, packet) in (first..).zip(self.tx.unacked.drain(..n)) {
                self.wrong += u64::from(packet.head.bytes()[..8] != seq.to_le_bytes());
            }
            self.tx.sent = self.tx.sent.saturating_sub(n);
            self.tx.first_unacked += n as u64;
            self.tx.doubles = 0;
            self.tx.rto = RTO_MIN;
            self.tx.deadline = None;
            self.progress();
            if self.tx.sent > 0 {
                self.arm(self.now + RTO_MIN);
                if self.tx.first_unacked < self.tx.recover {
                    self.again();
                }
            }
            self.push();
        } else if self.tx.sent > 0 && header.ack == first && header.say == Say::Ack {
            self.tx.doubles += 1;
            if self.tx.doubles == 3 && first >= self.tx.recover {
                self.tx.recover = first + self.tx.sent as u64;
                self.again();
            }
        }
    }

    /// The oldest packet once more, if it is not still with the device.
    fn again(&mut self) {
        if Rc::strong_count(&self.tx.unacked[0].body) == 1 && self.transmit(0) {
            self.tx.resent += 1;
        }
    }

    /// The timer for acknowledgements.
    pub(super) fn timeout(&mut self) {
        self.rto_armed = false;
        let Some(deadline) = self.tx.deadline else {
            return;
        };
        if self.now < deadline {
            return self.arm(deadline);
        }
        if self.tx.sent == 0 {
            self.tx.deadline = None;
            return;
        }
        self.tx.rto = (self.tx.rto * 2).clamp(RTO_MIN, RTO_MAX);
        self.tx.recover = self.tx.first_unacked + self.tx.sent as u64;
        self.tx.doubles = 0;
        self.again();
        self.arm(self.now + self.tx.rto);
    }
}
