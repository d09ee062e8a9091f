//! Deals the operations of a mirrored disk to the senders.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use limosa_protocol::frame::{DiskHeader, FrameKind};

use super::spec::SourceDisk;
use super::work::{DiskOperation, Queues, WORK_BYTES_MAX, Work, ended};
use crate::meter::{Meter, add};
use crate::route::{REGION_BYTES, disk_channel};
use limosa_nbd::server::DiskSink;

/// Bytes for which it is remembered whether anything was written there.
const TOUCHED_BYTES: u64 = 64 << 10;

/// Cuts operations at the borders of regions, and leaves out what changes
/// nothing: zeroes for a part of a fresh disk that was never written.
pub(super) struct ChannelSink {
    disk: SourceDisk,
    queues: Queues,
    /// The queues accept operations past their limit, see
    /// [`super::SourcePlane::set_backpressure`]
    is_urgent: Arc<AtomicBool>,
    meter: Arc<Meter>,
    /// One bit for each [`TOUCHED_BYTES`] of the disk.
    touched: Vec<u64>,
}

impl ChannelSink {
    pub(super) fn new(
        disk: SourceDisk,
        queues: Queues,
        is_urgent: Arc<AtomicBool>,
        meter: Arc<Meter>,
    ) -> Self {
        let bits = disk.size_bytes.div_ceil(TOUCHED_BYTES);
        let units = usize::try_from(bits.div_ceil(64)).unwrap_or(usize::MAX);
        Self { disk, queues, is_urgent, meter, touched: vec![0; units] }
    }

    fn send(&self, kind: FrameKind, head: DiskHeader, bytes: Vec<u8>) -> io::Result<()> {
        let channel = disk_channel(self.disk.index, head.offset_bytes, self.queues.len());
        let operation = DiskOperation { kind, head, bytes };
        let is_urgent = || self.is_urgent.load(Ordering::Acquire);
        self.queues[channel].push_or_else(Work::Disk(operation), is_urgent).map_err(|_| ended())
    }

    fn head(&self, may_unmap: bool, offset_bytes: u64, length_bytes: u64) -> DiskHeader {
        DiskHeader { disk: self.disk.index, may_unmap, offset_bytes, length_bytes }
    }

    fn bits(offset: u64, length: u64) -> impl Iterator<Item = (usize, u64)> {
        let first = offset / TOUCHED_BYTES;
        let last = (offset + length.max(1) - 1) / TOUCHED_BYTES;
        (first..=last).map(|bit| (usize::try_from(bit / 64).unwrap_or(usize::MAX), 1 << (bit % 64)))
    }

    fn touch(&mut self, offset: u64, length: u64) {
        for (unit, bit) in Self::bits(offset, length) {
            self.touched[unit] |= bit;
        }
    }

    fn is_touched(&self, offset: u64, length: u64) -> bool {
        Self::bits(offset, length).any(|(unit, bit)| self.touched[unit] & bit != 0)
    }

    /// Sends a range piece by piece, without those that change nothing.
    fn range(
        &mut self,
        kind: FrameKind,
        offset: u64,
        length: u64,
        may_unmap: bool,
    ) -> io::Result<()> {
        for (offset, length) in pieces(offset, length, REGION_BYTES) {
            let changes = !self.disk.fresh || !may_unmap || self.is_touched(offset, length);
            if changes {
                self.touch(offset, length);
                self.send(kind, self.head(may_unmap, offset, length), Vec::new())?;
            }
        }
        Ok(())
    }
}

impl DiskSink for ChannelSink {
    fn write(&mut self, offset: u64, bytes: Vec<u8>) -> io::Result<()> {
        self.touch(offset, bytes.len() as u64);
        let mut rest = &bytes[..];
        for (offset, length) in pieces(offset, bytes.len() as u64, WORK_BYTES_MAX as u64) {
            let (piece, later) = rest.split_at(usize::try_from(length).unwrap_or(rest.len()));
            rest = later;
            let head = self.head(false, offset, length);
            self.send(FrameKind::DiskWrite, head, piece.to_vec())?;
        }
        Ok(())
    }

    fn write_zeroes(&mut self, offset: u64, length: u64, may_unmap: bool) -> io::Result<()> {
        add(&self.meter.disk_zero_bytes, length);
        self.range(FrameKind::DiskZero, offset, length, may_unmap)
    }

    fn discard(&mut self, offset: u64, length: u64) -> io::Result<()> {
        // A discarded range may read as anything, on each side: made zero, it
        // reads the same on both.
        self.range(FrameKind::DiskDiscard, offset, length, true)
    }

    fn flush(&mut self) -> io::Result<()> {
        // Durability is proven before the commit, see `limosa_nbd::server`.
        Ok(())
    }
}

/// Cuts a range at multiples of `at_bytes`.
fn pieces(offset: u64, length: u64, at_bytes: u64) -> impl Iterator<Item = (u64, u64)> {
    let end = offset + length;
    let mut from = offset;
    std::iter::from_fn(move || {
        if from >= end {
            return None;
        }
        let to = (from / at_bytes + 1).saturating_mul(at_bytes).min(end);
        let piece = (from, to - from);
        from = to;
        Some(piece)
    })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::queue::{Popped, Queue};

    #[test]
    fn zeroes_of_a_fresh_disk_are_left_out() {
        let queues: Queues = vec![Queue::new(100)].into();
        let count = || {
            let taken = || matches!(queues[0].pop(Duration::ZERO), Popped::Item(_));
            std::iter::repeat_with(taken).take_while(|taken| *taken).count()
        };
        let disk = SourceDisk { index: 0, size_bytes: 1 << 40, fresh: true };
        let (urgent, meter) = (Arc::default(), Arc::new(Meter::default()));
        let mut sink = ChannelSink::new(disk, Arc::clone(&queues), urgent, meter);
        sink.write_zeroes(0, 1 << 40, true).unwrap();
        assert_eq!(count(), 0);
        sink.write((1 << 20) - 4, vec![7; 8]).unwrap();
        assert_eq!(count(), 2, "cut at the region's border");
        sink.write_zeroes(0, 1 << 40, true).unwrap();
        assert_eq!(count(), 2, "only the two that were written");
    }

    /// Goal: a mirror's write that waits for room gets none from its taker, and goes on
    /// when QEMU waits for it.
    #[test]
    fn urgent_writes_need_no_room() {
        let queues: Queues = vec![Queue::new(1)].into();
        let urgent = Arc::new(AtomicBool::new(false));
        let disk = SourceDisk { index: 0, size_bytes: 1 << 30, fresh: true };
        let meter = Arc::new(Meter::default());
        let mut sink = ChannelSink::new(disk, Arc::clone(&queues), Arc::clone(&urgent), meter);
        sink.write(0, vec![1; 512]).unwrap();
        let waiting = std::thread::spawn(move || sink.write(4096, vec![2; 512]));
        std::thread::sleep(Duration::from_millis(50));
        assert!(!waiting.is_finished(), "there is no room");
        urgent.store(true, Ordering::Release);
        queues[0].wake();
        waiting.join().unwrap().unwrap();
        for _ in 0..2 {
            assert!(matches!(queues[0].pop(Duration::ZERO), Popped::Item(Work::Disk(_))));
        }
    }
}
