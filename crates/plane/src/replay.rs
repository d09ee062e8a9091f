//! Frames that were sent and may still have to be sent again.
//!
//! ```text
//! frame numbers   1 … acknowledged │ kept: acknowledged + 1 … sent │ not made yet
//! ```
//!
//! The buffer is the window: a sender without room waits for an acknowledgement.
//!
//! **Invariants.** No more bytes are kept than the limit, or one frame. What the
//! destination says it has on a new connection lies between what it acknowledged
//! and what was sent, or the migration ends.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// A count of frames that cannot be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the peer has {claimed} frames, and it is to have {acknowledged} to {sent}")]
pub(crate) struct BadCount {
    claimed: u64,
    acknowledged: u64,
    sent: u64,
}

/// Frames of one channel.
pub(crate) struct Replay {
    kept: Mutex<Kept>,
    room: Condvar,
    bytes_max: usize,
}

#[derive(Default)]
struct Kept {
    /// Frames before the first that is kept
    acknowledged: u64,
    lengths: VecDeque<u32>,
    bytes: VecDeque<u8>,
}

impl Kept {
    fn sent(&self) -> u64 {
        self.acknowledged + self.lengths.len() as u64
    }

    /// Index among the kept frames of the first that is not among `claimed`.
    fn index(&self, claimed: u64) -> Result<usize, BadCount> {
        let (acknowledged, sent) = (self.acknowledged, self.sent());
        claimed
            .checked_sub(acknowledged)
            .filter(|_| claimed <= sent)
            .and_then(|count| usize::try_from(count).ok())
            .ok_or(BadCount { claimed, acknowledged, sent })
    }
}

impl Replay {
    pub(crate) fn new(bytes_max: usize) -> Self {
        Self { kept: Mutex::default(), room: Condvar::new(), bytes_max }
    }

    /// Number of the frame that was sent last.
    pub(crate) fn sent(&self) -> u64 {
        self.lock().sent()
    }

    /// Waits a while for room; says whether there is.
    pub(crate) fn has_room(&self, frame_bytes: usize, patience: Duration) -> bool {
        let is_full = |kept: &mut Kept| {
            !kept.bytes.is_empty() && kept.bytes.len() + frame_bytes > self.bytes_max
        };
        let waited = self.room.wait_timeout_while(self.lock(), patience, is_full);
        !is_full(&mut waited.unwrap_or_else(PoisonError::into_inner).0)
    }

    /// Keeps a frame. The caller knows that there is room.
    pub(crate) fn keep(&self, frame: &[u8]) {
        let mut kept = self.lock();
        kept.lengths
            .push_back(u32::try_from(frame.len()).expect("FrameMaker made it: at most 4 GiB"));
        kept.bytes.extend(frame);
    }

    /// Forgets what the destination has for good. An acknowledgement that was
    /// overtaken by a later count says nothing new.
    pub(crate) fn acknowledge(&self, count: u64) -> Result<(), BadCount> {
        let mut kept = self.lock();
        let index = kept.index(count.max(kept.acknowledged))?;
        let bytes: usize = kept.lengths.drain(..index).map(|length| length as usize).sum();
        kept.bytes.drain(..bytes);
        kept.acknowledged += index as u64;
        drop(kept);
        self.room.notify_all();
        Ok(())
    }

    /// All frames after those that the destination has. What it acknowledged is
    /// not there any more: it cannot have less than that.
    pub(crate) fn after(&self, count: u64) -> Result<Vec<u8>, BadCount> {
        self.lock().index(count)?;
        self.acknowledge(count)?;
        let kept = self.lock();
        let (first, second) = kept.bytes.as_slices();
        Ok([first, second].concat())
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_missing_is_resent() {
        let replay = Replay::new(10);
        for frame in [&b"aaa"[..], b"bbbb", b"cc"] {
            assert!(replay.has_room(frame.len(), Duration::ZERO));
            replay.keep(frame);
        }
        assert!(!replay.has_room(2, Duration::ZERO), "the window is full");
        replay.acknowledge(1).unwrap();
        assert!(replay.has_room(2, Duration::ZERO));
        assert_eq!(replay.after(2).unwrap(), b"cc");
        assert_eq!(replay.after(3).unwrap(), b"");
        let large = [1; 100];
        assert!(replay.has_room(large.len(), Duration::ZERO), "one frame always goes");
        replay.keep(&large);
        assert_eq!((replay.sent(), replay.after(3).unwrap().len()), (4, 100));
    }

    #[test]
    fn counts_that_cannot_be_are_refused() {
        let replay = Replay::new(10);
        replay.keep(b"aaa");
        replay.keep(b"bbb");
        replay.acknowledge(1).unwrap();
        for claimed in [0, 3, u64::MAX] {
            assert_eq!(replay.after(claimed).unwrap_err().claimed, claimed);
            assert_eq!(replay.acknowledge(claimed).is_err(), claimed > 2);
        }
        assert_eq!(replay.after(1).unwrap(), b"bbb", "nothing was changed by them");
    }
}
