//! What goes over the wire: frames of bytes, and a wire that loses, doubles and delays them.

use super::settings::Weather;
use crate::rng::Rng;

/// The swap connection; every other number is somebody else's.
pub(super) const SWAP: u32 = 1;
/// Carries nothing but an acknowledgement.
pub(super) const NO_SEQ: u64 = u64::MAX;
/// Bytes of a header as it is written.
pub(super) const HEADER_BYTES: usize = 56;

/// What is said about a page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub(super) enum Say {
    /// Only an acknowledgement.
    Ack = 0,
    /// Keep this page.
    Write = 1,
    /// Give me this page.
    Read = 2,
    /// It is kept.
    Written = 3,
    /// Here it is.
    Data = 4,
}

/// A frame's header.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Header {
    pub(super) conn: u32,
    /// Bytes that follow.
    pub(super) len: u32,
    /// The packet's number in its direction.
    pub(super) seq: u64,
    /// All packets of the other direction below this are there.
    pub(super) ack: u64,
    pub(super) say: Say,
    /// Where in the page.
    pub(super) offset: u32,
    pub(super) page: u64,
    /// Which request.
    pub(super) id: u64,
}

impl Header {
    pub(super) const ACK: Header = Header {
        conn: SWAP,
        len: 0,
        seq: NO_SEQ,
        ack: 0,
        say: Say::Ack,
        offset: 0,
        page: 0,
        id: 0,
    };

    /// Writes it. The acknowledgement is put in when the frame goes out ([`stamp`]).
    pub(super) fn write(&self, to: &mut [u8]) {
        let words = [
            u64::from(self.conn) | u64::from(self.len) << 32,
            self.seq,
            self.page,
            u64::from(self.offset) | (self.say as u64) << 32,
            self.id,
        ];
        for (nth, word) in words.iter().chain([&sum(&words)]).enumerate() {
            to[nth * 8..nth * 8 + 8].copy_from_slice(&word.to_le_bytes());
        }
        stamp(to, self.ack);
    }

    /// Reads it; `None` if it is not what was written.
    pub(super) fn read(from: &[u8]) -> Option<Header> {
        let word = |nth: usize| {
            let bytes = from.get(nth * 8..nth * 8 + 8)?;
            Some(u64::from_le_bytes(bytes.try_into().ok()?))
        };
        let words = [word(0)?, word(1)?, word(2)?, word(3)?, word(4)?];
        let say = [Say::Ack, Say::Write, Say::Read, Say::Written, Say::Data];
        let header = Header {
            conn: words[0] as u32,
            len: (words[0] >> 32) as u32,
            seq: words[1],
            ack: word(6)?,
            page: words[2],
            offset: words[3] as u32,
            say: *say.get((words[3] >> 32) as usize)?,
            id: words[4],
        };
        (word(5)? == sum(&words)).then_some(header)
    }
}

/// Puts the acknowledgement in.
pub(super) fn stamp(header: &mut [u8], ack: u64) {
    header[48..56].copy_from_slice(&ack.to_le_bytes());
}

fn sum(words: &[u64]) -> u64 {
    words.iter().fold(0xcbf2_9ce4_8422_2325, |sum, word| {
        (sum ^ word).wrapping_mul(0x100_0000_01b3).rotate_left(23)
    })
}

/// A direction of the wire.
pub(super) struct Wire {
    rng: Rng,
    weather: Weather,
    pub(super) frames: u64,
    pub(super) lost: u64,
    pub(super) doubled: u64,
    pub(super) late: u64,
}

/// From one end to the other, in nanoseconds.
const LATENCY: u64 = 80_000;

impl Wire {
    pub(super) fn new(seed: u64, weather: Weather) -> Wire {
        Wire {
            rng: Rng(seed),
            weather,
            frames: 0,
            lost: 0,
            doubled: 0,
            late: 0,
        }
    }

    /// When a frame arrives that is sent now: never, once, or twice.
    pub(super) fn carry(&mut self, now: u64) -> [Option<u64>; 2] {
        self.frames += 1;
        let of_1000 = |rng: &mut Rng, n: u64| rng.below_u64(1000) < n;
        if of_1000(&mut self.rng, self.weather.lost) {
            self.lost += 1;
            return [None, None];
        }
        let jitter = self.rng.below_u64(4000);
        let mut at = now + LATENCY + jitter;
        if of_1000(&mut self.rng, self.weather.late) {
            self.late += 1;
            at += self.rng.below_u64(500_000);
        }
        let twice = of_1000(&mut self.rng, self.weather.doubled);
        self.doubled += u64::from(twice);
        let again = twice.then(|| at + 1000 + self.rng.below_u64(200_000));
        [Some(at), again]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_go_round() {
        let header = Header {
            conn: SWAP,
            len: 1408,
            seq: 77,
            ack: 12,
            say: Say::Data,
            offset: 2816,
            page: 123_456,
            id: 9,
        };
        let mut bytes = [0; 64];
        header.write(&mut bytes);
        assert_eq!(Header::read(&bytes), Some(header));
        stamp(&mut bytes, 13);
        assert_eq!(Header::read(&bytes), Some(Header { ack: 13, ..header }));
        for at in 0..48 {
            bytes[at] ^= 4;
            assert_eq!(Header::read(&bytes), None, "{at}");
            bytes[at] ^= 4;
        }
        assert_eq!(Header::read(&bytes[..40]), None);
    }
}
