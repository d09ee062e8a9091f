//! The settings of migrations, as the configuration file has them.

use std::path::PathBuf;
use std::time::Duration;

use limosa_plane::PlaneSettings;
use serde::Deserialize;

/// Most migrations that a host may have under way, both ways together.
pub const CONCURRENT_COUNT_MAX: u8 = 16;

/// How migrations use the network and memory.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MigrationSettings {
    /// Most migrations under way on this host, both ways together; further ones wait.
    pub concurrent_max: u8,
    /// Data channels of one migration.
    pub channels: u8,
    /// Most memory for the previous versions of pages, in MiB.
    pub page_versions_mib: u32,
    /// Bytes on their way between QEMU and the network, in KiB.
    pub window_kib: u32,
    /// Whether pages and blocks are compressed.
    pub compression: bool,
    /// How long a migration waits for a lost link, in seconds.
    pub link_wait_s: u32,
    /// Folders, besides the agent's own, in which VMs that move here may lie.
    pub storage_roots: Vec<PathBuf>,
}

impl Default for MigrationSettings {
    fn default() -> Self {
        Self {
            concurrent_max: CONCURRENT_COUNT_MAX,
            channels: 2,
            page_versions_mib: 512,
            window_kib: 4096,
            compression: true,
            link_wait_s: 60,
            storage_roots: vec!["/srv".into(), "/mnt".into()],
        }
    }
}

impl MigrationSettings {
    /// How long a lost link is waited for.
    pub(crate) fn link_wait(&self) -> Duration {
        Duration::from_secs(self.link_wait_s.into())
    }

    /// Those of a data plane.
    pub(crate) fn plane(&self) -> PlaneSettings {
        PlaneSettings {
            window_bytes: usize::try_from(self.window_kib).unwrap_or(usize::MAX >> 10) << 10,
            page_cache_bytes_max: u64::from(self.page_versions_mib) << 20,
            compression: self.compression,
            ..PlaneSettings::default()
        }
    }
}
