//! Where blocks go at the destination.

use std::io;

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
    fn flush(&mut self) -> io::Result<()> {
        Self::flush(self)
    }
}
