//! What can be set of a plane.

/// Settings of either half.
#[derive(Debug, Clone, Copy)]
pub struct PlaneSettings {
    /// Bytes between QEMU and the channels, over all channels. Small: QEMU takes
    /// the speed at which it is emptied for the network's, and what is in it
    /// when the guest stops is blackout.
    pub window_bytes: usize,
    /// Most memory for the previous versions of pages.
    pub page_versions_bytes_max: u64,
    /// Whether payloads are compressed.
    pub compression: bool,
}

impl Default for PlaneSettings {
    fn default() -> Self {
        Self { window_bytes: 4 << 20, page_versions_bytes_max: 512 << 20, compression: true }
    }
}
