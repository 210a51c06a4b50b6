//! The stack's own bounds, from which follows what it can need at most; and the weather of a seed.

use crate::rng::Rng;

/// Bytes of a swapped page that a packet carries.
pub(super) const MSS: usize = 1408;
/// A packet's linear data: room for the headers.
pub(super) const HEADERS: usize = 64;
/// The swap protocol's own header, in the first packet of a request: at most so much.
pub(super) const RPC_MAX: usize = 512;
/// The smallest and the largest piece of data.
pub(super) const DATA_MIN: usize = 64;
pub(super) const DATA_MAX: usize = HEADERS + RPC_MAX + MSS;
/// What is kept of a request.
pub(super) const REQUEST_MIN: usize = 192;
pub(super) const REQUEST_MAX: usize = 1024;
/// An acknowledgement's data at most.
pub(super) const ACK_MAX: usize = 128;
/// Frames up to this size are copied out of the device's page.
pub(super) const COPYBREAK: usize = 256;

/// What the stack bounds by itself, whoever gives the memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    /// Packets that are sent and not acknowledged.
    pub(super) window: usize,
    /// Bytes of linear data in them (`sk_sndbuf`).
    pub(super) sndbuf: usize,
    /// Fragments in them, which the device bounds.
    pub(super) fragments: usize,
    /// Packets that the device has.
    pub(super) device: usize,
    /// Buffers that wait for frames.
    pub(super) ring: usize,
    /// Frames that wait for one before them; also the window that the server is told.
    pub(super) reassembly: usize,
    /// Pages on their way to the server.
    pub(super) writes: usize,
    /// Processes, each of which waits for at most one page from the server.
    pub(super) processes: usize,
}

impl Bounds {
    pub(super) const STACK: Bounds = Bounds {
        window: 128,
        sndbuf: 96 << 10,
        fragments: 32,
        device: 96,
        ring: 48,
        reassembly: 48,
        writes: 48,
        processes: 16,
    };

    /// Heads at most: of what is not acknowledged, of what the device has, of what waits for frames before it, of the frame in hand.
    pub(super) fn heads(&self) -> usize {
        self.window + self.device + self.reassembly + 1
    }

    /// Pages on their way in either direction.
    pub(super) fn requests(&self) -> usize {
        self.writes + self.processes
    }

    /// Bytes of data at most, as asked for.
    pub(super) fn data(&self) -> usize {
        self.sndbuf
            + self.device * ACK_MAX
            + self.requests() * REQUEST_MAX
            + (self.reassembly + 1) * COPYBREAK
    }

    /// Pages to receive into: in the ring, in reassembly, in hand.
    pub(super) fn receive_pages(&self) -> usize {
        self.ring + self.reassembly + 1
    }
}

/// What differs from seed to seed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Weather {
    /// Of 1000 frames so many are lost, doubled, late.
    pub(super) lost: u64,
    pub(super) doubled: u64,
    pub(super) late: u64,
    /// Nanoseconds between frames for others, in the mean, and in a flood.
    pub(super) noise_ns: u64,
    pub(super) flood_ns: u64,
    /// Of 100 packets so many carry data that was copied.
    pub(super) copied: u64,
    /// Of 100 packets so many go through a fragment.
    pub(super) bounced: u64,
    /// Percent of memory that others hold at most at GFP_ATOMIC, that they take at once, and nanoseconds between their rounds.
    pub(super) greed: u64,
    pub(super) burst: u64,
    pub(super) greed_ns: u64,
    /// Percent of memory that sockets of others may queue.
    pub(super) rcvbuf: u64,
}

impl Weather {
    pub(super) fn of(seed: u64) -> Weather {
        let mut rng = Rng(seed ^ 0x7765_6174_6865_7200);
        let mut between = |low: u64, high: u64| low + rng.below_u64(high - low + 1);
        Weather {
            lost: between(0, 40),
            doubled: between(0, 10),
            late: between(0, 60),
            noise_ns: between(100, 600) * 1000,
            flood_ns: between(12, 40) * 1000,
            copied: between(20, 70),
            bounced: between(0, 25),
            greed: between(10, 30),
            burst: between(4, 16),
            greed_ns: between(500, 3000) * 1000,
            rcvbuf: between(2, 12),
        }
    }
}

/// The size of a run.
#[derive(Clone, Copy, Debug)]
pub(super) struct Size {
    /// Pages of memory.
    pub(super) memory: u32,
    /// Pages of the working set.
    pub(super) working_set: u32,
    /// Touches, of all processes.
    pub(super) touches: u64,
    /// What the marks are made of, if not what the memory manager thinks.
    pub(super) min_free_kbytes: Option<u64>,
    /// Seconds of simulated time in which nothing gets on, before it is said that nothing will.
    pub(super) patience: u64,
}
