//! A destination's disk without a QEMU: a raw image that is written directly.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rustix::fs::FallocateFlags;

use crate::DiskTarget;

/// A raw image.
pub(super) struct RawTarget {
    file: File,
    size_bytes: u64,
}

impl RawTarget {
    /// - `file`: open for writing.
    pub(super) fn new(file: File) -> io::Result<Self> {
        let size_bytes = file.metadata()?.len();
        Ok(Self { file, size_bytes })
    }
}

impl DiskTarget for RawTarget {
    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }
    fn write(&mut self, offset_bytes: u64, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all_at(bytes, offset_bytes)
    }
    fn write_zeroes(&mut self, offset: u64, length: u64, may_unmap: bool) -> io::Result<()> {
        let how = if may_unmap {
            FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE
        } else {
            FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE
        };
        Ok(rustix::fs::fallocate(&self.file, how, offset, length)?)
    }
    fn flush(&mut self) -> io::Result<()> {
        self.file.sync_data()
    }
}
