//! Where blocks go at the destination.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rustix::fs::FallocateFlags;

use limosa_nbd::client::NbdClient;

/// A disk at the destination. Operations are applied in the order of the calls,
/// where they overlap.
pub trait DiskTarget {
    /// Bytes of the disk.
    fn size_bytes(&self) -> u64;
    /// Writes bytes.
    ///
    /// # Errors
    /// Also those of operations before.
    fn write(&mut self, offset_bytes: u64, bytes: &[u8]) -> io::Result<()>;
    /// Makes a range read as zeroes; a hole if it may be one.
    ///
    /// # Errors
    /// Also those of operations before.
    fn write_zeroes(&mut self, offset: u64, length: u64, may_unmap: bool) -> io::Result<()>;
    /// A range is not needed any more.
    ///
    /// # Errors
    /// Also those of operations before.
    fn discard(&mut self, offset_bytes: u64, length_bytes: u64) -> io::Result<()>;
    /// Returns when everything before is durable.
    ///
    /// # Errors
    /// Also those of operations before.
    fn flush(&mut self) -> io::Result<()>;
}

impl DiskTarget for NbdClient {
    fn size_bytes(&self) -> u64 {
        Self::size_bytes(self)
    }
    fn write(&mut self, offset_bytes: u64, bytes: &[u8]) -> io::Result<()> {
        Self::write(self, offset_bytes, bytes)
    }
    fn write_zeroes(&mut self, offset: u64, length: u64, may_unmap: bool) -> io::Result<()> {
        Self::write_zeroes(self, offset, length, may_unmap)
    }
    fn discard(&mut self, offset_bytes: u64, length_bytes: u64) -> io::Result<()> {
        Self::discard(self, offset_bytes, length_bytes)
    }
    fn flush(&mut self) -> io::Result<()> {
        Self::flush(self)
    }
}

/// A raw image that is written without a QEMU in between.
pub struct RawTarget {
    file: File,
    size_bytes: u64,
}

impl RawTarget {
    /// Takes an image that is open for writing.
    ///
    /// # Errors
    /// The file's.
    pub fn new(file: File) -> io::Result<Self> {
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
    fn discard(&mut self, offset_bytes: u64, length_bytes: u64) -> io::Result<()> {
        self.write_zeroes(offset_bytes, length_bytes, true)
    }
    fn flush(&mut self) -> io::Result<()> {
        self.file.sync_data()
    }
}
