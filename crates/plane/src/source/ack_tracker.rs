//! What the destination has, as its acknowledgements tell: which stream of QEMU
//! and which barriers are through, and which were given up.
//!
//! ```text
//! stream  begun ─► all barriers and its end acknowledged ─► released (QEMU gets the tail)
//!           └─► given up ─► the next one begins                 │
//!                                  ▲── the destination begins again ───┘
//! ```
//!
//! **Invariants.** A stream is released or given up, never both: one lock decides. One
//! that was released is undone only when the destination begins again with another QEMU.
//! Digests are compared at barriers whose frames have the numbers that the sender
//! noted; nothing else counts.

use std::sync::{Mutex, MutexGuard, PoisonError};

use limosa_protocol::frame::{Ack, Barrier};

use crate::shutdown::{Place, PlaneError};

pub(super) struct AckTracker(Mutex<Inner>);

struct Inner {
    stream: Stream,
    /// Number of the stream of now, from 1
    stream_number: u32,
    /// Number of the disk barrier that is waited for; 0 for none
    disk_awaited: u32,
    disk_number: u32,
    channels: Vec<Expected>,
    /// Number of the frame that ends the stream of now
    stream_end: Option<u64>,
    /// Frames of channel 0 that were taken over
    first_applied: u64,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stream {
    None,
    Begun,
    GivenUp,
    Released,
}

/// What a channel's sender noted at its last barriers.
#[derive(Clone, Copy, Default)]
struct Expected {
    ram: Awaited,
    disk: Awaited,
}

#[derive(Clone, Copy, Default)]
struct Awaited {
    /// Which stream or disk barrier
    number: u32,
    barrier: Barrier,
    is_met: bool,
}

/// What came about by an acknowledgement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Acked {
    /// All RAM and all of QEMU's stream are there: the tail may be released
    Ram,
    /// All disks are there, up to the barrier of this number
    Disks(u32),
}

impl AckTracker {
    pub(super) fn new(channel_count: usize) -> Self {
        Self(Mutex::new(Inner {
            stream: Stream::None,
            stream_number: 0,
            disk_awaited: 0,
            disk_number: 0,
            channels: vec![Expected::default(); channel_count],
            stream_end: None,
            first_applied: 0,
        }))
    }

    /// Begins a stream; `None` when one is under way, or was released.
    pub(super) fn begin_stream(&self) -> Option<u32> {
        let mut inner = self.lock();
        if !matches!(inner.stream, Stream::None | Stream::GivenUp) {
            return None;
        }
        inner.stream = Stream::Begun;
        inner.stream_number += 1;
        inner.stream_end = None;
        Some(inner.stream_number)
    }

    /// Gives the stream of now up, and waits for no disk barrier any more;
    /// `false` when the destination's QEMU may have all of it already.
    pub(super) fn give_up(&self) -> bool {
        let mut inner = self.lock();
        if inner.stream == Stream::Released {
            return false;
        }
        if inner.stream == Stream::Begun {
            inner.stream = Stream::GivenUp;
        }
        inner.disk_awaited = 0;
        true
    }

    /// The destination begins again: what it had of streams and disk barriers counts no
    /// more.
    pub(super) fn begin_retry(&self) {
        let mut inner = self.lock();
        inner.stream = Stream::GivenUp;
        inner.disk_awaited = 0;
    }

    pub(super) fn is_given_up(&self, stream: u32) -> bool {
        let inner = self.lock();
        inner.stream == Stream::GivenUp || inner.stream_number != stream
    }

    /// Begins a disk barrier.
    pub(super) fn begin_disks(&self) -> u32 {
        let mut inner = self.lock();
        inner.disk_number += 1;
        inner.disk_awaited = inner.disk_number;
        inner.disk_number
    }

    pub(super) fn expect_ram(&self, channel: usize, stream: u32, barrier: Barrier) {
        self.lock().channels[channel].ram = Awaited { number: stream, barrier, is_met: false };
    }

    pub(super) fn expect_disks(&self, channel: usize, number: u32, barrier: Barrier) {
        self.lock().channels[channel].disk = Awaited { number, barrier, is_met: false };
    }

    pub(super) fn expect_end(&self, stream: u32, at: u64) {
        let mut inner = self.lock();
        if inner.stream_number == stream {
            inner.stream_end = Some(at);
        }
    }

