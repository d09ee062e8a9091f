//! RAM and disks of a source's plane.

use std::fs::File;
use std::sync::Arc;

/// A block of guest RAM that goes out of band.
#[derive(Debug, Clone)]
pub struct RamBlockSpec {
    /// QEMU's name of it
    pub name: String,
    /// Bytes
    pub size_bytes: u64,
    /// The block's memfd, if pages that the guest gave back (free page reporting) must
    /// be zero at the destination, too. QEMU does not count them as dirty.
    pub memory: Option<Arc<File>>,
}

/// A disk that is mirrored.
#[derive(Debug, Clone, Copy)]
pub struct SourceDisk {
    /// Its number, the same at the destination
    pub index: u16,
    /// Bytes
    pub size_bytes: u64,
    /// The destination's image reads as zeroes where nothing was written
    pub fresh: bool,
}
