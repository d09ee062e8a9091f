//! What can be set of a plane.

use std::time::Duration;

/// A connection from which nothing came for this long is lost. The reads of a
/// [`crate::ChannelIo`] fail after it.
pub const SILENCE_MAX: Duration = Duration::from_secs(5);

/// Settings of either half.
#[derive(Debug, Clone, Copy)]
pub struct PlaneSettings {
    /// Bytes between QEMU and the channels, over all channels. Small: QEMU takes
    /// the speed at which it is emptied for the network's, and what is in it
    /// when the guest stops is blackout.
    pub window_bytes: usize,
    /// Most memory for the previous versions of pages.
    pub page_cache_bytes_max: u64,
    /// Whether payloads are compressed.
    pub compression: bool,
    /// Most bytes that are kept to be sent again, over all channels: what is on
    /// its way and not acknowledged. It is the most that can be under way at all,
    /// so a far link needs it large; an agent's own memory, 64 MiB, bounds it.
    pub replay_bytes_max: usize,
    /// How often who has nothing to say says so.
    pub keep_alive_every: Duration,
}

impl Default for PlaneSettings {
    fn default() -> Self {
        Self {
            window_bytes: 4 << 20,
            page_cache_bytes_max: 512 << 20,
            compression: true,
            replay_bytes_max: 16 << 20,
            keep_alive_every: Duration::from_secs(1),
        }
    }
}
