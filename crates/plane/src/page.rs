//! The unit in which RAM is moved.

/// Bytes of a guest page.
pub const PAGE_BYTES: usize = limosa_qemu::stream::PAGE_BYTES;

/// A page of guest RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PagePlace {
    /// Number of its block
    pub block: u8,
    /// Number of the page in it
    pub page: u32,
}
