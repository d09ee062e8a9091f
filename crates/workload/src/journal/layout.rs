//! What lies where on a disk, and reading and writing it past the guest's cache.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};

use crate::page::{PAGE_BYTES, Page, as_bytes};

/// Most of a disk that is one ring.
const RING_BYTES_MAX: u64 = 16 << 20;
/// Most of a disk that is filled when it is new.
const FILLED_BYTES_MAX: u64 = 256 << 20;
/// Blocks that are zeroed and filled in turn.
pub(super) const TURNING_COUNT: usize = 256;
/// Blocks of one read of many.
pub(super) const CHUNK_BLOCKS: usize = 256;
/// Bytes of a block.
const BLOCK_BYTES: u64 = PAGE_BYTES as u64;

/// A disk and its parts, in blocks.
#[derive(Debug)]
pub(super) struct Disk {
    pub(super) name: String,
    file: File,
    /// Slots of the ring, from the first block on
    pub(super) slots: u64,
    pub(super) filled: Range<u64>,
    pub(super) turning: Range<u64>,
    pub(super) blocks: u64,
}

impl Disk {
    /// Opens a disk past the guest's cache.
    pub(super) fn open(name: &str) -> io::Result<Self> {
        let path = format!("/dev/{name}");
        let file =
            OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(path)?;
        Self::of(file, name)
    }

    /// Lays out a disk that is open.
    pub(super) fn of(file: File, name: &str) -> io::Result<Self> {
        let blocks = (&file).seek(SeekFrom::End(0))? / BLOCK_BYTES;
        let slots = (blocks / 4).min(RING_BYTES_MAX / BLOCK_BYTES);
        let filled = slots..slots + (blocks / 3).min(FILLED_BYTES_MAX / BLOCK_BYTES);
        let turning = filled.end..filled.end + TURNING_COUNT as u64;
        if slots == 0 || turning.end > blocks {
            return Err(io::Error::other(format!("{name} is too small for a journal")));
        }
        Ok(Self { name: name.to_owned(), file, slots, filled, turning, blocks })
    }

    /// Slot of the ring in which a record belongs.
    pub(super) fn slot_of(&self, sequence: u64) -> u64 {
        (sequence - 1) % self.slots
    }

    /// The record that a slot must hold once records up to `last` are written;
    /// `None` when it was never written.
    pub(super) fn sequence_in(&self, slot: u64, last: u64) -> Option<u64> {
        let back = (self.slot_of(last.max(1)) + self.slots - slot) % self.slots;
        last.checked_sub(back).filter(|sequence| *sequence > 0)
    }

    /// Reads blocks from that one on.
    pub(super) fn read(&self, at: u64, blocks: &mut [Page]) -> io::Result<()> {
        self.file.read_exact_at(as_bytes(blocks), at * BLOCK_BYTES)
    }

    /// Writes blocks from that one on.
    pub(super) fn write(&self, at: u64, blocks: &mut [Page]) -> io::Result<()> {
        self.file.write_all_at(as_bytes(blocks), at * BLOCK_BYTES)
    }

    /// Makes all that was written durable.
    pub(super) fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// Zeroes the blocks that turn.
    pub(super) fn zero_turning(&self) -> io::Result<()> {
        let count = self.turning.end - self.turning.start;
        let range: [u64; 2] = [self.turning.start * BLOCK_BYTES, count * BLOCK_BYTES];
        // SAFETY: BLKZEROOUT reads two words from the pointer, which are there.
        let done = unsafe { libc::ioctl(self.file.as_raw_fd(), BLKZEROOUT, (&raw const range)) };
        if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// Goes over blocks in order, with what each of them holds.
    pub(super) fn each(
        &self,
        blocks: Range<u64>,
        mut look: impl FnMut(u64, &mut Page) -> io::Result<()>,
    ) -> io::Result<()> {
        let chunk_blocks =
            |from| usize::try_from(blocks.end - from).unwrap_or(CHUNK_BLOCKS).min(CHUNK_BLOCKS);
        let mut chunk = vec![Page::ZERO; chunk_blocks(blocks.start)];
        let mut at = blocks.start;
        while at < blocks.end {
            let some = &mut chunk[..chunk_blocks(at)];
            self.read(at, some)?;
            for block in some {
                look(at, block)?;
                at += 1;
            }
        }
        Ok(())
    }
}

/// The kernel's request to write zeroes; `_IO(0x12, 127)`.
const BLKZEROOUT: libc::Ioctl = 0x127f;
