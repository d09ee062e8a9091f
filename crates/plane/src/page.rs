//! The unit in which RAM is moved.

/// Bytes of a guest page.
pub const PAGE_BYTES: usize = limosa_qemu::stream::PAGE_BYTES;
