//! What waits for the senders, and the queues in which it waits.

use std::io;
use std::sync::Arc;

use limosa_protocol::frame::{DiskHeader, FrameKind};

use crate::page::PagePlace;
use crate::queue::Queue;

/// Bytes of a piece of work in a queue, at most: a batch of pages or a piece of
/// a disk write.
pub(super) const WORK_BYTES_MAX: usize = 256 << 10;

/// What waits for each channel's sender.
pub(super) type Queues = Arc<[Queue<Work>]>;

/// Pages on their way to a sender.
#[derive(Default)]
pub(super) struct Batch {
    /// Block, page, and whether it is zero; the others' contents are in `bytes`.
    pub(super) pages: Vec<(usize, u64, bool)>,
    pub(super) bytes: Vec<u8>,
}

/// A disk operation on its way to a sender.
pub(super) struct DiskOperation {
    pub(super) kind: FrameKind,
    pub(super) head: DiskHeader,
    pub(super) bytes: Vec<u8>,
}

/// What a sender is given.
pub(super) enum Work {
    /// A stream of QEMU begins
    RamStart(u32),
    Pages(Batch),
    Disk(DiskOperation),
    Stream(Vec<u8>),
    Tail(Vec<u8>),
    StreamEnd,
    Release,
    RamBarrier,
    /// The destination has only zeroes there now
    Forget(Vec<PagePlace>),
    /// Its number
    DiskBarrier(u32),
    /// The two sides differ
    Digests,
}

/// The error of a call to a plane that has ended.
pub(super) fn ended() -> io::Error {
    io::Error::new(io::ErrorKind::BrokenPipe, "the migration has ended")
}
