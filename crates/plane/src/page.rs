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

/// Number of a block on the wire.
pub(crate) fn block_number(block: usize) -> u8 {
    u8::try_from(block).expect("at most 256 blocks: the parser of QEMU's stream checks it")
}

/// Number of a page in its block on the wire.
pub(crate) fn page_index(page: u64) -> u32 {
    u32::try_from(page).expect("a block of RAM is smaller than 16 TiB")
}