    /// Takes an acknowledgement; says what came about by it, each once. The
    /// counts of frames in it were checked.
    pub(super) fn take(&self, ack: &Ack) -> Result<Vec<Acked>, PlaneError> {
        let channel = usize::from(ack.channel);
        let mut inner = self.lock();
        let expected = inner
            .channels
            .get_mut(channel)
            .ok_or_else(|| PlaneError::protocol("return path", "an ack of no channel"))?;
        expected.ram.meet(ack.ram, channel, Place::Ram)?;
        expected.disk.meet(ack.disk, channel, Place::Disks)?;
        if channel == 0 {
            inner.first_applied = ack.applied;
        }
        let mut acked = Vec::new();
        let ended = inner.stream_end.is_some_and(|at| at <= inner.first_applied);
        let number = inner.stream_number;
        let through = |awaited: Awaited, number| awaited.is_met && awaited.number == number;
        if inner.stream == Stream::Begun
            && ended
            && inner.channels.iter().all(|expected| through(expected.ram, number))
        {
            inner.stream = Stream::Released;
            acked.push(Acked::Ram);
        }
        let number = inner.disk_awaited;
        if number > 0 && inner.channels.iter().all(|expected| through(expected.disk, number)) {
            inner.disk_awaited = 0;
            acked.push(Acked::Disks(number));
        }
        Ok(acked)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Awaited {
    fn meet(&mut self, theirs: Barrier, channel: usize, place: Place) -> Result<(), PlaneError> {
        // An older one was overtaken by the one that is waited for now.
        if theirs.at < self.barrier.at || theirs.at == 0 {
            return Ok(());
        }
        if theirs.at > self.barrier.at {
            return Err(PlaneError::protocol("return path", "an ack of no barrier"));
        }
        if theirs.digest != self.barrier.digest {
            return Err(PlaneError::Different { channel: channel.to_string(), place });
        }
        self.is_met = true;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn barrier(at: u64) -> Barrier {
        Barrier { at, digest: [u8::try_from(at).unwrap(); 32] }
    }

    fn ack(channel: u8, applied: u64, ram_at: u64) -> Ack {
        Ack { channel, applied, ram: barrier(ram_at), ..Ack::default() }
    }

    #[test]
    fn a_stream_is_released_once_all_of_it_is_there() {
        let ack_tracker = AckTracker::new(2);
        let stream = ack_tracker.begin_stream().unwrap();
        assert_eq!(ack_tracker.begin_stream(), None, "one at a time");
        ack_tracker.expect_ram(0, stream, barrier(5));
        ack_tracker.expect_ram(1, stream, barrier(3));
        ack_tracker.expect_end(stream, 7);
        assert_eq!(ack_tracker.take(&ack(1, 3, 3)).unwrap(), []);
        assert_eq!(ack_tracker.take(&ack(0, 6, 5)).unwrap(), [], "the tail is missing");
        assert_eq!(ack_tracker.take(&ack(0, 7, 5)).unwrap(), [Acked::Ram]);
        assert_eq!(ack_tracker.take(&ack(0, 7, 5)).unwrap(), [], "it is said again, and told once");
        assert!(!ack_tracker.give_up(), "too late");
        ack_tracker.begin_retry();
        assert!(ack_tracker.is_given_up(stream));
        let second = ack_tracker.begin_stream().unwrap();
        ack_tracker.expect_end(second, 20);
        assert_eq!(ack_tracker.take(&ack(0, 20, 5)).unwrap(), [], "barriers of the stream before");
    }

    #[test]
    fn what_was_given_up_never_counts() {
        let ack_tracker = AckTracker::new(1);
        let first = ack_tracker.begin_stream().unwrap();
        let disks = ack_tracker.begin_disks();
        ack_tracker.expect_ram(0, first, barrier(1));
        ack_tracker.expect_disks(0, disks, barrier(2));
        ack_tracker.expect_end(first, 3);
        assert!(ack_tracker.give_up() && ack_tracker.is_given_up(first));
        let all = Ack { disk: barrier(2), ..ack(0, 3, 1) };
        assert_eq!(ack_tracker.take(&all).unwrap(), []);
        let second = ack_tracker.begin_stream().unwrap();
        assert!(
            second > first && ack_tracker.is_given_up(first) && !ack_tracker.is_given_up(second)
        );
        assert_eq!(ack_tracker.take(&Ack { applied: 9, ..all }).unwrap(), []);
        ack_tracker.expect_ram(0, second, barrier(10));
        ack_tracker.expect_end(second, 11);
        assert_eq!(ack_tracker.take(&ack(0, 11, 10)).unwrap(), [Acked::Ram]);
        let next = ack_tracker.begin_disks();
        ack_tracker.expect_disks(0, next, barrier(12));
        let all = Ack { disk: barrier(12), ..ack(0, 12, 10) };
        assert_eq!(ack_tracker.take(&all).unwrap(), [Acked::Disks(next)]);
    }

    #[test]
    fn acks_that_cannot_be_are_refused() {
        let ack_tracker = AckTracker::new(1);
        let stream = ack_tracker.begin_stream().unwrap();
        ack_tracker.expect_ram(0, stream, barrier(5));
        assert!(ack_tracker.take(&ack(1, 9, 0)).is_err(), "no such channel");
        assert!(ack_tracker.take(&ack(0, 9, 6)).is_err(), "no such barrier");
        let other = Ack { ram: Barrier { at: 5, digest: [0; 32] }, ..ack(0, 9, 5) };
        assert!(matches!(ack_tracker.take(&other), Err(PlaneError::Different { .. })));
    }
}
